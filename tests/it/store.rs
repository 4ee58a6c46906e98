//! The store on both databases: every test runs on SQLite in a temporary file, and on PostgreSQL
//! where the machine has a server.

use crate::support::postgres;
use atproto_relay::atproto::cid::{Cid, Codec};
use atproto_relay::atproto::did::Did;
use atproto_relay::atproto::key::PublicKey;
use atproto_relay::atproto::tid::Tid;
use atproto_relay::dial::DomainPattern;
use atproto_relay::store::{
    AccountRow, AccountUpdate, Batch, Heard, HostId, HostRow, HostStatus, KnownKey, LocalStatus,
    Metrics, NewHost, RateOverrides, RepoState, Store, StoreError, UpstreamStatus, Validation,
    Writer,
};
use sqlx::migrate::Migrator;
use sqlx::sqlite::SqliteConnectOptions;
use sqlx::{AssertSqlSafe, Connection, PgConnection, SqliteConnection};
use std::collections::HashMap;
use std::future::Future;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::str::FromStr as _;
use std::time::Duration;

/// Longest time a test waits for a condition.
const PATIENCE: Duration = Duration::from_secs(30);

/// Runs a test on each database: it gets the URL of an empty one.
fn on_both<F: Future<Output = ()>>(test: impl Fn(String) -> F) {
    let runtime = tokio::runtime::Runtime::new().expect("a runtime starts");
    let folder = tempfile::tempdir().expect("a temporary folder");
    runtime.block_on(test(format!(
        "sqlite:{}",
        folder.path().join("relay.db").display()
    )));
    if let Some(server) = postgres::server() {
        runtime.block_on(async { test(server.database().await).await });
    }
}

async fn open(url: &str) -> Store {
    Store::open(url).await.expect("the database opens")
}

/// Runs a statement behind the store's back.
async fn execute(url: &str, sql: &str) {
    let sql = AssertSqlSafe(sql.to_owned());
    if url.starts_with("sqlite:") {
        let mut connection = SqliteConnection::connect(url)
            .await
            .expect("the file opens");
        sqlx::query(sql)
            .execute(&mut connection)
            .await
            .expect("the statement runs");
        connection.close().await.expect("the file closes");
    } else {
        let mut connection = PgConnection::connect(url)
            .await
            .expect("the server answers");
        sqlx::query(sql)
            .execute(&mut connection)
            .await
            .expect("the statement runs");
        connection.close().await.expect("the connection closes");
    }
}

fn did(n: u32) -> Did {
    let digits: String = (0..24)
        .map(|i| {
            char::from(b"abcdefghijklmnopqrstuvwxyz234567"[((n >> (i % 6 * 5)) & 31) as usize])
        })
        .collect();
    Did::parse(&format!("did:plc:{digits}")).expect("a did:plc")
}

fn repo(n: u64) -> RepoState {
    RepoState {
        rev: Tid::from_micros(1_700_000_000_000_000 + n, 0),
        data: Cid::of(Codec::DagCbor, format!("data {n}").as_bytes()),
        commit: Cid::of(Codec::DagCbor, format!("commit {n}").as_bytes()),
        desynchronized: false,
    }
}

fn key(resolved_at: i64) -> KnownKey {
    let key = PublicKey::parse_did_key("did:key:zQ3shokFTS3brHcDQrn82RUDfCZESWL1ZdCEJwekUDPQiYBme")
        .expect("a did:key");
    KnownKey {
        signing_key: Some(key),
        resolved_at,
    }
}

fn created(n: u32, host: HostId) -> AccountUpdate {
    AccountUpdate {
        host: Some(host),
        ..AccountUpdate::new(did(n))
    }
}

fn batch(accounts: Vec<AccountUpdate>) -> Batch {
    Batch {
        accounts,
        ..Batch::default()
    }
}

async fn host_with_limit(store: &Store, name: &str, account_limit: i64) -> HostRow {
    let host = NewHost {
        account_limit,
        ..NewHost::new(name, true, false)
    };
    store.add_host(&host).await.expect("the host is added")
}

async fn account(store: &Store, n: u32) -> AccountRow {
    store
        .account(&did(n))
        .await
        .expect("the account is read")
        .expect("the account is known")
}

async fn count(store: &Store, host: HostId) -> i64 {
    store.count_accounts(host).await.expect("the count is read")
}

#[test]
fn a_new_database_is_empty_and_opens_again() {
    on_both(|url| async move {
        for _ in 0..2 {
            let store = open(&url).await;
            store.check().await.unwrap();
            assert_eq!(store.replay_from().await.unwrap(), 1);
            assert_eq!(store.log_head().await.unwrap(), 0);
            assert_eq!(store.hosts().await.unwrap(), []);
            assert_eq!(store.list_accounts(0, 10).await.unwrap().rows, []);
            assert_eq!(store.domain_bans().await.unwrap(), Vec::<String>::new());
            assert_eq!(store.account(&did(1)).await.unwrap(), None);
            assert_eq!(store.count_accounts(HostId(1)).await.unwrap(), 0);
            store.close().await;
        }
    });
}

#[test]
fn a_host_is_added_once_and_keeps_what_is_set() {
    on_both(|url| async move {
        let store = open(&url).await;
        let host = store
            .add_host(&NewHost::new("pds.example.com", true, false))
            .await
            .unwrap();
        assert_eq!(
            (host.account_limit, host.account_count, host.cursor),
            (100, 0, None)
        );
        assert_eq!(
            (host.status, host.tls, host.trusted, host.sync11),
            (HostStatus::Active, true, false, false)
        );
        assert!(host.created_at > 1_700_000_000);
        let again = store
            .add_host(&NewHost::new("pds.example.com", false, true))
            .await
            .unwrap();
        assert_eq!(again, host);
        let trusted = store
            .add_host(&NewHost::new("a.host.bsky.network", true, true))
            .await
            .unwrap();
        assert_eq!(trusted.account_limit, 10_000_000);
        assert_ne!(trusted.id, host.id);

        let rates = RateOverrides {
            per_second: Some(5),
            per_hour: None,
            per_day: Some(u32::MAX),
            bytes_per_hour: Some(1 << 40),
        };
        store.set_host_rates(host.id, rates).await.unwrap();
        store
            .set_host_validation(host.id, Some(Validation::Ratchet))
            .await
            .unwrap();
        store.mark_sync11(host.id).await.unwrap();
        for status in [
            HostStatus::Idle,
            HostStatus::Offline,
            HostStatus::Throttled,
            HostStatus::Active,
            HostStatus::Banned,
        ] {
            store.set_host_status(host.id, status).await.unwrap();
            assert_eq!(store.host(host.id).await.unwrap().unwrap().status, status);
        }
        store
            .apply(&Batch {
                cursors: vec![(host.id, 7), (host.id, 9)],
                ..Batch::default()
            })
            .await
            .unwrap();
        store.close().await;

        let store = open(&url).await;
        let read = store
            .host_by_name("pds.example.com")
            .await
            .unwrap()
            .unwrap();
        assert_eq!(
            (read.rates, read.validation, read.sync11),
            (rates, Some(Validation::Ratchet), true)
        );
        assert_eq!((read.cursor, read.status), (Some(9), HostStatus::Banned));
        store.set_host_validation(host.id, None).await.unwrap();
        store
            .set_host_rates(host.id, RateOverrides::default())
            .await
            .unwrap();
        let read = store.host(host.id).await.unwrap().unwrap();
        assert_eq!(
            (read.rates, read.validation),
            (RateOverrides::default(), None)
        );
        assert_eq!(store.host_by_name("other.example.com").await.unwrap(), None);
        store.close().await;
    });
}

