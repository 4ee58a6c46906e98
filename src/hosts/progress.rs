//! Which events of a host are settled, and so how far its cursor may move.
//! Bounds what a host may have under way, and holds its share of the memory. Knows nothing of sockets, SQL or the log's
//! files.

use std::collections::{BTreeMap, VecDeque};
use std::hash::{DefaultHasher, Hash as _, Hasher as _};
use std::sync::Arc;

use parking_lot::{Mutex, MutexGuard};
use tokio::sync::Notify;

use super::memory::{Loan, Memory, Record, Standing};
use crate::atproto::did::Did;
use crate::atproto::frame::{self, Message};

/// What became of an event.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Settled {
    /// The log holds it on disk under this sequence number.
    Durable { log_seq: u64 },
    /// It was dropped for a recorded reason.
    Dropped,
}

/// How much of one host may be under way between its socket and the log.
#[derive(Clone, Copy, Debug)]
pub struct InFlightLimits {
    /// Events that are not settled.
    pub events: usize,
    /// Bytes of their frames; one longer frame is under way alone.
    pub bytes: usize,
    /// Events from the oldest unsettled one to the newest, settled ones included: one parked event must not let the
    /// list behind it grow without end.
    pub span: usize,
}

impl InFlightLimits {
    /// The limits of every host. Recovery relies on a span that never was larger. More bytes than these do not make
    /// one host faster, and what is under way for twenty busy ones no longer fits into the processor's caches: with
    /// 8 MiB each an event cost a third more.
    pub const DEFAULT: Self = Self {
        events: 1_000,
        bytes: 1024 * 1024,
        span: 20_000,
    };
}

impl Default for InFlightLimits {
    fn default() -> Self {
        Self::DEFAULT
    }
}

/// What recovery knows of a host: the cursor in SQL, and the events above it that the log already holds.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RecoveredHost {
    /// The highest upstream seq below which everything is settled.
    pub cursor: Option<i64>,
    /// Upstream seqs above the cursor that are durable.
    pub already_durable: BTreeMap<i64, Durable>,
}

/// An event that the log holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Durable {
    /// Its number in the log.
    pub log_seq: u64,
    /// `Did::hash64` of its account.
    pub did_hash: u64,
    /// See [`Durable::mark`]; none where the event was redacted.
    pub mark: Option<u64>,
}

impl Durable {
    /// What tells an event from another one that a host gave the same number: of a commit and a `#sync` account and
    /// rev, of the others account and time, which hosts and relays leave as they are. None where `frame` is no event.
    pub fn mark(frame: &[u8]) -> Option<u64> {
        Self::mark_of(&frame::decode_stored(frame).ok()?.message)
    }

    /// The same of a decoded frame.
    pub fn mark_of(message: &Message<'_>) -> Option<u64> {
        let (kind, account, moment) = match message {
            Message::Commit(commit) => (1, commit.repo, commit.rev),
            Message::Sync(sync) => (2, sync.did, sync.rev),
            Message::Identity(identity) => (3, identity.did, identity.time),
            Message::Account(account) => (4, account.did, account.time),
            Message::Info(_) | Message::Error(_) | Message::Unknown => return None,
        };
        let mut hasher = DefaultHasher::new();
        (kind, account, moment).hash(&mut hasher);
        Some(hasher.finish())
    }

    fn is(&self, did: &str, frame: &[u8]) -> bool {
        match self.mark {
            Some(mark) => Self::mark(frame) == Some(mark),
            None => Did::normalized(did).is_ok_and(|did| did.hash64() == self.did_hash),
        }
    }
}

/// The settlement of one host's events, in the order they came from its socket.
#[derive(Debug)]
pub struct Progress {
    state: Mutex<State>,
    room: Notify,
    limits: InFlightLimits,
    memory: Arc<Memory>,
}

#[derive(Debug, Default)]
struct State {
    /// Bytes of the host's own share of the memory that are taken.
    own: usize,
    /// Bytes of its share for events that wait for a look-up.
    parked: usize,
    /// Events that wait for a look-up and found no room in that share.
    unhoused: usize,
    record: Record,
    /// Events from the oldest unsettled one on; the ticket of the first is `first_ticket`.
    events: VecDeque<Event>,
    first_ticket: u64,
    open_events: usize,
    open_bytes: usize,
    cursor: Option<i64>,
    /// The highest log seq of an event of this host since the start.
    newest_log_seq: u64,
    /// Whether the cursor moved since [`Progress::take_moved_cursor`].
    moved: bool,
    already_durable: BTreeMap<i64, Durable>,
    /// See [`Progress::freeze`].
    frozen: bool,
}

