//! All metrics of the relay, as handles resolved once: counting is one atomic addition.
//!
//! Labels are bounded: kinds, rules, states and shards, never a host, an account or an address.
//! The handles belong to the process, so two relays in one process (tests) add up.

use std::ops::Index;
use std::sync::OnceLock;

use prometheus::core::Collector;
use prometheus::{
    Gauge, Histogram, HistogramOpts, IntCounter, IntCounterVec, IntGauge, IntGaugeVec, Opts,
    Registry, TextEncoder,
};

use super::health::ProblemName;
use crate::verify::MAX_SHARDS;

/// From 50 µs, below which nothing verified can be, to 30 s, over which an event was parked.
const EVENT_SECONDS: [f64; 19] = [
    0.000_05, 0.000_1, 0.000_2, 0.000_5, 0.001, 0.002, 0.003, 0.005, 0.007_5, 0.01, 0.015, 0.025,
    0.05, 0.1, 0.25, 1.0, 5.0, 15.0, 30.0,
];
/// The metrics of this process.
pub fn metrics() -> &'static Metrics {
    static METRICS: OnceLock<Metrics> = OnceLock::new();
    METRICS.get_or_init(Metrics::new)
}

/// Brings a counter up to a total that another room keeps. A total below the counter changes nothing.
pub fn raise_to(counter: &IntCounter, total: u64) {
    counter.inc_by(total.saturating_sub(counter.get()));
}

/// What is looked up, and where.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LookupKind {
    /// A did:plc at the directory.
    Directory,
    /// A did:web at its host.
    Web,
    /// The status of an account at its PDS.
    Status,
}

impl LookupKind {
    /// All of them, in their order.
    pub const ALL: [Self; 3] = [Self::Directory, Self::Web, Self::Status];
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

    received: ByKind,
    forwarded: ByKind,
    dropped: IntCounterVec,
    /// How far the log is behind the hosts, in seconds, sampled.
    pub lag_seconds: Gauge,
    /// From the arrival of an event's last byte to its being visible to consumers, in seconds.
    pub time_to_firehose: Histogram,
    /// Events forwarded although the account's chain broke.
    pub desynchronized: IntCounter,
    /// Queue, parked events and resident accounts of each shard.
    pub shards: Shards,
    /// Accounts whose state was in memory.
    pub account_cache_hits: IntCounter,
    /// Accounts whose state was read from the database.
    pub account_cache_misses: IntCounter,

    /// Hosts in each state, sampled.
    hosts: IntGaugeVec,
    /// Connections to hosts that ended.
    pub upstream_disconnects: IntCounter,
    /// Gaps: events that a host no longer had when we came back.
    pub upstream_gaps: IntCounter,
    /// Hosts that answered FutureCursor to the cursor they gave us.
    pub upstream_future_cursors: IntCounter,
    /// Times a host's socket was held back by a rate limit.
    pub upstream_held_back: IntCounter,
    /// Times a host's socket waited for memory that all hosts share.
    pub upstream_memory_waits: IntCounter,
    /// Memory of hosts' frames, sampled: on their way in the hosts' own shares, borrowed, parked for a look-up.
    pub upstream_memory: [IntGauge; 3],
    /// Frames with an unknown op or type, ignored.
    pub upstream_ignored: IntCounter,
    /// Events a host sent again that were durable already.
    pub upstream_already_durable: IntCounter,
    /// Hosts refused because they are relays.
    pub upstream_relays_refused: IntCounter,

    lookups_waiting: [IntGauge; LookupKind::ALL.len()],

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

    reloads: [IntCounter; 2],
    /// 1 where the last reload of the configuration was refused.
    pub reload_failed: IntGauge,
    /// Settings whose new value waits for a restart.
    pub restart_needed: IntGauge,
    /// Times the caches shrank because the system ran short of memory.
    pub memory_pressure: IntCounter,
    stuck: IntGaugeVec,
    problems: [IntGauge; ProblemName::ALL.len()],
}

