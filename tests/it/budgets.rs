//! Hosts that take what they can get, on real sockets, against a relay in a process of its own: memory stays within its
//! bound, and the events of others pass as if those hosts were not there.
#![cfg(feature = "devnet")]

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use atproto_relay::atproto::frame;
use atproto_relay::devnet::load::{ProcessOptions, RelayProcess, unlimited};
use atproto_relay::devnet::network::{Network, NetworkOptions};
use atproto_relay::devnet::pds::Pds;
use atproto_relay::devnet::scrape::Samples;
use atproto_relay::hosts::MemoryLimits;
use futures_util::StreamExt;
use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::time::timeout;
use tokio_tungstenite::connect_async;
use tokio_tungstenite::tungstenite::Message;
use tokio_tungstenite::tungstenite::handshake::derive_accept_key;

const PATIENCE: Duration = Duration::from_secs(60);
/// What an event of a good host may take, whatever others do.
const IN_TIME: Duration = Duration::from_secs(2);
/// Memory of a relay in which hosts have nothing under way, and what its buffers and its database take beside.
const PROGRAM_BYTES: u64 = 160_000_000;

/// What a hostile host does once the relay has subscribed.
#[derive(Clone, Copy, Debug)]
enum Deed {
    /// Events whose look-up never ends, as many as the relay takes.
    Park,
    /// One message of 4.7 MB whose last bytes never come.
    NeverFinish,
    /// The same in fragments.
    NeverFinishFragments,
    /// An error whose text looks like a line of the log.
    Forge,
    /// Pings, pongs and texts as fast as they go.
    Ping,
}

/// Hosts on ports of their own; counts the bytes the relay took from all of them.
struct Hostile {
    urls: Vec<String>,
    taken: Arc<AtomicUsize>,
    subscribed: Arc<AtomicUsize>,
}

impl Hostile {
    async fn start(count: usize, deed: Deed) -> Self {
        let (taken, subscribed) = (Arc::default(), Arc::default());
        let mut urls = Vec::new();
        for _ in 0..count {
            let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
            let port = listener.local_addr().unwrap().port();
            urls.push(format!("http://127.0.0.1:{port}"));
            let counts: (Arc<AtomicUsize>, Arc<AtomicUsize>) =
                (Arc::clone(&taken), Arc::clone(&subscribed));
            tokio::spawn(async move {
                while let Ok((stream, _)) = listener.accept().await {
                    tokio::spawn(serve(stream, port, deed, counts.clone()));
                }
            });
        }
        Self {
            urls,
            taken,
            subscribed,
        }
    }

    /// Waits until the relay has subscribed to all of them, and took what it takes.
    async fn until_at_work(&self) {
        let work = async {
            while self.subscribed.load(Ordering::Relaxed) < self.urls.len() {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
            let mut before = usize::MAX;
            while before != self.taken.load(Ordering::Relaxed) {
                before = self.taken.load(Ordering::Relaxed);
                tokio::time::sleep(Duration::from_millis(500)).await;
            }
        };
        timeout(PATIENCE, work).await.expect("all are at work");
    }
}

async fn serve(
    mut stream: TcpStream,
    port: u16,
    deed: Deed,
    (taken, subscribed): (Arc<AtomicUsize>, Arc<AtomicUsize>),
) -> std::io::Result<()> {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        if stream.read_buf(&mut head).await? == 0 {
            return Ok(());
        }
    }
    let head = String::from_utf8_lossy(&head).into_owned();
    let key = head.lines().find_map(|line| {
        let (name, value) = line.split_once(": ")?;
        name.eq_ignore_ascii_case("sec-websocket-key")
            .then_some(value)
    });
    let Some(key) = key else {
        // A look-up: it is never answered.
        return std::future::pending().await;
    };
    let accept = derive_accept_key(key.as_bytes());
    let answer = format!(
        "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\
         Sec-WebSocket-Accept: {accept}\r\n\r\n"
    );
    stream.write_all(answer.as_bytes()).await?;
    subscribed.fetch_add(1, Ordering::Relaxed);
    for turn in 0_i64.. {
        let Some(bytes) = deed.bytes(turn, port) else {
            return std::future::pending().await;
        };
        stream.write_all(&bytes).await?;
        taken.fetch_add(bytes.len(), Ordering::Relaxed);
    }
    Ok(())
}

impl Deed {
    /// What comes at this turn; `None` for silence.
    fn bytes(self, turn: i64, port: u16) -> Option<Vec<u8>> {
        const LONG: usize = 4_700_000;
        match self {
            Deed::Park => Some(message(0x82, &identity(turn + 1, port))),
            Deed::NeverFinish => (turn == 0).then(|| {
                let whole = message(0x82, &vec![0xa0; LONG]);
                whole[..whole.len() - 100].to_vec()
            }),
            Deed::NeverFinishFragments => (turn < 47).then(|| {
                let opcode = if turn == 0 { 0x02 } else { 0x00 };
                message(opcode, &vec![0xa0; LONG / 47])
            }),
            Deed::Forge => (turn == 0).then(|| {
                let text = "x\n2026-01-01T00:00:00Z ERROR atproto_relay: FAKE admin login\r\nFAKE";
                message(0x82, &frame::encode_error(text, Some(text)))
            }),
            Deed::Ping => Some(
                [
                    message(0x89, b"ping"),
                    message(0x8a, b""),
                    message(0x81, &[b'x'; 9_000]),
                ]
                .concat(),
            ),
        }
    }
}

