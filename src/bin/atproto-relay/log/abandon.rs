//! `log abandon`: lets a relay whose event log is lost go on. Removes nothing: it works on an empty log only.

use clap::Args;
use serde_json::json;

use atproto_relay::config::Loaded;
use atproto_relay::relay::abandon_log;

use crate::config_args::{FewArgs, Stored};
use crate::failure::Failure;
use crate::output::write_all;

pub const LONG_ABOUT: &str = "\
Lets a relay go on whose event log is lost for good, while its database is there. `serve` refuses to start then: \
the data folder can be the wrong one, and the sequence numbers of the lost events must not be used again.

With the settings of `serve`, and while the relay is down, this begins an empty log above every sequence number that \
the database knows, half a million further on for those that it had not seen. The replay window starts anew; consumers \
that come back get an #info OutdatedCursor. Hosts go on from their cursors.";

pub const EXAMPLES: &str = "\
Examples:
  atproto-relay log abandon --config /etc/atproto-relay/config.toml";

#[derive(Args)]
pub struct AbandonArgs {
    /// Print a JSON object
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    settings: FewArgs<Stored>,
}

pub fn run(args: &AbandonArgs) -> Result<(), Failure> {
    let Loaded {
        config, warnings, ..
    } = args.settings.config.load()?;
    for warning in warnings {
        eprintln!("warning: {warning}");
    }
    let next = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|error| Failure::Failed(format!("cannot start the runtime: {error}")))?
        .block_on(abandon_log(&config))
        .map_err(Failure::failed)?;
    let text = match args.json {
        true => json!({ "nextSeq": next }).to_string(),
        false => format!("the event log begins again at seq {next}; start the relay"),
    };
    write_all(format!("{text}\n").as_bytes())?;
    Ok(())
}
