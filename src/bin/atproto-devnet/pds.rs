//! `atproto-devnet pds`: a PDS alone, with a PLC directory elsewhere, for a network of several
//! machines. What it shall do comes over HTTP: the XRPC methods of accounts and records, and
//! `/devnet/traffic`, `/devnet/migrateAccount`, `/devnet/takedown`, `/devnet/requestCrawl`.

use anyhow::Context;
use atproto_relay::devnet::directory::Directory;
use atproto_relay::devnet::keys::Curve;
use atproto_relay::devnet::network::NetworkOptions;
use atproto_relay::devnet::pds::{Pds, PdsOptions};
use clap::Args;

use crate::place::PlaceArgs;

/// Options of `pds`.
#[derive(Debug, Args)]
pub struct Options {
    #[command(flatten)]
    place: PlaceArgs,
    /// Base URL of the PLC directory.
    #[arg(long, value_name = "URL")]
    plc: String,
    /// Handles are made under this domain.
    #[arg(long, value_name = "DOMAIN", default_value = "pds.test")]
    domain: String,
    /// Seed of keys, passwords and tokens; another one for each PDS of a network.
    #[arg(long, default_value_t = 0, value_name = "NUMBER")]
    seed: u64,
}

/// Serves until Ctrl-C.
pub async fn run(options: Options) -> anyhow::Result<()> {
    let defaults = NetworkOptions::default();
    let directory = Directory::Remote(options.plc.trim_end_matches('/').to_owned());
    let pds = PdsOptions {
        domain: options.domain,
        seed: options.seed,
        clock_id: u16::try_from(options.seed % 1_024).unwrap_or_default(),
        backfill: defaults.backfill,
        backfill_bytes: defaults.backfill_bytes,
        rotation_curve: Curve::K256,
    };
    let pds = Pds::start(directory, pds, options.place.place())
        .await
        .context("the PDS cannot listen there")?;
    println!("{}", pds.url());
    tokio::signal::ctrl_c().await.context("waiting for Ctrl-C")
}
