//! The wire form of one MST node: a strict reader that accepts exactly what the writer writes, so
//! that a node read and written again has the same CID.
//! Heights and the order of keys are checked where keys are put together, in `load`.

use thiserror::Error;

use super::MAX_KEY_LEN;
use crate::atproto::cid::{Cid, Codec};
use crate::atproto::fixed::{
    FixedReader, ShapeError, put_array, put_bytes, put_link, put_link_or_null, put_unsigned,
};

/// The node of the empty tree: `{"e": [], "l": null}`.
pub(super) const EMPTY: &[u8] = &[0xa2, 0x61, b'e', 0x80, 0x61, b'l', 0xf6];

/// What is wrong with a block that should be a node.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum NodeError {
    /// Another shape than the node schema, or not canonical CBOR.
    #[error(transparent)]
    Shape(#[from] ShapeError),
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
    block: FixedReader<'a>,
    remaining: u64,
}

impl<'a> NodeReader<'a> {
    /// Opens a node; says how many entries it claims.
    pub fn open(block: &'a [u8]) -> Result<(Self, u64), ShapeError> {
        let mut block = FixedReader::new(block);
        block.expect(&[0xa2, 0x61, b'e'])?;
        let remaining = block.array()?;
        Ok((Self { block, remaining }, remaining))
    }

    /// The next entry, `None` after the last.
    #[inline]
    pub fn entry(&mut self) -> Result<Option<WireEntry<'a>>, ShapeError> {
        if self.remaining == 0 {
            return Ok(None);
        }
        self.remaining -= 1;
        self.block.expect(&[0xa4, 0x61, b'k'])?;
        let suffix = self.block.bytes()?;
        self.block.expect(&[0x61, b'p'])?;
        let prefix_len = self.block.unsigned()?;
        self.block.expect(&[0x61, b't'])?;
        let right = self.block.structure_link_or_null()?;
        self.block.expect(&[0x61, b'v'])?;
        let value = self.block.link()?;
        Ok(Some(WireEntry {
            prefix_len,
            suffix,
            value,
            right,
        }))
    }

    /// The left subtree, which follows the last entry and ends the node.
    pub fn close(mut self) -> Result<Option<Cid>, ShapeError> {
        self.block.expect(&[0x61, b'l'])?;
        let left = self.block.structure_link_or_null()?;
        self.block.finish()?;
        Ok(left)
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
        put_array(out, entries);
        Self { out }
    }

    /// Writes an entry; `previous` is the key of the entry before, empty for the first.
    pub fn entry(&mut self, previous: &[u8], key: &[u8], value: &Cid, right: Option<&Cid>) {
        let shared = shared_prefix(previous, key);
        self.out.extend_from_slice(&[0xa4, 0x61, b'k']);
        put_bytes(self.out, &key[shared..]);
        self.out.extend_from_slice(&[0x61, b'p']);
        put_unsigned(self.out, shared as u64);
        self.out.extend_from_slice(&[0x61, b't']);
        put_link_or_null(self.out, right);
        self.out.extend_from_slice(&[0x61, b'v']);
        put_link(self.out, value);
    }

    /// Ends the node with its left subtree.
    pub fn finish(self, left: Option<&Cid>) {
        self.out.extend_from_slice(&[0x61, b'l']);
        put_link_or_null(self.out, left);
    }
}

/// How many bytes two keys have in common at their start.
fn shared_prefix(a: &[u8], b: &[u8]) -> usize {
    let words = a.chunks_exact(8).zip(b.chunks_exact(8));
    let shared = 8 * words.take_while(|(a, b)| a == b).count();
    let rest = a[shared..].iter().zip(&b[shared..]);
    shared + rest.take_while(|(a, b)| a == b).count()
}

/// The CID of a node's block.
pub(super) fn cid_of(block: &[u8]) -> Cid {
    Cid::of(Codec::DagCbor, block)
}
