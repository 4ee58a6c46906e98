//! Restarting without losing a consumer: sockets go into the service's descriptor store when their consumers come, and
//! beside them a table says where each connection stands.
//! Promises that the next process goes on with the next byte, also after kill −9, or that it closes the connection; and
//! that a write costs a few stores to memory more, no system call.
//!
//! Before each write, the slot of a consumer says how many bytes were written to its socket so far and which bytes come
//! next. The kernel knows how many it took in the end, so the difference says which of those are out. Likewise for what the
//! client sends: it is looked at, the slot says what became of it, and only then it is taken from the socket.

mod kernel;
mod table;

use std::collections::HashSet;
use std::io;
use std::mem;
use std::net::TcpStream;
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::slice;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use bytes::{Buf, BytesMut};
use rustix::net::{AddressFamily, RecvFlags, SendFlags, Shutdown, SocketType, ipproto, sockopt};

use super::client_frames::{
    CLOSE, ClientFrames, INBOX_BYTES, MAX_CONTROL_BYTES, SERVICE_RESTART, put_control,
};
use crate::eventlog::{EventLog, Reader, ResumeError, Taken};
use crate::systemd::sockets::{CONSUMERS, Stored, consumer_name};
use crate::systemd::store::DescriptorStore;
use crate::telemetry::metrics;
use kernel::Counts;
use table::{Foreign, MAX_REST_BYTES, NoteRef, OtherTable, Table, TableError};

pub(super) use table::Who;

/// What a slot holds of our own messages beside the parser's state and a pong: more than any of them, and the closing ones
/// are not kept.
const MAX_OWN_BYTES: usize = MAX_REST_BYTES - 3 * (MAX_CONTROL_BYTES + 16);

/// Most consumers that are kept. Systemd passes all their names in one environment variable, which the kernel allows
/// 128 KiB (MAX_ARG_STRLEN).
const MAX_KEPT: usize = 8_000;

/// Where consumers are kept for the next process. Clones share it.
#[derive(Debug, Clone)]
pub(super) struct Keeper {
    table: Arc<Table>,
    store: DescriptorStore,
    /// Slots that are free, the one to be used next last.
    free: Arc<Mutex<Vec<usize>>>,
}

/// A consumer's place with the [`Keeper`], given back when dropped.
#[derive(Debug)]
pub(super) struct Kept {
    keeper: Keeper,
    number: usize,
    cookie: u64,
    /// Systemd has the socket.
    stored: Arc<AtomicBool>,
    /// It stays for the next process.
    parked: bool,
    sent: u64,
    heard: u64,
    /// The position of the last note, its bytes sent and heard.
    noted: Option<(u64, u64, u64, u64)>,
}

/// What is under way on a connection beside events.
#[derive(Debug, Default)]
pub(super) struct Under {
    pub parser: ClientFrames,
    pub pong: Option<Vec<u8>>,
    pub out: BytesMut,
}

/// A consumer of the process before.
#[derive(Debug)]
pub(super) struct Revived {
    pub socket: TcpStream,
    pub who: Who,
    pub kept: Kept,
    pub reader: Reader,
    pub under: Under,
}

/// Why a connection of the process before is not gone on with.
#[derive(Debug, thiserror::Error)]
enum Lost {
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

impl Keeper {
    /// Keeps a connection from here on; `None` where there is no room, or it is of no such kind. What it was sent and what
    /// it said before does not matter.
    pub fn keep(&self, socket: impl AsFd, who: &Who, position: u64, under: &Under) -> Option<Kept> {
        let number = self.free().pop()?;
        match self.begin(number, socket.as_fd(), who, position, under) {
            Ok(kept) => Some(kept),
            Err(error) => {
                tracing::debug!(%error, "a consumer will not outlive this process");
                self.table.free(number);
                self.free().push(number);
                None
            }
        }
    }

    fn begin(
        &self,
        number: usize,
        socket: BorrowedFd<'_>,
        who: &Who,
        position: u64,
        under: &Under,
    ) -> Result<Kept, Lost> {
        check_kind(socket)?;
        let cookie = sockopt::socket_cookie(socket).map_err(io::Error::from)?;
        let Counts { sent, heard, .. } = kernel::counts(socket)?;
        let next = position..position;
        let note = NoteRef {
            sent,
            heard,
            given: 0,
            runs: slice::from_ref(&next),
            rest: &under.rest(),
        };
        self.table.begin(number, cookie, who, note);
        let stored = Arc::<AtomicBool>::default();
        let told = stored.clone();
        self.store
            .put(&consumer_name(number), socket, move |sent| {
                told.store(sent.is_ok(), Ordering::Release);
            })?;
        Ok(Kept {
            keeper: self.clone(),
            number,
            cookie,
            stored,
            parked: false,
            sent,
            heard,
            noted: None,
        })
    }

