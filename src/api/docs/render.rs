//! Markdown to HTML: headings with the anchors that GitHub gives them, links between pages, tables that scroll, and the
//! frame around a page. Promises that no HTML of the Markdown gets through.

use std::collections::HashMap;

use pulldown_cmark::{CowStr, Event, Options, Parser, Tag, TagEnd, html};

/// The manual's first page, and what it is called in the browser.
const FIRST: &str = "README.md";
const TITLE: &str = "atproto-relay";

/// Where a page is served, below `/docs/`: without `.md`, the first page at the top.
pub(super) fn address(path: &str) -> &str {
    match path {
        FIRST => "",
        path => path.strip_suffix(".md").unwrap_or(path),
    }
}

/// A whole page.
pub(super) fn page(path: &str, text: &str, summary: &str) -> String {
    let title = text
        .lines()
        .find_map(|line| line.strip_prefix("# "))
        .unwrap_or(TITLE);
    let mut escaped = String::new();
    html::push_html(&mut escaped, [Event::Text(CowStr::from(title))].into_iter());
    let contents = summary.trim_start().trim_start_matches("# Summary");
    let here = format!("<a href=\"{}\">", link_to(address(path)));
    let current = here.replace("<a ", "<a aria-current=\"page\" ");
    let contents = to_html(FIRST, markdown(contents)).replacen(&here, &current, 1);
    format!(
        "<!doctype html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n\
         <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n\
         <title>{escaped} · {TITLE}</title>\n<link rel=\"stylesheet\" href=\"/docs/style.css\">\n</head>\n<body>\n\
         <nav aria-label=\"Contents\">\n{contents}</nav>\n<main>\n{}</main>\n</body>\n</html>\n",
        body(path, text)
    )
}

/// The Markdown of the page at `path` as HTML.
fn body(path: &str, text: &str) -> String {
    let mut events = markdown(text);
    name_headings(&mut events);
    to_html(path, events)
}

fn markdown(text: &str) -> Vec<Event<'_>> {
    Parser::new_ext(text, Options::ENABLE_TABLES).collect()
}

fn to_html(path: &str, events: Vec<Event<'_>>) -> String {
    let events = events.into_iter().flat_map(|event| changed(path, event));
    let mut out = String::new();
    html::push_html(&mut out, events);
    out
}

/// Gives each heading the anchor of its text.
fn name_headings(events: &mut [Event]) {
    let mut taken = HashMap::new();
    for start in 0..events.len() {
        if !matches!(events[start], Event::Start(Tag::Heading { .. })) {
            continue;
        }
        let text: String = events[start..]
            .iter()
            .take_while(|event| !matches!(event, Event::End(TagEnd::Heading(_))))
            .filter_map(|event| match event {
                Event::Text(text) | Event::Code(text) => Some(&**text),
                _ => None,
            })
            .collect();
        let name = anchor(&text, &mut taken);
        if let Event::Start(Tag::Heading { id, .. }) = &mut events[start] {
            *id = Some(name.into());
        }
    }
}

/// The anchor that GitHub and mdBook give a heading: lower case, words joined by hyphens, a number where it is taken.
fn anchor(text: &str, taken: &mut HashMap<String, usize>) -> String {
    let name: String = text
        .trim()
        .chars()
        .filter_map(|c| match c {
            ' ' => Some('-'),
            c if c.is_alphanumeric() || c == '-' || c == '_' => Some(c),
            _ => None,
        })
        .flat_map(char::to_lowercase)
        .collect();
    let times = taken.entry(name.clone()).or_default();
    *times += 1;
    match *times {
        1 => name,
        times => format!("{name}-{}", times - 1),
    }
}

