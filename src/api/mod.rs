//! The HTTP side of the relay: XRPC for everybody, routes for its operator, a page for the curious and the manual.
//! The handlers are thin: what they answer comes from the store, what they change is done by
//! [`Operations`].

mod admin;
mod auth;
mod deeds;
mod docs;
mod error;
mod input;
mod operations;
mod pages;
mod secret;
mod sync;

pub use auth::AdminPassword;
pub(crate) use input::nearest;
pub use operations::{HostActivity, HostStanding, OperationError, Operations};
pub use secret::Secret;

use crate::dial::PRODUCT;
use crate::store::Store;
use axum::Router;
use axum::extract::{DefaultBodyLimit, Request};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Response};
use axum::routing::{MethodRouter, any, get, post};
use error::ApiError;
use http::{HeaderMap, HeaderValue, Method, StatusCode, header};
use std::sync::Arc;

/// How long a browser may remember that it may ask, in seconds.
const PREFLIGHT_SECONDS: HeaderValue = HeaderValue::from_static("86400");

/// What the handlers work with.
#[derive(Clone)]
pub struct State {
    /// The database.
    pub store: Store,
    /// The relay at work.
    pub operations: Arc<dyn Operations>,
    /// The password of the admin API; without one it is off.
    pub admin_password: AdminPassword,
}

/// Who is taken for the operator on a listener of the operator's own.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Operator {
    /// Whoever can connect, which somebody else has seen to.
    Connected,
    /// Who has the password.
    Identified,
}

/// The operator's routes, for a listener of their own.
pub fn admin_router(state: State, operator: Operator) -> Router {
    let (door, health) = match operator {
        Operator::Connected => (auth::Door::Open, get(pages::operators_health)),
        Operator::Identified => (
            auth::Door::Password(state.admin_password.clone(), "admin"),
            get(pages::health),
        ),
    };
    let routes = guarded_admin_routes(door).route("/_health", getting(health));
    finished(routes.with_state(state))
}

/// All routes of the public listener; `firehose` brings `subscribeRepos`.
pub fn router(state: State, firehose: Router) -> Router {
    let xrpc = xrpc_routes()
        .with_state(state.clone())
        .merge(firehose)
        .layer(middleware::from_fn(cross_origin));
    let routes = Router::new()
        .route("/", getting(get(pages::home)))
        .route("/_health", getting(get(pages::health)))
        .route("/docs", getting(get(docs::first_page)))
        .route("/docs/", getting(get(docs::first_page)))
        .route("/docs/{*path}", getting(get(docs::page)));
    let door = auth::Door::Password(state.admin_password.clone(), "public");
    let routes = routes.merge(guarded_admin_routes(door));
    finished(routes.with_state(state).merge(xrpc))
}

/// What all listeners of the API have in common.
fn finished(routes: Router) -> Router {
    routes
        .fallback(async || ApiError::not_found())
        .layer(DefaultBodyLimit::max(input::MAX_BODY_BYTES))
        .layer(middleware::map_response(name_server))
}

/// Without a password not even the names of the routes are told, such as by a 405.
fn guarded_admin_routes(door: auth::Door) -> Router<State> {
    let door = middleware::from_fn_with_state(door, auth::operator_only);
    admin_routes().route_layer(door)
}

fn xrpc_routes() -> Router<State> {
    Router::new()
        .route("/xrpc/_health", getting(get(pages::health)))
        .route(
            "/xrpc/com.atproto.sync.requestCrawl",
            posting(post(sync::request_crawl)),
        )
        .route(
            "/xrpc/com.atproto.sync.listHosts",
            getting(get(sync::list_hosts)),
        )
        .route(
            "/xrpc/com.atproto.sync.getHostStatus",
            getting(get(sync::get_host_status)),
        )
        .route(
            "/xrpc/com.atproto.sync.listRepos",
            getting(get(sync::list_repos)),
        )
        .route(
            "/xrpc/com.atproto.sync.getRepoStatus",
            getting(get(sync::get_repo_status)),
        )
        .route(
            "/xrpc/com.atproto.sync.getLatestCommit",
            getting(get(sync::get_latest_commit)),
        )
        .route(
            "/xrpc/com.atproto.sync.getRepo",
            getting(get(sync::get_repo)),
        )
        .route("/xrpc/{*method}", any(not_implemented))
}

