//! com.atproto.repo: records. Lexicons are not checked (`validationStatus` is `unknown`).

use std::collections::{BTreeMap, BTreeSet};

use axum::Json;
use axum::extract::State;
use serde::{Deserialize, Deserializer};
use serde_json::{Value, json};

use super::input::{Auth, Input, Params, XrpcError};
use super::sync::available;
use crate::atproto::cid::Cid;
use crate::atproto::did::Did;
use crate::devnet::pds::{Action, Op, Pds, PdsError, RepoError, Swap, Write, Written};

/// Default and largest `limit` of listRecords (lexicon).
const LIST_RECORDS_DEFAULT: usize = 50;
const LIST_RECORDS_MAX: usize = 100;

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct CreateRecord {
    repo: String,
    collection: String,
    rkey: Option<String>,
    record: Value,
    swap_commit: Option<String>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct PutRecord {
    repo: String,
    collection: String,
    rkey: String,
    record: Value,
    /// Absent: not compared. `null`: there must be no record.
    #[serde(default, deserialize_with = "present")]
    swap_record: Option<Option<String>>,
    swap_commit: Option<String>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct DeleteRecord {
    repo: String,
    collection: String,
    rkey: String,
    swap_record: Option<String>,
    swap_commit: Option<String>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct ApplyWrites {
    repo: String,
    writes: Vec<WriteInput>,
    swap_commit: Option<String>,
}

#[derive(Deserialize)]
#[serde(tag = "$type")]
enum WriteInput {
    #[serde(rename = "com.atproto.repo.applyWrites#create")]
    Create {
        collection: String,
        rkey: Option<String>,
        value: Value,
    },
    #[serde(rename = "com.atproto.repo.applyWrites#update")]
    Update {
        collection: String,
        rkey: String,
        value: Value,
    },
    #[serde(rename = "com.atproto.repo.applyWrites#delete")]
    Delete { collection: String, rkey: String },
}

#[derive(Deserialize)]
pub(super) struct GetRecord {
    repo: String,
    collection: String,
    rkey: String,
    cid: Option<String>,
}

#[derive(Deserialize)]
pub(super) struct ListRecords {
    repo: String,
    collection: String,
    limit: Option<usize>,
    cursor: Option<String>,
    reverse: Option<bool>,
}

#[derive(Deserialize)]
pub(super) struct DescribeRepo {
    repo: String,
}

fn present<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<Option<String>>, D::Error> {
    Option::deserialize(deserializer).map(Some)
}

fn cid(text: Option<String>) -> Result<Option<Cid>, XrpcError> {
    let parsed = text.map(|text| Cid::parse(&text)).transpose();
    parsed.map_err(|error| XrpcError::invalid(format!("Invalid CID: {error}")))
}

fn uri(did: &Did, path: &str) -> String {
    format!("at://{did}/{path}")
}

fn written(written: &Written) -> Value {
    let mut answer = json!({ "uri": written.uri, "validationStatus": "unknown" });
    if let Some(cid) = written.record {
        answer["cid"] = json!(cid.to_string());
    }
    if !written.ops.is_empty() {
        answer["commit"] = commit(written);
    }
    answer
}

fn commit(written: &Written) -> Value {
    json!({ "cid": written.commit.to_string(), "rev": written.rev.to_string() })
}

pub(super) async fn create(
    State(pds): State<Pds>,
    auth: Auth,
    Input(input): Input<CreateRecord>,
) -> Result<Json<Value>, XrpcError> {
    let did = auth.for_repo(&pds, &input.repo)?;
    let write = Write::Create {
        collection: input.collection,
        rkey: input.rkey,
        record: input.record,
    };
    let swap = Swap {
        commit: cid(input.swap_commit)?,
        record: None,
    };
    Ok(Json(written(&pds.apply_writes_if(
        &did,
        &[write],
        &swap,
    )?)))
}

pub(super) async fn put(
    State(pds): State<Pds>,
    auth: Auth,
    Input(input): Input<PutRecord>,
) -> Result<Json<Value>, XrpcError> {
    let did = auth.for_repo(&pds, &input.repo)?;
    let record = input.swap_record.map(cid).transpose()?;
    let swap = Swap {
        commit: cid(input.swap_commit)?,
        record,
    };
    Ok(Json(written(&pds.put_record_if(
        &did,
        &input.collection,
        &input.rkey,
        input.record,
        &swap,
    )?)))
}

pub(super) async fn delete(
    State(pds): State<Pds>,
    auth: Auth,
    Input(input): Input<DeleteRecord>,
) -> Result<Json<Value>, XrpcError> {
    let did = auth.for_repo(&pds, &input.repo)?;
    let write = Write::Delete {
        collection: input.collection,
        rkey: input.rkey,
    };
    let record = cid(input.swap_record)?.map(Some);
    let swap = Swap {
        commit: cid(input.swap_commit)?,
        record,
    };
    match pds.apply_writes_if(&did, &[write], &swap) {
        Ok(written) => Ok(Json(json!({ "commit": commit(&written) }))),
        // Deleting what is not there is no error (lexicon).
        Err(PdsError::Repo(RepoError::NotFound(_))) => Ok(Json(json!({}))),
        Err(error) => Err(error.into()),
    }
}

pub(super) async fn apply_writes(
    State(pds): State<Pds>,
    auth: Auth,
    Input(input): Input<ApplyWrites>,
) -> Result<Json<Value>, XrpcError> {
    let did = auth.for_repo(&pds, &input.repo)?;
    let writes: Vec<Write> = input.writes.into_iter().map(Write::from).collect();
    let swap = Swap {
        commit: cid(input.swap_commit)?,
        record: None,
    };
    let written = pds.apply_writes_if(&did, &writes, &swap)?;
    let results: Vec<Value> = written.ops.iter().map(|op| result(&did, op)).collect();
    Ok(Json(
        json!({ "commit": commit(&written), "results": results }),
    ))
}

impl From<WriteInput> for Write {
    fn from(input: WriteInput) -> Self {
        match input {
            WriteInput::Create {
                collection,
                rkey,
                value,
            } => Write::Create {
                collection,
                rkey,
                record: value,
            },
            WriteInput::Update {
                collection,
                rkey,
                value,
            } => Write::Update {
                collection,
                rkey,
                record: value,
            },
            WriteInput::Delete { collection, rkey } => Write::Delete { collection, rkey },
        }
    }
}

fn result(did: &Did, op: &Op) -> Value {
    let kind = match op.action {
        Action::Create => "createResult",
        Action::Update => "updateResult",
        Action::Delete => "deleteResult",
    };
    let mut result = json!({ "$type": format!("com.atproto.repo.applyWrites#{kind}") });
    if let Some(cid) = op.cid {
        result["uri"] = json!(uri(did, &op.path));
        result["cid"] = json!(cid.to_string());
        result["validationStatus"] = json!("unknown");
    }
    result
}

pub(super) async fn get(
    State(pds): State<Pds>,
    Params(params): Params<GetRecord>,
) -> Result<Json<Value>, XrpcError> {
    let path = format!("{}/{}", params.collection, params.rkey);
    let missing = || {
        XrpcError::named(
            "RecordNotFound",
            format!("Could not locate record: at://{}/{path}", params.repo),
        )
    };
    let did = available(&pds, &params.repo).map_err(|_| missing())?.did;
    let (cid, value) = pds.record(&did, &path).ok_or_else(missing)?;
    if params
        .cid
        .as_ref()
        .is_some_and(|wanted| *wanted != cid.to_string())
    {
        return Err(missing());
    }
    Ok(Json(
        json!({ "uri": uri(&did, &path), "cid": cid.to_string(), "value": value }),
    ))
}

pub(super) async fn list(
    State(pds): State<Pds>,
    Params(params): Params<ListRecords>,
) -> Result<Json<Value>, XrpcError> {
    let limit = params.limit.unwrap_or(LIST_RECORDS_DEFAULT);
    if !(1..=LIST_RECORDS_MAX).contains(&limit) {
        let words = format!("limit must be between 1 and {LIST_RECORDS_MAX}");
        return Err(XrpcError::invalid(words));
    }
    let missing = || XrpcError::invalid(format!("Could not find repo: {}", params.repo));
    let did = available(&pds, &params.repo).map_err(|_| missing())?.did;
    let state = pds.repository(&did).ok_or_else(missing)?;
    let page = page(&state.records, &params, limit);
    let records = page.iter().filter_map(|rkey| {
        let path = format!("{}/{rkey}", params.collection);
        let (cid, value) = pds.record(&did, &path)?;
        Some(json!({ "uri": uri(&did, &path), "cid": cid.to_string(), "value": value }))
    });
    let mut answer = json!({ "records": records.collect::<Vec<_>>() });
    if let Some(last) = page.last() {
        answer["cursor"] = json!(last);
    }
    Ok(Json(answer))
}

/// The record keys of one page: newest first, unless asked the other way round.
fn page<'a>(
    records: &'a BTreeMap<String, Cid>,
    params: &ListRecords,
    limit: usize,
) -> Vec<&'a str> {
    let prefix = format!("{}/", params.collection);
    let rkeys = records.keys().filter_map(|path| path.strip_prefix(&prefix));
    let cursor = params.cursor.as_deref();
    if params.reverse.unwrap_or(false) {
        let after = |rkey: &&str| cursor.is_none_or(|cursor| *rkey > cursor);
        return rkeys.filter(after).take(limit).collect();
    }
    let before = |rkey: &&str| cursor.is_none_or(|cursor| *rkey < cursor);
    rkeys.rev().filter(before).take(limit).collect()
}

pub(super) async fn describe(
    State(pds): State<Pds>,
    Params(params): Params<DescribeRepo>,
) -> Result<Json<Value>, XrpcError> {
    let head = available(&pds, &params.repo)?;
    let (did, handle) = (head.did.as_str(), &head.handle);
    let document = pds.inner.plc.document(did).map_err(PdsError::from)?;
    let first_name = document["alsoKnownAs"].get(0);
    let correct = first_name.is_some_and(|name| *name == format!("at://{handle}"));
    let records = pds.repository(&head.did).map(|state| state.records);
    let paths = records.iter().flat_map(BTreeMap::keys);
    let collections: BTreeSet<&str> = paths.filter_map(|path| path.split('/').next()).collect();
    Ok(Json(json!({
        "handle": handle,
        "did": did,
        "didDoc": document,
        "collections": collections,
        "handleIsCorrect": correct,
    })))
}
