//! The configuration from its outside: which source wins, and what a mistake is told.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use atproto_relay::config::{
    Change, Config, ConfigError, Environment, Flags, Loaded, Origin, Reload, Setting, settings,
};
use atproto_relay::dial::{Guard, HostName};
use atproto_relay::eventlog::Durability;
use atproto_relay::store::Validation;
use atproto_relay::telemetry::LogFormat;

struct Case {
    folder: tempfile::TempDir,
    flags: Flags,
    env: Vec<(String, String)>,
}

impl Case {
    fn new() -> Case {
        Case {
            folder: tempfile::tempdir().unwrap(),
            flags: Flags::default(),
            env: Vec::new(),
        }
    }

    fn file(mut self, text: &str) -> Case {
        self.flags.config = Some(self.write("relay.toml", text));
        self
    }

    fn env(mut self, name: &str, value: &str) -> Case {
        self.env.push((name.into(), value.into()));
        self
    }

    fn flag(mut self, key: &'static str, values: &[&str]) -> Case {
        self.flags
            .settings
            .insert(key, values.iter().map(|v| v.to_string()).collect());
        self
    }

    fn password_file(self, path: &Path) -> Case {
        let path = path.to_str().unwrap();
        self.flag("admin_password_file", &[path])
    }

    fn write(&self, name: &str, text: &str) -> PathBuf {
        let path = self.folder.path().join(name);
        fs::write(&path, text).unwrap();
        path
    }

    fn load(&self) -> Result<Loaded, ConfigError> {
        let env: Environment = self.env.iter().cloned().collect();
        Config::load(&self.flags, &env)
    }

    fn config(&self) -> Config {
        self.load().unwrap().config
    }

    fn error(&self) -> String {
        let message = self.load().expect_err("this must be refused").to_string();
        assert!(!message.contains('\n'), "one line: {message}");
        message
    }
}

#[test]
fn nothing_configured_is_the_default() {
    let loaded = Case::new().load().unwrap();
    assert_eq!(loaded.config, Config::default());
    assert!(loaded.warnings.is_empty());
    let config = loaded.config;
    assert_eq!(config.listen.to_string(), "127.0.0.1:2470");
    assert_eq!(config.metrics_listen.to_string(), "127.0.0.1:2471");
    assert_eq!(config.log.window, Duration::from_secs(72 * 3600));
    assert_eq!(config.database_url().expose(), "sqlite:./data/relay.sqlite");
    assert!(config.hosts.is_empty() && config.admin_password.is_none());
}

#[test]
fn flag_wins_over_environment_over_file_over_default() {
    let case = Case::new()
        .file("replay_window = \"1h\"\nlisten = \"127.0.0.1:1\"\nvalidation = \"ratchet\"");
    let case = case
        .env("RELAY_REPLAY_WINDOW", "2h")
        .env("RELAY_LISTEN", "127.0.0.1:2")
        .flag("replay_window", &["3h"]);
    let loaded = case.load().unwrap();
    assert_eq!(loaded.config.log.window, Duration::from_secs(3 * 3600));
    assert_eq!(
        loaded.origin("replay_window"),
        Origin::Flag("replay-window".into())
    );
    assert_eq!(loaded.config.listen.port(), 2);
    assert_eq!(
        loaded.origin("listen"),
        Origin::Environment("RELAY_LISTEN".into())
    );
    assert_eq!(loaded.config.verify.validation, Validation::Ratchet);
    let path = case.flags.config.clone().unwrap();
    assert_eq!(loaded.origin("validation"), Origin::File { path, line: 3 });
    assert_eq!(loaded.origin("plc_host"), Origin::Default);
}

/// What such a setting's file has is tested on its own.
fn in_file(setting: &Setting) -> bool {
    setting.secret.is_some_and(|secret| secret.in_file)
}

