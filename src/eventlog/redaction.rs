//! Redaction: an account's frames go out of what is served at once, and off the disk soon after.
//! Promises that an accepted redaction survives a crash and that no reader ever sees a hole. `#account`
//! events stay, since they say that the account is gone. What was cut out does not come back.

use std::collections::HashMap;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock};

use super::disk::{LogFile, read_up_to, sync_folder};
use super::entry::{self, ENTRY_BYTES, Entry, State};
use super::reader::read_frame;
use super::segment::{Files, Segment, frames_path, index_path};
use super::{EventLog, LogError, Shared, recovery, upkeep, wire};
use crate::atproto::did::Did;
use crate::atproto::frame::{Kind, MAX_FRAME_BYTES};

/// File of the redactions that are not yet punched out: lines of seq, DID, checksum.
const JOURNAL: &str = "redactions";
const JOURNAL_MODE: u32 = 0o640;
/// Index entries read at a time while an account's events are looked for.
const ENTRIES_PER_READ: u64 = 4096;

/// Redactions that hold but are not yet marked in the index.
#[derive(Debug, Default)]
pub(super) struct Redactions {
    path: PathBuf,
    /// By `Did::hash64`.
    pending: RwLock<HashMap<u64, Vec<Redaction>>>,
    /// Number of pending ones, so that readers look further only where there are any.
    count: AtomicUsize,
    /// Held while the journal is written.
    journal: Mutex<()>,
}

/// All events of `did` up to and including `up_to`.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Redaction {
    did: Did,
    up_to: u64,
}

impl EventLog {
    /// Takes all events of an account up to and including `up_to` out of the log, except `#account`
    /// events. When this returns, no reader gets them any more, also after a crash; a background thread
    /// then marks them in the index and punches them out of the segments. Waits for the disk. After an
    /// error (a full disk) all that holds as well, but a crash before the punching would undo it.
    pub fn redact(&self, did: &Did, up_to: u64) -> Result<(), LogError> {
        let shared = &self.shared;
        let up_to = up_to.min(shared.head());
        let path = &shared.redactions.path;
        let noted = shared.redactions.add(Redaction {
            did: did.clone(),
            up_to,
        });
        // Those who read anew leave the account out; what others have at hand is not given out any more.
        shared.stretches.void();
        shared.call(upkeep::Call::Look);
        noted.map_err(LogError::io("noting a redaction in", path))
    }

    /// Redactions that hold for readers but are not yet punched out.
    pub fn redactions_pending(&self) -> usize {
        self.shared.redactions.pending()
    }
}

impl Redactions {
    /// Reads what was pending when the log was last closed.
    pub fn load(dir: &Path) -> Result<Redactions, LogError> {
        let path = dir.join(JOURNAL);
        let bytes = match fs::read(&path) {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == io::ErrorKind::NotFound => Vec::new(),
            Err(error) => return Err(LogError::io("reading", &path)(error)),
        };
        let mut pending: HashMap<u64, Vec<Redaction>> = HashMap::new();
        let mut count = 0;
        // A last line torn by a crash belongs to a redaction that was never accepted. Damage of any
        // kind costs its line, not the start.
        for redaction in String::from_utf8_lossy(&bytes)
            .lines()
            .filter_map(Redaction::from_line)
        {
            pending
                .entry(redaction.did.hash64())
                .or_default()
                .push(redaction);
            count += 1;
        }
        Ok(Redactions {
            path,
            pending: RwLock::new(pending),
            count: AtomicUsize::new(count),
            journal: Mutex::new(()),
        })
    }

    /// Takes a redaction: readers follow it from here on, then it is noted for the next start.
    fn add(&self, redaction: Redaction) -> io::Result<()> {
        let _journal = self.journal.lock().unwrap_or_else(PoisonError::into_inner);
        // A line torn by a full disk must not swallow this one.
        let line = format!("\n{}\n", redaction.line());
        let mut pending = self.pending.write().unwrap_or_else(PoisonError::into_inner);
        pending
            .entry(redaction.did.hash64())
            .or_default()
            .push(redaction);
        drop(pending);
        self.count.fetch_add(1, Ordering::Release);
        let mut file = OpenOptions::new()
            .append(true)
            .create(true)
            .mode(JOURNAL_MODE)
            .open(&self.path)?;
        file.write_all(line.as_bytes())?;
        file.sync_data()?;
        self.path.parent().map_or(Ok(()), sync_folder)
    }

    /// How many there are.
    pub fn pending(&self) -> usize {
        self.count.load(Ordering::Acquire)
    }

