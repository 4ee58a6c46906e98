//! The event log from outside: what is appended comes back, whatever happens in between.

use std::collections::BTreeMap;
use std::fs;
use std::io::{self, BufRead, BufReader};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use crate::support::event::{Event, RunningLog, did, eventually, quick_folder};
use atproto_relay::atproto::car;
use atproto_relay::atproto::cid::{Cid, Codec};
use atproto_relay::atproto::did::Did;
use atproto_relay::atproto::frame::{self, Kind};
use atproto_relay::eventlog::{
    Append, Durability, EventLog, Faults, Frames, Health, LastOffer, LogOptions, MinFree, Offer,
    Origin, ReadError, Reader, ResumeError, Settings, Slots,
};
use bytes::BytesMut;
use proptest::prelude::*;

/// Options of a log in `dir` with segments of `segment_bytes`.
fn options(dir: &Path, segment_bytes: u64) -> LogOptions {
    LogOptions {
        segment_bytes,
        min_free: MinFree::Bytes(0),
        ..LogOptions::new(dir)
    }
}

/// `count` events of four accounts with fillers of several lengths.
fn events(from: i64, count: i64) -> Vec<Event> {
    (from..from + count)
        .map(|n| Event::identity(n as u64 % 4, [0, 10, 200, 700][n as usize % 4], n))
        .collect()
}

/// All bytes a reader gets from `from` on, in reads of at most `max` bytes.
fn read_all(log: &EventLog, from: u64, max: usize) -> Vec<u8> {
    let mut reader = log.reader(from);
    let mut out = BytesMut::new();
    let mut next = from;
    while let Some(range) = reader.next(&mut out, max).expect("the log can be read") {
        assert_eq!(*range.start(), next, "reads follow one another");
        next = range.end() + 1;
    }
    assert_eq!(
        next,
        (log.head() + 1).max(from),
        "the reader reaches the head"
    );
    out.to_vec()
}

fn wire<'a>(from: u64, events: impl IntoIterator<Item = &'a Event>) -> Vec<u8> {
    (from..)
        .zip(events)
        .flat_map(|(seq, event)| event.wire(seq))
        .collect()
}

/// The log holds exactly `events`, from sequence number 1.
fn assert_holds(log: &EventLog, events: &[Event], context: &str) {
    assert_eq!(log.head(), events.len() as u64, "{context}: the head");
    assert!(
        read_all(log, 1, 1000) == wire(1, events),
        "{context}: the bytes"
    );
}

fn files(dir: &Path, extension: &str) -> Vec<PathBuf> {
    let mut paths: Vec<_> = fs::read_dir(dir)
        .expect("the folder")
        .map(|file| file.expect("a file").path())
        .filter(|path| path.extension().is_some_and(|it| it == extension))
        .collect();
    paths.sort();
    paths
}

fn copy_folder(from: &Path, to: &Path, order: [&str; 2]) {
    fs::create_dir_all(to).expect("a folder");
    // Indexes are looked up first, before anything is copied: that of a segment begun meanwhile would hold the places of
    // frames that the copy has not.
    let mut paths = ["idx", "seg"].map(|extension| files(from, extension));
    if order == ["seg", "idx"] {
        paths.reverse();
    }
    for path in paths.concat() {
        let name = path.file_name().expect("a name");
        // A segment may be removed while we copy.
        let _ = fs::copy(&path, to.join(name));
    }
}

#[test]
fn events_come_back_byte_for_byte_with_dense_numbers() {
    let folder = quick_folder();
    let log = RunningLog::open(options(folder.path(), 8192));
    assert_eq!((log.log.head(), log.log.oldest()), (0, None));
    let mut all = events(1000, 300);
    all.push(Event::identity(9, 70_000, 5000));
    all.extend(events(6000, 3));
    for batch in all.chunks(7) {
        log.append(batch);
    }
    assert_holds(&log.log, &all, "live");
    assert_eq!(log.log.oldest(), Some(1));
    for (from, max) in [
        (1, 1),
        (2, 100),
        (150, 65536),
        (301, 1),
        (304, 10),
        (305, 10),
    ] {
        let expected = wire(from, &all[from as usize - 1..]);
        assert!(
            read_all(&log.log, from, max) == expected,
            "from {from} in {max}"
        );
    }
    let entries: Vec<_> = log
        .log
        .entries(1)
        .map(|entry| entry.expect("an entry"))
        .collect();
    assert_eq!(entries.len(), all.len());
    for ((entry, frame), (seq, event)) in entries.iter().zip((1..).zip(&all)) {
        assert_eq!(frame.as_ref(), event.frame(seq).0);
        assert_eq!(
            (entry.seq, entry.origin),
            (
                seq,
                Origin::Host {
                    id: 7,
                    seq: event.upstream_seq
                }
            )
        );
        assert_eq!(
            entry.did_hash,
            Did::parse(&event.did).expect("a DID").hash64()
        );
        assert_eq!(entry.kind, event.kind);
    }
    assert!(files(folder.path(), "seg").len() > 10);
    log.close();
    let total: u64 = files(folder.path(), "seg")
        .iter()
        .map(|path| fs::metadata(path).expect("a segment").len())
        .sum();
    assert_eq!(
        total,
        wire(1, &all).len() as u64,
        "closed segments hold frames and nothing else"
    );
    assert_holds(
        &EventLog::open(options(folder.path(), 8192)).expect("opens"),
        &all,
        "reopened",
    );
}

#[test]
fn durability_of_every_kind_reports_every_event_once() {
    for durability in [
        Durability::Sync,
        Durability::Interval(Duration::from_millis(5)),
        Durability::Interval(Duration::from_secs(3600)),
        Durability::None,
    ] {
        let folder = quick_folder();
        let log = RunningLog::open(LogOptions {
            durability,
            ..options(folder.path(), 4096)
        });
        let all = events(1, 100);
        for batch in all.chunks(9) {
            log.send(batch);
        }
        let RunningLog {
            log,
            sender,
            durable,
            sequencer,
        } = log;
        drop(sender);
        sequencer.join();
        let reported: Vec<_> = durable.iter().flatten().collect();
        let expected: Vec<_> = (1..)
            .zip(all.iter().map(|event| event.upstream_seq))
            .collect();
        assert_eq!(reported, expected, "{durability:?}");
        assert_holds(&log, &all, "after the end");
    }
}

#[test]
fn a_reader_waits_for_the_next_event() {
    let folder = quick_folder();
    let log = RunningLog::open(options(folder.path(), 4096));
    let mut reader = log.log.reader(1);
    let mut out = BytesMut::new();
    let head = log.log.subscribe();
    for (seq, event) in (1..).zip(events(1, 60)) {
        assert_eq!(reader.next(&mut out, 1 << 20).expect("readable"), None);
        log.append(std::slice::from_ref(&event));
        assert!(head.has_changed().expect("the log is open") && log.log.head() == seq);
        assert_eq!(
            reader.next(&mut out, 1 << 20).expect("readable"),
            Some(seq..=seq)
        );
        assert_eq!(out.split(), event.wire(seq));
    }
}

#[tokio::test]
async fn frames_taken_in_pieces_of_any_size_are_the_log_as_it_lies() {
    let folder = tempfile::tempdir().expect("a folder");
    let log = RunningLog::open(options(folder.path(), 1 << 16));
    let all = events(1, 400);
    log.append(&all);
    for room in [1, 7, 500, 5000, 1 << 20] {
        let mut reader = log.log.reader(1);
        let mut out = Vec::new();
        loop {
            let offer = reader.offer(5000, |frames| {
                let parts = frames.slices().iter();
                let offered: Vec<u8> = parts.flat_map(|part| part.to_vec()).collect();
                let taken = offered.len().min(room);
                out.extend_from_slice(&offered[..taken]);
                Ok(taken)
            });
            match offer.expect("readable") {
                Offer::Taken(taken) => assert!((1..=room).contains(&taken)),
                Offer::Cold => reader.warm(5000).await.expect("readable"),
                Offer::Nothing => break,
                Offer::Refused(error) => panic!("nobody refused: {error}"),
            }
        }
        assert!(out == wire(1, &all), "in pieces of {room}");
        assert_eq!((reader.position(), reader.events()), (401, 400));
        assert!(!reader.is_inside_frame());
    }
}

#[test]
fn what_was_refused_is_offered_again_and_counts_for_nothing() {
    let folder = quick_folder();
    let log = RunningLog::open(options(folder.path(), 1 << 20));
    let all = events(1, 3);
    log.append(&all);
    let mut reader = log.log.reader(1);
    let full = |_: &Frames<'_>| Err(io::ErrorKind::WouldBlock.into());
    for _ in 0..2 {
        let offer = reader.offer(1 << 20, full).expect("readable");
        assert!(matches!(offer, Offer::Refused(_)), "{offer:?}");
        assert_eq!((reader.position(), reader.events()), (1, 0));
    }
    let mut out = BytesMut::new();
    reader.next(&mut out, 1 << 20).expect("readable");
    assert!(out == wire(1, &all));
}

