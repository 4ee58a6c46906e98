//! What goes wrong around a relay: a full disk, a password that is not right, an end in the middle of work. Each is told
//! in one line, leaves nothing half done, and is over when its cause is.

#![cfg(feature = "devnet")]

#[path = "support/postgres.rs"]
mod postgres;
#[path = "support/small_disk.rs"]
mod small_disk;
#[path = "support/relay.rs"]
mod support;

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use atproto_relay::devnet::load::{ProcessOptions, RelayProcess};
use atproto_relay::devnet::network::{Network, NetworkOptions};
use atproto_relay::devnet::pds::Pds;
use atproto_relay::devnet::scrape::Samples;
use serde_json::{Value, json};
use small_disk::SmallDisk;
use support::{Bench, PATIENCE};
use tokio_tungstenite::connect_async;

const POSTS: &str = "app.bsky.feed.post";

fn post(text: &str) -> Value {
    json!({"$type": POSTS, "text": text, "createdAt": "2026-01-01T00:00:00Z"})
}

fn serve(data_dir: &Path) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_atproto-relay"));
    command.env_clear().stdin(Stdio::null());
    command.args(["serve", "--listen=127.0.0.1:0", "--log-level=error"]);
    command.args(["--metrics-listen=127.0.0.1:0", "--data-dir"]);
    command.arg(data_dir);
    command
}

/// The one line of a start that fails.
fn refusal(command: &mut Command) -> String {
    let output = command.output().unwrap();
    let said = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1), "{said}");
    let lines: Vec<&str> = said.lines().collect();
    assert_eq!(lines.len(), 1, "{said}");
    assert!(lines[0].starts_with("error: "), "{said}");
    lines[0].to_owned()
}

