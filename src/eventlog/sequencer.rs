//! The one thread that appends: gives sequence numbers, splices them in, writes, syncs, publishes.
//! Promises that nothing is seen before it is kept, and that a full or failing disk loses nothing:
//! the thread holds its events and tries again. Does not look into frames.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant, SystemTime};

use super::group::{Append, Group};
use super::numbers::number;
use super::segment::{Segment, Writer};
use super::syncer::Syncer;
use super::{Durability, EventLog, Health, LogError, is_lack_of_room, wire};
use crate::atproto::frame::{self, MAX_FRAME_BYTES};
use crate::heartbeat::Heartbeat;

/// Frames gathered for one write and one sync. Bounds memory; well above what one sync takes to do.
const MAX_GROUP_BYTES: usize = 8 << 20;
/// First pause after a failed write; doubles up to [`MAX_RETRY_PAUSE`].
const MIN_RETRY_PAUSE: Duration = Duration::from_millis(50);
const MAX_RETRY_PAUSE: Duration = Duration::from_secs(2);

/// The running sequencer.
#[derive(Debug)]
pub struct Sequencer<T> {
    thread: JoinHandle<Vec<T>>,
    stop: Arc<AtomicBool>,
}

impl<T> Sequencer<T> {
    /// Waits until all senders are gone and everything they sent is durable. Waits as long as the disk
    /// refuses.
    pub fn join(self) {
        if self.thread.join().is_err() {
            tracing::error!(
                "the sequencer panicked; events it held will come again from their hosts"
            );
        }
    }

    /// Like [`Sequencer::join`], but gives up where the disk refuses: returns what did not become
    /// durable and therefore must not be settled.
    pub fn stop(self) -> Vec<T> {
        self.stop.store(true, Ordering::Release);
        self.thread.thread().unpark();
        self.thread.join().unwrap_or_default()
    }
}

/// Starts the sequencer of `log`. It appends what comes through `rx`, in that order, as many events at
/// a time as queued while the last sync ran, and calls `on_durable` with the sequence numbers given
/// after they are published (with `Durability::Interval` only after the sync that covers them).
pub fn spawn<T: Send + 'static>(
    log: EventLog,
    rx: Receiver<Vec<Append<T>>>,
    on_durable: impl FnMut(Vec<(u64, T)>) + Send + 'static,
) -> Result<Sequencer<T>, LogError> {
    spawn_announcing(log, rx, |_: &[(u64, T)]| {}, on_durable)
}

/// As [`spawn`]; calls `before_publish` with events that are in the log, before anybody can see them there.
pub fn spawn_announcing<T: Send + 'static>(
    log: EventLog,
    rx: Receiver<Vec<Append<T>>>,
    before_publish: impl FnMut(&[(u64, T)]) + Send + 'static,
    on_durable: impl FnMut(Vec<(u64, T)>) + Send + 'static,
) -> Result<Sequencer<T>, LogError> {
    let dir = log.shared.dir.clone();
    let failed = LogError::io("starting the sequencer of", &dir);
    let syncer = match log.shared.options.durability {
        Durability::Sync => Some(Syncer::start()),
        Durability::Interval(_) | Durability::None => None,
    };
    let syncer = match syncer.transpose() {
        Ok(syncer) => syncer,
        Err(error) => return Err(failed(error)),
    };
    let writer = log
        .shared
        .take_writer()
        .ok_or_else(|| LogError::SequencerRuns(dir.to_path_buf()))?;
    let stop = Arc::new(AtomicBool::new(false));
    let worker = Worker {
        heartbeat: log.heartbeat().clone(),
        stop: stop.clone(),
        group: Group::new(writer.next_seq),
        committed_at: Instant::now(),
        writer: Some(writer),
        syncer,
        log,
        rx,
        before_publish,
        on_durable,
        unsynced: Vec::new(),
        sync_due: None,
    };
    let thread = thread::Builder::new()
        .name("sequencer".into())
        .spawn(move || worker.run())
        .map_err(failed)?;
    Ok(Sequencer { thread, stop })
}

/// The disk refuses and nobody waits any longer.
struct GaveUp;

struct Worker<T, B, F> {
    log: EventLog,
    /// `None` only when the thread has ended.
    writer: Option<Writer>,
    /// There where every group is synced.
    syncer: Option<Syncer>,
    rx: Receiver<Vec<Append<T>>>,
    before_publish: B,
    on_durable: F,
    stop: Arc<AtomicBool>,
    heartbeat: Heartbeat,
    group: Group<T>,
    /// When the last group was begun to be written.
    committed_at: Instant,
    /// Published, not yet synced (`Durability::Interval`); what is left over where the disk refuses.
    unsynced: Vec<(u64, T)>,
    sync_due: Option<Instant>,
}

