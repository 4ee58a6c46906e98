//! `atproto-relay log` from its outside: what it says of whole and of damaged logs, beside a relay at work,
//! and what a repair leaves.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::atomic::{AtomicBool, Ordering};

use crate::support::event::{Event, RunningLog, did, eventually, quick_folder};
use atproto_relay::atproto::did::Did;
use atproto_relay::eventlog::{self, EventLog, Fate, Folder, LogOptions, Origin};
use serde_json::Value;

/// Options of a log in the data folder `data`, with small segments.
fn options(data: &Path) -> LogOptions {
    LogOptions {
        segment_bytes: 4096,
        ..LogOptions::new(data.join("log"))
    }
}

fn events(count: i64) -> Vec<Event> {
    (0..count)
        .map(|n| Event::identity(n as u64 % 4, [0, 10, 200, 700][n as usize % 4], n + 1000))
        .collect()
}

/// A closed log of `count` events.
fn closed(data: &Path, count: i64) -> Vec<Event> {
    let log = RunningLog::open(options(data));
    let all = events(count);
    for batch in all.chunks(7) {
        log.append(batch);
    }
    log.close();
    all
}

fn tool(arguments: &[&str], data: &Path) -> Output {
    Command::new(env!("CARGO_BIN_EXE_atproto-relay"))
        .env_clear()
        .arg("log")
        .args(arguments)
        .arg("--data-dir")
        .arg(data)
        .output()
        .expect("the binary runs")
}

fn stdout(output: &Output) -> String {
    String::from_utf8(output.stdout.clone()).expect("text")
}

/// What it printed, with exit code 0.
fn good(arguments: &[&str], data: &Path) -> String {
    let output = tool(arguments, data);
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(0), "{arguments:?}: {said}");
    stdout(&output)
}

/// What it printed, and its one line of error, with exit code 1.
fn bad(arguments: &[&str], data: &Path) -> (String, String) {
    let output = tool(arguments, data);
    let said = String::from_utf8(output.stderr.clone()).expect("text");
    assert_eq!(output.status.code(), Some(1), "{arguments:?}: {said}");
    assert_eq!(said.lines().count(), 1, "{said}");
    (stdout(&output), said)
}

fn files(data: &Path, extension: &str) -> Vec<PathBuf> {
    let mut paths: Vec<_> = fs::read_dir(data.join("log"))
        .expect("the folder")
        .map(|file| file.expect("a file").path())
        .filter(|path| path.extension().is_some_and(|it| it == extension))
        .collect();
    paths.sort();
    paths
}

/// All files of the log with their bytes.
fn snapshot(data: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    fs::read_dir(data.join("log"))
        .expect("the folder")
        .map(|file| file.expect("a file").path())
        .map(|path| (path.clone(), fs::read(path).expect("a file")))
        .collect()
}

fn redact(log: &EventLog, account: u64, up_to: u64) {
    let did = Did::parse(&did(account)).expect("a DID");
    log.redact(&did, up_to).expect("redacts");
    eventually("the punching", || log.redactions_pending() == 0);
}