    /// Waits until systemd knows of all that was kept and given back.
    pub async fn settle(&self) {
        self.store.settle().await;
    }

    fn free(&self) -> std::sync::MutexGuard<'_, Vec<usize>> {
        self.free.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Kept {
    /// Notes what is about to be written, of events `given` bytes into the first one, or of our own messages.
    pub fn note(&mut self, given: usize, runs: &[Range<u64>], rest: &[u8]) {
        let note = NoteRef {
            sent: self.sent,
            heard: self.heard,
            given: given as u64,
            runs,
            rest,
        };
        self.keeper.table.note(self.number, self.cookie, note);
        self.noted = None;
    }

    /// Notes where the connection stands while nothing is about to be written, if that is not what was noted last.
    pub fn stand(&mut self, reader: &Reader, under: &Under) {
        let (position, given) = (reader.position(), reader.given());
        let stand = (position, given as u64, self.sent, self.heard);
        if self.noted == Some(stand) {
            return;
        }
        let begun = u64::from(given > 0);
        let run = position..position + begun;
        self.note(given, slice::from_ref(&run), &under.rest());
        self.noted = Some(stand);
    }

    /// Counts bytes that the socket took.
    pub fn sent(&mut self, bytes: usize) {
        self.sent += bytes as u64;
    }

    /// Counts bytes of the client, before they are taken from the socket.
    pub fn heard(&mut self, bytes: usize) {
        self.heard += bytes as u64;
    }

    /// Whether the next process will be given the socket.
    pub fn is_stored(&self) -> bool {
        self.stored.load(Ordering::Acquire)
    }

    /// Leaves the connection to the next process, which may close it here where it is `between` two frames.
    pub fn park(mut self, between: bool) {
        let sent = between.then_some(self.sent);
        self.keeper.table.set_closable(self.number, sent);
        self.parked = true;
    }
}

impl Drop for Kept {
    fn drop(&mut self) {
        if self.parked {
            return;
        }
        let (number, keeper) = (self.number, &self.keeper);
        keeper.table.free(number);
        // Under the lock: the order for the next one with this name must come behind this one.
        let mut free = keeper.free();
        keeper.store.remove(&consumer_name(number));
        free.push(number);
    }
}

impl Under {
    /// What a slot says of it; nothing where nothing is under way.
    pub fn rest(&self) -> Vec<u8> {
        let mut rest = Vec::new();
        if self.pong.is_none() && self.out.is_empty() && self.parser.is_at_rest() {
            return rest;
        }
        self.parser.put_state(&mut rest);
        match &self.pong {
            None => rest.push(0),
            Some(payload) => {
                rest.push(payload.len() as u8 + 1);
                rest.extend_from_slice(payload);
            }
        }
        debug_assert!(self.out.len() <= MAX_OWN_BYTES);
        rest.extend_from_slice(&self.out);
        rest
    }

