//! The wiring of a whole relay: what the binary, the demo and the tests start.
//!
//! Here the rooms are joined in the order of an event's path, started from the end of that path and stopped from its
//! beginning, so that nothing is ever handed to a room that is not there.

mod durable;
mod health;
mod listeners;
mod metrics;
mod operations;
mod recovery;
mod reload;
mod vitals;

use std::collections::HashMap;
use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::mpsc as sync_mpsc;
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use axum::Router;
use tokio::sync::watch;
use tokio::task;
use tokio::time::{interval, timeout};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tracing::{error, info, warn};

use crate::api::{AdminPassword, Operator};
use crate::client::TrustedProxies;
use crate::clock::Clock;
use crate::config::Config;
use crate::dial::{Guard, HostName};
use crate::discovery::Crawler;
use crate::eventlog::{self, EventLog, LogError, LogOptions, Slot, Slots};
use crate::firehose::{self, Firehose, FirehoseOptions};
use crate::hosts::roster::{Name, Roster};
use crate::hosts::{AddError, Hosts, HostsOptions, RecoveredHost};
use crate::http::{self, Listener, ServerOptions};
use crate::identity::Resolver;
use crate::store::{ACCOUNTS_VIEW, HostId, NewHost, Store, StoreError, Writer};
use crate::systemd::sockets::Given;
use crate::systemd::store::DescriptorStore;
use crate::systemd::watchdog::Part;
use crate::telemetry::Registry;
use crate::upstream::{Supervisor, UpstreamOptions};
use crate::verify::{self, Alarm, Dependencies, Pipeline, Settlement};
use crate::views::accounts::{LiveAccounts, ReplayError};
use crate::{api, discovery, hosts, identity, store, telemetry, upstream, views};

use durable::{Position, on_durable};
use health::Examiner;
use listeners::Listeners;
pub use metrics::Metrics;
use operations::Running;
pub use recovery::RecoveryError;
use vitals::Sampler;
pub use vitals::Vitals;

/// Batches of accepted events that may wait for the sequencer.
const LOG_QUEUE: usize = 64;
/// How often cursors and the replay position are handed to the database's writer.
const CHECKPOINT_INTERVAL: Duration = Duration::from_millis(250);
/// A stop takes two seconds at most where the disk does its work. Nothing is lost by these limits: hosts send again what is not
/// durable, and the next start takes from the log what the database has not seen.
///
/// How long hosts may take to close.
const HOSTS_PATIENCE: Duration = Duration::from_millis(500);
/// How long shards may take to work off what was submitted before a stop, and how often they are looked at: longer
/// only where the disk refuses.
const SHARDS_PATIENCE: Duration = Duration::from_millis(500);
const SHARDS_LOOK: Duration = Duration::from_millis(2);
/// How long the last checkpoint may wait for room in the writer's queue.
const CHECKPOINT_PATIENCE: Duration = Duration::from_millis(100);
/// How long the database may take for the last changes.
const LAST_WRITES: Duration = Duration::from_millis(500);
/// How long requests may take that are under way when all else is done.
const LAST_ANSWERS: Duration = Duration::from_millis(200);

