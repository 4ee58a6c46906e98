//! `com.atproto.sync.requestCrawl`: the checks of a host before it is added. Hosts that fail are remembered for a while,
//! so that a request costs strangers nothing they could not do themselves.

use std::num::NonZeroUsize;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use lru::LruCache;
use reqwest::{Client, StatusCode};
use serde::Deserialize;
use tokio::sync::Semaphore;
use tokio::time::Instant;
use url::Url;

use crate::atproto::did::Did;
use crate::dial::{Guard, HostNameError, PdsHost, fetch, http_client, relay_mark};
use crate::telemetry::metrics;
use crate::upstream::{AddError, HostHandle, Hosts};

/// Longest answer of `describeServer` that is read.
const MAX_ANSWER_BYTES: usize = 64 * 1024;

/// Checks under way at one time.
const MAX_CHECKS: usize = 16;

/// Failed checks that are remembered.
const MAX_REMEMBERED: NonZeroUsize = NonZeroUsize::new(10_000).expect("not zero");

/// The span of [`CrawlerOptions::new_hosts_per_day`].
const DAY: Duration = Duration::from_secs(24 * 3_600);

/// Settings of a [`Crawler`].
#[derive(Clone, Copy, Debug)]
pub struct CrawlerOptions {
    /// The rules for dialling.
    pub guard: Guard,
    /// Whether the public may ask for new hosts; for known ones it always may.
    pub public_requests: bool,
    /// New hosts that the public may have added in any 24 hours.
    pub new_hosts_per_day: u32,
    /// How long a failed check is remembered.
    pub remember_failure: Duration,
}

/// Who asks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Requester {
    /// Anybody.
    Public,
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
    Banned(PdsHost),
    /// It does not answer as a PDS.
    #[error("{host} does not answer com.atproto.server.describeServer as a PDS: {reason}")]
    NotAPds { host: PdsHost, reason: String },
    /// It is a relay itself.
    #[error("{0} is a relay, not a PDS")]
    IsRelay(PdsHost),
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
    options: CrawlerOptions,
    hosts: Hosts,
    client: Client,
    /// See [`CrawlerOptions`].
    public_requests: AtomicBool,
    new_hosts_per_day: AtomicU32,
    checks: Semaphore,
    failed: Mutex<LruCache<PdsHost, (Instant, CrawlError)>>,
    /// When the public's new hosts of the last day were added, the oldest first.
    added: Mutex<Vec<Instant>>,
}

#[derive(Deserialize)]
struct ServerDescription {
    did: String,
}

impl Crawler {
    /// A crawler that adds to `hosts`.
    pub fn new(options: CrawlerOptions, hosts: Hosts) -> Self {
        let inner = Inner {
            client: http_client(&options.guard),
            public_requests: AtomicBool::new(options.public_requests),
            new_hosts_per_day: AtomicU32::new(options.new_hosts_per_day),
            options,
            hosts,
            checks: Semaphore::new(MAX_CHECKS),
            failed: Mutex::new(LruCache::new(MAX_REMEMBERED)),
            added: Mutex::default(),
        };
        Self {
            inner: Arc::new(inner),
        }
    }

    /// Sets what the public may ask for from now on; see [`CrawlerOptions`].
    pub fn admit_public(&self, requests: bool, new_hosts_per_day: u32) {
        let inner = &self.inner;
        inner.public_requests.store(requests, Ordering::Relaxed);
        inner
            .new_hosts_per_day
            .store(new_hosts_per_day, Ordering::Relaxed);
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
        match &result {
            Ok(host) => tracing::info!(host = host.name(), ?by, "crawl requested"),
            Err(error) => tracing::debug!(hostname, ?by, %error, "crawl request refused"),
        }
        metrics().crawl_requests(result.is_ok()).inc();
        result
    }
}

impl Inner {
    async fn request(&self, hostname: &str, by: Requester) -> Result<Arc<HostHandle>, CrawlError> {
        let host = PdsHost::parse(hostname, &self.options.guard)?;
        if self.hosts.is_banned(&host) {
            return Err(CrawlError::Banned(host));
        }
        if self.hosts.by_name(host.name()).is_none() {
            self.admit(&host, by)?;
            self.check(&host).await?;
            self.count_added(by)?;
        }
        self.hosts.add(&host).await.map_err(|error| match error {
            AddError::Banned(host) => CrawlError::Banned(host),
            AddError::Store(error) => CrawlError::Store(error.to_string()),
        })
    }

    /// Whether a check of an unknown host is to be made at all.
    fn admit(&self, host: &PdsHost, by: Requester) -> Result<(), CrawlError> {
        if by == Requester::Operator {
            return Ok(());
        }
        if !self.public_requests.load(Ordering::Relaxed) {
            return Err(CrawlError::Closed);
        }
        if let Some((failed, error)) = lock(&self.failed).get(host)
            && failed.elapsed() < self.options.remember_failure
        {
            return Err(error.clone());
        }
        if self.added_today().len() >= self.most_today() {
            return Err(CrawlError::RateLimited);
        }
        Ok(())
    }

    fn count_added(&self, by: Requester) -> Result<(), CrawlError> {
        if by == Requester::Operator {
            return Ok(());
        }
        // Checks run side by side, so the limit is looked at again.
        let mut added = self.added_today();
        if added.len() >= self.most_today() {
            return Err(CrawlError::RateLimited);
        }
        added.push(Instant::now());
        Ok(())
    }

    fn most_today(&self) -> usize {
        self.new_hosts_per_day.load(Ordering::Relaxed) as usize
    }

    fn added_today(&self) -> MutexGuard<'_, Vec<Instant>> {
        let mut added = lock(&self.added);
        added.retain(|at| at.elapsed() < DAY);
        added
    }

    /// Asks the host to describe itself.
    async fn check(&self, host: &PdsHost) -> Result<(), CrawlError> {
        let _check = self
            .checks
            .try_acquire()
            .map_err(|_| CrawlError::RateLimited)?;
        let result = describe(&self.client, &self.options.guard, host).await;
        if let Err(error) = &result {
            lock(&self.failed).put(host.clone(), (Instant::now(), error.clone()));
        }
        result
    }
}

async fn describe(client: &Client, guard: &Guard, host: &PdsHost) -> Result<(), CrawlError> {
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
