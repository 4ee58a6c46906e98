//! What is left of a relay's data after worse than a crash: a database that is lost or old, a log that is lost or has
//! lost its end, a second relay on the same data. It starts, or says why not and what to do; nothing that is left is
//! lost, and no number is given twice.

#![cfg(feature = "devnet")]

use crate::support::postgres;
use atproto_relay::dial::plain_client;
use std::collections::BTreeMap;
use std::fs::{self, OpenOptions};
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::mpsc::sync_channel;
use std::time::Duration;

use crate::support::process::{
    Consumer, HOSTS, PASSWORD, PATIENCE, POSTS, Traffic, all_once_and_in_order, post, seq_of,
    start, start_binary, until_connected,
};
use atproto_relay::atproto::did::Did;
use atproto_relay::atproto::frame::{self, Kind, Peek};
use atproto_relay::devnet::load::{ProcessError, RelayProcess};
use atproto_relay::devnet::pds::Pds;
use atproto_relay::eventlog::{Append, EventLog, LogOptions, Origin, sequencer};
use atproto_relay::store::{Batch, LocalStatus, NewHost, Store};
use bytes::Bytes;
use futures_util::StreamExt;
use serde_json::{Value, json};
use sqlx::{AssertSqlSafe, Connection, PgConnection, SqliteConnection};
use tokio::time::timeout;
use tokio_tungstenite::connect_async;
use tokio_tungstenite::tungstenite::Message;

/// How often the log's end is cut.
const CUTS: u64 = 10;

fn data(folder: &tempfile::TempDir) -> PathBuf {
    folder.path().join("data")
}

fn log(folder: &tempfile::TempDir) -> PathBuf {
    data(folder).join("log")
}

/// The files of a folder's SQLite database, to where they are copied.
fn copy_database(from: &Path, to: &Path) {
    for name in ["relay.sqlite", "relay.sqlite-wal", "relay.sqlite-shm"] {
        // What the copy does not have must not stay.
        let _ = fs::remove_file(to.join(name));
        if from.join(name).exists() {
            fs::copy(from.join(name), to.join(name)).unwrap();
        }
    }
}

/// The database of a relay that is down, a new one where there is none.
async fn database(folder: &tempfile::TempDir) -> Store {
    let database = format!("sqlite:{}", data(folder).join("relay.sqlite").display());
    Store::open(&database).await.unwrap()
}

/// Waits until the database knows that the log's numbers up to `seq` were given out.
async fn until_counted(folder: &tempfile::TempDir, seq: u64) {
    let store = database(folder).await;
    let wait = async { while store.log_head().await.unwrap() < seq {} };
    timeout(PATIENCE, wait)
        .await
        .expect("the position is written");
}

/// Asks the relay something as an operator.
async fn admin(relay: &RelayProcess, path: &str, body: Value) {
    let request = atproto_relay::dial::plain_client()
        .post(format!("{}{path}", relay.url()))
        .basic_auth("admin", Some(PASSWORD))
        .json(&body);
    let answer = request.send().await.unwrap();
    assert_eq!(answer.status().as_u16(), 200);
}

async fn status_of(relay: &RelayProcess, did: &str) -> Value {
    let url = format!(
        "{}/xrpc/com.atproto.sync.getRepoStatus?did={did}",
        relay.url()
    );
    plain_client()
        .get(url)
        .send()
        .await
        .unwrap()
        .json()
        .await
        .unwrap()
}

/// Everything from `cursor` up to the event that holds `text`, and the names of the infos before it.
async fn read_until(
    relay: &RelayProcess,
    cursor: u64,
    text: &str,
) -> (BTreeMap<u64, Bytes>, usize) {
    let url = format!(
        "{}/xrpc/com.atproto.sync.subscribeRepos?cursor={cursor}",
        relay.firehose()
    );
    let (mut socket, _) = connect_async(url).await.unwrap();
    let (mut events, mut infos) = (BTreeMap::new(), 0);
    let read = async {
        while let Some(Ok(message)) = socket.next().await {
            let Message::Binary(frame) = message else {
                continue;
            };
            if contains(&frame, b"OutdatedCursor") {
                infos += 1;
                continue;
            }
            let last = contains(&frame, text.as_bytes());
            let before = events.insert(seq_of(&frame), frame);
            assert!(before.is_none(), "a number twice");
            if last {
                return;
            }
        }
        panic!("the connection ended");
    };
    timeout(PATIENCE, read).await.expect("the event comes");
    (events, infos)
}

fn contains(frame: &[u8], text: &[u8]) -> bool {
    frame.windows(text.len()).any(|window| window == text)
}

