//! An unreachable database: finds the cause that the pools hide, and logs it at most once in 30 seconds, however many
//! operations fail. The outage itself is a problem of the relay's health, and is reported there.

use parking_lot::Mutex;

use super::database::Database;
use super::error::StoreError;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;
use tokio::time::Instant;

/// How often a database that stays unreachable, or a statement that keeps failing, is logged.
const COMPLAIN_EVERY: Duration = Duration::from_secs(30);

/// How long a cause that was found counts: many ask for it at once.
const CAUSE_HOLDS: Duration = Duration::from_secs(1);

/// What is known of the database's absence.
#[derive(Default)]
pub(super) struct Outage {
    away: AtomicBool,
    /// When a line was last written, or the outage began.
    told: Mutex<Option<Instant>>,
    /// The last probe of the server, and why it failed, if it did.
    looked: tokio::sync::Mutex<Option<(Instant, Option<String>)>>,
}

impl Outage {
    /// Why the database is unreachable; `None` if it is reachable, and the failure has another reason.
    pub async fn cause(&self, database: &Database) -> Option<StoreError> {
        let mut looked = self.looked.lock().await;
        let known = looked
            .as_ref()
            .filter(|(at, _)| at.elapsed() < CAUSE_HOLDS)
            .map(|(_, reason)| reason.clone());
        let reason = match known {
            Some(reason) => reason,
            None => {
                let reason = database.reason_of_absence().await;
                *looked = Some((Instant::now(), reason.clone()));
                reason
            }
        };
        reason.map(|reason| StoreError::Unreachable {
            database: database.name().to_owned(),
            reason,
        })
    }

    /// The same, without a probe if the database is not known to be unreachable.
    pub async fn known_cause(&self, database: &Database) -> Option<StoreError> {
        if !self.away.load(Ordering::Acquire) {
            return None;
        }
        self.cause(database).await
    }

    /// Records that the database is unreachable while this many changes wait for it, and logs it if the interval is over.
    pub fn begin(&self, cause: &StoreError, changes: i64) {
        let begins = !self.away.swap(true, Ordering::AcqRel);
        let due = self.is_due();
        if due && !begins {
            tracing::error!(
                changes,
                "the database is still away; changes and unknown accounts wait: {cause}"
            );
        }
    }

    /// Notes that the database answered.
    pub fn end(&self) {
        if self.away.load(Ordering::Relaxed) {
            self.away.store(false, Ordering::Release);
        }
    }

    /// Logs that something failed and is tried again; not if the database is unreachable, or a line was logged a moment
    /// ago.
    pub fn complain(&self, what: &str, error: &StoreError) {
        if matches!(error, StoreError::Unreachable { .. }) {
            tracing::debug!(%error, "{what}");
        } else if self.is_due() {
            tracing::error!(%error, "{what}");
        }
    }

    /// Whether the last line was long ago; then the next one is being written.
    fn is_due(&self) -> bool {
        let mut told = self.told.lock();
        let due = told.is_none_or(|last| last.elapsed() >= COMPLAIN_EVERY);
        if due {
            *told = Some(Instant::now());
        }
        due
    }
}

/// Whether an error may mean that the database is unreachable.
pub(super) fn may_be_away(error: &sqlx::Error) -> bool {
    match error {
        sqlx::Error::Io(_)
        | sqlx::Error::Tls(_)
        | sqlx::Error::PoolTimedOut
        | sqlx::Error::WorkerCrashed => true,
        // PostgreSQL: connection exceptions, and operator intervention (shutdown, crash, start).
        sqlx::Error::Database(error) => error
            .code()
            .is_some_and(|code| code.starts_with("08") || code.starts_with("57P")),
        _ => false,
    }
}
