//! Retention: whole segments go, oldest first, by age, by bytes, and to leave room on the disk. By age only those that
//! no slot needs any more. Never touches the segment that is written to. Readers inside a removed segment learn that they are
//! too slow at their next read; they do not keep its space.

use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant, SystemTime};

use super::disk::Room;
use super::metrics::Removal;
use super::segment::{Segment, reserved_bytes};
use super::{EventLog, Limits, MinFree, Shared, disk};

/// A leap of the system's clock is what exceeds this; less is its being kept right.
const LEAP: Duration = Duration::from_secs(5);
/// Room is left on the file system in these parts of it where the options name no size.
const FREE_PART: u64 = 20;
/// On a disk of the relay's own: one part, and this many bytes at most, which a database can live on for a while.
const MOST_FREE_BYTES: u64 = 5_000_000_000;
/// On the disk of the system: so many parts, and this many bytes at most, which the next versions of the system fit in.
const SHARED_FREE_PARTS: u64 = 3;
const MOST_SHARED_FREE_BYTES: u64 = 20_000_000_000;

/// Bytes that the log leaves on a file system.
pub(super) fn min_free_bytes(limits: Limits, room: Room) -> u64 {
    let part = room.total / FREE_PART;
    match limits.min_free {
        MinFree::OwnDisk => part.min(MOST_FREE_BYTES),
        MinFree::SharedDisk => (part * SHARED_FREE_PARTS).min(MOST_SHARED_FREE_BYTES),
        MinFree::Bytes(bytes) => bytes,
    }
}

impl EventLog {
    /// Removes what is out of the window at the moment `at`, when the system's clock shows `shown`.
    /// Runs by itself; for tests and tools.
    pub fn trim(&self, at: Instant, shown: SystemTime) {
        self.shared.trim(at, shown);
    }
}

impl Shared {
    pub(super) fn trim(&self, at: Instant, shown: SystemTime) {
        let mut clock = self.clock.lock();
        let limits = self.limits();
        clock.window = limits.window;
        let now = clock.read(at, shown);
        // Held until the end: two that remove at a time would count the same bytes.
        if let Err(error) = self.remove_old(now, limits) {
            tracing::warn!(folder = %self.dir.display(), %error, "removing old segments of the event log");
        }
    }

