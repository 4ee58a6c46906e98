//! The few file operations the log writes with. Tests make them fail: see `faults.rs`.
//! Promises whole writes or an error; knows nothing of segments.

use std::fs::{File, OpenOptions};
use std::io::{self, IoSlice};
use std::num::NonZeroU64;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::sync::Arc;

use rustix::fs::{Advice, FallocateFlags, fadvise, fallocate, fdatasync, statvfs};
use rustix::io::{Errno, pwritev};

use super::faults::Faults;

/// Files of the log: readable by the owner and the group only.
const FILE_MODE: u32 = 0o640;
/// Pieces that one write may have (IOV_MAX of Linux).
const MAX_PIECES: usize = 1024;
/// Zeros written at a time where the file system cannot punch holes.
static ZEROS: [u8; 64 * 1024] = [0; 64 * 1024];

/// Bytes looked through at a time for what is not zero.
const BYTES_PER_LOOK: usize = 64 * 1024;

/// True for an error of the disk itself (EIO).
pub(super) fn is_disk_error(error: &io::Error) -> bool {
    Errno::from_io_error(error) == Some(Errno::IO)
}

/// A file the log writes to.
#[derive(Debug)]
pub(super) struct LogFile {
    file: File,
    faults: Option<Arc<Faults>>,
}

impl LogFile {
    /// Opens a file for reading and writing, created where it is missing.
    pub fn open(path: &Path, faults: Option<Arc<Faults>>) -> io::Result<LogFile> {
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(FILE_MODE)
            .open(path)?;
        Ok(LogFile { file, faults })
    }

    /// Opens a file that must be there, for changes in place.
    pub fn open_existing(path: &Path, faults: Option<Arc<Faults>>) -> io::Result<LogFile> {
        let file = OpenOptions::new().read(true).write(true).open(path)?;
        Ok(LogFile { file, faults })
    }

    pub fn read_exact_at(&self, out: &mut [u8], offset: u64) -> io::Result<()> {
        self.file.read_exact_at(out, offset)
    }

