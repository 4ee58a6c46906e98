//! `man`: the manual pages, made from the same words as `--help`.

use std::path::PathBuf;

use clap::{Args, CommandFactory, ValueHint};

use super::Cli;
use super::failure::Failure;
use super::output::write_all;

pub const EXAMPLES: &str = "\
Examples:
  atproto-relay man | man -l -
  atproto-relay man --out-dir ~/.local/share/man/man1";

#[derive(Args)]
pub struct ManArgs {
    /// Write the pages of all commands into this folder
    #[arg(long, value_name = "FOLDER", value_hint = ValueHint::DirPath)]
    out_dir: Option<PathBuf>,
}

pub fn run(args: &ManArgs) -> Result<(), Failure> {
    let command = Cli::command();
    if let Some(folder) = &args.out_dir {
        return clap_mangen::generate_to(command, folder).map_err(|error| {
            Failure::Failed(format!(
                "cannot write the man pages into {}: {error}; name a folder that exists and is writable",
                folder.display()
            ))
        });
    }
    let mut page = Vec::new();
    clap_mangen::Man::new(command).render(&mut page)?;
    write_all(&page)?;
    Ok(())
}
