//! The metrics of the consumers.

use prometheus::{IntCounter, IntGauge};

use crate::telemetry::room_metrics;

/// Why a consumer was cut that neither closed nor fell out of the window.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Cut {
    /// It took nothing.
    Reading,
    /// It sent nothing.
    Silence,
    /// It broke the WebSocket protocol.
    Protocol,
}

room_metrics! {
    /// The metrics of the consumers.
    pub struct Metrics {
        connected: IntGauge = gauge("relay_consumers", "Consumers of the firehose");
        lag: [IntGauge; 2] = gauges("relay_consumer_lag_events", "Events between a consumer's position and the end of the log", "of", ["slowest", "median"]);
        handed_over: [IntCounter; 2] = counters("relay_consumers_handed_over_total", "Consumers of the former process, by what became of them", "outcome", ["closed", "kept"]);
        admitted: IntCounter = counter("relay_consumers_admitted_total", "Consumers admitted");
        refused: IntCounter = counter("relay_consumers_refused_total", "Consumers refused by a limit");
        too_slow: IntCounter = counter("relay_consumers_too_slow_total", "Consumers that fell out of the replay window");
        cut: [IntCounter; 3] = counters("relay_consumers_cut_total", "Consumers cut that took nothing, said nothing, or broke the WebSocket protocol", "reason", ["reading", "silence", "protocol"]);
        held_back: IntCounter = counter("relay_consumers_held_back_total", "Times a consumer was read more slowly because of what it sent");
        events: IntCounter = counter("relay_consumer_events_total", "Events sent to all consumers together");
        bytes: IntCounter = counter("relay_consumer_bytes_total", "Bytes sent to all consumers together");
    }
}

impl Metrics {
    pub(super) fn count_cut(&self, reason: Cut) {
        self.cut[reason as usize].inc();
    }

    pub(super) fn count_handed_over(&self, kept: usize, closed: usize) {
        let [of_closed, of_kept] = &self.handed_over;
        of_closed.inc_by(closed as u64);
        of_kept.inc_by(kept as u64);
    }
}
