//! The task that writes behind the stream of events: gathers changes, writes them in batches, and
//! tries again until the database takes them. It never drops a change. While the database is unreachable it
//! gathers up to a limit; then its channel fills, which is backpressure on the senders.
//! Readers of the store have a change from the moment it is announced or handed over.

use super::Store;
use super::coalesce::Coalesced;
use super::error::StoreError;
use super::recent::Written;
use super::rows::{AccountRow, AccountUpdate, Batch};
use crate::atproto::did::Did;
use futures_util::future::BoxFuture;
use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::Instant;

/// Longest time a change waits for company: changes of one account become one row, and rows written together
/// share pages. What a crash takes is read from the log again.
pub const FLUSH_INTERVAL: Duration = Duration::from_secs(1);

/// Gathered rows that are written without waiting.
pub const FLUSH_ROWS: usize = 10_000;

/// Rows that are gathered during a write or while the database is unreachable: some 12 MB, and longer
/// than a server takes to restart.
const GATHERED_ROWS: usize = 40_000;

/// Messages that may wait in the channel.
const CHANNEL_MESSAGES: usize = 1_024;

/// Wait before a failed write is tried again: doubled up to the longest.
const FIRST_RETRY: Duration = Duration::from_millis(100);
const LONGEST_RETRY: Duration = Duration::from_secs(5);

enum Message {
    Update(AccountUpdate),
    Write(Batch),
    /// Answered when every change of these accounts that was sent before is written; `None`: everything.
    Settle(Option<Vec<Did>>, oneshot::Sender<()>),
}

/// The way to the writing task. Clones lead to the same task.
#[derive(Clone)]
pub struct Writer {
    store: Store,
    sender: mpsc::Sender<Message>,
    stop: watch::Sender<Option<Instant>>,
    applied: watch::Receiver<u64>,
    outcome: watch::Receiver<Outcome>,
    trouble: watch::Receiver<Option<String>>,
}

/// How the task ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Outcome {
    Running,
    Written,
    Unwritten(usize),
}

impl Writer {
    /// Starts the task on the current runtime. It ends with [`Writer::shutdown`], or when the last
    /// clone is dropped, and writes what it has then.
    pub fn spawn(store: Store) -> Self {
        let (sender, receiver) = mpsc::channel(CHANNEL_MESSAGES);
        let (stop, stopping) = watch::channel(None);
        let (position, applied) = watch::channel(0);
        let (ending, outcome) = watch::channel(Outcome::Running);
        let (troubled, trouble) = watch::channel(None);
        let task = Task {
            store: store.clone(),
            receiver,
            stopping,
            position,
            troubled: Arc::new(troubled),
            pending: Coalesced::default(),
            due: Instant::now(),
            write: None,
            waiting: Vec::new(),
        };
        tokio::spawn(async move {
            // Nobody may be waiting any more.
            let _ = ending.send(task.run().await);
        });
        Self {
            store,
            sender,
            stop,
            applied,
            outcome,
            trouble,
        }
    }

    /// Why changes wait, while they do.
    pub fn trouble(&self) -> Option<String> {
        self.trouble.borrow().clone()
    }

    /// Sets the gauges that are sampled.
    pub fn sample(&self) {
        let failing = self.trouble.borrow().is_some();
        self.store.metrics.failing.set(i64::from(failing));
    }

