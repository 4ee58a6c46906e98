//! A log seen from beside, for tools: what its folder holds and each event in it. Takes no lock and
//! changes nothing, so a relay may append to the log, redact in it and remove segments meanwhile.
//! Promises nothing about events that come after the folder was opened.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use super::account_index;
use super::disk::read_up_to;
use super::entry::{self, ENTRY_BYTES, Entry, HEADER_BYTES, State};
use super::redaction::Redactions;
use super::segment::{Files, Segment, frames_path, index_path, read_frame};
use super::{LogError, listing, rebuild, wire};
use crate::atproto::did::Did;
use crate::atproto::frame::Kind;

/// Index entries read at a time.
const ENTRIES_PER_READ: u64 = 4096;
/// A file's blocks are counted in this unit (stat(2)), whatever the file system's own are.
const STAT_BLOCK: u64 = 512;
/// How often an entry that is being written is read again, and the pause in between.
const TAIL_LOOKS: u32 = 50;
const TAIL_PAUSE: Duration = Duration::from_millis(2);

/// The folder of a log, with the segments it had when it was opened.
#[derive(Debug)]
pub struct Folder {
    pub(super) dir: Arc<Path>,
    /// First sequence numbers, ascending; never empty.
    pub(super) firsts: Vec<u64>,
    /// Where the last segment ended.
    end: u64,
}

/// What became of an event's frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fate {
    /// Consumers get it.
    Served,
    /// Taken down or deleted, or about to be.
    Redacted,
    /// Lost on disk.
    Damaged,
}

impl Fate {
    pub fn as_str(self) -> &'static str {
        match self {
            Fate::Served => "served",
            Fate::Redacted => "redacted",
            Fate::Damaged => "damaged",
        }
    }
}

/// An event as it lies in the folder.
#[derive(Debug)]
pub struct Event {
    pub seq: u64,
    /// `None` where the index entry cannot be read.
    pub entry: Option<Entry>,
    pub fate: Fate,
    /// The WebSocket frame, for events that are served.
    pub frame: Option<Vec<u8>>,
}

impl Event {
    /// The account, read from the frame.
    pub fn did(&self) -> Option<Did> {
        let facts = rebuild::Facts::of(wire::payload(self.frame.as_ref()?)?)?;
        Some(facts.did)
    }

    /// Length of the WebSocket frame, also of one that is gone.
    pub fn frame_bytes(&self) -> Option<u32> {
        self.entry.map(|entry| entry.len)
    }
}

/// What a folder holds, in figures.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Summary {
    pub segments: u64,
    /// Sequence numbers of the first and the last event; `None` of an empty log.
    pub window: Option<(u64, u64)>,
    /// When they were appended, in microseconds since 1970.
    pub times_us: Option<(u64, u64)>,
    /// Sequence numbers taken, those of redacted and lost events included.
    pub events: u64,
    /// Events of each kind, in the order of [`Kind::ALL`].
    pub kinds: [u64; Kind::ALL.len()],
    pub redacted: u64,
    pub damaged: u64,
    /// Bytes of all frames, those included that are redacted.
    pub frame_bytes: u64,
    /// Bytes of the index entries.
    pub index_bytes: u64,
    /// Bytes that all files of segments take on disk: with what is reserved, without holes.
    pub allocated_bytes: u64,
    /// Redactions that hold, but are not yet punched out.
    pub redactions_pending: u64,
}

impl Folder {
    /// Looks into a log's folder.
    pub fn open(dir: &Path) -> Result<Folder, LogError> {
        let listed = match listing::list(dir) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                return Err(LogError::NoFolder(dir.to_owned()));
            }
            other => other.map_err(LogError::io("reading the log folder", dir))?,
        };
        let firsts = listed.segments();
        let Some(last) = firsts.last().copied() else {
            return Err(LogError::NotALog(dir.to_owned()));
        };
        let mut folder = Folder {
            dir: Arc::from(dir),
            firsts,
            end: last,
        };
        folder.end = folder
            .written_end(last)
            .map_err(LogError::io("reading", &index_path(dir, last)))?;
        Ok(folder)
    }

    /// The folder itself.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// How many segments it had.
    pub fn segments(&self) -> usize {
        self.firsts.len()
    }

    /// Counts everything. Reads the whole index and no frames.
    pub fn summary(&self) -> Result<Summary, LogError> {
        let mut summary = Summary {
            redactions_pending: Redactions::load(&self.dir)?.pending() as u64,
            ..Summary::default()
        };
        for part in self.parts() {
            let path = index_path(&self.dir, part.segment.first);
            summary.add(&part).map_err(LogError::io("reading", &path))?;
        }
        Ok(summary)
    }

    /// Events from `from` on, in order, one sequence number after the other as far as segments hold them.
    pub fn events(&self, from: u64) -> Events<'_> {
        let at = self.firsts.partition_point(|first| *first <= from);
        Events {
            folder: self,
            from,
            next_part: at.saturating_sub(1),
            open: None,
            redactions: Redactions::default(),
        }
    }

    /// The segments that are still there, oldest first.
    pub(super) fn parts(&self) -> impl Iterator<Item = Part> + '_ {
        (0..self.firsts.len()).map(|at| self.part(at))
    }

    fn part(&self, at: usize) -> Part {
        let first = self.firsts[at];
        let until = self.firsts.get(at + 1).copied();
        let end = until.unwrap_or(self.end);
        Part {
            segment: Segment::new(self.dir.clone(), first, end.saturating_sub(1)),
            until,
            end,
        }
    }

    /// Where the entries of the last segment end that are written by now. What is just being written is
    /// waited for, so that it does not look damaged.
    fn written_end(&self, first: u64) -> io::Result<u64> {
        for _ in 0..TAIL_LOOKS {
            let index = match File::open(index_path(&self.dir, first)) {
                // Begun a moment ago, or lost.
                Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(first),
                other => other?,
            };
            let end = end_of_entries(&index, first)?;
            let last = end.checked_sub(1).filter(|last| *last >= first);
            let Some(last) = last else {
                return Ok(end);
            };
            if read_entry(&index, first, last)?.is_some() {
                return Ok(end);
            }
            thread::sleep(TAIL_PAUSE);
        }
        // It is damaged indeed.
        end_of_entries(&File::open(index_path(&self.dir, first))?, first)
    }
}

