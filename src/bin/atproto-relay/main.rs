//! The command line of the relay: one file for each command. What a command does is in the library;
//! here are its flags, its words, and its exit codes.

mod check_config;
mod completions;
mod config_args;
mod failure;
mod firehose;
mod hosts;
mod log;
mod man;
mod output;
mod progress;
mod serve;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

use config_args::ConfigArgs;

const ABOUT: &str = "A relay for the AT Protocol: subscribes to every PDS, verifies every event, emits one firehose";

const LONG_ABOUT: &str = "\
A relay for the AT Protocol. It subscribes to every PDS it knows, verifies every event, and emits \
one firehose with its own sequence numbers and a window of replay.";

const EXAMPLES: &str = "\
Examples:
  Subscribe to one PDS, and watch what comes out:
    atproto-relay serve --host pds.example.com
    atproto-relay firehose localhost:2470

  Take over the hosts of another relay, then run:
    atproto-relay hosts pull https://relay1.us-east.bsky.network --add --data-dir data
    atproto-relay serve

  Look at any relay or PDS, and check every signature and every proof:
    atproto-relay firehose bsky.network --verify

  See what a configuration comes to, and where each value is from:
    atproto-relay check-config --config relay.toml

Exit codes: 0 done; 1 it failed; 2 the command line or the configuration is wrong.";

#[derive(Parser)]
#[command(name = "atproto-relay", version, about = ABOUT, long_about = LONG_ABOUT, after_help = EXAMPLES)]
#[command(max_term_width = 110)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Run the relay
    #[command(long_about = serve::LONG_ABOUT, after_help = serve::SHORT_EXAMPLES, after_long_help = serve::EXAMPLES)]
    Serve(ConfigArgs),
    /// Read the configuration as `serve` would, and show what it comes to
    #[command(long_about = check_config::LONG_ABOUT)]
    CheckConfig(ConfigArgs),
    /// Read the firehose of any relay or PDS, one line for each event
    #[command(after_help = firehose::EXAMPLES)]
    Firehose(firehose::FirehoseArgs),
    /// Work with lists of hosts
    #[command(subcommand)]
    Hosts(hosts::HostsCommand),
    /// Look into the event log of a data folder, check it, mend it
    #[command(subcommand, long_about = log::LONG_ABOUT)]
    Log(log::LogCommand),
    /// Print the completions of a shell
    #[command(after_help = completions::EXAMPLES)]
    Completions(completions::CompletionsArgs),
    /// Print the man page, or write those of all commands into a folder
    #[command(after_help = man::EXAMPLES)]
    Man(man::ManArgs),
}

fn main() -> ExitCode {
    let result = match Cli::parse().command {
        Command::Serve(args) => serve::run(&args),
        Command::CheckConfig(args) => check_config::run(&args),
        Command::Firehose(args) => firehose::run(&args),
        Command::Hosts(command) => hosts::run(&command),
        Command::Log(command) => log::run(&command),
        Command::Completions(args) => completions::run(&args),
        Command::Man(args) => man::run(&args),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => failure.report(),
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_consistent() {
        super::Cli::command().debug_assert();
    }
}
