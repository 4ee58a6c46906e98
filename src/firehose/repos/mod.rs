//! `com.atproto.sync.subscribeRepos`: the log's frames as they lie, without decoding them.
//! Promises that all consumers share the bytes that are read from the log. Client messages are skipped unread.

use std::io;

mod cursor;

use super::socket::close_codes::POLICY;
use super::socket::stream::{Batch, Closing, Message, Offer, Opening, Source, SourceError, Stream};
use crate::atproto::frame::{encode_error, encode_info};
use crate::eventlog::{EventLog, LastOffer, ReadError, Reader, ResumeError};
use cursor::{Cursor, Start};

/// The stream of a log. Clones share it.
#[derive(Debug, Clone)]
pub struct Repos {
    log: EventLog,
}

/// A consumer's position in the log.
#[derive(Debug)]
pub struct RawEvents(Reader);

impl Repos {
    /// The stream of `log`.
    pub fn new(log: EventLog) -> Repos {
        Repos { log }
    }

    /// The position of a consumer of the previous process. Waits for the disk.
    ///
    /// # Errors
    /// See [`EventLog::resume`].
    pub fn resume(&self, offered: &LastOffer) -> Result<RawEvents, ResumeError> {
        self.log.resume(offered).map(RawEvents)
    }

    fn begin(&self, start: Start) -> Opening<RawEvents> {
        let head = self.log.head();
        let (first, greeting) = match start {
            Start::At(seq) => (seq, Ok(None)),
            Start::Outdated(oldest) => {
                let message = "the cursor is older than the window, starting at the oldest event";
                let info = encode_info("OutdatedCursor", Some(message));
                (oldest, Ok(Some(Message::Binary(info))))
            }
            Start::Future => {
                let message = format!("the cursor is above the last event, {head}");
                (head + 1, Err(refusal("FutureCursor", &message)))
            }
            Start::Invalid => {
                let message = "cursor must be a whole number";
                (head + 1, Err(refusal("InvalidRequest", message)))
            }
        };
        let source = RawEvents(self.log.reader(first));
        Opening { source, greeting }
    }
}

impl Stream for Repos {
    const NAME: &'static str = "subscribeRepos";
    type Parameters = Cursor;
    type Source = RawEvents;

    fn parameters(&self, query: Option<&str>) -> Cursor {
        Cursor::from_query(query)
    }

    async fn open(&self, cursor: Cursor) -> Opening<RawEvents> {
        let (oldest, head) = self.log.window();
        self.begin(cursor.start(oldest, head))
    }
}

impl Source for RawEvents {
    fn position(&self) -> u64 {
        self.0.position()
    }

    fn offset(&self) -> usize {
        self.0.given()
    }

    fn events(&self) -> u64 {
        self.0.events()
    }

    fn offer(
        &mut self,
        max: usize,
        write: impl FnOnce(Batch<'_>) -> io::Result<usize>,
    ) -> Result<Offer, SourceError> {
        let offered = self.0.offer(max, |frames| {
            write(Batch {
                slices: frames.slices(),
                runs: frames.runs(),
            })
        });
        offered.map_err(failure)
    }

    async fn warm(&mut self, max: usize) -> Result<(), SourceError> {
        self.0.warm(max).await.map_err(failure)
    }
}

/// An error frame, and a close with its name.
fn refusal(name: &'static str, message: &str) -> Closing {
    Closing {
        code: POLICY,
        reason: name,
        last: Some(Message::Binary(encode_error(name, Some(message)))),
    }
}

fn failure(error: ReadError) -> SourceError {
    match error {
        ReadError::TooSlow { .. } => {
            SourceError::TooSlow(refusal("ConsumerTooSlow", &error.to_string()))
        }
        ReadError::Redacted { .. } => SourceError::Withdrawn,
        ReadError::Io { .. } => SourceError::Unreadable(io::Error::other(error)),
    }
}
