//! Hosts and banned domains: every change here is an operator's or the supervisor's, and is on disk
//! when the call returns. Cursors and counts are not set here but by batches.

use super::accounts::{RELEASE_OLDEST, released_dids};
use super::database::{Commit, reading, writing};
use super::error::{Doing, StoreError};
use super::record::record;
use super::rows::{HostId, HostRow, NewHost, RateOverrides, Renumbered};
use super::status::HostStatus;
use super::validation::Validation;
use super::{Store, unix_now};
use crate::atproto::did::Did;
use sqlx::postgres::PgConnection;
use sqlx::sqlite::SqliteConnection;

record! {
    struct HostRecord {
        id: i32,
        hostname: String,
        tls: bool,
        status: String,
        last_seq: Option<i64>,
        renumbered_cursor: Option<i64>,
        renumbered_from: Option<i64>,
        account_limit: i64,
        account_count: i64,
        trusted: bool,
        validation: Option<String>,
        sync11: bool,
        max_per_second: Option<i64>,
        max_per_hour: Option<i64>,
        max_per_day: Option<i64>,
        max_bytes_per_hour: Option<i64>,
        created_at: i64,
    }
}

impl HostRecord {
    fn into_row(self) -> Result<HostRow, StoreError> {
        let corrupt = |what: String| StoreError::Corrupt {
            table: "hosts",
            what,
        };
        let rate = |value: Option<i64>| {
            value
                .map(|n| u32::try_from(n).map_err(|_| corrupt(format!("the event rate {n}"))))
                .transpose()
        };
        Ok(HostRow {
            id: HostId(
                u32::try_from(self.id)
                    .map_err(|_| corrupt(format!("the host number {}", self.id)))?,
            ),
            status: HostStatus::from_stored(&self.status)
                .ok_or_else(|| corrupt(format!("the host status {:?}", self.status)))?,
            validation: self
                .validation
                .map(|text| {
                    Validation::parse(&text)
                        .ok_or_else(|| corrupt(format!("the validation mode {text:?}")))
                })
                .transpose()?,
            rates: RateOverrides {
                per_second: rate(self.max_per_second)?,
                per_hour: rate(self.max_per_hour)?,
                per_day: rate(self.max_per_day)?,
                bytes_per_hour: self
                    .max_bytes_per_hour
                    .map(|n| u64::try_from(n).map_err(|_| corrupt(format!("the byte rate {n}"))))
                    .transpose()?,
            },
            hostname: self.hostname,
            tls: self.tls,
            cursor: self.last_seq,
            renumbered: self.renumbered_cursor.zip(self.renumbered_from).map(
                |(cursor, log_seq)| Renumbered {
                    cursor,
                    log_seq: log_seq.unsigned_abs(),
                },
            ),
            account_limit: self.account_limit,
            account_count: self.account_count,
            trusted: self.trusted,
            sync11: self.sync11,
            created_at: self.created_at,
        })
    }
}

/// Runs one statement, for what only the database knows. Returns how many rows it changed.
macro_rules! change {
    ($store:ident, $doing:literal, $sql:literal, $($value:expr),+ $(,)?) => {
        writing!($store, Commit::Synced, $doing, conn => {
            sqlx::query($sql)
                $(.bind($value))+
                .execute(&mut *conn)
                .await
                .map(|done| done.rows_affected())
                .doing($doing)
        })
    };
}

/// Releases the throttled accounts that the limit leaves room for, in the open transaction.
macro_rules! release_to_limit {
    ($conn:ident, $id:ident, $limit:ident, $accounts:ident) => {{
        let accounts: i64 = $accounts;
        let (throttled,): (i64,) = sqlx::query_as(
            "SELECT COUNT(*) FROM accounts WHERE host_id = $1 AND local_status = 2 AND counted",
        )
        .bind($id.to_sql())
        .fetch_one(&mut *$conn)
        .await
        .doing("counting throttled accounts")?;
        let room = $limit.saturating_sub(accounts - throttled).max(0);
        sqlx::query_as(RELEASE_OLDEST)
            .bind($id.to_sql())
            .bind(room)
            .fetch_all(&mut *$conn)
            .await
    }};
}

/// Inserting a row with a given number: PostgreSQL needs an override, and its sequence moved above the number; SQLite needs
/// neither.
trait InsertNumbered {
    async fn insert_numbered(
        &mut self,
        id: i32,
        host: &NewHost,
        now: i64,
    ) -> Result<(), sqlx::Error>;
}

