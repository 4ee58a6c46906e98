//! The wire form of one MST node: a strict reader that accepts exactly what the writer writes, so
//! that a node read and written again has the same CID.
//! Heights and the order between nodes are checked where the node's place is known, in `tree`.

use thiserror::Error;

use super::MAX_KEY_LEN;
use crate::atproto::cid::{CID_BYTES, Cid, Codec};

/// The node of the empty tree: `{"e": [], "l": null}`.
pub(super) const EMPTY: &[u8] = &[0xa2, 0x61, b'e', 0x80, 0x61, b'l', 0xf6];

/// A CID in DRISL: tag 42, 37 bytes, of which the first is zero.
const LINK_HEAD: &[u8] = &[0xd8, 0x2a, 0x58, 0x25, 0x00];
const NULL: u8 = 0xf6;

/// CBOR major types, as the upper three bits of the initial byte (RFC 8949, section 3.1).
const UNSIGNED: u8 = 0x00;
const BYTES: u8 = 0x40;
const ARRAY: u8 = 0x80;

/// What is wrong with a block that should be a node.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum NodeError {
    /// Another shape than the node schema, or not canonical CBOR.
    #[error("unexpected or non-canonical data at byte {0}")]
    Shape(usize),
    /// Bytes after the node.
    #[error("trailing bytes after the node")]
    Trailing,
    /// A link that is no CIDv1 with SHA-256, or a subtree link that is not DRISL CBOR.
    #[error("unsupported link at byte {0}")]
    Link(usize),
    /// A prefix length other than what the key really shares with the one before it.
    #[error("key prefix is not compressed as prescribed")]
    Prefix,
    /// Keys that do not ascend, inside the node or against its place in the tree.
    #[error("keys are not in ascending order")]
    Order,
    /// A key that is empty or longer than [`MAX_KEY_LEN`].
    #[error("key has {0} bytes, not 1 to {MAX_KEY_LEN}")]
    KeyLength(usize),
    /// A key that belongs to another height.
    #[error("key of height {found} in a node of height {expected}")]
    Height {
        /// The height of the node.
        expected: u8,
        /// The height of the key.
        found: u8,
    },
    /// A subtree below a node of height 0.
    #[error("a node of height 0 has a subtree")]
    BelowBottom,
    /// A node without entries that should not exist: at the top, or without a subtree.
    #[error("empty node that should have been pruned")]
    Hollow,
    /// More than [`super::MAX_NODE_ENTRIES`] entries.
    #[error("node has {0} entries")]
    TooManyEntries(u64),
}

/// One entry as it lies in the block.
pub(super) struct WireEntry<'a> {
    /// Bytes shared with the key of the entry before.
    pub prefix_len: u64,
    /// The rest of the key.
    pub suffix: &'a [u8],
    /// The record.
    pub value: Cid,
    /// The subtree to the right.
    pub right: Option<Cid>,
}

/// Reads a node entry by entry.
pub(super) struct NodeReader<'a> {
    bytes: &'a [u8],
    at: usize,
    remaining: u64,
}

impl<'a> NodeReader<'a> {
    /// Opens a node; says how many entries it claims.
    pub fn open(bytes: &'a [u8]) -> Result<(Self, u64), NodeError> {
        let mut reader = Self {
            bytes,
            at: 0,
            remaining: 0,
        };
        reader.expect(&[0xa2, 0x61, b'e'])?;
        reader.remaining = reader.head(ARRAY)?;
        let entries = reader.remaining;
        Ok((reader, entries))
    }

