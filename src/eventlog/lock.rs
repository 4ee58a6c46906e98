//! One relay at a time in a data folder: a lock that ends with the process, however that ends.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;

use super::LogError;

/// File whose lock says that a relay uses the folder; holds its process id.
const LOCK: &str = "lock";
const LOCK_MODE: u32 = 0o640;

/// The hold on a folder, given up when dropped.
#[derive(Debug)]
pub(super) struct FolderLock(File);

impl Drop for FolderLock {
    fn drop(&mut self) {
        // Closing alone would leave the lock to a child process that is just being started.
        let _ = flock(&self.0, FlockOperation::Unlock);
    }
}

/// Takes the folder for this process.
pub(super) fn lock_folder(dir: &Path) -> Result<FolderLock, LogError> {
    let path = dir.join(LOCK);
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .mode(LOCK_MODE)
        .open(&path)
        .map_err(LogError::io("opening the lock", &path))?;
    let mut lock = hold(file, dir)?;
    // The process id is only shown to operators, so failing to write it (a full disk) is no error.
    let _ = lock
        .0
        .set_len(0)
        .and_then(|()| writeln!(lock.0, "{}", std::process::id()));
    Ok(lock)
}

/// Keeps relays out of a folder without leaving anything in it. `None` where none has ever used it.
pub(super) fn lock_for_a_look(dir: &Path) -> Result<Option<FolderLock>, LogError> {
    let path = dir.join(LOCK);
    match File::open(&path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(LogError::io("opening the lock", &path)(error)),
        Ok(file) => hold(file, dir).map(Some),
    }
}

fn hold(mut file: File, dir: &Path) -> Result<FolderLock, LogError> {
    match flock(&file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(FolderLock(file)),
        Err(Errno::WOULDBLOCK) => {
            let mut text = String::new();
            let owner = file
                .read_to_string(&mut text)
                .ok()
                .and_then(|_| text.trim().parse().ok());
            Err(LogError::InUse {
                dir: dir.to_owned(),
                owner,
            })
        }
        Err(error) => Err(LogError::io("locking", &dir.join(LOCK))(error.into())),
    }
}
