//! The event log: every event that leaves this relay, in order, on disk before anyone sees it.
//! Promises dense sequence numbers from 1 that are never reused, and frames as they go on the wire. Looks into a frame only
//! where it must make a lost index entry again, or say whose event it is.
//!
//! A data folder holds segments, named for their first sequence number: `<first>.seg` is complete
//! server-side WebSocket frames back to back and nothing else, so that any stretch of it can be sent
//! as it lies; `<first>.idx` is a header and 64-byte entries (`entry.rs`). Both are preallocated while they are
//! written to. `<first>.acc` tells where in an ended segment an account's events are (`account_index.rs`). `lock` keeps
//! a second relay out; `redactions` lists what must yet be punched out.

use std::collections::VecDeque;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant, SystemTime};

use parking_lot::{Mutex, RwLock, RwLockReadGuard, RwLockWriteGuard};
use rustix::io::Errno;
use tokio::sync::watch;

mod account_index;
mod audit;
mod check;
mod disk;
mod entry;
mod faults;
mod group;
mod inspect;
mod listing;
mod lock;
mod mark;
mod metrics;
mod numbers;
mod reader;
mod rebuild;
mod recovery;
mod redaction;
mod repair;
mod resume;
mod retention;
mod segment;
pub mod sequencer;
mod slots;
mod stretch;
mod syncer;
mod unreadable;
mod upkeep;
pub mod wire;

pub use audit::{Audit, Flaw, Wrong};
pub use check::Changes;
pub use disk::Room;
pub use entry::{Entry, Origin};
pub use faults::Faults;
pub use group::Append;
pub use inspect::{Event, Events, Fate, Folder, Summary};
pub use metrics::Metrics;
pub use reader::{Entries, Frames, Offer, ReadError, Reader};
pub use repair::{Repair, Repaired, repair};
pub use resume::{LastOffer, ResumeError};
pub use slots::{Slot, Slots};

use lock::FolderLock;
use mark::Mark;
use metrics::as_gauge;
use redaction::Redactions;
use retention::Clock;
use segment::{Segment, Writer};
use stretch::Stretches;
use unreadable::Suspects;
use upkeep::{Bells, Upkeep};

use crate::clock;
use crate::heartbeat::Heartbeat;

/// Segments are not smaller, whatever the options say.
const MIN_SEGMENT_BYTES: u64 = 4096;
/// Entries that may be damaged before the first one that tells when it was appended.
const MOST_DAMAGED: u64 = 100;
/// A byte budget holds at least this many segments, so that retention removes a small part of it.
const MIN_SEGMENTS_IN_BUDGET: u64 = 8;

/// When an event counts as kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Durability {
    /// fdatasync before anyone sees the event. Survives power loss.
    Sync,
    /// Seen once written, synced at this interval. Survives kill −9; a power loss may take the last
    /// interval, whose sequence numbers are then given again.
    Interval(Duration),
    /// Left to the operating system. Survives kill −9; a power loss may take the last half minute and
    /// leave holes before it.
    None,
}

impl Durability {
    /// Synced every 100 ms. In-flight events of a host count until the sync: over a whole second that would be its limit.
    pub const INTERVAL: Durability = Durability::Interval(Duration::from_millis(100));

    /// What an operator can choose from.
    pub const ALL: [Durability; 3] = [Durability::Sync, Durability::INTERVAL, Durability::None];

    /// The word for it in the configuration.
    pub fn as_str(self) -> &'static str {
        match self {
            Durability::Sync => "sync",
            Durability::Interval(_) => "interval",
            Durability::None => "none",
        }
    }
}

