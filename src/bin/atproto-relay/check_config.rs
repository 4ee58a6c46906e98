//! `check-config`: what `serve` would run with, and where each value is from. Connects to nothing.

use clap::Args;
use serde_json::{Map, Value, json};

use atproto_relay::config::{AdminListen, Loaded, Setting, settings};

use super::config_args::{FewArgs, NoSetting};
use super::failure::Failure;
use super::output::write_all;

pub const LONG_ABOUT: &str = "\
Reads the configuration as `serve` would: the file, the environment, the flags and the secrets they \
name. Shows every setting with where its value comes from, or the first mistake. Connects to nothing and \
creates nothing. The output is a configuration file itself, except for passwords, which are not shown.";

#[derive(Args)]
pub struct CheckConfigArgs {
    /// Print a JSON object
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    settings: FewArgs<NoSetting>,
}

pub fn run(args: &CheckConfigArgs) -> Result<(), Failure> {
    let loaded = args.settings.config.load()?;
    for warning in &loaded.warnings {
        eprintln!("warning: {warning}");
    }
    let text = match args.json {
        true => format!("{}\n", as_json(&loaded)),
        false => describe(&loaded),
    };
    write_all(text.as_bytes())?;
    Ok(())
}

/// Each setting by its key in the file, with its value and where that is from.
fn as_json(loaded: &Loaded) -> Value {
    let entry = |key| {
        let origin = loaded.origin(key).to_string();
        move |value: Value| json!({ "value": value, "origin": origin })
    };
    let settings: Map<String, Value> = shown()
        .map(|setting| {
            let value = from_toml(&(setting.show)(&loaded.config));
            (setting.key.to_owned(), entry(setting.key)(value))
        })
        .collect();
    let password = loaded.config.admin_password.as_ref();
    let password = password.map(|_| loaded.origin("admin_password_file").to_string());
    json!({
        "settings": settings,
        "adminPasswordOrigin": password,
        "warnings": loaded.warnings,
    })
}

/// A value as it stands in the file.
fn from_toml(value: &str) -> Value {
    let table: Option<toml::Table> = toml::from_str(&format!("value = {value}")).ok();
    let value = table.and_then(|mut table| table.remove("value"));
    value
        .and_then(|value| serde_json::to_value(value).ok())
        .unwrap_or(Value::Null)
}

/// The settings that have a value to show: of a secret in a file of its own, only the origin is told.
fn shown() -> impl Iterator<Item = &'static Setting> {
    let in_file = |setting: &Setting| setting.secret.is_some_and(|secret| secret.in_file);
    settings().iter().filter(move |setting| !in_file(setting))
}

/// `key = value  # origin` for each setting, as TOML with dotted keys.
fn describe(loaded: &Loaded) -> String {
    let mut text = String::new();
    for setting in shown() {
        let assignment = format!("{} = {}", setting.key, (setting.show)(&loaded.config));
        text.push_str(&format!(
            "{assignment:<58} # {}\n",
            loaded.origin(setting.key)
        ));
    }
    let password = loaded.config.admin_password.as_ref();
    text.push_str(&match (password, &loaded.config.admin_listen) {
        (Some(_), _) => format!(
            "# admin API: on, password from {}\n",
            loaded.origin("admin_password_file")
        ),
        (None, Some(AdminListen::Unix(path))) => format!(
            "# admin API: on at unix:{} alone, because no password is configured\n",
            path.display()
        ),
        (None, _) => "# admin API: off, because no password is configured\n".to_owned(),
    });
    text
}
