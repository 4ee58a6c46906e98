//! A whole relay from outside: a devnet with its PDSes before it, a consumer behind it, real sockets between, on every
//! database there is.

#![cfg(feature = "devnet")]

use crate::support::postgres;
use crate::support::relay as support;
use atproto_relay::dial::plain_client;
use std::time::{Duration, Instant};

use crate::support::relay::Bench;
use atproto_relay::atproto::car::Car;
use atproto_relay::atproto::did::Did;
use atproto_relay::atproto::frame::{self, Peek};
use atproto_relay::config::DatabaseUrl;
use atproto_relay::devnet::pds::Write;
use atproto_relay::devnet::scrape::Samples;
use atproto_relay::dial::{DomainPattern, Guard, HostName};
use atproto_relay::hosts::HostState;
use bytes::Bytes;
use serde_json::{Value, json};

const POSTS: &str = "app.bsky.feed.post";

fn post(text: &str) -> Value {
    json!({"$type": POSTS, "text": text, "createdAt": "2026-01-01T00:00:00Z"})
}

/// SQLite in the data folder, and PostgreSQL where its server is on this machine.
async fn databases() -> Vec<Option<DatabaseUrl>> {
    let mut all = vec![None];
    if let Some(server) = postgres::server() {
        all.push(Some(DatabaseUrl::parse(&server.database().await).unwrap()));
    }
    all
}

/// Writes a record on the PDS.
fn write(bench: &Bench, pds: usize, did: &Did, text: &str) {
    let pds = bench.network.pds(pds);
    pds.create_record(did, POSTS, post(text)).unwrap();
}

fn create(bench: &Bench, pds: usize, name: &str) -> Did {
    let pds = bench.network.pds(pds);
    let handle = format!("{name}.{}", pds.domain());
    pds.create_account(&handle).unwrap().did
}

fn of<'a>(events: &'a [(u64, String)], did: &Did) -> Vec<&'a str> {
    let ours = events
        .iter()
        .filter(|(_, text)| text.contains(did.as_str()));
    ours.map(|(_, text)| text.split(' ').next().unwrap())
        .collect()
}

