//! The event stream of one host, as a PDS serves it on `subscribeRepos`: an append-only list of
//! frames with cursors, and the faults of a connection (stall, hang-up, frames that are never sent
//! again). Knows nothing of what the frames say; their sequence numbers are the caller's.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, RwLock};
use std::time::{Duration, Instant};

use axum::extract::ws::{Message, WebSocket};
use bytes::Bytes;
use futures_util::{FutureExt, SinkExt, StreamExt};
use tokio::sync::watch;

use crate::atproto::frame;

/// Frames written to a socket before it is flushed.
const FRAMES_PER_FLUSH: usize = 64;
/// How long a subscriber may take to read what is written to it before it is dropped.
const WRITE_PATIENCE: Duration = Duration::from_secs(60);

/// What a host does at one place of its stream.
#[derive(Clone, Debug)]
pub enum Step {
    /// An event with its sequence number; sent again to a subscriber whose cursor lies before it.
    /// `tag` is reported to the [`Stopwatch`] when the frame is first written to a socket.
    Event {
        seq: i64,
        frame: Bytes,
        tag: Option<usize>,
    },
    /// A message that is in no log: whoever is connected gets it, once.
    Once(Bytes),
    /// Nothing is sent for this long, once; what the subscriber says is not read either.
    Stall(Duration),
    /// The connection ends here without a word, once.
    HangUp,
}

impl Step {
    /// The frame that is sent, if one is.
    pub fn frame(&self) -> Option<&Bytes> {
        match self {
            Step::Event { frame, .. } | Step::Once(frame) => Some(frame),
            Step::Stall(_) | Step::HangUp => None,
        }
    }
}

struct Entry {
    step: Step,
    taken: AtomicBool,
}

/// When each tagged event was first written to a socket, in nanoseconds since the start.
#[derive(Debug)]
pub struct Stopwatch {
    start: Instant,
    sent: Vec<AtomicU64>,
}

impl Stopwatch {
    /// A stopwatch for tags `0..events`.
    pub fn new(events: usize) -> Self {
        Stopwatch {
            start: Instant::now(),
            sent: (0..events).map(|_| AtomicU64::new(0)).collect(),
        }
    }

    /// Nanoseconds since the start.
    pub fn now(&self) -> u64 {
        u64::try_from(self.start.elapsed().as_nanos()).unwrap_or(u64::MAX)
    }

    fn sent(&self, tag: usize) {
        if let Some(slot) = self.sent.get(tag) {
            // Only the first write counts: a frame sent again after a reconnect keeps its time.
            let _ =
                slot.compare_exchange(0, self.now().max(1), Ordering::Relaxed, Ordering::Relaxed);
        }
    }

    /// When the event `tag` was written, `None` if it was not.
    pub fn sent_at(&self, tag: usize) -> Option<u64> {
        self.sent
            .get(tag)
            .map(|slot| slot.load(Ordering::Relaxed))
            .filter(|at| *at != 0)
    }
}

/// What subscribers wait for: the length of the list, and the generation of the connections.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Head {
    len: usize,
    generation: u64,
}

/// The stream of one host.
pub struct Feed {
    entries: RwLock<Vec<Entry>>,
    head: watch::Sender<Head>,
    subscribers: watch::Sender<usize>,
    accepted: watch::Sender<u64>,
    stopwatch: Option<Arc<Stopwatch>>,
}

impl Feed {
    /// An empty stream.
    pub fn new(stopwatch: Option<Arc<Stopwatch>>) -> Arc<Self> {
        Arc::new(Feed {
            entries: RwLock::new(Vec::new()),
            head: watch::Sender::new(Head::default()),
            subscribers: watch::Sender::new(0),
            accepted: watch::Sender::new(0),
            stopwatch,
        })
    }

    /// Appends steps; subscribers get them at once.
    pub fn extend(&self, steps: impl IntoIterator<Item = Step>) {
        let mut entries = self.entries.write().expect("no holder of this lock panics");
        entries.extend(steps.into_iter().map(|step| Entry {
            step,
            taken: AtomicBool::new(false),
        }));
        let len = entries.len();
        drop(entries);
        self.head.send_modify(|head| head.len = len);
    }

    /// Appends one step.
    pub fn push(&self, step: Step) {
        self.extend([step]);
    }

    /// Ends every connection without a close frame.
    pub fn hang_up(&self) {
        self.head.send_modify(|head| head.generation += 1);
    }

    /// Forgets every event and ends the connections: the next event may start at 1 again, and an
    /// old cursor lies in the future.
    pub fn restart(&self) {
        self.entries
            .write()
            .expect("no holder of this lock panics")
            .clear();
        self.head.send_modify(|head| {
            *head = Head {
                len: 0,
                generation: head.generation + 1,
            }
        });
    }

    /// Sequence number of the newest event.
    pub fn last_seq(&self) -> Option<i64> {
        let entries = self.entries.read().expect("no holder of this lock panics");
        entries.iter().rev().find_map(Entry::seq)
    }

    /// The number of connected subscribers, as a value to wait on.
    pub fn subscribers(&self) -> watch::Receiver<usize> {
        self.subscribers.subscribe()
    }

    /// The number of subscriptions accepted since the start (refused cursors are not), to wait on.
    pub fn accepted(&self) -> watch::Receiver<u64> {
        self.accepted.subscribe()
    }

