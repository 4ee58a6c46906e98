//! One shard: a thread that judges the events of its DIDs in the order in which they came.
//!
//! It never waits for a look-up: an event that needs one is parked with its successors of the same DID and host, and the
//! shard goes on with others. Events of another host do not wait for it: a host without authority over an account delays
//! nothing of it. The shard waits only for the log, and so the pressure of a slow disk reaches the hosts.

use std::collections::{HashMap, HashSet, VecDeque};
use std::mem;
use std::ops::Range;
use std::sync::Arc;
use std::sync::mpsc::{SyncSender, TrySendError};
use std::time::Instant;

use bytes::Bytes;
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender};
use tokio::sync::oneshot;

use crate::atproto::did::Did;
use crate::atproto::frame::{self, FrameError, Kind, Peek};
use crate::clock::Clock;
use crate::eventlog::{Append, Origin};
use crate::heartbeat::Heartbeat;
use crate::hosts::{HostHandle, HostIndex, InFlight, Received, Rule};
use crate::identity::Identity;
use crate::store::{
    AccountRow, AccountUpdate, HostId, KnownKey, LocalStatus, UpstreamStatus, combined_status,
};

use super::judge::{
    self, Candidate, Circumstances, Finding, NoIdentity, Obstacle, Question, Waiting,
};
use super::metrics::{Metrics, ShardGauges};
use super::policy::{self, AccountForm, Move};
use super::residents::Residents;
use super::rules::Chain;
use super::signature::{self, Job};
use super::{CommandError, Options, Settlements, Tuning};

/// Most events a shard takes from its queue at once, and most signatures it checks at once.
pub(super) const BATCH: usize = 64;

/// What a shard is given to do.
pub(super) enum Work {
    /// An event of a host.
    Event(Received),
    /// An operator's decision.
    Command(Command),
    /// The answer to a question that the shard asked for an event of this host, or for an operator.
    Answer {
        did: Did,
        asker: Option<Arc<HostHandle>>,
        answer: Answer,
    },
    /// Other settings from now on.
    Apply(Tuning),
    /// Memory is short.
    Shrink,
    /// Nothing: it goes the way of an event, and proves that the way is free.
    Nothing,
    /// The end: what still waits comes again from its host.
    Stop,
}

/// An operator's decision on an account.
pub(super) struct Command {
    pub did: Did,
    pub local: LocalStatus,
    /// Only an account whose local status is this one is changed.
    pub only_from: Option<LocalStatus>,
    pub reply: Reply,
}

/// A shard's question.
pub(super) struct Lookup {
    pub shard: usize,
    pub did: Did,
    pub question: Question,
    /// The host whose event asks; `None` where an operator does, who only asks for accounts.
    pub asker: Option<Arc<HostHandle>>,
    /// When the event that asks came: what was read later is fresh for it.
    pub since: Instant,
    /// No event waits for the answer.
    pub beside: bool,
    /// What the answer must come behind: the account's last change in its shard, or its last move.
    pub after: u64,
}

/// What a look-up found.
pub(super) enum Answer {
    Account(Option<Box<AccountRow>>),
    Identity {
        result: Result<Arc<Identity>, NoIdentity>,
        fresh: bool,
    },
    /// What the PDS says, and the log sequence number that all earlier events of the account are below or at.
    Status(Option<UpstreamStatus>, u64),
    /// The identity of an account that is known, which was past its time; no event waits for it.
    Renewed(Result<Arc<Identity>, NoIdentity>),
    /// SQL has the account's moves up to the one of this number.
    Written(u64),
}

/// What goes with an event through the log and comes back when it is durable.
pub struct Settlement {
    pub(super) in_flight: Option<InFlight>,
    pub(super) update: Option<AccountUpdate>,
    pub(super) received: Instant,
    pub(super) kind: Kind,
    pub(super) shard: usize,
    pub(super) ticket: u64,
    /// The account whose earlier events are to be taken out of the log.
    pub(super) redact: Option<Did>,
    pub(super) reply: Option<Reply>,
}

