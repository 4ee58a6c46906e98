//! A log that writes the numbers of an upstream relay: gaps stay without an event, numbers rise, and a restart finds both.

use std::fs;
use std::path::Path;

use atproto_relay::eventlog::{Append, EventLog, LogOptions, MinFree};
use bytes::BytesMut;
use proptest::prelude::*;

use crate::support::event::{Event, RunningLog, quick_folder};

fn options(dir: &Path) -> LogOptions {
    LogOptions {
        segment_bytes: 4096,
        min_free: MinFree::Bytes(0),
        ..LogOptions::new(dir)
    }
}

/// An event of some length, to be appended under `seq`.
fn given(seq: u64) -> Append<i64> {
    Append {
        given_seq: Some(seq),
        ..event(seq).append(seq as i64)
    }
}

fn event(seq: u64) -> Event {
    Event::identity(seq % 4, [0, 10, 200, 700][seq as usize % 4], seq as i64)
}

/// Appends events under these numbers, as one batch; `durable` of them are not refused.
fn append(log: &RunningLog, seqs: &[u64], durable: usize) -> Vec<u64> {
    let batch = seqs.iter().copied().map(given).collect();
    log.sender.send(batch).expect("the sequencer runs");
    let durable = log.await_durable(durable);
    durable.into_iter().map(|(seq, _)| seq).collect()
}

/// The log serves exactly the events of these numbers, to readers from any of `from` on, and gives each number once.
fn assert_holds(log: &EventLog, seqs: &[u64], context: &str) {
    let head = seqs.last().copied().unwrap_or(0);
    assert_eq!(log.head(), head, "{context}: the head");
    let entries = log.entries(1).and_redacted();
    let found: Vec<u64> = entries.map(|entry| entry.unwrap().0.seq).collect();
    assert_eq!(found, seqs, "{context}: the entries");
    let (oldest, _) = log.window();
    for from in [1, head / 2, head].map(|from| from.max(oldest)) {
        let (mut out, mut reader) = (BytesMut::new(), log.reader(from));
        while reader
            .next(&mut out, 1000)
            .expect("it can be read")
            .is_some()
        {}
        let served = seqs.iter().filter(|seq| **seq >= from);
        let expected: Vec<u8> = served.flat_map(|seq| event(*seq).wire(*seq)).collect();
        assert!(out == expected, "{context}: the bytes from {from}");
    }
}

#[test]
fn given_numbers_are_kept_with_their_gaps_over_restarts() {
    let folder = quick_folder();
    let mut all = Vec::new();
    for first in [3, 2_000, 70_000] {
        let log = RunningLog::open(options(folder.path()));
        let seqs: Vec<u64> = (0..40).map(|n| first + n * n).collect();
        for batch in seqs.chunks(7) {
            assert_eq!(append(&log, batch, batch.len()), batch);
        }
        all.extend(seqs);
        assert_holds(&log.log, &all, "live");
        log.close();
    }
    let log = EventLog::open(options(folder.path())).unwrap();
    assert_holds(&log, &all, "reopened");
    drop(log);
    // Frames lie back to back, also where numbers are left out: they yield the index that is gone.
    let mut indexes: Vec<_> = fs::read_dir(folder.path())
        .unwrap()
        .map(|file| file.unwrap().path())
        .filter(|path| path.extension().is_some_and(|it| it == "idx"))
        .collect();
    indexes.sort();
    assert!(indexes.len() > 3);
    fs::remove_file(&indexes[1]).unwrap();
    fs::remove_file(&indexes[indexes.len() - 1]).unwrap();
    let log = EventLog::open(options(folder.path())).unwrap();
    assert_holds(&log, &all, "without two of its indexes");
}

#[test]
fn a_number_that_does_not_rise_or_cannot_be_counted_is_refused() {
    let folder = quick_folder();
    let log = RunningLog::open(options(folder.path()));
    let batch = [5, 5, 4, 6, 1 << 53, u64::MAX, 6 + (2 << 20), 9];
    assert_eq!(append(&log, &batch, 3), [5, 6, 9]);
    assert_holds(&log.log, &[5, 6, 9], "live");
    // Without a given number the next one is taken.
    assert_eq!(log.append(&[event(10)]), [10]);
    log.close();
    let log = RunningLog::open(options(folder.path()));
    assert_eq!(append(&log, &[10, 8, 12], 1), [12]);
    assert_holds(&log.log, &[5, 6, 9, 10, 12], "reopened");
    log.close();
}

#[test]
fn an_empty_log_begins_where_its_upstream_relay_is() {
    let folder = quick_folder();
    let first = 7_000_000_000;
    let log = EventLog::open(options(folder.path())).unwrap();
    let log = RunningLog::on(log.skip_to(first).unwrap());
    assert_eq!(append(&log, &[first + 2, first + 9], 2).len(), 2);
    log.close();
    let log = EventLog::open(options(folder.path())).unwrap();
    assert_holds(&log, &[first + 2, first + 9], "reopened");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    /// Whatever numbers come, those that rise are kept and the others refused, in one run or in several.
    #[test]
    fn any_numbers_give_a_log_that_rises(
        runs in proptest::collection::vec(proptest::collection::vec(1_u64..400, 1..30), 1..4)
    ) {
        let folder = quick_folder();
    let mut kept: Vec<u64> = Vec::new();
        for run in runs {
            let log = RunningLog::open(options(folder.path()));
            let before = kept.len();
            for seq in &run {
                if kept.last().is_none_or(|last| seq > last) {
                    kept.push(*seq);
                }
            }
            append(&log, &run, kept.len() - before);
            assert_holds(&log.log, &kept, "live");
            log.close();
        }
        let log = EventLog::open(options(folder.path())).unwrap();
        assert_holds(&log, &kept, "reopened");
    }
}
