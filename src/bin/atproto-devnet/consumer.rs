//! `atproto-devnet consumer`: follows a relay and answers over HTTP what it saw: `/report` says how
//! the connection fared, `/accounts` is what `atproto-devnet compare` compares.

use anyhow::Context;
use atproto_relay::devnet::follower::{Follower, FollowerOptions};
use clap::Args;

use crate::place::PlaceArgs;

/// Options of `consumer`.
#[derive(Debug, Args)]
pub struct Options {
    #[command(flatten)]
    place: PlaceArgs,
    /// The relay, as ws://host:port.
    #[arg(long, value_name = "URL")]
    relay: String,
    /// Where to start in its log; without it, with the next event.
    #[arg(long, value_name = "SEQ")]
    cursor: Option<i64>,
}

/// Follows until Ctrl-C.
pub async fn run(options: Options) -> anyhow::Result<()> {
    let follower = FollowerOptions {
        relay: options.relay.trim_end_matches('/').to_owned(),
        cursor: options.cursor,
        place: options.place.place(),
    };
    let follower = Follower::start(follower)
        .await
        .context("the consumer cannot listen there")?;
    println!("{}", follower.url());
    tokio::signal::ctrl_c().await.context("waiting for Ctrl-C")
}
