//! Whose look-up is next. The places for look-ups are divided among the hosts whose events ask: the host that used the
//! least of them lately goes first, and a host whose look-ups end without an answer gets fewer at a time.
//!
//! Pure bookkeeping: the caller brings the time and does the look-ups.

use std::collections::{HashMap, VecDeque};
use std::hash::Hash;
use std::time::Duration;

use tokio::time::Instant;

/// Look-ups that a host has at a time before any of them was answered.
const FIRST_WINDOW: usize = 2;
/// The most that one host has at a time is this part of all places.
const WINDOW_PART: usize = 4;
/// This part of the places is kept for hosts that used little lately.
const RESERVED_PART: usize = 4;
/// What "little" is: a few dozen look-ups at a directory that answers, or half of one that hangs until its time is over.
const LITTLE: Duration = Duration::from_secs(4);
/// Half of what a host used is forgotten after this time.
const HALF_LIFE: Duration = Duration::from_secs(5 * 60);
/// Look-ups without an event that waits for them, of one host: further ones are not made.
const MOST_BESIDE: usize = 1_000;
/// Hosts without a look-up are forgotten, once there are so many, when they have used next to nothing.
const MOST_IDLE: usize = 4_096;
const NEXT_TO_NOTHING: f64 = 0.01;

/// The look-ups of one kind that wait, by the host that asks.
pub(super) struct Turns<K, T> {
    places: usize,
    taken: usize,
    waiting: usize,
    askers: HashMap<K, Asker<T>>,
}

struct Asker<T> {
    /// Look-ups that events wait for.
    waiting: VecDeque<T>,
    /// Look-ups that nothing waits for.
    beside: VecDeque<T>,
    taken: usize,
    window: usize,
    /// Seconds that its look-ups took, with what is older counted for less, as of `used_at`.
    used: f64,
    used_at: Instant,
}

/// A turn, to be given back by [`Turns::end`].
pub(super) struct Turn<K> {
    asker: K,
    began: Instant,
}

impl<K: Copy + Eq + Hash, T> Turns<K, T> {
    /// With so many places.
    pub fn new(places: usize) -> Self {
        Self {
            places: places.max(1),
            taken: 0,
            waiting: 0,
            askers: HashMap::new(),
        }
    }

    /// Enters a look-up that an event of `asker` waits for.
    pub fn enter(&mut self, asker: K, lookup: T, now: Instant) {
        self.waiting += 1;
        self.asker(asker, now).waiting.push_back(lookup);
    }

    /// Enters a look-up that no event waits for: it comes after those that one waits for. It is not made, and false is
    /// returned, where the asker has too many of them already.
    pub fn enter_beside(&mut self, asker: K, lookup: T, now: Instant) -> bool {
        let beside = &mut self.asker(asker, now).beside;
        let room = beside.len() < MOST_BESIDE;
        if room {
            beside.push_back(lookup);
            self.waiting += 1;
        }
        room
    }

    /// The look-up whose turn it is, if one may begin.
    pub fn next(&mut self, now: Instant) -> Option<(Turn<K>, T)> {
        if self.waiting == 0 || self.taken >= self.places {
            return None;
        }
        let for_all = self.taken < self.places - self.places / RESERVED_PART;
        let (&key, _) = self
            .askers
            .iter()
            .filter(|(_, asker)| asker.may_begin())
            .map(|(key, asker)| (key, asker.used(now)))
            .filter(|(_, used)| for_all || *used < LITTLE.as_secs_f64())
            .min_by(|(_, one), (_, other)| one.total_cmp(other))?;
        let asker = self.askers.get_mut(&key)?;
        let lookup = asker
            .waiting
            .pop_front()
            .or_else(|| asker.beside.pop_front())?;
        asker.taken += 1;
        self.taken += 1;
        self.waiting -= 1;
        let turn = Turn {
            asker: key,
            began: now,
        };
        Some((turn, lookup))
    }

    /// Gives a turn back. `answered` tells whether there was an answer, whatever it said.
    pub fn end(&mut self, turn: &Turn<K>, answered: bool, now: Instant) {
        let most = self.places.div_ceil(WINDOW_PART);
        self.taken -= 1;
        if let Some(asker) = self.askers.get_mut(&turn.asker) {
            asker.taken -= 1;
            asker.used = asker.used(now) + (now - turn.began).as_secs_f64();
            asker.used_at = now;
            asker.window = if answered {
                (asker.window + 1).min(most)
            } else {
                (asker.window / 2).max(1)
            };
        }
        if self.askers.len() > MOST_IDLE {
            self.askers
                .retain(|_, asker| !asker.is_idle() || asker.used(now) > NEXT_TO_NOTHING);
        }
    }

