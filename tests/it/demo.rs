//! The demo from its outside: as lines where its output is no terminal, as a screen in a terminal of its own, and what
//! it leaves behind.

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpListener;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};

/// Longest wait for anything: a loaded machine, not a slow program.
const DEADLINE: Duration = Duration::from_secs(60);

/// The demo with its temporary files in a folder.
fn demo(folder: &Path) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_atproto-devnet"));
    command.env_clear().env("TMPDIR", folder);
    command.args(["demo", "--rate", "50"]).stdin(Stdio::null());
    command
}

fn is_empty(folder: &Path) -> bool {
    fs::read_dir(folder).unwrap().count() == 0
}

#[test]
fn it_ends_at_a_signal_with_a_summary_and_leaves_nothing() {
    for signal in [Signal::TERM, Signal::INT, Signal::HUP, Signal::QUIT] {
        let folder = tempfile::tempdir().unwrap();
        let mut child = demo(folder.path())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let set_up = lines.find(|line| line.as_ref().unwrap().contains("events of the set-up"));
        let set_up = set_up.unwrap().unwrap();
        assert_eq!(set_up, "✓ 48 events of the set-up: 12 accounts on 3 PDSes");
        let refused = lines.find(|line| line.as_ref().unwrap().starts_with("✗"));
        let refused = refused.unwrap().unwrap();
        assert!(
            refused.contains("refused by rule ") && refused.contains(".test, sent by pds"),
            "{refused}"
        );
        assert!(!is_empty(folder.path()), "it has its data there");
        kill_process(Pid::from_child(&child), signal).unwrap();
        // Until its end, so that it is no closed pipe that ends it.
        let last = lines.map(Result::unwrap).last().unwrap();
        assert!(
            last.contains(" events forwarded, ") && last.contains(" refused by rule ("),
            "{last}"
        );
        assert_eq!(child.wait().unwrap().code(), Some(0), "{signal:?}");
        assert!(is_empty(folder.path()), "{signal:?}");
    }
}

#[test]
fn it_ends_well_when_nobody_reads_it() {
    let folder = tempfile::tempdir().unwrap();
    let (reader, writer) = std::io::pipe().unwrap();
    let mut command = demo(folder.path());
    // As with `2>&1 | head`.
    command.stdout(writer.try_clone().unwrap()).stderr(writer);
    let mut child = command.spawn().unwrap();
    drop(command);
    let mut lines = BufReader::new(reader).lines();
    assert!(lines.any(|line| line.unwrap().starts_with("✓")));
    drop(lines);
    assert_eq!(child.wait().unwrap().code(), Some(0));
    assert!(is_empty(folder.path()));
}

#[test]
fn it_names_its_own_flag_for_a_port_in_use() {
    let folder = tempfile::tempdir().unwrap();
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = taken.local_addr().unwrap().port().to_string();
    let output = demo(folder.path())
        .args(["--port", &port])
        .output()
        .unwrap();
    let message = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1), "{message}");
    assert!(
        message.contains(&port) && message.contains("--port"),
        "{message}"
    );
    assert!(!message.contains("--listen"), "{message}");
    assert!(is_empty(folder.path()));
}

#[test]
fn it_takes_another_port_where_its_usual_one_is_in_use_and_its_commands_work_as_they_are_pasted() {
    // Whoever else has it will do as well.
    let _taken = TcpListener::bind("127.0.0.1:2470");
    let folder = tempfile::tempdir().unwrap();
    let mut child = demo(folder.path())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap())
        .lines()
        .map(Result::unwrap);
    let header: Vec<String> = lines
        .by_ref()
        .take_while(|line| !line.starts_with("─"))
        .collect();
    let place = |name: &str| {
        let line = header.iter().find(|line| line.trim().starts_with(name));
        line.unwrap_or_else(|| panic!("{name}: {header:#?}"))
    };
    assert!(
        place("relay").contains("port 2470 is in use; --port chooses another"),
        "{header:#?}"
    );
    for name in [
        "firehose",
        "metrics",
        "admin API",
        "PLC directory",
        "pds1.test",
        "pds3.test",
    ] {
        assert!(place(name).contains("://127.0.0.1:"), "{header:#?}");
    }
    let text = header.join("\n").replace("\\\n", " ");
    let pasted = |part: &str| {
        let line = text.lines().find(|line| line.contains(part)).unwrap();
        line.trim().to_owned()
    };
    assert!(pasted("--verify").starts_with(env!("CARGO_BIN_EXE_atproto-relay")));
    for (part, expected) in [
        (" --verify ", "[valid]"),
        (" --collection ", "\"$type\":\"app.bsky.feed.post\""),
    ] {
        let command = format!("{} --limit 5", pasted(part));
        let output = Command::new("sh").args(["-c", &command]).output().unwrap();
        let (text, said) = (
            String::from_utf8_lossy(&output.stdout),
            String::from_utf8_lossy(&output.stderr),
        );
        assert_eq!(output.status.code(), Some(0), "{command}: {text}{said}");
        assert!(text.contains(expected), "{command}: {text}");
    }
    kill_process(Pid::from_child(&child), Signal::TERM).unwrap();
    lines.for_each(drop);
    assert_eq!(child.wait().unwrap().code(), Some(0));
}

/// The demo in a terminal that script(1) makes.
struct Terminal {
    child: Child,
    shown: Arc<Mutex<String>>,
}

