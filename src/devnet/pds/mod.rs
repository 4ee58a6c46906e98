//! A PDS in memory: accounts, real repositories with signed commits, a firehose, XRPC over plain
//! HTTP. What it emits is correct; faults are put in from outside (`emit_raw`, `stall`,
//! `disconnect`, `restart_seq`, `set_offline`). Checks no lexicons, stores no blobs.

mod account;
mod events;
pub mod frames;
mod repo;
mod traffic;
mod xrpc;

use std::collections::{BTreeMap, HashMap};
use std::ops::Bound;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, RwLock, RwLockReadGuard, RwLockWriteGuard};
use std::time::Duration;

use bytes::Bytes;
use data_encoding::{BASE64, HEXLOWER};
use rand::rngs::StdRng;
use rand::{RngCore, SeedableRng};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

pub use self::account::{Account, AccountStatus, RepoHead, RepoState};
pub use self::events::Event;
use self::events::EventStream;
use self::frames::Stamp;
pub use self::repo::{Action, Commit, Op, RepoError, Repository, Swap, SyncState, Write};
pub use self::traffic::Traffic;
use crate::atproto::cid::Cid;
use crate::atproto::did::Did;
use crate::atproto::handle::Handle;
use crate::atproto::tid::Tid;
use crate::devnet::directory::{self, Directory, DirectoryError, DocumentError, RemoteError};
use crate::devnet::keys::{Curve, SigningKey};
use crate::devnet::plc::{Operation, Service, Update};
use crate::devnet::server::{Place, Server};

/// Longest a relay may take to answer requestCrawl.
const CRAWL_TIMEOUT: Duration = Duration::from_secs(10);

/// How a PDS is set up.
#[derive(Clone, Debug)]
pub struct PdsOptions {
    /// Handles are made under this domain, e.g. `pds1.test`.
    pub domain: String,
    /// Seeds keys, passwords and tokens.
    pub seed: u64,
    /// Tells the TIDs of this PDS from others'.
    pub clock_id: u16,
    /// How long events can be asked for again.
    pub backfill: Duration,
    /// Bytes of events kept at most.
    pub backfill_bytes: usize,
    /// The PDS's key in the PLC log of its accounts is of this curve.
    pub rotation_curve: Curve,
}

/// A PDS; clones are the same PDS.
#[derive(Clone, Debug)]
pub struct Pds {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    domain: String,
    clock_id: u16,
    plc: Directory,
    rotation_key: SigningKey,
    rng: Mutex<StdRng>,
    created: AtomicUsize,
    accounts: RwLock<Accounts>,
    sessions: RwLock<HashMap<String, Did>>,
    events: EventStream,
    offline: AtomicBool,
    server: OnceLock<Server>,
    /// The PDSes of this network by URL, for migration over HTTP.
    peers: RwLock<Vec<std::sync::Weak<Inner>>>,
    traffic: Traffic,
}

#[derive(Debug, Default)]
struct Accounts {
    by_did: BTreeMap<Did, Arc<Mutex<Hosted>>>,
    by_handle: HashMap<String, Did>,
}

/// An account as its PDS holds it.
#[derive(Debug)]
struct Hosted {
    handle: String,
    password: String,
    status: AccountStatus,
    repo: Repository,
}