impl<T, B, F> Drop for Worker<T, B, F> {
    fn drop(&mut self) {
        if let Some(mut writer) = self.writer.take() {
            if let Err(error) = writer.close() {
                tracing::warn!(%error, "giving back the reserved space of the event log");
            }
            self.log.shared.put_writer(writer);
        }
    }
}

impl<T: Send, B: FnMut(&[(u64, T)]), F: FnMut(Vec<(u64, T)>)> Worker<T, B, F> {
    fn run(mut self) -> Vec<T> {
        match self.work() {
            Ok(()) => Vec::new(),
            Err(GaveUp) => self.left_over(),
        }
    }

    fn work(&mut self) -> Result<(), GaveUp> {
        while let Some(events) = self.receive()? {
            let mut bytes = self.add(events)?;
            self.await_company();
            while bytes < MAX_GROUP_BYTES {
                let Ok(more) = self.rx.try_recv() else { break };
                bytes += self.add(more)?;
            }
            self.commit()?;
            self.sync_if_due()?;
            self.heartbeat.beat();
        }
        self.sync_unsynced()
    }

    /// Waits until the group before is [`super::Limits::group_window`] old: a lone event goes at once, a
    /// stream of them goes in groups.
    fn await_company(&self) {
        let window = self.log.shared.limits().group_window;
        let left = window.saturating_sub(self.committed_at.elapsed());
        if !left.is_zero() {
            thread::sleep(left);
        }
    }

    /// Waits for events; syncs in between where an interval ends. `None` when all senders are gone.
    fn receive(&mut self) -> Result<Option<Vec<Append<T>>>, GaveUp> {
        loop {
            let Some(due) = self.sync_due else {
                return Ok(self.rx.recv().ok());
            };
            match self
                .rx
                .recv_timeout(due.saturating_duration_since(Instant::now()))
            {
                Ok(events) => return Ok(Some(events)),
                Err(RecvTimeoutError::Disconnected) => return Ok(None),
                Err(RecvTimeoutError::Timeout) => self.sync_unsynced()?,
            }
        }
    }

    /// Puts events into the group, and commits it where a segment ends. Returns their bytes.
    fn add(&mut self, events: Vec<Append<T>>) -> Result<usize, GaveUp> {
        let mut bytes = 0;
        let mut events = events.into_iter();
        while let Some(event) = events.next() {
            if event.frame.get(event.seq_span.clone()).is_none() {
                tracing::error!(did = %event.did, "event without a sequence number to replace, left out");
                continue;
            }
            let seq = match number(event.given_seq, self.group.next_seq()) {
                Ok(seq) => seq,
                Err(error) => {
                    tracing::error!(did = %event.did, %error, "event left out of the event log");
                    continue;
                }
            };
            let length = spliced_len(&event, seq);
            if length > MAX_FRAME_BYTES {
                tracing::error!(
                    did = %event.did, origin = ?event.origin, length,
                    "event with a frame above {MAX_FRAME_BYTES} bytes, left out: no consumer takes it"
                );
                continue;
            }
            let total = (wire::header_len(length) + length) as u64;
            if self.writer().is_full(self.group.bytes(), total) {
                let turned = self.commit().and_then(|()| self.rotate());
                if turned.is_err() {
                    let rest = std::iter::once(event).chain(events);
                    self.unsynced.extend(self.group.take());
                    self.unsynced.extend(rest.map(|event| (0, event.payload)));
                    return Err(GaveUp);
                }
            }
            let start = self.writer().offset;
            self.group.push(event, seq, length, start);
            self.log.shared.options.metrics.durable_lag.inc();
            bytes += total as usize;
        }
        Ok(bytes)
    }

    /// Writes the group, publishes it, and reports it.
    fn commit(&mut self) -> Result<(), GaveUp> {
        if self.group.is_empty() {
            return Ok(());
        }
        let durability = self.log.shared.options.durability;
        let began = Instant::now();
        self.committed_at = began;
        self.persist(|worker| {
            let Worker {
                writer,
                group,
                syncer,
                ..
            } = worker;
            let Some(writer) = writer else { return Ok(()) };
            writer.append(group, syncer.as_ref()).inspect_err(|_| {
                if let Err(error) = writer.cut_back() {
                    tracing::debug!(%error, "cutting back a failed append");
                }
            })
        })?;
        let segment = self.log.shared.segments().back().cloned();
        if let Some(segment) = segment {
            segment.note_accounts(self.group.accounts());
        }
        (self.before_publish)(self.group.payloads());
        self.log.shared.publish(self.group.next_seq() - 1);
        let metrics = &self.log.shared.options.metrics;
        metrics.write_seconds.observe(began.elapsed().as_secs_f64());
        metrics.durable_lag.sub(self.group.len() as i64);
        let payloads = self.group.take();
        if let Durability::Interval(interval) = durability {
            self.unsynced.extend(payloads);
            self.sync_due
                .get_or_insert_with(|| Instant::now() + interval);
        } else {
            (self.on_durable)(payloads);
        }
        Ok(())
    }

