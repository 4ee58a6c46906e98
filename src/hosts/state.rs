//! The states of a host's connection, as metrics and the admin API name them.

/// How a host's connection stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum HostState {
    /// No task runs for it.
    Stopped = 0,
    /// A connection is being made.
    Connecting = 1,
    /// Events may come.
    Connected = 2,
    /// Its events wait for its own limits.
    HeldBack = 3,
    /// The last attempt failed; the next one follows.
    Waiting = 4,
    /// So many attempts failed that they have become rare.
    Offline = 5,
    /// Refused by the operator.
    Banned = 6,
    /// Refused because it is a relay; it is looked at again after a day.
    Refused = 7,
}

impl HostState {
    /// Every state, for metrics.
    pub const ALL: [Self; 8] = [
        Self::Stopped,
        Self::Connecting,
        Self::Connected,
        Self::HeldBack,
        Self::Waiting,
        Self::Offline,
        Self::Banned,
        Self::Refused,
    ];

    /// The state's name in metrics and in the admin API.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Stopped => "stopped",
            Self::Connecting => "connecting",
            Self::Connected => "connected",
            Self::HeldBack => "held_back",
            Self::Waiting => "waiting",
            Self::Offline => "offline",
            Self::Banned => "banned",
            Self::Refused => "refused",
        }
    }
}
