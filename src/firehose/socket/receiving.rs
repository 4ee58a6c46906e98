//! What one consumer sends.
//! Promises that client input is recorded for the next process before it is taken from the socket, and that a client that
//! sends too much is read more slowly.

use std::future::poll_fn;
use std::io;
use std::sync::atomic::Ordering;
use std::time::Duration;

use rustix::net::{RecvFlags, recv};
use tokio::io::Interest;
use tokio::time::{Instant, sleep_until};

use super::client_frames::Incoming;
use super::connection::Connection;
use super::end::{End, LOST};
use super::metrics::{Cut, Metrics};
use super::session::Session;
use super::stream::{Closing, Source};
use crate::bucket::Allowance;

/// Bytes read from a client at a time; most clients send nothing but pings.
pub(super) const INBOX_BYTES: usize = 512;
/// How long a client may send at once what it may send in that time.
const INPUT_BURST: Duration = Duration::from_secs(16);

impl<S: Source> Connection<S> {
    /// A client's allowance when it connects.
    pub(super) fn input_allowance(now: Instant) -> Allowance {
        Allowance::new(INPUT_BURST, now)
    }

    /// Waits until the client has sent something and its allowance permits reading it. A client that sends too much is read
    /// more slowly, and TCP carries that back to it.
    pub async fn readable(&self) -> Result<(), End> {
        if let Some(at) = self.input.next(Instant::now()) {
            sleep_until(at).await;
        }
        let readable = poll_fn(|cx| self.socket.poll_read_ready(cx)).await;
        readable.map_err(|_| End::Cut(LOST))
    }

    /// Reads what the client sent, once the socket is readable.
    pub fn read(&mut self, session: &Session) -> Result<(), End> {
        let mut inbox = [0; INBOX_BYTES];
        let read = match self.record.is_kept() {
            false => self.socket.try_read(&mut inbox),
            true => self.peek(&mut inbox),
        };
        match read {
            Ok(0) => Err(End::Cut(LOST)),
            Ok(count) => {
                self.charge(count, session);
                let metrics = &session.server.options.metrics;
                let received = self.receive(&inbox[..count], metrics);
                self.take(&mut inbox[..count])?;
                received
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(()),
            Err(_) => Err(End::Cut(LOST)),
        }
    }

    /// Counts what the client sent: a read costs as much as its bytes do.
    fn charge(&mut self, count: usize, session: &Session) {
        let (amount, now) = (count.max(INBOX_BYTES) as u64, Instant::now());
        let rate = session.server.limits.input.load(Ordering::Relaxed);
        self.input.spend(amount, rate, now);
        if self.input.next(now).is_some() {
            session.server.options.metrics.held_back.inc();
        }
    }

    /// Copies what the client sent and leaves it in the socket.
    fn peek(&self, inbox: &mut [u8]) -> io::Result<usize> {
        self.socket.try_io(Interest::READABLE, || {
            Ok(recv(&self.socket, inbox, RecvFlags::PEEK)?.1)
        })
    }

    /// Takes from the socket what was peeked at, once it is recorded.
    fn take(&mut self, inbox: &mut [u8]) -> Result<(), End> {
        if !self.record.is_kept() {
            return Ok(());
        }
        self.record
            .before_taking(inbox.len(), &self.source, &self.pending);
        let socket = &self.socket;
        let taken = socket.try_io(Interest::READABLE, || {
            Ok(recv(socket, &mut *inbox, RecvFlags::empty())?.1)
        });
        match taken {
            Ok(count) if count == inbox.len() => Ok(()),
            _ => Err(End::Cut(LOST)),
        }
    }

    /// Handles what the client sent.
    pub fn receive(&mut self, bytes: &[u8], metrics: &Metrics) -> Result<(), End> {
        self.deadlines.received();
        let result = self.pending.parser.feed(bytes, &mut self.incoming);
        for incoming in self.incoming.drain(..) {
            match incoming {
                Incoming::Ping(payload) => self.pending.pong = Some(payload),
                Incoming::Pong => {}
                Incoming::Close(code) => return Err(End::Closed(code)),
                Incoming::Message(message) => self.source.receive(message).map_err(End::Close)?,
            }
        }
        result.map_err(|violation| {
            metrics.count_cut(Cut::Protocol);
            tracing::debug!(%violation, "a consumer broke the WebSocket protocol");
            End::Close(Closing::new(violation.close_code(), "protocol error"))
        })
    }
}
