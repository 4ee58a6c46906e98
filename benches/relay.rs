//! The whole relay, as a process of its own with hosts before it and consumers behind it, all on
//! loopback: latency at given rates, processor time of an event, memory with slow consumers, and the
//! start after a kill with a full window. What comes out of every run is checked.

mod support;

use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::mpsc::sync_channel;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use atproto_relay::config::SQLITE_FILE;
use atproto_relay::devnet::check::{Watcher, WatcherOptions};
use atproto_relay::devnet::load::{
    self, Crowd, LoadOptions, Measured, Patience, Prepared, ProcessOptions, RelayProcess, Swarm,
    Target, unlimited,
};
use atproto_relay::devnet::scratch::Scratch;
use atproto_relay::eventlog::sequencer;
use atproto_relay::eventlog::{Append, Durability, EventLog, LogOptions};
use atproto_relay::store::{Batch, Store};
use clap::{Parser, ValueEnum};

/// Longest wait for anything.
const PATIENCE: Duration = Duration::from_secs(300);
/// Events a second at which the time to the firehose is measured, and for how many seconds.
const RATES: [(u32, u32); 3] = [(500, 20), (2_000, 20), (20_000, 10)];
/// Events of a run at full speed.
const EVENTS: usize = 200_000;
/// Consumers of the run that is about memory, half of them slow; with so many, few events are much.
const CONSUMERS: usize = 1_000;
const CONSUMERS_RATE: u32 = 200;
const CONSUMERS_SECONDS: u32 = 20;
/// Kills and restarts on a full window.
const RESTARTS: usize = 3;
/// Rate of the events among which the relay is killed, and how many come before that.
const RESTART_RATE: f64 = 2_000.0;
const RESTART_EVENTS: usize = 20_000;
/// Events that a window is filled with, again and again, and how many at a time.
const WINDOW_EVENTS: usize = 20_000;
const WINDOW_BATCH: usize = 512;

/// Measures a whole relay.
#[derive(Debug, Parser)]
struct Options {
    /// Measure only these parts.
    parts: Vec<Part>,
    /// Size of the window before which the relay is restarted, in GB (10^9 bytes).
    #[arg(long, default_value_t = 20.0, value_name = "GB")]
    window: f64,
    /// Folder for logs and databases, on the disk that is to be measured.
    #[arg(long, value_name = "FOLDER")]
    folder: Option<PathBuf>,
    /// Given by cargo.
    #[arg(long, hide = true)]
    bench: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Part {
    /// Time to firehose at 500, 2,000 and 20,000 events a second.
    Latency,
    /// Full speed with each durability, and bytes on disk.
    Speed,
    /// Memory with 1,000 consumers.
    Consumers,
    /// Restart after kill -9 with a full window.
    Restart,
}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let options = Options::parse();
    let wanted = |part| options.parts.is_empty() || options.parts.contains(&part);
    if wanted(Part::Latency) {
        for (rate, seconds) in RATES {
            latency(&options, rate, seconds).await?;
        }
    }
    if wanted(Part::Speed) {
        speed(&options).await?;
    }
    if wanted(Part::Consumers) {
        consumers(&options).await?;
    }
    if wanted(Part::Restart) {
        restart(&options).await?;
    }
    Ok(())
}

impl Options {
    /// A folder for one run.
    fn scratch(&self) -> anyhow::Result<Scratch> {
        match &self.folder {
            Some(folder) => Scratch::new_in(folder, "atproto-bench"),
            None => Scratch::new("atproto-bench"),
        }
        .context("a folder for the relay's data")
    }
}

async fn prepared(events: usize, accounts: usize, seed: u64) -> anyhow::Result<Prepared> {
    eprintln!("signing {events} events");
    let options = LoadOptions {
        accounts,
        events,
        seed,
        ..LoadOptions::default()
    };
    Ok(tokio::task::spawn_blocking(|| Prepared::new(options, &|_, _| {})).await?)
}

async fn relay(
    folder: &Path,
    swarm: &Swarm,
    consumers: usize,
    more: &[&str],
) -> anyhow::Result<RelayProcess> {
    let mut arguments = unlimited(consumers);
    arguments.extend(more.iter().map(OsString::from));
    let process = ProcessOptions {
        binary: env!("CARGO_BIN_EXE_atproto-relay").into(),
        folder: folder.to_owned(),
        plc: swarm.plc_url(),
        hosts: swarm.host_urls(),
        arguments,
    };
    Ok(RelayProcess::start(process, PATIENCE).await?)
}

