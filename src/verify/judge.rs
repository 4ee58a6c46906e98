//! What is to become of one event: the order in which the rules are asked, and which look-ups they need.
//!
//! No I/O: an event that needs to know more is answered with a [`Question`], and judged again from the start when
//! the answer is there. Cheap rules come first, the signature last.

use std::sync::Arc;

use crate::atproto::datetime;
use crate::atproto::frame::{self, Message};
use crate::atproto::key::VerifyingKey;
use crate::clock::has_passed;
use crate::hosts::{HostHandle, Received};
use crate::identity::Identity;
use crate::store::{LocalStatus, RepoState, UpstreamStatus, Validation};

use super::Tuning;
use super::account::Account;
use super::rules::{self, Chain, Facts, Strictness};
use crate::hosts::Rule;

/// What the judge must know of time and settings.
#[derive(Clone, Copy)]
pub(super) struct Circumstances {
    /// Unix time in microseconds.
    pub now_us: u64,
    pub tuning: Tuning,
}

impl Circumstances {
    /// Unix time in seconds.
    pub fn now(&self) -> i64 {
        (self.now_us / 1_000_000) as i64
    }

    /// As events write it.
    pub fn time(&self) -> String {
        datetime::format_utc(self.now_us)
    }
}

/// Why an identity is not to be had.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum NoIdentity {
    /// The DID does not exist or its document cannot be used.
    NotFound,
    /// The DID was tombstoned.
    Tombstoned,
    /// The directory or the web host did not answer in time.
    Unresolved,
}

impl NoIdentity {
    /// Whether the account has no identity for certain; a known one outlives a directory that does not answer.
    pub fn is_certain(self) -> bool {
        matches!(self, NoIdentity::NotFound | NoIdentity::Tombstoned)
    }

    fn rule(self) -> Rule {
        match self {
            NoIdentity::NotFound => Rule::IdentityNotFound,
            NoIdentity::Tombstoned => Rule::Tombstoned,
            NoIdentity::Unresolved => Rule::IdentityUnresolved,
        }
    }
}

/// An event on its way through the shard, with the answers it already got.
pub(super) struct Waiting {
    /// The event.
    pub received: Received,
    /// The identity, as it was resolved for this event.
    pub identity: Option<Result<Arc<Identity>, NoIdentity>>,
    /// Whether that identity was resolved afresh, past every cache.
    pub refreshed: bool,
    /// Whether the PDS was asked for the account's status for this event.
    pub asked_status: bool,
    /// What the event says, where all but its signature was found right: that is not found out twice.
    pub facts: Option<Facts>,
}

impl Waiting {
    pub fn new(received: Received) -> Self {
        Self {
            received,
            identity: None,
            refreshed: false,
            asked_status: false,
            facts: None,
        }
    }
}

/// A look-up that an event waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Question {
    /// The account's row in SQL.
    Account,
    /// The identity; `fresh` goes past every cache.
    Identity { fresh: bool },
    /// The account's status at its PDS.
    Status,
    /// Whether SQL has all that is known of the account.
    Written,
}

/// An event that broke no rule so far, whose signature must still be checked.
pub(super) struct Candidate {
    /// The account's key. An event that may change it is not looked at while this one waits for its check.
    pub key: VerifyingKey,
    /// What it says, and the signature.
    pub facts: Facts,
    /// How it continues the account's chain.
    pub chain: Chain,
    /// Whether it was a commit of sync 1.1.
    pub sync11: bool,
}

/// An event that broke no rule.
#[expect(
    clippy::large_enum_variant,
    reason = "nearly every event is to be checked"
)]
pub(super) enum Finding {
    /// Right, if the signature is.
    Check(Candidate),
    /// An `#identity` to be forwarded, with another frame where the handle had to go.
    Identity(Option<Vec<u8>>),
    /// An `#account` to be forwarded: the PDS's word on the account.
    Account(UpstreamStatus),
}

/// What stands in the way of an event.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Obstacle {
    /// A look-up must come first.
    Ask(Question),
    /// The account's PDS speaks for it: the account must first be held against its quota.
    Admit,
    /// It is refused.
    Drop(Rule),
}

impl From<Rule> for Obstacle {
    fn from(rule: Rule) -> Self {
        Obstacle::Drop(rule)
    }
}

type Verdict = Result<Finding, Obstacle>;

