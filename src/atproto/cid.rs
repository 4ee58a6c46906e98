//! Content identifiers of the one kind atproto uses: CIDv1, dag-cbor or raw, SHA-256. Every other kind is refused
//! by name. Comparing two CIDs says nothing about content until someone has hashed it ([`Cid::of`]).

use std::fmt;
use std::str::FromStr;

use sha2::{Digest, Sha256};

/// Bytes of a CID: version, codec, hash code, hash length, digest.
pub const CID_BYTES: usize = 36;

/// Characters of a written CID: multibase prefix `b` and 58 base32 digits.
pub const CID_CHARACTERS: usize = 59;

const VERSION: u8 = 1;
const SHA2_256: u8 = 0x12;
const DIGEST_BYTES: u8 = 32;
const MULTIBASE_BASE32: u8 = b'b';
const BASE32: &[u8; 32] = b"abcdefghijklmnopqrstuvwxyz234567";

/// What the hashed bytes are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[repr(u8)]
pub enum Codec {
    /// Opaque bytes: blobs.
    Raw = 0x55,
    /// DRISL-CBOR: records, MST nodes, commits.
    DagCbor = 0x71,
}

/// Why bytes or a text are not a CID of the accepted kind.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum CidError {
    #[error("a CID has {CID_BYTES} bytes, here are {length}")]
    Length { length: usize },
    #[error("only CIDv1 is accepted, not version {version}")]
    Version { version: u8 },
    #[error("only the codecs dag-cbor and raw are accepted, not {codec:#04x}")]
    Codec { codec: u8 },
    #[error("only SHA-256 with 32 bytes is accepted, not hash {code:#04x} with {length} bytes")]
    Hash { code: u8, length: u8 },
    #[error("a CID is written as \"b\" and 58 lower-case base32 characters")]
    Text,
}

/// A CIDv1 in its binary form.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Cid([u8; CID_BYTES]);

impl Cid {
    /// The CID of these bytes: hashes them.
    #[must_use]
    pub fn of(codec: Codec, bytes: &[u8]) -> Self {
        Self::from_digest(codec, Sha256::digest(bytes).into())
    }

    /// The CID of bytes whose SHA-256 is known.
    #[must_use]
    pub fn from_digest(codec: Codec, digest: [u8; 32]) -> Self {
        let mut bytes = [0; CID_BYTES];
        bytes[..4].copy_from_slice(&[VERSION, codec as u8, SHA2_256, DIGEST_BYTES]);
        bytes[4..].copy_from_slice(&digest);
        Self(bytes)
    }

    /// Reads the binary form; nothing may follow.
    ///
    /// # Errors
    /// Another length, version, codec or hash.
    #[inline]
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, CidError> {
        // The prefix first: a CIDv0 should be called that, and not "34 bytes".
        match *bytes {
            [VERSION, 0x55 | 0x71, SHA2_256, DIGEST_BYTES, ..] => {}
            [VERSION, codec, SHA2_256, DIGEST_BYTES, ..] => return Err(CidError::Codec { codec }),
            [VERSION, _, code, length, ..] => return Err(CidError::Hash { code, length }),
            // A CIDv0 is a bare SHA-256 multihash.
            [SHA2_256, DIGEST_BYTES, ..] => return Err(CidError::Version { version: 0 }),
            [version, _, _, _, ..] if version != VERSION => {
                return Err(CidError::Version { version });
            }
            _ => {}
        }
        let bytes: &[u8; CID_BYTES] = bytes.try_into().map_err(|_| CidError::Length {
            length: bytes.len(),
        })?;
        Ok(Self(*bytes))
    }

    /// Reads a CID from the start of `bytes` and gives what follows it.
    ///
    /// # Errors
    /// As [`Cid::from_bytes`].
    pub fn split_from(bytes: &[u8]) -> Result<(Self, &[u8]), CidError> {
        let (head, rest) = bytes.split_at(bytes.len().min(CID_BYTES));
        Ok((Self::from_bytes(head)?, rest))
    }

    /// Reads the written form: `b` and lower-case base32.
    ///
    /// # Errors
    /// Another base, length, version, codec or hash.
    pub fn parse(text: &str) -> Result<Self, CidError> {
        let text = text.as_bytes();
        if text.len() != CID_CHARACTERS || text[0] != MULTIBASE_BASE32 {
            return Err(CidError::Text);
        }
        let mut bytes = [0; CID_BYTES];
        let (mut filled, mut buffer, mut bits) = (0, 0_u32, 0);
        for &character in &text[1..] {
            let digit = match character {
                b'a'..=b'z' => character - b'a',
                b'2'..=b'7' => character - b'2' + 26,
                _ => return Err(CidError::Text),
            };
            buffer = buffer << 5 | u32::from(digit);
            bits += 5;
            if bits >= 8 {
                bits -= 8;
                bytes[filled] = (buffer >> bits) as u8;
                filled += 1;
                buffer &= (1 << bits) - 1;
            }
        }
        // 58 digits are 290 bits, two more than a CID has: they must be zero, or two texts would mean one CID.
        if buffer != 0 {
            return Err(CidError::Text);
        }
        Self::from_bytes(&bytes)
    }

