//! The table of all settings: key in the file, flag, environment variables, default, meaning.
//! The command line, the file reader, `check-config` and the documents all follow this one table.
//! How a value is read and written is in `kinds.rs`; which source wins is in `load.rs`.

use std::sync::LazyLock;

use super::kinds::{
    Kind, address, admin_listener, base_url, boolean, choice, count, database, directives, domains,
    folder, hosts, min_free, networks, password, positive_rate, positive_time, quoted, rate, size,
    switch, time,
};
use super::source::Raw;
use super::units::{KIB, MB, MIB, TIB};
use super::{Config, MAX_GROUP_WINDOW, MIN_SEGMENT_BYTES};
use crate::dial::DomainPattern;
use crate::eventlog::Durability;
use crate::store::{MIN_CONNECTIONS, Validation};
use crate::telemetry::LogFormat;
use crate::verify::MAX_SHARDS;

/// Headings of `--help` and of the configuration page.
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
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Variable {
    /// Its value is what a flag would have.
    Value(&'static str),
    /// A switch of the reference relay: set to true it means this value.
    Switch(&'static str, &'static str),
    /// It has the secret itself, where the flag names a file with it.
    Secret(&'static str),
}

impl Variable {
    /// The variable's name.
    pub fn name(&self) -> &'static str {
        match self {
            Variable::Value(name) | Variable::Switch(name, _) | Variable::Secret(name) => name,
        }
    }
}

/// What a setting has that may hold a secret.
#[derive(Debug, Clone, Copy)]
pub struct SecretSource {
    /// What the secret is, in messages.
    pub what: &'static str,
    /// The systemd credential that may have it.
    pub credential: &'static str,
    /// Whether key and flag name a file with the secret instead of the secret itself.
    pub in_file: bool,
}

/// One setting.
pub struct Setting {
    /// Key in the file, tables joined by dots.
    pub key: &'static str,
    /// Flag, without dashes.
    pub flag: &'static str,
    /// Environment variables, the first that is set counts. Those without RELAY_ and most aliases
    /// are the reference relay's.
    pub variables: Vec<Variable>,
    /// What stands for the value in `--help`; empty for a switch.
    pub placeholder: &'static str,
    /// The default as it would be written.
    pub default: &'static str,
    /// The heading it stands under.
    pub group: Group,
    /// What it sets, in one line without the full stop at its end.
    pub help: &'static str,
    /// Whether it takes several values.
    pub list: bool,
    /// Set where the value may be a secret; such a value is never shown.
    pub secret: Option<SecretSource>,
    /// Whether a reload applies it; else it waits for a restart.
    pub live: bool,
    /// Reads a value into the configuration; the error says what is wrong with it.
    pub(super) set: Read,
    /// The value as it would be written in the file.
    pub show: Show,
    same: Compare,
}

/// See [`Setting::set`].
pub(super) type Read = Box<dyn Fn(&mut Config, &Raw) -> Result<(), String> + Send + Sync>;
/// See [`Setting::show`].
pub type Show = Box<dyn Fn(&Config) -> String + Send + Sync>;
type Compare = Box<dyn Fn(&Config, &Config) -> bool + Send + Sync>;

/// Where in the configuration a setting's value is kept.
struct Field<T> {
    get: fn(&Config) -> &T,
    get_mut: fn(&mut Config) -> &mut T,
}

macro_rules! field {
    ($($path:tt)+) => {
        Field { get: |config| &config.$($path)+, get_mut: |config| &mut config.$($path)+ }
    };
}

impl Setting {
    /// A setting that needs a restart. Flag and variable follow from the key: `log.max_bytes` is `--log-max-bytes` and
    /// `RELAY_LOG_MAX_BYTES`; the table `limits` loses its plural.
    fn new<T: PartialEq + 'static>(
        key: &'static str,
        kind: Kind<T>,
        field: Field<T>,
        default: &'static str,
        help: &'static str,
    ) -> Setting {
        let words = key.replace("limits.", "limit.").replace('.', "_");
        let Kind {
            placeholder,
            list,
            read,
            write,
        } = kind;
        Setting {
            key,
            flag: words.replace('_', "-").leak(),
            variables: vec![Variable::Value(
                format!("RELAY_{}", words.to_uppercase()).leak(),
            )],
            placeholder,
            default,
            group: Group::Common,
            help,
            list,
            secret: None,
            live: false,
            set: Box::new(move |config, raw| {
                *(field.get_mut)(config) = read(raw)?;
                Ok(())
            }),
            show: Box::new(move |config| write((field.get)(config))),
            same: Box::new(move |one, other| (field.get)(one) == (field.get)(other)),
        }
    }

    /// A reload applies it.
    fn live(mut self) -> Setting {
        self.live = true;
        self
    }

    /// A flag that is given once for each value has the singular.
    fn flag(mut self, flag: &'static str) -> Setting {
        self.flag = flag;
        self
    }

    /// Also set by these variables, after its own.
    fn also(mut self, aliases: impl IntoIterator<Item = Variable>) -> Setting {
        self.variables.extend(aliases);
        self
    }

    fn secret(mut self, secret: SecretSource) -> Setting {
        self.secret = Some(secret);
        self
    }

    /// Whether two configurations have different values.
    pub fn differs(&self, one: &Config, other: &Config) -> bool {
        !(self.same)(one, other)
    }
}

