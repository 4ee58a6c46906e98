//! Requests for crawls and the lists of other relays, against hosts on real sockets.
#![cfg(feature = "devnet")]

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use atproto_relay::dial::Guard;
use atproto_relay::discovery::{
    CrawlError, Crawler, Metrics, PullError, Requester, Settings, pull_hosts,
};
use atproto_relay::hosts::{Hosts, HostsOptions};
use atproto_relay::store::{HostStatus, Store};
use atproto_relay::upstream::{Supervisor, UpstreamOptions};
use atproto_relay::verify::Pipeline;
use axum::extract::Query;
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use axum::{Json, Router};
use serde_json::json;
use url::Url;

/// A host whose describeServer answers what the test wants.
struct Server {
    port: u16,
    asked: Arc<AtomicUsize>,
}

impl Server {
    async fn answering(answer: impl Fn() -> Response + Clone + Send + Sync + 'static) -> Self {
        let asked = Arc::new(AtomicUsize::new(0));
        let counter = asked.clone();
        let describe = async move || {
            counter.fetch_add(1, Ordering::SeqCst);
            answer()
        };
        let port =
            serve(Router::new().route("/xrpc/com.atproto.server.describeServer", get(describe)))
                .await;
        Self { port, asked }
    }

    async fn pds() -> Self {
        Self::answering(|| {
            Json(json!({"did": "did:web:pds.example.com", "availableUserDomains": []}))
                .into_response()
        })
        .await
    }

    fn url(&self) -> String {
        format!("http://127.0.0.1:{}", self.port)
    }

    fn name(&self) -> String {
        format!("127.0.0.1:{}", self.port)
    }

    fn asked(&self) -> usize {
        self.asked.load(Ordering::SeqCst)
    }
}

async fn serve(router: Router) -> u16 {
    // All addresses of this machine, so that there can be hosts of several domains.
    let listener = tokio::net::TcpListener::bind("0.0.0.0:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    tokio::spawn(async move { axum::serve(listener, router).await.unwrap() });
    port
}

struct Relay {
    crawler: Crawler,
    hosts: Hosts,
    upstream: Supervisor,
    store: Store,
    _folder: tempfile::TempDir,
}

fn settings() -> Settings {
    Settings {
        public_requests: true,
        new_hosts_per_day: 50,
        new_hosts_per_day_per_ip: 50,
        new_hosts_per_day_per_domain: 50,
        max_checks: 64,
        remember_failure: Duration::from_secs(600),
    }
}

impl Relay {
    async fn start(settings: Settings) -> Self {
        Self::guarded(settings, Guard::new(true)).await
    }

    async fn guarded(settings: Settings, guard: Guard) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let url = format!("sqlite:{}", folder.path().join("relay.sqlite").display());
        let store = Store::open(&url).await.unwrap();
        let hosts_options = HostsOptions {
            guard,
            ..HostsOptions::default()
        };
        let hosts = Hosts::load(hosts_options, store.clone(), HashMap::new())
            .await
            .unwrap();
        // These hosts send no event.
        let (pipeline, _) = Pipeline::recording();
        let upstream = Supervisor::new(
            UpstreamOptions {
                guard,
                ..UpstreamOptions::default()
            },
            hosts.clone(),
            store.clone(),
            pipeline,
        );
        Self {
            crawler: Crawler::new(settings, guard, upstream.clone(), Metrics::default()),
            hosts,
            upstream,
            store,
            _folder: folder,
        }
    }

    async fn request(&self, hostname: &str) -> Result<(), CrawlError> {
        self.request_from("192.0.2.1", hostname).await
    }

    async fn request_from(&self, client: &str, hostname: &str) -> Result<(), CrawlError> {
        let client = client.parse().unwrap();
        self.crawler
            .request_crawl(hostname, Requester::Public(client))
            .await
            .map(drop)
    }
}

