//! The log's housekeeping thread: retention on time and when a segment ends, redaction and looks at what
//! the disk did not give when asked.
//! Promises to end with the log; its failures are logged and tried again.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, SyncSender, TrySendError};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant, SystemTime};

use super::segment::Writer;
use super::{LogError, Shared};

/// Retention looks this often when nothing wakes it.
const LOOK_EVERY: Duration = Duration::from_secs(30);

/// What the thread is woken for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Call {
    /// There is something to remove or to redact.
    Look,
    /// The log closes.
    End,
}

/// A call that waits is enough: the thread looks at everything.
pub(super) fn channel() -> (SyncSender<Call>, Receiver<Call>) {
    mpsc::sync_channel(1)
}

/// The thread. Dropping it ends it.
#[derive(Debug)]
pub(super) struct Upkeep {
    wake: SyncSender<Call>,
    ending: Arc<AtomicBool>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

impl Upkeep {
    pub fn start(shared: Arc<Shared>, calls: Receiver<Call>) -> Result<Upkeep, LogError> {
        let ending = Arc::new(AtomicBool::new(false));
        let wake = shared.wake.clone();
        let dir = shared.dir.clone();
        let until = ending.clone();
        let thread = thread::Builder::new()
            .name("eventlog-upkeep".into())
            .spawn(move || run(&shared, &calls, &until))
            .map_err(LogError::io("starting the upkeep of", &dir))?;
        Ok(Upkeep {
            wake,
            ending,
            thread: Mutex::new(Some(thread)),
        })
    }
}

impl Drop for Upkeep {
    fn drop(&mut self) {
        self.ending.store(true, Ordering::Release);
        // A full channel means that the thread is about to look, and sees the flag.
        let _ = self.wake.try_send(Call::End);
        let thread = self
            .thread
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take();
        if thread.is_some_and(|thread| thread.join().is_err()) {
            tracing::error!("the upkeep of the event log panicked");
        }
    }
}

fn run(shared: &Shared, calls: &Receiver<Call>, ending: &AtomicBool) {
    while !ending.load(Ordering::Acquire) {
        shared.trim(Instant::now(), SystemTime::now());
        shared.redact_pending(ending);
        shared.give_up_unreadable();
        match calls.recv_timeout(LOOK_EVERY) {
            Ok(Call::Look) | Err(RecvTimeoutError::Timeout) => {}
            Ok(Call::End) | Err(RecvTimeoutError::Disconnected) => return,
        }
    }
}

impl Shared {
    /// Wakes the upkeep thread.
    pub(super) fn call(&self, call: Call) {
        match self.wake.try_send(call) {
            Ok(()) | Err(TrySendError::Full(_)) => {}
            Err(TrySendError::Disconnected(_)) => tracing::debug!("the upkeep thread has ended"),
        }
    }

    pub(super) fn take_writer(&self) -> Option<Writer> {
        self.writer
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take()
    }

    pub(super) fn put_writer(&self, writer: Writer) {
        *self.writer.lock().unwrap_or_else(PoisonError::into_inner) = Some(writer);
    }
}
