//! The HTTP API over real sockets: every route with good and bad input. The store is real; the
//! relay at work is played by a recorder.

use atproto_relay::api::{
    self, AdminPassword, HostActivity, HostStanding, OperationError, Operations, Secret,
};
use atproto_relay::atproto::cid::{Cid, Codec};
use atproto_relay::atproto::did::Did;
use atproto_relay::atproto::tid::Tid;
use atproto_relay::dial::{Guard, HostName};
use atproto_relay::discovery::{CrawlError, Requester};
use atproto_relay::firehose::ConsumerInfo;
use atproto_relay::http::ServerOptions;
use atproto_relay::store::{
    AccountUpdate, Batch, HostId, HostStatus, LocalStatus, NewHost, RateOverrides, RepoState,
    Store, UpstreamStatus, Validation,
};
use atproto_relay::telemetry::{Finding, Health, Problem, ProblemName};
use axum::Router;
use futures_util::FutureExt as _;
use futures_util::future::BoxFuture;
use http::{Method, StatusCode};
use reqwest::header::HeaderMap;
use serde_json::{Value, json};
use std::sync::{Arc, Mutex};
use std::time::{Duration, UNIX_EPOCH};
use tokio_util::sync::CancellationToken;

const PASSWORD: &str = "a long password: with colon";

/// Plays the running relay: writes down what it is asked for, and does the part the store sees.
struct Recorder {
    store: Store,
    asked: Mutex<Vec<String>>,
    health: Mutex<Health>,
}

impl Recorder {
    fn note(&self, what: String) {
        self.asked.lock().unwrap().push(what);
    }

    async fn set_local(&self, did: Did, status: LocalStatus) -> Result<(), OperationError> {
        match self.store.account(&did).await? {
            None => Err(OperationError::UnknownAccount),
            Some(_) => Ok(self.store.set_local_status(&did, status).await.map(drop)?),
        }
    }
}

impl Operations for Recorder {
    fn request_crawl<'a>(
        &'a self,
        hostname: &'a str,
        requester: Requester,
    ) -> BoxFuture<'a, Result<(), CrawlError>> {
        self.note(format!("crawl {hostname} {requester:?}"));
        let result = HostName::parse(hostname, &Guard::new(false))
            .map_err(CrawlError::from)
            .and_then(|host| match host.name() {
                "banned.example.com" => Err(CrawlError::Banned(host)),
                "relay.example.com" => Err(CrawlError::IsRelay(host)),
                "down.example.com" => Err(CrawlError::NotAPds {
                    host,
                    reason: "connection refused".to_owned(),
                }),
                "late.example.com" => Err(CrawlError::RateLimited),
                "closed.example.com" => Err(CrawlError::Closed),
                "broken.example.com" => Err(CrawlError::Store("secret detail".to_owned())),
                _ => Ok(()),
            });
        async { result }.boxed()
    }

    fn ban_host(&self, host: HostId) -> BoxFuture<'_, Result<(), OperationError>> {
        async move { Ok(self.store.set_host_status(host, HostStatus::Banned).await?) }.boxed()
    }

    fn unban_host(&self, host: HostId) -> BoxFuture<'_, Result<(), OperationError>> {
        async move { Ok(self.store.set_host_status(host, HostStatus::Active).await?) }.boxed()
    }

    fn set_account_limit(
        &self,
        host: HostId,
        limit: i64,
    ) -> BoxFuture<'_, Result<(), OperationError>> {
        async move { Ok(self.store.set_account_limit(host, limit).await.map(drop)?) }.boxed()
    }

    fn set_rates(
        &self,
        host: HostId,
        rates: RateOverrides,
    ) -> BoxFuture<'_, Result<(), OperationError>> {
        async move { Ok(self.store.set_host_rates(host, rates).await?) }.boxed()
    }

    fn set_validation(
        &self,
        host: HostId,
        mode: Option<Validation>,
    ) -> BoxFuture<'_, Result<(), OperationError>> {
        async move { Ok(self.store.set_host_validation(host, mode).await?) }.boxed()
    }

    fn ban_domain<'a>(&'a self, domain: &'a str) -> BoxFuture<'a, Result<bool, OperationError>> {
        async move { Ok(self.store.ban_domain(domain).await?) }.boxed()
    }

    fn unban_domain<'a>(&'a self, domain: &'a str) -> BoxFuture<'a, Result<bool, OperationError>> {
        async move { Ok(self.store.unban_domain(domain).await?) }.boxed()
    }

    fn take_down(&self, did: Did) -> BoxFuture<'_, Result<(), OperationError>> {
        self.set_local(did, LocalStatus::TakenDown).boxed()
    }

    fn reverse_takedown(&self, did: Did) -> BoxFuture<'_, Result<(), OperationError>> {
        self.set_local(did, LocalStatus::Active).boxed()
    }

    fn activity(&self, host: HostId) -> Option<HostActivity> {
        (host == HostId(1)).then_some(HostActivity {
            connected: true,
            events: 42,
            per_second: 50.1,
            per_hour: 2_600.0,
            per_day: 21_000.0,
            bytes_per_hour: 210e6,
        })
    }

    fn standing(&self, _: HostId) -> Option<HostStanding> {
        None
    }

    fn consumers(&self) -> Vec<ConsumerInfo> {
        vec![ConsumerInfo {
            id: 7,
            remote_addr: "192.0.2.9".parse().unwrap(),
            user_agent: "reader/1".to_owned(),
            connected_at: UNIX_EPOCH + Duration::from_secs(1_709_210_096),
            events: 10,
            bytes: 5_000,
            position: 11,
        }]
    }

    fn health(&self) -> Arc<Health> {
        Arc::new(self.health.lock().unwrap().clone())
    }
}

/// A served API on a database of its own.
struct Served {
    url: String,
    store: Store,
    recorder: Arc<Recorder>,
    client: reqwest::Client,
    _folder: tempfile::TempDir,
}

struct Answer {
    status: StatusCode,
    headers: HeaderMap,
    text: String,
}

impl Answer {
    fn json(&self) -> Value {
        serde_json::from_str(&self.text).unwrap_or_else(|_| panic!("{} is JSON", self.text))
    }
}

