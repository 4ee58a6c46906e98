//! Follows the event log from a position: its events in order, once, in bounded batches, as far as the log goes and
//! beyond. Between two reads a follower holds a position and nothing else: no frame and no file, however slow its view is.

use std::io;

use bytes::Bytes;
use tokio::task;

use crate::atproto::frame::{self, Message};
use crate::eventlog::{Entry, EventLog, ReadError};

/// Most events of a batch.
pub const MAX_EVENTS: usize = 1_000;
/// A batch ends with the frame that brings it to so many bytes. No frame of the log is longer than
/// [`frame::MAX_STORED_FRAME_BYTES`].
pub const MAX_BYTES: usize = 8 << 20;

/// A position in the log that moves with what is read.
#[derive(Debug)]
pub struct Follower {
    log: EventLog,
    position: u64,
}

/// What a follower reads.
#[derive(Debug)]
pub enum Step {
    /// Events.
    Events(Batch),
    /// The log no longer has the next events. The next step begins behind the gap.
    FellOut(FellOut),
}

/// Events that retention removed before a follower read them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FellOut {
    /// The first event that is missing.
    pub from: u64,
    /// The oldest event that the log has.
    pub oldest: u64,
}

/// Events that follow each other in the log. One whose index entry is damaged is left out.
#[derive(Debug)]
pub struct Batch {
    logged: Vec<(Entry, Bytes)>,
    next: u64,
}

/// An event of the log.
#[derive(Debug, Clone)]
pub struct Event<'a> {
    /// What the log knows of it.
    pub entry: Entry,
    /// Its decoded frame. `None` where its frame was redacted or lost.
    pub message: Option<Message<'a>>,
}

impl Batch {
    /// The position behind its last event.
    pub fn next(&self) -> u64 {
        self.next
    }

    /// Decodes its events.
    pub fn events(&self) -> Vec<Event<'_>> {
        let logged = self.logged.iter();
        logged
            .map(|(entry, frame)| Event {
                entry: *entry,
                message: message(frame),
            })
            .collect()
    }
}

fn message(frame: &Bytes) -> Option<Message<'_>> {
    if frame.is_empty() {
        return None;
    }
    frame::decode_stored(frame).ok().map(|frame| frame.message)
}

impl Follower {
    /// A follower whose next event is `position`.
    pub fn new(log: EventLog, position: u64) -> Follower {
        Follower {
            log,
            position: position.max(1),
        }
    }

    /// The next event.
    pub fn position(&self) -> u64 {
        self.position
    }

    /// The next events that the log has; `None` at its head.
    ///
    /// # Errors
    /// The log cannot be read. The position stays.
    pub async fn read(&mut self) -> Result<Option<Step>, ReadError> {
        let (log, from) = (self.log.clone(), self.position);
        let step = match task::spawn_blocking(move || read(&log, from)).await {
            Ok(step) => step?,
            Err(failure) => return Err(broken(from, failure)),
        };
        self.position = match &step {
            Some(Step::Events(batch)) => batch.next,
            Some(Step::FellOut(gap)) => gap.oldest,
            None => from,
        };
        debug_assert!(self.position >= from, "a follower does not go back");
        Ok(step)
    }

    /// The next events, as soon as the log has some.
    ///
    /// # Errors
    /// The log cannot be read. The position stays.
    pub async fn next(&mut self) -> Result<Step, ReadError> {
        let mut head = self.log.subscribe();
        loop {
            if let Some(step) = self.read().await? {
                return Ok(step);
            }
            let position = self.position;
            let more = head.wait_for(|head| *head >= position).await;
            more.map_err(|closed| broken(position, closed))?;
        }
    }
}

fn broken(seq: u64, cause: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> ReadError {
    let source = io::Error::other(cause);
    ReadError::Io { seq, source }
}

fn read(log: &EventLog, from: u64) -> Result<Option<Step>, ReadError> {
    let mut entries = log.entries(from).and_redacted();
    if entries.position() > from {
        let oldest = entries.position();
        return Ok(Some(Step::FellOut(FellOut { from, oldest })));
    }
    let (mut logged, mut bytes) = (Vec::new(), 0);
    let mut next = from;
    while logged.len() < MAX_EVENTS && bytes < MAX_BYTES {
        match entries.next() {
            Some(Ok((entry, frame))) => {
                debug_assert!(entry.seq >= next, "events come in order");
                bytes += frame.len();
                logged.push((entry, frame));
            }
            // Removed just now: the next look finds the gap.
            Some(Err(ReadError::TooSlow { .. })) if logged.is_empty() => return read(log, from),
            Some(Err(error)) if logged.is_empty() => return Err(error),
            // What was read before stands; the next read meets the obstacle.
            Some(Err(_)) => return Ok(Some(Step::Events(Batch { logged, next }))),
            None => {
                next = entries.position();
                break;
            }
        }
        next = entries.position();
    }
    Ok((next > from).then_some(Step::Events(Batch { logged, next })))
}