/// A record of its own text, so that its event is known when it comes.
fn write(pds: &Pds, did: &Did, text: &str) {
    pds.create_record(did, POSTS, post(text)).unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_lost_database_comes_back_from_the_log() {
    let (network, mut relay, folder) = start(HOSTS, None).await;
    let consumer = Consumer::start(relay.firehose());
    let traffic = Traffic::start(&network);
    for loss in 1..=3 {
        consumer.has(consumer.events() + 150 * loss).await;
        relay.kill().unwrap();
        copy_database(Path::new("/nonexistent"), &data(&folder));
        relay.restart(PATIENCE).await.unwrap();
        assert!(
            relay.said().contains("come back from the log"),
            "{}",
            relay.said()
        );
    }
    let sent = traffic.stop(&network).await;
    consumer.has(sent).await;
    all_once_and_in_order(&network, &consumer.frames.lock().unwrap());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_old_database_is_brought_up_to_date_from_the_log() {
    let (network, mut relay, folder) = start(HOSTS, None).await;
    let copy = tempfile::tempdir().unwrap();
    let consumer = Consumer::start(relay.firehose());
    let traffic = Traffic::start(&network);
    consumer.has(100).await;
    relay.kill().unwrap();
    copy_database(&data(&folder), copy.path());
    relay.restart(PATIENCE).await.unwrap();
    for _ in 0..3 {
        consumer.has(consumer.events() + 250).await;
        relay.kill().unwrap();
        copy_database(copy.path(), &data(&folder));
        relay.restart(PATIENCE).await.unwrap();
    }
    let sent = traffic.stop(&network).await;
    consumer.has(sent).await;
    all_once_and_in_order(&network, &consumer.frames.lock().unwrap());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn databases_on_postgres_come_back_likewise() {
    let Some(server) = postgres::server() else {
        return;
    };
    let url = server.database().await;
    let (path, _) = url.split_once('?').unwrap();
    let name = path.rsplit('/').next().unwrap().to_owned();
    let (network, mut relay, _folder) = start(HOSTS, Some(url)).await;
    let consumer = Consumer::start(relay.firehose());
    let traffic = Traffic::start(&network);
    let mut server = PgConnection::connect(&server.url("postgres"))
        .await
        .unwrap();
    let copy = format!("{name}_copy");
    consumer.has(100).await;
    relay.kill().unwrap();
    until_unused(&mut server, &name).await;
    run(
        &mut server,
        format!("CREATE DATABASE {copy} TEMPLATE {name}"),
    )
    .await;
    relay.restart(PATIENCE).await.unwrap();
    for template in [&copy, "template1", &copy] {
        consumer.has(consumer.events() + 250).await;
        relay.kill().unwrap();
        until_unused(&mut server, &name).await;
        run(&mut server, format!("DROP DATABASE {name}")).await;
        run(
            &mut server,
            format!("CREATE DATABASE {name} TEMPLATE {template}"),
        )
        .await;
        relay.restart(PATIENCE).await.unwrap();
    }
    let sent = traffic.stop(&network).await;
    consumer.has(sent).await;
    all_once_and_in_order(&network, &consumer.frames.lock().unwrap());
}

async fn run(server: &mut PgConnection, statement: String) {
    sqlx::query(AssertSqlSafe(statement))
        .execute(server)
        .await
        .unwrap();
}

/// Waits until the server has noticed the end of every session of a database.
async fn until_unused(server: &mut PgConnection, database: &str) {
    let wait = async {
        loop {
            let (sessions,): (i64,) =
                sqlx::query_as("SELECT count(*) FROM pg_stat_activity WHERE datname = $1")
                    .bind(database)
                    .fetch_one(&mut *server)
                    .await
                    .unwrap();
            if sessions == 0 {
                return;
            }
        }
    };
    timeout(PATIENCE, wait).await.expect("the sessions end");
}

/// Accounts, and an operator's word on them, are in the log, too.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_takedown_outlives_the_loss_of_the_database() {
    let (network, mut relay, folder) = start(1, None).await;
    let consumer = Consumer::start(relay.firehose());
    let pds = network.pds(0);
    let [alice, bob, carol] = ["alice", "bob", "carol"].map(|name| {
        pds.create_account(&format!("{name}.pds1.test"))
            .unwrap()
            .did
    });
    consumer.has(12).await;
    admin(
        &relay,
        "/admin/repo/takeDown",
        json!({"did": alice.as_str()}),
    )
    .await;
    pds.deactivate(&bob).unwrap();
    consumer.has(14).await;
    relay.kill().unwrap();
    copy_database(Path::new("/nonexistent"), &data(&folder));
    relay.restart(PATIENCE).await.unwrap();
    for (did, active, status) in [
        (&alice, false, json!("takendown")),
        (&bob, false, json!("deactivated")),
        (&carol, true, Value::Null),
    ] {
        let answer = status_of(&relay, did.as_str()).await;
        assert_eq!(
            (&answer["active"], &answer["status"]),
            (&json!(active), &status),
            "{answer}"
        );
    }
    // And it holds: what she writes does not come out.
    write(pds, &alice, "not to be seen");
    write(pds, &carol, "to be seen");
    let (events, _) = read_until(&relay, 0, "to be seen").await;
    assert!(
        events
            .values()
            .all(|frame| !contains(frame, b"not to be seen"))
    );
}

/// Appends an event to the log of a relay that is down, and nothing of what follows from it is done.
fn append(log: &Path, did: &Did, frame: Bytes, origin: Origin) {
    let Ok(Peek::Event(event)) = frame::peek(&frame) else {
        panic!("not an event");
    };
    let log = EventLog::open(LogOptions::new(log)).unwrap();
    let (sender, rx) = sync_channel(1);
    let sequencer = sequencer::spawn(log, rx, |_: Vec<(u64, ())>| {}).unwrap();
    let event = Append {
        frame,
        seq_span: event.seq_span,
        origin,
        did: did.clone(),
        kind: event.kind,
        given_seq: None,
        payload: (),
    };
    sender.send(vec![event]).unwrap();
    drop(sender);
    sequencer.join();
}

/// The crash comes when the end of the account is on disk, and before its redaction is noted.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_start_redacts_what_the_crash_left_of_an_ended_account() {
    let (network, mut relay, folder) = start(1, None).await;
    let consumer = Consumer::start(relay.firehose());
    let pds = network.pds(0);
    let [alice, bob, carol] = ["alice", "bob", "carol"].map(|name| {
        let account = pds.create_account(&format!("{name}.pds1.test"));
        let did = account.unwrap().did;
        write(pds, &did, &format!("a secret of {name}."));
        did
    });
    consumer.has(15).await;
    drop(consumer);
    relay.kill().unwrap();
    let store = database(&folder).await;
    let host = store.hosts().await.unwrap()[0].id;
    store.close().await;
    pds.delete_account(&alice).unwrap();
    let deleted = pds.events().pop().unwrap();
    let seq = deleted.seq as i64;
    append(
        &log(&folder),
        &alice,
        deleted.frame,
        Origin::Host { id: host.0, seq },
    );
    let taken_down = frame::encode_account(&frame::Account {
        seq: 0,
        did: carol.as_str(),
        time: "2026-01-01T00:00:00.000Z",
        active: false,
        status: Some("takendown"),
    });
    let code = LocalStatus::TakenDown.code();
    let taken_down = Bytes::from(taken_down);
    append(&log(&folder), &carol, taken_down, Origin::Relay { code });
    relay.restart(PATIENCE).await.unwrap();
    write(pds, &bob, "the next one");
    let (events, _) = read_until(&relay, 0, "the next one").await;
    let left = |text: &str| {
        let frames = events.values();
        frames
            .filter(|frame| contains(frame, text.as_bytes()))
            .count()
    };
    assert_eq!(
        (left("a secret of alice."), left("a secret of carol.")),
        (0, 0)
    );
    assert_eq!(left("a secret of bob."), 1);
    for (did, status) in [(&alice, "deleted"), (&carol, "takendown")] {
        let answer = status_of(&relay, did.as_str()).await;
        assert_eq!(answer["status"], json!(status), "{answer}");
    }
}

/// What a relay says of a host.
async fn host_of(relay: &RelayProcess, hostname: &str) -> Value {
    let url = format!(
        "{}/xrpc/com.atproto.sync.getHostStatus?hostname={hostname}",
        relay.url()
    );
    plain_client()
        .get(url)
        .send()
        .await
        .unwrap()
        .json()
        .await
        .unwrap()
}

/// The database is not the log's: the number that the log has for one host is another's there.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_host_that_got_the_number_of_another_one_is_given_nothing_of_its_own() {
    let (network, mut relay, folder) = start(1, None).await;
    let consumer = Consumer::start(relay.firehose());
    let pds = network.pds(0);
    let alice = pds.create_account("alice.pds1.test").unwrap().did;
    consumer.has(4).await;
    drop(consumer);
    relay.kill().unwrap();
    let before = database(&folder).await;
    let number = before.hosts().await.unwrap()[0].id;
    before.close().await;
    copy_database(Path::new("/nonexistent"), &data(&folder));
    let stranger = "127.0.0.1:1";
    let after = database(&folder).await;
    let new = NewHost::new(stranger, false, false);
    assert_eq!(after.add_host(&new).await.unwrap().id, number);
    after.close().await;
    relay.restart(PATIENCE).await.unwrap();
    let said = relay.said();
    assert!(said.contains("mean others in the event log"), "{said}");
    let host = host_of(&relay, stranger).await;
    assert_eq!(
        (&host["accountCount"], &host["seq"]),
        (&json!(0), &Value::Null),
        "{host}"
    );
    // Who sent it is a new host here, and has its account again with the next event.
    until_connected(&relay, 1).await;
    write(pds, &alice, "the next one");
    let (events, _) = read_until(&relay, 0, "the next one").await;
    assert!(events.keys().copied().eq(1..=5), "{:?}", events.keys());
    for (hostname, accounts) in [(stranger, 0), (pds.host().as_str(), 1)] {
        let host = host_of(&relay, hostname).await;
        assert_eq!(host["accountCount"], json!(accounts), "{host}");
    }
}

