//! What a shard knows of one account, in the two forms it is kept in: ready for use, and packed for rest.
//!
//! Packing loses nothing that matters to a usual account; one that is unusual in any way is not packed.

use std::hash::{BuildHasher as _, RandomState};
use std::sync::LazyLock;
use std::time::Duration;

use crate::atproto::cid::Cid;
use crate::atproto::key::{Curve, PublicKey, VerifyingKey};
use crate::atproto::tid::Tid;
use crate::clock::has_passed;
use crate::store::{AccountRow, HostId, LocalStatus, RepoState, UpstreamStatus};

use super::slab::{RECORD_BITS, RECORD_BYTES, Record};

/// How long an identity past its time is used before it is asked for once more, where nobody answered.
const IDENTITY_RETRY: Duration = Duration::from_secs(60);

/// A packed account: the key's x coordinate, the rev, then these bits from the lowest: the mark of the data CID, the
/// minute of resolution, the host, the parity of the key's y coordinate, the curve.
const X_BYTES: usize = 32;
const REV_END: usize = X_BYTES + 8;
const DATA_BITS: u32 = 32;
/// Minutes from [`FIRST_MINUTE`] on reach to the year 2051.
const MINUTE_BITS: u32 = 24;
/// Half a million hosts; accounts of hosts with higher numbers are not packed.
const HOST_BITS: u32 = 19;
const HOST_AT: u32 = DATA_BITS + MINUTE_BITS;
const PARITY_AT: u32 = HOST_AT + HOST_BITS;
const CURVE_AT: u32 = PARITY_AT + 1;
const _: () = assert!(REV_END as u32 * 8 + CURVE_AT < RECORD_BITS);
/// The beginning of 2020, in minutes of Unix time.
const FIRST_MINUTE: i64 = 1_577_836_800 / 60;

/// How often an account's chain of commits may break.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DesyncLimits {
    /// Breaks allowed within `period`; one more makes the account desynchronized.
    pub limit: u32,
    /// The time over which breaks are counted.
    pub period: Duration,
}

impl Default for DesyncLimits {
    fn default() -> DesyncLimits {
        DesyncLimits {
            limit: 100,
            period: Duration::from_secs(24 * 3600),
        }
    }
}

/// One account, as its shard knows it.
#[derive(Clone, Debug, Default)]
pub struct Account {
    /// Whether SQL has the account: from the first word of its own PDS on.
    pub known: bool,
    /// The last known host that was the account's PDS.
    pub host: Option<HostId>,
    /// Whether the account counts against the quota of that host: its PDS has spoken for it, and it is not deleted.
    pub counted: bool,
    /// The number of the move by which the account left a host, while SQL may not have it: until it does, nothing of the
    /// account goes out, so that no crash gives it back.
    pub moving: Option<u64>,
    /// Whether the account has left that host, and its PDS is none that this relay knows.
    pub away: bool,
    /// What this relay's operator, or a limit of it, says of the account.
    pub local: LocalStatus,
    /// What the account's PDS says of it.
    pub upstream: UpstreamStatus,
    /// The repository after the last event that was accepted.
    pub repo: Option<Tip>,
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
    /// When an old identity was last asked for again, Unix time in seconds.
    pub asked_identity_at: i64,
    /// Whether all that the log holds of the account is being taken out of it: nothing was emitted since that was asked.
    pub redacted: bool,
    /// Number of the last change: it stays resident until the store's writer knows of it.
    pub ticket: u64,
}

/// The last accepted state of a repository, as far as the next event is compared with it.
#[derive(Clone, Copy, Debug)]
pub struct Tip {
    /// The commit's revision.
    pub rev: Tid,
    /// The root of its tree.
    pub data: Mark,
    /// The signed commit. Only a `#sync` of the same rev is compared with it, so it is not kept at rest: where it is
    /// missing, SQL has it.
    pub commit: Option<Cid>,
}

impl From<RepoState> for Tip {
    fn from(repo: RepoState) -> Self {
        Self {
            rev: repo.rev,
            data: Mark::of(&repo.data),
            commit: Some(repo.commit),
        }
    }
}

