//! Redaction: an account's frames go out of what is served at once, and off the disk soon after.
//! Promises that an accepted redaction survives a crash and that no reader ever sees a hole, and reads no more of the
//! log than what it takes out. Plain `#account` events stay: they carry nothing of the account's own, and say what became
//! of it. What was cut out does not come back.

use std::collections::{HashMap, HashSet};
use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use parking_lot::{Mutex, MutexGuard, RwLock, RwLockReadGuard, RwLockWriteGuard};

use super::account_index::{self, short_hash};
use super::disk::{LogFile, read_up_to, sync_folder};
use super::entry::{self, ENTRY_BYTES, Entry, State};
use super::segment::{Files, Segment, frames_path, index_path, read_frame};
use super::{EventLog, LogError, Shared, rebuild, wire};
use crate::atproto::did::Did;
use crate::atproto::frame::{self, Kind, MAX_STORED_FRAME_BYTES};

/// File of the redactions that are not yet punched out: lines of seq, DID, checksum.
const JOURNAL: &str = "redactions";
const JOURNAL_MODE: u32 = 0o640;
/// Index entries read at a time where a whole segment is looked through.
const ENTRIES_PER_READ: u64 = 4096;
/// Index entries read at a time where an account's are looked for: a page.
const ENTRIES_PER_LOOK: u64 = 64;
/// Marks or holes made at a time, so that a write after a failed sync does not wait for all of them.
const CHANGES_AT_A_TIME: usize = 64;

/// Redactions that hold but are not yet marked in the index, by `Did::hash64`. One of each account.
type Pending = HashMap<u64, Vec<Redaction>>;

/// The redactions that are pending.
#[derive(Debug, Default)]
pub(super) struct Redactions {
    path: PathBuf,
    pending: RwLock<Pending>,
    /// Number of pending ones, so that readers look further only where there are any.
    count: AtomicUsize,
    /// Held while the journal is written. Whether the folder is known to have it on disk.
    journal: Mutex<bool>,
}

/// All events of `did` up to and including `up_to`.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Redaction {
    did: Did,
    up_to: u64,
    /// What is marked may still have its bytes: a pass before this one was cut off.
    again: bool,
}

impl Redaction {
    fn reaches(&self, seq: u64) -> bool {
        self.up_to >= seq
    }
}

impl EventLog {
    /// Takes all events of an account up to and including `up_to` out of the log, except plain `#account` events. When
    /// this returns, no reader gets them any more, also after a crash; a background thread then marks them in the index
    /// and punches them out of the segments. Waits for the disk. After an error (a full disk) all that holds as well, but
    /// a crash before the punching would undo it.
    pub fn redact(&self, did: &Did, up_to: u64) -> Result<(), LogError> {
        self.redact_all([(did.clone(), up_to)])
    }

    /// [`EventLog::redact`] for many accounts, with one wait for the disk.
    pub fn redact_all(
        &self,
        accounts: impl IntoIterator<Item = (Did, u64)>,
    ) -> Result<(), LogError> {
        self.take_out(accounts, false)
    }

    /// [`EventLog::redact_all`] for redactions that an earlier process may have begun without noting them.
    pub fn redact_again(
        &self,
        accounts: impl IntoIterator<Item = (Did, u64)>,
    ) -> Result<(), LogError> {
        self.take_out(accounts, true)
    }

    fn take_out(
        &self,
        accounts: impl IntoIterator<Item = (Did, u64)>,
        again: bool,
    ) -> Result<(), LogError> {
        let shared = &self.shared;
        let head = shared.head();
        let redactions: Vec<_> = accounts
            .into_iter()
            .map(|(did, up_to)| Redaction {
                did,
                up_to: up_to.min(head),
                again,
            })
            .collect();
        if redactions.is_empty() {
            return Ok(());
        }
        let count = redactions.len() as u64;
        shared.options.metrics.redactions.inc_by(count);
        let path = &shared.redactions.path;
        let noted = shared.redactions.add(redactions);
        // Those who read anew leave the accounts out; what others have at hand is not given out any more.
        shared.stretches.void();
        shared.bells.redaction.ring();
        noted.map_err(LogError::io("noting a redaction in", path))
    }

    /// Accounts whose redaction holds for readers but is not yet punched out.
    pub fn redactions_pending(&self) -> usize {
        self.shared.redactions.pending()
    }
}

