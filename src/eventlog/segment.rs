//! One segment: a file of WebSocket frames and its index, for readers and for the one writer.
//! Promises where things lie; when to sync, what to recover and what to remove is decided elsewhere.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant, SystemTime};

use parking_lot::{Mutex, RwLock};
use rustix::io::Errno;

use super::account_index;
use super::disk::{LogFile, sync_folder};
use super::entry::{self, ENTRY_BYTES, Entry, HEADER_BYTES};
use super::faults::Faults;
use super::group::Group;
use super::syncer::Syncer;

/// A segment's index is preallocated for frames of this size; it grows where frames are smaller.
const EXPECTED_FRAME_BYTES: u64 = 4096;
/// How long the writer waits before it asks a full disk for preallocated space again.
const ALLOCATE_AGAIN_AFTER: Duration = Duration::from_secs(10);
/// Frames at the end of a segment that stay in the page cache, for consumers that are live or nearly so. The log is
/// written once and seldom read twice: what lies further back would only drive out the database's pages, and memory
/// that is used again is cheaper to write to than memory that is not.
const CACHED_BYTES: u64 = 16 << 20;
/// A length that reaches behind the end of every segment.
const WHOLE_FILE: u64 = 1 << 40;
/// Bytes dropped from the page cache at a time.
const FORGET_BYTES: u64 = 4 << 20;
/// Bytes rewritten at a time after a failed sync.
const REWRITE_BYTES: u64 = 1 << 20;

/// Path of the frames of the segment that begins at `first`.
pub(super) fn frames_path(dir: &Path, first: u64) -> PathBuf {
    dir.join(format!("{first:020}.seg"))
}

/// Path of the index of the segment that begins at `first`.
pub(super) fn index_path(dir: &Path, first: u64) -> PathBuf {
    dir.join(format!("{first:020}.idx"))
}

/// Bytes reserved for the index of a segment with room for `capacity` bytes of frames.
fn index_bytes(capacity: u64) -> u64 {
    HEADER_BYTES + capacity / EXPECTED_FRAME_BYTES * ENTRY_BYTES
}

/// Bytes on disk of a segment that is written to.
pub(super) fn reserved_bytes(capacity: u64) -> u64 {
    capacity + index_bytes(capacity)
}

/// A segment as readers, retention and redaction see it.
#[derive(Debug)]
pub(super) struct Segment {
    pub dir: Arc<Path>,
    pub first: u64,
    /// Last sequence number; `u64::MAX` while the segment is written to (the head bounds it then).
    last: AtomicU64,
    /// Bytes on disk once closed and asked for; 0 until then.
    bytes: AtomicU64,
    /// When the last event was appended, in microseconds since 1970, once closed and asked for; 0 until
    /// then.
    ended_us: AtomicU64,
    /// Nothing is left to read, also where the files are open still. Changes under the gate.
    emptied: AtomicBool,
    /// Removed, or about to be.
    removed: AtomicBool,
    /// The accounts of its events, in order, from the segment's beginning until its account index is written. `None` where
    /// they are not kept.
    accounts: Mutex<Option<Vec<u32>>>,
    /// Open files, shared by all readers that are in this segment now.
    files: Mutex<Weak<Files>>,
    /// Held for reading from the look into the index until the frames are copied; redaction takes it
    /// for writing between marking frames and punching them out, so no reader sees a hole.
    pub gate: RwLock<()>,
    /// Held where bytes below the head are changed in place: marked, punched out, or written once more after a failed
    /// sync. So none of these takes another one back.
    pub changes: Mutex<()>,
}

/// A segment's files, open for reading. They stay readable after the segment was removed.
#[derive(Debug)]
pub(super) struct Files {
    pub frames: File,
    pub index: File,
}

impl Segment {
    pub fn new(dir: Arc<Path>, first: u64, last: u64) -> Segment {
        Segment {
            dir,
            first,
            last: AtomicU64::new(last),
            bytes: AtomicU64::new(0),
            ended_us: AtomicU64::new(0),
            emptied: AtomicBool::new(false),
            removed: AtomicBool::new(false),
            accounts: Mutex::default(),
            files: Mutex::default(),
            gate: RwLock::default(),
            changes: Mutex::default(),
        }
    }

