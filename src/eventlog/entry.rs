//! The index beside a segment: a header and entries of 64 bytes, one per event.
//! Promises that no damaged entry reads as a good one; what the frame holds is not its business.

use super::wire;
use crate::atproto::frame::{Kind, MAX_FRAME_BYTES, MAX_STORED_FRAME_BYTES};
use crate::clock;

/// Bytes of an index entry. A power of two, so that no entry crosses a disk sector.
pub(super) const ENTRY_BYTES: u64 = 64;
/// Bytes of the header in front of the entries.
pub(super) const HEADER_BYTES: u64 = 64;
/// Sequence numbers stay below it, so that every consumer counts them exactly (JavaScript does up to
/// here). A file named for a higher one is none of ours.
pub(super) const SEQ_LIMIT: u64 = 1 << 53;
/// Longest segment: far more than anyone configures, and still a length that files can have.
pub(super) const MAX_SEGMENT_BYTES: u64 = 1 << 40;
/// Longest WebSocket frame that the log may hold; an earlier version let a host's grow by eight bytes.
const LONGEST_FRAME: u32 = (MAX_STORED_FRAME_BYTES + wire::MAX_HEADER_BYTES) as u32;
/// Longest WebSocket frame that consumers are sent.
const LONGEST_SENT_FRAME: u32 = (MAX_FRAME_BYTES + wire::MAX_HEADER_BYTES) as u32;

const MAGIC: [u8; 8] = *b"ATRELOG\x01";
const KIND_AT: usize = 52;
const STATE_AT: usize = 53;
const ORIGIN_AT: usize = 54;
const CRC_AT: usize = 60;

/// Where an event is from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Origin {
    /// A host (`store::HostId`), under the number that it gave the event.
    Host { id: u32, seq: i64 },
    /// This relay. The code says what for: only who appends such events knows the codes.
    Relay { code: u8 },
    /// Lost: the index entry was rebuilt from its frame.
    Unknown,
}

impl Origin {
    /// The host it came from.
    pub fn host(self) -> Option<u32> {
        match self {
            Origin::Host { id, .. } => Some(id),
            Origin::Relay { .. } | Origin::Unknown => None,
        }
    }

    /// The host's own sequence number.
    pub fn upstream_seq(self) -> Option<i64> {
        match self {
            Origin::Host { seq, .. } => Some(seq),
            Origin::Relay { .. } | Origin::Unknown => None,
        }
    }

    /// As the index has it: its kind, the host, and a number. Releases before the first byte tell by the other two, and
    /// take the host 0 for none and the number of an own event for its code and one.
    fn encode(self) -> (u8, u32, i64) {
        match self {
            Origin::Host { id, seq } => (1, id, seq),
            Origin::Relay { code } => (2, 0, i64::from(code) + 1),
            Origin::Unknown => (3, 0, 0),
        }
    }

    fn decode(origin: u8, id: u32, number: i64, kind: Kind) -> Option<Origin> {
        let code = number.checked_sub(1).and_then(|it| u8::try_from(it).ok());
        match (origin, code) {
            (1, _) => Some(Origin::Host { id, seq: number }),
            (2, Some(code)) => Some(Origin::Relay { code }),
            (3, _) => Some(Origin::Unknown),
            // An entry of a release before this byte. Its own events all were of accounts.
            (0, _) if id != 0 => Some(Origin::Host { id, seq: number }),
            (0, Some(code)) if kind == Kind::Account => Some(Origin::Relay { code }),
            (0, _) => Some(Origin::Unknown),
            _ => None,
        }
    }
}

/// What the log knows of an event besides its frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Entry {
    /// Our sequence number.
    pub seq: u64,
    /// Where it is from.
    pub origin: Origin,
    /// `Did::hash64` of the account.
    pub did_hash: u64,
    /// The message type.
    pub kind: Kind,
    /// When it was appended, in microseconds since 1970.
    pub time_us: u64,
    /// Where its WebSocket frame begins in the segment.
    pub(super) offset: u64,
    /// Length of the WebSocket frame, header included.
    pub(super) len: u32,
    /// CRC-32 of the WebSocket frame.
    pub(super) frame_crc: u32,
    pub(super) state: State,
}

