//! The binary from its outside: what it prints, what it exits with, and what each mistake is told.

use atproto_relay::dial::plain_client;
use std::fs;
use std::io::{BufRead, BufReader, Read};
use std::net::TcpListener;
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use atproto_relay::atproto::frame;
use axum::Router;
use axum::extract::RawQuery;
use axum::routing::get;
use futures_util::SinkExt;
use rustix::process::{Pid, Signal, kill_process};
use tokio_tungstenite::accept_hdr_async;
use tokio_tungstenite::tungstenite::Message;
use tokio_tungstenite::tungstenite::handshake::server::{Request, Response};

/// Longest wait for anything: a loaded machine, not a slow program.
const DEADLINE: Duration = Duration::from_secs(60);
/// The admin password of the relays that have one.
const PASSWORD: &str = "correct horse";

fn relay() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_atproto-relay"));
    command.env_clear().stdin(Stdio::null());
    command
}

fn run(arguments: &[&str]) -> Output {
    relay().args(arguments).output().expect("the binary runs")
}

fn stdout(output: &Output) -> String {
    String::from_utf8(output.stdout.clone()).expect("output is UTF-8")
}

fn stderr(output: &Output) -> String {
    String::from_utf8(output.stderr.clone()).expect("messages are UTF-8")
}

/// Runs it and expects one line that begins with `error: ` and has all the parts.
fn refused(command: &mut Command, code: i32, parts: &[&str]) {
    let output = command.output().expect("the binary runs");
    let message = stderr(&output);
    assert_eq!(output.status.code(), Some(code), "{command:?}: {message}");
    let errors: Vec<&str> = message
        .lines()
        .filter(|line| line.starts_with("error: "))
        .collect();
    assert_eq!(errors.len(), 1, "{command:?}: one line: {message}");
    for part in parts {
        assert!(
            errors[0].contains(part),
            "{command:?}: `{part}` is not in: {message}"
        );
    }
    assert!(
        output.stdout.is_empty(),
        "{command:?} printed {}",
        stdout(&output)
    );
}

/// A `serve` that runs until it is told to end. Killed when dropped.
struct Serving {
    child: Child,
    lines: mpsc::Receiver<String>,
}

impl Serving {
    fn start(data_dir: &Path, arguments: &[&str]) -> Serving {
        let mut child = relay()
            .args([
                "serve",
                "--listen",
                "127.0.0.1:0",
                "--metrics-listen",
                "127.0.0.1:0",
                "--log-format",
                "json",
            ])
            .args(["--log-segment-bytes", "8MiB", "--data-dir"])
            .arg(data_dir)
            .args(arguments)
            .stderr(Stdio::piped())
            .spawn()
            .expect("the binary runs");
        let stderr = BufReader::new(child.stderr.take().expect("stderr is piped"));
        let (sender, lines) = mpsc::channel();
        std::thread::spawn(move || {
            for line in stderr.lines().map_while(Result::ok) {
                if sender.send(line).is_err() {
                    break;
                }
            }
        });
        Serving { child, lines }
    }

