//! The epoch of a PostgreSQL database: which relay took it last. A relay that another one followed writes nothing more.

use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};

use sqlx::PgConnection;
use tokio::sync::Notify;

/// Which relay, of all that took a database one after the other, this one is. Clones are the same.
#[derive(Clone, Default)]
pub(super) struct Epoch(Arc<Inner>);

#[derive(Default)]
struct Inner {
    /// 0 where this process does not hold the database: a tool beside a relay.
    number: AtomicI64,
    lost: Notify,
}

impl Epoch {
    /// Whether a transaction may write: this relay is still the last one that took the database. It stays so until the
    /// transaction ends.
    pub async fn check(&self, connection: &mut PgConnection) -> Result<bool, sqlx::Error> {
        let number = self.number();
        if number == 0 {
            return Ok(true);
        }
        let ours: Option<(i64,)> =
            sqlx::query_as("SELECT epoch FROM relay_epoch WHERE epoch = $1 FOR SHARE")
                .bind(number)
                .fetch_optional(connection)
                .await?;
        Ok(ours.is_some())
    }

    /// Tells the hold that the database is another relay's.
    pub fn lose(&self) {
        self.0.lost.notify_one();
    }

    /// Resolves when the database is another relay's.
    pub async fn lost(&self) {
        self.0.lost.notified().await;
    }

    fn number(&self) -> i64 {
        self.0.number.load(Ordering::Acquire)
    }

    /// Begins the next epoch.
    pub async fn begin(&self, connection: &mut PgConnection) -> Result<(), sqlx::Error> {
        let (number,) = sqlx::query_as("UPDATE relay_epoch SET epoch = epoch + 1 RETURNING epoch")
            .fetch_one(connection)
            .await?;
        self.0.number.store(number, Ordering::Release);
        Ok(())
    }
}
