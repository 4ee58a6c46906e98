//! Ingest: where events come from: database, hosts, verification, connections, crawls, and the accounts view.
//! It is started from the end of an event's path and stopped from its beginning, so that nothing is handed to a room that
//! is not there.

use std::collections::HashMap;
use std::sync::mpsc::{Receiver, sync_channel};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use prometheus::IntGauge;
use tokio::task;
use tokio::time::timeout;
use tracing::{error, warn};

use super::checkpoints::Checkpoints;
use super::durable::{Position, on_durable};
use super::lifecycle::Lifecycle;
use super::{RecoveryError, StartError, recovery};
use crate::clock::Clock;
use crate::config::Config;
use crate::dial::{Guard, HostName};
use crate::discovery::{self, Crawler};
use crate::eventlog::sequencer::{self, Sequencer};
use crate::eventlog::{Append, EventLog, Slot};
use crate::hosts::roster::{Name, Roster};
use crate::hosts::{self, AddError, Hosts, HostsOptions, RecoveredHost};
use crate::identity::{self, Resolver};
use crate::store::{self, Hold, HostId, NewHost, Store, Writer};
use crate::systemd::watchdog::Part;
use crate::telemetry::Registry;
use crate::upstream::{self, Supervisor, UpstreamOptions};
use crate::verify::{self, Alarm, Dependencies, Pipeline, Settlement};
use crate::views;
use crate::views::accounts::{LiveAccounts, ReplayError};

/// Batches of accepted events that may wait for the sequencer.
const LOG_QUEUE: usize = 64;

/// Limits of a stop, which takes two seconds at most where the disk works. Nothing is lost by them: hosts send again what
/// is not durable, and the next start takes from the log what the database has not seen.
///
/// How long hosts may take to close.
const HOSTS_TIMEOUT: Duration = Duration::from_millis(500);
/// How long shards may take to finish what was submitted before the stop, and how often they are polled. They take longer
/// only where the disk refuses.
const SHARDS_TIMEOUT: Duration = Duration::from_millis(500);
const SHARDS_POLL: Duration = Duration::from_millis(2);
/// How long the last checkpoint may wait for room in the writer's queue.
const CHECKPOINT_TIMEOUT: Duration = Duration::from_millis(100);
/// How long the database may take for the last changes.
const LAST_WRITES: Duration = Duration::from_millis(500);
/// How long the database's connections may take to close.
const CLOSE_TIMEOUT: Duration = Duration::from_millis(200);

/// The part of a relay that fills the log.
pub(super) struct Ingest {
    pub store: Store,
    pub writer: Writer,
    pub resolver: Resolver,
    pub hosts: Hosts,
    pub pipeline: Pipeline,
    pub upstream: Supervisor,
    pub crawler: Crawler,
    checkpoints: Checkpoints,
    /// `None` once stopped.
    threads: Mutex<Option<Threads>>,
    /// Keeps the hold on the database.
    hold: Mutex<Option<task::JoinHandle<()>>>,
}

/// The threads between the hosts and the log.
struct Threads {
    shards: Vec<JoinHandle<()>>,
    sequencer: Sequencer<Settlement>,
}

/// Log and database after recovery.
struct Recovered {
    log: EventLog,
    store: Store,
    hold: Hold,
    roster: Roster,
    hosts: HashMap<HostId, RecoveredHost>,
}

/// A pipeline whose relay is not started yet. If that fails or is given up, its shards end, and with them the threads
/// behind them: each waits for the one before.
struct Starting(Option<Pipeline>);

impl Starting {
    fn finish(mut self) {
        self.0 = None;
    }
}

impl Drop for Starting {
    fn drop(&mut self) {
        if let Some(pipeline) = &self.0 {
            pipeline.stop();
        }
    }
}