    /// The first log line with this message.
    fn line(&self, message: &str) -> serde_json::Value {
        let deadline = Instant::now() + DEADLINE;
        let mut seen = Vec::new();
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let Ok(line) = self.lines.recv_timeout(left) else {
                panic!("no line `{message}` in {seen:#?}");
            };
            match serde_json::from_str::<serde_json::Value>(&line) {
                Ok(fields) if fields["message"] == message => return fields,
                _ => seen.push(line),
            }
        }
    }

    /// The addresses of the public and of the metrics listener, once it serves.
    fn addresses(&self) -> (String, String) {
        let ready = self.line("ready");
        let text = |field: &str| {
            ready[field]
                .as_str()
                .expect("the line has the address")
                .to_owned()
        };
        let url = url::Url::parse(&text("firehose")).expect("it is a URL");
        (
            format!("127.0.0.1:{}", url.port().expect("it has a port")),
            text("metrics"),
        )
    }

    /// The address of the public listener, once it serves.
    fn address(&self) -> String {
        self.addresses().0
    }

    fn signal(&self, signal: Signal) {
        let pid = Pid::from_child(&self.child);
        kill_process(pid, signal).expect("the process is ours");
    }

    fn wait(&mut self) -> ExitStatus {
        let deadline = Instant::now() + DEADLINE;
        loop {
            if let Some(status) = self.child.try_wait().expect("the process is ours") {
                return status;
            }
            assert!(Instant::now() < deadline, "it does not end");
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

impl Drop for Serving {
    fn drop(&mut self) {
        // It may have ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn without_a_command_the_help_comes_with_exit_code_2() {
    let output = run(&[]);
    assert_eq!(output.status.code(), Some(2));
    assert!(
        stderr(&output).contains("hosts pull"),
        "{}",
        stderr(&output)
    );
}

#[test]
fn help_teaches() {
    // Lines are wrapped to the terminal.
    let help = stdout(&run(&["serve", "--help"]))
        .split_whitespace()
        .collect::<Vec<_>>()
        .join(" ");
    for part in [
        "Examples:",
        "--admin-password-file",
        "[env: RELAY_REPLAY_WINDOW]",
        "[default: 72h]",
        "Exit codes",
    ] {
        assert!(help.contains(part), "{part} is not in the help of serve");
    }
    let short = stdout(&run(&["serve", "-h"]));
    assert!(short.contains("--listen") && !short.contains("--desync-limit"));
    for command in [
        vec!["firehose"],
        vec!["hosts", "pull"],
        vec!["completions"],
        vec!["man"],
    ] {
        let help = run(&[command.as_slice(), &["--help"]].concat());
        assert!(
            help.status.success() && stdout(&help).contains("Examples:"),
            "{command:?}"
        );
    }
    assert!(stdout(&run(&["--version"])).starts_with("atproto-relay "));
}

/// The help of a command on a terminal of 80 columns.
fn help(command: &[&str]) -> String {
    let mut relay = relay();
    relay.env("COLUMNS", "80").args(command).arg("--help");
    stdout(&relay.output().expect("the binary runs"))
}

#[test]
fn helps_show_what_the_command_needs_and_take_every_setting() {
    for (command, shown) in [
        (
            &["hosts", "pull"][..],
            &["--data-dir", "--to", "--json"][..],
        ),
        (&["log", "abandon"], &["--database-url", "--json"]),
        (&["check-config"], &["--config", "--json"]),
    ] {
        let text = help(command);
        assert!(text.lines().count() < 70, "{command:?}: {text}");
        assert!(
            text.contains("as in `atproto-relay serve --help`"),
            "{text}"
        );
        for flag in shown {
            assert!(text.contains(flag), "{command:?}: {flag}: {text}");
        }
        assert!(!text.contains("--replay-window"), "{command:?}: {text}");
    }
    let output = run(&["check-config", "--replay-window", "9h"]);
    assert!(stdout(&output).contains("replay_window = \"9h\""));
}

#[test]
fn paragraphs_of_helps_are_wrapped_once_and_examples_paste() {
    for command in [
        &[][..],
        &["serve"],
        &["check-config"],
        &["firehose"],
        &["hosts", "pull"],
        &["log"],
        &["log", "info"],
        &["log", "verify"],
        &["log", "dump"],
        &["log", "repair"],
        &["log", "abandon"],
        &["completions"],
        &["man"],
    ] {
        let text = help(command);
        let lines: Vec<&str> = text.lines().collect();
        for pair in lines.windows(2) {
            let [line, next] = [pair[0], pair[1]];
            assert!(line.chars().count() <= 80, "{command:?}: {line}");
            let is_prose = |line: &str| line.starts_with(|c: char| c.is_alphabetic() || c == '`');
            if !is_prose(line) || !is_prose(next) || line.ends_with(':') {
                continue;
            }
            // Where the next word had fitted, somebody wrapped the line before.
            let word = next.split(' ').next().unwrap();
            assert!(
                line.chars().count() + 1 + word.chars().count() > 80,
                "{command:?}: {line} / {next}"
            );
        }
        // Each example is whole once its backslashes are taken as a shell takes them.
        let joined = text.replace("\\\n", " ");
        let examples = joined
            .lines()
            .filter_map(|line| line.trim_start().strip_prefix("atproto-relay "))
            .filter(|_| joined.contains("Examples:"));
        for example in examples {
            let words = example.split(['|', '>']).next().unwrap();
            let words: Vec<&str> = words.split_whitespace().collect();
            // With --help behind it, nothing is done, and what is no argument is refused still.
            let output = run(&[&words[..], &["--help"]].concat());
            assert!(output.status.success(), "{example}: {}", stderr(&output));
        }
    }
}

#[test]
fn check_config_has_the_same_as_json() {
    let output = relay()
        .args(["check-config", "--json", "--host", "pds.example.com"])
        .args(["--log-max-bytes", "1TB"])
        .env("RELAY_ADMIN_PASSWORD", "hunter2")
        .output()
        .unwrap();
    let text = stdout(&output);
    assert!(output.status.success(), "{}", stderr(&output));
    let json: serde_json::Value = serde_json::from_str(&text).unwrap();
    let settings = &json["settings"];
    assert_eq!(
        settings["hosts"],
        serde_json::json!({ "value": ["https://pds.example.com"], "origin": "--host" })
    );
    assert_eq!(settings["log.max_bytes"]["value"], "1TB");
    assert_eq!(settings["allow_private_hosts"]["value"], false);
    assert_eq!(settings["listen"]["origin"], "default");
    assert_eq!(
        json["adminPasswordOrigin"],
        "environment variable RELAY_ADMIN_PASSWORD"
    );
    assert!(!text.contains("hunter2"), "{text}");
    let nulls = settings.as_object().unwrap().iter();
    let nulls: Vec<_> = nulls.filter(|(_, it)| it["value"].is_null()).collect();
    assert!(nulls.is_empty(), "{nulls:?}");
}

#[test]
fn completions_and_man_pages_come_out() {
    for shell in ["bash", "fish", "zsh", "elvish", "powershell"] {
        let script = run(&["completions", shell]);
        assert!(
            script.status.success() && stdout(&script).contains("check-config"),
            "{shell}"
        );
    }
    assert!(stdout(&run(&["man"])).contains(".TH atproto-relay 1"));
    let folder = tempfile::tempdir().unwrap();
    assert!(
        run(&["man", "--out-dir", folder.path().to_str().unwrap()])
            .status
            .success()
    );
    let page = fs::read_to_string(folder.path().join("atproto-relay-serve.1")).unwrap();
    assert!(page.contains("replay\\-window"));
    let absent = folder.path().join("absent");
    refused(
        relay().args(["man", "--out-dir"]).arg(&absent),
        1,
        &["cannot write the man pages", "absent", "exists"],
    );
}

#[test]
fn output_that_nobody_reads_any_more_is_no_failure() {
    let mut child = relay()
        .args(["completions", "bash"])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    drop(child.stdout.take());
    let mut message = String::new();
    child
        .stderr
        .take()
        .unwrap()
        .read_to_string(&mut message)
        .unwrap();
    assert!(child.wait().unwrap().success());
    assert_eq!(message, "");
}

#[test]
fn check_config_shows_values_and_where_they_are_from() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("relay.toml");
    fs::write(&file, "[log]\nmax_bytes = \"1TB\"\n").unwrap();
    let output = relay()
        .args([
            "check-config",
            "--host",
            "pds.example.com",
            "--allow-private-hosts",
            "--config",
        ])
        .arg(&file)
        .env("RELAY_REPLAY_WINDOW", "48h")
        .env("RELAY_ADMIN_PASSWORD", "hunter2")
        .env("DATABASE_URL", "postgres://relay:geheim@db/relay")
        .env("RELAY_REPLAY_WINDO", "1h")
        .output()
        .unwrap();
    let text = stdout(&output);
    assert!(output.status.success(), "{}", stderr(&output));
    let origin = |assignment: &str| {
        let line = text.lines().find(|line| line.starts_with(assignment));
        let line = line.unwrap_or_else(|| panic!("{assignment} is not in\n{text}"));
        line.split_once('#').unwrap().1.trim().to_owned()
    };
    assert_eq!(
        origin("log.max_bytes = \"1TB\""),
        format!("{}:2", file.display())
    );
    assert_eq!(
        origin("replay_window = \"48h\""),
        "environment variable RELAY_REPLAY_WINDOW"
    );
    assert_eq!(origin("hosts = [\"https://pds.example.com\"]"), "--host");
    assert_eq!(
        origin("allow_private_hosts = true"),
        "--allow-private-hosts"
    );
    assert_eq!(origin("listen = "), "default");
    assert!(
        text.contains("# admin API: on, password from environment variable RELAY_ADMIN_PASSWORD")
    );
    assert!(
        !text.contains("hunter2") && !text.contains("geheim"),
        "{text}"
    );
    assert!(stderr(&output).contains("did you mean RELAY_REPLAY_WINDOW?"));

    let output = run(&["check-config", "--admin-listen=unix:/run/admin.sock"]);
    let text = stdout(&output);
    let line = "# admin API: on at unix:/run/admin.sock alone, because no password is configured\n";
    assert!(text.ends_with(line), "{text}");

    // What it prints is a configuration.
    fs::write(&file, stdout(&run(&["check-config"]))).unwrap();
    let again = relay()
        .args(["check-config", "--config"])
        .arg(&file)
        .output()
        .unwrap();
    assert!(again.status.success(), "{}", stderr(&again));
}

#[test]
fn a_bad_configuration_is_one_line_and_exit_code_2() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("relay.toml");
    fs::write(&file, "data_dir = \"x\"\nreplay_windw = \"1h\"\n").unwrap();
    let absent = folder.path().join("absent.toml");
    let latin = folder.path().join("latin.toml");
    fs::write(&latin, b"data_dir = \"\xe9\"").unwrap();
    for command in ["serve", "check-config"] {
        refused(
            relay().args([command, "--config"]).arg(&file),
            2,
            &[
                "relay.toml:2: unknown key `replay_windw`",
                "did you mean `replay_window`?",
            ],
        );
        refused(
            relay().args([command, "--config"]).arg(&absent),
            2,
            &["absent.toml", "No such file", "--config"],
        );
        refused(
            relay().args([command, "--config"]).arg(&latin),
            2,
            &["latin.toml", "UTF-8"],
        );
        refused(
            relay().args([command, "--config"]).arg(folder.path()),
            2,
            &["directory"],
        );
        for (flag, value, parts) in [
            ("--plc-host", "http://", vec!["--plc-host", "not a URL"]),
            (
                "--host",
                "http://pds.example.com",
                vec!["http://pds.example.com", "--allow-private-hosts"],
            ),
            ("--host", "pds example", vec!["--host", "not a host name"]),
            (
                "--database-url",
                "mysql://x",
                vec!["--database-url", "sqlite: or postgres://"],
            ),
            (
                "--listen",
                "2470",
                vec!["--listen", "an address and a port"],
            ),
            (
                "--validation",
                "loose",
                vec!["--validation", "strict, ratchet, lenient"],
            ),
            (
                "--replay-window",
                "3 days",
                vec![
                    "--replay-window",
                    "unknown unit `days`",
                    "ms, s, m, h, d or w",
                ],
            ),
            (
                "--log-max-bytes",
                "1",
                vec!["--log-max-bytes", "two segments"],
            ),
            (
                "--trusted-domain",
                "https://x",
                vec!["--trusted-domain", "is not a domain"],
            ),
            (
                "--admin-password-file",
                "/absent/password",
                vec!["/absent/password", "may read it"],
            ),
        ] {
            refused(relay().args([command, flag, value]), 2, &parts);
        }
    }
    refused(
        relay().args(["serve", "--repaly-window", "1h"]),
        2,
        &["--repaly-window"],
    );
    refused(
        relay().args(["serve", "--listen", ":1", "--listen", ":2"]),
        2,
        &["--listen"],
    );
}

#[test]
fn a_relay_that_cannot_start_says_why_and_writes_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let serve = |data_dir: &Path| {
        let mut command = relay();
        command.args([
            "serve",
            "--listen",
            "127.0.0.1:0",
            "--metrics-listen",
            "127.0.0.1:0",
            "--log-level",
            "error",
        ]);
        command.arg("--data-dir").arg(data_dir);
        command
    };

    // A folder that cannot be.
    let file = folder.path().join("file");
    fs::write(&file, "not a folder").unwrap();
    refused(
        &mut serve(&file.join("data")),
        1,
        &["data folder", "file/data", "--data-dir"],
    );

    // A port in use, on either listener.
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap().to_string();
    for flag in ["--listen", "--metrics-listen"] {
        let data_dir = folder.path().join("port");
        let mut command = relay();
        let other = if flag == "--listen" {
            "--metrics-listen"
        } else {
            "--listen"
        };
        command.args([
            "serve",
            flag,
            &address,
            other,
            "127.0.0.1:0",
            "--log-level",
            "error",
            "--data-dir",
        ]);
        refused(
            command.arg(&data_dir),
            1,
            &["cannot listen on", &address, flag],
        );
        let written = fs::read_dir(&data_dir).map_or(0, |entries| entries.count());
        assert_eq!(written, 0, "nothing is half written");
    }

    // A database that is down.
    let down = TcpListener::bind("127.0.0.1:0")
        .unwrap()
        .local_addr()
        .unwrap();
    let url = format!("postgres://relay:geheim@{down}/relay");
    let mut command = serve(&folder.path().join("down"));
    let output = command.env("DATABASE_URL", &url).output().unwrap();
    let message = stderr(&output);
    assert_eq!(output.status.code(), Some(1), "{message}");
    assert!(
        message.contains("cannot reach") && message.contains("start the server"),
        "{message}"
    );
    assert!(!message.contains("geheim"), "{message}");

    // A file that is no database.
    let noise = folder.path().join("noise");
    fs::create_dir(&noise).unwrap();
    fs::write(noise.join("relay.sqlite"), vec![7; 8192]).unwrap();
    refused(
        &mut serve(&noise),
        1,
        &["relay.sqlite", "not an SQLite database"],
    );
}

