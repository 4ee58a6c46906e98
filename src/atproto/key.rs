//! Public keys of the two curves atproto allows, in every spelling found in DID documents, and
//! ECDSA verification with low-S enforced for both curves.
//! It holds no private keys and does not sign.

use std::fmt;

use p256::elliptic_curve::sec1::ToEncodedPoint as _;
use ring::signature::{ECDSA_P256_SHA256_FIXED, UnparsedPublicKey};
use sha2::{Digest as _, Sha256};
use thiserror::Error;

/// Length of a compressed curve point (SEC 1, section 2.3.3).
const COMPRESSED_LEN: usize = 33;
/// Length of an uncompressed curve point (SEC 1, section 2.3.3).
const UNCOMPRESSED_LEN: usize = 65;
/// Longest multibase text worth decoding: an uncompressed point with a codec takes 93 characters.
const MAX_MULTIBASE_LEN: usize = 128;
/// Length of an atproto signature: r and s, 32 bytes each, big-endian.
pub const SIGNATURE_LEN: usize = 64;

/// Half the order of secp256k1, rounded down: the largest s of a low-S signature (BIP 62).
const HALF_ORDER_K256: [u8; 32] = [
    0x7f, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff,
    0x5d, 0x57, 0x6e, 0x73, 0x57, 0xa4, 0x50, 0x1d, 0xdf, 0xe9, 0x2f, 0x46, 0x68, 0x1b, 0x20, 0xa0,
];
/// Half the order of P-256, rounded down (FIPS 186-5, the order is in SP 800-186 section 3.2.1.3).
const HALF_ORDER_P256: [u8; 32] = [
    0x7f, 0xff, 0xff, 0xff, 0x80, 0x00, 0x00, 0x00, 0x7f, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff,
    0xde, 0x73, 0x7d, 0x56, 0xd3, 0x8b, 0xcf, 0x42, 0x79, 0xdc, 0xe5, 0x61, 0x7e, 0x31, 0x92, 0xa8,
];

/// The curves of the atproto cryptography specification.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Curve {
    /// secp256k1.
    K256 = 1,
    /// NIST P-256, also called secp256r1.
    P256 = 2,
}

impl Curve {
    /// The multicodec of a compressed public key, as varint bytes.
    const fn multicodec(self) -> [u8; 2] {
        match self {
            Curve::K256 => [0xe7, 0x01],
            Curve::P256 => [0x80, 0x24],
        }
    }

    fn from_multicodec(codec: [u8; 2]) -> Option<Self> {
        [Curve::K256, Curve::P256]
            .into_iter()
            .find(|curve| curve.multicodec() == codec)
    }

    const fn half_order(self) -> &'static [u8; 32] {
        match self {
            Curve::K256 => &HALF_ORDER_K256,
            Curve::P256 => &HALF_ORDER_P256,
        }
    }
}

impl fmt::Display for Curve {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Curve::K256 => "secp256k1",
            Curve::P256 => "P-256",
        })
    }
}

/// Why a public key was refused.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum KeyError {
    /// The text does not begin with `did:key:`.
    #[error("key is not a did:key")]
    NotDidKey,
    /// The text does not begin with `z`, the multibase prefix of base58btc.
    #[error("key is not multibase base58btc text (it must begin with 'z')")]
    NotMultibase,
    /// A character outside the base58btc alphabet, or far too long a text.
    #[error("key is not valid base58btc text")]
    Base58,
    /// A multicodec other than `secp256k1-pub` and `p256-pub`.
    #[error("key has an unsupported multicodec (only secp256k1-pub and p256-pub are)")]
    Codec,
    /// A verification method of a type that names no supported curve.
    #[error("unsupported verification method type {0:?}")]
    MethodType(String),
    /// Neither a compressed nor, where that is allowed, an uncompressed point.
    #[error("{curve} key of {len} bytes is not an encoded curve point")]
    Encoding {
        /// The curve the key claims.
        curve: Curve,
        /// The length of the encoded point.
        len: usize,
    },
    /// Coordinates that do not satisfy the curve's equation.
    #[error("key is not a point of {0}")]
    NotOnCurve(Curve),
    /// Stored bytes with an unknown curve tag.
    #[error("stored key has the unknown curve tag {0}")]
    Tag(u8),
}

/// Why a signature was refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum SignatureError {
    /// Not exactly [`SIGNATURE_LEN`] bytes; DER is not accepted.
    #[error("signature has {0} bytes, not 64")]
    Length(usize),
    /// The s value lies in the upper half: valid ECDSA, forbidden by atproto.
    #[error("signature is not low-S")]
    HighS,
    /// The signature does not verify with this key, or r or s is out of range.
    #[error("signature does not verify with the account's key")]
    Mismatch,
}

