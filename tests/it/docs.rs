//! The manual and the README against the code: generated pages, links, commands, alerts, and what `/docs` serves.

mod commands;
mod generated;
mod links;
mod served;

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use atproto_relay::hosts::Rule;
use atproto_relay::telemetry::ProblemName;
use pulldown_cmark::{Event, Options, Parser, Tag, TagEnd};

/// Most lines of the README.
const README_LINES: usize = 120;

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn read(path: &str) -> String {
    fs::read_to_string(root().join(path)).unwrap_or_else(|error| panic!("{path}: {error}"))
}

/// Every Markdown file below a folder, by its path from the top of the repository.
fn markdown_below(folder: &str) -> Vec<String> {
    let mut found = Vec::new();
    let mut folders = vec![PathBuf::from(folder)];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(root().join(&folder)).unwrap() {
            let entry = entry.unwrap();
            let path = folder.join(entry.file_name());
            if entry.file_type().unwrap().is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|it| it == "md") {
                found.push(path.to_str().unwrap().to_owned());
            }
        }
    }
    found.sort();
    found
}

/// The manual, and the Markdown files at the top of the repository.
fn documents() -> Vec<String> {
    let mut documents = markdown_below("docs");
    for entry in fs::read_dir(root()).unwrap() {
        let name = entry.unwrap().file_name().into_string().unwrap();
        if name.ends_with(".md") {
            documents.push(name);
        }
    }
    documents
}

fn events(text: &str) -> impl Iterator<Item = Event<'_>> {
    Parser::new_ext(text, Options::ENABLE_TABLES)
}

/// The anchors of a page's headings, as GitHub makes them.
fn anchors(text: &str) -> BTreeSet<String> {
    let mut anchors = BTreeSet::new();
    let mut heading: Option<String> = None;
    for event in events(text) {
        match event {
            Event::Start(Tag::Heading { .. }) => heading = Some(String::new()),
            Event::Text(text) | Event::Code(text) => {
                if let Some(heading) = &mut heading {
                    heading.push_str(&text);
                }
            }
            Event::End(TagEnd::Heading(_)) => {
                let text = heading.take().unwrap().to_lowercase().replace(' ', "-");
                let kept = |c: &char| c.is_alphanumeric() || "-_".contains(*c);
                let name: String = text.chars().filter(kept).collect();
                let numbered = (1..).map(|number| format!("{name}-{number}"));
                let free = std::iter::once(name.clone())
                    .chain(numbered)
                    .find(|name| !anchors.contains(name));
                anchors.insert(free.unwrap());
            }
            _ => {}
        }
    }
    anchors
}

/// Name and fields of each alert, in the order of the rules.
fn alerts() -> Vec<Vec<(String, String)>> {
    let rules = read("nixos/monitoring/rules.yml");
    let mut alerts: Vec<Vec<(String, String)>> = Vec::new();
    for line in rules.lines() {
        let line = line.trim();
        if line.starts_with("- alert: ") {
            alerts.push(Vec::new());
        }
        let field = line.trim_start_matches("- ").split_once(": ");
        if let (Some((key, value)), Some(alert)) = (field, alerts.last_mut()) {
            let value = value.trim().trim_matches('"');
            alert.push((key.to_owned(), value.to_owned()));
        }
    }
    alerts.retain(|alert| alert[0].0 == "alert");
    alerts
}

fn field<'a>(alert: &'a [(String, String)], key: &str) -> &'a str {
    let found = alert.iter().find(|(name, _)| name == key);
    found.map_or("", |(_, value)| value)
}

#[test]
fn the_readme_fits_on_a_page_and_counts_right() {
    let readme = read("README.md");
    let lines = readme.lines().count();
    assert!(lines <= README_LINES, "README.md has {lines} lines");
    for count in [
        format!("{} rules", Rule::ALL.len()),
        format!("{} alerts", alerts().len()),
        format!("{} named problems", ProblemName::ALL.len()),
    ] {
        assert!(readme.contains(&count), "README.md lacks {count:?}");
    }
}

#[test]
fn every_alert_and_every_problem_has_its_place_in_the_runbook() {
    let anchors = anchors(&read("docs/operate/monitoring.md"));
    let alerts = alerts();
    assert!(alerts.len() > 20, "{alerts:?}");
    let names = alerts
        .iter()
        .map(|alert| field(alert, "alert").to_lowercase());
    let problems = ProblemName::ALL.map(|name| name.as_str().to_owned());
    let missing: Vec<String> = names
        .chain(problems)
        .filter(|name| !anchors.contains(name))
        .collect();
    assert!(
        missing.is_empty(),
        "docs/operate/monitoring.md lacks {missing:?}"
    );
}

#[test]
fn the_table_of_contents_lists_every_page_once() {
    let summary = read("docs/SUMMARY.md");
    let mut listed: Vec<String> = links::of(&summary)
        .into_iter()
        .map(|link| format!("docs/{link}"))
        .collect();
    listed.sort();
    let mut pages = markdown_below("docs");
    pages.retain(|page| page != "docs/SUMMARY.md");
    assert_eq!(listed, pages);
}