    /// The segment that is written to, which has events of these accounts so far.
    pub fn open_with(dir: Arc<Path>, first: u64, accounts: Vec<u32>) -> Segment {
        Segment {
            accounts: Mutex::new(Some(accounts)),
            ..Segment::new(dir, first, u64::MAX)
        }
    }

    /// Takes in the accounts of the next events, before anybody sees those.
    pub fn note_accounts(&self, accounts: &[u32]) {
        let mut slot = self.accounts.lock();
        match slot.as_mut() {
            Some(kept) if kept.len() as u64 >= account_index::MAX_EVENTS => *slot = None,
            Some(kept) => kept.extend_from_slice(accounts),
            None => {}
        }
    }

    /// Places of the events of these accounts, which are sorted, among those whose accounts are kept in memory.
    pub fn places_in_memory(&self, accounts: &[u32]) -> Option<Vec<u64>> {
        let slot = self.accounts.lock();
        let kept = slot.as_ref()?.iter().zip(0..);
        let found = kept.filter(|(account, _)| accounts.binary_search(account).is_ok());
        Some(found.map(|(_, place)| place).collect())
    }

    /// Writes the account index of a segment that has ended, if the accounts are kept in memory. True where they were.
    pub fn index_accounts(&self) -> io::Result<bool> {
        if !self.has_ended() {
            return Ok(false);
        }
        let mut slot = self.accounts.lock();
        let Some(accounts) = slot.take() else {
            return Ok(false);
        };
        drop(slot);
        self.write_account_index(&accounts).map(|()| true)
    }

    /// Writes the account index of an ended segment with events of these accounts.
    pub fn write_account_index(&self, accounts: &[u32]) -> io::Result<()> {
        account_index::write(&self.dir, self.first, accounts)?;
        if self.removed.load(Ordering::Acquire) {
            return account_index::remove(&self.dir, self.first);
        }
        self.bytes.store(0, Ordering::Relaxed);
        Ok(())
    }

    /// True where no more events come.
    pub fn has_ended(&self) -> bool {
        self.last.load(Ordering::Acquire) != u64::MAX
    }

    /// Last sequence number that can be read, with `head` the log's.
    pub fn last(&self, head: u64) -> u64 {
        self.last.load(Ordering::Acquire).min(head)
    }

    /// No more events come into this segment.
    pub fn close(&self, last: u64) {
        self.last.store(last, Ordering::Release);
    }

    /// The open files, opened where no reader has them open.
    pub fn files(&self) -> io::Result<Arc<Files>> {
        let mut slot = self.files.lock();
        if let Some(files) = slot.upgrade() {
            return Ok(files);
        }
        let files = Arc::new(Files {
            frames: File::open(frames_path(&self.dir, self.first))?,
            index: File::open(index_path(&self.dir, self.first))?,
        });
        *slot = Arc::downgrade(&files);
        Ok(files)
    }

    /// The index entry of `seq`; `None` where it is damaged.
    pub fn entry(&self, files: &Files, seq: u64) -> io::Result<Option<Entry>> {
        let mut bytes = [0; ENTRY_BYTES as usize];
        files
            .index
            .read_exact_at(&mut bytes, entry::position(self.first, seq))?;
        Ok(Entry::decode(&bytes).filter(|entry| entry.seq == seq))
    }

    /// Bytes of its files on disk, preallocated ones included; 0 where they are gone.
    pub fn bytes(&self) -> u64 {
        let known = self.bytes.load(Ordering::Relaxed);
        if known > 0 {
            return known;
        }
        let paths = [
            frames_path(&self.dir, self.first),
            index_path(&self.dir, self.first),
            account_index::path(&self.dir, self.first),
        ];
        let lengths = paths.iter().filter_map(|path| std::fs::metadata(path).ok());
        let bytes = lengths.map(|file| file.len()).sum();
        if self.has_ended() {
            self.bytes.store(bytes, Ordering::Relaxed);
        }
        bytes
    }

    /// When the last event of an ended segment was appended; `None` where that entry is damaged.
    pub fn ended_at(&self) -> io::Result<Option<SystemTime>> {
        let known = self.ended_us.load(Ordering::Relaxed);
        let time = if known > 0 {
            Some(known)
        } else {
            let last = self.last.load(Ordering::Acquire);
            let entry = self.entry(&*self.files()?, last)?;
            entry.map(|entry| entry.time_us)
        };
        self.ended_us.store(time.unwrap_or(0), Ordering::Relaxed);
        Ok(time.map(|time| SystemTime::UNIX_EPOCH + Duration::from_micros(time)))
    }

