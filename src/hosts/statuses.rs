//! Writes the hosts' statuses and sync 1.1 marks to the database: an operator's decision at once, the rest when asked.

use tokio::sync::Mutex;

use super::index::HostIndex;
use crate::store::{HostId, HostStatus, Store, StoreError};

/// Writes statuses to the database, one writer at a time.
pub(super) struct StatusWriter {
    store: Store,
    /// Held while a status is written, so that an operator's decision and a periodic write do not overtake each other.
    writing: Mutex<()>,
}

impl StatusWriter {
    pub(super) fn new(store: Store) -> Self {
        Self {
            store,
            writing: Mutex::new(()),
        }
    }

    /// Writes an operator's decision about a host.
    pub(super) async fn set(
        &self,
        hosts: &HostIndex,
        id: HostId,
        status: HostStatus,
    ) -> Result<(), StoreError> {
        let _writing = self.writing.lock().await;
        self.store.set_host_status(id, status).await?;
        if let Some(host) = hosts.get(id) {
            host.set_stored_status(status);
        }
        Ok(())
    }

    /// Writes statuses and sync 1.1 marks that changed. After a failure the rest is written by the next call.
    pub(super) async fn write_changed(&self, hosts: &HostIndex) {
        let _writing = self.writing.lock().await;
        for host in hosts.list() {
            if let Some(status) = host.unstored_status() {
                match self.store.set_host_status(host.id(), status).await {
                    Ok(()) => host.status_was_stored(status),
                    Err(error) => {
                        return self
                            .store
                            .complain("host statuses are not written yet", &error);
                    }
                }
            }
            if host.has_unstored_sync11() {
                match self.store.mark_sync11(host.id()).await {
                    Ok(()) => host.sync11_was_stored(),
                    Err(error) => {
                        return self
                            .store
                            .complain("sync 1.1 marks are not written yet", &error);
                    }
                }
            }
        }
    }
}
