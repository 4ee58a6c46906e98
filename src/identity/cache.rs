//! What is known of identities and for how long, and which are being looked up. Pure bookkeeping: the caller brings
//! the time and does the look-ups.

use std::collections::HashMap;
use std::num::NonZeroUsize;
use std::sync::Arc;
use std::time::Duration;

use lru::LruCache;
use tokio::sync::watch;
use tokio::time::Instant;

use super::{Identity, Requester, ResolveError};
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

/// Budgets of forced look-ups that are kept. Whoever lets others be forgotten by asking for many DIDs gains nothing by it:
/// how many look-ups a host has at a time is bounded elsewhere.
const BUDGETS: NonZeroUsize = NonZeroUsize::new(65_536).expect("not zero");

/// How long results are kept.
#[derive(Clone, Copy, Debug)]
pub(super) struct Lifetimes {
    /// An identity.
    pub(super) found: Duration,
    /// A definite absence.
    pub(super) absent: Duration,
    /// A failure to reach whoever knows.
    pub(super) unavailable: Duration,
    /// Mean time between two forced look-ups of one DID by one requester.
    pub(super) refresh: Duration,
    /// Forced look-ups of one DID by one requester that may follow each other at once.
    pub(super) refresh_burst: u32,
}

/// Who distrusts what is known of a DID, and since when.
#[derive(Clone, Copy, Debug)]
pub(super) struct Doubt {
    /// Whose budget a look-up spends.
    pub(super) requester: Requester,
    /// What was read from here on is trusted.
    pub(super) since: Instant,
}

/// A look-up under way, for everybody who waits for it.
#[derive(Clone, Debug)]
pub(super) struct Flight {
    /// When it began: it saw no document from before.
    pub(super) began: Instant,
    /// Whose budget it spends, if it was forced.
    forced_by: Option<Requester>,
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
    /// When the look-up began that the outcome is from; unchanged while a stale one is kept.
    began: Instant,
    /// When the outcome was fetched; unchanged while a stale one is kept.
    fetched: Instant,
    fresh_until: Instant,
    /// Why the last forced look-up said nothing, and until when whoever distrusts the outcome is told this.
    refresh_failed: Option<(ResolveError, Instant)>,
    /// A forced look-up was asked for too early; the next request from here on makes up for it.
    refresh_due: Option<Instant>,
}

/// The cache proper, bounded by its number of entries.
#[derive(Debug)]
pub(super) struct Cache {
    entries: LruCache<Did, Entry>,
    flights: HashMap<Did, Flight>,
    /// When all forced look-ups of a DID by a requester would have been made, had they kept the mean distance.
    spent: LruCache<(u64, Requester), Instant>,
    lifetimes: Lifetimes,
}

impl Cache {
    pub(super) fn new(capacity: NonZeroUsize, lifetimes: Lifetimes) -> Self {
        Self {
            entries: LruCache::new(capacity),
            flights: HashMap::new(),
            spent: LruCache::new(BUDGETS),
            lifetimes,
        }
    }

    /// A request that takes what is known.
    pub(super) fn resolve(&mut self, did: &Did, now: Instant) -> Step {
        let due = self.entries.get(did).and_then(|entry| entry.refresh_due);
        match self.fresh(did, now) {
            Some(outcome) if due.is_none_or(|due| now < due) => Step::Answer(outcome),
            _ => self.fly(did, None, now),
        }
    }

    /// What is known and not too old, without a look-up.
    pub(super) fn fresh(&mut self, did: &Did, now: Instant) -> Option<Outcome> {
        self.entries
            .get(did)
            .filter(|entry| now < entry.fresh_until)
            .map(|entry| entry.outcome.clone())
    }

    /// A request that distrusts what is known. It spends the budget that its requester has for this DID, and nobody
    /// else's; over that budget it takes what is known.
    pub(super) fn refresh(&mut self, did: &Did, doubt: Doubt, now: Instant) -> Step {
        if let Some(flight) = self.flights.get(did) {
            return Step::Join(flight.clone());
        }
        if let Some(entry) = self.entries.get_mut(did) {
            if entry.began > doubt.since {
                return Step::Answer(entry.outcome.clone());
            }
            if let Some((error, until)) = &entry.refresh_failed
                && now < *until
            {
                return Step::Answer(Err(error.clone()));
            }
        }
        if let Err(due) = self.spend(did, doubt.requester, now)
            && let Some(entry) = self.entries.get_mut(did)
        {
            entry.refresh_due = Some(entry.refresh_due.map_or(due, |earlier| earlier.min(due)));
            return Step::Answer(entry.outcome.clone());
        }
        self.fly(did, Some(doubt.requester), now)
    }

