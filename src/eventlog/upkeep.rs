//! The log's housekeeping threads. One does retention, on time and when a segment ends, and looks at what the disk did
//! not give when asked; the other does redactions, which a full disk must not wait for.
//! Promises to end with the log; failures are logged and tried again.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, SyncSender, TrySendError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant, SystemTime};

use parking_lot::{Mutex, MutexGuard};

use super::{LogError, Shared};

/// Either looks this often when nothing wakes it.
const LOOK_EVERY: Duration = Duration::from_secs(30);
/// Between two passes of redaction: what comes meanwhile shares the next one.
const MIN_PASS_PAUSE: Duration = Duration::from_secs(1);
const MAX_PASS_PAUSE: Duration = Duration::from_secs(60);
/// A pause is this many times as long as the pass before it took, within those bounds: redaction has a twentieth of one
/// processor and of the disk, however many accounts are deleted.
const PAUSE_PER_PASS: u32 = 20;

/// What a thread is woken for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Call {
    /// There is something to remove or to redact.
    Look,
    /// The log closes.
    End,
}

/// Wakes one of the threads.
#[derive(Debug, Clone)]
pub(super) struct Bell(SyncSender<Call>);

impl Bell {
    /// One waiting call is enough: the thread checks everything.
    fn new() -> (Bell, Receiver<Call>) {
        let (sender, calls) = mpsc::sync_channel(1);
        (Bell(sender), calls)
    }

    /// There is something to do.
    pub fn ring(&self) {
        match self.0.try_send(Call::Look) {
            Ok(()) | Err(TrySendError::Full(_)) => {}
            Err(TrySendError::Disconnected(_)) => tracing::debug!("the upkeep thread has ended"),
        }
    }
}

/// How the threads are woken.
#[derive(Debug, Clone)]
pub(super) struct Bells {
    pub retention: Bell,
    pub redaction: Bell,
}

/// Where the threads hear the bells.
pub(super) struct Calls {
    retention: Receiver<Call>,
    redaction: Receiver<Call>,
}

pub(super) fn bells() -> (Bells, Calls) {
    let (retention, retention_calls) = Bell::new();
    let (redaction, redaction_calls) = Bell::new();
    let bells = Bells {
        retention,
        redaction,
    };
    let calls = Calls {
        retention: retention_calls,
        redaction: redaction_calls,
    };
    (bells, calls)
}

/// The threads. Dropping it ends them.
#[derive(Debug)]
pub(super) struct Upkeep {
    bells: Bells,
    ending: Arc<AtomicBool>,
    threads: Mutex<Vec<JoinHandle<()>>>,
}

impl Upkeep {
    pub fn start(shared: &Arc<Shared>, calls: Calls) -> Result<Upkeep, LogError> {
        let upkeep = Upkeep {
            bells: shared.bells.clone(),
            ending: Arc::new(AtomicBool::new(false)),
            threads: Mutex::default(),
        };
        upkeep.spawn("eventlog-upkeep", shared, calls.retention, keep)?;
        upkeep.spawn("eventlog-redact", shared, calls.redaction, redact)?;
        Ok(upkeep)
    }

    fn spawn(
        &self,
        name: &str,
        shared: &Arc<Shared>,
        calls: Receiver<Call>,
        run: fn(&Shared, &Receiver<Call>, &AtomicBool),
    ) -> Result<(), LogError> {
        let (shared, ending) = (shared.clone(), self.ending.clone());
        let dir = shared.dir.clone();
        let thread = thread::Builder::new()
            .name(name.into())
            .spawn(move || run(&shared, &calls, &ending))
            .map_err(LogError::io("starting the upkeep of", &dir))?;
        self.threads().push(thread);
        Ok(())
    }

    fn threads(&self) -> MutexGuard<'_, Vec<JoinHandle<()>>> {
        self.threads.lock()
    }
}

impl Drop for Upkeep {
    fn drop(&mut self) {
        self.ending.store(true, Ordering::Release);
        // A full channel means that the thread is about to look, and sees the flag.
        let _ = self.bells.retention.0.try_send(Call::End);
        let _ = self.bells.redaction.0.try_send(Call::End);
        for thread in self.threads().drain(..) {
            if thread.join().is_err() {
                tracing::error!("the upkeep of the event log panicked");
            }
        }
    }
}

fn keep(shared: &Shared, calls: &Receiver<Call>, ending: &AtomicBool) {
    while !ending.load(Ordering::Acquire) {
        shared.trim(Instant::now(), SystemTime::now());
        shared.give_up_unreadable();
        match calls.recv_timeout(LOOK_EVERY) {
            Ok(Call::Look) | Err(RecvTimeoutError::Timeout) => {}
            Ok(Call::End) | Err(RecvTimeoutError::Disconnected) => return,
        }
    }
}

/// Passes of redaction, one when it is called for and the pause after the last one is over.
fn redact(shared: &Shared, calls: &Receiver<Call>, ending: &AtomicBool) {
    let mut failing = false;
    // When the next pass may begin.
    let mut next = Instant::now();
    while !ending.load(Ordering::Acquire) {
        let due = shared.redactions.pending() > 0;
        shared.index_accounts();
        if due {
            let began = Instant::now();
            shared.redact_pending(ending, &mut failing);
            let pause = began.elapsed() * PAUSE_PER_PASS;
            next = Instant::now() + pause.clamp(MIN_PASS_PAUSE, MAX_PASS_PAUSE);
        }
        let mut called = calls.recv_timeout(LOOK_EVERY);
        while called == Ok(Call::Look) && shared.redactions.pending() > 0 {
            let left = next.saturating_duration_since(Instant::now());
            if left.is_zero() {
                break;
            }
            match calls.recv_timeout(left) {
                Ok(call) => called = Ok(call),
                Err(RecvTimeoutError::Timeout) => break,
                Err(RecvTimeoutError::Disconnected) => return,
            }
        }
        if matches!(called, Ok(Call::End) | Err(RecvTimeoutError::Disconnected)) {
            break;
        }
    }
    shared.index_accounts();
}

impl Shared {
    /// Writes the account indexes of segments that have ended since.
    fn index_accounts(&self) {
        let segments = self.segments().clone();
        for segment in segments.iter().rev().skip(1) {
            match segment.index_accounts() {
                Ok(true) => {}
                Ok(false) => break,
                Err(error) => {
                    let first = segment.first;
                    tracing::warn!(first, %error, "writing an account index; a redaction makes it anew");
                }
            }
        }
    }
}