/// What an event of an account's end, or an operator, takes out of the log.
pub struct Redaction {
    /// The account.
    pub did: Did,
    /// The event that ends it; those before go.
    pub seq: u64,
    pub(super) reply: Option<Reply>,
}

impl Redaction {
    /// Whether an operator waits for it.
    pub fn is_awaited(&self) -> bool {
        self.reply.is_some()
    }

    /// Answers the operator, if one asked: the account's events are no longer served.
    pub fn done(self) {
        answer(self.reply);
    }
}

/// The operator's answer to a decision that was carried out.
pub(super) type Reply = oneshot::Sender<Result<(), CommandError>>;

/// Answers an operator, if one asked.
pub(super) fn answer(reply: Option<Reply>) {
    if let Some(reply) = reply {
        // Whoever asked may have gone away; the decision stands.
        let _ = reply.send(Ok(()));
    }
}

/// Where a shard sends what it accepted, asked or learned.
pub(super) struct Outlets {
    pub log: SyncSender<Vec<Append<Settlement>>>,
    pub lookups: UnboundedSender<Lookup>,
    /// Account changes that are not events: identities and operators' decisions.
    pub updates: Box<dyn Fn(AccountUpdate) + Send>,
    /// The known hosts.
    pub hosts: HostIndex,
    /// The changes that reached the store's writer.
    pub settled: Settlements,
    /// Beats after each round.
    pub heartbeat: Heartbeat,
    pub metrics: Metrics,
}

struct Event {
    waiting: Waiting,
}

#[expect(clippy::large_enum_variant, reason = "nearly every item is an event")]
enum Item {
    Event(Event),
    Command(Command),
}

impl Item {
    /// It waits from now on, and holds nothing that others need to pass.
    fn parked(mut self) -> Self {
        if let Item::Event(event) = &mut self {
            event.waiting.received.park();
        }
        self
    }
}

/// Whose items wait for one another: those of one host, or those of the operator.
type Lane = Option<HostId>;

/// Items of one DID that wait, by their lanes.
type Lanes = HashMap<Lane, Parked>;

/// Items of one lane that wait.
#[derive(Default)]
struct Parked {
    items: VecDeque<Item>,
    /// The first one's question, while it is open.
    asking: Option<Question>,
    /// The number of the account's last change when that was asked.
    asked_after: u64,
}

impl Item {
    fn lane(&self) -> Lane {
        match self {
            Item::Event(event) => Some(event.waiting.received.host.id()),
            Item::Command(_) => None,
        }
    }
}

pub(super) struct Shard {
    index: usize,
    gauges: ShardGauges,
    clock: Clock,
    inbox: UnboundedReceiver<Work>,
    outlets: Outlets,
    residents: Residents,
    parked: HashMap<Did, Lanes>,
    /// Items of all of `parked`.
    parked_items: usize,
    checks: Vec<(Event, Candidate)>,
    /// The accounts of `checks`.
    checking: HashSet<Did>,
    accepted: Vec<Append<Settlement>>,
    /// The sequencer is to be given an empty batch, if there is no other.
    pass_on: bool,
    ticket: u64,
    /// Accounts that left a host so far.
    moves: u64,
    at: Circumstances,
}

impl Shard {
    pub fn new(
        index: usize,
        options: Options,
        inbox: UnboundedReceiver<Work>,
        outlets: Outlets,
    ) -> Self {
        Self {
            index,
            gauges: outlets.metrics.shard(index),
            clock: options.clock,
            inbox,
            outlets,
            residents: Residents::new(options.account_bytes, options.shards),
            parked: HashMap::new(),
            parked_items: 0,
            checks: Vec::with_capacity(BATCH),
            checking: HashSet::with_capacity(BATCH),
            accepted: Vec::new(),
            pass_on: false,
            ticket: 0,
            moves: 0,
            at: Circumstances {
                now_us: 0,
                tuning: options.tuning,
            },
        }
    }

