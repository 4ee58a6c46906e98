//! Restarts that no consumer notices: systemd's descriptor store keeps the sockets of connections from their beginning on,
//! and a table beside them says where each connection stands.
//! Promises that the next process continues with the next byte, also after kill −9, or closes the connection; and that a
//! write costs a few stores to memory more, no system call.
//!
//! Before each write, the connection's slot says how many bytes were written to the socket so far and which bytes come next.
//! The kernel counts the bytes that it took in the end, so the difference says which of those were sent. Likewise for client
//! input: it is peeked at, the slot says what became of it, and only then it is taken from the socket.

mod kernel;
mod pending;
mod predecessor;
mod table;

use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd};
use std::slice;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use parking_lot::Mutex;
use rustix::net::{AddressFamily, SocketType, ipproto, sockopt};

use super::stream::Source;
use crate::eventlog::ResumeError;
use crate::systemd::sockets::consumer_name;
use crate::systemd::store::DescriptorStore;
use kernel::Counts;
use table::{NoteRef, Table, TableError};

pub(super) use pending::PendingControl;
pub(super) use predecessor::take_over;
pub use predecessor::{Resumed, Saved};
pub(super) use table::Subscriber;

/// Where connections are recorded for the next process. Clones share it.
#[derive(Debug, Clone)]
pub(super) struct Handover {
    table: Arc<Table>,
    store: DescriptorStore,
    /// Numbers of free slots, the one to be used next last.
    free: Arc<Mutex<Vec<usize>>>,
}

/// A connection's slot, which is freed when this is dropped.
#[derive(Debug)]
struct Slot {
    handover: Handover,
    number: usize,
    cookie: u64,
    /// Systemd has the socket.
    stored: Arc<AtomicBool>,
    /// The slot stays for the next process.
    parked: bool,
    sent: u64,
    received: u64,
    /// Where the connection stood at the last note between two writes; `None` after any other note.
    idle: Option<Standing>,
}

/// Where a connection stands.
#[derive(Debug, PartialEq, Eq)]
struct Standing {
    position: u64,
    offset: usize,
    sent: u64,
    received: u64,
}

/// The record of a connection for the next process: its slot, or nothing where the connection is not handed over. All that
/// is written to the socket and taken from it is recorded here.
#[derive(Debug, Default)]
pub(super) struct Record(Option<Box<Slot>>);