    /// True where a pending redaction may be the one that takes out this event, of which nothing but
    /// the entry is left.
    pub fn may_cover(&self, entry: &Entry) -> bool {
        let pending = self.pending.read().unwrap_or_else(PoisonError::into_inner);
        let candidates = pending.get(&entry.did_hash).map_or(&[][..], Vec::as_slice);
        candidates.iter().any(|it| it.up_to >= entry.seq)
    }

    /// True where a pending redaction takes out this event.
    pub fn cover(&self, files: &Files, entry: &Entry) -> io::Result<bool> {
        if self.count.load(Ordering::Acquire) == 0 || entry.kind == Kind::Account {
            return Ok(false);
        }
        let pending = self.pending.read().unwrap_or_else(PoisonError::into_inner);
        match pending.get(&entry.did_hash) {
            Some(candidates) => is_covered(files, entry, candidates),
            None => Ok(false),
        }
    }

    fn snapshot(&self) -> HashMap<u64, Vec<Redaction>> {
        self.pending
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    /// Forgets redactions that are now in the index and off the segments.
    fn finish(&self, done: &HashMap<u64, Vec<Redaction>>) -> io::Result<()> {
        let _journal = self.journal.lock().unwrap_or_else(PoisonError::into_inner);
        let mut left = self.snapshot();
        left.retain(|hash, redactions| {
            let done = done.get(hash).map_or(&[][..], Vec::as_slice);
            redactions.retain(|redaction| !done.contains(redaction));
            !redactions.is_empty()
        });
        let lines: String = left
            .values()
            .flatten()
            .map(|redaction| redaction.line() + "\n")
            .collect();
        let fresh = self.path.with_extension("new");
        let mut file = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(true)
            .mode(JOURNAL_MODE)
            .open(&fresh)?;
        file.write_all(lines.as_bytes())?;
        file.sync_data()?;
        fs::rename(&fresh, &self.path)?;
        if let Some(dir) = self.path.parent() {
            sync_folder(dir)?;
        }
        let count = left.values().map(Vec::len).sum();
        *self.pending.write().unwrap_or_else(PoisonError::into_inner) = left;
        self.count.store(count, Ordering::Release);
        Ok(())
    }
}

impl Redaction {
    fn line(&self) -> String {
        let text = format!("{} {}", self.up_to, self.did);
        format!("{text} {:08x}", crc32fast::hash(text.as_bytes()))
    }

    fn from_line(line: &str) -> Option<Redaction> {
        let (text, crc) = line.rsplit_once(' ')?;
        if u32::from_str_radix(crc, 16).ok()? != crc32fast::hash(text.as_bytes()) {
            return None;
        }
        let (up_to, did) = text.split_once(' ')?;
        Some(Redaction {
            did: Did::parse(did).ok()?,
            up_to: up_to.parse().ok()?,
        })
    }
}

/// True where one of the redactions, all of the entry's DID hash, takes out the event. Hashes can be
/// made to collide, so the frame itself says whose it is, as long as it can be read.
fn is_covered(files: &Files, entry: &Entry, candidates: &[Redaction]) -> io::Result<bool> {
    if candidates
        .iter()
        .all(|candidate| candidate.up_to < entry.seq)
    {
        return Ok(false);
    }
    let frame = match read_frame(files, entry) {
        // The caller asks again where it may wait.
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Err(error),
        frame => frame.ok(),
    };
    let facts = frame.and_then(|frame| recovery::Facts::of(wire::payload(&frame)?));
    Ok(candidates.iter().any(|candidate| {
        let same = facts
            .as_ref()
            .is_none_or(|facts| candidate.did == facts.did);
        candidate.up_to >= entry.seq && same
    }))
}

/// What a pass found in one segment.
#[derive(Default)]
struct Found {
    seqs: Vec<u64>,
    ranges: Vec<(u64, u64)>,
}

impl Shared {
    /// Marks and punches out everything that is pending. Stops early when the log closes; the journal
    /// then brings the rest back.
    pub(super) fn redact_pending(&self, ending: &AtomicBool) {
        if self.redactions.count.load(Ordering::Acquire) == 0 {
            return;
        }
        match self.redaction_pass(ending) {
            Ok(()) => {}
            Err(error) => {
                tracing::warn!(folder = %self.dir.display(), %error, "redacting events; trying again")
            }
        }
    }

    fn redaction_pass(&self, ending: &AtomicBool) -> io::Result<()> {
        let pending = self.redactions.snapshot();
        let until = pending
            .values()
            .flatten()
            .map(|redaction| redaction.up_to)
            .max()
            .unwrap_or(0);
        let segments: Vec<Arc<Segment>> = self.segments().iter().cloned().collect();
        for segment in segments.iter().take_while(|segment| segment.first <= until) {
            if ending.load(Ordering::Acquire) {
                return Ok(());
            }
            match self.redact_segment(segment, until, &pending) {
                // Retention was faster.
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                other => other?,
            }
        }
        self.redactions.finish(&pending)
    }

