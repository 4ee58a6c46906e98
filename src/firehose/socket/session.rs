//! What a session has beside its connection: the server, its entry in the registry, its wake-ups.

use super::Server;
use super::close_codes::INTERNAL_ERROR;
use super::consumers::Registration;
use super::end::End;
use super::stream::{Closing, SourceError};
use super::wakeups::WakeUps;

/// What a session needs beside its connection.
pub(super) struct Session {
    pub server: Server,
    pub registration: Registration,
    /// Ends the waits of a consumer that has every event.
    pub wakeups: WakeUps,
}

impl Session {
    /// How the connection ends whose source has no next bytes.
    pub fn source_failed(&self, error: SourceError) -> End {
        let info = self.registration.info();
        match error {
            SourceError::TooSlow(closing) => {
                self.server.options.metrics.too_slow.inc();
                self.registration.fell_out();
                tracing::info!(id = info.id, remote = %info.remote_addr, "consumer fell out of the window");
                End::Close(closing)
            }
            SourceError::Withdrawn => End::Cut("an event was redacted while it was sent"),
            SourceError::Unreadable(error) => {
                tracing::error!(id = info.id, %error, "a consumer cannot be served");
                End::Close(Closing::new(INTERNAL_ERROR, "the event log cannot be read"))
            }
        }
    }
}
