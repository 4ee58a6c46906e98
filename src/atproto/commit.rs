//! The signed commit of a repository: reading its block strictly, the bytes its signature covers,
//! and writing one.
//! Whether version, DID and rev are the expected ones is judged by the caller; nothing is signed here.

use std::ops::Range;

use sha2::{Digest, Sha256};
use thiserror::Error;

use super::cid::Cid;
use super::fixed::{FixedReader, NULL, put_bytes, put_link, put_text, put_unsigned};
use super::key::{SignatureError, VerifyingKey};

pub use super::fixed::ShapeError;

/// The repository format in use (repository specification).
pub const VERSION: u64 = 3;

/// The initial byte of a map without fields, to which their number is added.
const MAP: u8 = 0xa0;

/// Why a block is not a signed commit.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum CommitError {
    /// A map that claims another number of fields than it has.
    #[error("commit claims {claimed} fields, and has {fields}")]
    Fields {
        /// As the map says.
        claimed: u64,
        /// As they are.
        fields: u64,
    },
    /// Another shape than the commit schema, or not canonical CBOR.
    #[error("block is not a commit: {0}")]
    Shape(#[from] ShapeError),
}

/// A signed commit, as it lies in its block.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SignedCommit<'a> {
    /// The account, as written: its syntax is not checked here.
    pub did: &'a str,
    /// The repository format; [`VERSION`] is the only one in use.
    pub version: u64,
    /// The revision, as written: its syntax is not checked here. Empty in version 2, which has none.
    pub rev: &'a str,
    /// The commit before, virtually always null. Absent counts as null: older commits lack it.
    pub prev: Option<Cid>,
    /// The root of the tree.
    pub data: Cid,
    /// The signature, as written: its length is checked when it is verified.
    pub sig: &'a [u8],
    block: &'a [u8],
    /// The initial byte of the map without the field `sig`.
    unsigned_map: u8,
    /// Where the field `sig` lies in the block, name included.
    sig_field: Range<usize>,
}

impl<'a> SignedCommit<'a> {
    /// Reads a commit from its block.
    ///
    /// # Errors
    /// [`CommitError`] for anything but the fields of a signed commit in canonical DRISL-CBOR.
    pub fn parse(block: &'a [u8]) -> Result<Self, CommitError> {
        let mut reader = FixedReader::new(block);
        let claimed = reader.map()?;
        // did, sig, data and version are always there.
        let mut fields = 4;
        reader.expect(b"\x63did")?;
        let did = reader.text()?;
        let mut rev = "";
        if reader.skip(b"\x63rev") {
            rev = reader.text()?;
            fields += 1;
        }
        let sig_start = reader.at();
        reader.expect(b"\x63sig")?;
        let sig = reader.bytes()?;
        let sig_field = sig_start..reader.at();
        reader.expect(b"\x64data")?;
        let data = reader.structure_link()?;
        let mut prev = None;
        if reader.skip(b"\x64prev") {
            prev = reader.structure_link_or_null()?;
            fields += 1;
        }
        reader.expect(b"\x67version")?;
        let version = reader.unsigned()?;
        reader.finish()?;
        if fields != claimed {
            return Err(CommitError::Fields { claimed, fields });
        }
        Ok(Self {
            did,
            version,
            rev,
            prev,
            data,
            sig,
            block,
            unsigned_map: MAP + (fields - 1) as u8,
            sig_field,
        })
    }

    /// The bytes the signature covers: the commit without `sig`.
    pub fn unsigned_bytes(&self) -> Vec<u8> {
        self.unsigned_parts().concat()
    }

    /// Verifies the signature with the account's key.
    ///
    /// # Errors
    /// As [`VerifyingKey::verify`].
    pub fn verify_signature(&self, key: &VerifyingKey) -> Result<(), SignatureError> {
        key.verify(&self.unsigned_bytes(), self.sig)
    }

    /// The SHA-256 of [`SignedCommit::unsigned_bytes`].
    pub fn unsigned_digest(&self) -> [u8; 32] {
        let mut hash = Sha256::new();
        for part in self.unsigned_parts() {
            hash.update(part);
        }
        hash.finalize().into()
    }

    /// The map with one field less; the fields are as they lie in the block.
    fn unsigned_parts(&self) -> [&[u8]; 3] {
        [
            std::slice::from_ref(&self.unsigned_map),
            &self.block[1..self.sig_field.start],
            &self.block[self.sig_field.end..],
        ]
    }
}

/// Writes the bytes that are to be signed for a commit of [`VERSION`].
pub fn encode_unsigned(did: &str, rev: &str, data: &Cid) -> Vec<u8> {
    encode(did, rev, data, None)
}

/// Writes the block of a commit of [`VERSION`] with its signature.
pub fn encode_signed(did: &str, rev: &str, data: &Cid, sig: &[u8]) -> Vec<u8> {
    encode(did, rev, data, Some(sig))
}

