//! A repository: records, their tree, signed commits. Makes sync 1.1 commits with the blocks that
//! prove them. Knows no accounts, no events and no network; usable alone to sign commits ahead.

use std::collections::{BTreeMap, HashMap, HashSet, VecDeque};

use bytes::Bytes;
use futures_util::FutureExt;
use iroh_car::{CarHeader, CarReader, CarWriter};
use libipld::Ipld;
use serde_json::Value;

use super::account::{AccountStatus, RepoHead};
use crate::atproto::cid::Cid;
use crate::atproto::commit::SignedCommit;
use crate::atproto::did::Did;
use crate::atproto::mst::{Change, InvertOp, MstError, Tree, Visit};
use crate::atproto::record_key::{RecordPath, RecordPathError};
use crate::atproto::tid::Tid;
use crate::devnet::dag::{self, DagError, link, map, text};
use crate::devnet::keys::SigningKey;
use crate::devnet::timestamp::Timestamp;

/// Most writes in one commit (sync 1.1; com.atproto.repo.applyWrites).
const MAX_WRITES: usize = 200;
/// Most bytes of `blocks` in one commit (sync 1.1).
const MAX_COMMIT_BYTES: usize = 2_000_000;
/// Largest record block (sync 1.1).
const MAX_RECORD_BYTES: usize = 1_000_000;
/// Commits a repository remembers; `since` before them is answered with everything.
const HISTORY_COMMITS: usize = 1_000;
/// Version of the repository format.
const REPO_VERSION: i128 = 3;

/// What is to be done to one record.
#[derive(Clone, Debug)]
pub enum Write {
    /// Without a record key the repository takes a new TID.
    Create {
        collection: String,
        rkey: Option<String>,
        record: Value,
    },
    /// The record must exist.
    Update {
        collection: String,
        rkey: String,
        record: Value,
    },
    /// The record must exist.
    Delete { collection: String, rkey: String },
}

/// What an op of a commit does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    Create,
    Update,
    Delete,
}

impl Action {
    /// The lexicon's word.
    pub fn as_str(self) -> &'static str {
        match self {
            Action::Create => "create",
            Action::Update => "update",
            Action::Delete => "delete",
        }
    }
}

/// One op of a commit.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Op {
    pub action: Action,
    /// `collection/rkey`.
    pub path: String,
    /// The record after the op.
    pub cid: Option<Cid>,
    /// The record before the op.
    pub prev: Option<Cid>,
}

/// What a write expects to find.
#[derive(Clone, Debug, Default)]
pub struct Swap {
    /// The last commit.
    pub commit: Option<Cid>,
    /// The record written to: `Some(None)` if there must be none.
    pub record: Option<Option<Cid>>,
}

/// A commit as its `#commit` event carries it.
#[derive(Clone, Debug)]
pub struct Commit {
    pub cid: Cid,
    pub rev: Tid,
    pub since: Option<Tid>,
    pub data: Cid,
    pub prev_data: Option<Cid>,
    pub ops: Vec<Op>,
    /// The CAR of the blocks that prove it.
    pub car: Bytes,
}

/// A repository's last commit as its `#sync` event carries it.
#[derive(Clone, Debug)]
pub struct SyncState {
    pub rev: Tid,
    pub cid: Cid,
    /// A CAR with the commit block only.
    pub car: Bytes,
}

