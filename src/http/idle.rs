//! Idle connections: those that wait for their client, and since when. The longest idle one makes room where places run out.
//! Promises that a connection whose request is being answered is never idle; one whose request trickles in counts from
//! its beginning.

use std::collections::BTreeMap;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll};
use std::time::Instant;

use bytes::Bytes;
use hyper::body::{Body, Frame, Incoming, SizeHint};
use parking_lot::Mutex;
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;

/// The idle connections of a listener.
#[derive(Debug, Default)]
pub(super) struct IdleConnections {
    next: AtomicU64,
    shared: Arc<Shared>,
}

#[derive(Debug, Default)]
struct Shared {
    /// By the time they became idle, and their number.
    idle: Mutex<BTreeMap<(Instant, u64), CancellationToken>>,
    one_more: Notify,
}

/// A connection.
#[derive(Debug)]
pub(super) struct Connection {
    number: u64,
    shared: Arc<Shared>,
    /// When the wait for the current request began.
    since: Mutex<Instant>,
    close: CancellationToken,
}

impl IdleConnections {
    /// Adds a connection, which waits for its first request.
    pub fn enter(&self) -> Arc<Connection> {
        let connection = Connection {
            number: self.next.fetch_add(1, Ordering::Relaxed),
            shared: self.shared.clone(),
            since: Mutex::new(Instant::now()),
            close: CancellationToken::new(),
        };
        connection.enter_idle();
        Arc::new(connection)
    }

    /// Closes the connection that has been idle for longest; false where none is idle.
    pub fn close_longest(&self) -> bool {
        let longest = self.shared.idle.lock().pop_first();
        longest.inspect(|(_, close)| close.cancel()).is_some()
    }

    /// Returns once a connection became idle since the last call.
    pub async fn one_more(&self) {
        self.shared.one_more.notified().await;
    }
}

impl Connection {
    /// The request's head has arrived.
    pub fn set_busy(&self) {
        let key = (*self.since.lock(), self.number);
        self.shared.idle.lock().remove(&key);
    }

    /// The answer is there: from now on the connection waits for its client.
    pub fn set_idle(&self) {
        *self.since.lock() = Instant::now();
        self.enter_idle();
    }

    /// The connection waits for the rest of the request.
    fn enter_idle(&self) {
        let key = (*self.since.lock(), self.number);
        self.shared.idle.lock().insert(key, self.close.clone());
        self.shared.one_more.notify_one();
    }

    /// Returns once the connection is to make room.
    pub async fn closed(&self) {
        self.close.cancelled().await;
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        self.set_busy();
    }
}

/// A request's body. While bytes of it are awaited, its connection is idle.
pub(super) struct AwaitedBody {
    body: Incoming,
    connection: Arc<Connection>,
}

impl AwaitedBody {
    pub fn new(body: Incoming, connection: Arc<Connection>) -> AwaitedBody {
        AwaitedBody { body, connection }
    }
}

impl Body for AwaitedBody {
    type Data = Bytes;
    type Error = hyper::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, hyper::Error>>> {
        let polled = Pin::new(&mut self.body).poll_frame(cx);
        match polled {
            Poll::Pending => self.connection.enter_idle(),
            Poll::Ready(_) => self.connection.set_busy(),
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
