//! A whole relay from outside: a devnet with its PDSes before it, a consumer behind it, real sockets between.

#![cfg(feature = "devnet")]

#[path = "support/relay.rs"]
mod support;

use serde_json::json;
use support::Bench;

fn post(text: &str) -> serde_json::Value {
    json!({"$type": "app.bsky.feed.post", "text": text, "createdAt": "2026-01-01T00:00:00Z"})
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn events_of_two_hosts_come_out_verified_and_in_order() {
    let bench = Bench::start(2).await;
    let mut consumer = bench.consumer(0).await;
    let alice = bench
        .network
        .pds(0)
        .create_account("alice.pds1.test")
        .unwrap();
    let bob = bench
        .network
        .pds(1)
        .create_account("bob.pds2.test")
        .unwrap();
    for text in ["one", "two", "three"] {
        for (pds, account) in [(0, &alice), (1, &bob)] {
            bench
                .network
                .pds(pds)
                .create_record(&account.did, "app.bsky.feed.post", post(text))
                .unwrap();
        }
    }
    let mut seen: Vec<String> = Vec::new();
    let expected: usize = (0..2).map(|i| bench.network.pds(i).events().len()).sum();
    for position in 1..=expected as u64 {
        let (seq, text) = consumer.next().await;
        assert_eq!(seq, position, "seqs are dense");
        seen.push(text);
    }
    for account in [&alice.did, &bob.did] {
        let commits = seen
            .iter()
            .filter(|line| line.starts_with(&format!("commit {account}")))
            .count();
        assert_eq!(commits, 4, "{seen:#?}");
    }
    bench.relay.shutdown().await;
}
