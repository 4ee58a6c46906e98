//! The states of hosts and accounts, and what the public sees of them.
//! Every state has one stored form that never changes its meaning; new ones are added at the end.

use std::fmt;
use std::sync::Arc;

/// Longest status text from an upstream that is kept. The lexicon's own are 15 bytes at most.
pub const MAX_STATUS_BYTES: usize = 64;

/// How the relay stands to a host: `com.atproto.sync.defs#hostStatus`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum HostStatus {
    /// Connected, or to be connected.
    Active,
    /// Reachable, but without news for long.
    Idle,
    /// Not reachable for long; still tried now and then.
    Offline,
    /// Over its limits.
    Throttled,
    /// Refused by the operator: never dialled.
    Banned,
}

impl HostStatus {
    /// The lexicon's value, which is also the stored form.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Active => "active",
            Self::Idle => "idle",
            Self::Offline => "offline",
            Self::Throttled => "throttled",
            Self::Banned => "banned",
        }
    }

    pub(super) fn from_stored(text: &str) -> Option<Self> {
        Some(match text {
            "active" => Self::Active,
            "idle" => Self::Idle,
            "offline" => Self::Offline,
            "throttled" => Self::Throttled,
            "banned" => Self::Banned,
            _ => return None,
        })
    }
}

impl fmt::Display for HostStatus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// This relay's own decision on an account, independent of its PDS.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
#[repr(u8)]
pub enum LocalStatus {
    /// Nothing stands against it.
    #[default]
    Active = 0,
    /// Taken down by the operator.
    TakenDown = 1,
    /// Over the account quota of its host; released oldest first when the quota is raised.
    Throttled = 2,
    /// Suspended by the operator: as taken down, for a while.
    Suspended = 3,
    /// Broke the chain of its commits too often; its events are refused until a `#sync` repairs it.
    Desynchronized = 4,
}

impl LocalStatus {
    /// The status value of the lexicons.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Active => "active",
            Self::TakenDown => "takendown",
            Self::Throttled => "throttled",
            Self::Suspended => "suspended",
            Self::Desynchronized => "desynchronized",
        }
    }

    /// The stored form.
    pub fn code(self) -> u8 {
        self as u8
    }

    /// Reads the stored form.
    pub fn from_code(code: u8) -> Option<Self> {
        Some(match code {
            0 => Self::Active,
            1 => Self::TakenDown,
            2 => Self::Throttled,
            3 => Self::Suspended,
            4 => Self::Desynchronized,
            _ => return None,
        })
    }

    /// Whether nothing stands against the account here.
    pub fn is_active(self) -> bool {
        self == Self::Active
    }
}

impl fmt::Display for LocalStatus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// The status that an account's PDS last reported.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Default)]
pub enum UpstreamStatus {
    /// `active: true`.
    #[default]
    Active,
    /// Switched off by its owner.
    Deactivated,
    /// Gone for good.
    Deleted,
    /// The PDS itself lost track of it.
    Desynchronized,
    /// Suspended by the PDS.
    Suspended,
    /// Taken down by the PDS.
    Takendown,
    /// Held back by the PDS.
    Throttled,
    /// `active: false` without a reason, or with one that is not fit to be kept.
    Inactive,
    /// `active: false` with a reason the lexicon does not name.
    Other(Arc<str>),
}

/// The stored value for an account that is not active and gives no reason. Stored, never shown.
const INACTIVE: &str = "inactive";

impl UpstreamStatus {
    /// Reads the two fields of an `#account` event or of `getRepoStatus`.
    ///
    /// `status` counts only with `active: false`, as the lexicon says. A text of more than
    /// [`MAX_STATUS_BYTES`] or with anything but visible ASCII is no reason, only [`Self::Inactive`].
    pub fn from_event(active: bool, status: Option<&str>) -> Self {
        match (active, status) {
            (true, _) => Self::Active,
            (false, Some(text)) if text != "active" => Self::from_word(text),
            (false, _) => Self::Inactive,
        }
    }

    /// Whether the PDS serves the account.
    pub fn is_active(&self) -> bool {
        *self == Self::Active
    }