#[test]
fn the_rest_of_a_frame_does_not_go_out_after_its_redaction() {
    let folder = quick_folder();
    let log = RunningLog::open(options(folder.path(), 1 << 20));
    let all: Vec<_> = (1..=6)
        .map(|n| Event::identity(1 + n % 2, 300, n as i64))
        .collect();
    log.append(&all);
    let [mut inside, mut between] = [log.log.reader(1), log.log.reader(1)];
    let first = all[0].wire(1).len();
    for (reader, taken) in [(&mut inside, first + 10), (&mut between, first)] {
        let offer = reader.offer(1 << 20, |_| Ok(taken)).expect("readable");
        assert!(matches!(offer, Offer::Taken(_)));
        assert_eq!((reader.position(), reader.events()), (2, 1));
    }
    let account = Did::parse(&all[1].did).expect("a DID");
    log.log.redact(&account, 6).expect("redacts");
    let error = inside
        .offer(1 << 20, |_| panic!("offered after the redaction"))
        .expect_err("cannot go on");
    assert!(matches!(error, ReadError::Redacted { seq: 2 }), "{error}");
    let mut out = BytesMut::new();
    while between.next(&mut out, 1 << 20).expect("readable").is_some() {}
    let kept = [3, 5].map(|seq| all[seq as usize - 1].wire(seq)).concat();
    assert!(out == kept);
    eventually("the punching", || log.log.redactions_pending() == 0);
    inside
        .offer(1 << 20, |_| panic!("offered after the punching"))
        .expect_err("cannot go on");
}

/// What the offer was is known, and how much of it was taken; a redaction may have come since.
#[test]
fn another_process_goes_on_behind_the_last_byte_that_was_taken() {
    let folder = quick_folder();
    let log = RunningLog::open(options(folder.path(), 1 << 14));
    let all = events(1, 600);
    log.append(&all);
    let redact = |account: usize, up_to: u64| {
        let account = Did::parse(&all[account].did).expect("a DID");
        log.log.redact(&account, up_to).expect("redacts");
    };
    redact(1, 200);
    let mut dice = fastrand::Rng::with_seed(5);
    let mut reader = log.log.reader(1);
    let (mut resumed, mut cut, mut several) = (0, 0, 0);
    loop {
        let given = reader.given() as u64;
        let mut runs = Vec::new();
        let offer = reader.offer(dice.usize(1..6_000), |frames| {
            runs = frames.runs().to_vec();
            Ok(dice.usize(1..=frames.bytes()))
        });
        let bytes = match offer {
            Ok(Offer::Taken(bytes)) => bytes as u64,
            Ok(Offer::Nothing) => break,
            other => panic!("{other:?}"),
        };
        several += usize::from(runs.len() > 1);
        if dice.u8(..) < 40 {
            redact(dice.usize(0..4), reader.position());
        }
        let taken = LastOffer {
            runs,
            offset: given,
            taken: bytes,
        };
        match log.log.resume(&taken) {
            Ok(again) => {
                let stand = |reader: &Reader| (reader.position(), reader.given());
                assert_eq!(stand(&again), stand(&reader), "{taken:?}");
                resumed += 1;
            }
            Err(ResumeError::Redacted { seq }) => {
                assert!(seq == reader.position() && reader.is_inside_frame());
                reader = log.log.reader(seq + 1);
                cut += 1;
            }
            Err(other) => panic!("{other}: {taken:?}"),
        }
        let beyond = LastOffer {
            taken: 1 << 30,
            ..taken
        };
        log.log.resume(&beyond).expect_err("more than was offered");
    }
    assert!(
        resumed > 50 && cut > 0 && several > 0,
        "{resumed} {cut} {several}"
    );
    for (run, given, bytes) in [
        (602..602, 0, 0),
        (601..602, 1, 0),
        (601..700, 0, 1),
        (u64::MAX..u64::MAX, u64::MAX, 1),
    ] {
        let runs = vec![run];
        let taken = LastOffer {
            runs,
            offset: given,
            taken: bytes,
        };
        log.log.resume(&taken).expect_err("not in the log");
    }
    let nothing = LastOffer {
        runs: Vec::new(),
        offset: 0,
        taken: 0,
    };
    log.log.resume(&nothing).expect_err("nowhere");
    let next = 601..601;
    let live = LastOffer {
        runs: vec![next],
        ..nothing
    };
    let reader = log.log.resume(&live).expect("the next event");
    assert_eq!(reader.position(), 601);
}

#[test]
fn a_second_relay_is_kept_out() {
    let folder = quick_folder();
    let first = EventLog::open(options(folder.path(), 4096)).expect("the first opens");
    let second = EventLog::open(options(folder.path(), 4096)).expect_err("the second is refused");
    let text = second.to_string();
    assert!(text.contains("is in use by another relay"), "{text}");
    assert!(
        text.contains(&format!("process {}", std::process::id())),
        "{text}"
    );
    drop(first);
    EventLog::open(options(folder.path(), 4096)).expect("free again");
}

/// A log of a few events whose last batch is known: the folder, all events, and the lengths of frames
/// and index before that batch.
struct Torn {
    folder: tempfile::TempDir,
    all: Vec<Event>,
    before: usize,
    frames: Vec<u8>,
    index: Vec<u8>,
    frames_before: usize,
    index_before: usize,
}

impl Torn {
    fn new() -> Torn {
        let folder = quick_folder();
        let log = RunningLog::open(options(folder.path(), 1 << 20));
        let (before, all) = (5, events(1, 8));
        log.append(&all[..before]);
        log.append(&all[before..]);
        log.close();
        let frames = fs::read(&files(folder.path(), "seg")[0]).expect("frames");
        let index = fs::read(&files(folder.path(), "idx")[0]).expect("an index");
        let frames_before = wire(1, &all[..before]).len();
        Torn {
            folder,
            index_before: 64 * (1 + before),
            frames_before,
            before,
            all,
            frames,
            index,
        }
    }

    /// The folder with other bytes in it, opened and appended to: what it held before the append.
    fn reopen(&self, frames: &[u8], index: Option<&[u8]>, context: &str) -> u64 {
        let folder = quick_folder();
        let name = |path: &Path| folder.path().join(path.file_name().expect("a name"));
        fs::write(name(&files(self.folder.path(), "seg")[0]), frames).expect("frames");
        if let Some(index) = index {
            fs::write(name(&files(self.folder.path(), "idx")[0]), index).expect("an index");
        }
        let log = RunningLog::open(options(folder.path(), 1 << 20));
        let head = log.log.head();
        let more = Event::identity(77, 33, 1_000_000);
        assert_eq!(
            log.append(std::slice::from_ref(&more)),
            [head + 1],
            "{context}"
        );
        assert_eq!(
            read_all(&log.log, head + 1, 10),
            more.wire(head + 1),
            "{context}"
        );
        let bytes = read_all(&log.log, 1, 100);
        log.close();
        let again = EventLog::open(options(folder.path(), 1 << 20)).expect("opens again");
        assert_eq!(again.head(), head + 1, "{context}: opened again");
        assert!(
            read_all(&again, 1, 100) == bytes,
            "{context}: the same bytes when opened again"
        );
        if head <= self.all.len() as u64 {
            let (kept, _) = bytes.split_at(bytes.len() - more.wire(head + 1).len());
            self.assert_only_known(kept, context);
        }
        head
    }

    /// `bytes` are frames of the events, in order, each whole.
    fn assert_only_known(&self, bytes: &[u8], context: &str) {
        let mut rest = bytes;
        for (seq, event) in (1..).zip(&self.all) {
            rest = rest
                .strip_prefix(event.wire(seq).as_slice())
                .unwrap_or(rest);
        }
        assert!(
            rest.is_empty(),
            "{context}: {} bytes nobody wrote",
            rest.len()
        );
    }
}

#[test]
fn a_write_torn_at_every_byte_keeps_what_was_durable() {
    let torn = Torn::new();
    let zeros = [0; 4096];
    for cut in torn.frames_before..=torn.frames.len() {
        let context = format!("frames cut at {cut}");
        let short = &torn.frames[..cut];
        let index = &torn.index[..torn.index_before];
        let head = torn.reopen(short, Some(index), &context);
        assert_eq!(head, torn.before as u64, "{context}");
        // Preallocated files end in zeros instead.
        let (short, index) = ([short, &zeros].concat(), [index, &zeros].concat());
        let head = torn.reopen(&short, Some(&index), &context);
        assert_eq!(head, torn.before as u64, "{context}, preallocated");
        // Without a sync the index may reach the disk before the frames.
        let head = torn.reopen(&torn.frames[..cut], Some(&torn.index), &context);
        let whole = (0..)
            .take_while(|n| wire(1, &torn.all[..*n]).len() <= cut)
            .take(9)
            .count()
            - 1;
        assert_eq!(head, whole as u64, "{context}, whole index");
    }
    for cut in torn.index_before..=torn.index.len() {
        let context = format!("index cut at {cut}");
        let whole = (cut / 64 - 1) as u64;
        assert_eq!(
            torn.reopen(&torn.frames, Some(&torn.index[..cut]), &context),
            whole,
            "{context}"
        );
        let padded = [&torn.index[..cut], &zeros].concat();
        let head = torn.reopen(&torn.frames, Some(&padded), &context);
        assert!(
            head == whole || head == whole + 1,
            "{context}: {head}, preallocated"
        );
    }
}

#[test]
fn a_last_frame_that_lacks_a_sector_was_never_seen() {
    let folder = quick_folder();
    let log = RunningLog::open(options(folder.path(), 1 << 20));
    let all = [Event::identity(1, 700, 1), Event::identity(2, 3000, 2)];
    log.append(&all);
    log.close();
    // The mark is not synced.
    fs::remove_file(folder.path().join("head")).expect("the mark");
    let path = &files(folder.path(), "seg")[0];
    let whole = fs::read(path).expect("frames");
    let index = fs::read(&files(folder.path(), "idx")[0]).expect("an index");
    for sector in (1..whole.len() / 512).filter(|sector| sector * 512 >= all[0].wire(1).len()) {
        let mut frames = whole.clone();
        frames[sector * 512..][..512].fill(0);
        fs::write(path, frames).expect("frames");
        fs::write(&files(folder.path(), "idx")[0], &index).expect("an index");
        let reopened = EventLog::open(options(folder.path(), 1 << 20)).expect("opens");
        assert_holds(&reopened, &all[..1], &format!("without sector {sector}"));
    }
}

