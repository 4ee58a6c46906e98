//! What the relay serves at `/docs`, over a socket.

use std::collections::{BTreeMap, BTreeSet};

use atproto_relay::config::Config;
use atproto_relay::dial::plain_client;
use atproto_relay::relay::Relay;
use reqwest::{Response, StatusCode};

use super::{links, read};

async fn relay(folder: &tempfile::TempDir) -> (Relay, String) {
    let relay = Relay::start(Config {
        listen: ([127, 0, 0, 1], 0).into(),
        metrics_listen: ([127, 0, 0, 1], 0).into(),
        data_dir: folder.path().join("data"),
        ..Config::default()
    })
    .await
    .unwrap();
    let url = format!("http://{}", relay.public_addr());
    (relay, url)
}

async fn get(url: impl AsRef<str>) -> Response {
    plain_client().get(url.as_ref()).send().await.unwrap()
}

/// The values of an attribute in HTML.
fn attributes<'a>(html: &'a str, name: &str) -> BTreeSet<&'a str> {
    let start = format!(" {name}=\"");
    let rests = html.split(&start).skip(1);
    rests.filter_map(|rest| rest.split('"').next()).collect()
}

#[tokio::test]
async fn every_page_is_served_and_every_link_in_it_leads_somewhere() {
    let folder = tempfile::tempdir().unwrap();
    let (relay, url) = relay(&folder).await;
    let mut pages = BTreeMap::new();
    for link in links::of(&read("docs/SUMMARY.md")) {
        let address = match link.strip_suffix(".md").unwrap() {
            "README" => "/docs".to_owned(),
            page => format!("/docs/{page}"),
        };
        let answer = get(format!("{url}{address}")).await;
        assert_eq!(answer.status(), StatusCode::OK, "{address}");
        let header = |name: &str| answer.headers()[name].to_str().unwrap().to_owned();
        assert_eq!(header("content-type"), "text/html; charset=utf-8");
        assert!(header("content-security-policy").starts_with("default-src 'none'"));
        pages.insert(address, answer.text().await.unwrap());
    }
    let mut wrong = Vec::new();
    for (address, html) in &pages {
        assert!(
            !html.contains("<script") && !html.contains("style=\""),
            "{address}"
        );
        for source in attributes(html, "src") {
            let found = get(format!("{url}{source}")).await;
            assert_eq!(found.status(), StatusCode::OK, "{address}: {source}");
        }
        for link in attributes(html, "href") {
            let (page, fragment) = link.split_once('#').unwrap_or((link, ""));
            let page = if page.is_empty() { address } else { page };
            if page.contains("://") || page.starts_with("mailto:") || page == "/docs/style.css" {
                continue;
            }
            let known = pages.get(page).is_some_and(|html| {
                fragment.is_empty() || attributes(html, "id").contains(fragment)
            });
            if !known {
                wrong.push(format!("{address}: {link}"));
            }
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
    relay.shutdown().await;
}

#[tokio::test]
async fn pages_are_kept_by_browsers_and_missing_ones_are_pages_too() {
    let folder = tempfile::tempdir().unwrap();
    let (relay, url) = relay(&folder).await;
    let first = get(format!("{url}/docs")).await;
    let etag = first.headers()["etag"].clone();
    assert!(first.headers().contains_key("cache-control"));
    let again = plain_client()
        .get(format!("{url}/docs/"))
        .header(
            "if-none-match",
            format!("\"other\", W/{}", etag.to_str().unwrap()),
        )
        .send()
        .await
        .unwrap();
    assert_eq!(again.status(), StatusCode::NOT_MODIFIED);
    assert_eq!(again.headers()["etag"], etag);
    assert!(again.bytes().await.unwrap().is_empty());

    let style = get(format!("{url}/docs/style.css")).await;
    assert_eq!(style.headers()["content-type"], "text/css; charset=utf-8");
    assert_eq!(style.headers()["x-content-type-options"], "nosniff");

    for path in [
        "/docs/nothing",
        "/docs/../Cargo.toml",
        "/docs/operate",
        "/docs/%2e%2e/x",
    ] {
        let missing = get(format!("{url}{path}")).await;
        assert_eq!(missing.status(), StatusCode::NOT_FOUND, "{path}");
    }
    let missing = get(format!("{url}/docs/nothing")).await;
    assert_eq!(
        missing.headers()["content-type"],
        "text/html; charset=utf-8"
    );
    assert!(missing.text().await.unwrap().contains("Not found"));

    let posted = plain_client()
        .post(format!("{url}/docs"))
        .send()
        .await
        .unwrap();
    assert_eq!(posted.status(), StatusCode::METHOD_NOT_ALLOWED);
    let home = get(&url).await.text().await.unwrap();
    assert!(home.contains("/docs"), "{home}");
    relay.shutdown().await;
}
