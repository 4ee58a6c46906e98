//! `/metrics` and `/_health` for the private listener. Says nothing about single hosts or accounts.

use std::sync::Arc;

use axum::Router;
use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;

use super::health::{Health, Reader};
use super::metrics::{Metrics, metrics};

/// The media type of Prometheus' text format.
const TEXT_FORMAT: &str = "text/plain; version=0.0.4; charset=utf-8";

/// What the listener asks of the relay it reports on, on each request: neither may block a thread.
pub trait Observed: Send + Sync + 'static {
    /// The state of the relay when it was last looked at.
    fn health(&self) -> Arc<Health>;

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

async fn show_health(State(observed): State<Arc<dyn Observed>>) -> Response {
    observed.health().respond(Reader::Operator)
}

#[cfg(test)]
mod tests {
    use super::*;

    use super::super::health::{Finding, Problem, ProblemName};
    use std::time::SystemTime;

    struct Fixed(Health);

    impl Observed for Fixed {
        fn health(&self) -> Arc<Health> {
            Arc::new(self.0.clone())
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
        let problems = vec![Problem {
            name: ProblemName::Log,
            since: SystemTime::now(),
            finding: Finding::because("the log waits", "the disk of the log is full"),
        }];
        let bad = show_health(State(
            Arc::new(Fixed(Health { problems })) as Arc<dyn Observed>
        ))
        .await;
        assert_eq!(bad.status(), StatusCode::SERVICE_UNAVAILABLE);
        assert!(body(bad).await.contains("the disk of the log is full"));
    }
}
