//! Opening a database: connections, their settings, and the schema brought up to date.
//! Both kinds have one connection that writes, so that writes never wait for one another inside the
//! database and counts are exact, and several that read.

use super::error::{StoreError, from_migration, from_postgres, from_sqlite};
use sqlx::migrate::Migrator;
use sqlx::pool::{PoolConnection, PoolOptions};
use sqlx::postgres::{PgConnectOptions, PgConnection, PgPool};
use sqlx::sqlite::{
    SqliteConnectOptions, SqliteConnection, SqliteJournalMode, SqlitePool, SqliteSynchronous,
};
use sqlx::{Connection as _, Postgres, Sqlite};
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::Duration;

/// How long an opening relay waits for the PostgreSQL server.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);

/// How long a statement waits for a free connection before it fails.
const ACQUIRE_TIMEOUT: Duration = Duration::from_secs(10);

/// How long SQLite waits for a lock of another process (a backup, a shell).
const BUSY_TIMEOUT: Duration = Duration::from_secs(10);

/// Connections that read. PostgreSQL allows 100 by default for everybody.
const POSTGRES_READERS: u32 = 8;
const SQLITE_READERS: u32 = 4;

/// Page cache of the writing SQLite connection, KiB (negative: a size, not a number of pages).
const SQLITE_CACHE_KIB: &str = "-16384";

static POSTGRES_MIGRATIONS: Migrator = sqlx::migrate!("migrations/postgres");
static SQLITE_MIGRATIONS: Migrator = sqlx::migrate!("migrations/sqlite");

/// When a write must be safe from a power failure.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Durability {
    /// Before it returns: what only the database knows, such as an operator's decision.
    Now,
    /// In its own time, in order: what the log can restore.
    InOrder,
}

/// An open database of either kind.
pub(super) enum Database {
    Postgres(PostgresDatabase),
    Sqlite(SqliteDatabase),
}

pub(super) struct PostgresDatabase {
    write: PgPool,
    pub(super) read: PgPool,
    pub(super) options: Box<PgConnectOptions>,
    /// As an operator knows it.
    pub(super) name: String,
}

pub(super) struct SqliteDatabase {
    write: SqlitePool,
    pub(super) read: SqlitePool,
    /// The file, where it may be written.
    pub(super) path: Option<PathBuf>,
}

impl Database {
    /// Opens what the URL names, and brings its schema up to date.
    pub(super) async fn open(url: &str) -> Result<Self, StoreError> {
        if url.starts_with("postgres://") || url.starts_with("postgresql://") {
            return Ok(Self::Postgres(PostgresDatabase::open(url).await?));
        }
        if url.starts_with("sqlite:") {
            return Ok(Self::Sqlite(SqliteDatabase::open(url).await?));
        }
        let scheme = url.split_once(':').map_or("none", |(scheme, _)| scheme);
        Err(StoreError::Url {
            reason: format!("its scheme is {scheme:.20}"),
        })
    }

    pub(super) async fn close(&self) {
        match self {
            Self::Postgres(db) => {
                db.write.close().await;
                db.read.close().await;
            }
            // The writer last: the last connection to go empties and removes the WAL file.
            Self::Sqlite(db) => {
                db.read.close().await;
                db.write.close().await;
            }
        }
    }
}

