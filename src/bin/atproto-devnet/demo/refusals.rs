//! What the relay in this process refuses, with rule, host and account: it tells each refusal to its log at level debug,
//! in fields, and here they are taken from there. Also where all other lines of the log go.

use std::fmt;
use std::io::{self, Write};
use std::sync::OnceLock;

use tokio::sync::mpsc;
use tracing::field::{Field, Visit};
use tracing::{Event, Metadata, Subscriber};
use tracing_subscriber::filter::filter_fn;
use tracing_subscriber::fmt::MakeWriter;
use tracing_subscriber::layer::{Context, Layer, SubscriberExt};
use tracing_subscriber::util::{SubscriberInitExt, TryInitError};
use tracing_subscriber::{EnvFilter, fmt as lines};

/// An event that the relay did not forward.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Refusal {
    pub rule: String,
    /// `host:port` of the sender.
    pub host: String,
    pub did: String,
    pub reason: String,
}

/// Sets up the log of this process; the receiver gets what is refused.
pub fn listen() -> Result<mpsc::UnboundedReceiver<Refusal>, TryInitError> {
    let (refusals, heard) = mpsc::unbounded_channel();
    let output = lines::layer()
        .with_writer(LogOutput)
        .with_ansi(false)
        .with_filter(EnvFilter::from_default_env());
    tracing_subscriber::registry()
        .with(Listener(refusals).with_filter(filter_fn(is_refusal)))
        .with(output)
        .try_init()?;
    Ok(heard)
}

/// Each refusal is one event; the summaries of a host's refusals have a field more.
fn is_refusal(metadata: &Metadata<'_>) -> bool {
    let has = |name| metadata.fields().field(name).is_some();
    has("rule") && has("host") && has("did") && !has("drops")
}

struct Listener(mpsc::UnboundedSender<Refusal>);

impl<S: Subscriber> Layer<S> for Listener {
    fn on_event(&self, event: &Event<'_>, _: Context<'_, S>) {
        let mut refusal = Refusal::default();
        event.record(&mut refusal);
        // The demo may be ending.
        let _ = self.0.send(refusal);
    }
}

impl Refusal {
    fn set(&mut self, field: &Field, value: String) {
        match field.name() {
            "rule" => self.rule = value,
            "host" => self.host = value,
            "did" => self.did = value,
            "reason" => self.reason = value,
            _ => {}
        }
    }
}

impl Visit for Refusal {
    fn record_str(&mut self, field: &Field, value: &str) {
        self.set(field, value.to_owned());
    }

    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        self.set(field, format!("{value:?}"));
    }
}

/// Where lines of the log go while a screen is open: written to the terminal, they would tear it.
static SCREEN: OnceLock<mpsc::UnboundedSender<String>> = OnceLock::new();

/// Sends the lines of the log to the receiver from now on, as long as it is there.
pub fn log_lines() -> mpsc::UnboundedReceiver<String> {
    let (sender, lines) = mpsc::unbounded_channel();
    // A process has one screen.
    let _ = SCREEN.set(sender);
    lines
}

struct LogOutput;

impl<'a> MakeWriter<'a> for LogOutput {
    type Writer = LogOutput;

    fn make_writer(&'a self) -> LogOutput {
        LogOutput
    }
}

impl Write for LogOutput {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        let text = String::from_utf8_lossy(line).trim_end().to_owned();
        match SCREEN.get().map(|screen| screen.send(text)) {
            Some(Ok(())) => Ok(line.len()),
            _ => io::stderr().write(line),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
