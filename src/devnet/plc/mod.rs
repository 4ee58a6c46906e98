//! A PLC directory in memory: takes operations by the rules of did:plc, serves documents, logs and
//! the export over plain HTTP. Can be loaded with real audit logs and show every DID as of another
//! time. Keeps nothing on disk and has no rate limits.

mod document;
mod http;
mod log;
mod operation;

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock, RwLock, RwLockReadGuard, RwLockWriteGuard};

use serde_json::Value;
use tokio::sync::watch;

use self::log::Log;
pub use self::log::{AuditEntry, AuditError, LogError};
pub use self::operation::{LegacyCreate, Operation, OperationError, Service, Tombstone, Update};
use crate::devnet::server::{Place, Server};
use crate::devnet::timestamp::Timestamp;

/// Most entries `GET /export` answers at once (did-method-plc server).
const MAX_EXPORT: usize = 1_000;

/// A directory; clones are the same directory.
#[derive(Clone, Debug, Default)]
pub struct Plc {
    inner: Arc<Inner>,
}

#[derive(Debug, Default)]
struct Inner {
    state: RwLock<State>,
    server: OnceLock<Server>,
    outage: AtomicBool,
    hanging: watch::Sender<bool>,
    lookups: AtomicU64,
}

#[derive(Debug, Default)]
struct State {
    logs: HashMap<String, Log>,
    /// Every operation in order of arrival: its DID and place in that DID's log.
    arrivals: Vec<(String, usize)>,
    as_of: Option<Timestamp>,
    rewrites: Vec<(String, String)>,
}

/// Why there is no document.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum LookupError {
    #[error("DID not registered: {0}")]
    NotRegistered(String),
    #[error("DID not available: {0}")]
    Tombstoned(String),
}

impl Plc {
    /// An empty directory that listens on a free port of 127.0.0.1.
    pub async fn start() -> std::io::Result<Self> {
        Plc::start_at(Place::default()).await
    }

    /// An empty directory that listens at a place.
    pub async fn start_at(place: Place) -> std::io::Result<Self> {
        let plc = Plc::default();
        let server = Server::start_at(http::router(plc.clone()), place).await?;
        plc.inner.server.set(server).expect("set once, here");
        Ok(plc)
    }

    /// Its base URL, or nothing for a directory that was not started.
    pub fn url(&self) -> String {
        self.inner.server.get().map(Server::url).unwrap_or_default()
    }

    /// Ends the server; a directory that is not stopped serves as long as the runtime.
    pub fn stop(&self) {
        if let Some(server) = self.inner.server.get() {
            server.stop();
        }
    }

