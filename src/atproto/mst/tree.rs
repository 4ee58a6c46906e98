//! The tree in memory: nodes and keys in two arenas, subtrees that are not at hand as links. Only nodes
//! that were touched are hashed again. Loading is in `load`, changing in `change`.

use std::ops::Range;

use super::node::{NodeWriter, cid_of};
use super::{MAX_KEY_LEN, MstError, empty_root, height};
use crate::atproto::cid::Cid;

/// Index of a node in the arena.
pub(super) type NodeId = u32;

/// Room made at once for the nodes and keys that a commit usually brings.
const USUAL_NODES: usize = 12;
const USUAL_KEY_BYTES: usize = 2048;

/// Dead key bytes that are kept before the key arena is rewritten.
const KEY_GARBAGE: usize = 4096;

/// A key: a stretch of the key arena.
#[derive(Clone, Copy, Debug)]
pub(super) struct Key {
    start: u32,
    len: u16,
}

impl Key {
    pub(super) fn range(self) -> Range<usize> {
        let start = self.start as usize;
        start..start + usize::from(self.len)
    }
}

/// What stands between two entries of a node.
#[derive(Clone, Copy, Debug)]
pub(super) enum Child {
    None,
    /// A subtree known by its CID alone.
    Link(Link),
    Node(NodeId),
}

impl Child {
    pub(super) fn is_none(&self) -> bool {
        matches!(self, Child::None)
    }
}

/// A subtree that is not loaded.
#[derive(Clone, Copy, Debug)]
pub(super) struct Link {
    pub(super) cid: Cid,
    /// Where the node is in the tree that is being copied, see `load`; else [`Link::NOWHERE`].
    pub(super) origin: NodeId,
}

impl Link {
    pub(super) const NOWHERE: NodeId = NodeId::MAX;

    pub(super) fn to(cid: Cid) -> Self {
        Self {
            cid,
            origin: Self::NOWHERE,
        }
    }
}

#[derive(Clone, Copy, Debug)]
pub(super) struct Entry {
    pub(super) key: Key,
    pub(super) value: Cid,
    pub(super) right: Child,
}

#[derive(Clone, Debug)]
pub(super) struct Node {
    pub(super) height: u8,
    pub(super) left: Child,
    pub(super) entries: Vec<Entry>,
    /// `None` since the node, or one below it, was changed.
    pub(super) cid: Option<Cid>,
}

/// Where a node stands, and so what it must be like.
#[derive(Clone, Copy, Default)]
pub(super) struct Place {
    /// `None` for a root: its keys decide.
    pub(super) height: Option<u8>,
    /// The keys between which all of the node's lie.
    pub(super) low: Option<Key>,
    pub(super) high: Option<Key>,
}

/// A repository's tree, whole or in part.
///
/// In a partial tree, operations that need a node which is not at hand fail with
/// [`MstError::MissingNode`] and leave the tree as it was.
#[derive(Clone, Debug)]
pub struct Tree {
    pub(super) nodes: Vec<Node>,
    free: Vec<NodeId>,
    pub(super) keys: Vec<u8>,
    dead_key_bytes: usize,
    pub(super) root: Child,
    /// Known from the moment the root is loaded.
    root_height: Option<u8>,
    pub(super) partial: bool,
}

impl Default for Tree {
    fn default() -> Self {
        Self::empty()
    }
}

impl Tree {
    /// The tree without records.
    pub fn empty() -> Self {
        Self::rooted(Child::None)
    }

    pub(super) fn rooted(root: Child) -> Self {
        Self {
            nodes: Vec::with_capacity(USUAL_NODES),
            free: Vec::new(),
            keys: Vec::with_capacity(USUAL_KEY_BYTES),
            dead_key_bytes: 0,
            root,
            root_height: None,
            partial: false,
        }
    }

