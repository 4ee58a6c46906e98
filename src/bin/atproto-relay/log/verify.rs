//! `log verify`: every entry and every frame of a log, checked against each other.

use std::io::{self, Write};

use clap::Args;
use serde_json::{Value, json};

use atproto_relay::eventlog::{Audit, Flaw};

use super::super::failure::Failure;
use super::super::output::{counted, printable};
use super::{FolderArgs, size, with_progress};

pub const EXAMPLES: &str = "\
Examples:
  atproto-relay log verify --data-dir /var/lib/atproto-relay
  atproto-relay log verify --json | jq 'select(.problem)'

One line for each problem: file, sequence number, offset, and what is wrong; the last line has the figures. Events that \
are marked as lost are counted, and are no problem. The exit code is 1 where there is a problem.";

#[derive(Args)]
pub struct VerifyArgs {
    #[command(flatten)]
    folder: FolderArgs,
    /// Print JSON: an object a line for each problem, then one with the figures
    #[arg(long)]
    json: bool,
}

pub fn run(args: &VerifyArgs) -> Result<(), Failure> {
    let folder = args.folder.open()?;
    let mut written = Ok(());
    let audit = with_progress("checking segments", folder.segments(), |progress| {
        let mut print = |flaw: Flaw| {
            let line = match args.json {
                true => flaw_json(&flaw).to_string(),
                false => printable(&flaw.to_string()),
            };
            let result = writeln!(io::stdout(), "{line}");
            written = std::mem::replace(&mut written, Ok(())).and(result);
        };
        folder.audit(&mut print, &mut || progress.step())
    })?;
    written?;
    let figures = match args.json {
        true => audit_json(&audit).to_string(),
        false => summary(&audit),
    };
    writeln!(io::stdout(), "{figures}")?;
    match audit.flaws {
        0 => Ok(()),
        flaws => Err(Failure::Failed(format!(
            "{}; `atproto-relay log repair` repairs what can be repaired",
            counted(flaws, "problem", "problems")
        ))),
    }
}

fn flaw_json(flaw: &Flaw) -> Value {
    json!({
        "file": flaw.file.display().to_string(),
        "seq": flaw.seq,
        "offset": flaw.offset,
        "problem": flaw.what.to_string(),
    })
}

fn audit_json(audit: &Audit) -> Value {
    json!({
        "segments": audit.segments,
        "events": audit.events,
        "frameBytes": audit.frame_bytes,
        "redacted": audit.redacted,
        "damaged": audit.damaged,
        "tailBytes": audit.tail_bytes,
        "problems": audit.flaws,
    })
}

fn summary(audit: &Audit) -> String {
    let mut text = format!(
        "{}, {}, {} of frames checked",
        counted(audit.segments, "segment", "segments"),
        counted(audit.events, "event", "events"),
        size(audit.frame_bytes)
    );
    for (count, one, many) in [
        (audit.redacted, "event redacted", "events redacted"),
        (
            audit.damaged,
            "event marked as lost",
            "events marked as lost",
        ),
        (
            audit.tail_bytes,
            "byte behind the last event, which the next start cuts",
            "bytes behind the last event, which the next start cuts",
        ),
    ] {
        if count > 0 {
            text.push_str(&format!("; {}", counted(count, one, many)));
        }
    }
    text
}
