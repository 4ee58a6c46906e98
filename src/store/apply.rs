//! Writing a batch: one transaction, a few statements whatever its size. Applying the same batch
//! twice, or older batches over newer state and then the newer ones again, ends in the same state,
//! which is what a replay of the log needs.

use super::Store;
use super::accounts::json_list;
use super::coalesce::Coalesced;
use super::database::{Durability, writing};
use super::error::{Doing, StoreError};
use super::rows::{AccountRow, AccountUpdate, Batch, HostId};
use super::status::LocalStatus;
use crate::atproto::did::Did;
use sqlx::postgres::PgConnection;
use sqlx::sqlite::SqliteConnection;
use sqlx::{AssertSqlSafe, QueryBuilder, Sqlite};
use std::collections::HashMap;

/// Rows of one statement: where the measured rate of both databases levels off. SQLite takes 32,766
/// parameters a statement, and a row has ten.
const STATEMENT_ROWS: usize = 1_000;

const DOING: &str = "writing account states";

/// The columns of the rows handed to a statement, in order.
const COLUMNS: &str = "u (did, host_id, local_status, upstream_status, rev, data_cid, commit_cid, desynchronized, \
     signing_key, resolved_at)";

/// The rows of a PostgreSQL statement.
const POSTGRES_ROWS: &str = "SELECT * FROM UNNEST($1::text[], $2::int4[], $3::int2[], $4::text[], $5::int8[], \
     $6::bytea[], $7::bytea[], $8::bool[], $9::bytea[], $10::int8[])";

/// Changes known accounts. An older rev, or a key resolved earlier, leaves what is there.
const UPDATE: &str = "UPDATE accounts AS a SET \
     host_id = COALESCE(u.host_id, a.host_id), \
     local_status = COALESCE(u.local_status, a.local_status), \
     upstream_status = CASE WHEN u.upstream_status IS NULL THEN a.upstream_status \
         ELSE NULLIF(u.upstream_status, 'active') END, \
     rev = CASE WHEN u.rev >= COALESCE(a.rev, 0) THEN u.rev ELSE a.rev END, \
     data_cid = CASE WHEN u.rev >= COALESCE(a.rev, 0) THEN u.data_cid ELSE a.data_cid END, \
     commit_cid = CASE WHEN u.rev >= COALESCE(a.rev, 0) THEN u.commit_cid ELSE a.commit_cid END, \
     desynchronized = CASE WHEN u.rev >= COALESCE(a.rev, 0) THEN u.desynchronized ELSE a.desynchronized END, \
     signing_key = CASE WHEN u.resolved_at >= COALESCE(a.resolved_at, 0) THEN u.signing_key ELSE a.signing_key END, \
     resolved_at = CASE WHEN u.resolved_at >= COALESCE(a.resolved_at, 0) THEN u.resolved_at ELSE a.resolved_at END \
     FROM u WHERE a.did = u.did";

/// Creates accounts.
const INSERT: &str = "INSERT INTO accounts (did, host_id, local_status, upstream_status, rev, data_cid, commit_cid, \
     desynchronized, signing_key, resolved_at) \
     SELECT u.did, u.host_id, COALESCE(u.local_status, 0), NULLIF(u.upstream_status, 'active'), u.rev, u.data_cid, \
     u.commit_cid, COALESCE(u.desynchronized, FALSE), u.signing_key, u.resolved_at FROM u";

/// A host's quota and how much of it is taken.
#[derive(Debug, Clone, Copy)]
struct Quota {
    limit: i64,
    accounts: i64,
}

/// The statements of a batch, on a connection of either database.
trait Statements {
    /// The hosts of those of the accounts that are known.
    async fn known(&mut self, dids: &[&str]) -> Result<HashMap<String, i32>, sqlx::Error>;
    async fn quotas(&mut self) -> Result<HashMap<i32, Quota>, sqlx::Error>;
    async fn add_to_count(&mut self, host: i32, change: i64) -> Result<(), sqlx::Error>;
    async fn set_cursor(&mut self, host: i32, cursor: i64) -> Result<(), sqlx::Error>;
    async fn set_replay_from(&mut self, seq: i64) -> Result<(), sqlx::Error>;
    async fn raise_head(&mut self, seq: i64) -> Result<(), sqlx::Error>;
    async fn insert(&mut self, rows: &[&AccountUpdate]) -> Result<(), sqlx::Error>;
    async fn update(&mut self, rows: &[&AccountUpdate]) -> Result<(), sqlx::Error>;
}

