//! Accounts at rest, 60 bytes each: what is needed to judge an account's next usual event, in one block of memory
//! without pointers or text, found through an index of 32-bit cells.
//!
//! The block is reserved at once and used from its beginning; the index grows in small steps, part by part, so that
//! nothing ever doubles. When it is full, the entries that were not used since the hand last passed go (second
//! chance). An entry whose account is in use is lent: it stays, and counts for nothing until it is given back.

use std::hash::{BuildHasher as _, RandomState};

use crate::atproto::did::Did;

/// Bytes of an entry that say something of the account.
pub(super) const RECORD_BYTES: usize = 50;
/// The upper bits of a record's last byte are the slab's.
pub(super) const RECORD_BITS: u32 = RECORD_BYTES as u32 * 8 - 3;
/// Bits of a cell that name an entry: number plus one, 0 is an empty cell. The others repeat bits of the entry's name,
/// so that an entry of another name is seldom looked at.
const SLOT_BITS: u32 = 26;
const SLOT_MASK: u32 = (1 << SLOT_BITS) - 1;
/// Most entries of a slab.
const MAX_ENTRIES: usize = SLOT_MASK as usize - 1;
/// Entries of one part of the index, on average, when the slab is full: it is rebuilt in well under a millisecond.
const PART_ENTRIES: usize = 4_096;
/// A part grows by an eighth when more than seven eighths of its cells are taken.
const EIGHTHS_TAKEN: usize = 7;
/// Entries that the hand looks at for one that was not used; after these, used ones go as well.
const LOOKS: usize = 64;

/// The account has been used since the hand passed.
const USED: u8 = 1 << 7;
/// The account is in use: the entry is kept, and may be out of date.
const LENT: u8 = 1 << 6;
/// The entry is nobody's.
const VACANT: u8 = 1 << 5;

/// What an entry says of its account: [`RECORD_BITS`], the others are 0.
pub(super) type Record = [u8; RECORD_BYTES];

/// An account's name in a slab: 80 bits of two hashes of its DID under keys that this process drew at random. Two of
/// ten million accounts have the same one with a probability of 4 in 10^11, and nobody can aim at another's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Name {
    place: u64,
    check: u16,
}

/// Gives names; those of two namers have nothing to do with each other.
#[derive(Default)]
pub(super) struct Namer(RandomState, RandomState);

impl Namer {
    pub fn name(&self, did: &Did) -> Name {
        Name {
            place: self.0.hash_one(did.as_str()),
            check: self.1.hash_one(did.as_str()) as u16,
        }
    }
}

#[derive(Clone, Copy)]
struct Entry {
    place: [u8; 8],
    check: [u8; 2],
    record: Record,
}

const _: () = assert!(size_of::<Entry>() == 60 && align_of::<Entry>() == 1);

impl Entry {
    fn place(&self) -> u64 {
        u64::from_le_bytes(self.place)
    }

    fn is(&self, name: Name) -> bool {
        self.place() == name.place && u16::from_le_bytes(self.check) == name.check
    }

    fn has(&self, flags: u8) -> bool {
        self.record[RECORD_BYTES - 1] & flags != 0
    }

    fn set(&mut self, flags: u8) {
        self.record[RECORD_BYTES - 1] |= flags;
    }

    fn clear(&mut self, flags: u8) {
        self.record[RECORD_BYTES - 1] &= !flags;
    }

    /// The record without the slab's bits.
    fn record(&self) -> Record {
        let mut record = self.record;
        record[RECORD_BYTES - 1] &= !(USED | LENT | VACANT);
        record
    }
}

/// A part of the index: open addressing, linear probing. Cells of accounts that want the same place stand behind one
/// another, without gaps.
#[derive(Default)]
struct Part {
    cells: Box<[u32]>,
    taken: usize,
}

/// The entries of one shard.
pub(super) struct Slab {
    entries: Vec<Entry>,
    capacity: usize,
    parts: Box<[Part]>,
    vacant: Vec<u32>,
    lent: usize,
    hand: usize,
}

impl Slab {
    /// Memory of an entry and its share of the index, where that is largest, in bytes.
    pub const ENTRY_BYTES: usize = 66;

