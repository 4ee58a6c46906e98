//! Captured frames against the rules: what real hosts sent passes, and nothing that was changed in it does. Keys are
//! given here; who asks for them and when is tested with the whole relay.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;

use crate::support::fixtures;
use atproto_relay::atproto::car::{self, Car};
use atproto_relay::atproto::cbor::Reader;
use atproto_relay::atproto::cid::{Cid, Codec};
use atproto_relay::atproto::commit::{self, SignedCommit};
use atproto_relay::atproto::did::Did;
use atproto_relay::atproto::did_doc::DidDocument;
use atproto_relay::atproto::frame::{self, Action, Commit, FrameError, Message, Op};
use atproto_relay::atproto::key::{PublicKey, VerifyingKey};
use atproto_relay::atproto::tid::Tid;
use atproto_relay::hosts::Rule;
use atproto_relay::verify::rules::{self, Facts, Strictness};
use atproto_relay::verify::signature::{self, Job};
use base64::Engine;
use base64::engine::general_purpose::STANDARD_NO_PAD;
use proptest::prelude::*;
use serde_json::Value;

/// The fields of a `#commit` that no signature, hash or inversion covers. `seq` is replaced on the way out; `time`,
/// `tooBig` and `rebase` say nothing of the repository; `since` is compared with the stored state, and where it differs
/// the chain counts as broken. (What is not known, and `blobs`, could be changed as well: these frames have none.)
const UNVERIFIED: [&str; 5] = ["rebase", "seq", "since", "time", "tooBig"];

/// A minute after the commit was made.
const AGE_US: u64 = 60_000_000;

#[derive(Debug, PartialEq, Eq)]
enum Refusal {
    /// Refused at decoding. Malformed frames close the connection.
    Frame {
        closes: bool,
    },
    /// Another kind of message than a commit.
    NoCommit,
    Rule(Rule),
}

impl From<Rule> for Refusal {
    fn from(rule: Rule) -> Self {
        Refusal::Rule(rule)
    }
}

impl From<FrameError> for Refusal {
    fn from(error: FrameError) -> Self {
        Refusal::Frame {
            closes: error.is_malformed(),
        }
    }
}

/// Keys by DID; any of them may have signed.
type Keys = BTreeMap<String, Vec<PublicKey>>;

/// A captured commit that passes, and the key that signed it.
struct Sample {
    name: String,
    frame: Vec<u8>,
    keys: Keys,
}

impl Sample {
    fn commit(&self) -> Commit<'_> {
        read_commit(&self.frame)
    }

    fn verdict(&self, frame: &[u8]) -> Result<Facts, Refusal> {
        verdict(frame, &self.keys, Strictness::Strict)
    }

    #[track_caller]
    fn assert_refused(&self, changed: &Commit<'_>, rule: Rule, what: &str) {
        let verdict = self.verdict(&frame::encode_commit(changed));
        assert_eq!(
            verdict.err(),
            Some(Refusal::Rule(rule)),
            "{}: {what}",
            self.name
        );
    }
}

fn read_commit(frame: &[u8]) -> Commit<'_> {
    match frame::decode(frame).unwrap().message {
        Message::Commit(commit) => commit,
        other => panic!("not a commit: {other:?}"),
    }
}

/// All that is verified of a commit without knowing of others of its account, soon after it was made.
fn verdict(frame: &[u8], keys: &Keys, strictness: Strictness) -> Result<Facts, Refusal> {
    let Message::Commit(commit) = frame::decode(frame)?.message else {
        return Err(Refusal::NoCommit);
    };
    let did = Did::normalized(commit.repo).map_err(|_| Rule::DidSyntax)?;
    rules::commit_size(&commit)?;
    let made = Tid::parse(commit.rev).map_or(0, Tid::micros);
    let rev = rules::rev(commit.rev, made + AGE_US)?;
    let facts = rules::commit(&commit, rev, strictness)?;
    let signed = keys.get(did.as_str()).is_some_and(|keys| {
        keys.iter().any(|key| {
            let key = VerifyingKey::new(key).unwrap();
            let job = Job {
                key: &key,
                signed: &facts.signed,
            };
            signature::verify(&[job]) == [true]
        })
    });
    if signed {
        Ok(facts)
    } else {
        Err(Rule::Signature.into())
    }
}

