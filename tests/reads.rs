//! What a read says is never older than an event that a consumer has, or than an operator's request that was answered:
//! a consumer asks about every event the moment it has it. On every database there is.

#![cfg(feature = "devnet")]

#[path = "support/postgres.rs"]
mod postgres;
#[path = "support/relay.rs"]
mod support;

use std::collections::HashSet;

use atproto_relay::atproto::did::Did;
use atproto_relay::config::{DatabaseUrl, Durability};
use serde_json::{Value, json};
use support::{Bench, PASSWORD};

const POSTS: &str = "app.bsky.feed.post";
/// Accounts of each of two hosts, and posts of each account.
const ACCOUNTS: usize = 20;
const POSTS_EACH: usize = 4;

fn post(text: &str) -> Value {
    json!({"$type": POSTS, "text": text, "createdAt": "2026-01-01T00:00:00Z"})
}

/// SQLite in the data folder, and PostgreSQL where its server is on this machine; events are published before their
/// sync on the one, after it on the other.
async fn databases() -> Vec<(Option<DatabaseUrl>, Durability)> {
    let mut all = vec![(None, Durability::Interval)];
    if let Some(server) = postgres::server() {
        let url = DatabaseUrl::parse(&server.database().await).unwrap();
        all.push((Some(url), Durability::Sync));
    }
    all
}

async fn start(hosts: usize, (database, durability): (Option<DatabaseUrl>, Durability)) -> Bench {
    let set = |config: &mut atproto_relay::config::Config| {
        config.database_url = database;
        config.log_durability = durability;
    };
    Bench::start_with(hosts, |config, _| set(config)).await
}

fn create(bench: &Bench, pds: usize, name: &str) -> Did {
    let pds = bench.network.pds(pds);
    let handle = format!("{name}.{}", pds.domain());
    pds.create_account(&handle).unwrap().did
}

fn sync(method: &str, did: &str) -> String {
    format!("/xrpc/com.atproto.sync.{method}?did={did}")
}

async fn admin_get(bench: &Bench, path: &str) -> Value {
    let request = reqwest::Client::new()
        .get(format!("{}{path}", bench.url()))
        .basic_auth("admin", Some(PASSWORD));
    request.send().await.unwrap().json().await.unwrap()
}

/// The name by which the relay knows a PDS.
fn name(bench: &Bench, pds: usize) -> String {
    let url = bench.network.pds(pds).url();
    url.trim_start_matches("http://").to_owned()
}