/// The host began to number anew, and the crash came before a checkpoint: the position in the log is from before that,
/// and a cursor that was on its way came later.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_host_sent_under_its_old_numbers_is_not_taken_for_what_it_sends_now() {
    let (network, mut relay, folder) = start(1, None).await;
    let consumer = Consumer::start(relay.firehose());
    let pds = network.pds(0);
    let [alice, _bob] = ["alice", "bob"].map(|name| {
        let account = pds.create_account(&format!("{name}.pds1.test"));
        account.unwrap().did
    });
    consumer.has(8).await;
    // Of what is redacted only number and account are left.
    for path in ["/admin/repo/takeDown", "/admin/repo/reverseTakedown"] {
        admin(&relay, path, json!({"did": alice.as_str()})).await;
    }
    consumer.has(10).await;
    drop(consumer);
    until_counted(&folder, 10).await;
    relay.kill().unwrap();
    begin_anew(&folder, 8, 11).await;
    pds.restart_seq(1);
    // Beyond the old cursor, so that it does not look like one of the future.
    for n in 0..9 {
        write(pds, &alice, &format!("new {n}."));
    }
    relay.restart(PATIENCE).await.unwrap();
    // Of the same account: others may pass those that wait for its identity.
    write(pds, &alice, "the end");
    let (events, _) = read_until(&relay, 10, "the end").await;
    let new: Vec<&Bytes> = events.range(11..).map(|(_, frame)| frame).collect();
    assert_eq!(new.len(), 10, "{:?}", events.keys());
    for (n, frame) in new[..9].iter().enumerate() {
        assert!(contains(frame, format!("new {n}.").as_bytes()), "{n}");
    }
}

