//! One shard between its queues: what it asks, in which order events leave it, what it stores.

use std::sync::mpsc as std_mpsc;
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use tokio::sync::mpsc::{self, UnboundedReceiver, UnboundedSender};
use tokio::sync::oneshot;
use tokio::time::timeout;

use super::sample::{DID, Draft, Repo, Write, public_key, secret};
use crate::atproto::did::Did;
use crate::atproto::frame::{self, Kind, MAX_FRAME_BYTES, Message, Peek};
use crate::atproto::key::PublicKey;
use crate::clock::Clock;
use crate::eventlog::Append;
use crate::heartbeat::Heartbeat;
use crate::hosts::Rule;
use crate::hosts::{HostHandle, HostIndex, HostState, Received};
use crate::identity::{HostName, Identity};
use crate::store::{
    AccountRow, AccountUpdate, HostId, KnownKey, LocalStatus, UpstreamStatus, Validation,
};
use crate::verify::judge::{NoIdentity, Question};
use crate::verify::shard::{Answer, Command, Lookup, Outlets, Shard, Work};
use crate::verify::{DesyncLimits, Metrics, Options, Places, Settlement, Settlements, Tuning};

const PATIENCE: Duration = Duration::from_secs(20);
const BREAKS_ALLOWED: u32 = 2;
const CACHED: Question = Question::Identity { fresh: false };
const FRESH: Question = Question::Identity { fresh: true };

struct Bench {
    inbox: UnboundedSender<Work>,
    questions: UnboundedReceiver<Lookup>,
    log: std_mpsc::Receiver<Vec<Append<Settlement>>>,
    accepted: Vec<Append<Settlement>>,
    updates: Arc<Mutex<Vec<AccountUpdate>>>,
    host: Arc<HostHandle>,
    seq: i64,
}

impl Bench {
    fn new() -> Self {
        let (inbox, work) = mpsc::unbounded_channel();
        let (lookups, questions) = mpsc::unbounded_channel();
        let (to_log, log) = std_mpsc::sync_channel(64);
        let updates: Arc<Mutex<Vec<AccountUpdate>>> = Arc::default();
        let kept = updates.clone();
        let outlets = Outlets {
            log: to_log,
            lookups,
            updates: Box::new(move |update| kept.lock().unwrap().push(update)),
            hosts: HostIndex::default(),
            settled: Settlements::new(1, 0),
            heartbeat: Heartbeat::default(),
            metrics: Metrics::default(),
        };
        let options = Options {
            shards: 1,
            account_bytes: 1 << 20,
            tuning: Tuning {
                identity_ttl: Duration::from_secs(3_600),
                status_interval: Duration::from_secs(60),
                validation: Validation::Strict,
                desync: DesyncLimits {
                    limit: BREAKS_ALLOWED,
                    period: Duration::from_secs(3_600),
                },
                account_event_bytes: usize::MAX,
            },
            places: Places {
                directory: 1,
                hosts: 1,
            },
            clock: Clock::default(),
        };
        let shard = Shard::new(0, options, work, outlets);
        // Ends when its inbox is dropped.
        thread::spawn(move || shard.run());
        Self {
            inbox,
            questions,
            log,
            accepted: Vec::new(),
            updates,
            host: Arc::new(HostHandle::fabricated(HostId(1), 100, 0)),
            seq: 0,
        }
    }

    /// A shard that has the account already, at [`Bench::host`].
    async fn with_account() -> (Self, Repo) {
        let mut bench = Self::new();
        let mut repo = Repo::new();
        bench.commit(&repo.commit(&[]));
        bench.asked(Question::Account).await;
        bench.answer(Answer::Account(None));
        bench.asked(CACHED).await;
        bench.identity(CACHED, Ok(bench.document(secret(5))));
        bench.next_out();
        (bench, repo)
    }

    fn send(&mut self, kind: Kind, frame: Vec<u8>) {
        self.send_from(self.host.clone(), kind, frame);
    }

