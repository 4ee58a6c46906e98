//! The demo's header: where everything is, one URL a line, and commands that work as they are pasted.

use std::path::{Path, PathBuf};

use atproto_relay::devnet::network::Network;

use super::ADMIN_PASSWORD;
use super::screen::{Line, Style};

/// The relay's binary, in the folder of this one.
const RELAY: &str = "atproto-relay";
/// What cargo sets for the programs it runs.
const CARGO: &str = "CARGO_MANIFEST_DIR";
/// Columns of a header that no terminal shows.
pub const PLAIN_COLUMNS: usize = 110;

/// Where everything is.
#[derive(Clone, Debug)]
pub struct Guide {
    /// What is shown: accounts, PDSes, rate.
    pub title: String,
    /// `host:port` of the relay.
    pub relay: String,
    /// Why it is not at the usual port.
    pub other_port: Option<String>,
    pub metrics: String,
    pub plc: String,
    /// Name and URL of each PDS.
    pub pdses: Vec<(String, String)>,
    pub data: PathBuf,
    /// The words that start the relay's binary.
    pub command: Vec<String>,
    pub keys: bool,
}

impl Guide {
    /// Name and URL of each PDS of a network.
    pub fn pdses(network: &Network) -> Vec<(String, String)> {
        let pdses = network.all_pds().iter();
        pdses
            .map(|pds| (pds.domain().to_owned(), pds.url()))
            .collect()
    }

    /// Everything.
    pub fn full(&self, columns: usize) -> Vec<Line> {
        let mut lines = vec![self.title(), empty()];
        lines.extend(self.places());
        lines.push(empty());
        lines.push(Line::new(Style::Dim, "Try in another terminal:"));
        for words in self.commands() {
            lines.extend(folded(&words, columns));
        }
        lines.push(empty());
        lines.extend(self.legend());
        lines.push(rule(columns));
        lines
    }

    /// What matters most, for terminals with few rows.
    pub fn short(&self, columns: usize) -> Vec<Line> {
        let mut lines = vec![self.title(), self.places().swap_remove(1)];
        lines.extend(folded(&self.commands()[0], columns));
        lines.extend(self.legend());
        lines.push(rule(columns));
        lines
    }

    fn title(&self) -> Line {
        Line::new(Style::Bold, &*self.title)
    }

    fn places(&self) -> Vec<Line> {
        let relay = &self.relay;
        let other_port = match &self.other_port {
            Some(reason) => format!("   ({reason})"),
            None => String::new(),
        };
        let mut places = vec![
            ("relay", format!("http://{relay}/{other_port}")),
            (
                "firehose",
                format!("ws://{relay}/xrpc/com.atproto.sync.subscribeRepos"),
            ),
            ("metrics", self.metrics.clone()),
            (
                "admin API",
                format!("http://{relay}/admin/pds/list   (user admin, password {ADMIN_PASSWORD})"),
            ),
            ("PLC directory", self.plc.clone()),
        ];
        places.extend(self.pdses.iter().map(|(name, url)| (&**name, url.clone())));
        places.push((
            "data",
            format!("{}   (removed at the end)", self.data.display()),
        ));
        let line = |(name, place)| Line::new(Style::Normal, format!("  {name:<14} {place}"));
        places.into_iter().map(line).collect()
    }

    /// Each as its words.
    fn commands(&self) -> [Vec<String>; 3] {
        let Guide { relay, plc, .. } = self;
        let words = |text: String| text.split(' ').map(str::to_owned).collect::<Vec<_>>();
        let firehose = |arguments: String| {
            let own = self.command.iter().cloned();
            own.chain(words(format!("firehose ws://{relay} {arguments}")))
                .collect()
        };
        [
            firehose(format!("--verify --plc-host {plc}")),
            firehose("--cursor 0 --json --collection app.bsky.feed.post".to_owned()),
            words(format!(
                "curl -u admin:{ADMIN_PASSWORD} http://{relay}/admin/pds/list"
            )),
        ]
    }

