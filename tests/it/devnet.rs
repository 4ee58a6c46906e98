//! The devnet through its sockets, judged by our own readers: every commit it makes parses,
//! verifies and inverts, every repository it serves is whole.

#![cfg(feature = "devnet")]

use crate::support;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::time::Duration;

use atproto_relay::atproto::car::Car;
use atproto_relay::atproto::cbor::Reader;
use atproto_relay::atproto::cid::Cid;
use atproto_relay::atproto::commit::SignedCommit;
use atproto_relay::atproto::did::Did;
use atproto_relay::atproto::did_doc::DidDocument;
use atproto_relay::atproto::frame::{self, Message as Event};
use atproto_relay::atproto::key::VerifyingKey;
use atproto_relay::atproto::mst::{self, Change, InvertOp, Tree};
use atproto_relay::devnet::dag;
use atproto_relay::devnet::directory::Directory;
use atproto_relay::devnet::follower::{AccountSnapshot, Follower, FollowerOptions, differences};
use atproto_relay::devnet::keys::Curve;
use atproto_relay::devnet::network::{Network, NetworkOptions};
use atproto_relay::devnet::pds::{AccountStatus, Pds, PdsOptions, RepoState, Write};
use atproto_relay::devnet::plc::Plc;
use atproto_relay::devnet::server::Place;
use bytes::Bytes;
use futures_util::{FutureExt, StreamExt};
use iroh_car::CarReader;
use libipld::Ipld;
use reqwest::{Client, StatusCode};
use serde_json::{Value, json};
use tokio::net::TcpStream;
use tokio::time::timeout;
use tokio_tungstenite::tungstenite::{Error as WsError, Message};
use tokio_tungstenite::{MaybeTlsStream, WebSocketStream, connect_async};

type Socket = WebSocketStream<MaybeTlsStream<TcpStream>>;

/// Longest any step may take on a busy machine.
const DEADLINE: Duration = Duration::from_secs(30);

async fn network(pds: usize) -> Network {
    Network::start(NetworkOptions {
        pds,
        ..NetworkOptions::default()
    })
    .await
    .unwrap()
}

async fn subscribe(pds: &Pds, query: &str) -> Socket {
    let url = format!(
        "ws://{}/xrpc/com.atproto.sync.subscribeRepos{query}",
        pds.host()
    );
    let (socket, response) = connect_async(url).await.unwrap();
    assert_eq!(response.headers()["server"], "atproto-devnet-pds");
    socket
}

/// The next binary message; `None` when the connection has ended.
async fn next(socket: &mut Socket) -> Option<Bytes> {
    loop {
        match timeout(DEADLINE, socket.next())
            .await
            .expect("a frame in time")?
        {
            Ok(Message::Binary(frame)) => return Some(frame),
            Ok(Message::Close(_))
            | Err(WsError::ConnectionClosed | WsError::Protocol(_) | WsError::Io(_)) => {
                return None;
            }
            Ok(_) => {}
            Err(error) => panic!("{error}"),
        }
    }
}

/// What a relay would know of the network: state by DID, judged frame by frame.
struct Judge<'n> {
    network: &'n Network,
    data: HashMap<String, Cid>,
    rev: HashMap<String, String>,
    /// `#commit` and so on, in order of arrival, by DID.
    kinds: HashMap<String, Vec<&'static str>>,
    /// Where to go on in the stream of each PDS.
    positions: HashMap<String, u64>,
}

impl<'n> Judge<'n> {
    fn new(network: &'n Network) -> Self {
        Judge {
            network,
            data: HashMap::new(),
            rev: HashMap::new(),
            kinds: HashMap::new(),
            positions: HashMap::new(),
        }
    }

    /// Judges what a PDS has emitted since the last time.
    fn catch_up(&mut self, pds: &Pds) {
        let position = self.positions.entry(pds.url()).or_default();
        let events = pds.events_from(*position, usize::MAX);
        *position = events.last().map_or(*position, |event| event.position + 1);
        events.iter().for_each(|event| self.frame(&event.frame));
    }

    fn key(&self, did: &str) -> VerifyingKey {
        let document = self.network.plc().document(did).unwrap();
        let document = DidDocument::parse(document.to_string().as_bytes()).unwrap();
        VerifyingKey::new(&document.signing_key().unwrap().unwrap()).unwrap()
    }