/// Where and how the log is kept.
#[derive(Debug, Clone)]
pub struct LogOptions {
    /// Folder of the segments; created where it is missing.
    pub dir: PathBuf,
    /// A segment ends before it grows past this many bytes of frames.
    pub segment_bytes: u64,
    pub durability: Durability,
    /// Groups of events are begun to be written at least this far apart, so that a busy stream is written,
    /// synced and announced in large pieces. An event that comes later than this after the last group does not wait.
    pub group_window: Duration,
    /// Events older than this go, a whole segment at a time, where no slot needs them.
    pub window: Duration,
    /// The oldest segments go when all together are larger than this.
    pub max_bytes: u64,
    /// They also go to leave so much room on the file system.
    pub min_free: MinFree,
    /// Positions of those who follow the log.
    pub slots: Slots,
    /// Faults for tests; `None` in service.
    pub faults: Option<Arc<Faults>>,
    pub metrics: Metrics,
}

impl LogOptions {
    /// The default settings, in the folder `dir`.
    pub fn new(dir: impl Into<PathBuf>) -> LogOptions {
        LogOptions::with(dir, &Settings::default())
    }

    /// These settings, in the folder `dir`.
    pub fn with(dir: impl Into<PathBuf>, settings: &Settings) -> LogOptions {
        let Settings {
            segment_bytes,
            durability,
            group_window,
            window,
            max_bytes,
            min_free,
        } = *settings;
        LogOptions {
            dir: dir.into(),
            segment_bytes,
            durability,
            group_window,
            window,
            max_bytes,
            min_free,
            slots: Slots::default(),
            faults: None,
            metrics: Metrics::default(),
        }
    }
}

/// What an operator sets of [`LogOptions`]; see there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Settings {
    pub segment_bytes: u64,
    pub durability: Durability,
    pub group_window: Duration,
    pub window: Duration,
    pub max_bytes: u64,
    pub min_free: MinFree,
}

impl Default for Settings {
    fn default() -> Settings {
        Settings {
            segment_bytes: 128 << 20,
            durability: Durability::Sync,
            group_window: Duration::from_millis(2),
            window: Duration::from_secs(72 * 3600),
            max_bytes: 200_000_000_000,
            min_free: MinFree::OwnDisk,
        }
    }
}

/// The room that the log leaves on its file system.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MinFree {
    /// What a disk needs that is the relay's: the smaller of a twentieth and 5 GB.
    OwnDisk,
    /// What a system needs that has the log beside it: the smaller of three twentieths and 20 GB.
    SharedDisk,
    /// So many bytes; 0 leaves none.
    Bytes(u64),
}

/// What of [`LogOptions`] may change while the log is open.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Limits {
    group_window: Duration,
    window: Duration,
    max_bytes: u64,
    min_free: MinFree,
}

impl Limits {
    /// Shows the limits that alerts compare with.
    fn show(&self, metrics: &Metrics) {
        metrics.max_bytes.set(as_gauge(self.max_bytes));
        metrics.window_seconds.set(as_gauge(self.window.as_secs()));
    }

    fn of(settings: &Settings) -> Limits {
        Limits {
            group_window: settings.group_window,
            window: settings.window,
            max_bytes: settings.max_bytes,
            min_free: settings.min_free,
        }
    }
}

/// Why the log could not be opened, read or changed.
#[derive(Debug, thiserror::Error)]
pub enum LogError {
    #[error("data folder {} is in use by another relay{}: stop that one, or give this one another data folder", dir.display(), owner_text(owner))]
    InUse { dir: PathBuf, owner: Option<u32> },
    #[error("{action} {}: {source}{}", path.display(), advice(source))]
    Io {
        action: &'static str,
        path: PathBuf,
        source: io::Error,
    },
    #[error("data folder {} already has a sequencer", .0.display())]
    SequencerRuns(PathBuf),
    #[error("there is no folder {}; name the relay's data folder with --data-dir", .0.display())]
    NoFolder(PathBuf),
    #[error("folder {} holds no event log; name the relay's data folder with --data-dir", .0.display())]
    NotALog(PathBuf),
}

fn owner_text(owner: &Option<u32>) -> String {
    owner
        .map(|pid| format!(" (process {pid})"))
        .unwrap_or_default()
}

