//! A whole relay: what the binary, the demo and the tests start.
//!
//! [`core`] serves what the log holds, [`ingest`] fills the log. Each is started, examined and stopped by itself; here is
//! the order. A relay is started from the end of an event's path and stopped from its beginning.

mod checkpoints;
mod core;
mod durable;
mod error;
mod health;
mod ingest;
mod lifecycle;
mod listeners;
mod metrics;
mod operations;
mod recovery;
mod reload;
mod running;
mod serving;
mod vitals;

use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;

use tokio::sync::watch;
use tracing::info;

use crate::config::Config;
use crate::eventlog::{self, EventLog, Slots};
use crate::firehose::Firehose;
use crate::hosts::Hosts;
use crate::store::{ACCOUNTS_VIEW, Store};
use crate::systemd::sockets::Inherited;
use crate::systemd::store::DescriptorStore;
use crate::systemd::watchdog::Part;
use crate::telemetry::Registry;

use self::core::{Core, Opened};
pub use error::StartError;
use ingest::Ingest;
use lifecycle::{Lifecycle, Phase};
pub use metrics::Metrics;
pub use recovery::RecoveryError;
use running::Running;
pub use vitals::Vitals;

/// A running relay. [`Relay::shutdown`] ends it in order; dropping it leaves that to the process's end.
pub struct Relay {
    /// The configuration it was started with.
    config: Config,
    /// The configuration that was read last.
    last_config: tokio::sync::Mutex<Config>,
    running: Arc<Running>,
    lifecycle: Lifecycle,
    vitals: watch::Receiver<Vitals>,
}

impl Relay {
    /// Starts a relay: listeners first, so that nothing is written where they fail, then log, database, recovery, the
    /// hosts, and last the answers to whoever has connected meanwhile.
    ///
    /// # Errors
    /// See [`StartError`].
    pub async fn start(config: Config) -> Result<Relay, StartError> {
        Relay::start_given(config, Inherited::default(), None).await
    }

    /// The same with the sockets that systemd passed, and its store for the consumers of this process.
    ///
    /// # Errors
    /// See [`StartError`].
    pub async fn start_given(
        config: Config,
        mut given: Inherited,
        descriptors: Option<DescriptorStore>,
    ) -> Result<Relay, StartError> {
        let registry = Registry::of_process();
        let lifecycle = Lifecycle::default();
        let slots = Slots::default();
        // Retention removes nothing before the database reports what it has.
        let slot = slots.open(ACCOUNTS_VIEW, 1);
        let Opened { listeners, log } = Opened::open(&config, &mut given, slots, &registry).await?;
        let (ingest, log) = Ingest::start(&config, log, slot, &registry, &lifecycle).await?;
        // From here on nothing waits and nothing fails: whoever is answered meets a whole relay.
        let consumers = (descriptors, given.stored);
        let core = Core::start(&config, log, &listeners, consumers, registry).await;
        let (running, vitals) = Running::serve(core, ingest, listeners, &lifecycle);
        Ok(Relay {
            last_config: tokio::sync::Mutex::new(config.clone()),
            config,
            running,
            lifecycle,
            vitals,
        })
    }

    /// Where the public API and the firehose listen.
    pub fn public_addr(&self) -> SocketAddr {
        self.running.core.public_addr
    }

    /// Where metrics and health listen.
    pub fn metrics_addr(&self) -> SocketAddr {
        self.running.core.metrics_addr
    }

    /// The registry of hosts, for a status line.
    pub fn hosts(&self) -> &Hosts {
        &self.running.ingest.hosts
    }

    /// The metrics of the relay as a whole.
    pub fn metrics(&self) -> &Metrics {
        &self.running.core.metrics
    }

    /// The event log, for a status line.
    pub fn log(&self) -> &EventLog {
        &self.running.core.log
    }

    /// The firehose and its consumers, for a status line.
    pub fn firehose(&self) -> &Firehose {
        &self.running.core.firehose
    }

    /// Samples of how the relay performs, taken every few seconds.
    pub fn vitals(&self) -> watch::Receiver<Vitals> {
        self.vitals.clone()
    }

    /// The parts whose progress is the relay's: shards, sequencer, runtime.
    ///
    /// # Errors
    /// The system gives no sockets.
    pub fn parts(&self) -> io::Result<Vec<Part>> {
        let [shards, sequencer, runtime] = &self.metrics().stuck;
        let mut parts = self.running.ingest.parts(shards);
        parts.push(Part {
            kind: "sequencer",
            stuck: sequencer.clone(),
            name: "the event log's sequencer".into(),
            heartbeat: self.log().heartbeat().clone(),
            // The shards hand on what they are given.
            nudge: Box::new(|| {}),
        });
        parts.push(Part::runtime(runtime.clone())?);
        Ok(parts)
    }

    /// Resolves with the reason when a part of the relay ended that never should.
    pub fn failed(&self) -> impl Future<Output = String> + Send + use<> {
        self.lifecycle.failed()
    }

    /// Stops the relay: hosts first, then in-flight events, then consumers and the database. Nothing is lost: what was
    /// not durable comes again from its host. Connections that come meanwhile wait for the next process where systemd holds
    /// the listening sockets.
    pub async fn shutdown(self) {
        let Running { core, ingest, .. } = &*self.running;
        self.lifecycle.enter(Phase::Draining);
        ingest.stop().await;
        self.lifecycle.enter(Phase::Closing);
        tokio::join!(ingest.flush(), core.close_consumers());
        core.stop().await;
        ingest.close().await;
        info!("the relay is down");
    }
}

/// Lets a relay whose event log is lost go on: its log begins again, with numbers above all that its database knows of.
/// Returns the first of them.
///
/// # Errors
/// See [`StartError`]; where the log is not lost, nothing is changed.
pub async fn abandon_log(config: &Config) -> Result<u64, StartError> {
    let log = core::open_log(config, Slots::default(), eventlog::Metrics::default()).await?;
    let store = Store::open(config.database_url().expose()).await?;
    let _hold = store.hold().await?;
    Ok(recovery::abandon(log, &store).await?)
}
