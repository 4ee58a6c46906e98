//! Decentralised identifiers, by the atproto syntax: any method, at most 2048 characters.
//! Promises that a [`Did`] is well formed; says nothing about whether it resolves.

use std::borrow::{Borrow, Cow};
use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

use sha2::{Digest, Sha256};

/// Longest DID atproto accepts, in bytes (<https://atproto.com/specs/did>).
pub const MAX_DID_BYTES: usize = 2048;

/// Methods whose identifiers are case-insensitive in practice, so [`Did::normalized`] lower-cases them.
const CASELESS_METHODS: [&str; 2] = ["plc", "web"];

/// Why a text is not a DID.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum DidError {
    #[error("a DID has at most {MAX_DID_BYTES} characters, this one has {length}")]
    TooLong { length: usize },
    #[error("a DID starts with \"did:\"")]
    Prefix,
    #[error("the method of a DID is one or more lower-case letters followed by a colon")]
    Method,
    #[error("the identifier of a DID must not be empty")]
    Empty,
    #[error("the character at byte {at} is not allowed in a DID")]
    Character { at: usize },
    #[error("a DID must not end in \":\" or \"%\"")]
    Ending,
    #[error("a DID of this method has one spelling, in lower case, and this is another")]
    Spelling,
}

/// A well-formed DID. Cloning is a reference count; equality and order are those of the text.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Did(Arc<str>);

impl Did {
    /// Takes `text` as it is, without changing case.
    ///
    /// # Errors
    /// Any departure from `did:[a-z]+:[a-zA-Z0-9._:%-]*[a-zA-Z0-9._-]`, or more than [`MAX_DID_BYTES`].
    pub fn parse(text: &str) -> Result<Self, DidError> {
        check(text)?;
        Ok(Self(Arc::from(text)))
    }

    /// Like [`Did::parse`], and lower-cases did:plc and did:web, all but the digits of percent-encoded bytes, which
    /// did:web has in upper case. Other methods keep their case.
    ///
    /// # Errors
    /// As [`Did::parse`].
    pub fn normalized(text: &str) -> Result<Self, DidError> {
        let method = check(text)?;
        if CASELESS_METHODS.contains(&method) {
            return Ok(Self(Arc::from(lower_case(text))));
        }
        Ok(Self(Arc::from(text)))
    }

    /// Like [`Did::parse`], and takes no spelling but that of [`Did::normalized`]: whoever compares DIDs as texts must
    /// not take one account for several.
    ///
    /// # Errors
    /// As [`Did::parse`], and [`DidError::Spelling`].
    pub fn canonical(text: &str) -> Result<Self, DidError> {
        let method = check(text)?;
        if CASELESS_METHODS.contains(&method) && lower_case(text) != text {
            return Err(DidError::Spelling);
        }
        Ok(Self(Arc::from(text)))
    }

    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The method: `plc` of `did:plc:…`.
    #[must_use]
    pub fn method(&self) -> &str {
        self.split().0
    }

    /// What follows the method: the 24 characters of a did:plc, the host of a did:web.
    #[must_use]
    pub fn identifier(&self) -> &str {
        self.split().1
    }

    /// The first eight bytes of the SHA-256 of the text, big-endian. The same in every build and on every
    /// machine, so it may be stored; an attacker cannot aim it at another account's value.
    #[must_use]
    pub fn hash64(&self) -> u64 {
        let digest = Sha256::digest(self.0.as_bytes());
        let mut first = [0; 8];
        first.copy_from_slice(&digest[..8]);
        u64::from_be_bytes(first)
    }

    fn split(&self) -> (&str, &str) {
        self.0["did:".len()..]
            .split_once(':')
            .unwrap_or((&self.0, ""))
    }
}

/// The text in lower case, and the two digits of each percent-encoded byte in upper case.
fn lower_case(text: &str) -> Cow<'_, str> {
    let plain = |byte: u8| !byte.is_ascii_uppercase() && byte != b'%';
    if text.bytes().all(plain) {
        return Cow::Borrowed(text);
    }
    let mut digits = 0;
    let spelt = text.chars().map(|character| {
        if character == '%' {
            digits = 2;
            return character;
        }
        if digits > 0 {
            digits -= 1;
            return character.to_ascii_uppercase();
        }
        character.to_ascii_lowercase()
    });
    Cow::Owned(spelt.collect())
}

