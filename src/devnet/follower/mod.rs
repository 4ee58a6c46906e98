//! A consumer that rebuilds the accounts from the firehose: which are active, and every record of each, to be compared with
//! the PDSes' own. Checks proofs. Does not check signatures, which `atproto-relay firehose --verify` does.

mod account;
mod subscription;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;

use serde::Serialize;

pub use self::account::{AccountSnapshot, differences};
pub use self::subscription::{Follower, FollowerOptions};
use crate::atproto::frame::{self, Account, Action, Commit, Message, Sync};
use crate::atproto::tid::Tid;
use crate::verify::rules::{self, Strictness};

/// Most notes in a report.
const MAX_NOTES: usize = 20;

/// The accounts as one consumer rebuilt them.
#[derive(Debug, Default)]
pub struct Snapshot {
    accounts: BTreeMap<String, AccountSnapshot>,
    report: Report,
}

/// The connections and events of a consumer.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Report {
    /// Connections that were made.
    pub connections: u64,
    /// Whether it is connected.
    pub connected: bool,
    /// Events received.
    pub events: u64,
    /// The first and the last sequence number.
    pub first_seq: i64,
    pub last_seq: i64,
    /// Missing sequence numbers, and repeated ones.
    pub gaps: u64,
    pub doubles: u64,
    /// Events that no relay may let through: proofs that do not hold, revs that go back.
    pub bad: u64,
    /// Messages that are not events (`#info`, errors).
    pub infos: u64,
    /// Longest time without an event, in milliseconds.
    pub longest_pause_millis: u64,
    /// Descriptions of what was wrong.
    pub notes: Vec<String>,
}

impl Snapshot {
    /// The report so far.
    pub fn report(&self) -> &Report {
        &self.report
    }

    /// The accounts as the firehose left them, in the order of their DIDs.
    pub fn accounts(&self) -> Vec<AccountSnapshot> {
        self.accounts.values().cloned().collect()
    }

    /// Takes one message of the firehose. After a reconnect with the last number as cursor, the first
    /// event may be the last one once more: `resumed`.
    pub fn take(&mut self, bytes: &[u8], resumed: bool) {
        let message = match frame::decode(bytes) {
            Ok(frame) => frame.message,
            Err(error) => return self.bad(format!("not a frame: {error}")),
        };
        let seq = match &message {
            Message::Commit(commit) => commit.seq,
            Message::Sync(sync) => sync.seq,
            Message::Identity(identity) => identity.seq,
            Message::Account(account) => account.seq,
            Message::Info(_) | Message::Error(_) | Message::Unknown => {
                self.report.infos += 1;
                return;
            }
        };
        if resumed && seq == self.report.last_seq {
            return;
        }
        self.count(seq);
        match message {
            Message::Commit(commit) => self.commit(&commit),
            Message::Sync(sync) => self.sync(&sync),
            Message::Account(account) => self.account(&account),
            _ => {}
        }
    }

    fn count(&mut self, seq: i64) {
        let report = &mut self.report;
        let last = report.last_seq;
        if report.events == 0 {
            report.first_seq = seq;
        } else if seq <= last {
            report.doubles += 1;
            self.note(format!("seq {seq} after {last}"));
        } else if seq > last + 1 {
            report.gaps += 1;
            self.note(format!("seq {seq} after {last}"));
        }
        self.report.events += 1;
        self.report.last_seq = seq;
    }

    fn commit(&mut self, commit: &Commit<'_>) {
        let Ok(rev) = Tid::parse(commit.rev) else {
            return self.bad(format!("seq {}: rev {:?}", commit.seq, commit.rev));
        };
        let facts = match rules::commit(commit, rev, Strictness::Strict) {
            Ok(facts) => facts,
            Err(rule) => return self.bad(format!("seq {}: {}", commit.seq, rule.name())),
        };
        if !self.advances(commit.repo, commit.rev, commit.seq) {
            return;
        }
        let account = self.entry(commit.repo);
        account.rev = commit.rev.to_owned();
        account.data = facts.data.to_string();
        for op in &commit.ops {
            match (op.action, op.cid) {
                (Action::Create | Action::Update, Some(cid)) => {
                    account.records.insert(op.path.to_owned(), cid.to_string());
                }
                _ => {
                    account.records.remove(op.path);
                }
            }
        }
    }

    /// A new state without the operations that led to it. Where the tree is another one, the records are unknown from here
    /// on, and the comparison shows that.
    fn sync(&mut self, sync: &Sync<'_>) {
        let facts = Tid::parse(sync.rev)
            .ok()
            .and_then(|rev| rules::sync(sync, rev).ok());
        let Some(facts) = facts else {
            return self.bad(format!("seq {}: a #sync that does not hold", sync.seq));
        };
        let data = facts.data.to_string();
        let account = self.entry(sync.did);
        if account.data != data {
            account.records.clear();
        }
        account.rev = sync.rev.to_owned();
        account.data = data;
    }

    fn account(&mut self, event: &Account<'_>) {
        self.entry(event.did).active = event.active;
        if event.status == Some("deleted") {
            self.accounts.remove(event.did);
        }
    }

    fn advances(&mut self, did: &str, rev: &str, seq: i64) -> bool {
        let last = self.accounts.get(did).map_or("", |account| &account.rev);
        let advances = rev > last;
        if !advances {
            let words = format!("seq {seq}: rev {rev} of {did} after {last}");
            self.bad(words);
        }
        advances
    }

    /// An account without an event is active.
    fn entry(&mut self, did: &str) -> &mut AccountSnapshot {
        self.accounts
            .entry(did.to_owned())
            .or_insert_with(|| AccountSnapshot::new(did))
    }

    fn bad(&mut self, words: String) {
        self.report.bad += 1;
        self.note(words);
    }

    fn note(&mut self, words: String) {
        if self.report.notes.len() < MAX_NOTES {
            self.report.notes.push(words);
        }
    }
}