/// What an operator can do where writing fails.
fn advice(error: &io::Error) -> &'static str {
    match error.kind() {
        _ if is_lack_of_room(error) => "; make room on the disk, or choose another data folder",
        io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem => {
            "; make it writable for this user, or choose another data folder"
        }
        _ if Errno::from_io_error(error) == Some(Errno::IO) => {
            "; the disk is failing: replace it, or have `atproto-relay log repair` give up what cannot be read"
        }
        _ => "",
    }
}

/// True where there is no room for what was to be written.
fn is_lack_of_room(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded
    )
}

impl LogError {
    fn io(action: &'static str, path: &Path) -> impl Fn(io::Error) -> LogError {
        move |source| LogError::Io {
            action,
            path: path.to_owned(),
            source,
        }
    }
}

/// Whether the log takes events.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Health {
    Good,
    /// Writing fails. Events wait, nothing is lost; the log tries again by itself.
    Failing {
        since: SystemTime,
        reason: String,
    },
}

/// The event log. Clones share it; the last one that goes releases the folder.
#[derive(Debug, Clone)]
pub struct EventLog {
    // Field order: the threads must be gone before the folder's lock is released.
    _upkeep: Arc<Upkeep>,
    shared: Arc<Shared>,
}

/// What the log's threads and readers share.
#[derive(Debug)]
struct Shared {
    options: LogOptions,
    limits: RwLock<Limits>,
    dir: Arc<Path>,
    /// Oldest first, never empty, without gaps.
    segments: RwLock<VecDeque<Arc<Segment>>>,
    /// Last sequence number that may be seen, 0 before the first.
    head: watch::Sender<u64>,
    health: watch::Sender<Health>,
    /// The last write was refused for lack of room.
    lacks_room: AtomicBool,
    /// The time by which events age. Held while segments are removed.
    clock: Mutex<Clock>,
    /// Follows the head on disk.
    mark: Mark,
    /// See [`EventLog::newest_at_open`].
    newest: Duration,
    /// The end of the log, while no sequencer has it.
    writer: Mutex<Option<Writer>>,
    redactions: Redactions,
    suspects: Suspects,
    stretches: Stretches,
    /// The sequencer's.
    heartbeat: Heartbeat,
    /// Wake the upkeep threads.
    bells: Bells,
    _lock: FolderLock,
}

impl EventLog {
    /// Opens the log in its folder, cuts a torn tail, and starts retention. One process at a time.
    pub fn open(options: LogOptions) -> Result<EventLog, LogError> {
        let mut options = options;
        let budget = options.max_bytes / MIN_SEGMENTS_IN_BUDGET;
        options.segment_bytes = options
            .segment_bytes
            .min(budget)
            .clamp(MIN_SEGMENT_BYTES, entry::MAX_SEGMENT_BYTES);
        let dir: Arc<Path> = Arc::from(options.dir.as_path());
        std::fs::create_dir_all(&dir).map_err(LogError::io("creating the log folder", &dir))?;
        let lock = lock::lock_folder(&dir)?;
        let (mark, published) =
            Mark::open(&dir).map_err(LogError::io("reading the mark in", &dir))?;
        let recovered = recovery::recover(&dir, &options, published)?;
        let redactions = Redactions::load(&dir)?;
        let (bells, calls) = upkeep::bells();
        let clock = Clock::new(
            options.window,
            Instant::now(),
            SystemTime::now(),
            recovered.last_event,
        );
        let limits = Limits {
            group_window: options.group_window,
            window: options.window,
            max_bytes: options.max_bytes,
            min_free: options.min_free,
        };
        limits.show(&options.metrics);
        let shared = Arc::new(Shared {
            head: watch::Sender::new(recovered.writer.next_seq - 1),
            mark,
            newest: recovered.newest,
            health: watch::Sender::new(Health::Good),
            lacks_room: AtomicBool::new(false),
            clock: Mutex::new(clock),
            segments: RwLock::new(recovered.segments),
            writer: Mutex::new(Some(recovered.writer)),
            redactions,
            suspects: Suspects::default(),
            stretches: Stretches::default(),
            heartbeat: Heartbeat::default(),
            bells,
            limits: RwLock::new(limits),
            options,
            dir,
            _lock: lock,
        });
        let upkeep = Upkeep::start(&shared, calls)?;
        Ok(EventLog {
            _upkeep: Arc::new(upkeep),
            shared,
        })
    }

