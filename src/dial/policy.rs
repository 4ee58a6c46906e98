//! Whether private hosts can be dialled: the rule that host names and addresses are checked by.

/// The rules for dialling; `allow_private` lifts them for tests and networks of one's own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Guard {
    allow_private: bool,
}

impl Guard {
    /// The guard; with `allow_private` every address, name and port may be dialled.
    pub fn new(allow_private: bool) -> Self {
        Self { allow_private }
    }

    /// Whether private hosts, plain text and any port are allowed.
    pub fn allow_private(&self) -> bool {
        self.allow_private
    }
}
