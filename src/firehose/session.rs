//! One consumer's connection, from its first frame to its last.
//! Promises whole frames in order, control frames only between them, and an end for every client that
//! does not read, does not answer or sends garbage. Backfill and live are the same loop, and between two
//! writes it holds a position, not bytes.

use std::future::poll_fn;
use std::io;
use std::net::Shutdown;
use std::pin::pin;
use std::slice;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use bytes::{Buf, Bytes, BytesMut};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::{RecvFlags, recv};
use socket2::SockRef;
use tokio::io::{AsyncWriteExt, Interest};
use tokio::net::TcpStream;
use tokio::task::yield_now;
use tokio::time::{Instant, MissedTickBehavior, interval_at, sleep, sleep_until, timeout};
use tokio_util::sync::CancellationToken;

use super::beat::Listener;
use super::client_frames::{
    CLOSE, INBOX_BYTES, INTERNAL_ERROR, NORMAL, PING, POLICY, PONG, PROTOCOL_ERROR,
    SERVICE_RESTART, Said, put_control,
};
use super::consumers::Ticket;
use super::cursor::Start;
use super::handover::{Keeper, Kept, Under, Who};
use super::{FirehoseOptions, Limits};
use crate::atproto::frame::{encode_error, encode_info};
use crate::bucket::Allowance;
use crate::eventlog::{EventLog, Offer, ReadError, Reader, wire};
use crate::telemetry::{Cut, metrics};

/// Bytes offered to a socket at a time: less to those that took less the last time.
const MIN_WRITE_BYTES: usize = 64 << 10;
const MAX_WRITE_BYTES: usize = 256 << 10;
/// Bytes written before others have their turn.
const TURN_BYTES: usize = 2 << 20;
/// Bytes the kernel holds of what it could not send yet. Measured: more is no faster, and a thousand stuck
/// consumers hold it a thousand times.
const UNSENT_BYTES: u32 = 128 << 10;
/// How long a connection that is being closed may take to send the rest and to answer.
const CLOSING_TIMEOUT: Duration = Duration::from_secs(5);
/// The same while the relay goes down, which must not take long: who is slow comes back with its cursor.
const SHUTDOWN_TIMEOUT: Duration = Duration::from_millis(500);
/// How long the frame that is begun may take to go out before the next process is left to send the rest.
const PARKING_TIMEOUT: Duration = Duration::from_millis(300);
/// Deadlines are looked at this many times per the shortest of them.
const LOOKS_PER_DEADLINE: u32 = 4;

/// How long a client may send at once what it may send in that time.
const INPUT_BURST: Duration = Duration::from_secs(16);

/// Why most connections end.
const LOST: &str = "connection lost";

/// What a session needs besides its socket.
pub(super) struct Session {
    pub log: EventLog,
    pub options: Arc<FirehoseOptions>,
    pub limits: Arc<Limits>,
    pub ticket: Ticket,
    /// Says when there may be more to send.
    pub beat: Listener,
    pub closing: CancellationToken,
    /// Keeps the connection for the process after this one.
    pub keeper: Option<Keeper>,
}

/// How a session ends.
enum End {
    /// The next process goes on with it.
    Parked(Box<Kept>),
    /// The socket broke or is stuck: nothing more can be said.
    Cut(&'static str),
    /// The client closed.
    Closed(Option<u16>),
    /// We close, perhaps with a last message.
    Close {
        code: u16,
        reason: &'static str,
        last: Option<Vec<u8>>,
    },
}

impl End {
    fn close(code: u16, reason: &'static str) -> End {
        End::Close {
            code,
            reason,
            last: None,
        }
    }

    fn error(name: &'static str, message: &str) -> End {
        let last = Some(encode_error(name, Some(message)));
        End::Close {
            code: POLICY,
            reason: name,
            last,
        }
    }

    fn reason(&self) -> &'static str {
        match self {
            End::Parked(_) => "left to the next process",
            End::Cut(reason) | End::Close { reason, .. } => reason,
            End::Closed(_) => "closed by the consumer",
        }
    }
}

impl Session {
    /// Serves a consumer until it ends. `heard` is what it said before.
    pub async fn run(self, socket: TcpStream, heard: Bytes, start: Start) {
        let info = self.ticket.info();
        tracing::debug!(id = info.id, remote = %info.remote_addr, agent = info.user_agent, ?start, "consumer connected");
        if let Err(error) = SockRef::from(&socket).set_tcp_notsent_lowat(UNSENT_BYTES) {
            tracing::debug!(%error, "a consumer's socket holds more than it should");
        }
        let mut stream = Stream::new(socket, self.log.reader(self.first(start)));
        let begun = self
            .begin(start, &mut stream.under.out)
            .and_then(|()| stream.hear(&heard));
        if begun.is_ok() {
            stream.kept = self.keep(&stream);
        }
        self.run_stream(stream, begun).await;
    }

