//! What is known of identities and for how long, and which are being looked up. Pure bookkeeping: the caller brings
//! the time and does the look-ups.

use std::collections::HashMap;
use std::num::NonZeroUsize;
use std::sync::Arc;
use std::time::Duration;

use lru::LruCache;
use tokio::sync::watch;
use tokio::time::Instant;

use super::{Identity, ResolveError};
use crate::atproto::did::Did;

/// What a look-up came to.
pub(super) type Outcome = Result<Arc<Identity>, ResolveError>;

/// Longest time an identity is used past its TTL while nobody answers: an outage of the directory must not silence
/// accounts that are known.
const MAX_STALE: Duration = Duration::from_secs(3 * 24 * 3_600);

/// How long such an identity is used before whoever knows better is asked again.
const STALE_RETRY: Duration = Duration::from_secs(60);

/// Shortest time between two forced look-ups of one DID when the first one reached nobody.
const FAILED_REFRESH_PAUSE: Duration = Duration::from_secs(1);

/// How long results are kept.
#[derive(Clone, Copy, Debug)]
pub(super) struct Lifetimes {
    /// An identity.
    pub(super) found: Duration,
    /// A definite absence.
    pub(super) absent: Duration,
    /// A failure to reach whoever knows.
    pub(super) unavailable: Duration,
    /// Mean time between two forced look-ups of one DID.
    pub(super) refresh: Duration,
    /// Forced look-ups of one DID that may follow each other at once.
    pub(super) refresh_burst: u32,
}

/// A look-up under way, for everybody who waits for it.
#[derive(Clone, Debug)]
pub(super) struct Flight {
    pub(super) forced: bool,
    pub(super) outcome: watch::Receiver<Option<Outcome>>,
}

/// What to do about a request.
#[derive(Debug)]
pub(super) enum Step {
    /// The answer is known.
    Answer(Outcome),
    /// Somebody is looking it up.
    Join(Flight),
    /// Nobody is: look it up, and report through the sender.
    Start(watch::Sender<Option<Outcome>>, Flight),
}

#[derive(Debug)]
struct Entry {
    outcome: Outcome,
    /// When the outcome was fetched; unchanged while a stale one is kept.
    fetched: Instant,
    fresh_until: Instant,
    /// When all forced look-ups would have been made, had they kept the mean distance.
    spent_until: Instant,
    /// Until when a forced look-up is not made.
    paused_until: Option<Instant>,
    /// Why the last forced look-up said nothing; whoever distrusts the outcome is told this.
    refresh_failed: Option<ResolveError>,
    /// A forced look-up was asked for too early; the next request after the pause makes up for it.
    refresh_due: bool,
}

/// The cache proper, bounded by its number of entries.
#[derive(Debug)]
pub(super) struct Cache {
    entries: LruCache<Did, Entry>,
    flights: HashMap<Did, Flight>,
    lifetimes: Lifetimes,
    max_flights: usize,
}

impl Cache {
    pub(super) fn new(capacity: NonZeroUsize, lifetimes: Lifetimes, max_flights: usize) -> Self {
        Self {
            entries: LruCache::new(capacity),
            flights: HashMap::new(),
            lifetimes,
            max_flights,
        }
    }

    /// A request that takes what is known.
    pub(super) fn resolve(&mut self, did: &Did, now: Instant) -> Step {
        let due = self
            .entries
            .get(did)
            .map(|entry| entry.refresh_due && !entry.is_paused(now));
        match (due, self.fresh(did, now)) {
            (Some(false), Some(outcome)) => Step::Answer(outcome),
            (due, _) => self.fly(did, due == Some(true)),
        }
    }

    /// What is known and not too old, without a look-up.
    pub(super) fn fresh(&mut self, did: &Did, now: Instant) -> Option<Outcome> {
        self.entries
            .get(did)
            .filter(|entry| now < entry.fresh_until)
            .map(|entry| entry.outcome.clone())
    }

