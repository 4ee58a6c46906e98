//! What an operator sets for all hosts: quotas, rates, trust, bans and memory.

use super::memory::MemoryLimits;
use crate::dial::{DomainPattern, HostName};

/// Settings of the registry. All but the memory can change while hosts are connected.
#[derive(Clone, Debug, PartialEq)]
pub struct Settings {
    /// Quotas and rates of hosts without their own.
    pub limits: HostLimits,
    /// Hosts that get [`HostLimits::trusted_accounts`] and the limits that follow from it.
    pub trusted_domains: Vec<DomainPattern>,
    /// Domains that are banned by configuration, beside those in the database.
    pub banned_domains: Vec<DomainPattern>,
    /// Memory for the in-flight events of all hosts.
    pub memory: MemoryLimits,
}

impl Default for Settings {
    fn default() -> Settings {
        let bluesky = DomainPattern::trusted("*.host.bsky.network");
        Settings {
            limits: HostLimits::default(),
            trusted_domains: vec![bluesky.expect("a constant pattern parses")],
            banned_domains: Vec::new(),
            memory: MemoryLimits::default(),
        }
    }
}

impl Settings {
    /// Whether a host is one of the trusted domains.
    pub fn is_trusted(&self, host: &HostName) -> bool {
        matches_any(&self.trusted_domains, host)
    }

    /// Whether a host is under a domain banned by configuration.
    pub fn is_banned(&self, host: &HostName) -> bool {
        matches_any(&self.banned_domains, host)
    }

    /// The account quota a new host starts with.
    pub fn account_limit(&self, host: &HostName) -> u64 {
        if self.is_trusted(host) {
            self.limits.trusted_accounts
        } else {
            self.limits.accounts
        }
    }
}

fn matches_any(patterns: &[DomainPattern], host: &HostName) -> bool {
    patterns
        .iter()
        .any(|pattern| pattern.matches(host.domain()))
}

/// Account quota and rates of a host, with the reference relay's defaults.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct HostLimits {
    /// Active accounts of a host; the accounts over it are `throttled`.
    pub accounts: u64,
    /// The same for hosts of [`Settings::trusted_domains`].
    pub trusted_accounts: u64,
    /// Events per second.
    pub per_second: Rate,
    /// Events per hour.
    pub per_hour: Rate,
    /// Events per 24 hours.
    pub per_day: Rate,
    /// Bytes per hour.
    pub bytes_per_hour: Rate,
    /// Pings, pongs and texts per second.
    pub others_per_second: u64,
}

impl Default for HostLimits {
    fn default() -> HostLimits {
        HostLimits {
            accounts: 100,
            trusted_accounts: 10_000_000,
            per_second: Rate {
                base: 50.0,
                per_account: 0.001,
            },
            per_hour: Rate {
                base: 2_500.0,
                per_account: 1.0,
            },
            per_day: Rate {
                base: 20_000.0,
                per_account: 10.0,
            },
            // Ten times what the events of an hour have at the network's average of some 8 kB, and more.
            bytes_per_hour: Rate {
                base: 200_000_000.0,
                per_account: 100_000.0,
            },
            others_per_second: 20,
        }
    }
}

/// A limit that grows with the number of a host's accounts.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Rate {
    /// Allowed to a host without accounts.
    pub base: f64,
    /// More for each account.
    pub per_account: f64,
}

impl Rate {
    /// Allowed to a host with this many accounts.
    pub fn for_accounts(&self, accounts: u64) -> f64 {
        self.base + self.per_account * accounts as f64
    }
}
