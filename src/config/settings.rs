//! The table of all settings: key in the file, flag, environment variables, default, meaning.
//! The command line, the file reader, `check-config` and the README all follow this one table.

use std::net::{Ipv6Addr, SocketAddr};
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use url::Url;

use super::source::Raw;
use super::units::{format_bytes, format_duration, parse_bytes, parse_duration};
use super::{
    AdminListen, Cidr, Config, DatabaseUrl, DomainPattern, HostEntry, MAX_GROUP_WINDOW, MAX_SHARDS,
    MIN_DATABASE_CONNECTIONS, MIN_SEGMENT_BYTES, MinFree,
};

/// Headings of `--help` and of the README's table.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Group {
    /// What most operators set.
    Common,
    /// The event log and its replay window.
    Log,
    /// Who is subscribed to and what they may send.
    Hosts,
    /// Limits of the firehose.
    Consumers,
    /// Resolution of DIDs.
    Identity,
    /// Threads, memory, connections.
    Machine,
    /// Log lines.
    Messages,
}

impl Group {
    /// The heading's text.
    pub fn heading(&self) -> &'static str {
        match self {
            Group::Common => "Common settings",
            Group::Log => "Event log",
            Group::Hosts => "Hosts",
            Group::Consumers => "Consumers",
            Group::Identity => "Identities",
            Group::Machine => "Machine",
            Group::Messages => "Messages",
        }
    }
}

/// An environment variable that sets a setting.
#[derive(Debug, Clone, Copy)]
pub enum Variable {
    /// Its value is the setting's value.
    Value(&'static str),
    /// A switch of the reference relay: set to true it means this value.
    Switch(&'static str, &'static str),
}

impl Variable {
    /// The variable's name.
    pub fn name(&self) -> &'static str {
        match self {
            Variable::Value(name) | Variable::Switch(name, _) => name,
        }
    }
}

/// One setting.
pub struct Setting {
    /// Key in the file, tables joined by dots.
    pub key: &'static str,
    /// Flag, without dashes.
    pub flag: &'static str,
    /// Environment variables, the first that is set counts. Those without RELAY_ and most aliases
    /// are the reference relay's.
    pub variables: &'static [Variable],
    /// What stands for the value in `--help`; empty for a switch.
    pub placeholder: &'static str,
    /// The default as it would be written.
    pub default: &'static str,
    /// The heading it stands under.
    pub group: Group,
    /// One line on what it does.
    pub help: &'static str,
    /// Whether it takes several values.
    pub list: bool,
    /// Whether the value may hold a secret and is never shown.
    pub secret: bool,
    /// Whether a reload applies it; else it waits for a restart.
    pub live: bool,
    /// Reads a value into the configuration; the error says what is wrong with it.
    pub(super) set: fn(&mut Config, &Raw) -> Result<(), String>,
    /// The value as it would be written in the file.
    pub show: fn(&Config) -> String,
}

impl Setting {
    /// Whether two configurations have different values.
    pub fn differs(&self, one: &Config, other: &Config) -> bool {
        if self.secret {
            // What is shown lacks the password.
            one.database_url != other.database_url
        } else {
            (self.show)(one) != (self.show)(other)
        }
    }
}

/// All settings, in the order of `--help`.
pub fn settings() -> &'static [Setting] {
    SETTINGS
}

use Variable::{Switch, Value};

/// What stands for no value.
const NONE: &str = "none";
/// What stands for a size that follows from the machine.
const AUTO: &str = "auto";
/// The room that the log leaves on a disk that it shares.
const SHARED: &str = "shared";