/// The statements both databases read alike.
macro_rules! shared_statements {
    () => {
        async fn quotas(&mut self) -> Result<HashMap<i32, Quota>, sqlx::Error> {
            let rows: Vec<(i32, i64, i64)> =
                sqlx::query_as("SELECT id, account_limit, account_count FROM hosts")
                    .fetch_all(&mut *self)
                    .await?;
            Ok(rows
                .into_iter()
                .map(|(host, limit, accounts)| (host, Quota { limit, accounts }))
                .collect())
        }

        async fn add_to_count(&mut self, host: i32, change: i64) -> Result<(), sqlx::Error> {
            sqlx::query("UPDATE hosts SET account_count = account_count + $2 WHERE id = $1")
                .bind(host)
                .bind(change)
                .execute(&mut *self)
                .await
                .map(drop)
        }

        async fn set_cursor(&mut self, host: i32, cursor: i64) -> Result<(), sqlx::Error> {
            sqlx::query("UPDATE hosts SET last_seq = $2 WHERE id = $1")
                .bind(host)
                .bind(cursor)
                .execute(&mut *self)
                .await
                .map(drop)
        }

        async fn set_replay_from(&mut self, seq: i64) -> Result<(), sqlx::Error> {
            sqlx::query("UPDATE log_position SET replay_from = $1")
                .bind(seq)
                .execute(&mut *self)
                .await
                .map(drop)
        }

        async fn raise_head(&mut self, seq: i64) -> Result<(), sqlx::Error> {
            sqlx::query("UPDATE log_position SET head = $1 WHERE head < $1")
                .bind(seq)
                .execute(&mut *self)
                .await
                .map(drop)
        }
    };
}

impl Statements for PgConnection {
    shared_statements!();

    async fn known(&mut self, dids: &[&str]) -> Result<HashMap<String, i32>, sqlx::Error> {
        let rows: Vec<(String, i32)> =
            sqlx::query_as("SELECT did, host_id FROM accounts WHERE did = ANY($1)")
                .bind(dids)
                .fetch_all(&mut *self)
                .await?;
        Ok(rows.into_iter().collect())
    }

    async fn insert(&mut self, rows: &[&AccountUpdate]) -> Result<(), sqlx::Error> {
        postgres_rows(self, INSERT, rows).await
    }

    async fn update(&mut self, rows: &[&AccountUpdate]) -> Result<(), sqlx::Error> {
        postgres_rows(self, UPDATE, rows).await
    }
}

impl Statements for SqliteConnection {
    shared_statements!();

    async fn known(&mut self, dids: &[&str]) -> Result<HashMap<String, i32>, sqlx::Error> {
        let rows: Vec<(String, i32)> = sqlx::query_as(
            "SELECT did, host_id FROM accounts WHERE did IN (SELECT value FROM json_each($1))",
        )
        .bind(json_list(dids.iter().copied()))
        .fetch_all(&mut *self)
        .await?;
        Ok(rows.into_iter().collect())
    }

    async fn insert(&mut self, rows: &[&AccountUpdate]) -> Result<(), sqlx::Error> {
        sqlite_rows(self, INSERT, rows).await
    }

    async fn update(&mut self, rows: &[&AccountUpdate]) -> Result<(), sqlx::Error> {
        sqlite_rows(self, UPDATE, rows).await
    }
}

/// One row as the databases take it.
struct Columns<'a> {
    did: &'a str,
    host: Option<i32>,
    local: Option<i16>,
    upstream: Option<&'a str>,
    rev: Option<i64>,
    data: Option<[u8; 36]>,
    commit: Option<[u8; 36]>,
    desynchronized: Option<bool>,
    key: Option<[u8; 34]>,
    resolved_at: Option<i64>,
}

