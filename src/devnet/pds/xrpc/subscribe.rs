//! com.atproto.sync.subscribeRepos: the event stream over a WebSocket, with cursors and their
//! errors as the reference PDS answers them. Frames from subscribers are ignored, pings answered.

use std::time::Duration;

use axum::extract::State;
use axum::extract::ws::rejection::WebSocketUpgradeRejection;
use axum::extract::ws::{CloseFrame, Message, WebSocket, WebSocketUpgrade, close_code};
use axum::response::Response;
use bytes::Bytes;
use futures_util::stream::SplitSink;
use futures_util::{SinkExt, StreamExt};
use serde::Deserialize;
use tokio::sync::watch;

use super::input::{Params, XrpcError};
use crate::devnet::pds::events::{Start, StreamState};
use crate::devnet::pds::{Pds, frames};

/// Frames handed to the socket between two flushes.
const BATCH: usize = 64;
/// Pause between pings (reference PDS).
const HEARTBEAT: Duration = Duration::from_secs(30);

#[derive(Deserialize)]
pub(super) struct Subscribe {
    cursor: Option<String>,
}

/// The subscriber is gone.
struct Gone;

impl From<axum::Error> for Gone {
    fn from(_: axum::Error) -> Self {
        Gone
    }
}

pub(super) async fn subscribe_repos(
    State(pds): State<Pds>,
    Params(params): Params<Subscribe>,
    upgrade: Result<WebSocketUpgrade, WebSocketUpgradeRejection>,
) -> Result<Response, XrpcError> {
    let upgrade = upgrade
        .map_err(|error| XrpcError::new(error.status(), "InvalidRequest", error.body_text()))?;
    let cursor = params.cursor.map(|text| text.parse::<i64>()).transpose();
    // Subscribed before the cursor is looked up, and both before the subscriber hears that it is connected: no event
    // after that is missed.
    let mut cut = pds.inner.events.subscribe();
    let generation = cut.borrow().generation;
    let start = cursor.map(|cursor| pds.inner.events.start(cursor));
    Ok(upgrade.on_upgrade(move |socket| async move {
        let state = cut.clone();
        let serving = async {
            match start {
                Ok(start) => serve(&pds, socket, start, state).await,
                Err(_) => {
                    refuse(
                        socket,
                        frames::error("InvalidRequest", "Error: cursor must be an integer"),
                    )
                    .await
                }
            }
        };
        tokio::select! {
            _ = serving => {}
            _ = cut.wait_for(|state| state.generation != generation) => {}
        }
    }))
}

async fn refuse(mut socket: WebSocket, frame: Bytes) -> Result<(), Gone> {
    socket.send(Message::Binary(frame)).await?;
    let close = CloseFrame {
        code: close_code::POLICY,
        reason: "".into(),
    };
    socket.send(Message::Close(Some(close))).await?;
    // The subscriber's close ends the connection in order.
    while socket.recv().await.is_some_and(|message| message.is_ok()) {}
    Ok(())
}

async fn serve(
    pds: &Pds,
    mut socket: WebSocket,
    start: Start,
    state: watch::Receiver<StreamState>,
) -> Result<(), Gone> {
    let position = match start {
        Start::Future => {
            return refuse(
                socket,
                frames::error("FutureCursor", "Cursor in the future."),
            )
            .await;
        }
        Start::Outdated(position) => {
            let words = "Requested cursor exceeded limit. Possibly missing events";
            socket
                .send(Message::Binary(frames::info("OutdatedCursor", words)))
                .await?;
            position
        }
        Start::At(position) => position,
    };
    let (sink, mut stream) = socket.split();
    tokio::select! {
        result = send(pds, sink, position, state) => result,
        _ = async { while stream.next().await.is_some_and(|message| message.is_ok()) {} } => Err(Gone),
    }
}

async fn send(
    pds: &Pds,
    mut sink: SplitSink<WebSocket, Message>,
    mut position: u64,
    mut state: watch::Receiver<StreamState>,
) -> Result<(), Gone> {
    let mut heartbeat = tokio::time::interval(HEARTBEAT);
    heartbeat.tick().await;
    loop {
        let stalled = state.borrow_and_update().stalled;
        let batch = if stalled {
            Vec::new()
        } else {
            pds.inner.events.from(position, BATCH)
        };
        if let Some(last) = batch.last() {
            position = last.position + 1;
            for event in batch {
                sink.feed(Message::Binary(event.frame)).await?;
            }
            sink.flush().await?;
            continue;
        }
        tokio::select! {
            changed = state.changed() => changed.map_err(|_| Gone)?,
            _ = heartbeat.tick(), if !stalled => sink.send(Message::Ping(Bytes::new())).await?,
        }
    }
}
