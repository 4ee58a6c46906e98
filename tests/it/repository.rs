//! Keys, DID documents, commits and trees against data that others made: the fixture sets named in
//! each test. Where a set is not on this machine, its test says so and passes.

use crate::support;
use std::collections::{HashMap, HashSet};
use std::path::Path;

use atproto_relay::atproto::car::Car;
use atproto_relay::atproto::cid::Cid;
use atproto_relay::atproto::commit::SignedCommit;
use atproto_relay::atproto::did_doc::DidDocument;
use atproto_relay::atproto::frame::{self, Action, Message};
use atproto_relay::atproto::key::{Curve, PublicKey, SignatureError, VerifyingKey};
use atproto_relay::atproto::mst::{self, Change, InvertOp, MstError, Tree, Visit};
use data_encoding::{BASE64_NOPAD, HEXLOWER};
use serde_json::Value;

fn json(path: impl AsRef<Path>) -> Value {
    let path = path.as_ref();
    let text = std::fs::read(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    serde_json::from_slice(&text).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

fn text<'a>(value: &'a Value, field: &str) -> &'a str {
    value[field]
        .as_str()
        .unwrap_or_else(|| panic!("{field} in {value}"))
}

fn list<'a>(value: &'a Value, field: &str) -> &'a [Value] {
    value[field]
        .as_array()
        .unwrap_or_else(|| panic!("{field} in {value}"))
}

fn cid(value: &Value) -> Cid {
    Cid::parse(value.as_str().expect("a CID as text")).expect("a CID")
}

fn cids(value: &Value, field: &str) -> HashSet<Cid> {
    list(value, field).iter().map(cid).collect()
}

fn verifying_key(key: &PublicKey) -> VerifyingKey {
    VerifyingKey::new(key).expect("a point on its curve")
}

#[test]
fn interop_signatures_verify_as_labelled() {
    let Some(set) = support::fixtures("atproto-interop-tests") else {
        return;
    };
    let cases = json(set.join("crypto/signature-fixtures.json"));
    for case in cases.as_array().unwrap() {
        let key = PublicKey::parse_did_key(text(case, "publicKeyDid")).unwrap();
        let older = PublicKey::from_verification_method(
            text(case, "didDocSuite"),
            text(case, "publicKeyMultibase"),
        );
        assert_eq!(older, Ok(key));
        let decode =
            |field| BASE64_NOPAD.decode(text(case, field).trim_end_matches('=').as_bytes());
        let (message, signature) = (
            decode("messageBase64").unwrap(),
            decode("signatureBase64").unwrap(),
        );
        let verified = verifying_key(&key).verify(&message, &signature);
        let comment = text(case, "comment");
        assert_eq!(
            verified.is_ok(),
            case["validSignature"].as_bool().unwrap(),
            "{comment}"
        );
        let tags = list(case, "tags");
        if tags.iter().any(|tag| tag == "high-s") {
            assert_eq!(verified, Err(SignatureError::HighS), "{comment}");
        } else if tags.iter().any(|tag| tag == "der-encoded") {
            assert!(
                matches!(verified, Err(SignatureError::Length(_))),
                "{comment}"
            );
        }
    }
}

#[cfg(feature = "devnet")]
#[test]
fn interop_did_keys_belong_to_their_secrets() {
    let Some(set) = support::fixtures("atproto-interop-tests") else {
        return;
    };
    for case in json(set.join("crypto/w3c_didkey_K256.json"))
        .as_array()
        .unwrap()
    {
        let secret = HEXLOWER
            .decode(text(case, "privateKeyBytesHex").as_bytes())
            .unwrap();
        let secret = k256::ecdsa::SigningKey::from_slice(&secret).unwrap();
        let point = secret.verifying_key().to_encoded_point(false);
        let key = PublicKey::from_sec1(Curve::K256, point.as_bytes()).unwrap();
        assert_eq!(key.to_did_key(), text(case, "publicDidKey"));
    }
    for case in json(set.join("crypto/w3c_didkey_P256.json"))
        .as_array()
        .unwrap()
    {
        let secret = bs58::decode(text(case, "privateKeyBytesBase58"))
            .into_vec()
            .unwrap();
        let secret = p256::ecdsa::SigningKey::from_slice(&secret).unwrap();
        let point = secret.verifying_key().to_encoded_point(false);
        let key = PublicKey::from_sec1(Curve::P256, point.as_bytes()).unwrap();
        assert_eq!(key.to_did_key(), text(case, "publicDidKey"));
    }
}

