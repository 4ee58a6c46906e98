//! The state of accounts at scale: memory and time of resident accounts, what reading and writing them costs in a
//! database of that many, and a whole relay over it. Every part runs in a process of its own.
//!
//! `cargo bench --bench state` measures a million accounts, `cargo bench --bench state -- 1000000 10000000` others as
//! well. With `residents`, `sqlite`, `postgres` or `relay` before the numbers only that part.

#[path = "../tests/it/support/postgres.rs"]
mod postgres;
mod support;

use std::collections::BTreeSet;
use std::process::Command;
use std::time::{Duration, Instant};

use atproto_relay::atproto::cid::{Cid, Codec};
use atproto_relay::atproto::did::Did;
use atproto_relay::atproto::frame::{self, Peek};
use atproto_relay::atproto::key::{PublicKey, VerifyingKey};
use atproto_relay::atproto::tid::Tid;
use atproto_relay::config::SQLITE_FILE;
use atproto_relay::devnet::keys::{Curve, SigningKey};
use atproto_relay::devnet::load::{
    self, LoadOptions, Patience, Prepared, ProcessOptions, RelayProcess, Swarm, Target, Usage,
    unlimited,
};
use atproto_relay::devnet::scrape::Samples;
use atproto_relay::devnet::scratch::Scratch;
use atproto_relay::store::{
    AccountRow, AccountUpdate, Batch, HostId, KnownKey, LocalStatus, NewHost, RepoState, Store,
    UpstreamStatus,
};
use atproto_relay::verify::residents::Residents;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use sqlx::{AssertSqlSafe, Connection, PgConnection, SqliteConnection};

/// How many accounts there are where no number is given.
const SIZE: u64 = 1_000_000;
/// Memory that is given for one account: the most that it may take.
const BYTES_EACH: u64 = 70;
/// Accounts between two looks at whether too many are in use, as in a busy shard.
const BATCH: usize = 64;
/// Uses of resident accounts that are timed.
const USES: usize = 200_000;
/// Accounts that are all in use after a while.
const IN_USE: u64 = 1_000;
/// Keys that the accounts share: parsing costs the same as with one each, drawing does not.
const KEYS: usize = 64;
/// Rows read at once, and read in all for each of them.
const READS: [usize; 4] = [1, 10, 100, 500];
const ROWS_READ: usize = 20_000;
/// Rows written at once, and in all.
const ROWS_AT_ONCE: usize = 1_000;
const ROWS_WRITTEN: usize = 50_000;
/// Rows that one statement makes.
const ROWS_SEEDED: u64 = 500_000;
/// Accounts that send events to a whole relay, far more than may be in use at once, and their events.
const LOAD_ACCOUNTS: usize = 50_000;
const LOAD_EVENTS: usize = 100_000;
/// Longest wait for anything.
const PATIENCE: Duration = Duration::from_secs(300);
const NOW: i64 = 1_790_000_040;

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let part = arguments.iter().find(|word| PARTS.contains(&word.as_str()));
    let mut sizes: Vec<u64> = arguments
        .iter()
        .filter_map(|word| word.parse().ok())
        .collect();
    if sizes.is_empty() {
        sizes.push(SIZE);
    }
    match (part, &sizes[..]) {
        (Some(part), [size]) => run(part, *size),
        (part, sizes) => {
            for name in PARTS {
                for size in sizes {
                    if part.is_none_or(|part| part == name) {
                        alone(name, *size);
                    }
                }
            }
        }
    }
}

const PARTS: [&str; 4] = ["residents", "sqlite", "postgres", "relay"];

/// Measures one part in a process of its own, so that none finds memory that another has left.
fn alone(part: &str, size: u64) {
    let own = std::env::current_exe().expect("the path of this program");
    let status = Command::new(own)
        .args([part, &size.to_string()])
        .status()
        .expect("this program starts again");
    assert!(status.success(), "{part} {size} failed");
}

