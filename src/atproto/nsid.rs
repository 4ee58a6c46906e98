//! Namespaced identifiers, the names of collections and lexicons: a reversed domain name and a name. Borrowed,
//! because every op of every commit holds one.

use std::fmt;

use super::handle::is_label;

/// Longest NSID, in bytes: a domain name, a dot and a name (<https://atproto.com/specs/nsid>). Of the domain part only
/// this is asked, as by the reference implementations and their published cases, not the 253 bytes of DNS.
pub const MAX_NSID_BYTES: usize = 317;
/// Longest name after the last dot.
const MAX_NAME_BYTES: usize = 63;

/// Why a text is not an NSID.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum NsidError {
    #[error("an NSID has at most {MAX_NSID_BYTES} characters, this one has {length}")]
    TooLong { length: usize },
    #[error("an NSID has at least three parts, separated by dots")]
    TooFewParts,
    #[error("the domain part of an NSID is a reversed domain name that starts with a letter")]
    Authority,
    #[error("the last part of an NSID is a letter and up to 62 letters or digits")]
    Name,
}

/// A well-formed NSID.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Nsid<'a>(&'a str);

impl<'a> Nsid<'a> {
    /// Takes `text` as it is.
    ///
    /// # Errors
    /// Fewer than three parts, or a part that is not allowed in its place.
    pub fn parse(text: &'a str) -> Result<Self, NsidError> {
        if text.len() > MAX_NSID_BYTES {
            return Err(NsidError::TooLong { length: text.len() });
        }
        let (authority, name) = text.rsplit_once('.').ok_or(NsidError::TooFewParts)?;
        if !authority.contains('.') {
            return Err(NsidError::TooFewParts);
        }
        let starts_with_letter = |part: &str| part.starts_with(|c: char| c.is_ascii_alphabetic());
        if !starts_with_letter(authority) || !authority.split('.').all(is_label) {
            return Err(NsidError::Authority);
        }
        if name.len() > MAX_NAME_BYTES
            || !starts_with_letter(name)
            || !name.bytes().all(|byte| byte.is_ascii_alphanumeric())
        {
            return Err(NsidError::Name);
        }
        Ok(Self(text))
    }

    #[must_use]
    pub const fn as_str(self) -> &'a str {
        self.0
    }
}

impl fmt::Display for Nsid<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn accepts_reversed_domains_and_a_name() {
        for text in [
            "app.bsky.feed.post",
            "a.b.c",
            "one.2.three",
            "cn.8.lex.stuff",
            "a-0.b-1.c",
        ] {
            assert_eq!(Nsid::parse(text).map(Nsid::as_str), Ok(text));
        }
    }

    #[test]
    fn refuses_with_the_reason() {
        let label = format!("com.{}.name", "o".repeat(64));
        let name = format!("com.example.{}", "o".repeat(64));
        let long = "a.".repeat(160);
        for (text, error) in [
            ("", NsidError::TooFewParts),
            ("com.example", NsidError::TooFewParts),
            ("1.example.name", NsidError::Authority),
            ("com..name", NsidError::Authority),
            (".one.two", NsidError::Authority),
            ("com.example-.foo", NsidError::Authority),
            (&label, NsidError::Authority),
            ("com.example.", NsidError::Name),
            ("com.example.3", NsidError::Name),
            ("com.example.f-o", NsidError::Name),
            ("com.example.p@st", NsidError::Name),
            (&name, NsidError::Name),
            (&long, NsidError::TooLong { length: 320 }),
        ] {
            assert_eq!(Nsid::parse(text), Err(error), "{text}");
        }
    }
}