/// All settings, in the order of `--help`.
pub fn settings() -> &'static [Setting] {
    static SETTINGS: LazyLock<Vec<Setting>> = LazyLock::new(|| {
        let groups = [
            (Group::Common, listeners()),
            (Group::Common, database_and_network()),
            (Group::Common, access()),
            (Group::Log, log()),
            (Group::Hosts, domains_and_crawls()),
            (Group::Hosts, event_limits()),
            (Group::Hosts, other_limits()),
            (Group::Consumers, consumers()),
            (Group::Identity, identities()),
            (Group::Machine, machine()),
            (Group::Messages, messages()),
        ];
        let of_group = |(group, settings): (Group, Vec<Setting>)| {
            let settings = settings.into_iter();
            settings.map(move |setting| Setting { group, ..setting })
        };
        groups.into_iter().flat_map(of_group).collect()
    });
    &SETTINGS
}

use Variable::{Secret, Switch, Value};

fn listeners() -> Vec<Setting> {
    vec![
        Setting::new(
            "data_dir",
            folder(),
            field!(data_dir),
            "./data",
            "Folder of the event log and, with SQLite, of the database. Only one relay at a time can use it",
        ),
        Setting::new(
            "listen",
            address(),
            field!(listen),
            "127.0.0.1:2470",
            "Address of the public API and the firehose. `:2470` listens on all addresses of the machine",
        )
        .also([Value("RELAY_API_BIND"), Value("RELAY_API_LISTEN")]),
        Setting::new(
            "metrics_listen",
            address(),
            field!(metrics_listen),
            "127.0.0.1:2471",
            "Address of /metrics and /_health. Do not expose it to the internet",
        ),
        Setting::new(
            "admin_listen",
            admin_listener(),
            field!(admin_listen),
            "none",
            "Separate listener for the admin API. unix:PATH asks for no password, an address and port does",
        ),
        Setting::new(
            "trusted_proxies",
            networks(),
            field!(trusted_proxies),
            "127.0.0.0/8, ::1",
            "Reverse proxy whose X-Forwarded-For and Forwarded headers are trusted, an address or a network such as 10.0.0.0/8. Repeat it for more; none trusts no proxy",
        )
        .flag("trusted-proxy")
        .live(),
    ]
}

fn database_and_network() -> Vec<Setting> {
    let database_url = Setting::new(
        "database_url",
        database(),
        field!(database_url),
        "SQLite in data_dir",
        "Database, sqlite:PATH or postgres://USER@HOST/NAME. Put a URL with a password into the environment or into the systemd credential `database-url`",
    );
    vec![
        Setting {
            variables: vec![Value("DATABASE_URL"), Value("RELAY_DATABASE_URL")],
            show: Box::new(|config| quoted(&config.database_url())),
            ..database_url
        }
        .secret(SecretSource {
            what: "database URL",
            credential: "database-url",
            in_file: false,
        }),
        Setting::new(
            "plc_host",
            base_url(),
            field!(identity.plc_host),
            "https://plc.directory",
            "PLC directory that resolves did:plc",
        )
        .also([Value("ATP_PLC_HOST")]),
        Setting::new(
            "hosts",
            hosts(),
            field!(hosts),
            "none",
            "Host to subscribe to, a name or a URL. Repeat it for more. The database keeps a host that was added once",
        )
        .flag("host")
        .live(),
        Setting::new(
            "allow_private_hosts",
            switch(),
            field!(allow_private_hosts),
            "false",
            "Allow http, any port, and hosts at loopback and private addresses. For test networks only",
        ),
    ]
}

