//! When a connection is cut because its client does not read or does not answer.
//! Promises that a client that is slow to find our pings behind many events does not count as silent.

use std::time::Duration;

use tokio::time::Instant;

use super::FirehoseOptions;
use super::metrics::Cut;

/// Deadlines are checked this many times per the shortest of them.
const CHECKS_PER_DEADLINE: u32 = 4;

/// The latest signs of progress on a connection.
#[derive(Debug)]
pub(super) struct Deadlines {
    /// The socket took nothing at the last write.
    is_full: bool,
    /// When something was written last, or began to wait.
    progress: Instant,
    /// When the client sent something last.
    received: Instant,
    /// When the socket took events last.
    fed: Instant,
}

impl Deadlines {
    pub fn new(now: Instant) -> Deadlines {
        Deadlines {
            is_full: false,
            progress: now,
            received: now,
            fed: now,
        }
    }

    /// How often to check.
    pub fn interval(options: &FirehoseOptions) -> Duration {
        let shortest = options
            .ping_interval
            .min(options.write_timeout)
            .min(options.idle_timeout);
        (shortest / CHECKS_PER_DEADLINE).max(Duration::from_millis(1))
    }

    /// The socket took bytes.
    pub fn wrote(&mut self, now: Instant, events: u64) {
        self.progress = now;
        if events > 0 {
            self.fed = now;
        }
    }

    /// Whether the socket took nothing at the last write.
    pub fn set_full(&mut self, is_full: bool) {
        self.is_full = is_full;
    }

    /// The socket takes nothing, which may be for the first time.
    pub fn wait(&mut self) {
        if !self.is_full {
            self.progress = Instant::now();
        }
    }

    /// The client sent something.
    pub fn received(&mut self) {
        self.received = Instant::now();
    }

    /// # Errors
    /// Why the connection is cut.
    pub fn check(&self, options: &FirehoseOptions) -> Result<(), &'static str> {
        if self.is_full && self.progress.elapsed() >= options.write_timeout {
            options.metrics.count_cut(Cut::Reading);
            return Err("does not read");
        }
        if self.received.max(self.fed).elapsed() >= options.idle_timeout {
            options.metrics.count_cut(Cut::Silence);
            return Err("does not answer");
        }
        Ok(())
    }
}
