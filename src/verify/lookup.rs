//! The look-ups that shards ask for: accounts in SQL, identities, the status of an account at its PDS.
//!
//! Runs on tokio. Account rows are read in batches; the other look-ups take turns by the host whose event asks. Every
//! question gets exactly one answer; one that found no turn waits for it.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::mpsc::{UnboundedReceiver, WeakUnboundedSender};
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep};

use crate::atproto::did::Did;
use crate::hosts::HostHandle;
use crate::identity::{Identity, RepoStatusError, Requester, ResolveError, Resolver};
use crate::store::{HostId, UpstreamStatus, Writer};

use super::Settlements;
use super::alarm::{Alarm, Watched};
use super::judge::{NoIdentity, Question};
use super::metrics::Metrics;
use super::shard::{Answer, Lookup, Work};
use super::turns::{Turn, Turns};

/// Most account rows read at once.
const ACCOUNTS_PER_READ: usize = 500;
/// Most such reads under way: what is asked for meanwhile goes together into the next one. A lone question never waits.
const READS: usize = 4;
/// How often a directory or a host is asked that does not answer, and the wait in between: one that is down for a moment
/// loses no event.
const ATTEMPTS: u32 = 3;
const PAUSE: Duration = Duration::from_secs(2);
/// The wait where the directory's rate is used up.
const RATE_PAUSE: Duration = Duration::from_millis(500);
/// Whose turns an operator's look-ups are: hosts' numbers begin above it.
const NO_HOST: HostId = HostId(0);
/// The wait before it is looked again whether an account's last event is in the log.
const LOG_PAUSE: Duration = Duration::from_millis(2);
/// The wait before a database that failed is asked again.
const DATABASE_PAUSE: Duration = Duration::from_millis(500);

/// Look-ups under way at a time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Places {
    /// At the PLC directory.
    pub directory: usize,
    /// At hosts: the documents of did:web and the statuses of accounts, each.
    pub hosts: usize,
}

impl Default for Places {
    fn default() -> Self {
        Self {
            directory: 64,
            hosts: 128,
        }
    }
}

/// What is looked up, and where.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum LookupKind {
    /// A did:plc at the directory.
    Directory,
    /// A did:web at its host.
    Web,
    /// The status of an account at its PDS.
    Status,
}

impl LookupKind {
    /// All of them, in their order.
    const ALL: [Self; 3] = [Self::Directory, Self::Web, Self::Status];
}

/// Answers questions until the shards are gone.
pub(super) struct Lookups {
    pub resolver: Resolver,
    pub writer: Writer,
    /// Weak, so that the shards end when the pipeline does.
    pub shards: Vec<WeakUnboundedSender<Work>>,
    /// What became of what the shards accepted.
    pub settled: Settlements,
    /// Told of a panic: the events that wait for the answer would wait for ever.
    pub alarm: Alarm,
    /// Look-ups under way at a time.
    pub places: Places,
    pub metrics: Metrics,
}

/// What waits, and what is under way.
struct Desk {
    turns: [Turns<HostId, Try>; LookupKind::ALL.len()],
    running: JoinSet<Done>,
    /// Look-ups that failed and are made again.
    pausing: JoinSet<Try>,
    accounts: Vec<(usize, Did)>,
    /// Accounts whose moves must be written.
    moved: Vec<Lookup>,
    reads: JoinSet<()>,
}

/// A look-up, and how often it was tried without an answer.
struct Try {
    lookup: Lookup,
    failed: u32,
}

/// A look-up that is over.
struct Done {
    kind: LookupKind,
    turn: Turn<HostId>,
    /// Whether whoever was asked answered.
    answered: bool,
    /// To be tried again after a wait.
    again: Option<(Try, Duration)>,
}

impl Lookups {
    pub async fn run(self: Arc<Self>, mut questions: UnboundedReceiver<Lookup>) {
        let _watched = self.watched();
        let mut batch = Vec::new();
        let mut desk = Desk::new(self.places);
        loop {
            tokio::select! {
                count = questions.recv_many(&mut batch, ACCOUNTS_PER_READ) => if count == 0 {
                    return;
                },
                // A read or a look-up that panicked has raised the alarm.
                Some(_) = desk.reads.join_next() => {}
                Some(done) = desk.running.join_next() => if let Ok(done) = done {
                    desk.end(done);
                },
                Some(again) = desk.pausing.join_next() => if let Ok(again) = again {
                    desk.enter(again);
                },
            }
            for lookup in batch.drain(..) {
                self.take(&mut desk, lookup);
            }
            self.begin(&mut desk);
        }
    }

    fn take(&self, desk: &mut Desk, lookup: Lookup) {
        if lookup.question == Question::Account {
            return desk.accounts.push((lookup.shard, lookup.did));
        }
        if lookup.question == Question::Written {
            return desk.moved.push(lookup);
        }
        if lookup.question == (Question::Identity { fresh: false })
            && let Some(identity) = self.resolver.cached(&lookup.did)
        {
            return self.identified(lookup, Ok(identity));
        }
        desk.enter(Try { lookup, failed: 0 });
    }

