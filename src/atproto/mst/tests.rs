//! Properties on random repositories, checked against a plain reference that builds the tree from its
//! definition, and tables of malformed nodes.

use std::collections::{BTreeMap, HashMap};

use proptest::prelude::*;
use proptest::sample::Index;

use super::*;
use crate::atproto::cid::Codec;

type Records = BTreeMap<String, Cid>;
type BlockMap = HashMap<Cid, Vec<u8>>;

fn record(version: u32) -> Cid {
    Cid::of(Codec::DagCbor, &version.to_be_bytes())
}

fn put_head(out: &mut Vec<u8>, major: u8, value: usize) {
    match value {
        0..24 => out.push(major << 5 | value as u8),
        24..256 => out.extend([major << 5 | 24, value as u8]),
        _ => out.extend([major << 5 | 25, (value >> 8) as u8, value as u8]),
    }
}

fn put_link(out: &mut Vec<u8>, link: Option<Cid>) {
    match link {
        None => out.push(0xf6),
        Some(cid) => {
            out.extend([0xd8, 42, 0x58, 37, 0]);
            out.extend(cid.to_bytes());
        }
    }
}

/// A node's block, from its keys and links as they are, valid or not.
fn node_block(left: Option<Cid>, entries: &[(usize, &[u8], Cid, Option<Cid>)]) -> Vec<u8> {
    let mut out = vec![0xa2, 0x61, b'e'];
    put_head(&mut out, 4, entries.len());
    for &(prefix, suffix, value, right) in entries {
        out.extend([0xa4, 0x61, b'k']);
        put_head(&mut out, 2, suffix.len());
        out.extend(suffix);
        out.extend([0x61, b'p']);
        put_head(&mut out, 0, prefix);
        out.extend([0x61, b't']);
        put_link(&mut out, right);
        out.extend([0x61, b'v']);
        put_link(&mut out, Some(value));
    }
    out.extend([0x61, b'l']);
    put_link(&mut out, left);
    out
}

fn add_block(blocks: &mut BlockMap, block: Vec<u8>) -> Cid {
    let cid = Cid::of(Codec::DagCbor, &block);
    blocks.insert(cid, block);
    cid
}

/// The tree by its definition: split the sorted records at the keys of the height, go down one.
fn reference(
    records: &[(&str, Cid)],
    height_here: u8,
    height: &dyn Fn(&[u8]) -> u8,
    blocks: &mut BlockMap,
) -> Option<Cid> {
    if records.is_empty() {
        return None;
    }
    let mut parts = records.split(|(key, _)| height(key.as_bytes()) == height_here);
    let mut below = |part: Option<&[(&str, Cid)]>| {
        let part = part.unwrap_or_default();
        if height_here == 0 {
            None
        } else {
            reference(part, height_here - 1, height, blocks)
        }
    };
    let left = below(parts.next());
    let mut previous = "";
    let mut entries = Vec::new();
    for &(key, cid) in records
        .iter()
        .filter(|(key, _)| height(key.as_bytes()) == height_here)
    {
        let shared = key
            .bytes()
            .zip(previous.bytes())
            .take_while(|(a, b)| a == b)
            .count();
        entries.push((shared, &key.as_bytes()[shared..], cid, below(parts.next())));
        previous = key;
    }
    let block = node_block(left, &entries);
    Some(add_block(blocks, block))
}

fn reference_tree(records: &Records) -> (Cid, BlockMap) {
    tree_with_heights(records, &height)
}

fn tree_with_heights(records: &Records, height: &dyn Fn(&[u8]) -> u8) -> (Cid, BlockMap) {
    let records: Vec<_> = records
        .iter()
        .map(|(key, &cid)| (key.as_str(), cid))
        .collect();
    let top = records
        .iter()
        .map(|(key, _)| height(key.as_bytes()))
        .max()
        .unwrap_or(0);
    let mut blocks = BlockMap::new();
    let root = reference(&records, top, height, &mut blocks)
        .unwrap_or_else(|| add_block(&mut blocks, node_block(None, &[])));
    (root, blocks)
}