/// Writes what a relay that saw a host begin anew left behind: its first number in the log since, and the cursor before.
async fn begin_anew(folder: &tempfile::TempDir, cursor: i64, log_seq: u64) {
    let store = database(folder).await;
    let host = store.hosts().await.unwrap()[0].id;
    store.renumber_host(host, 0, log_seq).await.unwrap();
    let late = Batch {
        cursors: vec![(host, cursor)],
        replay_from: Some(1),
        ..Batch::default()
    };
    store.apply(&late).await.unwrap();
    store.close().await;
}

/// Gives up the log of a test.
fn abandon(folder: &tempfile::TempDir) -> Output {
    Command::new(env!("CARGO_BIN_EXE_atproto-relay"))
        .args(["log", "abandon", "--json", "--data-dir"])
        .arg(data(folder))
        .output()
        .unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_its_log_a_relay_goes_on_only_when_told_and_above_all_numbers() {
    let (network, mut relay, folder) = start(1, None).await;
    let consumer = Consumer::start(relay.firehose());
    let pds = network.pds(0);
    let alice = pds.create_account("alice.pds1.test").unwrap().did;
    for n in 0..50 {
        write(pds, &alice, &format!("before {n}."));
    }
    consumer.has(54).await;
    drop(consumer);
    until_counted(&folder, 54).await;
    // Nothing is to be abandoned while the log is there.
    relay.kill().unwrap();
    let refused = abandon(&folder);
    let said = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(
        !refused.status.success() && said.contains("nothing is to be abandoned"),
        "{said}"
    );
    fs::rename(log(&folder), folder.path().join("elsewhere")).unwrap();
    let Err(ProcessError::Ended { said, .. }) = relay.restart(PATIENCE).await else {
        panic!("a relay without its log starts");
    };
    for part in ["is empty", "bring back", "log abandon"] {
        assert!(said.contains(part), "{said}");
    }
    // The folder was there after all.
    fs::remove_dir_all(log(&folder)).unwrap();
    fs::rename(folder.path().join("elsewhere"), log(&folder)).unwrap();
    relay.restart(PATIENCE).await.unwrap();
    let (events, _) = read_until(&relay, 0, "before 49.").await;
    assert!(events.keys().copied().eq(1..=54));
    relay.kill().unwrap();
    write(pds, &alice, "while it is down");
    fs::remove_dir_all(log(&folder)).unwrap();
    let done = abandon(&folder);
    assert!(
        done.status.success(),
        "{}",
        String::from_utf8_lossy(&done.stderr)
    );
    let done: Value = serde_json::from_slice(&done.stdout).unwrap();
    relay.restart(PATIENCE).await.unwrap();
    write(pds, &alice, "and after");
    let (events, infos) = read_until(&relay, 54, "and after").await;
    assert_eq!((events.len(), infos), (2, 1));
    let first = *events.keys().next().unwrap();
    assert_eq!(done["nextSeq"], first);
    assert!(
        first > 54 && events.keys().copied().eq(first..first + 2),
        "{:?}",
        events.keys()
    );
    // Killed once more, it is what it is.
    relay.kill().unwrap();
    relay.restart(PATIENCE).await.unwrap();
    write(pds, &alice, "at last");
    let (again, _) = read_until(&relay, first, "at last").await;
    assert!(again.keys().copied().eq(first..first + 3));
}

/// The log is from a copy of some time ago: what it lost is said, and the numbers are not given again.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_old_log_goes_on_above_what_the_database_knows() {
    let (network, mut relay, folder) = start(1, None).await;
    let consumer = Consumer::start(relay.firehose());
    let pds = network.pds(0);
    let alice = pds.create_account("alice.pds1.test").unwrap().did;
    consumer.has(4).await;
    relay.kill().unwrap();
    let copy = folder.path().join("copy");
    copy_folder(&log(&folder), &copy);
    relay.restart(PATIENCE).await.unwrap();
    for n in 0..300 {
        write(pds, &alice, &format!("lost {n}."));
    }
    consumer.has(304).await;
    drop(consumer);
    until_counted(&folder, 304).await;
    relay.kill().unwrap();
    fs::remove_dir_all(log(&folder)).unwrap();
    copy_folder(&copy, &log(&folder));
    relay.restart(PATIENCE).await.unwrap();
    assert!(relay.said().contains("lost its end"), "{}", relay.said());
    write(pds, &alice, "new");
    let (events, infos) = read_until(&relay, 0, "new").await;
    let seqs: Vec<u64> = events.keys().copied().collect();
    assert_eq!((&seqs[..4], seqs.len(), infos), (&[1, 2, 3, 4][..], 5, 0));
    assert!(seqs[4] > 304, "{seqs:?}");
    // The places that were left open cost no time at the next start.
    relay.kill().unwrap();
    relay.restart(PATIENCE).await.unwrap();
    let (again, _) = read_until(&relay, 200, "new").await;
    assert!(again.keys().eq(&seqs[4..]));
}

