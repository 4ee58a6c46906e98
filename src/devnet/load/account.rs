//! A light-weight account: a key, a tree, and frames signed ahead. It keeps no record blocks and
//! answers no requests; several hundred thousand of them fit where a few full PDS accounts would.

use bytes::Bytes;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use crate::atproto::car;
use crate::atproto::cid::{Cid, Codec};
use crate::atproto::commit;
use crate::atproto::did::Did;
use crate::atproto::mst::{Change, InvertOp, Tree};
use crate::atproto::tid::Tid;
use crate::devnet::faults::{self, Fault};
use crate::devnet::keys::{Curve, SigningKey};
use crate::devnet::pds::frames::{self, Stamp};
use crate::devnet::pds::{AccountStatus, Action, Commit, Op, SyncState};
use crate::devnet::timestamp::Timestamp;

use super::record::{Records, SHORTEST_RECORD};

/// What an account is asked to emit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Planned {
    /// The repository as it is: the first event of an account that existed before the run.
    Introduction,
    /// A commit with so many ops.
    Commit(u8),
    Identity,
    Account,
    Sync,
}

/// A frame with sequence number 0, and its faulty sisters.
#[derive(Clone, Debug)]
pub(super) struct Made {
    pub frame: Bytes,
    pub faulty: Option<(Fault, Bytes)>,
}

/// What does not change while an account emits.
#[derive(Clone, Debug)]
pub(super) struct Profile {
    pub did: Did,
    pub handle: String,
    pub key: SigningKey,
    /// Number of the host it lives on.
    pub host: u32,
}

impl Profile {
    /// Account number `index` of a run; the same seed and number give the same account.
    pub fn new(seed: u64, index: u32, host: u32, p256: bool) -> Profile {
        let mut rng =
            StdRng::seed_from_u64(seed ^ u64::from(index).wrapping_mul(0x9e37_79b9_7f4a_7c15));
        let mut id = [0; 15];
        rng.fill(&mut id[..]);
        // A did:plc is 24 characters of base32: 15 bytes.
        let id = data_encoding::BASE32_NOPAD.encode(&id).to_lowercase();
        let did =
            Did::parse(&format!("did:plc:{id}")).expect("24 characters of base32 are a did:plc");
        let curve = if p256 { Curve::P256 } else { Curve::K256 };
        Profile {
            did,
            handle: format!("user{index}.load.test"),
            key: SigningKey::generate(curve, &mut rng),
            host,
        }
    }
}

/// An account that emits its events one after the other.
pub(super) struct Emitter<'a> {
    profile: &'a Profile,
    records: &'a Records,
    rng: StdRng,
    tree: Tree,
    /// Paths of records that may be updated or deleted.
    paths: Vec<(String, Cid)>,
    rev: Tid,
    head: Vec<u8>,
    data: Cid,
    emitted: i64,
}

