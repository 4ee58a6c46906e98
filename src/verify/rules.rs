//! The rules of sync 1.1 as pure functions: what an event says, against what is known of its account.
//!
//! No I/O, no clock, no state of their own: the pipeline brings the time and the account. Each function answers
//! with the [`Rule`] that was broken. Specification: atproto.com/specs/sync, "Firehose validation best practices".

use std::collections::HashSet;

use crate::atproto::car::{Car, CarError};
use crate::atproto::cid::{Cid, Codec};
use crate::atproto::commit::{self, SignedCommit};
use crate::atproto::frame::{Action, Commit, Kind, Op, Sync};
use crate::atproto::mst::{self, Change, InvertOp};
use crate::atproto::record_key::RecordPath;
use crate::atproto::tid::Tid;

use super::signature::SignedMessage;
use crate::hosts::Rule;

/// Largest `blocks` of a `#commit`, in bytes (lexicon `com.atproto.sync.subscribeRepos#commit`).
pub const MAX_COMMIT_BLOCKS: usize = 2_000_000;
/// Most ops of a `#commit` (same lexicon).
pub const MAX_OPS: usize = 200;
/// Largest record block, in bytes (repository specification).
pub const MAX_RECORD: usize = 1_000_000;
/// Largest `blocks` of a `#sync`, in bytes (lexicon `com.atproto.sync.subscribeRepos#sync`).
pub const MAX_SYNC_BLOCKS: usize = 10_000;
/// Blocks that a `#commit` may have for each of its ops: its record, and the tree's nodes on the way to its path and
/// to the paths beside it, which a split or a merge needs. A tree of 100 million records has some 14 levels (four
/// entries a node), so that no op needs more than three times as many; ops of one commit share the upper ones.
pub const BLOCKS_PER_OP: usize = 44;
/// Blocks that a `#commit` may have beside: the commit, and what no rule forbids and nobody needs. The reference relay
/// forwards such blocks, and hosts with small repositories send whole ones.
pub const SPARE_BLOCKS: usize = 500;
/// How far a `rev` may be in the future, in microseconds: five minutes.
pub const REV_FUTURE_TOLERANCE_US: u64 = 5 * 60 * 1_000_000;

/// Whether commits from before sync 1.1 are accepted, for one event.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Strictness {
    /// `prevData`, and `prev` on updates and deletes, are required.
    Strict,
    /// They may be missing; inversion is then skipped. Where they are there, they are checked.
    Lenient,
}

/// What a `#commit` or `#sync` that broke no rule says of its account, and the signature still to be checked.
#[derive(Clone, Debug)]
pub struct Facts {
    /// The repository's revision after the event.
    pub rev: Tid,
    /// Root of the MST after the event.
    pub data: Cid,
    /// CID of the signed commit.
    pub commit: Cid,
    /// What the account's key must have signed.
    pub signed: SignedMessage,
}

/// How an event continues the account's chain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Chain {
    /// It follows the stored state, or nothing is stored yet.
    Intact,
    /// It is consistent in itself, but `since` or `prevData` are not the stored state.
    Broken,
}

/// All that a `#commit` must be by itself, whoever sent it and whatever is known of its account: what is left is the
/// signature in [`Facts::signed`], and the order of revs. `rev` is what [`rev()`] made of the commit's.
pub fn commit(commit: &Commit<'_>, rev: Tid, strictness: Strictness) -> Result<Facts, Rule> {
    let car = car(
        commit.blocks,
        SPARE_BLOCKS + BLOCKS_PER_OP * commit.ops.len(),
    )?;
    let facts = signed_root(&car, commit.repo, rev)?;
    if facts.commit != commit.commit {
        return Err(Rule::CommitBlock);
    }
    ops(commit, &car, strictness)?;
    inversion(commit, facts.data, &car, strictness)?;
    Ok(facts)
}

