//! The kinds of settings: how a value is read from the file, a flag or a variable, and written as in the file.
//! A reading function says what is wrong with a value; where it stands and whether it may be shown is added by the caller.

use std::fmt::Display;
use std::net::{Ipv6Addr, SocketAddr};
use std::ops::{Bound, RangeBounds};
use std::path::PathBuf;
use std::time::Duration;

use url::Url;

use super::source::Raw;
use super::units::{format_bytes, format_duration, parse_bytes, parse_duration};
use super::{AdminListen, DatabaseUrl};
use crate::api::Secret;
use crate::client::Cidr;
use crate::dial::{DomainPattern, Guard, HostName};
use crate::eventlog::MinFree;

/// What stands for no value.
const NONE: &str = "none";
/// What stands for a size that follows from the machine.
const AUTO: &str = "auto";
/// The room that the log leaves on a disk that it shares.
const SHARED: &str = "shared";

/// Reads a value, or says what is wrong with it.
type Read<T> = Box<dyn Fn(&Raw) -> Result<T, String> + Send + Sync>;

/// How the values of a setting are read and written.
pub(super) struct Kind<T> {
    /// What stands for the value in `--help`.
    pub placeholder: &'static str,
    /// Whether it takes several values.
    pub list: bool,
    pub read: Read<T>,
    pub write: Box<dyn Fn(&T) -> String + Send + Sync>,
}

impl<T> Kind<T> {
    fn new(
        placeholder: &'static str,
        read: impl Fn(&Raw) -> Result<T, String> + Send + Sync + 'static,
        write: impl Fn(&T) -> String + Send + Sync + 'static,
    ) -> Kind<T> {
        Kind {
            placeholder,
            list: false,
            read: Box::new(read),
            write: Box::new(write),
        }
    }
}

/// A number that a setting can have.
pub(super) trait Number: Copy {
    fn from_whole(whole: u64) -> Option<Self>;
    fn to_whole(self) -> u64;
}

macro_rules! number {
    ($($type:ty),+) => {
        $(impl Number for $type {
            fn from_whole(whole: u64) -> Option<$type> {
                whole.try_into().ok()
            }
            fn to_whole(self) -> u64 {
                self as u64
            }
        })+
    };
}

number!(u32, u64, usize);

impl Number for f64 {
    fn from_whole(whole: u64) -> Option<f64> {
        Some(whole as f64)
    }

    fn to_whole(self) -> u64 {
        self as u64
    }
}

/// A whole number within `range`.
pub(super) fn count<T: Number>(range: impl RangeBounds<u64>) -> Kind<T> {
    let (least, most) = ends(range, i64::MAX as u64);
    let read = move |raw: &Raw| {
        let number = match raw {
            Raw::Integer(number) => u64::try_from(*number).ok(),
            Raw::Text(text) => text.trim().parse().ok(),
            _ => None,
        };
        let within = number.filter(|number| (least..=most).contains(number));
        within.and_then(T::from_whole).ok_or_else(|| match most {
            most if most >= i64::MAX as u64 => {
                format!("must be a whole number, {least} or more")
            }
            most => format!("must be a whole number from {least} to {most}"),
        })
    };
    Kind::new("COUNT", read, |value| value.to_whole().to_string())
}

/// A size in bytes within `range`.
pub(super) fn size<T: Number>(range: impl RangeBounds<u64>) -> Kind<T> {
    let (least, most) = ends(range, u64::MAX);
    let read = move |raw: &Raw| {
        let size = bytes(raw)?;
        if size < least {
            return Err(format!("is too small; use {} or more", format_bytes(least)));
        }
        if size > most {
            return Err(format!("is too large; use {} or less", format_bytes(most)));
        }
        T::from_whole(size).ok_or_else(|| "is too large for this machine".to_owned())
    };
    Kind::new("SIZE", read, |value| {
        quoted(&format_bytes(value.to_whole()))
    })
}

