//! `check-config`: what `serve` would run with, and where each value is from. Connects to nothing.

use atproto_relay::config::{AdminListen, Loaded, Setting, settings};

use super::config_args::ConfigArgs;
use super::failure::Failure;
use super::output::write_all;

pub const LONG_ABOUT: &str = "\
Reads the configuration as `serve` would: the file, the environment, the flags and the secrets they \
name. Shows every setting with where its value is from, or the first mistake. Nothing is connected \
to or created. The output is a configuration file itself, except for passwords, which are not shown.";

pub fn run(args: &ConfigArgs) -> Result<(), Failure> {
    let loaded = args.load()?;
    for warning in &loaded.warnings {
        eprintln!("warning: {warning}");
    }
    write_all(describe(&loaded).as_bytes())?;
    Ok(())
}

/// `key = value  # origin` for each setting, as TOML with dotted keys.
fn describe(loaded: &Loaded) -> String {
    let mut text = String::new();
    let in_file = |setting: &Setting| setting.secret.is_some_and(|secret| secret.in_file);
    for setting in settings().iter().filter(|setting| !in_file(setting)) {
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
