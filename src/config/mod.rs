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
use crate::dial::{DomainPattern, PdsHost};
use crate::store::Validation;
use crate::telemetry::LogFormat;
use crate::verify::{DesyncLimits, Places};
use crate::{discovery, eventlog, identity};

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
/// More shards than this are a typing error, not a machine.
pub const MAX_SHARDS: usize = 1024;

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
    pub hosts: Vec<PdsHost>,
    /// Allow loopback and private addresses, plain http and ports other than 80 and 443.
    pub allow_private_hosts: bool,
    /// Password of the admin API (user `admin`); `None` turns the admin API off.
    pub admin_password: Option<Secret>,
    /// How strictly commits are checked where the host has no setting of its own.
    pub validation: Validation,
    /// Who may add hosts, and how many.
    pub discovery: discovery::Settings,
    /// Hosts that get [`HostLimits::trusted_accounts`] and the limits that follow from it.
    pub trusted_domains: Vec<DomainPattern>,
    /// Domains whose hosts (and their subdomains) are never subscribed to.
    pub banned_domains: Vec<DomainPattern>,
    /// Threads that verify events.
    pub shards: usize,
    /// Memory for the state of resident accounts, in bytes.
    pub account_cache_bytes: u64,
    /// The event log.
    pub log: eventlog::Settings,
    /// Consumers of the firehose at one time.
    pub max_consumers: usize,
    /// Consumers of the firehose from one address (one /64 for IPv6, four times as many of one /48) at one time.
    pub max_consumers_per_ip: usize,
    /// Bytes a second that a consumer may send.
    pub max_consumer_input: u64,
    /// Account quota and rates of a host that has none of its own.
    pub host_limits: HostLimits,
    /// Largest `#identity` or `#account` frame, in bytes.
    pub account_event_bytes: u64,
    /// Longest time from the first byte of a host's message to its last.
    pub message_time: Duration,
    /// Memory for what hosts have under way.
    pub memory: MemoryLimits,
    /// How often an account's chain may break before the account is throttled.
    pub desync: DesyncLimits,
    /// Identity cache and directory.
    pub identity: identity::Settings,
    /// Look-ups at a time.
    pub lookups: Places,
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
            validation: Validation::Strict,
            discovery: discovery::Settings::default(),
            trusted_domains: vec![
                DomainPattern::trusted("*.host.bsky.network").expect("a constant pattern parses"),
            ],
            banned_domains: Vec::new(),
            shards: default_shards(),
            account_cache_bytes: 512 * 1024 * 1024,
            log: eventlog::Settings::default(),
            max_consumers: 1_000,
            max_consumers_per_ip: 50,
            max_consumer_input: 64 * 1024,
            host_limits: HostLimits::default(),
            account_event_bytes: DEFAULT_ACCOUNT_EVENT_BYTES,
            message_time: Duration::from_secs(30),
            memory: MemoryLimits::default(),
            desync: DesyncLimits::default(),
            identity: identity::Settings::default(),
            lookups: Places::default(),
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

    /// Whether a host is one of the trusted domains.
    pub fn is_trusted(&self, host: &PdsHost) -> bool {
        matches_any(&self.trusted_domains, host)
    }

    /// Whether a host is under a domain banned by configuration.
    pub fn is_banned(&self, host: &PdsHost) -> bool {
        matches_any(&self.banned_domains, host)
    }

    /// The account quota a new host starts with.
    pub fn default_account_limit(&self, host: &PdsHost) -> u64 {
        if self.is_trusted(host) {
            self.host_limits.trusted_accounts
        } else {
            self.host_limits.accounts
        }
    }
}

fn matches_any(patterns: &[DomainPattern], host: &PdsHost) -> bool {
    patterns
        .iter()
        .any(|pattern| pattern.matches(host.domain()))
}

/// One shard per core the process may use.
fn default_shards() -> usize {
    std::thread::available_parallelism().map_or(1, |n| n.get().min(MAX_SHARDS))
}

/// Default of [`Config::account_event_bytes`]: the longest DID (2,048 bytes) and handle (253), and as much again for
/// fields that are to come.
pub const DEFAULT_ACCOUNT_EVENT_BYTES: u64 = 8 * 1024;

/// Account quota and rates of a host, with the reference relay's defaults.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct HostLimits {
    /// Active accounts of a host; the accounts over it are `throttled`.
    pub accounts: u64,
    /// The same for hosts of [`Config::trusted_domains`].
    pub trusted_accounts: u64,
    /// Events per second.
    pub per_second: Rate,
    /// Events per hour.
    pub per_hour: Rate,
    /// Events per 24 hours.
    pub per_day: Rate,
    /// Bytes per hour.
    pub bytes_per_hour: Rate,
    /// Pings, pongs and texts per second.
    pub others_per_second: u64,
}

impl Default for HostLimits {
    fn default() -> HostLimits {
        HostLimits {
            accounts: 100,
            trusted_accounts: 10_000_000,
            per_second: Rate {
                base: 50.0,
                per_account: 0.001,
            },
            per_hour: Rate {
                base: 2_500.0,
                per_account: 1.0,
            },
            per_day: Rate {
                base: 20_000.0,
                per_account: 10.0,
            },
            // Ten times what the events of an hour have at the network's average of some 8 kB, and more.
            bytes_per_hour: Rate {
                base: 200_000_000.0,
                per_account: 100_000.0,
            },
            others_per_second: 20,
        }
    }
}

/// How much memory the frames of hosts may take, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MemoryLimits {
    /// For each host: of events on their way, and once more of a message whose end has not come.
    pub per_host: usize,
    /// For all hosts together: what does not fit into their own shares.
    pub shared: usize,
    /// For all hosts together, in equal parts: events that wait for a look-up.
    pub parked: usize,
}

impl Default for MemoryLimits {
    fn default() -> MemoryLimits {
        MemoryLimits {
            per_host: 64 * 1024,
            shared: 256 * 1024 * 1024,
            parked: 256 * 1024 * 1024,
        }
    }
}

impl MemoryLimits {
    /// The most that frames of so many hosts take, whatever the hosts send.
    pub fn bound(&self, hosts: usize) -> usize {
        // Of events on their way, of a message that is not whole, and of events that are parked.
        3 * hosts * self.per_host + self.shared + self.parked
    }
}

/// A limit that grows with the number of a host's accounts.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Rate {
    /// Allowed to a host without accounts.
    pub base: f64,
    /// More for each account.
    pub per_account: f64,
}

impl Rate {
    /// Allowed to a host with this many accounts.
    pub fn for_accounts(&self, accounts: u64) -> f64 {
        self.base + self.per_account * accounts as f64
    }
}
