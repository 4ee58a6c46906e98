//! The rules that need to know of the account: what the judge asks for, and what it makes of the answers.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::sample::{DID, NOW_US, Repo, Write, public_key, secret};
use crate::atproto::cid::{Cid, Codec};
use crate::atproto::did::Did;
use crate::atproto::frame::{self, Kind, Message, Peek};
use crate::atproto::key::VerifyingKey;
use crate::atproto::tid::Tid;
use crate::hosts::Rule;
use crate::hosts::{HostHandle, Received};
use crate::identity::{HostName, Identity};
use crate::store::{HostId, LocalStatus, UpstreamStatus, Validation};
use crate::verify::account::{Account, Mark, Tip};
use crate::verify::judge::{
    Circumstances, Finding, NoIdentity, Obstacle, Question, Waiting, bad_signature, judge,
    repo_state,
};
use crate::verify::rules::Chain;
use crate::verify::{DesyncLimits, Tuning};

/// The second the tests play in.
const NOW: i64 = (NOW_US / 1_000_000) as i64;
const TTL: Duration = Duration::from_secs(3_600);
const STATUS_INTERVAL: Duration = Duration::from_secs(60);
const ACCOUNT_EVENT_BYTES: usize = 500;

/// An event, and all that is known of its account.
struct Scene {
    waiting: Waiting,
    account: Account,
    at: Circumstances,
}

impl Scene {
    fn of_frame(kind: Kind, frame: Vec<u8>, host: Arc<HostHandle>) -> Self {
        let key = public_key(&secret(5));
        let Ok(Peek::Event(event)) = frame::peek(&frame) else {
            panic!("an event");
        };
        let received = Received {
            permit: host
                .progress()
                .begin(event.seq, host.progress().some_room(frame.len())),
            host,
            seq: event.seq,
            seq_span: event.seq_span,
            kind,
            did: Did::parse(DID).unwrap(),
            frame: frame.into(),
            at: Instant::now(),
        };
        Self {
            waiting: Waiting::new(received),
            account: Account {
                known: true,
                counted: true,
                host: Some(HostId(1)),
                key: Some((key, VerifyingKey::new(&key).unwrap())),
                resolved_at: Some(NOW),
                ..Account::default()
            },
            at: Circumstances {
                now_us: NOW_US,
                tuning: Tuning {
                    identity_ttl: TTL,
                    status_interval: STATUS_INTERVAL,
                    validation: Validation::Strict,
                    desync: DesyncLimits::default(),
                    account_event_bytes: ACCOUNT_EVENT_BYTES,
                },
            },
        }
    }

    /// A good commit of an active account, whose state before it is stored.
    fn commit() -> Self {
        let mut repo = Repo::filled();
        let rev = repo.rev().unwrap();
        let draft = repo.commit(&[Write::Put("com.example.note/new", "new")]);
        let mut scene = Self::of_frame(Kind::Commit, draft.frame(), host());
        scene.account.repo = Some(Tip {
            rev,
            data: Mark::of(&draft.prev_data.unwrap()),
            commit: Some(Cid::of(Codec::DagCbor, b"commit")),
        });
        scene
    }

    fn sync() -> Self {
        let draft = Repo::filled().commit(&[]);
        Self::of_frame(Kind::Sync, draft.sync_frame(), host())
    }

    fn account() -> Self {
        let frame = frame::encode_account(&frame::Account {
            seq: 1,
            did: DID,
            time: "2026-09-21T14:13:20.000Z",
            active: false,
            status: Some("deactivated"),
        });
        Self::of_frame(Kind::Account, frame, host())
    }

    fn identity(handle: Option<&str>) -> Self {
        let frame = frame::encode_identity(&frame::Identity {
            seq: 1,
            did: DID,
            time: "2026-09-21T14:13:20.000Z",
            handle,
        });
        Self::of_frame(Kind::Identity, frame, host())
    }

    /// The identity was resolved past every cache, and names this host.
    fn refreshed(&mut self, pds: Option<HostName>) -> &mut Self {
        self.waiting.refreshed = true;
        self.waiting.identity = Some(Ok(Arc::new(Identity {
            did: Did::parse(DID).unwrap(),
            pds,
            signing_key: None,
            handles: vec![
                "alice.example.com".to_owned(),
                "Alice.example.org".to_owned(),
            ],
            resolved_at: NOW,
        })));
        self
    }