/// All that a `#sync` must be by itself; see [`commit()`].
pub fn sync(sync: &Sync<'_>, rev: Tid) -> Result<Facts, Rule> {
    signed_root(&car(sync.blocks, SPARE_BLOCKS)?, sync.did, rev)
}

/// Sizes and counts, before anything is decoded further.
pub fn commit_size(commit: &Commit<'_>) -> Result<(), Rule> {
    if commit.blocks.len() > MAX_COMMIT_BLOCKS {
        return Err(Rule::CommitTooLarge);
    }
    if commit.ops.len() > MAX_OPS {
        return Err(Rule::TooManyOps);
    }
    Ok(())
}

/// The size of a `#identity` or `#account` frame, unknown fields included: they say little.
pub fn event_size(kind: Kind, frame_bytes: usize, most: usize) -> Result<(), Rule> {
    if matches!(kind, Kind::Identity | Kind::Account) && frame_bytes > most {
        return Err(Rule::EventTooLarge);
    }
    Ok(())
}

/// The size of a `#sync`.
pub fn sync_size(sync: &Sync<'_>) -> Result<(), Rule> {
    if sync.blocks.len() > MAX_SYNC_BLOCKS {
        return Err(Rule::SyncTooLarge);
    }
    Ok(())
}

/// The syntax of `rev`, and that it is not in the future. `now_us` is Unix time in microseconds.
pub fn rev(rev: &str, now_us: u64) -> Result<Tid, Rule> {
    let tid = Tid::parse(rev).map_err(|_| Rule::RevSyntax)?;
    if tid.micros() > now_us.saturating_add(REV_FUTURE_TOLERANCE_US) {
        return Err(Rule::RevFuture);
    }
    Ok(tid)
}

/// A `#commit` must be above the account's last rev.
pub fn rev_order(rev: Tid, last: Option<Tid>) -> Result<(), Rule> {
    match last {
        Some(last) if rev <= last => Err(Rule::RevOrder),
        _ => Ok(()),
    }
}

/// A `#sync` may repeat the stored state, but neither go back nor contradict it.
pub fn sync_order(facts: &Facts, last: Option<(Tid, Cid)>) -> Result<(), Rule> {
    match last {
        Some((rev, _)) if facts.rev < rev => Err(Rule::RevOrder),
        Some((rev, commit)) if facts.rev == rev && facts.commit != commit => {
            Err(Rule::SyncConflict)
        }
        _ => Ok(()),
    }
}

/// Every op: its path, its record block, its `prev`. Two ops on one path would leave it to their order what they say.
fn ops(commit: &Commit<'_>, car: &Car<'_>, strictness: Strictness) -> Result<(), Rule> {
    let mut paths = HashSet::new();
    for op in &commit.ops {
        RecordPath::parse(op.path).map_err(|_| Rule::OpPath)?;
        // Nearly every commit has one op.
        if commit.ops.len() > 1 && !paths.insert(op.path) {
            return Err(Rule::OpDuplicate);
        }
        op.cid.map_or(Ok(()), in_dag_cbor)?;
        if op.action != Action::Delete {
            let record = op
                .cid
                .and_then(|cid| car.blocks().get(&cid))
                .ok_or(Rule::OpRecord)?;
            if record.len() > MAX_RECORD {
                return Err(Rule::RecordTooLarge);
            }
        } else if op.cid.is_some() {
            return Err(Rule::OpRecord);
        }
        if op.action != Action::Create && op.prev.is_none() && strictness == Strictness::Strict {
            return Err(Rule::OpPrev);
        }
    }
    Ok(())
}

/// Commits and records are dag-cbor (repository specification): a CID that says otherwise names the same bytes by
/// another name. Links within the tree are held to that where it is read. `prev` and `prevData` are not asked, so that what got in elsewhere can be deleted.
fn in_dag_cbor(cid: Cid) -> Result<(), Rule> {
    match cid.codec() {
        Codec::DagCbor => Ok(()),
        Codec::Raw => Err(Rule::CidCodec),
    }
}

