//! The registry of one relay's metrics, and the kinds of handles that rooms make theirs from.
//!
//! A room has its own `Metrics`, made with [`room_metrics!`]: one line for each metric. Handles are resolved once, so that
//! counting is one atomic addition. Labels are words of the program, never a host, an account or an address. Two relays in
//! one process have a registry each and do not add up.

use prometheus::core::Collector;
use prometheus::{
    Gauge, Histogram, HistogramOpts, IntCounter, IntCounterVec, IntGauge, IntGaugeVec, Opts,
    TextEncoder,
};

/// From a page in the cache of a fast disk to a disk in trouble.
pub const DISK_SECONDS: [f64; 14] = [
    0.000_1, 0.000_25, 0.000_5, 0.001, 0.002_5, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1.0, 5.0, 30.0,
];

/// The metrics of one relay. Clones share them. Names and labels are constants, so a name that is not valid or not unique is a
/// bug, which the start of any relay finds.
#[derive(Clone, Default)]
pub struct Registry(prometheus::Registry);

impl Registry {
    /// A registry with the metrics of this process and of its build.
    pub fn of_process() -> Registry {
        let registry = Registry::default();
        #[cfg(target_os = "linux")]
        registry.add(Ok(
            prometheus::process_collector::ProcessCollector::for_self(),
        ));
        let [build] = registry.gauges(
            "relay_build_info",
            "Always 1; the version is the label",
            "version",
            [env!("CARGO_PKG_VERSION")],
        );
        build.set(1);
        registry
    }

    fn add<C: Collector + 'static>(&self, made: prometheus::Result<C>) {
        let collector = made.expect("a metric's constant name and labels are valid");
        self.0
            .register(Box::new(collector))
            .expect("a metric's constant name is its own");
    }

    fn handle<C: Collector + Clone + 'static>(&self, made: prometheus::Result<C>) -> C {
        self.add(
            made.as_ref()
                .map(C::clone)
                .map_err(|error| prometheus::Error::Msg(error.to_string())),
        );
        made.expect("it was valid a line above")
    }

    /// A counter.
    pub fn counter(&self, name: &str, help: &str) -> IntCounter {
        self.handle(IntCounter::new(name, help))
    }

    /// A counter for each value of a label.
    pub fn counters<const N: usize>(
        &self,
        name: &str,
        help: &str,
        label: &str,
        values: [&str; N],
    ) -> [IntCounter; N] {
        let counters = self.handle(IntCounterVec::new(Opts::new(name, help), &[label]));
        values.map(|value| counters.with_label_values(&[value]))
    }

    /// A counter for each pair of the values of two labels.
    pub fn counter_table<const N: usize, const M: usize>(
        &self,
        name: &str,
        help: &str,
        labels: [&str; 2],
        rows: [&str; N],
        columns: [&str; M],
    ) -> [[IntCounter; M]; N] {
        let counters = self.handle(IntCounterVec::new(Opts::new(name, help), &labels));
        rows.map(|row| columns.map(|column| counters.with_label_values(&[row, column])))
    }

    /// Counters by a label whose values are known when they are counted. They must be `'static` words of the program.
    pub fn counters_by(&self, name: &str, help: &str, label: &str) -> IntCounterVec {
        self.handle(IntCounterVec::new(Opts::new(name, help), &[label]))
    }

    /// A gauge.
    pub fn gauge(&self, name: &str, help: &str) -> IntGauge {
        self.handle(IntGauge::new(name, help))
    }

    /// A gauge with a fraction.
    pub fn float_gauge(&self, name: &str, help: &str) -> Gauge {
        self.handle(Gauge::new(name, help))
    }

    /// A gauge for each value of a label.
    pub fn gauges<const N: usize>(
        &self,
        name: &str,
        help: &str,
        label: &str,
        values: [&str; N],
    ) -> [IntGauge; N] {
        let gauges = self.gauges_by(name, help, label);
        values.map(|value| gauges.with_label_values(&[value]))
    }

    /// Gauges by a label whose values are known when they are set. They must be words or numbers of the program.
    pub fn gauges_by(&self, name: &str, help: &str, label: &str) -> IntGaugeVec {
        self.handle(IntGaugeVec::new(Opts::new(name, help), &[label]))
    }

    /// A histogram of times in seconds.
    pub fn histogram(&self, name: &str, help: &str, buckets: &[f64]) -> Histogram {
        let options = HistogramOpts::new(name, help).buckets(buckets.to_vec());
        self.handle(Histogram::with_opts(options))
    }

    /// All metrics in the text format of Prometheus.
    pub fn render(&self) -> Result<String, prometheus::Error> {
        TextEncoder::new().encode_to_string(&self.0.gather())
    }
}

/// Defines the metrics of a room: the handle's name and type, and how the registry makes it. The help is its documentation.
macro_rules! room_metrics {
    (
        $(#[$doc:meta])*
        $vis:vis struct $name:ident {
            $($field:ident: $type:ty = $kind:ident($metric:expr, $help:expr $(, $more:expr)* $(,)?);)+
        }
    ) => {
        $(#[$doc])*
        #[derive(Clone)]
        $vis struct $name {
            $(#[doc = $help] pub $field: $type,)+
        }

        impl $name {
            /// Makes them in a registry.
            pub fn register(registry: &$crate::telemetry::Registry) -> $name {
                $name {
                    $($field: registry.$kind($metric, $help $(, $more)*),)+
                }
            }
        }

        impl Default for $name {
            /// In a registry that nobody reads, for tools and tests.
            fn default() -> $name {
                $name::register(&$crate::telemetry::Registry::default())
            }
        }

        impl std::fmt::Debug for $name {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str(stringify!($name))
            }
        }
    };
}

pub(crate) use room_metrics;

#[cfg(test)]
mod tests {
    use super::*;

    room_metrics! {
        /// Of a room.
        struct Metrics {
            served: [IntCounter; 2] = counters("served_total", "Requests served", "outcome", ["good", "bad"]);
            open: IntGauge = gauge("open", "Open requests");
            seconds: Histogram = histogram("seconds", "Time of a request", &[0.1, 1.0]);
        }
    }

    #[test]
    fn metrics_are_rendered_by_the_registry_they_were_made_in() {
        let [one, other] = [Registry::of_process(), Registry::of_process()];
        let [metrics, quiet] = [&one, &other].map(Metrics::register);
        metrics.served[1].inc();
        metrics.open.set(3);
        metrics.seconds.observe(0.5);
        quiet.open.set(4);
        let [text, other] = [one, other].map(|registry| registry.render().unwrap());
        for line in [
            "served_total{outcome=\"good\"} 0",
            "served_total{outcome=\"bad\"} 1",
            "open 3",
            "seconds_bucket{le=\"1\"} 1",
        ] {
            assert!(
                text.contains(&format!("{line}\n")),
                "{line} is not in\n{text}"
            );
        }
        assert!(other.contains("open 4\n") && other.contains("outcome=\"bad\"} 0\n"));
        assert!(text.contains("relay_build_info{version="));
        assert!(cfg!(not(target_os = "linux")) || text.contains("process_resident_memory_bytes"));
    }
}