    /// Makes it an event of this kind and length.
    fn fill(&mut self, kind: Kind, bytes: usize) {
        let frame = |filler: &str| match kind {
            Kind::Identity => frame::encode_identity(&frame::Identity {
                seq: 1,
                did: DID,
                time: filler,
                handle: None,
            }),
            _ => frame::encode_account(&frame::Account {
                seq: 1,
                did: DID,
                time: filler,
                active: false,
                status: Some("deactivated"),
            }),
        };
        // A text of 256 characters and more has a head of three bytes, and an empty one of one.
        let filler = "x".repeat(bytes - frame("").len() - 2);
        let frame = frame(&filler);
        assert_eq!(frame.len(), bytes);
        self.waiting.received.kind = kind;
        self.waiting.received.frame = frame.into();
    }

    fn unresolved(&mut self, reason: NoIdentity) {
        self.account.resolved_at = None;
        self.account.host = None;
        self.waiting.refreshed = true;
        self.waiting.identity = Some(Err(reason));
    }

    fn judged(&self) -> Result<Finding, Obstacle> {
        judge(&self.waiting, Some(&self.account), &self.at)
    }

    fn asks(&self) -> Option<Question> {
        match self.judged() {
            Err(Obstacle::Ask(question)) => Some(question),
            _ => None,
        }
    }

    fn refused(&self) -> Option<Rule> {
        match self.judged() {
            Err(Obstacle::Drop(rule)) => Some(rule),
            _ => None,
        }
    }

    fn passes(&self) -> bool {
        self.judged().is_ok()
    }
}

fn host() -> Arc<HostHandle> {
    Arc::new(HostHandle::fabricated(HostId(1), 100, 0))
}

/// The same host with more accounts than its quota.
fn full_host() -> Arc<HostHandle> {
    Arc::new(HostHandle::fabricated(HostId(1), 100, 101))
}

/// One thing that is wrong with the account of a good commit, and the rule that refuses it.
pub struct Case {
    name: &'static str,
    pub rule: Rule,
    spoil: fn(&mut Scene),
}

const fn case(name: &'static str, rule: Rule, spoil: fn(&mut Scene)) -> Case {
    Case { name, rule, spoil }
}

/// With every answer there: nothing is left to ask.
pub const REFUSED: &[Case] = &[
    case("not a commit", Rule::Frame, |scene| {
        // A map with nothing but what the socket's reader looks at.
        let short = frame::encode_identity(&frame::Identity {
            seq: 1,
            did: DID,
            time: "",
            handle: None,
        });
        let cut = short.len() - b"\x64time\x60".len();
        let mut frame = short[..cut].to_vec();
        let body = frame.iter().rposition(|byte| *byte == 0xa3).unwrap();
        frame[body] = 0xa2;
        scene.waiting.received.frame = frame.into();
    }),
    case("an #identity of 501 bytes", Rule::EventTooLarge, |scene| {
        scene.fill(Kind::Identity, ACCOUNT_EVENT_BYTES + 1);
    }),
    case("an #account of 501 bytes", Rule::EventTooLarge, |scene| {
        scene.fill(Kind::Account, ACCOUNT_EVENT_BYTES + 1);
    }),
    case(
        "its host unknown while the directory is down",
        Rule::IdentityUnresolved,
        |scene| {
            scene.account.resolved_at = None;
            scene.waiting.identity = Some(Err(NoIdentity::Unresolved));
        },
    ),
    case("the directory is down", Rule::IdentityUnresolved, |scene| {
        scene.unresolved(NoIdentity::Unresolved);
    }),
    case("no such DID", Rule::IdentityNotFound, |scene| {
        scene.unresolved(NoIdentity::NotFound);
    }),
    case("a DID given up", Rule::Tombstoned, |scene| {
        scene.unresolved(NoIdentity::Tombstoned);
    }),
    case("no room for a longer seq", Rule::FrameTooLarge, |scene| {
        let received = &mut scene.waiting.received;
        let length = frame::MAX_FRAME_BYTES - 8 + received.seq_span.len();
        received.frame = vec![0; length].into();
    }),
    case("no key in the document", Rule::NoSigningKey, |scene| {
        scene.account.key = None;
        let host = scene.waiting.received.host.host().clone();
        scene.refreshed(Some(host));
    }),
    case("no PDS in the document", Rule::NoPds, |scene| {
        scene.account.host = None;
        scene.refreshed(None);
    }),
    case(
        "a PDS in the document that is not known",
        Rule::WrongHost,
        |scene| {
            scene.account.away = true;
            let elsewhere = HostHandle::fabricated(HostId(2), 100, 0).host().clone();
            scene.refreshed(Some(elsewhere));
        },
    ),
    case("another PDS in the document", Rule::WrongHost, |scene| {
        scene.account.host = Some(HostId(2));
        let elsewhere = HostHandle::fabricated(HostId(2), 100, 0).host().clone();
        scene.refreshed(Some(elsewhere));
    }),
    case("taken down here", Rule::AccountInactive, |scene| {
        scene.account.local = LocalStatus::TakenDown;
    }),
    case("throttled here", Rule::AccountInactive, |scene| {
        scene.account.local = LocalStatus::Throttled;
        scene.waiting.received.host = full_host();
    }),
    case("deactivated at its PDS", Rule::AccountInactive, |scene| {
        scene.account.upstream = UpstreamStatus::Deactivated;
        scene.waiting.asked_status = true;
    }),
    case(
        "its chain broken too often",
        Rule::Desynchronized,
        |scene| {
            scene.account.local = LocalStatus::Desynchronized;
        },
    ),
    case("an old rev", Rule::RevOrder, |scene| {
        let repo = scene.account.repo.as_mut().unwrap();
        repo.rev = Tid::from_micros(NOW_US, 0);
    }),
];

