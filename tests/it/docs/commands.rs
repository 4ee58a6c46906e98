//! Every command of a document is one that the programs take.

use std::collections::BTreeMap;
use std::process::Command;

use pulldown_cmark::{CodeBlockKind, Event, Tag, TagEnd};

use super::{documents, events, read, root};

/// Languages of the blocks that hold commands.
const SHELLS: [&str; 3] = ["sh", "console", "bash"];

/// The commands of a document, one a line, without prompts and with continued lines joined.
fn commands(text: &str) -> Vec<String> {
    let mut commands = Vec::new();
    let mut language = None;
    for event in events(text) {
        match event {
            Event::Start(Tag::CodeBlock(CodeBlockKind::Fenced(info))) => {
                let word = info.split([' ', ',']).next().unwrap_or_default().to_owned();
                language = SHELLS.contains(&word.as_str()).then_some(word);
            }
            Event::End(TagEnd::CodeBlock) => language = None,
            Event::Text(code) => {
                let Some(language) = &language else { continue };
                let code = code.replace("\\\n", " ");
                for line in code.lines() {
                    let command = line.trim_start();
                    match (command.strip_prefix("$ "), language.as_str()) {
                        (Some(command), _) => commands.push(command.to_owned()),
                        // What the command prints.
                        (None, "console") => {}
                        (None, _) => commands.push(command.to_owned()),
                    }
                }
            }
            _ => {}
        }
    }
    commands
}

/// The words of each simple command of a line: without variables before it and what it is piped to.
fn simple_commands(line: &str) -> Vec<Vec<String>> {
    let line = line.split(" #").next().unwrap_or_default();
    line.split(['|', ';', '&'])
        .map(|part| {
            let words = part
                .split_whitespace()
                .map(|word| word.trim_matches(['\'', '"', '(', ')', '$']).to_owned());
            let is_assignment = |word: &String| {
                word.split_once('=').is_some_and(|(name, _)| {
                    name.chars()
                        .all(|c| c.is_ascii_uppercase() || c.is_ascii_digit() || c == '_')
                })
            };
            words
                .skip_while(|word| is_assignment(word) || word == "sudo" || word == "exec")
                .take_while(|word| !word.starts_with(['>', '<']))
                .collect()
        })
        .filter(|words: &Vec<String>| !words.is_empty())
        .collect()
}

/// The help of the programs, asked once.
#[derive(Default)]
struct Helps(BTreeMap<Vec<String>, String>);

impl Helps {
    fn of(&mut self, path: &[String]) -> &str {
        self.0.entry(path.to_vec()).or_insert_with(|| {
            let program = match path[0].as_str() {
                "atproto-relay" => env!("CARGO_BIN_EXE_atproto-relay"),
                _ => env!("CARGO_BIN_EXE_atproto-devnet"),
            };
            let output = Command::new(program)
                .args(&path[1..])
                .arg("--help")
                .output()
                .unwrap();
            String::from_utf8(output.stdout).unwrap()
        })
    }

    /// Whether the help of a command lists this command below it.
    fn lists(&mut self, path: &[String], word: &str) -> bool {
        let help = self.of(path);
        let commands = help.split_once("Commands:").map_or("", |(_, rest)| rest);
        let commands = commands.split("\n\n").next().unwrap_or_default();
        let names = commands
            .lines()
            .filter_map(|line| line.split_whitespace().next());
        names.into_iter().any(|name| name == word)
    }

    /// What is wrong with a command of one of the two programs.
    fn complaint(&mut self, words: &[String]) -> Option<String> {
        let mut path = vec![words[0].clone()];
        let mut rest = &words[1..];
        while let Some(word) = rest.first()
            && self.lists(&path, word)
        {
            path.push(word.clone());
            rest = &rest[1..];
        }
        let has_commands = self.of(&path).contains("\nCommands:");
        if has_commands && rest.first().is_some_and(|word| !word.starts_with('-')) {
            return Some(format!("{} has no command {}", path.join(" "), rest[0]));
        }
        let help = self.of(&path);
        let flags = rest.iter().filter(|word| word.starts_with("--"));
        let unknown = flags
            .map(|word| word.split('=').next().unwrap())
            .filter(|flag| !["--", "--help", "--version"].contains(flag))
            .find(|flag| {
                let is_it = |(at, _): (usize, &str)| {
                    let next = help[at + flag.len()..].chars().next();
                    !next.is_some_and(|c| c.is_ascii_alphanumeric() || c == '-')
                };
                !help.match_indices(*flag).any(is_it)
            });
        unknown.map(|flag| format!("{} has no {flag}", path.join(" ")))
    }
}