async fn serve(admin_password: Option<&str>) -> Served {
    let folder = tempfile::tempdir().unwrap();
    let store = Store::open(&format!(
        "sqlite:{}",
        folder.path().join("relay.db").display()
    ))
    .await
    .unwrap();
    let recorder = Arc::new(Recorder {
        store: store.clone(),
        asked: Mutex::default(),
        health: Mutex::default(),
    });
    let state = api::State {
        store: store.clone(),
        operations: recorder.clone(),
        admin_password: AdminPassword::new(admin_password.map(Secret::new)),
    };
    let firehose = Router::new().route(
        "/xrpc/com.atproto.sync.subscribeRepos",
        axum::routing::any(async || "firehose"),
    );
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    let router = api::router(state, firehose);
    let (options, closing) = (ServerOptions::default(), CancellationToken::new());
    tokio::spawn(atproto_relay::http::serve(
        listener, router, options, closing,
    ));
    let client = atproto_relay::dial::plain_client_builder()
        .redirect(reqwest::redirect::Policy::none())
        .build()
        .unwrap();
    Served {
        url,
        store,
        recorder,
        client,
        _folder: folder,
    }
}

impl Served {
    /// Sends a request, and checks what every answer must have.
    async fn send(&self, request: reqwest::RequestBuilder) -> Answer {
        let response = request.send().await.expect("the API answers");
        let (status, headers) = (response.status(), response.headers().clone());
        let server = headers
            .get("server")
            .map(|value| value.to_str().unwrap().to_owned())
            .unwrap_or_default();
        assert!(
            server.starts_with("atproto-relay/") && server.ends_with(" (atproto-relay)"),
            "{server}"
        );
        let answer = Answer {
            status,
            headers,
            text: response.text().await.unwrap(),
        };
        if status.is_client_error() || status.is_server_error() {
            let body = answer.json();
            if body.get("status").is_none() {
                assert!(
                    body["error"].is_string() && body["message"].is_string(),
                    "{body}"
                );
                assert_eq!(body.as_object().unwrap().len(), 2, "{body}");
            }
        }
        answer
    }

    async fn get(&self, path: &str) -> Answer {
        self.send(self.client.get(format!("{}{path}", self.url)))
            .await
    }

    async fn post(&self, path: &str, body: Value) -> Answer {
        self.send(self.client.post(format!("{}{path}", self.url)).json(&body))
            .await
    }

    async fn admin_get(&self, path: &str) -> Answer {
        self.send(
            self.client
                .get(format!("{}{path}", self.url))
                .basic_auth("admin", Some(PASSWORD)),
        )
        .await
    }

    async fn admin_post(&self, path: &str, body: Value) -> Answer {
        let request = self
            .client
            .post(format!("{}{path}", self.url))
            .basic_auth("admin", Some(PASSWORD));
        self.send(request.json(&body)).await
    }

    async fn add_host(&self, name: &str, tls: bool) -> HostId {
        self.store
            .add_host(&NewHost::new(name, tls, false))
            .await
            .unwrap()
            .id
    }

    async fn add_account(
        &self,
        n: u8,
        host: HostId,
        change: impl FnOnce(&mut AccountUpdate),
    ) -> Did {
        let mut update = AccountUpdate {
            host: Some(host),
            repo: Some(repo(n)),
            ..AccountUpdate::new(did(n))
        };
        change(&mut update);
        self.store
            .apply(&Batch {
                accounts: vec![update],
                ..Batch::default()
            })
            .await
            .unwrap();
        did(n)
    }

    async fn set_cursor(&self, host: HostId, cursor: i64) {
        self.store
            .apply(&Batch {
                cursors: vec![(host, cursor)],
                ..Batch::default()
            })
            .await
            .unwrap();
    }

    fn asked(&self) -> Vec<String> {
        std::mem::take(&mut self.recorder.asked.lock().unwrap())
    }
}

fn did(n: u8) -> Did {
    Did::parse(&format!("did:web:account{n}.example.com")).unwrap()
}

fn repo(n: u8) -> RepoState {
    RepoState {
        rev: Tid::from_micros(1_700_000_000_000_000 + u64::from(n), 0),
        data: Cid::of(Codec::DagCbor, &[n]),
        commit: Cid::of(Codec::DagCbor, &[n, n]),
        desynchronized: false,
    }
}

fn error_name(answer: &Answer) -> (u16, String) {
    (
        answer.status.as_u16(),
        answer.json()["error"].as_str().unwrap().to_owned(),
    )
}

#[tokio::test]
async fn hosts_are_listed_in_pages() {
    let api = serve(None).await;
    assert_eq!(
        api.get("/xrpc/com.atproto.sync.listHosts").await.json(),
        json!({"hosts": []})
    );
    let mut expected = Vec::new();
    for n in 0..5_i64 {
        let host = api.add_host(&format!("pds{n}.example.com"), true).await;
        if n == 2 {
            continue; // never sent an event: not listed
        }
        api.set_cursor(host, 100 + n).await;
        expected.push(json!({
            "hostname": format!("pds{n}.example.com"), "seq": 100 + n, "accountCount": 0, "status": "active",
        }));
    }
    let all = api.get("/xrpc/com.atproto.sync.listHosts").await.json();
    assert_eq!(all, json!({"hosts": expected}));
    let mut seen = Vec::new();
    let mut path = "/xrpc/com.atproto.sync.listHosts?limit=2".to_owned();
    for _ in 0..2 {
        let page = api.get(&path).await.json();
        seen.extend(page["hosts"].as_array().unwrap().clone());
        let Some(cursor) = page["cursor"].as_str() else {
            break;
        };
        path = format!("/xrpc/com.atproto.sync.listHosts?limit=2&cursor={cursor}");
    }
    assert_eq!(seen, expected);
    // The last page has no cursor, although it is full.
    assert_eq!(api.get(&path).await.json().get("cursor"), None);
}

