//! What atproto reads from a DID document: the signing key, the PDS and the claimed handles, in the
//! current and the older style. Everything else in the document is ignored.
//! It resolves nothing: that the document belongs to the DID asked for is checked by the caller.

use serde::Deserialize;
use serde_json::Value;
use thiserror::Error;
use url::Url;

use super::key::{KeyError, PublicKey};

/// Longest document read. The DID method did:plc allows operations of 4,000 bytes (7,500 formerly);
/// a did:web document with many foreign keys and services is larger, none seen reaches this.
pub const MAX_DOCUMENT_BYTES: usize = 256 * 1024;

/// Why a DID document was refused.
#[derive(Debug, Error)]
pub enum DidDocError {
    /// More than [`MAX_DOCUMENT_BYTES`].
    #[error("DID document of {0} bytes is longer than {MAX_DOCUMENT_BYTES}")]
    TooLong(usize),
    /// Not JSON, or without an `id`.
    #[error("DID document is not readable: {0}")]
    Json(#[from] serde_json::Error),
    /// `id` is not a DID.
    #[error("DID document has the id {0:?}, which is not a DID")]
    Id(String),
}

/// The atproto parts of a DID document.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DidDocument {
    did: String,
    handles: Vec<String>,
    signing_key: Option<Result<PublicKey, KeyError>>,
    pds_endpoint: Option<Url>,
}

/// Fields are loose JSON values, so that one strange entry of no concern to atproto does not make
/// the whole document unreadable.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct RawDocument {
    id: String,
    #[serde(default)]
    also_known_as: Value,
    #[serde(default)]
    verification_method: Value,
    #[serde(default)]
    service: Value,
}

impl DidDocument {
    /// Reads a document from JSON.
    ///
    /// # Errors
    /// [`DidDocError`] when it is too long, not JSON, or has no DID as its `id`. A missing or broken
    /// key, PDS or handle is no error here.
    pub fn parse(json: &[u8]) -> Result<Self, DidDocError> {
        if json.len() > MAX_DOCUMENT_BYTES {
            return Err(DidDocError::TooLong(json.len()));
        }
        let raw: RawDocument = serde_json::from_slice(json)?;
        if !raw.id.starts_with("did:") {
            return Err(DidDocError::Id(raw.id));
        }
        Ok(Self {
            handles: handles(&raw.also_known_as),
            signing_key: signing_key(&raw.id, &raw.verification_method),
            pds_endpoint: pds_endpoint(&raw.id, &raw.service),
            did: raw.id,
        })
    }

    /// The `id`, as written in the document.
    pub fn did(&self) -> &str {
        &self.did
    }

    /// The names claimed by `at://` entries of `alsoKnownAs`, in order, without the scheme. They are
    /// claims: neither their syntax nor the way back from the handle to the DID has been checked.
    pub fn handles(&self) -> &[String] {
        &self.handles
    }

    /// The first valid key with the fragment `#atproto` whose controller is this DID. `None` without
    /// such an entry, an error when there are only broken ones.
    pub fn signing_key(&self) -> Option<Result<PublicKey, KeyError>> {
        self.signing_key.clone()
    }

    /// The endpoint of the first `#atproto_pds` service of type `AtprotoPersonalDataServer`, when it
    /// is an http or https URL with a host and without a user name.
    pub fn pds_endpoint(&self) -> Option<&Url> {
        self.pds_endpoint.as_ref()
    }
}

fn entries(list: &Value) -> &[Value] {
    list.as_array().map_or(&[], Vec::as_slice)
}

fn text<'a>(entry: &'a Value, field: &str) -> &'a str {
    entry.get(field).and_then(Value::as_str).unwrap_or_default()
}

/// Whether an entry's id is `#fragment` or `did#fragment`.
fn has_fragment(entry: &Value, did: &str, fragment: &str) -> bool {
    let id = text(entry, "id");
    id.strip_prefix(did).unwrap_or(id).strip_prefix('#') == Some(fragment)
}

fn handles(also_known_as: &Value) -> Vec<String> {
    entries(also_known_as)
        .iter()
        .filter_map(|entry| entry.as_str()?.strip_prefix("at://"))
        .filter(|handle| !handle.is_empty())
        .map(str::to_owned)
        .collect()
}

fn signing_key(did: &str, methods: &Value) -> Option<Result<PublicKey, KeyError>> {
    let mut first_error = None;
    for method in entries(methods) {
        if !has_fragment(method, did, "atproto") || text(method, "controller") != did {
            continue;
        }
        let multibase = text(method, "publicKeyMultibase");
        match PublicKey::from_verification_method(text(method, "type"), multibase) {
            Ok(key) => return Some(Ok(key)),
            Err(error) => first_error = first_error.or(Some(Err(error))),
        }
    }
    first_error
}