#[derive(Debug)]
struct Event {
    seq: i64,
    settled: Option<Settled>,
}

impl Progress {
    /// The progress of a host as recovery found it.
    pub(super) fn new(
        recovered: RecoveredHost,
        limits: InFlightLimits,
        memory: Arc<Memory>,
    ) -> Self {
        let mut already_durable = recovered.already_durable;
        if let Some(cursor) = recovered.cursor {
            already_durable = already_durable.split_off(&cursor.saturating_add(1));
        }
        let state = State {
            cursor: recovered.cursor,
            already_durable,
            ..State::default()
        };
        Self {
            state: Mutex::new(state),
            room: Notify::new(),
            limits,
            memory,
        }
    }

    /// The highest upstream seq below which everything is settled; `None` before the first event of a new host.
    pub fn cursor(&self) -> Option<i64> {
        self.lock().cursor
    }

    /// The cursor, if it moved since the last call.
    pub fn take_moved_cursor(&self) -> Option<i64> {
        let mut state = self.lock();
        if std::mem::take(&mut state.moved) {
            state.cursor
        } else {
            None
        }
    }

    /// The lowest log seq of the durable events above the cursor: recovery must read the log from there to know them.
    pub fn lowest_open_log_seq(&self) -> Option<u64> {
        let state = self.lock();
        let settled = state.events.iter().filter_map(|event| match event.settled {
            Some(Settled::Durable { log_seq }) => Some(log_seq),
            Some(Settled::Dropped) | None => None,
        });
        let recovered = state
            .already_durable
            .values()
            .map(|durable| durable.log_seq);
        settled.chain(recovered).min()
    }

    /// Events that are not settled, and the bytes of their frames.
    pub fn in_flight(&self) -> (usize, usize) {
        let state = self.lock();
        (state.open_events, state.open_bytes)
    }

    /// Bytes of events on their way that the host's own share of the memory holds.
    pub(super) fn own_bytes(&self) -> usize {
        self.lock().own
    }

    /// How long a message may become before there must be room for it.
    pub(crate) fn free_message_bytes(&self) -> usize {
        self.memory.per_host()
    }

    /// Waits until a message of so many bytes may be held: until the host has not too much under way, and there is memory
    /// for it. What fits into the host's own share waits for nobody else; a host whose parked events found no room in
    /// their share borrows nothing until they are settled.
    pub(crate) async fn room(self: &Arc<Self>, bytes: usize) -> Room {
        loop {
            let notified = self.room.notified();
            tokio::pin!(notified);
            let next = self.lock().next_step(bytes, &self.limits, &self.memory);
            if let Step::Own = next {
                return self.own_room(bytes);
            }
            notified.as_mut().enable();
            // What was given back before is not told of again.
            let next = self.lock().next_step(bytes, &self.limits, &self.memory);
            match next {
                Step::Own => return self.own_room(bytes),
                Step::Wait => notified.await,
                Step::Borrow(standing) => tokio::select! {
                    biased;
                    loan = self.memory.borrow(bytes, standing) => {
                        return Room { progress: self.clone(), bytes, place: Place::Borrowed(loan) };
                    }
                    () = notified => {}
                },
            }
        }
    }

    /// Room in the host's own share, asked for or not.
    #[cfg(test)]
    pub(crate) fn some_room(self: &Arc<Self>, bytes: usize) -> Room {
        self.lock().own += bytes;
        self.own_room(bytes)
    }

    fn own_room(self: &Arc<Self>, bytes: usize) -> Room {
        Room {
            progress: self.clone(),
            bytes,
            place: Place::Own,
        }
    }

    /// Whether the log holds another event under this number: then the host numbers its events anew. `frame` is the
    /// event's, and `did` its account.
    pub fn contradicts(&self, seq: i64, did: &str, frame: &[u8]) -> bool {
        let durable = self.lock().already_durable.get(&seq).copied();
        durable.is_some_and(|durable| !durable.is(did, frame))
    }

    /// Whether the log already holds this event (known from recovery). If so it is settled at once and must not go on.
    pub fn settle_if_durable(&self, seq: i64) -> bool {
        let mut state = self.lock();
        let Some(Durable { log_seq, .. }) = state.already_durable.remove(&seq) else {
            return false;
        };
        state.events.push_back(Event {
            seq,
            settled: Some(Settled::Durable { log_seq }),
        });
        state.advance();
        true
    }

