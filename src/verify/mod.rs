//! Every event is verified here, or refused under the name of a rule.
//!
//! [`rules`] are pure functions. The [`Pipeline`] runs them: one DID is always handled by one shard, in arrival
//! order; shards are plain threads, one per core; what they accept goes to the event log's sequencer. Nothing
//! unverified leaves, and nothing waits without a bound.

pub mod account;
mod alarm;
mod judge;
mod lookup;
mod metrics;
mod policy;
#[cfg(any(test, feature = "devnet"))]
mod recording;
pub mod residents;
pub mod rules;
mod shard;
pub mod signature;
mod slab;
#[cfg(test)]
mod tests;
mod turns;

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::SyncSender;
use std::thread::{self, JoinHandle};
use std::time::Duration;

use tokio::sync::mpsc::{self, UnboundedSender};
use tokio::sync::oneshot;

use crate::atproto::did::Did;
use crate::clock::Clock;
use crate::eventlog::Append;
use crate::heartbeat::Heartbeat;
use crate::hosts::{HostIndex, Received, Settled};
use crate::identity::{self, Resolver};
use crate::store::{AccountUpdate, LocalStatus, Validation, Writer};
use crate::views::accounts::LiveAccounts;

pub use account::DesyncLimits;
pub use alarm::{Alarm, Watched};
pub use lookup::Places;
pub use metrics::Metrics;
#[cfg(any(test, feature = "devnet"))]
pub use recording::Recording;
pub use shard::{Redaction, Settlement};

use lookup::Lookups;
use shard::{Command, Outlets, Shard, Work};

/// More shards than this are a typing error, not a machine.
pub const MAX_SHARDS: usize = 1024;

/// What an operator sets for the pipeline.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Settings {
    /// Threads that verify. A change needs a restart.
    pub shards: usize,
    /// Memory for the accounts that all shards together keep, in bytes. A change needs a restart.
    pub account_bytes: usize,
    /// Look-ups at a time. A change needs a restart.
    pub places: Places,
    /// How strictly commits are checked where the host has no setting of its own.
    pub validation: Validation,
    /// How often an account may break its chain before it is desynchronized.
    pub desync: DesyncLimits,
    /// Largest `#identity` or `#account` frame, in bytes.
    pub account_event_bytes: usize,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            shards: thread::available_parallelism().map_or(1, |n| n.get().min(MAX_SHARDS)),
            account_bytes: 512 << 20,
            places: Places::default(),
            validation: Validation::Strict,
            desync: DesyncLimits::default(),
            // The longest DID (2,048 bytes) and handle (253), and as much again for fields that are to come.
            account_event_bytes: 8 << 10,
        }
    }
}

/// Options of the pipeline.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// Threads that verify.
    pub shards: usize,
    /// Memory for the accounts that all shards together keep, in bytes.
    pub account_bytes: usize,
    /// What may change while the pipeline runs.
    pub tuning: Tuning,
    /// Look-ups under way at a time.
    pub places: Places,
    /// The time that revs and identities are held against.
    pub clock: Clock,
}

impl Options {
    /// These settings, with identities that are used as long as those of the resolver.
    pub fn with(settings: &Settings, identity: &identity::Settings, clock: Clock) -> Self {
        Self {
            shards: settings.shards.max(1),
            account_bytes: settings.account_bytes,
            tuning: Tuning::of(settings, identity),
            places: settings.places,
            clock,
        }
    }
}

/// What of [`Options`] may change while the pipeline runs.
#[derive(Clone, Copy, Debug)]
pub struct Tuning {
    /// After this long a known identity is resolved again.
    pub identity_ttl: Duration,
    /// A PDS is asked for one account's status at most this often.
    pub status_interval: Duration,
    /// How strictly commits are checked where the host has no setting of its own.
    pub validation: Validation,
    /// How often an account may break its chain before it is throttled.
    pub desync: DesyncLimits,
    /// Largest `#identity` or `#account` frame, in bytes.
    pub account_event_bytes: usize,
}

impl Tuning {
    fn of(settings: &Settings, identity: &identity::Settings) -> Self {
        Self {
            identity_ttl: identity.ttl,
            status_interval: identity.refresh_interval,
            validation: settings.validation,
            desync: settings.desync,
            account_event_bytes: settings.account_event_bytes,
        }
    }
}

