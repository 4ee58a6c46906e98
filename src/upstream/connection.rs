//! One WebSocket connection to a host, from dialling to its end. Every message waits for the host's rate limits and for
//! room in flight before it goes on: what is not taken stays in the socket, and nothing is dropped for speed.

use std::fmt::Display;
use std::future::Future;
use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use http::header::USER_AGENT;
use http::{HeaderMap, HeaderValue};
use rustls::pki_types::ServerName;
use tokio::net::TcpStream;
use tokio::time::{Interval, MissedTickBehavior, interval_at, sleep, timeout};
use tokio_rustls::TlsConnector;
use tokio_tungstenite::tungstenite::Error as WsError;
use tokio_tungstenite::tungstenite::client::IntoClientRequest;
use tokio_tungstenite::{MaybeTlsStream, client_async};
use tokio_util::sync::CancellationToken;

use super::handle::{HostHandle, HostState};
use super::incoming::{Event, Incoming, read_frame};
use super::news::Contact;
use super::progress::Room;
use super::rate::Cost;
use super::runner::Shared;
use super::socket::{self, Head, Message, ReadError};
use super::{Received, Sink};
use crate::atproto::did::Did;
use crate::atproto::frame::{FrameError, MAX_FRAME_BYTES};
use crate::dial::{DialError, Guard, PRODUCT, client_config, relay_mark};
use crate::store::{Batch, HostStatus};
use crate::telemetry::metrics;

type Socket = socket::Socket<MaybeTlsStream<TcpStream>>;

/// Where every host serves its events.
const SUBSCRIBE_PATH: &str = "/xrpc/com.atproto.sync.subscribeRepos";

/// A wait for rate limits at least this long makes the host's status `throttled`.
const THROTTLED_AFTER: Duration = Duration::from_secs(10);

/// Events in a row below the connection's last seq after which it is closed: the host numbers anew, and a new
/// connection settles from where.
const MAX_OLD_IN_A_ROW: u32 = 1_000;

/// Rules that are applied here, by their names in metrics and logs.
pub(super) mod rule {
    /// A message is longer than [`super::MAX_FRAME_BYTES`].
    pub(in crate::upstream) const FRAME_TOO_LARGE: &str = "frame_too_large";
    /// A frame is not two canonical CBOR objects.
    pub(in crate::upstream) const FRAME: &str = "frame";
    /// A frame is canonical but lacks a field that routing needs, or has it with another type.
    pub(in crate::upstream) const FRAME_FIELDS: &str = "frame_fields";
    /// A seq is not above the connection's last.
    pub(in crate::upstream) const UPSTREAM_SEQ: &str = "upstream_seq";
    /// The DID of an event does not follow the syntax.
    pub(in crate::upstream) const DID_SYNTAX: &str = "did_syntax";

    /// All of them, for metrics.
    pub(in crate::upstream) const ALL: [&str; 5] = [
        FRAME_TOO_LARGE,
        FRAME,
        FRAME_FIELDS,
        UPSTREAM_SEQ,
        DID_SYNTAX,
    ];
}

/// Times of a connection.
#[derive(Clone, Copy, Debug)]
pub(super) struct Times {
    /// Longest time for TCP, TLS and the WebSocket handshake together.
    pub(super) handshake: Duration,
    /// Time between two pings of ours.
    pub(super) ping: Duration,
    /// Longest silence, pongs included, before the connection counts as dead.
    pub(super) idle: Duration,
    /// Longest time from a message's first byte to its last.
    pub(super) message: Duration,
}