#[tokio::test]
async fn a_database_that_is_newer_than_the_binary_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let url = format!("sqlite:{}", folder.path().join("relay.sqlite").display());
    let store = atproto_relay::store::Store::open(&url).await.unwrap();
    store.close().await;
    let pool = sqlx::SqlitePool::connect(&url).await.unwrap();
    sqlx::query("UPDATE schema_level SET level = level + 1, release = '99.1.0'")
        .execute(&pool)
        .await
        .unwrap();
    pool.close().await;
    let mut command = relay();
    command.args([
        "serve",
        "--listen",
        "127.0.0.1:0",
        "--metrics-listen",
        "127.0.0.1:0",
        "--log-level",
        "error",
    ]);
    command.arg("--data-dir").arg(folder.path());
    refused(
        &mut command,
        1,
        &["relay.sqlite", "newer version", "99.1.0"],
    );
}

#[test]
fn serve_runs_until_a_signal_and_holds_its_folder() {
    let folder = tempfile::tempdir().unwrap();
    let mut first = Serving::start(folder.path(), &[]);
    first.address();

    let mut second = relay();
    second.args([
        "serve",
        "--listen",
        "127.0.0.1:0",
        "--metrics-listen",
        "127.0.0.1:0",
        "--log-level",
        "error",
    ]);
    let in_use = folder.path().display().to_string();
    refused(
        second.arg("--data-dir").arg(folder.path()),
        1,
        &[&in_use, "another relay"],
    );

    first.signal(Signal::TERM);
    first.line("stopped");
    assert!(first.wait().success());

    let mut again = Serving::start(folder.path(), &[]);
    again.address();
    again.signal(Signal::INT);
    assert!(again.wait().success());
}

