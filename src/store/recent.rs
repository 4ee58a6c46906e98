//! Account changes that readers must see already and the database does not have yet. Promises that a read that began
//! after a change was announced has it, whenever the change reaches the database. Writes nothing.

use parking_lot::{Mutex, MutexGuard};

use super::rows::{AccountRow, AccountUpdate};
use super::status::LocalStatus;
use crate::atproto::did::Did;
use std::collections::{BTreeMap, HashMap, VecDeque};
use std::sync::Arc;

/// Accounts read or removed under one lock, so that an announcement waits for some tens of microseconds at most.
const LOCKED_ACCOUNTS: usize = 256;

/// How many changes of each account a write brought to the database.
pub(super) type Written = Vec<(Did, u32)>;

/// The changes. Clones share them.
#[derive(Clone, Default)]
pub(super) struct Recent(Arc<Mutex<State>>);

#[derive(Default)]
struct State {
    accounts: HashMap<Did, Entry>,
    /// Grows with every write that waits for reads to end.
    generation: u64,
    /// Number of reads in progress, by the generation in which they began.
    reads: BTreeMap<u64, usize>,
    /// Writes that ended during reads: such a read may have missed them in the database.
    held: VecDeque<(u64, Written)>,
}

/// All announced changes of an account that are not yet removed, merged.
struct Entry {
    update: AccountUpdate,
    changes: u32,
}

impl Recent {
    /// Makes changes visible to every read that begins from now on.
    pub fn announce<'a>(&self, updates: impl IntoIterator<Item = &'a AccountUpdate>) {
        let mut state = self.lock();
        for update in updates {
            match state.accounts.get_mut(&update.did) {
                Some(entry) => {
                    entry.update.merge(update.clone());
                    entry.changes += 1;
                }
                None => {
                    let entry = Entry {
                        update: update.clone(),
                        changes: 1,
                    };
                    state.accounts.insert(update.did.clone(), entry);
                }
            }
        }
    }

    /// Removes changes that are in the database, as soon as no read is in progress that began before they were there.
    pub fn written(&self, written: Written) {
        let mut state = self.lock();
        if state.reads.is_empty() {
            drop(state);
            return self.remove(&written);
        }
        let generation = state.generation;
        state.held.push_back((generation, written));
        state.generation += 1;
    }

    /// Begins a read. What is read from the database until it is dropped is completed by it.
    pub fn read(&self) -> Reading<'_> {
        let mut state = self.lock();
        let began = state.generation;
        *state.reads.entry(began).or_default() += 1;
        Reading {
            recent: self,
            began,
        }
    }

    fn remove(&self, written: &[(Did, u32)]) {
        for part in written.chunks(LOCKED_ACCOUNTS) {
            let mut state = self.lock();
            for (did, changes) in part {
                let Some(entry) = state.accounts.get_mut(did) else {
                    continue;
                };
                entry.changes = entry.changes.saturating_sub(*changes);
                if entry.changes == 0 {
                    state.accounts.remove(did);
                }
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock()
    }
}

/// A read in progress. Must begin before the database is queried.
pub(super) struct Reading<'a> {
    recent: &'a Recent,
    began: u64,
}

impl Reading<'_> {
    /// The account, from what the database has of it.
    pub fn account(&self, did: &Did, row: Option<AccountRow>) -> Option<AccountRow> {
        let state = self.recent.lock();
        let Some(Entry { update, .. }) = state.accounts.get(did) else {
            return row;
        };
        match row {
            Some(mut row) => {
                row.apply(update);
                Some(row)
            }
            None => AccountRow::created(update),
        }
    }

    /// Completes rows of the database.
    pub fn complete(&self, rows: &mut [AccountRow]) {
        for part in rows.chunks_mut(LOCKED_ACCOUNTS) {
            let state = self.recent.lock();
            for row in part {
                if let Some(entry) = state.accounts.get(&row.did) {
                    row.apply(&entry.update);
                }
            }
        }
    }

    /// The accounts whose latest decision is this one and not yet in the database.
    pub fn decided(&self, local: LocalStatus) -> Vec<Did> {
        let state = self.recent.lock();
        let decided = |entry: &&Entry| entry.update.local == Some(local);
        let entries = state.accounts.values().filter(decided);
        entries.map(|entry| entry.update.did.clone()).collect()
    }
}

impl Drop for Reading<'_> {
    fn drop(&mut self) {
        let mut free = Vec::new();
        let mut state = self.recent.lock();
        if let Some(reads) = state.reads.get_mut(&self.began) {
            *reads -= 1;
            if *reads == 0 {
                state.reads.remove(&self.began);
            }
        }
        let oldest = state.reads.keys().next().copied();
        while let Some((generation, _)) = state.held.front()
            && oldest.is_none_or(|oldest| *generation < oldest)
        {
            free.extend(state.held.pop_front());
        }
        drop(state);
        for (_, written) in free {
            self.recent.remove(&written);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::HostId;

    fn did(number: u32) -> Did {
        Did::parse(&format!("did:web:{number}.example")).unwrap()
    }

    fn decision(number: u32, local: LocalStatus) -> AccountUpdate {
        AccountUpdate {
            local: Some(local),
            host: Some(HostId(1)),
            ..AccountUpdate::new(did(number))
        }
    }

    fn seen(reading: &Reading<'_>, number: u32) -> Option<LocalStatus> {
        let row = reading.account(&did(number), None)?;
        Some(row.local)
    }

    #[test]
    fn a_change_stays_until_all_changes_of_its_account_are_written() {
        let recent = Recent::default();
        recent.announce([&decision(1, LocalStatus::TakenDown)]);
        recent.announce([&decision(1, LocalStatus::Active)]);
        recent.written(vec![(did(1), 1)]);
        assert_eq!(seen(&recent.read(), 1), Some(LocalStatus::Active));
        recent.written(vec![(did(1), 1)]);
        assert_eq!(seen(&recent.read(), 1), None);
    }

    #[test]
    fn a_read_that_began_before_a_write_ended_still_has_its_changes() {
        let recent = Recent::default();
        recent.announce([&decision(1, LocalStatus::TakenDown)]);
        let early = recent.read();
        recent.written(vec![(did(1), 1)]);
        let late = recent.read();
        recent.announce([&decision(2, LocalStatus::TakenDown)]);
        recent.written(vec![(did(2), 1)]);
        assert_eq!(seen(&early, 1), Some(LocalStatus::TakenDown));
        drop(early);
        assert_eq!(seen(&late, 1), None);
        assert_eq!(seen(&late, 2), Some(LocalStatus::TakenDown));
        drop(late);
        assert!(recent.lock().accounts.is_empty());
        assert!(recent.lock().held.is_empty());
    }
}
