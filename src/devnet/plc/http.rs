//! The directory's routes, with the paths, status codes and bodies of the did-method-plc server.

use std::sync::atomic::Ordering;

use axum::extract::rejection::JsonRejection;
use axum::extract::{Path, Query, Request, State};
use axum::http::{StatusCode, header};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use axum::{Json, Router};
use serde::Deserialize;
use serde_json::{Value, json};

use super::{LogError, LookupError, Operation, Plc, document};
use crate::devnet::timestamp::Timestamp;

/// Entries `GET /export` answers when no count is given (did-method-plc server).
const DEFAULT_EXPORT: usize = 10;

/// An answer that is not 200: a status and a message.
struct Refusal(StatusCode, String);

impl IntoResponse for Refusal {
    fn into_response(self) -> Response {
        (self.0, Json(json!({ "message": self.1 }))).into_response()
    }
}

impl From<LookupError> for Refusal {
    fn from(error: LookupError) -> Self {
        let status = match error {
            LookupError::NotRegistered(_) => StatusCode::NOT_FOUND,
            LookupError::Tombstoned(_) => StatusCode::GONE,
        };
        Refusal(status, error.to_string())
    }
}

impl From<LogError> for Refusal {
    fn from(error: LogError) -> Self {
        Refusal(StatusCode::BAD_REQUEST, error.to_string())
    }
}

#[derive(Deserialize)]
struct ExportQuery {
    after: Option<String>,
    count: Option<usize>,
}

pub(super) fn router(plc: Plc) -> Router {
    Router::new()
        .route("/_health", get(health))
        .route("/export", get(export))
        .route("/{did}", get(did_document).post(submit))
        .route("/{did}/data", get(data))
        .route("/{did}/log", get(operations))
        .route("/{did}/log/audit", get(audit))
        .route("/{did}/log/last", get(last))
        .layer(middleware::from_fn_with_state(plc.clone(), outage))
        .with_state(plc)
}

async fn outage(State(plc): State<Plc>, request: Request, next: Next) -> Response {
    let mut hanging = plc.inner.hanging.subscribe();
    // The directory that sends is there as long as its requests.
    let _ = hanging.wait_for(|hanging| !hanging).await;
    if plc.inner.outage.load(Ordering::SeqCst) {
        return Refusal(StatusCode::SERVICE_UNAVAILABLE, "outage".to_owned()).into_response();
    }
    next.run(request).await
}

async fn health() -> Json<Value> {
    Json(json!({ "version": env!("CARGO_PKG_VERSION") }))
}

async fn did_document(
    State(plc): State<Plc>,
    Path(did): Path<String>,
) -> Result<Response, Refusal> {
    plc.inner.lookups.fetch_add(1, Ordering::SeqCst);
    let body = plc.document(&did)?.to_string();
    Ok((
        [(
            header::CONTENT_TYPE,
            "application/did+ld+json; charset=utf-8",
        )],
        body,
    )
        .into_response())
}

async fn data(State(plc): State<Plc>, Path(did): Path<String>) -> Result<Json<Value>, Refusal> {
    Ok(Json(document::data(&did, &plc.content(&did)?)))
}

async fn operations(
    State(plc): State<Plc>,
    Path(did): Path<String>,
) -> Result<Json<Vec<Operation>>, Refusal> {
    Ok(Json(plc.operations(&did)?))
}

async fn audit(State(plc): State<Plc>, Path(did): Path<String>) -> Result<Response, Refusal> {
    Ok(Json(plc.audit_log(&did)?).into_response())
}

async fn last(State(plc): State<Plc>, Path(did): Path<String>) -> Result<Json<Operation>, Refusal> {
    let last = plc.operations(&did)?.pop();
    last.map(Json)
        .ok_or_else(|| LookupError::NotRegistered(did).into())
}

async fn submit(
    State(plc): State<Plc>,
    Path(did): Path<String>,
    body: Result<Json<Operation>, JsonRejection>,
) -> Result<&'static str, Refusal> {
    let Json(operation) = body.map_err(|error| {
        Refusal(
            StatusCode::BAD_REQUEST,
            format!("Not a valid operation: {error}"),
        )
    })?;
    plc.submit(&did, operation)?;
    Ok("OK")
}

async fn export(
    State(plc): State<Plc>,
    Query(query): Query<ExportQuery>,
) -> Result<Response, Refusal> {
    let after: Option<Timestamp> = match query.after.as_deref().filter(|text| !text.is_empty()) {
        Some(text) => Some(text.parse().map_err(|_| {
            Refusal(
                StatusCode::BAD_REQUEST,
                format!("after: not a date: {text}"),
            )
        })?),
        None => None,
    };
    let mut lines = String::new();
    for entry in plc.export(after, query.count.unwrap_or(DEFAULT_EXPORT)) {
        lines.push_str(&serde_json::to_string(&entry).expect("entries are plain JSON"));
        lines.push('\n');
    }
    Ok(([(header::CONTENT_TYPE, "application/jsonlines")], lines).into_response())
}
