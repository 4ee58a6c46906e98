//! Log lines about hosts: connections, dropped events, streams that cannot be resumed.
//! Promises a bounded number of lines a minute for all hosts together, and reports how many were suppressed.

use std::time::{Duration, Instant};

use parking_lot::Mutex;

use crate::hosts::{Contact, ContactChange, DropSummary, Example};

/// The interval in which lines are counted.
const INTERVAL: Duration = Duration::from_secs(60);

/// Lines of each kind about all hosts together in a minute: as many as somebody reads.
const LINES_PER_MINUTE: u32 = 60;

/// Counts the lines about hosts, by kind.
#[derive(Debug, Default)]
pub(super) struct HostLog {
    contacts: LineLimit,
    drops: LineLimit,
    warnings: LineLimit,
}

#[derive(Debug, Default)]
struct LineLimit(Mutex<Count>);

#[derive(Debug, Default)]
struct Count {
    since: Option<Instant>,
    written: u32,
    suppressed: u64,
}

impl HostLog {
    /// Logs a change of a host's connection, within the limit.
    pub(super) fn contact(&self, host: &str, change: &ContactChange) {
        if !self.contacts.admits(Instant::now()) {
            return;
        }
        let ContactChange { reason, losses, .. } = change;
        match change.contact {
            Contact::Connected => tracing::info!(host, "host connected"),
            Contact::Lost => tracing::info!(host, losses, reason, "host lost"),
            Contact::Unreached => tracing::info!(host, reason, "host not reached"),
            Contact::Offline => {
                tracing::info!(host, reason, "host is offline; it is tried now and then");
            }
            Contact::Refused => tracing::info!(host, reason, "host refused"),
        }
    }

    /// Logs a summary of a host's dropped events, within the limit.
    pub(super) fn drops(&self, host: &str, summary: &DropSummary) {
        if !self.drops.admits(Instant::now()) {
            return;
        }
        let DropSummary {
            drops,
            rule,
            example: Example { did, seq, reason },
        } = summary;
        let rule = rule.name();
        tracing::info!(
            host,
            drops,
            rule,
            did,
            seq,
            reason,
            "events of a host dropped"
        );
    }

    /// Whether one more warning that hosts can provoke at will may be logged.
    pub(super) fn may_warn(&self) -> bool {
        self.warnings.admits(Instant::now())
    }

    /// Logs how many lines were suppressed, a minute after the first of them.
    pub(super) fn suppressed(&self) {
        let now = Instant::now();
        let limits = [
            ("connections", &self.contacts),
            ("dropped events", &self.drops),
            ("streams", &self.warnings),
        ];
        for (of, limit) in limits {
            let suppressed = limit.take_suppressed(now);
            if suppressed > 0 {
                tracing::info!(of, "{suppressed} more lines about hosts in the last minute");
            }
        }
    }
}

impl LineLimit {
    fn admits(&self, now: Instant) -> bool {
        let mut count = self.0.lock();
        let is_over = |since: Instant| now.saturating_duration_since(since) >= INTERVAL;
        if count.since.is_none_or(is_over) && count.suppressed == 0 {
            *count = Count {
                since: Some(now),
                ..Count::default()
            };
        }
        let admitted = count.written < LINES_PER_MINUTE;
        count.written += u32::from(admitted);
        count.suppressed += u64::from(!admitted);
        admitted
    }

    /// Takes the number of suppressed lines, once their minute is over.
    fn take_suppressed(&self, now: Instant) -> u64 {
        let mut count = self.0.lock();
        match count.since {
            Some(since) if now.saturating_duration_since(since) >= INTERVAL => {
                std::mem::take(&mut *count).suppressed
            }
            _ => 0,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_hosts_together_have_so_many_lines_and_the_rest_is_counted() {
        let start = Instant::now();
        let limit = LineLimit::default();
        let admitted = (0..1_000).filter(|_| limit.admits(start)).count();
        assert_eq!(admitted, LINES_PER_MINUTE as usize);
        assert_eq!(limit.take_suppressed(start), 0, "not yet");
        let later = start + INTERVAL;
        let suppressed = 1_000 - u64::from(LINES_PER_MINUTE);
        assert_eq!(limit.take_suppressed(later), suppressed);
        assert!(limit.admits(later) && limit.take_suppressed(later) == 0);
    }
}
