//! One DID's PLC audit log, and the DID document it gives at any moment, in both styles found in
//! the wild. Takes the log as it is: operations are not checked here.

use std::collections::BTreeMap;

use serde::Deserialize;
use serde_json::{Value, json};

use crate::devnet::keys::{Curve, VerifyingKey};
use crate::devnet::timestamp::{Timestamp, TimestampError};

/// Why a text is not an audit log.
#[derive(Debug, thiserror::Error)]
pub enum AuditError {
    #[error("{0}")]
    Json(#[from] serde_json::Error),
    #[error("{0}")]
    Time(#[from] TimestampError),
    #[error("it has no operations")]
    Empty,
}

/// How a directory writes keys into DID documents.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum DocumentStyle {
    /// As plc.directory does: `Multikey`, compressed key, id `did#atproto`.
    #[default]
    Multikey,
    /// As the npm PLC server does: `EcdsaSecp256…VerificationKey2019`, uncompressed key without a
    /// multicodec prefix, id `#atproto`.
    Legacy,
}

/// What a DID is at a moment.
#[derive(Clone, Debug, PartialEq)]
pub enum Registration {
    /// No operation yet.
    Unregistered,
    Document(Value),
    Tombstoned,
}

#[derive(Deserialize)]
struct Entry {
    did: String,
    operation: Value,
    #[serde(rename = "createdAt")]
    created_at: String,
}

#[derive(Deserialize)]
#[serde(tag = "type")]
enum Operation {
    #[serde(rename = "plc_operation", rename_all = "camelCase")]
    Update {
        verification_methods: BTreeMap<String, String>,
        also_known_as: Vec<String>,
        services: BTreeMap<String, Service>,
    },
    #[serde(rename = "create", rename_all = "camelCase")]
    Create {
        signing_key: String,
        handle: String,
        service: String,
    },
    #[serde(rename = "plc_tombstone")]
    Tombstone {},
}

#[derive(Clone, Deserialize)]
struct Service {
    #[serde(rename = "type")]
    kind: String,
    endpoint: String,
}

#[derive(Clone, Debug)]
struct Step {
    at: Timestamp,
    /// `None`: tombstone.
    content: Option<Content>,
    published: Value,
}

#[derive(Clone, Debug, Default)]
struct Content {
    keys: BTreeMap<String, String>,
    also_known_as: Vec<String>,
    /// id → (type, endpoint)
    services: BTreeMap<String, (String, String)>,
}

/// The audit log of one DID.
#[derive(Clone, Debug)]
pub struct Audit {
    did: String,
    steps: Vec<Step>,
}

impl Audit {
    /// Reads the JSON of `GET /:did/log/audit`.
    pub fn parse(json: &[u8]) -> Result<Audit, AuditError> {
        let entries: Vec<Entry> = serde_json::from_slice(json)?;
        let did = entries.first().ok_or(AuditError::Empty)?.did.clone();
        let mut steps = Vec::with_capacity(entries.len());
        for (entry, published) in entries
            .into_iter()
            .zip(serde_json::from_slice::<Vec<Value>>(json)?)
        {
            let content = serde_json::from_value::<Operation>(entry.operation)?.content();
            steps.push(Step {
                at: entry.created_at.parse()?,
                content,
                published,
            });
        }
        Ok(Audit { did, steps })
    }

    /// The DID the log is of.
    pub fn did(&self) -> &str {
        &self.did
    }

    /// The operation in force: the last one submitted by then. Later nullification does not
    /// matter, because it had not happened yet; after it, the operation that nullified is later.
    fn in_force(&self, at: Timestamp) -> Option<&Step> {
        self.steps.iter().rfind(|step| step.at <= at)
    }

    /// The PDS endpoint at that time.
    pub fn endpoint_at(&self, at: Timestamp) -> Option<String> {
        let content = self.in_force(at)?.content.as_ref()?;
        content
            .services
            .get("atproto_pds")
            .map(|(_, endpoint)| endpoint.clone())
    }