/// A public key: the curve and the compressed point.
///
/// Every constructor except [`PublicKey::from_bytes`] checks that the point is on its curve.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct PublicKey {
    curve: Curve,
    point: [u8; COMPRESSED_LEN],
}

impl PublicKey {
    /// Length of the stored form, see [`PublicKey::to_bytes`].
    pub const LEN: usize = 1 + COMPRESSED_LEN;

    /// Reads a point in SEC 1 form, compressed or uncompressed, and checks it.
    ///
    /// # Errors
    /// [`KeyError::Encoding`] and [`KeyError::NotOnCurve`].
    pub fn from_sec1(curve: Curve, bytes: &[u8]) -> Result<Self, KeyError> {
        let encoding = KeyError::Encoding {
            curve,
            len: bytes.len(),
        };
        let mut point = [0; COMPRESSED_LEN];
        match (bytes.len(), bytes.first()) {
            (COMPRESSED_LEN, Some(0x02 | 0x03)) => point.copy_from_slice(bytes),
            (UNCOMPRESSED_LEN, Some(0x04)) => {
                point[0] = 0x02 | (bytes[UNCOMPRESSED_LEN - 1] & 1);
                point[1..].copy_from_slice(&bytes[1..COMPRESSED_LEN]);
            }
            _ => return Err(encoding),
        }
        let on_curve = match curve {
            Curve::K256 => secp256k1::PublicKey::from_slice(bytes).is_ok(),
            Curve::P256 => p256::PublicKey::from_sec1_bytes(bytes).is_ok(),
        };
        if !on_curve {
            return Err(KeyError::NotOnCurve(curve));
        }
        Ok(Self { curve, point })
    }

    /// Reads a Multikey: `z`, then base58btc of multicodec and compressed point.
    ///
    /// # Errors
    /// Any [`KeyError`] of the text or the point.
    pub fn parse_multikey(text: &str) -> Result<Self, KeyError> {
        let bytes = decode_multibase(text)?;
        let Some((codec, point)) = bytes.split_first_chunk::<2>() else {
            return Err(KeyError::Codec);
        };
        let curve = Curve::from_multicodec(*codec).ok_or(KeyError::Codec)?;
        if point.len() != COMPRESSED_LEN {
            return Err(KeyError::Encoding {
                curve,
                len: point.len(),
            });
        }
        Self::from_sec1(curve, point)
    }

    /// Reads a `did:key` of a supported curve.
    ///
    /// # Errors
    /// [`KeyError::NotDidKey`], else as [`PublicKey::parse_multikey`].
    pub fn parse_did_key(text: &str) -> Result<Self, KeyError> {
        Self::parse_multikey(text.strip_prefix("did:key:").ok_or(KeyError::NotDidKey)?)
    }

    /// Reads the key of a DID document's verification method: `Multikey`, or one of the two older
    /// types, whose `publicKeyMultibase` is a bare point, uncompressed as a rule, without a codec.
    ///
    /// # Errors
    /// [`KeyError::MethodType`] for other types, else any [`KeyError`] of the text or the point.
    pub fn from_verification_method(
        method_type: &str,
        public_key_multibase: &str,
    ) -> Result<Self, KeyError> {
        let curve = match method_type {
            "Multikey" => return Self::parse_multikey(public_key_multibase),
            "EcdsaSecp256k1VerificationKey2019" => Curve::K256,
            "EcdsaSecp256r1VerificationKey2019" => Curve::P256,
            other => return Err(KeyError::MethodType(other.to_owned())),
        };
        Self::from_sec1(curve, &decode_multibase(public_key_multibase)?)
    }

    /// The curve of the key.
    pub fn curve(&self) -> Curve {
        self.curve
    }

    /// The compressed point.
    pub fn compressed(&self) -> &[u8; COMPRESSED_LEN] {
        &self.point
    }

    /// The key as Multikey text.
    pub fn to_multikey(&self) -> String {
        let mut bytes = [0; 2 + COMPRESSED_LEN];
        bytes[..2].copy_from_slice(&self.curve.multicodec());
        bytes[2..].copy_from_slice(&self.point);
        format!("z{}", bs58::encode(bytes).into_string())
    }

    /// The key as `did:key` text.
    pub fn to_did_key(&self) -> String {
        format!("did:key:{}", self.to_multikey())
    }

