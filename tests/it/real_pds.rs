//! Every frame captured from two real PDS instances, through real sockets: replaying hosts, a PLC
//! directory with the documents of the time, the relay, a consumer. The verdicts are those of
//! tests/data/real-pds/README.md; what comes out is byte for byte what went in, but for `seq`.
#![cfg(feature = "devnet")]

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use atproto_relay::atproto::frame::{self, Peek};
use atproto_relay::config::Config;
use atproto_relay::devnet::check::{Ledger, Origin, Verdict, Watcher, WatcherOptions};
use atproto_relay::devnet::replay::{Capture, DocumentStyle, Moment, Replay};
use atproto_relay::devnet::scrape::Samples;
use atproto_relay::devnet::timestamp::Timestamp;
use atproto_relay::dial::{Guard, HostName};
use atproto_relay::hosts::{HostLimits, Rate, Settings};
use atproto_relay::relay::Relay;
use atproto_relay::{eventlog, identity};
use futures_util::StreamExt;
use tokio_tungstenite::tungstenite::Message;

/// How long the test waits for anything before it fails.
const PATIENCE: Duration = Duration::from_secs(60);

/// The frames that must be refused, by host and sequence number, with the rules that may say so.
const REFUSED: [(&str, i64, &[&str]); 3] = [
    // A commit of the old host after the account moved.
    ("pds1", 82, &["wrong_host"]),
    // The frame's rev is not the commit's, and the old key signed it.
    ("pds2", 23, &["commit_envelope", "signature"]),
    // The old host's last word on an account that lives elsewhere.
    ("pds1", 83, &["wrong_host"]),
];
/// Accounts that are deleted in the capture: their earlier events leave the replay window.
const DELETED: [&str; 2] = [
    "did:plc:7hm2plpxzyxlxldtxrgrtrtu",
    "did:plc:fhewbno6lzdy7xpkkuh7koos",
];

fn real_pds() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/real-pds")
}

/// A relay without limits for the hosts and the directory of a replay. What took a minute when it was
/// captured takes a second here, so identities may be looked up as often as they change.
fn config(folder: &Path, replay: &Replay) -> Config {
    let unlimited = Rate {
        base: 1e9,
        per_account: 0.0,
    };
    let hosts = (0..replay.capture().hosts.len())
        .map(|host| HostName::parse(&replay.host_url(host), &Guard::new(true)).unwrap());
    Config {
        listen: ([127, 0, 0, 1], 0).into(),
        metrics_listen: ([127, 0, 0, 1], 0).into(),
        data_dir: folder.to_owned(),
        hosts: hosts.collect(),
        allow_private_hosts: true,
        identity: identity::Settings {
            plc_host: replay.plc_url().parse().unwrap(),
            ..identity::Settings::default()
        },
        log: eventlog::Settings {
            max_bytes: 1 << 30,
            ..eventlog::Settings::default()
        },
        host_settings: Settings {
            limits: HostLimits {
                per_second: unlimited,
                per_hour: unlimited,
                per_day: unlimited,
                bytes_per_hour: unlimited,
                ..HostLimits::default()
            },
            ..Settings::default()
        },
        ..Config::default()
    }
}

fn firehose(relay: &Relay) -> String {
    format!("ws://{}", relay.public_addr())
}

async fn samples(relay: &Relay) -> Samples {
    let url = format!("http://{}/metrics", relay.metrics_addr());
    Samples::scrape(&url).await.expect("the relay answers")
}

fn refused(replay: &Replay, moment: &Moment) -> Option<&'static [&'static str]> {
    let name = &replay.capture().hosts[moment.host].name;
    let seq = replay
        .frame(moment)
        .about
        .as_ref()
        .expect("every captured frame is an event")
        .seq;
    REFUSED
        .iter()
        .find(|(host, refused, _)| host == name && *refused == seq)
        .map(|(_, _, rules)| *rules)
}

fn ledger(replay: &Replay) -> Arc<Ledger> {
    let ledger = Ledger::new();
    for moment in replay.timeline() {
        let frame = replay.frame(moment);
        let seq = frame
            .about
            .as_ref()
            .expect("every captured frame is an event")
            .seq;
        let verdict =
            refused(replay, moment).map_or(Verdict::Forward, |rules| Verdict::Refuse(rules[0]));
        ledger
            .enter(
                &frame.bytes,
                Origin {
                    host: moment.host as u32,
                    seq,
                },
                verdict,
                None,
            )
            .unwrap();
    }
    ledger
}

/// Sends every frame, each after the one before it came out or was dropped; the rules that dropped.
async fn play(replay: &Replay, relay: &Relay, consumer: &Watcher) -> Vec<String> {
    let mut rules = Vec::new();
    let mut expected = 0;
    loop {
        let before = samples(relay).await;
        let Some(moment) = replay.send_next() else {
            return rules;
        };
        if refused(replay, &moment).is_some() {
            rules.push(dropped_since(relay, &before.drops()).await);
        } else {
            expected += 1;
            let wait = consumer
                .wait_for(PATIENCE, |checker| checker.complete() >= expected)
                .await;
            wait.unwrap_or_else(|error| panic!("frame {:?}: {error}", replay.frame(&moment).about));
        }
    }
}

