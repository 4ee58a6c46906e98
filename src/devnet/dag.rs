//! Data of the devnet in libipld's terms: DAG-CBOR blocks, their CIDs, and the JSON form of records
//! (`$link`, `$bytes`). Decodes only what our own reader has checked first: libipld overflows the
//! stack on deeply nested input.

use std::collections::BTreeMap;

use data_encoding::BASE64_NOPAD;
use libipld::cbor::DagCborCodec;
use libipld::prelude::{Codec, Encode};
use libipld::{Cid as IpldCid, Ipld, Multihash};
use serde_json::{Map, Value};
use sha2::{Digest, Sha256};

use crate::atproto::cbor;
use crate::atproto::cid::Cid;

/// Multicodec of DAG-CBOR.
const DAG_CBOR: u64 = 0x71;
/// Multihash code of SHA-256.
const SHA2_256: u64 = 0x12;

/// Why JSON is not a record or a block not data.
#[derive(Debug, thiserror::Error)]
pub enum DagError {
    #[error("`{0}` is not an integer: the data model has no floats and 64-bit integers only")]
    Number(String),
    #[error("`$link` is not a CID: {0}")]
    Link(String),
    #[error("`$bytes` is not base64")]
    Bytes,
    #[error("not canonical DAG-CBOR: {0}")]
    Cbor(String),
}

/// Canonical DAG-CBOR of `value`.
pub fn encode(value: &Ipld) -> Vec<u8> {
    let mut bytes = Vec::new();
    value
        .encode(DagCborCodec, &mut bytes)
        .expect("writing to a Vec never fails");
    bytes
}

/// Reads a DAG-CBOR block.
pub fn decode(block: &[u8]) -> Result<Ipld, DagError> {
    cbor::validate(block).map_err(|error| DagError::Cbor(error.to_string()))?;
    DagCborCodec
        .decode(block)
        .map_err(|error| DagError::Cbor(error.to_string()))
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

/// CID of a DAG-CBOR block, computed by libipld.
pub fn cid_of(block: &[u8]) -> Cid {
    Cid::from_bytes(&ipld_cid(block).to_bytes())
        .expect("libipld made a CIDv1 of DAG-CBOR and SHA-256")
}

/// A link to `cid`.
pub fn link(cid: &Cid) -> Ipld {
    Ipld::Link(IpldCid::try_from(&cid.to_bytes()[..]).expect("our CIDs are binary CIDv1"))
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

/// A record from its JSON form. Nesting is bounded by the JSON reader (128).
pub fn from_json(value: &Value) -> Result<Ipld, DagError> {
    Ok(match value {
        Value::Null => Ipld::Null,
        Value::Bool(flag) => Ipld::Bool(*flag),
        Value::Number(number) => Ipld::Integer(integer(number)?),
        Value::String(string) => Ipld::String(string.clone()),
        Value::Array(items) => Ipld::List(items.iter().map(from_json).collect::<Result<_, _>>()?),
        Value::Object(fields) => object_from_json(fields)?,
    })
}

fn integer(number: &serde_json::Number) -> Result<i128, DagError> {
    number
        .as_i64()
        .map(i128::from)
        .ok_or_else(|| DagError::Number(number.to_string()))
}

fn object_from_json(fields: &Map<String, Value>) -> Result<Ipld, DagError> {
    if fields.len() == 1 {
        if let Some(Value::String(cid)) = fields.get("$link") {
            let parsed = Cid::parse(cid).map_err(|error| DagError::Link(error.to_string()))?;
            return Ok(link(&parsed));
        }
        if let Some(Value::String(bytes)) = fields.get("$bytes") {
            let unpadded = bytes.trim_end_matches('=').as_bytes();
            return BASE64_NOPAD
                .decode(unpadded)
                .map(Ipld::Bytes)
                .map_err(|_| DagError::Bytes);
        }
    }
    let entries = fields
        .iter()
        .map(|(name, value)| Ok((name.clone(), from_json(value)?)));
    Ok(Ipld::Map(entries.collect::<Result<_, DagError>>()?))
}

/// The JSON form of a record.
pub fn to_json(value: &Ipld) -> Value {
    match value {
        Ipld::Null => Value::Null,
        Ipld::Bool(flag) => Value::Bool(*flag),
        Ipld::Integer(number) => i64::try_from(*number).map_or(Value::Null, Value::from),
        // Our reader refuses floats before libipld sees them.
        Ipld::Float(number) => Value::from(*number),
        Ipld::String(string) => Value::String(string.clone()),
        Ipld::Bytes(bytes) => serde_json::json!({ "$bytes": BASE64_NOPAD.encode(bytes) }),
        Ipld::List(items) => Value::Array(items.iter().map(to_json).collect()),
        Ipld::Map(fields) => Value::Object(
            fields
                .iter()
                .map(|(name, value)| (name.clone(), to_json(value)))
                .collect(),
        ),
        Ipld::Link(cid) => serde_json::json!({ "$link": cid.to_string() }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn records_round_trip_through_their_block() {
        let record = json!({
            "$type": "com.example.thing",
            "n": -3,
            "list": [null, true, "x"],
            "bytes": { "$bytes": "nFERjvLLiw9qm45JrqH9QTzyC2Lu1Xb4ne6+sBrCzI0" },
            "link": { "$link": "bafyreie5737gdxlw5i64vzichcalba3z2v5n6icifvx5xytvske7mr3hpm" },
        });
        let block = encode(&from_json(&record).unwrap());
        assert_eq!(to_json(&decode(&block).unwrap()), record);
        assert_eq!(cid_of(&block).to_string(), cid_text(&block));
    }

    #[test]
    fn refuses_what_the_data_model_has_not() {
        for record in [
            json!(1.5),
            json!(u64::MAX),
            json!({ "$link": "x" }),
            json!({ "$bytes": "%" }),
        ] {
            assert!(from_json(&record).is_err(), "{record}");
        }
    }
}
