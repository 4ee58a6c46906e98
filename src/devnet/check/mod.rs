//! Knows what a relay must make of every event it was sent, and checks a firehose against it:
//! nothing missing, doubled, out of order or forged, sequence numbers dense. Reads frames only as
//! far as it must to tell them apart; whether signatures hold is the sender's knowledge.

mod checker;
mod ledger;
mod report;
#[cfg(test)]
mod tests;
mod watcher;

pub use checker::Checker;
pub use ledger::{EventId, GroupId, Ledger, Origin, Verdict};
pub use report::Report;
pub(super) use watcher::subscribe;
pub use watcher::{Latencies, Outcome, WaitError, Watcher, WatcherOptions};

use crate::atproto::frame::{self, Peek, PeekedEvent};

/// Tells frames apart by everything but their sequence number: equal bytes, equal fingerprint.
/// Any single changed byte changes it; it is no defence against someone who searches collisions.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Fingerprint(u64);

/// The bytes are not an event: malformed, or a message without a sequence number.
#[derive(Debug, thiserror::Error)]
#[error("not an event")]
pub struct NotAnEvent;

impl Fingerprint {
    /// The fingerprint of an event, with what [`frame::peek`] found in it.
    pub fn of(frame: &[u8]) -> Result<(Fingerprint, PeekedEvent), NotAnEvent> {
        let Ok(Peek::Event(event)) = frame::peek(frame) else {
            return Err(NotAnEvent);
        };
        let (before, after) = (&frame[..event.seq_span.start], &frame[event.seq_span.end..]);
        Ok((Fingerprint(mix(mix(0, before), after)), event))
    }
}

/// The DID of an event.
pub(super) fn did_of<'a>(frame: &'a [u8], event: &PeekedEvent) -> &'a str {
    std::str::from_utf8(&frame[event.did_span.clone()]).unwrap_or_default()
}

/// Multiplier of the FNV family's 64-bit primes' size, odd, so that each step is a bijection.
const MULTIPLIER: u64 = 0x9e37_79b9_7f4a_7c15;

fn mix(seed: u64, bytes: &[u8]) -> u64 {
    let step = |state: u64, word: u64| (state ^ word).wrapping_mul(MULTIPLIER).rotate_left(29);
    let (words, rest) = bytes.as_chunks::<8>();
    let state = words
        .iter()
        .fold(step(seed, bytes.len() as u64), |state, word| {
            step(state, u64::from_le_bytes(*word))
        });
    let mut last = [0; 8];
    last[..rest.len()].copy_from_slice(rest);
    step(state, u64::from_le_bytes(last))
}
