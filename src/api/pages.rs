//! The pages beside XRPC: whether the relay is well, and what it is.

use super::State;
use axum::Json;
use axum::extract::State as Extract;
use axum::response::{IntoResponse, Response};
use http::StatusCode;
use serde::Serialize;
use std::time::Duration;

/// A database that takes longer counts as away.
const HEALTH_TIMEOUT: Duration = Duration::from_secs(5);

const HOME: &str = concat!(
    "This is an AT Protocol relay, running atproto-relay ",
    env!("CARGO_PKG_VERSION"),
    ".\n\n\
     The firehose is a WebSocket at  /xrpc/com.atproto.sync.subscribeRepos\n\
     Hosts it reads are listed at    /xrpc/com.atproto.sync.listHosts\n\
     Whether it is well is told at   /xrpc/_health\n\n\
     The protocol: https://atproto.com\n"
);

#[derive(Serialize)]
struct Health {
    status: &'static str,
    version: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    msg: Option<String>,
}

/// `GET /`.
pub(super) async fn home() -> &'static str {
    HOME
}

/// `GET /xrpc/_health` and `GET /_health`: 200 when the relay can do its work, else 503.
pub(super) async fn health(Extract(state): Extract<State>) -> Response {
    let database = match tokio::time::timeout(HEALTH_TIMEOUT, state.store.check()).await {
        Ok(Ok(())) => None,
        Ok(Err(error)) => {
            tracing::error!(%error, "the health check cannot reach the database");
            Some("can't connect to database".to_owned())
        }
        Err(_) => Some("the database does not answer".to_owned()),
    };
    let msg = database.or_else(|| state.operations.trouble());
    let (code, status) = match msg {
        None => (StatusCode::OK, "ok"),
        Some(_) => (StatusCode::SERVICE_UNAVAILABLE, "error"),
    };
    let version = env!("CARGO_PKG_VERSION");
    (
        code,
        Json(Health {
            status,
            version,
            msg,
        }),
    )
        .into_response()
}
