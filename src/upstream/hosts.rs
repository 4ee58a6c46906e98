//! The supervisor: every known host with its handle and its task, bans, limits, and the cursors for the database.
//! It decides who is connected; what a host sends goes past it.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, RwLock, RwLockReadGuard, RwLockWriteGuard};
use std::time::Duration;

use tokio::sync::Semaphore;
use tokio::task::JoinHandle;
use tokio::time::{MissedTickBehavior, interval, timeout};
use tokio_util::sync::CancellationToken;

use super::Sink;
use super::backoff::Backoff;
use super::connection::{Times, rule};
use super::handle::{HostHandle, HostState};
use super::memory::{Memory, MemoryUse};
use super::news::Lines;
use super::progress::{InFlightLimits, RecoveredHost};
use super::runner::{Runner, Shared};
use crate::atproto::did::Did;
use crate::config::{DomainPattern, HostLimits, MemoryLimits, Validation};
use crate::dial::{Guard, PdsHost};
use crate::store::{HostId, HostRow, HostStatus, NewHost, RateOverrides, Store, StoreError};
use crate::telemetry::metrics;

/// How often changed statuses are written and states counted.
const HOUSEKEEPING: Duration = Duration::from_secs(1);

/// Shortest time between two attempts at a host because somebody asked for it: a request must not make the relay a
/// hammer.
const WAKE_DISTANCE: Duration = Duration::from_secs(30);

/// Longest wait for the connections to close when the relay goes down.
const SHUTDOWN_TIMEOUT: Duration = Duration::from_secs(10);

/// Settings of the supervisor.
#[derive(Clone, Debug)]
pub struct HostsOptions {
    /// The rules for dialling.
    pub guard: Guard,
    /// What may change while hosts are connected.
    pub policy: Policy,
    /// How much of one host may be under way.
    pub in_flight: InFlightLimits,
    /// Memory for what all of them have under way.
    pub memory: MemoryLimits,
    /// The schedule of attempts.
    pub backoff: Backoff,
    /// Longest time for TCP, TLS and WebSocket handshake together.
    pub handshake_timeout: Duration,
    /// Time between two pings to a host.
    pub ping_interval: Duration,
    /// Longest silence of a host, pongs included.
    pub idle_timeout: Duration,
    /// Longest time from the first byte of a host's message to its last.
    pub message_timeout: Duration,
    /// How long a host that is a relay is left alone.
    pub refused_pause: Duration,
    /// Handshakes under way at one time.
    pub handshakes: usize,
}

impl Default for HostsOptions {
    fn default() -> Self {
        Self {
            guard: Guard::new(false),
            policy: Policy::default(),
            in_flight: InFlightLimits::default(),
            memory: MemoryLimits::default(),
            backoff: Backoff::default(),
            handshake_timeout: Duration::from_secs(15),
            ping_interval: Duration::from_secs(30),
            idle_timeout: Duration::from_secs(90),
            message_timeout: Duration::from_secs(30),
            refused_pause: Duration::from_secs(24 * 60 * 60),
            handshakes: 256,
        }
    }
}

/// What of [`HostsOptions`] may change while hosts are connected.
#[derive(Clone, Debug, Default)]
pub struct Policy {
    /// Quotas and rates of hosts without their own.
    pub limits: HostLimits,
    /// Hosts that get the trusted quota.
    pub trusted_domains: Vec<DomainPattern>,
    /// Domains that are banned by configuration, beside those in the database.
    pub banned_domains: Vec<DomainPattern>,
}

/// Why a host was not added.
#[derive(Debug, thiserror::Error)]
pub enum AddError {
    /// The host, or a domain above it, is banned.
    #[error("{0} is banned")]
    Banned(PdsHost),
    /// The database failed.
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// What is to be written to the database so that recovery finds every host where it is.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Checkpoint {
    /// Cursors that moved since the last checkpoint.
    pub cursors: Vec<(HostId, i64)>,
    /// From which log seq on recovery must read the log.
    pub replay_from: u64,
}

/// The supervisor of all hosts. Clones share everything.
#[derive(Clone)]
pub struct Hosts {
    inner: Arc<Inner>,
}