    /// A slab that keeps `capacity` accounts.
    pub fn new(capacity: usize) -> Self {
        let capacity = capacity.clamp(1, MAX_ENTRIES);
        let parts = capacity.div_ceil(PART_ENTRIES).next_power_of_two();
        Self {
            // Memory that is only reserved is not resident.
            entries: Vec::with_capacity(capacity),
            capacity,
            parts: (0..parts).map(|_| Part::default()).collect(),
            vacant: Vec::new(),
            lent: 0,
            hand: 0,
        }
    }

    /// How many accounts it keeps, those in use included.
    pub fn len(&self) -> usize {
        self.entries.len() - self.vacant.len()
    }

    /// How many of them are in use.
    pub fn lent(&self) -> usize {
        self.lent
    }

    /// Takes an account into use: what the slab has of it. To be followed by [`Slab::give_back`].
    pub fn lend(&mut self, name: Name) -> Option<Record> {
        let slot = self.slot(name)?;
        let entry = &mut self.entries[slot];
        if !entry.has(LENT) {
            self.lent += 1;
        }
        entry.set(LENT | USED);
        Some(entry.record())
    }

    /// Takes an account back, or in; without a record it is no longer known here. It may find no room.
    pub fn give_back(&mut self, name: Name, record: Option<Record>) {
        match (self.slot(name), record) {
            (Some(slot), Some(record)) => {
                self.unlend(slot);
                let entry = &mut self.entries[slot];
                let used = entry.has(USED);
                entry.record = record;
                if used {
                    entry.set(USED);
                }
            }
            (Some(slot), None) => {
                self.unlend(slot);
                self.vacate(slot);
            }
            (None, Some(record)) => self.insert(name, record),
            (None, None) => {}
        }
    }

    /// Lets the last entries go, so that no more than `kept` remain in memory, and gives their memory back. One whose
    /// account is in use is no longer lent: it comes in anew when it is given back.
    pub fn truncate(&mut self, kept: usize) {
        for slot in (kept..self.entries.len()).rev() {
            if !self.entries[slot].has(VACANT) {
                self.unlend(slot);
                let place = self.entries[slot].place();
                let part = self.part(place);
                self.parts[part].remove(place, slot, &self.entries);
            }
        }
        self.entries.truncate(kept);
        self.vacant.retain(|slot| (*slot as usize) < kept);
        self.hand = 0;
        self.entries.shrink_to_fit();
        // Memory that is only reserved is not resident. Where there is none, it is reserved as accounts come.
        let rest = self.capacity - self.entries.len();
        self.entries.try_reserve_exact(rest).unwrap_or_default();
    }

    fn unlend(&mut self, slot: usize) {
        let entry = &mut self.entries[slot];
        if entry.has(LENT) {
            entry.clear(LENT);
            self.lent -= 1;
        }
    }

    fn insert(&mut self, name: Name, record: Record) {
        let entry = Entry {
            place: name.place.to_le_bytes(),
            check: name.check.to_le_bytes(),
            record,
        };
        let slot = if self.entries.len() < self.capacity && self.vacant.is_empty() {
            self.entries.push(entry);
            self.entries.len() - 1
        } else {
            if self.vacant.is_empty() {
                self.evict();
            }
            let Some(slot) = self.vacant.pop() else {
                return;
            };
            self.entries[slot as usize] = entry;
            slot as usize
        };
        let part = self.part(name.place);
        self.parts[part].insert(name.place, slot, &self.entries);
    }

    /// Lets one entry go, unless all that the hand meets are in use.
    fn evict(&mut self) {
        let mut fallback = None;
        for _ in 0..LOOKS {
            let slot = self.hand;
            self.hand = (slot + 1) % self.entries.len();
            let entry = &mut self.entries[slot];
            if entry.has(LENT | VACANT) {
                continue;
            }
            if !entry.has(USED) {
                return self.vacate(slot);
            }
            entry.clear(USED);
            fallback = fallback.or(Some(slot));
        }
        if let Some(slot) = fallback {
            self.vacate(slot);
        }
    }

    fn vacate(&mut self, slot: usize) {
        let place = self.entries[slot].place();
        let part = self.part(place);
        self.parts[part].remove(place, slot, &self.entries);
        self.entries[slot].set(VACANT);
        self.vacant.push(slot as u32);
    }

