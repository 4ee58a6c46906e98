//! After a crash or a loss: what the log holds and SQL does not know, and what SQL knows and the log does not hold.
//!
//! The log is the truth. Its tail, from the position up to which SQL surely has everything, is applied once more
//! (applying twice changes nothing), and tells which events above a host's cursor are durable already. Of a database
//! that is lost or old, hosts, cursors and accounts come back as far as the log reaches; an operator's limits and bans
//! of hosts do not.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::io;

use tracing::{error, info, warn};

use crate::atproto::car::Car;
use crate::atproto::commit::SignedCommit;
use crate::atproto::did::Did;
use crate::atproto::frame::{self, Kind, Message};
use crate::atproto::tid::Tid;
use crate::config::Config;
use crate::eventlog::{Entry, EventLog, LogError, Origin, ReadError};
use crate::hosts::roster::{Name, Roster};
use crate::hosts::{Durable, InFlightLimits, RecoveredHost};
use crate::store::{
    AccountUpdate, Batch, Heard, HostId, HostRow, LocalStatus, NewHost, RepoState, Store,
    StoreError, UpstreamStatus,
};
use crate::telemetry::metrics;

/// Account changes written in one transaction.
const BATCH: usize = 1_000;
/// Most events of one host between the oldest unsettled one and the newest that the log may have.
const SPAN: usize = InFlightLimits::DEFAULT.span;
/// Numbers left out where the log has lost events that the database had counted: so far ahead of the database may the
/// log have been. More than it takes up while the database is away for a minute, and few enough to hold their places.
const UNSEEN: u64 = 1 << 19;
/// A word on how far it is, after so many events.
const REPORT_EVENTS: u64 = 250_000;

/// Why recovery failed.
#[derive(Debug, thiserror::Error)]
pub enum RecoveryError {
    /// The database.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The log.
    #[error("the event log cannot be read: {0}")]
    Log(#[from] ReadError),
    /// The log's folder.
    #[error(transparent)]
    Folder(#[from] LogError),
    /// The roster.
    #[error("the list of hosts in {folder} cannot be used: {source}")]
    Roster { folder: String, source: io::Error },
    /// The log is empty, the database is not.
    #[error(
        "the database has seen events up to seq {database}, and the event log in {folder} is empty: bring back its \
         folder, or name the right one. If it is lost for good, go on above those numbers with \
         `atproto-relay log abandon` and the same settings"
    )]
    LogLost { database: u64, folder: String },
    /// The log is not lost.
    #[error(
        "the event log in {folder} ends at seq {log}, and the database has seen events up to {database}: nothing is to \
         be abandoned, start the relay"
    )]
    LogNotLost {
        database: u64,
        log: u64,
        folder: String,
    },
}

/// The log, ready to give out only numbers that were never given out, as far as the database knows.
///
/// # Errors
/// [`RecoveryError::LogLost`] where nothing is left of a log: that is more often the wrong folder than a loss.
pub(super) async fn above_the_database(
    log: EventLog,
    store: &Store,
) -> Result<EventLog, RecoveryError> {
    let database = store.log_head().await?;
    let head = log.head();
    if head >= database {
        return Ok(log);
    }
    let folder = log.options().dir.display().to_string();
    if head == 0 {
        return Err(RecoveryError::LogLost { database, folder });
    }
    let next = database + 1 + UNSEEN;
    error!(
        folder,
        from = head + 1,
        to = database,
        next,
        "the event log lost its end: events that the database had seen are not in it, and consumers may have seen \
         them and some more. Going on with numbers above all that were given out"
    );
    Ok(log.skip_to(next)?)
}

/// Lets an empty log begin above all that the database knows of. Returns its first number.
pub(super) async fn abandon(log: EventLog, store: &Store) -> Result<u64, RecoveryError> {
    let database = store.log_head().await?;
    let folder = || log.options().dir.display().to_string();
    let head = log.head();
    if head > 0 || database == 0 {
        return Err(RecoveryError::LogNotLost {
            database,
            log: head,
            folder: folder(),
        });
    }
    let next = database + 1 + UNSEEN;
    log.skip_to(next)?;
    Ok(next)
}

