//! `serve`: starts the relay, tells systemd, waits for a reason to end, and ends it in order.

use std::fmt;
use std::io;
use std::path::PathBuf;
use std::process::exit;

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::watch;

use atproto_relay::config::{Config, Loaded, Reload};
use atproto_relay::relay::{Relay, Vitals};
use atproto_relay::systemd::sockets::Inherited;
use atproto_relay::systemd::store::DescriptorStore;
use atproto_relay::systemd::watchdog::Watchdog;
use atproto_relay::systemd::{notify, pressure};
use atproto_relay::telemetry::{init_logging, metrics};

use super::config_args::ConfigArgs;
use super::failure::Failure;

pub const LONG_ABOUT: &str = "\
Runs the relay until SIGTERM or Ctrl-C. Without any setting it listens on 127.0.0.1:2470, keeps its \
data in ./data and knows no hosts: name them with --host, take over another relay's with \
`atproto-relay hosts pull`, or let them ask with com.atproto.sync.requestCrawl.

Every setting is a flag, an environment variable and a key of the TOML file given by --config; the \
flag wins, then the environment, then the file. `atproto-relay check-config` shows the resulting settings. \
SIGHUP reads them again and applies what needs no restart.";

pub const EXAMPLES: &str = "\
Examples:
  One PDS, data in ./data:
    atproto-relay serve --host pds.example.com

  A public relay behind a proxy, with an admin API and PostgreSQL:
    DATABASE_URL=postgres://relay@localhost/relay \\
      atproto-relay serve --data-dir /var/lib/atproto-relay \\
      --admin-password-file /etc/atproto-relay/password \\
      --replay-window 48h --log-max-bytes 500GB

  A test network on this machine:
    atproto-relay serve --allow-private-hosts \\
      --plc-host http://localhost:2582 --host http://localhost:2583

Exit codes: 0 ended by a signal; 1 it could not start or failed; 2 the configuration is wrong.";

pub const SHORT_EXAMPLES: &str = "`--help` shows all settings, with examples.";

/// Files that are no consumers: hosts, other requests, segments, the database.
const OTHER_FILES: u64 = 4_096;
/// The exit code after a second signal, while the first one's shutdown is under way: 128 + SIGINT, as shells count.
const EXIT_IMPATIENT: i32 = 130;

pub fn run(args: &ConfigArgs) -> Result<(), Failure> {
    let Loaded {
        config,
        warnings,
        file,
        ..
    } = args.load()?;
    init_logging(&config.log_level, config.log_format).map_err(Failure::failed)?;
    for warning in warnings {
        tracing::warn!("{warning}");
    }
    let given = Inherited::from_environment().map_err(Failure::failed)?;
    raise_file_limit(config.firehose.max_consumers);
    tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .map_err(|error| Failure::Failed(format!("cannot start the runtime: {error}")))?
        .block_on(serve(args, config, file, given))
}

async fn serve(
    args: &ConfigArgs,
    config: Config,
    file: Option<PathBuf>,
    given: Inherited,
) -> Result<(), Failure> {
    let mut signals = Signals::install()
        .map_err(|error| Failure::Failed(format!("cannot listen for signals: {error}")))?;
    let admin = AdminListeners::of(&config, &given);
    let (data_dir, database) = (config.data_dir.display().to_string(), config.database_url());
    let descriptors = DescriptorStore::from_environment().unwrap_or_else(|error| {
        tracing::warn!(%error, "consumers will not outlive this process: systemd cannot be reached");
        None
    });
    // A task of its own: recovery reads files, and does not always let others have their turn.
    let asking = tokio::spawn(notify::ask_for_time(|| metrics().recovery_steps.get()));
    let relay = tokio::select! {
        started = Relay::start_given(config, given, descriptors) => started.map_err(Failure::failed)?,
        signal = signals.end.next() => {
            tracing::info!(signal, "stopped while starting");
            return Ok(());
        }
    };
    asking.abort();
    let firehose = format!(
        "ws://{}/xrpc/com.atproto.sync.subscribeRepos",
        relay.public_addr()
    );
    tracing::info!(
        version = env!("CARGO_PKG_VERSION"),
        config = file.map_or("none".into(), |file| file.display().to_string()),
        data_dir,
        %database,
        hosts = relay.hosts().count(),
        firehose,
        metrics = %relay.metrics_addr(),
        %admin,
        head = relay.log().head(),
        "ready"
    );
    let serving = format!("serving {firehose}");
    notify::ready(&serving);
    let watchdog = relay.parts().and_then(Watchdog::start).map_err(|error| {
        Failure::Failed(format!(
            "cannot prove progress to systemd's watchdog: {error}"
        ))
    })?;
    let status = tokio::spawn(tell_status(relay.vitals()));

    watch_memory(&relay);

    let reloads = async {
        loop {
            signals.reload.recv().await;
            notify::reloading();
            reload(args, &relay).await;
            notify::ready(&serving);
        }
    };
    let outcome = tokio::select! {
        failure = relay.failed() => Err(Failure::failed(failure)),
        never = reloads => never,
        signal = signals.end.next() => {
            tracing::info!(signal, "stopping; a second signal stops at once");
            Ok(())
        }
    };
    status.abort();
    notify::stopping();
    drop(watchdog);
    tokio::select! {
        () = relay.shutdown() => {}
        signal = signals.end.next() => {
            tracing::warn!(signal, "stopped at once; the next start takes the rest from the log");
            exit(EXIT_IMPATIENT);
        }
    }
    tracing::info!("stopped");
    outcome
}