impl PostgresDatabase {
    async fn open(url: &str) -> Result<Self, StoreError> {
        let options = PgConnectOptions::from_str(url)
            .map_err(|error| StoreError::Url {
                reason: configuration_reason(&error),
            })?
            .application_name("atproto-relay");
        let name = postgres_name(&options);
        // One plain connection first: a pool would try again until its timeout and hide the reason.
        let mut first = tokio::time::timeout(CONNECT_TIMEOUT, PgConnection::connect_with(&options))
            .await
            .unwrap_or_else(|_| {
                Err(sqlx::Error::Io(std::io::Error::other(format!(
                    "no answer within {} s",
                    CONNECT_TIMEOUT.as_secs()
                ))))
            })
            .map_err(|error| from_postgres(&name, &error))?;
        POSTGRES_MIGRATIONS
            .run_direct(None, &mut first, false)
            .await
            .map_err(|error| from_migration(&name, error, from_postgres))?;
        let pool = |connections| {
            PoolOptions::<Postgres>::new()
                .max_connections(connections)
                .acquire_timeout(ACQUIRE_TIMEOUT)
                .connect_lazy_with(options.clone())
        };
        let database = Self {
            write: pool(1),
            read: pool(POSTGRES_READERS),
            options: Box::new(options),
            name,
        };
        // A server that is going away matters at the first use, not here.
        let _ = first.close().await;
        Ok(database)
    }

    /// The writing connection.
    pub(super) async fn writer(
        &self,
        durability: Durability,
    ) -> Result<PoolConnection<Postgres>, sqlx::Error> {
        let mut connection = self.write.acquire().await?;
        let setting = match durability {
            Durability::Now => "SET synchronous_commit TO on",
            Durability::InOrder => "SET synchronous_commit TO off",
        };
        sqlx::query(setting).execute(&mut *connection).await?;
        Ok(connection)
    }
}

/// The database as an operator knows it, without the password.
fn postgres_name(options: &PgConnectOptions) -> String {
    let database = options.get_database().unwrap_or(options.get_username());
    let place = match options.get_socket() {
        Some(socket) => socket.display().to_string(),
        None => format!("{}:{}", options.get_host(), options.get_port()),
    };
    format!(
        "the PostgreSQL database {database:?} at {place} (user {:?})",
        options.get_username()
    )
}

/// Why a URL was refused. The driver's text may quote parts of the URL, so only its kind is told.
fn configuration_reason(error: &sqlx::Error) -> String {
    match error {
        sqlx::Error::Configuration(cause) => match cause.downcast_ref::<url::ParseError>() {
            Some(parse) => parse.to_string(),
            None => "one of its parts or parameters is not valid".to_owned(),
        },
        _ => "it cannot be read".to_owned(),
    }
}

impl SqliteDatabase {
    async fn open(url: &str) -> Result<Self, StoreError> {
        let (path, read_only) = sqlite_path(url)?;
        let name = format!("the SQLite database {}", path.display());
        if !read_only {
            create_private(&path, &name)?;
        }
        let options = SqliteConnectOptions::new()
            .filename(&path)
            .read_only(read_only)
            .busy_timeout(BUSY_TIMEOUT)
            .synchronous(SqliteSynchronous::Normal)
            .pragma("cache_size", SQLITE_CACHE_KIB);
        let writing = if read_only {
            options
        } else {
            options.journal_mode(SqliteJournalMode::Wal)
        };
        let mut first = SqliteConnection::connect_with(&writing)
            .await
            .map_err(|error| from_sqlite(&name, &error))?;
        SQLITE_MIGRATIONS
            .run_direct(None, &mut first, false)
            .await
            .map_err(|error| from_migration(&name, error, from_sqlite))?;
        let pool = |connections, options: SqliteConnectOptions| {
            PoolOptions::<Sqlite>::new()
                .max_connections(connections)
                .acquire_timeout(ACQUIRE_TIMEOUT)
                .test_before_acquire(false)
                .idle_timeout(None)
                .max_lifetime(None)
                .connect_lazy_with(options)
        };
        let database = Self {
            read: pool(SQLITE_READERS, writing.clone().pragma("query_only", "ON")),
            write: pool(1, writing),
            path: (!read_only).then_some(path),
        };
        first
            .close()
            .await
            .map_err(|error| from_sqlite(&name, &error))?;
        Ok(database)
    }

