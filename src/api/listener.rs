//! The door of a listener: takes connections and serves their requests.
//! Promises that connections are few enough to have a file descriptor each, that one address cannot take them all, that
//! who waits for no answer makes room for who does, that clients which reconnect without end leave time for the others, and
//! an end for those that send no request, no body or take no answer. What became a WebSocket is the firehose's to limit.

mod visits;

use std::convert::Infallible;
use std::io;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::extract::Request;
use axum::response::{IntoResponse, Response};
use http::StatusCode;
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::{Service, service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use socket2::SockRef;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream, UnixListener, UnixStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::{sleep, timeout};
use tokio_util::sync::CancellationToken;

use super::error::ApiError;
use crate::bucket::Bucket;
use crate::client::{Client, KeyedLimits, Network, Peer, TrustedProxies};
use crate::systemd::sockets::Listening;
use crate::telemetry::metrics;
use visits::{Arriving, Visit, Visits};

/// Pause after the kernel refused a connection, such as for want of file descriptors.
const PAUSE_AFTER_ERROR: Duration = Duration::from_millis(100);
/// Connections that are taken a second, as many of them at once. More wait in the kernel's queue. Measured: a thousand
/// clients that connect as fast as they are let in tripled the others' latency.
const PER_SECOND: f64 = 1_000.0;
/// How long a connection that was taken just before the end may take for its first request.
const LAST_REQUEST: Duration = Duration::from_millis(500);
/// Longest head of a request, and what is read ahead of it; hyper takes no less.
const MAX_HEAD_BYTES: usize = 16 << 10;

/// Limits of a listener.
#[derive(Debug, Clone)]
pub struct ListenerOptions {
    /// Connections at a time that are no WebSocket (yet). More wait in the kernel's queue.
    pub max_connections: usize,
    /// Those from one IPv4 address or IPv6 /64, and a quarter of those from one IPv6 /48; more are closed at once. Trusted
    /// proxies have no limit, because they speak for many.
    pub max_connections_per_ip: usize,
    /// Who is believed about the clients it speaks for.
    pub trusted_proxies: TrustedProxies,
    /// How long a request's head may take from the connection, or from the answer before it, on.
    pub head_timeout: Duration,
    /// How long a request may take from its head to its answer's.
    pub request_timeout: Duration,
    /// A connection of which the other side acknowledges nothing for so long while something waits is cut.
    pub unanswered_timeout: Duration,
}

impl Default for ListenerOptions {
    /// 1,024 connections, 64 per address, 10 s for a head, 60 s for an answer, 60 s without acknowledgement.
    fn default() -> ListenerOptions {
        ListenerOptions {
            max_connections: 1_024,
            max_connections_per_ip: 64,
            trusted_proxies: TrustedProxies::default(),
            head_timeout: Duration::from_secs(10),
            request_timeout: Duration::from_secs(60),
            unanswered_timeout: Duration::from_secs(60),
        }
    }
}

/// A listening socket, on an address or on a path of this machine.
#[derive(Debug)]
pub enum Door {
    /// On an address.
    Tcp(TcpListener),
    /// On a path.
    Unix(UnixListener),
}

/// A connection that was taken.
enum Taken {
    Tcp(TcpStream),
    Unix(UnixStream),
}

impl From<TcpListener> for Door {
    fn from(listener: TcpListener) -> Door {
        Door::Tcp(listener)
    }
}

impl TryFrom<Listening> for Door {
    type Error = io::Error;

    /// Serves a socket that was opened by somebody else. Call it within the runtime.
    fn try_from(socket: Listening) -> io::Result<Door> {
        match socket {
            Listening::Tcp(listener) => {
                listener.set_nonblocking(true)?;
                Ok(Door::Tcp(TcpListener::from_std(listener)?))
            }
            Listening::Unix(listener) => {
                listener.set_nonblocking(true)?;
                Ok(Door::Unix(UnixListener::from_std(listener)?))
            }
        }
    }
}

impl Door {
    async fn accept(&self) -> io::Result<(Taken, Peer)> {
        match self {
            Door::Tcp(listener) => {
                let (socket, peer) = listener.accept().await?;
                Ok((Taken::Tcp(socket), Peer::Tcp(peer)))
            }
            Door::Unix(listener) => {
                let (socket, _) = listener.accept().await?;
                let owner = socket.peer_cred()?;
                let (uid, pid) = (owner.uid(), owner.pid());
                Ok((Taken::Unix(socket), Peer::Unix { uid, pid }))
            }
        }
    }
}

/// Serves a router until `closing`, then waits for the requests under way. Connections that come later stay in the kernel's
/// queue, which ends with the listening socket: where somebody else holds that as well, they are answered later.
pub async fn serve(
    door: impl Into<Door>,
    router: Router,
    options: ListenerOptions,
    closing: CancellationToken,
) {
    let door = door.into();
    let places = Arc::new(Semaphore::new(options.max_connections));
    let addresses = KeyedLimits::default();
    let visits = Visits::default();
    let options = Arc::new(options);
    let pace = Bucket::new(PER_SECOND, Duration::MAX);
    let accept = async || {
        pace.turn().await;
        door.accept().await
    };
    while let Some(accepted) = closing.run_until_cancelled(accept()).await {
        let (socket, peer) = match accepted {
            Ok(accepted) => accepted,
            Err(error) => {
                tracing::warn!(%error, "a connection was not taken");
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
        let place = find_place(&places, &visits).await;
        let visit = visits.begin();
        let (router, options, closing) = (router.clone(), options.clone(), closing.clone());
        tokio::spawn(async move {
            match socket {
                Taken::Tcp(socket) => {
                    prepare(&socket, &options).unwrap_or_else(|error| {
                        tracing::debug!(%error, "a connection keeps the kernel's defaults");
                    });
                    connection(socket, peer, visit, router, options, closing).await;
                }
                Taken::Unix(socket) => {
                    connection(socket, peer, visit, router, options, closing).await;
                }
            }
            drop((entry, place));
        });
    }
    // All places free: all requests are answered.
    let everything = u32::try_from(options.max_connections).unwrap_or(u32::MAX);
    let _ = places.acquire_many(everything).await;
}

/// Waits for a place. Where there is none, the connection that has waited for its client for longest makes room.
async fn find_place(places: &Arc<Semaphore>, visits: &Visits) -> OwnedSemaphorePermit {
    let free = async || {
        let place = places.clone().acquire_owned().await;
        place.expect("the semaphore is never closed")
    };
    loop {
        if let Ok(place) = places.clone().try_acquire_owned() {
            return place;
        }
        if visits.end_longest_wait() {
            metrics().http_connections_closed(true).inc();
            return free().await;
        }
        tokio::select! {
            place = free() => return place,
            () = visits.one_waits() => {}
        }
    }
}

async fn connection(
    socket: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
    peer: Peer,
    visit: Arc<Visit>,
    router: Router,
    options: Arc<ListenerOptions>,
    closing: CancellationToken,
) {
    let router = TowerToHyperService::new(router);
    let request_timeout = options.request_timeout;
    let proxies = options.trusted_proxies.clone();
    let asked = CancellationToken::new();
    let asking = asked.clone();
    let visiting = visit.clone();
    let service = service_fn(move |request: Request<Incoming>| {
        asking.cancel();
        let visit = visiting.clone();
        visit.is_served();
        let client = Client::of(peer, request.headers(), &proxies);
        let mut request = request.map(|body| Arriving::new(body, visit.clone()));
        request.extensions_mut().insert(client);
        let answer = timeout(request_timeout, router.call(request));
        async move {
            let response = match answer.await {
                Ok(Ok(response)) => response,
                Err(_) => too_late(),
            };
            visit.waits_anew();
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
        () = visit.ended() => {
            return tracing::debug!(%peer, "a connection that waited for its client made room");
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

/// Waits for the end, and then for the first request of who was taken in just before: nobody is sent away unheard.
async fn last_request(closing: &CancellationToken, asked: &CancellationToken) {
    closing.cancelled().await;
    // Who says nothing is not waited for.
    let _ = timeout(LAST_REQUEST, asked.cancelled()).await;
}

fn prepare(socket: &TcpStream, options: &ListenerOptions) -> io::Result<()> {
    // A lone event must not wait for the consumer's ACK of the one before.
    socket.set_nodelay(true)?;
    SockRef::from(socket).set_tcp_user_timeout(Some(options.unanswered_timeout))
}

fn too_late() -> Response {
    let message = "the request took too long";
    ApiError::new(StatusCode::REQUEST_TIMEOUT, "RequestTimeout", message).into_response()
}
