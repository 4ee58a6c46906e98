//! The door of the admin API: HTTP Basic with the user `admin`, compared in constant time.
//! Without a configured password there is no admin API at all.

use super::error::ApiError;
use crate::config::Secret;
use axum::extract::{Request, State};
use axum::middleware::Next;
use axum::response::Response;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use http::{HeaderMap, StatusCode, header};
use sha2::{Digest as _, Sha256};
use std::sync::{Arc, PoisonError, RwLock};
use subtle::ConstantTimeEq as _;

/// The password of the admin API, which may change while the API is served; without one it is off. Clones share it.
#[derive(Clone, Default)]
pub struct AdminPassword(Arc<RwLock<Option<Secret>>>);

impl AdminPassword {
    /// The password so far.
    pub fn new(password: Option<Secret>) -> AdminPassword {
        AdminPassword(Arc::new(RwLock::new(password)))
    }

    /// The password from the next request on.
    pub fn set(&self, password: Option<Secret>) {
        *self.0.write().unwrap_or_else(PoisonError::into_inner) = password;
    }

    fn get(&self) -> Option<Secret> {
        self.0
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }
}

/// Lets the operator through; everybody else is told nothing, and without a password not even that there is a door.
pub(super) async fn operator_only(
    State(password): State<AdminPassword>,
    request: Request,
    next: Next,
) -> Result<Response, ApiError> {
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
    Ok(next.run(request).await)
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