    fn from_rest(mut rest: &[u8]) -> Option<Under> {
        if rest.is_empty() {
            return Some(Under::default());
        }
        let parser = ClientFrames::take_state(&mut rest)?;
        let (pong, behind) = rest.split_first()?;
        rest = behind;
        let pong = match usize::from(*pong).checked_sub(1) {
            None => None,
            Some(length) if length <= MAX_CONTROL_BYTES => Some(rest.split_off(..length)?.to_vec()),
            Some(_) => return None,
        };
        Some(Under {
            parser,
            pong,
            out: BytesMut::from(rest),
        })
    }
}

/// Goes on with the consumers of the process before, and begins to keep those of this one: as many as systemd has room
/// for, `wanted` at most. Waits for the disk.
pub(super) fn take_up(
    log: &EventLog,
    store: Option<DescriptorStore>,
    stored: Stored,
    wanted: usize,
) -> (Option<Keeper>, Vec<Revived>) {
    // One is the table's.
    let room = store.as_ref().map_or(0, |store| store.capacity() - 1);
    let room = room.min(MAX_KEPT);
    let slots = room.min(wanted);
    let before = Before::find(stored.table, slots);
    let keeper = store.clone().and_then(|store| before.keeper(store, slots));
    let mut report = Report::default();
    let mut revived = Vec::new();
    let mut unused: Vec<String> = stored.unknown;
    for (number, socket) in stored.consumers {
        match before.revive(log, keeper.as_ref(), number, &socket) {
            Ok(Some(found)) => {
                revived.push(found);
                continue;
            }
            Ok(None) => report.gone += 1,
            Err(lost) => {
                report.closed += 1;
                report.reason.get_or_insert(lost);
            }
        }
        before.dismiss(number, &socket);
        unused.push(consumer_name(number));
    }
    let used: HashSet<String> = (revived.iter())
        .map(|consumer: &Revived| consumer_name(consumer.kept.number))
        .collect();
    if let Some(store) = &store {
        for name in unused.iter().filter(|name| !used.contains(*name)) {
            store.remove(name);
        }
    }
    if let Some(keeper) = &keeper {
        keeper.tidy(&revived, room);
    }
    report.say(revived.len());
    (keeper, revived)
}

/// What became of the consumers of the process before.
#[derive(Default)]
struct Report {
    gone: usize,
    closed: usize,
    reason: Option<Lost>,
}

impl Report {
    fn say(&self, kept: usize) {
        let (gone, closed) = (self.gone, self.closed);
        metrics().consumers_handed_over(true).inc_by(kept as u64);
        metrics().consumers_handed_over(false).inc_by(closed as u64);
        match &self.reason {
            Some(reason) => tracing::warn!(
                kept,
                gone,
                closed,
                "consumers of before the restart were closed: {reason}"
            ),
            None if kept + gone > 0 => {
                tracing::info!(kept, gone, "consumers of before the restart go on");
            }
            None => {}
        }
    }
}

/// The table of the process before.
enum Before {
    None,
    Ours(Arc<Table>),
    Other(OtherTable, Arc<TableError>),
    Unusable(Arc<TableError>),
}

impl Before {
    fn find(file: Option<OwnedFd>, slots: usize) -> Before {
        match file.map(|file| Table::open(file, slots)) {
            None => Before::None,
            Some(Ok(Foreign::Ours(table))) => Before::Ours(Arc::new(table)),
            Some(Ok(Foreign::Other(table, why))) => Before::Other(table, Arc::new(why)),
            Some(Err(why)) => Before::Unusable(Arc::new(why)),
        }
    }

    /// Keeps consumers in the table of before where it can be used, else in a new one.
    fn keeper(&self, store: DescriptorStore, slots: usize) -> Option<Keeper> {
        let table = match self {
            Before::Ours(table) => table.clone(),
            _ if slots == 0 => return None,
            Before::None | Before::Other(..) | Before::Unusable(_) => {
                store.remove(CONSUMERS);
                let made = Table::new(slots).and_then(|table| {
                    store.put(CONSUMERS, table.descriptor(), drop)?;
                    Ok(table)
                });
                match made {
                    Ok(table) => Arc::new(table),
                    Err(error) => {
                        tracing::warn!(%error, "consumers will not outlive this process");
                        return None;
                    }
                }
            }
        };
        Some(Keeper {
            table,
            store,
            free: Arc::default(),
        })
    }