    /// The stored form: one byte for the curve, then the compressed point.
    pub fn to_bytes(&self) -> [u8; Self::LEN] {
        let mut bytes = [0; Self::LEN];
        bytes[0] = self.curve as u8;
        bytes[1..].copy_from_slice(&self.point);
        bytes
    }

    /// Reads the stored form. That the point is on its curve is left to [`VerifyingKey::new`].
    ///
    /// # Errors
    /// [`KeyError::Tag`] and [`KeyError::Encoding`].
    pub fn from_bytes(bytes: &[u8; Self::LEN]) -> Result<Self, KeyError> {
        let curve = match bytes[0] {
            1 => Curve::K256,
            2 => Curve::P256,
            tag => return Err(KeyError::Tag(tag)),
        };
        if !matches!(bytes[1], 0x02 | 0x03) {
            return Err(KeyError::Encoding {
                curve,
                len: COMPRESSED_LEN,
            });
        }
        let mut point = [0; COMPRESSED_LEN];
        point.copy_from_slice(&bytes[1..]);
        Ok(Self { curve, point })
    }
}

impl fmt::Display for PublicKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.to_did_key())
    }
}

impl fmt::Debug for PublicKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "PublicKey({})", self.to_did_key())
    }
}

/// A public key made ready for verifying: decompressed once, used many times.
#[derive(Clone)]
pub struct VerifyingKey(Parsed);

#[derive(Clone)]
enum Parsed {
    K256(secp256k1::PublicKey),
    /// Uncompressed, as ring takes it.
    P256([u8; UNCOMPRESSED_LEN]),
}

impl VerifyingKey {
    /// Decompresses the key's point.
    ///
    /// # Errors
    /// [`KeyError::NotOnCurve`] when a stored key is damaged.
    pub fn new(key: &PublicKey) -> Result<Self, KeyError> {
        let not_on_curve = KeyError::NotOnCurve(key.curve);
        match key.curve {
            Curve::K256 => secp256k1::PublicKey::from_byte_array_compressed(key.point)
                .map(Parsed::K256)
                .map_err(|_| not_on_curve),
            Curve::P256 => p256::PublicKey::from_sec1_bytes(&key.point)
                .ok()
                .and_then(|key| key.to_encoded_point(false).as_bytes().try_into().ok())
                .map(Parsed::P256)
                .ok_or(not_on_curve),
        }
        .map(Self)
    }

    /// The curve of the key.
    pub fn curve(&self) -> Curve {
        match self.0 {
            Parsed::K256(_) => Curve::K256,
            Parsed::P256(_) => Curve::P256,
        }
    }

    /// The point, of a key on secp256k1.
    pub fn k256(&self) -> Option<&secp256k1::PublicKey> {
        match &self.0 {
            Parsed::K256(point) => Some(point),
            Parsed::P256(_) => None,
        }
    }

    /// Verifies a signature over the SHA-256 of `message`.
    ///
    /// # Errors
    /// [`SignatureError`] when it is not 64 bytes, not low-S, or does not verify.
    pub fn verify(&self, message: &[u8], signature: &[u8]) -> Result<(), SignatureError> {
        self.verify_hashed(message, &Sha256::digest(message).into(), signature)
    }

    /// Verifies a signature over a message whose SHA-256 is known: libsecp256k1 takes that, ring hashes by itself.
    ///
    /// # Errors
    /// As [`VerifyingKey::verify`].
    pub fn verify_hashed(
        &self,
        message: &[u8],
        digest: &[u8; 32],
        signature: &[u8],
    ) -> Result<(), SignatureError> {
        let Ok(signature) = <&[u8; SIGNATURE_LEN]>::try_from(signature) else {
            return Err(SignatureError::Length(signature.len()));
        };
        if signature[32..] > self.curve().half_order()[..] {
            return Err(SignatureError::HighS);
        }
        let verified = match &self.0 {
            Parsed::K256(key) => secp256k1::ecdsa::Signature::from_compact(signature)
                .and_then(|parsed| {
                    let message = secp256k1::Message::from_digest(*digest);
                    secp256k1::ecdsa::verify(&parsed, message, key)
                })
                .is_ok(),
            Parsed::P256(key) => UnparsedPublicKey::new(&ECDSA_P256_SHA256_FIXED, key)
                .verify(message, signature)
                .is_ok(),
        };
        if verified {
            Ok(())
        } else {
            Err(SignatureError::Mismatch)
        }
    }
}

impl fmt::Debug for VerifyingKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "VerifyingKey({})", self.curve())
    }
}

