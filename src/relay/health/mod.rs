//! Whether the relay is well: every part is looked at once a second, and what is wrong becomes the problems of
//! [`crate::telemetry::Health`], a line in the log when one starts and one when it ends.
//! Promises that no single host and no single consumer raises a problem or hides one: hosts and networks are counted,
//! never what they send. Changes nothing.

mod directory;
mod losses;

use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use tokio::sync::watch;
use tokio::task;
use tokio::time::{MissedTickBehavior, interval, timeout};
use tokio_util::sync::CancellationToken;
use tracing::{error, info, warn};

use super::metrics::Metrics;
use super::operations::Running;
use super::vitals::count_hosts;
use crate::clock::Clock;
use crate::eventlog;
use crate::telemetry::{Change, Finding, Health, ProblemName, Watch};

use directory::Directory;
use losses::Losses;

/// How often.
const EVERY: Duration = Duration::from_secs(1);
/// A database that takes longer to answer counts as away.
const DATABASE_PATIENCE: Duration = Duration::from_secs(5);
/// Of how many known hosts at least one is connected where all is well. Of the hosts of a public relay's list about a third
/// no longer exists; below a tenth it is the relay's own way out that fails. Strangers cannot add that many dead hosts:
/// requestCrawl takes only living ones, and few a day (`new_hosts_per_day`).
const HOSTS_PER_CONNECTED: usize = 10;
/// How far the system's clock may be behind the time that has surely come: what NTP corrects in one step is less.
const TOLERATED_CLOCK: Duration = Duration::from_secs(60);
/// How long hosts may wait for one another's memory: a burst is over in a moment.
const FRAME_MEMORY_PATIENCE: Duration = Duration::from_secs(3);
/// Times the system told that memory is short within [`PRESSURE_WINDOW`] that are a problem: one is what caches are for.
/// It tells at most every five seconds.
const PRESSURES: usize = 3;
const PRESSURE_WINDOW: Duration = Duration::from_secs(60);
/// How long a consumer that fell out of the replay window counts.
const CUT_WINDOW: Duration = Duration::from_secs(600);
/// Networks whose consumers fell out that are a problem, where they are also one in so many of all: fewer are slow
/// themselves.
const NETWORKS_CUT: usize = 2;
const NETWORKS_PER_CUT: usize = 10;

/// Looks at a relay.
pub(super) struct Examiner {
    running: Arc<Running>,
    clock: Clock,
    watch: Watch,
    directory: Directory,
    losses: Losses,
    /// When the system told that memory is short, and how often it had.
    pressures: Vec<Instant>,
    pressures_told: u64,
}

impl Examiner {
    pub fn new(running: Arc<Running>, clock: Clock) -> Self {
        let pressures_told = running.metrics.memory_pressure.get();
        Self {
            running,
            clock,
            watch: Watch::default(),
            directory: Directory::default(),
            losses: Losses::default(),
            pressures: Vec::new(),
            pressures_told,
        }
    }

    /// Looks until the relay closes.
    pub async fn run(mut self, health: watch::Sender<Arc<Health>>, closing: CancellationToken) {
        let (asked, looked) = (self.running.clone(), self.running.clone());
        // By themselves: a database or a disk that hangs must not hold up the rest.
        let database = probe(closing.clone(), move || database(asked.clone()));
        let disk = probe(closing.clone(), move || disk(looked.clone()));
        let mut ticks = interval(EVERY);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        while closing.run_until_cancelled(ticks.tick()).await.is_some() {
            let (database, disk) = (database.borrow().clone(), disk.borrow().clone());
            for (name, finding) in self.findings(database, disk) {
                let now = Instant::now();
                if let Some(change) = self.watch.observe(name, finding, now, SystemTime::now()) {
                    tell(&change, &self.running.metrics);
                }
            }
            health.send_replace(Arc::new(self.watch.health()));
        }
    }

    /// What is seen of each problem.
    fn findings(
        &mut self,
        database: Option<Finding>,
        disk: Option<Finding>,
    ) -> [(ProblemName, Option<Finding>); ProblemName::ALL.len()] {
        let (connected, known) = count_hosts(&self.running.hosts);
        let now = Instant::now();
        self.losses.look(&self.running.hosts.list(), now);
        let future = self.losses.many_in_the_future();
        let drops = self.losses.most_to_one_rule(connected, future.is_some());
        [
            (ProblemName::Log, self.log()),
            (ProblemName::Database, self.writer().or(database)),
            (ProblemName::Disk, disk),
            (ProblemName::Memory, self.memory(now)),
            (ProblemName::NoHosts, no_hosts(known)),
            (
                ProblemName::NoHostConnected,
                no_host_connected(connected, known),
            ),
            (ProblemName::Clock, self.clock_behind().or(future)),
            (ProblemName::Directory, self.directory(now)),
            (ProblemName::Drops, drops),
            (ProblemName::ConsumersCut, self.consumers_cut()),
        ]
    }

