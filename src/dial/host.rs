//! Names of hosts as accounts, operators and strangers write them, brought to one form.
//! Syntax only: whether a name leads to a public address is known after DNS, in [`super::Guard`].

use std::fmt;
use std::net::IpAddr;
use std::sync::Arc;

use url::{Host, Url};

use super::policy::Guard;

/// Longest DNS name in its text form (RFC 1035, 2.3.4, without the trailing dot).
const MAX_NAME: usize = 253;

/// Top-level names that never lead to a public host (RFC 6761, RFC 6762, RFC 7686, RFC 8375, RFC 9476, ICANN on
/// `.internal`).
const RESERVED_TOP_LEVEL: [&str; 9] = [
    "localhost",
    "local",
    "internal",
    "test",
    "invalid",
    "example",
    "onion",
    "alt",
    "arpa",
];

/// A host that serves repositories: lower-case name without a trailing dot, a port only where it is not the scheme's
/// own, and whether it speaks TLS. Two spellings of one host are equal.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct HostName {
    name: Arc<str>,
    tls: bool,
}

/// Why a text is not the name of a host that may be dialled.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum HostNameError {
    /// Not a URL and not a name.
    #[error("{0:?} is not a host name or URL")]
    Syntax(String),
    /// Something beside scheme, name and port.
    #[error(
        "{0:?} has more than a scheme, a host and a port: leave out user, path, query and fragment"
    )]
    Extra(String),
    /// A scheme other than https, wss, and http, ws where private hosts are allowed.
    #[error("scheme {0:?} is not allowed: use https")]
    Scheme(String),
    /// An address where a name is needed.
    #[error("{0} is an IP address: a host must have a DNS name")]
    IpAddress(String),
    /// A single label, or a name under a top-level domain that is not public.
    #[error("{0:?} is not a public DNS name")]
    NotPublic(String),
    /// A port other than 443.
    #[error("port {0} is not allowed: hosts are reached on port 443")]
    Port(u16),
}

impl HostName {
    /// Reads a bare name (`pds.example.com`, `host:port`) or a URL, under the rules of `guard`.
    /// A bare name means TLS, except that this machine (`localhost`, a loopback address), where it is allowed, means
    /// plain text.
    ///
    /// # Errors
    /// See [`HostNameError`]; each names the part that is at fault.
    pub fn parse(text: &str, guard: &Guard) -> Result<Self, HostNameError> {
        let syntax = || HostNameError::Syntax(text.to_owned());
        if text.is_empty()
            || text.len() > MAX_NAME + "https://".len() + ":65535/.".len()
            || !text.is_ascii()
        {
            return Err(syntax());
        }
        if text
            .bytes()
            .any(|byte| byte.is_ascii_whitespace() || byte.is_ascii_control() || byte == b'\\')
        {
            return Err(syntax());
        }
        let url = if text.contains("://") {
            Url::parse(text)
        } else if is_local(text) {
            Url::parse(&format!("http://{text}"))
        } else {
            Url::parse(&format!("https://{text}"))
        };
        Self::from_url(&url.map_err(|_| syntax())?, guard)
    }

    /// The host of a URL that has nothing beside scheme, host and port (a lone `/` is nothing).
    ///
    /// # Errors
    /// As [`HostName::parse`].
    pub fn from_url(url: &Url, guard: &Guard) -> Result<Self, HostNameError> {
        let tls = match url.scheme() {
            "https" | "wss" => true,
            "http" | "ws" if guard.allow_private() => false,
            scheme => return Err(HostNameError::Scheme(scheme.to_owned())),
        };
        let extra = !matches!(url.path(), "" | "/")
            || url.query().is_some()
            || url.fragment().is_some()
            || !url.username().is_empty()
            || url.password().is_some();
        if extra {
            return Err(HostNameError::Extra(url.to_string()));
        }
        let host = check_host(url, guard)?;
        let name = match url.port() {
            None => host,
            Some(port) if guard.allow_private() => format!("{host}:{port}"),
            Some(port) => return Err(HostNameError::Port(port)),
        };
        Ok(Self {
            name: name.into(),
            tls,
        })
    }

    /// A host as the store holds it: name and TLS flag, checked again.
    ///
    /// # Errors
    /// As [`HostName::parse`]: rules may have become stricter since the row was written.
    pub fn from_parts(name: &str, tls: bool, guard: &Guard) -> Result<Self, HostNameError> {
        let scheme = if tls { "https" } else { "http" };
        Self::parse(&format!("{scheme}://{name}"), guard)
    }

