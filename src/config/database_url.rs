//! The URL of the database, which may hold a password: printing it prints a placeholder in its place.
//! It is not wiped from memory when dropped.

use std::fmt;
use std::path::Path;

use url::Url;

/// `sqlite:PATH` or `postgres://…`. Printed without the password.
#[derive(Clone, PartialEq, Eq)]
pub struct DatabaseUrl(String);

impl DatabaseUrl {
    /// Checks the form of a database URL; the error never repeats the value.
    pub fn parse(text: &str) -> Result<DatabaseUrl, String> {
        if let Some(path) = text.strip_prefix("sqlite:") {
            let path = path.strip_prefix("//").unwrap_or(path);
            if path.is_empty() {
                return Err(
                    "has no path after `sqlite:`, as in sqlite:/var/lib/relay.sqlite".into(),
                );
            }
            return Ok(DatabaseUrl(text.to_owned()));
        }
        if text.starts_with("postgres://") || text.starts_with("postgresql://") {
            return match Url::parse(text) {
                Ok(url) if url.path().len() > 1 || url.query().is_some() => {
                    Ok(DatabaseUrl(text.to_owned()))
                }
                Ok(_) => Err("names no database, as in postgres://user@host/relay".into()),
                Err(error) => Err(format!("is not a URL ({error})")),
            };
        }
        Err("must begin with sqlite: or postgres://".into())
    }

    /// The default database: a file in the data folder.
    pub fn sqlite_in(data_dir: &Path) -> DatabaseUrl {
        let path = data_dir.join(super::SQLITE_FILE);
        DatabaseUrl(format!("sqlite:{}", path.display()))
    }

    /// The URL with its password, for opening the database.
    pub fn expose(&self) -> &str {
        &self.0
    }

    /// Whether the URL carries a password.
    pub fn has_password(&self) -> bool {
        self.redacted() != self.0
    }

    /// The URL as it may be shown: the password and secret-looking parameters replaced.
    pub fn redacted(&self) -> String {
        if self.0.starts_with("sqlite:") {
            return self.0.clone();
        }
        let Ok(mut url) = Url::parse(&self.0) else {
            return "(unreadable database URL)".to_owned();
        };
        if url.password().is_some() && url.set_password(Some("***")).is_err() {
            return "(unreadable database URL)".to_owned();
        }
        let secret_parameter = |name: &str| name.to_ascii_lowercase().contains("pass");
        if url.query_pairs().any(|(name, _)| secret_parameter(&name)) {
            let kept: Vec<(String, String)> = url
                .query_pairs()
                .map(|(name, value)| {
                    let value = if secret_parameter(&name) {
                        "***".into()
                    } else {
                        value
                    };
                    (name.into_owned(), value.into_owned())
                })
                .collect();
            url.query_pairs_mut().clear().extend_pairs(kept);
        }
        url.into()
    }
}

impl fmt::Debug for DatabaseUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.redacted())
    }
}

impl fmt::Display for DatabaseUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.redacted())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn printing_shows_no_password() {
        for url in [
            "postgres://relay:hunter2@db/relay",
            "postgres://relay@db/relay?password=hunter2&sslmode=require",
            "postgresql:///relay?user=relay&password=hunter2",
        ] {
            let url = DatabaseUrl::parse(url).unwrap();
            assert!(url.has_password());
            assert!(!format!("{url} {url:?}").contains("hunter2"), "{url}");
        }
        let plain = DatabaseUrl::parse("postgres:///relay?host=/run/postgresql").unwrap();
        assert!(!plain.has_password());
    }

    #[test]
    fn database_urls_are_checked_without_being_repeated() {
        for (text, problem) in [
            ("mysql://x/y", "must begin with"),
            ("sqlite:", "no path"),
            ("sqlite://", "no path"),
            ("postgres://user:geheim@host:notaport/db", "not a URL"),
            ("postgres://host", "names no database"),
        ] {
            let error = DatabaseUrl::parse(text).unwrap_err();
            assert!(error.contains(problem), "{text}: {error}");
            assert!(!error.contains("geheim"));
        }
        assert_eq!(
            DatabaseUrl::sqlite_in(Path::new("/var/lib/relay")).expose(),
            "sqlite:/var/lib/relay/relay.sqlite"
        );
    }
}