    /// Works until it is stopped or the log takes no more.
    pub fn run(mut self) {
        let mut batch = Vec::with_capacity(BATCH);
        while self.inbox.blocking_recv_many(&mut batch, BATCH) > 0 {
            self.at.now_us = self.clock.micros();
            let stop = batch.iter().any(|work| matches!(work, Work::Stop));
            for work in batch.drain(..) {
                self.take(work);
            }
            self.check_signatures();
            if !self.hand_over() {
                // The sequencer is gone: what this shard gives up with its end was decided by nobody.
                self.outlets.hosts.freeze();
                return;
            }
            if stop {
                return;
            }
            let settled = self.outlets.settled.of(self.index);
            let parked = &self.parked;
            self.residents
                .shrink(settled, |did| parked.contains_key(did));
            self.gauges.queue.set(self.inbox.len() as i64);
            self.gauges.parked.set(self.parked_items as i64);
            self.gauges.residents.set(self.residents.len() as i64);
            self.outlets.heartbeat.beat();
        }
    }

    fn take(&mut self, work: Work) {
        match work {
            Work::Event(received) => {
                let did = received.did.clone();
                let metrics = &self.outlets.metrics;
                match self.residents.get(&did) {
                    Some(_) => metrics.account_cache_hits.inc(),
                    None => metrics.account_cache_misses.inc(),
                }
                self.arrive(
                    did,
                    Item::Event(Event {
                        waiting: Waiting::new(received),
                    }),
                );
            }
            Work::Command(command) => {
                let did = command.did.clone();
                self.arrive(did, Item::Command(command));
            }
            Work::Answer { did, asker, answer } => {
                // What waits for its check was judged by what was known before.
                if self.checking.contains(&did) {
                    self.check_signatures();
                }
                for lane in self.learn(&did, asker, answer) {
                    self.resume(&did, lane);
                }
            }
            Work::Apply(tuning) => self.at.tuning = tuning,
            Work::Shrink => self.residents.let_some_go(),
            Work::Nothing => self.pass_on = true,
            Work::Stop => {}
        }
    }

    /// A new item goes behind those of its lane that wait, else it is judged now.
    fn arrive(&mut self, did: Did, item: Item) {
        match self.lane(&did, item.lane()) {
            Some(parked) => {
                parked.items.push_back(item.parked());
                self.parked_items += 1;
            }
            None => self.consider(&did, item),
        }
    }

    fn lane(&mut self, did: &Did, lane: Lane) -> Option<&mut Parked> {
        self.parked.get_mut(did)?.get_mut(&lane)
    }

    /// Goes on with a lane whose question was answered, until it asks again or nothing waits.
    fn resume(&mut self, did: &Did, lane: Lane) {
        while let Some(parked) = self.lane(did, lane) {
            if parked.asking.is_some() {
                return;
            }
            let Some(item) = parked.items.pop_front() else {
                return self.close(did, lane);
            };
            self.parked_items -= 1;
            self.consider(did, item);
            self.check_signatures();
        }
    }

    /// Nothing waits in this lane any more.
    fn close(&mut self, did: &Did, lane: Lane) {
        if let Some(lanes) = self.parked.get_mut(did) {
            lanes.remove(&lane);
            if lanes.is_empty() {
                self.parked.remove(did);
            }
        }
    }

    fn consider(&mut self, did: &Did, item: Item) {
        if self.checking.contains(did) {
            self.check_signatures();
            let parked = self.lane(did, item.lane());
            if let Some(parked) = parked.filter(|parked| parked.asking.is_some()) {
                parked.items.push_back(item.parked());
                self.parked_items += 1;
                return;
            }
        }
        match item {
            Item::Event(event) => self.consider_event(did, event),
            Item::Command(command) => self.obey(command),
        }
    }