fn run(part: &str, size: u64) {
    if part == "residents" {
        return residents(size);
    }
    let runtime = tokio::runtime::Runtime::new().expect("a runtime");
    runtime.block_on(async {
        match part {
            "sqlite" => sqlite(size).await,
            "postgres" => postgresql(size).await,
            _ => relay(size).await,
        }
    });
}

/// The text of account `number`'s DID.
fn did(number: u64) -> Did {
    const BASE32: &[u8; 32] = b"abcdefghijklmnopqrstuvwxyz234567";
    let mut rng = StdRng::seed_from_u64(number);
    let text: String = (0..24)
        .map(|_| char::from(BASE32[rng.random_range(0..32)]))
        .collect();
    Did::parse(&format!("did:plc:{text}")).expect("a DID")
}

fn repo(number: u64) -> RepoState {
    RepoState {
        rev: Tid::from_micros(NOW as u64 * 1_000_000 + number, 0),
        data: Cid::of(Codec::DagCbor, &number.to_be_bytes()),
        commit: Cid::of(Codec::DagCbor, &number.to_le_bytes()),
        desynchronized: false,
    }
}

fn row(number: u64, keys: &[PublicKey]) -> AccountRow {
    AccountRow {
        uid: number as i64,
        did: did(number),
        counted: true,
        host: HostId(1),
        local: LocalStatus::Active,
        upstream: UpstreamStatus::Active,
        repo: Some(repo(number)),
        signing_key: Some(keys[number as usize % keys.len()]),
        resolved_at: Some(NOW),
    }
}

fn keys() -> Vec<PublicKey> {
    let mut rng = StdRng::seed_from_u64(1);
    (0..KEYS)
        .map(|_| SigningKey::generate(Curve::K256, &mut rng).did_key())
        .map(|key| PublicKey::parse_did_key(&key).expect("a key"))
        .collect()
}

fn residents(size: u64) {
    let keys = keys();
    let before = usage().resident;
    let mut residents = Residents::new((size * BYTES_EACH) as usize, 1);
    for number in 0..size {
        let row = row(number, &keys);
        residents.learn(&row.did.clone(), Some(row));
        if number % BATCH as u64 == 0 {
            residents.shrink(0, |_| false);
        }
    }
    residents.shrink(0, |_| false);
    let bytes = usage().resident - before;
    let kept = residents.len();
    support::row(
        &format!("memory of a resident account, {size} of them"),
        &format!("{:.1} bytes", bytes as f64 / kept as f64),
        &format!("{kept} kept in a budget of {BYTES_EACH} bytes each"),
    );

    let mut rng = StdRng::seed_from_u64(2);
    let mut timed = |among: u64, what: &str| {
        let (mut spent, mut hits) = (Duration::ZERO, 0);
        for _ in 0..USES / BATCH {
            let dids: Vec<Did> = (0..BATCH)
                .map(|_| did(rng.random_range(0..among)))
                .collect();
            let start = support::processor_time();
            for did in &dids {
                hits += usize::from(residents.get(did).is_some());
            }
            residents.shrink(0, |_| false);
            spent += support::processor_time() - start;
        }
        support::row(
            &format!("use of a resident account, {size} of them, {what}"),
            &support::time(spent / USES as u32),
            &format!("{:.1} % found", hits as f64 * 100.0 / USES as f64),
        );
    };
    timed(size, "any, its key parsed");
    timed(IN_USE, "in use already");
    let start = support::processor_time();
    for number in 0..USES {
        let parsed = VerifyingKey::new(&keys[number % KEYS]);
        std::hint::black_box(&parsed).as_ref().expect("a key");
    }
    let one = (support::processor_time() - start) / USES as u32;
    support::row("parsing a key", &support::time(one), "");
}

fn usage() -> Usage {
    Usage::of(std::process::id()).expect("the kernel tells what a process uses")
}