/// What the k256 and p256 crates say about a signature, with low-S asked for in addition.
#[cfg(feature = "devnet")]
fn second_opinion(key: &PublicKey, message: &[u8], signature: &[u8]) -> bool {
    use k256::ecdsa::signature::Verifier;
    match key.curve() {
        Curve::K256 => k256::ecdsa::Signature::from_slice(signature).is_ok_and(|signature| {
            let key = k256::ecdsa::VerifyingKey::from_sec1_bytes(key.compressed()).unwrap();
            signature.normalize_s().is_none() && key.verify(message, &signature).is_ok()
        }),
        Curve::P256 => p256::ecdsa::Signature::from_slice(signature).is_ok_and(|signature| {
            let key = p256::ecdsa::VerifyingKey::from_sec1_bytes(key.compressed()).unwrap();
            signature.normalize_s().is_none() && key.verify(message, &signature).is_ok()
        }),
    }
}

#[test]
fn wycheproof_signatures_are_accepted_only_when_valid_and_low() {
    let Some(set) = support::fixtures("wycheproof") else {
        return;
    };
    let (mut accepted, mut high, mut invalid) = (0, 0, 0);
    for (curve, name) in [(Curve::K256, "secp256k1"), (Curve::P256, "secp256r1")] {
        let suite = json(set.join(format!("ecdsa_{name}_sha256_p1363_test.json")));
        for group in list(&suite, "testGroups") {
            let point = HEXLOWER.decode(text(&group["publicKey"], "uncompressed").as_bytes());
            let key = PublicKey::from_sec1(curve, &point.unwrap()).unwrap();
            let verifying = verifying_key(&key);
            for case in list(group, "tests") {
                let message = HEXLOWER.decode(text(case, "msg").as_bytes()).unwrap();
                let signature = HEXLOWER.decode(text(case, "sig").as_bytes()).unwrap();
                let verdict = verifying.verify(&message, &signature);
                #[cfg(feature = "devnet")]
                assert_eq!(
                    verdict.is_ok(),
                    second_opinion(&key, &message, &signature),
                    "{case}"
                );
                match (text(case, "result"), verdict) {
                    ("valid", Ok(())) => accepted += 1,
                    ("valid", Err(SignatureError::HighS)) => high += 1,
                    ("invalid", Err(_)) => invalid += 1,
                    (_, verdict) => panic!("{verdict:?} for {name} {case}"),
                }
            }
        }
    }
    assert_eq!((accepted, high, invalid), (198, 142, 174));
}

#[cfg(feature = "devnet")]
mod signatures {
    //! Differential: signatures made by k256 and p256, whole and damaged.

    use super::*;
    use k256::ecdsa::signature::Signer;
    use proptest::prelude::*;

    fn k256_pair(secret: &[u8; 32], message: &[u8]) -> Option<(PublicKey, [u8; 64])> {
        let secret = k256::ecdsa::SigningKey::from_slice(secret).ok()?;
        let point = secret.verifying_key().to_encoded_point(true);
        let signature: k256::ecdsa::Signature = secret.sign(message);
        let signature = signature.normalize_s().unwrap_or(signature);
        let key = PublicKey::from_sec1(Curve::K256, point.as_bytes()).unwrap();
        Some((key, signature.to_bytes().into()))
    }

