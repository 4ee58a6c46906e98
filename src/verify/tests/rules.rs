//! The rules that an event breaks or keeps by itself.

use super::sample::{DID, Draft, NOW_US, OTHER_DID, Repo, Write, public_key, record, secret};
use crate::atproto::car::{self, Car};
use crate::atproto::cid::{Cid, Codec};
use crate::atproto::frame::{self, Action, Message};
use crate::atproto::key::VerifyingKey;
use crate::atproto::mst;
use crate::atproto::tid::Tid;
use crate::hosts::Rule;
use crate::verify::rules::{
    self, BLOCKS_PER_OP, Chain, Facts, MAX_COMMIT_BLOCKS, MAX_OPS, MAX_RECORD, MAX_SYNC_BLOCKS,
    REV_FUTURE_TOLERANCE_US, SPARE_BLOCKS, Strictness,
};
use crate::verify::signature::{self, Job};

/// The order of secp256k1's group.
const ORDER: [u8; 32] = [
    0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xfe,
    0xba, 0xae, 0xdc, 0xe6, 0xaf, 0x48, 0xa0, 0x3b, 0xbf, 0xd2, 0x5e, 0x8c, 0xd0, 0x36, 0x41, 0x41,
];

/// A commit with an update, a create and a delete; its repository has 40 records.
const WRITES: [Write<'static>; 3] = [
    Write::Put("com.example.note/7", "new"),
    Write::Put("com.example.note/new", "new"),
    Write::Delete("com.example.note/20"),
];

/// What is done to a draft before it is signed and framed.
type Spoil = fn(&mut Draft);

/// One way to spoil a good event, and the rule that then refuses it.
pub struct Case {
    pub name: &'static str,
    pub rule: Rule,
    spoil: Spoil,
}

const fn case(name: &'static str, rule: Rule, spoil: Spoil) -> Case {
    Case { name, rule, spoil }
}