#[test]
fn an_index_that_is_gone_is_rebuilt_from_the_frames() {
    let torn = Torn::new();
    let all = torn.all.len() as u64;
    assert_eq!(torn.reopen(&torn.frames, None, "no index"), all);
    for cut in 0..64 {
        let context = format!("header cut at {cut}");
        assert_eq!(
            torn.reopen(&torn.frames, Some(&torn.index[..cut]), &context),
            all
        );
    }
}

/// The frame of a commit whose CAR holds one block.
fn commit(seq: i64) -> Append<i64> {
    let block = format!("the record of commit {seq}").into_bytes();
    let cid = Cid::of(Codec::Raw, &block);
    let blocks = car::write(&[cid], [(cid, block.as_slice())]);
    let did = did(1);
    let frame = frame::encode_commit(&frame::Commit {
        seq,
        repo: &did,
        rev: "3kao2cl6lyj2p",
        since: None,
        commit: cid,
        blocks: &blocks,
        ops: Vec::new(),
        prev_data: None,
        time: "2026-01-01T00:00:00.000Z",
        too_big: false,
        rebase: false,
    });
    let seq_span = frame::decode(&frame)
        .expect("a frame")
        .seq_span
        .expect("a seq");
    Append {
        frame: frame.into(),
        seq_span,
        origin: Origin::Host { id: 7, seq },
        did: Did::parse(&did).expect("a DID"),
        kind: Kind::Commit,
        given_seq: None,
        payload: seq,
    }
}

#[test]
fn commits_are_rebuilt_only_where_their_blocks_hash() {
    let folder = quick_folder();
    let log = RunningLog::open(options(folder.path(), 1 << 20));
    log.sender
        .send((1..=9).map(commit).collect())
        .expect("the sequencer runs");
    log.await_durable(9);
    let whole = read_all(&log.log, 1, 1000);
    log.close();
    fs::remove_file(&files(folder.path(), "idx")[0]).expect("an index");
    let reopened = EventLog::open(options(folder.path(), 1 << 20)).expect("opens");
    assert!(read_all(&reopened, 1, 1000) == whole);
    assert!(reopened.entries(1).all(|entry| {
        let (entry, _) = entry.expect("an entry");
        entry.origin == Origin::Unknown && entry.kind == Kind::Commit
    }));
    drop(reopened);
    fs::remove_file(&files(folder.path(), "idx")[0]).expect("an index");
    let path = &files(folder.path(), "seg")[0];
    let mut frames = fs::read(path).expect("frames");
    let record = b"record of commit 6";
    let at = frames
        .windows(record.len())
        .position(|it| it == record)
        .expect("the record");
    frames[at] ^= 1;
    fs::write(path, frames).expect("frames");
    let reopened = EventLog::open(options(folder.path(), 1 << 20)).expect("opens");
    // The numbers of the others stay taken: the mark says that they were seen.
    assert_eq!((reopened.head(), reopened.entries(1).count()), (9, 5));
    drop(reopened);
    fs::remove_file(folder.path().join("head")).expect("the mark");
    fs::remove_file(&files(folder.path(), "idx")[0]).expect("an index");
    let reopened = EventLog::open(options(folder.path(), 1 << 20)).expect("opens");
    assert_eq!(reopened.head(), 5);
}

/// Run by [`a_killed_process_leaves_what_it_reported`] in a process of its own: appends without end and
/// prints the sequence numbers that are durable.
#[test]
fn append_until_killed() {
    let Some(dir) = std::env::var_os("APPEND_UNTIL_KILLED") else {
        return;
    };
    let log = RunningLog::open(options(Path::new(&dir), 32 * 1024));
    for n in log.log.head() as i64 + 1.. {
        log.send(&[Event::identity(n as u64 % 5, n as usize * 31 % 900, n)]);
        for (seq, _) in log.durable.try_iter().flatten() {
            println!("durable {seq}");
        }
    }
}

#[test]
fn a_killed_process_leaves_what_it_reported() {
    let folder = tempfile::tempdir().expect("a folder");
    let mut reported = 0;
    for round in 0..12 {
        let mut child = Command::new(std::env::current_exe().expect("this test"))
            .args(["eventlog::append_until_killed", "--exact", "--nocapture"])
            .env("APPEND_UNTIL_KILLED", folder.path())
            .stdout(Stdio::piped())
            .spawn()
            .expect("a process");
        let lines = BufReader::new(child.stdout.take().expect("its output")).lines();
        let durable =
            lines.filter_map(|line| line.expect("a line").strip_prefix("durable ")?.parse().ok());
        let wanted = reported + 20 + round * 37;
        let mut durable = durable.inspect(|seq: &u64| reported = *seq);
        durable.find(|seq| *seq >= wanted).expect("events");
        child.kill().expect("kills");
        durable.for_each(drop);
        child.wait().expect("the end of the process");
        let log = EventLog::open(options(folder.path(), 32 * 1024)).expect("opens");
        assert!(
            log.head() >= reported,
            "{reported} were reported, {} are left",
            log.head()
        );
        let all: Vec<_> = (1..=log.head() as i64)
            .map(|n| Event::identity(n as u64 % 5, n as usize * 31 % 900, n))
            .collect();
        assert_holds(&log, &all, &format!("round {round}"));
    }
}

#[test]
fn a_flipped_bit_costs_one_event_at_most_and_no_number_twice() {
    let torn = Torn::new();
    let all = torn.all.len() as u64;
    let whole = wire(1, &torn.all);
    for at in 0..torn.index.len() {
        let mut index = torn.index.clone();
        index[at] ^= 1 << (at % 8);
        let context = format!("index flipped at {at}");
        assert_eq!(
            torn.reopen(&torn.frames, Some(&index), &context),
            all,
            "{context}"
        );
    }
    for at in 0..torn.frames.len() {
        let mut frames = torn.frames.clone();
        frames[at] ^= 1 << (at % 8);
        let context = format!("frames flipped at {at}");
        assert_eq!(
            torn.reopen(&frames, Some(&torn.index), &context),
            all,
            "{context}"
        );
    }
    assert_eq!(torn.frames, whole);
}

#[test]
fn both_files_damaged_in_one_place_open_all_the_same() {
    let torn = Torn::new();
    for slot in 0..torn.all.len() {
        let (mut frames, mut index) = (torn.frames.clone(), torn.index.clone());
        let at = wire(1, &torn.all[..slot]).len();
        frames[at..at + 40].fill(0xff);
        index[64 * (slot + 1)..64 * (slot + 2)].fill(0xff);
        let context = format!("event {} destroyed", slot + 1);
        assert_eq!(torn.reopen(&frames, Some(&index), &context), 8, "{context}");
    }
}

#[test]
fn a_folder_copied_while_it_is_written_opens() {
    let folder = quick_folder();
    let log = RunningLog::open(options(folder.path(), 16 * 1024));
    let all = events(1, 2000);
    std::thread::scope(|scope| {
        let sender = log.sender.clone();
        let events = &all;
        scope.spawn(move || {
            for batch in events.chunks(5) {
                let batch = batch
                    .iter()
                    .map(|event| event.append(event.upstream_seq))
                    .collect();
                sender.send(batch).expect("the sequencer runs");
            }
        });
        for round in 0..25 {
            let seen = log.log.head();
            let copy = quick_folder();
            let order = if round % 2 == 0 {
                ["idx", "seg"]
            } else {
                ["seg", "idx"]
            };
            copy_folder(folder.path(), copy.path(), order);
            let copied = RunningLog::open(options(copy.path(), 16 * 1024));
            let head = copied.log.head();
            assert!(
                head >= seen,
                "round {round}: {seen} had been seen, {head} are left"
            );
            assert_holds(&copied.log, &all[..head as usize], "a copy");
            assert_eq!(copied.append(&events[..1]), [head + 1]);
        }
    });
    assert_eq!(log.await_durable(all.len()).len(), all.len());
    assert_holds(&log.log, &all, "the original");
}

#[test]
fn a_full_disk_holds_events_back_and_loses_none() {
    for room in (0..3000).step_by(61) {
        let folder = quick_folder();
        let faults = Arc::new(Faults::default());
        let options = LogOptions {
            faults: Some(faults.clone()),
            ..options(folder.path(), 4096)
        };
        let log = RunningLog::open(options);
        let all = events(1, 30);
        log.append(&all[..10]);
        assert_eq!(log.log.health(), Health::Good);
        faults.fill_disk_after(room);
        log.send(&all[10..20]);
        log.send(&all[20..]);
        eventually("the failure", || log.log.health() != Health::Good);
        let head = log.log.head();
        assert!(
            read_all(&log.log, 1, 1000) == wire(1, &all[..head as usize]),
            "served meanwhile"
        );
        faults.heal();
        log.await_durable(20);
        assert_holds(&log.log, &all, &format!("room for {room}"));
        eventually("health", || log.log.health() == Health::Good);
        log.close();
        let reopened = EventLog::open(self::options(folder.path(), 4096)).expect("opens");
        assert_holds(&reopened, &all, &format!("room for {room}, reopened"));
    }
}