    fn frame(&mut self, frame: &[u8]) {
        let frame = frame::decode(frame).unwrap();
        match &frame.message {
            Event::Commit(commit) => {
                self.note(commit.repo, "commit");
                self.commit(commit);
            }
            Event::Sync(sync) => {
                self.note(sync.did, "sync");
                let (signed, _) = self.signed(sync.did, sync.rev, sync.blocks);
                self.data.insert(sync.did.to_owned(), signed);
                self.rev.insert(sync.did.to_owned(), sync.rev.to_owned());
            }
            Event::Identity(identity) => self.note(identity.did, "identity"),
            Event::Account(account) => self.note(
                account.did,
                if account.active { "active" } else { "inactive" },
            ),
            other => panic!("unexpected {other:?}"),
        }
    }

    fn note(&mut self, did: &str, kind: &'static str) {
        self.kinds.entry(did.to_owned()).or_default().push(kind);
    }

    /// Checks the signed commit in a CAR; returns its data and CID.
    fn signed(&self, did: &str, rev: &str, blocks: &[u8]) -> (Cid, Cid) {
        let car = Car::parse(blocks).unwrap();
        car.verify_hashes().unwrap();
        second_opinion(blocks, &car);
        let root = car.roots()[0];
        let signed = SignedCommit::parse(car.blocks().get(&root).unwrap()).unwrap();
        assert_eq!((signed.did, signed.rev), (did, rev));
        signed.verify_signature(&self.key(did)).unwrap();
        (signed.data, root)
    }

    fn commit(&mut self, commit: &frame::Commit<'_>) {
        let (data, root) = self.signed(commit.repo, commit.rev, commit.blocks);
        assert_eq!(root, commit.commit);
        let car = Car::parse(commit.blocks).unwrap();
        let ops: Vec<InvertOp<'_>> = commit.ops.iter().map(|op| invert_op(op, &car)).collect();
        let before = mst::invert(&ops, data, |cid| car.blocks().get(cid)).unwrap();
        match commit.prev_data {
            Some(prev_data) => assert_eq!(before, prev_data),
            None => assert_eq!((before, commit.since), (mst::empty_root(), None)),
        }
        if let Some(since) = commit.since {
            assert_eq!(self.rev[commit.repo], since);
            assert_eq!(Some(self.data[commit.repo]), commit.prev_data);
            assert!(commit.rev > since);
        }
        self.rev
            .insert(commit.repo.to_owned(), commit.rev.to_owned());
        self.data.insert(commit.repo.to_owned(), data);
    }

    fn agrees_with(&self, state: &RepoState) {
        assert_eq!(self.data[state.did.as_str()], state.data);
        assert_eq!(self.rev[state.did.as_str()], state.rev.to_string());
    }
}

/// iroh-car reads the same blocks, and libipld writes each of them as it reads it.
fn second_opinion(bytes: &[u8], car: &Car<'_>) {
    let theirs = async {
        let mut reader = CarReader::new(bytes).await.unwrap();
        let mut blocks = Vec::new();
        while let Some((cid, block)) = reader.next_block().await.unwrap() {
            assert_eq!(dag::encode(&dag::decode(&block).unwrap()), block);
            blocks.push((Cid::from_bytes(&cid.to_bytes()).unwrap(), block));
        }
        blocks
    };
    let theirs = theirs.now_or_never().expect("a slice is always ready");
    let ours: Vec<(Cid, Vec<u8>)> = car
        .blocks()
        .iter()
        .map(|(cid, block)| (cid, block.to_vec()))
        .collect();
    assert_eq!(ours, theirs);
}

fn invert_op<'a>(op: &frame::Op<'a>, car: &Car<'_>) -> InvertOp<'a> {
    if let Some(cid) = op.cid {
        assert!(
            car.blocks().get(&cid).is_some(),
            "record block of {}",
            op.path
        );
    }
    let change = match (op.cid, op.prev) {
        (Some(cid), None) => Change::Create { cid },
        (Some(cid), Some(prev)) => Change::Update { cid, prev },
        (None, Some(prev)) => Change::Delete { prev },
        (None, None) => panic!("op without cid and prev: {}", op.path),
    };
    InvertOp {
        path: op.path,
        change,
    }
}

