//! Merging: file, then environment, then flags, each over the one before; then the checks that need
//! several settings at once. Values that are overridden are checked all the same.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use super::error::{ConfigError, Origin};
use super::kinds::parse_bool;
use super::settings::{Setting, Variable, settings};
use super::source::{Environment, Raw, read_file};
use super::{AdminListen, Config};
use crate::api::nearest;
use crate::dial::{Guard, HostName};

/// What the names of our variables begin with.
const PREFIX: &str = "RELAY_";
/// The variable that names the configuration file (read by the command line).
const CONFIG_FILE_ENV: &str = "RELAY_CONFIG";
/// Where systemd puts the credentials of a unit (systemd.exec(5)).
const CREDENTIALS_ENV: &str = "CREDENTIALS_DIRECTORY";
/// A password or URL is far shorter; a device or a log named by mistake is not read whole.
const MAX_SECRET_BYTES: u64 = 64 * 1024;

/// What the command line says. A switch counts as the text `true`.
#[derive(Debug, Clone, Default)]
pub struct Flags {
    /// `--config`.
    pub config: Option<PathBuf>,
    /// The values of each setting's flag, by the setting's key.
    pub settings: BTreeMap<&'static str, Vec<String>>,
}

/// A configuration and where it came from.
#[derive(Debug)]
pub struct Loaded {
    /// The merged settings.
    pub config: Config,
    /// What deserves a word but stops nothing, for the log.
    pub warnings: Vec<String>,
    /// The file that was read, if there is one.
    pub file: Option<PathBuf>,
    origins: BTreeMap<&'static str, Origin>,
}

impl Loaded {
    /// Where a setting's value came from.
    pub fn origin(&self, key: &str) -> Origin {
        self.origins.get(key).cloned().unwrap_or(Origin::Default)
    }
}

impl Config {
    /// Merges flags over the environment over the file over the defaults, and checks everything.
    ///
    /// The file is `flags.config`, else `RELAY_CONFIG`, else none. Nothing is created or connected to.
    pub fn load(flags: &Flags, env: &Environment) -> Result<Loaded, ConfigError> {
        let mut merge = Merge::default();
        let file = config_file(flags, env);
        if let Some(path) = &file {
            merge.file(path)?;
        }
        merge.environment(env)?;
        merge.flags(flags)?;
        merge.secrets(env)?;
        merge.check()?;
        merge.warn_of_open_proxies();
        Ok(merge.finish(file))
    }
}

fn config_file(flags: &Flags, env: &Environment) -> Option<PathBuf> {
    flags
        .config
        .clone()
        .or_else(|| env.get(CONFIG_FILE_ENV).map(PathBuf::from))
}

#[derive(Default)]
struct Merge {
    config: Config,
    warnings: Vec<String>,
    origins: BTreeMap<&'static str, Origin>,
    /// Files with secrets, by the key of the setting. They are read when it is known which of them count.
    files: BTreeMap<&'static str, (PathBuf, Origin)>,
}

impl Merge {
    /// Takes a value as key and flag have it: that of a secret may be the name of a file.
    fn take(
        &mut self,
        setting: &'static Setting,
        raw: &Raw,
        origin: Origin,
    ) -> Result<(), ConfigError> {
        if !setting.secret.is_some_and(|secret| secret.in_file) {
            return self.set(setting, raw, origin);
        }
        let Raw::Text(path) = raw else {
            return Err(ConfigError::Value {
                origin,
                key: setting.key,
                shown: None,
                problem: "must be the path of a file, in quotes".into(),
            });
        };
        self.files.insert(setting.key, (path.into(), origin));
        Ok(())
    }

    fn set(
        &mut self,
        setting: &'static Setting,
        raw: &Raw,
        origin: Origin,
    ) -> Result<(), ConfigError> {
        match (setting.set)(&mut self.config, raw) {
            Ok(()) => {
                self.origins.insert(setting.key, origin);
                Ok(())
            }
            Err(problem) => Err(ConfigError::Value {
                origin,
                key: setting.key,
                shown: setting.secret.is_none().then(|| raw.to_string()),
                problem,
            }),
        }
    }

    fn file(&mut self, path: &Path) -> Result<(), ConfigError> {
        for entry in read_file(path)? {
            match settings().iter().find(|s| s.key == entry.key) {
                Some(setting) => self.take(setting, &entry.value, entry.origin)?,
                None => return Err(unknown_key(entry.key, entry.origin)),
            }
        }
        Ok(())
    }