/// A frame as a server sends it.
fn message(opcode: u8, payload: &[u8]) -> Vec<u8> {
    let mut bytes = vec![opcode];
    match payload.len() {
        length @ 0..126 => bytes.push(length as u8),
        length @ 126..65_536 => {
            bytes.push(126);
            bytes.extend((length as u16).to_be_bytes());
        }
        length => {
            bytes.push(127);
            bytes.extend((length as u64).to_be_bytes());
        }
    }
    bytes.extend(payload);
    bytes
}

/// An `#identity` whose document lies at the hostile host, which never gives it.
fn identity(seq: i64, port: u16) -> Vec<u8> {
    frame::encode_identity(&frame::Identity {
        seq,
        did: &format!("did:web:localhost%3A{port}"),
        time: &"t".repeat(1_000),
        handle: None,
    })
}

/// A relay with these hosts and a good one.
struct Scene {
    network: Network,
    relay: RelayProcess,
    hosts: usize,
    memory: MemoryLimits,
    _folder: tempfile::TempDir,
}

impl Scene {
    async fn start(hostile: &Hostile, memory: MemoryLimits) -> Self {
        let network = Network::start(NetworkOptions {
            pds: 1,
            ..NetworkOptions::default()
        })
        .await
        .unwrap();
        let folder = tempfile::tempdir().unwrap();
        let mut arguments = unlimited(1);
        let binary = relay_of_before();
        if binary.is_some() {
            let setting = "--limit-bytes-per-hour-per-account";
            if let Some(at) = arguments.iter().position(|argument| argument == setting) {
                arguments.drain(at..at + 2);
            }
        } else {
            arguments.extend([
                format!("--memory-per-host={}", memory.per_host).into(),
                format!("--memory-shared={}", memory.shared).into(),
                format!("--memory-parked={}", memory.parked).into(),
            ]);
        }
        let mut hosts: Vec<_> = network.all_pds().iter().map(Pds::url).collect();
        hosts.extend(hostile.urls.iter().cloned());
        let options = ProcessOptions {
            binary: binary.unwrap_or_else(|| env!("CARGO_BIN_EXE_atproto-relay").into()),
            folder: folder.path().to_owned(),
            plc: network.plc_url(),
            hosts,
            arguments,
        };
        Self {
            relay: RelayProcess::start(options, PATIENCE).await.unwrap(),
            network,
            hosts: hostile.urls.len() + 1,
            memory,
            _folder: folder,
        }
    }

