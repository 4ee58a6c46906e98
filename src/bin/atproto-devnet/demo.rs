//! `atproto-devnet demo`: a network with traffic, a relay in this process, and a live view of what the relay forwards
//! and what it refuses. Needs nothing, and leaves nothing behind: neither at a signal nor when its output is closed.

mod guide;
mod refusals;
mod screen;
mod tally;
mod traffic;
mod view;

use std::io;

use anyhow::{Context, anyhow};
use atproto_relay::api::Secret;
use atproto_relay::config::Config;
use atproto_relay::devnet::network::{Network, NetworkOptions};
use atproto_relay::devnet::scratch::Scratch;
use atproto_relay::dial::{Guard, HostName};
use atproto_relay::relay::{Relay, StartError};
use atproto_relay::{eventlog, identity};
use clap::Args;
use rustix::io::Errno;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::mpsc;

use guide::Guide;
use refusals::Refusal;
use traffic::Traffic;
use view::View;

/// The relay's usual port, taken when it is free.
const USUAL_PORT: u16 = 2470;
/// Nobody but this machine reaches the relay, and it is gone in a minute.
const ADMIN_PASSWORD: &str = "demo";

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
    /// Port of the relay; 0 takes any free one [default: 2470, or any free one where 2470 is in use]
    #[arg(long, value_name = "PORT")]
    port: Option<u16>,
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
    let refusals = refusals::listen().context("the log of this process")?;
    let scratch = Scratch::new("atproto-demo").context("a temporary folder")?;
    let network = NetworkOptions {
        pds: options.pds.into(),
        seed: fastrand::u64(..),
        ..NetworkOptions::default()
    };
    let network = Network::start(network)
        .await
        .context("the network cannot listen on 127.0.0.1")?;
    let (relay, other_port) = start(&network, &scratch, options.port).await?;
    let guide = Guide {
        title: title(&options),
        relay: relay.public_addr().to_string(),
        other_port,
        metrics: format!("http://{}/metrics", relay.metrics_addr()),
        plc: network.plc_url(),
        pdses: Guide::pdses(&network),
        data: scratch.path().to_owned(),
        command: guide::relay_command(),
        keys: View::has_keys(),
    };
    let ended = show(&options, &network, guide, refusals, &mut end).await;
    view::say("stopping the relay and removing its data");
    relay.shutdown().await;
    drop(network);
    match ended {
        // `demo | head`: who has read enough needs no error.
        Err(error) if is_closed_output(&error) => Ok(()),
        ended => ended,
    }
}

/// Lets people act and shows it, until a signal, a key or a failure.
async fn show(
    options: &Options,
    network: &Network,
    guide: Guide,
    refusals: mpsc::UnboundedReceiver<Refusal>,
    end: &mut End,
) -> anyhow::Result<()> {
    let mut view = View::connect(guide, refusals).await?;
    let work = async {
        let traffic = Traffic::start(network, options.accounts.into())?;
        view.set_up(network, options.all_accounts()).await?;
        tokio::select! {
            shown = view.run(network, &traffic) => shown,
            sent = traffic.run(network, options.rate, options.fault_every) => sent,
        }
    };
    let ended = tokio::select! {
        done = work => done,
        () = end.next() => Ok(()),
    };
    view.end();
    ended
}

impl Options {
    fn all_accounts(&self) -> usize {
        usize::from(self.pds) * usize::from(self.accounts)
    }
}

fn title(options: &Options) -> String {
    let Options {
        pds,
        rate,
        fault_every,
        ..
    } = options;
    let accounts = options.all_accounts();
    let wrong = match fault_every {
        0 => String::new(),
        _ => format!(", one commit in {fault_every} wrong on purpose"),
    };
    format!("atproto-relay demo: {accounts} accounts on {pds} PDSes, {rate} events a second{wrong}")
}

/// Whether nobody reads the output: a closed pipe, or a terminal that is gone.
fn is_closed_output(error: &anyhow::Error) -> bool {
    let mut causes = error
        .chain()
        .filter_map(|cause| cause.downcast_ref::<io::Error>());
    causes.any(|error| {
        error.kind() == io::ErrorKind::BrokenPipe
            || error.raw_os_error() == Some(Errno::IO.raw_os_error())
    })
}

/// Starts the relay, at its usual port where that is free; else says why it is at another one.
async fn start(
    network: &Network,
    scratch: &Scratch,
    port: Option<u16>,
) -> anyhow::Result<(Relay, Option<String>)> {
    let usual = Relay::start(config(network, scratch, port.unwrap_or(USUAL_PORT))?).await;
    match (usual, port) {
        (Ok(relay), _) => Ok((relay, None)),
        (Err(StartError::Listen { .. }), None) => {
            let relay = Relay::start(config(network, scratch, 0)?).await;
            let relay = relay.context("the relay does not start")?;
            let reason = format!("port {USUAL_PORT} is in use; --port chooses another");
            Ok((relay, Some(reason)))
        }
        (
            Err(StartError::Listen {
                address, source, ..
            }),
            Some(_),
        ) => Err(anyhow!(
            "the relay cannot listen on {address}: {source}; choose another port with --port, or leave it out to take a \
             free one"
        )),
        (Err(error), _) => Err(anyhow::Error::new(error).context("the relay does not start")),
    }
}

/// The signals that end the demo.
struct End([Signal; 4]);

impl End {
    fn install() -> io::Result<End> {
        let [interrupt, terminate, hangup, quit] = [
            SignalKind::interrupt(),
            SignalKind::terminate(),
            SignalKind::hangup(),
            SignalKind::quit(),
        ]
        .map(signal);
        Ok(End([interrupt?, terminate?, hangup?, quit?]))
    }

    async fn next(&mut self) {
        let [interrupt, terminate, hangup, quit] = &mut self.0;
        tokio::select! {
            _ = interrupt.recv() => {}
            _ = terminate.recv() => {}
            _ = hangup.recv() => {}
            _ = quit.recv() => {}
        }
    }
}

fn config(network: &Network, scratch: &Scratch, port: u16) -> anyhow::Result<Config> {
    let hosts = network
        .all_pds()
        .iter()
        .map(|pds| HostName::parse(&pds.url(), &Guard::new(true)));
    Ok(Config {
        listen: ([127, 0, 0, 1], port).into(),
        metrics_listen: ([127, 0, 0, 1], 0).into(),
        admin_password: Some(Secret::new(ADMIN_PASSWORD)),
        data_dir: scratch.path().to_owned(),
        identity: identity::Settings {
            plc_host: network
                .plc_url()
                .parse()
                .context("the URL of the directory")?,
            ..identity::Settings::default()
        },
        hosts: hosts.collect::<Result<_, _>>()?,
        allow_private_hosts: true,
        // A demonstration must fill no disk.
        log: eventlog::Settings {
            max_bytes: 1 << 30,
            ..eventlog::Settings::default()
        },
        ..Config::default()
    })
}