/// Judges one event. `account` is `None` while SQL was not asked for it.
pub(super) fn judge(waiting: &Waiting, account: Option<&Account>, at: &Circumstances) -> Verdict {
    let received = &waiting.received;
    let length = received.frame.len();
    if !frame::fits_any_seq(length, &received.seq_span) {
        return Err(Obstacle::Drop(Rule::FrameTooLarge));
    }
    rules::event_size(received.kind, length, at.tuning.account_event_bytes)?;
    let account = account.ok_or(Obstacle::Ask(Question::Account))?;
    if account.moving.is_some() {
        return Err(Obstacle::Ask(Question::Written));
    }
    // The socket's reader has decoded the frame before; this is the same frame.
    let Ok(frame) = frame::decode(&received.frame) else {
        return Err(Obstacle::Drop(Rule::Frame));
    };
    match frame.message {
        Message::Commit(commit) => commit_event(waiting, &commit, account, at),
        Message::Sync(sync) => sync_event(waiting, &sync, account, at),
        Message::Identity(event) => identity_event(waiting, &event),
        Message::Account(event) => account_event(waiting, &event, account, at),
        Message::Info(_) | Message::Error(_) | Message::Unknown => Err(Obstacle::Drop(Rule::Frame)),
    }
}

/// `#identity`, from any host: the identity is refreshed; the handle stays only where the document has it.
fn identity_event(waiting: &Waiting, event: &frame::Identity<'_>) -> Verdict {
    let identity = match &waiting.identity {
        Some(Ok(identity)) => identity,
        Some(Err(reason)) => return Err(Obstacle::Drop(reason.rule())),
        None => return Err(Obstacle::Ask(Question::Identity { fresh: true })),
    };
    let unknown = event.handle.is_some_and(|handle| {
        !identity
            .handles
            .iter()
            .any(|known| known.eq_ignore_ascii_case(handle))
    });
    if !unknown {
        return Ok(Finding::Identity(None));
    }
    match frame::without_handle(&waiting.received.frame) {
        Ok(frame) => Ok(Finding::Identity(Some(frame))),
        Err(_) => Err(Obstacle::Drop(Rule::Frame)),
    }
}

/// `#account`: only from the account's PDS.
fn account_event(
    waiting: &Waiting,
    event: &frame::Account<'_>,
    account: &Account,
    at: &Circumstances,
) -> Verdict {
    // It can end the account, so it does not rely on an identity that may be out of date.
    from_own_host(
        waiting,
        account,
        account.identity_due(at.tuning.identity_ttl, at.now()),
    )?;
    Ok(Finding::Account(UpstreamStatus::from_event(
        event.active,
        event.status,
    )))
}

fn commit_event(
    waiting: &Waiting,
    commit: &frame::Commit<'_>,
    account: &Account,
    at: &Circumstances,
) -> Verdict {
    rules::commit_size(commit)?;
    let rev = rules::rev(commit.rev, at.now_us)?;
    from_own_host(waiting, account, account.resolved_at.is_none())?;
    admitted(waiting, account)?;
    let key = signing_key(waiting, account)?;
    active(waiting, account, at, false)?;
    rules::rev_order(rev, account.repo.map(|repo| repo.rev))?;
    let strictness = strictness(waiting, at);
    let facts = match &waiting.facts {
        Some(facts) => facts.clone(),
        None => rules::commit(commit, rev, strictness)?,
    };
    let chain = rules::chain(commit, account.repo.map(|repo| (repo.rev, repo.data)));
    Ok(Finding::Check(Candidate {
        key: key.clone(),
        facts,
        chain,
        sync11: rules::speaks_sync11(commit),
    }))
}

/// Which commits the host is held to.
fn strictness(waiting: &Waiting, at: &Circumstances) -> Strictness {
    let host = &waiting.received.host;
    match host.validation().unwrap_or(at.tuning.validation) {
        Validation::Strict => Strictness::Strict,
        Validation::Ratchet if host.sync11() => Strictness::Strict,
        Validation::Ratchet | Validation::Lenient => Strictness::Lenient,
    }
}