/// Why a repository refuses writes or an import.
#[derive(Debug, thiserror::Error)]
pub enum RepoError {
    #[error("Too many writes. Max: {MAX_WRITES}")]
    TooManyWrites,
    #[error("Too many writes. Max event size: 2MB")]
    TooManyBytes,
    #[error("the record of {path} has {bytes} bytes, more than {MAX_RECORD_BYTES}")]
    RecordTooLarge { path: String, bytes: usize },
    #[error("{path} is not a record's path: {cause}")]
    Path {
        path: String,
        cause: RecordPathError,
    },
    #[error("Invalid $type: expected {expected}, got {found}")]
    Type { expected: String, found: String },
    #[error("a record is a JSON object")]
    NotAnObject,
    #[error(transparent)]
    Data(#[from] DagError),
    #[error("Could not locate record: {0}")]
    NotFound(String),
    #[error("there is already a record at {0}")]
    Exists(String),
    #[error("two writes to {0} in one commit")]
    Twice(String),
    #[error("{what} was at {}", found.map_or("null".to_owned(), |cid| cid.to_string()))]
    Swap {
        what: &'static str,
        found: Option<Cid>,
    },
    #[error("the tree refuses the write: {0}")]
    Tree(#[from] MstError),
    #[error("the repository cannot be imported: {0}")]
    Import(String),
}

#[derive(Clone, Debug)]
struct Record {
    cid: Cid,
    block: Bytes,
}

#[derive(Clone, Debug)]
struct Head {
    cid: Cid,
    block: Bytes,
    rev: Tid,
    data: Cid,
}

/// A repository of one account.
#[derive(Clone, Debug)]
pub struct Repository {
    did: Did,
    key: SigningKey,
    clock_id: u16,
    tree: Tree,
    records: BTreeMap<String, Record>,
    head: Head,
    /// The last TID given out, as a revision or as a record key.
    last_tid: Tid,
    /// The latest commits, oldest first: what `getRepo` with `since` is answered from.
    history: VecDeque<Past>,
}

/// A commit that was.
#[derive(Clone, Debug)]
struct Past {
    /// The revision it started from.
    since: Tid,
    ops: Vec<Op>,
}

/// A write with its record encoded.
struct Prepared {
    action: Action,
    path: String,
    record: Option<Record>,
}

impl Write {
    fn collection(&self) -> &str {
        match self {
            Write::Create { collection, .. }
            | Write::Update { collection, .. }
            | Write::Delete { collection, .. } => collection,
        }
    }

    fn record(&self) -> Option<&Value> {
        match self {
            Write::Create { record, .. } | Write::Update { record, .. } => Some(record),
            Write::Delete { .. } => None,
        }
    }

    fn action(&self) -> Action {
        match self {
            Write::Create { .. } => Action::Create,
            Write::Update { .. } => Action::Update,
            Write::Delete { .. } => Action::Delete,
        }
    }

    /// The path it writes to, unless that is still to be chosen.
    pub(super) fn named_path(&self) -> Option<String> {
        match self {
            Write::Create { rkey: None, .. } => None,
            Write::Create {
                collection,
                rkey: Some(rkey),
                ..
            }
            | Write::Update {
                collection, rkey, ..
            }
            | Write::Delete { collection, rkey } => Some(format!("{collection}/{rkey}")),
        }
    }

    fn path(&self, fresh: impl FnOnce() -> Tid) -> Result<String, RepoError> {
        let rkey = match self {
            Write::Create { rkey: None, .. } => fresh().to_string(),
            Write::Create {
                rkey: Some(rkey), ..
            }
            | Write::Update { rkey, .. }
            | Write::Delete { rkey, .. } => rkey.clone(),
        };
        let path = format!("{}/{rkey}", self.collection());
        match RecordPath::parse(&path) {
            Ok(_) => Ok(path),
            Err(cause) => Err(RepoError::Path { path, cause }),
        }
    }
}

impl Record {
    fn encode(json: &Value, collection: &str, path: &str) -> Result<Self, RepoError> {
        let Ipld::Map(mut fields) = dag::from_json(json)? else {
            return Err(RepoError::NotAnObject);
        };
        let kind = fields
            .entry("$type".to_owned())
            .or_insert_with(|| text(collection));
        if *kind != text(collection) {
            let found = json["$type"].to_string();
            return Err(RepoError::Type {
                expected: collection.to_owned(),
                found,
            });
        }
        let block = dag::encode(&Ipld::Map(fields));
        if block.len() > MAX_RECORD_BYTES {
            return Err(RepoError::RecordTooLarge {
                path: path.to_owned(),
                bytes: block.len(),
            });
        }
        Ok(Record {
            cid: dag::cid_of(&block),
            block: block.into(),
        })
    }
}

/// A TID later than `last` and not before the clock of this machine.
fn next_tid(last: Option<Tid>, clock_id: u16) -> Tid {
    let now = u64::try_from(Timestamp::now().millis()).unwrap_or(0) * 1_000;
    let after = last.map_or(0, |last| last.micros() + 1);
    Tid::from_micros(now.max(after), clock_id)
}

/// The block of a signed commit.
fn sign_commit(did: &Did, rev: Tid, data: &Cid, key: &SigningKey) -> Head {
    let mut fields = map([
        ("did", text(did.as_str())),
        ("version", Ipld::Integer(REPO_VERSION)),
        ("rev", text(&rev.to_string())),
        ("prev", Ipld::Null),
        ("data", link(data)),
    ]);
    let signature = key.sign(&dag::encode(&Ipld::Map(fields.clone())));
    fields.insert("sig".to_owned(), Ipld::Bytes(signature.to_vec()));
    let block = dag::encode(&Ipld::Map(fields));
    Head {
        cid: dag::cid_of(&block),
        block: block.into(),
        rev,
        data: *data,
    }
}

/// A CAR v1 of `blocks`, written by iroh-car.
fn car<'a>(root: &Cid, blocks: impl IntoIterator<Item = (Cid, &'a [u8])>) -> Bytes {
    let mut bytes = Vec::new();
    let write = async {
        let mut writer = CarWriter::new(CarHeader::new_v1(vec![car_cid(root)]), &mut bytes);
        for (cid, block) in blocks {
            writer.write(car_cid(&cid), block).await?;
        }
        writer.finish().await.map(|_| ())
    };
    write
        .now_or_never()
        .expect("a Vec is always ready")
        .expect("writing to a Vec never fails");
    bytes.into()
}

