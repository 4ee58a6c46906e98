//! A relay as a process of its own between a devnet and a consumer, to be killed at any moment: what is sent, what comes
//! out, and the comparison of both.

use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use atproto_relay::atproto::did::Did;
use atproto_relay::atproto::frame::{self, Kind, Peek};
use atproto_relay::devnet::check::{Checker, Ledger, Origin, Verdict};
use atproto_relay::devnet::load::{ProcessOptions, RelayProcess};
use atproto_relay::devnet::network::{Network, NetworkOptions};
use atproto_relay::devnet::pds::Pds;
use bytes::Bytes;
use futures_util::StreamExt;
use serde_json::{Value, json};
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio::time::{MissedTickBehavior, interval, timeout};
use tokio_tungstenite::connect_async;
use tokio_tungstenite::tungstenite::Message;

/// Longest wait for anything: a loaded machine, not a slow program.
pub const PATIENCE: Duration = Duration::from_secs(60);
/// The password of relays that the devnet starts.
pub const PASSWORD: &str = "devnet";
pub const HOSTS: usize = 3;
const ACCOUNTS: usize = 4;
/// Time between two writes at one PDS.
const PACE: Duration = Duration::from_millis(6);
pub const POSTS: &str = "app.bsky.feed.post";

pub fn post(text: &str) -> Value {
    json!({"$type": POSTS, "text": text, "createdAt": "2026-01-01T00:00:00Z"})
}

/// A network with a relay in a process of its own, on SQLite or the database of that URL.
pub async fn start(
    pds: usize,
    database: Option<String>,
) -> (Network, RelayProcess, tempfile::TempDir) {
    let binary = PathBuf::from(env!("CARGO_BIN_EXE_atproto-relay"));
    start_binary(binary, pds, database).await
}

/// The same with another program for the relay.
pub async fn start_binary(
    binary: PathBuf,
    pds: usize,
    database: Option<String>,
) -> (Network, RelayProcess, tempfile::TempDir) {
    let options = NetworkOptions {
        pds,
        ..NetworkOptions::default()
    };
    let network = Network::start(options).await.unwrap();
    let folder = tempfile::tempdir().unwrap();
    let mut arguments: Vec<String> = [
        "--log-level=info,atproto_relay::verify=debug",
        "--log-segment-bytes=8MiB",
        "--identity-refresh-interval=1ms",
        "--limit-events-per-second=1000000",
        "--limit-events-per-hour=1000000",
        "--limit-events-per-day=1000000",
    ]
    .map(str::to_owned)
    .to_vec();
    arguments.extend(database.map(|url| format!("--database-url={url}")));
    let options = ProcessOptions {
        binary,
        folder: folder.path().to_owned(),
        plc: network.plc_url(),
        hosts: network.all_pds().iter().map(Pds::url).collect(),
        arguments: arguments.into_iter().map(Into::into).collect(),
    };
    let relay = RelayProcess::start(options, PATIENCE).await.unwrap();
    until_connected(&relay, pds).await;
    (network, relay, folder)
}

