//! A small signed repository, and its commits as drafts that a test can spoil before they are signed and framed.

use std::collections::BTreeMap;

use sha2::{Digest, Sha256};

use crate::atproto::car;
use crate::atproto::cbor::Writer;
use crate::atproto::cid::{Cid, Codec};
use crate::atproto::commit;
use crate::atproto::frame::{self, Action, Op};
use crate::atproto::key::{Curve, PublicKey};
use crate::atproto::mst::{Change, InvertOp, Tree};
use crate::atproto::tid::Tid;

/// The time of all tests, Unix time in microseconds: past by any clock.
pub const NOW_US: u64 = 1_700_000_000_000_000;
pub const DID: &str = "did:plc:ewvi7nxzyoun6zhxrhs64oiz";
pub const OTHER_DID: &str = "did:plc:44ybard66vv44zksje25o7dz";

/// What a test does to one record.
#[derive(Clone, Copy)]
pub enum Write<'a> {
    Put(&'a str, &'a str),
    Delete(&'a str),
}

pub struct Repo {
    key: secp256k1::SecretKey,
    tree: Tree,
    records: BTreeMap<String, Cid>,
    rev: Option<Tid>,
    step: u64,
}

impl Repo {
    pub fn new() -> Self {
        Self {
            key: secret(5),
            tree: Tree::empty(),
            records: BTreeMap::new(),
            rev: None,
            step: 0,
        }
    }

    /// A repository with some records, and so with a tree of several nodes.
    pub fn filled() -> Self {
        let mut repo = Self::new();
        let paths: Vec<String> = (0..40).map(|n| format!("com.example.note/{n}")).collect();
        let writes: Vec<Write<'_>> = paths.iter().map(|path| Write::Put(path, "old")).collect();
        repo.commit(&writes);
        repo
    }

    pub fn rev(&self) -> Option<Tid> {
        self.rev
    }

    /// The commit of these writes, as a correct host sends it.
    pub fn commit(&mut self, writes: &[Write<'_>]) -> Draft {
        let mut blocks = Vec::new();
        let ops: Vec<DraftOp> = writes
            .iter()
            .map(|write| self.write(*write, &mut blocks))
            .collect();
        let changes: Vec<InvertOp<'_>> = ops.iter().map(DraftOp::change).collect();
        let diff = self.tree.apply(&changes).unwrap();
        blocks.extend(diff.blocks);
        let since = self.rev;
        self.step += 1;
        let rev = Tid::from_micros(NOW_US - 1_000_000 + self.step, 1);
        self.rev = Some(rev);
        Draft {
            repo: DID.to_owned(),
            rev: rev.to_string(),
            since: since.map(|rev| rev.to_string()),
            prev_data: since.map(|_| diff.before),
            ops,
            commit: None,
            blocks,
            did_signed: DID.to_owned(),
            rev_signed: rev.to_string(),
            version: 3,
            data: diff.after,
            key: self.key,
            edit_signature: |signature| signature,
            edit_roots: |root| vec![root],
            edit_car: |car| car,
        }
    }

    fn write(&mut self, write: Write<'_>, blocks: &mut Vec<(Cid, Vec<u8>)>) -> DraftOp {
        let (path, cid) = match write {
            Write::Put(path, text) => {
                let record = record(text);
                let cid = Cid::of(Codec::DagCbor, &record);
                blocks.push((cid, record));
                (path, Some(cid))
            }
            Write::Delete(path) => (path, None),
        };
        let prev = match cid {
            Some(cid) => self.records.insert(path.to_owned(), cid),
            None => self.records.remove(path),
        };
        let action = match (cid, prev) {
            (None, _) => Action::Delete,
            (Some(_), None) => Action::Create,
            (Some(_), Some(_)) => Action::Update,
        };
        DraftOp {
            action,
            path: path.to_owned(),
            cid,
            prev,
        }
    }
}

pub fn secret(number: u8) -> secp256k1::SecretKey {
    secp256k1::SecretKey::from_secret_bytes([number; 32]).unwrap()
}

pub fn public_key(secret: &secp256k1::SecretKey) -> PublicKey {
    PublicKey::from_sec1(Curve::K256, &secret.public_key().serialize()).unwrap()
}

/// A record block that says `text`.
pub fn record(text: &str) -> Vec<u8> {
    let mut out = Writer::new();
    out.map(|map| map.entry("text", |out| out.text(text)));
    out.into_vec()
}

#[derive(Clone)]
pub struct DraftOp {
    pub action: Action,
    pub path: String,
    pub cid: Option<Cid>,
    pub prev: Option<Cid>,
}

impl DraftOp {
    fn change(&self) -> InvertOp<'_> {
        let change = match (self.cid, self.prev) {
            (Some(cid), None) => Change::Create { cid },
            (Some(cid), Some(prev)) => Change::Update { cid, prev },
            (None, Some(prev)) => Change::Delete { prev },
            (None, None) => panic!("deleted without having been there"),
        };
        InvertOp {
            path: &self.path,
            change,
        }
    }
}

