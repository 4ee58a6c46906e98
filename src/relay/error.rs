//! Why a relay did not start.

use std::io;

use super::RecoveryError;
use crate::eventlog::LogError;
use crate::store::StoreError;

/// Why a relay did not start. Each is one line for the operator: what, where, what to do.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// A listener.
    #[error("cannot listen on {address} ({what}): {source}; choose another address with --{flag}")]
    Listen {
        address: String,
        what: &'static str,
        flag: &'static str,
        source: io::Error,
    },
    /// A listener that systemd opened.
    #[error("cannot serve a socket that systemd passed: {0}; look at the socket units")]
    Given(io::Error),
    /// The data folder.
    #[error(
        "cannot create the data folder {folder}: {source}; create it, make room for it, or choose another with --data-dir"
    )]
    DataFolder { folder: String, source: io::Error },
    /// The event log.
    #[error(transparent)]
    Log(#[from] LogError),
    /// The database.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The log and the database do not fit.
    #[error(transparent)]
    Recovery(#[from] RecoveryError),
    /// A configured host.
    #[error("host {host:?}: {reason}")]
    Host { host: String, reason: String },
    /// Threads.
    #[error("cannot start a thread: {0}")]
    Thread(io::Error),
}