fn tree_of(records: &Records) -> Tree {
    Tree::from_records(records.iter().map(|(key, &cid)| (key.as_bytes(), cid))).unwrap()
}

/// A draw that becomes an op once the state of the repository is known.
#[derive(Clone, Debug)]
struct Draw {
    kind: u8,
    which: Index,
    key: u16,
    version: u32,
}

fn draws(most: usize) -> impl Strategy<Value = Vec<Draw>> {
    let draw = (0..3_u8, any::<Index>(), any::<u16>(), any::<u32>()).prop_map(
        |(kind, which, key, version)| Draw {
            kind,
            which,
            key,
            version,
        },
    );
    proptest::collection::vec(draw, 0..most)
}

fn path(number: u16) -> String {
    let collection = [
        "app.bsky.feed.like",
        "app.bsky.feed.post",
        "com.example.long",
    ];
    let collection = collection[usize::from(number) % 3];
    format!(
        "{collection}/{:x}",
        u32::from(number).wrapping_mul(0x9e37_79b9)
    )
}

/// Ops that fit the records, applied to them. Each path comes once at most.
fn batch(records: &mut Records, draws: &[Draw]) -> Vec<(String, Change)> {
    let mut ops: Vec<(String, Change)> = Vec::new();
    for draw in draws {
        let existing = || {
            draw.which
                .get(&records.keys().collect::<Vec<_>>())
                .to_string()
        };
        let key = match draw.kind {
            1 | 2 if !records.is_empty() => existing(),
            _ => path(draw.key),
        };
        if ops.iter().any(|(taken, _)| *taken == key) {
            continue;
        }
        let cid = record(draw.version);
        let change = match (records.get(&key).copied(), draw.kind) {
            (Some(prev), 2) => {
                records.remove(&key);
                Change::Delete { prev }
            }
            (Some(prev), _) => {
                records.insert(key.clone(), cid);
                Change::Update { cid, prev }
            }
            (None, _) => {
                records.insert(key.clone(), cid);
                Change::Create { cid }
            }
        };
        ops.push((key, change));
    }
    ops
}

fn borrowed(ops: &[(String, Change)]) -> Vec<InvertOp<'_>> {
    ops.iter()
        .map(|(path, change)| InvertOp {
            path,
            change: *change,
        })
        .collect()
}

fn lookup<'a>(blocks: &'a BlockMap) -> impl Fn(&Cid) -> Option<&'a [u8]> {
    |cid| blocks.get(cid).map(Vec::as_slice)
}