fn json(path: &Path) -> Value {
    serde_json::from_slice(&fs::read(path).unwrap()).unwrap()
}

fn text<'a>(value: &'a Value, field: &str) -> &'a str {
    value[field].as_str().unwrap()
}

fn link(value: &Value) -> Option<Cid> {
    let text = value.get("$link")?.as_str()?;
    Some(Cid::parse(text).unwrap())
}

/// The frame of a message in its JSON form. `blobs: null` of the fixtures becomes an empty list.
fn frame_from_json(kind: &str, body: &Value) -> Vec<u8> {
    let seq = body["seq"].as_i64().unwrap();
    let time = text(body, "time");
    match kind {
        "#identity" => frame::encode_identity(&frame::Identity {
            seq,
            did: text(body, "did"),
            time,
            handle: body["handle"].as_str(),
        }),
        "#account" => frame::encode_account(&frame::Account {
            seq,
            did: text(body, "did"),
            time,
            active: body["active"].as_bool().unwrap(),
            status: body["status"].as_str(),
        }),
        "#commit" => {
            let blocks = STANDARD_NO_PAD.decode(text(&body["blocks"], "$bytes"));
            let action = |value: &Value| match text(value, "action") {
                "create" => Action::Create,
                "update" => Action::Update,
                "delete" => Action::Delete,
                other => panic!("no action: {other}"),
            };
            let ops = body["ops"].as_array().unwrap().iter().map(|value| Op {
                action: action(value),
                path: text(value, "path"),
                cid: link(&value["cid"]),
                prev: link(&value["prev"]),
            });
            frame::encode_commit(&Commit {
                seq,
                repo: text(body, "repo"),
                rev: text(body, "rev"),
                since: body["since"].as_str(),
                commit: link(&body["commit"]).unwrap(),
                blocks: &blocks.unwrap(),
                ops: ops.collect(),
                prev_data: link(&body["prevData"]),
                time,
                too_big: body["tooBig"].as_bool().unwrap(),
                rebase: body["rebase"].as_bool().unwrap(),
            })
        }
        other => panic!("no kind of event: {other}"),
    }
}

/// Frames of the production network, with the keys that can have signed them.
fn production() -> Vec<Sample> {
    let Some(folder) = fixtures("horizon-frames") else {
        return Vec::new();
    };
    let expected = json(&folder.join("derived_expected.json"));
    let frames = expected["frames"].as_object().unwrap();
    let good = frames
        .iter()
        .filter(|(_, about)| about["trailing_bytes"] == false);
    let sample = |(name, about): (&String, &Value)| Sample {
        name: name.clone(),
        frame: fs::read(folder.join(name)).unwrap(),
        keys: candidates(about),
    };
    good.map(sample).collect()
}

fn candidates(about: &Value) -> Keys {
    let keys = about["signing_key_candidates_k256"].as_array().unwrap();
    let keys = keys
        .iter()
        .map(|key| PublicKey::parse_did_key(key.as_str().unwrap()).unwrap());
    Keys::from([(text(about, "did").to_owned(), keys.collect())])
}

/// The commits of two real PDSes whose key is still the one of the last DID document.
fn captured() -> Vec<Sample> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/real-pds");
    let mut keys = Keys::new();
    for entry in fs::read_dir(folder.join("diddocs")).unwrap() {
        let document = DidDocument::parse(&fs::read(entry.unwrap().path()).unwrap()).unwrap();
        if let Some(Ok(key)) = document.signing_key() {
            keys.insert(document.did().to_string(), vec![key]);
        }
    }
    let mut samples = Vec::new();
    for host in ["pds1", "pds2"] {
        let bytes = fs::read(folder.join(format!("{host}.frames"))).unwrap();
        let mut rest = &bytes[..];
        while let Some((length, tail)) = rest.split_first_chunk() {
            let (frame, tail) = tail.split_at(u32::from_be_bytes(*length) as usize);
            rest = tail;
            if verdict(frame, &keys, Strictness::Strict).is_ok() {
                samples.push(Sample {
                    name: format!("{host} {}", read_commit(frame).seq),
                    frame: frame.to_vec(),
                    keys: keys.clone(),
                });
            }
        }
    }
    samples
}