/// Reads a repository's CAR with our own readers: its records by path.
fn records(bytes: &[u8], state: &RepoState) -> BTreeMap<String, Cid> {
    let car = Car::parse(bytes).unwrap();
    car.verify_hashes().unwrap();
    assert_eq!(car.roots()[0], state.commit);
    let commit = SignedCommit::parse(car.blocks().get(&state.commit).unwrap()).unwrap();
    let mut tree = Tree::load(commit.data, |cid| car.blocks().get(cid)).unwrap();
    assert_eq!(tree.root_cid(), state.data);
    second_opinion(bytes, &car);
    let records: BTreeMap<String, Cid> = tree
        .records()
        .map(|(path, cid)| (String::from_utf8(path.to_vec()).unwrap(), cid))
        .collect();
    assert!(records.values().all(|cid| car.blocks().get(cid).is_some()));
    records
}

/// A client of one PDS with the session of one account.
struct Session {
    http: Client,
    url: String,
    did: String,
    token: String,
}

impl Session {
    async fn sign_up(pds: &Pds, handle: &str) -> Session {
        let http = atproto_relay::dial::plain_client();
        let input = json!({ "handle": handle, "password": "secret" });
        let (status, answer) = post(
            &http,
            &pds.url(),
            "com.atproto.server.createAccount",
            None,
            input,
        )
        .await;
        assert_eq!(status, StatusCode::OK, "{answer}");
        let text = |name: &str| answer[name].as_str().unwrap().to_owned();
        Session {
            http,
            url: pds.url(),
            did: text("did"),
            token: text("accessJwt"),
        }
    }

    fn did(&self) -> Did {
        Did::parse(&self.did).unwrap()
    }

    async fn post(&self, method: &str, input: Value) -> (StatusCode, Value) {
        post(&self.http, &self.url, method, Some(&self.token), input).await
    }

    async fn ok(&self, method: &str, input: Value) -> Value {
        let (status, answer) = self.post(method, input).await;
        assert_eq!(status, StatusCode::OK, "{method}: {answer}");
        answer
    }

    async fn get(&self, method: &str, query: &[(&str, &str)]) -> (StatusCode, Value) {
        let answer = self.request(method, query).await;
        (answer.status(), answer.json().await.unwrap_or_default())
    }

    async fn request(&self, method: &str, query: &[(&str, &str)]) -> reqwest::Response {
        let mut url = reqwest::Url::parse(&format!("{}/xrpc/{method}", self.url)).unwrap();
        url.query_pairs_mut().extend_pairs(query);
        self.http.get(url).send().await.unwrap()
    }

    async fn create(&self, text: &str) -> Value {
        let record = json!({ "text": text, "createdAt": "2026-11-21T00:00:00Z" });
        self.ok(
            "com.atproto.repo.createRecord",
            json!({ "repo": self.did, "collection": "app.bsky.feed.post", "record": record }),
        )
        .await
    }
}

async fn post(
    http: &Client,
    base: &str,
    method: &str,
    token: Option<&str>,
    input: Value,
) -> (StatusCode, Value) {
    let path = if method.starts_with('/') {
        method.to_owned()
    } else {
        format!("/xrpc/{method}")
    };
    let mut request = http.post(format!("{base}{path}")).json(&input);
    if let Some(token) = token {
        request = request.bearer_auth(token);
    }
    let answer = request.send().await.unwrap();
    (answer.status(), answer.json().await.unwrap_or_default())
}

fn rkey(uri: &Value) -> String {
    uri.as_str().unwrap().rsplit('/').next().unwrap().to_owned()
}