async fn sqlite(size: u64) {
    let scratch = Scratch::new("state").expect("a temporary folder");
    let url = format!("sqlite:{}", scratch.path().join(SQLITE_FILE).display());
    let host = seed_sqlite(&url, size).await;
    let mut asking = SqliteConnection::connect(&url).await.expect("the database");
    let query = format!("SELECT did FROM accounts WHERE uid IN ({})", sampled(size));
    let rows: Vec<(String,)> = sqlx::query_as(AssertSqlSafe(query))
        .fetch_all(&mut asking)
        .await
        .expect("rows");
    execute(asking.close().await);
    measure("SQLite", size, &url, host, &sample(rows)).await;
}

/// A database with so many accounts, in the random order in which a relay meets them.
async fn seed_sqlite(url: &str, size: u64) -> HostId {
    let store = Store::open(url).await.expect("a database");
    let host = add_host(&store).await;
    let mut seeding = SqliteConnection::connect(url).await.expect("the database");
    for pragma in ["synchronous = OFF", "cache_size = -4000000"] {
        let pragma = format!("PRAGMA {pragma}");
        execute(
            sqlx::query(AssertSqlSafe(pragma))
                .execute(&mut seeding)
                .await,
        );
    }
    let mut left = size;
    while left > 0 {
        let rows = left.min(ROWS_SEEDED);
        execute(
            sqlx::query(
                "INSERT INTO accounts (rev, resolved_at, host_id, did, data_cid, commit_cid, signing_key) \
                 WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < $1) \
                 SELECT 1 + abs(random()) / 1000, $2, $3, 'did:plc:' || lower(hex(randomblob(12))), \
                 CAST(x'01711220' || randomblob(32) AS BLOB), CAST(x'01711220' || randomblob(32) AS BLOB), \
                 CAST(x'0102' || randomblob(32) AS BLOB) FROM n",
            )
            .bind(rows as i64)
            .bind(NOW)
            .bind(host.0)
            .execute(&mut seeding)
            .await,
        );
        left -= rows;
    }
    execute(seeding.close().await);
    store.close().await;
    host
}

async fn postgresql(size: u64) {
    let Some(server) = postgres::server() else {
        return;
    };
    let url = server.database().await;
    let store = Store::open(&url).await.expect("a database");
    let host = add_host(&store).await;
    let mut seeding = PgConnection::connect(&url).await.expect("the database");
    execute(
        sqlx::query(
            "INSERT INTO accounts (rev, resolved_at, host_id, did, data_cid, commit_cid, signing_key) \
             SELECT (random() * 1e15)::int8, $2, $3, 'did:plc:' || substr(md5(random()::text), 1, 24), \
             '\\x01711220'::bytea || sha256(random()::text::bytea), \
             '\\x01711220'::bytea || sha256(random()::text::bytea), \
             '\\x0102'::bytea || sha256(random()::text::bytea) FROM generate_series(1, $1)",
        )
        .bind(size as i64)
        .bind(NOW)
        .bind(host.0 as i32)
        .execute(&mut seeding)
        .await,
    );
    execute(
        sqlx::query("VACUUM ANALYZE accounts")
            .execute(&mut seeding)
            .await,
    );
    let query = format!("SELECT did FROM accounts WHERE uid IN ({})", sampled(size));
    let rows: Vec<(String,)> = sqlx::query_as(AssertSqlSafe(query))
        .fetch_all(&mut seeding)
        .await
        .expect("rows");
    store.close().await;
    measure("PostgreSQL", size, &url, host, &sample(rows)).await;
}

async fn add_host(store: &Store) -> HostId {
    let host = NewHost::new("pds.example", true, true);
    store.add_host(&host).await.expect("a host").id
}

fn execute<T>(result: Result<T, sqlx::Error>) {
    result.map(drop).expect("a statement");
}