#[test]
fn failing_syncs_show_nothing_that_is_not_kept() {
    for durability in [
        Durability::Sync,
        Durability::Interval(Duration::from_millis(1)),
    ] {
        let folder = quick_folder();
        let faults = Arc::new(Faults::default());
        let options = LogOptions {
            durability,
            faults: Some(faults.clone()),
            ..options(folder.path(), 4096)
        };
        let log = RunningLog::open(options);
        let all = events(1, 40);
        log.append(&all[..4]);
        for batch in all[4..].chunks(4) {
            faults.fail_syncs(2);
            log.append(batch);
        }
        assert!(faults.refused() >= 18);
        assert_holds(&log.log, &all, "after failures");
    }
}

/// What follows from an event, its host's cursor and its account's state among it, must not outlive the event.
#[test]
fn what_a_sync_does_not_cover_is_seen_and_not_settled() {
    let folder = quick_folder();
    let faults = Arc::new(Faults::default());
    let log = RunningLog::open(LogOptions {
        durability: Durability::Interval(Duration::from_millis(1)),
        faults: Some(faults.clone()),
        ..options(folder.path(), 1 << 20)
    });
    let all = events(1, 12);
    log.append(&all[..4]);
    faults.fail_syncs(u64::MAX);
    log.send(&all[4..]);
    eventually("the sync", || faults.refused() > 0);
    assert_holds(&log.log, &all, "before the sync");
    assert!(log.durable.try_recv().is_err(), "settled without a sync");
    faults.heal();
    let settled = log.await_durable(8);
    assert_eq!(settled, (5..=12).zip(5..=12).collect::<Vec<_>>());
}

#[test]
fn failing_writes_hold_events_back_and_lose_none() {
    for durability in [
        Durability::Sync,
        Durability::Interval(Duration::from_millis(1)),
        Durability::None,
    ] {
        let folder = quick_folder();
        let faults = Arc::new(Faults::default());
        let options = LogOptions {
            durability,
            faults: Some(faults.clone()),
            ..options(folder.path(), 4096)
        };
        let log = RunningLog::open(options);
        let all = events(1, 60);
        log.append(&all[..4]);
        faults.fail_writes(u64::MAX);
        log.send(&all[4..30]);
        eventually("the failure", || log.log.health() != Health::Good);
        let Health::Failing { reason, .. } = log.log.health() else {
            panic!("it recovered by itself");
        };
        assert!(reason.contains("Input/output error"), "{reason}");
        assert_holds(
            &log.log,
            &all[..log.log.head() as usize],
            "served meanwhile",
        );
        faults.heal();
        log.await_durable(26);
        assert_eq!(log.log.health(), Health::Good);
        for batch in all[30..].chunks(5) {
            faults.fail_writes(1);
            log.append(batch);
        }
        assert_holds(&log.log, &all, "after failures");
        log.close();
        let reopened = EventLog::open(self::options(folder.path(), 4096)).expect("opens");
        assert_holds(&reopened, &all, "reopened");
    }
}

#[test]
fn a_sector_that_cannot_be_read_costs_its_event_and_stops_nobody_for_long() {
    let folder = quick_folder();
    let faults = Arc::new(Faults::default());
    let log = RunningLog::open(LogOptions {
        faults: Some(faults.clone()),
        ..options(folder.path(), 1 << 20)
    });
    let all = events(1, 60);
    log.append(&all);
    let lost = 31;
    let at = wire(1, &all[..lost - 1]).len() + 20;
    faults.fail_reads_at(1, at as u64);
    let mut reader = log.log.reader(1);
    let mut out = BytesMut::new();
    let error = reader
        .next(&mut out, 1 << 20)
        .expect_err("it cannot be read");
    assert!(matches!(error, ReadError::Io { seq: 1, .. }), "{error}");
    let entries = log.log.entries(1).and_redacted();
    let frames = entries.map(|it| it.expect("an entry").1.len());
    assert_eq!(
        frames.filter(|length| *length == 0).count(),
        1,
        "left out at once"
    );
    // Those behind it are served meanwhile.
    let behind = wire(lost as u64 + 1, &all[lost..]);
    assert!(read_all(&log.log, lost as u64 + 1, 1000) == behind);
    assert_eq!(log.append(&events(100, 1)), [61]);
    eventually("the look", || reader.next(&mut out, 1 << 20).is_ok());
    out.clear();
    let left = [wire(1, &all[..lost - 1]), behind, wire(61, &events(100, 1))].concat();
    assert!(read_all(&log.log, 1, 1 << 20) == left, "all others");
    assert_eq!(log.log.health(), Health::Good);
    drop(reader);
    log.close();
    let reopened = EventLog::open(options(folder.path(), 1 << 20)).expect("opens");
    assert_eq!(reopened.head(), 61);
    assert!(read_all(&reopened, 1, 1000) == left, "reopened");
}

#[test]
fn a_read_that_fails_once_costs_nothing() {
    let folder = quick_folder();
    let faults = Arc::new(Faults::default());
    let log = RunningLog::open(LogOptions {
        faults: Some(faults.clone()),
        ..options(folder.path(), 1 << 20)
    });
    let all = events(1, 20);
    log.append(&all);
    faults.fail_reads_at(1, 500);
    let mut reader = log.log.reader(1);
    let mut out = BytesMut::new();
    reader
        .next(&mut out, 1 << 20)
        .expect_err("it cannot be read");
    faults.heal();
    assert_holds(&log.log, &all, "healed");
    drop(reader);
    log.close();
    let reopened = EventLog::open(options(folder.path(), 1 << 20)).expect("opens");
    assert_holds(&reopened, &all, "reopened");
}

#[test]
fn stopping_on_a_full_disk_gives_back_what_is_not_durable() {
    let folder = quick_folder();
    let faults = Arc::new(Faults::default());
    let log = RunningLog::open(LogOptions {
        faults: Some(faults.clone()),
        ..options(folder.path(), 4096)
    });
    let all = events(1, 30);
    log.append(&all[..10]);
    faults.fill_disk_after(100);
    log.send(&all[10..15]);
    eventually("the failure", || log.log.health() != Health::Good);
    log.send(&all[15..]);
    let left = log.sequencer.stop();
    let expected: Vec<_> = all[10..].iter().map(|event| event.upstream_seq).collect();
    assert_eq!(left, expected);
    assert_holds(&log.log, &all[..10], "what became durable");
    // The same log takes events again, with another sequencer.
    faults.heal();
    let again = RunningLog::on(log.log);
    again.append(&all[10..]);
    assert_holds(&again.log, &all, "after a second start");
}

#[test]
fn one_sequencer_at_a_time() {
    let folder = quick_folder();
    let log = RunningLog::open(options(folder.path(), 4096));
    let (_sender, rx) = std::sync::mpsc::sync_channel(1);
    let second = atproto_relay::eventlog::sequencer::spawn::<()>(log.log.clone(), rx, |_| {});
    assert!(second.is_err());
}

#[test]
fn bytes_beyond_the_budget_go_oldest_first() {
    let folder = quick_folder();
    let log = RunningLog::open(LogOptions {
        max_bytes: 100_000,
        ..options(folder.path(), 4096)
    });
    let all = events(1, 1000);
    let mut left_behind = log.log.reader(1);
    let mut out = BytesMut::new();
    log.append(&all[..10]);
    left_behind
        .next(&mut out, 10)
        .expect("readable")
        .expect("an event");
    for batch in all[10..].chunks(10) {
        log.append(batch);
    }
    eventually("the removal", || log.log.bytes() <= 100_000);
    let oldest = log.log.oldest().expect("events");
    assert!(oldest > 500, "the oldest is {oldest}");
    let kept = wire(oldest, &all[oldest as usize - 1..]);
    assert!(read_all(&log.log, oldest, 5000) == kept);
    match left_behind.next(&mut out, 10) {
        Err(ReadError::TooSlow {
            position: 2,
            oldest: at,
        }) => assert!(at >= oldest),
        other => panic!("a reader inside a removed segment got {other:?}"),
    }
    drop(left_behind);
    log.close();
    let reopened = EventLog::open(options(folder.path(), 4096)).expect("opens");
    assert_eq!((reopened.oldest(), reopened.head()), (Some(oldest), 1000));
}

#[test]
fn events_out_of_the_window_go_but_the_numbers_go_on() {
    let folder = quick_folder();
    let window = Duration::from_secs(3600);
    let log = RunningLog::open(LogOptions {
        window,
        ..options(folder.path(), 4096)
    });
    let all = events(1, 100);
    log.append(&all);
    let (at, now) = (Instant::now(), SystemTime::now());
    log.log.trim(at, now);
    assert_eq!(log.log.oldest(), Some(1), "young events stay");
    for wrong in [now - Duration::from_secs(86400), now, now + 1000 * window] {
        log.log.trim(at, wrong);
        assert_eq!(log.log.oldest(), Some(1), "a clock set to {wrong:?}");
    }
    log.log.trim(at, now);
    log.log.trim(at + 2 * window, now + 2 * window);
    let oldest = log
        .log
        .oldest()
        .expect("the segment that is written to stays");
    assert!(oldest > 80, "the oldest is {oldest}");
    assert_eq!(files(folder.path(), "seg").len(), 1);
    assert_eq!(files(folder.path(), "idx").len(), 1);
    log.close();
    let again = RunningLog::open(options(folder.path(), 4096));
    assert_eq!(again.append(&all[..1]), [101]);
}