struct Inner {
    options: HostsOptions,
    policy: RwLock<Policy>,
    memory: Arc<Memory>,
    store: Store,
    known: RwLock<Known>,
    tasks: Mutex<HashMap<HostId, Task>>,
    bans: RwLock<HashMap<String, DomainPattern>>,
    recovered: Mutex<HashMap<HostId, RecoveredHost>>,
    /// Held while a status is written, so that an operator's word and the supervisor's do not cross.
    status_writes: tokio::sync::Mutex<()>,
    spawn: Spawn,
    /// What the runners share; told of every checkpoint.
    shared: Arc<Shared>,
    cancel: CancellationToken,
}

/// Starts the task of a host; keeps the sink's type out of the supervisor's.
type Spawn = Box<dyn Fn(Arc<HostHandle>, CancellationToken) -> JoinHandle<()> + Send + Sync>;

#[derive(Default)]
struct Known {
    by_id: HashMap<HostId, Arc<HostHandle>>,
    by_name: HashMap<Arc<str>, Arc<HostHandle>>,
}

struct Task {
    cancel: CancellationToken,
    join: JoinHandle<()>,
}

impl Hosts {
    /// Reads hosts and bans from the database. `recovered` is what recovery found in the log; a host that it does not
    /// name resumes from its row. Nothing is dialled before [`Hosts::start`].
    ///
    /// # Errors
    /// The database's.
    pub async fn new<S: Sink>(
        mut options: HostsOptions,
        store: Store,
        recovered: HashMap<HostId, RecoveredHost>,
        sink: Arc<S>,
    ) -> Result<Self, StoreError> {
        metrics().register_rules(rule::ALL);
        let shared = Arc::new(Shared {
            guard: options.guard,
            store: store.clone(),
            backoff: options.backoff,
            times: Times {
                handshake: options.handshake_timeout,
                ping: options.ping_interval,
                idle: options.idle_timeout,
                message: options.message_timeout,
            },
            refused_pause: options.refused_pause,
            lines: Lines::default(),
            handshakes: Semaphore::new(options.handshakes.max(1)),
            log_head: AtomicU64::new(0),
        });
        let runners = shared.clone();
        let spawn: Spawn = Box::new(move |host, cancel| {
            tokio::spawn(Runner::new(host, sink.clone(), runners.clone(), cancel).run())
        });
        let rows = store.hosts().await?;
        let bans = store.domain_bans().await?;
        let policy = std::mem::take(&mut options.policy);
        let memory = Memory::new(options.memory);
        let inner = Inner {
            memory,
            options,
            policy: RwLock::new(policy),
            store,
            known: RwLock::default(),
            tasks: Mutex::default(),
            bans: RwLock::new(
                bans.into_iter()
                    .filter_map(|domain| pattern(&domain))
                    .collect(),
            ),
            recovered: Mutex::new(recovered),
            status_writes: tokio::sync::Mutex::new(()),
            spawn,
            shared,
            cancel: CancellationToken::new(),
        };
        let hosts = Self {
            inner: Arc::new(inner),
        };
        for row in rows {
            hosts.inner.learn(&row);
        }
        Ok(hosts)
    }

    /// Connects to every host that is not banned, and keeps the database's statuses up to date.
    pub fn start(&self) {
        for host in self.list() {
            self.inner.run(&host);
        }
        tokio::spawn(housekeeping(self.inner.clone()));
    }

    /// Adds a host and connects to it. One that is known already and waits for its next attempt is tried at once,
    /// unless the last attempt was less than 30 seconds ago.
    ///
    /// # Errors
    /// See [`AddError`].
    pub async fn add(&self, host: &PdsHost) -> Result<Arc<HostHandle>, AddError> {
        if self.is_banned(host) {
            return Err(AddError::Banned(host.clone()));
        }
        if let Some(known) = self.by_name(host.name()) {
            if self.inner.is_running(known.id()) {
                known.wake_if_waiting(WAKE_DISTANCE);
            } else {
                self.inner.run(&known);
            }
            return Ok(known);
        }
        let row = self.inner.store.add_host(&self.inner.new_row(host)).await?;
        let handle = self
            .inner
            .learn(&row)
            .ok_or_else(|| AddError::Banned(host.clone()))?;
        self.inner.run(&handle);
        Ok(handle)
    }

    /// The host of that number.
    pub fn get(&self, id: HostId) -> Option<Arc<HostHandle>> {
        self.inner.known().by_id.get(&id).cloned()
    }

    /// The host of that normalised name.
    pub fn by_name(&self, name: &str) -> Option<Arc<HostHandle>> {
        self.inner.known().by_name.get(name).cloned()
    }

