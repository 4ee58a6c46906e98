//! The firehose: `com.atproto.sync.subscribeRepos` for consumers.
//! Promises every event from a consumer's cursor on, once and in order, as the log holds it. What the
//! frames mean is not its business; where they come from is the log's.

use std::net::Ipv4Addr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::Duration;

use axum::Router;
use axum::extract::{Request, State};
use axum::response::{IntoResponse, Response};
use axum::routing::any;
use http::header::USER_AGENT;
use hyper_util::rt::TokioIo;
use tokio::net::TcpStream;
use tokio::task::spawn_blocking;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

mod beat;
pub mod client_frames;
mod consumers;
mod cursor;
mod handover;
mod handshake;
mod session;

pub use consumers::{ConsumerInfo, Consumers, Totals};

use crate::client::Client;
use crate::eventlog::EventLog;
use crate::systemd::sockets::Stored;
use crate::systemd::store::DescriptorStore;
use consumers::{Refused, Ticket};
use cursor::Cursor;
use handover::{Keeper, Revived};
use handshake::Refusal;
use session::Session;

/// Route of the subscription.
pub const SUBSCRIBE_REPOS: &str = "/xrpc/com.atproto.sync.subscribeRepos";

/// How long systemd may take for the last descriptors at a stop.
const SETTLING_TIMEOUT: Duration = Duration::from_millis(200);

/// Limits of the firehose.
#[derive(Debug, Clone)]
pub struct FirehoseOptions {
    /// Consumers at a time.
    pub max_consumers: usize,
    /// Consumers at a time from one IPv4 address or IPv6 /64; four times as many from one IPv6 /48.
    pub max_consumers_per_ip: usize,
    /// Bytes a second that a consumer may send, and 16 times as many at once.
    pub max_consumer_input: u64,
    /// How often we ping.
    pub ping_interval: Duration,
    /// A consumer that takes no byte for so long while some wait is cut.
    pub write_timeout: Duration,
    /// A consumer that says nothing for so long, not even a pong, is cut where there were no events for
    /// it either.
    pub idle_timeout: Duration,
    /// How long a connection may take to become a WebSocket once we accepted.
    pub handshake_timeout: Duration,
}

impl Default for FirehoseOptions {
    /// 1,000 consumers, 50 per address, 64 KiB a second from each; pings every 30 s (the reference relay's interval), cut after
    /// 60 s without reading and 5 min without a word.
    fn default() -> FirehoseOptions {
        FirehoseOptions {
            max_consumers: 1_000,
            max_consumers_per_ip: 50,
            max_consumer_input: 64 << 10,
            ping_interval: Duration::from_secs(30),
            write_timeout: Duration::from_secs(60),
            idle_timeout: Duration::from_secs(300),
            handshake_timeout: Duration::from_secs(10),
        }
    }
}

/// What of [`FirehoseOptions`] may change.
#[derive(Debug)]
struct Limits {
    consumers: AtomicUsize,
    per_ip: AtomicUsize,
    input: AtomicU64,
}

/// The firehose of a log. Clones share it.
#[derive(Debug, Clone)]
pub struct Firehose {
    log: EventLog,
    options: Arc<FirehoseOptions>,
    limits: Arc<Limits>,
    consumers: Consumers,
    beat: beat::Listener,
    sessions: TaskTracker,
    closing: CancellationToken,
    keeper: Option<Keeper>,
}

impl Firehose {
    /// The firehose of `log`. Call it within the runtime that is to serve it.
    pub fn new(log: EventLog, options: FirehoseOptions) -> Firehose {
        Firehose::with(log, options, None)
    }

    /// The same, that goes on with the consumers of the process before, and keeps its own for the one after it.
    pub async fn resume(
        log: EventLog,
        options: FirehoseOptions,
        store: Option<DescriptorStore>,
        stored: Stored,
    ) -> Firehose {
        let (reading, wanted) = (log.clone(), options.max_consumers);
        let taking_up =
            spawn_blocking(move || handover::take_up(&reading, store, stored, wanted)).await;
        let (keeper, revived) = taking_up.unwrap_or_else(|failure| {
            tracing::error!(%failure, "consumers of before the restart are lost");
            (None, Vec::new())
        });
        let firehose = Firehose::with(log, options, keeper);
        for consumer in revived {
            firehose.go_on(consumer);
        }
        firehose
    }

