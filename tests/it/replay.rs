//! The replay of captured traffic, looked at from outside: cursors, documents and account states as
//! of the time of the last frame sent.
#![cfg(feature = "devnet")]

use atproto_relay::dial::plain_client;
use std::path::{Path, PathBuf};
use std::time::Duration;

use atproto_relay::devnet::replay::{
    Audit, Capture, CaptureError, DocumentStyle, Registration, Replay,
};
use atproto_relay::devnet::timestamp::Timestamp;
use futures_util::StreamExt;
use serde_json::Value;
use tokio_tungstenite::connect_async;
use tokio_tungstenite::tungstenite::Message;

const PATIENCE: Duration = Duration::from_secs(20);
const MIG: &str = "did:plc:j22vzvzo62e356tek74zyfpl";
const YVES: &str = "did:plc:7hm2plpxzyxlxldtxrgrtrtu";

fn real_pds() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/real-pds")
}

async fn replay() -> Replay {
    Replay::start(Capture::load(&real_pds()).unwrap(), DocumentStyle::Multikey)
        .await
        .unwrap()
}

/// Messages of a host from `cursor` on, as many as asked for; fewer when it closes.
async fn messages(replay: &Replay, host: usize, cursor: Option<i64>, count: usize) -> Vec<Vec<u8>> {
    let base = replay.host_url(host).replacen("http", "ws", 1);
    let cursor = cursor.map_or(String::new(), |cursor| format!("?cursor={cursor}"));
    let (socket, _) = connect_async(format!(
        "{base}/xrpc/com.atproto.sync.subscribeRepos{cursor}"
    ))
    .await
    .unwrap();
    let binary = socket.filter_map(async |message| match message.ok()? {
        Message::Binary(bytes) => Some(bytes.to_vec()),
        _ => None,
    });
    tokio::time::timeout(PATIENCE, binary.take(count).collect())
        .await
        .expect("the messages come in time")
}

async fn get(url: String) -> (u16, Value) {
    let answer = plain_client().get(url).send().await.unwrap();
    (answer.status().as_u16(), answer.json().await.unwrap())
}

async fn status(replay: &Replay, host: usize, did: &str) -> (u16, Value) {
    get(format!(
        "{}/xrpc/com.atproto.sync.getRepoStatus?did={did}",
        replay.host_url(host)
    ))
    .await
}

#[tokio::test]
async fn every_captured_frame_is_served_from_every_cursor() {
    let replay = replay().await;
    let total: usize = replay
        .capture()
        .hosts
        .iter()
        .map(|host| host.frames.len())
        .sum();
    assert_eq!((total, replay.timeline().len()), (104, 104));
    replay.send_until(usize::MAX);
    assert_eq!(replay.position(), 104);
    for (host, captured) in replay.capture().hosts.iter().enumerate() {
        let all: Vec<Vec<u8>> = captured
            .frames
            .iter()
            .map(|frame| frame.bytes.to_vec())
            .collect();
        assert_eq!(
            messages(&replay, host, Some(0), all.len()).await,
            all,
            "{}",
            captured.name
        );
        let fifth = captured.frames[4].about.as_ref().unwrap().seq;
        assert_eq!(messages(&replay, host, Some(fifth), 3).await, all[5..8]);
    }
    let refusal = messages(&replay, 0, Some(1_000), 2).await;
    assert_eq!(refusal.len(), 1, "an error frame, then the end");
    assert!(refusal[0].windows(12).any(|word| word == b"FutureCursor"));
}

#[tokio::test]
async fn a_subscriber_without_cursor_gets_what_is_sent_from_now_on() {
    let replay = replay().await;
    replay.send_until(10);
    assert!(replay.connected(Duration::from_millis(1)).await.is_err());
    let read = messages(&replay, 0, None, 1);
    let send = async {
        replay_connected(&replay, 0).await;
        replay.send_until(usize::MAX);
    };
    let (read, ()) = tokio::join!(read, send);
    let sent: Vec<_> = replay.timeline()[..10]
        .iter()
        .filter(|moment| moment.host == 0)
        .collect();
    assert_eq!(
        read[0],
        replay.capture().hosts[0].frames[sent.len()].bytes.to_vec()
    );
}

/// Waits until one host has a subscriber: the error of the others names only them.
async fn replay_connected(replay: &Replay, host: usize) {
    let name = &replay.capture().hosts[host].name;
    while replay
        .connected(Duration::from_millis(20))
        .await
        .is_err_and(|error| error.to_string().contains(name))
    {}
}