fn access() -> Vec<Setting> {
    vec![
        Setting::new(
            "admin_password_file",
            password(),
            field!(admin_password),
            "none",
            "File with the password of the admin API. Without a password the admin API is only served on a Unix socket. RELAY_ADMIN_PASSWORD or the systemd credential `admin-password` can have the password itself",
        )
        .also([Secret("RELAY_ADMIN_PASSWORD"), Secret("RELAY_ADMIN_KEY")])
        .secret(SecretSource {
            what: "admin password",
            credential: "admin-password",
            in_file: true,
        })
        .live(),
        Setting::new(
            "validation",
            choice("MODE", Validation::ALL, Validation::as_str),
            field!(verify.validation),
            "strict",
            "How commits are checked: strict; ratchet (strict for a host after its first sync 1.1 commit); lenient (missing prevData and prev are accepted)",
        )
        .also([Switch("RELAY_LENIENT_SYNC_VALIDATION", "lenient")])
        .live(),
    ]
}

fn log() -> Vec<Setting> {
    vec![
        Setting::new(
            "replay_window",
            positive_time(),
            field!(log.window),
            "72h",
            "Time that events stay in the log, so that consumers can resume",
        )
        .also([Value("RELAY_EVENT_PLAYBACK_TTL")])
        .live(),
        Setting::new(
            "log.max_bytes",
            size(0..),
            field!(log.max_bytes),
            "200GB",
            "Maximum size of the event log on disk. The oldest events are deleted first, even within the replay window",
        )
        .live(),
        Setting::new(
            "log.min_free_bytes",
            min_free(),
            field!(log.min_free),
            "auto",
            "Free space that the log leaves on its file system by deleting the oldest events. auto: 5 % of it, at most 5GB; shared, for the disk of the operating system: 15 %, at most 20GB; 0: none, and while the disk is full the relay takes no events",
        )
        .live(),
        Setting::new(
            "log.segment_bytes",
            size(MIN_SEGMENT_BYTES..),
            field!(log.segment_bytes),
            "128MiB",
            "Size of one segment file of the log. Disk space is reserved and freed in this unit",
        ),
        Setting::new(
            "log.durability",
            choice("MODE", Durability::ALL, Durability::as_str),
            field!(log.durability),
            "sync",
            "When events are on disk: sync (before a consumer receives them), interval (at most 100 ms after), none (left to the kernel)",
        ),
        Setting::new(
            "log.group_window",
            time(MAX_GROUP_WINDOW),
            field!(log.group_window),
            "2ms",
            "Minimum time between two writes to the log. Events in between share one write. At most 1s; 0s writes immediately",
        )
        .live(),
    ]
}

fn domains_and_crawls() -> Vec<Setting> {
    vec![
        Setting::new(
            "trusted_domains",
            domains(DomainPattern::trusted),
            field!(host_settings.trusted_domains),
            "*.host.bsky.network",
            "Hosts with the account quota limits.trusted_accounts: a name, or *.DOMAIN for all its subdomains. Repeat it for more",
        )
        .flag("trusted-domain")
        .live(),
        Setting::new(
            "banned_domains",
            domains(DomainPattern::banned),
            field!(host_settings.banned_domains),
            "none",
            "Domain that is never subscribed to, subdomains included. Repeat it for more",
        )
        .flag("banned-domain")
        .live(),
        Setting::new(
            "request_crawl",
            boolean(),
            field!(discovery.public_requests),
            "true",
            "Whether the public can add hosts with com.atproto.sync.requestCrawl",
        )
        .also([Switch("RELAY_DISABLE_REQUEST_CRAWL", "false")])
        .live(),
        Setting::new(
            "new_hosts_per_day",
            count(0..=u64::from(u32::MAX)),
            field!(discovery.new_hosts_per_day),
            "50",
            "Maximum new hosts in 24 hours through the public requestCrawl",
        )
        .also([Value("RELAY_NEW_HOSTS_PER_DAY_LIMIT")])
        .live(),
        Setting::new(
            "new_hosts_per_day_per_ip",
            count(0..=u64::from(u32::MAX)),
            field!(discovery.new_hosts_per_day_per_ip),
            "10",
            "Maximum new hosts in 24 hours that one address (IPv6: one /64) can add. One IPv6 /48 can add four times as many",
        )
        .live(),
        Setting::new(
            "new_hosts_per_day_per_domain",
            count(0..=u64::from(u32::MAX)),
            field!(discovery.new_hosts_per_day_per_domain),
            "10",
            "Maximum new hosts in 24 hours of one registered domain: pds.example.com counts for example.com",
        )
        .live(),
        Setting::new(
            "max_crawl_checks",
            count(1..=10_000),
            field!(discovery.max_checks),
            "64",
            "Maximum concurrent checks of hosts for the public requestCrawl. One address and one domain can have a sixteenth each. Checks for the operator do not count",
        )
        .live(),
    ]
}

