//! The table of consumers: memory that outlives this process, with a slot for each connection that is handed over.
//! Promises that a slot holds a whole note at any moment, the previous one or the new one, also when the process is killed
//! while it writes. The reader must check a note against the socket.
//!
//! The table is a file without a name (memfd), so that systemd's descriptor store can hold it, and it can only grow, so that
//! mapped memory stays valid. Words are in this machine's byte order. Of a slot of another version two words can be read:
//! the socket's cookie, and where its connection may be closed.

#![allow(unsafe_code, reason = "a mapping that two processes share")]

use std::fs::File;
use std::io;
use std::net::{IpAddr, Ipv6Addr};
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::ptr::NonNull;
use std::slice;
use std::sync::atomic::{AtomicU64, Ordering, compiler_fence};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use rustix::fs::{
    MemfdFlags, SealFlags, fcntl_add_seals, fcntl_get_seals, ftruncate, memfd_create,
};
use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};

use crate::firehose::socket::stream::Batch;

/// "ATRELAYC"
const MAGIC: u64 = u64::from_be_bytes(*b"ATRELAYC");
/// Changes with the layout of slots.
const VERSION: u64 = 1;
/// Bytes of a word.
const WORD: usize = size_of::<u64>();

/// The header: magic, version, words per slot. The same in all versions.
const HEADER: usize = 8;
const AT_VERSION: usize = 1;
const AT_SLOT_WORDS: usize = 2;

/// A slot: the socket's cookie, 0 where it is free; the bytes sent where its connection may be closed, 0 where that is
/// not known. These two are the same in all versions.
const COOKIE: usize = 0;
const CLOSABLE: usize = 1;
/// How many notes were written: the last one is in the first or the second place.
const NOTES: usize = 2;
/// The subscriber: checksum, microseconds since 1970, address, length of the user agent, user agent.
const SUBSCRIBER: usize = 3;
const SUBSCRIBER_WORDS: usize = 5 + AGENT_WORDS;
const AGENT_WORDS: usize = 32;
/// The two places for notes.
const FIRST_NOTE: usize = SUBSCRIBER + SUBSCRIBER_WORDS;
/// A note: checksum, bytes sent, bytes received, offset, counts of runs and of bytes of the pending frames, runs, pending
/// frames.
const NOTE_HEAD: usize = 5;
const MAX_RUNS: usize = Batch::MAX_RUNS;
const PENDING_WORDS: usize = 80;
const NOTE_WORDS: usize = NOTE_HEAD + 2 * MAX_RUNS + PENDING_WORDS;
const SLOT_WORDS: usize = (FIRST_NOTE + 2 * NOTE_WORDS).next_multiple_of(8);

/// The layout of this version. A change of it needs another [`VERSION`].
const _: () = assert!(VERSION == 1 && MAX_RUNS == 32 && NOTE_WORDS == 149 && SLOT_WORDS == 344);

/// Longest pending frames of a note, as [`super::pending`] encodes them.
pub(super) const MAX_PENDING_BYTES: usize = PENDING_WORDS * WORD;

/// Where a consumer's connection stands.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Note {
    /// Bytes that had been written to its socket.
    pub sent: u64,
    /// Bytes of the client that were handled, whether they were taken from the socket or not.
    pub received: u64,
    /// Bytes of the first event of the runs that had been sent before.
    pub offset: u64,
    /// The events that were about to be written.
    pub runs: Vec<Range<u64>>,
    /// Everything else, empty where there is nothing.
    pub pending: Vec<u8>,
}

/// A consumer as the admin listing shows it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Subscriber {
    pub address: IpAddr,
    pub user_agent: String,
    pub connected_at: SystemTime,
}

