//! Signed commits: the strict reader takes only what the general one takes, the signed bytes are the
//! block without `sig`, and no key panics on what it is given.

use std::sync::LazyLock;

use atproto_relay::atproto::cbor::Value;
use atproto_relay::atproto::commit::{self, SignedCommit};
use atproto_relay::atproto::key::{Curve, PublicKey, VerifyingKey};

/// A point of each curve, compressed: both curves have one at this x.
const POINTS: [(Curve, &str); 2] = [
    (
        Curve::K256,
        "did:key:zQ3shokFTS3brHcDQrn82RUDfCZESWL1ZdCEJwekUDPQiYBme",
    ),
    (
        Curve::P256,
        "did:key:zDnaerDaTF5BXEavCrfRZEk316dpbLsfPDZ3WJ5hRTPFU2169",
    ),
];

static KEYS: LazyLock<[VerifyingKey; 2]> = LazyLock::new(|| {
    POINTS.map(|(curve, text)| {
        let key = PublicKey::parse_did_key(text).expect("a key of the specification's examples");
        assert_eq!(key.curve(), curve);
        VerifyingKey::new(&key).expect("a point on its curve")
    })
});

/// Checks any bytes.
pub fn check(bytes: &[u8]) {
    let Ok(signed) = SignedCommit::parse(bytes) else {
        return;
    };
    let whole = entries(bytes);
    let unsigned = signed.unsigned_bytes();
    let mut rest = whole.clone();
    rest.retain(|(key, _)| *key != "sig");
    assert_eq!(
        entries(&unsigned),
        rest,
        "the signed bytes are not the rest"
    );
    for key in &*KEYS {
        assert!(
            signed.verify_signature(key).is_err(),
            "nobody has signed this"
        );
    }
    let usual = signed.version == commit::VERSION && signed.prev.is_none() && whole.len() == 6;
    if usual {
        let written = commit::encode_signed(signed.did, signed.rev, &signed.data, signed.sig);
        assert_eq!(written, bytes);
        let written = commit::encode_unsigned(signed.did, signed.rev, &signed.data);
        assert_eq!(written, unsigned);
    }
}

fn entries(bytes: &[u8]) -> Vec<(&str, Value<'_>)> {
    match Value::parse(bytes) {
        Ok(Value::Map(entries)) => entries,
        other => panic!("the strict reader took what the general one does not: {other:?}"),
    }
}
