//! The WebSocket side of the firehose: handshakes, sessions, limits, close, and handover to the next process.
//! Promises every stream the same: whole messages from its sources, one after the other, to each consumer that reads. Knows
//! no stream and no encoding.

use std::net::Ipv4Addr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::Duration;

use axum::extract::Request;
use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use http::header::USER_AGENT;
use hyper::upgrade::{OnUpgrade, Upgraded};
use hyper_util::rt::TokioIo;
use tokio::net::TcpStream;
use tokio::sync::watch;
use tokio::task::spawn_blocking;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

pub mod client_frames;
pub mod close_codes;
mod connection;
mod consumers;
mod deadlines;
mod end;
mod ending;
mod handover;
mod handshake;
mod metrics;
mod receiving;
mod server_frames;
mod serving;
mod session;
pub mod stream;
mod wakeups;

pub use consumers::{ConsumerInfo, Consumers};
pub use handover::{Resumed, Saved};
pub use metrics::Metrics;

use crate::client::Client;
use crate::eventlog::ResumeError;
use crate::systemd::sockets::Stored;
use crate::systemd::store::DescriptorStore;
use connection::Connection;
use consumers::{AdmissionError, Registration};
use handover::Handover;
use handshake::Refusal;
use receiving::INBOX_BYTES;
use session::Session;
use stream::{Source, Stream};

/// How long systemd may take for the last descriptors at a stop.
const SETTLING_TIMEOUT: Duration = Duration::from_millis(200);

/// What an operator sets for the firehose. All of it can change while consumers are connected.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Settings {
    /// See [`FirehoseOptions::max_consumers`].
    pub max_consumers: usize,
    /// See [`FirehoseOptions::max_consumers_per_ip`].
    pub max_consumers_per_ip: usize,
    /// See [`FirehoseOptions::max_consumer_input`].
    pub max_consumer_input: u64,
}

impl Default for Settings {
    /// 1,000 consumers, 50 per address, 64 KiB a second from each.
    fn default() -> Settings {
        Settings {
            max_consumers: 1_000,
            max_consumers_per_ip: 50,
            max_consumer_input: 64 << 10,
        }
    }
}

/// Limits and times of the firehose.
#[derive(Debug, Clone)]
pub struct FirehoseOptions {
    /// Consumers at a time.
    pub max_consumers: usize,
    /// Consumers at a time from one IPv4 address or IPv6 /64; four times as many from one IPv6 /48.
    pub max_consumers_per_ip: usize,
    /// Bytes a second that a consumer may send, and 16 times as many at once.
    pub max_consumer_input: u64,
    /// Interval of our pings.
    pub ping_interval: Duration,
    /// A consumer that takes no byte for so long while some wait is cut.
    pub write_timeout: Duration,
    /// A consumer that sends nothing for so long, not even a pong, is cut unless it took events meanwhile.
    pub idle_timeout: Duration,
    /// How long a connection may take to become a WebSocket once we accepted.
    pub handshake_timeout: Duration,
    pub metrics: Metrics,
}

impl Default for FirehoseOptions {
    /// The default settings; pings every 30 s (the reference relay's interval), cut after 60 s without reading and 5 min
    /// without sending.
    fn default() -> FirehoseOptions {
        FirehoseOptions::with(&Settings::default(), Metrics::default())
    }
}

impl FirehoseOptions {
    /// These settings.
    pub fn with(settings: &Settings, metrics: Metrics) -> FirehoseOptions {
        FirehoseOptions {
            max_consumers: settings.max_consumers,
            max_consumers_per_ip: settings.max_consumers_per_ip,
            max_consumer_input: settings.max_consumer_input,
            metrics,
            ping_interval: Duration::from_secs(30),
            write_timeout: Duration::from_secs(60),
            idle_timeout: Duration::from_secs(300),
            handshake_timeout: Duration::from_secs(10),
        }
    }
}

/// The part of [`FirehoseOptions`] that may change.
#[derive(Debug)]
struct Limits {
    consumers: AtomicUsize,
    per_ip: AtomicUsize,
    input: AtomicU64,
}

/// Serves consumers of streams. Clones share it.
#[derive(Debug, Clone)]
pub struct Server {
    options: Arc<FirehoseOptions>,
    limits: Arc<Limits>,
    consumers: Consumers,
    wakeups: wakeups::WakeUps,
    sessions: TaskTracker,
    closing: CancellationToken,
    handover: Option<Handover>,
}

impl Server {
    /// A server that wakes its consumers when `head` changes. Call it within the runtime that is to serve them.
    pub fn new(head: watch::Receiver<u64>, options: FirehoseOptions) -> Server {
        Server::with(head, options, None)
    }