fn event_limits() -> Vec<Setting> {
    vec![
        Setting::new(
            "limits.accounts",
            count(0..),
            field!(host_settings.limits.accounts),
            "100",
            "Maximum active accounts of a host. Accounts above it are throttled until the limit is raised",
        )
        .also([
            Value("RELAY_DEFAULT_ACCOUNT_LIMIT"),
            Value("RELAY_DEFAULT_REPO_LIMIT"),
        ])
        .live(),
        Setting::new(
            "limits.trusted_accounts",
            count(0..),
            field!(host_settings.limits.trusted_accounts),
            "10000000",
            "Maximum active accounts of a host of trusted_domains",
        )
        .live(),
        Setting::new(
            "limits.events_per_second",
            positive_rate(),
            field!(host_settings.limits.per_second.base),
            "50",
            "Maximum events per second from a host. Above it the relay reads the socket more slowly and drops nothing",
        )
        .live(),
        Setting::new(
            "limits.events_per_second_per_account",
            rate(),
            field!(host_settings.limits.per_second.per_account),
            "0.001",
            "Events per second added to the limit for each account of the host",
        )
        .live(),
        Setting::new(
            "limits.events_per_hour",
            positive_rate(),
            field!(host_settings.limits.per_hour.base),
            "2500",
            "Maximum events per hour from a host",
        )
        .live(),
        Setting::new(
            "limits.events_per_hour_per_account",
            rate(),
            field!(host_settings.limits.per_hour.per_account),
            "1",
            "Events per hour added to the limit for each account of the host",
        )
        .live(),
        Setting::new(
            "limits.events_per_day",
            positive_rate(),
            field!(host_settings.limits.per_day.base),
            "20000",
            "Maximum events in 24 hours from a host",
        )
        .live(),
        Setting::new(
            "limits.events_per_day_per_account",
            rate(),
            field!(host_settings.limits.per_day.per_account),
            "10",
            "Events in 24 hours added to the limit for each account of the host",
        )
        .live(),
    ]
}

fn other_limits() -> Vec<Setting> {
    vec![
        Setting::new(
            "limits.account_event_bytes",
            size(0..),
            field!(verify.account_event_bytes),
            "8KiB",
            "Maximum size of an #identity or #account event. Larger ones are dropped",
        )
        .live(),
        Setting::new(
            "limits.bytes_per_hour",
            size(0..),
            field!(host_settings.limits.bytes_per_hour.base),
            "200MB",
            "Maximum bytes per hour from a host. Above it the relay reads the socket more slowly and drops nothing",
        )
        .live(),
        Setting::new(
            "limits.bytes_per_hour_per_account",
            size(0..),
            field!(host_settings.limits.bytes_per_hour.per_account),
            "100kB",
            "Bytes per hour added to the limit for each account of the host",
        )
        .live(),
        Setting::new(
            "limits.pings_per_second",
            count(1..=u64::from(u32::MAX)),
            field!(host_settings.limits.others_per_second),
            "20",
            "Maximum pings, pongs and text messages per second from a host. Above it the relay reads the socket more slowly, events included",
        )
        .live(),
        Setting::new(
            "limits.message_time",
            positive_time(),
            field!(upstream.message_time),
            "30s",
            "Maximum time from the first byte of a host's message to its last. After it the relay closes the connection",
        ),
        Setting::new(
            "desync.limit",
            count(0..=u64::from(u32::MAX)),
            field!(verify.desync.limit),
            "100",
            "Maximum breaks in an account's chain of commits within desync.period. After one more the account is desynchronized",
        )
        .live(),
        Setting::new(
            "desync.period",
            positive_time(),
            field!(verify.desync.period),
            "24h",
            "Time over which breaks in an account's chain of commits are counted",
        )
        .live(),
    ]
}

fn consumers() -> Vec<Setting> {
    vec![
        Setting::new(
            "max_consumers",
            count(1..=1_000_000),
            field!(firehose.max_consumers),
            "1000",
            "Maximum concurrent consumers of the firehose",
        )
        .live(),
        Setting::new(
            "max_consumers_per_ip",
            count(1..=1_000_000),
            field!(firehose.max_consumers_per_ip),
            "50",
            "Maximum concurrent consumers of the firehose from one address (IPv6: one /64). One IPv6 /48 can have four times as many",
        )
        .live(),
        Setting::new(
            "max_consumer_input",
            size(KIB..),
            field!(firehose.max_consumer_input),
            "64KiB",
            "Maximum bytes per second from a consumer, in bursts 16 times as many. A read counts as 512 bytes at least. Above it the relay reads that consumer more slowly",
        )
        .live(),
    ]
}

