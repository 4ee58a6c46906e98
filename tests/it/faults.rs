//! The relay as a process of its own, under load with every fault on, and killed in the middle:
//! what comes out is exactly what must, whatever happens.
#![cfg(feature = "devnet")]

use crate::support::postgres;
use std::collections::BTreeMap;
use std::path::Path;
use std::time::Duration;

use crate::support::kills::kills;
use atproto_relay::devnet::check::{Outcome, Watcher, WatcherOptions};
use atproto_relay::devnet::faults::{Effect, Fault, FaultPlan};
use atproto_relay::devnet::load::{
    FLOOD_QUOTA, LoadOptions, Prepared, ProcessOptions, RelayProcess, Swarm, unlimited,
};
use atproto_relay::devnet::scrape::Samples;

/// How long a test waits for anything before it fails.
const PATIENCE: Duration = Duration::from_secs(120);
/// Times the relay is killed in the middle where `ATPROTO_KILLS` says nothing else.
const KILLS: usize = 10;
/// Events for each kill: it strikes at another place in the rhythm of checkpoints each time.
const EVENTS_PER_KILL: usize = 600;

fn options(events: usize, faults: FaultPlan) -> LoadOptions {
    LoadOptions {
        hosts: 4,
        accounts: 60,
        events,
        p256_share: 0.25,
        existing_records: 40,
        faults,
        ..LoadOptions::default()
    }
}

async fn start(
    prepared: &Prepared,
    swarm: &Swarm,
    folder: &Path,
    database: Option<String>,
) -> RelayProcess {
    let mut arguments = unlimited(1);
    arguments.extend(database.map(|url| format!("--database-url={url}").into()));
    let process = ProcessOptions {
        binary: env!("CARGO_BIN_EXE_atproto-relay").into(),
        folder: folder.to_owned(),
        plc: swarm.plc_url(),
        hosts: swarm.host_urls(),
        arguments,
    };
    let relay = RelayProcess::start(process, PATIENCE).await.unwrap();
    swarm.subscribed(PATIENCE).await.unwrap();
    if prepared.floods() {
        let flooding = swarm.host_urls().pop().unwrap();
        relay
            .change_limits(flooding.trim_start_matches("http://"), FLOOD_QUOTA)
            .await
            .unwrap();
    }
    relay
}

async fn consume(prepared: &Prepared, relay: &RelayProcess) -> Watcher {
    let options = WatcherOptions {
        relay: relay.firehose(),
        cursor: Some(0),
        stopwatch: None,
    };
    let consumer = Watcher::start(prepared.ledger().clone(), options);
    consumer.connected(PATIENCE).await.unwrap();
    consumer
}

async fn finish(prepared: &Prepared, consumer: Watcher) -> Outcome {
    let ledger = prepared.ledger().clone();
    let waited = consumer
        .wait_for(PATIENCE, |checker| {
            checker.complete() >= ledger.forward() && checker.quotas_filled()
        })
        .await;
    waited.unwrap_or_else(|error| panic!("{error}"));
    consumer.stop().await
}