    /// What the directory answers for the DID at that time; `endpoint` may move services elsewhere.
    pub fn at(
        &self,
        at: Timestamp,
        style: DocumentStyle,
        endpoint: impl Fn(&str) -> String,
    ) -> Registration {
        match self.in_force(at) {
            None => Registration::Unregistered,
            Some(Step { content: None, .. }) => Registration::Tombstoned,
            Some(Step {
                content: Some(content),
                ..
            }) => Registration::Document(content.document(&self.did, style, endpoint)),
        }
    }

    /// The part of the log that existed at that time.
    pub fn log_at(&self, at: Timestamp) -> Vec<&Value> {
        self.steps
            .iter()
            .filter(|step| step.at <= at)
            .map(|step| &step.published)
            .collect()
    }
}

impl Operation {
    fn content(self) -> Option<Content> {
        match self {
            Operation::Update {
                verification_methods,
                also_known_as,
                services,
            } => Some(Content {
                keys: verification_methods,
                also_known_as,
                services: services
                    .into_iter()
                    .map(|(id, service)| (id, (service.kind, service.endpoint)))
                    .collect(),
            }),
            Operation::Create {
                signing_key,
                handle,
                service,
            } => Some(Content {
                keys: [("atproto".to_owned(), signing_key)].into(),
                also_known_as: vec![format!("at://{handle}")],
                services: [(
                    "atproto_pds".to_owned(),
                    ("AtprotoPersonalDataServer".to_owned(), service),
                )]
                .into(),
            }),
            Operation::Tombstone {} => None,
        }
    }
}

impl Content {
    fn document(
        &self,
        did: &str,
        style: DocumentStyle,
        endpoint: impl Fn(&str) -> String,
    ) -> Value {
        let mut contexts = vec!["https://www.w3.org/ns/did/v1"];
        if style == DocumentStyle::Multikey {
            contexts.push("https://w3id.org/security/multikey/v1");
        }
        let mut methods = Vec::new();
        for (id, did_key) in &self.keys {
            let key = VerifyingKey::parse_did_key(did_key).ok();
            let suite = key.as_ref().map(|key| suite(key.curve()).0);
            contexts.extend(suite.filter(|suite| !contexts.contains(suite)));
            methods.extend(verification_method(did, id, did_key, key.as_ref(), style));
        }
        let services = self.services.iter().map(|(id, (kind, address))| {
            json!({ "id": format!("#{id}"), "type": kind, "serviceEndpoint": endpoint(address) })
        });
        json!({
            "@context": contexts,
            "id": did,
            "alsoKnownAs": self.also_known_as,
            "verificationMethod": methods,
            "service": services.collect::<Vec<_>>(),
        })
    }
}

/// JSON-LD context and verification method type of a curve in the older style.
fn suite(curve: Curve) -> (&'static str, &'static str) {
    match curve {
        Curve::K256 => (
            "https://w3id.org/security/suites/secp256k1-2019/v1",
            "EcdsaSecp256k1VerificationKey2019",
        ),
        Curve::P256 => (
            "https://w3id.org/security/suites/ecdsa-2019/v1",
            "EcdsaSecp256r1VerificationKey2019",
        ),
    }
}

/// One `verificationMethod` entry; `None` where the older style cannot write the key.
fn verification_method(
    did: &str,
    id: &str,
    did_key: &str,
    key: Option<&VerifyingKey>,
    style: DocumentStyle,
) -> Option<Value> {
    let (id, kind, multibase) = match style {
        DocumentStyle::Multikey => (
            format!("{did}#{id}"),
            "Multikey",
            did_key.trim_start_matches("did:key:").to_owned(),
        ),
        DocumentStyle::Legacy => (
            format!("#{id}"),
            suite(key?.curve()).1,
            format!("z{}", bs58::encode(uncompressed(key?)).into_string()),
        ),
    };
    Some(json!({ "id": id, "type": kind, "controller": did, "publicKeyMultibase": multibase }))
}

fn uncompressed(key: &VerifyingKey) -> Vec<u8> {
    match key {
        VerifyingKey::K256(key) => key.to_encoded_point(false).as_bytes().to_vec(),
        VerifyingKey::P256(key) => key.to_encoded_point(false).as_bytes().to_vec(),
    }
}
