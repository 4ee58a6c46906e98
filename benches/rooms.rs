//! The rooms of the hot path, one by one, on frames of the network's sizes. Each figure is the processor
//! time of one event on one core, beside that of one libsecp256k1 verification measured meanwhile; only
//! the log's are time on the wall, because most of it is the disk's.

mod support;

use std::cell::RefCell;
use std::hint::black_box;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::time::{Duration, Instant};

use atproto_relay::atproto::car::Car;
use atproto_relay::atproto::commit::SignedCommit;
use atproto_relay::atproto::frame::{self, Commit, Message, Peek};
use atproto_relay::atproto::key::{PublicKey, VerifyingKey};
use atproto_relay::atproto::mst::{self, InvertOp};
use atproto_relay::atproto::tid::Tid;
use atproto_relay::devnet::keys::{Curve, SigningKey};
use atproto_relay::devnet::load::{LoadOptions, Prepared, Yardstick};
use atproto_relay::devnet::scratch::Scratch;
use atproto_relay::eventlog::sequencer;
use atproto_relay::eventlog::{Append, Durability, EventLog, LogOptions};
use atproto_relay::verify::rules::{self, Strictness};
use atproto_relay::verify::signature::{self, Job, SignedMessage};
use bytes::Bytes;
use criterion::Criterion;
use rand::SeedableRng;
use rand::rngs::StdRng;
use sha2::{Digest, Sha256};

/// Frames that the rooms are given in turn: more than any cache near the core holds.
const FRAMES: usize = 4_000;
/// Jobs at the door of the signatures: a lone event, and the most that a shard hands over.
const BATCHES: [usize; 2] = [1, 64];
/// Events of one append: what a busy relay gathers while a sync runs.
const APPENDED: usize = 64;
/// What the log keeps of them on disk.
const LOG_BYTES: u64 = 2_000_000_000;

fn main() {
    let mut criterion = Criterion::default().configure_from_args().without_plots();
    let frames = frames();
    let commits: Vec<Commit<'_>> = frames.iter().filter_map(|frame| commit(frame)).collect();
    decoding(&mut criterion, &frames);
    blocks(&mut criterion, &commits);
    signatures(&mut criterion);
    inversion(&mut criterion, &commits);
    appending(&mut criterion, &frames);
    criterion.final_summary();
}

fn frames() -> Vec<Bytes> {
    let options = LoadOptions {
        hosts: 1,
        accounts: 200,
        events: FRAMES,
        ..LoadOptions::default()
    };
    let prepared = Prepared::new(options, &|_, _| {});
    prepared.frames().skip(200).cloned().collect()
}

fn commit(frame: &[u8]) -> Option<Commit<'_>> {
    match frame::decode(frame).ok()?.message {
        Message::Commit(commit) => Some(commit),
        _ => None,
    }
}

/// One group: its figures beside a yardstick that runs meanwhile.
struct Group<'c> {
    criterion: &'c mut Criterion,
    name: &'static str,
    yardstick: Yardstick,
    figures: Vec<(String, Duration)>,
}

impl<'c> Group<'c> {
    fn new(criterion: &'c mut Criterion, name: &'static str) -> Group<'c> {
        Group {
            criterion,
            name,
            yardstick: Yardstick::start(),
            figures: Vec::new(),
        }
    }

    /// Measures `work`, which is given each of `items` in turn; the figure is that of one item divided
    /// by `parts`.
    fn measure<T>(&mut self, what: &str, items: &[T], parts: usize, mut work: impl FnMut(&T)) {
        let mut next = items.iter().cycle();
        self.measure_with(what, parts, |times| {
            let start = support::processor_time();
            for item in next.by_ref().take(times as usize) {
                work(item);
            }
            support::processor_time().saturating_sub(start)
        });
    }

    /// Measures a number of rounds of something that takes its own time.
    fn measure_with(&mut self, what: &str, parts: usize, mut rounds: impl FnMut(u64) -> Duration) {
        let samples = RefCell::new(Vec::new());
        let id = format!("{}: {what}", self.name);
        self.criterion.bench_function(&id, |bencher| {
            bencher.iter_custom(|times| {
                let took = rounds(times);
                samples.borrow_mut().push(took.div_f64(times as f64));
                took
            });
        });
        let mut samples = samples.into_inner();
        samples.sort_unstable();
        // The median; there is none where the command line names other benchmarks.
        if let Some(median) = samples.get(samples.len() / 2) {
            self.figures.push((id, *median / parts as u32));
        }
    }

    fn end(self) {
        let one = self.yardstick.stop();
        for (what, figure) in self.figures {
            let ratio = support::verifications(figure, one);
            support::row(&what, &support::time(figure), &ratio);
        }
    }
}

fn decoding(criterion: &mut Criterion, frames: &[Bytes]) {
    let mut group = Group::new(criterion, "frame");
    group.measure("peek", frames, 1, |frame| {
        black_box(frame::peek(frame)).expect("a frame");
    });
    group.measure("decode", frames, 1, |frame| {
        black_box(frame::decode(frame)).expect("a frame");
    });
    let mut out = Vec::new();
    let spans: Vec<_> = frames
        .iter()
        .filter_map(|frame| Some((frame, event(frame)?)))
        .collect();
    group.measure("splice a new seq", &spans, 1, |(frame, event)| {
        out.clear();
        frame::splice_seq(frame, event.seq_span.clone(), 123_456_789, &mut out);
        black_box(&out);
    });
    group.end();
}