fn assert_dense(events: &[(u64, String)]) {
    for pair in events.windows(2) {
        assert_eq!(pair[1].0, pair[0].0 + 1, "{events:#?}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn events_of_two_hosts_come_out_verified_and_in_order() {
    let bench = Bench::start(2).await;
    let mut consumer = bench.consumer(0).await;
    let (alice, bob) = (create(&bench, 0, "alice"), create(&bench, 1, "bob"));
    for text in ["one", "two", "three"] {
        write(&bench, 0, &alice, text);
        write(&bench, 1, &bob, text);
    }
    let expected: usize = (0..2).map(|i| bench.network.pds(i).events().len()).sum();
    let seen = consumer.up_to(expected as u64).await;
    assert_eq!(seen[0].0, 1);
    assert_dense(&seen);
    for account in [&alice, &bob] {
        assert_eq!(
            of(&seen, account),
            [
                "identity", "account", "commit", "sync", "commit", "commit", "commit"
            ]
        );
    }
    bench.relay.shutdown().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_shutdown_does_not_wait_for_a_consumer_that_does_not_answer() {
    let bench = Bench::start(1).await;
    let _deaf = bench.consumer(0).await;
    create(&bench, 0, "alice");
    bench.until_settled().await;
    let started = std::time::Instant::now();
    bench.relay.shutdown().await;
    let took = started.elapsed();
    assert!(took.as_millis() < 2_000, "the shutdown took {took:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_takedown_hides_an_account_until_it_is_reversed() {
    for database in databases().await {
        let bench = Bench::start_with(1, |config, _| config.database_url = database).await;
        let (alice, bob) = (create(&bench, 0, "alice"), create(&bench, 0, "bob"));
        write(&bench, 0, &alice, "before");
        write(&bench, 0, &bob, "before");
        bench.until_settled().await;
        let before = bench.relay.log().head();
        let mut live = bench.consumer(before + 1).await;

        bench
            .admin("/admin/repo/takeDown", json!({"did": alice.as_str()}))
            .await;
        let takedown = format!("account {alice} false Some(\"takendown\")");
        assert_eq!(live.next().await, (before + 1, takedown.clone()));
        let mut backfill = bench.consumer(0).await;
        let seen = backfill.up_to(before + 1).await;
        assert_eq!(of(&seen, &alice), ["account", "account"], "{seen:#?}");
        assert_eq!(of(&seen, &bob).len(), 5, "{seen:#?}");
        status_is(&bench, &alice, (false, Some("takendown"))).await;
        let path = format!("/xrpc/com.atproto.sync.getLatestCommit?did={alice}");
        let (code, body) = bench.get(&path).await;
        assert_eq!((code, &body["error"]), (403, &json!("RepoTakendown")));

        write(&bench, 0, &alice, "during");
        write(&bench, 0, &bob, "during");
        bench.until_settled().await;
        let (seq, text) = live.next().await;
        assert_eq!(seq, before + 2);
        assert!(text.starts_with(&format!("commit {bob}")), "{text}");

        // The takedown outlives the process.
        let bench = bench.restarted(|_| {}).await;
        write(&bench, 0, &alice, "after a restart");
        bench.until_settled().await;
        assert_eq!(bench.relay.log().head(), before + 2, "still taken down");

        bench
            .admin(
                "/admin/repo/reverseTakedown",
                json!({"did": alice.as_str()}),
            )
            .await;
        write(&bench, 0, &alice, "after");
        let mut live = bench.consumer(before + 3).await;
        assert_eq!(
            live.next().await,
            (before + 3, format!("account {alice} true None"))
        );
        let (_, text) = live.next().await;
        assert!(text.starts_with(&format!("commit {alice}")), "{text}");
        status_is(&bench, &alice, (true, None)).await;
        let events = bench.consumer(0).await.up_to(before + 4).await;
        assert_eq!(
            of(&events, &alice),
            ["account", "account", "account", "commit"],
            "what was cut out does not come back"
        );
        bench.relay.shutdown().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_the_password_there_is_no_admin_api() {
    let bench = Bench::start(1).await;
    let alice = create(&bench, 0, "alice");
    bench.until_settled().await;
    let head = bench.relay.log().head();
    for password in [None, Some("wrong")] {
        let mut request = atproto_relay::dial::plain_client()
            .post(format!("{}/admin/repo/takeDown", bench.url()))
            .json(&json!({"did": alice.as_str()}));
        if let Some(password) = password {
            request = request.basic_auth("admin", Some(password));
        }
        assert_eq!(request.send().await.unwrap().status().as_u16(), 401);
    }
    assert_eq!(bench.relay.log().head(), head);
    bench.relay.shutdown().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_banned_host_is_cut_off_and_goes_on_where_it_was() {
    let bench = Bench::start(2).await;
    let mut consumer = bench.consumer(0).await;
    let (alice, bob) = (create(&bench, 0, "alice"), create(&bench, 1, "bob"));
    bench.until_settled().await;
    let host = bench.network.pds(0).host();
    bench
        .admin(&format!("/admin/pds/block?host={host}"), json!({}))
        .await;
    let handle = bench.relay.hosts().by_name(&host).unwrap();
    assert!(!handle.is_connected());
    write(&bench, 0, &alice, "while banned");
    write(&bench, 1, &bob, "not banned");
    let seen = consumer.up_to(9).await;
    assert!(seen[8].1.starts_with(&format!("commit {bob}")), "{seen:#?}");
    let crawl = atproto_relay::dial::plain_client()
        .post(format!(
            "{}/xrpc/com.atproto.sync.requestCrawl",
            bench.url()
        ))
        .json(&json!({"hostname": host}));
    assert_eq!(crawl.send().await.unwrap().status().as_u16(), 403);

    bench
        .admin(&format!("/admin/pds/unblock?host={host}"), json!({}))
        .await;
    let (seq, text) = consumer.next().await;
    assert_eq!(seq, 10);
    assert!(text.starts_with(&format!("commit {alice}")), "{text}");
    bench.until_settled().await;
    assert_eq!(bench.relay.log().head(), 10, "nothing doubled");
    bench.relay.shutdown().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_banned_domain_cuts_off_its_hosts_only() {
    // The same machine under two names: documents of the first PDS say localhost.
    let bench = Bench::start_with(2, |config, network| {
        let url = network.pds(0).url();
        let named = url.replace("127.0.0.1", "localhost");
        network.plc().rewrite_endpoint(&url, &named);
        config.hosts[0] = HostName::parse(&named, &Guard::new(true)).unwrap();
    })
    .await;
    let mut consumer = bench.consumer(0).await;
    let (alice, bob) = (create(&bench, 0, "alice"), create(&bench, 1, "bob"));
    bench.until_settled().await;
    bench
        .admin("/admin/subs/banDomain", json!({"domain": "localhost"}))
        .await;
    write(&bench, 0, &alice, "while banned");
    write(&bench, 1, &bob, "not banned");
    let seen = consumer.up_to(9).await;
    assert!(seen[8].1.starts_with(&format!("commit {bob}")), "{seen:#?}");
    let connected: Vec<bool> = (bench.relay.hosts().list().iter())
        .map(|host| host.is_connected())
        .collect();
    assert_eq!(connected, [false, true]);
    bench
        .admin("/admin/subs/unbanDomain", json!({"domain": "localhost"}))
        .await;
    let (_, text) = consumer.next().await;
    assert!(text.starts_with(&format!("commit {alice}")), "{text}");
    bench.relay.shutdown().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_raised_quota_releases_the_oldest_throttled_accounts_first() {
    for database in databases().await {
        let bench = Bench::start_with(1, |config, _| {
            config.database_url = database;
            config.host_settings.limits.accounts = 2;
        })
        .await;
        let mut accounts = Vec::new();
        for number in 0..5 {
            accounts.push(create(&bench, 0, &format!("account{number}")));
            bench.until_settled().await;
        }
        let head = bench.relay.log().head();
        let seen = bench.consumer(0).await.up_to(head).await;
        for did in &accounts[..2] {
            assert_eq!(of(&seen, did), ["identity", "account", "commit", "sync"]);
        }
        for did in &accounts[2..] {
            assert_eq!(of(&seen, did), ["identity", "account"]);
            let throttled = format!("account {did} false Some(\"throttled\")");
            assert!(seen.iter().any(|(_, text)| *text == throttled), "{seen:#?}");
        }

        // The quota is remembered, and so are the throttled accounts.
        let bench = bench.restarted(|_| {}).await;
        let host = bench.network.pds(0).host();
        let mut live = bench.consumer(head + 1).await;
        let change = json!({"host": host, "repo_limit": 4});
        bench.admin("/admin/pds/changeLimits", change).await;
        for did in &accounts[2..4] {
            let (_, text) = live.next().await;
            assert_eq!(text, format!("account {did} true None"));
        }
        for (did, active) in accounts.iter().zip([true, true, true, true, false]) {
            status_is(&bench, did, (active, (!active).then_some("throttled"))).await;
            write(&bench, 0, did, "after");
        }
        bench.until_settled().await;
        let last = bench.relay.log().head();
        let after = bench.consumer(head + 3).await.up_to(last).await;
        let committed: Vec<usize> = accounts.iter().map(|did| of(&after, did).len()).collect();
        assert_eq!(committed, [1, 1, 1, 1, 0], "{after:#?}");
        bench.relay.shutdown().await;
    }
}

/// A frame of a PDS once more, with the number the PDS now gives it.
fn again(old: &Bytes) -> impl FnOnce(u64) -> Bytes + '_ {
    move |seq| {
        let Ok(Peek::Event(event)) = frame::peek(old) else {
            panic!("an event");
        };
        let mut frame = Vec::new();
        frame::splice_seq(old, event.seq_span, seq, &mut frame);
        frame.into()
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_restart_neither_loses_nor_doubles_nor_forgets() {
    for database in databases().await {
        let bench = Bench::start_with(2, |config, _| config.database_url = database).await;
        let accounts: Vec<(usize, Did)> = (0..20)
            .map(|n| (n % 2, create(&bench, n % 2, &format!("account{n}"))))
            .collect();
        bench.until_settled().await;
        let before = bench.relay.log().head();
        assert_eq!(before, 80);
        let seen = bench.consumer(0).await.up_to(before).await;
        let lookups = bench.network.plc().lookups();

        let bench = bench
            .restarted(|network| {
                for (pds, did) in &accounts {
                    let pds = network.pds(*pds);
                    pds.create_record(did, POSTS, post("while the relay is down"))
                        .unwrap();
                }
            })
            .await;
        // With the last seq as cursor the last event comes once more, and then what follows.
        let mut resumed = bench.consumer(before).await;
        for (pds, did) in &accounts {
            write(&bench, *pds, did, "after");
        }
        let news = resumed.up_to(before + 40).await;
        assert_eq!(news[0], seen[seen.len() - 1]);
        assert_dense(&news);
        for (_, did) in &accounts {
            assert_eq!(of(&news[1..], did), ["commit", "commit"]);
        }
        assert_eq!(
            bench.network.plc().lookups(),
            lookups,
            "keys are known after a restart"
        );

        // An old rev stays old.
        for pds in bench.network.all_pds() {
            let events = pds.events();
            let old = events.iter().find(|event| {
                matches!(frame::peek(&event.frame), Ok(Peek::Event(event)) if event.kind == frame::Kind::Commit)
            });
            let make = again(&old.unwrap().frame);
            pds.emit_with(|stamp| make(stamp.seq));
        }
        bench.until_settled().await;
        assert_eq!(bench.relay.log().head(), before + 40);
        agrees_with_the_network(&bench).await;
        bench.relay.shutdown().await;
    }
}

/// The public methods say of every repository what its PDS says.
async fn agrees_with_the_network(bench: &Bench) {
    let repositories = bench.network.repositories();
    for repo in &repositories {
        let (did, rev) = (&repo.did, repo.rev.to_string());
        eventually(bench, "getRepoStatus", did, |status| {
            status["active"] == true && status["rev"] == rev
        })
        .await;
        let commit = repo.commit.to_string();
        eventually(bench, "getLatestCommit", did, |latest| {
            latest["rev"] == rev && latest["cid"] == commit
        })
        .await;
    }
    let mut listed = Vec::new();
    let mut cursor = String::new();
    loop {
        let path = format!("/xrpc/com.atproto.sync.listRepos?limit=7{cursor}");
        let (_, page) = bench.get(&path).await;
        for repo in page["repos"].as_array().unwrap() {
            assert_eq!(repo["active"], true);
            listed
                .push(["did", "head", "rev"].map(|field| repo[field].as_str().unwrap().to_owned()));
        }
        match page["cursor"].as_str() {
            Some(next) => cursor = format!("&cursor={next}"),
            None => break,
        }
    }
    let mut expected: Vec<[String; 3]> = repositories
        .iter()
        .map(|repo| {
            [
                repo.did.to_string(),
                repo.commit.to_string(),
                repo.rev.to_string(),
            ]
        })
        .collect();
    listed.sort();
    expected.sort();
    assert_eq!(listed, expected);
    // The client follows the redirect to the account's PDS.
    let repo = &repositories[0];
    let url = format!(
        "{}/xrpc/com.atproto.sync.getRepo?did={}",
        bench.url(),
        repo.did
    );
    let bytes = plain_client()
        .get(url)
        .send()
        .await
        .unwrap()
        .bytes()
        .await
        .unwrap();
    assert_eq!(Car::parse(&bytes).unwrap().roots(), [repo.commit]);
}

/// Waits until getRepoStatus has this status.
async fn status_is(bench: &Bench, did: &Did, expected: (bool, Option<&str>)) {
    eventually(bench, "getRepoStatus", did, |body| {
        (body["active"].as_bool(), body["status"].as_str()) == (Some(expected.0), expected.1)
    })
    .await;
}

/// Waits until a method that reads the database says what is right of an account.
async fn eventually(bench: &Bench, method: &str, did: &Did, right: impl Fn(&Value) -> bool) {
    let path = format!("/xrpc/com.atproto.sync.{method}?did={did}");
    let wait = async {
        while !right(&bench.get(&path).await.1) {
            tokio::time::sleep(std::time::Duration::from_millis(20)).await;
        }
    };
    if tokio::time::timeout(support::PATIENCE, wait).await.is_err() {
        panic!("{path} stays {:?}", bench.get(&path).await);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_log_whose_database_is_gone_goes_on_counting() {
    let mut bench = Bench::start(2).await;
    create(&bench, 0, "alice");
    bench.until_settled().await;
    let head = bench.relay.log().head();
    let database = bench.config.data_dir.join("relay.sqlite");
    // Now the other host gets the number under which the log has events.
    bench.config.hosts.reverse();
    let bench = bench
        .restarted(|_| std::fs::remove_file(&database).unwrap())
        .await;
    let bob = create(&bench, 1, "bob");
    let events = bench.consumer(head).await.up_to(head + 4).await;
    assert_dense(&events);
    assert_eq!(of(&events, &bob), ["identity", "account", "commit", "sync"]);
    bench.relay.shutdown().await;
}

/// Each relay has metrics of its own, also where two run in one process.
#[tokio::test]
async fn two_relays_in_one_process_do_not_add_up() {
    let (busy, quiet) = (Bench::start(1).await, Bench::start(1).await);
    create(&busy, 0, "alice");
    let scrape = async |bench: &Bench| {
        let url = format!("http://{}/metrics", bench.relay.metrics_addr());
        Samples::scrape(&url).await.unwrap()
    };
    let counters = [
        "relay_events_received_total",
        "relay_events_forwarded_total",
    ];
    let deadline = Instant::now() + Duration::from_secs(20);
    while scrape(&busy).await.sum(counters[1]) == 0.0 {
        assert!(Instant::now() < deadline, "nothing is forwarded");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let (busy, quiet) = (scrape(&busy).await, scrape(&quiet).await);
    for name in counters.into_iter().chain(["relay_log_seq"]) {
        assert!(busy.sum(name) > 0.0 && quiet.sum(name) == 0.0, "{name}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_reload_changes_rates_bans_and_rules_under_connected_hosts() {
    let bench = Bench::start(1).await;
    let host = bench.relay.hosts().list().remove(0);
    let mut config = bench.config.clone();
    config.host_settings.limits.per_second.base = 7.0;
    config.host_settings.banned_domains =
        vec![DomainPattern::banned(host.host().domain()).unwrap()];
    let reload = bench.relay.reload(config.clone()).await;
    let keys: Vec<_> = reload.applied.iter().map(|change| change.key).collect();
    assert_eq!(keys, ["banned_domains", "limits.events_per_second"]);
    assert_eq!(reload.waiting, []);
    assert_eq!(host.event_rates().per_second, 7);
    assert_eq!(host.state(), HostState::Banned);

    config.host_settings.banned_domains.clear();
    config.verify.desync.limit = 0;
    config.log.window = Duration::from_secs(1);
    config.log.max_bytes = 64 << 20;
    config.admin_password = None;
    let reload = bench.relay.reload(config.clone()).await;
    let keys: Vec<_> = reload.applied.iter().map(|change| change.key).collect();
    let expected = [
        "admin_password_file",
        "replay_window",
        "log.max_bytes",
        "banned_domains",
        "desync.limit",
    ];
    assert_eq!(keys, expected);
    bench.until_connected().await;
    let admin = format!("{}/admin/pds/list", bench.url());
    assert_eq!(
        plain_client().get(&admin).send().await.unwrap().status(),
        404,
        "off"
    );

    // A gap in an account's chain is now one too many.
    let pds = bench.network.pds(0);
    let alice = pds.create_account("alice.pds1.test").unwrap().did;
    let write = || Write::Create {
        collection: POSTS.to_owned(),
        rkey: None,
        record: post("unseen"),
    };
    pds.commit_silently(&alice, &[write()]).unwrap();
    pds.apply_writes(&alice, &[write()]).unwrap();
    let mut consumer = bench.consumer(0).await;
    loop {
        let (_, event) = consumer.next().await;
        if event == format!("account {alice} false Some(\"desynchronized\")") {
            break;
        }
    }
    assert!(bench.relay.reload(config).await.applied.is_empty());
    bench.relay.shutdown().await;
}
