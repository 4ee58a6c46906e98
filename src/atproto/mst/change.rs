//! Changes to a tree whose nodes may still have to be loaded: insert, replace, remove.
//! Whatever can fail (loading, comparing) comes before the first change, so that an error leaves the
//! tree as it was. Recursion goes down one height per step: at most 128 deep.

use super::load::{Nothing, Source};
use super::tree::{Child, Entry, Node, NodeId, Place, Tree, checked_height};
use super::{MstError, key_text};
use crate::atproto::cid::Cid;

/// Where the way down to a key ends.
struct Descent {
    /// The nodes passed, each with the slot through which the way went on.
    path: Vec<(NodeId, usize)>,
    end: End,
}

enum End {
    /// A node of the key's height: the index of the entry, or where it would be.
    Level {
        node: NodeId,
        at: Result<usize, usize>,
        place: Place,
    },
    /// Nothing below the last slot of the path.
    Open,
}

/// The entry of a path.
struct Found {
    /// As in [`Descent`].
    passed: Vec<(NodeId, usize)>,
    node: NodeId,
    index: usize,
    place: Place,
}

impl Tree {
    /// The tree of these records, in any order.
    ///
    /// # Errors
    /// [`MstError::KeyLength`], [`MstError::Exists`] for a path that comes twice.
    pub fn from_records<K: AsRef<[u8]>>(
        records: impl IntoIterator<Item = (K, Cid)>,
    ) -> Result<Self, MstError> {
        let mut tree = Self::empty();
        for (path, cid) in records {
            tree.insert(path.as_ref(), cid)?;
        }
        Ok(tree)
    }

    /// Adds a record.
    ///
    /// # Errors
    /// [`MstError::Exists`], [`MstError::KeyLength`], [`MstError::MissingNode`].
    pub fn insert(&mut self, path: &[u8], cid: Cid) -> Result<(), MstError> {
        self.insert_from(&Nothing, path, cid)
    }

    /// Replaces a record; returns the one before.
    ///
    /// # Errors
    /// [`MstError::Absent`], [`MstError::KeyLength`], [`MstError::MissingNode`].
    pub fn update(&mut self, path: &[u8], cid: Cid) -> Result<Cid, MstError> {
        self.replace_from(&Nothing, path, cid, None)
    }

    /// Removes a record; returns it.
    ///
    /// # Errors
    /// [`MstError::Absent`], [`MstError::KeyLength`], [`MstError::MissingNode`].
    pub fn delete(&mut self, path: &[u8]) -> Result<Cid, MstError> {
        self.remove_from(&Nothing, path, None)
    }

    pub(super) fn insert_from(
        &mut self,
        source: &impl Source,
        path: &[u8],
        value: Cid,
    ) -> Result<(), MstError> {
        let key_height = checked_height(path)?;
        self.check_room()?;
        let Some(root) = self.root_node(source)? else {
            let leaf = self.leaf(key_height, path, value);
            self.set_root(leaf, Some(key_height));
            return Ok(());
        };
        if key_height > self.node(root).height {
            return self.insert_above(source, root, path, value, key_height);
        }
        let descent = self.descend(source, root, path, key_height)?;
        match descent.end {
            End::Level { at: Ok(_), .. } => return Err(MstError::Exists(key_text(path))),
            End::Level {
                node,
                at: Err(at),
                place,
            } => {
                let inner = self.place_below(node, at, &place);
                let (left, right) = self.split(source, self.child(node, at), path, &inner)?;
                let key = self.push_key(path);
                self.set_child(node, at, left);
                self.node_mut(node)
                    .entries
                    .insert(at, Entry { key, value, right });
                self.node_mut(node).cid = None;
            }
            End::Open => {
                let leaf = self.leaf(key_height, path, value);
                if let Some(&(parent, slot)) = descent.path.last() {
                    let child = self.raise(leaf, key_height, self.node(parent).height - 1);
                    self.set_child(parent, slot, child);
                }
            }
        }
        self.touch(&descent.path);
        Ok(())
    }

