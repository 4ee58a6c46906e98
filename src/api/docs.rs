//! The manual at `/docs`: the pages of docs/, built into the program and rendered once. Promises HTML without scripts that
//! loads nothing from elsewhere, and an answer for every link between pages. The text is not this file's concern.

mod render;

use std::collections::HashMap;
use std::sync::LazyLock;

use axum::body::Body;
use axum::extract::Path;
use axum::response::{IntoResponse, Response};
use http::{HeaderMap, HeaderValue, StatusCode, header};
use sha2::{Digest, Sha256};

/// Files of docs/, by their path there.
macro_rules! book {
    ($($path:literal),* $(,)?) => {
        &[$(($path, include_str!(concat!(env!("CARGO_MANIFEST_DIR"), "/docs/", $path)))),*]
    };
}

/// The table of contents, which is the sidebar.
const SUMMARY: &str = include_str!(concat!(env!("CARGO_MANIFEST_DIR"), "/docs/SUMMARY.md"));
/// Every page that the table of contents lists, the first one first.
const PAGES: &[(&str, &str)] = book![
    "README.md",
    "operate/nixos.md",
    "operate/systemd.md",
    "operate/container.md",
    "operate/configuration.md",
    "operate/proxy-and-tls.md",
    "operate/hosts-and-quotas.md",
    "operate/moderation.md",
    "operate/monitoring.md",
    "operate/backup-and-recovery.md",
    "operate/upgrade-and-rollback.md",
    "operate/sizing.md",
    "operate/never-ran.md",
    "consume/endpoint.md",
    "consume/cursors.md",
    "consume/limits.md",
    "consume/examples.md",
    "consume/verification.md",
    "for-pds-owners.md",
    "admin-api.md",
    "reference/settings.md",
    "reference/metrics.md",
    "reference/drop-rules.md",
    "reference/alerts.md",
    "reference/exit-codes.md",
    "design/architecture.md",
    "design/network.md",
    "design/event-log.md",
    "design/verification.md",
    "design/budgets.md",
    "design/handover.md",
    "design/performance.md",
    "design/not-obvious.md",
    "contributing/testing.md",
    "contributing/vm-tests.md",
    "contributing/fuzzing.md",
    "contributing/adding.md",
];

/// Pictures of pages.
const PICTURES: &[(&str, &str)] = book!["demo/demo.svg"];

const STYLE: &str = include_str!("docs/style.css");

/// How long a browser may keep a page before it asks again.
const CACHE: HeaderValue = HeaderValue::from_static("public, max-age=300");
/// Our own style and pictures, and nothing else: no script, no frame, no form.
const POLICY: HeaderValue = HeaderValue::from_static(
    "default-src 'none'; style-src 'self'; img-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
);

/// Something that is served, with the mark by which a browser knows it again.
struct Served {
    content_type: HeaderValue,
    body: &'static str,
    etag: HeaderValue,
}

impl Served {
    fn new(content_type: &'static str, body: &'static str) -> Served {
        let digest = Sha256::digest(body);
        let mark = data_encoding::HEXLOWER.encode(&digest[..8]);
        Served {
            content_type: HeaderValue::from_static(content_type),
            body,
            etag: HeaderValue::from_str(&format!("\"{mark}\"")).expect("hexadecimal digits"),
        }
    }

    fn html(body: String) -> Served {
        // As long as the program, as everything that is built in.
        Served::new("text/html; charset=utf-8", body.leak())
    }

    /// 304 where the browser has it already.
    fn answer(&self, status: StatusCode, asked: &HeaderMap) -> Response {
        let known = asked
            .get_all(header::IF_NONE_MATCH)
            .iter()
            .filter_map(|value| value.to_str().ok())
            .flat_map(|value| value.split(','))
            .any(|mark| mark.trim().trim_start_matches("W/").as_bytes() == self.etag.as_bytes());
        let (status, body) = match known && status == StatusCode::OK {
            true => (StatusCode::NOT_MODIFIED, Body::empty()),
            false => (status, Body::from(self.body)),
        };
        let headers = [
            (header::CONTENT_TYPE, self.content_type.clone()),
            (header::ETAG, self.etag.clone()),
            (header::CACHE_CONTROL, CACHE),
            (header::CONTENT_SECURITY_POLICY, POLICY),
            (
                header::X_CONTENT_TYPE_OPTIONS,
                HeaderValue::from_static("nosniff"),
            ),
            (
                header::REFERRER_POLICY,
                HeaderValue::from_static("no-referrer"),
            ),
        ];
        (status, headers, body).into_response()
    }
}

/// Everything below `/docs`, by its path there.
struct Manual {
    files: HashMap<&'static str, Served>,
    not_found: Served,
}

static MANUAL: LazyLock<Manual> = LazyLock::new(|| {
    let pages = PAGES.iter().map(|(path, text)| {
        let html = render::page(path, text, SUMMARY);
        (render::address(path), Served::html(html))
    });
    let pictures = PICTURES
        .iter()
        .map(|(path, svg)| (*path, Served::new("image/svg+xml", svg)));
    let style = Served::new("text/css; charset=utf-8", STYLE);
    let missing = "# Not found\n\nThe manual has no page at this address.\n";
    Manual {
        files: pages
            .chain(pictures)
            .chain([("style.css", style)])
            .collect(),
        not_found: Served::html(render::page("404.md", missing, SUMMARY)),
    }
});

/// `GET /docs`.
pub(super) async fn first_page(headers: HeaderMap) -> Response {
    answer("", &headers)
}

/// `GET /docs/…`.
pub(super) async fn page(Path(path): Path<String>, headers: HeaderMap) -> Response {
    answer(&path, &headers)
}

fn answer(path: &str, headers: &HeaderMap) -> Response {
    match MANUAL.files.get(path) {
        Some(file) => file.answer(StatusCode::OK, headers),
        None => MANUAL.not_found.answer(StatusCode::NOT_FOUND, headers),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_pages_are_those_of_the_table_of_contents() {
        let listed: Vec<&str> = SUMMARY
            .split("](")
            .skip(1)
            .filter_map(|rest| rest.split(')').next())
            .collect();
        let built_in: Vec<&str> = PAGES.iter().map(|(path, _)| *path).collect();
        assert_eq!(built_in, listed);
    }
}
