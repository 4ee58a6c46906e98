//! Why a connection to a host ended, as one line for the log.

use std::time::Duration;

use tokio_tungstenite::tungstenite::Error as WsError;

use super::socket::ReadError;
use crate::atproto::frame::{FrameError, MAX_FRAME_BYTES};
use crate::dial::DialError;

/// Events in a row below the connection's last seq after which it is closed: the host numbers its events anew, and a new
/// connection settles from where.
pub(super) const MAX_OLD_IN_A_ROW: u32 = 1_000;

/// Why a connection ended.
#[derive(Debug, thiserror::Error)]
pub(super) enum End {
    #[error("the relay is closing it")]
    Cancelled,
    #[error("the host closed it")]
    Closed,
    #[error("{0}")]
    Dial(#[from] DialError),
    /// What a host says is shown in quotes, here and below: it must not look like a line of ours.
    #[error("the handshake failed: {0:?}")]
    Handshake(String),
    #[error("{0}")]
    Read(ReadError),
    #[error("no answer within {} s", .0.as_secs())]
    HandshakeTimeout(Duration),
    #[error("nothing heard for {} s", .0.as_secs())]
    Silent(Duration),
    #[error("it is a relay: its Server header is {0:?}")]
    IsRelay(String),
    #[error("a message is longer than {MAX_FRAME_BYTES} bytes")]
    TooLarge,
    #[error("a frame is malformed: {0}")]
    Malformed(FrameError),
    #[error("the host has not come as far as our cursor: {0:?}")]
    FutureCursor(String),
    #[error("the host sent the error {error:?}: {message:?}")]
    ErrorFrame { error: String, message: String },
    #[error("{MAX_OLD_IN_A_ROW} events in a row had old sequence numbers")]
    OldSeqs,
    #[error("it numbers its events anew, and those before are not settled within {} s", .0.as_secs_f32())]
    Unsettled(Duration),
}

impl From<WsError> for End {
    fn from(error: WsError) -> Self {
        match error {
            WsError::Http(response) => {
                Self::Handshake(format!("the answer is {}", response.status()))
            }
            other => Self::Handshake(other.to_string()),
        }
    }
}

impl From<ReadError> for End {
    fn from(error: ReadError) -> Self {
        match error {
            ReadError::TooLarge => Self::TooLarge,
            other => Self::Read(other),
        }
    }
}