#[tokio::test]
async fn a_host_tells_its_status() {
    let api = serve(None).await;
    let host = api.add_host("pds.example.com", true).await;
    api.add_account(1, host, |_| {}).await;
    let path = "/xrpc/com.atproto.sync.getHostStatus?hostname=";
    let unseen = api.get(&format!("{path}pds.example.com")).await.json();
    assert_eq!(
        unseen,
        json!({"hostname": "pds.example.com", "accountCount": 1, "status": "active"})
    );
    api.set_cursor(host, 9).await;
    api.store
        .set_host_status(host, HostStatus::Offline)
        .await
        .unwrap();
    let expected =
        json!({"hostname": "pds.example.com", "seq": 9, "accountCount": 1, "status": "offline"});
    for spelling in [
        "pds.example.com",
        "PDS.Example.COM",
        "https%3A%2F%2Fpds.example.com",
    ] {
        assert_eq!(
            api.get(&format!("{path}{spelling}")).await.json(),
            expected,
            "{spelling}"
        );
    }
    let unknown = api.get(&format!("{path}other.example.com")).await;
    assert_eq!(error_name(&unknown), (404, "HostNotFound".to_owned()));
    let long = "a".repeat(2_000);
    for bad in [
        "",
        "%00",
        "a%20b",
        "https%3A%2F%2Fpds.example.com%2Fpath",
        &long,
    ] {
        let answer = api.get(&format!("{path}{bad}")).await;
        assert_eq!(
            error_name(&answer),
            (400, "InvalidRequest".to_owned()),
            "{bad}"
        );
    }
}

#[tokio::test]
async fn repos_are_listed_with_their_status() {
    let api = serve(None).await;
    assert_eq!(
        api.get("/xrpc/com.atproto.sync.listRepos").await.json(),
        json!({"repos": []})
    );
    let host = api.add_host("pds.example.com", true).await;
    api.add_account(1, host, |_| {}).await;
    api.add_account(2, host, |update| update.repo = None).await;
    api.add_account(3, host, |update| {
        update.upstream = Some(UpstreamStatus::Deactivated)
    })
    .await;
    api.add_account(4, host, |update| {
        update.local = Some(LocalStatus::Throttled)
    })
    .await;
    api.add_account(5, host, |update| {
        update.upstream = Some(UpstreamStatus::Inactive)
    })
    .await;
    let entry = |n: u8, status: Value| {
        let mut entry = json!({
            "did": did(n).as_str(),
            "head": repo(n).commit.to_string(),
            "rev": repo(n).rev.to_string(),
            "active": n == 1,
        });
        if !status.is_null() {
            entry["status"] = status;
        }
        entry
    };
    let expected = [
        entry(1, Value::Null),
        entry(3, json!("deactivated")),
        entry(4, json!("throttled")),
        entry(5, Value::Null),
    ];
    assert_eq!(
        api.get("/xrpc/com.atproto.sync.listRepos").await.json(),
        json!({"repos": expected})
    );
    let first = api
        .get("/xrpc/com.atproto.sync.listRepos?limit=3")
        .await
        .json();
    assert_eq!(first["repos"], json!(expected[..3]));
    let cursor = first["cursor"].as_str().unwrap();
    let second = api
        .get(&format!(
            "/xrpc/com.atproto.sync.listRepos?limit=1&cursor={cursor}"
        ))
        .await
        .json();
    assert_eq!(second, json!({"repos": expected[3..]}));
}

#[tokio::test]
async fn bad_page_parameters_are_refused() {
    let api = serve(None).await;
    for method in ["listHosts", "listRepos"] {
        for query in [
            "limit=0",
            "limit=1001",
            "limit=99999999999999999999",
            "limit=-1",
            "limit=ten",
            "limit=",
            "limit=1.5",
            "cursor=x",
            "cursor=-1",
            "cursor=99999999999999999999",
        ] {
            let answer = api
                .get(&format!("/xrpc/com.atproto.sync.{method}?{query}"))
                .await;
            assert_eq!(
                error_name(&answer),
                (400, "InvalidRequest".to_owned()),
                "{method}?{query}"
            );
        }
        for query in [
            "limit=1",
            "limit=1000",
            "cursor=",
            "cursor=5",
            "unknown=1",
            "limit=2&limit=0",
        ] {
            let answer = api
                .get(&format!("/xrpc/com.atproto.sync.{method}?{query}"))
                .await;
            assert_eq!(answer.status, StatusCode::OK, "{method}?{query}");
        }
    }
}

#[tokio::test]
async fn accounts_tell_status_and_latest_commit() {
    let api = serve(None).await;
    let host = api.add_host("pds.example.com", true).await;
    api.add_account(1, host, |_| {}).await;
    let upstream = |status| move |update: &mut AccountUpdate| update.upstream = Some(status);
    let local = |status| move |update: &mut AccountUpdate| update.local = Some(status);
    api.add_account(2, host, |update| update.repo = None).await;
    api.add_account(3, host, upstream(UpstreamStatus::Deactivated))
        .await;
    api.add_account(4, host, upstream(UpstreamStatus::Deleted))
        .await;
    api.add_account(5, host, upstream(UpstreamStatus::Suspended))
        .await;
    api.add_account(6, host, upstream(UpstreamStatus::Takendown))
        .await;
    api.add_account(7, host, upstream(UpstreamStatus::Other("asleep".into())))
        .await;
    api.add_account(8, host, local(LocalStatus::TakenDown))
        .await;
    api.add_account(9, host, local(LocalStatus::Throttled))
        .await;
    api.add_account(10, host, upstream(UpstreamStatus::Inactive))
        .await;

    let rev = |n: u8| json!(repo(n).rev.to_string());
    let statuses = [
        (1, json!({"active": true, "rev": rev(1)})),
        (2, json!({"active": true})),
        (3, json!({"active": false, "status": "deactivated"})),
        (4, json!({"active": false, "status": "deleted"})),
        (5, json!({"active": false, "status": "suspended"})),
        (6, json!({"active": false, "status": "takendown"})),
        (7, json!({"active": false, "status": "asleep"})),
        (8, json!({"active": false, "status": "takendown"})),
        (9, json!({"active": false, "status": "throttled"})),
        (10, json!({"active": false})),
    ];
    for (n, mut expected) in statuses {
        expected["did"] = json!(did(n).as_str());
        let answer = api
            .get(&format!(
                "/xrpc/com.atproto.sync.getRepoStatus?did={}",
                did(n)
            ))
            .await;
        assert_eq!((answer.status, answer.json()), (StatusCode::OK, expected));
    }

    let latest = api
        .get(&format!(
            "/xrpc/com.atproto.sync.getLatestCommit?did={}",
            did(1)
        ))
        .await
        .json();
    assert_eq!(
        latest,
        json!({"cid": repo(1).commit.to_string(), "rev": rev(1)})
    );
    let refusals = [
        (2, 404, "RepoNotFound"),
        (3, 403, "RepoDeactivated"),
        (4, 404, "RepoNotFound"),
        (5, 403, "RepoSuspended"),
        (6, 403, "RepoTakendown"),
        (7, 403, "RepoInactive"),
        (8, 403, "RepoTakendown"),
        (9, 403, "RepoInactive"),
        (10, 403, "RepoInactive"),
        (99, 404, "RepoNotFound"),
    ];
    for (n, status, name) in refusals {
        let answer = api
            .get(&format!(
                "/xrpc/com.atproto.sync.getLatestCommit?did={}",
                did(n)
            ))
            .await;
        assert_eq!(
            error_name(&answer),
            (status, name.to_owned()),
            "account {n}"
        );
        if n != 2 {
            let answer = api
                .get(&format!("/xrpc/com.atproto.sync.getRepo?did={}", did(n)))
                .await;
            assert_eq!(
                error_name(&answer),
                (status, name.to_owned()),
                "account {n}"
            );
        }
    }
    let unknown = api
        .get(&format!(
            "/xrpc/com.atproto.sync.getRepoStatus?did={}",
            did(99)
        ))
        .await;
    assert_eq!(error_name(&unknown), (404, "RepoNotFound".to_owned()));
}