/// A new host starts live: what is sent before it is connected is not owed.
pub async fn until_connected(relay: &RelayProcess, expected: usize) {
    let connected = || async {
        let request = atproto_relay::dial::plain_client()
            .get(format!("{}/admin/pds/list", relay.url()))
            .basic_auth("admin", Some(PASSWORD));
        let hosts: Value = request.send().await.unwrap().json().await.unwrap();
        let hosts = hosts.as_array().unwrap();
        let connected = hosts
            .iter()
            .filter(|host| host["HasActiveConnection"] == true);
        connected.count() == expected
    };
    let wait = async {
        while !connected().await {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    timeout(PATIENCE, wait)
        .await
        .expect("every host is connected");
}

/// A consumer that reconnects with the seq of its last event until it is dropped.
pub struct Consumer {
    pub frames: Arc<Mutex<Vec<(u64, Bytes)>>>,
    count: watch::Receiver<usize>,
    task: JoinHandle<()>,
}

impl Drop for Consumer {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Consumer {
    pub fn start(firehose: String) -> Consumer {
        let frames: Arc<Mutex<Vec<(u64, Bytes)>>> = Arc::default();
        let (counted, count) = watch::channel(0);
        let kept = frames.clone();
        let task = tokio::spawn(async move {
            loop {
                let last = kept.lock().unwrap().last().cloned();
                let cursor = last.as_ref().map_or(0, |(seq, _)| *seq);
                let url =
                    format!("{firehose}/xrpc/com.atproto.sync.subscribeRepos?cursor={cursor}");
                let Ok((mut socket, _)) = connect_async(url).await else {
                    tokio::time::sleep(Duration::from_millis(20)).await;
                    continue;
                };
                let mut again = last;
                while let Some(Ok(message)) = socket.next().await {
                    let Message::Binary(frame) = message else {
                        continue;
                    };
                    let event = (seq_of(&frame), frame);
                    match again.take() {
                        Some(last) => assert!(last == event, "seq {} has other content", last.0),
                        None => kept.lock().unwrap().push(event),
                    }
                    counted.send_replace(kept.lock().unwrap().len());
                }
            }
        });
        Consumer {
            frames,
            count,
            task,
        }
    }

    /// Waits until so many events have come; false where they do not.
    pub async fn comes_to(&self, events: usize) -> bool {
        let mut count = self.count.clone();
        let wait = count.wait_for(|count| *count >= events);
        timeout(PATIENCE, wait)
            .await
            .is_ok_and(|reached| reached.is_ok())
    }

    /// Waits until so many events have come.
    pub async fn has(&self, events: usize) {
        assert!(
            self.comes_to(events).await,
            "{} of {events} events came",
            self.events()
        );
    }

    pub fn events(&self) -> usize {
        *self.count.borrow()
    }
}

pub fn seq_of(frame: &[u8]) -> u64 {
    match frame::peek(frame) {
        Ok(Peek::Event(event)) => event.seq as u64,
        other => panic!("not an event: {other:?}"),
    }
}

/// Traffic at every PDS, until it is stopped.
pub struct Traffic {
    stop: Arc<AtomicBool>,
    writers: Vec<JoinHandle<()>>,
}

impl Traffic {
    /// Creates accounts everywhere, and begins.
    pub fn start(network: &Network) -> Traffic {
        let stop = Arc::new(AtomicBool::new(false));
        let writers = network.all_pds().iter().map(|pds| {
            let accounts = (0..ACCOUNTS).map(|n| {
                let account = pds.create_account(&format!("a{n}.{}", pds.domain()));
                account.unwrap().did
            });
            tokio::spawn(traffic(pds.clone(), accounts.collect(), stop.clone()))
        });
        Traffic {
            stop: stop.clone(),
            writers: writers.collect(),
        }
    }

    /// Ends it; how many events were sent in all.
    pub async fn stop(self, network: &Network) -> usize {
        self.stop.store(true, Ordering::Relaxed);
        for writer in self.writers {
            writer.await.unwrap();
        }
        network.all_pds().iter().map(|pds| pds.events().len()).sum()
    }
}

/// Writes at one PDS until it is told to stop: mostly records, and now and then an account that announces itself, which
/// makes events without a rev.
async fn traffic(pds: Pds, accounts: Vec<Did>, stop: Arc<AtomicBool>) {
    let mut ticks = interval(PACE);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    for turn in 0_usize.. {
        if stop.load(Ordering::Relaxed) {
            return;
        }
        ticks.tick().await;
        let did = &accounts[turn % accounts.len()];
        if turn % 9 == 0 {
            pds.deactivate(did).unwrap();
        }
        if turn % 9 == 0 || turn % 7 == 0 {
            pds.activate(did).unwrap();
        } else {
            pds.create_record(did, POSTS, post("in the middle"))
                .unwrap();
        }
    }
}

pub fn all_once_and_in_order(network: &Network, received: &[(u64, Bytes)]) {
    let ledger = Ledger::new();
    let mut kinds = [0; 4];
    for (host, pds) in network.all_pds().iter().enumerate() {
        for event in pds.events() {
            let origin = Origin {
                host: host as u32,
                seq: event.seq as i64,
            };
            ledger
                .enter(&event.frame, origin, Verdict::Forward, None)
                .unwrap();
            if let Ok(Peek::Event(peeked)) = frame::peek(&event.frame) {
                kinds[peeked.kind as usize - 1] += 1;
            }
        }
    }
    for kind in [Kind::Commit, Kind::Sync, Kind::Identity, Kind::Account] {
        assert!(kinds[kind as usize - 1] > 20, "{kinds:?}");
    }
    let mut checker = Checker::new(ledger);
    for (_, frame) in received {
        checker.observe(frame);
    }
    let report = checker.report();
    assert!(report.is_clean(), "{report}");
    let seqs: Vec<u64> = received.iter().map(|(seq, _)| *seq).collect();
    assert!(seqs.iter().copied().eq(1..=seqs.len() as u64));
}
