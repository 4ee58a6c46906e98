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
use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use super::account_index;
use super::check::{End, Unreadable, Until, check};
use super::disk::{LogFile, sync_folder};
use super::entry::{self, ENTRY_BYTES, Entry};
use super::listing::list;
use super::segment::{Segment, Writer, frames_path, index_path};
use super::{LogError, LogOptions};
use crate::telemetry::metrics;

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
