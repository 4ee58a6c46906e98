//! What a commit has to carry: the nodes it made, and the nodes around them that others need to undo
//! it. Also proofs that a record is, or is not, in the tree.
//! Record blocks and the commit itself are the caller's.

use std::cell::RefCell;
use std::collections::HashSet;

use super::invert::put_back_first;
use super::load::{Nothing, Source};
use super::tree::{Child, Link, NodeId, Place, Tree};
use super::{Change, InvertOp, MstError};
use crate::atproto::cid::Cid;

/// The outcome of a batch of ops.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Diff {
    /// The root before: `prevData`.
    pub before: Cid,
    /// The root after: `data`.
    pub after: Cid,
    /// The nodes a sync 1.1 commit carries, parents before children: all new ones, and those that
    /// inverting the ops needs.
    pub blocks: Vec<(Cid, Vec<u8>)>,
}

/// Nodes of a whole tree, given out one by one and remembered.
struct Lender<'t> {
    tree: &'t Tree,
    lent: RefCell<HashSet<Cid>>,
}

impl Source for Lender<'_> {
    fn fetch(&self, tree: &mut Tree, link: &Link, _: &Place) -> Result<Option<NodeId>, MstError> {
        if link.origin == Link::NOWHERE {
            return Ok(None);
        }
        self.lent.borrow_mut().insert(link.cid);
        tree.copy_node(self.tree, link.origin).map(Some)
    }
}

impl Tree {
    /// Applies a commit's ops in their order, and gathers the blocks the commit has to carry.
    ///
    /// # Errors
    /// As [`super::invert()`], where an op contradicts the tree or a partial tree lacks a node; the
    /// tree is then as it was.
    pub fn apply(&mut self, ops: &[InvertOp<'_>]) -> Result<Diff, MstError> {
        let before = self.root_cid();
        let backup = self.partial.then(|| self.clone());
        for (done, op) in ops.iter().enumerate() {
            let Err(error) = self.redo(op) else { continue };
            match backup {
                Some(backup) => *self = backup,
                // A whole tree has every node that undoing could need.
                None => self.undo(&Nothing, ops[..done].iter().rev())?,
            }
            return Err(error);
        }
        let mut carried = HashSet::new();
        let after = self.hash_new(&mut |cid, _| {
            carried.insert(cid);
        });
        match self.covering(ops) {
            Ok(covering) => carried.extend(covering),
            Err(error) => {
                if let Some(backup) = backup {
                    *self = backup;
                }
                return Err(error);
            }
        }
        Ok(Diff {
            before,
            after,
            blocks: self.blocks_in_order(&carried),
        })
    }

    fn redo(&mut self, op: &InvertOp<'_>) -> Result<(), MstError> {
        let path = op.path.as_bytes();
        match op.change {
            Change::Create { cid } => self.insert(path, cid),
            Change::Update { cid, prev } => self
                .replace_from(&Nothing, path, cid, Some(&prev))
                .map(drop),
            Change::Delete { prev } => self.remove_from(&Nothing, path, Some(&prev)).map(drop),
        }
    }

    /// The nodes of this tree, hashed and with `ops` applied, that undoing them reads: in reverse
    /// order and in the reference relay's (see [`super::invert()`]), so that either verifier succeeds;
    /// and those around each op's record, which other verifiers rely on.
    fn covering(&self, ops: &[InvertOp<'_>]) -> Result<HashSet<Cid>, MstError> {
        let lender = Lender {
            tree: self,
            lent: RefCell::new(HashSet::new()),
        };
        self.borrowed().undo(&lender, ops.iter().rev())?;
        if let Some(ops) = put_back_first(ops) {
            self.borrowed().undo(&lender, ops.into_iter())?;
        }
        let mut covering = lender.lent.into_inner();
        for op in ops {
            self.add_neighbourhood(op.path.as_bytes(), &mut covering);
        }
        Ok(covering)
    }

    /// Adds the nodes on the way to a path, down to where it is or would be; says where it is.
    fn add_way(&self, path: &[u8], nodes: &mut HashSet<Cid>) -> Option<(NodeId, usize)> {
        let mut child = self.root;
        while let Child::Node(id) = child {
            nodes.extend(self.node(id).cid);
            match self.search(id, path) {
                Ok(index) => return Some((id, index)),
                Err(slot) => child = self.child(id, slot),
            }
        }
        None
    }

    /// Adds the nodes that show a path and the records next to it on both sides: what the reference
    /// implementation carries for every op. The way to an absent path passes both neighbours.
    fn add_neighbourhood(&self, path: &[u8], nodes: &mut HashSet<Cid>) {
        let Some((id, index)) = self.add_way(path, nodes) else {
            return;
        };
        let mut child = self.child(id, index);
        while let Child::Node(before) = child {
            nodes.extend(self.node(before).cid);
            child = self.child(before, self.node(before).entries.len());
        }
        let mut child = self.child(id, index + 1);
        while let Child::Node(after) = child {
            nodes.extend(self.node(after).cid);
            child = self.node(after).left;
        }
    }

    /// A tree that has this one's root as a link, to be loaded through a [`Lender`].
    fn borrowed(&self) -> Tree {
        Tree::rooted(match self.root {
            Child::Node(id) => match self.node(id).cid {
                Some(cid) => Child::Link(Link { cid, origin: id }),
                None => Child::None,
            },
            other => other,
        })
    }

    /// The blocks of a set of nodes that hangs together from the root, parents first.
    fn blocks_in_order(&self, carried: &HashSet<Cid>) -> Vec<(Cid, Vec<u8>)> {
        if self.root.is_none() {
            return vec![(super::empty_root(), super::node::EMPTY.to_vec())];
        }
        let mut blocks = Vec::with_capacity(carried.len());
        let mut pending = vec![self.root];
        while let Some(child) = pending.pop() {
            let Child::Node(id) = child else { continue };
            let Some(cid) = self.node(id).cid.filter(|cid| carried.contains(cid)) else {
                continue;
            };
            let mut block = Vec::new();
            self.write_node(id, &mut block);
            blocks.push((cid, block));
            pending.extend(
                (0..=self.node(id).entries.len())
                    .rev()
                    .map(|at| self.child(id, at)),
            );
        }
        blocks
    }

    /// The nodes from the root to where a record is or would be: with them [`super::read`] tells
    /// whether it is there. For an absent record the way goes on to the bottom, for readers that
    /// search by order alone and do not look at heights.
    ///
    /// # Errors
    /// [`MstError::MissingNode`] when a partial tree cannot prove either, [`MstError::KeyLength`].
    pub fn proof(&mut self, path: &[u8]) -> Result<Vec<(Cid, Vec<u8>)>, MstError> {
        self.root_cid();
        self.get(path)?;
        let mut way = HashSet::new();
        self.add_way(path, &mut way);
        Ok(self.blocks_in_order(&way))
    }
}
