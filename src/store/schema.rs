//! The schema brought up to date, and the rule for upgrade and rollback: migrations are additive, so that the previous
//! release runs on tables that the next one changed. The level in the tables says when a change was none of that kind.

use super::error::{StoreError, from_migration};
use crate::telemetry::metrics;
use sqlx::migrate::{Migrate, Migrator};
use sqlx::postgres::PgConnection;
use sqlx::sqlite::SqliteConnection;
use std::time::Duration;
use tokio::time::{MissedTickBehavior, interval};

/// The level that this release knows. A migration that the releases before it cannot bear raises it here, and in the
/// table `schema_level` together with the release.
const LEVEL: i32 = 1;

/// How often systemd is told that a long migration goes on: well within the time that a step of recovery is given.
const PROGRESS: Duration = Duration::from_secs(1);

/// How often it is told at most: half an hour, ten times what the largest table takes. A migration that waits for
/// somebody's lock is to be ended at last.
const PROGRESS_TIMES: usize = 30 * 60;

/// What the tables demand of a release.
pub(super) struct Level {
    level: i32,
    release: String,
}

/// A database whose tables may have a level.
pub(super) trait Levelled: Migrate {
    /// The level of the tables; `None` before the migration that introduced it.
    async fn level(&mut self) -> Result<Option<Level>, sqlx::Error>;
}

/// Reads the level, where the query finds its table.
macro_rules! level {
    ($connection:ty, $table:literal) => {
        impl Levelled for $connection {
            async fn level(&mut self) -> Result<Option<Level>, sqlx::Error> {
                let (there,): (bool,) = sqlx::query_as($table).fetch_one(&mut *self).await?;
                if !there {
                    return Ok(None);
                }
                let (level, release) = sqlx::query_as("SELECT level, release FROM schema_level")
                    .fetch_one(&mut *self)
                    .await?;
                Ok(Some(Level { level, release }))
            }
        }
    };
}

level!(
    PgConnection,
    "SELECT to_regclass('schema_level') IS NOT NULL"
);
level!(
    SqliteConnection,
    "SELECT EXISTS (SELECT 1 FROM sqlite_master WHERE type = 'table' AND name = 'schema_level')"
);

/// Applies the migrations that are missing. Those of later releases stay, where the level allows it.
pub(super) async fn bring_up_to_date<C: Levelled>(
    connection: &mut C,
    mut migrator: Migrator,
    database: &str,
    classify: impl Fn(&str, &sqlx::Error) -> StoreError,
) -> Result<(), StoreError> {
    let level = connection.level().await;
    let level = level.map_err(|error| classify(database, &error))?;
    if let Some(Level { release, .. }) = level.as_ref().filter(|found| found.level > LEVEL) {
        return Err(StoreError::Newer {
            database: database.to_owned(),
            release: release.clone(),
        });
    }
    // Without a level, what is unknown here is not this relay's.
    migrator.set_ignore_missing(level.is_some());
    let work = migrator.run_direct(None, connection, false);
    tokio::pin!(work);
    let mut ticks = interval(PROGRESS);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    ticks.tick().await;
    for _ in 0..PROGRESS_TIMES {
        tokio::select! {
            done = &mut work => return done.map_err(|error| from_migration(database, error, classify)),
            _ = ticks.tick() => metrics().recovery_steps.inc(),
        }
    }
    let done = work.await;
    done.map_err(|error| from_migration(database, error, classify))
}