/// What is wrong with a command of cargo, and the program that it runs.
fn cargo(words: &[String]) -> Result<Option<Vec<String>>, String> {
    let manifest: toml::Table = read("Cargo.toml").parse().unwrap();
    let names = |kind: &str| -> Vec<String> {
        let targets = manifest[kind].as_array().unwrap();
        let names = targets.iter().map(|it| it["name"].as_str().unwrap());
        names.map(str::to_owned).collect()
    };
    let separator = words.iter().position(|word| word == "--");
    let own = &words[..separator.unwrap_or(words.len())];
    let mut program = None;
    for pair in own.windows(2) {
        let (known, value) = match pair[0].as_str() {
            "--bin" => (names("bin"), &pair[1]),
            "--test" => (names("test"), &pair[1]),
            "--bench" => (names("bench"), &pair[1]),
            "--profile" => {
                let profiles = manifest["profile"].as_table().unwrap();
                (profiles.keys().cloned().collect(), &pair[1])
            }
            _ => continue,
        };
        if !known.contains(value) {
            return Err(format!("there is no {} {value}", pair[0]));
        }
        if pair[0] == "--bin" {
            program = Some(value.clone());
        }
    }
    // Without a program it is the reader's own package that runs.
    let (Some(program), Some("run")) = (program, own.get(1).map(String::as_str)) else {
        return Ok(None);
    };
    let arguments = separator.map_or(&[][..], |at| &words[at + 1..]);
    Ok(Some([&[program], arguments].concat()))
}

#[test]
fn every_command_is_one_that_the_programs_take() {
    let mut helps = Helps::default();
    let mut wrong = Vec::new();
    let mut checked = 0;
    for document in documents() {
        for line in commands(&read(&document)) {
            for words in simple_commands(&line) {
                let name = words[0].rsplit('/').next().unwrap();
                let complaint = match name {
                    "atproto-relay" | "atproto-devnet" => {
                        let named = [&[name.to_owned()], &words[1..]].concat();
                        helps.complaint(&named)
                    }
                    "cargo" => match cargo(&words) {
                        Ok(None) => None,
                        Ok(Some(run)) => helps.complaint(&run),
                        Err(complaint) => Some(complaint),
                    },
                    // A script of the repository.
                    _ if words[0].contains('/') && !words[0].starts_with('/') => {
                        let exists = root().join(&words[0]).exists();
                        (!exists).then(|| "there is no such script".to_owned())
                    }
                    _ => continue,
                };
                checked += 1;
                if let Some(complaint) = complaint {
                    wrong.push(format!("{document}: {line}: {complaint}"));
                }
            }
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
    assert!(checked >= 10, "{checked} commands were checked");
}

#[test]
fn wrong_commands_are_noticed() {
    let mut helps = Helps::default();
    for (line, complaint) in [
        ("atproto-relay serve --host pds.example.com", None),
        (
            "A=b sudo target/release/atproto-relay log info --json | jq .",
            None,
        ),
        (
            "atproto-relay serve --hosts x",
            Some("atproto-relay serve has no --hosts"),
        ),
        (
            "atproto-relay log infos",
            Some("atproto-relay log has no command infos"),
        ),
        (
            "atproto-devnet demos",
            Some("atproto-devnet has no command demos"),
        ),
    ] {
        let words = &simple_commands(line)[0];
        let name = words[0].rsplit('/').next().unwrap().to_owned();
        let found = helps.complaint(&[&[name], &words[1..]].concat());
        assert_eq!(found.as_deref(), complaint, "{line}");
    }
    let words = |line: &str| simple_commands(line).remove(0);
    assert!(cargo(&words("cargo test --test its")).is_err());
    let run = cargo(&words("cargo run --release --bin atproto-devnet -- demo"));
    assert_eq!(run.unwrap().unwrap(), ["atproto-devnet", "demo"]);
}
