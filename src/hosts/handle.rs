//! One host at run time: limits, counts, state, progress. Shared by the host's connection, the pipeline and the admin API.
//! Writes nothing to the database itself.

use std::fmt::Display;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI64, AtomicU8, AtomicU64, Ordering};
use std::time::Duration;

use parking_lot::{Mutex, RwLock};
use tokio::sync::Notify;
use tokio::time::Instant;

use super::contact::{Contact, ContactChange, ContactHistory};
use super::drops::{DropCounts, DropSummary, Drops};
use super::memory::Memory;
use super::metrics::Metrics;
use super::progress::{InFlightLimits, Progress, RecoveredHost};
use super::rate::{Cost, EventRates, RateWindows};
use super::rule::Rule;
use super::settings::HostLimits;
use super::state::HostState;
use crate::dial::HostName;
use crate::store::{HostId, HostRow, HostStatus, RateOverrides, Validation};

/// A host, for as long as the relay runs.
#[derive(Debug)]
pub struct HostHandle {
    id: HostId,
    host: HostName,
    progress: Arc<Progress>,
    windows: Mutex<RateWindows>,
    settings: RwLock<Settings>,
    account_count: AtomicI64,
    sync11: AtomicBool,
    state: AtomicU8,
    events: AtomicU64,
    gaps: AtomicU64,
    last_seq: AtomicI64,
    statuses: Mutex<Statuses>,
    attempted: Mutex<Option<Instant>>,
    contacts: Mutex<ContactHistory>,
    dropped: Mutex<DropCounts>,
    metrics: Arc<Metrics>,
    /// Wakes a task that waits for the host's limits or for its next attempt.
    wake: Notify,
}

/// What an operator can change while the host is connected.
#[derive(Clone, Debug)]
struct Settings {
    account_limit: i64,
    overrides: RateOverrides,
    validation: Option<Validation>,
    rates: EventRates,
}

/// The status the database should hold, and what it holds.
#[derive(Clone, Copy, Debug)]
struct Statuses {
    wanted: HostStatus,
    stored: HostStatus,
    sync11_stored: bool,
}

/// No event has come yet.
const NO_SEQ: i64 = i64::MIN;

impl HostHandle {
    pub(super) fn new(
        row: &HostRow,
        host: HostName,
        recovered: RecoveredHost,
        in_flight: InFlightLimits,
        memory: Arc<Memory>,
        general: &HostLimits,
        metrics: Arc<Metrics>,
    ) -> Self {
        let settings = Settings {
            account_limit: row.account_limit,
            overrides: row.rates,
            validation: row.validation,
            rates: event_rates(row.account_limit, &row.rates, general),
        };
        let last_seq = recovered.cursor.unwrap_or(NO_SEQ);
        Self {
            id: row.id,
            host,
            progress: Arc::new(Progress::new(recovered, in_flight, memory)),
            windows: Mutex::new(RateWindows::new(Instant::now())),
            settings: RwLock::new(settings),
            account_count: AtomicI64::new(row.account_count),
            sync11: AtomicBool::new(row.sync11),
            state: AtomicU8::new(HostState::Stopped as u8),
            events: AtomicU64::new(0),
            gaps: AtomicU64::new(0),
            last_seq: AtomicI64::new(last_seq),
            statuses: Mutex::new(Statuses {
                wanted: row.status,
                stored: row.status,
                sync11_stored: row.sync11,
            }),
            attempted: Mutex::new(None),
            contacts: Mutex::default(),
            dropped: Mutex::default(),
            metrics,
            wake: Notify::new(),
        }
    }

    /// Its number in the database and in the log.
    pub fn id(&self) -> HostId {
        self.id
    }

    /// Its name and how it is reached; equal to [`crate::identity::Identity::pds`] of its accounts.
    pub fn host(&self) -> &HostName {
        &self.host
    }

    /// `host` or `host:port`.
    pub fn name(&self) -> &str {
        self.host.name()
    }

    /// Its own validation mode; `None` is the general one.
    pub fn validation(&self) -> Option<Validation> {
        self.settings.read().validation
    }

