//! PLC operations and what makes them acceptable on their own: shape, size, signature, CID, DID.
//! Whether one may follow another is decided in `log`.

use std::collections::BTreeMap;

use data_encoding::{BASE32_NOPAD, BASE64URL_NOPAD};
use libipld::Ipld;
use serde::{Deserialize, Serialize};

use crate::devnet::dag::{self, map, text};
use crate::devnet::keys::{SigningKey, VerifyingKey};

/// Largest operation the directory takes, in bytes of CBOR (did-method-plc server, `MAX_OP_BYTES`).
const MAX_OPERATION_BYTES: usize = 4_000;
/// Most entries of `alsoKnownAs` and `services` (did-method-plc server constraints).
const MAX_ENTRIES: usize = 10;
/// Most rotation keys (did:plc specification 0.2: 1 to 5, without duplicates).
const MAX_ROTATION_KEYS: usize = 5;
/// Longest `alsoKnownAs` entry (did-method-plc server constraints).
const MAX_ALIAS_BYTES: usize = 256;
/// Longest service endpoint (did-method-plc server constraints).
const MAX_ENDPOINT_BYTES: usize = 512;
/// Longest id of a service or verification method (did-method-plc server constraints).
const MAX_ID_BYTES: usize = 32;
/// Letters of a did:plc after its prefix.
const DID_LETTERS: usize = 24;

/// A signed operation as it stands in a log, told apart by `type`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "type")]
pub enum Operation {
    /// Sets everything the DID document says.
    #[serde(rename = "plc_operation")]
    Update(Update),
    /// Ends the DID.
    #[serde(rename = "plc_tombstone")]
    Tombstone(Tombstone),
    /// The first form of a genesis operation; valid in old logs, not accepted any more.
    #[serde(rename = "create")]
    LegacyCreate(LegacyCreate),
}

/// The content of a `plc_operation`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct Update {
    pub rotation_keys: Vec<String>,
    pub verification_methods: BTreeMap<String, String>,
    pub also_known_as: Vec<String>,
    pub services: BTreeMap<String, Service>,
    /// CID of the operation before; `None` in a genesis operation.
    pub prev: Option<String>,
    #[serde(default)]
    pub sig: String,
}

/// A service of a DID document.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Service {
    #[serde(rename = "type")]
    pub kind: String,
    pub endpoint: String,
}

/// The content of a `plc_tombstone`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Tombstone {
    pub prev: String,
    #[serde(default)]
    pub sig: String,
}

/// The content of a legacy `create`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct LegacyCreate {
    pub signing_key: String,
    pub recovery_key: String,
    pub handle: String,
    pub service: String,
    pub prev: Option<String>,
    pub sig: String,
}

/// Why an operation is refused, whatever log it is for.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum OperationError {
    #[error("the operation has {0} bytes, more than {MAX_OPERATION_BYTES}")]
    TooLarge(usize),
    #[error("legacy create operations are not accepted any more")]
    Legacy,
    #[error("rotation keys must be 1 to {MAX_ROTATION_KEYS} without duplicates, not {0}")]
    RotationKeys(usize),
    #[error("`{0}` is not a key the directory knows")]
    Key(String),
    #[error("{0} is longer or has more entries than the directory allows")]
    Limit(&'static str),
    #[error("the signature is not 64 bytes in unpadded base64url")]
    SignatureForm,
    #[error("no rotation key that may sign this operation verifies its signature with low-S")]
    Signature,
}

impl Operation {
    /// CID of the operation before.
    pub fn prev(&self) -> Option<&str> {
        match self {
            Operation::Update(op) => op.prev.as_deref(),
            Operation::Tombstone(op) => Some(&op.prev),
            Operation::LegacyCreate(op) => op.prev.as_deref(),
        }
    }

    /// Rotation keys, most powerful first; none after a tombstone.
    pub fn rotation_keys(&self) -> Vec<&str> {
        match self {
            Operation::Update(op) => op.rotation_keys.iter().map(String::as_str).collect(),
            Operation::Tombstone(_) => Vec::new(),
            Operation::LegacyCreate(op) => vec![&op.recovery_key, &op.signing_key],
        }
    }

    /// What the DID document is made from; `None` after a tombstone.
    pub fn content(&self) -> Option<Update> {
        match self {
            Operation::Update(op) => Some(op.clone()),
            Operation::Tombstone(_) => None,
            Operation::LegacyCreate(op) => Some(op.normalized()),
        }
    }

    fn signature(&self) -> &str {
        match self {
            Operation::Update(op) => &op.sig,
            Operation::Tombstone(op) => &op.sig,
            Operation::LegacyCreate(op) => &op.sig,
        }
    }

    fn fields(&self) -> BTreeMap<String, Ipld> {
        match self {
            Operation::Update(op) => op.fields(),
            Operation::Tombstone(op) => {
                map([("type", text("plc_tombstone")), ("prev", text(&op.prev))])
            }
            Operation::LegacyCreate(op) => map([
                ("type", text("create")),
                ("signingKey", text(&op.signing_key)),
                ("recoveryKey", text(&op.recovery_key)),
                ("handle", text(&op.handle)),
                ("service", text(&op.service)),
                ("prev", nullable(op.prev.as_deref())),
            ]),
        }
    }

    /// The bytes a rotation key signs: DAG-CBOR of everything but `sig`.
    pub fn unsigned_bytes(&self) -> Vec<u8> {
        dag::encode(&Ipld::Map(self.fields()))
    }

