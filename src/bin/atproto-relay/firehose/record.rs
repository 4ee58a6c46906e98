//! Records of a commit as JSON, in the form of the AT Protocol's data model: links as `$link`, byte strings as `$bytes`.
//! Bounded in what it decodes; believes nothing of a block but what its CID says.

use base64::Engine;
use base64::engine::general_purpose::STANDARD_NO_PAD;
use serde_json::{Map, Number, Value, json};

use atproto_relay::atproto::car::Car;
use atproto_relay::atproto::cbor;
use atproto_relay::atproto::cid::Cid;

/// Blocks of a commit that are looked at; the rules of relays allow 200 ops, and the tree has a few more.
const MAX_BLOCKS: usize = 100_000;
/// Bytes of all records of a commit that are decoded: the protocol's limit of `blocks`.
const MAX_RECORD_BYTES: usize = 2_000_000;

/// The records of one commit.
pub struct Records<'a> {
    blocks: Option<Car<'a>>,
    left: usize,
}

impl<'a> Records<'a> {
    /// Those of a commit's CAR, whole or not.
    pub fn of(blocks: &'a [u8]) -> Records<'a> {
        Records {
            blocks: Car::parse_within(blocks, MAX_BLOCKS).ok(),
            left: MAX_RECORD_BYTES,
        }
    }

    /// The record of a CID, or why it cannot be shown.
    pub fn get(&mut self, cid: &Cid) -> Result<Value, String> {
        let car = self
            .blocks
            .as_ref()
            .ok_or("the commit's blocks are no CAR")?;
        let block = car.blocks().get(cid).ok_or("the commit lacks its block")?;
        self.left = match self.left.checked_sub(block.len()) {
            Some(left) => left,
            None => return Err("the commit's records are too large".to_owned()),
        };
        if !cid.matches(block) {
            return Err("the block's bytes do not hash to its CID".to_owned());
        }
        let record = cbor::Value::parse(block).map_err(|error| error.to_string())?;
        Ok(as_json(&record))
    }
}

/// As deep as the value, whose reader bounds its depth.
fn as_json(value: &cbor::Value<'_>) -> Value {
    match value {
        cbor::Value::Null => Value::Null,
        cbor::Value::Bool(value) => Value::Bool(*value),
        cbor::Value::Unsigned(number) => Value::Number(Number::from(*number)),
        cbor::Value::Negative(number) => match i64::try_from(*number) {
            Ok(number) => Value::Number(Number::from(-1 - number)),
            // No field of a lexicon holds such a number, and no JSON number of common readers either.
            Err(_) => Value::String(format!("-{}", u128::from(*number) + 1)),
        },
        cbor::Value::Bytes(bytes) => json!({ "$bytes": STANDARD_NO_PAD.encode(bytes) }),
        cbor::Value::Text(text) => Value::String((*text).to_owned()),
        cbor::Value::Link(cid) => json!({ "$link": cid.to_string() }),
        cbor::Value::Array(values) => Value::Array(values.iter().map(as_json).collect()),
        cbor::Value::Map(entries) => {
            let entries = entries.iter();
            let entries = entries.map(|(key, value)| ((*key).to_owned(), as_json(value)));
            Value::Object(entries.collect::<Map<_, _>>())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use atproto_relay::atproto::car;
    use atproto_relay::atproto::cid::Codec;

    #[test]
    fn values_take_the_form_of_the_data_model() {
        let cid = Cid::of(Codec::Raw, b"picture");
        let record = cbor::Value::Map(vec![
            ("bytes", cbor::Value::Bytes(&[0xfb, 0xff])),
            ("link", cbor::Value::Link(cid)),
            (
                "list",
                cbor::Value::Array(vec![cbor::Value::Null, cbor::Value::Bool(true)]),
            ),
            ("most", cbor::Value::Unsigned(u64::MAX)),
            ("least", cbor::Value::Negative(u64::MAX)),
            ("minus", cbor::Value::Negative(4)),
            ("text", cbor::Value::Text("a\u{1b}")),
        ]);
        assert_eq!(
            as_json(&record),
            json!({
                "bytes": { "$bytes": "+/8" },
                "link": { "$link": cid.to_string() },
                "list": [null, true],
                "most": u64::MAX,
                "least": "-18446744073709551616",
                "minus": -5,
                "text": "a\u{1b}",
            })
        );
    }

    #[test]
    fn what_is_no_record_says_why() {
        let block = cbor::Value::Map(vec![("text", cbor::Value::Text("hello"))]).to_vec();
        let cid = Cid::of(Codec::DagCbor, &block);
        let bytes = car::write(&[cid], [(cid, &block[..])]);
        let mut records = Records::of(&bytes);
        assert_eq!(records.get(&cid), Ok(json!({ "text": "hello" })));
        let other = Cid::of(Codec::DagCbor, b"other");
        assert!(records.get(&other).unwrap_err().contains("lacks"));
        records.left = block.len() - 1;
        assert!(records.get(&cid).unwrap_err().contains("too large"));

        let mut spoilt = bytes.clone();
        *spoilt.last_mut().unwrap() ^= 1;
        assert!(Records::of(&spoilt).get(&cid).unwrap_err().contains("hash"));
        for end in 0..bytes.len() {
            assert!(Records::of(&bytes[..end]).get(&cid).is_err(), "{end}");
        }
        // Nested too deeply: the reader says so before anything recurses.
        let deep = [&[0x81; 200][..], &[0xf6]].concat();
        let cid = Cid::of(Codec::DagCbor, &deep);
        let bytes = car::write(&[cid], [(cid, &deep[..])]);
        assert!(
            Records::of(&bytes)
                .get(&cid)
                .unwrap_err()
                .contains("deeper")
        );
    }
}