/// Reads a CAR v1 with iroh-car and checks every block's hash: its first root and its blocks.
fn read_car(bytes: &[u8]) -> Result<(Cid, HashMap<Cid, Bytes>), RepoError> {
    let refuse = |error: &dyn std::fmt::Display| RepoError::Import(error.to_string());
    let own = |cid: &cid::Cid| Cid::from_bytes(&cid.to_bytes()).map_err(|error| refuse(&error));
    let read = async {
        let mut reader = CarReader::new(bytes)
            .await
            .map_err(|error| refuse(&error))?;
        let root = reader.header().roots().first().map(own);
        let root = root.ok_or_else(|| refuse(&"it has no root"))??;
        let mut blocks = HashMap::new();
        while let Some((cid, block)) = reader.next_block().await.map_err(|error| refuse(&error))? {
            let cid = own(&cid)?;
            if !cid.matches(&block) {
                return Err(refuse(&format!("block {cid} does not hash to its CID")));
            }
            blocks.insert(cid, Bytes::from(block));
        }
        Ok((root, blocks))
    };
    read.now_or_never().expect("a slice is always ready")
}

fn missing(cid: &Cid) -> RepoError {
    RepoError::Import(format!("block {cid} is missing"))
}

/// Every record of a tree with its block.
fn imported_records(
    tree: &mut Tree,
    blocks: &HashMap<Cid, Bytes>,
) -> Result<BTreeMap<String, Record>, RepoError> {
    let mut records = BTreeMap::new();
    for visit in tree.walk() {
        match visit {
            Visit::Node(_) => {}
            Visit::Missing(cid) => return Err(missing(&cid)),
            Visit::Record { path, cid } => {
                let block = blocks.get(&cid).ok_or_else(|| missing(&cid))?.clone();
                dag::decode(&block)?;
                let path = String::from_utf8_lossy(path).into_owned();
                records.insert(path, Record { cid, block });
            }
        }
    }
    Ok(records)
}

fn car_cid(cid: &Cid) -> cid::Cid {
    cid::Cid::try_from(&cid.to_bytes()[..]).expect("our CIDs are binary CIDv1")
}

