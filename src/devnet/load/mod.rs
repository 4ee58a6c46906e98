//! Load for a relay: many hosts and accounts whose events are signed ahead, a PLC directory for
//! them, and a measured run: throughput, CPU per event in units of one libsecp256k1 verification,
//! time to firehose, memory. Everything that comes out is checked against what must.

mod account;
mod crowd;
mod metronome;
mod prepare;
mod process;
mod record;
mod swarm;
#[cfg(test)]
mod tests;
mod yardstick;

use std::fmt;
use std::sync::Arc;
use std::time::{Duration, Instant};

pub use crowd::{Crowd, CrowdError};
pub use prepare::Prepared;
pub use process::{ProcessError, ProcessOptions, RelayProcess, Usage, relay_beside_us, unlimited};
pub use swarm::{Swarm, SwarmError};
pub use yardstick::Yardstick;

use super::check::{Checker, Latencies, WaitError, Watcher, WatcherOptions};
use super::faults::FaultPlan;

/// Accounts that a flooding host announces.
pub const FLOOD_ACCOUNTS: u32 = 150;
/// Accounts of the flooding host that may come out: the relay's default quota.
pub const FLOOD_QUOTA: usize = 100;

/// What a run consists of.
#[derive(Clone, Debug)]
pub struct LoadOptions {
    /// Number of hosts; a flood adds one.
    pub hosts: usize,
    /// Number of accounts, spread evenly over the hosts.
    pub accounts: usize,
    /// Number of events after the introductions.
    pub events: usize,
    /// Seeds accounts, events and faults.
    pub seed: u64,
    /// Share of the accounts with P-256 keys, 0 to 1; on the network they are very few.
    pub p256_share: f64,
    /// Records in every repository before the run.
    pub existing_records: usize,
    /// What goes wrong.
    pub faults: FaultPlan,
}

impl Default for LoadOptions {
    fn default() -> Self {
        LoadOptions {
            hosts: 20,
            accounts: 10_000,
            events: 100_000,
            seed: 1,
            p256_share: 0.0,
            existing_records: 500,
            faults: FaultPlan::none(),
        }
    }
}

/// Where the relay of a run is.
pub struct Target<'a> {
    /// `ws://host:port`.
    pub firehose: String,
    /// What the relay's process has used so far, where that can be told.
    pub usage: Option<&'a dyn Fn() -> Usage>,
}

/// How long a run waits for the relay.
#[derive(Clone, Copy, Debug)]
pub struct Patience {
    /// For subscriptions to all hosts.
    pub subscribe: Duration,
    /// For the last event to come out after everything was sent.
    pub finish: Duration,
}

impl Default for Patience {
    fn default() -> Self {
        Patience {
            subscribe: Duration::from_secs(60),
            finish: Duration::from_secs(300),
        }
    }
}

/// What a run measured.
#[derive(Debug)]
pub struct Measured {
    /// Events that came out in the measured part.
    pub events: usize,
    /// From the first write to the last event's arrival at the consumer.
    pub elapsed: Duration,
    /// What the relay used for them, and its memory at the end.
    pub usage: Option<Usage>,
    /// CPU time of this process meanwhile, where it can be told: hosts, directory, consumers, checks.
    pub own_cpu_seconds: Option<f64>,
    /// CPU time of one libsecp256k1 verification.
    pub yardstick: Duration,
    pub latencies: Latencies,
    pub checker: Checker,
}

impl Measured {
    /// Events per second.
    pub fn rate(&self) -> f64 {
        self.events as f64 / self.elapsed.as_secs_f64()
    }

    /// The relay's CPU time per event.
    pub fn cpu_per_event(&self) -> Option<Duration> {
        let cpu = self.usage?.cpu_seconds;
        (self.events > 0).then(|| Duration::from_secs_f64(cpu / self.events as f64))
    }

    /// The relay's CPU time per event in yardsticks.
    pub fn ratio(&self) -> Option<f64> {
        Some(self.cpu_per_event()?.as_secs_f64() / self.yardstick.as_secs_f64())
    }
}

