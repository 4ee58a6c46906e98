//! The WebSocket of a host, read as its client (RFC 6455): messages come out whole. Promises to hold no more of a message
//! than it was given room for, whatever length a frame claims. Knows nothing of what messages say.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::{Buf, BufMut, Bytes, BytesMut};
use ring::rand::{SecureRandom as _, SystemRandom};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, ReadBuf};
use tokio::time::{Instant, timeout_at};

use crate::atproto::frame::MAX_FRAME_BYTES;
use crate::hosts::READ_BYTES;

/// Room in the buffer below which more is made.
const LEAST_READ_BYTES: usize = 2 * 1024;

/// Longest header of a frame that is not masked.
const MAX_HEADER_BYTES: usize = 10;

/// Fragments of a message without a byte: they cost time, and no limit counts them.
const MAX_EMPTY_FRAGMENTS: usize = 1_000;

/// Longest payload of a control frame (RFC 6455 section 5.5).
const MAX_CONTROL_BYTES: usize = 125;

const CONTINUATION: u8 = 0x0;
const TEXT: u8 = 0x1;
const BINARY: u8 = 0x2;
const CLOSE: u8 = 0x8;
const PING: u8 = 0x9;
const PONG: u8 = 0xa;

/// The close code for a normal end.
const NORMAL: u16 = 1000;

/// What a host sent.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Message {
    /// A message that is whole.
    Binary(Bytes),
    /// One begins that may have so many bytes. Nothing of it is read before [`Socket::allow`].
    Begins(usize),
    /// A text of so many bytes, which were skipped.
    Text(usize),
    Ping(Bytes),
    /// An answer of so many bytes.
    Pong(usize),
    Close,
}

