//! The health of the part that serves: log, disk, memory, clock, consumers.

use std::time::{Duration, Instant};

use tokio::task;

use super::Findings;
use crate::clock::Clock;
use crate::eventlog::{self, EventLog};
use crate::relay::core::Core;
use crate::telemetry::{Finding, ProblemName};

/// How far the system's clock may be behind the time that has surely come: what NTP corrects in one step is less.
const TOLERATED_CLOCK: Duration = Duration::from_secs(60);
/// Reports of the system that memory is short within [`PRESSURE_WINDOW`] that are a problem: one is what caches are for.
/// The system reports it every five seconds at most.
const PRESSURES: usize = 3;
const PRESSURE_WINDOW: Duration = Duration::from_secs(60);
/// How long a consumer that fell out of the replay window counts.
const CUT_WINDOW: Duration = Duration::from_secs(600);
/// Networks whose consumers fell out that are a problem, where they are also one in so many of all: fewer are slow
/// themselves.
const NETWORKS_CUT: usize = 2;
const NETWORKS_PER_CUT: usize = 10;

/// Examines [`Core`].
pub(super) struct CoreHealth {
    clock: Clock,
    /// When the system reported that memory is short, and how often it had.
    pressures: Vec<Instant>,
    pressures_counted: u64,
}

impl CoreHealth {
    pub fn new(core: &Core) -> Self {
        Self {
            clock: Clock::after(core.log.newest_at_open()),
            pressures: Vec::new(),
            pressures_counted: core.metrics.memory_pressure.get(),
        }
    }

    /// What is found now; `disk` was found by [`disk`].
    pub fn examine(&mut self, core: &Core, disk: Option<Finding>, now: Instant) -> Findings {
        [
            (ProblemName::Log, log(&core.log)),
            (ProblemName::Disk, disk),
            (ProblemName::Memory, self.memory(core, now)),
            (ProblemName::Clock, self.clock_behind()),
            (ProblemName::ConsumersCut, consumers_cut(core)),
        ]
        .into()
    }

    fn memory(&mut self, core: &Core, now: Instant) -> Option<Finding> {
        let counted = core.metrics.memory_pressure.get();
        if counted > self.pressures_counted {
            self.pressures.push(now);
            self.pressures_counted = counted;
        }
        self.pressures
            .retain(|at| now.saturating_duration_since(*at) < PRESSURE_WINDOW);
        let often = self.pressures.len() >= PRESSURES;
        often.then(|| {
            Finding::new("the machine is short of memory, and shrinking the caches does not help")
        })
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
}

fn log(log: &EventLog) -> Option<Finding> {
    match log.health() {
        eventlog::Health::Good => None,
        eventlog::Health::Failing { reason, .. } => {
            let folder = log.options().dir.display();
            Some(Finding::because(
                "the event log cannot be written, events wait",
                format!("{folder}: {reason}"),
            ))
        }
    }
}

fn consumers_cut(core: &Core) -> Option<Finding> {
    let (cut, others) = core.firehose.consumers().networks_cut(CUT_WINDOW);
    let many = cut >= NETWORKS_CUT && cut * NETWORKS_PER_CUT >= cut + others;
    many.then(|| {
        Finding::new(format!(
            "consumers on {cut} networks fell out of the replay window within ten minutes; {others} others have \
             consumers"
        ))
    })
}

/// Examines the log's disk.
pub(super) async fn disk(log: EventLog) -> Option<Finding> {
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
