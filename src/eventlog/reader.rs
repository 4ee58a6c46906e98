//! Reading the log: whole frames for consumers, entries with frames for rebuilding state.
//! Promises every event from its position on, once, in order, without redacted ones. Costs a position
//! and a few file handles shared with others; frames in memory belong to all readers together.

use std::io::{self, IoSlice, IoSliceMut};
use std::ops::{Range, RangeInclusive};
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use bytes::{Bytes, BytesMut};
use rustix::io::{Errno, ReadWriteFlags, preadv2};

use super::disk::is_disk_error;
use super::entry::{self, ENTRY_BYTES, Entry, State};
use super::segment::{Files, Segment, read_frame};
use super::stretch::Stretch;
use super::{EventLog, wire};

/// Entries per read of the index.
const ENTRIES_PER_READ: usize = 128;
/// Stretches that one offer gathers.
const MAX_PIECES: usize = 32;

/// Why a reader cannot continue.
#[derive(Debug, thiserror::Error)]
pub enum ReadError {
    #[error("position {position} has left the window, which begins at {oldest}")]
    TooSlow { position: u64, oldest: u64 },
    #[error("event {seq} was redacted after a part of it was sent")]
    Redacted { seq: u64 },
    #[error("event {seq} cannot be read: {source}")]
    Io { seq: u64, source: io::Error },
}

/// A position in the log. Holds no frames between two calls.
#[derive(Debug, Clone)]
pub struct Reader {
    log: EventLog,
    /// The next event, or the one of which a part was given out.
    next: u64,
    /// Bytes of that event's frame that were given out.
    given: usize,
    events: u64,
    open: Option<(Arc<Segment>, Arc<Files>)>,
    /// Read from the disk for the next call.
    warmed: Option<Arc<Stretch>>,
}

/// What is offered at a time.
#[derive(Debug)]
pub struct Frames<'a> {
    slices: Vec<IoSlice<'a>>,
    runs: Vec<Range<u64>>,
}

impl<'a> Frames<'a> {
    /// Most runs that are offered at a time.
    pub const MAX_RUNS: usize = MAX_PIECES;

    /// The bytes, in order.
    pub fn slices(&self) -> &[IoSlice<'a>] {
        &self.slices
    }

    /// Which events those are: runs of consecutive ones, between which nothing is served. The first event's frame may
    /// have been begun before.
    pub fn runs(&self) -> &[Range<u64>] {
        &self.runs
    }

    /// How many bytes those are.
    pub fn bytes(&self) -> usize {
        self.slices.iter().map(|part| part.len()).sum()
    }

    fn push(&mut self, slice: &'a [u8], run: Range<u64>) {
        self.slices.push(IoSlice::new(slice));
        match self.runs.last_mut() {
            Some(last) if last.end == run.start => last.end = run.end,
            _ => self.runs.push(run),
        }
    }
}

/// What became of an offer.
#[derive(Debug)]
pub enum Offer {
    /// So many bytes were taken.
    Taken(usize),
    /// They were not taken.
    Refused(io::Error),
    /// There is no event yet.
    Nothing,
    /// The frames are not in memory: [`Reader::warm`] fetches them.
    Cold,
}

/// How a read meets pages that are not in memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Wait {
    ForDisk,
    Never,
}

impl Reader {
    pub(super) fn new(log: EventLog, from: u64) -> Reader {
        Reader::inside(log, from, 0)
    }

    /// A reader that gave out so many bytes of its next event.
    pub(super) fn inside(log: EventLog, from: u64, given: usize) -> Reader {
        Reader {
            log,
            next: from.max(1),
            given,
            events: 0,
            open: None,
            warmed: None,
        }
    }

    /// Sequence number of the next event, or of the one of which only a part was taken.
    pub fn position(&self) -> u64 {
        self.next
    }

    /// Whether only a part of an event was taken.
    pub fn is_inside_frame(&self) -> bool {
        self.given > 0
    }

    /// How many bytes of the event at [`Reader::position`] were taken.
    pub fn given(&self) -> usize {
        self.given
    }

    /// Events taken as a whole so far, skipped ones not counted.
    pub fn events(&self) -> u64 {
        self.events
    }