    /// Every known host, the oldest first.
    pub fn list(&self) -> Vec<Arc<HostHandle>> {
        let mut hosts: Vec<_> = self.inner.known().by_id.values().cloned().collect();
        hosts.sort_by_key(|host| host.id());
        hosts
    }

    /// How many hosts are known.
    pub fn count(&self) -> usize {
        self.inner.known().by_id.len()
    }

    /// How many hosts are in each state.
    pub fn states(&self) -> Vec<(HostState, usize)> {
        let mut counts = HostState::ALL.map(|state| (state, 0));
        for host in self.inner.known().by_id.values() {
            counts[host.state() as usize].1 += 1;
        }
        counts.to_vec()
    }

    /// What of the memory for hosts' frames is in use.
    pub fn memory(&self) -> MemoryUse {
        let known = self.inner.known();
        MemoryUse {
            own: known
                .by_id
                .values()
                .map(|host| host.progress().own_bytes())
                .sum(),
            ..self.inner.memory.in_use()
        }
    }

    /// Whether events are on their way from a socket to the log.
    pub fn is_busy(&self) -> bool {
        let known = self.inner.known();
        known
            .by_id
            .values()
            .any(|host| host.progress().in_flight().0 > 0)
    }

    /// Whether a host or a domain above it is banned.
    pub fn is_banned(&self, host: &PdsHost) -> bool {
        let banned_itself = || {
            self.by_name(host.name())
                .is_some_and(|known| known.status() == HostStatus::Banned)
        };
        self.inner.is_domain_banned(host.domain()) || banned_itself()
    }

    /// Whether a host would get the trusted quota.
    pub fn is_trusted(&self, host: &PdsHost) -> bool {
        self.inner.is_trusted(host)
    }

    /// Bans a host and closes its connection.
    ///
    /// # Errors
    /// The database's; then nothing changed.
    pub async fn ban(&self, id: HostId) -> Result<(), StoreError> {
        self.inner.stop(id).await;
        let written = self.inner.write_status(id, HostStatus::Banned).await;
        // Somebody may have asked for it meanwhile.
        self.inner.stop(id).await;
        if let Some(host) = self.get(id) {
            // Without the ban in the database it is connected again.
            self.inner.run(&host);
        }
        written
    }

    /// Lifts the ban of a host and connects to it, unless a domain above it is banned.
    ///
    /// # Errors
    /// The database's; then nothing changed.
    pub async fn unban(&self, id: HostId) -> Result<(), StoreError> {
        self.inner.write_status(id, HostStatus::Active).await?;
        if let Some(host) = self.get(id) {
            self.inner.run(&host);
        }
        Ok(())
    }

    /// Closes the connection of a host without banning it; it is connected again at once.
    pub async fn reconnect(&self, id: HostId) {
        if let Some(host) = self.get(id)
            && self.inner.is_running(id)
        {
            self.inner.stop(id).await;
            self.inner.run(&host);
        }
    }

    /// Follows another policy: rates count for the next event of each host, quotas and trust for new hosts, and hosts of
    /// domains that are now banned are disconnected, those of domains that no longer are, connected.
    pub async fn follow(&self, policy: Policy) {
        let limits = policy.limits;
        *self
            .inner
            .policy
            .write()
            .unwrap_or_else(|poisoned| poisoned.into_inner()) = policy;
        for host in self.list() {
            host.follow(&limits);
        }
        self.close_banned().await;
        self.connect_idle();
    }

    /// Bans a domain and all below it, and closes the connections of its hosts. Says whether it was not banned before.
    ///
    /// # Errors
    /// The database's; then nothing changed.
    pub async fn ban_domain(&self, domain: &str) -> Result<bool, StoreError> {
        let new = self.inner.store.ban_domain(domain).await?;
        self.inner.bans_mut().extend(pattern(domain));
        self.close_banned().await;
        Ok(new)
    }

    /// Closes the connections of hosts whose domains are banned.
    async fn close_banned(&self) {
        for host in self.list() {
            if self.inner.is_domain_banned(host.host().domain()) && self.inner.is_running(host.id())
            {
                self.inner.stop(host.id()).await;
                host.set_state(HostState::Banned);
            }
        }
    }

    /// Connects to the hosts that are not banned and have no task.
    fn connect_idle(&self) {
        for host in self.list() {
            if !self.inner.is_running(host.id()) {
                self.inner.run(&host);
            }
        }
    }

