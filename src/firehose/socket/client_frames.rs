//! Frames that come from clients (RFC 6455 section 5): control frames, and the messages that a stream reads.
//! Promises to hold no more than one control frame and one message of the stream's limit, whatever a client sends. Messages
//! that the stream does not read are skipped without being stored.

use super::close_codes::{INVALID_TEXT, PROTOCOL_ERROR, TOO_BIG};
use super::server_frames::{CLOSE, MAX_CONTROL_BYTES, PING, PONG};
use super::stream::{Accepted, Message};

/// Longest header of a masked frame.
const MAX_HEADER_BYTES: usize = 14;

const CONTINUATION: u8 = 0x0;
const TEXT: u8 = 0x1;
const BINARY: u8 = 0x2;
/// Bit that all control frames' opcodes have.
const CONTROL: u8 = 0x8;
/// Marks an opcode in a parser's saved state, where a payload is being read.
const BODY: u8 = 0x80;

/// What a client sent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Incoming {
    /// Wants these bytes back.
    Ping(Vec<u8>),
    Pong,
    /// Closes, with the code it gave.
    Close(Option<u16>),
    /// A message that the stream reads.
    Message(Message),
}

/// How a client broke the protocol.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Violation {
    #[error("reserved bits are set")]
    ReservedBits,
    #[error("unknown opcode")]
    Opcode,
    #[error("frame is not masked")]
    NotMasked,
    #[error("length is not in its shortest form")]
    Length,
    #[error("control frame is fragmented or longer than 125 bytes")]
    Control,
    #[error("fragments out of order")]
    Fragments,
    #[error("close frame is malformed")]
    Close,
    #[error("message is longer than this stream reads")]
    TooLong,
    #[error("text message is not UTF-8")]
    Text,
}

impl Violation {
    /// The code to close with.
    pub(super) fn close_code(self) -> u16 {
        match self {
            Violation::TooLong => TOO_BIG,
            Violation::Text => INVALID_TEXT,
            _ => PROTOCOL_ERROR,
        }
    }
}

/// The parser: fed with bytes as they come.
#[derive(Debug, Default)]
pub struct ClientFrames {
    accepted: Accepted,
    header: [u8; MAX_HEADER_BYTES],
    header_len: usize,
    body: Option<Body>,
    /// A data message has begun, and its last frame has not.
    in_message: bool,
    /// The data message that is being read, where the stream reads such messages.
    message: Option<PartialMessage>,
}

/// The payload that is being read.
#[derive(Debug)]
struct Body {
    opcode: u8,
    left: u64,
    /// Of data that is stored, turned to the next byte.
    mask: [u8; 4],
    /// Payload of a control frame, unmasked.
    control: Vec<u8>,
}

/// A message that has not come as a whole.
#[derive(Debug)]
struct PartialMessage {
    is_text: bool,
    /// Unmasked.
    bytes: Vec<u8>,
}

impl ClientFrames {
    /// A parser for a stream that reads these messages.
    pub fn new(accepted: Accepted) -> ClientFrames {
        ClientFrames {
            accepted,
            ..ClientFrames::default()
        }
    }

    /// Takes bytes and reports the control frames and messages that became whole. After a violation the stream has no
    /// meaning any more.
    ///
    /// # Errors
    /// See [`Violation`].
    pub fn feed(
        &mut self,
        mut bytes: &[u8],
        incoming: &mut Vec<Incoming>,
    ) -> Result<(), Violation> {
        loop {
            if self.body.is_none() {
                let Some(body) = self.take_header(&mut bytes)? else {
                    return Ok(());
                };
                self.body = Some(body);
            }
            let Some(body) = &mut self.body else {
                return Ok(());
            };
            body.take(&mut bytes, self.message.as_mut());
            if body.left > 0 {
                return Ok(());
            }
            if let Some(body) = self.body.take() {
                incoming.extend(self.finish(body)?);
            }
        }
    }

    /// Whether nothing is begun: the next byte is the first one of a message.
    pub fn is_at_rest(&self) -> bool {
        self.header_len == 0 && self.body.is_none() && !self.in_message
    }

    /// The part of a message that was read, and whether it is text.
    pub(super) fn stored(&self) -> Option<(bool, &[u8])> {
        let message = self.message.as_ref()?;
        Some((message.is_text, &message.bytes))
    }

