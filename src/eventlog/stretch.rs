//! Frames in memory, as they lie in a segment, shared by all readers that pass them: a thousand consumers at the head
//! cost one look into the index and one read per group of events.
//! Promises bounded memory, and that nothing is handed out any more once a redaction that covers it was accepted.

use std::collections::VecDeque;
use std::ops::{Range, RangeInclusive};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use parking_lot::{Mutex, MutexGuard, RwLock, RwLockReadGuard};
use tokio::sync::Semaphore;

/// Bytes of frames that are kept for the readers that follow: a fifth of a second of 20,000 events a second, so that
/// who reads at all finds the live events here.
const KEPT_BYTES: usize = 16 << 20;
/// Stretches that are kept; bounds the search.
const KEPT_STRETCHES: usize = 256;
/// Buffers kept for the next stretches, and which ones: small ones cost little to get, huge ones too much to hold.
const SPARE_BUFFERS: usize = 8;
const SPARE_BYTES: RangeInclusive<usize> = 64 << 10..=1 << 20;

/// Reads at a time that wait for the disk: enough for an NVMe disk to show its speed, and of those who wait for the
/// same stretch only the first ones read it.
const MAX_DISK_READS: usize = 32;

/// Consecutive frames of one segment.
#[derive(Debug)]
pub(super) struct Stretch {
    /// Position it was read for; from here to `first` nothing is served.
    pub from: u64,
    /// Sequence number of the first frame.
    pub first: u64,
    /// Position behind it.
    pub next: u64,
    /// First sequence number of its segment.
    pub segment: u64,
    /// Where each frame ends.
    pub ends: Vec<u32>,
    pub bytes: Vec<u8>,
    /// The redactions it knows of.
    pub epoch: u64,
}

impl Stretch {
    /// Where the frame of `seq` begins, or the first one behind it.
    pub fn start(&self, seq: u64) -> usize {
        match seq.saturating_sub(self.first) as usize {
            0 => 0,
            before => self
                .ends
                .get(before - 1)
                .map_or(self.bytes.len(), |end| *end as usize),
        }
    }

    /// Whole frames from byte `from` on: as many as fit into `max` bytes, at least one where `at_least_one`.
    pub fn whole_frames(&self, from: usize, max: usize, at_least_one: bool) -> Range<usize> {
        let limit = from.saturating_add(max);
        if self.bytes.len() <= limit {
            return from..self.bytes.len();
        }
        let fitting = self.ends.partition_point(|end| *end as usize <= limit);
        let end = fitting
            .checked_sub(1)
            .map_or(from, |last| self.ends[last] as usize);
        if end <= from && at_least_one {
            let frame = self.ends.partition_point(|end| *end as usize <= from);
            return from..self.ends[frame] as usize;
        }
        from..end.max(from)
    }

    /// Whole frames in front of byte `end`.
    pub fn frames_before(&self, end: usize) -> u64 {
        self.ends.partition_point(|at| *at as usize <= end) as u64
    }
}

/// The stretches in memory.
#[derive(Debug)]
pub(super) struct Stretches {
    /// Held for reading while frames are handed out, for writing when a redaction was accepted: it returns when nothing
    /// from before it is under way.
    gate: RwLock<()>,
    /// Redactions accepted so far.
    epoch: AtomicU64,
    kept: Mutex<Kept>,
    /// Permits for reads that wait for the disk.
    pub disk_reads: Semaphore,
}

#[derive(Debug, Default)]
struct Kept {
    /// (from, next, the stretch), in the order they were read.
    list: VecDeque<(u64, u64, Arc<Stretch>)>,
    bytes: usize,
    spare: Vec<Vec<u8>>,
}

impl Default for Stretches {
    fn default() -> Stretches {
        Stretches {
            gate: RwLock::default(),
            epoch: AtomicU64::new(0),
            kept: Mutex::default(),
            disk_reads: Semaphore::new(MAX_DISK_READS),
        }
    }
}

impl Stretches {
    /// What a stretch must be read under: the number is taken before anything is looked up for it.
    pub fn epoch(&self) -> u64 {
        self.epoch.load(Ordering::Acquire)
    }