/// A segment of the folder.
#[derive(Debug)]
pub(super) struct Part {
    pub segment: Segment,
    /// Where the next segment begins, if there is one.
    pub until: Option<u64>,
    /// Behind the last event that it can hold.
    end: u64,
}

impl Part {
    /// The files; `None` where retention has removed them meanwhile, or the segment is just being begun.
    pub fn files(&self) -> io::Result<Option<Arc<Files>>> {
        match self.segment.files() {
            Ok(files) => Ok(Some(files)),
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            Err(_) if self.is_coming_or_going()? => Ok(None),
            // What was just begun may be there by now.
            Err(_) => self.segment.files().map(Some),
        }
    }

    /// The last segment has its frames for a moment before its index, and nothing in them. Retention removes frames before
    /// their index, and the oldest segment first: without frames, and with nothing older around, this one is out of the
    /// window.
    fn is_coming_or_going(&self) -> io::Result<bool> {
        let (dir, first) = (&self.segment.dir, self.segment.first);
        match fs::metadata(frames_path(dir, first)) {
            Ok(frames) => Ok(self.until.is_none() && frames.len() == 0),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                let there = listing::list(dir)?.segments();
                Ok(there.first().is_none_or(|oldest| *oldest > first))
            }
            Err(error) => Err(error),
        }
    }

    /// The index entries from `from` on, as far as there are any.
    pub fn slots(&self, files: Arc<Files>, from: u64) -> io::Result<Slots> {
        let first = self.segment.first;
        Ok(Slots {
            end: end_of_entries(&files.index, first)?.min(self.end),
            files,
            first,
            next: from.max(first),
            block: Vec::new(),
            used: 0,
        })
    }
}

/// The entries of an index, one for every sequence number.
#[derive(Debug)]
pub(super) struct Slots {
    pub files: Arc<Files>,
    first: u64,
    next: u64,
    end: u64,
    block: Vec<u8>,
    used: usize,
}

impl Slots {
    /// The next sequence number and its entry, if that can be read.
    pub fn next(&mut self) -> io::Result<Option<(u64, Option<Entry>)>> {
        if self.next >= self.end {
            return Ok(None);
        }
        if self.is_at_block() {
            let count = (self.end - self.next).min(ENTRIES_PER_READ);
            self.block.clear();
            self.block.resize((count * ENTRY_BYTES) as usize, 0);
            self.used = 0;
            let at = entry::position(self.first, self.next);
            read_up_to(&self.files.index, &mut self.block, at)?;
        }
        let (slots, _) = self.block[self.used..].as_chunks();
        let entry = slots.first().and_then(Entry::decode);
        let seq = self.next;
        self.used += ENTRY_BYTES as usize;
        self.next += 1;
        Ok(Some((seq, entry.filter(|entry| entry.seq == seq))))
    }

    /// The entry of `seq` as it is by now.
    pub fn look_again(&self, seq: u64) -> io::Result<Option<Entry>> {
        read_entry(&self.files.index, self.first, seq)
    }

    /// True where the next call reads from the file.
    fn is_at_block(&self) -> bool {
        self.used == self.block.len()
    }
}

/// The entry of `seq` as it is now.
pub(super) fn read_entry(index: &File, first: u64, seq: u64) -> io::Result<Option<Entry>> {
    let mut bytes = [0; ENTRY_BYTES as usize];
    read_up_to(index, &mut bytes, entry::position(first, seq))?;
    Ok(Entry::decode(&bytes).filter(|entry| entry.seq == seq))
}