/// What an event of the Markdown is in the page.
fn changed<'a>(path: &str, event: Event<'a>) -> Vec<Event<'a>> {
    match event {
        Event::Html(_) | Event::InlineHtml(_) => Vec::new(),
        Event::Start(Tag::Table(columns)) => vec![
            Event::Html("<div class=\"table\">".into()),
            Event::Start(Tag::Table(columns)),
        ],
        Event::End(TagEnd::Table) => vec![Event::End(TagEnd::Table), Event::Html("</div>".into())],
        Event::Start(Tag::Link {
            link_type,
            dest_url,
            title,
            id,
        }) => vec![Event::Start(Tag::Link {
            link_type,
            dest_url: target(path, &dest_url).into(),
            title,
            id,
        })],
        Event::Start(Tag::Image {
            link_type,
            dest_url,
            title,
            id,
        }) => vec![Event::Start(Tag::Image {
            link_type,
            dest_url: target(path, &dest_url).into(),
            title,
            id,
        })],
        event => vec![event],
    }
}

/// Where a link of the page at `path` leads when the page is served.
fn target(path: &str, link: &str) -> String {
    if link.contains("://") || link.starts_with("mailto:") || link.starts_with('#') {
        return link.to_owned();
    }
    let (file, fragment) = match link.split_once('#') {
        Some((file, fragment)) => (file, Some(fragment)),
        None => (link, None),
    };
    let mut parts: Vec<&str> = path.split('/').collect();
    parts.pop();
    for part in file.split('/') {
        match part {
            "" | "." => {}
            ".." => {
                parts.pop();
            }
            part => parts.push(part),
        }
    }
    let mut link = link_to(address(&parts.join("/")));
    if let Some(fragment) = fragment {
        link.push('#');
        link.push_str(fragment);
    }
    link
}

fn link_to(address: &str) -> String {
    match address {
        "" => "/docs".to_owned(),
        address => format!("/docs/{address}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn links_lead_to_where_pages_are_served() {
        for (path, link, expected) in [
            ("README.md", "operate/nixos.md", "/docs/operate/nixos"),
            ("operate/nixos.md", "../README.md#a", "/docs#a"),
            ("operate/nixos.md", "systemd.md", "/docs/operate/systemd"),
            (
                "operate/nixos.md",
                "./systemd.md#b",
                "/docs/operate/systemd#b",
            ),
            ("operate/nixos.md", "#here", "#here"),
            (
                "operate/nixos.md",
                "https://atproto.com",
                "https://atproto.com",
            ),
        ] {
            assert_eq!(target(path, link), expected, "{path}: {link}");
        }
    }

    #[test]
    fn headings_get_the_anchors_of_their_text() {
        let html = body(
            "a.md",
            "# `account_inactive`\n\n## Hosts, and Quotas\n\n## Hosts and quotas\n",
        );
        for id in ["account_inactive", "hosts-and-quotas", "hosts-and-quotas-1"] {
            assert!(html.contains(&format!("id=\"{id}\"")), "{id}: {html}");
        }
    }

    #[test]
    fn html_does_not_pass_and_text_is_escaped() {
        let html = page(
            "a.md",
            "# A <b>\n\n<script>x</script>\n\na <i>b</i> & `<c>`\n",
            "# Summary\n",
        );
        assert!(
            !html.contains("<script>") && !html.contains("<i>"),
            "{html}"
        );
        assert!(html.contains("a b &amp; <code>&lt;c&gt;</code>"), "{html}");
        assert!(
            html.contains("<title>A &lt;b&gt; · atproto-relay</title>"),
            "{html}"
        );
    }

    #[test]
    fn the_page_itself_is_marked_in_the_contents() {
        let summary = "# Summary\n\n[M](README.md)\n\n- [A](a.md)\n";
        let html = page("a.md", "# A\n", summary);
        assert!(
            html.contains("<a aria-current=\"page\" href=\"/docs/a\">A</a>"),
            "{html}"
        );
        assert!(html.contains("<a href=\"/docs\">M</a>"), "{html}");
        assert!(!html.contains("Summary"), "{html}");
    }
}