    /// Enters an event that came from the socket; the returned [`InFlight`] settles it. The first one of a new host
    /// puts the cursor before itself, so that after a crash the host is resumed and not taken up live once more.
    pub(crate) fn begin(&self, seq: i64, room: Room) -> InFlight {
        let mut state = self.lock();
        if state.cursor.is_none() && state.events.is_empty() && seq > 0 {
            state.cursor = Some(seq - 1);
            state.moved = true;
        }
        let ticket = state.first_ticket + state.events.len() as u64;
        state.events.push_back(Event { seq, settled: None });
        state.open_events += 1;
        state.open_bytes += room.bytes;
        InFlight {
            room,
            ticket,
            open: true,
        }
    }

    /// Waits until nothing is under way.
    pub async fn drained(&self) {
        loop {
            let notified = self.room.notified();
            tokio::pin!(notified);
            notified.as_mut().enable();
            if self.lock().open_events == 0 {
                return;
            }
            notified.await;
        }
    }

    /// The host numbers its events anew, from the one after `cursor` on. To be called when nothing is under way. Returns
    /// a log seq before which all of its events with old numbers lie, as far as it had any since the start.
    pub fn restart(&self, cursor: i64) -> u64 {
        let mut state = self.lock();
        state.already_durable.clear();
        state.cursor = Some(cursor);
        state.moved = true;
        state.newest_log_seq + 1
    }

    /// From now on an event that goes out of scope stays open, so that the cursor does not move past it: the relay is
    /// going down, and whoever holds events gives them up for no reason of theirs.
    pub fn freeze(&self) {
        self.lock().frozen = true;
    }

    fn settle(&self, ticket: u64, bytes: usize, place: &mut Place, settled: Settled) {
        let mut state = self.lock();
        let index = (ticket - state.first_ticket) as usize;
        state.events[index].settled = Some(settled);
        if let Settled::Durable { log_seq } = settled {
            state.newest_log_seq = state.newest_log_seq.max(log_seq);
        }
        state.open_events -= 1;
        state.open_bytes -= bytes;
        if let Place::Own | Place::Borrowed(_) = place {
            state.record.passed(bytes);
        }
        let loan = state.leave(bytes, place, &self.memory);
        state.advance();
        drop(state);
        drop(loan);
        self.room.notify_waiters();
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock()
    }
}

/// What an event that waits for a look-up takes beside its frame: its place in the lanes of its account, the account in
/// memory, and the look-up. A thousand hosts with 326 such events each took some 750 bytes an event.
const PARKED_OVERHEAD: usize = 2 * 1024;

/// What a message that wants room is to do.
enum Step {
    /// The host's own share has taken it.
    Own,
    Borrow(Standing),
    Wait,
}

impl State {
    fn has_room(&self, bytes: usize, limits: &InFlightLimits) -> bool {
        let fits = self.open_events < limits.events && self.open_bytes + bytes <= limits.bytes;
        (fits || self.open_events == 0) && self.events.len() < limits.span
    }

    fn next_step(&mut self, bytes: usize, limits: &InFlightLimits, memory: &Memory) -> Step {
        if !self.has_room(bytes, limits) {
            return Step::Wait;
        }
        if self.own + bytes <= memory.per_host() {
            self.own += bytes;
            return Step::Own;
        }
        if self.unhoused > 0 {
            return Step::Wait;
        }
        Step::Borrow(self.record.standing())
    }

    /// Takes a message out of its place; returns a loan for the caller to give back.
    fn leave(&mut self, bytes: usize, place: &mut Place, memory: &Memory) -> Option<Loan> {
        match std::mem::replace(place, Place::None) {
            Place::None => None,
            Place::Own => {
                self.own -= bytes;
                None
            }
            Place::Borrowed(loan) => {
                if loan.was_slow() {
                    self.record.was_slow();
                }
                Some(loan)
            }
            Place::Parked => {
                let bytes = bytes + PARKED_OVERHEAD;
                self.parked -= bytes;
                memory.unpark(bytes);
                None
            }
            Place::Unhoused(mut before) => {
                self.unhoused -= 1;
                self.own -= PARKED_OVERHEAD;
                self.leave(bytes, &mut before, memory)
            }
        }
    }