/// Accounts all over the table, as SQL lists them.
fn sampled(size: u64) -> String {
    let mut rng = StdRng::seed_from_u64(3);
    let uids: Vec<String> = (0..ROWS_WRITTEN)
        .map(|_| rng.random_range(1..=size).to_string())
        .collect();
    uids.join(",")
}

fn sample(rows: Vec<(String,)>) -> Vec<Did> {
    let mut dids: Vec<Did> = rows
        .iter()
        .map(|(did,)| Did::parse(did).expect("a DID"))
        .collect();
    let mut rng = StdRng::seed_from_u64(4);
    for last in (1..dids.len()).rev() {
        dids.swap(last, rng.random_range(0..=last));
    }
    dids
}

/// Reads and writes as the relay does, with the database's files in the page cache.
async fn measure(part: &str, size: u64, url: &str, host: HostId, sample: &[Did]) {
    let start = Instant::now();
    let store = Store::open(url).await.expect("the database");
    let took = support::time(start.elapsed());
    support::row(&format!("opening {part} with {size} accounts"), &took, "");
    for at_once in READS {
        // Once to warm up.
        for warm in [true, false] {
            let count = Count::start();
            for dids in sample[..ROWS_READ.min(sample.len())].chunks(at_once) {
                let rows = store.accounts(dids).await.expect("rows");
                assert_eq!(rows.len(), dids.len());
            }
            if !warm {
                count.print(
                    part,
                    size,
                    &format!("to read an account, {at_once} at once"),
                );
            }
        }
    }
    let changed = |number: usize, did: &Did| AccountUpdate {
        repo: Some(RepoState {
            rev: Tid::from_u64(i64::MAX as u64 - (ROWS_WRITTEN - number) as u64),
            ..repo(number as u64)
        }),
        ..AccountUpdate::new(did.clone())
    };
    let updates = sample
        .iter()
        .enumerate()
        .map(|(number, did)| changed(number, did));
    write(
        &store,
        part,
        size,
        "to write a commit's state",
        updates.collect(),
    )
    .await;
    let keys = keys();
    let new = (0..ROWS_WRITTEN as u64).map(|number| AccountUpdate {
        host: Some(host),
        key: Some(KnownKey {
            signing_key: Some(keys[number as usize % KEYS]),
            resolved_at: NOW,
        }),
        ..AccountUpdate::new(did(number))
    });
    write(&store, part, size, "to write a new account", new.collect()).await;
    store.close().await;
}

async fn write(store: &Store, part: &str, size: u64, what: &str, updates: Vec<AccountUpdate>) {
    let rows = updates.len();
    let count = Count::start();
    for accounts in updates.chunks(ROWS_AT_ONCE) {
        let batch = Batch {
            accounts: accounts.to_vec(),
            ..Batch::default()
        };
        store.apply(&batch).await.expect("a write");
    }
    count.rows(rows).print(part, size, what);
}

/// Time on the wall and processor time of this process, for so many rows.
struct Count {
    start: Instant,
    cpu: f64,
    rows: usize,
}

impl Count {
    fn start() -> Self {
        Self {
            start: Instant::now(),
            cpu: usage().cpu_seconds,
            rows: ROWS_READ,
        }
    }

    fn rows(self, rows: usize) -> Self {
        Self { rows, ..self }
    }

    fn print(&self, part: &str, size: u64, what: &str) {
        let each =
            |seconds: f64| support::time(Duration::from_secs_f64(seconds / self.rows as f64));
        support::row(
            &format!("{part}, {size} accounts: {what}"),
            &each(self.start.elapsed().as_secs_f64()),
            &format!(
                "{} of this process's CPU",
                each(usage().cpu_seconds - self.cpu)
            ),
        );
    }
}