#[test]
fn an_unknown_host_or_account_is_an_error_to_change() {
    on_both(|url| async move {
        let store = open(&url).await;
        let nobody = HostId(77);
        assert!(matches!(
            store.set_host_status(nobody, HostStatus::Banned).await,
            Err(StoreError::UnknownHost(_))
        ));
        assert!(matches!(
            store.set_account_limit(nobody, 5).await,
            Err(StoreError::UnknownHost(_))
        ));
        assert!(matches!(
            store.mark_sync11(nobody).await,
            Err(StoreError::UnknownHost(_))
        ));
        assert!(matches!(
            store
                .set_local_status(&did(1), LocalStatus::TakenDown)
                .await,
            Err(StoreError::UnknownAccount(_))
        ));
        assert_eq!(store.release_throttled(nobody, 5).await.unwrap(), []);
        // Without a host there is nothing to create.
        let update = AccountUpdate {
            repo: Some(repo(1)),
            ..AccountUpdate::new(did(1))
        };
        store.apply(&batch(vec![update])).await.unwrap();
        assert_eq!(store.account(&did(1)).await.unwrap(), None);
        store.close().await;
    });
}

#[test]
fn lists_of_hosts_come_in_pages() {
    on_both(|url| async move {
        let store = open(&url).await;
        let mut ids = Vec::new();
        for n in 0..7 {
            ids.push(
                host_with_limit(&store, &format!("h{n}.example.com"), 100)
                    .await
                    .id,
            );
        }
        let first = store.list_hosts(None, 3).await.unwrap();
        let second = store.list_hosts(Some(first[2].id), 3).await.unwrap();
        let third = store.list_hosts(Some(second[2].id), 3).await.unwrap();
        let all: Vec<HostId> = [first, second, third]
            .concat()
            .iter()
            .map(|host| host.id)
            .collect();
        assert_eq!(all, ids);
        let cursors = vec![(ids[1], 5), (ids[4], 6)];
        store
            .apply(&Batch {
                cursors,
                ..Batch::default()
            })
            .await
            .unwrap();
        let seen: Vec<HostId> = store
            .list_hosts(None, 10)
            .await
            .unwrap()
            .iter()
            .filter(|host| host.cursor.is_some())
            .map(|host| host.id)
            .collect();
        assert_eq!(seen, [ids[1], ids[4]]);
        store.close().await;
    });
}

#[test]
fn an_update_changes_only_what_it_names() {
    on_both(|url| async move {
        let store = open(&url).await;
        let host = host_with_limit(&store, "pds.example.com", 100).await.id;
        let rows = store.create_accounts(vec![created(1, host)]).await.unwrap();
        let row = &rows[&did(1)];
        assert_eq!(
            (row.host, row.local, &row.upstream),
            (host, LocalStatus::Active, &UpstreamStatus::Active)
        );
        assert_eq!(
            (row.repo, row.signing_key, row.resolved_at),
            (None, None, None)
        );
        assert_eq!(row.public_status(), (true, None));

        let state = RepoState {
            desynchronized: true,
            ..repo(5)
        };
        let steps = [
            AccountUpdate {
                repo: Some(state),
                ..AccountUpdate::new(did(1))
            },
            AccountUpdate {
                key: Some(key(1000)),
                ..AccountUpdate::new(did(1))
            },
            AccountUpdate {
                upstream: Some(UpstreamStatus::Other("asleep".into())),
                ..AccountUpdate::new(did(1))
            },
            AccountUpdate {
                local: Some(LocalStatus::Desynchronized),
                ..AccountUpdate::new(did(1))
            },
            AccountUpdate::new(did(1)),
        ];
        for step in steps {
            store.apply(&batch(vec![step])).await.unwrap();
        }
        let row = account(&store, 1).await;
        assert_eq!(row.repo, Some(state));
        assert_eq!(
            (row.signing_key, row.resolved_at),
            (key(0).signing_key, Some(1000))
        );
        assert_eq!(row.upstream, UpstreamStatus::Other("asleep".into()));
        assert_eq!(row.public_status(), (false, Some("desynchronized")));

        // A document without a key takes the key away; an account that is back is active again.
        let gone = KnownKey {
            signing_key: None,
            resolved_at: 1001,
        };
        let update = AccountUpdate {
            key: Some(gone),
            upstream: Some(UpstreamStatus::Active),
            local: Some(LocalStatus::Active),
            ..AccountUpdate::new(did(1))
        };
        store.apply(&batch(vec![update])).await.unwrap();
        let row = account(&store, 1).await;
        assert_eq!((row.signing_key, row.resolved_at), (None, Some(1001)));
        assert_eq!((row.public_status(), row.repo), ((true, None), Some(state)));
        store.close().await;
    });
}

#[test]
fn every_status_comes_back_as_it_went_in() {
    on_both(|url| async move {
        let store = open(&url).await;
        let host = host_with_limit(&store, "pds.example.com", 100).await.id;
        let words = [
            "deactivated",
            "deleted",
            "desynchronized",
            "suspended",
            "takendown",
            "throttled",
            "moved-away",
        ];
        let mut updates = Vec::new();
        for (n, word) in (0..).zip(words) {
            let upstream = Some(UpstreamStatus::from_event(false, Some(word)));
            updates.push(AccountUpdate {
                upstream,
                ..created(n, host)
            });
        }
        let bare = Some(UpstreamStatus::from_event(false, None));
        updates.push(AccountUpdate {
            upstream: bare,
            ..created(99, host)
        });
        store.apply(&batch(updates)).await.unwrap();
        for (n, word) in (0..).zip(words) {
            assert_eq!(
                account(&store, n).await.public_status(),
                (false, Some(word))
            );
        }
        assert_eq!(account(&store, 99).await.public_status(), (false, None));
        for status in [
            LocalStatus::TakenDown,
            LocalStatus::Throttled,
            LocalStatus::Suspended,
            LocalStatus::Desynchronized,
            LocalStatus::Active,
        ] {
            assert_eq!(
                store.set_local_status(&did(0), status).await.unwrap().local,
                status
            );
            assert_eq!(account(&store, 0).await.local, status);
        }
        store.close().await;
    });
}

#[test]
fn counts_follow_creation_and_migration_and_survive_replays() {
    on_both(|url| async move {
        let store = open(&url).await;
        let a = host_with_limit(&store, "a.example.com", 100).await.id;
        let b = host_with_limit(&store, "b.example.com", 100).await.id;
        let creation = batch((0..10).map(|n| created(n, a)).collect());
        // An account named twice in one batch counts once, on the host it ends on.
        let moves = batch(vec![
            created(3, b),
            created(3, a),
            created(4, b),
            created(10, a),
            created(10, b),
        ]);
        for _ in 0..2 {
            store.apply(&creation).await.unwrap();
            store.apply(&moves).await.unwrap();
            store.apply(&moves).await.unwrap();
            assert_eq!((count(&store, a).await, count(&store, b).await), (9, 2));
        }
        assert_eq!(account(&store, 3).await.host, a);
        assert_eq!(account(&store, 4).await.host, b);
        assert_eq!(account(&store, 10).await.host, b);
        store
            .apply(&batch(vec![created(4, a), created(10, a)]))
            .await
            .unwrap();
        assert_eq!((count(&store, a).await, count(&store, b).await), (11, 0));
        store.close().await;
    });
}

