//! Whose budget a look-up spends, from outside: hosts without authority over an account ask for what they can, and the
//! account's own events pass.

#![cfg(feature = "devnet")]

use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::support::relay::{Bench, Consumer, until};
use atproto_relay::atproto::did::Did;
use atproto_relay::atproto::frame;
use atproto_relay::devnet::pds::Pds;
use atproto_relay::hosts::HostHandle;
use atproto_relay::identity::Settings;
use axum::Router;
use axum::http::StatusCode;
use axum::routing::get;
use serde_json::{Value, json};
use tokio::net::TcpListener;
use tokio::sync::watch;

const POSTS: &str = "app.bsky.feed.post";
/// A P-256 key from the did:key test vectors.
const KEY: &str = "zDnaerx9CtbPJ1q36T5Ln5wYt3MQYeGRG5ehnPAmxcf5mDZpv";
/// What must come out although others ask for look-ups comes out within this time.
const SOON: Duration = Duration::from_secs(8);

fn create(bench: &Bench, pds: usize, name: &str) -> Did {
    let pds = bench.network.pds(pds);
    let handle = format!("{name}.{}", pds.domain());
    pds.create_account(&handle).unwrap().did
}

fn write(pds: &Pds, did: &Did, text: &str) {
    let record = json!({"$type": POSTS, "text": text, "createdAt": "2026-01-01T00:00:00Z"});
    pds.create_record(did, POSTS, record).unwrap();
}

/// An `#identity` of any account, sent by a PDS that need not be its own.
fn emit_identity(pds: &Pds, did: &str) {
    pds.emit_with(|stamp| {
        let event = frame::Identity {
            seq: stamp.seq as i64,
            did,
            time: "2026-01-01T00:00:00.000Z",
            handle: None,
        };
        frame::encode_identity(&event).into()
    });
}

/// What a PDS says of an account, whatever it is there.
fn emit_account(pds: &Pds, did: &str, active: bool) {
    pds.emit_with(|stamp| {
        let event = frame::Account {
            seq: stamp.seq as i64,
            did,
            time: "2026-01-01T00:00:00.000Z",
            active,
            status: (!active).then_some("deactivated"),
        };
        frame::encode_account(&event).into()
    });
}

/// Events of `did` of one kind that come within `SOON`, until there are `count` of them.
async fn come(consumer: &mut Consumer, kind: &str, did: &str, count: usize) -> usize {
    let begins = format!("{kind} {did}");
    let mut seen = 0;
    let all = async {
        while seen < count {
            seen += usize::from(consumer.next().await.1.starts_with(&begins));
        }
    };
    // What is missing is in the count.
    let _ = tokio::time::timeout(SOON, all).await;
    seen
}

/// A did:web whose host takes connections and never answers.
async fn silent_did() -> (TcpListener, String) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    (listener, format!("did:web:localhost%3A{port}"))
}

