//! The life of one host: connect, take events, wait, connect again, for as long as it is known. Decides from where to
//! resume and when a stream cannot be resumed; what goes over a connection is not its concern.

use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio_util::sync::CancellationToken;

use super::connection::Connection;
use super::end::End;
use super::shared::Shared;
use crate::hosts::{Contact, HostHandle, HostState, Rule};
use crate::store::HostStatus;
use crate::verify::Pipeline;

/// A connection that lasted this long was a good one, even if nothing happened on it.
const STABLE_AFTER: Duration = Duration::from_secs(60);

/// Attempts that end at the same unreadable frame before the stream is taken up live: what lies between is lost, is
/// recorded as a gap, and is less than everything the host will ever send.
const MAX_STUCK: u32 = 5;

/// The task of one host.
pub(super) struct Runner {
    host: Arc<HostHandle>,
    pipeline: Pipeline,
    shared: Arc<Shared>,
    cancel: CancellationToken,
    /// Where the next connection resumes; `None` starts live.
    cursor: Option<i64>,
    failures: u32,
    stuck: u32,
}

impl Runner {
    pub(super) fn new(
        host: Arc<HostHandle>,
        pipeline: Pipeline,
        shared: Arc<Shared>,
        cancel: CancellationToken,
    ) -> Self {
        let cursor = host.last_seq();
        Self {
            host,
            pipeline,
            shared,
            cancel,
            cursor,
            failures: 0,
            stuck: 0,
        }
    }

    /// Runs until cancelled.
    pub(super) async fn run(mut self) {
        loop {
            let (end, lasted, taken) = self.connection().await;
            match &end {
                End::Cancelled => break self.host.set_state(HostState::Stopped),
                End::IsRelay(_) => self.refuse(),
                _ => {
                    self.count(&end, lasted, taken);
                    if self.resume_after(&end, taken).await.is_err() {
                        break self.host.set_state(HostState::Stopped);
                    }
                    self.rest(&end);
                }
            }
            if !self.wait().await {
                break self.host.set_state(HostState::Stopped);
            }
        }
    }

    async fn connection(&mut self) -> (End, Duration, u64) {
        self.host.set_state(HostState::Connecting);
        let mut connection = Connection {
            host: &self.host,
            pipeline: &self.pipeline,
            shared: &self.shared,
            cancel: &self.cancel,
            resumed: self.cursor,
            last: None,
            taken: 0,
            old_in_a_row: 0,
            connected: false,
            outdated: false,
        };
        let started = Instant::now();
        let end = connection.run().await;
        let (last, taken) = (connection.last, connection.taken);
        match &end {
            End::Cancelled => {}
            End::IsRelay(_) => self.host.record_contact(Contact::Refused, &end),
            _ if connection.connected => self.host.record_contact(Contact::Lost, &end),
            _ => self.host.record_contact(Contact::Unreached, &end),
        }
        self.cursor = last.or(self.cursor);
        (end, started.elapsed(), taken)
    }

    fn count(&mut self, end: &End, lasted: Duration, taken: u64) {
        if taken > 0 || (lasted >= STABLE_AFTER && !matches!(end, End::FutureCursor(_))) {
            self.failures = 0;
        }
        self.failures = self.failures.saturating_add(1);
        self.shared.metrics.disconnects.inc();
        match end {
            End::TooLarge => self.host.count_drop(Rule::FrameTooLarge, "", None, end),
            End::Malformed(_) => self.host.count_drop(Rule::Frame, "", None, end),
            _ => {}
        }
        let (host, failures) = (self.host.name(), self.failures);
        tracing::debug!(host, failures, cursor = self.cursor, reason = %end, "connection ended");
    }

    /// Goes live where the stream cannot be resumed, and records the gap.
    async fn resume_after(&mut self, end: &End, taken: u64) -> Result<(), End> {
        let unreadable = matches!(end, End::TooLarge | End::Malformed(_));
        self.stuck = match (unreadable, taken) {
            (true, 0) => self.stuck + 1,
            (true, _) => 1,
            (false, 0) => self.stuck,
            (false, _) => 0,
        };
        let refused = matches!(end, End::FutureCursor(_));
        if self.cursor.is_none() || !(refused || self.stuck >= MAX_STUCK) {
            if refused {
                self.host.set_status(HostStatus::Idle);
            }
            return Ok(());
        }
        if self.shared.log.may_warn() {
            tracing::warn!(host = self.host.name(), cursor = self.cursor, reason = %end, "host is taken up live: its cursor is of no use");
        }
        self.shared.metrics.gaps.inc();
        self.host.add_gap();
        self.cursor = None;
        self.stuck = 0;
        if refused {
            self.shared.metrics.future_cursors.inc();
            self.host.set_status(HostStatus::Idle);
            // After a crash before its first event it is resumed from its beginning: live would be a second gap.
            self.shared.renumber(&self.host, 0, &self.cancel).await?;
        }
        Ok(())
    }

    /// Sets the host's state until the next attempt.
    fn rest(&self, end: &End) {
        if !self.shared.backoff.is_offline(self.failures) {
            return self.host.set_state(HostState::Waiting);
        }
        if self.host.status() != HostStatus::Offline {
            self.host.record_contact(Contact::Offline, end);
            self.host.set_status(HostStatus::Offline);
        }
        self.host.set_state(HostState::Offline);
    }

    /// Waits for the next attempt; `false` if there is to be none.
    async fn wait(&mut self) -> bool {
        let wait = match self.host.state() {
            HostState::Refused => self.shared.refused_pause,
            _ => self.shared.backoff.wait(self.failures, fastrand::f64()),
        };
        tokio::select! {
            () = self.cancel.cancelled() => false,
            () = self.host.woken() => true,
            () = tokio::time::sleep(wait) => true,
        }
    }

    /// A host that is a relay is not dialled for a day: a proxy may have named it wrongly, so it is tried again.
    fn refuse(&mut self) {
        self.shared.metrics.relays_refused.inc();
        self.host.set_status(HostStatus::Offline);
        self.host.set_state(HostState::Refused);
    }
}
