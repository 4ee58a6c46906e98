//! `atproto-devnet load`: signs a run ahead, sends it through a relay, prints what was measured.

use std::ffi::OsString;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, bail};
use atproto_relay::devnet::faults::{Fault, FaultPlan};
use atproto_relay::devnet::load::{
    Crowd, FLOOD_QUOTA, LoadOptions, Measured, Patience, Prepared, ProcessOptions, RelayProcess,
    Swarm, Target, Usage, relay_beside_us, run as run_load, unlimited,
};
use atproto_relay::devnet::scrape::Samples;
use atproto_relay::devnet::scratch::Scratch;
use atproto_relay::devnet::server::Places;
use clap::Args;
use indicatif::{ProgressBar, ProgressStyle};
use serde_json::json;

/// Events prepared where neither their number nor rate and duration are given.
const DEFAULT_EVENTS: usize = 100_000;
/// Memory of one prepared event, in bytes: its frame, and what the host and the checker keep.
const BYTES_PER_EVENT: u64 = 5_700;
/// More than this is more likely a slip of the hand.
const MAX_PREPARED_BYTES: u64 = 64 << 30;
/// How long a relay may take to start.
const START_PATIENCE: Duration = Duration::from_secs(30);
/// `--fault` for every fault.
const ALL_FAULTS: &str = "all";

/// Options of `load`.
#[derive(Debug, Args)]
pub struct Options {
    /// Hosts, each a WebSocket server on loopback.
    #[arg(long, default_value_t = 20, value_name = "N", value_parser = clap::value_parser!(u16).range(1..))]
    hosts: u16,
    /// Accounts, spread evenly over the hosts.
    #[arg(long, default_value_t = 10_000, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    accounts: u32,
    /// Events a second over all hosts; 0 sends as fast as the relay reads.
    #[arg(long, default_value_t = 0, value_name = "N")]
    rate: u32,
    /// Length of the run in seconds, with --rate.
    #[arg(
        long,
        value_name = "SECONDS",
        conflicts_with = "events",
        requires = "rate"
    )]
    duration: Option<u32>,
    /// Events of the run; without it rate × duration, or 100000.
    #[arg(long, value_name = "N")]
    events: Option<usize>,
    /// A fault to put in (`all` for every one); may be given more than once.
    #[arg(long = "fault", value_name = "FAULT")]
    faults: Vec<String>,
    /// Share of the commits that a fault strikes.
    #[arg(long, default_value_t = 0.01, value_name = "SHARE")]
    fault_share: f64,
    /// Faults that interrupt a connection, in the whole run.
    #[arg(long, default_value_t = 10, value_name = "N")]
    interruptions: usize,
    /// Share of the accounts with P-256 keys.
    #[arg(long, default_value_t = 0.0, value_name = "SHARE")]
    p256: f64,
    /// Records in every repository before the run.
    #[arg(long, default_value_t = 500, value_name = "N")]
    records: usize,
    /// Consumers beside the one that checks; they read and throw away.
    #[arg(long, default_value_t = 0, value_name = "N")]
    consumers: usize,
    /// How many of those consumers read far too slowly.
    #[arg(long, default_value_t = 0, value_name = "N", requires = "consumers")]
    slow_consumers: usize,
    /// Seeds accounts, events and faults.
    #[arg(long, default_value_t = 1, value_name = "NUMBER")]
    seed: u64,
    /// A relay that runs already; its directory and hosts have to be those printed. Without it a
    /// relay is started as a child process.
    #[arg(long, value_name = "URL")]
    relay: Option<String>,
    /// Serve the directory at this address, and the hosts at the ports above it, for a relay on
    /// another machine; without it everything is on free ports of loopback.
    #[arg(long, value_name = "ADDRESS", requires = "relay")]
    listen: Option<SocketAddr>,
    /// The name under which the relay reaches that address.
    #[arg(long, value_name = "HOST", requires = "listen")]
    name: Option<String>,
    /// Process of that relay, to measure its CPU time.
    #[arg(long, value_name = "PID", requires = "relay")]
    relay_pid: Option<u32>,
    /// The relay to start; without it the atproto-relay beside this executable.
    #[arg(long, value_name = "FILE", conflicts_with = "relay")]
    relay_bin: Option<PathBuf>,
    /// An argument more for the relay that is started (`--relay-arg=--log-durability=none`).
    #[arg(
        long,
        value_name = "ARGUMENT",
        conflicts_with = "relay",
        allow_hyphen_values = true
    )]
    relay_arg: Vec<OsString>,
    /// Folder for the started relay's log and database; without it a temporary one.
    #[arg(long, value_name = "FOLDER", conflicts_with = "relay")]
    data_dir: Option<PathBuf>,
    /// Print the figures as JSON.
    #[arg(long)]
    json: bool,
}