/// Adds a redaction to those of other accounts; one of the same account becomes both.
fn join(pending: &mut Pending, redaction: Redaction) {
    let same_hash = pending.entry(redaction.did.hash64()).or_default();
    match same_hash.iter_mut().find(|it| it.did == redaction.did) {
        Some(known) => {
            known.up_to = known.up_to.max(redaction.up_to);
            known.again |= redaction.again;
        }
        None => same_hash.push(redaction),
    }
}

fn count(pending: &Pending) -> usize {
    pending.values().map(Vec::len).sum()
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
        let mut pending = Pending::new();
        // A last line torn by a crash belongs to a redaction that was never accepted. Damage of any
        // kind costs its line, not the start.
        String::from_utf8_lossy(&bytes)
            .lines()
            .filter_map(Redaction::from_line)
            .for_each(|redaction| join(&mut pending, redaction));
        Ok(Redactions {
            path,
            count: AtomicUsize::new(count(&pending)),
            pending: RwLock::new(pending),
            journal: Mutex::default(),
        })
    }

    /// Takes redactions: readers follow them from here on, then they are noted for the next start.
    fn add(&self, redactions: Vec<Redaction>) -> io::Result<()> {
        let mut in_folder = self.journal();
        // A line torn by a full disk must not swallow the first one.
        let mut lines = String::from("\n");
        for redaction in &redactions {
            lines += &redaction.line();
            lines.push('\n');
        }
        let mut pending = self.write();
        redactions
            .into_iter()
            .for_each(|redaction| join(&mut pending, redaction));
        self.count.store(count(&pending), Ordering::Release);
        drop(pending);
        let mut file = OpenOptions::new()
            .append(true)
            .create(true)
            .mode(JOURNAL_MODE)
            .open(&self.path)?;
        file.write_all(lines.as_bytes())?;
        file.sync_data()?;
        if !*in_folder {
            self.sync_folder()?;
            *in_folder = true;
        }
        Ok(())
    }

    /// Accounts with a pending redaction.
    pub fn pending(&self) -> usize {
        self.count.load(Ordering::Acquire)
    }

    /// True where a pending redaction may be the one that takes out this event, of which nothing but
    /// the entry is left.
    pub fn may_cover(&self, entry: &Entry) -> bool {
        let pending = self.read();
        let candidates = pending.get(&entry.did_hash).map_or(&[][..], Vec::as_slice);
        candidates.iter().any(|it| it.reaches(entry.seq))
    }

    /// True where a pending redaction takes out this event.
    pub fn cover(&self, files: &Files, entry: &Entry) -> io::Result<bool> {
        if self.pending() == 0 {
            return Ok(false);
        }
        match self.read().get(&entry.did_hash) {
            Some(candidates) => is_covered(files, entry, candidates),
            None => Ok(false),
        }
    }

    /// A pass was cut off: what it has marked may still have its bytes.
    fn repeat(&self) {
        let mut pending = self.write();
        pending
            .values_mut()
            .flatten()
            .for_each(|it| it.again = true);
    }

    /// Forgets redactions that are now in the index and off the segments.
    fn finish(&self, done: &Pending) -> io::Result<()> {
        let mut in_folder = self.journal();
        let mut left = self.read().clone();
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
        *in_folder = false;
        fs::rename(&fresh, &self.path)?;
        self.sync_folder()?;
        *in_folder = true;
        self.count.store(count(&left), Ordering::Release);
        *self.write() = left;
        Ok(())
    }

    fn sync_folder(&self) -> io::Result<()> {
        self.path.parent().map_or(Ok(()), sync_folder)
    }

    fn journal(&self) -> MutexGuard<'_, bool> {
        self.journal.lock()
    }

    fn read(&self) -> RwLockReadGuard<'_, Pending> {
        self.pending.read()
    }

    fn write(&self) -> RwLockWriteGuard<'_, Pending> {
        self.pending.write()
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
            again: true,
        })
    }
}

/// True where one of the redactions, all of the entry's DID hash, takes out the event. Hashes can be
/// made to collide, so the frame itself says whose it is, as long as it can be read.
fn is_covered(files: &Files, entry: &Entry, candidates: &[Redaction]) -> io::Result<bool> {
    if !candidates.iter().any(|it| it.reaches(entry.seq)) {
        return Ok(false);
    }
    let frame = match read_frame(files, entry) {
        // The caller asks again where it may wait.
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Err(error),
        frame => frame.ok(),
    };
    let payload = frame.as_deref().and_then(wire::payload);
    if entry.kind == Kind::Account && payload.is_some_and(frame::is_plain_account) {
        return Ok(false);
    }
    let facts = payload.and_then(rebuild::Facts::of);
    Ok(candidates.iter().any(|candidate| {
        let same = facts
            .as_ref()
            .is_none_or(|facts| candidate.did == facts.did);
        candidate.reaches(entry.seq) && same
    }))
}

