//! The live view: one line for each event that comes through the relay, what was put in on purpose,
//! and what the relay refused, by rule.

use std::io::{self, IsTerminal, Write};
use std::path::Path;
use std::time::Duration;

use anyhow::Context;
use atproto_relay::atproto::frame::{self, Message};
use atproto_relay::devnet::network::Network;
use atproto_relay::devnet::scrape::Samples;
use futures_util::StreamExt;
use tokio::net::TcpStream;
use tokio_tungstenite::tungstenite::Message as Packet;
use tokio_tungstenite::{MaybeTlsStream, WebSocketStream, connect_async};

use super::traffic::Traffic;

/// Pause between two looks at the relay's counters.
const LOOK: Duration = Duration::from_millis(250);

/// What stdout says when its reader has gone.
const UNREAD: &str = "nobody reads what the demo prints";

const GREEN: &str = "\x1b[32m";
const YELLOW: &str = "\x1b[33m";
const RED: &str = "\x1b[31m";
const DIM: &str = "\x1b[2m";
const PLAIN: &str = "\x1b[0m";

/// Says what there is, and how to look at it oneself.
pub fn introduce(
    network: &Network,
    firehose: &str,
    metrics: &str,
    folder: &Path,
) -> anyhow::Result<()> {
    let hosts: Vec<String> = network
        .all_pds()
        .iter()
        .map(|pds| format!("{} at {}", pds.domain(), pds.url()))
        .collect();
    let (plc, hosts, folder) = (network.plc_url(), hosts.join(", "), folder.display());
    let text = format!(
        "A PLC directory at {plc}, PDSes: {hosts}.\n\
         The relay's metrics are at {metrics}, its data in {folder} until the end.\n\
         Subscribe to the firehose from another terminal:\n\n  \
         cargo run --release --bin atproto-relay -- firehose {firehose}\n  \
         websocat -b '{firehose}/xrpc/com.atproto.sync.subscribeRepos?cursor=0'\n\n\
         Ctrl-C ends everything.\n\n"
    );
    io::stdout().write_all(text.as_bytes()).context(UNREAD)
}

/// Tells something beside the view. That nobody reads it is no reason to fail.
pub fn say(text: &str) {
    let _ = writeln!(io::stderr(), "{text}");
}

/// A consumer of the relay that prints.
pub struct View {
    socket: WebSocketStream<MaybeTlsStream<TcpStream>>,
    metrics: String,
    before: Samples,
    color: bool,
}

impl View {
    /// Subscribes before anything happens, so that nothing is missed.
    pub async fn connect(firehose: &str, metrics: &str) -> anyhow::Result<View> {
        let url = format!("{firehose}/xrpc/com.atproto.sync.subscribeRepos?cursor=0");
        let (socket, _) = connect_async(url)
            .await
            .context("subscribing to the relay")?;
        let before = Samples::scrape(metrics)
            .await
            .context("reading the relay's metrics")?;
        Ok(View {
            socket,
            metrics: metrics.to_owned(),
            before,
            color: io::stdout().is_terminal()
                && std::env::var_os("NO_COLOR").is_none_or(|set| set.is_empty()),
        })
    }

    /// Prints until the relay ends the connection or nobody reads the output.
    pub async fn run(mut self, traffic: &Traffic) -> anyhow::Result<()> {
        let mut clock = tokio::time::interval(LOOK);
        loop {
            tokio::select! {
                packet = self.socket.next() => match packet.context("the relay ended the connection")?? {
                    Packet::Binary(frame) => self.event(&frame, traffic)?,
                    _ => continue,
                },
                _ = clock.tick() => self.refusals(traffic).await?,
            }
        }
    }

    fn event(&mut self, frame: &[u8], traffic: &Traffic) -> anyhow::Result<()> {
        let frame = frame::decode(frame).context("the relay sent a malformed frame")?;
        let (seq, kind, did, what) = match &frame.message {
            Message::Commit(commit) => {
                let ops: Vec<String> = commit
                    .ops
                    .iter()
                    .map(|op| format!("{} {}", op.action.as_str(), op.path))
                    .collect();
                (
                    commit.seq,
                    "#commit",
                    commit.repo,
                    if ops.is_empty() {
                        "first commit".to_owned()
                    } else {
                        ops.join(", ")
                    },
                )
            }
            Message::Sync(sync) => (sync.seq, "#sync", sync.did, format!("rev {}", sync.rev)),
            Message::Identity(identity) => (
                identity.seq,
                "#identity",
                identity.did,
                identity.handle.unwrap_or_default().to_owned(),
            ),
            Message::Account(account) => {
                let status = if account.active {
                    "active"
                } else {
                    account.status.unwrap_or("inactive")
                };
                (account.seq, "#account", account.did, status.to_owned())
            }
            Message::Info(info) => return self.line(DIM, &format!("info: {}", info.name)),
            Message::Error(error) => return self.line(RED, &format!("error: {}", error.error)),
            _ => return Ok(()),
        };
        let who = traffic.handle(did).unwrap_or_else(|| did.to_owned());
        self.line(GREEN, &format!("✓ {seq:>6}  {kind:<9}  {who:<22}  {what}"))
    }

    /// What was put in, and what the counters say was made of it.
    async fn refusals(&mut self, traffic: &Traffic) -> anyhow::Result<()> {
        let counted = Samples::scrape(&self.metrics).await;
        // What is counted by now was put in before, so that its note comes first.
        for note in traffic.notes() {
            self.line(YELLOW, &format!("! {note}"))?;
        }
        // One look missed is no harm: the next one counts all.
        let Ok(now) = counted else { return Ok(()) };
        let since = now.since(&self.before);
        for (rule, count) in since.drops() {
            let times = if count == 1 {
                String::new()
            } else {
                format!(", {count} events")
            };
            self.line(RED, &format!("✗ refused by rule {rule}{times}"))?;
        }
        let broken = since.sum("relay_events_desynchronized_total");
        if broken > 0.0 {
            self.line(
                YELLOW,
                "~ forwarded, though the account's chain broke: it counts as desynchronised",
            )?;
        }
        self.before = now;
        Ok(())
    }

    fn line(&self, color: &str, text: &str) -> anyhow::Result<()> {
        let mut out = io::stdout().lock();
        if self.color {
            writeln!(out, "{color}{text}{PLAIN}")
        } else {
            writeln!(out, "{text}")
        }
        .context(UNREAD)
    }
}