    fn consider_event(&mut self, did: &Did, event: Event) {
        if event.waiting.received.host.is_banned() {
            return drop_event(&event.waiting, Rule::HostBanned);
        }
        let account = self.residents.get(did).map(|account| &*account);
        match judge::judge(&event.waiting, account, &self.at) {
            Ok(Finding::Check(candidate)) => {
                self.checking.insert(did.clone());
                self.checks.push((event, candidate));
            }
            Ok(Finding::Identity(frame)) => self.forward_identity(event, frame),
            Ok(Finding::Account(upstream)) => self.forward_account(event, upstream),
            Err(obstacle) => self.stop(event, obstacle),
        }
    }

    fn stop(&mut self, event: Event, obstacle: Obstacle) {
        match obstacle {
            Obstacle::Ask(question) => self.ask(event, question),
            Obstacle::Admit => {
                let Received { did, host, .. } = &event.waiting.received;
                let (did, host) = (did.clone(), host.clone());
                self.admit(&did, &host);
                self.consider_event(&did, event);
            }
            Obstacle::Drop(rule) => drop_event(&event.waiting, rule),
        }
    }

    /// Holds an account, for which its PDS speaks, against the host's quota: over it the account is throttled, and one
    /// that was throttled comes free where there is room. Consumers who know the account are told.
    fn admit(&mut self, did: &Did, host: &HostHandle) {
        let Some(account) = self.residents.get(did) else {
            return;
        };
        let counted = mem::replace(&mut account.counted, true);
        let room = if counted {
            host.fits_quota()
        } else {
            host.admit_account()
        };
        let before = account.local;
        account.local = policy::admitted(before, room);
        let local = account.local;
        if account.known && local != before {
            self.announce(did, local, None);
        }
        self.store_account(did, host.id());
    }

    /// An account that was deleted counts nowhere.
    fn dismiss(&mut self, did: &Did, host: &HostHandle) {
        let Some(account) = self.residents.get(did) else {
            return;
        };
        if mem::take(&mut account.counted) {
            host.release_account();
        }
        if !account.known {
            self.store_account(did, host.id());
        }
    }

    /// Stores that an account counts with its PDS, or no more; one that SQL has not with all that is known of it.
    fn store_account(&mut self, did: &Did, host: HostId) {
        let Some(account) = self.residents.get(did) else {
            return;
        };
        let mut update = AccountUpdate {
            host: Some(host),
            counted: Some(account.counted),
            ..AccountUpdate::new(did.clone())
        };
        if !account.known {
            account.known = true;
            update.local = Some(account.local);
            update.key = account.resolved_at.map(|resolved_at| KnownKey {
                signing_key: account.key.as_ref().map(|(key, _)| *key),
                resolved_at,
            });
        }
        (self.outlets.updates)(update);
    }

    fn ask(&mut self, event: Event, question: Question) {
        let did = event.waiting.received.did.clone();
        let host = event.waiting.received.host.clone();
        let since = event.waiting.received.at;
        self.park(did, Item::Event(event), question, Some(host), since);
    }

    /// Parks an item before those of its lane, and asks its question. The account is read, and its move waited for, once for all
    /// lanes.
    fn park(
        &mut self,
        did: Did,
        item: Item,
        question: Question,
        asker: Option<Arc<HostHandle>>,
        since: Instant,
    ) {
        let asked_after = self
            .residents
            .peek(&did)
            .map_or(0, |account| account.ticket);
        let lanes = self.parked.entry(did.clone()).or_default();
        let shared = matches!(question, Question::Account | Question::Written);
        let is_asked = shared && lanes.values().any(|lane| lane.asking == Some(question));
        let parked = lanes.entry(item.lane()).or_default();
        parked.items.push_front(item.parked());
        self.parked_items += 1;
        parked.asking = Some(question);
        parked.asked_after = asked_after;
        if !is_asked {
            self.look_up(did, question, asker, since, false);
        }
    }

    fn look_up(
        &self,
        did: Did,
        question: Question,
        asker: Option<Arc<HostHandle>>,
        since: Instant,
        beside: bool,
    ) {
        let account = self.residents.peek(&did);
        let after = account.map_or(0, |account| match question {
            Question::Written => account.moving.unwrap_or(0),
            _ => account.ticket,
        });
        // The look-ups end only with the process; an answer that never comes is then of no use to anyone.
        let _ = self.outlets.lookups.send(Lookup {
            shard: self.index,
            did,
            question,
            asker,
            since,
            beside,
            after,
        });
    }