    #[must_use]
    pub const fn to_bytes(self) -> [u8; CID_BYTES] {
        self.0
    }

    #[must_use]
    pub const fn as_bytes(&self) -> &[u8; CID_BYTES] {
        &self.0
    }

    /// The SHA-256.
    #[must_use]
    pub fn digest(&self) -> [u8; 32] {
        let mut digest = [0; 32];
        digest.copy_from_slice(&self.0[4..]);
        digest
    }

    #[must_use]
    pub const fn codec(&self) -> Codec {
        if self.0[1] == Codec::Raw as u8 {
            Codec::Raw
        } else {
            Codec::DagCbor
        }
    }

    /// Whether these bytes hash to this CID.
    #[must_use]
    pub fn matches(&self, bytes: &[u8]) -> bool {
        Sha256::digest(bytes)[..] == self.0[4..]
    }
}

impl fmt::Display for Cid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut text = [MULTIBASE_BASE32; CID_CHARACTERS];
        let (mut buffer, mut bits, mut rest) = (0_u32, 0, self.0.iter());
        for place in &mut text[1..] {
            if bits < 5 {
                buffer = (buffer & 0x1f) << 8 | u32::from(rest.next().copied().unwrap_or(0));
                bits += 8;
            }
            bits -= 5;
            *place = BASE32[(buffer >> bits & 31) as usize];
        }
        text.iter()
            .try_for_each(|&byte| fmt::Write::write_char(f, char::from(byte)))
    }
}

impl fmt::Debug for Cid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Cid({self})")
    }
}

impl FromStr for Cid {
    type Err = CidError;

    fn from_str(text: &str) -> Result<Self, CidError> {
        Self::parse(text)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// SHA-256 of nothing, as dag-cbor would be refused by no one here: a CID names bytes, not their meaning.
    const OF_NOTHING: &str = "bafkreihdwdcefgh4dqkjv67uzcmw7ojee6xedzdetojuzjevtenxquvyku";

    #[test]
    fn hashes_to_the_published_cid() {
        let cid = Cid::of(Codec::Raw, b"");
        assert_eq!(cid.to_string(), OF_NOTHING);
        assert_eq!(Cid::parse(OF_NOTHING), Ok(cid));
        assert_eq!(cid.codec(), Codec::Raw);
        assert!(cid.matches(b"") && !cid.matches(b"x"));
    }

    #[test]
    fn refuses_other_kinds_by_name() {
        let good = Cid::of(Codec::DagCbor, b"x").to_bytes();
        let with = |at: usize, byte: u8| {
            let mut bytes = good;
            bytes[at] = byte;
            bytes
        };
        let v0 = [&[0x12, 0x20][..], &[7; 32]].concat();
        let long = [&good[..], &[0]].concat();
        for (bytes, error) in [
            (&with(0, 2)[..], CidError::Version { version: 2 }),
            (&with(1, 0x70)[..], CidError::Codec { codec: 0x70 }),
            (
                &with(2, 0x1e)[..],
                CidError::Hash {
                    code: 0x1e,
                    length: 32,
                },
            ),
            (
                &with(3, 20)[..],
                CidError::Hash {
                    code: 0x12,
                    length: 20,
                },
            ),
            (&v0[..], CidError::Version { version: 0 }),
            (&long[..], CidError::Length { length: 37 }),
            (&good[..35], CidError::Length { length: 35 }),
            (&[][..], CidError::Length { length: 0 }),
        ] {
            assert_eq!(Cid::from_bytes(bytes), Err(error));
        }
    }

    #[test]
    fn refuses_other_writings_of_the_same_cid() {
        let mut spare_bits = OF_NOTHING.to_owned();
        spare_bits.replace_range(58.., "v");
        for text in [
            "",
            &OF_NOTHING.to_uppercase(),
            &OF_NOTHING[1..],
            &format!("{OF_NOTHING}="),
            &spare_bits,
        ] {
            assert_eq!(Cid::parse(text), Err(CidError::Text), "{text}");
        }
    }

    proptest! {
        #[test]
        fn every_cid_survives_writing(digest: [u8; 32], raw: bool) {
            let codec = if raw { Codec::Raw } else { Codec::DagCbor };
            let cid = Cid::from_digest(codec, digest);
            prop_assert_eq!(Cid::parse(&cid.to_string()), Ok(cid));
            prop_assert_eq!(Cid::from_bytes(&cid.to_bytes()), Ok(cid));
            prop_assert_eq!((cid.digest(), cid.codec()), (digest, codec));
        }

        #[test]
        fn any_bytes_are_read_or_refused(bytes: Vec<u8>, text: String) {
            let _ = Cid::from_bytes(&bytes);
            let _ = Cid::parse(&text);
        }
    }
}
