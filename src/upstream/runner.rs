//! The life of one host: connect, take events, wait, connect again, for as long as it is known. Decides from where to
//! resume and when a stream cannot be resumed; what goes over a connection is not its concern.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;

use super::Sink;
use super::backoff::Backoff;
use super::connection::{Connection, End, Times, rule};
use super::handle::{HostHandle, HostState};
use super::news::{Contact, Lines};
use crate::dial::Guard;
use crate::store::{HostStatus, Store};
use crate::telemetry::metrics;

/// A connection that lasted this long was a good one, even if nothing happened on it.
const STABLE_AFTER: Duration = Duration::from_secs(60);

/// Attempts that end at the same unreadable frame before the stream is taken up live: what lies between is lost, is
/// recorded as a gap, and is less than everything the host will ever send.
const MAX_STUCK: u32 = 5;

/// The wait before a database that failed is written to again.
const DATABASE_PAUSE: Duration = Duration::from_millis(500);

/// What all runners share.
pub(super) struct Shared {
    pub(super) guard: Guard,
    pub(super) store: Store,
    pub(super) backoff: Backoff,
    pub(super) times: Times,
    /// How long a host that is a relay is left alone.
    pub(super) refused_pause: Duration,
    pub(super) lines: Lines,
    /// Bounds the handshakes under way, so that a start with thousands of hosts is no burst.
    pub(super) handshakes: Semaphore,
    /// The highest head of the log that a checkpoint was made with.
    pub(super) log_head: AtomicU64,
}

impl Shared {
    /// A host numbers its events anew, from the one after `cursor` on. Its old events are settled and its new cursor is
    /// in the database when this returns, so that after a crash its numbers are taken for what they are.
    pub(super) async fn renumber(
        &self,
        host: &HostHandle,
        cursor: i64,
        cancel: &CancellationToken,
    ) -> Result<(), End> {
        let renumbered = async {
            host.progress().drained().await;
            // Behind every position that the database may have from before.
            let log_seq = host.progress().restart(cursor);
            let log_seq = log_seq.max(self.log_head.load(Ordering::Acquire) + 1);
            while let Err(error) = self.store.renumber_host(host.id(), cursor, log_seq).await {
                self.store.complain(
                    "a host that numbers its events anew waits until that is written",
                    &error,
                );
                tokio::time::sleep(DATABASE_PAUSE).await;
            }
        };
        cancel
            .run_until_cancelled(renumbered)
            .await
            .ok_or(End::Cancelled)
    }
}

/// The task of one host.
pub(super) struct Runner<S> {
    host: Arc<HostHandle>,
    sink: Arc<S>,
    shared: Arc<Shared>,
    cancel: CancellationToken,
    /// Where the next connection resumes; `None` starts live.
    cursor: Option<i64>,
    failures: u32,
    stuck: u32,
}

impl<S: Sink> Runner<S> {
    pub(super) fn new(
        host: Arc<HostHandle>,
        sink: Arc<S>,
        shared: Arc<Shared>,
        cancel: CancellationToken,
    ) -> Self {
        let cursor = host.last_seq();
        Self {
            host,
            sink,
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
            sink: &*self.sink,
            guard: self.shared.guard,
            shared: &self.shared,
            times: self.shared.times,
            cancel: &self.cancel,
            resumed: self.cursor,
            last: None,
            taken: 0,
            old_in_a_row: 0,
            connected: false,
            outdated: false,
        };
        let started = Instant::now();
        let end = connection.run(&self.shared.handshakes).await;
        let (last, taken) = (connection.last, connection.taken);
        match &end {
            End::Cancelled => {}
            End::IsRelay(_) => self.host.note(Contact::Refused, &end),
            _ if connection.connected => self.host.note(Contact::Lost, &end),
            _ => self.host.note(Contact::Unreached, &end),
        }
        self.cursor = last.or(self.cursor);
        (end, started.elapsed(), taken)
    }

    fn count(&mut self, end: &End, lasted: Duration, taken: u64) {
        if taken > 0 || (lasted >= STABLE_AFTER && !matches!(end, End::FutureCursor(_))) {
            self.failures = 0;
        }
        self.failures = self.failures.saturating_add(1);
        metrics().upstream_disconnects.inc();
        match end {
            End::TooLarge => self.host.count_drop(rule::FRAME_TOO_LARGE, "", None, end),
            End::Malformed(_) => self.host.count_drop(rule::FRAME, "", None, end),
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
        if self.shared.lines.may_warn() {
            tracing::warn!(host = self.host.name(), cursor = self.cursor, reason = %end, "host is taken up live: its cursor is of no use");
        }
        metrics().upstream_gaps.inc();
        self.host.add_gap();
        self.cursor = None;
        self.stuck = 0;
        if refused {
            metrics().upstream_future_cursors.inc();
            self.host.set_status(HostStatus::Idle);
            // After a crash before its first event it is resumed from its beginning: live would be a second gap.
            self.shared.renumber(&self.host, 0, &self.cancel).await?;
        }
        Ok(())
    }

    /// Says how the host stands until the next attempt.
    fn rest(&self, end: &End) {
        if !self.shared.backoff.is_offline(self.failures) {
            return self.host.set_state(HostState::Waiting);
        }
        if self.host.status() != HostStatus::Offline {
            self.host.note(Contact::Offline, end);
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
            () = self.host.wake.notified() => true,
            () = tokio::time::sleep(wait) => true,
        }
    }

    /// A relay is left alone for a day: a proxy may have named it wrongly, so it is looked at again.
    fn refuse(&mut self) {
        metrics().upstream_relays_refused.inc();
        self.host.set_status(HostStatus::Offline);
        self.host.set_state(HostState::Refused);
    }
}
