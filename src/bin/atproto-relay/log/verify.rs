//! `log verify`: every entry and every frame of a log, held against each other.

use std::io::{self, Write};

use clap::Args;

use atproto_relay::eventlog::Audit;

use super::super::failure::Failure;
use super::super::output::printable;
use super::{FolderArgs, size, with_progress};

pub const EXAMPLES: &str = "\
Examples:
  atproto-relay log verify --data-dir /var/lib/atproto-relay

One line for each problem: file, sequence number, offset, and what is wrong. Events that are marked as lost are
counted, but no problem.";

#[derive(Args)]
pub struct VerifyArgs {
    #[command(flatten)]
    folder: FolderArgs,
}

pub fn run(args: &VerifyArgs) -> Result<(), Failure> {
    let folder = args.folder.open()?;
    let mut written = Ok(());
    let audit = with_progress("checking segments", folder.segments(), |progress| {
        let mut print = |flaw| {
            let line = printable(&format!("{flaw}"));
            let result = writeln!(io::stdout(), "{line}");
            written = std::mem::replace(&mut written, Ok(())).and(result);
        };
        folder.audit(&mut print, &mut || progress.step())
    })?;
    written?;
    writeln!(io::stdout(), "{}", summary(&audit))?;
    match audit.flaws {
        0 => Ok(()),
        1 => Err(Failure::failed(
            "1 problem; `atproto-relay log repair` mends what can be mended",
        )),
        flaws => Err(Failure::Failed(format!(
            "{flaws} problems; `atproto-relay log repair` mends what can be mended"
        ))),
    }
}

fn summary(audit: &Audit) -> String {
    let mut text = format!(
        "{} segments, {} events, {} of frames checked",
        audit.segments,
        audit.events,
        size(audit.frame_bytes)
    );
    for (count, what) in [
        (audit.redacted, "events redacted"),
        (audit.damaged, "events marked as lost"),
        (
            audit.tail_bytes,
            "bytes behind the last event, which the next start cuts",
        ),
    ] {
        if count > 0 {
            text.push_str(&format!("; {count} {what}"));
        }
    }
    text
}
