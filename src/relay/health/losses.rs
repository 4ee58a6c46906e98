//! Whether hosts lose most of what they send, and to which rule. Each host has one vote, however much it sends, so that the
//! flood of one is the trouble of that one; what it is about is in its own line in the log.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::hosts::HostHandle;
use crate::hosts::Rule;
use crate::store::HostId;
use crate::telemetry::Finding;

/// Events count for one to two of these.
const HALF_WINDOW: Duration = Duration::from_secs(30);
/// Events of a host that are needed for its vote: fewer tell nothing.
const FEWEST_EVENTS: u64 = 3;
/// Hosts that must agree, and of how many that vote they must be one.
const FEWEST_HOSTS: usize = 2;
const VOTERS_PER_VOTE: usize = 2;

/// What a host had sent at a moment, and what of it was dropped.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Totals {
    events: u64,
    dropped: Vec<(Rule, u64)>,
}

/// How hosts voted.
#[derive(Debug, Default)]
struct Votes {
    voters: usize,
    rules: Vec<(Rule, usize)>,
}

/// The hosts' events of the last half minute to minute.
#[derive(Debug, Default)]
pub(super) struct Losses {
    /// What hosts had sent when the window began, and when its second half did.
    began: HashMap<HostId, Totals>,
    halved: HashMap<HostId, Totals>,
    halved_at: Option<Instant>,
    votes: Votes,
}

impl Losses {
    /// Counts what hosts have sent since.
    pub(super) fn look(&mut self, hosts: &[Arc<HostHandle>], now: Instant) {
        let totals = hosts.iter().map(|host| {
            let dropped = host.drops_by_rule();
            let events = host.events();
            (host.id(), Totals { events, dropped })
        });
        self.count(totals.collect(), now);
    }

    fn count(&mut self, totals: HashMap<HostId, Totals>, now: Instant) {
        self.votes = Votes::default();
        for (host, totals) in &totals {
            self.votes.take(totals.since(self.began.get(host)));
        }
        let halved_at = *self.halved_at.get_or_insert(now);
        if now.saturating_duration_since(halved_at) >= HALF_WINDOW {
            self.began = std::mem::replace(&mut self.halved, totals);
            self.halved_at = Some(now);
        }
    }

    /// Many hosts at once send revs from the future: then it is the clock here.
    pub(super) fn many_in_the_future(&self) -> Option<Finding> {
        let (votes, voters) = (self.votes.of(Rule::RevFuture), self.votes.voters);
        (votes >= FEWEST_HOSTS && votes * VOTERS_PER_VOTE >= voters).then(|| {
            Finding::new(format!(
                "{votes} of {voters} hosts send revs from the future: the system's clock is behind"
            ))
        })
    }

    /// Most of the hosts that send events lose most of them to the same rule. The only host that is connected is most
    /// hosts; `but_the_future` leaves out what is told of the clock already.
    pub(super) fn most_to_one_rule(
        &self,
        connected: usize,
        but_the_future: bool,
    ) -> Option<Finding> {
        let counts = |rule: Rule| !(but_the_future && rule == Rule::RevFuture);
        let rules = self.votes.rules.iter();
        let (rule, votes) = rules
            .filter(|(rule, _)| counts(*rule))
            .max_by_key(|(_, votes)| votes)?;
        let voters = self.votes.voters;
        let needed = FEWEST_HOSTS.min(connected.max(1));
        (*votes >= needed && votes * VOTERS_PER_VOTE >= voters).then(|| {
            Finding::new(format!(
                "{votes} of {voters} hosts that send events lose most of them to the rule {rule}"
            ))
        })
    }
}

impl Totals {
    /// What came since, for a host that was there or was not.
    fn since(&self, before: Option<&Totals>) -> Totals {
        let Some(before) = before else {
            return self.clone();
        };
        let earlier = |rule: Rule| before.dropped.iter().find(|(it, _)| *it == rule);
        let dropped = self.dropped.iter().map(|(rule, count)| {
            let earlier = earlier(*rule).map_or(0, |(_, count)| *count);
            (*rule, count.saturating_sub(earlier))
        });
        Totals {
            events: self.events.saturating_sub(before.events),
            dropped: dropped.collect(),
        }
    }
}

