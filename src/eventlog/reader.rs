//! Reading the log: whole frames for consumers, entries with frames for rebuilding state.
//! Promises every event from its position on, once, in order, without redacted ones. Costs a position
//! and a few file handles shared with others, no memory per event.

use std::io::{self, IoSliceMut};
use std::ops::RangeInclusive;
use std::os::unix::fs::FileExt;
use std::sync::{Arc, PoisonError};

use bytes::{Bytes, BytesMut};
use rustix::io::{Errno, ReadWriteFlags, preadv2};

use super::entry::{self, ENTRY_BYTES, Entry, State};
use super::segment::{Files, Segment};
use super::{EventLog, wire};

/// Entries looked at per index read.
const ENTRIES_PER_READ: usize = 128;

/// Why a reader cannot go on.
#[derive(Debug, thiserror::Error)]
pub enum ReadError {
    #[error("position {position} has left the window, which begins at {oldest}")]
    TooSlow { position: u64, oldest: u64 },
    #[error("event {seq} cannot be read: {source}")]
    Io { seq: u64, source: io::Error },
}

/// A position in the log.
#[derive(Debug, Clone)]
pub struct Reader {
    log: EventLog,
    next: u64,
    events: u64,
    open: Option<(Arc<Segment>, Arc<Files>)>,
}

/// Consecutive frames of one segment that can be sent as they lie.
struct Stretch {
    offset: u64,
    len: u64,
    /// Position behind the stretch, and behind what is skipped after it.
    next: u64,
    events: u64,
}

/// How a read meets pages that are not in memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Wait {
    ForDisk,
    Never,
}

impl Reader {
    pub(super) fn new(log: EventLog, from: u64) -> Reader {
        Reader {
            log,
            next: from.max(1),
            events: 0,
            open: None,
        }
    }

    /// Sequence number of the next event.
    pub fn position(&self) -> u64 {
        self.next
    }

    /// Events read so far, skipped ones not counted.
    pub fn events(&self) -> u64 {
        self.events
    }

    /// Appends whole frames to `out`: about `max` bytes of them, more only where a single frame is
    /// longer, as they go on the wire. Returns the sequence numbers passed, of which redacted ones added
    /// no bytes; `None` where there is no event yet. Waits for the disk.
    pub fn next(
        &mut self,
        out: &mut BytesMut,
        max: usize,
    ) -> Result<Option<RangeInclusive<u64>>, ReadError> {
        self.advance(out, max, Wait::ForDisk)
    }

    /// [`Reader::next`] for async callers: reads at once what is in memory, and hands a read that would
    /// wait for the disk to a blocking thread.
    pub async fn read(
        &mut self,
        out: &mut BytesMut,
        max: usize,
    ) -> Result<Option<RangeInclusive<u64>>, ReadError> {
        match self.advance(out, max, Wait::Never) {
            Err(ReadError::Io { source, .. }) if source.kind() == io::ErrorKind::WouldBlock => {}
            other => return other,
        }
        let mut reader = self.clone();
        let mut buffer = out.split();
        let task = tokio::task::spawn_blocking(move || {
            let result = reader.next(&mut buffer, max);
            (reader, buffer, result)
        });
        match task.await {
            Ok((reader, buffer, result)) => {
                *self = reader;
                *out = buffer;
                result
            }
            Err(error) => Err(ReadError::Io {
                seq: self.next,
                source: io::Error::other(error),
            }),
        }
    }

    fn advance(
        &mut self,
        out: &mut BytesMut,
        max: usize,
        wait: Wait,
    ) -> Result<Option<RangeInclusive<u64>>, ReadError> {
        let first = self.next;
        let limit = out.len() + max;
        let head = self.log.head();
        while self.next <= head && out.len() < limit {
            match self.step(out, (limit - out.len()) as u64, head, wait) {
                Ok(()) => {}
                // What was read before stands; the next call meets the obstacle.
                Err(_) if self.next > first => break,
                Err(error) => return Err(error),
            }
        }
        Ok((self.next > first).then(|| first..=self.next - 1))
    }

