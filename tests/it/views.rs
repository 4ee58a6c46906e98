//! Following the log: every event once and in order from a position on, in bounded batches, over ends of segments and while
//! it is written; and what views are given.

use std::fs;
use std::path::Path;
use std::time::{Duration, Instant, SystemTime};

use crate::support::event::{Event, RunningLog, did, quick_folder};
use atproto_relay::atproto::did::Did;
use atproto_relay::atproto::frame::{Kind, Message};
use atproto_relay::eventlog::{LogOptions, MinFree, Origin, Settings, Slots};
use atproto_relay::views::{
    self, Batch, FellOut, FollowError, Follower, MAX_BYTES, MAX_EVENTS, Purge, Step, View,
};

fn options(dir: &Path) -> LogOptions {
    LogOptions {
        segment_bytes: 4096,
        group_window: Duration::ZERO,
        ..LogOptions::new(dir)
    }
}

fn events(from: i64, count: i64) -> Vec<Event> {
    (from..from + count)
        .map(|seq| Event::identity(seq as u64 % 7, 40, seq))
        .collect()
}

fn batch(step: Step) -> Batch {
    match step {
        Step::Events(batch) => batch,
        Step::FellOut(gap) => panic!("fell out: {gap:?}"),
    }
}

/// The sequence numbers of a batch; all its events are whole.
fn seqs(batch: &Batch) -> Vec<u64> {
    let events = batch.events();
    for event in &events {
        let Some(Message::Identity(identity)) = &event.message else {
            panic!("{event:?}");
        };
        let seq = event.entry.origin.upstream_seq().unwrap();
        assert_eq!(identity.did, did(seq as u64 % 7));
    }
    events.iter().map(|event| event.entry.seq).collect()
}

