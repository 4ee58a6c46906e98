//! The health of a relay: every part is examined once a second, and findings become the problems of
//! [`crate::telemetry::Health`], a line in the log when one starts and one when it ends.
//! Promises that no single host and no single consumer raises a problem or hides one: hosts and networks are counted,
//! never what they send. Changes nothing.

mod core;
mod directory;
mod ingest;
mod losses;

use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use tokio::sync::watch;
use tokio::time::{MissedTickBehavior, interval};
use tokio_util::sync::CancellationToken;
use tracing::{error, info, warn};

use super::metrics::Metrics;
use super::running::Running;
use crate::telemetry::{Change, Finding, Health, ProblemName, Watch};

use self::core::CoreHealth;
use ingest::IngestHealth;

const INTERVAL: Duration = Duration::from_secs(1);

/// What the examination of a part found, by problem.
type Findings = Vec<(ProblemName, Option<Finding>)>;

/// Examines a relay.
pub(super) struct Examiner {
    running: Arc<Running>,
    watch: Watch,
    core: CoreHealth,
    ingest: IngestHealth,
}

impl Examiner {
    pub fn new(running: Arc<Running>) -> Self {
        Self {
            core: CoreHealth::new(&running.core),
            ingest: IngestHealth::default(),
            watch: Watch::default(),
            running,
        }
    }

    /// Examines the relay until it closes.
    pub async fn run(mut self, health: watch::Sender<Arc<Health>>, closing: CancellationToken) {
        let (store, log) = (
            self.running.ingest.store.clone(),
            self.running.core.log.clone(),
        );
        // In tasks of their own: a database or a disk that hangs must not delay the rest.
        let database = probe(closing.clone(), move || ingest::database(store.clone()));
        let disk = probe(closing.clone(), move || core::disk(log.clone()));
        let mut ticks = interval(INTERVAL);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        while closing.run_until_cancelled(ticks.tick()).await.is_some() {
            let (database, disk) = (database.borrow().clone(), disk.borrow().clone());
            let now = Instant::now();
            let mut findings = self.core.examine(&self.running.core, disk, now);
            findings.extend(self.ingest.examine(&self.running.ingest, database, now));
            for name in ProblemName::ALL {
                let finding = first(&findings, name);
                if let Some(change) = self.watch.observe(name, finding, now, SystemTime::now()) {
                    report(&change, &self.running.core.metrics);
                }
            }
            health.send_replace(Arc::new(self.watch.health()));
        }
    }
}

/// The first finding of a problem.
fn first(findings: &Findings, name: ProblemName) -> Option<Finding> {
    let mut of_name = findings.iter().filter(|(it, _)| *it == name);
    of_name.find_map(|(_, finding)| finding.clone())
}

/// Examines again and again, in a task of its own. Returns the last finding.
fn probe<F>(
    closing: CancellationToken,
    mut examine: impl FnMut() -> F + Send + 'static,
) -> watch::Receiver<Option<Finding>>
where
    F: Future<Output = Option<Finding>> + Send,
{
    let (sender, answer) = watch::channel(None);
    tokio::spawn(async move {
        let mut ticks = interval(INTERVAL);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        while closing.run_until_cancelled(ticks.tick()).await.is_some() {
            let Some(found) = closing.run_until_cancelled(examine()).await else {
                return;
            };
            sender.send_replace(found);
        }
    });
    answer
}

/// Logs a change and sets its metric.
fn report(change: &Change, metrics: &Metrics) {
    match change {
        Change::Started(problem) => {
            let name = problem.name;
            metrics.problems[name as usize].set(1);
            let (what, to_do) = (problem.finding.full(), name.what_to_do());
            if name.is_outage() {
                error!(problem = name.as_str(), "{what}; {to_do}");
            } else {
                warn!(problem = name.as_str(), "{what}; {to_do}");
            }
        }
        Change::Ended(name, lasted) => {
            metrics.problems[*name as usize].set(0);
            info!(
                problem = name.as_str(),
                seconds = lasted.as_secs(),
                "the problem has ended"
            );
        }
    }
}