impl Ingest {
    /// Recovers log and database, starts threads and tasks, and connects to the hosts. `slot` is the accounts view's.
    /// Returns the log, ready to be served.
    pub async fn start(
        config: &Config,
        log: EventLog,
        slot: Slot,
        registry: &Registry,
        lifecycle: &Lifecycle,
    ) -> Result<(Ingest, EventLog), StartError> {
        let Recovered {
            log,
            store,
            hold,
            roster,
            hosts: recovered,
        } = Recovered::open(config, log, &slot, registry).await?;
        let clock = Clock::after(log.newest_at_open());
        let guard = Guard::new(config.allow_private_hosts);
        let options = HostsOptions {
            guard,
            settings: config.host_settings.clone(),
            metrics: hosts::Metrics::register(registry),
            ..HostsOptions::default()
        };
        let hosts = Hosts::load(options, store.clone(), recovered).await?;
        let writer = Writer::spawn(store.clone());
        let metrics = identity::Metrics::register(registry);
        let resolver = Resolver::new(config.identity.clone(), guard, clock, metrics);
        let checkpoints = Checkpoints {
            hosts: hosts.clone(),
            accounts: LiveAccounts::new(writer.clone()),
            position: Position::new(log.head()),
        };
        let (to_log, from_shards) = sync_channel(LOG_QUEUE);
        let dependencies = Dependencies {
            resolver: resolver.clone(),
            writer: writer.clone(),
            log: to_log,
            hosts: hosts.index().clone(),
            alarm: Alarm::new({
                let lifecycle = lifecycle.clone();
                move |reason| lifecycle.fail(reason)
            }),
            head: log.head(),
            metrics: verify::Metrics::register(registry),
        };
        let options = verify::Options::with(&config.verify, &config.identity, clock);
        let (pipeline, threads, starting) =
            start_threads(options, dependencies, from_shards, &log, &checkpoints)?;
        let metrics = upstream::Metrics::register(registry);
        let upstream = Supervisor::new(
            UpstreamOptions::with(config.upstream, guard, metrics),
            hosts.clone(),
            store.clone(),
            pipeline.clone(),
        );
        for entry in &config.hosts {
            add_configured_host(entry, guard, &upstream).await?;
        }
        // Before the first event: what was recovered needs not be recovered again.
        checkpoints.write(None).await;
        upstream.start();
        starting.finish();
        tokio::spawn(checkpoints.clone().run(slot, roster, lifecycle.clone()));
        let metrics = discovery::Metrics::register(registry);
        let crawler = Crawler::new(config.discovery, guard, upstream.clone(), metrics);
        let ingest = Ingest {
            crawler,
            store,
            writer,
            resolver,
            hosts,
            pipeline,
            upstream,
            checkpoints,
            threads: Mutex::new(Some(threads)),
            hold: Mutex::new(Some(tokio::spawn(keep(hold, lifecycle.clone())))),
        };
        Ok((ingest, log))
    }

    /// The shards, whose progress is the relay's; `stuck` is their gauge.
    pub fn parts(&self, stuck: &IntGauge) -> Vec<Part> {
        let shards = self.pipeline.heartbeats().iter().cloned().enumerate();
        shards
            .map(|(index, heartbeat)| {
                let pipeline = self.pipeline.clone();
                Part {
                    kind: "shards",
                    stuck: stuck.clone(),
                    name: format!("shard {index}"),
                    heartbeat,
                    nudge: Box::new(move || pipeline.nudge(index)),
                }
            })
            .collect()
    }

    /// Disconnects the hosts, makes durable what they sent, and writes the last checkpoint.
    pub async fn stop(&self) {
        if timeout(HOSTS_TIMEOUT, self.upstream.shutdown())
            .await
            .is_err()
        {
            warn!("hosts that did not close in time are left");
        }
        self.pipeline.stop();
        let threads = self.threads.lock().take();
        let stopped = task::spawn_blocking(|| threads.map_or(0, Threads::join));
        match stopped.await {
            Ok(0) => {}
            Ok(waiting) => warn!(
                events = waiting,
                "events that the disk did not take will come again from their hosts"
            ),
            Err(failure) => error!(%failure, "stopping the shards"),
        }
        let last = timeout(CHECKPOINT_TIMEOUT, self.checkpoints.write(None)).await;
        if last.ok().flatten().is_none() {
            warn!("the last checkpoint was not written; the next start reads more of the log");
        }
    }

    /// Writes the last changes to the database.
    pub async fn flush(&self) {
        if let Err(failure) = self.writer.shutdown(LAST_WRITES).await {
            warn!(%failure, "the database did not take the last changes; they are in the log");
        }
    }

    /// Closes the database, while this relay still holds it: an open file would meet that of the next relay.
    pub async fn close(&self) {
        if timeout(CLOSE_TIMEOUT, self.store.close()).await.is_err() {
            warn!("connections to the database that took too long are left");
        }
        let hold = self.hold.lock().take();
        if let Some(hold) = hold {
            hold.abort();
            // It ends cancelled, as just asked, and releases the database.
            let _ = hold.await;
        }
    }
}

