//! How the relay does, sampled every few seconds: for systemd's status line, and for the gauges that need the disk.
//!
//! Lag is what an operator calls so: how far the log is behind the hosts. It is the median, over the newest commits of
//! the log, of the time from the commit's signing (its rev is a time, and is signed) to its appending; one host with a
//! wrong clock does not sway it. While events are under way and none gets into the log it grows with the clock.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use tokio::task;
use tokio::time::{Instant, MissedTickBehavior, interval};
use tokio_util::sync::CancellationToken;

use super::running::Running;
use crate::atproto::frame::{self, Message};
use crate::atproto::tid::Tid;
use crate::eventlog::{Entry, EventLog};
use crate::hosts::{HostState, Hosts};
use crate::telemetry::Health;

/// How often.
const EVERY: Duration = Duration::from_secs(5);
/// Newest events that the lag is taken from, and the most bytes of them that are read: a commit may have two million.
const SAMPLE: u64 = 100;
const SAMPLE_BYTES: usize = 8 << 20;

/// A sample.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Vitals {
    /// Hosts with a connection.
    pub connected: usize,
    /// Hosts that are known, banned ones left out.
    pub hosts: usize,
    /// Events that got into the log, a second, since the sample before.
    pub per_second: f64,
    /// How far the log is behind the hosts.
    pub lag: Duration,
    /// Consumers connected.
    pub consumers: usize,
    /// What is wrong.
    pub health: Arc<Health>,
}

impl fmt::Display for Vitals {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} of {} hosts connected, {:.0} events/s, lag {:.1} s, {} consumers",
            self.connected,
            self.hosts,
            self.per_second,
            self.lag.as_secs_f64(),
            self.consumers
        )?;
        for problem in &self.health.problems {
            write!(f, "; {}: {}", problem.name.as_str(), problem.finding.full())?;
        }
        Ok(())
    }
}

/// Looks at a relay.
pub(super) struct Sampler(pub Arc<Running>);

impl Sampler {
    /// Takes samples until the relay closes.
    pub async fn run(self, vitals: watch::Sender<Vitals>, closing: CancellationToken) {
        let mut ticks = interval(EVERY);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let (log, firehose) = (&self.0.core.log, &self.0.core.firehose);
        let hosts = &self.0.ingest.hosts;
        let mut head = log.head();
        let mut at = Instant::now();
        while closing.run_until_cancelled(ticks.tick()).await.is_some() {
            let before = vitals.borrow().lag;
            let passed = at.elapsed();
            at = Instant::now();
            let looking = log.clone();
            let Ok(looked) = task::spawn_blocking(move || look(&looking, head)).await else {
                return;
            };
            let events = looked.head - head;
            head = looked.head;
            let lag = match looked.lag {
                Some(lag) => lag,
                None if events == 0 && !hosts.index().is_busy() => Duration::ZERO,
                None if events == 0 => before + passed,
                None => before,
            };
            self.0.core.metrics.lag_seconds.set(lag.as_secs_f64());
            let (connected, known) = count_hosts(hosts);
            vitals.send_replace(Vitals {
                connected,
                hosts: known,
                per_second: events as f64 / passed.as_secs_f64().max(f64::EPSILON),
                lag,
                consumers: firehose.consumers().len(),
                health: self.0.health.borrow().clone(),
            });
        }
    }
}

/// Hosts with a connection, and all that are not banned.
pub(super) fn count_hosts(hosts: &Hosts) -> (usize, usize) {
    let (mut connected, mut known) = (0, 0);
    for (state, count) in hosts.index().states() {
        match state {
            HostState::Banned => {}
            HostState::Connected | HostState::HeldBack => {
                connected += count;
                known += count;
            }
            _ => known += count,
        }
    }
    (connected, known)
}

/// What reads the disk.
struct Looked {
    head: u64,
    lag: Option<Duration>,
}

fn look(log: &EventLog, before: u64) -> Looked {
    let head = log.head();
    log.sample_disk();
    let from = (before + 1).max((head + 1).saturating_sub(SAMPLE));
    let mut bytes = 0;
    let events = log.entries(from).map_while(Result::ok);
    let mut lags: Vec<Duration> = events
        .take_while(|(_, frame)| {
            bytes += frame.len();
            bytes <= SAMPLE_BYTES
        })
        .filter_map(|(entry, frame)| lag(&entry, &frame))
        .collect();
    lags.sort_unstable();
    Looked {
        head,
        lag: lags.get(lags.len() / 2).copied(),
    }
}

/// The time from a commit's signing to its appending.
fn lag(entry: &Entry, frame: &[u8]) -> Option<Duration> {
    let Message::Commit(commit) = frame::decode(frame).ok()?.message else {
        return None;
    };
    let signed = Tid::parse(commit.rev).ok()?.micros();
    Some(Duration::from_micros(entry.time_us.saturating_sub(signed)))
}
