//! How much of something each client has at a time: connections, subscriptions, checks of hosts.
//! Promises that what is counted is given back when its entry is dropped, and that nothing is left of who has gone.

use std::collections::HashMap;
use std::hash::Hash;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// What the addresses of one IPv6 /48 may have together, in shares of one /64: a site is given a /48 at most (RFC 6177),
/// and has 65,536 networks of /64 in it.
pub const NETWORKS_PER_SITE: usize = 4;

/// What is counted as one client.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Network {
    /// An IPv4 address, or an IPv6 /64, the smallest block that a site is given.
    Single(IpAddr),
    /// An IPv6 /48.
    Site(IpAddr),
}

impl Network {
    /// The networks of an address, with what each may have where one address may have `max`.
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

    /// The largest network of an address: what one client can have.
    pub fn largest(address: IpAddr) -> Network {
        let networks = Network::shares(address, 1).map(|(network, _)| network);
        networks.last().unwrap_or(Network::Single(address))
    }
}

/// Counts by key. Clones share them.
#[derive(Debug)]
pub struct Places<K>(Arc<Mutex<HashMap<K, usize>>>);

/// What was counted, taken out again when dropped.
#[derive(Debug)]
pub struct Place<K: Eq + Hash> {
    places: Places<K>,
    keys: Vec<K>,
}

impl<K> Clone for Places<K> {
    fn clone(&self) -> Places<K> {
        Places(self.0.clone())
    }
}

impl<K> Default for Places<K> {
    fn default() -> Places<K> {
        Places(Arc::default())
    }
}

impl<K: Eq + Hash + Clone> Places<K> {
    /// Counts one more for each key, where none has its most yet.
    pub fn enter(&self, shares: impl IntoIterator<Item = (K, usize)>) -> Option<Place<K>> {
        let shares: Vec<(K, usize)> = shares.into_iter().collect();
        let mut counts = self.counts();
        let full = |(key, max): &(K, usize)| counts.get(key).copied().unwrap_or(0) >= *max;
        if shares.iter().any(full) {
            return None;
        }
        let keys: Vec<K> = shares.into_iter().map(|(key, _)| key).collect();
        for key in &keys {
            *counts.entry(key.clone()).or_default() += 1;
        }
        Some(Place {
            places: self.clone(),
            keys,
        })
    }
}

impl<K> Places<K> {
    fn counts(&self) -> MutexGuard<'_, HashMap<K, usize>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<K: Eq + Hash> Drop for Place<K> {
    fn drop(&mut self) {
        let mut counts = self.places.counts();
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

    fn enter(places: &Places<Network>, address: &str, max: usize) -> Option<Place<Network>> {
        places.enter(Network::shares(address.parse().expect("an address"), max))
    }

    #[test]
    fn ipv6_counts_by_network_and_by_site() {
        let places = Places::default();
        let first = enter(&places, "2001:db8::1", 2).expect("a place");
        let _second = enter(&places, "2001:db8::2", 2).expect("a place");
        assert!(enter(&places, "2001:db8::3", 2).is_none());
        drop(first);
        let mut held = vec![enter(&places, "2001:db8::3", 2).expect("the place that came free")];
        for network in 1..=3 {
            for _ in 0..2 {
                held.push(enter(&places, &format!("2001:db8:0:{network}::1"), 2).expect("a place"));
            }
        }
        assert!(enter(&places, "2001:db8:0:9::1", 2).is_none(), "a new /64");
        assert!(enter(&places, "2001:db8:1::1", 2).is_some(), "another /48");
        let _v4 = enter(&places, "192.0.2.1", 1).expect("a place");
        assert!(enter(&places, "::ffff:192.0.2.1", 1).is_none());
    }

    #[test]
    fn nothing_is_left_of_who_has_gone() {
        let places = Places::default();
        drop(enter(&places, "2001:db8::1", 1));
        assert!(places.counts().is_empty());
    }
}