/// Commits of a repository of 40 records; all are held to sync 1.1.
pub const COMMITS: &[Case] = &[
    case(
        "blocks over 2,000,000 bytes",
        Rule::CommitTooLarge,
        |draft| {
            draft.blocks.push(filler(MAX_COMMIT_BLOCKS));
        },
    ),
    case("201 ops", Rule::TooManyOps, |draft| {
        let op = draft.ops[0].clone();
        draft.ops.resize(MAX_OPS + 1, op);
    }),
    case("rev of 12 characters", Rule::RevSyntax, |draft| {
        draft.rev.pop();
    }),
    case("rev from next week", Rule::RevFuture, |draft| {
        let rev = Tid::from_micros(NOW_US + REV_FUTURE_TOLERANCE_US + 1, 0);
        set_rev(draft, rev);
    }),
    case("the last rev again", Rule::RevOrder, |draft| {
        let last = Tid::parse(draft.since.as_deref().unwrap()).unwrap();
        set_rev(draft, last);
    }),
    case("no CAR", Rule::Car, |draft| draft.edit_car = |_| Vec::new()),
    case("a CAR cut short", Rule::Car, |draft| {
        draft.edit_car = |mut car| {
            car.pop();
            car
        };
    }),
    case("a CAR of version 2", Rule::Car, |draft| {
        draft.edit_car = |car| replace(car, b"version\x01", b"version\x02");
    }),
    case("a record's byte changed", Rule::BlockHash, |draft| {
        let (_, data) = &mut draft.blocks[0];
        *data.last_mut().unwrap() ^= 1;
    }),
    case(
        "a block's byte changed that nobody needs",
        Rule::BlockHash,
        |draft| {
            let (cid, mut data) = filler(10);
            data[3] ^= 1;
            draft.blocks.push((cid, data));
        },
    ),
    case("a byte of the commit changed", Rule::BlockHash, |draft| {
        draft.edit_car = |car| replace(car, b"gversion\x03", b"gversion\x02");
    }),
    case("no root", Rule::CommitBlock, |draft| {
        draft.edit_roots = |_| Vec::new()
    }),
    case("a root without its block", Rule::CommitBlock, |draft| {
        draft.edit_roots = |_| vec![Cid::of(Codec::DagCbor, b"elsewhere")];
    }),
    case(
        "commit is another block's CID",
        Rule::CommitBlock,
        |draft| {
            draft.commit = Some(draft.blocks[0].0);
        },
    ),
    case(
        "the commit is the second root",
        Rule::CommitObject,
        |draft| {
            // The first one is a record that is in the CAR.
            draft.edit_roots = |commit| vec![Cid::of(Codec::DagCbor, &record("new")), commit];
        },
    ),
    case("version 2", Rule::CommitObject, |draft| draft.version = 2),
    case("a signature of 63 bytes", Rule::CommitObject, |draft| {
        draft.edit_signature = |mut signature| {
            signature.pop();
            signature
        };
    }),
    case("another DID signed", Rule::CommitEnvelope, |draft| {
        OTHER_DID.clone_into(&mut draft.did_signed);
    }),
    case("an earlier rev signed", Rule::CommitEnvelope, |draft| {
        draft.rev_signed = draft.since.clone().unwrap();
    }),
    case(
        "rev raised in the envelope",
        Rule::CommitEnvelope,
        |draft| {
            draft.rev = Tid::from_micros(NOW_US, 0).to_string();
        },
    ),
    case("another key signed", Rule::Signature, |draft| {
        draft.key = secret(6)
    }),
    case("a bit of the signature changed", Rule::Signature, |draft| {
        draft.edit_signature = |mut signature| {
            signature[40] ^= 1;
            signature
        };
    }),
    case(
        "the high-S twin of the signature",
        Rule::Signature,
        |draft| {
            draft.edit_signature = |signature| high_s(&signature);
        },
    ),
    case("another tree signed for", Rule::Inversion, |draft| {
        draft.data = mst::empty_root();
    }),
    case("a path without a slash", Rule::OpPath, |draft| {
        set_path(draft, "com.example.note")
    }),
    case("a path with two slashes", Rule::OpPath, |draft| {
        set_path(draft, "com.example.note/a/b");
    }),
    case("a collection that is no NSID", Rule::OpPath, |draft| {
        set_path(draft, "note/7")
    }),
    case("a record key of 513 characters", Rule::OpPath, |draft| {
        set_path(draft, &format!("com.example.note/{}", "k".repeat(513)));
    }),
    case("a create without a CID", Rule::OpRecord, |draft| {
        draft.ops[1].cid = None
    }),
    case("an update without a CID", Rule::OpRecord, |draft| {
        draft.ops[0].cid = None
    }),
    case("a delete with a CID", Rule::OpRecord, |draft| {
        draft.ops[2].cid = draft.ops[2].prev;
    }),
    case("a record's block missing", Rule::OpRecord, |draft| {
        draft.blocks.remove(0);
        draft.blocks.remove(0);
    }),
    case("an update without prev", Rule::OpPrev, |draft| {
        draft.ops[0].prev = None
    }),
    case("a delete without prev", Rule::OpPrev, |draft| {
        draft.ops[2].prev = None
    }),
    case("no prevData", Rule::PrevData, |draft| {
        draft.prev_data = None
    }),
    case("prevData is data", Rule::Inversion, |draft| {
        draft.prev_data = Some(draft.data)
    }),
    case("prevData is the empty tree", Rule::Inversion, |draft| {
        draft.prev_data = Some(mst::empty_root());
    }),
    case("the guise of a first commit", Rule::Inversion, |draft| {
        draft.prev_data = None;
        draft.since = None;
    }),
    case("an op left out", Rule::Inversion, |draft| {
        draft.ops.remove(0);
    }),
    case("all ops left out", Rule::Inversion, |draft| {
        draft.ops.clear()
    }),
    case("an op too many", Rule::Inversion, |draft| {
        let mut op = draft.ops[1].clone();
        op.path.push('2');
        draft.ops.push(op);
    }),
    case("an op twice", Rule::OpDuplicate, |draft| {
        let op = draft.ops[1].clone();
        draft.ops.push(op);
    }),
    case("two ops on one path", Rule::OpDuplicate, |draft| {
        let mut op = draft.ops[1].clone();
        op.action = Action::Delete;
        (op.prev, op.cid) = (op.cid, None);
        draft.ops.push(op);
    }),
    case("a record's CID of raw bytes", Rule::CidCodec, |draft| {
        let raw = in_raw(draft.blocks[1].0);
        draft.ops[1].cid = Some(raw);
        draft.blocks[1].0 = raw;
    }),
    case("a commit's CID of raw bytes", Rule::CidCodec, |draft| {
        draft.edit_car = |car| {
            let car = Car::parse(&car).unwrap();
            let root = car.roots()[0];
            let spelt = |cid| if cid == root { in_raw(cid) } else { cid };
            car::write(
                &[in_raw(root)],
                car.blocks().iter().map(|(cid, data)| (spelt(cid), data)),
            )
        };
        draft.commit = Some(in_raw(Cid::of(Codec::DagCbor, &draft.commit_block())));
    }),
    case("a tree's CID of raw bytes", Rule::CommitObject, |draft| {
        draft.data = in_raw(draft.data);
    }),
    case("more blocks than ops need", Rule::TooManyBlocks, |draft| {
        let most = SPARE_BLOCKS + BLOCKS_PER_OP * draft.ops.len();
        draft
            .blocks
            .extend((0..most as u32).map(|n| block(n.to_be_bytes().into())));
    }),
    case("a create instead of an update", Rule::Inversion, |draft| {
        draft.ops[0].action = Action::Create;
    }),
    case("prev is not what was there", Rule::Inversion, |draft| {
        draft.ops[0].prev = draft.ops[0].cid;
    }),
    case("another record's CID", Rule::Inversion, |draft| {
        let other = filler(5);
        draft.ops[1].cid = Some(other.0);
        draft.blocks.push(other);
    }),
    case("the root node missing", Rule::Inversion, |draft| {
        let data = draft.data;
        draft.blocks.retain(|(cid, _)| *cid != data);
    }),
    case(
        "the tree's nodes missing below the root",
        Rule::Inversion,
        |draft| {
            let keep = [draft.blocks[0].0, draft.blocks[1].0, draft.data];
            draft.blocks.retain(|(cid, _)| keep.contains(cid));
        },
    ),
    case(
        "a record over 1,000,000 bytes",
        Rule::RecordTooLarge,
        |draft| {
            let large = filler(MAX_RECORD + 1);
            draft.ops[1].cid = Some(large.0);
            draft.blocks.push(large);
        },
    ),
];

