//! Frames that cannot be read from the disk: read again, and marked as lost if that fails too, so that one bad sector does not
//! stop every consumer that passes it.
//! Promises that only unreadable events are marked; their numbers stay taken.

use std::io;
use std::ops::Range;
use std::thread;
use std::time::Duration;

use parking_lot::Mutex;

use super::Shared;
use super::disk::{LogFile, is_disk_error};
use super::entry::{self, Entry, State};
use super::segment::{Files, Segment, index_path, read_frame};

/// How often a frame is read before it is given up, and the pause in between.
const READS: u32 = 3;
const READ_PAUSE: Duration = Duration::from_millis(100);

/// Events that readers could not read.
#[derive(Debug, Default)]
pub(super) struct Suspects(Mutex<Vec<Range<u64>>>);

impl Suspects {
    fn add(&self, seqs: Range<u64>) {
        let mut suspects = self.0.lock();
        if !suspects.contains(&seqs) {
            suspects.push(seqs);
        }
    }

    /// Those so far. Lets go of the lock: who adds one holds the gate of its segment.
    fn take(&self) -> Vec<Range<u64>> {
        std::mem::take(&mut *self.0.lock())
    }
}

impl Shared {
    /// Has events checked, one of which could not be read.
    pub(super) fn suspect(&self, seqs: Range<u64>) {
        self.suspects.add(seqs);
        self.bells.retention.ring();
    }

    /// Marks those of the suspects that cannot be read.
    pub(super) fn give_up_unreadable(&self) {
        for seq in self.suspects.take().into_iter().flatten() {
            if let Err(error) = self.look_at(seq) {
                tracing::warn!(seq, %error, "looking at an event that the disk did not give");
            }
        }
    }

    fn look_at(&self, seq: u64) -> io::Result<()> {
        let Ok(segment) = self.segment_of(seq) else {
            // Retention was faster.
            return Ok(());
        };
        let files = segment.files()?;
        let entry = segment.entry(&files, seq)?;
        let Some(entry) = entry.filter(|entry| entry.state == State::Served) else {
            return Ok(());
        };
        if !self.is_lost(&segment, &files, &entry) {
            return Ok(());
        }
        let path = index_path(&segment.dir, segment.first);
        let index = LogFile::open_existing(&path, self.options.faults.clone())?;
        let _changes = segment.changes.lock();
        let _gate = segment.gate.write();
        index.write_all_at(
            &[State::Damaged as u8],
            entry::state_position(segment.first, seq),
        )?;
        tracing::error!(
            seq, folder = %self.dir.display(),
            "the disk has lost an event: it is left out from now on; the disk is failing, replace it"
        );
        index.sync_data()
    }

    fn is_lost(&self, segment: &Segment, files: &Files, entry: &Entry) -> bool {
        (0..READS).all(|read| {
            if read > 0 {
                thread::sleep(READ_PAUSE);
            }
            let bytes = entry.offset..entry.end();
            let frame = self
                .meet_bad_sector(segment.first, bytes)
                .and_then(|()| read_frame(files, entry));
            frame.is_err_and(|error| is_disk_error(&error))
        })
    }

    /// Fails where tests have put a bad sector into these bytes of the segment's frames.
    pub(super) fn meet_bad_sector(&self, first: u64, bytes: Range<u64>) -> io::Result<()> {
        match &self.options.faults {
            Some(faults) => faults.check_read(first, bytes),
            None => Ok(()),
        }
    }
}