impl Recovered {
    async fn open(
        config: &Config,
        log: EventLog,
        slot: &Slot,
        registry: &Registry,
    ) -> Result<Recovered, StartError> {
        let metrics = store::Metrics::register(registry);
        let url = config.database_url();
        let store = Store::open_with(url.expose(), config.database_connections, metrics).await?;
        let hold = store.hold().await?;
        let log = recovery::above_the_database(log, &store).await?;
        let mut roster = open_roster(&log)?;
        let hosts = replay(&log, &store, &mut roster, slot, config).await?;
        Ok(Recovered {
            log,
            store,
            hold,
            roster,
            hosts,
        })
    }
}

impl Threads {
    /// Waits for shards and sequencer. Returns the number of events that did not become durable.
    fn join(self) -> usize {
        let deadline = Instant::now() + SHARDS_TIMEOUT;
        while Instant::now() < deadline && !self.shards.iter().all(JoinHandle::is_finished) {
            thread::sleep(SHARDS_POLL);
        }
        // A shard that still waits for the disk ends with the sequencer's queue.
        let waiting = self.sequencer.stop().len();
        for shard in self.shards {
            if shard.join().is_err() {
                error!("a shard panicked");
            }
        }
        waiting
    }
}

/// Starts shards and sequencer.
fn start_threads(
    options: verify::Options,
    dependencies: Dependencies,
    from_shards: Receiver<Vec<Append<Settlement>>>,
    log: &EventLog,
    checkpoints: &Checkpoints,
) -> Result<(Pipeline, Threads, Starting), StartError> {
    let watched = dependencies.alarm.watch("the event log's sequencer");
    let (pipeline, shards) = Pipeline::start(options, dependencies).map_err(StartError::Thread)?;
    let starting = Starting(Some(pipeline.clone()));
    let settler = pipeline.settler(checkpoints.accounts.clone(), log.heartbeat().clone());
    let announcer = settler.clone();
    let position = checkpoints.position.clone();
    let sequencer = sequencer::spawn_announcing(
        log.clone(),
        from_shards,
        move |events: &[_]| announcer.announce(events),
        on_durable(log.clone(), settler, position, watched),
    )?;
    Ok((pipeline, Threads { shards, sequencer }, starting))
}

/// Keeps the hold on the database, until it is lost.
async fn keep(hold: Hold, lifecycle: Lifecycle) {
    let lost = hold.keep().await;
    lifecycle.fail(lost.to_string());
}

fn open_roster(log: &EventLog) -> Result<Roster, RecoveryError> {
    let folder = &log.options().dir;
    let roster = Roster::open(folder).map_err(|source| ReplayError::Roster {
        folder: folder.display().to_string(),
        source,
    })?;
    Ok(roster)
}

/// Brings the database up to the head of the log.
async fn replay(
    log: &EventLog,
    store: &Store,
    roster: &mut Roster,
    slot: &Slot,
    config: &Config,
) -> Result<HashMap<HostId, RecoveredHost>, RecoveryError> {
    let as_added = |name: &Name| {
        let host = name.host();
        let settings = &config.host_settings;
        let limit = host.as_ref();
        let limit = limit.map_or(settings.limits.accounts, |host| {
            settings.account_limit(host)
        });
        let trusted = host.is_some_and(|host| settings.is_trusted(&host));
        NewHost {
            account_limit: i64::try_from(limit).unwrap_or(i64::MAX),
            ..NewHost::new(&name.hostname, name.tls, trusted)
        }
    };
    Ok(views::accounts::replay(log, store, roster, slot, as_added).await?)
}

pub(super) async fn add_configured_host(
    host: &HostName,
    guard: Guard,
    upstream: &Supervisor,
) -> Result<(), StartError> {
    host.check(&guard).map_err(|error| StartError::Host {
        host: host.http_url(),
        reason: error.to_string(),
    })?;
    match upstream.add(host).await {
        Ok(_) => Ok(()),
        Err(AddError::Banned(_)) => {
            warn!(%host, "a configured host is banned and stays so");
            Ok(())
        }
        Err(AddError::Store(failure)) => Err(failure.into()),
    }
}