fn encode(did: &str, rev: &str, data: &Cid, sig: Option<&[u8]>) -> Vec<u8> {
    let mut out = Vec::with_capacity(256);
    out.push(MAP + if sig.is_some() { 6 } else { 5 });
    put_text(&mut out, "did");
    put_text(&mut out, did);
    put_text(&mut out, "rev");
    put_text(&mut out, rev);
    if let Some(sig) = sig {
        put_text(&mut out, "sig");
        put_bytes(&mut out, sig);
    }
    put_text(&mut out, "data");
    put_link(&mut out, data);
    put_text(&mut out, "prev");
    out.push(NULL);
    put_text(&mut out, "version");
    put_unsigned(&mut out, VERSION);
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::atproto::cid::Codec;
    use crate::atproto::key::PublicKey;
    use proptest::prelude::*;

    const DID: &str = "did:plc:ewvi7nxzyoun6zhxrhs64oiz";
    const REV: &str = "3mjsuowzett22";

    fn data() -> Cid {
        Cid::of(Codec::DagCbor, b"tree")
    }

    #[test]
    fn a_commit_reads_as_it_was_written() {
        let block = encode_signed(DID, REV, &data(), &[7; 64]);
        let commit = SignedCommit::parse(&block).unwrap();
        assert_eq!((commit.did, commit.rev, commit.version), (DID, REV, 3));
        assert_eq!(
            (commit.data, commit.prev, commit.sig),
            (data(), None, &[7; 64][..])
        );
        assert_eq!(commit.unsigned_bytes(), encode_unsigned(DID, REV, &data()));
    }

    #[test]
    fn a_commit_without_prev_is_signed_without_prev() {
        let remove_prev = |block: &[u8]| {
            let at = block
                .windows(5)
                .position(|window| window == b"\x64prev")
                .unwrap();
            [&[block[0] - 1], &block[1..at], &block[at + 6..]].concat()
        };
        let block = remove_prev(&encode_signed(DID, REV, &data(), b"sig"));
        let commit = SignedCommit::parse(&block).unwrap();
        assert_eq!(commit.prev, None);
        assert_eq!(
            commit.unsigned_bytes(),
            remove_prev(&encode_unsigned(DID, REV, &data()))
        );
    }

    #[test]
    fn a_signature_covers_every_other_byte() {
        let secret = secp256k1::SecretKey::from_secret_bytes([5; 32]).unwrap();
        let point = secret.public_key().serialize();
        let key = PublicKey::from_sec1(crate::atproto::key::Curve::K256, &point).unwrap();
        let key = VerifyingKey::new(&key).unwrap();
        let digest = Sha256::digest(encode_unsigned(DID, REV, &data())).into();
        let sig = secp256k1::ecdsa::sign(secp256k1::Message::from_digest(digest), &secret);
        let block = encode_signed(DID, REV, &data(), &sig.serialize_compact());
        assert_eq!(
            SignedCommit::parse(&block).unwrap().verify_signature(&key),
            Ok(())
        );
        for at in 0..block.len() {
            let mut damaged = block.clone();
            damaged[at] ^= 1;
            let verified =
                SignedCommit::parse(&damaged).map(|commit| commit.verify_signature(&key).is_ok());
            assert_ne!(verified, Ok(true), "byte {at}");
        }
    }

    #[test]
    fn other_objects_are_no_commits() {
        let good = encode_signed(DID, REV, &data(), &[7; 64]);
        let raw = Cid::of(Codec::Raw, b"tree");
        let replace = |from: &[u8], to: &[u8]| {
            let at = good
                .windows(from.len())
                .position(|window| window == from)
                .unwrap();
            [&good[..at], to, &good[at + from.len()..]].concat()
        };
        let cases = [
            (encode_unsigned(DID, REV, &data()), "without a signature"),
            (encode_signed(DID, REV, &raw, &[7; 64]), "with a raw tree"),
            (good[..good.len() - 1].to_vec(), "cut short"),
            ([&good[..], &[0]].concat(), "with a byte too many"),
            (replace(b"\x63rev", b"\x63rew"), "with another field"),
            (
                replace(b"version\x03", b"version\x18\x03"),
                "with a long integer",
            ),
            (
                replace(b"version\x03", b"version\x22"),
                "with a negative version",
            ),
            (replace(b"prev\xf6", b"prev\xf7"), "with undefined"),
            (
                replace(b"\xa6\x63did", b"\xa5\x63did"),
                "claiming a field less",
            ),
            (
                replace(b"\xa6\x63did", b"\xa7\x63did"),
                "claiming a field more",
            ),
            (vec![0xa0], "empty"),
            (vec![], "nothing"),
        ];
        for (block, what) in cases {
            assert!(SignedCommit::parse(&block).is_err(), "{what}");
        }
    }

    proptest! {
        #[test]
        fn any_bytes_are_read_or_refused(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            let _ = SignedCommit::parse(&bytes);
        }

        #[test]
        fn what_is_read_was_canonical(
            at in 0..256_usize,
            byte in any::<u8>(),
        ) {
            let mut block = encode_signed(DID, REV, &data(), &[7; 64]);
            let at = at % block.len();
            block[at] = byte;
            if let Ok(commit) = SignedCommit::parse(&block)
                && commit.version == VERSION
                && commit.prev.is_none()
            {
                let again = encode_signed(commit.did, commit.rev, &commit.data, commit.sig);
                prop_assert_eq!(again, block);
            }
        }
    }
}