    /// A request that distrusts what is known.
    pub(super) fn refresh(&mut self, did: &Did, now: Instant) -> Step {
        if let Some(flight) = self.flights.get(did) {
            return Step::Join(flight.clone());
        }
        if let Some(entry) = self.entries.get_mut(did)
            && entry.is_paused(now)
        {
            entry.refresh_due = true;
            return Step::Answer(match &entry.refresh_failed {
                Some(error) => Err(error.clone()),
                None => entry.outcome.clone(),
            });
        }
        self.fly(did, true)
    }

    fn fly(&mut self, did: &Did, forced: bool) -> Step {
        if let Some(flight) = self.flights.get(did) {
            return Step::Join(flight.clone());
        }
        if self.flights.len() >= self.max_flights {
            return Step::Answer(Err(ResolveError::RateLimited));
        }
        let (sender, outcome) = watch::channel(None);
        let flight = Flight { forced, outcome };
        self.flights.insert(did.clone(), flight.clone());
        Step::Start(sender, flight)
    }

    /// Enters what a look-up came to; `jitter` in 0..1 spreads the ends of lifetimes.
    pub(super) fn land(&mut self, did: &Did, outcome: &Outcome, now: Instant, jitter: f64) {
        let forced = self.flights.get(did).is_some_and(|flight| flight.forced);
        match outcome {
            Err(error) if error.is_temporary() && self.keep_stale(did, error, forced, now) => {}
            Err(ResolveError::RateLimited) => {}
            _ => self.enter(did, outcome, forced, now, jitter),
        }
    }

    /// Keeps a known identity although nobody could be asked; `false` if there is none, or none young enough.
    fn keep_stale(&mut self, did: &Did, error: &ResolveError, forced: bool, now: Instant) -> bool {
        let limit = self.lifetimes.found + MAX_STALE;
        let Some(entry) = self.entries.get_mut(did) else {
            return false;
        };
        if entry.outcome.is_err() || now >= entry.fetched + limit {
            return false;
        }
        entry.fresh_until = entry.fresh_until.max(now + STALE_RETRY);
        if forced {
            entry.paused_until = Some(now + FAILED_REFRESH_PAUSE.min(self.lifetimes.refresh));
            entry.refresh_failed = Some(error.clone());
        }
        true
    }

    fn enter(&mut self, did: &Did, outcome: &Outcome, forced: bool, now: Instant, jitter: f64) {
        let lifetime = match outcome {
            Ok(_) => self.lifetimes.found.mul_f64(1.0 - jitter / 10.0),
            Err(error) if error.is_temporary() => self.lifetimes.unavailable,
            Err(_) => self.lifetimes.absent,
        };
        let earlier = self.entries.get(did);
        let earlier_pause = earlier.and_then(|entry| entry.paused_until);
        let mut spent_until = earlier.map_or(now, |entry| entry.spent_until.max(now));
        let failed = outcome.as_ref().is_err_and(ResolveError::is_temporary);
        if forced && !failed {
            spent_until += self.lifetimes.refresh;
        }
        let pause_ends = if failed {
            now + FAILED_REFRESH_PAUSE.min(self.lifetimes.refresh)
        } else {
            let credit = self.lifetimes.refresh * self.lifetimes.refresh_burst.saturating_sub(1);
            spent_until.checked_sub(credit).unwrap_or(now)
        };
        let entry = Entry {
            outcome: outcome.clone(),
            fetched: now,
            fresh_until: now + lifetime,
            spent_until,
            paused_until: if forced {
                Some(pause_ends)
            } else {
                earlier_pause
            },
            refresh_failed: None,
            refresh_due: false,
        };
        self.entries.put(did.clone(), entry);
    }

    /// Ends a look-up, whether it landed or not.
    pub(super) fn end(&mut self, did: &Did) {
        self.flights.remove(did);
    }

    /// How long results are kept, from the next one on.
    pub(super) fn set_lifetimes(&mut self, lifetimes: Lifetimes) {
        self.lifetimes = lifetimes;
    }

    pub(super) fn lifetimes(&self) -> Lifetimes {
        self.lifetimes
    }

    /// How many entries are kept; the least recently used ones go where there are more.
    pub(super) fn resize(&mut self, capacity: NonZeroUsize) {
        self.entries.resize(capacity);
    }

