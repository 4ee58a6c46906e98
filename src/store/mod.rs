//! Hosts, accounts and bans in SQL, PostgreSQL or SQLite alike: a view of the log, and the operator's
//! decisions. It promises that a batch is written wholly or not at all, and that batches may be
//! replayed. It decides nothing about events.

mod accounts;
mod apply;
mod coalesce;
mod database;
mod error;
mod hold;
mod hosts;
mod rows;
mod status;
mod writer;

pub use error::StoreError;
pub use hold::Hold;
pub use rows::{
    AccountRow, AccountUpdate, Batch, DEFAULT_ACCOUNT_LIMIT, Heard, HostId, HostRow, KnownKey,
    NewHost, RateOverrides, Renumbered, RepoState, TRUSTED_ACCOUNT_LIMIT,
};
pub use status::{HostStatus, LocalStatus, MAX_STATUS_BYTES, UpstreamStatus, combined_status};
pub use writer::{FLUSH_INTERVAL, FLUSH_ROWS, Writer};

use std::sync::Arc;

use crate::clock;

use database::{Database, reading};
use error::Doing;

/// The database. Clones share its connections.
#[derive(Clone)]
pub struct Store {
    database: Arc<Database>,
}

impl Store {
    /// Opens `sqlite:PATH` (created for this user alone if it is not there) or
    /// `postgres://user:password@host/database`, and brings the schema up to date.
    ///
    /// # Errors
    /// Each way to fail has its variant, in words for the operator; none shows the password.
    pub async fn open(url: &str) -> Result<Self, StoreError> {
        Ok(Self {
            database: Arc::new(Database::open(url).await?),
        })
    }

    /// Whether the database answers.
    pub async fn check(&self) -> Result<(), StoreError> {
        reading!(self, pool => sqlx::query("SELECT 1").execute(pool).await.map(drop))
            .doing("asking whether it is there")
    }

    /// Closes all connections; running statements end first.
    pub async fn close(&self) {
        self.database.close().await;
    }
}

fn unix_now() -> i64 {
    i64::try_from(clock::system().as_secs()).unwrap_or(i64::MAX)
}
