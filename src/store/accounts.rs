//! Reading accounts. What changes them is in `apply`.

use super::Store;
use super::database::{Database, reading};
use super::error::StoreError;
use super::record::record;
use super::rows::{AccountRow, HostId, Page, RepoState};
use super::status::{LocalStatus, UpstreamStatus};
use crate::atproto::cid::Cid;
use crate::atproto::did::Did;
use crate::atproto::key::PublicKey;
use crate::atproto::tid::Tid;
use std::collections::{HashMap, HashSet};

use sqlx::{ColumnIndex, Decode, FromRow, Row, Type};

/// DIDs asked for in one statement.
const READ_CHUNK: usize = 1_000;

/// Most accounts scanned for one page of a list: ten of its largest pages. Bounds the cost of a request, however many accounts
/// have no repository.
pub const STRETCH: i64 = 10_000;

/// Up to `$3` accounts after the number `$1`, of the next `$2`: those with a repository, and the last of the `$2`.
const LIST: &str = "SELECT * FROM (SELECT *, ROW_NUMBER() OVER (ORDER BY uid) AS place FROM accounts \
     WHERE uid > $1 ORDER BY uid LIMIT $2) AS stretch WHERE rev IS NOT NULL OR place = $2 ORDER BY uid LIMIT $3";

struct Listed {
    account: AccountRecord,
    place: i64,
}

impl<'r, R: Row> FromRow<'r, R> for Listed
where
    AccountRecord: FromRow<'r, R>,
    &'static str: ColumnIndex<R>,
    i64: Decode<'r, R::Database> + Type<R::Database>,
{
    fn from_row(row: &'r R) -> Result<Self, sqlx::Error> {
        Ok(Self {
            account: AccountRecord::from_row(row)?,
            place: row.try_get("place")?,
        })
    }
}

record! {
    pub(super) struct AccountRecord {
        uid: i64,
        did: String,
        host_id: i32,
        counted: bool,
        local_status: i16,
        upstream_status: Option<String>,
        rev: Option<i64>,
        data_cid: Option<Vec<u8>>,
        commit_cid: Option<Vec<u8>>,
        desynchronized: bool,
        signing_key: Option<Vec<u8>>,
        resolved_at: Option<i64>,
    }
}

impl AccountRecord {
    pub(super) fn into_row(self) -> Result<AccountRow, StoreError> {
        let corrupt = |what: &str| StoreError::Corrupt {
            table: "accounts",
            what: format!("{what} of the account {}", self.did),
        };
        let repo = match (self.rev, &self.data_cid, &self.commit_cid) {
            (None, None, None) => None,
            (Some(rev), Some(data), Some(commit)) => Some(RepoState {
                rev: u64::try_from(rev)
                    .ok()
                    .map(Tid::from_u64)
                    .ok_or_else(|| corrupt("a rev"))?,
                data: Cid::from_bytes(data).map_err(|_| corrupt("a data CID"))?,
                commit: Cid::from_bytes(commit).map_err(|_| corrupt("a commit CID"))?,
                desynchronized: self.desynchronized,
            }),
            _ => return Err(corrupt("half a repository state")),
        };
        Ok(AccountRow {
            uid: self.uid,
            did: Did::parse(&self.did).map_err(|_| corrupt("the DID"))?,
            host: HostId(u32::try_from(self.host_id).map_err(|_| corrupt("the host number"))?),
            counted: self.counted,
            local: u8::try_from(self.local_status)
                .ok()
                .and_then(LocalStatus::from_code)
                .ok_or_else(|| corrupt("the local status"))?,
            upstream: UpstreamStatus::from_stored(self.upstream_status.as_deref()),
            repo,
            signing_key: self
                .signing_key
                .as_deref()
                .map(|bytes| stored_key(bytes).ok_or_else(|| corrupt("the signing key")))
                .transpose()?,
            resolved_at: self.resolved_at,
        })
    }
}

fn stored_key(bytes: &[u8]) -> Option<PublicKey> {
    PublicKey::from_bytes(bytes.try_into().ok()?).ok()
}

/// A list of DIDs as the one parameter SQLite can take: `value IN (SELECT value FROM json_each($1))`.
/// A DID has no character that JSON escapes.
pub(super) fn json_list<'a>(dids: impl Iterator<Item = &'a str>) -> String {
    let quoted: Vec<String> = dids.map(|did| format!("\"{did}\"")).collect();
    format!("[{}]", quoted.join(","))
}

impl Store {
    /// One account, as the last event that was emitted and the last decision left it.
    pub async fn account(&self, did: &Did) -> Result<Option<AccountRow>, StoreError> {
        let recent = self.recent.read();
        let record: Option<AccountRecord> = reading!(self, "reading an account", pool => {
            sqlx::query_as("SELECT * FROM accounts WHERE did = $1").bind(did.as_str()).fetch_optional(pool).await
        })?;
        let row = record.map(AccountRecord::into_row).transpose()?;
        Ok(recent.account(did, row))
    }

