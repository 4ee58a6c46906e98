//! Upstream: one connection per host, from the socket to the verifying pipeline.
//! Promises order per host, bounded memory, and a cursor that moves only past settled events. Judges no event beyond
//! its frame and its sequence number.

mod backoff;
mod connection;
mod end;
mod host_log;
mod housekeeping;
mod incoming;
mod metrics;
mod runner;
mod shared;
mod socket;
mod supervisor;

pub use backoff::Backoff;
pub use metrics::Metrics;
pub use supervisor::{Settings, Supervisor, UpstreamOptions};