    fn environment(&mut self, env: &Environment) -> Result<(), ConfigError> {
        for setting in settings() {
            let is_set = |variable: &&Variable| env.get(variable.name()).is_some();
            let mut set = setting.variables.iter().filter(is_set);
            let Some(variable) = set.next() else {
                continue;
            };
            let origin = Origin::Environment(variable.name().to_owned());
            if let Some(secret) = set.find(|other| is_secret(other) != is_secret(variable)) {
                return Err(ConfigError::Contradiction {
                    origin: Origin::Environment(secret.name().to_owned()),
                    problem: format!(
                        "{} is set as well; set only one of the two",
                        variable.name()
                    ),
                });
            }
            let value = env.get(variable.name()).map_or(OsStr::new(""), |v| v);
            let text = utf8(value, setting.key, &origin)?;
            match variable_value(variable, setting, text, &origin)? {
                Some(secret) if is_secret(variable) => {
                    self.files.remove(setting.key);
                    self.set(setting, &secret, origin)?;
                }
                Some(raw) => self.take(setting, &raw, origin)?,
                None => {}
            }
        }
        self.warn_of_unknown_variables(env);
        Ok(())
    }

    fn flags(&mut self, flags: &Flags) -> Result<(), ConfigError> {
        for setting in settings() {
            let Some(values) = flags.settings.get(setting.key).filter(|v| !v.is_empty()) else {
                continue;
            };
            let raw = if setting.list {
                Raw::List(values.iter().cloned().map(Raw::Text).collect())
            } else {
                Raw::Text(values[values.len() - 1].clone())
            };
            self.take(setting, &raw, Origin::Flag(setting.flag.to_owned()))?;
        }
        let on_command_line = matches!(self.origins.get("database_url"), Some(Origin::Flag(_)));
        if on_command_line && self.config.database_url().has_password() {
            self.warnings.push(
                "--database-url has a password that every user of this machine can read in the process list; \
                 put it in DATABASE_URL or in the systemd credential `database-url`"
                    .into(),
            );
        }
        Ok(())
    }

    /// Reads secrets from their files, and those that nothing else sets from systemd's credentials.
    fn secrets(&mut self, env: &Environment) -> Result<(), ConfigError> {
        let folder = env.get(CREDENTIALS_ENV).map(PathBuf::from);
        let credential = |name: &str| {
            let path = folder.as_ref()?.join(name);
            // One that cannot be examined is an error when it is read, not a reason to go on without it.
            path.try_exists().unwrap_or(true).then_some(path)
        };
        for setting in settings() {
            let Some(secret) = &setting.secret else {
                continue;
            };
            let unset = !self.origins.contains_key(setting.key);
            let from_file = self.files.remove(setting.key).or_else(|| {
                let path = credential(secret.credential).filter(|_| unset)?;
                Some((path.clone(), Origin::Credential(path)))
            });
            if let Some((path, origin)) = from_file {
                let text = read_secret(&path, secret.what, &origin)?;
                self.set(setting, &Raw::Text(text), origin)?;
            }
        }
        Ok(())
    }

    /// What one setting alone cannot tell.
    fn check(&self) -> Result<(), ConfigError> {
        let config = &self.config;
        let contradiction = |key: &str, problem: String| {
            let origin = self.origins.get(key).cloned().unwrap_or(Origin::Default);
            Err(ConfigError::Contradiction { origin, problem })
        };
        let private =
            |host: &&HostName| host.check(&Guard::new(config.allow_private_hosts)).is_err();
        if let Some(host) = config.hosts.iter().find(private) {
            return contradiction(
                "hosts",
                format!(
                    "the host {} is not a public https host; correct it, \
                     or set allow_private_hosts (--allow-private-hosts) for a test network",
                    host.http_url()
                ),
            );
        }
        if config.listen.port() != 0 && config.listen == config.metrics_listen {
            return contradiction(
                "metrics_listen",
                format!(
                    "listen and metrics_listen are both {}; give them different ports",
                    config.listen
                ),
            );
        }
        if let Some(AdminListen::Tcp(address)) = config.admin_listen
            && config.admin_password.is_none()
        {
            return contradiction(
                "admin_listen",
                format!(
                    "admin_listen is {address}, where everybody who reaches it would be the operator; \
                     set an admin password (--admin-password-file), or use unix:PATH"
                ),
            );
        }
        if config.log.max_bytes < 2 * config.log.segment_bytes {
            let key = if self.origins.contains_key("log.max_bytes") {
                "log.max_bytes"
            } else {
                "log.segment_bytes"
            };
            return contradiction(
                key,
                format!(
                    "log.max_bytes ({}) must hold at least two segments of log.segment_bytes ({}); raise the one or lower the other",
                    super::format_bytes(config.log.max_bytes),
                    super::format_bytes(config.log.segment_bytes),
                ),
            );
        }
        Ok(())
    }

    /// Who trusts everybody lets everybody be anybody, and no limit per address holds.
    fn warn_of_open_proxies(&mut self) {
        let proxies = &self.config.trusted_proxies;
        if let Some(everybody) = proxies.iter().find(|network| network.is_everything()) {
            self.warnings.push(format!(
                "trusted_proxies has {everybody}: every client may name any address as its own; name the networks of \
                 your proxies alone"
            ));
        }
    }