/// Why a PDS refuses.
#[derive(Debug, thiserror::Error)]
pub enum PdsError {
    #[error("Could not find repo for DID: {0}")]
    NoAccount(String),
    #[error("Repo has been {}: {did}", status.as_str().unwrap_or("activated"))]
    Status { did: Did, status: AccountStatus },
    #[error("Handle already taken: {0}")]
    HandleTaken(String),
    #[error("Input/handle must be a valid handle: {0}")]
    Handle(String),
    #[error("the account is already on this PDS: {0}")]
    AlreadyHere(Did),
    #[error("no PDS of this network is at {0}")]
    NoPds(String),
    #[error(transparent)]
    Repo(#[from] RepoError),
    #[error("the PLC directory does not take the operation: {0}")]
    Plc(#[from] DirectoryError),
    #[error("the other PDS does not take the account: {0}")]
    Peer(#[from] RemoteError),
    #[error("the other PDS asks for a PLC operation that is none: {0}")]
    Operation(serde_json::Error),
    #[error("the PLC directory has no document: {0}")]
    Document(#[from] DocumentError),
}

/// Why a relay was not asked to crawl.
#[derive(Debug, thiserror::Error)]
pub enum CrawlError {
    #[error("{relay} cannot be asked to crawl: {cause}")]
    Http {
        relay: String,
        cause: reqwest::Error,
    },
    #[error("{relay} refuses to crawl: {status} {body}")]
    Refused {
        relay: String,
        status: u16,
        body: String,
    },
}

/// What a write made.
#[derive(Clone, Debug)]
pub struct Written {
    /// `at://did/collection/rkey` of the first op.
    pub uri: String,
    /// The record after the first op; `None` after a delete.
    pub record: Option<Cid>,
    pub commit: Cid,
    pub rev: Tid,
    /// Every op of the commit.
    pub ops: Vec<Op>,
}

impl Pds {
    /// A PDS without accounts.
    pub async fn start(
        plc: impl Into<Directory>,
        options: PdsOptions,
        place: Place,
    ) -> std::io::Result<Self> {
        let mut rng = StdRng::seed_from_u64(options.seed);
        let inner = Inner {
            domain: options.domain,
            clock_id: options.clock_id,
            plc: plc.into(),
            rotation_key: SigningKey::generate(options.rotation_curve, &mut rng),
            rng: Mutex::new(rng),
            created: AtomicUsize::new(0),
            accounts: RwLock::default(),
            sessions: RwLock::default(),
            events: EventStream::new(options.backfill, options.backfill_bytes),
            offline: AtomicBool::new(false),
            server: OnceLock::new(),
            peers: RwLock::default(),
            traffic: Traffic::default(),
        };
        let pds = Pds {
            inner: Arc::new(inner),
        };
        let server = Server::start_at(xrpc::router(&pds), place).await?;
        pds.inner.server.set(server).expect("set once, here");
        Ok(pds)
    }

    fn server(&self) -> &Server {
        self.inner.server.get().expect("set before start returns")
    }

    /// Ends the server and its subscriptions; a PDS that is not stopped serves as long as the runtime.
    pub fn stop(&self) {
        self.server().stop();
        self.disconnect();
    }

    /// Its base URL: `http://127.0.0.1:port`, or the one it was told.
    pub fn url(&self) -> String {
        self.server().url()
    }

    /// Host and port of its URL.
    pub fn host(&self) -> String {
        self.server().host()
    }

    /// Handles are made under this domain.
    pub fn domain(&self) -> &str {
        &self.inner.domain
    }

    /// `did:key` with which this PDS signs PLC operations.
    pub fn rotation_key(&self) -> String {
        self.inner.rotation_key.did_key()
    }

    fn accounts(&self) -> RwLockReadGuard<'_, Accounts> {
        self.inner.accounts.read().expect("no holder panics")
    }

    fn accounts_mut(&self) -> RwLockWriteGuard<'_, Accounts> {
        self.inner.accounts.write().expect("no holder panics")
    }

    fn hosted(&self, did: &Did) -> Result<Arc<Mutex<Hosted>>, PdsError> {
        let accounts = self.accounts();
        accounts
            .by_did
            .get(did)
            .cloned()
            .ok_or_else(|| PdsError::NoAccount(did.to_string()))
    }

    fn new_key(&self, curve: Curve) -> SigningKey {
        SigningKey::generate(
            curve,
            &mut *self.inner.rng.lock().expect("no holder panics"),
        )
    }

    fn new_secret(&self) -> String {
        let mut bytes = [0; 16];
        self.inner
            .rng
            .lock()
            .expect("no holder panics")
            .fill_bytes(&mut bytes);
        HEXLOWER.encode(&bytes)
    }
}

/// Accounts: creation, status, identity, migration.
impl Pds {
    /// Creates an account with a new password. Any valid handle is taken, DNS is not asked. Emits
    /// `#identity`, `#account`, `#commit` and `#sync`.
    pub fn create_account(&self, handle: &str) -> Result<Account, PdsError> {
        self.create_account_with(handle, None, None)
    }

    /// As [`Pds::create_account`], with a signing key of `curve` (by default secp256k1 and P-256 by
    /// turns) and a password.
    pub fn create_account_with(
        &self,
        handle: &str,
        curve: Option<Curve>,
        password: Option<String>,
    ) -> Result<Account, PdsError> {
        let handle = self.free_handle(handle)?;
        let key = self.new_key(curve.unwrap_or_else(|| self.next_curve()));
        let operation = self
            .operation(&handle, &key.did_key(), None)
            .sign(&self.inner.rotation_key);
        let did = operation.genesis_did();
        self.inner.plc.submit(&did, operation)?;
        let did = Did::parse(&did).expect("a genesis operation makes a valid did:plc");
        let (repo, commit) = Repository::create(did.clone(), key, self.inner.clock_id);
        let password = password.unwrap_or_else(|| self.new_secret());
        let sync = repo.sync_state();
        let hosted = Hosted::new(&handle, &password, AccountStatus::Active, repo);
        let guard = lock(&hosted);
        self.take_in(&did, &handle, &hosted)?;
        self.emit_identity(&did, Some(&handle));
        self.emit_account(&did, AccountStatus::Active);
        self.emit(&did, |stamp| frames::commit(stamp, &did, &commit));
        self.emit(&did, |stamp| frames::sync(stamp, &did, &sync));
        drop(guard);
        Ok(self.account(did, handle, password))
    }

    /// An account with a new session.
    fn account(&self, did: Did, handle: String, password: String) -> Account {
        Account {
            access_token: self.new_session(&did),
            did,
            handle,
            password,
        }
    }

    fn next_curve(&self) -> Curve {
        let created = self.inner.created.fetch_add(1, Ordering::Relaxed);
        if created.is_multiple_of(2) {
            Curve::K256
        } else {
            Curve::P256
        }
    }

    /// The normalised handle, if nobody here has it.
    fn free_handle(&self, handle: &str) -> Result<String, PdsError> {
        let handle = handle.to_ascii_lowercase();
        Handle::parse(&handle).map_err(|error| PdsError::Handle(error.to_string()))?;
        if self.accounts().by_handle.contains_key(&handle) {
            return Err(PdsError::HandleTaken(handle));
        }
        Ok(handle)
    }

    fn take_in(
        &self,
        did: &Did,
        handle: &str,
        hosted: &Arc<Mutex<Hosted>>,
    ) -> Result<(), PdsError> {
        let mut accounts = self.accounts_mut();
        if accounts
            .by_handle
            .get(handle)
            .is_some_and(|holder| holder != did)
        {
            return Err(PdsError::HandleTaken(handle.to_owned()));
        }
        accounts.by_did.insert(did.clone(), hosted.clone());
        accounts.by_handle.insert(handle.to_owned(), did.clone());
        Ok(())
    }

    /// An unsigned PLC operation that puts an account on this PDS.
    fn operation(&self, handle: &str, signing_key: &str, prev: Option<String>) -> Operation {
        let pds = Service {
            kind: "AtprotoPersonalDataServer".to_owned(),
            endpoint: self.url(),
        };
        Operation::Update(Update {
            rotation_keys: vec![self.inner.rotation_key.did_key()],
            verification_methods: BTreeMap::from([("atproto".to_owned(), signing_key.to_owned())]),
            also_known_as: vec![format!("at://{handle}")],
            services: BTreeMap::from([("atproto_pds".to_owned(), pds)]),
            prev,
            sig: String::new(),
        })
    }

    /// Puts a new operation for `did` into the directory, signed by `signer`.
    fn update_plc(
        &self,
        did: &Did,
        handle: &str,
        signing_key: &str,
        signer: &SigningKey,
    ) -> Result<(), PdsError> {
        let prev = self.inner.plc.head(did.as_str());
        let operation = self.operation(handle, signing_key, prev).sign(signer);
        self.inner.plc.submit(did.as_str(), operation)?;
        Ok(())
    }

    /// A new bearer token for `did`.
    pub fn new_session(&self, did: &Did) -> String {
        let token = self.new_secret();
        self.inner
            .sessions
            .write()
            .expect("no holder panics")
            .insert(token.clone(), did.clone());
        token
    }

    /// Whose bearer token it is.
    fn session(&self, token: &str) -> Option<Did> {
        self.inner
            .sessions
            .read()
            .expect("no holder panics")
            .get(token)
            .cloned()
    }

    /// A new session for a DID or handle with its password.
    pub fn log_in(&self, identifier: &str, password: &str) -> Option<Account> {
        let did = self.find(identifier)?;
        let hosted = self.hosted(&did).ok()?;
        let hosted = lock(&hosted);
        if hosted.password != password {
            return None;
        }
        let handle = hosted.handle.clone();
        Some(self.account(did, handle, password.to_owned()))
    }

    /// The DID of a DID or handle that is hosted here.
    pub fn find(&self, identifier: &str) -> Option<Did> {
        let accounts = self.accounts();
        match Did::parse(identifier) {
            Ok(did) => accounts.by_did.contains_key(&did).then_some(did),
            Err(_) => accounts
                .by_handle
                .get(&identifier.to_ascii_lowercase())
                .cloned(),
        }
    }

    /// Turns the account off at its owner's wish. Emits `#account`.
    pub fn deactivate(&self, did: &Did) -> Result<(), PdsError> {
        self.set_status(did, AccountStatus::Deactivated)
    }

    /// Turns the account off by moderation. Emits `#account`.
    pub fn take_down(&self, did: &Did) -> Result<(), PdsError> {
        self.set_status(did, AccountStatus::Takendown)
    }

    /// Undoes [`Pds::take_down`]. Emits `#account`.
    pub fn reverse_takedown(&self, did: &Did) -> Result<(), PdsError> {
        self.set_status(did, AccountStatus::Active)
    }

    fn set_status(&self, did: &Did, status: AccountStatus) -> Result<(), PdsError> {
        let hosted = self.hosted(did)?;
        let mut hosted = lock(&hosted);
        hosted.status = status;
        self.emit_account(did, status);
        Ok(())
    }

    /// Turns the account on. Emits `#account`, `#identity` and `#sync`.
    pub fn activate(&self, did: &Did) -> Result<(), PdsError> {
        let hosted = self.hosted(did)?;
        let mut hosted = lock(&hosted);
        hosted.status = AccountStatus::Active;
        self.emit_activation(did, &hosted);
        Ok(())
    }

    fn emit_activation(&self, did: &Did, hosted: &Hosted) {
        let sync = hosted.repo.sync_state();
        self.emit_account(did, AccountStatus::Active);
        self.emit_identity(did, Some(&hosted.handle));
        self.emit(did, |stamp| frames::sync(stamp, did, &sync));
    }

    /// Deletes the account and its repository; its DID stays in the directory. Its events leave the
    /// stream, an `#account` is the last one.
    pub fn delete_account(&self, did: &Did) -> Result<(), PdsError> {
        let hosted = self.hosted(did)?;
        let mut hosted = lock(&hosted);
        hosted.status = AccountStatus::Deleted;
        let mut accounts = self.accounts_mut();
        accounts.by_did.remove(did);
        accounts.by_handle.remove(&hosted.handle);
        drop(accounts);
        self.inner
            .sessions
            .write()
            .expect("no holder panics")
            .retain(|_, owner| owner != did);
        self.inner.events.forget(did);
        self.emit_account(did, AccountStatus::Deleted);
        Ok(())
    }

    /// Gives the account another handle, in the directory too. Emits `#identity`.
    pub fn update_handle(&self, did: &Did, handle: &str) -> Result<(), PdsError> {
        let handle = self.free_handle(handle)?;
        let hosted = self.hosted(did)?;
        let mut hosted = lock(&hosted);
        self.update_plc(
            did,
            &handle,
            &hosted.repo.signing_key().did_key(),
            &self.inner.rotation_key,
        )?;
        let mut accounts = self.accounts_mut();
        accounts.by_handle.remove(&hosted.handle);
        accounts.by_handle.insert(handle.clone(), did.clone());
        drop(accounts);
        self.emit_identity(did, Some(&handle));
        hosted.handle = handle;
        Ok(())
    }

    /// Replaces the signing key by one of the other curve, in the directory too, and signs the
    /// repository anew. Emits `#identity` and `#sync`. Returns the new `did:key`.
    pub fn rotate_key(&self, did: &Did) -> Result<String, PdsError> {
        let hosted = self.hosted(did)?;
        let mut hosted = lock(&hosted);
        hosted.active(did)?;
        let key = match hosted.repo.signing_key().curve() {
            Curve::K256 => self.new_key(Curve::P256),
            Curve::P256 => self.new_key(Curve::K256),
        };
        self.update_plc(
            did,
            &hosted.handle,
            &key.did_key(),
            &self.inner.rotation_key,
        )?;
        hosted.repo.resign(key);
        let sync = hosted.repo.sync_state();
        self.emit_identity(did, None);
        self.emit(did, |stamp| frames::sync(stamp, did, &sync));
        Ok(hosted.repo.signing_key().did_key())
    }

    /// Moves the account to another PDS of the network: repository imported there, directory
    /// updated, signed anew and activated there, deactivated here. Its password goes with it.
    /// Returns its session on the new PDS.
    pub fn migrate(&self, did: &Did, to: &Pds) -> Result<Account, PdsError> {
        if Arc::ptr_eq(&self.inner, &to.inner) {
            return Err(PdsError::AlreadyHere(did.clone()));
        }
        let hosted = self.hosted(did)?;
        let mut hosted = lock(&hosted);
        hosted.active(did)?;
        let key = to.new_key(hosted.repo.signing_key().curve());
        let repo =
            Repository::import(did.clone(), key, to.inner.clock_id, &hosted.repo.car(None)?)?;
        let account = to.receive(did, &hosted, repo, &self.inner.rotation_key)?;
        hosted.status = AccountStatus::Deactivated;
        self.emit_account(did, AccountStatus::Deactivated);
        Ok(account)
    }

    /// As [`Pds::migrate`], to a PDS of another process, step by step as people move: the repository
    /// is imported there, the directory is updated here, the account is activated there and
    /// deactivated here. Returns its session on the new PDS.
    pub fn migrate_to(&self, did: &Did, url: &str) -> Result<Value, PdsError> {
        let hosted = self.hosted(did)?;
        let mut hosted = lock(&hosted);
        hosted.active(did)?;
        let import = Import {
            did: did.to_string(),
            handle: hosted.handle.clone(),
            password: hosted.password.clone(),
            car: BASE64.encode(&hosted.repo.car(None)?),
        };
        let answer = directory::post(&format!("{url}/devnet/importAccount"), None, &import)?;
        let imported: Imported = serde_json::from_str(&answer).map_err(PdsError::Operation)?;
        let operation = imported.operation.sign(&self.inner.rotation_key);
        self.inner.plc.submit(did.as_str(), operation)?;
        let activate = format!("{url}/xrpc/com.atproto.server.activateAccount");
        directory::post(&activate, Some(&imported.access_token), &json!({}))?;
        hosted.status = AccountStatus::Deactivated;
        self.emit_account(did, AccountStatus::Deactivated);
        Ok(
            json!({ "did": did.as_str(), "handle": hosted.handle, "accessJwt": imported.access_token }),
        )
    }

    /// Takes in an account of a PDS of another process; it stays deactivated until that has put the
    /// operation returned here into the directory.
    fn import(&self, import: Import) -> Result<Imported, PdsError> {
        let Import {
            did,
            handle,
            password,
            car,
        } = import;
        let did = Did::parse(&did).map_err(|error| RepoError::Import(error.to_string()))?;
        let car = BASE64
            .decode(car.as_bytes())
            .map_err(|error| RepoError::Import(error.to_string()))?;
        let key = self.new_key(self.next_curve());
        let mut repo = Repository::import(did.clone(), key.clone(), self.inner.clock_id, &car)?;
        repo.resign(key.clone());
        let prev = self.inner.plc.head(did.as_str());
        let operation = self.operation(&handle, &key.did_key(), prev);
        let hosted = Hosted::new(&handle, &password, AccountStatus::Deactivated, repo);
        self.take_in(&did, &handle, &hosted)?;
        Ok(Imported {
            operation,
            access_token: self.new_session(&did),
        })
    }

    /// The receiving side of a migration.
    fn receive(
        &self,
        did: &Did,
        from: &Hosted,
        mut repo: Repository,
        old_signer: &SigningKey,
    ) -> Result<Account, PdsError> {
        let (handle, password) = (from.handle.clone(), from.password.clone());
        let new_key = repo.signing_key().clone();
        repo.resign(new_key);
        let key = repo.signing_key().did_key();
        let hosted = Hosted::new(&handle, &password, AccountStatus::Active, repo);
        let guard = lock(&hosted);
        self.take_in(did, &handle, &hosted)?;
        self.update_plc(did, &handle, &key, old_signer)?;
        self.emit_identity(did, None);
        self.emit_activation(did, &guard);
        drop(guard);
        Ok(self.account(did.clone(), handle, password))
    }
}

/// An account on its way to a PDS of another process.
#[derive(Debug, Serialize, Deserialize)]
struct Import {
    did: String,
    handle: String,
    password: String,
    /// The repository, in base64.
    car: String,
}

/// What that PDS answers: the operation that its old PDS has to sign, and a session.
#[derive(Debug, Serialize, Deserialize)]
struct Imported {
    operation: Operation,
    access_token: String,
}

impl Hosted {
    fn new(
        handle: &str,
        password: &str,
        status: AccountStatus,
        repo: Repository,
    ) -> Arc<Mutex<Hosted>> {
        Arc::new(Mutex::new(Hosted {
            handle: handle.to_owned(),
            password: password.to_owned(),
            status,
            repo,
        }))
    }

    fn active(&self, did: &Did) -> Result<(), PdsError> {
        match self.status {
            AccountStatus::Active => Ok(()),
            status => Err(PdsError::Status {
                did: did.clone(),
                status,
            }),
        }
    }

    fn head(&self) -> RepoHead {
        self.repo.head(self.handle.clone(), self.status)
    }

    fn state(&self) -> RepoState {
        RepoState {
            head: self.head(),
            signing_key: self.repo.signing_key().did_key(),
            records: self.repo.records(),
        }
    }
}

fn lock(hosted: &Mutex<Hosted>) -> MutexGuard<'_, Hosted> {
    hosted.lock().expect("no holder panics")
}

/// Traffic.
impl Pds {
    /// Creates accounts until there are `accounts` active ones, and writes into them from now on, so
    /// many records a second; 0 ends it.
    pub fn keep_writing(&self, accounts: usize, rate: f64) -> Result<(), PdsError> {
        let mut active = self.active_accounts().len();
        while active < accounts {
            let number = self.accounts().by_did.len();
            self.create_account(&format!("user{number}.{}", self.domain()))?;
            active += 1;
        }
        self.inner.traffic.set(Arc::downgrade(&self.inner), rate);
        Ok(())
    }