/// Reads the configuration again, and applies what of it can be applied. One that is wrong changes nothing.
async fn reload(args: &ConfigArgs, relay: &Relay) {
    let loaded = args.load();
    relay.metrics().count_reload(loaded.is_ok());
    let Loaded {
        config, warnings, ..
    } = match loaded {
        Ok(loaded) => loaded,
        Err(error) => {
            return tracing::error!("the configuration is wrong, and all stays as it was: {error}");
        }
    };
    for warning in warnings {
        tracing::warn!("{warning}");
    }
    raise_file_limit(config.firehose.max_consumers);
    let Reload { applied, waiting } = relay.reload(config).await;
    tracing::info!(
        applied = applied.len(),
        need_restart = waiting.len(),
        "the configuration was read again"
    );
}

/// Lets the caches shrink when systemd says that memory is short.
fn watch_memory(relay: &Relay) {
    let shrink = relay.shrinker();
    let told = relay.metrics().memory_pressure.clone();
    let watched = pressure::watch(move || {
        shrink();
        pressure::give_back();
        told.inc();
        tracing::info!("memory is short: the caches shrink");
    });
    if let Err(error) = watched {
        tracing::warn!("{error}");
    }
}

/// Keeps systemd's status line up to date.
async fn tell_status(mut vitals: watch::Receiver<Vitals>) {
    while notify::is_enabled() && vitals.changed().await.is_ok() {
        let status = vitals.borrow_and_update().to_string();
        notify::status(&status);
    }
}

/// Raises the soft limit of open files, which many systems set to 1,024 for the sake of programs older than poll(2), to
/// the hard one: every host and every consumer is a file.
fn raise_file_limit(consumers: usize) {
    let Rlimit { current, maximum } = getrlimit(Resource::Nofile);
    if current != maximum {
        let raised = Rlimit {
            current: maximum,
            maximum,
        };
        if let Err(error) = setrlimit(Resource::Nofile, raised) {
            tracing::warn!(%error, "the limit of open files stays at {}", current.unwrap_or(0));
        }
    }
    let wanted = consumers as u64 + OTHER_FILES;
    if let Some(maximum) = maximum.filter(|maximum| *maximum < wanted) {
        tracing::warn!(
            "{maximum} open files may be too few for {consumers} consumers: allow {wanted} (LimitNOFILE= in systemd), \
             or set a lower --max-consumers"
        );
    }
}

/// Where the admin API answers.
struct AdminListeners(Vec<String>);

impl AdminListeners {
    fn of(config: &Config, given: &Inherited) -> AdminListeners {
        let mut listeners = Vec::new();
        if config.admin_password.is_some() {
            listeners.push("the public listener, with the password".to_owned());
        }
        match (&config.admin_listen, given.admin.len()) {
            (Some(own), 0) => listeners.push(own.to_string()),
            (None, 0) => {}
            _ => listeners.push("the socket of systemd".to_owned()),
        }
        AdminListeners(listeners)
    }
}

impl fmt::Display for AdminListeners {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0.as_slice() {
            [] => f.write_str("off"),
            listeners => f.write_str(&listeners.join("; ")),
        }
    }
}

/// The signals that mean something.
struct Signals {
    end: EndSignals,
    /// SIGHUP.
    reload: Signal,
}

/// SIGTERM and SIGINT.
struct EndSignals {
    terminate: Signal,
    interrupt: Signal,
}

impl Signals {
    fn install() -> io::Result<Signals> {
        Ok(Signals {
            end: EndSignals {
                terminate: signal(SignalKind::terminate())?,
                interrupt: signal(SignalKind::interrupt())?,
            },
            reload: signal(SignalKind::hangup())?,
        })
    }
}

impl EndSignals {
    /// The name of the next signal.
    async fn next(&mut self) -> &'static str {
        tokio::select! {
            _ = self.terminate.recv() => "SIGTERM",
            _ = self.interrupt.recv() => "SIGINT",
        }
    }
}
