//! What a socket needs of a stream: where a subscription begins, what is sent next, and what becomes of client messages.
//! Promises static dispatch, and one write for each offer: a stream hands out bytes that all its consumers share. Knows no
//! encoding, and no connection.

use std::fmt::Debug;
use std::io::{self, IoSlice};
use std::ops::Range;

pub use crate::eventlog::Offer;

/// A stream that consumers subscribe to. Its clones serve the same events.
pub trait Stream: Clone + Send + Sync + 'static {
    /// Its name in messages to clients.
    const NAME: &'static str;
    /// What a subscription asks for.
    type Parameters: Debug + Send + 'static;
    type Source: Source;

    /// Reads the query of a request. Invalid parameters are for [`Stream::open`] to refuse.
    fn parameters(&self, query: Option<&str>) -> Self::Parameters;

    /// Begins a subscription once the connection is a WebSocket. Finding the position may take a read of the disk.
    fn open(
        &self,
        parameters: Self::Parameters,
    ) -> impl Future<Output = Opening<Self::Source>> + Send;
}

/// The beginning of a subscription.
#[derive(Debug)]
pub struct Opening<S> {
    pub source: S,
    /// The message that goes out before the first event, or why there is no subscription.
    pub greeting: Result<Option<Message>, Closing>,
}

/// One consumer's position in a stream, with what its subscription asks for.
pub trait Source: Send + Sync + 'static {
    /// The client messages that [`Source::receive`] takes.
    const ACCEPTED: Accepted = Accepted::NONE;

    /// Sequence number of the next event, or of the event of which only a part was sent.
    fn position(&self) -> u64;

    /// Bytes of the event at [`Source::position`] that were sent; 0 between two events.
    fn offset(&self) -> usize;

    /// Events sent as a whole so far.
    fn events(&self) -> u64;

    /// Offers the next bytes to `write`: whole WebSocket messages, about `max` bytes of them, more only where a single
    /// message (or the rest of it) is longer. With a `max` of 0 that is one message, or its rest. `write` returns how much
    /// the socket took, and does not wait. What the socket took counts as sent.
    ///
    /// # Errors
    /// See [`SourceError`].
    fn offer(
        &mut self,
        max: usize,
        write: impl FnOnce(Batch<'_>) -> io::Result<usize>,
    ) -> Result<Offer, SourceError>;

    /// Reads what comes next from the disk, after [`Offer::Cold`].
    ///
    /// # Errors
    /// See [`SourceError`].
    fn warm(&mut self, max: usize) -> impl Future<Output = Result<(), SourceError>> + Send;

    /// Takes a client message within [`Source::ACCEPTED`]. It holds for the next events: the rest of one that was begun stays
    /// the same.
    ///
    /// # Errors
    /// The connection is to be closed.
    fn receive(&mut self, _message: Message) -> Result<(), Closing> {
        Ok(())
    }

    /// Appends what the next process needs beside the position to continue. Appends nothing for a source that has nothing
    /// but a position. Longer states than a slot of the handover table holds are not handed over.
    fn put_state(&self, _out: &mut Vec<u8>) {}
}

/// Bytes that are offered to a socket at a time.
#[derive(Debug, Clone, Copy)]
pub struct Batch<'a> {
    /// The bytes, in order.
    pub slices: &'a [IoSlice<'a>],
    /// Their events: runs of consecutive sequence numbers, [`Batch::MAX_RUNS`] at most. A part of the first event may have
    /// been sent before.
    pub runs: &'a [Range<u64>],
}

impl Batch<'_> {
    /// Most runs of a batch.
    pub const MAX_RUNS: usize = crate::eventlog::Frames::MAX_RUNS;

    /// How many bytes those are.
    pub fn bytes(&self) -> usize {
        self.slices.iter().map(|slice| slice.len()).sum()
    }
}

/// Why a source has no next bytes.
#[derive(Debug)]
pub enum SourceError {
    /// Its position left the window. The closing tells the client.
    TooSlow(Closing),
    /// An event was withdrawn after a part of it was sent: neither its rest nor anything else can follow.
    Withdrawn,
    /// The events cannot be read.
    Unreadable(io::Error),
}

/// A WebSocket message.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Message {
    Text(String),
    Binary(Vec<u8>),
}

/// Client messages that a stream reads, by their longest payload; 0 where they are skipped unread.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Accepted {
    pub max_text_bytes: usize,
    pub max_binary_bytes: usize,
}

impl Accepted {
    /// All messages are skipped.
    pub const NONE: Accepted = Accepted {
        max_text_bytes: 0,
        max_binary_bytes: 0,
    };

    /// The longest payload of text messages, or else of binary ones.
    pub(super) fn limit(self, is_text: bool) -> usize {
        match is_text {
            true => self.max_text_bytes,
            false => self.max_binary_bytes,
        }
    }
}

impl Default for Accepted {
    fn default() -> Accepted {
        Accepted::NONE
    }
}

/// How a connection is closed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Closing {
    /// Close code (RFC 6455 section 7.4).
    pub code: u16,
    /// Reason in the close frame and in our log.
    pub reason: &'static str,
    /// The message before the close frame.
    pub last: Option<Message>,
}

impl Closing {
    pub fn new(code: u16, reason: &'static str) -> Closing {
        Closing {
            code,
            reason,
            last: None,
        }
    }
}