/// Dependencies of the pipeline.
pub struct Dependencies {
    /// Resolves identities.
    pub resolver: Resolver,
    /// Reads account rows, including those still to be written, and takes changes.
    pub writer: Writer,
    /// The sequencer's queue.
    pub log: SyncSender<Vec<Append<Settlement>>>,
    /// All known hosts.
    pub hosts: HostIndex,
    /// Raised when a shard or a look-up panics.
    pub alarm: Alarm,
    /// The last sequence number of the log.
    pub head: u64,
    pub metrics: Metrics,
}

/// Up to where what the shards accepted is in the log, and known to the store's writer. Clones share it.
#[derive(Clone)]
struct Settlements {
    /// Number of the last change of each shard.
    changes: Arc<[AtomicU64]>,
    /// The last sequence number.
    seq: Arc<AtomicU64>,
}

impl Settlements {
    fn new(shards: usize, head: u64) -> Self {
        Self {
            changes: (0..shards).map(|_| AtomicU64::new(0)).collect(),
            seq: Arc::new(AtomicU64::new(head)),
        }
    }

    /// The last change of a shard.
    fn of(&self, shard: usize) -> u64 {
        self.changes[shard].load(Ordering::Acquire)
    }

    fn note(&self, shard: usize, change: u64) {
        self.changes[shard].store(change, Ordering::Release);
    }

    /// The last sequence number: no lower than that of any change that is noted.
    fn seq(&self) -> u64 {
        self.seq.load(Ordering::Acquire)
    }
}

/// Why a decision on an account could not be carried out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CommandError {
    /// No event of the account was ever seen.
    #[error("the account is not known to this relay")]
    UnknownAccount,
    /// The relay is going down.
    #[error("the relay is shutting down")]
    ShuttingDown,
}

/// The shards. Clones share them; they end when the last clone is gone.
#[derive(Clone)]
pub struct Pipeline {
    shards: Arc<[UnboundedSender<Work>]>,
    settled: Settlements,
    heartbeats: Arc<[Heartbeat]>,
    metrics: Metrics,
}

impl Pipeline {
    /// Starts the shards and the look-ups. Must be called inside a tokio runtime.
    ///
    /// # Errors
    /// The system starts no more threads.
    pub fn start(
        options: Options,
        dependencies: Dependencies,
    ) -> io::Result<(Self, Vec<JoinHandle<()>>)> {
        let (lookups, questions) = mpsc::unbounded_channel();
        let (senders, inboxes): (Vec<_>, Vec<_>) = (0..options.shards)
            .map(|_| mpsc::unbounded_channel())
            .unzip();
        let settled = Settlements::new(options.shards, dependencies.head);
        let heartbeats: Arc<[Heartbeat]> =
            (0..options.shards).map(|_| Heartbeat::default()).collect();
        let mut threads = Vec::new();
        for (index, inbox) in inboxes.into_iter().enumerate() {
            let writer = dependencies.writer.clone();
            let heartbeat = heartbeats[index].clone();
            let waiting = heartbeat.clone();
            let outlets = Outlets {
                log: dependencies.log.clone(),
                lookups: lookups.clone(),
                updates: Box::new(move |update: AccountUpdate| {
                    waiting.wait(|| writer.update(update));
                }),
                hosts: dependencies.hosts.clone(),
                settled: settled.clone(),
                heartbeat,
                metrics: dependencies.metrics.clone(),
            };
            let shard = Shard::new(index, options, inbox, outlets);
            let thread = std::thread::Builder::new().name(format!("shard-{index}"));
            let watched = dependencies.alarm.watch("a shard");
            threads.push(thread.spawn(move || {
                let _watched = watched;
                shard.run();
            })?);
        }
        let shards: Vec<_> = senders.iter().map(UnboundedSender::downgrade).collect();
        let answers = Lookups {
            resolver: dependencies.resolver,
            writer: dependencies.writer,
            shards,
            settled: settled.clone(),
            alarm: dependencies.alarm,
            places: options.places,
            metrics: dependencies.metrics.clone(),
        };
        tokio::spawn(Arc::new(answers).run(questions));
        Ok((
            Self {
                shards: senders.into(),
                settled,
                heartbeats,
                metrics: dependencies.metrics,
            },
            threads,
        ))
    }

    /// Hands an event to its shard. Events of one host must come in its order; there are never more than their hosts may
    /// have in flight.
    pub fn submit(&self, received: Received) {
        let shard = self.shard(&received.did);
        let host = received.host.clone();
        if let Err(unsent) = self.shards[shard].send(Work::Event(received)) {
            // A shard that is gone settles nothing: the host sends the event again after the restart.
            host.progress().freeze();
            drop(unsent);
        }
    }

