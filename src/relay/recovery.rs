//! After a crash: what the log holds and SQL does not yet know.
//!
//! The log is the truth. Its tail, from the position up to which SQL surely has everything, is applied once more
//! (applying twice changes nothing), and tells which events above a host's cursor are durable already.

use std::collections::HashMap;

use tracing::info;

use crate::atproto::car::Car;
use crate::atproto::commit::SignedCommit;
use crate::atproto::did::Did;
use crate::atproto::frame::{self, Message};
use crate::atproto::tid::Tid;
use crate::eventlog::{EventLog, ReadError, UNKNOWN_HOST};
use crate::store::{AccountUpdate, Batch, HostId, RepoState, Store, StoreError, UpstreamStatus};
use crate::upstream::RecoveredHost;

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
    let from = from.max(log.oldest().unwrap_or(1));
    let mut accounts = Vec::with_capacity(BATCH);
    let mut count = 0_u64;
    for entry in log.entries(from) {
        let (entry, frame) = entry?;
        count += 1;
        // Without a host: an event of the relay's own, or one whose index entry was rebuilt from its frame.
        let host = (entry.host != UNKNOWN_HOST).then_some(HostId(entry.host));
        if let Some(host) = host {
            let recovered = hosts.entry(host).or_default();
            if recovered
                .cursor
                .is_none_or(|cursor| entry.upstream_seq > cursor)
            {
                recovered
                    .already_durable
                    .insert(entry.upstream_seq, entry.seq);
            }
        }
        accounts.extend(account_update(&frame, host));
        if accounts.len() >= BATCH {
            write(store, &mut accounts).await?;
        }
    }
    write(store, &mut accounts).await?;
    if count > 0 {
        info!(
            from,
            events = count,
            "applied the tail of the event log to the database"
        );
    }
    Ok(hosts)
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
