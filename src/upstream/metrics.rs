//! The metrics of the connections to hosts.

use prometheus::IntCounter;

use crate::atproto::frame::Kind;
use crate::telemetry::room_metrics;

room_metrics! {
    /// The metrics of the connections to hosts.
    pub struct Metrics {
        received: [IntCounter; Kind::ALL.len()] = counters("relay_events_received_total", "Events received from hosts", "kind", Kind::ALL.map(Kind::name));
        disconnects: IntCounter = counter("relay_upstream_disconnects_total", "Connections to hosts that ended");
        gaps: IntCounter = counter("relay_upstream_gaps_total", "Times a host no longer had all events since our cursor");
        future_cursors: IntCounter = counter("relay_upstream_future_cursors_total", "Times a host called our cursor one from the future");
        held_back: IntCounter = counter("relay_upstream_held_back_total", "Times a host's socket was held back by a rate limit");
        ignored: IntCounter = counter("relay_upstream_ignored_total", "Frames of an unknown type");
        already_durable: IntCounter = counter("relay_upstream_already_durable_total", "Events sent again that the log had already");
        relays_refused: IntCounter = counter("relay_upstream_relays_refused_total", "Hosts refused because they are relays");
    }
}