    fn send_from(&mut self, host: Arc<HostHandle>, kind: Kind, frame: Vec<u8>) {
        let Ok(Peek::Event(event)) = frame::peek(&frame) else {
            panic!("an event");
        };
        self.seq += 1;
        let received = Received {
            seq: self.seq,
            seq_span: event.seq_span,
            kind,
            did: Did::parse(DID).unwrap(),
            permit: {
                let progress = host.progress();
                progress.begin(self.seq, progress.some_room(frame.len()))
            },
            host,
            frame: frame.into(),
            at: Instant::now(),
        };
        assert!(self.inbox.send(Work::Event(received)).is_ok());
    }

    fn account(&mut self, active: bool, status: Option<&str>) {
        let event = frame::Account {
            seq: 1,
            did: DID,
            time: "2026-09-21T14:13:20.000Z",
            active,
            status,
        };
        self.send(Kind::Account, frame::encode_account(&event));
    }

    /// An `#account` so long.
    fn account_of(&mut self, bytes: usize) {
        let frame = |time: &str| {
            frame::encode_account(&frame::Account {
                seq: 1,
                did: DID,
                time,
                active: true,
                status: None,
            })
        };
        // A text of 65,536 characters and more has a head of five bytes, and an empty one of one.
        let filler = "x".repeat(bytes - frame("").len() - 4);
        let frame = frame(&filler);
        assert_eq!(frame.len(), bytes);
        self.send(Kind::Account, frame);
    }

    /// The last host that was stored.
    fn stored_host(&self) -> Option<HostId> {
        let updates = self.updates.lock().unwrap();
        updates.iter().rev().find_map(|update| update.host)
    }

    fn commit(&mut self, draft: &Draft) {
        self.send(Kind::Commit, draft.frame());
    }

    fn decide(&self, local: LocalStatus) {
        let (reply, _) = oneshot::channel();
        let command = Command {
            did: Did::parse(DID).unwrap(),
            local,
            only_from: None,
            reply,
        };
        assert!(self.inbox.send(Work::Command(command)).is_ok());
    }

    /// The next question is this one.
    async fn asked(&mut self, question: Question) {
        let next = timeout(PATIENCE, self.questions.recv()).await;
        assert_eq!(next.unwrap().unwrap().question, question);
    }

    /// SQL is asked for the last move, and has it.
    async fn written(&mut self) {
        let next = timeout(PATIENCE, self.questions.recv()).await;
        let next = next.unwrap().unwrap();
        assert_eq!(next.question, Question::Written);
        self.answer(Answer::Written(next.after));
    }

    fn answer(&self, answer: Answer) {
        self.answer_to(&self.host, answer);
    }

    fn answer_to(&self, asker: &Arc<HostHandle>, answer: Answer) {
        let work = Work::Answer {
            did: Did::parse(DID).unwrap(),
            asker: Some(asker.clone()),
            answer,
        };
        assert!(self.inbox.send(work).is_ok());
    }

    fn identity(&self, question: Question, result: Result<Identity, NoIdentity>) {
        self.answer(Answer::Identity {
            result: result.map(Arc::new),
            fresh: question == FRESH,
        });
    }

    /// An identity at this bench's host.
    fn document(&self, key: secp256k1::SecretKey) -> Identity {
        Identity {
            did: Did::parse(DID).unwrap(),
            pds: Some(self.host.host().clone()),
            signing_key: Some(public_key(&key)),
            handles: Vec::new(),
            resolved_at: now(),
        }
    }

    fn elsewhere() -> HostName {
        HostHandle::fabricated(HostId(2), 100, 0).host().clone()
    }

    /// The next event that goes to the log, as `kind rev-or-status`.
    fn next_out(&mut self) -> String {
        if self.accepted.is_empty() {
            self.accepted = self.log.recv_timeout(PATIENCE).unwrap();
        }
        let append = self.accepted.remove(0);
        match frame::decode(&append.frame).unwrap().message {
            Message::Commit(commit) => format!("commit {}", commit.rev),
            Message::Sync(sync) => format!("sync {}", sync.rev),
            Message::Account(account) => format!("account {:?}", account.status),
            Message::Identity(_) => "identity".to_owned(),
            other => panic!("not an event: {other:?}"),
        }
    }

    /// The last key that was stored.
    fn stored_key(&self) -> Option<KnownKey> {
        let updates = self.updates.lock().unwrap();
        updates.iter().rev().find_map(|update| update.key)
    }
}