fn start_records() -> impl Strategy<Value = Records> {
    proptest::collection::btree_map(
        any::<u16>().prop_map(path),
        any::<u32>().prop_map(record),
        0..200,
    )
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(96))]

    #[test]
    fn a_batch_inverts_from_the_blocks_it_carries(
        start in start_records(),
        draws in draws(24),
        shuffle in any::<u64>(),
    ) {
        let mut after = start.clone();
        let ops = batch(&mut after, &draws);
        let mut tree = tree_of(&start);
        let diff = tree.apply(&borrowed(&ops)).unwrap();
        let (root_before, blocks_before) = reference_tree(&start);
        let (root_after, blocks_after) = reference_tree(&after);
        prop_assert_eq!(diff.before, root_before);
        prop_assert_eq!(diff.after, root_after);

        let carried: BlockMap = diff.blocks.iter().cloned().collect();
        for (cid, block) in &carried {
            prop_assert_eq!(blocks_after.get(cid), Some(block));
        }
        for cid in blocks_after.keys().filter(|cid| !blocks_before.contains_key(cid)) {
            prop_assert!(carried.contains_key(cid), "new node {} is not carried", cid);
        }
        prop_assert_eq!(invert(&borrowed(&ops), diff.after, lookup(&carried)), Ok(diff.before));

        // On the whole tree every order of undoing gives the same root.
        let mut shuffled = ops.clone();
        fastrand::Rng::with_seed(shuffle).shuffle(&mut shuffled);
        prop_assert_eq!(invert(&borrowed(&shuffled), root_after, lookup(&blocks_after)), Ok(root_before));
    }

    #[test]
    fn every_single_op_inverts_from_its_blocks(start in start_records(), draws in draws(40)) {
        let mut records = start.clone();
        let mut tree = tree_of(&start);
        for draw in &draws {
            let ops = batch(&mut records, std::slice::from_ref(draw));
            let diff = tree.apply(&borrowed(&ops)).unwrap();
            let carried: BlockMap = diff.blocks.into_iter().collect();
            prop_assert_eq!(invert(&borrowed(&ops), diff.after, lookup(&carried)), Ok(diff.before));
        }
        prop_assert_eq!(tree.root_cid(), reference_tree(&records).0);
    }

    #[test]
    fn a_lie_about_the_ops_never_gives_the_old_root(
        start in start_records(),
        draws in draws(12),
        which in any::<Index>(),
        lie in 0..4_u8,
    ) {
        let mut after = start.clone();
        let ops = batch(&mut after, &draws);
        prop_assume!(!ops.is_empty());
        let diff = tree_of(&start).apply(&borrowed(&ops)).unwrap();
        let mut told = ops.clone();
        let at = which.index(told.len());
        match lie {
            0 => drop(told.remove(at)),
            1 => told.push(("com.example.never/made".into(), Change::Create { cid: record(0) })),
            2 => told.push(("com.example.never/was".into(), Change::Delete { prev: record(0) })),
            _ => match &mut told[at].1 {
                Change::Create { cid } | Change::Update { cid, .. } => *cid = Cid::of(Codec::Raw, b"other"),
                Change::Delete { prev } => *prev = Cid::of(Codec::Raw, b"other"),
            },
        }
        let unchanged = matches!(ops[at].1, Change::Update { cid, prev } if cid == prev);
        prop_assume!(!(lie == 0 && unchanged));
        let carried: BlockMap = diff.blocks.into_iter().collect();
        let root = invert(&borrowed(&told), diff.after, lookup(&carried));
        prop_assert_ne!(root, Ok(diff.before));
    }

    #[test]
    fn a_record_at_a_wrong_height_never_gives_the_old_root(
        start in start_records(),
        draws in draws(12),
        which in any::<Index>(),
        wrong in 0..8_u8,
        new_one in any::<bool>(),
    ) {
        let mut after = start.clone();
        let ops = batch(&mut after, &draws);
        prop_assume!(!after.is_empty());
        let new: Vec<_> = ops.iter().map(|(key, _)| key).filter(|key| after.contains_key(*key)).collect();
        let all: Vec<_> = after.keys().collect();
        let misplaced = which.get(if new_one && !new.is_empty() { &new } else { &all }).as_bytes();
        let heights = |key: &[u8]| if key == misplaced { wrong } else { height(key) };
        let (before, _) = reference_tree(&start);
        let (root, blocks) = tree_with_heights(&after, &heights);
        let outcome = invert(&borrowed(&ops), root, lookup(&blocks));
        prop_assert_eq!(outcome == Ok(before), root == reference_tree(&after).0);
    }

    #[test]
    fn changing_a_tree_in_any_order_gives_the_tree_of_its_records(
        start in start_records(),
        removed in proptest::collection::vec(any::<Index>(), 0..150),
        seed in any::<u64>(),
    ) {
        let mut records = start.clone();
        let mut shuffled: Vec<_> = start.iter().collect();
        fastrand::Rng::with_seed(seed).shuffle(&mut shuffled);
        let mut tree = Tree::from_records(shuffled.iter().map(|(key, cid)| (key, **cid))).unwrap();
        prop_assert_eq!(tree.root_cid(), reference_tree(&records).0);
        for index in removed {
            if records.is_empty() {
                break;
            }
            let key = index.get(&records.keys().cloned().collect::<Vec<_>>()).clone();
            prop_assert_eq!(tree.get(key.as_bytes()), Ok(records.get(&key).copied()));
            let removed = records.remove(&key).unwrap();
            prop_assert_eq!(tree.delete(key.as_bytes()), Ok(removed));
            prop_assert_eq!(tree.get(key.as_bytes()), Ok(None));
            prop_assert_eq!(tree.delete(key.as_bytes()), Err(MstError::Absent(key)));
        }
        prop_assert_eq!(tree.root_cid(), reference_tree(&records).0);
        let walked: Records =
            tree.records().map(|(key, cid)| (String::from_utf8(key.to_vec()).unwrap(), cid)).collect();
        prop_assert_eq!(walked, records);
    }

    #[test]
    fn a_tree_walks_out_and_loads_back(start in start_records()) {
        let (root, expected) = reference_tree(&start);
        let mut tree = Tree::load(root, lookup(&expected)).unwrap();
        let mut seen = BlockMap::new();
        let mut announced = vec![root];
        let mut keys = Vec::new();
        for visit in tree.walk() {
            match visit {
                Visit::Node(node) => {
                    prop_assert_eq!(announced.pop(), Some(node.cid()));
                    let (mut reader, _) = node::NodeReader::open(&expected[&node.cid()]).unwrap();
                    let mut links = Vec::new();
                    while let Some(entry) = reader.entry().unwrap() {
                        links.extend(entry.right);
                    }
                    announced.extend(links.into_iter().rev());
                    announced.extend(reader.close().unwrap());
                    seen.insert(node.cid(), node.block());
                }
                Visit::Record { path, .. } => keys.push(path.to_vec()),
                Visit::Missing(cid) => prop_assert!(false, "{} is missing", cid),
            }
        }
        prop_assert_eq!(seen, expected);
        prop_assert!(keys.is_sorted());
        prop_assert_eq!(keys.len(), start.len());
    }

    #[test]
    fn proofs_tell_what_is_there_and_what_is_not(start in start_records(), other in any::<u16>()) {
        let mut tree = tree_of(&start);
        let root = tree.root_cid();
        for key in start.keys().cloned().chain([path(other)]) {
            let proof: BlockMap = tree.proof(key.as_bytes()).unwrap().into_iter().collect();
            let proven = read(key.as_bytes(), root, lookup(&proof));
            prop_assert_eq!(proven, Ok(start.get(&key).copied()));
            let mut partial = Tree::load(root, lookup(&proof)).unwrap();
            prop_assert_eq!(partial.root_cid(), root);
            prop_assert_eq!(partial.get(key.as_bytes()), Ok(start.get(&key).copied()));
        }
        for key in start.keys() {
            let gone = read(key.as_bytes(), root, |_| None);
            prop_assert_eq!(gone, Err(MstError::MissingNode(root)));
        }
    }

    #[test]
    fn a_failing_change_leaves_the_tree_as_it_was(
        start in start_records(),
        kept in any::<u64>(),
        draws in draws(30),
    ) {
        let (root, mut blocks) = reference_tree(&start);
        let mut cids: Vec<_> = blocks.keys().copied().filter(|cid| *cid != root).collect();
        cids.sort();
        let mut rng = fastrand::Rng::with_seed(kept);
        for cid in cids.iter().filter(|_| rng.bool()) {
            blocks.remove(cid);
        }
        let mut tree = Tree::load(root, lookup(&blocks)).unwrap();
        let mut after = start.clone();
        for (key, change) in batch(&mut after, &draws) {
            let op = InvertOp { path: &key, change };
            let before = tree.root_cid();
            let outcome = tree.apply(&[op]);
            match outcome {
                Ok(diff) => prop_assert_eq!(diff.before, before),
                Err(MstError::MissingNode(_)) => prop_assert_eq!(tree.root_cid(), before),
                Err(other) => prop_assert!(false, "{}", other),
            }
            let impossible = InvertOp { path: "com.example.never/was", change: Change::Delete { prev: root } };
            let before = tree.root_cid();
            prop_assert!(tree.apply(&[op, impossible]).is_err());
            prop_assert_eq!(tree.root_cid(), before);
        }
    }

    #[test]
    fn arbitrary_and_damaged_blocks_are_refused_without_harm(
        start in start_records(),
        which in any::<Index>(),
        at in any::<Index>(),
        byte in any::<u8>(),
        noise in proptest::collection::vec(any::<u8>(), 0..200),
    ) {
        let noise_cid = Cid::of(Codec::DagCbor, &noise);
        prop_assert!(Tree::load(noise_cid, |_| Some(noise.as_slice())).is_err());

        let (root, mut blocks) = reference_tree(&start);
        let mut cids: Vec<_> = blocks.keys().copied().collect();
        cids.sort();
        let block = blocks.get_mut(which.get(&cids)).unwrap();
        let at = at.index(block.len());
        block[at] = byte;
        let ops: Vec<_> = start.iter().map(|(key, &cid)| (key.clone(), Change::Create { cid })).collect();
        // Blocks whose hashes nobody checked: the outcome is open, but it is an outcome.
        let _ = invert(&borrowed(&ops), root, lookup(&blocks));
        let _ = Tree::load(root, lookup(&blocks)).map(|mut tree| tree.walk().count());
    }
}

