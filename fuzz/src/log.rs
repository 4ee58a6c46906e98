//! Opening a log whose files were damaged in every way: it opens, its sequence numbers are dense, no
//! event comes out that was not put in, the next one gets the next number, the second time it opens
//! nothing is different, and a redaction leaves nothing of its account.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::LazyLock;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::sync_channel;
use std::time::{Duration, Instant};

use atproto_relay::atproto::car;
use atproto_relay::atproto::cid::{Cid, Codec};
use atproto_relay::atproto::did::Did;
use atproto_relay::atproto::frame::{self, Peek};
use atproto_relay::eventlog::sequencer;
use atproto_relay::eventlog::{Append, Durability, EventLog, LogOptions, Origin};
use bytes::{Bytes, BytesMut};

/// Events of the log before it is damaged; with segments of this size, three of them.
const EVENTS: u64 = 60;
const SEGMENT_BYTES: u64 = 4096;
const HOST: u32 = 7;
/// The layout of an index, as far as it takes to forge an entry: its size, and where its checksum and
/// the one byte outside of it lie.
const ENTRY_BYTES: usize = 64;
const CHECKSUM_AT: usize = 60;
const STATE_AT: usize = 53;
/// Longest wait for a redaction.
const LONGEST_PASS: Duration = Duration::from_secs(20);
/// Files do not grow past this.
const MOST_BYTES: usize = 64 << 10;
/// Longest bytes that one edit writes.
const MOST_WRITTEN: usize = 64;
/// Sequence numbers that a renamed segment may claim, beside the small ones.
const FAR: [u64; 4] = [1 << 32, (1 << 53) - 1, u64::MAX - 1, u64::MAX];

type Files = BTreeMap<String, Vec<u8>>;

/// The log before any damage.
struct Sound {
    files: Files,
    /// By sequence number, from 1.
    frames: Vec<Bytes>,
}

static SOUND: LazyLock<Sound> = LazyLock::new(Sound::new);

/// Checks the log after the edits that the bytes tell.
pub fn check(bytes: &[u8]) {
    let mut files = SOUND.files.clone();
    let forged = damage(&mut files, bytes);
    let folder = Folder::new();
    for (name, bytes) in &files {
        fs::write(folder.0.join(name), bytes).expect("the scratch folder takes files");
    }
    let log = open(&folder.0);
    let (oldest, head) = log.window();
    assert!(oldest >= 1 && oldest <= head + 1, "{oldest} to {head}");
    let events = events(&log, oldest, EVENTS, forged);
    let next = append(&log);
    assert_eq!(next, head + 1, "a number is left out, or given twice");
    drop(log);
    let log = open(&folder.0);
    assert_eq!(log.head(), next);
    if !forged {
        // A forged time may be out of the window.
        assert_eq!(log.window().0, oldest);
        let mut again = self::events(&log, oldest, head.min(EVENTS), forged);
        assert!(again.remove(&next).is_some(), "the new event is gone");
        assert_eq!(again, events, "another log the second time");
        redact(&log);
    }
}

/// Takes an account out, and looks for what is left of it.
fn redact(log: &EventLog) {
    let account = event(1).did;
    log.redact(&account, log.head())
        .expect("the journal takes it");
    let begun = Instant::now();
    while log.redactions_pending() > 0 {
        assert!(begun.elapsed() < LONGEST_PASS, "the redaction does not end");
        std::thread::sleep(Duration::from_millis(1));
    }
    for event in log.entries(1) {
        let (_, frame) = event.expect("the log can be read");
        let of_account = frame
            .windows(account.as_str().len())
            .any(|it| it == account.as_str().as_bytes());
        assert!(
            !of_account || frame::is_plain_account(&frame),
            "an event is left"
        );
    }
}

fn open(dir: &Path) -> EventLog {
    let options = LogOptions {
        segment_bytes: SEGMENT_BYTES,
        durability: Durability::None,
        ..LogOptions::new(dir)
    };
    EventLog::open(options).expect("a damaged log opens")
}

