//! What the database holds about hosts and accounts, as the rest of the relay sees it,
//! and the changes it applies. No SQL here.

use super::status::{HostStatus, LocalStatus, UpstreamStatus, combined_status};
use super::validation::Validation;
use crate::atproto::cid::Cid;
use crate::atproto::did::Did;
use crate::atproto::key::PublicKey;
use crate::atproto::tid::Tid;
use std::fmt;

/// Accounts a new host may have (the reference relay's default).
pub const DEFAULT_ACCOUNT_LIMIT: i64 = 100;

/// Accounts a host of a trusted domain may have (the reference relay's default).
pub const TRUSTED_ACCOUNT_LIMIT: i64 = 10_000_000;

/// A host's number in the database and in the log's index. Never reused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct HostId(pub u32);

impl HostId {
    /// The number as both databases take it. The databases give out numbers below 2^31.
    pub(super) fn to_sql(self) -> i32 {
        i32::try_from(self.0).unwrap_or(i32::MAX)
    }
}

impl fmt::Display for HostId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// Rates an operator set for one host; `None` leaves the general rule in force.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct RateOverrides {
    /// Events per second.
    pub per_second: Option<u32>,
    /// Events per hour.
    pub per_hour: Option<u32>,
    /// Events per day.
    pub per_day: Option<u32>,
    /// Bytes per hour.
    pub bytes_per_hour: Option<u64>,
}

/// A host's new beginning.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Renumbered {
    /// Its cursor then.
    pub cursor: i64,
    /// The first log sequence number of what it sent since; what the log has of it below bears its old numbers.
    pub log_seq: u64,
}

/// A host the relay knows.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HostRow {
    /// Its number here.
    pub id: HostId,
    /// `host` or `host:port`, lower case.
    pub hostname: String,
    /// Whether it is dialled with TLS.
    pub tls: bool,
    /// How the relay stands to it.
    pub status: HostStatus,
    /// Its last settled sequence number; `None` before the first event.
    pub cursor: Option<i64>,
    /// Where it last began to number its events anew.
    pub renumbered: Option<Renumbered>,
    /// Accounts it may have; those over it are created throttled.
    pub account_limit: i64,
    /// Whether it was of a trusted domain when it was added.
    pub trusted: bool,
    /// Its own validation mode; `None` is the general one.
    pub validation: Option<Validation>,
    /// Whether it ever sent a sync 1.1 commit: from then on it may not go back.
    pub sync11: bool,
    /// Its own rates.
    pub rates: RateOverrides,
    /// Accounts that count against its quota: throttled ones do, deleted ones do not.
    pub account_count: i64,
    /// When it was added, seconds since 1970.
    pub created_at: i64,
}

/// A host to be added.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NewHost {
    /// `host` or `host:port`, lower case.
    pub hostname: String,
    /// Whether it is dialled with TLS.
    pub tls: bool,
    /// Whether it is of a trusted domain.
    pub trusted: bool,
    /// Accounts it may have.
    pub account_limit: i64,
}

impl NewHost {
    /// A host with the limit that goes with its domain.
    pub fn new(hostname: impl Into<String>, tls: bool, trusted: bool) -> Self {
        Self {
            hostname: hostname.into(),
            tls,
            trusted,
            account_limit: if trusted {
                TRUSTED_ACCOUNT_LIMIT
            } else {
                DEFAULT_ACCOUNT_LIMIT
            },
        }
    }
}

/// The state of a repository after its last accepted commit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RepoState {
    /// The commit's revision.
    pub rev: Tid,
    /// The root of its tree.
    pub data: Cid,
    /// The signed commit block.
    pub commit: Cid,
    /// Whether the chain of its commits broke and was not mended since.
    pub desynchronized: bool,
}

/// The signing key of a resolved DID document, and when it was resolved.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct KnownKey {
    /// The `#atproto` key; `None` when the document has none.
    pub signing_key: Option<PublicKey>,
    /// When it was resolved, seconds since 1970.
    pub resolved_at: i64,
}

/// An account the relay knows.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AccountRow {
    /// Its number here: grows with the time of discovery, and is the cursor of lists.
    pub uid: i64,
    /// Its DID, normalised.
    pub did: Did,
    /// The host its events come from.
    pub host: HostId,
    /// Whether it counts against the quota of that host.
    pub counted: bool,
    /// This relay's decision.
    pub local: LocalStatus,
    /// The status that its PDS reports.
    pub upstream: UpstreamStatus,
    /// Its repository; `None` before the first commit.
    pub repo: Option<RepoState>,
    /// Its key, as last resolved.
    pub signing_key: Option<PublicKey>,
    /// When its identity was last resolved, seconds since 1970.
    pub resolved_at: Option<i64>,
}

impl AccountRow {
    /// The number of an account that the database does not have yet.
    pub const UNNUMBERED: i64 = 0;

    /// The status for consumers: `active`, and the lexicons' `status` field.
    pub fn public_status(&self) -> (bool, Option<&str>) {
        combined_status(self.local, &self.upstream)
    }

