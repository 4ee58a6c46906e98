//! The supervisor: one task for each host that is not banned. It decides who is connected; events do not pass through it.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use tokio::sync::Semaphore;
use tokio::task::JoinHandle;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

use super::backoff::Backoff;
use super::host_log::HostLog;
use super::housekeeping;
use super::metrics::Metrics;
use super::runner::Runner;
use super::shared::{Shared, Times};
use crate::dial::{Guard, HostName};
use crate::hosts;
use crate::hosts::{AddError, HostHandle, HostState, Hosts};
use crate::store::{HostId, HostStatus, Store, StoreError};
use crate::verify::Pipeline;

/// Minimum interval between two attempts at a host that were requested: requests must not make the relay flood a host.
const MIN_REQUESTED_INTERVAL: Duration = Duration::from_secs(30);

/// Longest wait for the connections to close when the relay stops.
const SHUTDOWN_TIMEOUT: Duration = Duration::from_secs(10);

/// What an operator sets for the connections. A change needs a restart.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Settings {
    /// Longest time from the first byte of a host's message to its last.
    pub message_time: Duration,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            message_time: Duration::from_secs(30),
        }
    }
}

/// Options of the connections.
#[derive(Clone, Debug)]
pub struct UpstreamOptions {
    /// The rules for dialling.
    pub guard: Guard,
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
    /// How long a host that is a relay is not dialled.
    pub refused_pause: Duration,
    /// Concurrent handshakes.
    pub handshakes: usize,
    pub metrics: Metrics,
}

impl Default for UpstreamOptions {
    fn default() -> Self {
        Self {
            guard: Guard::new(false),
            backoff: Backoff::default(),
            handshake_timeout: Duration::from_secs(15),
            ping_interval: Duration::from_secs(30),
            idle_timeout: Duration::from_secs(90),
            message_timeout: Settings::default().message_time,
            refused_pause: Duration::from_secs(24 * 60 * 60),
            handshakes: 256,
            metrics: Metrics::default(),
        }
    }
}

impl UpstreamOptions {
    /// These settings, and connections by the rules of `guard`.
    pub fn with(settings: Settings, guard: Guard, metrics: Metrics) -> Self {
        Self {
            guard,
            metrics,
            message_timeout: settings.message_time,
            ..Self::default()
        }
    }
}

/// The supervisor of all connections to hosts. Clones share everything.
#[derive(Clone)]
pub struct Supervisor {
    inner: Arc<Inner>,
}

struct Inner {
    hosts: Hosts,
    pipeline: Pipeline,
    shared: Arc<Shared>,
    tasks: Mutex<HashMap<HostId, Task>>,
    cancel: CancellationToken,
}

struct Task {
    cancel: CancellationToken,
    join: JoinHandle<()>,
}

impl Task {
    fn is_running(&self) -> bool {
        !self.join.is_finished()
    }
}

impl Supervisor {
    /// A supervisor whose connections submit events to `pipeline`. Nothing is dialled before [`Supervisor::start`].
    pub fn new(options: UpstreamOptions, hosts: Hosts, store: Store, pipeline: Pipeline) -> Self {
        let shared = Shared {
            guard: options.guard,
            hosts: hosts.clone(),
            store,
            backoff: options.backoff,
            times: Times {
                handshake: options.handshake_timeout,
                ping: options.ping_interval,
                idle: options.idle_timeout,
                message: options.message_timeout,
            },
            refused_pause: options.refused_pause,
            log: HostLog::default(),
            metrics: options.metrics,
            handshakes: Semaphore::new(options.handshakes.max(1)),
        };
        let inner = Inner {
            hosts,
            pipeline,
            shared: Arc::new(shared),
            tasks: Mutex::default(),
            cancel: CancellationToken::new(),
        };
        Self {
            inner: Arc::new(inner),
        }
    }

    /// The registry of hosts.
    pub fn hosts(&self) -> &Hosts {
        &self.inner.hosts
    }

    /// Connects to every host that is not banned, and keeps the database's statuses up to date.
    pub fn start(&self) {
        for host in self.inner.hosts.list() {
            self.inner.run(&host);
        }
        let (shared, cancel) = (self.inner.shared.clone(), self.inner.cancel.clone());
        tokio::spawn(housekeeping::run(shared, cancel));
    }

