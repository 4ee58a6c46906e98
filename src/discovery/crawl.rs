//! `com.atproto.sync.requestCrawl`: the checks of a host before it is added. Hosts that fail are remembered for a while,
//! so that a request costs strangers nothing they could not do themselves. Promises that no client and no domain takes all
//! of what the public may have, and that none of it is the operator's.

use std::net::{IpAddr, Ipv4Addr};
use std::num::NonZeroUsize;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};
use std::time::Duration;

use lru::LruCache;
use prometheus::IntCounter;
use reqwest::{Client, StatusCode};
use serde::Deserialize;
use tokio::time::Instant;
use url::Url;

use crate::atproto::did::Did;
use crate::client::{KeyedLimits, Network, Permit};
use crate::dial::{Guard, HostName, HostNameError, fetch, http_client, relay_mark};
use crate::hosts::{AddError, HostHandle};
use crate::telemetry::room_metrics;
use crate::upstream::Supervisor;

/// Longest answer of `describeServer` that is read.
const MAX_ANSWER_BYTES: usize = 64 * 1024;

/// Checks under way at one time for the operator. They have places of their own: the public's may all be taken by hosts
/// that do not answer.
const OPERATOR_CHECKS: usize = 16;

/// One client, or the hosts of one domain, may have so much of the public's checks at one time.
const CHECKS_PART: usize = 16;

/// Second-level labels below which countries' registries give out domains, as in `example.co.uk`.
const REGISTRY_LABELS: [&str; 10] = [
    "ac", "co", "com", "edu", "gov", "ne", "net", "or", "org", "gob",
];

/// Failed checks that are remembered.
const MAX_REMEMBERED: NonZeroUsize = NonZeroUsize::new(10_000).expect("not zero");

/// The span of [`Settings::new_hosts_per_day`].
const DAY: Duration = Duration::from_secs(24 * 3_600);

/// Settings of a [`Crawler`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Settings {
    /// Whether the public may ask for new hosts; for known ones it always may.
    pub public_requests: bool,
    /// New hosts that the public may have added in any 24 hours.
    pub new_hosts_per_day: u32,
    /// Those of them that one IPv4 address or IPv6 /64 may ask for; an IPv6 /48 four times as many.
    pub new_hosts_per_day_per_ip: u32,
    /// Those of them that may be of one domain, as it is registered.
    pub new_hosts_per_day_per_domain: u32,
    /// Checks at one time that the public asked for. One client, and one domain, may have a sixteenth of them.
    pub max_checks: u32,
    /// How long a failed check is remembered.
    pub remember_failure: Duration,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            public_requests: true,
            new_hosts_per_day: 50,
            new_hosts_per_day_per_ip: 10,
            new_hosts_per_day_per_domain: 10,
            max_checks: 64,
            remember_failure: Duration::from_secs(60),
        }
    }
}

room_metrics! {
    /// The metrics of a crawler.
    pub struct Metrics {
        requests: [IntCounter; 3] = counters(
            "relay_crawl_requests_total", "Requests for crawls of hosts, by what came of them",
            "outcome", ["refused", "accepted", "limited"],
        );
    }
}

/// What came of a request for a crawl.
#[derive(Clone, Copy)]
enum Crawl {
    Refused,
    Accepted,
    Limited,
}

/// Who asks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Requester {
    /// Anybody, at this address.
    Public(IpAddr),
    /// The operator: no limit on new hosts, and failed checks are made again.
    Operator,
}

/// Why a host is not crawled.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CrawlError {
    /// The text names no host that may be dialled.
    #[error(transparent)]
    Name(#[from] HostNameError),
    /// The host, or a domain above it, is banned.
    #[error("{0} is banned")]
    Banned(HostName),
    /// It does not answer as a PDS.
    #[error("{host} does not answer com.atproto.server.describeServer as a PDS: {reason}")]
    NotAPds { host: HostName, reason: String },
    /// It is a relay itself.
    #[error("{0} is a relay, not a PDS")]
    IsRelay(HostName),
    /// The public may not add hosts here.
    #[error("this relay takes new hosts from its operator only")]
    Closed,
    /// Too many new hosts today, or too many checks at once.
    #[error("too many new hosts have been requested; try again later")]
    RateLimited,
    /// The database failed.
    #[error("the host could not be stored: {0}")]
    Store(String),
}

/// Takes requests for crawls. Clones share everything.
#[derive(Clone)]
pub struct Crawler {
    inner: Arc<Inner>,
}

struct Inner {
    guard: Guard,
    settings: RwLock<Settings>,
    upstream: Supervisor,
    metrics: Metrics,
    client: Client,
    checks: KeyedLimits<Share>,
    failed: Mutex<LruCache<HostName, (Instant, CrawlError)>>,
    /// The public's new hosts of the last day, the oldest first.
    added: Mutex<Vec<Added>>,
}

