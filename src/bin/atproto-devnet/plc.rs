//! `atproto-devnet plc`: a PLC directory alone, for a network of several machines.

use anyhow::Context;
use atproto_relay::devnet::plc::Plc;
use clap::Args;

use crate::place::PlaceArgs;

/// Options of `plc`.
#[derive(Debug, Args)]
pub struct Options {
    #[command(flatten)]
    place: PlaceArgs,
}

/// Serves until Ctrl-C.
pub async fn run(options: Options) -> anyhow::Result<()> {
    let plc = Plc::start_at(options.place.place())
        .await
        .context("the directory cannot listen there")?;
    println!("{}", plc.url());
    tokio::signal::ctrl_c().await.context("waiting for Ctrl-C")
}