#[test]
fn a_full_disk_at_the_start_is_named_and_is_no_harm() {
    let Some(disk) = SmallDisk::mount("64k") else {
        return;
    };
    // Also where there is room for the log's first files, but not for the database.
    for room in [0, 8 << 10, 16 << 10, 24 << 10] {
        disk.fill_but(room);
        let data = disk.folder.join("data");
        let line = refusal(&mut serve(&data));
        assert!(line.contains(data.to_str().unwrap()), "{line}");
        assert!(line.contains("make room"), "{line}");
        disk.make_room();
        fs::remove_dir_all(&data).unwrap_or_default();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_disk_that_fills_up_stops_events_but_not_consumers_and_loses_nothing() {
    let Some(disk) = SmallDisk::mount("64m") else {
        return;
    };
    let bench = Bench::start_with(1, |config, _| {
        config.data_dir = disk.folder.join("data");
        config.log_min_free_bytes = Some(0);
    })
    .await;
    let pds = bench.network.pds(0);
    let alice = pds.create_account("alice.pds1.test").unwrap().did;
    bench.until_settled().await;
    disk.fill();
    // More than the room that the log has reserved.
    let long = "x".repeat(700_000);
    for _ in 0..20 {
        pds.create_record(&alice, POSTS, post(&long)).unwrap();
    }
    let metrics = format!("http://{}/_health", bench.relay.metrics_addr());
    for url in [metrics.clone(), format!("{}/_health", bench.url())] {
        let body = until_status(&url, 503).await;
        assert!(body.contains("the event log cannot be written"), "{body}");
    }
    let samples = Samples::scrape(&metrics.replace("/_health", "/metrics"))
        .await
        .unwrap();
    assert_eq!(samples.get("relay_log_failing"), 1.0);
    let head = bench.relay.log().head();
    assert!((4..24).contains(&head), "{head}");
    let mut consumer = bench.consumer(0).await;
    assert_eq!(consumer.up_to(head).await.len(), head as usize);

    disk.make_room();
    let rest = consumer.up_to(24).await;
    let seqs: Vec<u64> = rest.iter().map(|(seq, _)| *seq).collect();
    assert!(seqs.iter().copied().eq(head + 1..=24), "{seqs:?}");
    until_status(&metrics, 200).await;
    bench.until_settled().await;
    let bench = bench.restarted(|_| {}).await;
    assert_eq!(bench.relay.log().head(), 24);
    bench.relay.shutdown().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_disk_that_others_fill_costs_the_oldest_events_and_no_new_ones() {
    let Some(disk) = SmallDisk::mount("96m") else {
        return;
    };
    let bench = Bench::start_with(1, |config, _| {
        config.data_dir = disk.folder.join("data");
        // The database lies on the same disk, and must not be the one that finds it full.
        config.log_min_free_bytes = Some(12 << 20);
    })
    .await;
    let pds = bench.network.pds(0);
    let alice = pds.create_account("alice.pds1.test").unwrap().did;
    let long = "x".repeat(700_000);
    let post_many = || {
        for _ in 0..30 {
            pds.create_record(&alice, POSTS, post(&long)).unwrap();
        }
    };
    post_many();
    bench.until_settled().await;
    assert_eq!(bench.relay.log().oldest(), Some(1));
    let free = 4 << 20;
    disk.fill_but(free);
    post_many();
    bench.until_settled().await;
    let oldest = bench.relay.log().oldest().unwrap();
    assert!(oldest > 1, "room was made");
    assert_eq!(bench.relay.log().head(), 64);
    let seqs = bench.consumer(0).await.up_to(64).await;
    assert!(seqs.iter().map(|(seq, _)| *seq).eq(oldest..=64));
    bench.relay.shutdown().await;
}

/// A relay in a process of its own, with its data in the folder `data` below `folder`.
async fn start(network: &Network, folder: &Path, argument: &str) -> RelayProcess {
    let binary = env!("CARGO_BIN_EXE_atproto-relay");
    start_binary(binary.as_ref(), network, folder, argument).await
}

async fn start_binary(
    binary: &Path,
    network: &Network,
    folder: &Path,
    argument: &str,
) -> RelayProcess {
    let options = ProcessOptions {
        binary: binary.to_owned(),
        folder: folder.to_owned(),
        plc: network.plc_url(),
        hosts: network.all_pds().iter().map(Pds::url).collect(),
        arguments: vec![argument.into()],
    };
    RelayProcess::start(options, PATIENCE).await.unwrap()
}

async fn until_status(url: &str, code: u16) -> String {
    let mut said = String::new();
    let wait = async {
        loop {
            let answer = reqwest::get(url).await.unwrap();
            let status = answer.status().as_u16();
            said = answer.text().await.unwrap();
            if status == code {
                return;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    let waited = tokio::time::timeout(PATIENCE, wait).await;
    assert!(waited.is_ok(), "{url} does not answer {code}, but {said}");
    said
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_signal_ends_it_soon_while_everybody_is_connected() {
    let network = Network::start(NetworkOptions::default()).await.unwrap();
    let folder = tempfile::tempdir().unwrap();
    let argument = "--log-segment-bytes=8MiB";
    let relay = start(&network, folder.path(), argument).await;
    // A consumer that never reads, a connection that is kept alive, and a host.
    let url = format!("{}/xrpc/com.atproto.sync.subscribeRepos", relay.firehose());
    let (_deaf, _) = connect_async(url).await.unwrap();
    let connected = async {
        loop {
            let metrics = Samples::scrape(&relay.metrics_url()).await.unwrap();
            if metrics.sum("relay_consumers") == 1.0
                && metrics.get("relay_hosts{state=\"connected\"}") == 1.0
            {
                return;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    let waited = tokio::time::timeout(PATIENCE, connected).await;
    assert!(waited.is_ok(), "{}", relay.said());
    let health = relay.metrics_url().replace("/metrics", "/_health");
    assert_eq!(reqwest::get(&health).await.unwrap().status(), 200);
    let started = Instant::now();
    assert!(relay.end(PATIENCE).await.unwrap(), "exit code 0");
    let took = started.elapsed();
    assert!(took < Duration::from_secs(4), "it took {took:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_wrong_password_of_the_database_is_named_and_not_shown() {
    let Some(server) = postgres::server() else {
        return;
    };
    let folder = tempfile::tempdir().unwrap();
    let wrong = server.url_with_password("postgres", "gehe1m");
    let line = refusal(serve(&folder.path().join("data")).env("DATABASE_URL", wrong));
    assert!(line.contains("refuses the login"), "{line}");
    assert!(line.contains("correct the user or the password"), "{line}");
    assert!(!line.contains("gehe1m"), "{line}");
    let missing = server.url("nothing_here");
    let line = refusal(serve(&folder.path().join("data")).env("DATABASE_URL", missing));
    assert!(line.contains("does not exist"), "{line}");
    // What these left does not stand in the way of a start that is right.
    let network = Network::start(NetworkOptions::default()).await.unwrap();
    let right = format!("--database-url={}", server.database().await);
    let relay = start(&network, folder.path(), &right).await;
    assert!(relay.end(PATIENCE).await.unwrap());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_limit_of_open_files_is_raised_to_what_the_system_allows() {
    let network = Network::start(NetworkOptions::default()).await.unwrap();
    let folder = tempfile::tempdir().unwrap();
    let script = folder.path().join("with-few-files");
    let relay = env!("CARGO_BIN_EXE_atproto-relay");
    let text = format!("#!/bin/sh\nulimit -Sn 200\nexec '{relay}' \"$@\"\n");
    fs::write(&script, text).unwrap();
    fs::set_permissions(&script, fs::Permissions::from_mode(0o755)).unwrap();
    let argument = "--log-segment-bytes=8MiB";
    let relay = start_binary(&script, &network, folder.path(), argument).await;
    let metrics = Samples::scrape(&relay.metrics_url()).await.unwrap();
    let allowed = rustix::process::getrlimit(rustix::process::Resource::Nofile).maximum;
    let allowed = allowed.expect("a limit");
    assert_eq!(metrics.get("process_max_fds"), allowed as f64);
    assert!(relay.end(PATIENCE).await.unwrap());
}

#[test]
fn a_start_that_cannot_listen_leaves_a_data_folder_as_it_was() {
    let folder = tempfile::tempdir().unwrap();
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap().to_string();
    let mut command = Command::new(env!("CARGO_BIN_EXE_atproto-relay"));
    command.env_clear().stdin(Stdio::null());
    command.args(["serve", "--log-level=error", "--metrics-listen=127.0.0.1:0"]);
    command.args(["--listen", &address, "--data-dir"]);
    fs::write(folder.path().join("something"), "of the operator").unwrap();
    let line = refusal(command.arg(folder.path()));
    assert!(
        line.contains(&address) && line.contains("--listen"),
        "{line}"
    );
    let names: Vec<_> = fs::read_dir(folder.path())
        .unwrap()
        .map(|entry| entry.unwrap().file_name())
        .collect();
    assert_eq!(names, ["something"]);
}
