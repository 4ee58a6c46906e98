//! upstream
mod backoff;
mod progress;
mod rate;
pub use backoff::Backoff;
pub use progress::{InFlight, InFlightLimits, Progress, RecoveredHost, Settled};
pub use rate::{EventRates, RateWindows};
