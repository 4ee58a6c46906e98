//! The beat: when consumers that have everything are woken for more.
//! Promises that a lone event is announced at once. In a busy stream it waits a little between two
//! announcements, the longer the more consumers there are, so that each wake-up carries many events.

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

/// Announces the head to all who listen to `beat`, until the log ends.
pub(super) async fn run(mut head: watch::Receiver<u64>, beat: watch::Sender<u64>) {
    while head.changed().await.is_ok() {
        let seen = *head.borrow_and_update();
        beat.send_replace(seen);
        if let Some(pause) = pause(beat.receiver_count()) {
            sleep(pause).await;
        }
    }
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
        let beat = watch::Sender::new(0);
        let mut consumers: Vec<_> = (0..100).map(|_| beat.subscribe()).collect();
        tokio::spawn(run(heard, beat));
        let first = &mut consumers[0];
        head.send_replace(1);
        first.changed().await.expect("a beat");
        assert_eq!(*first.borrow_and_update(), 1);
        head.send_replace(2);
        head.send_replace(3);
        first.changed().await.expect("a beat");
        assert_eq!(*first.borrow_and_update(), 3, "both at once");
    }
}
