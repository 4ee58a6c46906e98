//! `firehose`: the event stream of any relay or PDS, one line for each event, checked when asked.
//!
//! A lost connection is opened again after the last event; an error frame of the server ends the command.
//! Lines come in the stream's order, also while identities are looked up for several events at once.

mod account;
mod address;
mod connection;
mod filter;
mod line;
mod record;
mod tally;
mod verdict;

use std::future::Future;
use std::io::{self, IsTerminal, Write};
use std::ops::ControlFlow;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use clap::Args;
use futures_util::StreamExt;
use futures_util::stream::FuturesOrdered;
use tokio::signal::unix::{SignalKind, signal};
use tokio::time::sleep;
use url::Url;

use atproto_relay::atproto::frame::Kind;
use atproto_relay::clock::Clock;
use atproto_relay::dial::Guard;
use atproto_relay::identity::{self, Resolver};

use super::failure::Failure;
use super::output::counted;
use super::progress::Progress;
use account::Account;
use address::StreamAddress;
use connection::{Connection, End};
use filter::{Collection, Filter};
use line::{Line, Seen};
use tally::Tally;

pub const EXAMPLES: &str = "\
Examples:
  atproto-relay firehose bsky.network
  atproto-relay firehose localhost:2470 --cursor 0 --limit 100
  atproto-relay firehose https://pds.example.com --verify
  atproto-relay firehose bsky.network --did alice.example.com
  atproto-relay firehose bsky.network --json \\
    --collection app.bsky.feed.post | jq '.ops[].record.text'

A line is: sequence number, time, kind, account, and what happened. A JSON object has `$type` and the fields of the \
lexicon but for `blocks`, whose records are in `ops[].record`; beside them `kind`, `did` and the frame's size in \
`bytes`. The summary at the end is on stderr; Ctrl-C ends the command.

The exit code is 1 if the stream could not be read, or with --verify if an event was not valid or no event could be \
checked.";

/// Events whose identities are looked up at one time.
const MAX_PENDING: usize = 128;
/// The first and the longest pause before a lost connection is opened again.
const FIRST_PAUSE: Duration = Duration::from_secs(1);
const LONGEST_PAUSE: Duration = Duration::from_secs(30);

#[derive(Args)]
pub struct FirehoseArgs {
    /// A relay or PDS: a host name, or a URL with https, http, wss or ws
    url: StreamAddress,
    /// Start with events of seq >= SEQ, 0 for the oldest there is (some servers start with the event after SEQ). Without
    /// it, with the next event
    #[arg(long, value_name = "SEQ", allow_negative_numbers = true, value_parser = sequence_number)]
    cursor: Option<u64>,
    /// Only events of this kind: commit, sync, identity or account; can be repeated
    #[arg(long = "kind", value_name = "KIND", value_parser = filter::kind)]
    kinds: Vec<Kind>,
    /// Only events of this account; can be repeated
    #[arg(long = "did", value_name = "DID|HANDLE")]
    accounts: Vec<Account>,
    /// Only commits with an op in this collection, and of their ops only those; `app.bsky.feed.*` means all collections
    /// below app.bsky.feed; can be repeated
    #[arg(long = "collection", value_name = "NSID")]
    collections: Vec<Collection>,
    /// Print JSON with the records, one object a line
    #[arg(long)]
    json: bool,
    /// Resolve each account and check signature, hashes, ops and inversion of each #commit and #sync
    #[arg(long)]
    verify: bool,
    /// End after this many events that are shown
    #[arg(long, value_name = "COUNT")]
    limit: Option<u64>,
    /// End with exit code 1 when the connection is lost, instead of connecting again
    #[arg(long)]
    no_reconnect: bool,
    /// The PLC directory for --verify
    #[arg(
        long,
        value_name = "URL",
        default_value = "https://plc.directory",
        env = "RELAY_PLC_HOST"
    )]
    plc_host: Url,
    /// Let --verify and --did ask private addresses too, for test networks
    #[arg(long)]
    allow_private_hosts: bool,
}

/// A cursor: none is below 0, which means the oldest event.
fn sequence_number(text: &str) -> Result<u64, String> {
    text.parse().map_err(|_| {
        "a sequence number is a whole number from 0 on; 0 is the oldest event there is, and without --cursor the next \
         one comes first"
            .to_owned()
    })
}

pub fn run(args: &FirehoseArgs) -> Result<(), Failure> {
    if !args.collections.is_empty() && !args.kinds.is_empty() && !args.kinds.contains(&Kind::Commit)
    {
        return Err(Failure::Usage(
            "--collection shows commits only: leave --kind out, or add --kind commit".to_owned(),
        ));
    }
    tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .map_err(|error| Failure::Failed(format!("cannot start the runtime: {error}")))?
        .block_on(async {
            let mut terminate = signal(SignalKind::terminate()).map_err(Failure::failed)?;
            let mut reader = Reader::new(args);
            let result = tokio::select! {
                result = reader.read() => result,
                _ = tokio::signal::ctrl_c() => Ok(()),
                _ = terminate.recv() => Ok(()),
            };
            reader.finish(result)
        })
}

type PendingLine = Pin<Box<dyn Future<Output = Line> + Send>>;

/// One run of the command.
struct Reader<'a> {
    args: &'a FirehoseArgs,
    filter: Filter,
    guard: Guard,
    resolver: Option<Arc<Resolver>>,
    /// The last sequence number seen: where a new connection goes on.
    last: Option<i64>,
    /// Events that are shown or about to be.
    taken: u64,
    /// Whether a connection was opened.
    is_open: bool,
    tally: Tally,
}

