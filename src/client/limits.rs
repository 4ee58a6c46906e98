//! Limits per client: connections, subscriptions, checks of hosts at a time.
//! Promises that a count ends when its permit is dropped, and that a client without counts takes no memory.

use std::collections::HashMap;
use std::hash::Hash;
use std::net::IpAddr;
use std::sync::Arc;

use parking_lot::Mutex;

/// Limit of one IPv6 /48, as a multiple of the limit of one /64: a site gets a /48 at most (RFC 6177), which has 65,536
/// networks of /64.
pub const NETWORKS_PER_SITE: usize = 4;

/// A unit that is counted as one client.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Network {
    /// An IPv4 address, or an IPv6 /64, the smallest block that a site gets.
    Single(IpAddr),
    /// An IPv6 /48.
    Site(IpAddr),
}

impl Network {
    /// The networks of an address with their limits, where the limit of one address is `max`.
    pub fn shares(address: IpAddr, max: usize) -> impl Iterator<Item = (Network, usize)> {
        let (single, site) = match address.to_canonical() {
            IpAddr::V6(v6) => {
                let [a, b, c, d, ..] = v6.segments();
                let start = |d| IpAddr::from([a, b, c, d, 0, 0, 0, 0]);
                (start(d), Some(start(0)))
            }
            v4 => (v4, None),
        };
        let of_site = max.saturating_mul(NETWORKS_PER_SITE);
        let site = site.map(|site| (Network::Site(site), of_site));
        [(Network::Single(single), max)].into_iter().chain(site)
    }

    /// The largest network of an address: one client can have all of it.
    pub fn largest(address: IpAddr) -> Network {
        let networks = Network::shares(address, 1).map(|(network, _)| network);
        networks.last().unwrap_or(Network::Single(address))
    }
}

/// Counts by key. Clones share them.
#[derive(Debug)]
pub struct KeyedLimits<K>(Arc<Mutex<HashMap<K, usize>>>);

/// One more for some keys, until it is dropped.
#[derive(Debug)]
pub struct Permit<K: Eq + Hash> {
    limits: KeyedLimits<K>,
    keys: Vec<K>,
}

impl<K> Clone for KeyedLimits<K> {
    fn clone(&self) -> KeyedLimits<K> {
        KeyedLimits(self.0.clone())
    }
}

impl<K> Default for KeyedLimits<K> {
    fn default() -> KeyedLimits<K> {
        KeyedLimits(Arc::default())
    }
}

impl<K: Eq + Hash + Clone> KeyedLimits<K> {
    /// Counts one more for each key, unless one of them has reached its limit.
    pub fn acquire(&self, shares: impl IntoIterator<Item = (K, usize)>) -> Option<Permit<K>> {
        let shares: Vec<(K, usize)> = shares.into_iter().collect();
        let mut counts = self.0.lock();
        let full = |(key, max): &(K, usize)| counts.get(key).copied().unwrap_or(0) >= *max;
        if shares.iter().any(full) {
            return None;
        }
        let keys: Vec<K> = shares.into_iter().map(|(key, _)| key).collect();
        for key in &keys {
            *counts.entry(key.clone()).or_default() += 1;
        }
        Some(Permit {
            limits: self.clone(),
            keys,
        })
    }
}

impl<K: Eq + Hash> Drop for Permit<K> {
    fn drop(&mut self) {
        let mut counts = self.limits.0.lock();
        for key in &self.keys {
            if let Some(count) = counts.get_mut(key) {
                *count -= 1;
                if *count == 0 {
                    counts.remove(key);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn acquire(
        limits: &KeyedLimits<Network>,
        address: &str,
        max: usize,
    ) -> Option<Permit<Network>> {
        limits.acquire(Network::shares(address.parse().expect("an address"), max))
    }

    #[test]
    fn ipv6_counts_by_network_and_by_site() {
        let limits = KeyedLimits::default();
        let first = acquire(&limits, "2001:db8::1", 2).expect("a permit");
        let _second = acquire(&limits, "2001:db8::2", 2).expect("a permit");
        assert!(acquire(&limits, "2001:db8::3", 2).is_none());
        drop(first);
        let mut held =
            vec![acquire(&limits, "2001:db8::3", 2).expect("the permit that was dropped")];
        for network in 1..=3 {
            for _ in 0..2 {
                held.push(
                    acquire(&limits, &format!("2001:db8:0:{network}::1"), 2).expect("a permit"),
                );
            }
        }
        assert!(
            acquire(&limits, "2001:db8:0:9::1", 2).is_none(),
            "a new /64"
        );
        assert!(
            acquire(&limits, "2001:db8:1::1", 2).is_some(),
            "another /48"
        );
        let _v4 = acquire(&limits, "192.0.2.1", 1).expect("a permit");
        assert!(acquire(&limits, "::ffff:192.0.2.1", 1).is_none());
    }

    #[test]
    fn nothing_is_left_of_who_has_gone() {
        let limits = KeyedLimits::default();
        drop(acquire(&limits, "2001:db8::1", 1));
        assert!(limits.0.lock().is_empty());
    }
}
