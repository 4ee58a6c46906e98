//! `hosts pull`: shows the hosts of another relay, writes them into the database, or has a running relay add them. Says
//! where they went, and makes no database that nobody named.

use std::collections::HashSet;
use std::error::Error;
use std::fmt;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use clap::{Args, Subcommand};
use reqwest::{Client, Method, Response};
use serde_json::{Value, json};
use tokio::sync::Semaphore;
use tokio::task::JoinSet;
use url::Url;

use atproto_relay::api::Secret;
use atproto_relay::config::{AdminListen, Config, Loaded, Origin, SQLITE_FILE};
use atproto_relay::dial::{DomainPattern, Guard, HostName};
use atproto_relay::discovery::{RemoteHost, pull_hosts};
use atproto_relay::store::{NewHost, Store};

use super::config_args::{Adding, FewArgs};
use super::failure::Failure;
use super::output::{counted, printable, write_all};
use super::progress::Progress;

const PULL_EXAMPLES: &str = "\
Examples:
  Show them:
    atproto-relay hosts pull relay1.us-east.bsky.network

  Have the running relay check and add each one now, through the admin socket
  that its settings name, or that of NixOS:
    atproto-relay hosts pull relay1.us-east.bsky.network --to

  The same through another socket, or with the admin password:
    atproto-relay hosts pull relay1.us-east.bsky.network \\
      --to unix:/run/relay-admin.sock
    RELAY_ADMIN_PASSWORD=... \\
      atproto-relay hosts pull relay1.us-east.bsky.network \\
      --to http://localhost:2470

  Write them into the database of these settings, for the next start of its
  relay:
    atproto-relay hosts pull relay1.us-east.bsky.network \\
      --add --data-dir data

A line is: name, status there, number of accounts. With --add or --to, hosts that are public, and active or idle there, \
are added, and each line has the outcome.";

/// The admin socket of a relay that nixos/sockets.nix has set up: there systemd opens it, and no setting names it.
const NIXOS_SOCKET: &str = "/run/atproto-relay-admin.sock";
/// The prefix of a socket's path.
const UNIX: &str = "unix:";

/// Requests in flight to a running relay; each makes it ask one host.
const CONCURRENT_REQUESTS: usize = 8;
/// Longest wait for one answer: the relay itself waits ten seconds for the host.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(60);

#[derive(Subcommand)]
pub enum HostsCommand {
    /// Read the list of hosts of another relay (com.atproto.sync.listHosts)
    #[command(after_help = PULL_EXAMPLES)]
    Pull(Box<PullArgs>),
}

#[derive(Args)]
pub struct PullArgs {
    /// The other relay, a name or a URL
    #[arg(value_name = "URL")]
    relay: String,
    /// Write the hosts into the database of these settings, for the next start of its relay
    #[arg(long, conflicts_with = "to")]
    add: bool,
    /// Have the running relay add the hosts: at its admin socket, as unix:PATH, or at its URL, with its admin password.
    /// Without a value: at the admin listener of these settings, or that of the NixOS module
    #[arg(long, value_name = "RELAY", num_args = 0..=1, default_missing_value = "")]
    to: Option<String>,
    /// Print JSON, one object a line
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    settings: FewArgs<Adding>,
}

pub fn run(command: &HostsCommand) -> Result<(), Failure> {
    let HostsCommand::Pull(args) = command;
    tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .map_err(|error| Failure::Failed(format!("cannot start the runtime: {error}")))?
        .block_on(async {
            tokio::select! {
                done = pull(args) => done,
                _ = tokio::signal::ctrl_c() => Err(Failure::failed("stopped by Ctrl-C; what was added stays")),
            }
        })
}

async fn pull(args: &PullArgs) -> Result<(), Failure> {
    let loaded = args.settings.config.load()?;
    for warning in &loaded.warnings {
        eprintln!("warning: {warning}");
    }
    if args.add {
        named_database(&loaded)?;
    }
    let config = loaded.config;
    let relay = relay_url(&args.relay)?;
    let target = args
        .to
        .as_deref()
        .map(|to| Target::new(to, &config))
        .transpose()?;
    let hosts = {
        let progress = Progress::spinner("reading the list");
        pull_hosts(&relay, |read| {
            progress.message(format!("{read} hosts read"))
        })
        .await
    }
    .map_err(Failure::failed)?;
    let (outcomes, place) = match target {
        Some(target) => (
            target.add(&hosts, &config).await?,
            format!("by the relay at {target}"),
        ),
        None if args.add => (
            add_to_database(&hosts, &config).await?,
            format!(
                "to the database {}; a relay takes them up when it starts",
                config.database_url()
            ),
        ),
        None => (vec![None; hosts.len()], String::new()),
    };
    write_all(lines(&hosts, &outcomes, args.json).as_bytes())?;
    summary(&outcomes, &place);
    Ok(())
}