    /// Begins what may begin.
    fn begin(self: &Arc<Self>, desk: &mut Desk) {
        while desk.reads.len() < READS && !desk.accounts.is_empty() {
            let next = desk.accounts.len().min(ACCOUNTS_PER_READ);
            let read = self.clone().accounts(desk.accounts.drain(..next).collect());
            desk.reads.spawn(read);
        }
        if !desk.moved.is_empty() {
            tokio::spawn(self.clone().written(std::mem::take(&mut desk.moved)));
        }
        let now = Instant::now();
        for kind in LookupKind::ALL {
            let turns = &mut desk.turns[kind as usize];
            while let Some((turn, look_up)) = turns.next(now) {
                desk.running
                    .spawn(self.clone().look_up(kind, turn, look_up));
            }
            self.metrics.lookups_waiting[kind as usize].set(turns.waiting() as i64);
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
                    self.writer
                        .complain("accounts cannot be read; events wait", &error);
                    sleep(DATABASE_PAUSE).await;
                }
            }
        };
        for (shard, did) in asked {
            let row = rows.remove(&did).map(Box::new);
            self.answer(shard, did, None, Answer::Account(row));
        }
    }

    async fn look_up(self: Arc<Self>, kind: LookupKind, turn: Turn<HostId>, now: Try) -> Done {
        let _watched = self.watched();
        let (answered, again) = match now.lookup.question {
            Question::Identity { fresh } => self.identity(now, fresh).await,
            Question::Status => self.status(now).await,
            // Asked in batches, see [`Lookups::take`].
            Question::Account | Question::Written => (true, None),
        };
        Done {
            kind,
            turn,
            answered,
            again,
        }
    }

    /// Looks an identity up. Tells whether there was an answer, and what is to be tried again.
    async fn identity(&self, now: Try, fresh: bool) -> (bool, Option<(Try, Duration)>) {
        let Lookup { did, since, .. } = &now.lookup;
        let since = Instant::from_std(*since);
        let known = match fresh {
            true => None,
            false => Some(self.resolver.resolve(did).await),
        };
        // That there is no such identity may have been found out for another host, before there was one.
        let result = match known {
            Some(known)
                if known
                    .as_ref()
                    .err()
                    .is_none_or(|error| error.is_temporary()) =>
            {
                known
            }
            _ => self.resolver.refresh(did, now.requester(), since).await,
        };
        match result {
            // The directory was not asked: the look-up waits for as long as it takes.
            Err(ResolveError::RateLimited) => (true, Some((now, jittered(RATE_PAUSE)))),
            Err(error) if error.is_temporary() => match now.failed() {
                Ok(again) => (false, Some(again)),
                Err(lookup) => {
                    self.identified(lookup, Err(NoIdentity::Unresolved));
                    (false, None)
                }
            },
            result => {
                self.identified(now.lookup, result.map_err(|error| no_identity(&error)));
                (true, None)
            }
        }
    }

    fn identified(&self, lookup: Lookup, result: Result<Arc<Identity>, NoIdentity>) {
        let Lookup {
            shard,
            did,
            question,
            asker,
            beside,
            ..
        } = lookup;
        let answer = if beside {
            Answer::Renewed(result)
        } else {
            let fresh = question == (Question::Identity { fresh: true });
            Answer::Identity { result, fresh }
        };
        self.answer(shard, did, asker, answer);
    }

    /// Waits until SQL has what was sent of these accounts.
    async fn written(self: Arc<Self>, asked: Vec<Lookup>) {
        let _watched = self.watched();
        let dids: Vec<Did> = asked.iter().map(|lookup| lookup.did.clone()).collect();
        // A writer that has ended writes no more; what waits comes again from its host after the restart.
        if self.writer.written(&dids).await.is_err() {
            return;
        }
        for Lookup {
            shard, did, after, ..
        } in asked
        {
            self.answer(shard, did, None, Answer::Written(after));
        }
    }

    /// Asks a PDS for the status of an account of its own. Tells as [`Lookups::identity`] does. The answer comes behind
    /// the account's events that are on their way to the log: what they say of its status is older.
    async fn status(&self, now: Try) -> (bool, Option<(Try, Duration)>) {
        let Some(host) = &now.lookup.asker else {
            return (true, None);
        };
        while self.settled.of(now.lookup.shard) < now.lookup.after {
            sleep(LOG_PAUSE).await;
        }
        let seq = self.settled.seq();
        let status = match self
            .resolver
            .repo_status(host.host(), &now.lookup.did)
            .await
        {
            Ok(answer) => UpstreamStatus::from_event(answer.active, answer.status.as_deref()),
            Err(RepoStatusError::NotFound) => UpstreamStatus::Deleted,
            Err(RepoStatusError::Unavailable(_)) => {
                return match now.failed() {
                    Ok(again) => (false, Some(again)),
                    Err(lookup) => {
                        let Lookup {
                            shard, did, asker, ..
                        } = lookup;
                        self.answer(shard, did, asker, Answer::Status(None, seq));
                        (false, None)
                    }
                };
            }
        };
        let Lookup {
            shard, did, asker, ..
        } = now.lookup;
        self.answer(shard, did, asker, Answer::Status(Some(status), seq));
        (true, None)
    }

    fn answer(&self, shard: usize, did: Did, asker: Option<Arc<HostHandle>>, answer: Answer) {
        // A shard that is gone needs no answers.
        if let Some(shard) = self.shards[shard].upgrade() {
            let _ = shard.send(Work::Answer { did, asker, answer });
        }
    }
}