    /// A variable we do not know is a warning, not an error: containers and orchestrators set
    /// variables of their own (`RELAY_PORT_2470_TCP`), and the reference relay has some more.
    fn warn_of_unknown_variables(&mut self, env: &Environment) {
        let variables = settings().iter().flat_map(|s| &s.variables);
        let known: Vec<&str> = variables
            .map(Variable::name)
            .chain([CONFIG_FILE_ENV])
            .collect();
        for name in env.names_with_prefix(PREFIX) {
            if known.contains(&name) {
                continue;
            }
            // Compared without the prefix, which makes all of them alike.
            let bare = known.iter().filter_map(|k| k.strip_prefix(PREFIX));
            let hint = match nearest(&name[PREFIX.len()..], bare) {
                Some(near) => format!("; did you mean {PREFIX}{near}?"),
                None => String::new(),
            };
            self.warnings.push(format!(
                "the environment variable {name} is no setting and is ignored{hint}"
            ));
        }
    }

    fn finish(self, file: Option<PathBuf>) -> Loaded {
        Loaded {
            config: self.config,
            warnings: self.warnings,
            file,
            origins: self.origins,
        }
    }
}

fn utf8<'a>(value: &'a OsStr, key: &'static str, origin: &Origin) -> Result<&'a str, ConfigError> {
    value.to_str().ok_or_else(|| ConfigError::Value {
        origin: origin.clone(),
        key,
        shown: None,
        problem: "is not UTF-8 text".into(),
    })
}

fn variable_value(
    variable: &Variable,
    setting: &'static Setting,
    text: &str,
    origin: &Origin,
) -> Result<Option<Raw>, ConfigError> {
    match variable {
        Variable::Value(_) if setting.list => Ok(Some(Raw::List(
            text.split(',')
                .map(str::trim)
                .filter(|item| !item.is_empty())
                .map(|item| Raw::Text(item.to_owned()))
                .collect(),
        ))),
        Variable::Value(_) | Variable::Secret(_) => Ok(Some(Raw::Text(text.to_owned()))),
        Variable::Switch(_, meaning) => match parse_bool(text) {
            Some(true) => Ok(Some(Raw::Text((*meaning).to_owned()))),
            Some(false) => Ok(None),
            None => Err(ConfigError::Value {
                origin: origin.clone(),
                key: setting.key,
                shown: Some(format!("{text:?}")),
                problem: "must be true or false".into(),
            }),
        },
    }
}

fn is_secret(variable: &Variable) -> bool {
    matches!(variable, Variable::Secret(_))
}

/// Reads a secret from a file: all of it but the line break at its end.
fn read_secret(path: &Path, what: &'static str, origin: &Origin) -> Result<String, ConfigError> {
    let failed = |source: io::Error| ConfigError::ReadSecret {
        origin: origin.clone(),
        what,
        path: path.to_owned(),
        source,
    };
    let mut text = String::new();
    let file = File::open(path).map_err(failed)?;
    file.take(MAX_SECRET_BYTES + 1)
        .read_to_string(&mut text)
        .map_err(failed)?;
    let secret = text.trim_end_matches(['\r', '\n']);
    let problem = if text.len() as u64 > MAX_SECRET_BYTES {
        "holds more than 64 KiB"
    } else if secret.is_empty() {
        "is empty"
    } else {
        return Ok(secret.to_owned());
    };
    Err(ConfigError::Contradiction {
        origin: origin.clone(),
        problem: format!(
            "the file {} with the {what} {problem}; write only the {what} into it",
            path.display()
        ),
    })
}

fn unknown_key(key: String, origin: Origin) -> ConfigError {
    let variable = format!("{PREFIX}{}", key.to_uppercase());
    let holds_secret = |v: &Variable| is_secret(v) && v.name() == variable;
    if let Some(setting) = settings()
        .iter()
        .find(|s| s.variables.iter().any(holds_secret))
    {
        return ConfigError::UnknownKey {
            origin,
            key,
            nearest: Some(setting.key),
            secret: true,
        };
    }
    let known = settings().iter().map(|s| s.key);
    // A key in the wrong table has the right last part.
    let last = key.rsplit('.').next().unwrap_or_default();
    let moved = known.clone().find(|k| k.rsplit('.').next() == Some(last));
    // Flags and variables have other spellings than keys: `host`, `log-max-bytes`, `trusted_domain`.
    let flag = key.replace('_', "-");
    let as_flag = settings().iter().find(|s| s.flag == flag).map(|s| s.key);
    let nearest = as_flag.or(moved).or_else(|| nearest(&key, known));
    ConfigError::UnknownKey {
        origin,
        key,
        nearest,
        secret: false,
    }
}
