//! The live view: one line for each event that comes out of the relay, what was put in on purpose, and what the relay
//! refused. On a terminal between a header and a footer that stay, elsewhere as plain lines.

use std::io::{self, BufRead, Read, Write};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use atproto_relay::atproto::frame::{self, Message};
use atproto_relay::devnet::network::Network;
use atproto_relay::devnet::scrape::Samples;
use atproto_relay::devnet::timestamp::Timestamp;
use futures_util::StreamExt;
use rustix::process::{Signal as Kill, getpid, kill_process};
use tokio::net::TcpStream;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::mpsc;
use tokio::time::timeout;
use tokio_tungstenite::tungstenite::Message as Packet;
use tokio_tungstenite::{MaybeTlsStream, WebSocketStream, connect_async};

use super::guide::{Guide, PLAIN_COLUMNS};
use super::refusals::{self, Refusal};
use super::screen::{Line, Screen, Style, has_keyboard};
use super::tally::Tally;
use super::traffic::Traffic;

/// How often notes are shown and the screen is painted.
const LOOK: Duration = Duration::from_millis(100);
/// How often the relay's counters are read.
const SCRAPE: Duration = Duration::from_millis(500);
/// Longest wait for the events of the set-up.
const SET_UP: Duration = Duration::from_secs(30);
/// What stdout says when its reader has gone.
const UNREAD: &str = "nobody reads what the demo prints";

/// What somebody at the keyboard wants.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Key {
    Forge,
    End,
}

/// Where lines go.
enum Output {
    Screen {
        screen: Box<Screen>,
        /// Ctrl-Z.
        suspend: Signal,
    },
    Plain,
}

/// A consumer of the relay that shows what it sees.
pub struct View {
    socket: WebSocketStream<MaybeTlsStream<TcpStream>>,
    metrics: String,
    refusals: mpsc::UnboundedReceiver<Refusal>,
    log: mpsc::UnboundedReceiver<String>,
    keys: mpsc::UnboundedReceiver<Key>,
    output: Output,
    tally: Tally,
}

impl View {
    /// Subscribes before anything happens, so that nothing is missed, and shows the guide.
    pub async fn connect(
        guide: Guide,
        refusals: mpsc::UnboundedReceiver<Refusal>,
    ) -> anyhow::Result<View> {
        let url = format!(
            "ws://{}/xrpc/com.atproto.sync.subscribeRepos?cursor=0",
            guide.relay
        );
        let (socket, _) = connect_async(url)
            .await
            .context("subscribing to the relay")?;
        let (metrics, has_keys) = (guide.metrics.clone(), guide.keys);
        let (output, log) = if Screen::is_wanted() {
            let (full, short) = (guide.clone(), guide);
            let screen = Screen::open(
                Box::new(move |columns| full.full(columns)),
                Box::new(move |columns| short.short(columns)),
            );
            let output = Output::Screen {
                screen: Box::new(screen.context("the terminal")?),
                suspend: signal(SignalKind::from_raw(Kill::TSTP.as_raw()))?,
            };
            (output, refusals::log_lines())
        } else {
            let lines = guide.full(PLAIN_COLUMNS).into_iter();
            let text: String = lines.map(|line| line.text + "\n").collect();
            print(&text)?;
            (Output::Plain, mpsc::unbounded_channel().1)
        };
        let is_screen = matches!(output, Output::Screen { .. });
        Ok(View {
            socket,
            metrics,
            refusals,
            log,
            keys: keys(has_keys, is_screen),
            output,
            tally: Tally::new(Instant::now()),
        })
    }

    /// Whether somebody can press keys.
    pub fn has_keys() -> bool {
        has_keyboard()
    }

    /// Waits for the events of the set-up, and shows them in one line.
    pub async fn set_up(&mut self, network: &Network, accounts: usize) -> anyhow::Result<()> {
        self.paint()?;
        let sent: u64 = network.all_pds().iter().map(|pds| pds.head_seq()).sum();
        let events = async {
            while self.tally.count() < sent {
                let packet = self.socket.next().await;
                if let Packet::Binary(_) = packet.context("the relay ended the connection")?? {
                    self.tally.set_up();
                }
            }
            anyhow::Ok(())
        };
        timeout(SET_UP, events)
            .await
            .context("the events of the set-up do not come out of the relay")??;
        let pdses = network.all_pds().len();
        let text = format!("✓ {sent} events of the set-up: {accounts} accounts on {pdses} PDSes");
        self.line(Style::Good, &text)
    }