    /// Offers what comes next to `write`, as it goes on the wire: whole frames, about `max` bytes of them, more only
    /// where a single frame (or what was left of it) is longer. `write` says how much it took, and must not wait:
    /// redactions are not accepted meanwhile. What it took counts as sent, nothing else is held.
    pub fn offer(
        &mut self,
        max: usize,
        write: impl FnOnce(&Frames<'_>) -> io::Result<usize>,
    ) -> Result<Offer, ReadError> {
        match self.offer_all(max, Wait::Never, write) {
            Err(ReadError::Io { source, .. }) if source.kind() == io::ErrorKind::WouldBlock => {
                Ok(Offer::Cold)
            }
            other => other,
        }
    }

    /// Reads what comes next on a blocking thread, few at a time, for the next offer of `max` bytes.
    pub async fn warm(&mut self, max: usize) -> Result<(), ReadError> {
        let position = self.next;
        let failed = |error| ReadError::Io {
            seq: position,
            source: error,
        };
        let log = self.log.clone();
        let permit = log.shared.stretches.disk_reads.acquire().await;
        let _permit = permit.map_err(|closed| failed(io::Error::other(closed)))?;
        let mut reader = self.clone();
        let task = tokio::task::spawn_blocking(move || {
            let head = reader.log.head();
            let stretch = reader.stretch(reader.next, max, head, Wait::ForDisk)?;
            reader.warmed = Some(stretch);
            Ok(reader)
        });
        *self = match task.await {
            Ok(result) => result?,
            Err(error) => return Err(failed(io::Error::other(error))),
        };
        Ok(())
    }

    /// Appends whole frames to `out`: about `max` bytes of them, more only where a single frame is
    /// longer, as they go on the wire. Returns the sequence numbers passed, of which redacted ones added
    /// no bytes; `None` where there is no event yet. Waits for the disk.
    pub fn next(
        &mut self,
        out: &mut BytesMut,
        max: usize,
    ) -> Result<Option<RangeInclusive<u64>>, ReadError> {
        let first = self.next;
        let copy = |frames: &Frames<'_>| {
            let parts = frames.slices().iter();
            parts.for_each(|part| out.extend_from_slice(part));
            Ok(frames.bytes())
        };
        self.offer_all(max, Wait::ForDisk, copy)?;
        Ok((self.next > first).then(|| first..=self.next - 1))
    }

