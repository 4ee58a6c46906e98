//! Reading and writing objects of one fixed shape, MST nodes and commits, without a tree of values in
//! between: the bytes are compared with the only canonical DRISL-CBOR they may be.
//! For objects of any shape there is `cbor`.

use thiserror::Error;

use super::cid::{CID_BYTES, Cid, Codec};

/// CBOR major types, as the upper three bits of the initial byte (RFC 8949, section 3.1).
const UNSIGNED: u8 = 0x00;
const BYTES: u8 = 0x40;
const TEXT: u8 = 0x60;
const ARRAY: u8 = 0x80;
const MAP: u8 = 0xa0;

pub(super) const NULL: u8 = 0xf6;
/// A CID in DRISL: tag 42, 37 bytes, of which the first is zero.
const LINK_HEAD: &[u8; 5] = &[0xd8, 0x2a, 0x58, 0x25, 0x00];

/// Why bytes are not the object they should be.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum ShapeError {
    /// Another field, type or length than expected, or not canonical.
    #[error("unexpected or non-canonical data at byte {0}")]
    Unexpected(usize),
    /// A link that is no CIDv1 with SHA-256, or not to DRISL-CBOR where it has to be.
    #[error("unsupported link at byte {0}")]
    Link(usize),
    /// Bytes after the object.
    #[error("trailing bytes after the object, from byte {0}")]
    Trailing(usize),
}

/// A position in an object.
#[derive(Clone, Copy)]
pub(super) struct FixedReader<'a> {
    rest: &'a [u8],
    len: usize,
}

impl<'a> FixedReader<'a> {
    pub fn new(bytes: &'a [u8]) -> Self {
        Self {
            rest: bytes,
            len: bytes.len(),
        }
    }

    /// Bytes read so far.
    pub fn at(&self) -> usize {
        self.len - self.rest.len()
    }

    /// That nothing follows.
    pub fn finish(&self) -> Result<(), ShapeError> {
        if self.rest.is_empty() {
            Ok(())
        } else {
            Err(ShapeError::Trailing(self.at()))
        }
    }

    pub fn unexpected(&self) -> ShapeError {
        ShapeError::Unexpected(self.at())
    }

    /// Goes past these very bytes.
    #[inline]
    pub fn expect<const N: usize>(&mut self, expected: &[u8; N]) -> Result<(), ShapeError> {
        if self.skip(expected) {
            Ok(())
        } else {
            Err(self.unexpected())
        }
    }

    /// Goes past these very bytes, if they are there.
    #[inline]
    pub fn skip<const N: usize>(&mut self, expected: &[u8; N]) -> bool {
        match self.rest.split_first_chunk() {
            Some((found, rest)) if found == expected => {
                self.rest = rest;
                true
            }
            _ => false,
        }
    }

    pub fn map(&mut self) -> Result<u64, ShapeError> {
        self.head(MAP)
    }

    pub fn array(&mut self) -> Result<u64, ShapeError> {
        self.head(ARRAY)
    }

    #[inline]
    pub fn unsigned(&mut self) -> Result<u64, ShapeError> {
        self.head(UNSIGNED)
    }

