//! Close codes of RFC 6455 section 7.4.1, and of IANA's registry.

pub const NORMAL: u16 = 1000;
pub const PROTOCOL_ERROR: u16 = 1002;
/// A text message that is not UTF-8.
pub const INVALID_TEXT: u16 = 1007;
pub const POLICY: u16 = 1008;
pub const TOO_BIG: u16 = 1009;
pub const INTERNAL_ERROR: u16 = 1011;
/// "Service Restart": connect again. Some clients take 1001, "Going Away", for an end and do not reconnect.
pub const SERVICE_RESTART: u16 = 1012;
