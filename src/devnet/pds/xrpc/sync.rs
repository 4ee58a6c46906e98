//! com.atproto.sync, but for the event stream.

use axum::Json;
use axum::extract::State;
use axum::http::header;
use axum::response::{IntoResponse, Response};
use serde::Deserialize;
use serde_json::{Value, json};

use super::input::{Params, XrpcError};
use crate::atproto::did::Did;
use crate::atproto::tid::Tid;
use crate::devnet::pds::{AccountStatus, Pds, PdsError, RepoHead};

/// Default and largest `limit` of listRepos (lexicon).
const LIST_REPOS_DEFAULT: usize = 500;
const LIST_REPOS_MAX: usize = 1_000;

#[derive(Deserialize)]
pub(super) struct Repo {
    did: String,
    since: Option<String>,
}

#[derive(Deserialize)]
pub(super) struct ListRepos {
    limit: Option<usize>,
    cursor: Option<String>,
}

/// The head of a hosted repository that is active.
pub(super) fn available(pds: &Pds, identifier: &str) -> Result<RepoHead, PdsError> {
    let state = known(pds, identifier)?;
    match state.status {
        AccountStatus::Active => Ok(state),
        status => Err(PdsError::Status {
            did: state.did,
            status,
        }),
    }
}

fn known(pds: &Pds, identifier: &str) -> Result<RepoHead, PdsError> {
    let state = pds.find(identifier).and_then(|did| pds.head(&did));
    state.ok_or_else(|| PdsError::NoAccount(identifier.to_owned()))
}

pub(super) async fn get_repo(
    State(pds): State<Pds>,
    Params(params): Params<Repo>,
) -> Result<Response, XrpcError> {
    let since = match params.since {
        Some(since) => {
            Some(Tid::parse(&since).map_err(|_| XrpcError::invalid("since must be a TID"))?)
        }
        None => None,
    };
    let did = available(&pds, &params.did)?.did;
    let car = pds.repo_car(&did, since)?;
    Ok(([(header::CONTENT_TYPE, "application/vnd.ipld.car")], car).into_response())
}

pub(super) async fn latest_commit(
    State(pds): State<Pds>,
    Params(params): Params<Repo>,
) -> Result<Json<Value>, XrpcError> {
    let state = available(&pds, &params.did)?;
    Ok(Json(
        json!({ "cid": state.commit.to_string(), "rev": state.rev.to_string() }),
    ))
}

pub(super) async fn repo_status(
    State(pds): State<Pds>,
    Params(params): Params<Repo>,
) -> Result<Json<Value>, XrpcError> {
    let state = known(&pds, &params.did)?;
    let mut answer = json!({ "did": state.did.as_str() });
    describe_status(&mut answer, &state);
    Ok(Json(answer))
}

fn describe_status(answer: &mut Value, state: &RepoHead) {
    answer["active"] = json!(state.status == AccountStatus::Active);
    match state.status.as_str() {
        Some(status) => answer["status"] = json!(status),
        None => answer["rev"] = json!(state.rev.to_string()),
    }
}

pub(super) async fn list_repos(
    State(pds): State<Pds>,
    Params(params): Params<ListRepos>,
) -> Result<Json<Value>, XrpcError> {
    let limit = params.limit.unwrap_or(LIST_REPOS_DEFAULT);
    if !(1..=LIST_REPOS_MAX).contains(&limit) {
        return Err(XrpcError::invalid(format!(
            "limit must be between 1 and {LIST_REPOS_MAX}"
        )));
    }
    let after = match params.cursor {
        Some(cursor) => {
            Some(Did::parse(&cursor).map_err(|_| XrpcError::invalid("Malformed cursor"))?)
        }
        None => None,
    };
    let states = pds.heads(after.as_ref(), limit);
    let mut answer = json!({ "repos": states.iter().map(listed).collect::<Vec<_>>() });
    if let Some(last) = states.last().filter(|_| states.len() == limit) {
        answer["cursor"] = json!(last.did.as_str());
    }
    Ok(Json(answer))
}

fn listed(state: &RepoHead) -> Value {
    let mut repo = json!({ "did": state.did.as_str(), "head": state.commit.to_string() });
    describe_status(&mut repo, state);
    repo["rev"] = json!(state.rev.to_string());
    repo
}
