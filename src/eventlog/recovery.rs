//! Opening a log after whatever happened to it: one owner, the torn tail cut, damage contained.
//! Promises that sequence numbers which were given stay given. Checks the last segment in depth and
//! older ones by name and size, so that a full window opens in a moment.
//!
//! What the last segment may look like, and what becomes of it:
//! * entries that were never written whole, and frames behind them: cut, nobody has seen them;
//! * the last entries, where a sector of the frame never reached the disk: cut likewise;
//! * an entry that was written and damaged since, or an index that is gone: rebuilt from the frames,
//!   whose blocks must hash to their CIDs (host and upstream seq are lost);
//! * a frame damaged since: its number stays taken, readers skip it.
//!
//! A segment that others follow has no tail to cut: what is missing from it is rebuilt or skipped. So it is with the
//! last one up to the event that was published last, where the mark tells which.

use std::collections::VecDeque;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::ops::RangeInclusive;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;

use super::account_index::{self, short_hash};
use super::disk::{LogFile, read_up_to, sync_folder};
use super::entry::{self, ENTRY_BYTES, Entry, HEADER_BYTES, Origin, State, now_us};
use super::segment::{Segment, Writer, frames_path, index_path};
use super::{LogError, LogOptions, wire};
use crate::atproto::car::Car;
use crate::atproto::did::Did;
use crate::atproto::frame::{self, Kind, MAX_STORED_FRAME_BYTES, Message, Peek};
use crate::telemetry::metrics;

/// File whose lock says that a relay uses the folder; holds its process id.
const LOCK: &str = "lock";
const LOCK_MODE: u32 = 0o640;
/// Sequence numbers stay below it, so that every consumer counts them exactly (JavaScript does up to
/// here). A file named for a higher one is none of ours.
const SEQ_LIMIT: u64 = 1 << 53;
/// Digits of the sequence number in a segment's name.
const NAME_DIGITS: usize = 20;
/// Events that may be lost at the end of a segment before what lies before it is given up, too. Bounds
/// what a foreign file name can make us write.
const MAX_LOST: u64 = 1 << 20;
/// No WebSocket frame of an event is shorter than a DID, a sequence number, a time and their names.
const MIN_FRAME_BYTES: u64 = 64;
/// Bytes looked through at a time for what is not zero.
const BYTES_PER_LOOK: usize = 64 * 1024;
/// Disks write whole sectors of at least this many bytes.
const SECTOR: u64 = 512;
/// Fewer zeros in the part of a sector that a frame has do not say that the sector was not written.
const MIN_ZEROS: usize = 16;

/// The hold on a folder, given up when dropped.
#[derive(Debug)]
pub(super) struct FolderLock(File);

impl Drop for FolderLock {
    fn drop(&mut self) {
        // Closing alone would leave the lock to a child process that is just being started.
        let _ = flock(&self.0, FlockOperation::Unlock);
    }
}

/// Takes the folder for this process.
pub(super) fn lock_folder(dir: &Path) -> Result<FolderLock, LogError> {
    let path = dir.join(LOCK);
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .mode(LOCK_MODE)
        .open(&path)
        .map_err(LogError::io("opening the lock", &path))?;
    let mut lock = hold(file, dir)?;
    // The process id is a courtesy to whoever meets the lock: a full disk does not keep us from it.
    let _ = lock
        .0
        .set_len(0)
        .and_then(|()| writeln!(lock.0, "{}", std::process::id()));
    Ok(lock)
}

/// Keeps relays out of a folder without leaving anything in it. `None` where none has ever used it.
pub(super) fn lock_for_a_look(dir: &Path) -> Result<Option<FolderLock>, LogError> {
    let path = dir.join(LOCK);
    match File::open(&path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(LogError::io("opening the lock", &path)(error)),
        Ok(file) => hold(file, dir).map(Some),
    }
}

