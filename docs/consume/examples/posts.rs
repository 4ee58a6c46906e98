//! Prints new posts; resumes where it stopped.
//! cargo add ciborium fastrand && cargo add tungstenite --features rustls-tls-webpki-roots
use ciborium::Value;
use std::collections::HashMap;
use std::{env, fs, thread, time::Duration};

type Failure = Box<dyn std::error::Error>;
const CURSOR: &str = "cursor.txt"; // seq of the last event that was handled

fn get<'a>(map: &'a Value, key: &str) -> Option<&'a Value> {
    let found = map.as_map()?.iter().find(|(name, _)| name.as_text() == Some(key));
    found.map(|(_, value)| value)
}

fn varint(bytes: &mut &[u8]) -> Option<usize> {
    let (mut value, mut shift) = (0, 0);
    loop {
        let (byte, rest) = bytes.split_first()?;
        (*bytes, value, shift) = (rest, value | usize::from(byte & 0x7f) << shift, shift + 7);
        if *byte < 0x80 {
            return Some(value);
        }
    }
}

fn car_blocks(mut car: &[u8]) -> Option<HashMap<&[u8], &[u8]>> {
    let mut blocks = HashMap::new();
    let header = varint(&mut car)?;
    car = car.get(header..)?;
    while let Some(length) = varint(&mut car) {
        let (block, rest) = car.split_at_checked(length)?;
        blocks.extend([block.split_at_checked(36)?]);
        car = rest;
    }
    Some(blocks)
}

fn handle(kind: &str, seq: u64, event: &Value) -> Option<()> {
    if kind != "#commit" {
        return None;
    }
    let blocks = car_blocks(get(event, "blocks")?.as_bytes()?)?;
    for op in get(event, "ops")?.as_array()? {
        let path = get(op, "path")?.as_text()?;
        if get(op, "action")?.as_text()? == "create" && path.starts_with("app.bsky.feed.post/") {
            let cid = get(op, "cid")?.as_tag()?.1.as_bytes()?; // behind a 0 byte
            let post: Value = ciborium::from_reader(*blocks.get(&cid[1..])?).ok()?;
            println!("{seq} {} {:?}", get(event, "repo")?.as_text()?, get(&post, "text")?.as_text()?);
        }
    }
    Some(())
}

fn read(relay: &str) -> Result<(), Failure> {
    let mut last: u64 = fs::read_to_string(CURSOR).ok().and_then(|text| text.trim().parse().ok()).unwrap_or(0);
    let query = if last > 0 { format!("?cursor={last}") } else { String::new() };
    let url = format!("{relay}/xrpc/com.atproto.sync.subscribeRepos{query}");
    let (mut socket, _) = tungstenite::connect(url)?;
    loop {
        let message = socket.read()?;
        if !message.is_binary() {
            continue;
        }
        let mut bytes = &message.into_data()[..];
        let (header, event): (Value, Value) = (ciborium::from_reader(&mut bytes)?, ciborium::from_reader(&mut bytes)?);
        let kind = get(&header, "t").and_then(Value::as_text).unwrap_or("");
        let seq = get(&event, "seq").and_then(Value::as_integer).and_then(|seq| seq.try_into().ok());
        match seq {
            None => eprintln!("{event:?}"), // FutureCursor, OutdatedCursor, ConsumerTooSlow
            Some(seq) if seq <= last => {} // the first event is the one of the cursor
            Some(seq) => {
                handle(kind, seq, &event);
                last = seq;
                fs::write(CURSOR, last.to_string())?;
            }
        }
    }
}

fn main() {
    let relay = env::args().nth(1).unwrap_or("wss://relay.example.com".into());
    loop {
        if let Err(failure) = read(&relay) {
            eprintln!("connection lost: {failure}");
        }
        thread::sleep(Duration::from_millis(fastrand::u64(1_000..10_000)));
    }
}