    /// Puts a record above the whole tree, which is cut in two by it.
    fn insert_above(
        &mut self,
        source: &impl Source,
        root: NodeId,
        path: &[u8],
        value: Cid,
        key_height: u8,
    ) -> Result<(), MstError> {
        let below = self.node(root).height;
        let (left, right) = self.split(source, Child::Node(root), path, &Place::default())?;
        let left = self.raise(left, below, key_height - 1);
        let right = self.raise(right, below, key_height - 1);
        let key = self.push_key(path);
        let root = self.add_node(key_height, left, vec![Entry { key, value, right }]);
        self.set_root(Child::Node(root), Some(key_height));
        Ok(())
    }

    pub(super) fn replace_from(
        &mut self,
        source: &impl Source,
        path: &[u8],
        value: Cid,
        expected: Option<&Cid>,
    ) -> Result<Cid, MstError> {
        let Found {
            passed,
            node,
            index,
            ..
        } = self.find(source, path, expected)?;
        let before = std::mem::replace(&mut self.node_mut(node).entries[index].value, value);
        self.node_mut(node).cid = None;
        self.touch(&passed);
        Ok(before)
    }

    pub(super) fn remove_from(
        &mut self,
        source: &impl Source,
        path: &[u8],
        expected: Option<&Cid>,
    ) -> Result<Cid, MstError> {
        let Found {
            mut passed,
            node,
            index,
            place,
        } = self.find(source, path, expected)?;
        let left_place = self.place_below(node, index, &place);
        let right_place = self.place_below(node, index + 1, &place);
        let (left, right) = (self.child(node, index), self.child(node, index + 1));
        let merged = self.merge(source, left, right, &left_place, &right_place)?;

        let removed = self.node_mut(node).entries.remove(index);
        self.set_child(node, index, merged);
        self.node_mut(node).cid = None;
        self.touch(&passed);
        self.prune(node, &mut passed);
        self.trim(source)?;
        self.drop_key(removed.key);
        Ok(removed.value)
    }

    /// The entry of a path, which must have the expected value where one is given.
    fn find(
        &mut self,
        source: &impl Source,
        path: &[u8],
        expected: Option<&Cid>,
    ) -> Result<Found, MstError> {
        let key_height = checked_height(path)?;
        let absent = || MstError::Absent(key_text(path));
        let root = self.root_node(source)?.ok_or_else(absent)?;
        let Descent { path: passed, end } = self.descend(source, root, path, key_height)?;
        let End::Level {
            node,
            at: Ok(index),
            place,
        } = end
        else {
            return Err(absent());
        };
        let found = self.node(node).entries[index].value;
        match expected {
            Some(&expected) if expected != found => Err(MstError::Mismatch {
                path: key_text(path),
                expected,
                found,
            }),
            _ => Ok(Found {
                passed,
                node,
                index,
                place,
            }),
        }
    }

