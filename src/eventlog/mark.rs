//! The last sequence number that was published, in a file beside the segments: where a segment or its index loses its
//! end, the numbers that were in it stay taken. Written, not synced, between every group's sync and its publication: it
//! is exact when the process dies, and with `Durability::Sync` may lag behind, but never leads, when the power fails.

use std::fs;
use std::io;
use std::path::Path;

use super::disk::LogFile;

/// Name of the file.
const FILE: &str = "head";
/// The number and its checksum.
const BYTES: usize = 12;

/// The open file.
#[derive(Debug)]
pub(super) struct Mark(LogFile);

impl Mark {
    /// Opens the mark of a folder, and reads it.
    pub fn open(dir: &Path) -> io::Result<(Mark, u64)> {
        let head = read(dir)?;
        Ok((Mark(LogFile::open(&dir.join(FILE), None)?), head))
    }

    /// Notes that everything up to `head` is published. That it cannot be noted is no reason to stop.
    pub fn set(&self, head: u64) {
        if let Err(error) = self.0.write_all_at(&encode(head), 0) {
            tracing::debug!(%error, "noting the head of the event log");
        }
    }
}

/// The number in a folder's mark: 0 without one, or with a damaged one.
pub(super) fn read(dir: &Path) -> io::Result<u64> {
    match fs::read(dir.join(FILE)) {
        Ok(bytes) => Ok(bytes
            .as_slice()
            .try_into()
            .ok()
            .and_then(decode)
            .unwrap_or(0)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(0),
        Err(error) => Err(error),
    }
}

fn encode(head: u64) -> [u8; BYTES] {
    let mut bytes = [0; BYTES];
    let (number, crc) = bytes.split_at_mut(8);
    number.copy_from_slice(&head.to_le_bytes());
    crc.copy_from_slice(&crc32fast::hash(number).to_le_bytes());
    bytes
}

fn decode(bytes: &[u8; BYTES]) -> Option<u64> {
    let head = u64::from_le_bytes(bytes[..8].try_into().ok()?);
    (encode(head) == *bytes).then_some(head)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mark_reads_back_and_a_damaged_one_says_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let (mark, head) = Mark::open(folder.path()).unwrap();
        assert_eq!(head, 0);
        mark.set(4_711);
        assert_eq!(Mark::open(folder.path()).unwrap().1, 4_711);
        let path = folder.path().join(FILE);
        let whole = std::fs::read(&path).unwrap();
        for at in 0..whole.len() {
            let mut damaged = whole.clone();
            damaged[at] ^= 1;
            std::fs::write(&path, damaged).unwrap();
            assert_eq!(Mark::open(folder.path()).unwrap().1, 0, "byte {at}");
            std::fs::write(&path, &whole[..at]).unwrap();
            assert_eq!(Mark::open(folder.path()).unwrap().1, 0, "cut at {at}");
        }
    }
}
