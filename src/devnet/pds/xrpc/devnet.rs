//! What a devnet can be told to do that has no lexicon. Asks for no password.

use axum::Json;
use axum::extract::State;
use axum::http::StatusCode;
use serde::Deserialize;
use serde_json::{Value, json};

use super::input::{Input, XrpcError};
use super::server::session;
use crate::atproto::did::Did;
use crate::devnet::pds::{Pds, PdsError};

#[derive(Deserialize)]
pub(super) struct RotateKey {
    did: String,
}

#[derive(Deserialize)]
pub(super) struct Migrate {
    did: String,
    /// Base URL of the PDS to move to.
    pds: String,
}

#[derive(Deserialize)]
pub(super) struct Takedown {
    did: String,
    applied: bool,
}

#[derive(Deserialize)]
pub(super) struct RequestCrawl {
    /// Base URL of the relay.
    relay: String,
}

fn find(pds: &Pds, did: &str) -> Result<Did, PdsError> {
    pds.find(did)
        .ok_or_else(|| PdsError::NoAccount(did.to_owned()))
}

pub(super) async fn rotate_key(
    State(pds): State<Pds>,
    Input(input): Input<RotateKey>,
) -> Result<Json<Value>, XrpcError> {
    let did = find(&pds, &input.did)?;
    Ok(Json(json!({ "signingKey": pds.rotate_key(&did)? })))
}

pub(super) async fn migrate(
    State(pds): State<Pds>,
    Input(input): Input<Migrate>,
) -> Result<Json<Value>, XrpcError> {
    let did = find(&pds, &input.did)?;
    let to = pds.peer(&input.pds).ok_or(PdsError::NoPds(input.pds))?;
    let account = pds.migrate(&did, &to)?;
    Ok(Json(session(&to, &account)))
}

pub(super) async fn takedown(
    State(pds): State<Pds>,
    Input(input): Input<Takedown>,
) -> Result<(), XrpcError> {
    let did = find(&pds, &input.did)?;
    if input.applied {
        return Ok(pds.take_down(&did)?);
    }
    Ok(pds.reverse_takedown(&did)?)
}

pub(super) async fn request_crawl(
    State(pds): State<Pds>,
    Input(input): Input<RequestCrawl>,
) -> Result<(), XrpcError> {
    let asked = pds.request_crawl(&input.relay).await;
    asked.map_err(|error| {
        XrpcError::new(
            StatusCode::BAD_GATEWAY,
            "UpstreamFailure",
            error.to_string(),
        )
    })
}