/// Accounts that a host has by its status.
async fn account_count(bench: &Bench, pds: usize) -> usize {
    let host = name(bench, pds);
    let path = format!("/xrpc/com.atproto.sync.getHostStatus?hostname={host}");
    let (_, status) = bench.get(&path).await;
    status["accountCount"].as_u64().unwrap() as usize
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_event_is_in_what_is_read_on_its_receipt() {
    for database in databases().await {
        let bench = start(2, database).await;
        let mut consumer = bench.consumer(0).await;
        let mut known = HashSet::new();
        let (mut commits, mut expected) = (0, 0);
        for number in 0..ACCOUNTS {
            for pds in 0..2 {
                let did = create(&bench, pds, &format!("user{number}"));
                for post_number in 0..POSTS_EACH {
                    let record = post(&format!("post {post_number}"));
                    bench
                        .network
                        .pds(pds)
                        .create_record(&did, POSTS, record)
                        .unwrap();
                }
            }
            let all = (0..2).map(|pds| bench.network.pds(pds).events().len());
            let seen = expected;
            expected = all.sum();
            for _ in seen..expected {
                let (_, event) = consumer.next().await;
                let words: Vec<&str> = event.split(' ').collect();
                let (status, latest) = bench.get(&sync("getLatestCommit", words[1])).await;
                if matches!(words[0], "commit" | "sync") {
                    commits += 1;
                    assert_eq!(status, 200, "{event}: {latest}");
                    assert!(
                        latest["rev"].as_str().unwrap() >= words[2],
                        "{event}: {latest}"
                    );
                }
                // Of accounts only: what the PDS says of an identity says nothing of an account.
                if known.insert(words[1].to_owned()) || words[0] == "account" {
                    let (status, account) = bench.get(&sync("getRepoStatus", words[1])).await;
                    assert_eq!((status, &account["active"]), (200, &json!(true)), "{event}");
                    let counted = account_count(&bench, 0).await + account_count(&bench, 1).await;
                    assert!(counted >= known.len(), "{counted} of {}", known.len());
                }
            }
        }
        assert!(
            commits >= 2 * ACCOUNTS * (POSTS_EACH + 1),
            "{commits} commits"
        );
        let (_, listed) = bench.get("/xrpc/com.atproto.sync.listHosts").await;
        assert_eq!(listed["hosts"].as_array().unwrap().len(), 2);
        bench.relay.shutdown().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_list_has_an_older_commit_than_an_event() {
    for database in databases().await {
        let bench = start(1, database).await;
        let alice = create(&bench, 0, "alice");
        bench.until_settled().await;
        // Until the database has it, it has no place in lists.
        let path = "/xrpc/com.atproto.sync.listRepos";
        while bench.get(path).await.1["repos"] == json!([]) {
            tokio::time::sleep(std::time::Duration::from_millis(20)).await;
        }
        let mut consumer = bench.consumer(bench.relay.log().head() + 1).await;
        for number in 0..20 {
            let record = post(&format!("post {number}"));
            bench
                .network
                .pds(0)
                .create_record(&alice, POSTS, record)
                .unwrap();
            let (_, event) = consumer.next().await;
            let rev = event.rsplit(' ').next().unwrap();
            let (_, page) = bench.get(path).await;
            assert_eq!(page["repos"][0]["rev"], json!(rev), "{event}");
        }
        bench.relay.shutdown().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_an_operator_was_answered_is_read_at_once() {
    for database in databases().await {
        let bench = start(2, database).await;
        let (alice, bob) = (create(&bench, 0, "alice"), create(&bench, 1, "bob"));
        bench.until_settled().await;
        let down = json!({"did": alice.as_str()});
        for _ in 0..5 {
            bench.admin("/admin/repo/takeDown", down.clone()).await;
            let (status, error) = bench.get(&sync("getLatestCommit", alice.as_str())).await;
            assert_eq!((status, &error["error"]), (403, &json!("RepoTakendown")));
            let (_, account) = bench.get(&sync("getRepoStatus", alice.as_str())).await;
            assert_eq!(account["status"], json!("takendown"));
            let list = admin_get(&bench, "/admin/repo/takedowns").await;
            assert_eq!(list["dids"], json!([alice.as_str()]));
            bench
                .admin("/admin/repo/reverseTakedown", down.clone())
                .await;
            assert_eq!(
                bench.get(&sync("getLatestCommit", alice.as_str())).await.0,
                200
            );
            let list = admin_get(&bench, "/admin/repo/takedowns").await;
            assert_eq!(list["dids"], json!([]));
        }

        let host = name(&bench, 1);
        let status = format!("/xrpc/com.atproto.sync.getHostStatus?hostname={host}");
        for (action, word) in [("block", "banned"), ("unblock", "active")] {
            let path = format!("/admin/pds/{action}?host={host}");
            bench.admin(&path, json!({})).await;
            assert_eq!(bench.get(&status).await.1["status"], json!(word));
            let (_, listed) = bench.get("/xrpc/com.atproto.sync.listHosts").await;
            let listed = listed["hosts"].as_array().unwrap();
            let ours = listed
                .iter()
                .find(|row| row["hostname"] == json!(host))
                .unwrap();
            assert_eq!(ours["status"], json!(word));
            let all = admin_get(&bench, "/admin/pds/list").await;
            let ours = all
                .as_array()
                .unwrap()
                .iter()
                .find(|row| row["Host"] == json!(host));
            assert_eq!(ours.unwrap()["Status"], json!(word));
        }
        assert_eq!(bench.get(&sync("getRepoStatus", bob.as_str())).await.0, 200);
        bench.relay.shutdown().await;
    }
}