    /// Serves a consumer of the process before until it ends.
    pub async fn go_on(self, socket: TcpStream, reader: Reader, under: Under, kept: Kept) {
        let info = self.ticket.info();
        tracing::debug!(id = info.id, remote = %info.remote_addr, agent = info.user_agent, "consumer goes on");
        let mut stream = Stream::new(socket, reader);
        (stream.under, stream.kept) = (under, Some(kept));
        self.run_stream(stream, Ok(())).await;
    }

    async fn run_stream(mut self, mut stream: Stream, begun: Result<(), End>) {
        let end = match begun {
            Ok(()) => self.serve(&mut stream).await,
            Err(end) => end,
        };
        let reason = end.reason();
        stream.finish(end, &self).await;
        let info = self.ticket.info();
        tracing::debug!(
            id = info.id, remote = %info.remote_addr, events = info.events, bytes = info.bytes, reason,
            "consumer gone"
        );
    }

    /// Keeps the connection beyond this process, where there is a way.
    fn keep(&self, stream: &Stream) -> Option<Kept> {
        let info = self.ticket.info();
        let who = Who {
            address: info.remote_addr,
            user_agent: info.user_agent,
            connected_at: info.connected_at,
        };
        let position = stream.reader.position();
        let keeper = self.keeper.as_ref()?;
        keeper.keep(&stream.socket, &who, position, &stream.under)
    }

    /// The first event that is sent.
    fn first(&self, start: Start) -> u64 {
        match start {
            Start::At(seq) | Start::Outdated(seq) => seq,
            Start::Future | Start::Invalid => self.log.head() + 1,
        }
    }

    /// What must be said first.
    fn begin(&self, start: Start, out: &mut BytesMut) -> Result<(), End> {
        match start {
            Start::At(_) => Ok(()),
            Start::Outdated(_) => {
                let message = "the cursor is older than the window, starting at the oldest event";
                put_message(out, &encode_info("OutdatedCursor", Some(message)));
                Ok(())
            }
            Start::Future => {
                let head = self.log.head();
                let message = format!("the cursor is above the last event, {head}");
                Err(End::error("FutureCursor", &message))
            }
            Start::Invalid => Err(End::error(
                "InvalidRequest",
                "cursor must be a whole number",
            )),
        }
    }

    async fn serve(&mut self, stream: &mut Stream) -> End {
        let options = self.options.clone();
        let shortest = options
            .ping_interval
            .min(options.write_timeout)
            .min(options.idle_timeout);
        let every = (shortest / LOOKS_PER_DEADLINE).max(Duration::from_millis(1));
        let mut looks = interval_at(Instant::now() + every, every);
        looks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let closing = self.closing.clone();
        let mut closing = pin!(closing.cancelled());
        let mut pinged = Instant::now();
        loop {
            self.beat.begin();
            let pushed = match stream.push(self, Wanted::Everything).await {
                Ok(pushed) => pushed,
                Err(end) => return end,
            };
            self.beat.set_live(pushed == Pushed::Everything);
            tokio::select! {
                biased;
                () = &mut closing => return stream.park(self).await,
                _ = looks.tick() => {
                    if let Err(end) = stream.check_deadlines(&options) {
                        return end;
                    }
                    if pinged.elapsed() >= options.ping_interval {
                        pinged = Instant::now();
                        stream.ping_due = true;
                    }
                }
                said = stream.said_something() => {
                    if let Err(end) = said.and_then(|()| stream.listen(self)) {
                        return end;
                    }
                }
                writable = poll_fn(|cx| stream.socket.poll_write_ready(cx)), if pushed == Pushed::Full => {
                    if writable.is_err() {
                        return End::Cut(LOST);
                    }
                }
                changed = self.beat.changed(), if pushed == Pushed::Everything => {
                    if changed.is_err() {
                        return stream.park(self).await;
                    }
                }
                () = yield_now(), if pushed == Pushed::ItsTurn => {}
            }
        }
    }

