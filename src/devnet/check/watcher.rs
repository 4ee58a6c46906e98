//! A consumer of the firehose that reads everything into a [`Checker`], reconnects with its cursor when the connection ends,
//! and measures the latency of events.

use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use futures_util::StreamExt;
use tokio::net::TcpStream;
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio_tungstenite::tungstenite::Message;
use tokio_tungstenite::tungstenite::protocol::WebSocketConfig;
use tokio_tungstenite::{MaybeTlsStream, WebSocketStream, connect_async_with_config};
use tokio_util::sync::CancellationToken;

use super::{Checker, Ledger, Report};
use crate::devnet::feed::Stopwatch;

/// Pause before the next attempt to connect.
const RECONNECT_PAUSE: Duration = Duration::from_millis(20);
/// Longest message accepted: longer than any relay may send, so that one that is too long is reported.
const MAX_MESSAGE_BYTES: usize = 16 * 1024 * 1024;

/// How a watcher reads.
#[derive(Clone, Debug, Default)]
pub struct WatcherOptions {
    /// `ws://host:port` of the relay.
    pub relay: String,
    /// Where to start; `None` is live.
    pub cursor: Option<i64>,
    /// Whose times the events' latencies are counted from.
    pub stopwatch: Option<Arc<Stopwatch>>,
}

/// What was waited for did not happen in time.
#[derive(Debug, thiserror::Error)]
#[error("after {waited:?}: {report}")]
pub struct WaitError {
    pub waited: Duration,
    pub report: Box<Report>,
}

/// Time from the host's write to the consumer's read, one entry an event, in microseconds.
#[derive(Clone, Debug, Default)]
pub struct Latencies(Vec<u32>);

impl Latencies {
    /// The latency that `percent` of the events stay within, in microseconds.
    pub fn percentile(&self, percent: f64) -> Option<u32> {
        let mut sorted = self.0.clone();
        sorted.sort_unstable();
        let rank = (percent / 100.0 * sorted.len() as f64).ceil() as usize;
        sorted.get(rank.saturating_sub(1)).copied()
    }

    /// How many events were measured.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether nothing was measured.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

/// What a consumer found.
#[derive(Debug)]
pub struct Outcome {
    pub checker: Checker,
    pub latencies: Latencies,
}

struct Shared {
    checker: Mutex<Checker>,
    latencies: Mutex<Latencies>,
    received: watch::Sender<u64>,
    connected: watch::Sender<bool>,
    options: WatcherOptions,
    stop: CancellationToken,
}

/// A running consumer.
pub struct Watcher {
    shared: Arc<Shared>,
    task: JoinHandle<()>,
}

impl Watcher {
    /// Starts to connect, and to read.
    pub fn start(ledger: Arc<Ledger>, options: WatcherOptions) -> Watcher {
        let shared = Arc::new(Shared {
            checker: Mutex::new(Checker::new(ledger)),
            latencies: Mutex::default(),
            received: watch::Sender::new(0),
            connected: watch::Sender::new(false),
            options,
            stop: CancellationToken::new(),
        });
        let task = tokio::spawn(run(shared.clone()));
        Watcher { shared, task }
    }

    /// Waits until the first connection stands.
    pub async fn connected(&self, patience: Duration) -> Result<(), WaitError> {
        let mut connected = self.shared.connected.subscribe();
        let wait = connected.wait_for(|connected| *connected);
        match tokio::time::timeout(patience, wait).await {
            Ok(_) => Ok(()),
            Err(_) => Err(self.gave_up(patience)),
        }
    }

    /// Waits until the checker is in a state, looked at after every message.
    pub async fn wait_for(
        &self,
        patience: Duration,
        mut reached: impl FnMut(&Checker) -> bool,
    ) -> Result<(), WaitError> {
        let mut received = self.shared.received.subscribe();
        let wait = async { while !reached(&self.checker()) && received.changed().await.is_ok() {} };
        tokio::time::timeout(patience, wait)
            .await
            .map_err(|_| self.gave_up(patience))
    }

