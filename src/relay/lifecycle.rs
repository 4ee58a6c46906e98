//! The phases of a relay, which its tasks wait for, and the failure that ends it early.

use std::future::Future;

use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tracing::error;

/// The end of a relay, phase by phase. Before them it is running.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Phase {
    /// No connection is accepted any more. Hosts are disconnected, and what they sent becomes durable.
    Draining,
    /// Consumers are disconnected, and the database takes the last changes. Background tasks end.
    Closing,
}

/// The phase and the failure of a relay. Clones share them.
#[derive(Clone)]
pub(super) struct Lifecycle {
    draining: CancellationToken,
    closing: CancellationToken,
    failure: watch::Sender<Option<String>>,
}

impl Default for Lifecycle {
    fn default() -> Self {
        Self {
            draining: CancellationToken::new(),
            closing: CancellationToken::new(),
            failure: watch::Sender::new(None),
        }
    }
}

impl Lifecycle {
    /// Enters a phase.
    pub fn enter(&self, phase: Phase) {
        self.until(phase).cancel();
    }

    /// A token that is cancelled when the phase begins.
    pub fn until(&self, phase: Phase) -> CancellationToken {
        match phase {
            Phase::Draining => self.draining.clone(),
            Phase::Closing => self.closing.clone(),
        }
    }

    /// Whether the phase has begun.
    pub fn has_entered(&self, phase: Phase) -> bool {
        self.until(phase).is_cancelled()
    }

    /// Records why the relay must stop; the first reason stays.
    pub fn fail(&self, reason: String) {
        error!("{reason}");
        self.failure.send_if_modified(|recorded| {
            let is_first = recorded.is_none();
            recorded.get_or_insert(reason);
            is_first
        });
    }

    /// Resolves with the reason when the relay must stop.
    pub fn failed(&self) -> impl Future<Output = String> + Send + use<> {
        let mut failure = self.failure.subscribe();
        async move {
            let reason = failure.wait_for(Option::is_some).await;
            match reason.ok().and_then(|reason| reason.clone()) {
                Some(reason) => reason,
                None => std::future::pending().await,
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt;

    use super::*;

    #[test]
    fn the_first_failure_stays_and_phases_are_entered_one_by_one() {
        let lifecycle = Lifecycle::default();
        assert_eq!(lifecycle.failed().now_or_never(), None);
        lifecycle.fail("the first".into());
        lifecycle.clone().fail("the second".into());
        assert_eq!(lifecycle.failed().now_or_never(), Some("the first".into()));
        lifecycle.enter(Phase::Draining);
        assert!(lifecycle.has_entered(Phase::Draining) && !lifecycle.has_entered(Phase::Closing));
    }
}
