//! What a binary message of a host is: an event, an info, an error, or something unknown. Checks the canonical form of
//! the frame; what an event says is judged by the pipeline.

use std::ops::Range;

use crate::atproto::frame::{self, FrameError, Kind, Message, Peek};

/// Longest text of a host's info or error that is kept for logs, in characters.
const MAX_TEXT: usize = 200;

/// A message of a host.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Incoming<'a> {
    Event(Event<'a>),
    Info {
        name: String,
        message: String,
    },
    Error {
        error: String,
        message: String,
    },
    /// An `op` or `t` that is not known: to be ignored.
    Unknown,
}

/// What is needed of an event to route it.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Event<'a> {
    pub(super) seq: i64,
    pub(super) seq_span: Range<usize>,
    pub(super) kind: Kind,
    pub(super) did: &'a str,
}

/// Reads a binary message.
///
/// # Errors
/// The frame is not exactly two canonical objects, or lacks what every message of its kind has.
pub(super) fn read_frame(bytes: &[u8]) -> Result<Incoming<'_>, FrameError> {
    match frame::peek(bytes)? {
        Peek::Event(event) => {
            let did = bytes
                .get(event.did_span)
                .and_then(|did| std::str::from_utf8(did).ok())
                .unwrap_or_default();
            Ok(Incoming::Event(Event {
                seq: event.seq,
                seq_span: event.seq_span,
                kind: event.kind,
                did,
            }))
        }
        Peek::Info | Peek::Error => match frame::decode(bytes)?.message {
            Message::Info(info) => Ok(Incoming::Info {
                name: short(info.name),
                message: short(info.message.unwrap_or_default()),
            }),
            Message::Error(error) => Ok(Incoming::Error {
                error: short(error.error),
                message: short(error.message.unwrap_or_default()),
            }),
            _ => Ok(Incoming::Unknown),
        },
        Peek::Unknown => Ok(Incoming::Unknown),
    }
}

fn short(text: &str) -> String {
    text.chars().take(MAX_TEXT).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_are_told_apart() {
        let identity = frame::Identity {
            seq: 7,
            did: "did:plc:abc",
            time: "now",
            handle: None,
        };
        let bytes = frame::encode_identity(&identity);
        let Ok(Incoming::Event(event)) = read_frame(&bytes) else {
            panic!("not an event")
        };
        assert_eq!(
            (event.seq, event.kind, event.did),
            (7, Kind::Identity, "did:plc:abc")
        );
        assert_eq!(bytes[event.seq_span], [7]);
        let long = "x".repeat(1_000);
        for (bytes, expected) in [
            (
                frame::encode_info("OutdatedCursor", None),
                Incoming::Info {
                    name: "OutdatedCursor".into(),
                    message: String::new(),
                },
            ),
            (
                frame::encode_error("FutureCursor", Some(&long)),
                Incoming::Error {
                    error: "FutureCursor".into(),
                    message: "x".repeat(MAX_TEXT),
                },
            ),
        ] {
            assert_eq!(read_frame(&bytes), Ok(expected));
        }
        assert!(read_frame(&[]).is_err_and(|error| error.is_malformed()));
    }
}
