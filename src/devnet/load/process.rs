//! A relay as a child process: started on free ports and a folder of its own, killed and started
//! again on the same ones, and measured from outside through /proc.

use std::ffi::OsString;
use std::fs;
use std::io;
use std::net::{Ipv4Addr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::json;

/// Admin password of relays started here: they listen on loopback and live as long as a run.
const ADMIN_PASSWORD: &str = "devnet";
/// Pause between two looks at whether the relay answers.
const READY_POLL: Duration = Duration::from_millis(10);
/// Consumers let in beside those that a load announces: the one that checks, and its reconnects.
const SPARE_CONSUMERS: usize = 50;
/// Clock ticks of `utime` and `stime` in /proc/PID/stat per second: USER_HZ, 100 on every Linux.
const TICKS_PER_SECOND: f64 = 100.0;

/// Why a relay does not run.
#[derive(Debug, thiserror::Error)]
pub enum ProcessError {
    #[error(
        "cannot start {binary}: {source}; build it with `cargo build --release`, or name it with --relay-bin"
    )]
    Start { binary: PathBuf, source: io::Error },
    #[error("no free port on 127.0.0.1: {0}")]
    Port(io::Error),
    #[error("cannot write the relay's messages to {path}: {source}")]
    Messages { path: PathBuf, source: io::Error },
    #[error("the relay ended with {status} before it was ready; it said:\n{said}")]
    Ended { status: String, said: String },
    #[error("the relay did not answer at {url} within {waited:?}; it said:\n{said}")]
    NotReady {
        url: String,
        waited: Duration,
        said: String,
    },
    #[error("the relay refused {path}: {status} {body}")]
    Refused {
        path: String,
        status: u16,
        body: String,
    },
    #[error("the relay does not answer: {0}")]
    Http(#[from] reqwest::Error),
    #[error("cannot signal the relay: {0}")]
    Signal(io::Error),
}

/// How a relay is started.
#[derive(Clone, Debug)]
pub struct ProcessOptions {
    /// The `atproto-relay` executable.
    pub binary: PathBuf,
    /// Folder for its log and database, and for what it says (`relay.txt`).
    pub folder: PathBuf,
    /// Base URL of the PLC directory.
    pub plc: String,
    /// Base URLs of the hosts.
    pub hosts: Vec<String>,
    /// More arguments for `atproto-relay serve`.
    pub arguments: Vec<OsString>,
}

/// What the kernel says of a process.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Usage {
    /// CPU time in seconds, user and system.
    pub cpu_seconds: f64,
    /// Resident memory in bytes.
    pub resident: u64,
    /// The most resident memory so far, in bytes.
    pub resident_peak: u64,
}

/// A relay that runs, or was killed and may be started again. Dropping it kills it.
#[derive(Debug)]
pub struct RelayProcess {
    options: ProcessOptions,
    port: u16,
    metrics_port: u16,
    child: Child,
}

/// The relay's executable beside the one that runs now.
pub fn relay_beside_us() -> PathBuf {
    let name = format!("atproto-relay{}", std::env::consts::EXE_SUFFIX);
    std::env::current_exe()
        .map(|own| own.with_file_name(&name))
        .unwrap_or_else(|_| name.into())
}

/// Arguments with which a relay holds nothing back from so many consumers: its limits are not what a
/// load measures.
pub fn unlimited(consumers: usize) -> Vec<OsString> {
    let limits = [
        "--limit-accounts",
        "--limit-trusted-accounts",
        "--limit-events-per-second",
        "--limit-events-per-hour",
        "--limit-events-per-day",
        "--limit-bytes-per-hour-per-account",
    ];
    let consumers = (consumers + SPARE_CONSUMERS).to_string();
    limits
        .into_iter()
        .flat_map(|limit| [limit, "1000000000"])
        .chain(["--identity-directory-rate", "1000000"])
        .chain(["--max-consumers", &consumers])
        .chain(["--max-consumers-per-ip", &consumers])
        .map(OsString::from)
        .collect()
}

