//! How long to wait before the next attempt at a host: exponential, with jitter, and never giving up.
//! Pure arithmetic; the waiting is done by the connection.

use std::time::Duration;

/// The schedule of attempts at a host that does not answer.
#[derive(Clone, Copy, Debug)]
pub struct Backoff {
    /// Wait after the first failure.
    pub initial: Duration,
    /// Longest wait while the host counts as active.
    pub maximum: Duration,
    /// Failures in a row after which the host is `offline`.
    pub offline_after: u32,
    /// Longest wait for an offline host: it is still tried, for as long as it is known.
    pub offline_maximum: Duration,
}

impl Default for Backoff {
    /// The reference relay marks a host offline after 15 failures; it never tries again, we do.
    fn default() -> Self {
        Self {
            initial: Duration::from_secs(1),
            maximum: Duration::from_secs(5 * 60),
            offline_after: 15,
            offline_maximum: Duration::from_secs(60 * 60),
        }
    }
}

impl Backoff {
    /// The wait after `failures` failures in a row; `jitter` is uniform in 0..1 and takes away up to half.
    pub fn wait(&self, failures: u32, jitter: f64) -> Duration {
        if failures == 0 {
            return Duration::ZERO;
        }
        let maximum = if self.is_offline(failures) {
            self.offline_maximum
        } else {
            self.maximum
        };
        let doubled = self.initial.as_secs_f64() * 2f64.powi((failures - 1).min(40) as i32);
        Duration::from_secs_f64(doubled.min(maximum.as_secs_f64()) * (1.0 - jitter / 2.0))
    }

    /// Whether a host with so many failures in a row counts as offline.
    pub fn is_offline(&self, failures: u32) -> bool {
        failures >= self.offline_after
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_double_up_to_the_maximum_and_never_end() {
        let backoff = Backoff::default();
        let seconds: Vec<u64> = (0..=10)
            .map(|failures| backoff.wait(failures, 0.0).as_secs())
            .collect();
        assert_eq!(seconds, [0, 1, 2, 4, 8, 16, 32, 64, 128, 256, 300]);
        assert_eq!(backoff.wait(14, 0.0), backoff.maximum);
        assert!(backoff.is_offline(15) && !backoff.is_offline(14));
        for failures in [15, 100, u32::MAX] {
            assert_eq!(backoff.wait(failures, 0.0), backoff.offline_maximum);
        }
    }

    #[test]
    fn jitter_takes_away_up_to_half() {
        let backoff = Backoff::default();
        assert_eq!(backoff.wait(4, 1.0), Duration::from_secs(4));
        assert_eq!(backoff.wait(4, 0.5), Duration::from_secs(6));
    }
}
