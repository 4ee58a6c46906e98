//! The WebSocket handshake (RFC 6455 section 4.2), by hand, because raw frames follow it.
//! Promises an answer for every request: the key to accept with, or a refusal in XRPC's format. Knows no stream by name.

use axum::Json;
use axum::extract::Request;
use axum::response::{IntoResponse, Response};
use data_encoding::BASE64;
use http::header::{
    ALLOW, CONNECTION, HeaderMap, HeaderName, HeaderValue, RETRY_AFTER, SEC_WEBSOCKET_ACCEPT,
    SEC_WEBSOCKET_KEY, SEC_WEBSOCKET_VERSION, SERVER, UPGRADE,
};
use http::{Method, StatusCode};
use serde_json::json;
use tokio_tungstenite::tungstenite::handshake::derive_accept_key;

use crate::dial::PRODUCT;

/// The only version (RFC 6455 section 4.1).
const VERSION: &str = "13";
/// Bytes of a handshake's nonce.
const KEY_BYTES: usize = 16;
/// When a refused consumer may try again.
const RETRY_AFTER_SECONDS: &str = "30";

/// Why a request does not become a subscription.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(super) enum Refusal {
    #[error("{0} takes GET")]
    Method(&'static str),
    #[error("{0} is a WebSocket: connect with wss:// or ws://")]
    NoUpgrade(&'static str),
    #[error("Sec-WebSocket-Version must be 13")]
    Version,
    #[error("Sec-WebSocket-Key must be 16 bytes in base64")]
    Key,
    #[error("all places for consumers are taken, try again later")]
    Full,
    #[error("too many connections from your address, close one first")]
    TooManyFromAddress,
}

/// Checks a request for the stream `name`; returns the value of `Sec-WebSocket-Accept`.
pub(super) fn check(request: &Request, name: &'static str) -> Result<HeaderValue, Refusal> {
    let headers = request.headers();
    if request.method() != Method::GET {
        return Err(Refusal::Method(name));
    }
    if !has_token(headers, &CONNECTION, "upgrade") || !has_token(headers, &UPGRADE, "websocket") {
        return Err(Refusal::NoUpgrade(name));
    }
    if headers
        .get(SEC_WEBSOCKET_VERSION)
        .is_none_or(|version| version != VERSION)
    {
        return Err(Refusal::Version);
    }
    let key = headers.get(SEC_WEBSOCKET_KEY).ok_or(Refusal::Key)?;
    match BASE64.decode(key.as_bytes()) {
        Ok(nonce) if nonce.len() == KEY_BYTES => {}
        _ => return Err(Refusal::Key),
    }
    HeaderValue::try_from(derive_accept_key(key.as_bytes())).map_err(|_| Refusal::Key)
}

/// The answer that opens the WebSocket.
pub(super) fn accept(key: HeaderValue) -> Response {
    let headers = [
        (SERVER, HeaderValue::from_static(PRODUCT)),
        (CONNECTION, HeaderValue::from_static("Upgrade")),
        (UPGRADE, HeaderValue::from_static("websocket")),
        (SEC_WEBSOCKET_ACCEPT, key),
    ];
    (StatusCode::SWITCHING_PROTOCOLS, headers).into_response()
}

impl IntoResponse for Refusal {
    fn into_response(self) -> Response {
        let (status, error) = match self {
            Refusal::Method(_) => (StatusCode::METHOD_NOT_ALLOWED, "InvalidRequest"),
            Refusal::NoUpgrade(_) | Refusal::Version => {
                (StatusCode::UPGRADE_REQUIRED, "InvalidRequest")
            }
            Refusal::Key => (StatusCode::BAD_REQUEST, "InvalidRequest"),
            Refusal::Full => (StatusCode::SERVICE_UNAVAILABLE, "NotEnoughResources"),
            Refusal::TooManyFromAddress => (StatusCode::TOO_MANY_REQUESTS, "RateLimitExceeded"),
        };
        let body = Json(json!({ "error": error, "message": self.to_string() }));
        let mut response = (status, body).into_response();
        let headers = response.headers_mut();
        headers.insert(SERVER, HeaderValue::from_static(PRODUCT));
        let extra: &[(HeaderName, &'static str)] = match self {
            Refusal::Method(_) => &[(ALLOW, "GET")],
            Refusal::NoUpgrade(_) | Refusal::Version => &[
                (UPGRADE, "websocket"),
                (CONNECTION, "Upgrade"),
                (SEC_WEBSOCKET_VERSION, VERSION),
            ],
            Refusal::Key => &[],
            Refusal::Full | Refusal::TooManyFromAddress => &[(RETRY_AFTER, RETRY_AFTER_SECONDS)],
        };
        for (name, value) in extra {
            headers.insert(name, HeaderValue::from_static(value));
        }
        response
    }
}

/// True where a comma-separated header names the token.
fn has_token(headers: &HeaderMap, name: &HeaderName, token: &str) -> bool {
    let values = headers
        .get_all(name)
        .iter()
        .filter_map(|value| value.to_str().ok());
    values
        .flat_map(|value| value.split(','))
        .any(|part| part.trim().eq_ignore_ascii_case(token))
}

#[cfg(test)]
mod tests {
    use super::*;
    use axum::body::Body;

    /// The example of RFC 6455 section 1.3.
    const KEY: &str = "dGhlIHNhbXBsZSBub25jZQ==";

    const NAME: &str = "aStream";

    fn request(method: &str, headers: &[(&str, &str)]) -> Request {
        let mut request = Request::builder().method(method).uri("/");
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        request.body(Body::empty()).expect("a request")
    }

    #[test]
    fn requests() {
        let upgrade = ("upgrade", "WebSocket");
        let connection = ("connection", "keep-alive, Upgrade");
        let version = ("sec-websocket-version", "13");
        let key = ("sec-websocket-key", KEY);
        type Case<'a> = (&'a str, &'a [(&'a str, &'a str)], Result<&'a str, Refusal>);
        let cases: [Case; 9] = [
            (
                "GET",
                &[upgrade, connection, version, key],
                Ok("s3pPLMBiTxaQ9kYGzzhZRbK+xOo="),
            ),
            (
                "POST",
                &[upgrade, connection, version, key],
                Err(Refusal::Method(NAME)),
            ),
            ("HEAD", &[], Err(Refusal::Method(NAME))),
            ("GET", &[], Err(Refusal::NoUpgrade(NAME))),
            (
                "GET",
                &[("upgrade", "h2c"), connection, version, key],
                Err(Refusal::NoUpgrade(NAME)),
            ),
            (
                "GET",
                &[upgrade, ("connection", "close"), version, key],
                Err(Refusal::NoUpgrade(NAME)),
            ),
            (
                "GET",
                &[upgrade, connection, ("sec-websocket-version", "8"), key],
                Err(Refusal::Version),
            ),
            ("GET", &[upgrade, connection, version], Err(Refusal::Key)),
            (
                "GET",
                &[upgrade, connection, version, ("sec-websocket-key", "AAAA")],
                Err(Refusal::Key),
            ),
        ];
        for (method, headers, expected) in cases {
            let checked = check(&request(method, headers), NAME);
            let accepted = checked
                .as_ref()
                .map(|value| value.to_str().unwrap_or_default());
            assert_eq!(
                accepted.map_err(|refusal| *refusal),
                expected,
                "{method} {headers:?}"
            );
        }
    }

    #[test]
    fn refusals_name_the_stream() {
        assert_eq!(Refusal::Method(NAME).to_string(), "aStream takes GET");
    }
}