/// A commit before it is signed and framed.
pub struct Draft {
    pub repo: String,
    pub rev: String,
    pub since: Option<String>,
    pub prev_data: Option<Cid>,
    pub ops: Vec<DraftOp>,
    /// The envelope's `commit`, where it is not the CID of the commit block.
    pub commit: Option<Cid>,
    /// Record blocks, then tree nodes from the root down.
    pub blocks: Vec<(Cid, Vec<u8>)>,
    pub did_signed: String,
    pub rev_signed: String,
    pub version: u8,
    pub data: Cid,
    pub key: secp256k1::SecretKey,
    pub edit_signature: fn(Vec<u8>) -> Vec<u8>,
    pub edit_roots: fn(Cid) -> Vec<Cid>,
    pub edit_car: fn(Vec<u8>) -> Vec<u8>,
}

impl Draft {
    /// The signed commit's block.
    pub fn commit_block(&self) -> Vec<u8> {
        let with_version = |mut block: Vec<u8>| {
            *block.last_mut().unwrap() = self.version;
            block
        };
        let (did, rev, data) = (&self.did_signed, &self.rev_signed, &self.data);
        let unsigned = with_version(commit::encode_unsigned(did, rev, data));
        let digest = secp256k1::Message::from_digest(Sha256::digest(unsigned).into());
        let signature = secp256k1::ecdsa::sign(digest, &self.key).serialize_compact();
        let signature = (self.edit_signature)(signature.to_vec());
        with_version(commit::encode_signed(did, rev, data, &signature))
    }

    fn car(&self, block: &[u8], others: bool) -> Vec<u8> {
        let root = Cid::of(Codec::DagCbor, block);
        let others = self.blocks.iter().filter(|_| others);
        let others = others.map(|(cid, data)| (*cid, &data[..]));
        let car = car::write(
            &(self.edit_roots)(root),
            std::iter::once((root, block)).chain(others),
        );
        (self.edit_car)(car)
    }

    /// The `#commit` frame.
    pub fn frame(&self) -> Vec<u8> {
        let block = self.commit_block();
        let ops = self.ops.iter().map(|op| Op {
            action: op.action,
            path: &op.path,
            cid: op.cid,
            prev: op.prev,
        });
        frame::encode_commit(&frame::Commit {
            seq: 1,
            repo: &self.repo,
            rev: &self.rev,
            since: self.since.as_deref(),
            commit: self.commit.unwrap_or(Cid::of(Codec::DagCbor, &block)),
            blocks: &self.car(&block, true),
            ops: ops.collect(),
            prev_data: self.prev_data,
            time: "2026-09-21T14:13:20.000Z",
            too_big: false,
            rebase: false,
        })
    }

    /// The `#sync` frame of the same state.
    pub fn sync_frame(&self) -> Vec<u8> {
        frame::encode_sync(&frame::Sync {
            seq: 1,
            did: &self.repo,
            rev: &self.rev,
            blocks: &self.car(&self.commit_block(), false),
            time: "2026-09-21T14:13:20.000Z",
        })
    }
}