fn identities() -> Vec<Setting> {
    vec![
        Setting::new(
            "identity.ttl",
            positive_time(),
            field!(identity.ttl),
            "24h",
            "Time after which a cached identity is resolved again",
        )
        .live(),
        Setting::new(
            "identity.negative_ttl",
            positive_time(),
            field!(identity.negative_ttl),
            "2m",
            "Time that a failed resolution is cached",
        )
        .live(),
        Setting::new(
            "identity.refresh_interval",
            positive_time(),
            field!(identity.refresh_interval),
            "30s",
            "Mean time between two forced resolutions of one DID for one host, and minimum time between two requests for an account's status at its PDS",
        )
        .live(),
        Setting::new(
            "identity.directory_rate",
            positive_rate(),
            field!(identity.directory_rate),
            "100",
            "Maximum requests per second to the PLC directory",
        )
        .live(),
        Setting::new(
            "identity.directory_lookups",
            count(1..=10_000),
            field!(verify.places.directory),
            "64",
            "Maximum concurrent requests to the PLC directory. Hosts whose events need them share them",
        ),
        Setting::new(
            "identity.host_lookups",
            count(1..=10_000),
            field!(verify.places.hosts),
            "128",
            "Maximum concurrent requests for did:web documents, and as many for account statuses. Hosts whose events need them share them",
        ),
        Setting::new(
            "identity.cache_entries",
            count(1..=100_000_000),
            field!(identity.cache_entries),
            "200000",
            "Maximum identities in memory",
        )
        .also([
            Value("RELAY_IDENT_CACHE_SIZE"),
            Value("RELAY_DID_CACHE_SIZE"),
        ])
        .live(),
    ]
}

fn machine() -> Vec<Setting> {
    vec![
        Setting::new(
            "shards",
            count(1..=MAX_SHARDS as u64),
            field!(verify.shards),
            "one per core",
            "Number of threads that verify events",
        ),
        Setting::new(
            "account_cache",
            size(MIB..),
            field!(verify.account_bytes),
            "512MiB",
            "Memory for the state of accounts. State that does not fit is read from the database",
        ),
        Setting::new(
            "memory.per_host",
            size(16 * KIB..=5 * MB),
            field!(host_settings.memory.per_host),
            "64KiB",
            "Memory reserved for the in-flight events of each host, and as much again for an incomplete message",
        ),
        Setting::new(
            "memory.shared",
            size(32 * MIB..=TIB),
            field!(host_settings.memory.shared),
            "256MiB",
            "Memory that hosts borrow for what does not fit into memory.per_host. Half of it is closed to hosts that hold it for long and to long frames of new hosts",
        ),
        Setting::new(
            "memory.parked",
            size(MIB..=TIB),
            field!(host_settings.memory.parked),
            "256MiB",
            "Memory for events that wait for a look-up, in equal parts for all hosts. Each host also has memory.per_host for them",
        ),
        Setting::new(
            "database_connections",
            count(u64::from(MIN_CONNECTIONS)..=10_000),
            field!(database_connections),
            "12",
            "Maximum connections to the database. Three of them write and watch the database, half of the others serve public reads",
        )
        .also([
            Value("MAX_DB_CONNECTIONS"),
            Value("MAX_METADB_CONNECTIONS"),
        ]),
    ]
}

fn messages() -> Vec<Setting> {
    vec![
        Setting::new(
            "log_level",
            directives(),
            field!(log_level),
            "info",
            "Log level: error, warn, info, debug or trace, or directives such as info,atproto_relay::upstream=debug",
        )
        .also([Value("LOG_LEVEL"), Value("GO_LOG_LEVEL"), Value("RUST_LOG")])
        .live(),
        Setting::new(
            "log_format",
            choice("FORM", LogFormat::ALL, LogFormat::as_str),
            field!(log_format),
            "text",
            "Format of log lines, text or json. Under systemd the relay logs to the journal with fields instead",
        ),
    ]
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn names_are_unique_and_follow_one_rule() {
        let mut seen = BTreeSet::new();
        for setting in settings() {
            assert!(seen.insert(setting.key), "{}", setting.key);
            for variable in &setting.variables {
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
        for setting in settings() {
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