    /// Moves a message to the share for events that wait for a look-up, if there is room.
    fn park(&mut self, bytes: usize, place: &mut Place, memory: &Memory) -> Option<Loan> {
        let parked = bytes + PARKED_OVERHEAD;
        if !memory.park(self.parked, parked) {
            self.unhoused += 1;
            self.own += PARKED_OVERHEAD;
            self.record.was_slow();
            let before = std::mem::replace(place, Place::None);
            *place = Place::Unhoused(Box::new(before));
            return None;
        }
        let loan = self.leave(bytes, place, memory);
        self.parked += parked;
        *place = Place::Parked;
        loan
    }

    /// Moves the cursor over the settled events at the front.
    fn advance(&mut self) {
        while self
            .events
            .front()
            .is_some_and(|event| event.settled.is_some())
        {
            if let Some(event) = self.events.pop_front() {
                self.first_ticket += 1;
                self.cursor = Some(event.seq);
                self.moved = true;
            }
        }
    }
}

/// Room for one message of a host; given back when it goes out of scope.
#[derive(Debug)]
pub(crate) struct Room {
    progress: Arc<Progress>,
    bytes: usize,
    place: Place,
}

/// Whose memory a message takes.
#[derive(Debug)]
enum Place {
    /// The host's own share.
    Own,
    /// What all hosts borrow from.
    Borrowed(Loan),
    /// The host's share for events that wait for a look-up.
    Parked,
    /// The same as before it waited: that share was full.
    Unhoused(Box<Place>),
    /// Nobody's any more.
    None,
}

impl Room {
    /// The message turned out to be of so many bytes, and no more than there is room for. Returns how many fewer.
    pub(crate) fn trim(&mut self, bytes: usize) -> usize {
        let surplus = self.bytes.saturating_sub(bytes);
        self.bytes -= surplus;
        match &mut self.place {
            Place::Own => self.progress.lock().own -= surplus,
            Place::Borrowed(loan) => loan.trim(bytes),
            Place::Parked | Place::Unhoused(_) | Place::None => {}
        }
        surplus
    }
}

impl Drop for Room {
    fn drop(&mut self) {
        if let Place::None = self.place {
            return;
        }
        let Self {
            progress,
            bytes,
            place,
        } = self;
        let loan = progress.lock().leave(*bytes, place, &progress.memory);
        drop(loan);
        progress.room.notify_waiters();
    }
}

/// An event under way. Settled exactly once: by [`InFlight::settle`], or as dropped when it goes out of scope. It stays
/// open where the relay is going down (see [`Progress::freeze`]), and where its holder panics: nobody decided on it.
#[derive(Debug)]
pub struct InFlight {
    room: Room,
    ticket: u64,
    open: bool,
}

impl InFlight {
    /// Says what became of the event and gives its room back.
    pub fn settle(mut self, settled: Settled) {
        self.finish(settled);
    }

    /// From now on the event waits for a look-up: what it takes of the memory that others need to pass it gives back,
    /// as far as its host's share for such events has room. Says whether it did not wait before.
    pub fn park(&mut self) -> bool {
        let Room {
            progress,
            bytes,
            place,
        } = &mut self.room;
        if let Place::Parked | Place::Unhoused(_) = place {
            return false;
        }
        let loan = progress.lock().park(*bytes, place, &progress.memory);
        drop(loan);
        progress.room.notify_waiters();
        true
    }

    fn finish(&mut self, settled: Settled) {
        self.open = false;
        let Room {
            progress,
            bytes,
            place,
        } = &mut self.room;
        progress.settle(self.ticket, *bytes, place, settled);
    }
}

impl Drop for InFlight {
    fn drop(&mut self) {
        if self.open && !std::thread::panicking() && !self.room.progress.lock().frozen {
            self.finish(Settled::Dropped);
        }
    }
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt;

    use super::super::memory::MemoryLimits;
    use super::*;

    fn durable<const N: usize>(events: [(i64, u64); N]) -> BTreeMap<i64, Durable> {
        let of_one = |(seq, log_seq)| {
            let durable = Durable {
                log_seq,
                did_hash: 0,
                mark: None,
            };
            (seq, durable)
        };
        events.map(of_one).into()
    }

    fn progress(limits: InFlightLimits) -> Arc<Progress> {
        recovered(RecoveredHost::default(), limits)
    }

    fn recovered(recovered: RecoveredHost, limits: InFlightLimits) -> Arc<Progress> {
        let memory = Memory::new(MemoryLimits::default(), Arc::default());
        Arc::new(Progress::new(recovered, limits, memory))
    }