    /// Lifts the ban of a domain and connects to its hosts. Says whether there was one.
    ///
    /// # Errors
    /// The database's; then nothing changed.
    pub async fn unban_domain(&self, domain: &str) -> Result<bool, StoreError> {
        let was_banned = self.inner.store.unban_domain(domain).await?;
        self.inner.bans_mut().remove(&domain.to_ascii_lowercase());
        self.connect_idle();
        Ok(was_banned)
    }

    /// Sets the account quota of a host, and with it the event rates that follow from it. Returns the throttled
    /// accounts that now have room, the oldest first; the database has released them already.
    ///
    /// # Errors
    /// The database's; then nothing changed.
    pub async fn set_account_limit(&self, id: HostId, limit: i64) -> Result<Vec<Did>, StoreError> {
        let released = self.inner.store.set_account_limit(id, limit).await?;
        if let Some(host) = self.get(id) {
            host.set_account_limit(limit, &self.inner.policy().limits);
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
            host.set_overrides(rates, &self.inner.policy().limits);
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

    /// Cursors that moved since the last call. To be written together with a [`Hosts::replay_floor`] that was taken
    /// before: see [`Hosts::checkpoint`].
    pub fn cursors(&self) -> Vec<(HostId, i64)> {
        let known = self.inner.known();
        known
            .by_id
            .values()
            .filter_map(|host| Some((host.id(), host.progress().take_moved_cursor()?)))
            .collect()
    }

    /// The log seq from which recovery must read so that it finds every durable event above a cursor. `head` is a log
    /// seq up to which every event has been settled.
    pub fn replay_floor(&self, head: u64) -> u64 {
        let known = self.inner.known();
        let open = known
            .by_id
            .values()
            .filter_map(|host| host.progress().lowest_open_log_seq());
        open.min().unwrap_or(u64::MAX).min(head + 1)
    }

    /// Floor and cursors in the order that is safe: a cursor that moves in between only makes recovery read more than
    /// it needs.
    pub fn checkpoint(&self, head: u64) -> Checkpoint {
        self.inner.shared.log_head.fetch_max(head, Ordering::AcqRel);
        let replay_from = self.replay_floor(head);
        Checkpoint {
            cursors: self.cursors(),
            replay_from,
        }
    }

    /// From now on an event that is given up counts as neither durable nor dropped, so that no cursor moves past it.
    pub fn freeze(&self) {
        for host in self.list() {
            host.progress().freeze();
        }
    }

    /// Closes every connection and waits for their tasks; see [`Hosts::freeze`] for what is under way.
    pub async fn shutdown(&self) {
        self.freeze();
        self.inner.cancel.cancel();
        let tasks: Vec<Task> = self.inner.tasks().drain().map(|(_, task)| task).collect();
        let all = async {
            for task in tasks {
                task.join.await.ok();
            }
        };
        if timeout(SHUTDOWN_TIMEOUT, all).await.is_err() {
            tracing::warn!(
                "some hosts did not close within {} s",
                SHUTDOWN_TIMEOUT.as_secs()
            );
        }
        self.inner.store_statuses().await;
    }
}

impl Inner {
    fn new_row(&self, host: &PdsHost) -> NewHost {
        let trusted = self.is_trusted(host);
        let limits = self.policy().limits;
        let accounts = if trusted {
            limits.trusted_accounts
        } else {
            limits.accounts
        };
        let mut row = NewHost::new(host.name(), host.tls(), trusted);
        row.account_limit = i64::try_from(accounts).unwrap_or(i64::MAX);
        row
    }

    /// The handle of a row; `None` if its name may no longer be dialled.
    fn learn(&self, row: &HostRow) -> Option<Arc<HostHandle>> {
        let host = PdsHost::from_parts(&row.hostname, row.tls, &self.options.guard)
            .inspect_err(|error| tracing::warn!(host = row.hostname, %error, "host in the database is left out"))
            .ok()?;
        let mut known = self
            .known
            .write()
            .unwrap_or_else(|poisoned| poisoned.into_inner());
        if let Some(handle) = known.by_id.get(&row.id) {
            return Some(handle.clone());
        }
        let recovered = self
            .recovered
            .lock()
            .unwrap_or_else(|poisoned| poisoned.into_inner())
            .remove(&row.id);
        let recovered = recovered.unwrap_or_else(|| RecoveredHost {
            cursor: row.cursor,
            ..RecoveredHost::default()
        });
        let name = host.shared_name();
        let handle = Arc::new(HostHandle::new(
            row,
            host,
            recovered,
            self.options.in_flight,
            self.memory.clone(),
            &self.policy().limits,
        ));
        self.memory.add_host();
        known.by_id.insert(row.id, handle.clone());
        known.by_name.insert(name, handle.clone());
        Some(handle)
    }

    /// Starts the task of a host unless it is banned or runs already.
    fn run(&self, host: &Arc<HostHandle>) {
        if self.cancel.is_cancelled() {
            return;
        }
        if host.status() == HostStatus::Banned || self.is_domain_banned(host.host().domain()) {
            host.set_state(HostState::Banned);
            return;
        }
        let mut tasks = self.tasks();
        if tasks
            .get(&host.id())
            .is_some_and(|task| !task.join.is_finished())
        {
            return;
        }
        let cancel = self.cancel.child_token();
        let join = (self.spawn)(host.clone(), cancel.clone());
        tasks.insert(host.id(), Task { cancel, join });
    }

    async fn stop(&self, id: HostId) {
        let Some(task) = self.tasks().remove(&id) else {
            return;
        };
        task.cancel.cancel();
        task.join.await.ok();
    }

    fn is_running(&self, id: HostId) -> bool {
        self.tasks()
            .get(&id)
            .is_some_and(|task| !task.join.is_finished())
    }

    fn is_trusted(&self, host: &PdsHost) -> bool {
        self.policy()
            .trusted_domains
            .iter()
            .any(|domain| domain.matches(host.domain()))
    }

    fn is_domain_banned(&self, domain: &str) -> bool {
        let bans = self
            .bans
            .read()
            .unwrap_or_else(|poisoned| poisoned.into_inner());
        self.policy()
            .banned_domains
            .iter()
            .chain(bans.values())
            .any(|ban| ban.matches(domain))
    }

    /// Writes an operator's word about a host at once.
    async fn write_status(&self, id: HostId, status: HostStatus) -> Result<(), StoreError> {
        let _writing = self.status_writes.lock().await;
        self.store.set_host_status(id, status).await?;
        if let Some(host) = self.known().by_id.get(&id) {
            host.set_stored_status(status);
        }
        Ok(())
    }

    /// Writes statuses and sync 1.1 marks that changed; what fails is written the next time.
    async fn store_statuses(&self) {
        let _writing = self.status_writes.lock().await;
        let hosts: Vec<_> = self.known().by_id.values().cloned().collect();
        for host in hosts {
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

    fn policy(&self) -> RwLockReadGuard<'_, Policy> {
        self.policy
            .read()
            .unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    fn known(&self) -> RwLockReadGuard<'_, Known> {
        self.known
            .read()
            .unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    fn tasks(&self) -> MutexGuard<'_, HashMap<HostId, Task>> {
        self.tasks
            .lock()
            .unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    fn bans_mut(&self) -> RwLockWriteGuard<'_, HashMap<String, DomainPattern>> {
        self.bans
            .write()
            .unwrap_or_else(|poisoned| poisoned.into_inner())
    }
}

/// A stored ban as a pattern; a stored text that is no domain bans nothing.
fn pattern(domain: &str) -> Option<(String, DomainPattern)> {
    let pattern = DomainPattern::banned(domain)
        .inspect_err(|error| tracing::warn!(domain, error, "banned domain is not a domain"))
        .ok()?;
    Some((domain.to_ascii_lowercase(), pattern))
}

async fn housekeeping(inner: Arc<Inner>) {
    let mut ticks = interval(HOUSEKEEPING);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            () = inner.cancel.cancelled() => return,
            _ = ticks.tick() => {}
        }
        inner.store_statuses().await;
        let hosts = Hosts {
            inner: inner.clone(),
        };
        for (state, count) in hosts.states() {
            metrics().hosts_in(state.as_str()).set(count as i64);
        }
        let memory = hosts.memory();
        for host in hosts.list() {
            host.tell(&inner.shared.lines);
        }
        inner.shared.lines.tell_rest();
        let parts = [memory.own, memory.shared, memory.parked];
        for (gauge, bytes) in metrics().upstream_memory.iter().zip(parts) {
            gauge.set(bytes as i64);
        }
    }
}