    /// Reads one stretch.
    fn step(
        &mut self,
        out: &mut BytesMut,
        max: u64,
        head: u64,
        wait: Wait,
    ) -> Result<(), ReadError> {
        let (segment, files) = self.enter()?;
        let seq = self.next;
        let failed = |source| ReadError::Io { seq, source };
        let _gate = segment.gate.read().unwrap_or_else(PoisonError::into_inner);
        let stretch = self
            .stretch(&segment, &files, max, head, wait)
            .map_err(failed)?;
        let at = out.len();
        out.resize(at + stretch.len as usize, 0);
        if let Err(source) = read_at(&files.frames, &mut out[at..], stretch.offset, wait) {
            out.truncate(at);
            return Err(failed(source));
        }
        self.next = stretch.next;
        self.events += stretch.events;
        Ok(())
    }

    /// The segment of the next event, opened.
    fn enter(&mut self) -> Result<(Arc<Segment>, Arc<Files>), ReadError> {
        let position = self.next;
        let too_slow = |oldest| ReadError::TooSlow { position, oldest };
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
                let (oldest, _) = self.log.window();
                return Err(too_slow(oldest));
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

    /// The next frames that lie together: up to `max` bytes, at least one frame.
    fn stretch(
        &self,
        segment: &Segment,
        files: &Files,
        max: u64,
        head: u64,
        wait: Wait,
    ) -> io::Result<Stretch> {
        let count = (segment.last(head) - self.next + 1).min(ENTRIES_PER_READ as u64) as usize;
        let mut block = [0; ENTRIES_PER_READ * ENTRY_BYTES as usize];
        let block = &mut block[..count * ENTRY_BYTES as usize];
        read_at(
            &files.index,
            block,
            entry::position(segment.first, self.next),
            wait,
        )?;
        let mut stretch = Stretch {
            offset: 0,
            len: 0,
            next: self.next,
            events: 0,
        };
        let (entries, _) = block.as_chunks::<{ ENTRY_BYTES as usize }>();
        for bytes in entries {
            let served = self.served(files, decode(bytes, stretch.next))?;
            let Some(entry) = served else {
                if stretch.len > 0 {
                    break;
                }
                stretch.next += 1;
                continue;
            };
            if stretch.len == 0 {
                stretch.offset = entry.offset;
            } else if stretch.len + u64::from(entry.len) > max {
                break;
            }
            stretch.len += u64::from(entry.len);
            stretch.next += 1;
            stretch.events += 1;
        }
        Ok(stretch)
    }

    /// The entry, where its frame may be read and sent.
    fn served(&self, files: &Files, entry: Option<Entry>) -> io::Result<Option<Entry>> {
        let Some(entry) = entry.filter(|entry| entry.state == State::Served) else {
            return Ok(None);
        };
        let covered = self.log.shared.redactions.cover(files, &entry)?;
        Ok((!covered).then_some(entry))
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

    /// The event at the reader's position; `None` where it is skipped.
    fn event(&mut self) -> Result<Option<(Entry, Bytes)>, ReadError> {
        let seq = self.reader.next;
        let failed = |source| ReadError::Io { seq, source };
        let (segment, files) = self.reader.enter()?;
        let _gate = segment.gate.read().unwrap_or_else(PoisonError::into_inner);
        let entry = segment.entry(&files, seq).map_err(failed)?;
        self.reader.next += 1;
        let gone = entry.filter(|_| self.all);
        let gone = gone.map(|entry| (entry, Bytes::new()));
        let served = self.reader.served(&files, entry).map_err(failed)?;
        let Some(entry) = served else {
            return Ok(gone);
        };
        let frame = read_frame(&files, &entry).map_err(failed)?;
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

/// The WebSocket frame of an entry, as it lies.
pub(super) fn read_frame(files: &Files, entry: &Entry) -> io::Result<Vec<u8>> {
    let mut frame = vec![0; entry.len as usize];
    files.frames.read_exact_at(&mut frame, entry.offset)?;
    Ok(frame)
}