impl Op {
    fn invert_op(&self) -> InvertOp<'_> {
        let change = match (self.action, self.cid, self.prev) {
            (Action::Update, Some(cid), Some(prev)) => Change::Update { cid, prev },
            (Action::Delete, _, Some(prev)) => Change::Delete { prev },
            (_, Some(cid), _) => Change::Create { cid },
            _ => unreachable!("ops are made with the CIDs their action has"),
        };
        InvertOp {
            path: &self.path,
            change,
        }
    }

    /// The op that undoes this one.
    fn undone(&self) -> Op {
        let action = match self.action {
            Action::Create => Action::Delete,
            Action::Update => Action::Update,
            Action::Delete => Action::Create,
        };
        Op {
            action,
            path: self.path.clone(),
            cid: self.prev,
            prev: self.cid,
        }
    }
}

impl Repository {
    /// A new, empty repository and its first commit (no ops, no `prevData`). `clock_id` tells
    /// the TIDs of different servers apart.
    pub fn create(did: Did, key: SigningKey, clock_id: u16) -> (Self, Commit) {
        let mut tree = Tree::empty();
        let rev = next_tid(None, clock_id);
        let head = sign_commit(&did, rev, &tree.root_cid(), &key);
        let nodes: Vec<_> = nodes(&mut tree).collect();
        let commit = Commit {
            cid: head.cid,
            rev,
            since: None,
            data: head.data,
            prev_data: None,
            ops: Vec::new(),
            car: car(
                &head.cid,
                [(head.cid, &head.block[..])]
                    .into_iter()
                    .chain(borrowed(&nodes)),
            ),
        };
        let (records, history) = (BTreeMap::new(), VecDeque::new());
        (
            Repository {
                did,
                key,
                clock_id,
                tree,
                records,
                head,
                last_tid: rev,
                history,
            },
            commit,
        )
    }

    /// The repository in `car`, to be signed with `key` from now on. Its last commit stays the head,
    /// whoever signed it, until [`Repository::resign`] or the next commit.
    pub fn import(did: Did, key: SigningKey, clock_id: u16, car: &[u8]) -> Result<Self, RepoError> {
        let refuse = |error: &dyn std::fmt::Display| RepoError::Import(error.to_string());
        let (root, blocks) = read_car(car)?;
        let block = blocks.get(&root).ok_or_else(|| missing(&root))?;
        let commit = SignedCommit::parse(block).map_err(|error| refuse(&error))?;
        if commit.did != did.as_str() {
            return Err(refuse(&format!("it belongs to {}", commit.did)));
        }
        let rev = Tid::parse(commit.rev).map_err(|error| refuse(&error))?;
        let mut tree = Tree::load(commit.data, |cid| blocks.get(cid).map(|block| &block[..]))?;
        let records = imported_records(&mut tree, &blocks)?;
        let head = Head {
            cid: root,
            block: block.clone(),
            rev,
            data: commit.data,
        };
        Ok(Repository {
            did,
            key,
            clock_id,
            tree,
            records,
            head,
            last_tid: rev,
            history: VecDeque::new(),
        })
    }

    /// Signs the same data again with `key`, under a new revision.
    pub fn resign(&mut self, key: SigningKey) {
        self.key = key;
        let rev = self.fresh_tid();
        let head = sign_commit(&self.did, rev, &self.head.data, &self.key);
        let before = std::mem::replace(&mut self.head, head);
        self.remember(before.rev, Vec::new());
    }

    fn fresh_tid(&mut self) -> Tid {
        self.last_tid = next_tid(Some(self.last_tid), self.clock_id);
        self.last_tid
    }

    fn remember(&mut self, since: Tid, ops: Vec<Op>) {
        self.history.push_back(Past { since, ops });
        if self.history.len() > HISTORY_COMMITS {
            self.history.pop_front();
        }
    }