    /// The same log with `next` as its next sequence number: the numbers from its head on were given out by a log that
    /// is lost. Must come before a sequencer and readers.
    pub fn skip_to(self, next: u64) -> Result<EventLog, LogError> {
        let options = self.options().clone();
        let (_, head) = self.window();
        recovery::begin_at(&self.shared.dir, next, head)?;
        drop(self);
        EventLog::open(options)
    }

    /// Last sequence number that consumers may see; 0 before the first event.
    pub fn head(&self) -> u64 {
        self.shared.head()
    }

    /// First sequence number the window holds; `None` where it holds none.
    pub fn oldest(&self) -> Option<u64> {
        let (oldest, head) = self.window();
        (oldest <= head).then_some(oldest)
    }

    /// First sequence number a reader can begin at, and the head. The first is head + 1 where the
    /// window is empty.
    pub fn window(&self) -> (u64, u64) {
        let segments = self.shared.segments();
        let oldest = segments.front().map_or(1, |segment| segment.first);
        (oldest, self.shared.head())
    }

    /// The head, for those who wait for the next event.
    pub fn subscribe(&self) -> watch::Receiver<u64> {
        self.shared.head.subscribe()
    }

    /// A reader whose next event is `from` (at least 1).
    pub fn reader(&self, from: u64) -> Reader {
        Reader::new(self.clone(), from)
    }

    /// Events from `from` up to the head of now, for rebuilding state. Redacted ones are left
    /// out; see [`Entries::and_redacted`].
    pub fn entries(&self, from: u64) -> Entries {
        Entries::new(self.clone(), from)
    }

    /// The latest time, since 1970, at which an event had been appended when the log was opened: no clock that was
    /// right is behind it.
    pub fn newest_at_open(&self) -> Duration {
        self.shared.newest
    }

    /// Whether the log takes events.
    pub fn health(&self) -> Health {
        self.shared.health.borrow().clone()
    }

    /// How the sequencer gets on: it beats after each group of events and after each empty batch, and waits while the
    /// disk refuses. Whoever is called with durable events may wait in it, too.
    pub fn heartbeat(&self) -> &Heartbeat {
        &self.shared.heartbeat
    }

    /// When the oldest event was appended, since 1970. Reads the disk.
    pub fn oldest_time(&self) -> Option<Duration> {
        let (oldest, head) = self.window();
        let segment = self.shared.segment_of(oldest).ok()?;
        let files = segment.files().ok()?;
        let mut entries =
            (oldest..=head.min(oldest + MOST_DAMAGED)).map(|seq| segment.entry(&files, seq));
        let entry = entries.find_map(|entry| entry.ok().flatten())?;
        Some(Duration::from_micros(entry.time_us))
    }

    /// The file system of the log: its size, and what of it this user may still write. Reads the disk.
    ///
    /// # Errors
    /// The system's.
    pub fn disk(&self) -> io::Result<Room> {
        disk::room(&self.shared.dir, self.options().faults.as_deref())
    }

    /// Bytes that the limits keep free on a file system of this size.
    pub fn min_free_bytes(&self, room: Room) -> u64 {
        retention::min_free_bytes(self.shared.limits(), room)
    }