    /// DAG-CBOR of the signed operation.
    pub fn signed_bytes(&self) -> Vec<u8> {
        let mut fields = self.fields();
        fields.insert("sig".to_owned(), text(self.signature()));
        dag::encode(&Ipld::Map(fields))
    }

    /// CID of the signed operation, as `prev` and the audit log write it.
    pub fn cid(&self) -> String {
        dag::cid_text(&self.signed_bytes())
    }

    /// The DID this operation creates when it is the genesis of a log.
    pub fn genesis_did(&self) -> String {
        let hash = dag::sha256(&self.signed_bytes());
        let letters = BASE32_NOPAD.encode(&hash).to_ascii_lowercase();
        format!("did:plc:{}", &letters[..DID_LETTERS])
    }

    /// Puts the signature of `key` in.
    pub fn sign(mut self, key: &SigningKey) -> Self {
        let signature = BASE64URL_NOPAD.encode(&key.sign(&self.unsigned_bytes()));
        match &mut self {
            Operation::Update(op) => op.sig = signature,
            Operation::Tombstone(op) => op.sig = signature,
            Operation::LegacyCreate(op) => op.sig = signature,
        }
        self
    }

    /// Which of `keys` signed this operation: its index. Keys of unknown kinds sign nothing.
    pub fn signer(&self, keys: &[&str]) -> Result<usize, OperationError> {
        let signature = BASE64URL_NOPAD
            .decode(self.signature().as_bytes())
            .ok()
            .filter(|bytes| bytes.len() == 64)
            .ok_or(OperationError::SignatureForm)?;
        let message = self.unsigned_bytes();
        keys.iter()
            .position(|key| {
                VerifyingKey::parse_did_key(key).is_ok_and(|key| key.verifies(&message, &signature))
            })
            .ok_or(OperationError::Signature)
    }

    /// What the directory asks of a new operation beyond what old logs may contain.
    pub fn check_incoming(&self) -> Result<(), OperationError> {
        let size = self.signed_bytes().len();
        if size > MAX_OPERATION_BYTES {
            return Err(OperationError::TooLarge(size));
        }
        match self {
            Operation::Update(op) => op.check_incoming(),
            Operation::Tombstone(_) => Ok(()),
            Operation::LegacyCreate(_) => Err(OperationError::Legacy),
        }
    }
}

impl Update {
    fn fields(&self) -> BTreeMap<String, Ipld> {
        let methods = self
            .verification_methods
            .iter()
            .map(|(id, key)| (id.clone(), text(key)));
        let services = self.services.iter().map(|(id, service)| {
            let fields = map([
                ("type", text(&service.kind)),
                ("endpoint", text(&service.endpoint)),
            ]);
            (id.clone(), Ipld::Map(fields))
        });
        map([
            ("type", text("plc_operation")),
            (
                "rotationKeys",
                Ipld::List(self.rotation_keys.iter().map(|key| text(key)).collect()),
            ),
            ("verificationMethods", Ipld::Map(methods.collect())),
            (
                "alsoKnownAs",
                Ipld::List(self.also_known_as.iter().map(|name| text(name)).collect()),
            ),
            ("services", Ipld::Map(services.collect())),
            ("prev", nullable(self.prev.as_deref())),
        ])
    }

    fn check_incoming(&self) -> Result<(), OperationError> {
        let keys = &self.rotation_keys;
        let distinct: std::collections::BTreeSet<_> = keys.iter().collect();
        if keys.is_empty() || keys.len() > MAX_ROTATION_KEYS || distinct.len() != keys.len() {
            return Err(OperationError::RotationKeys(keys.len()));
        }
        for key in keys.iter().chain(self.verification_methods.values()) {
            VerifyingKey::parse_did_key(key).map_err(|_| OperationError::Key(key.clone()))?;
        }
        let limits = [
            ("alsoKnownAs", self.also_known_as.len() > MAX_ENTRIES),
            (
                "alsoKnownAs",
                self.also_known_as
                    .iter()
                    .any(|name| name.len() > MAX_ALIAS_BYTES),
            ),
            ("services", self.services.len() > MAX_ENTRIES),
            (
                "services",
                self.services.values().any(|s| {
                    s.endpoint.len() > MAX_ENDPOINT_BYTES || s.kind.len() > MAX_ALIAS_BYTES
                }),
            ),
            (
                "verificationMethods",
                self.verification_methods.len() > MAX_ENTRIES,
            ),
            (
                "an id",
                self.services
                    .keys()
                    .chain(self.verification_methods.keys())
                    .any(|id| id.len() > MAX_ID_BYTES),
            ),
        ];
        match limits.into_iter().find(|(_, broken)| *broken) {
            Some((what, _)) => Err(OperationError::Limit(what)),
            None => Ok(()),
        }
    }
}

impl LegacyCreate {
    fn normalized(&self) -> Update {
        let endpoint = match self.service.split_once("://") {
            Some(_) => self.service.clone(),
            None => format!("https://{}", self.service),
        };
        let pds = Service {
            kind: "AtprotoPersonalDataServer".to_owned(),
            endpoint,
        };
        Update {
            rotation_keys: vec![self.recovery_key.clone(), self.signing_key.clone()],
            verification_methods: BTreeMap::from([(
                "atproto".to_owned(),
                self.signing_key.clone(),
            )]),
            also_known_as: vec![format!("at://{}", self.handle)],
            services: BTreeMap::from([("atproto_pds".to_owned(), pds)]),
            prev: self.prev.clone(),
            sig: self.sig.clone(),
        }
    }
}

fn nullable(value: Option<&str>) -> Ipld {
    value.map_or(Ipld::Null, text)
}