/// Every event that comes out; those up to `sound` were put in. `forged`: entries may be lies with good
/// checksums.
fn events(log: &EventLog, oldest: u64, sound: u64, forged: bool) -> BTreeMap<u64, Bytes> {
    let head = log.head();
    let mut events = BTreeMap::new();
    let mut last = oldest - 1;
    for event in log.entries(1).and_redacted() {
        let Ok((entry, frame)) = event else {
            assert!(forged, "the log cannot be read");
            return events;
        };
        assert!(
            last < entry.seq && entry.seq <= head,
            "{} behind {last}",
            entry.seq
        );
        last = entry.seq;
        // An entry that was rebuilt vouches for no more than the frame's own structure.
        if !forged && !frame.is_empty() && entry.origin.host().is_some() && entry.seq <= sound {
            assert_eq!(
                frame,
                SOUND.frames[entry.seq as usize - 1],
                "seq {}",
                entry.seq
            );
        }
        events.insert(entry.seq, frame);
    }
    let mut reader = log.reader(oldest);
    let mut out = BytesMut::new();
    while let Some(range) = reader.next(&mut out, MOST_BYTES).unwrap_or_else(|error| {
        assert!(forged, "the log cannot be served: {error}");
        None
    }) {
        assert!(*range.end() <= head);
        out.clear();
    }
    assert!(
        forged || reader.position() == head + 1,
        "the reader stops early"
    );
    events
}

/// Appends one event: its sequence number.
fn append(log: &EventLog) -> u64 {
    let (batches, rx) = sync_channel(1);
    let (durable, given) = sync_channel(1);
    let sequencer = sequencer::spawn(log.clone(), rx, move |events: Vec<(u64, ())>| {
        durable.send(events).expect("the check listens");
    });
    batches.send(vec![event(0)]).expect("the sequencer runs");
    let given = given.recv().expect("the event becomes durable");
    drop(batches);
    sequencer.expect("the sequencer starts").join();
    given[0].0
}

/// Changes files as the bytes tell. True where an entry was given a good checksum.
fn damage(files: &mut Files, mut edits: &[u8]) -> bool {
    let mut forged = false;
    while let [what, which, low, high, count, rest @ ..] = edits {
        edits = rest;
        let at = usize::from(u16::from_le_bytes([*low, *high]));
        let mut names: Vec<_> = files.keys().cloned().collect();
        // Behind the others, which the seeds name by their place.
        names.sort_by_key(|name| name.ends_with(".acc"));
        let Some(name) = names.get(usize::from(*which) % names.len().max(1)) else {
            return forged;
        };
        let file = files.get_mut(name).expect("a name of the list");
        let at = at.min(file.len());
        let end = (at + usize::from(*count)).min(file.len());
        match what % 9 {
            0 => file.truncate(at),
            1 => file.resize((file.len() + at).min(MOST_BYTES), 0),
            2 => file[at..end].fill(0),
            3 => file[at..end]
                .iter_mut()
                .for_each(|byte| *byte ^= 1 << (*what >> 4 & 7)),
            4 => {
                let length = usize::from(*count).min(MOST_WRITTEN).min(edits.len());
                let (written, rest) = edits.split_at(length);
                edits = rest;
                file.resize(file.len().max(at + length), 0);
                file[at..at + length].copy_from_slice(written);
            }
            5 => {
                files.remove(name);
            }
            6 => {
                let copied = file[at..end].to_vec();
                let other = &names[usize::from(*what >> 4) % names.len()];
                let other = files.get_mut(other).expect("a name of the list");
                let at = at.min(other.len());
                other.splice(at.., copied);
            }
            7 => {
                forged = true;
                reseal(file, usize::from(*count));
            }
            _ => {
                let far = FAR.get(usize::from(*count)).copied();
                let first = far.unwrap_or(u64::from(*count));
                let ending = Path::new(name).extension().unwrap_or_default().to_owned();
                let renamed = Path::new(&format!("{first:020}")).with_extension(ending);
                if let Some(bytes) = files.remove(name) {
                    files.insert(renamed.display().to_string(), bytes);
                }
            }
        }
    }
    forged
}

