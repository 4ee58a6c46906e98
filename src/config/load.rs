//! Merging: file, then environment, then flags, each over the one before; then the checks that need
//! several settings at once. Values that are overridden are checked all the same.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use super::error::{ConfigError, Origin};
use super::settings::{Setting, Variable, parse_bool, settings};
use super::source::{Environment, Raw, read_file};
use super::{AdminListen, Config, DatabaseUrl, Secret};

/// The key in the file that names the file with the admin password.
pub const ADMIN_PASSWORD_FILE_KEY: &str = "admin_password_file";
/// The variables that hold the admin password itself; the second is an older name of the reference relay.
pub const ADMIN_PASSWORD_ENV: [&str; 2] = ["RELAY_ADMIN_PASSWORD", "RELAY_ADMIN_KEY"];
/// The variable that names the file with the admin password.
const ADMIN_PASSWORD_FILE_ENV: &str = "RELAY_ADMIN_PASSWORD_FILE";
/// What the names of our variables begin with.
const PREFIX: &str = "RELAY_";
/// The variable that names the configuration file (read by the command line).
const CONFIG_FILE_ENV: &str = "RELAY_CONFIG";
/// Where systemd puts the credentials of a unit (systemd.exec(5)).
const CREDENTIALS_ENV: &str = "CREDENTIALS_DIRECTORY";
/// A password or URL is far shorter; a device or a log named by mistake is not read whole.
const MAX_SECRET_BYTES: u64 = 64 * 1024;
/// How like a known key an unknown one must be to be taken for it (Jaro-Winkler).
const SIMILAR: f64 = 0.75;

