//! What the API asks of the running relay, beside reading the database. The relay's wiring answers;
//! a test can answer in its place.

use crate::atproto::did::Did;
use crate::discovery::{CrawlError, Requester};
use crate::firehose::ConsumerInfo;
use crate::store::{HostId, HostStatus, RateOverrides, StoreError, Validation};
use crate::telemetry::Health;
use futures_util::future::BoxFuture;
use std::sync::Arc;

/// The relay at work, as the operator's requests change it.
///
/// Every change is stored when its future resolves with `Ok`, and in force for the next event.
pub trait Operations: Send + Sync + 'static {
    /// Checks a host and subscribes to it.
    fn request_crawl<'a>(
        &'a self,
        hostname: &'a str,
        requester: Requester,
    ) -> BoxFuture<'a, Result<(), CrawlError>>;

    /// Bans a host and cuts its connection.
    fn ban_host(&self, host: HostId) -> BoxFuture<'_, Result<(), OperationError>>;

    /// Lifts the ban of a host and connects to it.
    fn unban_host(&self, host: HostId) -> BoxFuture<'_, Result<(), OperationError>>;

    /// Sets a host's account quota, and releases the throttled accounts that now have room.
    fn set_account_limit(
        &self,
        host: HostId,
        limit: i64,
    ) -> BoxFuture<'_, Result<(), OperationError>>;

    /// Sets a host's event rates.
    fn set_rates(
        &self,
        host: HostId,
        rates: RateOverrides,
    ) -> BoxFuture<'_, Result<(), OperationError>>;

    /// Sets a host's validation mode; `None` is the general one.
    fn set_validation(
        &self,
        host: HostId,
        mode: Option<Validation>,
    ) -> BoxFuture<'_, Result<(), OperationError>>;

    /// Bans a domain, and cuts the connections of hosts below it. Says whether it was not banned before.
    fn ban_domain<'a>(&'a self, domain: &'a str) -> BoxFuture<'a, Result<bool, OperationError>>;

    /// Lifts the ban of a domain, and connects to its hosts. Says whether there was one.
    fn unban_domain<'a>(&'a self, domain: &'a str) -> BoxFuture<'a, Result<bool, OperationError>>;

    /// Takes an account down, tells consumers, and removes its events from what is served.
    fn take_down(&self, did: Did) -> BoxFuture<'_, Result<(), OperationError>>;

    /// Lifts the takedown of an account, and tells consumers. Another status stays as it is.
    fn reverse_takedown(&self, did: Did) -> BoxFuture<'_, Result<(), OperationError>>;

    /// What a host's connection is doing; `None` for a host that is not known.
    fn activity(&self, host: HostId) -> Option<HostActivity>;

    /// How the relay stands to a host now; `None` where only the database knows.
    fn standing(&self, host: HostId) -> Option<HostStanding>;

    /// Who is connected to the firehose, the oldest first.
    fn consumers(&self) -> Vec<ConsumerInfo>;

    /// The state of the relay when it was last looked at.
    fn health(&self) -> Arc<Health>;
}

/// How the relay stands to a host. The database has it a moment later.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HostStanding {
    /// Its last settled sequence number; `None` before the first event.
    pub cursor: Option<i64>,
    /// Whether it is read.
    pub status: HostStatus,
    /// Accounts whose host it is.
    pub account_count: i64,
}

/// What a host's connection is doing.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct HostActivity {
    /// Whether there is a connection now.
    pub connected: bool,
    /// Events received since the start of the process.
    pub events: u64,
    /// Events allowed in a second, an hour, and a day.
    pub per_second: f64,
    /// See `per_second`.
    pub per_hour: f64,
    /// See `per_second`.
    pub per_day: f64,
    /// Bytes allowed in an hour.
    pub bytes_per_hour: f64,
}

/// Why a change was not made.
#[derive(Debug, thiserror::Error)]
pub enum OperationError {
    /// No event of the account was ever seen.
    #[error("the account is not known to this relay")]
    UnknownAccount,
    /// The relay is going down.
    #[error("the relay is shutting down")]
    ShuttingDown,
    /// The database failed.
    #[error(transparent)]
    Store(#[from] StoreError),
}
