//! The first view of the log: hosts and accounts in SQL. At work [`LiveAccounts`] feeds it; after a crash or a loss the
//! log's tail is applied once more, from the view's position on, which changes nothing where it was applied before.
//!
//! Of a database that is lost or old, hosts, cursors and accounts come back as far as the log reaches; an operator's
//! limits and bans of hosts do not.

mod change;
mod hosts;
mod live;

use std::collections::HashMap;
use std::io;

use tracing::{info, warn};

use super::{Event, FellOut, FollowError, Purge, View, catch_up};
use crate::eventlog::{EventLog, LogError, ReadError, Slot};
use crate::hosts::RecoveredHost;
use crate::hosts::roster::{Name, Roster};
use crate::store::{ACCOUNTS_VIEW, AccountUpdate, Batch, HostId, NewHost, Store, StoreError};
use crate::telemetry::metrics;

use change::{change, own_change};
use hosts::LoggedHosts;
pub use live::LiveAccounts;

/// Redactions that are noted with one write of the log's journal.
const REDACTIONS: usize = 1_000;
/// Progress is reported after so many events.
const REPORT_EVENTS: u64 = 250_000;

/// Why a replay failed.
#[derive(Debug, thiserror::Error)]
pub enum ReplayError {
    /// The database.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The log.
    #[error("the event log cannot be read: {0}")]
    Log(#[from] ReadError),
    /// The log's folder.
    #[error(transparent)]
    Folder(#[from] LogError),
    /// The roster.
    #[error("the list of hosts in {folder} cannot be used: {source}")]
    Roster { folder: String, source: io::Error },
}

/// The view while it is brought up to the head of the log.
struct Replay<'a> {
    log: &'a EventLog,
    store: &'a Store,
    hosts: LoggedHosts,
    /// The position in the database. It stays: cursors of hosts belong to it, and move only when the relay is at work.
    position: u64,
    changes: Vec<AccountUpdate>,
    purges: Vec<Purge>,
    events: u64,
}

/// Brings hosts and accounts up to the head of the log. Returns, for every host, its cursor and the events above it that
/// are durable. `row` is what a host of that name is added as.
///
/// # Errors
/// See [`ReplayError`].
pub async fn replay(
    log: &EventLog,
    store: &Store,
    roster: &mut Roster,
    slot: &Slot,
    row: impl Fn(&Name) -> NewHost,
) -> Result<HashMap<HostId, RecoveredHost>, ReplayError> {
    let position = store.replay_from().await?;
    slot.confirm(position);
    let mut replay = Replay {
        hosts: LoggedHosts::begin(log, store, roster, position, row).await?,
        log,
        store,
        position,
        changes: Vec::new(),
        purges: Vec::new(),
        events: 0,
    };
    let caught_up = catch_up(&mut replay, log, position, slot).await;
    caught_up.map_err(|error| match error {
        FollowError::Log(error) => ReplayError::Log(error),
        FollowError::View(error) => error,
    })?;
    replay.redact()?;
    if replay.events > 0 {
        info!(
            from = position,
            events = replay.events,
            "applied the tail of the event log to the database"
        );
    }
    Ok(replay.hosts.end(store).await?)
}

impl View for Replay<'_> {
    type Error = ReplayError;

    const NAME: &'static str = ACCOUNTS_VIEW;

    async fn apply(&mut self, events: &[Event<'_>]) -> Result<(), ReplayError> {
        for event in events {
            metrics().recovery_steps.inc();
            let host = self.hosts.note(event);
            self.changes.extend(change(event, host));
            let of_redacted = self.hosts.of_redacted(&event.entry);
            self.changes.extend(own_change(event, of_redacted));
            self.events += 1;
            if self.events.is_multiple_of(REPORT_EVENTS) {
                info!(
                    seq = event.entry.seq,
                    head = self.log.head(),
                    "applying the event log to the database"
                );
            }
        }
        Ok(())
    }

    /// The account's row stays: consumers ask for its status. Its events go out of the log, in case the crash came before
    /// that was noted.
    async fn purge(&mut self, purge: Purge) -> Result<(), ReplayError> {
        self.purges.push(purge);
        if self.purges.len() >= REDACTIONS {
            self.redact()?;
        }
        Ok(())
    }

    async fn commit(&mut self, _next: u64) -> Result<u64, ReplayError> {
        let batch = Batch {
            accounts: std::mem::take(&mut self.changes),
            ..Batch::default()
        };
        self.store.apply(&batch).await?;
        Ok(self.position)
    }

    async fn fell_out(&mut self, gap: FellOut) -> Result<(), ReplayError> {
        let FellOut { from, oldest } = gap;
        warn!(
            from,
            oldest,
            "the log no longer holds events that the database has not seen: accounts may be behind until their next event"
        );
        Ok(())
    }
}

impl Replay<'_> {
    fn redact(&mut self) -> Result<(), LogError> {
        let purges = self.purges.drain(..);
        self.log
            .redact_again(purges.map(|purge| (purge.did, purge.up_to)))
    }
}
