//! Domains as an operator names them for trust and for bans: `example.com`, `*.host.bsky.network`.
//! Syntax only: nothing is looked up.

use std::fmt;

use super::host::is_dns_name;

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