    /// Lets frames be handed out while it is held, where all stretches are valid under it.
    pub fn hold(&self) -> Hold<'_> {
        let gate = self.gate.read();
        Hold {
            _gate: gate,
            epoch: self.epoch(),
        }
    }

    /// Nothing that was read before this is handed out when it returns. Call it when the redaction is followed by those
    /// who read anew.
    pub fn void(&self) {
        let gate = self.gate.write();
        self.epoch.fetch_add(1, Ordering::AcqRel);
        drop(gate);
        let mut kept = self.kept();
        kept.list.clear();
        kept.bytes = 0;
    }

    /// Gives all memory back that no reader holds.
    pub fn clear(&self) {
        let mut kept = self.kept();
        *kept = Kept::default();
    }

    /// The stretch that holds the position `at`.
    pub fn find(&self, at: u64) -> Option<Arc<Stretch>> {
        let kept = self.kept();
        let mut newest_first = kept.list.iter().rev();
        newest_first
            .find(|(from, next, _)| (*from..*next).contains(&at))
            .map(|(_, _, stretch)| stretch.clone())
    }

    /// A buffer of `len` bytes to read a stretch into. What is in it means nothing.
    pub fn buffer(&self, len: usize) -> Vec<u8> {
        if len < *SPARE_BYTES.start() {
            return vec![0; len];
        }
        let mut buffer = self.kept().spare.pop().unwrap_or_default();
        buffer.resize(len, 0);
        buffer
    }

    /// Keeps a stretch for the readers that follow. Another reader may have been faster: then its stretch stays.
    pub fn keep(&self, stretch: &Arc<Stretch>) {
        let mut kept = self.kept();
        let known = kept
            .list
            .iter()
            .rev()
            .any(|(from, next, _)| *from <= stretch.from && stretch.next <= *next);
        if known || stretch.epoch != self.epoch() {
            return;
        }
        kept.bytes += stretch.bytes.capacity();
        kept.list
            .push_back((stretch.from, stretch.next, stretch.clone()));
        while kept.bytes > KEPT_BYTES || kept.list.len() > KEPT_STRETCHES {
            let Some((_, _, oldest)) = kept.list.pop_front() else {
                break;
            };
            kept.bytes -= oldest.bytes.capacity();
            if let Some(stretch) = Arc::into_inner(oldest)
                && kept.spare.len() < SPARE_BUFFERS
                && SPARE_BYTES.contains(&stretch.bytes.capacity())
            {
                kept.spare.push(stretch.bytes);
            }
        }
    }

    fn kept(&self) -> MutexGuard<'_, Kept> {
        self.kept.lock()
    }
}

/// While it is there, no redaction is accepted.
pub(super) struct Hold<'a> {
    _gate: RwLockReadGuard<'a, ()>,
    epoch: u64,
}

impl Hold<'_> {
    /// False where a redaction came after the stretch was looked up.
    pub fn allows(&self, stretch: &Stretch) -> bool {
        stretch.epoch == self.epoch
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Frames of these lengths from `first` on, behind two positions that are not served.
    fn stretch(first: u64, lengths: &[u32], epoch: u64) -> Arc<Stretch> {
        let ends: Vec<u32> = lengths
            .iter()
            .scan(0, |end, length| {
                *end += length;
                Some(*end)
            })
            .collect();
        Arc::new(Stretch {
            from: first - 2,
            first,
            next: first + lengths.len() as u64,
            segment: 1,
            bytes: vec![0; ends.last().copied().unwrap_or(0) as usize],
            ends,
            epoch,
        })
    }

    #[test]
    fn frames_are_found_by_their_place() {
        let stretch = stretch(10, &[100, 1, 50], 0);
        for (seq, start) in [(8, 0), (10, 0), (11, 100), (12, 101), (13, 151)] {
            assert_eq!(stretch.start(seq), start, "{seq}");
        }
        let cases = [
            ((0, 1000, false), 0..151),
            ((0, 151, false), 0..151),
            ((0, 150, false), 0..101),
            ((0, 99, false), 0..0),
            ((0, 0, true), 0..100),
            ((40, 0, true), 40..100),
            ((40, 60, true), 40..100),
            ((40, 61, false), 40..101),
            ((100, 0, true), 100..101),
            ((151, 0, true), 151..151),
        ];
        for ((from, max, at_least_one), expected) in cases {
            assert_eq!(
                stretch.whole_frames(from, max, at_least_one),
                expected,
                "{max} bytes from {from}"
            );
        }
        for (end, frames) in [(0, 0), (99, 0), (100, 1), (101, 2), (150, 2), (151, 3)] {
            assert_eq!(stretch.frames_before(end), frames, "{end}");
        }
    }

    #[test]
    fn memory_is_bounded_and_buffers_come_back() {
        let stretches = Stretches::default();
        let half = KEPT_BYTES as u32 / 2;
        for n in 1..=3 {
            stretches.keep(&stretch(n * 10, &[half], 0));
        }
        assert!(stretches.find(10).is_none(), "the oldest went");
        assert!(stretches.find(20).is_some() && stretches.find(30).is_some());
        for n in 0..1000 {
            stretches.keep(&stretch(100 + n * 10, &[1, 1], 0));
        }
        let kept = stretches.kept();
        assert_eq!(kept.list.len(), KEPT_STRETCHES);
        assert!(kept.spare.len() <= SPARE_BUFFERS);
        drop(kept);
        for len in [500, 100_000, 70_000] {
            assert_eq!(stretches.buffer(len).len(), len);
        }
        stretches.clear();
        let kept = stretches.kept();
        assert_eq!((kept.list.len(), kept.bytes, kept.spare.len()), (0, 0, 0));
    }

    #[test]
    fn a_redaction_voids_what_was_read_before() {
        let stretches = Stretches::default();
        let before = stretch(10, &[7], stretches.epoch());
        stretches.keep(&before);
        assert!(stretches.hold().allows(&before));
        stretches.void();
        assert!(stretches.find(10).is_none());
        assert!(!stretches.hold().allows(&before));
        stretches.keep(&before);
        assert!(stretches.find(10).is_none(), "not brought back either");
    }
}
