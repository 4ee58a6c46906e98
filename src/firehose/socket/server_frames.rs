//! WebSocket frames that we write by ourselves (RFC 6455 section 5): control frames, and messages beside the events.
//! Promises unmasked, unfragmented frames with minimal lengths. Events come as whole frames from their source.

use bytes::BufMut;

use super::stream::Message;
use crate::eventlog::wire;

/// Longest payload of a control frame (RFC 6455 section 5.5).
pub(super) const MAX_CONTROL_BYTES: usize = 125;

pub(super) const CLOSE: u8 = 0x8;
pub(super) const PING: u8 = 0x9;
pub(super) const PONG: u8 = 0xa;
/// FIN bit of a frame's first byte.
const FIN: u8 = 0x80;
const TEXT: u8 = 0x1;

/// Appends a control frame. Longer payloads are cut to what fits.
pub(super) fn put_control(out: &mut impl BufMut, opcode: u8, payload: &[u8]) {
    let payload = &payload[..payload.len().min(MAX_CONTROL_BYTES)];
    out.put_u8(FIN | opcode);
    out.put_u8(payload.len() as u8);
    out.put_slice(payload);
}

/// Appends a close frame.
pub(super) fn put_close(out: &mut impl BufMut, code: u16, reason: &str) {
    let payload = [&code.to_be_bytes()[..], reason.as_bytes()].concat();
    put_control(out, CLOSE, &payload);
}

/// Appends a message.
pub(super) fn put_message(out: &mut impl BufMut, message: &Message) {
    let payload = match message {
        Message::Text(text) => text.as_bytes(),
        Message::Binary(bytes) => bytes,
    };
    let mut header = Vec::with_capacity(wire::MAX_HEADER_BYTES);
    wire::put_header(&mut header, payload.len());
    if let Message::Text(_) = message {
        header[0] = FIN | TEXT;
    }
    out.put_slice(&header);
    out.put_slice(payload);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_have_the_form_of_rfc_6455() {
        let mut out = Vec::new();
        put_message(&mut out, &Message::Text("Hello".into()));
        put_control(&mut out, PONG, b"Hello");
        put_close(&mut out, 1001, "bye");
        // Section 5.7, unmasked.
        let text = [0x81, 0x05, 0x48, 0x65, 0x6c, 0x6c, 0x6f];
        let pong = [0x8a, 0x05, 0x48, 0x65, 0x6c, 0x6c, 0x6f];
        let close = [0x88, 0x05, 0x03, 0xe9, b'b', b'y', b'e'];
        assert_eq!(out, [&text[..], &pong, &close].concat());
        out.clear();
        put_message(&mut out, &Message::Binary(vec![7; 256]));
        assert_eq!(out[..5], [0x82, 0x7e, 0x01, 0x00, 7]);
        out.clear();
        put_control(&mut out, PING, &[1; 200]);
        assert_eq!((out[1], out.len()), (125, 127));
    }
}