#[tokio::test]
async fn everything_an_account_does_verifies_and_reads_back() {
    let network = network(1).await;
    let pds = network.pds(0);
    let mut socket = subscribe(pds, "?cursor=0").await;
    let alice = Session::sign_up(pds, "alice.pds1.test").await;

    let first = alice.create("one").await;
    let key = rkey(&first["uri"]);
    let (_, read) = alice
        .get(
            "com.atproto.repo.getRecord",
            &[
                ("repo", &alice.did),
                ("collection", "app.bsky.feed.post"),
                ("rkey", &key),
            ],
        )
        .await;
    assert_eq!(
        (&read["cid"], &read["value"]["text"]),
        (&first["cid"], &json!("one"))
    );

    let profile = json!({ "repo": alice.did, "collection": "app.bsky.actor.profile", "rkey": "self", "record": { "displayName": "A" } });
    let put = alice
        .ok("com.atproto.repo.putRecord", profile.clone())
        .await;
    assert!(
        alice
            .ok("com.atproto.repo.putRecord", profile)
            .await
            .get("commit")
            .is_none(),
        "same record: no commit"
    );
    let renamed = json!({
        "repo": alice.did, "collection": "app.bsky.actor.profile", "rkey": "self", "swapRecord": put["cid"],
        "record": { "displayName": "B", "avatar": { "$link": first["cid"] }, "raw": { "$bytes": "AAEC" } },
    });
    alice
        .ok("com.atproto.repo.putRecord", renamed.clone())
        .await;
    let (status, swap) = alice.post("com.atproto.repo.putRecord", renamed).await;
    assert_eq!(
        (status, &swap["error"]),
        (StatusCode::BAD_REQUEST, &json!("InvalidSwap"))
    );

    let before = alice
        .get("com.atproto.sync.getLatestCommit", &[("did", &alice.did)])
        .await
        .1;
    let creates = (0..50).map(|n| json!({
        "$type": "com.atproto.repo.applyWrites#create", "collection": "com.example.thing", "rkey": format!("n{n}"), "value": { "n": n },
    }));
    let remove = json!({ "$type": "com.atproto.repo.applyWrites#delete", "collection": "app.bsky.feed.post", "rkey": key });
    let writes: Vec<Value> = creates.chain([remove]).collect();
    let applied = alice
        .ok(
            "com.atproto.repo.applyWrites",
            json!({ "repo": alice.did, "writes": writes }),
        )
        .await;
    assert_eq!(applied["results"].as_array().unwrap().len(), 51);
    let delete = json!({ "repo": alice.did, "collection": "com.example.thing", "rkey": "n7" });
    assert!(
        alice
            .ok("com.atproto.repo.deleteRecord", delete.clone())
            .await
            .get("commit")
            .is_some()
    );
    assert_eq!(
        alice.ok("com.atproto.repo.deleteRecord", delete).await,
        json!({})
    );

    let state = pds.repository(&alice.did()).unwrap();
    let car = alice
        .request("com.atproto.sync.getRepo", &[("did", &alice.did)])
        .await
        .bytes()
        .await
        .unwrap();
    assert_eq!(records(&car, &state), state.records);
    assert_eq!(state.records.len(), 50);
    let since = before["rev"].as_str().unwrap();
    let part = alice
        .request(
            "com.atproto.sync.getRepo",
            &[("did", &alice.did), ("since", since)],
        )
        .await
        .bytes()
        .await
        .unwrap();
    let part = Car::parse(&part).unwrap();
    let profile = &state.records["app.bsky.actor.profile/self"];
    assert!(
        part.blocks().get(profile).is_none() && part.blocks().get(&state.data).is_some(),
        "only what came after"
    );
    assert!(
        part.blocks()
            .get(&state.records["com.example.thing/n3"])
            .is_some()
    );

    let (_, listed) = alice
        .get(
            "com.atproto.repo.listRecords",
            &[
                ("repo", &alice.did),
                ("collection", "com.example.thing"),
                ("limit", "10"),
            ],
        )
        .await;
    assert_eq!(
        listed["records"][0]["value"]["n"],
        json!(9),
        "descending by record key"
    );
    let described = alice
        .get(
            "com.atproto.repo.describeRepo",
            &[("repo", "alice.pds1.test")],
        )
        .await
        .1;
    assert_eq!(
        described["collections"],
        json!(["app.bsky.actor.profile", "com.example.thing"])
    );
    assert_eq!(described["handleIsCorrect"], json!(true));

    let mut judge = Judge::new(&network);
    for _ in 0..pds.head_seq() {
        judge.frame(&next(&mut socket).await.unwrap());
    }
    judge.agrees_with(&state);
    let kinds = &judge.kinds[&alice.did];
    assert_eq!(kinds[..4], ["identity", "active", "commit", "sync"]);
    assert_eq!(kinds[4..], ["commit"; 5]);
}

