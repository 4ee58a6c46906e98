//! kill −9, again and again, in the middle of traffic: what comes out of a relay over all its lives is what its hosts
//! sent, once, in order, under numbers that never change. `ATPROTO_KILLS=100` kills more often than ten times.

#![cfg(feature = "devnet")]

use crate::support::postgres;
use atproto_relay::dial::plain_client;
use std::time::Duration;

use crate::support::kills::kills;
use crate::support::process::{
    Consumer, HOSTS, PASSWORD, PATIENCE, POSTS, Traffic, all_once_and_in_order, post, start,
};
use atproto_relay::atproto::did::Did;
use atproto_relay::atproto::frame::{self, Kind, Peek};
use serde_json::{Value, json};

/// How often the relay is killed where nothing else is said.
const KILLS: u64 = 10;
/// Of so many kills, one is followed by another while the relay starts.
const TWICE: u64 = 4;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn crashes_lose_and_double_nothing_on_sqlite() {
    crashes("SQLite", None).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn crashes_lose_and_double_nothing_on_postgres() {
    if let Some(server) = postgres::server() {
        crashes("PostgreSQL", Some(server.database().await)).await;
    }
}

async fn crashes(database: &str, url: Option<String>) {
    let (network, mut relay, _folder) = start(HOSTS, url).await;
    let consumer = Consumer::start(relay.firehose());
    let traffic = Traffic::start(&network);
    let mut moments = fastrand::Rng::with_seed(7);
    let mut restarts = Vec::new();
    let mut starting = 0;
    for kill in 0..kills(KILLS) {
        // Not always at the same place in the rhythm of checkpoints.
        consumer
            .has(consumer.events() + moments.usize(1..400))
            .await;
        relay.kill().unwrap();
        if kill % TWICE == 0 {
            relay.start_again().unwrap();
            tokio::time::sleep(Duration::from_millis(moments.u64(0..200))).await;
            relay.kill().unwrap();
            starting += 1;
        }
        restarts.push(relay.restart(PATIENCE).await.unwrap());
    }
    let sent = traffic.stop(&network).await;
    if !consumer.comes_to(sent).await {
        println!("{}", relay.said());
    }
    let live = consumer.frames.lock().unwrap().clone();
    all_once_and_in_order(&network, &live);
    println!(
        "{database}: {} kills and {starting} more while starting, {sent} events sent, {} came out, none missing, doubled \
         or out of order; ready after {:?} at most",
        restarts.len(),
        live.len(),
        restarts.iter().max().unwrap()
    );
    // Who comes late sees the same under the same numbers.
    let late = Consumer::start(relay.firehose());
    late.has(live.len()).await;
    assert!(*late.frames.lock().unwrap() == live);
    // A relay that ends well leaves nothing for later.
    assert!(relay.end(PATIENCE).await.unwrap());
}

/// A crash before the first checkpoint must not take a new host up live again.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_new_host_is_resumed_even_if_the_crash_follows_its_first_event() {
    for _ in 0..3 {
        let (network, mut relay, _folder) = start(1, None).await;
        let consumer = Consumer::start(relay.firehose());
        let pds = network.pds(0);
        let alice = pds.create_account("alice.pds1.test").unwrap().did;
        consumer.has(1).await;
        relay.kill().unwrap();
        pds.create_record(&alice, POSTS, post("while it is down"))
            .unwrap();
        relay.restart(PATIENCE).await.unwrap();
        consumer.has(5).await;
        let seqs: Vec<u64> = (consumer.frames.lock().unwrap().iter())
            .map(|(seq, _)| *seq)
            .collect();
        assert_eq!(seqs, [1, 2, 3, 4, 5]);
    }
}

/// What an operator was told to be done is done, whatever happens next.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_takedown_outlives_a_crash_right_after_its_answer() {
    let (network, mut relay, _folder) = start(1, None).await;
    let consumer = Consumer::start(relay.firehose());
    let pds = network.pds(0);
    let accounts: Vec<Did> = (0..5)
        .map(|n| pds.create_account(&format!("a{n}.pds1.test")).unwrap().did)
        .collect();
    consumer.has(20).await;
    for did in &accounts[1..] {
        let request = atproto_relay::dial::plain_client()
            .post(format!("{}/admin/repo/takeDown", relay.url()))
            .basic_auth("admin", Some(PASSWORD))
            .json(&json!({"did": did.as_str()}));
        let answer = request.send().await.unwrap();
        relay.kill().unwrap();
        assert_eq!(answer.status().as_u16(), 200);
        relay.restart(PATIENCE).await.unwrap();
        let url = format!(
            "{}/xrpc/com.atproto.sync.getRepoStatus?did={did}",
            relay.url()
        );
        let status: Value = plain_client()
            .get(url)
            .send()
            .await
            .unwrap()
            .json()
            .await
            .unwrap();
        assert_eq!(status["status"], "takendown", "{status}");
    }
    // Four of the first account, and of each other its two #account events.
    let late = Consumer::start(relay.firehose());
    late.has(12).await;
    let kinds: Vec<Kind> = (late.frames.lock().unwrap().iter())
        .map(|(_, frame)| match frame::peek(frame) {
            Ok(Peek::Event(event)) => event.kind,
            other => panic!("not an event: {other:?}"),
        })
        .collect();
    let accounts = kinds.iter().filter(|kind| **kind == Kind::Account).count();
    assert_eq!((kinds.len(), accounts), (12, 9));
    assert_eq!(late.frames.lock().unwrap()[11].0, 24);
}
