//! What is written about the relay outside of it, for NixOS and for Prometheus, names what the relay really has: its
//! settings, its metrics, and their labels.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use crate::support::relay::metrics_of_a_new_relay;
use atproto_relay::config::{Setting, settings};
use serde_json::{Value, json};

/// Set, the test of the settings writes the module's list instead of comparing it.
const WRITE: &str = "WRITE_NIXOS_SETTINGS";

fn path(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("nixos")
        .join(name)
}

fn read(name: &str) -> String {
    fs::read_to_string(path(name)).unwrap_or_else(|error| panic!("nixos/{name}: {error}"))
}

#[test]
fn the_module_has_every_setting() {
    // A file with a secret is not a setting of the module, which passes secrets as credentials.
    let in_file = |s: &Setting| s.secret.is_some_and(|secret| secret.in_file);
    let rows: Vec<String> = settings()
        .iter()
        .filter(|s| !in_file(s))
        .map(|s| {
            let [key, placeholder, default, help] =
                [s.key, s.placeholder, s.default, s.help].map(|text| json!(text));
            format!(
                "  {{\"key\": {key}, \"placeholder\": {placeholder}, \"default\": {default}, \"help\": {help}, \"list\": {}, \"live\": {}}}",
                s.list, s.live
            )
        })
        .collect();
    let wanted = format!("[\n{}\n]\n", rows.join(",\n"));
    if std::env::var_os(WRITE).is_some() {
        fs::write(path("settings.json"), wanted).unwrap();
        return;
    }
    assert!(
        read("settings.json") == wanted,
        "nixos/settings.json is not the table of settings: {WRITE}=1 cargo test --locked --test it nixos writes it"
    );
}

/// A setting of a kind that the module does not know would fail every evaluation, and no evaluation runs here.
#[test]
fn the_module_has_a_type_for_every_setting() {
    let module = read("settings.nix");
    let entries = |table: &str| -> BTreeSet<String> {
        let inside = module.split_once(table).expect(table).1;
        let inside = inside.split_once("\n  };").expect("its end").0;
        let keys = inside.lines().filter_map(|line| line.split_once(" = "));
        keys.map(|(key, _)| key.trim().trim_matches('"').to_owned())
            .collect()
    };
    let (kinds, keys) = (entries("typeOf = {"), entries("typeOfKey = {"));
    assert!(kinds.len() > 10 && keys.len() > 3, "{kinds:?} {keys:?}");
    let untyped: Vec<&str> = settings()
        .iter()
        .filter(|s| !s.secret.is_some_and(|secret| secret.in_file))
        .filter(|s| !kinds.contains(s.placeholder) && !keys.contains(s.key))
        .map(|s| s.key)
        .collect();
    assert!(untyped.is_empty(), "nixos/settings.nix: {untyped:?}");
}

#[test]
fn the_lock_pins_what_the_flake_takes() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let flake = fs::read_to_string(root.join("flake.nix")).unwrap();
    let lock: Value =
        serde_json::from_str(&fs::read_to_string(root.join("flake.lock")).unwrap()).unwrap();
    let nodes = lock["nodes"].as_object().unwrap();
    assert_eq!(nodes.keys().collect::<Vec<_>>(), ["nixpkgs", "root"]);
    let text = |part: &str, key: &str| {
        lock["nodes"]["nixpkgs"][part][key]
            .as_str()
            .unwrap()
            .to_owned()
    };
    let [kind, owner, repo, branch] =
        ["type", "owner", "repo", "ref"].map(|key| text("original", key));
    let input = format!("inputs.nixpkgs.url = \"{kind}:{owner}/{repo}/{branch}\";");
    assert!(flake.contains(&input), "flake.nix has no {input}");
    assert_eq!(text("locked", "repo"), repo);
    assert_eq!(text("locked", "rev").len(), 40);
    assert!(text("locked", "narHash").starts_with("sha256-"));
}

#[test]
fn the_manual_has_the_configurations_that_are_rendered() {
    let page = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/operate/nixos.md");
    let page = fs::read_to_string(page).unwrap();
    for name in ["minimal", "appliance", "external-database"] {
        let text = read(&format!("rendering/configurations/{name}.nix"));
        // Without what the file says of itself at its beginning.
        let start = text.find("\n{\n").unwrap() + 1;
        let block = format!("```nix\n{}```\n", &text[start..]);
        assert!(
            page.contains(&block),
            "docs/operate/nixos.md lacks:\n{block}"
        );
    }
}

#[test]
fn every_alert_is_shown_firing_and_not_firing() {
    let tests = read("monitoring/rules.test.yml");
    let mut shown: BTreeMap<&str, [bool; 2]> = BTreeMap::new();
    let mut lines = tests.lines().peekable();
    while let Some(line) = lines.next() {
        if let Some(alert) = line.trim().strip_prefix("alertname: ") {
            let quiet = lines.peek().unwrap().trim() == "exp_alerts: []";
            shown.entry(alert).or_default()[usize::from(quiet)] = true;
        }
    }
    let rules = read("monitoring/rules.yml");
    let alerts: Vec<&str> = rules
        .lines()
        .filter_map(|line| line.trim().strip_prefix("- alert: "))
        .collect();
    assert!(alerts.len() > 20, "{alerts:?}");
    for alert in alerts {
        assert_eq!(shown.get(alert), Some(&[true, true]), "{alert}");
    }
}

