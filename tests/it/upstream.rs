//! Hosts on real sockets: fake PDSes whose every message the test decides, and a pipeline that records what comes through.
#![cfg(feature = "devnet")]

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use atproto_relay::atproto::did::Did;
use atproto_relay::atproto::frame::Kind;
use atproto_relay::dial::DomainPattern;
use atproto_relay::dial::{Guard, HostName};
use atproto_relay::hosts::{
    AddError, Durable, HostHandle, HostLimits, HostState, Hosts, HostsOptions, InFlightLimits,
    MemoryLimits, Received, RecoveredHost, Rule, Settings, Settled,
};
use atproto_relay::store::{HostStatus, NewHost, RateOverrides, Store};
use atproto_relay::upstream::{Backoff, Supervisor, UpstreamOptions};
use atproto_relay::verify::{Pipeline, Recording};
use axum::Router;
use axum::extract::ws::{Message, WebSocket, WebSocketUpgrade};
use axum::extract::{Query, State};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use libipld::cbor::DagCborCodec;
use libipld::codec::Codec;
use libipld::{Ipld, ipld};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::sync::mpsc;

const DID: &str = "did:plc:aaaaaaaaaaaaaaaaaaaaaaaa";
const PATIENCE: Duration = Duration::from_secs(10);

/// A connection as the PDS sees it.
struct Peer {
    cursor: Option<i64>,
    user_agent: String,
    send: mpsc::UnboundedSender<Message>,
    received: mpsc::UnboundedReceiver<Message>,
}

impl Peer {
    fn send(&self, frame: Vec<u8>) {
        self.send
            .send(Message::Binary(frame.into()))
            .expect("the connection is open");
    }

    fn send_events(&self, seqs: impl IntoIterator<Item = i64>) {
        for seq in seqs {
            self.send(identity(seq));
        }
    }

    /// Waits until the relay has closed the connection.
    async fn closed(&mut self) {
        within("the relay closes the connection", async {
            while self.received.recv().await.is_some() {}
        })
        .await;
    }
}

/// A PDS that does what the test says.
struct Pds {
    port: u16,
    /// What it calls itself.
    server: Arc<Mutex<&'static str>>,
    peers: mpsc::UnboundedReceiver<Peer>,
}

#[derive(Clone)]
struct PdsState {
    peers: mpsc::UnboundedSender<Peer>,
    server: Arc<Mutex<&'static str>>,
    /// Never reads from its sockets, so answers no ping.
    deaf: bool,
}

impl Pds {
    async fn start() -> Self {
        Self::start_as("fake-pds", false).await
    }

    async fn start_as(server: &'static str, deaf: bool) -> Self {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        Self::serve(listener, server, deaf)
    }

    fn serve(listener: tokio::net::TcpListener, server: &'static str, deaf: bool) -> Self {
        let port = listener.local_addr().unwrap().port();
        let (sender, peers) = mpsc::unbounded_channel();
        let server = Arc::new(Mutex::new(server));
        let state = PdsState {
            peers: sender,
            server: server.clone(),
            deaf,
        };
        let router = Router::new()
            .route("/xrpc/com.atproto.sync.subscribeRepos", get(subscribe))
            .with_state(state);
        tokio::spawn(async move { axum::serve(listener, router).await.unwrap() });
        Self {
            port,
            server,
            peers,
        }
    }

    fn name(&self) -> String {
        format!("127.0.0.1:{}", self.port)
    }

    fn host(&self) -> HostName {
        HostName::parse(&format!("http://{}", self.name()), &Guard::new(true)).unwrap()
    }

    /// The relay's next connection.
    async fn accept(&mut self) -> Peer {
        within("the relay connects", self.peers.recv())
            .await
            .unwrap()
    }
}

async fn subscribe(
    State(state): State<PdsState>,
    Query(query): Query<HashMap<String, String>>,
    headers: axum::http::HeaderMap,
    upgrade: WebSocketUpgrade,
) -> Response {
    let cursor = query.get("cursor").map(|cursor| cursor.parse().unwrap());
    let user_agent = headers["user-agent"].to_str().unwrap().to_owned();
    let (server, deaf) = (*state.server.lock().unwrap(), state.deaf);
    let response = upgrade.on_upgrade(move |socket| async move {
        let (send, outgoing) = mpsc::unbounded_channel();
        let (incoming, received) = mpsc::unbounded_channel();
        state
            .peers
            .send(Peer {
                cursor,
                user_agent,
                send,
                received,
            })
            .ok();
        if deaf {
            incoming.closed().await;
        } else {
            pump(socket, outgoing, incoming).await;
        }
    });
    ([("server", server)], response).into_response()
}

/// Carries messages both ways until either side is done.
async fn pump(
    mut socket: WebSocket,
    mut outgoing: mpsc::UnboundedReceiver<Message>,
    incoming: mpsc::UnboundedSender<Message>,
) {
    loop {
        tokio::select! {
            message = outgoing.recv() => match message {
                Some(message) => if socket.send(message).await.is_err() { return },
                None => return,
            },
            message = socket.recv() => match message {
                Some(Ok(message)) => drop(incoming.send(message)),
                _ => return,
            },
        }
    }
}

/// A relay's upstream side.
struct Relay {
    hosts: Hosts,
    upstream: Supervisor,
    store: Store,
    events: Recording,
    _folder: Arc<tempfile::TempDir>,
}

/// Settings of the registry and of the connections.
#[derive(Clone)]
struct Options {
    hosts: HostsOptions,
    upstream: UpstreamOptions,
}

impl From<HostsOptions> for Options {
    fn from(hosts: HostsOptions) -> Self {
        Self {
            hosts,
            ..Options::default()
        }
    }
}

impl From<UpstreamOptions> for Options {
    fn from(upstream: UpstreamOptions) -> Self {
        Self {
            upstream,
            ..Options::default()
        }
    }
}

impl Default for Options {
    fn default() -> Self {
        Self {
            hosts: hosts_options(),
            upstream: upstream_options(),
        }
    }
}

fn hosts_options() -> HostsOptions {
    HostsOptions {
        guard: Guard::new(true),
        ..HostsOptions::default()
    }
}