    fn log(&self) -> Option<Finding> {
        match self.running.log.health() {
            eventlog::Health::Good => None,
            eventlog::Health::Failing { reason, .. } => {
                let folder = self.running.log.options().dir.display();
                Some(Finding::because(
                    "the event log cannot be written, events wait",
                    format!("{folder}: {reason}"),
                ))
            }
        }
    }

    fn writer(&self) -> Option<Finding> {
        let reason = self.running.writer.trouble()?;
        Some(Finding::because(
            "the database takes no changes, they wait",
            reason,
        ))
    }

    fn memory(&mut self, now: Instant) -> Option<Finding> {
        let told = self.running.metrics.memory_pressure.get();
        if told > self.pressures_told {
            self.pressures.push(now);
            self.pressures_told = told;
        }
        self.pressures
            .retain(|at| now.saturating_duration_since(*at) < PRESSURE_WINDOW);
        let often = self.pressures.len() >= PRESSURES;
        let short = often.then(|| {
            Finding::new("the machine is short of memory, and shrinking the caches does not help")
        });
        short.or_else(|| self.frame_memory())
    }

    /// Hosts' frames have memory of their own, and the rest waits for one another.
    fn frame_memory(&self) -> Option<Finding> {
        let memory = self.running.hosts.memory();
        memory
            .short_for
            .filter(|time| *time >= FRAME_MEMORY_PATIENCE)?;
        Some(Finding::because(
            "hosts wait for the memory that their frames share",
            format!(
                "{} hosts wait, {} of {} bytes are lent",
                memory.waiting, memory.shared, memory.shared_limit
            ),
        ))
    }

    fn clock_behind(&self) -> Option<Finding> {
        let behind = self.clock.behind();
        (behind > TOLERATED_CLOCK).then(|| {
            Finding::new(format!(
                "the system's clock is {} s behind events of the log; revs and identities are held against the log's time",
                behind.as_secs()
            ))
        })
    }

    fn directory(&mut self, now: Instant) -> Option<Finding> {
        let (answered, unanswered) = self.running.resolver.metrics().directory_lookups();
        self.directory.look(answered, unanswered, now)
    }

    fn consumers_cut(&self) -> Option<Finding> {
        let (cut, others) = self.running.firehose.consumers().networks_cut(CUT_WINDOW);
        let many = cut >= NETWORKS_CUT && cut * NETWORKS_PER_CUT >= cut + others;
        many.then(|| {
            Finding::new(format!(
                "consumers on {cut} networks fell out of the replay window within ten minutes; {others} others have \
                 consumers"
            ))
        })
    }
}

fn no_hosts(known: usize) -> Option<Finding> {
    (known == 0).then(|| Finding::new("this relay knows no hosts"))
}

fn no_host_connected(connected: usize, known: usize) -> Option<Finding> {
    (connected * HOSTS_PER_CONNECTED < known)
        .then(|| Finding::new(format!("{connected} of {known} hosts are connected")))
}

async fn database(running: Arc<Running>) -> Option<Finding> {
    match timeout(DATABASE_PATIENCE, running.store.check()).await {
        Ok(Ok(())) => None,
        Ok(Err(error)) => Some(Finding::because(
            "can't connect to database",
            error.to_string(),
        )),
        Err(_) => Some(Finding::new("the database does not answer")),
    }
}

async fn disk(running: Arc<Running>) -> Option<Finding> {
    let log = running.log.clone();
    let lacking = task::spawn_blocking(move || log.lacking_room()).await;
    match lacking {
        Ok(Ok(0)) | Err(_) => None,
        Ok(Ok(bytes)) => Some(Finding::new(format!(
            "the log's disk lacks {bytes} bytes of the room that log.min_free_bytes keeps free"
        ))),
        Ok(Err(error)) => Some(Finding::because(
            "the room on the log's disk cannot be read",
            error.to_string(),
        )),
    }
}

/// Asks again and again, in a task of its own; the last answer.
fn probe<F>(
    closing: CancellationToken,
    mut ask: impl FnMut() -> F + Send + 'static,
) -> watch::Receiver<Option<Finding>>
where
    F: Future<Output = Option<Finding>> + Send,
{
    let (sender, answer) = watch::channel(None);
    tokio::spawn(async move {
        let mut ticks = interval(EVERY);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        while closing.run_until_cancelled(ticks.tick()).await.is_some() {
            let Some(found) = closing.run_until_cancelled(ask()).await else {
                return;
            };
            sender.send_replace(found);
        }
    });
    answer
}

/// The line of a change, and its metric.
fn tell(change: &Change, metrics: &Metrics) {
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
