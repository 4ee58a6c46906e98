//! Every setting of the relay, typed, with its default.
//!
//! [`Config::load`] merges flag > environment > file > default and refuses what it does not know.
//! It reads files (the configuration, the admin password, systemd credentials) and the environment
//! it is given; it opens no socket, no database and creates nothing.

mod admin_listen;
mod cidr;
mod error;
mod host;
mod kinds;
mod load;
mod reload;
mod secret;
mod settings;
mod source;
mod units;

use std::fmt;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use url::Url;

pub use admin_listen::AdminListen;
pub use cidr::Cidr;
pub use error::{ConfigError, Origin};
pub use host::{DomainPattern, HostEntry, HostSyntaxError};
pub(crate) use load::nearest;
pub use load::{Flags, Loaded};
pub use reload::{Change, Reload};
pub use secret::{DatabaseUrl, Secret};
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
/// Fewest connections to the database: one writes, one holds it for this relay, one is made for a look at the server, and
/// there is one for each kind of reader.
pub const MIN_DATABASE_CONNECTIONS: u32 = 5;
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
    /// The PLC directory that resolves `did:plc`.
    pub plc_host: Url,
    /// Hosts to subscribe to from the start, added to those in the database.
    pub hosts: Vec<HostEntry>,
    /// Allow loopback and private addresses, plain http and ports other than 80 and 443.
    pub allow_private_hosts: bool,
    /// Password of the admin API (user `admin`); `None` turns the admin API off.
    pub admin_password: Option<Secret>,
    /// How strictly commits are checked where the host has no setting of its own.
    pub validation: Validation,
    /// Whether the public `requestCrawl` adds hosts.
    pub request_crawl: bool,
    /// New hosts accepted by the public `requestCrawl` in any 24 hours.
    pub new_hosts_per_day: u32,
    /// Those of them that one address (one /64 for IPv6, four times as many of one /48) may ask for.
    pub new_hosts_per_day_per_ip: u32,
    /// Those of them that may be of one registered domain.
    pub new_hosts_per_day_per_domain: u32,
    /// Hosts that are checked at one time because the public asked for them.
    pub max_crawl_checks: u32,
    /// Hosts that get [`HostLimits::trusted_accounts`] and the limits that follow from it.
    pub trusted_domains: Vec<DomainPattern>,
    /// Domains whose hosts (and their subdomains) are never subscribed to.
    pub banned_domains: Vec<DomainPattern>,
    /// Threads that verify events.
    pub shards: usize,
    /// Memory for the state of resident accounts, in bytes.
    pub account_cache_bytes: u64,
    /// How long an event stays in the log for consumers that come back.
    pub replay_window: Duration,
    /// Most bytes the log takes on disk; the oldest segments go first.
    pub log_max_bytes: u64,
    /// Room the log leaves on its file system.
    pub log_min_free: MinFree,
    /// Size of one log segment in bytes, preallocated.
    pub log_segment_bytes: u64,
    /// When the log's bytes are on disk before consumers see them.
    pub log_durability: Durability,
    /// Shortest time between two writes to the log.
    pub log_group_window: Duration,
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
    /// Identity cache and directory look-ups.
    pub identity: IdentityConfig,
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
            plc_host: Url::parse("https://plc.directory").expect("a constant URL parses"),
            hosts: Vec::new(),
            allow_private_hosts: false,
            admin_password: None,
            validation: Validation::Strict,
            request_crawl: true,
            new_hosts_per_day: 50,
            new_hosts_per_day_per_ip: 10,
            new_hosts_per_day_per_domain: 10,
            max_crawl_checks: 64,
            trusted_domains: vec![
                DomainPattern::trusted("*.host.bsky.network").expect("a constant pattern parses"),
            ],
            banned_domains: Vec::new(),
            shards: default_shards(),
            account_cache_bytes: 512 * 1024 * 1024,
            replay_window: Duration::from_secs(72 * 3600),
            log_max_bytes: 200_000_000_000,
            log_min_free: MinFree::Auto,
            log_segment_bytes: 128 * 1024 * 1024,
            log_durability: Durability::Sync,
            log_group_window: Duration::from_millis(2),
            max_consumers: 1_000,
            max_consumers_per_ip: 50,
            max_consumer_input: 64 * 1024,
            host_limits: HostLimits::default(),
            account_event_bytes: DEFAULT_ACCOUNT_EVENT_BYTES,
            message_time: Duration::from_secs(30),
            memory: MemoryLimits::default(),
            desync: DesyncLimits::default(),
            identity: IdentityConfig::default(),
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

    /// Whether a host (a name without port) is one of the trusted domains.
    pub fn is_trusted(&self, hostname: &str) -> bool {
        self.trusted_domains.iter().any(|p| p.matches(hostname))
    }

    /// Whether a host (a name without port) is under a domain banned by configuration.
    pub fn is_banned(&self, hostname: &str) -> bool {
        self.banned_domains.iter().any(|p| p.matches(hostname))
    }

    /// The account quota a new host starts with.
    pub fn default_account_limit(&self, hostname: &str) -> u64 {
        if self.is_trusted(hostname) {
            self.host_limits.trusted_accounts
        } else {
            self.host_limits.accounts
        }
    }
}