    /// Records written by [`Pds::keep_writing`] so far.
    pub fn written(&self) -> u64 {
        self.inner.traffic.written()
    }

    fn active_accounts(&self) -> Vec<Did> {
        let heads = self.heads(None, usize::MAX).into_iter();
        let active = heads.filter(|head| head.status == AccountStatus::Active);
        active.map(|head| head.did).collect()
    }
}

/// Records.
impl Pds {
    /// Creates a record under a new TID. Emits `#commit`.
    pub fn create_record(
        &self,
        did: &Did,
        collection: &str,
        record: Value,
    ) -> Result<Written, PdsError> {
        self.apply_writes(
            did,
            &[Write::Create {
                collection: collection.to_owned(),
                rkey: None,
                record,
            }],
        )
    }

    /// Creates or replaces a record. Emits `#commit`, unless the record is already there as given.
    pub fn put_record(
        &self,
        did: &Did,
        collection: &str,
        rkey: &str,
        record: Value,
    ) -> Result<Written, PdsError> {
        self.put_record_if(did, collection, rkey, record, &Swap::default())
    }

    /// As [`Pds::put_record`], if the repository is as `swap` expects.
    pub fn put_record_if(
        &self,
        did: &Did,
        collection: &str,
        rkey: &str,
        record: Value,
        swap: &Swap,
    ) -> Result<Written, PdsError> {
        let hosted = self.hosted(did)?;
        let mut hosted = lock(&hosted);
        let (collection, rkey) = (collection.to_owned(), rkey.to_owned());
        let path = format!("{collection}/{rkey}");
        let write = match hosted.repo.record(&path) {
            Some(_) => Write::Update {
                collection,
                rkey,
                record,
            },
            None => Write::Create {
                collection,
                rkey: Some(rkey),
                record,
            },
        };
        hosted.repo.check_swap(swap, &path)?;
        if let Some(unchanged) = hosted.repo.unchanged(&write)? {
            return Ok(hosted.unchanged(did, &path, unchanged));
        }
        self.write(did, &mut hosted, &[write])
    }

