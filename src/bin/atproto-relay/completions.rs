//! `completions`: what a shell needs to complete the commands and flags.

use clap::{Args, CommandFactory};
use clap_complete::Shell;

use super::Cli;
use super::failure::Failure;
use super::output::write_all;

pub const EXAMPLES: &str = "\
Examples:
  atproto-relay completions bash \\
    > ~/.local/share/bash-completion/completions/atproto-relay
  atproto-relay completions fish \\
    > ~/.config/fish/completions/atproto-relay.fish";

#[derive(Args)]
pub struct CompletionsArgs {
    /// The shell
    shell: Shell,
}

pub fn run(args: &CompletionsArgs) -> Result<(), Failure> {
    let mut script = Vec::new();
    clap_complete::generate(
        args.shell,
        &mut Cli::command(),
        "atproto-relay",
        &mut script,
    );
    write_all(&script)?;
    Ok(())
}