fn pds_endpoint(did: &str, services: &Value) -> Option<Url> {
    let service = entries(services).iter().find(|service| {
        has_fragment(service, did, "atproto_pds")
            && text(service, "type") == "AtprotoPersonalDataServer"
    })?;
    let url = Url::parse(text(service, "serviceEndpoint")).ok()?;
    let usable = matches!(url.scheme(), "http" | "https")
        && url.has_host()
        && url.username().is_empty()
        && url.password().is_none();
    usable.then_some(url)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    const DID: &str = "did:plc:ewvi7nxzyoun6zhxrhs64oiz";
    const KEY: &str = "zQ3shXjHeiBuRCKmM36cuYnm7YEMzhGnCmCyW92sRJ9pribSF";

    fn parse(document: Value) -> DidDocument {
        DidDocument::parse(document.to_string().as_bytes()).unwrap()
    }

    fn method(id: &str, controller: &str, key: &str) -> Value {
        json!({"id": id, "type": "Multikey", "controller": controller, "publicKeyMultibase": key})
    }

    #[test]
    fn ids_are_read_in_both_styles() {
        for prefix in ["", DID] {
            let document = parse(json!({
                "id": DID,
                "alsoKnownAs": ["at://one.test", "https://elsewhere.test", "at://two.test", "at://", 7],
                "verificationMethod": [method(&format!("{prefix}#atproto"), DID, KEY)],
                "service": [{
                    "id": format!("{prefix}#atproto_pds"),
                    "type": "AtprotoPersonalDataServer",
                    "serviceEndpoint": "https://pds.test",
                }],
            }));
            assert_eq!(document.did(), DID);
            assert_eq!(document.handles(), ["one.test", "two.test"]);
            assert_eq!(document.signing_key().unwrap().unwrap().to_multikey(), KEY);
            assert_eq!(
                document.pds_endpoint().unwrap().as_str(),
                "https://pds.test/"
            );
        }
    }

    #[test]
    fn the_first_valid_key_of_the_account_counts() {
        let document =
            |methods: Vec<Value>| parse(json!({"id": DID, "verificationMethod": methods}));
        let other = "did:plc:aaaaaaaaaaaaaaaaaaaaaaaa";
        let valid = method("#atproto", DID, KEY);
        let ignored = [
            method("#atproto_label", DID, KEY),
            method("#atproto", other, KEY),
            method(&format!("{other}#atproto"), DID, KEY),
            method("atproto", DID, KEY),
            method(DID, DID, KEY),
            json!("text"),
        ];
        for entry in ignored {
            assert_eq!(document(vec![entry.clone()]).signing_key(), None, "{entry}");
            assert!(
                document(vec![entry, valid.clone()])
                    .signing_key()
                    .unwrap()
                    .is_ok()
            );
        }
        let broken = method("#atproto", DID, "znonsense0");
        assert_eq!(
            document(vec![broken.clone()]).signing_key(),
            Some(Err(KeyError::Base58))
        );
        assert!(document(vec![broken, valid]).signing_key().unwrap().is_ok());
    }

    #[test]
    fn only_usable_pds_endpoints_are_given() {
        let endpoint = |kind: &str, endpoint: Value| {
            parse(json!({
                "id": DID,
                "service": [{"id": "#atproto_pds", "type": kind, "serviceEndpoint": endpoint}],
            }))
            .pds_endpoint()
            .map(Url::to_string)
        };
        let pds = "AtprotoPersonalDataServer";
        for written in ["http://localhost:2583", "HTTP:/LocalHost:2583/"] {
            assert_eq!(
                endpoint(pds, json!(written)).unwrap(),
                "http://localhost:2583/"
            );
        }
        assert_eq!(
            endpoint("BskyFeedGenerator", json!("https://pds.test")),
            None
        );
        for unusable in [
            json!("ftp://pds.test"),
            json!("pds.test"),
            json!("https://"),
            json!("https://user:secret@pds.test"),
            json!({"uri": "https://pds.test"}),
            json!(null),
        ] {
            assert_eq!(endpoint(pds, unusable.clone()), None, "{unusable}");
        }
    }

    #[test]
    fn odd_documents_are_read_and_broken_ones_refused() {
        let document = parse(json!({
            "id": "did:web:pds.test",
            "alsoKnownAs": null,
            "verificationMethod": {},
            "service": "none",
            "authentication": null,
        }));
        assert_eq!(document.handles(), [""; 0]);
        assert_eq!(document.signing_key(), None);
        assert_eq!(document.pds_endpoint(), None);

        for broken in ["", "[]", "{}", r#"{"id":7}"#, r#"{"id":"plc"}"#] {
            assert!(DidDocument::parse(broken.as_bytes()).is_err(), "{broken}");
        }
        let nested = format!(r#"{{"id":"{DID}","service":{}"#, "[".repeat(100_000));
        assert!(DidDocument::parse(nested.as_bytes()).is_err());
        let long = vec![b' '; MAX_DOCUMENT_BYTES + 1];
        assert!(matches!(
            DidDocument::parse(&long),
            Err(DidDocError::TooLong(_))
        ));
    }
}