    /// Applies `writes` as one commit. On an error nothing has changed.
    pub fn apply(&mut self, writes: &[Write]) -> Result<Commit, RepoError> {
        if writes.len() > MAX_WRITES {
            return Err(RepoError::TooManyWrites);
        }
        let prepared: Vec<Prepared> = writes
            .iter()
            .map(|write| self.prepare(write))
            .collect::<Result<_, _>>()?;
        let ops = self.ops(&prepared)?;
        let diff = self
            .tree
            .apply(&ops.iter().map(Op::invert_op).collect::<Vec<_>>())?;
        let rev = self.fresh_tid();
        let head = sign_commit(&self.did, rev, &diff.after, &self.key);
        let mut seen = HashSet::new();
        let records = prepared.iter().filter_map(|write| write.record.as_ref());
        let blocks = [(head.cid, &head.block[..])]
            .into_iter()
            .chain(borrowed(&diff.blocks))
            .chain(records.map(|record| (record.cid, &record.block[..])))
            .filter(|(cid, _)| seen.insert(*cid));
        let car = car(&head.cid, blocks);
        if car.len() > MAX_COMMIT_BYTES {
            let undone: Vec<Op> = ops.iter().rev().map(Op::undone).collect();
            self.tree
                .apply(&undone.iter().map(Op::invert_op).collect::<Vec<_>>())?;
            return Err(RepoError::TooManyBytes);
        }
        let before = std::mem::replace(&mut self.head, head);
        self.store(prepared);
        self.remember(before.rev, ops.clone());
        let (cid, data) = (self.head.cid, diff.after);
        Ok(Commit {
            cid,
            rev,
            since: Some(before.rev),
            data,
            prev_data: Some(before.data),
            ops,
            car,
        })
    }

    fn prepare(&mut self, write: &Write) -> Result<Prepared, RepoError> {
        let path = write.path(|| self.fresh_tid())?;
        let record = write
            .record()
            .map(|json| Record::encode(json, write.collection(), &path))
            .transpose()?;
        Ok(Prepared {
            action: write.action(),
            path,
            record,
        })
    }

    /// The ops of a commit, each checked against the records there are.
    fn ops(&self, prepared: &[Prepared]) -> Result<Vec<Op>, RepoError> {
        let mut paths = HashSet::new();
        let ops = prepared.iter().map(|write| {
            let path = write.path.clone();
            if !paths.insert(&write.path) {
                return Err(RepoError::Twice(path));
            }
            let prev = self.records.get(&path).map(|record| record.cid);
            match (write.action, prev) {
                (Action::Create, Some(_)) => Err(RepoError::Exists(path)),
                (Action::Update | Action::Delete, None) => Err(RepoError::NotFound(path)),
                (action, prev) => Ok(Op {
                    action,
                    path,
                    cid: write.record.as_ref().map(|record| record.cid),
                    prev,
                }),
            }
        });
        ops.collect()
    }

    fn store(&mut self, prepared: Vec<Prepared>) {
        for write in prepared {
            match write.record {
                Some(record) => self.records.insert(write.path, record),
                None => self.records.remove(&write.path),
            };
        }
    }

    /// Refuses if the repository is not as `swap` says; `path` is the record its `record` speaks of.
    pub fn check_swap(&self, swap: &Swap, path: &str) -> Result<(), RepoError> {
        if swap.commit.is_some_and(|commit| commit != self.head.cid) {
            return Err(RepoError::Swap {
                what: "Commit",
                found: Some(self.head.cid),
            });
        }
        let found = self.records.get(path).map(|record| record.cid);
        match swap.record {
            Some(expected) if expected != found => Err(RepoError::Swap {
                what: "Record",
                found,
            }),
            _ => Ok(()),
        }
    }

    /// The CID of the record `write` would replace, if it would replace it by itself.
    pub fn unchanged(&self, write: &Write) -> Result<Option<Cid>, RepoError> {
        let Write::Update {
            collection,
            rkey,
            record,
        } = write
        else {
            return Ok(None);
        };
        let path = format!("{collection}/{rkey}");
        let new = Record::encode(record, collection, &path)?.cid;
        Ok(self
            .records
            .get(&path)
            .map(|record| record.cid)
            .filter(|cid| *cid == new))
    }

    /// The record at `collection/rkey` in its JSON form.
    pub fn record(&self, path: &str) -> Option<(Cid, Value)> {
        let record = self.records.get(path)?;
        let value = dag::decode(&record.block).expect("records are checked before they are stored");
        Some((record.cid, dag::to_json(&value)))
    }

    /// The key that signs commits.
    pub fn signing_key(&self) -> &SigningKey {
        &self.key
    }

