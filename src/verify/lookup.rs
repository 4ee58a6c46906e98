//! The look-ups that shards ask for: accounts in SQL, identities, the status of an account at its PDS.
//!
//! Runs on tokio. Account rows are read in batches; every question gets exactly one answer, in bounded time.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::mpsc::{UnboundedReceiver, WeakUnboundedSender};
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep};
use tracing::warn;

use crate::atproto::did::Did;
use crate::identity::{Identity, RepoStatusError, ResolveError, Resolver};
use crate::store::{UpstreamStatus, Writer};
use crate::upstream::HostHandle;

use super::alarm::{Alarm, Watched};
use super::judge::{NoIdentity, Question};
use super::shard::{Answer, Lookup, Work};

/// Most account rows read at once.
const ACCOUNTS_PER_READ: usize = 500;
/// Most such reads under way: what is asked for meanwhile goes together into the next one. A lone question never waits.
const READS: usize = 4;
/// How often an identity is asked for before its event is given up, and the wait in between: a directory that is
/// down for a moment loses no event.
const IDENTITY_ATTEMPTS: u32 = 3;
const IDENTITY_PAUSE: Duration = Duration::from_secs(2);
/// How long an identity waits for its turn where too many are looked up, and the wait before it asks again: a relay
/// that is new meets every account for the first time.
const TURN_PATIENCE: Duration = Duration::from_secs(10 * 60);
const TURN_PAUSE: Duration = Duration::from_millis(500);
/// The wait before a database that failed is asked again.
const DATABASE_PAUSE: Duration = Duration::from_millis(500);

/// Answers questions until the shards are gone.
pub(super) struct Lookups {
    pub resolver: Resolver,
    pub writer: Writer,
    /// Weak, so that the shards end when the pipeline does.
    pub shards: Vec<WeakUnboundedSender<Work>>,
    /// Told of a panic: the events that wait for the answer would wait for ever.
    pub alarm: Alarm,
}

impl Lookups {
    pub async fn run(self: Arc<Self>, mut questions: UnboundedReceiver<Lookup>) {
        let _watched = self.watched();
        let mut batch = Vec::new();
        let mut accounts = Vec::new();
        let mut reads = JoinSet::new();
        loop {
            tokio::select! {
                count = questions.recv_many(&mut batch, ACCOUNTS_PER_READ) => if count == 0 {
                    return;
                },
                // A read that panicked has raised the alarm.
                Some(_) = reads.join_next() => {}
            }
            for lookup in batch.drain(..) {
                match lookup.question {
                    Question::Account => accounts.push((lookup.shard, lookup.did)),
                    Question::Identity { fresh } => {
                        tokio::spawn(self.clone().identity(lookup.shard, lookup.did, fresh));
                    }
                    Question::Status => {
                        tokio::spawn(self.clone().status(lookup.shard, lookup.did, lookup.host));
                    }
                }
            }
            while reads.len() < READS && !accounts.is_empty() {
                let next = accounts.len().min(ACCOUNTS_PER_READ);
                reads.spawn(self.clone().accounts(accounts.drain(..next).collect()));
            }
        }
    }

    fn watched(&self) -> Watched {
        self.alarm.watch("a look-up")
    }

    async fn accounts(self: Arc<Self>, asked: Vec<(usize, Did)>) {
        let _watched = self.watched();
        let dids: Vec<Did> = asked.iter().map(|(_, did)| did.clone()).collect();
        let mut rows = loop {
            match self.writer.accounts(&dids).await {
                Ok(rows) => break rows,
                Err(error) => {
                    warn!(%error, "accounts cannot be read; events wait");
                    sleep(DATABASE_PAUSE).await;
                }
            }
        };
        for (shard, did) in asked {
            let row = rows.remove(&did).map(Box::new);
            self.answer(shard, did, Answer::Account(row));
        }
    }

    async fn identity(self: Arc<Self>, shard: usize, did: Did, fresh: bool) {
        let _watched = self.watched();
        let started = Instant::now();
        let mut attempt = 1;
        let result = loop {
            match self.resolve(&did, fresh).await {
                // Our own limits drop nothing: the host is held back meanwhile, by what it has under way.
                Err(ResolveError::RateLimited) if started.elapsed() < TURN_PATIENCE => {
                    sleep(TURN_PAUSE + TURN_PAUSE.mul_f64(fastrand::f64())).await;
                }
                Err(error) if error.is_temporary() && attempt < IDENTITY_ATTEMPTS => {
                    sleep(IDENTITY_PAUSE * attempt).await;
                    attempt += 1;
                }
                result => break result.map_err(|error| no_identity(&error)),
            }
        };
        self.answer(shard, did, Answer::Identity { result, fresh });
    }

