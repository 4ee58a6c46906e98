//! The flags of the configuration, made from the table of settings, so that none is missing or
//! documented twice. Values are read by the configuration itself, with the file's and the
//! environment's, so that one mistake has one message wherever it is made.

use std::collections::BTreeMap;
use std::marker::PhantomData;
use std::path::PathBuf;

use clap::{Arg, ArgAction, ArgMatches, Args, Command, FromArgMatches, ValueHint, value_parser};

use atproto_relay::config::{
    Config, ConfigError, Environment, Flags, Group, Loaded, Setting, settings,
};

const CONFIG: &str = "config";

/// `--config` and all settings.
pub struct ConfigArgs(Flags);

impl ConfigArgs {
    /// The configuration of these flags, this process's environment, and the file they name.
    pub fn load(&self) -> Result<Loaded, ConfigError> {
        Config::load(&self.0, &Environment::current())
    }
}

/// Which settings the help of a command shows. It takes all of them.
pub trait Shows {
    const KEYS: &'static [&'static str];
}

/// For commands that only read the configuration.
pub struct NoSetting;

impl Shows for NoSetting {
    const KEYS: &'static [&'static str] = &[CONFIG];
}

/// For commands that open the data folder and the database.
pub struct Stored;

impl Shows for Stored {
    const KEYS: &'static [&'static str] = &[CONFIG, "data_dir", "database_url"];
}

/// For commands that add hosts, by the database or by a running relay.
pub struct Adding;

impl Shows for Adding {
    const KEYS: &'static [&'static str] = &[
        CONFIG,
        "data_dir",
        "database_url",
        "allow_private_hosts",
        "admin_password_file",
    ];
}

/// [`ConfigArgs`] with a short help.
pub struct FewArgs<S> {
    pub config: ConfigArgs,
    shows: PhantomData<S>,
}

impl<S> FromArgMatches for FewArgs<S> {
    fn from_arg_matches(matches: &ArgMatches) -> Result<FewArgs<S>, clap::Error> {
        Ok(FewArgs {
            config: ConfigArgs::from_arg_matches(matches)?,
            shows: PhantomData,
        })
    }

    fn update_from_arg_matches(&mut self, matches: &ArgMatches) -> Result<(), clap::Error> {
        self.config.update_from_arg_matches(matches)
    }
}

impl<S: Shows> Args for FewArgs<S> {
    fn augment_args(command: Command) -> Command {
        let all = ConfigArgs::augment_args(Command::new(""));
        all.get_arguments().fold(command, |command, argument| {
            let is_shown = S::KEYS.contains(&argument.get_id().as_str());
            // Hidden from both helps, so that they are one.
            let argument = argument.clone().hide(!is_shown).hide_short_help(false);
            command.arg(argument.help_heading("Settings, as in `atproto-relay serve --help`"))
        })
    }

    fn augment_args_for_update(command: Command) -> Command {
        FewArgs::<S>::augment_args(command)
    }
}

impl FromArgMatches for ConfigArgs {
    fn from_arg_matches(matches: &ArgMatches) -> Result<ConfigArgs, clap::Error> {
        let mut given = BTreeMap::new();
        for setting in settings() {
            if let Some(values) = matches.get_many::<String>(setting.key) {
                given.insert(setting.key, values.cloned().collect());
            }
        }
        Ok(ConfigArgs(Flags {
            config: matches.get_one::<PathBuf>(CONFIG).cloned(),
            settings: given,
        }))
    }

    fn update_from_arg_matches(&mut self, matches: &ArgMatches) -> Result<(), clap::Error> {
        *self = ConfigArgs::from_arg_matches(matches)?;
        Ok(())
    }
}

impl Args for ConfigArgs {
    fn augment_args(command: Command) -> Command {
        let command = command.arg(
            Arg::new(CONFIG)
                .long(CONFIG)
                .value_name("FILE")
                .value_parser(value_parser!(PathBuf))
                .value_hint(ValueHint::FilePath)
                .help_heading(Group::Common.heading())
                .help("TOML file with settings [env: RELAY_CONFIG]"),
        );
        settings()
            .iter()
            .fold(command, |command, setting| command.arg(argument(setting)))
    }

    fn augment_args_for_update(command: Command) -> Command {
        ConfigArgs::augment_args(command)
    }
}

fn argument(setting: &'static Setting) -> Arg {
    let help = format!(
        "{} [default: {}] [env: {}]",
        setting.help,
        setting.default,
        setting.variables[0].name()
    );
    let argument = Arg::new(setting.key)
        .long(setting.flag)
        .help(help)
        .help_heading(setting.group.heading())
        // `-h` shows what most operators set, `--help` everything.
        .hide_short_help(!matches!(setting.group, Group::Common | Group::Log));
    if setting.placeholder.is_empty() {
        return argument
            .num_args(0..=1)
            .require_equals(true)
            .default_missing_value("true")
            .value_name("BOOL");
    }
    let argument = argument
        .value_name(setting.placeholder)
        .value_hint(match setting.placeholder {
            "FILE" => ValueHint::FilePath,
            "FOLDER" => ValueHint::DirPath,
            _ => ValueHint::Unknown,
        });
    if setting.list {
        argument.action(ArgAction::Append)
    } else {
        argument
    }
}
