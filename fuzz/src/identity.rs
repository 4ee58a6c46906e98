//! Identities: DID documents, operations of the PLC directory, and the names in them. What is read
//! writes back to the same.

use atproto_relay::atproto::at_uri::AtUri;
use atproto_relay::atproto::did::Did;
use atproto_relay::atproto::did_doc::DidDocument;
use atproto_relay::atproto::handle::Handle;
use atproto_relay::atproto::key::{PublicKey, VerifyingKey};
use atproto_relay::atproto::nsid::Nsid;
use atproto_relay::atproto::record_key::{RecordKey, RecordPath};
use atproto_relay::atproto::tid::Tid;
use atproto_relay::devnet::plc::Operation;

/// Checks any bytes, as JSON and as a name.
pub fn check(bytes: &[u8]) {
    document(bytes);
    operation(bytes);
    if let Ok(text) = std::str::from_utf8(bytes) {
        names(text);
    }
}

fn document(json: &[u8]) {
    let Ok(document) = DidDocument::parse(json) else {
        return;
    };
    assert!(document.did().starts_with("did:"));
    assert!(document.handles().iter().all(|handle| !handle.is_empty()));
    if let Some(Ok(key)) = document.signing_key() {
        same_key(&key);
    }
    if let Some(endpoint) = document.pds_endpoint() {
        assert!(endpoint.as_str().starts_with("http") && endpoint.has_host());
    }
}

fn same_key(key: &PublicKey) {
    assert_eq!(
        PublicKey::parse_multikey(&key.to_multikey()).as_ref(),
        Ok(key)
    );
    assert_eq!(
        PublicKey::parse_did_key(&key.to_did_key()).as_ref(),
        Ok(key)
    );
    assert_eq!(PublicKey::from_bytes(&key.to_bytes()).as_ref(), Ok(key));
    let parsed = VerifyingKey::new(key).expect("a key that was read is a point");
    assert!(parsed.verify(b"", &[1; 64]).is_err());
}

fn operation(json: &[u8]) {
    let Ok(operation) = serde_json::from_slice::<Operation>(json) else {
        return;
    };
    let written = serde_json::to_vec(&operation).expect("an operation is JSON");
    let again: Operation = serde_json::from_slice(&written).expect("what we write can be read");
    assert_eq!(again, operation);
    assert_eq!(again.cid(), operation.cid());
    assert!(Did::parse(&operation.genesis_did()).is_ok());
    let _ = operation.check_incoming();
    let _ = operation.signer(&operation.rotation_keys());
}

fn names(text: &str) {
    if let Ok(did) = Did::parse(text) {
        assert_eq!(did.as_str(), text);
        assert_eq!(format!("did:{}:{}", did.method(), did.identifier()), text);
    }
    if let Ok(did) = Did::normalized(text) {
        assert_eq!(Did::parse(did.as_str()).as_ref(), Ok(&did));
        assert_eq!(Did::canonical(did.as_str()).as_ref(), Ok(&did));
        assert_eq!(Did::canonical(text).is_ok(), did.as_str() == text);
    }
    if let Ok(handle) = Handle::parse(text) {
        assert!(handle.as_str().eq_ignore_ascii_case(text));
    }
    if let Ok(tid) = Tid::parse(text) {
        assert_eq!(tid.to_string(), text);
    }
    if let Ok(key) = PublicKey::parse_did_key(text) {
        same_key(&key);
    }
    let _ = (AtUri::parse(text), Nsid::parse(text));
    let _ = (RecordKey::parse(text), RecordPath::parse(text));
}
