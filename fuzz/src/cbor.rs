//! CBOR: what our reader accepts, in each of its ways, is canonical, and libipld reads the same.

use atproto_relay::atproto::cbor::{self, Reader, Value};
use atproto_relay::devnet::dag;

/// Checks any bytes.
pub fn check(bytes: &[u8]) {
    ask_for_every_type(bytes);
    let skipped = cbor::validate(bytes);
    let value = match Value::parse(bytes) {
        Ok(value) => value,
        Err(error) => {
            assert_eq!(skipped, Err(error), "reading and skipping differ");
            return;
        }
    };
    assert_eq!(skipped, Ok(()), "reading and skipping differ");
    assert_eq!(value.to_vec(), bytes, "what is read is not what is written");
    // Only now, and never before: libipld overflows the stack on nested input.
    let theirs = dag::decode(bytes).expect("libipld reads what is canonical");
    assert_eq!(dag::encode(&theirs), bytes, "libipld writes something else");
}

/// Readers are asked for one type and get another.
fn ask_for_every_type(bytes: &[u8]) {
    let reader = Reader::new(bytes);
    let answers = [
        reader.clone().int().is_ok(),
        reader.clone().bytes().is_ok(),
        reader.clone().text().is_ok(),
        reader.clone().bool().is_ok(),
        reader.clone().link().is_ok(),
        reader.clone().null(),
        reader.clone().map().is_ok(),
        reader.clone().array().is_ok(),
    ];
    let answers = answers.iter().filter(|answer| **answer).count();
    assert!(answers <= 1, "an item of two types");
}