fn samples() -> Vec<Sample> {
    let mut samples = production();
    samples.extend(captured());
    samples
}

#[test]
fn production_frames_pass_strict_and_the_one_with_three_values_closes() {
    let Some(folder) = fixtures("horizon-frames") else {
        return;
    };
    let good = production();
    assert_eq!(good.len(), 21);
    for sample in &good {
        let facts = sample.verdict(&sample.frame);
        let facts = facts.unwrap_or_else(|refusal| panic!("{}: {refusal:?}", sample.name));
        let about = &json(&folder.join("derived_expected.json"))["frames"][&sample.name];
        assert_eq!(
            (
                facts.data.to_string(),
                facts.commit.to_string(),
                facts.rev.to_string()
            ),
            (
                text(about, "data").to_owned(),
                text(about, "commit").to_owned(),
                text(about, "rev").to_owned()
            )
        );
    }
    let adversarial = fs::read(folder.join("adversarial_three_values.bin")).unwrap();
    let closes = Refusal::Frame { closes: true };
    let keys = Keys::new();
    assert_eq!(
        verdict(&adversarial, &keys, Strictness::Lenient).err(),
        Some(closes)
    );
}

/// All commits of both hosts but those of the key that was rotated away and of the host that was left.
#[test]
fn captured_commits_pass_strict() {
    let passed = captured();
    assert!(passed.len() == 51, "{} commits", passed.len());
}

/// The bound on blocks is far from what hosts send.
#[test]
fn real_commits_have_a_small_part_of_the_blocks_that_may_be() {
    let mut most = 0;
    for sample in samples() {
        let commit = sample.commit();
        let blocks = Car::parse(commit.blocks).unwrap().blocks().len();
        let needed = 1 + commit.ops.len() * rules::BLOCKS_PER_OP / 4;
        assert!(blocks <= needed.max(12), "{}: {blocks}", sample.name);
        most = most.max(blocks);
    }
    println!("at most {most} blocks");
}

#[test]
fn frames_from_before_sync_1_1_pass_lenient_only() {
    let Some(folder) = fixtures("indigo-firehose-commits") else {
        return;
    };
    let keys = json(&folder.join("firehose_commit_keys.json"));
    let key = |(did, key): (&String, &Value)| {
        let key = PublicKey::parse_did_key(key.as_str()?).ok()?;
        Some((did.clone(), vec![key]))
    };
    let keys: Keys = keys.as_object().unwrap().iter().filter_map(key).collect();
    let mut frames = 0;
    for entry in fs::read_dir(&folder).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap().to_string_lossy().into_owned();
        if !name.starts_with("firehose_commit_4") {
            continue;
        }
        let frame = frame_from_json("#commit", &json(&path));
        let lenient = verdict(&frame, &keys, Strictness::Lenient);
        assert!(lenient.is_ok(), "{name}: {lenient:?}");
        let strict = verdict(&frame, &keys, Strictness::Strict).err();
        // Without `since` it looks like a first commit.
        let old =
            [Rule::PrevData, Rule::OpPrev, Rule::Inversion].map(|rule| Some(Refusal::Rule(rule)));
        assert!(old.contains(&strict), "{name}: {strict:?}");
        frames += 1;
    }
    assert_eq!(frames, 4);
}

/// Each message as labelled by the reference relay's own tests.
#[test]
fn scenarios_of_the_reference_relay_come_out_as_labelled() {
    let Some(folder) = fixtures("indigo-relay-scenarios") else {
        return;
    };
    let mut commits = 0;
    for (name, strictness) in [
        ("post_lifecycle.json", Strictness::Strict),
        ("legacy.json", Strictness::Lenient),
    ] {
        let scenario = json(&folder.join(name));
        assert_eq!(
            scenario["lenient"] == true,
            strictness == Strictness::Lenient
        );
        let identities = scenario["accounts"].as_array().unwrap().iter();
        let keys: Keys = identities
            .map(|account| {
                let identity = &account["identity"];
                let key = text(&identity["keys"]["atproto"], "publicKeyMultibase");
                let key = PublicKey::parse_multikey(key).unwrap();
                (text(identity, "did").to_owned(), vec![key])
            })
            .collect();
        let mut last: Option<Facts> = None;
        for message in scenario["messages"].as_array().unwrap() {
            let (kind, body) = (
                text(&message["frame"]["header"], "t"),
                &message["frame"]["body"],
            );
            let frame = frame_from_json(kind, body);
            assert!(frame::decode(&frame).is_ok());
            if kind != "#commit" {
                continue;
            }
            let checked = verdict(&frame, &keys, strictness).and_then(|facts| {
                rules::rev_order(facts.rev, last.as_ref().map(|last| last.rev))?;
                Ok(facts)
            });
            assert_eq!(
                checked.is_err(),
                message["drop"] == true,
                "{name}: {checked:?}"
            );
            last = checked.ok().or(last);
            commits += 1;
        }
    }
    assert_eq!(commits, 7);
}

