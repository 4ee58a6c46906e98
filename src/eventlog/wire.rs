//! Headers of server-side WebSocket frames (RFC 6455 section 5.2), as segments hold them.
//! Promises exact, minimal lengths and no mask; control frames and frames from clients live in the
//! firehose.

/// Longest header in front of a payload: two bytes and a 64-bit length.
pub const MAX_HEADER_BYTES: usize = 10;
/// First byte of an unfragmented binary message.
const FIN_BINARY: u8 = 0x82;
/// Length field that announces a 16-bit length.
const LENGTH_16: u8 = 126;
/// Length field that announces a 64-bit length.
const LENGTH_64: u8 = 127;

/// Appends the header of a binary message of `payload` bytes.
pub fn put_header(out: &mut Vec<u8>, payload: usize) {
    out.push(FIN_BINARY);
    match payload {
        0..=125 => out.push(payload as u8),
        126..=0xffff => {
            out.push(LENGTH_16);
            out.extend_from_slice(&(payload as u16).to_be_bytes());
        }
        _ => {
            out.push(LENGTH_64);
            out.extend_from_slice(&(payload as u64).to_be_bytes());
        }
    }
}

/// Length in bytes of the header that [`put_header`] writes for a payload.
pub fn header_len(payload: usize) -> usize {
    match payload {
        0..=125 => 2,
        126..=0xffff => 4,
        _ => MAX_HEADER_BYTES,
    }
}

/// Reads the header of a whole binary message: (header bytes, payload bytes).
/// `None` where the bytes are not a header that [`put_header`] could have written.
pub fn read_header(bytes: &[u8]) -> Option<(usize, u64)> {
    if *bytes.first()? != FIN_BINARY {
        return None;
    }
    match *bytes.get(1)? {
        short @ 0..=125 => Some((2, u64::from(short))),
        LENGTH_16 => {
            let length = u16::from_be_bytes(bytes.get(2..4)?.try_into().ok()?);
            (length > 125).then_some((4, u64::from(length)))
        }
        LENGTH_64 => {
            let length = u64::from_be_bytes(bytes.get(2..10)?.try_into().ok()?);
            (length > 0xffff && length < 1 << 63).then_some((MAX_HEADER_BYTES, length))
        }
        _ => None,
    }
}

/// The payload of one stored frame: the bytes behind its header.
pub fn payload(frame: &[u8]) -> Option<&[u8]> {
    let (header, length) = read_header(frame)?;
    let body = frame.get(header..)?;
    (body.len() as u64 == length).then_some(body)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn headers_of_every_length_class_read_back() {
        for length in [0, 1, 125, 126, 127, 0xffff, 0x1_0000, 5_000_000] {
            let mut out = Vec::new();
            put_header(&mut out, length);
            assert_eq!(out.len(), header_len(length));
            assert_eq!(read_header(&out), Some((out.len(), length as u64)));
            for cut in 0..out.len() {
                assert_eq!(read_header(&out[..cut]), None, "{length} cut at {cut}");
            }
        }
    }

    #[test]
    fn foreign_and_wasteful_headers_are_refused() {
        let cases: [&[u8]; 6] = [
            &[0x81, 1, 0],
            &[0x02, 1, 0],
            &[0x82, 0x81, 0, 0, 0, 0],
            &[0x82, 126, 0, 125],
            &[0x82, 127, 0, 0, 0, 0, 0, 0, 0xff, 0xff],
            &[0x82, 127, 0x80, 0, 0, 0, 0, 1, 0, 0],
        ];
        for bytes in cases {
            assert_eq!(read_header(bytes), None, "{bytes:x?}");
        }
    }
}
