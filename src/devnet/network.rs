//! A directory and any number of PDSes that know each other and ask relays to crawl them. Starts
//! and joins the parts; what they do is in `plc` and `pds`.

use std::time::Duration;

use serde_json::{Value, json};
use tokio_util::sync::CancellationToken;

use super::keys::Curve;
use super::pds::{Account, Pds, PdsError, PdsOptions, RepoState};
use super::plc::Plc;
use super::server::Place;
use crate::atproto::did::Did;

/// Pause between two attempts to have a relay crawl a PDS.
const CRAWL_RETRY: Duration = Duration::from_secs(1);
/// Backfill window of the real PDS (`PDS_REPO_BACKFILL_LIMIT_MS`): one day.
const DEFAULT_BACKFILL: Duration = Duration::from_secs(24 * 3_600);
/// Bytes of events a PDS keeps.
const DEFAULT_BACKFILL_BYTES: usize = 256 << 20;

/// How a network is set up.
#[derive(Clone, Debug)]
pub struct NetworkOptions {
    /// Number of PDSes.
    pub pds: usize,
    /// Base URLs of relays; every PDS asks each of them to crawl it until it agrees.
    pub relays: Vec<String>,
    /// How long the PDSes' events can be asked for again.
    pub backfill: Duration,
    /// Bytes of events each PDS keeps at most.
    pub backfill_bytes: usize,
    /// Seeds keys, passwords and tokens. DIDs still differ from run to run: they hash the ports.
    pub seed: u64,
}

impl Default for NetworkOptions {
    fn default() -> Self {
        NetworkOptions {
            pds: 1,
            relays: Vec::new(),
            backfill: DEFAULT_BACKFILL,
            backfill_bytes: DEFAULT_BACKFILL_BYTES,
            seed: 0,
        }
    }
}

/// A running network; it ends when it is dropped.
#[derive(Debug)]
pub struct Network {
    plc: Plc,
    pds: Vec<Pds>,
    options: NetworkOptions,
    stop: CancellationToken,
}

impl Drop for Network {
    fn drop(&mut self) {
        self.stop.cancel();
        self.plc.stop();
        self.pds.iter().for_each(Pds::stop);
    }
}

impl Network {
    /// Starts a directory and the PDSes, each on a free port of 127.0.0.1.
    pub async fn start(options: NetworkOptions) -> std::io::Result<Self> {
        let plc = Plc::start().await?;
        let count = options.pds;
        let relays = options.relays.clone();
        let mut network = Network {
            plc,
            pds: Vec::new(),
            options,
            stop: CancellationToken::new(),
        };
        for _ in 0..count {
            network.add_pds().await?;
        }
        relays.iter().for_each(|relay| network.announce(relay));
        Ok(network)
    }

    /// Adds a PDS; relays are told with [`Network::announce`] or [`Pds::request_crawl`].
    pub async fn add_pds(&mut self) -> std::io::Result<Pds> {
        let index = self.pds.len();
        let options = PdsOptions {
            domain: format!("pds{}.test", index + 1),
            seed: self
                .options
                .seed
                .wrapping_mul(1_000_003)
                .wrapping_add(index as u64),
            clock_id: u16::try_from(index % 1_024).unwrap_or_default(),
            backfill: self.options.backfill,
            backfill_bytes: self.options.backfill_bytes,
            rotation_curve: if index.is_multiple_of(2) {
                Curve::K256
            } else {
                Curve::P256
            },
        };
        let pds = Pds::start(&self.plc, options, Place::default()).await?;
        self.pds.push(pds.clone());
        self.pds.iter().for_each(|pds| pds.set_peers(&self.pds));
        Ok(pds)
    }

    /// Has every PDS ask the relay at base URL `relay` to crawl it, again and again until it agrees.
    pub fn announce(&self, relay: &str) {
        for pds in self.pds.clone() {
            let (relay, stop) = (relay.to_owned(), self.stop.clone());
            tokio::spawn(async move {
                let ask = async {
                    while let Err(error) = pds.request_crawl(&relay).await {
                        tracing::debug!(pds = pds.host(), %error, "requestCrawl");
                        tokio::time::sleep(CRAWL_RETRY).await;
                    }
                };
                stop.run_until_cancelled(ask).await;
            });
        }
    }

    /// The directory.
    pub fn plc(&self) -> &Plc {
        &self.plc
    }

    /// `http://127.0.0.1:port` of the directory.
    pub fn plc_url(&self) -> String {
        self.plc.url()
    }

    /// PDS number `index`, from 0.
    ///
    /// # Panics
    /// If there are not so many.
    pub fn pds(&self, index: usize) -> &Pds {
        &self.pds[index]
    }

    /// All PDSes.
    pub fn all_pds(&self) -> &[Pds] {
        &self.pds
    }

    /// Moves an account from the PDS where it is active to PDS number `to`.
    pub fn migrate(&self, did: &Did, to: usize) -> Result<Account, PdsError> {
        let home = self
            .home(did)
            .ok_or_else(|| PdsError::NoAccount(did.to_string()))?;
        home.migrate(did, self.pds(to))
    }

    /// The PDS the directory names for `did`, if it is one of this network.
    pub fn home(&self, did: &Did) -> Option<&Pds> {
        let content = self.plc.content(did.as_str()).ok()?;
        let endpoint = &content.services.get("atproto_pds")?.endpoint;
        self.pds.iter().find(|pds| pds.url() == *endpoint)
    }

    /// The state of every repository at the PDS its DID document names.
    pub fn repositories(&self) -> Vec<RepoState> {
        let all = self.pds.iter().flat_map(|pds| {
            pds.repositories()
                .into_iter()
                .map(move |state| (pds, state))
        });
        let at_home = all.filter(|(pds, state)| {
            self.home(&state.did)
                .is_some_and(|home| home.url() == pds.url())
        });
        at_home.map(|(_, state)| state).collect()
    }

    /// The network's URLs, for programs that use it from outside.
    pub fn describe(&self) -> Value {
        let pds = self.pds.iter().map(|pds| {
            json!({
                "url": pds.url(),
                "host": pds.host(),
                "domain": pds.domain(),
                "firehose": format!("ws://{}/xrpc/com.atproto.sync.subscribeRepos", pds.host()),
            })
        });
        json!({ "plc": self.plc_url(), "pds": pds.collect::<Vec<_>>(), "relays": self.options.relays })
    }
}
