//! The schema brought up to date, and the rule for upgrade and rollback: migrations are additive, so that the previous
//! release runs on tables that the next one changed. The level in the tables marks a change that was not additive.

use super::error::{StoreError, from_migration};
use crate::telemetry::metrics;
use sqlx::SqlStr;
use sqlx::migrate::{Migrate, Migration, MigrationType, Migrator};
use sqlx::postgres::PgConnection;
use sqlx::sqlite::SqliteConnection;
use std::time::Duration;
use tokio::time::{MissedTickBehavior, interval};

/// The level that this release knows. A migration that the releases before it cannot bear raises it here, and in the
/// table `schema_level` together with the release.
const LEVEL: i32 = 1;

/// How often progress of a long migration is reported to systemd: well within the time limit of a recovery step.
const PROGRESS: Duration = Duration::from_secs(1);

/// Most reports: half an hour, ten times what the largest table takes. A migration that waits for another session's lock must
/// time out at some point.
const PROGRESS_TIMES: usize = 30 * 60;

/// The migrations of a database, by number and name.
pub(super) type Migrations = &'static [(i64, &'static str, &'static str)];

/// The files of `migrations/`, in order.
macro_rules! migrations {
    ($database:literal: $($number:literal $name:literal),* $(,)?) => {
        &[$(($number, $name, include_str!(concat!(
            "../../migrations/", $database, "/000", $number, "_", $name, ".sql"
        )))),*]
    };
}

pub(super) const POSTGRES: Migrations = migrations!("postgres":
    1 "hosts_accounts_bans",
    2 "renumbered_hosts_and_head",
    3 "level_epoch_collation",
    4 "counted_accounts",
    5 "bytes_per_hour",
    6 "views",
);

pub(super) const SQLITE: Migrations = migrations!("sqlite":
    1 "hosts_accounts_bans",
    2 "renumbered_hosts_and_head",
    3 "level",
    4 "counted_accounts",
    5 "bytes_per_hour",
    6 "views",
);

/// As sqlx applies them. Its own macro would read the folder, and compiles both databases twice for that.
pub(super) fn migrator(migrations: Migrations) -> Migrator {
    let migrations = migrations.iter().map(|&(number, name, sql)| {
        let name = name.replace('_', " ").into();
        let sql = SqlStr::from_static(sql);
        Migration::new(number, name, MigrationType::Simple, sql, false)
    });
    Migrator::with_migrations(migrations.collect())
}

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

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    #[test]
    fn every_file_of_the_folder_is_applied() {
        for (database, listed) in [("postgres", POSTGRES), ("sqlite", SQLITE)] {
            let folder = format!("{}/migrations/{database}", env!("CARGO_MANIFEST_DIR"));
            let files: BTreeSet<String> = std::fs::read_dir(folder)
                .unwrap()
                .map(|file| file.unwrap().file_name().into_string().unwrap())
                .collect();
            let listed: BTreeSet<String> = listed
                .iter()
                .map(|(number, name, _)| format!("{number:04}_{name}.sql"))
                .collect();
            assert_eq!(files, listed);
        }
    }
}