/// Why a table of another process is not used.
#[derive(Debug, thiserror::Error)]
pub(super) enum TableError {
    #[error("it is no table of consumers")]
    Foreign,
    #[error("it is of version {0}")]
    Version(u64),
    #[error(transparent)]
    Io(#[from] io::Error),
}

/// The table, mapped for as long as it lives.
#[derive(Debug)]
pub(super) struct Table {
    file: OwnedFd,
    start: NonNull<AtomicU64>,
    words: usize,
}

// SAFETY: the mapping is shared memory of atomic words, valid until the drop, and nothing is thread-local about it.
unsafe impl Send for Table {}
// SAFETY: likewise; all access is by atomic operations.
unsafe impl Sync for Table {}

impl Table {
    /// An empty table with so many slots.
    pub fn new(slots: usize) -> io::Result<Table> {
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
        let file = memfd_create("consumers", flags)?;
        fcntl_add_seals(&file, SealFlags::SHRINK)?;
        let words = HEADER + slots * SLOT_WORDS;
        ftruncate(&file, (words * WORD) as u64)?;
        let table = Table::map(file, words)?;
        table.words()[AT_VERSION].store(VERSION, Ordering::Relaxed);
        table.words()[AT_SLOT_WORDS].store(SLOT_WORDS as u64, Ordering::Relaxed);
        table.words()[0].store(MAGIC, Ordering::Release);
        Ok(table)
    }

    /// The table of a previous process, of this version or another, with its slots and room for at least so many.
    pub fn open(file: OwnedFd, slots: usize) -> Result<Found, TableError> {
        let length = |file: &OwnedFd| -> io::Result<u64> {
            Ok(File::from(file.try_clone()?).metadata()?.len())
        };
        // Refuse an unsealed memfd: truncation would raise SIGBUS.
        match fcntl_get_seals(&file) {
            Ok(seals) if seals.contains(SealFlags::SHRINK) => {}
            _ => return Err(TableError::Foreign),
        }
        let found = usize::try_from(length(&file)?).map_err(|_| TableError::Foreign)?;
        if found < HEADER * WORD {
            return Err(TableError::Foreign);
        }
        let header = Table::map(file.try_clone()?, HEADER)?;
        let word = |at: usize| header.words()[at].load(Ordering::Acquire);
        if word(0) != MAGIC {
            return Err(TableError::Foreign);
        }
        let (version, slot_words) = (word(AT_VERSION), word(AT_SLOT_WORDS));
        let slot_words = usize::try_from(slot_words).unwrap_or(0);
        if slot_words <= CLOSABLE {
            return Err(TableError::Foreign);
        }
        if version != VERSION || slot_words != SLOT_WORDS {
            let table = Table::map(file, found / WORD)?;
            return Ok(Found::Other(
                OtherTable { table, slot_words },
                TableError::Version(version),
            ));
        }
        let mut words = found / WORD;
        let wanted = HEADER + slots * SLOT_WORDS;
        if words < wanted {
            ftruncate(&file, (wanted * WORD) as u64).map_err(io::Error::from)?;
            words = wanted;
        }
        Ok(Found::Same(Table::map(file, words)?))
    }

    fn map(file: OwnedFd, words: usize) -> io::Result<Table> {
        let protection = ProtFlags::READ | ProtFlags::WRITE;
        let length = words * WORD;
        // SAFETY: a new mapping at an address of the kernel's choice.
        let start = unsafe {
            mmap(
                std::ptr::null_mut(),
                length,
                protection,
                MapFlags::SHARED,
                &file,
                0,
            )
        }?;
        let start = NonNull::new(start.cast()).ok_or(io::ErrorKind::OutOfMemory)?;
        Ok(Table { file, start, words })
    }

    fn words(&self) -> &[AtomicU64] {
        // SAFETY: the mapping is page-aligned, `words` long, lives as long as `self`, and its file cannot shrink.
        unsafe { slice::from_raw_parts(self.start.as_ptr(), self.words) }
    }

    /// For the descriptor store.
    pub fn descriptor(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }

    /// How many slots it has.
    pub fn slots(&self) -> usize {
        (self.words - HEADER) / SLOT_WORDS
    }

    /// The slot of that number, which is one of [`Table::slots`].
    fn slot(&self, number: usize) -> &[AtomicU64] {
        let start = HEADER + number * SLOT_WORDS;
        &self.words()[start..start + SLOT_WORDS]
    }

    /// The cookie of a slot's socket; 0 where the slot is free, or there is none of that number.
    pub fn cookie(&self, number: usize) -> u64 {
        match number < self.slots() {
            true => self.slot(number)[COOKIE].load(Ordering::Acquire),
            false => 0,
        }
    }

    /// The cookie of a slot's socket, and the bytes sent where its connection may be closed; 0 where that is not known.
    pub fn closable(&self, number: usize) -> Option<(u64, u64)> {
        closable(self.words(), SLOT_WORDS, number)
    }