fn copy_folder(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for file in fs::read_dir(from).unwrap() {
        let file = file.unwrap();
        fs::copy(file.path(), to.join(file.file_name())).unwrap();
    }
}

/// The last segment's file of that kind, and how many of its bytes are written.
fn written(log: &Path, kind: &str) -> (PathBuf, u64) {
    let mut files: Vec<PathBuf> = fs::read_dir(log)
        .unwrap()
        .map(|file| file.unwrap().path())
        .filter(|path| path.extension().is_some_and(|extension| extension == kind))
        .collect();
    files.sort();
    let last = files.pop().unwrap();
    let bytes = fs::read(&last).unwrap();
    let written = bytes
        .iter()
        .rposition(|byte| *byte != 0)
        .map_or(0, |at| at + 1);
    (last, written as u64)
}

fn cut(path: &Path, len: u64) {
    OpenOptions::new()
        .write(true)
        .open(path)
        .unwrap()
        .set_len(len)
        .unwrap();
}

/// Appends an event to the log of a relay that is down, as a version before this one would have: a frame of more than
/// 5,000,000 bytes.
fn append_oversize(log: &Path, account: &frame::Account<'_>) {
    let [(frames, mut end), (index, entries)] = ["seg", "idx"].map(|kind| written(log, kind));
    let bytes = fs::read(&index).unwrap();
    let mut entry = bytes[entries as usize - 64..entries as usize].to_vec();
    let word = |at: usize| u64::from_le_bytes(entry[at..at + 8].try_into().unwrap());
    let seq = word(0) + 1;
    let length = u32::from_le_bytes(entry[40..44].try_into().unwrap());
    end = end.max(word(8) + u64::from(length));
    let plain = frame::encode_account(&frame::Account {
        seq: seq as i64,
        ..*account
    });
    let body = plain.iter().position(|byte| *byte == 0xa5).unwrap();
    let head = b"\x67padding\x5a".len() + 4;
    let padding = vec![0x2a; frame::MAX_FRAME_BYTES + 4 - plain.len() - head];
    let size = u32::try_from(padding.len()).unwrap().to_be_bytes();
    let field = [b"\x67padding\x5a", &size[..], &padding].concat();
    let frame = [&plain[..body], b"\xa6", &plain[body + 1..], &field].concat();
    let wire = [
        &[0x82, 127][..],
        &(frame.len() as u64).to_be_bytes(),
        &frame,
    ]
    .concat();
    entry[..8].copy_from_slice(&seq.to_le_bytes());
    entry[8..16].copy_from_slice(&end.to_le_bytes());
    let hash = Did::parse(account.did).unwrap().hash64();
    entry[24..32].copy_from_slice(&hash.to_le_bytes());
    entry[40..44].copy_from_slice(&(wire.len() as u32).to_le_bytes());
    entry[48..52].copy_from_slice(&crc32fast::hash(&wire).to_le_bytes());
    entry[52] = Kind::Account as u8;
    let sum = crc32fast::hash(&entry[..60]);
    entry[60..].copy_from_slice(&sum.to_le_bytes());
    for (path, bytes, at) in [(frames, &wire, end), (index, &entry, entries)] {
        let file = OpenOptions::new().write(true).open(path).unwrap();
        file.write_all_at(bytes, at).unwrap();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_an_older_log_holds_is_applied_also_where_no_consumer_would_take_it() {
    let (network, mut relay, folder) = start(1, None).await;
    let consumer = Consumer::start(relay.firehose());
    let pds = network.pds(0);
    let [alice, bob] = ["alice", "bob"].map(|name| {
        pds.create_account(&format!("{name}.pds1.test"))
            .unwrap()
            .did
    });
    consumer.has(8).await;
    until_counted(&folder, 8).await;
    relay.kill().unwrap();
    let account = frame::Account {
        seq: 0,
        did: alice.as_str(),
        time: "2026-01-01T00:00:00.000Z",
        active: false,
        status: Some("deactivated"),
    };
    append_oversize(&log(&folder), &account);
    relay.restart(PATIENCE).await.unwrap();
    let answer = status_of(&relay, alice.as_str()).await;
    assert_eq!(answer["status"], json!("deactivated"), "{answer}");
    write(pds, &bob, "the next one");
    let (events, _) = read_until(&relay, 0, "the next one").await;
    assert!(!events.contains_key(&9) && events.contains_key(&10));
    let longest = events.values().map(Bytes::len).max();
    assert!(longest < Some(frame::MAX_FRAME_BYTES));
}

/// Bytes that were synced are gone: damage, which no order of writes prevents. The relay starts, says what it lost, and
/// gives no number to another event.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn whatever_is_cut_off_the_logs_end_no_number_is_given_twice() {
    let (network, mut relay, folder) = start(HOSTS, None).await;
    let traffic = Traffic::start(&network);
    let marker = network
        .pds(0)
        .create_account("marker.pds1.test")
        .unwrap()
        .did;
    let mut moments = fastrand::Rng::with_seed(11);
    let mut seen: BTreeMap<u64, Bytes> = BTreeMap::new();
    let mut lost_in_all = 0;
    for turn in 0..CUTS {
        let text = format!("marker {turn}.");
        write(network.pds(0), &marker, &text);
        let (events, _) = read_until(&relay, 0, &text).await;
        for (seq, frame) in &events {
            if let Some(before) = seen.insert(*seq, frame.clone()) {
                assert!(
                    before == *frame,
                    "turn {turn}: seq {seq} was given to another event"
                );
            }
        }
        // Live to the head, so that as much as possible was seen.
        let live = Consumer::start(relay.firehose());
        live.has(events.len() + moments.usize(20..200)).await;
        relay.kill().unwrap();
        for (seq, frame) in live.frames.lock().unwrap().iter() {
            seen.insert(*seq, frame.clone());
        }
        drop(live);
        let log = log(&folder);
        // Seldom more than the last second: most cuts lie between the database's position and the head.
        let kinds = [&["seg"][..], &["idx"], &["seg", "idx"]][turn as usize % 3];
        for kind in kinds {
            let (path, len) = written(&log, kind);
            let unit = if *kind == "seg" { 1_000 } else { 64 };
            cut(
                &path,
                len.saturating_sub(moments.u64(1..unit * 150)).max(64),
            );
        }
        relay
            .restart(PATIENCE)
            .await
            .unwrap_or_else(|error| panic!("turn {turn}: {error}"));
        let text = format!("after {turn}.");
        write(network.pds(0), &marker, &text);
        let (after, _) = read_until(&relay, 0, &text).await;
        let lost = seen.keys().filter(|seq| !after.contains_key(seq)).count();
        for (seq, frame) in &after {
            let same = seen.get(seq).is_none_or(|before| before == frame);
            assert!(same, "turn {turn}: seq {seq} was given to another event");
        }
        assert!(
            lost == 0 || relay.said_in_all().contains("lost its end"),
            "{lost} lost, nothing said"
        );
        lost_in_all += lost;
        // What was lost is lost; from here on it is not expected.
        seen.retain(|seq, _| after.contains_key(seq));
        seen.extend(after);
    }
    traffic.stop(&network).await;
    println!("{CUTS} cuts lost {lost_in_all} events, and no number was given twice");
    assert!(lost_in_all > 0, "the cuts were too small to show anything");
}

/// Power fails: what was not synced may be gone, in any part. Nobody has seen it, and nothing is missing.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_was_not_synced_is_missed_by_nobody() {
    let (network, mut relay, folder) = start(HOSTS, None).await;
    let consumer = Consumer::start(relay.firehose());
    let traffic = Traffic::start(&network);
    let mut moments = fastrand::Rng::with_seed(5);
    for turn in 0..CUTS {
        consumer
            .has(consumer.events() + moments.usize(20..300))
            .await;
        relay.kill().unwrap();
        let log = log(&folder);
        // What was published was synced before; of the rest nothing need be there. The mark is never synced at all.
        let mark = fs::read(log.join("head")).unwrap();
        let head = u64::from_le_bytes(mark[..8].try_into().unwrap());
        let (index, _) = written(&log, "idx");
        let (frames, end) = written(&log, "seg");
        let first: u64 = frames
            .file_stem()
            .unwrap()
            .to_str()
            .unwrap()
            .parse()
            .unwrap();
        let entries = fs::read(&index).unwrap();
        let synced = head.checked_sub(first).map_or(0, |at| {
            let entry = &entries[64 * (at as usize + 1)..][..64];
            let word = |at: usize| u64::from_le_bytes(entry[at..at + 8].try_into().unwrap());
            word(8) + u64::from(u32::from_le_bytes(entry[40..44].try_into().unwrap()))
        });
        wipe(&frames, moments.u64(synced..=end.max(synced)));
        if turn % 2 == 0 {
            wipe(&index, 64 * (head + 2 - first.min(head + 1)));
            fs::remove_file(log.join("head")).unwrap();
        }
        relay
            .restart(PATIENCE)
            .await
            .unwrap_or_else(|error| panic!("turn {turn}: {error}"));
    }
    let sent = traffic.stop(&network).await;
    consumer.has(sent).await;
    all_once_and_in_order(&network, &consumer.frames.lock().unwrap());
}

