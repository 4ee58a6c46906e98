//! The Merkle Search Tree of an atproto repository, version 3: reading nodes strictly, changing full
//! and partial trees, undoing a commit's ops, proofs, and the streamable order of blocks.
//! It trusts that a block handed in under a CID hashes to that CID, and reads no records.

mod change;
mod diff;
mod invert;
mod load;
mod node;
#[cfg(test)]
mod tests;
mod tree;
mod walk;

use sha2::{Digest, Sha256};
use thiserror::Error;

use super::cid::Cid;

pub use super::fixed::ShapeError;
pub use diff::Diff;
pub use invert::{invert, read};
pub use node::NodeError;
pub use tree::Tree;
pub use walk::{NodeView, Visit, Walk};

/// Longest key: an NSID of 317 characters, `/`, a record key of 512 (NSID and record key
/// specifications).
pub const MAX_KEY_LEN: usize = 317 + 1 + 512;

/// Most entries of one node. The specification asks for a statistically unlikely bound: a key of a
/// node's height is followed by one of the same height with a chance below 3/4, so that honest nodes
/// of 300 entries would appear once in 10^37.
pub const MAX_NODE_ENTRIES: usize = 4096;

/// One record operation of a commit, with what is needed to undo it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct InvertOp<'a> {
    /// The record's path, `collection/record-key`; its syntax is not checked here.
    pub path: &'a str,
    /// What happened to the record.
    pub change: Change,
}

/// What an operation did to its record.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Change {
    /// The record is new.
    Create {
        /// The record.
        cid: Cid,
    },
    /// The record was replaced.
    Update {
        /// The record now.
        cid: Cid,
        /// The record before.
        prev: Cid,
    },
    /// The record is gone.
    Delete {
        /// The record before.
        prev: Cid,
    },
}

/// Why a tree could not be read, changed, or undone.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum MstError {
    /// A partial tree lacks a node that the operation needs.
    #[error("MST node {0} is needed, but is not among the blocks")]
    MissingNode(Cid),
    /// A block that is not a valid node at its place in the tree.
    #[error("block {cid} is not a valid MST node: {reason}")]
    BadNode {
        /// The block.
        cid: Cid,
        /// What is wrong with it.
        reason: NodeError,
    },
    /// A path that no tree can hold.
    #[error("record path has {0} bytes, not 1 to {MAX_KEY_LEN}")]
    KeyLength(usize),
    /// The record to be created, or whose deletion is to be undone, is in the tree.
    #[error("record {0} is in the tree already")]
    Exists(String),
    /// The record to be changed, or whose creation is to be undone, is not in the tree.
    #[error("record {0} is not in the tree")]
    Absent(String),
    /// The record stands in a node of another height than its path has.
    #[error("record {0} is at the wrong height of the tree")]
    Misplaced(String),
    /// The tree holds another version of the record than the operation says.
    #[error("record {path} is {found} in the tree, not {expected}")]
    Mismatch {
        /// The record's path.
        path: String,
        /// The version the operation speaks of.
        expected: Cid,
        /// The version in the tree.
        found: Cid,
    },
    /// More than 4 GiB of keys or 2^32 nodes.
    #[error("tree is too large for this machine's memory layout")]
    TooLarge,
}

/// The height of a key in the tree: leading zero bits of its SHA-256 in chunks of two, 0 to 128.
pub fn height(key: &[u8]) -> u8 {
    let digest = Sha256::digest(key);
    let mut zeros: u8 = 0;
    for byte in digest {
        // At most 128 chunks of two bits, so this never overflows.
        zeros += (byte.leading_zeros() / 2) as u8;
        if byte != 0 {
            break;
        }
    }
    zeros
}

/// The root of the tree without records: what `prevData` of a first commit stands for.
pub fn empty_root() -> Cid {
    node::cid_of(node::EMPTY)
}

fn key_text(key: &[u8]) -> String {
    String::from_utf8_lossy(key).into_owned()
}
