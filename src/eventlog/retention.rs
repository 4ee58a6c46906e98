//! Retention: whole segments go, oldest first, by age and by bytes.
//! Never touches the segment that is written to. Readers inside a removed segment learn that they are
//! too slow at their next read.

use std::io;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use super::segment::{Segment, reserved_bytes};
use super::{EventLog, Shared, disk};

impl EventLog {
    /// Removes what is out of the window at the time `now`. Runs by itself; for tests and tools.
    pub fn trim(&self, now: SystemTime) {
        self.shared.trim(now);
    }
}

impl Shared {
    pub(super) fn trim(&self, now: SystemTime) {
        if let Err(error) = self.remove_outdated(now) {
            tracing::warn!(folder = %self.dir.display(), %error, "removing old segments of the event log");
        }
    }

    fn remove_outdated(&self, now: SystemTime) -> io::Result<()> {
        let mut total = self.ended_bytes() + reserved_bytes(self.options.segment_bytes);
        let mut removed = 0;
        while let Some(oldest) = self.oldest_of_many() {
            if total <= self.options.max_bytes && !self.is_outdated(&oldest, now) {
                break;
            }
            total = total.saturating_sub(oldest.bytes());
            // Out of the list before it is off the disk: no reader may enter it now.
            self.segments_mut().pop_front();
            oldest.remove()?;
            removed += 1;
        }
        if removed > 0 {
            disk::sync_folder(&self.dir)?;
            tracing::debug!(removed, "removed the oldest segments of the event log");
        }
        Ok(())
    }

    /// The oldest segment, where it is not the one that is written to.
    fn oldest_of_many(&self) -> Option<Arc<Segment>> {
        let segments = self.segments();
        segments.front().filter(|_| segments.len() > 1).cloned()
    }

    /// Bytes of all segments on disk but the one that is written to.
    fn ended_bytes(&self) -> u64 {
        self.segments()
            .iter()
            .rev()
            .skip(1)
            .map(|segment| segment.bytes())
            .sum()
    }

    /// True where the segment's last event is older than the window. Events of the future (the clock
    /// was set back) count as new.
    fn is_outdated(&self, segment: &Segment, now: SystemTime) -> bool {
        let last = segment.last(self.head());
        let entry = segment
            .files()
            .and_then(|files| segment.entry(&files, last));
        let Ok(Some(entry)) = entry else {
            return false;
        };
        let written = SystemTime::UNIX_EPOCH + Duration::from_micros(entry.time_us);
        now.duration_since(written)
            .is_ok_and(|age| age > self.options.window)
    }
}