/// A value of each setting that is not its default: as in the file, and as a flag or a variable has it.
fn sample(key: &str) -> (&'static str, &'static str) {
    match key {
        "data_dir" => ("\"/srv/relay\"", "/srv/relay"),
        "listen" => ("\"[::]:99\"", "[::]:99"),
        "metrics_listen" => ("\"127.0.0.1:98\"", "127.0.0.1:98"),
        "admin_listen" => ("\"unix:/run/admin.sock\"", "unix:/run/admin.sock"),
        "database_url" => (
            "\"postgres:///x?host=/run/postgresql\"",
            "postgres:///x?host=/run/postgresql",
        ),
        "plc_host" => ("\"http://localhost:2582\"", "http://localhost:2582"),
        "hosts" => ("[\"pds.example.com\"]", "pds.example.com"),
        "allow_private_hosts" => ("true", "true"),
        "request_crawl" => ("false", "false"),
        "validation" => ("\"lenient\"", "lenient"),
        "log.durability" => ("\"none\"", "none"),
        "log.group_window" => ("\"5ms\"", "5ms"),
        "log.max_bytes" => ("\"1TB\"", "1TB"),
        "log.min_free_bytes" => ("\"2GB\"", "2GB"),
        "log.segment_bytes" => ("\"64MiB\"", "64MiB"),
        "max_consumer_input" => ("\"2MiB\"", "2MiB"),
        "account_cache" | "memory.shared" | "memory.parked" => ("\"2GiB\"", "2GiB"),
        "memory.per_host" => ("\"1MiB\"", "1MiB"),
        "trusted_domains" => ("[\"*.example.com\"]", "*.example.com"),
        "trusted_proxies" => ("[\"10.0.0.0/8\", \"::1\"]", "10.0.0.0/8,::1"),
        "banned_domains" => ("[\"spam.example.com\"]", "spam.example.com"),
        "replay_window"
        | "desync.period"
        | "limits.message_time"
        | "identity.ttl"
        | "identity.negative_ttl"
        | "identity.refresh_interval" => ("\"7m\"", "7m"),
        "log_level" => ("\"debug\"", "debug"),
        "log_format" => ("\"json\"", "json"),
        _ => ("7", "7"),
    }
}

#[test]
fn every_setting_is_read_from_file_environment_and_flag() {
    for setting in settings().iter().filter(|setting| !in_file(setting)) {
        let (in_file, as_text) = sample(setting.key);
        let default = (setting.show)(&Config::default());
        let name = setting.variables[0].name();
        let from_file = Case::new()
            .file(&format!("{} = {in_file}", setting.key))
            .config();
        let from_env = Case::new().env(name, as_text).config();
        let from_flag = Case::new().flag(setting.key, &[as_text]).config();
        assert_ne!((setting.show)(&from_file), default, "{}", setting.key);
        assert_eq!(from_file, from_env, "{}", setting.key);
        assert_eq!(from_file, from_flag, "{}", setting.key);
        // What is shown is what would be written.
        let shown = Case::new()
            .file(&format!("{} = {}", setting.key, (setting.show)(&from_file)))
            .config();
        assert_eq!(shown, from_file, "{}", setting.key);
    }
}

/// The settings of each room, as the relay gives them to it at its start and at a reload.
fn rooms(config: &Config) -> BTreeMap<&'static str, String> {
    // Without `..`: a field that belongs to no room does not compile.
    let Config {
        listen,
        metrics_listen,
        admin_listen,
        trusted_proxies,
        data_dir,
        database_url,
        database_connections,
        hosts,
        allow_private_hosts,
        admin_password,
        verify,
        discovery,
        host_settings,
        upstream,
        log,
        firehose,
        identity,
        log_format,
        log_level,
    } = config;
    BTreeMap::from([
        (
            "listeners",
            format!("{:?}", (listen, metrics_listen, admin_listen)),
        ),
        ("client", format!("{trusted_proxies:?}")),
        (
            "store",
            format!("{:?}", (database_url, database_connections)),
        ),
        ("data folder", format!("{data_dir:?}")),
        ("configured hosts", format!("{hosts:?}")),
        ("dial", format!("{allow_private_hosts:?}")),
        ("api", format!("{admin_password:?}")),
        ("verify", format!("{verify:?}")),
        ("discovery", format!("{discovery:?}")),
        ("hosts", format!("{host_settings:?}")),
        ("upstream", format!("{upstream:?}")),
        ("eventlog", format!("{log:?}")),
        ("firehose", format!("{firehose:?}")),
        ("identity", format!("{identity:?}")),
        ("telemetry", format!("{:?}", (log_format, log_level))),
    ])
}