/// One shard per core the process may use.
fn default_shards() -> usize {
    std::thread::available_parallelism().map_or(1, |n| n.get().min(MAX_SHARDS))
}

/// Default of [`Config::account_event_bytes`]: the longest DID (2,048 bytes) and handle (253), and as much again for
/// fields that are to come.
pub const DEFAULT_ACCOUNT_EVENT_BYTES: u64 = 8 * 1024;

/// How strictly a host's commits are checked.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Validation {
    /// Every rule, always.
    Strict,
    /// Missing `prevData` and `prev` pass until the host sends its first sync 1.1 commit; then strict.
    Ratchet,
    /// Missing `prevData` and `prev` pass; what is there is still checked.
    Lenient,
}

/// Room the log leaves on its file system.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum MinFree {
    /// For a disk of the relay's own: 5 % of it, at most 5 GB.
    Auto,
    /// For the disk of the system: 15 % of it, at most 20 GB.
    Shared,
    /// So many bytes.
    Bytes(u64),
}

/// When an event's bytes must be on disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Durability {
    /// fdatasync before a consumer sees the event, shared by all events that wait for it.
    Sync,
    /// fdatasync once a second; a power failure may lose what consumers already saw.
    Interval,
    /// The operating system decides. For tests and benchmarks.
    None,
}

/// Form of the log lines on stderr.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum LogFormat {
    /// One readable line per message.
    Text,
    /// One JSON object per message.
    Json,
}

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

/// How often an account's chain of commits may break.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DesyncLimits {
    /// Breaks allowed within `period`; one more throttles the account.
    pub limit: u32,
    /// The time over which breaks are counted.
    pub period: Duration,
}

impl Default for DesyncLimits {
    fn default() -> DesyncLimits {
        DesyncLimits {
            limit: 100,
            period: Duration::from_secs(24 * 3600),
        }
    }
}

/// Identity cache and look-ups at the PLC directory and at did:web hosts.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct IdentityConfig {
    /// How long a resolved identity is used without asking again.
    pub ttl: Duration,
    /// How long a failed look-up is remembered.
    pub negative_ttl: Duration,
    /// Mean time between two forced look-ups of one DID for one host, and shortest between two of an account's status at
    /// its PDS.
    pub refresh_interval: Duration,
    /// Look-ups per second sent to the PLC directory.
    pub directory_rate: f64,
    /// Look-ups under way at the PLC directory at a time.
    pub directory_lookups: usize,
    /// Look-ups under way at hosts at a time: the documents of did:web and the statuses of accounts, each.
    pub host_lookups: usize,
    /// Identities kept in memory.
    pub cache_entries: usize,
}

impl Default for IdentityConfig {
    fn default() -> IdentityConfig {
        IdentityConfig {
            ttl: Duration::from_secs(24 * 3600),
            negative_ttl: Duration::from_secs(120),
            refresh_interval: Duration::from_secs(30),
            directory_rate: 100.0,
            directory_lookups: 64,
            host_lookups: 128,
            cache_entries: 200_000,
        }
    }
}

/// A word that is none of a setting's choices.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("must be one of {choices}")]
pub struct NotAChoice {
    choices: &'static str,
}

macro_rules! choice {
    ($type:ident, $choices:literal, $($word:literal => $variant:ident),+ $(,)?) => {
        impl $type {
            /// The word for this choice in the file, in flags and in the database.
            pub fn as_str(&self) -> &'static str {
                match self { $($type::$variant => $word),+ }
            }
        }
        impl fmt::Display for $type {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(self.as_str())
            }
        }
        impl FromStr for $type {
            type Err = NotAChoice;
            fn from_str(text: &str) -> Result<$type, NotAChoice> {
                match text {
                    $($word => Ok($type::$variant),)+
                    _ => Err(NotAChoice { choices: $choices }),
                }
            }
        }
    };
}

choice!(Validation, "strict, ratchet, lenient",
    "strict" => Strict, "ratchet" => Ratchet, "lenient" => Lenient);
choice!(Durability, "sync, interval, none",
    "sync" => Sync, "interval" => Interval, "none" => None);
choice!(LogFormat, "text, json", "text" => Text, "json" => Json);