/// A relay over a database of so many accounts, of which those of the load are some, anywhere in the table: once with
/// all of them resident, once with memory for few, so that most events wait for SQL.
async fn relay(size: u64) {
    let options = LoadOptions {
        accounts: LOAD_ACCOUNTS,
        events: LOAD_EVENTS,
        ..LoadOptions::default()
    };
    let prepared = tokio::task::spawn_blocking(|| Prepared::new(options, &|_, _| {}));
    let prepared = prepared.await.expect("signed events");
    let scratch = Scratch::new("state").expect("a temporary folder");
    let seeded = scratch.path().join("seeded.sqlite");
    let url = format!("sqlite:{}", seeded.display());
    seed_sqlite(&url, size).await;
    give_places(&url, size, &prepared).await;
    for (what, cache) in [("resident", "1GiB"), ("read for most events", "1MiB")] {
        let folder = scratch.path().join(cache);
        std::fs::create_dir_all(folder.join("data")).expect("a folder");
        std::fs::copy(&seeded, folder.join("data").join(SQLITE_FILE)).expect("a copy");
        let swarm = Swarm::start(&prepared).await.expect("hosts");
        let mut arguments = unlimited(0);
        arguments.push(format!("--account-cache={cache}").into());
        let start = Instant::now();
        let relay = RelayProcess::start(
            ProcessOptions {
                binary: env!("CARGO_BIN_EXE_atproto-relay").into(),
                folder,
                plc: swarm.plc_url(),
                hosts: swarm.host_urls(),
                arguments,
            },
            PATIENCE,
        );
        let relay = relay.await.expect("a relay");
        let ready = start.elapsed();
        let usage = || relay.usage();
        let target = Target {
            firehose: relay.firehose(),
            usage: Some(&usage),
        };
        let measured = load::run(&prepared, &swarm, target, 0.0, Patience::default(), &|_| {});
        let measured = measured.await.expect("a run");
        eprintln!("{measured}");
        let samples = Samples::scrape(&relay.metrics_url())
            .await
            .expect("metrics");
        assert!(
            measured.checker.report().is_clean(),
            "{}",
            measured.checker.report()
        );
        let (hits, misses) = (
            samples.sum("relay_account_cache_hits_total"),
            samples.sum("relay_account_cache_misses_total"),
        );
        support::row(
            &format!(
                "whole relay, {size} accounts in SQLite, {LOAD_ACCOUNTS} of them with events, their state {what}"
            ),
            &format!(
                "{} of CPU an event, ready after {}, {:.0} % hits since the start",
                support::time(measured.cpu_per_event().unwrap_or_default()),
                support::time(ready),
                hits * 100.0 / (hits + misses)
            ),
            &format!("{:.2} verifications", measured.ratio().unwrap_or_default()),
        );
        relay.end(PATIENCE).await.expect("an end");
    }
}

/// Gives the load's accounts the rows of others, anywhere in the table. Their keys are not known there yet.
async fn give_places(url: &str, size: u64, prepared: &Prepared) {
    let dids: BTreeSet<Did> = prepared
        .frames()
        .filter_map(|frame| match frame::peek(frame) {
            Ok(Peek::Event(event)) => {
                Did::normalized(std::str::from_utf8(&frame[event.did_span]).ok()?).ok()
            }
            _ => None,
        })
        .collect();
    let mut rng = StdRng::seed_from_u64(5);
    let mut uids = BTreeSet::new();
    while uids.len() < dids.len() {
        uids.insert(rng.random_range(1..=size as i64));
    }
    let mut database = SqliteConnection::connect(url).await.expect("the database");
    let mut taken = database.begin().await.expect("a transaction");
    for (did, uid) in dids.iter().zip(uids) {
        execute(
            sqlx::query(
                "UPDATE accounts SET did = $1, rev = NULL, data_cid = NULL, commit_cid = NULL, signing_key = NULL, \
                 resolved_at = NULL WHERE uid = $2",
            )
            .bind(did.as_str())
            .bind(uid)
            .execute(&mut *taken)
            .await,
        );
    }
    execute(taken.commit().await);
    execute(database.close().await);
}
