//! Writing a batch: one transaction, a few statements whatever its size. Applying the same batch
//! twice, or older batches over newer state and then the newer ones again, ends in the same state,
//! which is what a replay of the log needs.

use super::Store;
use super::accounts::json_list;
use super::coalesce::Coalesced;
use super::database::{Commit, writing};
use super::error::{Doing, StoreError};
use super::record::record;
use super::rows::{AccountUpdate, Batch, Heard, HostId, KnownKey};
use super::status::{LocalStatus, UpstreamStatus};
use sqlx::postgres::PgConnection;
use sqlx::sqlite::SqliteConnection;
use sqlx::{AssertSqlSafe, QueryBuilder, Sqlite};
use std::collections::HashMap;

/// Rows of one statement: where the measured rate of both databases levels off. SQLite takes 32,766
/// parameters a statement, and a row has twelve.
const STATEMENT_ROWS: usize = 1_000;

const DOING: &str = "writing account states";

/// The name of hosts and accounts in the table of the log's views.
pub const ACCOUNTS_VIEW: &str = "accounts";

/// The columns of the rows handed to a statement, in order.
const COLUMNS: &str = "u (did, host_id, counted, local_status, upstream_status, status_seq, rev, data_cid, \
     commit_cid, desynchronized, signing_key, resolved_at)";

/// The rows of a PostgreSQL statement.
const POSTGRES_ROWS: &str = "SELECT * FROM UNNEST($1::text[], $2::int4[], $3::bool[], $4::int2[], $5::text[], \
     $6::int8[], $7::int8[], $8::bytea[], $9::bytea[], $10::bool[], $11::bytea[], $12::int8[])";

/// Changes known accounts. An older rev, an older upstream status, or a key resolved earlier changes nothing.
const UPDATE: &str = "UPDATE accounts AS a SET \
     host_id = COALESCE(u.host_id, a.host_id), \
     counted = COALESCE(u.counted, a.counted), \
     local_status = COALESCE(u.local_status, a.local_status), \
     upstream_status = CASE WHEN u.upstream_status IS NULL OR u.status_seq < COALESCE(a.status_seq, 0) \
         THEN a.upstream_status ELSE NULLIF(u.upstream_status, 'active') END, \
     status_seq = CASE WHEN u.upstream_status IS NULL OR u.status_seq < COALESCE(a.status_seq, 0) \
         THEN a.status_seq ELSE COALESCE(u.status_seq, a.status_seq) END, \
     rev = CASE WHEN u.rev >= COALESCE(a.rev, 0) THEN u.rev ELSE a.rev END, \
     data_cid = CASE WHEN u.rev >= COALESCE(a.rev, 0) THEN u.data_cid ELSE a.data_cid END, \
     commit_cid = CASE WHEN u.rev >= COALESCE(a.rev, 0) THEN u.commit_cid ELSE a.commit_cid END, \
     desynchronized = CASE WHEN u.rev >= COALESCE(a.rev, 0) THEN u.desynchronized ELSE a.desynchronized END, \
     signing_key = CASE WHEN u.resolved_at >= COALESCE(a.resolved_at, 0) THEN u.signing_key ELSE a.signing_key END, \
     resolved_at = CASE WHEN u.resolved_at >= COALESCE(a.resolved_at, 0) THEN u.resolved_at ELSE a.resolved_at END \
     FROM u WHERE a.did = u.did";

/// Creates accounts.
const INSERT: &str = "INSERT INTO accounts (did, host_id, counted, local_status, upstream_status, status_seq, rev, \
     data_cid, commit_cid, desynchronized, signing_key, resolved_at) \
     SELECT u.did, u.host_id, COALESCE(u.counted, TRUE), COALESCE(u.local_status, 0), \
     NULLIF(u.upstream_status, 'active'), u.status_seq, u.rev, u.data_cid, u.commit_cid, \
     COALESCE(u.desynchronized, FALSE), u.signing_key, u.resolved_at FROM u";

record! {
    /// What of an account's row an update is held against.
    #[derive(Debug, Clone)]
    struct Standing {
        did: String,
        host_id: i32,
        counted: bool,
        local_status: i16,
        upstream_status: Option<String>,
        status_seq: Option<i64>,
        resolved_at: Option<i64>,
    }
}

/// A host's quota and how much of it is taken.
#[derive(Debug, Clone, Copy)]
struct Quota {
    limit: i64,
    accounts: i64,
}

