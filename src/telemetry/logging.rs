//! Where log lines go: stderr as text or JSON, or the journal with fields when stderr is the journal.
//! Never stdout, which belongs to what a command prints.

use std::io::{self, IsTerminal};
use std::sync::OnceLock;

use rustix::fs::fstat;
use tracing_journald::{Priority, PriorityMappings};
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::{SubscriberInitExt, TryInitError};
use tracing_subscriber::{EnvFilter, Layer, Registry, fmt, reload};

/// The name of the relay's messages in the journal.
const SYSLOG_IDENTIFIER: &str = "atproto-relay";
/// What the names of our fields in the journal begin with, before an underscore.
const FIELD_PREFIX: &str = "RELAY";
/// syslog(3)'s priorities: `info` is 6, as every other program's, and what is finer is 7.
const PRIORITIES: PriorityMappings = PriorityMappings {
    error: Priority::Error,
    warn: Priority::Warning,
    info: Priority::Informational,
    debug: Priority::Debug,
    trace: Priority::Debug,
};
/// The variable with device and inode of the journal's stream (systemd.exec(5)).
const JOURNAL_STREAM_ENV: &str = "JOURNAL_STREAM";

/// Form of the log lines on stderr.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum LogFormat {
    /// One readable line per message.
    Text,
    /// One JSON object per message.
    Json,
}

impl LogFormat {
    /// All of them.
    pub const ALL: [LogFormat; 2] = [LogFormat::Text, LogFormat::Json];

    /// The word for it in the configuration.
    pub fn as_str(self) -> &'static str {
        match self {
            LogFormat::Text => "text",
            LogFormat::Json => "json",
        }
    }
}

/// Why log lines cannot be set up.
#[derive(Debug, thiserror::Error)]
pub enum LoggingError {
    /// The level is no level and no list of directives.
    #[error(
        "the log level {0:?} cannot be read: {1}; use error, warn, info, debug, trace or directives"
    )]
    Level(String, #[source] tracing_subscriber::filter::ParseError),
    /// Logging was set up before in this process.
    #[error("logging is set up already: {0}")]
    Twice(#[from] TryInitError),
    /// The level cannot be changed any more.
    #[error("the log level cannot be changed: {0}")]
    Change(#[from] reload::Error),
}

/// The database driver, as its lines are named.
const DRIVER: &str = "sqlx";

/// What lets lines through in this process.
static FILTER: OnceLock<reload::Handle<EnvFilter, Registry>> = OnceLock::new();

/// Sets up logging for the whole process, once.
///
/// When systemd connected stderr to the journal, lines go to journald with their fields (`RELAY_DID`,
/// `RELAY_HOST`, `RELAY_SEQ`, `RELAY_RULE`); if journald cannot be reached they go to stderr.
pub fn init_logging(level: &str, format: LogFormat) -> Result<(), LoggingError> {
    let (filter, handle) = reload::Layer::new(filter(level)?);
    let output = match journal_layer() {
        Some(layer) => layer,
        None => stderr_layer(format),
    };
    tracing_subscriber::registry()
        .with(output.with_filter(filter))
        .try_init()?;
    // Set up once, as just seen.
    let _ = FILTER.set(handle);
    Ok(())
}

/// Changes the level of a process whose logging is set up.
pub fn set_log_level(level: &str) -> Result<(), LoggingError> {
    let filter = filter(level)?;
    match FILTER.get() {
        Some(handle) => Ok(handle.reload(filter)?),
        None => Ok(()),
    }
}

/// The database driver's own lines say less than the store's, and come with every statement that fails: only who names
/// the driver sees them.
fn filter(level: &str) -> Result<EnvFilter, LoggingError> {
    let quiet = match level.contains(DRIVER) {
        true => String::new(),
        false => format!(",{DRIVER}=off"),
    };
    EnvFilter::try_new(format!("{level}{quiet}"))
        .map_err(|error| LoggingError::Level(level.to_owned(), error))
}

type Output = Box<dyn Layer<Registry> + Send + Sync>;

fn journal_layer() -> Option<Output> {
    let stream = std::env::var(JOURNAL_STREAM_ENV).ok()?;
    if !stderr_is_journal(&stream) {
        return None;
    }
    let layer = tracing_journald::layer().ok()?;
    Some(
        layer
            .with_syslog_identifier(SYSLOG_IDENTIFIER.to_owned())
            .with_field_prefix(Some(FIELD_PREFIX.to_owned()))
            .with_priority_mappings(PRIORITIES)
            .boxed(),
    )
}

fn stderr_layer(format: LogFormat) -> Output {
    let colours = io::stderr().is_terminal() && std::env::var_os("NO_COLOR").is_none();
    match format {
        LogFormat::Text => fmt::layer()
            .with_writer(|| OneLine(io::stderr()))
            .with_ansi(colours)
            .boxed(),
        LogFormat::Json => fmt::layer()
            .json()
            .flatten_event(true)
            .with_writer(io::stderr)
            .boxed(),
    }
}

/// Writes each message as one line: what strangers say may have line breaks in it, and must not look like lines of ours.
/// A message is written by one call, its own line break at the end.
struct OneLine<W>(W);

impl<W: io::Write> io::Write for OneLine<W> {
    fn write(&mut self, message: &[u8]) -> io::Result<usize> {
        let text = message.strip_suffix(b"\n").unwrap_or(message);
        if !text.iter().any(|byte| matches!(byte, b'\n' | b'\r')) {
            self.0.write_all(message)?;
            return Ok(message.len());
        }
        let mut line = Vec::with_capacity(message.len() + 16);
        for byte in text {
            match byte {
                b'\n' => line.extend(b"\\n"),
                b'\r' => line.extend(b"\\r"),
                byte => line.push(*byte),
            }
        }
        line.extend(&message[text.len()..]);
        self.0.write_all(&line)?;
        Ok(message.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.0.flush()
    }
}

/// Whether stderr is the journal's stream: `JOURNAL_STREAM` names its device and inode. The variable
/// alone proves nothing, because it is inherited by processes whose stderr was redirected.
pub fn stderr_is_journal(journal_stream: &str) -> bool {
    let Some((device, inode)) = journal_stream.split_once(':') else {
        return false;
    };
    let Ok(stat) = fstat(io::stderr()) else {
        return false;
    };
    device.parse() == Ok(stat.st_dev) && inode.parse() == Ok(stat.st_ino)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_message_is_one_line_whatever_it_says() {
        let mut out = OneLine(Vec::new());
        for message in ["plain\n", "two\n2026 ERROR\r\nlines\n", "no end\nhere"] {
            io::Write::write_all(&mut out, message.as_bytes()).unwrap();
        }
        let expected = b"plain\ntwo\\n2026 ERROR\\r\\nlines\nno end\\nhere";
        assert_eq!(
            String::from_utf8_lossy(&out.0),
            String::from_utf8_lossy(expected)
        );
    }

    #[test]
    fn the_journal_is_recognised_by_device_and_inode() {
        let stat = fstat(io::stderr()).unwrap();
        assert!(stderr_is_journal(&format!(
            "{}:{}",
            stat.st_dev, stat.st_ino
        )));
        assert!(!stderr_is_journal(&format!(
            "{}:{}",
            stat.st_dev,
            stat.st_ino + 1
        )));
        for malformed in ["", "8", "a:b", ":", "1:"] {
            assert!(!stderr_is_journal(malformed), "{malformed}");
        }
    }
}