fn upstream_options() -> UpstreamOptions {
    UpstreamOptions {
        guard: Guard::new(true),
        backoff: Backoff {
            initial: Duration::from_millis(5),
            maximum: Duration::from_millis(40),
            offline_after: 4,
            offline_maximum: Duration::from_millis(60),
        },
        ..UpstreamOptions::default()
    }
}

async fn empty_store() -> (Store, Arc<tempfile::TempDir>) {
    let folder = tempfile::tempdir().unwrap();
    let store = Store::open(&format!(
        "sqlite:{}",
        folder.path().join("relay.sqlite").display()
    ))
    .await
    .unwrap();
    (store, Arc::new(folder))
}

impl Relay {
    async fn start() -> Self {
        Self::start_with(Options::default()).await
    }

    async fn start_with(options: impl Into<Options>) -> Self {
        let (store, folder) = empty_store().await;
        Self::start_on(options, store, folder, HashMap::new()).await
    }

    async fn start_on(
        options: impl Into<Options>,
        store: Store,
        folder: Arc<tempfile::TempDir>,
        recovered: HashMap<atproto_relay::store::HostId, RecoveredHost>,
    ) -> Self {
        let options = options.into();
        let (pipeline, events) = Pipeline::recording();
        let hosts = Hosts::load(options.hosts, store.clone(), recovered)
            .await
            .unwrap();
        let upstream = Supervisor::new(options.upstream, hosts.clone(), store.clone(), pipeline);
        upstream.start();
        Self {
            hosts,
            upstream,
            store,
            events,
            _folder: folder,
        }
    }

    async fn next(&mut self) -> Received {
        within("an event comes through", self.events.next())
            .await
            .unwrap()
    }

    /// Takes that many events and settles them as dropped.
    async fn settle(&mut self, count: usize) -> Vec<i64> {
        let mut seqs = Vec::new();
        for _ in 0..count {
            let event = self.next().await;
            seqs.push(event.seq);
            event.permit.settle(Settled::Dropped);
        }
        seqs
    }

    async fn stored_status(&self, host: &HostHandle) -> HostStatus {
        self.store.host(host.id()).await.unwrap().unwrap().status
    }

