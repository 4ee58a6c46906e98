//! The firehose from outside: WebSocket clients of another make over real sockets.

use std::net::SocketAddr;
use std::time::{Duration, Instant, SystemTime};

use crate::support::event::{DEADLINE, Event, RunningLog, eventually, quick_folder};
use atproto_relay::atproto::did::Did;
use atproto_relay::atproto::frame::{self, Message as FrameMessage};
use atproto_relay::client::Cidr;
use atproto_relay::config::Config;
use atproto_relay::dial::PRODUCT;
use atproto_relay::eventlog::LogOptions;
use atproto_relay::firehose::socket::stream::{
    self, Accepted, Batch, Closing, Offer, Opening, Source, SourceError, Stream,
};
use atproto_relay::firehose::socket::{Server, close_codes};
use atproto_relay::firehose::{self, Firehose, FirehoseOptions, SUBSCRIBE_REPOS};
use atproto_relay::http::ServerOptions;
use futures_util::{SinkExt, StreamExt};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::sync::{Notify, watch};
use tokio::time::timeout;
use tokio_tungstenite::tungstenite::client::IntoClientRequest;
use tokio_tungstenite::tungstenite::protocol::Message;
use tokio_tungstenite::tungstenite::protocol::frame::coding::CloseCode;
use tokio_tungstenite::tungstenite::{Error, http};
use tokio_tungstenite::{MaybeTlsStream, WebSocketStream, client_async, connect_async};
use tokio_util::sync::CancellationToken;

/// Longer than any event stays.
const LONG: Duration = Duration::from_secs(1_000_000);

type Client = WebSocketStream<MaybeTlsStream<TcpStream>>;

/// A served log.
struct Relay {
    running: RunningLog,
    firehose: Firehose,
    addr: SocketAddr,
    _folder: tempfile::TempDir,
}

impl Relay {
    async fn start(options: FirehoseOptions) -> Relay {
        Relay::with(options, 64 * 1024).await
    }

    async fn with(options: FirehoseOptions, segment_bytes: u64) -> Relay {
        Relay::behind(ServerOptions::default(), options, segment_bytes).await
    }

    async fn behind(
        listening: ServerOptions,
        options: FirehoseOptions,
        segment_bytes: u64,
    ) -> Relay {
        let folder = quick_folder();
        let running = RunningLog::open(LogOptions {
            segment_bytes,
            ..LogOptions::new(folder.path())
        });
        let firehose = Firehose::new(running.log.clone(), options);
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let addr = listener.local_addr().expect("an address");
        tokio::spawn(atproto_relay::http::serve(
            listener,
            firehose::router(firehose.clone()),
            listening,
            CancellationToken::new(),
        ));
        Relay {
            running,
            firehose,
            addr,
            _folder: folder,
        }
    }

    fn url(&self, query: &str) -> String {
        format!("ws://{}{SUBSCRIBE_REPOS}{query}", self.addr)
    }

    async fn connect(&self, query: &str) -> Client {
        connect_async(self.url(query))
            .await
            .expect("a subscription")
            .0
    }

    /// A subscription on a bare socket: the handshake is done, what follows is the test's.
    async fn connect_raw(&self, query: &str) -> TcpStream {
        let mut socket = TcpStream::connect(self.addr).await.expect("a connection");
        let request = format!(
            "GET {SUBSCRIBE_REPOS}{query} HTTP/1.1\r\nHost: relay\r\nConnection: Upgrade\r\n\
             Upgrade: websocket\r\nSec-WebSocket-Version: 13\r\n\
             Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
        );
        socket.write_all(request.as_bytes()).await.expect("sends");
        let mut head = Vec::new();
        while !head.ends_with(b"\r\n\r\n") {
            head.push(socket.read_u8().await.expect("an answer"));
        }
        let head = String::from_utf8(head).expect("text");
        assert!(head.starts_with("HTTP/1.1 101 "), "{head}");
        assert!(head.contains("s3pPLMBiTxaQ9kYGzzhZRbK+xOo="), "{head}");
        socket
    }

    fn append(&self, events: &[Event]) {
        self.running.append(events);
    }