#[test]
fn removed_keys_do_not_pile_up() {
    let mut tree = tree_of(&(0..100).map(|n| (path(n), record(0))).collect());
    let root = tree.root_cid();
    let bytes = tree.memory();
    for round in 0..200_u32 {
        for n in 200..300 {
            tree.insert(path(n).as_bytes(), record(round)).unwrap();
        }
        for n in 200..300 {
            assert_eq!(tree.delete(path(n).as_bytes()), Ok(record(round)));
        }
    }
    assert_eq!(tree.root_cid(), root);
    assert!(tree.memory() < 4 * bytes + 64 * 1024);
}

#[test]
fn the_empty_tree_has_its_root() {
    // The value every implementation agrees on.
    let expected = "bafyreie5737gdxlw5i64vzichcalba3z2v5n6icifvx5xytvske7mr3hpm";
    assert_eq!(empty_root().to_string(), expected);
    assert_eq!(Tree::empty().root_cid(), empty_root());
    let loaded = Tree::load(empty_root(), |_| Some(node::EMPTY)).unwrap();
    assert_eq!(loaded.get(b"a/b"), Ok(None));
    let create = InvertOp {
        path: "a/b",
        change: Change::Create { cid: record(1) },
    };
    let diff = Tree::empty().apply(&[create]).unwrap();
    let carried: BlockMap = diff.blocks.into_iter().collect();
    assert_eq!(
        invert(&[create], diff.after, lookup(&carried)),
        Ok(empty_root())
    );
    assert_eq!(invert(&[], diff.after, |_| None), Ok(diff.after));
}

