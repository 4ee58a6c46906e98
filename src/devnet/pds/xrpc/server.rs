//! com.atproto.server: accounts and sessions. Tokens are random, never expire and are never
//! refreshed; mails are not sent, so no token from one is asked for.

use axum::Json;
use axum::extract::State;
use serde::Deserialize;
use serde_json::{Value, json};

use super::input::{Auth, Input, XrpcError};
use crate::devnet::pds::{Account, AccountStatus, Pds};

#[derive(Deserialize)]
pub(super) struct CreateAccount {
    handle: String,
    password: Option<String>,
    did: Option<String>,
}

#[derive(Deserialize)]
pub(super) struct CreateSession {
    identifier: String,
    password: String,
}

#[derive(Deserialize)]
pub(super) struct DeleteAccount {
    did: String,
    password: String,
}

pub(super) async fn describe(State(pds): State<Pds>) -> Json<Value> {
    Json(json!({
        "did": format!("did:web:{}", pds.host().replace(':', "%3A")),
        "availableUserDomains": [format!(".{}", pds.domain())],
        "inviteCodeRequired": false,
        "phoneVerificationRequired": false,
        "links": {},
        "contact": {},
    }))
}

pub(super) async fn create_account(
    State(pds): State<Pds>,
    Input(input): Input<CreateAccount>,
) -> Result<Json<Value>, XrpcError> {
    if let Some(did) = input.did {
        let words = format!(
            "{did} cannot be brought along: move accounts with POST /devnet/migrateAccount"
        );
        return Err(XrpcError::named("UnsupportedDomain", words));
    }
    let account = pds.create_account_with(&input.handle, None, input.password)?;
    Ok(Json(session(&pds, &account)))
}

/// A session as createAccount, createSession and the migration answer it.
pub(super) fn session(pds: &Pds, account: &Account) -> Value {
    let status = pds
        .head(&account.did)
        .map_or(AccountStatus::Deleted, |state| state.status);
    let mut session = json!({
        "did": account.did.as_str(),
        "handle": account.handle,
        "accessJwt": account.access_token,
        "refreshJwt": account.access_token,
        "active": status == AccountStatus::Active,
    });
    if let Some(status) = status.as_str() {
        session["status"] = json!(status);
    }
    if let Ok(document) = pds.inner.plc.document(account.did.as_str()) {
        session["didDoc"] = document;
    }
    session
}

pub(super) async fn create_session(
    State(pds): State<Pds>,
    Input(input): Input<CreateSession>,
) -> Result<Json<Value>, XrpcError> {
    let account = pds.log_in(&input.identifier, &input.password);
    let refused =
        || XrpcError::unauthorized("AuthenticationRequired", "Invalid identifier or password");
    Ok(Json(session(&pds, &account.ok_or_else(refused)?)))
}

pub(super) async fn get_session(
    State(pds): State<Pds>,
    auth: Auth,
) -> Result<Json<Value>, XrpcError> {
    let state = pds
        .repository(&auth.0)
        .ok_or_else(|| XrpcError::invalid("Could not find user info"))?;
    let mut session = json!({
        "did": state.did.as_str(),
        "handle": state.handle,
        "active": state.status == AccountStatus::Active,
    });
    if let Some(status) = state.status.as_str() {
        session["status"] = json!(status);
    }
    Ok(Json(session))
}

pub(super) async fn activate(State(pds): State<Pds>, auth: Auth) -> Result<(), XrpcError> {
    Ok(pds.activate(&auth.0)?)
}

pub(super) async fn deactivate(State(pds): State<Pds>, auth: Auth) -> Result<(), XrpcError> {
    Ok(pds.deactivate(&auth.0)?)
}

pub(super) async fn delete_account(
    State(pds): State<Pds>,
    Input(input): Input<DeleteAccount>,
) -> Result<(), XrpcError> {
    let account = pds.log_in(&input.did, &input.password);
    let refused = || XrpcError::unauthorized("AuthenticationRequired", "Invalid did or password");
    Ok(pds.delete_account(&account.ok_or_else(refused)?.did)?)
}