#[test]
fn each_fault_of_the_account_is_refused_under_its_rule() {
    for case in REFUSED {
        let mut scene = Scene::commit();
        assert!(scene.passes());
        (case.spoil)(&mut scene);
        assert_eq!(scene.refused(), Some(case.rule), "{}", case.name);
    }
}

/// Whatever its kind: it would be all that a crash leaves of the move.
#[test]
fn nothing_of_a_moving_account_goes_out_before_the_move_is_written() {
    for scene in [Scene::commit, Scene::sync, Scene::account, || {
        Scene::identity(None)
    }] {
        let mut scene = scene();
        scene.account.moving = Some(1);
        assert_eq!(scene.asks(), Some(Question::Written));
    }
}

#[test]
fn events_of_the_largest_size_pass() {
    for kind in [Kind::Identity, Kind::Account] {
        let mut scene = Scene::account();
        scene.fill(kind, ACCOUNT_EVENT_BYTES);
        scene.refreshed(None);
        assert!(scene.passes(), "{kind:?}");
    }
}

/// The quota is asked where the own PDS speaks: before the account counts, and while it is held back and has room.
#[test]
fn the_own_host_counts_its_accounts_and_no_other_does() {
    let admits = |scene: &Scene| scene.judged().err() == Some(Obstacle::Admit);
    for scene in [Scene::commit, Scene::sync] {
        let uncounted = || {
            let mut scene = scene();
            scene.account.counted = false;
            scene
        };
        assert!(admits(&uncounted()));
        let mut deleted = uncounted();
        deleted.account.upstream = UpstreamStatus::Deleted;
        assert_eq!(deleted.asks(), Some(Question::Status));
        let mut foreign = uncounted();
        foreign.account.host = Some(HostId(2));
        let elsewhere = HostHandle::fabricated(HostId(2), 100, 0).host().clone();
        foreign.refreshed(Some(elsewhere));
        assert_eq!(foreign.refused(), Some(Rule::WrongHost));

        let mut throttled = scene();
        throttled.account.local = LocalStatus::Throttled;
        assert!(admits(&throttled));
        throttled.waiting.received.host = full_host();
        assert_eq!(throttled.refused(), Some(Rule::AccountInactive));
    }
    let mut scene = Scene::identity(None);
    scene.account.counted = false;
    assert!(scene.refreshed(None).passes());
}

#[test]
fn nothing_is_judged_before_sql_was_asked() {
    let scene = Scene::commit();
    assert_eq!(
        judge(&scene.waiting, None, &scene.at).err(),
        Some(Obstacle::Ask(Question::Account))
    );
}

/// The last commit's CID is not kept of an account at rest; a `#sync` that repeats its rev asks SQL for it.
#[test]
fn a_sync_of_the_stored_rev_is_compared_with_the_stored_commit() {
    let mut repo = Repo::filled();
    let draft = repo.commit(&[]);
    let rev = repo.rev().unwrap();
    let asks = (None, Some(Question::Account));
    let other = Cid::of(Codec::DagCbor, b"other");
    let earlier = Tid::from_u64(rev.to_u64() - 1);
    for (stored, commit, outcome) in [
        (rev, None, asks),
        (rev, Some(other), (Some(Rule::SyncConflict), None)),
        (earlier, None, (None, None)),
    ] {
        let mut scene = Scene::of_frame(Kind::Sync, draft.sync_frame(), host());
        scene.account.repo = Some(Tip {
            rev: stored,
            data: Mark::of(&other),
            commit,
        });
        assert_eq!((scene.refused(), scene.asks()), outcome, "{commit:?}");
    }
}