#[tokio::test]
async fn accounts_change_move_and_go_as_on_real_servers() {
    let network = network(2).await;
    let (old, new) = (network.pds(0), network.pds(1));
    let mig = Session::sign_up(old, "mig.pds1.test").await;
    let did = mig.did();
    mig.create("before").await;
    let mut judge = Judge::new(&network);
    judge.catch_up(old);

    mig.ok(
        "com.atproto.identity.updateHandle",
        json!({ "handle": "moved.pds1.test" }),
    )
    .await;
    mig.ok("com.atproto.server.deactivateAccount", json!({}))
        .await;
    let (status, refused) = mig
        .post(
            "com.atproto.repo.createRecord",
            json!({ "repo": mig.did, "collection": "a.b.c", "record": {} }),
        )
        .await;
    assert_eq!(
        (status, &refused["error"]),
        (StatusCode::BAD_REQUEST, &json!("RepoDeactivated"))
    );
    let status = mig
        .get("com.atproto.sync.getRepoStatus", &[("did", &mig.did)])
        .await
        .1;
    assert_eq!(
        status,
        json!({ "did": mig.did, "active": false, "status": "deactivated" })
    );
    mig.ok("com.atproto.server.activateAccount", json!({}))
        .await;
    judge.catch_up(old);
    let (_, rotated) = post(
        &mig.http,
        &mig.url,
        "/devnet/rotateKey",
        None,
        json!({ "did": mig.did }),
    )
    .await;
    assert_eq!(
        rotated["signingKey"],
        json!(old.repository(&did).unwrap().signing_key)
    );
    mig.create("with the new key").await;
    judge.catch_up(old);
    let tail = [
        "identity", "inactive", "active", "identity", "sync", "identity", "sync", "commit",
    ];
    assert_eq!(judge.kinds[&mig.did][5..], tail);
    let (status, moved) = post(
        &mig.http,
        &mig.url,
        "/devnet/migrateAccount",
        None,
        json!({ "did": mig.did, "pds": new.url() }),
    )
    .await;
    assert_eq!(status, StatusCode::OK, "{moved}");
    let there = Session {
        http: mig.http.clone(),
        url: new.url(),
        did: mig.did.clone(),
        token: moved["accessJwt"].as_str().unwrap().to_owned(),
    };
    there.create("after").await;
    judge.catch_up(new);
    judge.catch_up(old);
    assert_eq!(
        judge.kinds[&mig.did][13..],
        [
            "identity", "active", "identity", "sync", "commit", "inactive"
        ]
    );
    let state = new.repository(&did).unwrap();
    judge.agrees_with(&state);
    assert_eq!(records(&new.repo_car(&did, None).unwrap(), &state).len(), 3);
    assert_eq!(network.home(&did).unwrap().url(), new.url());
    assert_eq!(network.repositories(), vec![state]);

    there
        .ok(
            "com.atproto.server.deleteAccount",
            json!({ "did": there.did, "password": "secret", "token": "x" }),
        )
        .await;
    let (status, gone) = there
        .get("com.atproto.sync.getRepoStatus", &[("did", &there.did)])
        .await;
    assert_eq!(
        (status, &gone["error"]),
        (StatusCode::BAD_REQUEST, &json!("RepoNotFound"))
    );
    let left = new.events();
    assert_eq!(left.len(), 1, "the events of a deleted account are gone");
    judge.catch_up(new);
    assert_eq!(judge.kinds[&mig.did].last(), Some(&"inactive"));
}

#[tokio::test]
async fn random_repositories_of_both_key_types_verify_commit_by_commit() {
    let network = network(2).await;
    let mut random = fastrand::Rng::with_seed(5);
    let accounts: Vec<(Pds, Did)> = (0..6)
        .map(|n| {
            let pds = network.pds(n % 2).clone();
            let did = pds.create_account(&format!("user{n}.test")).unwrap().did;
            (pds, did)
        })
        .collect();
    for _ in 0..150 {
        let (pds, did) = &accounts[random.usize(..accounts.len())];
        let writes = random_writes(&mut random, &pds.repository(did).unwrap());
        pds.apply_writes(did, &writes).unwrap();
    }
    let mut judge = Judge::new(&network);
    for pds in network.all_pds() {
        judge.catch_up(pds);
        for state in pds.repositories() {
            judge.agrees_with(&state);
            assert_eq!(
                records(&pds.repo_car(&state.did, None).unwrap(), &state),
                state.records
            );
        }
    }
    let curves: Vec<String> = network
        .repositories()
        .iter()
        .map(|state| state.signing_key[8..12].to_owned())
        .collect();
    assert!(curves.iter().any(|key| key == "zQ3s") && curves.iter().any(|key| key == "zDna"));
}

/// One to eight writes to different records, new ones and such that are there.
fn random_writes(random: &mut fastrand::Rng, state: &RepoState) -> Vec<Write> {
    let mut existing: Vec<&String> = state.records.keys().collect();
    random.shuffle(&mut existing);
    let mut existing = existing.into_iter();
    let record = |random: &mut fastrand::Rng| json!({ "n": random.u32(..), "text": "x".repeat(random.usize(..200)) });
    (0..random.usize(1..=8))
        .map(|_| {
            let there = existing
                .next()
                .and_then(|path| path.split_once('/'))
                .filter(|_| random.bool());
            match there {
                Some((collection, rkey)) if random.bool() => Write::Delete {
                    collection: collection.to_owned(),
                    rkey: rkey.to_owned(),
                },
                Some((collection, rkey)) => Write::Update {
                    collection: collection.to_owned(),
                    rkey: rkey.to_owned(),
                    record: record(random),
                },
                None => Write::Create {
                    collection: format!("com.example.kind{}", random.u8(..4)),
                    rkey: None,
                    record: record(random),
                },
            }
        })
        .collect()
}