const SETTINGS: &[Setting] = &[
    Setting {
        key: "data_dir",
        flag: "data-dir",
        variables: &[Value("RELAY_DATA_DIR")],
        placeholder: "FOLDER",
        default: "./data",
        group: Group::Common,
        help: "Folder of the event log and, with SQLite, of the database; one relay at a time uses it",
        list: false,
        secret: false,
        live: false,
        set: |c, raw| {
            c.data_dir = PathBuf::from(text(raw)?);
            Ok(())
        },
        show: |c| quoted(c.data_dir.display()),
    },
    Setting {
        key: "listen",
        flag: "listen",
        variables: &[
            Value("RELAY_LISTEN"),
            Value("RELAY_API_BIND"),
            Value("RELAY_API_LISTEN"),
        ],
        placeholder: "ADDRESS",
        default: "127.0.0.1:2470",
        group: Group::Common,
        help: "Address of the public API and firehose; `:2470` is all addresses of the machine",
        list: false,
        secret: false,
        live: false,
        set: |c, raw| {
            c.listen = address(raw)?;
            Ok(())
        },
        show: |c| quoted(c.listen),
    },
    Setting {
        key: "metrics_listen",
        flag: "metrics-listen",
        variables: &[Value("RELAY_METRICS_LISTEN")],
        placeholder: "ADDRESS",
        default: "127.0.0.1:2471",
        group: Group::Common,
        help: "Address of /metrics and /_health; keep it private",
        list: false,
        secret: false,
        live: false,
        set: |c, raw| {
            c.metrics_listen = address(raw)?;
            Ok(())
        },
        show: |c| quoted(c.metrics_listen),
    },
    Setting {
        key: "admin_listen",
        flag: "admin-listen",
        variables: &[Value("RELAY_ADMIN_LISTEN")],
        placeholder: "ADDRESS",
        default: "none",
        group: Group::Common,
        help: "Listener of the admin API alone: unix:PATH, which asks for no password, or an address, which does",
        list: false,
        secret: false,
        live: false,
        set: |c, raw| {
            c.admin_listen = match raw {
                Raw::Text(text) if text.trim() == NONE => None,
                raw => Some(AdminListen::parse(text(raw)?, || address(raw))?),
            };
            Ok(())
        },
        show: |c| {
            quoted(
                c.admin_listen
                    .as_ref()
                    .map_or(NONE.into(), AdminListen::to_string),
            )
        },
    },
    Setting {
        key: "trusted_proxies",
        flag: "trusted-proxy",
        variables: &[Value("RELAY_TRUSTED_PROXIES")],
        placeholder: "ADDRESS",
        default: "127.0.0.0/8, ::1",
        group: Group::Common,
        help: "Proxy that is believed about its clients' addresses (X-Forwarded-For, Forwarded), an address or a network as in 10.0.0.0/8; repeat it for more, none is nobody",
        list: true,
        secret: false,
        live: true,
        set: |c, raw| {
            c.trusted_proxies = networks(raw)?;
            Ok(())
        },
        show: |c| list(c.trusted_proxies.iter()),
    },
    Setting {
        key: "database_url",
        flag: "database-url",
        variables: &[Value("DATABASE_URL"), Value("RELAY_DATABASE_URL")],
        placeholder: "URL",
        default: "SQLite in data_dir",
        group: Group::Common,
        help: "Database: sqlite:PATH or postgres://USER@HOST/NAME; put one with a password in the environment or in the systemd credential `database-url`",
        list: false,
        secret: true,
        live: false,
        set: |c, raw| {
            c.database_url = Some(DatabaseUrl::parse(text(raw)?)?);
            Ok(())
        },
        show: |c| quoted(c.database_url()),
    },
    Setting {
        key: "plc_host",
        flag: "plc-host",
        variables: &[Value("RELAY_PLC_HOST"), Value("ATP_PLC_HOST")],
        placeholder: "URL",
        default: "https://plc.directory",
        group: Group::Common,
        help: "The PLC directory that resolves did:plc",
        list: false,
        secret: false,
        live: false,
        set: |c, raw| {
            c.plc_host = base_url(text(raw)?)?;
            Ok(())
        },
        show: |c| quoted(c.plc_host.as_str().trim_end_matches('/')),
    },
    Setting {
        key: "hosts",
        flag: "host",
        variables: &[Value("RELAY_HOSTS")],
        placeholder: "HOST",
        default: "none",
        group: Group::Common,
        help: "Host to subscribe to, a name or a URL; repeat it for more. Hosts once added stay in the database",
        list: true,
        secret: false,
        live: true,
        set: |c, raw| {
            c.hosts = each(raw, |text| {
                HostEntry::parse(text).map_err(|e| format!("has an entry that cannot be used: {e}"))
            })?;
            Ok(())
        },
        show: |c| list(c.hosts.iter()),
    },
    Setting {
        key: "allow_private_hosts",
        flag: "allow-private-hosts",
        variables: &[Value("RELAY_ALLOW_PRIVATE_HOSTS")],
        placeholder: "",
        default: "false",
        group: Group::Common,
        help: "Allow http, any port, and hosts at loopback and private addresses: for test networks only",
        list: false,
        secret: false,
        live: false,
        set: |c, raw| {
            c.allow_private_hosts = boolean(raw)?;
            Ok(())
        },
        show: |c| c.allow_private_hosts.to_string(),
    },
    Setting {
        key: "validation",
        flag: "validation",
        variables: &[
            Value("RELAY_VALIDATION"),
            Switch("RELAY_LENIENT_SYNC_VALIDATION", "lenient"),
        ],
        placeholder: "MODE",
        default: "strict",
        group: Group::Common,
        help: "How commits are checked: strict; ratchet (strict for a host after its first sync 1.1 commit); lenient (missing prevData and prev pass)",
        list: false,
        secret: false,
        live: true,
        set: |c, raw| {
            c.validation = parsed(raw)?;
            Ok(())
        },
        show: |c| quoted(c.validation),
    },
    Setting {
        key: "replay_window",
        flag: "replay-window",
        variables: &[
            Value("RELAY_REPLAY_WINDOW"),
            Value("RELAY_EVENT_PLAYBACK_TTL"),
        ],
        placeholder: "TIME",
        default: "72h",
        group: Group::Log,
        help: "How long events stay in the log for consumers that come back",
        list: false,
        secret: false,
        live: true,
        set: |c, raw| {
            c.replay_window = positive_duration(raw)?;
            Ok(())
        },
        show: |c| quoted(format_duration(c.replay_window)),
    },
    Setting {
        key: "log.max_bytes",
        flag: "log-max-bytes",
        variables: &[Value("RELAY_LOG_MAX_BYTES")],
        placeholder: "SIZE",
        default: "200GB",
        group: Group::Log,
        help: "Most bytes of the log on disk; the oldest events go first, also before the replay window ends",
        list: false,
        secret: false,
        live: true,
        set: |c, raw| {
            c.log_max_bytes = bytes(raw)?;
            Ok(())
        },
        show: |c| quoted(format_bytes(c.log_max_bytes)),
    },
    Setting {
        key: "log.min_free_bytes",
        flag: "log-min-free-bytes",
        variables: &[Value("RELAY_LOG_MIN_FREE_BYTES")],
        placeholder: "SIZE",
        default: "auto",
        group: Group::Log,
        help: "Room the log leaves on its file system; the oldest events go first. auto is 5 % of it, at most 5GB; shared, for the disk of the system, 15 %, at most 20GB; 0 turns it off, and a full disk holds events back",
        list: false,
        secret: false,
        live: true,
        set: |c, raw| {
            c.log_min_free = match raw {
                Raw::Text(text) if text.trim() == AUTO => MinFree::Auto,
                Raw::Text(text) if text.trim() == SHARED => MinFree::Shared,
                raw => MinFree::Bytes(bytes(raw)?),
            };
            Ok(())
        },
        show: |c| {
            quoted(match c.log_min_free {
                MinFree::Auto => AUTO.to_owned(),
                MinFree::Shared => SHARED.to_owned(),
                MinFree::Bytes(bytes) => format_bytes(bytes),
            })
        },
    },
    Setting {
        key: "log.segment_bytes",
        flag: "log-segment-bytes",
        variables: &[Value("RELAY_LOG_SEGMENT_BYTES")],
        placeholder: "SIZE",
        default: "128MiB",
        group: Group::Log,
        help: "Size of one file of the log; space is reserved and freed in this unit",
        list: false,
        secret: false,
        live: false,
        set: |c, raw| {
            let size = bytes(raw)?;
            if size < MIN_SEGMENT_BYTES {
                return Err(format!(
                    "is too small; use {} or more",
                    format_bytes(MIN_SEGMENT_BYTES)
                ));
            }
            c.log_segment_bytes = size;
            Ok(())
        },
        show: |c| quoted(format_bytes(c.log_segment_bytes)),
    },
    Setting {
        key: "log.durability",
        flag: "log-durability",
        variables: &[Value("RELAY_LOG_DURABILITY")],
        placeholder: "MODE",
        default: "sync",
        group: Group::Log,
        help: "When events are on disk: sync (before a consumer sees them), interval (within a second), none (when the system likes)",
        list: false,
        secret: false,
        live: false,
        set: |c, raw| {
            c.log_durability = parsed(raw)?;
            Ok(())
        },
        show: |c| quoted(c.log_durability),
    },
    Setting {
        key: "log.group_window",
        flag: "log-group-window",
        variables: &[Value("RELAY_LOG_GROUP_WINDOW")],
        placeholder: "TIME",
        default: "2ms",
        group: Group::Log,
        help: "Shortest time between two writes to the log; events that come in between share one (at most 1s, 0s writes at once)",
        list: false,
        secret: false,
        live: true,
        set: |c, raw| {
            let window = duration(raw)?;
            if window > MAX_GROUP_WINDOW {
                return Err(format!(
                    "is too long; use {} or less",
                    format_duration(MAX_GROUP_WINDOW)
                ));
            }
            c.log_group_window = window;
            Ok(())
        },
        show: |c| quoted(format_duration(c.log_group_window)),
    },
    Setting {
        key: "trusted_domains",
        flag: "trusted-domain",
        variables: &[Value("RELAY_TRUSTED_DOMAINS")],
        placeholder: "DOMAIN",
        default: "*.host.bsky.network",
        group: Group::Hosts,
        help: "Hosts with the large account quota: a name, or *.DOMAIN for all below it; repeat it for more",
        list: true,
        secret: false,
        live: true,
        set: |c, raw| {
            c.trusted_domains = each(raw, DomainPattern::trusted)?;
            Ok(())
        },
        show: |c| list(c.trusted_domains.iter()),
    },
    Setting {
        key: "banned_domains",
        flag: "banned-domain",
        variables: &[Value("RELAY_BANNED_DOMAINS")],
        placeholder: "DOMAIN",
        default: "none",
        group: Group::Hosts,
        help: "Domain that is never subscribed to, with all below it; repeat it for more",
        list: true,
        secret: false,
        live: true,
        set: |c, raw| {
            c.banned_domains = each(raw, DomainPattern::banned)?;
            Ok(())
        },
        show: |c| list(c.banned_domains.iter()),
    },
    Setting {
        key: "request_crawl",
        flag: "request-crawl",
        variables: &[
            Value("RELAY_REQUEST_CRAWL"),
            Switch("RELAY_DISABLE_REQUEST_CRAWL", "false"),
        ],
        placeholder: "BOOL",
        default: "true",
        group: Group::Hosts,
        help: "Whether anybody may announce a host with com.atproto.sync.requestCrawl",
        list: false,
        secret: false,
        live: true,
        set: |c, raw| {
            c.request_crawl = boolean(raw)?;
            Ok(())
        },
        show: |c| c.request_crawl.to_string(),
    },
    Setting {
        key: "new_hosts_per_day",
        flag: "new-hosts-per-day",
        variables: &[
            Value("RELAY_NEW_HOSTS_PER_DAY"),
            Value("RELAY_NEW_HOSTS_PER_DAY_LIMIT"),
        ],
        placeholder: "COUNT",
        default: "50",
        group: Group::Hosts,
        help: "New hosts that the public requestCrawl may add in 24 hours",
        list: false,
        secret: false,
        live: true,
        set: |c, raw| {
            c.new_hosts_per_day = count(raw, 0, u32::MAX as u64)? as u32;
            Ok(())
        },
        show: |c| c.new_hosts_per_day.to_string(),
    },
    Setting {
        key: "new_hosts_per_day_per_ip",
        flag: "new-hosts-per-day-per-ip",
        variables: &[Value("RELAY_NEW_HOSTS_PER_DAY_PER_IP")],
        placeholder: "COUNT",
        default: "10",
        group: Group::Hosts,
        help: "Those of them that one address (IPv6: one /64) may ask for; four times as many from one IPv6 /48",
        list: false,
        secret: false,
        live: true,
        set: |c, raw| {
            c.new_hosts_per_day_per_ip = count(raw, 0, u32::MAX as u64)? as u32;
            Ok(())
        },
        show: |c| c.new_hosts_per_day_per_ip.to_string(),
    },
    Setting {
        key: "new_hosts_per_day_per_domain",
        flag: "new-hosts-per-day-per-domain",
        variables: &[Value("RELAY_NEW_HOSTS_PER_DAY_PER_DOMAIN")],
        placeholder: "COUNT",
        default: "10",
        group: Group::Hosts,
        help: "Those of them that may be of one domain, as registered: pds.example.com is of example.com",
        list: false,
        secret: false,
        live: true,
        set: |c, raw| {
            c.new_hosts_per_day_per_domain = count(raw, 0, u32::MAX as u64)? as u32;
            Ok(())
        },
        show: |c| c.new_hosts_per_day_per_domain.to_string(),
    },
    Setting {
        key: "max_crawl_checks",
        flag: "max-crawl-checks",
        variables: &[Value("RELAY_MAX_CRAWL_CHECKS")],
        placeholder: "COUNT",
        default: "64",
        group: Group::Hosts,
        help: "Hosts that are checked at one time because of the public requestCrawl; one address, and one domain, may have a sixteenth of them. The operator's requests have places of their own",
        list: false,
        secret: false,
        live: true,
        set: |c, raw| {
            c.max_crawl_checks = count(raw, 1, 10_000)? as u32;
            Ok(())
        },
        show: |c| c.max_crawl_checks.to_string(),
    },
    Setting {
        key: "limits.accounts",
        flag: "limit-accounts",
        variables: &[
            Value("RELAY_LIMIT_ACCOUNTS"),
            Value("RELAY_DEFAULT_ACCOUNT_LIMIT"),
            Value("RELAY_DEFAULT_REPO_LIMIT"),
        ],
        placeholder: "COUNT",
        default: "100",
        group: Group::Hosts,
        help: "Active accounts of a host; those over it are throttled until the limit is raised",
        list: false,
        secret: false,
        live: true,
        set: |c, raw| {
            c.host_limits.accounts = count(raw, 0, i64::MAX as u64)?;
            Ok(())
        },
        show: |c| c.host_limits.accounts.to_string(),
    },
    Setting {
        key: "limits.trusted_accounts",
        flag: "limit-trusted-accounts",
        variables: &[Value("RELAY_LIMIT_TRUSTED_ACCOUNTS")],
        placeholder: "COUNT",
        default: "10000000",
        group: Group::Hosts,
        help: "Active accounts of a host of the trusted domains",
        list: false,
        secret: false,
        live: true,
        set: |c, raw| {
            c.host_limits.trusted_accounts = count(raw, 0, i64::MAX as u64)?;
            Ok(())
        },
        show: |c| c.host_limits.trusted_accounts.to_string(),
    },
    Setting {
        key: "limits.events_per_second",
        flag: "limit-events-per-second",
        variables: &[Value("RELAY_LIMIT_EVENTS_PER_SECOND")],
        placeholder: "RATE",
        default: "50",
        group: Group::Hosts,
        help: "Events a second a host may send; over it the relay reads the socket more slowly and drops nothing",
        list: false,
        secret: false,
        live: true,
        set: |c, raw| {
            c.host_limits.per_second.base = positive_number(raw)?;
            Ok(())
        },
        show: |c| c.host_limits.per_second.base.to_string(),
    },
    Setting {
        key: "limits.events_per_second_per_account",
        flag: "limit-events-per-second-per-account",
        variables: &[Value("RELAY_LIMIT_EVENTS_PER_SECOND_PER_ACCOUNT")],
        placeholder: "RATE",
        default: "0.001",
        group: Group::Hosts,
        help: "Added to the limit a second for each account of the host",
        list: false,
        secret: false,
        live: true,
        set: |c, raw| {
            c.host_limits.per_second.per_account = number(raw)?;
            Ok(())
        },
        show: |c| c.host_limits.per_second.per_account.to_string(),
    },
    Setting {
        key: "limits.events_per_hour",
        flag: "limit-events-per-hour",
        variables: &[Value("RELAY_LIMIT_EVENTS_PER_HOUR")],
        placeholder: "RATE",
        default: "2500",
        group: Group::Hosts,
        help: "Events an hour a host may send",
        list: false,
        secret: false,
        live: true,
        set: |c, raw| {
            c.host_limits.per_hour.base = positive_number(raw)?;
            Ok(())
        },
        show: |c| c.host_limits.per_hour.base.to_string(),
    },
    Setting {
        key: "limits.events_per_hour_per_account",
        flag: "limit-events-per-hour-per-account",
        variables: &[Value("RELAY_LIMIT_EVENTS_PER_HOUR_PER_ACCOUNT")],
        placeholder: "RATE",
        default: "1",
        group: Group::Hosts,
        help: "Added to the limit an hour for each account of the host",
        list: false,
        secret: false,
        live: true,
        set: |c, raw| {
            c.host_limits.per_hour.per_account = number(raw)?;
            Ok(())
        },
        show: |c| c.host_limits.per_hour.per_account.to_string(),
    },
    Setting {
        key: "limits.events_per_day",
        flag: "limit-events-per-day",
        variables: &[Value("RELAY_LIMIT_EVENTS_PER_DAY")],
        placeholder: "RATE",
        default: "20000",
        group: Group::Hosts,
        help: "Events in 24 hours a host may send",
        list: false,
        secret: false,
        live: true,
        set: |c, raw| {
            c.host_limits.per_day.base = positive_number(raw)?;
            Ok(())
        },
        show: |c| c.host_limits.per_day.base.to_string(),
    },
    Setting {
        key: "limits.events_per_day_per_account",
        flag: "limit-events-per-day-per-account",
        variables: &[Value("RELAY_LIMIT_EVENTS_PER_DAY_PER_ACCOUNT")],
        placeholder: "RATE",
        default: "10",
        group: Group::Hosts,
        help: "Added to the limit of a day for each account of the host",
        list: false,
        secret: false,
        live: true,
        set: |c, raw| {
            c.host_limits.per_day.per_account = number(raw)?;
            Ok(())
        },
        show: |c| c.host_limits.per_day.per_account.to_string(),
    },
    Setting {
        key: "limits.account_event_bytes",
        flag: "limit-account-event-bytes",
        variables: &[Value("RELAY_LIMIT_ACCOUNT_EVENT_BYTES")],
        placeholder: "SIZE",
        default: "8KiB",
        group: Group::Hosts,
        help: "Largest #identity or #account event; larger ones are dropped",
        list: false,
        secret: false,
        live: true,
        set: |c, raw| {
            c.account_event_bytes = bytes(raw)?;
            Ok(())
        },
        show: |c| quoted(format_bytes(c.account_event_bytes)),
    },
    Setting {
        key: "limits.bytes_per_hour",
        flag: "limit-bytes-per-hour",
        variables: &[Value("RELAY_LIMIT_BYTES_PER_HOUR")],
        placeholder: "SIZE",
        default: "200MB",
        group: Group::Hosts,
        help: "Bytes an hour a host may send; over it the relay reads the socket more slowly and drops nothing",
        list: false,
        secret: false,
        live: true,
        set: |c, raw| {
            c.host_limits.bytes_per_hour.base = bytes(raw)? as f64;
            Ok(())
        },
        show: |c| quoted(format_bytes(c.host_limits.bytes_per_hour.base as u64)),
    },
    Setting {
        key: "limits.bytes_per_hour_per_account",
        flag: "limit-bytes-per-hour-per-account",
        variables: &[Value("RELAY_LIMIT_BYTES_PER_HOUR_PER_ACCOUNT")],
        placeholder: "SIZE",
        default: "100kB",
        group: Group::Hosts,
        help: "Added to the bytes an hour for each account of the host",
        list: false,
        secret: false,
        live: true,
        set: |c, raw| {
            c.host_limits.bytes_per_hour.per_account = bytes(raw)? as f64;
            Ok(())
        },
        show: |c| {
            quoted(format_bytes(
                c.host_limits.bytes_per_hour.per_account as u64,
            ))
        },
    },
    Setting {
        key: "limits.pings_per_second",
        flag: "limit-pings-per-second",
        variables: &[Value("RELAY_LIMIT_PINGS_PER_SECOND")],
        placeholder: "COUNT",
        default: "20",
        group: Group::Hosts,
        help: "Pings, pongs and text messages a second a host may send; over it its socket waits, its events included",
        list: false,
        secret: false,
        live: true,
        set: |c, raw| {
            c.host_limits.others_per_second = count(raw, 1, u32::MAX as u64)?;
            Ok(())
        },
        show: |c| c.host_limits.others_per_second.to_string(),
    },
    Setting {
        key: "limits.message_time",
        flag: "limit-message-time",
        variables: &[Value("RELAY_LIMIT_MESSAGE_TIME")],
        placeholder: "TIME",
        default: "30s",
        group: Group::Hosts,
        help: "Longest time from the first byte of a host's message to its last; then the connection is closed",
        list: false,
        secret: false,
        live: false,
        set: |c, raw| {
            c.message_time = positive_duration(raw)?;
            Ok(())
        },
        show: |c| quoted(format_duration(c.message_time)),
    },
    Setting {
        key: "desync.limit",
        flag: "desync-limit",
        variables: &[Value("RELAY_DESYNC_LIMIT")],
        placeholder: "COUNT",
        default: "100",
        group: Group::Hosts,
        help: "Breaks in an account's chain of commits before the account is throttled",
        list: false,
        secret: false,
        live: true,
        set: |c, raw| {
            c.desync.limit = count(raw, 0, u32::MAX as u64)? as u32;
            Ok(())
        },
        show: |c| c.desync.limit.to_string(),
    },
    Setting {
        key: "desync.period",
        flag: "desync-period",
        variables: &[Value("RELAY_DESYNC_PERIOD")],
        placeholder: "TIME",
        default: "24h",
        group: Group::Hosts,
        help: "The time over which those breaks are counted",
        list: false,
        secret: false,
        live: true,
        set: |c, raw| {
            c.desync.period = positive_duration(raw)?;
            Ok(())
        },
        show: |c| quoted(format_duration(c.desync.period)),
    },
    Setting {
        key: "max_consumers",
        flag: "max-consumers",
        variables: &[Value("RELAY_MAX_CONSUMERS")],
        placeholder: "COUNT",
        default: "1000",
        group: Group::Consumers,
        help: "Consumers of the firehose at one time",
        list: false,
        secret: false,
        live: true,
        set: |c, raw| {
            c.max_consumers = count(raw, 1, 1_000_000)? as usize;
            Ok(())
        },
        show: |c| c.max_consumers.to_string(),
    },
    Setting {
        key: "max_consumers_per_ip",
        flag: "max-consumers-per-ip",
        variables: &[Value("RELAY_MAX_CONSUMERS_PER_IP")],
        placeholder: "COUNT",
        default: "50",
        group: Group::Consumers,
        help: "Consumers of the firehose from one address (IPv6: one /64) at one time; four times as many from one IPv6 /48",
        list: false,
        secret: false,
        live: true,
        set: |c, raw| {
            c.max_consumers_per_ip = count(raw, 1, 1_000_000)? as usize;
            Ok(())
        },
        show: |c| c.max_consumers_per_ip.to_string(),
    },
    Setting {
        key: "max_consumer_input",
        flag: "max-consumer-input",
        variables: &[Value("RELAY_MAX_CONSUMER_INPUT")],
        placeholder: "SIZE",
        default: "64KiB",
        group: Group::Consumers,
        help: "Bytes a second that a consumer may send, 16 times as many at once; a read counts for 512 at least. Over it the relay reads that consumer more slowly",
        list: false,
        secret: false,
        live: true,
        set: |c, raw| {
            let rate = bytes(raw)?;
            if rate < 1 << 10 {
                return Err("is too small; use 1KiB or more".into());
            }
            c.max_consumer_input = rate;
            Ok(())
        },
        show: |c| quoted(format_bytes(c.max_consumer_input)),
    },
    Setting {
        key: "identity.ttl",
        flag: "identity-ttl",
        variables: &[Value("RELAY_IDENTITY_TTL")],
        placeholder: "TIME",
        default: "24h",
        group: Group::Identity,
        help: "How long a resolved identity is used without asking again",
        list: false,
        secret: false,
        live: true,
        set: |c, raw| {
            c.identity.ttl = positive_duration(raw)?;
            Ok(())
        },
        show: |c| quoted(format_duration(c.identity.ttl)),
    },
    Setting {
        key: "identity.negative_ttl",
        flag: "identity-negative-ttl",
        variables: &[Value("RELAY_IDENTITY_NEGATIVE_TTL")],
        placeholder: "TIME",
        default: "2m",
        group: Group::Identity,
        help: "How long a failed look-up is remembered",
        list: false,
        secret: false,
        live: true,
        set: |c, raw| {
            c.identity.negative_ttl = positive_duration(raw)?;
            Ok(())
        },
        show: |c| quoted(format_duration(c.identity.negative_ttl)),
    },
    Setting {
        key: "identity.refresh_interval",
        flag: "identity-refresh-interval",
        variables: &[Value("RELAY_IDENTITY_REFRESH_INTERVAL")],
        placeholder: "TIME",
        default: "30s",
        group: Group::Identity,
        help: "Mean time between two forced look-ups of one DID for one host, and shortest between two of an account's status at its PDS",
        list: false,
        secret: false,
        live: true,
        set: |c, raw| {
            c.identity.refresh_interval = positive_duration(raw)?;
            Ok(())
        },
        show: |c| quoted(format_duration(c.identity.refresh_interval)),
    },
    Setting {
        key: "identity.directory_rate",
        flag: "identity-directory-rate",
        variables: &[Value("RELAY_IDENTITY_DIRECTORY_RATE")],
        placeholder: "RATE",
        default: "100",
        group: Group::Identity,
        help: "Most look-ups a second at the PLC directory",
        list: false,
        secret: false,
        live: true,
        set: |c, raw| {
            c.identity.directory_rate = positive_number(raw)?;
            Ok(())
        },
        show: |c| c.identity.directory_rate.to_string(),
    },
    Setting {
        key: "identity.directory_lookups",
        flag: "identity-directory-lookups",
        variables: &[Value("RELAY_IDENTITY_DIRECTORY_LOOKUPS")],
        placeholder: "COUNT",
        default: "64",
        group: Group::Identity,
        help: "Most look-ups at a time at the PLC directory; hosts whose events ask share them",
        list: false,
        secret: false,
        live: false,
        set: |c, raw| {
            c.identity.directory_lookups = count(raw, 1, 10_000)? as usize;
            Ok(())
        },
        show: |c| c.identity.directory_lookups.to_string(),
    },
    Setting {
        key: "identity.host_lookups",
        flag: "identity-host-lookups",
        variables: &[Value("RELAY_IDENTITY_HOST_LOOKUPS")],
        placeholder: "COUNT",
        default: "128",
        group: Group::Identity,
        help: "Most look-ups at a time of did:web documents, and of account statuses; hosts whose events ask share them",
        list: false,
        secret: false,
        live: false,
        set: |c, raw| {
            c.identity.host_lookups = count(raw, 1, 10_000)? as usize;
            Ok(())
        },
        show: |c| c.identity.host_lookups.to_string(),
    },
    Setting {
        key: "identity.cache_entries",
        flag: "identity-cache-entries",
        variables: &[
            Value("RELAY_IDENTITY_CACHE_ENTRIES"),
            Value("RELAY_IDENT_CACHE_SIZE"),
            Value("RELAY_DID_CACHE_SIZE"),
        ],
        placeholder: "COUNT",
        default: "200000",
        group: Group::Identity,
        help: "Identities kept in memory",
        list: false,
        secret: false,
        live: true,
        set: |c, raw| {
            c.identity.cache_entries = count(raw, 1, 100_000_000)? as usize;
            Ok(())
        },
        show: |c| c.identity.cache_entries.to_string(),
    },
    Setting {
        key: "shards",
        flag: "shards",
        variables: &[Value("RELAY_SHARDS")],
        placeholder: "COUNT",
        default: "one per core",
        group: Group::Machine,
        help: "Threads that verify events",
        list: false,
        secret: false,
        live: false,
        set: |c, raw| {
            c.shards = count(raw, 1, MAX_SHARDS as u64)? as usize;
            Ok(())
        },
        show: |c| c.shards.to_string(),
    },
    Setting {
        key: "account_cache",
        flag: "account-cache",
        variables: &[Value("RELAY_ACCOUNT_CACHE")],
        placeholder: "SIZE",
        default: "512MiB",
        group: Group::Machine,
        help: "Memory for the state of accounts; those that do not fit are read from the database",
        list: false,
        secret: false,
        live: false,
        set: |c, raw| {
            let size = bytes(raw)?;
            if size < 1 << 20 {
                return Err("is too small; use 1MiB or more".into());
            }
            c.account_cache_bytes = size;
            Ok(())
        },
        show: |c| quoted(format_bytes(c.account_cache_bytes)),
    },
    Setting {
        key: "memory.per_host",
        flag: "memory-per-host",
        variables: &[Value("RELAY_MEMORY_PER_HOST")],
        placeholder: "SIZE",
        default: "64KiB",
        group: Group::Machine,
        help: "Memory of each host's own for events on their way, which no other host can take, and once more for a message that is not whole",
        list: false,
        secret: false,
        live: false,
        set: |c, raw| {
            c.memory.per_host = size_between(raw, "16KiB", "5MB")?;
            Ok(())
        },
        show: |c| quoted(format_bytes(c.memory.per_host as u64)),
    },
    Setting {
        key: "memory.shared",
        flag: "memory-shared",
        variables: &[Value("RELAY_MEMORY_SHARED")],
        placeholder: "SIZE",
        default: "256MiB",
        group: Group::Machine,
        help: "Memory that all hosts borrow from for moments, for what does not fit into their own; half of it is kept from hosts that hold it for long and from long frames of hosts that are new",
        list: false,
        secret: false,
        live: false,
        set: |c, raw| {
            c.memory.shared = size_between(raw, "32MiB", "1TiB")?;
            Ok(())
        },
        show: |c| quoted(format_bytes(c.memory.shared as u64)),
    },
    Setting {
        key: "memory.parked",
        flag: "memory-parked",
        variables: &[Value("RELAY_MEMORY_PARKED")],
        placeholder: "SIZE",
        default: "256MiB",
        group: Group::Machine,
        help: "Memory for events that wait for a look-up, in equal parts for all hosts, and memory.per_host for each beside",
        list: false,
        secret: false,
        live: false,
        set: |c, raw| {
            c.memory.parked = size_between(raw, "1MiB", "1TiB")?;
            Ok(())
        },
        show: |c| quoted(format_bytes(c.memory.parked as u64)),
    },
    Setting {
        key: "database_connections",
        flag: "database-connections",
        variables: &[
            Value("RELAY_DATABASE_CONNECTIONS"),
            Value("MAX_DB_CONNECTIONS"),
            Value("MAX_METADB_CONNECTIONS"),
        ],
        placeholder: "COUNT",
        default: "12",
        group: Group::Machine,
        help: "Most connections to the database: three to write and to look after it, half of the others for public reads",
        list: false,
        secret: false,
        live: false,
        set: |c, raw| {
            c.database_connections =
                count(raw, u64::from(MIN_DATABASE_CONNECTIONS), 10_000)? as u32;
            Ok(())
        },
        show: |c| c.database_connections.to_string(),
    },
    Setting {
        key: "log_level",
        flag: "log-level",
        variables: &[
            Value("RELAY_LOG_LEVEL"),
            Value("LOG_LEVEL"),
            Value("GO_LOG_LEVEL"),
            Value("RUST_LOG"),
        ],
        placeholder: "LEVEL",
        default: "info",
        group: Group::Messages,
        help: "error, warn, info, debug or trace, or directives such as info,atproto_relay::upstream=debug",
        list: false,
        secret: false,
        live: true,
        set: |c, raw| {
            c.log_level = log_level(text(raw)?)?;
            Ok(())
        },
        show: |c| quoted(&c.log_level),
    },
    Setting {
        key: "log_format",
        flag: "log-format",
        variables: &[Value("RELAY_LOG_FORMAT")],
        placeholder: "FORM",
        default: "text",
        group: Group::Messages,
        help: "text or json; started by systemd, the relay logs to the journal with fields instead",
        list: false,
        secret: false,
        live: false,
        set: |c, raw| {
            c.log_format = parsed(raw)?;
            Ok(())
        },
        show: |c| quoted(c.log_format),
    },
];