    /// Waits until every event that is in the ledger now and must come out did.
    pub async fn wait_complete(
        &self,
        ledger: &Ledger,
        patience: Duration,
    ) -> Result<(), WaitError> {
        let expected = ledger.forward();
        self.wait_for(patience, |checker| checker.complete() >= expected)
            .await
    }

    /// The checker as it is now; the consumer stands still while it is held.
    pub fn checker(&self) -> MutexGuard<'_, Checker> {
        self.shared
            .checker
            .lock()
            .expect("no holder of this lock panics")
    }

    /// Forgets the latencies measured so far, where a measurement starts.
    pub fn restart_latencies(&self) {
        *self
            .shared
            .latencies
            .lock()
            .expect("no holder of this lock panics") = Latencies::default();
    }

    /// Ends the consumer and gives what it found.
    pub async fn stop(self) -> Outcome {
        self.shared.stop.cancel();
        // The task only ends by the token; a panic in it is worth a panic here.
        self.task.await.expect("the consumer does not panic");
        let shared = Arc::into_inner(self.shared).expect("the task has ended");
        Outcome {
            checker: shared
                .checker
                .into_inner()
                .expect("no holder of this lock panics"),
            latencies: shared
                .latencies
                .into_inner()
                .expect("no holder of this lock panics"),
        }
    }

    fn gave_up(&self, waited: Duration) -> WaitError {
        WaitError {
            waited,
            report: Box::new(self.checker().report()),
        }
    }
}

async fn run(shared: Arc<Shared>) {
    let stop = shared.stop.clone();
    let read = async {
        loop {
            connection(&shared).await;
            tokio::time::sleep(RECONNECT_PAUSE).await;
        }
    };
    tokio::select! {
        () = stop.cancelled() => {}
        () = read => {}
    }
}

/// Subscribes to a relay's firehose, from an event on or live; `None` where it does not answer.
pub(crate) async fn subscribe(
    relay: &str,
    cursor: Option<i64>,
) -> Option<WebSocketStream<MaybeTlsStream<TcpStream>>> {
    let cursor = cursor.map_or(String::new(), |seq| format!("?cursor={seq}"));
    let url = format!("{relay}/xrpc/com.atproto.sync.subscribeRepos{cursor}");
    let config = WebSocketConfig::default()
        .max_message_size(Some(MAX_MESSAGE_BYTES))
        .max_frame_size(Some(MAX_MESSAGE_BYTES));
    let connected = connect_async_with_config(url, Some(config), true).await;
    connected.ok().map(|(socket, _)| socket)
}

async fn connection(shared: &Shared) {
    let resumes = *shared.connected.borrow();
    let last = shared
        .checker
        .lock()
        .expect("no holder of this lock panics")
        .last_seq();
    let cursor = last.or(shared.options.cursor);
    let Some(mut socket) = subscribe(&shared.options.relay, cursor).await else {
        return;
    };
    if resumes {
        shared
            .checker
            .lock()
            .expect("no holder of this lock panics")
            .resumed();
    }
    shared.connected.send_replace(true);
    while let Some(Ok(message)) = socket.next().await {
        if let Message::Binary(frame) = message {
            shared.take(&frame);
        }
    }
}

impl Shared {
    fn take(&self, frame: &[u8]) {
        let tag = self
            .checker
            .lock()
            .expect("no holder of this lock panics")
            .observe(frame);
        let sent = tag
            .zip(self.options.stopwatch.as_ref())
            .and_then(|(tag, watch)| Some((watch.sent_at(tag)?, watch.now())));
        if let Some((sent, now)) = sent {
            let micros = u32::try_from(now.saturating_sub(sent) / 1_000).unwrap_or(u32::MAX);
            self.latencies
                .lock()
                .expect("no holder of this lock panics")
                .0
                .push(micros);
        }
        self.received.send_modify(|count| *count += 1);
    }
}
