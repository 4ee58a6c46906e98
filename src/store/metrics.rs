//! The metrics of the database.

use prometheus::{Histogram, IntCounter, IntGauge};

use crate::telemetry::{DISK_SECONDS, room_metrics};

room_metrics! {
    /// The metrics of the database.
    pub struct Metrics {
        queue: IntGauge = gauge("relay_store_queue", "Updates that wait to be written to the database");
        flush_seconds: Histogram = histogram("relay_store_flush_seconds", "Time of one batch in the database", &DISK_SECONDS);
        flush_errors: IntCounter = counter("relay_store_flush_errors_total", "Batches that failed in the database and were repeated");
        reads_refused: IntCounter = counter("relay_store_reads_refused_total", "Public reads that found no free database connection in time");
        failing: IntGauge = gauge("relay_store_failing", "1 while the database takes no changes");
    }
}
