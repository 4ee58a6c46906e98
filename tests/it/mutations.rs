//! The table of mutations fits the tree: each can be made, the test that is to catch it exists, and no rule is without
//! one. What the tests make of the mutations is found out by `tests/mutations/run`.

use std::collections::HashSet;
use std::fs;
use std::path::{Path, PathBuf};

use atproto_relay::hosts::Rule;
use serde::Deserialize;

const AREAS: [&str; 12] = [
    "verification",
    "upstream",
    "look-ups",
    "budgets",
    "log",
    "redaction",
    "recovery",
    "store",
    "reads",
    "firehose",
    "admission",
    "listeners",
];

#[derive(Deserialize)]
struct Table {
    mutation: Vec<Mutation>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Mutation {
    name: String,
    rule: String,
    area: String,
    #[serde(default)]
    drops: Vec<String>,
    file: String,
    find: String,
    within: Option<String>,
    replace: String,
    form: Option<String>,
    test: String,
}

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn read(file: &str) -> String {
    fs::read_to_string(root().join(file)).unwrap_or_else(|error| panic!("{file}: {error}"))
}

fn table() -> Vec<Mutation> {
    let table: Table = toml::from_str(&read("tests/mutations/table.toml")).unwrap();
    table.mutation
}

impl Mutation {
    /// Where what it replaces stands in its file.
    fn place(&self) -> (usize, usize) {
        let text = read(&self.file);
        let outer = self.within.as_ref().unwrap_or(&self.find);
        let at = |text: &str, part: &str| {
            let found: Vec<usize> = text.match_indices(part).map(|(at, _)| at).collect();
            let name = &self.name;
            assert_eq!(
                found.len(),
                1,
                "{name}: {part:?} must stand once in {}",
                self.file
            );
            found[0]
        };
        let start = at(&text, outer) + at(outer, &self.find);
        (start, start + self.find.len())
    }

    /// The file of its test.
    fn test_file(&self) -> PathBuf {
        let (module, path) = self.test.split_once("::").expect("module::test");
        if module != "lib" {
            let own = format!("tests/{module}.rs");
            let shared = format!("tests/it/{module}.rs");
            return if root().join(&own).is_file() {
                own
            } else {
                shared
            }
            .into();
        }
        let modules: Vec<&str> = path.split("::").collect();
        let files = (1..modules.len()).rev().flat_map(|depth| {
            let place = format!("src/{}", modules[..depth].join("/"));
            [format!("{place}.rs"), format!("{place}/mod.rs")]
        });
        let mut files = files.filter(|file| root().join(file).is_file());
        files.next().expect("the file of a unit test").into()
    }
}

#[test]
fn every_mutation_can_be_made() {
    let mut names = HashSet::new();
    let mut places: Vec<(String, (usize, usize), String)> = Vec::new();
    for mutation in table() {
        let name = &mutation.name;
        assert!(names.insert(name.clone()), "{name} stands there twice");
        let kebab = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-';
        assert!(name.bytes().all(kebab), "{name}");
        assert!(AREAS.contains(&mutation.area.as_str()), "{name}: area");
        let form = mutation.form.as_deref().unwrap_or("expression");
        assert!(["expression", "statement"].contains(&form), "{name}: form");
        assert!(mutation.rule.ends_with('.'), "{name}: a rule is a sentence");
        assert!(mutation.find != mutation.replace, "{name} changes nothing");
        places.push((mutation.file.clone(), mutation.place(), name.clone()));
    }
    places.sort();
    for pair in places.windows(2) {
        let ((file, (_, end), one), (other_file, (start, _), other)) = (&pair[0], &pair[1]);
        assert!(file != other_file || end <= start, "{one} overlaps {other}");
    }
}

#[test]
fn every_test_exists() {
    for mutation in table() {
        let file = mutation.test_file();
        let text = read(file.to_str().unwrap());
        let (_, function) = mutation.test.rsplit_once("::").unwrap();
        let found = text.contains(&format!("fn {function}("));
        assert!(found, "{}: no {function} in {file:?}", mutation.name);
    }
}

/// The rules under which an event is dropped, by their names in metrics.
#[test]
fn no_rule_is_without_a_mutation() {
    let rules: HashSet<String> = Rule::ALL
        .iter()
        .map(|rule| rule.name().to_owned())
        .collect();
    let mutated: HashSet<String> = table().into_iter().flat_map(|it| it.drops).collect();
    let missing: Vec<_> = rules.difference(&mutated).collect();
    assert!(missing.is_empty(), "rules without a mutation: {missing:?}");
    let unknown: Vec<_> = mutated.difference(&rules).collect();
    assert!(unknown.is_empty(), "there are no such rules: {unknown:?}");
}