    fn read(&self) -> RwLockReadGuard<'_, State> {
        self.inner.state.read().expect("no writer panics")
    }

    fn write(&self) -> RwLockWriteGuard<'_, State> {
        self.inner.state.write().expect("no writer panics")
    }

    /// Takes a new operation for `did`; returns its CID.
    pub fn submit(&self, did: &str, operation: Operation) -> Result<String, LogError> {
        operation.check_incoming()?;
        let mut state = self.write();
        let mut log = state.logs.remove(did).unwrap_or_default();
        // The machine's clock may step back; a log's times never do.
        let last = log.last_arrival().map(|entry| entry.created_at);
        let at = last.map_or(Timestamp::now(), |last| last.max(Timestamp::now()));
        let result = log.append(did, operation, at);
        if result.is_ok() {
            state.arrivals.push((did.to_owned(), log.len() - 1));
        }
        if log.len() > 0 {
            state.logs.insert(did.to_owned(), log);
        }
        result
    }

    /// Loads the JSON of `GET /:did/log/audit` as the whole log of its DID, after checking it by
    /// the rules; returns the DID.
    pub fn load_audit_log(&self, json: &[u8]) -> Result<String, AuditError> {
        let audit: Vec<AuditEntry> = serde_json::from_slice(json)?;
        let (did, log) = Log::from_audit(&audit)?;
        let mut state = self.write();
        state.arrivals.retain(|(other, _)| *other != did);
        state
            .arrivals
            .extend((0..log.len()).map(|index| (did.clone(), index)));
        state.logs.insert(did.clone(), log);
        Ok(did)
    }

    /// Shows every DID as it stood at `at` from now on; `None`: as it stands.
    pub fn set_as_of(&self, at: Option<Timestamp>) {
        self.write().as_of = at;
    }

    /// Writes `to` in documents where a log says `from` as a service's endpoint.
    pub fn rewrite_endpoint(&self, from: &str, to: &str) {
        self.write().rewrites.push((from.to_owned(), to.to_owned()));
    }

    /// While `true`, every request is answered with 503.
    pub fn set_outage(&self, outage: bool) {
        self.inner.outage.store(outage, Ordering::SeqCst);
    }

    /// While `true`, every request waits.
    pub fn set_hanging(&self, hanging: bool) {
        self.inner.hanging.send_replace(hanging);
    }

    /// How many documents were asked for over HTTP.
    pub fn lookups(&self) -> u64 {
        self.inner.lookups.load(Ordering::SeqCst)
    }

    /// The document of `did` as served now.
    pub fn document(&self, did: &str) -> Result<Value, LookupError> {
        let state = self.read();
        state.document(did, state.as_of)
    }

    /// The document of `did` as it stood at `at`.
    pub fn document_at(&self, did: &str, at: Timestamp) -> Result<Value, LookupError> {
        self.read().document(did, Some(at))
    }

    /// The content of the operation that stands for `did`.
    pub fn content(&self, did: &str) -> Result<Update, LookupError> {
        let state = self.read();
        state.content(did, state.as_of)
    }

    /// CID of the operation that stands for `did`: the `prev` of the next one.
    pub fn head(&self, did: &str) -> Option<String> {
        let state = self.read();
        let log = state.logs.get(did)?;
        log.current(state.as_of).map(|entry| entry.cid.clone())
    }

    /// The operations that stand for `did`.
    pub fn operations(&self, did: &str) -> Result<Vec<Operation>, LookupError> {
        let state = self.read();
        let log = state.log(did)?;
        Ok(log
            .standing(state.as_of)
            .map(|entry| entry.operation.clone())
            .collect())
    }

    /// The whole log of `did`, nullified operations included.
    pub fn audit_log(&self, did: &str) -> Result<Vec<AuditEntry>, LookupError> {
        let state = self.read();
        let log = state.log(did)?;
        Ok(log
            .visible(state.as_of)
            .map(|entry| entry.audit(did, state.as_of))
            .collect())
    }

    /// Up to `count` operations that arrived after `after`, in order of arrival.
    fn export(&self, after: Option<Timestamp>, count: usize) -> Vec<AuditEntry> {
        let state = self.read();
        let entries = state.arrivals.iter().filter_map(|(did, index)| {
            let entry = state.logs.get(did)?.entry(*index)?;
            let wanted = after.is_none_or(|after| entry.created_at > after);
            wanted.then(|| entry.audit(did, state.as_of))
        });
        entries.take(count.min(MAX_EXPORT)).collect()
    }
}

impl State {
    fn log(&self, did: &str) -> Result<&Log, LookupError> {
        let log = self
            .logs
            .get(did)
            .filter(|log| log.visible(self.as_of).next().is_some());
        log.ok_or_else(|| LookupError::NotRegistered(did.to_owned()))
    }

    fn content(&self, did: &str, at: Option<Timestamp>) -> Result<Update, LookupError> {
        let not_registered = || LookupError::NotRegistered(did.to_owned());
        let current = self
            .logs
            .get(did)
            .and_then(|log| log.current(at))
            .ok_or_else(not_registered)?;
        current
            .operation
            .content()
            .ok_or_else(|| LookupError::Tombstoned(did.to_owned()))
    }

    fn document(&self, did: &str, at: Option<Timestamp>) -> Result<Value, LookupError> {
        let content = self.content(did, at)?;
        Ok(document::document(did, &content, |endpoint| {
            let rewrite = self
                .rewrites
                .iter()
                .rev()
                .find(|(from, _)| from == endpoint);
            rewrite.map_or(endpoint, |(_, to)| to).to_owned()
        }))
    }
}
