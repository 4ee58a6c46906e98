//! Reads a relay's counters from outside, as Prometheus would. Knows the text format as far as the
//! relay writes it.

use std::collections::BTreeMap;
use std::time::Duration;

/// How long a scrape may take.
const SCRAPE_TIME: Duration = Duration::from_secs(5);
/// Events dropped, by the rule they broke.
const DROPPED: &str = "relay_events_dropped_total";

/// The samples of one scrape, by name and labels as written (`name{label="value"}`).
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Samples(BTreeMap<String, f64>);

impl Samples {
    /// Reads `url`, a `/metrics` page.
    pub async fn scrape(url: &str) -> Result<Samples, reqwest::Error> {
        let answer = crate::dial::plain_client()
            .get(url)
            .timeout(SCRAPE_TIME)
            .send()
            .await?;
        Ok(Samples::parse(&answer.error_for_status()?.text().await?))
    }

    fn parse(text: &str) -> Samples {
        let lines = text.lines().filter(|line| !line.starts_with('#'));
        let sample = |line: &str| {
            let (name, value) = line.rsplit_once(' ')?;
            Some((name.to_owned(), value.parse().ok()?))
        };
        Samples(lines.filter_map(sample).collect())
    }

    /// A sample, 0 where there is none.
    pub fn get(&self, name: &str) -> f64 {
        self.0.get(name).copied().unwrap_or(0.0)
    }

    /// The sum of all samples of a name, whatever their labels.
    pub fn sum(&self, name: &str) -> f64 {
        let labelled = |sample: &str| {
            sample
                .strip_prefix(name)
                .is_some_and(|rest| rest.is_empty() || rest.starts_with('{'))
        };
        self.0
            .iter()
            .filter(|(sample, _)| labelled(sample))
            .map(|(_, value)| value)
            .sum()
    }

    /// Events dropped under a rule.
    pub fn dropped(&self, rule: &str) -> u64 {
        self.get(&format!("{DROPPED}{{rule=\"{rule}\"}}")) as u64
    }

    /// Events dropped, by rule; rules that never struck are left out.
    pub fn drops(&self) -> BTreeMap<String, u64> {
        let rule = |sample: &str| {
            Some(
                sample
                    .strip_prefix(DROPPED)?
                    .strip_prefix("{rule=\"")?
                    .strip_suffix("\"}")?
                    .to_owned(),
            )
        };
        let drops = self
            .0
            .iter()
            .filter_map(|(sample, value)| Some((rule(sample)?, *value as u64)));
        drops.filter(|(_, count)| *count > 0).collect()
    }

    /// What these counters counted since `before`.
    pub fn since(&self, before: &Samples) -> Samples {
        Samples(
            self.0
                .iter()
                .map(|(name, value)| (name.clone(), value - before.get(name)))
                .collect(),
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_what_a_relay_writes() {
        let text = "# HELP relay_events_dropped_total Events dropped\n# TYPE relay_events_dropped_total counter\n\
            relay_events_dropped_total{rule=\"signature\"} 3\nrelay_events_dropped_total{rule=\"car\"} 0\n\
            relay_log_seq 17\nrelay_log_seq_other 5\nrelay_time_bucket{le=\"+Inf\"} 2.5\nbroken\n";
        let samples = Samples::parse(text);
        assert_eq!(
            (samples.dropped("signature"), samples.dropped("block_hash")),
            (3, 0)
        );
        assert_eq!(
            samples.drops(),
            BTreeMap::from([("signature".to_owned(), 3)])
        );
        assert_eq!(
            (
                samples.sum("relay_events_dropped_total"),
                samples.sum("relay_log_seq")
            ),
            (3.0, 17.0)
        );
        assert_eq!(samples.get("relay_time_bucket{le=\"+Inf\"}"), 2.5);
        let later = Samples::parse("relay_log_seq 20\n");
        assert_eq!(later.since(&samples).get("relay_log_seq"), 3.0);
    }
}
