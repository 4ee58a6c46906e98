//! `log repair`: makes a damaged log whole, as far as its bytes allow.

use std::path::{Path, PathBuf};

use clap::Args;
use serde_json::{Value, json};

use atproto_relay::eventlog::{self, Repair, Repaired};

use super::super::failure::Failure;
use super::super::output::{counted, printable, write_all};
use super::{FolderArgs, with_progress};

pub const EXAMPLES: &str = "\
Examples:
  atproto-relay log repair --dry-run --data-dir /var/lib/atproto-relay
  atproto-relay log repair --data-dir /var/lib/atproto-relay

A relay repairs the last segment of its log by itself when it starts; this command looks at all of them. Sequence \
numbers of lost events stay taken; consumers get the events around them. Entries that are rebuilt from frames lose their \
host and their upstream sequence number.";

#[derive(Args)]
pub struct RepairArgs {
    #[command(flatten)]
    folder: FolderArgs,
    /// Only show what would be done
    #[arg(long)]
    dry_run: bool,
    /// Print a JSON object
    #[arg(long)]
    json: bool,
}

pub fn run(args: &RepairArgs) -> Result<(), Failure> {
    let folder = args.folder.open()?;
    let repaired = with_progress("checking segments", folder.segments(), |progress| {
        eventlog::repair(folder.dir(), args.dry_run, &mut || progress.step())
    })?
    .map_err(Failure::failed)?;
    let text = match args.json {
        true => format!("{}\n", as_json(&repaired, args.dry_run)),
        false => text(&repaired, args.dry_run),
    };
    write_all(text.as_bytes())?;
    Ok(())
}

fn as_json(repaired: &Repaired, dry_run: bool) -> Value {
    let paths =
        |paths: &[PathBuf]| -> Vec<String> { paths.iter().map(|path| shown(path)).collect() };
    let repair = |repair: &Repair| {
        json!({
            "segment": shown(&repair.segment),
            "header": repair.index.header,
            "rebuilt": repair.index.rebuilt,
            "lost": repair.index.damaged,
            "cutEntries": repair.index.cut,
            "cutBytes": repair.cut_bytes,
            "accountIndex": repair.accounts,
        })
    };
    json!({
        "dryRun": dry_run,
        "segments": repaired.segments,
        "events": repaired.events,
        "repairs": repaired.repairs.iter().map(repair).collect::<Vec<_>>(),
        "leftovers": paths(&repaired.leftovers),
        "unused": paths(&repaired.unused),
    })
}

fn shown(path: &Path) -> String {
    path.display().to_string()
}

fn text(repaired: &Repaired, dry_run: bool) -> String {
    let mut lines = Vec::new();
    for path in &repaired.leftovers {
        let did = if dry_run { "would remove" } else { "removed" };
        lines.push(format!("{}: {did}: retention left it", path.display()));
    }
    for repair in &repaired.repairs {
        lines.push(describe(repair, dry_run));
    }
    for path in &repaired.unused {
        lines.push(format!(
            "{}: left as it is: too many events behind it are lost, so the window begins later",
            path.display()
        ));
    }
    let outcome = match (lines.is_empty(), dry_run) {
        (true, _) => "nothing to repair",
        (false, true) => "nothing was changed",
        (false, false) => "repaired",
    };
    lines.push(format!(
        "{}, {}: {outcome}",
        counted(repaired.segments, "segment", "segments"),
        counted(repaired.events, "event", "events")
    ));
    lines.iter().map(|line| printable(line) + "\n").collect()
}

fn describe(repair: &Repair, dry_run: bool) -> String {
    let index = &repair.index;
    let mut parts = Vec::new();
    if index.header {
        parts.push("write the header of the index".to_owned());
    }
    if index.rebuilt > 0 {
        parts.push(match index.rebuilt {
            1 => "rebuild 1 entry from its frame".to_owned(),
            rebuilt => format!("rebuild {rebuilt} entries from their frames"),
        });
    }
    if let (Some(first), Some(last)) = (index.damaged.first(), index.damaged.last()) {
        let count = index.damaged.len();
        parts.push(if first == last {
            format!("mark event {first} as lost")
        } else {
            format!("mark {count} events between {first} and {last} as lost")
        });
    }
    if index.cut > 0 {
        parts.push(match index.cut {
            1 => "cut 1 entry that was never written whole".to_owned(),
            cut => format!("cut {cut} entries that were never written whole"),
        });
    }
    if repair.cut_bytes > 0 {
        parts.push(format!(
            "cut {} behind the last event",
            counted(repair.cut_bytes, "byte", "bytes")
        ));
    }
    if repair.accounts {
        parts.push("remove the account index, which is not that of its events".to_owned());
    }
    let did = if dry_run { "would" } else { "did" };
    format!("{}: {did} {}", repair.segment.display(), parts.join(", "))
}