    /// Sets an account's local status, stores it and tells consumers; returns when that event is durable. With
    /// `only_from`, an account whose local status is another one stays as it is.
    ///
    /// # Errors
    /// The account is unknown, or the relay is shutting down.
    pub async fn set_local_status(
        &self,
        did: Did,
        local: LocalStatus,
        only_from: Option<LocalStatus>,
    ) -> Result<(), CommandError> {
        let (reply, done) = oneshot::channel();
        let shard = self.shard(&did);
        self.shards[shard]
            .send(Work::Command(Command {
                did,
                local,
                only_from,
                reply,
            }))
            .map_err(|_| CommandError::ShuttingDown)?;
        done.await.unwrap_or(Err(CommandError::ShuttingDown))
    }

    /// How the shards get on, by their numbers.
    pub fn heartbeats(&self) -> &[Heartbeat] {
        &self.heartbeats
    }

    /// Applies other settings, from the next event of each shard on.
    pub fn apply(&self, settings: &Settings, identity: &identity::Settings) {
        let tuning = Tuning::of(settings, identity);
        self.tell_all(|| Work::Apply(tuning));
    }

    /// Lets go of a part of the accounts in memory.
    pub fn shrink(&self) {
        self.tell_all(|| Work::Shrink);
    }

    fn tell_all(&self, work: impl Fn() -> Work) {
        for shard in self.shards.iter() {
            // A shard that has ended needs to know nothing.
            let _ = shard.send(work());
        }
    }

    /// Gives a shard nothing to do, and the sequencer behind it an empty batch.
    pub fn nudge(&self, shard: usize) {
        if let Some(shard) = self.shards.get(shard) {
            // A shard that has ended has no heartbeat.
            let _ = shard.send(Work::Nothing);
        }
    }

    /// What the sequencer calls with durable events; `heartbeat` is the sequencer's.
    pub fn settler(&self, accounts: LiveAccounts, heartbeat: Heartbeat) -> Settler {
        Settler {
            heartbeat,
            settled: self.settled.clone(),
            accounts,
            metrics: self.metrics.clone(),
        }
    }

    /// Ends the shards, once they have worked off what was submitted before.
    pub fn stop(&self) {
        self.tell_all(|| Work::Stop);
    }

    fn shard(&self, did: &Did) -> usize {
        (did.hash64() % self.shards.len() as u64) as usize
    }
}

/// Settles what the log holds on disk.
#[derive(Clone)]
pub struct Settler {
    settled: Settlements,
    accounts: LiveAccounts,
    heartbeat: Heartbeat,
    metrics: Metrics,
}

impl Settler {
    /// Lets readers see the accounts as these events leave them. Consumers have not seen the events yet.
    pub fn announce(&self, events: &[(u64, Settlement)]) {
        let updates = events.iter().filter_map(|(_, event)| event.update.as_ref());
        self.accounts.announce(updates);
    }

    /// Account changes, announced before, go to the accounts view, in log order, then the hosts' cursors move. Called
    /// outside the runtime; waits while the database is far behind. Returns the redactions that follow.
    pub fn settle(&self, mut durable: Vec<(u64, Settlement)>) -> Vec<Redaction> {
        let changes = durable
            .iter_mut()
            .filter_map(|(seq, settlement)| Some((*seq, settlement.update.take()?)));
        // After a shutdown nothing is written any more: the log still has it.
        let _ = self.heartbeat.wait(|| self.accounts.apply(changes));
        if let Some((last, _)) = durable.last() {
            self.settled.seq.store(*last, Ordering::Release);
        }
        let mut redact = Vec::new();
        for (seq, settlement) in durable {
            self.settled.note(settlement.shard, settlement.ticket);
            if let Some(in_flight) = settlement.in_flight {
                in_flight.settle(Settled::Durable { log_seq: seq });
            }
            match settlement.redact {
                Some(did) => redact.push(Redaction {
                    did,
                    seq,
                    reply: settlement.reply,
                }),
                None => shard::answer(settlement.reply),
            }
            self.metrics.forwarded[settlement.kind.index()].inc();
            self.metrics
                .time_to_firehose
                .observe(settlement.received.elapsed().as_secs_f64());
        }
        redact
    }
}
