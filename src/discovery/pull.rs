//! `com.atproto.sync.listHosts` of another relay, page by page: where a new relay takes its first hosts from.
//! Nothing is added here, and what the other relay says of its hosts is not believed, only shown.

use std::collections::HashSet;

use reqwest::StatusCode;
use serde::Deserialize;
use url::Url;

use crate::dial::{FetchError, directory_client, get};

/// Hosts asked for in one page (the lexicon's maximum).
const PAGE: usize = 1_000;

/// Longest page that is read: [`PAGE`] hosts of half a kilobyte.
const MAX_PAGE_BYTES: usize = PAGE * 512;

/// Hosts after which the other relay is not believed any more; the whole network has some thousands.
const MAX_HOSTS: usize = 1_000_000;

/// A host as another relay lists it.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct RemoteHost {
    /// Its name, as the other relay writes it.
    pub hostname: String,
    /// Where the other relay stands in its stream.
    pub seq: Option<i64>,
    /// Accounts the other relay knows of.
    pub account_count: Option<i64>,
    /// `active`, `idle`, `offline`, `throttled` or `banned`.
    pub status: Option<String>,
}

#[derive(Deserialize)]
struct Page {
    cursor: Option<String>,
    hosts: Vec<RemoteHost>,
}

/// Why a list could not be read.
#[derive(Debug, thiserror::Error)]
pub enum PullError {
    /// The relay was not reached, or its answer is too long.
    #[error(transparent)]
    Fetch(#[from] FetchError),
    /// It answered with an error.
    #[error("{url} answered with status {status}")]
    Status { url: Url, status: StatusCode },
    /// The answer is not a list of hosts.
    #[error("{url} did not answer with a list of hosts: {source}")]
    Answer { url: Url, source: serde_json::Error },
    /// The pages do not end.
    #[error("{0} gives the same page again and again, or more hosts than there are")]
    Endless(Url),
}

/// Reads the whole list of the relay at `relay`; `page_read` is told after each page how many hosts there are so far.
///
/// # Errors
/// See [`PullError`].
pub async fn pull_hosts(
    relay: &Url,
    mut page_read: impl FnMut(usize),
) -> Result<Vec<RemoteHost>, PullError> {
    let client = directory_client();
    let mut hosts = Vec::new();
    let mut cursors = HashSet::new();
    let mut cursor: Option<String> = None;
    loop {
        let url = page_url(relay, cursor.as_deref());
        let answer = get(&client, &url, MAX_PAGE_BYTES).await?;
        if answer.status != StatusCode::OK {
            return Err(PullError::Status {
                url,
                status: answer.status,
            });
        }
        let page: Page =
            serde_json::from_slice(&answer.body).map_err(|source| PullError::Answer {
                url: url.clone(),
                source,
            })?;
        let empty = page.hosts.is_empty();
        hosts.extend(page.hosts);
        page_read(hosts.len());
        match page.cursor {
            Some(next) if !empty => {
                if hosts.len() > MAX_HOSTS || !cursors.insert(next.clone()) {
                    return Err(PullError::Endless(url));
                }
                cursor = Some(next);
            }
            _ => return Ok(hosts),
        }
    }
}

fn page_url(relay: &Url, cursor: Option<&str>) -> Url {
    let mut url = relay.clone();
    url.set_path("/xrpc/com.atproto.sync.listHosts");
    url.query_pairs_mut()
        .clear()
        .append_pair("limit", &PAGE.to_string());
    if let Some(cursor) = cursor {
        url.query_pairs_mut().append_pair("cursor", cursor);
    }
    url
}
