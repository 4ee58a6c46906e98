//! Reads a firehose into a [`Snapshot`], reconnects with its cursor when the connection ends, and serves the snapshot over
//! HTTP.

use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use axum::extract::State;
use axum::routing::{get, post};
use axum::{Json, Router};
use bytes::Bytes;
use futures_util::{SinkExt, StreamExt};
use tokio_tungstenite::tungstenite::Message;
use tokio_util::sync::CancellationToken;

use super::{AccountSnapshot, Report, Snapshot};
use crate::devnet::check::subscribe;
use crate::devnet::server::{Place, Server};

/// Pause before the next attempt to connect.
const RECONNECT_PAUSE: Duration = Duration::from_millis(100);
/// Pause between pings, and how many may go unanswered: a relay that lost power closes no connection.
const PING: Duration = Duration::from_secs(1);
const UNANSWERED: u32 = 15;

/// What to follow, and where to answer.
#[derive(Clone, Debug, Default)]
pub struct FollowerOptions {
    /// `ws://host:port` of the relay.
    pub relay: String,
    /// Where to start; `None` is live.
    pub cursor: Option<i64>,
    /// Where `/report`, `/accounts` and `/forget-pause` are answered.
    pub place: Place,
}

/// A consumer that follows a relay; it ends when it is dropped.
#[derive(Debug)]
pub struct Follower {
    shared: Arc<Shared>,
    server: Server,
    stop: CancellationToken,
}

#[derive(Debug, Default)]
struct Shared {
    state: Mutex<Following>,
}

#[derive(Debug, Default)]
struct Following {
    snapshot: Snapshot,
    /// When the last event came.
    last: Option<Instant>,
}

impl Follower {
    /// Starts to connect, and to answer.
    pub async fn start(options: FollowerOptions) -> std::io::Result<Follower> {
        let shared = Arc::new(Shared::default());
        let server = Server::start_at(router(shared.clone()), options.place).await?;
        let stop = CancellationToken::new();
        let follow = follow(shared.clone(), options.relay, options.cursor);
        let stopped = stop.clone();
        tokio::spawn(async move { stopped.run_until_cancelled(follow).await });
        Ok(Follower {
            shared,
            server,
            stop,
        })
    }

    /// Base URL of what it answers.
    pub fn url(&self) -> String {
        self.server.url()
    }

    /// What happened so far.
    pub fn report(&self) -> Report {
        self.shared.report()
    }

    /// The accounts as the firehose left them.
    pub fn accounts(&self) -> Vec<AccountSnapshot> {
        self.shared.lock().snapshot.accounts()
    }
}

impl Drop for Follower {
    fn drop(&mut self) {
        self.stop.cancel();
        self.server.stop();
    }
}

fn router(shared: Arc<Shared>) -> Router {
    Router::new()
        .route("/report", get(report))
        .route("/accounts", get(accounts))
        .route("/forget-pause", post(forget_pause))
        .with_state(shared)
}

async fn report(State(shared): State<Arc<Shared>>) -> Json<Report> {
    Json(shared.report())
}

async fn accounts(State(shared): State<Arc<Shared>>) -> Json<Vec<AccountSnapshot>> {
    Json(shared.lock().snapshot.accounts())
}

async fn forget_pause(State(shared): State<Arc<Shared>>) {
    let mut state = shared.lock();
    state.snapshot.report.longest_pause_millis = 0;
    state.last = Some(Instant::now());
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Following> {
        self.state.lock().expect("no holder of this lock panics")
    }

    /// A pause that lasts counts as well.
    fn report(&self) -> Report {
        let mut state = self.lock();
        state.pause();
        state.snapshot.report().clone()
    }
}

impl Following {
    fn pause(&mut self) {
        let Some(last) = self.last else { return };
        let millis = u64::try_from(last.elapsed().as_millis()).unwrap_or(u64::MAX);
        let longest = &mut self.snapshot.report.longest_pause_millis;
        *longest = (*longest).max(millis);
    }

    fn take(&mut self, frame: &[u8], resumed: bool) {
        self.pause();
        self.last = Some(Instant::now());
        self.snapshot.take(frame, resumed);
    }
}

async fn follow(shared: Arc<Shared>, relay: String, start: Option<i64>) {
    loop {
        connection(&shared, &relay, start).await;
        shared.lock().snapshot.report.connected = false;
        tokio::time::sleep(RECONNECT_PAUSE).await;
    }
}

async fn connection(shared: &Shared, relay: &str, start: Option<i64>) {
    let report = shared.report();
    let last = (report.events > 0).then_some(report.last_seq);
    let Some(mut socket) = subscribe(relay, last.or(start)).await else {
        return;
    };
    let mut resumed = last.is_some();
    {
        let mut state = shared.lock();
        state.snapshot.report.connected = true;
        state.snapshot.report.connections += 1;
    }
    let mut clock = tokio::time::interval(PING);
    let mut unanswered = 0;
    while unanswered < UNANSWERED {
        tokio::select! {
            message = socket.next() => match message {
                Some(Ok(message)) => {
                    unanswered = 0;
                    if let Message::Binary(frame) = message {
                        shared.lock().take(&frame, std::mem::take(&mut resumed));
                    }
                }
                Some(Err(_)) | None => return,
            },
            _ = clock.tick() => {
                unanswered += 1;
                if socket.send(Message::Ping(Bytes::new())).await.is_err() {
                    return;
                }
            }
        }
    }
}
