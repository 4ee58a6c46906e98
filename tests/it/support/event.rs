//! Small frames for the tests of the log and the firehose, written by hand so that the tests do not
//! lean on the codec they exercise, and a log with its sequencer around it.

use std::path::PathBuf;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::time::{Duration, Instant};

use atproto_relay::atproto::did::Did;
use atproto_relay::atproto::frame::Kind;
use atproto_relay::eventlog::sequencer::{self, Sequencer};
use atproto_relay::eventlog::{Append, EventLog, LogOptions, Origin};

/// Longest wait for something that must happen.
pub const DEADLINE: Duration = Duration::from_secs(20);

/// An event of which the tests know the bytes for every sequence number.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Event {
    pub did: String,
    pub kind: Kind,
    /// A field that is there for its bytes.
    pub filler: String,
    pub upstream_seq: i64,
}

impl Event {
    /// An `#identity` event of account `account` with `length` bytes of filler.
    pub fn identity(account: u64, length: usize, upstream_seq: i64) -> Event {
        let filler = format!("{upstream_seq:08}")
            .chars()
            .cycle()
            .take(length)
            .collect();
        Event {
            did: did(account),
            kind: Kind::Identity,
            filler,
            upstream_seq,
        }
    }

    /// The event-stream frame with `seq` in it, and where `seq` lies.
    pub fn frame(&self, seq: u64) -> (Vec<u8>, std::ops::Range<usize>) {
        let mut out = vec![0xa2];
        text(&mut out, "t");
        text(
            &mut out,
            if self.kind == Kind::Account {
                "#account"
            } else {
                "#identity"
            },
        );
        text(&mut out, "op");
        out.push(0x01);
        out.push(if self.kind == Kind::Account {
            0xa5
        } else {
            0xa4
        });
        text(&mut out, "did");
        text(&mut out, &self.did);
        text(&mut out, "seq");
        let at = out.len();
        unsigned(&mut out, 0x00, seq);
        let span = at..out.len();
        text(&mut out, "time");
        text(&mut out, "2026-01-01T00:00:00.000Z");
        if self.kind == Kind::Account {
            text(&mut out, "active");
            out.push(0xf4);
            text(&mut out, "status");
        } else {
            text(&mut out, "handle");
        }
        text(&mut out, &self.filler);
        (out, span)
    }

    /// The WebSocket frame with `seq` in it.
    pub fn wire(&self, seq: u64) -> Vec<u8> {
        let (frame, _) = self.frame(seq);
        let mut out = vec![0x82];
        match frame.len() {
            length @ 0..=125 => out.push(length as u8),
            length @ 126..=0xffff => {
                out.push(126);
                out.extend_from_slice(&(length as u16).to_be_bytes());
            }
            length => {
                out.push(127);
                out.extend_from_slice(&(length as u64).to_be_bytes());
            }
        }
        out.extend_from_slice(&frame);
        out
    }

    /// To be appended, as if it came from host 7.
    pub fn append<T>(&self, payload: T) -> Append<T> {
        let (frame, seq_span) = self.frame(self.upstream_seq as u64);
        Append {
            frame: frame.into(),
            seq_span,
            origin: Origin::Host {
                id: 7,
                seq: self.upstream_seq,
            },
            did: Did::parse(&self.did).expect("a DID"),
            kind: self.kind,
            given_seq: None,
            payload,
        }
    }
}

/// DID number `account`.
pub fn did(account: u64) -> String {
    let letters = b"abcdefghijklmnopqrstuvwxyz234567";
    let name: String = (0..24)
        .map(|place| char::from(letters[(account >> (place * 5).min(60)) as usize & 31]))
        .collect();
    format!("did:plc:{name}")
}

fn text(out: &mut Vec<u8>, text: &str) {
    unsigned(out, 0x60, text.len() as u64);
    out.extend_from_slice(text.as_bytes());
}

fn unsigned(out: &mut Vec<u8>, major: u8, value: u64) {
    match value {
        0..=23 => out.push(major | value as u8),
        24..=0xff => out.extend_from_slice(&[major | 24, value as u8]),
        0x100..=0xffff => {
            out.push(major | 25);
            out.extend_from_slice(&(value as u16).to_be_bytes());
        }
        0x1_0000..=0xffff_ffff => {
            out.push(major | 26);
            out.extend_from_slice(&(value as u32).to_be_bytes());
        }
        _ => {
            out.push(major | 27);
            out.extend_from_slice(&value.to_be_bytes());
        }
    }
}

/// A log with a running sequencer.
pub struct RunningLog {
    pub log: EventLog,
    pub sender: SyncSender<Vec<Append<i64>>>,
    /// (seq, upstream seq) of durable events.
    pub durable: Receiver<Vec<(u64, i64)>>,
    pub sequencer: Sequencer<i64>,
}

impl RunningLog {
    pub fn open(options: LogOptions) -> RunningLog {
        RunningLog::on(EventLog::open(options).expect("the log opens"))
    }

    pub fn on(log: EventLog) -> RunningLog {
        let (sender, rx) = sync_channel(64);
        let (report, durable) = sync_channel(4096);
        let sequencer = sequencer::spawn(log.clone(), rx, move |events| {
            report.send(events).expect("the test listens");
        })
        .expect("the sequencer starts");
        RunningLog {
            log,
            sender,
            durable,
            sequencer,
        }
    }

    /// Hands events over as one batch.
    pub fn send(&self, events: &[Event]) {
        let batch = events
            .iter()
            .map(|event| event.append(event.upstream_seq))
            .collect();
        self.sender.send(batch).expect("the sequencer runs");
    }

    /// Appends events and waits until they are durable. Returns their sequence numbers.
    pub fn append(&self, events: &[Event]) -> Vec<u64> {
        self.send(events);
        self.await_durable(events.len())
            .into_iter()
            .map(|(seq, _)| seq)
            .collect()
    }

    pub fn await_durable(&self, count: usize) -> Vec<(u64, i64)> {
        let mut reported = Vec::new();
        while reported.len() < count {
            reported.extend(
                self.durable
                    .recv_timeout(DEADLINE)
                    .expect("events become durable"),
            );
        }
        reported
    }

    /// Ends the sequencer and closes the log.
    pub fn close(self) {
        drop(self.sender);
        self.sequencer.join();
    }
}

/// Waits until something holds.
pub fn eventually(what: &str, mut holds: impl FnMut() -> bool) {
    let start = Instant::now();
    while !holds() {
        assert!(start.elapsed() < DEADLINE, "{what} did not come");
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// A folder in memory where there is one, so that thousands of small logs take no time.
pub fn quick_folder() -> tempfile::TempDir {
    let memory = PathBuf::from("/dev/shm");
    if memory.is_dir() {
        tempfile::tempdir_in(memory).expect("a folder in memory")
    } else {
        tempfile::tempdir().expect("a temporary folder")
    }
}
