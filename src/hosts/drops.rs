//! Dropped events of one host, counted by rule, with an example for the log. Each summary covers a minute at least.
//! Writes no log line itself.

use std::fmt::Display;
use std::time::{Duration, Instant};

use super::rule::Rule;

/// Minimum interval between two log lines of one kind about one host.
pub(super) const REPORT_INTERVAL: Duration = Duration::from_secs(60);

/// Longest text that is kept for a log line, in bytes: a DID has 2 KB at most, and the rest is ours.
const MAX_TEXT_BYTES: usize = 300;

/// A dropped event.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Example {
    /// The account it claimed to be from, as written in the frame.
    pub did: String,
    /// The host's number for it.
    pub seq: Option<i64>,
    /// The reason.
    pub reason: String,
}

/// Events of one host that were dropped under one rule since the relay started.
#[derive(Clone, Debug)]
pub struct Drops {
    /// The rule.
    pub rule: Rule,
    /// How many.
    pub count: u64,
    /// The first one since the last summary.
    pub example: Example,
    /// The part of `count` that a summary has reported.
    reported: u64,
}

/// Dropped events of one host: one entry for each rule that dropped any.
#[derive(Debug, Default)]
pub(super) struct DropCounts {
    drops: Vec<Drops>,
    reported_at: Option<Instant>,
}

/// A summary of what was dropped since the last one.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct DropSummary {
    /// `rule count (n new)`, the most frequent first.
    pub(crate) drops: String,
    pub(crate) rule: Rule,
    pub(crate) example: Example,
}

impl DropCounts {
    pub(super) fn count(&mut self, rule: Rule, did: &str, seq: Option<i64>, reason: &dyn Display) {
        let example = || Example {
            did: shortened(did),
            seq,
            reason: shortened(&reason.to_string()),
        };
        match self.drops.iter_mut().find(|drops| drops.rule == rule) {
            Some(drops) => {
                if drops.count == drops.reported {
                    drops.example = example();
                }
                drops.count += 1;
            }
            None => self.drops.push(Drops {
                rule,
                count: 1,
                reported: 0,
                example: example(),
            }),
        }
    }

    pub(super) fn all(&self) -> Vec<Drops> {
        self.drops.clone()
    }

    pub(super) fn by_rule(&self) -> Vec<(Rule, u64)> {
        let drops = self.drops.iter();
        drops.map(|drops| (drops.rule, drops.count)).collect()
    }

    /// Takes the summary that is due.
    pub(super) fn take_summary(&mut self, now: Instant) -> Option<DropSummary> {
        if self
            .reported_at
            .is_some_and(|at| now.saturating_duration_since(at) < REPORT_INTERVAL)
        {
            return None;
        }
        let mut new: Vec<_> = self
            .drops
            .iter()
            .map(|drops| (drops.count - drops.reported, drops))
            .filter(|(new, _)| *new > 0)
            .collect();
        new.sort_by_key(|(new, _)| std::cmp::Reverse(*new));
        let (_, first) = new.first()?;
        let summary = DropSummary {
            drops: new
                .iter()
                .map(|(new, drops)| format!("{} {} ({new} new)", drops.rule, drops.count))
                .collect::<Vec<_>>()
                .join(", "),
            rule: first.rule,
            example: first.example.clone(),
        };
        self.reported_at = Some(now);
        for drops in &mut self.drops {
            drops.reported = drops.count;
        }
        Some(summary)
    }
}

/// The beginning of a text.
pub(super) fn shortened(text: &str) -> String {
    text[..text.floor_char_boundary(MAX_TEXT_BYTES)].to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn drops_are_summed_up_once_a_minute_with_an_example() {
        let start = Instant::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        let mut dropped = DropCounts::default();
        assert_eq!(dropped.take_summary(at(0)), None);
        let reason = "it is another key's";
        dropped.count(Rule::Signature, "did:plc:a", Some(7), &reason);
        dropped.count(Rule::Signature, "did:plc:b", Some(8), &reason);
        dropped.count(Rule::Frame, &"x".repeat(5_000), None, &"no map");
        let summary = dropped.take_summary(at(0)).unwrap();
        assert_eq!(summary.drops, "signature 2 (2 new), frame 1 (1 new)");
        assert_eq!(
            (
                summary.rule,
                summary.example.did.as_str(),
                summary.example.seq
            ),
            (Rule::Signature, "did:plc:a", Some(7))
        );
        dropped.count(Rule::Frame, "did:plc:c", Some(9), &"no map");
        assert_eq!(dropped.take_summary(at(59)), None);
        let summary = dropped.take_summary(at(60)).unwrap();
        assert_eq!(summary.drops, "frame 2 (1 new)");
        assert_eq!(summary.example.did, "did:plc:c");
        assert_eq!(dropped.take_summary(at(600)), None, "nothing changed");
        assert_eq!(dropped.by_rule()[1], (Rule::Frame, 2));
    }
}
