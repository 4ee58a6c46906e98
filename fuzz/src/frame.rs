//! Frames: reading and peeking agree, a new `seq` changes nothing else, edits change what they say, and
//! what we write reads back.

use atproto_relay::atproto::cbor::{Reader, Value};
use atproto_relay::atproto::frame::{self, Frame, Kind, Message, Peek};

/// Sequence numbers of every encoded length.
const SEQS: [u64; 6] = [0, 23, 24, 1 << 8, 1 << 16, 1 << 32];

/// Checks any bytes.
pub fn check(bytes: &[u8]) {
    let decoded = frame::decode(bytes);
    let peeked = frame::peek(bytes);
    let edited = frame::without_handle(bytes);
    let status = frame::with_account_status(bytes, false, Some("takendown"));
    match &decoded {
        Err(error) => {
            let malformed = peeked.as_ref().is_err_and(|error| error.is_malformed());
            assert_eq!(error.is_malformed(), malformed, "{error}");
        }
        Ok(frame) => {
            agree(
                bytes,
                frame,
                peeked.expect("a frame that decodes can be peeked at"),
            );
            write_again(&frame.message);
            // The body of what we do not know may be no map.
            let editable = edited.is_ok() && status.is_ok();
            assert!(editable || frame.message == Message::Unknown);
        }
    }
    for edited in [edited, status].into_iter().flatten() {
        assert!(
            two_values(&edited).is_some(),
            "an edit is no frame any more"
        );
        let again = frame::decode(&edited).map_err(|error| error.is_malformed());
        assert_ne!(again, Err(true));
    }
}

fn agree(bytes: &[u8], frame: &Frame<'_>, peeked: Peek) {
    let (kind, did, seq) = match &frame.message {
        Message::Commit(commit) => (Kind::Commit, commit.repo, commit.seq),
        Message::Sync(sync) => (Kind::Sync, sync.did, sync.seq),
        Message::Identity(identity) => (Kind::Identity, identity.did, identity.seq),
        Message::Account(account) => (Kind::Account, account.did, account.seq),
        Message::Info(_) => return assert_eq!(peeked, Peek::Info),
        Message::Error(_) => return assert_eq!(peeked, Peek::Error),
        Message::Unknown => return assert_eq!(peeked, Peek::Unknown),
    };
    let Peek::Event(event) = peeked else {
        panic!("an event that peeks as something else");
    };
    assert_eq!((event.kind, event.seq), (kind, seq));
    assert_eq!(&bytes[event.did_span.clone()], did.as_bytes());
    assert_eq!(Some(&event.seq_span), frame.seq_span.as_ref());
    for seq in SEQS {
        let mut spliced = Vec::new();
        frame::splice_seq(bytes, event.seq_span.clone(), seq, &mut spliced);
        let (head, body) = two_values(&spliced).expect("a spliced frame is canonical");
        assert_eq!(body.get("seq"), Some(&Value::Unsigned(seq)));
        // All else stays: the first seq put back gives the first bytes.
        let Ok(Peek::Event(again)) = frame::peek(&spliced) else {
            panic!("a spliced frame is an event");
        };
        let mut back = spliced[..again.seq_span.start].to_vec();
        back.extend_from_slice(&bytes[event.seq_span.clone()]);
        back.extend_from_slice(&spliced[again.seq_span.end..]);
        assert_eq!(back, bytes, "{head:?}");
    }
}

fn write_again(message: &Message<'_>) {
    let written = match message {
        Message::Commit(commit) => frame::encode_commit(commit),
        Message::Sync(sync) => frame::encode_sync(sync),
        Message::Identity(identity) => frame::encode_identity(identity),
        Message::Account(account) => frame::encode_account(account),
        Message::Info(info) => frame::encode_info(info.name, info.message),
        Message::Error(error) => frame::encode_error(error.error, error.message),
        Message::Unknown => return,
    };
    let read = frame::decode(&written).expect("what we write can be read");
    assert_eq!(&read.message, message);
}

/// Header and body, where the bytes are two canonical values.
fn two_values(bytes: &[u8]) -> Option<(Value<'_>, Value<'_>)> {
    let mut reader = Reader::new(bytes);
    let values = (reader.value().ok()?, reader.value().ok()?);
    reader.finish().ok().map(|()| values)
}
