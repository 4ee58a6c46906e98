//! What a binary message of a host is: an event, an info, an error, or something unknown. Checks the canonical form of
//! the frame; what an event says is judged by the pipeline.

use std::ops::Range;

use crate::atproto::frame::{self, FrameError, Kind, Message};

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
/// The frame is not exactly two canonical objects, or its body is not what the header says.
pub(super) fn read_frame(bytes: &[u8]) -> Result<Incoming<'_>, FrameError> {
    let frame = frame::decode(bytes)?;
    let (kind, seq, did) = match &frame.message {
        Message::Commit(commit) => (Kind::Commit, commit.seq, commit.repo),
        Message::Sync(sync) => (Kind::Sync, sync.seq, sync.did),
        Message::Identity(identity) => (Kind::Identity, identity.seq, identity.did),
        Message::Account(account) => (Kind::Account, account.seq, account.did),
        Message::Info(info) => {
            let message = info.message.map(short).unwrap_or_default();
            return Ok(Incoming::Info {
                name: short(info.name),
                message,
            });
        }
        Message::Error(error) => {
            let message = error.message.map(short).unwrap_or_default();
            return Ok(Incoming::Error {
                error: short(error.error),
                message,
            });
        }
        Message::Unknown => return Ok(Incoming::Unknown),
    };
    let seq_span = frame.seq_span.unwrap_or_default();
    Ok(Incoming::Event(Event {
        seq,
        seq_span,
        kind,
        did,
    }))
}

fn short(text: &str) -> String {
    text.chars().take(MAX_TEXT).collect()
}
