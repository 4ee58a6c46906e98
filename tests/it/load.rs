//! The load's own promises: a paced run through a relay comes out whole, whoever else is reading.
#![cfg(feature = "devnet")]

use std::time::Duration;

use atproto_relay::devnet::load::{
    Crowd, CrowdError, LoadOptions, Patience, Prepared, ProcessOptions, RelayProcess, Swarm,
    Target, run, unlimited,
};

const PATIENCE: Duration = Duration::from_secs(60);
/// Consumers, of which half read too slowly.
const CROWD: usize = 60;
const EVENTS: usize = 1_500;

#[tokio::test(flavor = "multi_thread")]
async fn a_paced_run_is_whole_and_slow_consumers_hold_nothing_back() {
    let options = LoadOptions {
        hosts: 3,
        accounts: 30,
        events: EVENTS,
        existing_records: 40,
        ..LoadOptions::default()
    };
    let prepared = Prepared::new(options, &|_, _| {});
    let swarm = Swarm::start(&prepared).await.unwrap();
    let folder = tempfile::tempdir().unwrap();
    let process = ProcessOptions {
        binary: env!("CARGO_BIN_EXE_atproto-relay").into(),
        folder: folder.path().to_owned(),
        plc: swarm.plc_url(),
        hosts: swarm.host_urls(),
        arguments: unlimited(CROWD),
    };
    let relay = RelayProcess::start(process, PATIENCE).await.unwrap();
    let crowd = Crowd::start(&relay.firehose(), CROWD, CROWD / 2)
        .await
        .unwrap();
    let usage = || relay.usage();
    let target = Target {
        firehose: relay.firehose(),
        usage: Some(&usage),
    };
    let measured = run(
        &prepared,
        &swarm,
        target,
        1_000.0,
        Patience::default(),
        &|_| {},
    )
    .await
    .unwrap();
    assert!(
        measured.checker.report().is_clean(),
        "{}",
        measured.checker.report()
    );
    assert_eq!(
        (measured.events, measured.latencies.len()),
        (EVENTS, EVENTS)
    );
    assert!(
        measured.elapsed >= Duration::from_millis(1_400),
        "faster than asked for"
    );
    assert_eq!(crowd.cut(), 0);
    assert!(
        crowd.bytes() > EVENTS as u64 * 1_000,
        "nobody else was sent anything"
    );
}

#[tokio::test]
async fn a_crowd_that_is_not_let_in_says_so() {
    let nowhere = Crowd::start("ws://127.0.0.1:1", 1, 0).await;
    assert!(
        matches!(nowhere, Err(CrowdError::Connect { .. })),
        "{nowhere:?}"
    );
    let nonsense = Crowd::start("http://127.0.0.1", 1, 0).await;
    assert!(
        matches!(nonsense, Err(CrowdError::Address(_))),
        "{nonsense:?}"
    );
}