    async fn until_stored(&self, host: &HostHandle, status: HostStatus) {
        within("the status is stored", async {
            while self.stored_status(host).await != status {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        })
        .await;
    }
}

async fn within<T>(what: &str, future: impl Future<Output = T>) -> T {
    tokio::time::timeout(PATIENCE, future)
        .await
        .unwrap_or_else(|_| panic!("not within 10 s: {what}"))
}

async fn until(what: &str, mut condition: impl FnMut() -> bool) {
    within(what, async {
        while !condition() {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    })
    .await;
}

fn frame(header: Ipld, body: Ipld) -> Vec<u8> {
    let mut bytes = DagCborCodec.encode(&header).unwrap();
    bytes.extend(DagCborCodec.encode(&body).unwrap());
    bytes
}

fn identity(seq: i64) -> Vec<u8> {
    identity_of(seq, DID)
}

fn identity_of(seq: i64, did: &str) -> Vec<u8> {
    identity_at(seq, did, "2026-01-01T00:00:00.000Z")
}

fn identity_at(seq: i64, did: &str, time: &str) -> Vec<u8> {
    let body = ipld!({"seq": seq, "did": did, "time": time, "handle": "a.example.com"});
    frame(ipld!({"op": 1, "t": "#identity"}), body)
}

/// An event of so many bytes: it has a field that nobody knows.
fn padded_identity(seq: i64, bytes: usize) -> Vec<u8> {
    let padded = |length: usize| {
        let text = "x".repeat(length);
        let body = ipld!({"seq": seq, "did": DID, "time": "now", "padding": text});
        frame(ipld!({"op": 1, "t": "#identity"}), body)
    };
    let around = padded(100_000).len() - 100_000;
    padded(bytes - around)
}

fn info(name: &str) -> Vec<u8> {
    frame(
        ipld!({"op": 1, "t": "#info"}),
        ipld!({"name": name, "message": "as it is"}),
    )
}

fn error(name: &str) -> Vec<u8> {
    frame(
        ipld!({"op": -1}),
        ipld!({"error": name, "message": "as it is"}),
    )
}

#[tokio::test]
async fn a_new_host_starts_live_and_its_events_come_through_in_order() {
    let (mut pds, mut relay) = (Pds::start().await, Relay::start().await);
    let host = relay.upstream.add(&pds.host()).await.unwrap();
    let peer = pds.accept().await;
    assert_eq!(peer.cursor, None);
    assert!(
        peer.user_agent.starts_with("atproto-relay/")
            && peer.user_agent.ends_with("(atproto-relay)")
    );
    peer.send_events([5, 6, 9]);
    for seq in [5, 6, 9] {
        let event = relay.next().await;
        assert_eq!(
            (event.seq, event.kind, event.did.as_str()),
            (seq, Kind::Identity, DID)
        );
        assert_eq!(
            (event.host.id(), &event.frame[..]),
            (host.id(), &identity(seq)[..])
        );
        assert_eq!(event.frame[event.seq_span.clone()], [seq as u8]);
        event.permit.settle(Settled::Durable {
            log_seq: seq as u64 + 100,
        });
    }
    assert_eq!(relay.hosts.take_moved_cursors(), [(host.id(), 9)]);
    assert_eq!(relay.hosts.take_moved_cursors(), []);
    assert_eq!(
        (host.state(), host.events(), host.last_seq()),
        (HostState::Connected, 3, Some(9))
    );
}

#[tokio::test]
async fn a_connection_resumes_after_the_last_event_taken_even_if_it_is_not_settled() {
    let (mut pds, mut relay) = (Pds::start().await, Relay::start().await);
    relay.upstream.add(&pds.host()).await.unwrap();
    let peer = pds.accept().await;
    peer.send_events([1, 2, 3]);
    let held = [relay.next().await, relay.next().await, relay.next().await];
    drop(peer);
    let peer = pds.accept().await;
    assert_eq!(peer.cursor, Some(3));
    // A host may count the cursor in, and may send again what is under way: none of it counts twice.
    peer.send_events([3, 2, 4]);
    assert_eq!(relay.next().await.seq, 4);
    let cursors: Vec<i64> = relay
        .hosts
        .take_moved_cursors()
        .iter()
        .map(|it| it.1)
        .collect();
    assert_eq!(cursors, [0], "before the first event, which is not settled");
    drop(held);
}

/// The log need not know that first event when the crash comes: it may have been dropped, or wait for a look-up.
#[tokio::test]
async fn a_new_host_is_resumed_after_a_crash_whatever_became_of_its_first_event() {
    let (mut pds, mut relay) = (Pds::start().await, Relay::start().await);
    let host = relay.upstream.add(&pds.host()).await.unwrap();
    let peer = pds.accept().await;
    assert_eq!(peer.cursor, None);
    peer.send_events([7]);
    let first = relay.next().await;
    let stored = relay.store.host(host.id()).await.unwrap().unwrap();
    assert_eq!((first.seq, stored.cursor), (7, Some(6)));
    // Another relay finds what that one would, had it died now.
    let (store, folder) = (relay.store.clone(), relay._folder.clone());
    let _after = Relay::start_on(Options::default(), store, folder, HashMap::new()).await;
    assert_eq!(pds.accept().await.cursor, Some(6));
}

/// Events of the one account that the log holds, by the host's numbers and its own.
fn durable<const N: usize>(events: [(i64, u64); N]) -> BTreeMap<i64, Durable> {
    let of_one = |(seq, log_seq)| {
        let durable = Durable {
            log_seq,
            did_hash: Did::normalized(DID).unwrap().hash64(),
            mark: Durable::mark(&identity_of(seq, DID)),
        };
        (seq, durable)
    };
    events.map(of_one).into()
}

/// It began anew while the relay was down, and is beyond the stored cursor: its events are other accounts', or later
/// ones of the same.
#[tokio::test]
async fn a_host_that_began_anew_beyond_the_cursor_is_known_by_its_events() {
    let of_another = |seq| identity_of(seq, "did:plc:bbbbbbbbbbbbbbbbbbbbbbbb");
    known_to_begin_anew(&of_another).await;
    known_to_begin_anew(&|seq| identity_at(seq, DID, "2026-01-02T00:00:00.000Z")).await;
}

async fn known_to_begin_anew(event: &dyn Fn(i64) -> Vec<u8>) {
    let mut pds = Pds::start().await;
    let (store, folder) = empty_store().await;
    let row = store
        .add_host(&NewHost::new(pds.name(), false, false))
        .await
        .unwrap();
    let recovered = RecoveredHost {
        cursor: Some(0),
        already_durable: durable([(1, 7), (2, 8), (3, 9)]),
    };
    let recovered = HashMap::from([(row.id, recovered)]);
    let mut relay = Relay::start_on(Options::default(), store, folder, recovered).await;
    let peer = pds.accept().await;
    assert_eq!(peer.cursor, Some(0));
    for seq in 1..=3 {
        peer.send(event(seq));
    }
    assert_eq!(relay.settle(3).await, [1, 2, 3]);
}

#[tokio::test]
async fn after_a_restart_it_resumes_from_the_stored_cursor_and_skips_what_is_durable() {
    let mut pds = Pds::start().await;
    let (store, folder) = empty_store().await;
    let row = store
        .add_host(&NewHost::new(pds.name(), false, false))
        .await
        .unwrap();
    let recovered = RecoveredHost {
        cursor: Some(40),
        already_durable: durable([(42, 7), (43, 8)]),
    };
    let mut relay = Relay::start_on(
        Options::default(),
        store,
        folder,
        HashMap::from([(row.id, recovered)]),
    )
    .await;
    let peer = pds.accept().await;
    assert_eq!(peer.cursor, Some(40));
    assert_eq!(relay.hosts.replay_floor(20), 7);
    peer.send_events(41..=44);
    let first = relay.next().await;
    assert_eq!((first.seq, relay.settle(1).await), (41, vec![44]));
    assert_eq!(
        relay.hosts.take_checkpoint(20).replay_from,
        7,
        "42 and 43 are above the cursor"
    );
    first.permit.settle(Settled::Durable { log_seq: 9 });
    let checkpoint = relay.hosts.take_checkpoint(20);
    assert_eq!(
        (checkpoint.cursors, checkpoint.replay_from),
        (vec![(row.id, 44)], 21)
    );
}

#[tokio::test]
async fn old_seqs_and_bad_dids_are_dropped_and_the_next_event_passes() {
    let (mut pds, mut relay) = (Pds::start().await, Relay::start().await);
    let host = relay.upstream.add(&pds.host()).await.unwrap();
    let peer = pds.accept().await;
    peer.send_events([10, 10, 7, 11]);
    peer.send(identity_of(12, "not a did"));
    peer.send(frame(ipld!({"op": 1, "t": "#novelty"}), ipld!({"x": 1})));
    peer.send(frame(ipld!({"op": 7, "t": "#identity"}), ipld!({})));
    peer.send(frame(
        ipld!({"op": 1, "t": "#identity"}),
        ipld!({"did": DID}),
    ));
    peer.send.send(Message::Text("hello".into())).unwrap();
    peer.send_events([13]);
    assert_eq!(relay.settle(3).await, [10, 11, 13]);
    assert_eq!(host.progress().cursor(), Some(13));
    let dropped = [
        (Rule::UpstreamSeq, 2),
        (Rule::DidSyntax, 1),
        (Rule::FrameFields, 1),
    ];
    assert_eq!(host.drops_by_rule(), dropped);
}

/// One account has one name: a spelling that others take for another account goes no further, and is settled.
#[tokio::test]
async fn dids_pass_in_their_one_spelling_only() {
    let (mut pds, mut relay) = (Pds::start().await, Relay::start().await);
    let host = relay.upstream.add(&pds.host()).await.unwrap();
    let peer = pds.accept().await;
    peer.send(identity_of(1, "did:web:Example.COM"));
    peer.send(identity_of(2, "did:web:example.com%3a80"));
    peer.send(identity_of(3, "did:plc:EWVI7NXZYOUN6ZHXRHS64OIZ"));
    peer.send(identity_of(4, "did:key:zQ3SHok"));
    assert_eq!(relay.next().await.did.as_str(), "did:key:zQ3SHok");
    peer.send(identity_of(5, "did:web:example.com%3A80"));
    assert_eq!(relay.next().await.did.as_str(), "did:web:example.com%3A80");
    assert_eq!(host.progress().cursor(), Some(5));
}

#[tokio::test]
async fn a_malformed_or_oversized_frame_closes_the_connection() {
    let (mut pds, mut relay) = (Pds::start().await, Relay::start().await);
    let host = relay.upstream.add(&pds.host()).await.unwrap();
    let third_value = [identity(2), vec![0xa0]].concat();
    let non_minimal = [
        vec![0xa2, 0x61, b't', 0x69],
        b"#identity".to_vec(),
        vec![0x62, b'o', b'p', 0x18, 0x01, 0xa0],
    ]
    .concat();
    let bad = [
        third_value,
        non_minimal,
        vec![],
        vec![0xff],
        // An event but for its length.
        padded_identity(6, 5_000_001),
    ];
    for (index, frame) in bad.into_iter().enumerate() {
        let mut peer = pds.accept().await;
        assert_eq!(
            peer.cursor,
            (index > 0).then_some(index as i64),
            "it resumes where it was"
        );
        peer.send_events([index as i64 + 1]);
        peer.send(frame);
        assert_eq!(relay.settle(1).await, [index as i64 + 1]);
        peer.closed().await;
    }
    let peer = pds.accept().await;
    let dropped = [(Rule::Frame, 4), (Rule::FrameTooLarge, 1)];
    assert_eq!(host.drops_by_rule(), dropped);
    peer.send(padded_identity(6, 4_999_900));
    assert_eq!(relay.settle(1).await, [6]);
    assert_eq!(host.gaps(), 0);
}

#[tokio::test]
async fn a_stream_that_stays_unreadable_is_taken_up_live_and_the_gap_is_recorded() {
    let (mut pds, mut relay) = (Pds::start().await, Relay::start().await);
    let host = relay.upstream.add(&pds.host()).await.unwrap();
    let peer = pds.accept().await;
    peer.send_events([1]);
    relay.settle(1).await;
    drop(peer);
    for _ in 0..5 {
        let mut peer = pds.accept().await;
        assert_eq!(peer.cursor, Some(1));
        peer.send(vec![0xff]);
        peer.closed().await;
    }
    let peer = pds.accept().await;
    assert_eq!((peer.cursor, host.gaps()), (None, 1));
    peer.send_events([50]);
    assert_eq!(relay.settle(1).await, [50]);
}

#[tokio::test]
async fn a_future_cursor_is_recorded_and_the_host_taken_up_live_without_a_hot_loop() {
    let mut pds = Pds::start().await;
    let (store, folder) = empty_store().await;
    let row = store
        .add_host(&NewHost::new(pds.name(), false, false))
        .await
        .unwrap();
    let recovered = RecoveredHost {
        cursor: Some(1_000),
        already_durable: durable([(1_001, 3)]),
    };
    let mut relay = Relay::start_on(
        Options::default(),
        store,
        folder,
        HashMap::from([(row.id, recovered)]),
    )
    .await;
    let host = relay.hosts.get(row.id).unwrap();
    let peer = pds.accept().await;
    assert_eq!(peer.cursor, Some(1_000));
    peer.send(error("FutureCursor"));
    let peer = pds.accept().await;
    assert_eq!(
        (peer.cursor, host.gaps(), host.status()),
        (None, 1, HostStatus::Idle)
    );
    relay.until_stored(&host, HostStatus::Idle).await;
    peer.send_events([1, 2]);
    assert_eq!(relay.settle(2).await, [1, 2]);
    assert_eq!(
        (relay.hosts.take_moved_cursors(), host.status()),
        (vec![(row.id, 2)], HostStatus::Active)
    );
    drop(peer);
    assert_eq!(pds.accept().await.cursor, Some(2));
}

#[tokio::test]
async fn a_host_that_always_says_future_cursor_is_tried_ever_less_often() {
    let backoff = Backoff {
        initial: Duration::from_millis(50),
        maximum: Duration::from_secs(60),
        ..Backoff::default()
    };
    let (mut pds, relay) = (
        Pds::start().await,
        Relay::start_with(UpstreamOptions {
            backoff,
            ..upstream_options()
        })
        .await,
    );
    relay.upstream.add(&pds.host()).await.unwrap();
    let started = Instant::now();
    for _ in 0..4 {
        let peer = pds.accept().await;
        assert_eq!(peer.cursor, None);
        peer.send(error("FutureCursor"));
    }
    pds.accept().await;
    // At least half of 50, 100, 200 and 400 ms.
    assert!(
        started.elapsed() >= Duration::from_millis(375),
        "{:?}",
        started.elapsed()
    );
}

#[tokio::test]
async fn an_outdated_cursor_is_recorded_and_the_stream_goes_on() {
    let mut pds = Pds::start().await;
    let (store, folder) = empty_store().await;
    let row = store
        .add_host(&NewHost::new(pds.name(), false, false))
        .await
        .unwrap();
    let recovered = RecoveredHost {
        cursor: Some(10),
        ..RecoveredHost::default()
    };
    let mut relay = Relay::start_on(
        Options::default(),
        store,
        folder,
        HashMap::from([(row.id, recovered)]),
    )
    .await;
    let peer = pds.accept().await;
    // Said once or a hundred times, it is one gap.
    for _ in 0..40 {
        peer.send(info("OutdatedCursor"));
    }
    peer.send(info("SomethingElse"));
    peer.send_events([90, 91]);
    assert_eq!(relay.settle(2).await, [90, 91]);
    let host = relay.hosts.get(row.id).unwrap();
    assert_eq!((host.gaps(), host.progress().cursor()), (1, Some(91)));
    drop(peer);
    let peer = pds.accept().await;
    peer.send(info("OutdatedCursor"));
    peer.send_events([92]);
    assert_eq!(relay.settle(1).await, [92]);
    assert_eq!(host.gaps(), 2, "one for each connection");
}

#[tokio::test]
async fn a_host_that_numbers_anew_without_a_word_is_followed() {
    let (mut pds, mut relay) = (Pds::start().await, Relay::start().await);
    let host = relay.upstream.add(&pds.host()).await.unwrap();
    let peer = pds.accept().await;
    peer.send_events([500]);
    relay.settle(1).await;
    drop(peer);
    let peer = pds.accept().await;
    assert_eq!(peer.cursor, Some(500));
    peer.send_events([1, 2]);
    assert_eq!(relay.settle(2).await, [1, 2]);
    assert_eq!((host.gaps(), host.progress().cursor()), (1, Some(2)));
}

#[tokio::test]
async fn other_errors_of_a_host_end_the_connection_and_it_resumes() {
    let (mut pds, mut relay) = (Pds::start().await, Relay::start().await);
    relay.upstream.add(&pds.host()).await.unwrap();
    let mut peer = pds.accept().await;
    peer.send_events([1]);
    relay.settle(1).await;
    peer.send(error("ConsumerTooSlow"));
    peer.closed().await;
    assert_eq!(pds.accept().await.cursor, Some(1));
}

/// A proxy that names itself so for an hour must not cost the host its place for ever.
#[tokio::test]
async fn another_relay_is_refused_and_looked_at_again_later() {
    let mut pds = Pds::start_as("Indigo-Relay (ATPROTO-relay)", false).await;
    let mut relay = Relay::start_with(UpstreamOptions {
        refused_pause: Duration::from_millis(300),
        ..upstream_options()
    })
    .await;
    let host = relay.upstream.add(&pds.host()).await.unwrap();
    pds.accept().await.closed().await;
    let refused = Instant::now();
    until("it is refused", || host.state() == HostState::Refused).await;
    relay.until_stored(&host, HostStatus::Offline).await;
    assert!(!relay.hosts.is_banned(&pds.host()));
    pds.accept().await.closed().await;
    assert!(refused.elapsed() >= Duration::from_millis(250));
    *pds.server.lock().unwrap() = "fake-pds";
    until("it is connected", || host.is_connected()).await;
    let mut peer = pds.accept().await;
    while let Ok(later) = pds.peers.try_recv() {
        peer = later;
    }
    peer.send_events([7]);
    assert_eq!(relay.settle(1).await, [7]);
    relay.until_stored(&host, HostStatus::Active).await;
}

#[tokio::test]
async fn bytes_are_limited_beside_events_and_nothing_is_dropped() {
    let (mut pds, mut relay) = (Pds::start().await, Relay::start().await);
    let host = relay.upstream.add(&pds.host()).await.unwrap();
    let rates = RateOverrides {
        // The longest frame always fits, so this is 5 MB.
        bytes_per_hour: Some(1),
        ..RateOverrides::default()
    };
    relay.hosts.set_rates(host.id(), rates).await.unwrap();
    let stored = relay.store.host(host.id()).await.unwrap().unwrap();
    assert_eq!(stored.rates, rates);
    let peer = pds.accept().await;
    let long = |seq| {
        let body = ipld!({"seq": seq, "did": DID, "time": "t", "x": vec![0_u8; 1_800_000]});
        frame(ipld!({"op": 1, "t": "#identity"}), body)
    };
    for seq in 1..=3 {
        peer.send(long(seq));
    }
    assert_eq!(relay.settle(2).await, [1, 2]);
    until("it is held back", || {
        host.state() == HostState::HeldBack && host.status() == HostStatus::Throttled
    })
    .await;
    assert!(relay.events.is_empty());
    let rates = RateOverrides {
        bytes_per_hour: Some(10_000_000),
        ..RateOverrides::default()
    };
    relay.hosts.set_rates(host.id(), rates).await.unwrap();
    assert_eq!(relay.settle(1).await, [3]);
}

#[tokio::test]
async fn pings_and_texts_hold_up_their_own_host() {
    let limits = HostLimits {
        others_per_second: 10,
        ..HostLimits::default()
    };
    let settings = Settings {
        limits,
        ..Settings::default()
    };
    let mut relay = Relay::start_with(HostsOptions {
        settings,
        ..hosts_options()
    })
    .await;
    let (mut pds, mut other) = (Pds::start().await, Pds::start().await);
    relay.upstream.add(&pds.host()).await.unwrap();
    relay.upstream.add(&other.host()).await.unwrap();
    let (peer, other) = (pds.accept().await, other.accept().await);
    let started = Instant::now();
    for _ in 0..20 {
        peer.send.send(Message::Ping("x".into())).unwrap();
        peer.send.send(Message::Text("x".into())).unwrap();
    }
    peer.send_events([7]);
    other.send_events([1]);
    assert_eq!(relay.settle(2).await, [1, 7]);
    assert!(
        started.elapsed() > Duration::from_millis(1_500),
        "{:?}",
        started.elapsed()
    );
}

/// How long a message in fragments becomes is known at its end: no more than that counts.
#[tokio::test]
async fn a_message_in_fragments_counts_with_its_bytes() {
    let mut relay = Relay::start().await;
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let name = listener.local_addr().unwrap().to_string();
    let host = HostName::parse(&format!("http://{name}"), &Guard::new(true)).unwrap();
    let host = relay.upstream.add(&host).await.unwrap();
    let rates = RateOverrides {
        // Room for the longest frame, which a message in fragments may become, and a little.
        bytes_per_hour: Some(5_500_000),
        ..RateOverrides::default()
    };
    relay.hosts.set_rates(host.id(), rates).await.unwrap();
    let (stream, _) = within("it connects", listener.accept()).await.unwrap();
    let stream = tokio_tungstenite::accept_async(stream).await.unwrap();
    let mut stream = stream.into_inner();
    for seq in 1..=3 {
        let body = ipld!({"seq": seq, "did": DID, "time": "t", "x": vec![0_u8; 100_000]});
        let message = frame(ipld!({"op": 1, "t": "#identity"}), body);
        let (first, rest) = message.split_at(80_000);
        for (opcode, part) in [(0x02, first), (0x80, rest)] {
            stream.write_all(&[opcode, 127]).await.unwrap();
            let length = (part.len() as u64).to_be_bytes();
            stream.write_all(&length).await.unwrap();
            stream.write_all(part).await.unwrap();
        }
    }
    assert_eq!(relay.settle(3).await, [1, 2, 3]);
}

/// Only an answer of the host itself may say what a message is: one whose end never comes is none.
#[tokio::test]
async fn a_message_that_does_not_end_ends_the_connection() {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let name = listener.local_addr().unwrap().to_string();
    let relay = Relay::start_with(UpstreamOptions {
        message_timeout: Duration::from_millis(100),
        ..upstream_options()
    })
    .await;
    let host = HostName::parse(&format!("http://{name}"), &Guard::new(true)).unwrap();
    relay.upstream.add(&host).await.unwrap();
    for _ in 0..2 {
        let (stream, _) = within("it connects", listener.accept()).await.unwrap();
        let mut stream = tokio_tungstenite::accept_async(stream)
            .await
            .unwrap()
            .into_inner();
        // The beginning of a message of five bytes.
        stream.write_all(&[0x82, 5, 0xa0]).await.unwrap();
        let mut rest = Vec::new();
        within("it closes", stream.read_to_end(&mut rest))
            .await
            .unwrap();
    }
}

/// The first fragment of a message, longer than what a host has of its own.
fn first_fragment() -> Vec<u8> {
    let mut bytes = vec![0x02, 127, 0, 0, 0, 0, 0, 1, 0x86, 0xa0];
    bytes.resize(bytes.len() + 100_000, 0xa0);
    bytes
}

/// Nor do pings give it time, held back by whatever limit: it has memory that other hosts need.
#[tokio::test]
async fn pings_within_a_message_do_not_prolong_it() {
    let many_empty = [0x89, 0].repeat(1_000);
    let too_long_for_an_hour = vec![0x89, 1, 0];
    for (pings, bytes_per_hour) in [
        (many_empty, None),
        // The longest frame always fits, and takes all of this.
        (too_long_for_an_hour, Some(1)),
    ] {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let name = listener.local_addr().unwrap().to_string();
        let relay = Relay::start_with(UpstreamOptions {
            message_timeout: Duration::from_millis(100),
            ..upstream_options()
        })
        .await;
        let host = HostName::parse(&format!("http://{name}"), &Guard::new(true)).unwrap();
        let host = relay.upstream.add(&host).await.unwrap();
        let rates = RateOverrides {
            bytes_per_hour,
            ..RateOverrides::default()
        };
        relay.hosts.set_rates(host.id(), rates).await.unwrap();
        let (stream, _) = within("it connects", listener.accept()).await.unwrap();
        let stream = tokio_tungstenite::accept_async(stream).await.unwrap();
        let (mut answers, mut stream) = stream.into_inner().into_split();
        stream.write_all(&first_fragment()).await.unwrap();
        until("it is given memory", || relay.hosts.memory().shared > 0).await;
        let pinging = tokio::spawn(async move { while stream.write_all(&pings).await.is_ok() {} });
        let closed = async {
            while answers
                .read(&mut [0; 4096])
                .await
                .is_ok_and(|read| read > 0)
            {}
        };
        within("it closes", closed).await;
        until("the memory is given back", || {
            relay.hosts.memory().shared == 0
        })
        .await;
        pinging.await.unwrap();
    }
}

/// Fragments without a byte cost time, and no limit counts them.
#[tokio::test]
async fn a_message_of_empty_fragments_ends_the_connection() {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let name = listener.local_addr().unwrap().to_string();
    let relay = Relay::start().await;
    let host = HostName::parse(&format!("http://{name}"), &Guard::new(true)).unwrap();
    relay.upstream.add(&host).await.unwrap();
    for opcode in [0x01, 0x02] {
        let (stream, _) = within("it connects", listener.accept()).await.unwrap();
        let stream = tokio_tungstenite::accept_async(stream).await.unwrap();
        let mut stream = stream.into_inner();
        stream.write_all(&[opcode, 0]).await.unwrap();
        stream.write_all(&[0, 0].repeat(1_000)).await.unwrap();
        let mut rest = Vec::new();
        // What of it was not read resets the connection.
        within("it closes", stream.read_to_end(&mut rest))
            .await
            .ok();
    }
}

/// A host that numbers anew waits for its own events, which may wait for long, with no memory that others need.
#[tokio::test]
async fn a_host_that_waits_for_its_own_events_gives_memory_back() {
    let mut relay = Relay::start_with(UpstreamOptions {
        message_timeout: Duration::from_millis(100),
        ..upstream_options()
    })
    .await;
    let mut pds = Pds::start().await;
    relay.upstream.add(&pds.host()).await.unwrap();
    let peer = pds.accept().await;
    peer.send_events([500]);
    let open = relay.next().await;
    drop(peer);
    let long = |seq| {
        let body = ipld!({"seq": seq, "did": DID, "time": "t", "x": vec![0_u8; 100_000]});
        frame(ipld!({"op": 1, "t": "#identity"}), body)
    };
    let mut peer = pds.accept().await;
    peer.send(long(1));
    peer.closed().await;
    assert_eq!(relay.hosts.memory().shared, 0);
    open.permit.settle(Settled::Dropped);
    pds.accept().await.send(long(1));
    assert_eq!(relay.settle(1).await, [1]);
}

/// Whatever a host's connection waits for, the operator does not wait with it.
#[tokio::test]
async fn a_ban_is_answered_while_the_host_waits_for_memory() {
    let memory = MemoryLimits {
        shared: 1_000,
        ..MemoryLimits::default()
    };
    let mut relay = Relay::start_with(HostsOptions {
        settings: Settings {
            memory,
            ..Settings::default()
        },
        ..hosts_options()
    })
    .await;
    let mut pds = Pds::start().await;
    let host = relay.upstream.add(&pds.host()).await.unwrap();
    let mut peer = pds.accept().await;
    let long = |seq| {
        let body = ipld!({"seq": seq, "did": DID, "time": "t", "x": vec![0_u8; 100_000]});
        frame(ipld!({"op": 1, "t": "#identity"}), body)
    };
    for seq in 1..=3 {
        peer.send(long(seq));
    }
    let held = [relay.next().await, relay.next().await];
    until("it waits for memory", || relay.hosts.memory().waiting == 1).await;
    assert!(relay.hosts.memory().short_for.is_some());
    let banned = Instant::now();
    relay.upstream.ban(host.id()).await.unwrap();
    assert!(banned.elapsed() < Duration::from_secs(2));
    peer.closed().await;
    assert!(host.is_banned());
    assert_eq!(relay.hosts.memory().waiting, 0);
    drop(held);
    assert_eq!(relay.hosts.memory().shared, 0);
}

#[tokio::test]
async fn what_is_dropped_is_counted_by_rule_with_an_example() {
    let (mut pds, mut relay) = (Pds::start().await, Relay::start().await);
    let host = relay.upstream.add(&pds.host()).await.unwrap();
    let peer = pds.accept().await;
    peer.send_events([10, 10, 7]);
    peer.send(identity_of(12, "not a\ndid"));
    peer.send(frame(
        ipld!({"op": 1, "t": "#identity"}),
        ipld!({"seq": "x"}),
    ));
    peer.send_events([13]);
    assert_eq!(relay.settle(2).await, [10, 13]);
    let drops = host.drops();
    let counts: Vec<_> = drops
        .iter()
        .map(|drops| (drops.rule, drops.count))
        .collect();
    assert_eq!(
        counts,
        [
            (Rule::UpstreamSeq, 2),
            (Rule::DidSyntax, 1),
            (Rule::FrameFields, 1)
        ]
    );
    assert_eq!(
        (drops[0].example.did.as_str(), drops[0].example.seq),
        (DID, Some(10))
    );
    assert_eq!(drops[1].example.did, "not a\ndid");
}

#[tokio::test]
async fn rate_limits_hold_the_socket_back_and_drop_nothing() {
    let (mut pds, mut relay) = (Pds::start().await, Relay::start().await);
    let host = relay.upstream.add(&pds.host()).await.unwrap();
    let rates = RateOverrides {
        per_second: Some(40),
        ..RateOverrides::default()
    };
    relay.hosts.set_rates(host.id(), rates).await.unwrap();
    let peer = pds.accept().await;
    let started = Instant::now();
    peer.send_events(1..=100);
    assert_eq!(relay.settle(100).await, (1..=100).collect::<Vec<_>>());
    assert!(
        started.elapsed() > Duration::from_millis(1_200),
        "{:?}",
        started.elapsed()
    );
}

#[tokio::test]
async fn a_raised_limit_is_in_force_at_once() {
    let (mut pds, mut relay) = (Pds::start().await, Relay::start().await);
    let host = relay.upstream.add(&pds.host()).await.unwrap();
    let rates = RateOverrides {
        per_day: Some(10),
        ..RateOverrides::default()
    };
    relay.hosts.set_rates(host.id(), rates).await.unwrap();
    let peer = pds.accept().await;
    peer.send_events(1..=30);
    relay.settle(10).await;
    until("it is held back", || {
        host.state() == HostState::HeldBack && host.status() == HostStatus::Throttled
    })
    .await;
    assert!(relay.events.is_empty());
    relay
        .hosts
        .set_rates(host.id(), RateOverrides::default())
        .await
        .unwrap();
    assert_eq!(relay.settle(20).await, (11..=30).collect::<Vec<_>>());
    assert_eq!(
        (host.state(), host.status()),
        (HostState::Connected, HostStatus::Active)
    );
}

#[tokio::test]
async fn what_is_under_way_is_bounded_per_host() {
    let in_flight = InFlightLimits {
        events: 5,
        ..InFlightLimits::default()
    };
    let (mut pds, mut relay) = (
        Pds::start().await,
        Relay::start_with(HostsOptions {
            in_flight,
            ..hosts_options()
        })
        .await,
    );
    let host = relay.upstream.add(&pds.host()).await.unwrap();
    let peer = pds.accept().await;
    peer.send_events(1..=12);
    let mut held = Vec::new();
    for _ in 0..5 {
        held.push(relay.next().await);
    }
    assert_eq!(host.progress().in_flight().0, 5);
    assert!(
        tokio::time::timeout(Duration::from_millis(100), relay.events.next())
            .await
            .is_err()
    );
    held.pop().unwrap().permit.settle(Settled::Dropped);
    assert_eq!(relay.next().await.seq, 6);
    assert_eq!(host.progress().cursor(), Some(0), "the first event is open");
}

#[tokio::test]
async fn a_host_that_is_away_is_offline_and_still_tried() {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    drop(listener);
    let relay = Relay::start().await;
    let name = HostName::parse(&format!("http://{address}"), &Guard::new(true)).unwrap();
    let host = relay.upstream.add(&name).await.unwrap();
    until("it is offline", || host.state() == HostState::Offline).await;
    relay.until_stored(&host, HostStatus::Offline).await;
    let listener = tokio::net::TcpListener::bind(address).await.unwrap();
    let mut pds = Pds::serve(listener, "fake-pds", false);
    let _peer = pds.accept().await;
    until("it is active", || {
        host.status() == HostStatus::Active && host.is_connected()
    })
    .await;
    relay.until_stored(&host, HostStatus::Active).await;
}

#[tokio::test]
async fn a_banned_host_is_closed_and_refused_until_the_ban_is_lifted() {
    let (mut pds, mut relay) = (Pds::start().await, Relay::start().await);
    let host = relay.upstream.add(&pds.host()).await.unwrap();
    let mut peer = pds.accept().await;
    peer.send_events([1]);
    relay.settle(1).await;
    relay.upstream.ban(host.id()).await.unwrap();
    peer.closed().await;
    assert_eq!(
        (host.state(), relay.stored_status(&host).await),
        (HostState::Banned, HostStatus::Banned)
    );
    assert!(matches!(
        relay.upstream.add(&pds.host()).await,
        Err(AddError::Banned(_))
    ));
    relay.upstream.unban(host.id()).await.unwrap();
    assert_eq!(pds.accept().await.cursor, Some(1));
    assert_eq!(relay.stored_status(&host).await, HostStatus::Active);
}

/// Whoever asks for a crawl of the host all the time does not get in between.
#[tokio::test]
async fn a_ban_holds_whatever_is_asked_meanwhile() {
    let (mut pds, relay) = (Pds::start().await, Relay::start().await);
    let host = relay.upstream.add(&pds.host()).await.unwrap();
    let (upstream, name) = (relay.upstream.clone(), pds.host());
    let asking = tokio::spawn(async move {
        loop {
            upstream.add(&name).await.ok();
            tokio::task::yield_now().await;
        }
    });
    for seq in 1..=5 {
        let peer = pds.accept().await;
        peer.send_events([seq]);
        relay.upstream.ban(host.id()).await.unwrap();
        let mut peers = vec![peer];
        while let Ok(peer) = pds.peers.try_recv() {
            peers.push(peer);
        }
        for mut peer in peers {
            peer.send.send(Message::Binary(identity(seq).into())).ok();
            peer.closed().await;
        }
        assert_eq!(
            (
                host.state(),
                host.status(),
                relay.stored_status(&host).await
            ),
            (HostState::Banned, HostStatus::Banned, HostStatus::Banned)
        );
        relay.upstream.unban(host.id()).await.unwrap();
    }
    asking.abort();
}

#[tokio::test]
async fn a_banned_domain_closes_its_hosts_and_refuses_new_ones() {
    let (mut pds, relay) = (Pds::start().await, Relay::start().await);
    let host = relay.upstream.add(&pds.host()).await.unwrap();
    let mut peer = pds.accept().await;
    assert!(relay.upstream.ban_domain("127.0.0.1").await.unwrap());
    peer.closed().await;
    assert_eq!(host.state(), HostState::Banned);
    let other = Pds::start().await;
    assert!(matches!(
        relay.upstream.add(&other.host()).await,
        Err(AddError::Banned(_))
    ));
    assert!(relay.upstream.unban_domain("127.0.0.1").await.unwrap());
    pds.accept().await;
}

#[tokio::test]
async fn banned_hosts_and_domains_are_not_dialled_at_the_start() {
    let (mut banned, mut below) = (Pds::start().await, Pds::start().await);
    let (store, folder) = empty_store().await;
    let row = store
        .add_host(&NewHost::new(banned.name(), false, false))
        .await
        .unwrap();
    store
        .set_host_status(row.id, HostStatus::Banned)
        .await
        .unwrap();
    let name = format!("localhost:{}", below.port);
    store
        .add_host(&NewHost::new(name, false, false))
        .await
        .unwrap();
    let banned_domains = vec![DomainPattern::banned("localhost").unwrap()];
    let relay = Relay::start_on(
        HostsOptions {
            settings: Settings {
                banned_domains,
                ..Settings::default()
            },
            ..hosts_options()
        },
        store,
        folder,
        HashMap::new(),
    )
    .await;
    assert!(
        relay
            .hosts
            .list()
            .iter()
            .all(|host| host.state() == HostState::Banned)
    );
    tokio::time::sleep(Duration::from_millis(50)).await;
    assert!(banned.peers.try_recv().is_err() && below.peers.try_recv().is_err());
}

#[tokio::test]
async fn hosts_are_pinged_and_silence_ends_the_connection() {
    let timing = UpstreamOptions {
        ping_interval: Duration::from_millis(20),
        idle_timeout: Duration::from_millis(100),
        ..upstream_options()
    };
    let (mut pds, relay) = (Pds::start().await, Relay::start_with(timing.clone()).await);
    let host = relay.upstream.add(&pds.host()).await.unwrap();
    let mut peer = pds.accept().await;
    for _ in 0..10 {
        let message = within("a ping comes", peer.received.recv()).await.unwrap();
        assert!(matches!(message, Message::Ping(_)), "{message:?}");
    }
    assert!(host.is_connected(), "pongs keep it");

    let mut deaf = Pds::start_as("fake-pds", true).await;
    relay.upstream.add(&deaf.host()).await.unwrap();
    let _first = deaf.accept().await;
    deaf.accept().await;
}

#[tokio::test]
async fn pings_of_a_host_are_answered() {
    let (mut pds, relay) = (Pds::start().await, Relay::start().await);
    relay.upstream.add(&pds.host()).await.unwrap();
    let mut peer = pds.accept().await;
    peer.send
        .send(Message::Ping("are you there".into()))
        .unwrap();
    let answer = within("the pong comes", peer.received.recv())
        .await
        .unwrap();
    assert_eq!(answer, Message::Pong("are you there".into()));
}

#[tokio::test]
async fn going_down_closes_connections_and_moves_no_cursor_past_what_was_given_up() {
    let (mut pds, mut relay) = (Pds::start().await, Relay::start().await);
    let host = relay.upstream.add(&pds.host()).await.unwrap();
    let mut peer = pds.accept().await;
    peer.send_events([1, 2]);
    relay.settle(1).await;
    let given_up = relay.next().await;
    within("the hosts close", relay.upstream.shutdown()).await;
    drop(given_up);
    peer.closed().await;
    assert_eq!(
        (host.progress().cursor(), host.state()),
        (Some(1), HostState::Stopped)
    );
    assert!(
        relay
            .upstream
            .add(&Pds::start().await.host())
            .await
            .is_ok_and(|host| host.state() == HostState::Stopped)
    );
}

#[tokio::test]
async fn quotas_follow_trust_and_can_be_changed() {
    let trusted_domains = vec![DomainPattern::trusted("localhost").unwrap()];
    let relay = Relay::start_with(HostsOptions {
        settings: Settings {
            trusted_domains,
            ..Settings::default()
        },
        ..hosts_options()
    })
    .await;
    let (one, other) = (Pds::start().await, Pds::start().await);
    let plain = relay.upstream.add(&one.host()).await.unwrap();
    let name = HostName::parse(&format!("localhost:{}", other.port), &Guard::new(true)).unwrap();
    let trusted = relay.upstream.add(&name).await.unwrap();
    assert_eq!(
        (plain.account_limit(), trusted.account_limit()),
        (100, 10_000_000)
    );
    let mut is_trusted = Vec::new();
    for host in [&trusted, &plain] {
        is_trusted.push(relay.store.host(host.id()).await.unwrap().unwrap().trusted);
    }
    assert_eq!(is_trusted, [true, false]);
    relay
        .hosts
        .set_account_limit(plain.id(), 5_000)
        .await
        .unwrap();
    assert_eq!(
        (plain.account_limit(), plain.event_rates().per_hour),
        (5_000, 7_500)
    );
    assert_eq!(
        relay
            .store
            .host(plain.id())
            .await
            .unwrap()
            .unwrap()
            .account_limit,
        5_000
    );
}

#[tokio::test]
async fn sync11_is_remembered_in_the_database() {
    let (pds, relay) = (Pds::start().await, Relay::start().await);
    let host = relay.upstream.add(&pds.host()).await.unwrap();
    host.mark_sync11();
    within("it is stored", async {
        while !relay.store.host(host.id()).await.unwrap().unwrap().sync11 {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    })
    .await;
}