#[tokio::test]
async fn an_account_is_found_in_every_spelling_of_its_did() {
    let api = serve(None).await;
    let host = api.add_host("pds.example.com", true).await;
    api.add_account(1, host, |_| {}).await;
    for spelling in [
        "did:web:account1.example.com",
        "did:web:Account1.EXAMPLE.com",
        "did%3Aweb%3Aaccount1.example.com",
    ] {
        let answer = api
            .get(&format!(
                "/xrpc/com.atproto.sync.getRepoStatus?did={spelling}"
            ))
            .await;
        assert_eq!(answer.json()["did"], json!(did(1).as_str()), "{spelling}");
    }
    let long = format!("did:web:{}", "a".repeat(3_000));
    for method in ["getRepoStatus", "getLatestCommit", "getRepo"] {
        for query in [
            "",
            "?",
            "?did=",
            "?did=handle.example.com",
            "?did=did:plc:",
            "?did=did:x:%00",
            &format!("?did={long}"),
        ] {
            let answer = api
                .get(&format!("/xrpc/com.atproto.sync.{method}{query}"))
                .await;
            assert_eq!(
                error_name(&answer),
                (400, "InvalidRequest".to_owned()),
                "{method}{query}"
            );
        }
    }
}

#[tokio::test]
async fn a_repo_is_fetched_from_its_pds() {
    let api = serve(None).await;
    let pds = api.add_host("pds.example.com", true).await;
    let local = api.add_host("localhost:2583", false).await;
    api.add_account(1, pds, |_| {}).await;
    api.add_account(2, local, |update| update.repo = None).await;
    let since = repo(1).rev;
    let cases = [
        (
            format!("did={}", did(1)),
            "https://pds.example.com/xrpc/com.atproto.sync.getRepo?did=did%3Aweb%3Aaccount1.example.com".to_owned(),
        ),
        (
            format!("did={}&since={since}&evil=%0d%0a", did(1)),
            format!(
                "https://pds.example.com/xrpc/com.atproto.sync.getRepo?did=did%3Aweb%3Aaccount1.example.com&since={since}"
            ),
        ),
        (
            format!("did={}&since=", did(2)),
            "http://localhost:2583/xrpc/com.atproto.sync.getRepo?did=did%3Aweb%3Aaccount2.example.com".to_owned(),
        ),
    ];
    for (query, expected) in cases {
        let answer = api
            .get(&format!("/xrpc/com.atproto.sync.getRepo?{query}"))
            .await;
        assert_eq!(answer.status, StatusCode::FOUND, "{query}");
        assert_eq!(answer.headers["location"], expected);
        assert_eq!(answer.headers["access-control-allow-origin"], "*");
    }
    let answer = api
        .get(&format!(
            "/xrpc/com.atproto.sync.getRepo?did={}&since=yesterday",
            did(1)
        ))
        .await;
    assert_eq!(error_name(&answer), (400, "InvalidRequest".to_owned()));
}