    fn legend(&self) -> Vec<Line> {
        let mut lines = vec![
            Line::new(
                Style::Good,
                "✓ forwarded: signature, proof and order are verified, the event is on disk and has its number",
            ),
            Line::new(
                Style::Normal,
                "! wrong on purpose   ✗ refused, by the rule that is named   ~ forwarded, but its account's chain is broken",
            ),
        ];
        lines.extend(self.keys.then(|| {
            Line::new(
                Style::Bold,
                "Enter or f: send a forged commit   q or Ctrl-C: end",
            )
        }));
        lines
    }
}

fn empty() -> Line {
    Line::new(Style::Normal, "")
}

fn rule(columns: usize) -> Line {
    Line::new(Style::Dim, "─".repeat(columns))
}

/// A command on lines that fit and still paste: all but the last end with a backslash.
fn folded(words: &[String], columns: usize) -> Vec<Line> {
    const CONTINUED: &str = " \\";
    let mut lines: Vec<String> = Vec::new();
    let mut line = "  ".to_owned();
    // A flag and its value stay together.
    let ends_here = |at: usize| {
        let next = words.get(at + 1);
        !words[at].starts_with("--") || next.is_none_or(|next| next.starts_with('-'))
    };
    let mut word = String::new();
    for (at, part) in words.iter().enumerate() {
        word.push_str(part);
        if !ends_here(at) {
            word.push(' ');
            continue;
        }
        let is_first = line.trim().is_empty();
        if !is_first && line.len() + 1 + word.len() + CONTINUED.len() > columns {
            lines.push(line + CONTINUED);
            line = "   ".to_owned();
        }
        let gap = if is_first { "" } else { " " };
        line.push_str(&format!("{gap}{}", std::mem::take(&mut word)));
    }
    lines.push(line);
    let styled = |text| Line::new(Style::Normal, text);
    lines.into_iter().map(styled).collect()
}

/// The words that start the relay's binary: the one beside this executable; where `cargo run` built this one alone, by
/// cargo; else whatever the shell finds.
pub fn relay_command() -> Vec<String> {
    let own = std::env::current_exe().unwrap_or_default();
    let beside = own.with_file_name(RELAY);
    if beside.is_file() {
        return vec![quoted(&beside)];
    }
    let words: &[&str] = match std::env::var_os(CARGO) {
        Some(_) if own.components().any(|part| part.as_os_str() == "release") => {
            &["cargo", "run", "--release", "--bin", RELAY, "--"]
        }
        Some(_) => &["cargo", "run", "--bin", RELAY, "--"],
        None => &[RELAY],
    };
    words.iter().map(|word| (*word).to_owned()).collect()
}

/// A path as a shell reads it.
fn quoted(path: &Path) -> String {
    let text = path.display().to_string();
    let is_plain = |c: char| c.is_alphanumeric() || "/._-+@:,".contains(c);
    if text.chars().all(is_plain) {
        text
    } else {
        format!("'{}'", text.replace('\'', "'\\''"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn commands_fit_and_paste() {
        let words: Vec<String> = "/opt/bin/atproto-relay firehose ws://127.0.0.1:2470 --verify --plc-host http://127.0.0.1:34303"
            .split(' ')
            .map(str::to_owned)
            .collect();
        for columns in [40, 60, 80, 200] {
            let lines = folded(&words, columns);
            let texts: Vec<&str> = lines.iter().map(|line| line.text.as_str()).collect();
            assert!(texts.iter().all(|line| line.len() <= columns), "{texts:#?}");
            let joined = texts.join("\n").replace("\\\n", " ");
            assert_eq!(joined.split_whitespace().collect::<Vec<_>>(), words);
        }
        assert_eq!(folded(&words, 200).len(), 1);
    }

    #[test]
    fn a_path_with_spaces_is_one_word_of_the_shell() {
        assert_eq!(quoted(Path::new("/a/b-1.0_x")), "/a/b-1.0_x");
        assert_eq!(quoted(Path::new("/it's mine")), "'/it'\\''s mine'");
    }
}