/// Whether an entry's frame is served. One byte outside of the entry's checksum, so that a redaction
/// rewrites nothing else; the values differ in so many bits that damage is seen.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum State {
    Served = 0x00,
    /// Taken down or deleted: skipped, and punched out of the segment.
    Redacted = 0xa5,
    /// The bytes were lost on disk: skipped, the sequence number stays taken.
    Damaged = 0x5a,
    /// No event has this number: the relay that gave the numbers left it out. Has no frame.
    Absent = 0x33,
}

impl State {
    const ALL: [State; 4] = [
        State::Served,
        State::Redacted,
        State::Damaged,
        State::Absent,
    ];

    fn from_u8(byte: u8) -> Option<State> {
        State::ALL.into_iter().find(|state| *state as u8 == byte)
    }
}

impl Entry {
    /// The entry of a number that no event has, where the frames end at `offset`.
    pub(super) fn absent(seq: u64, offset: u64) -> Entry {
        Entry {
            seq,
            origin: Origin::Unknown,
            did_hash: 0,
            kind: Kind::Commit,
            time_us: now_us(),
            offset,
            len: 0,
            frame_crc: 0,
            state: State::Absent,
        }
    }

    /// Whether no event has its number.
    pub(super) fn is_absent(&self) -> bool {
        self.state == State::Absent
    }

    /// Whether its frame was lost on the disk.
    pub fn is_lost(&self) -> bool {
        self.state == State::Damaged
    }

    /// False where consumers would close the connection over the length of its frame, and again each time they come to it.
    pub(super) fn may_be_sent(&self) -> bool {
        self.len <= LONGEST_SENT_FRAME
    }

    /// Where the next frame begins.
    pub(super) fn end(&self) -> u64 {
        self.offset + u64::from(self.len)
    }

    pub(super) fn encode(&self) -> [u8; ENTRY_BYTES as usize] {
        let mut out = [0; ENTRY_BYTES as usize];
        let (origin, host, upstream_seq) = self.origin.encode();
        out[0..8].copy_from_slice(&self.seq.to_le_bytes());
        out[8..16].copy_from_slice(&self.offset.to_le_bytes());
        out[16..24].copy_from_slice(&upstream_seq.to_le_bytes());
        out[24..32].copy_from_slice(&self.did_hash.to_le_bytes());
        out[32..40].copy_from_slice(&self.time_us.to_le_bytes());
        out[40..44].copy_from_slice(&self.len.to_le_bytes());
        out[44..48].copy_from_slice(&host.to_le_bytes());
        out[48..52].copy_from_slice(&self.frame_crc.to_le_bytes());
        out[KIND_AT] = self.kind as u8;
        out[ORIGIN_AT] = origin;
        let crc = crc32fast::hash(&out[..CRC_AT]);
        out[CRC_AT..].copy_from_slice(&crc.to_le_bytes());
        out[STATE_AT] = self.state as u8;
        out
    }

    /// Reads an entry; `None` where it is damaged or was never written.
    pub(super) fn decode(bytes: &[u8; ENTRY_BYTES as usize]) -> Option<Entry> {
        let mut summed = *bytes;
        summed[STATE_AT] = 0;
        if crc32fast::hash(&summed[..CRC_AT]) != u32_at(bytes, CRC_AT) {
            return None;
        }
        let kind = Kind::from_u8(bytes[KIND_AT])?;
        let (host, upstream_seq) = (u32_at(bytes, 44), u64_at(bytes, 16) as i64);
        let entry = Entry {
            seq: u64_at(bytes, 0),
            offset: u64_at(bytes, 8),
            origin: Origin::decode(bytes[ORIGIN_AT], host, upstream_seq, kind)?,
            did_hash: u64_at(bytes, 24),
            time_us: u64_at(bytes, 32),
            len: u32_at(bytes, 40),
            frame_crc: u32_at(bytes, 48),
            kind,
            state: State::from_u8(bytes[STATE_AT])?,
        };
        entry.is_possible().then_some(entry)
    }

    /// False for what was never written, whatever the checksum says: no reader makes room for a frame
    /// that cannot be.
    fn is_possible(&self) -> bool {
        let held = self.state != State::Served || self.len <= LONGEST_FRAME;
        let end = self.offset.checked_add(self.len.into());
        held && end.is_some_and(|end| end <= MAX_SEGMENT_BYTES)
    }
}