    /// The `status` field of the lexicons: none for an active account, and for one without a reason.
    pub fn reason(&self) -> Option<&str> {
        match self {
            Self::Active | Self::Inactive => None,
            other => Some(other.stored()),
        }
    }

    pub(super) fn stored(&self) -> &str {
        match self {
            Self::Active => "active",
            Self::Deactivated => "deactivated",
            Self::Deleted => "deleted",
            Self::Desynchronized => "desynchronized",
            Self::Suspended => "suspended",
            Self::Takendown => "takendown",
            Self::Throttled => "throttled",
            Self::Inactive => INACTIVE,
            Self::Other(text) => text,
        }
    }

    pub(super) fn from_stored(text: Option<&str>) -> Self {
        match text {
            None | Some("active") => Self::Active,
            Some(text) => Self::from_word(text),
        }
    }

    fn from_word(text: &str) -> Self {
        match text {
            "deactivated" => Self::Deactivated,
            "deleted" => Self::Deleted,
            "desynchronized" => Self::Desynchronized,
            "suspended" => Self::Suspended,
            "takendown" => Self::Takendown,
            "throttled" => Self::Throttled,
            INACTIVE => Self::Inactive,
            text if fit_to_keep(text) => Self::Other(text.into()),
            _ => Self::Inactive,
        }
    }
}

fn fit_to_keep(text: &str) -> bool {
    !text.is_empty() && text.len() <= MAX_STATUS_BYTES && text.bytes().all(|b| b.is_ascii_graphic())
}

/// The status for consumers: the local decision first, else the upstream status.
/// Returns `active` and the `status` field of the lexicons.
pub fn combined_status(local: LocalStatus, upstream: &UpstreamStatus) -> (bool, Option<&str>) {
    match local {
        LocalStatus::Active => (upstream.is_active(), upstream.reason()),
        other => (false, Some(other.as_str())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn upstream_words() {
        let long = "x".repeat(MAX_STATUS_BYTES + 1);
        let cases = [
            (true, None, UpstreamStatus::Active, None),
            (true, Some("deleted"), UpstreamStatus::Active, None),
            (false, None, UpstreamStatus::Inactive, None),
            (false, Some("active"), UpstreamStatus::Inactive, None),
            (false, Some("inactive"), UpstreamStatus::Inactive, None),
            (
                false,
                Some("deleted"),
                UpstreamStatus::Deleted,
                Some("deleted"),
            ),
            (
                false,
                Some("on-holiday"),
                UpstreamStatus::Other("on-holiday".into()),
                Some("on-holiday"),
            ),
            (false, Some(""), UpstreamStatus::Inactive, None),
            (false, Some("nul\0"), UpstreamStatus::Inactive, None),
            (false, Some(&long), UpstreamStatus::Inactive, None),
        ];
        for (active, word, expected, reason) in cases {
            let status = UpstreamStatus::from_event(active, word);
            assert_eq!(status, expected, "{active} {word:?}");
            assert_eq!(status.reason(), reason, "{active} {word:?}");
            assert_eq!(UpstreamStatus::from_stored(Some(status.stored())), status);
        }
    }

    #[test]
    fn the_local_decision_comes_first() {
        let cases = [
            (LocalStatus::Active, UpstreamStatus::Active, (true, None)),
            (LocalStatus::Active, UpstreamStatus::Inactive, (false, None)),
            (
                LocalStatus::Active,
                UpstreamStatus::Deleted,
                (false, Some("deleted")),
            ),
            (
                LocalStatus::TakenDown,
                UpstreamStatus::Active,
                (false, Some("takendown")),
            ),
            (
                LocalStatus::Throttled,
                UpstreamStatus::Deleted,
                (false, Some("throttled")),
            ),
        ];
        for (local, upstream, expected) in cases {
            assert_eq!(combined_status(local, &upstream), expected);
        }
    }

    #[test]
    fn codes_stay() {
        for code in 0..=u8::MAX {
            if let Some(status) = LocalStatus::from_code(code) {
                assert_eq!(status.code(), code);
            }
        }
        assert_eq!(LocalStatus::from_code(1), Some(LocalStatus::TakenDown));
        assert_eq!(LocalStatus::from_code(2), Some(LocalStatus::Throttled));
    }
}