/// Only what can end an account waits for an identity that is past its time; for the rest it is renewed beside them.
#[test]
fn identities_are_asked_for_when_unknown_and_for_account_events_when_old() {
    let cached = Some(Question::Identity { fresh: false });
    let ttl = TTL.as_secs() as i64;
    for (resolved_at, due) in [
        (None, true),
        (Some(NOW - ttl), true),
        (Some(NOW - ttl + 1), false),
        // A clock that was ahead noted it.
        (Some(NOW + 1_000_000), true),
    ] {
        for scene in [Scene::commit, Scene::sync] {
            let mut scene = scene();
            scene.account.resolved_at = resolved_at;
            assert_eq!(scene.asks(), cached.filter(|_| resolved_at.is_none()));
            assert_eq!(scene.account.identity_due(TTL, NOW), due, "{resolved_at:?}");
        }
        let mut scene = Scene::account();
        scene.account.resolved_at = resolved_at;
        assert_eq!(scene.asks(), cached.filter(|_| due), "{resolved_at:?}");
    }
}

#[test]
fn a_directory_that_did_not_answer_is_not_asked_again_at_once() {
    let mut scene = Scene::account();
    scene.account.resolved_at = Some(NOW - TTL.as_secs() as i64);
    scene.account.asked_identity_at = NOW - 59;
    assert!(scene.passes());
    scene.account.asked_identity_at = NOW - 60;
    assert!(scene.asks().is_some());
}

/// A host is not believed where nothing is known of the account's identity, also while the directory is down.
#[test]
fn without_an_identity_no_host_is_believed() {
    for scene in [Scene::commit, Scene::sync, Scene::account] {
        let mut scene = scene();
        scene.account.resolved_at = None;
        scene.unresolved(NoIdentity::Unresolved);
        assert_eq!(scene.refused(), Some(Rule::IdentityUnresolved));
    }
}

/// A directory that is down stops no account that is known; one that says there is no such DID does.
#[test]
fn a_known_identity_outlives_an_outage_but_not_its_end() {
    for (reason, refused) in [
        (NoIdentity::Unresolved, None),
        (NoIdentity::NotFound, Some(Rule::IdentityNotFound)),
        (NoIdentity::Tombstoned, Some(Rule::Tombstoned)),
    ] {
        for scene in [Scene::commit, Scene::sync, Scene::account] {
            let mut scene = scene();
            scene.account.resolved_at = Some(NOW - TTL.as_secs() as i64);
            scene.waiting.identity = Some(Err(reason));
            assert_eq!(scene.refused(), refused, "{reason:?}");
            assert_eq!(scene.passes(), refused.is_none(), "{reason:?}");
        }
    }
}

#[test]
fn a_foreign_host_is_looked_up_once_more() {
    let fresh = Some(Question::Identity { fresh: true });
    for scene in [Scene::commit, Scene::sync, Scene::account] {
        let mut scene = scene();
        scene.account.host = Some(HostId(2));
        assert_eq!(scene.asks(), fresh);
        let other = HostHandle::fabricated(HostId(2), 100, 0).host().clone();
        scene.refreshed(Some(other));
        assert_eq!(scene.refused(), Some(Rule::WrongHost));
    }
}

#[test]
fn a_key_is_looked_up_once_more_where_there_is_none() {
    let fresh = Some(Question::Identity { fresh: true });
    for scene in [Scene::commit, Scene::sync] {
        let mut scene = scene();
        scene.account.key = None;
        assert_eq!(scene.asks(), fresh);
    }
    let mut scene = Scene::account();
    scene.account.key = None;
    assert!(scene.passes(), "no signature, no key");
}

/// What was found out of a commit is not found out again: here the blocks are not looked at.
#[test]
fn a_commit_that_waited_for_a_key_is_not_taken_apart_twice() {
    let mut scene = Scene::commit();
    let Ok(Finding::Check(candidate)) = scene.judged() else {
        panic!("a commit to be checked");
    };
    let blocks = scene.waiting.received.frame.to_vec();
    let at = blocks.len() / 2;
    let mut spoiled = blocks;
    spoiled[at] ^= 1;
    scene.waiting.received.frame = spoiled.into();
    assert!(!scene.passes());
    scene.waiting.facts = Some(candidate.facts);
    assert!(scene.passes());
}