#[test]
fn removal_by_age_waits_for_the_slowest_slot_and_the_byte_budget_waits_for_none() {
    let folder = quick_folder();
    let window = Duration::from_secs(3600);
    let slots = Slots::default();
    let (fast, slow) = (slots.open("fast", 90), slots.open("slow", 30));
    let limited = LogOptions {
        window,
        slots,
        ..options(folder.path(), 4096)
    };
    let log = RunningLog::open(limited.clone());
    log.append(&events(1, 100));
    let (at, now) = (Instant::now(), SystemTime::now());
    log.log.trim(at, now);
    let oldest = |passed: Duration| {
        log.log.trim(at + passed, now + passed);
        log.log
            .oldest()
            .expect("the segment that is written to stays")
    };
    let first = oldest(2 * window);
    assert!((2..=30).contains(&first), "event 30 is needed: {first}");
    assert_eq!(oldest(3 * window), first);
    slow.confirm(60);
    let second = oldest(4 * window);
    assert!((31..=60).contains(&second), "event 60 is needed: {second}");
    drop(slow);
    let third = oldest(5 * window);
    assert!((61..=90).contains(&third), "event 90 is needed: {third}");
    // Too many bytes: whoever still needs them falls out.
    log.log.apply(&Settings {
        group_window: limited.group_window,
        window,
        max_bytes: 0,
        min_free: MinFree::Bytes(0),
        ..Settings::default()
    });
    assert!(oldest(5 * window) > 90);
    assert_eq!(fast.position(), 90);
    log.close();
}

/// Moves the times of all entries.
fn shift_times(dir: &Path, by: impl Fn(u64) -> u64) {
    for path in files(dir, "idx") {
        let mut index = fs::read(&path).expect("an index");
        let (entries, _) = index[64..].as_chunks_mut::<64>();
        for entry in entries.iter_mut().filter(|entry| **entry != [0; 64]) {
            let time = u64::from_le_bytes(entry[32..40].try_into().expect("eight bytes"));
            entry[32..40].copy_from_slice(&by(time).to_le_bytes());
            let sum = crc32fast::hash(&entry[..60]);
            entry[60..].copy_from_slice(&sum.to_le_bytes());
        }
        fs::write(&path, index).expect("an index");
    }
}

#[test]
fn a_start_with_a_wrong_clock_empties_no_window_and_gives_no_number_twice() {
    const YEAR_US: u64 = 365 * 86400 * 1_000_000;
    type Shift = fn(u64) -> u64;
    let shifts: [(&str, Shift); 3] = [
        ("set forward since", |time| time - YEAR_US),
        ("set back since", |time| time + YEAR_US),
        ("at 1970 once", |_| 1),
    ];
    for (name, shift) in shifts {
        let folder = quick_folder();
        let window = Duration::from_secs(3600);
        let options = || LogOptions {
            window,
            ..options(folder.path(), 4096)
        };
        let log = RunningLog::open(options());
        let all = events(1, 120);
        log.append(&all[..100]);
        log.close();
        shift_times(folder.path(), shift);
        let log = RunningLog::open(options());
        let (at, now) = (Instant::now(), SystemTime::now());
        log.log.trim(at, now);
        assert_eq!(log.append(&all[100..]), Vec::from_iter(101..=120), "{name}");
        assert_holds(&log.log, &all, name);
        // What is new ages as it should, and what lies before it goes with it.
        log.log.trim(at + window / 2, now + window / 2);
        assert_holds(&log.log, &all, name);
        log.log.trim(at + 2 * window, now + 2 * window);
        assert!(
            log.log.oldest() > Some(100),
            "{name}: {:?}",
            log.log.oldest()
        );
    }
}

#[test]
fn a_full_disk_costs_the_oldest_segments_before_it_holds_events_back() {
    let folder = quick_folder();
    let faults = Arc::new(Faults::default());
    let log = RunningLog::open(LogOptions {
        faults: Some(faults.clone()),
        min_free: MinFree::Bytes(10_000),
        ..options(folder.path(), 4096)
    });
    let all = events(1, 2000);
    log.append(&all[..200]);
    assert_eq!(log.log.oldest(), Some(1), "there is room");
    faults.fill_disk_after(0);
    // Fifty times what it makes room for at a time.
    for batch in all[200..].chunks(30) {
        log.append(batch);
    }
    let oldest = log.log.oldest().expect("events");
    assert!(oldest > 1500, "{oldest}");
    assert!(read_all(&log.log, oldest, 5000) == wire(oldest, &all[oldest as usize - 1..]));
    eventually("health", || log.log.health() == Health::Good);
}

#[test]
fn room_is_kept_free_before_the_disk_is_full() {
    let folder = quick_folder();
    let faults = Arc::new(Faults::default());
    let log = RunningLog::open(LogOptions {
        faults: Some(faults.clone()),
        min_free: MinFree::Bytes(1_000_000),
        ..options(folder.path(), 4096)
    });
    let all = events(1, 400);
    log.append(&all[..200]);
    faults.fill_disk_after(990_000);
    log.append(&all[200..]);
    eventually("the removal", || log.log.oldest() > Some(1));
    assert_eq!((faults.refused(), log.log.health()), (0, Health::Good));
    log.close();
    // The segment that is written to stays, however little room there is.
    faults.fill_disk_after(1 << 20);
    let log = RunningLog::open(LogOptions {
        faults: Some(faults.clone()),
        min_free: MinFree::Bytes(u64::MAX),
        ..options(folder.path(), 4096)
    });
    log.log.trim(Instant::now(), SystemTime::now());
    assert_eq!(files(folder.path(), "seg").len(), 1);
    assert_eq!(log.append(&all[..1]), [401]);
}

#[test]
fn a_disk_that_others_need_is_left_more_room() {
    let folder = quick_folder();
    for (min_free, trimmed) in [(MinFree::OwnDisk, false), (MinFree::SharedDisk, true)] {
        let dir = folder.path().join(format!("{min_free:?}"));
        let faults = Arc::new(Faults::default());
        let log = RunningLog::open(LogOptions {
            faults: Some(faults.clone()),
            min_free,
            ..options(&dir, 4096)
        });
        log.append(&events(1, 200));
        // Between a twentieth and three, and between 5 GB and 20 GB.
        let total = log.log.disk().expect("a file system").total;
        faults.fill_disk_after((total / 10).min(10_000_000_000));
        log.log.trim(Instant::now(), SystemTime::now());
        assert_eq!(log.log.oldest() > Some(1), trimmed, "{min_free:?}");
    }
}

#[test]
fn a_reader_that_stands_in_a_removed_segment_keeps_no_space_that_is_lacking() {
    let folder = quick_folder();
    let faults = Arc::new(Faults::default());
    let log = RunningLog::open(LogOptions {
        faults: Some(faults.clone()),
        min_free: MinFree::Bytes(1),
        ..options(folder.path(), 4096)
    });
    log.append(&events(1, 100));
    let mut reader = log.log.reader(1);
    let mut out = BytesMut::new();
    reader
        .next(&mut out, 10)
        .expect("readable")
        .expect("an event");
    let held = fs::File::open(&files(folder.path(), "seg")[0]).expect("frames");
    faults.fill_disk_after(0);
    log.log.trim(Instant::now(), SystemTime::now());
    assert_eq!(held.metadata().expect("still open").len(), 0);
    let error = reader.next(&mut out, 10).expect_err("it is gone");
    assert!(
        matches!(error, ReadError::TooSlow { position: 2, .. }),
        "{error}"
    );
}

/// An ended segment as 128 MiB of frames leave it, as far as a start may look: name, lengths, last entry.
fn feign_segment(dir: &Path, first: u64, events: u64) {
    const FRAMES: u64 = 128 << 20;
    let name = |extension| dir.join(format!("{first:020}.{extension}"));
    let frames = fs::File::create(name("seg")).expect("frames");
    frames.set_len(FRAMES).expect("a length");
    let mut entry = [0; 64];
    entry[..8].copy_from_slice(&(first + events - 1).to_le_bytes());
    entry[8..16].copy_from_slice(&(FRAMES - 4096).to_le_bytes());
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
    let now = now.expect("a clock").as_micros() as u64;
    entry[32..40].copy_from_slice(&now.to_le_bytes());
    entry[40..44].copy_from_slice(&4096_u32.to_le_bytes());
    entry[52] = Kind::Commit as u8;
    let sum = crc32fast::hash(&entry[..60]);
    entry[60..].copy_from_slice(&sum.to_le_bytes());
    let index = fs::File::create(name("idx")).expect("an index");
    index.write_all_at(&entry, 64 * events).expect("an entry");
}

#[test]
fn a_window_of_20_gb_opens_without_being_read() {
    const SEGMENTS: u64 = 160;
    const EVENTS: u64 = 32_768;
    let folder = quick_folder();
    for segment in 0..SEGMENTS {
        feign_segment(folder.path(), 1 + segment * EVENTS, EVENTS);
    }
    fs::write(
        folder
            .path()
            .join(format!("{:020}.seg", 1 + SEGMENTS * EVENTS)),
        [],
    )
    .expect("the last one");
    let started = Instant::now();
    let log = RunningLog::open(options(folder.path(), 128 << 20));
    let took = started.elapsed();
    assert_eq!(log.log.head(), SEGMENTS * EVENTS);
    assert_eq!(log.log.oldest(), Some(1));
    assert!(log.log.bytes() > 20 << 30);
    let seqs = log.append(&events(1, 1));
    assert_eq!(seqs, [SEGMENTS * EVENTS + 1]);
    println!("opened in {took:?}");
    assert!(took < Duration::from_secs(1), "it took {took:?}");
}