    /// The record at a path.
    ///
    /// # Errors
    /// [`MstError::MissingNode`] when a partial tree cannot tell.
    pub fn get(&self, path: &[u8]) -> Result<Option<Cid>, MstError> {
        let height = checked_height(path)?;
        let mut child = self.root;
        loop {
            let id = match child {
                Child::None => return Ok(None),
                Child::Link(link) => return Err(MstError::MissingNode(link.cid)),
                Child::Node(id) => id,
            };
            match self.search(id, path) {
                Ok(index) => return Ok(Some(self.node(id).entries[index].value)),
                Err(_) if self.node(id).height <= height => return Ok(None),
                Err(slot) => child = self.child(id, slot),
            }
        }
    }

    /// The root's CID; hashes the nodes that were touched since the last time.
    pub fn root_cid(&mut self) -> Cid {
        self.hash_new(&mut |_, _| {})
    }

    /// As [`Tree::root_cid`]; `new_block` gets every block that had to be hashed.
    pub(super) fn hash_new(&mut self, new_block: &mut dyn FnMut(Cid, &[u8])) -> Cid {
        match self.root {
            Child::None => empty_root(),
            Child::Link(link) => link.cid,
            Child::Node(id) => self.hash_node(id, &mut Vec::with_capacity(1024), new_block),
        }
    }

    fn hash_node(
        &mut self,
        id: NodeId,
        buffer: &mut Vec<u8>,
        new_block: &mut dyn FnMut(Cid, &[u8]),
    ) -> Cid {
        if let Some(cid) = self.node(id).cid {
            return cid;
        }
        for slot in 0..=self.node(id).entries.len() {
            if let Child::Node(child) = self.child(id, slot) {
                self.hash_node(child, buffer, new_block);
            }
        }
        self.write_node(id, buffer);
        let cid = cid_of(buffer);
        self.node_mut(id).cid = Some(cid);
        new_block(cid, buffer);
        cid
    }

    /// Writes the block of a node whose children are hashed.
    pub(super) fn write_node(&self, id: NodeId, buffer: &mut Vec<u8>) {
        let node = self.node(id);
        let mut writer = NodeWriter::begin(buffer, node.entries.len());
        let mut previous: &[u8] = &[];
        for entry in &node.entries {
            let key = self.key(entry.key);
            writer.entry(
                previous,
                key,
                &entry.value,
                self.child_cid(&entry.right).as_ref(),
            );
            previous = key;
        }
        writer.finish(self.child_cid(&node.left).as_ref());
    }

    pub(super) fn child_cid(&self, child: &Child) -> Option<Cid> {
        match child {
            Child::None => None,
            Child::Link(link) => Some(link.cid),
            Child::Node(id) => {
                debug_assert!(self.node(*id).cid.is_some(), "children are hashed first");
                self.node(*id).cid
            }
        }
    }

    /// Bytes the arenas hold.
    #[cfg(test)]
    pub(super) fn memory(&self) -> usize {
        self.keys.len() + self.nodes.len() * size_of::<Node>()
    }

    // The arenas

    pub(super) fn node(&self, id: NodeId) -> &Node {
        &self.nodes[id as usize]
    }

    pub(super) fn node_mut(&mut self, id: NodeId) -> &mut Node {
        &mut self.nodes[id as usize]
    }

    pub(super) fn key(&self, key: Key) -> &[u8] {
        &self.keys[key.range()]
    }

    /// The subtree in a slot: slot 0 is left of all entries, slot n right of the n-th.
    pub(super) fn child(&self, id: NodeId, slot: usize) -> Child {
        let node = self.node(id);
        if slot == 0 {
            node.left
        } else {
            node.entries[slot - 1].right
        }
    }

    pub(super) fn set_child(&mut self, id: NodeId, slot: usize, child: Child) {
        let node = self.node_mut(id);
        if slot == 0 {
            node.left = child;
        } else {
            node.entries[slot - 1].right = child;
        }
    }

    pub(super) fn set_root(&mut self, root: Child, height: Option<u8>) {
        self.root = root;
        self.root_height = height;
    }

    pub(super) fn root_place(&self) -> Place {
        Place {
            height: self.root_height,
            low: None,
            high: None,
        }
    }