/// Prepares, runs, prints.
pub async fn run(options: Options) -> anyhow::Result<()> {
    let load = options.load()?;
    let prepared = prepare(load).await?;
    let swarm = Swarm::start_at(&prepared, options.places())
        .await
        .context("the load cannot listen there")?;
    let work = async {
        match &options.relay {
            Some(url) => against_running(&options, url, &prepared, &swarm).await,
            None => against_child(&options, &prepared, &swarm).await,
        }
    };
    let measured = tokio::select! {
        measured = work => measured?,
        interrupted = tokio::signal::ctrl_c() => return interrupted.context("waiting for Ctrl-C"),
    };
    options.print(&prepared, &measured);
    if !measured.checker.report().is_clean() {
        bail!("what came out is not what had to come out");
    }
    Ok(())
}

impl Options {
    fn load(&self) -> anyhow::Result<LoadOptions> {
        if self.slow_consumers > self.consumers {
            bail!("--slow-consumers says how many of the --consumers are slow: it cannot be more");
        }
        let timed = self
            .duration
            .map(|seconds| self.rate as usize * seconds as usize);
        let events = self.events.or(timed).unwrap_or(DEFAULT_EVENTS);
        if events == 0 {
            bail!("a run without events: give --events, or a --rate above 0 with --duration");
        }
        let bytes = (events as u64).saturating_mul(BYTES_PER_EVENT);
        if bytes > MAX_PREPARED_BYTES {
            bail!(
                "{events} events would take {} GB of memory; at most {} GB are prepared",
                bytes >> 30,
                MAX_PREPARED_BYTES >> 30
            );
        }
        Ok(LoadOptions {
            hosts: self.hosts.into(),
            accounts: self.accounts as usize,
            events,
            seed: self.seed,
            p256_share: self.p256,
            existing_records: self.records,
            faults: FaultPlan {
                faults: self.faults()?,
                share: self.fault_share,
                interruptions: self.interruptions,
            },
        })
    }

    fn places(&self) -> Places {
        let Some(listen) = self.listen else {
            return Places::Loopback;
        };
        let name = self.name.clone();
        Places::From {
            address: listen.ip(),
            port: listen.port(),
            name: name.unwrap_or_else(|| listen.ip().to_string()),
        }
    }

    fn faults(&self) -> anyhow::Result<Vec<Fault>> {
        if self.faults.iter().any(|name| name == ALL_FAULTS) {
            return Ok(Fault::ALL.to_vec());
        }
        Ok(self
            .faults
            .iter()
            .map(|name| name.parse())
            .collect::<Result<_, _>>()?)
    }

    async fn crowd(&self, firehose: &str) -> anyhow::Result<Crowd> {
        Crowd::start(firehose, self.consumers, self.slow_consumers)
            .await
            .context("the relay has to take all consumers")
    }

    fn say_of(&self, crowd: &Crowd) {
        if self.consumers > 0 {
            eprintln!(
                "{} more consumers, {} of them slow, read {} MB; {} were cut",
                self.consumers,
                self.slow_consumers,
                crowd.bytes() >> 20,
                crowd.cut()
            );
        }
    }

    fn print(&self, prepared: &Prepared, measured: &Measured) {
        let (p50, p99) = (prepared.frame_size(50.0), prepared.frame_size(99.0));
        if self.json {
            println!("{}", self.figures(prepared, measured));
            return;
        }
        println!(
            "settings          {} hosts, {} accounts, {} events/s asked for (0: all at once), seed {}",
            self.hosts, self.accounts, self.rate, self.seed
        );
        println!("frames            p50 {p50} bytes, p99 {p99} bytes");
        if !prepared.injected().is_empty() {
            println!("faults            {} injected", prepared.injected().len());
        }
        println!("{measured}");
    }

    fn figures(&self, prepared: &Prepared, measured: &Measured) -> serde_json::Value {
        let report = measured.checker.report();
        json!({
            "hosts": self.hosts,
            "accounts": self.accounts,
            "rateAsked": self.rate,
            "seed": self.seed,
            "frameBytesP50": prepared.frame_size(50.0),
            "frameBytesP99": prepared.frame_size(99.0),
            "faults": prepared.injected().len(),
            "events": measured.events,
            "seconds": measured.elapsed.as_secs_f64(),
            "eventsPerSecond": measured.rate(),
            "relayCpuSeconds": measured.usage.map(|usage| usage.cpu_seconds),
            "relayCpuMicrosPerEvent": measured.cpu_per_event().map(|time| time.as_secs_f64() * 1e6),
            "loadCpuSeconds": measured.own_cpu_seconds,
            "consumers": self.consumers,
            "slowConsumers": self.slow_consumers,
            "verificationMicros": measured.yardstick.as_secs_f64() * 1e6,
            "verificationsPerEvent": measured.ratio(),
            "relayResidentBytes": measured.usage.map(|usage| usage.resident),
            "relayResidentPeakBytes": measured.usage.map(|usage| usage.resident_peak),
            "timeToFirehoseMicrosP50": measured.latencies.percentile(50.0),
            "timeToFirehoseMicrosP99": measured.latencies.percentile(99.0),
            "clean": report.is_clean(),
            "report": report.to_string(),
        })
    }
}