/// The statements of a batch, on a connection of either database.
trait Statements {
    /// How those of the accounts stand that are known.
    async fn known(&mut self, dids: &[&str]) -> Result<Vec<Standing>, sqlx::Error>;
    async fn quotas(&mut self) -> Result<HashMap<i32, Quota>, sqlx::Error>;
    async fn add_to_count(&mut self, host: i32, change: i64) -> Result<(), sqlx::Error>;
    async fn set_cursor(&mut self, host: i32, cursor: i64) -> Result<(), sqlx::Error>;
    async fn set_replay_from(&mut self, seq: i64) -> Result<(), sqlx::Error>;
    async fn raise_head(&mut self, seq: i64) -> Result<(), sqlx::Error>;
    async fn insert(&mut self, rows: &[&AccountUpdate]) -> Result<(), sqlx::Error>;
    async fn update(&mut self, rows: &[&AccountUpdate]) -> Result<(), sqlx::Error>;
}

/// Reads what [`Standing`] has.
macro_rules! standing {
    () => {
        "SELECT did, host_id, counted, local_status, upstream_status, status_seq, resolved_at FROM accounts WHERE "
    };
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
            sqlx::query("UPDATE views SET position = $1 WHERE name = $2")
                .bind(seq)
                .bind(ACCOUNTS_VIEW)
                .execute(&mut *self)
                .await?;
            // For the previous release.
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

    async fn known(&mut self, dids: &[&str]) -> Result<Vec<Standing>, sqlx::Error> {
        sqlx::query_as(concat!(standing!(), "did = ANY($1)"))
            .bind(dids)
            .fetch_all(&mut *self)
            .await
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

    async fn known(&mut self, dids: &[&str]) -> Result<Vec<Standing>, sqlx::Error> {
        sqlx::query_as(concat!(
            standing!(),
            "did IN (SELECT value FROM json_each($1))"
        ))
        .bind(json_list(dids.iter().copied()))
        .fetch_all(&mut *self)
        .await
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
    counted: Option<bool>,
    local: Option<i16>,
    upstream: Option<&'a str>,
    status_seq: Option<i64>,
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
            counted: update.counted,
            local: update.local.map(|status| i16::from(status.code())),
            upstream: update.upstream.as_ref().map(|status| status.stored()),
            status_seq: update.status_seq.map(to_sql),
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
    .bind(rows.iter().map(|row| row.counted).collect::<Vec<_>>())
    .bind(rows.iter().map(|row| row.local).collect::<Vec<_>>())
    .bind(rows.iter().map(|row| row.upstream).collect::<Vec<_>>())
    .bind(rows.iter().map(|row| row.status_seq).collect::<Vec<_>>())
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
                .push_bind(row.counted)
                .push_bind(row.local)
                .push_bind(row.upstream.map(str::to_owned))
                .push_bind(row.status_seq)
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
        // What an account's former host may no longer say is nowhere but here: the log would give it back.
        let moves = batch.accounts.iter().any(AccountUpdate::takes_authority);
        let commit = if moves {
            Commit::Synced
        } else {
            Commit::Ordered
        };
        writing!(self, commit, DOING, conn => write_batch(conn, batch).await.doing(DOING))
    }

    /// The position of the accounts view: the log sequence number from which on the log must be read after a crash. 1 at
    /// first.
    pub async fn replay_from(&self) -> Result<u64, StoreError> {
        Ok(self.log_position().await?.replay_from)
    }

    /// The last log sequence number that was given out, as far as any view knows: the log may be some events ahead.
    pub async fn log_head(&self) -> Result<u64, StoreError> {
        let LogPosition {
            replay_from,
            furthest,
            head,
        } = self.log_position().await?;
        Ok(head.max(replay_from.max(furthest).saturating_sub(1)))
    }

    async fn log_position(&self) -> Result<LogPosition, StoreError> {
        // The previous release moves only its own row. Events below either were applied, so the higher one holds.
        let (own, previous, furthest, head): (i64, i64, i64, i64) = super::database::reading!(self, "reading the log position", pool => {
            sqlx::query_as(
                "SELECT own.position, p.replay_from, (SELECT MAX(position) FROM views), p.head \
                 FROM log_position AS p, views AS own WHERE own.name = $1",
            )
            .bind(ACCOUNTS_VIEW)
            .fetch_one(pool)
            .await
        })?;
        let seq = |seq: i64| {
            u64::try_from(seq).map_err(|_| StoreError::Corrupt {
                table: "log_position",
                what: format!("the sequence number {seq}"),
            })
        };
        Ok(LogPosition {
            replay_from: seq(own.max(previous))?,
            furthest: seq(furthest)?,
            head: seq(head)?,
        })
    }
}

/// How far the log was applied.
struct LogPosition {
    /// The position of the accounts.
    replay_from: u64,
    /// The position of the view that is furthest.
    furthest: u64,
    /// The last sequence number that the accounts know of.
    head: u64,
}

/// Sequence numbers stay below 2^53.
fn to_sql(seq: u64) -> i64 {
    seq as i64
}

/// Writes a batch that names each account once.
async fn write_batch<C: Statements>(conn: &mut C, batch: &Batch) -> Result<(), sqlx::Error> {
    let (placed, known): (Vec<_>, Vec<_>) =
        batch.accounts.iter().partition(|update| update.needs_row());
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
        conn.set_replay_from(to_sql(seq)).await?;
    }
    if let Some(seq) = batch.head {
        conn.raise_head(to_sql(seq)).await?;
    }
    Ok(())
}

