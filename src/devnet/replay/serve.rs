//! HTTP of a replay: the XRPC a relay asks hosts for, and the PLC directory's look-ups.

use std::collections::HashMap;
use std::sync::Arc;

use axum::extract::{Path, Query, State, WebSocketUpgrade};
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use axum::{Json, Router};
use serde::Deserialize;
use serde_json::json;

use super::Clock;
use super::audit::{Audit, DocumentStyle, Registration};
use super::host::Host;

#[derive(Deserialize)]
struct Subscribe {
    cursor: Option<i64>,
}

#[derive(Deserialize)]
struct Account {
    did: String,
}

/// The XRPC of one replayed host.
pub(super) fn host(host: Arc<Host>) -> Router {
    Router::new()
        .route(
            "/xrpc/com.atproto.sync.subscribeRepos",
            get(subscribe_repos),
        )
        .route("/xrpc/com.atproto.sync.getRepoStatus", get(repo_status))
        .route("/xrpc/com.atproto.sync.listRepos", get(list_repos))
        .route(
            "/xrpc/com.atproto.server.describeServer",
            get(describe_server),
        )
        .route("/xrpc/_health", get(health))
        .with_state(host)
}

async fn subscribe_repos(
    State(host): State<Arc<Host>>,
    Query(query): Query<Subscribe>,
    upgrade: WebSocketUpgrade,
) -> Response {
    upgrade.on_upgrade(move |socket| host.feed().clone().serve(socket, query.cursor))
}

async fn repo_status(State(host): State<Arc<Host>>, Query(account): Query<Account>) -> Response {
    let Some(repo) = host.repo(&account.did) else {
        return error(
            StatusCode::BAD_REQUEST,
            "RepoNotFound",
            &format!("Could not find repo for DID: {}", account.did),
        );
    };
    let mut body = json!({ "did": account.did, "active": repo.active });
    if let Some(status) = repo.status.filter(|_| !repo.active) {
        body["status"] = status.into();
    }
    if let Some(rev) = repo.rev.filter(|_| repo.active) {
        body["rev"] = rev.into();
    }
    Json(body).into_response()
}

/// One page with all of them: a capture's accounts are few.
async fn list_repos(State(host): State<Arc<Host>>) -> Response {
    let repos = host.repos().into_iter().filter_map(|(did, repo)| {
        let mut entry = json!({ "did": did, "rev": repo.rev?, "active": repo.active });
        if let Some(status) = repo.status {
            entry["status"] = status.into();
        }
        Some(entry)
    });
    Json(json!({ "repos": repos.collect::<Vec<_>>() })).into_response()
}

async fn describe_server() -> Response {
    Json(json!({ "did": "did:web:localhost", "availableUserDomains": [] })).into_response()
}

async fn health() -> Response {
    Json(json!({ "version": concat!("replay ", env!("CARGO_PKG_VERSION")) })).into_response()
}

fn error(status: StatusCode, name: &str, message: &str) -> Response {
    (status, Json(json!({ "error": name, "message": message }))).into_response()
}

/// The documents of a capture.
pub(super) struct Directory {
    audits: HashMap<String, Audit>,
    style: DocumentStyle,
    /// Captured endpoint → where it is replayed.
    moved: HashMap<String, String>,
    clock: Arc<Clock>,
}

impl Directory {
    pub fn new(
        audits: Vec<Audit>,
        style: DocumentStyle,
        moved: HashMap<String, String>,
        clock: Arc<Clock>,
    ) -> Arc<Directory> {
        let audits = audits
            .into_iter()
            .map(|audit| (audit.did().to_owned(), audit))
            .collect();
        Arc::new(Directory {
            audits,
            style,
            moved,
            clock,
        })
    }

    fn registration(&self, did: &str) -> Registration {
        let endpoint = |captured: &str| {
            self.moved
                .get(captured)
                .cloned()
                .unwrap_or_else(|| captured.to_owned())
        };
        self.audits
            .get(did)
            .map_or(Registration::Unregistered, |audit| {
                audit.at(self.clock.now(), self.style, endpoint)
            })
    }
}

/// The look-ups of the directory.
pub(super) fn directory(directory: Arc<Directory>) -> Router {
    Router::new()
        .route("/{did}", get(document))
        .route("/{did}/log/audit", get(audit_log))
        .route("/_health", get(health))
        .with_state(directory)
}

async fn document(State(directory): State<Arc<Directory>>, Path(did): Path<String>) -> Response {
    match directory.registration(&did) {
        Registration::Document(document) => (
            [("content-type", "application/did+ld+json")],
            document.to_string(),
        )
            .into_response(),
        Registration::Unregistered => unregistered(&did),
        Registration::Tombstoned => (
            StatusCode::GONE,
            Json(json!({ "message": format!("DID not available: {did}") })),
        )
            .into_response(),
    }
}

async fn audit_log(State(directory): State<Arc<Directory>>, Path(did): Path<String>) -> Response {
    match directory
        .audits
        .get(&did)
        .map(|audit| audit.log_at(directory.clock.now()))
    {
        Some(log) if !log.is_empty() => Json(log).into_response(),
        _ => unregistered(&did),
    }
}

fn unregistered(did: &str) -> Response {
    (
        StatusCode::NOT_FOUND,
        Json(json!({ "message": format!("DID not registered: {did}") })),
    )
        .into_response()
}