/// The sequence number behind the last entry that was written. Reads from the end, where an index that
/// is written to has zeros.
pub(super) fn end_of_entries(index: &File, first: u64) -> io::Result<u64> {
    let entries = index.metadata()?.len().saturating_sub(HEADER_BYTES) / ENTRY_BYTES;
    let mut end = entries;
    let mut block = Vec::new();
    while end > 0 {
        let count = end.min(ENTRIES_PER_READ);
        block.clear();
        block.resize((count * ENTRY_BYTES) as usize, 0);
        let at = entry::position(first, first + end - count);
        read_up_to(index, &mut block, at)?;
        let (slots, _) = block.as_chunks::<{ ENTRY_BYTES as usize }>();
        if let Some(last) = slots.iter().rposition(|slot| *slot != [0; _]) {
            return Ok(first + end - count + last as u64 + 1);
        }
        end -= count;
    }
    Ok(first)
}

impl Summary {
    fn add(&mut self, part: &Part) -> io::Result<()> {
        let Some(files) = part.files()? else {
            return Ok(());
        };
        self.segments += 1;
        for file in [&files.frames, &files.index] {
            self.allocated_bytes += file.metadata()?.blocks() * STAT_BLOCK;
        }
        let (dir, first) = (&part.segment.dir, part.segment.first);
        // It may be on its way.
        if let Ok(accounts) = fs::metadata(account_index::path(dir, first)) {
            self.allocated_bytes += accounts.blocks() * STAT_BLOCK;
        }
        let mut slots = part.slots(files, part.segment.first)?;
        while let Some((seq, entry)) = slots.next()? {
            self.index_bytes += ENTRY_BYTES;
            if entry.is_some_and(|entry| entry.is_absent()) {
                continue;
            }
            self.events += 1;
            let (oldest, _) = self.window.unwrap_or((seq, seq));
            self.window = Some((oldest, seq));
            let Some(entry) = entry else {
                self.damaged += 1;
                continue;
            };
            let (began, _) = self.times_us.unwrap_or((entry.time_us, entry.time_us));
            self.times_us = Some((began, entry.time_us));
            self.kinds[entry.kind as usize - 1] += 1;
            self.frame_bytes += u64::from(entry.len);
            match entry.state {
                State::Served | State::Absent => {}
                State::Redacted => self.redacted += 1,
                State::Damaged => self.damaged += 1,
            }
        }
        Ok(())
    }

    /// Bytes that one event costs on disk: its frame and its index entry.
    pub fn bytes_per_event(&self) -> u64 {
        (self.frame_bytes + self.index_bytes)
            .checked_div(self.events)
            .unwrap_or(0)
    }
}

/// Events of a folder; see [`Folder::events`].
#[derive(Debug)]
pub struct Events<'a> {
    folder: &'a Folder,
    from: u64,
    next_part: usize,
    open: Option<Slots>,
    /// As they were when the entries at hand were read: a relay may redact meanwhile.
    redactions: Redactions,
}

impl Events<'_> {
    fn event(&mut self) -> Result<Option<Event>, LogError> {
        loop {
            if let Some(slots) = &mut self.open {
                if slots.is_at_block() {
                    self.redactions = Redactions::load(&self.folder.dir)?;
                }
                let path = frames_path(&self.folder.dir, slots.first);
                let event = next_event(slots, &self.redactions);
                match event.map_err(LogError::io("reading", &path))? {
                    Some(event) => return Ok(Some(event)),
                    None => self.open = None,
                }
            }
            if self.next_part == self.folder.firsts.len() {
                return Ok(None);
            }
            let part = self.folder.part(self.next_part);
            self.next_part += 1;
            let files = part.files();
            let slots =
                files.and_then(|files| files.map(|it| part.slots(it, self.from)).transpose());
            let path = frames_path(&self.folder.dir, part.segment.first);
            self.open = slots.map_err(LogError::io("opening", &path))?;
        }
    }
}

impl Iterator for Events<'_> {
    type Item = Result<Event, LogError>;

    fn next(&mut self) -> Option<Self::Item> {
        let event = self.event().transpose();
        if let Some(Err(_)) = event {
            self.open = None;
            self.next_part = self.folder.firsts.len();
        }
        event
    }
}

fn next_event(slots: &mut Slots, redactions: &Redactions) -> io::Result<Option<Event>> {
    let (seq, entry) = loop {
        match slots.next()? {
            Some((_, Some(entry))) if entry.is_absent() => {}
            Some(slot) => break slot,
            None => return Ok(None),
        }
    };
    let event = |entry, fate, frame| Event {
        seq,
        entry,
        fate,
        frame,
    };
    let Some(found) = entry else {
        return Ok(Some(event(None, Fate::Damaged, None)));
    };
    Ok(Some(match found.state {
        State::Redacted => event(entry, Fate::Redacted, None),
        State::Damaged | State::Absent => event(entry, Fate::Damaged, None),
        State::Served if redactions.cover(&slots.files, &found).unwrap_or(false) => {
            event(entry, Fate::Redacted, None)
        }
        State::Served => match read_frame(&slots.files, &found) {
            Ok(frame) if crc32fast::hash(&frame) == found.frame_crc => {
                event(entry, Fate::Served, Some(frame))
            }
            // Redacted since its entry was read, or damaged.
            _ => match slots.look_again(seq)? {
                Some(now) if now.state == State::Redacted => event(Some(now), Fate::Redacted, None),
                _ => event(entry, Fate::Damaged, None),
            },
        },
    }))
}