    fn p256_pair(secret: &[u8; 32], message: &[u8]) -> Option<(PublicKey, [u8; 64])> {
        let secret = p256::ecdsa::SigningKey::from_slice(secret).ok()?;
        let point = secret.verifying_key().to_encoded_point(true);
        let signature: p256::ecdsa::Signature = secret.sign(message);
        let signature = signature.normalize_s().unwrap_or(signature);
        let key = PublicKey::from_sec1(Curve::P256, point.as_bytes()).unwrap();
        Some((key, signature.to_bytes().into()))
    }

    fn order(curve: Curve) -> [u8; 32] {
        let hex = match curve {
            Curve::K256 => "fffffffffffffffffffffffffffffffebaaedce6af48a03bbfd25e8cd0364141",
            Curve::P256 => "ffffffff00000000ffffffffffffffffbce6faada7179e84f3b9cac2fc632551",
        };
        HEXLOWER.decode(hex.as_bytes()).unwrap().try_into().unwrap()
    }

    /// The other signature for the same message: s replaced by the curve's order minus s.
    fn with_other_s(curve: Curve, mut signature: [u8; 64]) -> [u8; 64] {
        let order = order(curve);
        let mut borrow = 0;
        for at in (0..32).rev() {
            let difference = i16::from(order[at]) - i16::from(signature[32 + at]) - borrow;
            borrow = i16::from(difference < 0);
            signature[32 + at] = difference.rem_euclid(256) as u8;
        }
        signature
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 64, failure_persistence: None, ..ProptestConfig::default() })]

        #[test]
        fn good_ones_verify_and_damaged_ones_do_not(
            secret in any::<[u8; 32]>(),
            message in proptest::collection::vec(any::<u8>(), 0..300),
            at in 0..64_usize,
            flip in 1..=255_u8,
        ) {
            for pair in [k256_pair(&secret, &message), p256_pair(&secret, &message)] {
                let Some((key, signature)) = pair else { continue };
                let verifying = verifying_key(&key);
                prop_assert_eq!(verifying.verify(&message, &signature), Ok(()));

                let high = with_other_s(key.curve(), signature);
                prop_assert_eq!(verifying.verify(&message, &high), Err(SignatureError::HighS));

                let mut damaged = signature;
                damaged[at] ^= flip;
                let verdict = verifying.verify(&message, &damaged).is_ok();
                prop_assert!(!verdict);
                prop_assert_eq!(verdict, second_opinion(&key, &message, &damaged));

                let mut other = message.clone();
                other.push(0);
                prop_assert_eq!(verifying.verify(&other, &signature), Err(SignatureError::Mismatch));
            }
        }
    }
}

#[test]
fn indigo_did_documents_are_read() {
    let Some(set) = support::fixtures("indigo-did-docs") else {
        return;
    };
    let read = |name: &str| DidDocument::parse(&std::fs::read(set.join(name)).unwrap()).unwrap();
    for name in ["did_plc_doc.json", "did_plc_doc_legacy.json"] {
        let document = read(name);
        assert_eq!(document.did(), "did:plc:ewvi7nxzyoun6zhxrhs64oiz");
        assert_eq!(document.handles(), ["atproto.com"]);
        assert_eq!(
            document.pds_endpoint().unwrap().as_str(),
            "https://bsky.social/"
        );
        let key = document.signing_key().unwrap().unwrap();
        assert_eq!(
            key.to_multikey(),
            "zQ3shXjHeiBuRCKmM36cuYnm7YEMzhGnCmCyW92sRJ9pribSF",
            "{name}"
        );
    }
    let service = read("did_web_doc.json");
    assert_eq!(service.did(), "did:web:discover.bsky.social");
    assert!(service.handles().is_empty());
    assert_eq!(service.signing_key(), None);
    assert_eq!(service.pds_endpoint(), None);
}

