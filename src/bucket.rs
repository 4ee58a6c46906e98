//! Token buckets: a shared one with bounded waits, for requests to the directory and accepted connections, and one with a
//! single owner, for bytes that are read. They do not know what they limit.

use std::time::Duration;

use parking_lot::Mutex;
use tokio::time::{Instant, sleep_until};

/// Lets requests through at a steady rate, a burst at once, and refuses requests that would wait too long.
#[derive(Debug)]
pub(crate) struct Bucket {
    max_wait: Duration,
    schedule: Mutex<Schedule>,
}

#[derive(Debug)]
struct Schedule {
    /// Time between two requests at the steady rate.
    interval: Duration,
    /// How far the schedule may run behind the clock: the burst.
    burst: Duration,
    /// When the next request may go if requests come at the steady rate only.
    next: Instant,
}

impl Bucket {
    /// `per_second` requests on average, up to one second's worth at once, none waiting longer than `max_wait`.
    pub(crate) fn new(per_second: f64, max_wait: Duration) -> Self {
        let (interval, burst) = pace(per_second);
        Self {
            max_wait,
            schedule: Mutex::new(Schedule {
                interval,
                burst,
                next: Instant::now() - burst,
            }),
        }
    }

    /// From now on so many requests a second. Requests that wait keep their times.
    pub(crate) fn set_rate(&self, per_second: f64) {
        let mut schedule = self.schedule.lock();
        (schedule.interval, schedule.burst) = pace(per_second);
    }

    /// Waits for a turn; `false` at once if the wait would be too long.
    pub(crate) async fn turn(&self) -> bool {
        let Some(at) = self.reserve(Instant::now()) else {
            return false;
        };
        sleep_until(at).await;
        true
    }

    fn reserve(&self, now: Instant) -> Option<Instant> {
        let mut schedule = self.schedule.lock();
        let at = schedule.next.max(now - schedule.burst);
        if at.saturating_duration_since(now) > self.max_wait {
            return None;
        }
        schedule.next = at + schedule.interval;
        Some(at.max(now))
    }
}

/// An amount that may be spent at a steady rate, with a burst at once. Spending more means waiting; nothing is refused.
#[derive(Debug)]
pub(crate) struct Allowance {
    /// Time to earn the burst at the steady rate.
    burst: Duration,
    /// When all that was spent is earned at the steady rate.
    paid: Instant,
}

impl Allowance {
    /// Nothing is spent yet.
    pub(crate) fn new(burst: Duration, now: Instant) -> Allowance {
        Allowance { burst, paid: now }
    }

    /// Spends at a rate of so much a second.
    pub(crate) fn spend(&mut self, amount: u64, per_second: u64, now: Instant) {
        let earned_in = Duration::from_secs_f64(amount as f64 / per_second.max(1) as f64);
        self.paid = self.paid.max(now) + earned_in;
    }

    /// When there is something to spend again; `None` where there is now.
    pub(crate) fn next(&self, now: Instant) -> Option<Instant> {
        let next = self.paid.checked_sub(self.burst)?;
        (next > now).then_some(next)
    }
}

/// The time between two requests, and the burst.
fn pace(per_second: f64) -> (Duration, Duration) {
    let interval = Duration::from_secs_f64(1.0 / per_second.clamp(0.001, 1e6));
    (interval, Duration::from_secs(1).max(interval) - interval)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_spends_the_burst_waits_for_what_was_spent_beyond_it() {
        let now = Instant::now();
        let after = |seconds| now + Duration::from_secs(seconds);
        let mut allowance = Allowance::new(Duration::from_secs(10), now);
        allowance.spend(900, 100, now);
        assert_eq!(allowance.next(now), None);
        allowance.spend(300, 100, now);
        assert_eq!(allowance.next(now), Some(after(2)));
        assert_eq!(allowance.next(after(2)), None);
        allowance.spend(1_100, 100, after(60));
        assert_eq!(allowance.next(after(60)), Some(after(61)));
    }

    #[tokio::test]
    async fn a_burst_passes_then_the_rate_holds_and_long_waits_are_refused() {
        let bucket = Bucket::new(10.0, Duration::from_millis(500));
        let now = Instant::now();
        let waits: Vec<_> = (0..20)
            .map(|_| bucket.reserve(now).map(|at| (at - now).as_millis()))
            .collect();
        assert!(waits[..10].iter().all(|wait| *wait == Some(0)), "{waits:?}");
        assert!(
            waits[10..15]
                .iter()
                .all(|wait| wait.is_some_and(|wait| wait > 0)),
            "{waits:?}"
        );
        assert!(waits[16..].iter().all(Option::is_none), "{waits:?}");
        assert_eq!(
            bucket.reserve(now + Duration::from_secs(60)),
            Some(now + Duration::from_secs(60))
        );
    }
}