/// What is kept of a CID that is only ever compared: a hash under a key that this process drew at random. A CID that is
/// another one passes for it once in 2^32 times, whoever chose it; a break of a chain is then forwarded, as always, but
/// not counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mark(u32);

impl Mark {
    /// The mark of a CID.
    pub fn of(cid: &Cid) -> Self {
        static KEY: LazyLock<RandomState> = LazyLock::new(RandomState::new);
        Self(KEY.hash_one(cid.as_bytes()) as u32)
    }
}

impl PartialEq<Cid> for Mark {
    fn eq(&self, cid: &Cid) -> bool {
        *self == Mark::of(cid)
    }
}

impl Account {
    /// The account as SQL has it. One without a key there may be gone or elsewhere: its identity counts as unknown.
    pub fn from_row(row: AccountRow) -> Self {
        Self {
            known: true,
            host: Some(row.host),
            counted: row.counted,
            local: row.local,
            upstream: row.upstream,
            repo: row.repo.map(Tip::from),
            key: row.signing_key.and_then(parsed),
            resolved_at: row.signing_key.and(row.resolved_at),
            ..Self::default()
        }
    }

    /// Whether this host is the account's PDS, as far as known.
    pub fn is_at(&self, host: HostId) -> bool {
        !self.away && self.host == Some(host)
    }

    /// Whether the identity is to be asked for: it is not known, or it is older than `ttl` and was not asked for lately. A
    /// directory that does not answer is not asked again for every event.
    pub fn identity_due(&self, ttl: Duration, now: i64) -> bool {
        self.resolved_at.is_none_or(|resolved_at| {
            has_passed(ttl, resolved_at, now)
                && has_passed(IDENTITY_RETRY, self.asked_identity_at, now)
        })
    }