#[test]
fn both_styles_of_a_document_say_the_same() {
    let Some(set) = support::fixtures("real-pds") else {
        return;
    };
    let mut read = 0;
    for entry in std::fs::read_dir(set.join("diddocs")).unwrap() {
        let path = entry.unwrap().path();
        let legacy = set.join("diddocs-legacy").join(path.file_name().unwrap());
        let document = DidDocument::parse(&std::fs::read(&path).unwrap()).unwrap();
        let legacy = DidDocument::parse(&std::fs::read(legacy).unwrap()).unwrap();
        assert_eq!(document, legacy, "{}", path.display());
        assert!(document.signing_key().is_some_and(|key| key.is_ok()));
        assert!(
            document
                .pds_endpoint()
                .is_some_and(|url| url.as_str().starts_with("http://localhost:258"))
        );
        assert_eq!(document.handles().len(), 1);
        read += 1;
    }
    assert_eq!(read, 8);
}

#[test]
fn interop_key_heights_are_ours() {
    let Some(set) = support::fixtures("atproto-interop-tests") else {
        return;
    };
    for case in json(set.join("mst/key_heights.json")).as_array().unwrap() {
        let height = u64::from(mst::height(text(case, "key").as_bytes()));
        assert_eq!(Some(height), case["height"].as_u64(), "{case}");
    }
    // The example keys A0/…, B1/…: the digit after the letter is the height.
    for key in std::fs::read_to_string(set.join("mst/example_keys.txt"))
        .unwrap()
        .lines()
    {
        let height = mst::height(key.as_bytes());
        assert_eq!(key.as_bytes()[1] - b'0', height, "{key}");
    }
}

#[test]
fn interop_commit_proofs_carry_the_expected_blocks() {
    let Some(set) = support::fixtures("atproto-interop-tests") else {
        return;
    };
    let cases = json(set.join("firehose/commit-proof-fixtures.json"));
    for case in cases.as_array().unwrap() {
        let comment = text(case, "comment");
        let leaf = cid(&case["leafValue"]);
        let keys = |field| list(case, field).iter().map(|key| key.as_str().unwrap());
        let mut tree = Tree::from_records(keys("keys").map(|key| (key, leaf))).unwrap();
        let adds = keys("adds").map(|path| InvertOp {
            path,
            change: Change::Create { cid: leaf },
        });
        let dels = keys("dels").map(|path| InvertOp {
            path,
            change: Change::Delete { prev: leaf },
        });
        let ops: Vec<_> = adds.chain(dels).collect();
        let diff = tree.apply(&ops).unwrap();
        assert_eq!(diff.before, cid(&case["rootBeforeCommit"]), "{comment}");
        assert_eq!(diff.after, cid(&case["rootAfterCommit"]), "{comment}");

        let expected = cids(case, "blocksInProof");
        let carried: HashMap<_, _> = diff.blocks.into_iter().collect();
        for cid in &expected {
            assert!(carried.contains_key(cid), "{comment}: {cid} is not carried");
        }
        let only_expected = |cid: &Cid| carried.get(cid).filter(|_| expected.contains(cid));
        let root = mst::invert(&ops, diff.after, |cid| {
            only_expected(cid).map(Vec::as_slice)
        });
        assert_eq!(root, Ok(diff.before), "{comment}");
    }
}

struct Suite {
    cars: HashMap<String, Vec<u8>>,
    cases: Vec<Value>,
}

fn mst_suite(set: &Path) -> Suite {
    let packed = std::fs::File::open(set.join("mst-test-suite.tar.zst")).unwrap();
    let mut archive = tar::Archive::new(zstd::Decoder::new(packed).unwrap());
    let mut suite = Suite {
        cars: HashMap::new(),
        cases: Vec::new(),
    };
    for entry in archive.entries().unwrap() {
        let mut entry = entry.unwrap();
        let path = entry.path().unwrap().to_string_lossy().into_owned();
        let mut bytes = Vec::new();
        std::io::Read::read_to_end(&mut entry, &mut bytes).unwrap();
        if path.ends_with(".car") {
            suite
                .cars
                .insert(path.trim_start_matches("./").to_owned(), bytes);
        } else if path.ends_with(".json") {
            suite.cases.push(serde_json::from_slice(&bytes).unwrap());
        }
    }
    suite
}