#[test]
fn every_setting_changes_the_settings_of_its_room() {
    let room = |key: &str| match key {
        "listen" | "metrics_listen" | "admin_listen" => "listeners",
        "trusted_proxies" => "client",
        "database_url" | "database_connections" => "store",
        "data_dir" => "data folder",
        "hosts" => "configured hosts",
        "allow_private_hosts" => "dial",
        "admin_password_file" => "api",
        "validation" | "shards" | "account_cache" | "limits.account_event_bytes" => "verify",
        "identity.directory_lookups" | "identity.host_lookups" => "verify",
        "trusted_domains" | "banned_domains" => "hosts",
        "request_crawl" | "max_crawl_checks" => "discovery",
        "replay_window" => "eventlog",
        "limits.message_time" => "upstream",
        "log_level" | "log_format" => "telemetry",
        key if key.starts_with("log.") => "eventlog",
        key if key.starts_with("new_hosts_per_day") => "discovery",
        key if key.starts_with("limits.") || key.starts_with("memory.") => "hosts",
        key if key.starts_with("desync.") => "verify",
        key if key.starts_with("max_consumer") => "firehose",
        key if key.starts_with("identity.") || key == "plc_host" => "identity",
        key => panic!("{key} is a setting of no room"),
    };
    let default = rooms(&Config::default());
    let mut changed = BTreeSet::new();
    for setting in settings() {
        let case = Case::new();
        let password = case.write("password", "hunter2");
        let case = if in_file(setting) {
            case.password_file(&password)
        } else {
            case.flag(setting.key, &[sample(setting.key).1])
        };
        let with = rooms(&case.config());
        let differ = |name: &&&str| with[**name] != default[**name];
        let differing: Vec<_> = default.keys().filter(differ).collect();
        assert_eq!(differing, [&room(setting.key)], "{}", setting.key);
        changed.insert(room(setting.key));
    }
    assert!(changed.iter().eq(default.keys()), "{changed:?}");
}

#[test]
fn tables_and_dotted_keys_are_the_same() {
    let table = Case::new()
        .file("[log]\nmax_bytes = \"300GB\"\ndurability = \"interval\"\n[limits]\naccounts = 5\n");
    let dotted = Case::new().file(
        "log.max_bytes = 300_000_000_000\nlog.durability = \"interval\"\nlimits.accounts = 5\n",
    );
    assert_eq!(table.config(), dotted.config());
    assert_eq!(table.config().log.durability, Durability::INTERVAL);
    assert_eq!(table.config().host_settings.limits.accounts, 5);
}

