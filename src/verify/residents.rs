//! The accounts that one shard has in memory, within a budget of bytes: those in use as they are, the others packed.
//!
//! Never lets an account go whose last change has not yet reached the store's writer, or for which events wait. What is
//! not resident is read through from SQL.

use lru::LruCache;

use crate::atproto::did::Did;
use crate::store::AccountRow;

use super::account::Account;
use super::slab::{Namer, Slab};

/// Memory of an account in use, with its DID and its place in the map, in bytes: measured with those of one and of ten
/// million, what the allocator loses between them included.
const IN_USE_BYTES: usize = 680;
/// Accounts in use, over all shards: these need not be packed and unpacked, and a small relay has no others.
const IN_USE: usize = 11_264;
/// One account in so many may be in use when there are more: their memory is then 3 bytes an account.
const IN_USE_SHARE: usize = 256;
/// The part of a small budget that goes to accounts in use.
const IN_USE_PART: usize = 4;
/// One account at rest of so many goes when memory is short: a shard is not to stand still for long, and there may be a
/// next time.
const PART_LET_GO: usize = 4;
/// Accounts looked at in one go for some to let go: more than a batch of events takes into use.
const LOOKS: usize = 256;

/// The resident accounts of one shard.
pub struct Residents {
    in_use: LruCache<Did, Account>,
    least_in_use: usize,
    at_rest: Slab,
    namer: Namer,
    counters: LruCache<Did, Counters>,
}

/// What only memory knows of an account.
#[derive(Clone, Copy)]
struct Counters {
    breaks: u32,
    counting_since: i64,
    asked_status_at: i64,
    asked_identity_at: i64,
}

impl Counters {
    fn of(account: &Account) -> Option<Self> {
        let old = account
            .resolved_at
            .is_some_and(|resolved_at| account.asked_identity_at > resolved_at);
        let counts = account.breaks > 0 || !account.upstream.is_active() || old;
        counts.then_some(Self {
            breaks: account.breaks,
            counting_since: account.counting_since,
            asked_status_at: account.asked_status_at,
            asked_identity_at: account.asked_identity_at,
        })
    }
}

impl Residents {
    /// Room for as many accounts as the share of one of `shards` in `budget` bytes holds.
    pub fn new(budget: usize, shards: usize) -> Self {
        let (budget, in_use) = (budget / shards, IN_USE / shards);
        let least_in_use = in_use.min(budget / IN_USE_PART / IN_USE_BYTES).max(1);
        let few = (budget - (least_in_use * IN_USE_BYTES).min(budget)) / Slab::ENTRY_BYTES;
        let many = budget / (Slab::ENTRY_BYTES + IN_USE_BYTES.div_ceil(IN_USE_SHARE));
        Self {
            in_use: LruCache::unbounded(),
            least_in_use,
            at_rest: Slab::new(few.min(many)),
            namer: Namer::default(),
            counters: LruCache::unbounded(),
        }
    }

    /// The account, if it is resident; it is in use from now on.
    pub fn get(&mut self, did: &Did) -> Option<&mut Account> {
        if !self.in_use.contains(did) {
            let record = self.at_rest.lend(self.namer.name(did))?;
            self.take_in(did.clone(), Account::unpack(&record));
        }
        self.in_use.get_mut(did)
    }

    /// The account, if it is in use: it is from [`Residents::get`] to [`Residents::shrink`].
    pub fn peek(&self, did: &Did) -> Option<&Account> {
        self.in_use.peek(did)
    }

    /// Takes in what SQL says of an account (`None`: nothing). Of one that is resident only what is missing is taken,
    /// unless SQL knows of another state.
    pub fn learn(&mut self, did: &Did, row: Option<AccountRow>) {
        let read = row.map(Account::from_row).unwrap_or_default();
        let Some(account) = self.get(did) else {
            return self.take_in(did.clone(), read);
        };
        let rev = |account: &Account| account.repo.map(|tip| tip.rev);
        if rev(account) == rev(&read) {
            account.repo = account.repo.and(read.repo);
        } else if account.moving.is_none() {
            let ticket = account.ticket;
            *account = Account { ticket, ..read };
        }
    }

