//! After a crash: what the log holds and SQL does not yet know.
//!
//! The log is the truth. Its tail, from the position up to which SQL surely has everything, is applied once more
//! (applying twice changes nothing), and tells which events above a host's cursor are durable already.

use std::collections::HashMap;

use tracing::{info, warn};

use crate::atproto::car::Car;
use crate::atproto::commit::SignedCommit;
use crate::atproto::did::Did;
use crate::atproto::frame::{self, Kind, Message};
use crate::atproto::tid::Tid;
use crate::eventlog::{Entry, EventLog, LogError, ReadError, UNKNOWN_HOST};
use crate::store::{
    AccountUpdate, Batch, HostId, LocalStatus, RepoState, Store, StoreError, UpstreamStatus,
};
use crate::upstream::RecoveredHost;
use crate::verify::LOCAL_STATUS_BASE;

/// Account changes written in one transaction.
const BATCH: usize = 1_000;

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
    /// The database is ahead of the log: the log's folder was lost or replaced.
    #[error(
        "the database has seen events up to seq {database}, the event log in {folder} ends at {log}: the log's folder \
         was lost or belongs to another database. Bring back the folder, or start with a new database"
    )]
    LogBehindDatabase {
        database: u64,
        log: u64,
        folder: String,
    },
}

/// Applies the log's tail to the database. Returns, for every host, its cursor and the events above it that are durable.
pub async fn replay(
    log: &EventLog,
    store: &Store,
) -> Result<HashMap<HostId, RecoveredHost>, RecoveryError> {
    let mut hosts: HashMap<HostId, RecoveredHost> = store
        .hosts()
        .await?
        .into_iter()
        .map(|row| {
            (
                row.id,
                RecoveredHost {
                    cursor: row.cursor,
                    ..RecoveredHost::default()
                },
            )
        })
        .collect();
    let from = store.replay_from().await?;
    if from > log.head() + 1 {
        let folder = log.options().dir.display().to_string();
        return Err(RecoveryError::LogBehindDatabase {
            database: from - 1,
            log: log.head(),
            folder,
        });
    }
    let from = from_the_window(log, from);
    let mut accounts = Vec::with_capacity(BATCH);
    let mut count = 0_u64;
    for entry in log.entries(from).and_redacted() {
        let (entry, frame) = entry?;
        count += 1;
        // Without a host: an event of the relay's own, one whose index entry was rebuilt from its frame, or one of a
        // host that a database now gone knew under a number which this one gives to another.
        let host = Some(HostId(entry.host)).filter(|host| hosts.contains_key(host));
        if let Some(recovered) = host.and_then(|host| hosts.get_mut(&host))
            && recovered
                .cursor
                .is_none_or(|cursor| entry.upstream_seq > cursor)
        {
            recovered
                .already_durable
                .insert(entry.upstream_seq, entry.seq);
        }
        accounts.extend(account_update(&frame, host));
        accounts.extend(own_update(&entry, &frame));
        redact_again(log, &entry, &frame)?;
        if accounts.len() >= BATCH {
            write(store, &mut accounts).await?;
        }
    }
    write(store, &mut accounts).await?;
    for recovered in hosts.values_mut() {
        resume_new_host(recovered);
    }
    if count > 0 {
        info!(
            from,
            events = count,
            "applied the tail of the event log to the database"
        );
    }
    Ok(hosts)
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

/// A host whose first cursor was not yet written goes on before its first event, not live.
fn resume_new_host(recovered: &mut RecoveredHost) {
    let first = recovered.already_durable.keys().next();
    if let (None, Some(first)) = (recovered.cursor, first) {
        recovered.cursor = Some(first.saturating_sub(1).max(0));
    }
}

/// The local status that an `#account` event of this relay's own announces.
fn own_update(entry: &Entry, frame: &[u8]) -> Option<AccountUpdate> {
    let local = announced(entry)?;
    let Message::Account(account) = frame::decode(frame).ok()?.message else {
        return None;
    };
    Some(AccountUpdate {
        local: Some(local),
        ..AccountUpdate::new(Did::normalized(account.did).ok()?)
    })
}

fn announced(entry: &Entry) -> Option<LocalStatus> {
    let ours = entry.host == UNKNOWN_HOST && entry.kind == Kind::Account;
    let code = u8::try_from(entry.upstream_seq.checked_sub(LOCAL_STATUS_BASE)?).ok()?;
    LocalStatus::from_code(code).filter(|_| ours)
}

/// Repeats the redaction that follows from an event, in case the crash came before it was noted.
fn redact_again(log: &EventLog, entry: &Entry, frame: &[u8]) -> Result<(), RecoveryError> {
    if entry.kind != Kind::Account {
        return Ok(());
    }
    let Ok(Message::Account(account)) = frame::decode(frame).map(|frame| frame.message) else {
        return Ok(());
    };
    let upstream = UpstreamStatus::from_event(account.active, account.status);
    let deleted = entry.host != UNKNOWN_HOST && upstream == UpstreamStatus::Deleted;
    if (deleted || announced(entry) == Some(LocalStatus::TakenDown))
        && let Ok(did) = Did::normalized(account.did)
    {
        log.redact(&did, entry.seq.saturating_sub(1))?;
    }
    Ok(())
}

async fn write(store: &Store, accounts: &mut Vec<AccountUpdate>) -> Result<(), StoreError> {
    let batch = Batch {
        accounts: std::mem::take(accounts),
        ..Batch::default()
    };
    store.apply(&batch).await
}

/// What an event of the log says of its account's state. Every event of the log was verified before it went there.
fn account_update(frame: &[u8], host: Option<HostId>) -> Option<AccountUpdate> {
    let message = frame::decode(frame).ok()?.message;
    let update = |did: &str| {
        Did::normalized(did).ok().map(|did| AccountUpdate {
            host,
            ..AccountUpdate::new(did)
        })
    };
    match message {
        Message::Commit(commit) => Some(AccountUpdate {
            repo: Some(repo_state(commit.blocks)?),
            ..update(commit.repo)?
        }),
        Message::Sync(sync) => Some(AccountUpdate {
            repo: Some(repo_state(sync.blocks)?),
            ..update(sync.did)?
        }),
        // What the relay itself says of an account is not its PDS's word.
        Message::Account(account) if host.is_some() => {
            let upstream = UpstreamStatus::from_event(account.active, account.status);
            Some(AccountUpdate {
                upstream: Some(upstream),
                ..update(account.did)?
            })
        }
        _ => None,
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
