//! A configuration that was read again: what can be applied while the relay runs is applied, room by room.
//!
//! Applied means: as a restart with it would have done. What was decided under the former settings (the quota of a host
//! that was added, a consumer that was admitted) stays as it is.

use tracing::error;

use super::Relay;
use super::ingest::add_configured_host;
use crate::config::{Config, Reload};
use crate::dial::Guard;
use crate::telemetry::set_log_level;

impl Relay {
    /// Applies what of `new` can be applied, and says what cannot, one line for each setting.
    pub async fn reload(&self, new: Config) -> Reload {
        let mut last = self.last_config.lock().await;
        let reload = Reload::between(&self.config, &last, &new);
        // First, so that what follows is told as is wanted now.
        if let Err(failure) = set_log_level(&new.log_level) {
            error!("{failure}");
        }
        reload.tell();
        let waiting = reload.waiting.len() as i64;
        self.metrics().restart_needed.set(waiting);
        let (core, ingest) = (&self.running.core, &self.running.ingest);
        core.admin_password.apply(new.admin_password.clone());
        core.trusted_proxies.apply(new.trusted_proxies.clone());
        core.log.apply(&new.log);
        ingest.pipeline.apply(&new.verify, &new.identity);
        ingest.resolver.apply(&new.identity);
        let guard = Guard::new(self.config.allow_private_hosts);
        ingest.crawler.apply(&new.discovery);
        core.firehose.apply(&new.firehose);
        ingest.upstream.apply(&new.host_settings).await;
        // Known hosts among them that wait for their next attempt are tried now.
        for entry in &new.hosts {
            if let Err(failure) = add_configured_host(entry, guard, &ingest.upstream).await {
                error!("a configured host is left out: {failure}");
            }
        }
        *last = new;
        reload
    }

    /// Lets the caches go of a part of what they hold, because memory is short.
    pub fn shrinker(&self) -> impl Fn() + Send + use<> {
        let running = self.running.clone();
        move || {
            running.ingest.pipeline.shrink();
            running.ingest.resolver.shrink();
            running.core.log.shrink();
        }
    }
}