    /// Adds a host and connects to it. One that is known already and waits for its next attempt is tried at once,
    /// unless the last attempt was less than 30 seconds ago.
    ///
    /// # Errors
    /// See [`AddError`].
    pub async fn add(&self, host: &HostName) -> Result<Arc<HostHandle>, AddError> {
        let handle = self.inner.hosts.add(host).await?;
        if self.inner.is_running(handle.id()) {
            handle.wake_if_waiting(MIN_REQUESTED_INTERVAL);
        } else {
            self.inner.run(&handle);
        }
        Ok(handle)
    }

    /// Bans a host and closes its connection.
    ///
    /// # Errors
    /// The database's; then nothing changed.
    pub async fn ban(&self, id: HostId) -> Result<(), StoreError> {
        self.inner.stop(id).await;
        let written = self.inner.hosts.set_status(id, HostStatus::Banned).await;
        // A request may have started it meanwhile.
        self.inner.stop(id).await;
        if let Some(host) = self.inner.hosts.get(id) {
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
        self.inner.hosts.set_status(id, HostStatus::Active).await?;
        if let Some(host) = self.inner.hosts.get(id) {
            self.inner.run(&host);
        }
        Ok(())
    }

    /// Bans a domain and all below it, and closes the connections of its hosts. Returns whether it was not banned before.
    ///
    /// # Errors
    /// The database's; then nothing changed.
    pub async fn ban_domain(&self, domain: &str) -> Result<bool, StoreError> {
        let is_new = self.inner.hosts.ban_domain(domain).await?;
        self.close_banned().await;
        Ok(is_new)
    }

    /// Lifts the ban of a domain and connects to its hosts. Returns whether there was one.
    ///
    /// # Errors
    /// The database's; then nothing changed.
    pub async fn unban_domain(&self, domain: &str) -> Result<bool, StoreError> {
        let was_banned = self.inner.hosts.unban_domain(domain).await?;
        self.connect_idle();
        Ok(was_banned)
    }

    /// Applies other settings of hosts: rates count for the next event of each host, quotas and trust for new hosts, and hosts of
    /// domains that are now banned are disconnected, those of domains that no longer are, connected.
    pub async fn apply(&self, settings: &hosts::Settings) {
        self.inner.hosts.apply(settings);
        self.close_banned().await;
        self.connect_idle();
    }

    /// Closes every connection and waits for their tasks. Events in flight are given up: see
    /// [`crate::hosts::HostIndex::freeze`].
    pub async fn shutdown(&self) {
        self.inner.hosts.index().freeze();
        self.inner.cancel.cancel();
        let tasks: Vec<Task> = self
            .inner
            .tasks
            .lock()
            .drain()
            .map(|(_, task)| task)
            .collect();
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
        self.inner.hosts.write_changed_statuses().await;
    }

    /// Closes the connections of hosts whose domains are banned.
    async fn close_banned(&self) {
        for host in self.inner.hosts.list() {
            let is_banned = self.inner.hosts.is_domain_banned(host.host().domain());
            if is_banned && self.inner.is_running(host.id()) {
                self.inner.stop(host.id()).await;
                host.set_state(HostState::Banned);
            }
        }
    }

    /// Connects to the hosts that are not banned and have no task.
    fn connect_idle(&self) {
        for host in self.inner.hosts.list() {
            self.inner.run(&host);
        }
    }
}

impl Inner {
    /// Starts the task of a host unless it is banned or runs already.
    fn run(&self, host: &Arc<HostHandle>) {
        if self.cancel.is_cancelled() {
            return;
        }
        let domain = host.host().domain();
        if host.status() == HostStatus::Banned || self.hosts.is_domain_banned(domain) {
            host.set_state(HostState::Banned);
            return;
        }
        let mut tasks = self.tasks.lock();
        if tasks.get(&host.id()).is_some_and(Task::is_running) {
            return;
        }
        let cancel = self.cancel.child_token();
        let (pipeline, shared) = (self.pipeline.clone(), self.shared.clone());
        let runner = Runner::new(host.clone(), pipeline, shared, cancel.clone());
        let join = tokio::spawn(runner.run());
        tasks.insert(host.id(), Task { cancel, join });
    }

    async fn stop(&self, id: HostId) {
        let task = self.tasks.lock().remove(&id);
        if let Some(task) = task {
            task.cancel.cancel();
            task.join.await.ok();
        }
    }

    fn is_running(&self, id: HostId) -> bool {
        self.tasks.lock().get(&id).is_some_and(Task::is_running)
    }
}
