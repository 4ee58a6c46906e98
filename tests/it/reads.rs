//! What a read says is never older than an event that a consumer has, or than an operator's request that was answered:
//! a consumer asks about every event the moment it has it. On every database there is.

#![cfg(feature = "devnet")]

use crate::support::postgres;
use crate::support::relay as support;
use std::collections::HashSet;

use crate::support::relay::{Bench, PASSWORD};
use atproto_relay::atproto::did::Did;
use atproto_relay::config::DatabaseUrl;
use atproto_relay::eventlog::Durability;
use serde_json::{Value, json};

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
    let mut all = vec![(None, Durability::INTERVAL)];
    if let Some(server) = postgres::server() {
        let url = DatabaseUrl::parse(&server.database().await).unwrap();
        all.push((Some(url), Durability::Sync));
    }
    all
}

async fn start(hosts: usize, (database, durability): (Option<DatabaseUrl>, Durability)) -> Bench {
    let set = |config: &mut atproto_relay::config::Config| {
        config.database_url = database;
        config.log.durability = durability;
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
    let request = atproto_relay::dial::plain_client()
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

/// Accounts that lists have, clients that ask for lists all the time, and new accounts that are timed meanwhile.
const LISTED: usize = 20_000;
const STRANGERS: usize = 64;
const NEW_ACCOUNTS: usize = 100;

/// How long a new account takes to a consumer while strangers read lists. With `RELAY=PATH` it measures another binary,
/// with `DATABASE=postgres` on PostgreSQL: `cargo test --locked --test it -- reads --ignored --nocapture`.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "a measurement"]
async fn new_accounts_while_strangers_read_lists() {
    use atproto_relay::devnet::load::{ProcessOptions, RelayProcess, unlimited};
    use atproto_relay::devnet::network::{Network, NetworkOptions};

    let network = Network::start(NetworkOptions::default()).await.unwrap();
    let folder = tempfile::tempdir().unwrap();
    let binary = std::env::var("RELAY").unwrap_or(env!("CARGO_BIN_EXE_atproto-relay").into());
    let mut arguments = unlimited(1);
    let mut postgres = None;
    if std::env::var("DATABASE").is_ok() {
        let url = postgres::server().unwrap().database().await;
        arguments.push(format!("--database-url={url}").into());
        postgres = Some(url);
    }
    let process = ProcessOptions {
        binary: binary.into(),
        folder: folder.path().to_owned(),
        plc: network.plc_url().to_owned(),
        hosts: network.all_pds().iter().map(|pds| pds.url()).collect(),
        arguments,
    };
    let mut relay = RelayProcess::start(process, support::PATIENCE)
        .await
        .unwrap();
    relay.kill().unwrap();
    list(folder.path(), postgres).await;
    relay.restart(support::PATIENCE).await.unwrap();
    for strangers in [0, STRANGERS] {
        let url = format!("{}/xrpc/com.atproto.sync.listRepos?limit=1000", relay.url());
        let reading: Vec<_> = (0..strangers)
            .map(|_| {
                let (client, url) = (atproto_relay::dial::plain_client(), url.clone());
                tokio::spawn(async move {
                    while let Ok(page) = client.get(&url).send().await {
                        page.bytes().await.ok();
                    }
                })
            })
            .collect();
        let mut times = time_accounts(&network, &relay, strangers).await;
        reading.iter().for_each(tokio::task::JoinHandle::abort);
        times.sort();
        let (median, p95) = (times[times.len() / 2], times[times.len() * 95 / 100]);
        println!("{strangers} strangers: a new account took {median:?}, p95 {p95:?}");
    }
}

async fn time_accounts(
    network: &atproto_relay::devnet::network::Network,
    relay: &atproto_relay::devnet::load::RelayProcess,
    round: usize,
) -> Vec<std::time::Duration> {
    use futures_util::StreamExt as _;

    let firehose = format!("{}/xrpc/com.atproto.sync.subscribeRepos", relay.firehose());
    let (mut socket, _) = tokio_tungstenite::connect_async(firehose).await.unwrap();
    let mut times = Vec::new();
    for number in 0..NEW_ACCOUNTS {
        let pds = network.pds(0);
        let handle = format!("new{round}x{number}.{}", pds.domain());
        let started = std::time::Instant::now();
        let did = pds.create_account(&handle).unwrap().did;
        loop {
            let message = socket.next().await.unwrap().unwrap().into_data();
            let found = message
                .windows(did.as_str().len())
                .any(|part| part == did.as_str().as_bytes());
            if found {
                break;
            }
        }
        times.push(started.elapsed());
    }
    times
}

/// Fills the table of accounts behind the relay's back.
async fn list(folder: &std::path::Path, postgres: Option<String>) {
    use sqlx::{AssertSqlSafe, Connection as _};

    let cid = format!("01711220{}", "ab".repeat(32));
    let columns = "INSERT INTO accounts (host_id, did, rev, data_cid, commit_cid)";
    match postgres {
        Some(url) => {
            let mut connection = sqlx::PgConnection::connect(&url).await.unwrap();
            let rows = format!(
                "{columns} SELECT 1, 'did:web:' || i || '.example', i, '\\x{cid}', '\\x{cid}' FROM generate_series(1, {LISTED}) i"
            );
            sqlx::query(AssertSqlSafe(rows))
                .execute(&mut connection)
                .await
                .unwrap();
        }
        None => {
            let file = format!("sqlite:{}", folder.join("data/relay.sqlite").display());
            let mut connection = sqlx::SqliteConnection::connect(&file).await.unwrap();
            let rows = format!(
                "{columns} WITH RECURSIVE n (i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < {LISTED}) \
                 SELECT 1, 'did:web:' || i || '.example', i, x'{cid}', x'{cid}' FROM n"
            );
            sqlx::query(AssertSqlSafe(rows))
                .execute(&mut connection)
                .await
                .unwrap();
            connection.close().await.unwrap();
        }
    }
}
