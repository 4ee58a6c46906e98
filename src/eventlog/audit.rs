//! Every entry and every frame of a log, held against each other. Like [`Folder`], it takes no lock,
//! changes nothing, and may run beside a relay.
//! Promises to name each flaw once; what is to be done about it is `repair`'s business.

use std::fmt;
use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::account_index::{self, short_hash};
use super::disk::{read_up_to, written_bytes};
use super::entry::{self, Entry, HEADER_BYTES, State};
use super::inspect::{Folder, Part, Slots, end_of_entries};
use super::redaction::Redactions;
use super::segment::{Files, frames_path, index_path, read_frame};
use super::{rebuild, wire};
use crate::atproto::frame::Kind;

/// Bytes looked through at a time for what is not zero.
const BYTES_PER_LOOK: usize = 64 * 1024;

/// Something that is not as the log left it.
#[derive(Debug)]
pub struct Flaw {
    /// The file it is in.
    pub file: PathBuf,
    /// The event, where it is one event's.
    pub seq: Option<u64>,
    /// Where in the file.
    pub offset: Option<u64>,
    pub what: Wrong,
}

/// What can be wrong.
#[derive(Debug, thiserror::Error)]
pub enum Wrong {
    #[error("cannot be read: {0}")]
    Unreadable(io::Error),
    #[error("there is no such file, but its index is there")]
    NoFrames,
    #[error("there is no such file, but its frames are there")]
    NoIndex,
    #[error("the header of the index is damaged")]
    Header,
    #[error("the events {0} to {1} have no entries")]
    NoEntries(u64, u64),
    #[error("entries go on up to {0}, where the next segment begins at {1}")]
    Overlap(u64, u64),
    #[error("the entry is damaged")]
    Entry,
    #[error("the frame begins at {found}, where the one before ends at {expected}")]
    NotBackToBack { expected: u64, found: u64 },
    #[error("the frame ends at {end}, behind the end of the file at {len}")]
    BehindTheEnd { end: u64, len: u64 },
    #[error("the frame is damaged: its checksum differs")]
    Checksum,
    #[error("the frame has no WebSocket header of its length")]
    FrameHeader,
    #[error("the frame holds no event")]
    NoEvent,
    #[error("the frame says that it is event {0}")]
    Seq(u64),
    #[error("the frame is of another account than the entry says")]
    Did,
    #[error("the frame is a {}, the entry says {}", .found.as_str(), .expected.as_str())]
    Kind { expected: Kind, found: Kind },
    #[error("the event is redacted, but its bytes are still there")]
    NotPunched,
    #[error("{0} bytes lie behind the last event")]
    Leftover(u64),
    #[error("the account index is not that of the segment's events")]
    AccountIndex,
}

impl fmt::Display for Flaw {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.file.display())?;
        if let Some(seq) = self.seq {
            write!(f, ": seq {seq}")?;
        }
        if let Some(offset) = self.offset {
            write!(f, ": offset {offset}")?;
        }
        write!(f, ": {}", self.what)
    }
}

/// What an audit went through.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Audit {
    pub segments: u64,
    pub events: u64,
    pub frame_bytes: u64,
    /// Events that are known to be taken out.
    pub redacted: u64,
    /// Events that are known to be lost.
    pub damaged: u64,
    pub flaws: u64,
    /// Written bytes behind the last event of the log: a write in progress, or one that a crash cut
    /// short and the next start cuts off.
    pub tail_bytes: u64,
}

impl Folder {
    /// Reads every byte of the log and gives `found` every flaw. `step` is called after each segment.
    pub fn audit(&self, found: &mut dyn FnMut(Flaw), step: &mut dyn FnMut()) -> Audit {
        let mut work = Work {
            dir: self.dir(),
            audit: Audit::default(),
            found,
        };
        for part in self.parts() {
            work.part(&part);
            step();
        }
        work.audit
    }
}

struct Work<'a> {
    dir: &'a Path,
    audit: Audit,
    found: &'a mut dyn FnMut(Flaw),
}

