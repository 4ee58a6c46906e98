//! The resolver: cache in front, one look-up per DID at a time behind it, with limits on how often. How many look-ups
//! there are at a time is its caller's affair. It never blocks a thread, and every wait in it is bounded.

use std::num::NonZeroUsize;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use lru::LruCache;
use reqwest::Client;
use tokio::sync::watch;
use tokio::time::Instant;
use url::Url;

use super::cache::{Cache, Doubt, Flight, Lifetimes, Outcome, Step};
use super::metrics::{Found, Method, Metrics};
use super::sources::{Source, from_plc, from_web, identity};
use super::{
    HostName, Identity, RepoStatus, RepoStatusError, Requester, ResolveError, repo_status,
};
use crate::atproto::did::Did;
use crate::atproto::did_doc::DidDocument;
use crate::bucket::Bucket;
use crate::clock::Clock;
use crate::dial::{Guard, directory_client, http_client};

/// Inactive accounts that are remembered.
const INACTIVE: NonZeroUsize = NonZeroUsize::new(10_000).expect("not zero");

/// Settings of a [`Resolver`].
#[derive(Clone, Debug, PartialEq)]
pub struct Settings {
    /// The PLC directory. The operator names it, so it may be private even where hosts may not.
    pub plc_host: Url,
    /// Identities kept in memory.
    pub cache_entries: usize,
    /// How long an identity is used without asking again.
    pub ttl: Duration,
    /// How long a definite absence is remembered.
    pub negative_ttl: Duration,
    /// How long a failure to reach the directory or a host is remembered: short, because a caller that tries again
    /// after a moment should reach it.
    pub unavailable_ttl: Duration,
    /// Mean time between two forced look-ups of one DID by one requester.
    pub refresh_interval: Duration,
    /// Forced look-ups of one DID by one requester that may follow each other at once: a PDS announces the steps of one
    /// change by several `#identity` events within seconds.
    pub refresh_burst: u32,
    /// Requests per second to the directory; one second's worth may go at once.
    pub directory_rate: f64,
    /// Longest wait for a turn at the directory.
    pub max_wait: Duration,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            plc_host: Url::parse("https://plc.directory").expect("a constant URL parses"),
            cache_entries: 200_000,
            ttl: Duration::from_secs(24 * 3_600),
            negative_ttl: Duration::from_secs(120),
            unavailable_ttl: Duration::from_secs(1),
            refresh_interval: Duration::from_secs(30),
            refresh_burst: 10,
            directory_rate: 100.0,
            max_wait: Duration::from_secs(10),
        }
    }
}

fn lifetimes(settings: &Settings) -> Lifetimes {
    Lifetimes {
        found: settings.ttl,
        absent: settings.negative_ttl,
        unavailable: settings.unavailable_ttl,
        refresh: settings.refresh_interval,
        refresh_burst: settings.refresh_burst,
    }
}

/// Resolves DIDs. Clones share everything.
#[derive(Clone)]
pub struct Resolver {
    inner: Arc<Inner>,
}

struct Inner {
    plc_host: Url,
    guard: Guard,
    clock: Clock,
    metrics: Metrics,
    directory: Client,
    hosts: Client,
    cache: Mutex<Cache>,
    bucket: Bucket,
    /// Accounts that their PDS lately called inactive: not asked again within the refresh interval.
    inactive: Mutex<LruCache<(Did, HostName), (Instant, RepoStatus)>>,
}

impl Resolver {
    /// A resolver with an empty cache, which dials the hosts of did:web and of accounts by the rules of `guard` and dates
    /// identities by `clock`.
    pub fn new(settings: Settings, guard: Guard, clock: Clock, metrics: Metrics) -> Self {
        let lifetimes = lifetimes(&settings);
        let entries = at_least_one(settings.cache_entries);
        let inner = Inner {
            directory: directory_client(),
            hosts: http_client(&guard),
            cache: Mutex::new(Cache::new(entries, lifetimes)),
            bucket: Bucket::new(settings.directory_rate, settings.max_wait),
            inactive: Mutex::new(LruCache::new(INACTIVE)),
            plc_host: settings.plc_host,
            guard,
            clock,
            metrics,
        };
        Self {
            inner: Arc::new(inner),
        }
    }