/// Leaves zeros from `from` on, as reserved space that never was written. Disks write whole sectors.
fn wipe(path: &Path, from: u64) {
    let len = fs::metadata(path).unwrap().len();
    cut(path, from.next_multiple_of(512).min(len));
    cut(path, len);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_relays_do_not_share_a_folder_or_a_database() {
    let mut databases = vec![None];
    if let Some(server) = postgres::server() {
        databases.push(Some(server.database().await));
    }
    for database in databases {
        let (network, relay, folder) = start(1, database.clone()).await;
        let second = |folder: &tempfile::TempDir, database: &str| {
            Command::new(env!("CARGO_BIN_EXE_atproto-relay"))
                .args([
                    "serve",
                    "--listen=127.0.0.1:0",
                    "--metrics-listen=127.0.0.1:0",
                ])
                .arg("--data-dir")
                .arg(data(folder))
                .arg(format!("--database-url={database}"))
                .output()
                .unwrap()
        };
        let other = tempfile::tempdir().unwrap();
        let sqlite = format!("sqlite:{}", data(&folder).join("relay.sqlite").display());
        let database = database.unwrap_or(sqlite);
        for folder in [&folder, &other] {
            let refused = second(folder, &database);
            let said = String::from_utf8_lossy(&refused.stderr).into_owned();
            assert!(!refused.status.success(), "{said}");
            assert!(said.contains("in use by another relay"), "{said}");
            assert!(
                said.contains("(process ") || said.contains("(session "),
                "{said}"
            );
        }
        // The first one has noticed nothing.
        let alice = network
            .pds(0)
            .create_account("alice.pds1.test")
            .unwrap()
            .did;
        write(network.pds(0), &alice, "still there");
        read_until(&relay, 0, "still there").await;
        until_connected(&relay, 1).await;
    }
}

/// Without its database the relay goes on for as long as it can remember what is to be written, says so, and catches up.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_database_that_is_away_for_a_while_is_told_and_caught_up_with() {
    let (network, relay, folder) = start(1, None).await;
    let pds = network.pds(0);
    let alice = pds.create_account("alice.pds1.test").unwrap().did;
    let consumer = Consumer::start(relay.firehose());
    consumer.has(4).await;
    until_counted(&folder, 4).await;
    let health = relay.metrics_url().replace("/metrics", "/_health");
    let database = format!("sqlite:{}", data(&folder).join("relay.sqlite").display());
    let mut lock = SqliteConnection::connect(&database).await.unwrap();
    sqlx::query("BEGIN IMMEDIATE")
        .execute(&mut lock)
        .await
        .unwrap();
    write(pds, &alice, "while it is away");
    consumer.has(5).await;
    let problem = until_health(&health, 503).await;
    assert!(
        problem.contains("the database takes no changes"),
        "{problem}"
    );
    assert!(problem.contains("\"name\":\"database\""), "{problem}");
    sqlx::query("ROLLBACK").execute(&mut lock).await.unwrap();
    until_health(&health, 200).await;
    assert_eq!(lines_of(&relay, "database").len(), 2, "{}", relay.said());
    until_counted(&folder, 5).await;
}

