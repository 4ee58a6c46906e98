//! DID documents and DID data in the form plc.directory publishes them (Multikey).

use serde_json::{Value, json};

use super::operation::Update;
use crate::devnet::keys::{Curve, VerifyingKey};

/// JSON-LD contexts of every document.
const CONTEXTS: [&str; 2] = [
    "https://www.w3.org/ns/did/v1",
    "https://w3id.org/security/multikey/v1",
];

fn curve_context(curve: Curve) -> &'static str {
    match curve {
        Curve::K256 => "https://w3id.org/security/suites/secp256k1-2019/v1",
        Curve::P256 => "https://w3id.org/security/suites/ecdsa-2019/v1",
    }
}

/// The DID document of `did`; `endpoint` may rewrite service endpoints.
pub(super) fn document(did: &str, content: &Update, endpoint: impl Fn(&str) -> String) -> Value {
    let mut contexts: Vec<&str> = CONTEXTS.to_vec();
    let mut methods = Vec::new();
    for (id, did_key) in &content.verification_methods {
        let curve = VerifyingKey::parse_did_key(did_key)
            .ok()
            .map(|key| curve_context(key.curve()));
        contexts.extend(curve.filter(|context| !contexts.contains(context)));
        methods.push(json!({
            "id": format!("{did}#{id}"),
            "type": "Multikey",
            "controller": did,
            "publicKeyMultibase": did_key.trim_start_matches("did:key:"),
        }));
    }
    let services: Vec<Value> = content
        .services
        .iter()
        .map(|(id, service)| {
            json!({ "id": format!("#{id}"), "type": service.kind, "serviceEndpoint": endpoint(&service.endpoint) })
        })
        .collect();
    json!({
        "@context": contexts,
        "id": did,
        "alsoKnownAs": content.also_known_as,
        "verificationMethod": methods,
        "service": services,
    })
}

/// What `GET /:did/data` answers.
pub(super) fn data(did: &str, content: &Update) -> Value {
    json!({
        "did": did,
        "verificationMethods": content.verification_methods,
        "rotationKeys": content.rotation_keys,
        "alsoKnownAs": content.also_known_as,
        "services": content.services,
    })
}
