//! The reference pages are made from the code. `WRITE_DOCS=1 cargo test --locked --test it docs::generated` writes them.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write;
use std::fs;
use std::process::Command;

use crate::support::relay::metrics_of_a_new_relay;
use atproto_relay::config::{Group, Setting, settings};
use atproto_relay::hosts::Rule;

use super::{alerts, field, root};

/// Set, the tests write the pages instead of comparing them.
const WRITE: &str = "WRITE_DOCS";
fn compare(page: &str, text: &str) {
    let note = format!(
        "<!-- Made from the code: {WRITE}=1 cargo test --locked --test it docs::generated writes this page. -->\n"
    );
    let (title, rest) = text.split_once('\n').unwrap();
    let wanted = format!("{title}\n\n{note}{rest}");
    let path = root().join("docs/reference").join(page);
    if std::env::var_os(WRITE).is_some() {
        fs::write(path, wanted).unwrap();
        return;
    }
    let found = fs::read_to_string(&path).unwrap_or_default();
    let differs = found
        .lines()
        .zip(wanted.lines())
        .find(|(found, wanted)| found != wanted);
    assert!(
        found == wanted,
        "docs/reference/{page} is not what the code says, first at {differs:?}: {WRITE}=1 cargo test --locked \
         --test it docs::generated writes it"
    );
}

/// Text in a cell of a table.
fn cell(text: &str) -> String {
    text.replace('|', "\\|")
}

#[test]
fn settings_page() {
    let mut page = String::from(
        "# Settings\n\nEvery setting is a key of the configuration file, a flag and an environment variable. \
         [Configuration](../operate/configuration.md) says how they are combined. *reload*: `systemctl reload` or SIGHUP \
         applies the setting; *restart*: it waits for a restart.\n",
    );
    let all = settings();
    let mut groups: Vec<Group> = all.iter().map(|setting| setting.group).collect();
    groups.dedup();
    let distinct: BTreeSet<Group> = groups.iter().copied().collect();
    for group in distinct {
        writeln!(page, "\n## {}\n", group.heading()).unwrap();
        page += "| key | default | meaning | flag | environment | applied by |\n|---|---|---|---|---|---|\n";
        for setting in all.iter().filter(|setting| setting.group == group) {
            writeln!(
                page,
                "| `{}` | {} | {} | `--{}` | `{}` | {} |",
                setting.key,
                cell(setting.default),
                cell(setting.help),
                setting.flag,
                setting.variables[0].name(),
                if setting.live { "reload" } else { "restart" },
            )
            .unwrap();
        }
    }
    let keys = |chosen: fn(&&Setting) -> bool| -> String {
        let keys = all.iter().filter(chosen).map(|it| format!("`{}`", it.key));
        keys.collect::<Vec<_>>().join(", ")
    };
    writeln!(
        page,
        "\n## Settings that need a restart\n\n{}.",
        keys(|setting| !setting.live)
    )
    .unwrap();
    page += "\n## Other names of environment variables\n\nMost are the names that the reference relay has for the same \
             setting.\n\n| variable | setting |\n|---|---|\n";
    for setting in all {
        for variable in &setting.variables[1..] {
            writeln!(page, "| `{}` | `{}` |", variable.name(), setting.key).unwrap();
        }
    }
    compare("settings.md", &page);
}

#[test]
fn drop_rules_page() {
    let mut page = String::from(
        "# Drop rules\n\nThe relay drops an event that breaks a rule, and counts it in \
         `relay_events_dropped_total{rule=\"…\"}`. The rules are listed in the order in which they are applied. A dropped event \
         does not come back: the next commit that is accepted, or a `#sync`, brings the account up to date.\n\n\
         [Hosts and quotas](../operate/hosts-and-quotas.md#find-a-host-that-misbehaves) says how the operator finds the host.\n",
    );
    for rule in Rule::ALL {
        let meaning = rule.meaning();
        writeln!(
            page,
            "\n## {rule}\n\n{}\n\n**PDS owner:** {}",
            meaning.wrong, meaning.remedy
        )
        .unwrap();
    }
    compare("drop-rules.md", &page);
}

#[test]
fn alerts_page() {
    let mut page = String::from(
        "# Alerts\n\nThe rules of `nixos/monitoring/rules.yml`, for any Prometheus. Each name leads to what to do.\n\n\
         | alert | severity | after | summary |\n|---|---|---|---|\n",
    );
    let mut expressions = String::new();
    for alert in alerts() {
        let name = field(&alert, "alert");
        let severity = field(&alert, "labels")
            .trim_start_matches("{severity: ")
            .trim_end_matches('}');
        let after = match field(&alert, "for") {
            "" => "at once",
            time => time,
        };
        let link = format!("[{name}](../operate/monitoring.md#{})", name.to_lowercase());
        let summary = cell(field(&alert, "summary"));
        writeln!(page, "| {link} | {severity} | {after} | {summary} |").unwrap();
        let expression = field(&alert, "expr").replace("\\\"", "\"");
        writeln!(expressions, "\n### {name}\n\n```\n{expression}\n```").unwrap();
    }
    writeln!(page, "\n## Expressions\n{expressions}").unwrap();
    compare("alerts.md", page.trim_end_matches('\n').to_owned().as_str());
}

/// What a relay says of one metric.
#[derive(Default)]
struct Family {
    help: String,
    kind: String,
    labels: BTreeMap<String, BTreeSet<String>>,
}

