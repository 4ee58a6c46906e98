//! The client of a request: the peer, or the client that a trusted proxy names.
//! Promises one answer for all limits and log lines. Decides no limit.

mod cidr;
mod forwarded;
mod limits;

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::Arc;

use http::HeaderMap;
use parking_lot::RwLock;

pub use cidr::Cidr;
pub use limits::{KeyedLimits, NETWORKS_PER_SITE, Network, Permit};

/// The other end of a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Peer {
    /// At an address.
    Tcp(SocketAddr),
    /// A process of this machine, with its credentials at the time of the connection (SO_PEERCRED).
    Unix { uid: u32, pid: Option<i32> },
}

impl Peer {
    /// Its address; that of a process of this machine is loopback.
    pub fn address(&self) -> IpAddr {
        match self {
            Peer::Tcp(peer) => peer.ip().to_canonical(),
            Peer::Unix { .. } => Ipv4Addr::LOCALHOST.into(),
        }
    }
}

impl fmt::Display for Peer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Peer::Tcp(peer) => peer.fmt(f),
            Peer::Unix {
                uid,
                pid: Some(pid),
            } => write!(f, "uid {uid}, pid {pid}"),
            Peer::Unix { uid, pid: None } => write!(f, "uid {uid}"),
        }
    }
}

/// The sender of a request. The listener puts it into the request's extensions.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Client {
    /// The other end of the connection.
    pub peer: Peer,
    /// The client's address, which a trusted proxy may have named.
    pub address: IpAddr,
}

impl Client {
    /// The client of a request with these headers.
    pub fn of(peer: Peer, headers: &HeaderMap, proxies: &TrustedProxies) -> Client {
        let named = match peer {
            Peer::Tcp(_) if proxies.trust(&peer) => {
                forwarded::client(headers, |address| proxies.contain(address))
            }
            _ => None,
        };
        Client {
            peer,
            address: named.unwrap_or_else(|| peer.address()),
        }
    }
}

/// Peers whose headers name the client. The set may change. Clones share it.
#[derive(Debug, Clone)]
pub struct TrustedProxies(Arc<RwLock<Vec<Cidr>>>);

impl Default for TrustedProxies {
    /// This machine.
    fn default() -> TrustedProxies {
        TrustedProxies::new(Cidr::loopback())
    }
}

impl TrustedProxies {
    /// Proxies in these networks.
    pub fn new(networks: Vec<Cidr>) -> TrustedProxies {
        TrustedProxies(Arc::new(RwLock::new(networks)))
    }

    /// Applies other networks from the next request on.
    pub fn apply(&self, networks: Vec<Cidr>) {
        *self.0.write() = networks;
    }

    /// Whether a peer may name clients.
    pub fn trust(&self, peer: &Peer) -> bool {
        match peer {
            Peer::Tcp(peer) => self.contain(peer.ip()),
            Peer::Unix { .. } => true,
        }
    }

    fn contain(&self, address: IpAddr) -> bool {
        self.0
            .read()
            .iter()
            .any(|network| network.contains(address))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use http::HeaderValue;

    #[test]
    fn forwarded_addresses_are_believed_from_trusted_peers_only() {
        let cases: [(&str, &[&str], &str); 7] = [
            ("127.0.0.1:9", &[], "127.0.0.1"),
            ("127.0.0.1:9", &["192.0.2.7"], "192.0.2.7"),
            ("[::1]:9", &["6.6.6.6, 192.0.2.7"], "192.0.2.7"),
            (
                "[::ffff:127.0.0.1]:9",
                &["6.6.6.6", "2001:db8::1"],
                "2001:db8::1",
            ),
            ("127.0.0.1:9", &["nonsense"], "127.0.0.1"),
            ("192.0.2.1:9", &["6.6.6.6"], "192.0.2.1"),
            ("[::ffff:192.0.2.1]:9", &[], "192.0.2.1"),
        ];
        for (peer, forwarded, expected) in cases {
            let mut headers = HeaderMap::new();
            for line in forwarded {
                let value = HeaderValue::from_str(line).expect("a value");
                headers.append("x-forwarded-for", value);
            }
            let peer = Peer::Tcp(peer.parse().expect("an address"));
            let client = Client::of(peer, &headers, &TrustedProxies::default());
            assert_eq!(client.address.to_string(), expected, "{peer} {forwarded:?}");
        }
    }
}