    #[inline]
    pub fn bytes(&mut self) -> Result<&'a [u8], ShapeError> {
        self.string(BYTES)
    }

    pub fn text(&mut self) -> Result<&'a str, ShapeError> {
        let unexpected = self.unexpected();
        std::str::from_utf8(self.string(TEXT)?).map_err(|_| unexpected)
    }

    #[inline]
    pub fn link(&mut self) -> Result<Cid, ShapeError> {
        let at = self.at();
        self.expect(LINK_HEAD)?;
        Cid::from_bytes(self.take::<CID_BYTES>()?).map_err(|_| ShapeError::Link(at))
    }

    /// A link to another object of the repository's structure, or null.
    #[inline]
    pub fn structure_link_or_null(&mut self) -> Result<Option<Cid>, ShapeError> {
        if self.skip(&[NULL]) {
            Ok(None)
        } else {
            self.structure_link().map(Some)
        }
    }

    /// A link to another object of the repository's structure: always DRISL-CBOR.
    #[inline]
    pub fn structure_link(&mut self) -> Result<Cid, ShapeError> {
        let at = self.at();
        let link = self.link()?;
        if link.codec() == Codec::DagCbor {
            Ok(link)
        } else {
            Err(ShapeError::Link(at))
        }
    }

    #[inline]
    fn string(&mut self, major: u8) -> Result<&'a [u8], ShapeError> {
        let unexpected = self.unexpected();
        let len = usize::try_from(self.head(major)?).map_err(|_| unexpected)?;
        let (string, rest) = self.rest.split_at_checked(len).ok_or(unexpected)?;
        self.rest = rest;
        Ok(string)
    }

    /// The argument of an item of the given major type, in its shortest form.
    #[inline]
    fn head(&mut self, major: u8) -> Result<u64, ShapeError> {
        let unexpected = self.unexpected();
        let [initial] = *self.take()?;
        let (argument, least) = match initial ^ major {
            short @ 0..24 => return Ok(u64::from(short)),
            24 => (u64::from(self.take::<1>()?[0]), 24),
            25 => (u64::from(u16::from_be_bytes(*self.take()?)), 1 << 8),
            26 => (u64::from(u32::from_be_bytes(*self.take()?)), 1 << 16),
            27 => (u64::from_be_bytes(*self.take()?), 1 << 32),
            _ => return Err(unexpected),
        };
        if argument < least {
            Err(unexpected)
        } else {
            Ok(argument)
        }
    }

    #[inline]
    fn take<const N: usize>(&mut self) -> Result<&'a [u8; N], ShapeError> {
        let (taken, rest) = self
            .rest
            .split_first_chunk()
            .ok_or_else(|| self.unexpected())?;
        self.rest = rest;
        Ok(taken)
    }
}

pub(super) fn put_unsigned(out: &mut Vec<u8>, value: u64) {
    put_head(out, UNSIGNED, value);
}

pub(super) fn put_array(out: &mut Vec<u8>, len: usize) {
    put_head(out, ARRAY, len as u64);
}

pub(super) fn put_bytes(out: &mut Vec<u8>, bytes: &[u8]) {
    put_head(out, BYTES, bytes.len() as u64);
    out.extend_from_slice(bytes);
}

pub(super) fn put_text(out: &mut Vec<u8>, text: &str) {
    put_head(out, TEXT, text.len() as u64);
    out.extend_from_slice(text.as_bytes());
}

pub(super) fn put_link(out: &mut Vec<u8>, cid: &Cid) {
    let mut item = [0; LINK_HEAD.len() + CID_BYTES];
    item[..LINK_HEAD.len()].copy_from_slice(LINK_HEAD);
    item[LINK_HEAD.len()..].copy_from_slice(cid.as_bytes());
    out.extend_from_slice(&item);
}

pub(super) fn put_link_or_null(out: &mut Vec<u8>, cid: Option<&Cid>) {
    match cid {
        Some(cid) => put_link(out, cid),
        None => out.push(NULL),
    }
}

/// Writes an initial byte and its argument in the shortest form.
fn put_head(out: &mut Vec<u8>, major: u8, argument: u64) {
    match argument {
        0..24 => out.push(major | argument as u8),
        24..0x100 => out.extend_from_slice(&[major | 24, argument as u8]),
        0x100..0x1_0000 => {
            out.push(major | 25);
            out.extend_from_slice(&(argument as u16).to_be_bytes());
        }
        0x1_0000..0x1_0000_0000 => {
            out.push(major | 26);
            out.extend_from_slice(&(argument as u32).to_be_bytes());
        }
        _ => {
            out.push(major | 27);
            out.extend_from_slice(&argument.to_be_bytes());
        }
    }
}