#[test]
fn the_reference_relays_names_are_known() {
    let config = Case::new()
        .env("DATABASE_URL", "postgres://relay@db/relay")
        .env("RELAY_API_BIND", ":2470")
        .env("RELAY_EVENT_PLAYBACK_TTL", "48h0m0s")
        .env("RELAY_DEFAULT_REPO_LIMIT", "7")
        .env(
            "RELAY_TRUSTED_DOMAINS",
            "*.host.bsky.network, pds.example.com",
        )
        .env("RELAY_LENIENT_SYNC_VALIDATION", "true")
        .env("RELAY_DISABLE_REQUEST_CRAWL", "1")
        .env("RELAY_ADMIN_KEY", "hunter2")
        .env("ATP_PLC_HOST", "https://plc.example.com")
        .env("LOG_LEVEL", "WARN")
        .config();
    assert_eq!(config.database_url().expose(), "postgres://relay@db/relay");
    assert_eq!(config.listen.to_string(), "[::]:2470");
    assert_eq!(config.log.window, Duration::from_secs(48 * 3600));
    assert_eq!(config.host_settings.limits.accounts, 7);
    let host = |name: &str| HostName::parse(name, &Guard::new(false)).unwrap();
    let trusted = |name: &str| config.host_settings.is_trusted(&host(name));
    assert!(trusted("a.host.bsky.network") && trusted("pds.example.com"));
    assert_eq!(config.verify.validation, Validation::Lenient);
    assert!(!config.discovery.public_requests);
    assert_eq!(config.admin_password.unwrap().expose(), "hunter2");
    assert_eq!(
        config.identity.plc_host.as_str(),
        "https://plc.example.com/"
    );
    assert_eq!(config.log_level, "warn");
    assert_eq!(config.log_format, LogFormat::Text);
    // A switch that is off says nothing, and an empty variable is not set.
    let off = Case::new()
        .env("RELAY_LENIENT_SYNC_VALIDATION", "false")
        .env("RELAY_LISTEN", "")
        .config();
    assert_eq!(off, Config::default());
}

#[test]
fn an_unknown_variable_is_a_warning_with_the_nearest_name() {
    let case = Case::new()
        .env("RELAY_REPLAY_WINDOWS", "1h")
        .env("RELAY_SIBLING_RELAYS", "x")
        .env("OTHER", "x");
    let loaded = case.load().unwrap();
    assert_eq!(loaded.config, Config::default());
    assert_eq!(loaded.warnings.len(), 2, "{:?}", loaded.warnings);
    assert!(
        loaded.warnings[0].contains("did you mean RELAY_REPLAY_WINDOW?"),
        "{:?}",
        loaded.warnings
    );
    assert!(loaded.warnings[1].contains("RELAY_SIBLING_RELAYS"));
}

#[test]
fn an_unknown_key_names_file_line_and_the_nearest_key() {
    for (text, line, key, nearest) in [
        ("listne = \":1\"", 1, "listne", "did you mean `listen`?"),
        (
            "\n\n[log]\nmax_byte = 1",
            4,
            "log.max_byte",
            "did you mean `log.max_bytes`?",
        ),
        (
            "max_bytes = 1",
            1,
            "max_bytes",
            "did you mean `log.max_bytes`?",
        ),
        (
            "trusted_domain = []",
            1,
            "trusted_domain",
            "did you mean `trusted_domains`?",
        ),
        ("host = \"x\"", 1, "host", "did you mean `hosts`?"),
        (
            "[identity]\nttll = 1",
            2,
            "identity.ttll",
            "did you mean `identity.ttl`?",
        ),
        (
            "data-dir = \"x\"",
            1,
            "data-dir",
            "did you mean `data_dir`?",
        ),
        ("zzzz = 1", 1, "zzzz", "serve --help"),
        (
            "listen.port = 1",
            1,
            "listen.port",
            "did you mean `listen`?",
        ),
        (
            "admin_password = \"hunter2\"",
            1,
            "admin_password",
            "use `admin_password_file`",
        ),
    ] {
        let error = Case::new().file(text).error();
        assert!(
            error.contains(&format!("relay.toml:{line}: unknown key `{key}`")),
            "{text}: {error}"
        );
        assert!(error.contains(nearest), "{text}: {error}");
        assert!(!error.contains("hunter2"));
    }
}