fn now() -> i64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap()
        .as_secs() as i64
}

fn out(draft: &Draft) -> String {
    format!("commit {}", draft.rev)
}

fn row(signing_key: Option<PublicKey>) -> Answer {
    Answer::Account(Some(Box::new(AccountRow {
        uid: 1,
        did: Did::parse(DID).unwrap(),
        host: HostId(1),
        counted: true,
        local: LocalStatus::Active,
        upstream: UpstreamStatus::Active,
        repo: None,
        signing_key,
        resolved_at: Some(now()),
    })))
}

#[tokio::test]
async fn events_that_wait_leave_in_their_order() {
    let mut bench = Bench::new();
    let mut repo = Repo::new();
    let drafts: Vec<Draft> = ["a", "b", "c"]
        .map(|key| repo.commit(&[Write::Put(&format!("com.example.note/{key}"), "x")]))
        .into();
    drafts.iter().for_each(|draft| bench.commit(draft));
    bench.asked(Question::Account).await;
    bench.answer(Answer::Account(None));
    bench.asked(CACHED).await;
    bench.identity(CACHED, Ok(bench.document(secret(5))));
    for draft in &drafts {
        assert_eq!(bench.next_out(), out(draft));
    }
    assert!(
        bench.questions.try_recv().is_err(),
        "one look-up was enough"
    );
    assert_eq!(bench.host.account_count(), 1);
}

#[tokio::test]
async fn a_rotated_key_is_looked_up_and_a_forged_commit_refused() {
    let (mut bench, mut repo) = Bench::with_account().await;
    let mut rotated = repo.commit(&[]);
    rotated.key = secret(6);
    let mut forged = repo.commit(&[]);
    forged.key = secret(7);
    let mut next = repo.commit(&[]);
    next.key = secret(6);
    next.since = Some(rotated.rev.clone());
    bench.commit(&rotated);
    bench.commit(&forged);
    bench.commit(&next);
    bench.asked(FRESH).await;
    bench.identity(FRESH, Ok(bench.document(secret(6))));
    assert_eq!(bench.next_out(), out(&rotated));
    bench.asked(FRESH).await;
    bench.identity(FRESH, Ok(bench.document(secret(6))));
    assert_eq!(bench.next_out(), out(&next));
}

/// Its commits pass no more, also not when it is read from SQL again.
#[tokio::test]
async fn the_key_of_a_did_that_was_given_up_is_forgotten() {
    let (mut bench, mut repo) = Bench::with_account().await;
    let mut forged = repo.commit(&[]);
    forged.key = secret(7);
    bench.commit(&forged);
    bench.asked(FRESH).await;
    bench.identity(FRESH, Err(NoIdentity::Tombstoned));
    bench.commit(&repo.commit(&[]));
    bench.asked(CACHED).await;
    assert_eq!(bench.stored_key().map(|key| key.signing_key), Some(None));

    let mut bench = Bench::new();
    bench.commit(&repo.commit(&[]));
    bench.asked(Question::Account).await;
    bench.answer(row(None));
    bench.asked(CACHED).await;
}

#[tokio::test]
async fn what_waits_of_a_host_that_is_banned_is_dropped() {
    let (mut bench, mut repo) = Bench::with_account().await;
    let mut rotated = repo.commit(&[]);
    rotated.key = secret(6);
    bench.commit(&rotated);
    bench.commit(&repo.commit(&[]));
    bench.asked(FRESH).await;
    bench.host.set_state(HostState::Banned);
    bench.identity(FRESH, Ok(bench.document(secret(6))));
    let dropped = async {
        while bench.host.drops_by_rule() != [(Rule::HostBanned, 2)] {
            tokio::task::yield_now().await;
        }
    };
    timeout(PATIENCE, dropped).await.expect("both are dropped");
    assert_eq!(bench.host.progress().in_flight(), (0, 0));
}

#[tokio::test]
async fn a_known_key_needs_no_look_up_after_a_restart() {
    let mut bench = Bench::new();
    let draft = Repo::new().commit(&[]);
    bench.commit(&draft);
    bench.asked(Question::Account).await;
    bench.answer(row(Some(public_key(&secret(5)))));
    assert_eq!(bench.next_out(), out(&draft));
}

