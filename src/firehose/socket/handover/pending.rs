//! Partially sent control frames and partially parsed client input of a connection, and how a slot stores them.
//! Promises an empty encoding where nothing is pending, so that notes of most writes are short.
//!
//! The encoding: the parser's state, the pong that is due, our own frames that were begun. In front of that stand the state
//! of a source that has one, and a client message that has not come as a whole, behind a mark that releases before it refuse:
//! they close such a connection.

use bytes::{Buf, BytesMut};

use super::table::MAX_PENDING_BYTES;
use crate::firehose::socket::client_frames::ClientFrames;
use crate::firehose::socket::server_frames::MAX_CONTROL_BYTES;
use crate::firehose::socket::stream::{Accepted, Source};

/// Room for our own frames beside the parser's state and a pong: more than any of them takes. Closing frames are not stored.
const MAX_OWN_BYTES: usize = MAX_PENDING_BYTES - 3 * (MAX_CONTROL_BYTES + 16);

/// The first two bytes where more than the connection's frames is pending: no parser has begun a header of 255 bytes.
const EXTENDED: [u8; 2] = [0, 0xff];

/// What is pending on a connection beside events.
#[derive(Debug, Default)]
pub(in super::super) struct PendingControl {
    pub parser: ClientFrames,
    /// The payload of the pong that is due.
    pub pong: Option<Vec<u8>>,
    /// Our own frames that were begun.
    pub out: BytesMut,
}

impl PendingControl {
    /// Nothing is pending, for a stream that reads these messages.
    pub fn new(accepted: Accepted) -> PendingControl {
        PendingControl {
            parser: ClientFrames::new(accepted),
            ..PendingControl::default()
        }
    }

    /// What a slot stores of it and of the source.
    pub fn encode(&self, source: &impl Source) -> Vec<u8> {
        let mut encoded = Vec::new();
        source.put_state(&mut encoded);
        if !encoded.is_empty() || self.parser.stored().is_some() {
            self.extend(&mut encoded);
        } else if self.pong.is_none() && self.out.is_empty() && self.parser.is_at_rest() {
            return encoded;
        }
        self.parser.put_state(&mut encoded);
        match &self.pong {
            None => encoded.push(0),
            Some(payload) => {
                encoded.push(payload.len() as u8 + 1);
                encoded.extend_from_slice(payload);
            }
        }
        debug_assert!(self.out.len() <= MAX_OWN_BYTES);
        encoded.extend_from_slice(&self.out);
        encoded
    }

    /// Puts the mark and the length in front of a source's state, and a stored message behind it. What is too long for its
    /// length is too long for a slot.
    fn extend(&self, state: &mut Vec<u8>) {
        let length = (state.len() as u16).to_le_bytes();
        state.splice(..0, EXTENDED.into_iter().chain(length));
        match self.parser.stored() {
            None => state.push(0),
            Some((is_text, message)) => {
                state.push(1 + u8::from(is_text));
                state.extend((message.len() as u16).to_le_bytes());
                state.extend_from_slice(message);
            }
        }
    }

    /// Takes bytes that were sent after the note from our own frames, and returns how many of them were events. A write is
    /// either of our own frames or of events; `None` where more was sent than our own frames.
    pub fn advance(&mut self, sent: u64) -> Option<u64> {
        if self.out.is_empty() {
            return Some(sent);
        }
        let sent = usize::try_from(sent).ok()?;
        if sent > self.out.len() {
            return None;
        }
        self.out.advance(sent);
        Some(0)
    }

    /// Reads what [`PendingControl::encode`] wrote, with the source's state; `None` where it could not have written that.
    pub fn decode(mut encoded: &[u8], accepted: Accepted) -> Option<(PendingControl, &[u8])> {
        if encoded.is_empty() {
            return Some((PendingControl::new(accepted), encoded));
        }
        let (state, message) = match encoded.strip_prefix(&EXTENDED) {
            None => (&encoded[..0], None),
            Some(extended) => {
                encoded = extended;
                let state = take_sized(&mut encoded)?;
                let kind = *encoded.split_off_first()?;
                let message = match kind {
                    0 => None,
                    1 | 2 => Some((kind == 2, take_sized(&mut encoded)?)),
                    _ => return None,
                };
                (state, message)
            }
        };
        let mut parser = ClientFrames::take_state(&mut encoded, accepted)?;
        if let Some((is_text, bytes)) = message
            && !parser.restore(is_text, bytes)
        {
            return None;
        }
        let pong = match usize::from(*encoded.split_off_first()?).checked_sub(1) {
            None => None,
            Some(length) if length <= MAX_CONTROL_BYTES => {
                Some(encoded.split_off(..length)?.to_vec())
            }
            Some(_) => return None,
        };
        let pending = PendingControl {
            parser,
            pong,
            out: BytesMut::from(encoded),
        };
        Some((pending, state))
    }
}

