//! Bringing nodes into a tree: from blocks, strictly checked against their place, or from another
//! tree. Nodes are loaded when an operation first needs them.

use super::node::{NodeError, NodeReader};
use super::tree::{Child, Entry, Key, Link, Node, NodeId, Place, Tree};
use super::{MAX_KEY_LEN, MAX_NODE_ENTRIES, MstError};
use crate::atproto::cid::Cid;
use crate::atproto::fixed::ShapeError;

/// Where nodes that are not loaded come from.
pub(super) trait Source {
    /// Loads the node behind a link into the tree; `None` when it is not at hand.
    fn fetch(
        &self,
        tree: &mut Tree,
        link: &Link,
        place: &Place,
    ) -> Result<Option<NodeId>, MstError>;
}

/// No nodes: the tree has to do with what it has.
pub(super) struct Nothing;

impl Source for Nothing {
    fn fetch(&self, _: &mut Tree, _: &Link, _: &Place) -> Result<Option<NodeId>, MstError> {
        Ok(None)
    }
}

/// Which keys of a node are hashed to see whether they belong there.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Heights {
    /// Every key.
    All,
    /// The first key of a root, which says at what height the tree ends.
    Top,
}

/// Nodes from blocks.
pub(super) struct Blocks<F> {
    pub(super) lookup: F,
    pub(super) heights: Heights,
}

impl<'a, F: Fn(&Cid) -> Option<&'a [u8]>> Source for Blocks<F> {
    fn fetch(
        &self,
        tree: &mut Tree,
        link: &Link,
        place: &Place,
    ) -> Result<Option<NodeId>, MstError> {
        let Some(block) = (self.lookup)(&link.cid) else {
            return Ok(None);
        };
        tree.read_node(link.cid, block, place, self.heights)
            .map(Some)
            .map_err(|refusal| refusal.into_error(link.cid))
    }
}

/// Why a block did not become a node.
pub(super) enum Refusal {
    Node(NodeError),
    TooLarge,
}

impl Refusal {
    fn into_error(self, cid: Cid) -> MstError {
        match self {
            Refusal::Node(reason) => MstError::BadNode { cid, reason },
            Refusal::TooLarge => MstError::TooLarge,
        }
    }
}

impl From<ShapeError> for Refusal {
    fn from(error: ShapeError) -> Self {
        Refusal::Node(error.into())
    }
}

impl From<NodeError> for Refusal {
    fn from(error: NodeError) -> Self {
        Refusal::Node(error)
    }
}