    fn end_of_reading(&self, error: &ReadError) -> End {
        let info = self.ticket.info();
        match error {
            ReadError::TooSlow { .. } => {
                metrics().consumers_too_slow.inc();
                self.ticket.fell_out();
                tracing::info!(id = info.id, remote = %info.remote_addr, "consumer fell out of the window");
                End::error("ConsumerTooSlow", &error.to_string())
            }
            // The rest of the frame must not go out, and nothing can be said in the middle of it.
            ReadError::Redacted { .. } => End::Cut("an event was redacted while it was sent"),
            ReadError::Io { .. } => {
                tracing::error!(id = info.id, %error, "a consumer cannot be served");
                End::close(INTERNAL_ERROR, "the event log cannot be read")
            }
        }
    }
}

/// What is to be sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Wanted {
    Everything,
    /// No further event, just the rest of what was begun and our own messages.
    LastWords,
}

/// How far sending came.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Pushed {
    Everything,
    /// The socket takes no more for now.
    Full,
    /// There is more, but others have their turn.
    ItsTurn,
}

/// The connection and what is under way on it.
struct Stream {
    socket: TcpStream,
    reader: Reader,
    under: Under,
    /// Follows the connection for the next process.
    kept: Option<Kept>,
    said: Vec<Said>,
    /// What it may send.
    input: Allowance,
    ping_due: bool,
    /// Bytes to offer next.
    room: usize,
    /// The socket took nothing when it was asked last.
    full: bool,
    /// When something was written last, or began to wait.
    progress: Instant,
    /// When the client said something last.
    heard: Instant,
    /// When there was room for events last.
    fed: Instant,
}

impl Stream {
    fn new(socket: TcpStream, reader: Reader) -> Stream {
        let now = Instant::now();
        Stream {
            socket,
            reader,
            under: Under::default(),
            kept: None,
            said: Vec::new(),
            input: Allowance::new(INPUT_BURST, now),
            ping_due: false,
            room: MIN_WRITE_BYTES,
            full: false,
            progress: now,
            heard: now,
            fed: now,
        }
    }

    /// Sends until the socket is full, nothing is left, or it is others' turn.
    async fn push(&mut self, session: &Session, wanted: Wanted) -> Result<Pushed, End> {
        let events = self.reader.events();
        let mut bytes = 0;
        let pushed = loop {
            let before = bytes;
            match self
                .write(wanted)
                .map_err(|error| session.end_of_reading(&error))?
            {
                Offer::Taken(0) => return Err(End::Cut(LOST)),
                Offer::Taken(count) => bytes += count,
                Offer::Refused(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    if !self.full {
                        self.progress = Instant::now();
                    }
                    break Pushed::Full;
                }
                Offer::Refused(_) => return Err(End::Cut(LOST)),
                Offer::Nothing => break Pushed::Everything,
                Offer::Cold => {
                    let warmed = self.reader.warm(self.room).await;
                    warmed.map_err(|error| session.end_of_reading(&error))?;
                }
            }
            if bytes > before {
                self.full = false;
                if bytes >= TURN_BYTES {
                    break Pushed::ItsTurn;
                }
            }
        };
        self.full = pushed == Pushed::Full;
        if bytes > 0 {
            self.progress = Instant::now();
            let events = self.reader.events() - events;
            if events > 0 {
                self.fed = self.progress;
            }
            session.ticket.sent(events, bytes as u64);
        }
        session.ticket.moved(self.reader.position());
        self.stand();
        Ok(pushed)
    }

    /// Notes for the next process where the connection stands.
    fn stand(&mut self) {
        if let Some(kept) = &mut self.kept {
            kept.stand(&self.reader, &self.under);
        }
    }

    /// Writes once: our own messages between whole events, else events.
    fn write(&mut self, wanted: Wanted) -> Result<Offer, ReadError> {
        let inside = self.reader.is_inside_frame();
        if !inside {
            if self.under.out.is_empty() {
                self.put_controls();
            }
            if !self.under.out.is_empty() {
                return Ok(self.write_own());
            }
            if wanted == Wanted::LastWords {
                return Ok(Offer::Nothing);
            }
        }
        let waiting = self.under.pong.is_some() || self.ping_due;
        let max = match wanted {
            Wanted::Everything if !waiting => self.room,
            // The rest of the event.
            _ => 0,
        };
        // Asked first: frames that are read for nothing are the dearest part of serving many who are far apart.
        if let Err(error) = has_room(&self.socket) {
            return Ok(Offer::Refused(error));
        }
        let (mut offered, socket, kept) = (0, &self.socket, &mut self.kept);
        let (given, under) = (self.reader.given(), &self.under);
        let offer = self.reader.offer(max, |frames| {
            offered = frames.bytes();
            if let Some(kept) = kept {
                kept.note(given, frames.runs(), &under.rest());
            }
            socket.try_write_vectored(frames.slices())
        })?;
        if let Offer::Taken(taken) = offer {
            self.count(taken);
            if taken < offered {
                self.room = taken.next_power_of_two();
            } else if taken >= self.room {
                self.room *= 2;
            }
            self.room = self.room.clamp(MIN_WRITE_BYTES, MAX_WRITE_BYTES);
        }
        Ok(offer)
    }

