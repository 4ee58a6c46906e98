//! The rules at work in a whole relay: a devnet whose hosts say what they should not, and what a consumer sees of it.

#![cfg(feature = "devnet")]

use crate::support::relay as support;
use crate::support::relay::{Bench, Consumer, PATIENCE, until};
use atproto_relay::atproto::car::{self, Car};
use atproto_relay::atproto::cid::{Cid, Codec};
use atproto_relay::atproto::did::Did;
use atproto_relay::atproto::frame::{self, Commit, MAX_FRAME_BYTES, Message, Peek};
use atproto_relay::devnet::pds::{AccountStatus, Pds, frames};
use atproto_relay::devnet::scrape::Samples;
use bytes::Bytes;
use serde_json::{Value, json};
use tokio::sync::Mutex;
use tokio::time::timeout;

/// Counters are the process's, so that tests that count must take turns.
static COUNTERS: Mutex<()> = Mutex::const_new(());

const COLLECTION: &str = "app.bsky.feed.post";

fn post(text: &str) -> Value {
    json!({"$type": COLLECTION, "text": text, "createdAt": "2026-01-01T00:00:00Z"})
}

fn write(pds: &Pds, did: &Did) -> String {
    let written = pds.create_record(did, COLLECTION, post("hello")).unwrap();
    format!("commit {did} {}", written.rev)
}

fn create(bench: &Bench, pds: usize, name: &str) -> Did {
    let pds = bench.network.pds(pds);
    let handle = format!("{name}.{}", pds.domain());
    pds.create_account(&handle).unwrap().did
}

async fn samples(bench: &Bench) -> Samples {
    let url = format!("http://{}/metrics", bench.relay.metrics_addr());
    Samples::scrape(&url).await.unwrap()
}

/// The frame with the sequence number it has in the PDS's stream.
fn numbered(frame: &[u8], seq: u64) -> Bytes {
    let span = frame::decode(frame).unwrap().seq_span.unwrap();
    let mut out = Vec::new();
    frame::splice_seq(frame, span, seq, &mut out);
    out.into()
}

/// Sends a frame as it is but for its sequence number.
fn send(pds: &Pds, frame: &[u8]) {
    pds.emit_with(|stamp| numbered(frame, stamp.seq));
}

/// The last event of a PDS's stream.
fn last(pds: &Pds) -> Bytes {
    pds.events().last().unwrap().frame.clone()
}

/// Takes everything up to the account's latest event.
async fn catch_up(bench: &Bench, consumer: &mut Consumer) {
    bench.until_settled().await;
    consumer.up_to(bench.relay.log().head()).await;
}

fn same_but_for_seq(out: &[u8], sent: &[u8]) -> bool {
    let seq = match frame::decode(sent).unwrap().message {
        Message::Commit(event) => event.seq,
        Message::Sync(event) => event.seq,
        Message::Identity(event) => event.seq,
        Message::Account(event) => event.seq,
        other => panic!("not an event: {other:?}"),
    };
    numbered(out, seq as u64) == sent
}