#[tokio::test]
async fn subscriptions_keep_to_their_cursors() {
    let options = NetworkOptions {
        backfill_bytes: 2_000,
        ..NetworkOptions::default()
    };
    let network = Network::start(options).await.unwrap();
    let pds = network.pds(0);
    let did = pds.create_account("alice.test").unwrap().did;
    let mut live = subscribe(pds, "").await;
    let mut backfill = subscribe(pds, "?cursor=2").await;
    assert_eq!(next(&mut backfill).await.unwrap(), pds.events()[2].frame);

    for n in 0..20 {
        pds.create_record(&did, "com.example.thing", json!({ "n": n }))
            .unwrap();
    }
    let first = frame::decode(&next(&mut live).await.unwrap())
        .map(|frame| matches!(frame.message, Event::Commit(_)));
    assert!(first.unwrap(), "live starts with what comes after");

    let mut outdated = subscribe(pds, "?cursor=1").await;
    let info = next(&mut outdated).await.unwrap();
    assert!(
        matches!(frame::decode(&info).unwrap().message, Event::Info(info) if info.name == "OutdatedCursor")
    );
    assert_eq!(next(&mut outdated).await.unwrap(), pds.events()[0].frame);

    for (query, error) in [
        ("?cursor=999", "FutureCursor"),
        ("?cursor=abc", "InvalidRequest"),
    ] {
        let mut refused = subscribe(pds, query).await;
        let frame = next(&mut refused).await.unwrap();
        assert!(
            matches!(frame::decode(&frame).unwrap().message, Event::Error(body) if body.error == error),
            "{query}"
        );
        assert_eq!(next(&mut refused).await, None);
    }
}

#[tokio::test]
async fn faults_happen_when_they_are_told_to() {
    let network = network(1).await;
    let pds = network.pds(0);
    let mut socket = subscribe(pds, "").await;
    assert_eq!(pds.emit_raw(Bytes::from_static(b"not a frame")), 1);
    assert_eq!(
        next(&mut socket).await.unwrap(),
        Bytes::from_static(b"not a frame")
    );

    pds.stall(true);
    pds.emit_raw(Bytes::from_static(b"held back"));
    assert!(
        timeout(Duration::from_millis(100), socket.next())
            .await
            .is_err()
    );
    pds.stall(false);
    assert_eq!(
        next(&mut socket).await.unwrap(),
        Bytes::from_static(b"held back")
    );

    pds.disconnect();
    assert_eq!(next(&mut socket).await, None);
    pds.restart_seq(1);
    assert_eq!(pds.emit_with(|stamp| stamp.seq.to_string().into()), 1);
    let mut again = subscribe(pds, "?cursor=0").await;
    assert_eq!(next(&mut again).await.unwrap(), Bytes::from_static(b"1"));

    pds.set_offline(true);
    assert_eq!(next(&mut again).await, None);
    let health = || {
        atproto_relay::dial::plain_client()
            .get(format!("{}/xrpc/_health", pds.url()))
            .send()
    };
    assert_eq!(
        health().await.unwrap().status(),
        StatusCode::SERVICE_UNAVAILABLE
    );
    pds.set_offline(false);
    assert_eq!(health().await.unwrap().status(), StatusCode::OK);
}

