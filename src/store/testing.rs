//! Operations that only tests need. The relay decides about accounts in their shards, and no decision goes past those.

use std::collections::HashMap;

use super::accounts::{AccountRecord, RELEASE_OLDEST, released_dids};
use super::database::{Commit, reading, writing};
use super::error::{Doing, StoreError};
use super::rows::{AccountRow, AccountUpdate, Batch, HostId};
use super::status::LocalStatus;
use super::{Store, Writer};
use crate::atproto::did::Did;

impl Store {
    /// Creates accounts (every update needs a host), and returns them as they then are: throttled
    /// where their host is over its quota, unchanged in that where they were known already.
    pub async fn create_accounts(
        &self,
        accounts: Vec<AccountUpdate>,
    ) -> Result<HashMap<Did, AccountRow>, StoreError> {
        let dids: Vec<Did> = accounts.iter().map(|update| update.did.clone()).collect();
        self.apply(&Batch {
            accounts,
            ..Batch::default()
        })
        .await?;
        self.accounts(&dids).await
    }

    /// Up to `limit` accounts of a host that are over its quota, the oldest first.
    pub async fn throttled_accounts(
        &self,
        host: HostId,
        limit: u32,
    ) -> Result<Vec<AccountRow>, StoreError> {
        let records: Vec<AccountRecord> = reading!(self, "listing throttled accounts", pool => {
            sqlx::query_as("SELECT * FROM accounts WHERE host_id = $1 AND local_status = 2 ORDER BY uid LIMIT $2")
                .bind(host.to_sql())
                .bind(i64::from(limit))
                .fetch_all(pool)
                .await
        })?;
        records.into_iter().map(AccountRecord::into_row).collect()
    }

    /// Sets this relay's decision about an account, and returns the account as it then is.
    pub async fn set_local_status(
        &self,
        did: &Did,
        status: LocalStatus,
    ) -> Result<AccountRow, StoreError> {
        const DOING: &str = "setting an account's status";
        let record: Option<AccountRecord> = writing!(self, Commit::Synced, DOING, conn => {
            sqlx::query_as("UPDATE accounts SET local_status = $2 WHERE did = $1 RETURNING *")
                .bind(did.as_str())
                .bind(i16::from(status.code()))
                .fetch_optional(&mut *conn)
                .await
                .doing(DOING)
        })?;
        record
            .ok_or_else(|| StoreError::UnknownAccount(did.to_string()))?
            .into_row()
    }

    /// Lets up to `n` throttled accounts of a host go, the oldest first, and returns them.
    pub async fn release_throttled(&self, host: HostId, n: u32) -> Result<Vec<Did>, StoreError> {
        const DOING: &str = "releasing throttled accounts";
        let released = writing!(self, Commit::Synced, DOING, conn => {
            sqlx::query_as(RELEASE_OLDEST)
                .bind(host.to_sql())
                .bind(i64::from(n))
                .fetch_all(&mut *conn)
                .await
                .doing(DOING)
        })?;
        released_dids(released)
    }
}

impl Writer {
    /// Waits until everything that was sent before is in the database.
    pub async fn flush(&self) -> Result<(), StoreError> {
        self.settle(None).await
    }
}