#[tokio::test]
async fn batches_are_bounded_and_go_on_from_any_position() {
    let folder = quick_folder();
    let log = RunningLog::open(options(folder.path()));
    log.append(&events(1, 2_500));
    for from in [1, 2, 1_000, 2_500] {
        let mut follower = Follower::new(log.log.clone(), from);
        let mut read = Vec::new();
        while let Some(step) = follower.read().await.unwrap() {
            let batch = batch(step);
            let seqs = seqs(&batch);
            assert!((1..=MAX_EVENTS).contains(&seqs.len()));
            read.extend(seqs);
            assert_eq!(batch.next(), follower.position());
            // Whoever goes on elsewhere from there misses nothing.
            follower = Follower::new(log.log.clone(), batch.next());
        }
        assert!(read.into_iter().eq(from..=2_500));
        assert!(follower.read().await.unwrap().is_none());
    }
    // Frames end a batch by their bytes.
    let long: Vec<Event> = (0..20)
        .map(|n| Event::identity(n as u64 % 7, 900_000, n))
        .collect();
    log.append(&long);
    let mut follower = Follower::new(log.log.clone(), 2_501);
    let mut sizes = Vec::new();
    while let Some(step) = follower.read().await.unwrap() {
        sizes.push(seqs(&batch(step)).len());
    }
    assert_eq!(sizes.iter().sum::<usize>(), 20);
    assert!(
        sizes.iter().all(|size| *size <= MAX_BYTES / 900_000 + 1),
        "{sizes:?}"
    );
    log.close();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_follower_at_the_head_reads_on_while_segments_end() {
    let folder = quick_folder();
    let log = RunningLog::open(options(folder.path()));
    let mut follower = Follower::new(log.log.clone(), 1);
    let reading = tokio::spawn(async move {
        let mut read = Vec::new();
        while read.len() < 600 {
            read.extend(seqs(&batch(follower.next().await.unwrap())));
        }
        read
    });
    let log = tokio::task::spawn_blocking(move || {
        for first in (1..600).step_by(20) {
            log.append(&events(first, 20));
        }
        log
    });
    let log = log.await.unwrap();
    assert!(reading.await.unwrap().into_iter().eq(1..=600));
    let segments = fs::read_dir(folder.path()).unwrap().flatten();
    let segments = segments.filter(|file| file.path().extension().is_some_and(|it| it == "seg"));
    assert!(segments.count() > 3);
    log.close();
}

#[tokio::test]
async fn of_a_redacted_event_only_the_entry_is_left() {
    let folder = quick_folder();
    let log = RunningLog::open(options(folder.path()));
    log.append(&events(1, 50));
    let redacted = Did::parse(&did(3)).unwrap();
    let mut early = Follower::new(log.log.clone(), 1);
    log.log.redact(&redacted, 30).unwrap();
    for _ in 0..2 {
        let batch = batch(early.read().await.unwrap().unwrap());
        let events = batch.events();
        assert_eq!(events.len(), 50);
        for event in events {
            let gone = event.entry.seq <= 30 && event.entry.did_hash == redacted.hash64();
            assert_eq!(event.message.is_none(), gone, "{}", event.entry.seq);
            let seq = event.entry.seq as i64;
            assert_eq!(event.entry.origin, Origin::Host { id: 7, seq });
        }
        // And when it is off the disk.
        crate::support::event::eventually("punched out", || log.log.redactions_pending() == 0);
        early = Follower::new(log.log.clone(), 1);
    }
    log.close();
}

/// Files of the folder that are held open although they were removed.
fn held(folder: &Path) -> usize {
    let open = fs::read_dir("/proc/self/fd").unwrap().flatten();
    let names = open.filter_map(|file| fs::read_link(file.path()).ok());
    let name = folder.display().to_string();
    let names = names.map(|target| target.display().to_string());
    names
        .filter(|target| target.starts_with(&name) && target.ends_with("(deleted)"))
        .count()
}

/// A view that stores the numbers of its events, and fails where it is told to.
#[derive(Default)]
struct Tally {
    stored: (Vec<u64>, u64),
    applied: Vec<u64>,
    calls: Vec<String>,
    fails_before_commit: bool,
    gaps: Vec<FellOut>,
}

impl View for Tally {
    type Error = &'static str;

    const NAME: &'static str = "tally";

    async fn apply(&mut self, events: &[views::Event<'_>]) -> Result<(), Self::Error> {
        let seqs = events.iter().map(|event| event.entry.seq);
        self.applied.extend(seqs.clone());
        self.calls
            .push(format!("apply {:?}", seqs.collect::<Vec<_>>()));
        Ok(())
    }

    async fn purge(&mut self, purge: Purge) -> Result<(), Self::Error> {
        self.calls
            .push(format!("purge {} {}", purge.did, purge.up_to));
        Ok(())
    }

    async fn commit(&mut self, next: u64) -> Result<u64, Self::Error> {
        if std::mem::take(&mut self.fails_before_commit) {
            self.applied.clear();
            return Err("killed");
        }
        self.stored.0.append(&mut self.applied);
        self.stored.1 = next;
        self.calls.push(format!("commit {next}"));
        Ok(next)
    }

    async fn fell_out(&mut self, gap: FellOut) -> Result<(), Self::Error> {
        self.gaps.push(gap);
        Ok(())
    }
}

#[tokio::test]
async fn what_a_view_did_not_store_comes_again() {
    let folder = quick_folder();
    let slots = Slots::default();
    let slot = slots.open(Tally::NAME, 1);
    let log = RunningLog::open(options(folder.path()));
    let mut view = Tally::default();
    for round in 0..4 {
        log.append(&events(1 + round * 1_500, 1_500));
        view.fails_before_commit = round % 2 == 0;
        let position = view.stored.1;
        let killed = views::catch_up(&mut view, &log.log, position, &slot).await;
        assert_eq!(
            matches!(killed, Err(FollowError::View("killed"))),
            round % 2 == 0
        );
        assert_eq!(slot.position(), view.stored.1.max(1));
    }
    assert!(view.stored.0.iter().copied().eq(1..=6_000));
    assert_eq!(slots.positions(), [("tally", 6_001)]);
    log.close();
}

#[tokio::test]
async fn retention_waits_for_a_view_and_then_tells_it_that_it_fell_out() {
    let folder = quick_folder();
    let window = Duration::from_secs(3600);
    let limited = LogOptions {
        window,
        ..options(folder.path())
    };
    let slot = limited.slots.open(Tally::NAME, 1);
    let log = RunningLog::open(limited.clone());
    let mut view = Tally::default();
    log.append(&events(1, 100));
    let mut slow = Follower::new(log.log.clone(), 1);
    let (at, now) = (Instant::now(), SystemTime::now());
    log.log.trim(at, now);
    log.log.trim(at + 2 * window, now + 2 * window);
    assert_eq!(log.log.oldest(), Some(1), "the view has seen nothing yet");
    let step = slow.read().await.unwrap().unwrap();
    views::apply_step(&mut view, step, &slot).await.unwrap();
    log.append(&events(101, 100));
    log.log.trim(at + 3 * window, now + 3 * window);
    let oldest = log.log.oldest().unwrap();
    assert!((2..=101).contains(&oldest), "{oldest}");
    // The byte budget does not wait.
    log.log.apply(&Settings {
        group_window: limited.group_window,
        window,
        max_bytes: 0,
        min_free: MinFree::Bytes(0),
        ..Settings::default()
    });
    log.log.trim(at + 3 * window, now + 3 * window);
    let oldest = log.log.oldest().unwrap();
    assert!(oldest > 101, "{oldest}");
    // The writer holds the frames of the segment before; a reader would hold an index, too.
    assert!(held(folder.path()) <= 1, "a slow follower holds no file");
    while let Some(step) = slow.read().await.unwrap() {
        views::apply_step(&mut view, step, &slot).await.unwrap();
    }
    assert_eq!(view.gaps, [FellOut { from: 101, oldest }]);
    assert!(view.stored.0.into_iter().eq((1..=100).chain(oldest..=200)));
    log.close();
}

#[tokio::test]
async fn the_end_of_an_account_comes_between_its_events() {
    let folder = quick_folder();
    let log = RunningLog::open(options(folder.path()));
    let ended = Event {
        kind: Kind::Account,
        filler: "deleted".into(),
        ..Event::identity(1, 0, 2)
    };
    let deactivated = Event {
        filler: "deactivated".into(),
        ..ended.clone()
    };
    let all = [events(1, 1), vec![ended, deactivated], events(4, 1)].concat();
    log.append(&all);
    let slot = Slots::default().open(Tally::NAME, 1);
    let mut view = Tally::default();
    views::catch_up(&mut view, &log.log, 1, &slot)
        .await
        .unwrap();
    let purge = format!("purge {} 1", did(1));
    assert_eq!(
        view.calls,
        ["apply [1, 2]", &purge, "apply [3, 4]", "commit 5"]
    );
    log.close();
}