/// One way to change a commit, and the rule that refuses it.
type Spoilt = (&'static str, fn(&mut Commit<'_>));

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_spoilt_commit_is_counted_under_its_rule_and_the_good_one_passes() {
    let _turn = COUNTERS.lock().await;
    let bench = Bench::start(1).await;
    let pds = bench.network.pds(0);
    let mut consumer = bench.consumer(0).await;
    let did = create(&bench, 0, "alice");
    catch_up(&bench, &mut consumer).await;
    let spoilt: [Spoilt; 7] = [
        ("rev_syntax", |commit| commit.rev = "yesterday"),
        ("rev_future", |commit| commit.rev = "jzzzzzzzzzzzz"),
        ("rev_order", |commit| commit.rev = "2222222222222"),
        ("commit_block", |commit| {
            commit.commit = Cid::of(Codec::DagCbor, b"other");
        }),
        ("car", |commit| commit.blocks = &commit.blocks[1..]),
        ("op_path", |commit| commit.ops[0].path = "nowhere"),
        ("inversion", |commit| commit.ops.clear()),
    ];
    for (rule, spoil) in spoilt {
        let write = atproto_relay::devnet::pds::Write::Create {
            collection: COLLECTION.to_owned(),
            rkey: None,
            record: post(rule),
        };
        let good = pds.commit_silently(&did, &[write]).unwrap();
        let before = samples(&bench).await;
        pds.emit_with(|stamp| {
            let frame = frames::commit(stamp, &did, &good);
            let Message::Commit(mut commit) = frame::decode(&frame).unwrap().message else {
                panic!("a commit");
            };
            spoil(&mut commit);
            frame::encode_commit(&commit).into()
        });
        pds.emit_with(|stamp| frames::commit(stamp, &did, &good));
        let (_, seen) = consumer.next().await;
        assert_eq!(seen, format!("commit {did} {}", good.rev), "after {rule}");
        let drops = samples(&bench).await.since(&before).drops();
        assert_eq!(drops, [(rule.to_owned(), 1)].into());
    }
    bench.relay.shutdown().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn bytes_pass_through_and_handles_only_where_the_document_has_them() {
    let _turn = COUNTERS.lock().await;
    let bench = Bench::start(1).await;
    let pds = bench.network.pds(0);
    let mut consumer = bench.consumer(0).await;
    let did = create(&bench, 0, "alice");
    // Step by step: what is looked up meanwhile must be as it was when the PDS spoke.
    let steps: [&dyn Fn(); 6] = [
        &|| drop(write(pds, &did)),
        &|| drop(pds.rotate_key(&did).unwrap()),
        &|| drop(write(pds, &did)),
        &|| pds.update_handle(&did, "alice-two.pds1.test").unwrap(),
        &|| pds.deactivate(&did).unwrap(),
        &|| pds.activate(&did).unwrap(),
    ];
    for step in steps {
        bench.until_settled().await;
        step();
    }
    for event in pds.events() {
        let out = consumer.next_frame().await;
        assert!(same_but_for_seq(&out, &event.frame));
    }
    let identity = |handle: &str| {
        frame::encode_identity(&frame::Identity {
            seq: 0,
            did: did.as_str(),
            time: "2026-01-01T00:00:00.000Z",
            handle: Some(handle),
        })
    };
    for (handle, kept) in [("alice-two.pds1.test", true), ("mallory.test", false)] {
        send(pds, &identity(handle));
        let sent = last(pds);
        let out = consumer.next_frame().await;
        assert_eq!(same_but_for_seq(&out, &sent), kept);
        let expected = frame::without_handle(&sent).unwrap();
        assert!(kept || same_but_for_seq(&out, &expected));
    }
    bench.relay.shutdown().await;
}

/// What the PDS adds to its messages is kept: a field before all others, as canonical order has it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn unknown_fields_of_the_envelope_are_kept() {
    let _turn = COUNTERS.lock().await;
    let bench = Bench::start(1).await;
    let pds = bench.network.pds(0);
    let mut consumer = bench.consumer(0).await;
    let did = create(&bench, 0, "alice");
    write(pds, &did);
    catch_up(&bench, &mut consumer).await;
    let account = frame::encode_account(&frame::Account {
        seq: 0,
        did: did.as_str(),
        time: "2026-01-01T00:00:00.000Z",
        active: true,
        status: None,
    });
    // A map of four fields becomes one of five.
    let body = account.iter().rposition(|byte| *byte == 0xa4).unwrap();
    let extended = [&account[..body], b"\xa5\x61x\x63new", &account[body + 1..]].concat();
    send(pds, &extended);
    let out = consumer.next_frame().await;
    assert!(same_but_for_seq(&out, &last(pds)));
    bench.relay.shutdown().await;
}

/// The frame with an unknown field of this text before the others of its body, whose first one is `did`.
fn with_field(frame: &[u8], text: &str) -> Vec<u8> {
    let Ok(Peek::Event(event)) = frame::peek(frame) else {
        panic!("not an event");
    };
    // A head, the key `did` and the head of its value.
    let body = event.did_span.start - 7;
    let fields = frame[body] + 1;
    let length = u8::try_from(text.len()).unwrap();
    let field = [b"\x61x\x78", &[length][..], text.as_bytes()].concat();
    [&frame[..body], &[fields], &field, &frame[body + 1..]].concat()
}

/// A `#sync` of this sequence number that an unknown field makes `length` bytes long.
fn padded(sync: &[u8], seq: u64, length: usize) -> Bytes {
    let sync = numbered(sync, seq);
    let body = sync.iter().position(|byte| *byte == 0xa5).unwrap();
    let head = b"\x67padding\x5a".len() + 4;
    let padding = vec![0; length - sync.len() - head];
    let size = u32::try_from(padding.len()).unwrap().to_be_bytes();
    let field = [b"\x67padding\x5a", &size[..], &padding].concat();
    [&sync[..body], b"\xa6", &sync[body + 1..], &field]
        .concat()
        .into()
}

