//! Routes of the devnet that have no lexicon. They require no password.

use axum::Json;
use axum::extract::State;
use axum::http::StatusCode;
use serde::Deserialize;
use serde_json::{Value, json};

use super::input::{Input, XrpcError};
use super::server::session;
use crate::atproto::did::Did;
use crate::devnet::follower::AccountSnapshot;
use crate::devnet::pds::{Import, Imported, Pds, PdsError};

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

#[derive(Deserialize)]
pub(super) struct Traffic {
    /// Active accounts there have to be.
    #[serde(default)]
    accounts: usize,
    /// Records a second.
    rate: f64,
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
    match pds.peer(&input.pds) {
        Some(to) => {
            let account = pds.migrate(&did, &to)?;
            Ok(Json(session(&to, &account)))
        }
        None if input.pds.starts_with("http") => {
            let url = input.pds.trim_end_matches('/');
            Ok(Json(pds.migrate_to(&did, url)?))
        }
        None => Err(PdsError::NoPds(input.pds).into()),
    }
}

/// The other end of a migration between PDSes of two processes.
pub(super) async fn import(
    State(pds): State<Pds>,
    Input(input): Input<Import>,
) -> Result<Json<Imported>, XrpcError> {
    Ok(Json(pds.import(input)?))
}

/// Everything this PDS has, for comparison with what a consumer made of the firehose.
pub(super) async fn repositories(State(pds): State<Pds>) -> Json<Vec<AccountSnapshot>> {
    Json(
        pds.repositories()
            .into_iter()
            .map(AccountSnapshot::from)
            .collect(),
    )
}

/// Begins, changes and ends the traffic of this PDS.
pub(super) async fn traffic(
    State(pds): State<Pds>,
    Input(input): Input<Traffic>,
) -> Result<Json<Value>, XrpcError> {
    pds.keep_writing(input.accounts, input.rate)?;
    Ok(Json(json!({ "written": pds.written() })))
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