#[tokio::test]
async fn an_account_that_left_and_comes_back_is_counted_once() {
    let (mut bench, mut repo) = Bench::with_account().await;
    let mut forged = repo.commit(&[]);
    forged.key = secret(7);
    for pds in [Some(Bench::elsewhere()), None] {
        bench.commit(&forged);
        bench.asked(FRESH).await;
        let moved = Identity {
            pds,
            ..bench.document(secret(5))
        };
        bench.identity(FRESH, Ok(moved));
        bench.written().await;
        let back = repo.commit(&[]);
        bench.commit(&back);
        bench.asked(FRESH).await;
        assert_eq!(bench.stored_key().map(|key| key.signing_key), Some(None));
        bench.identity(FRESH, Ok(bench.document(secret(5))));
        assert_eq!(bench.next_out(), out(&back));
        assert_eq!(bench.host.account_count(), 1);
        forged = repo.commit(&[]);
        forged.key = secret(7);
    }
}

/// Over the limit the account is throttled, consumers are told, and a `#sync` brings it back.
#[tokio::test]
async fn an_account_whose_chain_keeps_breaking_is_throttled_until_it_syncs() {
    let (mut bench, mut repo) = Bench::with_account().await;
    for broken in 0..=BREAKS_ALLOWED {
        let mut draft = repo.commit(&[]);
        draft.since = None;
        bench.commit(&draft);
        assert_eq!(bench.next_out(), out(&draft), "break {broken} is forwarded");
    }
    assert_eq!(bench.next_out(), "account Some(\"desynchronized\")");
    bench.commit(&repo.commit(&[]));
    let synced = repo.commit(&[]);
    bench.send(Kind::Sync, synced.sync_frame());
    assert_eq!(bench.next_out(), "account None");
    assert_eq!(bench.next_out(), format!("sync {}", synced.rev));
    let next = repo.commit(&[]);
    bench.commit(&next);
    assert_eq!(bench.next_out(), out(&next));
}

/// Nothing that a host sends delays what the operator decides.
#[tokio::test]
async fn decisions_do_not_wait_for_events_that_wait_for_a_look_up() {
    let (mut bench, mut repo) = Bench::with_account().await;
    let mut rotated = repo.commit(&[]);
    rotated.key = secret(6);
    bench.commit(&rotated);
    bench.asked(FRESH).await;
    bench.decide(LocalStatus::TakenDown);
    assert_eq!(bench.next_out(), "account Some(\"takendown\")");
    bench.commit(&repo.commit(&[]));
    bench.identity(FRESH, Ok(bench.document(secret(6))));
    bench.decide(LocalStatus::Active);
    assert_eq!(
        bench.next_out(),
        "account None",
        "both commits were refused"
    );
    let mut next = repo.commit(&[]);
    next.key = secret(6);
    bench.commit(&next);
    assert_eq!(bench.next_out(), out(&next));
}

/// An event of a host without authority waits beside the account's own, which pass.
#[tokio::test]
async fn events_of_another_host_do_not_hold_up_the_accounts_own() {
    let (mut bench, mut repo) = Bench::with_account().await;
    let stranger = Arc::new(HostHandle::fabricated(HostId(2), 100, 0));
    bench.send_from(stranger.clone(), Kind::Identity, identity_frame());
    bench.asked(FRESH).await;
    let commits = [repo.commit(&[]), repo.commit(&[])];
    for commit in &commits {
        bench.commit(commit);
        assert_eq!(bench.next_out(), out(commit));
    }
    let identity = Ok(Arc::new(bench.document(secret(5))));
    bench.answer_to(
        &stranger,
        Answer::Identity {
            result: identity,
            fresh: true,
        },
    );
    // No host is known by its name here: the account seems to have left.
    bench.written().await;
    assert_eq!(bench.next_out(), "identity");
}