    /// Counts a break of the chain of commits; tells whether there were too many in the period.
    pub fn count_break(&mut self, now: i64, limits: DesyncLimits) -> bool {
        if has_passed(limits.period, self.counting_since, now) {
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

    /// The account as it rests, unless something about it is unusual. What only memory knows, its counters, is not part
    /// of that.
    pub(super) fn pack(&self) -> Option<Record> {
        let at_home = self.known && self.counted && !self.away && self.moving.is_none();
        let usual = at_home && self.local.is_active() && self.upstream.is_active();
        let tip = self.repo.filter(|_| usual)?;
        let (key, _) = self.key.as_ref()?;
        let host = within(u64::from(self.host?.0), HOST_BITS)?;
        let minute = self.resolved_at?.div_euclid(60) - FIRST_MINUTE;
        let minute = within(u64::try_from(minute).ok()?, MINUTE_BITS)?;
        let [parity, x @ ..] = key.compressed();
        let rest = u128::from(tip.data.0)
            | minute << DATA_BITS
            | host << HOST_AT
            | u128::from(parity & 1) << PARITY_AT
            | u128::from(key.curve() == Curve::P256) << CURVE_AT;
        let mut record = [0; RECORD_BYTES];
        record[..X_BYTES].copy_from_slice(x);
        record[X_BYTES..REV_END].copy_from_slice(&tip.rev.to_u64().to_le_bytes());
        record[REV_END..].copy_from_slice(&rest.to_le_bytes()[..RECORD_BYTES - REV_END]);
        Some(record)
    }

    /// The account of [`Account::pack`]. Its identity may seem up to a minute older, and its last commit's CID is gone.
    pub(super) fn unpack(record: &Record) -> Self {
        let mut rev = [0; 8];
        rev.copy_from_slice(&record[X_BYTES..REV_END]);
        let mut rest = [0; 16];
        rest[..RECORD_BYTES - REV_END].copy_from_slice(&record[REV_END..]);
        let rest = u128::from_le_bytes(rest);
        let field = |at: u32, bits: u32| (rest >> at) as u64 & ((1 << bits) - 1);
        let curve = match field(CURVE_AT, 1) {
            0 => Curve::K256,
            _ => Curve::P256,
        };
        let mut key = [0; PublicKey::LEN];
        key[0] = curve as u8;
        key[1] = 0x02 | field(PARITY_AT, 1) as u8;
        key[2..].copy_from_slice(&record[..X_BYTES]);
        Self {
            known: true,
            counted: true,
            host: Some(HostId(field(HOST_AT, HOST_BITS) as u32)),
            repo: Some(Tip {
                rev: Tid::from_u64(u64::from_le_bytes(rev)),
                data: Mark(field(0, DATA_BITS) as u32),
                commit: None,
            }),
            key: PublicKey::from_bytes(&key).ok().and_then(parsed),
            resolved_at: Some((field(DATA_BITS, MINUTE_BITS) as i64 + FIRST_MINUTE) * 60),
            ..Self::default()
        }
    }
}

/// The number, if it has no more bits than these.
fn within(number: u64, bits: u32) -> Option<u128> {
    (number >> bits == 0).then_some(number.into())
}

fn parsed(key: PublicKey) -> Option<(PublicKey, VerifyingKey)> {
    VerifyingKey::new(&key).ok().map(|parsed| (key, parsed))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::atproto::cid::Codec;

    const NOW: i64 = 1_790_000_040 + 59;

    /// The examples of the atproto cryptography specification.
    const KEYS: [&str; 2] = [
        "zDnaembgSGUhZULN2Caob4HLJPaxBh92N7rtH21TErzqf8HQo",
        "zQ3shqwJEJyMBsBXCWyCBpUBMqxcon9oHB7mCvx4sSpMdLJwc",
    ];

    fn usual(key: &str) -> Account {
        Account {
            known: true,
            counted: true,
            host: Some(HostId((1 << HOST_BITS) - 1)),
            repo: Some(Tip::from(RepoState {
                rev: Tid::from_u64(u64::MAX),
                data: Cid::of(Codec::DagCbor, b"data"),
                commit: Cid::of(Codec::DagCbor, b"commit"),
                desynchronized: false,
            })),
            key: parsed(PublicKey::parse_multikey(key).unwrap()),
            resolved_at: Some(NOW),
            ..Account::default()
        }
    }

    #[test]
    fn a_usual_account_comes_back_as_it_was() {
        for key in KEYS {
            let account = usual(key);
            let record = account.pack().unwrap();
            let back = Account::unpack(&record);
            assert_eq!(back.host, account.host);
            assert_eq!(back.key.unwrap().0, account.key.unwrap().0);
            assert_eq!(back.resolved_at, Some(NOW - 59), "in whole minutes");
            let (tip, before) = (back.repo.unwrap(), account.repo.unwrap());
            assert_eq!((tip.rev, tip.data), (before.rev, before.data));
            assert_eq!(tip.commit, None);
            assert!(back.known && back.counted && !back.away && back.moving.is_none());
            let spare = RECORD_BYTES as u32 * 8 - RECORD_BITS;
            assert_eq!(record[RECORD_BYTES - 1] >> (8 - spare), 0);
        }
    }

    #[test]
    fn whatever_is_unusual_is_not_packed() {
        type Change = fn(&mut Account);
        let changes: [(&str, Change); 13] = [
            ("new", |account| account.known = false),
            ("not counted", |account| account.counted = false),
            ("on its way", |account| account.moving = Some(1)),
            ("away", |account| account.away = true),
            ("taken down", |account| {
                account.local = LocalStatus::TakenDown;
            }),
            ("deactivated", |account| {
                account.upstream = UpstreamStatus::Deactivated;
            }),
            ("without a repository", |account| account.repo = None),
            ("without a key", |account| account.key = None),
            ("without an identity", |account| account.resolved_at = None),
            ("resolved long ago", |account| account.resolved_at = Some(0)),
            ("resolved in the far future", |account| {
                account.resolved_at = Some(i64::MAX);
            }),
            ("without a host", |account| account.host = None),
            ("of a host with a high number", |account| {
                account.host = Some(HostId(1 << HOST_BITS));
            }),
        ];
        for (what, change) in changes {
            let mut account = usual(KEYS[0]);
            change(&mut account);
            assert!(account.pack().is_none(), "{what}");
        }
    }

    #[test]
    fn a_mark_is_equal_to_its_cid_alone() {
        let [one, other] = [&b"one"[..], b"other"].map(|bytes| Cid::of(Codec::DagCbor, bytes));
        assert!(Mark::of(&one) == one && Mark::of(&one) != other);
    }
}
