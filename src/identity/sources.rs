//! Where DID documents come from: the PLC directory and the hosts of did:web, with bounded bodies and times.
//! No cache and no limits on how often.

use reqwest::{Client, StatusCode};
use url::Url;

use super::{HostName, Identity, ResolveError};
use crate::atproto::did::Did;
use crate::atproto::did_doc::{DidDocument, MAX_DOCUMENT_BYTES};
use crate::dial::{FetchError, Fetched, Guard, fetch, get};

/// Length of the identifier of a did:plc (did:plc specification).
const PLC_IDENTIFIER_LEN: usize = 24;

/// The supported methods, with what is needed to ask.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Source {
    /// The directory.
    Plc,
    /// The host that the DID names.
    Web(HostName),
}

impl Source {
    /// Where the document of `did` is.
    pub(super) fn of(did: &Did, guard: &Guard) -> Result<Self, ResolveError> {
        match did.method() {
            "plc" if is_plc_identifier(did.identifier()) => Ok(Self::Plc),
            "plc" => Err(ResolveError::Invalid(
                "a did:plc has 24 characters of base32".to_owned(),
            )),
            "web" => web_host(did.identifier(), guard).map(Self::Web),
            method => Err(ResolveError::Invalid(format!(
                "did:{method} is not supported, only did:plc and did:web"
            ))),
        }
    }
}

fn is_plc_identifier(identifier: &str) -> bool {
    identifier.len() == PLC_IDENTIFIER_LEN
        && identifier
            .bytes()
            .all(|byte| matches!(byte, b'a'..=b'z' | b'2'..=b'7'))
}

/// The host of a did:web. atproto allows no paths, and a port (`%3A`) only on one's own machine.
fn web_host(identifier: &str, guard: &Guard) -> Result<HostName, ResolveError> {
    if identifier.contains(':') {
        return Err(ResolveError::Invalid(
            "a did:web with a path is not supported by atproto".to_owned(),
        ));
    }
    let name = identifier.replace("%3A", ":").replace("%3a", ":");
    HostName::parse(&name, guard).map_err(|error| ResolveError::Invalid(error.to_string()))
}

/// Reads a did:plc from the directory. The operator names the directory, so the dial guard has no say in it.
pub(super) async fn from_plc(
    client: &Client,
    directory: &Url,
    did: &Did,
) -> Result<DidDocument, ResolveError> {
    let mut url = directory.clone();
    if let Ok(mut path) = url.path_segments_mut() {
        path.pop_if_empty().push(did.as_str());
    }
    read_document(get(client, &url, MAX_DOCUMENT_BYTES).await)
}

/// Reads a did:web from its host.
pub(super) async fn from_web(
    client: &Client,
    guard: &Guard,
    host: &HostName,
) -> Result<DidDocument, ResolveError> {
    let url = Url::parse(&format!("{}/.well-known/did.json", host.http_url()))
        .map_err(|error| ResolveError::Invalid(error.to_string()))?;
    read_document(fetch(client, guard, &url, MAX_DOCUMENT_BYTES).await)
}

fn read_document(answer: Result<Fetched, FetchError>) -> Result<DidDocument, ResolveError> {
    let answer = answer.map_err(|error| match error {
        FetchError::TooLong { .. } => ResolveError::Invalid(error.to_string()),
        FetchError::Refused(dial) if dial.is_refusal() => ResolveError::Invalid(dial.to_string()),
        FetchError::Refused(_) | FetchError::Failed { .. } => {
            ResolveError::Unavailable(error.to_string())
        }
    })?;
    match answer.status {
        StatusCode::OK => DidDocument::parse(&answer.body)
            .map_err(|error| ResolveError::Invalid(error.to_string())),
        StatusCode::NOT_FOUND => Err(ResolveError::NotFound),
        StatusCode::GONE => Err(ResolveError::Tombstoned),
        status => Err(ResolveError::Unavailable(format!("status {status}"))),
    }
}

/// The identity a document gives, if it is the document of `did`.
pub(super) fn identity(
    did: &Did,
    document: &DidDocument,
    guard: &Guard,
    resolved_at: i64,
) -> Result<Identity, ResolveError> {
    if Did::normalized(document.did()).as_ref() != Ok(did) {
        return Err(ResolveError::Invalid(format!(
            "the document is of {:?}",
            document.did()
        )));
    }
    let pds = document.pds_endpoint().and_then(|endpoint| {
        HostName::from_url(endpoint, guard)
            .inspect_err(|error| tracing::debug!(%did, %error, "the identity's PDS is not usable"))
            .ok()
    });
    let signing_key = document.signing_key().and_then(|key| {
        key.inspect_err(|error| tracing::debug!(%did, %error, "the identity's key is not usable"))
            .ok()
    });
    Ok(Identity {
        did: did.clone(),
        pds,
        signing_key,
        handles: document.handles().to_vec(),
        resolved_at,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sources_by_method() {
        let (public, private) = (Guard::new(false), Guard::new(true));
        let source = |did: &str, guard: &Guard| Source::of(&Did::parse(did).unwrap(), guard);
        assert_eq!(
            source("did:plc:ewvi7nxzyoun6zhxrhs64oiz", &public),
            Ok(Source::Plc)
        );
        let web = source("did:web:example.com", &public).unwrap();
        assert_eq!(
            web,
            Source::Web(HostName::parse("https://example.com", &public).unwrap())
        );
        let local = source("did:web:localhost%3A2583", &private).unwrap();
        assert_eq!(
            local,
            Source::Web(HostName::parse("http://localhost:2583", &private).unwrap())
        );
        for did in [
            "did:plc:short",
            "did:plc:ewvi7nxzyoun6zhxrhs64oi1",
            "did:web:example.com:user",
            "did:web:localhost%3A2583",
            "did:web:127.0.0.1",
            "did:web:example.com%2Fpath",
            "did:web:user%40example.com",
            "did:key:zQ3shokFTS3brHcDQrn82RUDfCZESWL1ZdCEJwekUDPQiYBme",
        ] {
            assert!(
                matches!(source(did, &public), Err(ResolveError::Invalid(_))),
                "{did}"
            );
        }
    }
}