/// Why a relay did not start. Each is one line for the operator: what, where, what to do.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// A listener.
    #[error("cannot listen on {address} ({what}): {source}; choose another address with --{flag}")]
    Listen {
        address: String,
        what: &'static str,
        flag: &'static str,
        source: io::Error,
    },
    /// A listener that systemd opened.
    #[error("cannot serve a socket that systemd passed: {0}; look at the socket units")]
    Given(io::Error),
    /// The data folder.
    #[error(
        "cannot create the data folder {folder}: {source}; create it, make room for it, or choose another with --data-dir"
    )]
    DataFolder { folder: String, source: io::Error },
    /// The event log.
    #[error(transparent)]
    Log(#[from] LogError),
    /// The database.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The log and the database do not fit.
    #[error(transparent)]
    Recovery(#[from] RecoveryError),
    /// A configured host.
    #[error("host {host:?}: {reason}")]
    Host { host: String, reason: String },
    /// Threads.
    #[error("cannot start a thread: {0}")]
    Thread(io::Error),
}

/// A running relay. [`Relay::shutdown`] ends it in order; dropping it leaves that to the process's end.
pub struct Relay {
    /// What it was started with.
    config: Config,
    /// What was read last.
    last_config: tokio::sync::Mutex<Config>,
    admin_password: AdminPassword,
    trusted_proxies: TrustedProxies,
    running: Arc<Running>,
    public_addr: SocketAddr,
    metrics_addr: SocketAddr,
    shards: Vec<JoinHandle<()>>,
    sequencer: eventlog::sequencer::Sequencer<Settlement>,
    position: Position,
    /// No connection is taken any more.
    leaving: CancellationToken,
    closing: CancellationToken,
    failed: watch::Receiver<Option<String>>,
    vitals: watch::Receiver<Vitals>,
    servers: TaskTracker,
    holding: task::JoinHandle<()>,
}

impl Relay {
    /// Starts a relay: listeners first, so that nothing is written where they fail, then log, database, recovery, the
    /// hosts, and last the answers to who has connected meanwhile.
    ///
    /// # Errors
    /// See [`StartError`].
    pub async fn start(config: Config) -> Result<Relay, StartError> {
        Relay::start_given(config, Given::default(), None).await
    }

    /// The same with what systemd passed, and its store for the consumers of this process.
    ///
    /// # Errors
    /// See [`StartError`].
    pub async fn start_given(
        config: Config,
        mut given: Given,
        descriptors: Option<DescriptorStore>,
    ) -> Result<Relay, StartError> {
        let registry = Registry::of_process();
        let listeners = Listeners::open(&config, &mut given).await?;
        let slots = Slots::default();
        // Nothing goes before the database says what it has.
        let slot = slots.open(ACCOUNTS_VIEW, 1);
        let log = open_log(&config, slots, eventlog::Metrics::register(&registry)).await?;
        let store = Store::open_with(
            config.database_url().expose(),
            config.database_connections,
            store::Metrics::register(&registry),
        )
        .await?;
        let hold = store.hold().await?;
        let log = recovery::above_the_database(log, &store).await?;
        let mut roster = open_roster(&log)?;
        let recovered = replay(&log, &store, &mut roster, &slot, &config).await?;

        let clock = Clock::after(log.newest_at_open());
        let guard = Guard::new(config.allow_private_hosts);
        let hosts = Hosts::load(
            HostsOptions {
                guard,
                settings: config.host_settings.clone(),
                metrics: hosts::Metrics::register(&registry),
                ..HostsOptions::default()
            },
            store.clone(),
            recovered,
        )
        .await?;
        let writer = Writer::spawn(store.clone());
        let (to_log, from_shards) = sync_mpsc::sync_channel(LOG_QUEUE);
        let (failing, failed) = watch::channel(None);
        let alarm = Alarm::new({
            let failing = failing.clone();
            move |reason| fail(&failing, reason)
        });
        let resolver = Resolver::new(
            config.identity.clone(),
            guard,
            clock,
            identity::Metrics::register(&registry),
        );
        let dependencies = Dependencies {
            resolver: resolver.clone(),
            writer: writer.clone(),
            log: to_log,
            hosts: hosts.index().clone(),
            alarm: alarm.clone(),
            head: log.head(),
            metrics: verify::Metrics::register(&registry),
        };
        let (pipeline, shards) = Pipeline::start(
            verify::Options::with(&config.verify, &config.identity, clock),
            dependencies,
        )
        .map_err(StartError::Thread)?;
        let unfinished = Unfinished(Some(pipeline.clone()));
        let position = Position::new(log.head());
        let accounts = LiveAccounts::new(writer.clone());
        let settler = pipeline.settler(accounts.clone(), log.pulse().clone());
        let announcer = settler.clone();
        let settle = on_durable(
            log.clone(),
            settler,
            position.clone(),
            alarm.watch("the event log's sequencer"),
        );
        let sequencer = eventlog::sequencer::spawn_announcing(
            log.clone(),
            from_shards,
            move |events: &[_]| announcer.announce(events),
            settle,
        )?;
        let upstream = Supervisor::new(
            UpstreamOptions::with(
                config.upstream,
                guard,
                upstream::Metrics::register(&registry),
            ),
            hosts.clone(),
            store.clone(),
            pipeline.clone(),
        );

        for entry in &config.hosts {
            add_configured_host(entry, guard, &upstream).await?;
        }
        // Before the first event: what was recovered needs not be recovered again.
        checkpoint(&hosts, &accounts, &position, None).await;
        upstream.start();
        // From here on nothing waits and nothing fails: who is answered meets a whole relay.
        unfinished.finish();

        let (leaving, closing) = (CancellationToken::new(), CancellationToken::new());
        let metrics = firehose::Metrics::register(&registry);
        let options = FirehoseOptions::with(&config.firehose, metrics);
        let firehose = Firehose::resume(log.clone(), options, descriptors, given.stored).await;
        let (examined, health) = watch::channel(Arc::default());
        let running = Arc::new(Running {
            log: log.clone(),
            hosts: hosts.clone(),
            pipeline: pipeline.clone(),
            crawler: Crawler::new(
                config.discovery,
                guard,
                upstream.clone(),
                discovery::Metrics::register(&registry),
            ),
            upstream,
            firehose: firehose.clone(),
            resolver,
            store: store.clone(),
            writer: writer.clone(),
            health,
            metrics: Metrics::register(&registry),
        });
        let Listeners {
            public_addr,
            metrics_addr,
            ..
        } = listeners;
        let admin_password = AdminPassword::new(config.admin_password.clone());
        let state = api::State {
            store,
            operations: running.clone(),
            admin_password: admin_password.clone(),
        };
        let trusted_proxies = TrustedProxies::new(config.trusted_proxies.clone());
        let options = ServerOptions {
            trusted_proxies: trusted_proxies.clone(),
            ..ServerOptions::default()
        };
        let servers = serve(
            listeners,
            &options,
            &state,
            &firehose,
            running.clone(),
            registry,
            &leaving,
        );
        let (sampled, vitals) = watch::channel(Vitals::default());
        let sampler = Sampler(running.clone());
        servers.spawn(sampler.run(sampled, closing.clone()));
        let examiner = Examiner::new(running.clone(), clock);
        servers.spawn(examiner.run(examined, closing.clone()));
        tokio::spawn(checkpoints(
            hosts.clone(),
            accounts,
            slot,
            position.clone(),
            roster,
            closing.clone(),
            failing.clone(),
        ));
        let holding = tokio::spawn(async move {
            let lost = hold.keep().await;
            fail(&failing, lost.to_string());
        });
        Ok(Relay {
            last_config: tokio::sync::Mutex::new(config.clone()),
            config,
            admin_password,
            trusted_proxies,
            running,
            public_addr,
            metrics_addr,
            shards,
            sequencer,
            position,
            leaving,
            closing,
            failed,
            vitals,
            servers,
            holding,
        })
    }

    /// Where the public API and the firehose listen.
    pub fn public_addr(&self) -> SocketAddr {
        self.public_addr
    }

    /// Where metrics and health listen.
    pub fn metrics_addr(&self) -> SocketAddr {
        self.metrics_addr
    }

    /// The registry of hosts, for a status line.
    pub fn hosts(&self) -> &Hosts {
        &self.running.hosts
    }

    /// The metrics of the relay as a whole.
    pub fn metrics(&self) -> &Metrics {
        &self.running.metrics
    }

    /// The event log, for a status line.
    pub fn log(&self) -> &EventLog {
        &self.running.log
    }

    /// Who is connected, for a status line.
    pub fn firehose(&self) -> &Firehose {
        &self.running.firehose
    }

    /// How it does, sampled every few seconds.
    pub fn vitals(&self) -> watch::Receiver<Vitals> {
        self.vitals.clone()
    }

    /// The parts whose progress is the relay's: shards, sequencer, runtime.
    ///
    /// # Errors
    /// The system gives no sockets.
    pub fn parts(&self) -> io::Result<Vec<Part>> {
        let [shards, sequencer, runtime] = &self.running.metrics.stuck;
        let pulses = self.running.pipeline.pulses().iter().cloned().enumerate();
        let mut parts: Vec<Part> = pulses
            .map(|(index, pulse)| {
                let pipeline = self.running.pipeline.clone();
                Part {
                    kind: "shards",
                    stuck: shards.clone(),
                    name: format!("shard {index}"),
                    pulse,
                    nudge: Box::new(move || pipeline.nudge(index)),
                }
            })
            .collect();
        parts.push(Part {
            kind: "sequencer",
            stuck: sequencer.clone(),
            name: "the event log's sequencer".into(),
            pulse: self.running.log.pulse().clone(),
            // The shards hand on what they are given.
            nudge: Box::new(|| {}),
        });
        parts.push(Part::runtime(runtime.clone())?);
        Ok(parts)
    }

    /// Resolves with the reason when a part of the relay ended that never should.
    pub fn failed(&self) -> impl Future<Output = String> + Send + use<> {
        let mut failed = self.failed.clone();
        async move {
            let reason = failed
                .wait_for(Option::is_some)
                .await
                .ok()
                .and_then(|reason| reason.clone());
            match reason {
                Some(reason) => reason,
                None => std::future::pending().await,
            }
        }
    }

    /// Ends the relay: hosts first, then what is under way, then consumers and the database. Nothing is lost: what was
    /// not durable comes again from its host. Connections that come meanwhile wait for the next process where systemd holds
    /// the listening sockets.
    pub async fn shutdown(self) {
        let Running {
            hosts,
            upstream,
            pipeline,
            writer,
            firehose,
            ..
        } = &*self.running;
        self.leaving.cancel();
        if timeout(HOSTS_PATIENCE, upstream.shutdown()).await.is_err() {
            warn!("hosts that did not close in time are left");
        }
        pipeline.stop();
        let (shards, sequencer) = (self.shards, self.sequencer);
        let stopped = task::spawn_blocking(move || {
            let deadline = Instant::now() + SHARDS_PATIENCE;
            while Instant::now() < deadline && !shards.iter().all(JoinHandle::is_finished) {
                thread::sleep(SHARDS_LOOK);
            }
            // A shard that still waits for the disk ends with the sequencer's queue.
            let waiting = sequencer.stop().len();
            for shard in shards {
                if shard.join().is_err() {
                    error!("a shard panicked");
                }
            }
            waiting
        });
        match stopped.await {
            Ok(0) => {}
            Ok(waiting) => warn!(
                events = waiting,
                "events that the disk did not take will come again from their hosts"
            ),
            Err(failure) => error!(%failure, "stopping the shards"),
        }
        let accounts = LiveAccounts::new(writer.clone());
        let last = checkpoint(hosts, &accounts, &self.position, None);
        if timeout(CHECKPOINT_PATIENCE, last)
            .await
            .ok()
            .flatten()
            .is_none()
        {
            warn!("the last checkpoint was not written; the next start reads more of the log");
        }
        self.closing.cancel();
        let (written, ()) = tokio::join!(writer.shutdown(LAST_WRITES), firehose.shutdown());
        if let Err(failure) = written {
            warn!(%failure, "the database did not take the last changes; they are in the log");
        }
        if timeout(LAST_ANSWERS, self.servers.wait()).await.is_err() {
            warn!("requests that took too long got no answer");
        }
        // As long as this relay holds it: what is left open of a file would meet that of the next relay.
        if timeout(LAST_ANSWERS, self.running.store.close())
            .await
            .is_err()
        {
            warn!("connections to the database that took too long are left");
        }
        self.holding.abort();
        // Cancelled, as just asked: with it goes what it holds of the database.
        let _ = self.holding.await;
        info!("the relay is down");
    }
}

/// A relay that is being started. If that fails or is given up, its shards end, and with them the threads behind them:
/// each waits for the one before, and the first for a word.
struct Unfinished(Option<Pipeline>);

impl Unfinished {
    fn finish(mut self) {
        self.0 = None;
    }
}

impl Drop for Unfinished {
    fn drop(&mut self) {
        if let Some(pipeline) = &self.0 {
            pipeline.stop();
        }
    }
}

/// Answers whoever connects, until `leaving`.
fn serve(
    listeners: Listeners,
    options: &ServerOptions,
    state: &api::State,
    firehose: &Firehose,
    running: Arc<Running>,
    registry: Registry,
    leaving: &CancellationToken,
) -> TaskTracker {
    let servers = TaskTracker::new();
    let serve = |listener: Listener, router: Router| {
        let serving = http::serve(listener, router, options.clone(), leaving.clone());
        servers.spawn(serving);
    };
    let public = api::router(state.clone(), firehose::router(firehose.clone()));
    for listener in listeners.public {
        serve(listener, public.clone());
    }
    let metrics = telemetry::router(running, registry);
    for listener in listeners.metrics {
        serve(listener, metrics.clone());
    }
    for listener in listeners.admin {
        // The mode of a Unix socket says who may connect.
        let operator = match &listener {
            Listener::Unix(_) => Operator::Connected,
            Listener::Tcp(_) => Operator::Identified,
        };
        serve(listener, api::admin_router(state.clone(), operator));
    }
    servers.close();
    servers
}

/// Lets a relay whose event log is lost go on: its log begins again, with numbers above all that its database knows of.
/// Returns the first of them.
///
/// # Errors
/// See [`StartError`]; where the log is not lost, nothing is changed.
pub async fn abandon_log(config: &Config) -> Result<u64, StartError> {
    let log = open_log(config, Slots::default(), eventlog::Metrics::default()).await?;
    let store = Store::open(config.database_url().expose()).await?;
    let _hold = store.hold().await?;
    Ok(recovery::abandon(log, &store).await?)
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

/// Opens the log on a thread of its own: recovery reads files.
async fn open_log(
    config: &Config,
    slots: Slots,
    metrics: eventlog::Metrics,
) -> Result<EventLog, StartError> {
    let folder = |source| StartError::DataFolder {
        folder: config.data_dir.display().to_string(),
        source,
    };
    std::fs::create_dir_all(&config.data_dir).map_err(folder)?;
    let options = LogOptions {
        slots,
        metrics,
        ..LogOptions::with(config.log_dir(), &config.log)
    };
    match task::spawn_blocking(move || EventLog::open(options)).await {
        Ok(log) => Ok(log?),
        Err(failure) => Err(StartError::Thread(io::Error::other(failure))),
    }
}

async fn add_configured_host(
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

/// Notes why the relay must go down; the first reason stays.
fn fail(failing: &watch::Sender<Option<String>>, reason: String) {
    error!("{reason}");
    failing.send_if_modified(|noted| {
        let first = noted.is_none();
        noted.get_or_insert(reason);
        first
    });
}

/// Commits the hosts' cursors and the position of the accounts view, as often as they change, and confirms to the log's
/// retention what the database has.
async fn checkpoints(
    hosts: Hosts,
    accounts: LiveAccounts,
    slot: Slot,
    position: Position,
    mut roster: Roster,
    closing: CancellationToken,
    failing: watch::Sender<Option<String>>,
) {
    let mut ticks = interval(CHECKPOINT_INTERVAL);
    let mut last = None;
    while closing.run_until_cancelled(ticks.tick()).await.is_some() {
        // What cannot be recorded now is recorded the next time.
        if let Err(failure) = roster.record_new(&hosts) {
            warn!(%failure, "new hosts cannot be noted beside the event log yet");
        }
        slot.confirm(accounts.position());
        last = checkpoint(&hosts, &accounts, &position, last).await;
        if last.is_none() && !closing.is_cancelled() {
            let reason = "the database's writer ended; restart the relay";
            return fail(&failing, reason.to_owned());
        }
    }
}

/// One checkpoint: every event it covers was handed to the writer before. Returns its replay position and head, or
/// nothing where the writer has ended; writes nothing where those are still the `last` ones and no cursor moved.
async fn checkpoint(
    hosts: &Hosts,
    accounts: &LiveAccounts,
    position: &Position,
    last: Option<(u64, u64)>,
) -> Option<(u64, u64)> {
    let head = position.get();
    let checkpoint = hosts.take_checkpoint(head);
    let now = (checkpoint.replay_from, head);
    if checkpoint.cursors.is_empty() && last == Some(now) {
        return last;
    }
    accounts.commit(checkpoint, head).await.ok().map(|()| now)
}
