//! Who speaks for an account, and whose it is, from outside: over restarts and crashes, with hosts that it has left, and
//! with hosts that it never had.

#![cfg(feature = "devnet")]

use crate::support::postgres;
use crate::support::process;
use crate::support::relay as support;
use std::net::{Ipv4Addr, TcpListener};
use std::time::Duration;

use crate::support::relay::{Bench, Consumer};
use atproto_relay::atproto::did::Did;
use atproto_relay::atproto::frame::{self, Message};
use atproto_relay::devnet::pds::{AccountStatus, Pds, frames};
use atproto_relay::devnet::scrape::Samples;
use atproto_relay::store::{HostId, Store, UpstreamStatus};
use bytes::Bytes;
use serde_json::{Value, json};
use tokio::time::timeout;

const POSTS: &str = "app.bsky.feed.post";
const TIME: &str = "2026-01-01T00:00:00.000Z";
/// Accounts of a host, in the tests of quotas.
const QUOTA: i64 = 3;

fn create(pds: &Pds, name: &str) -> Did {
    let handle = format!("{name}.{}", pds.domain());
    pds.create_account(&handle).unwrap().did
}

fn write(pds: &Pds, did: &Did) -> String {
    let record = json!({"$type": POSTS, "text": "hello", "createdAt": TIME});
    let written = pds.create_record(did, POSTS, record).unwrap();
    format!("commit {did} {}", written.rev)
}

fn emit_identity(pds: &Pds, did: &str) {
    pds.emit_with(|stamp| {
        let event = frame::Identity {
            seq: stamp.seq as i64,
            did,
            time: TIME,
            handle: None,
        };
        frame::encode_identity(&event).into()
    });
}

fn emit_account(pds: &Pds, did: &Did, status: AccountStatus) {
    pds.emit_with(|stamp| frames::account(stamp, did, status));
}

fn describe(bytes: &[u8]) -> String {
    match frame::decode(bytes).unwrap().message {
        Message::Commit(event) => format!("commit {} {}", event.repo, event.rev),
        Message::Sync(event) => format!("sync {}", event.did),
        Message::Identity(event) => format!("identity {}", event.did),
        Message::Account(event) => format!("account {} {:?}", event.did, event.status),
        other => panic!("not an event: {other:?}"),
    }
}