#[test]
fn a_bad_value_names_place_key_value_and_form() {
    for (text, parts) in [
        ("listen = 2470", vec![":1: listen = 2470", "in quotes"]),
        (
            "listen = \"localhost\"",
            vec!["listen", "an address and a port"],
        ),
        ("replay_window = 72", vec!["replay_window = 72", "no unit"]),
        ("replay_window = \"0s\"", vec!["longer than zero"]),
        (
            "log.max_bytes = \"many\"",
            vec!["log.max_bytes = \"many\"", "not a size"],
        ),
        ("log.max_bytes = -1", vec!["0 or more"]),
        ("log.segment_bytes = \"1MB\"", vec!["too small", "8MiB"]),
        (
            "log.max_bytes = \"100MB\"",
            vec![":1: log.max_bytes", "two segments"],
        ),
        ("shards = 0", vec!["shards = 0", "from 1 to 1024"]),
        ("shards = 99999999999999999999", vec!["64 bits"]),
        ("validation = \"Strict\"", vec!["strict, ratchet, lenient"]),
        ("allow_private_hosts = \"perhaps\"", vec!["true or false"]),
        (
            "plc_host = \"plc.directory/x\"",
            vec!["only a scheme, a host and a port"],
        ),
        ("plc_host = \"ftp://plc.directory\"", vec!["http or https"]),
        (
            "hosts = [\"http://pds.example.com\"]",
            vec![":1: ", "http://pds.example.com", "allow_private_hosts"],
        ),
        (
            "hosts = [\"127.0.0.1:2583\"]",
            vec!["127.0.0.1:2583", "allow_private_hosts"],
        ),
        (
            "hosts = [\"https://pds.example.com/xrpc\"]",
            vec!["more than a scheme, a host and a port"],
        ),
        ("hosts = [[[\"a\"]]]", vec!["in quotes"]),
        ("trusted_domains = [\"*\"]", vec!["is not a domain"]),
        ("limits.events_per_second = nan", vec!["above 0"]),
        ("log_level = \"loud\"", vec!["error, warn, info, debug"]),
        ("data_dir = \"\"", vec!["empty"]),
        (
            "data_dir = 1979-05-27",
            vec!["data_dir = a date", "in quotes"],
        ),
        (
            "metrics_listen = \"127.0.0.1:2470\"",
            vec![":1: ", "different ports"],
        ),
        (
            "admin_listen = \"127.0.0.1:2472\"",
            vec![":1: ", "would be the operator", "unix:PATH"],
        ),
        (
            "admin_listen = \"unix:admin.sock\"",
            vec!["a whole path", "unix:/run/"],
        ),
        (
            "database_url = \"mysql://u:geheim@h/d\"",
            vec!["sqlite: or postgres://"],
        ),
        ("listen = ", vec![":1: not valid TOML"]),
        ("a = 1\na = 2", vec![":2: not valid TOML"]),
        ("\n\nreplay_window = \"1h", vec![":3: not valid TOML"]),
    ] {
        let error = Case::new().file(text).error();
        for part in parts {
            assert!(error.contains(part), "{text}: `{part}` is not in: {error}");
        }
        assert!(
            error.contains("relay.toml:") && !error.contains("geheim"),
            "{text}: {error}"
        );
    }
    let error = Case::new().env("RELAY_REPLAY_WINDOW", "soon").error();
    assert!(
        error.starts_with("environment variable RELAY_REPLAY_WINDOW: replay_window = \"soon\""),
        "{error}"
    );
    let error = Case::new().flag("replay_window", &["soon"]).error();
    assert!(error.starts_with("--replay-window: "), "{error}");
}

#[test]
fn a_value_that_is_overridden_is_checked_all_the_same() {
    let error = Case::new()
        .file("replay_window = \"soon\"")
        .flag("replay_window", &["1h"])
        .error();
    assert!(error.contains("relay.toml:1"), "{error}");
}

#[test]
fn private_hosts_need_to_be_allowed() {
    let case = Case::new().flag("hosts", &["http://localhost:2583", "pds.example.com"]);
    assert!(
        case.error()
            .starts_with("--host: the host http://localhost:2583")
    );
    let config = case.flag("allow_private_hosts", &["true"]).config();
    let hosts: Vec<String> = config.hosts.iter().map(HostName::http_url).collect();
    assert_eq!(hosts, ["http://localhost:2583", "https://pds.example.com"]);
}