fn hold(mut file: File, dir: &Path) -> Result<FolderLock, LogError> {
    match flock(&file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(FolderLock(file)),
        Err(Errno::WOULDBLOCK) => {
            let mut text = String::new();
            let owner = file
                .read_to_string(&mut text)
                .ok()
                .and_then(|_| text.trim().parse().ok());
            Err(LogError::InUse {
                dir: dir.to_owned(),
                owner,
            })
        }
        Err(error) => Err(LogError::io("locking", &dir.join(LOCK))(error.into())),
    }
}

/// A log that is ready to be read and appended to.
pub(super) struct Recovered {
    pub segments: VecDeque<Arc<Segment>>,
    pub writer: Writer,
    /// When the last event was appended.
    pub last_event: SystemTime,
    /// The latest time at which an event was appended, since 1970: as far as the last segment and the ends of the others
    /// tell.
    pub newest: Duration,
}

/// Finds the segments of a folder, repairs what must be, and opens the last one for appending.
/// Everything up to `published` was seen.
pub(super) fn recover(
    dir: &Arc<Path>,
    options: &LogOptions,
    published: u64,
) -> Result<Recovered, LogError> {
    let listed = list(dir).map_err(LogError::io("reading the log folder", dir))?;
    listed
        .remove_leftovers(dir)
        .map_err(LogError::io("removing what retention left in", dir))?;
    let mut firsts = listed.segments();
    let mut last = firsts.pop().unwrap_or(1);
    let repair = |first, until| {
        check(dir, first, until, Unreadable::Refuse)
            .and_then(|checked| checked.apply(dir))
            .map_err(LogError::io("repairing", &frames_path(dir, first)))
    };
    let mut end = repair(last, Until::Published(published))?;
    if end.next_seq <= published {
        firsts.push(last);
        last = published + 1;
        end = End {
            next_seq: last,
            offset: 0,
            accounts: Vec::new(),
            ..end
        };
    }
    // Others come behind those that it tells of.
    account_index::remove(dir, last)
        .map_err(LogError::io("removing", &account_index::path(dir, last)))?;
    let open = Segment::open_with(dir.clone(), last, std::mem::take(&mut end.accounts));
    let mut segments = VecDeque::from([Arc::new(open)]);
    let mut next = last;
    for first in firsts.into_iter().rev() {
        metrics().recovery_steps.inc();
        let whole =
            is_whole(dir, first, next) || repair(first, Until::Next(next))?.next_seq == next;
        if !whole {
            tracing::warn!(
                folder = %dir.display(),
                "too many events before seq {next} are lost; the window begins at {next}, older \
                 segments stay on disk unused"
            );
            break;
        }
        segments.push_front(Arc::new(Segment::new(dir.clone(), first, next - 1)));
        next = first;
    }
    let faults = options.faults.clone();
    let writer = Writer::open(
        dir.clone(),
        faults,
        options.segment_bytes,
        last,
        end.next_seq,
        end.offset,
    )
    .map_err(LogError::io("opening", &frames_path(dir, last)))?;
    let ended = segments.iter().rev().skip(1);
    let newest = ended
        .filter_map(|segment| segment.ended_at().ok().flatten())
        .filter_map(|time| time.duration_since(SystemTime::UNIX_EPOCH).ok())
        .fold(Duration::from_micros(end.newest_us), Duration::max);
    let last_event = last_time(&segments, end.next_seq - 1).unwrap_or_else(SystemTime::now);
    Ok(Recovered {
        segments,
        writer,
        last_event,
        newest,
    })
}

/// When the last event was appended, where there is one.
fn last_time(segments: &VecDeque<Arc<Segment>>, head: u64) -> Option<SystemTime> {
    let segment = segments.iter().rev().find(|it| it.first <= head)?;
    let entry = segment.entry(&*segment.files().ok()?, head).ok()??;
    Some(SystemTime::UNIX_EPOCH + Duration::from_micros(entry.time_us))
}

/// The segments' files in a folder.
#[derive(Debug, Default)]
pub(super) struct Listed {
    /// First sequence numbers of those with frames, ascending.
    frames: Vec<u64>,
    /// Of indexes without frames, ascending.
    indexes: Vec<u64>,
    /// Of account indexes.
    account_indexes: Vec<u64>,
}

