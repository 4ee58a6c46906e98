//! Keys of the devnet, on k256 and p256: signing with low-S and a verification that shares no code
//! with `atproto::key`, so that each checks the other. Test keys only: nothing here is kept secret.

use k256::ecdsa::signature::{Signer, Verifier};
use rand::RngCore;

/// Multicodec prefix of a compressed secp256k1 public key (varint 0xe7).
const K256_PREFIX: [u8; 2] = [0xe7, 0x01];
/// Multicodec prefix of a compressed P-256 public key (varint 0x1200).
const P256_PREFIX: [u8; 2] = [0x80, 0x24];
/// `did:key:` and the multibase letter of base58btc.
const DID_KEY_PREFIX: &str = "did:key:z";

/// The two curves atproto allows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Curve {
    /// secp256k1.
    K256,
    /// NIST P-256.
    P256,
}

/// A private key.
#[derive(Clone, Debug)]
pub enum SigningKey {
    K256(k256::ecdsa::SigningKey),
    P256(p256::ecdsa::SigningKey),
}

/// A public key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum VerifyingKey {
    K256(k256::ecdsa::VerifyingKey),
    P256(p256::ecdsa::VerifyingKey),
}

/// Why a `did:key` is not a key atproto knows.
#[derive(Debug, thiserror::Error)]
pub enum KeyError {
    #[error("`{0}` is not a did:key in base58btc")]
    NotDidKey(String),
    #[error("`{0}` is neither a compressed secp256k1 nor a compressed P-256 key")]
    UnknownKind(String),
}

impl SigningKey {
    /// A new key from random bytes.
    pub fn generate(curve: Curve, rng: &mut impl RngCore) -> Self {
        loop {
            let mut scalar = [0; 32];
            rng.fill_bytes(&mut scalar);
            // A scalar of zero or above the order is no key; the chance is 2^-32 at most.
            if let Some(key) = Self::from_scalar(curve, &scalar) {
                return key;
            }
        }
    }

    fn from_scalar(curve: Curve, scalar: &[u8; 32]) -> Option<Self> {
        match curve {
            Curve::K256 => k256::ecdsa::SigningKey::from_slice(scalar)
                .ok()
                .map(SigningKey::K256),
            Curve::P256 => p256::ecdsa::SigningKey::from_slice(scalar)
                .ok()
                .map(SigningKey::P256),
        }
    }

    /// The curve of the key.
    pub fn curve(&self) -> Curve {
        match self {
            SigningKey::K256(_) => Curve::K256,
            SigningKey::P256(_) => Curve::P256,
        }
    }

    /// The 64-byte low-S signature over SHA-256 of `message`; deterministic (RFC 6979).
    pub fn sign(&self, message: &[u8]) -> [u8; 64] {
        match self {
            SigningKey::K256(key) => {
                let signature: k256::ecdsa::Signature = key.sign(message);
                signature
                    .normalize_s()
                    .unwrap_or(signature)
                    .to_bytes()
                    .into()
            }
            SigningKey::P256(key) => {
                let signature: p256::ecdsa::Signature = key.sign(message);
                signature
                    .normalize_s()
                    .unwrap_or(signature)
                    .to_bytes()
                    .into()
            }
        }
    }

    /// The public half.
    pub fn verifying_key(&self) -> VerifyingKey {
        match self {
            SigningKey::K256(key) => VerifyingKey::K256(*key.verifying_key()),
            SigningKey::P256(key) => VerifyingKey::P256(*key.verifying_key()),
        }
    }

    /// The public half as `did:key:z…`.
    pub fn did_key(&self) -> String {
        self.verifying_key().did_key()
    }
}

impl VerifyingKey {
    /// Reads `did:key:z…`.
    pub fn parse_did_key(text: &str) -> Result<Self, KeyError> {
        let bytes = text
            .strip_prefix(DID_KEY_PREFIX)
            .and_then(|encoded| bs58::decode(encoded).into_vec().ok())
            .ok_or_else(|| KeyError::NotDidKey(text.to_owned()))?;
        let unknown = || KeyError::UnknownKind(text.to_owned());
        let (prefix, point) = bytes.split_at_checked(2).ok_or_else(unknown)?;
        if point.len() != 33 {
            return Err(unknown());
        }
        let key = match [prefix[0], prefix[1]] {
            K256_PREFIX => k256::ecdsa::VerifyingKey::from_sec1_bytes(point)
                .ok()
                .map(VerifyingKey::K256),
            P256_PREFIX => p256::ecdsa::VerifyingKey::from_sec1_bytes(point)
                .ok()
                .map(VerifyingKey::P256),
            _ => None,
        };
        key.ok_or_else(unknown)
    }

    /// `did:key:z…`.
    pub fn did_key(&self) -> String {
        let (prefix, point) = match self {
            VerifyingKey::K256(key) => {
                (K256_PREFIX, key.to_encoded_point(true).as_bytes().to_vec())
            }
            VerifyingKey::P256(key) => {
                (P256_PREFIX, key.to_encoded_point(true).as_bytes().to_vec())
            }
        };
        format!(
            "{DID_KEY_PREFIX}{}",
            bs58::encode([&prefix[..], &point].concat()).into_string()
        )
    }

    /// The curve of the key.
    pub fn curve(&self) -> Curve {
        match self {
            VerifyingKey::K256(_) => Curve::K256,
            VerifyingKey::P256(_) => Curve::P256,
        }
    }

    /// Whether `signature` is a 64-byte low-S signature over SHA-256 of `message` by this key.
    pub fn verifies(&self, message: &[u8], signature: &[u8]) -> bool {
        match self {
            VerifyingKey::K256(key) => k256::ecdsa::Signature::from_slice(signature)
                .is_ok_and(|sig| sig.normalize_s().is_none() && key.verify(message, &sig).is_ok()),
            VerifyingKey::P256(key) => p256::ecdsa::Signature::from_slice(signature)
                .is_ok_and(|sig| sig.normalize_s().is_none() && key.verify(message, &sig).is_ok()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand::SeedableRng;

    #[test]
    fn both_curves_sign_low_s_and_keys_round_trip() {
        let mut rng = rand::rngs::StdRng::seed_from_u64(1);
        for curve in [Curve::K256, Curve::P256] {
            let key = SigningKey::generate(curve, &mut rng);
            let public = VerifyingKey::parse_did_key(&key.did_key()).unwrap();
            assert_eq!(
                (public.clone(), public.curve()),
                (key.verifying_key(), curve)
            );
            for message in 0..16_u8 {
                let signature = key.sign(&[message]);
                assert!(public.verifies(&[message], &signature));
                assert!(!public.verifies(&[message ^ 1], &signature));
                assert!(!public.verifies(&[message], &signature[..63]));
            }
        }
    }

    #[test]
    fn refuses_other_keys() {
        for text in [
            "",
            "did:key:",
            "did:key:z",
            "did:key:z6MkhaXgBZDvotDkL5257faiztiGiC2QtKLGpbnnEGta2doK",
            "did:key:zQ3sh0",
        ] {
            assert!(VerifyingKey::parse_did_key(text).is_err(), "{text}");
        }
    }
}
