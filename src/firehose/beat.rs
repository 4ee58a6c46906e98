//! The beat: when consumers that have everything are woken for more.
//! Promises that a lone event is announced at once. In a busy stream it waits a little between two
//! announcements, the longer the more consumers wait for them, so that each wake-up carries many events. Consumers
//! that are behind, or read nothing, make nobody wait.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::sleep;

/// What waking one consumer and writing to it may take of the time between two beats. Measured: a wake-up with its
/// write costs some 6 microseconds before the first byte.
const PAUSE_PER_CONSUMER: Duration = Duration::from_micros(20);
/// Shorter pauses are none: the runtime's clock ticks in milliseconds.
const MIN_PAUSE: Duration = Duration::from_millis(1);
/// The longest pause. An event waits no longer here, a third of the latency that is allowed for the whole relay.
const MAX_PAUSE: Duration = Duration::from_millis(5);

/// One consumer's ear for the beat.
#[derive(Debug)]
pub(super) struct Listener {
    beat: watch::Receiver<u64>,
    /// How many consumers have everything, and whether this one is among them.
    live: Arc<AtomicUsize>,
    counted: bool,
}

impl Listener {
    /// From here on, only a later beat counts as a change.
    pub fn begin(&mut self) {
        self.beat.borrow_and_update();
    }

    /// Says whether this consumer has everything.
    pub fn set_live(&mut self, live: bool) {
        match (self.counted, live) {
            (false, true) => self.live.fetch_add(1, Ordering::Relaxed),
            (true, false) => self.live.fetch_sub(1, Ordering::Relaxed),
            _ => return,
        };
        self.counted = live;
    }

    /// Waits for a beat.
    ///
    /// # Errors
    /// When there will be none any more.
    pub async fn changed(&mut self) -> Result<(), watch::error::RecvError> {
        self.beat.changed().await
    }
}

impl Clone for Listener {
    /// An ear for another consumer, which has not said that it has everything.
    fn clone(&self) -> Self {
        Self {
            beat: self.beat.clone(),
            live: self.live.clone(),
            counted: false,
        }
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        self.set_live(false);
    }
}

/// A beat behind `head`, to be run until the log ends, and the first ear for it.
pub(super) fn follow(mut head: watch::Receiver<u64>) -> (impl Future<Output = ()>, Listener) {
    let (sender, beat) = watch::channel(*head.borrow());
    let live = Arc::new(AtomicUsize::new(0));
    let listener = Listener {
        beat,
        live: live.clone(),
        counted: false,
    };
    let run = async move {
        while head.changed().await.is_ok() {
            let seen = *head.borrow_and_update();
            sender.send_replace(seen);
            if let Some(pause) = pause(live.load(Ordering::Relaxed)) {
                sleep(pause).await;
            }
        }
    };
    (run, listener)
}

fn pause(consumers: usize) -> Option<Duration> {
    let pause = PAUSE_PER_CONSUMER.saturating_mul(consumers.try_into().unwrap_or(u32::MAX));
    (pause >= MIN_PAUSE).then_some(pause.min(MAX_PAUSE))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn few_wait_for_nothing_and_many_not_for_long() {
        for (consumers, milliseconds) in [
            (0, None),
            (49, None),
            (100, Some(2)),
            (1_000, Some(5)),
            (usize::MAX, Some(5)),
        ] {
            let expected = milliseconds.map(Duration::from_millis);
            assert_eq!(pause(consumers), expected, "{consumers}");
        }
    }

    #[tokio::test]
    async fn a_lone_event_is_announced_at_once_and_busy_ones_together() {
        let (head, heard) = watch::channel(0);
        let (run, mut first) = follow(heard);
        let mut others = vec![first.clone(); 100];
        others.iter_mut().for_each(|other| other.set_live(true));
        tokio::spawn(run);
        head.send_replace(1);
        first.changed().await.expect("a beat");
        assert_eq!(*first.beat.borrow_and_update(), 1);
        head.send_replace(2);
        head.send_replace(3);
        first.changed().await.expect("a beat");
        assert_eq!(*first.beat.borrow_and_update(), 3, "both at once");
    }

    #[test]
    fn only_those_who_have_everything_are_counted() {
        let (_run, first) = follow(watch::channel(0).1);
        let mut one = first.clone();
        one.set_live(true);
        one.set_live(true);
        let other = one.clone();
        assert_eq!(first.live.load(Ordering::Relaxed), 1);
        drop(other);
        assert_eq!(first.live.load(Ordering::Relaxed), 1);
        drop(one);
        assert_eq!(first.live.load(Ordering::Relaxed), 0);
    }
}
