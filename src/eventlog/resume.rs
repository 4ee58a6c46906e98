//! Continues where a reader of another process was, to the byte. That process's last offer is known, and how many bytes of
//! it were taken. The index has the lengths of the frames, also of events that were redacted since.
//! Promises a position between two bytes of one frame, or none.

use std::ops::Range;

use super::reader::{ReadError, Reader};
use super::{EventLog, entry::Entry};

/// The last offer of a reader, and how much of it was taken.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LastOffer {
    /// The events, as [`super::Frames::runs`] names them; one empty run for a reader without a begun event.
    pub runs: Vec<Range<u64>>,
    /// Bytes of the first event that had been taken before.
    pub offset: u64,
    /// Bytes that were taken of the offer.
    pub taken: u64,
}

/// Why a reader cannot continue there.
#[derive(Debug, thiserror::Error)]
pub enum ResumeError {
    #[error("more was sent than was on offer")]
    Beyond,
    #[error("event {seq} is not in the log")]
    Unknown { seq: u64 },
    #[error("event {seq} was redacted after a part of it was sent")]
    Redacted { seq: u64 },
    #[error(transparent)]
    Read(#[from] ReadError),
}

impl EventLog {
    /// A reader that continues behind the last byte that was taken. Waits for the disk.
    ///
    /// # Errors
    /// Where that byte cannot be found, or the rest of its frame is not served any more. A position that has left the
    /// window is no error while no frame is begun: the reader says so by itself.
    pub fn resume(&self, last: &LastOffer) -> Result<Reader, ResumeError> {
        let mut at = last.runs.first().ok_or(ResumeError::Beyond)?.start;
        let mut left = last
            .offset
            .checked_add(last.taken)
            .ok_or(ResumeError::Beyond)?;
        let mut reader = self.reader(at);
        'passing: for run in &last.runs {
            at = run.start;
            while at < run.end && left > 0 {
                let (entry, served) = known(self, &mut reader, at)?;
                let length = u64::from(entry.len);
                if left < length && !served {
                    return Err(ResumeError::Redacted { seq: at });
                }
                if left < length {
                    break 'passing;
                }
                left -= length;
                at += 1;
            }
            if left == 0 {
                break;
            }
        }
        let is_inside = last.runs.iter().any(|run| run.contains(&at));
        if at > self.head() + 1 || (left > 0 && !is_inside) {
            return Err(ResumeError::Beyond);
        }
        // Shorter than a frame.
        Ok(Reader::inside(self.clone(), at, left as usize))
    }
}

/// The entry of an event that was offered once, and whether it still is.
fn known(log: &EventLog, reader: &mut Reader, seq: u64) -> Result<(Entry, bool), ResumeError> {
    if seq > log.head() {
        return Err(ResumeError::Unknown { seq });
    }
    let failed = |source| ReadError::Io { seq, source };
    let (segment, files) = reader.enter(seq)?;
    let _gate = segment.gate.read();
    if segment.is_emptied() {
        return Err(ResumeError::Unknown { seq });
    }
    let entry = segment.entry(&files, seq).map_err(failed)?;
    let entry = entry.ok_or(ResumeError::Unknown { seq })?;
    let served = reader.sent(&files, Some(entry)).map_err(failed)?;
    Ok((entry, served.is_some()))
}
