//! The fan-out: a log and its firehose in a process of their own, and consumers on loopback that read and discard.
//! Prints megabytes and processor seconds for each gigabyte beside those of a raw TCP copy (one thread that writes the
//! same bytes to as many sockets), latency beside consumers that misbehave, and memory with a thousand.
//! `cargo bench --bench fanout -- replay live trouble memory` measures the parts named, or all.

#[path = "fanout/clients.rs"]
mod clients;
#[path = "../tests/it/support/event.rs"]
#[allow(dead_code, reason = "the tests use the rest of it")]
mod event;
#[path = "fanout/servers.rs"]
mod servers;
mod support;

use std::time::{Duration, Instant};

use clients::{Drain, Probe, Stop, Trouble};
use servers::{Child, Role};
use support::row;

const CONSUMERS: [usize; 4] = [1, 10, 100, 500];
/// How long one figure is measured, how often, and how long traffic flows before.
const MEASURED: Duration = Duration::from_secs(2);
const ROUNDS: usize = 3;
const SETTLING: Duration = Duration::from_millis(700);
/// Bytes of the log that is replayed.
const LOG_BYTES: u64 = 1 << 30;
/// Events a second of the live stream, and for how long its latency is measured.
const LIVE_RATE: u64 = 2_000;
const LIVE: Duration = Duration::from_secs(6);
/// Consumers that behave while others do not.
const GOOD_CONSUMERS: usize = 20;
/// Clients that misbehave, at a time.
const BAD_CLIENTS: usize = 1_000;
/// The run that is about memory: a stream that this many consumers can be given on a small machine.
const MEMORY_CONSUMERS: usize = 1_000;
const MEMORY_RATE: u64 = 200;
const MEMORY: Duration = Duration::from_secs(15);

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    if let Some(role) = Role::from_arguments(&arguments) {
        return role.serve();
    }
    let asked: Vec<&str> = arguments
        .iter()
        .map(String::as_str)
        .filter(|argument| !argument.starts_with('-'))
        .collect();
    let wanted = |part| asked.is_empty() || asked.contains(&part);
    if wanted("replay") {
        replay();
    }
    if wanted("live") {
        live();
    }
    if wanted("trouble") {
        trouble();
    }
    if wanted("memory") {
        memory();
    }
}

/// What a server did for its clients.
#[derive(Debug, Clone, Copy, Default)]
struct Cost {
    bytes: u64,
    processor: Duration,
    time: Duration,
}

impl Cost {
    fn of(child: &Child, drain: &Drain, time: Duration) -> Cost {
        let (bytes, processor, began) = (drain.bytes(), child.processor_time(), Instant::now());
        std::thread::sleep(time);
        Cost {
            bytes: drain.bytes() - bytes,
            processor: child.processor_time() - processor,
            time: began.elapsed(),
        }
    }

    fn add(&mut self, other: Cost) {
        self.bytes += other.bytes;
        self.processor += other.processor;
        self.time += other.time;
    }

    fn megabytes_per_second(&self) -> f64 {
        self.bytes as f64 / 1e6 / self.time.as_secs_f64()
    }

    fn seconds_per_gigabyte(&self) -> f64 {
        self.processor.as_secs_f64() / (self.bytes as f64 / 1e9)
    }

    fn figure(&self) -> String {
        format!(
            "{:.0} MB/s, {:.3} CPU-s/GB",
            self.megabytes_per_second(),
            self.seconds_per_gigabyte()
        )
    }

    fn ratio(&self, raw: &Cost) -> String {
        format!(
            "{:.0} % of a raw TCP copy ({})",
            100.0 * self.megabytes_per_second() / raw.megabytes_per_second(),
            raw.figure()
        )
    }
}

