//! The registry of hosts: every known host, its quotas, bans and stored statuses, and the memory that all share.
//! Connects to none of them.

use std::collections::HashMap;
use std::sync::Arc;

use parking_lot::{Mutex, RwLock};

use super::bans::DomainBans;
use super::checkpoint::{self, Checkpoint, Checkpoints};
use super::handle::HostHandle;
use super::index::HostIndex;
use super::memory::{Memory, MemoryUse};
use super::metrics::Metrics;
use super::progress::{InFlightLimits, RecoveredHost};
use super::settings::{HostLimits, Settings};
use super::statuses::StatusWriter;
use crate::atproto::did::Did;
use crate::dial::{DomainPattern, Guard, HostName};
use crate::store::{
    HostId, HostRow, HostStatus, NewHost, RateOverrides, Store, StoreError, Validation,
};

/// Settings of the registry.
#[derive(Clone, Debug)]
pub struct HostsOptions {
    /// The rules for dialling: a host whose name they refuse is left out.
    pub guard: Guard,
    /// What an operator sets.
    pub settings: Settings,
    /// In-flight events of one host.
    pub in_flight: InFlightLimits,
    pub metrics: Metrics,
}

impl Default for HostsOptions {
    fn default() -> Self {
        Self {
            guard: Guard::new(false),
            settings: Settings::default(),
            in_flight: InFlightLimits::default(),
            metrics: Metrics::default(),
        }
    }
}

/// Why a host was not added.
#[derive(Debug, thiserror::Error)]
pub enum AddError {
    /// The host, or a domain above it, is banned.
    #[error("{0} is banned")]
    Banned(HostName),
    /// The database failed.
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// The registry of hosts. Clones share everything.
#[derive(Clone)]
pub struct Hosts {
    inner: Arc<Inner>,
}

struct Inner {
    guard: Guard,
    in_flight: InFlightLimits,
    memory: Arc<Memory>,
    metrics: Arc<Metrics>,
    store: Store,
    index: HostIndex,
    limits: RwLock<HostLimits>,
    trusted_domains: RwLock<Vec<DomainPattern>>,
    bans: DomainBans,
    /// What recovery found, for hosts that have no handle yet.
    recovered: Mutex<HashMap<HostId, RecoveredHost>>,
    statuses: StatusWriter,
    checkpoints: Checkpoints,
}

impl Hosts {
    /// Reads hosts and bans from the database. `recovered` is what recovery found in the log; a host that it does not
    /// name resumes from its row.
    ///
    /// # Errors
    /// The database's.
    pub async fn load(
        options: HostsOptions,
        store: Store,
        recovered: HashMap<HostId, RecoveredHost>,
    ) -> Result<Self, StoreError> {
        let metrics = Arc::new(options.metrics);
        let rows = store.hosts().await?;
        let Settings {
            limits,
            trusted_domains,
            banned_domains,
            memory,
        } = options.settings;
        let inner = Inner {
            guard: options.guard,
            in_flight: options.in_flight,
            memory: Memory::new(memory, metrics.clone()),
            metrics,
            index: HostIndex::default(),
            limits: RwLock::new(limits),
            trusted_domains: RwLock::new(trusted_domains),
            bans: DomainBans::load(store.clone(), banned_domains).await?,
            recovered: Mutex::new(recovered),
            statuses: StatusWriter::new(store.clone()),
            checkpoints: Checkpoints::default(),
            store,
        };
        for row in rows {
            inner.enter(&row);
        }
        Ok(Self {
            inner: Arc::new(inner),
        })
    }

    /// The handles of all known hosts.
    pub fn index(&self) -> &HostIndex {
        &self.inner.index
    }

    /// The host of that number.
    pub fn get(&self, id: HostId) -> Option<Arc<HostHandle>> {
        self.inner.index.get(id)
    }

    /// The host of that normalised name.
    pub fn by_name(&self, name: &str) -> Option<Arc<HostHandle>> {
        self.inner.index.by_name(name)
    }

    /// Every known host, the oldest first.
    pub fn list(&self) -> Vec<Arc<HostHandle>> {
        self.inner.index.list()
    }

    /// The number of known hosts.
    pub fn count(&self) -> usize {
        self.inner.index.count()
    }

    /// Sets the gauges that are sampled.
    pub(crate) fn sample(&self) {
        let metrics = &self.inner.metrics;
        for (state, count) in self.inner.index.states() {
            metrics.states[state as usize].set(count as i64);
        }
        let memory = self.memory();
        let parts = [memory.own, memory.shared, memory.parked];
        for (gauge, bytes) in metrics.memory.iter().zip(parts) {
            gauge.set(bytes as i64);
        }
    }

    /// How much of the memory for hosts' frames is in use.
    pub fn memory(&self) -> MemoryUse {
        MemoryUse {
            own: self.inner.index.own_bytes(),
            ..self.inner.memory.in_use()
        }
    }

    /// The host, added to the database where it is not known.
    ///
    /// # Errors
    /// See [`AddError`].
    pub async fn add(&self, host: &HostName) -> Result<Arc<HostHandle>, AddError> {
        if self.is_banned(host) {
            return Err(AddError::Banned(host.clone()));
        }
        if let Some(known) = self.by_name(host.name()) {
            return Ok(known);
        }
        let row = self.inner.store.add_host(&self.inner.new_row(host)).await?;
        self.inner
            .enter(&row)
            .ok_or_else(|| AddError::Banned(host.clone()))
    }

    /// Whether a host or a domain above it is banned.
    pub fn is_banned(&self, host: &HostName) -> bool {
        let banned_itself = || {
            self.by_name(host.name())
                .is_some_and(|known| known.status() == HostStatus::Banned)
        };
        self.is_domain_banned(host.domain()) || banned_itself()
    }

