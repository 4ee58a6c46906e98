//! What a run of `firehose` came to: its last line, and whether --verify is content.

use std::collections::BTreeMap;
use std::time::Instant;

use super::line::Line;
use super::verdict::Verdict;
use crate::failure::Failure;
use crate::output::counted;

/// Events shown, by kind and by verdict.
#[derive(Debug)]
pub struct Tally {
    began: Instant,
    kinds: BTreeMap<&'static str, u64>,
    events: u64,
    good: u64,
    bad: u64,
    unknown: u64,
    /// Why the last event that could not be checked could not.
    obstacle: String,
}

impl Tally {
    pub fn new() -> Tally {
        Tally {
            began: Instant::now(),
            kinds: BTreeMap::new(),
            events: 0,
            good: 0,
            bad: 0,
            unknown: 0,
            obstacle: String::new(),
        }
    }

    /// Takes in a line that is shown.
    pub fn count(&mut self, line: &Line) {
        if line.is_event {
            self.events += 1;
            *self.kinds.entry(line.kind).or_default() += 1;
        }
        match &line.verdict {
            Some(Verdict::Good) => self.good += 1,
            Some(Verdict::Bad(_)) => self.bad += 1,
            Some(Verdict::Unknown(reason)) => {
                self.unknown += 1;
                self.obstacle.clone_from(reason);
            }
            Some(Verdict::NothingToCheck) | None => {}
        }
    }

    /// `5 events in 12.3 seconds: 4 #commit, 1 #identity; 4 verified, 0 bad, 0 unchecked`.
    pub fn summary(&self, is_verified: bool) -> String {
        let mut text = format!(
            "{} in {:.1} seconds",
            counted(self.events, "event", "events"),
            self.began.elapsed().as_secs_f64()
        );
        let kinds: Vec<String> = self
            .kinds
            .iter()
            .map(|(kind, count)| format!("{count} {kind}"))
            .collect();
        if !kinds.is_empty() {
            text.push_str(&format!(": {}", kinds.join(", ")));
        }
        if is_verified {
            let Tally {
                good, bad, unknown, ..
            } = self;
            text.push_str(&format!(
                "; {good} verified, {bad} bad, {unknown} unchecked"
            ));
            if *unknown > 0 {
                text.push_str(&format!(" ({})", self.obstacle));
            }
        }
        text
    }

    /// Bad events, or none that could be checked though there were some, are a failure.
    pub fn verdict(&self) -> Result<(), Failure> {
        let Tally {
            bad,
            unknown,
            events,
            obstacle,
            ..
        } = self;
        if *bad > 0 {
            return Err(Failure::Failed(format!(
                "{bad} of {events} events are not valid"
            )));
        }
        if *unknown > 0 && self.good == 0 {
            return Err(Failure::Failed(format!(
                "not one event could be checked, of {unknown} with something to check: {obstacle}"
            )));
        }
        Ok(())
    }
}
