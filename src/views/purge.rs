//! The end of an account: which events bring it, and what goes with it. Pure.

use super::follower::Event;
use crate::atproto::did::Did;
use crate::atproto::frame::Message;
use crate::eventlog::{Entry, Origin};
use crate::store::{LocalStatus, UpstreamStatus};

/// All events of an account up to and including one: those before its deletion or its takedown.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Purge {
    /// The account.
    pub did: Did,
    /// Its last event that goes.
    pub up_to: u64,
}

impl Purge {
    /// What an event ends: its host has deleted the account, or this relay has taken it down.
    pub fn of(event: &Event<'_>) -> Option<Purge> {
        let Some(Message::Account(account)) = &event.message else {
            return None;
        };
        let upstream = UpstreamStatus::from_event(account.active, account.status);
        let deleted = event.entry.origin.host().is_some() && upstream == UpstreamStatus::Deleted;
        let ends = deleted || announced(&event.entry) == Some(LocalStatus::TakenDown);
        let did = Did::normalized(account.did).ok()?;
        ends.then(|| Purge {
            did,
            up_to: event.entry.seq.saturating_sub(1),
        })
    }
}

/// The local status that an event of this relay's own announces.
pub(super) fn announced(entry: &Entry) -> Option<LocalStatus> {
    match entry.origin {
        Origin::Relay { code } => LocalStatus::from_code(code),
        Origin::Host { .. } | Origin::Unknown => None,
    }
}
