//! Opening a database: connections, their settings, and the schema brought up to date.
//! Both kinds have one connection that writes, so that writes never wait for one another inside the
//! database and counts are exact, some for the relay's own reads, and some for public reads.

use super::epoch::Epoch;
use super::error::{StoreError, describe, from_postgres, from_sqlite};
use super::schema::{POSTGRES, SQLITE, bring_up_to_date, migrator};
use sqlx::Executor as _;
use sqlx::pool::{PoolConnection, PoolOptions};
use sqlx::postgres::{PgConnectOptions, PgConnection, PgPool};
use sqlx::sqlite::{
    SqliteConnectOptions, SqliteConnection, SqliteJournalMode, SqlitePool, SqliteSynchronous,
};
use sqlx::{Connection as _, Postgres, Sqlite};
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::Duration;

/// Fewest connections to the database: one writes, one holds it for this relay, one is made for a look at the server, and
/// there is one for each kind of reader.
pub const MIN_CONNECTIONS: u32 = 5;
/// How long an opening relay waits for the PostgreSQL server.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);

/// How long a statement waits for a free connection before it fails: what the relay itself has to do is repeated.
const ACQUIRE_TIMEOUT: Duration = Duration::from_secs(5);

/// How long SQLite waits for a lock of another process (a backup, a shell).
const BUSY_TIMEOUT: Duration = Duration::from_secs(10);

/// Longest time of a public read in PostgreSQL: far above that of the largest page.
const PUBLIC_STATEMENT_TIMEOUT: &str = "SET statement_timeout = '5s'";

/// Time limit of a probe of a server that may be unreachable.
const LOOK_TIMEOUT: Duration = Duration::from_secs(2);

/// Connections that do not read: one writes, one holds the database for this relay, and one probes the server.
const OTHER_CONNECTIONS: u32 = 3;

/// Lets the server notice within a minute that the machine of a relay is gone.
pub(super) const KEEPALIVES: &str =
    "SET tcp_keepalives_idle = 30; SET tcp_keepalives_interval = 10; SET tcp_keepalives_count = 3";

/// Page cache of each of the relay's own SQLite connections, KiB (negative: a size, not a number of pages).
const SQLITE_CACHE_KIB: &str = "-16384";

/// Who reads. Each kind has connections of its own, so that none waits for the other.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Reader {
    /// The relay's own work, its operator included.
    Relay,
    /// Public requests.
    Public,
}

/// How many connections each kind of reader has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Readers {
    relay: u32,
    public: u32,
}

impl Readers {
    /// Their share of all connections: half each, the relay the odd one.
    fn of(connections: u32) -> Self {
        let readers = connections.max(MIN_CONNECTIONS) - OTHER_CONNECTIONS;
        let public = readers / 2;
        Self {
            relay: readers - public,
            public,
        }
    }
}

/// When a commit must be safe from a power failure.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Commit {
    /// Before it returns: for what only the database knows, such as an operator's decision.
    Synced,
    /// Some time after, in the order of commits: for what the log can restore.
    Ordered,
}

/// An open database of either kind.
pub(super) enum Database {
    Postgres(PostgresDatabase),
    Sqlite(SqliteDatabase),
}

pub(super) struct PostgresDatabase {
    write: PgPool,
    relay: PgPool,
    public: PgPool,
    pub(super) epoch: Epoch,
    pub(super) options: Box<PgConnectOptions>,
    /// As an operator knows it.
    pub(super) name: String,
}

pub(super) struct SqliteDatabase {
    write: SqlitePool,
    relay: SqlitePool,
    public: SqlitePool,
    /// The file, where it may be written.
    pub(super) path: Option<PathBuf>,
    /// As an operator knows it.
    name: String,
}

