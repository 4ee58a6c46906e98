//! The metrics of an event log.

use prometheus::{Histogram, IntCounter, IntGauge, IntGaugeVec};

use crate::telemetry::{DISK_SECONDS, room_metrics};

/// Why a segment of the log was removed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Removal {
    /// Its events are older than the replay window.
    Age,
    /// The log would have been larger than it may be.
    Bytes,
    /// Too little room was left on the file system.
    Room,
}

room_metrics! {
    /// The metrics of an event log.
    pub struct Metrics {
        seq: IntGauge = gauge("relay_log_seq", "Last durable sequence number");
        oldest_seq: IntGauge = gauge("relay_log_oldest_seq", "Oldest sequence number in the log");
        bytes: IntGauge = gauge("relay_log_bytes", "Bytes of the log on disk");
        redactions: IntCounter = counter("relay_log_redactions_total", "Accounts whose events were taken out of the log, at each deletion or takedown that had any");
        redactions_pending: IntGauge = gauge("relay_log_redactions_pending", "Accounts whose events are not served any more and are not yet off the disk");
        max_bytes: IntGauge = gauge("relay_log_max_bytes", "Bytes that the log may take");
        window_seconds: IntGauge = gauge("relay_log_window_seconds", "How long events are to stay in the log");
        oldest_age_seconds: IntGauge = gauge("relay_log_oldest_age_seconds", "Age of the oldest event in the log");
        segments_removed: [IntCounter; 3] = counters("relay_log_segments_removed_total", "Segments of the log removed, by the reason", "reason", ["age", "bytes", "room"]);
        disk_bytes: IntGauge = gauge("relay_log_disk_bytes", "Size of the log's file system");
        disk_free_bytes: IntGauge = gauge("relay_log_disk_free_bytes", "Bytes of the log's file system that may still be written");
        min_free_bytes: IntGauge = gauge("relay_log_min_free_bytes", "Bytes that the log leaves on its file system");
        failing: IntGauge = gauge("relay_log_failing", "1 while the log cannot be written and takes no events");
        durable_lag: IntGauge = gauge("relay_log_durable_lag_events", "Events with a sequence number that are not yet durable");
        view_lag: IntGaugeVec = gauges_by("relay_view_lag_events", "Events that the log has and a view of it has not stored", "view");
        write_seconds: Histogram = histogram("relay_log_write_seconds", "Time of one write to the log with its fdatasync", &DISK_SECONDS);
        write_errors: IntCounter = counter("relay_log_write_errors_total", "Writes of the log that failed and were repeated");
    }
}

/// A number as a gauge takes it.
pub(super) fn as_gauge(number: u64) -> i64 {
    i64::try_from(number).unwrap_or(i64::MAX)
}