impl Votes {
    fn take(&mut self, sent: Totals) {
        // An event may be dropped long after it was received, as when its look-up took long.
        let dropped: u64 = sent.dropped.iter().map(|(_, count)| count).sum();
        let events = sent.events.max(dropped);
        if events < FEWEST_EVENTS {
            return;
        }
        self.voters += 1;
        let most = sent.dropped.iter().max_by_key(|(_, count)| *count);
        let Some(&(rule, _)) = most.filter(|(_, count)| count * 2 >= events) else {
            return;
        };
        match self.rules.iter_mut().find(|(voted, _)| *voted == rule) {
            Some((_, votes)) => *votes += 1,
            None => self.rules.push((rule, 1)),
        }
    }

    fn of(&self, rule: Rule) -> usize {
        let voted = self.rules.iter().find(|(voted, _)| *voted == rule);
        voted.map_or(0, |(_, votes)| *votes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const FUTURE: Rule = Rule::RevFuture;

    /// Events of a host, and how many of them were dropped by which rule.
    type Sent = (u64, Vec<(Rule, u64)>);

    fn hosts(sent: &[Sent]) -> HashMap<HostId, Totals> {
        let totals = sent.iter().zip(0..).map(|((events, dropped), id)| {
            let totals = Totals {
                events: *events,
                dropped: dropped.clone(),
            };
            (HostId(id), totals)
        });
        totals.collect()
    }

    #[test]
    fn one_host_is_never_most_of_several() {
        let good = |events| (events, vec![]);
        let bad = |events, rule, dropped| (events, vec![(rule, dropped)]);
        let flood = || {
            (
                2_000_000,
                vec![(FUTURE, 1_000_000), (Rule::Signature, 1_000_000)],
            )
        };
        let wrong = || bad(9, Rule::Signature, 9);
        for (sent, future, drops) in [
            // A flood beside hosts that send well, send little, or send nothing.
            (vec![flood(), good(5), good(7)], false, false),
            (vec![flood(), good(1), good(0)], false, false),
            (
                vec![flood(), wrong(), good(9), good(8), good(4)],
                false,
                false,
            ),
            // Many, whatever one sends.
            (vec![wrong(), wrong(), good(1_000_000)], false, true),
            (
                vec![wrong(), wrong(), good(4), good(5), good(6)],
                false,
                false,
            ),
            (vec![bad(9, FUTURE, 9), bad(9, FUTURE, 5)], true, false),
            (vec![bad(9, FUTURE, 9), bad(9, FUTURE, 4)], false, false),
            // Different rules are different faults.
            (
                vec![wrong(), bad(9, Rule::Car, 9), bad(9, Rule::RevOrder, 9)],
                false,
                false,
            ),
            // The only one.
            (vec![wrong()], false, true),
            (vec![bad(9, FUTURE, 9)], false, true),
            (vec![bad(2, Rule::Car, 2)], false, false),
        ] {
            let mut losses = Losses::default();
            losses.count(hosts(&sent), Instant::now());
            let voted = losses.many_in_the_future().is_some();
            assert_eq!(voted, future, "{sent:?}");
            let voted = losses.most_to_one_rule(sent.len(), future).is_some();
            assert_eq!(voted, drops, "{sent:?}");
        }
    }

    #[test]
    fn what_is_over_counts_no_more() {
        let (start, mut losses) = (Instant::now(), Losses::default());
        let mut bad = |second: u64, sent: u64, dropped: u64| {
            let host = (sent, vec![(Rule::Car, dropped)]);
            losses.count(
                hosts(&[host.clone(), host]),
                start + Duration::from_secs(second),
            );
            losses.most_to_one_rule(2, false).is_some()
        };
        assert!(bad(0, 5, 5));
        assert!(bad(29, 6, 6));
        assert!(bad(30, 7, 7));
        assert!(bad(60, 8, 7), "within a minute");
        assert!(!bad(61, 10, 7), "three events since, and none was dropped");
        assert!(!bad(90, 10, 7));
        assert!(!bad(91, 12, 8), "one of four");
        assert!(bad(92, 14, 11), "four of six");
    }
}