impl RelayProcess {
    /// Starts a relay and waits until it answers.
    pub async fn start(
        options: ProcessOptions,
        patience: Duration,
    ) -> Result<RelayProcess, ProcessError> {
        let [port, metrics_port] = free_ports().map_err(ProcessError::Port)?;
        let child = spawn(&options, port, metrics_port)?;
        let mut relay = RelayProcess {
            options,
            port,
            metrics_port,
            child,
        };
        relay.ready(patience).await?;
        Ok(relay)
    }

    /// `http://127.0.0.1:port` of the public API.
    pub fn url(&self) -> String {
        format!("http://127.0.0.1:{}", self.port)
    }

    /// `ws://127.0.0.1:port`, for consumers.
    pub fn firehose(&self) -> String {
        format!("ws://127.0.0.1:{}", self.port)
    }

    /// `http://127.0.0.1:port/metrics`.
    pub fn metrics_url(&self) -> String {
        format!("http://127.0.0.1:{}/metrics", self.metrics_port)
    }

    /// Kills the relay as a power failure would: no word, no chance to write anything.
    pub fn kill(&mut self) -> Result<(), ProcessError> {
        self.child.kill().map_err(ProcessError::Signal)?;
        self.child.wait().map(|_| ()).map_err(ProcessError::Signal)
    }

    /// Asks the relay to end, and waits for it; whether it ended well.
    pub async fn end(mut self, patience: Duration) -> Result<bool, ProcessError> {
        self.stop(patience).await
    }

    /// Like [`RelayProcess::end`]; it may be started again.
    pub async fn stop(&mut self, patience: Duration) -> Result<bool, ProcessError> {
        let pid = i32::try_from(self.child.id())
            .ok()
            .and_then(rustix::process::Pid::from_raw);
        if let Some(pid) = pid {
            rustix::process::kill_process(pid, rustix::process::Signal::TERM)
                .map_err(|error| ProcessError::Signal(error.into()))?;
        }
        let deadline = Instant::now() + patience;
        while Instant::now() < deadline {
            if let Some(status) = self.child.try_wait().map_err(ProcessError::Signal)? {
                return Ok(status.success());
            }
            tokio::time::sleep(READY_POLL).await;
        }
        Ok(false)
    }

    /// Starts it again after [`RelayProcess::kill`], on the same ports and folder; how long it took
    /// until it answered.
    pub async fn restart(&mut self, patience: Duration) -> Result<Duration, ProcessError> {
        let start = Instant::now();
        self.start_again()?;
        self.ready(patience).await?;
        Ok(start.elapsed())
    }

    /// Like [`RelayProcess::restart`], but waits for nothing.
    pub fn start_again(&mut self) -> Result<(), ProcessError> {
        self.child = spawn(&self.options, self.port, self.metrics_port)?;
        Ok(())
    }

    /// What it has used so far; zeros where the kernel does not tell.
    pub fn usage(&self) -> Usage {
        Usage::of(self.child.id()).unwrap_or_default()
    }

    /// Sets the account quota of a host by its `host:port`.
    pub async fn change_limits(&self, host: &str, accounts: usize) -> Result<(), ProcessError> {
        self.admin(
            "/admin/pds/changeLimits",
            json!({ "host": host, "repo_limit": accounts }),
        )
        .await
    }

    async fn admin(&self, path: &str, body: serde_json::Value) -> Result<(), ProcessError> {
        let request = crate::dial::plain_client()
            .post(format!("{}{path}", self.url()))
            .basic_auth("admin", Some(ADMIN_PASSWORD));
        let answer = request.json(&body).send().await?;
        let status = answer.status();
        if status.is_success() {
            return Ok(());
        }
        Err(ProcessError::Refused {
            path: path.to_owned(),
            status: status.as_u16(),
            body: answer.text().await?,
        })
    }