impl<'a> Reader<'a> {
    fn new(args: &'a FirehoseArgs) -> Reader<'a> {
        let guard = Guard::new(args.allow_private_hosts);
        let resolver = args.verify.then(|| {
            let settings = identity::Settings {
                plc_host: args.plc_host.clone(),
                ..identity::Settings::default()
            };
            let metrics = identity::Metrics::default();
            Arc::new(Resolver::new(settings, guard, Clock::default(), metrics))
        });
        Reader {
            args,
            filter: Filter {
                kinds: args.kinds.clone(),
                accounts: Vec::new(),
                collections: args.collections.clone(),
            },
            guard,
            resolver,
            last: None,
            taken: 0,
            is_open: false,
            tally: Tally::new(),
        }
    }

    /// Reads until the limit, until the server reports an error, or until nobody reads us.
    async fn read(&mut self) -> Result<(), Failure> {
        let address = &self.args.url;
        self.resolve_accounts().await?;
        let mut connection = {
            let _progress = Progress::spinner(&format!("connecting to {address}"));
            Connection::open(&address.with_cursor(self.args.cursor))
                .await
                .map_err(Failure::failed)?
        };
        self.is_open = true;
        if io::stderr().is_terminal() {
            eprintln!("connected to {address}, waiting for events");
        }
        loop {
            let end = match self.follow(&mut connection).await? {
                ControlFlow::Break(()) => return Ok(()),
                ControlFlow::Continue(end) => end,
            };
            if let End::ErrorFrame { .. } = end {
                return Err(Failure::Failed(format!(
                    "{address} refused the stream: {end}"
                )));
            }
            if self.args.no_reconnect {
                return Err(Failure::failed(end));
            }
            let after = self
                .last
                .map_or(String::new(), |seq| format!(" after {seq}"));
            eprintln!(
                "{end}; connecting again{after}, in {}",
                in_words(FIRST_PAUSE)
            );
            connection = self.reopen().await;
        }
    }

    async fn resolve_accounts(&mut self) -> Result<(), Failure> {
        for account in &self.args.accounts {
            let resolved = account.resolve(&self.args.url, &self.guard).await;
            let did = resolved.map_err(Failure::Failed)?;
            if let Account::Handle(handle) = account {
                eprintln!("{} is {did}", handle.as_str());
            }
            self.filter.accounts.push(did);
        }
        Ok(())
    }

    /// Tries until there is a connection again.
    async fn reopen(&self) -> Connection {
        let mut pause = FIRST_PAUSE;
        let cursor = self
            .last
            .and_then(|seq| u64::try_from(seq).ok())
            .or(self.args.cursor);
        loop {
            sleep(pause).await;
            pause = (pause * 2).min(LONGEST_PAUSE);
            match Connection::open(&self.args.url.with_cursor(cursor)).await {
                Ok(connection) => return connection,
                Err(error) => eprintln!("{error}; trying again in {}", in_words(pause)),
            }
        }
    }

    /// Prints the events of one connection; `Break` when the work is done.
    async fn follow(
        &mut self,
        connection: &mut Connection,
    ) -> Result<ControlFlow<(), End>, Failure> {
        let mut pending: FuturesOrdered<PendingLine> = FuturesOrdered::new();
        let mut end = None;
        loop {
            let enough = self.args.limit.is_some_and(|limit| self.taken >= limit);
            if pending.is_empty() {
                if enough {
                    return Ok(ControlFlow::Break(()));
                }
                if let Some(end) = end {
                    return Ok(ControlFlow::Continue(end));
                }
            }
            tokio::select! {
                // Printing first keeps the lines from waiting behind what comes in.
                biased;
                Some(line) = pending.next() => self.print(&line)?,
                frame = connection.next(), if end.is_none() && !enough && pending.len() < MAX_PENDING => match frame {
                    Ok(frame) => match self.take(frame) {
                        Taken::Line(line) => pending.push_back(line),
                        Taken::HeldBack => {}
                        Taken::End(reason) => end = Some(reason),
                    },
                    Err(reason) => end = Some(reason),
                },
            }
        }
    }

    fn take(&mut self, frame: Bytes) -> Taken {
        let Seen { seq, line } = match Line::of_frame(&frame, &self.filter) {
            Ok(seen) => seen,
            Err(error_frame) => return Taken::End(error_frame),
        };
        if let Some(seq) = seq {
            // A server may send the event of the cursor again.
            if self.last.is_some_and(|last| seq <= last) {
                return Taken::HeldBack;
            }
            self.last = Some(seq);
        }
        let Some(line) = line else {
            return Taken::HeldBack;
        };
        self.taken += u64::from(line.is_event);
        let resolver = self.resolver.clone();
        Taken::Line(Box::pin(async move {
            match resolver {
                Some(resolver) if line.is_event => {
                    let verdict = verdict::of_frame(&resolver, &frame).await;
                    line.with_verdict(verdict)
                }
                _ => line,
            }
        }))
    }

    fn print(&mut self, line: &Line) -> io::Result<()> {
        self.tally.count(line);
        let text = match self.args.json {
            true => line.json(&self.filter),
            false => line.text(&self.filter),
        };
        writeln!(io::stdout().lock(), "{text}")
    }

    /// Sums up what was read, and judges it.
    fn finish(&self, result: Result<(), Failure>) -> Result<(), Failure> {
        if let Err(Failure::OutputClosed) = result {
            return result;
        }
        if self.is_open {
            eprintln!("{}", self.tally.summary(self.args.verify));
        }
        result.and(self.tally.verdict())
    }
}

/// `1 second`, `30 seconds`.
fn in_words(pause: Duration) -> String {
    counted(pause.as_secs(), "second", "seconds")
}

/// What becomes of a frame.
enum Taken {
    Line(PendingLine),
    /// Seen before, or not to be shown.
    HeldBack,
    End(End),
}
