//! Metrics of the rooms that have none of their own yet. They belong to the process, so two relays in one process
//! (tests) add up.

use std::sync::OnceLock;

use prometheus::core::Collector;
use prometheus::{IntCounter, IntCounterVec, IntGauge, IntGaugeVec, Opts, Registry, TextEncoder};

/// The metrics of this process.
pub fn metrics() -> &'static Metrics {
    static METRICS: OnceLock<Metrics> = OnceLock::new();
    METRICS.get_or_init(Metrics::new)
}

/// Brings a counter up to a total that another room keeps. A total below the counter changes nothing.
pub fn raise_to(counter: &IntCounter, total: u64) {
    counter.inc_by(total.saturating_sub(counter.get()));
}

/// Why a consumer was cut that neither closed nor fell out of the window.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Cut {
    /// It took nothing.
    Reading,
    /// It said nothing.
    Silence,
    /// It broke the WebSocket protocol.
    Protocol,
}

/// Handles of every metric. Gauges named "sampled" are set when the metrics are read.
pub struct Metrics {
    registry: Registry,

    /// Steps of recovery at the start: events applied once more, segments looked through.
    pub recovery_steps: IntCounter,

    /// Consumers connected, sampled.
    pub consumers: IntGauge,
    /// Events between the slowest consumer's position and the head, sampled.
    pub consumer_lag_slowest: IntGauge,
    /// The same of the consumer in the middle, sampled.
    pub consumer_lag_median: IntGauge,
    handed_over: [IntCounter; 2],
    /// Consumers admitted since the start, sampled.
    pub consumers_admitted: IntCounter,
    /// Consumers refused by a limit, sampled.
    pub consumers_refused: IntCounter,
    /// Consumers that fell out of the replay window.
    pub consumers_too_slow: IntCounter,
    consumers_cut: [IntCounter; 3],
    /// Times a consumer was read more slowly because of what it sent.
    pub consumers_held_back: IntCounter,
    /// Events sent to all consumers together, sampled.
    pub consumer_events: IntCounter,
    /// Bytes sent to all consumers together, sampled.
    pub consumer_bytes: IntCounter,

    http_connections_closed: [IntCounter; 2],
}

impl Metrics {
    fn new() -> Metrics {
        let registry = Registry::new();
        let r = Registrar(&registry);
        let handed_over = r.counters(
            "relay_consumers_handed_over_total",
            "Consumers of the former process, by what became of them",
            &["outcome"],
        );
        let consumers_cut = r.counters(
            "relay_consumers_cut_total",
            "Consumers cut that took nothing, said nothing, or broke the WebSocket protocol",
            &["reason"],
        );
        let http_connections_closed = r.counters(
            "relay_http_connections_closed_total",
            "Connections that are no consumers closed by a limit: idle ones that made room, those too many from an address",
            &["reason"],
        );
        let consumer_lag = r.gauges(
            "relay_consumer_lag_events",
            "Events between a consumer's position and the end of the log",
            &["of"],
        );
        Metrics {
            recovery_steps: r.counter(
                "relay_recovery_steps_total",
                "Steps of recovery at the start: events applied once more, segments looked through",
            ),
            consumer_lag_slowest: consumer_lag.with_label_values(&["slowest"]),
            consumer_lag_median: consumer_lag.with_label_values(&["median"]),
            handed_over: ["closed", "kept"]
                .map(|outcome| handed_over.with_label_values(&[outcome])),
            http_connections_closed: ["address", "idle"]
                .map(|reason| http_connections_closed.with_label_values(&[reason])),
            consumers: r.gauge("relay_consumers", "Consumers of the firehose"),
            consumers_admitted: r.counter("relay_consumers_admitted_total", "Consumers admitted"),
            consumers_refused: r.counter(
                "relay_consumers_refused_total",
                "Consumers refused by a limit",
            ),
            consumers_too_slow: r.counter(
                "relay_consumers_too_slow_total",
                "Consumers that fell out of the replay window",
            ),
            consumers_cut: ["reading", "silence", "protocol"]
                .map(|reason| consumers_cut.with_label_values(&[reason])),
            consumers_held_back: r.counter(
                "relay_consumers_held_back_total",
                "Times a consumer was read more slowly because of what it sent",
            ),
            consumer_events: r.counter(
                "relay_consumer_events_total",
                "Events sent to all consumers together",
            ),
            consumer_bytes: r.counter(
                "relay_consumer_bytes_total",
                "Bytes sent to all consumers together",
            ),
            registry,
        }
    }

    /// Consumers that were cut.
    pub fn consumers_cut(&self, reason: Cut) -> &IntCounter {
        &self.consumers_cut[reason as usize]
    }

    /// Consumers of the former process: taken up again, or closed because they did not fit or could not go on.
    pub fn consumers_handed_over(&self, kept: bool) -> &IntCounter {
        &self.handed_over[usize::from(kept)]
    }

    /// Connections that are no consumers closed by a limit: an idle one that made room, or one too many from an address.
    pub fn http_connections_closed(&self, idle: bool) -> &IntCounter {
        &self.http_connections_closed[usize::from(idle)]
    }

    /// All metrics in the text format of Prometheus.
    pub fn render(&self) -> Result<String, prometheus::Error> {
        TextEncoder::new().encode_to_string(&self.registry.gather())
    }
}

/// Makes metrics and registers them. Names and labels are constants, so a failure is a bug that the
/// first test of this module finds.
struct Registrar<'a>(&'a Registry);

impl Registrar<'_> {
    fn add<C: Collector + Clone + 'static>(&self, made: prometheus::Result<C>) -> C {
        let collector = made.expect("a metric's constant name and labels are valid");
        self.0
            .register(Box::new(collector.clone()))
            .expect("a metric's constant name is its own");
        collector
    }

    fn counter(&self, name: &str, help: &str) -> IntCounter {
        self.add(IntCounter::new(name, help))
    }

    fn counters(&self, name: &str, help: &str, labels: &[&str]) -> IntCounterVec {
        self.add(IntCounterVec::new(Opts::new(name, help), labels))
    }

    fn gauge(&self, name: &str, help: &str) -> IntGauge {
        self.add(IntGauge::new(name, help))
    }

    fn gauges(&self, name: &str, help: &str, labels: &[&str]) -> IntGaugeVec {
        self.add(IntGaugeVec::new(Opts::new(name, help), labels))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_counter_follows_a_total_and_never_falls() {
        let counter = IntCounter::new("c", "h").unwrap();
        raise_to(&counter, 7);
        raise_to(&counter, 5);
        raise_to(&counter, 9);
        assert_eq!(counter.get(), 9);
    }
}