    /// The account.
    pub fn did(&self) -> &Did {
        &self.did
    }

    /// The last commit as `#sync` announces it.
    pub fn sync_state(&self) -> SyncState {
        let head = &self.head;
        SyncState {
            rev: head.rev,
            cid: head.cid,
            car: car(&head.cid, [(head.cid, &head.block[..])]),
        }
    }

    /// Where it stands; handle and status are not the repository's to know.
    pub fn head(&self, handle: String, status: AccountStatus) -> RepoHead {
        let Head { cid, rev, data, .. } = self.head;
        RepoHead {
            did: self.did.clone(),
            handle,
            status,
            rev,
            data,
            commit: cid,
        }
    }

    /// Every record by its path.
    pub fn records(&self) -> BTreeMap<String, Cid> {
        self.records
            .iter()
            .map(|(path, record)| (path.clone(), record.cid))
            .collect()
    }

    /// The whole repository as a CAR in streamable order; with `since`, only the blocks that came
    /// after that revision, as far as it is remembered.
    pub fn car(&mut self, since: Option<Tid>) -> Result<Bytes, RepoError> {
        let known = self.blocks_at(since)?;
        let mut blocks: Vec<(Cid, Bytes)> = vec![(self.head.cid, self.head.block.clone())];
        for visit in self.tree.walk() {
            match visit {
                Visit::Node(node) if !known.contains(&node.cid()) => {
                    blocks.push((node.cid(), node.block().into()))
                }
                Visit::Record { path, cid } if !known.contains(&cid) => {
                    let record = std::str::from_utf8(path)
                        .ok()
                        .and_then(|path| self.records.get(path));
                    blocks.extend(record.map(|record| (cid, record.block.clone())));
                }
                _ => {}
            }
        }
        let mut seen = HashSet::new();
        let fresh = blocks.iter().filter(|(cid, _)| seen.insert(*cid));
        Ok(car(
            &self.head.cid,
            fresh.map(|(cid, block)| (*cid, &block[..])),
        ))
    }

    /// CIDs of the records and nodes there were at revision `since`; none if that is forgotten.
    fn blocks_at(&self, since: Option<Tid>) -> Result<HashSet<Cid>, RepoError> {
        let Some(since) = since else {
            return Ok(HashSet::new());
        };
        if since > self.head.rev
            || (since < self.head.rev && !self.history.iter().any(|past| past.since <= since))
        {
            return Ok(HashSet::new());
        }
        let mut records = self.records();
        for op in self
            .history
            .iter()
            .rev()
            .take_while(|past| past.since >= since)
            .flat_map(|past| past.ops.iter().rev())
        {
            match op.prev {
                Some(prev) => records.insert(op.path.clone(), prev),
                None => records.remove(&op.path),
            };
        }
        let mut tree = Tree::from_records(records.iter().map(|(path, cid)| (path, *cid)))?;
        let nodes: Vec<Cid> = nodes(&mut tree).map(|(cid, _)| cid).collect();
        Ok(records.into_values().chain(nodes).collect())
    }
}

fn nodes(tree: &mut Tree) -> impl Iterator<Item = (Cid, Vec<u8>)> {
    tree.walk().filter_map(|visit| match visit {
        Visit::Node(node) => Some((node.cid(), node.block())),
        Visit::Record { .. } | Visit::Missing(_) => None,
    })
}