#[tokio::test]
async fn a_pds_is_added_once_and_asked_once() {
    let (relay, pds) = (Relay::start(settings()).await, Server::pds().await);
    relay.request(&pds.url()).await.unwrap();
    relay.request(&pds.url()).await.unwrap();
    let row = relay
        .store
        .host_by_name(&pds.name())
        .await
        .unwrap()
        .unwrap();
    assert_eq!(
        (row.status, row.cursor, row.tls, row.account_limit),
        (HostStatus::Active, None, false, 100)
    );
    assert_eq!((pds.asked(), relay.hosts.list().len()), (1, 1));
}

#[tokio::test]
async fn what_is_no_pds_is_refused_and_remembered() {
    let relay = Relay::start(settings()).await;
    let not_found = Server::answering(|| StatusCode::NOT_FOUND.into_response()).await;
    let no_json = Server::answering(|| "<html>".into_response()).await;
    let no_did = Server::answering(|| Json(json!({"did": "nobody"})).into_response()).await;
    let endless = Server::answering(|| "x".repeat(100_000).into_response()).await;
    for server in [&not_found, &no_json, &no_did, &endless] {
        for _ in 0..3 {
            let outcome = relay.request(&server.url()).await;
            assert!(
                matches!(outcome, Err(CrawlError::NotAPds { .. })),
                "{outcome:?}"
            );
        }
        assert_eq!(server.asked(), 1);
        let again = relay
            .crawler
            .request_crawl(&server.url(), Requester::Operator)
            .await;
        assert!(again.is_err());
        assert_eq!(server.asked(), 2, "the operator's word makes it look again");
    }
    assert!(relay.store.hosts().await.unwrap().is_empty());
}

#[tokio::test]
async fn a_relay_is_refused() {
    let relay = Relay::start(settings()).await;
    let other = Server::answering(|| {
        (
            [("server", "indigo-relay (atproto-relay)")],
            Json(json!({"did": "did:web:relay.example.com"})),
        )
            .into_response()
    })
    .await;
    assert!(matches!(
        relay.request(&other.url()).await,
        Err(CrawlError::IsRelay(_))
    ));
}

#[tokio::test]
async fn banned_hosts_and_domains_are_refused_without_being_asked() {
    let (relay, pds) = (Relay::start(settings()).await, Server::pds().await);
    relay.upstream.ban_domain("127.0.0.1").await.unwrap();
    assert!(matches!(
        relay.request(&pds.url()).await,
        Err(CrawlError::Banned(_))
    ));
    relay.upstream.unban_domain("127.0.0.1").await.unwrap();
    relay.request(&pds.url()).await.unwrap();
    let host = relay.hosts.by_name(&pds.name()).unwrap();
    relay.upstream.ban(host.id()).await.unwrap();
    assert!(matches!(
        relay.request(&pds.url()).await,
        Err(CrawlError::Banned(_))
    ));
    assert_eq!(pds.asked(), 1);
}

#[tokio::test]
async fn private_names_and_addresses_are_refused_without_being_asked() {
    let relay = Relay::guarded(settings(), Guard::new(false)).await;
    let pds = Server::pds().await;
    for name in [
        pds.url(),
        pds.name(),
        format!("localhost:{}", pds.port),
        "10.0.0.1".into(),
        "a.internal".into(),
    ] {
        assert!(
            matches!(relay.request(&name).await, Err(CrawlError::Name(_))),
            "{name}"
        );
    }
    assert_eq!(pds.asked(), 0);
}

#[tokio::test]
async fn the_public_adds_only_so_many_new_hosts_a_day() {
    let relay = Relay::start(Settings {
        new_hosts_per_day: 2,
        ..settings()
    })
    .await;
    let (one, two, three) = (
        Server::pds().await,
        Server::pds().await,
        Server::pds().await,
    );
    relay.request(&one.url()).await.unwrap();
    relay.request(&two.url()).await.unwrap();
    assert_eq!(
        relay.request(&three.url()).await,
        Err(CrawlError::RateLimited)
    );
    assert_eq!(three.asked(), 0);
    relay.request(&one.url()).await.unwrap();
    relay
        .crawler
        .request_crawl(&three.url(), Requester::Operator)
        .await
        .unwrap();
}