#[test]
fn the_admin_password_comes_from_a_file_a_variable_or_a_credential() {
    let case = Case::new();
    let file = case.write("password", "from file\n");
    fs::create_dir(case.folder.path().join("credentials")).unwrap();
    case.write("credentials/admin-password", "from credential");
    case.write(
        "credentials/database-url",
        "postgres://relay:geheim@db/relay\n",
    );
    let credentials = case.folder.path().join("credentials");

    let mut case = case.env("CREDENTIALS_DIRECTORY", credentials.to_str().unwrap());
    let loaded = case.load().unwrap();
    assert_eq!(
        loaded.config.admin_password.as_ref().unwrap().expose(),
        "from credential"
    );
    assert_eq!(
        loaded.config.database_url().expose(),
        "postgres://relay:geheim@db/relay"
    );
    assert!(!format!("{:?}", loaded.config).contains("geheim"));
    assert!(!format!("{:?}", loaded.config).contains("from credential"));

    case = case
        .env("RELAY_ADMIN_PASSWORD", "from variable")
        .env("DATABASE_URL", "sqlite:x");
    assert_eq!(
        case.config().admin_password.unwrap().expose(),
        "from variable"
    );
    assert_eq!(case.config().database_url().expose(), "sqlite:x");

    case = case.password_file(&file);
    assert_eq!(case.config().admin_password.unwrap().expose(), "from file");
}

#[test]
fn a_credential_that_cannot_be_used_is_named() {
    let case = Case::new();
    let folder = case.folder.path().join("credentials");
    fs::create_dir(&folder).unwrap();
    let case = case.env("CREDENTIALS_DIRECTORY", folder.to_str().unwrap());
    assert!(case.config().admin_password.is_none(), "none is passed");
    for name in ["admin-password", "database-url"] {
        let what = name.replace('-', " ").replace("url", "URL");
        for (content, problem) in [("", "is empty"), ("\r\n", "is empty")] {
            let path = case.write(&format!("credentials/{name}"), content);
            let error = case.error();
            let expected = format!("credential {}: ", path.display());
            assert!(error.starts_with(&expected), "{error}");
            assert!(error.contains(&what) && error.contains(problem), "{error}");
            fs::remove_file(path).unwrap();
        }
        // A folder stands for all that cannot be read; these tests may be run by root, who may read all files.
        fs::create_dir(folder.join(name)).unwrap();
        let error = case.error();
        assert!(
            error.contains(&format!("cannot read the {what}")),
            "{error}"
        );
        fs::remove_dir(folder.join(name)).unwrap();
    }
    case.write("credentials/database-url", "geheim\n");
    let error = case.error();
    assert!(error.contains("database_url must begin with"), "{error}");
    assert!(!error.contains("geheim"), "{error}");
    for line_end in ["", "\n", "\r\n"] {
        let url = "postgres:///relay?host=/run/postgresql";
        case.write("credentials/database-url", &format!("{url}{line_end}"));
        case.write("credentials/admin-password", &format!(" a b {line_end}"));
        let config = case.config();
        assert_eq!(config.database_url().expose(), url);
        assert_eq!(config.admin_password.unwrap().expose(), " a b ");
    }
}

#[test]
fn a_reload_says_what_it_applies_and_what_waits() {
    let started = Case::new().file("max_consumers = 5\nshards = 3").config();
    let last = Case::new().file("max_consumers = 6\nshards = 4").config();
    let new = Case::new()
        .file("max_consumers = 7\nshards = 4\n[log]\ndurability = \"none\"")
        .env("RELAY_ADMIN_PASSWORD", "hunter2")
        .env("DATABASE_URL", "postgres://relay:geheim@db/relay")
        .config();
    let reload = Reload::between(&started, &last, &new);
    let keys = |changes: &[Change]| -> Vec<String> {
        changes
            .iter()
            .map(|Change { key, from, to }| format!("{key}: {from} to {to}"))
            .collect()
    };
    assert_eq!(
        keys(&reload.applied),
        [
            "admin_password_file: none to (secret)",
            "max_consumers: 6 to 7"
        ]
    );
    let waiting = keys(&reload.waiting);
    assert_eq!(waiting.len(), 3, "{waiting:?}");
    assert!(waiting[0].starts_with("database_url: ") && !waiting[0].contains("geheim"));
    assert_eq!(waiting[1], "log.durability: \"sync\" to \"none\"");
    assert_eq!(waiting[2], "shards: 3 to 4");
    assert_eq!(Reload::between(&new, &new, &new), Reload::default());
}