#[test]
fn accounts_over_the_quota_are_throttled_and_released_oldest_first() {
    on_both(|url| async move {
        let store = open(&url).await;
        let host = host_with_limit(&store, "small.example.com", 2).await.id;
        let other = host_with_limit(&store, "large.example.com", 100).await.id;
        store.create_accounts(vec![created(0, host)]).await.unwrap();
        let rows = store
            .create_accounts((0..6).map(|n| created(n, host)).collect())
            .await
            .unwrap();
        let local = |n: u32| rows[&did(n)].local;
        assert_eq!([local(0), local(1)], [LocalStatus::Active; 2]);
        assert_eq!(
            [local(2), local(3), local(4), local(5)],
            [LocalStatus::Throttled; 4]
        );
        assert_eq!(rows[&did(2)].public_status(), (false, Some("throttled")));
        // An explicit decision stands; another host has its own quota; a replay changes nothing.
        let decided = AccountUpdate {
            local: Some(LocalStatus::Active),
            ..created(6, host)
        };
        store
            .apply(&batch(vec![decided, created(7, other)]))
            .await
            .unwrap();
        store
            .apply(&batch((0..8).map(|n| AccountUpdate::new(did(n))).collect()))
            .await
            .unwrap();
        assert_eq!(account(&store, 6).await.local, LocalStatus::Active);
        assert_eq!(account(&store, 7).await.local, LocalStatus::Active);
        assert_eq!(count(&store, host).await, 7);
        let waiting: Vec<Did> = store
            .throttled_accounts(host, 3)
            .await
            .unwrap()
            .into_iter()
            .map(|row| row.did)
            .collect();
        assert_eq!(waiting, [did(2), did(3), did(4)]);

        assert_eq!(store.release_throttled(host, 1).await.unwrap(), [did(2)]);
        // Four are served now: a limit of five leaves room for one, a lower one for none.
        assert_eq!(store.set_account_limit(host, 5).await.unwrap(), [did(3)]);
        assert_eq!(store.set_account_limit(host, 1).await.unwrap(), []);
        assert_eq!(account(&store, 0).await.local, LocalStatus::Active);
        assert_eq!(
            store.set_account_limit(host, i64::MAX).await.unwrap(),
            [did(4), did(5)]
        );
        assert_eq!(store.throttled_accounts(host, 10).await.unwrap(), []);
        // A takedown is not released.
        store
            .set_local_status(&did(5), LocalStatus::TakenDown)
            .await
            .unwrap();
        assert_eq!(store.release_throttled(host, 10).await.unwrap(), []);
        store.close().await;
    });
}

#[test]
fn batches_of_any_size_are_written_and_read() {
    on_both(|url| async move {
        let store = open(&url).await;
        let host = store
            .add_host(&NewHost::new("big.example.com", true, true))
            .await
            .unwrap()
            .id;
        let many = 3_456;
        let full = |n: u32| AccountUpdate {
            repo: Some(repo(u64::from(n))),
            key: Some(key(i64::from(n))),
            upstream: Some(UpstreamStatus::Deactivated),
            ..created(n, host)
        };
        store
            .apply(&batch((0..many).map(full).collect()))
            .await
            .unwrap();
        let changes = (0..many + 5).map(|n| AccountUpdate {
            repo: Some(repo(9_000 + u64::from(n))),
            ..AccountUpdate::new(did(n))
        });
        store
            .apply(&Batch {
                accounts: changes.collect(),
                cursors: vec![(host, 12)],
                replay_from: Some(34),
                head: Some(40),
            })
            .await
            .unwrap();
        assert_eq!(count(&store, host).await, i64::from(many));
        assert_eq!(store.replay_from().await.unwrap(), 34);
        assert_eq!(store.log_head().await.unwrap(), 40);
        let dids: Vec<Did> = (0..many + 5).map(did).collect();
        let rows = store.accounts(&dids).await.unwrap();
        assert_eq!(rows.len(), many as usize);
        for n in 0..many {
            let row = &rows[&did(n)];
            assert_eq!(row.repo, Some(repo(9_000 + u64::from(n))));
            assert_eq!(
                (row.resolved_at, &row.upstream),
                (Some(i64::from(n)), &UpstreamStatus::Deactivated)
            );
        }
        // Pages: all of them once, in the order of their uids.
        let mut seen = Vec::new();
        let mut after = 0;
        loop {
            let page = store.list_accounts(after, 1_000).await.unwrap();
            let (next, page) = (page.next, page.rows);
            let Some(last) = page.last() else { break };
            assert!(next.is_none_or(|next| next == last.uid));
            assert!(page.is_sorted_by_key(|row| row.uid) && page[0].uid > after);
            after = last.uid;
            seen.extend(page.into_iter().map(|row| row.did));
        }
        assert_eq!(seen.len(), many as usize);
        seen.sort();
        seen.dedup();
        assert_eq!(seen.len(), many as usize);
        store.apply(&Batch::default()).await.unwrap();
        assert_eq!(store.accounts(&[]).await.unwrap(), HashMap::new());
        store.close().await;
    });
}

#[test]
fn older_state_never_replaces_newer() {
    on_both(|url| async move {
        let store = open(&url).await;
        let host = host_with_limit(&store, "pds.example.com", 100).await.id;
        let now = RepoState {
            desynchronized: true,
            ..repo(10)
        };
        let update = AccountUpdate {
            repo: Some(now),
            key: Some(key(500)),
            ..created(1, host)
        };
        store.apply(&batch(vec![update])).await.unwrap();
        let before = account(&store, 1).await;
        let older_key = KnownKey {
            signing_key: None,
            resolved_at: 499,
        };
        let older = AccountUpdate {
            repo: Some(repo(9)),
            key: Some(older_key),
            ..AccountUpdate::new(did(1))
        };
        store.apply(&batch(vec![older.clone()])).await.unwrap();
        assert_eq!(account(&store, 1).await, before);
        // Inside one batch as well, in both orders.
        let newer = AccountUpdate {
            repo: Some(repo(11)),
            key: Some(key(501)),
            ..AccountUpdate::new(did(1))
        };
        store
            .apply(&batch(vec![older.clone(), newer.clone(), older]))
            .await
            .unwrap();
        let row = account(&store, 1).await;
        assert_eq!((row.repo, row.resolved_at), (Some(repo(11)), Some(501)));
        // The state of the same rev may still lose its mark.
        let marked = RepoState {
            desynchronized: true,
            ..repo(12)
        };
        for state in [marked, repo(12)] {
            let update = AccountUpdate {
                repo: Some(state),
                ..AccountUpdate::new(did(1))
            };
            store.apply(&batch(vec![update])).await.unwrap();
            assert_eq!(account(&store, 1).await.repo, Some(state));
        }
        store.close().await;
    });
}

/// Random histories, written in random batches, then replayed from a random point: the same state.
#[test]
fn a_replayed_log_ends_in_the_same_state() {
    on_both(|url| async move {
        let store = open(&url).await;
        let mut hosts = Vec::new();
        for n in 0..3 {
            hosts.push(
                host_with_limit(&store, &format!("h{n}.example.com"), 4)
                    .await
                    .id,
            );
        }
        let mut random = fastrand::Rng::with_seed(20_260_101);
        let history: Vec<AccountUpdate> = (0..400)
            .map(|n| AccountUpdate {
                host: Some(hosts[random.usize(0..3)]),
                upstream: random
                    .bool()
                    .then(|| UpstreamStatus::from_event(random.bool(), Some("deactivated"))),
                repo: random.bool().then(|| RepoState {
                    desynchronized: random.bool(),
                    ..repo(n)
                }),
                key: random.bool().then(|| key(i64::try_from(n).unwrap())),
                ..AccountUpdate::new(did(random.u32(0..20)))
            })
            .collect();
        let write = async |from: usize, step: usize| {
            for chunk in history[from..].chunks(step) {
                store.apply(&batch(chunk.to_vec())).await.unwrap();
            }
        };
        write(0, 7).await;
        let all: Vec<Did> = (0..20).map(did).collect();
        let state = store.accounts(&all).await.unwrap();
        let counts = [
            count(&store, hosts[0]).await,
            count(&store, hosts[1]).await,
            count(&store, hosts[2]).await,
        ];
        assert_eq!(
            counts.iter().sum::<i64>(),
            i64::try_from(state.len()).unwrap()
        );
        for (from, step) in [(0, 400), (123, 1), (0, 50), (399, 3), (250, 30)] {
            write(from, step).await;
            assert_eq!(
                store.accounts(&all).await.unwrap(),
                state,
                "from {from} in steps of {step}"
            );
        }
        for (host, expected) in hosts.iter().zip(counts) {
            assert_eq!(count(&store, *host).await, expected);
            let there = state.values().filter(|row| row.host == *host).count();
            assert_eq!(i64::try_from(there).unwrap(), expected);
        }
        store.close().await;
    });
}