/// Syncs of the same repository. The stored state is that of the commit before.
pub const SYNCS: &[Case] = &[
    case("blocks over 10,000 bytes", Rule::SyncTooLarge, |draft| {
        draft.edit_car = |mut car| {
            let (cid, data) = filler(MAX_SYNC_BLOCKS);
            car::write_block(&cid, &data, &mut car);
            car
        };
    }),
    case("rev is no TID", Rule::RevSyntax, |draft| draft.rev.clear()),
    case("rev from next week", Rule::RevFuture, |draft| {
        set_rev(draft, Tid::from_micros(NOW_US * 2, 0));
    }),
    case("an earlier rev", Rule::RevOrder, |draft| {
        set_rev(draft, Tid::from_micros(NOW_US / 2, 0));
    }),
    case(
        "the stored rev with another commit",
        Rule::SyncConflict,
        |draft| {
            let last = Tid::parse(draft.since.as_deref().unwrap()).unwrap();
            set_rev(draft, last);
        },
    ),
    case("no CAR", Rule::Car, |draft| draft.edit_car = |_| vec![0xa0]),
    case("a byte of the commit changed", Rule::BlockHash, |draft| {
        draft.edit_car = |car| replace(car, b"gversion\x03", b"gversion\x02");
    }),
    case("a root without its block", Rule::CommitBlock, |draft| {
        draft.edit_roots = |_| vec![Cid::of(Codec::DagCbor, b"elsewhere")];
    }),
    case("version 2", Rule::CommitObject, |draft| draft.version = 2),
    case("another DID signed", Rule::CommitEnvelope, |draft| {
        OTHER_DID.clone_into(&mut draft.did_signed);
    }),
    case("another rev signed", Rule::CommitEnvelope, |draft| {
        draft.rev_signed = draft.since.clone().unwrap();
    }),
    case("another key signed", Rule::Signature, |draft| {
        draft.key = secret(6)
    }),
];