    /// The identity of `did`, from the cache or looked up. An identity past its TTL is still given while whoever
    /// knows better does not answer.
    ///
    /// # Errors
    /// See [`ResolveError`]; a remembered failure is given again until its lifetime is over.
    pub async fn resolve(&self, did: &Did) -> Outcome {
        let step = self.inner.cache().resolve(did, Instant::now());
        let outcome = match step {
            Step::Answer(outcome) => {
                self.inner.metrics.cache_hits.inc();
                return outcome;
            }
            Step::Join(flight) => wait(flight.outcome).await,
            Step::Start(sender, flight) => self.start(did, sender, flight).await,
        };
        self.inner.metrics.cache_misses.inc();
        match outcome {
            Err(error) if error.is_temporary() => match self.cached(did) {
                Some(stale) => Ok(stale),
                None => Err(error),
            },
            outcome => outcome,
        }
    }

    /// The identity of `did` as it was read after `since`. A look-up that `requester` asks for spends its own budget;
    /// within its refresh interval it gets the cached identity, and the first [`Resolver::resolve`] after the interval
    /// makes up for it.
    ///
    /// # Errors
    /// See [`ResolveError`]; a failure leaves a cached identity in place.
    pub async fn refresh(&self, did: &Did, requester: Requester, since: Instant) -> Outcome {
        let doubt = Doubt { requester, since };
        loop {
            let step = self.inner.cache().refresh(did, doubt, Instant::now());
            match step {
                Step::Answer(outcome) => return outcome,
                Step::Join(flight) if flight.began > since => return wait(flight.outcome).await,
                // It may have read the document before the change that made the caller ask.
                Step::Join(flight) => drop(wait(flight.outcome).await),
                Step::Start(sender, flight) => return self.start(did, sender, flight).await,
            }
        }
    }

    /// The identity of `did` if it is cached, whatever the directory does.
    pub fn cached(&self, did: &Did) -> Option<Arc<Identity>> {
        self.inner.cache().fresh(did, Instant::now())?.ok()
    }

    /// Asks the PDS of an account whether it is active (`com.atproto.sync.getRepoStatus`). An inactive account is not
    /// asked about again within the refresh interval.
    ///
    /// # Errors
    /// See [`RepoStatusError`].
    pub async fn repo_status(
        &self,
        pds: &HostName,
        did: &Did,
    ) -> Result<RepoStatus, RepoStatusError> {
        let key = (did.clone(), pds.clone());
        let interval = self.inner.cache().lifetimes().refresh;
        if let Some((asked, status)) = self.inner.inactive().get(&key)
            && asked.elapsed() < interval
        {
            return Ok(status.clone());
        }
        self.inner.metrics.status_lookups.inc();
        let status = repo_status::ask(&self.inner.hosts, &self.inner.guard, pds, did).await?;
        let mut inactive = self.inner.inactive();
        if status.active {
            inactive.pop(&key);
        } else {
            inactive.put(key, (Instant::now(), status.clone()));
        }
        Ok(status)
    }

    /// Applies other settings, all but the directory and the longest wait for it. A cached identity keeps the lifetime that
    /// it was given.
    pub fn apply(&self, settings: &Settings) {
        let mut cache = self.inner.cache();
        cache.set_lifetimes(lifetimes(settings));
        cache.resize(at_least_one(settings.cache_entries));
        drop(cache);
        self.inner.bucket.set_rate(settings.directory_rate);
    }

    /// Lets the less recently used half of the cache go.
    pub fn shrink(&self) {
        self.inner.cache().halve();
    }

