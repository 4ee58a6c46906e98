//! Memory for the frames of hosts, between their sockets and the log, in three parts that cannot take from one another:
//! a share of each host's own, one that all hosts borrow from for moments, and shares for events that wait for a look-up.
//! Promises that the whole stays within [`MemoryLimits::bound`]. Reads no frame and knows no host by its name.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use tokio::sync::oneshot;

use super::metrics::Metrics;

/// How much memory the frames of hosts may take, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MemoryLimits {
    /// For each host: of events on their way, and once more of a message whose end has not come.
    pub per_host: usize,
    /// For all hosts together: what does not fit into their own shares.
    pub shared: usize,
    /// For all hosts together, in equal parts: events that wait for a look-up.
    pub parked: usize,
}

impl Default for MemoryLimits {
    fn default() -> MemoryLimits {
        MemoryLimits {
            per_host: 64 * 1024,
            shared: 256 * 1024 * 1024,
            parked: 256 * 1024 * 1024,
        }
    }
}

impl MemoryLimits {
    /// The most that frames of so many hosts take, whatever the hosts send.
    pub fn bound(&self, hosts: usize) -> usize {
        // Of events on their way, of a message that is not whole, and of events that are parked.
        3 * hosts * self.per_host + self.shared + self.parked
    }
}

/// A loan that is held longer than this is no loan for a moment: events pass in milliseconds, and a long frame of an
/// ordinary line in a second.
const SLOW_LOAN: Duration = Duration::from_secs(2);

/// How long a host that held a loan that long comes after all others. Long enough that a thousand such hosts, each of them
/// with its one loan, leave the memory to others for most of the time.
const SLOW_FOR: Duration = Duration::from_secs(60 * 60);

/// Bytes of events that a host must have sent, and the relay settled, before all that it borrows counts as usual.
const PROOF_BYTES: usize = 1024 * 1024;

/// A loan up to this is usual for any host: longer frames are rare, and so many of this length need many hosts.
const USUAL_LOAN: usize = 256 * 1024;

/// What of the memory is in use.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MemoryUse {
    /// Of the hosts' own shares, by events on their way.
    pub own: usize,
    /// Of what all hosts borrow from.
    pub shared: usize,
    /// All there is to borrow.
    pub shared_limit: usize,
    /// Of the shares for events that wait for a look-up.
    pub parked: usize,
    /// All of those shares.
    pub parked_limit: usize,
    /// Hosts whose sockets wait because there is nothing to borrow for them.
    pub waiting: usize,
    /// For how long there has always been such a host.
    pub short_for: Option<Duration>,
}

/// What is known of a host that borrows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Standing {
    /// Its events passed quickly so far.
    Proven,
    /// Nothing much is known of it.
    New,
    /// It held a loan for long.
    Slow,
}

/// Who is served first. All but the first leave half of the memory to those.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Rank {
    Usual = 0,
    Long = 1,
    Slow = 2,
}

impl Rank {
    fn of(bytes: usize, standing: Standing) -> Self {
        match standing {
            Standing::Proven => Self::Usual,
            Standing::New if bytes <= USUAL_LOAN => Self::Usual,
            Standing::New => Self::Long,
            Standing::Slow => Self::Slow,
        }
    }
}

/// See the head of this file.
#[derive(Debug)]
pub struct Memory {
    limits: MemoryLimits,
    hosts: AtomicUsize,
    parked: AtomicUsize,
    shared: Mutex<Shared>,
    metrics: Arc<Metrics>,
}

#[derive(Debug)]
struct Shared {
    free: usize,
    /// By [`Rank`].
    waiting: [Queue; 3],
    tickets: u64,
    short_since: Option<Instant>,
}

/// Who waits, by turn: what is usual as it came, the rest the shorter the sooner, so that who wants little does not wait
/// for all who want much.
type Queue = BTreeMap<(usize, u64), Waiter>;

#[derive(Debug)]
struct Waiter {
    bytes: usize,
    reply: oneshot::Sender<Loan>,
}

impl Memory {
    pub(super) fn new(limits: MemoryLimits, metrics: Arc<Metrics>) -> Arc<Self> {
        Arc::new(Self {
            limits,
            hosts: AtomicUsize::new(0),
            parked: AtomicUsize::new(0),
            shared: Mutex::new(Shared {
                free: limits.shared,
                waiting: Default::default(),
                tickets: 0,
                short_since: None,
            }),
            metrics,
        })
    }

    /// Each host's own share.
    pub(super) fn per_host(&self) -> usize {
        self.limits.per_host
    }

    /// One more host shares the memory for parked events.
    pub(super) fn add_host(&self) {
        self.hosts.fetch_add(1, Ordering::Relaxed);
    }

