//! The connections of the previous process: each is continued at the next byte, or closed.
//! Promises that nothing of a connection that cannot be continued stays in the descriptor store.

use std::collections::HashSet;
use std::io;
use std::net::TcpStream;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use rustix::net::{RecvFlags, SendFlags, Shutdown, sockopt};

use super::kernel;
use super::pending::PendingControl;
use super::table::{Found, OtherTable, Subscriber, Table, TableError};
use super::{Failure, Handover, Record, Slot, check_kind};
use crate::eventlog::{LastOffer, ResumeError};
use crate::firehose::socket::INBOX_BYTES;
use crate::firehose::socket::close_codes::SERVICE_RESTART;
use crate::firehose::socket::server_frames::put_close;
use crate::firehose::socket::stream::Source;
use crate::systemd::sockets::{CONSUMERS, Stored, consumer_name};
use crate::systemd::store::DescriptorStore;

/// Most connections that are handed over. Systemd passes all their names in one environment variable, which the kernel
/// limits to 128 KiB (MAX_ARG_STRLEN).
const MAX_KEPT: usize = 8_000;

/// What a stream needs to continue a subscription of the previous process.
#[derive(Debug)]
pub struct Saved<'a> {
    /// What [`Source::put_state`] wrote.
    pub state: &'a [u8],
    /// What was offered last, and how much of it was sent.
    pub offered: &'a LastOffer,
}

/// A connection of the previous process.
#[derive(Debug)]
pub struct Resumed<S> {
    pub(in super::super) socket: TcpStream,
    pub(in super::super) subscriber: Subscriber,
    pub(in super::super) record: Record,
    pub(in super::super) source: S,
    pub(in super::super) pending: PendingControl,
}