/// A new host of the public.
struct Added {
    host: HostName,
    at: Instant,
    /// Whose share of the day it is of.
    shares: Vec<Share>,
}

/// Who has a share of what the public, or the operator, may have.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
enum Share {
    Operator,
    Public,
    Client(Network),
    Domain(String),
}

impl Share {
    /// The shares that a request of the public is of, with what each may have.
    fn of(
        from: IpAddr,
        host: &HostName,
        public: u32,
        client: u32,
        domain: u32,
    ) -> Vec<(Share, usize)> {
        let networks = Network::shares(from, client as usize);
        let clients = networks.map(|(network, most)| (Share::Client(network), most));
        let domain = (
            Share::Domain(registered(host.domain()).to_owned()),
            domain as usize,
        );
        clients
            .chain([(Share::Public, public as usize), domain])
            .collect()
    }
}

/// The part of a name that somebody registered: whoever has it can make any number of names below it. Two labels, or three
/// below a registry such as `co.uk`. All names below a shared domain such as `github.io` count as its own.
fn registered(name: &str) -> &str {
    if name.parse::<Ipv4Addr>().is_ok() {
        return name;
    }
    let mut starts = name.rmatch_indices('.').map(|(dot, _)| dot + 1);
    let Some(top) = starts.next() else {
        return name;
    };
    let (second, third) = (starts.next(), starts.next());
    let label = &name[second.unwrap_or(0)..top - 1];
    let is_registry = name.len() - top == 2 && REGISTRY_LABELS.contains(&label);
    let start = if is_registry && second.is_some() {
        third
    } else {
        second
    };
    &name[start.unwrap_or(0)..]
}

#[derive(Deserialize)]
struct ServerDescription {
    did: String,
}

impl Crawler {
    /// A crawler that dials by the rules of `guard` and adds hosts to `upstream`.
    pub fn new(settings: Settings, guard: Guard, upstream: Supervisor, metrics: Metrics) -> Self {
        let inner = Inner {
            client: http_client(&guard),
            guard,
            settings: RwLock::new(settings),
            upstream,
            metrics,
            checks: KeyedLimits::default(),
            failed: Mutex::new(LruCache::new(MAX_REMEMBERED)),
            added: Mutex::default(),
        };
        Self {
            inner: Arc::new(inner),
        }
    }

    /// Applies other settings to the requests from now on.
    pub fn apply(&self, settings: &Settings) {
        *self
            .inner
            .settings
            .write()
            .unwrap_or_else(PoisonError::into_inner) = *settings;
    }

    /// Checks a host and adds it; one that is known and waits for its next attempt is tried at once.
    ///
    /// # Errors
    /// See [`CrawlError`]; nothing is stored then.
    pub async fn request_crawl(
        &self,
        hostname: &str,
        by: Requester,
    ) -> Result<Arc<HostHandle>, CrawlError> {
        let result = self.inner.request(hostname, by).await;
        let outcome = match &result {
            Ok(host) => {
                tracing::debug!(host = host.name(), ?by, "crawl requested");
                Crawl::Accepted
            }
            Err(error) => {
                let reason = error.to_string();
                tracing::debug!(hostname, ?by, reason, "crawl request refused");
                match error {
                    CrawlError::RateLimited => Crawl::Limited,
                    _ => Crawl::Refused,
                }
            }
        };
        self.inner.metrics.requests[outcome as usize].inc();
        result
    }
}

impl Inner {
    async fn request(&self, hostname: &str, by: Requester) -> Result<Arc<HostHandle>, CrawlError> {
        let settings = self.settings();
        let host = HostName::parse(hostname, &self.guard)?;
        if self.upstream.hosts().is_banned(&host) {
            return Err(CrawlError::Banned(host));
        }
        let is_new = self.upstream.hosts().by_name(host.name()).is_none();
        if is_new {
            let check = self.admit(&host, by, &settings)?;
            self.check(&host).await?;
            drop(check);
            self.count_added(&host, by, &settings)?;
        }
        let added = self
            .upstream
            .add(&host)
            .await
            .map_err(|error| match error {
                AddError::Banned(host) => CrawlError::Banned(host),
                AddError::Store(error) => CrawlError::Store(error.to_string()),
            })?;
        if is_new {
            tracing::info!(host = host.name(), ?by, "a requested host is added");
        }
        Ok(added)
    }

