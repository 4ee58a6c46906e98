//! com.atproto.identity: handles of this PDS.

use axum::Json;
use axum::extract::State;
use serde::Deserialize;
use serde_json::{Value, json};

use super::input::{Auth, Input, Params, XrpcError};
use crate::devnet::pds::Pds;

#[derive(Deserialize)]
pub(super) struct Handle {
    handle: String,
}

pub(super) async fn resolve_handle(
    State(pds): State<Pds>,
    Params(params): Params<Handle>,
) -> Result<Json<Value>, XrpcError> {
    let did = pds
        .find(&params.handle)
        .ok_or_else(|| XrpcError::invalid("Unable to resolve handle"))?;
    Ok(Json(json!({ "did": did.as_str() })))
}

pub(super) async fn update_handle(
    State(pds): State<Pds>,
    auth: Auth,
    Input(input): Input<Handle>,
) -> Result<(), XrpcError> {
    Ok(pds.update_handle(&auth.0, &input.handle)?)
}
