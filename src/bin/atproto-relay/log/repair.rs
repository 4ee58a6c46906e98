//! `log repair`: a log that is not whole is made so, as far as its bytes allow.

use clap::Args;

use atproto_relay::eventlog::{self, Repair, Repaired};

use super::super::failure::Failure;
use super::super::output::{printable, write_all};
use super::{FolderArgs, with_progress};

pub const EXAMPLES: &str = "\
Examples:
  atproto-relay log repair --dry-run --data-dir /var/lib/atproto-relay
  atproto-relay log repair --data-dir /var/lib/atproto-relay

A relay repairs its log by itself when it starts, but looks at the last segment only. Sequence numbers of lost events
stay taken; consumers get the events around them. Entries that are rebuilt from frames have lost host and upstream
sequence number.";

#[derive(Args)]
pub struct RepairArgs {
    #[command(flatten)]
    folder: FolderArgs,
    /// Only say what would be done
    #[arg(long)]
    dry_run: bool,
}

pub fn run(args: &RepairArgs) -> Result<(), Failure> {
    let folder = args.folder.open()?;
    let repaired = with_progress("checking segments", folder.segments(), |progress| {
        eventlog::repair(folder.dir(), args.dry_run, &mut || progress.step())
    })?
    .map_err(Failure::failed)?;
    write_all(text(&repaired, args.dry_run).as_bytes())?;
    Ok(())
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
        "{} segments, {} events: {outcome}",
        repaired.segments, repaired.events
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
        parts.push(format!(
            "rebuild {} entries from their frames",
            index.rebuilt
        ));
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
        parts.push(format!(
            "cut {} entries that were never written whole",
            index.cut
        ));
    }
    if repair.cut_bytes > 0 {
        parts.push(format!(
            "cut {} bytes behind the last event",
            repair.cut_bytes
        ));
    }
    if repair.accounts {
        parts.push("remove the account index, which is not that of its events".to_owned());
    }
    let did = if dry_run { "would" } else { "did" };
    format!("{}: {did} {}", repair.segment.display(), parts.join(", "))
}
