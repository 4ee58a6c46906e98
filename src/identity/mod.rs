//! Who an account is: its DID resolved to PDS, signing key and claimed handles, cached and with bounded effort.
//! Whether an event agrees with an identity is decided elsewhere; handles are claims and are not looked up.

mod cache;
mod metrics;
mod repo_status;
mod resolver;
mod sources;

use crate::atproto::did::Did;
use crate::atproto::key::PublicKey;

pub use crate::dial::HostName;
pub use metrics::Metrics;
pub use repo_status::{RepoStatus, RepoStatusError};
pub use resolver::{Resolver, Settings};

/// What a DID document says about an account.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Identity {
    /// Whose identity it is.
    pub did: Did,
    /// The host of its repository; `None` without a usable entry.
    pub pds: Option<HostName>,
    /// The key that signs its commits; `None` without a usable entry.
    pub signing_key: Option<PublicKey>,
    /// The handles it claims, in the document's order, without `at://`.
    pub handles: Vec<String>,
    /// When the document was read, in seconds since 1970.
    pub resolved_at: i64,
}

/// Why an account has no identity.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ResolveError {
    /// The directory or the host knows no such DID.
    #[error("the DID does not exist")]
    NotFound,
    /// The DID was given up for good.
    #[error("the DID is tombstoned")]
    Tombstoned,
    /// The DID's method or form is not supported, or its document is unusable.
    #[error("the identity is not usable: {0}")]
    Invalid(String),
    /// The directory or the host did not answer; a later attempt may succeed.
    #[error("the identity could not be read: {0}")]
    Unavailable(String),
    /// The directory's rate lets no look-up through for now; a later attempt may succeed.
    #[error("too many look-ups are waiting for the directory")]
    RateLimited,
}

/// Whose budget a forced look-up spends: the host whose event asks, by its number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Requester(pub u32);

impl Requester {
    /// Whoever asks for itself and for no host, as a command line does.
    pub const NO_HOST: Self = Self(0);
}

impl ResolveError {
    /// Whether a later attempt may succeed without anybody changing anything.
    pub fn is_temporary(&self) -> bool {
        match self {
            Self::Unavailable(_) | Self::RateLimited => true,
            Self::NotFound | Self::Tombstoned | Self::Invalid(_) => false,
        }
    }
}