    /// Whether it ever sent a sync 1.1 commit: from then on it may not go back.
    pub fn sync11(&self) -> bool {
        self.sync11.load(Ordering::Relaxed)
    }

    /// Notes that it sent a sync 1.1 commit; the supervisor writes it to the database.
    pub fn mark_sync11(&self) {
        if !self.sync11() {
            self.sync11.store(true, Ordering::Relaxed);
        }
    }

    /// Accounts that count against its quota: those it has spoken for, throttled ones included, deleted ones not.
    pub fn account_count(&self) -> i64 {
        self.account_count.load(Ordering::Relaxed)
    }

    /// Accounts it may have before further ones are throttled.
    pub fn account_limit(&self) -> i64 {
        self.settings.read().account_limit
    }

    /// Counts a new account of this host. `false`: the host is over its quota and the account is to be throttled.
    pub fn admit_account(&self) -> bool {
        self.account_count.fetch_add(1, Ordering::Relaxed) < self.account_limit()
    }

    /// Whether all accounts that are counted, throttled ones included, are within its quota.
    pub fn fits_quota(&self) -> bool {
        self.account_count() <= self.account_limit()
    }

    /// Uncounts an account that moved to another host, or was deleted.
    pub fn release_account(&self) {
        let lower = |count: i64| (count > 0).then(|| count - 1);
        self.account_count
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, lower)
            .ok();
    }

    /// How many events it may send, from its quota or set by the operator.
    pub fn event_rates(&self) -> EventRates {
        self.settings.read().rates
    }

    /// How its connection stands.
    pub fn state(&self) -> HostState {
        let code = self.state.load(Ordering::Relaxed);
        HostState::ALL
            .into_iter()
            .find(|state| *state as u8 == code)
            .unwrap_or(HostState::Stopped)
    }

    /// Whether events may come: it is connected, held back or not.
    pub fn is_connected(&self) -> bool {
        matches!(self.state(), HostState::Connected | HostState::HeldBack)
    }

    /// Whether the operator banned it, or a domain above it.
    pub fn is_banned(&self) -> bool {
        self.state.load(Ordering::Relaxed) == HostState::Banned as u8
    }

    /// Events dropped since the relay started, by rule, with examples.
    pub fn drops(&self) -> Vec<Drops> {
        self.dropped.lock().all()
    }

    /// The numbers of [`HostHandle::drops`].
    pub fn drops_by_rule(&self) -> Vec<(Rule, u64)> {
        self.dropped.lock().by_rule()
    }

    /// Counts a dropped event: the one place where that is done. `did` and `reason` may be text of the host.
    pub fn count_drop(&self, rule: Rule, did: &str, seq: Option<i64>, reason: &dyn Display) {
        self.metrics.dropped[rule as usize].inc();
        self.dropped.lock().count(rule, did, seq, reason);
        let rule = rule.name();
        // Most drops are of verification: its log target shows all. Text is escaped by the log's format.
        tracing::debug!(
            target: "atproto_relay::verify",
            host = self.name(), did, seq, rule, reason = %reason, "event dropped"
        );
    }

    /// Records a change of its connection for the log.
    pub(crate) fn record_contact(&self, contact: Contact, reason: &dyn Display) {
        self.contacts.lock().record(contact, reason);
    }

    /// Takes the change of its connection that is due to be logged.
    pub(crate) fn take_contact_change(&self, now: std::time::Instant) -> Option<ContactChange> {
        self.contacts.lock().take_due(now)
    }

    /// Takes the summary of its dropped events that is due to be logged.
    pub(crate) fn take_drop_summary(&self, now: std::time::Instant) -> Option<DropSummary> {
        self.dropped.lock().take_summary(now)
    }

    /// Its status as the lexicons have it.
    pub fn status(&self) -> HostStatus {
        self.statuses.lock().wanted
    }

    /// Which of its events are settled.
    pub fn progress(&self) -> &Arc<Progress> {
        &self.progress
    }

    /// The seq of the last event taken from its socket, or the cursor it was resumed from.
    pub fn last_seq(&self) -> Option<i64> {
        Some(self.last_seq.load(Ordering::Relaxed)).filter(|seq| *seq != NO_SEQ)
    }

    /// Events taken from its socket since the relay started.
    pub fn events(&self) -> u64 {
        self.events.load(Ordering::Relaxed)
    }

    /// Known gaps in its stream: cursors it no longer had, or refused.
    pub fn gaps(&self) -> u64 {
        self.gaps.load(Ordering::Relaxed)
    }

    pub(crate) fn set_state(&self, state: HostState) {
        if state == HostState::Connecting {
            *self.attempted.lock() = Some(Instant::now());
        }
        self.state.store(state as u8, Ordering::Relaxed);
    }

    /// Resolves when the host's limits changed, or when somebody asks for an attempt now.
    pub(crate) async fn woken(&self) {
        self.wake.notified().await;
    }

    /// Ends the wait for the next attempt if the last one was at least `interval` ago.
    pub(crate) fn wake_if_waiting(&self, interval: Duration) {
        let attempted = *self.attempted.lock();
        let waiting = matches!(
            self.state(),
            HostState::Waiting | HostState::Offline | HostState::Refused
        );
        if waiting && attempted.is_none_or(|at| at.elapsed() >= interval) {
            self.wake.notify_one();
        }
    }

    /// Its status from now on. A ban stays: only the operator lifts it.
    pub(crate) fn set_status(&self, status: HostStatus) {
        let mut statuses = self.statuses.lock();
        if statuses.wanted != HostStatus::Banned {
            statuses.wanted = status;
        }
    }

    /// Notes a status that the caller has written to the database.
    pub(super) fn set_stored_status(&self, status: HostStatus) {
        let mut statuses = self.statuses.lock();
        statuses.wanted = status;
        statuses.stored = status;
    }

    /// The status to be written, if it differs from the written one.
    pub(super) fn unstored_status(&self) -> Option<HostStatus> {
        let statuses = self.statuses.lock();
        (statuses.wanted != statuses.stored).then_some(statuses.wanted)
    }

    /// Notes that `status` is in the database, without changing what is wanted.
    pub(super) fn status_was_stored(&self, status: HostStatus) {
        self.statuses.lock().stored = status;
    }

    pub(super) fn has_unstored_sync11(&self) -> bool {
        self.sync11() && !self.statuses.lock().sync11_stored
    }

    pub(super) fn sync11_was_stored(&self) {
        self.statuses.lock().sync11_stored = true;
    }

    /// Counts an event that was taken from its socket.
    pub(crate) fn count_event(&self, seq: i64) {
        self.last_seq.store(seq, Ordering::Relaxed);
        self.events.fetch_add(1, Ordering::Relaxed);
    }

    pub(crate) fn add_gap(&self) {
        self.gaps.fetch_add(1, Ordering::Relaxed);
    }

    /// Counts a message in the host's windows, or returns how long it must wait.
    pub(crate) fn admit(&self, cost: Cost) -> Result<(), Duration> {
        let rates = self.event_rates();
        self.windows.lock().admit(Instant::now(), cost, &rates)
    }

    /// Takes back bytes that were counted for a message before its length was known.
    pub(crate) fn take_back(&self, bytes: usize) {
        self.windows.lock().take_back(bytes);
    }

    pub(super) fn set_account_limit(&self, limit: i64, general: &HostLimits) {
        self.change(general, |settings| settings.account_limit = limit);
    }

    pub(super) fn set_overrides(&self, overrides: RateOverrides, general: &HostLimits) {
        self.change(general, |settings| settings.overrides = overrides);
    }

    /// Applies other general rates, as far as the operator set none for this host.
    pub(super) fn apply_limits(&self, general: &HostLimits) {
        self.change(general, |_| {});
    }

    pub(super) fn set_validation(&self, validation: Option<Validation>) {
        self.settings.write().validation = validation;
    }

    fn change(&self, general: &HostLimits, change: impl FnOnce(&mut Settings)) {
        let mut settings = self.settings.write();
        change(&mut settings);
        settings.rates = event_rates(settings.account_limit, &settings.overrides, general);
        drop(settings);
        self.wake.notify_one();
    }
}