/// The ends of a range, both of them in it.
fn ends(range: impl RangeBounds<u64>, unbounded: u64) -> (u64, u64) {
    let least = match range.start_bound() {
        Bound::Included(least) => *least,
        Bound::Excluded(below) => below + 1,
        Bound::Unbounded => 0,
    };
    let most = match range.end_bound() {
        Bound::Included(most) => *most,
        Bound::Excluded(above) => above - 1,
        Bound::Unbounded => unbounded,
    };
    (least, most)
}

fn bytes(raw: &Raw) -> Result<u64, String> {
    match raw {
        Raw::Text(text) => parse_bytes(text),
        Raw::Integer(size) => u64::try_from(*size).map_err(|_| "must be 0 or more".to_owned()),
        _ => Err("must be a size, as in \"200GB\"".into()),
    }
}

/// The free space that the log leaves: a size, or a word for one that follows from the machine.
pub(super) fn min_free() -> Kind<MinFree> {
    let read = |raw: &Raw| match raw {
        Raw::Text(text) if text.trim() == AUTO => Ok(MinFree::OwnDisk),
        Raw::Text(text) if text.trim() == SHARED => Ok(MinFree::SharedDisk),
        raw => bytes(raw).map(MinFree::Bytes),
    };
    let write = |value: &MinFree| {
        quoted(&match value {
            MinFree::OwnDisk => AUTO.to_owned(),
            MinFree::SharedDisk => SHARED.to_owned(),
            MinFree::Bytes(bytes) => format_bytes(*bytes),
        })
    };
    Kind::new("SIZE", read, write)
}

/// A number, 0 or more.
pub(super) fn rate() -> Kind<f64> {
    Kind::new("RATE", number, f64::to_string)
}

/// A number above 0.
pub(super) fn positive_rate() -> Kind<f64> {
    let read = |raw: &Raw| match number(raw) {
        Ok(number) if number > 0.0 => Ok(number),
        _ => Err("must be a number above 0".into()),
    };
    Kind::new("RATE", read, f64::to_string)
}

fn number(raw: &Raw) -> Result<f64, String> {
    let number = match raw {
        Raw::Integer(number) => Some(*number as f64),
        Raw::Float(number) => Some(*number),
        Raw::Text(text) => text.trim().parse().ok(),
        _ => None,
    };
    number
        .filter(|n: &f64| n.is_finite() && *n >= 0.0)
        .ok_or_else(|| "must be a number, 0 or more".into())
}

/// A time of at most `most`.
pub(super) fn time(most: Duration) -> Kind<Duration> {
    let read = move |raw: &Raw| match duration(raw)? {
        time if time > most => Err(format!(
            "is too long; use {} or less",
            format_duration(most)
        )),
        time => Ok(time),
    };
    Kind::new("TIME", read, |time| quoted(&format_duration(*time)))
}

/// A time that is not zero.
pub(super) fn positive_time() -> Kind<Duration> {
    let read = |raw: &Raw| match duration(raw)? {
        Duration::ZERO => Err("must be longer than zero".into()),
        time => Ok(time),
    };
    Kind::new("TIME", read, |time| quoted(&format_duration(*time)))
}

fn duration(raw: &Raw) -> Result<Duration, String> {
    match raw {
        Raw::Text(text) => parse_duration(text),
        Raw::Integer(_) | Raw::Float(_) => Err("has no unit; write it as in \"72h\"".into()),
        _ => Err("must be a time, as in \"72h\"".into()),
    }
}

/// A switch: its flag alone means true.
pub(super) fn switch() -> Kind<bool> {
    Kind {
        placeholder: "",
        ..boolean()
    }
}

/// True or false.
pub(super) fn boolean() -> Kind<bool> {
    let read = |raw: &Raw| {
        let value = match raw {
            Raw::Bool(value) => Some(*value),
            Raw::Text(text) => parse_bool(text),
            _ => None,
        };
        value.ok_or_else(|| "must be true or false".into())
    };
    Kind::new("BOOL", read, bool::to_string)
}

