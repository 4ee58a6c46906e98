//! Where the operator's own listener is: a path of this machine, or an address.

use std::fmt;
use std::net::SocketAddr;
use std::path::PathBuf;

/// What a path begins with.
const UNIX: &str = "unix:";

/// The address of the admin listener.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum AdminListen {
    /// A Unix socket: its file mode says who the operator is.
    Unix(PathBuf),
    /// An address: the password says it.
    Tcp(SocketAddr),
}

impl AdminListen {
    /// Reads `unix:/path`; an address is read by `address`.
    pub(super) fn parse(
        text: &str,
        address: impl FnOnce() -> Result<SocketAddr, String>,
    ) -> Result<AdminListen, String> {
        const FORM: &str = "must be unix: and a whole path, or an address and a port, as in unix:/run/atproto-relay/admin.sock";
        match text.strip_prefix(UNIX) {
            Some(path) if path.starts_with('/') => Ok(AdminListen::Unix(path.into())),
            Some(_) => Err(FORM.into()),
            None => address().map(AdminListen::Tcp).map_err(|_| FORM.into()),
        }
    }
}

impl fmt::Display for AdminListen {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            AdminListen::Unix(path) => write!(f, "{UNIX}{}", path.display()),
            AdminListen::Tcp(address) => address.fmt(f),
        }
    }
}
