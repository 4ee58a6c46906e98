//! How fast a host may send: sliding windows over a second, an hour and a day, of events, of bytes, and of what else
//! comes over a WebSocket.
//! A limit says how long to wait; it never drops. No sockets and no clock of its own.

use std::time::Duration;

use tokio::time::Instant;

use crate::atproto::frame::MAX_FRAME_BYTES;

/// The lengths of the windows, in the order of [`EventRates::limits`].
const WINDOWS: [Duration; 5] = [
    Duration::from_secs(1),
    Duration::from_secs(3_600),
    Duration::from_secs(86_400),
    Duration::from_secs(3_600),
    Duration::from_secs(1),
];

/// Which of them is of bytes.
const BYTES: usize = 3;

/// What a message counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Cost {
    /// An event, or what looks like one, of so many bytes.
    Event(usize),
    /// A ping, a pong or a text of so many bytes.
    Other(usize),
}

impl Cost {
    /// In each window.
    fn amounts(self) -> [u64; 5] {
        match self {
            Self::Event(bytes) => [1, 1, 1, bytes as u64, 0],
            Self::Other(bytes) => [0, 0, 0, bytes as u64, 1],
        }
    }
}

/// What a host may send in each window. Of events, defaults and formula are the reference relay's, n being the account
/// quota.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EventRates {
    /// Events in any second.
    pub per_second: u64,
    /// Events in any hour.
    pub per_hour: u64,
    /// Events in any 24 hours.
    pub per_day: u64,
    /// Bytes in any hour; the longest frame always fits.
    pub bytes_per_hour: u64,
    /// Pings, pongs and texts in any second.
    pub others_per_second: u64,
}

impl EventRates {
    fn limits(&self) -> [u64; 5] {
        [
            self.per_second.max(1),
            self.per_hour.max(1),
            self.per_day.max(1),
            self.bytes_per_hour.max(MAX_FRAME_BYTES as u64),
            self.others_per_second.max(1),
        ]
    }
}

/// The windows of one host. They outlive its connections, so that reconnecting gains nothing.
#[derive(Debug)]
pub struct RateWindows {
    windows: [Window; 5],
}

/// A sliding window approximated by two fixed ones: the previous one counts with the share that still overlaps.
#[derive(Debug)]
struct Window {
    length: Duration,
    started: Instant,
    previous: u64,
    current: u64,
}

impl RateWindows {
    /// Empty windows that start now.
    pub fn new(now: Instant) -> Self {
        Self {
            windows: WINDOWS.map(|length| Window {
                length,
                started: now,
                previous: 0,
                current: 0,
            }),
        }
    }

    /// Counts a message if every window has room for it.
    ///
    /// # Errors
    /// The time after which to ask again; nothing is counted.
    pub(super) fn admit(
        &mut self,
        now: Instant,
        cost: Cost,
        rates: &EventRates,
    ) -> Result<(), Duration> {
        let amounts = cost.amounts();
        let mut wait = Duration::ZERO;
        for ((window, limit), amount) in self.windows.iter_mut().zip(rates.limits()).zip(amounts) {
            if amount > 0 {
                window.slide(now);
                wait = wait.max(window.wait(now, limit, amount));
            }
        }
        if !wait.is_zero() {
            return Err(wait);
        }
        for (window, amount) in self.windows.iter_mut().zip(amounts) {
            window.current += amount;
        }
        Ok(())
    }

    /// Takes back bytes that were counted too much, as far as their window is not over.
    pub(super) fn take_back(&mut self, bytes: usize) {
        let window = &mut self.windows[BYTES];
        window.current = window.current.saturating_sub(bytes as u64);
    }
}

impl Window {
    fn slide(&mut self, now: Instant) {
        let passed = now.saturating_duration_since(self.started);
        if passed < self.length {
            return;
        }
        let lengths = passed.as_nanos() / self.length.as_nanos();
        self.previous = if lengths == 1 { self.current } else { 0 };
        self.current = 0;
        self.started =
            now - Duration::from_nanos((passed.as_nanos() % self.length.as_nanos()) as u64);
    }

    /// Zero if so much more fits under `limit`, else the time until it may.
    fn wait(&self, now: Instant, limit: u64, amount: u64) -> Duration {
        let length = self.length.as_secs_f64();
        let passed = now.saturating_duration_since(self.started).as_secs_f64();
        let overlap = 1.0 - passed / length;
        let allowed = limit.saturating_sub(amount) as f64;
        if self.previous as f64 * overlap + self.current as f64 <= allowed {
            return Duration::ZERO;
        }
        let until = if self.current as f64 <= allowed {
            // Within this window: when enough of the previous one has slid out.
            length * (1.0 - (allowed - self.current as f64) / self.previous as f64) - passed
        } else {
            // In the next window, where the current one is the previous.
            length * (2.0 - allowed / self.current as f64) - passed
        };
        Duration::from_secs_f64(until.max(0.0)) + Duration::from_micros(1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rates(per_second: u64, per_hour: u64, per_day: u64) -> EventRates {
        EventRates {
            per_second,
            per_hour,
            per_day,
            bytes_per_hour: u64::MAX,
            others_per_second: 1,
        }
    }

    /// Sends as fast as the windows allow; the times of the events in seconds from the start.
    fn send(count: usize, rates: &EventRates) -> Vec<f64> {
        let start = Instant::now();
        let mut now = start;
        let mut windows = RateWindows::new(start);
        let mut times = Vec::new();
        while times.len() < count {
            match windows.admit(now, Cost::Event(1), rates) {
                Ok(()) => times.push((now - start).as_secs_f64()),
                Err(wait) => {
                    assert!(!wait.is_zero());
                    now += wait;
                }
            }
        }
        times
    }

    #[tokio::test]
    async fn a_burst_passes_and_the_rest_is_spread_at_the_limit() {
        let times = send(500, &rates(50, 100_000, 100_000));
        assert_eq!(times[49], 0.0);
        assert!(times[50] > 0.9, "the 51st waits: {}", times[50]);
        let last = times[499];
        assert!(
            (8.0..11.0).contains(&last),
            "500 events at 50 a second took {last} s"
        );
        for start in 0..450 {
            assert!(
                times[start + 50] - times[start] > 0.45,
                "no half second takes more than the limit"
            );
        }
    }

    #[tokio::test]
    async fn the_longest_window_decides() {
        let times = send(30, &rates(50, 10, 1_000));
        assert!(
            times[9] < 0.001 && times[10] > 3_000.0 && times[29] < 11_500.0,
            "{times:?}"
        );
        let times = send(30, &rates(50, 1_000, 10));
        assert!(times[10] > 80_000.0, "{times:?}");
    }

    #[tokio::test]
    async fn an_idle_host_gets_its_whole_window_back() {
        let start = Instant::now();
        let mut windows = RateWindows::new(start);
        let limit = rates(5, 100, 100);
        for round in 0..3 {
            let now = start + Duration::from_secs(10 * round);
            for _ in 0..5 {
                assert_eq!(windows.admit(now, Cost::Event(1), &limit), Ok(()));
            }
            assert!(windows.admit(now, Cost::Event(1), &limit).is_err());
        }
    }

    #[tokio::test]
    async fn a_limit_of_zero_still_lets_something_through() {
        assert_eq!(send(2, &rates(0, 100, 100)).len(), 2);
    }
}
