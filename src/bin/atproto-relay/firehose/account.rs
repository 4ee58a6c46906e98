//! An account as a person names it: by DID or by handle. A handle is asked of the server whose events are read, which
//! is the account's own PDS at best, and of the handle's own domain; what they say is told and not verified.

use std::str::FromStr;

use serde_json::Value;
use url::Url;

use atproto_relay::atproto::did::Did;
use atproto_relay::atproto::handle::Handle;
use atproto_relay::dial::{Guard, directory_client, fetch, get, http_client};

use super::address::StreamAddress;

/// A DID is the whole answer.
const MAX_ANSWER_BYTES: usize = 16 * 1024;

/// `--did`.
#[derive(Debug, Clone)]
pub enum Account {
    Did(Did),
    Handle(Handle),
}

impl FromStr for Account {
    type Err = String;

    fn from_str(text: &str) -> Result<Account, String> {
        if text.starts_with("did:") {
            let did = Did::normalized(text).map_err(|error| error.to_string())?;
            return Ok(Account::Did(did));
        }
        let handle = text.strip_prefix('@').unwrap_or(text);
        Handle::normalized(handle)
            .map(Account::Handle)
            .map_err(|_| "give a DID or a handle, as in did:plc:ewvi7nxzyoun6zhxrhs64oiz or alice.example.com".to_owned())
    }
}

impl Account {
    /// The DID; the error says who does not know the handle.
    pub async fn resolve(&self, server: &StreamAddress, guard: &Guard) -> Result<Did, String> {
        let handle = match self {
            Account::Did(did) => return Ok(did.clone()),
            Account::Handle(handle) => handle,
        };
        if let Some(did) = from_server(server, handle).await {
            return Ok(did);
        }
        from_domain(handle, guard).await.ok_or_else(|| {
            let server = server.host();
            let handle = handle.as_str();
            format!("neither {server} nor https://{handle}/.well-known/atproto-did knows the handle {handle}; give its DID")
        })
    }
}

async fn from_server(server: &StreamAddress, handle: &Handle) -> Option<Did> {
    let url = server.resolve_handle(handle.as_str())?;
    let answer = get(&directory_client(), &url, MAX_ANSWER_BYTES)
        .await
        .ok()?;
    let answer: Value = serde_json::from_slice(&answer.body).ok()?;
    Did::normalized(answer["did"].as_str()?).ok()
}

async fn from_domain(handle: &Handle, guard: &Guard) -> Option<Did> {
    let url = format!("https://{}/.well-known/atproto-did", handle.as_str());
    let url = Url::parse(&url).ok()?;
    let answer = fetch(&http_client(guard), guard, &url, MAX_ANSWER_BYTES)
        .await
        .ok()?;
    let text = answer
        .status
        .is_success()
        .then(|| str::from_utf8(&answer.body).ok())??;
    Did::normalized(text.trim()).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dids_and_handles() {
        let did = "did:plc:ewvi7nxzyoun6zhxrhs64oiz";
        assert!(matches!(did.parse(), Ok(Account::Did(it)) if it.as_str() == did));
        for text in ["Alice.Example.com", "@alice.example.com"] {
            assert!(
                matches!(text.parse(), Ok(Account::Handle(it)) if it.as_str() == "alice.example.com"),
                "{text}"
            );
        }
        for text in [
            "",
            "alice",
            "did:",
            "did:plc",
            "a b.com",
            "https://alice.example.com",
        ] {
            assert!(text.parse::<Account>().is_err(), "{text}");
        }
    }
}