#[test]
fn a_log_in_use_is_shown_checked_and_dumped_and_not_repaired() {
    let data = tempfile::tempdir().expect("a folder");
    let log = RunningLog::open(options(data.path()));
    let all = events(60);
    log.append(&all);
    redact(&log.log, 1, 30);
    let before = snapshot(data.path());

    let info: Value = serde_json::from_str(&good(&["info", "--json"], data.path())).expect("JSON");
    assert_eq!(
        (&info["firstSeq"], &info["lastSeq"]),
        (&1.into(), &60.into())
    );
    assert_eq!(info["kinds"]["#identity"], 60);
    assert_eq!(
        (&info["redacted"], &info["damaged"]),
        (&8.into(), &0.into())
    );
    assert_eq!(info["segments"], files(data.path(), "seg").len());
    let frames: usize = (1..).zip(&all).map(|(seq, it)| it.wire(seq).len()).sum();
    assert_eq!(info["frameBytes"], frames);
    assert_eq!(info["bytesPerEvent"], (frames + 64 * 60) / 60);
    let text = good(&["info"], data.path());
    assert!(text.contains("window     1 to 60, 20"), "{text}");
    assert!(
        text.contains("60: 0 #commit, 0 #sync, 60 #identity"),
        "{text}"
    );

    let text = good(&["verify"], data.path());
    assert!(
        text.contains("60 events") && text.contains("8 events redacted"),
        "{text}"
    );

    let lines = good(&["dump", "--from", "5", "--to", "9"], data.path());
    let lines: Vec<Value> = lines
        .lines()
        .map(|line| serde_json::from_str(line).expect("JSON"))
        .collect();
    let seqs: Vec<_> = lines.iter().map(|line| &line["seq"]).collect();
    assert_eq!(seqs, [5, 6, 7, 8, 9]);
    assert_eq!(lines[0]["did"], did(0));
    assert_eq!(
        (&lines[0]["host"], &lines[0]["upstreamSeq"]),
        (&7.into(), &1004.into())
    );
    assert_eq!(
        (&lines[0]["kind"], &lines[0]["state"]),
        (&"#identity".into(), &"served".into())
    );
    assert_eq!(lines[0]["length"], all[4].wire(5).len());
    assert!(
        lines[0]["time"]
            .as_str()
            .is_some_and(|it| it.ends_with('Z'))
    );
    assert_eq!(
        (&lines[1]["did"], &lines[1]["state"]),
        (&Value::Null, &"redacted".into())
    );

    let one = good(&["dump", "--did", &did(1)], data.path());
    assert_eq!(one.lines().count(), 15, "{one}");
    assert_eq!(one.matches("\"redacted\"").count(), 8, "{one}");
    assert_eq!(
        good(&["dump", "--limit", "3"], data.path()).lines().count(),
        3
    );
    let raw = tool(
        &["dump", "--raw", "--from", "5", "--limit", "3"],
        data.path(),
    )
    .stdout;
    let expected = [5, 7, 8].map(|seq| all[seq - 1].wire(seq as u64)).concat();
    assert!(raw == expected, "raw frames, without the redacted one");

    for arguments in [&["repair"][..], &["repair", "--dry-run"]] {
        let (_, said) = bad(arguments, data.path());
        assert!(said.contains("in use by another relay"), "{said}");
    }
    assert_eq!(snapshot(data.path()), before, "nothing was changed");
    // The log's own folder will do, too.
    good(&["verify"], &data.path().join("log"));
    log.close();
}

#[test]
fn a_folder_that_is_no_log_is_named() {
    let data = tempfile::tempdir().expect("a folder");
    for command in ["info", "verify", "dump", "repair"] {
        let (_, said) = bad(&[command], data.path());
        assert!(
            said.contains("holds no event log") && said.contains("--data-dir"),
            "{said}"
        );
        let (_, said) = bad(&[command], &data.path().join("nowhere"));
        assert!(
            said.contains("there is no folder") && said.contains("nowhere"),
            "{said}"
        );
    }
    let nothing: Vec<_> = fs::read_dir(data.path()).expect("the folder").collect();
    assert!(nothing.is_empty(), "{nothing:?}");
}

/// Damages a file of the log.
fn change(path: &Path, damage: impl FnOnce(&mut Vec<u8>)) {
    let mut bytes = fs::read(path).expect("a file");
    damage(&mut bytes);
    fs::write(path, bytes).expect("a file");
}

/// Holds the lines of `log verify` against its objects.
fn same_as_json(lines: &str, json: &str) {
    let objects: Vec<Value> = json
        .lines()
        .map(|line| serde_json::from_str(line).expect("JSON"))
        .collect();
    let (figures, problems) = objects.split_last().expect("the figures come last");
    assert_eq!(figures["problems"], problems.len());
    assert_eq!(lines.lines().count(), objects.len());
    for (line, object) in lines.lines().zip(problems) {
        for key in ["file", "problem"] {
            let part = object[key].as_str().expect("a text");
            assert!(line.contains(part), "{line}: {object}");
        }
        let seq = object["seq"].as_u64();
        assert_eq!(seq.is_some(), line.contains(": seq "), "{line}: {object}");
    }
}