    /// Restores what [`ClientFrames::stored`] returned in another process; false where it cannot be of this parser.
    pub(super) fn restore(&mut self, is_text: bool, bytes: &[u8]) -> bool {
        let left = match &self.body {
            Some(body) if body.opcode & CONTROL == 0 => body.left,
            _ => 0,
        };
        let total = (bytes.len() as u64).checked_add(left);
        let fits = total.is_some_and(|total| total <= self.accepted.limit(is_text) as u64);
        self.message = Some(PartialMessage {
            is_text,
            bytes: bytes.to_vec(),
        });
        fits && !self.is_at_rest()
    }

    /// Appends what was begun, except a stored message, for another process to continue with.
    pub(super) fn put_state(&self, out: &mut Vec<u8>) {
        out.extend([u8::from(self.in_message), self.header_len as u8]);
        out.extend_from_slice(&self.header[..self.header_len]);
        let Some(body) = &self.body else {
            return out.push(0);
        };
        out.push(body.opcode | BODY);
        out.extend_from_slice(&body.left.to_le_bytes());
        out.extend_from_slice(&body.mask);
        out.push(body.control.len() as u8);
        out.extend_from_slice(&body.control);
    }

    /// Reads what [`ClientFrames::put_state`] wrote; `None` where it could not have written that.
    pub(super) fn take_state(bytes: &mut &[u8], accepted: Accepted) -> Option<ClientFrames> {
        let [in_message, header_len] = take(bytes)?;
        let begun = bytes.split_off(..usize::from(header_len))?;
        let mut parser = ClientFrames {
            in_message: in_message != 0,
            ..ClientFrames::new(accepted)
        };
        parser.header.get_mut(..begun.len())?.copy_from_slice(begun);
        parser.header_len = begun.len();
        let [opcode] = take(bytes)?;
        if opcode & BODY != 0 {
            let left = u64::from_le_bytes(take(bytes)?);
            let mask = take(bytes)?;
            let [length] = take(bytes)?;
            let control = bytes.split_off(..usize::from(length))?.to_vec();
            let opcode = opcode & !BODY;
            let is_control = opcode & CONTROL != 0;
            if is_control && control.len() as u64 + left > MAX_CONTROL_BYTES as u64 {
                return None;
            }
            parser.body = Some(Body {
                opcode,
                left,
                mask,
                control,
            });
        }
        // A header that would be whole or refused is none that was begun.
        let whole = parser.header_len > 0 && parser.wanted_header().ok()? <= parser.header_len;
        (!whole).then_some(parser)
    }

    /// Collects a header; `None` while it is not whole.
    fn take_header(&mut self, bytes: &mut &[u8]) -> Result<Option<Body>, Violation> {
        loop {
            let wanted = self.wanted_header()?;
            if self.header_len == wanted {
                self.header_len = 0;
                return self.begin(wanted).map(Some);
            }
            let Some((byte, rest)) = bytes.split_first() else {
                return Ok(None);
            };
            self.header[self.header_len] = *byte;
            self.header_len += 1;
            *bytes = rest;
        }
    }

    /// Bytes the header has, as far as its first bytes tell. Refuses what cannot become a frame.
    fn wanted_header(&self) -> Result<usize, Violation> {
        let [first, second, ..] = self.header;
        if self.header_len >= 1 {
            check_first(first)?;
        }
        if self.header_len < 2 {
            return Ok(2);
        }
        if second & 0x80 == 0 {
            return Err(Violation::NotMasked);
        }
        Ok(match second & 0x7f {
            126 => 8,
            127 => MAX_HEADER_BYTES,
            _ => 6,
        })
    }

    /// Begins the payload behind a whole header.
    fn begin(&mut self, header_len: usize) -> Result<Body, Violation> {
        let header = &self.header[..header_len];
        let (fin, opcode) = (header[0] & 0x80 != 0, header[0] & 0x0f);
        let (length, mask) = header[1..].split_at(header_len - 5);
        let left = read_length(length)?;
        let mask = [mask[0], mask[1], mask[2], mask[3]];
        if opcode & CONTROL != 0 {
            if !fin || left > MAX_CONTROL_BYTES as u64 {
                return Err(Violation::Control);
            }
        } else {
            if (opcode == CONTINUATION) != self.in_message {
                return Err(Violation::Fragments);
            }
            self.in_message = !fin;
            self.begin_data(opcode, left)?;
        }
        Ok(Body {
            opcode,
            left,
            mask,
            control: Vec::new(),
        })
    }

