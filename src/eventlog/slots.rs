//! Positions of those who follow the log and are to miss no event, like the replication slots of a database: removal by
//! age waits for the slowest one. The byte budget and the room on the disk do not wait: a follower learns at its next
//! read that it fell out. Knows nothing of what followers do with events.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Weak};

use parking_lot::Mutex;

/// The slots of a log. Clones share them.
#[derive(Debug, Clone, Default)]
pub struct Slots(Arc<Mutex<Vec<Weak<State>>>>);

#[derive(Debug)]
struct State {
    name: &'static str,
    position: AtomicU64,
}

/// A follower's slot. Retention forgets it when it is dropped.
#[derive(Debug)]
pub struct Slot(Arc<State>);

impl Slots {
    /// A slot of that name: events from `position` on are to stay.
    pub fn open(&self, name: &'static str, position: u64) -> Slot {
        let state = Arc::new(State {
            name,
            position: AtomicU64::new(position),
        });
        let mut slots = self.0.lock();
        slots.retain(|slot| slot.strong_count() > 0);
        slots.push(Arc::downgrade(&state));
        Slot(state)
    }

    /// The names of all slots, and their positions.
    pub fn positions(&self) -> Vec<(&'static str, u64)> {
        let slots = self.0.lock();
        let open = slots.iter().filter_map(Weak::upgrade);
        open.map(|slot| (slot.name, slot.position.load(Ordering::Acquire)))
            .collect()
    }

    /// The first event that a follower still needs; `None` without followers.
    pub(super) fn slowest(&self) -> Option<u64> {
        let positions = self.positions().into_iter();
        positions.map(|(_, position)| position).min()
    }
}

impl Slot {
    /// The first event that the follower still needs.
    pub fn position(&self) -> u64 {
        self.0.position.load(Ordering::Acquire)
    }

    /// Events before `position` are not needed any more. A slot does not go back.
    pub fn confirm(&self, position: u64) {
        self.0.position.fetch_max(position, Ordering::AcqRel);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_slowest_of_the_open_slots_counts() {
        let slots = Slots::default();
        assert_eq!(slots.slowest(), None);
        let (fast, slow) = (slots.open("fast", 9), slots.open("slow", 4));
        assert_eq!(slots.slowest(), Some(4));
        slow.confirm(3);
        assert_eq!(slow.position(), 4, "a slot does not go back");
        slow.confirm(12);
        assert_eq!(slots.slowest(), Some(9));
        drop(fast);
        assert_eq!(slots.positions(), [("slow", 12)]);
    }
}
