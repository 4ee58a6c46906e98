//! Restarts under the eyes of consumers: ended and killed, again and again, with traffic under way, the relay leaves every
//! consumer connected, and each gets every byte of every event once. `ATPROTO_KILLS=200` restarts more often than twenty
//! times.

#![cfg(feature = "devnet")]

use crate::support::kills;
use crate::support::postgres;
use crate::support::process;
use atproto_relay::dial::plain_client;
use std::ffi::OsString;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use crate::support::manager::Manager;
use crate::support::process::{HOSTS, PATIENCE, Traffic, all_once_and_in_order};
use atproto_relay::atproto::did::Did;
use atproto_relay::atproto::frame::{self, Peek};
use atproto_relay::devnet::network::{Network, NetworkOptions};
use atproto_relay::devnet::pds::Pds;
use atproto_relay::devnet::scrape::Samples;
use bytes::Bytes;
use rustix::process::Signal;
use serde_json::Value;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpSocket, TcpStream, UnixStream};
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio::time::{sleep, timeout};

/// How often the relay is restarted where nothing else is said.
const RESTARTS: u64 = 20;
/// The promise for a stop.
const LONGEST_STOP: Duration = Duration::from_secs(2);
/// Most descriptors that the service manager keeps.
const STORE: usize = 64;
/// Receive buffer of a slow consumer, and what it reads at a time: less than comes.
const SLOW_BUFFER: u32 = 8 << 10;
const SLOW_BYTES: usize = 7_001;
const SLOW_PAUSE: Duration = Duration::from_millis(25);
/// Bytes of text in a long post: a segment holds some eighty of them.
const LONG_POST: usize = 100_000;
/// What a still consumer reads.
const A_FEW: u64 = 3;

/// A relay under a service manager, and a network for it.
struct Service {
    manager: Manager,
    network: Network,
    _folder: tempfile::TempDir,
}

impl Service {
    async fn start(capacity: usize) -> Service {
        Service::start_with(capacity, &[]).await
    }

    async fn start_with(capacity: usize, arguments: &[&str]) -> Service {
        let network = Network::start(NetworkOptions {
            pds: HOSTS,
            ..NetworkOptions::default()
        });
        let network = network.await.unwrap();
        let folder = tempfile::tempdir().unwrap();
        let mut command: Vec<OsString> = [
            env!("CARGO_BIN_EXE_atproto-relay"),
            "serve",
            "--allow-private-hosts",
            "--log-level=info",
            "--log-segment-bytes=8MiB",
            "--identity-refresh-interval=1ms",
            "--limit-events-per-second=1000000",
            "--limit-events-per-hour=1000000",
            "--limit-events-per-day=1000000",
        ]
        .map(OsString::from)
        .to_vec();
        command.push(format!("--plc-host={}", network.plc_url()).into());
        let data = folder.path().join("data");
        command.push(format!("--data-dir={}", data.display()).into());
        command.extend(arguments.iter().map(OsString::from));
        let hosts = network.all_pds().iter().map(Pds::url);
        command.extend(hosts.map(|url| format!("--host={url}").into()));
        let mut manager = Manager::new(folder.path(), command, capacity);
        manager.start();
        let service = Service {
            manager,
            network,
            _folder: folder,
        };
        service.until_connected().await;
        service
    }

    /// Asks on the admin listener, which wants no password.
    async fn admin(&self, path: &str) -> Value {
        let mut socket = UnixStream::connect(self.manager.admin()).await.unwrap();
        let request = format!("GET {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n");
        socket.write_all(request.as_bytes()).await.unwrap();
        let mut answer = Vec::new();
        socket.read_to_end(&mut answer).await.unwrap();
        let answer = String::from_utf8(answer).unwrap();
        assert!(answer.starts_with("HTTP/1.1 200 "), "{answer}");
        serde_json::from_str(answer.split_once("\r\n\r\n").unwrap().1).unwrap()
    }

