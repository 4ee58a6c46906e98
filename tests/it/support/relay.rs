//! A whole relay with a devnet before it and consumers behind it, all on real sockets.

use atproto_relay::dial::plain_client;
use std::time::Duration;

use atproto_relay::api::Secret;
use atproto_relay::atproto::frame::{self, Message};
use atproto_relay::config::Config;
use atproto_relay::devnet::network::{Network, NetworkOptions};
use atproto_relay::dial::{Guard, HostName};
use atproto_relay::hosts::{HostLimits, Rate, Settings};
use atproto_relay::relay::Relay;
use atproto_relay::{eventlog, identity};
use bytes::Bytes;
use futures_util::StreamExt;
use serde_json::Value;
use tokio::net::TcpStream;
use tokio::time::timeout;
use tokio_tungstenite::{MaybeTlsStream, WebSocketStream, connect_async};

/// Longest wait for something that must come.
pub const PATIENCE: Duration = Duration::from_secs(20);

/// Password of the admin API.
pub const PASSWORD: &str = "correct-horse";

/// More events than any test sends.
const UNLIMITED: Rate = Rate {
    base: 1e9,
    per_account: 0.0,
};

pub struct Bench {
    pub network: Network,
    pub relay: Relay,
    /// What the relay was started with, to start it again on the same folder.
    pub config: Config,
    _folder: tempfile::TempDir,
}

impl Bench {
    pub async fn start(pds: usize) -> Bench {
        Bench::start_with(pds, |_, _| {}).await
    }

    /// Starts a relay that is configured otherwise.
    pub async fn start_with(pds: usize, change: impl FnOnce(&mut Config, &Network)) -> Bench {
        let network = Network::start(NetworkOptions {
            pds,
            ..NetworkOptions::default()
        })
        .await
        .unwrap();
        let folder = tempfile::tempdir().unwrap();
        let mut config = Config {
            listen: ([127, 0, 0, 1], 0).into(),
            metrics_listen: ([127, 0, 0, 1], 0).into(),
            data_dir: folder.path().join("data"),
            hosts: network
                .all_pds()
                .iter()
                .map(|pds| HostName::parse(&pds.url(), &Guard::new(true)).unwrap())
                .collect(),
            allow_private_hosts: true,
            log: eventlog::Settings {
                segment_bytes: 8 * 1024 * 1024,
                ..eventlog::Settings::default()
            },
            admin_password: Some(Secret::new(PASSWORD)),
            host_settings: Settings {
                limits: HostLimits {
                    per_second: UNLIMITED,
                    per_hour: UNLIMITED,
                    per_day: UNLIMITED,
                    bytes_per_hour: UNLIMITED,
                    ..HostLimits::default()
                },
                ..Settings::default()
            },
            identity: identity::Settings {
                plc_host: network.plc_url().parse().unwrap(),
                refresh_interval: Duration::ZERO,
                ..identity::Settings::default()
            },
            ..Config::default()
        };
        change(&mut config, &network);
        let relay = Relay::start(config.clone()).await.unwrap();
        let bench = Bench {
            network,
            relay,
            config,
            _folder: folder,
        };
        bench.until_connected().await;
        bench
    }

    /// Ends the relay, does `meanwhile`, and starts it again on the same folder and database.
    pub async fn restarted(self, meanwhile: impl FnOnce(&Network)) -> Bench {
        self.relay.shutdown().await;
        meanwhile(&self.network);
        let relay = Relay::start(self.config.clone()).await.unwrap();
        let bench = Bench { relay, ..self };
        bench.until_connected().await;
        bench
    }

    /// `http://127.0.0.1:port` of the public API.
    pub fn url(&self) -> String {
        format!("http://{}", self.relay.public_addr())
    }

    /// A public request; its status and JSON.
    pub async fn get(&self, path: &str) -> (u16, Value) {
        let response = plain_client()
            .get(format!("{}{path}", self.url()))
            .send()
            .await
            .unwrap();
        let status = response.status().as_u16();
        (status, response.json().await.unwrap())
    }

