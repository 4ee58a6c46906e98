//! `log`: the event log of a data folder, for operators: what is in it, whether it is whole, and how it is
//! repaired. All but `repair` and `abandon` run beside a relay, take no lock and change nothing.

mod abandon;
mod dump;
mod info;
mod repair;
mod verify;

use std::path::{Path, PathBuf};

use clap::{Args, Subcommand, ValueHint};

use atproto_relay::config::{Config, Environment, Flags};
use atproto_relay::eventlog::{Folder, LogError};

use super::failure::Failure;
use super::progress::Progress;

pub const LONG_ABOUT: &str = "\
Looks into the event log of a data folder. `info`, `verify` and `dump` change nothing and may run while a relay \
uses the folder; `repair` and `abandon` refuse to then.";

#[derive(Subcommand)]
pub enum LogCommand {
    /// What the log holds: window, events, bytes
    #[command(after_help = info::EXAMPLES)]
    Info(info::InfoArgs),
    /// Check every entry and every frame; exit code 1 where one is not as it should be
    #[command(after_help = verify::EXAMPLES)]
    Verify(verify::VerifyArgs),
    /// Print events, one JSON object a line, or their frames as they lie
    #[command(after_help = dump::EXAMPLES)]
    Dump(dump::DumpArgs),
    /// Repair a log: rebuild indexes from frames, cut a torn tail, mark lost events
    #[command(after_help = repair::EXAMPLES)]
    Repair(repair::RepairArgs),
    /// Begin a new log in place of a lost one, above every sequence number that the database knows
    #[command(long_about = abandon::LONG_ABOUT, after_help = abandon::EXAMPLES)]
    Abandon(abandon::AbandonArgs),
}

pub fn run(command: &LogCommand) -> Result<(), Failure> {
    match command {
        LogCommand::Info(args) => info::run(args),
        LogCommand::Verify(args) => verify::run(args),
        LogCommand::Dump(args) => dump::run(args),
        LogCommand::Repair(args) => repair::run(args),
        LogCommand::Abandon(args) => abandon::run(args),
    }
}

/// Which log: the one that `serve` with the same flags, environment and file uses.
#[derive(Args)]
pub struct FolderArgs {
    /// Data folder of the relay, or a log's own folder [default: ./data] [env: RELAY_DATA_DIR]
    #[arg(long, value_name = "FOLDER", value_hint = ValueHint::DirPath)]
    data_dir: Option<String>,
    /// TOML file that names the data folder [env: RELAY_CONFIG]
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath)]
    config: Option<PathBuf>,
}

impl FolderArgs {
    /// Opens the log to look into it.
    fn open(&self) -> Result<Folder, Failure> {
        let data_dir = self.data_dir()?;
        open(&data_dir).map_err(Failure::failed)
    }

    fn data_dir(&self) -> Result<PathBuf, Failure> {
        let mut flags = Flags {
            config: self.config.clone(),
            ..Flags::default()
        };
        if let Some(folder) = &self.data_dir {
            flags.settings.insert("data_dir", vec![folder.clone()]);
        }
        let loaded = Config::load(&flags, &Environment::current())?;
        for warning in loaded.warnings {
            eprintln!("warning: {warning}");
        }
        Ok(loaded.config.data_dir)
    }
}

/// The log in a data folder, or in the folder itself, as that of a copy.
fn open(data_dir: &Path) -> Result<Folder, LogError> {
    let config = Config {
        data_dir: data_dir.to_owned(),
        ..Config::default()
    };
    match Folder::open(&config.log_dir()) {
        Err(LogError::NoFolder(_)) => Folder::open(data_dir),
        other => other,
    }
}

/// Does work of so many steps, with a progress line where it takes long.
fn with_progress<T>(
    message: &str,
    steps: usize,
    work: impl FnOnce(&Progress) -> T,
) -> Result<T, Failure> {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .enable_time()
        .build()
        .map_err(|error| Failure::Failed(format!("cannot start the runtime: {error}")))?;
    let _entered = runtime.enter();
    Ok(work(&Progress::steps(message, steps as u64)))
}

/// `1.4 GB`, for people.
fn size(bytes: u64) -> String {
    const UNITS: [&str; 5] = ["B", "kB", "MB", "GB", "TB"];
    let mut value = bytes as f64;
    let mut unit = 0;
    while value >= 1000.0 && unit + 1 < UNITS.len() {
        value /= 1000.0;
        unit += 1;
    }
    match unit {
        0 => format!("{bytes} B"),
        _ => format!("{value:.1} {}", UNITS[unit]),
    }
}

#[cfg(test)]
mod tests {
    use super::size;

    #[test]
    fn sizes_have_one_digit_behind_the_point() {
        for (bytes, text) in [
            (0, "0 B"),
            (999, "999 B"),
            (1_000, "1.0 kB"),
            (1_450_000_000, "1.4 GB"),
            (u64::MAX, "18446744.1 TB"),
        ] {
            assert_eq!(size(bytes), text);
        }
    }
}
