//! Errors as XRPC has them: a status, a name for programs, a message for people.
//! The names are the lexicons' where a lexicon names one.

use crate::store::StoreError;
use axum::Json;
use axum::response::{IntoResponse, Response};
use http::{HeaderValue, StatusCode, header};
use serde::Serialize;

/// An answer that is not the one asked for.
#[derive(Debug)]
pub(super) struct ApiError {
    status: StatusCode,
    name: &'static str,
    message: String,
}

#[derive(Serialize)]
struct Body<'a> {
    error: &'a str,
    message: &'a str,
}

impl ApiError {
    pub(super) fn new(status: StatusCode, name: &'static str, message: impl Into<String>) -> Self {
        Self {
            status,
            name,
            message: message.into(),
        }
    }

    /// The request is not as the lexicon wants it.
    pub(super) fn invalid(message: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, "InvalidRequest", message)
    }

    /// No such account.
    pub(super) fn repo_not_found(message: impl Into<String>) -> Self {
        Self::new(StatusCode::NOT_FOUND, "RepoNotFound", message)
    }

    /// No such host.
    pub(super) fn host_not_found(message: impl Into<String>) -> Self {
        Self::new(StatusCode::NOT_FOUND, "HostNotFound", message)
    }

    /// Nothing at this address.
    pub(super) fn not_found() -> Self {
        Self::new(
            StatusCode::NOT_FOUND,
            "NotFound",
            "there is nothing at this address",
        )
    }

    /// Something is broken here. The details are for the log, not for strangers.
    pub(super) fn internal(error: &dyn std::fmt::Display) -> Self {
        tracing::error!(%error, "a request could not be answered");
        Self::new(
            StatusCode::INTERNAL_SERVER_ERROR,
            "InternalServerError",
            "the relay could not answer; see its log",
        )
    }
}

impl From<StoreError> for ApiError {
    fn from(error: StoreError) -> Self {
        match error {
            StoreError::UnknownAccount(did) => {
                Self::repo_not_found(format!("the account {did} is not known here"))
            }
            StoreError::UnknownHost(host) => {
                Self::host_not_found(format!("the host {host} is not known here"))
            }
            StoreError::Busy => {
                Self::new(StatusCode::SERVICE_UNAVAILABLE, "Busy", error.to_string())
            }
            // The store has said so in the log.
            StoreError::Unreachable { .. } => Self::new(
                StatusCode::SERVICE_UNAVAILABLE,
                "DatabaseAway",
                "the relay's database is away; try again later",
            ),
            StoreError::Url { .. }
            | StoreError::Login { .. }
            | StoreError::NoDatabase { .. }
            | StoreError::Newer { .. }
            | StoreError::Schema { .. }
            | StoreError::Privilege { .. }
            | StoreError::TakenOver { .. }
            | StoreError::ReadOnly { .. }
            | StoreError::Open { .. }
            | StoreError::NotADatabase { .. }
            | StoreError::Locked { .. }
            | StoreError::InUse { .. }
            | StoreError::Corrupt { .. }
            | StoreError::WriterStopped
            | StoreError::Unwritten { .. }
            | StoreError::Disk { .. }
            | StoreError::Query { .. } => Self::internal(&error),
        }
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let body = Body {
            error: self.name,
            message: &self.message,
        };
        let mut response = (self.status, Json(body)).into_response();
        if self.status == StatusCode::UNAUTHORIZED {
            let challenge =
                HeaderValue::from_static("Basic realm=\"atproto-relay admin\", charset=\"UTF-8\"");
            response
                .headers_mut()
                .insert(header::WWW_AUTHENTICATE, challenge);
        }
        response
    }
}