/// The CAR: version 1, no more blocks than may be, and every block hashes to its CID.
fn car(blocks: &[u8], most: usize) -> Result<Car<'_>, Rule> {
    let car = Car::parse_within(blocks, most).map_err(|error| match error {
        CarError::TooManyBlocks { .. } => Rule::TooManyBlocks,
        _ => Rule::Car,
    })?;
    car.verify_hashes().map_err(|_| Rule::BlockHash)?;
    Ok(car)
}

/// The signed commit that is a CAR's first root. Its DID must be written as in the envelope, letter case included:
/// consumers take the envelope's word.
fn signed_root(car: &Car<'_>, did: &str, rev: Tid) -> Result<Facts, Rule> {
    let root = *car.roots().first().ok_or(Rule::CommitBlock)?;
    let block = car.blocks().get(&root).ok_or(Rule::CommitBlock)?;
    in_dag_cbor(root)?;
    let signed = SignedCommit::parse(block).map_err(|_| Rule::CommitObject)?;
    if signed.version != commit::VERSION {
        return Err(Rule::CommitObject);
    }
    if signed.did != did || Tid::parse(signed.rev) != Ok(rev) {
        return Err(Rule::CommitEnvelope);
    }
    Ok(Facts {
        rev,
        data: signed.data,
        commit: root,
        signed: SignedMessage {
            message: signed.unsigned_bytes().into(),
            digest: signed.unsigned_digest(),
            signature: signed.sig.try_into().map_err(|_| Rule::CommitObject)?,
        },
    })
}

/// Inversion: undoing the ops on the partial tree gives exactly `prevData`; for a first commit (`since` null, no
/// `prevData`) the empty tree.
fn inversion(
    commit: &Commit<'_>,
    data: Cid,
    car: &Car<'_>,
    strictness: Strictness,
) -> Result<(), Rule> {
    let expected = match (commit.prev_data, commit.since) {
        (Some(prev_data), _) => prev_data,
        (None, None) if strictness == Strictness::Strict => mst::empty_root(),
        (None, _) if strictness == Strictness::Lenient => return Ok(()),
        (None, _) => return Err(Rule::PrevData),
    };
    let Some(ops) = commit
        .ops
        .iter()
        .map(invertible)
        .collect::<Option<Vec<_>>>()
    else {
        // Only a lenient host gets here: `ops` has asked the others for `prev`.
        return Ok(());
    };
    match mst::invert(&ops, data, |cid| car.blocks().get(cid)) {
        Ok(root) if root == expected => Ok(()),
        _ => Err(Rule::Inversion),
    }
}

/// The op as inversion wants it; `None` if it lacks `prev`, as before sync 1.1.
pub fn invertible<'a>(op: &Op<'a>) -> Option<InvertOp<'a>> {
    let change = match op.action {
        Action::Create => Change::Create { cid: op.cid? },
        Action::Update => Change::Update {
            cid: op.cid?,
            prev: op.prev?,
        },
        Action::Delete => Change::Delete { prev: op.prev? },
    };
    Some(InvertOp {
        path: op.path,
        change,
    })
}

/// Whether the commit speaks sync 1.1: a host that once did can be held to it (`validation = "ratchet"`).
pub fn speaks_sync11(commit: &Commit<'_>) -> bool {
    commit.prev_data.is_some()
}

/// How `since` and `prevData` fit the stored state (`None`: nothing is known of the account's repository yet).
/// The stored root is a CID, or what is kept of one.
pub fn chain(commit: &Commit<'_>, stored: Option<(Tid, impl PartialEq<Cid>)>) -> Chain {
    let Some((rev, data)) = stored else {
        return Chain::Intact;
    };
    let since_fits = commit
        .since
        .is_some_and(|since| Tid::parse(since) == Ok(rev));
    let data_fits = commit.prev_data.is_none_or(|prev_data| data == prev_data);
    if since_fits && data_fits {
        Chain::Intact
    } else {
        Chain::Broken
    }
}