/// Our numbers are longer than the host's, and no consumer takes more than 5,000,000 bytes.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_frame_grows_over_the_limit_on_its_way() {
    let _turn = COUNTERS.lock().await;
    let bench = Bench::start_with(1, |config, _| {
        let log = config.data_dir.join("log");
        std::fs::create_dir_all(&log).unwrap();
        std::fs::write(log.join("00000000000000070001.seg"), b"").unwrap();
    })
    .await;
    let pds = bench.network.pds(0);
    create(&bench, 0, "alice");
    bench.until_settled().await;
    let mut consumer = bench.consumer(bench.relay.log().head() + 1).await;
    let sync = last(pds);
    let before = samples(&bench).await;
    let longest = MAX_FRAME_BYTES - 8;
    for length in [MAX_FRAME_BYTES, longest + 1, longest] {
        pds.emit_with(|stamp| padded(&sync, stamp.seq, length));
        assert_eq!(last(pds).len(), length);
        bench.until_settled().await;
    }
    let out = consumer.next_frame().await;
    assert_eq!(
        out.len(),
        longest + 4,
        "a number of one byte became one of five"
    );
    assert!(same_but_for_seq(&out, &last(pds)));
    let dropped = samples(&bench).await.since(&before).drops();
    assert_eq!(dropped, [("frame_too_large".to_owned(), 2)].into());
    bench.relay.shutdown().await;
}

async fn redactions(bench: &Bench) -> u64 {
    samples(bench).await.get("relay_log_redactions_total") as u64
}

/// Waits until so many redactions were asked for, and none is left to be done; there must not be more.
async fn until_redacted(bench: &Bench, expected: u64) {
    let asked = async { while redactions(bench).await < expected {} };
    timeout(PATIENCE, asked).await.expect("the redactions");
    let log = bench.relay.log();
    until("it is punched out", || log.redactions_pending() == 0).await;
    assert_eq!(redactions(bench).await, expected);
}

/// Everything in the files of the relay's log.
fn on_disk(bench: &Bench) -> Vec<u8> {
    let files = std::fs::read_dir(bench.config.data_dir.join("log")).unwrap();
    let read = files.map(|file| std::fs::read(file.unwrap().path()).unwrap());
    read.collect::<Vec<_>>().concat()
}