fn suite_ops<'a>(results: &'a Value) -> Vec<InvertOp<'a>> {
    let op = |op: &'a Value| {
        let change = match (&op["old_value"], &op["new_value"]) {
            (Value::Null, new) => Change::Create { cid: cid(new) },
            (old, Value::Null) => Change::Delete { prev: cid(old) },
            (old, new) => Change::Update {
                cid: cid(new),
                prev: cid(old),
            },
        };
        InvertOp {
            path: text(op, "rpath"),
            change,
        }
    };
    list(results, "record_ops").iter().map(op).collect()
}

#[test]
fn every_diff_of_the_mst_test_suite_inverts() {
    let Some(set) = support::fixtures("mst-test-suite") else {
        return;
    };
    let suite = mst_suite(&set);
    assert_eq!((suite.cars.len(), suite.cases.len()), (128, 16_384));
    let cars: HashMap<&str, Repo> = suite
        .cars
        .iter()
        .map(|(name, bytes)| (name.as_str(), Repo::read(bytes)))
        .collect();
    for case in &suite.cases {
        let car = |name| &cars[text(&case["inputs"], name).trim_start_matches("./")];
        let (before, after) = (car("mst_a"), car("mst_b"));
        let description = text(case, "description");
        let results = &case["results"];
        let ops = suite_ops(results);

        let inductive = cids(results, "inductive_proof_nodes");
        let from_proof = mst::invert(&ops, after.root, |cid| {
            after.block(cid).filter(|_| inductive.contains(cid))
        });
        assert_eq!(from_proof, Ok(before.root), "{description}");

        let mut tree = before.tree();
        let diff = tree.apply(&ops).unwrap();
        assert_eq!(
            (diff.before, diff.after),
            (before.root, after.root),
            "{description}"
        );
        let carried: HashSet<Cid> = diff.blocks.iter().map(|(cid, _)| *cid).collect();
        assert!(carried.is_superset(&inductive), "{description}");
        assert!(
            carried.is_superset(&cids(results, "created_nodes")),
            "{description}"
        );
        for (cid, block) in &diff.blocks {
            assert_eq!(after.block(cid), Some(block.as_slice()), "{description}");
        }
        for op in &ops {
            let proof: HashMap<_, _> = tree
                .proof(op.path.as_bytes())
                .unwrap()
                .into_iter()
                .collect();
            let found = mst::read(op.path.as_bytes(), after.root, |cid| {
                proof.get(cid).map(Vec::as_slice)
            });
            let expected = match op.change {
                Change::Create { cid } | Change::Update { cid, .. } => Some(cid),
                Change::Delete { .. } => None,
            };
            assert_eq!(found, Ok(expected), "{description}");
        }
    }
}

/// The blocks of a CAR file, and its first root, as our reader and the iroh-car crate agree.
struct Repo {
    root: Cid,
    blocks: HashMap<Cid, Vec<u8>>,
}

impl Repo {
    fn read(bytes: &[u8]) -> Self {
        let ours = |cid: &cid::Cid| Cid::from_bytes(&cid.to_bytes()).unwrap();
        let runtime = tokio::runtime::Builder::new_current_thread()
            .build()
            .unwrap();
        runtime.block_on(async {
            let mut car = iroh_car::CarReader::new(bytes).await.unwrap();
            let root = ours(&car.header().roots()[0]);
            let mut blocks = HashMap::new();
            while let Some((cid, block)) = car.next_block().await.unwrap() {
                blocks.insert(ours(&cid), block);
            }
            let read = Car::parse(bytes).unwrap();
            assert_eq!(read.roots()[0], root);
            assert!(blocks.keys().all(|cid| read.blocks().contains(cid)));
            for (cid, block) in read.blocks().iter() {
                assert_eq!(blocks.get(&cid).map(Vec::as_slice), Some(block));
            }
            Self { root, blocks }
        })
    }