    /// The row after an update, as the database applies it.
    pub(super) fn apply(&mut self, update: &AccountUpdate) {
        self.host = update.host.unwrap_or(self.host);
        self.counted = update.counted.unwrap_or(self.counted);
        self.local = update.local.unwrap_or(self.local);
        if let Some(upstream) = &update.upstream {
            self.upstream = upstream.clone();
        }
        if let Some(repo) = update.repo
            && self.repo.is_none_or(|known| repo.rev >= known.rev)
        {
            self.repo = Some(repo);
        }
        if let Some(key) = update.key
            && self.resolved_at.is_none_or(|then| key.resolved_at >= then)
        {
            self.signing_key = key.signing_key;
            self.resolved_at = Some(key.resolved_at);
        }
    }

    /// The row that an update creates, with [`AccountRow::UNNUMBERED`] for a number: the database gives out numbers.
    /// None without a host.
    pub(super) fn created(update: &AccountUpdate) -> Option<Self> {
        let mut row = Self {
            uid: Self::UNNUMBERED,
            did: update.did.clone(),
            host: update.host?,
            counted: true,
            local: LocalStatus::default(),
            upstream: UpstreamStatus::default(),
            repo: None,
            signing_key: None,
            resolved_at: None,
        };
        row.apply(update);
        Some(row)
    }
}

/// A host of which the log has an event of an account, and when the log took it, seconds since 1970.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Heard {
    /// The account's PDS at that time.
    pub host: HostId,
    /// That time.
    pub at: i64,
}

/// What changed about one account; everything `None` stays as it is.
///
/// An update with a host creates the account where it is unknown. One without a host changes known
/// accounts only, and is cheaper: it is the form for the stream of commits.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AccountUpdate {
    /// Whose.
    pub did: Did,
    /// Its host now.
    pub host: Option<HostId>,
    /// The host that the log names, in a replay. It creates the account where it is unknown, and moves none that
    /// has an identity: where the account is elsewhere, its key is forgotten unless it was resolved after that event.
    pub heard: Option<Heard>,
    /// Whether it counts against the quota of its host. A deleted account never does.
    pub counted: Option<bool>,
    /// This relay's decision. A new account without one is active, or throttled if its host is
    /// over its quota.
    pub local: Option<LocalStatus>,
    /// The status that its PDS reports.
    pub upstream: Option<UpstreamStatus>,
    /// The log sequence number of the event that reported it. An older one than the stored changes nothing.
    pub status_seq: Option<u64>,
    /// Its repository. An older rev than the stored one changes nothing: the log may be replayed
    /// over newer state.
    pub repo: Option<RepoState>,
    /// Its key. One resolved earlier than the stored one changes nothing.
    pub key: Option<KnownKey>,
}

impl AccountUpdate {
    /// An update that changes nothing yet.
    pub fn new(did: Did) -> Self {
        Self {
            did,
            host: None,
            heard: None,
            counted: None,
            local: None,
            upstream: None,
            status_seq: None,
            repo: None,
            key: None,
        }
    }

    /// Adds a later update of the same account: applying the result equals applying both in order. Of the hosts that
    /// the log names only the last one matters.
    pub fn merge(&mut self, later: AccountUpdate) {
        debug_assert_eq!(self.did, later.did);
        self.repo = match (self.repo, later.repo) {
            (Some(now), Some(then)) if then.rev < now.rev => Some(now),
            (now, then) => then.or(now),
        };
        self.key = match (self.key, later.key) {
            (Some(now), Some(then)) if then.resolved_at < now.resolved_at => Some(now),
            (now, then) => then.or(now),
        };
        self.host = later.host.or(self.host);
        self.heard = later.heard.or(self.heard);
        self.counted = later.counted.or(self.counted);
        self.local = later.local.or(self.local);
        if later.upstream.is_some() && !later.is_before(self.status_seq) {
            self.status_seq = later.status_seq.or(self.status_seq);
            self.upstream = later.upstream;
        }
    }
}

impl AccountUpdate {
    /// Whether its upstream status is older than the one from `seq`.
    pub(super) fn is_before(&self, seq: Option<u64>) -> bool {
        self.status_seq
            .zip(seq)
            .is_some_and(|(this, that)| this < that)
    }

    /// Whether it may take an account from the host that could speak for it.
    pub(super) fn takes_authority(&self) -> bool {
        self.host.is_some() || self.key.is_some_and(|key| key.signing_key.is_none())
    }

    /// Whether the account's row must be read before: what the update makes of it, and of the hosts' counts, depends
    /// on it.
    pub(super) fn needs_row(&self) -> bool {
        self.host.is_some()
            || self.heard.is_some()
            || self.counted.is_some()
            || self.upstream == Some(UpstreamStatus::Deleted)
    }
}

/// A part of a list.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Page<T> {
    /// Its rows.
    pub rows: Vec<T>,
    /// Where the next page begins: after this number. `None` at the list's end.
    pub next: Option<i64>,
}

/// Changes that are written together or not at all.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Batch {
    /// Accounts, in the order of their events.
    pub accounts: Vec<AccountUpdate>,
    /// Hosts' cursors, the last one of a host counts.
    pub cursors: Vec<(HostId, i64)>,
    /// The position of the accounts view: from which log sequence number on the log must be read after a crash. Everything
    /// below is in this or an earlier batch. `None` leaves it.
    pub replay_from: Option<u64>,
    /// The last log sequence number that was given out. A lower one than the stored changes nothing.
    pub head: Option<u64>,
}

impl Batch {
    /// Whether there is nothing to write.
    pub fn is_empty(&self) -> bool {
        self.accounts.is_empty()
            && self.cursors.is_empty()
            && self.replay_from.is_none()
            && self.head.is_none()
    }
}