    fn remove_old(&self, now: SystemTime, limits: Limits) -> io::Result<()> {
        let kept = self.ended_bytes() + reserved_bytes(self.options.segment_bytes);
        let mut excess = kept.saturating_sub(limits.max_bytes);
        let mut lacking = self.lacking_room(limits)?;
        let outdated = self.last_outdated(now, limits);
        let mut removed = 0;
        while let Some(oldest) = self.oldest_of_many() {
            if excess.max(lacking) == 0 && outdated.is_none_or(|last| last < oldest.first) {
                break;
            }
            let bytes = oldest.bytes();
            // Out of the list before it is off the disk: no reader may enter it now.
            self.segments_mut().pop_front();
            let reason = match outdated {
                Some(last) if last >= oldest.first => Removal::Age,
                _ if excess > 0 => Removal::Bytes,
                _ => Removal::Room,
            };
            self.options.metrics.segments_removed[reason as usize].inc();
            // A reader that was in the middle of a frame may end it, where there is room for that.
            match lacking {
                0 => oldest.remove()?,
                _ => oldest.empty()?,
            }
            if let Some(faults) = &self.options.faults {
                faults.free(bytes);
            }
            excess = excess.saturating_sub(bytes);
            lacking = lacking.saturating_sub(bytes);
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

    /// Bytes that should be free on the file system and are not. Where a write was refused for lack of
    /// room (a quota, another writer), at least one segment is to go.
    pub(super) fn lacking_room(&self, limits: Limits) -> io::Result<u64> {
        let room = disk::room(&self.dir, self.options.faults.as_deref())?;
        let floor = min_free_bytes(limits, room);
        let refused = floor > 0 && self.lacks_room.load(Ordering::Acquire);
        Ok(floor.saturating_sub(room.free).max(u64::from(refused)))
    }

    /// The first sequence number of the newest segment whose last event is older than the window and needed by no slot.
    /// Those before it are outdated, too, whatever the clock showed when they were written.
    fn last_outdated(&self, now: SystemTime, limits: Limits) -> Option<u64> {
        let segments = self.segments().clone();
        let ended = segments.iter().rev().skip(1);
        let outdated = ended.skip_while(|segment| {
            // Where that cannot be read it is no reason to keep others.
            let written = segment.ended_at().ok().flatten();
            let age = written.and_then(|written| now.duration_since(written).ok());
            age.is_none_or(|age| age <= limits.window)
        });
        let slowest = self.options.slots.slowest().unwrap_or(u64::MAX);
        let mut done = outdated.skip_while(|segment| segment.last(u64::MAX) >= slowest);
        done.next().map(|segment| segment.first)
    }
}

/// The time by which events age: the system's clock, except that a leap forward counts only when it has
/// lasted for a whole window. So a clock that is set wrong empties no window, and neither does the
/// time before a start, in which nobody watched the clock.
#[derive(Debug)]
pub(super) struct Clock {
    window: Duration,
    last: (Instant, SystemTime),
    /// When it leapt, and how far.
    leaps: Vec<(Instant, Duration)>,
}

impl Clock {
    /// A clock that is watched from `at` on, when the system's shows `shown`. `before` is the last time
    /// that is known from before.
    pub fn new(window: Duration, at: Instant, shown: SystemTime, before: SystemTime) -> Clock {
        let unwatched = shown.duration_since(before).unwrap_or_default();
        Clock {
            window,
            last: (at, shown),
            leaps: vec![(at, unwatched)],
        }
    }

    /// The time at the moment `at`, when the system's clock shows `shown`.
    pub fn read(&mut self, at: Instant, shown: SystemTime) -> SystemTime {
        let (last_at, last_shown) = self.last;
        let passed = at.saturating_duration_since(last_at);
        match shown.duration_since(last_shown + passed) {
            Ok(leap) if leap > LEAP => {
                tracing::warn!(
                    seconds = leap.as_secs(),
                    "the system's clock leapt forward; the replay window follows it only when it stays so"
                );
                self.leaps.push((at, leap));
            }
            Ok(_) => {}
            Err(back) => self.take_back(back.duration()),
        }
        self.last = (at, shown);
        let window = self.window;
        self.leaps
            .retain(|(when, _)| at.saturating_duration_since(*when) < window);
        let leapt = self.leaps.iter().map(|(_, leap)| *leap).sum();
        shown.checked_sub(leapt).unwrap_or(SystemTime::UNIX_EPOCH)
    }

    /// The clock was set back: what it had leapt forward before is mended.
    fn take_back(&mut self, mut back: Duration) {
        for (_, leap) in self.leaps.iter_mut().rev() {
            let mended = back.min(*leap);
            *leap -= mended;
            back -= mended;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HOUR: Duration = Duration::from_secs(3600);

    /// Reads the clock each hour: by how much it was set forward (or back) in that hour, and how far the
    /// time of events is behind what it shows.
    fn assert_behind(window_hours: u32, steps: &[(i64, i64)]) {
        let (mut at, mut shown) = (Instant::now(), SystemTime::UNIX_EPOCH + 400_000 * HOUR);
        let mut clock = Clock::new(window_hours * HOUR, at, shown, shown);
        for (number, (set, behind)) in steps.iter().enumerate() {
            at += HOUR;
            let by = HOUR * u32::try_from(set.abs()).expect("few hours");
            shown += HOUR;
            shown = if *set < 0 { shown - by } else { shown + by };
            let time = clock.read(at, shown);
            let expected = HOUR * u32::try_from(*behind).expect("few hours");
            assert_eq!(shown, time + expected, "hour {number}");
        }
    }

    #[test]
    fn a_leap_forward_counts_only_when_it_has_lasted() {
        assert_behind(3, &[(0, 0), (100, 100), (0, 100), (0, 100), (0, 0), (0, 0)]);
        assert_behind(2, &[(1, 1), (2, 3), (0, 2), (0, 0)]);
    }

    #[test]
    fn a_clock_set_back_is_followed_at_once() {
        assert_behind(3, &[(0, 0), (-100, 0), (0, 0)]);
        assert_behind(3, &[(100, 100), (-100, 0), (0, 0)]);
        assert_behind(3, &[(100, 100), (-40, 60), (0, 60), (0, 0)]);
        assert_behind(9, &[(-5, 0), (5, 5), (-7, 0)]);
    }

    #[test]
    fn a_clock_that_drifts_or_is_kept_right_is_followed() {
        let (at, shown) = (Instant::now(), SystemTime::now());
        let mut clock = Clock::new(HOUR, at, shown, shown);
        for minute in 1..100 {
            let at = at + Duration::from_secs(60) * minute;
            let shown = shown + Duration::from_secs(61) * minute;
            assert_eq!(clock.read(at, shown), shown);
        }
    }

    #[test]
    fn time_that_nobody_watched_counts_as_a_leap() {
        let (at, shown) = (Instant::now(), SystemTime::now());
        let before = shown - 1000 * HOUR;
        let mut clock = Clock::new(2 * HOUR, at, shown, before);
        assert_eq!(clock.read(at, shown), before);
        assert_eq!(clock.read(at + HOUR, shown + HOUR), before + HOUR);
        assert_eq!(
            clock.read(at + 2 * HOUR, shown + 2 * HOUR),
            shown + 2 * HOUR
        );
        // Events of the future: the clock was set back meanwhile.
        let mut clock = Clock::new(HOUR, at, shown, shown + HOUR);
        assert_eq!(clock.read(at, shown), shown);
    }
}