/// One host, asked for several times at once, takes one place of the day.
#[tokio::test]
async fn a_host_counts_once_however_often_it_is_asked_for() {
    let relay = Relay::start(Settings {
        new_hosts_per_day: 2,
        ..settings()
    })
    .await;
    let (one, other) = (Server::pds().await, Server::pds().await);
    let one_url = one.url();
    let asked = futures_util::future::join_all((0..4).map(|_| relay.request(&one_url))).await;
    assert!(asked.iter().all(Result::is_ok), "{asked:?}");
    relay.request(&other.url()).await.unwrap();
}

#[tokio::test]
async fn no_client_and_no_domain_takes_the_whole_day() {
    let relay = Relay::start(Settings {
        new_hosts_per_day: 13,
        new_hosts_per_day_per_ip: 2,
        new_hosts_per_day_per_domain: 3,
        ..settings()
    })
    .await;
    let pds = Server::pds().await;
    let host = |domain: u8| format!("http://127.0.1.{domain}:{}", pds.port);
    let limited = Err(CrawlError::RateLimited);
    // One client, many domains.
    for domain in 1..=2 {
        relay
            .request_from("192.0.2.1", &host(domain))
            .await
            .unwrap();
    }
    assert_eq!(relay.request_from("192.0.2.1", &host(3)).await, limited);
    // One site, many networks: a share for each four of them.
    for network in 0..8 {
        let client = format!("2001:db8:0:{network}::1");
        relay
            .request_from(&client, &host(10 + network))
            .await
            .unwrap();
    }
    let new_network = relay.request_from("2001:db8:0:ff::1", &host(20)).await;
    assert_eq!(new_network, limited);
    // One domain, many clients.
    let others = [
        Server::pds().await,
        Server::pds().await,
        Server::pds().await,
    ];
    let names = others
        .each_ref()
        .map(|other| format!("http://127.0.1.1:{}", other.port));
    for (client, name) in names[..2].iter().enumerate() {
        let client = format!("198.51.100.{client}");
        relay.request_from(&client, name).await.unwrap();
    }
    assert_eq!(relay.request_from("203.0.113.1", &names[2]).await, limited);
    assert_eq!(others[2].asked(), 0);
    // There was room for another domain.
    relay.request_from("203.0.113.1", &host(29)).await.unwrap();
    // Now the day is over for everybody but the operator.
    assert_eq!(relay.request_from("203.0.113.2", &host(30)).await, limited);
    relay.request_from("203.0.113.2", &host(1)).await.unwrap();
    let by_operator = relay
        .crawler
        .request_crawl(&host(30), Requester::Operator)
        .await;
    by_operator.unwrap();
}

