//! What is sent to one consumer.
//! Promises whole frames in order and control frames only between them. Between two writes it holds a position, not bytes.

use std::io;

use bytes::{Buf, BytesMut};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use tokio::io::Interest;
use tokio::net::TcpStream;
use tokio::time::Instant;

use super::client_frames::Incoming;
use super::deadlines::Deadlines;
use super::end::{End, LOST};
use super::handover::{PendingControl, Record};
use super::server_frames::{PING, PONG, put_control};
use super::session::Session;
use super::stream::{Offer, Source, SourceError};
use crate::bucket::Allowance;

/// Bytes offered to a socket at a time: less to those that took less the last time.
const MIN_WRITE_BYTES: usize = 64 << 10;
const MAX_WRITE_BYTES: usize = 256 << 10;
/// Bytes written before others have their turn.
const TURN_BYTES: usize = 2 << 20;

/// What is to be sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Wanted {
    Everything,
    /// No further event, only the rest of what was begun and our own frames.
    LastFrames,
}

/// How far sending came.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Pushed {
    Everything,
    /// The socket takes no more for now.
    Full,
    /// There is more, but it is the turn of others.
    YieldTurn,
}

/// A consumer's connection and what is pending on it.
pub(super) struct Connection<S> {
    pub socket: TcpStream,
    pub source: S,
    pub pending: PendingControl,
    /// Follows the connection for the next process.
    pub record: Record,
    pub deadlines: Deadlines,
    pub ping_due: bool,
    /// Frames of the client that were parsed last, kept for their memory.
    pub(super) incoming: Vec<Incoming>,
    /// What the client may send.
    pub(super) input: Allowance,
    /// Bytes to offer next.
    write_bytes: usize,
}

impl<S: Source> Connection<S> {
    pub fn new(socket: TcpStream, source: S) -> Connection<S> {
        let now = Instant::now();
        Connection {
            socket,
            source,
            pending: PendingControl::new(S::ACCEPTED),
            record: Record::default(),
            deadlines: Deadlines::new(now),
            ping_due: false,
            incoming: Vec::new(),
            input: Self::input_allowance(now),
            write_bytes: MIN_WRITE_BYTES,
        }
    }

    /// A connection of the previous process.
    pub fn resume(
        socket: TcpStream,
        source: S,
        pending: PendingControl,
        record: Record,
    ) -> Connection<S> {
        Connection {
            pending,
            record,
            ..Connection::new(socket, source)
        }
    }

    /// Whether only a part of an event was sent.
    pub fn is_inside_event(&self) -> bool {
        self.source.offset() > 0
    }

    /// Sends until the socket is full, nothing is left, or it is the turn of others.
    pub async fn push(&mut self, session: &Session, wanted: Wanted) -> Result<Pushed, End> {
        let (events, position) = (self.source.events(), self.source.position());
        let mut bytes = 0;
        let pushed = loop {
            let before = bytes;
            match self
                .write(wanted)
                .map_err(|error| session.source_failed(error))?
            {
                Offer::Taken(0) => return Err(End::Cut(LOST)),
                Offer::Taken(count) => bytes += count,
                Offer::Refused(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    self.deadlines.wait();
                    break Pushed::Full;
                }
                Offer::Refused(_) => return Err(End::Cut(LOST)),
                Offer::Nothing => break Pushed::Everything,
                Offer::Cold => {
                    let warmed = self.source.warm(self.write_bytes).await;
                    warmed.map_err(|error| session.source_failed(error))?;
                }
            }
            if bytes > before {
                self.deadlines.set_full(false);
                if bytes >= TURN_BYTES {
                    break Pushed::YieldTurn;
                }
            }
        };
        debug_assert!(self.source.position() >= position, "a source goes forward");
        self.deadlines.set_full(pushed == Pushed::Full);
        if bytes > 0 {
            let events = self.source.events() - events;
            self.deadlines.wrote(Instant::now(), events);
            session.registration.sent(events, bytes as u64);
        }
        session.registration.set_position(self.source.position());
        self.record.between_writes(&self.source, &self.pending);
        Ok(pushed)
    }

    /// Writes once: our own frames between whole events, otherwise events.
    fn write(&mut self, wanted: Wanted) -> Result<Offer, SourceError> {
        let inside = self.is_inside_event();
        if !inside {
            if self.pending.out.is_empty() {
                self.put_controls();
            }
            if !self.pending.out.is_empty() {
                return Ok(self.write_own());
            }
            if wanted == Wanted::LastFrames {
                return Ok(Offer::Nothing);
            }
        }
        let waiting = self.pending.pong.is_some() || self.ping_due;
        let max = match wanted {
            Wanted::Everything if !waiting => self.write_bytes,
            // The rest of the event.
            _ => 0,
        };
        // Asked first: frames that are read in vain are the largest cost of serving many consumers that are far apart.
        if let Err(error) = has_room(&self.socket) {
            return Ok(Offer::Refused(error));
        }
        self.write_events(max)
    }

    fn write_events(&mut self, max: usize) -> Result<Offer, SourceError> {
        let (mut offered, offset) = (0, self.source.offset());
        let (socket, record, pending) = (&self.socket, &mut self.record, &self.pending);
        // The closure cannot read the source while it offers.
        let pending = match record.is_kept() {
            true => pending.encode(&self.source),
            false => Vec::new(),
        };
        let offer = self.source.offer(max, |batch| {
            offered = batch.bytes();
            record.before_events(offset, batch.runs, &pending);
            socket.try_write_vectored(batch.slices)
        })?;
        if let Offer::Taken(taken) = offer {
            debug_assert!(taken <= offered, "{taken} of {offered} bytes");
            self.record.sent(taken);
            if taken < offered {
                self.write_bytes = taken.next_power_of_two();
            } else if taken >= self.write_bytes {
                self.write_bytes *= 2;
            }
            self.write_bytes = self.write_bytes.clamp(MIN_WRITE_BYTES, MAX_WRITE_BYTES);
        }
        Ok(offer)
    }

    /// Begins the control frames that are due. Only one of each waits, however many pings a client sends that does not
    /// read.
    fn put_controls(&mut self) {
        if let Some(payload) = self.pending.pong.take() {
            put_control(&mut self.pending.out, PONG, &payload);
        }
        if std::mem::take(&mut self.ping_due) {
            put_control(&mut self.pending.out, PING, b"");
        }
    }

    fn write_own(&mut self) -> Offer {
        let (source, pending) = (&self.source, &self.pending);
        self.record
            .before_own_frames(source.position(), || pending.encode(source));
        match self.socket.try_write(&self.pending.out) {
            Ok(count) => {
                self.record.sent(count);
                self.pending.out.advance(count);
                if self.pending.out.is_empty() {
                    self.pending.out = BytesMut::new();
                }
                Offer::Taken(count)
            }
            Err(error) => Offer::Refused(error),
        }
    }
}

/// Fails with `WouldBlock` where the socket takes nothing now; its readiness is then awaited anew.
fn has_room(socket: &TcpStream) -> io::Result<()> {
    socket.try_io(Interest::WRITABLE, || {
        let mut asked = [PollFd::new(socket, PollFlags::OUT)];
        match poll(&mut asked, Some(&Timespec::default()))? {
            0 => Err(io::ErrorKind::WouldBlock.into()),
            _ => Ok(()),
        }
    })
}
