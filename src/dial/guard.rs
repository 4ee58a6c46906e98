//! The dial guard: resolves a name, keeps the addresses that may be reached, and connects to exactly those.
//! There is no second look-up between check and connect, so a name that changes its answer gains nothing.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use tokio::net::TcpStream;
use tokio::time::timeout;
use url::{Host, Url};

use super::address::is_public;
use super::host::{HostNameError, check_host};
use super::policy::Guard;

/// Longest wait for DNS.
const DNS_TIMEOUT: Duration = Duration::from_secs(10);

/// Longest wait for one TCP connection.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);

/// Maximum addresses tried per name.
const MAX_ADDRESSES: usize = 8;

/// Ports of public hosts: a host on another port could be any service.
const PUBLIC_PORTS: [u16; 2] = [443, 80];

/// Why a host was not reached.
#[derive(Debug, thiserror::Error)]
pub enum DialError {
    /// The name itself is refused.
    #[error(transparent)]
    Name(#[from] HostNameError),
    /// A port other than 443 and 80.
    #[error("port {port} of {host} may not be dialled")]
    Port { host: String, port: u16 },
    /// DNS gave addresses, but none that may be dialled.
    #[error("{host} has no public address ({found} is private or reserved)")]
    PrivateAddress { host: String, found: IpAddr },
    /// DNS gave nothing.
    #[error("{host} has no address")]
    NoAddress { host: String },
    /// DNS failed or took longer than 10 seconds.
    #[error("looking up {host}: {source}")]
    Dns { host: String, source: io::Error },
    /// None of the addresses took the connection.
    #[error("connecting to {host}: {source}")]
    Connect { host: String, source: io::Error },
}

impl DialError {
    /// Whether the guard refused, as opposed to the network failing.
    pub fn is_refusal(&self) -> bool {
        match self {
            Self::Name(_) | Self::Port { .. } | Self::PrivateAddress { .. } => true,
            Self::NoAddress { .. } | Self::Dns { .. } | Self::Connect { .. } => false,
        }
    }
}

impl Guard {
    /// Checks the parts of a URL that are known before DNS: scheme, host name, port.
    ///
    /// # Errors
    /// A refusal, see [`DialError::is_refusal`].
    pub fn check(&self, url: &Url) -> Result<(), DialError> {
        match url.scheme() {
            "https" | "wss" => {}
            "http" | "ws" if self.allow_private() => {}
            scheme => return Err(HostNameError::Scheme(scheme.to_owned()).into()),
        }
        let host = check_host(url, self)?;
        let port = url.port_or_known_default().unwrap_or(443);
        self.check_port(&host, port)
    }

    /// The addresses of `host` that may be dialled, in the order of the DNS answer; at least one.
    ///
    /// # Errors
    /// A refusal, or the failure of DNS.
    pub async fn resolve(&self, host: &str, port: u16) -> Result<Vec<SocketAddr>, DialError> {
        self.check_port(host, port)?;
        let found = match Host::parse(host) {
            Ok(Host::Ipv4(ip)) => vec![SocketAddr::new(ip.into(), port)],
            Ok(Host::Ipv6(ip)) => vec![SocketAddr::new(ip.into(), port)],
            _ => look_up(host, port).await?,
        };
        self.admit(host, found)
    }

    /// Connects to the first address of `host` that takes the connection.
    ///
    /// # Errors
    /// A refusal, or the failure of DNS or of the last address tried.
    pub async fn connect(&self, host: &str, port: u16) -> Result<TcpStream, DialError> {
        let mut last = None;
        for address in self
            .resolve(host, port)
            .await?
            .into_iter()
            .take(MAX_ADDRESSES)
        {
            match timeout(CONNECT_TIMEOUT, TcpStream::connect(address)).await {
                Ok(Ok(stream)) => {
                    stream.set_nodelay(true).ok();
                    return Ok(stream);
                }
                Ok(Err(error)) => last = Some(error),
                Err(_) => {
                    last = Some(io::Error::new(
                        io::ErrorKind::TimedOut,
                        "no answer within 10 seconds",
                    ))
                }
            }
        }
        let host = host.to_owned();
        Err(match last {
            Some(source) => DialError::Connect { host, source },
            None => DialError::NoAddress { host },
        })
    }