    /// Whether a check of an unknown host is to be made at all; it has its place for so long.
    fn admit(
        &self,
        host: &HostName,
        by: Requester,
        settings: &Settings,
    ) -> Result<Permit<Share>, CrawlError> {
        let shares = match by {
            Requester::Operator => vec![(Share::Operator, OPERATOR_CHECKS)],
            Requester::Public(from) => {
                self.admit_public(host, from, settings)?;
                let part = settings.max_checks.div_ceil(CHECKS_PART as u32);
                Share::of(from, host, settings.max_checks, part, part)
            }
        };
        self.checks.acquire(shares).ok_or(CrawlError::RateLimited)
    }

    fn admit_public(
        &self,
        host: &HostName,
        from: IpAddr,
        settings: &Settings,
    ) -> Result<(), CrawlError> {
        if !settings.public_requests {
            return Err(CrawlError::Closed);
        }
        if let Some((failed, error)) = lock(&self.failed).get(host)
            && failed.elapsed() < settings.remember_failure
        {
            return Err(error.clone());
        }
        has_room(&self.added_today(), &of_the_day(host, from, settings))
    }

    fn count_added(
        &self,
        host: &HostName,
        by: Requester,
        settings: &Settings,
    ) -> Result<(), CrawlError> {
        let Requester::Public(from) = by else {
            return Ok(());
        };
        // Checks run side by side, so the limits are looked at again.
        let mut added = self.added_today();
        // Whoever asks for one host several times at once takes no more of the day than it.
        if added.iter().any(|one| one.host == *host) {
            return Ok(());
        }
        let shares = of_the_day(host, from, settings);
        has_room(&added, &shares)?;
        added.push(Added {
            host: host.clone(),
            at: Instant::now(),
            shares: shares.into_iter().map(|(share, _)| share).collect(),
        });
        Ok(())
    }

    fn settings(&self) -> Settings {
        *self.settings.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn added_today(&self) -> MutexGuard<'_, Vec<Added>> {
        let mut added = lock(&self.added);
        added.retain(|one| one.at.elapsed() < DAY);
        added
    }

    /// Asks the host to describe itself.
    async fn check(&self, host: &HostName) -> Result<(), CrawlError> {
        let result = describe(&self.client, &self.guard, host).await;
        if let Err(error) = &result {
            lock(&self.failed).put(host.clone(), (Instant::now(), error.clone()));
        }
        result
    }
}

/// What a day has for a host that somebody asks for.
fn of_the_day(host: &HostName, from: IpAddr, settings: &Settings) -> Vec<(Share, usize)> {
    Share::of(
        from,
        host,
        settings.new_hosts_per_day,
        settings.new_hosts_per_day_per_ip,
        settings.new_hosts_per_day_per_domain,
    )
}

fn has_room(added: &[Added], shares: &[(Share, usize)]) -> Result<(), CrawlError> {
    let count = |share| {
        added
            .iter()
            .filter(|one| one.shares.contains(share))
            .count()
    };
    match shares.iter().all(|(share, most)| count(share) < *most) {
        true => Ok(()),
        false => Err(CrawlError::RateLimited),
    }
}

async fn describe(client: &Client, guard: &Guard, host: &HostName) -> Result<(), CrawlError> {
    let not_a_pds = |reason: String| CrawlError::NotAPds {
        host: host.clone(),
        reason,
    };
    let url = Url::parse(&format!(
        "{}/xrpc/com.atproto.server.describeServer",
        host.http_url()
    ))
    .map_err(|error| not_a_pds(error.to_string()))?;
    let answer = fetch(client, guard, &url, MAX_ANSWER_BYTES)
        .await
        .map_err(|error| not_a_pds(error.to_string()))?;
    if relay_mark(&answer.headers).is_some() {
        return Err(CrawlError::IsRelay(host.clone()));
    }
    if answer.status != StatusCode::OK {
        return Err(not_a_pds(format!("status {}", answer.status)));
    }
    let description: ServerDescription =
        serde_json::from_slice(&answer.body).map_err(|error| not_a_pds(error.to_string()))?;
    Did::parse(&description.did).map_err(|error| not_a_pds(error.to_string()))?;
    Ok(())
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex
        .lock()
        .unwrap_or_else(|poisoned| poisoned.into_inner())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whoever_has_a_domain_has_all_names_below_it() {
        for (name, expected) in [
            ("pds.example.com", "example.com"),
            ("example.com", "example.com"),
            ("a.b.c.example.com", "example.com"),
            ("pds.example.co.uk", "example.co.uk"),
            ("a.b.example.com.br", "example.com.br"),
            ("example.co.uk", "example.co.uk"),
            ("co.uk", "co.uk"),
            ("a.co.example", "co.example"),
            ("pds.example.uk", "example.uk"),
            ("localhost", "localhost"),
            ("127.0.0.1", "127.0.0.1"),
        ] {
            assert_eq!(registered(name), expected, "{name}");
        }
    }
}