    /// Notes where the connection may be closed, `None` while it is served.
    pub fn set_closable(&self, number: usize, sent: Option<u64>) {
        self.slot(number)[CLOSABLE].store(sent.unwrap_or(0), Ordering::Release);
    }

    /// Begins a slot. It is in use from its first note on.
    pub fn begin(&self, number: usize, cookie: u64, subscriber: &Subscriber, note: NoteRef<'_>) {
        let slot = self.slot(number);
        slot[COOKIE].store(0, Ordering::Release);
        slot[CLOSABLE].store(0, Ordering::Relaxed);
        put_subscriber(&slot[SUBSCRIBER..][..SUBSCRIBER_WORDS], cookie, subscriber);
        self.note(number, cookie, note);
        slot[COOKIE].store(cookie, Ordering::Release);
    }

    /// Frees a slot.
    pub fn free(&self, number: usize) {
        self.slot(number)[COOKIE].store(0, Ordering::Release);
    }

    /// Replaces a slot's note. Only one thread at a time may do so for a slot.
    pub fn note(&self, number: usize, cookie: u64, note: NoteRef<'_>) {
        let slot = self.slot(number);
        let notes = slot[NOTES].load(Ordering::Relaxed).wrapping_add(1);
        note.put(note_place(slot, notes), cookie);
        slot[NOTES].store(notes, Ordering::Release);
        // Nothing that follows may be moved before this, the next note included. No other thread would see that, but the
        // process can be killed anywhere.
        compiler_fence(Ordering::SeqCst);
    }

    /// A slot's content; `None` where it is damaged.
    pub fn read(&self, number: usize, cookie: u64) -> Option<(Subscriber, Note)> {
        let slot = self.slot(number);
        let notes = slot[NOTES].load(Ordering::Acquire);
        let subscriber = read_subscriber(&slot[SUBSCRIBER..][..SUBSCRIBER_WORDS], cookie)?;
        let note = read_note(note_place(slot, notes), cookie)?;
        Some((subscriber, note))
    }
}

impl Drop for Table {
    fn drop(&mut self) {
        // SAFETY: mapped by `map` with this length, and nothing borrows it any more. A whole mapping can be unmapped.
        let _ = unsafe { munmap(self.start.as_ptr().cast(), self.words * WORD) };
    }
}

/// A table that another process made.
#[derive(Debug)]
pub(super) enum Found {
    /// Of this version.
    Same(Table),
    /// Of another version.
    Other(OtherTable, TableError),
}

/// A table of another version: only what all versions have in common can be read.
#[derive(Debug)]
pub(super) struct OtherTable {
    table: Table,
    slot_words: usize,
}

impl OtherTable {
    /// See [`Table::closable`].
    pub fn closable(&self, number: usize) -> Option<(u64, u64)> {
        closable(self.table.words(), self.slot_words, number)
    }
}

/// The words of a slot that are the same in all versions.
fn closable(words: &[AtomicU64], slot_words: usize, number: usize) -> Option<(u64, u64)> {
    let start = number.checked_mul(slot_words)?.checked_add(HEADER)?;
    let slot = words.get(start..)?;
    let word = |at: usize| Some(slot.get(at)?.load(Ordering::Acquire));
    Some((word(COOKIE)?, word(CLOSABLE)?))
}

/// A note to be written.
#[derive(Debug, Clone, Copy)]
pub(super) struct NoteRef<'a> {
    pub sent: u64,
    pub received: u64,
    pub offset: u64,
    pub runs: &'a [Range<u64>],
    pub pending: &'a [u8],
}

impl NoteRef<'_> {
    /// Writes it. A note that does not fit is written as an invalid one.
    fn put(&self, place: &[AtomicU64], cookie: u64) {
        if self.runs.len() > MAX_RUNS || self.pending.len() > MAX_PENDING_BYTES {
            return place[0].store(0, Ordering::Relaxed);
        }
        let counts = self.runs.len() as u64 | (self.pending.len() as u64) << 32;
        let head = [self.sent, self.received, self.offset, counts].into_iter();
        let runs = self.runs.iter().flat_map(|run| [run.start, run.end]);
        let pending = self.pending.chunks(WORD).map(word_of);
        put_words(place, cookie, head.chain(runs).chain(pending));
    }
}

