//! Who may be dialled: the one door through which the relay reaches addresses that strangers name.
//! Every host is checked by name before DNS and by address after it, and the address that was checked is the one
//! that is connected to. This room knows nothing of what is said over a connection.

mod address;
mod domain;
mod guard;
mod host;
mod http;
mod policy;
mod tls;

pub use address::is_public;
pub use domain::DomainPattern;
pub use guard::DialError;
pub use host::{HostName, HostNameError, is_dns_name};
pub use http::{
    FetchError, Fetched, directory_client, fetch, get, http_client, plain_client,
    plain_client_builder, relay_mark,
};
pub use policy::Guard;
pub use tls::{client_config, speaks_no_tls};

/// What the relay calls itself in `User-Agent` and `Server` headers; the part in brackets is how relays know each other.
pub const PRODUCT: &str = concat!(
    "atproto-relay/",
    env!("CARGO_PKG_VERSION"),
    " (atproto-relay)"
);

/// What every relay has in its `Server` header (the reference relay's convention).
const RELAY_MARK: &str = "atproto-relay";
