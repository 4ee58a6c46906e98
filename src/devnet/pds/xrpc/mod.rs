//! The XRPC endpoints of a PDS over plain HTTP, with the inputs, outputs and error names of the
//! lexicons. Thin handlers over [`Pds`]; `/devnet/…` does what has no lexicon.

mod devnet;
mod identity;
mod input;
mod repo;
mod server;
mod subscribe;
mod sync;

use std::sync::atomic::Ordering;

use axum::extract::{Request, State};
use axum::http::{HeaderValue, StatusCode, header};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use serde_json::{Value, json};

use self::input::XrpcError;
use super::Pds;

/// What this server calls itself; a relay refuses hosts that say they are relays.
const SERVER: HeaderValue = HeaderValue::from_static("atproto-devnet-pds");

pub(super) fn router(pds: &Pds) -> Router {
    Router::new()
        .merge(xrpc(
            "com.atproto.server.describeServer",
            get(server::describe),
        ))
        .merge(xrpc(
            "com.atproto.server.createAccount",
            post(server::create_account),
        ))
        .merge(xrpc(
            "com.atproto.server.createSession",
            post(server::create_session),
        ))
        .merge(xrpc(
            "com.atproto.server.getSession",
            get(server::get_session),
        ))
        .merge(xrpc(
            "com.atproto.server.activateAccount",
            post(server::activate),
        ))
        .merge(xrpc(
            "com.atproto.server.deactivateAccount",
            post(server::deactivate),
        ))
        .merge(xrpc(
            "com.atproto.server.deleteAccount",
            post(server::delete_account),
        ))
        .merge(xrpc("com.atproto.repo.createRecord", post(repo::create)))
        .merge(xrpc("com.atproto.repo.putRecord", post(repo::put)))
        .merge(xrpc("com.atproto.repo.deleteRecord", post(repo::delete)))
        .merge(xrpc(
            "com.atproto.repo.applyWrites",
            post(repo::apply_writes),
        ))
        .merge(xrpc("com.atproto.repo.getRecord", get(repo::get)))
        .merge(xrpc("com.atproto.repo.listRecords", get(repo::list)))
        .merge(xrpc("com.atproto.repo.describeRepo", get(repo::describe)))
        .merge(xrpc("com.atproto.sync.getRepo", get(sync::get_repo)))
        .merge(xrpc(
            "com.atproto.sync.getLatestCommit",
            get(sync::latest_commit),
        ))
        .merge(xrpc(
            "com.atproto.sync.getRepoStatus",
            get(sync::repo_status),
        ))
        .merge(xrpc("com.atproto.sync.listRepos", get(sync::list_repos)))
        .merge(xrpc(
            "com.atproto.sync.subscribeRepos",
            get(subscribe::subscribe_repos),
        ))
        .merge(xrpc(
            "com.atproto.identity.resolveHandle",
            get(identity::resolve_handle),
        ))
        .merge(xrpc(
            "com.atproto.identity.updateHandle",
            post(identity::update_handle),
        ))
        .route("/devnet/rotateKey", post(devnet::rotate_key))
        .route("/devnet/migrateAccount", post(devnet::migrate))
        .route("/devnet/importAccount", post(devnet::import))
        .route("/devnet/repositories", get(devnet::repositories))
        .route("/devnet/traffic", post(devnet::traffic))
        .route("/devnet/takedown", post(devnet::takedown))
        .route("/devnet/requestCrawl", post(devnet::request_crawl))
        .route("/xrpc/_health", get(health))
        .fallback(not_implemented)
        .layer(middleware::from_fn_with_state(pds.clone(), always))
        .with_state(pds.clone())
}

fn xrpc(method: &str, handler: axum::routing::MethodRouter<Pds>) -> Router<Pds> {
    Router::new().route(&format!("/xrpc/{method}"), handler.fallback(wrong_method))
}

/// Says who answers, and that nobody does while the PDS plays dead.
async fn always(State(pds): State<Pds>, request: Request, next: Next) -> Response {
    if pds.inner.offline.load(Ordering::SeqCst) {
        return StatusCode::SERVICE_UNAVAILABLE.into_response();
    }
    let mut response = next.run(request).await;
    response.headers_mut().insert(header::SERVER, SERVER);
    response
}

async fn health() -> Json<Value> {
    Json(json!({ "version": env!("CARGO_PKG_VERSION") }))
}

async fn not_implemented() -> XrpcError {
    XrpcError::new(
        StatusCode::NOT_IMPLEMENTED,
        "MethodNotImplemented",
        "Method Not Implemented",
    )
}

async fn wrong_method() -> XrpcError {
    XrpcError::invalid("Incorrect HTTP method")
}