#[test]
fn one_is_one_and_hosts_have_their_names() {
    let data = quick_folder();
    closed(data.path(), 1);
    let said = good(&["verify"], data.path());
    assert!(said.starts_with("1 segment, 1 event, "), "{said}");
    let said = good(&["repair"], data.path());
    assert!(said.starts_with("1 segment, 1 event: "), "{said}");

    let dumped =
        |data: &Path| -> Value { serde_json::from_str(&good(&["dump"], data)).expect("JSON") };
    assert_eq!(dumped(data.path())["hostname"], Value::Null);
    let line = "7 wss pds7.example.com";
    let line = format!("{line} {:08x}\n", crc32fast::hash(line.as_bytes()));
    fs::write(data.path().join("log/hosts"), line).expect("a file");
    let event = dumped(data.path());
    assert_eq!(
        (&event["host"], &event["hostname"]),
        (&7.into(), &"pds7.example.com".into())
    );
}

#[test]
fn every_damage_is_found_and_mended_and_costs_no_other_event() {
    type Damage = fn(&Path);
    // What is done to the second of several segments, what is said of it, and how many events are lost.
    let cases: [(&str, Damage, &str, u64); 12] = [
        (
            "a frame's content",
            |data| change(&files(data, "seg")[1], |it| it[100] ^= 1),
            "its checksum differs",
            1,
        ),
        (
            "a frame's header",
            |data| change(&files(data, "seg")[1], |it| it[0] ^= 1),
            "its checksum differs",
            1,
        ),
        (
            "an entry",
            |data| change(&files(data, "idx")[1], |it| it[64 + 9] ^= 1),
            "the entry is damaged",
            0,
        ),
        (
            "the index's header",
            |data| change(&files(data, "idx")[1], |it| it[3] ^= 1),
            "the header of the index is damaged",
            0,
        ),
        (
            "the index",
            |data| fs::remove_file(&files(data, "idx")[1]).expect("an index"),
            "its frames are there",
            0,
        ),
        (
            "the last segment's index",
            |data| fs::remove_file(files(data, "idx").last().expect("segments")).expect("an index"),
            "its frames are there",
            0,
        ),
        (
            "the end of the index",
            |data| change(&files(data, "idx")[1], |it| it.truncate(64 * 4)),
            "have no entries",
            0,
        ),
        (
            "the end of the frames",
            |data| change(&files(data, "seg")[1], |it| it.truncate(it.len() - 1)),
            "behind the end of the file",
            1,
        ),
        (
            "more than the frames",
            |data| change(&files(data, "seg")[1], |it| it.extend(b"more")),
            "4 bytes lie behind the last event",
            0,
        ),
        (
            "an account index",
            |data| {
                change(&files(data, "acc")[1], |it| {
                    *it.last_mut().expect("bytes") ^= 1
                })
            },
            "not that of the segment's events",
            0,
        ),
        (
            "another segment's account index",
            |data| {
                let files = files(data, "acc");
                fs::copy(&files[0], &files[1]).expect("a file");
            },
            "not that of the segment's events",
            0,
        ),
        (
            "the last segment's frames",
            |data| {
                change(files(data, "seg").last().expect("segments"), |it| {
                    it[100] ^= 1
                })
            },
            "its checksum differs",
            1,
        ),
    ];
    for (name, damage, expected, lost) in cases {
        let data = quick_folder();
        let all = closed(data.path(), 60);
        damage(data.path());
        let (json, _) = bad(&["verify", "--json"], data.path());
        let (said, error) = bad(&["verify"], data.path());
        same_as_json(&said, &json);
        assert!(said.contains(expected), "{name}: {said}");
        assert!(error.contains("log repair"), "{name}: {error}");
        let before = snapshot(data.path());
        let would = good(&["repair", "--dry-run"], data.path());
        let json = good(&["repair", "--dry-run", "--json"], data.path());
        let json: Value = serde_json::from_str(&json).expect("JSON");
        let lines = |key: &str| json[key].as_array().expect("a list").len();
        assert_eq!(
            lines("repairs") + lines("leftovers") + lines("unused") + 1,
            would.lines().count(),
            "{name}: {json}"
        );
        assert_eq!(json["dryRun"], true, "{name}");
        assert!(
            would.contains("would") && would.contains("nothing was changed"),
            "{name}: {would}"
        );
        assert_eq!(snapshot(data.path()), before, "{name}");
        let did = good(&["repair"], data.path());
        assert_eq!(
            did.replace(": did ", ": would ").lines().next(),
            would.lines().next(),
            "{name}"
        );
        let said = good(&["verify"], data.path());
        assert_eq!(
            said.contains(&format!("{lost} event marked as lost")),
            lost > 0,
            "{name}: {said}"
        );
        let again = good(&["repair"], data.path());
        assert!(again.contains("nothing to repair"), "{name}: {again}");

        let log = EventLog::open(options(data.path())).expect("opens");
        assert_eq!((log.oldest(), log.head()), (Some(1), 60), "{name}");
        assert_eq!(log.entries(1).count() as u64, 60 - lost, "{name}");
        for entry in log.entries(1) {
            let (entry, frame) = entry.expect("an entry");
            assert_eq!(
                frame,
                all[entry.seq as usize - 1].frame(entry.seq).0,
                "{name}"
            );
        }
    }
}

