//! The registry of connected consumers, for the limits, the admin listing and the metrics.
//! Promises that a consumer is counted from its admission until its registration is dropped.

use std::collections::{HashMap, HashSet};
use std::net::IpAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant, SystemTime};

use parking_lot::Mutex;

use super::handover::Subscriber;
use super::metrics::Metrics;
use crate::client::{KeyedLimits, Network, Permit};

/// Longest user agent that is stored.
const MAX_USER_AGENT_CHARS: usize = 200;
/// Most networks remembered whose consumers fell out of the replay window, the latest ones.
const MAX_CUT: usize = 4096;

/// A connected consumer, as the admin listing shows it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ConsumerInfo {
    /// Unique in this process.
    pub id: u64,
    /// The consumer's address; that given by the proxy where a trusted one is in front.
    pub remote_addr: IpAddr,
    /// Its `User-Agent` header, empty where it sent none.
    pub user_agent: String,
    pub connected_at: SystemTime,
    /// Events sent.
    pub events: u64,
    /// Bytes sent, WebSocket headers included.
    pub bytes: u64,
    /// Sequence number of the next event it gets.
    pub position: u64,
}

/// Why a consumer is not admitted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum AdmissionError {
    Full,
    TooManyFromAddress,
}

/// The registry. Clones share it.
#[derive(Debug, Clone, Default)]
pub struct Consumers {
    shared: Arc<Shared>,
}

#[derive(Debug, Default)]
struct Shared {
    list: Mutex<HashMap<u64, Arc<Consumer>>>,
    limits: KeyedLimits<Network>,
    /// When a consumer of a network last fell out of the replay window.
    cut: Mutex<HashMap<Network, Instant>>,
    metrics: Metrics,
}

#[derive(Debug)]
struct Consumer {
    info: ConsumerInfo,
    events: AtomicU64,
    bytes: AtomicU64,
    position: AtomicU64,
}

/// A consumer's entry in the registry, which is removed when this is dropped.
#[derive(Debug)]
pub(super) struct Registration {
    shared: Arc<Shared>,
    consumer: Arc<Consumer>,
    /// Counts it among those from its address.
    permit: Option<Permit<Network>>,
}

impl Consumers {
    pub(super) fn new(metrics: Metrics) -> Consumers {
        let shared = Shared {
            metrics,
            ..Shared::default()
        };
        Consumers {
            shared: Arc::new(shared),
        }
    }

    /// The metrics of the consumers.
    pub fn metrics(&self) -> &Metrics {
        &self.shared.metrics
    }

    /// Sets the gauges that are sampled. `head` is the log's.
    pub fn sample(&self, head: u64) {
        let consumers = self.list();
        let metrics = &self.shared.metrics;
        metrics.connected.set(consumers.len() as i64);
        for (gauge, lag) in metrics.lag.iter().zip(lag(&consumers, head)) {
            gauge.set(lag as i64);
        }
    }

    /// Connected consumers, oldest first.
    pub fn list(&self) -> Vec<ConsumerInfo> {
        let mut list: Vec<_> = self
            .shared
            .list
            .lock()
            .values()
            .map(|it| it.info())
            .collect();
        list.sort_unstable_by_key(|consumer| consumer.id);
        list
    }

    /// How many are connected.
    pub fn len(&self) -> usize {
        self.shared.list.lock().len()
    }

    /// Whether no consumer is connected.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// On how many networks a consumer fell out of the replay window within this time, and on how many others one is
    /// connected.
    pub fn networks_cut(&self, within: Duration) -> (usize, usize) {
        let mut cut = self.shared.cut.lock();
        cut.retain(|_, at| at.elapsed() < within);
        let list = self.shared.list.lock();
        let others: HashSet<Network> = list
            .values()
            .map(|consumer| Network::largest(consumer.info.remote_addr))
            .filter(|network| !cut.contains_key(network))
            .collect();
        (cut.len(), others.len())
    }

    /// Admits a consumer within the limits.
    pub(super) fn admit(
        &self,
        remote_addr: IpAddr,
        user_agent: &str,
        max: usize,
        max_per_address: usize,
    ) -> Result<Registration, AdmissionError> {
        let mut list = self.shared.list.lock();
        let shares = Network::shares(remote_addr, max_per_address);
        let permit = if list.len() >= max {
            Err(AdmissionError::Full)
        } else {
            let permit = self.shared.limits.acquire(shares);
            permit.ok_or(AdmissionError::TooManyFromAddress)
        };
        let permit = permit.inspect_err(|_| {
            self.shared.metrics.refused.inc();
        })?;
        let subscriber = Subscriber {
            address: remote_addr,
            user_agent: user_agent.chars().take(MAX_USER_AGENT_CHARS).collect(),
            connected_at: SystemTime::now(),
        };
        Ok(self.enter(&mut list, &subscriber, Some(permit)))
    }

    /// Admits a consumer that the previous process admitted, whatever the limits are now.
    pub(super) fn readmit(&self, subscriber: &Subscriber) -> Registration {
        let shares = Network::shares(subscriber.address, usize::MAX);
        let permit = self.shared.limits.acquire(shares);
        self.enter(&mut self.shared.list.lock(), subscriber, permit)
    }