    fn sync_if_due(&mut self) -> Result<(), GaveUp> {
        match self.sync_due {
            Some(due) if due <= Instant::now() => self.sync_unsynced(),
            _ => Ok(()),
        }
    }

    /// Syncs what was published without a sync, and reports it.
    fn sync_unsynced(&mut self) -> Result<(), GaveUp> {
        self.sync_due = None;
        if self.log.shared.options.durability == Durability::None || !self.writer().is_unsynced() {
            return Ok(());
        }
        self.persist(|worker| {
            let first = worker.writer().first;
            let segment = worker.log.shared.segment_of(first);
            let writer = worker.writer_mut();
            writer.sync_appended().inspect_err(|_| {
                let _changes = segment.as_ref().map(|segment| segment.changes.lock());
                if let Err(error) = writer.rewrite_unsynced() {
                    tracing::debug!(%error, "rewriting after a failed sync");
                }
            })
        })?;
        let payloads = std::mem::take(&mut self.unsynced);
        if !payloads.is_empty() {
            (self.on_durable)(payloads);
        }
        Ok(())
    }

    /// Ends the segment and begins the next one.
    fn rotate(&mut self) -> Result<(), GaveUp> {
        self.sync_unsynced()?;
        self.persist(|worker| {
            let writer = worker.writer_mut();
            writer.close()?;
            writer.follow()
        })?;
        let shared = &self.log.shared;
        let first = self.writer().first;
        let segment = Arc::new(Segment::open_with(shared.dir.clone(), first, Vec::new()));
        let mut segments = shared.segments_mut();
        if let Some(ended) = segments.back() {
            ended.close(first - 1);
        }
        segments.push_back(segment);
        drop(segments);
        shared.bells.retention.ring();
        shared.bells.redaction.ring();
        Ok(())
    }

    /// Does `work` until it succeeds. Reports the first failure, and the recovery.
    fn persist(&mut self, mut work: impl FnMut(&mut Self) -> io::Result<()>) -> Result<(), GaveUp> {
        let mut pause = MIN_RETRY_PAUSE;
        let mut failing = false;
        while let Err(error) = work(self) {
            let shared = &self.log.shared;
            shared.options.metrics.write_errors.inc();
            shared
                .lacks_room
                .store(is_lack_of_room(&error), Ordering::Release);
            if failing {
                tracing::debug!(%error, "the event log still cannot write");
            } else {
                failing = true;
                self.report_failure(&error);
            }
            // Retention may make the room that is lacking.
            self.log.shared.bells.retention.ring();
            if self.stop.load(Ordering::Acquire) {
                return Err(GaveUp);
            }
            self.heartbeat.wait(|| thread::park_timeout(pause));
            pause = (pause * 2).min(MAX_RETRY_PAUSE);
        }
        if failing {
            self.log.shared.lacks_room.store(false, Ordering::Release);
            self.log.shared.health.send_replace(Health::Good);
            tracing::debug!("the event log writes again; no event was lost");
        }
        Ok(())
    }

    /// The relay's health examiner logs the failure; a line here would be a second one.
    fn report_failure(&self, error: &io::Error) {
        let shared = &self.log.shared;
        let reason = error.to_string();
        tracing::debug!(folder = %shared.dir.display(), %error, "the event log cannot write");
        let since = SystemTime::now();
        shared
            .health
            .send_replace(Health::Failing { since, reason });
    }

    /// Payloads of everything that is not durable, the queue included.
    fn left_over(&mut self) -> Vec<T> {
        let mut left: Vec<T> = Vec::new();
        left.extend(self.unsynced.drain(..).map(|(_, payload)| payload));
        left.extend(self.group.take().into_iter().map(|(_, payload)| payload));
        while let Ok(events) = self.rx.try_recv() {
            left.extend(events.into_iter().map(|event| event.payload));
        }
        left
    }

    fn writer(&self) -> &Writer {
        self.writer
            .as_ref()
            .expect("the writer stays until the worker is dropped")
    }

    fn writer_mut(&mut self) -> &mut Writer {
        self.writer
            .as_mut()
            .expect("the writer stays until the worker is dropped")
    }
}

/// Length of an event's frame once `seq` is in it.
fn spliced_len<T>(event: &Append<T>, seq: u64) -> usize {
    event.frame.len() - event.seq_span.len() + frame::uint_len(seq)
}
