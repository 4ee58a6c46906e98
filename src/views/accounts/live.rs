//! The accounts view at work: what the shards made of an event changes the accounts without the event being read from the
//! log again. A replay makes the same changes from the events themselves.

use super::change::at;
use crate::hosts::Checkpoint;
use crate::store::{AccountUpdate, Batch, StoreError, Writer};

/// The feed of the view. Clones share it.
#[derive(Clone)]
pub struct LiveAccounts {
    writer: Writer,
}

impl LiveAccounts {
    /// A feed whose changes go to the database's writer.
    pub fn new(writer: Writer) -> Self {
        Self { writer }
    }

    /// Lets readers see changes of events that are in the log and that consumers are about to see.
    pub fn announce<'a>(&self, updates: impl IntoIterator<Item = &'a AccountUpdate>) {
        self.writer.announce(updates);
    }

    /// Applies changes of durable events, in the order of the log. They were announced before. For threads outside the
    /// runtime; waits while the database is behind.
    ///
    /// # Errors
    /// [`StoreError::WriterStopped`] after a shutdown: a replay makes the changes.
    pub fn apply(
        &self,
        changes: impl IntoIterator<Item = (u64, AccountUpdate)>,
    ) -> Result<(), StoreError> {
        let changes = changes.into_iter();
        self.writer.send_blocking(Batch {
            accounts: changes.map(|(seq, update)| at(seq, update)).collect(),
            ..Batch::default()
        })
    }

    /// Stores the hosts' cursors and the view's position, in one transaction with or behind everything applied before.
    /// Events up to `head` were applied.
    ///
    /// # Errors
    /// [`StoreError::WriterStopped`] after a shutdown.
    pub async fn commit(&self, checkpoint: Checkpoint, head: u64) -> Result<(), StoreError> {
        let Checkpoint {
            cursors,
            replay_from,
        } = checkpoint;
        debug_assert!(
            replay_from <= head + 1,
            "what was not applied stays to be read"
        );
        let batch = Batch {
            accounts: Vec::new(),
            cursors,
            replay_from: Some(replay_from),
            head: Some(head),
        };
        self.writer.send(batch).await
    }

    /// The position that the database has; 0 before the first commit.
    pub fn position(&self) -> u64 {
        *self.writer.applied().borrow()
    }
}