    async fn resolve(&self, did: &Did, fresh: bool) -> Result<Arc<Identity>, ResolveError> {
        if fresh {
            self.resolver.refresh(did).await
        } else {
            self.resolver.resolve(did).await
        }
    }

    async fn status(self: Arc<Self>, shard: usize, did: Did, host: Option<Arc<HostHandle>>) {
        let _watched = self.watched();
        let status = match host {
            Some(host) => match self.resolver.repo_status(host.host(), &did).await {
                Ok(answer) => Some(UpstreamStatus::from_event(
                    answer.active,
                    answer.status.as_deref(),
                )),
                Err(RepoStatusError::NotFound) => Some(UpstreamStatus::Deleted),
                Err(RepoStatusError::Unavailable(_)) => None,
            },
            None => None,
        };
        self.answer(shard, did, Answer::Status(status));
    }

    fn answer(&self, shard: usize, did: Did, answer: Answer) {
        // A shard that is gone needs no answers.
        if let Some(shard) = self.shards[shard].upgrade() {
            let _ = shard.send(Work::Answer(did, answer));
        }
    }
}

fn no_identity(error: &ResolveError) -> NoIdentity {
    match error {
        ResolveError::NotFound | ResolveError::Invalid(_) => NoIdentity::NotFound,
        ResolveError::Tombstoned => NoIdentity::Tombstoned,
        ResolveError::Unavailable(_) | ResolveError::RateLimited => NoIdentity::Unresolved,
    }
}

#[cfg(all(test, feature = "devnet"))]
mod tests {
    use tokio::sync::mpsc;

    use super::*;
    use crate::devnet::plc::Plc;
    use crate::identity::ResolverOptions;
    use crate::store::Store;

    /// Look-ups over a new database and a directory that knows nobody.
    struct Bench {
        lookups: Arc<Lookups>,
        answers: UnboundedReceiver<Work>,
        _shard: mpsc::UnboundedSender<Work>,
        _directory: Plc,
        _folder: tempfile::TempDir,
    }

    impl Bench {
        async fn new() -> Self {
            let directory = Plc::start().await.unwrap();
            let folder = tempfile::tempdir().unwrap();
            let database = format!("sqlite:{}", folder.path().join("db").display());
            let store = Store::open(&database).await.unwrap();
            let (shard, answers) = mpsc::unbounded_channel();
            let lookups = Arc::new(Lookups {
                resolver: Resolver::new(ResolverOptions {
                    plc_url: directory.url().parse().unwrap(),
                    max_pending: 1,
                    ..ResolverOptions::default()
                }),
                writer: Writer::spawn(store),
                shards: vec![shard.downgrade()],
                alarm: Alarm::new(|reason| panic!("{reason}")),
            });
            Self {
                lookups,
                answers,
                _shard: shard,
                _directory: directory,
                _folder: folder,
            }
        }
    }

    #[tokio::test]
    async fn identities_that_wait_for_their_turn_are_not_given_up() {
        let mut bench = Bench::new().await;
        let count = 40;
        for number in 0..count {
            // Base32 without 0 and 1.
            let digits = ["a", "b", "c", "d", "e", "f", "g", "h"];
            let name = format!("{}{}", digits[number / 8], digits[number % 8]);
            let did = Did::parse(&format!("did:plc:{name:a<24}")).unwrap();
            tokio::spawn(bench.lookups.clone().identity(0, did, false));
        }
        for _ in 0..count {
            let Some(Work::Answer(did, Answer::Identity { result, .. })) =
                bench.answers.recv().await
            else {
                panic!("an identity was asked for");
            };
            assert_eq!(result, Err(NoIdentity::NotFound), "{did}");
        }
    }

    /// More than fit into the reads that may be under way.
    #[tokio::test]
    async fn every_account_of_a_burst_is_answered() {
        let mut bench = Bench::new().await;
        let (ask, questions) = mpsc::unbounded_channel();
        let count = ACCOUNTS_PER_READ * READS * 2 + 1;
        for number in 0..count {
            let lookup = Lookup {
                shard: 0,
                did: Did::parse(&format!("did:web:{number}.example")).unwrap(),
                question: Question::Account,
                host: None,
            };
            assert!(ask.send(lookup).is_ok());
        }
        tokio::spawn(bench.lookups.clone().run(questions));
        for _ in 0..count {
            let answer = bench.answers.recv().await;
            assert!(matches!(
                answer,
                Some(Work::Answer(_, Answer::Account(None)))
            ));
        }
    }
}
