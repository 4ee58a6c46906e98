//! Repair of a whole log; a start repairs the last segment only. Holds the folder's lock meanwhile.
//! Promises that sequence numbers which were given stay given, and to say what it changes.

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};

use super::account_index::{self, short_hash};
use super::check::{Changes, Checked, Unreadable, Until, check};
use super::disk::written_bytes;
use super::segment::{frames_path, index_path};
use super::{LogError, listing, lock, mark};

/// What is mended in one segment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Repair {
    /// The segment's frames.
    pub segment: PathBuf,
    /// What becomes of its index.
    pub index: Changes,
    /// Bytes cut behind the last event.
    pub cut_bytes: u64,
    /// The account index is not that of its events, and is removed.
    pub accounts: bool,
}

/// What became of a folder.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Repaired {
    pub segments: u64,
    pub events: u64,
    /// What was not as it should be, oldest first.
    pub repairs: Vec<Repair>,
    /// Indexes that retention left, removed.
    pub leftovers: Vec<PathBuf>,
    /// Segments before a gap that is too large to be held: left as they are, and not served.
    pub unused: Vec<PathBuf>,
}

/// Checks every frame of a log and mends what is wrong: indexes are rebuilt from frames, a torn tail is
/// cut, lost events are marked. With `dry_run` it only reports. `step` is called after each
/// segment.
pub fn repair(dir: &Path, dry_run: bool, step: &mut dyn FnMut()) -> Result<Repaired, LogError> {
    let listed = listing::list(dir).map_err(|error| match error.kind() {
        io::ErrorKind::NotFound => LogError::NoFolder(dir.to_owned()),
        _ => LogError::io("reading the log folder", dir)(error),
    })?;
    let mut firsts = listed.segments();
    if firsts.is_empty() {
        return Err(LogError::NotALog(dir.to_owned()));
    }
    let _lock = if dry_run {
        lock::lock_for_a_look(dir)?
    } else {
        Some(lock::lock_folder(dir)?)
    };
    let mut repaired = Repaired {
        leftovers: listed.leftovers().map(|it| index_path(dir, it)).collect(),
        ..Repaired::default()
    };
    if !dry_run {
        let failed = LogError::io("removing what retention left in", dir);
        listed.remove_leftovers(dir).map_err(failed)?;
    }
    let failed = LogError::io("reading the mark in", dir);
    let mut until = Until::Published(mark::read(dir).map_err(failed)?);
    while let Some(first) = firsts.pop() {
        let path = frames_path(dir, first);
        let failed = LogError::io("repairing", &path);
        let checked = check(dir, first, until, Unreadable::Mark).map_err(&failed)?;
        let next = checked.end().next_seq;
        let lacks = match until {
            Until::Next(until) => next != until,
            Until::Published(published) => next <= published,
        };
        if lacks {
            firsts.push(first);
            break;
        }
        repaired.segments += 1;
        repaired.events += checked.entries.len() as u64;
        let accounts = checked.entries.iter().map(|it| short_hash(it.did_hash));
        let fits = account_index::fits(dir, first, accounts).map_err(&failed)?;
        repaired
            .repairs
            .extend(due(&checked, path.clone(), !fits).map_err(&failed)?);
        if !dry_run {
            checked.apply(dir).map_err(&failed)?;
        }
        if !dry_run && !fits {
            account_index::remove(dir, first).map_err(&failed)?;
        }
        until = Until::Next(first);
        step();
    }
    repaired.repairs.reverse();
    repaired.unused = firsts.iter().map(|it| frames_path(dir, *it)).collect();
    Ok(repaired)
}

/// What is to be mended, if that is more than to give back reserved space.
fn due(checked: &Checked, segment: PathBuf, accounts: bool) -> io::Result<Option<Repair>> {
    let cut_bytes = match File::open(&segment) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => 0,
        other => written_bytes(&other?, checked.end().offset)?,
    };
    let index = checked.changes();
    let none = Changes {
        header: false,
        rebuilt: 0,
        damaged: Vec::new(),
        cut: 0,
    };
    let is_whole = checked.is_new() || (index == none && cut_bytes == 0 && !accounts);
    Ok((!is_whole).then_some(Repair {
        segment,
        index,
        cut_bytes,
        accounts,
    }))
}
