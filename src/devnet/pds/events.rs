//! The event stream of a PDS: numbers frames, keeps a backfill window of them in memory, and wakes
//! subscribers when there is more. Any bytes can be put in; the stream does not look into them.

use std::collections::VecDeque;
use std::sync::{Mutex, MutexGuard};
use std::time::Duration;

use bytes::Bytes;
use tokio::sync::watch;

use super::frames::Stamp;
use crate::atproto::did::Did;
use crate::devnet::timestamp::Timestamp;

/// A frame in the stream.
#[derive(Clone, Debug)]
pub struct Event {
    /// Place in the stream, from 0; goes on growing when sequence numbers start again.
    pub position: u64,
    pub seq: u64,
    pub time: Timestamp,
    /// Whose event it is; `None` for raw frames.
    pub did: Option<Did>,
    pub frame: Bytes,
}

/// Where a subscription starts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Start {
    /// At this position.
    At(u64),
    /// At this position, after an info frame: earlier events are gone.
    Outdated(u64),
    /// Nowhere: the cursor is above the last sequence number.
    Future,
}

/// The state of the stream that subscribers watch; each change wakes them up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct StreamState {
    /// Position the next event will get.
    pub end: u64,
    /// Connections of an older generation are cut.
    pub generation: u64,
    /// Nothing is sent while set; connections stay open.
    pub stalled: bool,
}

#[derive(Debug)]
pub(super) struct EventStream {
    kept: Mutex<Kept>,
    state: watch::Sender<StreamState>,
    window: Duration,
    window_bytes: usize,
}

#[derive(Debug)]
struct Kept {
    events: VecDeque<Event>,
    bytes: usize,
    next_seq: u64,
    next_position: u64,
    /// Highest sequence number that fell out of the window for its bytes.
    evicted: u64,
}

impl EventStream {
    pub(super) fn new(window: Duration, window_bytes: usize) -> Self {
        let kept = Kept {
            events: VecDeque::new(),
            bytes: 0,
            next_seq: 1,
            next_position: 0,
            evicted: 0,
        };
        let state = watch::Sender::new(StreamState {
            end: 0,
            generation: 0,
            stalled: false,
        });
        EventStream {
            kept: Mutex::new(kept),
            state,
            window,
            window_bytes,
        }
    }