impl<'a> Emitter<'a> {
    /// An account whose repository is the template; its first rev is at `started`.
    pub fn new(profile: &'a Profile, records: &'a Records, seed: u64, started: u64) -> Emitter<'a> {
        let rng = StdRng::seed_from_u64(seed ^ profile.did.hash64());
        let (mut tree, paths) = records.template();
        let rev = Tid::from_micros(started, clock_id(profile.host));
        let data = tree.root_cid();
        let head = signed(&profile.did, rev, &data, |unsigned| {
            profile.key.sign(unsigned)
        });
        Emitter {
            profile,
            records,
            rng,
            tree,
            paths,
            rev,
            head,
            data,
            emitted: 0,
        }
    }

    /// The next event, at `micros` since 1970, and what a fault makes of it.
    pub fn emit(&mut self, planned: Planned, micros: u64, fault: Option<Fault>) -> Made {
        self.emitted += 1;
        // The number keeps two events of one account from being the same bytes.
        let time = Timestamp::from_millis((micros / 1_000) as i64 + self.emitted);
        let stamp = Stamp { seq: 0, time };
        let Profile { did, handle, .. } = self.profile;
        let frame = match planned {
            Planned::Commit(ops) => return self.commit(stamp, ops, micros, fault),
            Planned::Introduction | Planned::Sync => frames::sync(stamp, did, &self.sync_state()),
            Planned::Identity => frames::identity(stamp, did, Some(handle)),
            Planned::Account => frames::account(stamp, did, AccountStatus::Active),
        };
        Made {
            frame,
            faulty: None,
        }
    }

    fn sync_state(&self) -> SyncState {
        let cid = Cid::of(Codec::DagCbor, &self.head);
        SyncState {
            rev: self.rev,
            cid,
            car: car::write(&[cid], [(cid, &self.head[..])]).into(),
        }
    }

    fn commit(&mut self, stamp: Stamp, ops: u8, micros: u64, fault: Option<Fault>) -> Made {
        let rev = Tid::from_micros(micros, clock_id(self.profile.host));
        let intents = self.intents(usize::from(ops), micros);
        let bytes = self.record_bytes(stamp, rev, &intents);
        let (ops, records) = self.ops(&intents, bytes);
        let written = ops.iter().filter_map(|op| Some((op.path.clone(), op.cid?)));
        self.paths.extend(written);
        let mut tree = std::mem::take(&mut self.tree);
        let (commit, head) = self.draft(&mut tree, rev, ops, &records, |unsigned| {
            self.profile.key.sign(unsigned)
        });
        let did = &self.profile.did;
        let spoilt = |fault| {
            Some((
                fault,
                faults::spoil(fault, did, &commit, self.records.stranger())?,
            ))
        };
        let faulty = fault
            .and_then(spoilt)
            .map(|(fault, commit)| (fault, frames::commit(stamp, did, &commit)));
        let frame = frames::commit(stamp, did, &commit);
        (self.tree, self.rev, self.head, self.data) = (tree, rev, head, commit.data);
        Made { frame, faulty }
    }

    /// What the ops of a commit do; a path is used once in it.
    fn intents(&mut self, count: usize, micros: u64) -> Vec<Intent> {
        let mut intents = Vec::with_capacity(count);
        for n in 0..count {
            let action = self.records.action(&mut self.rng);
            let known = action != Action::Create && !self.paths.is_empty();
            intents.push(if known {
                let at = self.rng.random_range(0..self.paths.len());
                let (path, cid) = self.paths.swap_remove(at);
                Intent {
                    action,
                    path,
                    prev: Some(cid),
                }
            } else {
                let time = Tid::from_micros(micros + n as u64, clock_id(self.profile.host));
                Intent {
                    action: Action::Create,
                    path: Records::path(time),
                    prev: None,
                }
            });
        }
        intents
    }

    /// Bytes for each record of a commit, so that its frame has a size of the network's
    /// distribution: what the frame takes beside them is seen from a copy with the shortest ones.
    fn record_bytes(&mut self, stamp: Stamp, rev: Tid, intents: &[Intent]) -> usize {
        let (ops, records) = self.ops(intents, SHORTEST_RECORD);
        let (bare, _) = self.draft(&mut self.tree.clone(), rev, ops, &records, |_| [0; 64]);
        let bare = frames::commit(stamp, &self.profile.did, &bare).len();
        let frame = self.records.frame_bytes(&mut self.rng);
        SHORTEST_RECORD + frame.saturating_sub(bare) / records.len().max(1)
    }

    fn ops(&mut self, intents: &[Intent], bytes: usize) -> (Vec<Op>, Vec<(Cid, Vec<u8>)>) {
        let mut records = Vec::with_capacity(intents.len());
        let mut op = |intent: &Intent| {
            let record = (intent.action != Action::Delete)
                .then(|| self.records.record(&mut self.rng, bytes));
            let cid = record.as_ref().map(|(cid, _)| *cid);
            records.extend(record);
            let Intent { action, path, prev } = intent;
            Op {
                action: *action,
                path: path.clone(),
                cid,
                prev: *prev,
            }
        };
        let ops = intents.iter().map(&mut op).collect();
        (ops, records)
    }

    /// The commit that applies `ops` to `tree`, and its signed block.
    fn draft(
        &self,
        tree: &mut Tree,
        rev: Tid,
        ops: Vec<Op>,
        records: &[(Cid, Vec<u8>)],
        sign: impl Fn(&[u8]) -> [u8; 64],
    ) -> (Commit, Vec<u8>) {
        let inverts: Vec<InvertOp<'_>> = ops.iter().map(invert_op).collect();
        let diff = tree
            .apply(&inverts)
            .expect("the ops were made for this tree");
        let head = signed(&self.profile.did, rev, &diff.after, sign);
        let cid = Cid::of(Codec::DagCbor, &head);
        let blocks = diff
            .blocks
            .iter()
            .chain(records)
            .map(|(cid, block)| (*cid, &block[..]));
        let car = car::write(&[cid], [(cid, &head[..])].into_iter().chain(blocks)).into();
        let (since, prev_data) = (Some(self.rev), Some(self.data));
        (
            Commit {
                cid,
                rev,
                since,
                data: diff.after,
                prev_data,
                ops,
                car,
            },
            head,
        )
    }
}

/// What an op will do, before its record is made.
struct Intent {
    action: Action,
    path: String,
    /// The record that is updated or deleted.
    prev: Option<Cid>,
}

fn signed(did: &Did, rev: Tid, data: &Cid, sign: impl Fn(&[u8]) -> [u8; 64]) -> Vec<u8> {
    let (did, rev) = (did.as_str(), rev.to_string());
    let unsigned = commit::encode_unsigned(did, &rev, data);
    commit::encode_signed(did, &rev, data, &sign(&unsigned))
}

fn invert_op(op: &Op) -> InvertOp<'_> {
    let change = match (op.cid, op.prev) {
        (Some(cid), None) => Change::Create { cid },
        (Some(cid), Some(prev)) => Change::Update { cid, prev },
        (None, Some(prev)) => Change::Delete { prev },
        (None, None) => unreachable!("every op has a record before or after it"),
    };
    InvertOp {
        path: &op.path,
        change,
    }
}

/// The clock id of a host's TIDs.
fn clock_id(host: u32) -> u16 {
    (host % 1_024) as u16
}