    /// Keeps the addresses that may be dialled.
    pub(super) fn admit(
        &self,
        host: &str,
        mut found: Vec<SocketAddr>,
    ) -> Result<Vec<SocketAddr>, DialError> {
        let first = found.first().copied();
        found.retain(|address| self.allow_private() || is_public(address.ip()));
        match (found.is_empty(), first) {
            (false, _) => Ok(found),
            (true, Some(first)) => Err(DialError::PrivateAddress {
                host: host.to_owned(),
                found: first.ip(),
            }),
            (true, None) => Err(DialError::NoAddress {
                host: host.to_owned(),
            }),
        }
    }

    fn check_port(&self, host: &str, port: u16) -> Result<(), DialError> {
        if self.allow_private() || PUBLIC_PORTS.contains(&port) {
            Ok(())
        } else {
            Err(DialError::Port {
                host: host.to_owned(),
                port,
            })
        }
    }
}

async fn look_up(host: &str, port: u16) -> Result<Vec<SocketAddr>, DialError> {
    let failed = |source| DialError::Dns {
        host: host.to_owned(),
        source,
    };
    match timeout(DNS_TIMEOUT, tokio::net::lookup_host((host, port))).await {
        Ok(Ok(found)) => Ok(found.collect()),
        Ok(Err(error)) => Err(failed(error)),
        Err(_) => Err(failed(io::Error::new(
            io::ErrorKind::TimedOut,
            "no answer within 10 seconds",
        ))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn addresses(list: &[&str]) -> Vec<SocketAddr> {
        list.iter()
            .map(|ip| SocketAddr::new(ip.parse().unwrap(), 443))
            .collect()
    }

    #[test]
    fn mixed_answers_keep_only_the_public_addresses() {
        let guard = Guard::new(false);
        let mixed = addresses(&[
            "10.0.0.1",
            "1.1.1.1",
            "::1",
            "2606:4700::1",
            "169.254.169.254",
        ]);
        assert_eq!(
            guard.admit("h", mixed).unwrap(),
            addresses(&["1.1.1.1", "2606:4700::1"])
        );
        let private = addresses(&["10.0.0.1", "::ffff:1.1.1.1"]);
        assert!(matches!(
            guard.admit("h", private),
            Err(DialError::PrivateAddress { .. })
        ));
        assert!(matches!(
            guard.admit("h", vec![]),
            Err(DialError::NoAddress { .. })
        ));
        assert_eq!(
            Guard::new(true)
                .admit("h", addresses(&["127.0.0.1"]))
                .unwrap(),
            addresses(&["127.0.0.1"])
        );
    }

    #[test]
    fn urls_are_checked_before_dns() {
        let guard = Guard::new(false);
        for (url, admitted) in [
            ("https://pds.example.com/xrpc/x?y=z", true),
            ("wss://pds.example.com/xrpc/x", true),
            ("https://pds.example.com:80/", true),
            ("https://pds.example.com:22/", false),
            ("http://pds.example.com/", false),
            ("https://127.0.0.1/", false),
            ("https://[fe80::1]/", false),
            ("https://localhost/", false),
            ("file:///etc/passwd", false),
        ] {
            let verdict = guard.check(&Url::parse(url).unwrap());
            assert_eq!(verdict.is_ok(), admitted, "{url}: {verdict:?}");
            assert!(
                verdict.err().is_none_or(|error| error.is_refusal()),
                "{url}"
            );
        }
        assert!(
            Guard::new(true)
                .check(&Url::parse("http://127.0.0.1:2583/").unwrap())
                .is_ok()
        );
    }

    #[tokio::test]
    async fn names_and_literals_of_this_machine_are_not_connected_to() {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let guard = Guard::new(false);
        assert!(matches!(
            guard.connect("127.0.0.1", 443).await,
            Err(DialError::PrivateAddress { .. })
        ));
        assert!(matches!(
            guard.connect("localhost", 443).await,
            Err(DialError::PrivateAddress { .. })
        ));
        assert!(matches!(
            guard.connect("[::ffff:127.0.0.1]", 80).await,
            Err(DialError::PrivateAddress { .. })
        ));
        assert!(matches!(
            guard.connect("127.0.0.1", port).await,
            Err(DialError::Port { .. })
        ));
        assert!(Guard::new(true).connect("127.0.0.1", port).await.is_ok());
    }
}