    /// Lets the less recently used half of the entries go.
    pub(super) fn halve(&mut self) {
        for _ in 0..self.entries.len() / 2 {
            self.entries.pop_lru();
        }
    }

    pub(super) fn len(&self) -> usize {
        self.entries.len()
    }

    pub(super) fn flights(&self) -> usize {
        self.flights.len()
    }
}

impl Entry {
    fn is_paused(&self, now: Instant) -> bool {
        self.paused_until.is_some_and(|until| now < until)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIFETIMES: Lifetimes = Lifetimes {
        found: Duration::from_secs(1_000),
        absent: Duration::from_secs(100),
        unavailable: Duration::from_secs(10),
        refresh: Duration::from_secs(30),
        refresh_burst: 1,
    };

    fn cache() -> Cache {
        Cache::new(NonZeroUsize::new(2).unwrap(), LIFETIMES, 8)
    }

    fn did(name: &str) -> Did {
        Did::parse(&format!("did:web:{name}.example.com")).unwrap()
    }

    fn found(did: &Did, resolved_at: i64) -> Outcome {
        let did = did.clone();
        Ok(Arc::new(Identity {
            did,
            pds: None,
            signing_key: None,
            handles: vec![],
            resolved_at,
        }))
    }

    fn complete(cache: &mut Cache, did: &Did, step: Step, outcome: &Outcome, now: Instant) {
        assert!(matches!(step, Step::Start(..)), "{step:?}");
        cache.land(did, outcome, now, 0.0);
        cache.end(did);
    }

    fn answer(step: Step) -> Outcome {
        match step {
            Step::Answer(outcome) => outcome,
            other => panic!("no answer: {other:?}"),
        }
    }

    #[tokio::test]
    async fn each_kind_of_outcome_has_its_lifetime() {
        let now = Instant::now();
        let did = did("a");
        for (outcome, seconds) in [
            (found(&did, 0), 1_000),
            (Err(ResolveError::NotFound), 100),
            (Err(ResolveError::Tombstoned), 100),
            (Err(ResolveError::Unavailable("down".into())), 10),
        ] {
            let mut cache = cache();
            let step = cache.resolve(&did, now);
            complete(&mut cache, &did, step, &outcome, now);
            assert_eq!(
                answer(cache.resolve(&did, now + Duration::from_secs(seconds - 1))),
                outcome
            );
            assert!(matches!(
                cache.resolve(&did, now + Duration::from_secs(seconds)),
                Step::Start(..)
            ));
        }
    }

    #[tokio::test]
    async fn a_burst_of_forced_look_ups_is_made_and_paid_back() {
        let now = Instant::now();
        let at = |seconds| now + Duration::from_secs(seconds);
        let lifetimes = Lifetimes {
            refresh_burst: 3,
            ..LIFETIMES
        };
        let mut cache = Cache::new(NonZeroUsize::MIN, lifetimes, 8);
        let did = did("a");
        for second in [0, 1, 2] {
            let step = cache.refresh(&did, at(second));
            complete(
                &mut cache,
                &did,
                step,
                &found(&did, second as i64),
                at(second),
            );
        }
        assert!(matches!(cache.refresh(&did, at(3)), Step::Answer(Ok(_))));
        assert!(matches!(cache.refresh(&did, at(29)), Step::Answer(Ok(_))));
        let step = cache.refresh(&did, at(30));
        complete(&mut cache, &did, step, &found(&did, 30), at(30));
        assert!(matches!(cache.refresh(&did, at(31)), Step::Answer(Ok(_))));
    }

    #[tokio::test]
    async fn a_refused_look_up_is_not_remembered() {
        let now = Instant::now();
        let (mut cache, did) = (cache(), did("a"));
        let step = cache.resolve(&did, now);
        complete(&mut cache, &did, step, &Err(ResolveError::RateLimited), now);
        assert!(matches!(cache.resolve(&did, now), Step::Start(..)));
    }

    #[tokio::test]
    async fn forced_look_ups_keep_their_distance_and_are_made_up_for() {
        let now = Instant::now();
        let at = |seconds| now + Duration::from_secs(seconds);
        let (mut cache, did) = (cache(), did("a"));
        let step = cache.resolve(&did, now);
        complete(&mut cache, &did, step, &found(&did, 0), now);
        let step = cache.refresh(&did, at(1));
        complete(&mut cache, &did, step, &found(&did, 1), at(1));
        assert_eq!(
            answer(cache.refresh(&did, at(20))),
            found(&did, 1),
            "too early: what is known"
        );
        assert_eq!(answer(cache.resolve(&did, at(30))), found(&did, 1));
        let step = cache.resolve(&did, at(31));
        complete(&mut cache, &did, step, &found(&did, 31), at(31));
        assert_eq!(answer(cache.resolve(&did, at(62))), found(&did, 31));
    }

    #[tokio::test]
    async fn known_identities_outlast_an_outage_but_not_for_ever() {
        let now = Instant::now();
        let (mut cache, did) = (cache(), did("a"));
        let down = Err(ResolveError::Unavailable("down".into()));
        let step = cache.resolve(&did, now);
        complete(&mut cache, &did, step, &found(&did, 0), now);
        let later = now + Duration::from_secs(1_000);
        let step = cache.resolve(&did, later);
        complete(&mut cache, &did, step, &down, later);
        assert_eq!(answer(cache.resolve(&did, later)), found(&did, 0));
        let much_later = later + MAX_STALE;
        let step = cache.resolve(&did, much_later);
        complete(&mut cache, &did, step, &down, much_later);
        assert_eq!(answer(cache.resolve(&did, much_later)), down);
        let gone = Err(ResolveError::Tombstoned);
        let step = cache.refresh(&did, much_later);
        complete(&mut cache, &did, step, &gone, much_later);
        assert_eq!(answer(cache.resolve(&did, much_later)), gone);
    }

    #[tokio::test]
    async fn a_forced_look_up_that_reached_nobody_proves_nothing_and_is_repeated_soon() {
        let now = Instant::now();
        let (mut cache, did) = (cache(), did("a"));
        let down = Err(ResolveError::Unavailable("down".into()));
        let step = cache.resolve(&did, now);
        complete(&mut cache, &did, step, &found(&did, 0), now);
        let step = cache.refresh(&did, now);
        complete(&mut cache, &did, step, &down, now);
        assert_eq!(
            answer(cache.refresh(&did, now)),
            down,
            "the known identity would pass for a fresh one"
        );
        assert_eq!(answer(cache.resolve(&did, now)), found(&did, 0));
        let later = now + FAILED_REFRESH_PAUSE;
        let step = cache.refresh(&did, later);
        complete(&mut cache, &did, step, &found(&did, 1), later);
        assert_eq!(answer(cache.refresh(&did, later)), found(&did, 1));

        let (mut cache, now) = (self::cache(), later);
        let step = cache.refresh(&did, now);
        complete(&mut cache, &did, step, &down, now);
        let step = cache.refresh(&did, now + FAILED_REFRESH_PAUSE);
        complete(
            &mut cache,
            &did,
            step,
            &found(&did, 2),
            now + FAILED_REFRESH_PAUSE,
        );
    }

    #[tokio::test]
    async fn requests_join_a_flight_and_flights_are_bounded() {
        let now = Instant::now();
        let mut cache = Cache::new(NonZeroUsize::new(2).unwrap(), LIFETIMES, 1);
        assert!(matches!(cache.resolve(&did("a"), now), Step::Start(..)));
        assert!(matches!(
            cache.resolve(&did("a"), now),
            Step::Join(Flight { forced: false, .. })
        ));
        assert!(matches!(cache.refresh(&did("a"), now), Step::Join(_)));
        assert_eq!(
            answer(cache.resolve(&did("b"), now)),
            Err(ResolveError::RateLimited)
        );
    }

    #[tokio::test]
    async fn the_least_recently_used_entry_makes_room() {
        let now = Instant::now();
        let mut cache = cache();
        for name in ["a", "b", "c"] {
            let step = cache.resolve(&did(name), now);
            complete(&mut cache, &did(name), step, &found(&did(name), 0), now);
        }
        assert_eq!(cache.len(), 2);
        assert!(cache.fresh(&did("a"), now).is_none() && cache.fresh(&did("c"), now).is_some());
    }
}