/// Inserts the row; `$overriding` is the override clause of the database.
macro_rules! insert_with_id {
    ($conn:ident, $overriding:literal, $id:ident, $host:ident, $now:ident) => {
        sqlx::query(concat!(
            "INSERT INTO hosts (id, hostname, tls, trusted, account_limit, created_at) ",
            $overriding,
            "VALUES ($1, $2, $3, $4, $5, $6)"
        ))
        .bind($id)
        .bind(&$host.hostname)
        .bind($host.tls)
        .bind($host.trusted)
        .bind($host.account_limit)
        .bind($now)
        .execute(&mut *$conn)
        .await
    };
}

impl InsertNumbered for PgConnection {
    async fn insert_numbered(
        &mut self,
        id: i32,
        host: &NewHost,
        now: i64,
    ) -> Result<(), sqlx::Error> {
        insert_with_id!(self, "OVERRIDING SYSTEM VALUE ", id, host, now)?;
        sqlx::query(
            "SELECT setval(pg_get_serial_sequence('hosts', 'id'), (SELECT max(id) FROM hosts))",
        )
        .execute(&mut *self)
        .await
        .map(drop)
    }
}

impl InsertNumbered for SqliteConnection {
    async fn insert_numbered(
        &mut self,
        id: i32,
        host: &NewHost,
        now: i64,
    ) -> Result<(), sqlx::Error> {
        insert_with_id!(self, "", id, host, now).map(drop)
    }
}

impl Store {
    /// Adds a host, or finds the one of that name, which stays as it is.
    pub async fn add_host(&self, host: &NewHost) -> Result<HostRow, StoreError> {
        const DOING: &str = "adding a host";
        let record: HostRecord = writing!(self, Commit::Synced, DOING, conn => {
            sqlx::query(
                "INSERT INTO hosts (hostname, tls, trusted, account_limit, created_at) VALUES ($1, $2, $3, $4, $5) \
                 ON CONFLICT (hostname) DO NOTHING",
            )
            .bind(&host.hostname)
            .bind(host.tls)
            .bind(host.trusted)
            .bind(host.account_limit)
            .bind(unix_now())
            .execute(&mut *conn)
            .await
            .doing(DOING)?;
            sqlx::query_as("SELECT * FROM hosts WHERE hostname = $1")
                .bind(&host.hostname)
                .fetch_one(&mut *conn)
                .await
                .doing(DOING)
        })?;
        record.into_row()
    }

    /// Adds a host under the number that the log has for it: the database that gave it out is lost, or was older.
    /// Neither the number nor the name may be known.
    pub async fn restore_host(&self, id: HostId, host: &NewHost) -> Result<(), StoreError> {
        const DOING: &str = "restoring a host";
        writing!(self, Commit::Synced, DOING, conn => {
            conn.insert_numbered(id.to_sql(), host, unix_now()).await.doing(DOING)
        })
    }

    /// The host of that number.
    pub async fn host(&self, id: HostId) -> Result<Option<HostRow>, StoreError> {
        let record: Option<HostRecord> = reading!(self, "reading a host", pool => {
            sqlx::query_as("SELECT * FROM hosts WHERE id = $1").bind(id.to_sql()).fetch_optional(pool).await
        })?;
        record.map(HostRecord::into_row).transpose()
    }

    /// The host of that name (`host` or `host:port`, lower case).
    pub async fn host_by_name(&self, hostname: &str) -> Result<Option<HostRow>, StoreError> {
        let record: Option<HostRecord> = reading!(self, "reading a host", pool => {
            sqlx::query_as("SELECT * FROM hosts WHERE hostname = $1").bind(hostname).fetch_optional(pool).await
        })?;
        record.map(HostRecord::into_row).transpose()
    }

    /// All hosts, the oldest first.
    pub async fn hosts(&self) -> Result<Vec<HostRow>, StoreError> {
        self.list_hosts(None, u32::MAX).await
    }

    /// Up to `limit` hosts after the given one, the oldest first.
    pub async fn list_hosts(
        &self,
        after: Option<HostId>,
        limit: u32,
    ) -> Result<Vec<HostRow>, StoreError> {
        let records: Vec<HostRecord> = reading!(self, "listing hosts", pool => {
            sqlx::query_as("SELECT * FROM hosts WHERE id > $1 ORDER BY id LIMIT $2")
                .bind(after.map_or(0, HostId::to_sql))
                .bind(i64::from(limit))
                .fetch_all(pool)
                .await
        })?;
        records.into_iter().map(HostRecord::into_row).collect()
    }

    /// Sets how the relay stands to a host; [`HostStatus::Banned`] bans it, any other lifts the ban.
    pub async fn set_host_status(&self, id: HostId, status: HostStatus) -> Result<(), StoreError> {
        let changed = change!(
            self,
            "setting a host's status",
            "UPDATE hosts SET status = $2 WHERE id = $1",
            id.to_sql(),
            status.as_str(),
        )?;
        known_host(id, changed)
    }