/// Applies the log's tail to the database. Returns, for every host, its cursor and the events above it that are durable.
pub(super) async fn replay(
    log: &EventLog,
    store: &Store,
    roster: &mut Roster,
    config: &Config,
) -> Result<HashMap<HostId, RecoveredHost>, RecoveryError> {
    let from = store.replay_from().await?;
    let mut tail = Tail::begin(log, store, roster, config, from).await?;
    let from = from_the_window(log, from);
    let mut accounts = Vec::with_capacity(BATCH);
    let mut ended = Vec::new();
    let mut count = 0_u64;
    for entry in log.entries(from).and_redacted() {
        let (entry, frame) = entry?;
        count += 1;
        metrics().recovery_steps.inc();
        let host = tail.note(&entry, &frame);
        accounts.extend(account_update(&entry, &frame, host));
        accounts.extend(own_update(
            &entry,
            &frame,
            tail.hosts_of_redacted.get(&entry.did_hash).copied(),
        ));
        ended.extend(ended_before(&entry, &frame));
        if ended.len() >= BATCH {
            log.redact_again(ended.drain(..))?;
        }
        if accounts.len() >= BATCH {
            write(store, &mut accounts).await?;
        }
        if count.is_multiple_of(REPORT_EVENTS) {
            info!(
                seq = entry.seq,
                head = log.head(),
                "applying the event log to the database"
            );
        }
    }
    write(store, &mut accounts).await?;
    log.redact_again(ended)?;
    if count > 0 {
        info!(
            from,
            events = count,
            "applied the tail of the event log to the database"
        );
    }
    tail.end(store, config).await
}

/// What is learned of the hosts on the way through the log's tail.
struct Tail {
    hosts: HashMap<HostId, Numbered>,
    /// Hosts that the database did not know.
    restored: Vec<(HostId, Name)>,
    /// The last host of accounts whose events were taken out of the log, by the hash of their DIDs: the only word left
    /// on whose accounts they were. Kept where hosts were restored.
    hosts_of_redacted: HashMap<u64, HostId>,
}

impl Tail {
    async fn begin(
        log: &EventLog,
        store: &Store,
        roster: &mut Roster,
        config: &Config,
        replay_from: u64,
    ) -> Result<Tail, RecoveryError> {
        let known = store.hosts().await?;
        let restored = missing(&known, roster);
        for (id, name) in &restored {
            // Its accounts were admitted once: none is throttled on the way back.
            let host = NewHost {
                account_limit: i64::MAX,
                ..NewHost::new(&name.hostname, name.tls, config.is_trusted(domain(name)))
            };
            store.restore_host(*id, &host).await?;
        }
        let foreign: HashSet<HostId> = known
            .iter()
            .filter(|row| {
                roster
                    .hosts()
                    .get(&row.id)
                    .is_some_and(|name| *name != Name::of(row))
            })
            .map(|row| row.id)
            .collect();
        let rows = store.hosts().await?;
        roster
            .record(rows.iter().map(|row| (row.id, Name::of(row))))
            .map_err(|source| RecoveryError::Roster {
                folder: log.options().dir.display().to_string(),
                source,
            })?;
        if !restored.is_empty() {
            warn!(
                hosts = restored.len(),
                "the database did not know hosts that the event log knows: it is new, or was restored from a copy. \
                 They, their cursors and their accounts come back from the log; limits and bans that were set do not"
            );
        }
        if !foreign.is_empty() {
            warn!(
                hosts = foreign.len(),
                "the database has numbers of hosts that mean others in the event log: what is in the log so far is \
                 not attributed to them"
            );
        }
        // A host that this database gives the number of another one has no event in the log.
        let hosts = rows.iter().filter(|row| !foreign.contains(&row.id));
        Ok(Tail {
            hosts: hosts
                .map(|row| (row.id, Numbered::new(row, replay_from)))
                .collect(),
            restored,
            hosts_of_redacted: HashMap::new(),
        })
    }