fn event(frame: &[u8]) -> Option<frame::PeekedEvent> {
    match frame::peek(frame).ok()? {
        Peek::Event(event) => Some(event),
        _ => None,
    }
}

fn blocks(criterion: &mut Criterion, commits: &[Commit<'_>]) {
    let mut group = Group::new(criterion, "blocks");
    group.measure("CAR", commits, 1, |commit| {
        black_box(Car::parse(commit.blocks)).expect("a CAR");
    });
    group.measure("CAR and hashes", commits, 1, |commit| {
        let car = Car::parse(commit.blocks).expect("a CAR");
        car.verify_hashes().expect("blocks that hash to their CIDs");
    });
    group.measure("signed commit and its digest", commits, 1, |commit| {
        let car = Car::parse(commit.blocks).expect("a CAR");
        let block = car.blocks().get(&commit.commit).expect("the commit");
        let signed = SignedCommit::parse(block).expect("a signed commit");
        black_box(signed.unsigned_digest());
    });
    group.measure("all rules but the signature", commits, 1, |commit| {
        let rev = Tid::parse(commit.rev).expect("a rev");
        black_box(rules::commit(commit, rev, Strictness::Strict)).expect("a good commit");
    });
    group.end();
}

fn signatures(criterion: &mut Criterion) {
    for (curve, name) in [(Curve::K256, "secp256k1"), (Curve::P256, "P-256")] {
        let mut rng = StdRng::seed_from_u64(1);
        let signed: Vec<_> = (0..256_u32)
            .map(|n| {
                let key = SigningKey::generate(curve, &mut rng);
                let message = n.to_le_bytes();
                let public = PublicKey::parse_did_key(&key.did_key()).expect("a key");
                let digest = SignedMessage {
                    message: message.into(),
                    digest: Sha256::digest(message).into(),
                    signature: key.sign(&message),
                };
                (VerifyingKey::new(&public).expect("a point"), digest)
            })
            .collect();
        let jobs: Vec<Job<'_>> = signed
            .iter()
            .map(|(key, signed)| Job { key, signed })
            .collect();
        let mut group = Group::new(criterion, "verify");
        for batch in BATCHES {
            let what = format!("{name}, {batch} at once");
            let batches: Vec<_> = jobs.chunks(batch).collect();
            group.measure(&what, &batches, batch, |jobs| {
                assert!(signature::verify(jobs).into_iter().all(|good| good));
            });
        }
        group.end();
    }
}

fn inversion(criterion: &mut Criterion, commits: &[Commit<'_>]) {
    let parsed: Vec<_> = commits.iter().map(parsed).collect();
    let mut group = Group::new(criterion, "inversion");
    group.measure(
        "of a commit's ops",
        &parsed,
        1,
        |(ops, car, data, before)| {
            let root = mst::invert(ops, *data, |cid| car.blocks().get(cid));
            assert_eq!(root.as_ref().ok(), before.as_ref());
        },
    );
    group.end();
}

type Parsed<'a> = (
    Vec<InvertOp<'a>>,
    Car<'a>,
    atproto_relay::atproto::cid::Cid,
    Option<atproto_relay::atproto::cid::Cid>,
);

fn parsed<'a>(commit: &Commit<'a>) -> Parsed<'a> {
    let car = Car::parse(commit.blocks).expect("a CAR");
    let block = car.blocks().get(&commit.commit).expect("the commit");
    let data = SignedCommit::parse(block).expect("a signed commit").data;
    let ops = commit
        .ops
        .iter()
        .map(|op| rules::invertible(op).expect("sync 1.1"));
    (ops.collect(), car, data, commit.prev_data)
}

fn appending(criterion: &mut Criterion, frames: &[Bytes]) {
    let mut group = Group::new(criterion, "log append");
    for (durability, name) in [(Durability::Sync, "sync"), (Durability::None, "none")] {
        let folder = Scratch::new("atproto-bench").expect("a temporary folder");
        let log = Appender::new(folder.path(), durability);
        let mut next = frames.iter().cycle();
        let what = format!("{name}, {APPENDED} events at once, on the wall");
        group.measure_with(&what, APPENDED, |times| {
            let batches: Vec<Vec<_>> = (0..times)
                .map(|_| {
                    next.by_ref()
                        .take(APPENDED)
                        .filter_map(support::append)
                        .collect()
                })
                .collect();
            log.append(batches)
        });
    }
    group.end();
}

/// A log that is given one batch after the other, each when the one before is durable.
struct Appender {
    batches: SyncSender<Vec<Append<()>>>,
    durable: Receiver<usize>,
}

impl Appender {
    fn new(folder: &std::path::Path, durability: Durability) -> Appender {
        let options = LogOptions {
            durability,
            group_window: Duration::ZERO,
            max_bytes: LOG_BYTES,
            ..LogOptions::new(folder)
        };
        let log = EventLog::open(options).expect("a new log");
        let (batches, queue) = sync_channel(1);
        let (report, durable) = sync_channel(1_024);
        let on_durable = move |events: Vec<(u64, ())>| {
            // Nobody listens once the figure is there.
            let _ = report.send(events.len());
        };
        sequencer::spawn(log, queue, on_durable).expect("the sequencer starts");
        Appender { batches, durable }
    }

    fn append(&self, batches: Vec<Vec<Append<()>>>) -> Duration {
        let start = Instant::now();
        for batch in batches {
            let mut left = batch.len();
            self.batches.send(batch).expect("the sequencer runs");
            while left > 0 {
                left -= self.durable.recv().expect("the sequencer runs");
            }
        }
        start.elapsed()
    }
}