impl Tree {
    /// Reads all nodes under `root` that `blocks` has; the others stay links. The blocks must be
    /// known to hash to their CIDs.
    ///
    /// # Errors
    /// [`MstError::MissingNode`] for the root itself, [`MstError::BadNode`] for any malformed node.
    pub fn load<'a>(
        root: Cid,
        blocks: impl Fn(&Cid) -> Option<&'a [u8]>,
    ) -> Result<Self, MstError> {
        let source = Blocks {
            lookup: blocks,
            heights: Heights::All,
        };
        let mut tree = Self::rooted(Child::Link(Link::to(root)));
        let mut pending = Vec::new();
        pending.extend(tree.root_node(&source)?.map(|id| (id, tree.root_place())));
        while let Some((id, place)) = pending.pop() {
            for slot in 0..=tree.node(id).entries.len() {
                let Child::Link(link) = tree.child(id, slot) else {
                    continue;
                };
                let inner = tree.place_below(id, slot, &place);
                match source.fetch(&mut tree, &link, &inner)? {
                    Some(child) => {
                        tree.set_child(id, slot, Child::Node(child));
                        pending.push((child, inner));
                    }
                    None => tree.partial = true,
                }
            }
        }
        Ok(tree)
    }

    pub(super) fn root_node(&mut self, source: &impl Source) -> Result<Option<NodeId>, MstError> {
        let place = self.root_place();
        let Child::Link(link) = self.root else {
            return self.resolve(source, self.root, &place);
        };
        let id = source
            .fetch(self, &link, &place)?
            .ok_or(MstError::MissingNode(link.cid))?;
        let Node {
            height,
            left,
            ref entries,
            ..
        } = *self.node(id);
        let hollow = entries.is_empty();
        match (hollow, left.is_none()) {
            (true, true) => {
                self.release(id);
                self.set_root(Child::None, None);
                Ok(None)
            }
            (true, false) => Err(MstError::BadNode {
                cid: link.cid,
                reason: NodeError::Hollow,
            }),
            (false, _) => {
                self.set_root(Child::Node(id), Some(height));
                Ok(Some(id))
            }
        }
    }

    pub(super) fn resolve(
        &mut self,
        source: &impl Source,
        child: Child,
        place: &Place,
    ) -> Result<Option<NodeId>, MstError> {
        match child {
            Child::None => Ok(None),
            Child::Node(id) => Ok(Some(id)),
            Child::Link(link) => source
                .fetch(self, &link, place)?
                .ok_or(MstError::MissingNode(link.cid))
                .map(Some),
        }
    }

    /// Reads a block into the arena, checked against its place.
    fn read_node(
        &mut self,
        cid: Cid,
        block: &[u8],
        place: &Place,
        heights: Heights,
    ) -> Result<NodeId, Refusal> {
        let (mut reader, count) = NodeReader::open(block)?;
        if count > MAX_NODE_ENTRIES as u64 {
            return Err(NodeError::TooManyEntries(count).into());
        }
        let mut height = place.height;
        // A claimed length allocates no more than the block could hold: an entry takes 50 bytes.
        let mut entries = Vec::with_capacity((count as usize).min(block.len() / 50));
        let mut previous = None;
        while let Some(wire) = reader.entry()? {
            let key = self.read_key(previous, wire.prefix_len, wire.suffix)?;
            if height.is_none() || heights == Heights::All {
                let found = super::height(self.key(key));
                let expected = *height.get_or_insert(found);
                if found != expected {
                    return Err(NodeError::Height { expected, found }.into());
                }
            }
            let right = wire
                .right
                .map_or(Child::None, |cid| Child::Link(Link::to(cid)));
            entries.push(Entry {
                key,
                value: wire.value,
                right,
            });
            previous = Some(key);
        }
        let left = reader
            .close()?
            .map_or(Child::None, |cid| Child::Link(Link::to(cid)));
        self.check_shape(&entries, &left, place, height)?;
        let id = self.add_node(height.unwrap_or(0), left, entries);
        self.node_mut(id).cid = Some(cid);
        Ok(id)
    }

    /// Rebuilds a key from the one before it; refuses other than ascending keys with exact prefixes.
    fn read_key(
        &mut self,
        previous: Option<Key>,
        prefix_len: u64,
        suffix: &[u8],
    ) -> Result<Key, Refusal> {
        let previous = previous.map_or(0..0, Key::range);
        let prefix = usize::try_from(prefix_len).map_err(|_| NodeError::Prefix)?;
        if prefix > previous.len() {
            return Err(NodeError::Prefix.into());
        }
        let first = *suffix.first().ok_or(NodeError::KeyLength(prefix))?;
        if prefix < previous.len() {
            let instead = self.keys[previous.start + prefix];
            if first == instead {
                return Err(NodeError::Prefix.into());
            }
            if first < instead {
                return Err(NodeError::Order.into());
            }
        }
        let len = prefix + suffix.len();
        if len > MAX_KEY_LEN {
            return Err(NodeError::KeyLength(len).into());
        }
        let shared = previous.start..previous.start + prefix;
        self.join_key(shared, suffix).ok_or(Refusal::TooLarge)
    }

    fn check_shape(
        &self,
        entries: &[Entry],
        left: &Child,
        place: &Place,
        height: Option<u8>,
    ) -> Result<(), NodeError> {
        let (Some(first), Some(last)) = (entries.first(), entries.last()) else {
            // Empty nodes lead on to a subtree; only the empty tree is a node with nothing at all.
            let empty_tree = place.height.is_none() && left.is_none();
            let leads_on = place.height.is_some_and(|height| height > 0) && !left.is_none();
            return if empty_tree || leads_on {
                Ok(())
            } else {
                Err(NodeError::Hollow)
            };
        };
        let bottom = height == Some(0);
        if bottom && !(left.is_none() && entries.iter().all(|entry| entry.right.is_none())) {
            return Err(NodeError::BelowBottom);
        }
        let above_low = place
            .low
            .is_none_or(|low| self.key(low) < self.key(first.key));
        let below_high = place
            .high
            .is_none_or(|high| self.key(last.key) < self.key(high));
        if above_low && below_high {
            Ok(())
        } else {
            Err(NodeError::Order)
        }
    }

    /// Copies a node of another tree; its subtrees become links that say where they came from.
    pub(super) fn copy_node(&mut self, from: &Tree, origin: NodeId) -> Result<NodeId, MstError> {
        let node = from.node(origin);
        let link = |child: &Child| match *child {
            Child::Node(id) => match from.node(id).cid {
                Some(cid) => Child::Link(Link { cid, origin: id }),
                None => Child::None,
            },
            Child::Link(link) => Child::Link(Link::to(link.cid)),
            Child::None => Child::None,
        };
        let mut entries = Vec::with_capacity(node.entries.len());
        for entry in &node.entries {
            self.check_room()?;
            let key = self.push_key(from.key(entry.key));
            entries.push(Entry {
                key,
                value: entry.value,
                right: link(&entry.right),
            });
        }
        let id = self.add_node(node.height, link(&node.left), entries);
        self.node_mut(id).cid = node.cid;
        Ok(id)
    }
}
