//! The relay as a service of systemd: what it tells, when, and what it does when it is asked. The test takes systemd's
//! place; nothing of systemd is needed.

#![cfg(feature = "devnet")]

use crate::support::postgres;
use atproto_relay::dial::plain_client;
use std::collections::HashMap;
use std::fs;
use std::io::Write as _;
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::net::UnixDatagram;
use std::process::{Command, Stdio};
use std::time::Duration;

use crate::support::service::{Frozen, PATIENCE, Service};
use crate::support::small_disk::SmallDisk;
use atproto_relay::devnet::network::{Network, NetworkOptions};
use atproto_relay::devnet::pds::{Write, frames};
use atproto_relay::devnet::scrape::Samples;
use futures_util::StreamExt as _;
use rustix::process::Signal;
use serde_json::{Value, json};
use sqlx::{Connection, Executor, PgConnection, Row};
use tokio_tungstenite::connect_async;

const POSTS: &str = "app.bsky.feed.post";
/// `WatchdogSec=` of these tests: pings come twice as often.
const WATCHDOG: Duration = Duration::from_secs(1);

fn post(text: &str) -> Value {
    json!({"$type": POSTS, "text": text, "createdAt": "2026-01-01T00:00:00Z"})
}

async fn network() -> Network {
    Network::start(NetworkOptions::default()).await.unwrap()
}

/// Lets a relay subscribe to a network.
fn join<'a>(network: &Network, command: &'a mut Command) -> &'a mut Command {
    command.args(["--allow-private-hosts", "--plc-host", &network.plc_url()]);
    for pds in network.all_pds() {
        command.args(["--host", &pds.url()]);
    }
    command
}

fn watched(command: &mut Command) {
    let micros = WATCHDOG.as_micros().to_string();
    command.env("WATCHDOG_USEC", micros);
}