impl<'a> Columns<'a> {
    fn of(update: &'a AccountUpdate) -> Self {
        Self {
            did: update.did.as_str(),
            host: update.host.map(HostId::to_sql),
            local: update.local.map(|status| i16::from(status.code())),
            upstream: update.upstream.as_ref().map(|status| status.stored()),
            // The top bit of a TID is always 0.
            rev: update.repo.map(|repo| repo.rev.to_u64() as i64),
            data: update.repo.map(|repo| repo.data.to_bytes()),
            commit: update.repo.map(|repo| repo.commit.to_bytes()),
            desynchronized: update.repo.map(|repo| repo.desynchronized),
            key: update
                .key
                .and_then(|key| key.signing_key)
                .map(|key| key.to_bytes()),
            resolved_at: update.key.map(|key| key.resolved_at),
        }
    }
}

async fn postgres_rows(
    conn: &mut PgConnection,
    action: &str,
    updates: &[&AccountUpdate],
) -> Result<(), sqlx::Error> {
    let rows: Vec<Columns<'_>> = updates.iter().map(|update| Columns::of(update)).collect();
    sqlx::query(AssertSqlSafe(format!(
        "WITH {COLUMNS} AS ({POSTGRES_ROWS}) {action}"
    )))
    .bind(rows.iter().map(|row| row.did).collect::<Vec<_>>())
    .bind(rows.iter().map(|row| row.host).collect::<Vec<_>>())
    .bind(rows.iter().map(|row| row.local).collect::<Vec<_>>())
    .bind(rows.iter().map(|row| row.upstream).collect::<Vec<_>>())
    .bind(rows.iter().map(|row| row.rev).collect::<Vec<_>>())
    .bind(
        rows.iter()
            .map(|row| row.data.as_ref().map(<[u8; 36]>::as_slice))
            .collect::<Vec<_>>(),
    )
    .bind(
        rows.iter()
            .map(|row| row.commit.as_ref().map(<[u8; 36]>::as_slice))
            .collect::<Vec<_>>(),
    )
    .bind(
        rows.iter()
            .map(|row| row.desynchronized)
            .collect::<Vec<_>>(),
    )
    .bind(
        rows.iter()
            .map(|row| row.key.as_ref().map(<[u8; 34]>::as_slice))
            .collect::<Vec<_>>(),
    )
    .bind(rows.iter().map(|row| row.resolved_at).collect::<Vec<_>>())
    .execute(conn)
    .await
    .map(drop)
}

async fn sqlite_rows(
    conn: &mut SqliteConnection,
    action: &str,
    updates: &[&AccountUpdate],
) -> Result<(), sqlx::Error> {
    let mut query = QueryBuilder::<Sqlite>::new(format!("WITH {COLUMNS} AS ("));
    query.push_values(
        updates.iter().map(|update| Columns::of(update)),
        |mut values, row| {
            values
                .push_bind(row.did.to_owned())
                .push_bind(row.host)
                .push_bind(row.local)
                .push_bind(row.upstream.map(str::to_owned))
                .push_bind(row.rev)
                .push_bind(row.data.map(Vec::from))
                .push_bind(row.commit.map(Vec::from))
                .push_bind(row.desynchronized)
                .push_bind(row.key.map(Vec::from))
                .push_bind(row.resolved_at);
        },
    );
    query.push(") ");
    query.push(action);
    // Only the text of a full statement comes again.
    let full = updates.len() == STATEMENT_ROWS;
    query.build().persistent(full).execute(conn).await.map(drop)
}

impl Store {
    /// Writes a batch, wholly or not at all. Several updates of one account are applied in order.
    ///
    /// An account that is created without a decision is throttled if its host is over its quota.
    /// An update without a host of an account that is not known changes nothing.
    pub async fn apply(&self, batch: &Batch) -> Result<(), StoreError> {
        if batch.is_empty() {
            return Ok(());
        }
        let mut coalesced = Coalesced::default();
        coalesced.add(batch.clone());
        self.apply_distinct(&coalesced.take()).await
    }

    /// Writes a batch that names each account and each host once.
    pub(super) async fn apply_distinct(&self, batch: &Batch) -> Result<(), StoreError> {
        writing!(self, Durability::InOrder, DOING, conn => write_batch(conn, batch).await.doing(DOING))
    }

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

