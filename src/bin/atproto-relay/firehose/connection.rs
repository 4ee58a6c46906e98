//! One WebSocket connection to a server that the person named: frames in, pings out, an end with its reason.
//! The dial guard has no part in it: whoever types an address may go there.

use std::fmt;
use std::time::Duration;

use bytes::Bytes;
use futures_util::{SinkExt, StreamExt};
use tokio::net::TcpStream;
use tokio::time::{Instant, Interval, MissedTickBehavior, interval_at, timeout};
use tokio_tungstenite::tungstenite::error::ProtocolError;
use tokio_tungstenite::tungstenite::protocol::WebSocketConfig;
use tokio_tungstenite::tungstenite::{self, ClientRequestBuilder, Message};
use tokio_tungstenite::{
    Connector, MaybeTlsStream, WebSocketStream, connect_async_tls_with_config,
};
use url::Url;

use atproto_relay::dial::{PRODUCT, client_config, speaks_no_tls};

use crate::output::printable;

/// Longest wait for TCP, TLS and the WebSocket handshake together.
const OPEN_TIMEOUT: Duration = Duration::from_secs(20);
/// How often a ping goes out.
const PING_EVERY: Duration = Duration::from_secs(30);
/// Longest silence, pongs included, after which the connection counts as dead.
const LONGEST_SILENCE: Duration = Duration::from_secs(90);
/// Larger than the protocol's 5 MB, so that a server's mistake can be shown rather than only fail.
const MAX_FRAME_BYTES: usize = 16_000_000;

/// Why there is no connection or no more of it.
#[derive(Debug)]
pub enum End {
    /// It could not be opened.
    Open { url: Url, reason: String },
    /// It was lost.
    Lost(String),
    /// The server sent an error frame.
    ErrorFrame {
        error: String,
        message: Option<String>,
    },
}

impl fmt::Display for End {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            End::Open { url, reason } => write!(f, "cannot open {url}: {reason}"),
            End::Lost(reason) => write!(f, "the connection was lost: {reason}"),
            End::ErrorFrame { error, message } => {
                let message = message.as_deref().unwrap_or("no message");
                write!(f, "{} ({})", printable(error), printable(message))
            }
        }
    }
}

/// An open stream.
pub struct Connection {
    socket: WebSocketStream<MaybeTlsStream<TcpStream>>,
    pings: Interval,
    heard: Instant,
}

impl Connection {
    /// Connects and shakes hands.
    pub async fn open(url: &Url) -> Result<Connection, End> {
        let failed = |reason: String| End::Open {
            url: url.clone(),
            reason,
        };
        let uri = url
            .as_str()
            .parse()
            .map_err(|error| failed(format!("{error}")))?;
        let request = ClientRequestBuilder::new(uri).with_header("User-Agent", PRODUCT);
        let limits = WebSocketConfig::default()
            .max_message_size(Some(MAX_FRAME_BYTES))
            .max_frame_size(Some(MAX_FRAME_BYTES));
        let connector = Connector::Rustls(client_config());
        let opening = connect_async_tls_with_config(request, Some(limits), true, Some(connector));
        let (socket, _) = timeout(OPEN_TIMEOUT, opening)
            .await
            .map_err(|_| {
                failed(format!(
                    "no answer within {} seconds",
                    OPEN_TIMEOUT.as_secs()
                ))
            })?
            .map_err(|error| failed(explain_opening(&error, url)))?;
        let mut pings = interval_at(Instant::now() + PING_EVERY, PING_EVERY);
        pings.set_missed_tick_behavior(MissedTickBehavior::Delay);
        Ok(Connection {
            socket,
            pings,
            heard: Instant::now(),
        })
    }

    /// The next binary frame. Safe to drop while it waits.
    pub async fn next(&mut self) -> Result<Bytes, End> {
        loop {
            tokio::select! {
                message = self.socket.next() => {
                    self.heard = Instant::now();
                    match message {
                        Some(Ok(Message::Binary(frame))) => return Ok(frame),
                        Some(Ok(Message::Close(reason))) => {
                            let reason = reason.map_or_else(String::new, |frame| format!(" ({})", printable(&frame.reason)));
                            return Err(End::Lost(format!("the server closed it{reason}")));
                        }
                        // Text is no part of the protocol; pings are answered by the library.
                        Some(Ok(_)) => {}
                        Some(Err(error)) => return Err(End::Lost(explain(&error))),
                        None => return Err(End::Lost("the server ended it".to_owned())),
                    }
                }
                _ = self.pings.tick() => {
                    if self.heard.elapsed() > LONGEST_SILENCE {
                        return Err(End::Lost(format!("nothing heard for {} seconds", LONGEST_SILENCE.as_secs())));
                    }
                    if let Err(error) = self.socket.send(Message::Ping(Bytes::new())).await {
                        return Err(End::Lost(explain(&error)));
                    }
                }
            }
        }
    }
}

/// Why a connection could not be opened, with what to do where the scheme is the reason.
fn explain_opening(error: &tungstenite::Error, url: &Url) -> String {
    let host = url.host_str().unwrap_or_default();
    let port = url.port().map_or(String::new(), |port| format!(":{port}"));
    match error {
        error if speaks_no_tls(error) => {
            format!("the server does not speak TLS there; try http://{host}{port}")
        }
        tungstenite::Error::Protocol(ProtocolError::HttparseError(_)) => {
            format!(
                "the server does not speak HTTP there; if it speaks TLS, try https://{host}{port}"
            )
        }
        other => explain(other),
    }
}

fn explain(error: &tungstenite::Error) -> String {
    match error {
        tungstenite::Error::Http(response) => {
            format!(
                "the server answered with status {} instead of an event stream",
                response.status()
            )
        }
        other => other.to_string(),
    }
}