    pub(super) fn value_from(
        &mut self,
        source: &impl Source,
        path: &[u8],
    ) -> Result<Option<Cid>, MstError> {
        match self.find(source, path, None) {
            Ok(Found { node, index, .. }) => Ok(Some(self.node(node).entries[index].value)),
            Err(MstError::Absent(_)) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Goes down from the root to the height of a key, loading what is on the way.
    fn descend(
        &mut self,
        source: &impl Source,
        root: NodeId,
        path: &[u8],
        key_height: u8,
    ) -> Result<Descent, MstError> {
        let mut passed = Vec::with_capacity(8);
        let mut id = root;
        let mut place = self.root_place();
        loop {
            let at = self.search(id, path);
            let slot = match at {
                Err(slot) if self.node(id).height > key_height => slot,
                Ok(_) if self.node(id).height != key_height => {
                    return Err(MstError::Misplaced(key_text(path)));
                }
                _ => {
                    return Ok(Descent {
                        path: passed,
                        end: End::Level {
                            node: id,
                            at,
                            place,
                        },
                    });
                }
            };
            passed.push((id, slot));
            place = self.place_below(id, slot, &place);
            match self.resolve(source, self.child(id, slot), &place)? {
                None => {
                    return Ok(Descent {
                        path: passed,
                        end: End::Open,
                    });
                }
                Some(child) => {
                    self.set_child(id, slot, Child::Node(child));
                    id = child;
                }
            }
        }
    }

    /// Cuts a subtree in two at a key it does not hold.
    fn split(
        &mut self,
        source: &impl Source,
        child: Child,
        path: &[u8],
        place: &Place,
    ) -> Result<(Child, Child), MstError> {
        let Some(id) = self.resolve(source, child, place)? else {
            return Ok((Child::None, Child::None));
        };
        let Err(at) = self.search(id, path) else {
            return Err(MstError::Misplaced(key_text(path)));
        };
        let inner = self.place_below(id, at, place);
        let (left, right) = self.split(source, self.child(id, at), path, &inner)?;
        if at == self.node(id).entries.len() && right.is_none() {
            self.set_child(id, at, left);
            return Ok((Child::Node(id), Child::None));
        }
        if at == 0 && left.is_none() {
            self.set_child(id, 0, right);
            return Ok((Child::None, Child::Node(id)));
        }
        self.set_child(id, at, left);
        let node = self.node_mut(id);
        let (height, tail) = (node.height, node.entries.split_off(at));
        node.cid = None;
        let right = self.add_node(height, right, tail);
        Ok((Child::Node(id), Child::Node(right)))
    }

    /// Joins two neighbouring subtrees whose separating key goes away.
    fn merge(
        &mut self,
        source: &impl Source,
        left: Child,
        right: Child,
        left_place: &Place,
        right_place: &Place,
    ) -> Result<Child, MstError> {
        match (left, right) {
            (Child::None, other) | (other, Child::None) => return Ok(other),
            _ => {}
        }
        let (Some(left_id), Some(right_id)) = (
            self.resolve(source, left, left_place)?,
            self.resolve(source, right, right_place)?,
        ) else {
            return Ok(Child::None);
        };
        let last = self.node(left_id).entries.len();
        let seam = self.merge(
            source,
            self.child(left_id, last),
            self.child(right_id, 0),
            &self.place_below(left_id, last, left_place),
            &self.place_below(right_id, 0, right_place),
        )?;
        let tail = self.release(right_id);
        self.set_child(left_id, last, seam);
        self.node_mut(left_id).entries.extend(tail);
        self.node_mut(left_id).cid = None;
        Ok(Child::Node(left_id))
    }

    /// Takes away nodes that have become empty, from `node` upwards.
    fn prune(&mut self, mut node: NodeId, passed: &mut Vec<(NodeId, usize)>) {
        while self.node(node).entries.is_empty() && self.node(node).left.is_none() {
            self.release(node);
            match passed.pop() {
                Some((parent, slot)) => {
                    self.set_child(parent, slot, Child::None);
                    node = parent;
                }
                None => return self.set_root(Child::None, None),
            }
        }
    }

    /// Takes away nodes at the top that only point to a subtree. The last subtree may be a link that
    /// is not at hand: then its CID is the root's.
    fn trim(&mut self, source: &impl Source) -> Result<(), MstError> {
        while let Child::Node(id) = self.root {
            let Node {
                height,
                left,
                ref entries,
                ..
            } = *self.node(id);
            if !entries.is_empty() {
                break;
            }
            let height = height.checked_sub(1);
            self.release(id);
            self.set_root(left, height);
            if let Child::Link(link) = left {
                let place = self.root_place();
                if let Some(loaded) = source.fetch(self, &link, &place)? {
                    self.root = Child::Node(loaded);
                }
            }
        }
        Ok(())
    }
}
