//! `firehose`: the event stream of any relay or PDS, one line for each event, checked when asked.
//!
//! A lost connection is taken up again after the last event; an error frame of the server ends it.
//! Lines come in the stream's order, also while identities are looked up for several events at once.

mod address;
mod connection;
mod line;
mod verdict;

use std::future::Future;
use std::io::{self, Write};
use std::ops::ControlFlow;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use clap::Args;
use futures_util::StreamExt;
use futures_util::stream::FuturesOrdered;
use tokio::time::sleep;
use url::Url;

use atproto_relay::dial::Guard;
use atproto_relay::identity::{Resolver, ResolverOptions};

use super::failure::Failure;
use super::progress::Progress;
use address::StreamAddress;
use connection::{Connection, End};
use line::Line;
use verdict::Verdict;

pub const EXAMPLES: &str = "\
Examples:
  atproto-relay firehose bsky.network
  atproto-relay firehose localhost:2470 --cursor 0 --limit 100
  atproto-relay firehose https://pds.example.com --verify
  atproto-relay firehose wss://bsky.network --json | jq -r 'select(.kind == \"#identity\") | .handle'

A line is: sequence number, time, kind, account, and what happened. Ctrl-C ends it. The exit code is 1 if the
stream could not be read or, with --verify, if an event was not valid, or if not one could be checked.";

/// Events whose identities are looked up at one time.
const MAX_PENDING: usize = 128;
/// The first and the longest pause before a lost connection is taken up again.
const FIRST_PAUSE: Duration = Duration::from_secs(1);
const LONGEST_PAUSE: Duration = Duration::from_secs(30);

#[derive(Args)]
pub struct FirehoseArgs {
    /// A relay or PDS: a host name, or a URL with https, http, wss or ws
    url: StreamAddress,
    /// Start at this sequence number (0: the oldest there is; some servers start with the one after it);
    /// without it, with the next event
    #[arg(long, value_name = "SEQ", allow_negative_numbers = true, value_parser = sequence_number)]
    cursor: Option<u64>,
    /// Print JSON, one object a line
    #[arg(long)]
    json: bool,
    /// Resolve each account and check signature, hashes, ops and inversion of each #commit and #sync
    #[arg(long)]
    verify: bool,
    /// End after this many events
    #[arg(long, value_name = "COUNT")]
    limit: Option<u64>,
    /// The PLC directory for --verify
    #[arg(
        long,
        value_name = "URL",
        default_value = "https://plc.directory",
        env = "RELAY_PLC_HOST"
    )]
    plc_host: Url,
    /// Let --verify resolve did:web at private addresses too: for test networks
    #[arg(long)]
    allow_private_hosts: bool,
}

/// A cursor: there is none below 0, which is where everything begins.
fn sequence_number(text: &str) -> Result<u64, String> {
    text.parse().map_err(|_| {
        "a sequence number is a whole number from 0 on; 0 is the oldest event there is, and without --cursor the next \
         one comes first"
            .to_owned()
    })
}

pub fn run(args: &FirehoseArgs) -> Result<(), Failure> {
    tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .map_err(|error| Failure::Failed(format!("cannot start the runtime: {error}")))?
        .block_on(async {
            let mut reader = Reader::new(args);
            let result = tokio::select! {
                result = reader.read() => result,
                _ = tokio::signal::ctrl_c() => Ok(()),
            };
            result.and(reader.verdict())
        })
}

type PendingLine = Pin<Box<dyn Future<Output = Line> + Send>>;

/// One run of the command.
struct Reader<'a> {
    args: &'a FirehoseArgs,
    resolver: Option<Arc<Resolver>>,
    /// The last sequence number printed or about to be: where a new connection goes on.
    last: Option<i64>,
    taken: u64,
    printed: u64,
    bad: u64,
    good: u64,
    unknown: u64,
    /// Why the last event that could not be checked could not.
    obstacle: String,
}

impl<'a> Reader<'a> {
    fn new(args: &'a FirehoseArgs) -> Reader<'a> {
        let resolver = args.verify.then(|| {
            Arc::new(Resolver::new(ResolverOptions {
                plc_url: args.plc_host.clone(),
                guard: Guard::new(args.allow_private_hosts),
                ..ResolverOptions::default()
            }))
        });
        Reader {
            args,
            resolver,
            last: None,
            taken: 0,
            printed: 0,
            bad: 0,
            good: 0,
            unknown: 0,
            obstacle: String::new(),
        }
    }

    /// Reads until the limit, until the server says that there is an error, or until nobody reads us.
    async fn read(&mut self) -> Result<(), Failure> {
        let address = &self.args.url;
        let mut connection = {
            let _progress = Progress::spinner(&format!("connecting to {address}"));
            Connection::open(&address.with_cursor(self.args.cursor))
                .await
                .map_err(Failure::failed)?
        };
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
            eprintln!(
                "{end}; connecting again{}",
                self.last
                    .map_or(String::new(), |seq| format!(" after {seq}"))
            );
            connection = self.reopen().await;
        }
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
            match Connection::open(&self.args.url.with_cursor(cursor)).await {
                Ok(connection) => return connection,
                Err(error) => eprintln!("{error}; trying again"),
            }
            pause = (pause * 2).min(LONGEST_PAUSE);
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
                        Taken::SeenBefore => {}
                        Taken::End(reason) => end = Some(reason),
                    },
                    Err(reason) => end = Some(reason),
                },
            }
        }
    }

    fn take(&mut self, frame: Bytes) -> Taken {
        let line = match Line::of_frame(&frame) {
            Ok(line) => line,
            Err(error_frame) => return Taken::End(error_frame),
        };
        if let Some(seq) = line.seq {
            // A server may send the event of the cursor again.
            if self.last.is_some_and(|last| seq <= last) && self.taken > 0 {
                return Taken::SeenBefore;
            }
            self.last = Some(seq);
        }
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
        self.printed += u64::from(line.is_event);
        match &line.verdict {
            Some(Verdict::Bad(_)) => self.bad += 1,
            Some(Verdict::Good) => self.good += 1,
            Some(Verdict::Unknown(reason)) => {
                self.unknown += 1;
                self.obstacle.clone_from(reason);
            }
            Some(Verdict::NothingToCheck) | None => {}
        }
        let mut stdout = io::stdout().lock();
        if self.args.json {
            writeln!(stdout, "{}", line.json())
        } else {
            writeln!(stdout, "{}", line.text())
        }
    }

    /// What --verify found: bad events, or none that could be checked though there were some, are a failure.
    fn verdict(&self) -> Result<(), Failure> {
        let (bad, unknown, printed) = (self.bad, self.unknown, self.printed);
        if bad > 0 {
            return Err(Failure::Failed(format!(
                "{bad} of {printed} events are not valid"
            )));
        }
        if unknown > 0 && self.good == 0 {
            return Err(Failure::Failed(format!(
                "not one event could be checked, of {unknown} with something to check: {}",
                self.obstacle
            )));
        }
        if unknown > 0 {
            eprintln!(
                "{unknown} of {printed} events could not be checked: {}",
                self.obstacle
            );
        }
        Ok(())
    }
}

/// What becomes of a frame.
enum Taken {
    Line(PendingLine),
    SeenBefore,
    End(End),
}