    /// Serves one subscriber until it leaves, is hung up on or stops reading.
    pub async fn serve(self: Arc<Self>, socket: WebSocket, cursor: Option<i64>) {
        let mut heads = self.head.subscribe();
        let head = *heads.borrow_and_update();
        let mut subscriber = Subscriber {
            feed: &self,
            socket,
            generation: head.generation,
        };
        let Some(mut position) = subscriber.start(cursor, head.len).await else {
            return;
        };
        self.subscribers.send_modify(|count| *count += 1);
        self.accepted.send_modify(|count| *count += 1);
        let _leave = Leave(&self);
        loop {
            let head = *heads.borrow_and_update();
            if head.generation != subscriber.generation
                || !subscriber.send_from(&mut position).await
            {
                return;
            }
            if !subscriber.listen() {
                return;
            }
            if position < heads.borrow().len {
                continue;
            }
            tokio::select! {
                changed = heads.changed() => if changed.is_err() { return },
                message = subscriber.socket.next() => if is_over(message) { return },
            }
        }
    }

    fn first_after(&self, cursor: i64) -> usize {
        let entries = self.entries.read().expect("no holder of this lock panics");
        entries
            .iter()
            .position(|entry| entry.seq().is_some_and(|seq| seq > cursor))
            .unwrap_or(entries.len())
    }

    fn oldest_seq(&self) -> Option<i64> {
        self.entries
            .read()
            .expect("no holder of this lock panics")
            .iter()
            .find_map(Entry::seq)
    }

    /// The steps at `position`, at most one flush of frames, or one interruption alone.
    fn batch(&self, position: usize) -> (usize, Batch) {
        let entries = self.entries.read().expect("no holder of this lock panics");
        let mut frames = Vec::new();
        let mut at = position;
        while let Some(entry) = entries.get(at).filter(|_| frames.len() < FRAMES_PER_FLUSH) {
            let first = || !entry.taken.swap(true, Ordering::Relaxed);
            match &entry.step {
                Step::Event { frame, tag, .. } => frames.push((frame.clone(), *tag)),
                Step::Once(frame) if first() => frames.push((frame.clone(), None)),
                // An interruption comes after what was sent before it.
                Step::Stall(_) | Step::HangUp
                    if !frames.is_empty() && !entry.taken.load(Ordering::Relaxed) =>
                {
                    break;
                }
                Step::Stall(time) if first() => return (at + 1, Batch::Stall(*time)),
                Step::HangUp if first() => return (at + 1, Batch::HangUp),
                Step::Once(_) | Step::Stall(_) | Step::HangUp => {}
            }
            at += 1;
        }
        (at, Batch::Frames(frames))
    }
}

impl Entry {
    fn seq(&self) -> Option<i64> {
        match self.step {
            Step::Event { seq, .. } => Some(seq),
            Step::Once(_) | Step::Stall(_) | Step::HangUp => None,
        }
    }
}

/// Whether a message from the subscriber ends the connection. Pings are answered by the socket
/// itself while it is read.
fn is_over(message: Option<Result<Message, axum::Error>>) -> bool {
    matches!(message, None | Some(Ok(Message::Close(_)) | Err(_)))
}

enum Batch {
    Frames(Vec<(Bytes, Option<usize>)>),
    Stall(Duration),
    HangUp,
}

/// Counts a subscriber out, however its task ends.
struct Leave<'a>(&'a Feed);

impl Drop for Leave<'_> {
    fn drop(&mut self) {
        self.0.subscribers.send_modify(|count| *count -= 1);
    }
}

struct Subscriber<'a> {
    feed: &'a Feed,
    socket: WebSocket,
    generation: u64,
}

impl Subscriber<'_> {
    /// Where the stream starts for this cursor; `None` after an error frame.
    async fn start(&mut self, cursor: Option<i64>, len: usize) -> Option<usize> {
        let Some(cursor) = cursor else {
            return Some(len);
        };
        if cursor > self.feed.last_seq().unwrap_or(0) {
            let refusal = frame::encode_error("FutureCursor", Some("Cursor in the future."));
            let _ = self.socket.send(Message::Binary(refusal.into())).await;
            let _ = self.socket.send(Message::Close(None)).await;
            return None;
        }
        if self
            .feed
            .oldest_seq()
            .is_some_and(|oldest| cursor.saturating_add(1) < oldest)
        {
            let text = "Requested cursor exceeded limit. Possibly missing events";
            let info = frame::encode_info("OutdatedCursor", Some(text));
            self.socket.send(Message::Binary(info.into())).await.ok()?;
        }
        Some(self.feed.first_after(cursor))
    }

    /// Reads what the subscriber said meanwhile, so that pings are answered between two batches;
    /// false when it left.
    fn listen(&mut self) -> bool {
        while let Some(message) = self.socket.next().now_or_never() {
            if is_over(message) {
                return false;
            }
        }
        true
    }

    /// Sends what there is from `position` on; false when the connection is over.
    async fn send_from(&mut self, position: &mut usize) -> bool {
        let (next, batch) = self.feed.batch(*position);
        *position = next;
        match batch {
            Batch::Frames(frames) => {
                matches!(
                    tokio::time::timeout(WRITE_PATIENCE, self.write(frames)).await,
                    Ok(Ok(()))
                )
            }
            Batch::Stall(time) => {
                tokio::time::sleep(time).await;
                true
            }
            Batch::HangUp => false,
        }
    }

    async fn write(&mut self, frames: Vec<(Bytes, Option<usize>)>) -> Result<(), axum::Error> {
        for (frame, tag) in frames {
            if let (Some(tag), Some(stopwatch)) = (tag, &self.feed.stopwatch) {
                stopwatch.sent(tag);
            }
            self.socket.feed(Message::Binary(frame)).await?;
        }
        self.socket.flush().await
    }
}