#[test]
fn an_ended_segment_that_is_not_whole_is_repaired_or_left_out() {
    let folder = quick_folder();
    let log = RunningLog::open(options(folder.path(), 4096));
    let all = events(1, 200);
    log.append(&all);
    log.close();
    // An index in the middle is lost: it comes back from the frames.
    fs::remove_file(&files(folder.path(), "idx")[2]).expect("an index");
    let reopened = EventLog::open(options(folder.path(), 4096)).expect("opens");
    assert_holds(&reopened, &all, "an index lost");
    drop(reopened);
    // Frames in the middle are lost: what lies around them is served.
    let lost = files(folder.path(), "seg")[2].clone();
    let [from, to] = [&lost, &files(folder.path(), "seg")[3]].map(|path| first_seq(path) as usize);
    fs::remove_file(&lost).expect("frames");
    let reopened = EventLog::open(options(folder.path(), 4096)).expect("opens");
    assert_eq!((reopened.oldest(), reopened.head()), (Some(1), 200));
    let around = [wire(1, &all[..from - 1]), wire(to as u64, &all[to - 1..])].concat();
    assert!(read_all(&reopened, 1, 1000) == around);
    drop(reopened);
    // So much is lost that its numbers cannot be held: the window begins behind it.
    fs::write(folder.path().join("00000000000100000000.seg"), b"").expect("a segment");
    let reopened = EventLog::open(options(folder.path(), 4096)).expect("opens");
    assert_eq!((reopened.oldest(), reopened.head()), (None, 99_999_999));
}

#[test]
fn the_end_of_an_ended_segment_torn_at_any_byte_costs_its_events_only() {
    let folder = quick_folder();
    let log = RunningLog::open(options(folder.path(), 4096));
    let all = events(1, 40);
    log.append(&all);
    log.close();
    let [frames, index] = ["seg", "idx"].map(|it| files(folder.path(), it)[0].clone());
    let ended = first_seq(&files(folder.path(), "seg")[1]) as usize - 1;
    let length = fs::metadata(&frames).expect("frames").len() as usize;
    for cut in (0..length).rev().step_by(97) {
        let torn = fs::OpenOptions::new()
            .write(true)
            .open(&frames)
            .expect("frames");
        torn.set_len(cut as u64).expect("cuts");
        fs::remove_file(&index).expect("an index");
        let whole = (0..)
            .take_while(|n| wire(1, &all[..*n]).len() <= cut)
            .take(ended + 1)
            .count()
            - 1;
        let reopened = EventLog::open(options(folder.path(), 4096)).expect("opens");
        let left = [
            wire(1, &all[..whole]),
            wire(ended as u64 + 1, &all[ended..]),
        ]
        .concat();
        assert!(read_all(&reopened, 1, 1000) == left, "cut at {cut}");
    }
}

/// The sequence number in a segment's name.
fn first_seq(path: &Path) -> u64 {
    let name = path
        .file_stem()
        .and_then(|name| name.to_str())
        .expect("a name");
    name.parse().expect("a sequence number")
}

/// Everything in the raw files of a folder.
fn raw(dir: &Path) -> Vec<u8> {
    files(dir, "seg")
        .iter()
        .flat_map(|path| fs::read(path).expect("a segment"))
        .collect()
}

fn contains(haystack: &[u8], needle: &[u8]) -> bool {
    haystack
        .windows(needle.len())
        .any(|window| window == needle)
}

/// Events of accounts 1 and 2 by turns, each with a filler nobody else has; an `#account` in the end.
fn two_accounts() -> Vec<Event> {
    let mut all: Vec<Event> = (0..60)
        .map(|n| Event {
            did: did(1 + n % 2),
            kind: Kind::Identity,
            filler: format!("secret-of-{}-number-{n:04}", 1 + n % 2),
            upstream_seq: n as i64,
        })
        .collect();
    let filler = "deleted".to_owned();
    all.push(Event {
        did: did(1),
        kind: Kind::Account,
        filler,
        upstream_seq: 100,
    });
    all
}

#[test]
fn a_redacted_account_is_gone_from_readers_at_once_and_from_the_raw_file() {
    let folder = tempfile::tempdir().expect("a folder");
    let log = RunningLog::open(options(folder.path(), 4096));
    let all = two_accounts();
    log.append(&all);
    let later = Event {
        upstream_seq: 200,
        ..all[0].clone()
    };
    log.append(std::slice::from_ref(&later));
    assert!(contains(&raw(folder.path()), b"secret-of-1"));
    let mut inside = log.log.reader(1);
    let mut out = BytesMut::new();
    inside
        .next(&mut out, 1)
        .expect("readable")
        .expect("an event");

    let expected: Vec<u8> = (1..)
        .zip(all.iter().chain([&later]))
        .filter(|(seq, event)| event.did == did(2) || event.kind == Kind::Account || *seq == 62)
        .flat_map(|(seq, event)| event.wire(seq))
        .collect();
    log.log
        .redact(&Did::parse(&did(1)).expect("a DID"), 61)
        .expect("redacts");
    assert!(read_all(&log.log, 1, 1000) == expected, "at once");
    out.clear();
    while inside.next(&mut out, 100).expect("readable").is_some() {}
    assert!(out == expected, "also for a reader that was inside");
    assert_eq!(log.log.entries(1).count(), 32);

    eventually("the punching", || log.log.redactions_pending() == 0);
    let bytes = raw(folder.path());
    let (first, rest) = bytes.split_at(wire(1, &all).len());
    assert!(!contains(first, b"secret-of-1"), "the raw files");
    assert!(
        contains(rest, b"secret-of-1"),
        "the event after the redaction stays"
    );
    assert!(contains(&bytes, b"secret-of-2") && contains(&bytes, b"deleted"));
    assert!(
        read_all(&log.log, 1, 1000) == expected,
        "after the punching"
    );
    drop(inside);
    log.close();
    let reopened = EventLog::open(options(folder.path(), 4096)).expect("opens");
    assert_eq!(reopened.head(), 62);
    assert!(read_all(&reopened, 1, 1000) == expected, "reopened");
}

#[test]
fn a_redaction_survives_the_end_of_the_process() {
    for _ in 0..20 {
        let folder = quick_folder();
        let log = RunningLog::open(options(folder.path(), 4096));
        log.append(&two_accounts());
        log.log
            .redact(&Did::parse(&did(1)).expect("a DID"), 61)
            .expect("redacts");
        let copy = quick_folder();
        // First: what it says is then true of whatever is copied after it.
        let journal = folder.path().join("redactions");
        let noted = fs::read(journal).expect("the journal");
        copy_folder(folder.path(), copy.path(), ["idx", "seg"]);
        fs::write(copy.path().join("redactions"), noted).expect("the journal");
        log.close();
        for dir in [folder.path(), copy.path()] {
            let reopened = EventLog::open(options(dir, 4096)).expect("opens");
            assert!(!contains(&read_all(&reopened, 1, 1000), b"secret-of-1"));
            eventually("the punching", || reopened.redactions_pending() == 0);
            assert!(!contains(&raw(dir), b"secret-of-1"));
            assert!(contains(&raw(dir), b"secret-of-2"));
        }
    }
}

#[test]
fn a_redaction_that_cannot_be_noted_holds_all_the_same() {
    let folder = quick_folder();
    let log = RunningLog::open(options(folder.path(), 4096));
    log.append(&two_accounts());
    fs::create_dir(folder.path().join("redactions")).expect("something in the way");
    let error = log
        .log
        .redact(&Did::parse(&did(1)).expect("a DID"), 61)
        .expect_err("it says so");
    assert!(error.to_string().contains("redactions"), "{error}");
    assert!(!contains(&read_all(&log.log, 1, 1000), b"secret-of-1"));
    eventually("the punching", || {
        !contains(&raw(folder.path()), b"secret-of-1")
    });
}

fn redact(log: &EventLog, account: u64, up_to: u64) {
    let did = Did::parse(&did(account)).expect("a DID");
    log.redact(&did, up_to).expect("redacts");
}

#[test]
fn a_redaction_cut_off_between_mark_and_punch_is_carried_out_at_the_next_start() {
    for punched in [0, 3] {
        let folder = quick_folder();
        let faults = Arc::new(Faults::default());
        let log = RunningLog::open(LogOptions {
            faults: Some(faults.clone()),
            ..options(folder.path(), 4096)
        });
        log.append(&two_accounts());
        // Some holes are punched, then the disk fails for good.
        faults.fail_punches_after(punched);
        redact(&log.log, 1, 61);
        eventually("the marks", || faults.refused() > 0);
        assert!(!contains(&read_all(&log.log, 1, 1000), b"secret-of-1"));
        let copy = quick_folder();
        copy_folder(folder.path(), copy.path(), ["idx", "seg"]);
        let journal = folder.path().join("redactions");
        fs::copy(&journal, copy.path().join("redactions")).expect("the journal");
        assert!(contains(&raw(copy.path()), b"secret-of-1"), "not yet");
        let reopened = EventLog::open(options(copy.path(), 4096)).expect("opens");
        assert!(!contains(&read_all(&reopened, 1, 1000), b"secret-of-1"));
        eventually("the punching", || reopened.redactions_pending() == 0);
        assert!(!contains(&raw(copy.path()), b"secret-of-1"));
        assert!(contains(&raw(copy.path()), b"secret-of-2"));
        // Where the process lives on, it goes on by itself; another redaction only makes it look sooner.
        faults.heal();
        redact(&log.log, 9, 61);
        eventually("the punching", || log.log.redactions_pending() == 0);
        assert!(!contains(&raw(folder.path()), b"secret-of-1"));
    }
}