async fn measure(
    prepared: &Prepared,
    swarm: &Swarm,
    relay: &RelayProcess,
    rate: u32,
) -> anyhow::Result<Measured> {
    let usage = || relay.usage();
    let target = Target {
        firehose: relay.firehose(),
        usage: Some(&usage),
    };
    let measured = load::run(
        prepared,
        swarm,
        target,
        rate.into(),
        Patience::default(),
        &|_| {},
    )
    .await
    .with_context(|| format!("the relay said:\n{}", relay.said()))?;
    eprintln!("{measured}");
    let report = measured.checker.report();
    ensure!(
        report.is_clean(),
        "what came out is not what had to: {report}"
    );
    Ok(measured)
}

/// A percentile of the time to firehose.
fn percentile(measured: &Measured, percent: f64) -> String {
    let micros = measured.latencies.percentile(percent).unwrap_or_default();
    support::time(Duration::from_micros(micros.into()))
}

async fn latency(options: &Options, rate: u32, seconds: u32) -> anyhow::Result<()> {
    let prepared = prepared((rate * seconds) as usize, 10_000, 1).await?;
    let swarm = Swarm::start(&prepared).await?;
    let folder = options.scratch()?;
    let relay = relay(folder.path(), &swarm, 0, &[]).await?;
    let measured = measure(&prepared, &swarm, &relay, rate).await?;
    relay.end(PATIENCE).await?;
    let (p50, p99) = (percentile(&measured, 50.0), percentile(&measured, 99.0));
    support::row(
        &format!("time to firehose at {rate} events/s, durability sync"),
        &format!("p50 {p50}, p99 {p99} (went at {:.0}/s)", measured.rate()),
        &ratio(&measured),
    );
    Ok(())
}

/// The relay's processor time of an event beside a verification.
fn ratio(measured: &Measured) -> String {
    measured
        .ratio()
        .map(|ratio| format!("{ratio:.2} verifications an event"))
        .unwrap_or_default()
}

async fn speed(options: &Options) -> anyhow::Result<()> {
    let prepared = prepared(EVENTS, 10_000, 1).await?;
    for durability in ["sync", "interval", "none"] {
        let swarm = Swarm::start(&prepared).await?;
        let folder = options.scratch()?;
        let argument = format!("--log-durability={durability}");
        let relay = relay(folder.path(), &swarm, 0, &[&argument]).await?;
        let measured = measure(&prepared, &swarm, &relay, 0).await?;
        relay.end(PATIENCE).await?;
        let cpu = measured.cpu_per_event().unwrap_or_default();
        support::row(
            &format!("full speed, one consumer, durability {durability}"),
            &format!(
                "{:.0} events/s, {} of processor time an event",
                measured.rate(),
                support::time(cpu)
            ),
            &ratio(&measured),
        );
        if durability == "sync" {
            bytes_on_disk(folder.path(), measured.events + prepared.introduced())?;
        }
    }
    Ok(())
}

/// What an event takes in the log, when the reserved space has been given back.
fn bytes_on_disk(folder: &Path, events: usize) -> anyhow::Result<()> {
    let (mut frames, mut indexes) = (0, 0);
    for file in fs::read_dir(folder.join("data/log"))? {
        let path = file?.path();
        let length = fs::metadata(&path)?.len();
        match path.extension().and_then(|ending| ending.to_str()) {
            Some("seg") => frames += length,
            Some("idx") => indexes += length,
            _ => {}
        }
    }
    let an_event = |bytes: u64| bytes as f64 / events as f64;
    support::row(
        "bytes on disk an event",
        &format!(
            "{:.0}, of which the index {:.0}",
            an_event(frames + indexes),
            an_event(indexes)
        ),
        &format!(
            "{:.3} of the frame",
            (frames + indexes) as f64 / frames as f64
        ),
    );
    Ok(())
}

async fn consumers(options: &Options) -> anyhow::Result<()> {
    let prepared = prepared((CONSUMERS_RATE * CONSUMERS_SECONDS) as usize, 1_000, 1).await?;
    let mut alone = None;
    for crowd in [0, CONSUMERS] {
        let swarm = Swarm::start(&prepared).await?;
        let folder = options.scratch()?;
        let relay = relay(folder.path(), &swarm, crowd, &[]).await?;
        let crowd = Crowd::start(&relay.firehose(), crowd, crowd / 2).await?;
        let measured = measure(&prepared, &swarm, &relay, CONSUMERS_RATE).await?;
        ensure!(crowd.cut() == 0, "{} consumers were cut", crowd.cut());
        relay.end(PATIENCE).await?;
        let usage = measured.usage.context("memory is read from /proc")?;
        let Some(alone) = alone.replace(usage.resident_peak) else {
            continue;
        };
        let more = usage.resident_peak.saturating_sub(alone);
        support::row(
            &format!(
                "memory with {CONSUMERS} consumers, half of them slow, {CONSUMERS_RATE} events/s"
            ),
            &format!(
                "{} MB resident at most, {} MB with one consumer; p99 {}",
                usage.resident_peak >> 20,
                alone >> 20,
                percentile(&measured, 99.0)
            ),
            &format!("{} kB a consumer", (more / CONSUMERS as u64) >> 10),
        );
    }
    Ok(())
}