/// A log as fast as the sockets take it, by consumers that are in the same place, and by such that are far apart.
fn replay() {
    let folder = tempfile::tempdir().expect("a folder");
    let log = servers::fill(folder.path(), LOG_BYTES);
    for consumers in CONSUMERS {
        let [mut together, mut apart, mut raw] = [Cost::default(); 3];
        for _ in 0..ROUNDS {
            let copy = Child::start(&Role::Copy { clients: consumers });
            raw.add(cost(&copy, Drain::raw(copy.port, consumers)));
            for (spread, sum) in [(false, &mut together), (true, &mut apart)] {
                let relay = Child::start(&Role::Relay {
                    folder: folder.path().to_owned(),
                    rate: 0,
                });
                let drain = Drain::replaying(relay.port, consumers, &log, spread);
                sum.add(cost(&relay, drain));
            }
        }
        let what = format!("replay to {consumers} consumers in one place");
        row(&what, &together.figure(), &together.ratio(&raw));
        let what = format!("replay to {consumers} consumers far apart");
        row(&what, &apart.figure(), &apart.ratio(&raw));
    }
}

fn cost(child: &Child, drain: Drain) -> Cost {
    std::thread::sleep(SETTLING);
    let cost = Cost::of(child, &drain, MEASURED);
    drain.stop();
    cost
}

/// A live stream, sequencer and syncs included.
fn live() {
    for consumers in CONSUMERS {
        let folder = tempfile::tempdir().expect("a folder");
        let relay = Child::start(&Role::Relay {
            folder: folder.path().to_owned(),
            rate: LIVE_RATE,
        });
        let drain = Drain::live(relay.port, consumers - 1);
        let probe = Probe::start(relay.port);
        std::thread::sleep(SETTLING);
        probe.forget();
        let probed = probe.bytes();
        let mut cost = Cost::of(&relay, &drain, LIVE);
        cost.bytes += probe.bytes() - probed;
        let latency = probe.latencies();
        row(
            &format!("live, {LIVE_RATE} events/s to {consumers} consumers"),
            &format!("{}, {latency}", cost.figure()),
            "",
        );
        drain.stop();
        probe.stop();
    }
}

/// What consumers that behave see of clients that do not.
fn trouble() {
    let folder = tempfile::tempdir().expect("a folder");
    let relay = Child::start(&Role::Relay {
        folder: folder.path().to_owned(),
        rate: LIVE_RATE,
    });
    let drain = Drain::live(relay.port, GOOD_CONSUMERS);
    let probe = Probe::start(relay.port);
    let measure = || {
        std::thread::sleep(SETTLING);
        probe.forget();
        std::thread::sleep(LIVE);
        probe.latencies()
    };
    for kind in Trouble::ALL {
        let quiet = measure();
        let bad = kind.make(relay.port, BAD_CLIENTS);
        let disturbed = measure();
        bad.stop();
        row(
            &format!("{BAD_CLIENTS} clients that {kind}"),
            &disturbed.to_string(),
            &format!(
                "p99 {:.2} times that of quiet ({quiet})",
                disturbed.p99.as_secs_f64() / quiet.p99.as_secs_f64()
            ),
        );
    }
    drain.stop();
    probe.stop();
}

/// What a thousand consumers cost in memory, of which a quarter never reads and a quarter reads 1 KB/s.
fn memory() {
    let folder = tempfile::tempdir().expect("a folder");
    servers::fill(folder.path(), LOG_BYTES / 4);
    let relay = Child::start(&Role::Relay {
        folder: folder.path().to_owned(),
        rate: MEMORY_RATE,
    });
    std::thread::sleep(SETTLING);
    let before = relay.resident_bytes();
    let quarter = MEMORY_CONSUMERS / 4;
    let drain = Drain::live(relay.port, MEMORY_CONSUMERS - 2 * quarter);
    let stuck = Trouble::NeverRead.make(relay.port, quarter);
    let slow = Trouble::ReadSlowly.make(relay.port, quarter);
    std::thread::sleep(MEMORY);
    let after = relay.resident_bytes();
    row(
        &format!("{MEMORY_CONSUMERS} consumers, half of them slow"),
        &format!("{:.1} MB resident", after as f64 / 1e6),
        &format!(
            "{:.1} MB without consumers, {:.1} KB each",
            before as f64 / 1e6,
            (after.saturating_sub(before)) as f64 / 1e3 / MEMORY_CONSUMERS as f64
        ),
    );
    drain.stop();
    stuck.stop();
    slow.stop();
}