/// Checks the syntax and gives the method.
fn check(text: &str) -> Result<&str, DidError> {
    if text.len() > MAX_DID_BYTES {
        return Err(DidError::TooLong { length: text.len() });
    }
    let rest = text.strip_prefix("did:").ok_or(DidError::Prefix)?;
    let (method, identifier) = rest.split_once(':').ok_or(DidError::Method)?;
    if method.is_empty() || !method.bytes().all(|byte| byte.is_ascii_lowercase()) {
        return Err(DidError::Method);
    }
    let allowed =
        |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'_' | b':' | b'%' | b'-');
    if let Some(at) = identifier.bytes().position(|byte| !allowed(byte)) {
        let at = text.len() - identifier.len() + at;
        return Err(DidError::Character { at });
    }
    match identifier.as_bytes().last() {
        None => Err(DidError::Empty),
        Some(b':' | b'%') => Err(DidError::Ending),
        Some(_) => Ok(method),
    }
}

impl fmt::Display for Did {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for Did {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Did({})", self.0)
    }
}

impl FromStr for Did {
    type Err = DidError;

    fn from_str(text: &str) -> Result<Self, DidError> {
        Self::parse(text)
    }
}

impl AsRef<str> for Did {
    fn as_ref(&self) -> &str {
        &self.0
    }
}

/// Lets a map keyed by DIDs be asked with a `&str`.
impl Borrow<str> for Did {
    fn borrow(&self) -> &str {
        &self.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn accepts_any_method_and_keeps_its_text() {
        for text in [
            "did:plc:asdf123",
            "did:web:example.com%3A3000",
            "did:onion:2gzyxa5ihm7nsggfxnu52rck2vv4rvmdlkiu3zzui5du4xyclen53wid",
            "did:method:a:b:c",
            "did:m:%BB",
        ] {
            assert_eq!(Did::parse(text).unwrap().as_str(), text);
        }
    }

    #[test]
    fn refuses_with_the_reason() {
        let long = format!("did:plc:{}", "a".repeat(MAX_DID_BYTES));
        for (text, error) in [
            ("", DidError::Prefix),
            ("DID:plc:abc", DidError::Prefix),
            ("did:plc", DidError::Method),
            ("did::abc", DidError::Method),
            ("did:PLC:abc", DidError::Method),
            ("did:p1c:abc", DidError::Method),
            ("did:plc:", DidError::Empty),
            ("did:plc:a b", DidError::Character { at: 9 }),
            ("did:plc:é", DidError::Character { at: 8 }),
            ("did:web:a#b", DidError::Character { at: 9 }),
            ("did:plc:abc:", DidError::Ending),
            ("did:plc:abc%", DidError::Ending),
            (&long, DidError::TooLong { length: 2056 }),
        ] {
            assert_eq!(Did::parse(text), Err(error), "{text}");
        }
    }

    #[test]
    fn lower_cases_plc_and_web_only() {
        for (text, normal) in [
            ("did:plc:ABC", "did:plc:abc"),
            ("did:web:Example.COM", "did:web:example.com"),
            ("did:web:LOCALHOST%3a80", "did:web:localhost%3A80"),
            ("did:key:zQ3SH", "did:key:zQ3SH"),
        ] {
            assert_eq!(Did::normalized(text).unwrap().as_str(), normal);
            assert_eq!(Did::canonical(normal).unwrap().as_str(), normal);
            let other = (text != normal).then_some(DidError::Spelling);
            assert_eq!(Did::canonical(text).err(), other, "{text}");
        }
    }

    #[test]
    fn tells_method_and_identifier() {
        let did = Did::parse("did:web:localhost%3A80:x").unwrap();
        assert_eq!(did.method(), "web");
        assert_eq!(did.identifier(), "localhost%3A80:x");
    }

    #[test]
    fn hash_is_fixed_because_it_is_stored() {
        let did = Did::parse("did:plc:asdf123").unwrap();
        assert_eq!(did.hash64(), 0xe8c4_72a6_413d_ed40);
    }
}
