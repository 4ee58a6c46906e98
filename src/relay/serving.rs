//! Starts what serves and observes a relay whose parts are at work: listeners, samples, health checks.

use std::sync::Arc;

use tokio::sync::watch;

use super::core::{Core, Routers};
use super::health::Examiner;
use super::ingest::Ingest;
use super::lifecycle::{Lifecycle, Phase};
use super::listeners::Listeners;
use super::running::Running;
use super::vitals::{Sampler, Vitals};
use crate::{api, firehose, telemetry};

impl Running {
    /// Answers whoever connects, and observes the parts, until the relay stops. Returns the samples.
    pub fn serve(
        core: Core,
        ingest: Ingest,
        listeners: Listeners,
        lifecycle: &Lifecycle,
    ) -> (Arc<Running>, watch::Receiver<Vitals>) {
        let (examined, health) = watch::channel(Arc::default());
        let running = Arc::new(Running {
            core,
            ingest,
            health,
        });
        let state = api::State {
            store: running.ingest.store.clone(),
            operations: running.clone(),
            admin_password: running.core.admin_password.clone(),
        };
        let firehose = firehose::router(running.core.firehose.clone());
        let routers = Routers {
            public: api::router(state.clone(), firehose),
            metrics: telemetry::router(running.clone(), running.core.registry.clone()),
            admin: |operator| api::admin_router(state.clone(), operator),
        };
        running.core.serve(listeners, routers, lifecycle);
        let (sampled, vitals) = watch::channel(Vitals::default());
        let tasks = &running.core.tasks;
        let closing = || lifecycle.until(Phase::Closing);
        tasks.spawn(Sampler(running.clone()).run(sampled, closing()));
        tasks.spawn(Examiner::new(running.clone()).run(examined, closing()));
        (running, vitals)
    }
}
