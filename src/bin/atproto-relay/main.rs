//! The command line of the relay: one file for each command. What a command does is in the library;
//! here are its flags, its messages and its exit codes.

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
  Subscribe to one PDS, and watch the output:
    atproto-relay serve --host pds.example.com
    atproto-relay firehose localhost:2470

  Take over the hosts of another relay, then run:
    atproto-relay hosts pull relay1.us-east.bsky.network \\
      --add --data-dir data
    atproto-relay serve

  Read any relay or PDS, and check every signature and every proof:
    atproto-relay firehose bsky.network --verify

  Show all settings and where each value comes from:
    atproto-relay check-config --config relay.toml

Exit codes: 0 success; 1 failure; 2 wrong command line or configuration.";

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
    /// Read the configuration as `serve` would, and show the resulting settings
    #[command(long_about = check_config::LONG_ABOUT)]
    CheckConfig(check_config::CheckConfigArgs),
    /// Read the firehose of any relay or PDS, one line for each event
    #[command(after_help = firehose::EXAMPLES)]
    Firehose(firehose::FirehoseArgs),
    /// Work with lists of hosts
    #[command(subcommand)]
    Hosts(hosts::HostsCommand),
    /// Inspect, check and repair the event log of a data folder
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

    /// Lines that clap would wrap once more, or that break where they are pasted.
    #[test]
    fn examples_fit_a_terminal_and_paragraphs_are_wrapped_once() {
        fn check(command: &clap::Command) {
            let texts = [
                command.get_long_about(),
                command.get_after_help(),
                command.get_after_long_help(),
            ];
            for text in texts.into_iter().flatten().map(ToString::to_string) {
                for paragraph in text.split("\n\n") {
                    let is_example = |line: &str| line.starts_with("  ") || line == "Examples:";
                    let lines: Vec<&str> = paragraph.lines().collect();
                    let prose = lines.iter().filter(|line| !is_example(line)).count();
                    assert!(
                        prose <= 1,
                        "{}: wrapped by hand: {paragraph}",
                        command.get_name()
                    );
                    for line in lines.iter().filter(|line| is_example(line)) {
                        assert!(
                            line.len() <= 80,
                            "{}: does not fit: {line}",
                            command.get_name()
                        );
                    }
                }
            }
            command.get_subcommands().for_each(check);
        }
        check(&super::Cli::command());
    }
}