    /// Goes on with a consumer; `None` where it has gone meanwhile.
    fn revive(
        &self,
        log: &EventLog,
        keeper: Option<&Keeper>,
        number: usize,
        socket: &OwnedFd,
    ) -> Result<Option<Revived>, Lost> {
        let table = match self {
            Before::None => return Err(Lost::NoTable),
            Before::Other(_, why) | Before::Unusable(why) => return Err(Lost::Table(why.clone())),
            Before::Ours(table) => table,
        };
        check_kind(socket.as_fd())?;
        let counts = kernel::counts(socket)?;
        if !counts.established {
            return Ok(None);
        }
        let keeper = keeper.ok_or(Lost::NoTable)?;
        let cookie = sockopt::socket_cookie(socket).map_err(io::Error::from)?;
        if table.cookie(number) != cookie {
            return Err(Lost::Slot);
        }
        let (who, note) = table.read(number, cookie).ok_or(Lost::Slot)?;
        let mut under = Under::from_rest(&note.rest).ok_or(Lost::Slot)?;

        // What the client said was settled before it was taken.
        let untaken = note.heard.checked_sub(counts.heard).ok_or(Lost::Count)?;
        discard(socket, untaken)?;
        let bytes = counts.sent.checked_sub(note.sent).ok_or(Lost::Count)?;
        let mut taken = Taken {
            runs: note.runs,
            given: note.given,
            bytes,
        };
        if !under.out.is_empty() {
            let written = usize::try_from(mem::take(&mut taken.bytes)).unwrap_or(usize::MAX);
            if written > under.out.len() {
                return Err(Lost::Count);
            }
            under.out.advance(written);
        }
        let reader = log.resume(&taken)?;
        let socket = TcpStream::from(socket.try_clone()?);
        socket.set_nonblocking(true)?;
        table.set_closable(number, None);
        let mut kept = Kept {
            keeper: keeper.clone(),
            number,
            cookie,
            stored: Arc::new(AtomicBool::new(true)),
            parked: false,
            sent: counts.sent,
            heard: note.heard,
            noted: None,
        };
        kept.stand(&reader, &under);
        Ok(Some(Revived {
            socket,
            who,
            kept,
            reader,
            under,
        }))
    }

    /// Closes a connection that is not gone on with: with a word where the last byte was a frame's last.
    fn dismiss(&self, number: usize, socket: &OwnedFd) {
        let cookie = sockopt::socket_cookie(socket).ok();
        let closable = match self {
            Before::Ours(table) => table.closable(number),
            Before::Other(table, _) => table.closable(number),
            Before::None | Before::Unusable(_) => None,
        };
        let closable = closable.filter(|(of, _)| Some(*of) == cookie);
        let closable = closable.map(|(_, sent)| sent);
        let between = kernel::counts(socket).is_ok_and(|now| Some(now.sent) == closable);
        if between {
            let mut last = Vec::new();
            let reason = [
                &SERVICE_RESTART.to_be_bytes()[..],
                b"the relay was restarted",
            ]
            .concat();
            put_control(&mut last, CLOSE, &reason);
            // A socket that does not take it now is full, and closed all the same.
            let _ = rustix::net::send(socket, &last, SendFlags::DONTWAIT | SendFlags::NOSIGNAL);
        }
        // What was said and not read would make the kernel throw away what we said.
        let mut inbox = [0; INBOX_BYTES];
        while matches!(
            rustix::net::recv(socket, &mut inbox, RecvFlags::DONTWAIT),
            Ok((_, 1..))
        ) {}
        // It may have ended by itself.
        let _ = rustix::net::shutdown(socket, Shutdown::Write);
    }
}

impl Keeper {
    /// Frees the slots that nobody has any more, and notes which may be used: `room` in all.
    fn tidy(&self, revived: &[Revived], room: usize) {
        let mut used = vec![false; self.table.slots()];
        for consumer in revived {
            used[consumer.kept.number] = true;
        }
        let unused = (0..used.len()).filter(|number| !used[*number]);
        let mut free: Vec<usize> = unused
            .inspect(|number| self.table.free(*number))
            .take(room.saturating_sub(revived.len()))
            .collect();
        free.reverse();
        *self.free() = free;
    }
}

/// Fails where it is not a TCP connection.
fn check_kind(socket: BorrowedFd<'_>) -> Result<(), Lost> {
    let is_inet = matches!(
        sockopt::socket_domain(socket),
        Ok(AddressFamily::INET | AddressFamily::INET6)
    );
    let is_tcp = is_inet
        && sockopt::socket_type(socket) == Ok(SocketType::STREAM)
        && sockopt::socket_protocol(socket) == Ok(Some(ipproto::TCP))
        && sockopt::socket_acceptconn(socket) == Ok(false);
    is_tcp.then_some(()).ok_or(Lost::NotTcp)
}

/// Takes bytes from a socket that are settled already.
fn discard(socket: &OwnedFd, bytes: u64) -> Result<(), Lost> {
    let mut left = usize::try_from(bytes).unwrap_or(usize::MAX);
    let mut inbox = [0; INBOX_BYTES];
    if left > inbox.len() {
        return Err(Lost::Count);
    }
    while left > 0 {
        let taken = rustix::net::recv(socket, &mut inbox[..left], RecvFlags::DONTWAIT);
        match taken.map_err(io::Error::from)? {
            (_, 0) => return Err(Lost::Count),
            (_, count) => left -= count,
        }
    }
    Ok(())
}