    /// Takes memory for a parked event of a host whose parked events have `before`. Each host has as much as of its own;
    /// above that an equal part of what there is.
    pub(super) fn park(&self, before: usize, bytes: usize) -> bool {
        let hosts = self.hosts.load(Ordering::Relaxed).max(1);
        let total = self.parked.fetch_add(bytes, Ordering::Relaxed) + bytes;
        let all = before + bytes;
        let fits = all <= self.limits.per_host
            || (all <= self.limits.parked / hosts && total <= self.limits.parked);
        if !fits {
            self.unpark(bytes);
        }
        fits
    }

    pub(super) fn unpark(&self, bytes: usize) {
        self.parked.fetch_sub(bytes, Ordering::Relaxed);
    }

    /// Borrows; waits while there is not enough. More than half of all is as much as half of all.
    pub(super) async fn borrow(self: &Arc<Self>, bytes: usize, standing: Standing) -> Loan {
        let bytes = bytes.min(self.limits.shared / 2);
        let rank = Rank::of(bytes, standing);
        let waiting = {
            let mut shared = self.shared.lock();
            shared.pass_over_gone();
            if shared.is_next(rank) && self.leaves_enough(shared.free, bytes, rank) {
                shared.free -= bytes;
                return self.loan(bytes);
            }
            let (reply, waiting) = oneshot::channel();
            shared.tickets += 1;
            let turn = match rank {
                Rank::Usual => (0, shared.tickets),
                Rank::Long | Rank::Slow => (bytes, shared.tickets),
            };
            shared.waiting[rank as usize].insert(turn, Waiter { bytes, reply });
            shared.short_since.get_or_insert_with(Instant::now);
            waiting
        };
        self.metrics.memory_waits.inc();
        match waiting.await {
            Ok(loan) => loan,
            Err(_) => std::future::pending().await,
        }
    }

    /// What is in use, without the hosts' own shares.
    pub(super) fn in_use(&self) -> MemoryUse {
        let mut shared = self.shared.lock();
        shared.forget_gone();
        MemoryUse {
            own: 0,
            shared: self.limits.shared - shared.free,
            shared_limit: self.limits.shared,
            parked: self.parked.load(Ordering::Relaxed),
            parked_limit: self.limits.parked,
            waiting: shared.waiting.iter().map(Queue::len).sum(),
            short_for: shared.short_since.map(|since| since.elapsed()),
        }
    }

    /// The last half is for what is usual: who wants much, or held it for long, cannot take everything.
    fn leaves_enough(&self, free: usize, bytes: usize, rank: Rank) -> bool {
        let kept = match rank {
            Rank::Usual => 0,
            Rank::Long | Rank::Slow => self.limits.shared / 2,
        };
        free >= bytes + kept
    }

    fn loan(self: &Arc<Self>, bytes: usize) -> Loan {
        Loan {
            memory: self.clone(),
            bytes,
            since: Instant::now(),
        }
    }

    fn give_back(self: &Arc<Self>, bytes: usize) {
        let mut served = Vec::new();
        let mut shared = self.shared.lock();
        shared.free += bytes;
        shared.pass_over_gone();
        'all: for rank in [Rank::Usual, Rank::Long, Rank::Slow] {
            while let Some(first) = shared.waiting[rank as usize].first_entry() {
                let bytes = first.get().bytes;
                if !self.leaves_enough(shared.free, bytes, rank) {
                    break 'all;
                }
                let Some((_, waiter)) = shared.waiting[rank as usize].pop_first() else {
                    break;
                };
                shared.free -= bytes;
                served.push(waiter);
                shared.pass_over_gone();
            }
        }
        if shared.nobody_waits() {
            shared.short_since = None;
        }
        drop(shared);
        for waiter in served {
            // Whoever went away meanwhile gives it back with this.
            drop(waiter.reply.send(self.loan(waiter.bytes)));
        }
    }
}

impl Shared {
    /// Whether nobody waits who comes before a newcomer of that rank.
    fn is_next(&self, rank: Rank) -> bool {
        self.waiting[..=rank as usize].iter().all(Queue::is_empty)
    }

    fn nobody_waits(&self) -> bool {
        self.waiting.iter().all(Queue::is_empty)
    }

    /// Whose connection ended stands at the head of no queue.
    fn pass_over_gone(&mut self) {
        for waiting in &mut self.waiting {
            while waiting
                .first_entry()
                .is_some_and(|first| first.get().reply.is_closed())
            {
                waiting.pop_first();
            }
        }
        if self.nobody_waits() {
            self.short_since = None;
        }
    }

    /// The same for all places of the queues.
    fn forget_gone(&mut self) {
        for waiting in &mut self.waiting {
            waiting.retain(|_, waiter| !waiter.reply.is_closed());
        }
        if self.nobody_waits() {
            self.short_since = None;
        }
    }
}

/// Bytes of what all hosts borrow from; given back when it goes out of scope.
#[derive(Debug)]
pub(super) struct Loan {
    memory: Arc<Memory>,
    bytes: usize,
    since: Instant,
}