fn sync_event(
    waiting: &Waiting,
    sync: &frame::Sync<'_>,
    account: &Account,
    at: &Circumstances,
) -> Verdict {
    rules::sync_size(sync)?;
    let rev = rules::rev(sync.rev, at.now_us)?;
    from_own_host(waiting, account, account.resolved_at.is_none())?;
    admitted(waiting, account)?;
    let key = signing_key(waiting, account)?;
    active(waiting, account, at, true)?;
    let facts = match &waiting.facts {
        Some(facts) => facts.clone(),
        None => rules::sync(sync, rev)?,
    };
    let last = match account.repo {
        // Only now it matters which commit it was.
        Some(tip) if tip.rev == rev && tip.commit.is_none() => {
            return Err(Obstacle::Ask(Question::Account));
        }
        last => last.map(|tip| (tip.rev, tip.commit.unwrap_or(facts.commit))),
    };
    rules::sync_order(&facts, last)?;
    Ok(Finding::Check(Candidate {
        key: key.clone(),
        facts,
        chain: Chain::Intact,
        sync11: false,
    }))
}

/// What its PDS says of an account counts it against that host's quota, once; and one that the quota holds back comes
/// free where there is room. A deleted account counts nowhere.
fn admitted(waiting: &Waiting, account: &Account) -> Result<(), Obstacle> {
    let host = &waiting.received.host;
    if account.upstream != UpstreamStatus::Deleted && needs_admission(account, host) {
        return Err(Obstacle::Admit);
    }
    Ok(())
}

/// Whether the quota of its PDS must be asked for an account that is not deleted.
pub(super) fn needs_admission(account: &Account, host: &HostHandle) -> bool {
    let throttled = account.local == LocalStatus::Throttled;
    !account.counted || throttled && host.fits_quota()
}

/// The host must be the account's PDS. The identity is asked for first where it is `due`; a host that seems not to be the
/// PDS is looked up once more, past every cache.
fn from_own_host(waiting: &Waiting, account: &Account, due: bool) -> Result<(), Obstacle> {
    if waiting.identity.is_none() && due {
        return Err(Obstacle::Ask(Question::Identity { fresh: false }));
    }
    // A known identity outlives a directory that does not answer. One that is not known is no reason to believe a host.
    if let Some(Err(reason)) = waiting.identity
        && (reason.is_certain() || account.resolved_at.is_none())
    {
        return Err(Obstacle::Drop(reason.rule()));
    }
    if account.is_at(waiting.received.host.id()) {
        return Ok(());
    }
    if !waiting.refreshed {
        return Err(Obstacle::Ask(Question::Identity { fresh: true }));
    }
    Err(Obstacle::Drop(match &waiting.identity {
        Some(Err(reason)) => reason.rule(),
        Some(Ok(identity)) if identity.pds.is_none() => Rule::NoPds,
        _ => Rule::WrongHost,
    }))
}

/// The account's key. An account without one is looked up once more, past every cache.
fn signing_key<'a>(waiting: &Waiting, account: &'a Account) -> Result<&'a VerifyingKey, Obstacle> {
    if let Some((_, key)) = &account.key {
        return Ok(key);
    }
    if !waiting.refreshed {
        return Err(Obstacle::Ask(Question::Identity { fresh: true }));
    }
    Err(Obstacle::Drop(match &waiting.identity {
        Some(Err(reason)) => reason.rule(),
        _ => Rule::NoSigningKey,
    }))
}

/// The account must be active, here and at its PDS; the PDS is asked before its last word counts. A `#sync` is how an
/// account that broke its chain comes to order, so it passes where only that stands against the account.
fn active(
    waiting: &Waiting,
    account: &Account,
    at: &Circumstances,
    mends: bool,
) -> Result<(), Obstacle> {
    let mended = mends && account.local == LocalStatus::Desynchronized;
    if account.local == LocalStatus::Desynchronized && !mended {
        return Err(Obstacle::Drop(Rule::Desynchronized));
    }
    if !account.local.is_active() && !mended {
        return Err(Obstacle::Drop(Rule::AccountInactive));
    }
    if account.upstream.is_active() {
        return Ok(());
    }
    let due = has_passed(at.tuning.status_interval, account.asked_status_at, at.now());
    if due && !waiting.asked_status {
        return Err(Obstacle::Ask(Question::Status));
    }
    Err(Obstacle::Drop(Rule::AccountInactive))
}

/// The signature did not verify: the key may have changed, so the identity is refreshed once.
pub(super) fn bad_signature(waiting: &Waiting) -> Obstacle {
    if waiting.refreshed {
        Obstacle::Drop(Rule::Signature)
    } else {
        Obstacle::Ask(Question::Identity { fresh: true })
    }
}

/// The repository's state after an accepted event.
pub(super) fn repo_state(facts: &Facts, chain: Chain) -> RepoState {
    RepoState {
        rev: facts.rev,
        data: facts.data,
        commit: facts.commit,
        desynchronized: chain == Chain::Broken,
    }
}
