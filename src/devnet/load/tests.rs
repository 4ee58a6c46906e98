//! Prepared runs, checked without a relay: every good commit verifies and inverts, every faulty one
//! fails for the reason it was made for, and the frames have the sizes of the network.

use std::collections::HashMap;

use super::prepare::Act;
use super::*;
use crate::atproto::car::Car;
use crate::atproto::commit::SignedCommit;
use crate::atproto::frame::{self, Commit, Message};
use crate::atproto::key::{PublicKey, VerifyingKey};
use crate::atproto::mst::{self, Change, InvertOp};
use crate::devnet::faults::{Effect, Fault};
use crate::devnet::feed::Step;

fn options(faults: FaultPlan) -> LoadOptions {
    LoadOptions {
        hosts: 3,
        accounts: 12,
        events: 400,
        p256_share: 0.3,
        existing_records: 60,
        faults,
        ..LoadOptions::default()
    }
}

fn prepared(faults: FaultPlan) -> Prepared {
    Prepared::new(options(faults), &|_, _| {})
}

/// What a relay that knows only the rules would say of a commit.
fn verdict(commit: &Commit<'_>, key: &VerifyingKey) -> Result<(), &'static str> {
    let car = Car::parse(commit.blocks).map_err(|_| "car")?;
    car.verify_hashes().map_err(|_| "block_hash")?;
    let signed = SignedCommit::parse(car.blocks().get(&commit.commit).ok_or("commit_block")?)
        .map_err(|_| "commit_object")?;
    signed.verify_signature(key).map_err(|_| "signature")?;
    let ops = commit.ops.iter().map(|op| {
        let change = match (op.cid, op.prev) {
            (Some(cid), None) => Change::Create { cid },
            (Some(cid), Some(prev)) => Change::Update { cid, prev },
            (None, Some(prev)) => Change::Delete { prev },
            (None, None) => return Err("op_prev"),
        };
        Ok(InvertOp {
            path: op.path,
            change,
        })
    });
    let ops = ops.collect::<Result<Vec<_>, _>>()?;
    let before =
        mst::invert(&ops, signed.data, |cid| car.blocks().get(cid)).map_err(|_| "inversion")?;
    if Some(before) == commit.prev_data {
        Ok(())
    } else {
        Err("inversion")
    }
}

fn events(prepared: &Prepared) -> impl Iterator<Item = (u32, i64, &[u8])> {
    prepared
        .scripts
        .iter()
        .enumerate()
        .flat_map(|(host, script)| {
            script.iter().filter_map(move |due| match &due.act {
                Act::Step(Step::Event { seq, frame, .. }) => Some((host as u32, *seq, &frame[..])),
                _ => None,
            })
        })
}

fn keys(prepared: &Prepared) -> HashMap<&str, VerifyingKey> {
    let key =
        |did_key: String| VerifyingKey::new(&PublicKey::parse_did_key(&did_key).unwrap()).unwrap();
    prepared
        .profiles
        .iter()
        .map(|profile| (profile.did.as_str(), key(profile.key.did_key())))
        .collect()
}

#[test]
fn a_run_without_faults_verifies_throughout() {
    let prepared = prepared(FaultPlan::none());
    let keys = keys(&prepared);
    let mut kinds = HashMap::<&str, usize>::new();
    for (_, _, frame) in events(&prepared) {
        match frame::decode(frame).unwrap().message {
            Message::Commit(commit) => {
                assert_eq!(verdict(&commit, &keys[commit.repo]), Ok(()));
                *kinds
                    .entry(if commit.ops.len() == 1 {
                        "single"
                    } else {
                        "several"
                    })
                    .or_default() += 1;
            }
            _ => *kinds.entry("other").or_default() += 1,
        }
    }
    assert!(kinds["single"] > 340 && kinds["several"] > 10, "{kinds:?}");
    assert_eq!(
        (prepared.ledger().forward(), prepared.introduced()),
        (412, 12)
    );
}

#[test]
fn chains_and_sequences_have_no_holes_without_faults() {
    let prepared = prepared(FaultPlan::none());
    let (mut revs, mut seqs) = (HashMap::<String, String>::new(), HashMap::new());
    for introduction in prepared.introductions.iter().flatten() {
        let Step::Event { frame, .. } = introduction else {
            continue;
        };
        let Message::Sync(sync) = frame::decode(frame).unwrap().message else {
            panic!("introduced by a sync")
        };
        revs.insert(sync.did.to_owned(), sync.rev.to_owned());
    }
    for (host, seq, frame) in events(&prepared) {
        let last = seqs
            .insert(host, seq)
            .unwrap_or(prepared.introductions[host as usize].len() as i64);
        assert_eq!(seq, last + 1);
        if let Message::Commit(commit) = frame::decode(frame).unwrap().message {
            let since = revs.insert(commit.repo.to_owned(), commit.rev.to_owned());
            assert_eq!(commit.since, since.as_deref());
            assert!(since.is_some_and(|since| *since < *commit.rev));
        }
    }
}

#[test]
fn faulty_commits_fail_for_their_reason() {
    for fault in [Fault::BadSignature, Fault::WrongBlockHash, Fault::MissingOp] {
        let prepared = prepared(FaultPlan {
            faults: vec![fault],
            share: 0.2,
            interruptions: 0,
        });
        let Effect::Refused(rule) = fault.effect() else {
            unreachable!("these are refused")
        };
        let keys = keys(&prepared);
        let mut refused = 0;
        for (_, _, frame) in events(&prepared) {
            let Message::Commit(commit) = frame::decode(frame).unwrap().message else {
                continue;
            };
            if let Err(reason) = verdict(&commit, &keys[commit.repo]) {
                assert_eq!(reason, rule);
                refused += 1;
            }
        }
        assert!(refused > 20, "{fault} struck {refused} times");
        assert_eq!(prepared.ledger().refusals(), [(rule, refused)]);
        assert_eq!(prepared.injected().len(), refused);
        assert_eq!(
            prepared.ledger().forward(),
            412,
            "the good sisters still come"
        );
    }
}

#[test]
fn a_seed_gives_the_same_faults_again() {
    let faults = || prepared(FaultPlan::all(0.3, 8)).injected().to_vec();
    let (first, second) = (faults(), faults());
    assert_eq!(first, second);
    for fault in Fault::ALL {
        assert!(
            first.iter().any(|injected| injected.fault == fault),
            "{fault}"
        );
    }
}

#[test]
fn frames_have_the_sizes_of_the_network() {
    let options = LoadOptions {
        events: 3_000,
        accounts: 50,
        existing_records: 200,
        ..options(FaultPlan::none())
    };
    let prepared = Prepared::new(options, &|_, _| {});
    let (p50, p99) = (prepared.frame_size(50.0), prepared.frame_size(99.0));
    assert!((5_000..5_400).contains(&p50), "p50 {p50}");
    assert!((8_900..10_300).contains(&p99), "p99 {p99}");
}