#[tokio::test]
async fn hosts_that_do_not_answer_lock_out_neither_others_nor_the_operator() {
    let relay = Relay::start(Settings {
        max_checks: 32,
        ..settings()
    })
    .await;
    // Takes connections, and says nothing.
    let silent = tokio::net::TcpListener::bind("0.0.0.0:0").await.unwrap();
    let port = silent.local_addr().unwrap().port();
    let pds = Server::pds().await;
    let good = |domain: u8| format!("http://127.0.2.{domain}:{}", pds.port);
    let mut asking = tokio::task::JoinSet::new();
    let ask = |asking: &mut tokio::task::JoinSet<_>, client: String, domain: u8| {
        let crawler = relay.crawler.clone();
        let (host, client) = (
            format!("http://127.0.1.{domain}:{port}"),
            client.parse().unwrap(),
        );
        asking.spawn(async move {
            let asked = crawler
                .request_crawl(&host, Requester::Public(client))
                .await;
            asked.map(drop)
        });
    };
    // One client with many names: all but its part are refused at once.
    for domain in 1..=8 {
        ask(&mut asking, "192.0.2.1".into(), domain);
    }
    for _ in 0..6 {
        let refused = asking.join_next().await.unwrap().unwrap();
        assert_eq!(refused, Err(CrawlError::RateLimited));
    }
    relay.request_from("192.0.2.2", &good(1)).await.unwrap();
    // Many clients with a name of one domain.
    for client in 10..14 {
        ask(&mut asking, format!("192.0.2.{client}"), 100);
    }
    for _ in 0..2 {
        let refused = asking.join_next().await.unwrap().unwrap();
        assert_eq!(refused, Err(CrawlError::RateLimited));
    }
    relay.request_from("192.0.2.2", &good(2)).await.unwrap();
    // So many clients with so many domains that the public has no place left: the operator has his own.
    for n in 0..28 {
        ask(&mut asking, format!("198.51.100.{n}"), 150 + n);
    }
    let mut held = Vec::new();
    while held.len() < 32 {
        held.push(silent.accept().await.unwrap());
    }
    let late = relay.request_from("192.0.2.3", &good(3)).await;
    assert_eq!(late, Err(CrawlError::RateLimited));
    let by_operator = relay
        .crawler
        .request_crawl(&good(3), Requester::Operator)
        .await;
    by_operator.unwrap();
}

#[tokio::test]
async fn a_closed_relay_takes_new_hosts_from_its_operator_only() {
    let relay = Relay::start(Settings {
        public_requests: false,
        ..settings()
    })
    .await;
    let pds = Server::pds().await;
    assert_eq!(relay.request(&pds.url()).await, Err(CrawlError::Closed));
    relay
        .crawler
        .request_crawl(&pds.url(), Requester::Operator)
        .await
        .unwrap();
    relay.request(&pds.url()).await.unwrap();
}

#[tokio::test]
async fn the_list_of_another_relay_is_read_page_by_page() {
    let list = async |Query(query): Query<HashMap<String, String>>| {
        let start: usize = query
            .get("cursor")
            .map_or(0, |cursor| cursor.parse().unwrap());
        let host = |index: usize| json!({"hostname": format!("pds{index}.example.com"), "seq": index, "status": "active"});
        let hosts: Vec<_> = (start..(start + 2).min(5)).map(host).collect();
        let cursor = (start + 2 < 5).then(|| (start + 2).to_string());
        match cursor {
            Some(cursor) => Json(json!({"hosts": hosts, "cursor": cursor})),
            None => Json(json!({"hosts": hosts})),
        }
    };
    let port = serve(Router::new().route("/xrpc/com.atproto.sync.listHosts", get(list))).await;
    let mut progress = Vec::new();
    let relay = Url::parse(&format!("http://127.0.0.1:{port}")).unwrap();
    let hosts = pull_hosts(&relay, |so_far| progress.push(so_far))
        .await
        .unwrap();
    assert_eq!((hosts.len(), progress), (5, vec![2, 4, 5]));
    assert_eq!(
        (
            hosts[4].hostname.as_str(),
            hosts[4].seq,
            hosts[4].account_count
        ),
        ("pds4.example.com", Some(4), None)
    );
}

#[tokio::test]
async fn lists_that_do_not_end_or_are_none_are_errors() {
    let circle =
        async || Json(json!({"hosts": [{"hostname": "pds.example.com"}], "cursor": "again"}));
    let port = serve(Router::new().route("/xrpc/com.atproto.sync.listHosts", get(circle))).await;
    let relay = Url::parse(&format!("http://127.0.0.1:{port}")).unwrap();
    assert!(matches!(
        pull_hosts(&relay, |_| {}).await,
        Err(PullError::Endless(_))
    ));

    let port = serve(Router::new()).await;
    let relay = Url::parse(&format!("http://127.0.0.1:{port}")).unwrap();
    let error = pull_hosts(&relay, |_| {}).await.unwrap_err();
    assert!(
        matches!(error, PullError::Status { status, .. } if status == 404),
        "{error}"
    );
}