/// Writes updates whose effect depends on the row: creates the unknown accounts of which a host is named, moves those
/// whose host changed, and keeps the hosts' counts.
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
        let known: HashMap<&str, &Standing> =
            known.iter().map(|row| (row.did.as_str(), row)).collect();
        let mut old = Vec::new();
        let mut new = Vec::new();
        for &update in chunk {
            match known.get(update.did.as_str()) {
                Some(row) => old.push(ledger.change(row, update)),
                None => new.extend(ledger.admit(update)),
            }
        }
        if !new.is_empty() {
            conn.insert(&new.iter().collect::<Vec<_>>()).await?;
        }
        if !old.is_empty() {
            conn.update(&old.iter().collect::<Vec<_>>()).await?;
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
    /// The update as it applies to a known account; updates the hosts' counts.
    fn change(&mut self, row: &Standing, update: &AccountUpdate) -> AccountUpdate {
        let mut update = update.clone();
        if let Some(heard) = update.heard {
            keep_newer_row(row, heard, &mut update);
        }
        let host = update.host.map_or(row.host_id, HostId::to_sql);
        let stored = row.status_seq.map(i64::unsigned_abs);
        let deleted = match &update.upstream {
            Some(status) if !update.is_before(stored) => *status == UpstreamStatus::Deleted,
            _ => row.upstream_status.as_deref() == Some(UpstreamStatus::Deleted.stored()),
        };
        let counted = update.counted.unwrap_or(row.counted) && !deleted;
        *self.changes.entry(row.host_id).or_default() -= i64::from(row.counted);
        *self.changes.entry(host).or_default() += i64::from(counted);
        update.counted = Some(counted);
        update
    }

    /// Counts a new account in, and throttles it if its host has no room and nothing else was decided. `None` where no
    /// host is named.
    fn admit(&mut self, update: &AccountUpdate) -> Option<AccountUpdate> {
        let host = update.host.or(update.heard.map(|heard| heard.host))?;
        let deleted = update.upstream == Some(UpstreamStatus::Deleted);
        let counted = update.counted.unwrap_or(true) && !deleted;
        let change = self.changes.entry(host.to_sql()).or_default();
        let full = self
            .quotas
            .get(&host.to_sql())
            .is_some_and(|quota| quota.accounts + *change >= quota.limit);
        *change += i64::from(counted);
        let by_quota = if full && counted {
            LocalStatus::Throttled
        } else {
            LocalStatus::Active
        };
        Some(AccountUpdate {
            host: Some(host),
            counted: Some(counted),
            local: update.local.or(Some(by_quota)),
            ..update.clone()
        })
    }
}

/// Drops from a replayed update what the row has already, or has newer.
///
/// Where the log names another host than the row, the row stays: a move is written before the first event after it
/// goes out. Only a row that never had an identity follows the log. Where the row's identity is not newer than the
/// event for sure, as when the database was restored from a copy, neither is believed: without a key the identity is
/// resolved before anything of the account passes.
///
/// The status stays if it is from this event or a later one, and if the event carries the relay's own status in place
/// of the PDS's.
fn keep_newer_row(row: &Standing, heard: Heard, update: &mut AccountUpdate) {
    let elsewhere = heard.host.to_sql() != row.host_id;
    match row.resolved_at.filter(|_| elsewhere) {
        Some(resolved_at) => {
            update.counted = None;
            if heard.at >= resolved_at {
                update.key = Some(KnownKey {
                    signing_key: None,
                    resolved_at: heard.at,
                });
            }
        }
        None => update.host = Some(heard.host),
    }
    let local = u8::try_from(row.local_status)
        .ok()
        .and_then(LocalStatus::from_code)
        .filter(|local| !local.is_active());
    let is_own_status = local
        .zip(update.upstream.as_ref())
        .is_some_and(|(local, upstream)| upstream.stored() == local.as_str());
    if is_own_status || update.status_seq.map(to_sql) <= row.status_seq {
        update.upstream = None;
    }
}
