//! Who of the connections waits for its client, and since when: those make room where places run out.
//! Promises that a connection whose request is being answered is never among them; one whose request trickles in counts from
//! its beginning.

use std::collections::BTreeMap;
use std::pin::Pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};
use std::time::Instant;

use bytes::Bytes;
use hyper::body::{Body, Frame, Incoming, SizeHint};
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;

/// The connections of a listener.
#[derive(Debug, Default)]
pub(super) struct Visits {
    next: AtomicU64,
    shared: Arc<Shared>,
}

#[derive(Debug, Default)]
struct Shared {
    /// By the beginning of their wait, and their number.
    waiting: Mutex<BTreeMap<(Instant, u64), CancellationToken>>,
    one_more: Notify,
}

/// A connection.
#[derive(Debug)]
pub(super) struct Visit {
    number: u64,
    shared: Arc<Shared>,
    /// When the wait for the present request began.
    since: Mutex<Instant>,
    end: CancellationToken,
}

impl Visits {
    /// A connection that waits for its first request.
    pub fn begin(&self) -> Arc<Visit> {
        let visit = Visit {
            number: self.next.fetch_add(1, Ordering::Relaxed),
            shared: self.shared.clone(),
            since: Mutex::new(Instant::now()),
            end: CancellationToken::new(),
        };
        visit.waits();
        Arc::new(visit)
    }

    /// Ends the connection that waits for longest; false where none waits.
    pub fn end_longest_wait(&self) -> bool {
        let longest = self.shared.waiting().pop_first();
        longest.inspect(|(_, end)| end.cancel()).is_some()
    }

    /// Returns once a connection has begun to wait since the last call, or does so.
    pub async fn one_waits(&self) {
        self.shared.one_more.notified().await;
    }
}

impl Shared {
    fn waiting(&self) -> MutexGuard<'_, BTreeMap<(Instant, u64), CancellationToken>> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Visit {
    /// The request's head is there.
    pub fn is_served(&self) {
        let key = (*self.since(), self.number);
        self.shared.waiting().remove(&key);
    }

    /// The answer is there: from now on the client is waited for.
    pub fn waits_anew(&self) {
        *self.since() = Instant::now();
        self.waits();
    }

    /// The rest of the request is waited for.
    fn waits(&self) {
        let key = (*self.since(), self.number);
        self.shared.waiting().insert(key, self.end.clone());
        self.shared.one_more.notify_one();
    }

    /// Returns once it is to make room.
    pub async fn ended(&self) {
        self.end.cancelled().await;
    }

    fn since(&self) -> MutexGuard<'_, Instant> {
        self.since.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Visit {
    fn drop(&mut self) {
        self.is_served();
    }
}

/// A request's body. While bytes of it are awaited, its connection waits.
pub(super) struct Arriving {
    body: Incoming,
    visit: Arc<Visit>,
}

impl Arriving {
    pub fn new(body: Incoming, visit: Arc<Visit>) -> Arriving {
        Arriving { body, visit }
    }
}

impl Body for Arriving {
    type Data = Bytes;
    type Error = hyper::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, hyper::Error>>> {
        let polled = Pin::new(&mut self.body).poll_frame(cx);
        match polled {
            Poll::Pending => self.visit.waits(),
            Poll::Ready(_) => self.visit.is_served(),
        }
        polled
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}