    fn enter(
        &self,
        list: &mut HashMap<u64, Arc<Consumer>>,
        subscriber: &Subscriber,
        permit: Option<Permit<Network>>,
    ) -> Registration {
        // Its number among the admitted: the list is locked.
        self.shared.metrics.admitted.inc();
        let id = self.shared.metrics.admitted.get();
        let consumer = Arc::new(Consumer {
            info: ConsumerInfo {
                id,
                remote_addr: subscriber.address,
                user_agent: subscriber.user_agent.clone(),
                connected_at: subscriber.connected_at,
                events: 0,
                bytes: 0,
                position: 0,
            },
            events: AtomicU64::new(0),
            bytes: AtomicU64::new(0),
            position: AtomicU64::new(0),
        });
        list.insert(id, consumer.clone());
        Registration {
            shared: self.shared.clone(),
            consumer,
            permit,
        }
    }
}

impl Consumer {
    fn info(&self) -> ConsumerInfo {
        ConsumerInfo {
            events: self.events.load(Ordering::Relaxed),
            bytes: self.bytes.load(Ordering::Relaxed),
            position: self.position.load(Ordering::Relaxed),
            ..self.info.clone()
        }
    }
}

impl Registration {
    pub fn info(&self) -> ConsumerInfo {
        self.consumer.info()
    }

    /// Counts what went out.
    pub fn sent(&self, events: u64, bytes: u64) {
        self.consumer.events.fetch_add(events, Ordering::Relaxed);
        self.consumer.bytes.fetch_add(bytes, Ordering::Relaxed);
        self.shared.metrics.events.inc_by(events);
        self.shared.metrics.bytes.inc_by(bytes);
    }

    /// Counts that it fell out of the replay window.
    pub fn fell_out(&self) {
        let mut cut = self.shared.cut.lock();
        let network = Network::largest(self.consumer.info.remote_addr);
        if cut.len() >= MAX_CUT && !cut.contains_key(&network) {
            let oldest = cut.iter().min_by_key(|(_, at)| **at);
            if let Some(oldest) = oldest.map(|(network, _)| *network) {
                cut.remove(&oldest);
            }
        }
        cut.insert(network, Instant::now());
    }

    pub fn set_position(&self, position: u64) {
        self.consumer.position.store(position, Ordering::Relaxed);
    }
}

impl Drop for Registration {
    fn drop(&mut self) {
        let mut list = self.shared.list.lock();
        list.remove(&self.consumer.info.id);
        // Under the lock: a thread that does not find the consumer any more finds its permit free.
        drop(self.permit.take());
    }
}

/// How many events the slowest consumer, and the one in the middle, has before it.
fn lag(consumers: &[ConsumerInfo], head: u64) -> [u64; 2] {
    let mut behind: Vec<u64> = consumers
        .iter()
        // One that has no position yet begins with its next write.
        .filter(|consumer| consumer.position > 0)
        .map(|consumer| (head + 1).saturating_sub(consumer.position))
        .collect();
    behind.sort_unstable();
    let slowest = behind.last().copied().unwrap_or(0);
    let median = behind.get(behind.len() / 2).copied().unwrap_or(0);
    [slowest, median]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn admit(consumers: &Consumers, address: &str) -> Result<Registration, AdmissionError> {
        consumers.admit(address.parse().expect("an address"), "test", 4, 2)
    }

    #[test]
    fn places_are_limited_and_given_back() {
        let consumers = Consumers::default();
        let first = admit(&consumers, "192.0.2.1").expect("the first");
        let _second = admit(&consumers, "::ffff:192.0.2.1").expect("the same address, mapped");
        assert_eq!(
            admit(&consumers, "192.0.2.1").err(),
            Some(AdmissionError::TooManyFromAddress)
        );
        let _third = admit(&consumers, "2001:db8::1").expect("another");
        let _fourth = admit(&consumers, "2001:db8::2:1").expect("its neighbour");
        assert_eq!(
            admit(&consumers, "192.0.2.9").err(),
            Some(AdmissionError::Full)
        );
        drop(first);
        let again = admit(&consumers, "192.0.2.1").expect("a free permit");
        again.sent(3, 300);
        again.set_position(17);
        let listed = consumers.list();
        assert_eq!(listed.len(), 4);
        assert_eq!(
            (listed[3].events, listed[3].bytes, listed[3].position),
            (3, 300, 17)
        );
        assert_eq!(consumers.metrics().refused.get(), 2);
        assert_eq!(consumers.metrics().admitted.get(), 5);
    }

    #[test]
    fn a_network_is_cut_once_however_often_its_consumers_are() {
        let consumers = Consumers::default();
        let minute = Duration::from_secs(60);
        for _ in 0..5 {
            let slow = admit(&consumers, "192.0.2.1").expect("a permit");
            slow.fell_out();
        }
        let _well = admit(&consumers, "192.0.2.2").expect("a permit");
        assert_eq!(consumers.networks_cut(minute), (1, 1));
        admit(&consumers, "192.0.2.3").expect("a permit").fell_out();
        assert_eq!(consumers.networks_cut(minute), (2, 1));
        for n in 0..9 {
            let slow = admit(&consumers, &format!("2001:db8:0:{n}::1"));
            slow.expect("a permit").fell_out();
        }
        assert_eq!(consumers.networks_cut(minute), (3, 1));
        let again = admit(&consumers, "192.0.2.1").expect("a permit");
        assert_eq!(consumers.networks_cut(minute), (3, 1));
        drop(again);
        assert_eq!(consumers.networks_cut(Duration::ZERO), (0, 1));
    }

    #[test]
    fn ipv6_counts_by_network() {
        let consumers = Consumers::default();
        let _held: Vec<_> = (1..=2)
            .map(|n| admit(&consumers, &format!("2001:db8::{n}")).expect("a permit"))
            .collect();
        assert_eq!(
            admit(&consumers, "2001:db8::99").err(),
            Some(AdmissionError::TooManyFromAddress)
        );
        assert!(admit(&consumers, "2001:db8:0:1::99").is_ok());
    }
}
