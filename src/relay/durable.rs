//! What happens to events that are on disk: account changes go to the database's writer, cursors move, operators are
//! answered, ended accounts are redacted. Knows up to where all that is done, which is where recovery would begin.

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{self, Receiver};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use tracing::error;

use crate::eventlog::EventLog;
use crate::verify::{Redaction, Settlement, Settler, Watched};

/// Deletions wait so long for others after the last ones, to share a write of the journal: each of them costs the
/// consumers the frames that they share in memory. An operator's takedown waits for nothing.
const GATHER: Duration = Duration::from_millis(100);
/// Most redactions noted at a time.
const MAX_BATCH: usize = 10_000;

/// Up to where everything that follows from an event is done or handed on. Clones share it.
#[derive(Clone)]
pub(super) struct Position {
    settled: Arc<AtomicU64>,
    /// Events whose redaction is not yet noted on disk.
    redacting: Arc<Mutex<BTreeSet<u64>>>,
}

impl Position {
    /// Everything up to `head` is done.
    pub fn new(head: u64) -> Self {
        Self {
            settled: Arc::new(AtomicU64::new(head)),
            redacting: Arc::default(),
        }
    }

    /// The last event of which, and of all before it, nothing is left to do.
    pub fn get(&self) -> u64 {
        // In this order: a redaction is entered before its event counts as settled.
        let settled = self.settled.load(Ordering::Acquire);
        let first = self.redacting().first().copied();
        first.map_or(settled, |first| settled.min(first.saturating_sub(1)))
    }

    fn redacting(&self) -> MutexGuard<'_, BTreeSet<u64>> {
        self.redacting
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}

/// What the sequencer calls with durable events. Redactions wait for the disk, so they have a thread, which ends with
/// the returned closure. `watched` goes with the sequencer's thread.
pub(super) fn on_durable(
    log: EventLog,
    settler: Settler,
    position: Position,
    watched: Watched,
) -> impl FnMut(Vec<(u64, Settlement)>) + Send {
    let (redactions, queue) = mpsc::channel::<Redaction>();
    let redacting = position.clone();
    let mut noted = Instant::now();
    // A thread of its own rather than one of the runtime's, whose end would wait for it.
    thread::spawn(move || {
        while let Some(batch) = gather(&queue, noted) {
            redact(&log, &redacting, batch);
            noted = Instant::now();
        }
    });
    move |durable| {
        let _watched = &watched;
        let last = durable.last().map(|(seq, _)| *seq);
        for redaction in settler.settle(durable) {
            position.redacting().insert(redaction.seq);
            // The thread ends only with this closure.
            let _ = redactions.send(redaction);
        }
        if let Some(last) = last {
            position.settled.store(last, Ordering::Release);
        }
    }
}

/// The redactions that are due, at least one; `None` when no more come. `noted`: when the last ones were.
fn gather(queue: &Receiver<Redaction>, noted: Instant) -> Option<Vec<Redaction>> {
    let mut awaited = false;
    let mut batch = Vec::new();
    let mut next = queue.recv().ok();
    while let Some(redaction) = next {
        awaited |= redaction.is_awaited();
        batch.push(redaction);
        if batch.len() == MAX_BATCH {
            break;
        }
        next = match GATHER.saturating_sub(noted.elapsed()) {
            left if awaited || left.is_zero() => queue.try_recv().ok(),
            left => queue.recv_timeout(left).ok(),
        };
    }
    (!batch.is_empty()).then_some(batch)
}

/// Readers follow redactions at once, also where they cannot be noted; then the position stays before them, so that
/// recovery does them again.
fn redact(log: &EventLog, position: &Position, batch: Vec<Redaction>) {
    let accounts = batch
        .iter()
        .map(|redaction| (redaction.did.clone(), redaction.seq.saturating_sub(1)));
    match log.redact_all(accounts) {
        Ok(()) => {
            let mut redacting = position.redacting();
            for redaction in &batch {
                redacting.remove(&redaction.seq);
            }
        }
        Err(failure) => {
            let accounts = batch.len();
            error!(accounts, %failure, "redactions hold, but could not be noted; the next start repeats them");
        }
    }
    batch.into_iter().for_each(Redaction::done);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_position_stays_before_the_first_open_redaction() {
        let position = Position::new(4);
        position.redacting().extend([7, 9]);
        position.settled.store(12, Ordering::Release);
        assert_eq!(position.get(), 6);
        position.redacting().remove(&7);
        assert_eq!(position.get(), 8);
        position.redacting().remove(&9);
        assert_eq!(position.get(), 12);
    }
}
