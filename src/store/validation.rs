//! How strictly a host's commits are checked, and the words for it: in the configuration, in the database and in the
//! admin API.

/// A mode of validation.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Validation {
    /// Every rule, always.
    Strict,
    /// Missing `prevData` and `prev` pass until the host sends its first sync 1.1 commit; then strict.
    Ratchet,
    /// Missing `prevData` and `prev` pass; what is there is still checked.
    Lenient,
}

impl Validation {
    /// All of them, the strictest first.
    pub const ALL: [Validation; 3] = [Validation::Strict, Validation::Ratchet, Validation::Lenient];

    /// The word for it.
    pub fn as_str(self) -> &'static str {
        match self {
            Validation::Strict => "strict",
            Validation::Ratchet => "ratchet",
            Validation::Lenient => "lenient",
        }
    }

    /// The mode of a word.
    pub fn parse(word: &str) -> Option<Validation> {
        Validation::ALL
            .into_iter()
            .find(|mode| mode.as_str() == word)
    }
}
