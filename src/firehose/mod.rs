//! The firehose: streams of the log's events for consumers.
//! Promises every event from a consumer's cursor on, once and in order, as the log holds it. [`socket`] serves connections,
//! [`repos`] is the one stream there is; another stream brings a source and an encoder.

use axum::Router;
use axum::extract::{Request, State};
use axum::response::Response;
use axum::routing::any;

pub mod repos;
pub mod socket;

pub use socket::{ConsumerInfo, Consumers, FirehoseOptions, Metrics, Settings};

use crate::eventlog::EventLog;
use crate::systemd::sockets::Stored;
use crate::systemd::store::DescriptorStore;
use repos::Repos;
use socket::Server;

/// Route of the subscription.
pub const SUBSCRIBE_REPOS: &str = "/xrpc/com.atproto.sync.subscribeRepos";

/// The firehose of a log. Clones share it.
#[derive(Debug, Clone)]
pub struct Firehose {
    server: Server,
    repos: Repos,
}

impl Firehose {
    /// The firehose of `log`. Call it within the runtime that is to serve it.
    pub fn new(log: EventLog, options: FirehoseOptions) -> Firehose {
        Firehose {
            server: Server::new(log.subscribe(), options),
            repos: Repos::new(log),
        }
    }

    /// The same, with the consumers of the previous process. Its own consumers are handed over to the next one.
    pub async fn resume(
        log: EventLog,
        options: FirehoseOptions,
        store: Option<DescriptorStore>,
        stored: Stored,
    ) -> Firehose {
        let (head, repos) = (log.subscribe(), Repos::new(log));
        let resuming = repos.clone();
        let resume = move |saved: socket::Saved<'_>| resuming.resume(saved.offered);
        let (server, resumed) = Server::resume(head, options, store, stored, resume).await;
        resumed
            .into_iter()
            .for_each(|consumer| server.serve(consumer));
        Firehose { server, repos }
    }

    /// Applies other settings. Consumers that are connected stay.
    pub fn apply(&self, settings: &Settings) {
        self.server.apply(settings);
    }

    /// The registry of connected consumers.
    pub fn consumers(&self) -> &Consumers {
        self.server.consumers()
    }

    /// See [`Server::shutdown`].
    pub async fn shutdown(&self) {
        self.server.shutdown().await;
    }
}

/// The route by itself.
pub fn router(firehose: Firehose) -> Router {
    Router::new()
        .route(SUBSCRIBE_REPOS, any(subscribe_repos))
        .with_state(firehose)
}

/// `GET /xrpc/com.atproto.sync.subscribeRepos?cursor=N`. Takes all methods, to refuse the others itself.
async fn subscribe_repos(State(firehose): State<Firehose>, request: Request) -> Response {
    firehose.server.subscribe(&firehose.repos, request)
}