    /// Whether a domain, or one above it, is banned.
    pub fn is_domain_banned(&self, domain: &str) -> bool {
        self.inner.bans.matches(domain)
    }

    /// Whether a host would get the trusted quota.
    pub fn is_trusted(&self, host: &HostName) -> bool {
        self.inner.is_trusted(host)
    }

    /// Applies other settings, all but the memory: rates count for the next event of each host, quotas and trust for new
    /// hosts.
    pub(crate) fn apply(&self, settings: &Settings) {
        *self.inner.limits.write() = settings.limits;
        self.inner
            .trusted_domains
            .write()
            .clone_from(&settings.trusted_domains);
        let banned = settings.banned_domains.clone();
        self.inner.bans.set_configured(banned);
        for host in self.list() {
            host.apply_limits(&settings.limits);
        }
    }

    /// Stores the ban of a domain and all below it. Returns whether it was not banned before.
    pub(crate) async fn ban_domain(&self, domain: &str) -> Result<bool, StoreError> {
        self.inner.bans.add(domain).await
    }

    /// Removes the stored ban of a domain. Returns whether there was one.
    pub(crate) async fn unban_domain(&self, domain: &str) -> Result<bool, StoreError> {
        self.inner.bans.remove(domain).await
    }

    /// Stores an operator's decision about a host's status.
    pub(crate) async fn set_status(
        &self,
        id: HostId,
        status: HostStatus,
    ) -> Result<(), StoreError> {
        self.inner.statuses.set(&self.inner.index, id, status).await
    }

    /// Stores statuses and sync 1.1 marks that changed.
    pub(crate) async fn write_changed_statuses(&self) {
        self.inner.statuses.write_changed(&self.inner.index).await;
    }

    /// Sets the account quota of a host, and with it the event rates that follow from it. Returns the throttled
    /// accounts that now have room, the oldest first; the database has released them already.
    ///
    /// # Errors
    /// The database's; then nothing changed.
    pub async fn set_account_limit(&self, id: HostId, limit: i64) -> Result<Vec<Did>, StoreError> {
        let released = self.inner.store.set_account_limit(id, limit).await?;
        if let Some(host) = self.get(id) {
            host.set_account_limit(limit, &self.inner.limits.read());
        }
        Ok(released)
    }

    /// Sets the event rates of a host; they are in force for the next event.
    ///
    /// # Errors
    /// The database's; then nothing changed.
    pub async fn set_rates(&self, id: HostId, rates: RateOverrides) -> Result<(), StoreError> {
        self.inner.store.set_host_rates(id, rates).await?;
        if let Some(host) = self.get(id) {
            host.set_overrides(rates, &self.inner.limits.read());
        }
        Ok(())
    }

    /// Sets the validation mode of a host; `None` puts it under the general one.
    ///
    /// # Errors
    /// The database's; then nothing changed.
    pub async fn set_validation(
        &self,
        id: HostId,
        validation: Option<Validation>,
    ) -> Result<(), StoreError> {
        self.inner.store.set_host_validation(id, validation).await?;
        if let Some(host) = self.get(id) {
            host.set_validation(validation);
        }
        Ok(())
    }

    /// Takes the cursors that moved since the last call. To be written together with a [`Hosts::replay_floor`] that was
    /// computed before: see [`Hosts::take_checkpoint`].
    pub fn take_moved_cursors(&self) -> Vec<(HostId, i64)> {
        checkpoint::take_moved_cursors(&self.inner.index)
    }

    /// The log seq from which recovery must read so that it finds every durable event above a cursor. `head` is a log
    /// seq up to which every event has been settled.
    pub fn replay_floor(&self, head: u64) -> u64 {
        checkpoint::replay_floor(&self.inner.index, head)
    }

    /// Takes the moved cursors, and the replay floor that belongs to them.
    pub fn take_checkpoint(&self, head: u64) -> Checkpoint {
        self.inner.checkpoints.take(&self.inner.index, head)
    }

    /// The highest head of the log that a checkpoint was taken with.
    pub(crate) fn checkpoint_head(&self) -> u64 {
        self.inner.checkpoints.highest_head()
    }
}

impl Inner {
    fn is_trusted(&self, host: &HostName) -> bool {
        let trusted = self.trusted_domains.read();
        trusted.iter().any(|domain| domain.matches(host.domain()))
    }

    fn new_row(&self, host: &HostName) -> NewHost {
        let trusted = self.is_trusted(host);
        let limits = self.limits.read();
        let accounts = if trusted {
            limits.trusted_accounts
        } else {
            limits.accounts
        };
        let mut row = NewHost::new(host.name(), host.tls(), trusted);
        row.account_limit = i64::try_from(accounts).unwrap_or(i64::MAX);
        row
    }

    /// Makes the handle of a row; `None` if its name may no longer be dialled.
    fn enter(&self, row: &HostRow) -> Option<Arc<HostHandle>> {
        let host = HostName::from_parts(&row.hostname, row.tls, &self.guard)
            .inspect_err(|error| tracing::warn!(host = row.hostname, %error, "host in the database is left out"))
            .ok()?;
        Some(self.index.get_or_insert(row.id, || {
            let recovered = self.recovered.lock().remove(&row.id);
            let recovered = recovered.unwrap_or_else(|| RecoveredHost {
                cursor: row.cursor,
                ..RecoveredHost::default()
            });
            self.memory.add_host();
            let memory = self.memory.clone();
            let limits = self.limits.read();
            HostHandle::new(
                row,
                host,
                recovered,
                self.in_flight,
                memory,
                &limits,
                self.metrics.clone(),
            )
        }))
    }
}