fn families(text: &str) -> BTreeMap<String, Family> {
    let mut families: BTreeMap<String, Family> = BTreeMap::new();
    for line in text.lines() {
        if let Some((name, help)) = line
            .strip_prefix("# HELP ")
            .and_then(|line| line.split_once(' '))
        {
            families.entry(name.into()).or_default().help = help.into();
        } else if let Some((name, kind)) = line
            .strip_prefix("# TYPE ")
            .and_then(|line| line.split_once(' '))
        {
            families.entry(name.into()).or_default().kind = kind.into();
        } else if let Some((name, rest)) = line.split_once('{') {
            let base = ["_bucket", "_sum", "_count"]
                .iter()
                .find_map(|suffix| name.strip_suffix(suffix))
                .filter(|base| families.contains_key(*base))
                .unwrap_or(name);
            let labels = &mut families.get_mut(base).expect("HELP comes first").labels;
            let inside = rest.rsplit_once('}').expect("closed").0;
            for (label, value) in inside.split(',').filter_map(|it| it.split_once('=')) {
                let values = labels.entry(label.into()).or_default();
                values.insert(value.trim_matches('"').into());
            }
        }
    }
    families
}

async fn exported() -> BTreeMap<String, Family> {
    let text = metrics_of_a_new_relay().await;
    families(&text)
}

#[tokio::test]
async fn metrics_page() {
    let exported = exported().await;
    let mut page = String::from(
        "# Metrics\n\nThe relay answers `GET /metrics` on its metrics listener (127.0.0.1:2471), in the text format of \
         Prometheus. The values of every label are known in advance: no label names a host, an account or an address.\n",
    );
    for (heading, prefix) in [("The relay", "relay_"), ("The process", "process_")] {
        writeln!(page, "\n## {heading}\n").unwrap();
        page += "| metric | type | meaning | labels |\n|---|---|---|---|\n";
        for (name, family) in exported.iter().filter(|(name, _)| name.starts_with(prefix)) {
            let labels: Vec<String> = family
                .labels
                .iter()
                .filter(|(label, _)| *label != "le")
                .map(|(label, values)| match label.as_str() {
                    "rule" => "`rule`: see [Drop rules](drop-rules.md)".into(),
                    "shard" => "`shard`: 0, 1, …".into(),
                    "version" => "`version`".into(),
                    label => {
                        let values: Vec<&str> = values.iter().map(String::as_str).collect();
                        format!("`{label}`: {}", values.join(", "))
                    }
                })
                .collect();
            writeln!(
                page,
                "| `{name}` | {} | {} | {} |",
                family.kind,
                cell(&family.help),
                labels.join("; ")
            )
            .unwrap();
        }
    }
    compare("metrics.md", &page);

    let explained: BTreeSet<String> = Rule::ALL.iter().map(Rule::to_string).collect();
    let counted = &exported["relay_events_dropped_total"].labels["rule"];
    assert_eq!(
        counted, &explained,
        "every rule that is counted is explained"
    );
}

/// An exit code: the program, its code, when, and a command that shows it.
const EXITS: [(&str, i32, &str, &str); 8] = [
    (
        "atproto-relay",
        0,
        "Done, or stopped by SIGTERM or SIGINT; also when the reader of the output has gone (`| head`)",
        "check-config",
    ),
    (
        "atproto-relay",
        1,
        "It could not start, or it failed. The reason is one line on standard error",
        "log info --data-dir /nonexistent",
    ),
    (
        "atproto-relay",
        1,
        "`firehose`: the stream could not be read; with `--verify`, an event was not valid or none could be checked",
        "firehose http://127.0.0.1:1",
    ),
    (
        "atproto-relay",
        1,
        "`log verify`: the log has problems",
        "log verify --data-dir /nonexistent",
    ),
    (
        "atproto-relay",
        2,
        "The command line is wrong",
        "serve --no-such-flag",
    ),
    (
        "atproto-relay",
        2,
        "The configuration is wrong",
        "check-config --replay-window 72",
    ),
    (
        "atproto-devnet",
        2,
        "The command line is wrong",
        "no-such-command",
    ),
    ("atproto-devnet", 0, "Done", "--version"),
];

#[test]
fn exit_codes_page() {
    let mut page = String::from("# Exit codes\n");
    for program in ["atproto-relay", "atproto-devnet"] {
        writeln!(page, "\n## {program}\n").unwrap();
        page += "| code | when | example |\n|---|---|---|\n";
        for (of, code, when, arguments) in EXITS {
            if of != program {
                continue;
            }
            let binary = match program {
                "atproto-relay" => env!("CARGO_BIN_EXE_atproto-relay"),
                _ => env!("CARGO_BIN_EXE_atproto-devnet"),
            };
            let output = Command::new(binary)
                .args(arguments.split(' '))
                .output()
                .unwrap();
            let said = String::from_utf8_lossy(&output.stderr);
            assert_eq!(
                output.status.code(),
                Some(code),
                "{program} {arguments}: {said}"
            );
            let when = cell(when);
            writeln!(page, "| {code} | {when} | `{program} {arguments}` |").unwrap();
        }
        if program == "atproto-relay" {
            page += "| 130 | `serve`: a second signal stopped it at once; the next start reads the rest from the log | |\n";
        }
    }
    compare("exit-codes.md", &page);
}