/// What the command line says. A switch counts as the text `true`.
#[derive(Debug, Clone, Default)]
pub struct Flags {
    /// `--config`.
    pub config: Option<PathBuf>,
    /// `--admin-password-file`.
    pub admin_password_file: Option<PathBuf>,
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
        let mut password = None;
        let file = config_file(flags, env);
        if let Some(path) = &file {
            password = merge.file(path)?;
        }
        password = merge.environment(env)?.or(password);
        merge.flags(flags)?;
        if let Some(path) = &flags.admin_password_file {
            let origin = Origin::Flag("admin-password-file".into());
            password = Some(PasswordSource::File(path.clone(), origin));
        }
        merge.credentials(env, password)?;
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

/// Where the admin password is to be read.
enum PasswordSource {
    Variable(&'static str, String),
    File(PathBuf, Origin),
}

#[derive(Default)]
struct Merge {
    config: Config,
    warnings: Vec<String>,
    origins: BTreeMap<&'static str, Origin>,
}

impl Merge {
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
                shown: (!setting.secret).then(|| raw.to_string()),
                problem,
            }),
        }
    }

    fn file(&mut self, path: &Path) -> Result<Option<PasswordSource>, ConfigError> {
        let mut password = None;
        for entry in read_file(path)? {
            if entry.key == ADMIN_PASSWORD_FILE_KEY {
                let Raw::Text(path) = entry.value else {
                    return Err(ConfigError::Value {
                        origin: entry.origin,
                        key: ADMIN_PASSWORD_FILE_KEY,
                        shown: None,
                        problem: "must be the path of a file, in quotes".into(),
                    });
                };
                password = Some(PasswordSource::File(path.into(), entry.origin));
            } else if let Some(setting) = settings().iter().find(|s| s.key == entry.key) {
                self.set(setting, &entry.value, entry.origin)?;
            } else {
                return Err(unknown_key(entry.key, entry.origin));
            }
        }
        Ok(password)
    }

    fn environment(&mut self, env: &Environment) -> Result<Option<PasswordSource>, ConfigError> {
        for setting in settings() {
            let Some((variable, value)) = setting
                .variables
                .iter()
                .find_map(|variable| Some((variable, env.get(variable.name())?)))
            else {
                continue;
            };
            let origin = Origin::Environment(variable.name().to_owned());
            let text = utf8(value, setting.key, &origin)?;
            if let Some(raw) = variable_value(variable, setting, text, &origin)? {
                self.set(setting, &raw, origin)?;
            }
        }
        self.warn_of_unknown_variables(env);
        password_in_environment(env)
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
            self.set(setting, &raw, Origin::Flag(setting.flag.to_owned()))?;
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

    /// Reads the admin password from where it was said to be, and what is still missing from systemd's credentials.
    fn credentials(
        &mut self,
        env: &Environment,
        password: Option<PasswordSource>,
    ) -> Result<(), ConfigError> {
        let folder = env.get(CREDENTIALS_ENV).map(PathBuf::from);
        let credential = |name: &str| {
            let path = folder.as_ref()?.join(name);
            // One that may not be looked at is no reason to go on without it.
            path.try_exists().unwrap_or(true).then_some(path)
        };
        let password = password.or_else(|| {
            let path = credential("admin-password")?;
            Some(PasswordSource::File(path.clone(), Origin::Credential(path)))
        });
        if let Some(source) = password {
            let (secret, origin) = match source {
                PasswordSource::Variable(name, secret) => {
                    (secret, Origin::Environment(name.to_owned()))
                }
                PasswordSource::File(path, origin) => {
                    (read_secret(&path, "admin password", &origin)?, origin)
                }
            };
            self.config.admin_password = Some(Secret::new(secret));
            self.origins.insert(ADMIN_PASSWORD_FILE_KEY, origin);
        }
        if self.config.database_url.is_none()
            && let Some(path) = credential("database-url")
        {
            let origin = Origin::Credential(path.clone());
            let text = read_secret(&path, "database URL", &origin)?;
            let url = DatabaseUrl::parse(&text).map_err(|problem| ConfigError::Value {
                origin: origin.clone(),
                key: "database_url",
                shown: None,
                problem,
            })?;
            self.config.database_url = Some(url);
            self.origins.insert("database_url", origin);
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
        if let Some(host) = config.hosts.iter().find(|host| !host.is_public())
            && !config.allow_private_hosts
        {
            return contradiction(
                "hosts",
                format!(
                    "the host {host} is not a public https host; correct it, \
                     or set allow_private_hosts (--allow-private-hosts) for a test network"
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
        if config.log_max_bytes < 2 * config.log_segment_bytes {
            let key = if self.origins.contains_key("log.max_bytes") {
                "log.max_bytes"
            } else {
                "log.segment_bytes"
            };
            return contradiction(
                key,
                format!(
                    "log.max_bytes ({}) must hold at least two segments of log.segment_bytes ({}); raise the one or lower the other",
                    super::format_bytes(config.log_max_bytes),
                    super::format_bytes(config.log_segment_bytes),
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
        let mut known = vec![CONFIG_FILE_ENV, ADMIN_PASSWORD_FILE_ENV];
        known.extend(ADMIN_PASSWORD_ENV);
        known.extend(
            settings()
                .iter()
                .flat_map(|s| s.variables)
                .map(Variable::name),
        );
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
        Variable::Value(_) => Ok(Some(Raw::Text(text.to_owned()))),
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

fn password_in_environment(env: &Environment) -> Result<Option<PasswordSource>, ConfigError> {
    let value = ADMIN_PASSWORD_ENV
        .iter()
        .find_map(|name| Some((*name, env.get(name)?)));
    let file = env.get(ADMIN_PASSWORD_FILE_ENV);
    match (value, file) {
        (Some((name, _)), Some(_)) => Err(ConfigError::Contradiction {
            origin: Origin::Environment(name.to_owned()),
            problem: format!("{ADMIN_PASSWORD_FILE_ENV} is set as well; set only one of the two"),
        }),
        (Some((name, value)), None) => {
            let origin = Origin::Environment(name.to_owned());
            let text = utf8(value, "the admin password", &origin)?;
            Ok(Some(PasswordSource::Variable(name, text.to_owned())))
        }
        (None, Some(path)) => Ok(Some(PasswordSource::File(
            path.into(),
            Origin::Environment(ADMIN_PASSWORD_FILE_ENV.to_owned()),
        ))),
        (None, None) => Ok(None),
    }
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
    if key == "admin_password" || key == "admin_key" {
        return ConfigError::UnknownKey {
            origin,
            key,
            nearest: Some(ADMIN_PASSWORD_FILE_KEY),
            secret: true,
        };
    }
    let known = settings()
        .iter()
        .map(|s| s.key)
        .chain([ADMIN_PASSWORD_FILE_KEY]);
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

/// The known name most like this one, if any is like it.
pub(crate) fn nearest<'a>(name: &str, known: impl Iterator<Item = &'a str>) -> Option<&'a str> {
    known
        .map(|k| (strsim::jaro_winkler(name, k), k))
        .filter(|(likeness, _)| *likeness >= SIMILAR)
        .max_by(|a, b| a.0.total_cmp(&b.0))
        .map(|(_, k)| k)
}