    /// Lets readers see changes that will be handed over by [`Writer::send_blocking`]: of events that are in the log, and
    /// that consumers are about to see.
    pub fn announce<'a>(&self, updates: impl IntoIterator<Item = &'a AccountUpdate>) {
        self.store.recent.announce(updates);
    }

    /// Hands changes over; waits while the database is behind.
    ///
    /// # Errors
    /// [`StoreError::WriterStopped`] after a shutdown.
    pub async fn send(&self, batch: Batch) -> Result<(), StoreError> {
        self.announce(&batch.accounts);
        self.post(Message::Write(batch)).await
    }

    /// As [`Writer::send`], for threads outside the runtime, and for changes that were announced.
    ///
    /// # Errors
    /// [`StoreError::WriterStopped`] after a shutdown.
    pub fn send_blocking(&self, batch: Batch) -> Result<(), StoreError> {
        self.sender
            .blocking_send(Message::Write(batch))
            .map_err(|_| StoreError::WriterStopped)
    }

    /// Hands one account's change over, from threads outside the runtime; waits while the database is
    /// far behind. After a shutdown the change goes nowhere: the log still has it.
    pub fn update(&self, update: AccountUpdate) {
        self.announce([&update]);
        if self.sender.blocking_send(Message::Update(update)).is_err() {
            tracing::debug!("a change came after the database writer stopped");
        }
    }

    /// Reads accounts as they are with everything that was sent before.
    pub async fn accounts(&self, dids: &[Did]) -> Result<HashMap<Did, AccountRow>, StoreError> {
        self.written(dids).await?;
        self.store.accounts(dids).await
    }

    /// Waits until every change of these accounts that was sent before is in the database.
    pub async fn written(&self, dids: &[Did]) -> Result<(), StoreError> {
        self.settle(Some(dids.to_vec())).await
    }

    pub(super) async fn settle(&self, dids: Option<Vec<Did>>) -> Result<(), StoreError> {
        let (reply, done) = oneshot::channel();
        self.post(Message::Settle(dids, reply)).await?;
        done.await.map_err(|_| StoreError::WriterStopped)
    }

    /// See [`Store::complain`].
    pub fn complain(&self, what: &str, error: &StoreError) {
        self.store.complain(what, error);
    }

    /// The `replay_from` that was written last; 0 before the first.
    pub fn applied(&self) -> watch::Receiver<u64> {
        self.applied.clone()
    }

    /// Writes what was sent, and ends the task. What the database has not taken when the time is
    /// over is given up: the log still has it.
    ///
    /// # Errors
    /// [`StoreError::Unwritten`].
    pub async fn shutdown(&self, within: Duration) -> Result<(), StoreError> {
        self.stop.send_replace(Some(Instant::now() + within));
        let mut outcome = self.outcome.clone();
        let ended = outcome
            .wait_for(|outcome| *outcome != Outcome::Running)
            .await
            .map(|outcome| *outcome)
            .map_err(|_| StoreError::WriterStopped)?;
        match ended {
            Outcome::Unwritten(rows) => Err(StoreError::Unwritten { rows }),
            Outcome::Running | Outcome::Written => Ok(()),
        }
    }

    async fn post(&self, message: Message) -> Result<(), StoreError> {
        self.sender
            .send(message)
            .await
            .map_err(|_| StoreError::WriterStopped)
    }
}

struct Task {
    store: Store,
    receiver: mpsc::Receiver<Message>,
    stopping: watch::Receiver<Option<Instant>>,
    position: watch::Sender<u64>,
    troubled: Arc<watch::Sender<Option<String>>>,
    /// Changes that no write has taken up.
    pending: Coalesced,
    /// When they must be taken up.
    due: Instant,
    write: Option<Write>,
    waiting: Vec<Waiter>,
}

/// A write in progress. It ends when the database has taken it, or the time of a shutdown is over.
struct Write {
    rows: usize,
    replay_from: Option<u64>,
    changes: HashMap<Did, u32>,
    done: BoxFuture<'static, Result<(), TimeOver>>,
}

/// Somebody who waits for writes to end.
struct Waiter {
    /// How many: the one in progress, and the next.
    writes: u8,
    reply: oneshot::Sender<()>,
}

/// The deadline of a shutdown passed.
struct TimeOver;

impl Task {
    async fn run(mut self) -> Outcome {
        match self.serve().await {
            Ok(()) => Outcome::Written,
            Err(TimeOver) => Outcome::Unwritten(self.left_over()),
        }
    }

    async fn serve(&mut self) -> Result<(), TimeOver> {
        let mut stopping = self.stopping.clone();
        loop {
            self.start_write();
            self.measure();
            let may_gather = self.pending.rows() < GATHERED_ROWS;
            let must_wait_for_company = self.write.is_none() && !self.pending.is_empty();
            tokio::select! {
                result = write_end(&mut self.write) => {
                    result?;
                    self.written();
                }
                message = self.receiver.recv(), if may_gather => match message {
                    Some(message) => self.take(message),
                    None => return self.finish().await,
                },
                () = tokio::time::sleep_until(self.due), if must_wait_for_company => {}
                // From here on nothing new is taken, and what waits is worked off.
                () = stop_asked(&mut stopping), if !self.receiver.is_closed() => self.receiver.close(),
            }
        }
    }

    /// The channel is closed and empty: writes what is left.
    async fn finish(&mut self) -> Result<(), TimeOver> {
        self.due = Instant::now();
        loop {
            self.start_write();
            self.measure();
            if self.write.is_none() {
                return Ok(());
            }
            write_end(&mut self.write).await?;
            self.written();
        }
    }

    /// What waits for the database, and what is on its way there.
    fn measure(&self) {
        let under_way = self.write.as_ref().map_or(0, |write| write.rows);
        let rows = self.pending.rows() + under_way;
        self.store.metrics.queue.set(rows as i64);
    }