fn filler(bytes: usize) -> (Cid, Vec<u8>) {
    block(vec![0; bytes])
}

fn block(data: Vec<u8>) -> (Cid, Vec<u8>) {
    (Cid::of(Codec::DagCbor, &data), data)
}

fn in_raw(cid: Cid) -> Cid {
    Cid::from_digest(Codec::Raw, cid.digest())
}

fn set_rev(draft: &mut Draft, rev: Tid) {
    draft.rev = rev.to_string();
    draft.rev_signed = rev.to_string();
}

fn set_path(draft: &mut Draft, path: &str) {
    path.clone_into(&mut draft.ops[1].path);
}

fn replace(bytes: Vec<u8>, from: &[u8], to: &[u8]) -> Vec<u8> {
    let at = bytes
        .windows(from.len())
        .position(|window| window == from)
        .unwrap();
    [&bytes[..at], to, &bytes[at + from.len()..]].concat()
}

/// The other signature of the same message: r, and the group's order less s.
fn high_s(signature: &[u8]) -> Vec<u8> {
    let mut twin = signature.to_vec();
    let mut borrow = false;
    for at in (0..32).rev() {
        let (digit, under) = ORDER[at].overflowing_sub(signature[32 + at]);
        let (digit, under_again) = digit.overflowing_sub(u8::from(borrow));
        borrow = under || under_again;
        twin[32 + at] = digit;
    }
    twin
}

fn signed(facts: Facts) -> Result<Facts, Rule> {
    let key = VerifyingKey::new(&public_key(&secret(5))).unwrap();
    let job = Job {
        key: &key,
        signed: &facts.signed,
    };
    match signature::verify(&[job])[..] {
        [true] => Ok(facts),
        _ => Err(Rule::Signature),
    }
}

fn check_commit(draft: &Draft, strictness: Strictness, last: Option<Tid>) -> Result<Facts, Rule> {
    let frame = draft.frame();
    let Message::Commit(commit) = frame::decode(&frame).unwrap().message else {
        panic!("a commit");
    };
    rules::commit_size(&commit)?;
    let rev = rules::rev(commit.rev, NOW_US)?;
    rules::rev_order(rev, last)?;
    signed(rules::commit(&commit, rev, strictness)?)
}

fn check_sync(draft: &Draft, last: Option<(Tid, Cid)>) -> Result<Facts, Rule> {
    let frame = draft.sync_frame();
    let Message::Sync(sync) = frame::decode(&frame).unwrap().message else {
        panic!("a sync");
    };
    rules::sync_size(&sync)?;
    let rev = rules::rev(sync.rev, NOW_US)?;
    let facts = rules::sync(&sync, rev)?;
    rules::sync_order(&facts, last)?;
    signed(facts)
}

fn how_chained(draft: &Draft, stored: Option<(Tid, Cid)>) -> Chain {
    let frame = draft.frame();
    let Message::Commit(commit) = frame::decode(&frame).unwrap().message else {
        panic!("a commit");
    };
    rules::chain(&commit, stored)
}