impl Database {
    /// Opens what the URL names, with so many connections at most, and brings its schema up to date.
    pub(super) async fn open(url: &str, connections: u32) -> Result<Self, StoreError> {
        let readers = Readers::of(connections);
        if url.starts_with("postgres://") || url.starts_with("postgresql://") {
            return Ok(Self::Postgres(PostgresDatabase::open(url, readers).await?));
        }
        if url.starts_with("sqlite:") {
            return Ok(Self::Sqlite(SqliteDatabase::open(url, readers).await?));
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
                db.relay.close().await;
                db.public.close().await;
            }
            // The writer last: the last connection to go empties and removes the WAL file.
            Self::Sqlite(db) => {
                db.relay.close().await;
                db.public.close().await;
                db.write.close().await;
            }
        }
    }

    /// As an operator knows it.
    pub(super) fn name(&self) -> &str {
        match self {
            Self::Postgres(db) => &db.name,
            Self::Sqlite(db) => &db.name,
        }
    }

    /// Why no connection can be made: the pools try again until their time is over, and hide it. `None` where one can.
    pub(super) async fn reason_of_absence(&self) -> Option<String> {
        let Self::Postgres(db) = self else {
            return None;
        };
        match connect(&db.options, LOOK_TIMEOUT).await {
            Ok(connection) => {
                // If the server is closing, the next use reports it.
                let _ = connection.close().await;
                None
            }
            Err(error) => Some(describe(&error)),
        }
    }
}

/// Connects without a pool, within a time.
async fn connect(
    options: &PgConnectOptions,
    within: Duration,
) -> Result<PgConnection, sqlx::Error> {
    tokio::time::timeout(within, PgConnection::connect_with(options))
        .await
        .unwrap_or_else(|_| {
            Err(sqlx::Error::Io(std::io::Error::other(format!(
                "no answer within {} s",
                within.as_secs()
            ))))
        })
}