    /// The next entry, `None` after the last.
    pub fn entry(&mut self) -> Result<Option<WireEntry<'a>>, NodeError> {
        if self.remaining == 0 {
            return Ok(None);
        }
        self.remaining -= 1;
        self.expect(&[0xa4, 0x61, b'k'])?;
        let suffix = self.byte_string()?;
        self.expect(&[0x61, b'p'])?;
        let prefix_len = self.head(UNSIGNED)?;
        self.expect(&[0x61, b't'])?;
        let right = self.subtree()?;
        self.expect(&[0x61, b'v'])?;
        let value = self.link()?;
        Ok(Some(WireEntry {
            prefix_len,
            suffix,
            value,
            right,
        }))
    }

    /// The left subtree, which follows the last entry and ends the node.
    pub fn close(mut self) -> Result<Option<Cid>, NodeError> {
        self.expect(&[0x61, b'l'])?;
        let left = self.subtree()?;
        if self.at != self.bytes.len() {
            return Err(NodeError::Trailing);
        }
        Ok(left)
    }

    fn take(&mut self, len: usize) -> Result<&'a [u8], NodeError> {
        let taken = self
            .at
            .checked_add(len)
            .and_then(|end| self.bytes.get(self.at..end));
        let taken = taken.ok_or(NodeError::Shape(self.at))?;
        self.at += len;
        Ok(taken)
    }

    fn expect(&mut self, expected: &[u8]) -> Result<(), NodeError> {
        let at = self.at;
        if self.take(expected.len())? == expected {
            Ok(())
        } else {
            Err(NodeError::Shape(at))
        }
    }

    /// The argument of an item of the given major type, in its shortest form.
    fn head(&mut self, major: u8) -> Result<u64, NodeError> {
        let at = self.at;
        let initial = self.take(1)?[0];
        let (argument, least) = match initial ^ major {
            short @ 0..24 => return Ok(u64::from(short)),
            24 => (u64::from(self.take(1)?[0]), 24),
            25 => (self.big_endian(2)?, 1 << 8),
            26 => (self.big_endian(4)?, 1 << 16),
            27 => (self.big_endian(8)?, 1 << 32),
            _ => return Err(NodeError::Shape(at)),
        };
        if argument < least {
            Err(NodeError::Shape(at))
        } else {
            Ok(argument)
        }
    }

    fn big_endian(&mut self, len: usize) -> Result<u64, NodeError> {
        Ok(self
            .take(len)?
            .iter()
            .fold(0, |value, &byte| value << 8 | u64::from(byte)))
    }

    fn byte_string(&mut self) -> Result<&'a [u8], NodeError> {
        let at = self.at;
        let len = self.head(BYTES)?;
        self.take(usize::try_from(len).map_err(|_| NodeError::Shape(at))?)
    }

    fn link(&mut self) -> Result<Cid, NodeError> {
        let at = self.at;
        self.expect(LINK_HEAD)?;
        Cid::from_bytes(self.take(CID_BYTES)?).map_err(|_| NodeError::Link(at))
    }

    fn subtree(&mut self) -> Result<Option<Cid>, NodeError> {
        let at = self.at;
        if self.bytes.get(self.at) == Some(&NULL) {
            self.at += 1;
            return Ok(None);
        }
        let link = self.link()?;
        if link.codec() != Codec::DagCbor {
            return Err(NodeError::Link(at));
        }
        Ok(Some(link))
    }
}

/// Writes a node, entry by entry, into a buffer.
pub(super) struct NodeWriter<'b> {
    out: &'b mut Vec<u8>,
}

impl<'b> NodeWriter<'b> {
    /// Clears the buffer and begins a node of so many entries.
    pub fn begin(out: &'b mut Vec<u8>, entries: usize) -> Self {
        out.clear();
        out.extend_from_slice(&[0xa2, 0x61, b'e']);
        head(out, ARRAY, entries as u64);
        Self { out }
    }

    /// Writes an entry; `previous` is the key of the entry before, empty for the first.
    pub fn entry(&mut self, previous: &[u8], key: &[u8], value: &Cid, right: Option<&Cid>) {
        let shared = previous.iter().zip(key).take_while(|(a, b)| a == b).count();
        self.out.extend_from_slice(&[0xa4, 0x61, b'k']);
        head(self.out, BYTES, (key.len() - shared) as u64);
        self.out.extend_from_slice(&key[shared..]);
        self.out.extend_from_slice(&[0x61, b'p']);
        head(self.out, UNSIGNED, shared as u64);
        self.out.extend_from_slice(&[0x61, b't']);
        self.subtree(right);
        self.out.extend_from_slice(&[0x61, b'v']);
        self.link(value);
    }

    /// Ends the node with its left subtree.
    pub fn finish(mut self, left: Option<&Cid>) {
        self.out.extend_from_slice(&[0x61, b'l']);
        self.subtree(left);
    }

    fn subtree(&mut self, link: Option<&Cid>) {
        match link {
            Some(cid) => self.link(cid),
            None => self.out.push(NULL),
        }
    }

    fn link(&mut self, cid: &Cid) {
        self.out.extend_from_slice(LINK_HEAD);
        self.out.extend_from_slice(cid.as_bytes());
    }
}

/// Writes an initial byte and its argument in the shortest form.
fn head(out: &mut Vec<u8>, major: u8, argument: u64) {
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

/// The CID of a node's block.
pub(super) fn cid_of(block: &[u8]) -> Cid {
    Cid::of(Codec::DagCbor, block)
}