    async fn until_connected(&self) {
        let wait = async {
            loop {
                let hosts = self.admin("/admin/pds/list").await;
                let hosts = hosts.as_array().unwrap();
                if hosts.len() == HOSTS
                    && hosts.iter().all(|host| host["HasActiveConnection"] == true)
                {
                    return;
                }
                sleep(Duration::from_millis(10)).await;
            }
        };
        timeout(PATIENCE, wait).await.expect("hosts are connected");
    }

    /// Waits until so many consumers are in the store.
    fn until_kept(&self, consumers: usize) {
        self.manager.until_stored(|store| {
            let names = store
                .iter()
                .filter(|(name, _)| name.starts_with("consumer-"));
            names.count() == consumers
        });
    }
}

/// How a consumer behaves.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Manner {
    Fast,
    /// Its socket is always full.
    Slow,
    /// Reads a few events, and then nothing until it is to hurry.
    Still,
}

/// A consumer that stays on one connection, and pings when it likes, in pieces.
struct Consumer {
    name: String,
    seen: Arc<Mutex<Seen>>,
    last: watch::Receiver<u64>,
    hurry: Arc<AtomicBool>,
    task: JoinHandle<()>,
}

#[derive(Default)]
struct Seen {
    events: Vec<(u64, Bytes, Instant)>,
    /// Pings that were sent as a whole, and pongs that came.
    pings: u32,
    pongs: u32,
    /// Why it ended, which it never should by itself.
    ended: Option<String>,
}

impl Drop for Consumer {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Consumer {
    async fn connect(service: &Service, query: &str, manner: Manner, seed: u64) -> Consumer {
        let name = format!("{manner:?} consumer {seed} {query}");
        let socket = TcpSocket::new_v4().unwrap();
        if manner != Manner::Fast {
            socket.set_recv_buffer_size(SLOW_BUFFER).unwrap();
        }
        let mut socket = socket.connect(service.manager.public).await.unwrap();
        let request = format!(
            "GET /xrpc/com.atproto.sync.subscribeRepos{query} HTTP/1.1\r\nhost: x\r\nuser-agent: {name}\r\n\
             upgrade: websocket\r\nconnection: upgrade\r\nsec-websocket-version: 13\r\n\
             sec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
        );
        socket.write_all(request.as_bytes()).await.unwrap();
        let mut head = Vec::new();
        while !head.ends_with(b"\r\n\r\n") {
            head.push(socket.read_u8().await.unwrap());
        }
        let head = String::from_utf8(head).unwrap();
        assert!(head.starts_with("HTTP/1.1 101 "), "{head}");
        let (told, last) = watch::channel(0);
        let seen = Arc::<Mutex<Seen>>::default();
        let hurry = Arc::<AtomicBool>::default();
        let life = Life {
            seen: seen.clone(),
            told,
            manner,
            hurry: hurry.clone(),
            dice: fastrand::Rng::with_seed(seed),
        };
        let seen_by_task = seen.clone();
        let task = tokio::spawn(async move {
            let ended = life.live(socket).await;
            seen_by_task.lock().unwrap().ended = Some(ended);
        });
        Consumer {
            name,
            seen,
            last,
            hurry,
            task,
        }
    }

    /// Waits until this event has come.
    async fn has(&self, seq: u64) {
        let mut last = self.last.clone();
        let waited = timeout(PATIENCE, last.wait_for(|last| *last >= seq)).await;
        let ended = self.seen.lock().unwrap().ended.clone();
        assert!(
            waited.is_ok_and(|waited| waited.is_ok()),
            "{} is at {} of {seq}: {ended:?}",
            self.name,
            *self.last.borrow()
        );
    }

    fn last(&self) -> u64 {
        *self.last.borrow()
    }

    fn assert_connected(&self) {
        let ended = &self.seen.lock().unwrap().ended;
        assert!(ended.is_none(), "{}: {ended:?}", self.name);
    }

