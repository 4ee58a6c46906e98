//! The health of the part that fills the log: database, hosts, the memory of their frames, directory, dropped events.

use std::time::{Duration, Instant};

use tokio::time::timeout;

use super::Findings;
use super::directory::Directory;
use super::losses::Losses;
use crate::relay::ingest::Ingest;
use crate::relay::vitals::count_hosts;
use crate::store::Store;
use crate::telemetry::{Finding, ProblemName};

/// A database that takes longer to answer counts as unreachable.
const DATABASE_TIMEOUT: Duration = Duration::from_secs(5);
/// Of how many known hosts at least one is connected where all is well. Of the hosts of a public relay's list about a third
/// no longer exists; below a tenth it is the relay's own way out that fails. Strangers cannot add that many dead hosts:
/// requestCrawl takes only living ones, and few a day (`new_hosts_per_day`).
const HOSTS_PER_CONNECTED: usize = 10;
/// How long hosts may wait for one another's memory: a burst is over in a moment.
const FRAME_MEMORY_TIMEOUT: Duration = Duration::from_secs(3);

/// Examines [`Ingest`].
#[derive(Default)]
pub(super) struct IngestHealth {
    directory: Directory,
    losses: Losses,
}

impl IngestHealth {
    /// What is found now; `database` was found by [`database`].
    pub fn examine(
        &mut self,
        ingest: &Ingest,
        database: Option<Finding>,
        now: Instant,
    ) -> Findings {
        let (connected, known) = count_hosts(&ingest.hosts);
        self.losses.look(&ingest.hosts.list(), now);
        let future = self.losses.many_in_the_future();
        let drops = self.losses.most_to_one_rule(connected, future.is_some());
        [
            (ProblemName::Database, writer(ingest).or(database)),
            (ProblemName::Memory, frame_memory(ingest)),
            (ProblemName::NoHosts, no_hosts(known)),
            (
                ProblemName::NoHostConnected,
                no_host_connected(connected, known),
            ),
            (ProblemName::Clock, future),
            (ProblemName::Directory, self.directory(ingest, now)),
            (ProblemName::Drops, drops),
        ]
        .into()
    }

    fn directory(&mut self, ingest: &Ingest, now: Instant) -> Option<Finding> {
        let (answered, unanswered) = ingest.resolver.metrics().directory_lookups();
        self.directory.look(answered, unanswered, now)
    }
}

fn writer(ingest: &Ingest) -> Option<Finding> {
    let reason = ingest.writer.trouble()?;
    Some(Finding::because(
        "the database takes no changes, they wait",
        reason,
    ))
}

/// Hosts' frames have memory of their own, and the rest waits for one another.
fn frame_memory(ingest: &Ingest) -> Option<Finding> {
    let memory = ingest.hosts.memory();
    memory
        .short_for
        .filter(|time| *time >= FRAME_MEMORY_TIMEOUT)?;
    Some(Finding::because(
        "hosts wait for the memory that their frames share",
        format!(
            "{} hosts wait, {} of {} bytes are lent",
            memory.waiting, memory.shared, memory.shared_limit
        ),
    ))
}

fn no_hosts(known: usize) -> Option<Finding> {
    (known == 0).then(|| Finding::new("this relay knows no hosts"))
}

fn no_host_connected(connected: usize, known: usize) -> Option<Finding> {
    (connected * HOSTS_PER_CONNECTED < known)
        .then(|| Finding::new(format!("{connected} of {known} hosts are connected")))
}

/// Examines the database.
pub(super) async fn database(store: Store) -> Option<Finding> {
    match timeout(DATABASE_TIMEOUT, store.check()).await {
        Ok(Ok(())) => None,
        Ok(Err(error)) => Some(Finding::because(
            "can't connect to database",
            error.to_string(),
        )),
        Err(_) => Some(Finding::new("the database does not answer")),
    }
}
