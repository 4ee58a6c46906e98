//! The door of a listener: takes connections and serves their requests.
//! Promises that connections are few enough to have a file descriptor each, that one address cannot take them all, that
//! clients which reconnect without end leave time for the others, and an end for those that send no request, no body or
//! take no answer. What became a WebSocket is the firehose's to limit.

use std::collections::HashMap;
use std::convert::Infallible;
use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::pin::pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use axum::Router;
use axum::extract::{ConnectInfo, Request};
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
use tokio::sync::Semaphore;
use tokio::time::{sleep, timeout};
use tokio_util::sync::CancellationToken;

use super::error::ApiError;
use crate::bucket::Bucket;
use crate::firehose::network_of;
use crate::systemd::sockets::Listening;

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
    /// Those from one IPv4 address or IPv6 /64; more are closed at once. This machine's own addresses have no limit,
    /// because a proxy on it speaks for many.
    pub max_connections_per_ip: usize,
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
    /// On a path. Who connects counts as loopback.
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
    async fn accept(&self) -> io::Result<(Taken, SocketAddr)> {
        match self {
            Door::Tcp(listener) => {
                let (socket, peer) = listener.accept().await?;
                Ok((Taken::Tcp(socket), peer))
            }
            Door::Unix(listener) => {
                let (socket, _) = listener.accept().await?;
                Ok((Taken::Unix(socket), (Ipv4Addr::LOCALHOST, 0).into()))
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
    let addresses = Addresses::default();
    let options = Arc::new(options);
    let pace = Bucket::new(PER_SECOND, Duration::MAX);
    while let Some(place) = closing
        .run_until_cancelled(places.clone().acquire_owned())
        .await
    {
        let accepting = async {
            pace.turn().await;
            door.accept().await
        };
        let Some(accepted) = closing.run_until_cancelled(accepting).await else {
            break;
        };
        let (socket, peer) = match accepted {
            Ok(accepted) => accepted,
            Err(error) => {
                tracing::warn!(%error, "a connection was not taken");
                sleep(PAUSE_AFTER_ERROR).await;
                continue;
            }
        };
        let Some(entry) = addresses.enter(peer.ip(), options.max_connections_per_ip) else {
            tracing::debug!(%peer, "too many connections from one address; closed");
            continue;
        };
        let (router, options, closing) = (router.clone(), options.clone(), closing.clone());
        tokio::spawn(async move {
            match socket {
                Taken::Tcp(socket) => {
                    prepare(&socket, &options).unwrap_or_else(|error| {
                        tracing::debug!(%error, "a connection keeps the kernel's defaults");
                    });
                    connection(socket, peer, router, options, closing).await;
                }
                Taken::Unix(socket) => connection(socket, peer, router, options, closing).await,
            }
            drop((entry, place));
        });
    }
    // All places free: all requests are answered.
    let everything = u32::try_from(options.max_connections).unwrap_or(u32::MAX);
    let _ = places.acquire_many(everything).await;
}

async fn connection(
    socket: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
    peer: SocketAddr,
    router: Router,
    options: Arc<ListenerOptions>,
    closing: CancellationToken,
) {
    let router = TowerToHyperService::new(router);
    let request_timeout = options.request_timeout;
    let asked = CancellationToken::new();
    let asking = asked.clone();
    let service = service_fn(move |mut request: Request<Incoming>| {
        asking.cancel();
        request.extensions_mut().insert(ConnectInfo(peer));
        let answer = timeout(request_timeout, router.call(request));
        async move {
            Ok::<Response, Infallible>(match answer.await {
                Ok(Ok(response)) => response,
                Err(_) => too_late(),
            })
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

/// Connections by address. Clones share it.
#[derive(Debug, Clone, Default)]
struct Addresses(Arc<Mutex<HashMap<IpAddr, usize>>>);

/// A connection's entry, taken out when dropped.
struct Entered {
    addresses: Addresses,
    network: Option<IpAddr>,
}

impl Addresses {
    fn enter(&self, address: IpAddr, max: usize) -> Option<Entered> {
        let network = (!address.to_canonical().is_loopback()).then(|| network_of(address));
        if let Some(network) = network {
            let mut counts = self.0.lock().unwrap_or_else(PoisonError::into_inner);
            let count = counts.entry(network).or_default();
            if *count >= max {
                return None;
            }
            *count += 1;
        }
        Some(Entered {
            addresses: self.clone(),
            network,
        })
    }
}

impl Drop for Entered {
    fn drop(&mut self) {
        let Some(network) = self.network else { return };
        let counts = &self.addresses.0;
        let mut counts = counts.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(count) = counts.get_mut(&network) {
            *count -= 1;
            if *count == 0 {
                counts.remove(&network);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_limited_by_network_and_this_machine_is_not() {
        let addresses = Addresses::default();
        let enter = |address: &str| addresses.enter(address.parse().expect("an address"), 2);
        let first = enter("2001:db8::1").expect("a place");
        let _second = enter("2001:db8::2").expect("a place");
        assert!(enter("2001:db8::3").is_none());
        let _other = enter("2001:db8:0:1::1").expect("another network");
        drop(first);
        let _third = enter("2001:db8::3").expect("the place that came free");
        let proxied: Vec<_> = ["127.0.0.1", "::1", "::ffff:127.0.0.1"].repeat(5);
        let held: Vec<_> = proxied.into_iter().map(enter).collect();
        assert!(held.iter().all(Option::is_some));
    }

    #[test]
    fn nothing_is_left_of_who_has_gone() {
        let addresses = Addresses::default();
        drop(addresses.enter("192.0.2.1".parse().expect("an address"), 1));
        assert!(addresses.0.lock().expect("no panic").is_empty());
    }
}
