//! Handles: domain names by the atproto syntax. Promises a well-formed name, not that it resolves or that its
//! top-level domain is one the network accepts.

use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

/// Longest handle, in bytes (<https://atproto.com/specs/handle>).
pub const MAX_HANDLE_BYTES: usize = 253;
/// Longest part between two dots.
const MAX_LABEL_BYTES: usize = 63;

/// Why a text is not a handle.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum HandleError {
    #[error("a handle has at most {MAX_HANDLE_BYTES} characters, this one has {length}")]
    TooLong { length: usize },
    #[error("a handle has at least two parts, separated by a dot")]
    Dotless,
    #[error("every part of a handle is 1 to 63 letters, digits or inner hyphens")]
    Label,
    #[error("the last part of a handle starts with a letter")]
    TopLevel,
}

/// A well-formed handle, in the case it was given.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Handle(Arc<str>);

impl Handle {
    /// Takes `text` as it is.
    ///
    /// # Errors
    /// Not a domain name of at least two labels whose last one starts with a letter.
    pub fn parse(text: &str) -> Result<Self, HandleError> {
        check(text)?;
        Ok(Self(Arc::from(text)))
    }

    /// Like [`Handle::parse`], in lower case: the form in which handles are compared.
    ///
    /// # Errors
    /// As [`Handle::parse`].
    pub fn normalized(text: &str) -> Result<Self, HandleError> {
        check(text)?;
        Ok(Self(Arc::from(text.to_ascii_lowercase())))
    }

    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

/// Checks the syntax of a handle without keeping it.
///
/// # Errors
/// As [`Handle::parse`].
pub fn check(text: &str) -> Result<(), HandleError> {
    if text.len() > MAX_HANDLE_BYTES {
        return Err(HandleError::TooLong { length: text.len() });
    }
    let (_, top_level) = text.rsplit_once('.').ok_or(HandleError::Dotless)?;
    if !text.split('.').all(is_label) {
        return Err(HandleError::Label);
    }
    if !top_level.starts_with(|first: char| first.is_ascii_alphabetic()) {
        return Err(HandleError::TopLevel);
    }
    Ok(())
}

/// Whether this may stand between two dots of a domain name.
pub(super) fn is_label(label: &str) -> bool {
    let bytes = label.as_bytes();
    bytes.len() <= MAX_LABEL_BYTES
        && bytes.first().is_some_and(u8::is_ascii_alphanumeric)
        && bytes.last().is_some_and(u8::is_ascii_alphanumeric)
        && bytes
            .iter()
            .all(|byte| byte.is_ascii_alphanumeric() || *byte == b'-')
}

impl fmt::Display for Handle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for Handle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Handle({})", self.0)
    }
}

impl FromStr for Handle {
    type Err = HandleError;

    fn from_str(text: &str) -> Result<Self, HandleError> {
        Self::parse(text)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn accepts_domain_names_and_lower_cases_on_request() {
        for text in [
            "jay.bsky.social",
            "8.cn",
            "john.t--t",
            "xn--ls8h.test",
            "A.ISI.EDU",
        ] {
            assert_eq!(Handle::parse(text).unwrap().as_str(), text);
        }
        assert_eq!(
            Handle::normalized("A.ISI.EDU").unwrap().as_str(),
            "a.isi.edu"
        );
    }

    #[test]
    fn refuses_with_the_reason() {
        let long = format!("{}test", "a.".repeat(125));
        let label = format!("{}.test", "a".repeat(64));
        for (text, error) in [
            ("", HandleError::Dotless),
            ("org", HandleError::Dotless),
            ("john.", HandleError::Label),
            (".test", HandleError::Label),
            ("john..test", HandleError::Label),
            ("-john.test", HandleError::Label),
            ("john-.test", HandleError::Label),
            ("jo_hn.test", HandleError::Label),
            ("bücher.test", HandleError::Label),
            (&label, HandleError::Label),
            ("127.0.0.1", HandleError::TopLevel),
            (&long, HandleError::TooLong { length: 254 }),
        ] {
            assert_eq!(Handle::parse(text), Err(error), "{text}");
        }
    }
}
