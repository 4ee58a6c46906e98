//! Events that are written and synced together, all in one segment. Promises that a frame is not copied
//! on its way to the file: the bytes behind `seq` stay where the socket's reader put them, and only the
//! few before it are gathered anew.

use std::io::IoSlice;
use std::ops::Range;

use bytes::Bytes;

use super::account_index::short_hash;
use super::entry::{ENTRY_BYTES, Entry, Origin, SEQ_LIMIT, State, now_us};
use super::wire;
use crate::atproto::did::Did;
use crate::atproto::frame::{self, Kind};

/// An event to append, and what its owner wants back once it is durable.
#[derive(Debug)]
pub struct Append<T> {
    /// The event-stream frame as it came.
    pub frame: Bytes,
    /// Where the value of `seq` lies in it.
    pub seq_span: Range<usize>,
    pub origin: Origin,
    pub did: Did,
    pub kind: Kind,
    /// The number that an upstream relay gave the event: above the log's last one, numbers in between stay without an
    /// event. `None` takes the next number. An event whose number is not above the last one is left out.
    pub given_seq: Option<u64>,
    pub payload: T,
}

/// A group of events, numbered and ready to be written.
pub(super) struct Group<T> {
    /// WebSocket headers and frames up to and with `seq`, one after the other.
    heads: Vec<u8>,
    /// Where each frame's head lies in `heads`, and the frame behind it.
    frames: Vec<(Range<usize>, Bytes)>,
    bytes: u64,
    entries: Vec<u8>,
    accounts: Vec<u32>,
    payloads: Vec<(u64, T)>,
    next_seq: u64,
}

impl<T> Group<T> {
    /// An empty group whose first event gets `next_seq`.
    pub fn new(next_seq: u64) -> Group<T> {
        Group {
            heads: Vec::new(),
            frames: Vec::new(),
            bytes: 0,
            entries: Vec::new(),
            accounts: Vec::new(),
            payloads: Vec::new(),
            next_seq,
        }
    }

    /// Bytes of its WebSocket frames.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// How many events it has.
    pub fn len(&self) -> usize {
        self.payloads.len()
    }

    pub fn is_empty(&self) -> bool {
        self.payloads.is_empty()
    }

    /// The sequence number behind its last event.
    pub fn next_seq(&self) -> u64 {
        self.next_seq
    }

    /// Adds an event: its WebSocket frame, with `seq` in it, and its entry. `seq` is the next number or a higher one.
    /// `start` is where the group begins in its segment, `frame_len` the length of the frame with that number.
    pub fn push(&mut self, event: Append<T>, seq: u64, frame_len: usize, start: u64) {
        debug_assert!(seq >= self.next_seq);
        debug_assert!(seq < SEQ_LIMIT, "consumers count no further");
        self.leave_out(seq, start);
        let at = self.heads.len();
        wire::put_header(&mut self.heads, frame_len);
        let header = self.heads.len() - at;
        let rest = event.frame.slice(event.seq_span.end..);
        frame::splice_head(&event.frame, event.seq_span, seq, &mut self.heads);
        let head = at..self.heads.len();
        let len = head.len() + rest.len();
        debug_assert_eq!(len, header + frame_len);
        let mut crc = crc32fast::Hasher::new();
        crc.update(&self.heads[head.clone()]);
        crc.update(&rest);
        let entry = Entry {
            seq,
            origin: event.origin,
            did_hash: event.did.hash64(),
            kind: event.kind,
            time_us: now_us(),
            offset: start + self.bytes,
            len: len as u32,
            frame_crc: crc.finalize(),
            state: State::Served,
        };
        self.entries.extend_from_slice(&entry.encode());
        self.accounts.push(short_hash(entry.did_hash));
        self.frames.push((head, rest));
        self.bytes += len as u64;
        self.payloads.push((seq, event.payload));
        self.next_seq += 1;
        debug_assert_eq!(
            self.entries.len(),
            self.accounts.len() * ENTRY_BYTES as usize
        );
    }

    /// Adds entries without an event for the numbers before `seq`.
    fn leave_out(&mut self, seq: u64, start: u64) {
        for absent in self.next_seq..seq {
            let entry = Entry::absent(absent, start + self.bytes);
            self.entries.extend_from_slice(&entry.encode());
            self.accounts.push(short_hash(entry.did_hash));
        }
        self.next_seq = seq;
    }

    /// The frames as they lie in the segment, in pieces.
    pub fn frames(&self) -> Vec<IoSlice<'_>> {
        let mut pieces = Vec::with_capacity(self.frames.len() * 2);
        for (head, rest) in &self.frames {
            pieces.push(IoSlice::new(&self.heads[head.clone()]));
            pieces.push(IoSlice::new(rest));
        }
        pieces
    }

    /// Their index entries.
    pub fn entries(&self) -> &[u8] {
        &self.entries
    }

    /// Their accounts, as an account index has them.
    pub fn accounts(&self) -> &[u32] {
        &self.accounts
    }

    /// What its events' owners want back.
    pub fn payloads(&self) -> &[(u64, T)] {
        &self.payloads
    }

    /// Empties the group and gives what its events' owners want back.
    pub fn take(&mut self) -> Vec<(u64, T)> {
        self.heads.clear();
        self.frames.clear();
        self.entries.clear();
        self.accounts.clear();
        self.bytes = 0;
        std::mem::take(&mut self.payloads)
    }
}