    fn open(path: impl AsRef<Path>) -> Self {
        let bytes = std::fs::read(path).unwrap();
        Car::parse(&bytes).unwrap().verify_hashes().unwrap();
        Self::read(&bytes)
    }

    fn block(&self, cid: &Cid) -> Option<&[u8]> {
        self.blocks.get(cid).map(Vec::as_slice)
    }

    /// The tree whose root is the CAR's root.
    fn tree(&self) -> Tree {
        Tree::load(self.root, |cid| self.block(cid)).unwrap()
    }

    /// The signed commit, in the CAR's root.
    fn commit(&self) -> SignedCommit<'_> {
        SignedCommit::parse(self.block(&self.root).unwrap()).unwrap()
    }

    /// The tree of the signed commit.
    fn commit_tree(&self) -> Tree {
        let mut tree = Tree::load(self.commit().data, |cid| self.block(cid)).unwrap();
        assert_eq!(tree.root_cid(), self.commit().data);
        tree
    }

    /// Reads the whole repository: every record is there, the walk gives every node as it lies in
    /// the CAR, and the records alone give the same tree again. Returns the number of records.
    fn check_whole(&self) -> usize {
        let mut tree = self.commit_tree();
        let mut records = Vec::new();
        for visit in tree.walk() {
            match visit {
                Visit::Node(node) => {
                    assert_eq!(self.block(&node.cid()), Some(node.block().as_slice()));
                }
                Visit::Record { path, cid } => {
                    assert!(self.block(&cid).is_some(), "record {cid}");
                    records.push((path.to_vec(), cid));
                }
                Visit::Missing(cid) => panic!("node {cid} is missing"),
            }
        }
        let mut again = Tree::from_records(records.iter().rev().cloned()).unwrap();
        assert_eq!(again.root_cid(), self.commit().data);
        records.len()
    }
}

fn document_key(path: impl AsRef<Path>) -> VerifyingKey {
    let document = DidDocument::parse(&std::fs::read(path).unwrap()).unwrap();
    verifying_key(&document.signing_key().unwrap().unwrap())
}

#[test]
fn indigo_repositories_are_read_and_their_signatures_judged() {
    let Some(set) = support::fixtures("indigo-repos") else {
        return;
    };
    let staging = "bafyreieovfuizojpw3zresz7sx3nk4trm2by23pt5rxbey3jme4uo5ogiu.car";
    let cases = [
        (
            staging,
            "did_plc_z5vnbioquyhivxirw3bbljmu",
            6,
            Err(SignatureError::Mismatch),
        ),
        (
            "fakermaker.repo.car",
            "fakermaker",
            142,
            Err(SignatureError::HighS),
        ),
        ("greenground.repo.car", "greenground", 2, Ok(())),
        ("paul_staging.repo.car", "paul_staging", 185, Ok(())),
        // Signed by the server's key, which greenground's document names as well.
        ("divy.repo", "greenground", 6, Ok(())),
    ];
    for (car, document, records, verdict) in cases {
        let repo = Repo::open(set.join(car));
        assert_eq!(repo.check_whole(), records, "{car}");
        let key = document_key(set.join(format!("{document}.didDoc.json")));
        assert_eq!(repo.commit().verify_signature(&key), verdict, "{car}");
    }
    let slice = Repo::open(set.join("repo_slice.car"));
    assert_eq!(slice.commit_tree().records().count(), 5);
}

