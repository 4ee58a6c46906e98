//! One relay at a time on a database: a hold that ends with the process, however that ends.
//! On PostgreSQL it is an advisory lock of a session of its own, and an epoch in the database: a relay that lost its
//! session and was followed by another one writes nothing more. On SQLite it is a lock on a file beside the database.

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
use super::database::{Database, KEEPALIVES};
use super::epoch::Epoch;
use super::error::{Doing, StoreError};
use super::record::record;

/// The advisory lock's key; such locks count within one database.
const KEY: i64 = i64::from_be_bytes(*b"at-relay");
/// How long a relay that was killed a moment ago may still seem to be there: its server notices within milliseconds.
const GRACE: Duration = Duration::from_secs(3);
const GRACE_LOOK: Duration = Duration::from_millis(50);
/// How often the session is checked, and the pause before an unreachable server is tried again.
const LOOK: Duration = Duration::from_secs(5);
const AGAIN: Duration = Duration::from_millis(500);
/// How long a relay that takes the database waits for a write of the relay before it.
const LAST_WRITE: &str = "SET lock_timeout = '60s'";
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
    backend: Backend,
    epoch: Epoch,
}

record! {
    /// A session of the server. Process ids alone come again, after a restart of the server at the latest.
    #[derive(Clone, Copy)]
    struct Backend {
        pid: i32,
        /// Microseconds.
        started: i64,
    }
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
                let mut session =
                    Session::begin(db.options.clone(), db.name.clone(), db.epoch.clone()).await?;
                let begun = db.epoch.begin(&mut session.connection).await;
                begun.doing(DOING)?;
                Kind::Postgres(session)
            }
            Database::Sqlite(db) => match &db.path {
                Some(path) => Kind::Sqlite(lock_beside(path)?),
                None => Kind::None,
            },
        }))
    }
}

impl Hold {
    /// Keeps the hold, also over a restart of the database's server. Ends only where another relay has, or had, the
    /// database.
    pub async fn keep(mut self) -> StoreError {
        let Kind::Postgres(session) = &mut self.0 else {
            return std::future::pending().await;
        };
        let epoch = session.epoch.clone();
        tokio::select! {
            lost = session.keep() => lost,
            () = epoch.lost() => session.taken_over(),
        }
    }
}

impl Session {
    async fn begin(
        options: Box<PgConnectOptions>,
        database: String,
        epoch: Epoch,
    ) -> Result<Session, StoreError> {
        let mut connection = PgConnection::connect_with(&options).await.doing(DOING)?;
        for setting in [KEEPALIVES, LAST_WRITE] {
            sqlx::raw_sql(setting)
                .execute(&mut connection)
                .await
                .doing(DOING)?;
        }
        let backend = sqlx::query_as(
            "SELECT pid, (extract(epoch FROM backend_start) * 1000000)::int8 AS started FROM pg_stat_activity \
             WHERE pid = pg_backend_pid()",
        )
        .fetch_one(&mut connection)
        .await
        .doing(DOING)?;
        let deadline = Instant::now() + GRACE;
        loop {
            let (got,): (bool,) = sqlx::query_as("SELECT pg_try_advisory_lock($1)")
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
                    epoch,
                });
            }
            if Instant::now() >= deadline {
                let owner = holder(&mut connection).await?;
                return Err(StoreError::InUse { database, owner });
            }
            sleep(GRACE_LOOK).await;
        }
    }

    /// Checks the session periodically, and takes the lock again if the session is gone.
    async fn keep(&mut self) -> StoreError {
        loop {
            sleep(LOOK).await;
            if self.connection.ping().await.is_ok() {
                continue;
            }
            loop {
                match self.again().await {
                    Ok(()) => break,
                    Err(error @ (StoreError::InUse { .. } | StoreError::TakenOver { .. })) => {
                        return error;
                    }
                    Err(error) => {
                        tracing::debug!(%error, "the hold on the database is not back yet");
                    }
                }
                sleep(AGAIN).await;
            }
        }
    }

    /// Takes the lock once more, from our own session where the server still has that. Another relay may have come and
    /// gone meanwhile: then what this one knows is old.
    async fn again(&mut self) -> Result<(), StoreError> {
        let mut connection = PgConnection::connect_with(&self.options)
            .await
            .doing(DOING)?;
        sqlx::query(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE pid = $1 \
             AND (extract(epoch FROM backend_start) * 1000000)::int8 = $2",
        )
        .bind(self.backend.pid)
        .bind(self.backend.started)
        .execute(&mut connection)
        .await
        .doing(DOING)?;
        // What is left of the old session is of no use.
        let _ = connection.close().await;
        let (options, database) = (self.options.clone(), self.database.clone());
        let mut session = Session::begin(options, database, self.epoch.clone()).await?;
        let ours = self.epoch.check(&mut session.connection).await;
        if !ours.doing(DOING)? {
            return Err(self.taken_over());
        }
        *self = session;
        Ok(())
    }

    fn taken_over(&self) -> StoreError {
        StoreError::TakenOver {
            database: self.database.clone(),
        }
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