    /// Deletes a record. Emits `#commit`.
    pub fn delete_record(
        &self,
        did: &Did,
        collection: &str,
        rkey: &str,
    ) -> Result<Written, PdsError> {
        self.apply_writes(
            did,
            &[Write::Delete {
                collection: collection.to_owned(),
                rkey: rkey.to_owned(),
            }],
        )
    }

    /// Applies writes as one commit. Emits `#commit`.
    pub fn apply_writes(&self, did: &Did, writes: &[Write]) -> Result<Written, PdsError> {
        self.apply_writes_if(did, writes, &Swap::default())
    }

    /// As [`Pds::apply_writes`], if the repository is as `swap` expects; its `record` speaks of the
    /// first write.
    pub fn apply_writes_if(
        &self,
        did: &Did,
        writes: &[Write],
        swap: &Swap,
    ) -> Result<Written, PdsError> {
        let hosted = self.hosted(did)?;
        let mut hosted = lock(&hosted);
        let first = writes.first().and_then(Write::named_path);
        hosted.repo.check_swap(swap, &first.unwrap_or_default())?;
        self.write(did, &mut hosted, writes)
    }

    fn write(&self, did: &Did, hosted: &mut Hosted, writes: &[Write]) -> Result<Written, PdsError> {
        hosted.active(did)?;
        let commit = hosted.repo.apply(writes)?;
        self.emit(did, |stamp| frames::commit(stamp, did, &commit));
        let first = commit.ops.first();
        Ok(Written {
            uri: first.map_or_else(
                || format!("at://{did}"),
                |op| format!("at://{did}/{}", op.path),
            ),
            record: first.and_then(|op| op.cid),
            commit: commit.cid,
            rev: commit.rev,
            ops: commit.ops,
        })
    }