/// What the log names as an account's host, against what the row knows: the host that the row then has, and whether its
/// key is still there.
#[test]
fn a_replay_moves_no_account_that_has_an_identity() {
    on_both(|url| async move {
        let store = open(&url).await;
        let [old, new] = [
            host_with_limit(&store, "old.example.com", 9).await.id,
            host_with_limit(&store, "new.example.com", 9).await.id,
        ];
        let cases = [
            // Resolved after the event: the row knows better.
            (Some(100), 99, (new, true)),
            // Perhaps before it: nobody is believed until it is resolved.
            (Some(100), 100, (new, false)),
            (Some(100), 101, (new, false)),
            // Never resolved: the log is all there is.
            (None, 101, (old, false)),
        ];
        for (n, (resolved_at, at, expected)) in (0..).zip(cases) {
            let row = AccountUpdate {
                key: resolved_at.map(key),
                upstream: Some(UpstreamStatus::Active),
                status_seq: Some(7),
                ..created(n, new)
            };
            store.apply(&batch(vec![row])).await.unwrap();
            let replayed = AccountUpdate {
                heard: Some(Heard { host: old, at }),
                counted: Some(false),
                upstream: Some(UpstreamStatus::Deleted),
                status_seq: Some(6),
                ..AccountUpdate::new(did(n))
            };
            let counted = expected.0 == new;
            for _ in 0..2 {
                store.apply(&batch(vec![replayed.clone()])).await.unwrap();
                let row = account(&store, n).await;
                let found = (row.host, row.signing_key.is_some());
                assert_eq!(found, expected, "{resolved_at:?} {at}");
                assert_eq!(row.counted, counted);
                assert_eq!(row.upstream, UpstreamStatus::Active, "from a later event");
            }
        }
        assert_eq!((count(&store, old).await, count(&store, new).await), (0, 3));
        // Of an account that is not known the log tells all; a repeated event is not told twice.
        let unknown = AccountUpdate {
            heard: Some(Heard { host: old, at: 1 }),
            counted: Some(true),
            upstream: Some(UpstreamStatus::Active),
            status_seq: Some(5),
            ..AccountUpdate::new(did(50))
        };
        let learned = AccountUpdate {
            upstream: Some(UpstreamStatus::Deleted),
            status_seq: Some(5),
            ..AccountUpdate::new(did(50))
        };
        for (update, counted) in [(&unknown, 1), (&learned, 0), (&unknown, 0)] {
            store.apply(&batch(vec![update.clone()])).await.unwrap();
            assert_eq!(count(&store, old).await, counted);
        }
        let row = account(&store, 50).await;
        assert_eq!((row.host, row.upstream), (old, UpstreamStatus::Deleted));
        store.close().await;
    });
}

#[test]
fn a_failing_batch_leaves_nothing_behind() {
    on_both(|url| async move {
        let store = open(&url).await;
        let host = host_with_limit(&store, "pds.example.com", 100).await.id;
        execute(&url, "ALTER TABLE log_position RENAME TO elsewhere").await;
        let failing = Batch {
            accounts: vec![created(1, host)],
            cursors: vec![(host, 5)],
            replay_from: Some(9),
            head: None,
        };
        let error = store.apply(&failing).await.unwrap_err();
        assert!(
            error.to_string().contains("writing account states"),
            "{error}"
        );
        execute(&url, "ALTER TABLE elsewhere RENAME TO log_position").await;
        assert_eq!(store.account(&did(1)).await.unwrap(), None);
        let row = store.host(host).await.unwrap().unwrap();
        assert_eq!((row.account_count, row.cursor), (0, None));
        store.apply(&failing).await.unwrap();
        assert_eq!(count(&store, host).await, 1);
        store.close().await;
    });
}

#[test]
fn domain_bans_cover_what_lies_below() {
    on_both(|url| async move {
        let store = open(&url).await;
        assert!(store.ban_domain("Evil.example").await.unwrap());
        assert!(!store.ban_domain("evil.example").await.unwrap());
        assert!(store.ban_domain("a.example").await.unwrap());
        assert_eq!(
            store.domain_bans().await.unwrap(),
            ["a.example", "evil.example"]
        );
        let cases = [
            ("evil.example", true),
            ("EVIL.example", true),
            ("pds.evil.example", true),
            ("x.y.evil.example", true),
            ("notevil.example", false),
            ("example", false),
            ("evil.example.com", false),
        ];
        for (host, banned) in cases {
            assert_eq!(is_banned(&store, host).await, banned, "{host}");
        }
        assert!(store.unban_domain("EVIL.example").await.unwrap());
        assert!(!store.unban_domain("evil.example").await.unwrap());
        assert!(!is_banned(&store, "pds.evil.example").await);
        store.close().await;
    });
}

async fn is_banned(store: &Store, domain: &str) -> bool {
    let bans = store.domain_bans().await.unwrap();
    let mut patterns = bans.iter().map(|ban| DomainPattern::banned(ban).unwrap());
    patterns.any(|pattern| pattern.matches(domain))
}

#[test]
fn takedowns_are_listed() {
    on_both(|url| async move {
        let store = open(&url).await;
        let host = host_with_limit(&store, "pds.example.com", 100).await.id;
        store
            .apply(&batch((0..6).map(|n| created(n, host)).collect()))
            .await
            .unwrap();
        for n in [1, 4, 5] {
            store
                .set_local_status(&did(n), LocalStatus::TakenDown)
                .await
                .unwrap();
        }
        store
            .set_local_status(&did(5), LocalStatus::Active)
            .await
            .unwrap();
        let first = store.list_taken_down(0, 1).await.unwrap();
        assert_eq!(first.next, Some(first.rows[0].uid));
        let second = store.list_taken_down(first.rows[0].uid, 9).await.unwrap();
        assert_eq!(second.next, None);
        let (first, second) = (first.rows, second.rows);
        let dids: Vec<Did> = [first, second]
            .concat()
            .into_iter()
            .map(|row| row.did)
            .collect();
        assert_eq!(dids, [did(1), did(4)]);
        store.close().await;
    });
}

#[test]
fn the_writer_writes_in_time_and_at_its_end() {
    on_both(|url| async move {
        let store = open(&url).await;
        let host = host_with_limit(&store, "pds.example.com", 100).await.id;
        let writer = Writer::spawn(store.clone());
        let mut applied = writer.applied();
        writer
            .send(Batch {
                accounts: vec![created(1, host)],
                cursors: vec![(host, 3)],
                replay_from: Some(8),
                head: None,
            })
            .await
            .unwrap();
        tokio::time::timeout(PATIENCE, applied.wait_for(|seq| *seq == 8))
            .await
            .unwrap()
            .unwrap();
        assert_eq!(count(&store, host).await, 1);
        // What was sent is seen by a read through the writer, and by anyone after a flush.
        writer
            .send(batch(vec![AccountUpdate {
                repo: Some(repo(4)),
                ..AccountUpdate::new(did(1))
            }]))
            .await
            .unwrap();
        assert_eq!(
            writer.accounts(&[did(1), did(2)]).await.unwrap()[&did(1)].repo,
            Some(repo(4))
        );
        for n in 10..60 {
            writer.send(batch(vec![created(n, host)])).await.unwrap();
        }
        writer.flush().await.unwrap();
        assert_eq!(count(&store, host).await, 51);
        // From a thread outside the runtime, and then the end.
        let blocking = writer.clone();
        let updates = batch(vec![created(70, host)]);
        tokio::task::spawn_blocking(move || blocking.send_blocking(updates))
            .await
            .unwrap()
            .unwrap();
        writer.shutdown(PATIENCE).await.unwrap();
        assert_eq!(count(&store, host).await, 52);
        assert!(matches!(
            writer.send(Batch::default()).await,
            Err(StoreError::WriterStopped)
        ));
        assert!(matches!(
            writer.flush().await,
            Err(StoreError::WriterStopped)
        ));
        writer.shutdown(PATIENCE).await.unwrap();
        store.close().await;
    });
}