/// The words for true and false that flags and variables take.
pub(super) fn parse_bool(text: &str) -> Option<bool> {
    match text.trim().to_ascii_lowercase().as_str() {
        "true" | "1" | "yes" | "on" | "t" => Some(true),
        "false" | "0" | "no" | "off" | "f" => Some(false),
        _ => None,
    }
}

/// One of several values, by its word.
pub(super) fn choice<T: Copy + Send + Sync + 'static, const N: usize>(
    placeholder: &'static str,
    all: [T; N],
    word: fn(T) -> &'static str,
) -> Kind<T> {
    let read = move |raw: &Raw| {
        let text = text(raw)?;
        let chosen = all.into_iter().find(|value| word(*value) == text);
        chosen.ok_or_else(|| format!("must be one of {}", all.map(word).join(", ")))
    };
    Kind::new(placeholder, read, move |value| quoted(word(*value)))
}

pub(super) fn folder() -> Kind<PathBuf> {
    let read = |raw: &Raw| text(raw).map(PathBuf::from);
    Kind::new("FOLDER", read, |path: &PathBuf| quoted(&path.display()))
}

/// A password, exactly as it stands in its file.
pub(super) fn password() -> Kind<Option<Secret>> {
    let read = |raw: &Raw| match raw {
        Raw::Text(password) => Ok(Some(Secret::new(password))),
        _ => Err("must be text".into()),
    };
    let write = |password: &Option<Secret>| match password {
        Some(_) => "(secret)".to_owned(),
        None => NONE.to_owned(),
    };
    Kind::new("FILE", read, write)
}

/// A database. It is written without its password.
pub(super) fn database() -> Kind<Option<DatabaseUrl>> {
    let read = |raw: &Raw| DatabaseUrl::parse(text(raw)?).map(Some);
    let write = |url: &Option<DatabaseUrl>| match url {
        Some(url) => quoted(url),
        None => quoted(NONE),
    };
    Kind::new("URL", read, write)
}

pub(super) fn address() -> Kind<SocketAddr> {
    Kind::new("ADDRESS", socket_address, quoted)
}

/// `IP:PORT`, `localhost:PORT`, or `:PORT` for every address of the machine.
fn socket_address(raw: &Raw) -> Result<SocketAddr, String> {
    let text = text(raw)?;
    let spelled = match text.strip_prefix("localhost:") {
        Some(port) => format!("127.0.0.1:{port}"),
        None => match text.strip_prefix(':') {
            Some(port) => format!("[{}]:{port}", Ipv6Addr::UNSPECIFIED),
            None => text.to_owned(),
        },
    };
    spelled
        .parse()
        .map_err(|_| "must be an address and a port, as in 127.0.0.1:2470 or :2470".into())
}

pub(super) fn admin_listener() -> Kind<Option<AdminListen>> {
    let read = |raw: &Raw| match raw {
        Raw::Text(text) if text.trim() == NONE => Ok(None),
        raw => AdminListen::parse(text(raw)?, || socket_address(raw)).map(Some),
    };
    let write = |listener: &Option<AdminListen>| match listener {
        Some(listener) => quoted(listener),
        None => quoted(NONE),
    };
    Kind::new("ADDRESS", read, write)
}

/// An http or https URL without path, query and user; a bare name means https.
pub(super) fn base_url() -> Kind<Url> {
    let write = |url: &Url| quoted(url.as_str().trim_end_matches('/'));
    Kind::new("URL", |raw| parse_base_url(text(raw)?), write)
}