#[tokio::test]
async fn documents_and_states_are_those_of_the_last_frame_sent() {
    let replay = replay().await;
    let endpoint = async || {
        get(format!("{}/{MIG}", replay.plc_url())).await.1["service"][0]["serviceEndpoint"].clone()
    };
    assert_eq!(get(format!("{}/{MIG}", replay.plc_url())).await.0, 404);
    let place = |host: usize, seq: i64| {
        let at = |moment: &&_| {
            replay
                .frame(moment)
                .about
                .as_ref()
                .is_some_and(|about| about.seq == seq)
        };
        let moment = replay
            .timeline()
            .iter()
            .filter(|moment| moment.host == host)
            .find(at)
            .unwrap();
        replay
            .timeline()
            .iter()
            .position(|other| other == moment)
            .unwrap()
    };
    replay.send_until(place(1, 20));
    assert_eq!(endpoint().await, replay.host_url(0), "before it moved");
    assert_eq!(status(&replay, 0, MIG).await.1["rev"], "3n2rzvdslcd24");
    assert_eq!(status(&replay, 1, MIG).await.0, 400);
    assert_eq!(
        status(&replay, 0, YVES).await.1["error"],
        "RepoNotFound",
        "deleted by then"
    );
    replay.send_until(place(1, 20) + 1);
    assert_eq!(
        endpoint().await,
        replay.host_url(1),
        "with the #identity that says so"
    );
    replay.send_until(usize::MAX);
    let (_, old) = status(&replay, 0, MIG).await;
    assert_eq!(
        (&old["active"], &old["status"], old.get("rev")),
        (&Value::from(false), &Value::from("deactivated"), None)
    );
    let (_, new) = status(&replay, 1, MIG).await;
    assert_eq!(
        (&new["active"], new.get("status"), &new["rev"]),
        (&Value::from(true), None, &Value::from("3n2rzvmwxec25"))
    );
}

#[test]
fn the_last_documents_are_the_captured_ones_in_both_styles() {
    for name in ["alice", "bob", "carol", "dora", "ida", "mig", "yves", "zoe"] {
        let read = |path: String| std::fs::read(real_pds().join(path)).unwrap();
        let audit = Audit::parse(&read(format!("plc/{name}.audit.json"))).unwrap();
        for (folder, style) in [
            ("diddocs", DocumentStyle::Multikey),
            ("diddocs-legacy", DocumentStyle::Legacy),
        ] {
            let captured: Value =
                serde_json::from_slice(&read(format!("{folder}/{name}.json"))).unwrap();
            let made = audit.at(Timestamp::from_millis(i64::MAX), style, str::to_owned);
            assert_eq!(made, Registration::Document(captured), "{folder}/{name}");
        }
    }
}

#[test]
fn the_index_of_the_capture_agrees_with_the_frames() {
    let capture = Capture::load(&real_pds()).unwrap();
    for host in &capture.hosts {
        let index =
            std::fs::read_to_string(real_pds().join(format!("{}.index.jsonl", host.name))).unwrap();
        let lines: Vec<Value> = index
            .lines()
            .map(|line| serde_json::from_str(line).unwrap())
            .collect();
        assert_eq!(lines.len(), host.frames.len());
        for (line, frame) in lines.iter().zip(&host.frames) {
            let about = frame.about.as_ref().unwrap();
            assert_eq!(line["len"], frame.bytes.len());
            assert_eq!(
                (&line["seq"], &line["did"]),
                (&about.seq.into(), &about.did.as_str().into())
            );
            assert_eq!(
                (&line["t"], &line["time"]),
                (
                    &about.kind.as_str().into(),
                    &about.time.unwrap().to_string().into()
                )
            );
        }
    }
}

#[test]
fn a_capture_that_cannot_be_read_says_where() {
    let folder = tempfile::tempdir().unwrap();
    assert!(matches!(
        Capture::load(folder.path()),
        Err(CaptureError::Empty(_))
    ));
    std::fs::write(
        folder.path().join("a.frames"),
        [0, 0, 0, 1, 9, 0xff, 0xff, 0xff, 0xff, 1],
    )
    .unwrap();
    let error = Capture::load(folder.path()).unwrap_err().to_string();
    assert!(
        error.contains("a.frames") && error.contains("byte 5") && error.contains("1 are left"),
        "{error}"
    );
    std::fs::write(folder.path().join("a.frames"), [0, 0]).unwrap();
    assert!(matches!(
        Capture::load(folder.path()),
        Err(CaptureError::CutOff {
            len: 4,
            left: 2,
            ..
        })
    ));
}
