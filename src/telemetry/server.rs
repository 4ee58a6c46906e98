//! `/metrics` and `/_health` for the private listener. Says nothing about single hosts or accounts.

use std::sync::Arc;

use axum::Json;
use axum::Router;
use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use futures_util::future::BoxFuture;
use serde_json::json;

use super::metrics::{Metrics, metrics};

/// The media type of Prometheus' text format.
const TEXT_FORMAT: &str = "text/plain; version=0.0.4; charset=utf-8";

/// Whether the relay does its work.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Health {
    /// What is wrong, each in words for a person; empty when all is well.
    pub problems: Vec<String>,
}

impl Health {
    /// Whether nothing is wrong.
    pub fn is_ok(&self) -> bool {
        self.problems.is_empty()
    }
}

/// What the listener asks of the relay it reports on, on each request: neither may block a thread.
pub trait Observed: Send + Sync + 'static {
    /// The state of the relay now.
    fn health(&self) -> BoxFuture<'_, Health>;

    /// Sets the gauges that are sampled rather than counted.
    fn sample(&self, metrics: &Metrics);
}

/// The routes of the metrics listener.
pub fn router(observed: Arc<dyn Observed>) -> Router {
    Router::new()
        .route("/metrics", get(show_metrics))
        .route("/_health", get(show_health))
        .route("/xrpc/_health", get(show_health))
        .with_state(observed)
}

async fn show_metrics(State(observed): State<Arc<dyn Observed>>) -> Response {
    observed.sample(metrics());
    match metrics().render() {
        Ok(text) => ([(header::CONTENT_TYPE, TEXT_FORMAT)], text).into_response(),
        Err(error) => {
            tracing::error!(%error, "the metrics cannot be written");
            StatusCode::INTERNAL_SERVER_ERROR.into_response()
        }
    }
}

/// 200 when all is well, else 503; the body says what is wrong.
async fn show_health(State(observed): State<Arc<dyn Observed>>) -> Response {
    let health = observed.health().await;
    let (code, status) = if health.is_ok() {
        (StatusCode::OK, "ok")
    } else {
        (StatusCode::SERVICE_UNAVAILABLE, "failing")
    };
    let body = json!({
        "version": env!("CARGO_PKG_VERSION"),
        "status": status,
        "problems": health.problems,
    });
    (code, Json(body)).into_response()
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Fixed(Health);

    impl Observed for Fixed {
        fn health(&self) -> BoxFuture<'_, Health> {
            Box::pin(async { self.0.clone() })
        }
        fn sample(&self, metrics: &Metrics) {
            metrics.log_bytes.set(4242);
        }
    }

    async fn body(response: Response) -> String {
        let bytes = axum::body::to_bytes(response.into_body(), 1 << 20)
            .await
            .unwrap();
        String::from_utf8(bytes.to_vec()).unwrap()
    }

    #[tokio::test]
    async fn a_scrape_samples_first() {
        let observed: Arc<dyn Observed> = Arc::new(Fixed(Health::default()));
        let response = show_metrics(State(observed)).await;
        assert_eq!(response.headers()[header::CONTENT_TYPE], TEXT_FORMAT);
        assert!(body(response).await.contains("relay_log_bytes 4242\n"));
    }

    #[tokio::test]
    async fn health_is_a_status_code_and_reasons() {
        let ok = show_health(State(
            Arc::new(Fixed(Health::default())) as Arc<dyn Observed>
        ))
        .await;
        assert_eq!(ok.status(), StatusCode::OK);
        let problems = vec!["the disk of the log is full".to_owned()];
        let bad = show_health(State(
            Arc::new(Fixed(Health { problems })) as Arc<dyn Observed>
        ))
        .await;
        assert_eq!(bad.status(), StatusCode::SERVICE_UNAVAILABLE);
        assert!(body(bad).await.contains("the disk of the log is full"));
    }
}