    pub(super) fn place_below(&self, id: NodeId, slot: usize, place: &Place) -> Place {
        let node = self.node(id);
        let low = slot.checked_sub(1).map(|before| node.entries[before].key);
        let high = node.entries.get(slot).map(|after| after.key);
        Place {
            height: Some(node.height.saturating_sub(1)),
            low: low.or(place.low),
            high: high.or(place.high),
        }
    }

    pub(super) fn search(&self, id: NodeId, path: &[u8]) -> Result<usize, usize> {
        self.node(id)
            .entries
            .binary_search_by(|entry| self.key(entry.key).cmp(path))
    }

    pub(super) fn touch(&mut self, passed: &[(NodeId, usize)]) {
        for &(id, _) in passed {
            self.node_mut(id).cid = None;
        }
    }

    pub(super) fn leaf(&mut self, height: u8, path: &[u8], value: Cid) -> Child {
        let key = self.push_key(path);
        let entry = Entry {
            key,
            value,
            right: Child::None,
        };
        Child::Node(self.add_node(height, Child::None, vec![entry]))
    }

    /// Puts pointer-only nodes above a subtree of height `from`, up to height `to`.
    pub(super) fn raise(&mut self, child: Child, from: u8, to: u8) -> Child {
        if child.is_none() {
            return child;
        }
        (from..to).fold(child, |child, below| {
            Child::Node(self.add_node(below + 1, child, Vec::new()))
        })
    }

    pub(super) fn add_node(&mut self, height: u8, left: Child, entries: Vec<Entry>) -> NodeId {
        let node = Node {
            height,
            left,
            entries,
            cid: None,
        };
        match self.free.pop() {
            Some(id) => {
                *self.node_mut(id) = node;
                id
            }
            None => {
                self.nodes.push(node);
                (self.nodes.len() - 1) as NodeId
            }
        }
    }

    pub(super) fn release(&mut self, id: NodeId) -> Vec<Entry> {
        self.free.push(id);
        let node = self.node_mut(id);
        node.left = Child::None;
        std::mem::take(&mut node.entries)
    }

    /// That one more key of any length, and the nodes it may need, have indexes.
    pub(super) fn check_room(&self) -> Result<(), MstError> {
        let keys = self.keys.len() + MAX_KEY_LEN <= u32::MAX as usize;
        let nodes = self.nodes.len() + 4 * 129 < Link::NOWHERE as usize;
        if keys && nodes {
            Ok(())
        } else {
            Err(MstError::TooLarge)
        }
    }

    /// Adds a key; [`Tree::check_room`] comes first.
    pub(super) fn push_key(&mut self, path: &[u8]) -> Key {
        let start = self.keys.len() as u32;
        self.keys.extend_from_slice(path);
        Key {
            start,
            len: path.len() as u16,
        }
    }

    /// Adds a key made of a stretch of the key arena and a suffix, at most [`MAX_KEY_LEN`] together;
    /// `None` when the arena is full.
    pub(super) fn join_key(&mut self, shared: Range<usize>, suffix: &[u8]) -> Option<Key> {
        let start = u32::try_from(self.keys.len()).ok()?;
        let len = (shared.len() + suffix.len()) as u16;
        self.keys.extend_from_within(shared);
        self.keys.extend_from_slice(suffix);
        Some(Key { start, len })
    }

    /// Counts the key of a removed record; rewrites the key arena when most of it is keys of removed records.
    pub(super) fn drop_key(&mut self, key: Key) {
        self.dead_key_bytes += usize::from(key.len);
        if self.dead_key_bytes < KEY_GARBAGE || self.dead_key_bytes * 2 < self.keys.len() {
            return;
        }
        let old = std::mem::take(&mut self.keys);
        for entry in self.nodes.iter_mut().flat_map(|node| &mut node.entries) {
            let range = entry.key.range();
            entry.key.start = self.keys.len() as u32;
            self.keys.extend_from_slice(&old[range]);
        }
        self.dead_key_bytes = 0;
    }
}

pub(super) fn checked_height(path: &[u8]) -> Result<u8, MstError> {
    if path.is_empty() || path.len() > MAX_KEY_LEN {
        return Err(MstError::KeyLength(path.len()));
    }
    Ok(height(path))
}