    /// Takes an event in; its host, where that is known. There is none for an event of the relay's own, and for one
    /// whose index entry was rebuilt from its frame.
    fn note(&mut self, entry: &Entry, frame: &[u8]) -> Option<HostId> {
        let Origin::Host { id, seq } = entry.origin else {
            return None;
        };
        let host = HostId(id);
        self.hosts.get_mut(&host)?.note(seq, entry, frame);
        if frame.is_empty() && !self.restored.is_empty() {
            self.hosts_of_redacted.insert(entry.did_hash, host);
        }
        Some(host)
    }

    async fn end(
        self,
        store: &Store,
        config: &Config,
    ) -> Result<HashMap<HostId, RecoveredHost>, RecoveryError> {
        for (id, name) in &self.restored {
            let limit = i64::try_from(config.default_account_limit(domain(name)));
            let accounts = store.count_accounts(*id).await?;
            let limit = limit.unwrap_or(i64::MAX).max(accounts);
            store.set_account_limit(*id, limit).await?;
        }
        let recovered = self.hosts.into_iter();
        Ok(recovered
            .map(|(host, numbered)| (host, numbered.recovered()))
            .collect())
    }
}

/// The hosts of the roster that the database knows neither by number nor by name.
fn missing(known: &[HostRow], roster: &Roster) -> Vec<(HostId, Name)> {
    let mut missing: Vec<_> = roster
        .hosts()
        .iter()
        .filter(|(id, name)| {
            known
                .iter()
                .all(|row| row.id != **id && row.hostname != name.hostname)
        })
        .map(|(id, name)| (*id, name.clone()))
        .collect();
    missing.sort_by_key(|(id, _)| *id);
    missing
}

/// The name without a port.
fn domain(name: &Name) -> &str {
    name.hostname.split(':').next().unwrap_or_default()
}

/// A host's events of the log's tail, by the host's own numbers. A host that began anew while the relay was down, and
/// is beyond the cursor already, is known by its events: they are others under the same numbers.
struct Numbered {
    cursor: Option<i64>,
    durable: BTreeMap<i64, Durable>,
    /// First log seq from which on the host's numbers are those that its cursor is of.
    since: u64,
}

impl Numbered {
    /// `replay_from` is what was written together with the row's cursor, or later.
    fn new(row: &HostRow, replay_from: u64) -> Self {
        // A cursor that was on its way when the host began anew may have been written after its new one.
        let renumbered = row
            .renumbered
            .filter(|renumbered| renumbered.log_seq >= replay_from);
        Self {
            cursor: renumbered.map_or(row.cursor, |renumbered| Some(renumbered.cursor)),
            durable: BTreeMap::new(),
            since: renumbered.map_or(0, |renumbered| renumbered.log_seq),
        }
    }

    fn note(&mut self, upstream_seq: i64, entry: &Entry, frame: &[u8]) {
        let above = self.cursor.is_none_or(|cursor| upstream_seq > cursor);
        // What the disk has lost may come once more, under a number of its own.
        if above && entry.seq >= self.since && !entry.is_lost() {
            let durable = Durable {
                log_seq: entry.seq,
                did_hash: entry.did_hash,
                mark: Durable::mark(frame),
            };
            self.durable.insert(upstream_seq, durable);
        }
        // Of so many, whatever lies before was settled.
        if self.durable.len() > SPAN
            && let Some((seq, _)) = self.durable.pop_first()
        {
            self.cursor = Some(seq);
        }
    }

    /// A host whose first cursor was not yet written goes on before its first event, not live.
    fn recovered(self) -> RecoveredHost {
        let first = self.durable.keys().next();
        let before_first = first.map(|first| first.saturating_sub(1).max(0));
        RecoveredHost {
            cursor: self.cursor.or(before_first),
            already_durable: self.durable,
        }
    }
}