/// The lines about a problem.
fn lines_of(relay: &RelayProcess, problem: &str) -> Vec<String> {
    let field = format!("problem=\"{problem}\"");
    let said = relay.said();
    let lines = said.lines().filter(|line| line.contains(&field));
    lines.map(str::to_owned).collect()
}

/// Waits until the relay has the problem `clock`, or no longer has, and writes meanwhile; its message.
async fn until_clock(relay: &RelayProcess, wrong: bool, write: impl Fn()) -> String {
    let url = format!("{}/_health", relay.url());
    let wait = async {
        loop {
            let answer = plain_client().get(&url).send().await.unwrap();
            let health: Value = answer.json().await.unwrap();
            let problems = health["problems"].as_array().unwrap();
            let clock = problems.iter().find(|problem| problem["name"] == "clock");
            if clock.is_some() == wrong {
                return clock.map_or(String::new(), |clock| clock["message"].to_string());
            }
            write();
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    };
    match timeout(PATIENCE, wait).await {
        Ok(message) => message,
        Err(_) => panic!("the clock is not told: {}", relay.said()),
    }
}

/// With an empty log nothing tells that the clock is behind but the hosts' revs. Where there is a log, it does.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_clock_that_is_behind_is_told_with_an_empty_log_and_with_a_full_one() {
    let Some(clock) = Clock::new() else { return };
    clock.set(-240);
    let (network, mut relay, _folder) = start_binary(clock.binary(), 2, None).await;
    let accounts: Vec<_> = network
        .all_pds()
        .iter()
        .map(|pds| {
            let name = format!("alice.{}", pds.domain());
            (pds, pds.create_account(&name).unwrap().did)
        })
        .collect();
    let write_all = || {
        for (pds, did) in &accounts {
            for _ in 0..5 {
                write(pds, did, "at any time");
            }
        }
    };
    let message = until_clock(&relay, true, write_all).await;
    assert!(message.contains("2 of 2 hosts"), "{message}");
    clock.set(0);
    until_clock(&relay, false, write_all).await;
    let lines = lines_of(&relay, "clock");
    assert_eq!(lines.len(), 2, "{lines:#?}");
    assert!(lines[0].contains(" WARN ") && lines[0].contains("set the system's clock right"));
    assert!(lines_of(&relay, "drops").is_empty(), "{}", relay.said());

    relay.kill().unwrap();
    clock.set(-240);
    relay.restart(PATIENCE).await.unwrap();
    let message = until_clock(&relay, true, write_all).await;
    assert!(message.contains("behind events of the log"), "{message}");
}

