//! `atproto-devnet up`: a network that stands until Ctrl-C. Makes accounts if asked to, no traffic.

use anyhow::Context;
use atproto_relay::devnet::network::{Network, NetworkOptions};
use clap::Args;
use serde_json::{Value, json};

/// Options of `up`.
#[derive(Debug, Args)]
pub struct Options {
    /// Number of PDSes, each on a free port of 127.0.0.1.
    #[arg(long, default_value_t = 3, value_name = "N", value_parser = clap::value_parser!(u16).range(1..))]
    pds: u16,
    /// Base URL of a relay that every PDS asks to crawl it; may be given more than once.
    #[arg(long = "relay", value_name = "URL")]
    relays: Vec<String>,
    /// Accounts to create on each PDS; their passwords and bearer tokens are printed.
    #[arg(long, default_value_t = 0, value_name = "N")]
    accounts: usize,
    /// Seed of keys, passwords and tokens.
    #[arg(long, default_value_t = 0, value_name = "NUMBER")]
    seed: u64,
}

/// Starts the network, prints what it is, and waits for Ctrl-C.
pub async fn run(options: Options) -> anyhow::Result<()> {
    let network_options = NetworkOptions {
        pds: options.pds.into(),
        relays: options.relays,
        seed: options.seed,
        ..NetworkOptions::default()
    };
    let network = Network::start(network_options)
        .await
        .context("the devnet cannot listen on 127.0.0.1")?;
    let mut description = network.describe();
    description["accounts"] = Value::Array(accounts(&network, options.accounts)?);
    println!("{}", serde_json::to_string_pretty(&description)?);
    tokio::signal::ctrl_c().await.context("waiting for Ctrl-C")
}

fn accounts(network: &Network, per_pds: usize) -> anyhow::Result<Vec<Value>> {
    let mut accounts = Vec::new();
    for pds in network.all_pds() {
        for number in 1..=per_pds {
            let account = pds.create_account(&format!("user{number}.{}", pds.domain()))?;
            accounts.push(json!({
                "did": account.did.as_str(),
                "handle": account.handle,
                "password": account.password,
                "accessJwt": account.access_token,
                "pds": pds.url(),
            }));
        }
    }
    Ok(accounts)
}