impl PostgresDatabase {
    async fn open(url: &str, readers: Readers) -> Result<Self, StoreError> {
        let options = PgConnectOptions::from_str(url)
            .map_err(|error| StoreError::Url {
                reason: configuration_reason(&error),
            })?
            .application_name("atproto-relay");
        let name = postgres_name(&options);
        // One plain connection first: a pool would try again until its timeout and hide the reason.
        let classify =
            |database: &str, error: &sqlx::Error| from_postgres(database, &options, error);
        let mut first = connect(&options, CONNECT_TIMEOUT)
            .await
            .map_err(|error| classify(&name, &error))?;
        let migrations = migrator(POSTGRES);
        bring_up_to_date(&mut first, migrations, &name, classify).await?;
        let pool = |connections, setting: &'static str| {
            PoolOptions::<Postgres>::new()
                .max_connections(connections)
                .acquire_timeout(ACQUIRE_TIMEOUT)
                .after_connect(move |connection, _| {
                    Box::pin(async move { connection.execute(setting).await.map(drop) })
                })
                .connect_lazy_with(options.clone())
        };
        let database = Self {
            write: pool(1, KEEPALIVES),
            relay: pool(readers.relay, KEEPALIVES),
            public: pool(readers.public, PUBLIC_STATEMENT_TIMEOUT),
            epoch: Epoch::default(),
            options: Box::new(options),
            name,
        };
        // If the server is closing, the first use reports it.
        let _ = first.close().await;
        Ok(database)
    }

    pub(super) fn reader(&self, reader: Reader) -> &PgPool {
        match reader {
            Reader::Relay => &self.relay,
            Reader::Public => &self.public,
        }
    }

    /// The writing connection.
    pub(super) async fn writer(
        &self,
        commit: Commit,
    ) -> Result<PoolConnection<Postgres>, sqlx::Error> {
        let mut connection = self.write.acquire().await?;
        let setting = match commit {
            Commit::Synced => "SET synchronous_commit TO on",
            Commit::Ordered => "SET synchronous_commit TO off",
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

/// Why a URL was refused. The driver's text may quote parts of the URL, so only its kind is shown.
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
    async fn open(url: &str, readers: Readers) -> Result<Self, StoreError> {
        let (path, read_only) = sqlite_path(url)?;
        let name = format!("the SQLite database {}", path.display());
        if !read_only {
            create_private(&path, &name)?;
        }
        let options = SqliteConnectOptions::new()
            .filename(&path)
            .read_only(read_only)
            .busy_timeout(BUSY_TIMEOUT)
            .synchronous(SqliteSynchronous::Normal);
        let writing = if read_only {
            options
        } else {
            options.journal_mode(SqliteJournalMode::Wal)
        };
        let mut first = SqliteConnection::connect_with(&writing)
            .await
            .map_err(|error| from_sqlite(&name, &error))?;
        let migrations = migrator(SQLITE);
        bring_up_to_date(&mut first, migrations, &name, from_sqlite).await?;
        let pool = |connections, options: SqliteConnectOptions| {
            PoolOptions::<Sqlite>::new()
                .max_connections(connections)
                .acquire_timeout(ACQUIRE_TIMEOUT)
                .test_before_acquire(false)
                .idle_timeout(None)
                .max_lifetime(None)
                .connect_lazy_with(options)
        };
        let reading = writing.clone().pragma("query_only", "ON");
        let database = Self {
            public: pool(readers.public, reading.clone()),
            relay: pool(
                readers.relay,
                reading.pragma("cache_size", SQLITE_CACHE_KIB),
            ),
            write: pool(1, writing.pragma("cache_size", SQLITE_CACHE_KIB)),
            path: (!read_only).then_some(path),
            name: name.clone(),
        };
        first
            .close()
            .await
            .map_err(|error| from_sqlite(&name, &error))?;
        Ok(database)
    }

    pub(super) fn reader(&self, reader: Reader) -> &SqlitePool {
        match reader {
            Reader::Relay => &self.relay,
            Reader::Public => &self.public,
        }
    }

    /// The writing connection.
    pub(super) async fn writer(
        &self,
        commit: Commit,
    ) -> Result<PoolConnection<Sqlite>, sqlx::Error> {
        let mut connection = self.write.acquire().await?;
        let setting = match commit {
            Commit::Synced => "PRAGMA synchronous = FULL",
            Commit::Ordered => "PRAGMA synchronous = NORMAL",
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
    ($store:expr, $doing:expr, $pool:ident => $body:expr) => {{
        let outcome = match &*$store.database {
            $crate::store::database::Database::Postgres(db) => {
                let $pool = db.reader($store.reader);
                $body
            }
            $crate::store::database::Database::Sqlite(db) => {
                let $pool = db.reader($store.reader);
                $body
            }
        };
        $store.answered($doing, outcome).await
    }};
}

/// Runs the same block in a transaction of either database, and commits it when the block's result
/// is `Ok`. The block sees the connection as `$conn`. A connection that failed is not used again. A relay that lost the
/// database to another one writes nothing.
macro_rules! writing {
    ($store:expr, $commit:expr, $doing:expr, $conn:ident => $body:expr) => {
        match &*$store.database {
            $crate::store::database::Database::Postgres(db) => {
                $crate::store::database::writing!(
                    @in $store, db, "BEGIN", $commit, $doing, $conn =>
                    db.epoch.check(&mut *$conn).await,
                    $body
                )
            }
            // Immediate: a transaction that reads first must not find the file locked when it writes. The lock of the
            // file beside the database is never lost.
            $crate::store::database::Database::Sqlite(db) => {
                $crate::store::database::writing!(
                    @in $store, db, "BEGIN IMMEDIATE", $commit, $doing, $conn => Ok(true), $body
                )
            }
        }
    };
    (@in $store:expr, $db:ident, $begin:literal, $commit:expr, $doing:expr, $conn:ident => $check:expr, $body:expr) => {
        async {
            use sqlx::Connection as _;
            let acquired = $db.writer($commit).await;
            let mut connection = $store.answered($doing, acquired).await?;
            let outcome = async {
                let mut transaction = connection.begin_with($begin).await.doing($doing)?;
                let result = {
                    let $conn = &mut *transaction;
                    let ours: Result<bool, sqlx::Error> = $check;
                    if !ours.doing($doing)? {
                        return Err($store.taken_over());
                    }
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
        }
        .await
    };
}

pub(super) use {reading, writing};