    /// As [`Residents::learn`], for an account that has changed since SQL was asked: another state there is an older one.
    pub fn complete(&mut self, did: &Did, row: Option<AccountRow>) {
        let read = row.and_then(|row| row.repo);
        if let Some(account) = self.get(did)
            && let (Some(tip), Some(read)) = (account.repo, read)
            && tip.rev == read.rev
        {
            account.repo = Some(read.into());
        }
    }

    /// How many are resident.
    pub fn len(&self) -> usize {
        self.in_use.len() + self.at_rest.len() - self.at_rest.lent()
    }

    /// Whether none is resident.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Lets go of a part of the accounts at rest, and of their memory.
    pub fn let_some_go(&mut self) {
        let kept = self.at_rest.len() - self.at_rest.len().div_ceil(PART_LET_GO);
        self.at_rest.truncate(kept);
    }

    /// Packs the least recently used accounts while too many are in use. `settled` is the number of the last change
    /// that the store's writer knows; `busy` tells which accounts have events waiting.
    pub fn shrink(&mut self, settled: u64, busy: impl Fn(&Did) -> bool) {
        let most = self.least_in_use.max(self.at_rest.len() / IN_USE_SHARE);
        for _ in 0..LOOKS {
            if self.in_use.len() <= most {
                return;
            }
            let Some((did, account)) = self.in_use.peek_lru() else {
                return;
            };
            if account.ticket > settled || busy(did) {
                let did = did.clone();
                self.in_use.promote(&did);
            } else if let Some((did, account)) = self.in_use.pop_lru() {
                self.let_rest(did, &account);
            }
        }
    }

    fn take_in(&mut self, did: Did, mut account: Account) {
        if let Some(kept) = self.counters.pop(&did) {
            account.breaks = kept.breaks;
            account.counting_since = kept.counting_since;
            account.asked_status_at = kept.asked_status_at;
            account.asked_identity_at = kept.asked_identity_at;
        }
        self.in_use.put(did, account);
    }