impl Work<'_> {
    fn flaw(&mut self, file: PathBuf, seq: Option<u64>, offset: Option<u64>, what: Wrong) {
        self.audit.flaws += 1;
        (self.found)(Flaw {
            file,
            seq,
            offset,
            what,
        });
    }

    fn part(&mut self, part: &Part) {
        let first = part.segment.first;
        let index = index_path(self.dir, first);
        let files = match part.files() {
            Ok(Some(files)) => files,
            Ok(None) => return,
            Err(error) => {
                let frames = frames_path(self.dir, first);
                let (file, what) = match error.kind() {
                    io::ErrorKind::NotFound if frames.exists() => (index, Wrong::NoIndex),
                    io::ErrorKind::NotFound => (frames, Wrong::NoFrames),
                    _ => (frames, Wrong::Unreadable(error)),
                };
                return self.flaw(file, None, None, what);
            }
        };
        self.audit.segments += 1;
        if let Err(error) = self.files(part, files) {
            self.flaw(index, None, None, Wrong::Unreadable(error));
        }
    }

    fn files(&mut self, part: &Part, files: Arc<Files>) -> io::Result<()> {
        let first = part.segment.first;
        let index = index_path(self.dir, first);
        let end = end_of_entries(&files.index, first)?;
        let mut header = [0; HEADER_BYTES as usize];
        read_up_to(&files.index, &mut header, 0)?;
        // A segment that has just begun has no header yet.
        if header != entry::header(first) && (end > first || part.until.is_some()) {
            self.flaw(index.clone(), None, Some(0), Wrong::Header);
        }
        let mut slots = part.slots(files.clone(), first)?;
        let mut at = Some(0);
        let mut accounts = Some(Vec::new());
        while let Some((seq, entry)) = slots.next()? {
            self.audit.events += 1;
            let Some(entry) = entry else {
                let offset = entry::position(first, seq);
                self.flaw(index.clone(), Some(seq), Some(offset), Wrong::Entry);
                at = None;
                accounts = None;
                continue;
            };
            let Some(entry) = self.event(part, &slots, entry, at)? else {
                // A failed write was taken back while we read.
                break;
            };
            at = Some(entry.end());
            if let Some(accounts) = &mut accounts {
                accounts.push(short_hash(entry.did_hash));
            }
        }
        if let (Some(accounts), Some(_)) = (accounts, part.until)
            && !account_index::fits(self.dir, first, accounts.into_iter())?
        {
            let file = account_index::path(self.dir, first);
            self.flaw(file, None, None, Wrong::AccountIndex);
        }
        match part.until {
            Some(until) if end < until => {
                let what = Wrong::NoEntries(end, until - 1);
                self.flaw(index, None, Some(entry::position(first, end)), what);
            }
            Some(until) if end > until => {
                let what = Wrong::Overlap(end - 1, until);
                self.flaw(index, None, Some(entry::position(first, until)), what);
            }
            _ => {}
        }
        let Some(at) = at else { return Ok(()) };
        let leftover = written_bytes(&files.frames, at)?;
        match part.until {
            None => self.audit.tail_bytes = leftover,
            Some(until) if leftover > 0 && end == until => {
                let file = frames_path(self.dir, first);
                self.flaw(file, None, Some(at), Wrong::Leftover(leftover));
            }
            Some(_) => {}
        }
        Ok(())
    }

    /// Checks one event that should begin at `at`. Returns its entry; `None` where it is gone by now.
    fn event(
        &mut self,
        part: &Part,
        slots: &Slots,
        entry: Entry,
        at: Option<u64>,
    ) -> io::Result<Option<Entry>> {
        let mut entry = entry;
        let mut wrong = self.check(slots, &entry, at);
        if wrong.is_some() {
            // It may have been redacted, or taken back, since its entry was read.
            match slots.look_again(entry.seq)? {
                None if part.until.is_none() => return Ok(None),
                Some(now) => {
                    entry = now;
                    wrong = self.check(slots, &entry, at);
                }
                None => {}
            }
        }
        self.audit.frame_bytes += u64::from(entry.len);
        match entry.state {
            State::Served | State::Absent => {}
            State::Redacted => self.audit.redacted += 1,
            State::Damaged => self.audit.damaged += 1,
        }
        if let Some(wrong) = wrong {
            let file = frames_path(self.dir, part.segment.first);
            self.flaw(file, Some(entry.seq), Some(entry.offset), wrong);
        }
        Ok(Some(entry))
    }

    fn check(&self, slots: &Slots, entry: &Entry, at: Option<u64>) -> Option<Wrong> {
        let files = &slots.files;
        if let Some(expected) = at.filter(|at| *at != entry.offset) {
            let found = entry.offset;
            return Some(Wrong::NotBackToBack { expected, found });
        }
        let checked = match entry.state {
            State::Served => check_served(files, entry),
            State::Redacted => self.check_redacted(files, entry),
            State::Damaged | State::Absent => Ok(None),
        };
        checked.unwrap_or_else(|error| Some(Wrong::Unreadable(error)))
    }

    /// Nothing of the frame is left, or its redaction is in progress.
    fn check_redacted(&self, files: &Files, entry: &Entry) -> io::Result<Option<Wrong>> {
        if is_zero(&files.frames, entry.offset, entry.end())? {
            return Ok(None);
        }
        let redactions = Redactions::load(self.dir).map_err(io::Error::other)?;
        // In this order: it may have been punched out before the journal was read.
        let punched = is_zero(&files.frames, entry.offset, entry.end())?;
        Ok((!punched && !redactions.may_cover(entry)).then_some(Wrong::NotPunched))
    }
}

fn check_served(files: &Files, entry: &Entry) -> io::Result<Option<Wrong>> {
    let (end, len) = (entry.end(), files.frames.metadata()?.len());
    if end > len {
        return Ok(Some(Wrong::BehindTheEnd { end, len }));
    }
    let frame = read_frame(files, entry)?;
    if crc32fast::hash(&frame) != entry.frame_crc {
        return Ok(Some(Wrong::Checksum));
    }
    let Some(payload) = wire::payload(&frame) else {
        return Ok(Some(Wrong::FrameHeader));
    };
    let Some(facts) = rebuild::Facts::of(payload) else {
        return Ok(Some(Wrong::NoEvent));
    };
    Ok(if facts.seq != entry.seq {
        Some(Wrong::Seq(facts.seq))
    } else if facts.did.hash64() != entry.did_hash {
        Some(Wrong::Did)
    } else if facts.kind != entry.kind {
        let (expected, found) = (entry.kind, facts.kind);
        Some(Wrong::Kind { expected, found })
    } else {
        None
    })
}

/// True where the bytes from `from` to `to` are zeros, or behind the end of the file.
fn is_zero(file: &File, from: u64, to: u64) -> io::Result<bool> {
    let mut block = vec![0; BYTES_PER_LOOK.min((to - from) as usize)];
    let mut at = from;
    while at < to {
        let want = block.len().min((to - at) as usize);
        let read = read_up_to(file, &mut block[..want], at)?;
        if block[..read].iter().any(|byte| *byte != 0) {
            return Ok(false);
        }
        if read < want {
            break;
        }
        at += read as u64;
    }
    Ok(true)
}