fn parse_base_url(text: &str) -> Result<Url, String> {
    const FORM: &str = "as in https://plc.directory";
    let spelled = if text.contains("://") {
        text.to_owned()
    } else {
        format!("https://{text}")
    };
    let url = Url::parse(&spelled).map_err(|error| format!("is not a URL ({error}), {FORM}"))?;
    if !matches!(url.scheme(), "http" | "https") {
        return Err(format!("must be an http or https URL, {FORM}"));
    }
    let bare = url.username().is_empty() && url.password().is_none();
    if !bare || url.path().len() > 1 || url.query().is_some() || url.fragment().is_some() {
        return Err(format!("must be only a scheme, a host and a port, {FORM}"));
    }
    Ok(url)
}

/// Several values, or one.
fn list<T: Display + 'static>(
    placeholder: &'static str,
    read: impl Fn(&Raw) -> Result<Vec<T>, String> + Send + Sync + 'static,
) -> Kind<Vec<T>> {
    let write = |items: &Vec<T>| in_brackets(items.iter());
    Kind {
        list: true,
        ..Kind::new(placeholder, read, write)
    }
}

/// Hosts. Whether they may be dialled depends on another setting and is checked when all are read.
pub(super) fn hosts() -> Kind<Vec<HostName>> {
    let read = |text: &str| {
        HostName::parse(text, &Guard::new(true))
            .map_err(|error| format!("has an entry that cannot be used: {error}"))
    };
    Kind {
        write: Box::new(|hosts| in_brackets(hosts.iter().map(HostName::http_url))),
        ..list("HOST", move |raw| each(raw, read))
    }
}

/// Domains, each read by `parse`.
pub(super) fn domains(
    parse: fn(&str) -> Result<DomainPattern, String>,
) -> Kind<Vec<DomainPattern>> {
    list("DOMAIN", move |raw| each(raw, parse))
}

/// Networks, also several in one text, separated by commas; the word none alone is no network.
pub(super) fn networks() -> Kind<Vec<Cidr>> {
    let read = |raw: &Raw| {
        let texts = each(raw, |text| Ok(text.to_owned()))?;
        if texts == [NONE] {
            return Ok(Vec::new());
        }
        let networks = texts.iter().flat_map(|text| text.split(','));
        networks.map(|text| Cidr::parse(text.trim())).collect()
    };
    list("ADDRESS", read)
}

fn each<T>(raw: &Raw, parse: impl Fn(&str) -> Result<T, String>) -> Result<Vec<T>, String> {
    match raw {
        Raw::List(items) => items.iter().map(|item| parse(text(item)?)).collect(),
        single => Ok(vec![parse(text(single)?)?]),
    }
}

/// A level, or tracing directives. A single unknown word would silence everything, so it is refused.
pub(super) fn directives() -> Kind<String> {
    Kind::new("LEVEL", |raw| log_level(text(raw)?), quoted)
}

fn log_level(text: &str) -> Result<String, String> {
    const FORM: &str = "must be error, warn, info, debug, trace or directives such as info,atproto_relay::upstream=debug";
    const LEVELS: [&str; 6] = ["off", "error", "warn", "info", "debug", "trace"];
    let lower = text.to_ascii_lowercase();
    if LEVELS.contains(&lower.as_str()) {
        return Ok(lower);
    }
    let directives = text.contains('=') && tracing_subscriber::EnvFilter::try_new(text).is_ok();
    if directives {
        Ok(text.to_owned())
    } else {
        Err(FORM.into())
    }
}

fn in_brackets(items: impl Iterator<Item = impl Display>) -> String {
    let items: Vec<String> = items.map(|item| quoted(&item)).collect();
    format!("[{}]", items.join(", "))
}

/// A value in quotes, as TOML has text.
pub(super) fn quoted<T: Display + ?Sized>(value: &T) -> String {
    format!("{:?}", value.to_string())
}

fn text(raw: &Raw) -> Result<&str, String> {
    match raw {
        Raw::Text(text) if text.trim().is_empty() => Err("is empty".into()),
        Raw::Text(text) => Ok(text.trim()),
        _ => Err("must be text, in quotes".into()),
    }
}