    /// The same, with the connections of the previous process, whose positions `resume` finds. Its own connections are
    /// handed over to the next process through `store`.
    pub async fn resume<S: Source>(
        head: watch::Receiver<u64>,
        options: FirehoseOptions,
        store: Option<DescriptorStore>,
        stored: Stored,
        resume: impl Fn(Saved<'_>) -> Result<S, ResumeError> + Send + 'static,
    ) -> (Server, Vec<Resumed<S>>) {
        let (wanted, metrics) = (options.max_consumers, options.metrics.clone());
        let taking_over = spawn_blocking(move || {
            let (handover, resumed, closed) = handover::take_over(store, stored, wanted, resume);
            metrics.count_handed_over(resumed.len(), closed);
            (handover, resumed)
        })
        .await;
        let (handover, resumed) = taking_over.unwrap_or_else(|failure| {
            tracing::error!(%failure, "the consumers of the previous process are lost");
            (None, Vec::new())
        });
        (Server::with(head, options, handover), resumed)
    }

    fn with(
        head: watch::Receiver<u64>,
        options: FirehoseOptions,
        handover: Option<Handover>,
    ) -> Server {
        let sessions = TaskTracker::new();
        let closing = CancellationToken::new();
        let (waking, wakeups) = wakeups::coalesce(head);
        sessions.spawn(closing.clone().run_until_cancelled_owned(waking));
        Server {
            limits: Arc::new(Limits {
                consumers: options.max_consumers.into(),
                per_ip: options.max_consumers_per_ip.into(),
                input: options.max_consumer_input.into(),
            }),
            consumers: Consumers::new(options.metrics.clone()),
            options: Arc::new(options),
            wakeups,
            sessions,
            closing,
            handover,
        }
    }

    fn session(&self, registration: Registration) -> Session {
        Session {
            server: self.clone(),
            registration,
            wakeups: self.wakeups.clone(),
        }
    }

    /// Serves a consumer of the previous process.
    pub fn serve<S: Source>(&self, resumed: Resumed<S>) {
        let session = self.session(self.consumers.readmit(&resumed.subscriber));
        let Resumed {
            socket,
            source,
            pending,
            record,
            ..
        } = resumed;
        match TcpStream::from_std(socket) {
            Ok(socket) => {
                let connection = Connection::resume(socket, source, pending, record);
                self.sessions.spawn(session.resume(connection));
            }
            Err(error) => {
                tracing::error!(%error, "a consumer of the previous process is lost");
            }
        }
    }

    /// Answers a request for a subscription to `stream`, and serves it. The limit per address needs the [`Client`] that the
    /// listener puts into each request.
    pub fn subscribe<S: Stream>(&self, stream: &S, request: Request) -> Response {
        self.accept(stream, request)
            .unwrap_or_else(Refusal::into_response)
    }

    fn accept<S: Stream>(&self, stream: &S, mut request: Request) -> Result<Response, Refusal> {
        let key = handshake::check(&request, S::NAME)?;
        let session = self.session(self.admit(&request)?);
        let parameters = stream.parameters(request.uri().query());
        let upgrade = hyper::upgrade::on(&mut request);
        let stream = stream.clone();
        self.sessions.spawn(async move {
            if let Some((socket, received)) = session.server.upgraded(upgrade).await {
                let opening = stream.open(parameters).await;
                session.run(socket, received, opening).await;
            }
        });
        Ok(handshake::accept(key))
    }

    fn admit(&self, request: &Request) -> Result<Registration, Refusal> {
        let client = request.extensions().get::<Client>();
        let address = client.map_or(Ipv4Addr::UNSPECIFIED.into(), |client| client.address);
        let agent = request
            .headers()
            .get(USER_AGENT)
            .and_then(|agent| agent.to_str().ok());
        let admitted = self.consumers.admit(
            address,
            agent.unwrap_or_default(),
            self.limits.consumers.load(Ordering::Relaxed),
            self.limits.per_ip.load(Ordering::Relaxed),
        );
        admitted.map_err(|error| match error {
            AdmissionError::Full => Refusal::Full,
            AdmissionError::TooManyFromAddress => Refusal::TooManyFromAddress,
        })
    }

    /// The socket, once the connection is a WebSocket, and what the client sent behind its request.
    async fn upgraded(&self, upgrade: OnUpgrade) -> Option<(TcpStream, Bytes)> {
        match timeout(self.options.handshake_timeout, upgrade).await {
            Ok(Ok(upgraded)) => match Upgraded::downcast::<TokioIo<TcpStream>>(upgraded) {
                Ok(parts) => return Some((parts.io.into_inner(), parts.read_buf)),
                Err(_) => tracing::error!("a consumer's connection is not TCP"),
            },
            Ok(Err(error)) => tracing::debug!(%error, "a consumer's handshake failed"),
            Err(_) => tracing::debug!("a consumer's handshake took too long"),
        }
        None
    }

    /// Applies other settings. Consumers that are connected stay.
    pub fn apply(&self, settings: &Settings) {
        let limits = &self.limits;
        limits
            .consumers
            .store(settings.max_consumers, Ordering::Relaxed);
        limits
            .per_ip
            .store(settings.max_consumers_per_ip, Ordering::Relaxed);
        limits
            .input
            .store(settings.max_consumer_input, Ordering::Relaxed);
    }

    /// The registry of connected consumers.
    pub fn consumers(&self) -> &Consumers {
        &self.consumers
    }

    /// Ends all connections and waits until they are gone; new ones are ended at once. Connections that the next process
    /// continues are left to it, the others are closed. Takes no longer than clients may take to answer a close then, half a
    /// second.
    pub async fn shutdown(&self) {
        self.closing.cancel();
        self.sessions.close();
        self.sessions.wait().await;
        if let Some(handover) = &self.handover
            && timeout(SETTLING_TIMEOUT, handover.settle()).await.is_err()
        {
            tracing::warn!(
                "systemd does not take descriptors; the next process finds some that are closed"
            );
        }
    }
}