    /// Begins the payload of a data frame, or refuses to store it.
    fn begin_data(&mut self, opcode: u8, length: u64) -> Result<(), Violation> {
        if opcode != CONTINUATION && self.accepted.limit(opcode == TEXT) > 0 {
            self.message = Some(PartialMessage {
                is_text: opcode == TEXT,
                bytes: Vec::new(),
            });
        }
        let Some(message) = &self.message else {
            return Ok(());
        };
        let limit = self.accepted.limit(message.is_text) as u64;
        let fits = (message.bytes.len() as u64)
            .checked_add(length)
            .is_some_and(|total| total <= limit);
        fits.then_some(()).ok_or(Violation::TooLong)
    }

    /// What a payload was that came as a whole.
    fn finish(&mut self, body: Body) -> Result<Option<Incoming>, Violation> {
        Ok(match body.opcode {
            PING => Some(Incoming::Ping(body.control)),
            PONG => Some(Incoming::Pong),
            CLOSE => Some(Incoming::Close(close_code(&body.control)?)),
            // The last frame of a message.
            _ if !self.in_message => {
                let message = self.message.take().map(PartialMessage::finish);
                message.transpose()?.map(Incoming::Message)
            }
            _ => None,
        })
    }
}

/// Takes the next bytes of a parser's state.
fn take<const N: usize>(bytes: &mut &[u8]) -> Option<[u8; N]> {
    let (first, rest) = bytes.split_first_chunk()?;
    *bytes = rest;
    Some(*first)
}

fn check_first(first: u8) -> Result<(), Violation> {
    if first & 0x70 != 0 {
        return Err(Violation::ReservedBits);
    }
    match first & 0x0f {
        CONTINUATION | TEXT | BINARY | CLOSE | PING | PONG => Ok(()),
        _ => Err(Violation::Opcode),
    }
}

/// The length field: one byte (mask bit included), or that and 2 or 8 more.
fn read_length(field: &[u8]) -> Result<u64, Violation> {
    let rest = &field[1..];
    let length = rest
        .iter()
        .fold(0, |length: u64, byte| length << 8 | u64::from(*byte));
    match rest.len() {
        0 => Ok(u64::from(field[0] & 0x7f)),
        2 if length > 125 => Ok(length),
        8 if length > 0xffff && length < 1 << 63 => Ok(length),
        _ => Err(Violation::Length),
    }
}

impl Body {
    /// Consumes payload: keeps that of control frames and of a message that is stored, drops all other.
    fn take(&mut self, bytes: &mut &[u8], message: Option<&mut PartialMessage>) {
        let count = self.left.min(bytes.len() as u64) as usize;
        let (taken, rest) = bytes.split_at(count);
        if self.opcode & CONTROL != 0 {
            for byte in taken {
                let key = self.mask[self.control.len() % 4];
                self.control.push(byte ^ key);
            }
        } else if let Some(message) = message {
            let unmasked = taken.iter().zip(self.mask.iter().cycle());
            message.bytes.extend(unmasked.map(|(byte, key)| byte ^ key));
            self.mask.rotate_left(count % 4);
        }
        self.left -= count as u64;
        *bytes = rest;
    }
}

impl PartialMessage {
    fn finish(self) -> Result<Message, Violation> {
        if !self.is_text {
            return Ok(Message::Binary(self.bytes));
        }
        let text = String::from_utf8(self.bytes);
        text.map(Message::Text).map_err(|_| Violation::Text)
    }
}