    /// Whether the host may be dialled under the rules of `guard`.
    ///
    /// # Errors
    /// As [`HostName::parse`].
    pub fn check(&self, guard: &Guard) -> Result<(), HostNameError> {
        Self::from_parts(&self.name, self.tls, guard).map(drop)
    }

    /// The normalised name: `host`, or `host:port` where the port is not the scheme's own.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The name as a shared text, for keys of maps.
    pub fn shared_name(&self) -> Arc<str> {
        self.name.clone()
    }

    /// Whether the host is reached over TLS.
    pub fn tls(&self) -> bool {
        self.tls
    }

    /// The name without a port.
    pub fn domain(&self) -> &str {
        split_port(&self.name).0
    }

    /// The port to connect to.
    pub fn port(&self) -> u16 {
        let default = if self.tls { 443 } else { 80 };
        split_port(&self.name).1.unwrap_or(default)
    }

    /// `https://name` or `http://name`.
    pub fn http_url(&self) -> String {
        format!(
            "{}://{}",
            if self.tls { "https" } else { "http" },
            self.name
        )
    }

    /// `wss://name` or `ws://name`.
    pub fn ws_url(&self) -> String {
        format!("{}://{}", if self.tls { "wss" } else { "ws" }, self.name)
    }
}

impl fmt::Display for HostName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.name)
    }
}

/// The normalised host part of a URL, checked by the rules for names.
pub(super) fn check_host(url: &Url, guard: &Guard) -> Result<String, HostNameError> {
    match url.host() {
        Some(Host::Domain(name)) => {
            let name = name.strip_suffix('.').unwrap_or(name).to_ascii_lowercase();
            check_name(&name, guard)?;
            Ok(name)
        }
        Some(Host::Ipv4(ip)) if guard.allow_private() => Ok(ip.to_string()),
        Some(Host::Ipv6(ip)) if guard.allow_private() => Ok(format!("[{ip}]")),
        Some(ip) => Err(HostNameError::IpAddress(ip.to_string())),
        None => Err(HostNameError::Syntax(url.to_string())),
    }
}

fn check_name(name: &str, guard: &Guard) -> Result<(), HostNameError> {
    if !is_dns_name(name) {
        return Err(HostNameError::Syntax(name.to_owned()));
    }
    let top_level = name.rsplit('.').next().unwrap_or_default();
    let public = name.contains('.')
        && top_level.starts_with(|first: char| first.is_ascii_alphabetic())
        && !RESERVED_TOP_LEVEL.contains(&top_level);
    if public || guard.allow_private() {
        Ok(())
    } else {
        Err(HostNameError::NotPublic(name.to_owned()))
    }
}

/// A DNS name: at most 253 bytes of labels.
pub fn is_dns_name(name: &str) -> bool {
    name.len() <= MAX_NAME && name.split('.').all(is_label)
}

/// A DNS label of letters, digits and inner hyphens (RFC 1123, 2.1).
fn is_label(label: &str) -> bool {
    (1..=63).contains(&label.len())
        && !label.starts_with('-')
        && !label.ends_with('-')
        && label
            .bytes()
            .all(|byte| byte.is_ascii_alphanumeric() || byte == b'-')
}

/// Whether a bare name is this machine's own.
fn is_local(text: &str) -> bool {
    let host = split_port(text).0.to_ascii_lowercase();
    let address = host
        .trim_start_matches('[')
        .trim_end_matches(']')
        .parse::<IpAddr>();
    host == "localhost"
        || host.ends_with(".localhost")
        || address.is_ok_and(|address| address.is_loopback())
}