    /// Counts what was written, for the next process.
    fn count(&mut self, bytes: usize) {
        if let Some(kept) = &mut self.kept {
            kept.sent(bytes);
        }
    }

    /// Begins the control frames that are due. Only one of each waits, however many pings a client sends that does not
    /// read.
    fn put_controls(&mut self) {
        if let Some(payload) = self.under.pong.take() {
            put_control(&mut self.under.out, PONG, &payload);
        }
        if std::mem::take(&mut self.ping_due) {
            put_control(&mut self.under.out, PING, b"");
        }
    }

    fn write_own(&mut self) -> Offer {
        if let Some(kept) = &mut self.kept {
            let next = self.reader.position()..self.reader.position();
            kept.note(0, slice::from_ref(&next), &self.under.rest());
        }
        match self.socket.try_write(&self.under.out) {
            Ok(count) => {
                self.count(count);
                self.under.out.advance(count);
                if self.under.out.is_empty() {
                    self.under.out = BytesMut::new();
                }
                Offer::Taken(count)
            }
            Err(error) => Offer::Refused(error),
        }
    }

    /// Waits until the client has said something and may be heard. One that says too much is read more slowly, and TCP
    /// carries that back to it.
    async fn said_something(&self) -> Result<(), End> {
        if let Some(turn) = self.input.next(Instant::now()) {
            sleep_until(turn).await;
        }
        let readable = poll_fn(|cx| self.socket.poll_read_ready(cx)).await;
        readable.map_err(|_| End::Cut(LOST))
    }

    /// Counts what a client sent: a read costs us as much as its bytes do.
    fn charge(&mut self, count: usize, session: &Session) {
        let (amount, now) = (count.max(INBOX_BYTES) as u64, Instant::now());
        let rate = session.limits.input.load(Ordering::Relaxed);
        self.input.spend(amount, rate, now);
        if self.input.next(now).is_some() {
            metrics().consumers_held_back.inc();
        }
    }

