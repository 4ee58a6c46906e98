//! Where values come from: the environment and the TOML file, both as [`Raw`] values with their
//! origin. Knows nothing of single settings.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};

use toml::de::{DeTable, DeValue};

use super::error::{ConfigError, Origin};

/// Arrays in arrays make no sense in any setting; deeper ones are not followed.
const MAX_LIST_DEPTH: usize = 2;

/// A value as it was written, before a setting gave it a meaning.
#[derive(Debug, Clone, PartialEq)]
pub enum Raw {
    /// Text; flags and environment variables are always text.
    Text(String),
    /// An integer of the file.
    Integer(i64),
    /// A float of the file.
    Float(f64),
    /// A boolean of the file.
    Bool(bool),
    /// An array of the file, a repeated flag, or a variable split at commas.
    List(Vec<Raw>),
    /// Something no setting takes: a date, a table.
    Other(&'static str),
}

impl fmt::Display for Raw {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Raw::Text(text) => write!(f, "{text:?}"),
            Raw::Integer(number) => write!(f, "{number}"),
            Raw::Float(number) => write!(f, "{number}"),
            Raw::Bool(value) => write!(f, "{value}"),
            Raw::List(items) => {
                f.write_str("[")?;
                for (i, item) in items.iter().enumerate() {
                    let comma = if i == 0 { "" } else { ", " };
                    write!(f, "{comma}{item}")?;
                }
                f.write_str("]")
            }
            Raw::Other(kind) => f.write_str(kind),
        }
    }
}

/// A snapshot of the environment variables, so that reading a configuration has no hidden input.
#[derive(Clone, Default)]
pub struct Environment(BTreeMap<String, OsString>);

impl Environment {
    /// The environment of this process. Variables whose names are not UTF-8 are none of ours.
    pub fn current() -> Environment {
        Environment(
            std::env::vars_os()
                .filter_map(|(name, value)| Some((name.into_string().ok()?, value)))
                .collect(),
        )
    }

    /// The value of a variable; an empty one counts as not set.
    pub fn get(&self, name: &str) -> Option<&OsString> {
        self.0.get(name).filter(|value| !value.is_empty())
    }

    /// The names of all variables with this prefix, sorted.
    pub fn names_with_prefix<'a>(&'a self, prefix: &'a str) -> impl Iterator<Item = &'a str> {
        self.0
            .keys()
            .map(String::as_str)
            .filter(move |name| name.starts_with(prefix))
    }
}

impl<K: Into<String>, V: Into<OsString>> FromIterator<(K, V)> for Environment {
    fn from_iter<I: IntoIterator<Item = (K, V)>>(variables: I) -> Environment {
        Environment(
            variables
                .into_iter()
                .map(|(k, v)| (k.into(), v.into()))
                .collect(),
        )
    }
}

impl fmt::Debug for Environment {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Values may be secrets.
        f.debug_set().entries(self.0.keys()).finish()
    }
}

/// One `key = value` of the file; the key carries the names of its tables (`log.max_bytes`).
#[derive(Debug)]
pub struct FileEntry {
    /// The full key.
    pub key: String,
    /// The value.
    pub value: Raw,
    /// File and line.
    pub origin: Origin,
}

/// Reads a TOML file into its entries, in the order of their keys.
pub fn read_file(path: &Path) -> Result<Vec<FileEntry>, ConfigError> {
    let text = fs::read_to_string(path).map_err(|source| ConfigError::ReadFile {
        path: path.to_owned(),
        source,
    })?;
    let lines = Lines { path, text: &text };
    let table = DeTable::parse(&text).map_err(|error| ConfigError::Syntax {
        path: path.to_owned(),
        line: lines.line(error.span().map_or(0, |span| span.start)),
        message: error.message().replace('\n', "; "),
    })?;
    let mut entries = Vec::new();
    lines.collect("", table.into_inner(), &mut entries);
    Ok(entries)
}

struct Lines<'a> {
    path: &'a Path,
    text: &'a str,
}

impl Lines<'_> {
    fn line(&self, offset: usize) -> usize {
        let before = &self.text.as_bytes()[..offset.min(self.text.len())];
        1 + before.iter().filter(|byte| **byte == b'\n').count()
    }

    /// Settings are at most two tables deep, and the parser bounds nesting, so this recursion is short.
    fn collect(&self, prefix: &str, table: DeTable<'_>, entries: &mut Vec<FileEntry>) {
        for (name, value) in table {
            let line = self.line(name.span().start);
            let key = format!("{prefix}{}", name.get_ref());
            match value.into_inner() {
                DeValue::Table(table) => self.collect(&format!("{key}."), table, entries),
                value => entries.push(FileEntry {
                    key,
                    value: raw(value, 0),
                    origin: Origin::File {
                        path: PathBuf::from(self.path),
                        line,
                    },
                }),
            }
        }
    }
}

fn raw(value: DeValue<'_>, depth: usize) -> Raw {
    match value {
        DeValue::String(text) => Raw::Text(text.into_owned()),
        DeValue::Integer(number) => match i64::from_str_radix(number.as_str(), number.radix()) {
            Ok(number) => Raw::Integer(number),
            Err(_) => Raw::Other("an integer beyond 64 bits"),
        },
        DeValue::Float(number) => match number.as_str().parse() {
            Ok(number) => Raw::Float(number),
            Err(_) => Raw::Other("a float that is no number"),
        },
        DeValue::Boolean(value) => Raw::Bool(value),
        DeValue::Array(items) if depth < MAX_LIST_DEPTH => Raw::List(
            items
                .into_iter()
                .map(|item| raw(item.into_inner(), depth + 1))
                .collect(),
        ),
        DeValue::Array(_) => Raw::Other("an array in an array"),
        DeValue::Datetime(_) => Raw::Other("a date"),
        DeValue::Table(_) => Raw::Other("a table"),
    }
}