    /// The writing connection.
    pub(super) async fn writer(
        &self,
        durability: Durability,
    ) -> Result<PoolConnection<Sqlite>, sqlx::Error> {
        let mut connection = self.write.acquire().await?;
        let setting = match durability {
            Durability::Now => "PRAGMA synchronous = FULL",
            Durability::InOrder => "PRAGMA synchronous = NORMAL",
        };
        sqlx::query(setting).execute(&mut *connection).await?;
        Ok(connection)
    }
}

/// The path in `sqlite:PATH` or `sqlite://PATH`, taken literally, and whether `?mode=ro` follows it.
fn sqlite_path(url: &str) -> Result<(PathBuf, bool), StoreError> {
    let refuse = |reason: &str| StoreError::Url {
        reason: reason.to_owned(),
    };
    let rest = url.strip_prefix("sqlite:").unwrap_or(url);
    let rest = rest.strip_prefix("//").unwrap_or(rest);
    let (path, read_only) = match rest.split_once('?') {
        None => (rest, false),
        Some((path, "mode=ro")) => (path, true),
        Some(_) => return Err(refuse("it has parameters other than ?mode=ro")),
    };
    match path {
        "" => Err(refuse("it names no file")),
        ":memory:" => Err(refuse("a database in memory would not survive a restart")),
        path => Ok((PathBuf::from(path), read_only)),
    }
}

/// Creates the file for this user alone if it is not there. SQLite gives its WAL the same mode.
fn create_private(path: &Path, name: &str) -> Result<(), StoreError> {
    use std::os::unix::fs::OpenOptionsExt as _;
    let opened = std::fs::OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .open(path);
    match opened {
        Ok(_) => Ok(()),
        Err(error) => {
            let (database, reason) = (name.to_owned(), error.to_string());
            Err(match error.kind() {
                std::io::ErrorKind::PermissionDenied | std::io::ErrorKind::ReadOnlyFilesystem
                    if path_exists(path) =>
                {
                    StoreError::ReadOnly { database, reason }
                }
                _ => StoreError::Open { database, reason },
            })
        }
    }
}

fn path_exists(path: &Path) -> bool {
    PathBuf::from(path).try_exists().unwrap_or(false)
}

/// Runs the same expression on a reading pool of either database.
macro_rules! reading {
    ($store:expr, $pool:ident => $body:expr) => {
        match &*$store.database {
            $crate::store::database::Database::Postgres(db) => {
                let $pool = &db.read;
                $body
            }
            $crate::store::database::Database::Sqlite(db) => {
                let $pool = &db.read;
                $body
            }
        }
    };
}

/// Runs the same block in a transaction of either database, and commits it when the block's result
/// is `Ok`. The block sees the connection as `$conn`. A connection that failed is not used again.
macro_rules! writing {
    ($store:expr, $durability:expr, $doing:expr, $conn:ident => $body:expr) => {
        match &*$store.database {
            $crate::store::database::Database::Postgres(db) => {
                $crate::store::database::writing!(@in db, "BEGIN", $durability, $doing, $conn => $body)
            }
            // Immediate: a transaction that reads first must not find the file locked when it writes.
            $crate::store::database::Database::Sqlite(db) => {
                $crate::store::database::writing!(@in db, "BEGIN IMMEDIATE", $durability, $doing, $conn => $body)
            }
        }
    };
    (@in $db:ident, $begin:literal, $durability:expr, $doing:expr, $conn:ident => $body:expr) => {{
        use sqlx::Connection as _;
        let mut connection = $db.writer($durability).await.doing($doing)?;
        let outcome = async {
            let mut transaction = connection.begin_with($begin).await.doing($doing)?;
            let result = {
                let $conn = &mut *transaction;
                $body?
            };
            transaction.commit().await.doing($doing)?;
            Ok(result)
        }
        .await;
        if outcome.is_err() {
            // SQLite ends a transaction by itself where the disk is full; the driver goes on counting it.
            connection.close_on_drop();
        }
        outcome
    }};
}

pub(super) use {reading, writing};