/// Looks for the segments of a folder; foreign files do not count.
pub(super) fn list(dir: &Path) -> io::Result<Listed> {
    let mut listed = Listed::default();
    for file in fs::read_dir(dir)? {
        let name = file?.file_name();
        let Some((stem, kind)) = name.to_str().and_then(|name| name.split_once('.')) else {
            continue;
        };
        let Ok(first) = stem.parse::<u64>() else {
            continue;
        };
        match kind {
            _ if stem.len() != NAME_DIGITS || !(1..SEQ_LIMIT).contains(&first) => {}
            "seg" => listed.frames.push(first),
            "idx" => listed.indexes.push(first),
            "acc" | "acc.new" => listed.account_indexes.push(first),
            _ => {}
        }
    }
    listed.frames.sort_unstable();
    let frames = &listed.frames;
    listed
        .indexes
        .retain(|first| frames.binary_search(first).is_err());
    listed.indexes.sort_unstable();
    Ok(listed)
}

impl Listed {
    /// First sequence numbers of all segments, ascending, those whose frames are lost included.
    pub fn segments(&self) -> Vec<u64> {
        let mut firsts = [self.frames.clone(), self.lost_segments()].concat();
        firsts.sort_unstable();
        firsts
    }

    /// Segments of which only the index is left. Retention removes the oldest first, so it was not it
    /// that took their frames; their sequence numbers are given.
    fn lost_segments(&self) -> Vec<u64> {
        let lost = self
            .indexes
            .iter()
            .filter(|first| !self.is_leftover(**first));
        lost.copied().collect()
    }

    /// Indexes that an interrupted removal of the oldest segment left.
    pub fn leftovers(&self) -> impl Iterator<Item = u64> {
        let left = self
            .indexes
            .iter()
            .filter(|first| self.is_leftover(**first));
        left.copied()
    }

    fn is_leftover(&self, first: u64) -> bool {
        self.frames.first().is_some_and(|oldest| first < *oldest)
    }

    /// Removes them, and account indexes that are left without a segment, or half written.
    pub fn remove_leftovers(&self, dir: &Path) -> io::Result<()> {
        for first in &self.account_indexes {
            let is_held = self.frames.binary_search(first).is_ok();
            account_index::remove_leftovers(dir, *first, is_held)?;
        }
        self.leftovers()
            .try_for_each(|first| fs::remove_file(index_path(dir, first)))
    }
}

/// True where an ended segment is as large as its name and its follower's say, and its frames reach as
/// far as its last entry does.
fn is_whole(dir: &Path, first: u64, next: u64) -> bool {
    let frames = fs::metadata(frames_path(dir, first)).map(|file| file.len());
    let (Ok(frames), Ok(index)) = (frames, File::open(index_path(dir, first))) else {
        return false;
    };
    let sized = index
        .metadata()
        .is_ok_and(|file| file.len() == entry::position(first, next));
    let mut last = [0; ENTRY_BYTES as usize];
    let read = index.read_exact_at(&mut last, entry::position(first, next - 1));
    let reaches = |last: Entry| last.seq == next - 1 && 0 < frames && last.end() <= frames;
    sized && read.is_ok() && Entry::decode(&last).is_some_and(reaches)
}

/// Makes `next` the next sequence number of a log that ends at `head`. An empty log forgets where it began.
pub(super) fn begin_at(dir: &Path, next: u64, head: u64) -> Result<(), LogError> {
    let path = frames_path(dir, next);
    let failed = LogError::io("creating", &path);
    let create = || {
        let listed = list(dir)?;
        LogFile::open(&path, None)?;
        if head == 0 {
            for first in listed.segments() {
                fs::remove_file(frames_path(dir, first))?;
            }
        }
        sync_folder(dir)
    };
    create().map_err(failed)
}

/// What is known of where a segment ends.
#[derive(Debug, Clone, Copy)]
pub(super) enum Until {
    /// Where the next segment begins: no event of this one lies behind.
    Next(u64),
    /// The last event that was published; others may follow it.
    Published(u64),
}