#[test]
fn ops_that_contradict_the_tree_are_named() {
    let mut tree = tree_of(&[("a/b".to_owned(), record(1))].into());
    let root = tree.root_cid();
    let blocks: BlockMap = tree.proof(b"a/b").unwrap().into_iter().collect();
    let undo = |path: &str, change| invert(&[InvertOp { path, change }], root, lookup(&blocks));
    let (old, here) = (record(0), record(1));
    let mismatch = || {
        Err(MstError::Mismatch {
            path: "a/b".into(),
            expected: record(2),
            found: record(1),
        })
    };
    assert_eq!(
        undo("a/c", Change::Create { cid: here }),
        Err(MstError::Absent("a/c".into()))
    );
    assert_eq!(undo("a/b", Change::Create { cid: record(2) }), mismatch());
    assert_eq!(
        undo(
            "a/b",
            Change::Update {
                cid: record(2),
                prev: old
            }
        ),
        mismatch()
    );
    assert_eq!(
        undo("a/b", Change::Delete { prev: old }),
        Err(MstError::Exists("a/b".into()))
    );
    assert_eq!(
        undo("", Change::Create { cid: here }),
        Err(MstError::KeyLength(0))
    );
    let long = "a".repeat(MAX_KEY_LEN + 1);
    assert_eq!(
        undo(&long, Change::Delete { prev: old }),
        Err(MstError::KeyLength(MAX_KEY_LEN + 1))
    );
}

