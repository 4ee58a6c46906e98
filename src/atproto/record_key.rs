//! Record keys, and the paths that records have in a repository: `collection/record-key`. Borrowed, because every
//! op of every commit holds one.

use std::fmt;

use super::nsid::{Nsid, NsidError};

/// Longest record key, in bytes (<https://atproto.com/specs/record-key>).
pub const MAX_RECORD_KEY_BYTES: usize = 512;

/// Why a text is not a record key.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum RecordKeyError {
    #[error("a record key has 1 to {MAX_RECORD_KEY_BYTES} characters, this one has {length}")]
    Length { length: usize },
    #[error("the character at byte {at} is not allowed in a record key")]
    Character { at: usize },
    #[error("\".\" and \"..\" are no record keys")]
    Dots,
}

/// A well-formed record key.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct RecordKey<'a>(&'a str);

impl<'a> RecordKey<'a> {
    /// Takes `text` as it is; record keys are case-sensitive.
    ///
    /// # Errors
    /// Another length than 1 to [`MAX_RECORD_KEY_BYTES`], a character outside `A-Za-z0-9.-_:~`, or only dots.
    pub fn parse(text: &'a str) -> Result<Self, RecordKeyError> {
        if text.is_empty() || text.len() > MAX_RECORD_KEY_BYTES {
            return Err(RecordKeyError::Length { length: text.len() });
        }
        if text == "." || text == ".." {
            return Err(RecordKeyError::Dots);
        }
        let allowed = |byte: u8| {
            byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'-' | b'_' | b':' | b'~')
        };
        match text.bytes().position(|byte| !allowed(byte)) {
            Some(at) => Err(RecordKeyError::Character { at }),
            None => Ok(Self(text)),
        }
    }

    #[must_use]
    pub const fn as_str(self) -> &'a str {
        self.0
    }
}

impl fmt::Display for RecordKey<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.0)
    }
}

/// Why a text is not the path of a record.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum RecordPathError {
    #[error("the path of a record is a collection, a slash and a record key")]
    Slash,
    #[error("the collection of a record's path: {0}")]
    Collection(#[from] NsidError),
    #[error("the record key of a record's path: {0}")]
    RecordKey(#[from] RecordKeyError),
}

/// Where a record lies in its repository.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct RecordPath<'a> {
    pub collection: Nsid<'a>,
    pub record_key: RecordKey<'a>,
}

impl<'a> RecordPath<'a> {
    /// Reads `collection/record-key`.
    ///
    /// # Errors
    /// No slash, or a side of it that is not well formed.
    pub fn parse(text: &'a str) -> Result<Self, RecordPathError> {
        let (collection, record_key) = text.split_once('/').ok_or(RecordPathError::Slash)?;
        Ok(Self {
            collection: Nsid::parse(collection)?,
            record_key: RecordKey::parse(record_key)?,
        })
    }
}

impl fmt::Display for RecordPath<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.collection, self.record_key)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn accepts_the_whole_alphabet_up_to_512() {
        let longest = "o".repeat(MAX_RECORD_KEY_BYTES);
        for text in ["self", "~1.2-3_", "literal:self", "...", ":", &longest] {
            assert_eq!(RecordKey::parse(text).map(RecordKey::as_str), Ok(text));
        }
    }

    #[test]
    fn refuses_with_the_reason() {
        let long = "o".repeat(513);
        for (text, error) in [
            ("", RecordKeyError::Length { length: 0 }),
            (".", RecordKeyError::Dots),
            ("..", RecordKeyError::Dots),
            ("alpha/beta", RecordKeyError::Character { at: 5 }),
            ("a+b", RecordKeyError::Character { at: 1 }),
            ("é", RecordKeyError::Character { at: 0 }),
            (&long, RecordKeyError::Length { length: 513 }),
        ] {
            assert_eq!(RecordKey::parse(text), Err(error), "{text}");
        }
    }

    #[test]
    fn paths_are_a_collection_and_a_key() {
        let text = "app.bsky.feed.post/3jzfcijpj2z2a";
        let path = RecordPath::parse(text).unwrap();
        assert_eq!(path.collection.as_str(), "app.bsky.feed.post");
        assert_eq!(path.record_key.as_str(), "3jzfcijpj2z2a");
        assert_eq!(path.to_string(), text);
        for (text, error) in [
            ("app.bsky.feed.post", RecordPathError::Slash),
            ("/self", NsidError::TooFewParts.into()),
            ("a.b.c/", RecordKeyError::Length { length: 0 }.into()),
            ("a.b.c/x/y", RecordKeyError::Character { at: 1 }.into()),
        ] {
            assert_eq!(RecordPath::parse(text), Err(error), "{text}");
        }
    }
}