fn holds(bytes: &[u8], text: &str) -> bool {
    bytes.windows(text.len()).any(|it| it == text.as_bytes())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_deletion_that_is_repeated_takes_out_only_what_came_since() {
    let _turn = COUNTERS.lock().await;
    let bench = Bench::start(1).await;
    let pds = bench.network.pds(0);
    let did = create(&bench, 0, "alice");
    let says = |status| pds.emit_with(|stamp| frames::account(stamp, &did, status));
    write(pds, &did);
    bench.until_settled().await;
    let before = redactions(&bench).await;
    let delete = async |expected: u64| {
        for _ in 0..20 {
            says(AccountStatus::Deleted);
        }
        bench.until_settled().await;
        until_redacted(&bench, before + expected).await;
        let log = bench.relay.log();
        let seen = bench.consumer(0).await.up_to(log.head()).await;
        let others = seen.iter().filter(|(_, text)| !text.starts_with("account"));
        assert_eq!(others.count(), 0, "{seen:#?}");
        seen.len()
    };
    // The PDS says once that the account is there, when it is created.
    assert_eq!(delete(1).await, 1 + 20);
    says(AccountStatus::Active);
    let written = write(pds, &did);
    bench.until_settled().await;
    let head = bench.relay.log().head();
    let seen = bench.consumer(head).await.up_to(head).await;
    assert_eq!(seen, [(head, written)], "it came back");
    assert_eq!(delete(2).await, 1 + 20 + 1 + 20);
    // Nothing is known of that after a restart, so it costs one more.
    let bench = bench.restarted(|_| {}).await;
    let pds = bench.network.pds(0);
    let before = redactions(&bench).await;
    for _ in 0..20 {
        pds.emit_with(|stamp| frames::account(stamp, &did, AccountStatus::Deleted));
    }
    bench.until_settled().await;
    until_redacted(&bench, before + 1).await;
    let log = bench.relay.log();
    assert_eq!(bench.consumer(0).await.up_to(log.head()).await.len(), 62);
    bench.relay.shutdown().await;
}

/// Neither in what it wrote before, nor in what its PDS says of it afterwards; others keep their unknown fields.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nothing_that_an_ended_account_chose_is_served_or_on_disk() {
    const FORBIDDEN: &str = "forbidden-content-in-an-unknown-field";
    const ALLOWED: &str = "allowed-content-in-an-unknown-field";
    let _turn = COUNTERS.lock().await;
    let bench = Bench::start(1).await;
    let pds = bench.network.pds(0);
    let [taken_down, deleted, bystander] =
        ["alice", "bob", "carol"].map(|name| create(&bench, 0, name));
    let send_all = |did: &Did, text: &str, active: bool| {
        let account = frame::Account {
            seq: 0,
            did: did.as_str(),
            time: "2026-01-01T00:00:00.000Z",
            active,
            status: (!active).then_some("deleted"),
        };
        send(pds, &with_field(&frame::encode_account(&account), text));
        let time = frame::Account {
            time: text,
            ..account
        };
        send(pds, &frame::encode_account(&time));
        let identity = frame::encode_identity(&frame::Identity {
            seq: 0,
            did: did.as_str(),
            time: text,
            handle: None,
        });
        send(pds, &with_field(&identity, text));
    };
    for did in [&taken_down, &deleted] {
        send_all(did, FORBIDDEN, true);
    }
    send_all(&bystander, ALLOWED, true);
    bench.until_settled().await;
    assert!(holds(&on_disk(&bench), FORBIDDEN));
    let body = json!({"did": taken_down.as_str()});
    bench.admin("/admin/repo/takeDown", body).await;
    send_all(&taken_down, FORBIDDEN, true);
    send_all(&deleted, FORBIDDEN, false);
    bench.until_settled().await;
    until("it is off the disk", || !holds(&on_disk(&bench), FORBIDDEN)).await;
    let log = bench.relay.log();
    let mut consumer = bench.consumer(0).await;
    let (mut events, mut allowed) = (Vec::new(), 0);
    while events.last().is_none_or(|(seq, _)| *seq < log.head()) {
        let out = consumer.next_frame().await;
        assert!(!holds(&out, FORBIDDEN), "served");
        allowed += usize::from(holds(&out, ALLOWED));
        events.push(support::describe(&out));
    }
    assert_eq!(allowed, 3, "the others keep what they send");
    assert!(holds(&on_disk(&bench), ALLOWED));
    for (did, status) in [(&taken_down, "takendown"), (&deleted, "deleted")] {
        let ended = format!("account {did} false Some(\"{status}\")");
        let said = events.iter().filter(|(_, text)| *text == ended).count();
        assert!(said >= 2, "{events:#?}");
    }
    bench.relay.shutdown().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_account_that_moved_is_heard_from_its_new_host_only() {
    let _turn = COUNTERS.lock().await;
    let bench = Bench::start(2).await;
    let (old, new) = (bench.network.pds(0), bench.network.pds(1));
    let mut consumer = bench.consumer(0).await;
    let did = create(&bench, 0, "alice");
    write(old, &did);
    let by_old = last(old);
    catch_up(&bench, &mut consumer).await;

    let before = samples(&bench).await;
    send(new, &by_old);
    bench.until_settled().await;
    let foreign = samples(&bench).await.since(&before);
    assert_eq!(foreign.drops(), [("wrong_host".to_owned(), 1)].into());

    bench.network.migrate(&did, 1).unwrap();
    bench.until_settled().await;
    let before = samples(&bench).await;
    send(old, &by_old);
    bench.until_settled().await;
    let late = samples(&bench).await.since(&before);
    assert_eq!(late.drops(), [("wrong_host".to_owned(), 1)].into());
    let written = write(new, &did);
    bench.until_settled().await;
    let seen = consumer.up_to(bench.relay.log().head()).await;
    assert_eq!(seen.last().map(|(_, text)| text), Some(&written));
    bench.relay.shutdown().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn commits_of_an_inactive_account_wait_for_its_return() {
    let _turn = COUNTERS.lock().await;
    let bench = Bench::start(1).await;
    let pds = bench.network.pds(0);
    let mut consumer = bench.consumer(0).await;
    let did = create(&bench, 0, "alice");
    let silent = pds.commit_silently(&did, &[]).unwrap();
    pds.deactivate(&did).unwrap();
    bench.until_settled().await;
    let before = samples(&bench).await;
    pds.emit_with(|stamp| frames::commit(stamp, &did, &silent));
    bench.until_settled().await;
    let dropped = samples(&bench).await.since(&before).drops();
    assert_eq!(dropped, [("account_inactive".to_owned(), 1)].into());
    pds.activate(&did).unwrap();
    let written = write(pds, &did);
    bench.until_settled().await;
    let seen = consumer.up_to(bench.relay.log().head()).await;
    assert_eq!(seen.last().map(|(_, text)| text), Some(&written));
    bench.relay.shutdown().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn replays_are_dropped_and_a_sync_may_only_repeat() {
    let _turn = COUNTERS.lock().await;
    let bench = Bench::start(1).await;
    let pds = bench.network.pds(0);
    let mut consumer = bench.consumer(0).await;
    let did = create(&bench, 0, "alice");
    // The account's first events end in a #sync of its first commit.
    let first_sync = last(pds);
    send(pds, &first_sync);
    let repeated = pds.events().len();
    write(pds, &did);
    let commit = last(pds);
    bench.until_settled().await;
    assert_eq!(
        bench.relay.log().head(),
        repeated as u64 + 1,
        "an equal #sync is forwarded"
    );
    let before = samples(&bench).await;
    send(pds, &commit);
    send(pds, &first_sync);
    bench.until_settled().await;
    let dropped = samples(&bench).await.since(&before).drops();
    assert_eq!(dropped, [("rev_order".to_owned(), 2)].into());
    let written = write(pds, &did);
    bench.until_settled().await;
    let seen = consumer.up_to(bench.relay.log().head()).await;
    assert_eq!(seen.last().map(|(_, text)| text), Some(&written));
    bench.relay.shutdown().await;
}

/// While the operator has the account down, the PDS's word changes nothing of what consumers hear.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_account_event_says_the_combined_status() {
    let _turn = COUNTERS.lock().await;
    let bench = Bench::start(1).await;
    let pds = bench.network.pds(0);
    let mut consumer = bench.consumer(0).await;
    let did = create(&bench, 0, "alice");
    catch_up(&bench, &mut consumer).await;
    let body = json!({"did": did.as_str()});
    bench.admin("/admin/repo/takeDown", body.clone()).await;
    assert!(
        consumer
            .next()
            .await
            .1
            .contains("false Some(\"takendown\")")
    );
    let active = frame::encode_account(&frame::Account {
        seq: 0,
        did: did.as_str(),
        time: "2026-01-01T00:00:00.000Z",
        active: true,
        status: None,
    });
    send(pds, &active);
    let out = consumer.next_frame().await;
    let sent = last(pds);
    let expected = frame::with_account_status(&sent, false, Some("takendown")).unwrap();
    assert!(same_but_for_seq(&out, &expected));
    bench.admin("/admin/repo/reverseTakedown", body).await;
    assert!(consumer.next().await.1.contains("true None"));
    bench.relay.shutdown().await;
}

/// A commit that no other follows, made otherwise than its PDS did, and the rule that refuses it.
type Remade = (&'static str, fn(&Commit<'_>) -> Vec<u8>);

/// The commit with another CAR: what `change` makes of its roots and blocks.
fn with_blocks(commit: &Commit<'_>, change: impl FnOnce(&mut Vec<Cid>, &mut Blocks)) -> Vec<u8> {
    let car = Car::parse(commit.blocks).unwrap();
    let mut roots = car.roots().to_vec();
    let mut blocks: Blocks = (car.blocks().iter())
        .map(|(cid, data)| (cid, data.to_vec()))
        .collect();
    change(&mut roots, &mut blocks);
    let root = roots[0];
    let blocks = car::write(&roots, blocks.iter().map(|(cid, data)| (*cid, &data[..])));
    frame::encode_commit(&Commit {
        commit: root,
        blocks: &blocks,
        ..commit.clone()
    })
}

type Blocks = Vec<(Cid, Vec<u8>)>;

fn junk(blocks: &mut Blocks, count: u32) {
    blocks.extend((0..count).map(|n| {
        let data = n.to_be_bytes().to_vec();
        (Cid::of(Codec::DagCbor, &data), data)
    }));
}

fn in_raw(cid: Cid) -> Cid {
    Cid::from_digest(Codec::Raw, cid.digest())
}

/// Consistent in themselves, and refused all the same.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn commits_with_blocks_cids_or_ops_that_may_not_be_are_refused() {
    let _turn = COUNTERS.lock().await;
    let bench = Bench::start(1).await;
    let pds = bench.network.pds(0);
    let mut consumer = bench.consumer(0).await;
    let did = create(&bench, 0, "alice");
    catch_up(&bench, &mut consumer).await;
    let remade: [Remade; 4] = [
        ("too_many_blocks", |commit| {
            with_blocks(commit, |_, blocks| junk(blocks, 600))
        }),
        ("cid_codec", |commit| {
            with_blocks(commit, |roots, blocks| {
                for (cid, _) in blocks.iter_mut().filter(|(cid, _)| *cid == roots[0]) {
                    *cid = in_raw(*cid);
                }
                roots[0] = in_raw(roots[0]);
            })
        }),
        ("cid_codec", |commit| {
            let mut commit = commit.clone();
            commit.ops[0].cid = commit.ops[0].cid.map(in_raw);
            frame::encode_commit(&commit)
        }),
        ("op_duplicate", |commit| {
            let mut commit = commit.clone();
            commit.ops.push(commit.ops[0]);
            frame::encode_commit(&commit)
        }),
    ];
    for (rule, remake) in remade {
        let write = atproto_relay::devnet::pds::Write::Create {
            collection: COLLECTION.to_owned(),
            rkey: None,
            record: post(rule),
        };
        let good = pds.commit_silently(&did, &[write]).unwrap();
        let before = samples(&bench).await;
        let mut unneeded = Vec::new();
        pds.emit_with(|stamp| {
            let frame = frames::commit(stamp, &did, &good);
            let Message::Commit(commit) = frame::decode(&frame).unwrap().message else {
                panic!("a commit");
            };
            unneeded = with_blocks(&commit, |_, blocks| junk(blocks, 300));
            remake(&commit).into()
        });
        // Blocks that nobody needs pass while they are few.
        send(pds, &unneeded);
        let out = consumer.next_frame().await;
        assert!(same_but_for_seq(&out, &last(pds)), "after {rule}");
        let drops = samples(&bench).await.since(&before).drops();
        assert_eq!(drops, [(rule.to_owned(), 1)].into());
    }
    bench.relay.shutdown().await;
}

