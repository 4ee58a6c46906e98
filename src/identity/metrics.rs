//! The metrics of a resolver.

use prometheus::{Histogram, IntCounter, IntGauge};

use crate::telemetry::room_metrics;

/// From a look-up at a directory next door to the time limit of one.
const LOOKUP_SECONDS: [f64; 11] = [
    0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 5.0, 15.0,
];

/// How a DID is looked up.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Method {
    /// At the PLC directory.
    Plc,
    /// At the host of a did:web.
    Web,
}

/// What came of a look-up.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Found {
    /// A document.
    Document,
    /// No such DID, or a tombstone.
    Nothing,
    /// A document that cannot be used.
    Invalid,
    /// No answer, or an answer that says nothing about the DID.
    NoAnswer,
}

room_metrics! {
    /// The metrics of a resolver.
    pub struct Metrics {
        cache_hits: IntCounter = counter("relay_identity_cache_hits_total", "Identities found in the cache");
        cache_misses: IntCounter = counter("relay_identity_cache_misses_total", "Identities not found in the cache");
        cache_entries: IntGauge = gauge("relay_identity_cache_entries", "Identities in memory");
        lookups: [[IntCounter; 4]; 2] = counter_table(
            "relay_identity_lookups_total", "Look-ups of DIDs by method and outcome",
            ["method", "outcome"], ["plc", "web"], ["found", "not_found", "invalid", "unavailable"],
        );
        lookup_seconds: Histogram = histogram("relay_identity_lookup_seconds", "Time of a look-up of a DID", &LOOKUP_SECONDS);
        status_lookups: IntCounter = counter("relay_status_lookups_total", "Questions to PDSes whether an account is active");
    }
}

impl Metrics {
    pub(super) fn count_lookup(&self, method: Method, found: Found) {
        self.lookups[method as usize][found as usize].inc();
    }

    /// Look-ups that the PLC directory answered, and those that it did not.
    pub fn directory_lookups(&self) -> (u64, u64) {
        let [found, nothing, invalid, no_answer] = &self.lookups[Method::Plc as usize];
        (found.get() + nothing.get() + invalid.get(), no_answer.get())
    }
}
