//! Metrics of the rooms that have none of their own yet. They belong to the process, so two relays in one process
//! (tests) add up.

use std::sync::OnceLock;

use prometheus::core::Collector;
use prometheus::{IntCounter, IntCounterVec, Opts, Registry, TextEncoder};

/// The metrics of this process.
pub fn metrics() -> &'static Metrics {
    static METRICS: OnceLock<Metrics> = OnceLock::new();
    METRICS.get_or_init(Metrics::new)
}

/// Handles of every metric. Gauges named "sampled" are set when the metrics are read.
pub struct Metrics {
    registry: Registry,

    /// Steps of recovery at the start: events applied once more, segments looked through.
    pub recovery_steps: IntCounter,

    http_connections_closed: [IntCounter; 2],
}

impl Metrics {
    fn new() -> Metrics {
        let registry = Registry::new();
        let r = Registrar(&registry);
        let http_connections_closed = r.counters(
            "relay_http_connections_closed_total",
            "Connections that are no consumers closed by a limit: idle ones that made room, those too many from an address",
            &["reason"],
        );
        Metrics {
            recovery_steps: r.counter(
                "relay_recovery_steps_total",
                "Steps of recovery at the start: events applied once more, segments looked through",
            ),
            http_connections_closed: ["address", "idle"]
                .map(|reason| http_connections_closed.with_label_values(&[reason])),
            registry,
        }
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
}
