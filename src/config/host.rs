//! Hosts and domains as an operator writes them: `pds.example.com`, `https://pds.example.com`,
//! `http://127.0.0.1:2583`, `*.host.bsky.network`. Syntax only: nothing is looked up.

use std::fmt;

use url::{Host, Url};

use crate::dial::RESERVED_TOP_LEVEL;

/// Why a text is not a host.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum HostSyntaxError {
    /// Not a URL or host name at all.
    #[error("`{0}` is not a host name or URL, as in pds.example.com or https://pds.example.com")]
    NotAHost(String),
    /// A scheme other than http, https, ws and wss.
    #[error("`{0}` has an unknown scheme; use https (or http with --allow-private-hosts)")]
    Scheme(String),
    /// A path, query, user or fragment.
    #[error("`{0}` has more than a scheme, a host and a port")]
    TooMuch(String),
}

/// A host to subscribe to.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct HostEntry {
    /// `host` or `host:port`, lower case, without the scheme's default port.
    pub hostname: String,
    /// Whether to connect with TLS.
    pub tls: bool,
}

impl HostEntry {
    /// Parses a host name or a URL. A bare name means https, a bare `localhost` http.
    pub fn parse(text: &str) -> Result<HostEntry, HostSyntaxError> {
        let text = text.trim();
        let not_a_host = || HostSyntaxError::NotAHost(text.to_owned());
        let url = if text.contains("://") {
            Url::parse(text).map_err(|_| not_a_host())?
        } else {
            let url = Url::parse(&format!("https://{text}")).map_err(|_| not_a_host())?;
            if is_localhost(&url) {
                Url::parse(&format!("http://{text}")).map_err(|_| not_a_host())?
            } else {
                url
            }
        };
        let tls = match url.scheme() {
            "https" | "wss" => true,
            "http" | "ws" => false,
            _ => return Err(HostSyntaxError::Scheme(text.to_owned())),
        };
        let bare = url.username().is_empty() && url.password().is_none();
        if !bare || url.path().len() > 1 || url.query().is_some() || url.fragment().is_some() {
            return Err(HostSyntaxError::TooMuch(text.to_owned()));
        }
        let name = match url.host().ok_or_else(not_a_host)? {
            Host::Domain(name) => {
                let name = name.strip_suffix('.').unwrap_or(name);
                if !is_dns_name(name) {
                    return Err(not_a_host());
                }
                name.to_owned()
            }
            address => address.to_string(),
        };
        let hostname = match url.port() {
            Some(port) => format!("{name}:{port}"),
            None => name,
        };
        Ok(HostEntry { hostname, tls })
    }

    /// Whether the relay may connect without `--allow-private-hosts`: https on its own port, to a
    /// public-looking DNS name. The addresses behind the name are judged when it connects.
    pub fn is_public(&self) -> bool {
        let ending = self.hostname.rsplit('.').next().unwrap_or_default();
        self.tls
            && self.hostname.contains('.')
            && !self.hostname.contains(':')
            && !RESERVED_TOP_LEVEL.contains(&ending)
            && !ending.bytes().all(|b| b.is_ascii_digit())
    }
}

impl fmt::Display for HostEntry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let scheme = if self.tls { "https" } else { "http" };
        write!(f, "{scheme}://{}", self.hostname)
    }
}

fn is_localhost(url: &Url) -> bool {
    matches!(url.host(), Some(Host::Domain(name)) if name == "localhost" || name.ends_with(".localhost"))
}

/// DNS host name syntax: labels of letters, digits and inner hyphens.
fn is_dns_name(name: &str) -> bool {
    name.len() <= 253
        && name.split('.').all(|label| {
            (1..=63).contains(&label.len())
                && !label.starts_with('-')
                && !label.ends_with('-')
                && label
                    .bytes()
                    .all(|b| b.is_ascii_alphanumeric() || b == b'-')
        })
}

/// A domain that a host name can match: itself, its subdomains, or both.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DomainPattern {
    domain: String,
    itself: bool,
    below: bool,
}