#[test]
fn streamed_repositories_are_read() {
    let Some(set) = support::fixtures("repo-stream-cars") else {
        return;
    };
    for (car, records) in [("empty", 0), ("tiny", 8), ("little", 278)] {
        let repo = Repo::open(set.join(format!("{car}.car")));
        assert_eq!(repo.check_whole(), records, "{car}");
    }
}

#[test]
fn slices_prove_what_they_hold_and_what_is_absent() {
    let Some(set) = support::fixtures("repo-stream-cars") else {
        return;
    };
    let cases = [
        ("slice-node-after", Some("app.bsky.feed.like/3mcqqwzsc7x26")),
        (
            "slice-node-first-key",
            Some("app.bsky.feed.like/3lohfzs6qea24"),
        ),
        ("slice-one", Some("app.bsky.feed.like/3mcg72x6bi32z")),
        ("slice-proving-absence", None),
    ];
    for (car, held) in cases {
        let repo = Repo::open(set.join(format!("{car}.car")));
        let root = repo.commit().data;
        let read = |path: &str| mst::read(path.as_bytes(), root, |cid| repo.block(cid));
        let mut tree = repo.commit_tree();
        assert!(
            tree.walk().any(|visit| matches!(visit, Visit::Missing(_))),
            "{car}"
        );
        let records: Vec<_> = tree
            .records()
            .map(|(path, cid)| (path.to_vec(), cid))
            .collect();
        let with_block: Vec<_> = records
            .iter()
            .filter(|(_, cid)| repo.block(cid).is_some())
            .collect();
        assert_eq!(with_block.len(), usize::from(held.is_some()), "{car}");
        if let Some(path) = held {
            assert_eq!(read(path), Ok(Some(with_block[0].1)), "{car}");
        }
        // A path right behind a record at hand is provably absent, or cannot be told.
        let behind = records.iter().flat_map(|(path, _)| {
            let path = String::from_utf8_lossy(path).into_owned();
            (0..10).map(move |digit| format!("{path}{digit}"))
        });
        let mut absent = 0;
        for path in behind {
            match read(&path) {
                Ok(None) => absent += 1,
                Err(MstError::MissingNode(_)) => {}
                other => panic!("{car}: {other:?} for {path}"),
            }
        }
        assert!(absent > 0 || held.is_some(), "{car}");
    }
}

#[test]
fn real_repositories_are_read_and_verify() {
    let Some(set) = support::fixtures("real-pds") else {
        return;
    };
    for entry in std::fs::read_dir(set.join("cars")).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap().to_string_lossy().into_owned();
        let account = name.split('@').next().unwrap();
        let repo = Repo::open(&path);
        assert!(repo.check_whole() > 0, "{name}");
        let commit = repo.commit();
        for style in ["diddocs", "diddocs-legacy"] {
            let key = document_key(set.join(style).join(format!("{account}.json")));
            assert_eq!(commit.verify_signature(&key), Ok(()), "{name}");
        }
    }
}

/// A commit event as it goes through the relay: its frame, its CAR, its signed commit.
struct CommitEvent<'a> {
    message: frame::Commit<'a>,
    car: Car<'a>,
}

impl<'a> CommitEvent<'a> {
    fn read(bytes: &'a [u8]) -> Option<Self> {
        let Message::Commit(message) = frame::decode(bytes).unwrap().message else {
            return None;
        };
        let car = Car::parse(message.blocks).unwrap();
        assert_eq!(car.roots().first(), Some(&message.commit));
        Some(Self { message, car })
    }