    fn offer_all(
        &mut self,
        max: usize,
        wait: Wait,
        write: impl FnOnce(&Frames<'_>) -> io::Result<usize>,
    ) -> Result<Offer, ReadError> {
        let mut found = Vec::new();
        loop {
            let (max, head) = self.bounds(max)?;
            self.find(&mut found, max, head, wait)?;
            if found.is_empty() {
                return Ok(Offer::Nothing);
            }
            let hold = self.log.shared.stretches.hold();
            if !found.iter().all(|stretch| hold.allows(stretch)) {
                continue;
            }
            let offered = self.frames(&found, max);
            let taken = match write(&offered) {
                Ok(taken) => taken,
                Err(error) => return Ok(Offer::Refused(error)),
            };
            drop(hold);
            self.advance(&found, taken);
            return Ok(Offer::Taken(taken));
        }
    }

    /// How many bytes may be given out, and the head. Of what left the window that is no more than the rest of the
    /// frame that was begun.
    fn bounds(&self, max: usize) -> Result<(usize, u64), ReadError> {
        let (oldest, head) = self.log.window();
        let position = self.next;
        match (position < oldest, self.given) {
            (false, _) => Ok((max, head)),
            (true, 0) => Err(ReadError::TooSlow { position, oldest }),
            (true, _) => Ok((0, head)),
        }
    }

    /// Stretches with frames from the position on, about `max` bytes together. Passes what is not served in front.
    fn find(
        &mut self,
        found: &mut Vec<Arc<Stretch>>,
        max: usize,
        head: u64,
        wait: Wait,
    ) -> Result<(), ReadError> {
        found.clear();
        let (mut at, mut bytes) = (self.next, 0);
        while at <= head && (found.is_empty() || bytes < max) && found.len() < MAX_PIECES {
            let stretch = match self.stretch(at, max, head, wait) {
                Ok(stretch) => stretch,
                // What was found before stands; the next call meets the obstacle.
                Err(_) if !found.is_empty() => break,
                Err(error) => return Err(error),
            };
            let start = stretch.start(at);
            at = stretch.next;
            if found.is_empty() {
                if stretch.first > self.next && self.given > 0 {
                    return Err(ReadError::Redacted { seq: self.next });
                }
                if start == stretch.bytes.len() {
                    self.next = at;
                    continue;
                }
            }
            bytes += stretch.bytes.len() - start;
            found.push(stretch);
        }
        Ok(())
    }

    /// What there is to be sent of these stretches.
    fn frames<'a>(&self, found: &'a [Arc<Stretch>], max: usize) -> Frames<'a> {
        let mut frames = Frames {
            slices: Vec::with_capacity(found.len()),
            runs: Vec::with_capacity(1),
        };
        let (mut at, mut given, mut left) = (self.next, self.given, max);
        for stretch in found {
            let from = stretch.start(at) + given;
            let range = stretch.whole_frames(from, left, frames.slices.is_empty());
            let whole = range.end == stretch.bytes.len();
            left = left.saturating_sub(range.len());
            if !range.is_empty() {
                let run = at.max(stretch.first)..stretch.first + stretch.frames_before(range.end);
                frames.push(&stretch.bytes[range], run);
            }
            if !whole {
                break;
            }
            (at, given) = (stretch.next, 0);
        }
        frames
    }

    /// Moves on by what was taken of these stretches.
    fn advance(&mut self, found: &[Arc<Stretch>], mut taken: usize) {
        for stretch in found {
            let start = stretch.start(self.next);
            let end = start + self.given + taken;
            let passed = stretch.frames_before(start);
            if end >= stretch.bytes.len() {
                taken = end - stretch.bytes.len();
                self.events += stretch.ends.len() as u64 - passed;
                (self.next, self.given) = (stretch.next, 0);
            } else {
                let whole = stretch.frames_before(end);
                self.events += whole - passed;
                self.next = stretch.first + whole;
                self.given = end - stretch.start(self.next);
                taken = 0;
            }
            if taken == 0 {
                return;
            }
        }
        debug_assert_eq!(taken, 0, "no more is taken than was offered");
    }

    /// The stretch that holds the position `at`: one that is in memory, or about `max` bytes from there on.
    fn stretch(
        &mut self,
        at: u64,
        max: usize,
        head: u64,
        wait: Wait,
    ) -> Result<Arc<Stretch>, ReadError> {
        let warmed = self.warmed.take();
        let warmed = warmed.filter(|stretch| (stretch.from..stretch.next).contains(&at));
        let stretches = &self.log.shared.stretches;
        if let Some(stretch) = warmed.or_else(|| stretches.find(at)) {
            // Who is served from memory must not keep the files of a segment that goes.
            if self
                .open
                .as_ref()
                .is_some_and(|(open, _)| open.first != stretch.segment)
            {
                self.open = None;
            }
            return Ok(stretch);
        }
        let epoch = stretches.epoch();
        let (segment, files) = self.enter(at)?;
        let failed = |source| ReadError::Io { seq: at, source };
        let _gate = segment.gate.read();
        if segment.is_emptied() {
            return Err(self.too_slow(at));
        }
        let place = self.place(&segment, &files, at, max as u64, head, wait);
        let place = place.map_err(failed)?;
        let len = place.ends.last().copied().unwrap_or(0);
        let stretches = &self.log.shared.stretches;
        let mut bytes = stretches.buffer(len as usize);
        let read = self
            .log
            .shared
            .meet_bad_sector(segment.first, place.offset..place.offset + u64::from(len))
            .and_then(|()| read_at(&files.frames, &mut bytes, place.offset, wait));
        read.map_err(|error| {
            if is_disk_error(&error) {
                self.log.shared.suspect(place.first..place.next);
            }
            failed(error)
        })?;
        let stretch = Arc::new(Stretch {
            from: at,
            first: place.first,
            next: place.next,
            segment: segment.first,
            ends: place.ends,
            bytes,
            epoch,
        });
        stretches.keep(&stretch);
        Ok(stretch)
    }

    /// The segment of `position` was removed.
    fn too_slow(&self, position: u64) -> ReadError {
        let (oldest, _) = self.log.window();
        ReadError::TooSlow { position, oldest }
    }

    /// The segment of an event, opened.
    pub(super) fn enter(&mut self, position: u64) -> Result<(Arc<Segment>, Arc<Files>), ReadError> {
        let too_slow = |oldest| ReadError::TooSlow { position, oldest };
        if self.given > 0
            && let Some((segment, files)) = &self.open
            && (segment.first..=segment.last(u64::MAX)).contains(&position)
        {
            return Ok((segment.clone(), files.clone()));
        }
        let segment = self.log.shared.segment_of(position).map_err(too_slow)?;
        if let Some((entered, files)) = &self.open
            && Arc::ptr_eq(entered, &segment)
        {
            return Ok((segment, files.clone()));
        }
        let files = match segment.files() {
            Ok(files) => files,
            // Removed between the look and the opening.
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                return Err(self.too_slow(position));
            }
            Err(source) => {
                return Err(ReadError::Io {
                    seq: position,
                    source,
                });
            }
        };
        self.open = Some((segment.clone(), files.clone()));
        Ok((segment, files))
    }

    /// Where the frames lie that follow each other from `at` on: up to `max` bytes, at least one frame, none where
    /// nothing is served up to the end.
    fn place(
        &self,
        segment: &Segment,
        files: &Files,
        at: u64,
        max: u64,
        head: u64,
        wait: Wait,
    ) -> io::Result<Place> {
        let last = segment.last(head);
        let mut place = Place::at(at);
        let mut block = [0; ENTRIES_PER_READ * ENTRY_BYTES as usize];
        while place.next <= last {
            let count = (last - place.next + 1).min(ENTRIES_PER_READ as u64) as usize;
            let block = &mut block[..count * ENTRY_BYTES as usize];
            let position = entry::position(segment.first, place.next);
            match read_at(&files.index, block, position, wait) {
                Err(_) if !place.ends.is_empty() => return Ok(place),
                other => other?,
            }
            let (entries, _) = block.as_chunks::<{ ENTRY_BYTES as usize }>();
            for bytes in entries {
                let served = self.sent(files, decode(bytes, place.next))?;
                if !place.take(served, max) {
                    return Ok(place);
                }
            }
        }
        Ok(place)
    }

    /// The entry, where its frame may be sent.
    pub(super) fn sent(&self, files: &Files, entry: Option<Entry>) -> io::Result<Option<Entry>> {
        self.served(files, entry.filter(Entry::may_be_sent))
    }

    /// The entry, where its frame may be read.
    pub(super) fn served(&self, files: &Files, entry: Option<Entry>) -> io::Result<Option<Entry>> {
        let Some(entry) = entry.filter(|entry| entry.state == State::Served) else {
            return Ok(None);
        };
        let covered = self.log.shared.redactions.cover(files, &entry)?;
        Ok((!covered).then_some(entry))
    }
}