    /// An operator's request that must succeed.
    pub async fn admin(&self, path: &str, body: Value) {
        let request = atproto_relay::dial::plain_client()
            .post(format!("{}{path}", self.url()))
            .basic_auth("admin", Some(PASSWORD))
            .json(&body);
        let response = request.send().await.unwrap();
        let status = response.status().as_u16();
        assert_eq!(status, 200, "{path}: {}", response.text().await.unwrap());
    }

    /// Waits until the relay has settled every event of every PDS, and its database knows.
    pub async fn until_settled(&self) {
        let settled = || {
            self.network.all_pds().iter().all(|pds| {
                let port = format!(":{}", pds.url().rsplit(':').next().unwrap());
                let hosts = self.relay.hosts().list();
                let host = hosts
                    .iter()
                    .find(|host| host.name().ends_with(&port))
                    .unwrap();
                host.progress().cursor().unwrap_or(0) == pds.head_seq() as i64
            })
        };
        until("every event is settled", settled).await;
    }

    /// Waits until the relay is connected to every host it knows.
    pub async fn until_connected(&self) {
        let connected = || {
            self.relay
                .hosts()
                .list()
                .iter()
                .all(|host| host.is_connected())
        };
        until("the hosts are connected", connected).await;
    }

    pub async fn consumer(&self, cursor: u64) -> Consumer {
        let address = self.relay.public_addr();
        let url = format!("ws://{address}/xrpc/com.atproto.sync.subscribeRepos?cursor={cursor}");
        let (socket, _) = connect_async(url).await.unwrap();
        Consumer { socket }
    }
}

pub struct Consumer {
    socket: WebSocketStream<MaybeTlsStream<TcpStream>>,
}

impl Consumer {
    /// The next event as `kind did rev-or-status`.
    pub async fn next(&mut self) -> (u64, String) {
        describe(&self.next_frame().await)
    }

    /// Events up to and including the one with this seq.
    pub async fn up_to(&mut self, last: u64) -> Vec<(u64, String)> {
        let mut events = Vec::new();
        while events.last().is_none_or(|(seq, _)| *seq < last) {
            events.push(self.next().await);
        }
        events
    }

    /// The bytes of the next event.
    pub async fn next_frame(&mut self) -> Bytes {
        loop {
            let message = timeout(PATIENCE, self.socket.next())
                .await
                .expect("an event in time")
                .unwrap()
                .unwrap();
            if let tokio_tungstenite::tungstenite::Message::Binary(bytes) = message {
                return bytes;
            }
        }
    }
}

/// An event as `kind did rev-or-status`.
pub fn describe(bytes: &[u8]) -> (u64, String) {
    let (seq, text) = match frame::decode(bytes).unwrap().message {
        Message::Commit(c) => (c.seq, format!("commit {} {}", c.repo, c.rev)),
        Message::Sync(s) => (s.seq, format!("sync {} {}", s.did, s.rev)),
        Message::Identity(i) => (i.seq, format!("identity {}", i.did)),
        Message::Account(a) => (
            a.seq,
            format!("account {} {} {:?}", a.did, a.active, a.status),
        ),
        other => panic!("not an event: {other:?}"),
    };
    (seq as u64, text)
}

/// Waits until `condition` holds.
pub async fn until(what: &str, condition: impl Fn() -> bool) {
    let wait = async {
        while !condition() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    timeout(PATIENCE, wait)
        .await
        .unwrap_or_else(|_| panic!("not in time: {what}"));
}

/// The metrics of a relay that has just started, in the text format of Prometheus.
pub async fn metrics_of_a_new_relay() -> String {
    let folder = tempfile::tempdir().unwrap();
    let relay = Relay::start(Config {
        listen: ([127, 0, 0, 1], 0).into(),
        metrics_listen: ([127, 0, 0, 1], 0).into(),
        data_dir: folder.path().join("data"),
        ..Config::default()
    })
    .await
    .unwrap();
    let url = format!("http://{}/metrics", relay.metrics_addr());
    let text = timeout(PATIENCE, async {
        loop {
            let text = plain_client()
                .get(&url)
                .send()
                .await
                .unwrap()
                .text()
                .await
                .unwrap();
            // Hosts are counted soon after the start.
            if text.contains("relay_hosts{") {
                return text;
            }
            tokio::task::yield_now().await;
        }
    })
    .await
    .expect("hosts are counted");
    relay.shutdown().await;
    text
}
