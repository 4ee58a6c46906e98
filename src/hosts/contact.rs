//! How a host's connection changes, as the log reports it: few changes at once, then one a minute.
//! Writes no log line itself.

use std::fmt::Display;
use std::time::Instant;

use super::drops::{REPORT_INTERVAL, shortened};

/// Changes of a host's connection that are reported at once; after them one a minute.
const CHANGES_AT_ONCE: u32 = 4;

/// The state of a host's connection, for the log.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Contact {
    Connected,
    Lost,
    Unreached,
    Offline,
    Refused,
}

/// A change of a host's connection that is due to be logged.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct ContactChange {
    pub(crate) contact: Contact,
    pub(crate) reason: String,
    /// Connections that ended since the last reported change.
    pub(crate) losses: u64,
}

/// The changes of one host's connection, reported and not yet reported.
#[derive(Debug, Default)]
pub(super) struct ContactHistory {
    current: Option<Contact>,
    reported: Option<Contact>,
    reason: String,
    losses: u64,
    reported_losses: u64,
    allowance: Allowance,
}

/// A few reports at once, then one a minute.
#[derive(Debug, Default)]
struct Allowance {
    used: u32,
    since: Option<Instant>,
}

impl Allowance {
    fn take(&mut self, now: Instant) -> bool {
        let since = *self.since.get_or_insert(now);
        let elapsed = now.saturating_duration_since(since);
        let regained = (elapsed.as_secs() / REPORT_INTERVAL.as_secs()) as u32;
        if regained > 0 {
            self.used = self.used.saturating_sub(regained);
            self.since = Some(now);
        }
        let has_one = self.used < CHANGES_AT_ONCE;
        self.used += u32::from(has_one);
        has_one
    }
}

impl ContactHistory {
    /// Records a change and its reason.
    pub(super) fn record(&mut self, contact: Contact, reason: &dyn Display) {
        if contact == Contact::Lost {
            self.losses += 1;
        }
        if contact != Contact::Connected && self.current != Some(contact) {
            self.reason = shortened(&reason.to_string());
        }
        self.current = Some(contact);
    }

    /// Takes the change that is due to be reported.
    pub(super) fn take_due(&mut self, now: Instant) -> Option<ContactChange> {
        let losses = self.losses - self.reported_losses;
        let is_back = losses > 0 && self.current == Some(Contact::Connected);
        let contact = match self.current {
            // Lost and connected again before the loss was reported.
            _ if is_back && self.reported == Some(Contact::Connected) => Contact::Lost,
            Some(contact) if self.reported != Some(contact) => contact,
            _ => return None,
        };
        if !self.allowance.take(now) {
            return None;
        }
        self.reported = Some(contact);
        self.reported_losses = self.losses;
        Some(ContactChange {
            contact,
            reason: self.reason.clone(),
            losses,
        })
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn changes_are_reported_once_and_flapping_now_and_then() {
        let start = Instant::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        let mut history = ContactHistory::default();
        let contact =
            |change: Option<ContactChange>| change.map(|change| (change.contact, change.losses));
        assert_eq!(history.take_due(at(0)), None);
        history.record(Contact::Unreached, &"no address");
        history.record(Contact::Unreached, &"another");
        assert_eq!(history.take_due(at(0)).unwrap().reason, "no address");
        assert_eq!(history.take_due(at(1)), None);
        history.record(Contact::Connected, &"");
        assert_eq!(
            contact(history.take_due(at(2))),
            Some((Contact::Connected, 0))
        );
        // Lost and connected again within a moment.
        history.record(Contact::Lost, &"the host closed it");
        history.record(Contact::Connected, &"");
        assert_eq!(contact(history.take_due(at(3))), Some((Contact::Lost, 1)));
        assert_eq!(
            contact(history.take_due(at(3))),
            Some((Contact::Connected, 0))
        );
        for _ in 0..500 {
            history.record(Contact::Lost, &"the host closed it");
            history.record(Contact::Connected, &"");
            assert_eq!(
                history.take_due(at(4)),
                None,
                "it has used up its allowance"
            );
        }
        assert_eq!(
            contact(history.take_due(at(64))),
            Some((Contact::Lost, 500))
        );
    }
}
