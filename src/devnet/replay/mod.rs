//! Serves captured traffic as it was: every captured host again as a host with cursors, and a PLC
//! directory whose documents are what their audit logs said at the time of the last frame sent.
//! Time moves only when a frame is sent, so what a relay is told never depends on its speed.

mod audit;
mod capture;
mod host;
mod serve;

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::Mutex;
use std::sync::atomic::{AtomicI64, AtomicUsize, Ordering};
use std::time::Duration;

pub use audit::{Audit, AuditError, DocumentStyle, Registration};
pub use capture::{About, Capture, CaptureError, CapturedFrame, CapturedHost, Moment, State};
use host::Host;

use crate::devnet::server::Server;
use crate::devnet::timestamp::Timestamp;

/// The time of the capture at which the documents are served, shared by directory and hosts.
#[derive(Debug)]
struct Clock(AtomicI64);

impl Clock {
    fn now(&self) -> Timestamp {
        Timestamp::from_millis(self.0.load(Ordering::Acquire))
    }

    fn advance(&self, to: Timestamp) {
        self.0.fetch_max(to.millis(), Ordering::AcqRel);
    }
}

/// Not every host has a subscriber.
#[derive(Debug, thiserror::Error)]
#[error("nobody subscribed to {} within {waited:?}", hosts.join(", "))]
pub struct NotConnected {
    hosts: Vec<String>,
    waited: Duration,
}

/// A running replay. Dropping it stops its servers.
pub struct Replay {
    capture: Capture,
    timeline: Vec<Moment>,
    hosts: Vec<(Arc<Host>, Server)>,
    directory: Server,
    clock: Arc<Clock>,
    /// Frames of the timeline that were sent; the lock keeps two senders from mixing the order.
    sent: Mutex<usize>,
    position: AtomicUsize,
}

impl Replay {
    /// Starts the servers on free local ports, at a time before the first frame.
    pub async fn start(capture: Capture, style: DocumentStyle) -> std::io::Result<Replay> {
        let clock = Arc::new(Clock(AtomicI64::new(i64::MIN)));
        let mut hosts = Vec::new();
        let mut moved = HashMap::new();
        for index in 0..capture.hosts.len() {
            let host = Host::new();
            let server = Server::start(serve::host(host.clone())).await?;
            moved.extend(
                capture
                    .endpoint(index)
                    .map(|endpoint| (endpoint, server.url())),
            );
            hosts.push((host, server));
        }
        let directory = serve::Directory::new(capture.audits.clone(), style, moved, clock.clone());
        let directory = Server::start(serve::directory(directory)).await?;
        let timeline = capture.timeline();
        Ok(Replay {
            capture,
            timeline,
            hosts,
            directory,
            clock,
            sent: Mutex::new(0),
            position: AtomicUsize::new(0),
        })
    }

    /// Base URL of the PLC directory.
    pub fn plc_url(&self) -> String {
        self.directory.url()
    }

    /// Base URL of a host.
    pub fn host_url(&self, host: usize) -> String {
        self.hosts[host].1.url()
    }

    /// What is replayed.
    pub fn capture(&self) -> &Capture {
        &self.capture
    }

    /// Every frame in the order it is sent.
    pub fn timeline(&self) -> &[Moment] {
        &self.timeline
    }

    /// How many frames of the timeline were sent.
    pub fn position(&self) -> usize {
        self.position.load(Ordering::Acquire)
    }

    /// A frame of the timeline.
    pub fn frame(&self, moment: &Moment) -> &CapturedFrame {
        &self.capture.hosts[moment.host].frames[moment.frame]
    }

    /// Sets directory and hosts to the time of the next frame, then sends it. `None` at the end.
    /// Whoever needs a frame to be judged by the documents of its time waits for what becomes of it
    /// before sending the next one.
    pub fn send_next(&self) -> Option<Moment> {
        let mut sent = self.sent.lock().expect("no holder of this lock panics");
        let moment = *self.timeline.get(*sent)?;
        self.clock.advance(moment.time);
        self.hosts[moment.host].0.send(self.frame(&moment));
        *sent += 1;
        self.position.store(*sent, Ordering::Release);
        Some(moment)
    }

    /// Sends every frame before place `end` of the timeline.
    pub fn send_until(&self, end: usize) {
        while self.position() < end && self.send_next().is_some() {}
    }

    /// Waits until every host has a subscriber.
    pub async fn connected(&self, patience: Duration) -> Result<(), NotConnected> {
        let all = async {
            for (host, _) in &self.hosts {
                // The sender lives in the host, so the wait ends only by its condition.
                let _ = host.feed().subscribers().wait_for(|count| *count > 0).await;
            }
        };
        if tokio::time::timeout(patience, all).await.is_ok() {
            return Ok(());
        }
        let silent = self
            .hosts
            .iter()
            .zip(&self.capture.hosts)
            .filter(|((host, _), _)| *host.feed().subscribers().borrow() == 0);
        Err(NotConnected {
            hosts: silent.map(|(_, captured)| captured.name.clone()).collect(),
            waited: patience,
        })
    }

    /// Ends the connections to a host; its subscribers come back with their cursors.
    pub fn hang_up(&self, host: usize) {
        self.hosts[host].0.feed().hang_up();
    }
}

impl Drop for Replay {
    fn drop(&mut self) {
        self.directory.stop();
        for (host, server) in &self.hosts {
            server.stop();
            host.feed().hang_up();
        }
    }
}