    /// Applies writes without an event. The commit can be sent later, or not at all:
    /// `pds.emit_with(|stamp| frames::commit(stamp, did, &commit))`.
    pub fn commit_silently(&self, did: &Did, writes: &[Write]) -> Result<Commit, PdsError> {
        let hosted = self.hosted(did)?;
        let mut hosted = lock(&hosted);
        hosted.active(did)?;
        Ok(hosted.repo.apply(writes)?)
    }

    /// The JSON form of a record of an account that is hosted here, with its CID.
    pub fn record(&self, did: &Did, path: &str) -> Option<(Cid, Value)> {
        let hosted = self.hosted(did).ok()?;
        let hosted = lock(&hosted);
        hosted.repo.record(path)
    }

    /// The CAR of a repository; with `since`, only the blocks that came after that revision.
    pub fn repo_car(&self, did: &Did, since: Option<Tid>) -> Result<Bytes, PdsError> {
        let hosted = self.hosted(did)?;
        let mut hosted = lock(&hosted);
        Ok(hosted.repo.car(since)?)
    }

    /// The state of a repository, whatever its status.
    pub fn repository(&self, did: &Did) -> Option<RepoState> {
        let hosted = self.hosted(did).ok()?;
        let hosted = lock(&hosted);
        Some(hosted.state())
    }