    fn commit(&self) -> SignedCommit<'a> {
        let commit =
            SignedCommit::parse(self.car.blocks().get(&self.message.commit).unwrap()).unwrap();
        assert_eq!(
            (commit.did, commit.rev),
            (self.message.repo, self.message.rev)
        );
        commit
    }

    fn ops(&self) -> Vec<InvertOp<'a>> {
        let op = |op: &frame::Op<'a>| {
            let change = match (op.action, op.cid, op.prev) {
                (Action::Create, Some(cid), None) => Change::Create { cid },
                (Action::Update, Some(cid), Some(prev)) => Change::Update { cid, prev },
                (Action::Delete, None, Some(prev)) => Change::Delete { prev },
                _ => panic!("{op:?}"),
            };
            InvertOp {
                path: op.path,
                change,
            }
        };
        self.message.ops.iter().map(op).collect()
    }

    fn inverted(&self) -> Cid {
        mst::invert(&self.ops(), self.commit().data, |cid| {
            self.car.blocks().get(cid)
        })
        .unwrap()
    }
}

#[test]
fn production_commits_invert_and_verify() {
    let Some(set) = support::fixtures("horizon-frames") else {
        return;
    };
    let expected = json(set.join("derived_expected.json"));
    let mut checked = 0;
    for (name, facts) in expected["frames"].as_object().unwrap() {
        let bytes = std::fs::read(set.join(name)).unwrap();
        if facts["trailing_bytes"] == true {
            assert!(frame::decode(&bytes).is_err(), "{name}");
            continue;
        }
        let event = CommitEvent::read(&bytes).unwrap();
        event.car.verify_hashes().unwrap();
        assert_eq!(event.inverted(), cid(&facts["prevData"]), "{name}");
        assert_eq!(event.message.prev_data, Some(event.inverted()), "{name}");
        let commit = event.commit();
        assert_eq!(commit.did, text(facts, "did"), "{name}");
        assert_eq!(commit.data, cid(&facts["data"]), "{name}");
        for key in list(facts, "signing_key_candidates_k256") {
            let key = PublicKey::parse_did_key(key.as_str().unwrap()).unwrap();
            assert_eq!(
                commit.verify_signature(&verifying_key(&key)),
                Ok(()),
                "{name}"
            );
        }
        checked += 1;
    }
    assert_eq!(checked, 21);
}

#[test]
fn commits_of_real_hosts_invert() {
    let Some(set) = support::fixtures("real-pds") else {
        return;
    };
    let (mut inverted, mut first) = (0, 0);
    for host in ["pds1.frames", "pds2.frames"] {
        let captured = std::fs::read(set.join(host)).unwrap();
        let mut rest = captured.as_slice();
        while let Some((len, after)) = rest.split_first_chunk() {
            let (bytes, after) = after.split_at(u32::from_be_bytes(*len) as usize);
            rest = after;
            let Some(event) = CommitEvent::read(bytes) else {
                continue;
            };
            event.car.verify_hashes().unwrap();
            let expected = event.message.prev_data.unwrap_or_else(mst::empty_root);
            assert_eq!(event.inverted(), expected, "{host} {}", event.message.seq);
            match event.message.prev_data {
                Some(_) => inverted += 1,
                None => first += 1,
            }
        }
    }
    assert_eq!((inverted, first), (54, 8));
}

#[test]
fn a_block_under_a_wrong_hash_is_found() {
    let Some(set) = support::fixtures("atrium-commit-pair") else {
        return;
    };
    // The pair are bodies; this is the header that goes before them.
    let header = b"\xa2atg#commitbop\x01";
    let framed = |name: &str| [&header[..], &std::fs::read(set.join(name)).unwrap()].concat();
    let good = framed("commit_body.cbor");
    let good = CommitEvent::read(&good).unwrap();
    assert_eq!(good.car.verify_hashes(), Ok(()));
    // From before sync 1.1: the op can be undone, but there is no root to compare with.
    assert_eq!(good.message.prev_data, None);
    assert_eq!(good.ops().len(), 1);
    let bad = framed("commit_body_bad_block_hash.cbor");
    assert!(
        CommitEvent::read(&bad)
            .unwrap()
            .car
            .verify_hashes()
            .is_err()
    );
}
