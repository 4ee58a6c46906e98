//! The table of consumers: memory that outlives this process, with a slot for each consumer that is kept.
//! Promises that a slot holds one of two whole notes at any moment, the one before or the new one, also when the process
//! is killed while it writes. Whether what a slot says is true is for the reader to check.
//!
//! It is a file without a name (memfd), so that it can lie in the service's descriptor store, and can only grow, so that
//! nothing mapped can go away. Words are in this machine's order. Of a slot of another version, two words can still be
//! read: whose it is, and where its connection may be closed.

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

use crate::eventlog::Frames;

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
/// How many notes were made: the last one is in the first or the second place.
const NOTES: usize = 2;
/// Who it is: checksum, microseconds since 1970, address, length of the user agent, user agent.
const WHO: usize = 3;
const WHO_WORDS: usize = 5 + AGENT_WORDS;
const AGENT_WORDS: usize = 32;
/// The two places for notes.
const FIRST_NOTE: usize = WHO + WHO_WORDS;
/// A note: checksum, bytes sent, bytes heard, bytes given, counts of runs and of bytes of the rest, runs, rest.
const NOTE_HEAD: usize = 5;
const MAX_RUNS: usize = Frames::MAX_RUNS;
const REST_WORDS: usize = 80;
const NOTE_WORDS: usize = NOTE_HEAD + 2 * MAX_RUNS + REST_WORDS;
const SLOT_WORDS: usize = (FIRST_NOTE + 2 * NOTE_WORDS).next_multiple_of(8);

/// Longest rest of a note.
pub(super) const MAX_REST_BYTES: usize = REST_WORDS * WORD;

/// Where a consumer's connection stands.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Note {
    /// Bytes that had been written to its socket.
    pub sent: u64,
    /// Bytes of the client that are settled, as read or to be thrown away.
    pub heard: u64,
    /// Bytes that had gone out of the first event of the runs.
    pub given: u64,
    /// The events that were about to be written.
    pub runs: Vec<Range<u64>>,
    /// All else, where there is anything.
    pub rest: Vec<u8>,
}