    fn let_rest(&mut self, did: Did, account: &Account) {
        self.at_rest
            .give_back(self.namer.name(&did), account.pack());
        if let Some(counters) = Counters::of(account) {
            self.counters.put(did, counters);
            if self.counters.len() > self.least_in_use {
                self.counters.pop_lru();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::atproto::cid::{Cid, Codec};
    use crate::atproto::key::PublicKey;
    use crate::atproto::tid::Tid;
    use crate::store::{HostId, LocalStatus, RepoState, UpstreamStatus};

    const KEY: &str = "zQ3shqwJEJyMBsBXCWyCBpUBMqxcon9oHB7mCvx4sSpMdLJwc";
    const NOW: i64 = 1_790_000_000;

    fn did(number: u64) -> Did {
        Did::parse(&format!("did:web:{number}.example")).unwrap()
    }

    fn row(number: u64) -> AccountRow {
        AccountRow {
            uid: number as i64,
            did: did(number),
            host: HostId(7),
            counted: true,
            local: LocalStatus::Active,
            upstream: UpstreamStatus::Active,
            repo: Some(RepoState {
                rev: Tid::from_u64(number),
                data: Cid::of(Codec::DagCbor, &number.to_be_bytes()),
                commit: Cid::of(Codec::Raw, &number.to_be_bytes()),
                desynchronized: false,
            }),
            signing_key: Some(PublicKey::parse_multikey(KEY).unwrap()),
            resolved_at: Some(NOW),
        }
    }

    /// Room for this many accounts in use, and some at rest.
    fn small(in_use: usize) -> Residents {
        Residents::new(in_use * IN_USE_PART * IN_USE_BYTES, 1)
    }

    fn learn(residents: &mut Residents, numbers: impl IntoIterator<Item = u64>) {
        for number in numbers {
            residents.learn(&did(number), Some(row(number)));
        }
    }

    #[test]
    fn the_least_recently_used_are_packed_but_never_unsettled_or_busy_ones() {
        let mut residents = small(2);
        for (number, ticket) in [(0, 9), (1, 1), (2, 2), (3, 3), (4, 4)] {
            learn(&mut residents, [number]);
            residents.get(&did(number)).unwrap().ticket = ticket;
        }
        residents.get(&did(1));
        residents.shrink(5, |busy| *busy == did(2));
        let in_use: Vec<bool> = (0..5)
            .map(|number| residents.peek(&did(number)).is_some())
            .collect();
        assert_eq!(in_use, [true, false, true, false, false]);
        assert_eq!(residents.len(), 5);
        let back = residents.get(&did(4)).unwrap();
        assert_eq!(back.repo.unwrap().rev, Tid::from_u64(4));
        assert_eq!(residents.len(), 5);
    }

    #[test]
    fn a_part_goes_when_memory_is_short_and_none_that_is_in_use() {
        let mut residents = small(2);
        learn(&mut residents, 0..40);
        residents.shrink(0, |_| false);
        residents.get(&did(39)).unwrap().ticket = 7;
        let before = residents.len();
        residents.let_some_go();
        assert!(residents.len() < before && residents.len() > before / 2);
        assert!(residents.peek(&did(39)).is_some());
        learn(&mut residents, 100..104);
        residents.shrink(9, |_| false);
        // What went into use before and came back after is found as it is.
        let known = (0..40).filter(|number| residents.get(&did(*number)).is_some());
        assert!((25..40).contains(&known.count()));
    }

    #[test]
    fn more_unsettled_accounts_than_room_stay_all() {
        let mut residents = small(1);
        learn(&mut residents, 0..3);
        for number in 0..3 {
            residents.get(&did(number)).unwrap().ticket = 7;
        }
        residents.shrink(6, |_| false);
        assert!((0..3).all(|number| residents.peek(&did(number)).is_some()));
    }

    #[test]
    fn an_account_that_changed_is_never_found_as_it_was_before() {
        let mut residents = small(1);
        learn(&mut residents, 0..2);
        residents.shrink(0, |_| false);
        // Packed, unpacked, changed, packed again.
        residents.get(&did(0)).unwrap().repo.as_mut().unwrap().rev = Tid::from_u64(99);
        learn(&mut residents, [2]);
        residents.shrink(0, |_| false);
        assert!(residents.peek(&did(0)).is_none());
        let rev = residents.get(&did(0)).unwrap().repo.unwrap().rev;
        assert_eq!(rev, Tid::from_u64(99));
        // And as unusual it is not packed: SQL is asked for it.
        residents.get(&did(0)).unwrap().local = LocalStatus::TakenDown;
        learn(&mut residents, [3]);
        residents.shrink(0, |_| false);
        assert!(residents.get(&did(0)).is_none());
    }

    #[test]
    fn what_only_memory_knows_outlives_the_account_in_it() {
        let mut residents = small(1);
        learn(&mut residents, [0, 1]);
        let account = residents.get(&did(0)).unwrap();
        (account.breaks, account.counting_since) = (5, NOW);
        account.upstream = UpstreamStatus::Deactivated;
        account.asked_status_at = NOW;
        residents.get(&did(1));
        residents.shrink(0, |_| false);
        assert!(residents.get(&did(0)).is_none());
        learn(&mut residents, [0]);
        let account = residents.get(&did(0)).unwrap();
        assert_eq!((account.breaks, account.counting_since), (5, NOW));
        assert_eq!(account.asked_status_at, NOW);
    }

    #[test]
    fn sql_completes_an_account_and_corrects_one_that_it_knows_otherwise() {
        let mut residents = small(1);
        learn(&mut residents, [0, 1]);
        residents.shrink(0, |_| false);
        let account = residents.get(&did(0)).unwrap();
        assert_eq!(account.repo.unwrap().commit, None);
        account.ticket = 5;
        account.upstream = UpstreamStatus::Deactivated;
        learn(&mut residents, [0]);
        let account = residents.get(&did(0)).unwrap();
        assert!(account.repo.unwrap().commit.is_some());
        assert_eq!(
            account.upstream,
            UpstreamStatus::Deactivated,
            "not yet in SQL"
        );

        residents.learn(
            &did(0),
            Some(AccountRow {
                repo: None,
                ..row(0)
            }),
        );
        let account = residents.get(&did(0)).unwrap();
        assert!(account.repo.is_none());
        assert_eq!((account.upstream.is_active(), account.ticket), (true, 5));
    }
}
