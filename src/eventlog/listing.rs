//! The segments of a data folder, by the names of their files. Opens none of them.

use std::fs;
use std::io;
use std::path::Path;

use super::account_index;
use super::entry::SEQ_LIMIT;
use super::segment::index_path;

/// Digits of the sequence number in a segment's name.
const NAME_DIGITS: usize = 20;

/// The segments' files in a folder.
#[derive(Debug, Default)]
pub(super) struct Listed {
    /// First sequence numbers of those with frames, ascending.
    frames: Vec<u64>,
    /// Of indexes without frames, ascending.
    indexes: Vec<u64>,
    /// Of account indexes.
    account_indexes: Vec<u64>,
}

/// Looks for the segments of a folder; foreign files do not count.
pub(super) fn list(dir: &Path) -> io::Result<Listed> {
    let mut listed = Listed::default();
    for file in fs::read_dir(dir)? {
        let name = file?.file_name();
        let Some((stem, kind)) = name.to_str().and_then(|name| name.split_once('.')) else {
            continue;
        };
        let Ok(first) = stem.parse::<u64>() else {
            continue;
        };
        match kind {
            _ if stem.len() != NAME_DIGITS || !(1..SEQ_LIMIT).contains(&first) => {}
            "seg" => listed.frames.push(first),
            "idx" => listed.indexes.push(first),
            "acc" | "acc.new" => listed.account_indexes.push(first),
            _ => {}
        }
    }
    listed.frames.sort_unstable();
    let frames = &listed.frames;
    listed
        .indexes
        .retain(|first| frames.binary_search(first).is_err());
    listed.indexes.sort_unstable();
    Ok(listed)
}

impl Listed {
    /// First sequence numbers of all segments, ascending, those whose frames are lost included.
    pub fn segments(&self) -> Vec<u64> {
        let mut firsts = [self.frames.clone(), self.lost_segments()].concat();
        firsts.sort_unstable();
        firsts
    }

    /// Segments of which only the index is left. Retention removes the oldest first, so it was not it
    /// that took their frames; their sequence numbers are given.
    fn lost_segments(&self) -> Vec<u64> {
        let lost = self
            .indexes
            .iter()
            .filter(|first| !self.is_leftover(**first));
        lost.copied().collect()
    }

    /// Indexes that an interrupted removal of the oldest segment left.
    pub fn leftovers(&self) -> impl Iterator<Item = u64> {
        let left = self
            .indexes
            .iter()
            .filter(|first| self.is_leftover(**first));
        left.copied()
    }

    fn is_leftover(&self, first: u64) -> bool {
        self.frames.first().is_some_and(|oldest| first < *oldest)
    }

    /// Removes them, and account indexes that are left without a segment, or half written.
    pub fn remove_leftovers(&self, dir: &Path) -> io::Result<()> {
        for first in &self.account_indexes {
            let is_held = self.frames.binary_search(first).is_ok();
            account_index::remove_leftovers(dir, *first, is_held)?;
        }
        self.leftovers()
            .try_for_each(|first| fs::remove_file(index_path(dir, first)))
    }
}