/// Who a consumer is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Who {
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

    /// The table of a process before, of this version or another, with its slots and room for at least so many.
    pub fn open(file: OwnedFd, slots: usize) -> Result<Foreign, TableError> {
        let length = |file: &OwnedFd| -> io::Result<u64> {
            Ok(File::from(file.try_clone()?).metadata()?.len())
        };
        // What could shrink could not be mapped: reading it could kill the process.
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
            return Ok(Foreign::Other(
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
        Ok(Foreign::Ours(Table::map(file, words)?))
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

    /// The cookie of the socket whose slot it is; 0 where it is free, also for numbers that are none.
    pub fn cookie(&self, number: usize) -> u64 {
        match number < self.slots() {
            true => self.slot(number)[COOKIE].load(Ordering::Acquire),
            false => 0,
        }
    }

    /// The cookie of the socket whose slot it is, and where its connection may be closed; 0 where that is not known.
    pub fn closable(&self, number: usize) -> Option<(u64, u64)> {
        closable(self.words(), SLOT_WORDS, number)
    }

    /// Notes where the connection may be closed, `None` while it is served.
    pub fn set_closable(&self, number: usize, sent: Option<u64>) {
        self.slot(number)[CLOSABLE].store(sent.unwrap_or(0), Ordering::Release);
    }

    /// Begins a slot. It counts as taken with its first note.
    pub fn begin(&self, number: usize, cookie: u64, who: &Who, note: NoteRef<'_>) {
        let slot = self.slot(number);
        slot[COOKIE].store(0, Ordering::Release);
        slot[CLOSABLE].store(0, Ordering::Relaxed);
        put_who(&slot[WHO..][..WHO_WORDS], cookie, who);
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
        // What follows, the next note included, must not be begun before: nobody else would see that, but a process can be
        // killed anywhere.
        compiler_fence(Ordering::SeqCst);
    }

    /// What a slot says, as far as it is whole.
    pub fn read(&self, number: usize, cookie: u64) -> Option<(Who, Note)> {
        let slot = self.slot(number);
        let notes = slot[NOTES].load(Ordering::Acquire);
        let who = read_who(&slot[WHO..][..WHO_WORDS], cookie)?;
        let note = read_note(note_place(slot, notes), cookie)?;
        Some((who, note))
    }
}

impl Drop for Table {
    fn drop(&mut self) {
        // SAFETY: mapped by `map` with this length, and nothing borrows it any more. It cannot fail for a whole mapping.
        let _ = unsafe { munmap(self.start.as_ptr().cast(), self.words * WORD) };
    }
}

/// A table that another process made.
#[derive(Debug)]
pub(super) enum Foreign {
    Ours(Table),
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

/// What can be read of a slot in all versions.
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
    pub heard: u64,
    pub given: u64,
    pub runs: &'a [Range<u64>],
    pub rest: &'a [u8],
}

impl NoteRef<'_> {
    /// Writes it. One that does not fit is written as one that nobody believes.
    fn put(&self, place: &[AtomicU64], cookie: u64) {
        if self.runs.len() > MAX_RUNS || self.rest.len() > MAX_REST_BYTES {
            return place[0].store(0, Ordering::Relaxed);
        }
        let counts = self.runs.len() as u64 | (self.rest.len() as u64) << 32;
        let head = [self.sent, self.heard, self.given, counts].into_iter();
        let runs = self.runs.iter().flat_map(|run| [run.start, run.end]);
        let rest = self.rest.chunks(WORD).map(word_of);
        put_words(place, cookie, head.chain(runs).chain(rest));
    }
}

fn note_place(slot: &[AtomicU64], notes: u64) -> &[AtomicU64] {
    let which = (notes & 1) as usize;
    &slot[FIRST_NOTE + which * NOTE_WORDS..][..NOTE_WORDS]
}

fn read_note(place: &[AtomicU64], cookie: u64) -> Option<Note> {
    let word = |at: usize| place[at].load(Ordering::Acquire);
    let counts = word(4);
    let (runs, rest) = ((counts & 0xffff_ffff) as usize, (counts >> 32) as usize);
    if runs > MAX_RUNS || rest > MAX_REST_BYTES {
        return None;
    }
    let end_of_runs = NOTE_HEAD + 2 * runs;
    let end = end_of_runs + rest.div_ceil(WORD);
    if !is_whole(&place[..end], cookie) {
        return None;
    }
    let runs = (NOTE_HEAD..end_of_runs).step_by(2);
    Some(Note {
        sent: word(1),
        heard: word(2),
        given: word(3),
        runs: runs.map(|at| word(at)..word(at + 1)).collect(),
        rest: bytes_of((end_of_runs..end).map(word), rest),
    })
}

fn put_who(place: &[AtomicU64], cookie: u64, who: &Who) {
    let since = who.connected_at.duration_since(UNIX_EPOCH);
    let address = match who.address {
        IpAddr::V4(v4) => v4.to_ipv6_mapped(),
        IpAddr::V6(v6) => v6,
    };
    let address = address.to_bits();
    let mut length = who.user_agent.len().min(AGENT_WORDS * WORD);
    while !who.user_agent.is_char_boundary(length) {
        length -= 1;
    }
    let agent = &who.user_agent.as_bytes()[..length];
    let head = [
        since.unwrap_or_default().as_micros() as u64,
        (address >> 64) as u64,
        address as u64,
        length as u64,
    ];
    let agent = agent.chunks(WORD).map(word_of);
    put_words(place, cookie, head.into_iter().chain(agent));
}

fn read_who(place: &[AtomicU64], cookie: u64) -> Option<Who> {
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
    Some(Who {
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

/// A checksum against damage and against words of another slot, not against forgers: who can write to the table can do all
/// that the relay can. FxHash's step, one multiplication a word.
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

    fn who(user_agent: &str) -> Who {
        Who {
            address: "192.0.2.7".parse().unwrap(),
            user_agent: user_agent.to_owned(),
            connected_at: UNIX_EPOCH + Duration::from_micros(1_700_000_000_000_001),
        }
    }

    fn put(table: &Table, number: usize, note: &Note) {
        let note = NoteRef {
            sent: note.sent,
            heard: note.heard,
            given: note.given,
            runs: &note.runs,
            rest: &note.rest,
        };
        if table.cookie(number) == 0 {
            table.begin(number, COOKIE_OF_TEST, &who("a client/1.0"), note);
        } else {
            table.note(number, COOKIE_OF_TEST, note);
        }
    }

    fn note(seed: u64) -> Note {
        Note {
            sent: seed * 1000,
            heard: seed * 10,
            given: seed % 3,
            runs: (0..seed % MAX_RUNS as u64 + 1)
                .map(|run| seed + run * 10..seed + run * 10 + 5)
                .collect(),
            rest: vec![seed as u8; seed as usize % (MAX_REST_BYTES + 1)],
        }
    }

    /// The same memory as another process would see it.
    fn seen_again(table: &Table, slots: usize) -> Result<Foreign, TableError> {
        Table::open(table.descriptor().try_clone_to_owned().unwrap(), slots)
    }

    fn ours(found: Result<Foreign, TableError>) -> Table {
        match found {
            Ok(Foreign::Ours(table)) => table,
            other => panic!("not ours: {other:?}"),
        }
    }

    #[test]
    fn another_process_reads_the_last_note_of_each_slot_and_may_add_slots() {
        let table = Table::new(3).unwrap();
        for seed in 0..2_000 {
            put(&table, 2, &note(seed));
            let (found, last) = table.read(2, COOKIE_OF_TEST).unwrap();
            assert_eq!((found, last), (who("a client/1.0"), note(seed)));
        }
        let again = ours(seen_again(&table, 5));
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
        assert_eq!(ours(seen_again(&again, 1)).cookie(2), 0);
        assert_eq!(ours(seen_again(&again, 1)).slots(), 5);
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
        long.rest = vec![1; MAX_REST_BYTES + 1];
        put(&table, 0, &long);
        assert!(table.read(0, COOKIE_OF_TEST).is_none());
        let agent = "ü".repeat(300);
        let words: Vec<AtomicU64> = (0..WHO_WORDS).map(|_| AtomicU64::new(0)).collect();
        put_who(&words, 5, &who(&agent));
        let cut = read_who(&words, 5).unwrap().user_agent;
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
        match seen_again(&table, 2) {
            Ok(Foreign::Other(other, TableError::Version(version))) => {
                assert_eq!(version, VERSION + 1);
                assert_eq!(other.closable(1), Some((COOKIE_OF_TEST, 123)));
                assert_eq!(other.closable(2), None);
                assert_eq!(other.closable(usize::MAX), None);
            }
            found => panic!("{found:?}"),
        }
        table.words()[AT_SLOT_WORDS].store(0, Ordering::Relaxed);
        assert!(matches!(seen_again(&table, 2), Err(TableError::Foreign)));
        table.words()[AT_SLOT_WORDS].store(u64::MAX, Ordering::Relaxed);
        match seen_again(&table, 2) {
            Ok(Foreign::Other(other, _)) => assert_eq!(other.closable(1), None),
            found => panic!("{found:?}"),
        }
    }
}
