//! Data of the devnet in libipld's terms: DAG-CBOR blocks and their CIDs.

use std::collections::BTreeMap;

use libipld::cbor::DagCborCodec;
use libipld::prelude::Encode;
use libipld::{Cid as IpldCid, Ipld, Multihash};
use sha2::{Digest, Sha256};

/// Multicodec of DAG-CBOR.
const DAG_CBOR: u64 = 0x71;
/// Multihash code of SHA-256.
const SHA2_256: u64 = 0x12;

/// Canonical DAG-CBOR of `value`.
pub fn encode(value: &Ipld) -> Vec<u8> {
    let mut bytes = Vec::new();
    value
        .encode(DagCborCodec, &mut bytes)
        .expect("writing to a Vec never fails");
    bytes
}

/// SHA-256.
pub fn sha256(bytes: &[u8]) -> [u8; 32] {
    Sha256::digest(bytes).into()
}

fn ipld_cid(block: &[u8]) -> IpldCid {
    let hash = Multihash::wrap(SHA2_256, &sha256(block)).expect("32 bytes fit a multihash");
    IpldCid::new_v1(DAG_CBOR, hash)
}

/// CID of a DAG-CBOR block as text.
pub fn cid_text(block: &[u8]) -> String {
    ipld_cid(block).to_string()
}

/// A string.
pub fn text(value: &str) -> Ipld {
    Ipld::String(value.to_owned())
}

/// A map of the given fields; encoding puts them in canonical order.
pub fn map<const N: usize>(fields: [(&str, Ipld); N]) -> BTreeMap<String, Ipld> {
    fields
        .into_iter()
        .map(|(name, value)| (name.to_owned(), value))
        .collect()
}
