//! What goes wrong around a relay: a full disk, a password that is not right, an end in the middle of work. Each is told
//! in one line, leaves nothing half done, and is over when its cause is.

#![cfg(feature = "devnet")]

use crate::support::postgres;
use crate::support::relay as support;
use atproto_relay::dial::plain_client;
use std::fs;
use std::io::{Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use crate::support::relay::{Bench, PATIENCE};
use crate::support::small_disk::SmallDisk;
use atproto_relay::devnet::load::{ProcessOptions, RelayProcess};
use atproto_relay::devnet::network::{Network, NetworkOptions};
use atproto_relay::devnet::pds::Pds;
use atproto_relay::devnet::scrape::Samples;
use atproto_relay::eventlog::MinFree;
use serde_json::{Value, json};
use tokio_tungstenite::connect_async;

const POSTS: &str = "app.bsky.feed.post";

fn post(text: &str) -> Value {
    json!({"$type": POSTS, "text": text, "createdAt": "2026-01-01T00:00:00Z"})
}

fn serve(data_dir: &Path) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_atproto-relay"));
    command.env_clear().stdin(Stdio::null());
    command.args(["serve", "--listen=127.0.0.1:0", "--log-level=error"]);
    command.args(["--metrics-listen=127.0.0.1:0", "--data-dir"]);
    command.arg(data_dir);
    command
}

/// The one line of a start that fails.
fn refusal(command: &mut Command) -> String {
    let mut relay = command.stderr(Stdio::piped()).spawn().unwrap();
    let started = Instant::now();
    while relay.try_wait().unwrap().is_none() {
        if started.elapsed() > PATIENCE {
            relay.kill().unwrap();
            panic!("it runs");
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    let output = relay.wait_with_output().unwrap();
    let said = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1), "{said}");
    let lines: Vec<&str> = said.lines().collect();
    assert_eq!(lines.len(), 1, "{said}");
    assert!(lines[0].starts_with("error: "), "{said}");
    lines[0].to_owned()
}