#[test]
fn systemd_is_told_when_the_relay_is_ready_and_when_it_stops() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("notify");
    let socket = std::os::unix::net::UnixDatagram::bind(&path).unwrap();
    socket.set_read_timeout(Some(DEADLINE)).unwrap();
    let mut child = relay()
        .args([
            "serve",
            "--listen",
            "127.0.0.1:0",
            "--metrics-listen",
            "127.0.0.1:0",
            "--log-level",
            "error",
        ])
        .arg("--data-dir")
        .arg(folder.path().join("data"))
        .env("NOTIFY_SOCKET", &path)
        .env("WATCHDOG_USEC", "200000")
        .spawn()
        .unwrap();
    let wait_for = |word: &str| {
        let deadline = Instant::now() + DEADLINE;
        loop {
            let mut buffer = [0; 4096];
            let length = socket.recv(&mut buffer).expect("systemd hears something");
            let text = String::from_utf8_lossy(&buffer[..length]).into_owned();
            if text.contains(word) {
                return text;
            }
            assert!(Instant::now() < deadline, "no {word}, last {text}");
        }
    };
    assert!(wait_for("READY=1").contains("STATUS=serving ws://127.0.0.1:"));
    wait_for("WATCHDOG=1");
    kill_process(Pid::from_child(&child), Signal::TERM).unwrap();
    wait_for("STOPPING=1");
    assert!(child.wait().unwrap().success());
}

#[test]
fn firehose_says_what_is_wrong_with_its_address() {
    for (url, parts) in [
        ("ftp://bsky.network", "https, http, wss and ws"),
        ("", "host"),
        ("a b", "host name or a URL"),
    ] {
        refused(relay().args(["firehose", url]), 2, &[parts]);
    }
    let down = TcpListener::bind("127.0.0.1:0")
        .unwrap()
        .local_addr()
        .unwrap()
        .to_string();
    refused(
        relay().args(["firehose", &down]),
        1,
        &["cannot open", &down, "refused"],
    );
}

#[test]
fn firehose_reports_what_the_server_refuses() {
    let folder = tempfile::tempdir().unwrap();
    let serving = Serving::start(folder.path(), &[]);
    let address = serving.address();
    refused(
        relay().args(["firehose", &address, "--cursor", "12345"]),
        1,
        &["FutureCursor"],
    );
    refused(
        relay().args(["firehose", &address, "--cursor", "-1"]),
        2,
        &["--cursor", "a whole number from 0 on", "0 is the oldest"],
    );
    let help = stdout(&run(&["firehose", "--help"]));
    assert!(help.contains("Start with events of seq >= SEQ"), "{help}");
    let elsewhere = format!("http://{address}/nowhere");
    refused(
        relay().args(["firehose", &elsewhere]),
        1,
        &["cannot open", "status 404"],
    );
}

#[cfg(feature = "devnet")]
mod on_a_network {
    use super::*;
    use atproto_relay::devnet::network::{Network, NetworkOptions};

    /// A network with one account and two posts: `#identity`, `#account`, commits.
    async fn network() -> Network {
        let network = Network::start(NetworkOptions::default()).await.unwrap();
        let pds = network.pds(0);
        let account = pds.create_account("alice.pds1.test").unwrap();
        for text in ["one", "two"] {
            let post = serde_json::json!({ "$type": "app.bsky.feed.post", "text": text });
            pds.create_record(&account.did, "app.bsky.feed.post", post)
                .unwrap();
        }
        network
    }

