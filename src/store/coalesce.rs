//! Changes gathered until they are written: one update per account and one cursor per host, whatever
//! came in. Pure; keeps the order in which accounts were first named.

use super::rows::{AccountUpdate, Batch, HostId};
use crate::atproto::did::Did;
use std::collections::HashMap;

/// Gathered changes.
#[derive(Debug, Default)]
pub(super) struct Coalesced {
    accounts: Vec<AccountUpdate>,
    /// How many changes each update is made of.
    changes: Vec<u32>,
    index: HashMap<Did, usize>,
    cursors: HashMap<HostId, i64>,
    replay_from: Option<u64>,
    head: Option<u64>,
}

impl Coalesced {
    /// Adds a later batch.
    pub(super) fn add(&mut self, batch: Batch) {
        for update in batch.accounts {
            match self.index.get(&update.did) {
                Some(&at) => {
                    self.accounts[at].merge(update);
                    self.changes[at] += 1;
                }
                None => {
                    self.index.insert(update.did.clone(), self.accounts.len());
                    self.accounts.push(update);
                    self.changes.push(1);
                }
            }
        }
        self.cursors.extend(batch.cursors);
        self.replay_from = batch.replay_from.or(self.replay_from);
        self.head = batch.head.max(self.head);
    }

    /// Whether a change of this account waits here.
    pub(super) fn has(&self, did: &Did) -> bool {
        self.index.contains_key(did)
    }

    /// Rows a write would touch.
    pub(super) fn rows(&self) -> usize {
        self.accounts.len() + self.cursors.len()
    }

    pub(super) fn is_empty(&self) -> bool {
        self.rows() == 0 && self.replay_from.is_none() && self.head.is_none()
    }

    /// How many changes of each account there are.
    pub(super) fn changes(&self) -> impl Iterator<Item = (Did, u32)> {
        let dids = self.accounts.iter().map(|update| update.did.clone());
        dids.zip(self.changes.iter().copied())
    }

    /// Takes everything out, as one batch.
    pub(super) fn take(&mut self) -> Batch {
        self.index.clear();
        self.changes.clear();
        Batch {
            accounts: std::mem::take(&mut self.accounts),
            cursors: self.cursors.drain().collect(),
            replay_from: self.replay_from.take(),
            head: self.head.take(),
        }
    }
}