    /// Its metrics.
    pub fn metrics(&self) -> &Metrics {
        &self.inner.metrics
    }

    /// Sets the gauges that are sampled.
    pub fn sample(&self) {
        let (entries, _) = self.sizes();
        self.inner.metrics.cache_entries.set(entries as i64);
    }

    /// Identities in the cache, failures included, and look-ups under way.
    pub fn sizes(&self) -> (usize, usize) {
        let cache = self.inner.cache();
        (cache.len(), cache.flights())
    }

    /// Looks a DID up in a task of its own, so that it lands in the cache even if this caller goes away.
    async fn start(
        &self,
        did: &Did,
        sender: watch::Sender<Option<Outcome>>,
        flight: Flight,
    ) -> Outcome {
        let landing = Landing {
            inner: self.inner.clone(),
            did: did.clone(),
        };
        tokio::spawn(async move {
            let outcome = landing.inner.look_up(&landing.did).await;
            landing
                .inner
                .cache()
                .land(&landing.did, &outcome, Instant::now(), fastrand::f64());
            drop(landing);
            sender.send_replace(Some(outcome));
        });
        wait(flight.outcome).await
    }
}

/// Ends a flight, also when the task that flies it panics.
struct Landing {
    inner: Arc<Inner>,
    did: Did,
}

impl Drop for Landing {
    fn drop(&mut self) {
        self.inner.cache().end(&self.did);
    }
}

impl Inner {
    async fn look_up(&self, did: &Did) -> Outcome {
        let found = match Source::of(did, &self.guard)? {
            Source::Plc => {
                if !self.bucket.turn().await {
                    return Err(ResolveError::RateLimited);
                }
                let document = from_plc(&self.directory, &self.plc_host, did);
                self.read(did, Method::Plc, document).await
            }
            Source::Web(host) => {
                let document = from_web(&self.hosts, &self.guard, &host);
                self.read(did, Method::Web, document).await
            }
        };
        if let Err(error) = &found {
            tracing::debug!(%did, %error, "look-up failed");
        }
        found
    }

    /// Awaits the document of `did`, takes its identity, and counts both.
    async fn read(
        &self,
        did: &Did,
        method: Method,
        document: impl Future<Output = Result<DidDocument, ResolveError>>,
    ) -> Outcome {
        let started = Instant::now();
        let document = document.await;
        self.metrics
            .lookup_seconds
            .observe(started.elapsed().as_secs_f64());
        let found = document
            .and_then(|document| identity(did, &document, &self.guard, self.clock.seconds()));
        let outcome = match &found {
            Ok(_) => Found::Document,
            Err(ResolveError::NotFound | ResolveError::Tombstoned) => Found::Nothing,
            Err(ResolveError::Invalid(_)) => Found::Invalid,
            Err(ResolveError::Unavailable(_) | ResolveError::RateLimited) => Found::NoAnswer,
        };
        self.metrics.count_lookup(method, outcome);
        found.map(Arc::new)
    }

    fn cache(&self) -> MutexGuard<'_, Cache> {
        self.cache
            .lock()
            .unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    fn inactive(&self) -> MutexGuard<'_, LruCache<(Did, HostName), (Instant, RepoStatus)>> {
        self.inactive
            .lock()
            .unwrap_or_else(|poisoned| poisoned.into_inner())
    }
}

fn at_least_one(count: usize) -> NonZeroUsize {
    NonZeroUsize::new(count).unwrap_or(NonZeroUsize::MIN)
}

async fn wait(mut outcome: watch::Receiver<Option<Outcome>>) -> Outcome {
    let landed = outcome.wait_for(Option::is_some).await;
    landed
        .ok()
        .and_then(|outcome| outcome.clone())
        .unwrap_or_else(|| {
            Err(ResolveError::Unavailable(
                "the look-up was broken off".to_owned(),
            ))
        })
}