/// Where a repaired segment ends.
pub(super) struct End {
    pub next_seq: u64,
    pub offset: u64,
    /// The latest time of its entries.
    pub newest_us: u64,
    /// The accounts of its entries, as an account index has them.
    pub accounts: Vec<u32>,
}

/// How a segment's index differs from the entries that stand.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Changes {
    /// The header is written anew.
    pub header: bool,
    /// Entries made anew from their frames.
    pub rebuilt: u64,
    /// Events that are lost, and that readers skip from now on.
    pub damaged: Vec<u64>,
    /// Entries cut from the end, whose frames were never written whole.
    pub cut: u64,
}

/// What to make of frames that the disk does not give.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Unreadable {
    /// A start does not decide that they are lost.
    Refuse,
    Mark,
}

/// A segment as it was found, and the entries that stand.
pub(super) struct Checked {
    first: u64,
    found: Index,
    pub entries: Vec<Entry>,
    frames_len: u64,
}

/// Checks every event of a segment. Events that are missing before `until` hold their place.
pub(super) fn check(
    dir: &Path,
    first: u64,
    until: Until,
    unreadable: Unreadable,
) -> io::Result<Checked> {
    let frames = open_if_there(&frames_path(dir, first))?;
    let found = Index::read(open_if_there(&index_path(dir, first))?, first)?;
    let frames_len = match &frames {
        Some(file) => file.metadata()?.len(),
        None => 0,
    };
    let check = Check {
        frames: frames.as_ref(),
        len: frames_len,
        first,
        until,
        index: &found,
        unreadable,
    };
    let entries = check.run()?;
    Ok(Checked {
        first,
        found,
        entries,
        frames_len,
    })
}

fn open_if_there(path: &Path) -> io::Result<Option<File>> {
    match File::open(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        other => other.map(Some),
    }
}

impl Checked {
    /// Where the segment ends.
    pub fn end(&self) -> End {
        End {
            next_seq: self.first + self.entries.len() as u64,
            offset: self.entries.last().map_or(0, Entry::end),
            newest_us: self.entries.iter().map(|it| it.time_us).max().unwrap_or(0),
            accounts: self
                .entries
                .iter()
                .map(|it| short_hash(it.did_hash))
                .collect(),
        }
    }

    /// What is to be changed.
    pub fn changes(&self) -> Changes {
        let mut changes = Changes {
            header: !self.found.has_header,
            rebuilt: 0,
            damaged: Vec::new(),
            cut: self.found.slots.len().saturating_sub(self.entries.len()) as u64,
        };
        for (at, entry) in self.entries.iter().enumerate() {
            if self.found.slots.get(at).and_then(Slot::entry) == Some(entry) {
                continue;
            }
            match entry.state {
                State::Damaged => changes.damaged.push(entry.seq),
                State::Served | State::Redacted => changes.rebuilt += 1,
            }
        }
        changes
    }

    /// True where there are neither frames nor entries.
    pub fn is_new(&self) -> bool {
        self.frames_len == 0 && self.found.slots.is_empty() && self.entries.is_empty()
    }

    fn is_index_whole(&self) -> bool {
        let found = self.found.slots.iter().map(Slot::entry);
        self.found.has_header && self.entries.iter().map(Some).eq(found)
    }

    /// Writes the index anew where it differs, and cuts what lies behind the last event.
    pub fn apply(&self, dir: &Path) -> io::Result<End> {
        let frames = LogFile::open(&frames_path(dir, self.first), None)?;
        let index = LogFile::open(&index_path(dir, self.first), None)?;
        let end = self.end();
        if !self.is_index_whole() {
            if !self.is_new() {
                tracing::warn!(
                    segment = %frames_path(dir, self.first).display(),
                    "the index was not whole; events up to seq {} stand", end.next_seq - 1
                );
            }
            let mut bytes = entry::header(self.first).to_vec();
            self.entries
                .iter()
                .for_each(|entry| bytes.extend_from_slice(&entry.encode()));
            // What is brought back was not in it.
            account_index::remove(dir, self.first)?;
            index.write_all_at(&bytes, 0)?;
        }
        index.set_len(entry::position(self.first, end.next_seq))?;
        frames.set_len(end.offset)?;
        frames.sync_data()?;
        index.sync_data()?;
        Ok(end)
    }
}

