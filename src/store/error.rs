//! What can go wrong with the database, as sentences for an operator: what happened, to what, and
//! what to do. A password never appears in one.

use sqlx::migrate::MigrateError;
use sqlx::postgres::PgConnectOptions;
use std::error::Error as _;

/// An error of the store.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The URL is not one of a database we know.
    #[error(
        "the database URL is not usable: {reason}; give sqlite:PATH or postgres://user@host/database"
    )]
    Url {
        /// What is wrong with it.
        reason: String,
    },
    /// No server answers.
    #[error("cannot reach {database}: {reason}; start the server, or correct the database URL")]
    Unreachable {
        /// Which, without the password.
        database: String,
        /// The system's error.
        reason: String,
    },
    /// The server does not let us in.
    #[error(
        "{database} refuses the login: {reason}; correct the user or the password in the database URL"
    )]
    Login {
        /// Which, without the password.
        database: String,
        /// The server's error.
        reason: String,
    },
    /// The server has no such database.
    #[error("{database} does not exist; create it with `createdb`, or correct the database URL")]
    NoDatabase {
        /// Which, without the password.
        database: String,
    },
    /// The schema was written by a later version.
    #[error(
        "{database} was changed by a newer version of atproto-relay, and no version before {release} can use it; run \
         {release} or a later one, or restore a backup from before the upgrade"
    )]
    Newer {
        /// Which.
        database: String,
        /// The first release that can use it.
        release: String,
    },
    /// The server lets us in, but not make or change tables.
    #[error("{database} does not let this user make its tables: {reason}; {remedy}")]
    Privilege {
        /// Which.
        database: String,
        /// The server's error.
        reason: String,
        /// What its administrator can do.
        remedy: String,
    },
    /// The schema is not the one its version number promises.
    #[error(
        "{database} has a schema this version of atproto-relay did not make ({reason}); give it a database of its own"
    )]
    Schema {
        /// Which.
        database: String,
        /// What does not fit.
        reason: String,
    },
    /// The disk below the database takes no more.
    #[error(
        "{database} cannot be written: {reason}; make room on its disk, or see what is wrong with it"
    )]
    Disk {
        /// Which.
        database: String,
        /// The system's error.
        reason: String,
    },
    /// The SQLite file cannot be written.
    #[error(
        "{database} cannot be written: {reason}; make the file and its folder writable for this user"
    )]
    ReadOnly {
        /// Which.
        database: String,
        /// The system's error.
        reason: String,
    },
    /// The SQLite file cannot be opened or created.
    #[error(
        "{database} cannot be opened: {reason}; check that the folder exists and belongs to this user"
    )]
    Open {
        /// Which.
        database: String,
        /// The system's error.
        reason: String,
    },
    /// The file holds something else.
    #[error(
        "{database} is not an SQLite database, or is damaged; move the file away or restore it"
    )]
    NotADatabase {
        /// Which.
        database: String,
    },
    /// Another process holds the SQLite file.
    #[error(
        "{database} is locked by another process; stop that process, or give this relay its own data folder"
    )]
    Locked {
        /// Which.
        database: String,
    },
    /// Another relay has the database.
    #[error(
        "{database} is in use by another relay{owner}: stop that one, or give this one a database of its own. If its \
         machine is gone, the server notices within a minute"
    )]
    InUse {
        /// Which.
        database: String,
        /// By whom, as far as it is known.
        owner: String,
    },
    /// Another relay took the database while this one had no session.
    #[error(
        "{database} was taken over by another relay while this one had lost its session: this one writes nothing more \
         and stops; run one relay on a database"
    )]
    TakenOver {
        /// Which.
        database: String,
    },
    /// Too many public reads wait.
    #[error("too many requests wait for the database; try again later")]
    Busy,
    /// A row holds what no version of the relay writes.
    #[error("the database holds {what} in {table}, which is not valid; restore it from a backup")]
    Corrupt {
        /// Where.
        table: &'static str,
        /// What.
        what: String,
    },
    /// There is no such account.
    #[error("the account {0} is not known to this relay")]
    UnknownAccount(String),
    /// There is no such host.
    #[error("the host {0} is not known to this relay")]
    UnknownHost(String),
    /// The writer has stopped, nothing can be handed to it.
    #[error("the database writer has stopped; restart the relay")]
    WriterStopped,
    /// What was still to be written at shutdown did not get through. The log still has it.
    #[error(
        "{rows} changes could not be written to the database before the deadline; they are replayed from the log at the next start"
    )]
    Unwritten {
        /// How many.
        rows: usize,
    },
    /// A statement failed.
    #[error("the database failed while {doing}: {}", describe(.source))]
    Query {
        /// The operation that failed.
        doing: &'static str,
        /// The driver's error.
        #[source]
        source: sqlx::Error,
    },
}

