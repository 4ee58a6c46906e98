//! The door of the admin API: HTTP Basic with the user `admin`, compared in constant time, or a Unix socket whose mode lets
//! nobody else in. Without a configured password there is no admin API on an address at all.
//! Promises that no page of another origin acts in the operator's name, and that every request has an actor for the log.

use super::error::ApiError;
use super::secret::Secret;
use crate::client::{Client, Peer};
use axum::extract::{Request, State};
use axum::middleware::Next;
use axum::response::Response;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use http::{HeaderMap, StatusCode, header};
use sha2::{Digest as _, Sha256};
use std::fmt;
use std::sync::{Arc, PoisonError, RwLock};
use subtle::ConstantTimeEq as _;

/// What browsers say of a request's origin (Fetch Metadata, W3C).
const SEC_FETCH_SITE: &str = "sec-fetch-site";

/// The password of the admin API, which may change while the API is served; without one it is off. Clones share it.
#[derive(Clone, Default)]
pub struct AdminPassword(Arc<RwLock<Option<Secret>>>);

impl AdminPassword {
    /// The password so far.
    pub fn new(password: Option<Secret>) -> AdminPassword {
        AdminPassword(Arc::new(RwLock::new(password)))
    }

    /// Applies another password from the next request on.
    pub fn apply(&self, password: Option<Secret>) {
        *self.0.write().unwrap_or_else(PoisonError::into_inner) = password;
    }

    fn get(&self) -> Option<Secret> {
        self.0
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }
}

/// Who is let in on a listener.
#[derive(Clone)]
pub(super) enum Door {
    /// Whoever can connect.
    Open,
    /// Who has the password; the listener's name is for the log.
    Password(AdminPassword, &'static str),
}

/// Who acts as the operator.
#[derive(Debug, Clone)]
pub(super) struct Actor {
    /// How he was let in.
    listener: &'static str,
    client: Option<Client>,
}

impl fmt::Display for Actor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.client {
            Some(Client {
                peer: peer @ Peer::Unix { .. },
                ..
            }) => write!(f, "{peer} on the {} socket", self.listener),
            Some(client) => write!(
                f,
                "admin password from {} on the {} listener",
                client.address, self.listener
            ),
            None => write!(f, "admin password on the {} listener", self.listener),
        }
    }
}

/// Lets the operator through; everybody else is told nothing, and without a password not even that there is a door.
pub(super) async fn operator_only(
    State(door): State<Door>,
    mut request: Request,
    next: Next,
) -> Result<Response, ApiError> {
    let listener = match door {
        Door::Open => "admin",
        Door::Password(password, listener) => {
            let Some(password) = password.get() else {
                return Err(ApiError::not_found());
            };
            if !is_operator(request.headers(), &password) {
                return Err(ApiError::new(
                    StatusCode::UNAUTHORIZED,
                    "AuthenticationRequired",
                    "the admin API wants the user \"admin\" and the admin password",
                ));
            }
            listener
        }
    };
    if !request.method().is_safe() && !is_of_own_origin(request.headers()) {
        return Err(ApiError::new(
            StatusCode::FORBIDDEN,
            "Forbidden",
            "the request comes from a page of another origin, which may not act as the operator",
        ));
    }
    let client = request.extensions().get::<Client>().copied();
    request.extensions_mut().insert(Actor { listener, client });
    Ok(next.run(request).await)
}

/// Whether no page of another origin can have sent this: a browser adds the operator's credentials to those as well. Programs
/// send neither header.
fn is_of_own_origin(headers: &HeaderMap) -> bool {
    if let Some(site) = headers.get(SEC_FETCH_SITE) {
        return matches!(site.as_bytes(), b"same-origin" | b"none");
    }
    let Some(origin) = headers.get(header::ORIGIN) else {
        return true;
    };
    let authority = origin.to_str().ok().and_then(|text| text.split_once("://"));
    let host = headers.get(header::HOST).map(|host| host.as_bytes());
    authority.is_some_and(|(_, authority)| {
        host.is_some_and(|host| host.eq_ignore_ascii_case(authority.as_bytes()))
    })
}

fn is_operator(headers: &HeaderMap, password: &Secret) -> bool {
    let given = headers
        .get(header::AUTHORIZATION)
        .and_then(|value| value.to_str().ok())
        .and_then(|value| value.split_once(' '))
        .filter(|(scheme, _)| scheme.eq_ignore_ascii_case("basic"))
        .and_then(|(_, encoded)| STANDARD.decode(encoded.trim()).ok());
    let expected = format!("admin:{}", password.expose());
    // Digests have one length: the time says nothing about the length of the password either.
    given.is_some_and(|given| {
        Sha256::digest(&given)
            .ct_eq(&Sha256::digest(expected.as_bytes()))
            .into()
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use http::HeaderValue;

    #[test]
    fn pages_of_other_origins_are_told_apart() {
        let cases: [(&[(&str, &str)], bool); 10] = [
            (&[], true),
            (&[("host", "relay.example.com")], true),
            (&[("sec-fetch-site", "none")], true),
            (&[("sec-fetch-site", "same-origin")], true),
            (&[("sec-fetch-site", "same-site")], false),
            (
                &[
                    ("sec-fetch-site", "cross-site"),
                    ("origin", "https://relay.example.com"),
                    ("host", "relay.example.com"),
                ],
                false,
            ),
            (
                &[
                    ("origin", "https://relay.example.com"),
                    ("host", "relay.example.com"),
                ],
                true,
            ),
            (
                &[
                    ("origin", "http://evil.example"),
                    ("host", "relay.example.com"),
                ],
                false,
            ),
            (&[("origin", "null"), ("host", "relay.example.com")], false),
            (&[("origin", "http://relay.example.com")], false),
        ];
        for (lines, expected) in cases {
            let mut headers = HeaderMap::new();
            for (name, value) in lines {
                headers.insert(*name, HeaderValue::from_static(value));
            }
            assert_eq!(is_of_own_origin(&headers), expected, "{lines:?}");
        }
    }

    #[test]
    fn only_the_exact_pair_opens() {
        let encode = |pair: &str| STANDARD.encode(pair);
        let right = encode("admin:hunter2");
        let cases = [
            (format!("Basic {right}"), true),
            (format!("basic {right}"), true),
            (format!("Basic  {right}"), true),
            (format!("Bearer {right}"), false),
            (right.clone(), false),
            (format!("Basic {}", encode("admin:hunter")), false),
            (format!("Basic {}", encode("admin:hunter22")), false),
            (format!("Basic {}", encode("Admin:hunter2")), false),
            (format!("Basic {}", encode("root:hunter2")), false),
            (format!("Basic {}", encode("admin:")), false),
            (format!("Basic {}", encode("")), false),
            ("Basic".to_owned(), false),
            ("Basic !!!".to_owned(), false),
        ];
        for (value, expected) in cases {
            let mut headers = HeaderMap::new();
            headers.insert(
                header::AUTHORIZATION,
                HeaderValue::from_str(&value).unwrap(),
            );
            assert_eq!(
                is_operator(&headers, &Secret::new("hunter2")),
                expected,
                "{value}"
            );
        }
        assert!(!is_operator(&HeaderMap::new(), &Secret::new("hunter2")));
    }
}