/// Waits until one more event was dropped; the rule it was dropped under.
async fn dropped_since(relay: &Relay, before: &BTreeMap<String, u64>) -> String {
    let deadline = tokio::time::Instant::now() + PATIENCE;
    loop {
        let now = samples(relay).await.drops();
        if let Some((rule, _)) = now
            .iter()
            .find(|(rule, count)| before.get(*rule) != Some(count))
        {
            return rule.clone();
        }
        assert!(
            tokio::time::Instant::now() < deadline,
            "nothing was dropped"
        );
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

async fn every_verdict_holds(style: DocumentStyle) {
    let replay = Replay::start(Capture::load(&real_pds()).unwrap(), style)
        .await
        .unwrap();
    let folder = tempfile::tempdir().unwrap();
    let relay = Relay::start(config(folder.path(), &replay)).await.unwrap();
    let before = samples(&relay).await;
    replay.connected(PATIENCE).await.unwrap();
    let ledger = ledger(&replay);
    let consumer = Watcher::start(
        ledger.clone(),
        WatcherOptions {
            relay: firehose(&relay),
            ..WatcherOptions::default()
        },
    );
    consumer.connected(PATIENCE).await.unwrap();
    let rules = play(&replay, &relay, &consumer).await;
    for (rule, (host, seq, allowed)) in rules.iter().zip(in_sending_order(&replay)) {
        assert!(
            allowed.contains(&rule.as_str()),
            "{host} seq {seq} was dropped under {rule}"
        );
    }
    let report = consumer.stop().await.checker.report();
    assert!(report.is_clean(), "{style:?}: {report}");
    assert_eq!(report.received, 101);
    let since = samples(&relay).await.since(&before);
    assert_eq!(
        since.sum("relay_events_desynchronized_total"),
        0.0,
        "every chain is gapless"
    );
    bytes_pass_through(&replay, &relay).await;
    relay.shutdown().await;
}

fn in_sending_order(replay: &Replay) -> Vec<(&str, i64, &'static [&'static str])> {
    let named = |moment: &Moment| {
        let seq = replay.frame(moment).about.as_ref()?.seq;
        Some((
            replay.capture().hosts[moment.host].name.as_str(),
            seq,
            refused(replay, moment)?,
        ))
    };
    replay.timeline().iter().filter_map(named).collect()
}

/// Reads the replay window: every frame that was let through, its bytes equal but for `seq`; what is
/// gone is what the deleted accounts said.
async fn bytes_pass_through(replay: &Replay, relay: &Relay) {
    let mut expected = Vec::new();
    for moment in replay
        .timeline()
        .iter()
        .filter(|moment| refused(replay, moment).is_none())
    {
        let frame = replay.frame(moment);
        let about = frame.about.as_ref().unwrap();
        let Ok(Peek::Event(event)) = frame::peek(&frame.bytes) else {
            panic!("an event")
        };
        let seq = expected.len() as u64 + 1;
        let mut numbered = Vec::new();
        frame::splice_seq(&frame.bytes, event.seq_span, seq, &mut numbered);
        expected.push((about.did.clone(), numbered));
    }
    let url = format!(
        "{}/xrpc/com.atproto.sync.subscribeRepos?cursor=0",
        firehose(relay)
    );
    let (mut socket, _) = tokio_tungstenite::connect_async(url).await.unwrap();
    let last = expected.last().unwrap().1.clone();
    let mut served = Vec::new();
    while served.last() != Some(&last) {
        let next = tokio::time::timeout(PATIENCE, socket.next())
            .await
            .expect("the window is served in time");
        if let Message::Binary(bytes) = next.expect("the connection stays").unwrap() {
            served.push(bytes.to_vec());
        }
    }
    for (did, frame) in &expected {
        let kept = served.contains(frame);
        assert!(
            kept || DELETED.contains(&did.as_str()),
            "a frame of {did} is missing or changed"
        );
    }
    assert!(
        served
            .iter()
            .all(|frame| expected.iter().any(|(_, expected)| expected == frame))
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn every_verdict_holds_with_documents_of_both_styles() {
    let captured = Capture::load(&real_pds()).unwrap().timeline();
    // A relay refuses revs that lie in the future.
    if captured
        .last()
        .is_some_and(|last| last.time > Timestamp::now())
    {
        println!("skipped: the clock of this machine is behind the time of the capture");
        return;
    }
    every_verdict_holds(DocumentStyle::Multikey).await;
    every_verdict_holds(DocumentStyle::Legacy).await;
}
