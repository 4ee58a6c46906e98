//! A thread that syncs one file while its owner syncs another: a group of events waits for one disk
//! latency instead of two. Promises an answer for every file handed over.

use std::io;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread;

use super::disk::LogFile;

/// The thread; ends when this is dropped.
#[derive(Debug)]
pub(super) struct Syncer {
    files: SyncSender<Arc<LogFile>>,
    results: Receiver<io::Result<()>>,
}

impl Syncer {
    pub fn start() -> io::Result<Syncer> {
        let (files, inbox) = sync_channel::<Arc<LogFile>>(1);
        let (outbox, results) = sync_channel(1);
        let work = move || {
            for file in inbox {
                if outbox.send(file.sync_data()).is_err() {
                    return;
                }
            }
        };
        thread::Builder::new()
            .name("index-sync".into())
            .spawn(work)?;
        Ok(Syncer { files, results })
    }

    /// Syncs both files; returns when both are on disk or one has failed.
    pub fn sync_both(&self, here: &LogFile, beside: &Arc<LogFile>) -> io::Result<()> {
        let ended = || io::Error::other("the index-sync thread has ended");
        self.files.send(beside.clone()).map_err(|_| ended())?;
        let result = here.sync_data();
        // The answer is taken in any case, so that the next one belongs to the next file.
        let beside = self.results.recv().map_err(|_| ended())?;
        result.and(beside)
    }
}
