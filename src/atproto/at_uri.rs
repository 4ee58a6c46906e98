//! AT-URIs in the restricted form that lexicons use: `at://authority[/collection[/record-key]]`, without query or
//! fragment. Borrowed and checked, not resolved.

use std::fmt;

use super::did::Did;
use super::handle;
use super::nsid::{Nsid, NsidError};
use super::record_key::{RecordKey, RecordKeyError};

/// Longest AT-URI, in bytes (<https://atproto.com/specs/at-uri-scheme>: 8 kilobytes).
pub const MAX_AT_URI_BYTES: usize = 8 * 1024;

/// Why a text is not an AT-URI.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum AtUriError {
    #[error("an AT-URI has at most {MAX_AT_URI_BYTES} characters, this one has {length}")]
    TooLong { length: usize },
    #[error("an AT-URI starts with \"at://\"")]
    Scheme,
    #[error("the authority of an AT-URI is a DID or a handle")]
    Authority,
    #[error("the collection of an AT-URI: {0}")]
    Collection(#[from] NsidError),
    #[error("the record key of an AT-URI: {0}")]
    RecordKey(#[from] RecordKeyError),
}

/// A well-formed AT-URI, in its parts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct AtUri<'a> {
    /// A DID or a handle.
    pub authority: &'a str,
    pub collection: Option<Nsid<'a>>,
    /// Only with a collection.
    pub record_key: Option<RecordKey<'a>>,
}

impl<'a> AtUri<'a> {
    /// Reads an AT-URI as it is, without normalising it.
    ///
    /// # Errors
    /// Another scheme, a part that is not well formed, a trailing slash, a query or a fragment.
    pub fn parse(text: &'a str) -> Result<Self, AtUriError> {
        if text.len() > MAX_AT_URI_BYTES {
            return Err(AtUriError::TooLong { length: text.len() });
        }
        let rest = text.strip_prefix("at://").ok_or(AtUriError::Scheme)?;
        let mut parts = rest.splitn(3, '/');
        let authority = parts.next().unwrap_or_default();
        if Did::parse(authority).is_err() && handle::check(authority).is_err() {
            return Err(AtUriError::Authority);
        }
        Ok(Self {
            authority,
            collection: parts.next().map(Nsid::parse).transpose()?,
            record_key: parts.next().map(RecordKey::parse).transpose()?,
        })
    }
}

impl fmt::Display for AtUri<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "at://{}", self.authority)?;
        if let Some(collection) = self.collection {
            write!(f, "/{collection}")?;
        }
        if let Some(record_key) = self.record_key {
            write!(f, "/{record_key}")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_its_parts() {
        let text = "at://did:plc:asdf123/com.example.post/self";
        let uri = AtUri::parse(text).unwrap();
        assert_eq!(uri.authority, "did:plc:asdf123");
        assert_eq!(uri.collection.map(Nsid::as_str), Some("com.example.post"));
        assert_eq!(uri.record_key.map(RecordKey::as_str), Some("self"));
        for text in [text, "at://user.bsky.social", "at://did:abc:123/a.b.c"] {
            assert_eq!(AtUri::parse(text).unwrap().to_string(), text);
        }
    }

    #[test]
    fn refuses_with_the_reason() {
        for (text, error) in [
            ("AT://a.test", AtUriError::Scheme),
            ("at://", AtUriError::Authority),
            ("at://did:plc:", AtUriError::Authority),
            ("at://a.test#x", AtUriError::Authority),
            ("at://a.test/", NsidError::TooFewParts.into()),
            (
                "at://a.test/a.b.c/",
                RecordKeyError::Length { length: 0 }.into(),
            ),
            (
                "at://a.test/a.b.c/d/e",
                RecordKeyError::Character { at: 1 }.into(),
            ),
        ] {
            assert_eq!(AtUri::parse(text), Err(error), "{text}");
        }
    }
}