/// Too long, or of an account that is spelt in another way: refused, and the host stays connected.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn events_that_are_too_long_or_spelt_otherwise_are_refused() {
    let _turn = COUNTERS.lock().await;
    let bench = Bench::start(1).await;
    let pds = bench.network.pds(0);
    let mut consumer = bench.consumer(0).await;
    let did = create(&bench, 0, "alice");
    catch_up(&bench, &mut consumer).await;
    let shouted = format!("did:plc:{}", did.identifier().to_ascii_uppercase());
    let identity = |did: &str, time: &str| {
        frame::encode_identity(&frame::Identity {
            seq: 0,
            did,
            time,
            handle: None,
        })
    };
    let account = |did: &str, time: &str| {
        frame::encode_account(&frame::Account {
            seq: 0,
            did,
            time,
            active: false,
            status: Some("deactivated"),
        })
    };
    let long = "x".repeat(8 * 1024);
    let commit = |spelt: &str| {
        let commit = last(pds);
        let mut frame = commit.to_vec();
        for at in 0..frame.len().saturating_sub(did.as_str().len()) {
            if frame[at..].starts_with(did.as_str().as_bytes()) {
                frame[at..at + spelt.len()].copy_from_slice(spelt.as_bytes());
            }
        }
        frame
    };
    write(pds, &did);
    catch_up(&bench, &mut consumer).await;
    for (rule, frame) in [
        ("event_too_large", identity(did.as_str(), &long)),
        ("event_too_large", account(did.as_str(), &long)),
        ("did_syntax", identity(&shouted, "now")),
        ("did_syntax", account(&shouted, "now")),
        ("did_syntax", commit(&shouted)),
    ] {
        let before = samples(&bench).await;
        send(pds, &frame);
        let written = write(pds, &did);
        assert_eq!(consumer.next().await.1, written, "after {rule}");
        let drops = samples(&bench).await.since(&before).drops();
        assert_eq!(drops, [(rule.to_owned(), 1)].into());
    }
    // The longest that may be.
    let length = 8 * 1024 - identity(did.as_str(), "").len() - 2;
    send(pds, &identity(did.as_str(), &"x".repeat(length)));
    assert_eq!(last(pds).len(), 8 * 1024);
    assert_eq!(consumer.next().await.1, format!("identity {did}"));
    bench.relay.shutdown().await;
}