    /// Shows what happens until the relay ends the connection, nobody reads the output, or somebody wants an end.
    pub async fn run(&mut self, network: &Network, traffic: &Traffic) -> anyhow::Result<()> {
        let mut looks = tokio::time::interval(LOOK);
        let mut scrapes = tokio::time::interval(SCRAPE);
        loop {
            tokio::select! {
                packet = self.socket.next() => match packet.context("the relay ended the connection")?? {
                    Packet::Binary(frame) => self.event(&frame, traffic)?,
                    _ => continue,
                },
                Some(key) = self.keys.recv() => match key {
                    Key::Forge => traffic.forge(network)?,
                    Key::End => return Ok(()),
                },
                Some(refusal) = self.refusals.recv() => self.refusal(refusal, network, traffic)?,
                () = self.output.suspended() => self.suspend()?,
                _ = scrapes.tick() => self.scrape().await?,
                _ = looks.tick() => self.look(traffic)?,
            }
        }
    }

    /// Gives the terminal back, and says what was seen.
    pub fn end(mut self) {
        if let Output::Screen { screen, .. } = &mut self.output {
            // The terminal may be gone.
            let _ = screen.leave();
        }
        let _ = print(&format!("{}\n", self.tally.summary(Instant::now())));
    }

    fn event(&mut self, frame: &[u8], traffic: &Traffic) -> anyhow::Result<()> {
        let frame = frame::decode(frame).context("the relay sent a malformed frame")?;
        let (seq, kind, did, time, what) = match &frame.message {
            Message::Commit(commit) => {
                let ops = commit.ops.iter();
                let ops: Vec<String> = ops
                    .map(|op| format!("{} {}", op.action.as_str(), op.path))
                    .collect();
                let what = match ops.is_empty() {
                    true => "an empty repository".to_owned(),
                    false => ops.join(", "),
                };
                (commit.seq, "#commit", commit.repo, commit.time, what)
            }
            Message::Sync(sync) => {
                let what = format!("rev {}", sync.rev);
                (sync.seq, "#sync", sync.did, sync.time, what)
            }
            Message::Identity(identity) => {
                let what = format!("handle {}", identity.handle.unwrap_or("unknown"));
                (identity.seq, "#identity", identity.did, identity.time, what)
            }
            Message::Account(account) => {
                let what = match account.active {
                    true => "active",
                    false => account.status.unwrap_or("inactive"),
                };
                (
                    account.seq,
                    "#account",
                    account.did,
                    account.time,
                    what.to_owned(),
                )
            }
            Message::Info(info) => return self.line(Style::Dim, &format!("info: {}", info.name)),
            Message::Error(error) => bail!("the relay ended the stream: {}", error.error),
            _ => return Ok(()),
        };
        let sent: Timestamp = time.parse().context("the time of an event")?;
        let lag = u64::try_from(Timestamp::now().millis() - sent.millis()).unwrap_or(0);
        self.tally
            .forwarded(Instant::now(), Duration::from_millis(lag));
        let who = traffic.handle(did).unwrap_or_else(|| did.to_owned());
        self.line(
            Style::Good,
            &format!("✓ {seq:>6}  {kind:<9}  {who:<22}  {what}"),
        )
    }

    /// What was put in on purpose since the last call.
    fn notes(&mut self, traffic: &Traffic) -> anyhow::Result<()> {
        for note in traffic.notes() {
            self.line(Style::Warning, &format!("! {note}"))?;
        }
        Ok(())
    }