/// Where frames lie that follow each other, and their sequence numbers.
struct Place {
    offset: u64,
    first: u64,
    next: u64,
    ends: Vec<u32>,
}

impl Place {
    fn at(position: u64) -> Place {
        Place {
            offset: 0,
            first: position,
            next: position,
            ends: Vec::new(),
        }
    }

    /// Adds the next event, `None` where it is not served; false where that is the end.
    fn take(&mut self, served: Option<Entry>, max: u64) -> bool {
        let end = self.ends.last().copied();
        match (served, end) {
            (None, None) => self.first += 1,
            (None, Some(_)) => return false,
            (Some(entry), None) => {
                self.offset = entry.offset;
                self.ends.push(entry.len);
            }
            (Some(entry), Some(end)) => {
                if u64::from(end) + u64::from(entry.len) > max {
                    return false;
                }
                self.ends.push(end + entry.len);
            }
        }
        self.next += 1;
        true
    }
}

/// The entry of `seq`. A damaged one costs its event, not the stream.
fn decode(bytes: &[u8; ENTRY_BYTES as usize], seq: u64) -> Option<Entry> {
    let entry = Entry::decode(bytes).filter(|entry| entry.seq == seq);
    if entry.is_none() {
        tracing::warn!(seq, "the index entry of an event is damaged; left out");
    }
    entry
}