#[test]
fn the_files_admin_password_file_is_read() {
    let case = Case::new();
    let path = case.write("password", "hunter2\r\n");
    let case = case.file(&format!("admin_password_file = {path:?}"));
    assert_eq!(case.config().admin_password.unwrap().expose(), "hunter2");
}

#[test]
fn a_bad_secret_file_is_named_with_what_to_do() {
    let mut case = Case::new();
    let absent = case.folder.path().join("absent");
    case = case.password_file(&absent);
    let error = case.error();
    assert!(
        error.starts_with("--admin-password-file: cannot read the admin password from"),
        "{error}"
    );
    assert!(
        error.contains("absent") && error.contains("check that the file exists"),
        "{error}"
    );

    let empty = case.write("empty", "\n");
    case = case.password_file(&empty);
    assert!(case.error().contains("is empty"));

    let large = case.write("large", &"x".repeat(70_000));
    case = case.password_file(&large);
    assert!(case.error().contains("more than 64 KiB"));

    let both = Case::new()
        .env("RELAY_ADMIN_PASSWORD", "a")
        .env("RELAY_ADMIN_PASSWORD_FILE", "/b");
    assert!(both.error().contains("set only one of the two"));
}

#[test]
fn an_unreadable_file_is_named_with_what_to_do() {
    let mut case = Case::new();
    case.flags.config = Some(case.folder.path().join("absent.toml"));
    let error = case.error();
    assert!(
        error.contains("cannot read the configuration file") && error.contains("absent.toml"),
        "{error}"
    );
    assert!(error.contains("--config"), "{error}");
    let by_variable = Case::new().env("RELAY_CONFIG", "/absent.toml");
    assert!(by_variable.error().contains("/absent.toml"));
}

#[test]
fn a_password_on_the_command_line_is_warned_of() {
    let loaded = Case::new()
        .flag("database_url", &["postgres://relay:geheim@db/relay"])
        .load()
        .unwrap();
    assert!(
        loaded.warnings[0].contains("process list"),
        "{:?}",
        loaded.warnings
    );
    assert!(!loaded.warnings[0].contains("geheim"));
}

#[test]
fn trusted_proxies_are_networks_and_everybody_is_warned_of() {
    let shown = |text: &str| {
        let config = Case::new()
            .file(&format!("trusted_proxies = {text}"))
            .config();
        let networks = config.trusted_proxies.iter().map(ToString::to_string);
        networks.collect::<Vec<_>>()
    };
    assert_eq!(shown("[]"), [""; 0]);
    assert_eq!(shown("\"none\""), [""; 0]);
    assert_eq!(
        shown("[\"192.0.2.7/32\", \"2001:db8::/32\", \"::ffff:10.0.0.0/104\"]"),
        ["192.0.2.7", "2001:db8::/32", "10.0.0.0/8"]
    );
    let bits = Case::new().flag("trusted_proxies", &["10.1.2.3/8"]).error();
    assert!(bits.starts_with("--trusted-proxy: "), "{bits}");
    assert!(bits.contains("write 10.0.0.0/8"), "{bits}");
    let name = Case::new().flag("trusted_proxies", &["proxy.example.com"]);
    assert!(name.error().contains("must be addresses or networks"));
    let loaded = Case::new().flag("trusted_proxies", &["0.0.0.0/0"]).load();
    let warnings = loaded.unwrap().warnings;
    assert!(
        warnings[0].contains("every client may name any address"),
        "{warnings:?}"
    );
}
