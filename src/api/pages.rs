//! The pages beside XRPC: whether the relay is well, and what it is.

use super::State;
use crate::telemetry::Reader;
use axum::extract::State as Extract;
use axum::response::Response;

const HOME: &str = concat!(
    "This is an AT Protocol relay, running atproto-relay ",
    env!("CARGO_PKG_VERSION"),
    ".\n\n\
     The firehose is a WebSocket at  /xrpc/com.atproto.sync.subscribeRepos\n\
     Hosts it reads are listed at    /xrpc/com.atproto.sync.listHosts\n\
     Whether it is well is told at   /xrpc/_health\n\
     The manual is at                /docs\n\n\
     The protocol: https://atproto.com\n"
);

/// `GET /`.
pub(super) async fn home() -> &'static str {
    HOME
}

/// `GET /xrpc/_health` and `GET /_health`: 503 when the relay cannot do its work, else 200; the body names its problems.
pub(super) async fn health(Extract(state): Extract<State>) -> Response {
    state.operations.health().respond(Reader::Public)
}

/// The same on a listener that is the operator's alone: with the causes.
pub(super) async fn operators_health(Extract(state): Extract<State>) -> Response {
    state.operations.health().respond(Reader::Operator)
}
