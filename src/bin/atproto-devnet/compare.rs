//! `atproto-devnet compare`: whether a consumer has made of the firehose what the PDSes have.

use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use atproto_relay::devnet::follower::{AccountSnapshot, differences};
use clap::Args;

/// Pause between two comparisons: events may still be on their way.
const AGAIN: Duration = Duration::from_millis(200);
/// Longest a server may take to answer.
const ANSWER: Duration = Duration::from_secs(30);
/// Most differences that are printed.
const MAX_PRINTED: usize = 10;

/// Options of `compare`.
#[derive(Debug, Args)]
pub struct Options {
    /// Base URL of the consumer.
    #[arg(long, value_name = "URL")]
    consumer: String,
    /// Base URL of a PDS; all of the network have to be named.
    #[arg(long = "pds", value_name = "URL", required = true)]
    pds: Vec<String>,
    /// Active accounts there have to be at least, so that nothing is not taken for agreement.
    #[arg(long, default_value_t = 1, value_name = "N")]
    accounts: usize,
    /// How long to wait until both sides agree, in seconds.
    #[arg(long, default_value_t = 30, value_name = "SECONDS")]
    within: u64,
}

/// Compares until both sides agree, or the time is over.
pub async fn run(options: Options) -> anyhow::Result<()> {
    let deadline = Instant::now() + Duration::from_secs(options.within);
    loop {
        let mut at_pdses = Vec::new();
        for pds in &options.pds {
            at_pdses.extend(held(&format!("{pds}/devnet/repositories")).await?);
        }
        let at_consumer = held(&format!("{}/accounts", options.consumer)).await?;
        let active = at_pdses.iter().filter(|held| held.active).count();
        let records: usize = at_pdses.iter().map(|held| held.records.len()).sum();
        let differ = differences(at_pdses, &at_consumer);
        if differ.is_empty() && active >= options.accounts {
            println!("{active} active accounts and {records} records are the same on both sides");
            return Ok(());
        }
        if Instant::now() > deadline {
            for difference in differ.iter().take(MAX_PRINTED) {
                eprintln!("{difference}");
            }
            let count = differ.len();
            bail!("{count} differences among {active} active accounts");
        }
        tokio::time::sleep(AGAIN).await;
    }
}

async fn held(url: &str) -> anyhow::Result<Vec<AccountSnapshot>> {
    let answer = atproto_relay::dial::plain_client()
        .get(url)
        .timeout(ANSWER)
        .send();
    let answer = answer.await.and_then(reqwest::Response::error_for_status);
    let held = answer.with_context(|| format!("asking {url}"))?.json();
    held.await
        .with_context(|| format!("reading the answer of {url}"))
}
