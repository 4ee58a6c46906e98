//! The fuzz targets' promises on their seeds, without a fuzzer; and where the seeds come from: captured
//! PDS traffic, the devnet's own, and a few lines written here. `cargo test --test fuzz_seeds -- --ignored`
//! writes them anew, all but those that a fuzzer found (`found-…`).

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use atproto_relay::atproto::car::Car;
use atproto_relay::atproto::frame::{self, Message};
use atproto_relay::devnet::faults::{Fault, FaultPlan};
use atproto_relay::devnet::load::{LoadOptions, Prepared};

#[path = "../fuzz/src/lib.rs"]
mod targets;

/// Longest seed: the fuzzer finds more in short ones.
const LONGEST: usize = 4096;

macro_rules! targets {
    ($($name:ident)*) => {
        const TARGETS: &[&str] = &[$(stringify!($name)),*];
        $(
            #[test]
            fn $name() {
                for (path, bytes) in seeds(stringify!($name)) {
                    println!("{}", path.display());
                    targets::$name::check(&bytes);
                }
            }
        )*
    };
}

targets! { cbor car frame commit inversion tree log client_frames identity }

fn folder(target: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("fuzz/seeds")
        .join(target)
}

fn seeds(target: &str) -> Vec<(PathBuf, Vec<u8>)> {
    let read = |path: PathBuf| {
        let bytes = fs::read(&path).unwrap();
        (path, bytes)
    };
    let seeds: Vec<_> = paths(&folder(target)).into_iter().map(read).collect();
    assert!(!seeds.is_empty(), "target {target} has no seeds");
    seeds
}

fn paths(folder: &Path) -> Vec<PathBuf> {
    let files =
        fs::read_dir(folder).unwrap_or_else(|error| panic!("{}: {error}", folder.display()));
    let mut paths: Vec<_> = files.map(|file| file.unwrap().path()).collect();
    paths.sort();
    paths
}