/// The metrics of a relay that has just started: each name, with the values that each of its labels has.
async fn exported() -> BTreeMap<String, BTreeMap<String, BTreeSet<String>>> {
    let text = metrics_of_a_new_relay().await;

    let mut exported: BTreeMap<String, BTreeMap<String, BTreeSet<String>>> = BTreeMap::new();
    for line in text.lines() {
        if let Some(help) = line.strip_prefix("# HELP ") {
            exported
                .entry(help.split(' ').next().unwrap().to_owned())
                .or_default();
        }
        for (name, matchers) in selectors(line) {
            let values = exported.entry(name.to_owned()).or_default();
            for (label, value) in matchers {
                values
                    .entry(label.to_owned())
                    .or_default()
                    .insert(value.to_owned());
            }
        }
    }
    exported
}

/// The metrics of the relay that a text names, each with the labels that stand in braces behind it.
fn selectors(text: &str) -> Vec<(&str, Vec<(&str, &str)>)> {
    let is_word = |c: char| c.is_ascii_alphanumeric() || c == '_';
    let mut found = Vec::new();
    for (start, _) in text
        .match_indices("relay_")
        .chain(text.match_indices("process_"))
    {
        if text[..start].ends_with(is_word) {
            continue;
        }
        let rest = &text[start..];
        let end = rest.find(|c| !is_word(c)).unwrap_or(rest.len());
        let (name, rest) = rest.split_at(end);
        let inside = rest
            .strip_prefix('{')
            .and_then(|rest| rest.split_once('}'))
            .map_or("", |(inside, _)| inside);
        let matchers = inside
            .split("\",")
            .filter_map(|matcher| matcher.split_once('"'))
            .map(|(label, value)| {
                (
                    label.trim_end_matches(['=', '~', '!']).trim(),
                    value.trim_end_matches('"'),
                )
            });
        found.push((name, matchers.collect()));
    }
    found
}

/// Every query of a dashboard.
fn queries(value: &Value, found: &mut Vec<String>) {
    match value {
        Value::Object(object) => {
            if let Some(Value::String(query)) = object.get("expr") {
                found.push(query.clone());
            }
            object.values().for_each(|value| queries(value, found));
        }
        Value::Array(values) => values.iter().for_each(|value| queries(value, found)),
        _ => {}
    }
}

#[tokio::test]
async fn alerts_and_dashboard_name_metrics_that_the_relay_exports() {
    let exported = exported().await;
    let rules = read("monitoring/rules.yml");
    let mut texts: Vec<String> = rules
        .lines()
        .filter_map(|line| line.trim().strip_prefix("expr: "))
        .map(str::to_owned)
        .collect();
    let dashboard = read("expected/appliance/grafana/dashboard.json");
    queries(&serde_json::from_str(&dashboard).unwrap(), &mut texts);
    assert!(texts.len() > 90, "{} queries", texts.len());

    let mut wrong = BTreeSet::new();
    for text in &texts {
        for (name, matchers) in selectors(text) {
            let histogram = ["_bucket", "_sum", "_count"]
                .iter()
                .find_map(|suffix| name.strip_suffix(suffix));
            let Some(labels) = exported
                .get(name)
                .or_else(|| histogram.and_then(|name| exported.get(name)))
            else {
                wrong.insert(format!("{name} is not exported"));
                continue;
            };
            for (label, value) in matchers {
                // These come from Prometheus.
                if ["job", "instance"].contains(&label) {
                    continue;
                }
                for value in value.split('|') {
                    if !labels
                        .get(label)
                        .is_some_and(|values| values.contains(value))
                    {
                        wrong.insert(format!("{name} has no {label}=\"{value}\""));
                    }
                }
            }
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}

#[tokio::test]
async fn the_dashboard_shows_every_metric_of_the_relay() {
    let dashboard = read("expected/appliance/grafana/dashboard.json");
    let mut texts = Vec::new();
    queries(&serde_json::from_str(&dashboard).unwrap(), &mut texts);
    let shown: BTreeSet<String> = texts
        .iter()
        .flat_map(|text| selectors(text))
        .map(|(name, _)| name.trim_end_matches("_bucket").to_owned())
        .collect();
    let hidden: Vec<String> = exported()
        .await
        .into_keys()
        .filter(|name| name.starts_with("relay_"))
        .filter(|name| {
            let series = ["_bucket", "_sum", "_count"]
                .iter()
                .find_map(|suffix| name.strip_suffix(suffix));
            !shown.contains(series.unwrap_or(name))
        })
        .collect();
    assert!(hidden.is_empty(), "{hidden:#?}");
}
