//! The ledger of events sent to the relay and the verdict each must get. Entries are made before the event is sent. Several
//! checkers can read the same ledger.

use std::collections::HashMap;
use std::sync::{Arc, RwLock};

use super::{Fingerprint, NotAnEvent, did_of};
use crate::atproto::frame::Kind;

/// The rule of an entry that is just being made.
const UNDECIDED: &str = "";

/// What must become of an event.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It comes out exactly once.
    Forward,
    /// It never comes out; the rule that refuses it.
    Refuse(&'static str),
    /// It belongs to a group of accounts of which only so many come out.
    Quota(GroupId),
}

/// An entry of the book.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct EventId(pub(super) u32);

/// A group of accounts that share a quota.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GroupId(u32);

/// Where an event was sent, for the report.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Origin {
    /// The sender's number of the host.
    pub host: u32,
    /// Its sequence number there.
    pub seq: i64,
}

/// One event of the book.
#[derive(Clone, Debug)]
pub(super) struct Expected {
    pub did: Arc<str>,
    pub account: u32,
    /// Place among the account's events that must come out.
    pub ordinal: u32,
    pub kind: Kind,
    pub origin: Origin,
    pub verdict: Verdict,
    pub tag: Option<usize>,
}

#[derive(Debug, Default)]
struct Book {
    events: Vec<Expected>,
    by_fingerprint: HashMap<Fingerprint, u32>,
    accounts: HashMap<Arc<str>, (u32, u32)>,
    quotas: Vec<usize>,
    /// Events that must come out, in all and by host.
    forward: usize,
    forward_by_host: HashMap<u32, usize>,
    refusals: HashMap<&'static str, usize>,
}

/// The book.
#[derive(Debug, Default)]
pub struct Ledger(RwLock<Book>);

impl Ledger {
    /// An empty book.
    pub fn new() -> Arc<Ledger> {
        Arc::new(Ledger::default())
    }

    /// A group of accounts of which at most `accounts`, and in the end exactly so many, come out.
    pub fn group(&self, accounts: usize) -> GroupId {
        let mut book = self.write();
        book.quotas.push(accounts);
        GroupId(u32::try_from(book.quotas.len() - 1).unwrap_or(u32::MAX))
    }

    /// Enters an event that will be sent. The same bytes may be entered again: a copy that must be
    /// refused does not change what must become of the original, in whichever order they come.
    /// Events of one account that must come out are entered in the order they are sent.
    pub fn enter(
        &self,
        frame: &[u8],
        origin: Origin,
        verdict: Verdict,
        tag: Option<usize>,
    ) -> Result<EventId, NotAnEvent> {
        let (fingerprint, peek) = Fingerprint::of(frame)?;
        let did = did_of(frame, &peek);
        let mut guard = self.write();
        let book = &mut *guard;
        if let Verdict::Refuse(rule) = verdict {
            *book.refusals.entry(rule).or_default() += 1;
        }
        let new = u32::try_from(book.events.len()).unwrap_or(u32::MAX);
        let id = *book.by_fingerprint.entry(fingerprint).or_insert(new);
        if id == new {
            let (account, did) = book.account(did);
            let verdict = Verdict::Refuse(UNDECIDED);
            book.events.push(Expected {
                did,
                account,
                ordinal: 0,
                kind: peek.kind,
                origin,
                verdict,
                tag: None,
            });
        }
        book.set(id, verdict, origin, tag);
        Ok(EventId(id))
    }

    /// How many events must come out.
    pub fn forward(&self) -> usize {
        self.read().forward
    }

    /// How many events of a host must come out.
    pub fn forward_of(&self, host: u32) -> usize {
        self.read().forward_by_host.get(&host).copied().unwrap_or(0)
    }

    /// How many events were sent for each rule that must refuse them. A host that sends again after
    /// a reconnect makes the relay count more.
    pub fn refusals(&self) -> Vec<(&'static str, usize)> {
        let mut all: Vec<_> = self
            .read()
            .refusals
            .iter()
            .map(|(rule, count)| (*rule, *count))
            .collect();
        all.sort_unstable();
        all
    }

    pub(super) fn find(&self, fingerprint: Fingerprint) -> Option<(u32, Expected)> {
        let book = self.read();
        let id = *book.by_fingerprint.get(&fingerprint)?;
        Some((id, book.events[id as usize].clone()))
    }

    pub(super) fn quota(&self, group: GroupId) -> usize {
        self.read()
            .quotas
            .get(group.0 as usize)
            .copied()
            .unwrap_or(0)
    }

    pub(super) fn quotas(&self) -> Vec<(u32, usize)> {
        self.read()
            .quotas
            .iter()
            .enumerate()
            .map(|(group, quota)| (group as u32, *quota))
            .collect()
    }

    /// Calls `each` with every entry that must come out.
    pub(super) fn each_forward(&self, mut each: impl FnMut(u32, &Expected)) {
        for (id, event) in self
            .read()
            .events
            .iter()
            .enumerate()
            .filter(|(_, event)| event.verdict == Verdict::Forward)
        {
            each(id as u32, event);
        }
    }

    fn read(&self) -> std::sync::RwLockReadGuard<'_, Book> {
        self.0.read().expect("no holder of this lock panics")
    }

    fn write(&self) -> std::sync::RwLockWriteGuard<'_, Book> {
        self.0.write().expect("no holder of this lock panics")
    }
}

impl GroupId {
    pub(super) fn number(self) -> u32 {
        self.0
    }
}

impl Book {
    fn account(&mut self, did: &str) -> (u32, Arc<str>) {
        if let Some((did, (account, _))) = self.accounts.get_key_value(did) {
            return (*account, did.clone());
        }
        let account = u32::try_from(self.accounts.len()).unwrap_or(u32::MAX);
        let did: Arc<str> = did.into();
        self.accounts.insert(did.clone(), (account, 0));
        (account, did)
    }

    /// A refused event may turn out to be a copy of one that must come out, never the reverse.
    fn set(&mut self, id: u32, verdict: Verdict, origin: Origin, tag: Option<usize>) {
        let event = &mut self.events[id as usize];
        match (event.verdict, verdict) {
            (Verdict::Refuse(_), Verdict::Forward | Verdict::Quota(_)) => {}
            (Verdict::Refuse(UNDECIDED), Verdict::Refuse(_)) => {}
            _ => return,
        }
        (event.verdict, event.origin, event.tag) = (verdict, origin, tag);
        if verdict == Verdict::Forward {
            self.forward += 1;
            *self.forward_by_host.entry(origin.host).or_default() += 1;
        }
        if matches!(verdict, Verdict::Forward | Verdict::Quota(_))
            && let Some((_, next)) = self.accounts.get_mut(&event.did)
        {
            *next += 1;
            event.ordinal = *next;
        }
    }
}
