//! Why a connection ends, and what is left to do about it.

use super::handover::Record;
use super::stream::Closing;

/// Why most connections end.
pub(super) const LOST: &str = "connection lost";

/// How a connection ends.
pub(super) enum End {
    /// The next process continues it.
    Parked(Record),
    /// The socket broke, or is stuck in the middle of an event: nothing more can be sent.
    Cut(&'static str),
    /// The client closed.
    Closed(Option<u16>),
    /// We close.
    Close(Closing),
}

impl End {
    pub fn reason(&self) -> &'static str {
        match self {
            End::Parked(_) => "left to the next process",
            End::Cut(reason) => reason,
            End::Close(closing) => closing.reason,
            End::Closed(_) => "closed by the consumer",
        }
    }
}