/// Fills `out` from `offset`. With [`Wait::Never`], fails with `WouldBlock` where a page is not in
/// memory; file systems that cannot tell are read plainly.
fn read_at(file: &std::fs::File, out: &mut [u8], offset: u64, wait: Wait) -> io::Result<()> {
    if wait == Wait::ForDisk || out.is_empty() {
        return file.read_exact_at(out, offset);
    }
    match preadv2(
        file,
        &mut [IoSliceMut::new(out)],
        offset,
        ReadWriteFlags::NOWAIT,
    ) {
        Ok(read) if read == out.len() => Ok(()),
        Ok(_) | Err(Errno::AGAIN) => Err(io::ErrorKind::WouldBlock.into()),
        Err(Errno::OPNOTSUPP | Errno::NOSYS | Errno::INVAL) => file.read_exact_at(out, offset),
        Err(error) => Err(error.into()),
    }
}

/// Events of the log with what is known of them; see [`EventLog::entries`].
#[derive(Debug)]
pub struct Entries {
    reader: Reader,
    until: u64,
    /// Whether events whose frames are gone are given, with empty frames.
    all: bool,
}

impl Entries {
    pub(super) fn new(log: EventLog, from: u64) -> Entries {
        let (oldest, until) = log.window();
        Entries {
            reader: Reader::new(log, from.max(oldest)),
            until,
            all: false,
        }
    }

    /// Gives redacted and damaged events, too, with empty frames: they were durable, and their hosts may send them
    /// again.
    pub fn and_redacted(self) -> Entries {
        Entries { all: true, ..self }
    }

    /// The next event to be looked at. Above what was asked for where that has left the window.
    pub fn position(&self) -> u64 {
        self.reader.next
    }

    /// The event at the reader's position; `None` where it is skipped.
    fn event(&mut self) -> Result<Option<(Entry, Bytes)>, ReadError> {
        let seq = self.reader.next;
        let failed = |source| ReadError::Io { seq, source };
        let (segment, files) = self.reader.enter(seq)?;
        let _gate = segment.gate.read();
        if segment.is_emptied() {
            return Err(self.reader.too_slow(seq));
        }
        let entry = segment.entry(&files, seq).map_err(failed)?;
        self.reader.next += 1;
        let gone = entry.filter(|entry| self.all && !entry.is_absent());
        let gone = gone.map(|entry| (entry, Bytes::new()));
        let served = self.reader.served(&files, entry).map_err(failed)?;
        let Some(entry) = served else {
            return Ok(gone);
        };
        let frame = self
            .reader
            .log
            .shared
            .meet_bad_sector(segment.first, entry.offset..entry.end())
            .and_then(|()| read_frame(&files, &entry));
        let frame = match frame {
            Err(error) if is_disk_error(&error) => {
                tracing::warn!(
                    seq,
                    "the disk does not give the frame of an event; left out"
                );
                return Ok(gone);
            }
            frame => frame.map_err(failed)?,
        };
        if crc32fast::hash(&frame) != entry.frame_crc {
            tracing::warn!(seq, "the frame of an event is damaged; left out");
            return Ok(gone);
        }
        let frame = Bytes::from(frame);
        Ok(wire::payload(&frame).map(|payload| (entry, frame.slice_ref(payload))))
    }
}

impl Iterator for Entries {
    type Item = Result<(Entry, Bytes), ReadError>;

    fn next(&mut self) -> Option<Self::Item> {
        while self.reader.next <= self.until {
            match self.event() {
                Ok(Some(event)) => return Some(Ok(event)),
                Ok(None) => {}
                Err(error) => {
                    self.until = 0;
                    return Some(Err(error));
                }
            }
        }
        None
    }
}
