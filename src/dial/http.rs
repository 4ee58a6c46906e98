//! HTTP under the dial guard: a client whose every connection and redirect is checked, and bounded reading of bodies.
//! What the body means is left to the caller.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use reqwest::dns::{Addrs, Name, Resolve, Resolving};
use reqwest::header::{HeaderMap, SERVER};
use reqwest::redirect::{Attempt, Policy};
use reqwest::{Client, ClientBuilder, StatusCode};
use url::Url;

use super::{DialError, Guard, PRODUCT, RELAY_MARK, client_config, speaks_no_tls};

/// Redirects that are followed; each is checked like a first request.
const MAX_REDIRECTS: usize = 3;

/// Longest time for a whole request, body included.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(10);

/// Longest time for the TCP and TLS handshakes.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// How long a connection is kept for the next request.
const IDLE_TIMEOUT: Duration = Duration::from_secs(30);

/// A fetched answer of any status.
#[derive(Debug)]
pub struct Fetched {
    /// The status line's code.
    pub status: StatusCode,
    /// The answer's headers.
    pub headers: HeaderMap,
    /// The body, at most as long as was asked for.
    pub body: Vec<u8>,
}

/// Why there is no answer.
#[derive(Debug, thiserror::Error)]
pub enum FetchError {
    /// The guard refuses the URL.
    #[error(transparent)]
    Refused(#[from] DialError),
    /// The connection, TLS, the protocol or a redirect failed.
    #[error("requesting {url}: {reason}")]
    Failed { url: String, reason: String },
    /// The body is longer than the caller takes.
    #[error("the answer of {url} is longer than {limit} bytes")]
    TooLong { url: String, limit: usize },
}

/// A client for hosts that strangers name: resolves through `guard`, checks redirects, uses no proxy.
///
/// # Panics
/// Not in practice: the settings are constant, so a client that can be built once can always be built.
pub fn http_client(guard: &Guard) -> Client {
    guarded_client(*guard, *guard)
}

fn guarded_client(addresses: Guard, redirects: Guard) -> Client {
    basic_client()
        .dns_resolver(Arc::new(GuardedDns(addresses)))
        .redirect(Policy::custom(move |attempt| {
            check_redirect(&redirects, attempt)
        }))
        .no_proxy()
        .https_only(!addresses.allow_private())
        .pool_max_idle_per_host(1)
        .build()
        .expect("an HTTP client with constant settings")
}

/// A client for servers that the operator names, such as the PLC directory: they may be private, and nothing is
/// followed to where they point.
///
/// # Panics
/// As [`http_client`].
pub fn directory_client() -> Client {
    basic_client()
        .redirect(Policy::none())
        .build()
        .expect("an HTTP client with constant settings")
}

/// A client of tools and tests, for servers of their own: no guard, no time limit.
///
/// # Panics
/// As [`http_client`].
pub fn plain_client() -> Client {
    plain_client_builder()
        .build()
        .expect("an HTTP client with constant settings")
}

/// As [`plain_client`], with more to set. Every client begins here: reqwest is built without TLS of its own.
pub fn plain_client_builder() -> ClientBuilder {
    Client::builder().tls_backend_preconfigured((*client_config()).clone())
}

fn basic_client() -> ClientBuilder {
    plain_client_builder()
        .user_agent(PRODUCT)
        .timeout(REQUEST_TIMEOUT)
        .connect_timeout(CONNECT_TIMEOUT)
        .pool_idle_timeout(IDLE_TIMEOUT)
}

/// GETs `url` with a client of [`http_client`] and reads at most `limit` bytes of body.
///
/// # Errors
/// See [`FetchError`]; an answer with an error status is not an error here.
pub async fn fetch(
    client: &Client,
    guard: &Guard,
    url: &Url,
    limit: usize,
) -> Result<Fetched, FetchError> {
    guard.check(url)?;
    get(client, url, limit).await
}

/// GETs `url` without asking a guard, for servers that the operator names, and reads at most `limit` bytes of body,
/// whatever length the answer claims.
///
/// # Errors
/// As [`fetch`].
pub async fn get(client: &Client, url: &Url, limit: usize) -> Result<Fetched, FetchError> {
    let failed = |error: reqwest::Error| FetchError::Failed {
        url: url.to_string(),
        reason: explain(&error),
    };
    let mut response = client.get(url.clone()).send().await.map_err(failed)?;
    let mut body = Vec::new();
    while let Some(chunk) = response.chunk().await.map_err(failed)? {
        if body.len() + chunk.len() > limit {
            return Err(FetchError::TooLong {
                url: url.to_string(),
                limit,
            });
        }
        body.extend_from_slice(&chunk);
    }
    Ok(Fetched {
        status: response.status(),
        headers: std::mem::take(response.headers_mut()),
        body,
    })
}

/// The `Server` header of an answer, if it is one of a relay.
pub fn relay_mark(headers: &HeaderMap) -> Option<String> {
    let values = headers.get_all(SERVER).iter();
    let mut texts = values.map(|value| String::from_utf8_lossy(value.as_bytes()));
    texts
        .find(|text| text.to_ascii_lowercase().contains(RELAY_MARK))
        .map(|text| text.into_owned())
}

/// The innermost cause, which is the one that tells an operator something.
fn explain(error: &reqwest::Error) -> String {
    if speaks_no_tls(error) {
        return "the server does not speak TLS there".to_owned();
    }
    let mut cause: &dyn std::error::Error = error;
    while let Some(source) = cause.source() {
        cause = source;
    }
    cause.to_string()
}

fn check_redirect(guard: &Guard, attempt: Attempt<'_>) -> reqwest::redirect::Action {
    if attempt.previous().len() > MAX_REDIRECTS {
        return attempt.error(format!("more than {MAX_REDIRECTS} redirects"));
    }
    match guard.check(attempt.url()) {
        Ok(()) => attempt.follow(),
        Err(error) => attempt.error(error),
    }
}

/// DNS for reqwest that answers only with addresses the guard admits.
struct GuardedDns(Guard);

impl Resolve for GuardedDns {
    fn resolve(&self, name: Name) -> Resolving {
        let guard = self.0;
        Box::pin(async move {
            // The port is put in by the connector; the guard has checked the URL's port already.
            let found = guard.resolve(name.as_str(), 443).await?;
            let found: Addrs = Box::new(
                found
                    .into_iter()
                    .map(|address| SocketAddr::new(address.ip(), 0)),
            );
            Ok(found)
        })
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use axum::Router;
    use axum::response::Redirect;
    use axum::routing::get as on_get;

    use super::*;

    /// A server on this machine; the address of its root.
    async fn serve(router: Router) -> Url {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}/", listener.local_addr().unwrap());
        tokio::spawn(async move { axum::serve(listener, router).await.unwrap() });
        Url::parse(&url).unwrap()
    }

