//! What the benchmarks share: the yardstick, and rows for the table that `benches/run` collects. A row is
//! a line that begins with `| `; everything else a benchmark says is for whoever watches it.

#![allow(dead_code, reason = "every benchmark uses a part of it")]

use std::time::Duration;

use atproto_relay::atproto::did::Did;
use atproto_relay::atproto::frame::{self, Peek};
use atproto_relay::eventlog::{Append, Origin};
use bytes::Bytes;
use rustix::time::{ClockId, clock_gettime};

/// Prints a row of the table. `ratio` is to the yardstick that was measured beside the figure, and may be
/// empty.
pub fn row(what: &str, figure: &str, ratio: &str) {
    println!("| {what} | {figure} | {ratio} |");
}

/// A time as the table shows it.
pub fn time(time: Duration) -> String {
    let nanos = time.as_nanos() as f64;
    match nanos {
        ..1e3 => format!("{nanos:.0} ns"),
        ..1e6 => format!("{:.2} µs", nanos / 1e3),
        ..1e9 => format!("{:.2} ms", nanos / 1e6),
        _ => format!("{:.2} s", nanos / 1e9),
    }
}

/// A time in units of one libsecp256k1 verification.
pub fn verifications(time: Duration, one: Duration) -> String {
    format!(
        "{:.3} verifications",
        time.as_secs_f64() / one.as_secs_f64()
    )
}

/// Processor time of this thread so far. What others do on the machine is not in it.
pub fn processor_time() -> Duration {
    let time = clock_gettime(ClockId::ThreadCPUTime);
    Duration::new(
        u64::try_from(time.tv_sec).unwrap_or_default(),
        u32::try_from(time.tv_nsec).unwrap_or_default(),
    )
}

/// The event of a frame as the log takes it; `None` where it is none.
pub fn append(frame: &Bytes) -> Option<Append<()>> {
    let Ok(Peek::Event(event)) = frame::peek(frame) else {
        return None;
    };
    let did = std::str::from_utf8(&frame[event.did_span]).ok()?;
    Some(Append {
        did: Did::parse(did).ok()?,
        frame: frame.clone(),
        seq_span: event.seq_span,
        origin: Origin::Host {
            id: 1,
            seq: event.seq,
        },
        kind: event.kind,
        given_seq: None,
        payload: (),
    })
}
