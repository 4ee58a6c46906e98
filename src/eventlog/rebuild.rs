//! Index entries made again from the frames of a segment. Nothing vouches for such a frame but its own structure and the
//! hashes of its blocks, so both must hold. Where the event came from is lost.

use std::fs::File;
use std::io;
use std::ops::RangeInclusive;
use std::os::unix::fs::FileExt;

use super::disk::read_up_to;
use super::entry::{Entry, Origin, State, now_us};
use super::wire;
use crate::atproto::car::Car;
use crate::atproto::did::Did;
use crate::atproto::frame::{self, Kind, MAX_STORED_FRAME_BYTES, Message, Peek};

/// Bytes looked through at a time for what is not zero.
const BYTES_PER_LOOK: usize = 64 * 1024;

/// The frames of a segment as they are on the disk.
pub(super) struct RawFrames<'a> {
    /// `None` where they are lost.
    pub file: Option<&'a File>,
    pub len: u64,
}

impl RawFrames<'_> {
    /// How many zeros there are from `at` on; `None` where they reach to the end of the file.
    pub fn zeros(&self, at: u64) -> io::Result<Option<u64>> {
        let Some(frames) = self.file else {
            return Ok(None);
        };
        let mut block = vec![0; BYTES_PER_LOOK];
        let mut from = at;
        loop {
            let read = read_up_to(frames, &mut block, from)?;
            if let Some(end) = block[..read].iter().position(|byte| *byte != 0) {
                return Ok(Some(from - at + end as u64));
            }
            if read == 0 {
                return Ok(None);
            }
            from += read as u64;
        }
    }

    /// The entry of the frame at `at`, whose number is one of `seqs`, made from the frame itself.
    /// Nothing vouches for its bytes but their own structure and hashes, so both must hold.
    pub fn rebuild(&self, at: u64, seqs: RangeInclusive<u64>) -> io::Result<Option<Entry>> {
        let Some(frames) = self.file else {
            return Ok(None);
        };
        let mut header = [0; wire::MAX_HEADER_BYTES];
        let there = self.len.saturating_sub(at).min(header.len() as u64) as usize;
        frames.read_exact_at(&mut header[..there], at)?;
        let Some((header_len, length)) = wire::read_header(&header[..there]) else {
            return Ok(None);
        };
        let end = at + header_len as u64 + length;
        if length > MAX_STORED_FRAME_BYTES as u64 || end > self.len {
            return Ok(None);
        }
        let mut bytes = vec![0; (end - at) as usize];
        frames.read_exact_at(&mut bytes, at)?;
        let frame = &bytes[header_len..];
        let facts = Facts::of(frame).filter(|facts| seqs.contains(&facts.seq) && is_sound(frame));
        let Some(facts) = facts else {
            return Ok(None);
        };
        Ok(Some(Entry {
            seq: facts.seq,
            origin: Origin::Unknown,
            did_hash: facts.did.hash64(),
            kind: facts.kind,
            time_us: now_us(),
            offset: at,
            len: bytes.len() as u32,
            frame_crc: crc32fast::hash(&bytes),
            state: State::Served,
        }))
    }
}

/// What a frame says of itself.
pub(super) struct Facts {
    pub seq: u64,
    pub did: Did,
    pub kind: Kind,
}

impl Facts {
    /// Reads the frame of an event; `None` where it is none.
    pub fn of(frame: &[u8]) -> Option<Facts> {
        let Peek::Event(event) = frame::peek_stored(frame).ok()? else {
            return None;
        };
        let did = std::str::from_utf8(frame.get(event.did_span)?).ok()?;
        Some(Facts {
            seq: u64::try_from(event.seq).ok()?,
            did: Did::normalized(did).ok()?,
            kind: event.kind,
        })
    }
}

/// True where the frame vouches for its own bytes: whole, and its blocks hash to their CIDs.
fn is_sound(frame: &[u8]) -> bool {
    let Ok(frame) = frame::decode_stored(frame) else {
        return false;
    };
    let blocks = match frame.message {
        Message::Commit(commit) => commit.blocks,
        Message::Sync(sync) => sync.blocks,
        Message::Identity(_) | Message::Account(_) => return true,
        Message::Info(_) | Message::Error(_) | Message::Unknown => return false,
    };
    Car::parse(blocks).is_ok_and(|car| car.verify_hashes().is_ok())
}