    fn redact_segment(
        &self,
        segment: &Segment,
        until: u64,
        pending: &HashMap<u64, Vec<Redaction>>,
    ) -> io::Result<()> {
        let files = segment.files()?;
        let last = segment.last(self.head()).min(until);
        let found = find(segment, &files, last, pending)?;
        if found.ranges.is_empty() {
            return Ok(());
        }
        let faults = || self.options.faults.clone();
        let index = LogFile::open_existing(&index_path(&segment.dir, segment.first), faults())?;
        let frames = LogFile::open_existing(&frames_path(&segment.dir, segment.first), faults())?;
        // The gate: readers that looked into the index before have copied their frames by now, later
        // ones see the marks.
        let gate = segment.gate.write().unwrap_or_else(PoisonError::into_inner);
        for seq in &found.seqs {
            let at = entry::state_position(segment.first, *seq);
            index.write_all_at(&[State::Redacted as u8], at)?;
        }
        drop(gate);
        index.sync_data()?;
        for (offset, len) in &found.ranges {
            frames.punch(*offset, *len)?;
        }
        frames.sync_data()
    }
}

/// The account's events in a segment up to `last`. Events that are marked already are punched again,
/// since a crash may have come between; damaged ones are served to nobody and go by their hash, those
/// without an entry by what their frame says.
fn find(
    segment: &Segment,
    files: &Files,
    last: u64,
    pending: &HashMap<u64, Vec<Redaction>>,
) -> io::Result<Found> {
    let mut found = Found::default();
    let mut seq = segment.first;
    let mut at = 0;
    while seq <= last {
        let count = (last - seq + 1).min(ENTRIES_PER_READ);
        for entry in read_entries(segment, &files.index, seq, count)? {
            let Some(entry) = entry else {
                if let Some(lost) = LostEntry::find(files, at, seq)? {
                    at += lost.len;
                    found.ranges.extend(lost.range_to_punch(pending));
                }
                seq += 1;
                continue;
            };
            at = entry.end();
            seq += 1;
            let Some(candidates) = pending.get(&entry.did_hash) else {
                continue;
            };
            let covered = match entry.state {
                State::Served => {
                    entry.kind != Kind::Account && is_covered(files, &entry, candidates)?
                }
                State::Redacted | State::Damaged => true,
            };
            if covered {
                found.seqs.push(entry.seq);
                found.ranges.push((entry.offset, u64::from(entry.len)));
            }
        }
    }
    Ok(found)
}

/// An event whose index entry is damaged. Nobody is served its frame, but a repair would bring it back.
struct LostEntry {
    facts: recovery::Facts,
    offset: u64,
    len: u64,
}

impl LostEntry {
    /// The frame of `seq`, where it begins at `offset`.
    fn find(files: &Files, offset: u64, seq: u64) -> io::Result<Option<LostEntry>> {
        let mut header = [0; wire::MAX_HEADER_BYTES];
        let read = read_up_to(&files.frames, &mut header, offset)?;
        let Some((header_len, length)) = wire::read_header(&header[..read]) else {
            return Ok(None);
        };
        if length > MAX_FRAME_BYTES as u64 {
            return Ok(None);
        }
        let mut payload = vec![0; length as usize];
        read_up_to(&files.frames, &mut payload, offset + header_len as u64)?;
        let facts = recovery::Facts::of(&payload).filter(|facts| facts.seq == seq);
        Ok(facts.map(|facts| LostEntry {
            facts,
            offset,
            len: header_len as u64 + length,
        }))
    }

    fn range_to_punch(&self, pending: &HashMap<u64, Vec<Redaction>>) -> Option<(u64, u64)> {
        let mut candidates = pending.get(&self.facts.did.hash64())?.iter();
        let covered = self.facts.kind != Kind::Account
            && candidates.any(|it| it.up_to >= self.facts.seq && it.did == self.facts.did);
        covered.then_some((self.offset, self.len))
    }
}

/// The entries of `count` events from `seq` on, `None` where one cannot be read.
fn read_entries(
    segment: &Segment,
    index: &File,
    seq: u64,
    count: u64,
) -> io::Result<Vec<Option<Entry>>> {
    let mut block = vec![0; (count * ENTRY_BYTES) as usize];
    index.read_exact_at(&mut block, entry::position(segment.first, seq))?;
    let (entries, _) = block.as_chunks::<{ ENTRY_BYTES as usize }>();
    Ok(entries.iter().map(Entry::decode).collect())
}
