//! Where an event stream is: from what a person types to the URL of `subscribeRepos`.

use std::fmt;
use std::str::FromStr;

use url::{Host, Url};

/// The stream's path where the person gave none.
const SUBSCRIBE_REPOS: &str = "/xrpc/com.atproto.sync.subscribeRepos";
/// Where a PDS resolves handles.
const RESOLVE_HANDLE: &str = "/xrpc/com.atproto.identity.resolveHandle";

/// A WebSocket URL without cursor.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StreamAddress(Url);

impl FromStr for StreamAddress {
    type Err = String;

    /// A bare name means wss, a bare localhost or address ws; a path that is given is kept.
    fn from_str(text: &str) -> Result<StreamAddress, String> {
        const FORM: &str = "give a host name or a URL, as in bsky.network or wss://bsky.network";
        let spelled = if text.contains("://") {
            text.to_owned()
        } else {
            format!("{}://{text}", bare_scheme(text))
        };
        let mut url = Url::parse(&spelled).map_err(|error| format!("{error}; {FORM}"))?;
        let scheme = match url.scheme() {
            "https" | "wss" => "wss",
            "http" | "ws" => "ws",
            other => {
                return Err(format!(
                    "the scheme {other} is not one of https, http, wss and ws; {FORM}"
                ));
            }
        };
        if url.host().is_none() || url.set_scheme(scheme).is_err() {
            return Err(format!("there is no host in it; {FORM}"));
        }
        if url.path().len() <= 1 {
            url.set_path(SUBSCRIBE_REPOS);
        }
        url.set_fragment(None);
        Ok(StreamAddress(url))
    }
}

impl StreamAddress {
    /// The host, with its port if one was given.
    pub fn host(&self) -> String {
        let host = self.0.host_str().unwrap_or_default();
        match self.0.port() {
            Some(port) => format!("{host}:{port}"),
            None => host.to_owned(),
        }
    }

    /// Where the same server is asked for the DID of a handle.
    pub fn resolve_handle(&self, handle: &str) -> Option<Url> {
        let scheme = if self.0.scheme() == "wss" {
            "https"
        } else {
            "http"
        };
        let host = self.host();
        let mut url = Url::parse(&format!("{scheme}://{host}{RESOLVE_HANDLE}")).ok()?;
        url.query_pairs_mut().append_pair("handle", handle);
        Some(url)
    }

    /// The URL that starts with the events of a cursor.
    pub fn with_cursor(&self, cursor: Option<u64>) -> Url {
        let mut url = self.0.clone();
        if let Some(cursor) = cursor {
            url.query_pairs_mut()
                .append_pair("cursor", &cursor.to_string());
        }
        url
    }
}

impl fmt::Display for StreamAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}

/// Certificates are for public names: addresses and localhost are taken to be without TLS.
fn bare_scheme(text: &str) -> &'static str {
    let host = Url::parse(&format!("wss://{text}"))
        .ok()
        .and_then(|url| url.host().map(|host| host.to_owned()));
    match host {
        Some(Host::Domain(name)) if name != "localhost" && !name.ends_with(".localhost") => "wss",
        None => "wss",
        Some(_) => "ws",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_people_type() {
        let path = SUBSCRIBE_REPOS;
        for (text, url) in [
            ("bsky.network", format!("wss://bsky.network{path}")),
            ("https://bsky.network/", format!("wss://bsky.network{path}")),
            ("localhost:2470", format!("ws://localhost:2470{path}")),
            ("127.0.0.1:2470", format!("ws://127.0.0.1:2470{path}")),
            (
                "http://pds.example.com",
                format!("ws://pds.example.com{path}"),
            ),
            (
                "wss://relay.example.com/other?x=1#y",
                "wss://relay.example.com/other?x=1".to_owned(),
            ),
        ] {
            assert_eq!(
                text.parse::<StreamAddress>().unwrap().to_string(),
                url,
                "{text}"
            );
        }
        for text in [
            "",
            "ftp://bsky.network",
            "a b",
            "https://",
            "file:///etc/passwd",
        ] {
            assert!(text.parse::<StreamAddress>().is_err(), "{text}");
        }
    }

    #[test]
    fn handles_are_asked_of_the_same_server() {
        let address: StreamAddress = "wss://pds.example.com:8443/other".parse().unwrap();
        assert_eq!(
            address
                .resolve_handle("alice.example.com")
                .unwrap()
                .as_str(),
            "https://pds.example.com:8443/xrpc/com.atproto.identity.resolveHandle?handle=alice.example.com"
        );
        let plain: StreamAddress = "[::1]:2470".parse().unwrap();
        assert!(
            plain
                .resolve_handle("a.b")
                .unwrap()
                .as_str()
                .starts_with("http://[::1]:2470/xrpc/")
        );
    }

    #[test]
    fn the_cursor_joins_the_query() {
        let plain: StreamAddress = "localhost:1".parse().unwrap();
        assert_eq!(plain.with_cursor(Some(0)).query(), Some("cursor=0"));
        assert_eq!(plain.with_cursor(None).query(), None);
        let with_query: StreamAddress = "ws://localhost:1/p?x=1".parse().unwrap();
        assert_eq!(
            with_query.with_cursor(Some(7)).query(),
            Some("x=1&cursor=7")
        );
    }
}
