//! The command line of the devnet: one file for each command, nothing else here.

mod compare;
mod consumer;
mod demo;
mod load;
mod pds;
mod place;
mod plc;
mod replay;
mod up;

use clap::{Parser, Subcommand};

/// A whole AT Protocol network in one process, for tests and demonstrations. Never for real accounts.
#[derive(Debug, Parser)]
#[command(name = "atproto-devnet", version, arg_required_else_help = true)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Start a PLC directory and PDSes, print their URLs as JSON, run until Ctrl-C.
    Up(up::Options),
    /// Show a network at work: PLC directory, PDSes with traffic, and a relay. Needs nothing.
    Demo(demo::Options),
    /// Serve a captured frames file as hosts, with the PLC documents of its time.
    Replay(replay::Options),
    /// Serve a PLC directory alone, for a network of several machines.
    Plc(plc::Options),
    /// Serve a PDS alone, for a network of several machines.
    Pds(pds::Options),
    /// Follow a relay, and answer over HTTP what came out.
    Consumer(consumer::Options),
    /// Compare what a consumer has with what the PDSes have; exit code 1 where they differ.
    Compare(compare::Options),
    /// Measure a relay under the load of many hosts and accounts, and check what comes out.
    Load(load::Options),
}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let command = Cli::parse().command;
    // The demo reads its own log.
    if !matches!(command, Command::Demo(_)) {
        tracing_subscriber::fmt()
            .with_env_filter(tracing_subscriber::EnvFilter::from_default_env())
            .with_writer(std::io::stderr)
            .init();
    }
    match command {
        Command::Up(options) => up::run(options).await,
        Command::Demo(options) => demo::run(options).await,
        Command::Replay(options) => replay::run(options).await,
        Command::Plc(options) => plc::run(options).await,
        Command::Pds(options) => pds::run(options).await,
        Command::Consumer(options) => consumer::run(options).await,
        Command::Compare(options) => compare::run(options).await,
        Command::Load(options) => load::run(options).await,
    }
}
