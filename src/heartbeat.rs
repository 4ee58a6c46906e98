//! The heartbeat of a part of the relay that must get on: it beats at each round of the part's work, also of no work at all.
//! Says where the part waits for something that is known to take long. Judges nothing: see [`crate::systemd::watchdog`].

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

/// Clones are the same heartbeat. It belongs to one thread or task; others only feel it.
#[derive(Clone, Debug, Default)]
pub struct Heartbeat(Arc<State>);

#[derive(Debug, Default)]
struct State {
    beats: AtomicU64,
    waits: AtomicBool,
}

impl Heartbeat {
    /// A round is done.
    pub fn beat(&self) {
        self.0.beats.fetch_add(1, Ordering::Release);
    }

    /// Does what may take as long as others hold this part up: a disk that is full, a database that is away, the next
    /// part's queue. It counts as alive meanwhile; who holds it up has a heartbeat or a line in the log of its own.
    pub fn wait<T>(&self, hold: impl FnOnce() -> T) -> T {
        self.0.waits.store(true, Ordering::Release);
        let result = hold();
        self.0.waits.store(false, Ordering::Release);
        result
    }

    /// Rounds so far.
    pub fn beats(&self) -> u64 {
        self.0.beats.load(Ordering::Acquire)
    }

    /// Whether it waits in [`Heartbeat::wait`] at this moment.
    pub fn is_waiting(&self) -> bool {
        self.0.waits.load(Ordering::Acquire)
    }
}