/// True where a frame, which begins at `offset` in its file, lacks one of the sectors it lies in, or its
/// end: new space reads as zeros until it is written, and a copy made meanwhile may end anywhere.
fn is_torn(frame: &[u8], offset: u64) -> bool {
    if frame.ends_with(&[0; MIN_ZEROS]) {
        return true;
    }
    let first = ((SECTOR - offset % SECTOR) as usize).min(frame.len());
    let (head, rest) = frame.split_at(first);
    std::iter::once(head)
        .chain(rest.chunks(SECTOR as usize))
        .any(|part| part.len() >= MIN_ZEROS && part.iter().all(|byte| *byte == 0))
}

/// An index as it was found.
struct Index {
    has_header: bool,
    /// Up to the last one that was written.
    slots: Vec<Slot>,
}

#[derive(Clone, Copy)]
enum Slot {
    Good(Entry),
    Bad,
}

impl Slot {
    fn entry(&self) -> Option<&Entry> {
        match self {
            Slot::Good(entry) => Some(entry),
            Slot::Bad => None,
        }
    }
}

impl Index {
    fn read(file: Option<File>, first: u64) -> io::Result<Index> {
        let mut bytes = Vec::new();
        if let Some(mut file) = file {
            file.read_to_end(&mut bytes)?;
        }
        let header = &bytes[..bytes.len().min(HEADER_BYTES as usize)];
        let has_header = header == entry::header(first);
        let rest = bytes.get(HEADER_BYTES as usize..).unwrap_or_default();
        let (raw, _) = rest.as_chunks::<{ ENTRY_BYTES as usize }>();
        // Entries end in their checksum: one that was written does not end in zeros.
        let written = raw
            .iter()
            .rposition(|slot| !slot.ends_with(&[0; 4]))
            .map_or(0, |at| at + 1);
        let slots = raw[..written].iter().zip(first..).map(|(slot, seq)| {
            match Entry::decode(slot).filter(|entry| entry.seq == seq) {
                Some(entry) => Slot::Good(entry),
                None => Slot::Bad,
            }
        });
        Ok(Index {
            has_header,
            slots: slots.collect(),
        })
    }
}

/// The check of a segment's frames against its index.
struct Check<'a> {
    /// `None` where they are lost.
    frames: Option<&'a File>,
    len: u64,
    first: u64,
    until: Until,
    index: &'a Index,
    unreadable: Unreadable,
}

/// How a frame compares with its entry.
#[derive(PartialEq, Eq)]
enum Verdict {
    Good,
    Unwritten,
    Damaged,
}