    /// Checks the signatures that are due, all at once, and follows the verdicts.
    fn check_signatures(&mut self) {
        if self.checks.is_empty() {
            return;
        }
        let checks = mem::take(&mut self.checks);
        self.checking.clear();
        let jobs: Vec<Job<'_>> = checks
            .iter()
            .map(|(_, candidate)| Job {
                key: &candidate.key,
                signed: &candidate.facts.signed,
            })
            .collect();
        let verdicts = signature::verify(&jobs);
        for ((mut event, candidate), good) in checks.into_iter().zip(verdicts) {
            if good {
                self.accept(event, candidate);
            } else {
                let obstacle = judge::bad_signature(&event.waiting);
                event.waiting.facts = Some(candidate.facts);
                self.stop(event, obstacle);
            }
        }
    }

    /// A `#commit` or `#sync` that broke no rule: its state is stored, its frame goes to the log.
    fn accept(&mut self, event: Event, candidate: Candidate) {
        let received = &event.waiting.received;
        if candidate.sync11 {
            received.host.mark_sync11();
        }
        let did = received.did.clone();
        let frame = received.frame.clone();
        let span = received.seq_span.clone();
        let is_sync = received.kind == Kind::Sync;
        let desync = self.at.tuning.desync;
        let now = self.at.now();
        let Some(account) = self.residents.get(&did) else {
            return;
        };
        let repo = judge::repo_state(&candidate.facts, candidate.chain);
        account.repo = Some(repo.into());
        let renew_for = account
            .identity_due(self.at.tuning.identity_ttl, now)
            .then(|| received.host.clone());
        if renew_for.is_some() {
            account.asked_identity_at = now;
        }
        if candidate.chain == Chain::Broken {
            self.outlets.metrics.desynchronized.inc();
        }
        let mut announce = policy::follow_chain(account, candidate.chain, is_sync, now, desync);
        let update = AccountUpdate {
            repo: Some(repo),
            ..AccountUpdate::new(did.clone())
        };
        if announce == Some(LocalStatus::Active) {
            self.announce(&did, LocalStatus::Active, None);
            announce = None;
        }
        self.emit(event, frame, span, Some(update), false);
        if let Some(local) = announce {
            self.announce(&did, local, None);
        }
        if renew_for.is_some() {
            // Past its time: it is asked for again beside the account's events.
            let question = Question::Identity { fresh: false };
            self.look_up(did, question, renew_for, Instant::now(), true);
        }
    }

    fn forward_identity(&mut self, event: Event, edited: Option<Vec<u8>>) {
        let received = &event.waiting.received;
        let account = self.residents.get(&received.did);
        let edited = if account.is_some_and(|it| policy::has_ended(it.local, &it.upstream)) {
            let frame = edited.as_deref().unwrap_or(&received.frame);
            frame::plain_identity(frame, &self.at.time()).map(Some)
        } else {
            Ok(edited)
        };
        let Some((frame, span)) = outgoing(received, edited) else {
            return drop_event(&event.waiting, Rule::Edit);
        };
        self.emit(event, frame, span, None, false);
    }