/// How a relay ends.
#[derive(Clone, Copy, Debug)]
enum End {
    Terminated,
    Killed,
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_former_host_is_never_believed_again_on_sqlite() {
    for end in [End::Terminated, End::Killed] {
        a_former_host_is_never_believed_again(end, None).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_former_host_is_never_believed_again_on_postgres() {
    let Some(server) = postgres::server() else {
        return;
    };
    for end in [End::Terminated, End::Killed] {
        a_former_host_is_never_believed_again(end, Some(server.database().await)).await;
    }
}

/// The move is known by an `#identity` alone, and an event that waits for its look-up keeps the replay of the log from
/// moving on: every event of the old host is replayed.
async fn a_former_host_is_never_believed_again(end: End, database: Option<String>) {
    let (network, mut relay, folder) = process::start(2, database.clone()).await;
    let (old, new) = (network.pds(0), network.pds(1));
    let consumer = process::Consumer::start(relay.firehose());
    let silent = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let port = silent.local_addr().unwrap().port();
    emit_identity(old, &format!("did:web:localhost%3A{port}"));
    let alice = create(old, "alice");
    let first = write(old, &alice);
    until_seen(&consumer, &first).await;
    // The database has the account, and when its identity was resolved.
    let url = database.unwrap_or(format!(
        "sqlite:{}/data/relay.sqlite",
        folder.path().display()
    ));
    let store = Store::open(&url).await.unwrap();
    until_row(&store, &alice, |row| row.repo.is_some()).await;
    network.plc().rewrite_endpoint(&old.url(), &new.url());
    emit_identity(new, alice.as_str());
    until_seen_times(&consumer, &format!("identity {alice}"), 2).await;
    match end {
        End::Terminated => assert!(relay.stop(process::PATIENCE).await.unwrap()),
        End::Killed => relay.kill().unwrap(),
    }
    relay.restart(process::PATIENCE).await.unwrap();
    process::until_connected(&relay, 2).await;
    let host = until_row(&store, &alice, |_| true).await;
    assert_eq!(host, HostId(2), "{end:?}");

    let next = old.commit_silently(&alice, &[]).unwrap();
    emit_account(old, &alice, AccountStatus::Deleted);
    old.emit_with(|stamp| frames::commit(stamp, &alice, &next));
    emit_account(old, &alice, AccountStatus::Deactivated);
    until_dropped(&relay.metrics_url(), "wrong_host", 3).await;
    new.emit_with(|stamp| frames::commit(stamp, &alice, &next));
    until_seen(&consumer, &format!("commit {alice} {}", next.rev)).await;
    let frames = consumer.frames.lock().unwrap();
    let ended = frames
        .iter()
        .map(|(_, frame)| describe(frame))
        .filter(|event| event.starts_with(&format!("account {alice} Some")));
    assert_eq!(ended.count(), 0, "{end:?}");
    drop(silent);
}

async fn until_seen(consumer: &process::Consumer, wanted: &str) {
    until_seen_times(consumer, wanted, 1).await;
}

async fn until_seen_times(consumer: &process::Consumer, wanted: &str, times: usize) {
    let seen = || {
        let frames = consumer.frames.lock().unwrap();
        let same = frames.iter().filter(|(_, frame)| describe(frame) == wanted);
        same.count() >= times
    };
    let wait = async {
        while !seen() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    let waited = timeout(process::PATIENCE, wait).await;
    assert!(waited.is_ok(), "not in time: {wanted}");
}

/// Waits until the database has such a row of the account; its host.
async fn until_row(
    store: &Store,
    did: &Did,
    wanted: impl Fn(&atproto_relay::store::AccountRow) -> bool,
) -> HostId {
    let wait = async {
        loop {
            if let Some(row) = store.account(did).await.unwrap().filter(&wanted) {
                return row.host;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    timeout(process::PATIENCE, wait).await.expect("a row")
}

async fn until_dropped(metrics: &str, rule: &str, count: u64) {
    let dropped = || async {
        let drops = Samples::scrape(metrics).await.unwrap().drops();
        drops.get(rule).copied().unwrap_or(0)
    };
    let wait = async {
        while dropped().await < count {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    let waited = timeout(process::PATIENCE, wait).await;
    assert!(waited.is_ok(), "{count} events under {rule}");
}

/// While an account is taken down, its `#account` events go out with the relay's word in the place of the PDS's. A replay
/// must not take that for the PDS's.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_replay_does_not_take_the_relays_word_for_the_hosts() {
    let bench = Bench::start(1).await;
    let pds = bench.network.pds(0);
    let alice = create(pds, "alice");
    let silent = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let port = silent.local_addr().unwrap().port();
    bench.until_settled().await;
    let mut consumer = bench.consumer(0).await;
    consumer.up_to(bench.relay.log().head()).await;
    let body = json!({"did": alice.as_str()});
    bench.admin("/admin/repo/takeDown", body.clone()).await;
    consumer.next().await;
    emit_identity(pds, &format!("did:web:localhost%3A{port}"));
    emit_account(pds, &alice, AccountStatus::Active);
    let edited = consumer.next().await.1;
    assert!(edited.contains("false Some(\"takendown\")"), "{edited}");
    let bench = bench.restarted(|_| {}).await;
    let mut consumer = bench.consumer(bench.relay.log().head()).await;
    consumer.next().await;
    bench.admin("/admin/repo/reverseTakedown", body).await;
    let back = consumer.next().await.1;
    assert!(back.contains("true None"), "{back}");
    drop(silent);
    bench.relay.shutdown().await;
}

/// What a PDS says when it is asked is newer than its event that is still on its way to a slow log.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_answer_of_a_host_outlives_its_event_before() {
    let bench = Bench::start_with(1, |config, _| {
        config.log.group_window = Duration::from_millis(500);
    })
    .await;
    let pds = bench.network.pds(0);
    let alice = create(pds, "alice");
    bench.until_settled().await;
    // The PDS has the account active, whatever this event says.
    emit_account(pds, &alice, AccountStatus::Deactivated);
    write(pds, &alice);
    let rev = pds.head(&alice).unwrap().rev;
    bench.until_settled().await;
    let store = Store::open(bench.config.database_url().expose())
        .await
        .unwrap();
    until_row(&store, &alice, |row| {
        row.repo.is_some_and(|repo| repo.rev == rev)
    })
    .await;
    let row = store.account(&alice).await.unwrap().unwrap();
    assert_eq!(row.upstream, UpstreamStatus::Active);
    bench.relay.shutdown().await;
}

/// A quota of [`QUOTA`] on every host but the last one of the network, which the relay does not know.
async fn with_quota(pds: usize) -> Bench {
    Bench::start_with(pds, |config, _| {
        config.host_settings.limits.accounts = QUOTA as u64;
        config.hosts.pop();
    })
    .await
}

/// What the relay says of the number of a host's accounts, once it is this.
async fn until_count(bench: &Bench, pds: &Pds, count: i64) {
    let path = format!(
        "/xrpc/com.atproto.sync.getHostStatus?hostname={}",
        pds.host()
    );
    let wait = async {
        loop {
            let (_, status) = bench.get(&path).await;
            if status["accountCount"] == count {
                return;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    let waited = timeout(support::PATIENCE, wait).await;
    let (_, status): (u16, Value) = bench.get(&path).await;
    assert!(waited.is_ok(), "{count} accounts, not {status}");
}

/// The next events of the account, until one is this.
async fn until_event(consumer: &mut Consumer, wanted: &str) {
    while consumer.next().await.1 != wanted {}
}

/// Documents name a host, and another host says so in `#identity` events: none of it counts.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn strangers_do_not_fill_the_quota_of_a_host() {
    let bench = with_quota(3).await;
    let [evil, victim, unknown] = [0, 1, 2].map(|n| bench.network.pds(n));
    let mut consumer = bench.consumer(0).await;
    let strangers: Vec<Did> = (0..5).map(|n| create(unknown, &format!("s{n}"))).collect();
    bench
        .network
        .plc()
        .rewrite_endpoint(&unknown.url(), &victim.url());
    for did in &strangers {
        emit_identity(evil, did.as_str());
        until_event(&mut consumer, &format!("identity {did}")).await;
    }
    until_count(&bench, victim, 0).await;
    for n in 0..QUOTA {
        let did = create(victim, &format!("a{n}"));
        until_event(&mut consumer, &format!("account {did} true None")).await;
        let written = write(victim, &did);
        until_event(&mut consumer, &written).await;
    }
    let last = create(victim, "last");
    let throttled = format!("account {last} false Some(\"throttled\")");
    until_event(&mut consumer, &throttled).await;
    until_count(&bench, victim, QUOTA + 1).await;
    until_count(&bench, evil, 0).await;
    bench.relay.shutdown().await;
}

/// Throttled where the host is full, free where it has room, uncounted when it is deleted; the same after a restart.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_move_and_a_deletion_are_held_against_the_quota() {
    let bench = with_quota(3).await;
    let [full, other, _] = [0, 1, 2].map(|n| bench.network.pds(n));
    let mut consumer = bench.consumer(0).await;
    // One after the other: which of several comes over the quota is not said.
    let mut accounts = Vec::new();
    for n in 0..QUOTA {
        let did = create(full, &format!("a{n}"));
        until_event(&mut consumer, &format!("account {did} true None")).await;
        accounts.push(did);
    }
    let last = &create(full, "last");
    let throttled = format!("account {last} false Some(\"throttled\")");
    until_event(&mut consumer, &throttled).await;
    // Where there is room it comes free.
    bench.network.migrate(last, 1).unwrap();
    until_event(&mut consumer, &format!("account {last} true None")).await;
    let written = write(other, last);
    until_event(&mut consumer, &written).await;
    until_count(&bench, full, QUOTA).await;
    until_count(&bench, other, 1).await;
    // Where there is none it is throttled, and whoever knows it is told.
    let bench = bench.restarted(|_| {}).await;
    let [full, other, _] = [0, 1, 2].map(|n| bench.network.pds(n));
    let mut consumer = bench.consumer(bench.relay.log().head()).await;
    until_count(&bench, full, QUOTA).await;
    until_count(&bench, other, 1).await;
    bench.network.migrate(last, 0).unwrap();
    until_event(&mut consumer, &throttled).await;
    until_count(&bench, full, QUOTA + 1).await;
    until_count(&bench, other, 0).await;
    // A deletion makes room, once.
    full.delete_account(&accounts[0]).unwrap();
    let deleted = format!("account {} false Some(\"deleted\")", accounts[0]);
    until_event(&mut consumer, &deleted).await;
    emit_account(full, &accounts[0], AccountStatus::Deleted);
    until_event(&mut consumer, &deleted).await;
    until_count(&bench, full, QUOTA).await;
    let written = write(full, last);
    until_event(&mut consumer, &format!("account {last} true None")).await;
    until_event(&mut consumer, &written).await;
    let bench = bench.restarted(|_| {}).await;
    until_count(&bench, bench.network.pds(0), QUOTA).await;
    bench.relay.shutdown().await;
}

/// An `#account` with the relay's word in it is longer than the one that came: where that may not leave, nothing does.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_cannot_be_edited_does_not_leave() {
    let bench = Bench::start_with(1, |config, _| {
        config.verify.account_event_bytes = 10_000_000;
        config.host_settings.limits.accounts = 1;
    })
    .await;
    let pds = bench.network.pds(0);
    let mut consumer = bench.consumer(0).await;
    let alice = create(pds, "alice");
    bench.until_settled().await;
    let bob = create(pds, "bob");
    let throttled = format!("account {bob} false Some(\"throttled\")");
    until_event(&mut consumer, &throttled).await;
    // As long as may be with any other seq, and too long with another status.
    emit_long_account(pds, &bob, frame::MAX_FRAME_BYTES - 8);
    let metrics = format!("http://{}/metrics", bench.relay.metrics_addr());
    until_dropped(&metrics, "edit", 1).await;
    emit_account(pds, &bob, AccountStatus::Active);
    let written = write(pds, &alice);
    bench.until_settled().await;
    let last = bench.relay.log().head();
    let seen: Vec<String> = (consumer.up_to(last).await.into_iter())
        .map(|(_, event)| event)
        .collect();
    assert_eq!(seen.iter().filter(|event| **event == throttled).count(), 1);
    assert!(seen.contains(&written) && seen.len() == 2, "{seen:?}");
    bench.relay.shutdown().await;
}

/// An active account's event with a frame of so many bytes.
fn emit_long_account(pds: &Pds, did: &Did, bytes: usize) {
    pds.emit_with(|stamp| {
        let frame = |time: &str| {
            frame::encode_account(&frame::Account {
                seq: stamp.seq as i64,
                did: did.as_str(),
                time,
                active: true,
                status: None,
            })
        };
        // A text of 65,536 characters and more has a head of five bytes, and an empty one of one.
        let filler = "x".repeat(bytes - frame("").len() - 4);
        let frame = frame(&filler);
        assert_eq!(frame.len(), bytes);
        Bytes::from(frame)
    });
}