    /// Look-ups that wait for their turn.
    pub fn waiting(&self) -> usize {
        self.waiting
    }

    fn asker(&mut self, key: K, now: Instant) -> &mut Asker<T> {
        self.askers.entry(key).or_insert_with(|| Asker {
            waiting: VecDeque::new(),
            beside: VecDeque::new(),
            taken: 0,
            window: FIRST_WINDOW,
            used: 0.0,
            used_at: now,
        })
    }
}

impl<T> Asker<T> {
    fn may_begin(&self) -> bool {
        self.taken < self.window && !(self.waiting.is_empty() && self.beside.is_empty())
    }

    fn is_idle(&self) -> bool {
        self.taken == 0 && self.waiting.is_empty() && self.beside.is_empty()
    }

    fn used(&self, now: Instant) -> f64 {
        let age = (now - self.used_at).as_secs_f64();
        self.used * (-age / HALF_LIFE.as_secs_f64()).exp2()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HANGS: Duration = Duration::from_secs(10);
    const ANSWERS: Duration = Duration::from_millis(20);

    /// All that may begin now, by its host.
    fn begin(turns: &mut Turns<u32, u32>, now: Instant) -> Vec<(Turn<u32>, u32)> {
        std::iter::from_fn(|| turns.next(now)).collect()
    }

    #[test]
    fn a_host_alone_gets_more_places_with_each_answer_up_to_its_part() {
        let (mut turns, mut now) = (Turns::new(64), Instant::now());
        (0..1_000).for_each(|number| turns.enter(7, number, now));
        let mut order = Vec::new();
        let mut most = 0;
        while turns.waiting() > 0 {
            let begun = begin(&mut turns, now);
            most = most.max(begun.len());
            now += ANSWERS;
            for (turn, number) in begun {
                order.push(number);
                turns.end(&turn, true, now);
            }
        }
        assert_eq!(order, Vec::from_iter(0..1_000));
        assert_eq!(most, 16);
    }

    #[test]
    fn hosts_whose_look_ups_hang_leave_places_to_the_others() {
        let (mut turns, mut now) = (Turns::new(64), Instant::now());
        for host in 0..1_000 {
            (0..50).for_each(|number| turns.enter(host, number, now));
        }
        // Later on every hostile host has had its first turns.
        for _ in 0..100 {
            let begun = begin(&mut turns, now);
            now += HANGS;
            for (turn, _) in begun {
                turns.end(&turn, false, now);
            }
        }
        let hanging = begin(&mut turns, now);
        assert!(hanging.len() <= 48, "{} places are taken", hanging.len());
        turns.enter(5_000, 1, now);
        let (turn, _) = turns.next(now).expect("a place is kept");
        assert_eq!(turn.asker, 5_000);
    }

    #[test]
    fn the_host_that_used_least_goes_first_and_what_it_used_is_forgotten() {
        let (mut turns, now) = (Turns::new(1), Instant::now());
        turns.enter(1, 0, now);
        let (turn, _) = turns.next(now).unwrap();
        turns.enter(1, 1, now);
        turns.enter(2, 2, now);
        assert!(turns.next(now).is_none(), "no place");
        let later = now + HANGS;
        turns.end(&turn, true, later);
        assert_eq!(turns.next(later).map(|(_, lookup)| lookup), Some(2));
        let used = |turns: &Turns<u32, u32>, now| turns.askers[&1].used(now);
        assert!(used(&turns, later) > 9.9);
        assert!(used(&turns, later + HALF_LIFE) < 5.1);
    }

    #[test]
    fn look_ups_that_nothing_waits_for_come_last_and_are_bounded() {
        let (mut turns, now) = (Turns::new(1), Instant::now());
        let mut entered = 0;
        while turns.enter_beside(1, entered, now) {
            entered += 1;
        }
        assert_eq!(entered as usize, MOST_BESIDE);
        turns.enter(1, 9_999, now);
        assert_eq!(turns.next(now).map(|(_, lookup)| lookup), Some(9_999));
    }
}