/// Refuses a database that nobody named and that is not there: it would be made in the current folder, and no relay would
/// ever read it.
fn named_database(loaded: &Loaded) -> Result<(), Failure> {
    let is_default = |key| loaded.origin(key) == Origin::Default;
    let file = loaded.config.data_dir.join(SQLITE_FILE);
    if loaded.file.is_some()
        || !is_default("database_url")
        || !is_default("data_dir")
        || file.exists()
    {
        return Ok(());
    }
    let running = if Path::new(NIXOS_SOCKET).exists() {
        "have the relay that runs here add them with --to in place of --add"
    } else {
        "or have a running relay add them with --to in place of --add"
    };
    Err(Failure::Usage(format!(
        "nothing is added: no database is named, and there is none at {}; name the relay's with --config, --data-dir or \
         --database-url, {running}",
        file.display()
    )))
}

/// What became of a host that was to be added.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Outcome {
    Added,
    Known,
    /// Not to be added, for this reason.
    Skipped(&'static str),
    /// The relay refused it.
    Refused(String),
}

impl Outcome {
    fn describe(&self) -> String {
        match self {
            Outcome::Added => "added".to_owned(),
            Outcome::Known => "known".to_owned(),
            Outcome::Skipped(reason) => format!("skipped: {reason}"),
            Outcome::Refused(reason) => format!("refused: {reason}"),
        }
    }
}

/// The host to add, or why it is not added: what the other relay does not hear from, we would not either.
fn wanted(host: &RemoteHost, config: &Config) -> Result<HostName, Outcome> {
    match host.status.as_deref() {
        Some("active" | "idle") | None => {}
        Some("banned") => return Err(Outcome::Skipped("banned there")),
        Some(_) => return Err(Outcome::Skipped("not active there")),
    }
    let host = HostName::parse(&host.hostname, &Guard::new(true))
        .map_err(|_| Outcome::Skipped("not a host name"))?;
    host.check(&Guard::new(config.allow_private_hosts))
        .map_err(|_| Outcome::Skipped("not a public https host"))?;
    if config.host_settings.is_banned(&host) {
        return Err(Outcome::Skipped("in banned_domains"));
    }
    Ok(host)
}

async fn add_to_database(
    hosts: &[RemoteHost],
    config: &Config,
) -> Result<Vec<Option<Outcome>>, Failure> {
    if config.database_url.is_none() {
        // The default database lies in the data folder, which `serve` makes likewise.
        std::fs::create_dir_all(&config.data_dir).map_err(|error| {
            Failure::Failed(format!(
                "cannot create the data folder {}: {error}; create it, or choose another with --data-dir",
                config.data_dir.display()
            ))
        })?;
    }
    // Before anything is written: the relay that somebody means may use another one.
    let other = match Path::new(NIXOS_SOCKET).exists() {
        true => {
            "; a relay runs on this machine: if it uses another database, give its --config, or --to in place of --add"
        }
        false => "",
    };
    eprintln!("adding to the database {}{other}", config.database_url());
    let store = Store::open(config.database_url().expose())
        .await
        .map_err(Failure::failed)?;
    let progress = Progress::steps("adding hosts", hosts.len() as u64);
    let mut outcomes = Vec::with_capacity(hosts.len());
    for host in hosts {
        outcomes.push(Some(match wanted(host, config) {
            Ok(host) => add_one(&store, &host, config).await?,
            Err(skipped) => skipped,
        }));
        progress.step();
    }
    store.close().await;
    Ok(outcomes)
}

async fn add_one(store: &Store, host: &HostName, config: &Config) -> Result<Outcome, Failure> {
    let bans = store.domain_bans().await.map_err(Failure::failed)?;
    let mut patterns = bans
        .iter()
        .filter_map(|ban| DomainPattern::banned(ban).ok());
    if patterns.any(|pattern| pattern.matches(host.domain())) {
        return Ok(Outcome::Skipped("its domain is banned"));
    }
    if store
        .host_by_name(host.name())
        .await
        .map_err(Failure::failed)?
        .is_some()
    {
        return Ok(Outcome::Known);
    }
    let limit = config.host_settings.account_limit(host);
    let host = NewHost {
        hostname: host.name().to_owned(),
        tls: host.tls(),
        trusted: config.host_settings.is_trusted(host),
        account_limit: i64::try_from(limit).unwrap_or(i64::MAX),
    };
    store.add_host(&host).await.map_err(Failure::failed)?;
    Ok(Outcome::Added)
}