/// Adds the operation that failed to a driver's error.
pub(super) trait Doing<T> {
    fn doing(self, doing: &'static str) -> Result<T, StoreError>;
}

impl<T> Doing<T> for Result<T, sqlx::Error> {
    fn doing(self, doing: &'static str) -> Result<T, StoreError> {
        self.map_err(|source| StoreError::Query { doing, source })
    }
}

/// A driver's error in one line, with the causes it does not show itself.
pub(super) fn describe(error: &sqlx::Error) -> String {
    match error {
        sqlx::Error::Database(inner) => inner.message().to_owned(),
        sqlx::Error::Io(inner) => inner.to_string(),
        sqlx::Error::PoolTimedOut => "no connection became free in time".to_owned(),
        other => match other.source() {
            Some(cause) if !other.to_string().contains(&cause.to_string()) => {
                format!("{other}: {cause}")
            }
            _ => other.to_string(),
        },
    }
}

// PostgreSQL error codes, appendix A of its manual.
const PG_INVALID_PASSWORD: &str = "28P01";
const PG_INVALID_AUTHORIZATION: &str = "28000";
const PG_INVALID_CATALOG: &str = "3D000";
const PG_CANNOT_CONNECT_NOW: &str = "57P03";
const PG_TOO_MANY_CONNECTIONS: &str = "53300";
const PG_READ_ONLY: &str = "25006";
const PG_INSUFFICIENT_PRIVILEGE: &str = "42501";
const PG_DISK_FULL: &str = "53100";

// SQLite primary result codes, https://www.sqlite.org/rescode.html.
const SQLITE_PERM: u32 = 3;
const SQLITE_BUSY: u32 = 5;
const SQLITE_LOCKED: u32 = 6;
const SQLITE_READONLY: u32 = 8;
const SQLITE_IOERR: u32 = 10;
const SQLITE_CORRUPT: u32 = 11;
const SQLITE_FULL: u32 = 13;
const SQLITE_CANTOPEN: u32 = 14;
const SQLITE_NOTADB: u32 = 26;

/// What kept a PostgreSQL database, of that name for this user, from being opened.
pub(super) fn from_postgres(
    database: &str,
    options: &PgConnectOptions,
    error: &sqlx::Error,
) -> StoreError {
    let database = database.to_owned();
    let reason = describe(error);
    let code = error
        .as_database_error()
        .and_then(|e| e.code().map(|c| c.into_owned()));
    match code.as_deref() {
        Some(PG_INVALID_PASSWORD | PG_INVALID_AUTHORIZATION) => {
            StoreError::Login { database, reason }
        }
        Some(PG_INVALID_CATALOG) => StoreError::NoDatabase { database },
        Some(PG_INSUFFICIENT_PRIVILEGE) => StoreError::Privilege {
            database,
            remedy: remedy(options, &reason),
            reason,
        },
        Some(PG_DISK_FULL) => StoreError::Disk { database, reason },
        Some(PG_READ_ONLY) => StoreError::ReadOnly { database, reason },
        Some(PG_CANNOT_CONNECT_NOW | PG_TOO_MANY_CONNECTIONS) | None => {
            StoreError::Unreachable { database, reason }
        }
        Some(_) => StoreError::Schema { database, reason },
    }
}

/// How a user can be allowed to create tables: since PostgreSQL 15, only the owner of the database may in the schema
/// `public`.
fn remedy(options: &PgConnectOptions, reason: &str) -> String {
    let user = options.get_username();
    let database = options.get_database().unwrap_or(user);
    if reason.starts_with("permission denied for schema") {
        format!(
            "as the server's administrator say ALTER DATABASE \"{database}\" OWNER TO \"{user}\", or in that database \
             GRANT CREATE ON SCHEMA public TO \"{user}\""
        )
    } else {
        format!(
            "log in as the owner of its tables, or as the server's administrator say in that database REASSIGN OWNED \
             BY the former owner TO \"{user}\""
        )
    }
}

/// What kept an SQLite database from being opened.
pub(super) fn from_sqlite(database: &str, error: &sqlx::Error) -> StoreError {
    let database = database.to_owned();
    let reason = describe(error);
    let code = error
        .as_database_error()
        .and_then(|e| e.code()?.parse::<u32>().ok())
        .map(|extended| extended & 0xff);
    match code {
        Some(SQLITE_READONLY | SQLITE_PERM) => StoreError::ReadOnly { database, reason },
        Some(SQLITE_FULL | SQLITE_IOERR) => StoreError::Disk { database, reason },
        Some(SQLITE_BUSY | SQLITE_LOCKED) => StoreError::Locked { database },
        Some(SQLITE_NOTADB | SQLITE_CORRUPT) => StoreError::NotADatabase { database },
        Some(SQLITE_CANTOPEN) | None => StoreError::Open { database, reason },
        Some(_) => StoreError::Schema { database, reason },
    }
}

/// What kept the schema from being brought up to date; `classify` reads errors of the connection.
pub(super) fn from_migration(
    database: &str,
    error: MigrateError,
    classify: impl Fn(&str, &sqlx::Error) -> StoreError,
) -> StoreError {
    match error {
        MigrateError::VersionMissing(version) => StoreError::Schema {
            database: database.to_owned(),
            reason: format!("its migration {version} is unknown here"),
        },
        MigrateError::Execute(source) | MigrateError::ExecuteMigration(source, _) => {
            classify(database, &source)
        }
        other => StoreError::Schema {
            database: database.to_owned(),
            reason: other.to_string(),
        },
    }
}