impl Desk {
    fn new(places: Places) -> Self {
        Self {
            turns: LookupKind::ALL.map(|kind| {
                Turns::new(match kind {
                    LookupKind::Directory => places.directory,
                    LookupKind::Web | LookupKind::Status => places.hosts,
                })
            }),
            running: JoinSet::new(),
            pausing: JoinSet::new(),
            accounts: Vec::new(),
            moved: Vec::new(),
            reads: JoinSet::new(),
        }
    }

    fn enter(&mut self, look_up: Try) {
        let Lookup {
            did,
            question,
            asker,
            beside,
            ..
        } = &look_up.lookup;
        let kind = match question {
            Question::Status => LookupKind::Status,
            _ if did.method() == "web" => LookupKind::Web,
            _ => LookupKind::Directory,
        };
        let asker = asker.as_ref().map_or(NO_HOST, |host| host.id());
        let turns = &mut self.turns[kind as usize];
        let now = Instant::now();
        if *beside {
            // Where its host has too many of these, the account asks again later.
            turns.enter_beside(asker, look_up, now);
        } else {
            turns.enter(asker, look_up, now);
        }
    }

    fn end(&mut self, done: Done) {
        self.turns[done.kind as usize].end(&done.turn, done.answered, Instant::now());
        if let Some((again, pause)) = done.again {
            self.pausing.spawn(async move {
                sleep(pause).await;
                again
            });
        }
    }
}

impl Try {
    fn requester(&self) -> Requester {
        let asker = self.lookup.asker.as_ref();
        Requester(asker.map_or(NO_HOST, |host| host.id()).0)
    }

    /// The look-up after another failure: what to try again and after which wait, or the look-up that is given up.
    fn failed(mut self) -> Result<(Self, Duration), Lookup> {
        self.failed += 1;
        if self.lookup.beside || self.failed >= ATTEMPTS {
            return Err(self.lookup);
        }
        let pause = jittered(PAUSE * self.failed);
        Ok((self, pause))
    }
}

/// The wait, or up to half of it more: what failed together is not tried again together.
fn jittered(wait: Duration) -> Duration {
    wait + wait.mul_f64(fastrand::f64() / 2.0)
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
    use crate::clock::Clock;
    use crate::devnet::plc::Plc;
    use crate::dial::Guard;
    use crate::identity::{self, Settings};
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
                resolver: Resolver::new(
                    Settings {
                        plc_host: directory.url().parse().unwrap(),
                        ..Settings::default()
                    },
                    Guard::new(false),
                    Clock::default(),
                    identity::Metrics::default(),
                ),
                writer: Writer::spawn(store),
                shards: vec![shard.downgrade()],
                settled: Settlements::new(1, 0),
                alarm: Alarm::new(|reason| panic!("{reason}")),
                places: Places {
                    directory: 1,
                    hosts: 1,
                },
                metrics: Metrics::default(),
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

    fn lookup(did: Did, question: Question) -> Lookup {
        Lookup {
            shard: 0,
            did,
            question,
            asker: None,
            since: std::time::Instant::now(),
            beside: false,
            after: 0,
        }
    }

    #[tokio::test]
    async fn identities_that_wait_for_their_turn_are_not_given_up() {
        let mut bench = Bench::new().await;
        let (ask, questions) = mpsc::unbounded_channel();
        let count = 40;
        for number in 0..count {
            // Base32 without 0 and 1.
            let digits = ["a", "b", "c", "d", "e", "f", "g", "h"];
            let name = format!("{}{}", digits[number / 8], digits[number % 8]);
            let did = Did::parse(&format!("did:plc:{name:a<24}")).unwrap();
            let question = Question::Identity { fresh: false };
            assert!(ask.send(lookup(did, question)).is_ok());
        }
        tokio::spawn(bench.lookups.clone().run(questions));
        for _ in 0..count {
            let Some(Work::Answer {
                did,
                answer: Answer::Identity { result, .. },
                ..
            }) = bench.answers.recv().await
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
            let did = Did::parse(&format!("did:web:{number}.example")).unwrap();
            assert!(ask.send(lookup(did, Question::Account)).is_ok());
        }
        tokio::spawn(bench.lookups.clone().run(questions));
        for _ in 0..count {
            let answer = bench.answers.recv().await;
            assert!(matches!(
                answer,
                Some(Work::Answer {
                    answer: Answer::Account(None),
                    ..
                })
            ));
        }
    }
}