    /// Bytes that the limits keep free on the file system, and that are not free. Reads the disk.
    ///
    /// # Errors
    /// The system's.
    pub fn lacking_room(&self) -> io::Result<u64> {
        self.shared.lacking_room(self.shared.limits())
    }

    /// Bytes on disk, reserved ones included.
    pub fn bytes(&self) -> u64 {
        self.shared
            .segments()
            .iter()
            .map(|segment| segment.bytes())
            .sum()
    }

    /// Applies window, budgets and group window of these settings; what is out of them goes at once. Segment size and
    /// durability stay as the log was opened with.
    pub fn apply(&self, settings: &Settings) {
        let limits = Limits::of(settings);
        limits.show(&self.shared.options.metrics);
        *self.shared.limits.write() = limits;
        self.shared.bells.retention.ring();
    }

    /// Sets the gauges that are sampled without a look at the disk.
    pub fn sample(&self) {
        let metrics = &self.shared.options.metrics;
        metrics.seq.set(as_gauge(self.head()));
        metrics.oldest_seq.set(as_gauge(self.oldest().unwrap_or(0)));
        metrics.bytes.set(as_gauge(self.bytes()));
        let pending = self.redactions_pending();
        metrics.redactions_pending.set(pending as i64);
        let failing = self.health() != Health::Good;
        metrics.failing.set(i64::from(failing));
        for (view, position) in self.shared.options.slots.positions() {
            let lag = (self.head() + 1).saturating_sub(position);
            metrics
                .view_lag
                .with_label_values(&[view])
                .set(as_gauge(lag));
        }
    }

    /// Sets the gauges that are sampled with a look at the disk.
    pub fn sample_disk(&self) {
        let metrics = &self.shared.options.metrics;
        if let Ok(room) = self.disk() {
            metrics.disk_bytes.set(as_gauge(room.total));
            metrics.disk_free_bytes.set(as_gauge(room.free));
            let min_free = self.min_free_bytes(room);
            metrics.min_free_bytes.set(as_gauge(min_free));
        }
        let age = self
            .oldest_time()
            .map(|then| clock::system().saturating_sub(then));
        metrics
            .oldest_age_seconds
            .set(as_gauge(age.unwrap_or_default().as_secs()));
    }

    /// Gives back the memory of frames that were read for several readers; the next ones read them again.
    pub fn shrink(&self) {
        self.shared.stretches.clear();
    }

    /// The options the log was opened with; see [`EventLog::apply`].
    pub fn options(&self) -> &LogOptions {
        &self.shared.options
    }
}

impl Shared {
    fn limits(&self) -> Limits {
        *self.limits.read()
    }

    fn head(&self) -> u64 {
        *self.head.borrow()
    }

    /// The end of the log, for a sequencer; `None` while another one has it.
    fn take_writer(&self) -> Option<Writer> {
        self.writer.lock().take()
    }

    fn put_writer(&self, writer: Writer) {
        *self.writer.lock() = Some(writer);
    }

    /// Lets everybody see the events up to `head`.
    fn publish(&self, head: u64) {
        debug_assert!(self.head() <= head, "what was published stays so");
        // First, so that nobody has seen more than it says.
        self.mark.set(head);
        self.head.send_replace(head);
    }

    fn segments(&self) -> RwLockReadGuard<'_, VecDeque<Arc<Segment>>> {
        self.segments.read()
    }

    fn segments_mut(&self) -> RwLockWriteGuard<'_, VecDeque<Arc<Segment>>> {
        self.segments.write()
    }

    /// The segment that holds `seq`, or `Err` with the oldest sequence number there is.
    fn segment_of(&self, seq: u64) -> Result<Arc<Segment>, u64> {
        let segments = self.segments();
        let behind = segments.partition_point(|segment| segment.first <= seq);
        match behind.checked_sub(1).and_then(|at| segments.get(at)) {
            Some(segment) => Ok(segment.clone()),
            None => Err(segments.front().map_or(1, |segment| segment.first)),
        }
    }
}
