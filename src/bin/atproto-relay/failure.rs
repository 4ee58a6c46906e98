//! How a command ends when it does not end well: one line on stderr, and an exit code.

use std::fmt;
use std::io;
use std::process::ExitCode;

use atproto_relay::config::ConfigError;

use super::output::printable;

/// The exit code of a wrong command line or configuration; clap uses the same.
const EXIT_USAGE: u8 = 2;
/// The exit code of everything else that fails.
const EXIT_FAILED: u8 = 1;

/// Why a command ends early.
#[derive(Debug)]
pub enum Failure {
    /// The command line or the configuration is wrong.
    Usage(String),
    /// The work failed.
    Failed(String),
    /// Whoever read our output has gone (`| head`): no failure at all.
    OutputClosed,
}

impl Failure {
    /// The work failed, for the reason given.
    pub fn failed(reason: impl fmt::Display) -> Failure {
        Failure::Failed(reason.to_string())
    }

    /// Writes the line, if there is one, and gives the exit code.
    pub fn report(&self) -> ExitCode {
        let (message, code) = match self {
            Failure::Usage(message) => (message, EXIT_USAGE),
            Failure::Failed(message) => (message, EXIT_FAILED),
            Failure::OutputClosed => return ExitCode::SUCCESS,
        };
        // A message may carry text of a server or a file; one line stays one line.
        let line = printable(&message.trim().replace('\n', " "));
        eprintln!("error: {line}");
        ExitCode::from(code)
    }
}

impl From<ConfigError> for Failure {
    fn from(error: ConfigError) -> Failure {
        Failure::Usage(error.to_string())
    }
}

/// From writing to stdout, the only I/O the commands do by themselves.
impl From<io::Error> for Failure {
    fn from(error: io::Error) -> Failure {
        match error.kind() {
            io::ErrorKind::BrokenPipe => Failure::OutputClosed,
            _ => Failure::Failed(format!("cannot write the output: {error}")),
        }
    }
}
