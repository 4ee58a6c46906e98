//! A segment checked event by event against its index: the entries that stand, and how the index on the disk differs.
//! Promises that numbers of events which others may have seen stay taken. Changes nothing before [`Checked::apply`].

use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::FileExt;
use std::path::Path;

use super::account_index::{self, short_hash};
use super::disk::LogFile;
use super::entry::{self, ENTRY_BYTES, Entry, HEADER_BYTES, Origin, State, now_us};
use super::numbers::MAX_ABSENT;
use super::rebuild::RawFrames;
use super::segment::{frames_path, index_path};
use crate::atproto::frame::Kind;

/// Events that may be lost at the end of a segment before what lies before it is given up, too. Bounds
/// what a foreign file name can make us write.
const MAX_LOST: u64 = 1 << 20;
/// No WebSocket frame of an event is shorter than a DID, a sequence number, a time and their names.
const MIN_FRAME_BYTES: u64 = 64;
/// Disks write whole sectors of at least this many bytes.
const SECTOR: u64 = 512;
/// Fewer zeros in the part of a sector that a frame has do not say that the sector was not written.
const MIN_ZEROS: usize = 16;

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
        frames: RawFrames {
            file: frames.as_ref(),
            len: frames_len,
        },
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
                State::Served | State::Redacted | State::Absent => changes.rebuilt += 1,
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
    frames: RawFrames<'a>,
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
                    entries.push(match self.frames.rebuild(at, seq..=seq)? {
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

    /// The last segment has lost events that were published: logs which, and keeps their numbers.
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
        // Frames lie back to back: the numbers that are missing between two of them were left out when they were given.
        let highest = last.min(seq.saturating_add(MAX_ABSENT));
        if let Some(entry) = self.frames.rebuild(at, seq..=highest)? {
            entries.extend((seq..entry.seq).map(|absent| Entry::absent(absent, at)));
            entries.push(entry);
            return Ok(true);
        }
        // Whole frames are punched out, so that what follows the zeros is the beginning of a frame.
        let Some(zeros) = self.frames.zeros(at)? else {
            return Ok(false);
        };
        let most = zeros / MIN_FRAME_BYTES;
        let last = last.min(seq.saturating_add(most));
        let Some(entry) = self.frames.rebuild(at + zeros, seq + 1..=last)? else {
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

    fn compare(&self, entry: &Entry, buffer: &mut Vec<u8>) -> io::Result<Verdict> {
        if entry.state != State::Served {
            return Ok(Verdict::Good);
        }
        let Some(frames) = self.frames.file else {
            return Ok(Verdict::Damaged);
        };
        if entry.end() > self.frames.len {
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
