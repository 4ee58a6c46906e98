//! The metrics of the relay as a whole.

use prometheus::{Gauge, IntCounter, IntGauge};

use crate::telemetry::{ProblemName, room_metrics};

room_metrics! {
    /// The metrics of the relay as a whole.
    pub struct Metrics {
        lag_seconds: Gauge = float_gauge("relay_lag_seconds", "How far the log is behind the hosts: the median, over the newest commits, of the time from signing to appending; grows while events are under way and none gets into the log");
        problems: [IntGauge; ProblemName::ALL.len()] = gauges("relay_problem", "1 while the relay has a problem, by its name in /_health", "name", ProblemName::ALL.map(ProblemName::as_str));
        reloads: [IntCounter; 2] = counters("relay_config_reloads_total", "Reloads of the configuration, by what came of them", "outcome", ["refused", "applied"]);
        reload_failed: IntGauge = gauge("relay_config_reload_failed", "1 where the last reload of the configuration was refused");
        restart_needed: IntGauge = gauge("relay_config_restart_needed", "Settings whose new value waits for a restart");
        memory_pressure: IntCounter = counter("relay_memory_pressure_total", "Times the caches shrank because the system ran short of memory");
        // Shown from the start, so that an alert can tell 0 from nothing.
        stuck: [IntGauge; 3] = gauges("relay_watchdog_stuck", "1 while a part shows no progress", "part", ["shards", "sequencer", "runtime"]);
    }
}

impl Metrics {
    /// Counts a reload of the configuration, applied or refused.
    pub fn count_reload(&self, applied: bool) {
        self.reloads[usize::from(applied)].inc();
        self.reload_failed.set(i64::from(!applied));
    }
}
