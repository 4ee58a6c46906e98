//! Core: what every relay has, also one that would copy another relay: listeners, event log, firehose, telemetry.
//! Knows nothing of where events come from.

use std::net::SocketAddr;
use std::time::Duration;

use axum::Router;
use tokio::task;
use tokio::time::timeout;
use tokio_util::task::TaskTracker;
use tracing::warn;

use super::StartError;
use super::lifecycle::{Lifecycle, Phase};
use super::listeners::Listeners;
use super::metrics::Metrics;
use crate::api::{AdminPassword, Operator};
use crate::client::TrustedProxies;
use crate::config::Config;
use crate::eventlog::{self, EventLog, LogOptions, Slots};
use crate::firehose::{self, Firehose, FirehoseOptions};
use crate::http::{self, Listener, ServerOptions};
use crate::systemd::sockets::{Inherited, Stored};
use crate::systemd::store::DescriptorStore;
use crate::telemetry::Registry;

/// How long in-flight requests may take when all else is done.
const LAST_ANSWERS: Duration = Duration::from_millis(200);

/// Listeners and event log, before anybody is answered.
pub(super) struct Opened {
    pub listeners: Listeners,
    pub log: EventLog,
}

impl Opened {
    /// Opens the listeners first, so that nothing is written where they fail, then the log.
    pub async fn open(
        config: &Config,
        given: &mut Inherited,
        slots: Slots,
        registry: &Registry,
    ) -> Result<Opened, StartError> {
        let listeners = Listeners::open(config, given).await?;
        let log = open_log(config, slots, eventlog::Metrics::register(registry)).await?;
        Ok(Opened { listeners, log })
    }
}

/// The part of a relay that serves what the log holds.
pub(super) struct Core {
    pub log: EventLog,
    pub firehose: Firehose,
    pub admin_password: AdminPassword,
    pub trusted_proxies: TrustedProxies,
    pub public_addr: SocketAddr,
    pub metrics_addr: SocketAddr,
    pub registry: Registry,
    pub metrics: Metrics,
    /// Servers and background tasks.
    pub tasks: TaskTracker,
}

/// The routes of each kind of listener.
pub(super) struct Routers<A> {
    pub public: Router,
    pub metrics: Router,
    /// Of a listener for the operator.
    pub admin: A,
}

impl Core {
    /// Starts the firehose, which goes on with the `consumers` that the previous process left in systemd's store. Nobody
    /// else is answered before [`Core::serve`].
    pub async fn start(
        config: &Config,
        log: EventLog,
        listeners: &Listeners,
        consumers: (Option<DescriptorStore>, Stored),
        registry: Registry,
    ) -> Core {
        let metrics = firehose::Metrics::register(&registry);
        let options = FirehoseOptions::with(&config.firehose, metrics);
        let (descriptors, stored) = consumers;
        Core {
            firehose: Firehose::resume(log.clone(), options, descriptors, stored).await,
            log,
            admin_password: AdminPassword::new(config.admin_password.clone()),
            trusted_proxies: TrustedProxies::new(config.trusted_proxies.clone()),
            public_addr: listeners.public_addr,
            metrics_addr: listeners.metrics_addr,
            metrics: Metrics::register(&registry),
            registry,
            tasks: TaskTracker::new(),
        }
    }

    /// Answers connections until the relay drains.
    pub fn serve<A: Fn(Operator) -> Router>(
        &self,
        listeners: Listeners,
        routers: Routers<A>,
        lifecycle: &Lifecycle,
    ) {
        let options = ServerOptions {
            trusted_proxies: self.trusted_proxies.clone(),
            ..ServerOptions::default()
        };
        let serve = |listener: Listener, router: Router| {
            let draining = lifecycle.until(Phase::Draining);
            let serving = http::serve(listener, router, options.clone(), draining);
            self.tasks.spawn(serving);
        };
        for listener in listeners.public {
            serve(listener, routers.public.clone());
        }
        for listener in listeners.metrics {
            serve(listener, routers.metrics.clone());
        }
        for listener in listeners.admin {
            // The mode of a Unix socket decides who can connect.
            let operator = match &listener {
                Listener::Unix(_) => Operator::Connected,
                Listener::Tcp(_) => Operator::Identified,
            };
            serve(listener, (routers.admin)(operator));
        }
    }

    /// Disconnects the consumers, or hands them to the next process.
    pub async fn close_consumers(&self) {
        self.firehose.shutdown().await;
    }

    /// Waits for in-flight requests and background tasks.
    pub async fn stop(&self) {
        self.tasks.close();
        if timeout(LAST_ANSWERS, self.tasks.wait()).await.is_err() {
            warn!("requests that took too long got no answer");
        }
    }
}

/// Opens the log on a thread of its own: recovery reads files.
pub(super) async fn open_log(
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
        Err(failure) => Err(StartError::Thread(std::io::Error::other(failure))),
    }
}
