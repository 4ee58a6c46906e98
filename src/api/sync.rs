//! The public XRPC methods of `com.atproto.sync`, as their lexicons have them. An answer is never older than an event
//! that a consumer has, or than an operator's request that was answered. All reads are public ones: they wait for no
//! others, and no others for them.

use super::State;
use super::error::ApiError;
use super::input::{Parameters, json, quoted};
use crate::atproto::tid::Tid;
use crate::client::Client;
use crate::discovery::{CrawlError, Requester};
use crate::store::{AccountRow, HostId, HostRow, LocalStatus, UpstreamStatus};
use axum::body::Bytes;
use axum::extract::State as Extract;
use axum::extract::rejection::BytesRejection;
use axum::response::{IntoResponse, Response};
use axum::{Extension, Json};
use http::{HeaderMap, StatusCode, Uri, header};
use serde::{Deserialize, Serialize};
use std::net::Ipv4Addr;
use std::ops::RangeInclusive;

/// Pages of `listHosts` and `listRepos` (their lexicons).
const PAGE: RangeInclusive<u32> = 1..=1_000;
const HOSTS_DEFAULT: u32 = 200;
/// Most reads of the database for one page of hosts, each of the largest page.
const HOST_READS: u32 = 10;
const REPOS_DEFAULT: u32 = 500;

#[derive(Serialize)]
pub(super) struct Host {
    hostname: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    seq: Option<i64>,
    #[serde(rename = "accountCount")]
    account_count: i64,
    status: &'static str,
}

impl From<HostRow> for Host {
    fn from(row: HostRow) -> Self {
        Self {
            hostname: row.hostname,
            seq: row.cursor,
            account_count: row.account_count,
            status: row.status.as_str(),
        }
    }
}

#[derive(Serialize)]
pub(super) struct HostPage {
    #[serde(skip_serializing_if = "Option::is_none")]
    cursor: Option<String>,
    hosts: Vec<Host>,
}

/// `com.atproto.sync.listHosts`: hosts that ever sent an event, the oldest first.
pub(super) async fn list_hosts(
    Extract(state): Extract<State>,
    uri: Uri,
) -> Result<Json<HostPage>, ApiError> {
    let parameters = Parameters::of(&uri);
    let limit = parameters.limit(PAGE, HOSTS_DEFAULT)?;
    let mut after = parameters.host_cursor()?;
    let mut hosts = Vec::new();
    let mut next = None;
    // More than a page where hosts never sent an event.
    for _ in 0..HOST_READS {
        let rows = state.store.public().list_hosts(after, *PAGE.end()).await?;
        let last = rows.len() < *PAGE.end() as usize;
        after = rows.last().map(|row| row.id).or(after);
        for row in rows {
            let row = current(&state, row);
            if row.cursor.is_none() {
                continue;
            }
            if hosts.len() == limit as usize {
                return Ok(host_page(hosts, next));
            }
            next = Some(row.id);
            hosts.push(Host::from(row));
        }
        if last {
            return Ok(host_page(hosts, None));
        }
    }
    Ok(host_page(hosts, after))
}

fn host_page(hosts: Vec<Host>, next: Option<HostId>) -> Json<HostPage> {
    let cursor = next.map(|next| next.to_string());
    Json(HostPage { cursor, hosts })
}

/// A host as it is now: the database has its cursor, its status and the number of its accounts a moment later.
pub(super) fn current(state: &State, row: HostRow) -> HostRow {
    match state.operations.standing(row.id) {
        Some(now) => HostRow {
            cursor: now.cursor.or(row.cursor),
            status: now.status,
            account_count: now.account_count,
            ..row
        },
        None => row,
    }
}

/// `com.atproto.sync.getHostStatus`.
pub(super) async fn get_host_status(
    Extract(state): Extract<State>,
    uri: Uri,
) -> Result<Json<Host>, ApiError> {
    let hostname = Parameters::of(&uri).hostname("hostname")?;
    let row = state.store.public().host_by_name(&hostname).await?;
    row.map(|row| Json(Host::from(current(&state, row))))
        .ok_or_else(|| {
            ApiError::host_not_found(format!("the host {} is not known here", quoted(&hostname)))
        })
}

