//! Whether the PLC directory answers, from the counts of look-ups. An answer is also one that a DID does not exist, so that
//! nobody makes it fail by asking for odd DIDs. Look-ups of did:web do not count: their hosts are anybody's.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use crate::telemetry::Finding;

/// Look-ups older than this count no more.
const WINDOW: Duration = Duration::from_secs(60);
/// Failed look-ups that are needed: one or two are an accident.
const FEWEST: u64 = 3;
/// Look-ups of which at most one is answered by a directory that fails.
const PER_ANSWER: u64 = 5;
/// How long it counts as failing when it is not asked any more: accounts that are known need it once a day.
const REMEMBERED: Duration = Duration::from_secs(600);

/// The look-ups of the last minute.
#[derive(Debug, Default)]
pub(super) struct Directory {
    /// Totals when it was last looked at; nothing before the first time.
    totals: Option<(u64, u64)>,
    /// When, answered, failed.
    steps: VecDeque<(Instant, u64, u64)>,
    failed_at: Option<Instant>,
}

impl Directory {
    /// Takes the totals of look-ups that were answered and that failed.
    pub(super) fn look(&mut self, answered: u64, failed: u64, now: Instant) -> Option<Finding> {
        let (answered_before, failed_before) = self
            .totals
            .replace((answered, failed))
            .unwrap_or((answered, failed));
        let step = (now, answered - answered_before, failed - failed_before);
        if step.1 + step.2 > 0 {
            self.steps.push_back(step);
        }
        while self
            .steps
            .front()
            .is_some_and(|(at, ..)| now.saturating_duration_since(*at) > WINDOW)
        {
            self.steps.pop_front();
        }
        let (answered, failed) = self.steps.iter().fold((0, 0), |(answered, failed), step| {
            (answered + step.1, failed + step.2)
        });
        let all = answered + failed;
        if failed >= FEWEST && answered * PER_ANSWER <= all {
            self.failed_at = Some(now);
            return Some(Finding::new(format!(
                "{failed} of {all} look-ups at the PLC directory got no answer within a minute"
            )));
        }
        let lately = |at: Instant| now.saturating_duration_since(at) < REMEMBERED;
        if answered == 0 && self.failed_at.is_some_and(lately) {
            return Some(Finding::new(
                "the PLC directory gave no answer when it was last asked",
            ));
        }
        self.failed_at = None;
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Looks once a second at what each second adds; the seconds at which it fails.
    fn failing(seconds: u64, at: impl Fn(u64) -> (u64, u64)) -> Vec<u64> {
        let (start, mut directory) = (Instant::now(), Directory::default());
        let (mut answered, mut failed) = (1_000, 1_000);
        (0..seconds)
            .filter(|second| {
                let (more, worse) = at(*second);
                (answered, failed) = (answered + more, failed + worse);
                let now = start + Duration::from_secs(*second);
                directory.look(answered, failed, now).is_some()
            })
            .collect()
    }

    #[test]
    fn it_fails_when_next_to_nothing_is_answered_and_until_something_is() {
        // What was counted before the first look is not of this minute.
        assert!(failing(600, |_| (0, 0)).is_empty());
        assert!(failing(600, |second| (4, u64::from(second % 2 == 0))).is_empty());
        assert!(
            failing(600, |second| (0, u64::from(second % 45 == 1))).is_empty(),
            "too few to tell"
        );
        let dead = failing(300, |second| match second {
            1..=100 => (1, 0),
            101..=200 => (0, 1),
            201.. => (1, 0),
            _ => (0, 0),
        });
        let (first, last) = (dead[0], *dead.last().unwrap());
        assert!(
            (140..=155).contains(&first),
            "60 s of good answers are outweighed: {first}"
        );
        assert!((205..=220).contains(&last), "{last}");
        assert_eq!(dead.len() as u64, last - first + 1);
    }

    #[test]
    fn silence_is_no_answer() {
        let dead = failing(1_000, |second| (0, u64::from((1..=5).contains(&second))));
        assert_eq!((dead[0], dead.len()), (3, 660));
        let answered = failing(1_000, |second| {
            (
                u64::from(second == 100),
                u64::from((1..=5).contains(&second)),
            )
        });
        assert_eq!(answered.last(), Some(&99));
    }
}