/// The whole log once more, from its beginning: the same events under the same numbers.
async fn same_from_the_beginning(prepared: &Prepared, relay: &RelayProcess, live: &Outcome) {
    let again = consume(prepared, relay).await;
    let count = live.checker.received().len();
    again
        .wait_for(PATIENCE, |checker| checker.received().len() >= count)
        .await
        .unwrap();
    assert!(
        again.stop().await.checker.received() == live.checker.received(),
        "the log is not what was seen live"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn with_every_fault_on_exactly_what_must_come_out_does() {
    let prepared = tokio::task::spawn_blocking(|| {
        Prepared::new(options(6_000, FaultPlan::all(0.1, 12)), &|_, _| {})
    })
    .await
    .unwrap();
    let swarm = Swarm::start(&prepared).await.unwrap();
    let folder = tempfile::tempdir().unwrap();
    let relay = start(&prepared, &swarm, folder.path(), None).await;
    let consumer = consume(&prepared, &relay).await;
    swarm.introduce(&prepared);
    swarm
        .play(&prepared, 1_000.0, &consumer)
        .await
        .unwrap_or_else(|error| panic!("{error}\nthe relay said:\n{}", relay.said()));
    let outcome = finish(&prepared, consumer).await;
    let report = outcome.checker.report();
    assert!(report.is_clean(), "{report}");
    every_fault_had_its_effect(
        &prepared,
        &Samples::scrape(&relay.metrics_url()).await.unwrap(),
    );
    same_from_the_beginning(&prepared, &relay, &outcome).await;
    assert!(
        relay.end(PATIENCE).await.unwrap(),
        "the relay ends well when asked to"
    );
}

/// Hosts send again after a reconnect, so a rule may have struck more often than the fault.
fn every_fault_had_its_effect(prepared: &Prepared, samples: &Samples) {
    let mut struck = BTreeMap::<Fault, u64>::new();
    for injected in prepared.injected() {
        *struck.entry(injected.fault).or_default() += 1;
    }
    for fault in Fault::ALL {
        let times = struck.get(&fault).copied().unwrap_or(0);
        assert!(times > 0, "{fault} did not strike");
        let counted = match fault.effect() {
            Effect::Refused(rule) => samples.dropped(rule),
            Effect::ChainBroken => samples.sum("relay_events_desynchronized_total") as u64,
            Effect::Closed | Effect::Delayed | Effect::Throttled => continue,
        };
        // The last event of an account may be the one that is kept back: then nothing shows it.
        let allowed = if fault == Fault::Gap {
            times / 2
        } else {
            times
        };
        assert!(
            counted >= allowed,
            "{fault} struck {times} times, the relay counted {counted}: {:?}",
            samples.drops()
        );
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn killed_in_the_middle_of_every_fault_nothing_is_lost_or_doubled_on_sqlite() {
    killed_in_the_middle("SQLite", None).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn killed_in_the_middle_of_every_fault_nothing_is_lost_or_doubled_on_postgres() {
    if let Some(server) = postgres::server() {
        killed_in_the_middle("PostgreSQL", Some(server.database().await)).await;
    }
}

async fn killed_in_the_middle(name: &str, database: Option<String>) {
    let kills = kills(KILLS);
    let mut faults = FaultPlan::all(0.1, kills);
    // The flooding host has sent nothing before its flood: a relay that is down at that moment has no cursor of it, and
    // takes it up live, behind the flood.
    faults.faults.retain(|fault| *fault != Fault::Flood);
    let prepared = tokio::task::spawn_blocking(move || {
        Prepared::new(options(kills * EVENTS_PER_KILL, faults), &|_, _| {})
    })
    .await
    .unwrap();
    let swarm = Swarm::start(&prepared).await.unwrap();
    let folder = tempfile::tempdir().unwrap();
    let mut relay = start(&prepared, &swarm, folder.path(), database).await;
    let consumer = consume(&prepared, &relay).await;
    swarm.introduce(&prepared);
    let introduced = prepared.introduced();
    consumer
        .wait_for(PATIENCE, |checker| checker.complete() >= introduced)
        .await
        .unwrap();
    let everything = prepared.ledger().forward();
    let mut moments = fastrand::Rng::with_seed(3);
    let mut longest = Duration::ZERO;
    let kill = async {
        for round in 1..=kills {
            let due = introduced + (everything - introduced) * round / (kills + 1);
            consumer
                .wait_for(PATIENCE, |checker| checker.complete() >= due)
                .await
                .unwrap_or_else(|error| panic!("round {round}: {error}\n{}", relay.said()));
            // Also when nothing comes out, such as while a host that begins anew is waited for.
            tokio::time::sleep(Duration::from_millis(moments.u64(0..300))).await;
            relay.kill().unwrap();
            let ready = relay
                .restart(PATIENCE)
                .await
                .unwrap_or_else(|error| panic!("round {round}: {error}"));
            longest = longest.max(ready);
        }
    };
    let (played, ()) = tokio::join!(swarm.play(&prepared, 1_500.0, &consumer), kill);
    played.unwrap();
    let outcome = finish(&prepared, consumer).await;
    let report = outcome.checker.report();
    println!(
        "{name}: {kills} kills, {} faults; {report}; ready after {longest:?} at most",
        prepared.injected().len()
    );
    assert!(report.is_clean(), "{report}");
    assert!(report.reconnects >= kills, "{report}");
    same_from_the_beginning(&prepared, &relay, &outcome).await;
}