#[test]
fn the_longest_key_is_held() {
    let path = format!("{}/{}", "n".repeat(317), "r".repeat(512));
    let create = InvertOp {
        path: &path,
        change: Change::Create { cid: record(1) },
    };
    let mut tree = tree_of(&(0..50).map(|n| (self::path(n), record(0))).collect());
    let diff = tree.apply(&[create]).unwrap();
    let carried: BlockMap = diff.blocks.into_iter().collect();
    assert_eq!(
        invert(&[create], diff.after, lookup(&carried)),
        Ok(diff.before)
    );
}

/// Keys of a given height, ascending.
fn keys_of(wanted: u8, count: usize) -> Vec<String> {
    let keys = (0..1_000_000).map(|n| format!("k/{n:06}"));
    keys.filter(|key| height(key.as_bytes()) == wanted)
        .take(count)
        .collect()
}

#[test]
fn malformed_nodes_are_refused() {
    let value = record(7);
    let low = keys_of(0, 3);
    let [a, b] = [low[0].as_bytes(), low[1].as_bytes()];
    let shared = a.iter().zip(b).take_while(|(x, y)| x == y).count();
    let high = keys_of(1, 1);
    let high = high[0].as_bytes();
    let good = node_block(
        None,
        &[(0, a, value, None), (shared, &b[shared..], value, None)],
    );
    let load = |block: &[u8]| {
        let cid = Cid::of(Codec::DagCbor, block);
        Tree::load(cid, |wanted| (*wanted == cid).then_some(block)).map(drop)
    };
    assert_eq!(load(&good), Ok(()));

    let below = Some(record(9));
    let mut trailing = good.clone();
    trailing.push(0);
    let long = vec![b'a'; MAX_KEY_LEN + 1];
    // The same array head in two bytes, and a length that is not there.
    let not_shortest = [&[0xa2, 0x61, b'e', 0x98, 0x00][..], &node::EMPTY[4..]].concat();
    let too_many = [
        &[0xa2, 0x61, b'e', 0x9a, 0xff, 0xff, 0xff, 0xff][..],
        &good[4..],
    ]
    .concat();
    let indefinite = [&[0xa2, 0x61, b'e', 0x9f, 0xff][..], &node::EMPTY[4..]].concat();
    let raw_subtree = Some(Cid::of(Codec::Raw, b"raw"));
    let cases: Vec<(Vec<u8>, NodeError)> = vec![
        (
            good[..good.len() - 1].to_vec(),
            ShapeError::Unexpected(good.len() - 1).into(),
        ),
        (trailing, ShapeError::Trailing(good.len()).into()),
        (not_shortest, ShapeError::Unexpected(3).into()),
        (indefinite, ShapeError::Unexpected(3).into()),
        (too_many, NodeError::TooManyEntries(0xffff_ffff)),
        (node_block(None, &[(1, a, value, None)]), NodeError::Prefix),
        (
            node_block(None, &[(0, a, value, None), (0, b, value, None)]),
            NodeError::Prefix,
        ),
        (
            node_block(None, &[(0, a, value, None), (200, b, value, None)]),
            NodeError::Prefix,
        ),
        (
            node_block(
                None,
                &[(0, b, value, None), (shared, &a[shared..], value, None)],
            ),
            NodeError::Order,
        ),
        (
            node_block(None, &[(0, a, value, None), (a.len(), b"", value, None)]),
            NodeError::KeyLength(a.len()),
        ),
        (
            node_block(None, &[(0, b"", value, None)]),
            NodeError::KeyLength(0),
        ),
        (
            node_block(None, &[(0, &long, value, None)]),
            NodeError::KeyLength(long.len()),
        ),
        (
            node_block(None, &[(0, high, value, None), (0, b"z/0", value, None)]),
            NodeError::Height {
                expected: 1,
                found: height(b"z/0"),
            },
        ),
        (
            node_block(below, &[(0, a, value, None)]),
            NodeError::BelowBottom,
        ),
        (
            node_block(None, &[(0, a, value, below)]),
            NodeError::BelowBottom,
        ),
        (node_block(below, &[]), NodeError::Hollow),
        (
            node_block(raw_subtree, &[(0, high, value, None)]),
            ShapeError::Link(0).into(),
        ),
    ];
    for (block, reason) in cases {
        match (load(&block), reason) {
            (
                Err(MstError::BadNode {
                    reason: NodeError::Shape(ShapeError::Link(_)),
                    ..
                }),
                NodeError::Shape(ShapeError::Link(_)),
            ) => {}
            (Err(MstError::BadNode { reason: found, .. }), reason) => assert_eq!(found, reason),
            (other, reason) => panic!("{reason}: {other:?}"),
        }
    }
}