/// What a pass found in one segment.
#[derive(Default)]
struct Found {
    /// Events to be marked.
    seqs: Vec<u64>,
    /// Offsets and lengths of what is to be punched out.
    ranges: Vec<(u64, u64)>,
}

impl Found {
    /// Takes an event where a redaction covers it. Those that are marked are punched again only after a pass that was cut
    /// off; damaged ones are served to nobody and go by their hash.
    fn take(&mut self, files: &Files, entry: &Entry, pending: &Pending) -> io::Result<()> {
        let Some(candidates) = pending.get(&entry.did_hash) else {
            return Ok(());
        };
        let is_marked = entry.state == State::Redacted;
        let covered = match entry.state {
            State::Served => is_covered(files, entry, candidates)?,
            State::Redacted => candidates.iter().any(|it| it.again),
            State::Damaged => true,
            State::Absent => false,
        };
        if covered {
            self.seqs.extend((!is_marked).then_some(entry.seq));
            self.punch(entry.offset, u64::from(entry.len));
        }
        Ok(())
    }

    /// Adds bytes behind those that are to be punched out so far.
    fn punch(&mut self, offset: u64, len: u64) {
        match self.ranges.last_mut() {
            Some((before, length)) if *before + *length == offset => *length += len,
            _ => self.ranges.push((offset, len)),
        }
    }
}

impl Shared {
    /// Marks and punches out everything that is pending. Stops early when the log closes; the journal
    /// then brings the rest back. `failing`: the pass before failed.
    pub(super) fn redact_pending(&self, ending: &AtomicBool, failing: &mut bool) {
        match self.redaction_pass(ending) {
            Ok(()) if !*failing => return,
            Ok(()) => {
                tracing::info!(folder = %self.dir.display(), "events are redacted again");
                *failing = false;
                return;
            }
            Err(error) if *failing => tracing::debug!(%error, "redacting events still fails"),
            Err(error) => {
                tracing::warn!(folder = %self.dir.display(), %error, "redacting events; trying again");
            }
        }
        *failing = true;
        self.redactions.repeat();
    }