    fn forward_account(&mut self, event: Event, upstream: UpstreamStatus) {
        let received = &event.waiting.received;
        let (did, host) = (received.did.clone(), received.host.clone());
        let deleted = upstream == UpstreamStatus::Deleted;
        let Some(account) = self.residents.get(&did) else {
            return;
        };
        if !deleted && judge::needs_admission(account, &host) {
            self.admit(&did, &host);
        }
        let Some(account) = self.residents.get(&did) else {
            return;
        };
        let (active, status) = combined_status(account.local, &upstream);
        let edited = match policy::account_form(account.local, &upstream) {
            AccountForm::AsReceived => Ok(None),
            AccountForm::CombinedStatus => {
                frame::with_account_status(&received.frame, active, status).map(Some)
            }
            AccountForm::Plain => {
                frame::plain_account(&received.frame, active, status, &self.at.time()).map(Some)
            }
        };
        let Some((frame, span)) = outgoing(received, edited) else {
            return drop_event(&event.waiting, Rule::Edit);
        };
        account.upstream = upstream.clone();
        // A host may repeat itself as often as it likes: only what came since is there to be taken out.
        let redact = deleted && !account.redacted;
        if deleted {
            self.dismiss(&did, &host);
        }
        let update = AccountUpdate {
            upstream: Some(upstream),
            counted: deleted.then_some(false),
            ..AccountUpdate::new(did.clone())
        };
        self.emit(event, frame, span, Some(update), redact);
        if let Some(account) = self.residents.get(&did) {
            account.redacted = deleted;
        }
    }

    fn emit(
        &mut self,
        event: Event,
        frame: Bytes,
        seq_span: Range<usize>,
        update: Option<AccountUpdate>,
        redact: bool,
    ) {
        let Event {
            waiting: Waiting { received, .. },
        } = event;
        let ticket = self.touch(&received.did);
        if let Some(account) = self.residents.get(&received.did) {
            account.redacted = false;
        }
        let redact = redact.then(|| received.did.clone());
        self.accepted.push(Append {
            frame,
            seq_span,
            origin: Origin::Host {
                id: received.host.id().0,
                seq: received.seq,
            },
            did: received.did,
            kind: received.kind,
            given_seq: None,
            payload: Settlement {
                in_flight: Some(received.permit),
                update,
                received: received.at,
                kind: received.kind,
                shard: self.index,
                ticket,
                redact,
                reply: None,
            },
        });
    }

    /// Numbers a change of an account, so that it stays resident until the store's writer knows of it.
    fn touch(&mut self, did: &Did) -> u64 {
        self.ticket += 1;
        if let Some(account) = self.residents.get(did) {
            account.ticket = self.ticket;
        }
        self.ticket
    }

    /// Carries out an operator's decision.
    fn obey(&mut self, command: Command) {
        let did = command.did.clone();
        let Some(account) = self.residents.get(&did) else {
            let item = Item::Command(command);
            return self.park(did, item, Question::Account, None, Instant::now());
        };
        if !account.known {
            let _ = command.reply.send(Err(CommandError::UnknownAccount));
            return;
        }
        if !policy::changes(account.local, command.local, command.only_from) {
            let _ = command.reply.send(Ok(()));
            return;
        }
        account.local = command.local;
        self.announce(&did, command.local, Some(command.reply));
    }

    /// Stores a local status and tells consumers of it by an `#account` event of the relay's own.
    fn announce(&mut self, did: &Did, local: LocalStatus, reply: Option<Reply>) {
        (self.outlets.updates)(AccountUpdate {
            local: Some(local),
            ..AccountUpdate::new(did.clone())
        });
        let mut upstream = UpstreamStatus::default();
        if let Some(account) = self.residents.get(did) {
            account.redacted |= local == LocalStatus::TakenDown;
            upstream = account.upstream.clone();
        }
        let (active, status) = combined_status(local, &upstream);
        let time = self.at.time();
        let event = frame::Account {
            seq: 0,
            did: did.as_str(),
            time: &time,
            active,
            status,
        };
        let frame = frame::encode_account(&event);
        let Some(seq_span) = seq_span(&frame) else {
            return;
        };
        let ticket = self.touch(did);
        self.accepted.push(Append {
            frame: frame.into(),
            seq_span,
            // So that a replay finds what it announces.
            origin: Origin::Relay { code: local.code() },
            did: did.clone(),
            kind: Kind::Account,
            given_seq: None,
            payload: Settlement {
                in_flight: None,
                update: None,
                received: Instant::now(),
                kind: Kind::Account,
                shard: self.index,
                ticket,
                redact: (local == LocalStatus::TakenDown).then(|| did.clone()),
                reply,
            },
        });
    }