fn split_port(name: &str) -> (&str, Option<u16>) {
    match name.rsplit_once(':') {
        Some((host, port)) if !host.contains(':') || host.ends_with(']') => match port.parse() {
            Ok(port) => (host, Some(port)),
            Err(_) => (name, None),
        },
        _ => (name, None),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spellings_of_one_host_are_one_name() {
        let guard = Guard::new(false);
        for text in [
            "pds.example.com",
            "PDS.Example.COM",
            "pds.example.com.",
            "pds.example.com:443",
            "https://pds.example.com",
            "https://pds.example.com/",
            "https://pds.example.com:443",
            "wss://PDS.example.com.",
        ] {
            let host =
                HostName::parse(text, &guard).unwrap_or_else(|error| panic!("{text}: {error}"));
            assert_eq!(
                (host.name(), host.tls(), host.port()),
                ("pds.example.com", true, 443),
                "{text}"
            );
        }
    }

    #[test]
    fn this_machine_is_spoken_to_in_plain_text_where_it_is_allowed() {
        let guard = Guard::new(true);
        for (text, tls) in [
            ("localhost:2583", false),
            ("127.0.0.1:2583", false),
            ("[::1]:2583", false),
            ("https://localhost:2583", true),
            ("10.0.0.1:2583", true),
        ] {
            let host = HostName::parse(text, &guard).unwrap();
            assert_eq!(host.tls(), tls, "{text}");
        }
    }

    #[test]
    fn names_that_are_not_public_hosts_are_refused() {
        use HostNameError as E;
        let guard = Guard::new(false);
        type Expected = fn(&E) -> bool;
        let cases: &[(&str, Expected)] = &[
            ("", |e| matches!(e, E::Syntax(_))),
            ("exa mple.com", |e| matches!(e, E::Syntax(_))),
            ("a..example.com", |e| matches!(e, E::Syntax(_))),
            ("-a.example.com", |e| matches!(e, E::Syntax(_))),
            ("under_score.example.com", |e| matches!(e, E::Syntax(_))),
            ("bücher.example.com", |e| matches!(e, E::Syntax(_))),
            ("evil.com\\@good.com", |e| matches!(e, E::Syntax(_))),
            ("user@pds.example.com", |e| matches!(e, E::Extra(_))),
            ("https://u:p@pds.example.com", |e| matches!(e, E::Extra(_))),
            ("pds.example.com/path", |e| matches!(e, E::Extra(_))),
            ("https://pds.example.com/?q", |e| matches!(e, E::Extra(_))),
            ("pds.example.com#x", |e| matches!(e, E::Extra(_))),
            ("http://pds.example.com", |e| matches!(e, E::Scheme(_))),
            ("ws://pds.example.com", |e| matches!(e, E::Scheme(_))),
            ("ftp://pds.example.com", |e| matches!(e, E::Scheme(_))),
            ("https://127.0.0.1", |e| matches!(e, E::IpAddress(_))),
            ("https://2130706433", |e| matches!(e, E::IpAddress(_))),
            ("https://0x7f.1", |e| matches!(e, E::IpAddress(_))),
            ("https://[::1]", |e| matches!(e, E::IpAddress(_))),
            ("8.8.8.8", |e| matches!(e, E::IpAddress(_))),
            ("localhost:2583", |e| matches!(e, E::Scheme(_))),
            ("https://localhost", |e| matches!(e, E::NotPublic(_))),
            ("pds", |e| matches!(e, E::NotPublic(_))),
            ("printer.local", |e| matches!(e, E::NotPublic(_))),
            ("metadata.google.internal", |e| matches!(e, E::NotPublic(_))),
            ("pds.example.com:8443", |e| matches!(e, E::Port(8443))),
            ("pds.example.com:80", |e| matches!(e, E::Port(80))),
        ];
        for (text, expected) in cases {
            let error = HostName::parse(text, &guard).expect_err(text);
            assert!(expected(&error), "{text}: {error:?}");
        }
    }

    #[test]
    fn private_hosts_are_named_with_their_port_when_allowed() {
        let guard = Guard::new(true);
        let parse = |text: &str| {
            HostName::parse(text, &guard).unwrap_or_else(|error| panic!("{text}: {error}"))
        };
        for (text, name, tls, domain, port) in [
            ("localhost:2583", "localhost:2583", false, "localhost", 2583),
            (
                "http://localhost:2583/",
                "localhost:2583",
                false,
                "localhost",
                2583,
            ),
            ("http://127.0.0.1:9", "127.0.0.1:9", false, "127.0.0.1", 9),
            ("127.0.0.1", "127.0.0.1", false, "127.0.0.1", 80),
            ("ws://[::1]:9", "[::1]:9", false, "[::1]", 9),
            ("http://127.0.0.1:80", "127.0.0.1", false, "127.0.0.1", 80),
            ("pds1:2583", "pds1:2583", true, "pds1", 2583),
            ("http://pds1.lan", "pds1.lan", false, "pds1.lan", 80),
            (
                "https://pds.example.com",
                "pds.example.com",
                true,
                "pds.example.com",
                443,
            ),
        ] {
            let host = parse(text);
            assert_eq!(
                (host.name(), host.tls(), host.domain(), host.port()),
                (name, tls, domain, port),
                "{text}"
            );
            assert_eq!(
                HostName::from_parts(host.name(), host.tls(), &guard).unwrap(),
                host
            );
        }
    }
}