/// Two oddities of production hosts. A time without a zone passes: `time` is any text. `since: ""` on a commit without
/// ops and without `prevData` is no first commit, so a strict host must say `prevData`; a lenient one need not, and its
/// commit counts as a break of the chain wherever a state is stored.
#[test]
fn oddities_of_production_hosts_follow_the_documented_policy() {
    let Some(folder) = fixtures("hydrant-frames") else {
        return;
    };
    let account = fs::read(folder.join("test_decode_account.bin")).unwrap();
    let Message::Account(account) = frame::decode(&account).unwrap().message else {
        panic!("an #account");
    };
    assert_eq!(
        (account.active, account.time),
        (true, "2026-02-24T14:05:20.5215469")
    );
    let frame = fs::read(folder.join("test_decode_commit_empty_since.bin")).unwrap();
    let commit = read_commit(&frame);
    assert_eq!(
        (commit.since, commit.ops.len(), commit.prev_data),
        (Some(""), 0, None)
    );
    // Its key is not known: everything but the signature holds.
    for (strictness, rule) in [
        (Strictness::Lenient, Rule::Signature),
        (Strictness::Strict, Rule::PrevData),
    ] {
        let refusal = verdict(&frame, &Keys::new(), strictness).err();
        assert_eq!(refusal, Some(Refusal::Rule(rule)));
    }
    let stored = (Tid::parse(commit.rev).unwrap(), commit.commit);
    assert_eq!(
        rules::chain(&commit, None::<(Tid, Cid)>),
        rules::Chain::Intact
    );
    assert_eq!(rules::chain(&commit, Some(stored)), rules::Chain::Broken);
}

#[test]
fn a_bad_block_hash_is_refused() {
    let Some(folder) = fixtures("atrium-commit-pair") else {
        return;
    };
    for (name, rule) in [
        // Its key is not known: everything but the signature holds.
        ("commit_body.cbor", Rule::Signature),
        ("commit_body_bad_block_hash.cbor", Rule::BlockHash),
    ] {
        let body = fs::read(folder.join(name)).unwrap();
        let frame = [&b"\xa2\x61t\x67#commit\x62op\x01"[..], &body].concat();
        let refusal = verdict(&frame, &Keys::new(), Strictness::Lenient).err();
        assert_eq!(refusal, Some(Refusal::Rule(rule)), "{name}");
    }
}

/// Another CAR in place of the commit's: its commit block goes through `edit`, and root and `commit` follow.
fn with_commit_block(
    commit: &Commit<'_>,
    edit: impl FnOnce(&SignedCommit<'_>) -> Vec<u8>,
) -> (Cid, Vec<u8>) {
    let car = Car::parse(commit.blocks).unwrap();
    let block = car.blocks().get(&commit.commit).unwrap();
    let edited = edit(&SignedCommit::parse(block).unwrap());
    let cid = Cid::of(Codec::DagCbor, &edited);
    let others = car
        .blocks()
        .iter()
        .filter(|(other, _)| *other != commit.commit);
    let blocks = std::iter::once((cid, &edited[..])).chain(others);
    (cid, car::write(&[cid], blocks))
}

/// One way to rewrite the signed commit, and the rule that refuses it.
type Rewrite<'a> = (&'a str, Rule, &'a dyn Fn(&SignedCommit<'_>) -> Vec<u8>);