#[test]
fn subtrees_must_fit_their_place() {
    let value = record(7);
    let top = keys_of(2, 1).remove(0);
    let (before, after): (Vec<_>, Vec<_>) = keys_of(1, 400).into_iter().partition(|key| *key < top);
    let bottom = keys_of(0, 1).remove(0);
    let load_below = |left: bool, block: Vec<u8>| {
        let mut blocks = BlockMap::new();
        let child = Some(add_block(&mut blocks, block));
        let (left, right) = if left { (child, None) } else { (None, child) };
        let root = add_block(
            &mut blocks,
            node_block(left, &[(0, top.as_bytes(), value, right)]),
        );
        Tree::load(root, lookup(&blocks)).map(drop)
    };
    let single = |key: &str| node_block(None, &[(0, key.as_bytes(), value, None)]);
    let reason = |outcome: Result<(), MstError>| match outcome {
        Err(MstError::BadNode { reason, .. }) => reason,
        other => panic!("{other:?}"),
    };
    assert!(!before.is_empty() && !after.is_empty());
    assert_eq!(load_below(true, single(&before[0])), Ok(()));
    assert_eq!(load_below(false, single(&after[0])), Ok(()));
    assert_eq!(
        reason(load_below(true, single(&after[0]))),
        NodeError::Order
    );
    assert_eq!(
        reason(load_below(false, single(&before[0]))),
        NodeError::Order
    );
    let skipped = NodeError::Height {
        expected: 1,
        found: 0,
    };
    assert_eq!(reason(load_below(true, single(&bottom))), skipped);
    assert_eq!(
        reason(load_below(true, node_block(None, &[]))),
        NodeError::Hollow
    );
    // A node without entries that leads on is valid between others.
    assert_eq!(load_below(true, node_block(Some(record(1)), &[])), Ok(()));
}

#[test]
fn heights_are_those_of_the_specification() {
    for (key, expected) in [
        ("2653ae71", 0),
        ("blue", 1),
        ("app.bsky.feed.post/454397e440ec", 4),
        ("app.bsky.feed.post/9adeb165882c", 8),
    ] {
        assert_eq!(height(key.as_bytes()), expected, "{key}");
    }
}