    fn redaction_pass(&self, ending: &AtomicBool) -> io::Result<()> {
        let pending = self.redactions.read().clone();
        let until = pending.values().flatten().map(|it| it.up_to);
        let until = until.max().unwrap_or(0);
        let mut accounts: Vec<u32> = pending.keys().copied().map(short_hash).collect();
        accounts.sort_unstable();
        accounts.dedup();
        let segments = self.segments().clone();
        for segment in segments.iter().take_while(|it| it.first <= until) {
            if ending.load(Ordering::Acquire) {
                return Ok(());
            }
            match self.redact_segment(segment, until, &pending, &accounts) {
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
        pending: &Pending,
        accounts: &[u32],
    ) -> io::Result<()> {
        let places = places(segment, accounts)?;
        if places.as_ref().is_some_and(Vec::is_empty) {
            return Ok(());
        }
        let files = segment.files()?;
        let last = segment.last(self.head()).min(until);
        let found = match places {
            Some(places) => find_at(segment, &files, &places, last, pending)?,
            None => None,
        };
        let found = match found {
            Some(found) => found,
            None => find_everywhere(segment, &files, last, pending)?,
        };
        if found.ranges.is_empty() {
            return Ok(());
        }
        self.cut_out(segment, &found)
    }

    fn cut_out(&self, segment: &Segment, found: &Found) -> io::Result<()> {
        let faults = || self.options.faults.clone();
        let index = LogFile::open_existing(&index_path(&segment.dir, segment.first), faults())?;
        let frames = LogFile::open_existing(&frames_path(&segment.dir, segment.first), faults())?;
        let changes = || segment.changes.lock();
        for some in found.seqs.chunks(CHANGES_AT_A_TIME) {
            let _changes = changes();
            for seq in some {
                let at = entry::state_position(segment.first, *seq);
                index.write_all_at(&[State::Redacted as u8], at)?;
            }
        }
        // In this order: a start takes zeros in place of a served frame for one that was never written.
        index.sync_data()?;
        // Readers that looked into the index before the marks have copied their frames when nobody holds the gate.
        drop(segment.gate.write());
        for some in found.ranges.chunks(CHANGES_AT_A_TIME) {
            let _changes = changes();
            for (offset, len) in some {
                frames.punch(*offset, *len)?;
            }
        }
        frames.sync_data()
    }
}

/// Places of the segment's events that may be of these accounts, by their short hashes; `None` where all must be looked
/// at. Makes an account index that is missing.
fn places(segment: &Segment, accounts: &[u32]) -> io::Result<Option<Vec<u64>>> {
    if let Some(places) = segment.places_in_memory(accounts) {
        return Ok(Some(places));
    }
    if !segment.has_ended() {
        return Ok(None);
    }
    let events = segment.last(u64::MAX) - segment.first + 1;
    if events > account_index::MAX_EVENTS {
        return Ok(None);
    }
    let found = account_index::find(&segment.dir, segment.first, events, accounts)?;
    if found.is_some() {
        return Ok(found);
    }
    let Some(all) = accounts_of(segment, events)? else {
        return Ok(None);
    };
    if let Err(error) = segment.write_account_index(&all) {
        tracing::debug!(first = segment.first, %error, "writing an account index");
    }
    let accounts: HashSet<u32> = accounts.iter().copied().collect();
    let found = all.iter().zip(0..);
    let found = found.filter(|(account, _)| accounts.contains(account));
    Ok(Some(found.map(|(_, place)| place).collect()))
}

/// The accounts of all events of a segment, as an account index has them; `None` where an entry cannot be read, whose
/// account only the frame tells.
fn accounts_of(segment: &Segment, events: u64) -> io::Result<Option<Vec<u32>>> {
    let files = segment.files()?;
    let mut accounts = Vec::with_capacity(events as usize);
    for seq in (segment.first..segment.first + events).step_by(ENTRIES_PER_READ as usize) {
        let count = (segment.first + events - seq).min(ENTRIES_PER_READ);
        for entry in read_entries(segment, &files.index, seq, count)? {
            let Some(entry) = entry else {
                return Ok(None);
            };
            accounts.push(short_hash(entry.did_hash));
        }
    }
    Ok(Some(accounts))
}

/// What is to be taken out of the events at these places, up to `last`; `None` where an entry is damaged, so that the
/// frames before it must tell where its own begins.
fn find_at(
    segment: &Segment,
    files: &Files,
    places: &[u64],
    last: u64,
    pending: &Pending,
) -> io::Result<Option<Found>> {
    let mut found = Found::default();
    let mut read = Vec::new();
    let mut read_from = 0;
    for seq in places.iter().map(|place| segment.first + place) {
        if seq > last {
            break;
        }
        if seq >= read_from + read.len() as u64 {
            let count = (last - seq + 1).min(ENTRIES_PER_LOOK);
            (read_from, read) = (seq, read_entries(segment, &files.index, seq, count)?);
        }
        let Some(Some(entry)) = read.get((seq - read_from) as usize) else {
            return Ok(None);
        };
        found.take(files, entry, pending)?;
    }
    Ok(Some(found))
}

/// What is to be taken out of all events up to `last`. Those without an entry go by what their frame says.
fn find_everywhere(
    segment: &Segment,
    files: &Files,
    last: u64,
    pending: &Pending,
) -> io::Result<Found> {
    let mut found = Found::default();
    let mut seq = segment.first;
    let mut at = 0;
    while seq <= last {
        let count = (last - seq + 1).min(ENTRIES_PER_READ);
        for entry in read_entries(segment, &files.index, seq, count)? {
            if let Some(entry) = entry {
                at = entry.end();
                found.take(files, &entry, pending)?;
            } else if let Some(lost) = LostEntry::find(files, at, seq)? {
                if lost.is_covered(pending) {
                    found.punch(at, lost.len);
                }
                at += lost.len;
            }
            seq += 1;
        }
    }
    Ok(found)
}

/// An event whose index entry is damaged. Nobody is served its frame, but a repair would bring it back.
struct LostEntry {
    facts: rebuild::Facts,
    is_plain: bool,
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
        if length > MAX_STORED_FRAME_BYTES as u64 {
            return Ok(None);
        }
        let mut payload = vec![0; length as usize];
        read_up_to(&files.frames, &mut payload, offset + header_len as u64)?;
        let facts = rebuild::Facts::of(&payload).filter(|facts| facts.seq == seq);
        Ok(facts.map(|facts| LostEntry {
            facts,
            is_plain: frame::is_plain_account(&payload),
            len: header_len as u64 + length,
        }))
    }

    fn is_covered(&self, pending: &Pending) -> bool {
        let facts = &self.facts;
        let candidates = pending
            .get(&facts.did.hash64())
            .map_or(&[][..], Vec::as_slice);
        !self.is_plain
            && candidates
                .iter()
                .any(|it| it.reaches(facts.seq) && it.did == facts.did)
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