impl Terminal {
    /// None where script(1) is not here.
    fn start(folder: &Path, environment: &[(&str, &str)]) -> Option<Terminal> {
        let mut command = Command::new("script");
        let demo = format!(
            "stty rows 40 cols 110; sh -c 'echo pid=$$; exec {} demo --rate 50'; echo rc=$?; stty -a",
            env!("CARGO_BIN_EXE_atproto-devnet")
        );
        command.args(["-qec", &demo, "/dev/null"]);
        command.stdin(Stdio::piped()).stdout(Stdio::piped());
        command.env_remove("NO_COLOR").env("TERM", "xterm");
        command
            .envs(environment.iter().copied())
            .env("TMPDIR", folder);
        let Ok(mut child) = command.spawn() else {
            println!("skipped: script(1) is not here to make a terminal");
            return None;
        };
        let mut stdout = child.stdout.take().unwrap();
        let shown = Arc::new(Mutex::new(String::new()));
        let writer = shown.clone();
        std::thread::spawn(move || {
            let mut buffer = [0; 4096];
            while let Ok(length @ 1..) = stdout.read(&mut buffer) {
                let text = String::from_utf8_lossy(&buffer[..length]);
                writer.lock().unwrap().push_str(&text);
            }
        });
        Some(Terminal { child, shown })
    }

    fn shown(&self) -> String {
        self.shown.lock().unwrap().clone()
    }

    /// Waits until there is so much.
    fn wait_for(&self, part: &str) {
        let deadline = Instant::now() + DEADLINE;
        while !self.shown().contains(part) {
            assert!(Instant::now() < deadline, "no `{part}`: {}", self.shown());
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    fn press(&mut self, key: &str) {
        let stdin = self.child.stdin.as_mut().unwrap();
        stdin.write_all(key.as_bytes()).unwrap();
        stdin.flush().unwrap();
    }

    /// Waits for the end of the demo, and sees that the terminal is as it was.
    fn ended(&self) -> String {
        self.wait_for("rc=");
        self.wait_for(" iexten ");
        let shown = self.shown();
        assert!(shown.contains("rc=0"), "{shown}");
        let settings = shown.rsplit("rc=0").next().unwrap();
        for setting in [" icanon ", " echo "] {
            assert!(settings.contains(setting), "{settings}");
        }
        shown
    }

    fn pid(&self) -> Pid {
        self.wait_for("pid=");
        let shown = self.shown();
        let line = shown.split("pid=").nth(1).unwrap().lines().next().unwrap();
        Pid::from_raw(line.trim().parse().unwrap()).unwrap()
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        // It may have ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Takes the terminal over, and gives it back.
const ENTER: &str = "\u{1b}[?1049h";
const LEAVE: &str = "\u{1b}[?1049l";

#[test]
fn on_a_terminal_a_key_press_forges_a_commit_and_the_relay_refuses_it() {
    let folder = tempfile::tempdir().unwrap();
    let Some(mut terminal) = Terminal::start(folder.path(), &[]) else {
        return;
    };
    terminal.wait_for("Enter or f: send a forged commit");
    terminal.wait_for("events of the set-up");
    terminal.wait_for("events/s   lag ");
    for (key, count) in [("f", 1), ("\n", 2), ("f", 3)] {
        terminal.press(key);
        let deadline = Instant::now() + DEADLINE;
        while terminal.shown().matches("! on your key press, pds").count() < count {
            assert!(Instant::now() < deadline, "{}", terminal.shown());
            std::thread::sleep(Duration::from_millis(20));
        }
    }
    terminal.wait_for("✗ refused by rule signature: ");
    terminal.wait_for("✗ refused by rule block_hash: ");
    terminal.wait_for("\u{1b}[32m✓");
    terminal.press("q");
    let shown = terminal.ended();
    assert!(shown.contains(ENTER), "{shown}");
    let last = shown.rsplit(LEAVE).next().unwrap();
    assert!(last.contains(" events forwarded, "), "{last}");
    assert!(is_empty(folder.path()));
}

#[test]
fn a_signal_gives_the_terminal_back() {
    for signal in [Signal::TERM, Signal::INT] {
        let folder = tempfile::tempdir().unwrap();
        let Some(terminal) = Terminal::start(folder.path(), &[]) else {
            return;
        };
        terminal.wait_for("events of the set-up");
        kill_process(terminal.pid(), signal).unwrap();
        let shown = terminal.ended();
        assert!(shown.contains(LEAVE), "{shown}");
        assert!(is_empty(folder.path()), "{signal:?}");
    }
}

#[test]
fn where_no_colours_are_wanted_it_prints_lines_without_escapes() {
    for (name, value) in [("NO_COLOR", "1"), ("TERM", "dumb")] {
        let folder = tempfile::tempdir().unwrap();
        let Some(mut terminal) = Terminal::start(folder.path(), &[(name, value)]) else {
            return;
        };
        terminal.wait_for("events of the set-up");
        terminal.press("\n");
        terminal.wait_for("! on your key press, ");
        terminal.wait_for("✗ refused by rule signature: ");
        terminal.press("q\n");
        let shown = terminal.ended();
        assert!(!shown.contains("\u{1b}["), "{name}: {shown}");
        assert!(is_empty(folder.path()));
    }
}