    /// Writes all of `bytes` at `offset`. On an error a part may have been written.
    pub fn write_all_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        if self.meets(Faults::write_fails) {
            self.file.write_all_at(&bytes[..bytes.len() / 2], offset)?;
            return Err(Errno::IO.into());
        }
        let granted = match &self.faults {
            Some(faults) => faults.grant(bytes.len() as u64) as usize,
            None => bytes.len(),
        };
        self.file.write_all_at(&bytes[..granted], offset)?;
        if granted < bytes.len() {
            return Err(Errno::NOSPC.into());
        }
        Ok(())
    }

    /// Writes all of `pieces`, one behind the other, at `offset`. On an error a part may have been written.
    pub fn write_all_vectored_at(
        &self,
        mut pieces: &mut [IoSlice<'_>],
        mut offset: u64,
    ) -> io::Result<()> {
        if self.faults.is_some() {
            return self.write_pieces_at(pieces, offset);
        }
        while !pieces.is_empty() {
            let some = &pieces[..pieces.len().min(MAX_PIECES)];
            let written = match pwritev(&self.file, some, offset) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(written) => written,
                Err(Errno::INTR) => continue,
                Err(error) => return Err(error.into()),
            };
            IoSlice::advance_slices(&mut pieces, written);
            offset += written as u64;
        }
        Ok(())
    }

    /// The same, piece by piece, each of which may meet a fault.
    fn write_pieces_at(&self, pieces: &[IoSlice<'_>], mut offset: u64) -> io::Result<()> {
        for piece in pieces {
            self.write_all_at(piece, offset)?;
            offset += piece.len() as u64;
        }
        Ok(())
    }

    /// Lets the page cache forget a range that was synced.
    pub fn forget(&self, offset: u64, len: u64) {
        let Some(len) = NonZeroU64::new(len) else {
            return;
        };
        // Advice: where it is not taken nothing is lost.
        fadvise(&self.file, offset, Some(len), Advice::DontNeed).ok();
    }

    /// Brings what was written to stable storage.
    pub fn sync_data(&self) -> io::Result<()> {
        if self.meets(Faults::sync_fails) {
            return Err(Errno::IO.into());
        }
        Ok(fdatasync(&self.file)?)
    }

    /// Reserves zeroed space from `from` to `to` and makes the file that long.
    pub fn allocate(&self, from: u64, to: u64) -> io::Result<()> {
        if to <= from {
            return Ok(());
        }
        if self.meets(|faults| faults.room().is_some()) {
            return Err(Errno::NOSPC.into());
        }
        Ok(fallocate(
            &self.file,
            FallocateFlags::empty(),
            from,
            to - from,
        )?)
    }

    /// Where tests hold what is written once more after a failed sync.
    pub fn meet_held_rewrite(&self) {
        if let Some(faults) = &self.faults {
            faults.meet_held_rewrite();
        }
    }

    pub fn set_len(&self, len: u64) -> io::Result<()> {
        self.file.set_len(len)
    }

    /// Makes a range read as zeros, and gives its space back where the file system can.
    pub fn punch(&self, offset: u64, len: u64) -> io::Result<()> {
        if self.meets(Faults::punch_fails) {
            return Err(Errno::IO.into());
        }
        let mode = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        match fallocate(&self.file, mode, offset, len) {
            Err(Errno::OPNOTSUPP | Errno::NOSYS | Errno::INVAL) => self.zero(offset, len),
            other => Ok(other?),
        }
    }

    /// True where tests make this operation fail.
    fn meets(&self, fault: impl FnOnce(&Faults) -> bool) -> bool {
        self.faults.as_deref().is_some_and(fault)
    }

    fn zero(&self, mut offset: u64, mut len: u64) -> io::Result<()> {
        while len > 0 {
            let step = len.min(ZEROS.len() as u64);
            self.file.write_all_at(&ZEROS[..step as usize], offset)?;
            offset += step;
            len -= step;
        }
        Ok(())
    }
}

/// Room on a file system, for users without privileges.
#[derive(Debug, Clone, Copy)]
pub struct Room {
    /// Size of the file system in bytes.
    pub total: u64,
    /// Bytes that may still be written.
    pub free: u64,
}

/// The room on the file system of a folder.
pub(super) fn room(dir: &Path, faults: Option<&Faults>) -> io::Result<Room> {
    let stat = statvfs(dir)?;
    let feigned = faults.and_then(Faults::room);
    Ok(Room {
        total: stat.f_blocks.saturating_mul(stat.f_frsize),
        free: feigned.unwrap_or(stat.f_bavail.saturating_mul(stat.f_frsize)),
    })
}

/// Bytes from `from` up to the last one that is not zero: reserved space is not counted.
pub(super) fn written_bytes(file: &File, from: u64) -> io::Result<u64> {
    let mut block = vec![0; BYTES_PER_LOOK];
    let (mut at, mut written) = (from, 0);
    loop {
        let read = read_up_to(file, &mut block, at)?;
        if read == 0 {
            return Ok(written);
        }
        if let Some(last) = block[..read].iter().rposition(|byte| *byte != 0) {
            written = at - from + last as u64 + 1;
        }
        at += read as u64;
    }
}

/// Reads what there is, up to the end of the file.
pub(super) fn read_up_to(file: &File, out: &mut [u8], offset: u64) -> io::Result<usize> {
    let mut read = 0;
    while read < out.len() {
        match file.read_at(&mut out[read..], offset + read as u64) {
            Ok(0) => break,
            Ok(count) => read += count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(read)
}

/// Brings the entries of a folder (created, renamed, removed files) to stable storage.
pub(super) fn sync_folder(dir: &Path) -> io::Result<()> {
    File::open(dir)?.sync_all()
}