    /// Hands what was accepted to the sequencer. False when there is none any more.
    fn hand_over(&mut self) -> bool {
        let pass_on = mem::take(&mut self.pass_on);
        if self.accepted.is_empty() && !pass_on {
            return true;
        }
        let accepted = mem::take(&mut self.accepted);
        match self.outlets.log.try_send(accepted) {
            Ok(()) => true,
            // The sequencer has a heartbeat of its own.
            Err(TrySendError::Full(accepted)) => {
                let Outlets { heartbeat, log, .. } = &self.outlets;
                heartbeat.wait(|| log.send(accepted)).is_ok()
            }
            Err(TrySendError::Disconnected(_)) => false,
        }
    }

    /// Takes in an answer. Returns the lanes that waited for it.
    fn learn(&mut self, did: &Did, asker: Option<Arc<HostHandle>>, answer: Answer) -> Vec<Lane> {
        let lane = asker.as_ref().map(|host| host.id());
        let lanes = match answer {
            Answer::Account(row) => {
                let lanes = self.lanes_that_ask(did, Question::Account);
                self.learn_row(did, row.map(|row| *row), &lanes);
                lanes
            }
            Answer::Identity { result, fresh } => {
                if let Some(waiting) = self.first_waiting(did, lane) {
                    waiting.refreshed |= fresh;
                    waiting.identity = Some(result.clone());
                }
                self.learn_identity(did, result, asker.as_ref());
                vec![lane]
            }
            Answer::Status(status, seq) => {
                if let Some(waiting) = self.first_waiting(did, lane) {
                    waiting.asked_status = true;
                }
                if let Some(host) = &asker {
                    self.learn_status(did, host, status, seq);
                }
                vec![lane]
            }
            Answer::Written(moved) => {
                let account = self.residents.get(did);
                if let Some(account) = account.filter(|account| account.moving == Some(moved)) {
                    account.moving = None;
                }
                self.lanes_that_ask(did, Question::Written)
            }
            Answer::Renewed(result) => {
                self.learn_identity(did, result, asker.as_ref());
                Vec::new()
            }
        };
        for lane in &lanes {
            if let Some(parked) = self.lane(did, *lane) {
                parked.asking = None;
            }
        }
        lanes
    }

    fn lanes_that_ask(&self, did: &Did, question: Question) -> Vec<Lane> {
        let lanes = self.parked.get(did).into_iter().flatten();
        let asking = lanes.filter(|(_, parked)| parked.asking == Some(question));
        asking.map(|(lane, _)| *lane).collect()
    }

    /// Takes in the row that these lanes asked for. What changed since is newer than the row: an account that moved
    /// meanwhile is not given back.
    fn learn_row(&mut self, did: &Did, row: Option<AccountRow>, lanes: &[Lane]) {
        let lanes = lanes
            .iter()
            .filter_map(|lane| self.parked.get(did)?.get(lane));
        let asked_after = lanes.map(|parked| parked.asked_after).min().unwrap_or(0);
        let account = self.residents.peek(did);
        if account.is_some_and(|account| account.ticket > asked_after) {
            self.residents.complete(did, row);
        } else {
            self.residents.learn(did, row);
        }
    }

    fn learn_identity(
        &mut self,
        did: &Did,
        result: Result<Arc<Identity>, NoIdentity>,
        asker: Option<&Arc<HostHandle>>,
    ) {
        match (result, asker) {
            (Ok(identity), Some(host)) => self.move_to(did, &identity, host),
            (Err(reason), _) if reason.is_certain() => self.forget_identity(did),
            _ => {
                let now = self.at.now();
                if let Some(account) = self.residents.get(did) {
                    account.asked_identity_at = now;
                }
            }
        }
    }