/// Where the entry of `seq` lies in the index of the segment that begins at `first`.
pub(super) fn position(first: u64, seq: u64) -> u64 {
    HEADER_BYTES + (seq - first) * ENTRY_BYTES
}

/// Where the state byte of `seq` lies in the index of the segment that begins at `first`.
pub(super) fn state_position(first: u64, seq: u64) -> u64 {
    position(first, seq) + STATE_AT as u64
}

/// The header of the index of a segment that begins at `first`.
pub(super) fn header(first: u64) -> [u8; HEADER_BYTES as usize] {
    let mut out = [0; HEADER_BYTES as usize];
    out[..8].copy_from_slice(&MAGIC);
    out[8..16].copy_from_slice(&first.to_le_bytes());
    let crc = crc32fast::hash(&out[..CRC_AT]);
    out[CRC_AT..].copy_from_slice(&crc.to_le_bytes());
    out
}

/// Microseconds since 1970; 0 where the clock says earlier.
pub(super) fn now_us() -> u64 {
    clock::system().as_micros() as u64
}

fn u64_at(bytes: &[u8; ENTRY_BYTES as usize], at: usize) -> u64 {
    let mut word = [0; 8];
    word.copy_from_slice(&bytes[at..at + 8]);
    u64::from_le_bytes(word)
}

fn u32_at(bytes: &[u8; ENTRY_BYTES as usize], at: usize) -> u32 {
    let mut word = [0; 4];
    word.copy_from_slice(&bytes[at..at + 4]);
    u32::from_le_bytes(word)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry() -> Entry {
        Entry {
            seq: 7,
            origin: Origin::Host { id: 3, seq: -1 },
            did_hash: u64::MAX,
            kind: Kind::Commit,
            time_us: 1,
            offset: 4096,
            len: 99,
            frame_crc: 5,
            state: State::Served,
        }
    }

    #[test]
    fn entries_read_back_in_every_state() {
        for state in State::ALL {
            let entry = Entry { state, ..entry() };
            assert_eq!(Entry::decode(&entry.encode()), Some(entry));
        }
    }

    #[test]
    fn origins_read_back_also_from_entries_of_earlier_releases() {
        for origin in [
            Origin::Host { id: 3, seq: -1 },
            Origin::Relay { code: 0 },
            Origin::Relay { code: 255 },
            Origin::Unknown,
        ] {
            let kind = Kind::Account;
            let entry = Entry {
                origin,
                kind,
                ..entry()
            };
            assert_eq!(Entry::decode(&entry.encode()), Some(entry));
            let (_, host, number) = origin.encode();
            assert_eq!(Origin::decode(0, host, number, kind), Some(origin));
        }
        assert_eq!(Origin::decode(4, 3, 1, Kind::Account), None);
        // What was rebuilt of an event that no relay sends of its own accord.
        let rebuilt = Origin::decode(0, 0, 1, Kind::Commit);
        assert_eq!(rebuilt, Some(Origin::Unknown));
    }

    #[test]
    fn what_cannot_have_been_written_is_damage() {
        let longest = Entry {
            len: LONGEST_FRAME,
            ..entry()
        };
        assert_eq!(Entry::decode(&longest.encode()), Some(longest));
        let longer = Entry {
            len: LONGEST_FRAME + 1,
            ..entry()
        };
        assert_eq!(Entry::decode(&longer.encode()), None);
        for offset in [MAX_SEGMENT_BYTES, u64::MAX - 1_000, u64::MAX] {
            let beyond = Entry { offset, ..entry() };
            assert_eq!(Entry::decode(&beyond.encode()), None);
        }
        // What holds the place of lost events may be longer than any frame.
        let lost = Entry {
            state: State::Damaged,
            ..longer
        };
        assert_eq!(Entry::decode(&lost.encode()), Some(lost));
    }

    #[test]
    fn every_flipped_bit_is_seen() {
        let good = entry().encode();
        for bit in 0..good.len() * 8 {
            let mut bad = good;
            bad[bit / 8] ^= 1 << (bit % 8);
            assert_eq!(Entry::decode(&bad), None, "bit {bit}");
        }
        assert_eq!(Entry::decode(&[0; ENTRY_BYTES as usize]), None);
    }
}