#[tokio::test]
async fn a_crawl_is_requested() {
    let api = serve(None).await;
    let path = "/xrpc/com.atproto.sync.requestCrawl";
    let answer = api.post(path, json!({"hostname": "pds.example.com"})).await;
    assert_eq!((answer.status, answer.text.as_str()), (StatusCode::OK, ""));
    assert_eq!(api.asked(), ["crawl pds.example.com Public(127.0.0.1)"]);
    let cases = [
        ("banned.example.com", 403, "HostBanned"),
        ("relay.example.com", 400, "InvalidRequest"),
        ("down.example.com", 400, "HostNotFound"),
        ("late.example.com", 429, "RateLimitExceeded"),
        ("closed.example.com", 403, "Forbidden"),
        ("broken.example.com", 500, "InternalServerError"),
        ("192.0.2.1", 400, "InvalidRequest"),
        ("not a host", 400, "InvalidRequest"),
        ("", 400, "InvalidRequest"),
    ];
    for (hostname, status, name) in cases {
        let answer = api.post(path, json!({"hostname": hostname})).await;
        assert_eq!(error_name(&answer), (status, name.to_owned()), "{hostname}");
        assert!(!answer.text.contains("secret detail"));
        // What only this machine can find out of a name.
        assert!(!answer.text.contains("connection refused"));
    }
    api.asked();

    let post = |content_type: &'static str, body: String| {
        let request = api
            .client
            .post(format!("{}{path}", api.url))
            .header("content-type", content_type)
            .body(body);
        api.send(request)
    };
    let good = r#"{"hostname":"pds.example.com"}"#;
    assert_eq!(
        post("application/json; charset=utf-8", good.to_owned())
            .await
            .status,
        StatusCode::OK
    );
    api.asked();
    for (content_type, body) in [
        ("text/plain", good),
        ("application/json", ""),
        ("application/json", "{}"),
        ("application/json", "[]"),
        ("application/json", "null"),
        ("application/json", r#"{"hostname":7}"#),
        ("application/json", r#"{"hostname":"a.example.com""#),
        ("application/json", "{\"hostname\":\"\u{0}\""),
    ] {
        let answer = post(content_type, body.to_owned()).await;
        assert_eq!(
            error_name(&answer),
            (400, "InvalidRequest".to_owned()),
            "{content_type} {body}"
        );
    }
    let bare = api
        .send(api.client.post(format!("{}{path}", api.url)))
        .await;
    assert_eq!(error_name(&bare), (400, "InvalidRequest".to_owned()));
    let huge = post(
        "application/json",
        format!(r#"{{"hostname":"{}"}}"#, "a".repeat(100_000)),
    )
    .await;
    assert_eq!(error_name(&huge), (413, "PayloadTooLarge".to_owned()));
    assert_eq!(api.asked(), Vec::<String>::new());
}

#[tokio::test]
async fn unknown_methods_and_wrong_verbs_are_told_apart() {
    let api = serve(Some(PASSWORD)).await;
    for path in [
        "/xrpc/com.atproto.sync.listBlobs",
        "/xrpc/com.atproto.sync.listReposByCollection",
        "/xrpc/x",
        "/xrpc/a/b",
    ] {
        for method in [Method::GET, Method::POST, Method::DELETE] {
            let answer = api
                .send(api.client.request(method, format!("{}{path}", api.url)))
                .await;
            assert_eq!(
                error_name(&answer),
                (501, "MethodNotImplemented".to_owned()),
                "{path}"
            );
            assert_eq!(answer.headers["access-control-allow-origin"], "*");
        }
    }
    for path in ["/nothing", "/xrpc", "/favicon.ico", "/admin"] {
        assert_eq!(
            error_name(&api.get(path).await),
            (404, "NotFound".to_owned()),
            "{path}"
        );
    }
    for method in [
        "listHosts",
        "getHostStatus",
        "listRepos",
        "getRepoStatus",
        "getLatestCommit",
        "getRepo",
    ] {
        let url = format!("{}/xrpc/com.atproto.sync.{method}", api.url);
        for verb in [Method::POST, Method::PUT, Method::DELETE] {
            let answer = api.send(api.client.request(verb, &url)).await;
            assert_eq!(
                error_name(&answer),
                (405, "InvalidRequest".to_owned()),
                "{method}"
            );
            assert_eq!(answer.headers["allow"], "GET, HEAD");
        }
    }
    let answer = api.get("/xrpc/com.atproto.sync.requestCrawl").await;
    assert_eq!(error_name(&answer), (405, "InvalidRequest".to_owned()));
    assert_eq!(answer.headers["allow"], "POST");
    let answer = api.send(api.client.post(format!("{}/", api.url))).await;
    assert_eq!(error_name(&answer), (405, "InvalidRequest".to_owned()));
    let head = api
        .client
        .head(format!("{}/xrpc/com.atproto.sync.listHosts", api.url))
        .send()
        .await
        .unwrap();
    assert_eq!(head.status(), StatusCode::OK);
    assert_eq!(
        api.get("/xrpc/com.atproto.sync.subscribeRepos").await.text,
        "firehose"
    );
}

#[tokio::test]
async fn pages_of_any_origin_may_read_the_public_methods() {
    let api = serve(Some(PASSWORD)).await;
    let ask = |path: &str| {
        api.client
            .request(Method::OPTIONS, format!("{}{path}", api.url))
            .header("origin", "https://app.example.com")
            .header("access-control-request-method", "POST")
            .header("access-control-request-headers", "content-type")
    };
    let answer = api.send(ask("/xrpc/com.atproto.sync.requestCrawl")).await;
    assert_eq!(answer.status, StatusCode::NO_CONTENT);
    assert_eq!(answer.headers["access-control-allow-origin"], "*");
    assert_eq!(answer.headers["access-control-allow-headers"], "*");
    assert!(
        answer.headers["access-control-allow-methods"]
            .to_str()
            .unwrap()
            .contains("POST")
    );
    for path in [
        "/xrpc/_health",
        "/xrpc/com.atproto.sync.listHosts",
        "/xrpc/com.atproto.sync.getRepoStatus?did=x",
    ] {
        assert_eq!(
            api.get(path).await.headers["access-control-allow-origin"],
            "*",
            "{path}"
        );
    }
    for path in ["/admin/pds/list", "/"] {
        assert_eq!(
            api.get(path)
                .await
                .headers
                .get("access-control-allow-origin"),
            None,
            "{path}"
        );
    }
    assert_eq!(
        api.send(ask("/admin/pds/list")).await.status,
        StatusCode::UNAUTHORIZED
    );
}

#[tokio::test]
async fn health_and_home() {
    let api = serve(None).await;
    let home = api.get("/").await;
    assert_eq!(home.headers["content-type"], "text/plain; charset=utf-8");
    assert!(home.text.contains("/xrpc/com.atproto.sync.subscribeRepos"));
    for path in ["/_health", "/xrpc/_health"] {
        let answer = api.get(path).await;
        assert_eq!(answer.status, StatusCode::OK);
        assert_eq!(
            answer.json(),
            json!({"status": "ok", "version": env!("CARGO_PKG_VERSION"), "problems": []})
        );
    }
    let has = |name, message: &str| {
        let problem = Problem {
            name,
            since: UNIX_EPOCH,
            finding: Finding::because(message, "10.0.0.7 refuses"),
        };
        api.recorder.health.lock().unwrap().problems = vec![problem];
    };
    has(ProblemName::Log, "the disk of the log is full");
    let answer = api.get("/_health").await;
    assert_eq!(answer.status, StatusCode::SERVICE_UNAVAILABLE);
    assert_eq!(answer.json()["msg"], "the disk of the log is full");
    assert_eq!(answer.json()["status"], "error");
    has(ProblemName::Database, "can't connect to database");
    let answer = api.get("/xrpc/_health").await;
    assert_eq!(answer.status, StatusCode::SERVICE_UNAVAILABLE);
    assert_eq!(answer.json()["msg"], "can't connect to database");
    // Where the relay serves all the same, a load balancer has no reason to leave it.
    has(ProblemName::NoHosts, "there are none");
    let answer = api.get("/xrpc/_health").await;
    assert_eq!(answer.status, StatusCode::OK);
    let body = answer.json();
    assert_eq!(body["status"], "degraded");
    let problem = &body["problems"][0];
    assert_eq!(problem["name"], "no_hosts");
    assert_eq!(problem["since"], "1970-01-01T00:00:00.000Z");
    assert_eq!(problem["message"], "there are none");
    assert!(problem["what_to_do"].as_str().unwrap().contains("--host"));
    // What is behind the relay is nobody's business but the operator's.
    assert!(!answer.text.contains("10.0.0.7"), "{}", answer.text);
    api.store.close().await;
    // Without a database, XRPC says that it is our fault, and nothing about what is behind.
    let answer = api.get("/xrpc/com.atproto.sync.listHosts").await;
    assert_eq!(error_name(&answer), (500, "InternalServerError".to_owned()));
    assert!(
        !answer.text.contains("pool") && !answer.text.contains("listing"),
        "{}",
        answer.text
    );
}

/// Every admin route, with the verb it takes.
const ADMIN_ROUTES: [(&str, &str); 12] = [
    ("GET", "/admin/pds/list"),
    ("POST", "/admin/pds/requestCrawl"),
    ("POST", "/admin/pds/block"),
    ("POST", "/admin/pds/unblock"),
    ("POST", "/admin/pds/changeLimits"),
    ("POST", "/admin/repo/takeDown"),
    ("POST", "/admin/repo/reverseTakedown"),
    ("GET", "/admin/repo/takedowns"),
    ("GET", "/admin/subs/listDomainBans"),
    ("POST", "/admin/subs/banDomain"),
    ("POST", "/admin/subs/unbanDomain"),
    ("GET", "/admin/consumers/list"),
];

#[tokio::test]
async fn without_a_password_there_is_no_admin_api() {
    let api = serve(None).await;
    for (verb, path) in ADMIN_ROUTES {
        for verb in [verb, "GET", "DELETE"] {
            let request = api
                .client
                .request(verb.parse().unwrap(), format!("{}{path}", api.url));
            let answer = api.send(request.basic_auth("admin", Some(""))).await;
            assert_eq!(
                error_name(&answer),
                (404, "NotFound".to_owned()),
                "{verb} {path}"
            );
        }
    }
}

#[tokio::test]
async fn the_admin_api_wants_the_password() {
    let api = serve(Some(PASSWORD)).await;
    for (verb, path) in ADMIN_ROUTES
        .into_iter()
        .chain([("GET", "/admin/no/such"), ("DELETE", "/admin/pds/list")])
    {
        for credentials in [
            None,
            Some(("admin", "")),
            Some(("admin", "wrong")),
            Some(("root", PASSWORD)),
            Some(("", PASSWORD)),
        ] {
            let mut request = api
                .client
                .request(verb.parse().unwrap(), format!("{}{path}", api.url));
            if let Some((user, password)) = credentials {
                request = request.basic_auth(user, Some(password));
            }
            let answer = api
                .send(request.json(&json!({"did": did(1).as_str()})))
                .await;
            assert_eq!(
                error_name(&answer),
                (401, "AuthenticationRequired".to_owned()),
                "{verb} {path} {credentials:?}"
            );
            assert!(
                answer.headers["www-authenticate"]
                    .to_str()
                    .unwrap()
                    .starts_with("Basic ")
            );
        }
    }
    assert_eq!(api.asked(), Vec::<String>::new());
    assert_eq!(
        error_name(&api.admin_get("/admin/no/such").await),
        (404, "NotFound".to_owned())
    );
    for (verb, path) in ADMIN_ROUTES {
        let answer = match verb {
            "GET" => api.admin_post(path, json!({})).await,
            _ => api.admin_get(path).await,
        };
        assert_eq!(
            error_name(&answer),
            (405, "InvalidRequest".to_owned()),
            "{path}"
        );
    }
}

#[tokio::test]
async fn the_operator_sees_and_bans_hosts() {
    let api = serve(Some(PASSWORD)).await;
    assert_eq!(api.admin_get("/admin/pds/list").await.json(), json!([]));
    let first = api.add_host("pds.example.com", true).await;
    api.add_host("localhost:2583", false).await;
    api.set_cursor(first, 77).await;
    api.add_account(1, first, |_| {}).await;
    let hosts = api.admin_get("/admin/pds/list").await.json();
    let created = hosts[0]["CreatedAt"].as_str().unwrap().to_owned();
    assert!(created.ends_with('Z') && created.len() == 24, "{created}");
    assert_eq!(
        hosts[0],
        json!({
            "ID": 1, "CreatedAt": created, "Host": "pds.example.com", "SSL": true, "Cursor": 77,
            "Registered": true, "Blocked": false, "Status": "active", "Trusted": false, "Validation": null,
            "RepoCount": 1, "RepoLimit": 100, "UserCount": 1,
            "HasActiveConnection": true, "EventsSeenSinceStartup": 42,
            "PerSecondEventRate": {"Max": 50.1, "Window": 1.0},
            "PerHourEventRate": {"Max": 2600.0, "Window": 3600.0},
            "PerDayEventRate": {"Max": 21000.0, "Window": 86400.0},
            "PerHourByteRate": {"Max": 210e6, "Window": 3600.0},
        })
    );
    let second = &hosts[1];
    assert_eq!(
        (&second["Cursor"], &second["SSL"]),
        (&json!(-1), &json!(false))
    );
    assert_eq!(
        (
            &second["HasActiveConnection"],
            &second["PerDayEventRate"]["Max"]
        ),
        (&json!(false), &json!(-1.0))
    );

    for (route, blocked) in [("block", true), ("block", true), ("unblock", false)] {
        let answer = api
            .admin_post(
                &format!("/admin/pds/{route}?host=PDS.example.com"),
                json!(null),
            )
            .await;
        assert_eq!(
            (answer.status, answer.json()),
            (StatusCode::OK, json!({"success": "true"}))
        );
        assert_eq!(
            api.admin_get("/admin/pds/list").await.json()[0]["Blocked"],
            json!(blocked)
        );
    }
    for route in ["block", "unblock"] {
        let unknown = api
            .admin_post(
                &format!("/admin/pds/{route}?host=other.example.com"),
                json!(null),
            )
            .await;
        assert_eq!(error_name(&unknown), (404, "HostNotFound".to_owned()));
        for bad in ["", "?host=", "?host=a%20b"] {
            let answer = api
                .admin_post(&format!("/admin/pds/{route}{bad}"), json!(null))
                .await;
            assert_eq!(
                error_name(&answer),
                (400, "InvalidRequest".to_owned()),
                "{route}{bad}"
            );
        }
    }
    let answer = api
        .admin_post(
            "/admin/pds/requestCrawl",
            json!({"hostname": "new.example.com"}),
        )
        .await;
    assert_eq!(answer.json(), json!({"success": "true"}));
    assert_eq!(api.asked(), ["crawl new.example.com Operator"]);
    let answer = api
        .admin_post(
            "/admin/pds/requestCrawl",
            json!({"hostname": "banned.example.com"}),
        )
        .await;
    assert_eq!(error_name(&answer), (403, "HostBanned".to_owned()));
    let down = json!({"hostname": "down.example.com"});
    let answer = api.admin_post("/admin/pds/requestCrawl", down).await;
    assert_eq!(error_name(&answer), (400, "HostNotFound".to_owned()));
    assert!(answer.text.contains("connection refused"));
}

#[tokio::test]
async fn no_page_of_another_origin_acts_as_the_operator() {
    let api = serve(Some(PASSWORD)).await;
    let host = api.add_host("pds.example.com", true).await;
    api.add_account(1, host, |_| {}).await;
    let post = |path: &str, headers: &[(&'static str, &str)]| {
        // As a form of a page: a browser adds the credentials by itself.
        let mut request = api
            .client
            .post(format!("{}{path}?host=pds.example.com", api.url))
            .basic_auth("admin", Some(PASSWORD));
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        api.send(request)
    };
    let own = api.url.as_str();
    for (verb, path) in ADMIN_ROUTES {
        if verb == "GET" {
            continue;
        }
        for headers in [
            &[("origin", "https://evil.example")][..],
            &[("origin", "null")],
            &[("sec-fetch-site", "cross-site")],
            &[("sec-fetch-site", "same-site"), ("origin", own)],
            &[
                ("sec-fetch-site", "cross-site"),
                ("content-type", "application/json"),
            ],
            &[
                ("origin", "https://evil.example"),
                ("content-type", "application/x-www-form-urlencoded"),
            ],
        ] {
            let answer = post(path, headers).await;
            assert_eq!(
                error_name(&answer),
                (403, "Forbidden".to_owned()),
                "{path} {headers:?}"
            );
        }
    }
    let row = api.store.host(host).await.unwrap().unwrap();
    assert_eq!(row.status, HostStatus::Active);
    assert_eq!(api.asked(), Vec::<String>::new());
    // The relay's own page, and programs.
    for headers in [
        &[][..],
        &[("origin", own)],
        &[("sec-fetch-site", "same-origin")],
        &[("sec-fetch-site", "none")],
    ] {
        let answer = post("/admin/pds/block", headers).await;
        assert_eq!(answer.status, StatusCode::OK, "{headers:?}");
    }
    // Looking changes nothing.
    let list = api.client.get(format!("{own}/admin/pds/list"));
    let list = list.basic_auth("admin", Some(PASSWORD));
    let answer = api.send(list.header("sec-fetch-site", "cross-site")).await;
    assert_eq!(answer.status, StatusCode::OK);
}

#[tokio::test]
async fn a_field_that_is_written_wrong_is_named_and_nothing_is_done() {
    let api = serve(Some(PASSWORD)).await;
    let host = api.add_host("pds.example.com", true).await;
    api.add_account(1, host, |_| {}).await;
    let account = did(1);
    let cases = [
        (
            "pds/changeLimits",
            json!({"host": "pds.example.com", "per_second": 9, "repo_limti": 5}),
            "\"repo_limit\"",
        ),
        (
            "pds/requestCrawl",
            json!({"hostname": "pds.example.com", "resaon": "x"}),
            "\"reason\"",
        ),
        (
            "pds/block?host=pds.example.com",
            json!({"raeson": "spam"}),
            "\"reason\"",
        ),
        (
            "repo/takeDown",
            json!({"did": account.as_str(), "why": "spam"}),
            "known are did, reason",
        ),
        (
            "subs/banDomain",
            json!({"domain": "evil.example", "domian": "x"}),
            "\"domain\"",
        ),
    ];
    for (path, body, meant) in cases {
        let answer = api.admin_post(&format!("/admin/{path}"), body).await;
        assert_eq!(error_name(&answer), (400, "InvalidRequest".to_owned()));
        let message = answer.json()["message"].as_str().unwrap().to_owned();
        assert!(message.starts_with("unknown field "), "{message}");
        assert!(message.contains(meant), "{message}");
    }
    let long = json!({"did": account.as_str(), "reason": "x".repeat(1_001)});
    let answer = api.admin_post("/admin/repo/takeDown", long).await;
    assert_eq!(error_name(&answer), (400, "InvalidRequest".to_owned()));
    let row = api.store.host(host).await.unwrap().unwrap();
    assert_eq!(
        (row.rates.per_second, row.status),
        (None, HostStatus::Active)
    );
    assert_eq!(
        api.store.account(&account).await.unwrap().unwrap().local,
        LocalStatus::Active
    );
    assert!(api.store.domain_bans().await.unwrap().is_empty());
    assert_eq!(api.asked(), Vec::<String>::new());
    // The public method takes what a later lexicon may add.
    let later = json!({"hostname": "pds.example.com", "later": 1});
    let answer = api.post("/xrpc/com.atproto.sync.requestCrawl", later).await;
    assert_eq!(answer.status, StatusCode::OK);
}

#[tokio::test]
async fn the_operator_changes_limits() {
    let api = serve(Some(PASSWORD)).await;
    let host = api.add_host("pds.example.com", true).await;
    let row = async || api.store.host(host).await.unwrap().unwrap();
    let change = |mut fields: Value| {
        fields["host"] = json!("pds.example.com");
        api.admin_post("/admin/pds/changeLimits", fields)
    };
    assert_eq!(
        change(json!({"repo_limit": 5000})).await.json(),
        json!({"success": "true"})
    );
    assert_eq!(row().await.account_limit, 5_000);
    assert_eq!(
        change(json!({"per_second": 7, "per_day": 9, "validation": "lenient"}))
            .await
            .status,
        StatusCode::OK
    );
    let rates = |per_second, per_hour, per_day| RateOverrides {
        per_second,
        per_hour,
        per_day,
        bytes_per_hour: per_hour.map(|_| 10_000_000_000),
    };
    assert_eq!(
        (row().await.rates, row().await.validation),
        (rates(Some(7), None, Some(9)), Some(Validation::Lenient))
    );
    assert_eq!(
        change(json!({
            "per_second": null, "per_hour": 8, "bytes_per_hour": 10_000_000_000_u64, "validation": null
        }))
            .await
            .status,
        StatusCode::OK
    );
    assert_eq!(
        (row().await.rates, row().await.validation),
        (rates(None, Some(8), Some(9)), None)
    );
    assert_eq!(row().await.account_limit, 5_000);
    for bad in [
        json!({}),
        json!({"repo_limit": -1}),
        json!({"repo_limit": "many"}),
        json!({"per_second": -1}),
        json!({"per_hour": 1.5}),
        json!({"bytes_per_hour": -1}),
        json!({"validation": "trusting"}),
        json!({"account_limit_alerts_silenced": true}),
    ] {
        assert_eq!(
            error_name(&change(bad.clone()).await),
            (400, "InvalidRequest".to_owned()),
            "{bad}"
        );
    }
    let unknown = api
        .admin_post(
            "/admin/pds/changeLimits",
            json!({"host": "x.example.com", "repo_limit": 1}),
        )
        .await;
    assert_eq!(error_name(&unknown), (404, "HostNotFound".to_owned()));
    let nameless = api
        .admin_post("/admin/pds/changeLimits", json!({"repo_limit": 1}))
        .await;
    assert_eq!(error_name(&nameless), (400, "InvalidRequest".to_owned()));
}

#[tokio::test]
async fn the_operator_takes_accounts_down() {
    let api = serve(Some(PASSWORD)).await;
    let host = api.add_host("pds.example.com", true).await;
    for n in 1..=3 {
        api.add_account(n, host, |_| {}).await;
    }
    for n in [1, 3] {
        let answer = api
            .admin_post("/admin/repo/takeDown", json!({"did": did(n).as_str()}))
            .await;
        assert_eq!(
            (answer.status, answer.json()),
            (StatusCode::OK, json!({"success": "true"}))
        );
    }
    let list = api.admin_get("/admin/repo/takedowns").await.json();
    assert_eq!(list, json!({"dids": [did(1).as_str(), did(3).as_str()]}));
    let status = api
        .get(&format!(
            "/xrpc/com.atproto.sync.getRepoStatus?did={}",
            did(1)
        ))
        .await
        .json();
    assert_eq!(
        status,
        json!({"did": did(1).as_str(), "active": false, "status": "takendown"})
    );
    let answer = api
        .admin_post(
            "/admin/repo/reverseTakedown",
            json!({"did": did(1).as_str()}),
        )
        .await;
    assert_eq!(answer.status, StatusCode::OK);
    assert_eq!(
        api.admin_get("/admin/repo/takedowns").await.json(),
        json!({"dids": [did(3).as_str()]})
    );
    for route in ["takeDown", "reverseTakedown"] {
        let path = format!("/admin/repo/{route}");
        let unknown = api
            .admin_post(&path, json!({"did": did(99).as_str()}))
            .await;
        assert_eq!(error_name(&unknown), (404, "RepoNotFound".to_owned()));
        for bad in [
            json!({}),
            json!({"did": "x"}),
            json!({"did": null}),
            json!([]),
        ] {
            let answer = api.admin_post(&path, bad.clone()).await;
            assert_eq!(
                error_name(&answer),
                (400, "InvalidRequest".to_owned()),
                "{route} {bad}"
            );
        }
    }
    let answer = api.admin_get("/admin/repo/takedowns?cursor=x").await;
    assert_eq!(error_name(&answer), (400, "InvalidRequest".to_owned()));
}

#[tokio::test]
async fn the_operator_bans_domains() {
    let api = serve(Some(PASSWORD)).await;
    assert_eq!(
        api.admin_get("/admin/subs/listDomainBans").await.json(),
        json!({"banned_domains": []})
    );
    // The reference relay's tools write `Domain`.
    for body in [
        json!({"Domain": "Evil.example"}),
        json!({"domain": "*.spam.example."}),
        json!({"domain": "spam.example"}),
    ] {
        let answer = api.admin_post("/admin/subs/banDomain", body).await;
        assert_eq!(
            (answer.status, answer.json()),
            (StatusCode::OK, json!({"success": "true"}))
        );
    }
    let list = api.admin_get("/admin/subs/listDomainBans").await.json();
    assert_eq!(
        list,
        json!({"banned_domains": ["evil.example", "spam.example"]})
    );
    let answer = api
        .admin_post("/admin/subs/unbanDomain", json!({"Domain": "EVIL.example"}))
        .await;
    assert_eq!(answer.status, StatusCode::OK);
    assert_eq!(
        api.admin_get("/admin/subs/listDomainBans").await.json(),
        json!({"banned_domains": ["spam.example"]})
    );
    let long = "a.".repeat(200);
    for bad in [
        "",
        "*",
        ".",
        "a..b",
        "a b.com",
        "-a.com",
        "a_b.com",
        "https://a.com",
        &long,
    ] {
        for route in ["banDomain", "unbanDomain"] {
            let answer = api
                .admin_post(&format!("/admin/subs/{route}"), json!({"domain": bad}))
                .await;
            assert_eq!(
                error_name(&answer),
                (400, "InvalidRequest".to_owned()),
                "{route} {bad}"
            );
        }
    }
}

#[tokio::test]
async fn the_operator_sees_the_consumers() {
    let api = serve(Some(PASSWORD)).await;
    let list = api.admin_get("/admin/consumers/list").await.json();
    let expected = json!([{
        "id": 7, "remote_addr": "192.0.2.9", "user_agent": "reader/1", "events_consumed": 10,
        "connected_at": "2024-02-29T12:34:56.000Z", "bytes_sent": 5000, "cursor": 11,
    }]);
    assert_eq!(list, expected);
}
