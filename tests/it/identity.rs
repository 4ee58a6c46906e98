//! The resolver against a PLC directory and did:web hosts on real sockets.

use std::collections::HashMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use atproto_relay::atproto::did::Did;
use atproto_relay::clock::Clock;
use atproto_relay::dial::Guard;
use atproto_relay::identity::{
    Identity, Metrics, RepoStatusError, Requester, ResolveError, Resolver, Settings,
};
use axum::Router;
use axum::extract::{Path, Query, State};
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use serde_json::{Value, json};
use tokio::sync::Semaphore;
use url::Url;

const ALICE: &str = "did:plc:aaaaaaaaaaaaaaaaaaaaaaaa";
const BOB: &str = "did:plc:bbbbbbbbbbbbbbbbbbbbbbbb";
/// A P-256 key from the did:key test vectors.
const KEY: &str = "zDnaerx9CtbPJ1q36T5Ln5wYt3MQYeGRG5ehnPAmxcf5mDZpv";

/// A directory, and did:web and PDS host, whose answers the test sets.
#[derive(Clone)]
struct Server {
    answers: Arc<Mutex<HashMap<String, (StatusCode, String)>>>,
    requests: Arc<AtomicUsize>,
    /// One permit is used up by each request.
    gate: Arc<Semaphore>,
    port: u16,
}

impl Server {
    async fn start() -> Self {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let server = Self {
            answers: Arc::default(),
            requests: Arc::default(),
            gate: Arc::new(Semaphore::new(Semaphore::MAX_PERMITS)),
            port: listener.local_addr().unwrap().port(),
        };
        let router = Router::new()
            .route(
                "/.well-known/did.json",
                get(|state: State<Server>| answer(state, "did.json".to_owned())),
            )
            .route("/xrpc/com.atproto.sync.getRepoStatus", get(repo_status))
            .route(
                "/{did}",
                get(|state: State<Server>, Path(did): Path<String>| answer(state, did)),
            )
            .with_state(server.clone());
        tokio::spawn(async move { axum::serve(listener, router).await.unwrap() });
        server
    }

    fn set(&self, what: &str, status: StatusCode, body: impl ToString) {
        self.answers
            .lock()
            .unwrap()
            .insert(what.to_owned(), (status, body.to_string()));
    }

    fn set_document(&self, did: &str, pds: &str) {
        self.set(did, StatusCode::OK, document(did, pds));
    }

    fn requests(&self) -> usize {
        self.requests.load(Ordering::SeqCst)
    }

    fn settings(&self) -> Settings {
        Settings {
            plc_host: Url::parse(&format!("http://127.0.0.1:{}", self.port)).unwrap(),
            refresh_burst: 1,
            ..Settings::default()
        }
    }

    fn resolver(&self) -> Resolver {
        resolver(self.settings())
    }
}

fn resolver(settings: Settings) -> Resolver {
    Resolver::new(
        settings,
        Guard::new(true),
        Clock::default(),
        Metrics::default(),
    )
}

async fn answer(State(server): State<Server>, what: String) -> Response {
    server.requests.fetch_add(1, Ordering::SeqCst);
    server.gate.acquire().await.unwrap().forget();
    let answer = server.answers.lock().unwrap().get(&what).cloned();
    answer
        .unwrap_or((StatusCode::NOT_FOUND, "{}".to_owned()))
        .into_response()
}

async fn repo_status(
    state: State<Server>,
    Query(query): Query<HashMap<String, String>>,
) -> Response {
    answer(state, format!("status {}", query["did"])).await
}

fn document(did: &str, pds: &str) -> Value {
    json!({
        "@context": ["https://www.w3.org/ns/did/v1"],
        "id": did,
        "alsoKnownAs": ["at://alice.example.com"],
        "verificationMethod": [
            {"id": format!("{did}#atproto"), "type": "Multikey", "controller": did, "publicKeyMultibase": KEY}
        ],
        "service": [{"id": "#atproto_pds", "type": "AtprotoPersonalDataServer", "serviceEndpoint": pds}],
    })
}