    /// Every event from its first one on, byte for byte as in the log.
    fn assert_complete(&self, all: &[(u64, Bytes)]) {
        self.assert_connected();
        let seen = self.seen.lock().unwrap();
        let first = seen.events.first().expect("an event").0;
        let from = all.iter().position(|(seq, _)| *seq == first).unwrap();
        let events = seen.events.iter().map(|(seq, frame, _)| (*seq, frame));
        let expected = all[from..].iter().map(|(seq, frame)| (*seq, frame));
        assert!(events.eq(expected), "{} has other events", self.name);
        assert!(
            seen.pings.abs_diff(seen.pongs) <= 1,
            "{}: {} pongs for {} pings",
            self.name,
            seen.pongs,
            seen.pings
        );
    }

    /// The longest time without an event that ends behind `since`.
    fn pause(&self, since: Instant) -> Duration {
        let seen = self.seen.lock().unwrap();
        let times: Vec<Instant> = seen.events.iter().map(|(_, _, at)| *at).collect();
        let from = times.partition_point(|at| *at <= since).saturating_sub(1);
        times[from..]
            .windows(2)
            .map(|pair| pair[1] - pair[0])
            .max()
            .unwrap_or_default()
    }
}

/// A consumer's side of its connection.
struct Life {
    seen: Arc<Mutex<Seen>>,
    told: watch::Sender<u64>,
    manner: Manner,
    hurry: Arc<AtomicBool>,
    dice: fastrand::Rng,
}

impl Life {
    /// Lives until the connection ends; why it did.
    async fn live(mut self, socket: TcpStream) -> String {
        let (mut reading, mut writing) = socket.into_split();
        let (pongs, ponged) = watch::channel(0_u32);
        let (seen, mut dice) = (self.seen.clone(), self.dice.fork());
        let (closing, mut closed) = watch::channel(false);
        let pinging = tokio::spawn(async move {
            let mut ponged = ponged;
            for number in 1.. {
                let frame = ping(number, &mut dice);
                // In pieces, some of which lie between two processes.
                let mut rest = &frame[..];
                while !rest.is_empty() {
                    let (piece, behind) = rest.split_at(dice.usize(1..=rest.len()));
                    if writing.write_all(piece).await.is_err() {
                        return;
                    }
                    rest = behind;
                    sleep(Duration::from_millis(dice.u64(0..60))).await;
                }
                seen.lock().unwrap().pings = number;
                tokio::select! {
                    _ = ponged.wait_for(|pongs| *pongs >= number) => {}
                    _ = closed.changed() => return,
                }
            }
        });
        let mut buffer = Vec::new();
        let ended = loop {
            let hurry = self.hurry.load(Ordering::Relaxed) || self.manner == Manner::Fast;
            if !hurry && self.manner == Manner::Still && *self.told.borrow() >= A_FEW {
                sleep(SLOW_PAUSE).await;
                continue;
            }
            let mut piece = vec![0; if hurry { 1 << 16 } else { SLOW_BYTES }];
            match reading.read(&mut piece).await {
                Ok(0) => break "end of the stream".to_owned(),
                Ok(count) => buffer.extend_from_slice(&piece[..count]),
                Err(error) => break error.to_string(),
            }
            if let Err(wrong) = self.hear(&mut buffer, &pongs) {
                break wrong;
            }
            if !hurry {
                sleep(SLOW_PAUSE).await;
            }
        };
        closing.send_replace(true);
        pinging.abort();
        ended
    }

