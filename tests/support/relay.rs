//! A whole relay with a devnet before it and consumers behind it, all on real sockets.

use std::time::Duration;

use atproto_relay::atproto::frame::{self, Message};
use atproto_relay::config::{Config, HostEntry, IdentityConfig};
use atproto_relay::devnet::network::{Network, NetworkOptions};
use atproto_relay::relay::Relay;
use futures_util::StreamExt;
use tokio::net::TcpStream;
use tokio::time::timeout;
use tokio_tungstenite::{MaybeTlsStream, WebSocketStream, connect_async};

/// Longest wait for something that must come.
pub const PATIENCE: Duration = Duration::from_secs(20);

pub struct Bench {
    pub network: Network,
    pub relay: Relay,
    /// What the relay was started with, to start it again on the same folder.
    pub config: Config,
    _folder: tempfile::TempDir,
}

impl Bench {
    pub async fn start(pds: usize) -> Bench {
        let network = Network::start(NetworkOptions {
            pds,
            ..NetworkOptions::default()
        })
        .await
        .unwrap();
        let folder = tempfile::tempdir().unwrap();
        let config = Config {
            listen: ([127, 0, 0, 1], 0).into(),
            metrics_listen: ([127, 0, 0, 1], 0).into(),
            data_dir: folder.path().join("data"),
            plc_host: network.plc_url().parse().unwrap(),
            hosts: network
                .all_pds()
                .iter()
                .map(|pds| HostEntry::parse(&pds.url()).unwrap())
                .collect(),
            allow_private_hosts: true,
            log_segment_bytes: 8 * 1024 * 1024,
            identity: IdentityConfig {
                refresh_interval: Duration::ZERO,
                ..IdentityConfig::default()
            },
            ..Config::default()
        };
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
        loop {
            let message = timeout(PATIENCE, self.socket.next())
                .await
                .expect("an event in time")
                .unwrap()
                .unwrap();
            if let tokio_tungstenite::tungstenite::Message::Binary(bytes) = message {
                return describe(&bytes);
            }
        }
    }
}

fn describe(bytes: &[u8]) -> (u64, String) {
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