impl DomainPattern {
    /// A pattern that grants trust: `example.com` is that host only, `*.example.com` only what is below it.
    pub fn trusted(text: &str) -> Result<DomainPattern, String> {
        let (domain, below) = split_pattern(text)?;
        Ok(DomainPattern {
            domain,
            itself: !below,
            below,
        })
    }

    /// A pattern that bans: `example.com` is that host and all below it, `*.example.com` only what is below it.
    pub fn banned(text: &str) -> Result<DomainPattern, String> {
        let (domain, wildcard) = split_pattern(text)?;
        Ok(DomainPattern {
            domain,
            itself: !wildcard,
            below: true,
        })
    }

    /// Whether a host name (without port) matches.
    pub fn matches(&self, hostname: &str) -> bool {
        let hostname = hostname.to_ascii_lowercase();
        match hostname.strip_suffix(&self.domain) {
            Some("") => self.itself,
            Some(before) => self.below && before.len() > 1 && before.ends_with('.'),
            None => false,
        }
    }
}

impl fmt::Display for DomainPattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let star = if self.itself { "" } else { "*." };
        write!(f, "{star}{}", self.domain)
    }
}

fn split_pattern(text: &str) -> Result<(String, bool), String> {
    let text = text.trim().to_ascii_lowercase();
    let (domain, wildcard) = match text.strip_prefix("*.") {
        Some(domain) => (domain, true),
        None => (text.as_str(), false),
    };
    if !is_dns_name(domain) {
        return Err(format!(
            "`{text}` is not a domain, as in example.com or *.example.com"
        ));
    }
    Ok((domain.to_owned(), wildcard))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hosts_are_normalised() {
        for (text, hostname, tls, public) in [
            ("PDS.Example.com", "pds.example.com", true, true),
            ("pds.example.com.", "pds.example.com", true, true),
            ("https://pds.example.com/", "pds.example.com", true, true),
            ("wss://pds.example.com:443", "pds.example.com", true, true),
            (
                "https://pds.example.com:8443",
                "pds.example.com:8443",
                true,
                false,
            ),
            ("http://pds.example.com", "pds.example.com", false, false),
            ("localhost:2583", "localhost:2583", false, false),
            ("ws://127.0.0.1:2583", "127.0.0.1:2583", false, false),
            ("10.0.0.1", "10.0.0.1", true, false),
            ("https://[::1]:2583", "[::1]:2583", true, false),
            ("pds.local", "pds.local", true, false),
            ("pds", "pds", true, false),
        ] {
            let entry = HostEntry::parse(text).unwrap();
            assert_eq!(
                (entry.hostname.as_str(), entry.tls),
                (hostname, tls),
                "{text}"
            );
            assert_eq!(entry.is_public(), public, "{text}");
            assert_eq!(HostEntry::parse(&entry.to_string()), Ok(entry), "{text}");
        }
    }

    #[test]
    fn what_is_no_host_is_refused() {
        for text in [
            "",
            "https://",
            "ftp://pds.example.com",
            "https://pds.example.com/xrpc",
            "user@pds.example.com",
            "pds.example.com?x=1",
            "pds_1.example.com",
            "a b",
            "-a.example.com",
            "https://pds.example.com:99999",
        ] {
            assert!(HostEntry::parse(text).is_err(), "{text}");
        }
    }

    #[test]
    fn patterns_of_trust_and_of_bans() {
        let trusted = DomainPattern::trusted("*.host.bsky.network").unwrap();
        assert!(trusted.matches("morel.us-east.HOST.bsky.network"));
        for other in [
            "host.bsky.network",
            "evilhost.bsky.network",
            ".host.bsky.network",
            "host.bsky.network.evil.com",
        ] {
            assert!(!trusted.matches(other), "{other}");
        }
        let exact = DomainPattern::trusted("pds.example.com").unwrap();
        assert!(exact.matches("pds.example.com") && !exact.matches("a.pds.example.com"));
        let banned = DomainPattern::banned("example.com").unwrap();
        assert!(banned.matches("example.com") && banned.matches("a.b.example.com"));
        assert!(!banned.matches("notexample.com"));
        assert!(
            DomainPattern::trusted("*").is_err() && DomainPattern::banned("https://x.com").is_err()
        );
    }
}