    /// Twenty events a second of the good host, every tenth of them long; the longest time that one took.
    async fn good_events(&self, count: usize) -> Duration {
        let pds = self.network.pds(0);
        let url = format!(
            "{}/xrpc/com.atproto.sync.subscribeRepos?cursor=0",
            self.relay.firehose()
        );
        let (mut consumer, _) = connect_async(url).await.unwrap();
        let good = pds.create_account("good.pds1.test").unwrap().did;
        // Its identity, its account and its first commit, whatever they are: what is measured comes behind.
        let before = pds.events().len();
        let arrived = tokio::spawn(async move {
            let mut arrived = Vec::new();
            while arrived.len() < before + count {
                if let Message::Binary(_) = consumer.next().await.unwrap().unwrap() {
                    arrived.push(Instant::now());
                }
            }
            arrived
        });
        let mut sent = Vec::new();
        for turn in 0..count {
            let text = "x".repeat(if turn % 10 == 9 { 100_000 } else { 1_000 });
            let record = json!({"$type": "app.bsky.feed.post", "text": text, "createdAt": "2026-01-01T00:00:00Z"});
            sent.push(Instant::now());
            pds.create_record(&good, "app.bsky.feed.post", record)
                .unwrap();
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        let Ok(arrived) = timeout(PATIENCE, arrived).await else {
            return PATIENCE;
        };
        let arrived = arrived.unwrap();
        let delays = sent.iter().zip(&arrived[before..]);
        delays
            .map(|(sent, arrived)| arrived.saturating_duration_since(*sent))
            .max()
            .unwrap()
    }

    async fn samples(&self) -> Samples {
        Samples::scrape(&self.relay.metrics_url()).await.unwrap()
    }

    /// The most memory the relay may ever have taken.
    fn bound(&self) -> u64 {
        self.memory.bound(self.hosts) as u64 + PROGRAM_BYTES
    }

    fn report(&self, what: &str, slowest: Duration) {
        let usage = self.relay.usage();
        println!(
            "{what}, {} hosts: slowest event {:.2} s, memory {} MB (most {} MB, bound {} MB), {:.1} s of CPU",
            self.hosts,
            slowest.as_secs_f64(),
            usage.resident / 1_000_000,
            usage.resident_peak / 1_000_000,
            self.bound() / 1_000_000,
            usage.cpu_seconds,
        );
    }
}

/// Another relay to be measured, which knows no settings of memory: it is not held to anything.
fn relay_of_before() -> Option<PathBuf> {
    std::env::var_os("ATPROTO_RELAY_OF_BEFORE").map(PathBuf::from)
}

/// Little for all hosts together, so that few hosts are enough to take it.
const SMALL: MemoryLimits = MemoryLimits {
    per_host: 64 * 1024,
    shared: 32 * 1024 * 1024,
    parked: 8 * 1024 * 1024,
};

async fn others_pass(count: usize, deed: Deed, memory: MemoryLimits, events: usize) -> Scene {
    let hostile = Hostile::start(count, deed).await;
    let scene = Scene::start(&hostile, memory).await;
    hostile.until_at_work().await;
    let slowest = scene.good_events(events).await;
    scene.report(&format!("{deed:?}"), slowest);
    if relay_of_before().is_some() {
        return scene;
    }
    assert!(slowest < IN_TIME, "an event took {slowest:?}");
    let peak = scene.relay.usage().resident_peak;
    assert!(
        peak < scene.bound(),
        "{peak} bytes, more than {}",
        scene.bound()
    );
    scene
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn events_that_wait_for_look_ups_take_nothing_that_others_need() {
    let scene = others_pass(45, Deed::Park, SMALL, 60).await;
    let samples = scene.samples().await;
    let parked = samples.get("relay_upstream_memory_bytes{part=\"parked\"}");
    assert!(
        parked > 0.0 && parked <= (SMALL.parked + 46 * SMALL.per_host) as f64,
        "{parked}"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn messages_that_never_end_are_bounded_for_all_hosts_together() {
    let scene = others_pass(100, Deed::NeverFinish, SMALL, 40).await;
    assert!(
        scene
            .samples()
            .await
            .get("relay_upstream_memory_waits_total")
            > 0.0
    );
    drop(scene);
    others_pass(100, Deed::NeverFinishFragments, SMALL, 20).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn pings_and_texts_are_held_back() {
    let hostile = Hostile::start(4, Deed::Ping).await;
    let scene = Scene::start(&hostile, SMALL).await;
    hostile.until_at_work_for(Duration::from_secs(2)).await;
    let slowest = scene.good_events(20).await;
    scene.report("Ping", slowest);
    assert!(slowest < IN_TIME);
    // Twenty a second of each, and what the sockets buffer.
    let taken = hostile.taken.load(Ordering::Relaxed);
    assert!(taken < 60_000_000, "{taken} bytes were taken");
}

impl Hostile {
    async fn until_at_work_for(&self, time: Duration) {
        let all = async {
            while self.subscribed.load(Ordering::Relaxed) < self.urls.len() {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        };
        timeout(PATIENCE, all).await.expect("all are at work");
        tokio::time::sleep(time).await;
    }
}

/// What a host says is shown, and looks like nothing that the relay says.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_host_forges_no_log_lines() {
    let hostile = Hostile::start(1, Deed::Forge).await;
    let scene = Scene::start(&hostile, SMALL).await;
    let said = || scene.relay.said_in_all();
    let told = async {
        while !(said().contains("host lost") && said().contains("FAKE")) {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    timeout(PATIENCE, told)
        .await
        .unwrap_or_else(|_| panic!("{}", said()));
    for line in said().lines() {
        let is_ours = line.starts_with("20") && line.contains("Z  ") || line.contains("Z ERROR");
        assert!(
            is_ours && !line.starts_with("2026-01-01T00:00:00Z"),
            "{line}"
        );
    }
    let good = format!(
        "host=\"{}\"",
        scene.network.pds(0).url().trim_start_matches("http://")
    );
    let connected = said()
        .lines()
        .filter(|line| line.contains("host connected") && line.contains(&good))
        .count();
    assert_eq!(connected, 1, "{}", said());
}

// Many hosts and the settings as they are by default: minutes, and some gigabytes of sockets.
// `cargo test --release --locked --test it -- budgets --ignored --nocapture --test-threads=1`

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "takes long"]
async fn forty_five_hosts_that_park() {
    others_pass(45, Deed::Park, MemoryLimits::default(), 200).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "takes long"]
async fn a_thousand_hosts_that_park() {
    others_pass(1_000, Deed::Park, MemoryLimits::default(), 200).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "takes long"]
async fn twelve_hundred_hosts_that_never_finish() {
    others_pass(1_200, Deed::NeverFinish, MemoryLimits::default(), 200).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "takes long"]
async fn a_thousand_hosts_that_never_finish_fragments() {
    others_pass(
        1_000,
        Deed::NeverFinishFragments,
        MemoryLimits::default(),
        200,
    )
    .await;
}