/// Why nothing more can be read.
#[derive(Debug, thiserror::Error)]
pub(super) enum ReadError {
    #[error("{0}")]
    Io(#[from] io::Error),
    #[error("the connection ended without a close frame")]
    Ended,
    #[error("a message is longer than {MAX_FRAME_BYTES} bytes")]
    TooLarge,
    #[error("it does not follow the WebSocket protocol: {0}")]
    Protocol(&'static str),
    #[error("a message was not finished within {} s", .0.as_secs_f32())]
    Unfinished(Duration),
}

/// The connection. Its methods may be dropped while they wait: nothing is lost by that.
#[derive(Debug)]
pub(super) struct Socket<S> {
    stream: S,
    /// Bytes that were read and belong to no message yet.
    unread: BytesMut,
    frame: Option<Frame>,
    message: Option<Partial>,
    /// A message up to this long needs no room of its own.
    free_bytes: usize,
    /// How long a message may take from its first byte to its last.
    patience: Duration,
    /// When the present message must be whole, where it is not.
    deadline: Option<Instant>,
}

/// The frame whose payload comes next.
#[derive(Clone, Copy, Debug)]
struct Frame {
    opcode: u8,
    fin: bool,
    left: usize,
}

/// A message that came in part.
#[derive(Debug, Default)]
struct Partial {
    text: bool,
    bytes: BytesMut,
    /// Its length so far, the frame included whose payload comes next.
    length: usize,
    /// How long it may become.
    allowed: usize,
    /// Fragments that brought nothing.
    empty: usize,
}

impl<S: AsyncRead + AsyncWrite + Unpin> Socket<S> {
    /// A connection whose handshake is done; `unread` is what came behind it.
    pub(super) fn new(stream: S, unread: BytesMut, free_bytes: usize, patience: Duration) -> Self {
        Self {
            stream,
            unread,
            frame: None,
            message: None,
            free_bytes,
            patience,
            deadline: None,
        }
    }

    /// The next message.
    pub(super) async fn next(&mut self) -> Result<Message, ReadError> {
        let patience = self.patience;
        loop {
            let step = match self.step()? {
                Some(message) if self.message.is_none() => return Ok(message),
                None if self.is_at_rest() => {
                    self.deadline = None;
                    self.fill().await?;
                    continue;
                }
                step => step,
            };
            let deadline = *self
                .deadline
                .get_or_insert_with(|| Instant::now() + patience);
            // What comes between the fragments of a message does not prolong it, however long it is held back.
            if Instant::now() >= deadline {
                return Err(ReadError::Unfinished(patience));
            }
            if let Some(message) = step {
                return Ok(message);
            }
            timeout_at(deadline, self.fill())
                .await
                .map_err(|_| ReadError::Unfinished(patience))??;
        }
    }

    /// Whether nothing is begun: the next byte is the first one of a frame.
    fn is_at_rest(&self) -> bool {
        self.frame.is_none() && self.message.is_none() && self.unread.is_empty()
    }

    /// The message that begins may have so many bytes. Its time begins now.
    pub(super) fn allow(&mut self, bytes: usize) {
        self.deadline = None;
        if let Some(message) = &mut self.message {
            message.allowed = bytes;
        }
    }

    /// Sends a ping.
    pub(super) async fn ping(&mut self) -> io::Result<()> {
        self.send(PING, &[]).await
    }

    /// Answers a ping.
    pub(super) async fn pong(&mut self, payload: &[u8]) -> io::Result<()> {
        self.send(PONG, payload).await
    }

    /// Says that this is the end.
    pub(super) async fn close(&mut self) -> io::Result<()> {
        self.send(CLOSE, &NORMAL.to_be_bytes()).await?;
        self.stream.shutdown().await
    }

    /// Sends a control frame.
    async fn send(&mut self, opcode: u8, payload: &[u8]) -> io::Result<()> {
        let mut mask = [0; 4];
        SystemRandom::new()
            .fill(&mut mask)
            .map_err(|_| io::Error::other("the system gives no random bytes"))?;
        let payload = &payload[..payload.len().min(MAX_CONTROL_BYTES)];
        let mut frame = vec![0x80 | opcode, 0x80 | payload.len() as u8];
        frame.extend(mask);
        frame.extend(
            payload
                .iter()
                .zip(mask.iter().cycle())
                .map(|(byte, mask)| byte ^ mask),
        );
        self.stream.write_all(&frame).await?;
        self.stream.flush().await
    }

    /// Goes on with what was read; `None` where more must be read.
    fn step(&mut self) -> Result<Option<Message>, ReadError> {
        loop {
            let frame = match self.frame {
                Some(frame) => frame,
                None => match self.take_header()? {
                    Some(frame) => *self.frame.insert(frame),
                    None => return Ok(None),
                },
            };
            if frame.opcode & 0x8 != 0 {
                return Ok(self.take_control(frame));
            }
            if let Some(wanted) = self.wanted_room(frame) {
                return Ok(Some(Message::Begins(wanted)));
            }
            if !self.take_payload(frame) {
                return Ok(None);
            }
            self.frame = None;
            if frame.fin {
                self.deadline = None;
                return Ok(self.message.take().map(Partial::finish));
            }
        }
    }

    /// Reads a frame's header and checks it.
    fn take_header(&mut self) -> Result<Option<Frame>, ReadError> {
        let &[first, second, ..] = &self.unread[..] else {
            return Ok(None);
        };
        let (fin, opcode) = (first & 0x80 != 0, first & 0x0f);
        if first & 0x70 != 0 {
            return Err(ReadError::Protocol("reserved bits are set"));
        }
        if second & 0x80 != 0 {
            return Err(ReadError::Protocol("a server's frame is masked"));
        }
        let header_bytes = match second {
            126 => 4,
            127 => MAX_HEADER_BYTES,
            _ => 2,
        };
        let Some(header) = self.unread.get(..header_bytes) else {
            return Ok(None);
        };
        let long = &header[2..];
        let length = match long.is_empty() {
            true => u64::from(second),
            false => long
                .iter()
                .fold(0, |length, byte| length << 8 | u64::from(*byte)),
        };
        let length = usize::try_from(length).unwrap_or(usize::MAX);
        self.unread.advance(header_bytes);
        self.check(opcode, fin, length)?;
        Ok(Some(Frame {
            opcode,
            fin,
            left: length,
        }))
    }

    fn check(&mut self, opcode: u8, fin: bool, length: usize) -> Result<(), ReadError> {
        match (opcode, &mut self.message) {
            (CLOSE | PING | PONG, _) if !fin || length > MAX_CONTROL_BYTES => {
                Err(ReadError::Protocol("a control frame is too long"))
            }
            (CLOSE | PING | PONG, _) => Ok(()),
            (TEXT | BINARY, message @ None) => {
                let begun = message.insert(Partial {
                    text: opcode == TEXT,
                    allowed: self.free_bytes,
                    ..Partial::default()
                });
                begun.lengthen(length)
            }
            (CONTINUATION, Some(message)) => message.lengthen(length),
            (TEXT | BINARY | CONTINUATION, _) => {
                Err(ReadError::Protocol("fragments come out of order"))
            }
            _ => Err(ReadError::Protocol("an opcode is unknown")),
        }
    }

    fn take_control(&mut self, frame: Frame) -> Option<Message> {
        if self.unread.len() < frame.left {
            return None;
        }
        let payload = self.unread.split_to(frame.left);
        self.frame = None;
        if self.message.is_none() {
            self.deadline = None;
        }
        Some(match frame.opcode {
            PING => Message::Ping(payload.freeze()),
            PONG => Message::Pong(payload.len()),
            _ => Message::Close,
        })
    }

    /// The room that the message must be given before more of it is read.
    fn wanted_room(&self, frame: Frame) -> Option<usize> {
        let message = self.message.as_ref()?;
        if message.text || message.length <= message.allowed {
            return None;
        }
        // How long a message in fragments becomes nobody says.
        let is_known = frame.fin && message.bytes.is_empty();
        Some(if is_known {
            message.length
        } else {
            MAX_FRAME_BYTES
        })
    }

    /// Moves payload from what was read to the message. Says whether the frame is whole.
    fn take_payload(&mut self, frame: Frame) -> bool {
        let (Some(message), Some(now)) = (&mut self.message, &mut self.frame) else {
            return true;
        };
        let here = self.unread.len().min(frame.left);
        if message.text {
            self.unread.advance(here);
            now.left -= here;
            return now.left == 0;
        }
        let is_alone = frame.fin && message.bytes.is_empty();
        if is_alone && message.length <= READ_BYTES {
            if here == frame.left {
                message.bytes = self.unread.split_to(here);
                return true;
            }
            self.unread.reserve(frame.left - here);
            return false;
        }
        let missing = message.length - message.bytes.len();
        message.bytes.reserve(missing);
        message.bytes.extend_from_slice(&self.unread[..here]);
        self.unread.advance(here);
        now.left -= here;
        now.left == 0
    }

    /// Reads more, at least one byte.
    async fn fill(&mut self) -> Result<(), ReadError> {
        let read = match (&mut self.message, &mut self.frame) {
            // The rest of a long payload goes where it belongs.
            (Some(message), Some(frame))
                if self.unread.is_empty()
                    && !message.text
                    && frame.opcode & 0x8 == 0
                    && message.length > READ_BYTES =>
            {
                let mut rest = (&mut message.bytes).limit(frame.left);
                let read = self.stream.read_buf(&mut rest).await?;
                frame.left -= read;
                read
            }
            _ => {
                if self.unread.capacity() - self.unread.len() < LEAST_READ_BYTES {
                    self.unread.reserve(READ_BYTES);
                }
                self.stream.read_buf(&mut self.unread).await?
            }
        };
        if read == 0 {
            return Err(ReadError::Ended);
        }
        Ok(())
    }
}

impl Partial {
    fn lengthen(&mut self, length: usize) -> Result<(), ReadError> {
        self.length = self.length.saturating_add(length);
        if self.length > MAX_FRAME_BYTES {
            return Err(ReadError::TooLarge);
        }
        self.empty += usize::from(length == 0);
        if self.empty > MAX_EMPTY_FRAGMENTS {
            return Err(ReadError::Protocol("too many fragments are empty"));
        }
        Ok(())
    }

    fn finish(self) -> Message {
        match self.text {
            true => Message::Text(self.length),
            false => Message::Binary(self.bytes.freeze()),
        }
    }
}

/// A stream during the handshake: gives out nothing behind the end of the response's head, so that what follows is not
/// lost with whoever reads it.
#[derive(Debug)]
pub(super) struct Head<S> {
    stream: S,
    unread: BytesMut,
    /// Bytes of [`END_OF_HEAD`] that were given out last.
    matched: usize,
}

const END_OF_HEAD: &[u8; 4] = b"\r\n\r\n";

impl<S> Head<S> {
    pub(super) fn new(stream: S) -> Self {
        Self {
            stream,
            unread: BytesMut::new(),
            matched: 0,
        }
    }

    /// The stream, and what was read from it and not given out.
    pub(super) fn into_parts(self) -> (S, BytesMut) {
        (self.stream, self.unread)
    }

    /// Bytes up to the end of the head, as far as it is here.
    fn head_bytes(&mut self, at_most: usize) -> usize {
        let mut given = 0;
        for byte in self.unread.iter().take(at_most) {
            if self.matched == END_OF_HEAD.len() {
                break;
            }
            given += 1;
            self.matched = match END_OF_HEAD[self.matched] == *byte {
                true => self.matched + 1,
                false => usize::from(*byte == END_OF_HEAD[0]),
            };
        }
        given
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Head<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        out: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = &mut *self;
        if this.matched == END_OF_HEAD.len() {
            return Poll::Ready(Err(io::Error::other("the handshake is over")));
        }
        if this.unread.is_empty() {
            let mut bytes = [0; 4096];
            let mut read = ReadBuf::new(&mut bytes);
            ready!(Pin::new(&mut this.stream).poll_read(context, &mut read))?;
            this.unread.extend_from_slice(read.filled());
        }
        let given = this.head_bytes(out.remaining());
        out.put_slice(&this.unread[..given]);
        this.unread.advance(given);
        Poll::Ready(Ok(()))
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Head<S> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(context, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}

#[cfg(test)]
mod tests {
    use tokio_tungstenite::tungstenite::protocol::frame::Frame as TheirFrame;
    use tokio_tungstenite::tungstenite::protocol::frame::coding::{Data, OpCode};

    use super::*;

    /// Ends where the bytes end; takes what is written.
    struct Pieces {
        bytes: Vec<u8>,
        at: usize,
        piece: usize,
    }

    impl AsyncRead for Pieces {
        fn poll_read(
            mut self: Pin<&mut Self>,
            _: &mut Context<'_>,
            out: &mut ReadBuf<'_>,
        ) -> Poll<io::Result<()>> {
            let end = (self.at + self.piece.min(out.remaining())).min(self.bytes.len());
            out.put_slice(&self.bytes[self.at..end]);
            self.at = end;
            Poll::Ready(Ok(()))
        }
    }

    impl AsyncWrite for Pieces {
        fn poll_write(
            self: Pin<&mut Self>,
            _: &mut Context<'_>,
            bytes: &[u8],
        ) -> Poll<io::Result<usize>> {
            Poll::Ready(Ok(bytes.len()))
        }

        fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
            Poll::Ready(Ok(()))
        }

        fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
            Poll::Ready(Ok(()))
        }
    }

    fn encoded(frames: impl IntoIterator<Item = TheirFrame>) -> Vec<u8> {
        let mut bytes = Vec::new();
        for frame in frames {
            frame.format(&mut bytes).unwrap();
        }
        bytes
    }

    fn data(payload: Vec<u8>, opcode: Data, fin: bool) -> TheirFrame {
        TheirFrame::message(payload, OpCode::Data(opcode), fin)
    }

    /// All messages, each one that begins being allowed; and why it ended.
    async fn read(bytes: Vec<u8>, piece: usize) -> (Vec<Message>, ReadError) {
        let stream = Pieces {
            bytes,
            at: 0,
            piece,
        };
        let mut socket = Socket::new(stream, BytesMut::new(), 40_000, Duration::from_secs(9));
        let mut messages = Vec::new();
        loop {
            match socket.next().await {
                Ok(Message::Begins(bytes)) => {
                    socket.allow(bytes);
                    messages.push(Message::Begins(bytes));
                }
                Ok(message) => messages.push(message),
                Err(error) => return (messages, error),
            }
        }
    }

    #[tokio::test]
    async fn messages_come_out_whole_however_they_are_cut() {
        let payload = |bytes: usize| {
            (0..bytes)
                .map(|index| (index / 7) as u8)
                .collect::<Vec<_>>()
        };
        let lengths = [0, 5, 125, 126, 16_384, 16_385, 65_535, 65_536, 200_000];
        let mut frames: Vec<_> = lengths
            .map(|bytes| data(payload(bytes), Data::Binary, true))
            .into();
        frames.push(data(payload(30_000), Data::Binary, false));
        frames.push(TheirFrame::ping("within"));
        frames.push(data(payload(20_000), Data::Continue, false));
        frames.push(data(vec![], Data::Continue, true));
        frames.push(data(b"a text".repeat(20_000), Data::Text, true));
        frames.push(TheirFrame::pong("x"));
        frames.push(TheirFrame::close(None));
        let bytes = encoded(frames);
        let mut expected = Vec::new();
        for bytes in lengths {
            if bytes > 40_000 {
                expected.push(Message::Begins(bytes));
            }
            expected.push(Message::Binary(payload(bytes).into()));
        }
        let joined = [payload(30_000), payload(20_000)].concat();
        expected.extend([
            Message::Ping("within".into()),
            Message::Begins(MAX_FRAME_BYTES),
            Message::Binary(joined.into()),
            Message::Text(120_000),
            Message::Pong(1),
            Message::Close,
        ]);
        for piece in [1, 3, 700, 16_384, 100_000, 10_000_000] {
            let (messages, end) = read(bytes.clone(), piece).await;
            assert!(messages == expected, "in pieces of {piece}");
            assert!(matches!(end, ReadError::Ended));
        }
    }

    #[tokio::test]
    async fn what_is_no_websocket_ends_it() {
        let reserved = vec![0xc2, 0x00];
        let masked = vec![0x82, 0x80, 1, 2, 3, 4];
        let long_ping = vec![0x89, 0x7e, 0x00, 0x7e];
        let unknown = vec![0x83, 0x00];
        let continued = encoded([data(vec![1], Data::Continue, true)]);
        let twice = encoded([
            data(vec![1], Data::Binary, false),
            data(vec![1], Data::Binary, true),
        ]);
        let fragmented_ping = vec![0x09, 0x00];
        for bytes in [
            reserved,
            masked,
            long_ping,
            unknown,
            continued,
            twice,
            fragmented_ping,
        ] {
            let (messages, end) = read(bytes.clone(), 1).await;
            assert!(
                messages.is_empty() && matches!(end, ReadError::Protocol(_)),
                "{bytes:02x?}: {messages:?} {end}"
            );
        }
        let huge = vec![0x82, 0x7f, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff];
        assert!(matches!(read(huge, 3).await.1, ReadError::TooLarge));
        let half = data(vec![0; 2_600_000], Data::Binary, false);
        let other = data(vec![0; 2_600_000], Data::Continue, true);
        let (messages, end) = read(encoded([half, other]), 100_000).await;
        assert_eq!(messages, [Message::Begins(MAX_FRAME_BYTES)]);
        assert!(matches!(end, ReadError::TooLarge));
    }

    #[tokio::test]
    async fn nothing_behind_the_head_is_lost_with_the_handshake() {
        for piece in [1, 7, 1_000] {
            let bytes = b"HTTP/1.1 101 Fine\r\nx: \r\r\n\r\nbehind".to_vec();
            let mut head = Head::new(Pieces {
                bytes,
                at: 0,
                piece,
            });
            let mut given = Vec::new();
            while !given.ends_with(END_OF_HEAD) {
                head.read_buf(&mut given).await.unwrap();
            }
            assert!(given.ends_with(b"x: \r\r\n\r\n"));
            let (mut stream, unread) = head.into_parts();
            let mut rest = unread.to_vec();
            stream.read_to_end(&mut rest).await.unwrap();
            assert_eq!(rest, b"behind");
        }
    }
}