/// The status lines up to one that has all of this.
fn until_status(service: &Service, parts: &[&str]) -> String {
    for _ in 0..20 {
        let message = service.until("STATUS=");
        let status = message.iter().find(|line| line.starts_with("STATUS="));
        let status = status.unwrap().clone();
        if parts.iter().all(|part| status.contains(part)) {
            return status;
        }
    }
    panic!("no status with {parts:?}; it said:\n{}", service.said());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn it_is_ready_when_it_serves_and_tells_how_it_does() {
    let network = network().await;
    let folder = tempfile::tempdir().unwrap();
    let service = Service::start(folder.path(), |command| {
        join(&network, command);
    });
    let first = service.hear(PATIENCE).unwrap();
    assert_eq!(first[0], "READY=1", "{first:?}");
    let health = format!("{}/_health", service.url());
    assert_eq!(
        plain_client().get(&health).send().await.unwrap().status(),
        200
    );
    let status = until_status(&service, &["1 of 1 hosts connected", "0 consumers"]);
    assert!(status.contains("events/s, lag "), "{status}");

    let pds = network.pds(0);
    let alice = pds.create_account("alice.pds1.test").unwrap().did;
    for n in 0..50 {
        pds.create_record(&alice, POSTS, post(&n.to_string()))
            .unwrap();
    }
    loop {
        let status = until_status(&service, &["events/s"]);
        if !status.contains(" 0 events/s") {
            break;
        }
    }
    let metrics = Samples::scrape(&service.metrics_url()).await.unwrap();
    assert!(metrics.get("relay_log_disk_bytes") > 0.0);
    assert!(metrics.get("relay_log_disk_free_bytes") > 0.0);
    assert_eq!(metrics.get("relay_log_window_seconds"), 259_200.0);
    let lag = metrics.get("relay_lag_seconds");
    assert!((0.0..60.0).contains(&lag), "{lag}");
    assert!(service.end(), "exit code 0");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_part_that_stands_still_stops_the_pings() {
    let network = network().await;
    let folder = tempfile::tempdir().unwrap();
    let service = Service::start(folder.path(), |command| {
        watched(join(&network, command));
    });
    service.until("READY=1");
    // Idle, it pings.
    let pings = service.count("WATCHDOG=1", WATCHDOG * 3);
    assert!((3..=7).contains(&pings), "{pings} pings");
    for part in ["shard-1", "sequencer", "tokio-rt-worker"] {
        let Some(frozen) = Frozen::freeze(service.threads(part)) else {
            return;
        };
        // A ping may have been on its way.
        service.count("WATCHDOG=1", WATCHDOG);
        let pings = service.count("WATCHDOG=1", WATCHDOG * 2);
        assert_eq!(pings, 0, "{part} stands still");
        drop(frozen);
        service.until("WATCHDOG=1");
    }
    let said = service.said();
    for part in ["shard 1", "the event log's sequencer", "the runtime"] {
        let line = format!("no progress: {part}. The watchdog is no longer pinged");
        assert!(said.contains(&line), "{line} is not in\n{said}");
    }
    assert!(service.end());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_recovery_is_given_time_as_long_as_it_gets_on() {
    let Some(server) = postgres::server() else {
        return;
    };
    let network = network().await;
    let database = server.database().await;
    let folder = tempfile::tempdir().unwrap();
    let start = || {
        Service::start(folder.path(), |command| {
            join(&network, command).env("DATABASE_URL", &database);
        })
    };
    let service = start();
    service.until("READY=1");
    until_status(&service, &["1 of 1 hosts connected"]);
    let pds = network.pds(0);
    let alice = pds.create_account("alice.pds1.test").unwrap().did;
    pds.create_record(&alice, POSTS, post("one")).unwrap();
    let mut sql = PgConnection::connect(&database).await.unwrap();
    loop {
        let row = sql.fetch_one("SELECT count(*) FROM accounts WHERE rev IS NOT NULL");
        if row.await.unwrap().get::<i64, _>(0) == 1 {
            break;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    assert!(service.end());

    // Everything is to be applied once more, and the first write does not get on.
    sql.execute("UPDATE log_position SET replay_from = 1; UPDATE views SET position = 1")
        .await
        .unwrap();
    let mut lock = sql.begin().await.unwrap();
    lock.execute("LOCK TABLE accounts IN SHARE MODE")
        .await
        .unwrap();
    let service = start();
    let message = service.until("EXTEND_TIMEOUT_USEC=");
    assert_eq!(message[0], "EXTEND_TIMEOUT_USEC=30000000");
    let silence = Duration::from_secs(4);
    assert_eq!(service.count("", silence), 0, "what stands still gets none");
    lock.rollback().await.unwrap();
    service.until("READY=1");
    assert!(service.end());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_full_disk_is_no_reason_to_stop_the_pings() {
    let network = network().await;
    let folder = tempfile::tempdir().unwrap();
    let Some(disk) = SmallDisk::mount("64m") else {
        return;
    };
    let service = Service::start(folder.path(), |command| {
        watched(join(&network, command));
        command.arg("--log-min-free-bytes=0");
        command.env("RELAY_DATA_DIR", disk.folder.join("data"));
    });
    service.until("READY=1");
    until_status(&service, &["1 of 1 hosts connected"]);
    let pds = network.pds(0);
    let alice = pds.create_account("alice.pds1.test").unwrap().did;
    disk.fill();
    // More than the room that the log has reserved.
    let long = "x".repeat(700_000);
    for _ in 0..20 {
        pds.create_record(&alice, POSTS, post(&long)).unwrap();
    }
    let failing = async || {
        let metrics = Samples::scrape(&service.metrics_url()).await.unwrap();
        metrics.get("relay_log_failing") == 1.0
    };
    while !failing().await {
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let pings = service.count("WATCHDOG=1", WATCHDOG * 4);
    assert!(pings >= 4, "{pings} pings");
    until_status(&service, &["the event log cannot be written"]);
    assert!(failing().await, "the disk was full all the while");
    disk.make_room();
    while failing().await {
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    assert!(
        !service.said().contains("no progress"),
        "{}",
        service.said()
    );
    let (status, _) = until_problem(&service, "log", false, || {}).await;
    assert_eq!(status, 200);
    told_once(&service, "log", " ERROR ").await;
    assert!(service.end());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_disk_without_the_room_that_is_to_be_free_is_told() {
    let folder = tempfile::tempdir().unwrap();
    let Some(disk) = SmallDisk::mount("64m") else {
        return;
    };
    let file = folder.path().join("relay.toml");
    fs::write(&file, "[log]\nmin_free_bytes = \"64MiB\"").unwrap();
    let service = Service::start(folder.path(), |command| {
        command.arg("--config").arg(&file);
        command.env("RELAY_DATA_DIR", disk.folder.join("data"));
    });
    service.until("READY=1");
    let (status, health) = until_problem(&service, "disk", true, || {}).await;
    assert_eq!(status, 200, "{health}");
    fs::write(&file, "[log]\nmin_free_bytes = \"1MiB\"").unwrap();
    reload(&service);
    until_problem(&service, "disk", false, || {}).await;
    told_once(&service, "disk", " WARN ").await;
    assert!(service.end());
}

/// Consumers at these addresses of this machine take an event, sleep while more come than the log keeps, and go on
/// reading: they are cut.
async fn oversleep(service: &Service, addresses: &[[u8; 4]], write: impl AsyncFn()) {
    let mut consumers = Vec::new();
    for address in addresses {
        let socket = tokio::net::TcpSocket::new_v4().unwrap();
        // What lies in it is not lost to the consumer.
        socket.set_recv_buffer_size(4096).unwrap();
        socket.bind((*address, 0).into()).unwrap();
        let stream = socket.connect(([127, 0, 0, 1], service.port).into());
        let url = format!(
            "ws://127.0.0.1:{}/xrpc/com.atproto.sync.subscribeRepos?cursor=0",
            service.port
        );
        let (mut consumer, _) = tokio_tungstenite::client_async(url, stream.await.unwrap())
            .await
            .unwrap();
        consumer.next().await.unwrap().unwrap();
        consumers.push(consumer);
    }
    write().await;
    for mut consumer in consumers {
        while let Some(Ok(_)) = consumer.next().await {}
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn consumers_that_fall_out_are_a_problem_where_they_are_on_several_networks() {
    let network = network().await;
    let folder = tempfile::tempdir().unwrap();
    let service = Service::start(folder.path(), |command| {
        join(&network, command).arg("--log-max-bytes=16MiB");
    });
    service.until("READY=1");
    until_status(&service, &["1 of 1 hosts connected"]);
    let pds = network.pds(0);
    let alice = pds.create_account("alice.pds1.test").unwrap().did;
    let scrape = async || Samples::scrape(&service.metrics_url()).await.unwrap();
    while scrape().await.get("relay_log_seq") < 4.0 {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    let long = "x".repeat(700_000);
    let write = async || {
        let head = scrape().await.get("relay_log_seq");
        for _ in 0..40 {
            pds.create_record(&alice, POSTS, post(&long)).unwrap();
        }
        while scrape().await.get("relay_log_oldest_seq") < head + 15.0 {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    // However many there are on one network: they are slow themselves.
    let [one, other] = [[127, 0, 0, 2], [127, 0, 0, 3]];
    oversleep(&service, &[one, one, one], write).await;
    assert_eq!(scrape().await.get("relay_consumers_too_slow_total"), 3.0);
    for _ in 0..25 {
        let (_, health) = health(&service).await;
        assert!(named(&health, "consumers_cut").is_none(), "{health}");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    oversleep(&service, &[other], write).await;
    let (status, health) = until_problem(&service, "consumers_cut", true, || {}).await;
    assert_eq!(status, 200);
    let problem = named(&health, "consumers_cut").unwrap();
    let message = problem["message"].as_str().unwrap();
    assert!(message.starts_with("consumers on 2 networks"), "{message}");
    assert!(service.end());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_reload_applies_what_it_can_and_a_wrong_file_changes_nothing() {
    let options = NetworkOptions {
        pds: 2,
        ..NetworkOptions::default()
    };
    let network = Network::start(options).await.unwrap();
    let [first, second] = [0, 1].map(|index| network.pds(index).url());
    let folder = tempfile::tempdir().unwrap();
    let (file, credentials) = (
        folder.path().join("relay.toml"),
        folder.path().join("credentials"),
    );
    let password = credentials.join("admin-password");
    fs::create_dir(&credentials).unwrap();
    fs::write(&password, "first\n").unwrap();
    let configure = |text: &str| fs::write(&file, text).unwrap();
    configure(&format!(
        "hosts = [{first:?}]\nlog_level = \"warn\"\nmax_consumers = 1"
    ));
    let service = Service::start(folder.path(), |command| {
        command.args(["--allow-private-hosts", "--plc-host", &network.plc_url()]);
        command.arg("--config").arg(&file);
        command.env("CREDENTIALS_DIRECTORY", &credentials);
    });
    service.until("READY=1");
    until_status(&service, &["1 of 1 hosts connected"]);
    let consumer = || {
        let address = service.url().replace("http", "ws");
        connect_async(format!("{address}/xrpc/com.atproto.sync.subscribeRepos"))
    };
    let admin = async |password: &str| {
        let request = atproto_relay::dial::plain_client()
            .get(format!("{}/admin/pds/list", service.url()))
            .basic_auth("admin", Some(password));
        request.send().await.unwrap().status().as_u16()
    };
    let _held = consumer().await.unwrap();
    assert!(consumer().await.is_err(), "one place");
    assert_eq!([admin("first").await, admin("second").await], [200, 401]);

    // Wrong in the last place: what stands before it is not applied either.
    configure("max_consumers = 2\nlog_level = \"loud\"");
    fs::write(&password, "second\n").unwrap();
    reload(&service);
    let said = service.said();
    let errors: Vec<&str> = said.lines().filter(|line| line.contains("ERROR")).collect();
    assert_eq!(errors.len(), 1, "{said}");
    assert!(errors[0].contains("relay.toml:2: log_level"), "{said}");
    assert!(consumer().await.is_err(), "still one place");
    assert_eq!([admin("first").await, admin("second").await], [200, 401]);

    configure(&format!(
        "hosts = [{first:?}, {second:?}]\nmax_consumers = 2\nlog_level = \"info\"\n[log]\ndurability = \"none\""
    ));
    reload(&service);
    assert_eq!([admin("first").await, admin("second").await], [401, 200]);
    let _second = consumer().await.unwrap();
    until_status(&service, &["2 of 2 hosts connected", "2 consumers"]);
    let said = service.said();
    for (line, level) in [
        ("a setting is changed setting=\"max_consumers\"", "INFO"),
        ("a setting is changed setting=\"hosts\"", "INFO"),
        (
            "a setting is changed setting=\"admin_password_file\"",
            "INFO",
        ),
        (
            "a setting is changed that needs a restart setting=\"log.durability\"",
            "WARN",
        ),
        (
            "the configuration was read again applied=4 need_restart=1",
            "INFO",
        ),
    ] {
        let found = said
            .lines()
            .any(|told| told.contains(line) && told.contains(level));
        assert!(found, "{line} is not in\n{said}");
    }
    assert!(!said.contains("second\n") && !said.contains("first\n"));
    let metrics = Samples::scrape(&service.metrics_url()).await.unwrap();
    for (name, value) in [
        ("relay_config_reloads_total{outcome=\"applied\"}", 1.0),
        ("relay_config_reloads_total{outcome=\"refused\"}", 1.0),
        ("relay_config_reload_failed", 0.0),
        ("relay_config_restart_needed", 1.0),
    ] {
        assert_eq!(metrics.get(name), value, "{name}");
    }
    assert!(service.end());
}

/// `systemctl reload`: returns when the relay says that it is done.
fn reload(service: &Service) {
    service.signal(Signal::HUP);
    let message = service.until("RELOADING=1");
    let time = message
        .iter()
        .find_map(|line| line.strip_prefix("MONOTONIC_USEC="));
    assert!(
        time.is_some_and(|time| time.parse::<u64>().is_ok()),
        "{message:?}"
    );
    service.until("READY=1");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_caches_shrink_when_memory_is_short_but_not_all_the_time() {
    let network = network().await;
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("pressure");
    let made = Command::new("mkfifo").arg(&path).status().unwrap();
    assert!(made.success());
    let service = Service::start(folder.path(), |command| {
        join(&network, command).env("MEMORY_PRESSURE_WATCH", &path);
    });
    service.until("READY=1");
    until_status(&service, &["1 of 1 hosts connected"]);
    let pds = network.pds(0);
    let alice = pds.create_account("alice.pds1.test").unwrap().did;
    pds.create_record(&alice, POSTS, post("before")).unwrap();
    let scrape = async || Samples::scrape(&service.metrics_url()).await.unwrap();
    while scrape().await.get("relay_log_seq") < 3.0 {
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let mut fifo = fs::File::options().write(true).open(&path).unwrap();
    for _ in 0..10 {
        fifo.write_all(b"!").unwrap();
    }
    while scrape().await.get("relay_memory_pressure_total") < 1.0 {
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    for _ in 0..10 {
        fifo.write_all(b"!").unwrap();
    }
    // What goes on is judged as before.
    pds.create_record(&alice, POSTS, post("after")).unwrap();
    while scrape().await.get("relay_log_seq") < 4.0 {
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    assert_eq!(scrape().await.get("relay_memory_pressure_total"), 1.0);
    let said = service.said();
    assert_eq!(said.matches("memory is short").count(), 1, "{said}");
    assert!(service.end());
}

#[test]
fn memory_is_not_watched_where_systemd_turns_it_off() {
    let folder = tempfile::tempdir().unwrap();
    let service = Service::start(folder.path(), |command| {
        command.env("MEMORY_PRESSURE_WATCH", "/dev/null");
    });
    service.until("READY=1");
    assert!(service.threads("memory-pressure").is_empty());
    assert!(!service.said().contains("WARN"), "{}", service.said());
    assert!(service.end());
}

/// The journal's native protocol: lines `NAME=value`, or the name, a line end, the length in eight bytes, and the value.
fn fields(mut entry: &[u8]) -> HashMap<String, String> {
    let mut fields = HashMap::new();
    while let Some(end) = entry.iter().position(|byte| *byte == b'\n') {
        let line = String::from_utf8_lossy(&entry[..end]).into_owned();
        entry = &entry[end + 1..];
        let (name, value) = match line.split_once('=') {
            Some((name, value)) => (name.to_owned(), value.to_owned()),
            None => {
                let (length, rest) = entry.split_first_chunk().unwrap();
                let (value, rest) = rest.split_at(u64::from_le_bytes(*length) as usize);
                entry = rest.strip_prefix(b"\n").unwrap();
                (line, String::from_utf8_lossy(value).into_owned())
            }
        };
        fields.insert(name, value);
    }
    fields
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn lines_go_to_the_journal_with_fields_to_filter_by() {
    let network = network().await;
    let folder = tempfile::tempdir().unwrap();
    let journal_folder = folder.path().join("journal");
    fs::create_dir(&journal_folder).unwrap();
    let journal = UnixDatagram::bind(journal_folder.join("socket")).unwrap();
    journal.set_read_timeout(Some(PATIENCE)).unwrap();
    // The relay sees this journal in place of the machine's, in a view of the file system that is its own.
    let script = format!(
        "mount -t tmpfs tmpfs /run && mkdir -p /run/systemd/journal && mount --bind '{}' /run/systemd/journal || exit 1\n\
         JOURNAL_STREAM=$(stat -L -c %d:%i /dev/stderr) exec '{}' \"$@\"\n",
        journal_folder.display(),
        env!("CARGO_BIN_EXE_atproto-relay")
    );
    let program = folder.path().join("relay-in-a-box");
    fs::write(&program, format!("#!/bin/sh\n{script}")).unwrap();
    fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).unwrap();
    let mounted = Command::new("unshare")
        .args(["--mount", "mount", "-t", "tmpfs", "tmpfs", "/run"])
        .stderr(Stdio::null())
        .status();
    if !mounted.is_ok_and(|status| status.success()) {
        println!("skipped: this user may not have a view of the file system of its own");
        return;
    }
    let service = Service::start_as(
        folder.path(),
        &["unshare", "--mount", program.to_str().unwrap()],
        |command| {
            join(&network, command).args(["--log-level", "info,atproto_relay::verify=debug"]);
            command.env("PATH", std::env::var_os("PATH").unwrap());
        },
    );
    let mut buffer = vec![0; 1 << 16];
    let mut next = || {
        let length = journal.recv(&mut buffer).unwrap();
        fields(&buffer[..length])
    };
    // One line says what runs, with what, and where.
    let ready = loop {
        let entry = next();
        assert_ne!(
            entry.get("MESSAGE").map(String::as_str),
            Some("event dropped")
        );
        if entry
            .get("MESSAGE")
            .is_some_and(|message| message == "ready")
        {
            break entry;
        }
    };
    assert_eq!(ready["PRIORITY"], "6");
    assert_eq!(ready["SYSLOG_IDENTIFIER"], "atproto-relay");
    assert_eq!(ready["RELAY_VERSION"], env!("CARGO_PKG_VERSION"));
    assert_eq!(ready["RELAY_CONFIG"], "none");
    assert_eq!(ready["RELAY_HOSTS"], "1");
    assert_eq!(ready["RELAY_ADMIN"], "off");
    assert!(ready["RELAY_METRICS"].ends_with(&service.metrics_port.to_string()));
    assert!(ready["RELAY_FIREHOSE"].contains(&service.port.to_string()));
    assert!(ready["RELAY_DATABASE"].contains("relay.sqlite"));
    service.until("READY=1");
    until_status(&service, &["1 of 1 hosts connected"]);

    let pds = network.pds(0);
    let alice = pds.create_account("alice.pds1.test").unwrap().did;
    let write = Write::Create {
        collection: POSTS.to_owned(),
        rkey: None,
        record: post("one"),
    };
    let commit = pds.commit_silently(&alice, &[write]).unwrap();
    // The second time its rev is not above the last.
    for _ in 0..2 {
        pds.emit_with(|stamp| frames::commit(stamp, &alice, &commit));
    }
    let dropped = loop {
        let entry = next();
        if entry["MESSAGE"] == "event dropped" {
            break entry;
        }
    };
    assert_eq!(dropped["PRIORITY"], "7");
    assert_eq!(dropped["RELAY_DID"], alice.to_string());
    assert!(pds.url().ends_with(&dropped["RELAY_HOST"]), "{dropped:?}");
    assert_eq!(dropped["RELAY_RULE"], "rev_order");
    assert!(dropped["RELAY_SEQ"].parse::<i64>().is_ok());
    assert!(service.end());
}

/// The health of a relay; what the public is told, and with which status.
async fn health(service: &Service) -> (u16, Value) {
    let answer = plain_client()
        .get(format!("{}/xrpc/_health", service.url()))
        .send()
        .await
        .unwrap();
    (answer.status().as_u16(), answer.json().await.unwrap())
}

fn named<'a>(health: &'a Value, name: &str) -> Option<&'a Value> {
    let problems = health["problems"].as_array().unwrap();
    problems.iter().find(|problem| problem["name"] == name)
}

/// Waits until a relay has a problem, or no longer has; does `meanwhile` again and again. The status and the health.
async fn until_problem(
    service: &Service,
    name: &str,
    wanted: bool,
    mut meanwhile: impl FnMut(),
) -> (u16, Value) {
    let wait = async {
        loop {
            let (status, health) = health(service).await;
            if named(&health, name).is_some() == wanted {
                return (status, health);
            }
            meanwhile();
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    };
    match tokio::time::timeout(PATIENCE, wait).await {
        Ok(told) => told,
        Err(_) => panic!("{name} is not {wanted}; it said:\n{}", service.said()),
    }
}

/// That a problem was told by one line when it started and by one when it ended, and by its metric.
async fn told_once(service: &Service, name: &str, word: &str) {
    let said = service.said();
    let lines: Vec<&str> = said
        .lines()
        .filter(|line| line.contains(&format!("problem=\"{name}\"")))
        .collect();
    let [start, end] = lines.as_slice() else {
        panic!("{name}: {lines:#?}");
    };
    assert!(start.contains(word), "{start}");
    assert!(end.contains(" INFO ") && end.contains("has ended"), "{end}");
    assert!(end.contains("seconds="), "{end}");
    let metrics = Samples::scrape(&service.metrics_url()).await.unwrap();
    let metric = format!("relay_problem{{name=\"{name}\"}}");
    assert_eq!(metrics.get(&metric), 0.0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_relay_without_hosts_says_so_until_it_has_one() {
    let network = network().await;
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("relay.toml");
    fs::write(&file, "allow_private_hosts = true\n").unwrap();
    let service = Service::start(folder.path(), |command| {
        command.args(["--plc-host", &network.plc_url(), "--config"]);
        command.arg(&file);
    });
    service.until("READY=1");
    let (status, health) = until_problem(&service, "no_hosts", true, || {}).await;
    assert_eq!(status, 200, "it serves: {health}");
    assert_eq!(health["status"], "degraded");
    assert_eq!(health["version"], env!("CARGO_PKG_VERSION"));
    let problem = named(&health, "no_hosts").unwrap();
    assert_eq!(health["msg"], problem["message"]);
    assert!(problem["since"].as_str().unwrap().ends_with('Z'));
    assert!(problem["what_to_do"].as_str().unwrap().contains("--host"));
    let metrics = Samples::scrape(&service.metrics_url()).await.unwrap();
    assert_eq!(metrics.get("relay_problem{name=\"no_hosts\"}"), 1.0);
    assert_eq!(metrics.get("relay_problem{name=\"database\"}"), 0.0);
    until_status(&service, &["0 of 0 hosts connected", "no_hosts: "]);

    let pds = network.pds(0).url();
    fs::write(
        &file,
        format!("allow_private_hosts = true\nhosts = [{pds:?}]"),
    )
    .unwrap();
    reload(&service);
    let (status, health) = until_problem(&service, "no_hosts", false, || {}).await;
    assert_eq!((status, &health["status"]), (200, &json!("ok")), "{health}");
    assert!(health.get("msg").is_none(), "{health}");
    told_once(&service, "no_hosts", " WARN ").await;
    assert!(service.end());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn hosts_that_are_all_gone_are_told_and_their_return() {
    let options = NetworkOptions {
        pds: 2,
        ..NetworkOptions::default()
    };
    let network = Network::start(options).await.unwrap();
    let folder = tempfile::tempdir().unwrap();
    let service = Service::start(folder.path(), |command| {
        join(&network, command);
    });
    service.until("READY=1");
    until_status(&service, &["2 of 2 hosts connected"]);
    // One is that one's trouble, and told of it alone.
    network.pds(0).set_offline(true);
    until_status(&service, &["1 of 2 hosts connected"]);
    assert_eq!(health(&service).await.1["status"], "ok");
    network.pds(1).set_offline(true);
    let (status, health) = until_problem(&service, "no_host_connected", true, || {}).await;
    assert_eq!(status, 200, "{health}");
    let problem = named(&health, "no_host_connected").unwrap();
    assert_eq!(problem["message"], "0 of 2 hosts are connected");
    for pds in network.all_pds() {
        pds.set_offline(false);
    }
    until_problem(&service, "no_host_connected", false, || {}).await;
    told_once(&service, "no_host_connected", " WARN ").await;
    assert!(service.end());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_directory_that_is_down_is_told_and_its_return() {
    let network = network().await;
    let folder = tempfile::tempdir().unwrap();
    let service = Service::start(folder.path(), |command| {
        join(&network, command);
    });
    service.until("READY=1");
    until_status(&service, &["1 of 1 hosts connected"]);
    let pds = network.pds(0);
    let mut accounts = 0..;
    let mut create = || {
        let name = format!("a{}.pds1.test", accounts.next().unwrap());
        pds.create_account(&name).unwrap();
    };
    network.plc().set_outage(true);
    for _ in 0..5 {
        create();
    }
    let (status, health) = until_problem(&service, "directory", true, || {}).await;
    assert_eq!((status, &health["status"]), (200, &json!("degraded")));
    let problem = named(&health, "directory").unwrap();
    let message = problem["message"].as_str().unwrap();
    assert!(message.contains("got no answer"), "{message}");
    assert!(
        problem["what_to_do"]
            .as_str()
            .unwrap()
            .contains("directory")
    );
    network.plc().set_outage(false);
    until_problem(&service, "directory", false, create).await;
    told_once(&service, "directory", " WARN ").await;
    assert!(service.end());
}

/// A way to the server of databases that can be shut.
struct Gate {
    folder: tempfile::TempDir,
    url: String,
    /// Where the server is.
    beyond: std::path::PathBuf,
    open: Option<tokio_util::sync::CancellationToken>,
}

impl Gate {
    /// The name of PostgreSQL's socket in its folder.
    const SOCKET: &str = ".s.PGSQL.5432";

    fn new(url: &str) -> Gate {
        let (base, beyond) = url.split_once("?host=").unwrap();
        let folder = tempfile::tempdir().unwrap();
        let mut gate = Gate {
            url: format!("{base}?host={}", folder.path().display()),
            beyond: std::path::Path::new(beyond).join(Gate::SOCKET),
            folder,
            open: None,
        };
        gate.open();
        gate
    }

    fn open(&mut self) {
        let path = self.folder.path().join(Gate::SOCKET);
        let listener = tokio::net::UnixListener::bind(path).unwrap();
        let (open, beyond) = (
            tokio_util::sync::CancellationToken::new(),
            self.beyond.clone(),
        );
        self.open = Some(open.clone());
        tokio::spawn(open.clone().run_until_cancelled_owned(async move {
            loop {
                let (mut near, _) = listener.accept().await.unwrap();
                let beyond = beyond.clone();
                tokio::spawn(open.clone().run_until_cancelled_owned(async move {
                    let mut far = tokio::net::UnixStream::connect(beyond).await.unwrap();
                    // Both ends end as they like.
                    let _ = tokio::io::copy_bidirectional(&mut near, &mut far).await;
                }));
            }
        }));
    }

    /// Ends every connection, and takes none.
    fn shut(&mut self) {
        self.open.take().unwrap().cancel();
        fs::remove_file(self.folder.path().join(Gate::SOCKET)).unwrap();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_database_that_is_away_is_told_once_and_with_its_cause_to_the_operator_alone() {
    let Some(server) = postgres::server() else {
        return;
    };
    let mut gate = Gate::new(&server.database().await);
    let network = network().await;
    let folder = tempfile::tempdir().unwrap();
    let admin = folder.path().join("admin.sock");
    let service = Service::start(folder.path(), |command| {
        join(&network, command).env("DATABASE_URL", &gate.url);
        command.args(["--admin-listen", &format!("unix:{}", admin.display())]);
    });
    service.until("READY=1");
    until_status(&service, &["1 of 1 hosts connected"]);
    let pds = network.pds(0);
    let alice = pds.create_account("alice.pds1.test").unwrap().did;
    gate.shut();
    let write = || {
        pds.create_record(&alice, POSTS, post("still there"))
            .unwrap();
    };
    let (status, health) = until_problem(&service, "database", true, write).await;
    assert_eq!((status, &health["status"]), (503, &json!("error")));
    let private = service.metrics_url().replace("/metrics", "/_health");
    let answer = plain_client().get(&private).send().await.unwrap();
    assert_eq!(answer.status(), 503);
    let told = answer.text().await.unwrap();
    let public = named(&health, "database").unwrap()["message"]
        .as_str()
        .unwrap();
    assert!(
        told.contains(&format!("{public}: ")),
        "with a cause: {told}"
    );
    let client = atproto_relay::dial::plain_client_builder()
        .unix_socket(admin.as_path())
        .build()
        .unwrap();
    let answer = client.get("http://localhost/_health").send().await.unwrap();
    let told = answer.text().await.unwrap();
    assert!(told.contains(&format!("{public}: ")), "{told}");
    gate.open();
    let (status, _) = until_problem(&service, "database", false, || {}).await;
    assert_eq!(status, 200);
    told_once(&service, "database", " ERROR ").await;
    assert!(service.end());
}

/// The flood of one host is the trouble of that host. What befalls most of them is the relay's.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn drops_are_a_problem_where_many_hosts_have_them_not_where_one_does() {
    let options = NetworkOptions {
        pds: 3,
        ..NetworkOptions::default()
    };
    let network = Network::start(options).await.unwrap();
    let folder = tempfile::tempdir().unwrap();
    let service = Service::start(folder.path(), |command| {
        join(&network, command);
    });
    service.until("READY=1");
    until_status(&service, &["3 of 3 hosts connected"]);
    let accounts: Vec<_> = network
        .all_pds()
        .iter()
        .map(|pds| {
            let name = format!("alice.{}", pds.domain());
            (pds, pds.create_account(&name).unwrap().did)
        })
        .collect();
    let repeat = |(pds, did): &(&atproto_relay::devnet::pds::Pds, _), times: usize| {
        let write = Write::Create {
            collection: POSTS.to_owned(),
            rkey: None,
            record: post("again and again"),
        };
        let commit = pds.commit_silently(did, &[write]).unwrap();
        for _ in 0..times {
            pds.emit_with(|stamp| frames::commit(stamp, did, &commit));
        }
    };
    let dropped = async || {
        let metrics = Samples::scrape(&service.metrics_url()).await.unwrap();
        metrics.dropped("rev_order")
    };
    repeat(&accounts[0], 500);
    while dropped().await < 499 {
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    // Longer than a problem of drops takes to start.
    for _ in 0..130 {
        let (_, health) = health(&service).await;
        assert_eq!(health["status"], "ok", "{health}");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    repeat(&accounts[1], 50);
    let (status, health) = until_problem(&service, "drops", true, || {}).await;
    assert_eq!(status, 200);
    let problem = named(&health, "drops").unwrap();
    let message = problem["message"].as_str().unwrap();
    assert!(message.contains("rule rev_order"), "{message}");
    let (pds, did) = &accounts[1];
    for n in 0..60 {
        pds.create_record(did, POSTS, post(&n.to_string())).unwrap();
    }
    until_problem(&service, "drops", false, || {}).await;
    told_once(&service, "drops", " WARN ").await;
    assert!(service.end());
}
