//! Wake-ups: when consumers that have every event are woken for more.
//! Promises that a lone event wakes them at once. In a busy stream there is a pause between two wake-ups, the longer the
//! more consumers wait for them, so that each wake-up carries many events. Consumers that are behind, or do not read, slow
//! nobody down.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::sleep;

/// Share of the time between two wake-ups that waking one consumer and writing to it may take. Measured: a wake-up with its
/// write costs some 6 microseconds before the first byte.
const PAUSE_PER_CONSUMER: Duration = Duration::from_micros(20);
/// Shorter pauses are none: the runtime's clock ticks in milliseconds.
const MIN_PAUSE: Duration = Duration::from_millis(1);
/// The longest pause. An event waits no longer here, a third of the latency that is allowed for the whole relay.
const MAX_PAUSE: Duration = Duration::from_millis(5);

/// One consumer's receiver of coalesced wake-ups.
#[derive(Debug)]
pub(super) struct WakeUps {
    head: watch::Receiver<u64>,
    /// How many consumers have every event, and whether this one is among them.
    live: Arc<AtomicUsize>,
    is_live: bool,
}

impl WakeUps {
    /// From here on, only a later wake-up ends [`WakeUps::next`].
    pub fn mark_seen(&mut self) {
        self.head.borrow_and_update();
    }

    /// Counts this consumer among those that have every event, or no longer.
    pub fn set_live(&mut self, live: bool) {
        match (self.is_live, live) {
            (false, true) => self.live.fetch_add(1, Ordering::Relaxed),
            (true, false) => self.live.fetch_sub(1, Ordering::Relaxed),
            _ => return,
        };
        self.is_live = live;
    }

    /// Waits for a wake-up.
    ///
    /// # Errors
    /// The log ended: there will be none any more.
    pub async fn next(&mut self) -> Result<(), watch::error::RecvError> {
        self.head.changed().await
    }
}

impl Clone for WakeUps {
    /// A receiver for another consumer, which is not counted yet.
    fn clone(&self) -> Self {
        Self {
            head: self.head.clone(),
            live: self.live.clone(),
            is_live: false,
        }
    }
}

impl Drop for WakeUps {
    fn drop(&mut self) {
        self.set_live(false);
    }
}

/// The task that wakes consumers after changes of `head`, to be run until the log ends, and the first receiver.
pub(super) fn coalesce(mut head: watch::Receiver<u64>) -> (impl Future<Output = ()>, WakeUps) {
    let (sender, receiver) = watch::channel(*head.borrow());
    let live = Arc::new(AtomicUsize::new(0));
    let wakeups = WakeUps {
        head: receiver,
        live: live.clone(),
        is_live: false,
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
    (run, wakeups)
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
        let (head, receiver) = watch::channel(0);
        let (run, mut first) = coalesce(receiver);
        let mut others = vec![first.clone(); 100];
        others.iter_mut().for_each(|other| other.set_live(true));
        tokio::spawn(run);
        head.send_replace(1);
        first.next().await.expect("a wake-up");
        assert_eq!(*first.head.borrow_and_update(), 1);
        head.send_replace(2);
        head.send_replace(3);
        first.next().await.expect("a wake-up");
        assert_eq!(*first.head.borrow_and_update(), 3, "both at once");
    }

    #[test]
    fn only_those_who_have_everything_are_counted() {
        let (_run, first) = coalesce(watch::channel(0).1);
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