#[test]
fn an_event_put_in_place_of_another_is_found() {
    let data = quick_folder();
    let log = RunningLog::open(LogOptions {
        segment_bytes: 1 << 20,
        ..options(data.path())
    });
    let all: Vec<_> = (0..9).map(|n| Event::identity(n, 100, 1)).collect();
    log.append(&all);
    log.close();
    let frame = all[0].wire(1).len();
    // Both are whole in themselves, and of one length.
    change(&files(data.path(), "seg")[0], |it| {
        it.copy_within(..frame, frame)
    });
    let crc = crc32fast::hash(&all[0].wire(1));
    change(&files(data.path(), "idx")[0], |it| {
        let entry = &mut it[2 * 64..3 * 64];
        entry[48..52].copy_from_slice(&crc.to_le_bytes());
        let sum = crc32fast::hash(&entry[..60]);
        entry[60..].copy_from_slice(&sum.to_le_bytes());
    });
    let (said, _) = bad(&["verify"], data.path());
    assert!(
        said.contains("seq 2: offset") && said.contains("says that it is event 1"),
        "{said}"
    );
}

#[test]
fn a_redaction_that_left_its_bytes_is_found() {
    let data = quick_folder();
    let all = closed(data.path(), 20);
    change(&files(data.path(), "idx")[0], |it| it[64 * 3 + 53] = 0xa5);
    let (said, _) = bad(&["verify"], data.path());
    assert!(
        said.contains("seq 3") && said.contains("its bytes are still there"),
        "{said}"
    );
    // Where a redaction is still to be carried out, that is as it should be.
    let text = format!("20 {}", all[2].did);
    let line = format!("{text} {:08x}\n", crc32fast::hash(text.as_bytes()));
    fs::write(data.path().join("log/redactions"), line).expect("the journal");
    good(&["verify"], data.path());
    let info = good(&["info"], data.path());
    assert!(info.contains("1 redaction pending"), "{info}");
    // And readers do not get what it covers.
    let dumped = good(&["dump", "--did", &all[2].did], data.path());
    assert_eq!(dumped.matches("\"redacted\"").count(), 5, "{dumped}");
}

#[test]
fn what_a_crash_left_behind_is_no_problem_and_is_cut() {
    let data = quick_folder();
    closed(data.path(), 20);
    let last = files(data.path(), "seg").pop().expect("segments");
    change(&last, |it| {
        it.extend(Event::identity(1, 50, 1).wire(21));
        it.extend([0; 5000]);
    });
    let last = files(data.path(), "idx").pop().expect("segments");
    change(&last, |it| it.extend([0; 640]));
    let said = good(&["verify"], data.path());
    assert!(said.contains("bytes behind the last event"), "{said}");
    let did = good(&["repair"], data.path());
    assert!(did.contains("bytes behind the last event"), "{did}");
    let said = good(&["verify"], data.path());
    assert!(!said.contains("behind"), "{said}");
    // What retention left goes, too.
    fs::write(data.path().join("log/00000000000000000001.idx"), []).expect("a file");
    fs::remove_file(data.path().join("log/00000000000000000001.seg")).expect("frames");
    let did = good(&["repair"], data.path());
    assert!(did.contains("00000000000000000001.idx: removed"), "{did}");
    assert!(!data.path().join("log/00000000000000000001.idx").exists());
}