/// Why a connection ended.
#[derive(Debug, thiserror::Error)]
pub(super) enum End {
    #[error("the relay is closing it")]
    Cancelled,
    #[error("the host closed it")]
    Closed,
    #[error("{0}")]
    Dial(#[from] DialError),
    /// What a host says is shown in quotes, here and below: it must not look like a line of ours.
    #[error("the handshake failed: {0:?}")]
    Handshake(String),
    #[error("{0}")]
    Read(ReadError),
    #[error("no answer within {} s", .0.as_secs())]
    HandshakeTimeout(Duration),
    #[error("nothing heard for {} s", .0.as_secs())]
    Silent(Duration),
    #[error("it is a relay: its Server header is {0:?}")]
    IsRelay(String),
    #[error("a message is longer than {MAX_FRAME_BYTES} bytes")]
    TooLarge,
    #[error("a frame is malformed: {0}")]
    Malformed(FrameError),
    #[error("the host has not come as far as our cursor: {0:?}")]
    FutureCursor(String),
    #[error("the host sent the error {error:?}: {message:?}")]
    ErrorFrame { error: String, message: String },
    #[error("{MAX_OLD_IN_A_ROW} events in a row had old sequence numbers")]
    OldSeqs,
    #[error("it numbers its events anew, and those before are not settled within {} s", .0.as_secs_f32())]
    Unsettled(Duration),
}

impl From<WsError> for End {
    fn from(error: WsError) -> Self {
        match error {
            WsError::Http(response) => {
                Self::Handshake(format!("the answer is {}", response.status()))
            }
            other => Self::Handshake(other.to_string()),
        }
    }
}

impl From<ReadError> for End {
    fn from(error: ReadError) -> Self {
        match error {
            ReadError::TooLarge => Self::TooLarge,
            other => Self::Read(other),
        }
    }
}

/// A connection and what it remembers.
pub(super) struct Connection<'a, S> {
    pub(super) host: &'a Arc<HostHandle>,
    pub(super) sink: &'a S,
    pub(super) guard: Guard,
    pub(super) shared: &'a Shared,
    pub(super) times: Times,
    pub(super) cancel: &'a CancellationToken,
    /// The cursor it resumes from; `None` starts live.
    pub(super) resumed: Option<i64>,
    /// Seq of the last event taken.
    pub(super) last: Option<i64>,
    /// Events taken.
    pub(super) taken: u64,
    /// Events in a row with a seq that is not above the last.
    pub(super) old_in_a_row: u32,
    /// Whether the handshake was done.
    pub(super) connected: bool,
    /// Whether the host said that it no longer has all events.
    pub(super) outdated: bool,
}