    fn with(log: EventLog, options: FirehoseOptions, keeper: Option<Keeper>) -> Firehose {
        let sessions = TaskTracker::new();
        let closing = CancellationToken::new();
        let (beating, beat) = beat::follow(log.subscribe());
        sessions.spawn(closing.clone().run_until_cancelled_owned(beating));
        Firehose {
            log,
            limits: Arc::new(Limits {
                consumers: options.max_consumers.into(),
                per_ip: options.max_consumers_per_ip.into(),
                input: options.max_consumer_input.into(),
            }),
            options: Arc::new(options),
            consumers: Consumers::default(),
            beat,
            sessions,
            closing,
            keeper,
        }
    }

    fn session(&self, ticket: Ticket) -> Session {
        Session {
            log: self.log.clone(),
            options: self.options.clone(),
            limits: self.limits.clone(),
            ticket,
            beat: self.beat.clone(),
            closing: self.closing.clone(),
            keeper: self.keeper.clone(),
        }
    }

    /// Serves a consumer of the process before.
    fn go_on(&self, consumer: Revived) {
        let session = self.session(self.consumers.readmit(&consumer.who));
        match TcpStream::from_std(consumer.socket) {
            Ok(socket) => {
                let (reader, under, kept) = (consumer.reader, consumer.under, consumer.kept);
                self.sessions
                    .spawn(session.go_on(socket, reader, under, kept));
            }
            Err(error) => tracing::error!(%error, "a consumer of before the restart is lost"),
        }
    }

    /// Follows the options that may change. Consumers who are connected stay.
    pub fn follow(&self, options: &FirehoseOptions) {
        let limits = &self.limits;
        limits
            .consumers
            .store(options.max_consumers, Ordering::Relaxed);
        limits
            .per_ip
            .store(options.max_consumers_per_ip, Ordering::Relaxed);
        limits
            .input
            .store(options.max_consumer_input, Ordering::Relaxed);
    }

    /// Who is connected.
    pub fn consumers(&self) -> &Consumers {
        &self.consumers
    }

    /// Ends all connections and waits until they are gone; new ones are ended at once. Those that the next process goes on
    /// with are left to it, the others are closed. Takes no longer than consumers are given to answer a close then, half a
    /// second.
    pub async fn shutdown(&self) {
        self.closing.cancel();
        self.sessions.close();
        self.sessions.wait().await;
        if let Some(keeper) = &self.keeper
            && timeout(SETTLING_TIMEOUT, keeper.settle()).await.is_err()
        {
            tracing::warn!(
                "systemd does not take descriptors; the next process finds some that are closed"
            );
        }
    }
}

/// The route by itself. The limit per address needs the [`Client`] that the API's listener puts into each request.
pub fn router(firehose: Firehose) -> Router {
    Router::new()
        .route(SUBSCRIBE_REPOS, any(subscribe_repos))
        .with_state(firehose)
}

/// `GET /xrpc/com.atproto.sync.subscribeRepos?cursor=N`. Takes all methods, to refuse the others itself.
pub async fn subscribe_repos(State(firehose): State<Firehose>, request: Request) -> Response {
    firehose
        .subscribe(request)
        .unwrap_or_else(Refusal::into_response)
}

impl Firehose {
    fn subscribe(&self, mut request: Request) -> Result<Response, Refusal> {
        let key = handshake::check(&request)?;
        let client = request.extensions().get::<Client>();
        let address = client.map_or(Ipv4Addr::UNSPECIFIED.into(), |client| client.address);
        let agent = request
            .headers()
            .get(USER_AGENT)
            .and_then(|agent| agent.to_str().ok());
        let ticket = self
            .consumers
            .admit(
                address,
                agent.unwrap_or_default(),
                self.limits.consumers.load(Ordering::Relaxed),
                self.limits.per_ip.load(Ordering::Relaxed),
            )
            .map_err(|refused| match refused {
                Refused::Full => Refusal::Full,
                Refused::TooManyFromAddress => Refusal::TooManyFromAddress,
            })?;
        let cursor = Cursor::from_query(request.uri().query());
        let upgrade = hyper::upgrade::on(&mut request);
        let session = self.session(ticket);
        self.sessions.spawn(async move {
            match timeout(session.options.handshake_timeout, upgrade).await {
                Ok(Ok(upgraded)) => match upgraded.downcast::<TokioIo<TcpStream>>() {
                    Ok(parts) => {
                        let (oldest, head) = session.log.window();
                        let start = cursor.start(oldest, head);
                        let socket = parts.io.into_inner();
                        session.run(socket, parts.read_buf, start).await;
                    }
                    Err(_) => tracing::error!("a consumer came by something else than TCP"),
                },
                Ok(Err(error)) => tracing::debug!(%error, "a consumer's handshake failed"),
                Err(_) => tracing::debug!("a consumer's handshake took too long"),
            }
        });
        Ok(handshake::accept(key))
    }
}
