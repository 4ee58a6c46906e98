//! `/metrics` and `/_health` for the private listener. Says nothing about single hosts or accounts.

use std::sync::Arc;

use axum::Router;
use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;

use super::health::{Health, Reader};
use super::metrics::metrics;
use super::registry::Registry;

/// The media type of Prometheus' text format.
const TEXT_FORMAT: &str = "text/plain; version=0.0.4; charset=utf-8";

/// What the listener asks of the relay it reports on, on each request: neither may block a thread.
pub trait Observed: Send + Sync + 'static {
    /// The state of the relay when it was last looked at.
    fn health(&self) -> Arc<Health>;

    /// Sets the gauges that are sampled rather than counted.
    fn sample(&self);
}

/// The routes of the metrics listener.
pub fn router(observed: Arc<dyn Observed>, registry: Registry) -> Router {
    Router::new()
        .route("/metrics", get(show_metrics))
        .route("/_health", get(show_health))
        .route("/xrpc/_health", get(show_health))
        .with_state(Shown { observed, registry })
}

/// What the listener shows.
#[derive(Clone)]
struct Shown {
    observed: Arc<dyn Observed>,
    registry: Registry,
}

async fn show_metrics(State(shown): State<Shown>) -> Response {
    shown.observed.sample();
    let text = metrics()
        .render()
        .and_then(|text| Ok(text + &shown.registry.render()?));
    match text {
        Ok(text) => ([(header::CONTENT_TYPE, TEXT_FORMAT)], text).into_response(),
        Err(error) => {
            tracing::error!(%error, "the metrics cannot be written");
            StatusCode::INTERNAL_SERVER_ERROR.into_response()
        }
    }
}

async fn show_health(State(shown): State<Shown>) -> Response {
    shown.observed.health().respond(Reader::Operator)
}

#[cfg(test)]
mod tests {
    use super::*;

    use super::super::health::{Finding, Problem, ProblemName};
    use std::time::SystemTime;

    use prometheus::IntGauge;

    struct Fixed {
        health: Health,
        sampled: IntGauge,
    }

    fn shown(health: Health) -> State<Shown> {
        let registry = Registry::default();
        let sampled = registry.gauge("sampled", "A gauge that is sampled");
        State(Shown {
            observed: Arc::new(Fixed { health, sampled }),
            registry,
        })
    }

    impl Observed for Fixed {
        fn health(&self) -> Arc<Health> {
            Arc::new(self.health.clone())
        }
        fn sample(&self) {
            self.sampled.set(4242);
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
        let response = show_metrics(shown(Health::default())).await;
        assert_eq!(response.headers()[header::CONTENT_TYPE], TEXT_FORMAT);
        assert!(body(response).await.contains("sampled 4242\n"));
    }

    #[tokio::test]
    async fn health_is_a_status_code_and_reasons() {
        let ok = show_health(shown(Health::default())).await;
        assert_eq!(ok.status(), StatusCode::OK);
        let problems = vec![Problem {
            name: ProblemName::Log,
            since: SystemTime::now(),
            finding: Finding::because("the log waits", "the disk of the log is full"),
        }];
        let bad = show_health(shown(Health { problems })).await;
        assert_eq!(bad.status(), StatusCode::SERVICE_UNAVAILABLE);
        assert!(body(bad).await.contains("the disk of the log is full"));
    }
}