    fn begin(progress: &Arc<Progress>, seq: i64, bytes: usize) -> InFlight {
        progress.begin(seq, progress.some_room(bytes))
    }

    #[test]
    fn the_cursor_stops_before_the_oldest_open_event() {
        let progress = progress(InFlightLimits::default());
        let [a, b, c] = [10, 12, 17].map(|seq| begin(&progress, seq, 100));
        assert_eq!(progress.take_moved_cursor(), Some(9), "before the first");
        c.settle(Settled::Durable { log_seq: 5 });
        b.settle(Settled::Dropped);
        assert_eq!(
            (progress.cursor(), progress.lowest_open_log_seq()),
            (Some(9), Some(5))
        );
        assert_eq!(progress.in_flight(), (1, 100));
        a.settle(Settled::Durable { log_seq: 6 });
        assert_eq!(
            (progress.take_moved_cursor(), progress.take_moved_cursor()),
            (Some(17), None)
        );
        assert_eq!(
            (progress.lowest_open_log_seq(), progress.in_flight()),
            (None, (0, 0))
        );
    }

    #[test]
    fn an_event_out_of_scope_counts_as_dropped() {
        let progress = progress(InFlightLimits::default());
        drop(begin(&progress, 3, 1));
        assert_eq!(progress.cursor(), Some(3));
    }

    #[test]
    fn what_a_panic_gives_up_stays_open() {
        let progress = progress(InFlightLimits::default());
        let (lost, kept) = (begin(&progress, 5, 1), begin(&progress, 6, 1));
        let panicked = std::thread::spawn(move || {
            let _lost = lost;
            panic!("on purpose");
        });
        assert!(panicked.join().is_err());
        kept.settle(Settled::Dropped);
        assert_eq!(progress.cursor(), Some(4));
    }

    #[test]
    fn what_is_given_up_on_the_way_down_stays_open() {
        let progress = progress(InFlightLimits::default());
        let [a, b, c] = [1, 2, 3].map(|seq| begin(&progress, seq, 1));
        progress.freeze();
        a.settle(Settled::Dropped);
        drop(b);
        c.settle(Settled::Durable { log_seq: 9 });
        assert_eq!(
            (progress.cursor(), progress.lowest_open_log_seq()),
            (Some(1), Some(9))
        );
    }

    #[test]
    fn a_host_that_numbers_anew_starts_again_once_its_old_events_are_settled() {
        let recovered = RecoveredHost {
            cursor: Some(998),
            already_durable: durable([(1_001, 3)]),
        };
        let progress = self::recovered(recovered, InFlightLimits::default());
        let old = begin(&progress, 1_000, 1);
        let mut drained = std::pin::pin!(progress.drained());
        assert!(drained.as_mut().now_or_never().is_none());
        old.settle(Settled::Durable { log_seq: 40 });
        assert!(drained.as_mut().now_or_never().is_some());
        assert_eq!(progress.restart(6), 41);
        assert_eq!(progress.take_moved_cursor(), Some(6));
        assert!(!progress.settle_if_durable(1_001), "a number of before");
    }

    #[test]
    fn events_that_recovery_found_durable_are_settled_once_and_hold_the_replay_floor() {
        let already_durable = durable([(4, 90), (6, 91), (8, 95)]);
        let recovered = RecoveredHost {
            cursor: Some(5),
            already_durable,
        };
        let progress = self::recovered(recovered, InFlightLimits::default());
        assert_eq!(progress.lowest_open_log_seq(), Some(91));
        assert!(!progress.settle_if_durable(4), "below the cursor");
        assert!(progress.settle_if_durable(6));
        assert!(!progress.settle_if_durable(6), "only once");
        assert_eq!(
            (progress.cursor(), progress.lowest_open_log_seq()),
            (Some(6), Some(95))
        );
        let open = begin(&progress, 7, 1);
        assert!(progress.settle_if_durable(8));
        assert_eq!(
            (progress.cursor(), progress.lowest_open_log_seq()),
            (Some(6), Some(95))
        );
        drop(open);
        assert_eq!(
            (progress.cursor(), progress.lowest_open_log_seq()),
            (Some(8), None)
        );
    }

