//! `log info`: what a log holds, in figures. Reads the index and no frames.

use clap::Args;
use serde_json::{Map, Value, json};

use atproto_relay::atproto::datetime::format_utc;
use atproto_relay::atproto::frame::Kind;
use atproto_relay::eventlog::{Folder, Summary};

use super::super::failure::Failure;
use super::super::output::{counted, write_all};
use super::{FolderArgs, size};

pub const EXAMPLES: &str = "\
Examples:
  atproto-relay log info --data-dir /var/lib/atproto-relay
  atproto-relay log info --config relay.toml --json | jq .events";

#[derive(Args)]
pub struct InfoArgs {
    #[command(flatten)]
    folder: FolderArgs,
    /// Print a JSON object
    #[arg(long)]
    json: bool,
}

pub fn run(args: &InfoArgs) -> Result<(), Failure> {
    let folder = args.folder.open()?;
    let summary = folder.summary().map_err(Failure::failed)?;
    let text = if args.json {
        format!("{}\n", as_json(&folder, &summary))
    } else {
        text(&folder, &summary)
    };
    Ok(write_all(text.as_bytes())?)
}

fn text(folder: &Folder, summary: &Summary) -> String {
    let window = match (summary.window, summary.times_us) {
        (Some((first, last)), Some((began, ended))) => format!(
            "{first} to {last}, {} to {}",
            format_utc(began),
            format_utc(ended)
        ),
        (Some((first, last)), None) => format!("{first} to {last}"),
        (None, _) => "empty".to_owned(),
    };
    let kinds: Vec<String> = Kind::ALL
        .iter()
        .zip(summary.kinds)
        .map(|(kind, count)| format!("{count} {}", kind.as_str()))
        .collect();
    let lines = [
        ("folder", folder.dir().display().to_string()),
        ("window", window),
        ("segments", summary.segments.to_string()),
        (
            "on disk",
            format!(
                "{} allocated; {} of frames, {} of index",
                size(summary.allocated_bytes),
                size(summary.frame_bytes),
                size(summary.index_bytes)
            ),
        ),
        (
            "events",
            format!("{}: {}", summary.events, kinds.join(", ")),
        ),
        (
            "redacted",
            format!(
                "{}; {} pending",
                summary.redacted,
                counted(summary.redactions_pending, "redaction", "redactions")
            ),
        ),
        ("damaged", summary.damaged.to_string()),
        (
            "per event",
            counted(summary.bytes_per_event(), "byte", "bytes"),
        ),
    ];
    let lines = lines.map(|(name, value)| format!("{name:<10} {value}\n"));
    lines.concat()
}

fn as_json(folder: &Folder, summary: &Summary) -> Value {
    let kinds: Map<String, Value> = Kind::ALL
        .iter()
        .zip(summary.kinds)
        .map(|(kind, count)| (kind.as_str().to_owned(), count.into()))
        .collect();
    json!({
        "folder": folder.dir().display().to_string(),
        "firstSeq": summary.window.map(|(first, _)| first),
        "lastSeq": summary.window.map(|(_, last)| last),
        "firstTime": summary.times_us.map(|(began, _)| format_utc(began)),
        "lastTime": summary.times_us.map(|(_, ended)| format_utc(ended)),
        "segments": summary.segments,
        "allocatedBytes": summary.allocated_bytes,
        "frameBytes": summary.frame_bytes,
        "indexBytes": summary.index_bytes,
        "events": summary.events,
        "kinds": kinds,
        "redacted": summary.redacted,
        "redactionsPending": summary.redactions_pending,
        "damaged": summary.damaged,
        "bytesPerEvent": summary.bytes_per_event(),
    })
}