    /// Those of the given accounts that are in the database, as they are there.
    pub async fn accounts(&self, dids: &[Did]) -> Result<HashMap<Did, AccountRow>, StoreError> {
        let mut found = HashMap::with_capacity(dids.len());
        for chunk in dids.chunks(READ_CHUNK) {
            for record in self.read_chunk(chunk).await? {
                let row = record.into_row()?;
                found.insert(row.did.clone(), row);
            }
        }
        Ok(found)
    }

    async fn read_chunk(&self, dids: &[Did]) -> Result<Vec<AccountRecord>, StoreError> {
        let outcome = match &*self.database {
            Database::Postgres(db) => {
                let dids: Vec<&str> = dids.iter().map(Did::as_str).collect();
                sqlx::query_as("SELECT * FROM accounts WHERE did = ANY($1)")
                    .bind(dids)
                    .fetch_all(db.reader(self.reader))
                    .await
            }
            Database::Sqlite(db) => {
                sqlx::query_as(
                    "SELECT * FROM accounts WHERE did IN (SELECT value FROM json_each($1))",
                )
                .bind(json_list(dids.iter().map(Did::as_str)))
                .fetch_all(db.reader(self.reader))
                .await
            }
        };
        self.answered("reading accounts", outcome).await
    }

    /// Up to `limit` accounts with a repository, after the given uid (0: from the first), whatever their status. A page
    /// can be short, or empty, where [`STRETCH`] accounts in a row have few repositories.
    pub async fn list_accounts(
        &self,
        after: i64,
        limit: u32,
    ) -> Result<Page<AccountRow>, StoreError> {
        let recent = self.recent.read();
        let listed: Vec<Listed> = reading!(self, "listing accounts", pool => {
            sqlx::query_as(LIST)
                .bind(after)
                .bind(STRETCH)
                .bind(i64::from(limit) + 1)
                .fetch_all(pool)
                .await
        })?;
        let limit = limit as usize;
        let next = match listed.get(limit) {
            Some(_) => listed.get(limit.wrapping_sub(1)),
            None => listed.last().filter(|last| last.place == STRETCH),
        };
        let next = next.map(|last| last.account.uid);
        let mut rows = listed
            .into_iter()
            .take(limit)
            .map(|listed| listed.account.into_row())
            .collect::<Result<Vec<_>, _>>()?;
        // What ends a stretch is there for its number.
        rows.retain(|row| row.repo.is_some());
        recent.complete(&mut rows);
        Ok(Page { rows, next })
    }

    /// Up to `limit` accounts that are taken down, after the given uid, and those whose takedown the database does not
    /// have yet.
    pub async fn list_taken_down(
        &self,
        after: i64,
        limit: u32,
    ) -> Result<Page<AccountRow>, StoreError> {
        let recent = self.recent.read();
        let records: Vec<AccountRecord> = reading!(self, "listing taken down accounts", pool => {
            sqlx::query_as("SELECT * FROM accounts WHERE uid > $1 AND local_status = 1 ORDER BY uid LIMIT $2")
                .bind(after)
                .bind(i64::from(limit))
                .fetch_all(pool)
                .await
        })?;
        let full = records.len() == limit as usize;
        let next = records.last().map(|last| last.uid).filter(|_| full);
        let rows = records.into_iter().map(AccountRecord::into_row);
        let mut rows = rows.collect::<Result<Vec<_>, _>>()?;
        let listed: HashSet<Did> = rows.iter().map(|row| row.did.clone()).collect();
        let mut new = recent.decided(LocalStatus::TakenDown);
        new.retain(|did| !listed.contains(did));
        let mut known = self.accounts(&new).await?;
        for did in &new {
            let row = recent.account(did, known.remove(did));
            // An account without a number is newer than all others.
            let place = |row: &AccountRow| match row.uid {
                AccountRow::UNNUMBERED => i64::MAX,
                uid => uid,
            };
            let here =
                |row: &AccountRow| place(row) > after && next.is_none_or(|next| place(row) <= next);
            rows.extend(row.filter(here));
        }
        recent.complete(&mut rows);
        rows.retain(|row| row.local == LocalStatus::TakenDown);
        rows.sort_by_key(|row| row.uid);
        Ok(Page { rows, next })
    }
}

/// Releases the `$2` oldest throttled accounts that count with the host `$1`. An account that moved there counts
/// from the first event of its new host on.
pub(super) const RELEASE_OLDEST: &str = "UPDATE accounts SET local_status = 0 WHERE uid IN (SELECT uid FROM accounts \
     WHERE host_id = $1 AND local_status = 2 AND counted ORDER BY uid LIMIT $2) RETURNING uid, did";

/// What [`RELEASE_OLDEST`] returned, the oldest first.
pub(super) fn released_dids(mut rows: Vec<(i64, String)>) -> Result<Vec<Did>, StoreError> {
    rows.sort_unstable();
    rows.into_iter()
        .map(|(_, did)| {
            Did::parse(&did).map_err(|_| StoreError::Corrupt {
                table: "accounts",
                what: format!("the DID {did:?}"),
            })
        })
        .collect()
}
