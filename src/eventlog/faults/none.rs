//! No faults.

use std::io;
use std::ops::Range;

/// A fault, of which there is none.
#[derive(Debug)]
pub enum Faults {}

impl Faults {
    pub(in crate::eventlog) fn free(&self, _bytes: u64) {
        match *self {}
    }

    pub(in crate::eventlog) fn meet_held_rewrite(&self) {
        match *self {}
    }

    pub(in crate::eventlog) fn room(&self) -> Option<u64> {
        match *self {}
    }

    pub(in crate::eventlog) fn write_fails(&self) -> bool {
        match *self {}
    }

    pub(in crate::eventlog) fn sync_fails(&self) -> bool {
        match *self {}
    }

    pub(in crate::eventlog) fn punch_fails(&self) -> bool {
        match *self {}
    }

    pub(in crate::eventlog) fn grant(&self, _wanted: u64) -> u64 {
        match *self {}
    }

    pub(in crate::eventlog) fn check_read(
        &self,
        _first: u64,
        _bytes: Range<u64>,
    ) -> io::Result<()> {
        match *self {}
    }
}
