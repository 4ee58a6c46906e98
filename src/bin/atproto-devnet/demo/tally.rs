//! What the demo counted: the figures of its footer and of its last line.

use std::collections::{BTreeMap, VecDeque};
use std::time::{Duration, Instant};

use super::screen::{Line, Style};

/// The rate is that of so many seconds.
const RATE_WINDOW: Duration = Duration::from_secs(10);
/// The lag is the median of so many events.
const LAG_EVENTS: usize = 32;

/// Events by what became of them.
#[derive(Debug)]
pub struct Tally {
    began: Instant,
    forwarded: u64,
    refused: BTreeMap<String, u64>,
    /// Forwarded ones whose account's chain was broken.
    desynchronized: u64,
    recent: VecDeque<Instant>,
    lags: VecDeque<Duration>,
}

impl Tally {
    pub fn new(began: Instant) -> Tally {
        Tally {
            began,
            forwarded: 0,
            refused: BTreeMap::new(),
            desynchronized: 0,
            recent: VecDeque::new(),
            lags: VecDeque::new(),
        }
    }

    /// An event of the set-up, which is in no rate.
    pub fn set_up(&mut self) {
        self.forwarded += 1;
    }

    /// An event that came out of the relay at `now`, so long after its host made it.
    pub fn forwarded(&mut self, now: Instant, lag: Duration) {
        self.forwarded += 1;
        self.recent.push_back(now);
        self.lags.push_back(lag);
        if self.lags.len() > LAG_EVENTS {
            self.lags.pop_front();
        }
    }

    /// An event that did not come out.
    pub fn refused(&mut self, rule: &str) {
        *self.refused.entry(rule.to_owned()).or_default() += 1;
    }

    /// How many forwarded events broke their account's chain by now; says whether these are more than before.
    pub fn desynchronized(&mut self, count: u64) -> bool {
        let is_more = count > self.desynchronized;
        self.desynchronized = count;
        is_more
    }

    /// Events that came out.
    pub fn count(&self) -> u64 {
        self.forwarded
    }

    /// The figures as they are at `now`.
    pub fn footer(&mut self, now: Instant) -> Vec<Line> {
        while self
            .recent
            .front()
            .is_some_and(|at| now - *at > RATE_WINDOW)
        {
            self.recent.pop_front();
        }
        let running = (now - self.began).max(Duration::from_secs(1));
        let rate = self.recent.len() as f64 / running.min(RATE_WINDOW).as_secs_f64();
        let seconds = running.as_secs();
        let figures = format!(
            "✓ {} forwarded   ✗ {} refused   ~ {} desynchronized   {rate:.1} events/s   lag {}   {}:{:02}",
            self.forwarded,
            self.all_refused(),
            self.desynchronized,
            self.lag(),
            seconds / 60,
            seconds % 60,
        );
        let rules = match self.rules() {
            rules if rules.is_empty() => "refused: none yet".to_owned(),
            rules => format!("refused: {rules}"),
        };
        vec![
            Line::new(Style::Bold, figures),
            Line::new(Style::Bad, rules),
        ]
    }

    /// All of it in one line.
    pub fn summary(&self, now: Instant) -> String {
        let seconds = (now - self.began).as_secs_f64();
        let rules = match self.rules() {
            rules if rules.is_empty() => String::new(),
            rules => format!(" ({rules})"),
        };
        format!(
            "{} events forwarded, {} refused by rule{rules}, {} desynchronized, in {seconds:.0} seconds",
            self.forwarded,
            self.all_refused(),
            self.desynchronized
        )
    }

    fn all_refused(&self) -> u64 {
        self.refused.values().sum()
    }

    /// `block_hash 11, signature 9`: the most frequent first.
    fn rules(&self) -> String {
        let mut rules: Vec<_> = self.refused.iter().collect();
        rules.sort_by_key(|(_, count)| std::cmp::Reverse(**count));
        let rules: Vec<String> = rules
            .iter()
            .map(|(rule, count)| format!("{rule} {count}"))
            .collect();
        rules.join(", ")
    }

    /// The median from host to consumer; host and consumer have one clock, in milliseconds.
    fn lag(&self) -> String {
        let mut lags: Vec<Duration> = self.lags.iter().copied().collect();
        lags.sort_unstable();
        match lags.get(lags.len() / 2) {
            None => "-".to_owned(),
            Some(lag) => format!("{} ms", lag.as_millis().max(1)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_figures_are_those_of_the_events() {
        let began = Instant::now();
        let at = |seconds| began + Duration::from_secs(seconds);
        let mut tally = Tally::new(began);
        assert!(
            tally
                .summary(at(3))
                .starts_with("0 events forwarded, 0 refused by rule, 0")
        );
        for second in 0..40 {
            tally.forwarded(at(second), Duration::from_millis(second));
        }
        for rule in ["signature", "block_hash", "block_hash"] {
            tally.refused(rule);
        }
        assert!(tally.desynchronized(2) && !tally.desynchronized(2));
        let footer = tally.footer(at(75));
        assert!(
            footer[0]
                .text
                .contains("✓ 40 forwarded   ✗ 3 refused   ~ 2 desynchronized")
        );
        assert!(
            footer[0].text.contains("0.0 events/s   lag 24 ms   1:15"),
            "{footer:?}"
        );
        assert_eq!(footer[1].text, "refused: block_hash 2, signature 1");
        assert_eq!(
            tally.summary(at(75)),
            "40 events forwarded, 3 refused by rule (block_hash 2, signature 1), 2 desynchronized, in 75 seconds"
        );
    }
}