fn quoted(value: impl std::fmt::Display) -> String {
    format!("{:?}", value.to_string())
}

fn list<T: std::fmt::Display>(items: impl Iterator<Item = T>) -> String {
    let items: Vec<String> = items.map(quoted).collect();
    format!("[{}]", items.join(", "))
}

fn text(raw: &Raw) -> Result<&str, String> {
    match raw {
        Raw::Text(text) if text.trim().is_empty() => Err("is empty".into()),
        Raw::Text(text) => Ok(text.trim()),
        _ => Err("must be text, in quotes".into()),
    }
}

fn parsed<T: FromStr<Err: std::fmt::Display>>(raw: &Raw) -> Result<T, String> {
    text(raw)?
        .parse()
        .map_err(|error: T::Err| error.to_string())
}

fn boolean(raw: &Raw) -> Result<bool, String> {
    match raw {
        Raw::Bool(value) => Ok(*value),
        Raw::Text(text) => parse_bool(text).ok_or_else(|| "must be true or false".into()),
        _ => Err("must be true or false".into()),
    }
}

/// The words for true and false that flags and variables take.
pub(super) fn parse_bool(text: &str) -> Option<bool> {
    match text.trim().to_ascii_lowercase().as_str() {
        "true" | "1" | "yes" | "on" | "t" => Some(true),
        "false" | "0" | "no" | "off" | "f" => Some(false),
        _ => None,
    }
}