#[tokio::test]
async fn refusals_have_the_lexicons_names() {
    let network = network(1).await;
    let pds = network.pds(0);
    let alice = Session::sign_up(pds, "alice.pds1.test").await;
    let nobody = "did:plc:aaaaaaaaaaaaaaaaaaaaaaaa";
    for (method, query, error) in [
        ("com.atproto.sync.getRepo", ("did", nobody), "RepoNotFound"),
        (
            "com.atproto.sync.getLatestCommit",
            ("did", nobody),
            "RepoNotFound",
        ),
        ("com.atproto.sync.getRepo", ("x", ""), "InvalidRequest"),
        (
            "com.atproto.sync.listRepos",
            ("limit", "100000"),
            "InvalidRequest",
        ),
        (
            "com.atproto.sync.listRepos",
            ("limit", "x"),
            "InvalidRequest",
        ),
        (
            "com.atproto.server.createAccount",
            ("x", ""),
            "InvalidRequest",
        ),
        (
            "com.atproto.nowhere.nothing",
            ("x", ""),
            "MethodNotImplemented",
        ),
    ] {
        let (status, answer) = alice.get(method, &[query]).await;
        assert!(
            status.is_client_error() || status == StatusCode::NOT_IMPLEMENTED,
            "{method}: {status}"
        );
        assert_eq!(answer["error"], json!(error), "{method}");
        assert!(answer["message"].is_string(), "{method}");
    }
    let record = |rkey: &str, record: Value| json!({ "repo": alice.did, "collection": "com.example.thing", "rkey": rkey, "record": record });
    for (method, input, error) in [
        (
            "com.atproto.server.createAccount",
            json!({ "handle": "alice.pds1.test" }),
            "HandleNotAvailable",
        ),
        (
            "com.atproto.server.createAccount",
            json!({ "handle": "no handle" }),
            "InvalidHandle",
        ),
        (
            "com.atproto.server.createSession",
            json!({ "identifier": "alice.pds1.test", "password": "no" }),
            "AuthenticationRequired",
        ),
        (
            "com.atproto.repo.createRecord",
            record("a b", json!({})),
            "InvalidRequest",
        ),
        (
            "com.atproto.repo.createRecord",
            record("a", json!({ "x": 1.5 })),
            "InvalidRequest",
        ),
        (
            "com.atproto.repo.createRecord",
            record("a", json!({ "$type": "com.example.other" })),
            "InvalidRequest",
        ),
        (
            "com.atproto.repo.createRecord",
            record("a", json!([])),
            "InvalidRequest",
        ),
        ("com.atproto.repo.createRecord", json!({}), "InvalidRequest"),
    ] {
        let (status, answer) = alice.post(method, input).await;
        assert!(status.is_client_error(), "{method}: {status}");
        assert_eq!(answer["error"], json!(error), "{method}: {answer}");
    }
    let (status, answer) = post(
        &alice.http,
        &alice.url,
        "com.atproto.server.deactivateAccount",
        None,
        json!({}),
    )
    .await;
    assert_eq!(
        (status, &answer["error"]),
        (StatusCode::UNAUTHORIZED, &json!("AuthMissing"))
    );
    assert_eq!(pds.head_seq(), 4, "nothing of this made an event");
}

#[tokio::test]
async fn pdses_ask_relays_to_crawl_until_one_agrees() {
    let (hosts, mut asked) = tokio::sync::mpsc::unbounded_channel();
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let relay = format!("http://{}", listener.local_addr().unwrap());
    let network = Network::start(NetworkOptions {
        pds: 2,
        relays: vec![relay],
        ..NetworkOptions::default()
    })
    .await
    .unwrap();
    let answer = axum::routing::post(move |axum::Json(input): axum::Json<Value>| async move {
        hosts
            .send(input["hostname"].as_str().unwrap().to_owned())
            .unwrap();
        StatusCode::OK
    });
    let router = axum::Router::new().route("/xrpc/com.atproto.sync.requestCrawl", answer);
    tokio::spawn(async move { axum::serve(listener, router).await });
    let mut heard = Vec::new();
    while heard.len() < 2 {
        heard.push(timeout(DEADLINE, asked.recv()).await.unwrap().unwrap());
    }
    heard.sort();
    let mut expected: Vec<String> = network.all_pds().iter().map(Pds::host).collect();
    expected.sort();
    assert_eq!(heard, expected);
}

/// The kind of a frame and the names of its body's fields, those of its first op included.
fn shape(frame: &[u8]) -> String {
    let mut reader = Reader::new(frame);
    reader.skip().unwrap();
    let (header, body) = frame.split_at(reader.position());
    let (Ipld::Map(header), Ipld::Map(body)) =
        (dag::decode(header).unwrap(), dag::decode(body).unwrap())
    else {
        panic!("a frame is two maps")
    };
    let op = match body.get("ops") {
        Some(Ipld::List(ops)) => ops.first().map(|op| match op {
            Ipld::Map(op) => format!("{:?} {:?}", op["action"], op.keys().collect::<Vec<_>>()),
            _ => panic!("an op is a map"),
        }),
        _ => None,
    };
    format!(
        "{:?} {:?} {op:?}",
        header["t"],
        body.keys().collect::<Vec<_>>()
    )
}