    /// Spends one forced look-up; over the budget it says when there is one again.
    fn spend(&mut self, did: &Did, by: Requester, now: Instant) -> Result<(), Instant> {
        let credit = self.lifetimes.refresh * self.lifetimes.refresh_burst.saturating_sub(1);
        let spent = self.spent.get_or_insert_mut((did.hash64(), by), || now);
        let due = spent.checked_sub(credit).unwrap_or(now);
        if now < due {
            return Err(due);
        }
        *spent = (*spent).max(now) + self.lifetimes.refresh;
        Ok(())
    }

    fn fly(&mut self, did: &Did, forced_by: Option<Requester>, now: Instant) -> Step {
        if let Some(flight) = self.flights.get(did) {
            return Step::Join(flight.clone());
        }
        let (sender, outcome) = watch::channel(None);
        let flight = Flight {
            began: now,
            forced_by,
            outcome,
        };
        self.flights.insert(did.clone(), flight.clone());
        Step::Start(sender, flight)
    }

    /// Enters what a look-up came to; `jitter` in 0..1 spreads the ends of lifetimes.
    pub(super) fn land(&mut self, did: &Did, outcome: &Outcome, now: Instant, jitter: f64) {
        let flight = self.flights.get(did);
        let (began, forced_by) =
            flight.map_or((now, None), |flight| (flight.began, flight.forced_by));
        if let Err(error) = outcome
            && error.is_temporary()
        {
            if let Some(by) = forced_by {
                self.give_back(did, by);
            }
            if self.keep_stale(did, error, forced_by.is_some(), now) {
                return;
            }
        }
        if *outcome != Err(ResolveError::RateLimited) {
            let pause = FAILED_REFRESH_PAUSE.min(self.lifetimes.refresh);
            let entry = Entry {
                outcome: outcome.clone(),
                began,
                fetched: now,
                fresh_until: now + self.lifetime(outcome, jitter),
                refresh_failed: match outcome {
                    Err(error) if error.is_temporary() && forced_by.is_some() => {
                        Some((error.clone(), now + pause))
                    }
                    _ => None,
                },
                refresh_due: None,
            };
            self.entries.put(did.clone(), entry);
        }
    }

    /// A look-up that said nothing costs its requester nothing.
    fn give_back(&mut self, did: &Did, by: Requester) {
        let refresh = self.lifetimes.refresh;
        if let Some(spent) = self.spent.get_mut(&(did.hash64(), by)) {
            *spent = spent.checked_sub(refresh).unwrap_or(*spent);
        }
    }

    /// Keeps a known identity although nobody could be asked; `false` if there is none, or none young enough.
    fn keep_stale(&mut self, did: &Did, error: &ResolveError, forced: bool, now: Instant) -> bool {
        let limit = self.lifetimes.found + MAX_STALE;
        let pause = FAILED_REFRESH_PAUSE.min(self.lifetimes.refresh);
        let Some(entry) = self.entries.get_mut(did) else {
            return false;
        };
        if entry.outcome.is_err() || now >= entry.fetched + limit {
            return false;
        }
        entry.fresh_until = entry.fresh_until.max(now + STALE_RETRY);
        if forced {
            entry.refresh_failed = Some((error.clone(), now + pause));
        }
        true
    }

