//! Banned domains: those of the configuration and those in the database. Disconnects nobody.

use std::collections::HashMap;

use parking_lot::RwLock;

use crate::dial::DomainPattern;
use crate::store::{Store, StoreError};

/// Banned domains. A ban covers the domain and all names below it.
pub(super) struct DomainBans {
    store: Store,
    configured: RwLock<Vec<DomainPattern>>,
    stored: RwLock<HashMap<String, DomainPattern>>,
}

impl DomainBans {
    /// Reads the stored bans.
    pub(super) async fn load(
        store: Store,
        configured: Vec<DomainPattern>,
    ) -> Result<Self, StoreError> {
        let stored = store.domain_bans().await?;
        let stored = stored.iter().filter_map(|domain| pattern(domain)).collect();
        Ok(Self {
            store,
            configured: RwLock::new(configured),
            stored: RwLock::new(stored),
        })
    }

    pub(super) fn matches(&self, domain: &str) -> bool {
        let (configured, stored) = (self.configured.read(), self.stored.read());
        let mut bans = configured.iter().chain(stored.values());
        bans.any(|ban| ban.matches(domain))
    }

    /// Replaces the bans of the configuration.
    pub(super) fn set_configured(&self, domains: Vec<DomainPattern>) {
        *self.configured.write() = domains;
    }

    /// Stores a ban. Returns whether the domain was not banned before.
    pub(super) async fn add(&self, domain: &str) -> Result<bool, StoreError> {
        let is_new = self.store.ban_domain(domain).await?;
        self.stored.write().extend(pattern(domain));
        Ok(is_new)
    }

    /// Removes a stored ban. Returns whether there was one.
    pub(super) async fn remove(&self, domain: &str) -> Result<bool, StoreError> {
        let was_banned = self.store.unban_domain(domain).await?;
        self.stored.write().remove(&domain.to_ascii_lowercase());
        Ok(was_banned)
    }
}

/// A stored ban as a pattern; a stored text that is no domain bans nothing.
fn pattern(domain: &str) -> Option<(String, DomainPattern)> {
    let pattern = DomainPattern::banned(domain)
        .inspect_err(|error| tracing::warn!(domain, error, "banned domain is not a domain"))
        .ok()?;
    Some((domain.to_ascii_lowercase(), pattern))
}
