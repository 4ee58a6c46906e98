//! What a configuration that is read again changes, setting by setting, and what of it can be applied at once.

use super::Config;
use super::settings::{Setting, settings};

/// The difference between what runs and what is configured now.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Reload {
    /// Settings that are applied, with their former and their new values.
    pub applied: Vec<Change>,
    /// Settings that wait for a restart, with the values that run and those that are configured.
    pub waiting: Vec<Change>,
}

/// A setting with another value.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Change {
    /// Its key.
    pub key: &'static str,
    /// The value before, as it may be shown.
    pub from: String,
    /// The value now.
    pub to: String,
}

impl Reload {
    /// Compares `new` with the configuration that was read last (for what is applied at once), and with the one that the
    /// relay was started with (for what is not).
    pub fn between(started: &Config, last: &Config, new: &Config) -> Reload {
        let changes = |live: bool, before: &Config| {
            settings()
                .iter()
                .filter(|setting| setting.live == live && setting.differs(before, new))
                .map(|setting| Change::of(setting, before, new))
                .collect()
        };
        Reload {
            applied: changes(true, last),
            waiting: changes(false, started),
        }
    }

    /// One line for each setting.
    pub fn tell(&self) {
        for Change { key, from, to } in &self.applied {
            tracing::info!(setting = key, from, to, "a setting is changed");
        }
        for Change { key, from, to } in &self.waiting {
            tracing::warn!(
                setting = key,
                running = from,
                configured = to,
                "a setting is changed that needs a restart"
            );
        }
    }
}

impl Change {
    fn of(setting: &Setting, before: &Config, new: &Config) -> Change {
        Change {
            key: setting.key,
            from: (setting.show)(before),
            to: (setting.show)(new),
        }
    }
}