#[test]
fn the_writer_waits_for_a_database_that_fails() {
    on_both(|url| async move {
        let store = open(&url).await;
        let host = store
            .add_host(&NewHost::new("pds.example.com", true, true))
            .await
            .unwrap()
            .id;
        let writer = Writer::spawn(store.clone());
        execute(&url, "ALTER TABLE accounts RENAME TO elsewhere").await;
        writer
            .send(batch((0..1_000).map(|n| created(n, host)).collect()))
            .await
            .unwrap();
        let sender = writer.clone();
        let sending = tokio::spawn(async move {
            for first in (1_000..26_000).step_by(10) {
                sender
                    .send(batch(
                        (first..first + 10).map(|n| created(n, host)).collect(),
                    ))
                    .await
                    .unwrap();
            }
            sender.flush().await.unwrap();
        });
        // The channel fills, and the sender is held back: nothing is lost, nothing piles up.
        tokio::time::timeout(Duration::from_millis(600), writer.flush())
            .await
            .unwrap_err();
        assert!(!sending.is_finished());
        execute(&url, "ALTER TABLE elsewhere RENAME TO accounts").await;
        tokio::time::timeout(PATIENCE, sending)
            .await
            .unwrap()
            .unwrap();
        assert_eq!(count(&store, host).await, 26_000);
        // At a shutdown there is an end to patience, and a number.
        execute(&url, "ALTER TABLE accounts RENAME TO elsewhere").await;
        writer
            .send(batch(vec![created(6_000, host), created(6_001, host)]))
            .await
            .unwrap();
        let error = writer
            .shutdown(Duration::from_millis(200))
            .await
            .unwrap_err();
        assert!(
            matches!(error, StoreError::Unwritten { rows: 2 }),
            "{error}"
        );
        store.close().await;
    });
}

/// Notes a migration that no release so far has.
async fn note_migration(url: &str, version: i64) {
    let blob = if url.starts_with("sqlite:") {
        "x'00'"
    } else {
        "''::bytea"
    };
    let note = format!(
        "INSERT INTO _sqlx_migrations (version, description, success, checksum, execution_time) \
         VALUES ({version}, 'from the future', TRUE, {blob}, 0)"
    );
    execute(url, &note).await;
}

/// Writes and reads everything that the relay writes and reads.
async fn work(store: &Store, name: &str, first: u32) {
    let host = host_with_limit(store, name, 2).await.id;
    let writer = Writer::spawn(store.clone());
    let update = AccountUpdate {
        repo: Some(repo(1)),
        key: Some(key(1_790_000_000)),
        upstream: Some(UpstreamStatus::Deactivated),
        ..created(first, host)
    };
    writer
        .send(Batch {
            accounts: vec![update, created(first + 1, host), created(first + 2, host)],
            cursors: vec![(host, 7)],
            replay_from: Some(3),
            head: Some(9),
        })
        .await
        .unwrap();
    writer.flush().await.unwrap();
    assert_eq!(account(store, first).await.repo, Some(repo(1)));
    assert_eq!(
        account(store, first + 2).await.local,
        LocalStatus::Throttled
    );
    let listed = store.list_accounts(0, 1_000).await.unwrap().rows;
    assert!(listed.iter().any(|row| row.did == did(first)));
    store
        .set_local_status(&did(first), LocalStatus::TakenDown)
        .await
        .unwrap();
    let taken_down = store.list_taken_down(0, 1_000).await.unwrap().rows;
    assert!(taken_down.iter().any(|row| row.did == did(first)));
    assert_eq!(
        store.set_account_limit(host, 3).await.unwrap(),
        [did(first + 2)]
    );
    assert_eq!(store.host(host).await.unwrap().unwrap().cursor, Some(7));
    assert_eq!(store.log_head().await.unwrap(), 9);
    writer.shutdown(PATIENCE).await.unwrap();
}

/// The rule for a rollback: the release before runs on what the next one made of its tables.
#[test]
fn a_later_release_that_only_added_to_the_tables_is_no_obstacle() {
    on_both(|url| async move {
        open(&url).await.close().await;
        execute(&url, "ALTER TABLE accounts ADD COLUMN mood TEXT").await;
        execute(
            &url,
            "ALTER TABLE hosts ADD COLUMN weight INTEGER NOT NULL DEFAULT 1",
        )
        .await;
        execute(&url, "CREATE TABLE moods (mood TEXT PRIMARY KEY)").await;
        note_migration(&url, 9999).await;
        let store = open(&url).await;
        work(&store, "pds.example.com", 1).await;
        store.close().await;
        open(&url).await.close().await;
    });
}

#[test]
fn tables_that_need_a_later_release_are_refused_with_its_name() {
    on_both(|url| async move {
        open(&url).await.close().await;
        note_migration(&url, 9999).await;
        execute(
            &url,
            "UPDATE schema_level SET level = level + 1, release = '7.5.0'",
        )
        .await;
        let error = refused(&url).await;
        assert!(matches!(error, StoreError::Newer { .. }), "{error}");
        assert_clear(&error, "newer version of atproto-relay");
        assert_clear(&error, "7.5.0");
    });
}

#[test]
fn tables_with_migrations_of_another_program_are_refused() {
    on_both(|url| async move {
        open(&url).await.close().await;
        note_migration(&url, 9999).await;
        execute(&url, "DROP TABLE schema_level").await;
        let error = refused(&url).await;
        assert!(matches!(error, StoreError::Schema { .. }), "{error}");
        assert_clear(&error, "9999");
    });
}

/// The first release's tables, with rows of it.
#[test]
fn the_tables_of_the_first_release_are_brought_up_to_date_with_what_they_hold() {
    const ROWS: [&str; 5] = [
        "INSERT INTO hosts (hostname, tls, last_seq, account_limit, account_count, trusted, created_at) \
         VALUES ('old.example.com', TRUE, 41, 100, 3, FALSE, 1790000000)",
        "INSERT INTO accounts (host_id, did, upstream_status) VALUES (1, 'did:web:c.example', 'deleted')",
        "INSERT INTO accounts (host_id, did, local_status, upstream_status) VALUES (1, 'did:web:a.example', 1, NULL)",
        "INSERT INTO accounts (host_id, did, rev, data_cid, commit_cid) VALUES (1, 'did:web:B.example', 77, @, @)",
        "UPDATE log_position SET replay_from = 2, head = 8",
    ];
    on_both(|url| async move {
        let cid = repo(1).commit.to_bytes();
        let hex: String = cid.iter().map(|byte| format!("{byte:02x}")).collect();
        let sqlite = url.starts_with("sqlite:");
        let folder = format!("migrations/{}", if sqlite { "sqlite" } else { "postgres" });
        let migrations = Migrator::new(Path::new(&folder)).await.unwrap();
        if sqlite {
            let file = SqliteConnectOptions::from_str(&url).unwrap();
            let file = file.create_if_missing(true);
            let mut connection = SqliteConnection::connect_with(&file).await.unwrap();
            migrations.run_to(2, &mut connection).await.unwrap();
            connection.close().await.unwrap();
        } else {
            let mut connection = PgConnection::connect(&url).await.unwrap();
            migrations.run_to(2, &mut connection).await.unwrap();
        }
        let blob = if sqlite {
            format!("x'{hex}'")
        } else {
            format!("'\\x{hex}'")
        };
        for row in ROWS {
            execute(&url, &row.replace('@', &blob)).await;
        }
        let store = open(&url).await;
        let host = store
            .host_by_name("old.example.com")
            .await
            .unwrap()
            .unwrap();
        assert_eq!(
            (host.cursor, host.account_count),
            (Some(41), 2),
            "a deleted account counts no more"
        );
        let taken_down = store.list_taken_down(0, 9).await.unwrap().rows;
        assert_eq!(taken_down[0].did.as_str(), "did:web:a.example");
        let listed = store.list_accounts(0, 9).await.unwrap().rows;
        assert_eq!(listed[0].did.as_str(), "did:web:B.example");
        assert_eq!(listed[0].repo.unwrap().rev, Tid::from_u64(77));
        assert_eq!(store.replay_from().await.unwrap(), 2);
        // The release before counts every account that it creates; its deletion uncounts it.
        for sql in [
            "INSERT INTO accounts (host_id, did) VALUES (1, 'did:web:d.example')",
            "UPDATE hosts SET account_count = account_count + 1",
        ] {
            execute(&url, sql).await;
        }
        let deleted = AccountUpdate {
            upstream: Some(UpstreamStatus::Deleted),
            status_seq: Some(1),
            ..AccountUpdate::new(Did::parse("did:web:d.example").unwrap())
        };
        for _ in 0..2 {
            store.apply(&batch(vec![deleted.clone()])).await.unwrap();
            assert_eq!(count(&store, host.id).await, 2);
        }
        work(&store, "new.example.com", 1).await;
        store.close().await;
    });
}