/// A did:web with a document that names this PDS, once it `exists`.
async fn web_did(pds: String, exists: watch::Receiver<bool>) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let did = format!(
        "did:web:localhost%3A{}",
        listener.local_addr().unwrap().port()
    );
    let document: Value = json!({
        "@context": ["https://www.w3.org/ns/did/v1"],
        "id": did,
        "alsoKnownAs": [],
        "verificationMethod": [
            {"id": format!("{did}#atproto"), "type": "Multikey", "controller": did, "publicKeyMultibase": KEY}
        ],
        "service": [{"id": "#atproto_pds", "type": "AtprotoPersonalDataServer", "serviceEndpoint": pds}],
    });
    let answer = get(move || async move {
        match *exists.borrow() {
            true => Ok(axum::Json(document)),
            false => Err(StatusCode::NOT_FOUND),
        }
    });
    let router = Router::new().route("/.well-known/did.json", answer);
    tokio::spawn(async move { axum::serve(listener, router).await.unwrap() });
    did
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn foreign_identity_events_take_no_look_up_from_an_account_that_moves() {
    let bench = Bench::start_with(3, |config, _| {
        config.identity.refresh_interval = Settings::default().refresh_interval;
    })
    .await;
    let alice = create(&bench, 0, "alice");
    bench.until_settled().await;
    // More than may follow each other at once for one DID.
    (0..12).for_each(|_| emit_identity(bench.network.pds(2), alice.as_str()));
    bench.until_settled().await;
    let mut consumer = bench.consumer(bench.relay.log().head() + 1).await;
    let (old, new) = (bench.network.pds(0), bench.network.pds(1));
    old.migrate(&alice, new).unwrap();
    (0..40).for_each(|number| write(new, &alice, &format!("{number}")));
    assert_eq!(come(&mut consumer, "commit", alice.as_str(), 40).await, 40);
    bench.relay.shutdown().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn foreign_identity_events_do_not_hold_up_an_account_while_the_directory_hangs() {
    let bench = Bench::start(2).await;
    let alice = create(&bench, 0, "alice");
    bench.until_settled().await;
    let mut consumer = bench.consumer(bench.relay.log().head() + 1).await;
    bench.network.plc().set_hanging(true);
    let (own, stranger) = (bench.network.pds(0), bench.network.pds(1));
    emit_identity(stranger, alice.as_str());
    until("the stranger's event waits", || {
        let hosts = bench.relay.hosts().list();
        hosts.iter().any(|host| host.progress().in_flight().0 > 0)
    })
    .await;
    write(own, &alice, "while it waits");
    assert_eq!(come(&mut consumer, "commit", alice.as_str(), 1).await, 1);
    bench.network.plc().set_hanging(false);
    assert_eq!(come(&mut consumer, "identity", alice.as_str(), 1).await, 1);
    bench.relay.shutdown().await;
}

/// Has five accounts write twenty times each. Returns how long it took until a consumer had it all.
async fn write_100(bench: &Bench, accounts: &[Did]) -> Duration {
    let mut consumer = bench.consumer(bench.relay.log().head() + 1).await;
    let started = Instant::now();
    for number in 0..20 {
        for did in accounts {
            write(bench.network.pds(0), did, &format!("{number}"));
        }
    }
    assert_eq!(come(&mut consumer, "commit", "", 100).await, 100);
    started.elapsed()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn known_accounts_need_no_directory_after_a_restart() {
    let bench = Bench::start_with(1, |config, _| {
        // Every identity is past its time.
        config.identity.ttl = Duration::from_millis(1);
    })
    .await;
    let accounts: Vec<Did> = (0..5)
        .map(|number| create(&bench, 0, &format!("account{number}")))
        .collect();
    bench.until_settled().await;
    let bench = bench
        .restarted(|network| network.plc().set_hanging(true))
        .await;
    let asked = bench.network.plc().lookups();
    let without = write_100(&bench, &accounts).await;
    bench.network.plc().set_hanging(false);
    let renewed = || bench.network.plc().lookups() >= asked + accounts.len() as u64;
    until("each identity is asked for beside the events", renewed).await;
    let with = write_100(&bench, &accounts).await;
    println!("100 commits without a directory took {without:?}, with one {with:?}");
    bench.relay.shutdown().await;
}

/// Hosts ask for more look-ups than there are places, and none of them is ever answered.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn hosts_whose_look_ups_hang_leave_places_to_the_others() {
    const HOSTILE: usize = 24;
    const LOOKUPS: usize = 10;
    let bench = Bench::start(HOSTILE + 1).await;
    let alice = create(&bench, 0, "alice");
    let own = bench.network.pds(0);
    let (_exists, exists) = watch::channel(true);
    let did = web_did(own.url(), exists).await;
    bench.until_settled().await;
    let mut silent = Vec::new();
    for hostile in &bench.network.all_pds()[1..] {
        for _ in 0..LOOKUPS {
            let (listener, did) = silent_did().await;
            emit_identity(hostile, &did);
            silent.push(listener);
        }
    }
    until("their events wait", || {
        let hosts = bench.relay.hosts().list();
        let waiting = |host: &&Arc<HostHandle>| host.progress().in_flight().0 == LOOKUPS;
        hosts.iter().filter(waiting).count() == HOSTILE
    })
    .await;
    let mut consumer = bench.consumer(bench.relay.log().head() + 1).await;
    let started = Instant::now();
    emit_identity(own, &did);
    assert_eq!(come(&mut consumer, "identity", &did, 1).await, 1);
    println!("a new did:web passed after {:?}", started.elapsed());
    // The relay's last word on the account is that it is inactive, its PDS says that it is not.
    emit_account(own, alice.as_str(), false);
    write(own, &alice, "back again");
    assert_eq!(come(&mut consumer, "commit", alice.as_str(), 1).await, 1);
    println!("an account came back after {:?}", started.elapsed());
    bench.relay.shutdown().await;
}

/// A stranger asked for the identity before there was one; what was found then says nothing to the account's own PDS.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_identity_that_a_stranger_asked_for_too_early_is_looked_up_for_its_own_pds() {
    let bench = Bench::start_with(2, |config, _| {
        config.identity.refresh_interval = Settings::default().refresh_interval;
    })
    .await;
    let (own, stranger) = (bench.network.pds(0), bench.network.pds(1));
    let (exists, begins) = watch::channel(false);
    let did = web_did(own.url(), begins).await;
    emit_identity(stranger, &did);
    bench.until_settled().await;
    exists.send_replace(true);
    let mut consumer = bench.consumer(bench.relay.log().head() + 1).await;
    emit_account(own, &did, true);
    assert_eq!(come(&mut consumer, "account", &did, 1).await, 1);
    bench.relay.shutdown().await;
}