/// Gives an entry of an index the checksum of what it says.
fn reseal(file: &mut [u8], slot: usize) {
    let Some(entry) = file.chunks_exact_mut(ENTRY_BYTES).nth(slot) else {
        return;
    };
    let state = std::mem::take(&mut entry[STATE_AT]);
    let sum = crc32fast::hash(&entry[..CHECKSUM_AT]);
    entry[CHECKSUM_AT..].copy_from_slice(&sum.to_le_bytes());
    entry[STATE_AT] = state;
}

impl Sound {
    fn new() -> Sound {
        let folder = Folder::new();
        let log = open(&folder.0);
        let (batches, rx) = sync_channel(1);
        let sequencer = sequencer::spawn(log.clone(), rx, |_: Vec<(u64, ())>| {});
        batches
            .send((1..=EVENTS).map(event).collect())
            .expect("the sequencer runs");
        drop(batches);
        sequencer.expect("the sequencer starts").join();
        let frames = log.entries(1).map(|event| event.expect("a sound log").1);
        let frames: Vec<_> = frames.collect();
        drop(log);
        let mut files = Files::new();
        for file in fs::read_dir(&folder.0).expect("the folder is there") {
            let path = file.expect("a file").path();
            let name = path.file_name().unwrap_or_default();
            let name = name.to_string_lossy().into_owned();
            // The lock is written anew by whoever opens.
            if name != "lock" {
                files.insert(name, fs::read(&path).expect("a file that can be read"));
            }
        }
        files.insert("redactions".into(), Vec::new());
        assert_eq!(
            files.len(),
            10,
            "three segments, two account indexes, the mark and the redactions"
        );
        Sound { files, frames }
    }
}

/// Commits, identities and accounts of four DIDs, in turn.
fn event(n: u64) -> Append<()> {
    let did = format!(
        "did:plc:{}",
        "abcd".repeat(6).replace('d', &format!("{}", n % 4 + 2))
    );
    let (seq, time) = (n as i64, "2026-01-01T00:00:00.000Z");
    let record = vec![n as u8; 20 + (n as usize * 37) % 200];
    let cid = Cid::of(Codec::DagCbor, &record);
    let frame = match n % 3 {
        0 => frame::encode_identity(&frame::Identity {
            seq,
            did: &did,
            time,
            handle: None,
        }),
        1 => frame::encode_account(&frame::Account {
            seq,
            did: &did,
            time,
            active: true,
            status: None,
        }),
        _ => frame::encode_sync(&frame::Sync {
            seq,
            did: &did,
            rev: "3jzfcijpj2z2a",
            blocks: &car::write(&[cid], [(cid, &record[..])]),
            time,
        }),
    };
    let Ok(Peek::Event(peeked)) = frame::peek(&frame) else {
        panic!("what we write is an event");
    };
    Append {
        frame: frame.into(),
        seq_span: peeked.seq_span,
        origin: Origin::Host { id: HOST, seq },
        did: Did::parse(&did).expect("24 letters of base32"),
        kind: peeked.kind,
        given_seq: None,
        payload: (),
    }
}

/// A folder for one log, in memory where there is such a place.
struct Folder(PathBuf);

impl Folder {
    fn new() -> Folder {
        static COUNT: AtomicU64 = AtomicU64::new(0);
        let memory = PathBuf::from("/dev/shm");
        let parent = if memory.is_dir() {
            memory
        } else {
            std::env::temp_dir()
        };
        let (process, number) = (std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed));
        let path = parent.join(format!("atproto-relay-fuzz-{process}-{number}"));
        fs::create_dir_all(&path).expect("a scratch folder");
        Folder(path)
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        // Nothing hangs on it.
        let _ = fs::remove_dir_all(&self.0);
    }
}
