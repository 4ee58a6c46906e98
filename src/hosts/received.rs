//! An event as a host sent it, on its way from the socket to the pipeline.

use std::ops::Range;
use std::sync::Arc;
use std::time::Instant;

use bytes::Bytes;

use super::handle::HostHandle;
use super::progress::InFlight;
use crate::atproto::did::Did;
use crate::atproto::frame::Kind;

/// Bytes read from a host's socket at a time, and the longest message that is taken out of that buffer without a copy:
/// there are thousands of connections, and most carry little.
pub(crate) const READ_BYTES: usize = 16 * 1024;

/// An event from a host's socket. Its frame is in canonical form.
#[derive(Debug)]
pub struct Received {
    /// The host that sent it.
    pub host: Arc<HostHandle>,
    /// The host's sequence number.
    pub seq: i64,
    /// Where that number stands in the frame.
    pub seq_span: Range<usize>,
    /// Which of the four kinds it is.
    pub kind: Kind,
    /// The account it claims to be from, normalised.
    pub did: Did,
    /// The whole frame.
    pub frame: Bytes,
    /// When it was taken from the socket, after any wait for the host's limits.
    pub at: Instant,
    /// To be settled exactly once.
    pub permit: InFlight,
}

impl Received {
    /// The event waits for a look-up from now on; see [`InFlight::park`].
    pub fn park(&mut self) {
        // Frames that were read together share one buffer: a short parked frame must not keep all of it.
        if self.permit.park() && self.frame.len() <= READ_BYTES {
            self.frame = Bytes::copy_from_slice(&self.frame);
        }
    }
}