    /// The log sequence number from which on the log must be read after a crash. 1 at first.
    pub async fn replay_from(&self) -> Result<u64, StoreError> {
        Ok(self.log_position().await?.0)
    }

    /// The last log sequence number that was given out, as far as it is known here: the log may be some events ahead.
    pub async fn log_head(&self) -> Result<u64, StoreError> {
        let (replay_from, head) = self.log_position().await?;
        Ok(head.max(replay_from.saturating_sub(1)))
    }

    async fn log_position(&self) -> Result<(u64, u64), StoreError> {
        let (replay_from, head): (i64, i64) = super::database::reading!(self, pool => {
            sqlx::query_as("SELECT replay_from, head FROM log_position").fetch_one(pool).await
        })
        .doing("reading the log position")?;
        let seq = |seq: i64| {
            u64::try_from(seq).map_err(|_| StoreError::Corrupt {
                table: "log_position",
                what: format!("the sequence number {seq}"),
            })
        };
        Ok((seq(replay_from)?, seq(head)?))
    }
}

/// Writes a batch that names each account once.
async fn write_batch<C: Statements>(conn: &mut C, batch: &Batch) -> Result<(), sqlx::Error> {
    let (placed, known): (Vec<_>, Vec<_>) = batch
        .accounts
        .iter()
        .partition(|update| update.host.is_some());
    for chunk in known.chunks(STATEMENT_ROWS) {
        conn.update(chunk).await?;
    }
    if !placed.is_empty() {
        write_placed(conn, &placed).await?;
    }
    for &(host, cursor) in &batch.cursors {
        conn.set_cursor(host.to_sql(), cursor).await?;
    }
    if let Some(seq) = batch.replay_from {
        // Sequence numbers stay below 2^53.
        conn.set_replay_from(seq as i64).await?;
    }
    if let Some(seq) = batch.head {
        conn.raise_head(seq as i64).await?;
    }
    Ok(())
}

/// Writes updates that name a host: creates the unknown accounts, moves those whose host changed,
/// and keeps the hosts' counts.
async fn write_placed<C: Statements>(
    conn: &mut C,
    updates: &[&AccountUpdate],
) -> Result<(), sqlx::Error> {
    let mut ledger = Ledger {
        quotas: conn.quotas().await?,
        changes: HashMap::new(),
    };
    for chunk in updates.chunks(STATEMENT_ROWS) {
        let dids: Vec<&str> = chunk.iter().map(|update| update.did.as_str()).collect();
        let known = conn.known(&dids).await?;
        let mut old = Vec::new();
        let mut new = Vec::new();
        for &update in chunk {
            let Some(host) = update.host.map(HostId::to_sql) else {
                continue;
            };
            match known.get(update.did.as_str()) {
                Some(&from) => {
                    ledger.moves(from, host);
                    old.push(update);
                }
                None => new.push(ledger.admit(host, update)),
            }
        }
        if !new.is_empty() {
            conn.insert(&new.iter().collect::<Vec<_>>()).await?;
        }
        if !old.is_empty() {
            conn.update(&old).await?;
        }
    }
    for (host, change) in ledger.changes {
        if change != 0 {
            conn.add_to_count(host, change).await?;
        }
    }
    Ok(())
}

/// The hosts' quotas, and how a batch changes the number of their accounts.
struct Ledger {
    quotas: HashMap<i32, Quota>,
    changes: HashMap<i32, i64>,
}

impl Ledger {
    fn moves(&mut self, from: i32, to: i32) {
        if from != to {
            *self.changes.entry(from).or_default() -= 1;
            *self.changes.entry(to).or_default() += 1;
        }
    }

    /// Counts a new account in, and throttles it if its host has no room and nothing else was decided.
    fn admit(&mut self, host: i32, update: &AccountUpdate) -> AccountUpdate {
        let change = self.changes.entry(host).or_default();
        let full = self
            .quotas
            .get(&host)
            .is_some_and(|quota| quota.accounts + *change >= quota.limit);
        *change += 1;
        let by_quota = if full {
            LocalStatus::Throttled
        } else {
            LocalStatus::Active
        };
        AccountUpdate {
            local: update.local.or(Some(by_quota)),
            ..update.clone()
        }
    }
}
