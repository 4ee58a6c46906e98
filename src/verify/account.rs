//! What a shard keeps of the accounts it is responsible for: the resident part of the account state.
//!
//! Bounded: the least recently used accounts leave when there are too many, but never one whose last change
//! has not yet reached the store's writer. What is not resident is read through from SQL.

use lru::LruCache;

use crate::atproto::did::Did;
use crate::atproto::key::{PublicKey, VerifyingKey};
use crate::config::DesyncLimits;
use crate::store::{AccountRow, HostId, LocalStatus, RepoState, UpstreamStatus};
use crate::telemetry::metrics;

/// One account, as its shard knows it.
#[derive(Default)]
pub(super) struct Account {
    /// Whether the account was seen before: new ones are counted against their host's quota.
    pub known: bool,
    /// The last known host that was the account's PDS; the account counts against its quota.
    pub host: Option<HostId>,
    /// Whether the account has left that host, and its PDS is none that this relay knows.
    pub away: bool,
    /// What this relay's operator, or a limit of it, says of the account.
    pub local: LocalStatus,
    /// What the account's PDS says of it.
    pub upstream: UpstreamStatus,
    /// The repository after the last event that was accepted.
    pub repo: Option<RepoState>,
    /// How often the chain broke since [`Account::counting_since`].
    pub breaks: u32,
    /// Start of the period in which breaks are counted, Unix time in seconds.
    pub counting_since: i64,
    /// The account's signing key, as parsed as verification wants it.
    pub key: Option<(PublicKey, VerifyingKey)>,
    /// When the identity was resolved, Unix time in seconds.
    pub resolved_at: Option<i64>,
    /// When the PDS was last asked for the account's status, Unix time in seconds.
    pub asked_status_at: i64,
    /// Number of the last change; see [`Residents::settle`].
    pub ticket: u64,
}

impl Account {
    /// The account as SQL has it. One without a key there may be gone or elsewhere: its identity counts as unknown.
    pub fn from_row(row: AccountRow) -> Self {
        Self {
            known: true,
            host: Some(row.host),
            local: row.local,
            upstream: row.upstream,
            repo: row.repo,
            key: row.signing_key.and_then(parsed),
            resolved_at: row.signing_key.and(row.resolved_at),
            ..Self::default()
        }
    }

    /// Whether this host is the account's PDS, as far as known.
    pub fn is_at(&self, host: HostId) -> bool {
        !self.away && self.host == Some(host)
    }

    /// Counts a break of the chain of commits; tells whether there were too many in the period.
    pub fn count_break(&mut self, now: i64, limits: DesyncLimits) -> bool {
        if now - self.counting_since >= limits.period.as_secs() as i64 {
            self.counting_since = now;
            self.breaks = 0;
        }
        self.breaks = self.breaks.saturating_add(1);
        self.breaks > limits.limit
    }

    /// Takes the key of a freshly resolved identity; parses it only where it changed.
    pub fn set_key(&mut self, key: Option<PublicKey>) {
        if self.key.as_ref().map(|(known, _)| *known) != key {
            self.key = key.and_then(parsed);
        }
    }
}

fn parsed(key: PublicKey) -> Option<(PublicKey, VerifyingKey)> {
    VerifyingKey::new(&key).ok().map(|parsed| (key, parsed))
}

/// The resident accounts of one shard.
pub(super) struct Residents {
    accounts: LruCache<Did, Account>,
    capacity: usize,
}

impl Residents {
    /// Room for about `capacity` accounts.
    pub fn new(capacity: usize) -> Self {
        Self {
            accounts: LruCache::unbounded(),
            capacity: capacity.max(1),
        }
    }

    /// The account, if it is resident; marks it as used.
    pub fn get(&mut self, did: &Did) -> Option<&mut Account> {
        self.accounts.get_mut(did)
    }

    /// Counts whether an event's account is resident.
    pub fn count_use(&self, did: &Did) {
        if self.accounts.contains(did) {
            metrics().account_cache_hits.inc();
        } else {
            metrics().account_cache_misses.inc();
        }
    }

    /// Takes in an account that was read from SQL.
    pub fn insert(&mut self, did: Did, account: Account) {
        self.accounts.put(did, account);
    }

    /// How many are resident.
    pub fn len(&self) -> usize {
        self.accounts.len()
    }

    /// Lets the least recently used accounts go while there are too many. `settled` is the number of the last
    /// change that the store's writer knows; `busy` tells which accounts have events waiting.
    pub fn shrink(&mut self, settled: u64, busy: impl Fn(&Did) -> bool) {
        let mut kept = 0;
        while self.accounts.len() > self.capacity && kept < self.accounts.len() {
            let Some((did, account)) = self.accounts.peek_lru() else {
                return;
            };
            if account.ticket > settled || busy(did) {
                let did = did.clone();
                self.accounts.promote(&did);
                kept += 1;
            } else {
                self.accounts.pop_lru();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn did(name: &str) -> Did {
        Did::parse(&format!("did:web:{name}.example")).unwrap()
    }

    #[test]
    fn the_least_recently_used_go_but_never_unsettled_or_busy_ones() {
        let mut residents = Residents::new(2);
        for (name, ticket) in [("a", 9), ("b", 1), ("c", 2), ("d", 3), ("e", 4)] {
            residents.insert(
                did(name),
                Account {
                    ticket,
                    ..Account::default()
                },
            );
        }
        residents.get(&did("b"));
        residents.shrink(5, |busy| *busy == did("c"));
        let resident: Vec<bool> = ["a", "b", "c", "d", "e"]
            .iter()
            .map(|name| residents.get(&did(name)).is_some())
            .collect();
        assert_eq!(resident, [true, false, true, false, false]);
    }

    #[test]
    fn more_unsettled_accounts_than_room_stay_all() {
        let mut residents = Residents::new(1);
        for name in ["a", "b", "c"] {
            residents.insert(
                did(name),
                Account {
                    ticket: 7,
                    ..Account::default()
                },
            );
        }
        residents.shrink(6, |_| false);
        assert_eq!(residents.len(), 3);
    }
}
