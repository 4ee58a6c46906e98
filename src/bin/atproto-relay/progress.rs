//! A line that moves while one waits: on stderr, only on a terminal, only after two seconds.

use std::io::{self, IsTerminal};
use std::time::Duration;

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use tokio::task::JoinHandle;

/// What is faster needs no progress.
const QUIET: Duration = Duration::from_secs(2);
/// How often the line moves.
const TICK: Duration = Duration::from_millis(120);

/// A progress line. It goes when it is dropped.
pub struct Progress {
    bar: ProgressBar,
    shower: Option<JoinHandle<()>>,
}

impl Progress {
    /// Of work whose end is not known. Must be called inside the runtime.
    pub fn spinner(message: &str) -> Progress {
        Progress::start(
            ProgressBar::hidden(),
            message,
            "{spinner} {msg} ({elapsed})",
        )
    }

    /// Of so many steps. Must be called inside the runtime.
    pub fn steps(message: &str, steps: u64) -> Progress {
        let bar = ProgressBar::with_draw_target(Some(steps), ProgressDrawTarget::hidden());
        Progress::start(bar, message, "{msg} {bar:30} {pos}/{len} ({eta} left)")
    }

    fn start(bar: ProgressBar, message: &str, template: &str) -> Progress {
        bar.set_style(ProgressStyle::with_template(template).expect("a constant template parses"));
        bar.set_message(message.to_owned());
        let shower = io::stderr().is_terminal().then(|| {
            let bar = bar.clone();
            tokio::spawn(async move {
                tokio::time::sleep(QUIET).await;
                bar.set_draw_target(ProgressDrawTarget::stderr());
                bar.enable_steady_tick(TICK);
            })
        });
        Progress { bar, shower }
    }

    /// Says something else.
    pub fn message(&self, message: String) {
        self.bar.set_message(message);
    }

    /// One step is done.
    pub fn step(&self) {
        self.bar.inc(1);
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        if let Some(shower) = &self.shower {
            shower.abort();
        }
        self.bar.finish_and_clear();
    }
}