#[test]
fn a_redaction_reaches_what_the_index_has_lost() {
    let folder = quick_folder();
    let all = two_accounts();
    let log = RunningLog::open(options(folder.path(), 4096));
    log.append(&all);
    log.close();
    // Of the account's events, one has lost its entry, one the bytes that say whose it is.
    let [frames, index] = ["seg", "idx"].map(|it| files(folder.path(), it)[0].clone());
    let account = (1..).zip(&all).filter(|(_, event)| event.did == did(1));
    let [(lost, _), (rotten, _)] = [0, 1].map(|nth| account.clone().nth(nth + 1).expect("events"));
    let mut bytes = fs::read(&index).expect("an index");
    bytes[64 * lost as usize + 20] ^= 1;
    fs::write(&index, bytes).expect("an index");
    let mut bytes = fs::read(&frames).expect("frames");
    let at = wire(1, &all[..rotten as usize - 1]).len();
    let name = bytes[at..].windows(4).position(|it| it == b"did:");
    bytes[at + name.expect("a DID")] ^= 0x80;
    fs::write(&frames, bytes).expect("frames");

    let log = RunningLog::open(options(folder.path(), 4096));
    redact(&log.log, 1, 61);
    assert!(!contains(&read_all(&log.log, 1, 1000), b"secret-of-1"));
    eventually("the punching", || log.log.redactions_pending() == 0);
    assert!(!contains(&raw(folder.path()), b"secret-of-1"));
    assert!(contains(&raw(folder.path()), b"secret-of-2"));
    log.close();
    // And a rebuilt index does not bring it back.
    fs::remove_file(&index).expect("an index");
    let reopened = EventLog::open(options(folder.path(), 4096)).expect("opens");
    assert!(!contains(&read_all(&reopened, 1, 1000), b"secret-of-1"));
    assert_eq!(reopened.head(), 61);
}

/// Puts a folder in place of a file: who opens it cannot read it, and does not take it for one that retention removed.
fn bar(path: &Path) {
    fs::remove_file(path).expect("a file");
    fs::create_dir(path).expect("a folder");
}

/// Waits until every segment but the last has its account index.
fn await_account_indexes(dir: &Path) {
    eventually("the account indexes", || {
        files(dir, "acc").len() == files(dir, "seg").len() - 1
    });
}

/// Events of account 9 are the 50th and the 51st of 400, and account 8's are the last ones.
fn rare_accounts() -> Vec<Event> {
    let mut all = events(1, 400);
    for (at, account) in [(49, 9), (50, 9), (398, 8), (399, 8)] {
        all[at].did = did(account);
        all[at].filler = format!("secret-of-{account}");
    }
    all
}

#[test]
fn a_redaction_reads_only_segments_that_hold_the_account() {
    let folder = quick_folder();
    let log = RunningLog::open(options(folder.path(), 4096));
    let all = rare_accounts();
    log.append(&all);
    await_account_indexes(folder.path());
    let segments = files(folder.path(), "seg");
    let of_nine = segments
        .iter()
        .map(|path| first_seq(path))
        .rev()
        .find(|first| *first <= 50);
    let (of_nine, of_eight) = (
        of_nine.expect("a segment"),
        first_seq(&segments[segments.len() - 1]),
    );
    assert!(segments.len() > 20 && of_nine < of_eight);
    for path in files(folder.path(), "idx") {
        if ![of_nine, of_eight].contains(&first_seq(&path)) {
            bar(&path);
        }
    }
    // In an ended segment, in the one that is written to, and nowhere.
    for account in [9, 8, 7] {
        redact(&log.log, account, 400);
        eventually("the punching", || log.log.redactions_pending() == 0);
        let secret = format!("secret-of-{account}");
        assert!(!contains(&raw(folder.path()), secret.as_bytes()));
    }
}

#[test]
fn an_account_index_that_is_lost_or_damaged_hides_nothing_from_a_redaction() {
    type Damage = fn(&Path);
    let damages: [(&str, Damage); 5] = [
        ("none", |_| {}),
        ("lost", |path| fs::remove_file(path).expect("a file")),
        ("emptied", |path| fs::write(path, b"").expect("a file")),
        ("zeros", |path| {
            let length = fs::metadata(path).expect("a file").len() as usize;
            fs::write(path, vec![0; length]).expect("a file");
        }),
        ("a flipped bit", |path| {
            let mut bytes = fs::read(path).expect("a file");
            let middle = bytes.len() / 2;
            bytes[middle] ^= 4;
            fs::write(path, bytes).expect("a file");
        }),
    ];
    for (name, damage) in damages {
        let folder = quick_folder();
        let log = RunningLog::open(options(folder.path(), 4096));
        log.append(&rare_accounts());
        await_account_indexes(folder.path());
        let before: Vec<_> = files(folder.path(), "acc");
        let sound: Vec<_> = before
            .iter()
            .map(|it| fs::read(it).expect("a file"))
            .collect();
        before.iter().for_each(|path| damage(path));
        redact(&log.log, 9, 400);
        eventually("the punching", || log.log.redactions_pending() == 0);
        let left = raw(folder.path());
        assert!(!contains(&left, b"secret-of-9"), "{name}");
        assert!(contains(&left, b"secret-of-8"), "{name}");
        // What was looked through is indexed again; a flipped bit may lie where nobody looked.
        let after: Vec<_> = before
            .iter()
            .map(|it| fs::read(it).expect("a file"))
            .collect();
        assert!(after == sound || name == "a flipped bit", "{name}");
        log.close();
        // And the next process finds what this one wrote.
        let reopened = EventLog::open(options(folder.path(), 4096)).expect("opens");
        redact(&reopened, 8, 400);
        eventually("the punching", || reopened.redactions_pending() == 0);
        assert!(!contains(&raw(folder.path()), b"secret-of-8"), "{name}");
    }
}

#[test]
fn what_a_repair_brings_back_is_redacted_as_well() {
    let folder = quick_folder();
    let log = RunningLog::open(options(folder.path(), 4096));
    let all = rare_accounts();
    log.append(&all);
    await_account_indexes(folder.path());
    let holder = files(folder.path(), "idx")
        .into_iter()
        .rev()
        .find(|path| first_seq(path) <= 50);
    let holder = holder.expect("a segment");
    log.close();
    // Both its entries are lost when the account index is made.
    let sound = fs::read(&holder).expect("an index");
    let mut bytes = sound.clone();
    let at = 64 * (1 + 50 - first_seq(&holder)) as usize;
    bytes[at..at + 128].fill(0x33);
    fs::write(&holder, &bytes).expect("an index");
    fs::remove_file(holder.with_extension("acc")).expect("an account index");
    let log = RunningLog::open(options(folder.path(), 4096));
    redact(&log.log, 5, 400);
    eventually("the punching", || log.log.redactions_pending() == 0);
    log.close();
    assert!(contains(&raw(folder.path()), b"secret-of-9"));
    atproto_relay::eventlog::repair(folder.path(), false, &mut || {}).expect("repairs");
    let log = RunningLog::open(options(folder.path(), 4096));
    redact(&log.log, 9, 400);
    eventually("the punching", || log.log.redactions_pending() == 0);
    assert!(!contains(&raw(folder.path()), b"secret-of-9"));
}

#[test]
fn retention_does_not_wait_for_a_redaction() {
    let folder = quick_folder();
    let faults = Arc::new(Faults::default());
    let log = RunningLog::open(LogOptions {
        faults: Some(faults.clone()),
        max_bytes: 100_000,
        ..options(folder.path(), 4096)
    });
    log.append(&two_accounts());
    faults.hold_punches();
    redact(&log.log, 1, 61);
    for batch in events(1, 1000).chunks(10) {
        log.append(batch);
    }
    eventually("the removal", || log.log.bytes() <= 100_000);
    assert_eq!(log.log.redactions_pending(), 1, "it is still under way");
    faults.heal();
    eventually("the punching", || log.log.redactions_pending() == 0);
}

/// A sync fails, so what was not synced is written once more; meanwhile an account of it is redacted.
#[test]
fn what_is_written_again_after_a_failed_sync_does_not_bring_back_what_was_punched_out() {
    let folder = quick_folder();
    let faults = Arc::new(Faults::default());
    let log = RunningLog::open(LogOptions {
        faults: Some(faults.clone()),
        durability: Durability::Interval(Duration::from_millis(1)),
        ..options(folder.path(), 1 << 20)
    });
    faults.hold_rewrites();
    faults.fail_syncs(1);
    log.send(&two_accounts());
    eventually("the rewrite", || faults.held_rewrites() > 0);
    redact(&log.log, 1, 61);
    // Where nothing kept it from that, it would be done before the rewrite goes on.
    let start = Instant::now();
    while log.log.redactions_pending() > 0 && start.elapsed() < Duration::from_millis(500) {
        std::thread::yield_now();
    }
    faults.heal();
    log.await_durable(61);
    eventually("the punching", || log.log.redactions_pending() == 0);
    log.close();
    let left = raw(folder.path());
    assert!(!contains(&left, b"secret-of-1") && contains(&left, b"secret-of-2"));
    let reopened = EventLog::open(options(folder.path(), 1 << 20)).expect("opens");
    assert!(!contains(&read_all(&reopened, 1, 1000), b"secret-of-1"));
}

/// A redaction that could not be noted is begun, then the process dies. The next one repeats it, and must not take the
/// marks for the deed; what is marked and done is not done again.
#[test]
fn a_redaction_that_was_begun_and_not_noted_is_carried_out_when_it_is_repeated() {
    let folder = quick_folder();
    let faults = Arc::new(Faults::default());
    let with_faults = || LogOptions {
        faults: Some(faults.clone()),
        ..options(folder.path(), 4096)
    };
    let log = RunningLog::open(with_faults());
    log.append(&two_accounts());
    faults.fail_punches_after(0);
    redact(&log.log, 1, 61);
    eventually("the marks", || faults.refused() > 0);
    log.close();
    fs::remove_file(folder.path().join("redactions")).expect("the journal");
    assert!(contains(&raw(folder.path()), b"secret-of-1"));
    faults.heal();
    let log = RunningLog::open(with_faults());
    let account = Did::parse(&did(1)).expect("a DID");
    log.log
        .redact_again([(account.clone(), 61)])
        .expect("redacts");
    eventually("the punching", || log.log.redactions_pending() == 0);
    assert!(!contains(&raw(folder.path()), b"secret-of-1"));
    // Whoever would punch again would fail.
    faults.fail_punches_after(0);
    let refused = faults.refused();
    redact(&log.log, 1, 61);
    eventually("the pass", || log.log.redactions_pending() == 0);
    assert_eq!(faults.refused(), refused);
}

