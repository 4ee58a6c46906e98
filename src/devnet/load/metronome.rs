//! A clock that ticks several times a millisecond. The runtime's own timers know whole milliseconds, and
//! what is due within one would leave in a burst.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use tokio::sync::Notify;

/// Shortest time between two ticks: 4,000 wake-ups a second cost a few percent of one core.
const SHORTEST: Duration = Duration::from_micros(250);
/// Longest time between two ticks.
const LONGEST: Duration = Duration::from_millis(1);

/// A running metronome; dropping it ends it.
#[derive(Debug)]
pub(super) struct Metronome {
    tick: Arc<Notify>,
    stop: Arc<AtomicBool>,
}

impl Metronome {
    /// Ticks about `rate` times a second, as far as that is a sensible number.
    pub fn start(rate: f64) -> Metronome {
        let period = Duration::from_secs_f64(rate.max(1.0).recip()).clamp(SHORTEST, LONGEST);
        let (tick, stop) = (Arc::new(Notify::new()), Arc::new(AtomicBool::new(false)));
        let (ticking, stopped) = (tick.clone(), stop.clone());
        std::thread::spawn(move || {
            while !stopped.load(Ordering::Relaxed) {
                std::thread::sleep(period);
                ticking.notify_one();
            }
        });
        Metronome { tick, stop }
    }

    /// Waits for the next tick; at once where one was missed.
    pub async fn tick(&self) {
        self.tick.notified().await;
    }
}

impl Drop for Metronome {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}