    async fn ready(&mut self, patience: Duration) -> Result<(), ProcessError> {
        let url = format!("{}/_health", self.url());
        let client = crate::dial::plain_client();
        let deadline = Instant::now() + patience;
        while Instant::now() < deadline {
            if let Some(status) = self.child.try_wait().map_err(ProcessError::Signal)? {
                return Err(ProcessError::Ended {
                    status: status.to_string(),
                    said: self.said(),
                });
            }
            let answer = client
                .get(&url)
                .timeout(Duration::from_secs(1))
                .send()
                .await;
            if answer.is_ok_and(|answer| answer.status().is_success()) {
                return Ok(());
            }
            tokio::time::sleep(READY_POLL).await;
        }
        Err(ProcessError::NotReady {
            url,
            waited: patience,
            said: self.said(),
        })
    }

    /// Everything it said so far, in all its lives.
    pub fn said_in_all(&self) -> String {
        fs::read_to_string(messages(&self.options.folder)).unwrap_or_default()
    }

    /// The end of what it said so far.
    pub fn said(&self) -> String {
        let text = self.said_in_all();
        let lines: Vec<&str> = text.lines().collect();
        lines[lines.len().saturating_sub(20)..].join("\n")
    }
}

impl Drop for RelayProcess {
    fn drop(&mut self) {
        // It may have ended already; there is nobody to tell.
        let _ = self.kill();
    }
}

impl Usage {
    /// The usage of the process `pid`, where /proc tells it.
    pub fn of(pid: u32) -> Option<Usage> {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        // The name in parentheses may hold spaces; utime and stime are fields 14 and 15 of proc(5).
        let mut fields = stat.rsplit_once(')')?.1.split_ascii_whitespace().skip(11);
        let mut ticks = || fields.next()?.parse::<f64>().ok();
        let cpu_seconds = (ticks()? + ticks()?) / TICKS_PER_SECOND;
        let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
        let kilobytes = |name: &str| {
            let line = status.lines().find_map(|line| line.strip_prefix(name))?;
            line.split_ascii_whitespace().next()?.parse::<u64>().ok()
        };
        Some(Usage {
            cpu_seconds,
            resident: kilobytes("VmRSS:")? * 1024,
            resident_peak: kilobytes("VmHWM:")? * 1024,
        })
    }
}

fn messages(folder: &Path) -> PathBuf {
    folder.join("relay.txt")
}

fn free_ports() -> io::Result<[u16; 2]> {
    let listeners = [
        TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?,
        TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?,
    ];
    let [first, second] = &listeners;
    Ok([first.local_addr()?.port(), second.local_addr()?.port()])
}

fn spawn(options: &ProcessOptions, port: u16, metrics_port: u16) -> Result<Child, ProcessError> {
    let path = messages(&options.folder);
    let failed = |source| ProcessError::Messages {
        path: path.clone(),
        source,
    };
    fs::create_dir_all(&options.folder).map_err(failed)?;
    let said = fs::OpenOptions::new()
        .create(true)
        .append(true)
        .open(&path)
        .map_err(failed)?;
    let mut command = Command::new(&options.binary);
    command
        .arg("serve")
        .args(["--listen", &format!("127.0.0.1:{port}")])
        .args(["--metrics-listen", &format!("127.0.0.1:{metrics_port}")])
        .arg("--data-dir")
        .arg(options.folder.join("data"))
        .args(["--plc-host", &options.plc])
        .arg("--allow-private-hosts");
    for host in &options.hosts {
        command.args(["--host", host]);
    }
    command
        .args(&options.arguments)
        .env("RELAY_ADMIN_PASSWORD", ADMIN_PASSWORD);
    command
        .stdin(Stdio::null())
        .stdout(said.try_clone().map_err(failed)?)
        .stderr(said);
    command.spawn().map_err(|source| ProcessError::Start {
        binary: options.binary.clone(),
        source,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_the_usage_of_this_process() {
        if !Path::new("/proc/self/stat").exists() {
            println!("skipped: no /proc here");
            return;
        }
        let usage = Usage::of(std::process::id()).unwrap();
        assert!(
            usage.resident > 0 && usage.resident_peak >= usage.resident && usage.cpu_seconds >= 0.0
        );
        assert_eq!(Usage::of(u32::MAX), None);
    }
}