/// The first events of an account wait for one read of its row, whichever hosts they are from.
#[tokio::test]
async fn the_row_of_an_account_is_read_once_for_all_hosts() {
    let mut bench = Bench::new();
    let draft = Repo::new().commit(&[]);
    let stranger = Arc::new(HostHandle::fabricated(HostId(2), 100, 0));
    bench.send_from(stranger.clone(), Kind::Identity, identity_frame());
    bench.commit(&draft);
    bench.asked(Question::Account).await;
    bench.answer_to(&stranger, row(Some(public_key(&secret(5)))));
    assert_eq!(bench.next_out(), out(&draft));
    bench.asked(FRESH).await;
}

/// A row that was read before the account changed does not undo the change: it may be from before a move.
#[tokio::test]
async fn a_row_of_before_the_last_change_is_not_taken() {
    let (mut bench, mut repo) = Bench::with_account().await;
    let Answer::Account(Some(mut old)) = row(Some(public_key(&secret(6)))) else {
        panic!("a row");
    };
    old.host = HostId(2);
    bench.answer(Answer::Account(Some(old)));
    let next = repo.commit(&[]);
    bench.commit(&next);
    assert_eq!(bench.next_out(), out(&next));
    assert!(bench.questions.try_recv().is_err(), "nothing is asked");
}

/// The identity of an account past its time is asked for beside its events, once, and the answer is taken in.
#[tokio::test]
async fn an_old_identity_is_renewed_while_events_pass() {
    let mut bench = Bench::new();
    let mut repo = Repo::new();
    let old = now() - 2 * 3_600;
    let first = repo.commit(&[]);
    bench.commit(&first);
    bench.asked(Question::Account).await;
    let Answer::Account(Some(mut known)) = row(Some(public_key(&secret(5)))) else {
        panic!("a row");
    };
    known.resolved_at = Some(old);
    bench.answer(Answer::Account(Some(known)));
    assert_eq!(bench.next_out(), out(&first));
    bench.asked(CACHED).await;
    let second = repo.commit(&[]);
    bench.commit(&second);
    assert_eq!(bench.next_out(), out(&second));
    assert!(bench.questions.try_recv().is_err(), "asked once");
    bench.answer(Answer::Renewed(Ok(Arc::new(bench.document(secret(6))))));
    let mut third = repo.commit(&[]);
    third.key = secret(6);
    bench.commit(&third);
    assert_eq!(bench.next_out(), out(&third));
}

fn identity_frame() -> Vec<u8> {
    frame::encode_identity(&frame::Identity {
        seq: 1,
        did: DID,
        time: "2026-09-21T14:13:20.000Z",
        handle: None,
    })
}

/// What its PDS said when it was asked is newer than the events before the question, and older than those after it.
#[tokio::test]
async fn a_status_that_was_asked_for_is_stored_behind_the_events_before() {
    let (mut bench, mut repo) = Bench::with_account().await;
    bench.account(false, Some("deactivated"));
    bench.commit(&repo.commit(&[]));
    let question = bench.questions.recv().await.unwrap();
    assert_eq!((question.question, question.after), (Question::Status, 2));
    bench.answer(Answer::Status(Some(UpstreamStatus::Active), 17));
    assert_eq!(bench.next_out(), "account Some(\"deactivated\")");
    assert!(bench.next_out().starts_with("commit"));
    let updates = bench.updates.lock().unwrap();
    let learned = updates.iter().find(|update| update.upstream.is_some());
    let learned = learned.map(|update| (update.upstream.clone(), update.status_seq));
    assert_eq!(learned, Some((Some(UpstreamStatus::Active), Some(17))));
}

/// The frame that says so cannot be made: what came must not leave instead.
#[tokio::test]
async fn an_account_event_that_cannot_be_edited_is_dropped() {
    let (mut bench, mut repo) = Bench::with_account().await;
    for (local, bytes) in [
        (LocalStatus::TakenDown, MAX_FRAME_BYTES),
        (LocalStatus::Desynchronized, MAX_FRAME_BYTES - 8),
    ] {
        bench.decide(local);
        assert_eq!(
            bench.next_out(),
            format!("account Some({:?})", local.as_str())
        );
        bench.account_of(bytes);
        bench.decide(LocalStatus::Active);
        assert_eq!(bench.next_out(), "account None");
    }
    let next = repo.commit(&[]);
    bench.commit(&next);
    assert_eq!(bench.next_out(), out(&next));
}