    /// Where a repository stands, whatever its status.
    pub fn head(&self, did: &Did) -> Option<RepoHead> {
        let hosted = self.hosted(did).ok()?;
        let hosted = lock(&hosted);
        Some(hosted.head())
    }

    /// The state of all repositories, in the order of their DIDs.
    pub fn repositories(&self) -> Vec<RepoState> {
        let hosted: Vec<_> = self.accounts().by_did.values().cloned().collect();
        hosted.iter().map(|hosted| lock(hosted).state()).collect()
    }

    /// Where the repositories of DIDs after `after` stand, in the order of their DIDs, `limit` at most.
    pub fn heads(&self, after: Option<&Did>, limit: usize) -> Vec<RepoHead> {
        let accounts = self.accounts();
        let start = after.map_or(Bound::Unbounded, Bound::Excluded);
        let page = accounts
            .by_did
            .range::<Did, _>((start, Bound::Unbounded))
            .take(limit);
        let hosted: Vec<_> = page.map(|(_, hosted)| hosted.clone()).collect();
        drop(accounts);
        hosted.iter().map(|hosted| lock(hosted).head()).collect()
    }
}

impl Hosted {
    fn unchanged(&self, did: &Did, path: &str, record: Cid) -> Written {
        let sync = self.repo.sync_state();
        Written {
            uri: format!("at://{did}/{path}"),
            record: Some(record),
            commit: sync.cid,
            rev: sync.rev,
            ops: Vec::new(),
        }
    }
}

/// The event stream, and the ways to make it go wrong.
impl Pds {
    fn emit(&self, did: &Did, make: impl FnOnce(Stamp) -> Bytes) {
        self.inner.events.push(Some(did), make);
    }