    fn take(&mut self, message: Message) {
        let was_empty = self.pending.is_empty();
        match message {
            Message::Update(update) => self.pending.add(Batch {
                accounts: vec![update],
                ..Batch::default()
            }),
            Message::Write(batch) => self.pending.add(batch),
            Message::Settle(None, reply) => {
                self.wait(!self.pending.is_empty(), self.write.is_some(), reply);
            }
            Message::Settle(Some(dids), reply) => {
                let gathered = dids.iter().any(|did| self.pending.has(did));
                let under_way =
                    |write: &Write| dids.iter().any(|did| write.changes.contains_key(did));
                let under_way = self.write.as_ref().is_some_and(under_way);
                self.wait(gathered, under_way, reply);
            }
        }
        if was_empty {
            self.due = Instant::now() + FLUSH_INTERVAL;
        }
    }

    /// Answers when the write in progress, or the next one, has ended; at once if neither matters.
    fn wait(&mut self, for_gathered: bool, for_under_way: bool, reply: oneshot::Sender<()>) {
        let writes = match (for_gathered, for_under_way) {
            (false, false) => {
                // The receiver may have been dropped.
                let _ = reply.send(());
                return;
            }
            (true, _) => 1 + u8::from(self.write.is_some()),
            (false, true) => 1,
        };
        self.waiting.push(Waiter { writes, reply });
    }

    /// Takes the gathered changes up, if it is time and no other write is in progress.
    fn start_write(&mut self) {
        let awaited = !self.waiting.is_empty();
        let due = awaited || self.pending.rows() >= FLUSH_ROWS || Instant::now() >= self.due;
        if self.write.is_some() || self.pending.is_empty() || !due {
            return;
        }
        let changes = self.pending.changes().collect();
        let batch = self.pending.take();
        self.write = Some(Write {
            rows: rows(&batch),
            replay_from: batch.replay_from,
            changes,
            done: Box::pin(write_until_taken(
                self.store.clone(),
                batch,
                self.troubled.clone(),
                self.stopping.clone(),
            )),
        });
    }

    fn written(&mut self) {
        let Some(write) = self.write.take() else {
            return;
        };
        self.store
            .recent
            .written(write.changes.into_iter().collect::<Written>());
        if let Some(seq) = write.replay_from {
            self.position.send_replace(seq);
        }
        for mut waiter in std::mem::take(&mut self.waiting) {
            waiter.writes -= 1;
            if waiter.writes > 0 {
                self.waiting.push(waiter);
            } else {
                let _ = waiter.reply.send(());
            }
        }
    }

    /// Rows that were sent and are not written.
    fn left_over(&mut self) -> usize {
        self.receiver.close();
        let mut left = self.pending.rows() + self.write.as_ref().map_or(0, |write| write.rows);
        while let Ok(message) = self.receiver.try_recv() {
            left += match message {
                Message::Update(_) => 1,
                Message::Write(batch) => rows(&batch),
                Message::Settle(..) => 0,
            };
        }
        left
    }
}

fn rows(batch: &Batch) -> usize {
    batch.accounts.len() + batch.cursors.len()
}

/// Resolves when the write in progress has ended; never without one.
async fn write_end(write: &mut Option<Write>) -> Result<(), TimeOver> {
    match write {
        Some(write) => (&mut write.done).await,
        None => std::future::pending().await,
    }
}

/// Writes a batch, however long it takes.
async fn write_until_taken(
    store: Store,
    batch: Batch,
    troubled: Arc<watch::Sender<Option<String>>>,
    stopping: watch::Receiver<Option<Instant>>,
) -> Result<(), TimeOver> {
    let mut retry = FIRST_RETRY;
    let mut failed = false;
    loop {
        let started = Instant::now();
        let attempt = tokio::select! {
            result = store.apply_distinct(&batch) => result,
            () = time_over(stopping.clone()) => return Err(TimeOver),
        };
        let seconds = started.elapsed().as_secs_f64();
        store.metrics.flush_seconds.observe(seconds);
        let Err(error) = attempt else { break };
        store.metrics.flush_errors.inc();
        troubled.send_replace(Some(error.to_string()));
        store.complain("account states wait for the database; trying again", &error);
        failed = true;
        tokio::select! {
            () = tokio::time::sleep(retry) => {}
            () = time_over(stopping.clone()) => return Err(TimeOver),
        }
        retry = (retry * 2).min(LONGEST_RETRY);
    }
    if failed {
        troubled.send_replace(None);
        tracing::debug!("the database takes account states again");
    }
    Ok(())
}

/// Resolves when a shutdown is asked for; never when all senders are gone without asking.
async fn stop_asked(stopping: &mut watch::Receiver<Option<Instant>>) {
    if stopping.wait_for(Option::is_some).await.is_err() {
        std::future::pending::<()>().await;
    }
}

/// Resolves when the deadline of a shutdown has passed.
async fn time_over(mut stopping: watch::Receiver<Option<Instant>>) {
    let deadline = stopping.wait_for(Option::is_some).await.map(|at| *at);
    match deadline {
        Ok(Some(at)) => tokio::time::sleep_until(at).await,
        _ => std::future::pending().await,
    }
}