impl fmt::Display for Measured {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let micros = |time: Duration| time.as_secs_f64() * 1e6;
        writeln!(
            f,
            "events            {} in {:.2} s: {:.0} events/s",
            self.events,
            self.elapsed.as_secs_f64(),
            self.rate()
        )?;
        if let (Some(usage), Some(cpu), Some(ratio)) =
            (self.usage, self.cpu_per_event(), self.ratio())
        {
            writeln!(
                f,
                "relay CPU         {:.2} s, {:.1} µs an event = {ratio:.2} verifications",
                usage.cpu_seconds,
                micros(cpu)
            )?;
            writeln!(
                f,
                "relay memory      {} MB resident, {} MB at most",
                usage.resident >> 20,
                usage.resident_peak >> 20
            )?;
        }
        if let Some(own) = self.own_cpu_seconds {
            writeln!(
                f,
                "load CPU          {own:.2} s, {:.0} % of one core",
                own / self.elapsed.as_secs_f64() * 100.0
            )?;
        }
        writeln!(
            f,
            "one verification  {:.1} µs (libsecp256k1, CPU time, same run)",
            micros(self.yardstick)
        )?;
        if let (Some(p50), Some(p99)) = (
            self.latencies.percentile(50.0),
            self.latencies.percentile(99.0),
        ) {
            let ms = |micros: u32| f64::from(micros) / 1e3;
            writeln!(
                f,
                "time to firehose  p50 {:.2} ms, p99 {:.2} ms ({} events)",
                ms(p50),
                ms(p99),
                self.latencies.len()
            )?;
        }
        write!(f, "checked           {}", self.checker.report())
    }
}

/// Runs a prepared load through a relay that is subscribed, or about to subscribe, to the swarm's
/// hosts: introductions first, then the measured events at `rate` a second (0: as fast as
/// possible). `progress` is called with a word on each part.
pub async fn run(
    prepared: &Prepared,
    swarm: &Swarm,
    target: Target<'_>,
    rate: f64,
    patience: Patience,
    progress: &dyn Fn(&str),
) -> Result<Measured, SwarmError> {
    progress("waiting for the relay to subscribe to every host");
    swarm.subscribed(patience.subscribe).await?;
    let options = WatcherOptions {
        relay: target.firehose,
        cursor: None,
        stopwatch: Some(swarm.stopwatch().clone()),
    };
    let consumer = Watcher::start(prepared.ledger().clone(), options);
    consumer.connected(patience.subscribe).await?;
    progress("introducing the accounts");
    swarm.introduce(prepared);
    let introduced = prepared.introduced();
    consumer
        .wait_for(patience.finish, |checker| checker.complete() >= introduced)
        .await?;
    progress("running");
    let before = target.usage.map(|usage| usage());
    let own_before = Usage::of(std::process::id());
    let yardstick = Yardstick::start();
    let start = Instant::now();
    swarm.play(prepared, rate, &consumer).await?;
    let finished = finish(&consumer, prepared, patience).await;
    let elapsed = start.elapsed();
    let usage = target.usage.zip(before).map(|(usage, before)| {
        let after = usage();
        Usage {
            cpu_seconds: after.cpu_seconds - before.cpu_seconds,
            ..after
        }
    });
    let own_cpu_seconds = own_before
        .zip(Usage::of(std::process::id()))
        .map(|(before, after)| after.cpu_seconds - before.cpu_seconds);
    let yardstick = tokio::task::spawn_blocking(|| yardstick.stop()).await?;
    let outcome = consumer.stop().await;
    let events = outcome.checker.complete().saturating_sub(introduced);
    if let Err(missing) = finished {
        // What is missing is in the report; the figures of the rest still tell something.
        tracing::warn!("{missing}");
    }
    Ok(Measured {
        events,
        elapsed,
        usage,
        own_cpu_seconds,
        yardstick,
        latencies: outcome.latencies,
        checker: outcome.checker,
    })
}

/// Waits for everything that must come out, floods included.
async fn finish(
    consumer: &Watcher,
    prepared: &Prepared,
    patience: Patience,
) -> Result<(), WaitError> {
    let ledger = Arc::clone(prepared.ledger());
    consumer
        .wait_for(patience.finish, |checker| {
            checker.complete() >= ledger.forward() && checker.quotas_filled()
        })
        .await
}
