//! The metrics of the hosts.

use prometheus::{IntCounter, IntGauge};

use super::rule::Rule;
use super::state::HostState;
use crate::telemetry::room_metrics;

room_metrics! {
    /// The metrics of the hosts.
    pub struct Metrics {
        dropped: [IntCounter; Rule::ALL.len()] = counters("relay_events_dropped_total", "Events dropped, by the rule they broke", "rule", Rule::ALL.map(Rule::name));
        states: [IntGauge; HostState::ALL.len()] = gauges("relay_hosts", "Hosts by the state of their connection", "state", HostState::ALL.map(HostState::as_str));
        memory: [IntGauge; 3] = gauges("relay_upstream_memory_bytes", "Memory that frames of hosts take between their sockets and the log, by whose it is", "part", ["own", "shared", "parked"]);
        memory_waits: IntCounter = counter("relay_upstream_memory_waits_total", "Times a host's socket waited for memory that all hosts share");
    }
}