fn borrowed(blocks: &[(Cid, Vec<u8>)]) -> impl Iterator<Item = (Cid, &[u8])> {
    blocks.iter().map(|(cid, block)| (*cid, &block[..]))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::devnet::keys::Curve;
    use rand::SeedableRng;
    use serde_json::json;

    fn repository() -> Repository {
        let mut rng = rand::rngs::StdRng::seed_from_u64(3);
        let did = Did::parse("did:plc:ewvi7nxzyoun6zhxrhs64oiz").unwrap();
        Repository::create(did, SigningKey::generate(Curve::K256, &mut rng), 1).0
    }

    fn create(rkey: &str, record: Value) -> Write {
        let (collection, rkey) = ("com.example.thing".to_owned(), Some(rkey.to_owned()));
        Write::Create {
            collection,
            rkey,
            record,
        }
    }

    fn delete(rkey: &str) -> Write {
        Write::Delete {
            collection: "com.example.thing".to_owned(),
            rkey: rkey.to_owned(),
        }
    }

    #[test]
    fn refused_writes_change_nothing() {
        let mut repo = repository();
        repo.apply(&[create("there", json!({ "n": 1 }))]).unwrap();
        let (sync, records) = (repo.sync_state(), repo.records());
        let large = json!({ "text": "x".repeat(990_000) });
        let three = [
            create("a", large.clone()),
            create("b", json!({ "x": large })),
            create("c", json!({ "y": large })),
        ];
        let many: Vec<Write> = (0..=MAX_WRITES)
            .map(|n| create(&n.to_string(), json!({})))
            .collect();
        for (writes, words) in [
            (&three[..], "Too many writes. Max event size: 2MB"),
            (&many[..], "Too many writes. Max: 200"),
            (
                &[create("new", json!({})), create("there", json!({}))][..],
                "already a record",
            ),
            (
                &[create("new", json!({})), delete("nowhere")][..],
                "Could not locate record",
            ),
            (
                &[create("twice", json!({})), delete("twice")][..],
                "two writes",
            ),
            (
                &[create(
                    "big",
                    json!({ "text": "x".repeat(MAX_RECORD_BYTES) }),
                )][..],
                "more than",
            ),
            (&[create("no/path", json!({}))][..], "not a record's path"),
        ] {
            let error = repo.apply(writes).unwrap_err().to_string();
            assert!(error.contains(words), "{error}");
            assert_eq!(
                (repo.sync_state().cid, repo.records()),
                (sync.cid, records.clone())
            );
        }
        let commit = repo.apply(&[create("after", json!({}))]).unwrap();
        assert_eq!(Some(commit.since.unwrap()), Some(sync.rev));
        let copy = Repository::import(
            repo.did.clone(),
            repo.key.clone(),
            1,
            &repo.car(None).unwrap(),
        )
        .unwrap();
        assert_eq!(
            (copy.head.data, copy.records()),
            (commit.data, repo.records())
        );
    }

    #[test]
    fn a_diff_has_what_came_after_a_revision() {
        let mut repo = repository();
        let first = repo
            .apply(&[
                create("a", json!({ "n": 1 })),
                create("b", json!({ "n": 2 })),
            ])
            .unwrap();
        repo.apply(&[delete("a")]).unwrap();
        repo.apply(&[
            create("a", json!({ "n": 1 })),
            create("c", json!({ "n": 3 })),
        ])
        .unwrap();
        let records = repo.records();
        let blocks = |repo: &mut Repository, since| read_car(&repo.car(since).unwrap()).unwrap().1;
        let diff = blocks(&mut repo, Some(first.rev));
        assert!(diff.contains_key(&records["com.example.thing/c"]));
        assert!(!diff.contains_key(&records["com.example.thing/b"]));
        let head = repo.head.rev;
        assert_eq!(blocks(&mut repo, Some(head)).len(), 1, "the commit only");
        let forgotten = Tid::from_micros(1, 0);
        assert_eq!(blocks(&mut repo, Some(forgotten)), blocks(&mut repo, None));
    }

    #[test]
    fn imports_are_checked() {
        let mut repo = repository();
        repo.apply(&[create("a", json!({}))]).unwrap();
        let car = repo.car(None).unwrap();
        let import = |did: &str, car: &[u8]| {
            Repository::import(Did::parse(did).unwrap(), repo.key.clone(), 1, car)
        };
        assert!(import(repo.did.as_str(), &car).is_ok());
        assert!(import("did:plc:aaaaaaaaaaaaaaaaaaaaaaaa", &car).is_err());
        assert!(import(repo.did.as_str(), &car[..car.len() - 1]).is_err());
        let mut wrong = car.to_vec();
        *wrong.last_mut().unwrap() ^= 1;
        assert!(import(repo.did.as_str(), &wrong).is_err());
        assert!(import(repo.did.as_str(), b"").is_err());
    }
}