fn did(text: &str) -> Did {
    Did::parse(text).unwrap()
}

/// A forced look-up, by one and the same requester.
async fn refresh(resolver: &Resolver) -> Result<Arc<Identity>, ResolveError> {
    let now = tokio::time::Instant::now();
    resolver.refresh(&did(ALICE), Requester(1), now).await
}

async fn until(what: &str, mut condition: impl FnMut() -> bool) {
    let waited = tokio::time::timeout(Duration::from_secs(10), async {
        while !condition() {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    });
    waited
        .await
        .unwrap_or_else(|_| panic!("not within 10 s: {what}"));
}

#[tokio::test]
async fn a_plc_identity_is_read_once_and_cached() {
    let server = Server::start().await;
    server.set_document(ALICE, "https://PDS.example.com/");
    let resolver = server.resolver();
    let identity = resolver.resolve(&did(ALICE)).await.unwrap();
    assert_eq!(identity.did, did(ALICE));
    assert_eq!(identity.pds.as_ref().unwrap().name(), "pds.example.com");
    assert_eq!(identity.signing_key.unwrap().to_multikey(), KEY);
    assert_eq!(identity.handles, ["alice.example.com"]);
    assert!(identity.resolved_at > 1_700_000_000);
    assert_eq!(resolver.resolve(&did(ALICE)).await.unwrap(), identity);
    assert_eq!(
        (server.requests(), resolver.cached(&did(ALICE))),
        (1, Some(identity))
    );
}

#[tokio::test]
async fn many_who_ask_at_once_cause_one_request() {
    let server = Server::start().await;
    server.gate.forget_permits(Semaphore::MAX_PERMITS);
    server.set_document(ALICE, "https://pds.example.com");
    let resolver = server.resolver();
    let asking: Vec<_> = (0..50)
        .map(|_| {
            let resolver = resolver.clone();
            tokio::spawn(async move { resolver.resolve(&did(ALICE)).await })
        })
        .collect();
    until("the request arrives", || server.requests() == 1).await;
    // Whoever asked first may go away: the others still get the answer.
    asking[0].abort();
    server.gate.add_permits(1);
    for task in asking.into_iter().skip(1) {
        assert!(task.await.unwrap().is_ok());
    }
    assert_eq!((server.requests(), resolver.sizes()), (1, (1, 0)));
}

#[tokio::test]
async fn absences_are_remembered_for_their_time() {
    let server = Server::start().await;
    server.set(BOB, StatusCode::GONE, "{}");
    let negative_ttl = Duration::from_millis(200);
    let resolver = resolver(Settings {
        negative_ttl,
        ..server.settings()
    });
    for _ in 0..3 {
        assert_eq!(
            resolver.resolve(&did(ALICE)).await,
            Err(ResolveError::NotFound)
        );
        assert_eq!(
            resolver.resolve(&did(BOB)).await,
            Err(ResolveError::Tombstoned)
        );
    }
    assert_eq!(server.requests(), 2);
    server.set_document(ALICE, "https://pds.example.com");
    let deadline = tokio::time::Instant::now() + Duration::from_secs(10);
    while resolver.resolve(&did(ALICE)).await.is_err() {
        assert!(
            tokio::time::Instant::now() < deadline,
            "the absence is never forgotten"
        );
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    assert_eq!(server.requests(), 3);
}

#[tokio::test]
async fn a_forced_refresh_reads_anew_but_not_too_often() {
    let server = Server::start().await;
    server.set_document(ALICE, "https://old.example.com");
    let resolver = server.resolver();
    let pds = |identity: &Identity| identity.pds.as_ref().unwrap().name().to_owned();
    assert_eq!(
        pds(&resolver.resolve(&did(ALICE)).await.unwrap()),
        "old.example.com"
    );
    server.set_document(ALICE, "https://new.example.com");
    assert_eq!(
        pds(&resolver.resolve(&did(ALICE)).await.unwrap()),
        "old.example.com"
    );
    assert_eq!(pds(&refresh(&resolver).await.unwrap()), "new.example.com");
    server.set_document(ALICE, "https://newer.example.com");
    for _ in 0..20 {
        assert_eq!(pds(&refresh(&resolver).await.unwrap()), "new.example.com");
    }
    assert_eq!(server.requests(), 2);
}

#[tokio::test]
async fn a_refresh_that_came_too_early_is_made_up_for() {
    let server = Server::start().await;
    server.set_document(ALICE, "https://one.example.com");
    let refresh_interval = Duration::from_millis(300);
    let resolver = resolver(Settings {
        refresh_interval,
        ..server.settings()
    });
    refresh(&resolver).await.unwrap();
    server.set_document(ALICE, "https://two.example.com");
    refresh(&resolver).await.unwrap();
    assert_eq!(server.requests(), 1);
    let deadline = tokio::time::Instant::now() + Duration::from_secs(10);
    while resolver
        .resolve(&did(ALICE))
        .await
        .unwrap()
        .pds
        .as_ref()
        .unwrap()
        .name()
        != "two.example.com"
    {
        assert!(
            tokio::time::Instant::now() < deadline,
            "the refresh is never made up for"
        );
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    assert_eq!(server.requests(), 2);
}

#[tokio::test]
async fn a_refresh_does_not_trust_a_look_up_that_began_before_it() {
    let server = Server::start().await;
    server.gate.forget_permits(Semaphore::MAX_PERMITS);
    server.set_document(ALICE, "https://old.example.com");
    let resolver = server.resolver();
    let first = tokio::spawn({
        let resolver = resolver.clone();
        async move { resolver.resolve(&did(ALICE)).await }
    });
    until("the look-up is under way", || server.requests() == 1).await;
    let second = tokio::spawn({
        let resolver = resolver.clone();
        async move { refresh(&resolver).await }
    });
    tokio::task::yield_now().await;
    server.gate.add_permits(2);
    first.await.unwrap().unwrap();
    second.await.unwrap().unwrap();
    assert_eq!(server.requests(), 2);
}

#[tokio::test]
async fn known_accounts_outlast_an_outage_of_the_directory() {
    let server = Server::start().await;
    server.set_document(ALICE, "https://pds.example.com");
    let resolver = resolver(Settings {
        ttl: Duration::ZERO,
        ..server.settings()
    });
    let identity = resolver.resolve(&did(ALICE)).await.unwrap();
    server.set(ALICE, StatusCode::BAD_GATEWAY, "");
    assert_eq!(resolver.resolve(&did(ALICE)).await, Ok(identity));
    assert!(matches!(
        refresh(&resolver).await,
        Err(ResolveError::Unavailable(_))
    ));
    server.set(BOB, StatusCode::INTERNAL_SERVER_ERROR, "");
    assert!(matches!(
        resolver.resolve(&did(BOB)).await,
        Err(ResolveError::Unavailable(_))
    ));
}

#[tokio::test]
async fn the_rate_towards_the_directory_is_bounded_and_so_are_waits() {
    let server = Server::start().await;
    let settings = Settings {
        directory_rate: 5.0,
        max_wait: Duration::ZERO,
        ..server.settings()
    };
    let resolver = resolver(settings);
    let mut refused = 0;
    for index in 0..20 {
        let unknown = did(&format!(
            "did:plc:aaaaaaaaaaaaaaaaaaaaaa{}{}",
            (b'a' + index) as char,
            "a"
        ));
        match resolver.resolve(&unknown).await {
            Err(ResolveError::RateLimited) => refused += 1,
            outcome => assert_eq!(outcome, Err(ResolveError::NotFound)),
        }
    }
    assert!(refused >= 13, "{refused} refused");
    assert_eq!(server.requests(), 20 - refused);
}

#[tokio::test]
async fn unusable_documents_are_refused() {
    let server = Server::start().await;
    let resolver = resolver(Settings {
        negative_ttl: Duration::ZERO,
        ..server.settings()
    });
    let huge = format!("{{\"id\":\"{ALICE}\",\"x\":\"{}\"}}", "x".repeat(300_000));
    for body in [
        String::new(),
        "[]".to_owned(),
        "{}".to_owned(),
        document(BOB, "https://a.example.com").to_string(),
        huge,
    ] {
        server.set(ALICE, StatusCode::OK, &body);
        let outcome = resolver.resolve(&did(ALICE)).await;
        assert!(
            matches!(outcome, Err(ResolveError::Invalid(_))),
            "{:.40}: {outcome:?}",
            body
        );
    }
    let bare = json!({"id": ALICE});
    server.set(ALICE, StatusCode::OK, bare);
    let identity = resolver.resolve(&did(ALICE)).await.unwrap();
    assert_eq!((&identity.pds, identity.signing_key), (&None, None));
}

#[tokio::test]
async fn a_pds_that_may_not_be_dialled_is_no_pds() {
    let server = Server::start().await;
    let resolver = Resolver::new(
        server.settings(),
        Guard::new(false),
        Clock::default(),
        Metrics::default(),
    );
    for (account, endpoint) in [
        (ALICE, "https://127.0.0.1"),
        (BOB, "http://pds.example.com"),
    ] {
        server.set_document(account, endpoint);
        assert_eq!(
            resolver.resolve(&did(account)).await.unwrap().pds,
            None,
            "{endpoint}"
        );
    }
}

#[tokio::test]
async fn a_did_web_is_read_from_its_host() {
    let server = Server::start().await;
    let web = format!("did:web:localhost%3A{}", server.port);
    server.set(
        "did.json",
        StatusCode::OK,
        document(&web, "https://pds.example.com"),
    );
    let web = Did::normalized(&web).unwrap();
    let identity = server.resolver().resolve(&web).await.unwrap();
    assert_eq!(identity.pds.as_ref().unwrap().name(), "pds.example.com");

    let public = Resolver::new(
        server.settings(),
        Guard::new(false),
        Clock::default(),
        Metrics::default(),
    );
    assert!(matches!(
        public.resolve(&web).await,
        Err(ResolveError::Invalid(_))
    ));
    assert_eq!(server.requests(), 1);
}

#[tokio::test]
async fn the_status_of_a_repository_is_asked_of_its_pds() {
    let server = Server::start().await;
    let resolver = server.resolver();
    let pds = format!("http://127.0.0.1:{}", server.port);
    let pds = atproto_relay::dial::HostName::parse(&pds, &Guard::new(true)).unwrap();
    let key = format!("status {ALICE}");

    server.set(
        &key,
        StatusCode::OK,
        json!({"did": ALICE, "active": true, "rev": "3l4nnuxvqvk2u"}),
    );
    let status = resolver.repo_status(&pds, &did(ALICE)).await.unwrap();
    assert_eq!((status.active, status.status), (true, None));

    server.set(
        &key,
        StatusCode::BAD_REQUEST,
        json!({"error": "RepoNotFound", "message": "?"}),
    );
    assert_eq!(
        resolver.repo_status(&pds, &did(ALICE)).await,
        Err(RepoStatusError::NotFound)
    );
    server.set(
        &key,
        StatusCode::INTERNAL_SERVER_ERROR,
        json!({"error": "InternalServerError"}),
    );
    assert!(matches!(
        resolver.repo_status(&pds, &did(ALICE)).await,
        Err(RepoStatusError::Unavailable(_))
    ));

    server.set(
        &key,
        StatusCode::OK,
        json!({"did": ALICE, "active": false, "status": "deactivated"}),
    );
    let before = server.requests();
    for _ in 0..5 {
        let status = resolver.repo_status(&pds, &did(ALICE)).await.unwrap();
        assert_eq!(
            (status.active, status.status.as_deref()),
            (false, Some("deactivated"))
        );
    }
    assert_eq!(
        server.requests(),
        before + 1,
        "an inactive account is not asked about again at once"
    );
}