#[derive(Serialize)]
pub(super) struct Repo {
    did: String,
    head: String,
    rev: String,
    active: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    status: Option<String>,
}

#[derive(Serialize)]
pub(super) struct RepoPage {
    #[serde(skip_serializing_if = "Option::is_none")]
    cursor: Option<String>,
    repos: Vec<Repo>,
}

/// `com.atproto.sync.listRepos`: every account with a known commit, the oldest first.
pub(super) async fn list_repos(
    Extract(state): Extract<State>,
    uri: Uri,
) -> Result<Json<RepoPage>, ApiError> {
    let parameters = Parameters::of(&uri);
    let limit = parameters.limit(PAGE, REPOS_DEFAULT)?;
    let after = parameters.account_cursor()?;
    let page = state.store.public().list_accounts(after, limit).await?;
    Ok(Json(RepoPage {
        cursor: page.next.map(|next| next.to_string()),
        repos: page.rows.iter().filter_map(repo).collect(),
    }))
}

fn repo(row: &AccountRow) -> Option<Repo> {
    let state = row.repo?;
    let (active, status) = row.public_status();
    Some(Repo {
        did: row.did.to_string(),
        head: state.commit.to_string(),
        rev: state.rev.to_string(),
        active,
        status: status.map(str::to_owned),
    })
}

#[derive(Serialize)]
pub(super) struct RepoStatus {
    did: String,
    active: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    status: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    rev: Option<String>,
}

/// `com.atproto.sync.getRepoStatus`.
pub(super) async fn get_repo_status(
    Extract(state): Extract<State>,
    uri: Uri,
) -> Result<Json<RepoStatus>, ApiError> {
    let row = known_account(&state, &Parameters::of(&uri)).await?;
    let (active, status) = row.public_status();
    Ok(Json(RepoStatus {
        did: row.did.to_string(),
        active,
        status: status.map(str::to_owned),
        rev: row.repo.filter(|_| active).map(|repo| repo.rev.to_string()),
    }))
}

#[derive(Serialize)]
pub(super) struct LatestCommit {
    cid: String,
    rev: String,
}

/// `com.atproto.sync.getLatestCommit`.
pub(super) async fn get_latest_commit(
    Extract(state): Extract<State>,
    uri: Uri,
) -> Result<Json<LatestCommit>, ApiError> {
    let row = known_account(&state, &Parameters::of(&uri)).await?;
    served(&row)?;
    let repo = row.repo.ok_or_else(|| {
        ApiError::repo_not_found(format!("no commit of {} has been seen yet", row.did))
    })?;
    Ok(Json(LatestCommit {
        cid: repo.commit.to_string(),
        rev: repo.rev.to_string(),
    }))
}

/// `com.atproto.sync.getRepo`: the way to the account's own PDS.
pub(super) async fn get_repo(
    Extract(state): Extract<State>,
    uri: Uri,
) -> Result<Response, ApiError> {
    let parameters = Parameters::of(&uri);
    let since = parameters.get("since").filter(|since| !since.is_empty());
    if let Some(since) = since {
        Tid::parse(since).map_err(|error| {
            ApiError::invalid(format!("{} is not a TID: {error}", quoted(since)))
        })?;
    }
    let row = known_account(&state, &parameters).await?;
    served(&row)?;
    let host = state.store.public().host(row.host).await?.ok_or_else(|| {
        ApiError::internal(&format_args!(
            "the account {} is on the host {}, which is not in the database",
            row.did, row.host
        ))
    })?;
    let mut query = url::form_urlencoded::Serializer::new(String::new());
    query.append_pair("did", row.did.as_str());
    if let Some(since) = since {
        query.append_pair("since", since);
    }
    let scheme = if host.tls { "https" } else { "http" };
    let place = format!(
        "{scheme}://{}/xrpc/com.atproto.sync.getRepo?{}",
        host.hostname,
        query.finish()
    );
    Ok((StatusCode::FOUND, [(header::LOCATION, place)]).into_response())
}