/// Takes bytes behind their length.
fn take_sized<'a>(bytes: &mut &'a [u8]) -> Option<&'a [u8]> {
    let length = bytes.split_off(..2)?.try_into().ok()?;
    bytes.split_off(..usize::from(u16::from_le_bytes(length)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::firehose::socket::client_frames::Incoming;
    use crate::firehose::socket::stream::{Batch, Message, Offer, SourceError};
    use std::io;

    const TEXTS: Accepted = Accepted {
        max_text_bytes: 100,
        max_binary_bytes: 0,
    };

    /// A source with nothing but a state.
    struct Stateful(&'static [u8]);

    impl Source for Stateful {
        const ACCEPTED: Accepted = TEXTS;

        fn position(&self) -> u64 {
            1
        }

        fn offset(&self) -> usize {
            0
        }

        fn events(&self) -> u64 {
            0
        }

        fn offer(
            &mut self,
            _: usize,
            _: impl FnOnce(Batch<'_>) -> io::Result<usize>,
        ) -> Result<Offer, SourceError> {
            Ok(Offer::Nothing)
        }

        async fn warm(&mut self, _: usize) -> Result<(), SourceError> {
            Ok(())
        }

        fn put_state(&self, out: &mut Vec<u8>) {
            out.extend_from_slice(self.0);
        }
    }

    #[test]
    fn the_encoding_of_a_stream_without_state_is_that_of_version_1() {
        let mut pending = PendingControl::default();
        assert_eq!(pending.encode(&Stateful(b"")), b"");
        // Three bytes of a ping's header.
        let fed = pending.parser.feed(&[0x89, 0x85, 1], &mut Vec::new());
        fed.expect("a good beginning");
        pending.pong = Some(b"ab".to_vec());
        pending.out.extend_from_slice(&[0x89, 0]);
        let expected = [0, 3, 0x89, 0x85, 1, 0, 3, b'a', b'b', 0x89, 0];
        assert_eq!(pending.encode(&Stateful(b"")), expected);
        let (read, state) = PendingControl::decode(&expected, Accepted::NONE).expect("a state");
        assert_eq!(state, b"");
        assert_eq!((read.pong, &read.out[..]), (pending.pong, &[0x89, 0][..]));
    }

    #[test]
    fn a_state_and_a_message_survive_at_every_byte() {
        let mask = [0, 0, 0, 0];
        let mut bytes = [&[0x01, 0x84][..], &mask, b"half"].concat();
        bytes.extend([&[0x80, 0x85][..], &mask, b" done"].concat());
        bytes.extend([&[0x89, 0x80][..], &mask].concat());
        let expected = [
            Incoming::Message(Message::Text("half done".into())),
            Incoming::Ping(Vec::new()),
        ];
        for source in [Stateful(b""), Stateful(b"since 7")] {
            for cut in 0..=bytes.len() {
                let (mut incoming, mut before) = (Vec::new(), PendingControl::new(TEXTS));
                let fed = before.parser.feed(&bytes[..cut], &mut incoming);
                fed.expect("a good beginning");
                let encoded = before.encode(&source);
                let decoded = PendingControl::decode(&encoded, TEXTS);
                let (mut after, state) = decoded.expect("a state");
                assert_eq!(state, source.0, "cut at {cut}");
                let fed = after.parser.feed(&bytes[cut..], &mut incoming);
                fed.expect("a good end");
                assert_eq!(incoming, expected, "cut at {cut}");
            }
        }
    }

    #[test]
    fn what_an_earlier_release_does_not_know_it_refuses() {
        let encoded = PendingControl::default().encode(&Stateful(b"since 7"));
        // It began with the parser's state.
        let parser = ClientFrames::take_state(&mut &encoded[..], Accepted::NONE);
        assert!(parser.is_none());
    }

    proptest::proptest! {
        #[test]
        fn garbage_never_panics(garbage: Vec<u8>, extended: bool) {
            let encoded = [&EXTENDED[..usize::from(extended) * 2], &garbage].concat();
            if let Some((mut pending, _)) = PendingControl::decode(&encoded, TEXTS) {
                let _ = pending.parser.feed(&garbage, &mut Vec::new());
            }
        }
    }
}
