//! Hosts: what the relay knows of each one, and the registry of all of them.
//!
//! A [`HostHandle`] holds a host's limits, counts, memory and [`Progress`]: its cursor moves only past settled events.
//! [`Hosts`] is the registry, with bans, quotas and the statuses in the database. Opens no connection: see
//! [`crate::upstream`].

mod bans;
mod checkpoint;
mod contact;
mod drops;
mod handle;
mod index;
mod meaning;
mod memory;
mod metrics;
mod progress;
mod rate;
mod received;
mod registry;
pub mod roster;
mod rule;
mod settings;
mod state;
mod statuses;

pub use checkpoint::Checkpoint;
pub(crate) use contact::{Contact, ContactChange};
pub(crate) use drops::DropSummary;
pub use drops::{Drops, Example};
pub use handle::HostHandle;
pub use index::HostIndex;
pub use meaning::Meaning;
pub use memory::{MemoryLimits, MemoryUse};
pub use metrics::Metrics;
pub(crate) use progress::Room;
pub use progress::{Durable, InFlight, InFlightLimits, Progress, RecoveredHost, Settled};
pub(crate) use rate::Cost;
pub use rate::{EventRates, RateWindows};
pub(crate) use received::READ_BYTES;
pub use received::Received;
pub use registry::{AddError, Hosts, HostsOptions};
pub use rule::Rule;
pub use settings::{HostLimits, Rate, Settings};
pub use state::HostState;
