//! Pages for consumers, operators' tools and readers of the log, against the code: every admin route, every field of a host,
//! every example program and every field of an index entry is in its page, and every file that a page names is there.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

fn path(relative: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(relative)
}

fn read(relative: &str) -> String {
    fs::read_to_string(path(relative)).unwrap_or_else(|error| panic!("{relative}: {error}"))
}

/// The texts between `open` and the next `close`.
fn between<'a>(text: &'a str, open: &str, close: &str) -> Vec<&'a str> {
    let rests = text.split(open).skip(1);
    rests.filter_map(|rest| rest.split(close).next()).collect()
}

#[test]
fn the_admin_page_has_every_route_and_no_other() {
    let source = read("src/api/mod.rs");
    let routes: BTreeSet<String> = between(&source, ".route(", "))")
        .into_iter()
        .filter_map(|route| {
            let path = between(route, "\"", "\"")[0];
            let method = match route {
                _ if path.contains('{') || !path.starts_with("/admin/") => return None,
                _ if route.contains("posting(") => "POST",
                _ => "GET",
            };
            Some(format!("{method} {path}"))
        })
        .collect();
    assert!(routes.len() >= 12, "read from the router: {routes:?}");
    let page = read("docs/admin-api.md");
    let documented: BTreeSet<String> = page
        .lines()
        .filter_map(|line| line.strip_prefix("### "))
        .map(str::to_owned)
        .collect();
    assert_eq!(documented, routes);
    for route in &routes {
        let (_, path) = route.split_once(' ').unwrap();
        let call = format!("http://relay{path}");
        assert!(page.contains(&call), "docs/admin-api.md calls no {path}");
    }
}

#[test]
fn the_admin_page_has_every_field() {
    let source = read("src/api/admin.rs");
    let page = read("docs/admin-api.md");
    for field in between(&source, "#[serde(rename = \"", "\")]") {
        assert!(page.contains(&format!("\"{field}\":")), "no {field}");
    }
    for body in ["struct LimitChange {", "struct Consumer {"] {
        let fields = between(&source, body, "\n}")[0];
        for line in fields.lines().filter(|line| !line.trim().starts_with('#')) {
            let Some((field, _)) = line
                .trim()
                .trim_start_matches("pub(super) ")
                .split_once(':')
            else {
                continue;
            };
            let shown = [format!("`{field}`"), format!("\"{field}\":")];
            assert!(shown.iter().any(|it| page.contains(it)), "no {field}");
        }
    }
}

#[test]
fn the_pages_show_every_example_as_it_is() {
    let pages = ["docs/consume/examples.md", "docs/consume/verification.md"].map(read);
    let mut shown = 0;
    for entry in fs::read_dir(path("docs/consume/examples")).unwrap() {
        let file = entry.unwrap().path();
        let language = match file.extension().and_then(|it| it.to_str()) {
            Some("py") => "python",
            Some("rs") => "rust",
            Some(other) => other,
            None => continue,
        };
        let text = fs::read_to_string(&file).unwrap();
        let block = format!("```{language}\n{text}```");
        let in_page = pages.iter().any(|page| page.contains(&block));
        assert!(in_page, "no page shows {} as it is", file.display());
        shown += 1;
    }
    assert!(shown >= 5, "{shown} examples");
}

#[test]
fn the_page_of_the_log_has_every_field_of_an_index_entry() {
    let source = read("src/eventlog/entry.rs");
    let page = read("docs/design/event-log.md");
    let entries = between(&page, "Then for each event 64 bytes", "\n## ")[0];
    let encode = between(&source, "fn encode(&self) -> [u8; ENTRY_BYTES", "\n    }\n")[0];
    let fields = between(encode, "out[", "].copy_from_slice");
    let mut found = 0;
    for field in fields {
        let Some((start, end)) = field.split_once("..") else {
            continue;
        };
        let (Ok(start), Ok(end)) = (start.parse::<u64>(), end.parse::<u64>()) else {
            continue;
        };
        let row = format!("\n| {start} | {} | ", end - start);
        assert!(
            entries.contains(&row),
            "no field of {} bytes at {start}",
            end - start
        );
        found += 1;
    }
    assert!(found >= 8, "{found} fields read from the source");
    for start in between(&source, "_AT: usize = ", ";") {
        let row = format!("\n| {start} | ");
        assert!(entries.contains(&row), "nothing at {start}");
    }
}

/// Folders whose files pages name.
const FOLDERS: [&str; 9] = [
    "src/",
    "tests/",
    "docs/",
    "nixos/",
    "fuzz/",
    "benches/",
    "vm-tests/",
    "migrations/",
    "contrib/",
];

#[test]
fn every_file_that_a_page_names_is_there() {
    let mut pages = vec![
        path("CONTRIBUTING.md"),
        path("SECURITY.md"),
        path("CHANGELOG.md"),
    ];
    for folder in ["docs", "docs/consume", "docs/design", "docs/contributing"] {
        let files = fs::read_dir(path(folder)).unwrap();
        let files = files.map(|entry| entry.unwrap().path());
        pages.extend(files.filter(|file| file.extension().is_some_and(|it| it == "md")));
    }
    let mut named = 0;
    for page in pages {
        let text = fs::read_to_string(&page).unwrap();
        for name in text.split('`').skip(1).step_by(2) {
            let is_path = FOLDERS.iter().any(|folder| name.starts_with(folder));
            // `fuzz/run 600` is a command, `fuzz/seeds/TARGET/` a pattern.
            if !is_path || name.contains(' ') || name.chars().any(|c| c.is_ascii_uppercase()) {
                continue;
            }
            assert!(path(name).exists(), "{} names {name}", page.display());
            named += 1;
        }
    }
    assert!(named >= 20, "{named} files");
}
