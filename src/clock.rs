//! Unix time for judging events and identities: the system's time, but it does not go back, neither while the relay runs nor
//! before the events of its log. With a clock that is set back, every rev would lie in the future.
//! Measures no intervals, and does not correct a clock that is ahead.

use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// A start, and the time that has passed since. Copies show the same time.
#[derive(Clone, Copy, Debug)]
pub struct Clock {
    /// A lower bound of the time when the clock was made.
    reached: Duration,
    made: Instant,
}

impl Default for Clock {
    fn default() -> Self {
        Self::after(Duration::ZERO)
    }
}

impl Clock {
    /// A clock that is never before `seen`, a time since 1970.
    pub fn after(seen: Duration) -> Self {
        Self {
            reached: system().max(seen),
            made: Instant::now(),
        }
    }

    /// Time since 1970 in microseconds.
    pub fn micros(&self) -> u64 {
        self.now().as_micros() as u64
    }

    /// Time since 1970 in seconds.
    pub fn seconds(&self) -> i64 {
        self.now().as_secs() as i64
    }

    /// How far the system's clock is behind this one.
    pub fn behind(&self) -> Duration {
        self.now().saturating_sub(system())
    }

    fn now(&self) -> Duration {
        system().max(self.reached + self.made.elapsed())
    }
}

/// The system's time since 1970; zero where it is earlier.
pub(crate) fn system() -> Duration {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default()
}

/// Whether a period has passed since `then`, a time that this or an earlier run stored. A `then` in the future comes from a
/// wrong clock, and counts as long ago.
pub fn has_passed(period: Duration, then: i64, now: i64) -> bool {
    let period = i64::try_from(period.as_secs()).unwrap_or(i64::MAX);
    !(0..period).contains(&now.saturating_sub(then))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_clock_is_never_behind_what_was_seen() {
        let ahead = system() + Duration::from_secs(48 * 3_600);
        let clock = Clock::after(ahead);
        assert!(clock.now() >= ahead && clock.now() < ahead + Duration::from_secs(60));
        assert!(clock.behind() > Duration::from_secs(47 * 3_600));
        let before = system();
        let clock = Clock::after(Duration::from_secs(1));
        assert!(clock.now() >= before && clock.now() < before + Duration::from_secs(60));
        assert!(clock.behind() < Duration::from_secs(60));
    }

    #[test]
    fn a_time_of_the_future_is_long_ago() {
        let hour = Duration::from_secs(3_600);
        for (then, now, passed) in [
            (1_000, 1_000, false),
            (1_000, 4_599, false),
            (1_000, 4_600, true),
            (1_000, 999, true),
            (i64::MAX, 0, true),
            (i64::MIN, i64::MAX, true),
        ] {
            assert_eq!(has_passed(hour, then, now), passed, "{then} {now}");
        }
        assert!(has_passed(Duration::ZERO, 5, 5));
    }
}