#[test]
fn many_accounts_are_redacted_together() {
    let folder = quick_folder();
    let log = RunningLog::open(options(folder.path(), 64 * 1024));
    let all: Vec<_> = (0..4000)
        .map(|n| Event {
            did: did(n % 1000),
            filler: format!("secret-of-{:03}", n % 1000),
            ..Event::identity(0, 0, n as i64)
        })
        .collect();
    log.append(&all);
    let accounts = (0..999).map(|n| (Did::parse(&did(n)).expect("a DID"), 4000));
    log.log.redact_all(accounts).expect("redacts");
    assert_eq!(log.log.entries(1).count(), 4);
    eventually("the punching", || log.log.redactions_pending() == 0);
    assert_eq!(log.log.entries(1).count(), 4);
    let left = raw(folder.path());
    let secrets = left.windows(10).filter(|it| *it == b"secret-of-");
    assert_eq!(secrets.count(), 4);
}

#[test]
fn of_an_ended_account_only_plain_status_events_stay() {
    let folder = quick_folder();
    let log = RunningLog::open(options(folder.path(), 4096));
    let says = |word: &str, n| Event {
        did: did(1),
        kind: Kind::Account,
        filler: word.to_owned(),
        upstream_seq: n,
    };
    let all = [
        says("deactivated", 1),
        says("forbidden", 2),
        Event::identity(1, 10, 3),
        says("deleted", 4),
    ];
    log.append(&all);
    redact(&log.log, 1, 3);
    let kept = [all[0].wire(1), all[3].wire(4)].concat();
    assert!(read_all(&log.log, 1, 1000) == kept, "at once");
    eventually("the punching", || log.log.redactions_pending() == 0);
    assert!(read_all(&log.log, 1, 1000) == kept, "after the punching");
    assert!(!contains(&raw(folder.path()), b"forbidden"));
}

/// An `#identity` whose frame has this many bytes with `seq` 1.
fn of_length(length: usize, upstream_seq: i64) -> Event {
    let event = Event::identity(1, 100_000, upstream_seq);
    let (frame, _) = event.frame(1);
    Event::identity(1, length + 100_000 - frame.len(), upstream_seq)
}

#[test]
fn the_log_takes_no_frame_that_no_consumer_would_take() {
    let folder = quick_folder();
    let log = RunningLog::open(options(folder.path(), 64 << 20));
    let all = [
        of_length(frame::MAX_FRAME_BYTES, 1),
        of_length(frame::MAX_FRAME_BYTES + 1, 2),
        Event::identity(1, 10, 3),
    ];
    log.send(&all);
    assert_eq!(log.await_durable(2), [(1, 1), (2, 3)]);
    let kept = [all[0].wire(1), all[2].wire(2)].concat();
    assert!(read_all(&log.log, 1, 1000) == kept);
}

#[test]
fn what_is_redacted_takes_no_space() {
    let folder = quick_folder();
    let log = RunningLog::open(options(folder.path(), 1 << 20));
    let all: Vec<_> = (0..40)
        .map(|n| Event::identity(n % 2, 60_000, n as i64))
        .collect();
    log.append(&all);
    let taken = || -> u64 {
        let segments = files(folder.path(), "seg").into_iter();
        let last = segments.len() - 1;
        let ended = segments.take(last);
        ended
            .map(|path| fs::metadata(path).expect("a segment").blocks() * 512)
            .sum()
    };
    let before = taken();
    redact(&log.log, 1, 40);
    eventually("the punching", || log.log.redactions_pending() == 0);
    assert!(taken() < before * 3 / 5, "{} of {before}", taken());
}

#[test]
fn readers_never_see_a_hole_while_accounts_are_redacted() {
    let folder = quick_folder();
    let log = RunningLog::open(options(folder.path(), 64 * 1024));
    let all: Vec<_> = (0..4000)
        .map(|n| Event::identity(n % 50, 100, n as i64))
        .collect();
    log.append(&all);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            for account in 0..49 {
                log.log
                    .redact(&Did::parse(&did(account)).expect("a DID"), 4000)
                    .expect("redacts");
            }
        });
        while log.log.redactions_pending() > 0 || log.log.entries(1).count() > 80 {
            let mut bytes = read_all(&log.log, 1, 3000);
            for (seq, event) in (1..).zip(&all) {
                let frame = event.wire(seq);
                if bytes.starts_with(&frame) {
                    bytes.drain(..frame.len());
                }
            }
            assert!(bytes.is_empty(), "a reader got bytes that are no event");
        }
    });
    assert_eq!(log.log.entries(1).count(), 80);
}

/// One step in the life of a log.
#[derive(Debug, Clone)]
enum Step {
    Append(Vec<usize>),
    /// Closed in order.
    Reopen,
    /// The process is gone: the files as they are, preallocated space and all, perhaps with the
    /// beginning of a write that did not end.
    Kill {
        torn: usize,
    },
    FullDisk {
        room: u64,
    },
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        4 => proptest::collection::vec(0usize..1500, 1..12).prop_map(Step::Append),
        1 => Just(Step::Reopen),
        2 => (0usize..400).prop_map(|torn| Step::Kill { torn }),
        1 => (0u64..5000).prop_map(|room| Step::FullDisk { room }),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 40, ..ProptestConfig::default() })]

    #[test]
    fn whatever_happens_numbers_are_dense_and_bytes_equal(
        steps in proptest::collection::vec(step(), 1..25),
        durability in prop_oneof![
            Just(Durability::Sync), Just(Durability::None), Just(Durability::Interval(Duration::ZERO)),
        ],
    ) {
        let faults = Arc::new(Faults::default());
        let mut folder = quick_folder();
        let options = |dir: &Path| LogOptions {
            durability, faults: Some(faults.clone()), ..options(dir, 5000)
        };
        let mut log = RunningLog::open(options(folder.path()));
        let mut model: Vec<Event> = Vec::new();
        for step in steps {
            match &step {
                Step::Append(lengths) => {
                    let from = model.len();
                    for length in lengths {
                        model.push(Event::identity(*length as u64 % 5, *length, model.len() as i64));
                    }
                    log.append(&model[from..]);
                }
                Step::Reopen => {
                    log.close();
                    log = RunningLog::open(options(folder.path()));
                }
                Step::Kill { torn } => {
                    let copy = quick_folder();
                    copy_folder(folder.path(), copy.path(), ["seg", "idx"]);
                    tear(copy.path(), &model, *torn);
                    log.close();
                    folder = copy;
                    log = RunningLog::open(options(folder.path()));
                }
                Step::FullDisk { room } => {
                    faults.fill_disk_after(*room);
                    let from = model.len();
                    model.extend((0..6).map(|n| Event::identity(n, 900, (from as u64 + n) as i64)));
                    log.send(&model[from..]);
                    std::thread::yield_now();
                    faults.heal();
                    log.await_durable(model.len() - from);
                }
            }
            assert_holds(&log.log, &model, &format!("{step:?}"));
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    #[test]
    fn a_folder_full_of_garbage_opens_and_takes_events(
        frames in proptest::collection::vec(any::<u8>(), 0..3000),
        index in proptest::collection::vec(any::<u8>(), 0..1000),
        first in 1u64..1 << 40,
    ) {
        let folder = quick_folder();
        fs::write(folder.path().join(format!("{first:020}.seg")), frames).expect("frames");
        fs::write(folder.path().join(format!("{first:020}.idx")), index).expect("an index");
        let log = RunningLog::open(options(folder.path(), 4096));
        let event = Event::identity(1, 100, 1);
        let seq = log.append(std::slice::from_ref(&event))[0];
        prop_assert!(seq >= first);
        prop_assert_eq!(read_all(&log.log, seq, 10), event.wire(seq));
        read_all(&log.log, first, 1000);
    }
}

/// Writes the first bytes of one more event behind the last, as a write cut short would.
fn tear(dir: &Path, model: &[Event], torn: usize) {
    let Some(path) = files(dir, "seg").pop() else {
        return;
    };
    let first = first_seq(&path) as usize;
    let at = wire(first as u64, &model[first - 1..]).len();
    let next = Event::identity(3, 500, 3).wire(model.len() as u64 + 1);
    let mut bytes = fs::read(&path).expect("frames");
    let torn = torn.min(next.len());
    bytes.resize(bytes.len().max(at + torn), 0);
    bytes[at..at + torn].copy_from_slice(&next[..torn]);
    fs::write(&path, bytes).expect("frames");
}

#[test]
fn folders_of_events_are_listed_by_number() {
    // Foreign files do not disturb the log.
    let folder = quick_folder();
    for name in ["notes.txt", "12.seg", "00000000000000000000.seg", "x.idx"] {
        fs::write(folder.path().join(name), b"not ours").expect("a file");
    }
    let log = RunningLog::open(options(folder.path(), 4096));
    let seqs: BTreeMap<_, _> = log.append(&events(1, 3)).into_iter().zip(1..).collect();
    assert_eq!(
        seqs.into_iter().collect::<Vec<_>>(),
        [(1, 1), (2, 2), (3, 3)]
    );
}