impl Metrics {
    fn new() -> Metrics {
        let registry = Registry::new();
        let r = Registrar(&registry);
        r.process_and_build();
        let lookups_waiting = r.gauges(
            "relay_lookups_waiting",
            "Look-ups that wait for the turn of the host whose event asks",
            &["kind"],
        );
        let upstream_memory = r.gauges(
            "relay_upstream_memory_bytes",
            "Memory that frames of hosts take between their sockets and the log, by whose it is",
            &["part"],
        );
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
        let reloads = r.counters(
            "relay_config_reloads_total",
            "Reloads of the configuration, by what came of them",
            &["outcome"],
        );
        let problems = r.gauges(
            "relay_problem",
            "1 while the relay has a problem, by its name in /_health",
            &["name"],
        );
        let consumer_lag = r.gauges(
            "relay_consumer_lag_events",
            "Events between a consumer's position and the end of the log",
            &["of"],
        );
        Metrics {
            lag_seconds: r.float_gauge(
                "relay_lag_seconds",
                "How far the log is behind the hosts: the median, over the newest commits, of the time from signing to \
                 appending; grows while events are under way and none gets into the log",
            ),
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
            reloads: ["refused", "applied"].map(|outcome| reloads.with_label_values(&[outcome])),
            reload_failed: r.gauge(
                "relay_config_reload_failed",
                "1 where the last reload of the configuration was refused",
            ),
            restart_needed: r.gauge(
                "relay_config_restart_needed",
                "Settings whose new value waits for a restart",
            ),
            memory_pressure: r.counter(
                "relay_memory_pressure_total",
                "Times the caches shrank because the system ran short of memory",
            ),
            stuck: {
                let stuck = r.gauges(
                    "relay_watchdog_stuck",
                    "1 while a part shows no progress",
                    &["part"],
                );
                // Shown from the start, so that an alert can tell 0 from nothing.
                for part in ["shards", "sequencer", "runtime"] {
                    stuck.with_label_values(&[part]);
                }
                stuck
            },
            problems: ProblemName::ALL.map(|name| problems.with_label_values(&[name.as_str()])),
            received: r.by_kind("relay_events_received_total", "Events received from hosts"),
            forwarded: r.by_kind(
                "relay_events_forwarded_total",
                "Events that reached the firehose",
            ),
            dropped: r.counters(
                "relay_events_dropped_total",
                "Events dropped, by the rule they broke",
                &["rule"],
            ),
            time_to_firehose: r.histogram(
                "relay_time_to_firehose_seconds",
                "From an event's arrival to its being visible to consumers",
                &EVENT_SECONDS,
            ),
            desynchronized: r.counter(
                "relay_events_desynchronized_total",
                "Events forwarded although the account's chain broke",
            ),
            shards: Shards::new(&r),
            account_cache_hits: r.counter(
                "relay_account_cache_hits_total",
                "Accounts whose state was in memory",
            ),
            account_cache_misses: r.counter(
                "relay_account_cache_misses_total",
                "Accounts whose state was read from the database",
            ),
            hosts: r.gauges(
                "relay_hosts",
                "Hosts by the state of their connection",
                &["state"],
            ),
            upstream_disconnects: r.counter(
                "relay_upstream_disconnects_total",
                "Connections to hosts that ended",
            ),
            upstream_gaps: r.counter(
                "relay_upstream_gaps_total",
                "Times a host no longer had all events since our cursor",
            ),
            upstream_future_cursors: r.counter(
                "relay_upstream_future_cursors_total",
                "Times a host called our cursor one from the future",
            ),
            upstream_held_back: r.counter(
                "relay_upstream_held_back_total",
                "Times a host's socket was held back by a rate limit",
            ),
            upstream_memory_waits: r.counter(
                "relay_upstream_memory_waits_total",
                "Times a host's socket waited for memory that all hosts share",
            ),
            upstream_memory: ["own", "shared", "parked"]
                .map(|part| upstream_memory.with_label_values(&[part])),
            upstream_ignored: r
                .counter("relay_upstream_ignored_total", "Frames of an unknown type"),
            upstream_already_durable: r.counter(
                "relay_upstream_already_durable_total",
                "Events sent again that the log had already",
            ),
            upstream_relays_refused: r.counter(
                "relay_upstream_relays_refused_total",
                "Hosts refused because they are relays",
            ),
            lookups_waiting: ["directory", "web", "status"]
                .map(|kind| lookups_waiting.with_label_values(&[kind])),
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

    /// Events received, by the kind's name (`#commit`, `#sync`, `#identity`, `#account`).
    pub fn events_received(&self, kind: &str) -> &IntCounter {
        self.received.get(kind)
    }

    /// Events that reached the firehose, by the kind's name.
    pub fn events_forwarded(&self, kind: &str) -> &IntCounter {
        self.forwarded.get(kind)
    }

    /// Events dropped under a rule. The name is `'static`, so that no text from the network becomes a label.
    pub fn dropped(&self, rule: &'static str) -> IntCounter {
        self.dropped.with_label_values(&[rule])
    }

    /// Makes the counters of these rules, so that they are shown before anything was dropped.
    pub fn register_rules(&self, rules: impl IntoIterator<Item = &'static str>) {
        for rule in rules {
            self.dropped(rule);
        }
    }

    /// Hosts in one state, sampled. States are words of the program, never of the network.
    pub fn hosts_in(&self, state: &'static str) -> IntGauge {
        self.hosts.with_label_values(&[state])
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

    /// Reloads of the configuration, applied or refused.
    pub fn reloads(&self, applied: bool) -> &IntCounter {
        &self.reloads[usize::from(applied)]
    }

    /// 1 while a kind of parts shows no progress.
    pub fn stuck(&self, part: &'static str) -> IntGauge {
        self.stuck.with_label_values(&[part])
    }

    /// Look-ups of this kind that wait for their turn.
    pub fn lookups_waiting(&self, kind: LookupKind) -> &IntGauge {
        &self.lookups_waiting[kind as usize]
    }

    /// 1 while the relay has a problem.
    pub fn problem(&self, name: ProblemName) -> &IntGauge {
        &self.problems[name as usize]
    }

    /// All metrics in the text format of Prometheus.
    pub fn render(&self) -> Result<String, prometheus::Error> {
        TextEncoder::new().encode_to_string(&self.registry.gather())
    }
}

/// One counter for each kind of event.
struct ByKind([IntCounter; 5]);

impl ByKind {
    const NAMES: [&str; 5] = ["#commit", "#sync", "#identity", "#account", "other"];

    fn get(&self, kind: &str) -> &IntCounter {
        let index = Self::NAMES.iter().position(|name| *name == kind);
        &self.0[index.unwrap_or(Self::NAMES.len() - 1)]
    }
}

/// What a shard says about itself after each round.
pub struct ShardGauges {
    /// Events in its inbox.
    pub queue: IntGauge,
    /// Events that wait for a look-up.
    pub parked: IntGauge,
    /// Accounts whose state is in its memory.
    pub residents: IntGauge,
}

/// The gauges of each shard, made when the shard first asks for them.
pub struct Shards {
    queue: IntGaugeVec,
    parked: IntGaugeVec,
    residents: IntGaugeVec,
    made: Box<[OnceLock<ShardGauges>]>,
}

impl Shards {
    fn new(r: &Registrar<'_>) -> Shards {
        Shards {
            queue: r.gauges(
                "relay_shard_queue",
                "Events in the inbox of a shard",
                &["shard"],
            ),
            parked: r.gauges(
                "relay_shard_parked",
                "Events of a shard that wait for a look-up",
                &["shard"],
            ),
            residents: r.gauges(
                "relay_shard_residents",
                "Accounts in the memory of a shard",
                &["shard"],
            ),
            made: (0..MAX_SHARDS).map(|_| OnceLock::new()).collect(),
        }
    }
}

impl Index<usize> for Shards {
    type Output = ShardGauges;

    /// The gauges of a shard; shards beyond [`MAX_SHARDS`] share the last ones.
    fn index(&self, shard: usize) -> &ShardGauges {
        let shard = shard.min(MAX_SHARDS - 1);
        self.made[shard].get_or_init(|| {
            let label = shard.to_string();
            ShardGauges {
                queue: self.queue.with_label_values(&[&label]),
                parked: self.parked.with_label_values(&[&label]),
                residents: self.residents.with_label_values(&[&label]),
            }
        })
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

    fn by_kind(&self, name: &str, help: &str) -> ByKind {
        let counters = self.counters(name, help, &["kind"]);
        ByKind(
            ByKind::NAMES.map(|kind| counters.with_label_values(&[kind.trim_start_matches('#')])),
        )
    }

    fn gauge(&self, name: &str, help: &str) -> IntGauge {
        self.add(IntGauge::new(name, help))
    }

    fn float_gauge(&self, name: &str, help: &str) -> Gauge {
        self.add(Gauge::new(name, help))
    }

    fn gauges(&self, name: &str, help: &str, labels: &[&str]) -> IntGaugeVec {
        self.add(IntGaugeVec::new(Opts::new(name, help), labels))
    }

    fn histogram(&self, name: &str, help: &str, buckets: &[f64]) -> Histogram {
        let options = HistogramOpts::new(name, help).buckets(buckets.to_vec());
        self.add(Histogram::with_opts(options))
    }

    fn process_and_build(&self) {
        #[cfg(target_os = "linux")]
        {
            let process = prometheus::process_collector::ProcessCollector::for_self();
            self.0
                .register(Box::new(process))
                .expect("the process metrics have names of their own");
        }
        self.gauges(
            "relay_build_info",
            "Always 1; the version is the label",
            &["version"],
        )
        .with_label_values(&[env!("CARGO_PKG_VERSION")])
        .set(1);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn metrics_are_registered_once_and_rendered() {
        let metrics = Metrics::new();
        metrics.events_received("#commit").inc();
        metrics.events_received("#new-kind").inc();
        metrics.register_rules(["signature", "wrong_host"]);
        metrics.dropped("signature").inc();
        metrics.shards[0].parked.set(3);
        metrics.shards[MAX_SHARDS + 7].queue.set(1);
        metrics.hosts_in("connected").set(2);
        metrics.time_to_firehose.observe(0.004);
        let text = metrics.render().unwrap();
        for line in [
            "relay_events_received_total{kind=\"commit\"} 1",
            "relay_events_received_total{kind=\"other\"} 1",
            "relay_events_dropped_total{rule=\"signature\"} 1",
            "relay_events_dropped_total{rule=\"wrong_host\"} 0",
            "relay_shard_parked{shard=\"0\"} 3",
            "relay_hosts{state=\"connected\"} 2",
            "relay_time_to_firehose_seconds_bucket{le=\"0.005\"} 1",
        ] {
            assert!(
                text.contains(&format!("{line}\n")),
                "{line} is not in\n{text}"
            );
        }
        assert!(text.contains("relay_build_info{version="));
        assert!(cfg!(not(target_os = "linux")) || text.contains("process_resident_memory_bytes"));
    }

    #[test]
    fn a_counter_follows_a_total_and_never_falls() {
        let counter = IntCounter::new("c", "h").unwrap();
        raise_to(&counter, 7);
        raise_to(&counter, 5);
        raise_to(&counter, 9);
        assert_eq!(counter.get(), 9);
    }
}
