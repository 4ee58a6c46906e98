//! What consumers send: the pieces in which it comes make no difference, and what is reported is no longer than what came.

use atproto_relay::firehose::socket::client_frames::{ClientFrames, Incoming, Violation};
use atproto_relay::firehose::socket::stream::{Accepted, Message};

/// A stream that reads messages of both kinds.
const MESSAGES: Accepted = Accepted {
    max_text_bytes: 100,
    max_binary_bytes: 1_000,
};

/// Checks any bytes; the first one gives the size of the pieces.
pub fn check(bytes: &[u8]) {
    let Some((piece, bytes)) = bytes.split_first() else {
        return;
    };
    for accepted in [Accepted::NONE, MESSAGES] {
        let whole = feed(accepted, bytes, bytes.len());
        assert_eq!(whole, feed(accepted, bytes, usize::from(*piece)));
        assert_eq!(whole, feed(accepted, bytes, 1));
        let payloads = whole.unwrap_or_default();
        // Six bytes of header at least.
        let payloads = payloads.iter().map(|incoming| 6 + length(incoming));
        assert!(payloads.sum::<usize>() <= bytes.len());
    }
}

fn length(incoming: &Incoming) -> usize {
    match incoming {
        Incoming::Ping(payload) => payload.len(),
        Incoming::Pong | Incoming::Close(_) => 0,
        Incoming::Message(Message::Text(text)) => text.len(),
        Incoming::Message(Message::Binary(bytes)) => bytes.len(),
    }
}

fn feed(accepted: Accepted, bytes: &[u8], piece: usize) -> Result<Vec<Incoming>, Violation> {
    let mut frames = ClientFrames::new(accepted);
    let mut incoming = Vec::new();
    for piece in bytes.chunks(piece.max(1)) {
        frames.feed(piece, &mut incoming)?;
    }
    Ok(incoming)
}
