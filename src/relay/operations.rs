//! The operations of the API, carried out by the parts of a running relay.

use std::sync::Arc;

use futures_util::future::BoxFuture;

use super::running::Running;
use crate::api::{HostActivity, HostStanding, OperationError, Operations};
use crate::atproto::did::Did;
use crate::discovery::{CrawlError, Requester};
use crate::firehose::ConsumerInfo;
use crate::store::{HostId, LocalStatus, RateOverrides, Validation};
use crate::telemetry::Health;
use crate::verify::CommandError;

impl From<CommandError> for OperationError {
    fn from(error: CommandError) -> Self {
        match error {
            CommandError::UnknownAccount => OperationError::UnknownAccount,
            CommandError::ShuttingDown => OperationError::ShuttingDown,
        }
    }
}

impl Operations for Running {
    fn request_crawl<'a>(
        &'a self,
        hostname: &'a str,
        requester: Requester,
    ) -> BoxFuture<'a, Result<(), CrawlError>> {
        Box::pin(async move {
            self.ingest
                .crawler
                .request_crawl(hostname, requester)
                .await
                .map(drop)
        })
    }

    fn ban_host(&self, host: HostId) -> BoxFuture<'_, Result<(), OperationError>> {
        Box::pin(async move { Ok(self.ingest.upstream.ban(host).await?) })
    }

    fn unban_host(&self, host: HostId) -> BoxFuture<'_, Result<(), OperationError>> {
        Box::pin(async move { Ok(self.ingest.upstream.unban(host).await?) })
    }

    fn set_account_limit(
        &self,
        host: HostId,
        limit: i64,
    ) -> BoxFuture<'_, Result<(), OperationError>> {
        Box::pin(async move {
            for did in self.ingest.hosts.set_account_limit(host, limit).await? {
                self.ingest
                    .pipeline
                    .set_local_status(did, LocalStatus::Active, Some(LocalStatus::Throttled))
                    .await?;
            }
            Ok(())
        })
    }

    fn set_rates(
        &self,
        host: HostId,
        rates: RateOverrides,
    ) -> BoxFuture<'_, Result<(), OperationError>> {
        Box::pin(async move { Ok(self.ingest.hosts.set_rates(host, rates).await?) })
    }

    fn set_validation(
        &self,
        host: HostId,
        mode: Option<Validation>,
    ) -> BoxFuture<'_, Result<(), OperationError>> {
        Box::pin(async move { Ok(self.ingest.hosts.set_validation(host, mode).await?) })
    }

    fn ban_domain<'a>(&'a self, domain: &'a str) -> BoxFuture<'a, Result<bool, OperationError>> {
        Box::pin(async move { Ok(self.ingest.upstream.ban_domain(domain).await?) })
    }

    fn unban_domain<'a>(&'a self, domain: &'a str) -> BoxFuture<'a, Result<bool, OperationError>> {
        Box::pin(async move { Ok(self.ingest.upstream.unban_domain(domain).await?) })
    }

    fn take_down(&self, did: Did) -> BoxFuture<'_, Result<(), OperationError>> {
        Box::pin(async move {
            Ok(self
                .ingest
                .pipeline
                .set_local_status(did, LocalStatus::TakenDown, None)
                .await?)
        })
    }

    fn reverse_takedown(&self, did: Did) -> BoxFuture<'_, Result<(), OperationError>> {
        Box::pin(async move {
            let only_from = Some(LocalStatus::TakenDown);
            Ok(self
                .ingest
                .pipeline
                .set_local_status(did, LocalStatus::Active, only_from)
                .await?)
        })
    }

    fn activity(&self, host: HostId) -> Option<HostActivity> {
        let host = self.ingest.hosts.get(host)?;
        let rates = host.event_rates();
        Some(HostActivity {
            connected: host.is_connected(),
            events: host.events(),
            per_second: rates.per_second as f64,
            per_hour: rates.per_hour as f64,
            per_day: rates.per_day as f64,
            bytes_per_hour: rates.bytes_per_hour as f64,
        })
    }

    fn standing(&self, host: HostId) -> Option<HostStanding> {
        let host = self.ingest.hosts.get(host)?;
        Some(HostStanding {
            cursor: host.progress().cursor(),
            status: host.status(),
            account_count: host.account_count(),
        })
    }

    fn consumers(&self) -> Vec<ConsumerInfo> {
        self.core.firehose.consumers().list()
    }

    fn health(&self) -> Arc<Health> {
        self.health.borrow().clone()
    }
}