    fn part(&self, place: u64) -> usize {
        (place >> 48) as usize & (self.parts.len() - 1)
    }

    fn slot(&self, name: Name) -> Option<usize> {
        let part = &self.parts[self.part(name.place)];
        part.find(name.place, |slot| self.entries[slot].is(name))
            .map(|(_, slot)| slot)
    }
}

impl Part {
    /// The cell and the entry of this place that are `wanted`.
    fn find(&self, place: u64, wanted: impl Fn(usize) -> bool) -> Option<(usize, usize)> {
        if self.cells.is_empty() {
            return None;
        }
        let mut at = self.home(place);
        loop {
            let cell = self.cells[at];
            if cell == 0 {
                return None;
            }
            let slot = slot_of(cell);
            if cell >> SLOT_BITS == tag(place) && wanted(slot) {
                return Some((at, slot));
            }
            at = self.after(at);
        }
    }

    fn insert(&mut self, place: u64, slot: usize, entries: &[Entry]) {
        if (self.taken + 1) * 8 > self.cells.len() * EIGHTHS_TAKEN {
            self.grow(entries);
        }
        self.put(place, cell_of(place, slot));
        self.taken += 1;
    }

    fn put(&mut self, place: u64, cell: u32) {
        let mut at = self.home(place);
        while self.cells[at] != 0 {
            at = self.after(at);
        }
        self.cells[at] = cell;
    }

    fn grow(&mut self, entries: &[Entry]) {
        let cells = self.cells.len() + self.cells.len() / 8 + 8;
        let before = std::mem::replace(&mut self.cells, vec![0; cells].into());
        for cell in before.iter().copied().filter(|&cell| cell != 0) {
            self.put(entries[slot_of(cell)].place(), cell);
        }
    }

    /// Takes a cell out, and moves up those behind it that would not be found any more.
    fn remove(&mut self, place: u64, slot: usize, entries: &[Entry]) {
        let Some((mut gap, _)) = self.find(place, |found| found == slot) else {
            return;
        };
        let mut at = gap;
        loop {
            at = self.after(at);
            let cell = self.cells[at];
            if cell == 0 {
                break;
            }
            let home = self.home(entries[slot_of(cell)].place());
            if self.steps(home, at) >= self.steps(gap, at) {
                self.cells[gap] = cell;
                gap = at;
            }
        }
        self.cells[gap] = 0;
        self.taken -= 1;
    }

    /// Where the search for a place begins: its lower half, scaled to the number of cells.
    fn home(&self, place: u64) -> usize {
        (((place & 0xffff_ffff) * self.cells.len() as u64) >> 32) as usize
    }

    fn after(&self, at: usize) -> usize {
        if at + 1 == self.cells.len() {
            0
        } else {
            at + 1
        }
    }

    fn steps(&self, from: usize, to: usize) -> usize {
        if to >= from {
            to - from
        } else {
            to + self.cells.len() - from
        }
    }
}

fn cell_of(place: u64, slot: usize) -> u32 {
    tag(place) << SLOT_BITS | (slot as u32 + 1)
}

fn slot_of(cell: u32) -> usize {
    (cell & SLOT_MASK) as usize - 1
}