/// Only its own PDS's word counts an account, and its deletion uncounts it.
#[tokio::test]
async fn an_account_counts_from_the_first_word_of_its_pds_to_its_deletion() {
    let mut bench = Bench::new();
    bench.send(Kind::Identity, identity_frame());
    bench.asked(Question::Account).await;
    bench.answer(Answer::Account(None));
    bench.asked(FRESH).await;
    bench.identity(FRESH, Ok(bench.document(secret(5))));
    assert_eq!(bench.next_out(), "identity");
    assert_eq!((bench.host.account_count(), bench.stored_host()), (0, None));
    for (active, status, count) in [
        (true, None, 1),
        (false, Some("deactivated"), 1),
        (false, Some("deleted"), 0),
        (false, Some("deleted"), 0),
        (true, None, 1),
    ] {
        bench.account(active, status);
        assert_eq!(bench.next_out(), format!("account {status:?}"));
        assert_eq!(bench.host.account_count(), count, "{status:?}");
        assert_eq!(bench.stored_host(), Some(HostId(1)));
    }
}

/// A host that was asked for an account's status, and is no longer its PDS when the answer comes, says nothing of it.
#[tokio::test]
async fn the_answer_of_a_host_that_was_left_meanwhile_does_not_count() {
    let (mut bench, mut repo) = Bench::with_account().await;
    bench.account(false, Some("deactivated"));
    assert_eq!(bench.next_out(), "account Some(\"deactivated\")");
    bench.commit(&repo.commit(&[]));
    bench.asked(Question::Status).await;
    let new = Arc::new(HostHandle::fabricated(HostId(2), 100, 0));
    bench.send_from(new.clone(), Kind::Identity, identity_frame());
    bench.asked(FRESH).await;
    let moved = Identity {
        pds: Some(new.host().clone()),
        ..bench.document(secret(5))
    };
    let answer = Answer::Identity {
        result: Ok(Arc::new(moved)),
        fresh: true,
    };
    bench.answer_to(&new, answer);
    bench.written().await;
    assert_eq!(bench.next_out(), "identity");
    bench.answer(Answer::Status(Some(UpstreamStatus::Deleted), 9));
    bench.asked(FRESH).await;
    let updates = bench.updates.lock().unwrap();
    assert!(updates.iter().all(|update| update.upstream.is_none()));
}

/// Events of the account and of strangers wait until SQL has the move, and no answer for an earlier one lets them go.
#[tokio::test]
async fn nothing_goes_out_before_the_last_move_is_written() {
    let (mut bench, _) = Bench::with_account().await;
    let new = Arc::new(HostHandle::fabricated(HostId(2), 1, 1));
    bench.send_from(new.clone(), Kind::Identity, identity_frame());
    bench.asked(FRESH).await;
    let moved = Identity {
        pds: Some(new.host().clone()),
        ..bench.document(secret(5))
    };
    let answer = Answer::Identity {
        result: Ok(Arc::new(moved)),
        fresh: true,
    };
    bench.answer_to(&new, answer);
    let first = bench.questions.recv().await.unwrap();
    assert_eq!((first.question, first.after), (Question::Written, 1));
    bench.answer(Answer::Written(0));
    let again = bench.questions.recv().await.unwrap();
    assert_eq!((again.question, again.after), (Question::Written, 1));
    assert!(bench.log.try_recv().is_err(), "it waits");
    bench.answer(Answer::Written(1));
    assert_eq!(bench.next_out(), "identity");
    assert_eq!(new.account_count(), 1, "the document alone does not count");
    // The new host is full, and consumers know the account.
    let active = frame::encode_account(&frame::Account {
        seq: 1,
        did: DID,
        time: "2026-09-21T14:13:20.000Z",
        active: true,
        status: None,
    });
    bench.send_from(new.clone(), Kind::Account, active.clone());
    assert_eq!(bench.next_out(), "account Some(\"throttled\")");
    assert_eq!(bench.next_out(), "account Some(\"throttled\")");
    assert_eq!(new.account_count(), 2);
    // With room it comes free.
    new.release_account();
    bench.send_from(new, Kind::Account, active);
    assert_eq!(bench.next_out(), "account None");
    assert_eq!(bench.next_out(), "account None");
}