fn note_place(slot: &[AtomicU64], notes: u64) -> &[AtomicU64] {
    let which = (notes & 1) as usize;
    &slot[FIRST_NOTE + which * NOTE_WORDS..][..NOTE_WORDS]
}

fn read_note(place: &[AtomicU64], cookie: u64) -> Option<Note> {
    let word = |at: usize| place[at].load(Ordering::Acquire);
    let counts = word(4);
    let (runs, pending) = ((counts & 0xffff_ffff) as usize, (counts >> 32) as usize);
    if runs > MAX_RUNS || pending > MAX_PENDING_BYTES {
        return None;
    }
    let end_of_runs = NOTE_HEAD + 2 * runs;
    let end = end_of_runs + pending.div_ceil(WORD);
    if !is_whole(&place[..end], cookie) {
        return None;
    }
    let runs = (NOTE_HEAD..end_of_runs).step_by(2);
    Some(Note {
        sent: word(1),
        received: word(2),
        offset: word(3),
        runs: runs.map(|at| word(at)..word(at + 1)).collect(),
        pending: bytes_of((end_of_runs..end).map(word), pending),
    })
}

fn put_subscriber(place: &[AtomicU64], cookie: u64, subscriber: &Subscriber) {
    let since = subscriber.connected_at.duration_since(UNIX_EPOCH);
    let address = match subscriber.address {
        IpAddr::V4(v4) => v4.to_ipv6_mapped(),
        IpAddr::V6(v6) => v6,
    };
    let address = address.to_bits();
    let mut length = subscriber.user_agent.len().min(AGENT_WORDS * WORD);
    while !subscriber.user_agent.is_char_boundary(length) {
        length -= 1;
    }
    let agent = &subscriber.user_agent.as_bytes()[..length];
    let head = [
        since.unwrap_or_default().as_micros() as u64,
        (address >> 64) as u64,
        address as u64,
        length as u64,
    ];
    let agent = agent.chunks(WORD).map(word_of);
    put_words(place, cookie, head.into_iter().chain(agent));
}

fn read_subscriber(place: &[AtomicU64], cookie: u64) -> Option<Subscriber> {
    let word = |at: usize| place[at].load(Ordering::Acquire);
    let length = usize::try_from(word(4)).ok()?;
    if length > AGENT_WORDS * WORD {
        return None;
    }
    let end = 5 + length.div_ceil(WORD);
    if !is_whole(&place[..end], cookie) {
        return None;
    }
    let address = u128::from(word(2)) << 64 | u128::from(word(3));
    Some(Subscriber {
        address: IpAddr::V6(Ipv6Addr::from_bits(address)).to_canonical(),
        user_agent: String::from_utf8(bytes_of((5..end).map(word), length)).ok()?,
        connected_at: UNIX_EPOCH.checked_add(Duration::from_micros(word(1)))?,
    })
}

/// Writes words behind their checksum.
fn put_words(place: &[AtomicU64], cookie: u64, words: impl Iterator<Item = u64>) {
    let mut sum = Sum::new(cookie);
    for (at, word) in (1..).zip(words) {
        sum.add(word);
        place[at].store(word, Ordering::Relaxed);
    }
    place[0].store(sum.get(), Ordering::Relaxed);
}

/// Whether the first word is the checksum of the others.
fn is_whole(place: &[AtomicU64], cookie: u64) -> bool {
    let (found, words) = place.split_first().expect("a checksum");
    let mut sum = Sum::new(cookie);
    words
        .iter()
        .for_each(|word| sum.add(word.load(Ordering::Acquire)));
    sum.get() == found.load(Ordering::Acquire)
}

fn word_of(bytes: &[u8]) -> u64 {
    let mut word = [0; WORD];
    word[..bytes.len()].copy_from_slice(bytes);
    u64::from_ne_bytes(word)
}

fn bytes_of(words: impl Iterator<Item = u64>, length: usize) -> Vec<u8> {
    let mut bytes: Vec<u8> = words.flat_map(u64::to_ne_bytes).collect();
    bytes.truncate(length);
    bytes
}

/// A checksum against damage and against words of another slot, not against forgery: a process that can write to the table
/// can do all that the relay can. FxHash's step, one multiplication a word.
struct Sum(u64);

impl Sum {
    fn new(cookie: u64) -> Sum {
        let mut sum = Sum(MAGIC ^ VERSION);
        sum.add(cookie);
        sum
    }