#[test]
fn every_target_is_here() {
    let sources = paths(&Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/targets"));
    let names = sources
        .iter()
        .map(|path| path.file_stem().unwrap().to_str().unwrap());
    assert_eq!(
        names.collect::<BTreeSet<_>>(),
        TARGETS.iter().copied().collect()
    );
}

/// No input that any target knows of makes another one break its word.
#[test]
fn seeds_of_the_other_formats_do_no_harm() {
    for (path, bytes) in [
        "car",
        "cbor",
        "client_frames",
        "commit",
        "frame",
        "identity",
    ]
    .into_iter()
    .flat_map(seeds)
    {
        println!("{}", path.display());
        targets::cbor::check(&bytes);
        targets::car::check(&bytes);
        targets::frame::check(&bytes);
        targets::commit::check(&bytes);
        targets::inversion::check(&bytes);
        targets::client_frames::check(&bytes);
        targets::identity::check(&bytes);
    }
}

#[test]
#[ignore = "writes into the source tree"]
fn write_seeds() {
    for target in TARGETS {
        for path in paths(&folder(target)) {
            let name = path.file_name().unwrap().to_string_lossy();
            if !name.starts_with("found-") {
                fs::remove_file(&path).unwrap();
            }
        }
    }
    for (source, frames) in [("pds", captured()), ("devnet", made())] {
        write_frames(source, &frames);
    }
    write_identities();
    for (name, bytes) in said_by_clients() {
        write("client_frames", name, &bytes);
    }
    for (name, bytes) in log_edits() {
        write("log", name, bytes);
    }
    for seed in 0..6_u64 {
        let mut rng = fastrand::Rng::with_seed(seed);
        let bytes: Vec<u8> = std::iter::repeat_with(|| rng.u8(..))
            .take(20 * (seed as usize + 2))
            .collect();
        write("tree", &format!("history-{seed}"), &bytes);
    }
}

fn write(target: &str, name: &str, bytes: &[u8]) {
    if bytes.len() <= LONGEST {
        fs::write(folder(target).join(name), bytes).unwrap();
    }
}

/// Short frames of real PDSes: the first few of every shape.
fn captured() -> Vec<Vec<u8>> {
    let data = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/real-pds");
    let files = [
        "pds1.frames",
        "pds2.frames",
        "edge/future-cursor.frames",
        "edge/outdated-cursor.frames",
    ];
    let mut frames = Vec::new();
    for file in files {
        let bytes = fs::read(data.join(file)).unwrap();
        let mut rest = &bytes[..];
        while let Some((length, behind)) = rest.split_first_chunk() {
            let (frame, behind) = behind.split_at(u32::from_be_bytes(*length) as usize);
            frames.push(frame.to_vec());
            rest = behind;
        }
    }
    few_of_each(frames)
}

/// Short frames of the load's generator, with every fault.
fn made() -> Vec<Vec<u8>> {
    let options = LoadOptions {
        hosts: 2,
        accounts: 6,
        events: 400,
        existing_records: 40,
        p256_share: 0.3,
        faults: FaultPlan {
            faults: Fault::ALL.to_vec(),
            share: 0.3,
            interruptions: 5,
        },
        ..LoadOptions::default()
    };
    let prepared = Prepared::new(options, &|_, _| {});
    few_of_each(prepared.frames().map(|frame| frame.to_vec()).collect())
}

/// Up to three short frames of every kind and number of ops.
fn few_of_each(mut frames: Vec<Vec<u8>>) -> Vec<Vec<u8>> {
    let mut seen = Vec::new();
    frames.retain(|frame| {
        let shape = match frame::decode(frame).map(|frame| frame.message) {
            Ok(Message::Commit(commit)) => {
                let actions: Vec<_> = commit.ops.iter().map(|op| op.action).collect();
                format!("{actions:?}")
            }
            Ok(message) => format!("{:?}", std::mem::discriminant(&message)),
            Err(error) => error.to_string(),
        };
        let known = seen.iter().filter(|known| **known == shape).count();
        seen.push(shape);
        frame.len() <= LONGEST && known < 3
    });
    frames.truncate(40);
    frames
}

fn write_frames(source: &str, frames: &[Vec<u8>]) {
    for (at, frame) in frames.iter().enumerate() {
        write("frame", &format!("{source}-{at}"), frame);
        let (cid, blocks) = match frame::decode(frame).map(|frame| frame.message) {
            Ok(Message::Commit(commit)) => {
                write("inversion", &format!("{source}-{at}"), frame);
                (Some(commit.commit), commit.blocks)
            }
            Ok(Message::Sync(sync)) => (None, sync.blocks),
            _ => continue,
        };
        let Ok(car) = Car::parse(blocks) else {
            continue;
        };
        if at % 3 == 0 {
            write("car", &format!("{source}-{at}"), blocks);
        }
        for (number, (block, bytes)) in car.blocks().iter().enumerate() {
            if Some(block) == cid.or(car.roots().first().copied()) {
                write("commit", &format!("{source}-{at}"), bytes);
            } else if at % 4 == 0 {
                write("cbor", &format!("{source}-{at}-{number}"), bytes);
            }
        }
    }
}

fn write_identities() {
    let data = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/real-pds");
    for style in ["diddocs", "diddocs-legacy"] {
        for name in ["alice", "ida", "mig"] {
            let json = fs::read(data.join(style).join(name).with_extension("json")).unwrap();
            write("identity", &format!("{style}-{name}"), &json);
        }
    }
    for name in ["alice", "ida", "mig"] {
        let path = data.join("plc").join(format!("{name}.audit.json"));
        let audit: Vec<serde_json::Value> =
            serde_json::from_slice(&fs::read(path).unwrap()).unwrap();
        for (at, entry) in audit.iter().enumerate() {
            let json = serde_json::to_vec(&entry["operation"]).unwrap();
            write("identity", &format!("operation-{name}-{at}"), &json);
        }
    }
    let names = [
        "did:plc:ewvi7nxzyoun6zhxrhs64oiz",
        "did:web:example.com%3A8080",
        "did:key:zQ3shokFTS3brHcDQrn82RUDfCZESWL1ZdCEJwekUDPQiYBme",
        "did:key:zDnaerDaTF5BXEavCrfRZEk316dpbLsfPDZ3WJ5hRTPFU2169",
        "at://did:plc:ewvi7nxzyoun6zhxrhs64oiz/app.bsky.feed.post/3jzfcijpj2z2a",
        "app.bsky.feed.post/3jzfcijpj2z2a",
        "alice.bsky.social",
        "3jzfcijpj2z2a",
    ];
    for (at, name) in names.iter().enumerate() {
        write("identity", &format!("name-{at}"), name.as_bytes());
    }
}

/// What clients say, behind the size of the pieces it comes in.
fn said_by_clients() -> Vec<(&'static str, Vec<u8>)> {
    let ping = b"\x89\x85\x12\x34\x56\x78\x7a\x51\x3a\x14\x7d";
    let close = b"\x88\x82\x12\x34\x56\x78\x11\xdc";
    let long = [&b"\x82\xfe\x01\x00\x12\x34\x56\x78"[..], &[7; 256]].concat();
    let fragments = b"\x01\x81\0\0\0\0a\x80\x81\0\0\0\0b";
    vec![
        ("ping", [&b"\x03"[..], ping].concat()),
        ("pong", b"\x02\x8a\x80\0\0\0\0".to_vec()),
        ("close", [&b"\x01"[..], close].concat()),
        ("long", [&b"\x64"[..], &long, ping].concat()),
        ("fragments", [&b"\x05"[..], fragments, ping, close].concat()),
        (
            "length-64",
            b"\x04\x82\xff\0\0\0\0\0\x01\0\0\0\0\0\0x".to_vec(),
        ),
        ("not-masked", b"\x02\x82\x05hello".to_vec()),
        ("http", b"\x10GET / HTTP/1.1\r\n\r\n".to_vec()),
    ]
}

/// Edits of a log's files: what, which file, where (two bytes), how much, and what is written.
fn log_edits() -> Vec<(&'static str, &'static [u8])> {
    vec![
        ("untouched", b""),
        ("torn-frames", b"\x00\x05\x00\x02\x00"),
        ("torn-index", b"\x00\x04\x90\x01\x00"),
        (
            "reserved-space",
            b"\x01\x05\x00\x10\x00\x01\x04\x00\x10\x00",
        ),
        ("zeroed-sector", b"\x02\x05\x00\x02\xff\x02\x05\xff\x02\xff"),
        ("flipped-bit", b"\x03\x05\x20\x00\x01"),
        ("flipped-entry", b"\x03\x04\x80\x00\x01"),
        ("overwritten", b"\x04\x05\x40\x00\x08overturn"),
        ("index-gone", b"\x05\x04\x00\x00\x00"),
        ("frames-gone", b"\x05\x05\x00\x00\x00"),
        ("old-index-gone", b"\x05\x00\x00\x00\x00"),
        ("old-frames-torn", b"\x00\x01\x00\x04\x00"),
        ("copied", b"\x36\x01\x00\x00\xff"),
        (
            "forged-length",
            b"\x04\x04\xa8\x00\x04\xff\xff\xff\x7f\x07\x04\x00\x00\x02",
        ),
        (
            "forged-offset",
            b"\x04\x04\x88\x00\x08\xff\xff\xff\xff\xff\xff\xff\xff\x07\x04\x00\x00\x02",
        ),
        ("renamed", b"\x08\x05\x00\x00\x09\x08\x04\x00\x00\x09"),
        ("renamed-far", b"\x08\x05\x00\x00\x03"),
        ("mark-torn", b"\x00\x06\x04\x00\x00"),
        ("mark-damaged", b"\x03\x06\x00\x00\xff"),
        (
            "mark-and-tail-gone",
            b"\x05\x06\x00\x00\x00\x00\x05\x00\x02\x00",
        ),
        (
            "last-segment-gone",
            b"\x05\x05\x00\x00\x00\x05\x04\x00\x00\x00",
        ),
        ("redactions", b"\x04\x07\x00\x00\x0fredacted it all"),
        ("redactions-damaged", b"\x04\x07\x00\x00\x02\xff\xfe"),
        ("account-index-gone", b"\x05\x08\x00\x00\x00"),
        ("account-index-torn", b"\x00\x08\x30\x00\x00"),
        ("account-index-damaged", b"\x03\x09\x20\x00\x40"),
    ]
}