    /// True where nothing is left to read, also where the files are open still. Ask while holding the
    /// gate.
    pub fn is_emptied(&self) -> bool {
        self.emptied.load(Ordering::Acquire)
    }

    /// Removes its files; readers that have them open keep them.
    pub fn remove(&self) -> io::Result<()> {
        self.removed.store(true, Ordering::Release);
        // Frames first: recovery takes frames without an index for a segment, not the reverse.
        for path in [
            frames_path(&self.dir, self.first),
            account_index::path(&self.dir, self.first),
            index_path(&self.dir, self.first),
        ] {
            match std::fs::remove_file(path) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                _ => {}
            }
        }
        Ok(())
    }

    /// Removes its files and gives their space back at once, also where a reader that stands still has
    /// them open.
    pub fn empty(&self) -> io::Result<()> {
        let frames = OpenOptions::new()
            .write(true)
            .open(frames_path(&self.dir, self.first));
        self.remove()?;
        let _gate = self.gate.write();
        self.emptied.store(true, Ordering::Release);
        match frames {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            frames => frames?.set_len(0),
        }
    }
}

/// The WebSocket frame of an entry, as it lies.
pub(super) fn read_frame(files: &Files, entry: &Entry) -> io::Result<Vec<u8>> {
    let mut frame = vec![0; entry.len as usize];
    files.frames.read_exact_at(&mut frame, entry.offset)?;
    Ok(frame)
}

/// The end of the log: where the sequencer appends.
#[derive(Debug)]
pub(super) struct Writer {
    dir: Arc<Path>,
    faults: Option<Arc<Faults>>,
    capacity: u64,
    frames: LogFile,
    index: Arc<LogFile>,
    pub first: u64,
    pub next_seq: u64,
    /// End of the frames that were written.
    pub offset: u64,
    /// End of the frames and the sequence number behind the last one that a sync has covered.
    synced: (u64, u64),
    /// Where the frames begin that were not dropped from the page cache.
    cached_from: u64,
    /// The same of the segment before.
    cached_before: Option<(LogFile, u64)>,
    space: Space,
}

/// Whether the files are as long as the segment may grow.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Space {
    Reserved,
    Unsupported,
    /// To be asked for, not before the time given.
    Wanted(Option<Instant>),
}

impl Writer {
    /// Opens a segment to append to it: frames up to `offset` and entries below `next_seq` are good,
    /// what lies behind is cut.
    pub fn open(
        dir: Arc<Path>,
        faults: Option<Arc<Faults>>,
        capacity: u64,
        first: u64,
        next_seq: u64,
        offset: u64,
    ) -> io::Result<Writer> {
        let writer = Writer {
            frames: LogFile::open(&frames_path(&dir, first), faults.clone())?,
            index: Arc::new(LogFile::open(&index_path(&dir, first), faults.clone())?),
            dir,
            faults,
            capacity,
            first,
            next_seq,
            offset,
            synced: (offset, next_seq),
            cached_from: offset,
            cached_before: None,
            space: Space::Wanted(None),
        };
        writer.index.write_all_at(&entry::header(first), 0)?;
        writer.truncate()?;
        writer.sync()?;
        sync_folder(&writer.dir)?;
        Ok(writer)
    }

    /// Goes on to the segment behind this one, which must have been closed.
    pub fn follow(&mut self) -> io::Result<()> {
        let (dir, faults) = (self.dir.clone(), self.faults.clone());
        let next = Writer::open(dir, faults, self.capacity, self.next_seq, self.next_seq, 0)?;
        let ended = std::mem::replace(self, next);
        self.cached_before = Some((ended.frames, ended.cached_from));
        Ok(())
    }

    /// True where a frame of `len` bytes behind `pending` others belongs into the next segment.
    pub fn is_full(&self, pending: u64, len: u64) -> bool {
        let used = self.offset + pending;
        used > 0 && used + len > self.capacity
    }

