//! A relay at work: its parts, as requests, metrics and health checks see them.

use std::sync::Arc;

use tokio::sync::watch;

use super::core::Core;
use super::ingest::Ingest;
use crate::api::Operations;
use crate::telemetry::{Health, Observed};

/// The parts of a relay.
pub(super) struct Running {
    pub core: Core,
    pub ingest: Ingest,
    /// The result of the last health check.
    pub health: watch::Receiver<Arc<Health>>,
}

impl Observed for Running {
    fn health(&self) -> Arc<Health> {
        Operations::health(self)
    }

    fn sample(&self) {
        self.core.log.sample();
        let consumers = self.core.firehose.consumers();
        consumers.sample(self.core.log.head());
        self.ingest.resolver.sample();
        self.ingest.writer.sample();
    }
}
