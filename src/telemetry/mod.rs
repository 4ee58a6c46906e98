//! What the relay says about itself: log lines, metrics, health.
//!
//! Log lines go to stderr, or to the journal with fields when systemd started the process. Rooms make their metrics in
//! the [`Registry`] of their relay; [`router`] serves it. Nothing here knows the rooms it reports on: they count, or are
//! asked through [`Observed`].

mod health;
mod logging;
mod metrics;
mod registry;
mod server;

pub use health::{Change, Finding, Health, Problem, ProblemName, Reader, Watch};
pub use logging::{LogFormat, LoggingError, init_logging, set_log_level, stderr_is_journal};
pub use metrics::{Metrics, metrics};
pub(crate) use registry::room_metrics;
pub use registry::{DISK_SECONDS, Registry};
pub use server::{Observed, router};