#[test]
fn a_rewritten_commit_is_refused_under_the_right_rule() {
    let stranger = "did:plc:aaaaaaaaaaaaaaaaaaaaaaaa";
    for sample in samples() {
        let commit = sample.commit();
        let later = Tid::from_u64(Tid::parse(commit.rev).unwrap().to_u64() + 1).to_string();
        let flipped = |sig: &[u8], at: usize| {
            let mut sig = sig.to_vec();
            sig[at] ^= 1;
            sig
        };
        let rewrites: [Rewrite<'_>; 6] = [
            ("r", Rule::Signature, &|c| {
                commit::encode_signed(c.did, c.rev, &c.data, &flipped(c.sig, 5))
            }),
            ("s", Rule::Signature, &|c| {
                commit::encode_signed(c.did, c.rev, &c.data, &flipped(c.sig, 60))
            }),
            ("a short signature", Rule::CommitObject, &|c| {
                commit::encode_signed(c.did, c.rev, &c.data, &c.sig[1..])
            }),
            ("the DID", Rule::CommitEnvelope, &|c| {
                commit::encode_signed(stranger, c.rev, &c.data, c.sig)
            }),
            ("the rev", Rule::CommitEnvelope, &|c| {
                commit::encode_signed(c.did, &later, &c.data, c.sig)
            }),
            ("the tree", Rule::Inversion, &|c| {
                commit::encode_signed(c.did, c.rev, &Cid::of(Codec::DagCbor, b"tree"), c.sig)
            }),
        ];
        for (what, rule, rewrite) in rewrites {
            let (cid, blocks) = with_commit_block(&commit, rewrite);
            let changed = Commit {
                commit: cid,
                blocks: &blocks,
                ..commit.clone()
            };
            sample.assert_refused(&changed, rule, what);
        }
        // In the envelope as well: then only the signature tells.
        let (cid, blocks) = with_commit_block(&commit, |c| {
            commit::encode_signed(c.did, &later, &c.data, c.sig)
        });
        let changed = Commit {
            rev: &later,
            commit: cid,
            blocks: &blocks,
            ..commit.clone()
        };
        sample.assert_refused(&changed, Rule::Signature, "rev everywhere");
        let (cid, blocks) = with_commit_block(&commit, |c| {
            commit::encode_signed(stranger, c.rev, &c.data, c.sig)
        });
        let changed = Commit {
            repo: stranger,
            commit: cid,
            blocks: &blocks,
            ..commit.clone()
        };
        sample.assert_refused(&changed, Rule::Signature, "DID everywhere");
    }
}

#[test]
fn a_changed_envelope_is_refused_under_the_right_rule() {
    for sample in samples() {
        let commit = sample.commit();
        let other = Cid::of(Codec::DagCbor, b"other");
        let later = Tid::from_u64(Tid::parse(commit.rev).unwrap().to_u64() + 1).to_string();
        let changed_rev = Commit {
            rev: &later,
            ..commit.clone()
        };
        sample.assert_refused(&changed_rev, Rule::CommitEnvelope, "rev");
        let refused = |rule, what: &str, change: &dyn Fn(&mut Commit<'_>)| {
            let mut changed = commit.clone();
            change(&mut changed);
            if changed.ops.len() > rules::MAX_OPS {
                return;
            }
            sample.assert_refused(&changed, rule, what);
        };
        refused(Rule::CommitEnvelope, "DID", &|c| {
            c.repo = "did:plc:aaaaaaaaaaaaaaaaaaaaaaaa"
        });
        refused(Rule::CommitBlock, "commit", &|c| c.commit = other);
        refused(Rule::Inversion, "prevData", &|c| c.prev_data = Some(other));
        refused(
            Rule::OpRecord,
            "an op with a record that is not there",
            &|c| {
                c.ops.push(Op {
                    action: Action::Create,
                    path: "com.example.forged/1",
                    cid: Some(other),
                    prev: None,
                });
            },
        );
        refused(Rule::Inversion, "a deletion that did not happen", &|c| {
            c.ops.push(Op {
                action: Action::Delete,
                path: "com.example.forged/1",
                cid: None,
                prev: Some(other),
            });
        });
        for left_out in 0..commit.ops.len() {
            refused(Rule::Inversion, "an op left out", &|c| {
                c.ops.remove(left_out);
            });
            refused(Rule::OpPath, "a path", &|c| {
                c.ops[left_out].path = "no path"
            });
        }
        if let Some(at) = commit.ops.iter().position(|op| op.action == Action::Create) {
            refused(Rule::Inversion, "an op added", &|c| {
                let mut added = c.ops[at];
                added.path = "com.example.forged/1";
                c.ops.push(added);
            });
            refused(Rule::Inversion, "a record under another path", &|c| {
                c.ops[at].path = "com.example.forged/1";
            });
        }
        if commit.since.is_some() {
            refused(Rule::PrevData, "no prevData", &|c| c.prev_data = None);
        }
    }
}

