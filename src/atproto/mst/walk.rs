//! The walk over a tree in the order of a streamable CAR: every node before what it links to, records
//! and subtrees in the order of the keys (repository specification, "streamable CAR block ordering").
//! It gives nodes and links; record blocks are the caller's.

use super::node::EMPTY;
use super::tree::{Child, NodeId, Tree};
use crate::atproto::cid::Cid;

/// A step of the walk.
#[derive(Clone, Copy, Debug)]
pub enum Visit<'t> {
    /// A node; its block comes here in the stream.
    Node(NodeView<'t>),
    /// A record; its block comes here in the stream.
    Record {
        /// The record's path.
        path: &'t [u8],
        /// The record.
        cid: Cid,
    },
    /// A subtree that a partial tree does not hold.
    Missing(Cid),
}

/// A node on the walk.
#[derive(Clone, Copy, Debug)]
pub struct NodeView<'t> {
    tree: &'t Tree,
    cid: Cid,
    id: Option<NodeId>,
}

impl NodeView<'_> {
    /// The node's CID.
    pub fn cid(&self) -> Cid {
        self.cid
    }

    /// The node's block.
    pub fn block(&self) -> Vec<u8> {
        let mut block = EMPTY.to_vec();
        if let Some(id) = self.id {
            self.tree.write_node(id, &mut block);
        }
        block
    }
}

/// The walk, see [`Tree::walk`]. It holds one position per height of the tree.
#[derive(Clone, Debug)]
pub struct Walk<'t> {
    tree: &'t Tree,
    start: Option<Cid>,
    /// Nodes on the way, each with its next position: 2n is the n-th subtree, 2n + 1 the n-th record.
    open: Vec<(NodeId, usize)>,
}

impl<'t> Walk<'t> {
    fn enter(&mut self, child: Child) -> Option<Visit<'t>> {
        match child {
            Child::None => None,
            Child::Link(link) => Some(Visit::Missing(link.cid)),
            Child::Node(id) => {
                self.open.push((id, 0));
                let cid = self.tree.child_cid(&child)?;
                Some(Visit::Node(NodeView {
                    tree: self.tree,
                    cid,
                    id: Some(id),
                }))
            }
        }
    }
}

impl<'t> Iterator for Walk<'t> {
    type Item = Visit<'t>;

    fn next(&mut self) -> Option<Visit<'t>> {
        let tree = self.tree;
        if let Some(cid) = self.start.take() {
            return match tree.root {
                Child::None => Some(Visit::Node(NodeView {
                    tree,
                    cid,
                    id: None,
                })),
                root => self.enter(root),
            };
        }
        while let Some((id, position)) = self.open.last_mut() {
            let (id, at) = (*id, *position);
            *position += 1;
            if at % 2 == 1 {
                match tree.node(id).entries.get(at / 2) {
                    Some(entry) => {
                        let path = tree.key(entry.key);
                        return Some(Visit::Record {
                            path,
                            cid: entry.value,
                        });
                    }
                    None => {
                        self.open.pop();
                    }
                }
            } else if let Some(visit) = self.enter(tree.child(id, at / 2)) {
                return Some(visit);
            }
        }
        None
    }
}

impl Tree {
    /// Walks the tree in streamable order, from the root; hashes what was touched first.
    pub fn walk(&mut self) -> Walk<'_> {
        let start = Some(self.root_cid());
        Walk {
            tree: self,
            start,
            open: Vec::new(),
        }
    }

    /// The records in the order of their paths. Those in subtrees a partial tree does not hold are
    /// left out.
    pub fn records(&mut self) -> impl Iterator<Item = (&[u8], Cid)> {
        self.walk().filter_map(|visit| match visit {
            Visit::Record { path, cid } => Some((path, cid)),
            Visit::Node(_) | Visit::Missing(_) => None,
        })
    }
}
