//! `atproto-devnet demo`: a network with traffic, a relay in this process, and a live view of what
//! the relay lets through and what it refuses. Needs nothing, leaves nothing behind: not at Ctrl-C, SIGTERM or SIGHUP, and
//! not when nobody reads its output any more.

mod traffic;
mod view;

use std::io;

use anyhow::{Context, anyhow};
use atproto_relay::config::{Config, HostEntry};
use atproto_relay::devnet::network::{Network, NetworkOptions};
use atproto_relay::devnet::scratch::Scratch;
use atproto_relay::relay::{Relay, StartError};
use clap::Args;
use tokio::signal::unix::{Signal, SignalKind, signal};

/// Options of `demo`.
#[derive(Debug, Args)]
pub struct Options {
    /// Number of PDSes.
    #[arg(long, default_value_t = 3, value_name = "N", value_parser = clap::value_parser!(u16).range(1..))]
    pds: u16,
    /// Accounts on each PDS at the start.
    #[arg(long, default_value_t = 4, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=90))]
    accounts: u16,
    /// Events a second over all PDSes.
    #[arg(long, default_value_t = 5.0, value_name = "N", value_parser = rate)]
    rate: f64,
    /// Of how many commits one goes wrong; 0 for none.
    #[arg(long, default_value_t = 8, value_name = "N")]
    fault_every: u32,
    /// Port of the relay's firehose; 0 takes any free one.
    #[arg(long, default_value_t = 0, value_name = "PORT")]
    port: u16,
}

fn rate(text: &str) -> Result<f64, String> {
    let rate: f64 = text
        .parse()
        .map_err(|_| "a number, like 5 or 0.5".to_owned())?;
    if rate > 0.0 && rate <= 1_000.0 {
        Ok(rate)
    } else {
        Err("above 0, at most 1000".to_owned())
    }
}

/// Starts everything, shows it until it is told to end, ends it and removes the folder.
pub async fn run(options: Options) -> anyhow::Result<()> {
    // Before the folder is made, so that no signal leaves it behind.
    let mut end = End::install().context("waiting for signals")?;
    let scratch = Scratch::new("atproto-demo").context("a temporary folder")?;
    let network = NetworkOptions {
        pds: options.pds.into(),
        seed: fastrand::u64(..),
        ..NetworkOptions::default()
    };
    let network = Network::start(network)
        .await
        .context("the network cannot listen on 127.0.0.1")?;
    let relay = Relay::start(config(&network, &scratch, options.port)?)
        .await
        .map_err(|error| not_started(error, options.port))?;
    let firehose = format!("ws://{}", relay.public_addr());
    let metrics = format!("http://{}/metrics", relay.metrics_addr());
    let show = async {
        view::introduce(&network, &firehose, &metrics, scratch.path())?;
        let view = view::View::connect(&firehose, &metrics).await?;
        let traffic = traffic::Traffic::start(&network, options.accounts.into())?;
        tokio::select! {
            shown = view.run(&traffic) => shown,
            sent = traffic.run(&network, options.rate, options.fault_every) => sent,
        }
    };
    let ended = tokio::select! {
        shown = show => shown,
        () = end.next() => Ok(()),
    };
    view::say("\nending: the relay writes what is under way, then the folder is removed");
    relay.shutdown().await;
    drop(network);
    match ended {
        // `demo | head`: who has read enough needs no error.
        Err(error) if is_closed_pipe(&error) => Ok(()),
        ended => ended,
    }
}

fn is_closed_pipe(error: &anyhow::Error) -> bool {
    let kinds = error
        .chain()
        .filter_map(|cause| cause.downcast_ref::<io::Error>())
        .map(io::Error::kind);
    kinds
        .into_iter()
        .any(|kind| kind == io::ErrorKind::BrokenPipe)
}

/// Why the relay did not start, in terms of the demo's own flags.
fn not_started(error: StartError, port: u16) -> anyhow::Error {
    match error {
        StartError::Listen {
            address, source, ..
        } if port != 0 => anyhow!(
            "the relay cannot listen on {address}: {source}; choose another port with --port, or leave it out to take a \
             free one"
        ),
        error => anyhow::Error::new(error).context("the relay does not start"),
    }
}

/// The signals that end the demo.
struct End([Signal; 3]);

impl End {
    fn install() -> io::Result<End> {
        let [interrupt, terminate, hangup] = [
            SignalKind::interrupt(),
            SignalKind::terminate(),
            SignalKind::hangup(),
        ]
        .map(signal);
        Ok(End([interrupt?, terminate?, hangup?]))
    }

    async fn next(&mut self) {
        let [interrupt, terminate, hangup] = &mut self.0;
        tokio::select! {
            _ = interrupt.recv() => {}
            _ = terminate.recv() => {}
            _ = hangup.recv() => {}
        }
    }
}

fn config(network: &Network, scratch: &Scratch, port: u16) -> anyhow::Result<Config> {
    let hosts = network
        .all_pds()
        .iter()
        .map(|pds| HostEntry::parse(&pds.url()));
    Ok(Config {
        listen: ([127, 0, 0, 1], port).into(),
        metrics_listen: ([127, 0, 0, 1], 0).into(),
        data_dir: scratch.path().to_owned(),
        plc_host: network
            .plc_url()
            .parse()
            .context("the URL of the directory")?,
        hosts: hosts.collect::<Result<_, _>>()?,
        allow_private_hosts: true,
        // A demonstration is no burden for any disk.
        log_max_bytes: 1 << 30,
        ..Config::default()
    })
}