/// A rollback and the next upgrade: the previous release knows one row of one table, and each release finds the position
/// that the other one left.
#[test]
fn the_position_of_the_accounts_holds_whichever_release_moved_it_last() {
    on_both(|url| async move {
        let store = open(&url).await;
        let at = |replay_from| Batch {
            replay_from: Some(replay_from),
            ..Batch::default()
        };
        store.apply(&at(7)).await.unwrap();
        execute(
            &url,
            "UPDATE log_position SET replay_from = replay_from + 4",
        )
        .await;
        assert_eq!(store.replay_from().await.unwrap(), 11);
        assert_eq!(store.log_head().await.unwrap(), 10);
        store.apply(&at(13)).await.unwrap();
        assert_eq!(store.replay_from().await.unwrap(), 13);
        // Another view may know of more.
        execute(
            &url,
            "INSERT INTO views (name, position) VALUES ('other', 21)",
        )
        .await;
        assert_eq!(store.log_head().await.unwrap(), 20);
        assert_eq!(store.replay_from().await.unwrap(), 13);
        store.close().await;
    });
}

/// Whoever writes is killed in between: accounts, cursors and the position are of the same moment.
#[test]
fn a_write_that_is_cut_off_moves_the_position_with_its_accounts_or_not_at_all() {
    on_both(|url| async move {
        let store = open(&url).await;
        let host = host_with_limit(&store, "pds.example.com", 1_000_000)
            .await
            .id;
        let mut moments = fastrand::Rng::with_seed(3);
        for round in 1..20_u32 {
            let whole = Batch {
                accounts: (0..300).map(|n| created(round * 1_000 + n, host)).collect(),
                cursors: vec![(host, i64::from(round))],
                replay_from: Some(u64::from(round) + 1),
                head: None,
            };
            let before = store.replay_from().await.unwrap();
            let cut = Duration::from_micros(moments.u64(0..12_000));
            // Dropped at some point of its transaction.
            let _ = tokio::time::timeout(cut, store.apply(&whole)).await;
            // The next write begins when that one is over.
            let nothing = Batch {
                head: Some(0),
                ..Batch::default()
            };
            store.apply(&nothing).await.unwrap();
            let position = store.replay_from().await.unwrap();
            let first = store.account(&did(round * 1_000)).await.unwrap();
            let last = store.account(&did(round * 1_000 + 299)).await.unwrap();
            let cursor = store.host(host).await.unwrap().unwrap().cursor;
            let written = position == u64::from(round) + 1;
            assert!(written || position == before, "{position}");
            assert_eq!((first.is_some(), last.is_some()), (written, written));
            assert_eq!(cursor == Some(i64::from(round)), written);
        }
        store.close().await;
    });
}

/// Names are compared by their bytes, whatever the locale of the cluster.
#[test]
fn names_are_compared_by_their_bytes_on_postgres() {
    let Some(server) = postgres::server() else {
        return;
    };
    let runtime = tokio::runtime::Runtime::new().unwrap();
    runtime.block_on(async {
        let url = server.database().await;
        open(&url).await.close().await;
        let mut connection = PgConnection::connect(&url).await.unwrap();
        let columns: Vec<(String, String)> = sqlx::query_as(
            "SELECT table_name::text, column_name::text FROM information_schema.columns \
             WHERE collation_name = 'C' AND table_schema = 'public' ORDER BY 1",
        )
        .fetch_all(&mut connection)
        .await
        .unwrap();
        let expected = [
            ("accounts", "did"),
            ("domain_bans", "domain"),
            ("hosts", "hostname"),
        ];
        assert_eq!(
            columns,
            expected.map(|(table, column)| (table.to_owned(), column.to_owned()))
        );
    });
}

#[test]
fn a_list_goes_past_any_number_of_accounts_without_a_repository() {
    on_both(|url| async move {
        let store = open(&url).await;
        let series = if url.starts_with("sqlite:") {
            "WITH RECURSIVE n (i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 25000)"
        } else {
            "WITH n (i) AS (SELECT generate_series(1, 25000))"
        };
        let fill = format!(
            "{series} INSERT INTO accounts (host_id, did, rev, data_cid, commit_cid) SELECT 1, 'did:web:' || i, \
             CASE WHEN i IN (3, 24000) THEN i END, CASE WHEN i IN (3, 24000) THEN (SELECT cid FROM seed) END, \
             CASE WHEN i IN (3, 24000) THEN (SELECT cid FROM seed) END FROM n ORDER BY i"
        );
        let hex: String = repo(1)
            .commit
            .to_bytes()
            .iter()
            .map(|byte| format!("{byte:02x}"))
            .collect();
        let seed = if url.starts_with("sqlite:") {
            format!("CREATE TABLE seed AS SELECT x'{hex}' AS cid")
        } else {
            format!("CREATE TABLE seed AS SELECT '\\x{hex}'::bytea AS cid")
        };
        execute(&url, &seed).await;
        execute(&url, &fill).await;
        let (mut after, mut found, mut pages) = (0, Vec::new(), 0);
        loop {
            let page = store.list_accounts(after, 10).await.unwrap();
            pages += 1;
            found.extend(page.rows.into_iter().map(|row| row.did.to_string()));
            match page.next {
                Some(next) => after = next,
                None => break,
            }
        }
        assert_eq!(found, ["did:web:3", "did:web:24000"]);
        assert_eq!(pages, 3, "each looks at ten thousand accounts");
        store.close().await;
    });
}

/// Sessions of the relay on a PostgreSQL database.
async fn sessions(connection: &mut PgConnection) -> i64 {
    let (count,) = sqlx::query_as(
        "SELECT COUNT(*) FROM pg_stat_activity WHERE application_name = 'atproto-relay' AND datname = current_database()",
    )
    .fetch_one(connection)
    .await
    .unwrap();
    count
}

