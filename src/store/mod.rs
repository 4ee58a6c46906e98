//! Hosts, accounts and bans in SQL, PostgreSQL or SQLite alike: a view of the log, and the operator's
//! decisions. It promises that a batch is written wholly or not at all, and that batches may be
//! replayed. It decides nothing about events.

mod accounts;
mod apply;
mod coalesce;
mod database;
mod epoch;
mod error;
mod hold;
mod hosts;
mod metrics;
mod outage;
mod recent;
mod record;
mod rows;
mod schema;
mod status;
#[cfg(feature = "devnet")]
mod testing;
mod validation;
mod writer;

pub use apply::ACCOUNTS_VIEW;
pub use database::MIN_CONNECTIONS;
pub use error::StoreError;
pub use hold::Hold;
pub use metrics::Metrics;
pub use rows::{
    AccountRow, AccountUpdate, Batch, DEFAULT_ACCOUNT_LIMIT, Heard, HostId, HostRow, KnownKey,
    NewHost, Page, RateOverrides, Renumbered, RepoState, TRUSTED_ACCOUNT_LIMIT,
};
pub use status::{HostStatus, LocalStatus, MAX_STATUS_BYTES, UpstreamStatus, combined_status};
pub use validation::Validation;
pub use writer::{FLUSH_INTERVAL, FLUSH_ROWS, Writer};

use std::sync::Arc;
use std::time::Duration;

use tokio::time::timeout;

use crate::clock;

use database::{Database, Reader, reading};
use outage::{Outage, may_be_away};
use recent::Recent;

/// Connections of a tool beside a relay.
const TOOL_CONNECTIONS: u32 = 8;

/// How long the database may take to answer a question without work.
const CHECK_PATIENCE: Duration = Duration::from_secs(2);

/// The database. Clones share its connections.
#[derive(Clone)]
pub struct Store {
    database: Arc<Database>,
    reader: Reader,
    recent: Recent,
    outage: Arc<Outage>,
    metrics: Metrics,
}

impl Store {
    /// Opens `sqlite:PATH` (created for this user alone if it is not there) or
    /// `postgres://user:password@host/database`, and brings the schema up to date.
    ///
    /// # Errors
    /// Each way to fail has its variant, in words for the operator; none shows the password.
    pub async fn open(url: &str) -> Result<Self, StoreError> {
        Self::open_with(url, TOOL_CONNECTIONS, Metrics::default()).await
    }

    /// As [`Store::open`], with so many connections at most (and five at least): three to write, to hold
    /// the database and to look at the server, the others to read, half of them for public reads.
    ///
    /// # Errors
    /// As [`Store::open`].
    pub async fn open_with(
        url: &str,
        connections: u32,
        metrics: Metrics,
    ) -> Result<Self, StoreError> {
        Ok(Self {
            database: Arc::new(Database::open(url, connections).await?),
            reader: Reader::Relay,
            recent: Recent::default(),
            outage: Arc::default(),
            metrics,
        })
    }

    /// The same database for public reads: they have connections of their own.
    pub fn public(&self) -> Self {
        Self {
            reader: Reader::Public,
            ..self.clone()
        }
    }

    /// Whether the database answers.
    pub async fn check(&self) -> Result<(), StoreError> {
        const DOING: &str = "asking whether it is there";
        if let Some(cause) = self.outage.known_cause(&self.database).await {
            return Err(cause);
        }
        let asked = async {
            reading!(self, DOING, pool => sqlx::query("SELECT 1").execute(pool).await.map(drop))
        };
        match timeout(CHECK_PATIENCE, asked).await {
            Ok(answer) => answer,
            Err(_) => self.answered(DOING, Err(sqlx::Error::PoolTimedOut)).await,
        }
    }

    /// Logs that something failed and is tried again: at most one line in 30 seconds, whatever failed.
    pub fn complain(&self, what: &str, error: &StoreError) {
        self.outage.complain(what, error);
    }

    /// The outcome of a query, with the true reason if the database is unreachable.
    async fn answered<T>(
        &self,
        doing: &'static str,
        outcome: Result<T, sqlx::Error>,
    ) -> Result<T, StoreError> {
        let source = match outcome {
            Ok(answer) => {
                self.outage.end();
                return Ok(answer);
            }
            Err(source) => source,
        };
        if may_be_away(&source)
            && let Some(cause) = self.outage.cause(&self.database).await
        {
            self.outage.begin(&cause, self.metrics.queue.get());
            return Err(cause);
        }
        if self.reader == Reader::Public && matches!(source, sqlx::Error::PoolTimedOut) {
            self.metrics.reads_refused.inc();
            return Err(StoreError::Busy);
        }
        Err(StoreError::Query { doing, source })
    }

    /// Another relay has the database: this relay's hold ends.
    fn taken_over(&self) -> StoreError {
        if let Database::Postgres(db) = &*self.database {
            db.epoch.lose();
        }
        StoreError::TakenOver {
            database: self.database.name().to_owned(),
        }
    }

    /// Closes all connections; running statements end first.
    pub async fn close(&self) {
        self.database.close().await;
    }
}

fn unix_now() -> i64 {
    i64::try_from(clock::system().as_secs()).unwrap_or(i64::MAX)
}
