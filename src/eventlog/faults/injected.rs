//! Faults that tests inject into the log's files.

use std::io;
use std::ops::Range;

use parking_lot::{Condvar, Mutex, MutexGuard};
use rustix::io::Errno;

/// Faults that tests inject into the log's writes. None at first.
#[derive(Debug, Default)]
pub struct Faults {
    plan: Mutex<Plan>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct Plan {
    /// Bytes that may still be written before the disk is full.
    room: Option<u64>,
    /// Syncs that fail with EIO from now on.
    failing_syncs: u64,
    /// Writes that fail with EIO from now on.
    failing_writes: u64,
    /// Segment and offset of a byte of its frames that cannot be read.
    bad_sector: Option<(u64, u64)>,
    /// Holes that may still be punched before that fails with EIO.
    punches_left: Option<u64>,
    /// Nothing is punched out.
    holds_punches: bool,
    /// What is rewritten after a failed sync has been read, and is not yet written.
    holds_rewrites: bool,
    /// Rewrites that were held.
    held_rewrites: u64,
    /// Operations refused so far.
    refused: u64,
}

impl Faults {
    /// The disk takes `bytes` more, then writes fail with ENOSPC (in the middle of a write, too).
    pub fn fill_disk_after(&self, bytes: u64) {
        self.plan().room = Some(bytes);
    }

    /// The next `count` syncs fail with EIO.
    pub fn fail_syncs(&self, count: u64) {
        self.plan().failing_syncs = count;
    }

    /// The next `count` writes fail with EIO, in their middle.
    pub fn fail_writes(&self, count: u64) {
        self.plan().failing_writes = count;
    }

    /// Reads of the byte at `offset` in the segment that begins at `first` fail with EIO.
    pub fn fail_reads_at(&self, first: u64, offset: u64) {
        self.plan().bad_sector = Some((first, offset));
    }

    /// So many holes can be punched yet, then that fails with EIO.
    pub fn fail_punches_after(&self, count: u64) {
        self.plan().punches_left = Some(count);
    }

    /// Punching a hole blocks until everything works again.
    pub fn hold_punches(&self) {
        self.plan().holds_punches = true;
    }

    /// Rewriting bytes after a failed sync blocks, between reading and writing, until everything works again.
    pub fn hold_rewrites(&self) {
        self.plan().holds_rewrites = true;
    }

    /// How many rewrites have been held.
    pub fn held_rewrites(&self) -> u64 {
        self.plan().held_rewrites
    }

    /// Every operation works again.
    pub fn heal(&self) {
        let mut plan = self.plan();
        *plan = Plan {
            refused: plan.refused,
            held_rewrites: plan.held_rewrites,
            ..Plan::default()
        };
        self.changed.notify_all();
    }

    /// Waits while the plan holds this.
    fn wait_while(&self, holds: impl Fn(&Plan) -> bool) {
        self.changed
            .wait_while(&mut self.plan(), |plan| holds(plan));
    }

    /// Where a rewrite is held.
    pub(in crate::eventlog) fn meet_held_rewrite(&self) {
        if self.plan().holds_rewrites {
            self.plan().held_rewrites += 1;
            self.wait_while(|plan| plan.holds_rewrites);
        }
    }

    /// Bytes that may still be written before the disk is full.
    pub(in crate::eventlog) fn room(&self) -> Option<u64> {
        self.plan().room
    }

    pub(in crate::eventlog) fn write_fails(&self) -> bool {
        self.fails(|plan| &mut plan.failing_writes)
    }

    pub(in crate::eventlog) fn sync_fails(&self) -> bool {
        self.fails(|plan| &mut plan.failing_syncs)
    }

    /// Gives back the room of a removed file.
    pub(in crate::eventlog) fn free(&self, bytes: u64) {
        if let Some(room) = &mut self.plan().room {
            *room += bytes;
        }
    }

    /// How many operations have been refused.
    pub fn refused(&self) -> u64 {
        self.plan().refused
    }

    fn plan(&self) -> MutexGuard<'_, Plan> {
        self.plan.lock()
    }

    /// How many of `wanted` bytes may be written.
    pub(in crate::eventlog) fn grant(&self, wanted: u64) -> u64 {
        let mut plan = self.plan();
        let Some(room) = plan.room else {
            return wanted;
        };
        let granted = room.min(wanted);
        plan.room = Some(room - granted);
        plan.refused += u64::from(granted < wanted);
        granted
    }

    pub(in crate::eventlog) fn check_read(&self, first: u64, bytes: Range<u64>) -> io::Result<()> {
        let mut plan = self.plan();
        match plan.bad_sector {
            Some((bad, offset)) if bad == first && bytes.contains(&offset) => {
                plan.refused += 1;
                Err(Errno::IO.into())
            }
            _ => Ok(()),
        }
    }

    /// Where a punch is held, and whether it fails then.
    pub(in crate::eventlog) fn punch_fails(&self) -> bool {
        self.wait_while(|plan| plan.holds_punches);
        let mut plan = self.plan();
        match &mut plan.punches_left {
            None => false,
            Some(0) => {
                plan.refused += 1;
                true
            }
            Some(left) => {
                *left -= 1;
                false
            }
        }
    }

    /// True where the operation that `count` counts is to fail.
    fn fails(&self, count: impl FnOnce(&mut Plan) -> &mut u64) -> bool {
        let mut plan = self.plan();
        let left = count(&mut plan);
        if *left == 0 {
            return false;
        }
        *left -= 1;
        plan.refused += 1;
        true
    }
}