async fn prepare(load: LoadOptions) -> anyhow::Result<Prepared> {
    let bar = ProgressBar::new((load.accounts + load.events) as u64);
    bar.set_style(
        ProgressStyle::with_template("signing {wide_bar} {pos}/{len} events, {eta} left")
            .expect("a constant template parses"),
    );
    let prepared = tokio::task::spawn_blocking(move || {
        let prepared = Prepared::new(load, &|done, all| {
            bar.set_length(all as u64);
            bar.set_position(done as u64);
        });
        bar.finish_and_clear();
        prepared
    });
    prepared.await.context("signing the run")
}

async fn against_child(
    options: &Options,
    prepared: &Prepared,
    swarm: &Swarm,
) -> anyhow::Result<Measured> {
    let scratch = Scratch::new("atproto-load").context("a temporary folder")?;
    let mut arguments = unlimited(options.consumers);
    arguments.extend(options.relay_arg.iter().cloned());
    let relay = RelayProcess::start(
        ProcessOptions {
            binary: options.relay_bin.clone().unwrap_or_else(relay_beside_us),
            folder: options
                .data_dir
                .clone()
                .unwrap_or_else(|| scratch.path().to_owned()),
            plc: swarm.plc_url(),
            hosts: swarm.host_urls(),
            arguments,
        },
        START_PATIENCE,
    )
    .await?;
    if prepared.floods() {
        // The relay knows its hosts once it is subscribed to them.
        swarm.subscribed(START_PATIENCE).await?;
        let flooding = swarm.host_urls().pop().unwrap_or_default();
        relay
            .change_limits(flooding.trim_start_matches("http://"), FLOOD_QUOTA)
            .await?;
    }
    let crowd = options.crowd(&relay.firehose()).await?;
    let usage = || relay.usage();
    let target = Target {
        firehose: relay.firehose(),
        usage: Some(&usage),
    };
    let measured = run_load(
        prepared,
        swarm,
        target,
        options.rate.into(),
        Patience::default(),
        &say,
    )
    .await;
    let measured = measured.with_context(|| format!("the relay said:\n{}", relay.said()))?;
    if let Ok(samples) = Samples::scrape(&relay.metrics_url()).await {
        eprintln!("{}", dropped(&samples));
    }
    options.say_of(&crowd);
    relay.end(START_PATIENCE).await?;
    Ok(measured)
}

/// `dropped by the relay: signature 3, block_hash 1`.
fn dropped(samples: &Samples) -> String {
    let drops = samples.drops();
    let rules: Vec<String> = drops
        .iter()
        .map(|(rule, count)| format!("{rule} {count}"))
        .collect();
    match rules.is_empty() {
        true => "the relay dropped no event".to_owned(),
        false => format!("dropped by the relay: {}", rules.join(", ")),
    }
}

async fn against_running(
    options: &Options,
    url: &str,
    prepared: &Prepared,
    swarm: &Swarm,
) -> anyhow::Result<Measured> {
    let hosts: String = swarm
        .host_urls()
        .iter()
        .map(|host| format!(" --host {host}"))
        .collect();
    eprintln!(
        "the relay at {url} has to run with these arguments, and with limits that hold nothing back:"
    );
    eprintln!(
        "  --allow-private-hosts --plc-host {}{hosts}",
        swarm.plc_url()
    );
    let firehose = url.trim_end_matches('/').replacen("http", "ws", 1);
    let usage = || options.relay_pid.and_then(Usage::of).unwrap_or_default();
    let target = Target {
        firehose,
        usage: options
            .relay_pid
            .is_some()
            .then_some(&usage as &dyn Fn() -> Usage),
    };
    let patience = Patience {
        subscribe: Duration::from_secs(600),
        ..Patience::default()
    };
    swarm.subscribed(patience.subscribe).await?;
    let crowd = options.crowd(&target.firehose).await?;
    let measured = run_load(prepared, swarm, target, options.rate.into(), patience, &say).await?;
    options.say_of(&crowd);
    Ok(measured)
}

fn say(part: &str) {
    eprintln!("{part}");
}