/// Bits of a place that decide neither on the part nor on where the search begins.
fn tag(place: u64) -> u32 {
    (place >> 32) as u32 & ((1 << (u32::BITS - SLOT_BITS)) - 1)
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use proptest::prelude::*;

    use super::*;

    fn record(number: u64) -> Record {
        let mut record = [0; RECORD_BYTES];
        record[..8].copy_from_slice(&number.to_le_bytes());
        record
    }

    /// Few places, so that cells crowd and names differ in the check alone.
    fn name(number: u8) -> Name {
        Name {
            place: u64::from(number / 4) << 31,
            check: u16::from(number),
        }
    }

    #[derive(Clone, Debug)]
    enum Step {
        Lend(u8),
        GiveBack(u8, u64),
        Forget(u8),
        Truncate(u8),
    }

    fn steps() -> impl Strategy<Value = Vec<Step>> {
        let step = prop_oneof![
            any::<u8>().prop_map(Step::Lend),
            (any::<u8>(), any::<u64>()).prop_map(|(name, number)| Step::GiveBack(name, number)),
            any::<u8>().prop_map(Step::Forget),
            any::<u8>().prop_map(Step::Truncate),
        ];
        prop::collection::vec(step, 0..600)
    }

    /// Carries the steps out beside a map. What the slab has is what the map has; with room for all, nothing is missing.
    fn compare(steps: &[Step], capacity: usize) {
        let mut slab = Slab::new(capacity);
        let mut model: HashMap<u8, u64> = HashMap::new();
        let mut lent: Vec<u8> = Vec::new();
        for step in steps {
            match *step {
                Step::Lend(key) => {
                    let found = slab.lend(name(key));
                    if let Some(found) = found {
                        assert_eq!(found, record(model[&key]));
                        lent.push(key);
                    } else {
                        assert!(!lent.contains(&key), "what is lent stays");
                        assert!(capacity < 256 || !model.contains_key(&key));
                    }
                }
                Step::GiveBack(key, number) => {
                    slab.give_back(name(key), Some(record(number)));
                    model.insert(key, number);
                    lent.retain(|&other| other != key);
                }
                Step::Forget(key) => {
                    slab.give_back(name(key), None);
                    model.remove(&key);
                    lent.retain(|&other| other != key);
                    assert!(slab.slot(name(key)).is_none());
                }
                Step::Truncate(kept) => {
                    slab.truncate(kept.into());
                    let stays = |key: &u8| slab.slot(name(*key)).is_some();
                    model.retain(|key, _| stays(key));
                    lent.retain(stays);
                    assert!(slab.entries.len() <= kept.into());
                }
            }
            lent.sort_unstable();
            lent.dedup();
            assert_eq!(slab.lent(), lent.len());
            assert!(slab.len() <= capacity);
            if capacity >= 256 {
                assert_eq!(slab.len(), model.len());
            }
        }
        for (key, number) in model {
            if let Some(found) = slab.lend(name(key)) {
                assert_eq!(found, record(number));
            } else {
                assert!(capacity < 256);
            }
        }
    }

    proptest! {
        #[test]
        fn with_room_it_is_a_map(steps in steps()) {
            compare(&steps, 256);
        }

        #[test]
        fn without_room_it_forgets_but_never_errs(steps in steps(), capacity in 1..80_usize) {
            compare(&steps, capacity);
        }
    }

    #[test]
    fn the_used_stay_longer_and_the_lent_stay() {
        let mut slab = Slab::new(3);
        for key in [0, 1, 2] {
            slab.give_back(name(key), Some(record(u64::from(key))));
        }
        slab.lend(name(0));
        slab.lend(name(1));
        slab.give_back(name(1), Some(record(1)));
        slab.give_back(name(3), Some(record(3)));
        let kept: Vec<bool> = (0..4).map(|key| slab.slot(name(key)).is_some()).collect();
        assert_eq!(kept, [true, true, false, true]);
        slab.give_back(name(4), Some(record(4)));
        assert!(slab.slot(name(0)).is_some(), "in use");
    }

    #[test]
    fn with_all_in_use_a_new_one_finds_no_room() {
        let mut slab = Slab::new(2);
        for key in [0, 1] {
            slab.give_back(name(key), Some(record(0)));
            slab.lend(name(key));
        }
        slab.give_back(name(2), Some(record(0)));
        assert_eq!((slab.len(), slab.slot(name(2))), (2, None));
    }

    #[test]
    fn the_index_takes_little_more_than_four_bytes_an_account() {
        let namer = Namer::default();
        let mut slab = Slab::new(50_000);
        for number in 0..50_000 {
            let did = Did::parse(&format!("did:web:{number}.example")).unwrap();
            slab.give_back(namer.name(&did), Some(record(number)));
        }
        let cells: usize = slab.parts.iter().map(|part| part.cells.len()).sum();
        let bytes = size_of::<Entry>() as f64 + cells as f64 * 4.0 / slab.len() as f64;
        assert!((64.5..Slab::ENTRY_BYTES as f64).contains(&bytes), "{bytes}");
    }
}
