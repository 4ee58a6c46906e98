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

use super::record::Records;

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
    /// Bytes of a frame that are not its records, from the last commit.
    overhead: usize,
    emitted: i64,
}

impl<'a> Emitter<'a> {
    /// An account whose repository is the template; its first rev is at `started`.
    pub fn new(profile: &'a Profile, records: &'a Records, seed: u64, started: u64) -> Emitter<'a> {
        let rng = StdRng::seed_from_u64(seed ^ profile.did.hash64());
        let (mut tree, paths) = records.template();
        let rev = Tid::from_micros(started, clock_id(profile.host));
        let data = tree.root_cid();
        let head = sign(&profile.key, &profile.did, rev, &data);
        Emitter {
            profile,
            records,
            rng,
            tree,
            paths,
            rev,
            head,
            data,
            overhead: super::record::USUAL_OVERHEAD,
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
        let (ops, records) = self.ops(usize::from(ops), micros);
        let inverts: Vec<InvertOp<'_>> = ops.iter().map(invert_op).collect();
        let diff = self
            .tree
            .apply(&inverts)
            .expect("the ops were made for this tree");
        let head = sign(&self.profile.key, &self.profile.did, rev, &diff.after);
        let cid = Cid::of(Codec::DagCbor, &head);
        let blocks = diff
            .blocks
            .iter()
            .chain(&records)
            .map(|(cid, block)| (*cid, &block[..]));
        let car = car::write(&[cid], [(cid, &head[..])].into_iter().chain(blocks)).into();
        let commit = Commit {
            cid,
            rev,
            since: Some(self.rev),
            data: diff.after,
            prev_data: Some(self.data),
            ops,
            car,
        };
        let did = &self.profile.did;
        let frame = frames::commit(stamp, did, &commit);
        self.overhead = frame.len() - records.iter().map(|(_, block)| block.len()).sum::<usize>();
        let spoilt = |fault| {
            Some((
                fault,
                faults::spoil(fault, did, &commit, self.records.stranger())?,
            ))
        };
        let faulty = fault
            .and_then(spoilt)
            .map(|(fault, commit)| (fault, frames::commit(stamp, did, &commit)));
        (self.rev, self.head, self.data) = (rev, head, diff.after);
        Made { frame, faulty }
    }

    fn ops(&mut self, count: usize, micros: u64) -> (Vec<Op>, Vec<(Cid, Vec<u8>)>) {
        let mut ops = Vec::with_capacity(count);
        let mut records = Vec::new();
        let bytes = self
            .records
            .record_bytes(&mut self.rng, self.overhead, count);
        let mut taken = Vec::new();
        for n in 0..count {
            let action = self.records.action(&mut self.rng);
            let known = if action == Action::Create || self.paths.is_empty() {
                None
            } else {
                Some(self.rng.random_range(0..self.paths.len()))
            };
            let known = known.map(|at| self.paths.swap_remove(at));
            let record = match (action, &known) {
                (Action::Delete, Some(_)) => None,
                _ => Some(self.records.record(&mut self.rng, bytes)),
            };
            let (path, prev) = match known {
                Some((path, cid)) => (path, Some(cid)),
                None => (
                    Records::path(Tid::from_micros(
                        micros + n as u64,
                        clock_id(self.profile.host),
                    )),
                    None,
                ),
            };
            let cid = record.as_ref().map(|(cid, _)| *cid);
            // A path is used once in a commit; what is written now may be changed by a later one.
            taken.extend(cid.map(|cid| (path.clone(), cid)));
            let action = match (prev, cid) {
                (None, _) => Action::Create,
                (Some(_), Some(_)) => Action::Update,
                (Some(_), None) => Action::Delete,
            };
            ops.push(Op {
                action,
                path,
                cid,
                prev,
            });
            records.extend(record);
        }
        self.paths.extend(taken);
        (ops, records)
    }
}

fn sign(key: &SigningKey, did: &Did, rev: Tid, data: &Cid) -> Vec<u8> {
    let (did, rev) = (did.as_str(), rev.to_string());
    let unsigned = commit::encode_unsigned(did, &rev, data);
    commit::encode_signed(did, &rev, data, &key.sign(&unsigned))
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