/// Strangers hold all their connections: the relay's own reads go on, and all together are as many as were allowed.
#[test]
fn public_reads_take_no_connection_from_the_relay_and_all_stay_within_their_number() {
    let Some(server) = postgres::server() else {
        return;
    };
    let runtime = tokio::runtime::Runtime::new().unwrap();
    runtime.block_on(async {
        for (connections, public) in [(5, 1), (9, 3), (12, 4)] {
            let url = server.database().await;
            let store = Store::open_with(&url, connections, Metrics::default())
                .await
                .unwrap();
            let _hold = store.hold().await.unwrap();
            let host = host_with_limit(&store, "pds.example.com", 100).await.id;
            store.apply(&batch(vec![created(1, host)])).await.unwrap();
            // The one that writes, and the one that holds.
            let mut outside = PgConnection::connect(&url).await.unwrap();
            let others = sessions(&mut outside).await;
            let mut lock = PgConnection::connect(&url).await.unwrap();
            let mut lock = lock.begin().await.unwrap();
            sqlx::query("LOCK TABLE domain_bans IN ACCESS EXCLUSIVE MODE")
                .execute(&mut *lock)
                .await
                .unwrap();
            let strangers: Vec<_> = (0..40)
                .map(|_| {
                    let store = store.public();
                    tokio::spawn(async move { store.domain_bans().await })
                })
                .collect();
            while sessions(&mut outside).await < others + public {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
            let started = std::time::Instant::now();
            assert_eq!(store.accounts(&[did(1)]).await.unwrap().len(), 1);
            assert!(
                started.elapsed() < Duration::from_secs(2),
                "it waited for strangers"
            );
            // The relay's own reads take the rest, and no more.
            let own: Vec<_> = (0..40)
                .map(|_| {
                    let store = store.clone();
                    tokio::spawn(async move { store.domain_bans().await })
                })
                .collect();
            // The connection for a look at the server is not made here.
            let all = i64::from(connections) - 1;
            while sessions(&mut outside).await < all {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
            lock.rollback().await.unwrap();
            for read in strangers.into_iter().chain(own) {
                read.await.unwrap().unwrap();
            }
            assert_eq!(sessions(&mut outside).await, all);
            store.close().await;
        }
    });
}

/// What was handed to the writer, or announced, is read at once; what the database has by then, too.
#[test]
fn a_read_has_what_waits_to_be_written() {
    on_both(|url| async move {
        let store = open(&url).await;
        let host = host_with_limit(&store, "pds.example.com", 100).await.id;
        store
            .apply(&batch((0..5).map(|n| created(n, host)).collect()))
            .await
            .unwrap();
        let writer = Writer::spawn(store.clone());
        // The database does not get on.
        execute(&url, "ALTER TABLE log_position RENAME TO elsewhere").await;
        let head = Batch {
            head: Some(1),
            ..Batch::default()
        };
        writer.send(head).await.unwrap();
        let commit = |n, rev| AccountUpdate {
            repo: Some(repo(rev)),
            ..AccountUpdate::new(did(n))
        };
        writer.announce([&commit(1, 5)]);
        assert_eq!(account(&store, 1).await.repo, Some(repo(5)));
        let down = AccountUpdate {
            local: Some(LocalStatus::TakenDown),
            ..AccountUpdate::new(did(1))
        };
        writer.send(batch(vec![down])).await.unwrap();
        writer.send(batch(vec![commit(1, 4)])).await.unwrap();
        let row = account(&store.public(), 1).await;
        assert_eq!(
            (row.repo, row.local),
            (Some(repo(5)), LocalStatus::TakenDown)
        );
        let taken_down = store.list_taken_down(0, 9).await.unwrap().rows;
        assert_eq!(taken_down, [row]);
        // A new account is there, and has no place in lists yet.
        writer
            .send(batch(vec![AccountUpdate {
                repo: Some(repo(9)),
                ..created(7, host)
            }]))
            .await
            .unwrap();
        let row = account(&store, 7).await;
        assert_eq!((row.repo, row.uid), (Some(repo(9)), AccountRow::UNNUMBERED));
        execute(&url, "ALTER TABLE elsewhere RENAME TO log_position").await;
        writer.flush().await.unwrap();
        let row = account(&store, 7).await;
        assert_eq!(row.repo, Some(repo(9)));
        assert_ne!(row.uid, AccountRow::UNNUMBERED);
        let listed = store.list_accounts(0, 9).await.unwrap().rows;
        let listed: Vec<_> = listed.iter().map(|row| row.did.clone()).collect();
        assert_eq!(listed, [did(1), did(7)]);
        writer.shutdown(PATIENCE).await.unwrap();
        store.close().await;
    });
}

/// Ends the session that holds a database for a relay.
const END_HOLDER: &str = "SELECT pg_terminate_backend(pid) FROM pg_locks WHERE locktype = 'advisory' \
     AND database = (SELECT oid FROM pg_database WHERE datname = current_database())";

#[test]
fn a_relay_that_was_followed_by_another_one_writes_nothing() {
    let Some(server) = postgres::server() else {
        return;
    };
    let runtime = tokio::runtime::Runtime::new().unwrap();
    runtime.block_on(async {
        let url = server.database().await;
        let first = open(&url).await;
        let hold = first.hold().await.unwrap();
        let host = host_with_limit(&first, "pds.example.com", 100).await.id;
        let second = open(&url).await;
        let error = second.hold().await.err().expect("it is in use");
        assert!(matches!(error, StoreError::InUse { .. }), "{error}");

        execute(&url, END_HOLDER).await;
        // Nobody has the database: the first one may still write.
        first.apply(&batch(vec![created(1, host)])).await.unwrap();
        let _second = second.hold().await.unwrap();
        let error = first
            .apply(&batch(vec![created(2, host)]))
            .await
            .unwrap_err();
        assert!(matches!(error, StoreError::TakenOver { .. }), "{error}");
        assert_clear(&error, "taken over by another relay");
        let error = first.ban_domain("example.com").await.unwrap_err();
        assert!(matches!(error, StoreError::TakenOver { .. }), "{error}");
        assert_eq!(second.account(&did(2)).await.unwrap(), None);
        assert_eq!(second.domain_bans().await.unwrap(), Vec::<String>::new());
        // Who holds it for the first one learns of it at once, and the second one goes on.
        let lost = tokio::time::timeout(Duration::from_secs(1), hold.keep()).await;
        let lost = lost.expect("it is told");
        assert!(matches!(lost, StoreError::TakenOver { .. }), "{lost}");
        second.apply(&batch(vec![created(3, host)])).await.unwrap();
        first.close().await;
        second.close().await;
    });
}

/// Also where the other relay has come and gone before this one looked.
#[test]
fn a_relay_does_not_take_back_a_database_that_another_one_had() {
    let Some(server) = postgres::server() else {
        return;
    };
    let runtime = tokio::runtime::Runtime::new().unwrap();
    runtime.block_on(async {
        let url = server.database().await;
        let first = open(&url).await;
        let hold = first.hold().await.unwrap();
        execute(&url, END_HOLDER).await;
        let second = open(&url).await;
        drop(second.hold().await.unwrap());
        second.close().await;
        let lost = tokio::time::timeout(PATIENCE, hold.keep()).await;
        let lost = lost.expect("it is told");
        assert!(matches!(lost, StoreError::TakenOver { .. }), "{lost}");
        first.close().await;
    });
}

#[test]
fn a_relay_takes_its_database_back_after_a_loss_of_its_session() {
    let Some(server) = postgres::server() else {
        return;
    };
    let runtime = tokio::runtime::Runtime::new().unwrap();
    runtime.block_on(async {
        let url = server.database().await;
        let store = open(&url).await;
        let keeping = tokio::spawn(store.hold().await.unwrap().keep());
        let mut outside = PgConnection::connect(&url).await.unwrap();
        let mut holder = None;
        for _ in 0..2 {
            let holds = async {
                loop {
                    let found: Option<(i32,)> = sqlx::query_as(
                        "SELECT pid FROM pg_locks WHERE locktype = 'advisory' \
                         AND database = (SELECT oid FROM pg_database WHERE datname = current_database())",
                    )
                    .fetch_optional(&mut outside)
                    .await
                    .unwrap();
                    if found.is_some() && found != holder {
                        return found;
                    }
                    tokio::time::sleep(Duration::from_millis(20)).await;
                }
            };
            holder = tokio::time::timeout(PATIENCE, holds).await.unwrap();
            execute(&url, END_HOLDER).await;
        }
        assert!(!keeping.is_finished());
        let host = host_with_limit(&store, "pds.example.com", 100).await.id;
        store.apply(&batch(vec![created(1, host)])).await.unwrap();
        keeping.abort();
        store.close().await;
    });
}

/// A server that refuses connections, and one that takes none back for a while.
#[test]
fn an_outage_is_told_with_its_cause() {
    let Some(server) = postgres::server() else {
        return;
    };
    let runtime = tokio::runtime::Runtime::new().unwrap();
    runtime.block_on(async {
        let mut gate = postgres::Gate::open(server).await;
        let store = open(&gate.url(&server.database().await)).await;
        host_with_limit(&store, "pds.example.com", 100).await;
        store.check().await.unwrap();
        gate.close();
        let (own, public) = (store.clone(), store.public());
        let unknown = did(1);
        let (own, public, check) = tokio::join!(
            own.account(&unknown),
            public.account(&unknown),
            store.check()
        );
        for error in [own.unwrap_err(), public.unwrap_err(), check.unwrap_err()] {
            assert!(matches!(error, StoreError::Unreachable { .. }), "{error}");
            assert_clear(&error, "Connection refused");
        }
        gate.reopen().await;
        // A cause that was found counts for a moment.
        while store.check().await.is_err() {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        assert_eq!(store.account(&did(1)).await.unwrap(), None);
        store.close().await;
    });
}

/// Whose tables may be made: PostgreSQL 15 lets only the owner of a database make some in the schema `public`.
#[test]
fn a_user_without_rights_is_told_which_ones_it_needs() {
    let Some(server) = postgres::server() else {
        return;
    };
    let runtime = tokio::runtime::Runtime::new().unwrap();
    runtime.block_on(async {
        let url = server.database().await;
        let name = url.split('?').next().unwrap().rsplit('/').next().unwrap();
        execute(&url, "CREATE ROLE guest LOGIN PASSWORD 'correct-horse'").await;
        execute(&url, "REVOKE CREATE ON SCHEMA public FROM PUBLIC").await;
        let guest = url.replace("//relay:", "//guest:");
        let error = refused(&guest).await;
        assert!(matches!(error, StoreError::Privilege { .. }), "{error}");
        assert_clear(&error, "permission denied for schema public");
        assert_clear(&error, "GRANT CREATE ON SCHEMA public TO \"guest\"");
        let remedy = format!("ALTER DATABASE \"{name}\" OWNER TO \"guest\"");
        assert_clear(&error, &remedy);
        execute(&url, &remedy).await;
        open(&guest).await.close().await;

        // A relay's tables that are another user's.
        let url = server.database().await;
        open(&url).await.close().await;
        let error = refused(&url.replace("//relay:", "//guest:")).await;
        assert!(matches!(error, StoreError::Privilege { .. }), "{error}");
        assert_clear(&error, "REASSIGN OWNED");
    });
}

/// One line that says what happened and what to do, and keeps the password.
fn assert_clear(error: &StoreError, says: &str) {
    let text = error.to_string();
    assert!(text.contains(says), "{text}");
    assert!(text.contains("; "), "it says what to do: {text}");
    assert!(!text.contains('\n'), "{text}");
    for secret in [postgres::PASSWORD, "wrong-horse"] {
        assert!(
            !text.contains(secret) && !format!("{error:?}").contains(secret),
            "{error:?}"
        );
    }
}

async fn refused(url: &str) -> StoreError {
    Store::open(url)
        .await
        .err()
        .unwrap_or_else(|| panic!("{url} is refused"))
}

#[tokio::test]
async fn urls_that_name_no_database_are_refused() {
    for url in [
        "",
        "relay.db",
        "mysql://relay:correct-horse@localhost/relay",
        "sqlite::memory:",
        "sqlite:",
        "sqlite:relay.db?mode=memory",
        "sqlite:relay.db?mode=correct-horse",
        "postgres://relay:correct-horse@localhost:port/relay",
        "postgres://relay:correct-horse@localhost/relay?sslmode=correct-horse",
    ] {
        let error = refused(url).await;
        assert!(matches!(error, StoreError::Url { .. }), "{url}: {error}");
        assert_clear(&error, "the database URL is not usable");
    }
}

#[tokio::test]
async fn sqlite_files_that_cannot_be_used_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| format!("sqlite:{}", folder.path().join(name).display());

    assert_clear(&refused(&at("missing/relay.db")).await, "cannot be opened");
    std::fs::create_dir(folder.path().join("folder.db")).unwrap();
    assert_clear(&refused(&at("folder.db")).await, "cannot be opened");
    std::fs::write(
        folder.path().join("text.db"),
        "this is a letter, not a database. ".repeat(100),
    )
    .unwrap();
    assert_clear(&refused(&at("text.db")).await, "is not an SQLite database");

    // Read-only: as SQLite itself reports it, and by the file's mode (which root may ignore).
    std::fs::write(folder.path().join("readonly.db"), "").unwrap();
    assert_clear(
        &refused(&at("readonly.db?mode=ro")).await,
        "cannot be written",
    );
    if rustix::process::geteuid().is_root() {
        println!("skipped: root may write to any file");
    } else {
        let mode = std::fs::Permissions::from_mode(0o444);
        std::fs::set_permissions(folder.path().join("readonly.db"), mode).unwrap();
        assert_clear(&refused(&at("readonly.db")).await, "cannot be written");
    }
}

#[tokio::test]
async fn the_sqlite_file_is_for_this_user_alone() {
    let folder = tempfile::tempdir().unwrap();
    let url = format!("sqlite:{}", folder.path().join("relay.db").display());
    let store = open(&url).await;
    host_with_limit(&store, "pds.example.com", 100).await;
    for name in ["relay.db", "relay.db-wal"] {
        let mode = std::fs::metadata(folder.path().join(name))
            .unwrap()
            .permissions()
            .mode();
        assert_eq!(mode & 0o777, 0o600, "{name}");
    }
    store.close().await;
    assert!(
        !folder.path().join("relay.db-wal").exists(),
        "the last to leave takes the WAL along"
    );
}

#[tokio::test]
async fn postgres_that_cannot_be_used_is_refused() {
    // A port nobody listens on: taken and given back.
    let port = std::net::TcpListener::bind("127.0.0.1:0")
        .unwrap()
        .local_addr()
        .unwrap()
        .port();
    let down = refused(&format!(
        "postgres://relay:correct-horse@127.0.0.1:{port}/relay"
    ))
    .await;
    assert!(matches!(down, StoreError::Unreachable { .. }), "{down}");
    assert_clear(
        &down,
        "cannot reach the PostgreSQL database \"relay\" at 127.0.0.1:",
    );

    let Some(server) = postgres::server() else {
        return;
    };
    let login = refused(&server.url_with_password("postgres", "wrong-horse")).await;
    assert!(matches!(login, StoreError::Login { .. }), "{login}");
    assert_clear(&login, "refuses the login");
    let absent = refused(&server.url("nowhere")).await;
    assert!(matches!(absent, StoreError::NoDatabase { .. }), "{absent}");
    assert_clear(&absent, "does not exist");

    // A database that holds something else.
    let url = server.database().await;
    execute(&url, "CREATE TABLE hosts (id INTEGER)").await;
    assert_clear(&refused(&url).await, "has a schema");
}

#[test]
fn a_store_survives_the_loss_of_its_connections() {
    let Some(server) = postgres::server() else {
        return;
    };
    let runtime = tokio::runtime::Runtime::new().unwrap();
    runtime.block_on(async {
        let url = server.database().await;
        let store = open(&url).await;
        let host = host_with_limit(&store, "pds.example.com", 100).await.id;
        let writer = Writer::spawn(store.clone());
        let name = url.split('?').next().unwrap().rsplit('/').next().unwrap();
        execute(
            &server.url("postgres"),
            &format!(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = '{name}'"
            ),
        )
        .await;
        writer.send(batch(vec![created(1, host)])).await.unwrap();
        tokio::time::timeout(PATIENCE, writer.flush())
            .await
            .unwrap()
            .unwrap();
        assert_eq!(account(&store, 1).await.host, host);
        writer.shutdown(PATIENCE).await.unwrap();
        store.close().await;
    });
}
