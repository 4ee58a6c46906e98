//! One relay at a time on a database: a hold that ends with the process, however that ends.
//! On PostgreSQL it is an advisory lock of a session of its own, on SQLite a lock on a file beside the database.

use std::fs::{File, OpenOptions};
use std::io::{Read as _, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;
use std::time::Duration;

use rustix::fs::{FlockOperation, flock};
use sqlx::postgres::PgConnectOptions;
use sqlx::{Connection as _, PgConnection};
use tokio::time::{Instant, sleep};

use super::Store;
use super::database::Database;
use super::error::{Doing, StoreError};

/// The advisory lock's key; such locks count within one database.
const KEY: i64 = i64::from_be_bytes(*b"at-relay");
/// How long a relay that was killed a moment ago may still seem to be there: its server notices within milliseconds.
const GRACE: Duration = Duration::from_secs(3);
const GRACE_LOOK: Duration = Duration::from_millis(50);
/// How often the session is looked at, and the wait before a server that is away is tried again.
const LOOK: Duration = Duration::from_secs(5);
const AGAIN: Duration = Duration::from_millis(500);
/// Lets the server notice within a minute that the machine of a relay is gone.
const KEEPALIVES: &str =
    "SET tcp_keepalives_idle = 30; SET tcp_keepalives_interval = 10; SET tcp_keepalives_count = 3";
const DOING: &str = "taking the database for this relay";

/// The hold on a database, given up when dropped.
pub struct Hold(Kind);

enum Kind {
    Postgres(Session),
    Sqlite(#[expect(dead_code, reason = "held for its lock")] FileLock),
    /// A database that this process only reads.
    None,
}

struct Session {
    options: Box<PgConnectOptions>,
    database: String,
    connection: PgConnection,
    backend: i32,
}

struct FileLock(File);

impl Drop for FileLock {
    fn drop(&mut self) {
        // Closing alone would leave the lock to a child process that is just being started.
        let _ = flock(&self.0, FlockOperation::Unlock);
    }
}

impl Store {
    /// Takes the database for this relay alone.
    ///
    /// # Errors
    /// [`StoreError::InUse`] while another relay has it.
    pub async fn hold(&self) -> Result<Hold, StoreError> {
        Ok(Hold(match &*self.database {
            Database::Postgres(db) => {
                Kind::Postgres(Session::begin(db.options.clone(), db.name.clone()).await?)
            }
            Database::Sqlite(db) => match &db.path {
                Some(path) => Kind::Sqlite(lock_beside(path)?),
                None => Kind::None,
            },
        }))
    }
}

impl Hold {
    /// Keeps the hold, also over a restart of the database's server. Ends only where another relay was faster.
    pub async fn keep(mut self) -> StoreError {
        let Kind::Postgres(session) = &mut self.0 else {
            return std::future::pending().await;
        };
        loop {
            sleep(LOOK).await;
            if session.connection.ping().await.is_ok() {
                continue;
            }
            loop {
                match session.again().await {
                    Ok(()) => break,
                    Err(error @ StoreError::InUse { .. }) => return error,
                    Err(error) => {
                        tracing::debug!(%error, "the hold on the database is not back yet")
                    }
                }
                sleep(AGAIN).await;
            }
        }
    }
}

impl Session {
    async fn begin(
        options: Box<PgConnectOptions>,
        database: String,
    ) -> Result<Session, StoreError> {
        let mut connection = PgConnection::connect_with(&options).await.doing(DOING)?;
        sqlx::raw_sql(KEEPALIVES)
            .execute(&mut connection)
            .await
            .doing(DOING)?;
        let deadline = Instant::now() + GRACE;
        loop {
            let (got, backend): (bool, i32) =
                sqlx::query_as("SELECT pg_try_advisory_lock($1), pg_backend_pid()")
                    .bind(KEY)
                    .fetch_one(&mut connection)
                    .await
                    .doing(DOING)?;
            if got {
                return Ok(Session {
                    options,
                    database,
                    connection,
                    backend,
                });
            }
            if Instant::now() >= deadline {
                let owner = holder(&mut connection).await?;
                return Err(StoreError::InUse { database, owner });
            }
            sleep(GRACE_LOOK).await;
        }
    }

    /// Takes the lock once more, from our own session where the server still has that.
    async fn again(&mut self) -> Result<(), StoreError> {
        let mut connection = PgConnection::connect_with(&self.options)
            .await
            .doing(DOING)?;
        sqlx::query(
            "SELECT pg_terminate_backend(pid) FROM pg_locks WHERE pid = $1 AND locktype = 'advisory'",
        )
        .bind(self.backend)
        .execute(&mut connection)
        .await
        .doing(DOING)?;
        // What is left of the old session is of no use.
        let _ = connection.close().await;
        *self = Session::begin(self.options.clone(), self.database.clone()).await?;
        Ok(())
    }
}

/// The session that has the lock, as an operator finds it.
async fn holder(connection: &mut PgConnection) -> Result<String, StoreError> {
    let found: Option<(i32, Option<String>)> = sqlx::query_as(
        "SELECT l.pid, host(a.client_addr) FROM pg_locks l JOIN pg_stat_activity a ON a.pid = l.pid \
         WHERE l.locktype = 'advisory' AND l.granted AND l.objsubid = 1 \
         AND (l.classid::int8 << 32) + l.objid::int8 = $1 AND l.database = \
         (SELECT oid FROM pg_database WHERE datname = current_database())",
    )
    .bind(KEY)
    .fetch_optional(connection)
    .await
    .doing(DOING)?;
    Ok(match found {
        None => String::new(),
        Some((pid, None)) => format!(" (session {pid})"),
        Some((pid, Some(address))) => format!(" (session {pid}, from {address})"),
    })
}

/// Locks a file beside an SQLite database: SQLite's own locks on the database would end with any other handle to it.
fn lock_beside(path: &Path) -> Result<FileLock, StoreError> {
    let name = format!("the SQLite database {}", path.display());
    let mut lock = path.as_os_str().to_owned();
    lock.push(".lock");
    let failed = |error: std::io::Error| StoreError::Open {
        database: name.clone(),
        reason: error.to_string(),
    };
    let mut file = OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .open(&lock)
        .map_err(failed)?;
    match flock(&file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => {}
        Err(rustix::io::Errno::WOULDBLOCK) => {
            let mut pid = String::new();
            // The process id is a courtesy.
            let _ = file.read_to_string(&mut pid);
            let owner = match pid.trim() {
                "" => String::new(),
                pid => format!(" (process {pid})"),
            };
            return Err(StoreError::InUse {
                database: name,
                owner,
            });
        }
        Err(error) => return Err(failed(error.into())),
    }
    let _ = file
        .set_len(0)
        .and_then(|()| writeln!(file, "{}", std::process::id()));
    Ok(FileLock(file))
}