    /// Sets the event rates of a host; `None` puts it under the general rule again.
    pub async fn set_host_rates(&self, id: HostId, rates: RateOverrides) -> Result<(), StoreError> {
        let changed = change!(
            self,
            "setting a host's event rates",
            "UPDATE hosts SET max_per_second = $2, max_per_hour = $3, max_per_day = $4, max_bytes_per_hour = $5 \
             WHERE id = $1",
            id.to_sql(),
            rates.per_second.map(i64::from),
            rates.per_hour.map(i64::from),
            rates.per_day.map(i64::from),
            rates
                .bytes_per_hour
                .map(|bytes| i64::try_from(bytes).unwrap_or(i64::MAX)),
        )?;
        known_host(id, changed)
    }

    /// Sets the validation mode of a host; `None` puts it under the general one again.
    pub async fn set_host_validation(
        &self,
        id: HostId,
        mode: Option<Validation>,
    ) -> Result<(), StoreError> {
        let changed = change!(
            self,
            "setting a host's validation mode",
            "UPDATE hosts SET validation = $2 WHERE id = $1",
            id.to_sql(),
            mode.map(Validation::as_str),
        )?;
        known_host(id, changed)
    }

    /// Sets the cursor of a host that numbers its events anew; `log_seq` is the first that they may get in the log.
    pub async fn renumber_host(
        &self,
        id: HostId,
        cursor: i64,
        log_seq: u64,
    ) -> Result<(), StoreError> {
        let changed = change!(
            self,
            "setting the cursor of a host that numbers its events anew",
            "UPDATE hosts SET last_seq = $2, renumbered_cursor = $2, renumbered_from = $3 WHERE id = $1",
            id.to_sql(),
            cursor,
            // Sequence numbers stay below 2^53.
            log_seq as i64,
        )?;
        known_host(id, changed)
    }

    /// Notes that a host sent a sync 1.1 commit. There is no way back.
    pub async fn mark_sync11(&self, id: HostId) -> Result<(), StoreError> {
        let changed = change!(
            self,
            "marking a host as sync 1.1",
            "UPDATE hosts SET sync11 = TRUE WHERE id = $1",
            id.to_sql(),
        )?;
        known_host(id, changed)
    }

    /// Sets the account quota of a host, and releases as many of its throttled accounts as now have
    /// room, the oldest first. Returns the released ones. A lowered quota throttles nobody.
    pub async fn set_account_limit(&self, id: HostId, limit: i64) -> Result<Vec<Did>, StoreError> {
        const DOING: &str = "setting a host's account limit";
        let released: Option<Vec<(i64, String)>> = writing!(self, Commit::Synced, DOING, conn => {
            match sqlx::query_as("UPDATE hosts SET account_limit = $2 WHERE id = $1 RETURNING account_count")
                .bind(id.to_sql())
                .bind(limit)
                .fetch_optional(&mut *conn)
                .await
                .doing(DOING)?
            {
                None => Ok(None),
                Some((accounts,)) => release_to_limit!(conn, id, limit, accounts).map(Some).doing(DOING),
            }
        })?;
        released_dids(released.ok_or_else(|| StoreError::UnknownHost(id.to_string()))?)
    }

    /// Accounts that count against its quota, throttled ones included; 0 for an unknown host.
    pub async fn count_accounts(&self, id: HostId) -> Result<i64, StoreError> {
        Ok(self.host(id).await?.map_or(0, |host| host.account_count))
    }

    /// Bans a domain and all below it. Returns whether it was not banned before.
    pub async fn ban_domain(&self, domain: &str) -> Result<bool, StoreError> {
        let changed = change!(
            self,
            "banning a domain",
            "INSERT INTO domain_bans (domain, created_at) VALUES ($1, $2) ON CONFLICT (domain) DO NOTHING",
            domain.to_ascii_lowercase(),
            unix_now(),
        )?;
        Ok(changed > 0)
    }

    /// Lifts the ban of a domain. Returns whether there was one.
    pub async fn unban_domain(&self, domain: &str) -> Result<bool, StoreError> {
        let changed = change!(
            self,
            "lifting the ban of a domain",
            "DELETE FROM domain_bans WHERE domain = $1",
            domain.to_ascii_lowercase(),
        )?;
        Ok(changed > 0)
    }

    /// The banned domains, in alphabetical order.
    pub async fn domain_bans(&self) -> Result<Vec<String>, StoreError> {
        let mut rows: Vec<(String,)> = reading!(self, "listing banned domains", pool => {
            sqlx::query_as("SELECT domain FROM domain_bans").fetch_all(pool).await
        })?;
        rows.sort();
        Ok(rows.into_iter().map(|(domain,)| domain).collect())
    }
}

fn known_host(id: HostId, changed: u64) -> Result<(), StoreError> {
    if changed == 0 {
        return Err(StoreError::UnknownHost(id.to_string()));
    }
    Ok(())
}