#[test]
fn a_bad_signature_is_final_after_a_fresh_look_up() {
    let mut scene = Scene::commit();
    let fresh = Obstacle::Ask(Question::Identity { fresh: true });
    assert_eq!(bad_signature(&scene.waiting), fresh);
    scene.refreshed(None);
    assert_eq!(
        bad_signature(&scene.waiting),
        Obstacle::Drop(Rule::Signature)
    );
}

#[test]
fn the_pds_is_asked_before_its_last_word_counts() {
    for scene in [Scene::commit, Scene::sync] {
        let mut scene = scene();
        scene.account.upstream = UpstreamStatus::Deactivated;
        assert_eq!(scene.asks(), Some(Question::Status));
        scene.account.asked_status_at = NOW - STATUS_INTERVAL.as_secs() as i64 + 1;
        assert_eq!(
            scene.refused(),
            Some(Rule::AccountInactive),
            "asked just now"
        );
        scene.account.upstream = UpstreamStatus::Active;
        assert!(scene.passes());
    }
}

#[test]
fn account_events_pass_whatever_the_status() {
    let mut scene = Scene::account();
    scene.account.local = LocalStatus::TakenDown;
    scene.account.upstream = UpstreamStatus::Deleted;
    let Ok(Finding::Account(status)) = scene.judged() else {
        panic!("an #account of the own host");
    };
    assert_eq!(status, UpstreamStatus::Deactivated);
}

/// A `#sync` is how an account that broke its chain comes to order.
#[test]
fn a_sync_passes_a_desynchronized_account_but_no_other_inactive_one() {
    let mut scene = Scene::sync();
    scene.account.local = LocalStatus::Desynchronized;
    assert!(scene.passes());
    scene.account.local = LocalStatus::TakenDown;
    assert_eq!(scene.refused(), Some(Rule::AccountInactive));
}

#[test]
fn handles_stay_only_where_the_document_has_them() {
    for (handle, kept) in [
        (None, true),
        (Some("alice.example.com"), true),
        (Some("ALICE.example.org"), true),
        (Some("mallory.example.com"), false),
        (Some(""), false),
    ] {
        let mut scene = Scene::identity(handle);
        assert_eq!(scene.asks(), Some(Question::Identity { fresh: true }));
        // From whatever host it comes.
        scene.account.host = Some(HostId(2));
        let Ok(Finding::Identity(edited)) = scene.refreshed(None).judged() else {
            panic!("an #identity passes");
        };
        assert_eq!(edited.is_none(), kept, "{handle:?}");
        if let Some(frame) = edited {
            let Message::Identity(identity) = frame::decode(&frame).unwrap().message else {
                panic!("still an #identity");
            };
            assert_eq!((identity.did, identity.handle), (DID, None));
        }
    }
}

#[test]
fn the_three_modes_of_validation() {
    let old_style = |validation, sync11: bool| {
        let mut repo = Repo::filled();
        let mut draft = repo.commit(&[Write::Put("com.example.note/7", "new")]);
        draft.prev_data = None;
        draft.ops[0].prev = None;
        let mut scene = Scene::of_frame(Kind::Commit, draft.frame(), host());
        scene.at.tuning.validation = validation;
        if sync11 {
            scene.waiting.received.host.mark_sync11();
        }
        scene.refused()
    };
    for (validation, sync11, refused) in [
        (Validation::Strict, false, Some(Rule::OpPrev)),
        (Validation::Strict, true, Some(Rule::OpPrev)),
        (Validation::Ratchet, false, None),
        (Validation::Ratchet, true, Some(Rule::OpPrev)),
        (Validation::Lenient, false, None),
        (Validation::Lenient, true, None),
    ] {
        assert_eq!(
            old_style(validation, sync11),
            refused,
            "{validation:?} {sync11}"
        );
    }
}

#[test]
fn a_broken_chain_passes_and_is_remembered() {
    for (broken, chain) in [(false, Chain::Intact), (true, Chain::Broken)] {
        let mut scene = Scene::commit();
        if broken {
            scene.account.repo.as_mut().unwrap().data =
                Mark::of(&Cid::of(Codec::DagCbor, b"other"));
        }
        let Ok(Finding::Check(candidate)) = scene.judged() else {
            panic!("a commit to be checked");
        };
        assert_eq!(candidate.chain, chain);
        assert!(candidate.sync11);
        let state = repo_state(&candidate.facts, candidate.chain);
        assert_eq!(state.desynchronized, broken);
    }
}