    fn emit_identity(&self, did: &Did, handle: Option<&str>) {
        self.emit(did, |stamp| frames::identity(stamp, did, handle));
    }

    fn emit_account(&self, did: &Did, status: AccountStatus) {
        self.emit(did, |stamp| frames::account(stamp, did, status));
    }

    /// Puts any bytes into the stream as they are. They take up the sequence number returned, so
    /// that cursors count them; the frame itself may say another.
    pub fn emit_raw(&self, frame: Bytes) -> u64 {
        self.inner.events.push(None, |_| frame)
    }

    /// Puts into the stream what `make` makes of the sequence number and time it will have.
    pub fn emit_with(&self, make: impl FnOnce(Stamp) -> Bytes) -> u64 {
        self.inner.events.push(None, make)
    }

    /// Every event that is kept.
    pub fn events(&self) -> Vec<Event> {
        self.events_from(0, usize::MAX)
    }

    /// Kept events from a position on, `limit` at most.
    pub fn events_from(&self, position: u64, limit: usize) -> Vec<Event> {
        self.inner.events.from(position, limit)
    }

    /// Sequence number of the last event; 0 before the first.
    pub fn head_seq(&self) -> u64 {
        self.inner.events.head()
    }

    /// Cuts every open subscription.
    pub fn disconnect(&self) {
        self.inner.events.disconnect();
    }

