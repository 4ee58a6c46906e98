//! One consumer's connection, from its first frame to its last.
//! Promises whole frames in order, control frames only between them, and an end for every client that
//! does not read, does not answer or sends garbage. Backfill and live are the same loop.

use std::sync::Arc;
use std::time::Duration;

use bytes::{Buf, BytesMut};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, ReadHalf, WriteHalf};
use tokio::time::{Instant, MissedTickBehavior, interval_at, sleep, timeout};
use tokio_util::sync::CancellationToken;

use super::FirehoseOptions;
use super::client_frames::{CLOSE, ClientFrames, PING, PONG, Said, put_control};
use super::consumers::Ticket;
use super::cursor::Start;
use crate::atproto::frame::{encode_error, encode_info};
use crate::eventlog::{EventLog, ReadError, Reader, wire};
use crate::telemetry::metrics;

/// Frames gathered for one write. Large enough that system calls do not show, small enough that a
/// thousand stuck consumers hold little.
const CHUNK_BYTES: usize = 64 * 1024;
/// Bytes read from a client at a time; it has little to say.
const INBOX_BYTES: usize = 512;
/// How long a connection that is being closed may take to send the rest and to answer.
const CLOSING_TIMEOUT: Duration = Duration::from_secs(5);
/// The same while the relay goes down, which must not take long: who is slow comes back with its cursor.
const SHUTDOWN_TIMEOUT: Duration = Duration::from_millis(500);
/// Deadlines are looked at this many times per the shortest of them.
const LOOKS_PER_DEADLINE: u32 = 4;

/// Close codes of RFC 6455 section 7.4.1.
const NORMAL: u16 = 1000;
const GOING_AWAY: u16 = 1001;
const PROTOCOL_ERROR: u16 = 1002;
const POLICY: u16 = 1008;
const INTERNAL_ERROR: u16 = 1011;

/// What a session needs besides its socket.
pub(super) struct Session {
    pub log: EventLog,
    pub options: Arc<FirehoseOptions>,
    pub ticket: Ticket,
    pub closing: CancellationToken,
}

/// How a session ends.
enum End {
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
            End::Cut(reason) | End::Close { reason, .. } => reason,
            End::Closed(_) => "closed by the consumer",
        }
    }
}

impl Session {
    /// Serves a consumer until it ends.
    pub async fn run<S: AsyncRead + AsyncWrite + Send>(self, socket: S, start: Start) {
        let (incoming, outgoing) = tokio::io::split(socket);
        let info = self.ticket.info();
        tracing::debug!(id = info.id, remote = %info.remote_addr, agent = info.user_agent, ?start, "consumer connected");
        let now = Instant::now();
        let mut stream = Stream {
            incoming,
            outgoing,
            out: BytesMut::new(),
            parser: ClientFrames::default(),
            said: Vec::new(),
            pong: None,
            ping_due: false,
            progress: now,
            heard: now,
            fed: now,
        };
        let end = match self.begin(start, &mut stream.out) {
            Ok(reader) => self.serve(&mut stream, reader).await,
            Err(end) => end,
        };
        let reason = end.reason();
        stream.finish(end, &self.closing).await;
        let info = self.ticket.info();
        tracing::debug!(
            id = info.id, remote = %info.remote_addr, events = info.events, bytes = info.bytes, reason,
            "consumer gone"
        );
    }

    /// Where to read, with what must be said first.
    fn begin(&self, start: Start, out: &mut BytesMut) -> Result<Reader, End> {
        let (_, head) = self.log.window();
        match start {
            Start::At(seq) => Ok(self.log.reader(seq)),
            Start::Outdated(oldest) => {
                let message = "the cursor is older than the window, starting at the oldest event";
                put_message(out, &encode_info("OutdatedCursor", Some(message)));
                Ok(self.log.reader(oldest))
            }
            Start::Future => {
                let message = format!("the cursor is above the last event, {head}");
                Err(End::error("FutureCursor", &message))
            }
            Start::Invalid => Err(End::error(
                "InvalidRequest",
                "cursor must be a whole number",
            )),
        }
    }

    async fn serve<S>(&self, stream: &mut Stream<S>, mut reader: Reader) -> End
    where
        S: AsyncRead + AsyncWrite + Send,
    {
        let mut head = self.log.subscribe();
        let options = &self.options;
        let shortest = options
            .ping_interval
            .min(options.write_timeout)
            .min(options.idle_timeout);
        let every = (shortest / LOOKS_PER_DEADLINE).max(Duration::from_millis(1));
        let mut looks = interval_at(Instant::now() + every, every);
        looks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut pinged = Instant::now();
        let mut inbox = [0; INBOX_BYTES];
        loop {
            if stream.out.is_empty() {
                head.borrow_and_update();
                if let Err(end) = self.fill(stream, &mut reader).await {
                    return end;
                }
            }
            tokio::select! {
                read = stream.incoming.read(&mut inbox) => {
                    let count = match read {
                        Ok(0) | Err(_) => return End::Cut("connection lost"),
                        Ok(count) => count,
                    };
                    if let Err(end) = stream.hear(&inbox[..count]) {
                        return end;
                    }
                }
                written = stream.outgoing.write(&stream.out), if !stream.out.is_empty() => {
                    match written {
                        Ok(0) | Err(_) => return End::Cut("connection lost"),
                        Ok(count) => {
                            stream.out.advance(count);
                            stream.progress = Instant::now();
                            self.ticket.sent(0, count as u64);
                        }
                    }
                }
                changed = head.changed(), if stream.out.is_empty() => {
                    if changed.is_err() {
                        return End::close(GOING_AWAY, "the relay is closing");
                    }
                }
                _ = looks.tick() => {
                    if let Err(end) = stream.check_deadlines(options) {
                        return end;
                    }
                    if pinged.elapsed() >= options.ping_interval {
                        pinged = Instant::now();
                        stream.ping_due = true;
                    }
                }
                () = self.closing.cancelled() => {
                    return End::close(GOING_AWAY, "the relay is closing");
                }
            }
        }
    }

