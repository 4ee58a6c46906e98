//! Undoing a commit's ops on the partial tree that came with it: if they are the whole truth, the
//! root before the commit comes out (sync specification, "operation inversion").
//! Comparing that root with `prevData` is the caller's.

use super::load::{Blocks, Heights, Source};
use super::tree::{Child, Link, Tree};
use super::{Change, InvertOp, MstError, height, key_text};
use crate::atproto::cid::Cid;

/// The root before `ops`, from the root after them and the blocks of the commit. Only the nodes that
/// the ops touch are read and hashed. The blocks must be known to hash to their CIDs.
///
/// The ops are undone in reverse order. Where a node is missing for that, and no path comes twice,
/// deleted records are put back first, in the order of their paths: the order in which the reference
/// relay does it, and which some hosts choose their blocks for. Both give the same root.
///
/// Only the paths of the ops, and the first keys of both roots, are hashed to see whether they stand
/// at their height. That suffices: all other records stay in nodes of the height they were in, so that
/// with one at a wrong height, another root comes out or the tree before was malformed already.
///
/// # Errors
/// [`MstError::Absent`], [`MstError::Exists`], [`MstError::Misplaced`] and [`MstError::Mismatch`] where an op contradicts the
/// tree, [`MstError::MissingNode`] where the blocks do not suffice, [`MstError::BadNode`] for a
/// malformed node, [`MstError::KeyLength`] for an impossible path.
pub fn invert<'a>(
    ops: &[InvertOp<'_>],
    root: Cid,
    blocks: impl Fn(&Cid) -> Option<&'a [u8]>,
) -> Result<Cid, MstError> {
    let source = Blocks {
        lookup: blocks,
        heights: Heights::Top,
    };
    let start = Child::Link(Link::to(root));
    let mut tree = Tree::rooted(start);
    let missing = match tree.undo(&source, ops.iter().rev()) {
        Ok(()) => return tree.settle(),
        Err(missing @ MstError::MissingNode(_)) => missing,
        Err(error) => return Err(error),
    };
    let ops = put_back_first(ops).ok_or_else(|| missing.clone())?;
    let mut tree = Tree::rooted(start);
    match tree.undo(&source, ops.into_iter()) {
        Ok(()) => tree.settle(),
        Err(_) => Err(missing),
    }
}

/// The record at a path, proven by blocks: `None` when they prove that there is none.
///
/// # Errors
/// [`MstError::MissingNode`] where the blocks prove neither, [`MstError::BadNode`] for a malformed
/// node, [`MstError::KeyLength`] for an impossible path.
pub fn read<'a>(
    path: &[u8],
    root: Cid,
    blocks: impl Fn(&Cid) -> Option<&'a [u8]>,
) -> Result<Option<Cid>, MstError> {
    let source = Blocks {
        lookup: blocks,
        heights: Heights::All,
    };
    Tree::rooted(Child::Link(Link::to(root))).value_from(&source, path)
}

/// The ops with deletions first and otherwise by path; `None` when a path comes twice, as then only
/// the given order has a meaning.
pub(super) fn put_back_first<'o, 'a>(ops: &'o [InvertOp<'a>]) -> Option<Vec<&'o InvertOp<'a>>> {
    let mut ordered: Vec<_> = ops.iter().collect();
    ordered.sort_unstable_by_key(|op| op.path);
    if ordered.windows(2).any(|pair| pair[0].path == pair[1].path) {
        return None;
    }
    ordered.sort_by_key(|op| !matches!(op.change, Change::Delete { .. }));
    Some(ordered)
}

impl Tree {
    /// Undoes ops in the order given.
    pub(super) fn undo<'o, 'a: 'o>(
        &mut self,
        source: &impl Source,
        ops: impl Iterator<Item = &'o InvertOp<'a>>,
    ) -> Result<(), MstError> {
        for op in ops {
            let path = op.path.as_bytes();
            match op.change {
                Change::Create { cid } => {
                    self.remove_from(source, path, Some(&cid))?;
                }
                Change::Update { cid, prev } => {
                    self.replace_from(source, path, prev, Some(&cid))?;
                }
                Change::Delete { prev } => self.insert_from(source, path, prev)?,
            }
        }
        Ok(())
    }

    /// The root after undoing, provided that it is as high as its keys demand.
    fn settle(mut self) -> Result<Cid, MstError> {
        if let Child::Node(id) = self.root {
            let top = self.node(id);
            let first = top.entries.first().map(|entry| self.key(entry.key));
            if let Some(key) = first.filter(|key| height(key) != top.height) {
                return Err(MstError::Misplaced(key_text(key)));
            }
        }
        Ok(self.root_cid())
    }
}
