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
use tokio_tungstenite::tungstenite::client::IntoClientRequest;
use tokio_tungstenite::{MaybeTlsStream, client_async};
use tokio_util::sync::CancellationToken;

use super::end::{End, MAX_OLD_IN_A_ROW};
use super::incoming::{Event, Incoming, read_frame};
use super::shared::Shared;
use super::socket::{self, Head, Message, ReadError};
use crate::atproto::did::Did;
use crate::dial::{PRODUCT, client_config, relay_mark};
use crate::hosts::{Contact, Cost, HostHandle, HostState, Received, Room, Rule};
use crate::store::{Batch, HostStatus};
use crate::verify::Pipeline;

type Socket = socket::Socket<MaybeTlsStream<TcpStream>>;

/// Where every host serves its events.
const SUBSCRIBE_PATH: &str = "/xrpc/com.atproto.sync.subscribeRepos";

/// A wait for rate limits at least this long makes the host's status `throttled`.
const THROTTLED_AFTER: Duration = Duration::from_secs(10);

/// A connection and its state.
pub(super) struct Connection<'a> {
    pub(super) host: &'a Arc<HostHandle>,
    pub(super) pipeline: &'a Pipeline,
    pub(super) shared: &'a Shared,
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
    /// Whether the host reported that it no longer has all events.
    pub(super) outdated: bool,
}

impl Connection<'_> {
    /// Connects, checks the peer, and takes events until the end.
    pub(super) async fn run(&mut self) -> End {
        let connected = tokio::select! {
            () = self.cancel.cancelled() => return End::Cancelled,
            connected = self.connect() => connected,
        };
        let mut socket = match connected {
            Ok(socket) => socket,
            Err(end) => return end,
        };
        self.connected = true;
        self.host.set_state(HostState::Connected);
        self.host.record_contact(Contact::Connected, &"");
        if self.host.status() == HostStatus::Offline {
            self.host.set_status(HostStatus::Active);
        }
        let end = match self.take_events(&mut socket).await {
            Ok(never) => match never {},
            Err(end) => end,
        };
        // A courtesy: the connection is over either way.
        timeout(Duration::from_secs(1), socket.close()).await.ok();
        end
    }

    async fn connect(&self) -> Result<Socket, End> {
        let slots = &self.shared.handshakes;
        let _slot = slots.acquire().await.map_err(|_| End::Cancelled)?;
        let limit = self.shared.times.handshake;
        let handshake = timeout(limit, self.handshake()).await;
        let (socket, headers) = handshake.map_err(|_| End::HandshakeTimeout(limit))??;
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
        let stream = self
            .shared
            .guard
            .connect(host.domain(), host.port())
            .await?;
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
        let socket = Socket::new(stream, unread, free_bytes, self.shared.times.message);
        Ok((socket, response.into_parts().0.headers))
    }

    async fn take_events(&mut self, socket: &mut Socket) -> Result<std::convert::Infallible, End> {
        let mut pings = interval_at(
            tokio::time::Instant::now() + self.shared.times.ping,
            self.shared.times.ping,
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
                    if heard.elapsed() >= self.shared.times.idle {
                        return Err(End::Silent(self.shared.times.idle));
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
        match timeout(self.shared.times.ping, sent).await {
            Ok(sent) => sent.map_err(|error| End::Read(error.into())),
            Err(_) => Err(End::Silent(self.shared.times.ping)),
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
        let patience = self.shared.times.message;
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
                if self.shared.log.may_warn() {
                    tracing::info!(
                        host = self.host.name(),
                        ?wait,
                        "host is over its limits and held back"
                    );
                }
            }
            tokio::select! {
                () = self.cancel.cancelled() => return Err(End::Cancelled),
                () = self.host.woken() => {}
                () = sleep(wait) => {}
                _ = pings.tick() => self.ping(socket).await?,
            }
        }
        if held {
            self.shared.metrics.held_back.inc();
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
            Ok(Incoming::Unknown) => self.shared.metrics.ignored.inc(),
            Err(error) if error.is_malformed() => return Err(End::Malformed(error)),
            Err(error) => {
                self.host.count_drop(Rule::FrameFields, "", None, &error);
            }
        }
        Ok(())
    }

    async fn take_event(&mut self, event: Event<'_>, frame: Bytes, room: Room) -> Result<(), End> {
        if self.renumbers(event.seq) {
            self.record_renumbering(event.seq);
        } else if !self.is_new(event.seq) {
            let reason = "its seq is not above the connection's last";
            self.drop_event(Rule::UpstreamSeq, &event, &reason);
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
            let patience = self.shared.times.message;
            timeout(patience, renumbered)
                .await
                .map_err(|_| End::Unsettled(patience))??;
        }
        self.last = Some(event.seq);
        self.taken += 1;
        self.host.count_event(event.seq);
        self.shared.metrics.received[event.kind.index()].inc();
        if self.host.status() != HostStatus::Active {
            self.host.set_status(HostStatus::Active);
        }
        let progress = self.host.progress();
        if progress.settle_if_durable(event.seq) {
            self.shared.metrics.already_durable.inc();
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
                self.drop_event(Rule::DidSyntax, &event, &error);
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
        self.pipeline.submit(received);
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

    /// Whether a seq is above the last one.
    fn is_new(&self, seq: i64) -> bool {
        seq >= 0 && self.last.or(self.resumed).is_none_or(|last| seq > last)
    }

    /// Whether the connection's first event is below the cursor it was resumed from: the host numbers its events anew
    /// without having reported it, and its own order counts from here.
    fn renumbers(&self, seq: i64) -> bool {
        let is_first = self.last.is_none() && self.old_in_a_row == 0;
        seq >= 0 && is_first && self.resumed.is_some_and(|resumed| seq < resumed)
    }

    fn record_renumbering(&self, seq: i64) {
        if self.shared.log.may_warn() {
            tracing::warn!(
                host = self.host.name(),
                seq,
                resumed = self.resumed,
                "host numbers its events anew"
            );
        }
        self.shared.metrics.gaps.inc();
        self.host.add_gap();
    }

    fn take_info(&mut self, name: &str, text: &str) {
        if name != "OutdatedCursor" {
            tracing::debug!(host = self.host.name(), ?name, ?text, "info from host");
        } else if !std::mem::replace(&mut self.outdated, true) {
            if self.shared.log.may_warn() {
                tracing::warn!(
                    host = self.host.name(),
                    cursor = self.resumed,
                    ?text,
                    "host no longer has all events since our cursor"
                );
            }
            self.shared.metrics.gaps.inc();
            self.host.add_gap();
        }
    }

    fn drop_event(&self, rule: Rule, event: &Event<'_>, reason: &dyn Display) {
        self.host
            .count_drop(rule, event.did, Some(event.seq), reason);
    }
}