fn decode_multibase(text: &str) -> Result<Vec<u8>, KeyError> {
    let base58 = text.strip_prefix('z').ok_or(KeyError::NotMultibase)?;
    // Base58 decoding takes quadratic time: refuse what cannot be a key before it is decoded.
    if base58.len() > MAX_MULTIBASE_LEN {
        return Err(KeyError::Base58);
    }
    bs58::decode(base58)
        .into_vec()
        .map_err(|_| KeyError::Base58)
}

#[cfg(test)]
mod tests {
    use super::*;

    // The examples of the atproto cryptography specification.
    const P256: &str = "zDnaembgSGUhZULN2Caob4HLJPaxBh92N7rtH21TErzqf8HQo";
    const K256: &str = "zQ3shqwJEJyMBsBXCWyCBpUBMqxcon9oHB7mCvx4sSpMdLJwc";

    #[test]
    fn multikeys_survive_every_form() {
        for (text, curve) in [(P256, Curve::P256), (K256, Curve::K256)] {
            let key = PublicKey::parse_multikey(text).unwrap();
            assert_eq!(key.curve(), curve);
            assert_eq!(key.to_multikey(), text);
            assert_eq!(PublicKey::parse_did_key(&key.to_did_key()), Ok(key));
            assert_eq!(PublicKey::from_bytes(&key.to_bytes()), Ok(key));
            assert_eq!(VerifyingKey::new(&key).unwrap().curve(), curve);
        }
    }

    #[test]
    fn older_method_types_take_bare_points() {
        let key = PublicKey::parse_multikey(K256).unwrap();
        let full = secp256k1::PublicKey::from_slice(key.compressed()).unwrap();
        for bytes in [&full.serialize_uncompressed()[..], &key.compressed()[..]] {
            let text = format!("z{}", bs58::encode(bytes).into_string());
            let read = |method| PublicKey::from_verification_method(method, &text);
            assert_eq!(read("EcdsaSecp256k1VerificationKey2019"), Ok(key));
            assert!(read("EcdsaSecp256r1VerificationKey2019").is_err());
            assert!(read("Multikey").is_err());
            assert_eq!(
                read("Ed25519VerificationKey2020"),
                Err(KeyError::MethodType("Ed25519VerificationKey2020".into()))
            );
        }
    }

    #[test]
    fn broken_keys_are_refused() {
        let encode = |bytes: &[u8]| format!("z{}", bs58::encode(bytes).into_string());
        let mut off_curve = vec![0xe7, 0x01, 0x02];
        off_curve.extend([0xff; 32]);
        let mut hybrid = vec![0x06];
        hybrid.extend([1; 64]);
        let long = "z".repeat(100_000);
        let cases = [
            ("", KeyError::NotMultibase),
            ("mAAAA", KeyError::NotMultibase),
            ("z0OIl", KeyError::Base58),
            (&long, KeyError::Base58),
            ("z", KeyError::Codec),
            (&encode(&[0xed, 0x01, 0, 0]), KeyError::Codec),
            (
                &encode(&[0xe7, 0x01]),
                KeyError::Encoding {
                    curve: Curve::K256,
                    len: 0,
                },
            ),
            (&encode(&off_curve), KeyError::NotOnCurve(Curve::K256)),
        ];
        for (text, error) in cases {
            assert_eq!(PublicKey::parse_multikey(text), Err(error));
        }
        for curve in [Curve::K256, Curve::P256] {
            let refused = PublicKey::from_sec1(curve, &hybrid);
            assert_eq!(refused, Err(KeyError::Encoding { curve, len: 65 }));
            let refused = PublicKey::from_sec1(curve, &[4; 65]);
            assert_eq!(refused, Err(KeyError::NotOnCurve(curve)));
        }
        assert_eq!(PublicKey::parse_did_key(K256), Err(KeyError::NotDidKey));
        assert_eq!(PublicKey::from_bytes(&[0; 34]), Err(KeyError::Tag(0)));
        let mut damaged = [0xff; 34];
        (damaged[0], damaged[1]) = (2, 3);
        let damaged = PublicKey::from_bytes(&damaged).unwrap();
        assert!(VerifyingKey::new(&damaged).is_err());
    }

    #[test]
    fn signatures_of_other_lengths_are_refused() {
        let key = VerifyingKey::new(&PublicKey::parse_multikey(P256).unwrap()).unwrap();
        for len in [0, 63, 65, 72] {
            let refused = key.verify(b"message", &vec![1; len]);
            assert_eq!(refused, Err(SignatureError::Length(len)));
        }
        assert_eq!(
            key.verify(b"message", &[0; 64]),
            Err(SignatureError::Mismatch)
        );
        assert_eq!(
            key.verify(b"message", &[0xff; 64]),
            Err(SignatureError::HighS)
        );
    }
}
