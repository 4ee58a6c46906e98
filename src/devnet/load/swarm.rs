//! The servers of a run: one for each host, and a PLC directory. They serve what was prepared and
//! answer what a relay asks of them; they decide nothing.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use axum::extract::{Path, Query, State, WebSocketUpgrade};
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use axum::{Json, Router};
use serde::Deserialize;
use serde_json::json;
use tokio::time::Instant;

use super::account::Profile;
use super::metronome::Metronome;
use super::prepare::{Act, Due, Prepared};
use crate::devnet::check::{WaitError, Watcher};
use crate::devnet::feed::{Feed, Step, Stopwatch};
use crate::devnet::server::{Places, Server};

/// How long a host that starts its sequence again waits for its events to come out, and for the
/// relay to come back.
const RESTART_PATIENCE: Duration = Duration::from_secs(120);

/// The relay did not do its part.
#[derive(Debug, thiserror::Error)]
pub enum SwarmError {
    #[error("the relay did not subscribe to host {host} within {waited:?}")]
    NotSubscribed { host: usize, waited: Duration },
    #[error("{0}")]
    Wait(#[from] WaitError),
    #[error("the task of a host ended early: {0}")]
    Task(#[from] tokio::task::JoinError),
}

/// The running servers; dropping them ends the run.
pub struct Swarm {
    hosts: Vec<(Arc<Feed>, Server)>,
    directory: Server,
    stopwatch: Arc<Stopwatch>,
}

struct Accounts {
    profiles: Vec<Profile>,
    by_did: HashMap<String, usize>,
    hosts: Vec<String>,
}

#[derive(Deserialize)]
struct Subscribe {
    cursor: Option<i64>,
}

#[derive(Deserialize)]
struct Account {
    did: String,
}

impl Swarm {
    /// Starts the servers of a prepared run on free local ports.
    pub async fn start(prepared: &Prepared) -> std::io::Result<Swarm> {
        Swarm::start_at(prepared, Places::Loopback).await
    }

    /// Starts the servers of a prepared run: the directory at the first place, then the hosts.
    pub async fn start_at(prepared: &Prepared, mut places: Places) -> std::io::Result<Swarm> {
        let directory_place = places.next();
        let stopwatch = Arc::new(Stopwatch::new(prepared.options.events));
        let mut hosts = Vec::new();
        for _ in 0..prepared.scripts.len() {
            let feed = Feed::new(Some(stopwatch.clone()));
            let server = Server::start_at(host(feed.clone()), places.next()).await?;
            hosts.push((feed, server));
        }
        let profiles = prepared.profiles.clone();
        let by_did = profiles
            .iter()
            .enumerate()
            .map(|(index, profile)| (profile.did.to_string(), index))
            .collect();
        let urls = hosts.iter().map(|(_, server)| server.url()).collect();
        let accounts = Arc::new(Accounts {
            profiles,
            by_did,
            hosts: urls,
        });
        let directory = Server::start_at(directory(accounts), directory_place).await?;
        Ok(Swarm {
            hosts,
            directory,
            stopwatch,
        })
    }

    /// Base URL of the PLC directory.
    pub fn plc_url(&self) -> String {
        self.directory.url()
    }

    /// Base URLs of the hosts.
    pub fn host_urls(&self) -> Vec<String> {
        self.hosts.iter().map(|(_, server)| server.url()).collect()
    }

    /// When the events were written to the hosts' sockets.
    pub fn stopwatch(&self) -> &Arc<Stopwatch> {
        &self.stopwatch
    }

    /// Waits until every host has a subscriber.
    pub async fn subscribed(&self, patience: Duration) -> Result<(), SwarmError> {
        let deadline = Instant::now() + patience;
        for (host, (feed, _)) in self.hosts.iter().enumerate() {
            let mut subscribers = feed.subscribers();
            let wait = subscribers.wait_for(|count| *count > 0);
            if tokio::time::timeout_at(deadline, wait).await.is_err() {
                return Err(SwarmError::NotSubscribed {
                    host,
                    waited: patience,
                });
            }
        }
        Ok(())
    }

    /// Sends the first event of every account.
    pub fn introduce(&self, prepared: &Prepared) {
        for ((feed, _), introductions) in self.hosts.iter().zip(&prepared.introductions) {
            feed.extend(introductions.iter().cloned());
        }
    }

    /// Sends the run, `rate` events a second over all hosts, 0 for all at once; ends when
    /// everything was given to the hosts' sockets.
    pub async fn play(
        &self,
        prepared: &Prepared,
        rate: f64,
        consumer: &Watcher,
    ) -> Result<(), SwarmError> {
        let scripts = self.hosts.iter().zip(&prepared.scripts).enumerate();
        let mut players: Vec<Player<'_>> = scripts
            .map(|(host, ((feed, _), script))| Player {
                host: host as u32,
                feed,
                script,
                consumer,
            })
            .collect();
        if rate <= 0.0 {
            let all = players.iter_mut().map(|player| player.play(usize::MAX));
            return futures_util::future::try_join_all(all).await.map(|_| ());
        }
        let metronome = Metronome::start(rate);
        let start = Instant::now();
        while players.iter().any(|player| !player.script.is_empty()) {
            metronome.tick().await;
            let due = (start.elapsed().as_secs_f64() * rate) as usize;
            for player in &mut players {
                player.play(due).await?;
            }
        }
        Ok(())
    }

    /// Ends the connections to every host; subscribers come back with their cursors.
    pub fn hang_up(&self) {
        self.hosts.iter().for_each(|(feed, _)| feed.hang_up());
    }
}

impl Drop for Swarm {
    fn drop(&mut self) {
        self.directory.stop();
        for (feed, server) in &self.hosts {
            server.stop();
            feed.hang_up();
        }
    }
}

/// A host and what it has yet to do.
struct Player<'a> {
    host: u32,
    feed: &'a Feed,
    script: &'a [Due],
    consumer: &'a Watcher,
}

impl Player<'_> {
    /// Does what is due up to a place of the run.
    async fn play(&mut self, place: usize) -> Result<(), SwarmError> {
        while let Some(next) = self.script.first().filter(|next| next.place <= place) {
            if let Act::Restart { complete } = next.act {
                restart(self.host, self.feed, complete, self.consumer).await?;
                self.script = &self.script[1..];
                continue;
            }
            let ready = self.script.iter().take_while(|next| next.place <= place);
            let steps: Vec<Step> = ready.map_while(|next| step(&next.act)).collect();
            self.script = &self.script[steps.len()..];
            self.feed.extend(steps);
        }
        Ok(())
    }
}

