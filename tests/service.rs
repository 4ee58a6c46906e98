//! The relay as a service of systemd: what it tells, when, and what it does when it is asked. The test takes systemd's
//! place; nothing of systemd is needed.

#![cfg(feature = "devnet")]

#[path = "support/postgres.rs"]
mod postgres;
#[path = "support/service.rs"]
mod service;
#[path = "support/small_disk.rs"]
mod small_disk;

use std::process::Command;
use std::time::Duration;

use atproto_relay::devnet::network::{Network, NetworkOptions};
use atproto_relay::devnet::scrape::Samples;
use serde_json::{Value, json};
use service::{Frozen, PATIENCE, Service};
use small_disk::SmallDisk;
use sqlx::{Connection, Executor, PgConnection, Row};

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
    panic!("no status with {parts:?}");
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
    assert_eq!(reqwest::get(&health).await.unwrap().status(), 200);
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
        let line = format!("no progress: {part}. systemd is not pinged");
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
    sql.execute("UPDATE log_position SET replay_from = 1")
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
    assert!(service.end());
}
