//! Trees under made-up histories, against a plain map: what a commit's ops make of the tree, the blocks
//! it carries, and that undoing them on those blocks alone gives the tree before, or nothing.

use std::collections::BTreeMap;

use atproto_relay::atproto::cid::{Cid, Codec};
use atproto_relay::atproto::mst::{self, Change, Diff, InvertOp, Tree};

/// Records that a history knows.
const PATHS: u8 = 64;
/// Ops of one commit; an op is two bytes.
const MOST_OPS: usize = 12;
/// Commits of one history: more of them take long and show nothing new.
const MOST_COMMITS: usize = 8;

type Records = BTreeMap<String, Cid>;

/// Checks the history that the bytes tell: for each record whether it is there at first, then commits
/// of a length and ops.
pub fn check(bytes: &[u8]) {
    let (first, mut rest) = bytes.split_at(bytes.len().min(usize::from(PATHS / 8)));
    let mut records = Records::new();
    for path in 0..PATHS {
        let byte = first.get(usize::from(path / 8)).copied().unwrap_or(0);
        if byte >> (path % 8) & 1 == 1 {
            records.insert(name(path), record(0));
        }
    }
    let mut tree = grown(&records);
    for _ in 0..MOST_COMMITS {
        let Some((count, ops)) = rest.split_first() else {
            return;
        };
        let length = (usize::from(*count) % MOST_OPS * 2).min(ops.len() & !1);
        let (ops, behind) = ops.split_at(length);
        commit(&mut tree, &mut records, ops.as_chunks().0);
        rest = behind;
    }
}

fn name(path: u8) -> String {
    // Texts of several lengths and common beginnings; their hashes give heights of 0 to 3.
    format!(
        "app.bsky.{}/{path}",
        ["feed.post", "like", "graph.follow"][usize::from(path % 3)]
    )
}

fn record(version: u8) -> Cid {
    Cid::from_digest(Codec::DagCbor, [version; 32])
}

fn grown(records: &Records) -> Tree {
    let records = records.iter().map(|(path, cid)| (path, *cid));
    Tree::from_records(records).expect("paths of one map are different")
}

/// Applies one commit to the tree and to the map.
fn commit(tree: &mut Tree, records: &mut Records, ops: &[[u8; 2]]) {
    let mut after = records.clone();
    let mut possible = true;
    let mut told = Vec::new();
    for [path, what] in ops {
        let path = name(path % PATHS);
        let cid = record(what >> 2);
        let prev = after.get(&path).copied();
        // Now and then an op speaks of another version than the one there is.
        let claimed = if what & 0x80 == 0 {
            prev
        } else {
            Some(record(what & 3))
        };
        let change = match (what & 3, claimed) {
            (0, Some(prev)) => Change::Delete { prev },
            (1 | 2, Some(prev)) => Change::Update { cid, prev },
            _ => Change::Create { cid },
        };
        possible &= match change {
            Change::Create { .. } => prev.is_none(),
            Change::Update { prev: said, .. } | Change::Delete { prev: said } => prev == Some(said),
        };
        match change {
            Change::Create { cid } | Change::Update { cid, .. } => after.insert(path.clone(), cid),
            Change::Delete { .. } => after.remove(&path),
        };
        told.push((path, change));
    }
    let ops: Vec<_> = told
        .iter()
        .map(|(path, change)| InvertOp {
            path,
            change: *change,
        })
        .collect();
    let before = tree.root_cid();
    let Ok(diff) = tree.apply(&ops) else {
        assert!(!possible, "ops that fit were refused: {ops:?}");
        assert_eq!(tree.root_cid(), before, "a refusal changed the tree");
        return;
    };
    assert!(possible, "ops that do not fit were applied: {ops:?}");
    assert_eq!(diff.before, before);
    assert_eq!(
        diff.after,
        grown(&after).root_cid(),
        "another tree than its records make"
    );
    undo(&ops, &diff);
    *records = after;
}

fn undo(ops: &[InvertOp<'_>], diff: &Diff) {
    let inverted = |ops: &[InvertOp<'_>], without: Option<usize>| {
        mst::invert(ops, diff.after, |wanted| {
            let mut blocks = diff.blocks.iter().enumerate();
            let found = blocks.find(|(at, (cid, _))| Some(*at) != without && cid == wanted);
            found.map(|(_, (_, block))| &block[..])
        })
    };
    assert_eq!(inverted(ops, None), Ok(diff.before));
    for (at, (missing, _)) in diff.blocks.iter().enumerate() {
        // A subtree that is left over and not at hand counts as the tree, though below it there may be
        // another: the caller, who compares roots, refuses it all the same.
        if let Ok(root) = inverted(ops, Some(at)) {
            let explained = root == diff.before || root == *missing;
            assert!(explained, "another root for want of block {missing}");
        }
    }
    for at in 0..ops.len() {
        let mut lying = ops.to_vec();
        let other = record(0xff);
        match &mut lying[at].change {
            Change::Create { cid } => *cid = other,
            Change::Update { prev, .. } | Change::Delete { prev } => *prev = other,
        }
        assert_ne!(
            inverted(&lying, None),
            Ok(diff.before),
            "a lie about op {at} passes"
        );
        lying.remove(at);
        let silent = inverted(&lying, None);
        assert!(
            silent != Ok(diff.before) || is_idle(&ops[at]),
            "op {at} is not needed"
        );
    }
}

/// An update that changes nothing.
fn is_idle(op: &InvertOp<'_>) -> bool {
    matches!(op.change, Change::Update { cid, prev } if cid == prev)
}