fn count(raw: &Raw, least: u64, most: u64) -> Result<u64, String> {
    let number = match raw {
        Raw::Integer(number) => u64::try_from(*number).ok(),
        Raw::Text(text) => text.trim().parse().ok(),
        _ => None,
    };
    match number {
        Some(number) if (least..=most).contains(&number) => Ok(number),
        _ if most >= i64::MAX as u64 => Err(format!("must be a whole number, {least} or more")),
        _ => Err(format!("must be a whole number from {least} to {most}")),
    }
}

fn number(raw: &Raw) -> Result<f64, String> {
    let number = match raw {
        Raw::Integer(number) => Some(*number as f64),
        Raw::Float(number) => Some(*number),
        Raw::Text(text) => text.trim().parse().ok(),
        _ => None,
    };
    number
        .filter(|n: &f64| n.is_finite() && *n >= 0.0)
        .ok_or_else(|| "must be a number, 0 or more".into())
}

fn positive_number(raw: &Raw) -> Result<f64, String> {
    match number(raw) {
        Ok(number) if number > 0.0 => Ok(number),
        _ => Err("must be a number above 0".into()),
    }
}

fn duration(raw: &Raw) -> Result<Duration, String> {
    match raw {
        Raw::Text(text) => parse_duration(text),
        Raw::Integer(_) | Raw::Float(_) => Err("has no unit; write it as in \"72h\"".into()),
        _ => Err("must be a time, as in \"72h\"".into()),
    }
}

