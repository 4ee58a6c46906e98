//! The change of an account's state that an event of the log makes. Pure.
//!
//! Every event of the log was verified before it went there: it came from the account's PDS, and a commit or `#sync`
//! passes only while the PDS has the account active.

use crate::atproto::car::Car;
use crate::atproto::commit::SignedCommit;
use crate::atproto::did::Did;
use crate::atproto::frame::Message;
use crate::atproto::tid::Tid;
use crate::eventlog::Entry;
use crate::store::{AccountUpdate, Heard, HostId, RepoState, UpstreamStatus};
use crate::views::Event;
use crate::views::purge::announced;

/// The change of the account's state that an event makes. With a `host`, the account is created where it is unknown.
pub(super) fn change(event: &Event<'_>, host: Option<HostId>) -> Option<AccountUpdate> {
    let (did, repo, upstream) = match event.message.as_ref()? {
        Message::Commit(commit) => (
            commit.repo,
            Some(repo_state(commit.blocks)?),
            UpstreamStatus::Active,
        ),
        Message::Sync(sync) => (
            sync.did,
            Some(repo_state(sync.blocks)?),
            UpstreamStatus::Active,
        ),
        // A status of the relay's own is not its PDS's.
        Message::Account(account) if host.is_some() => (
            account.did,
            None,
            UpstreamStatus::from_event(account.active, account.status),
        ),
        _ => return None,
    };
    let update = AccountUpdate {
        heard: host.map(|host| heard(&event.entry, host)),
        counted: host.map(|_| upstream != UpstreamStatus::Deleted),
        upstream: Some(upstream),
        repo,
        ..AccountUpdate::new(Did::normalized(did).ok()?)
    };
    Some(at(event.entry.seq, update))
}

/// The local status that an event of this relay's own announces. With a `host`, the account is created where it is
/// unknown.
pub(super) fn own_change(event: &Event<'_>, host: Option<HostId>) -> Option<AccountUpdate> {
    let local = announced(&event.entry)?;
    let Message::Account(account) = event.message.as_ref()? else {
        return None;
    };
    Some(AccountUpdate {
        local: Some(local),
        heard: host.map(|host| heard(&event.entry, host)),
        ..AccountUpdate::new(Did::normalized(account.did).ok()?)
    })
}

/// A change that the event `seq` makes: its upstream status is as old as the event.
pub(super) fn at(seq: u64, update: AccountUpdate) -> AccountUpdate {
    AccountUpdate {
        status_seq: update.upstream.is_some().then_some(seq),
        ..update
    }
}

fn heard(entry: &Entry, host: HostId) -> Heard {
    Heard {
        host,
        at: i64::try_from(entry.time_us / 1_000_000).unwrap_or(i64::MAX),
    }
}

fn repo_state(blocks: &[u8]) -> Option<RepoState> {
    let car = Car::parse(blocks).ok()?;
    let commit = *car.roots().first()?;
    let signed = SignedCommit::parse(car.blocks().get(&commit)?).ok()?;
    // A chain that broke here is found broken again by the next commit; recovery only carries the position.
    Some(RepoState {
        rev: Tid::parse(signed.rev).ok()?,
        data: signed.data,
        commit,
        desynchronized: false,
    })
}
