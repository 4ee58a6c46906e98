//! What an account's own PDS says about its repository: `com.atproto.sync.getRepoStatus`.
//! Asked before an inactive account counts as inactive; the answer is not judged here.

use reqwest::{Client, StatusCode};
use serde::Deserialize;
use url::Url;

use super::HostName;
use crate::atproto::did::Did;
use crate::dial::{Guard, fetch};

/// Longest answer that is read; the lexicon's answer has four short fields.
const MAX_ANSWER_BYTES: usize = 16 * 1024;

/// The answer of `getRepoStatus`.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub struct RepoStatus {
    /// Whether the PDS serves the repository.
    pub active: bool,
    /// Why not, where it does not.
    pub status: Option<String>,
    /// The repository's current revision, where it is active.
    pub rev: Option<String>,
}

/// Why there is no answer.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RepoStatusError {
    /// The PDS knows no such repository.
    #[error("the PDS has no such repository")]
    NotFound,
    /// The PDS did not answer, or not by the lexicon.
    #[error("asking the PDS for the repository's status: {0}")]
    Unavailable(String),
}

#[derive(Deserialize)]
struct XrpcError {
    error: String,
}

/// Asks `pds` for the status of the repository of `did`.
pub(super) async fn ask(
    client: &Client,
    guard: &Guard,
    pds: &HostName,
    did: &Did,
) -> Result<RepoStatus, RepoStatusError> {
    let unavailable = |reason: String| RepoStatusError::Unavailable(reason);
    let mut url = Url::parse(&format!(
        "{}/xrpc/com.atproto.sync.getRepoStatus",
        pds.http_url()
    ))
    .map_err(|error| unavailable(error.to_string()))?;
    url.query_pairs_mut().append_pair("did", did.as_str());
    let answer = fetch(client, guard, &url, MAX_ANSWER_BYTES)
        .await
        .map_err(|error| unavailable(error.to_string()))?;
    if answer.status == StatusCode::OK {
        return serde_json::from_slice(&answer.body)
            .map_err(|error| unavailable(error.to_string()));
    }
    match serde_json::from_slice::<XrpcError>(&answer.body) {
        Ok(body) if answer.status.is_client_error() && body.error == "RepoNotFound" => {
            Err(RepoStatusError::NotFound)
        }
        _ => Err(unavailable(format!("status {}", answer.status))),
    }
}
