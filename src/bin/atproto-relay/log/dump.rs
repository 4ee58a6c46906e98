//! `log dump`: the events of a log, as lines of JSON or as the frames that consumers get.

use std::collections::HashMap;
use std::io::{self, BufWriter, Write};

use clap::Args;
use serde_json::{Value, json};

use atproto_relay::atproto::datetime::format_utc;
use atproto_relay::atproto::did::Did;
use atproto_relay::eventlog::{Event, Origin};
use atproto_relay::hosts::roster::{self, Name};
use atproto_relay::store::HostId;

use super::super::failure::Failure;
use super::FolderArgs;

pub const EXAMPLES: &str = "\
Examples:
  atproto-relay log dump --from 1000 --limit 20
  atproto-relay log dump --did did:plc:ewvi7nxzyoun6zhxrhs64oiz | jq .seq
  atproto-relay log dump --raw --from 4711 --to 4711 > frame.bin

A line is a JSON object with seq, time, host (its number in the database), hostname, upstreamSeq, did, kind, length and \
state: served, redacted or damaged. What is lost is null. With --raw, the WebSocket frames of the events that are served, \
one after the other.";

/// Bytes gathered for one write.
const BUFFER_BYTES: usize = 1 << 20;

#[derive(Args)]
pub struct DumpArgs {
    #[command(flatten)]
    folder: FolderArgs,
    /// First sequence number
    #[arg(long, value_name = "SEQ", default_value_t = 1)]
    from: u64,
    /// Last sequence number
    #[arg(long, value_name = "SEQ", default_value_t = u64::MAX, hide_default_value = true)]
    to: u64,
    /// End after this many events
    #[arg(long, value_name = "COUNT")]
    limit: Option<u64>,
    /// Only events of this account
    #[arg(long, value_name = "DID", value_parser = account)]
    did: Option<Did>,
    /// Write frames instead of lines
    #[arg(long)]
    raw: bool,
}

fn account(text: &str) -> Result<Did, String> {
    Did::normalized(text).map_err(|error| error.to_string())
}

pub fn run(args: &DumpArgs) -> Result<(), Failure> {
    let folder = args.folder.open()?;
    let names = roster::read(folder.dir()).map_err(|error| {
        let folder = folder.dir().display();
        Failure::Failed(format!(
            "cannot read the names of hosts in {folder}: {error}"
        ))
    })?;
    let mut out = BufWriter::with_capacity(BUFFER_BYTES, io::stdout().lock());
    let wanted = args.did.as_ref().map(|did| (did, did.hash64()));
    let mut left = args.limit.unwrap_or(u64::MAX);
    for event in folder.events(args.from) {
        let event = event.map_err(Failure::failed)?;
        if event.seq > args.to || left == 0 {
            break;
        }
        let did = event.did();
        let is_wanted = wanted.is_none_or(|(wanted, hash)| {
            let same_hash = event.entry.is_some_and(|entry| entry.did_hash == hash);
            same_hash && did.as_ref().is_none_or(|did| did == wanted)
        });
        if !is_wanted {
            continue;
        }
        match (&event.frame, args.raw) {
            (Some(frame), true) => out.write_all(frame)?,
            (None, true) => continue,
            (_, false) => writeln!(out, "{}", line(&event, did.as_ref(), &names))?,
        }
        left -= 1;
    }
    Ok(out.flush()?)
}

fn line(event: &Event, did: Option<&Did>, names: &HashMap<HostId, Name>) -> Value {
    let origin = event.entry.map(|entry| entry.origin);
    let host = origin.and_then(Origin::host);
    let name = host.and_then(|host| names.get(&HostId(host)));
    json!({
        "seq": event.seq,
        "time": event.entry.map(|entry| format_utc(entry.time_us)),
        "host": host,
        "hostname": name.map(|name| &name.hostname),
        "upstreamSeq": origin.and_then(Origin::upstream_seq),
        "did": did.map(ToString::to_string),
        "kind": event.entry.map(|entry| entry.kind.as_str()),
        "length": event.frame_bytes(),
        "state": event.fate.as_str(),
    })
}