/// The code of a close frame (RFC 6455 section 7.4), if it has one.
fn close_code(payload: &[u8]) -> Result<Option<u16>, Violation> {
    let Some((code, reason)) = payload.split_first_chunk::<2>() else {
        return if payload.is_empty() {
            Ok(None)
        } else {
            Err(Violation::Close)
        };
    };
    let code = u16::from_be_bytes(*code);
    let known = matches!(code, 1000..=1003 | 1007..=1014 | 3000..=4999);
    if !known || std::str::from_utf8(reason).is_err() {
        return Err(Violation::Close);
    }
    Ok(Some(code))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn client_frame(first: u8, payload: &[u8]) -> Vec<u8> {
        let mut out = vec![first];
        match payload.len() {
            length @ 0..=125 => out.push(0x80 | length as u8),
            length @ 126..=0xffff => {
                out.push(0x80 | 126);
                out.extend_from_slice(&(length as u16).to_be_bytes());
            }
            length => {
                out.push(0x80 | 127);
                out.extend_from_slice(&(length as u64).to_be_bytes());
            }
        }
        let mask = [0x12, 0x34, 0x56, 0x78];
        out.extend_from_slice(&mask);
        out.extend(
            payload
                .iter()
                .zip(mask.iter().cycle())
                .map(|(byte, key)| byte ^ key),
        );
        out
    }

    fn feed_all(bytes: &[u8], step: usize) -> Result<Vec<Incoming>, Violation> {
        feed_to(ClientFrames::default(), bytes, step)
    }

    fn feed_to(
        mut parser: ClientFrames,
        bytes: &[u8],
        step: usize,
    ) -> Result<Vec<Incoming>, Violation> {
        let mut incoming = Vec::new();
        for piece in bytes.chunks(step) {
            parser.feed(piece, &mut incoming)?;
        }
        Ok(incoming)
    }

    #[test]
    fn control_frames_come_out_whatever_the_pieces_and_the_data_between() {
        let mut bytes = client_frame(0x89, b"hello");
        bytes.extend(client_frame(0x01, &[0; 70_000]));
        bytes.extend(client_frame(0x8a, b""));
        bytes.extend(client_frame(0x00, &[1; 300]));
        bytes.extend(client_frame(0x80, b""));
        bytes.extend(client_frame(0x82, &[2; 126]));
        bytes.extend(client_frame(0x88, &1001u16.to_be_bytes()));
        let expected = vec![
            Incoming::Ping(b"hello".to_vec()),
            Incoming::Pong,
            Incoming::Close(Some(1001)),
        ];
        for step in [1, 2, 3, 7, 1000, bytes.len()] {
            assert_eq!(
                feed_all(&bytes, step),
                Ok(expected.clone()),
                "in pieces of {step}"
            );
        }
    }

    #[test]
    fn violations_are_named() {
        let cases: [(&[u8], Violation); 14] = [
            (&[0xc2], Violation::ReservedBits),
            (&[0x83], Violation::Opcode),
            (&[0x8b], Violation::Opcode),
            (&[0x82, 0x00], Violation::NotMasked),
            (b"GET / HTTP/1.1", Violation::ReservedBits),
            (&[0x82, 0xfe, 0, 125, 0, 0, 0, 0], Violation::Length),
            (
                &[0x82, 0xff, 0, 0, 0, 0, 0, 0, 0xff, 0xff, 0, 0, 0, 0],
                Violation::Length,
            ),
            (
                &[0x82, 0xff, 0x80, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0],
                Violation::Length,
            ),
            (&[0x09, 0x80, 0, 0, 0, 0], Violation::Control),
            (&[0x89, 0xfe, 0, 126, 0, 0, 0, 0], Violation::Control),
            (&[0x80, 0x80, 0, 0, 0, 0], Violation::Fragments),
            (
                &[0x02, 0x80, 0, 0, 0, 0, 0x82, 0x80, 0, 0, 0, 0],
                Violation::Fragments,
            ),
            (&[0x88, 0x81, 0, 0, 0, 0, 3], Violation::Close),
            (&[0x88, 0x82, 0, 0, 0, 0, 0x03, 0xed], Violation::Close),
        ];
        for (bytes, violation) in cases {
            assert_eq!(feed_all(bytes, bytes.len()), Err(violation), "{bytes:x?}");
            assert_eq!(
                feed_all(bytes, 1),
                Err(violation),
                "{bytes:x?} byte by byte"
            );
        }
    }

    const SHORT_TEXTS: Accepted = Accepted {
        max_text_bytes: 20,
        max_binary_bytes: 0,
    };

    #[test]
    fn messages_that_a_stream_reads_come_out_whole_and_others_are_skipped() {
        let mut bytes = client_frame(0x81, "grüße".as_bytes());
        bytes.extend(client_frame(0x82, &[7; 3000]));
        bytes.extend(client_frame(0x01, b"in "));
        bytes.extend(client_frame(0x89, b"between"));
        bytes.extend(client_frame(0x00, b""));
        bytes.extend(client_frame(0x80, b"three pieces"));
        bytes.extend(client_frame(0x02, &[7; 30]));
        bytes.extend(client_frame(0x80, &[7; 30]));
        bytes.extend(client_frame(0x81, b""));
        let text = |text: &str| Incoming::Message(Message::Text(text.to_owned()));
        let expected = vec![
            text("grüße"),
            Incoming::Ping(b"between".to_vec()),
            text("in three pieces"),
            text(""),
        ];
        for step in [1, 2, 3, 7, 1000, bytes.len()] {
            let parser = ClientFrames::new(SHORT_TEXTS);
            assert_eq!(feed_to(parser, &bytes, step), Ok(expected.clone()));
        }
    }

    #[test]
    fn messages_beyond_the_limit_are_refused_before_they_are_stored() {
        let header_of_a_long_text = &client_frame(0x81, &[b'x'; 21])[..6];
        let in_pieces = [client_frame(0x01, &[b'x'; 20]), client_frame(0x80, b"x")].concat();
        let largest = [0x81, 0xff, 0x7f, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff];
        let not_utf_8 = client_frame(0x81, &[0xc3, 0x28]);
        let cases: [(&[u8], Violation, u16); 4] = [
            (header_of_a_long_text, Violation::TooLong, 1009),
            (&in_pieces, Violation::TooLong, 1009),
            (&[&largest[..], &[0; 4]].concat(), Violation::TooLong, 1009),
            (&not_utf_8, Violation::Text, 1007),
        ];
        for (bytes, violation, code) in cases {
            let result = feed_to(ClientFrames::new(SHORT_TEXTS), bytes, 3);
            assert_eq!(result, Err(violation), "{bytes:x?}");
            assert_eq!(violation.close_code(), code);
        }
    }

    proptest! {
        #[test]
        fn garbage_never_panics_and_pieces_do_not_matter(bytes: Vec<u8>, step in 1usize..40) {
            prop_assert_eq!(feed_all(&bytes, step), feed_all(&bytes, bytes.len().max(1)));
        }

        #[test]
        fn another_parser_goes_on_anywhere(
            payload in proptest::collection::vec(any::<u8>(), 0..=125),
            data in proptest::collection::vec(any::<u8>(), 0..300),
            cut: proptest::sample::Index,
            garbage: Vec<u8>,
        ) {
            let mut bytes = client_frame(0x02, &data);
            bytes.extend(client_frame(0x89, &payload));
            bytes.extend(client_frame(0x80, &data));
            bytes.extend(client_frame(0x8a, &payload));
            let (before, behind) = bytes.split_at(cut.index(bytes.len()));
            let (mut incoming, mut parser) = (Vec::new(), ClientFrames::default());
            parser.feed(before, &mut incoming).expect("a good beginning");
            let mut state = Vec::new();
            parser.put_state(&mut state);
            prop_assert!(!parser.is_at_rest() || state == [0, 0, 0]);
            let mut rest = &state[..];
            let taken = ClientFrames::take_state(&mut rest, Accepted::NONE);
            let mut parser = taken.expect("a state");
            prop_assert!(rest.is_empty());
            parser.feed(behind, &mut incoming).expect("a good end");
            prop_assert_eq!(incoming, [Incoming::Ping(payload), Incoming::Pong]);
            prop_assert!(parser.is_at_rest());
            // Damaged ones may mean something else, but never a panic.
            if let Some(mut parser) = ClientFrames::take_state(&mut &garbage[..], Accepted::NONE) {
                let _ = parser.feed(behind, &mut Vec::new());
            }
        }

        #[test]
        fn pings_come_back_whole(payload in proptest::collection::vec(any::<u8>(), 0..=125)) {
            let incoming = feed_all(&client_frame(0x89, &payload), 3);
            prop_assert_eq!(incoming, Ok(vec![Incoming::Ping(payload)]));
        }
    }
}
