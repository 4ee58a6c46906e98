//! The handles of all known hosts, by number and by name. Hosts are added, never removed.

use std::collections::HashMap;
use std::sync::Arc;

use parking_lot::RwLock;

use super::handle::HostHandle;
use super::state::HostState;
use crate::store::HostId;

/// All known hosts. Clones share them.
#[derive(Clone, Debug, Default)]
pub struct HostIndex(Arc<RwLock<Handles>>);

#[derive(Debug, Default)]
struct Handles {
    by_id: HashMap<HostId, Arc<HostHandle>>,
    by_name: HashMap<Arc<str>, Arc<HostHandle>>,
}

impl HostIndex {
    /// The host of that number.
    pub fn get(&self, id: HostId) -> Option<Arc<HostHandle>> {
        self.0.read().by_id.get(&id).cloned()
    }

    /// The host of that normalised name.
    pub fn by_name(&self, name: &str) -> Option<Arc<HostHandle>> {
        self.0.read().by_name.get(name).cloned()
    }

    /// Every known host, the oldest first.
    pub fn list(&self) -> Vec<Arc<HostHandle>> {
        let mut hosts: Vec<_> = self.0.read().by_id.values().cloned().collect();
        hosts.sort_by_key(|host| host.id());
        hosts
    }

    /// The number of known hosts.
    pub fn count(&self) -> usize {
        self.0.read().by_id.len()
    }

    /// How many hosts are in each state.
    pub fn states(&self) -> Vec<(HostState, usize)> {
        let mut counts = HostState::ALL.map(|state| (state, 0));
        for host in self.0.read().by_id.values() {
            counts[host.state() as usize].1 += 1;
        }
        counts.to_vec()
    }

    /// Whether any host has events in flight.
    pub fn is_busy(&self) -> bool {
        let handles = self.0.read();
        let mut hosts = handles.by_id.values();
        hosts.any(|host| host.progress().in_flight().0 > 0)
    }

    /// From now on an event that is given up counts as neither durable nor dropped, so that no cursor moves past it.
    pub fn freeze(&self) {
        for host in self.list() {
            host.progress().freeze();
        }
    }

    /// Bytes of in-flight frames in the hosts' own shares of the memory.
    pub(super) fn own_bytes(&self) -> usize {
        let handles = self.0.read();
        let hosts = handles.by_id.values();
        hosts.map(|host| host.progress().own_bytes()).sum()
    }

    /// What `of` yields for each host.
    pub(super) fn filter_map<T>(&self, of: impl FnMut(&Arc<HostHandle>) -> Option<T>) -> Vec<T> {
        self.0.read().by_id.values().filter_map(of).collect()
    }

    /// The host of that number; `make` makes its handle where it is not known.
    pub(super) fn get_or_insert(
        &self,
        id: HostId,
        make: impl FnOnce() -> HostHandle,
    ) -> Arc<HostHandle> {
        let mut handles = self.0.write();
        if let Some(handle) = handles.by_id.get(&id) {
            return handle.clone();
        }
        let handle = Arc::new(make());
        handles.by_id.insert(id, handle.clone());
        handles
            .by_name
            .insert(handle.host().shared_name(), handle.clone());
        handle
    }
}