    /// Takes what a client sent, once the socket is said to be readable.
    fn listen(&mut self, session: &Session) -> Result<(), End> {
        let mut inbox = [0; INBOX_BYTES];
        let read = match &self.kept {
            None => self.socket.try_read(&mut inbox),
            Some(_) => self.peek(&mut inbox),
        };
        match read {
            Ok(0) => Err(End::Cut(LOST)),
            Ok(count) => {
                self.charge(count, session);
                let heard = self.hear(&inbox[..count]);
                self.settle(&mut inbox[..count])?;
                heard
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(()),
            Err(_) => Err(End::Cut(LOST)),
        }
    }

    /// Looks at what a client sent and leaves it where it is.
    fn peek(&self, inbox: &mut [u8]) -> io::Result<usize> {
        self.socket.try_io(Interest::READABLE, || {
            Ok(recv(&self.socket, inbox, RecvFlags::PEEK)?.1)
        })
    }

    /// Takes from the socket what was looked at, once it is noted what became of it.
    fn settle(&mut self, inbox: &mut [u8]) -> Result<(), End> {
        let Some(kept) = &mut self.kept else {
            return Ok(());
        };
        kept.heard(inbox.len());
        kept.stand(&self.reader, &self.under);
        let socket = &self.socket;
        let taken = socket.try_io(Interest::READABLE, || {
            Ok(recv(socket, &mut *inbox, RecvFlags::empty())?.1)
        });
        match taken {
            Ok(count) if count == inbox.len() => Ok(()),
            _ => Err(End::Cut(LOST)),
        }
    }

    /// Takes what a client said.
    fn hear(&mut self, bytes: &[u8]) -> Result<(), End> {
        self.heard = Instant::now();
        let result = self.under.parser.feed(bytes, &mut self.said);
        for said in self.said.drain(..) {
            match said {
                Said::Ping(payload) => self.under.pong = Some(payload),
                Said::Pong => {}
                Said::Close(code) => return Err(End::Closed(code)),
            }
        }
        result.map_err(|violation| {
            metrics().consumers_cut(Cut::Protocol).inc();
            tracing::debug!(%violation, "a consumer broke the WebSocket protocol");
            End::close(PROTOCOL_ERROR, "protocol error")
        })
    }

    fn check_deadlines(&self, options: &FirehoseOptions) -> Result<(), End> {
        if self.full && self.progress.elapsed() >= options.write_timeout {
            metrics().consumers_cut(Cut::Reading).inc();
            return Err(End::Cut("does not read"));
        }
        // Who is slow to find our pings behind many events is not idle.
        if self.heard.max(self.fed).elapsed() >= options.idle_timeout {
            metrics().consumers_cut(Cut::Silence).inc();
            return Err(End::Cut("does not answer"));
        }
        Ok(())
    }

    /// What becomes of the connection when the relay goes down: it is left to the next process, if there will be one, after
    /// a whole frame where the client takes it.
    async fn park(&mut self, session: &Session) -> End {
        let going = || End::close(SERVICE_RESTART, "the relay is closing");
        if !self.kept.as_ref().is_some_and(Kept::is_stored) {
            return going();
        }
        let begun = async {
            while self.push(session, Wanted::LastWords).await? == Pushed::Full {
                let writable = poll_fn(|cx| self.socket.poll_write_ready(cx)).await;
                writable.map_err(|_| End::Cut(LOST))?;
            }
            Ok(())
        };
        match timeout(PARKING_TIMEOUT, begun).await {
            Ok(Err(end)) => end,
            Ok(Ok(())) | Err(_) => {
                let kept = self.kept.take().map(Box::new);
                kept.map_or_else(going, End::Parked)
            }
        }
    }

    /// Says the last words, within a time limit, which is shorter once the relay closes.
    async fn finish(&mut self, end: End, session: &Session) {
        // From here on it would be in nobody's interest to go on. Systemd has the socket as well: what is cut must be said.
        if self.kept.take().is_some() && matches!(end, End::Cut(_)) {
            // It may have ended by itself.
            let _ = SockRef::from(&self.socket).shutdown(Shutdown::Both);
        }
        let out = &mut self.under.out;
        let closed = match end {
            End::Cut(_) => return,
            End::Parked(kept) => {
                return kept.park(!self.reader.is_inside_frame() && out.is_empty());
            }
            End::Closed(code) => {
                let code = code.unwrap_or(NORMAL);
                put_control(out, CLOSE, &code.to_be_bytes());
                true
            }
            End::Close { code, reason, last } => {
                if let Some(last) = last {
                    put_message(out, &last);
                }
                let payload = [&code.to_be_bytes()[..], reason.as_bytes()].concat();
                put_control(out, CLOSE, &payload);
                false
            }
        };
        (self.under.pong, self.ping_due) = (None, false);
        let hurried = async {
            session.closing.cancelled().await;
            sleep(SHUTDOWN_TIMEOUT).await;
        };
        tokio::select! {
            _ = timeout(CLOSING_TIMEOUT, self.close(session, closed)) => {}
            () = hurried => {}
        }
    }

    async fn close(&mut self, session: &Session, closed_by_client: bool) -> Result<(), End> {
        // Reads on meanwhile: a client that waits for us to read would never read what we say.
        let mut hearing = !closed_by_client;
        loop {
            let full = self.push(session, Wanted::LastWords).await? == Pushed::Full;
            if !full && !hearing {
                break;
            }
            tokio::select! {
                writable = poll_fn(|cx| self.socket.poll_write_ready(cx)), if full => {
                    writable.map_err(|_| End::Cut(LOST))?;
                }
                said = self.said_something(), if hearing => {
                    said?;
                    // After garbage only the end of the stream means anything.
                    match self.listen(session) {
                        Err(End::Closed(_) | End::Cut(_)) => hearing = false,
                        _ => self.under.pong = None,
                    }
                }
            }
        }
        self.socket.shutdown().await.map_err(|_| End::Cut(LOST))
    }
}

/// Fails with `WouldBlock` where the socket takes nothing now; its readiness is then awaited anew.
fn has_room(socket: &TcpStream) -> io::Result<()> {
    socket.try_io(Interest::WRITABLE, || {
        let mut asked = [PollFd::new(socket, PollFlags::OUT)];
        match poll(&mut asked, Some(&Timespec::default()))? {
            0 => Err(io::ErrorKind::WouldBlock.into()),
            _ => Ok(()),
        }
    })
}

/// Appends an event-stream frame as a WebSocket message.
fn put_message(out: &mut BytesMut, frame: &[u8]) {
    let mut header = Vec::with_capacity(wire::MAX_HEADER_BYTES);
    wire::put_header(&mut header, frame.len());
    out.extend_from_slice(&header);
    out.extend_from_slice(frame);
}