fn admin_routes() -> Router<State> {
    Router::new()
        .route("/admin/pds/list", getting(get(admin::list_hosts)))
        .route(
            "/admin/pds/requestCrawl",
            posting(post(admin::request_crawl)),
        )
        .route("/admin/pds/block", posting(post(admin::block_host)))
        .route("/admin/pds/unblock", posting(post(admin::unblock_host)))
        .route(
            "/admin/pds/changeLimits",
            posting(post(admin::change_limits)),
        )
        .route("/admin/repo/takeDown", posting(post(admin::take_down)))
        .route(
            "/admin/repo/reverseTakedown",
            posting(post(admin::reverse_takedown)),
        )
        .route("/admin/repo/takedowns", getting(get(admin::list_takedowns)))
        .route(
            "/admin/subs/listDomainBans",
            getting(get(admin::list_domain_bans)),
        )
        .route("/admin/subs/banDomain", posting(post(admin::ban_domain)))
        .route(
            "/admin/subs/unbanDomain",
            posting(post(admin::unban_domain)),
        )
        .route("/admin/consumers/list", getting(get(admin::list_consumers)))
        .route("/admin/{*route}", any(async || ApiError::not_found()))
}

/// A route that is read; other methods are refused in words.
fn getting(route: MethodRouter<State>) -> MethodRouter<State> {
    route.fallback(async |method: Method| {
        wrong_method(&method, "GET", HeaderValue::from_static("GET, HEAD"))
    })
}

/// A route that is posted to; other methods are refused in words.
fn posting(route: MethodRouter<State>) -> MethodRouter<State> {
    route.fallback(async |method: Method| {
        wrong_method(&method, "POST", HeaderValue::from_static("POST"))
    })
}

fn wrong_method(method: &Method, expected: &str, allow: HeaderValue) -> Response {
    let message = format!("incorrect HTTP method ({method}), expected {expected}");
    let error = ApiError::new(StatusCode::METHOD_NOT_ALLOWED, "InvalidRequest", message);
    ([(header::ALLOW, allow)], error).into_response()
}

async fn not_implemented() -> ApiError {
    ApiError::new(
        StatusCode::NOT_IMPLEMENTED,
        "MethodNotImplemented",
        "this relay does not have the method",
    )
}

/// Lets pages of any origin read the public methods, and answers their question in advance.
async fn cross_origin(request: Request, next: Next) -> Response {
    let asks = request.method() == Method::OPTIONS
        && request
            .headers()
            .contains_key(header::ACCESS_CONTROL_REQUEST_METHOD);
    let mut response = if asks {
        StatusCode::NO_CONTENT.into_response()
    } else {
        next.run(request).await
    };
    let any = HeaderValue::from_static("*");
    let headers: &mut HeaderMap = response.headers_mut();
    headers.insert(header::ACCESS_CONTROL_ALLOW_ORIGIN, any.clone());
    if asks {
        headers.insert(
            header::ACCESS_CONTROL_ALLOW_METHODS,
            HeaderValue::from_static("GET, HEAD, POST"),
        );
        headers.insert(header::ACCESS_CONTROL_ALLOW_HEADERS, any);
        headers.insert(header::ACCESS_CONTROL_MAX_AGE, PREFLIGHT_SECONDS);
    }
    response
}

/// Says who answers: relays refuse hosts that name themselves as one.
async fn name_server(mut response: Response) -> Response {
    response
        .headers_mut()
        .insert(header::SERVER, HeaderValue::from_static(PRODUCT));
    response
}
