//! Every setting of the relay, typed, with its default.
//!
//! [`Config::load`] merges flag > environment > file > default and refuses what it does not know.
//! It reads files (the configuration, the admin password, systemd credentials) and the environment
//! it is given; it opens no socket, no database and creates nothing.

mod admin_listen;
mod database_url;
mod error;
mod kinds;
mod load;
mod reload;
mod settings;
mod source;
mod units;

use std::net::{Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

use crate::api::Secret;
use crate::client::Cidr;
use crate::dial::HostName;
use crate::telemetry::LogFormat;
use crate::{discovery, eventlog, firehose, hosts, identity, upstream, verify};

pub use admin_listen::AdminListen;
pub use database_url::DatabaseUrl;
pub use error::{ConfigError, Origin};
pub use load::{Flags, Loaded};
pub use reload::{Change, Reload};
pub use settings::{Group, SecretSource, Setting, Variable, settings};
pub use source::Environment;
pub use units::{format_bytes, format_duration, parse_bytes, parse_duration};

/// The port of the public API, and the reference relay's: consumers expect it.
pub const DEFAULT_API_PORT: u16 = 2470;
/// The port of metrics and health, and the reference relay's.
pub const DEFAULT_METRICS_PORT: u16 = 2471;
/// The database's file name inside [`Config::data_dir`] where no database is named.
pub const SQLITE_FILE: &str = "relay.sqlite";
/// The name of the folder with the log's segments inside [`Config::data_dir`].
pub const LOG_FOLDER: &str = "log";
/// A frame may have 5,000,000 bytes, so a smaller segment could not hold every frame.
pub const MIN_SEGMENT_BYTES: u64 = 8 * 1024 * 1024;
/// Longest `log.group_window`: every event may wait for it.
pub const MAX_GROUP_WINDOW: Duration = Duration::from_secs(1);
/// All settings. `Config::default()` is what runs when nothing is configured; tests and the demo
/// build on it with struct update syntax.
#[derive(Debug, Clone, PartialEq)]
pub struct Config {
    /// Public listener: firehose, XRPC, admin API. Port 0 takes any free port.
    pub listen: SocketAddr,
    /// Listener for `/metrics` and `/_health`. Port 0 takes any free port.
    pub metrics_listen: SocketAddr,
    /// The operator's own listener; `None` leaves the admin API to the public one alone.
    pub admin_listen: Option<AdminListen>,
    /// Peers that are believed about the clients they speak for.
    pub trusted_proxies: Vec<Cidr>,
    /// Folder of the log and, with SQLite, of the database. Created at start.
    pub data_dir: PathBuf,
    /// Database to use; `None` is SQLite in `data_dir` (see [`Config::database_url`]).
    pub database_url: Option<DatabaseUrl>,
    /// Most connections the relay opens to PostgreSQL.
    pub database_connections: u32,
    /// Hosts to subscribe to from the start, added to those in the database.
    pub hosts: Vec<HostName>,
    /// Allow loopback and private addresses, plain http and ports other than 80 and 443.
    pub allow_private_hosts: bool,
    /// Password of the admin API (user `admin`); `None` turns the admin API off.
    pub admin_password: Option<Secret>,
    /// Verification.
    pub verify: verify::Settings,
    /// Who may add hosts, and how many.
    pub discovery: discovery::Settings,
    /// Quotas, rates, trust, bans and memory of hosts.
    pub host_settings: hosts::Settings,
    /// Connections to hosts.
    pub upstream: upstream::Settings,
    /// The event log.
    pub log: eventlog::Settings,
    /// Limits of the firehose.
    pub firehose: firehose::Settings,
    /// Identity cache and directory.
    pub identity: identity::Settings,
    /// Form of the log lines on stderr.
    pub log_format: LogFormat,
    /// `error`, `warn`, `info`, `debug`, `trace`, or tracing directives (`info,atproto_relay::upstream=debug`).
    pub log_level: String,
}

impl Default for Config {
    fn default() -> Config {
        Config {
            listen: (Ipv4Addr::LOCALHOST, DEFAULT_API_PORT).into(),
            metrics_listen: (Ipv4Addr::LOCALHOST, DEFAULT_METRICS_PORT).into(),
            admin_listen: None,
            trusted_proxies: Cidr::loopback(),
            data_dir: PathBuf::from("./data"),
            database_url: None,
            database_connections: 12,
            hosts: Vec::new(),
            allow_private_hosts: false,
            admin_password: None,
            verify: verify::Settings::default(),
            discovery: discovery::Settings::default(),
            host_settings: hosts::Settings::default(),
            upstream: upstream::Settings::default(),
            log: eventlog::Settings::default(),
            firehose: firehose::Settings::default(),
            identity: identity::Settings::default(),
            log_format: LogFormat::Text,
            log_level: "info".to_owned(),
        }
    }
}

impl Config {
    /// The database to open: the configured one, else SQLite inside the data folder.
    pub fn database_url(&self) -> DatabaseUrl {
        self.database_url
            .clone()
            .unwrap_or_else(|| DatabaseUrl::sqlite_in(&self.data_dir))
    }

    /// The folder of the log's segments.
    pub fn log_dir(&self) -> PathBuf {
        self.data_dir.join(LOG_FOLDER)
    }
}