    /// Writes a group's frames and entries, and with a `syncer` brings both to disk. Nothing moves forward
    /// on an error: call [`Writer::cut_back`], then the same append again.
    pub fn append<T>(&mut self, group: &Group<T>, syncer: Option<&Syncer>) -> io::Result<()> {
        let first = group.next_seq() - group.entries().len() as u64 / ENTRY_BYTES;
        debug_assert_eq!(first, self.next_seq, "every number has an entry");
        self.reserve();
        self.frames
            .write_all_vectored_at(&mut group.frames(), self.offset)?;
        let index_end = entry::position(self.first, self.next_seq);
        self.index.write_all_at(group.entries(), index_end)?;
        if let Some(syncer) = syncer {
            syncer.sync_both(&self.frames, &self.index)?;
        }
        self.offset += group.bytes();
        self.next_seq = group.next_seq();
        if syncer.is_some() {
            self.was_synced();
        }
        Ok(())
    }

    /// Notes that everything appended is on disk, and lets the page cache forget what is far behind.
    fn was_synced(&mut self) {
        self.synced = (self.offset, self.next_seq);
        if self.offset - self.cached_from >= CACHED_BYTES + FORGET_BYTES {
            let len = self.offset - self.cached_from - CACHED_BYTES;
            self.frames.forget(self.cached_from, len);
            self.cached_from += len;
        }
        if self.offset >= CACHED_BYTES
            && let Some((file, from)) = self.cached_before.take()
        {
            file.forget(from, WHOLE_FILE);
        }
    }

    /// True where appended events have not been synced.
    pub fn is_unsynced(&self) -> bool {
        self.synced.1 != self.next_seq
    }

    /// Syncs what was appended without a sync.
    pub fn sync_appended(&mut self) -> io::Result<()> {
        self.sync()?;
        self.was_synced();
        Ok(())
    }

    fn sync(&self) -> io::Result<()> {
        self.frames.sync_data()?;
        self.index.sync_data()
    }

    /// After a failed sync the kernel may hold the pages for clean: writes what was appended since the
    /// last good sync once more, so that the next sync means something. Hold the segment's `changes`.
    pub fn rewrite_unsynced(&self) -> io::Result<()> {
        rewrite(&self.frames, self.synced.0, self.offset)?;
        let from = entry::position(self.first, self.synced.1);
        rewrite(
            &self.index,
            from,
            entry::position(self.first, self.next_seq),
        )
    }

    /// Cuts what a failed append left behind the last good event.
    pub fn cut_back(&mut self) -> io::Result<()> {
        self.space = Space::Wanted(Some(Instant::now() + ALLOCATE_AGAIN_AFTER));
        self.truncate()
    }

    /// Gives back the reserved space. The segment can be appended to again.
    pub fn close(&mut self) -> io::Result<()> {
        self.space = Space::Wanted(None);
        self.truncate()
    }

    fn truncate(&self) -> io::Result<()> {
        self.frames.set_len(self.offset)?;
        self.index
            .set_len(entry::position(self.first, self.next_seq))
    }

    /// Reserves the rest of the segment, so that appends change no file size and a sync has little to
    /// write. A full disk is no error yet: there may be room for the append itself.
    fn reserve(&mut self) {
        match self.space {
            Space::Wanted(None) => {}
            Space::Wanted(Some(when)) if Instant::now() >= when => {}
            _ => return,
        }
        let index_end = entry::position(self.first, self.next_seq);
        let reserved = self
            .frames
            .allocate(self.offset, self.capacity)
            .and_then(|()| self.index.allocate(index_end, index_bytes(self.capacity)));
        self.space = match reserved {
            Ok(()) => Space::Reserved,
            Err(error) if is_unsupported(&error) => Space::Unsupported,
            Err(_) => Space::Wanted(Some(Instant::now() + ALLOCATE_AGAIN_AFTER)),
        };
    }
}

fn is_unsupported(error: &io::Error) -> bool {
    matches!(
        Errno::from_io_error(error),
        Some(Errno::OPNOTSUPP | Errno::NOSYS | Errno::INVAL)
    )
}

fn rewrite(file: &LogFile, mut from: u64, to: u64) -> io::Result<()> {
    let mut bytes = Vec::new();
    while from < to {
        bytes.resize((to - from).min(REWRITE_BYTES) as usize, 0);
        file.read_exact_at(&mut bytes, from)?;
        file.meet_held_rewrite();
        file.write_all_at(&bytes, from)?;
        from += bytes.len() as u64;
    }
    Ok(())
}