    fn refusal(
        &mut self,
        refusal: Refusal,
        network: &Network,
        traffic: &Traffic,
    ) -> anyhow::Result<()> {
        // What is refused by now was put in before, so that its note comes first.
        self.notes(traffic)?;
        let Refusal {
            rule,
            host,
            did,
            reason,
        } = refusal;
        self.tally.refused(&rule);
        let who = traffic.handle(&did).unwrap_or(did);
        let pds = network.all_pds().iter().find(|pds| pds.host() == host);
        let host = pds.map_or(&*host, |pds| pds.domain());
        let reason = match reason == rule {
            true => String::new(),
            false => format!(" ({reason})"),
        };
        let text = format!("✗ refused by rule {rule}: {who}, sent by {host}{reason}");
        self.line(Style::Bad, &text)
    }

    fn look(&mut self, traffic: &Traffic) -> anyhow::Result<()> {
        self.notes(traffic)?;
        while let Ok(line) = self.log.try_recv() {
            self.line(Style::Dim, &line)?;
        }
        self.paint()
    }

    /// Sees whether chains broke.
    async fn scrape(&mut self) -> anyhow::Result<()> {
        // One look missed does no harm: the next one counts all.
        let Ok(samples) = Samples::scrape(&self.metrics).await else {
            return Ok(());
        };
        let broken = samples.sum("relay_events_desynchronized_total") as u64;
        if self.tally.desynchronized(broken) {
            self.line(
                Style::Warning,
                "~ forwarded, but the account's chain is broken: it counts as desynchronized",
            )?;
        }
        Ok(())
    }

    fn line(&mut self, style: Style, text: &str) -> anyhow::Result<()> {
        match &mut self.output {
            Output::Screen { screen, .. } => {
                screen.add(Line::new(style, text));
                Ok(())
            }
            Output::Plain => print(&format!("{text}\n")),
        }
    }

    fn paint(&mut self) -> anyhow::Result<()> {
        if let Output::Screen { screen, .. } = &mut self.output {
            screen.set_footer(self.tally.footer(Instant::now()));
            screen.paint().context(UNREAD)?;
        }
        Ok(())
    }

    /// Stops this process as Ctrl-Z does elsewhere, with the terminal as it was meanwhile.
    fn suspend(&mut self) -> anyhow::Result<()> {
        if let Output::Screen { screen, .. } = &mut self.output {
            screen.leave().context(UNREAD)?;
            kill_process(getpid(), Kill::STOP).context("stopping")?;
            screen.enter().context(UNREAD)?;
        }
        Ok(())
    }
}

impl Output {
    /// Comes when somebody presses Ctrl-Z on a screen.
    async fn suspended(&mut self) {
        match self {
            Output::Screen { suspend, .. } => {
                suspend.recv().await;
            }
            Output::Plain => std::future::pending().await,
        }
    }
}

/// Tells something beside the view. That nobody reads it is no reason to fail.
pub fn say(text: &str) {
    let _ = writeln!(io::stderr(), "{text}");
}

fn print(text: &str) -> anyhow::Result<()> {
    let mut out = io::stdout().lock();
    out.write_all(text.as_bytes())
        .and_then(|()| out.flush())
        .context(UNREAD)
}

/// Reads the keyboard in a thread of its own, which ends with the process: a read of a terminal cannot be called off.
fn keys(is_there: bool, is_screen: bool) -> mpsc::UnboundedReceiver<Key> {
    let (sender, keys) = mpsc::unbounded_channel();
    if !is_there {
        return keys;
    }
    std::thread::spawn(move || {
        let stdin = io::stdin().lock();
        let send = |key: Option<Key>| key.is_none_or(|key| sender.send(key).is_ok());
        if is_screen {
            let mut bytes = stdin.bytes().map_while(Result::ok);
            bytes.all(|byte| send(pressed(byte)));
        } else {
            let mut lines = stdin.lines().map_while(Result::ok);
            lines.all(|line| send(typed(&line)));
        }
    });
    keys
}

/// A key of a screen.
fn pressed(byte: u8) -> Option<Key> {
    match byte {
        b'\n' | b'\r' | b'f' | b'F' => Some(Key::Forge),
        b'q' | b'Q' => Some(Key::End),
        _ => None,
    }
}

/// A line, where the terminal gives whole lines.
fn typed(line: &str) -> Option<Key> {
    match line.trim() {
        "" | "f" => Some(Key::Forge),
        "q" => Some(Key::End),
        _ => None,
    }
}
