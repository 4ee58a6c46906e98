//! The metrics of the pipeline.

use prometheus::{Histogram, IntCounter, IntGauge, IntGaugeVec};

use crate::atproto::frame::Kind;
use crate::telemetry::room_metrics;

/// From 50 µs, below which nothing verified can be, to 30 s, over which an event was parked.
const EVENT_SECONDS: [f64; 19] = [
    0.000_05, 0.000_1, 0.000_2, 0.000_5, 0.001, 0.002, 0.003, 0.005, 0.007_5, 0.01, 0.015, 0.025,
    0.05, 0.1, 0.25, 1.0, 5.0, 15.0, 30.0,
];

room_metrics! {
    /// The metrics of the pipeline.
    pub struct Metrics {
        forwarded: [IntCounter; Kind::ALL.len()] = counters("relay_events_forwarded_total", "Events that reached the firehose", "kind", Kind::ALL.map(Kind::name));
        time_to_firehose: Histogram = histogram("relay_time_to_firehose_seconds", "From an event's arrival to its being visible to consumers", &EVENT_SECONDS);
        desynchronized: IntCounter = counter("relay_events_desynchronized_total", "Events forwarded although the account's chain broke");
        account_cache_hits: IntCounter = counter("relay_account_cache_hits_total", "Accounts whose state was in memory");
        account_cache_misses: IntCounter = counter("relay_account_cache_misses_total", "Accounts whose state was read from the database");
        lookups_waiting: [IntGauge; 3] = gauges("relay_lookups_waiting", "Look-ups that wait for the turn of the host whose event asks", "kind", ["directory", "web", "status"]);
        shard_queue: IntGaugeVec = gauges_by("relay_shard_queue", "Events in the inbox of a shard", "shard");
        shard_parked: IntGaugeVec = gauges_by("relay_shard_parked", "Events of a shard that wait for a look-up", "shard");
        shard_residents: IntGaugeVec = gauges_by("relay_shard_residents", "Accounts in the memory of a shard", "shard");
    }
}

/// The gauges of one shard.
pub(super) struct ShardGauges {
    pub queue: IntGauge,
    pub parked: IntGauge,
    pub residents: IntGauge,
}

impl Metrics {
    pub(super) fn shard(&self, index: usize) -> ShardGauges {
        let label = index.to_string();
        let gauge = |gauges: &IntGaugeVec| gauges.with_label_values(&[&label]);
        ShardGauges {
            queue: gauge(&self.shard_queue),
            parked: gauge(&self.shard_parked),
            residents: gauge(&self.shard_residents),
        }
    }
}