/// Waits until the health is told with this status; what it says.
async fn until_health(url: &str, status: u16) -> String {
    let wait = async {
        loop {
            let answer = plain_client().get(url).send().await.unwrap();
            if answer.status().as_u16() == status {
                return answer.text().await.unwrap();
            }
        }
    };
    timeout(PATIENCE, wait).await.expect("the health changes")
}

/// A library that moves the system's clock for one process, by the seconds in a file.
const CLOCK: &str = r#"
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <time.h>

static volatile long *offset;

__attribute__((constructor)) static void open_offset(void) {
    int file = open(getenv("CLOCK_OFFSET"), O_RDONLY);
    void *map = mmap(0, sizeof(long), PROT_READ, MAP_SHARED, file, 0);
    if (map != MAP_FAILED) offset = map;
}

int clock_gettime(clockid_t clock, struct timespec *time) {
    static int (*real)(clockid_t, struct timespec *);
    if (!real) real = dlsym(RTLD_NEXT, "clock_gettime");
    int result = real(clock, time);
    if (result == 0 && clock == CLOCK_REALTIME && offset) time->tv_sec += *offset;
    return result;
}
"#;

/// The relay's binary with a clock of its own; `None`, with a printed line, where there is no C compiler.
struct Clock {
    folder: tempfile::TempDir,
}

impl Clock {
    fn new() -> Option<Clock> {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        fs::write(at("clock.c"), CLOCK).unwrap();
        fs::write(at("offset"), 0_i64.to_ne_bytes()).unwrap();
        let built = Command::new("cc")
            .args(["-shared", "-fPIC", "-o"])
            .args([at("clock.so"), at("clock.c")])
            .arg("-ldl")
            .status();
        if !built.is_ok_and(|status| status.success()) {
            println!("skipped: no C compiler to move the clock with");
            return None;
        }
        let script = format!(
            "#!/bin/sh\nCLOCK_OFFSET={} LD_PRELOAD={} exec {} \"$@\"\n",
            at("offset").display(),
            at("clock.so").display(),
            env!("CARGO_BIN_EXE_atproto-relay")
        );
        fs::write(at("relay"), script).unwrap();
        fs::set_permissions(at("relay"), fs::Permissions::from_mode(0o755)).unwrap();
        Some(Clock { folder })
    }

    fn binary(&self) -> PathBuf {
        self.folder.path().join("relay")
    }

    /// Sets the relay's clock so many hours before or after ours, also while it runs.
    fn set(&self, hours: i64) {
        let file = OpenOptions::new()
            .write(true)
            .open(self.folder.path().join("offset"));
        file.unwrap()
            .write_all_at(&(hours * 3_600).to_ne_bytes(), 0)
            .unwrap();
    }
}

/// A clock that is set back or forward, in service or over a crash: events pass, the window stays, identities are
/// resolved, and nothing is missing.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_wrong_clock_costs_no_event() {
    let Some(clock) = Clock::new() else { return };
    let (network, mut relay, _folder) = start_binary(clock.binary(), 1, None).await;
    let consumer = Consumer::start(relay.firehose());
    let pds = network.pds(0);
    let alice = pds.create_account("alice.pds1.test").unwrap().did;
    let mut events = 4;
    consumer.has(events).await;
    for (hours, crash) in [
        (-48, false),
        (-48, true),
        (24 * 400, false),
        (24 * 400, true),
        (0, false),
        (0, true),
        (-2, true),
    ] {
        clock.set(hours);
        if crash {
            relay.kill().unwrap();
            write(pds, &alice, "while it is down");
            relay.restart(PATIENCE).await.unwrap();
            events += 1;
        }
        write(pds, &alice, &format!("{hours} hours."));
        pds.update_handle(&alice, &format!("alice{events}.pds1.test"))
            .unwrap();
        events += 2;
        assert!(
            consumer.comes_to(events).await,
            "{hours} hours, crash: {crash}: {}",
            relay.said()
        );
    }
    // The window is whole.
    let late = Consumer::start(relay.firehose());
    late.has(events).await;
    assert!(*late.frames.lock().unwrap() == *consumer.frames.lock().unwrap());
}
