//! Event-stream frames of a PDS, encoded by libipld. Builds what a correct PDS sends; faults are
//! made from these bytes elsewhere.

use bytes::Bytes;
use libipld::Ipld;
use std::collections::BTreeMap;

use super::account::AccountStatus;
use super::repo::{Commit, Op, SyncState};
use crate::atproto::cid::Cid;
use crate::atproto::did::Did;
use crate::devnet::dag::{self, link, map, text};
use crate::devnet::timestamp::Timestamp;

/// Sequence number and time a frame gets when it is put into the stream.
#[derive(Clone, Copy, Debug)]
pub struct Stamp {
    pub seq: u64,
    pub time: Timestamp,
}

impl Stamp {
    fn fields<const N: usize>(self, fields: [(&str, Ipld); N]) -> BTreeMap<String, Ipld> {
        let mut fields = map(fields);
        fields.insert("seq".to_owned(), Ipld::Integer(self.seq.into()));
        fields.insert("time".to_owned(), text(&self.time.to_string()));
        fields
    }
}

/// `#commit` of `did`.
pub fn commit(stamp: Stamp, did: &Did, commit: &Commit) -> Bytes {
    let mut body = stamp.fields([
        ("rebase", Ipld::Bool(false)),
        ("tooBig", Ipld::Bool(false)),
        ("repo", text(did.as_str())),
        ("commit", link(&commit.cid)),
        ("rev", text(&commit.rev.to_string())),
        (
            "since",
            commit
                .since
                .map_or(Ipld::Null, |since| text(&since.to_string())),
        ),
        ("blocks", Ipld::Bytes(commit.car.to_vec())),
        ("ops", Ipld::List(commit.ops.iter().map(op).collect())),
        ("blobs", Ipld::List(Vec::new())),
    ]);
    if let Some(prev_data) = &commit.prev_data {
        body.insert("prevData".to_owned(), link(prev_data));
    }
    message("#commit", body)
}

fn op(op: &Op) -> Ipld {
    let mut fields = map([
        ("action", text(op.action.as_str())),
        ("path", text(&op.path)),
        ("cid", nullable(op.cid.as_ref())),
    ]);
    if let Some(prev) = &op.prev {
        fields.insert("prev".to_owned(), link(prev));
    }
    Ipld::Map(fields)
}

fn nullable(cid: Option<&Cid>) -> Ipld {
    cid.map_or(Ipld::Null, link)
}

/// `#sync` of `did`.
pub fn sync(stamp: Stamp, did: &Did, state: &SyncState) -> Bytes {
    let fields = [
        ("did", text(did.as_str())),
        ("rev", text(&state.rev.to_string())),
        ("blocks", Ipld::Bytes(state.car.to_vec())),
    ];
    message("#sync", stamp.fields(fields))
}

/// `#identity` of `did`.
pub fn identity(stamp: Stamp, did: &Did, handle: Option<&str>) -> Bytes {
    let mut body = stamp.fields([("did", text(did.as_str()))]);
    if let Some(handle) = handle {
        body.insert("handle".to_owned(), text(handle));
    }
    message("#identity", body)
}

/// `#account` of `did`.
pub fn account(stamp: Stamp, did: &Did, status: AccountStatus) -> Bytes {
    let active = status == AccountStatus::Active;
    let mut body = stamp.fields([("did", text(did.as_str())), ("active", Ipld::Bool(active))]);
    if let Some(status) = status.as_str() {
        body.insert("status".to_owned(), text(status));
    }
    message("#account", body)
}

/// `#info`.
pub fn info(name: &str, words: &str) -> Bytes {
    message(
        "#info",
        map([("name", text(name)), ("message", text(words))]),
    )
}

/// An error frame.
pub fn error(name: &str, words: &str) -> Bytes {
    let header = map([("op", Ipld::Integer(-1))]);
    join(
        header,
        map([("error", text(name)), ("message", text(words))]),
    )
}

/// A frame of type `kind` (`#commit`, …) with any body.
pub fn message(kind: &str, body: BTreeMap<String, Ipld>) -> Bytes {
    join(map([("op", Ipld::Integer(1)), ("t", text(kind))]), body)
}

fn join(header: BTreeMap<String, Ipld>, body: BTreeMap<String, Ipld>) -> Bytes {
    let mut bytes = dag::encode(&Ipld::Map(header));
    bytes.extend_from_slice(&dag::encode(&Ipld::Map(body)));
    bytes.into()
}