/// A size between two that are written as people write them.
fn size_between(raw: &Raw, least: &str, most: &str) -> Result<usize, String> {
    let size = bytes(raw)?;
    if size < parse_bytes(least)? {
        return Err(format!("is too small; use {least} or more"));
    }
    if size > parse_bytes(most)? {
        return Err(format!("is too large; use {most} or less"));
    }
    usize::try_from(size).map_err(|error| error.to_string())
}

fn positive_duration(raw: &Raw) -> Result<Duration, String> {
    let duration = duration(raw)?;
    if duration.is_zero() {
        return Err("must be longer than zero".into());
    }
    Ok(duration)
}

fn bytes(raw: &Raw) -> Result<u64, String> {
    let size = match raw {
        Raw::Text(text) => parse_bytes(text)?,
        Raw::Integer(size) => u64::try_from(*size).map_err(|_| "must be 0 or more".to_owned())?,
        _ => return Err("must be a size, as in \"200GB\"".into()),
    };
    Ok(size)
}

fn each<T>(raw: &Raw, parse: impl Fn(&str) -> Result<T, String>) -> Result<Vec<T>, String> {
    match raw {
        Raw::List(items) => items.iter().map(|item| parse(text(item)?)).collect(),
        single => Ok(vec![parse(text(single)?)?]),
    }
}

