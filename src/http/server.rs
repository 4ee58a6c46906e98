//! The HTTP server of one listener: accepts connections and serves their requests.
//! Promises that connections are few enough to have a file descriptor each, that one address cannot take them all, that
//! idle connections make room for busy ones, that clients which reconnect without end leave time for the others, and
//! an end for those that send no request, no body or take no answer. Does not limit WebSockets: that is the firehose's job.

use std::convert::Infallible;
use std::io;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use axum::Json;
use axum::Router;
use axum::extract::Request;
use axum::response::{IntoResponse, Response};
use http::StatusCode;
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::{Service, service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use serde_json::json;
use socket2::SockRef;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::{sleep, timeout};
use tokio_util::sync::CancellationToken;

use super::idle::{AwaitedBody, Connection, IdleConnections};
use super::listener::{Accepted, Listener};
use crate::bucket::Bucket;
use crate::client::{Client, KeyedLimits, Network, Peer, TrustedProxies};
use crate::telemetry::metrics;

/// Pause after the kernel refused a connection, such as for want of file descriptors.
const PAUSE_AFTER_ERROR: Duration = Duration::from_millis(100);
/// Connections accepted per second, and as many at once. More wait in the kernel's queue. Measured: a thousand
/// clients that reconnect as fast as they are accepted tripled the others' latency.
const PER_SECOND: f64 = 1_000.0;
/// How long a connection that was accepted just before the shutdown may take for its first request.
const LAST_REQUEST: Duration = Duration::from_millis(500);
/// Longest head of a request, and what is read ahead of it; hyper takes no less.
const MAX_HEAD_BYTES: usize = 16 << 10;

/// Limits of a server.
#[derive(Debug, Clone)]
pub struct ServerOptions {
    /// Connections at a time that are no WebSocket (yet). More wait in the kernel's queue.
    pub max_connections: usize,
    /// Those from one IPv4 address or IPv6 /64, and a quarter of those from one IPv6 /48; more are closed at once. Trusted
    /// proxies have no limit, because they speak for many.
    pub max_connections_per_ip: usize,
    /// Proxies whose forwarded client addresses are believed.
    pub trusted_proxies: TrustedProxies,
    /// How long a request's head may take from the connection, or from the answer before it, on.
    pub head_timeout: Duration,
    /// How long a request may take from its head to its answer's.
    pub request_timeout: Duration,
    /// A connection of which the other side acknowledges nothing for so long while something waits is cut.
    pub unanswered_timeout: Duration,
}

impl Default for ServerOptions {
    /// 1,024 connections, 64 per address, 10 s for a head, 60 s for an answer, 60 s without acknowledgement.
    fn default() -> ServerOptions {
        ServerOptions {
            max_connections: 1_024,
            max_connections_per_ip: 64,
            trusted_proxies: TrustedProxies::default(),
            head_timeout: Duration::from_secs(10),
            request_timeout: Duration::from_secs(60),
            unanswered_timeout: Duration::from_secs(60),
        }
    }
}

/// Serves a router until `closing`, then waits for the requests in flight. Connections that come later stay in the kernel's
/// queue, which ends with the listening socket: where another process holds that as well, they are answered later.
pub async fn serve(
    listener: impl Into<Listener>,
    router: Router,
    options: ServerOptions,
    closing: CancellationToken,
) {
    let listener = listener.into();
    let places = Arc::new(Semaphore::new(options.max_connections));
    let addresses = KeyedLimits::default();
    let idle = IdleConnections::default();
    let options = Arc::new(options);
    let pace = Bucket::new(PER_SECOND, Duration::MAX);
    let accept = async || {
        pace.turn().await;
        listener.accept().await
    };
    while let Some(accepted) = closing.run_until_cancelled(accept()).await {
        let (socket, peer) = match accepted {
            Ok(accepted) => accepted,
            Err(error) => {
                tracing::warn!(%error, "a connection was not accepted");
                sleep(PAUSE_AFTER_ERROR).await;
                continue;
            }
        };
        let most = match options.trusted_proxies.trust(&peer) {
            true => usize::MAX,
            false => options.max_connections_per_ip,
        };
        let Some(entry) = addresses.acquire(Network::shares(peer.address(), most)) else {
            metrics().http_connections_closed(false).inc();
            tracing::debug!(%peer, "too many connections from one address; closed");
            continue;
        };
        let place = find_place(&places, &idle).await;
        let tracked = idle.enter();
        let (router, options, closing) = (router.clone(), options.clone(), closing.clone());
        tokio::spawn(async move {
            match socket {
                Accepted::Tcp(socket) => {
                    prepare(&socket, &options).unwrap_or_else(|error| {
                        tracing::debug!(%error, "a connection keeps the kernel's defaults");
                    });
                    connection(socket, peer, tracked, router, options, closing).await;
                }
                Accepted::Unix(socket) => {
                    connection(socket, peer, tracked, router, options, closing).await;
                }
            }
            drop((entry, place));
        });
    }
    // All places free: all requests are answered.
    let everything = u32::try_from(options.max_connections).unwrap_or(u32::MAX);
    let _ = places.acquire_many(everything).await;
}

/// Waits for a place. Where there is none, the connection that has been idle for longest makes room.
async fn find_place(places: &Arc<Semaphore>, idle: &IdleConnections) -> OwnedSemaphorePermit {
    let free = async || {
        let place = places.clone().acquire_owned().await;
        place.expect("the semaphore is never closed")
    };
    loop {
        if let Ok(place) = places.clone().try_acquire_owned() {
            return place;
        }
        if idle.close_longest() {
            metrics().http_connections_closed(true).inc();
            return free().await;
        }
        tokio::select! {
            place = free() => return place,
            () = idle.one_more() => {}
        }
    }
}

async fn connection(
    socket: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
    peer: Peer,
    tracked: Arc<Connection>,
    router: Router,
    options: Arc<ServerOptions>,
    closing: CancellationToken,
) {
    let router = TowerToHyperService::new(router);
    let request_timeout = options.request_timeout;
    let proxies = options.trusted_proxies.clone();
    let asked = CancellationToken::new();
    let asking = asked.clone();
    let serving = tracked.clone();
    let service = service_fn(move |request: Request<Incoming>| {
        asking.cancel();
        let tracked = serving.clone();
        tracked.set_busy();
        let client = Client::of(peer, request.headers(), &proxies);
        let mut request = request.map(|body| AwaitedBody::new(body, tracked.clone()));
        request.extensions_mut().insert(client);
        let answer = timeout(request_timeout, router.call(request));
        async move {
            let response = match answer.await {
                Ok(Ok(response)) => response,
                Err(_) => too_late(),
            };
            tracked.set_idle();
            Ok::<Response, Infallible>(response)
        }
    });
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(options.head_timeout)
        .max_buf_size(MAX_HEAD_BYTES)
        .serve_connection(TokioIo::new(socket), service)
        .with_upgrades();
    let mut connection = pin!(connection);
    let served = tokio::select! {
        served = &mut connection => served,
        () = tracked.closed() => {
            return tracing::debug!(%peer, "an idle connection made room");
        }
        () = last_request(&closing, &asked) => {
            connection.as_mut().graceful_shutdown();
            connection.await
        }
    };
    if let Err(error) = served {
        tracing::debug!(%peer, %error, "a connection ended");
    }
}

/// Waits for the shutdown, and then for the first request of a connection that was accepted just before it.
async fn last_request(closing: &CancellationToken, asked: &CancellationToken) {
    closing.cancelled().await;
    // A client that sends nothing is not waited for.
    let _ = timeout(LAST_REQUEST, asked.cancelled()).await;
}

fn prepare(socket: &TcpStream, options: &ServerOptions) -> io::Result<()> {
    // A lone event must not wait for the consumer's ACK of the one before.
    socket.set_nodelay(true)?;
    SockRef::from(socket).set_tcp_user_timeout(Some(options.unanswered_timeout))
}

fn too_late() -> Response {
    let message = "the request took too long";
    let body = json!({"error": "RequestTimeout", "message": message});
    (StatusCode::REQUEST_TIMEOUT, Json(body)).into_response()
}