async fn known_account(state: &State, parameters: &Parameters) -> Result<AccountRow, ApiError> {
    let did = parameters.did()?;
    let row = state.store.public().account(&did).await?;
    row.ok_or_else(|| ApiError::repo_not_found(format!("the account {did} is not known here")))
}

/// Refuses what may not be served, under the lexicons' names; those without one are `RepoInactive`.
fn served(row: &AccountRow) -> Result<(), ApiError> {
    let refuse = |name, what: &str| {
        Err(ApiError::new(
            StatusCode::FORBIDDEN,
            name,
            format!("the account {} {what}", row.did),
        ))
    };
    match row.local {
        LocalStatus::Active => {}
        LocalStatus::TakenDown => return refuse("RepoTakendown", "is taken down"),
        LocalStatus::Suspended => return refuse("RepoSuspended", "is suspended"),
        LocalStatus::Throttled => {
            return refuse("RepoInactive", "is over the account limit of its host");
        }
        LocalStatus::Desynchronized => return refuse("RepoInactive", "is out of sync"),
    }
    match &row.upstream {
        UpstreamStatus::Active => Ok(()),
        UpstreamStatus::Takendown => refuse("RepoTakendown", "is taken down by its host"),
        UpstreamStatus::Suspended => refuse("RepoSuspended", "is suspended by its host"),
        UpstreamStatus::Deactivated => refuse("RepoDeactivated", "is deactivated"),
        UpstreamStatus::Deleted => Err(ApiError::repo_not_found(format!(
            "the account {} is deleted",
            row.did
        ))),
        UpstreamStatus::Desynchronized
        | UpstreamStatus::Throttled
        | UpstreamStatus::Inactive
        | UpstreamStatus::Other(_) => refuse("RepoInactive", "is not active on its host"),
    }
}

#[derive(Deserialize)]
struct CrawlRequest {
    hostname: String,
}

/// `com.atproto.sync.requestCrawl`.
pub(super) async fn request_crawl(
    Extract(state): Extract<State>,
    client: Option<Extension<Client>>,
    headers: HeaderMap,
    body: Result<Bytes, BytesRejection>,
) -> Result<StatusCode, ApiError> {
    let request: CrawlRequest = json(&headers, body)?;
    let from = client.map_or(Ipv4Addr::UNSPECIFIED.into(), |client| client.0.address);
    let requested = state
        .operations
        .request_crawl(&request.hostname, Requester::Public(from));
    match requested.await {
        Ok(()) => Ok(StatusCode::OK),
        // Why not is for the operator: it says what is behind names that only this machine can resolve.
        Err(CrawlError::NotAPds { host, .. }) => {
            let message =
                format!("{host} does not answer com.atproto.server.describeServer as a PDS");
            Err(host_not_answering(message))
        }
        Err(error) => Err(error.into()),
    }
}

fn host_not_answering(message: String) -> ApiError {
    ApiError::new(StatusCode::BAD_REQUEST, "HostNotFound", message)
}

impl From<CrawlError> for ApiError {
    fn from(error: CrawlError) -> ApiError {
        let message = error.to_string();
        match error {
            CrawlError::Name(_) | CrawlError::IsRelay(_) => ApiError::invalid(message),
            CrawlError::Banned(_) => ApiError::new(StatusCode::FORBIDDEN, "HostBanned", message),
            CrawlError::NotAPds { .. } => host_not_answering(message),
            CrawlError::Closed => ApiError::new(StatusCode::FORBIDDEN, "Forbidden", message),
            CrawlError::RateLimited => {
                ApiError::new(StatusCode::TOO_MANY_REQUESTS, "RateLimitExceeded", message)
            }
            CrawlError::Store(_) => ApiError::internal(&message),
        }
    }
}