#[test]
fn good_commits_keep_every_rule() {
    let mut repo = Repo::new();
    let mut last = None;
    let paths: Vec<String> = (0..MAX_OPS)
        .map(|n| format!("com.example.many/{n}"))
        .collect();
    let most: Vec<Write<'_>> = paths.iter().map(|path| Write::Put(path, "x")).collect();
    let least: Vec<Write<'_>> = paths.iter().map(|path| Write::Delete(path)).collect();
    let longest_key = format!("com.example.note/{}", "k".repeat(512));
    let commits: [(&str, &[Write<'_>]); 9] = [
        ("a first commit without records", &[]),
        ("200 creates", &most),
        ("an update", &[Write::Put(&paths[7], "new")]),
        ("a delete", &[Write::Delete(&paths[8])]),
        (
            "a record key of 512 characters",
            &[Write::Put(&longest_key, "x")],
        ),
        ("no ops", &[]),
        (
            "the same record under two paths",
            &[
                Write::Put("com.example.note/a", "same"),
                Write::Put("com.example.note/b", "same"),
            ],
        ),
        (
            "one of each",
            &[
                Write::Put("com.example.note/a", "new"),
                Write::Put("com.example.note/c", "new"),
                Write::Delete("com.example.note/b"),
            ],
        ),
        ("the last of many", &least[..8]),
    ];
    for (name, writes) in commits {
        let draft = repo.commit(writes);
        let stored = last.as_ref().map(|facts: &Facts| (facts.rev, facts.data));
        for strictness in [Strictness::Lenient, Strictness::Strict] {
            let facts = check_commit(&draft, strictness, stored.map(|(rev, _)| rev));
            let facts = facts.unwrap_or_else(|rule| panic!("{name}: {rule}"));
            assert_eq!(
                (facts.data, Some(facts.rev)),
                (draft.data, repo.rev()),
                "{name}"
            );
            if strictness == Strictness::Strict {
                last = Some(facts);
            }
        }
        assert_eq!(how_chained(&draft, stored), Chain::Intact, "{name}");
    }
}

/// `since` null and no `prevData`: the tree before was empty, and a strict host's ops are undone to it.
#[test]
fn a_first_commit_may_have_records() {
    let mut draft = Repo::new().commit(&[Write::Put("com.example.note/1", "first")]);
    assert_eq!((&draft.since, draft.prev_data), (&None, None));
    for strictness in [Strictness::Lenient, Strictness::Strict] {
        assert!(check_commit(&draft, strictness, None).is_ok());
    }
    draft.prev_data = Some(mst::empty_root());
    assert!(check_commit(&draft, Strictness::Strict, None).is_ok());
    draft.ops.clear();
    let verdict = check_commit(&draft, Strictness::Strict, None).err();
    assert_eq!(verdict, Some(Rule::Inversion));
}

#[test]
fn each_spoiled_commit_is_refused_under_its_rule() {
    for case in COMMITS {
        let mut repo = Repo::filled();
        let last = repo.rev();
        let mut draft = repo.commit(&WRITES);
        assert!(check_commit(&draft, Strictness::Strict, last).is_ok());
        (case.spoil)(&mut draft);
        let verdict = check_commit(&draft, Strictness::Strict, last);
        assert_eq!(verdict.err(), Some(case.rule), "{}", case.name);
    }
}

#[test]
fn each_spoiled_sync_is_refused_under_its_rule() {
    for case in SYNCS {
        let mut repo = Repo::filled();
        let last = repo
            .rev()
            .map(|rev| (rev, Cid::of(Codec::DagCbor, b"last commit")));
        let mut draft = repo.commit(&WRITES);
        assert!(check_sync(&draft, last).is_ok());
        (case.spoil)(&mut draft);
        assert_eq!(
            check_sync(&draft, last).err(),
            Some(case.rule),
            "{}",
            case.name
        );
    }
}

/// What a lenient host may leave out; all else counts for it as well.
#[test]
fn lenient_hosts_may_leave_out_what_sync_1_1_added() {
    let leaves_out: [(&str, Rule, Spoil); 4] = [
        ("prevData", Rule::PrevData, |draft| draft.prev_data = None),
        ("prev of an update", Rule::OpPrev, |draft| {
            draft.ops[0].prev = None
        }),
        ("prev of a delete", Rule::OpPrev, |draft| {
            draft.ops[2].prev = None
        }),
        ("all of it, and the nodes around", Rule::OpPrev, |draft| {
            draft.prev_data = None;
            draft.ops.iter_mut().for_each(|op| op.prev = None);
            draft.blocks.truncate(3);
        }),
    ];
    for (name, rule, leave_out) in leaves_out {
        let mut repo = Repo::filled();
        let last = repo.rev();
        let mut draft = repo.commit(&WRITES);
        leave_out(&mut draft);
        let verdict = |strictness| check_commit(&draft, strictness, last).err();
        assert_eq!(verdict(Strictness::Lenient), None, "{name}");
        assert_eq!(verdict(Strictness::Strict), Some(rule), "{name}");
    }
    let excused = [Rule::PrevData, Rule::OpPrev];
    for case in COMMITS.iter().filter(|case| !excused.contains(&case.rule)) {
        let mut repo = Repo::filled();
        let last = repo.rev();
        let mut draft = repo.commit(&WRITES);
        (case.spoil)(&mut draft);
        // A first commit's lack of `prevData` is no sign of either version.
        let expected = (case.name != "the guise of a first commit").then_some(case.rule);
        let verdict = check_commit(&draft, Strictness::Lenient, last).err();
        assert_eq!(verdict, expected, "{}", case.name);
    }
}

#[test]
fn limits_are_inclusive() {
    let mut repo = Repo::filled();
    let last = repo.rev();
    let large = "x".repeat(MAX_RECORD - record("").len() - 4);
    let mut draft = repo.commit(&[Write::Put("com.example.note/large", &large)]);
    assert_eq!(draft.blocks[0].1.len(), MAX_RECORD);
    let room = MAX_COMMIT_BLOCKS - blocks_len(&draft);
    // A block of this size has a length of three bytes before it, and its CID.
    draft.blocks.push(filler(room - 36 - 3));
    assert_eq!(blocks_len(&draft), MAX_COMMIT_BLOCKS);
    assert!(check_commit(&draft, Strictness::Strict, last).is_ok());
    for (ahead, verdict) in [(0, Ok(())), (1, Err(Rule::RevFuture))] {
        let rev = Tid::from_micros(NOW_US + REV_FUTURE_TOLERANCE_US + ahead, 0);
        assert_eq!(rules::rev(&rev.to_string(), NOW_US).map(drop), verdict);
    }
}

fn blocks_len(draft: &Draft) -> usize {
    let frame = draft.frame();
    match frame::decode(&frame).unwrap().message {
        Message::Commit(commit) => commit.blocks.len(),
        other => panic!("not a commit: {other:?}"),
    }
}

/// Consumers take the envelope's word: it must not write the DID otherwise than what was signed.
#[test]
fn the_signed_did_is_written_as_in_the_envelope() {
    let shouted = DID.replace("ewvi", "EWVI");
    for (signed, envelope) in [(false, true), (true, false), (true, true)] {
        let mut repo = Repo::filled();
        let mut draft = repo.commit(&WRITES);
        for (shouts, did) in [(signed, &mut draft.did_signed), (envelope, &mut draft.repo)] {
            if shouts {
                shouted.clone_into(did);
            }
        }
        let expected = (signed != envelope).then_some(Rule::CommitEnvelope);
        assert_eq!(
            check_commit(&draft, Strictness::Strict, None).err(),
            expected
        );
        assert_eq!(check_sync(&draft, None).err(), expected);
    }
}

#[test]
fn the_chain_is_since_and_prev_data() {
    let mut repo = Repo::filled();
    let rev = repo.rev().unwrap();
    let mut draft = repo.commit(&WRITES);
    let data = draft.prev_data.unwrap();
    let (other_rev, other_data) = (Tid::from_micros(NOW_US, 9), mst::empty_root());
    for (stored, expected) in [
        (None, Chain::Intact),
        (Some((rev, data)), Chain::Intact),
        (Some((other_rev, data)), Chain::Broken),
        (Some((rev, other_data)), Chain::Broken),
    ] {
        assert_eq!(how_chained(&draft, stored), expected);
    }
    let prev_data = draft.prev_data.take();
    assert_eq!(
        how_chained(&draft, Some((rev, other_data))),
        Chain::Intact,
        "lenient"
    );
    draft.prev_data = prev_data;
    for since in [None, Some(String::new())] {
        draft.since = since;
        assert_eq!(how_chained(&draft, Some((rev, data))), Chain::Broken);
    }
}

#[test]
fn a_sync_may_repeat_the_stored_state() {
    let mut repo = Repo::filled();
    let draft = repo.commit(&WRITES);
    let commit = Cid::of(Codec::DagCbor, &draft.commit_block());
    let rev = repo.rev().unwrap();
    let earlier = Tid::from_micros(NOW_US / 2, 0);
    for last in [None, Some((rev, commit)), Some((earlier, commit))] {
        let facts = check_sync(&draft, last).unwrap();
        assert_eq!(
            (facts.rev, facts.data, facts.commit),
            (rev, draft.data, commit)
        );
    }
}