impl Loan {
    /// Gives back what is more than `bytes`.
    pub(super) fn trim(&mut self, bytes: usize) {
        let surplus = self.bytes.saturating_sub(bytes);
        if surplus > 0 {
            self.bytes -= surplus;
            self.memory.give_back(surplus);
        }
    }

    /// As if it had been held for longer than a moment.
    #[cfg(test)]
    pub(super) fn age(&mut self) {
        self.since -= SLOW_LOAN + Duration::from_millis(1);
    }

    /// Whether it was held for longer than a moment.
    pub(super) fn was_slow(&self) -> bool {
        self.since.elapsed() > SLOW_LOAN
    }
}

impl Drop for Loan {
    fn drop(&mut self) {
        if self.bytes > 0 {
            self.memory.give_back(self.bytes);
        }
    }
}

/// How one host dealt with what it was lent.
#[derive(Debug, Default)]
pub(super) struct Record {
    settled_bytes: usize,
    slow_until: Option<Instant>,
}

impl Record {
    pub(super) fn standing(&self) -> Standing {
        match self.slow_until {
            Some(until) if Instant::now() < until => Standing::Slow,
            _ if self.settled_bytes >= PROOF_BYTES => Standing::Proven,
            _ => Standing::New,
        }
    }

    /// Events of so many bytes passed.
    pub(super) fn passed(&mut self, bytes: usize) {
        self.settled_bytes = self.settled_bytes.saturating_add(bytes);
    }

    /// A loan was held for long.
    pub(super) fn was_slow(&mut self) {
        self.settled_bytes = 0;
        self.slow_until = Some(Instant::now() + SLOW_FOR);
    }
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt;

    use super::*;

    fn memory(shared: usize) -> Arc<Memory> {
        let limits = MemoryLimits {
            per_host: 10,
            shared,
            parked: 1_000,
        };
        Memory::new(limits, Arc::default())
    }

    const MIB: usize = 1024 * 1024;

    #[tokio::test]
    async fn the_last_half_is_for_what_is_usual_and_that_comes_first() {
        let memory = memory(100 * MIB);
        let slow = memory.borrow(MIB, Standing::Slow).await;
        let long = memory.borrow(49 * MIB, Standing::New).await;
        let mut longer = Box::pin(memory.borrow(2 * MIB, Standing::New));
        let mut shorter = Box::pin(memory.borrow(MIB, Standing::New));
        let mut last = Box::pin(memory.borrow(1, Standing::Slow));
        for waiting in [&mut longer, &mut shorter, &mut last] {
            assert!(waiting.as_mut().now_or_never().is_none());
        }
        let short = memory.borrow(USUAL_LOAN, Standing::New).await;
        let proven = memory.borrow(49 * MIB, Standing::Proven).await;
        let mut next = Box::pin(memory.borrow(MIB, Standing::Proven));
        assert!(next.as_mut().now_or_never().is_none());
        assert_eq!(memory.in_use().waiting, 4);
        assert!(memory.in_use().short_for.is_some());
        drop(slow);
        let next = next.now_or_never().expect("it is its turn");
        drop((proven, next));
        assert!(shorter.as_mut().now_or_never().is_none(), "half is kept");
        drop(short);
        let shorter = shorter.now_or_never().expect("little before much");
        assert!(last.as_mut().now_or_never().is_none());
        drop(long);
        let longer = longer.now_or_never().expect("it is its turn");
        assert!(last.now_or_never().is_some());
        drop((shorter, longer));
        let in_use = memory.in_use();
        assert_eq!((in_use.shared, in_use.short_for), (0, None));
    }

    #[tokio::test]
    async fn who_goes_away_takes_nothing_along_and_what_is_not_needed_goes_back() {
        let memory = memory(100);
        let mut loan = memory.borrow(50, Standing::Proven).await;
        let other = memory.borrow(50, Standing::Proven).await;
        let mut gone = Box::pin(memory.borrow(20, Standing::Proven));
        assert!(gone.as_mut().now_or_never().is_none());
        drop(gone);
        let mut waiting = Box::pin(memory.borrow(5, Standing::Proven));
        assert!(waiting.as_mut().now_or_never().is_none());
        loan.trim(45);
        assert!(waiting.now_or_never().is_some());
        drop((loan, other));
        assert_eq!(memory.in_use().shared, 0);
    }

    #[test]
    fn parked_events_have_equal_parts_and_at_least_the_hosts_own() {
        let memory = memory(100);
        for _ in 0..4 {
            memory.add_host();
        }
        assert!(memory.park(0, 250) && !memory.park(250, 1));
        assert!(memory.park(0, 250) && memory.park(0, 250) && memory.park(0, 245));
        // Nothing is left of what is shared out, and yet everybody has something.
        assert!(!memory.park(0, 11) && memory.park(0, 10) && !memory.park(10, 1));
        assert_eq!(memory.in_use().parked, 1_005);
        assert!(memory.limits.bound(4) >= 1_005 + 100);
    }
}