/// Continues the connections of the previous process, and begins to record those of this one: as many as systemd has room
/// for, `wanted` at most. `resume` finds the position of each. Waits for the disk.
pub(in super::super) fn take_over<S: Source>(
    store: Option<DescriptorStore>,
    stored: Stored,
    wanted: usize,
    resume: impl Fn(Saved<'_>) -> Result<S, ResumeError>,
) -> (Option<Handover>, Vec<Resumed<S>>, usize) {
    // One is the table's.
    let room = store.as_ref().map_or(0, |store| store.capacity() - 1);
    let room = room.min(MAX_KEPT);
    let slots = room.min(wanted);
    let predecessor = Predecessor::find(stored.table, slots);
    let handover = store
        .clone()
        .and_then(|store| predecessor.handover(store, slots));
    let mut report = Report::default();
    let (mut resumed, mut used) = (Vec::new(), HashSet::new());
    let mut unused: Vec<String> = stored.unknown;
    for (number, socket) in stored.consumers {
        match predecessor.resume(handover.as_ref(), number, &socket, &resume) {
            Ok(Some(connection)) => {
                used.insert(number);
                resumed.push(connection);
                continue;
            }
            Ok(None) => report.gone += 1,
            Err(failure) => {
                report.closed += 1;
                report.reason.get_or_insert(failure);
            }
        }
        predecessor.close(number, &socket);
        unused.push(consumer_name(number));
    }
    if let Some(store) = &store {
        let names: HashSet<String> = used.iter().copied().map(consumer_name).collect();
        for name in unused.iter().filter(|name| !names.contains(*name)) {
            store.remove(name);
        }
    }
    if let Some(handover) = &handover {
        handover.free_unused(&used, room);
    }
    report.log(resumed.len());
    (handover, resumed, report.closed)
}

/// What became of the connections of the previous process.
#[derive(Default)]
struct Report {
    /// Ended by their clients meanwhile.
    gone: usize,
    closed: usize,
    /// Why the first one was closed.
    reason: Option<Failure>,
}

impl Report {
    fn log(&self, kept: usize) {
        let (gone, closed) = (self.gone, self.closed);
        match &self.reason {
            Some(reason) => tracing::warn!(
                kept,
                gone,
                closed,
                "consumers of the previous process were closed: {reason}"
            ),
            None if kept + gone > 0 => {
                tracing::info!(kept, gone, "consumers of the previous process continue");
            }
            None => {}
        }
    }
}

/// The table of the previous process.
enum Predecessor {
    None,
    Same(Arc<Table>),
    Other(OtherTable, Arc<TableError>),
    Unusable(Arc<TableError>),
}

impl Predecessor {
    fn find(file: Option<OwnedFd>, slots: usize) -> Predecessor {
        match file.map(|file| Table::open(file, slots)) {
            None => Predecessor::None,
            Some(Ok(Found::Same(table))) => Predecessor::Same(Arc::new(table)),
            Some(Ok(Found::Other(table, why))) => Predecessor::Other(table, Arc::new(why)),
            Some(Err(why)) => Predecessor::Unusable(Arc::new(why)),
        }
    }

    /// Records connections in the previous process's table where it can be used, otherwise in a new one.
    fn handover(&self, store: DescriptorStore, slots: usize) -> Option<Handover> {
        let table = match self {
            Predecessor::Same(table) => table.clone(),
            _ if slots == 0 => return None,
            Predecessor::None | Predecessor::Other(..) | Predecessor::Unusable(_) => {
                store.remove(CONSUMERS);
                let made = Table::new(slots).and_then(|table| {
                    store.put(CONSUMERS, table.descriptor(), drop)?;
                    Ok(table)
                });
                match made {
                    Ok(table) => Arc::new(table),
                    Err(error) => {
                        tracing::warn!(%error, "consumers will not be handed over to the next process");
                        return None;
                    }
                }
            }
        };
        Some(Handover {
            table,
            store,
            free: Arc::default(),
        })
    }

    /// Continues a connection; `None` where its client ended it meanwhile.
    fn resume<S: Source>(
        &self,
        handover: Option<&Handover>,
        number: usize,
        socket: &OwnedFd,
        resume: impl Fn(Saved<'_>) -> Result<S, ResumeError>,
    ) -> Result<Option<Resumed<S>>, Failure> {
        let table = match self {
            Predecessor::None => return Err(Failure::NoTable),
            Predecessor::Other(_, why) | Predecessor::Unusable(why) => {
                return Err(Failure::Table(why.clone()));
            }
            Predecessor::Same(table) => table,
        };
        check_kind(socket.as_fd())?;
        let counts = kernel::counts(socket)?;
        if !counts.established {
            return Ok(None);
        }
        let handover = handover.ok_or(Failure::NoTable)?;
        let cookie = sockopt::socket_cookie(socket).map_err(io::Error::from)?;
        if table.cookie(number) != cookie {
            return Err(Failure::Slot);
        }
        let (subscriber, note) = table.read(number, cookie).ok_or(Failure::Slot)?;
        let decoded = PendingControl::decode(&note.pending, S::ACCEPTED);
        let (mut pending, state) = decoded.ok_or(Failure::Slot)?;

        // Client input is recorded before it is taken.
        let untaken = note.received.checked_sub(counts.received);
        discard(socket, untaken.ok_or(Failure::Count)?)?;
        let sent = counts.sent.checked_sub(note.sent).ok_or(Failure::Count)?;
        let offered = LastOffer {
            runs: note.runs,
            offset: note.offset,
            taken: pending.advance(sent).ok_or(Failure::Count)?,
        };
        let saved = Saved {
            state,
            offered: &offered,
        };
        let source = resume(saved)?;
        let socket = TcpStream::from(socket.try_clone()?);
        socket.set_nonblocking(true)?;
        table.set_closable(number, None);
        let mut record = Record(Some(Box::new(Slot {
            handover: handover.clone(),
            number,
            cookie,
            stored: Arc::new(AtomicBool::new(true)),
            parked: false,
            sent: counts.sent,
            received: note.received,
            idle: None,
        })));
        record.between_writes(&source, &pending);
        Ok(Some(Resumed {
            socket,
            subscriber,
            record,
            source,
            pending,
        }))
    }

    /// Closes a connection that is not continued, with a close frame where the last byte sent was the last of a frame.
    fn close(&self, number: usize, socket: &OwnedFd) {
        let cookie = sockopt::socket_cookie(socket).ok();
        let closable = match self {
            Predecessor::Same(table) => table.closable(number),
            Predecessor::Other(table, _) => table.closable(number),
            Predecessor::None | Predecessor::Unusable(_) => None,
        };
        let closable = closable.filter(|(of, _)| Some(*of) == cookie);
        let closable = closable.map(|(_, sent)| sent);
        let between = kernel::counts(socket).is_ok_and(|now| Some(now.sent) == closable);
        if between {
            let mut last = Vec::new();
            put_close(&mut last, SERVICE_RESTART, "the relay was restarted");
            // A socket that does not take it now is full, and is closed without it.
            let _ = rustix::net::send(socket, &last, SendFlags::DONTWAIT | SendFlags::NOSIGNAL);
        }
        // Unread input would make the kernel discard what we sent.
        let mut inbox = [0; INBOX_BYTES];
        while matches!(
            rustix::net::recv(socket, &mut inbox, RecvFlags::DONTWAIT),
            Ok((_, 1..))
        ) {}
        // The connection may have ended by itself.
        let _ = rustix::net::shutdown(socket, Shutdown::Write);
    }
}

impl Handover {
    /// Frees the slots of connections that were not continued, and keeps as many for use as systemd has room for.
    fn free_unused(&self, used: &HashSet<usize>, room: usize) {
        let unused = (0..self.table.slots()).filter(|number| !used.contains(number));
        let mut free: Vec<usize> = unused
            .inspect(|number| self.table.free(*number))
            .take(room.saturating_sub(used.len()))
            .collect();
        free.reverse();
        *self.free.lock() = free;
    }
}

/// Takes bytes from a socket that were handled already.
fn discard(socket: &OwnedFd, bytes: u64) -> Result<(), Failure> {
    let mut left = usize::try_from(bytes).unwrap_or(usize::MAX);
    let mut inbox = [0; INBOX_BYTES];
    if left > inbox.len() {
        return Err(Failure::Count);
    }
    while left > 0 {
        let taken = rustix::net::recv(socket, &mut inbox[..left], RecvFlags::DONTWAIT);
        match taken.map_err(io::Error::from)? {
            (_, 0) => return Err(Failure::Count),
            (_, count) => left -= count,
        }
    }
    Ok(())
}