#[test]
fn an_index_comes_back_also_around_what_was_punched_out() {
    let data = quick_folder();
    let log = RunningLog::open(LogOptions {
        segment_bytes: 1 << 20,
        ..options(data.path())
    });
    let mut all = events(40);
    all.push(Event::identity(2, 30, 5000));
    log.append(&all);
    redact(&log.log, 1, 40);
    redact(&log.log, 2, 40);
    log.close();
    fs::remove_file(&files(data.path(), "idx")[0]).expect("an index");
    let log = EventLog::open(options(data.path())).expect("opens");
    assert_eq!(log.head(), 41);
    let left: Vec<_> = log
        .entries(1)
        .map(|it| it.expect("an entry").0.seq)
        .collect();
    let expected: Vec<_> = (1..=41)
        .filter(|seq| *seq == 41 || [1, 0].contains(&(seq % 4)))
        .collect();
    assert_eq!(left, expected);
    drop(log);
    good(&["verify"], data.path());
}

#[test]
fn numbers_of_a_segment_that_lost_its_frames_are_not_given_again() {
    for which in [1, usize::MAX] {
        let data = quick_folder();
        let all = closed(data.path(), 60);
        let segments = files(data.path(), "seg");
        let lost = &segments[which.min(segments.len() - 1)];
        fs::remove_file(lost).expect("frames");
        let (said, _) = bad(&["verify"], data.path());
        assert!(
            said.contains("no such file, but its index is there"),
            "{said}"
        );
        assert_eq!(said.matches("no such file").count(), 1, "{said}");
        let log = RunningLog::open(options(data.path()));
        assert_eq!((log.log.oldest(), log.log.head()), (Some(1), 60));
        assert_eq!(log.append(&all[..1]), [61]);
        let kept = log
            .log
            .entries(1)
            .and_redacted()
            .map(|it| it.expect("an entry"));
        // Host and upstream sequence number are known still, so that their host's replays are.
        let kept: Vec<_> = kept.map(|(entry, _)| entry.origin).collect();
        let expected = all.iter().chain(&all[..1]).map(|it| Origin::Host {
            id: 7,
            seq: it.upstream_seq,
        });
        assert!(kept.into_iter().eq(expected));
        log.close();
        good(&["verify"], data.path());
    }
}

/// All that the tools do, which must find nothing wrong.
fn look(folder: &Path) {
    let looked = Folder::open(folder).expect("a log");
    let mut flaws = Vec::new();
    let audit = looked.audit(&mut |flaw| flaws.push(flaw.to_string()), &mut || {});
    assert_eq!(flaws, [""; 0]);
    assert!(audit.events > 0);
    let looked = Folder::open(folder).expect("a log");
    let mut next = 0;
    for event in looked.events(1) {
        let event = event.expect("an event");
        // Retention may take the segments that are read next.
        assert!(next <= event.seq);
        assert_ne!(event.fate, Fate::Damaged, "seq {}", event.seq);
        next = event.seq + 1;
    }
    looked.summary().expect("a summary");
}

/// A relay creates a segment's frames before its index.
#[test]
fn a_segment_that_is_just_being_begun_is_no_flaw() {
    let data = quick_folder();
    let all = closed(data.path(), 60);
    let log = data.path().join("log");
    fs::write(log.join("00000000000000000061.seg"), "").expect("frames");
    look(&log);
    assert_eq!(
        Folder::open(&log).expect("a log").events(1).count(),
        all.len()
    );
}

#[test]
fn tools_beside_a_log_at_work_find_nothing_wrong() {
    let data = quick_folder();
    let log = RunningLog::open(LogOptions {
        max_bytes: 200_000,
        ..options(data.path())
    });
    log.append(&events(10));
    let folder = data.path().join("log");
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let looking = scope.spawn(|| {
            let mut looks = 0;
            while !done.load(Ordering::Acquire) {
                look(&folder);
                looks += 1;
            }
            looks
        });
        for (round, batch) in events(6000).chunks(5).enumerate() {
            log.append(batch);
            if round % 20 == 0 {
                let account = Did::parse(&did(round as u64 / 20 % 3)).expect("a DID");
                log.log.redact(&account, log.log.head()).expect("redacts");
            }
        }
        done.store(true, Ordering::Release);
        assert!(looking.join().expect("nothing was found") > 0);
    });
    assert!(log.log.oldest() > Some(1), "retention was at work");
    log.close();
    assert!(
        eventlog::repair(&folder, false, &mut || {})
            .expect("repairs")
            .repairs
            .is_empty()
    );
}