/// One byte changed in the frame as it lies: in each block's data, and in the signature.
#[test]
fn a_changed_block_is_refused_for_its_hash() {
    for sample in samples() {
        let commit = sample.commit();
        let car = Car::parse(commit.blocks).unwrap();
        let signed = SignedCommit::parse(car.blocks().get(&commit.commit).unwrap()).unwrap();
        let offset = |part: &[u8]| part.as_ptr() as usize - sample.frame.as_ptr() as usize;
        let last_bytes = car
            .blocks()
            .iter()
            .map(|(_, data)| offset(data) + data.len() - 1);
        for at in last_bytes.chain([offset(signed.sig) + 9]) {
            let mut changed = sample.frame.clone();
            changed[at] ^= 1;
            let refusal = sample.verdict(&changed).err();
            assert_eq!(
                refusal,
                Some(Rule::BlockHash.into()),
                "{} byte {at}",
                sample.name
            );
        }
    }
}

/// The field of the body that each byte belongs to, ops by the fields of their maps; header and map heads are `""`.
fn fields(frame: &[u8]) -> Vec<String> {
    let mut names = vec![String::new(); frame.len()];
    let mut reader = Reader::new(frame);
    reader.skip().unwrap();
    let mut entries = reader.map().unwrap();
    let mut from = reader.position();
    while let Some(key) = entries.next_key(&mut reader).unwrap() {
        if key == "ops" {
            names[from..reader.position()].fill("ops".to_owned());
            let mut items = reader.array().unwrap();
            while items.next_item(&mut reader) {
                let mut op = reader.map().unwrap();
                let mut from = reader.position();
                while let Some(key) = op.next_key(&mut reader).unwrap() {
                    reader.skip().unwrap();
                    names[from..reader.position()].fill(format!("ops/{key}"));
                    from = reader.position();
                }
            }
        } else {
            reader.skip().unwrap();
            names[from..reader.position()].fill(key.to_owned());
        }
        from = reader.position();
    }
    names
}

/// Every bit of the shortest frames.
#[test]
fn every_changed_bit_is_noticed_outside_the_unverified_fields() {
    let mut samples = samples();
    samples.retain(|sample| sample.commit().since.is_some());
    samples.sort_by_key(|sample| sample.frame.len());
    samples.truncate(4);
    let mut passed = BTreeSet::new();
    for sample in &samples {
        let names = fields(&sample.frame);
        let mut changed = sample.frame.clone();
        for (at, name) in names.iter().enumerate() {
            for bit in 0..8 {
                changed[at] ^= 1 << bit;
                if sample.verdict(&changed).is_ok() {
                    passed.insert(name.as_str().to_owned());
                }
                changed[at] ^= 1 << bit;
            }
        }
    }
    assert_eq!(passed, UNVERIFIED.map(str::to_owned).into());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2_000))]

    #[test]
    fn a_changed_byte_passes_in_unverified_fields_only(
        sample in any::<prop::sample::Index>(),
        at in any::<prop::sample::Index>(),
        change in 1..=u8::MAX,
    ) {
        static SAMPLES: std::sync::LazyLock<Vec<Sample>> = std::sync::LazyLock::new(samples);
        let sample = sample.get(&SAMPLES);
        let at = at.index(sample.frame.len());
        let mut changed = sample.frame.clone();
        changed[at] ^= change;
        if sample.verdict(&changed).is_ok() {
            let names = fields(&sample.frame);
            prop_assert!(UNVERIFIED.contains(&names[at].as_str()), "byte {at} of {}: {:?}", sample.name, names[at]);
        }
    }
}