    async fn await_consumers(&self, count: usize) {
        let start = Instant::now();
        while self.firehose.consumers().len() != count {
            assert!(start.elapsed() < DEADLINE, "never {count} consumers");
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    }

    /// Waits until every consumer has been given all events and waits for the next.
    async fn await_live(&self) {
        let start = Instant::now();
        let next = self.running.log.head() + 1;
        while self
            .firehose
            .consumers()
            .list()
            .iter()
            .any(|consumer| consumer.position != next)
        {
            assert!(start.elapsed() < DEADLINE, "consumers never came to {next}");
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    }
}

fn events(count: i64) -> Vec<Event> {
    (1..=count)
        .map(|n| Event::identity(n as u64 % 3, (n as usize * 37) % 400, n))
        .collect()
}

/// The next message, pings and pongs left out.
async fn message(client: &mut Client) -> Option<Result<Message, Error>> {
    loop {
        let next = timeout(DEADLINE, client.next())
            .await
            .expect("a message in time");
        match next {
            Some(Ok(Message::Ping(_) | Message::Pong(_))) => {}
            other => return other,
        }
    }
}

async fn frame_bytes(client: &mut Client) -> Vec<u8> {
    match message(client).await {
        Some(Ok(Message::Binary(bytes))) => bytes.to_vec(),
        other => panic!("instead of a frame: {other:?}"),
    }
}

async fn assert_events(client: &mut Client, from: u64, events: &[Event]) {
    for (seq, event) in (from..).zip(events) {
        assert!(
            frame_bytes(client).await == event.frame(seq).0,
            "event {seq}"
        );
    }
}

async fn assert_closed(client: &mut Client, code: CloseCode) {
    match message(client).await {
        Some(Ok(Message::Close(Some(close)))) => assert_eq!(close.code, code),
        other => panic!("instead of a close: {other:?}"),
    }
    assert!(message(client).await.is_none(), "the connection ends");
}

/// The name in an error frame.
async fn error_name(client: &mut Client) -> String {
    let bytes = frame_bytes(client).await;
    match frame::decode(&bytes).expect("a frame").message {
        FrameMessage::Error(error) => error.error.to_owned(),
        _ => panic!("not an error frame"),
    }
}

#[tokio::test]
async fn every_cursor_gets_exactly_its_suffix_and_then_the_live_events() {
    let relay = Relay::start(FirehoseOptions::default()).await;
    let all = events(60);
    relay.append(&all[..40]);
    let mut clients = vec![(1, relay.connect("?cursor=0").await)];
    clients.push((41, relay.connect("").await));
    for cursor in 1..=41 {
        clients.push((cursor, relay.connect(&format!("?cursor={cursor}")).await));
    }
    relay.await_consumers(43).await;
    relay.await_live().await;
    for batch in all[40..].chunks(3) {
        relay.append(batch);
    }
    for (from, client) in &mut clients {
        assert_events(client, *from, &all[*from as usize - 1..]).await;
    }
    let consumers = relay.firehose.consumers();
    let metrics = consumers.metrics();
    let (admitted, refused) = (metrics.admitted.get(), metrics.refused.get());
    assert_eq!((consumers.len(), admitted, refused), (43, 43, 0));
    let sent: u64 = clients.iter().map(|(from, _)| 61 - from).sum();
    assert_eq!(metrics.events.get(), sent);
    let listed = relay.firehose.consumers().list();
    assert!(listed.iter().all(|consumer| consumer.position == 61));
    assert!(
        listed
            .iter()
            .all(|consumer| consumer.remote_addr.is_loopback())
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn joining_a_busy_stream_loses_and_doubles_nothing() {
    let relay = Relay::start(FirehoseOptions::default()).await;
    let all = events(4000);
    relay.append(&all[..500]);
    let sender = relay.running.sender.clone();
    let busy: Vec<Event> = all[500..].to_vec();
    let feeding = std::thread::spawn(move || {
        for batch in busy.chunks(3) {
            let batch = batch
                .iter()
                .map(|event| event.append(event.upstream_seq))
                .collect();
            sender.send(batch).expect("the sequencer runs");
        }
    });
    let readers = (0..12).map(|n| {
        let url = relay.url(&format!("?cursor={}", n * 40 + 1));
        let all = all.clone();
        tokio::spawn(async move {
            let mut client = connect_async(url).await.expect("a subscription").0;
            assert_events(&mut client, n * 40 + 1, &all[n as usize * 40..]).await;
        })
    });
    for reader in readers.collect::<Vec<_>>() {
        reader.await.expect("a reader got everything");
    }
    feeding.join().expect("the feeder ends");
}

#[tokio::test]
async fn a_lone_event_and_a_huge_one_arrive() {
    let relay = Relay::start(FirehoseOptions::default()).await;
    let mut client = relay.connect("").await;
    relay.await_consumers(1).await;
    relay.await_live().await;
    for (seq, length) in (1..).zip([0, 60, 65_400, 65_536, 4_900_000, 5]) {
        let event = Event::identity(1, length, seq);
        relay.append(std::slice::from_ref(&event));
        assert_events(&mut client, seq as u64, &[event]).await;
    }
}

#[tokio::test]
async fn what_goes_out_is_the_log_as_it_lies() {
    let relay = Relay::start(FirehoseOptions::default()).await;
    let all = events(200);
    relay.append(&all);
    let mut raw = relay.connect_raw("?cursor=0").await;
    let expected: Vec<u8> = (1..)
        .zip(&all)
        .flat_map(|(seq, event)| event.wire(seq))
        .collect();
    let mut heard = vec![0; expected.len()];
    timeout(DEADLINE, raw.read_exact(&mut heard))
        .await
        .expect("in time")
        .expect("the events");
    assert!(heard == expected);
}

#[tokio::test]
async fn an_outdated_cursor_is_told_and_gets_the_oldest() {
    let relay = Relay::start(FirehoseOptions::default()).await;
    let all = events(1000);
    relay.append(&all);
    relay
        .running
        .log
        .trim(Instant::now() + LONG, SystemTime::now() + LONG);
    let oldest = relay.running.log.oldest().expect("events");
    assert!(oldest > 1);
    for cursor in [1, oldest - 1] {
        let mut client = relay.connect(&format!("?cursor={cursor}")).await;
        let info = frame_bytes(&mut client).await;
        match frame::decode(&info).expect("a frame").message {
            FrameMessage::Info(info) => assert_eq!(info.name, "OutdatedCursor"),
            _ => panic!("not an info frame"),
        }
        assert_events(&mut client, oldest, &all[oldest as usize - 1..]).await;
    }
    for query in ["?cursor=0".to_owned(), format!("?cursor={oldest}")] {
        let mut client = relay.connect(&query).await;
        assert_events(&mut client, oldest, &all[oldest as usize - 1..]).await;
    }
}

#[tokio::test]
async fn cursors_of_the_future_and_nonsense_are_refused_in_the_stream() {
    let relay = Relay::start(FirehoseOptions::default()).await;
    relay.append(&events(10));
    let cases = [
        ("?cursor=12", "FutureCursor"),
        ("?cursor=99999999999999999999999999", "FutureCursor"),
        ("?cursor=", "InvalidRequest"),
        ("?cursor=-1", "InvalidRequest"),
        ("?cursor=ten", "InvalidRequest"),
    ];
    for (query, error) in cases {
        let mut client = relay.connect(query).await;
        assert_eq!(error_name(&mut client).await, error, "{query}");
        assert_closed(&mut client, CloseCode::Policy).await;
    }
    relay.await_consumers(0).await;
}

#[tokio::test]
async fn requests_that_are_no_subscription_are_answered() {
    let relay = Relay::start(FirehoseOptions::default()).await;
    let url = format!("http://{}{SUBSCRIBE_REPOS}", relay.addr);
    let http = atproto_relay::dial::plain_client();
    let plain = http.get(&url).send().await.expect("an answer");
    assert_eq!(plain.status(), 426);
    assert_eq!(plain.headers()["upgrade"], "websocket");
    assert_eq!(plain.headers()["server"], PRODUCT);
    let body: serde_json::Value = plain.json().await.expect("JSON");
    assert_eq!(body["error"], "InvalidRequest");
    let post = http.post(&url).send().await.expect("an answer");
    assert_eq!(
        (post.status().as_u16(), &post.headers()["allow"]),
        (405, &"GET".parse().expect("a header"))
    );
    assert_eq!(
        http.delete(&url).send().await.expect("an answer").status(),
        405
    );

    let (_client, response) = connect_async(relay.url("")).await.expect("a subscription");
    assert_eq!(response.status(), 101);
    assert_eq!(response.headers()["server"], PRODUCT);
}

#[tokio::test]
async fn places_are_limited_in_total_and_per_address() {
    let options = FirehoseOptions {
        max_consumers: 5,
        max_consumers_per_ip: 2,
        ..FirehoseOptions::default()
    };
    let relay = Relay::start(options).await;
    let connect = async |from: &str| {
        let mut request = relay.url("").into_client_request().expect("a request");
        let from = from.parse().expect("a header");
        request.headers_mut().insert("x-forwarded-for", from);
        connect_async(request).await.map(|(client, _)| client)
    };
    let refused = |result: Result<Client, Error>| match result {
        Err(Error::Http(response)) => response.status(),
        other => panic!("not refused: {other:?}"),
    };
    let first = connect("192.0.2.1").await.expect("a place");
    let _second = connect("6.6.6.6, 192.0.2.1").await.expect("a place");
    assert_eq!(
        refused(connect("192.0.2.1").await),
        http::StatusCode::TOO_MANY_REQUESTS
    );
    let _others = [
        connect("192.0.2.2").await.expect("a place"),
        connect("192.0.2.3").await.expect("a place"),
        connect("2001:db8::1").await.expect("a place"),
    ];
    assert_eq!(
        refused(connect("192.0.2.9").await),
        http::StatusCode::SERVICE_UNAVAILABLE
    );
    drop(first);
    relay.await_consumers(4).await;
    let _again = connect("192.0.2.1")
        .await
        .expect("the place that came free");
    assert_eq!(relay.firehose.consumers().metrics().refused.get(), 2);
}

/// Subscribes from one of this machine's addresses, as a proxy there does for a client.
async fn subscribe_from(
    peer: &str,
    relay: SocketAddr,
    headers: &[(&'static str, &str)],
) -> Result<WebSocketStream<TcpStream>, http::StatusCode> {
    let socket = TcpSocket::new_v4().expect("a socket");
    socket
        .bind(format!("{peer}:0").parse().expect("an address"))
        .expect("an address of this machine");
    let stream = socket.connect(relay).await.expect("a connection");
    let url = format!("ws://{relay}{SUBSCRIBE_REPOS}");
    let mut request = url.into_client_request().expect("a request");
    for (name, value) in headers {
        let value = value.parse().expect("a header");
        request.headers_mut().append(*name, value);
    }
    match client_async(request, stream).await {
        Ok((client, _)) => Ok(client),
        Err(Error::Http(response)) => Err(response.status()),
        Err(error) => panic!("{error}"),
    }
}

fn networks(texts: &[&str]) -> Vec<Cidr> {
    let list = format!("trusted_proxies = {texts:?}");
    let file = tempfile::NamedTempFile::new().expect("a file");
    std::fs::write(file.path(), list).expect("writes");
    let flags = atproto_relay::config::Flags {
        config: Some(file.path().to_owned()),
        ..Default::default()
    };
    let loaded = Config::load(&flags, &Default::default());
    loaded.expect("networks").config.trusted_proxies
}

#[tokio::test]
async fn a_proxy_speaks_for_its_clients_where_it_is_trusted() {
    let folder = tempfile::tempdir().expect("a folder");
    let config = Config {
        listen: ([127, 0, 0, 1], 0).into(),
        metrics_listen: ([127, 0, 0, 1], 0).into(),
        data_dir: folder.path().join("data"),
        trusted_proxies: networks(&["127.0.0.8/29"]),
        ..Config::default()
    };
    let relay = atproto_relay::relay::Relay::start(config.clone())
        .await
        .expect("a relay");
    let address = relay.public_addr();
    let subscribe = async |peer: &'static str, n: usize| {
        let client = format!("198.51.100.{n}");
        subscribe_from(peer, address, &[("x-forwarded-for", &client)]).await
    };
    let mut consumers = Vec::new();
    for n in 1..=60 {
        consumers.push(subscribe("127.0.0.9", n).await.expect("a client each"));
    }
    // Others may say what they like: they are one client.
    for n in 1..=50 {
        consumers.push(subscribe("127.0.0.1", n).await.expect("within the limit"));
    }
    let refused = subscribe("127.0.0.1", 51).await.err();
    assert_eq!(refused, Some(http::StatusCode::TOO_MANY_REQUESTS));
    let listed = relay.firehose().consumers().list();
    let from = |address: &str| {
        let address = address.parse::<std::net::IpAddr>().expect("an address");
        listed.iter().filter(|it| it.remote_addr == address).count()
    };
    assert_eq!((from("198.51.100.60"), from("127.0.0.1")), (1, 50));
    // From the next request on.
    relay
        .reload(Config {
            trusted_proxies: networks(&["127.0.0.1", "127.0.0.9"]),
            ..config
        })
        .await;
    consumers.push(subscribe("127.0.0.1", 51).await.expect("a client each"));
    drop(consumers);
    relay.shutdown().await;
}

#[tokio::test]
async fn nobody_is_somebody_else_by_a_header_that_the_proxy_does_not_set() {
    let options = FirehoseOptions {
        max_consumers_per_ip: 1,
        ..FirehoseOptions::default()
    };
    let relay = Relay::start(options).await;
    let subscribe = async |headers: &[(&'static str, &str)]| {
        subscribe_from("127.0.0.1", relay.addr, headers).await
    };
    const LIST: &str = "x-forwarded-for";
    let cases: [(&[(&'static str, &str)], &str); 7] = [
        (&[(LIST, "192.0.2.1")], "192.0.2.1"),
        (&[("forwarded", "for=192.0.2.2;proto=https")], "192.0.2.2"),
        (
            &[("forwarded", r#"for=6.6.6.6, For="[2001:db8::7]:4711""#)],
            "2001:db8::7",
        ),
        (
            &[(LIST, "192.0.2.3"), ("forwarded", "for=192.0.2.3")],
            "192.0.2.3",
        ),
        // A proxy that sets the one passes on what its client wrote into the other.
        (
            &[(LIST, "192.0.2.4"), ("forwarded", "for=6.6.6.6")],
            "127.0.0.1",
        ),
        (&[(LIST, "192.0.2.5, unknown")], "127.0.0.1"),
        (&[("forwarded", "for=_hidden")], "127.0.0.1"),
    ];
    for (headers, expected) in cases {
        let consumer = subscribe(headers).await.expect("a place");
        relay.await_consumers(1).await;
        let again = subscribe(headers).await.err();
        assert_eq!(again, Some(http::StatusCode::TOO_MANY_REQUESTS));
        let listed = relay.firehose.consumers().list();
        assert_eq!(listed[0].remote_addr.to_string(), expected, "{headers:?}");
        drop(consumer);
        relay.await_consumers(0).await;
    }
}

#[tokio::test]
async fn the_holder_of_an_ipv6_site_cannot_take_all_places() {
    let options = FirehoseOptions {
        max_consumers: 100,
        max_consumers_per_ip: 2,
        ..FirehoseOptions::default()
    };
    let relay = Relay::start(options).await;
    let subscribe = async |client: String| {
        subscribe_from("127.0.0.1", relay.addr, &[("x-forwarded-for", &client)]).await
    };
    let mut consumers = Vec::new();
    for network in 0..8 {
        let client = format!("2001:db8:0:{network:x}::1");
        consumers.push(subscribe(client).await.expect("a place"));
    }
    // One /64 of the same /48 more, that has nobody connected.
    let refused = subscribe("2001:db8:0:ff::1".into()).await.err();
    assert_eq!(refused, Some(http::StatusCode::TOO_MANY_REQUESTS));
    let elsewhere = subscribe("2001:db8:1::1".into()).await;
    consumers.push(elsewhere.expect("a place for another site"));
    consumers.push(subscribe("192.0.2.1".into()).await.expect("a place"));
}

#[tokio::test]
async fn pings_are_answered_while_events_flow_and_while_none_do() {
    let relay = Relay::start(FirehoseOptions::default()).await;
    relay.append(&events(500));
    let mut client = relay.connect("?cursor=0").await;
    for round in 0..5 {
        client
            .send(Message::Ping(format!("ping {round}").into()))
            .await
            .expect("sends");
        client
            .send(Message::Text("are you there?".into()))
            .await
            .expect("sends");
        client
            .send(Message::Binary(vec![7; 100_000].into()))
            .await
            .expect("sends");
        loop {
            match timeout(DEADLINE, client.next())
                .await
                .expect("an answer in time")
            {
                Some(Ok(Message::Pong(payload))) => {
                    assert_eq!(payload, format!("ping {round}"));
                    break;
                }
                Some(Ok(Message::Binary(_))) => {}
                other => panic!("instead of a pong: {other:?}"),
            }
        }
    }
}

/// A ping that comes due while a consumer has half of an event waits for the other half.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn pings_come_between_whole_frames() {
    let options = FirehoseOptions {
        ping_interval: Duration::from_millis(20),
        ..FirehoseOptions::default()
    };
    let relay = Relay::with(options, 256 << 20).await;
    // Some are longer than what a socket holds.
    let lengths = [10, 4_900_000, 4_900_000, 4_900_000, 4_900_000];
    let all: Vec<_> = (1..)
        .zip(lengths)
        .map(|(n, length)| Event::identity(1, length, n))
        .collect();
    relay.append(&all);
    let mut client = relay.connect("?cursor=0").await;
    await_stuck(&relay);
    assert_events(&mut client, 1, &all).await;
}

#[tokio::test]
async fn the_relay_pings_and_cuts_who_never_answers() {
    let options = FirehoseOptions {
        ping_interval: Duration::from_millis(20),
        idle_timeout: Duration::from_millis(400),
        ..FirehoseOptions::default()
    };
    let relay = Relay::start(options).await;
    let mut silent = relay.connect_raw("").await;
    let mut answering = relay.connect("").await;
    let started = Instant::now();
    let mut pings = 0;
    while started.elapsed() < Duration::from_millis(1200) {
        match timeout(DEADLINE, answering.next())
            .await
            .expect("a ping in time")
        {
            Some(Ok(Message::Ping(_))) => pings += 1,
            other => panic!("instead of a ping: {other:?}"),
        }
    }
    assert!(pings > 10, "{pings} pings");
    let mut heard = Vec::new();
    timeout(DEADLINE, silent.read_to_end(&mut heard))
        .await
        .expect("cut in time")
        .expect("an end");
    assert!(heard.starts_with(&[0x89, 0x00, 0x89, 0x00]), "{heard:x?}");
    relay.await_consumers(1).await;
}

#[tokio::test]
async fn a_close_is_answered() {
    let relay = Relay::start(FirehoseOptions::default()).await;
    relay.append(&events(5));
    let mut raw = relay.connect_raw("?cursor=6").await;
    let code = [0x03 ^ 0x11, 0xe9 ^ 0x22];
    raw.write_all(&[0x88, 0x82, 0x11, 0x22, 0x33, 0x44, code[0], code[1]])
        .await
        .expect("sends");
    let mut heard = Vec::new();
    timeout(DEADLINE, raw.read_to_end(&mut heard))
        .await
        .expect("ends in time")
        .expect("an end");
    assert_eq!(heard, [0x88, 0x02, 0x03, 0xe9]);

    let mut client = relay.connect("?cursor=0").await;
    client.close(None).await.expect("closes");
    while message(&mut client)
        .await
        .is_some_and(|message| message.is_ok())
    {}
    relay.await_consumers(0).await;
}

#[tokio::test]
async fn garbage_is_closed_with_1002_and_disturbs_nobody() {
    let relay = Relay::start(FirehoseOptions::default()).await;
    let all = events(50);
    let mut good = relay.connect("").await;
    relay.await_consumers(1).await;
    relay.await_live().await;
    let garbage: [&[u8]; 6] = [
        b"GET / HTTP/1.1\r\n\r\n",
        &[0x81, 0x05, b'h', b'e', b'l', b'l', b'o'],
        &[0xff; 5000],
        &[0x89, 0xfe, 0xff, 0xff, 0, 0, 0, 0],
        &[0x8b, 0x80, 0, 0, 0, 0],
        &[
            0x82, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 1, 2, 3, 4,
        ],
    ];
    for (bytes, event) in garbage.into_iter().zip(&all) {
        let mut raw = relay.connect_raw("").await;
        raw.write_all(bytes).await.expect("sends");
        raw.shutdown().await.expect("ends its side");
        let mut heard = Vec::new();
        timeout(DEADLINE, raw.read_to_end(&mut heard))
            .await
            .expect("ends in time")
            .expect("an end");
        assert_eq!(
            heard[..2],
            [0x88, heard.len() as u8 - 2],
            "{bytes:x?} got {heard:x?}"
        );
        assert_eq!(
            heard[2..4],
            1002u16.to_be_bytes(),
            "{bytes:x?} got {heard:x?}"
        );
        relay.append(std::slice::from_ref(event));
    }
    assert_events(&mut good, 1, &all[..garbage.len()]).await;
    relay.await_consumers(1).await;
}

#[tokio::test]
async fn who_never_reads_is_cut_and_others_get_everything() {
    let options = FirehoseOptions {
        write_timeout: Duration::from_millis(300),
        ..FirehoseOptions::default()
    };
    let relay = Relay::with(options, 256 << 20).await;
    let all: Vec<_> = (1..=400).map(|n| Event::identity(1, 60_000, n)).collect();
    relay.append(&all);
    let stuck = relay.connect_raw("?cursor=0").await;
    let mut client = relay.connect("?cursor=0").await;
    assert_events(&mut client, 1, &all).await;
    relay.await_consumers(1).await;
    drop(stuck);
}

/// Waits until a consumer's sockets are full, and its position stands. Returns it.
fn await_stuck(relay: &Relay) -> u64 {
    let mut position = 0;
    eventually("a stuck consumer", || {
        std::thread::sleep(Duration::from_millis(50));
        let now = relay.firehose.consumers().list()[0].position;
        std::mem::replace(&mut position, now) == now && now > 1
    });
    position
}

/// Reads events until the connection ends or the last one came; each must be one of `all`, whole, in order.
async fn read_some(client: &mut Client, all: &[Event]) -> Vec<u64> {
    let mut seqs = vec![];
    while seqs.last() != Some(&(all.len() as u64)) {
        let bytes = match message(client).await {
            Some(Ok(Message::Binary(bytes))) => bytes,
            _ => break,
        };
        let peeked = match frame::decode(&bytes).expect("a whole frame").message {
            FrameMessage::Identity(identity) => identity.seq as u64,
            _ => panic!("not an event of the test"),
        };
        assert!(seqs.last().is_none_or(|last| *last < peeked), "in order");
        assert!(
            bytes == all[peeked as usize - 1].frame(peeked).0,
            "event {peeked}"
        );
        seqs.push(peeked);
    }
    seqs
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_redaction_holds_for_who_is_stuck_and_corrupts_nothing_on_its_way() {
    let relay = Relay::with(FirehoseOptions::default(), 256 << 20).await;
    let all: Vec<_> = (1..=600)
        .map(|n| Event::identity(n as u64 % 2, 60_000, n))
        .collect();
    relay.append(&all);
    let mut client = relay.connect("?cursor=0").await;
    let stuck_at = await_stuck(&relay);
    let account = Did::parse(&all[0].did).expect("a DID");
    relay.running.log.redact(&account, 600).expect("redacts");
    eventually("the punching", || {
        relay.running.log.redactions_pending() == 0
    });
    let seqs = read_some(&mut client, &all).await;
    let of_the_account = seqs.iter().rev().find(|seq| *seq % 2 == 1);
    assert!(of_the_account.is_none_or(|last| *last <= stuck_at));
    match seqs.last() {
        Some(600) => assert!((stuck_at / 2 + 1..=300).all(|half| seqs.contains(&(half * 2)))),
        // Cut in the middle of a frame of the account: it says so to nobody, and the consumer comes again.
        last => assert_eq!(last, Some(&(stuck_at - 1)), "stuck at {stuck_at}"),
    }
    let mut again = relay.connect("?cursor=1").await;
    let seqs = read_some(&mut again, &all).await;
    assert_eq!(seqs, (1..=300).map(|half| half * 2).collect::<Vec<_>>());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn consumers_in_backfill_get_whole_events_while_accounts_are_redacted() {
    let relay = Relay::start(FirehoseOptions::default()).await;
    let all: Vec<_> = (1..=3000)
        .map(|n| Event::identity(n as u64 % 20, (n as usize * 37) % 4000, n))
        .collect();
    for batch in all.chunks(100) {
        relay.append(batch);
    }
    let readers: Vec<_> = (0..6)
        .map(|_| {
            let (url, all) = (relay.url("?cursor=0"), all.clone());
            tokio::spawn(async move {
                let mut client = connect_async(url).await.expect("a subscription").0;
                read_some(&mut client, &all).await
            })
        })
        .collect();
    let log = relay.running.log.clone();
    let dids: Vec<_> = all[1..11].iter().map(|event| event.did.clone()).collect();
    let redacting = tokio::task::spawn_blocking(move || {
        for did in dids {
            log.redact(&Did::parse(&did).expect("a DID"), 3000)
                .expect("redacts");
        }
    });
    for reader in readers {
        // Some are cut in the middle of a frame that is redacted; none sees anything but events.
        reader.await.expect("only whole events");
    }
    redacting.await.expect("redacts");
    let mut after = relay.connect("?cursor=0").await;
    let seqs = read_some(&mut after, &all).await;
    let kept = (1..=3000).filter(|seq| !(2..12).contains(&(seq % 20)));
    assert_eq!(seqs, kept.collect::<Vec<u64>>());
}

/// A listener that loses its patience soon and has room for two.
async fn impatient() -> Relay {
    let listening = ServerOptions {
        max_connections: 2,
        head_timeout: Duration::from_millis(200),
        ..ServerOptions::default()
    };
    Relay::behind(listening, FirehoseOptions::default(), 64 * 1024).await
}

#[tokio::test]
async fn who_does_not_finish_a_request_is_cut_and_consumers_are_not() {
    let relay = impatient().await;
    let mut consumer = relay.connect("").await;
    relay.await_consumers(1).await;
    relay.await_live().await;
    for head in ["", "GET", "GET / HTTP/1.1\r\nHost: rel"] {
        let mut slow = TcpStream::connect(relay.addr).await.expect("a connection");
        slow.write_all(head.as_bytes()).await.expect("sends");
        let mut heard = Vec::new();
        // With an answer or a reset: it ends.
        let ended = timeout(DEADLINE, slow.read_to_end(&mut heard)).await;
        assert!(ended.is_ok(), "still open after {head:?}");
    }
    let event = Event::identity(1, 10, 1);
    relay.append(std::slice::from_ref(&event));
    assert_events(&mut consumer, 1, &[event]).await;
}

#[tokio::test]
async fn connections_that_ask_for_nothing_hold_up_others_for_a_moment_only() {
    let relay = impatient().await;
    let mut idle = Vec::new();
    for _ in 0..6 {
        idle.push(TcpStream::connect(relay.addr).await.expect("a connection"));
    }
    let mut consumers = Vec::new();
    // More than there are places for requests: who has become a consumer takes none.
    for _ in 0..4 {
        let consumer = timeout(DEADLINE, relay.connect("")).await;
        consumers.push(consumer.expect("served in the end"));
    }
    relay.await_consumers(4).await;
}

/// A request on a connection that stays open, up to the end of its answer's head.
async fn ask(socket: &mut TcpStream, request: &str) -> String {
    socket.write_all(request.as_bytes()).await.expect("sends");
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        head.push(socket.read_u8().await.expect("an answer"));
    }
    String::from_utf8(head).expect("text")
}

#[tokio::test]
async fn idle_connections_make_room_and_busy_ones_do_not() {
    let done = std::sync::Arc::new(Notify::new());
    let finishing = done.clone();
    let slow = async move || finishing.notified().await;
    let echo = async |body: String| body;
    let router = axum::Router::new()
        .route("/", axum::routing::get(async || ()))
        .route("/slow", axum::routing::get(slow))
        .route("/echo", axum::routing::post(echo));
    let options = ServerOptions {
        max_connections: 4,
        // Nobody goes by himself.
        head_timeout: DEADLINE * 2,
        request_timeout: DEADLINE * 2,
        ..ServerOptions::default()
    };
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let addr = listener.local_addr().expect("an address");
    let closing = CancellationToken::new();
    let serving = atproto_relay::http::serve(listener, router, options, closing.clone());
    let serving = tokio::spawn(serving);
    let connect = async || TcpStream::connect(addr).await.expect("a connection");

    let mut busy = connect().await;
    busy.write_all(b"GET /slow HTTP/1.1\r\nhost: x\r\n\r\n")
        .await
        .expect("sends");
    // One that keeps its connection, one that never ends its request, one that says nothing.
    let mut idle = connect().await;
    let get = "GET / HTTP/1.1\r\nhost: x\r\n\r\n";
    assert!(ask(&mut idle, get).await.starts_with("HTTP/1.1 200 "));
    let mut endless = connect().await;
    let begun = "POST /echo HTTP/1.1\r\nhost: x\r\ncontent-length: 9\r\n\r\n";
    endless.write_all(begun.as_bytes()).await.expect("sends");
    let mut silent = connect().await;
    // Each of these is served at once and kept, and the longest wait ends for it.
    let mut served = Vec::new();
    for _ in 0..8 {
        let mut next = connect().await;
        let answer = timeout(DEADLINE, ask(&mut next, get)).await;
        assert!(answer.expect("served at once").starts_with("HTTP/1.1 200 "));
        served.push(next);
    }
    for gone in [&mut idle, &mut endless, &mut silent] {
        let ended = timeout(DEADLINE, gone.read_to_end(&mut Vec::new())).await;
        ended.expect("made room").unwrap_or_default();
    }
    done.notify_one();
    let mut answer = [0; 13];
    let answered = timeout(DEADLINE, busy.read_exact(&mut answer)).await;
    answered.expect("in time").expect("its answer");
    assert_eq!(&answer, b"HTTP/1.1 200 ");
    closing.cancel();
    let ended = timeout(DEADLINE, serving).await;
    ended.expect("ends in time").expect("ends");
}

#[tokio::test]
async fn a_flood_of_a_consumer_holds_up_nobody_but_itself() {
    const FLOOD_BYTES: usize = 64 << 20;
    let options = FirehoseOptions {
        max_consumer_input: 4 << 10,
        ..FirehoseOptions::default()
    };
    let counted = options.metrics.held_back.clone();
    let relay = Relay::start(options).await;
    let mut good = relay.connect("").await;
    let pings = [0x89, 0x80, 0, 0, 0, 0].repeat(10_000);
    let text = [&[0x81, 0xfe, 0x10, 0x00, 0, 0, 0, 0][..], &[b'x'; 4096]].concat();
    let binary = [&[0x82, 0xfe, 0x10, 0x00, 0, 0, 0, 0][..], &[0; 4096]].concat();
    let mut floods = Vec::new();
    for frames in [pings, text.repeat(16), binary.repeat(16)] {
        let mut socket = relay.connect_raw("").await;
        let sent = std::sync::Arc::new(std::sync::atomic::AtomicUsize::new(0));
        let count = sent.clone();
        let flooding = tokio::spawn(async move {
            while count.load(std::sync::atomic::Ordering::Relaxed) < FLOOD_BYTES {
                let written = socket.write(&frames).await.expect("is not cut");
                assert!(written > 0, "the relay reads");
                count.fetch_add(written, std::sync::atomic::Ordering::Relaxed);
            }
        });
        floods.push((sent, flooding));
    }
    relay.await_consumers(4).await;
    // What the sockets hold goes quickly, and then each flood stands still.
    let held_back = || counted.get();
    let held_before = held_back();
    let all = events(30);
    for (seq, event) in (1..).zip(&all) {
        relay.append(std::slice::from_ref(event));
        good.send(Message::Ping("here".into()))
            .await
            .expect("sends");
        assert_events(&mut good, seq, std::slice::from_ref(event)).await;
    }
    let started = Instant::now();
    while held_back() == held_before {
        assert!(started.elapsed() < DEADLINE, "nobody is held back");
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
    for (sent, mut flooding) in floods {
        let ended = timeout(Duration::from_millis(300), &mut flooding).await;
        let sent = sent.load(std::sync::atomic::Ordering::Relaxed);
        assert!(ended.is_err(), "all {sent} bytes of a flood were read");
        assert!(sent < FLOOD_BYTES / 2, "{sent} bytes");
        flooding.abort();
    }
    // Who has gone is found so by what is sent to it.
    while relay.firehose.consumers().len() > 1 {
        assert!(started.elapsed() < DEADLINE, "floods that ended stay");
        relay.append(&events(1));
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_falls_out_of_the_window_hears_consumer_too_slow() {
    let relay = Relay::with(FirehoseOptions::default(), 1 << 20).await;
    let all: Vec<_> = (1..=400).map(|n| Event::identity(1, 60_000, n)).collect();
    relay.append(&all);
    let mut client = relay.connect("?cursor=0").await;
    assert_events(&mut client, 1, &all[..1]).await;
    let position = await_stuck(&relay);
    relay
        .running
        .log
        .trim(Instant::now() + LONG, SystemTime::now() + LONG);
    assert!(relay.running.log.oldest().expect("events") > position);
    let mut next = 2;
    loop {
        let bytes = frame_bytes(&mut client).await;
        if let FrameMessage::Error(error) = frame::decode(&bytes).expect("a frame").message {
            assert_eq!(error.error, "ConsumerTooSlow");
            break;
        }
        assert!(
            bytes == all[next as usize - 1].frame(next).0,
            "event {next}"
        );
        next += 1;
    }
    assert!(next < 400);
    assert_closed(&mut client, CloseCode::Policy).await;
}

#[tokio::test]
async fn a_cold_log_is_served_like_a_warm_one() {
    let folder = tempfile::tempdir().expect("a folder");
    let all = events(3000);
    let running = RunningLog::open(LogOptions::new(folder.path()));
    running.append(&all);
    let firehose = Firehose::new(running.log.clone(), FirehoseOptions::default());
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let url = format!(
        "ws://{}{SUBSCRIBE_REPOS}?cursor=0",
        listener.local_addr().expect("an address")
    );
    tokio::spawn(atproto_relay::http::serve(
        listener,
        firehose::router(firehose),
        ServerOptions::default(),
        CancellationToken::new(),
    ));
    for entry in std::fs::read_dir(folder.path()).expect("the folder") {
        let file = std::fs::File::open(entry.expect("a file").path()).expect("a file");
        let advice = rustix::fs::Advice::DontNeed;
        rustix::fs::fadvise(&file, 0, None, advice).expect("the pages go");
    }
    let mut client = connect_async(url).await.expect("a subscription").0;
    assert_events(&mut client, 1, &all).await;
}

#[tokio::test]
async fn who_comes_and_goes_leaves_nothing_behind() {
    let relay = Relay::start(FirehoseOptions {
        max_consumers: 20,
        ..FirehoseOptions::default()
    })
    .await;
    let all = events(30);
    relay.append(&all);
    let mut steady = relay.connect("?cursor=0").await;
    for round in 0..300 {
        let connection = connect_async(relay.url("?cursor=0")).await;
        match (round % 2, connection) {
            (0, Ok((mut client, _))) => drop(client.next().await),
            (_, Ok((client, _))) => drop(client),
            (_, Err(Error::Http(refused))) => assert_eq!(refused.status(), 503),
            (_, Err(error)) => panic!("{error}"),
        }
    }
    assert_events(&mut steady, 1, &all).await;
    relay.await_consumers(1).await;
}

#[tokio::test]
async fn shutdown_says_service_restart() {
    let relay = Relay::start(FirehoseOptions::default()).await;
    let mut clients = [relay.connect("").await, relay.connect("?cursor=0").await];
    relay.await_consumers(2).await;
    let firehose = relay.firehose.clone();
    let shutdown = tokio::spawn(async move { firehose.shutdown().await });
    for client in &mut clients {
        assert_closed(client, CloseCode::Restart).await;
    }
    timeout(DEADLINE, shutdown)
        .await
        .expect("ends in time")
        .expect("ends");
    assert!(relay.firehose.consumers().is_empty());
    relay.running.close();
}

/// A stream of another kind: the number of each event as text, behind a prefix that the client sets.
#[derive(Debug, Clone)]
struct Numbers {
    head: watch::Receiver<u64>,
}

struct NumberSource {
    head: watch::Receiver<u64>,
    position: u64,
    prefix: String,
    /// The message that is being sent, and how much of it was.
    begun: Option<(Vec<u8>, usize)>,
}

impl Stream for Numbers {
    const NAME: &'static str = "numbers";
    type Parameters = bool;
    type Source = NumberSource;

    fn parameters(&self, query: Option<&str>) -> bool {
        query == Some("please")
    }

    async fn open(&self, polite: bool) -> Opening<NumberSource> {
        let source = NumberSource {
            head: self.head.clone(),
            position: 1,
            prefix: String::new(),
            begun: None,
        };
        let greeting = match polite {
            true => Ok(Some(stream::Message::Text("hello".into()))),
            false => Err(Closing::new(close_codes::POLICY, "say please")),
        };
        Opening { source, greeting }
    }
}

impl Source for NumberSource {
    const ACCEPTED: Accepted = Accepted {
        max_text_bytes: 10,
        max_binary_bytes: 0,
    };

    fn position(&self) -> u64 {
        self.position
    }

    fn offset(&self) -> usize {
        self.begun.as_ref().map_or(0, |(_, offset)| *offset)
    }

    fn events(&self) -> u64 {
        self.position - 1
    }

    fn offer(
        &mut self,
        _max: usize,
        write: impl FnOnce(Batch<'_>) -> std::io::Result<usize>,
    ) -> Result<Offer, SourceError> {
        if self.position > *self.head.borrow() {
            return Ok(Offer::Nothing);
        }
        let (frame, offset) = self.begun.get_or_insert_with(|| {
            let text = format!("{}{}", self.prefix, self.position);
            let header = [0x81, text.len() as u8];
            ([&header[..], text.as_bytes()].concat(), 0)
        });
        let run = self.position..self.position + 1;
        let written = write(Batch {
            slices: &[std::io::IoSlice::new(&frame[*offset..])],
            runs: std::slice::from_ref(&run),
        });
        let taken = match written {
            Ok(taken) => taken,
            Err(error) => return Ok(Offer::Refused(error)),
        };
        *offset += taken;
        if *offset == frame.len() {
            (self.position, self.begun) = (self.position + 1, None);
        }
        Ok(Offer::Taken(taken))
    }

    async fn warm(&mut self, _max: usize) -> Result<(), SourceError> {
        Ok(())
    }

    fn receive(&mut self, message: stream::Message) -> Result<(), Closing> {
        match message {
            stream::Message::Text(text) if text == "bye" => {
                let mut closing = Closing::new(close_codes::NORMAL, "you said bye");
                closing.last = Some(stream::Message::Binary(vec![1, 2, 3]));
                Err(closing)
            }
            stream::Message::Text(prefix) => {
                self.prefix = prefix;
                Ok(())
            }
            stream::Message::Binary(_) => panic!("the stream does not read these"),
        }
    }
}

async fn text(client: &mut Client) -> String {
    match message(client).await {
        Some(Ok(Message::Text(text))) => text.to_string(),
        other => panic!("instead of a text: {other:?}"),
    }
}

#[tokio::test]
async fn another_stream_brings_texts_and_reads_what_clients_send() {
    let (head, seen) = watch::channel(2);
    let server = Server::new(seen.clone(), FirehoseOptions::default());
    let (numbers, serving) = (Numbers { head: seen }, server.clone());
    let handler = move |request: axum::extract::Request| {
        let answer = serving.subscribe(&numbers, request);
        async { answer }
    };
    let router = axum::Router::new().route("/numbers", axum::routing::any(handler));
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let addr = listener.local_addr().expect("an address");
    let options = ServerOptions::default();
    tokio::spawn(atproto_relay::http::serve(
        listener,
        router,
        options,
        CancellationToken::new(),
    ));
    let url = format!("ws://{addr}/numbers");
    let connect = async |query: &str| {
        let connected = connect_async(format!("{url}{query}")).await;
        connected.expect("a subscription").0
    };

    let posted = atproto_relay::dial::plain_client().post(format!("http://{addr}/numbers"));
    let refused = posted.send().await.expect("an answer");
    let body: serde_json::Value = refused.json().await.expect("JSON");
    assert_eq!(body["message"], "numbers takes GET");
    assert_closed(&mut connect("").await, CloseCode::Policy).await;

    let mut client = connect("?please").await;
    for expected in ["hello", "1", "2"] {
        assert_eq!(text(&mut client).await, expected);
    }
    let skipped = Message::Binary(vec![7; 5_000].into());
    client.send(skipped).await.expect("sends");
    client
        .send(Message::Text("no. ".into()))
        .await
        .expect("sends");
    // The answer of a ping follows what was sent before it.
    client
        .send(Message::Ping("read?".into()))
        .await
        .expect("sends");
    match timeout(DEADLINE, client.next()).await.expect("in time") {
        Some(Ok(Message::Pong(_))) => {}
        other => panic!("instead of a pong: {other:?}"),
    }
    head.send_replace(3);
    assert_eq!(text(&mut client).await, "no. 3");
    client
        .send(Message::Text("bye".into()))
        .await
        .expect("sends");
    assert_eq!(frame_bytes(&mut client).await, [1, 2, 3]);
    assert_closed(&mut client, CloseCode::Normal).await;

    let mut client = connect("?please").await;
    let too_long = Message::Text("x".repeat(11).into());
    client.send(too_long).await.expect("sends");
    for expected in ["hello", "1", "2", "3"] {
        assert_eq!(text(&mut client).await, expected);
    }
    assert_closed(&mut client, CloseCode::Size).await;
}