async fn restart(options: &Options) -> anyhow::Result<()> {
    let folder = options.scratch()?;
    let data = folder.path().join("data");
    let bytes = (options.window * 1e9) as u64;
    let (events, took) = fill(&data.join("log"), bytes).await?;
    eprintln!("the window has {events} events, written in {took:?}");
    // The database has seen all of it, as if this relay had taken the events in.
    let store = Store::open(&format!("sqlite:{}", data.join(SQLITE_FILE).display())).await?;
    let seen = Batch {
        replay_from: Some(events + 1),
        ..Batch::default()
    };
    store.apply(&seen).await?;
    store.close().await;
    rustix::fs::sync();

    let prepared = prepared(RESTART_EVENTS, 1_000, 2).await?;
    let swarm = Swarm::start(&prepared).await?;
    let mut relay = relay(folder.path(), &swarm, 0, &[]).await?;
    swarm.subscribed(PATIENCE).await?;
    let consumer = Watcher::start(
        prepared.ledger().clone(),
        WatcherOptions {
            relay: relay.firehose(),
            ..WatcherOptions::default()
        },
    );
    consumer.connected(PATIENCE).await?;
    swarm.introduce(&prepared);
    let introduced = prepared.introduced();
    let all = prepared.ledger().forward();
    let complete =
        |events| consumer.wait_for(PATIENCE, move |checker| checker.complete() >= events);
    complete(introduced).await?;
    let mut slowest = Duration::ZERO;
    let kills = async {
        for kill in 1..=RESTARTS {
            complete(introduced + (all - introduced) * kill / (RESTARTS + 1)).await?;
            relay.kill()?;
            let ready = relay.restart(PATIENCE).await?;
            eprintln!("ready {ready:?} after kill {kill}");
            slowest = slowest.max(ready);
        }
        complete(all).await?;
        anyhow::Ok(())
    };
    let play = async { Ok(swarm.play(&prepared, RESTART_RATE, &consumer).await?) };
    futures_util::future::try_join(kills, play).await?;
    let report = consumer.stop().await.checker.report();
    ensure!(
        report.is_clean(),
        "what came out is not what had to: {report}"
    );
    relay.end(PATIENCE).await?;
    support::row(
        &format!(
            "restart after kill −9 with a window of {} GB, {events} events",
            options.window
        ),
        &format!(
            "ready in {}, the slowest of {RESTARTS}",
            support::time(slowest)
        ),
        "",
    );
    Ok(())
}

/// Fills a log through its own sequencer: the number of its events, and how long it took.
async fn fill(dir: &Path, bytes: u64) -> anyhow::Result<(u64, Duration)> {
    let prepared = prepared(WINDOW_EVENTS, 1_000, 3).await?;
    let dir = dir.to_owned();
    let filled = tokio::task::spawn_blocking(move || {
        let events: Vec<_> = prepared.frames().filter_map(support::append).collect();
        eprintln!("filling the window");
        let start = Instant::now();
        let log = EventLog::open(LogOptions {
            durability: Durability::None,
            ..LogOptions::new(dir)
        })?;
        let (batches, queue) = sync_channel(8);
        let sequencer = sequencer::spawn(log.clone(), queue, |_| {})?;
        let mut left = bytes as i64;
        for batch in events.chunks(WINDOW_BATCH).cycle() {
            left -= batch
                .iter()
                .map(|event| event.frame.len() as i64)
                .sum::<i64>();
            let batch = batch.iter().map(again).collect();
            if left < 0 || batches.send(batch).is_err() {
                break;
            }
        }
        drop(batches);
        sequencer.join();
        anyhow::Ok((log.head(), start.elapsed()))
    });
    filled.await?
}

fn again(event: &Append<()>) -> Append<()> {
    Append {
        frame: event.frame.clone(),
        seq_span: event.seq_span.clone(),
        did: event.did.clone(),
        ..*event
    }
}