    #[tokio::test]
    async fn a_redirect_to_a_private_address_is_not_followed() {
        let reached = Arc::new(AtomicUsize::new(0));
        let counter = reached.clone();
        let secret = serve(Router::new().route(
            "/",
            on_get(async move || {
                counter.fetch_add(1, Ordering::SeqCst);
                "secret"
            }),
        ))
        .await;
        let target = secret.to_string();
        let door =
            serve(Router::new().route("/", on_get(async move || Redirect::temporary(&target))))
                .await;

        let strict = guarded_client(Guard::new(true), Guard::new(false));
        let error = get(&strict, &door, 1_000).await.unwrap_err();
        assert!(matches!(error, FetchError::Failed { .. }), "{error}");
        assert_eq!(reached.load(Ordering::SeqCst), 0);

        let open = http_client(&Guard::new(true));
        let answer = fetch(&open, &Guard::new(true), &door, 1_000).await.unwrap();
        assert_eq!(
            (answer.body.as_slice(), reached.load(Ordering::SeqCst)),
            (b"secret".as_slice(), 1)
        );
    }

    #[tokio::test]
    async fn redirects_end() {
        let hits = Arc::new(AtomicUsize::new(0));
        let counter = hits.clone();
        let circle = serve(Router::new().route(
            "/",
            on_get(async move || {
                counter.fetch_add(1, Ordering::SeqCst);
                Redirect::temporary("/")
            }),
        ))
        .await;
        assert!(
            fetch(
                &http_client(&Guard::new(true)),
                &Guard::new(true),
                &circle,
                1_000
            )
            .await
            .is_err()
        );
        assert_eq!(hits.load(Ordering::SeqCst), MAX_REDIRECTS + 1);
    }

    #[tokio::test]
    async fn bodies_are_bounded_whatever_length_they_claim() {
        let server = serve(Router::new().route("/", on_get(async || "x".repeat(1_001)))).await;
        let client = directory_client();
        assert_eq!(
            get(&client, &server, 1_001).await.unwrap().body.len(),
            1_001
        );
        assert!(matches!(
            get(&client, &server, 1_000).await,
            Err(FetchError::TooLong { limit: 1_000, .. })
        ));
    }

    #[tokio::test]
    async fn names_that_lead_to_this_machine_are_refused_after_dns() {
        let dns = GuardedDns(Guard::new(false));
        assert!(dns.resolve("localhost".parse().unwrap()).await.is_err());
        assert!(
            GuardedDns(Guard::new(true))
                .resolve("localhost".parse().unwrap())
                .await
                .is_ok()
        );
    }
}
