//! What can be wrong with a configuration, each as one line: where, what, and what to do.

use std::fmt;
use std::io;
use std::path::PathBuf;

/// Where a setting's value came from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Origin {
    /// Nobody set it.
    Default,
    /// A systemd credential, by its path.
    Credential(PathBuf),
    /// The configuration file and the line in it.
    File {
        /// The file as it was named.
        path: PathBuf,
        /// Line, from 1.
        line: usize,
    },
    /// An environment variable.
    Environment(String),
    /// A flag, without its dashes.
    Flag(String),
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Origin::Default => f.write_str("default"),
            Origin::Credential(path) => write!(f, "credential {}", path.display()),
            Origin::File { path, line } => write!(f, "{}:{line}", path.display()),
            Origin::Environment(name) => write!(f, "environment variable {name}"),
            Origin::Flag(name) => write!(f, "--{name}"),
        }
    }
}

/// A configuration that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file is not there or not readable.
    #[error("cannot read the configuration file {}: {source}; name a readable file with --config", path.display())]
    ReadFile {
        /// The file as it was named.
        path: PathBuf,
        /// What the operating system said.
        source: io::Error,
    },
    /// The file is not TOML.
    #[error("{}:{line}: not valid TOML: {message}", path.display())]
    Syntax {
        /// The file as it was named.
        path: PathBuf,
        /// Line, from 1.
        line: usize,
        /// What the parser said, on one line.
        message: String,
    },
    /// A key that is no setting.
    #[error("{origin}: unknown key `{key}`{}", suggestion(nearest, *secret))]
    UnknownKey {
        /// Where it stands.
        origin: Origin,
        /// The key with the names of its tables.
        key: String,
        /// The setting whose name is nearest.
        nearest: Option<&'static str>,
        /// The key is a secret that must not be in the file.
        secret: bool,
    },
    /// A value that the setting does not take.
    #[error("{origin}: {}{problem}", subject(key, shown))]
    Value {
        /// Where it stands.
        origin: Origin,
        /// The setting's key.
        key: &'static str,
        /// The value, unless it may hold a secret.
        shown: Option<String>,
        /// What is wrong and how it should be.
        problem: String,
    },
    /// A file with a secret that cannot be read.
    #[error("{origin}: cannot read the {what} from {}: {source}; check that the file exists and that this user may read it", path.display())]
    ReadSecret {
        /// Which setting names the file.
        origin: Origin,
        /// What the secret is.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// What the operating system said.
        source: io::Error,
    },
    /// Two settings that exclude or contradict one another.
    #[error("{origin}: {problem}")]
    Contradiction {
        /// Where the setting to change stands.
        origin: Origin,
        /// What does not fit and what to change.
        problem: String,
    },
}

fn suggestion(nearest: &Option<&'static str>, secret: bool) -> String {
    match nearest {
        Some(key) if secret => format!("; secrets do not belong in this file, use `{key}`"),
        Some(key) => format!("; did you mean `{key}`?"),
        None => "; `atproto-relay serve --help` lists all settings".to_owned(),
    }
}

fn subject(key: &str, shown: &Option<String>) -> String {
    match shown {
        Some(value) => format!("{key} = {value} "),
        None => format!("{key} "),
    }
}
