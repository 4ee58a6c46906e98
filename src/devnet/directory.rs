//! The PLC directory as a PDS uses it: the one of this process, or another over HTTP. A request over
//! HTTP holds its thread up until the answer is there; it needs tokio's multi-threaded runtime.

use std::time::Duration;

use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::Value;

use super::plc::{AuditEntry, LogError, LookupError, Operation, Plc};

/// Longest a peer of a PDS may take to answer.
const ANSWER: Duration = Duration::from_secs(10);

/// A PLC directory.
#[derive(Clone, Debug)]
pub enum Directory {
    /// The one of this process.
    Local(Plc),
    /// The one at a base URL.
    Remote(String),
}

/// Why a directory did not take an operation.
#[derive(Debug, thiserror::Error)]
pub enum DirectoryError {
    #[error(transparent)]
    Refused(#[from] LogError),
    #[error(transparent)]
    Remote(#[from] RemoteError),
}

/// Why a directory gives no document.
#[derive(Debug, thiserror::Error)]
pub enum DocumentError {
    #[error(transparent)]
    None(#[from] LookupError),
    #[error(transparent)]
    Remote(#[from] RemoteError),
}

/// Why another server of the network did not do what it was asked for.
#[derive(Debug, thiserror::Error)]
pub enum RemoteError {
    #[error("{url} cannot be reached: {cause}")]
    Http { url: String, cause: reqwest::Error },
    #[error("{url} refuses: {status} {body}")]
    Refused {
        url: String,
        status: u16,
        body: String,
    },
}

impl Directory {
    /// Takes a new operation for `did`.
    pub(super) fn submit(&self, did: &str, operation: Operation) -> Result<(), DirectoryError> {
        match self {
            Directory::Local(plc) => plc.submit(did, operation).map(|_| ())?,
            Directory::Remote(url) => {
                post(&format!("{url}/{did}"), None, &operation).map(|_| ())?
            }
        }
        Ok(())
    }

    /// CID of the operation that stands for `did`: the `prev` of the next one.
    pub(super) fn head(&self, did: &str) -> Option<String> {
        match self {
            Directory::Local(plc) => plc.head(did),
            Directory::Remote(url) => {
                let log: Vec<AuditEntry> = get(&format!("{url}/{did}/log/audit")).ok()?;
                let standing = log.into_iter().rev().find(|entry| !entry.nullified);
                standing.map(|entry| entry.cid)
            }
        }
    }

    /// The document of `did`.
    pub(super) fn document(&self, did: &str) -> Result<Value, DocumentError> {
        Ok(match self {
            Directory::Local(plc) => plc.document(did)?,
            Directory::Remote(url) => get(&format!("{url}/{did}"))?,
        })
    }
}

impl From<&Plc> for Directory {
    fn from(plc: &Plc) -> Self {
        Directory::Local(plc.clone())
    }
}

/// The JSON at a URL.
fn get<T: DeserializeOwned>(url: &str) -> Result<T, RemoteError> {
    wait(async {
        let answer = crate::dial::plain_client()
            .get(url)
            .timeout(ANSWER)
            .send()
            .await;
        let answer = accepted(url, answer).await?;
        answer.json().await.map_err(|cause| failed(url, cause))
    })
}

/// Posts JSON, with a bearer token if one is given; the body of the answer.
pub(super) fn post(
    url: &str,
    token: Option<&str>,
    body: &impl Serialize,
) -> Result<String, RemoteError> {
    wait(async {
        let mut request = crate::dial::plain_client()
            .post(url)
            .timeout(ANSWER)
            .json(body);
        if let Some(token) = token {
            request = request.bearer_auth(token);
        }
        let answer = accepted(url, request.send().await).await?;
        answer.text().await.map_err(|cause| failed(url, cause))
    })
}

fn wait<T>(work: impl Future<Output = T>) -> T {
    tokio::task::block_in_place(|| tokio::runtime::Handle::current().block_on(work))
}

async fn accepted(
    url: &str,
    answer: Result<reqwest::Response, reqwest::Error>,
) -> Result<reqwest::Response, RemoteError> {
    let answer = answer.map_err(|cause| failed(url, cause))?;
    let status = answer.status();
    if status.is_success() {
        return Ok(answer);
    }
    Err(RemoteError::Refused {
        url: url.to_owned(),
        status: status.as_u16(),
        body: answer.text().await.unwrap_or_default(),
    })
}

fn failed(url: &str, cause: reqwest::Error) -> RemoteError {
    RemoteError::Http {
        url: url.to_owned(),
        cause,
    }
}