    /// While `true`, subscriptions stay open and nothing is sent.
    pub fn stall(&self, stalled: bool) {
        self.inner.events.stall(stalled);
    }

    /// Forgets all events and numbers the next one `next_seq`, as after a loss of the database.
    pub fn restart_seq(&self, next_seq: u64) {
        self.inner.events.restart(next_seq);
    }

    /// While `true`, subscriptions are cut and every request is answered with 503.
    pub fn set_offline(&self, offline: bool) {
        self.inner.offline.store(offline, Ordering::SeqCst);
        if offline {
            self.disconnect();
        }
    }

    /// Asks the relay at the base URL `relay` to crawl this PDS.
    pub async fn request_crawl(&self, relay: &str) -> Result<(), CrawlError> {
        let url = format!(
            "{}/xrpc/com.atproto.sync.requestCrawl",
            relay.trim_end_matches('/')
        );
        let failed = |cause| CrawlError::Http {
            relay: relay.to_owned(),
            cause,
        };
        let request = crate::dial::plain_client()
            .post(url)
            .timeout(CRAWL_TIMEOUT)
            .json(&json!({ "hostname": self.announced() }));
        let answer = request.send().await.map_err(failed)?;
        let status = answer.status();
        if status.is_success() {
            return Ok(());
        }
        let body = answer.text().await.map_err(failed)?;
        Err(CrawlError::Refused {
            relay: relay.to_owned(),
            status: status.as_u16(),
            body,
        })
    }

    /// What requestCrawl calls this PDS: relays take a bare name to speak TLS, unless it is loopback.
    fn announced(&self) -> String {
        if self.server().address().ip().is_loopback() {
            return self.host();
        }
        self.url()
    }

    /// Tells this PDS which others there are, so that accounts can be moved over HTTP.
    pub(super) fn set_peers(&self, peers: &[Pds]) {
        let peers = peers
            .iter()
            .map(|peer| Arc::downgrade(&peer.inner))
            .collect();
        *self.inner.peers.write().expect("no holder panics") = peers;
    }

    fn peer(&self, url: &str) -> Option<Pds> {
        let peers = self.inner.peers.read().expect("no holder panics");
        let found = peers
            .iter()
            .filter_map(std::sync::Weak::upgrade)
            .map(|inner| Pds { inner });
        found
            .into_iter()
            .find(|pds| pds.url() == url.trim_end_matches('/'))
    }
}
