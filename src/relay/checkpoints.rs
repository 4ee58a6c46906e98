//! Checkpoints: the hosts' cursors and the position of the accounts view go to the database's writer, so that recovery
//! finds every host where it is.

use std::time::Duration;

use tokio::time::interval;
use tracing::warn;

use super::durable::Position;
use super::lifecycle::{Lifecycle, Phase};
use crate::eventlog::Slot;
use crate::hosts::Hosts;
use crate::hosts::roster::Roster;
use crate::views::accounts::LiveAccounts;

/// How often cursors and the replay position are handed to the database's writer.
const INTERVAL: Duration = Duration::from_millis(250);

/// The replay position and the head that a checkpoint was written with.
pub(super) type Written = (u64, u64);

/// What checkpoints are taken from.
#[derive(Clone)]
pub(super) struct Checkpoints {
    pub hosts: Hosts,
    pub accounts: LiveAccounts,
    pub position: Position,
}

impl Checkpoints {
    /// Writes checkpoints as often as they change, records new hosts in the roster, and confirms to the log's retention
    /// what the database has. Runs until the relay closes.
    pub async fn run(self, slot: Slot, mut roster: Roster, lifecycle: Lifecycle) {
        let closing = lifecycle.until(Phase::Closing);
        let mut ticks = interval(INTERVAL);
        let mut last = None;
        while closing.run_until_cancelled(ticks.tick()).await.is_some() {
            // What cannot be recorded now is recorded the next time.
            if let Err(failure) = roster.record_new(&self.hosts) {
                warn!(%failure, "new hosts cannot be noted beside the event log yet");
            }
            slot.confirm(self.accounts.position());
            last = self.write(last).await;
            if last.is_none() && !lifecycle.has_entered(Phase::Closing) {
                let reason = "the database's writer ended; restart the relay";
                return lifecycle.fail(reason.to_owned());
            }
        }
    }

    /// Writes one checkpoint: every event it covers was handed to the writer before. Returns `None` where the writer has
    /// ended; writes nothing where positions are still the `last` ones and no cursor moved.
    pub async fn write(&self, last: Option<Written>) -> Option<Written> {
        let head = self.position.get();
        let checkpoint = self.hosts.take_checkpoint(head);
        let now = (checkpoint.replay_from, head);
        if checkpoint.cursors.is_empty() && last == Some(now) {
            return last;
        }
        let committed = self.accounts.commit(checkpoint, head).await;
        committed.ok().map(|()| now)
    }
}