/// Networks, also several in one text, separated by commas; the word none alone is no network.
fn networks(raw: &Raw) -> Result<Vec<Cidr>, String> {
    let texts = each(raw, |text| Ok(text.to_owned()))?;
    if texts == [NONE] {
        return Ok(Vec::new());
    }
    let networks = texts.iter().flat_map(|text| text.split(','));
    networks.map(|text| Cidr::parse(text.trim())).collect()
}

/// `IP:PORT`, `localhost:PORT`, or `:PORT` for every address of the machine.
fn address(raw: &Raw) -> Result<SocketAddr, String> {
    let text = text(raw)?;
    let spelled = match text.strip_prefix("localhost:") {
        Some(port) => format!("127.0.0.1:{port}"),
        None => match text.strip_prefix(':') {
            Some(port) => format!("[{}]:{port}", Ipv6Addr::UNSPECIFIED),
            None => text.to_owned(),
        },
    };
    spelled
        .parse()
        .map_err(|_| "must be an address and a port, as in 127.0.0.1:2470 or :2470".into())
}

/// An http or https URL without path, query and user; a bare name means https.
fn base_url(text: &str) -> Result<Url, String> {
    const FORM: &str = "as in https://plc.directory";
    let spelled = if text.contains("://") {
        text.to_owned()
    } else {
        format!("https://{text}")
    };
    let url = Url::parse(&spelled).map_err(|error| format!("is not a URL ({error}), {FORM}"))?;
    if !matches!(url.scheme(), "http" | "https") {
        return Err(format!("must be an http or https URL, {FORM}"));
    }
    let bare = url.username().is_empty() && url.password().is_none();
    if !bare || url.path().len() > 1 || url.query().is_some() || url.fragment().is_some() {
        return Err(format!("must be only a scheme, a host and a port, {FORM}"));
    }
    Ok(url)
}