    fn lifetime(&self, outcome: &Outcome, jitter: f64) -> Duration {
        match outcome {
            Ok(_) => self.lifetimes.found.mul_f64(1.0 - jitter / 10.0),
            Err(error) if error.is_temporary() => self.lifetimes.unavailable,
            Err(_) => self.lifetimes.absent,
        }
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
        Cache::new(NonZeroUsize::new(2).unwrap(), LIFETIMES)
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

    /// A forced look-up by one and the same requester.
    fn doubt(cache: &mut Cache, did: &Did, now: Instant) -> Step {
        doubt_of(cache, 1, did, now)
    }

    fn doubt_of(cache: &mut Cache, requester: u32, did: &Did, now: Instant) -> Step {
        let doubt = Doubt {
            requester: Requester(requester),
            since: now,
        };
        cache.refresh(did, doubt, now)
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
        let mut cache = Cache::new(NonZeroUsize::MIN, lifetimes);
        let did = did("a");
        for second in [0, 1, 2] {
            let step = doubt(&mut cache, &did, at(second));
            complete(
                &mut cache,
                &did,
                step,
                &found(&did, second as i64),
                at(second),
            );
        }
        assert!(matches!(
            doubt(&mut cache, &did, at(3)),
            Step::Answer(Ok(_))
        ));
        assert!(matches!(
            doubt(&mut cache, &did, at(29)),
            Step::Answer(Ok(_))
        ));
        let step = doubt(&mut cache, &did, at(30));
        complete(&mut cache, &did, step, &found(&did, 30), at(30));
        assert!(matches!(
            doubt(&mut cache, &did, at(31)),
            Step::Answer(Ok(_))
        ));
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
        let step = doubt(&mut cache, &did, at(1));
        complete(&mut cache, &did, step, &found(&did, 1), at(1));
        assert_eq!(
            answer(doubt(&mut cache, &did, at(20))),
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
        let step = doubt(&mut cache, &did, much_later);
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
        let step = doubt(&mut cache, &did, now);
        complete(&mut cache, &did, step, &down, now);
        assert_eq!(
            answer(doubt(&mut cache, &did, now)),
            down,
            "the known identity would pass for a fresh one"
        );
        assert_eq!(answer(cache.resolve(&did, now)), found(&did, 0));
        let later = now + FAILED_REFRESH_PAUSE;
        let step = doubt(&mut cache, &did, later);
        complete(&mut cache, &did, step, &found(&did, 1), later);
        assert_eq!(answer(doubt(&mut cache, &did, later)), found(&did, 1));

        let (mut cache, now) = (self::cache(), later);
        let step = doubt(&mut cache, &did, now);
        complete(&mut cache, &did, step, &down, now);
        let step = doubt(&mut cache, &did, now + FAILED_REFRESH_PAUSE);
        complete(
            &mut cache,
            &did,
            step,
            &found(&did, 2),
            now + FAILED_REFRESH_PAUSE,
        );
    }

    #[tokio::test]
    async fn requests_join_a_flight() {
        let now = Instant::now();
        let (mut cache, did) = (cache(), did("a"));
        assert!(matches!(cache.resolve(&did, now), Step::Start(..)));
        assert!(matches!(cache.resolve(&did, now), Step::Join(_)));
        assert!(matches!(doubt(&mut cache, &did, now), Step::Join(_)));
    }

    #[tokio::test]
    async fn a_requester_spends_its_own_budget_alone() {
        let now = Instant::now();
        let at = |seconds| now + Duration::from_secs(seconds);
        let (mut cache, did) = (cache(), did("a"));
        let step = doubt_of(&mut cache, 1, &did, now);
        complete(&mut cache, &did, step, &found(&did, 0), now);
        assert!(matches!(
            doubt_of(&mut cache, 1, &did, at(1)),
            Step::Answer(_)
        ));
        let step = doubt_of(&mut cache, 2, &did, at(1));
        complete(&mut cache, &did, step, &found(&did, 1), at(1));
        assert!(matches!(
            doubt_of(&mut cache, 2, &did, at(2)),
            Step::Answer(_)
        ));
    }

    /// What another requester's look-up found serves all whose doubt is older, and costs them nothing.
    #[tokio::test]
    async fn a_look_up_that_began_after_the_doubt_answers_it() {
        let now = Instant::now();
        let at = |seconds| now + Duration::from_secs(seconds);
        let (mut cache, did) = (cache(), did("a"));
        let step = doubt_of(&mut cache, 1, &did, at(5));
        complete(&mut cache, &did, step, &found(&did, 5), at(6));
        let doubt = Doubt {
            requester: Requester(2),
            since: at(4),
        };
        assert_eq!(
            answer(cache.refresh(&did, doubt, at(7))),
            found(&did, 5),
            "the document was read after the doubt arose"
        );
        assert!(matches!(
            doubt_of(&mut cache, 2, &did, at(7)),
            Step::Start(..)
        ));
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
