//! Once a second: changed statuses go to the database, gauges are set, and due log lines about hosts are written.

use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::time::{MissedTickBehavior, interval};
use tokio_util::sync::CancellationToken;

use super::host_log::HostLog;
use super::shared::Shared;
use crate::hosts::HostHandle;

const INTERVAL: Duration = Duration::from_secs(1);

/// Runs until cancelled.
pub(super) async fn run(shared: Arc<Shared>, cancel: CancellationToken) {
    let mut ticks = interval(INTERVAL);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    while cancel.run_until_cancelled(ticks.tick()).await.is_some() {
        shared.hosts.write_changed_statuses().await;
        shared.hosts.sample();
        for host in shared.hosts.list() {
            write_log(&host, &shared.log);
        }
        shared.log.suppressed();
    }
}

fn write_log(host: &HostHandle, log: &HostLog) {
    let now = Instant::now();
    if let Some(change) = host.take_contact_change(now) {
        log.contact(host.name(), &change);
    }
    if let Some(summary) = host.take_drop_summary(now) {
        log.drops(host.name(), &summary);
    }
}