    /// Between whole frames: what is to be sent next, if anything.
    async fn fill<S>(&self, stream: &mut Stream<S>, reader: &mut Reader) -> Result<(), End> {
        if let Some(payload) = stream.pong.take() {
            put_control(&mut stream.out, PONG, &payload);
        }
        if std::mem::take(&mut stream.ping_due) {
            put_control(&mut stream.out, PING, b"");
        }
        let events = reader.events();
        while stream.out.is_empty() {
            match reader.read(&mut stream.out, CHUNK_BYTES).await {
                Ok(Some(_)) => stream.fed = Instant::now(),
                Ok(None) => {
                    // An idle consumer holds no buffer.
                    stream.out = BytesMut::new();
                    break;
                }
                Err(error) => return Err(self.end_of_reading(&error)),
            }
        }
        if !stream.out.is_empty() {
            stream.progress = Instant::now();
        }
        self.ticket.sent(reader.events() - events, 0);
        self.ticket.moved(reader.position());
        Ok(())
    }

    fn end_of_reading(&self, error: &ReadError) -> End {
        let info = self.ticket.info();
        match error {
            ReadError::TooSlow { .. } => {
                metrics().consumers_too_slow.inc();
                tracing::info!(id = info.id, remote = %info.remote_addr, "consumer fell out of the window");
                End::error("ConsumerTooSlow", &error.to_string())
            }
            ReadError::Io { .. } => {
                tracing::error!(id = info.id, %error, "a consumer cannot be served");
                End::close(INTERNAL_ERROR, "the event log cannot be read")
            }
        }
    }
}

/// The connection and what is under way on it.
struct Stream<S> {
    incoming: ReadHalf<S>,
    outgoing: WriteHalf<S>,
    /// Whole frames, less what was written of them.
    out: BytesMut,
    parser: ClientFrames,
    said: Vec<Said>,
    /// Payload of the last ping that was not answered. Earlier ones need no answer (RFC 6455
    /// section 5.5.3).
    pong: Option<Vec<u8>>,
    ping_due: bool,
    /// When something was written last, or began to wait.
    progress: Instant,
    /// When the client said something last.
    heard: Instant,
    /// When there was room for events last.
    fed: Instant,
}

impl<S: AsyncRead + AsyncWrite + Send> Stream<S> {
    /// Takes what a client sent.
    fn hear(&mut self, bytes: &[u8]) -> Result<(), End> {
        self.heard = Instant::now();
        let result = self.parser.feed(bytes, &mut self.said);
        for said in self.said.drain(..) {
            match said {
                Said::Ping(payload) => self.pong = Some(payload),
                Said::Pong => {}
                Said::Close(code) => return Err(End::Closed(code)),
            }
        }
        result.map_err(|violation| {
            tracing::debug!(%violation, "a consumer broke the WebSocket protocol");
            End::close(PROTOCOL_ERROR, "protocol error")
        })
    }

    fn check_deadlines(&self, options: &FirehoseOptions) -> Result<(), End> {
        if !self.out.is_empty() && self.progress.elapsed() >= options.write_timeout {
            return Err(End::Cut("does not read"));
        }
        // Who is slow to find our pings behind many events is not idle.
        if self.heard.max(self.fed).elapsed() >= options.idle_timeout {
            return Err(End::Cut("does not answer"));
        }
        Ok(())
    }

    /// Says the last words, within a time limit, which is shorter once `closing` is cancelled.
    async fn finish(&mut self, end: End, closing: &CancellationToken) {
        let closed = match end {
            End::Cut(_) => return,
            End::Closed(code) => {
                let code = code.unwrap_or(NORMAL);
                put_control(&mut self.out, CLOSE, &code.to_be_bytes());
                true
            }
            End::Close { code, reason, last } => {
                if let Some(last) = last {
                    put_message(&mut self.out, &last);
                }
                let payload = [&code.to_be_bytes()[..], reason.as_bytes()].concat();
                put_control(&mut self.out, CLOSE, &payload);
                false
            }
        };
        let hurried = async {
            closing.cancelled().await;
            sleep(SHUTDOWN_TIMEOUT).await;
        };
        tokio::select! {
            _ = timeout(CLOSING_TIMEOUT, self.close(closed)) => {}
            () = hurried => {}
        }
    }

    async fn close(&mut self, closed_by_client: bool) -> std::io::Result<()> {
        // Reads on meanwhile: a client that waits for us to read would never read what we say.
        let mut inbox = [0; INBOX_BYTES];
        let mut hearing = !closed_by_client;
        while !self.out.is_empty() || hearing {
            tokio::select! {
                written = self.outgoing.write(&self.out), if !self.out.is_empty() => {
                    match written? {
                        0 => return Ok(()),
                        count => self.out.advance(count),
                    }
                }
                read = self.incoming.read(&mut inbox), if hearing => {
                    let count = read?;
                    // After garbage only the end of the stream means anything.
                    let answered = matches!(self.hear(&inbox[..count]), Err(End::Closed(_)));
                    hearing = count > 0 && !answered;
                }
            }
        }
        self.outgoing.shutdown().await
    }
}

/// Appends an event-stream frame as a WebSocket message.
fn put_message(out: &mut BytesMut, frame: &[u8]) {
    let mut header = Vec::with_capacity(wire::MAX_HEADER_BYTES);
    wire::put_header(&mut header, frame.len());
    out.extend_from_slice(&header);
    out.extend_from_slice(frame);
}