/// A running relay and the right to add hosts to it.
#[derive(Clone)]
struct Target {
    /// What the operator calls it.
    name: String,
    url: Url,
    /// None is asked for at a Unix socket: who may connect to it is the operator.
    password: Option<Secret>,
    client: Client,
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.name)
    }
}

impl Target {
    /// The relay at `to`; where that is empty, at the admin listener of these settings.
    fn new(to: &str, config: &Config) -> Result<Target, Failure> {
        let name = if to.is_empty() {
            admin_listener(config)?
        } else {
            to.to_owned()
        };
        let client = atproto_relay::dial::plain_client_builder().timeout(REQUEST_TIMEOUT);
        let (client, url, password) = match name.strip_prefix(UNIX) {
            // The host of the URL is not looked at.
            Some(path) => (
                client.unix_socket(path),
                relay_url("http://localhost")?,
                None,
            ),
            None => {
                let password = config.admin_password.clone().ok_or_else(|| {
                    Failure::Usage(format!(
                        "--to {name} needs the admin password of that relay: set RELAY_ADMIN_PASSWORD or \
                         --admin-password-file, or give its admin socket as unix:PATH"
                    ))
                })?;
                (client, relay_url(&name)?, Some(password))
            }
        };
        let client = client
            .build()
            .map_err(|error| Failure::Failed(format!("cannot set up HTTP: {error}")))?;
        Ok(Target {
            name,
            url,
            password,
            client,
        })
    }

    /// A request to one of the operator's routes.
    async fn ask(
        &self,
        method: Method,
        path: &str,
        body: Option<Value>,
    ) -> Result<Response, Failure> {
        let mut url = self.url.clone();
        url.set_path(path);
        let mut request = self.client.request(method, url);
        if let Some(password) = &self.password {
            request = request.basic_auth("admin", Some(password.expose()));
        }
        if let Some(body) = body {
            request = request.json(&body);
        }
        let answer = request.send().await.map_err(|error| {
            Failure::Failed(format!(
                "the relay at {self} did not answer: {}",
                causes(&error)
            ))
        })?;
        match answer.status().as_u16() {
            status @ (401 | 403 | 404) => Err(Failure::Failed(format!(
                "the relay at {self} does not let us in (status {status}); check the admin password, and that the relay \
                 has one"
            ))),
            _ => Ok(answer),
        }
    }

    /// The hosts that the relay knows already.
    async fn known(&self) -> Result<HashSet<String>, Failure> {
        let answer = self.ask(Method::GET, "/admin/pds/list", None).await?;
        let hosts: Vec<Value> = answer.json().await.map_err(|error| {
            Failure::Failed(format!(
                "the relay at {self} lists its hosts in no form known here: {error}"
            ))
        })?;
        let names = hosts.iter().filter_map(|host| host["Host"].as_str());
        Ok(names.map(str::to_owned).collect())
    }

    async fn add(
        &self,
        hosts: &[RemoteHost],
        config: &Config,
    ) -> Result<Vec<Option<Outcome>>, Failure> {
        let known = self.known().await?;
        let progress = Progress::steps("asking the relay", hosts.len() as u64);
        let slots = Arc::new(Semaphore::new(CONCURRENT_REQUESTS));
        let mut requests = JoinSet::new();
        let mut outcomes = vec![None; hosts.len()];
        for (index, host) in hosts.iter().enumerate() {
            match wanted(host, config) {
                Ok(wanted) => {
                    let (target, slots) = (self.clone(), Arc::clone(&slots));
                    requests.spawn(async move {
                        let _slot = slots.acquire_owned().await;
                        (index, target.request_crawl(&wanted).await)
                    });
                }
                Err(skipped) => {
                    outcomes[index] = Some(skipped);
                    progress.step();
                }
            }
        }
        while let Some(answer) = requests.join_next().await {
            let (index, outcome) = answer.map_err(Failure::failed)?;
            let is_known = known.contains(&hosts[index].hostname.to_ascii_lowercase());
            outcomes[index] = Some(match outcome? {
                Outcome::Added if is_known => Outcome::Known,
                outcome => outcome,
            });
            progress.step();
        }
        Ok(outcomes)
    }

    async fn request_crawl(&self, host: &HostName) -> Result<Outcome, Failure> {
        let hostname = if host.tls() {
            host.name().to_owned()
        } else {
            host.http_url()
        };
        let body = json!({ "hostname": hostname });
        let answer = self
            .ask(Method::POST, "/admin/pds/requestCrawl", Some(body))
            .await?;
        match answer.status().as_u16() {
            200..=299 => Ok(Outcome::Added),
            status => {
                let body = answer.json::<Value>().await.unwrap_or_default();
                let message = body["message"]
                    .as_str()
                    .map_or_else(|| format!("status {status}"), str::to_owned);
                Ok(Outcome::Refused(message))
            }
        }
    }
}

