//! Every link leads somewhere.

use std::path::{Component, Path, PathBuf};

use pulldown_cmark::{Event, Tag};

use super::{anchors, documents, events, markdown_below, read, root};

/// Where the links and pictures of a page lead.
pub(super) fn of(text: &str) -> Vec<String> {
    events(text)
        .filter_map(|event| match event {
            Event::Start(Tag::Link { dest_url, .. } | Tag::Image { dest_url, .. }) => {
                Some(dest_url.into_string())
            }
            _ => None,
        })
        .collect()
}

/// A path without `.` and `..`.
fn normal(path: &Path) -> PathBuf {
    let mut normal = PathBuf::new();
    for part in path.components() {
        match part {
            Component::ParentDir => assert!(normal.pop(), "{path:?} leaves the repository"),
            Component::CurDir => {}
            part => normal.push(part),
        }
    }
    normal
}

/// Why a link of a document leads nowhere.
fn dead(document: &str, link: &str) -> Option<String> {
    if link.contains("://") || link.starts_with("mailto:") {
        return None;
    }
    let (file, fragment) = link.split_once('#').unwrap_or((link, ""));
    let path = match file {
        "" => PathBuf::from(document),
        file => normal(&Path::new(document).parent().unwrap().join(file)),
    };
    if !root().join(&path).exists() {
        return Some("no such file".into());
    }
    if document.starts_with("docs/") && !path.starts_with("docs") {
        return Some("leaves the manual, where the book and the relay cannot follow".into());
    }
    let text = match fragment {
        "" => return None,
        _ => read(path.to_str().unwrap()),
    };
    let known = anchors(&text).contains(fragment);
    (!known).then(|| format!("{} has no such heading", path.display()))
}

#[test]
fn every_link_leads_to_a_file_and_a_heading() {
    let mut wrong = Vec::new();
    for document in documents() {
        for link in of(&read(&document)) {
            if let Some(reason) = dead(&document, &link) {
                wrong.push(format!("{document}: {link}: {reason}"));
            }
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}

/// The relay serves pages without it, the book with it.
#[test]
fn the_manual_is_written_without_html() {
    for page in markdown_below("docs") {
        let text = read(&page);
        let html: Vec<String> = events(&text)
            .filter_map(|event| match event {
                Event::Html(html) | Event::InlineHtml(html) => Some(html.into_string()),
                _ => None,
            })
            .filter(|html| !html.trim_start().starts_with("<!--"))
            .collect();
        assert!(html.is_empty(), "{page}: {html:?}");
    }
}