/// Why a connection is not recorded, or not continued.
#[derive(Debug, thiserror::Error)]
enum Failure {
    #[error("there is no table of consumers")]
    NoTable,
    #[error("the table of consumers cannot be used: {0}")]
    Table(Arc<TableError>),
    #[error("a consumer's slot is not its own, or damaged")]
    Slot,
    #[error("a consumer is no TCP connection")]
    NotTcp,
    #[error("a consumer's bytes do not add up")]
    Count,
    #[error("a consumer's position cannot be found: {0}")]
    Position(#[from] ResumeError),
    #[error("a consumer's socket fails: {0}")]
    Io(#[from] io::Error),
}

impl Handover {
    /// Records a connection from here on. The record is empty where no slot is free, or the socket cannot be handed over.
    /// What was sent and received before does not matter.
    pub fn record(
        &self,
        socket: impl AsFd,
        subscriber: &Subscriber,
        source: &impl Source,
        pending: &PendingControl,
    ) -> Record {
        let number = self.free.lock().pop();
        let Some(number) = number else {
            return Record::default();
        };
        let pending = pending.encode(source);
        match self.begin(
            number,
            socket.as_fd(),
            subscriber,
            source.position(),
            &pending,
        ) {
            Ok(slot) => Record(Some(Box::new(slot))),
            Err(error) => {
                tracing::debug!(%error, "a consumer will not be handed over to the next process");
                self.table.free(number);
                self.free.lock().push(number);
                Record::default()
            }
        }
    }

    fn begin(
        &self,
        number: usize,
        socket: BorrowedFd<'_>,
        subscriber: &Subscriber,
        position: u64,
        pending: &[u8],
    ) -> Result<Slot, Failure> {
        check_kind(socket)?;
        let cookie = sockopt::socket_cookie(socket).map_err(io::Error::from)?;
        let Counts { sent, received, .. } = kernel::counts(socket)?;
        let next = position..position;
        let note = NoteRef {
            sent,
            received,
            offset: 0,
            runs: slice::from_ref(&next),
            pending,
        };
        self.table.begin(number, cookie, subscriber, note);
        let stored = Arc::<AtomicBool>::default();
        let acknowledged = stored.clone();
        self.store
            .put(&consumer_name(number), socket, move |sent| {
                acknowledged.store(sent.is_ok(), Ordering::Release);
            })?;
        Ok(Slot {
            handover: self.clone(),
            number,
            cookie,
            stored,
            parked: false,
            sent,
            received,
            idle: None,
        })
    }

    /// Waits until systemd has all orders of the slots.
    pub async fn settle(&self) {
        self.store.settle().await;
    }
}

impl Record {
    /// Whether the connection is recorded.
    pub fn is_kept(&self) -> bool {
        self.0.is_some()
    }

    /// Whether the next process will be passed the socket.
    pub fn is_stored(&self) -> bool {
        let slot = self.0.as_ref();
        slot.is_some_and(|slot| slot.stored.load(Ordering::Acquire))
    }

    /// Before events are written: the batch's runs, of which `offset` bytes were sent before.
    pub fn before_events(&mut self, offset: usize, runs: &[Range<u64>], pending: &[u8]) {
        debug_assert!(runs.is_sorted_by(|one, next| one.end <= next.start));
        debug_assert!(offset == 0 || runs.first().is_some_and(|run| !run.is_empty()));
        if let Some(slot) = &mut self.0 {
            slot.note(offset, runs, pending);
        }
    }

    /// Before our own frames are written, which is between two events only.
    pub fn before_own_frames(&mut self, position: u64, pending: impl FnOnce() -> Vec<u8>) {
        if let Some(slot) = &mut self.0 {
            slot.note(0, slice::from_ref(&(position..position)), &pending());
        }
    }

    /// Counts bytes that the socket took.
    pub fn sent(&mut self, bytes: usize) {
        if let Some(slot) = &mut self.0 {
            slot.sent += bytes as u64;
        }
    }

    /// Between two writes. Costs nothing where the connection stands as at the last call.
    pub fn between_writes(&mut self, source: &impl Source, pending: &PendingControl) {
        if let Some(slot) = &mut self.0 {
            slot.note_idle(source, pending);
        }
    }

    /// Before bytes of the client are taken from the socket, after they were parsed.
    pub fn before_taking(&mut self, bytes: usize, source: &impl Source, pending: &PendingControl) {
        if let Some(slot) = &mut self.0 {
            slot.received += bytes as u64;
            slot.note_idle(source, pending);
        }
    }

    /// Leaves the connection to the next process, which may close it here where it is `between` two frames.
    pub fn park(self, between: bool) {
        if let Some(mut slot) = self.0 {
            let sent = between.then_some(slot.sent);
            slot.handover.table.set_closable(slot.number, sent);
            slot.parked = true;
        }
    }
}

impl Slot {
    fn note(&mut self, offset: usize, runs: &[Range<u64>], pending: &[u8]) {
        let note = NoteRef {
            sent: self.sent,
            received: self.received,
            offset: offset as u64,
            runs,
            pending,
        };
        self.handover.table.note(self.number, self.cookie, note);
        self.idle = None;
    }

    fn note_idle(&mut self, source: &impl Source, pending: &PendingControl) {
        let (position, offset) = (source.position(), source.offset());
        let standing = Standing {
            position,
            offset,
            sent: self.sent,
            received: self.received,
        };
        if self.idle.as_ref() == Some(&standing) {
            return;
        }
        let begun = u64::from(offset > 0);
        let run = position..position + begun;
        self.note(offset, slice::from_ref(&run), &pending.encode(source));
        self.idle = Some(standing);
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        if self.parked {
            return;
        }
        let (number, handover) = (self.number, &self.handover);
        handover.table.free(number);
        // Under the lock: the next order with this name must follow this one.
        let mut free = handover.free.lock();
        handover.store.remove(&consumer_name(number));
        free.push(number);
    }
}

/// Fails where it is not a TCP connection.
fn check_kind(socket: BorrowedFd<'_>) -> Result<(), Failure> {
    let is_inet = matches!(
        sockopt::socket_domain(socket),
        Ok(AddressFamily::INET | AddressFamily::INET6)
    );
    let is_tcp = is_inet
        && sockopt::socket_type(socket) == Ok(SocketType::STREAM)
        && sockopt::socket_protocol(socket) == Ok(Some(ipproto::TCP))
        && sockopt::socket_acceptconn(socket) == Ok(false);
    is_tcp.then_some(()).ok_or(Failure::NotTcp)
}
