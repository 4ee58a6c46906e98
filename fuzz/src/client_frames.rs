//! What consumers send: the pieces in which it comes make no difference, and what was said is no
//! longer than what came.

use atproto_relay::firehose::client_frames::{ClientFrames, Said, Violation};

/// Checks any bytes; the first one gives the size of the pieces.
pub fn check(bytes: &[u8]) {
    let Some((piece, bytes)) = bytes.split_first() else {
        return;
    };
    let whole = feed(bytes, bytes.len());
    assert_eq!(whole, feed(bytes, usize::from(*piece)));
    assert_eq!(whole, feed(bytes, 1));
    let payloads = whole
        .unwrap_or_default()
        .into_iter()
        .map(|said| match said {
            // Six bytes of header at least.
            Said::Ping(payload) => 6 + payload.len(),
            Said::Pong | Said::Close(_) => 6,
        });
    assert!(payloads.sum::<usize>() <= bytes.len());
}

fn feed(bytes: &[u8], piece: usize) -> Result<Vec<Said>, Violation> {
    let mut frames = ClientFrames::default();
    let mut said = Vec::new();
    for piece in bytes.chunks(piece.max(1)) {
        frames.feed(piece, &mut said)?;
    }
    Ok(said)
}
