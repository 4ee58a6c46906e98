//! Upstream: one connection per host, from the socket to the door of the verifying pipeline.
//! Promises order per host, bounded memory, and a cursor that moves only past settled events. Judges no event beyond
//! its frame and its sequence number.

mod backoff;
mod connection;
mod handle;
mod hosts;
mod incoming;
mod memory;
mod news;
mod progress;
mod rate;
mod runner;
mod socket;

use std::ops::Range;
use std::sync::Arc;
use std::time::Instant;

use bytes::Bytes;

use crate::atproto::did::Did;
use crate::atproto::frame::Kind;

pub use backoff::Backoff;
pub use handle::{HostHandle, HostState};
pub use hosts::{AddError, Checkpoint, Hosts, HostsOptions, Policy};
pub use memory::MemoryUse;
pub use news::{Drops, Example};
pub use progress::{Durable, InFlight, InFlightLimits, Progress, RecoveredHost, Settled};
pub use rate::{EventRates, RateWindows};

/// One event as it came from a host's socket, its frame checked for canonical form.
#[derive(Debug)]
pub struct Received {
    /// The host it came from.
    pub host: Arc<HostHandle>,
    /// The host's sequence number.
    pub seq: i64,
    /// Where that number stands in the frame.
    pub seq_span: Range<usize>,
    /// Which of the four kinds it is.
    pub kind: Kind,
    /// Whose event it claims to be, normalised.
    pub did: Did,
    /// The whole frame.
    pub frame: Bytes,
    /// When it was taken from the socket, after any wait for the host's limits.
    pub at: Instant,
    /// To be settled exactly once.
    pub permit: InFlight,
}

impl Received {
    /// From now on it waits for a look-up; see [`InFlight::park`].
    pub fn park(&mut self) {
        // What was read together shares its memory: one short event must not keep all of that.
        if self.permit.park() && self.frame.len() <= socket::READ_BYTES {
            self.frame = Bytes::copy_from_slice(&self.frame);
        }
    }
}

/// Where events go: the pipeline that verifies them.
pub trait Sink: Send + Sync + 'static {
    /// Takes an event. Events of one host arrive in its order; there are never more than their hosts may have in flight.
    fn submit(&self, event: Received);
}