impl<S: Sink> Connection<'_, S> {
    /// Connects, checks who is there, and takes events until the end.
    pub(super) async fn run(&mut self, slots: &tokio::sync::Semaphore) -> End {
        let connected = tokio::select! {
            () = self.cancel.cancelled() => return End::Cancelled,
            connected = self.connect(slots) => connected,
        };
        let mut socket = match connected {
            Ok(socket) => socket,
            Err(end) => return end,
        };
        self.connected = true;
        self.host.set_state(HostState::Connected);
        self.host.note(Contact::Connected, &"");
        if self.host.status() == HostStatus::Offline {
            self.host.set_status(HostStatus::Active);
        }
        let end = match self.take_events(&mut socket).await {
            Ok(never) => match never {},
            Err(end) => end,
        };
        // Politeness only: the connection is over either way.
        timeout(Duration::from_secs(1), socket.close()).await.ok();
        end
    }

    async fn connect(&self, slots: &tokio::sync::Semaphore) -> Result<Socket, End> {
        let _slot = slots.acquire().await.map_err(|_| End::Cancelled)?;
        let handshake = timeout(self.times.handshake, self.handshake()).await;
        let (socket, headers) =
            handshake.map_err(|_| End::HandshakeTimeout(self.times.handshake))??;
        match relay_mark(&headers) {
            Some(server) => Err(End::IsRelay(server)),
            None => Ok(socket),
        }
    }

    async fn handshake(&self) -> Result<(Socket, HeaderMap), End> {
        let host = self.host.host();
        let cursor = self
            .resumed
            .map(|seq| format!("?cursor={seq}"))
            .unwrap_or_default();
        let mut request =
            format!("{}{SUBSCRIBE_PATH}{cursor}", host.ws_url()).into_client_request()?;
        request
            .headers_mut()
            .insert(USER_AGENT, HeaderValue::from_static(PRODUCT));
        let stream = self.guard.connect(host.domain(), host.port()).await?;
        let stream = if host.tls() {
            let name = ServerName::try_from(host.domain().to_owned())
                .map_err(|error| End::Handshake(error.to_string()))?;
            let connected = TlsConnector::from(client_config()).connect(name, stream);
            let connected = connected.await;
            MaybeTlsStream::Rustls(connected.map_err(|error| End::Handshake(error.to_string()))?)
        } else {
            MaybeTlsStream::Plain(stream)
        };
        let (handshaken, response) = client_async(request, Head::new(stream)).await?;
        let (stream, unread) = handshaken.into_inner().into_parts();
        let free_bytes = self.host.progress().free_message_bytes();
        let socket = Socket::new(stream, unread, free_bytes, self.times.message);
        Ok((socket, response.into_parts().0.headers))
    }

    async fn take_events(&mut self, socket: &mut Socket) -> Result<std::convert::Infallible, End> {
        let mut pings = interval_at(
            tokio::time::Instant::now() + self.times.ping,
            self.times.ping,
        );
        pings.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut heard = Instant::now();
        // Of a long message, from its first bytes on.
        let mut room = None;
        loop {
            let message = tokio::select! {
                () = self.cancel.cancelled() => return Err(End::Cancelled),
                message = socket.next() => message?,
                _ = pings.tick() => {
                    if heard.elapsed() >= self.times.idle {
                        return Err(End::Silent(self.times.idle));
                    }
                    self.ping(socket).await?;
                    continue;
                }
            };
            match message {
                Message::Begins(bytes) => {
                    room = Some(self.hold(socket, &mut pings, bytes).await?);
                    socket.allow(bytes);
                }
                Message::Binary(frame) => {
                    let room = match room.take() {
                        Some(mut room) => {
                            self.host.take_back(room.trim(frame.len()));
                            room
                        }
                        None => self.hold(socket, &mut pings, frame.len()).await?,
                    };
                    self.take(frame, room).await?;
                }
                Message::Close => return Err(End::Closed),
                Message::Text(bytes) | Message::Pong(bytes) => {
                    self.hold_other(socket, &mut pings, bytes, room.is_some())
                        .await?;
                }
                Message::Ping(payload) => {
                    self.hold_other(socket, &mut pings, payload.len(), room.is_some())
                        .await?;
                    self.in_time(socket.pong(&payload)).await?;
                }
            }
            // After the event was taken: nothing is read while it waits, so that silence is ours.
            heard = Instant::now();
        }
    }

    async fn ping(&self, socket: &mut Socket) -> Result<(), End> {
        self.in_time(socket.ping()).await
    }

    /// Waits until something was sent, for as long as a host may take to read it.
    async fn in_time(&self, sent: impl Future<Output = io::Result<()>>) -> Result<(), End> {
        match timeout(self.times.ping, sent).await {
            Ok(sent) => sent.map_err(|error| End::Read(error.into())),
            Err(_) => Err(End::Silent(self.times.ping)),
        }
    }

    /// Waits until the host's limits and the memory let one more event of so many bytes through.
    async fn hold(
        &self,
        socket: &mut Socket,
        pings: &mut Interval,
        bytes: usize,
    ) -> Result<Room, End> {
        self.hold_back(socket, pings, Cost::Event(bytes)).await?;
        let room = self.host.progress().room(bytes);
        tokio::pin!(room);
        loop {
            tokio::select! {
                biased;
                room = &mut room => return Ok(room),
                () = self.cancel.cancelled() => return Err(End::Cancelled),
                _ = pings.tick() => self.ping(socket).await?,
            }
        }
    }

    /// Waits until the host's limits let so many bytes through that are no event; `within` a message that has memory
    /// which others need, for no longer than that message may take.
    async fn hold_other(
        &self,
        socket: &mut Socket,
        pings: &mut Interval,
        bytes: usize,
        within: bool,
    ) -> Result<(), End> {
        let held = self.hold_back(socket, pings, Cost::Other(bytes));
        if !within {
            return held.await;
        }
        let patience = self.times.message;
        timeout(patience, held)
            .await
            .map_err(|_| ReadError::Unfinished(patience))?
    }

    /// Waits until the host's limits let through what costs that much.
    async fn hold_back(
        &self,
        socket: &mut Socket,
        pings: &mut Interval,
        cost: Cost,
    ) -> Result<(), End> {
        let mut held = false;
        loop {
            let wait = match self.host.admit(cost) {
                Ok(()) => break,
                Err(wait) => wait,
            };
            held = true;
            self.host.set_state(HostState::HeldBack);
            if wait >= THROTTLED_AFTER && self.host.status() != HostStatus::Throttled {
                self.host.set_status(HostStatus::Throttled);
                if self.shared.lines.may_warn() {
                    tracing::info!(
                        host = self.host.name(),
                        ?wait,
                        "host is over its limits and held back"
                    );
                }
            }
            tokio::select! {
                () = self.cancel.cancelled() => return Err(End::Cancelled),
                () = self.host.wake.notified() => {}
                () = sleep(wait) => {}
                _ = pings.tick() => self.ping(socket).await?,
            }
        }
        if held {
            metrics().upstream_held_back.inc();
            self.host.set_state(HostState::Connected);
        }
        Ok(())
    }

    async fn take(&mut self, frame: Bytes, room: Room) -> Result<(), End> {
        match read_frame(&frame) {
            Ok(Incoming::Event(event)) => {
                return self.take_event(event, frame.clone(), room).await;
            }
            Ok(Incoming::Info { name, message }) => self.take_info(&name, &message),
            Ok(Incoming::Error { error, message }) if error == "FutureCursor" => {
                return Err(End::FutureCursor(message));
            }
            Ok(Incoming::Error { error, message }) => {
                return Err(End::ErrorFrame { error, message });
            }
            Ok(Incoming::Unknown) => metrics().upstream_ignored.inc(),
            Err(error) if error.is_malformed() => return Err(End::Malformed(error)),
            Err(error) => {
                self.host.count_drop(rule::FRAME_FIELDS, "", None, &error);
            }
        }
        Ok(())
    }

    async fn take_event(&mut self, event: Event<'_>, frame: Bytes, room: Room) -> Result<(), End> {
        if !self.is_new(event.seq) {
            let reason = "its seq is not above the connection's last";
            self.drop_event(rule::UPSTREAM_SEQ, &event, &reason);
            self.old_in_a_row += 1;
            return if self.old_in_a_row < MAX_OLD_IN_A_ROW {
                Ok(())
            } else {
                Err(End::OldSeqs)
            };
        }
        self.old_in_a_row = 0;
        let goes_back =
            self.last.is_none() && self.host.last_seq().is_some_and(|last| event.seq <= last);
        if goes_back
            || self
                .host
                .progress()
                .contradicts(event.seq, event.did, &frame)
        {
            let cursor = event.seq.saturating_sub(1);
            // Rare and large: boxed, so that the future of every event stays small. No longer than a message may take: this
            // event has memory that others need.
            let renumbered = Box::pin(self.shared.renumber(self.host, cursor, self.cancel));
            let patience = self.times.message;
            timeout(patience, renumbered)
                .await
                .map_err(|_| End::Unsettled(patience))??;
        }
        self.last = Some(event.seq);
        self.taken += 1;
        self.host.took(event.seq);
        metrics().events_received(event.kind.as_str()).inc();
        if self.host.status() != HostStatus::Active {
            self.host.set_status(HostStatus::Active);
        }
        let progress = self.host.progress();
        if progress.settle_if_durable(event.seq) {
            metrics().upstream_already_durable.inc();
            return Ok(());
        }
        if progress.cursor().is_none() && event.seq > 0 {
            let stored = Box::pin(self.store_first_cursor(event.seq - 1));
            self.cancel
                .run_until_cancelled(stored)
                .await
                .ok_or(End::Cancelled)?;
        }
        let permit = progress.begin(event.seq, room);
        let did = match Did::canonical(event.did) {
            Ok(did) => did,
            Err(error) => {
                self.drop_event(rule::DID_SYNTAX, &event, &error);
                return Ok(());
            }
        };
        let received = Received {
            host: self.host.clone(),
            seq: event.seq,
            seq_span: event.seq_span,
            kind: event.kind,
            did,
            frame: frame.clone(),
            at: Instant::now(),
            permit,
        };
        self.sink.submit(received);
        Ok(())
    }

    /// A new host has a cursor in the database before its first event goes on: a crash must not take it up live again.
    /// Where that fails the next checkpoint has it.
    async fn store_first_cursor(&self, cursor: i64) {
        let batch = Batch {
            cursors: vec![(self.host.id(), cursor)],
            ..Batch::default()
        };
        if let Err(error) = self.shared.store.apply(&batch).await {
            self.shared
                .store
                .complain("first cursors of hosts are not written yet", &error);
        }
    }

    /// Whether a seq is above the last one. The first event may be below the cursor it was resumed from: then the host
    /// numbers anew without having said so, and its own order counts from here.
    fn is_new(&self, seq: i64) -> bool {
        match (self.last, self.resumed) {
            _ if seq < 0 => false,
            (Some(last), _) => seq > last,
            (None, Some(resumed)) if seq < resumed && self.old_in_a_row == 0 => {
                if self.shared.lines.may_warn() {
                    tracing::warn!(
                        host = self.host.name(),
                        seq,
                        resumed,
                        "host numbers its events anew"
                    );
                }
                metrics().upstream_gaps.inc();
                self.host.add_gap();
                true
            }
            (None, Some(resumed)) => seq > resumed,
            (None, None) => true,
        }
    }

    fn take_info(&mut self, name: &str, text: &str) {
        if name != "OutdatedCursor" {
            tracing::debug!(host = self.host.name(), ?name, ?text, "info from host");
        } else if !std::mem::replace(&mut self.outdated, true) {
            if self.shared.lines.may_warn() {
                tracing::warn!(
                    host = self.host.name(),
                    cursor = self.resumed,
                    ?text,
                    "host no longer has all events since our cursor"
                );
            }
            metrics().upstream_gaps.inc();
            self.host.add_gap();
        }
    }

    fn drop_event(&self, rule: &'static str, event: &Event<'_>, reason: &dyn Display) {
        self.host
            .count_drop(rule, event.did, Some(event.seq), reason);
    }
}