/// The admin listener of these settings, as `--to` would name it.
fn admin_listener(config: &Config) -> Result<String, Failure> {
    match &config.admin_listen {
        Some(AdminListen::Tcp(address)) => Ok(format!("http://{address}")),
        Some(unix) => Ok(unix.to_string()),
        None if Path::new(NIXOS_SOCKET).exists() => Ok(format!("{UNIX}{NIXOS_SOCKET}")),
        None if config.admin_password.is_some() => Ok(format!("http://{}", config.listen)),
        None => Err(Failure::Usage(format!(
            "these settings name no admin listener, and there is no {NIXOS_SOCKET}: give the relay's configuration with \
             --config, or say --to unix:PATH or --to URL"
        ))),
    }
}

/// An error with all that caused it: the outermost only says that there was a request.
fn causes(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text.push_str(&format!(": {error}"));
        cause = error.source();
    }
    text
}

/// The base URL of a relay; a bare name means https, a bare localhost http.
fn relay_url(text: &str) -> Result<Url, Failure> {
    let usage = |error: &dyn std::fmt::Display| Failure::Usage(error.to_string());
    let host = HostName::parse(text.trim(), &Guard::new(true)).map_err(|error| usage(&error))?;
    Url::parse(&host.http_url()).map_err(|error| usage(&error))
}

fn lines(hosts: &[RemoteHost], outcomes: &[Option<Outcome>], as_json: bool) -> String {
    let mut text = String::new();
    for (host, outcome) in hosts.iter().zip(outcomes) {
        let outcome = outcome.as_ref().map(Outcome::describe);
        if as_json {
            let line = json!({
                "hostname": host.hostname,
                "status": host.status,
                "accountCount": host.account_count,
                "seq": host.seq,
                "outcome": outcome,
            });
            text.push_str(&line.to_string());
        } else {
            let status = host.status.as_deref().unwrap_or("unknown");
            let accounts = host
                .account_count
                .map_or_else(|| "?".to_owned(), |n| n.to_string());
            let shown = format!(
                "{:<48} {status:<10} {accounts:>9}  {}",
                host.hostname,
                outcome.unwrap_or_default()
            );
            text.push_str(printable(&shown).trim_end());
        }
        text.push('\n');
    }
    text
}

fn summary(outcomes: &[Option<Outcome>], place: &str) {
    let count =
        |wanted: fn(&Outcome) -> bool| outcomes.iter().flatten().filter(|o| wanted(o)).count();
    let added = count(|o| *o == Outcome::Added);
    let known = count(|o| *o == Outcome::Known);
    let refused = count(|o| matches!(o, Outcome::Refused(_)));
    let skipped = count(|o| matches!(o, Outcome::Skipped(_)));
    if outcomes.iter().any(Option::is_some) {
        eprintln!(
            "{added} added, {known} known before, {skipped} skipped, {refused} refused, {place}"
        );
    } else {
        let hosts = counted(outcomes.len() as u64, "host", "hosts");
        eprintln!("{hosts}; add them with --add or --to");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn host(hostname: &str, status: Option<&str>) -> RemoteHost {
        RemoteHost {
            hostname: hostname.into(),
            seq: None,
            account_count: Some(3),
            status: status.map(Into::into),
        }
    }

    #[test]
    fn only_public_and_living_hosts_are_wanted() {
        let config = Config::default();
        for (name, status, good) in [
            ("pds.example.com", Some("active"), true),
            ("pds.example.com", Some("idle"), true),
            ("pds.example.com", None, true),
            ("pds.example.com", Some("offline"), false),
            ("pds.example.com", Some("banned"), false),
            ("localhost:2583", Some("active"), false),
            ("10.0.0.1", Some("active"), false),
            ("not a host", Some("active"), false),
        ] {
            assert_eq!(
                wanted(&host(name, status), &config).is_ok(),
                good,
                "{name} {status:?}"
            );
        }
        let private = Config {
            allow_private_hosts: true,
            ..Config::default()
        };
        assert!(wanted(&host("localhost:2583", Some("active")), &private).is_ok());
    }

    #[test]
    fn a_hostile_name_cannot_drive_the_terminal() {
        let text = lines(&[host("a\x1b[2Jb\nc", Some("active"))], &[None], false);
        assert!(
            !text.contains('\x1b') && text.lines().count() == 1,
            "{text:?}"
        );
    }
}
