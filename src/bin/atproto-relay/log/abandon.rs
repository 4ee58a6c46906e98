//! `log abandon`: lets a relay whose event log is lost go on. Removes nothing: it works on an empty log only.

use atproto_relay::config::Loaded;
use atproto_relay::relay::abandon_log;

use crate::config_args::ConfigArgs;
use crate::failure::Failure;

pub const LONG_ABOUT: &str = "\
Lets a relay go on whose event log is lost for good, while its database is there. `serve` refuses that: \
it may be the wrong folder, and the numbers of the lost events must not be given to others.

With the settings of `serve`, and while the relay is down, this begins an empty log above every number that \
the database knows to be given out, half a million further on for those that it had not seen. The replay window \
starts anew; consumers that come back are told so by #info OutdatedCursor. Hosts go on from their cursors.";

pub fn run(args: &ConfigArgs) -> Result<(), Failure> {
    let Loaded { config, .. } = args.load()?;
    let next = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|error| Failure::Failed(format!("cannot start the runtime: {error}")))?
        .block_on(abandon_log(&config))
        .map_err(Failure::failed)?;
    println!("the event log begins again at seq {next}; start the relay");
    Ok(())
}