    fn hear(&mut self, buffer: &mut Vec<u8>, pongs: &watch::Sender<u32>) -> Result<(), String> {
        while let Some((opcode, payload, length)) = server_frame(buffer)? {
            let payload = Bytes::copy_from_slice(&buffer[payload]);
            buffer.drain(..length);
            match opcode {
                0x82 => {
                    let seq = match frame::peek(&payload) {
                        Ok(Peek::Event(event)) => event.seq as u64,
                        _ => return Err(String::from_utf8_lossy(&payload).into_owned()),
                    };
                    self.seen
                        .lock()
                        .unwrap()
                        .events
                        .push((seq, payload, Instant::now()));
                    self.told.send_replace(seq);
                }
                0x89 => {}
                0x8a => {
                    let number = payload
                        .first_chunk()
                        .map(|chunk| u32::from_be_bytes(*chunk));
                    let expected = *pongs.borrow() + 1;
                    if number != Some(expected) {
                        return Err(format!(
                            "pong {payload:?} is not the one of ping {expected}"
                        ));
                    }
                    self.seen.lock().unwrap().pongs = expected;
                    pongs.send_replace(expected);
                }
                0x88 => return Err(format!("closed: {payload:?}")),
                other => return Err(format!("a frame with first byte {other:#x}")),
            }
        }
        Ok(())
    }
}

/// A masked ping with its number, and as many bytes more as the dice say.
fn ping(number: u32, dice: &mut fastrand::Rng) -> Vec<u8> {
    let mut payload = number.to_be_bytes().to_vec();
    payload.extend((0..dice.usize(0..=121)).map(|_| dice.u8(..)));
    let mask = dice.u32(..).to_be_bytes();
    let mut frame = vec![0x89, 0x80 | payload.len() as u8];
    frame.extend(mask);
    let masked = payload.iter().zip(mask.iter().cycle());
    frame.extend(masked.map(|(byte, key)| byte ^ key));
    frame
}

/// The first whole frame of a server: its first byte, where its payload lies, and its length.
fn server_frame(bytes: &[u8]) -> Result<Option<(u8, std::ops::Range<usize>, usize)>, String> {
    let [first, second, rest @ ..] = bytes else {
        return Ok(None);
    };
    let (header, length) = match (*second, rest) {
        (0..=125, _) => (2, usize::from(*second)),
        (126, [a, b, ..]) => (4, usize::from(u16::from_be_bytes([*a, *b]))),
        (127, [a, b, c, d, e, f, g, h, ..]) => {
            let length = u64::from_be_bytes([*a, *b, *c, *d, *e, *f, *g, *h]);
            (10, length as usize)
        }
        (126 | 127, _) => return Ok(None),
        _ => return Err(format!("a masked frame: {first:#x} {second:#x}")),
    };
    let end = header + length;
    Ok((bytes.len() >= end).then_some((*first, header..end, end)))
}

/// Asks for the relay's health again and again, until it is told to stop: whoever connects is answered, if not by this
/// process, then by the next. `kills` is odd while a process is being killed. How many answers came, and how many
/// connections were taken by a process that was killed.
fn visitor(
    service: &Service,
    kills: Arc<AtomicU64>,
    stop: Arc<AtomicBool>,
) -> JoinHandle<(usize, usize)> {
    let address = service.manager.public;
    tokio::spawn(async move {
        let (mut answered, mut lost) = (0, 0);
        while !stop.load(Ordering::Relaxed) {
            let before = kills.load(Ordering::SeqCst);
            let mut socket = TcpStream::connect(address).await.expect("never refused");
            let request = b"GET /_health HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n";
            let mut answer = Vec::new();
            let asked = async {
                socket.write_all(request).await?;
                socket.read_to_end(&mut answer).await
            };
            let asked = timeout(PATIENCE, asked).await.expect("an answer");
            if asked.is_ok() && answer.starts_with(b"HTTP/1.1 200 ") {
                answered += 1;
            } else {
                let killed = before % 2 == 1 || before != kills.load(Ordering::SeqCst);
                let answer = String::from_utf8_lossy(&answer);
                assert!(killed, "{asked:?} {answer:?}");
                lost += 1;
            }
            sleep(Duration::from_millis(5)).await;
        }
        (answered, lost)
    })
}

/// All events of the log, from a consumer that comes last.
async fn everything(service: &Service, last: u64) -> Vec<(u64, Bytes)> {
    let late = Consumer::connect(service, "?cursor=0", Manner::Fast, 999).await;
    late.has(last).await;
    let seen = late.seen.lock().unwrap();
    (seen.events.iter())
        .map(|(seq, frame, _)| (*seq, frame.clone()))
        .collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn restarts_leave_every_consumer_connected_without_gap_or_double_on_sqlite() {
    restarts_leave_every_consumer_connected("SQLite", Service::start(STORE).await).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn restarts_leave_every_consumer_connected_without_gap_or_double_on_postgres() {
    if let Some(server) = postgres::server() {
        let database = format!("--database-url={}", server.database().await);
        let service = Service::start_with(STORE, &[&database]).await;
        restarts_leave_every_consumer_connected("PostgreSQL", service).await;
    }
}

async fn restarts_leave_every_consumer_connected(database: &str, mut service: Service) {
    let traffic = Traffic::start(&service.network);
    let mut consumers = Vec::new();
    for (seed, (query, manner)) in [
        ("", Manner::Fast),
        ("?cursor=0", Manner::Fast),
        ("?cursor=0", Manner::Slow),
        ("?cursor=0", Manner::Slow),
        ("", Manner::Slow),
    ]
    .into_iter()
    .enumerate()
    {
        consumers.push(Consumer::connect(&service, query, manner, seed as u64).await);
    }
    service.until_kept(consumers.len());
    let (kills, stop) = (Arc::<AtomicU64>::default(), Arc::<AtomicBool>::default());
    let visiting = visitor(&service, kills.clone(), stop.clone());
    let mut dice = fastrand::Rng::with_seed(11);
    let (mut stops, mut pauses) = (Vec::new(), [Vec::new(), Vec::new()]);
    for round in 0..kills::kills(RESTARTS) {
        let live = &consumers[0];
        live.has(live.last() + dice.u64(1..300)).await;
        let kill = round % 2 == 1;
        let (signal, odd) = if kill {
            (Signal::KILL, 1)
        } else {
            (Signal::TERM, 0)
        };
        let begun = Instant::now();
        kills.fetch_add(odd, Ordering::SeqCst);
        service.manager.signal(signal);
        let (stopped, status) = service.manager.ended();
        kills.fetch_add(odd, Ordering::SeqCst);
        if !kill {
            assert!(status.success(), "{status}: {}", service.manager.said());
            stops.push(stopped);
        }
        service.manager.start();
        live.has(live.last() + 1).await;
        live.has(live.last() + 50).await;
        pauses[usize::from(kill)].push(live.pause(begun));
        for consumer in &consumers {
            consumer.assert_connected();
        }
        // Some come, and some go.
        if round % 4 == 1 {
            let late = Consumer::connect(&service, "", Manner::Fast, 100 + round).await;
            consumers.push(late);
            service.until_kept(consumers.len());
        }
        if round % 8 == 5 {
            drop(consumers.pop());
            service.until_kept(consumers.len());
        }
    }
    let sent = traffic.stop(&service.network).await as u64;
    for consumer in &consumers {
        consumer.hurry.store(true, Ordering::Relaxed);
    }
    for consumer in &consumers {
        consumer.has(sent).await;
    }
    stop.store(true, Ordering::Relaxed);
    let visited = visiting.await;
    let (answered, lost) =
        visited.unwrap_or_else(|lost| panic!("{lost}: {}", service.manager.said()));
    let all = everything(&service, sent).await;
    all_once_and_in_order(&service.network, &all);
    for consumer in &consumers {
        consumer.assert_complete(&all);
    }
    let listed = service.admin("/admin/consumers/list").await;
    let listed = listed.as_array().unwrap();
    assert!(listed.len() >= consumers.len(), "{listed:?}");
    assert_eq!(service.manager.refused(), 0);
    let pings: u32 = (consumers.iter())
        .map(|consumer| consumer.seen.lock().unwrap().pongs)
        .sum();
    let longest = |times: &[Duration]| times.iter().max().copied().unwrap_or_default();
    let mean = |times: &[Duration]| times.iter().sum::<Duration>() / times.len().max(1) as u32;
    println!(
        "{database}: {} restarts by SIGTERM and {} by SIGKILL, {sent} events to {} consumers, {pings} pings answered; visitors: {answered} \
         answered, {lost} taken by a kill; stopped in {:?} at most; without events for {:?} (mean {:?}) at a stop, {:?} \
         (mean {:?}) at a kill",
        pauses[0].len(),
        pauses[1].len(),
        consumers.len(),
        longest(&stops),
        longest(&pauses[0]),
        mean(&pauses[0]),
        longest(&pauses[1]),
        mean(&pauses[1]),
    );
    assert!(longest(&stops) <= LONGEST_STOP, "{stops:?}");
}

impl Consumer {
    /// Waits until its connection has ended, and says how.
    async fn ends(&self) -> String {
        let wait = async {
            loop {
                if let Some(ended) = self.seen.lock().unwrap().ended.clone() {
                    return ended;
                }
                sleep(Duration::from_millis(5)).await;
            }
        };
        timeout(PATIENCE, wait).await.expect("an end")
    }
}

impl Service {
    /// Ends the process with a signal, does something, and starts the next one.
    fn restart(&mut self, signal: Signal, meanwhile: impl FnOnce(&mut Manager)) {
        self.manager.signal(signal);
        self.manager.ended();
        meanwhile(&mut self.manager);
        self.manager.start();
    }

    /// A new account, and where it is.
    fn account(&self, name: &str) -> (Pds, Did) {
        let pds = self.network.pds(0).clone();
        let account = pds.create_account(&format!("{name}.{}", pds.domain()));
        (pds, account.unwrap().did)
    }

    fn metrics_url(&self) -> String {
        format!("http://{}/metrics", self.manager.metrics)
    }

    /// What its metrics say.
    async fn samples(&self) -> Samples {
        Samples::scrape(&self.metrics_url()).await.unwrap()
    }

    /// A few events, so that whoever is connected has some.
    async fn some_events(&self, consumers: &[&Consumer]) {
        let (pds, did) = self.account(&format!("n{}", fastrand::u32(..)));
        let posted = process::post("a few");
        pds.create_record(&did, process::POSTS, posted).unwrap();
        let sent: usize = (self.network.all_pds().iter())
            .map(|pds| pds.events().len())
            .sum();
        for consumer in consumers {
            consumer.has(sent as u64).await;
        }
    }
}

const CLOSED: &str = "closed: b\"\\x03\\xf4the relay";

/// One more descriptor than consumers is needed, for the table.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_does_not_fit_is_closed_properly() {
    let mut service = Service::start(3).await;
    let mut consumers = Vec::new();
    for seed in 0..4 {
        consumers.push(Consumer::connect(&service, "?cursor=0", Manner::Fast, seed).await);
        service.until_kept(consumers.len().min(2));
    }
    let all: Vec<&Consumer> = consumers.iter().collect();
    service.some_events(&all).await;
    service.restart(Signal::TERM, |_| {});
    for consumer in &consumers[2..] {
        let ended = consumer.ends().await;
        assert!(ended.starts_with(CLOSED), "{ended}");
    }
    service.some_events(&[&consumers[0], &consumers[1]]).await;
    assert_eq!(
        service.manager.stored(),
        ["consumer-0", "consumer-1", "consumers"]
    );
    let samples = service.samples().await;
    assert_eq!(samples.sum("relay_consumers_handed_over_total"), 2.0);
    // A place that comes free is given to the next one.
    drop(consumers.remove(0));
    service.until_kept(1);
    let next = Consumer::connect(&service, "", Manner::Fast, 9).await;
    service.until_kept(2);
    service.restart(Signal::KILL, |_| {});
    service.some_events(&[&consumers[0], &next]).await;
    assert_eq!(service.manager.refused(), 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_table_that_cannot_be_used_closes_properly_and_says_so() {
    /// Words of the table's header.
    const VERSION: u64 = 8;
    /// Within the first slot, behind what all versions know.
    const SLOT: u64 = 64 + 24;
    let damage = |at: u64| {
        move |manager: &mut Manager| {
            manager.with_stored("consumers", |table| {
                rustix::io::pwrite(table, &[0xff; 4000], at).unwrap();
            });
        }
    };
    let version = |manager: &mut Manager| {
        manager.with_stored("consumers", |table| {
            rustix::io::pwrite(table, &2_u64.to_ne_bytes(), VERSION).unwrap();
        });
    };
    let foreign = |manager: &mut Manager| {
        manager.store("consumers", tempfile::tempfile().unwrap().into());
    };
    let mut service = Service::start(STORE).await;
    type Harm = Box<dyn FnOnce(&mut Manager)>;
    let cases: [(Harm, &str, &str); 4] = [
        (Box::new(version), "it is of version 2", CLOSED),
        (Box::new(damage(SLOT)), "not its own, or damaged", CLOSED),
        (
            Box::new(foreign),
            "no table of consumers",
            "end of the stream",
        ),
        (
            Box::new(|manager| manager.forget("consumers")),
            "there is no table",
            "end of the stream",
        ),
    ];
    for (harm, said, how) in cases {
        let consumer = Consumer::connect(&service, "?cursor=0", Manner::Fast, 1).await;
        service.until_kept(1);
        service.some_events(&[&consumer]).await;
        service.restart(Signal::TERM, harm);
        let ended = consumer.ends().await;
        assert!(ended.starts_with(how), "{said}: {ended}");
        let messages = service.manager.said();
        let lines = messages.lines().filter(|line| line.contains(said));
        assert_eq!(lines.count(), 1, "{said}: {messages}");
        // And whoever comes now is kept again.
        service.until_kept(0);
        let next = Consumer::connect(&service, "", Manner::Fast, 2).await;
        service.until_kept(1);
        service.restart(Signal::KILL, |_| {});
        service.some_events(&[&next]).await;
        drop(next);
        service.until_kept(0);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn descriptors_that_are_no_consumers_harm_nobody() {
    let mut service = Service::start(STORE).await;
    let (stays, goes) = (
        Consumer::connect(&service, "?cursor=0", Manner::Fast, 1).await,
        Consumer::connect(&service, "?cursor=0", Manner::Fast, 2).await,
    );
    service.until_kept(2);
    service.some_events(&[&stays, &goes]).await;
    service.restart(Signal::KILL, |manager| {
        drop(goes);
        let (unix, _) = std::os::unix::net::UnixStream::pair().unwrap();
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        for (name, descriptor) in [
            ("consumer-7", OwnedFd::from(unix)),
            ("consumer-8", listener.into()),
            ("consumer-9", tempfile::tempfile().unwrap().into()),
            ("consumer-99999999", tempfile::tempfile().unwrap().into()),
            ("of-another-version", tempfile::tempfile().unwrap().into()),
        ] {
            manager.store(name, descriptor);
        }
    });
    service.some_events(&[&stays]).await;
    service.manager.until_stored(|store| store.len() == 2);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_has_fallen_out_of_the_window_is_told_so_by_the_next_process() {
    let mut service = Service::start_with(STORE, &["--log-max-bytes=16MiB"]).await;
    let slow = Consumer::connect(&service, "?cursor=0", Manner::Slow, 1).await;
    service.until_kept(1);
    let (pds, did) = service.account("long");
    let long = process::post(&"x".repeat(LONG_POST));
    let post = || {
        drop(
            pds.create_record(&did, process::POSTS, long.clone())
                .unwrap(),
        )
    };
    (0..100).for_each(|_| post());
    slow.has(10).await;
    service.restart(Signal::KILL, |_| {});
    let left = async {
        loop {
            (0..50).for_each(|_| post());
            let oldest = service.samples().await.get("relay_log_oldest_seq");
            if oldest as u64 > slow.last() + 100 {
                return;
            }
        }
    };
    timeout(PATIENCE, left).await.expect("old events go");
    slow.hurry.store(true, Ordering::Relaxed);
    let ended = slow.ends().await;
    assert!(ended.contains("ConsumerTooSlow"), "{ended}");
    let seen = slow.seen.lock().unwrap();
    let seqs = seen.events.iter().map(|(seq, ..)| *seq);
    assert!(seqs.eq(1..=seen.events.len() as u64));
}

/// What is left of the frame must not go out, and nothing else can be said in the middle of it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_was_sent_half_of_an_event_that_is_redacted_is_cut_off_by_the_next_process() {
    let mut service = Service::start(STORE).await;
    let still = Consumer::connect(&service, "", Manner::Still, 1).await;
    let other = Consumer::connect(&service, "", Manner::Fast, 2).await;
    service.until_kept(2);
    let (pds, did) = service.account("gone");
    // One takes more than the sockets' buffers.
    let longest = process::post(&"x".repeat(9 * LONG_POST));
    for _ in 0..3 {
        pds.create_record(&did, process::POSTS, longest.clone())
            .unwrap();
    }
    still.has(A_FEW).await;
    let sent = pds.events().len() as u64;
    other.has(sent).await;
    pds.delete_account(&did).unwrap();
    other.has(sent + 1).await;
    service.restart(Signal::TERM, |_| {});
    still.hurry.store(true, Ordering::Relaxed);
    let ended = still.ends().await;
    let said = service.manager.said();
    assert!(!ended.starts_with("closed"), "{ended}: {said}");
    assert!(
        said.contains("was redacted after a part of it was sent"),
        "{ended}: {said}"
    );
    assert!((A_FEW..sent).contains(&still.last()), "{}", still.last());
    service.some_events(&[&other]).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_socket_that_nobody_asked_for_is_an_error() {
    let mut service = Service::start(STORE).await;
    service.manager.signal(Signal::TERM);
    service.manager.ended();
    let socket = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    service.manager.listen_also("gopher", socket.into());
    service.manager.spawn();
    let (_, status) = service.manager.ended();
    assert_eq!(status.code(), Some(1));
    let said = service.manager.said();
    assert!(
        said.contains("\"gopher\"") && said.contains("FileDescriptorName="),
        "{said}"
    );
}

/// Without a descriptor store all is as ever.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_a_store_consumers_are_closed_and_sockets_wait() {
    let mut service = Service::start(0).await;
    let consumer = Consumer::connect(&service, "", Manner::Fast, 1).await;
    service.some_events(&[&consumer]).await;
    service.manager.signal(Signal::TERM);
    service.manager.ended();
    let ended = consumer.ends().await;
    assert!(ended.starts_with(CLOSED), "{ended}");
    // Nobody answers, and nobody is refused.
    let address = service.manager.public;
    let waiting = tokio::spawn(async move {
        let url = format!("http://{address}/_health");
        plain_client()
            .get(url)
            .send()
            .await
            .unwrap()
            .status()
            .as_u16()
    });
    service.manager.start();
    assert_eq!(waiting.await.unwrap(), 200);
    // The operator's routes are nowhere else but with a password, which is not set.
    let public = format!("http://{address}/admin/pds/list");
    assert_eq!(
        plain_client()
            .get(public)
            .send()
            .await
            .unwrap()
            .status()
            .as_u16(),
        404
    );
    let metrics = plain_client()
        .get(service.metrics_url())
        .send()
        .await
        .unwrap();
    assert_eq!(metrics.status().as_u16(), 200);
    assert!(service.admin("/admin/consumers/list").await.is_array());
}