#[test]
fn a_full_disk_at_the_start_is_named_and_is_no_harm() {
    let Some(disk) = SmallDisk::mount("64k") else {
        return;
    };
    // Also where there is room for the log's first files, but not for the database.
    for room in [0, 8 << 10, 16 << 10, 24 << 10] {
        disk.fill_but(room);
        let data = disk.folder.join("data");
        let line = refusal(&mut serve(&data));
        assert!(line.contains(data.to_str().unwrap()), "{line}");
        assert!(line.contains("make room"), "{line}");
        disk.make_room();
        fs::remove_dir_all(&data).unwrap_or_default();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_disk_that_fills_up_stops_events_but_not_consumers_and_loses_nothing() {
    let Some(disk) = SmallDisk::mount("64m") else {
        return;
    };
    let bench = Bench::start_with(1, |config, _| {
        config.data_dir = disk.folder.join("data");
        config.log.min_free = MinFree::Bytes(0);
    })
    .await;
    let pds = bench.network.pds(0);
    let alice = pds.create_account("alice.pds1.test").unwrap().did;
    bench.until_settled().await;
    disk.fill();
    // More than the room that the log has reserved.
    let long = "x".repeat(700_000);
    for _ in 0..20 {
        pds.create_record(&alice, POSTS, post(&long)).unwrap();
    }
    let metrics = format!("http://{}/_health", bench.relay.metrics_addr());
    for url in [metrics.clone(), format!("{}/_health", bench.url())] {
        let body = until_status(&url, 503).await;
        assert!(body.contains("the event log cannot be written"), "{body}");
    }
    let samples = Samples::scrape(&metrics.replace("/_health", "/metrics"))
        .await
        .unwrap();
    assert_eq!(samples.get("relay_log_failing"), 1.0);
    let head = bench.relay.log().head();
    assert!((4..24).contains(&head), "{head}");
    let mut consumer = bench.consumer(0).await;
    assert_eq!(consumer.up_to(head).await.len(), head as usize);

    disk.make_room();
    let rest = consumer.up_to(24).await;
    let seqs: Vec<u64> = rest.iter().map(|(seq, _)| *seq).collect();
    assert!(seqs.iter().copied().eq(head + 1..=24), "{seqs:?}");
    until_status(&metrics, 200).await;
    bench.until_settled().await;
    let bench = bench.restarted(|_| {}).await;
    assert_eq!(bench.relay.log().head(), 24);
    bench.relay.shutdown().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_disk_that_others_fill_costs_the_oldest_events_and_no_new_ones() {
    let Some(disk) = SmallDisk::mount("96m") else {
        return;
    };
    let bench = Bench::start_with(1, |config, _| {
        config.data_dir = disk.folder.join("data");
        // The database lies on the same disk, and must not be the one that finds it full.
        config.log.min_free = MinFree::Bytes(12 << 20);
    })
    .await;
    let pds = bench.network.pds(0);
    let alice = pds.create_account("alice.pds1.test").unwrap().did;
    let long = "x".repeat(700_000);
    let post_many = || {
        for _ in 0..30 {
            pds.create_record(&alice, POSTS, post(&long)).unwrap();
        }
    };
    post_many();
    bench.until_settled().await;
    assert_eq!(bench.relay.log().oldest(), Some(1));
    let free = 4 << 20;
    disk.fill_but(free);
    post_many();
    bench.until_settled().await;
    let oldest = bench.relay.log().oldest().unwrap();
    assert!(oldest > 1, "room was made");
    assert_eq!(bench.relay.log().head(), 64);
    let seqs = bench.consumer(0).await.up_to(64).await;
    assert!(seqs.iter().map(|(seq, _)| *seq).eq(oldest..=64));
    bench.relay.shutdown().await;
}

/// A relay in a process of its own, with its data in the folder `data` below `folder`.
async fn start(network: &Network, folder: &Path, argument: &str) -> RelayProcess {
    let binary = env!("CARGO_BIN_EXE_atproto-relay");
    start_binary(binary.as_ref(), network, folder, argument).await
}

async fn start_binary(
    binary: &Path,
    network: &Network,
    folder: &Path,
    argument: &str,
) -> RelayProcess {
    let options = ProcessOptions {
        binary: binary.to_owned(),
        folder: folder.to_owned(),
        plc: network.plc_url(),
        hosts: network.all_pds().iter().map(Pds::url).collect(),
        arguments: vec![argument.into()],
    };
    RelayProcess::start(options, PATIENCE).await.unwrap()
}

async fn until_status(url: &str, code: u16) -> String {
    let mut said = String::new();
    let wait = async {
        loop {
            let answer = plain_client().get(url).send().await.unwrap();
            let status = answer.status().as_u16();
            said = answer.text().await.unwrap();
            if status == code {
                return;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    let waited = tokio::time::timeout(PATIENCE, wait).await;
    assert!(waited.is_ok(), "{url} does not answer {code}, but {said}");
    said
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_signal_ends_it_soon_while_everybody_is_connected() {
    let network = Network::start(NetworkOptions::default()).await.unwrap();
    let folder = tempfile::tempdir().unwrap();
    let argument = "--log-segment-bytes=8MiB";
    let relay = start(&network, folder.path(), argument).await;
    // A consumer that never reads, a connection that is kept alive, and a host.
    let url = format!("{}/xrpc/com.atproto.sync.subscribeRepos", relay.firehose());
    let (_deaf, _) = connect_async(url).await.unwrap();
    let connected = async {
        loop {
            let metrics = Samples::scrape(&relay.metrics_url()).await.unwrap();
            if metrics.sum("relay_consumers") == 1.0
                && metrics.get("relay_hosts{state=\"connected\"}") == 1.0
            {
                return;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    let waited = tokio::time::timeout(PATIENCE, connected).await;
    assert!(waited.is_ok(), "{}", relay.said());
    let health = relay.metrics_url().replace("/metrics", "/_health");
    assert_eq!(
        plain_client().get(&health).send().await.unwrap().status(),
        200
    );
    let started = Instant::now();
    assert!(relay.end(PATIENCE).await.unwrap(), "exit code 0");
    let took = started.elapsed();
    assert!(took < Duration::from_secs(4), "it took {took:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_wrong_password_of_the_database_is_named_and_not_shown() {
    let Some(server) = postgres::server() else {
        return;
    };
    let folder = tempfile::tempdir().unwrap();
    let wrong = server.url_with_password("postgres", "gehe1m");
    let line = refusal(serve(&folder.path().join("data")).env("DATABASE_URL", wrong));
    assert!(line.contains("refuses the login"), "{line}");
    assert!(line.contains("correct the user or the password"), "{line}");
    assert!(!line.contains("gehe1m"), "{line}");
    let missing = server.url("nothing_here");
    let line = refusal(serve(&folder.path().join("data")).env("DATABASE_URL", missing));
    assert!(line.contains("does not exist"), "{line}");
    // What these left does not stand in the way of a start that is right.
    let network = Network::start(NetworkOptions::default()).await.unwrap();
    let right = format!("--database-url={}", server.database().await);
    let relay = start(&network, folder.path(), &right).await;
    assert!(relay.end(PATIENCE).await.unwrap());
}

/// Whoever meets it: the writer, the look-ups of every account, the check of health, a stranger's read.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_database_that_is_away_is_told_in_one_line_with_its_cause() {
    let Some(server) = postgres::server() else {
        return;
    };
    let mut gate = postgres::Gate::open(server).await;
    let network = Network::start(NetworkOptions::default()).await.unwrap();
    let folder = tempfile::tempdir().unwrap();
    let database = gate.url(&server.database().await);
    let argument = format!("--database-url={database}");
    let relay = start(&network, folder.path(), &argument).await;
    let pds = network.pds(0);
    let metric = async |name: &str| {
        let metrics = Samples::scrape(&relay.metrics_url()).await.unwrap();
        metrics.sum(name)
    };
    let pause = || tokio::time::sleep(Duration::from_millis(20));
    pds.create_account("alice.pds1.test").unwrap();
    while metric("relay_events_forwarded_total").await < 4.0 {
        pause().await;
    }
    gate.close();
    for number in 0..20 {
        pds.create_account(&format!("bob{number}.pds1.test"))
            .unwrap();
    }
    let health = format!("{}/xrpc/_health", relay.url());
    let listing = format!("{}/xrpc/com.atproto.sync.listRepos", relay.url());
    while metric("relay_store_flush_errors_total").await < 1.0 {
        assert_eq!(
            plain_client().get(&listing).send().await.unwrap().status(),
            503
        );
    }
    assert_eq!(
        plain_client().get(&health).send().await.unwrap().status(),
        503
    );
    let said = relay.said_in_all();
    let complaints = said.lines().filter(|line| {
        // Of the password in the arguments it warns too.
        (line.contains("ERROR") || line.contains("WARN")) && !line.contains("--database-url")
    });
    let complaints: Vec<&str> = complaints.collect();
    assert_eq!(complaints.len(), 1, "{said}");
    assert!(complaints[0].contains("Connection refused"), "{said}");
    assert!(complaints[0].contains("start the server"), "{said}");
    assert!(!said.contains("sqlx"), "{said}");
    gate.reopen().await;
    while metric("relay_events_forwarded_total").await < 84.0 {
        pause().await;
    }
    while plain_client().get(&health).send().await.unwrap().status() != 200 {
        pause().await;
    }
    assert!(relay.end(PATIENCE).await.unwrap());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_limit_of_open_files_is_raised_to_what_the_system_allows() {
    let network = Network::start(NetworkOptions::default()).await.unwrap();
    let folder = tempfile::tempdir().unwrap();
    let script = folder.path().join("with-few-files");
    let relay = env!("CARGO_BIN_EXE_atproto-relay");
    let text = format!("#!/bin/sh\nulimit -Sn 200\nexec '{relay}' \"$@\"\n");
    fs::write(&script, text).unwrap();
    fs::set_permissions(&script, fs::Permissions::from_mode(0o755)).unwrap();
    let argument = "--log-segment-bytes=8MiB";
    let relay = start_binary(&script, &network, folder.path(), argument).await;
    let metrics = Samples::scrape(&relay.metrics_url()).await.unwrap();
    let allowed = rustix::process::getrlimit(rustix::process::Resource::Nofile).maximum;
    let allowed = allowed.expect("a limit");
    assert_eq!(metrics.get("process_max_fds"), allowed as f64);
    assert!(relay.end(PATIENCE).await.unwrap());
}

/// A request on a Unix socket; its status line and body.
fn ask_socket(path: &Path, request: &str) -> String {
    let mut socket = UnixStream::connect(path).unwrap();
    socket.write_all(request.as_bytes()).unwrap();
    let mut answer = String::new();
    socket.read_to_string(&mut answer).unwrap();
    answer
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_change_by_the_operator_is_one_line_with_who_what_and_why() {
    let network = Network::start(NetworkOptions::default()).await.unwrap();
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("admin.sock");
    let argument = format!("--admin-listen=unix:{}", socket.display());
    let relay = start(&network, folder.path(), &argument).await;
    let ready = format!(
        "admin=the public listener, with the password; unix:{}",
        socket.display()
    );
    support::until("it says that it is ready", || {
        relay.said_in_all().contains(&ready)
    })
    .await;
    let pds = network.pds(0);
    let alice = pds.create_account("alice.pds1.test").unwrap().did;
    let alice = alice.as_str();
    let status = format!(
        "{}/xrpc/com.atproto.sync.getRepoStatus?did={alice}",
        relay.url()
    );
    until_status(&status, 200).await;
    let post = async |path: &str, body: Value| {
        let request = atproto_relay::dial::plain_client()
            .post(format!("{}/admin/{path}", relay.url()))
            .basic_auth("admin", Some("devnet"))
            .header("x-forwarded-for", "192.0.2.7");
        let answer = request.json(&body).send().await.unwrap();
        answer.status().as_u16()
    };
    let host = pds.url().replace("http://", "");
    let down = json!({"did": alice, "reason": "spam\n2026 INFO forged"});
    assert_eq!(post("repo/takeDown", down).await, 200);
    assert_eq!(
        post("repo/reverseTakedown", json!({"did": alice})).await,
        200
    );
    let limits = json!({"host": host, "repo_limit": 7, "per_hour": 9, "bytes_per_hour": null, "reason": "a test"});
    assert_eq!(post("pds/changeLimits", limits).await, 200);
    let ban = json!({"domain": "evil.example"});
    assert_eq!(post("subs/banDomain", ban.clone()).await, 200);
    assert_eq!(post("subs/unbanDomain", ban).await, 200);
    let nobody = json!({"did": "did:plc:aaaaaaaaaaaaaaaaaaaaaaaa"});
    assert_eq!(post("repo/takeDown", nobody).await, 404);
    let unknown = json!({"hostname": "127.0.0.1:1", "reason": "new"});
    assert_eq!(post("pds/requestCrawl", unknown).await, 400);
    let block = format!(
        "POST /admin/pds/block?host={host} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n"
    );
    let answer = ask_socket(&socket, &block);
    assert!(answer.starts_with("HTTP/1.1 200 "), "{answer}");

    let said = relay.said_in_all();
    let by_password = "actor=\"admin password from 192.0.2.7 on the public listener\"";
    let by_socket = format!(
        "actor=\"uid {}, pid {} on the admin socket\"",
        rustix::process::getuid().as_raw(),
        std::process::id()
    );
    let [did, host] = [&alice.to_string(), &host].map(|subject| format!("subject={subject:?}"));
    let lines = [
        format!(
            "{by_password} action=\"repo/takeDown\" {did} reason=\"spam\\n2026 INFO forged\" previous=\"active\" new=\"takendown\""
        ),
        format!(
            "{by_password} action=\"repo/reverseTakedown\" {did} reason=\"\" previous=\"takendown\" new=\"active\""
        ),
        format!(
            "{by_password} action=\"pds/changeLimits\" {host} reason=\"a test\" \
             previous=\"repo_limit=100 per_hour=general bytes_per_hour=general\" \
             new=\"repo_limit=7 per_hour=9 bytes_per_hour=general\""
        ),
        format!(
            "{by_password} action=\"subs/banDomain\" subject=\"evil.example\" reason=\"\" previous=\"not banned\" new=\"banned\""
        ),
        format!(
            "{by_password} action=\"subs/unbanDomain\" subject=\"evil.example\" reason=\"\" previous=\"banned\" new=\"not banned\""
        ),
        format!(
            "{by_socket} action=\"pds/block\" {host} reason=\"\" previous=\"active\" new=\"banned\""
        ),
    ];
    for line in &lines {
        let found = said.lines().filter(|said| said.contains(line.as_str()));
        let found: Vec<_> = found.collect();
        assert_eq!(found.len(), 1, "{line}\n{said}");
        assert!(found[0].contains(" INFO "), "{}", found[0]);
    }
    let failed = said.lines().filter(|line| line.contains("failure="));
    let failed: Vec<_> = failed.collect();
    assert_eq!(failed.len(), 2, "{said}");
    assert!(failed[0].contains("the account is not known to this relay"));
    assert!(
        failed[1].contains("action=\"pds/requestCrawl\" subject=\"127.0.0.1:1\" reason=\"new\"")
    );
    assert!(
        !said
            .lines()
            .any(|line| line.starts_with("2026 INFO forged"))
    );
    assert!(relay.end(PATIENCE).await.unwrap());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn strangers_hear_nothing_of_names_that_only_this_machine_can_resolve() {
    let network = Network::start(NetworkOptions::default()).await.unwrap();
    let folder = tempfile::tempdir().unwrap();
    let argument = "--log-level=info,atproto_relay::discovery=debug";
    let relay = start(&network, folder.path(), argument).await;
    let answer = async |path: &str, host: &str, password: bool| {
        let mut request = atproto_relay::dial::plain_client()
            .post(format!("{}{path}", relay.url()))
            .json(&json!({"hostname": host}));
        if password {
            request = request.basic_auth("admin", Some("devnet"));
        }
        let answer = request.send().await.unwrap();
        (answer.status().as_u16(), answer.text().await.unwrap())
    };
    let public = "/xrpc/com.atproto.sync.requestCrawl";
    // One that refuses, one that is no web server, and one that does not exist.
    let mute = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let mute = mute.local_addr().unwrap().to_string();
    let hosts = ["127.0.0.1:1", "vault.invalid", mute.as_str()];
    let mut told = Vec::new();
    for host in hosts {
        let (status, text) = answer(public, host, false).await;
        assert_eq!(status, 400, "{text}");
        told.push(text.replace(host, "HOST"));
    }
    assert!(told.iter().all(|text| *text == told[0]), "{told:?}");
    // The operator hears why.
    let (_, refused) = answer("/admin/pds/requestCrawl", hosts[0], true).await;
    let (_, nowhere) = answer("/admin/pds/requestCrawl", hosts[1], true).await;
    assert!(refused.len() > told[0].len() && nowhere.len() > told[0].len());
    assert_ne!(refused.replace(hosts[0], ""), nowhere.replace(hosts[1], ""));
    // Requests for a known host are no line each.
    let known = network.pds(0).url();
    for _ in 0..20 {
        assert_eq!(answer(public, &known, false).await.0, 200);
    }
    let said = relay.said_in_all();
    let lines = said
        .lines()
        .filter(|line| line.contains("crawl") && line.contains(" INFO "));
    assert_eq!(
        lines.filter(|line| !line.contains("the operator")).count(),
        0,
        "{said}"
    );
    assert!(said.contains("crawl request refused"), "{said}");
    assert!(relay.end(PATIENCE).await.unwrap());
}

/// A start with its admin API on a path.
fn serve_on(folder: &Path, socket: &Path) -> Command {
    let mut command = serve(&folder.join("data"));
    command.arg(format!("--admin-listen=unix:{}", socket.display()));
    command
}

#[test]
fn a_path_that_is_no_dead_socket_stays_as_it_is() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    let file = at("important.txt");
    fs::write(&file, "precious").unwrap();
    std::os::unix::fs::symlink(&file, at("link")).unwrap();
    std::os::unix::fs::symlink(at("nothing"), at("dangling")).unwrap();
    fs::create_dir(at("folder")).unwrap();
    rustix::fs::mknodat(
        rustix::fs::CWD,
        at("pipe"),
        rustix::fs::FileType::Fifo,
        rustix::fs::Mode::RWXU,
        0,
    )
    .unwrap();
    for name in ["important.txt", "link", "dangling", "folder", "pipe"] {
        let line = refusal(&mut serve_on(folder.path(), &at(name)));
        assert!(line.contains("is no socket, and stays as it is"), "{line}");
        assert!(line.contains("--admin-listen"), "{line}");
    }
    let live = std::os::unix::net::UnixListener::bind(at("live")).unwrap();
    let line = refusal(&mut serve_on(folder.path(), &at("live")));
    assert!(line.contains("another process answers there"), "{line}");
    drop(live);
    assert_eq!(fs::read_to_string(&file).unwrap(), "precious");
    assert_eq!(fs::read_to_string(at("link")).unwrap(), "precious");
    let mut names: Vec<_> = fs::read_dir(folder.path())
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    let expected = [
        "dangling",
        "folder",
        "important.txt",
        "link",
        "live",
        "pipe",
    ];
    assert_eq!(names, expected);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_socket_that_was_left_behind_is_taken_over() {
    let network = Network::start(NetworkOptions::default()).await.unwrap();
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("admin.sock");
    drop(std::os::unix::net::UnixListener::bind(&socket).unwrap());
    let argument = format!("--admin-listen=unix:{}", socket.display());
    let mut relay = start(&network, folder.path(), &argument).await;
    let list = "GET /admin/pds/list HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n";
    assert!(ask_socket(&socket, list).starts_with("HTTP/1.1 200 "));
    relay.kill().unwrap();
    relay.restart(PATIENCE).await.unwrap();
    assert!(ask_socket(&socket, list).starts_with("HTTP/1.1 200 "));
    let mode = fs::metadata(&socket).unwrap().permissions().mode() & 0o777;
    assert_eq!(mode, 0o660);
    let names = fs::read_dir(folder.path()).unwrap();
    let aside = names.filter(|name| {
        let name = name.as_ref().unwrap().file_name();
        name.to_string_lossy().starts_with(".dead")
    });
    assert_eq!(aside.count(), 0);
    assert!(relay.end(PATIENCE).await.unwrap());
}

#[test]
fn a_start_that_cannot_listen_leaves_a_data_folder_as_it_was() {
    let folder = tempfile::tempdir().unwrap();
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap().to_string();
    let mut command = Command::new(env!("CARGO_BIN_EXE_atproto-relay"));
    command.env_clear().stdin(Stdio::null());
    command.args(["serve", "--log-level=error", "--metrics-listen=127.0.0.1:0"]);
    command.args(["--listen", &address, "--data-dir"]);
    fs::write(folder.path().join("something"), "of the operator").unwrap();
    let line = refusal(command.arg(folder.path()));
    assert!(
        line.contains(&address) && line.contains("--listen"),
        "{line}"
    );
    let names: Vec<_> = fs::read_dir(folder.path())
        .unwrap()
        .map(|entry| entry.unwrap().file_name())
        .collect();
    assert_eq!(names, ["something"]);
}
