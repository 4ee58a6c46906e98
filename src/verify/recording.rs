//! A pipeline that verifies nothing, for tests of the rooms above: it records the events that are submitted.

use std::sync::Arc;

use tokio::sync::mpsc::{self, UnboundedReceiver};

use super::shard::Work;
use super::{Metrics, Pipeline, Settlements};
use crate::heartbeat::Heartbeat;
use crate::hosts::Received;

/// The events that were submitted to a pipeline without shards.
pub struct Recording(UnboundedReceiver<Work>);

impl Recording {
    /// The next event; `None` when the pipeline is gone.
    pub async fn next(&mut self) -> Option<Received> {
        loop {
            if let Work::Event(received) = self.0.recv().await? {
                return Some(received);
            }
        }
    }

    /// Whether no event waits to be taken.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

impl Pipeline {
    /// A pipeline that only records what is submitted.
    pub fn recording() -> (Self, Recording) {
        let (sender, events) = mpsc::unbounded_channel();
        let pipeline = Self {
            shards: Arc::new([sender]),
            settled: Settlements::new(1, 0),
            heartbeats: Arc::new([Heartbeat::default()]),
            metrics: Metrics::default(),
        };
        (pipeline, Recording(events))
    }
}
