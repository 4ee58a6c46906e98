//! What handlers take and what they refuse with: query parameters, JSON bodies and bearer tokens,
//! each with the error body of the lexicons.

use axum::Json;
use axum::extract::{FromRequest, FromRequestParts, Query, Request};
use axum::http::request::Parts;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde::de::DeserializeOwned;
use serde_json::json;

use crate::atproto::did::Did;
use crate::devnet::pds::{AccountStatus, Pds, PdsError, RepoError};

/// `{"error","message"}` with its status.
#[derive(Debug)]
pub(super) struct XrpcError {
    status: StatusCode,
    error: &'static str,
    message: String,
}

impl XrpcError {
    pub(super) fn new(status: StatusCode, error: &'static str, message: impl Into<String>) -> Self {
        XrpcError {
            status,
            error,
            message: message.into(),
        }
    }

    /// 400 under a name of the lexicon.
    pub(super) fn named(error: &'static str, message: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, error, message)
    }

    /// 400 InvalidRequest.
    pub(super) fn invalid(message: impl Into<String>) -> Self {
        Self::named("InvalidRequest", message)
    }

    /// 401 under a name.
    pub(super) fn unauthorized(error: &'static str, message: impl Into<String>) -> Self {
        Self::new(StatusCode::UNAUTHORIZED, error, message)
    }
}

impl IntoResponse for XrpcError {
    fn into_response(self) -> Response {
        (
            self.status,
            Json(json!({ "error": self.error, "message": self.message })),
        )
            .into_response()
    }
}

impl From<PdsError> for XrpcError {
    fn from(error: PdsError) -> Self {
        let name = match &error {
            PdsError::NoAccount(_) => "RepoNotFound",
            PdsError::Status { status, .. } => status_error(*status),
            PdsError::HandleTaken(_) => "HandleNotAvailable",
            PdsError::Handle(_) => "InvalidHandle",
            PdsError::Repo(RepoError::Swap { .. }) => "InvalidSwap",
            PdsError::AlreadyHere(_) | PdsError::NoPds(_) | PdsError::Repo(_) => "InvalidRequest",
            PdsError::Plc(_) | PdsError::Peer(_) | PdsError::Operation(_) => "InvalidRequest",
            PdsError::Document(_) => "DidNotFound",
        };
        Self::named(name, error.to_string())
    }
}

/// The sync lexicons' error for a repository that is not active.
fn status_error(status: AccountStatus) -> &'static str {
    match status {
        AccountStatus::Active => "InvalidRequest",
        AccountStatus::Deactivated => "RepoDeactivated",
        AccountStatus::Takendown => "RepoTakendown",
        AccountStatus::Deleted => "RepoNotFound",
    }
}

/// Query parameters.
pub(super) struct Params<T>(pub T);

impl<T: DeserializeOwned> FromRequestParts<Pds> for Params<T> {
    type Rejection = XrpcError;

    async fn from_request_parts(parts: &mut Parts, _: &Pds) -> Result<Self, XrpcError> {
        let query = Query::<T>::try_from_uri(&parts.uri);
        query
            .map(|Query(params)| Params(params))
            .map_err(|error| XrpcError::invalid(error.body_text()))
    }
}

/// A JSON body.
pub(super) struct Input<T>(pub T);

impl<T: DeserializeOwned> FromRequest<Pds> for Input<T> {
    type Rejection = XrpcError;

    async fn from_request(request: Request, pds: &Pds) -> Result<Self, XrpcError> {
        let body = Json::<T>::from_request(request, pds).await;
        body.map(|Json(input)| Input(input))
            .map_err(|error| XrpcError::invalid(error.body_text()))
    }
}

/// The account whose bearer token came with the request.
pub(super) struct Auth(pub Did);

impl FromRequestParts<Pds> for Auth {
    type Rejection = XrpcError;

    async fn from_request_parts(parts: &mut Parts, pds: &Pds) -> Result<Self, XrpcError> {
        let header = parts
            .headers
            .get(header::AUTHORIZATION)
            .and_then(|value| value.to_str().ok());
        let token = header.and_then(|value| value.strip_prefix("Bearer "));
        let token = token
            .ok_or_else(|| XrpcError::unauthorized("AuthMissing", "Authentication Required"))?;
        let did = pds.session(token.trim());
        did.map(Auth)
            .ok_or_else(|| XrpcError::named("InvalidToken", "Token could not be verified"))
    }
}

impl Auth {
    /// The account, if `repo` (a DID or handle) names it.
    pub(super) fn for_repo(self, pds: &Pds, repo: &str) -> Result<Did, XrpcError> {
        match pds.find(repo) {
            Some(did) if did == self.0 => Ok(did),
            Some(_) => Err(XrpcError::unauthorized(
                "AuthenticationRequired",
                "Authentication Required",
            )),
            None => Err(XrpcError::invalid(format!("Could not find repo: {repo}"))),
        }
    }
}
