//! What the tasks of all hosts share: settings of connections, the log lines about hosts, and the renumbering of a host.

use std::time::Duration;

use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;

use super::backoff::Backoff;
use super::end::End;
use super::host_log::HostLog;
use super::metrics::Metrics;
use crate::dial::Guard;
use crate::hosts::{HostHandle, Hosts};
use crate::store::Store;

/// The wait before a database that failed is written to again.
const DATABASE_PAUSE: Duration = Duration::from_millis(500);

/// Times of a connection.
#[derive(Clone, Copy, Debug)]
pub(super) struct Times {
    /// Longest time for TCP, TLS and the WebSocket handshake together.
    pub(super) handshake: Duration,
    /// Time between two pings of ours.
    pub(super) ping: Duration,
    /// Longest silence, pongs included, before the connection counts as dead.
    pub(super) idle: Duration,
    /// Longest time from a message's first byte to its last.
    pub(super) message: Duration,
}

/// What the tasks of all hosts share.
pub(super) struct Shared {
    pub(super) guard: Guard,
    pub(super) hosts: Hosts,
    pub(super) store: Store,
    pub(super) backoff: Backoff,
    pub(super) times: Times,
    /// How long a host that is a relay is not dialled.
    pub(super) refused_pause: Duration,
    pub(super) log: HostLog,
    pub(super) metrics: Metrics,
    /// Bounds concurrent handshakes, so that a start with thousands of hosts is no burst.
    pub(super) handshakes: Semaphore,
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
            let log_seq = log_seq.max(self.hosts.checkpoint_head() + 1);
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