/// The rates of a host: the reference relay's formula with its account quota for n, overridden where the operator did.
fn event_rates(account_limit: i64, overrides: &RateOverrides, general: &HostLimits) -> EventRates {
    let accounts = account_limit.max(0) as u64;
    let rate = |set: Option<u32>, rule: super::settings::Rate| match set {
        Some(set) => u64::from(set),
        None => rule.for_accounts(accounts) as u64,
    };
    EventRates {
        per_second: rate(overrides.per_second, general.per_second),
        per_hour: rate(overrides.per_hour, general.per_hour),
        per_day: rate(overrides.per_day, general.per_day),
        bytes_per_hour: overrides
            .bytes_per_hour
            .unwrap_or_else(|| general.bytes_per_hour.for_accounts(accounts) as u64),
        others_per_second: general.others_per_second,
    }
}

#[cfg(test)]
impl HostHandle {
    /// A host without a connection, for tests: `pds<id>.example.com`.
    pub(crate) fn fabricated(id: HostId, account_limit: i64, account_count: i64) -> Self {
        let row = HostRow {
            id,
            hostname: format!("pds{id}.example.com"),
            tls: true,
            status: HostStatus::Active,
            cursor: None,
            renumbered: None,
            account_limit,
            trusted: false,
            validation: None,
            sync11: false,
            rates: RateOverrides::default(),
            account_count,
            created_at: 0,
        };
        let guard = crate::dial::Guard::new(false);
        Self::new(
            &row,
            HostName::parse(&row.hostname, &guard).expect("a hostname"),
            RecoveredHost::default(),
            InFlightLimits::default(),
            Memory::new(super::memory::MemoryLimits::default(), Arc::default()),
            &HostLimits::default(),
            Arc::default(),
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rates_follow_the_quota_unless_they_are_set() {
        let host = HostHandle::fabricated(HostId(7), 100, 0);
        assert_eq!(
            host.event_rates(),
            EventRates {
                per_second: 50,
                per_hour: 2_600,
                per_day: 21_000,
                bytes_per_hour: 210_000_000,
                others_per_second: 20,
            }
        );
        host.set_account_limit(10_000_000, &HostLimits::default());
        let rates = EventRates {
            per_second: 10_050,
            per_hour: 10_002_500,
            per_day: 100_020_000,
            bytes_per_hour: 1_000_200_000_000,
            others_per_second: 20,
        };
        assert_eq!(host.event_rates(), rates);
        let overrides = RateOverrides {
            per_second: Some(7),
            bytes_per_hour: Some(8),
            ..RateOverrides::default()
        };
        host.set_overrides(overrides, &HostLimits::default());
        assert_eq!(
            host.event_rates(),
            EventRates {
                per_second: 7,
                bytes_per_hour: 8,
                ..rates
            }
        );
    }

    #[test]
    fn accounts_over_the_quota_are_not_admitted() {
        let host = HostHandle::fabricated(HostId(7), 3, 1);
        let admitted: Vec<bool> = (0..4).map(|_| host.admit_account()).collect();
        assert_eq!(
            (admitted, host.account_count()),
            (vec![true, true, false, false], 5)
        );
        for _ in 0..3 {
            host.release_account();
        }
        assert!(host.admit_account() && !host.admit_account());
    }

    #[test]
    fn statuses_are_written_when_they_change() {
        let host = HostHandle::fabricated(HostId(7), 1, 0);
        assert_eq!(host.unstored_status(), None);
        host.set_status(HostStatus::Offline);
        assert_eq!(host.unstored_status(), Some(HostStatus::Offline));
        host.status_was_stored(HostStatus::Offline);
        assert_eq!(
            (host.unstored_status(), host.status()),
            (None, HostStatus::Offline)
        );
        assert!(!host.has_unstored_sync11());
        host.mark_sync11();
        assert!(host.has_unstored_sync11());
        host.sync11_was_stored();
        assert!(!host.has_unstored_sync11() && host.sync11());
    }
}