    #[tokio::test]
    async fn room_is_given_back_by_settling() {
        for limits in [
            InFlightLimits {
                events: 2,
                ..InFlightLimits::default()
            },
            InFlightLimits {
                bytes: 20,
                ..InFlightLimits::default()
            },
            InFlightLimits {
                span: 2,
                ..InFlightLimits::default()
            },
        ] {
            let progress = progress(limits);
            let first = progress.begin(1, progress.room(10).await);
            let second = progress.begin(2, progress.room(10).await);
            let mut waiting = tokio::spawn({
                let progress = progress.clone();
                async move { drop(progress.room(10).await) }
            });
            tokio::task::yield_now().await;
            assert!(!waiting.is_finished(), "{limits:?}");
            drop(first);
            (&mut waiting).await.unwrap();
            drop(second);
        }
    }

    #[tokio::test]
    async fn a_long_frame_is_under_way_alone_and_parked_ones_give_back_what_others_need() {
        let limits = MemoryLimits {
            per_host: 100_000,
            shared: 2_000_000,
            parked: 500_000,
        };
        let memory = Memory::new(limits, Arc::default());
        let limits = InFlightLimits {
            bytes: 600_000,
            ..InFlightLimits::default()
        };
        memory.add_host();
        let progress = Arc::new(Progress::new(
            RecoveredHost::default(),
            limits,
            memory.clone(),
        ));
        let mut small = progress.begin(1, progress.room(90_000).await);
        assert_eq!((progress.own_bytes(), memory.in_use().shared), (90_000, 0));
        assert!(progress.room(700_000).now_or_never().is_none());
        let mut other = progress.begin(2, progress.room(450_000).await);
        assert_eq!(memory.in_use().shared, 450_000);
        assert!(other.park() && !other.park());
        assert_eq!(
            (memory.in_use().shared, memory.in_use().parked),
            (0, 450_000 + PARKED_OVERHEAD)
        );
        // Its share for parked ones is full: it stays where it is, and nothing is borrowed meanwhile.
        assert!(small.park());
        assert_eq!(
            (progress.own_bytes(), memory.in_use().parked),
            (90_000 + PARKED_OVERHEAD, 450_000 + PARKED_OVERHEAD)
        );
        assert!(progress.room(20_000).now_or_never().is_none());
        let passing = progress.begin(3, progress.room(5_000).await);
        other.settle(Settled::Dropped);
        assert!(progress.room(20_000).now_or_never().is_none());
        drop((small, passing));
        assert_eq!((progress.own_bytes(), memory.in_use().parked), (0, 0));
        let mut long = progress.room(900_000).await;
        assert_eq!(memory.in_use().shared, 900_000);
        long.trim(300_000);
        assert_eq!(memory.in_use().shared, 300_000);
        drop(long);
        assert_eq!(memory.in_use().shared, 0);
    }

    #[tokio::test]
    async fn a_host_that_held_a_loan_for_long_comes_after_all_others() {
        let limits = MemoryLimits {
            per_host: 100,
            shared: 2_000,
            parked: 500,
        };
        let memory = Memory::new(limits, Arc::default());
        let host = || {
            let limits = InFlightLimits::default();
            let recovered = RecoveredHost::default();
            Arc::new(Progress::new(recovered, limits, memory.clone()))
        };
        let (slow, quick, new) = (host(), host(), host());
        drop(quick.room(200).await);
        let mut held = slow.room(200).await;
        let Place::Borrowed(loan) = &mut held.place else {
            panic!("it is more than the host's own share");
        };
        loan.age();
        drop(held);
        // More than half is lent: what is left is for others than it, and they do not wait behind it.
        let lent = quick.room(1_000).await;
        let mut waiting = Box::pin(slow.room(200));
        assert!(waiting.as_mut().now_or_never().is_none());
        let others = (
            quick.room(200).now_or_never().expect("there is enough"),
            new.room(200).now_or_never().expect("there is enough"),
        );
        drop(others);
        assert!(waiting.as_mut().now_or_never().is_none());
        drop(lent);
        assert!(waiting.now_or_never().is_some(), "at last it is its turn");
    }

    proptest::proptest! {
        #[test]
        fn the_cursor_is_the_end_of_the_settled_prefix(order in proptest::collection::vec(0usize..40, 40)) {
            let progress = progress(InFlightLimits::default());
            let mut open: Vec<_> = (0..40).map(|seq| Some(begin(&progress, seq * 2, 1))).collect();
            for index in order {
                drop(open[index].take());
                let prefix = open.iter().take_while(|event| event.is_none()).count() as i64;
                let expected = (prefix > 0).then(|| (prefix - 1) * 2);
                proptest::prop_assert_eq!(progress.cursor(), expected);
            }
        }
    }
}