#[tokio::test]
async fn frames_have_the_fields_of_real_ones() {
    let Some(root) = support::fixtures("real-pds") else {
        return;
    };
    let capture = std::fs::read(root.join("pds1.frames")).unwrap();
    let mut rest = &capture[..];
    let mut real = BTreeSet::new();
    while let Some((length, tail)) = rest.split_first_chunk::<4>() {
        let (frame, tail) = tail.split_at(u32::from_be_bytes(*length) as usize);
        real.insert(shape(frame));
        rest = tail;
    }

    let network = network(1).await;
    let pds = network.pds(0);
    let did = pds.create_account("alice.test").unwrap().did;
    let thing = "com.example.thing";
    pds.put_record(&did, thing, "a", json!({ "n": 1 })).unwrap();
    pds.put_record(&did, thing, "a", json!({ "n": 2 })).unwrap();
    pds.delete_record(&did, thing, "a").unwrap();
    pds.rotate_key(&did).unwrap();
    pds.take_down(&did).unwrap();
    pds.reverse_takedown(&did).unwrap();
    let own: BTreeSet<String> = pds
        .events()
        .iter()
        .map(|event| shape(&event.frame))
        .collect();
    assert_eq!(own, real);
}

/// A PDS as it stands alone on a machine: its directory is reached over HTTP.
async fn pds_alone(plc: &Plc, seed: u64) -> Pds {
    let options = PdsOptions {
        domain: format!("pds{seed}.test"),
        seed,
        clock_id: seed as u16,
        backfill: DEADLINE * 100,
        backfill_bytes: 1 << 20,
        rotation_curve: Curve::K256,
    };
    let directory = Directory::Remote(plc.url());
    Pds::start(directory, options, Place::default())
        .await
        .unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn pdses_of_several_processes_share_a_directory_and_pass_accounts_on() {
    let plc = Plc::start().await.unwrap();
    let (old, new) = (pds_alone(&plc, 1).await, pds_alone(&plc, 2).await);
    let did = old.create_account("ada.pds1.test").unwrap().did;
    let post = json!({ "text": "before" });
    old.put_record(&did, "app.bsky.feed.post", "one", post)
        .unwrap();
    let moved = json!({ "did": did.as_str(), "pds": new.url() });
    let answer = atproto_relay::dial::plain_client()
        .post(format!("{}/devnet/migrateAccount", old.url()))
        .json(&moved)
        .send();
    let session: Value = answer.await.unwrap().json().await.unwrap();
    assert_eq!(session["handle"], "ada.pds1.test", "{session}");
    let home = plc.content(did.as_str()).unwrap().services["atproto_pds"].clone();
    assert_eq!(home.endpoint, new.url());
    assert_eq!(old.head(&did).unwrap().status, AccountStatus::Deactivated);
    let (before, after) = (old.repository(&did).unwrap(), new.repository(&did).unwrap());
    assert_eq!(
        (after.status, &after.records, after.data),
        (AccountStatus::Active, &before.records, before.data)
    );
    assert_ne!(after.signing_key, before.signing_key);
    // It goes on there, and cannot here.
    let post = json!({ "text": "after" });
    new.put_record(&did, "app.bsky.feed.post", "two", post.clone())
        .unwrap();
    assert!(
        old.put_record(&did, "app.bsky.feed.post", "two", post)
            .is_err()
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_follower_ends_up_with_what_a_busy_pds_has() {
    let plc = Plc::start().await.unwrap();
    let pds = pds_alone(&plc, 1).await;
    let options = FollowerOptions {
        relay: format!("ws://{}", pds.host()),
        cursor: Some(0),
        place: Place::default(),
    };
    let follower = Follower::start(options).await.unwrap();
    pds.keep_writing(3, 500.0).unwrap();
    let busy = async {
        while pds.written() < 200 {
            tokio::task::yield_now().await;
        }
    };
    timeout(DEADLINE, busy).await.unwrap();
    pds.keep_writing(3, 0.0).unwrap();
    let same = async {
        loop {
            let held = pds
                .repositories()
                .into_iter()
                .map(AccountSnapshot::from)
                .collect();
            let report = follower.report();
            if report.last_seq == pds.head_seq() as i64
                && differences(held, &follower.accounts()).is_empty()
            {
                return report;
            }
            tokio::task::yield_now().await;
        }
    };
    let report = timeout(DEADLINE, same).await.unwrap();
    assert_eq!((report.gaps, report.doubles, report.bad), (0, 0, 0));
    assert_eq!(report.connections, 1);
}