    /// Takes in the key and the PDS of an identity that was asked for an event of `host`. Where the account leaves a
    /// host, it counts there no more, and with the next one only when that has spoken for it: whoever may write
    /// documents can name any host in them.
    fn move_to(&mut self, did: &Did, identity: &Identity, host: &Arc<HostHandle>) {
        let hosts = &self.outlets.hosts;
        let Some(account) = self.residents.get(did) else {
            return;
        };
        let now_at = match identity.pds.as_ref() {
            Some(pds) if pds == host.host() => Some(host.clone()),
            Some(pds) => hosts.by_name(pds.name()),
            None => None,
        };
        let new_host = now_at.map(|now_at| now_at.id());
        let Some(Move { leaves, uncounted }) = policy::apply_identity(account, identity, new_host)
        else {
            return;
        };
        let before = match uncounted {
            Some(id) if id == host.id() => Some(host.clone()),
            id => id.and_then(|id| hosts.get(id)),
        };
        if let Some(before) = before {
            before.release_account();
        }
        if !account.known {
            return;
        }
        if leaves {
            self.moves += 1;
            account.moving = Some(self.moves);
        }
        (self.outlets.updates)(AccountUpdate {
            host: new_host.filter(|_| leaves),
            counted: leaves.then_some(false),
            key: Some(KnownKey {
                // Without a key in SQL the identity is asked for again after a restart.
                signing_key: identity.signing_key.filter(|_| new_host.is_some()),
                resolved_at: identity.resolved_at,
            }),
            ..AccountUpdate::new(did.clone())
        });
    }

    /// There is no such identity (any more): the key that was known counts no longer, also after a restart.
    fn forget_identity(&mut self, did: &Did) {
        let Some(account) = self.residents.get(did) else {
            return;
        };
        account.set_key(None);
        account.resolved_at = None;
        if account.known {
            (self.outlets.updates)(AccountUpdate {
                key: Some(KnownKey {
                    signing_key: None,
                    resolved_at: self.at.now(),
                }),
                ..AccountUpdate::new(did.clone())
            });
        }
    }

    /// Takes in what the PDS `host` says of an account when it is asked. The log does not have it: `seq` is where it
    /// would stand there. The account may have left the host meanwhile.
    fn learn_status(
        &mut self,
        did: &Did,
        host: &HostHandle,
        status: Option<UpstreamStatus>,
        seq: u64,
    ) {
        let now = self.at.now();
        let Some(account) = self.residents.get(did) else {
            return;
        };
        let Some(status) = policy::apply_status(account, host.id(), status, now) else {
            return;
        };
        let deleted = status == UpstreamStatus::Deleted;
        if deleted {
            self.dismiss(did, host);
        }
        (self.outlets.updates)(AccountUpdate {
            upstream: Some(status),
            status_seq: Some(seq),
            counted: deleted.then_some(false),
            ..AccountUpdate::new(did.clone())
        });
    }

    fn first_waiting(&mut self, did: &Did, lane: Lane) -> Option<&mut Waiting> {
        match self.lane(did, lane)?.items.front_mut()? {
            Item::Event(event) => Some(&mut event.waiting),
            Item::Command(_) => None,
        }
    }
}

/// Counts and logs a refused event; its host's cursor moves past it when the permit goes.
fn drop_event(waiting: &Waiting, rule: Rule) {
    let received = &waiting.received;
    let did = received.did.as_str();
    received
        .host
        .count_drop(rule, did, Some(received.seq), &rule);
}

/// The frame to forward, and where its seq stands: the received one, or the edited one where something had to be
/// changed. `None` where the edited one is none, or too long.
fn outgoing(
    received: &Received,
    edited: Result<Option<Vec<u8>>, FrameError>,
) -> Option<(Bytes, Range<usize>)> {
    let Some(frame) = edited.ok()? else {
        return Some((received.frame.clone(), received.seq_span.clone()));
    };
    let span = seq_span(&frame)?;
    frame::fits_any_seq(frame.len(), &span).then(|| (frame.into(), span))
}

/// Where an event's seq stands in its frame.
fn seq_span(frame: &[u8]) -> Option<Range<usize>> {
    match frame::peek(frame) {
        Ok(Peek::Event(event)) => Some(event.seq_span),
        _ => None,
    }
}