/// A level, or tracing directives. A single unknown word would silence everything, so it is refused.
fn log_level(text: &str) -> Result<String, String> {
    const FORM: &str = "must be error, warn, info, debug, trace or directives such as info,atproto_relay::upstream=debug";
    const LEVELS: [&str; 6] = ["off", "error", "warn", "info", "debug", "trace"];
    let lower = text.to_ascii_lowercase();
    if LEVELS.contains(&lower.as_str()) {
        return Ok(lower);
    }
    let directives = text.contains('=') && tracing_subscriber::EnvFilter::try_new(text).is_ok();
    if directives {
        Ok(text.to_owned())
    } else {
        Err(FORM.into())
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn names_are_unique_and_follow_one_rule() {
        let mut seen = BTreeSet::new();
        for setting in SETTINGS {
            assert!(seen.insert(setting.key) && seen.insert(setting.variables[0].name()));
            for variable in &setting.variables[1..] {
                assert!(seen.insert(variable.name()), "{}", variable.name());
            }
            let own = format!("RELAY_{}", setting.flag.replace('-', "_").to_uppercase());
            let first = setting.variables[0].name();
            if !setting.list && setting.key != "database_url" {
                assert_eq!(first, own, "{}", setting.key);
            }
        }
    }

    #[test]
    fn the_documented_defaults_are_the_defaults() {
        let default = Config::default();
        for setting in SETTINGS {
            let words = ["none", "one per core", "SQLite in data_dir"];
            if words.contains(&setting.default) {
                continue;
            }
            let mut parsed = Config::default();
            (setting.set)(&mut parsed, &Raw::Text(setting.default.to_owned())).unwrap();
            assert_eq!(parsed, default, "{}", setting.key);
        }
    }
}
