//! The log and the database compared at a start: the log gives out only numbers that were never given out, as far as the
//! database knows. What the database misses is applied by [`crate::views::accounts`].

use tracing::error;

use crate::eventlog::{EventLog, LogError};
use crate::store::{Store, StoreError};
use crate::views::accounts::ReplayError;

/// Numbers left out where the log has lost events that the database had counted: so far ahead of the database may the
/// log have been. More than it takes up while the database is away for a minute, and few enough to hold their places.
const UNSEEN: u64 = 1 << 19;

/// Why recovery failed.
#[derive(Debug, thiserror::Error)]
pub enum RecoveryError {
    /// The database.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The log's folder.
    #[error(transparent)]
    Folder(#[from] LogError),
    /// The log's tail.
    #[error(transparent)]
    Replay(#[from] ReplayError),
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