    fn add(&mut self, word: u64) {
        self.0 = (self.0.rotate_left(5) ^ word).wrapping_mul(0x517c_c1b7_2722_0a95);
    }

    /// Never 0, which is what memory holds that was never written.
    fn get(self) -> u64 {
        self.0.max(1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const COOKIE_OF_TEST: u64 = 77;

    fn subscriber(user_agent: &str) -> Subscriber {
        Subscriber {
            address: "192.0.2.7".parse().unwrap(),
            user_agent: user_agent.to_owned(),
            connected_at: UNIX_EPOCH + Duration::from_micros(1_700_000_000_000_001),
        }
    }

    fn put(table: &Table, number: usize, note: &Note) {
        let note = NoteRef {
            sent: note.sent,
            received: note.received,
            offset: note.offset,
            runs: &note.runs,
            pending: &note.pending,
        };
        if table.cookie(number) == 0 {
            table.begin(number, COOKIE_OF_TEST, &subscriber("a client/1.0"), note);
        } else {
            table.note(number, COOKIE_OF_TEST, note);
        }
    }

    fn note(seed: u64) -> Note {
        Note {
            sent: seed * 1000,
            received: seed * 10,
            offset: seed % 3,
            runs: (0..seed % MAX_RUNS as u64 + 1)
                .map(|run| seed + run * 10..seed + run * 10 + 5)
                .collect(),
            pending: vec![seed as u8; seed as usize % (MAX_PENDING_BYTES + 1)],
        }
    }

    /// The same memory as another process would see it.
    fn reopened(table: &Table, slots: usize) -> Result<Found, TableError> {
        Table::open(table.descriptor().try_clone_to_owned().unwrap(), slots)
    }

    fn same(found: Result<Found, TableError>) -> Table {
        match found {
            Ok(Found::Same(table)) => table,
            other => panic!("not the same: {other:?}"),
        }
    }

    #[test]
    fn another_process_reads_the_last_note_of_each_slot_and_may_add_slots() {
        let table = Table::new(3).unwrap();
        for seed in 0..2_000 {
            put(&table, 2, &note(seed));
            let (found, last) = table.read(2, COOKIE_OF_TEST).unwrap();
            assert_eq!((found, last), (subscriber("a client/1.0"), note(seed)));
        }
        let again = same(reopened(&table, 5));
        drop(table);
        assert_eq!(again.slots(), 5);
        assert_eq!(again.read(2, COOKIE_OF_TEST).unwrap().1, note(1_999));
        let cookies: Vec<u64> = (0..7).map(|number| again.cookie(number)).collect();
        assert_eq!(cookies, [0, 0, COOKIE_OF_TEST, 0, 0, 0, 0]);
        assert_eq!(again.closable(2), Some((COOKIE_OF_TEST, 0)));
        again.set_closable(2, Some(9));
        assert_eq!(again.closable(2), Some((COOKIE_OF_TEST, 9)));
        assert_eq!(again.closable(usize::MAX), None);
        put(&again, 4, &note(7));
        again.free(2);
        assert_eq!(same(reopened(&again, 1)).cookie(2), 0);
        assert_eq!(same(reopened(&again, 1)).slots(), 5);
    }

    /// A slot with one note as the first release wrote it, by index; all other words are 0.
    const SLOT_OF_VERSION_1: &[(usize, u64)] = &[
        (0, 0x4d),
        (2, 0x1),
        (3, 0x5e933f204551ec48),
        (4, 0x60a24181e4001),
        (6, 0xffffc0000207),
        (7, 0xc),
        (8, 0x746e65696c632061),
        (9, 0x302e312f),
        (189, 0x44f83771d7bd4ffa),
        (190, 0xf4240),
        (191, 0x2a),
        (192, 0x7),
        (193, 0xa00000002),
        (194, 0x5),
        (195, 0x9),
        (196, 0xb),
        (197, 0xc),
        (198, 0x807060504030201),
        (199, 0xa09),
    ];

    #[test]
    fn a_table_of_version_1_is_read() {
        let table = Table::new(1).unwrap();
        for (at, word) in SLOT_OF_VERSION_1 {
            table.slot(0)[*at].store(*word, Ordering::Relaxed);
        }
        let again = same(reopened(&table, 1));
        assert_eq!(again.cookie(0), COOKIE_OF_TEST);
        let expected = Note {
            sent: 1_000_000,
            received: 42,
            offset: 7,
            runs: vec![5..9, 11..12],
            pending: vec![1, 2, 3, 4, 5, 6, 7, 8, 9, 10],
        };
        let read = again.read(0, COOKIE_OF_TEST);
        assert_eq!(read, Some((subscriber("a client/1.0"), expected)));
    }

    #[test]
    fn a_note_that_was_not_finished_is_not_read() {
        let table = Table::new(1).unwrap();
        put(&table, 0, &note(1));
        put(&table, 0, &note(2));
        // Killed at any word of the third.
        let slot = table.slot(0);
        let place = note_place(slot, slot[NOTES].load(Ordering::Relaxed) + 1);
        for word in place {
            word.store(0xdead, Ordering::Relaxed);
            assert_eq!(table.read(0, COOKIE_OF_TEST).unwrap().1, note(2));
        }
    }

    #[test]
    fn damage_is_seen_wherever_it_is() {
        let table = Table::new(1).unwrap();
        put(&table, 0, &note(20));
        put(&table, 0, &note(21));
        assert!(table.read(0, COOKIE_OF_TEST + 1).is_none(), "another's");
        let good = table.read(0, COOKIE_OF_TEST);
        for word in &table.slot(0)[NOTES..] {
            for bit in [0, 13, 31, 40, 63] {
                let before = word.fetch_xor(1 << bit, Ordering::Relaxed);
                let read = table.read(0, COOKIE_OF_TEST);
                // The words behind the notes, and the note before.
                let unused = read == good || read.as_ref().is_some_and(|it| it.1 == note(20));
                assert!(read.is_none() || unused, "{read:?}");
                word.store(before, Ordering::Relaxed);
            }
        }
        assert_eq!(table.read(0, COOKIE_OF_TEST), good);
    }

    #[test]
    fn what_does_not_fit_is_not_believed() {
        let table = Table::new(1).unwrap();
        let mut long = note(3);
        long.pending = vec![1; MAX_PENDING_BYTES + 1];
        put(&table, 0, &long);
        assert!(table.read(0, COOKIE_OF_TEST).is_none());
        let agent = "ü".repeat(300);
        let words: Vec<AtomicU64> = (0..SUBSCRIBER_WORDS).map(|_| AtomicU64::new(0)).collect();
        put_subscriber(&words, 5, &subscriber(&agent));
        let cut = read_subscriber(&words, 5).unwrap().user_agent;
        assert_eq!(cut, "ü".repeat(128));
    }

    #[test]
    fn other_files_and_other_versions_are_told_apart() {
        let plain = tempfile::tempfile().unwrap();
        plain.set_len(100_000).unwrap();
        assert!(matches!(
            Table::open(plain.into(), 1),
            Err(TableError::Foreign)
        ));
        let unsealed = memfd_create("x", MemfdFlags::ALLOW_SEALING).unwrap();
        ftruncate(&unsealed, 100_000).unwrap();
        assert!(matches!(Table::open(unsealed, 1), Err(TableError::Foreign)));
        let empty = memfd_create("x", MemfdFlags::ALLOW_SEALING).unwrap();
        fcntl_add_seals(&empty, SealFlags::SHRINK).unwrap();
        assert!(matches!(Table::open(empty, 1), Err(TableError::Foreign)));

        let table = Table::new(2).unwrap();
        put(&table, 1, &note(1));
        table.set_closable(1, Some(123));
        table.words()[AT_VERSION].store(VERSION + 1, Ordering::Relaxed);
        match reopened(&table, 2) {
            Ok(Found::Other(other, TableError::Version(version))) => {
                assert_eq!(version, VERSION + 1);
                assert_eq!(other.closable(1), Some((COOKIE_OF_TEST, 123)));
                assert_eq!(other.closable(2), None);
                assert_eq!(other.closable(usize::MAX), None);
            }
            found => panic!("{found:?}"),
        }
        table.words()[AT_SLOT_WORDS].store(0, Ordering::Relaxed);
        assert!(matches!(reopened(&table, 2), Err(TableError::Foreign)));
        table.words()[AT_SLOT_WORDS].store(u64::MAX, Ordering::Relaxed);
        match reopened(&table, 2) {
            Ok(Found::Other(other, _)) => assert_eq!(other.closable(1), None),
            found => panic!("{found:?}"),
        }
    }
}