    async fn output(mut command: Command) -> Output {
        tokio::task::spawn_blocking(move || command.output().expect("the binary runs"))
            .await
            .unwrap()
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn firehose_prints_and_verifies_the_events_of_a_pds() {
        let network = network().await;
        let mut command = relay();
        command.args([
            "firehose",
            &network.pds(0).url(),
            "--cursor",
            "0",
            "--limit",
            "4",
            "--json",
            "--verify",
        ]);
        command.args(["--allow-private-hosts", "--plc-host", &network.plc_url()]);
        let output = output(command).await;
        assert!(output.status.success(), "{}", stderr(&output));
        let events: Vec<serde_json::Value> = stdout(&output)
            .lines()
            .map(|line| serde_json::from_str(line).unwrap())
            .collect();
        assert_eq!(events.len(), 4);
        for pair in events.windows(2) {
            assert!(
                pair[0]["seq"].as_i64() < pair[1]["seq"].as_i64(),
                "{pair:?}"
            );
        }
        let commits: Vec<_> = events
            .iter()
            .filter(|event| event["kind"] == "#commit")
            .collect();
        assert!(!commits.is_empty());
        for commit in commits {
            assert_eq!(commit["valid"], true, "{commit}");
        }
    }

    /// What `firehose --json` prints of the network's first PDS with these arguments.
    async fn filtered(network: &Network, arguments: &[&str]) -> Vec<serde_json::Value> {
        let mut command = relay();
        command.args(["firehose", &network.pds(0).url(), "--cursor", "0", "--json"]);
        command.args(arguments);
        let output = output(command).await;
        assert!(output.status.success(), "{}", stderr(&output));
        let text = stdout(&output);
        let lines = text.lines();
        lines
            .map(|line| serde_json::from_str(line).unwrap())
            .collect()
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn firehose_shows_records_of_the_collections_accounts_and_kinds_that_are_asked_for() {
        let network = network().await;
        let pds = network.pds(0);
        let bob = pds.create_account("bob.pds1.test").unwrap().did;
        let like = serde_json::json!({
            "$type": "app.bsky.feed.like",
            "subject": { "uri": "at://x", "cid": "y" },
        });
        pds.create_record(&bob, "app.bsky.feed.like", like).unwrap();
        let profile =
            serde_json::json!({ "$type": "app.bsky.actor.profile", "displayName": "Bob" });
        pds.create_record(&bob, "app.bsky.actor.profile", profile)
            .unwrap();

        let posts = ["--collection", "app.bsky.feed.post", "--limit", "2"];
        let posts = filtered(&network, &posts).await;
        let texts: Vec<_> = posts
            .iter()
            .map(|post| &post["ops"][0]["record"]["text"])
            .collect();
        assert_eq!(texts, ["one", "two"]);
        let post = &posts[0];
        assert_eq!(post["$type"], "com.atproto.sync.subscribeRepos#commit");
        assert_eq!(
            (&post["kind"], &post["repo"]),
            (&"#commit".into(), &post["did"])
        );
        assert_eq!(post["ops"][0]["action"], "create");
        assert!(post["ops"][0].get("recordProblem").is_none(), "{post}");

        let all = [
            "--collection",
            "app.bsky.feed.*",
            "--collection",
            "app.bsky.actor.profile",
            "--limit",
            "4",
        ];
        assert_eq!(filtered(&network, &all).await.len(), 4);

        // A handle, which this PDS resolves.
        let bobs = [
            "--did",
            "bob.pds1.test",
            "--kind",
            "identity",
            "--kind",
            "#commit",
            "--limit",
            "4",
        ];
        let bobs = filtered(&network, &bobs).await;
        let kinds: Vec<_> = bobs.iter().map(|event| &event["kind"]).collect();
        assert_eq!(kinds, ["#identity", "#commit", "#commit", "#commit"]);
        assert!(
            bobs.iter().all(|event| event["did"] == bob.as_str()),
            "{bobs:?}"
        );
        assert_eq!(bobs[3]["ops"][0]["record"]["displayName"], "Bob");

        for (arguments, parts) in [
            (
                ["--collection", "*"],
                &["--collection", "app.bsky.feed.*"][..],
            ),
            (
                ["--kind", "post"],
                &["--kind", "commit, sync, identity or account"],
            ),
            (["--did", "did:"], &["--did"]),
            (["--did", "alice"], &["--did", "a DID or a handle"]),
        ] {
            let url = pds.url();
            let mut command = relay();
            command.args(["firehose", &url]).args(arguments);
            tokio::task::spawn_blocking(move || refused(&mut command, 2, parts))
                .await
                .unwrap();
        }
        let mut contradiction = relay();
        contradiction.args(["firehose", &pds.url(), "--kind", "identity"]);
        contradiction.args(["--collection", "app.bsky.feed.post"]);
        let mut nobody = relay();
        nobody.args(["firehose", &pds.url(), "--did", "nobody.pds1.test"]);
        tokio::task::spawn_blocking(move || {
            refused(&mut contradiction, 2, &["--collection shows commits only"]);
            refused(
                &mut nobody,
                1,
                &["knows the handle nobody.pds1.test", "give its DID"],
            );
        })
        .await
        .unwrap();
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn firehose_sums_up_what_it_showed() {
        let network = network().await;
        let mut command = relay();
        command.args(["firehose", &network.pds(0).url(), "--cursor", "0"]);
        command.args(["--limit", "6", "--verify", "--allow-private-hosts"]);
        command.args(["--plc-host", &network.plc_url()]);
        let message = stderr(&output(command).await);
        let summary = message.lines().last().unwrap();
        assert!(summary.starts_with("6 events in "), "{message}");
        let end =
            " seconds: 1 #account, 3 #commit, 1 #identity, 1 #sync; 4 verified, 0 bad, 0 unchecked";
        assert!(summary.ends_with(end), "{message}");
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn firehose_prints_a_line_for_each_event() {
        let network = network().await;
        let mut command = relay();
        command.args([
            "firehose",
            &network.pds(0).url(),
            "--cursor",
            "0",
            "--limit",
            "5",
        ]);
        let output = output(command).await;
        let text = stdout(&output);
        assert_eq!(text.lines().count(), 5, "{text}");
        assert!(
            text.contains("#identity") && text.contains("#account"),
            "{text}"
        );
        assert!(text.contains("create app.bsky.feed.post/"), "{text}");
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn hosts_pull_has_a_running_relay_check_and_add_them() {
        let network = network().await;
        let folder = tempfile::tempdir().unwrap();
        let password = folder.path().join("password");
        fs::write(&password, PASSWORD).unwrap();
        let data_dir = folder.path().join("data");
        let plc_url = network.plc_url();
        let flags = [
            "--allow-private-hosts",
            "--plc-host",
            &plc_url,
            "--admin-password-file",
        ];
        let serving = Serving::start(
            &data_dir,
            &[&flags[..], &[password.to_str().unwrap()]].concat(),
        );
        let to = format!("http://{}", serving.address());
        let pds = network.pds(0).host().replace("127.0.0.1", "localhost");
        let down = TcpListener::bind("127.0.0.1:0")
            .unwrap()
            .local_addr()
            .unwrap()
            .port();
        let list = other_relay(vec![serde_json::json!([
            { "hostname": pds, "status": "active" },
            { "hostname": format!("localhost:{down}"), "status": "active" },
        ])])
        .await;

        let output = pull(
            &[&list, "--to", &to, "--allow-private-hosts"],
            folder.path(),
        )
        .await;
        assert!(output.status.success(), "{}", stderr(&output));
        let text = stdout(&output);
        let outcome = |host: &str| {
            text.lines()
                .find(|line| line.starts_with(host))
                .unwrap()
                .to_owned()
        };
        assert!(outcome(&pds).ends_with("added"), "{text}");
        assert!(
            outcome(&format!("localhost:{down}")).contains("refused: "),
            "{text}"
        );
        assert!(
            stderr(&output).contains("1 added, 0 known before, 0 skipped, 1 refused"),
            "{}",
            stderr(&output)
        );

        let mut wrong = relay();
        wrong
            .args(["hosts", "pull", &list, "--to", &to, "--allow-private-hosts"])
            .env("RELAY_ADMIN_PASSWORD", "x");
        tokio::task::spawn_blocking(move || {
            refused(&mut wrong, 1, &["does not let us in", "admin password"])
        })
        .await
        .unwrap();
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn firehose_finds_what_does_not_verify() {
        let network = network().await;
        let other = Network::start(NetworkOptions {
            seed: 7,
            ..NetworkOptions::default()
        })
        .await
        .unwrap();
        let mut command = relay();
        // A directory that knows none of the accounts.
        command.args([
            "firehose",
            &network.pds(0).url(),
            "--cursor",
            "0",
            "--limit",
            "5",
            "--verify",
        ]);
        command.args(["--allow-private-hosts", "--plc-host", &other.plc_url()]);
        let output = output(command).await;
        assert_eq!(output.status.code(), Some(1), "{}", stdout(&output));
        assert!(
            stdout(&output).contains("[NOT VALID: the DID does not exist]"),
            "{}",
            stdout(&output)
        );
        assert!(
            stderr(&output).contains("events are not valid"),
            "{}",
            stderr(&output)
        );
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn firehose_fails_when_nothing_could_be_verified() {
        let network = network().await;
        network.plc().set_outage(true);
        let mut command = relay();
        command.args(["firehose", &network.pds(0).url(), "--cursor", "0"]);
        command.args(["--limit", "5", "--verify", "--allow-private-hosts"]);
        command.args(["--plc-host", &network.plc_url()]);
        let output = output(command).await;
        let (text, message) = (stdout(&output), stderr(&output));
        assert!(text.contains("[not checked: "), "{text}");
        assert_eq!(output.status.code(), Some(1), "{message}");
        assert!(
            message.contains("not one event could be checked"),
            "{message}"
        );
        assert!(message.contains("503"), "the reason: {message}");
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn hosts_pull_adds_through_the_admin_socket_without_a_password() {
        let network = network().await;
        let folder = tempfile::tempdir().unwrap();
        let socket = format!("unix:{}", folder.path().join("admin.sock").display());
        let plc = network.plc_url();
        let flags = [
            "--allow-private-hosts",
            "--plc-host",
            &plc,
            "--admin-listen",
            &socket,
        ];
        let serving = Serving::start(&folder.path().join("data"), &flags);
        let ready = serving.line("ready");
        assert_eq!(ready["admin"], socket.as_str());
        assert_eq!(ready["hosts"], 0);
        let pds = network.pds(0).host().replace("127.0.0.1", "localhost");
        let host = serde_json::json!([{ "hostname": pds, "status": "active" }]);
        let list = other_relay(vec![host]).await;
        let elsewhere = tempfile::tempdir().unwrap();
        let pull = async |arguments: &[&str]| {
            let mut command = relay();
            command.current_dir(elsewhere.path());
            command.args(["hosts", "pull", &list, "--allow-private-hosts"]);
            command.args(arguments);
            output(command).await
        };
        let first = pull(&["--to", &socket]).await;
        let message = stderr(&first);
        assert!(first.status.success(), "{message}");
        assert!(stdout(&first).contains("added"), "{}", stdout(&first));
        let report =
            format!("1 added, 0 known before, 0 skipped, 0 refused, by the relay at {socket}");
        assert!(message.contains(&report), "{message}");
        // Found by itself, and told as what it is.
        let again = pull(&["--admin-listen", &socket, "--to"]).await;
        assert!(
            stderr(&again).contains("0 added, 1 known before"),
            "{}",
            stderr(&again)
        );
        let nobody = pull(&["--to", "unix:/nowhere/admin.sock"]).await;
        assert_eq!(nobody.status.code(), Some(1));
        let message = stderr(&nobody);
        assert!(
            message.contains("unix:/nowhere/admin.sock") && message.contains("No such file"),
            "{message}"
        );
        assert_eq!(fs::read_dir(elsewhere.path()).unwrap().count(), 0);
    }
}

/// A server of frames: each connection gets its list, then is cut. Says which cursor each one came with.
// The library's callback returns a whole HTTP response as its error.
#[allow(clippy::result_large_err)]
async fn flaky_server(connections: Vec<Vec<Vec<u8>>>) -> (String, mpsc::Receiver<Option<String>>) {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let (sender, cursors) = mpsc::channel();
    tokio::spawn(async move {
        for frames in connections {
            let (stream, _) = listener.accept().await.unwrap();
            let mut cursor = None;
            let mut socket = accept_hdr_async(stream, |request: &Request, response: Response| {
                cursor = request.uri().query().map(str::to_owned);
                Ok(response)
            })
            .await
            .unwrap();
            sender.send(cursor).unwrap();
            for frame in frames {
                socket.send(Message::Binary(frame.into())).await.unwrap();
            }
        }
    });
    (address, cursors)
}

fn identity_frame(seq: i64, handle: Option<&str>) -> Vec<u8> {
    frame::encode_identity(&frame::Identity {
        seq,
        did: "did:plc:ewvi7nxzyoun6zhxrhs64oiz",
        time: "2026-01-01T00:00:00.000Z",
        handle,
    })
}

#[tokio::test(flavor = "multi_thread")]
async fn firehose_goes_on_after_the_last_event_when_the_connection_is_lost() {
    let (address, cursors) = flaky_server(vec![
        vec![
            identity_frame(7, None),
            identity_frame(8, Some("evil\u{1b}[2J.test")),
        ],
        // The event of the cursor again, something unreadable, and an info.
        vec![
            identity_frame(8, None),
            vec![0xff],
            frame::encode_info("Hello", None),
            identity_frame(9, None),
        ],
    ])
    .await;
    let mut command = relay();
    command.args(["firehose", &address, "--limit", "4"]);
    let output = tokio::task::spawn_blocking(move || command.output().expect("the binary runs"))
        .await
        .unwrap();
    let text = stdout(&output);
    let starts: Vec<&str> = text
        .lines()
        .filter_map(|line| line.split_whitespace().next())
        .collect();
    assert_eq!(starts, ["7", "8", "unreadable", "#info", "9"], "{text}");
    assert!(!text.contains('\u{1b}'), "{text:?}");
    assert_eq!(cursors.recv_timeout(DEADLINE).unwrap(), None);
    assert_eq!(
        cursors.recv_timeout(DEADLINE).unwrap().as_deref(),
        Some("cursor=8")
    );
    assert!(
        stderr(&output).contains("connecting again after 8, in 1 second"),
        "{}",
        stderr(&output)
    );
    // A frame that cannot be read is not a valid event.
    assert_eq!(output.status.code(), Some(1));
}

#[tokio::test(flavor = "multi_thread")]
async fn firehose_ends_with_the_connection_where_it_is_not_to_reconnect() {
    let (address, _cursors) = flaky_server(vec![vec![identity_frame(7, None)]]).await;
    let mut command = relay();
    command.args(["firehose", &address, "--no-reconnect"]);
    let output = tokio::task::spawn_blocking(move || command.output().expect("the binary runs"))
        .await
        .unwrap();
    let message = stderr(&output);
    assert_eq!(output.status.code(), Some(1), "{message}");
    assert!(stdout(&output).starts_with("7 "), "{}", stdout(&output));
    assert!(
        message.contains("error: the connection was lost"),
        "{message}"
    );
    assert!(message.contains("1 event in "), "{message}");
}

#[tokio::test(flavor = "multi_thread")]
async fn firehose_says_that_it_waits_on_a_terminal() {
    let folder = tempfile::tempdir().unwrap();
    let serving = Serving::start(folder.path(), &[]);
    let address = serving.address();
    let mut command = Command::new("script");
    let own = env!("CARGO_BIN_EXE_atproto-relay");
    command.args(["-qec", &format!("{own} firehose {address}"), "/dev/null"]);
    command.stdin(Stdio::null()).stdout(Stdio::piped());
    let Ok(mut child) = command.spawn() else {
        println!("skipped: script(1) is not here to make a terminal");
        return;
    };
    let line = tokio::task::spawn_blocking(move || {
        let mut line = String::new();
        BufReader::new(child.stdout.take().unwrap())
            .read_line(&mut line)
            .unwrap();
        // With it goes the terminal, and with that the command.
        kill_process(Pid::from_child(&child), Signal::TERM).unwrap();
        child.wait().unwrap();
        line
    });
    let line = line.await.unwrap();
    assert!(
        line.contains(&address)
            && line.contains("connected to")
            && line.contains("waiting for events"),
        "{line}"
    );
}

#[test]
fn a_port_without_tls_is_named_as_such() {
    let folder = tempfile::tempdir().unwrap();
    let serving = Serving::start(folder.path(), &[]);
    let address = serving.address();
    let url = format!("https://{address}");
    let plain = format!("try http://{address}");
    refused(
        relay().args(["firehose", &url]),
        1,
        &["does not speak TLS there", &plain],
    );
    refused(
        relay().args(["hosts", "pull", &url]),
        1,
        &["does not speak TLS there", &address],
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn firehose_ends_when_nobody_reads_it_and_at_ctrl_c() {
    let frames: Vec<Vec<u8>> = (1..=20_000).map(|seq| identity_frame(seq, None)).collect();
    let (address, _cursors) = flaky_server(vec![frames]).await;
    let mut child = relay()
        .args(["firehose", &address])
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let ended = tokio::task::spawn_blocking(move || {
        let mut line = String::new();
        // Dropped after one line, as `head` does.
        BufReader::new(child.stdout.take().unwrap())
            .read_line(&mut line)
            .unwrap();
        (line, child.wait().unwrap())
    });
    let (line, status) = ended.await.unwrap();
    assert!(
        line.starts_with("1 ") && status.success(),
        "{line} {status}"
    );

    let folder = tempfile::tempdir().unwrap();
    let serving = Serving::start(folder.path(), &[]);
    let (address, metrics) = serving.addresses();
    let mut child = relay()
        .args(["firehose", &address])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let metrics = format!("http://{metrics}/metrics");
    let deadline = Instant::now() + DEADLINE;
    loop {
        let text = plain_client()
            .get(&metrics)
            .send()
            .await
            .unwrap()
            .text()
            .await
            .unwrap();
        if text.contains("relay_consumers 1\n") {
            break;
        }
        assert!(
            child.try_wait().unwrap().is_none(),
            "it ended before it was connected"
        );
        assert!(Instant::now() < deadline, "it is no consumer: {text}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    kill_process(Pid::from_child(&child), Signal::INT).unwrap();
    let ended = tokio::task::spawn_blocking(move || child.wait_with_output().unwrap())
        .await
        .unwrap();
    assert!(ended.status.success(), "{}", ended.status);
    assert!(
        stderr(&ended).starts_with("0 events in "),
        "{}",
        stderr(&ended)
    );
}

/// Another relay, with these pages of hosts.
async fn other_relay(pages: Vec<serde_json::Value>) -> String {
    let list = get(|RawQuery(query): RawQuery| async move {
        let query = query.unwrap_or_default();
        let page = query
            .split('&')
            .find_map(|pair| pair.strip_prefix("cursor=page"));
        let page: usize = page.map_or(0, |number| number.parse().unwrap());
        let next = (page + 1 < pages.len()).then(|| format!("page{}", page + 1));
        axum::Json(serde_json::json!({ "hosts": pages[page], "cursor": next }))
    });
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let router = Router::new().route("/xrpc/com.atproto.sync.listHosts", list);
    tokio::spawn(async move { axum::serve(listener, router).await });
    format!("http://{address}")
}

/// Another relay with two pages of hosts of all sorts.
async fn relay_of_all_sorts() -> String {
    other_relay(vec![
        serde_json::json!([
            { "hostname": "one.host.bsky.network", "seq": 17, "accountCount": 3, "status": "active" },
        ]),
        serde_json::json!([
            { "hostname": "two.example.com", "status": "idle" },
            { "hostname": "gone.example.com", "status": "offline" },
            { "hostname": "bad.example.com", "status": "banned" },
            { "hostname": "10.0.0.1", "status": "active" },
        ]),
    ])
    .await
}

async fn pull(arguments: &[&str], folder: &Path) -> Output {
    let mut command = relay();
    command.env("RELAY_ADMIN_PASSWORD", PASSWORD);
    command
        .args(["hosts", "pull"])
        .args(arguments)
        .arg("--data-dir")
        .arg(folder);
    tokio::task::spawn_blocking(move || command.output().expect("the binary runs"))
        .await
        .unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn hosts_pull_shows_all_pages_and_changes_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let data_dir = folder.path().join("data");
    let relay = relay_of_all_sorts().await;
    let output = pull(&[&relay], &data_dir).await;
    assert!(output.status.success(), "{}", stderr(&output));
    let text = stdout(&output);
    assert_eq!(text.lines().count(), 5, "{text}");
    let columns: Vec<&str> = text.lines().next().unwrap().split_whitespace().collect();
    assert_eq!(columns, ["one.host.bsky.network", "active", "3"]);
    assert!(!data_dir.exists());

    let json = stdout(&pull(&[&relay, "--json"], &data_dir).await);
    let first: serde_json::Value = serde_json::from_str(json.lines().next().unwrap()).unwrap();
    assert_eq!(first["accountCount"], 3);
}

#[tokio::test(flavor = "multi_thread")]
async fn hosts_pull_adds_what_is_alive_and_public_once() {
    let folder = tempfile::tempdir().unwrap();
    let relay = relay_of_all_sorts().await;
    let output = pull(&[&relay, "--add", "--limit-accounts", "7"], folder.path()).await;
    assert!(output.status.success(), "{}", stderr(&output));
    assert!(
        stderr(&output).contains("2 added, 0 known before, 3 skipped"),
        "{}",
        stderr(&output)
    );
    let text = stdout(&output);
    for (host, outcome) in [
        ("one.host.bsky.network", "added"),
        ("two.example.com", "added"),
        ("gone.example.com", "skipped: not active there"),
        ("bad.example.com", "skipped: banned there"),
        ("10.0.0.1", "skipped: not a public https host"),
    ] {
        let line = text.lines().find(|line| line.starts_with(host)).unwrap();
        assert!(line.ends_with(outcome), "{line}");
    }
    let url = format!("sqlite:{}", folder.path().join("relay.sqlite").display());
    let store = atproto_relay::store::Store::open(&url).await.unwrap();
    let one = store
        .host_by_name("one.host.bsky.network")
        .await
        .unwrap()
        .unwrap();
    assert!(one.trusted && one.tls && one.account_limit == 10_000_000);
    let two = store
        .host_by_name("two.example.com")
        .await
        .unwrap()
        .unwrap();
    assert!(!two.trusted && two.account_limit == 7);
    store.close().await;

    let again = pull(&[&relay, "--add"], folder.path()).await;
    assert!(
        stderr(&again).contains("0 added, 2 known before, 3 skipped"),
        "{}",
        stderr(&again)
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn hosts_pull_makes_no_database_that_nobody_named() {
    let folder = tempfile::tempdir().unwrap();
    let list = relay_of_all_sorts().await;
    let pull = |arguments: &[&str]| {
        let mut command = relay();
        command.current_dir(folder.path());
        command
            .args(["hosts", "pull", &list, "--add"])
            .args(arguments);
        command
    };
    let mut unnamed = pull(&[]);
    tokio::task::spawn_blocking(move || {
        let parts = ["nothing is added", "data/relay.sqlite", "--config", "--to"];
        refused(&mut unnamed, 2, &parts);
    })
    .await
    .unwrap();
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
    // A name is enough, and so is a database that is there. Where they went is told.
    for arguments in [&["--data-dir", "data"][..], &[]] {
        let mut named = pull(arguments);
        let output = tokio::task::spawn_blocking(move || named.output().unwrap())
            .await
            .unwrap();
        let message = stderr(&output);
        assert!(output.status.success(), "{message}");
        assert!(
            message.contains("data/relay.sqlite; a relay takes them up when it starts"),
            "{message}"
        );
        let first = message.lines().next().unwrap();
        assert!(
            first.starts_with("adding to the database sqlite:")
                && first.contains("data/relay.sqlite"),
            "{message}"
        );
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn hosts_pull_says_what_it_needs() {
    let folder = tempfile::tempdir().unwrap();
    let relay_url = relay_of_all_sorts().await;
    let url = relay_url.clone();
    let without_password = move || {
        refused(
            relay().args(["hosts", "pull", &url, "--to", "http://localhost:1"]),
            2,
            &["RELAY_ADMIN_PASSWORD"],
        );
    };
    tokio::task::spawn_blocking(without_password).await.unwrap();
    let both = pull(
        &[&relay_url, "--add", "--to", "http://localhost:1"],
        folder.path(),
    )
    .await;
    assert_eq!(both.status.code(), Some(2));
    let bad = pull(&["http://"], folder.path()).await;
    assert_eq!(bad.status.code(), Some(2), "{}", stderr(&bad));
    let down = TcpListener::bind("127.0.0.1:0")
        .unwrap()
        .local_addr()
        .unwrap()
        .to_string();
    let nobody = pull(&[&format!("http://{down}")], folder.path()).await;
    assert_eq!(nobody.status.code(), Some(1));
    assert!(stderr(&nobody).contains(&down), "{}", stderr(&nobody));
}