/// Where to read from: not before the window. What is gone from it was never applied to the database.
fn from_the_window(log: &EventLog, from: u64) -> u64 {
    let (oldest, _) = log.window();
    if from < oldest {
        warn!(
            from,
            oldest,
            "the log no longer holds events that the database has not seen: accounts may be behind until their next event"
        );
    }
    from.max(oldest)
}

/// The local status that an `#account` event of this relay's own announces. With a `host`, the account is created where
/// it is not known.
fn own_update(entry: &Entry, frame: &[u8], host: Option<HostId>) -> Option<AccountUpdate> {
    let local = announced(entry)?;
    let Message::Account(account) = frame::decode_stored(frame).ok()?.message else {
        return None;
    };
    Some(AccountUpdate {
        local: Some(local),
        heard: host.map(|host| heard(entry, host)),
        ..AccountUpdate::new(Did::normalized(account.did).ok()?)
    })
}

fn announced(entry: &Entry) -> Option<LocalStatus> {
    match entry.origin {
        Origin::Relay { code } => LocalStatus::from_code(code),
        Origin::Host { .. } | Origin::Unknown => None,
    }
}

/// The redaction that follows from an event, to be repeated in case the crash came before it was noted: the account,
/// and up to where.
fn ended_before(entry: &Entry, frame: &[u8]) -> Option<(Did, u64)> {
    if entry.kind != Kind::Account {
        return None;
    }
    let Message::Account(account) = frame::decode_stored(frame).ok()?.message else {
        return None;
    };
    let upstream = UpstreamStatus::from_event(account.active, account.status);
    let deleted = entry.origin.host().is_some() && upstream == UpstreamStatus::Deleted;
    let ends = deleted || announced(entry) == Some(LocalStatus::TakenDown);
    let did = Did::normalized(account.did).ok()?;
    ends.then(|| (did, entry.seq.saturating_sub(1)))
}

async fn write(store: &Store, accounts: &mut Vec<AccountUpdate>) -> Result<(), StoreError> {
    let batch = Batch {
        accounts: std::mem::take(accounts),
        ..Batch::default()
    };
    store.apply(&batch).await
}

/// What an event of the log says of its account's state. Every event of the log was verified before it went there: it
/// came from the account's PDS, and a commit or `#sync` passes only while the PDS has the account active.
fn account_update(entry: &Entry, frame: &[u8], host: Option<HostId>) -> Option<AccountUpdate> {
    let message = frame::decode_stored(frame).ok()?.message;
    let (did, repo, upstream) = match message {
        Message::Commit(commit) => (
            commit.repo,
            Some(repo_state(commit.blocks)?),
            UpstreamStatus::Active,
        ),
        Message::Sync(sync) => (
            sync.did,
            Some(repo_state(sync.blocks)?),
            UpstreamStatus::Active,
        ),
        // What the relay itself says of an account is not its PDS's word.
        Message::Account(account) if host.is_some() => (
            account.did,
            None,
            UpstreamStatus::from_event(account.active, account.status),
        ),
        _ => return None,
    };
    Some(AccountUpdate {
        heard: host.map(|host| heard(entry, host)),
        counted: host.map(|_| upstream != UpstreamStatus::Deleted),
        upstream: Some(upstream),
        status_seq: Some(entry.seq),
        repo,
        ..AccountUpdate::new(Did::normalized(did).ok()?)
    })
}

fn heard(entry: &Entry, host: HostId) -> Heard {
    Heard {
        host,
        at: i64::try_from(entry.time_us / 1_000_000).unwrap_or(i64::MAX),
    }
}

fn repo_state(blocks: &[u8]) -> Option<RepoState> {
    let car = Car::parse(blocks).ok()?;
    let commit = *car.roots().first()?;
    let signed = SignedCommit::parse(car.blocks().get(&commit)?).ok()?;
    // A chain that broke here is found broken again by the next commit; recovery only carries the position.
    Some(RepoState {
        rev: Tid::parse(signed.rev).ok()?,
        data: signed.data,
        commit,
        desynchronized: false,
    })
}
