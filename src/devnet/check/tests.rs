//! The checker against firehoses that are right, and wrong in every way it knows.

use std::sync::Arc;

use super::*;
use crate::atproto::did::Did;
use crate::devnet::pds::AccountStatus;
use crate::devnet::pds::frames::{self, Stamp};
use crate::devnet::timestamp::Timestamp;

const HOST: u32 = 3;

fn did(name: char) -> Did {
    Did::parse(&format!("did:plc:{}", name.to_string().repeat(24))).unwrap()
}

/// Event number `n` of an account, as it leaves under `seq`.
fn event(name: char, n: i64, seq: u64) -> Vec<u8> {
    frames::account(
        Stamp {
            seq,
            time: Timestamp::from_millis(n),
        },
        &did(name),
        AccountStatus::Active,
    )
    .to_vec()
}

fn enter(ledger: &Ledger, name: char, n: i64, verdict: Verdict) -> EventId {
    ledger
        .enter(
            &event(name, n, 77),
            Origin { host: HOST, seq: n },
            verdict,
            Some(n as usize),
        )
        .unwrap()
}

/// Account, number of its event, sequence number it leaves under.
type Sent = (char, i64, u64);

/// A ledger of events 1 to 3 of `a`, 1 to 2 of `b`, and a refused one.
fn ledger() -> Arc<Ledger> {
    let ledger = Ledger::new();
    for (name, n) in [('a', 1), ('b', 1), ('a', 2), ('b', 2), ('a', 3)] {
        enter(&ledger, name, n, Verdict::Forward);
    }
    enter(&ledger, 'a', 9, Verdict::Refuse("signature"));
    ledger
}

fn report(events: &[Sent]) -> Report {
    let mut checker = Checker::new(ledger());
    for (name, n, seq) in events {
        checker.observe(&event(*name, *n, *seq));
    }
    checker.report()
}

const RIGHT: [Sent; 5] = [
    ('b', 1, 5),
    ('a', 1, 6),
    ('a', 2, 7),
    ('a', 3, 8),
    ('b', 2, 9),
];

#[test]
fn what_had_to_come_out_is_clean_whatever_the_order_between_accounts() {
    let report = report(&RIGHT);
    assert!(report.is_clean(), "{report}");
    assert_eq!((report.expected, report.received), (5, 5));
}

#[test]
fn every_difference_is_found_and_named() {
    let with = |change: &dyn Fn(&mut Vec<Sent>)| {
        let mut events = RIGHT.to_vec();
        change(&mut events);
        report(&events)
    };
    let missing = with(&|events| events.truncate(4));
    assert_eq!((missing.missing, missing.sequence), (1, 0));
    assert!(
        missing.differences[0].contains("missing: #account of did:plc:bbb"),
        "{missing}"
    );
    assert!(
        missing.differences[0].contains("seq 2 of host 3"),
        "{missing}"
    );
    let doubled = with(&|events| events.push(('a', 3, 10)));
    assert_eq!((doubled.doubled, doubled.missing), (1, 0));
    let swapped = with(&|events| (events[1].1, events[2].1) = (2, 1));
    assert_eq!(
        (swapped.out_of_order, swapped.missing, swapped.doubled),
        (1, 0, 0)
    );
    let refused = with(&|events| events.push(('a', 9, 10)));
    assert_eq!(refused.refused, 1);
    assert!(
        refused.differences[0].contains("rule signature"),
        "{refused}"
    );
    let forged = with(&|events| events.push(('c', 1, 10)));
    assert_eq!(forged.forged, 1);
    let skipped = with(&|events| events[4].2 = 10);
    assert_eq!((skipped.sequence, skipped.missing), (1, 0));
    let repeated = with(&|events| events[4].2 = 8);
    assert_eq!(repeated.sequence, 1);
}

#[test]
fn what_is_no_event_is_counted() {
    let mut checker = Checker::new(Ledger::new());
    checker.observe(&frames::info("OutdatedCursor", "too old"));
    checker.observe(&frames::error("ConsumerTooSlow", "too slow"));
    checker.observe(b"\xff");
    let report = checker.report();
    assert_eq!((report.infos, report.malformed, report.received), (1, 2, 0));
}

#[test]
fn a_reconnect_may_repeat_the_last_event_and_nothing_else() {
    let resume = |name, n, seq| {
        let mut checker = Checker::new(ledger());
        checker.observe(&event('a', 1, 1));
        checker.observe(&event('a', 2, 2));
        checker.resumed();
        checker.observe(&event(name, n, seq));
        let Report {
            doubled,
            sequence,
            reconnects,
            ..
        } = checker.report();
        (doubled, sequence, reconnects)
    };
    assert_eq!(resume('a', 2, 2), (0, 0, 1));
    assert_eq!(resume('a', 3, 3), (0, 0, 1));
    assert_eq!(
        resume('a', 3, 2),
        (0, 1, 1),
        "another event under a number that was used"
    );
    assert_eq!(resume('a', 1, 1), (1, 1, 1), "from before the cursor");
    assert_eq!(resume('a', 3, 4), (0, 1, 1), "after a hole");
}

#[test]
fn a_refused_copy_does_not_spoil_the_original() {
    for copy_first in [true, false] {
        let ledger = Ledger::new();
        if copy_first {
            enter(&ledger, 'a', 1, Verdict::Refuse("wrong_host"));
        }
        enter(&ledger, 'a', 1, Verdict::Forward);
        if !copy_first {
            enter(&ledger, 'a', 1, Verdict::Refuse("rev_order"));
        }
        assert_eq!(
            (
                ledger.forward(),
                ledger.forward_of(HOST),
                ledger.refusals().len()
            ),
            (1, 1, 1)
        );
        let mut checker = Checker::new(ledger);
        assert_eq!(checker.observe(&event('a', 1, 1)), Some(1));
        assert!(checker.report().is_clean());
        checker.observe(&event('a', 1, 2));
        assert_eq!(checker.report().doubled, 1);
    }
}

#[test]
fn a_quota_is_filled_and_not_passed() {
    let came = |names: &[char]| {
        let ledger = Ledger::new();
        let group = ledger.group(2);
        for name in ['a', 'b', 'c'] {
            enter(&ledger, name, 1, Verdict::Quota(group));
            enter(&ledger, name, 2, Verdict::Quota(group));
        }
        let mut checker = Checker::new(ledger);
        for (at, name) in names.iter().enumerate() {
            checker.observe(&event(
                *name,
                1 + i64::from(names[..at].contains(name)),
                1 + at as u64,
            ));
        }
        let report = checker.report();
        (checker.quotas_filled(), report.quota, report.is_clean())
    };
    assert_eq!(came(&['c', 'a', 'a', 'c']), (true, 0, true));
    assert_eq!(came(&['c', 'c']), (false, 1, false));
    assert_eq!(came(&['a', 'b', 'c']), (true, 1, false));
}

#[test]
fn a_fingerprint_leaves_out_the_number_and_nothing_else() {
    let print = |frame: &[u8]| Fingerprint::of(frame).unwrap().0;
    assert_eq!(print(&event('a', 1, 1)), print(&event('a', 1, 70_000)));
    assert_ne!(print(&event('a', 1, 1)), print(&event('a', 2, 1)));
    assert_ne!(print(&event('a', 1, 1)), print(&event('b', 1, 1)));
}