    fn kept(&self) -> MutexGuard<'_, Kept> {
        self.kept.lock().expect("no holder panics")
    }

    /// Puts the frame made by `make` in; returns its sequence number.
    pub(super) fn push(&self, did: Option<&Did>, make: impl FnOnce(Stamp) -> Bytes) -> u64 {
        let mut kept = self.kept();
        let stamp = Stamp {
            seq: kept.next_seq,
            time: Timestamp::now(),
        };
        let frame = make(stamp);
        kept.next_seq += 1;
        kept.append(stamp, did, frame);
        kept.evict(self.window_bytes);
        let end = kept.next_position;
        drop(kept);
        self.state
            .send_modify(|state| state.end = state.end.max(end));
        stamp.seq
    }

    /// Forgets every event of `did`.
    pub(super) fn forget(&self, did: &Did) {
        let mut kept = self.kept();
        kept.events.retain(|event| event.did.as_ref() != Some(did));
        kept.bytes = kept.events.iter().map(|event| event.frame.len()).sum();
    }

    /// Drops all events and numbers the next one `next_seq`, as a PDS restored from nothing does.
    pub(super) fn restart(&self, next_seq: u64) {
        let mut kept = self.kept();
        kept.events.clear();
        kept.bytes = 0;
        kept.evicted = 0;
        kept.next_seq = next_seq;
    }

    /// Sequence number of the last event, 0 before the first.
    pub(super) fn head(&self) -> u64 {
        self.kept().next_seq.saturating_sub(1)
    }

    /// All kept events from `position` on, `limit` at most.
    pub(super) fn from(&self, position: u64, limit: usize) -> Vec<Event> {
        let kept = self.kept();
        let first = kept
            .events
            .partition_point(|event| event.position < position);
        kept.events
            .iter()
            .skip(first)
            .take(limit)
            .cloned()
            .collect()
    }

    /// Where a subscription with `cursor` starts; without one, after the last event.
    pub(super) fn start(&self, cursor: Option<i64>) -> Start {
        let kept = self.kept();
        let Some(cursor) = cursor else {
            return Start::At(kept.next_position);
        };
        let cursor = u64::try_from(cursor).unwrap_or(0);
        if cursor >= kept.next_seq {
            return Start::Future;
        }
        let window = i64::try_from(self.window.as_millis()).unwrap_or(i64::MAX);
        let oldest = Timestamp::now().millis().saturating_sub(window);
        let next = kept.events.iter().find(|event| event.seq > cursor);
        let outdated =
            cursor < kept.evicted || next.is_some_and(|event| event.time.millis() < oldest);
        let position =
            |event: Option<&Event>| event.map_or(kept.next_position, |event| event.position);
        if outdated {
            let first = kept
                .events
                .iter()
                .find(|event| event.seq > cursor && event.time.millis() >= oldest);
            return Start::Outdated(position(first));
        }
        Start::At(position(next))
    }

    pub(super) fn subscribe(&self) -> watch::Receiver<StreamState> {
        self.state.subscribe()
    }

    /// Cuts all connections that are open now.
    pub(super) fn disconnect(&self) {
        self.state.send_modify(|state| state.generation += 1);
    }

    pub(super) fn stall(&self, stalled: bool) {
        self.state.send_modify(|state| state.stalled = stalled);
    }
}

impl Kept {
    fn append(&mut self, stamp: Stamp, did: Option<&Did>, frame: Bytes) {
        self.bytes += frame.len();
        let position = self.next_position;
        self.next_position += 1;
        self.events.push_back(Event {
            position,
            seq: stamp.seq,
            time: stamp.time,
            did: did.cloned(),
            frame,
        });
    }

    fn evict(&mut self, limit: usize) {
        while self.bytes > limit && self.events.len() > 1 {
            if let Some(event) = self.events.pop_front() {
                self.bytes -= event.frame.len();
                self.evicted = self.evicted.max(event.seq);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stream(events: u64, window: Duration, bytes: usize) -> EventStream {
        let stream = EventStream::new(window, bytes);
        for _ in 0..events {
            stream.push(None, |stamp| Bytes::from(stamp.seq.to_string()));
        }
        stream
    }

    #[test]
    fn cursors_start_where_the_protocol_says() {
        let hour = Duration::from_secs(3_600);
        let all = stream(5, hour, 1_000);
        for (cursor, start) in [
            (None, Start::At(5)),
            (Some(0), Start::At(0)),
            (Some(-7), Start::At(0)),
            (Some(3), Start::At(3)),
            (Some(5), Start::At(5)),
            (Some(6), Start::Future),
        ] {
            assert_eq!(all.start(cursor), start, "{cursor:?}");
        }
        let short = stream(5, hour, 2);
        assert_eq!(short.start(Some(1)), Start::Outdated(3));
        assert_eq!(short.start(Some(3)), Start::At(3));
        assert_eq!(stream(0, hour, 1).start(Some(0)), Start::At(0));
        assert_eq!(stream(0, hour, 1).start(Some(1)), Start::Future);
    }

    #[test]
    fn a_restart_numbers_from_new_and_keeps_positions_growing() {
        let stream = stream(3, Duration::from_secs(60), 1_000);
        stream.restart(1);
        assert_eq!(stream.start(Some(3)), Start::Future);
        assert_eq!(stream.push(None, |_| Bytes::from_static(b"x")), 1);
        assert_eq!(
            stream
                .from(0, 9)
                .iter()
                .map(|e| (e.position, e.seq))
                .collect::<Vec<_>>(),
            [(3, 1)]
        );
    }
}