fn step(act: &Act) -> Option<Step> {
    match act {
        Act::Step(step) => Some(step.clone()),
        Act::Restart { .. } => None,
    }
}

async fn restart(
    host: u32,
    feed: &Feed,
    complete: usize,
    consumer: &Watcher,
) -> Result<(), SwarmError> {
    consumer
        .wait_for(RESTART_PATIENCE, |checker| {
            checker.complete_of(host) >= complete
        })
        .await?;
    let mut accepted = feed.accepted();
    let before = *accepted.borrow_and_update();
    feed.restart();
    let back = accepted.wait_for(|count| *count > before);
    match tokio::time::timeout(RESTART_PATIENCE, back).await {
        Ok(_) => Ok(()),
        Err(_) => Err(SwarmError::NotSubscribed {
            host: host as usize,
            waited: RESTART_PATIENCE,
        }),
    }
}

fn host(feed: Arc<Feed>) -> Router {
    Router::new()
        .route(
            "/xrpc/com.atproto.sync.subscribeRepos",
            get(subscribe_repos),
        )
        .route("/xrpc/com.atproto.sync.getRepoStatus", get(repo_status))
        .route(
            "/xrpc/com.atproto.server.describeServer",
            get(describe_server),
        )
        .route("/xrpc/_health", get(health))
        .with_state(feed)
}

async fn subscribe_repos(
    State(feed): State<Arc<Feed>>,
    Query(query): Query<Subscribe>,
    upgrade: WebSocketUpgrade,
) -> Response {
    upgrade.on_upgrade(move |socket| feed.serve(socket, query.cursor))
}

/// Every account of a load run is active all the time.
async fn repo_status(Query(account): Query<Account>) -> Response {
    Json(json!({ "did": account.did, "active": true })).into_response()
}

async fn describe_server() -> Response {
    Json(json!({ "did": "did:web:localhost", "availableUserDomains": [".load.test"] }))
        .into_response()
}

async fn health() -> Response {
    Json(json!({ "version": concat!("load ", env!("CARGO_PKG_VERSION")) })).into_response()
}

fn directory(accounts: Arc<Accounts>) -> Router {
    Router::new()
        .route("/{did}", get(document))
        .route("/_health", get(health))
        .with_state(accounts)
}

async fn document(State(accounts): State<Arc<Accounts>>, Path(did): Path<String>) -> Response {
    let Some(profile) = accounts
        .by_did
        .get(&did)
        .and_then(|index| accounts.profiles.get(*index))
    else {
        let message = format!("DID not registered: {did}");
        return (StatusCode::NOT_FOUND, Json(json!({ "message": message }))).into_response();
    };
    let key = profile.key.did_key();
    Json(json!({
        "@context": ["https://www.w3.org/ns/did/v1", "https://w3id.org/security/multikey/v1"],
        "id": did,
        "alsoKnownAs": [format!("at://{}", profile.handle)],
        "verificationMethod": [{
            "id": format!("{did}#atproto"),
            "type": "Multikey",
            "controller": did,
            "publicKeyMultibase": key.trim_start_matches("did:key:"),
        }],
        "service": [{
            "id": "#atproto_pds",
            "type": "AtprotoPersonalDataServer",
            "serviceEndpoint": accounts.hosts[profile.host as usize],
        }],
    }))
    .into_response()
}