impl Check<'_> {
    /// The entries that stand.
    fn run(&self) -> io::Result<Vec<Entry>> {
        let mut entries: Vec<Entry> = Vec::with_capacity(self.index.slots.len());
        // Entries up to here are kept, whatever follows.
        let mut standing = 0;
        let mut buffer = Vec::new();
        while let Some(slot) = self.index.slots.get(entries.len()).copied() {
            let at = entries.last().map_or(0, Entry::end);
            match slot {
                Slot::Good(mut entry) if entry.offset >= at => {
                    let verdict = self.compare(&entry, &mut buffer)?;
                    if verdict != Verdict::Good {
                        entry.state = State::Damaged;
                    }
                    entries.push(entry);
                    if verdict != Verdict::Unwritten {
                        standing = entries.len();
                    }
                }
                _ => {
                    let seq = self.first + entries.len() as u64;
                    entries.push(match self.rebuild(at, seq..=seq)? {
                        Some(entry) => entry,
                        None => self.placeholder(at, entries.len()),
                    });
                    standing = entries.len();
                }
            }
        }
        entries.truncate(standing);
        match self.until {
            Until::Next(next) => {
                let count = next.saturating_sub(self.first);
                entries.truncate(usize::try_from(count).unwrap_or(usize::MAX));
                self.extend(&mut entries, count)?;
            }
            Until::Published(published) => {
                if !self.index.has_header && entries.is_empty() {
                    self.rebuild_all(&mut entries)?;
                }
                self.restore(&mut entries, published)?;
            }
        }
        Ok(entries)
    }

    /// The last segment has lost events that were published: says which, and keeps their numbers.
    fn restore(&self, entries: &mut Vec<Entry>, published: u64) -> io::Result<()> {
        let found = self.first + entries.len() as u64;
        if found > published {
            return Ok(());
        }
        self.extend(entries, published + 1 - self.first)?;
        let back = entries[(found - self.first) as usize..].iter();
        let back = back.filter(|entry| entry.state != State::Damaged).count();
        let lost = published + 1 - found - back as u64;
        tracing::error!(
            from = found,
            to = published,
            lost,
            "the event log lost its end, which consumers may have seen: damage of the disk or of its file system. \
             Their numbers are not given again"
        );
        Ok(())
    }

    /// The index is gone: as many events as the frames yield.
    fn rebuild_all(&self, entries: &mut Vec<Entry>) -> io::Result<()> {
        while self.rebuild_next(entries, u64::MAX)? {}
        Ok(())
    }

    /// The segment is known to have held `count` events: what the frames do not yield is lost, and its
    /// numbers stay taken.
    fn extend(&self, entries: &mut Vec<Entry>, count: u64) -> io::Result<()> {
        if count.saturating_sub(entries.len() as u64) > MAX_LOST {
            return Ok(());
        }
        while (entries.len() as u64) < count {
            if !self.rebuild_next(entries, self.first + count - 1)? {
                let at = entries.last().map_or(0, Entry::end);
                entries.push(self.placeholder(at, entries.len()));
            }
        }
        Ok(())
    }

    /// Adds the next event that the frames yield, and holds the places of those that were punched out
    /// before it. False where there is none up to `last`.
    fn rebuild_next(&self, entries: &mut Vec<Entry>, last: u64) -> io::Result<bool> {
        let at = entries.last().map_or(0, Entry::end);
        let seq = self.first + entries.len() as u64;
        if let Some(entry) = self.rebuild(at, seq..=seq)? {
            entries.push(entry);
            return Ok(true);
        }
        // Whole frames are punched out, so that what follows the zeros is the beginning of a frame.
        let Some(zeros) = self.zeros(at)? else {
            return Ok(false);
        };
        let most = zeros / MIN_FRAME_BYTES;
        let last = last.min(seq.saturating_add(most));
        let Some(entry) = self.rebuild(at + zeros, seq + 1..=last)? else {
            return Ok(false);
        };
        let mut at = at;
        for lost in seq..entry.seq {
            let mut place = self.placeholder(at, (lost - self.first) as usize);
            place.len = u32::try_from(entry.offset - at).unwrap_or(0);
            at = place.end();
            entries.push(place);
        }
        entries.push(entry);
        Ok(true)
    }

    /// How many zeros there are from `at` on; `None` where they reach to the end of the file.
    fn zeros(&self, at: u64) -> io::Result<Option<u64>> {
        let Some(frames) = self.frames else {
            return Ok(None);
        };
        let mut block = vec![0; BYTES_PER_LOOK];
        let mut from = at;
        loop {
            let read = read_up_to(frames, &mut block, from)?;
            if let Some(end) = block[..read].iter().position(|byte| *byte != 0) {
                return Ok(Some(from - at + end as u64));
            }
            if read == 0 {
                return Ok(None);
            }
            from += read as u64;
        }
    }

    fn compare(&self, entry: &Entry, buffer: &mut Vec<u8>) -> io::Result<Verdict> {
        if entry.state != State::Served {
            return Ok(Verdict::Good);
        }
        let Some(frames) = self.frames else {
            return Ok(Verdict::Damaged);
        };
        if entry.end() > self.len {
            return Ok(Verdict::Unwritten);
        }
        buffer.resize(entry.len as usize, 0);
        match frames.read_exact_at(buffer, entry.offset) {
            Err(_) if self.unreadable == Unreadable::Mark => return Ok(Verdict::Damaged),
            other => other?,
        }
        if crc32fast::hash(buffer) == entry.frame_crc {
            return Ok(Verdict::Good);
        }
        if is_torn(buffer, entry.offset) {
            return Ok(Verdict::Unwritten);
        }
        Ok(Verdict::Damaged)
    }

    /// The entry of the frame at `at`, whose number is one of `seqs`, made from the frame itself.
    /// Nothing vouches for its bytes but their own structure and hashes, so both must hold.
    fn rebuild(&self, at: u64, seqs: RangeInclusive<u64>) -> io::Result<Option<Entry>> {
        let Some(frames) = self.frames else {
            return Ok(None);
        };
        let mut header = [0; wire::MAX_HEADER_BYTES];
        let there = self.len.saturating_sub(at).min(header.len() as u64) as usize;
        frames.read_exact_at(&mut header[..there], at)?;
        let Some((header_len, length)) = wire::read_header(&header[..there]) else {
            return Ok(None);
        };
        let end = at + header_len as u64 + length;
        if length > MAX_STORED_FRAME_BYTES as u64 || end > self.len {
            return Ok(None);
        }
        let mut bytes = vec![0; (end - at) as usize];
        frames.read_exact_at(&mut bytes, at)?;
        let frame = &bytes[header_len..];
        let facts = Facts::of(frame).filter(|facts| seqs.contains(&facts.seq) && is_sound(frame));
        let Some(facts) = facts else {
            return Ok(None);
        };
        Ok(Some(Entry {
            seq: facts.seq,
            origin: Origin::Unknown,
            did_hash: facts.did.hash64(),
            kind: facts.kind,
            time_us: now_us(),
            offset: at,
            len: bytes.len() as u32,
            frame_crc: crc32fast::hash(&bytes),
            state: State::Served,
        }))
    }

    /// An entry that holds the place of an event of which nothing is left.
    fn placeholder(&self, at: u64, slot: usize) -> Entry {
        let later = self.index.slots.iter().skip(slot).filter_map(Slot::entry);
        let next = later
            .map(|entry| entry.offset)
            .find(|offset| *offset >= at)
            .unwrap_or(at);
        Entry {
            seq: self.first + slot as u64,
            origin: Origin::Unknown,
            did_hash: 0,
            kind: Kind::Commit,
            time_us: now_us(),
            offset: at,
            len: u32::try_from(next - at).unwrap_or(0),
            frame_crc: 0,
            state: State::Damaged,
        }
    }
}

/// What a frame says of itself.
pub(super) struct Facts {
    pub seq: u64,
    pub did: Did,
    pub kind: Kind,
}

impl Facts {
    /// Reads the frame of an event; `None` where it is none.
    pub fn of(frame: &[u8]) -> Option<Facts> {
        let Peek::Event(event) = frame::peek_stored(frame).ok()? else {
            return None;
        };
        let did = std::str::from_utf8(frame.get(event.did_span)?).ok()?;
        Some(Facts {
            seq: u64::try_from(event.seq).ok()?,
            did: Did::normalized(did).ok()?,
            kind: event.kind,
        })
    }
}

/// True where the frame vouches for its own bytes: whole, and its blocks hash to their CIDs.
fn is_sound(frame: &[u8]) -> bool {
    let Ok(frame) = frame::decode_stored(frame) else {
        return false;
    };
    let blocks = match frame.message {
        Message::Commit(commit) => commit.blocks,
        Message::Sync(sync) => sync.blocks,
        Message::Identity(_) | Message::Account(_) => return true,
        Message::Info(_) | Message::Error(_) | Message::Unknown => return false,
    };
    Car::parse(blocks).is_ok_and(|car| car.verify_hashes().is_ok())
}
