//! Which events are shown: by kind, by account, by the collection of an op. Looks at what frames say, verified or not.

use std::str::FromStr;

use atproto_relay::atproto::did::Did;
use atproto_relay::atproto::frame::{Kind, Message};
use atproto_relay::atproto::nsid::MAX_NSID_BYTES;

/// What a pattern ends with that means all collections below a name.
const BELOW: &str = ".*";

/// A collection, or all collections below a name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Collection {
    /// `app.bsky.feed.post`
    Exactly(String),
    /// `app.bsky.feed.*`, kept with its last dot.
    Below(String),
}

impl FromStr for Collection {
    type Err = String;

    fn from_str(text: &str) -> Result<Collection, String> {
        const FORM: &str =
            "give a collection or all below a name, as in app.bsky.feed.post or app.bsky.feed.*";
        let name = text.strip_suffix(BELOW).unwrap_or(text);
        let is_part = |part: &str| {
            !part.is_empty() && part.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-')
        };
        if text.len() > MAX_NSID_BYTES || !name.split('.').all(is_part) {
            return Err(FORM.to_owned());
        }
        Ok(match text.len() == name.len() {
            true => Collection::Exactly(name.to_owned()),
            false => Collection::Below(format!("{name}.")),
        })
    }
}

impl Collection {
    fn has(&self, collection: &str) -> bool {
        match self {
            Collection::Exactly(name) => name == collection,
            Collection::Below(prefix) => collection.starts_with(prefix.as_str()),
        }
    }
}

/// A kind of event by its name, with or without its #.
pub fn kind(text: &str) -> Result<Kind, String> {
    let name = text.strip_prefix('#').unwrap_or(text);
    Kind::ALL
        .into_iter()
        .find(|kind| &kind.as_str()[1..] == name)
        .ok_or_else(|| "give commit, sync, identity or account".to_owned())
}

/// What an event must have to be shown. An empty list admits all.
#[derive(Debug, Default)]
pub struct Filter {
    pub kinds: Vec<Kind>,
    pub accounts: Vec<Did>,
    pub collections: Vec<Collection>,
}

impl Filter {
    /// Whether an event is shown. What is no event (`#info`) always is.
    pub fn admits(&self, message: &Message<'_>) -> bool {
        let (kind, did) = match message {
            Message::Commit(commit) => (Kind::Commit, commit.repo),
            Message::Sync(sync) => (Kind::Sync, sync.did),
            Message::Identity(identity) => (Kind::Identity, identity.did),
            Message::Account(account) => (Kind::Account, account.did),
            Message::Info(_) | Message::Error(_) | Message::Unknown => return true,
        };
        let is_account =
            |did: &str| Did::normalized(did).is_ok_and(|did| self.accounts.contains(&did));
        let has_op = || match message {
            Message::Commit(commit) => commit.ops.iter().any(|op| self.admits_path(op.path)),
            _ => false,
        };
        (self.kinds.is_empty() || self.kinds.contains(&kind))
            && (self.accounts.is_empty() || is_account(did))
            && (self.collections.is_empty() || has_op())
    }

    /// Whether an op is shown, by its path.
    pub fn admits_path(&self, path: &str) -> bool {
        let collection = path.split('/').next().unwrap_or(path);
        self.collections.is_empty() || self.collections.iter().any(|it| it.has(collection))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use atproto_relay::atproto::frame::{Account, Info};

    #[test]
    fn collections_are_names_or_all_below_a_name() {
        let below: Collection = "app.bsky.feed.*".parse().unwrap();
        assert!(below.has("app.bsky.feed.post") && below.has("app.bsky.feed.a.b"));
        assert!(!below.has("app.bsky.feed") && !below.has("app.bsky.feedback.post"));
        let one: Collection = "app.bsky.feed.post".parse().unwrap();
        assert!(one.has("app.bsky.feed.post") && !one.has("app.bsky.feed.postgate"));
        for text in [
            "",
            "*",
            ".*",
            "app..post",
            "app.bsky.feed*",
            "a/b",
            "app.*.post",
            &"a".repeat(400),
        ] {
            assert!(text.parse::<Collection>().is_err(), "{text}");
        }
        assert_eq!(kind("#commit"), Ok(Kind::Commit));
        assert_eq!(kind("identity"), Ok(Kind::Identity));
        assert!(kind("info").is_err() && kind("").is_err());
    }

    #[test]
    fn every_part_of_a_filter_must_admit_an_event() {
        let did = "did:plc:ewvi7nxzyoun6zhxrhs64oiz";
        let account = |did| {
            Message::Account(Account {
                seq: 1,
                did,
                time: "",
                active: true,
                status: None,
            })
        };
        let mut filter = Filter::default();
        assert!(filter.admits(&account(did)) && filter.admits(&account("no did")));
        filter.accounts = vec![Did::parse(did).unwrap()];
        assert!(filter.admits(&account(did)) && !filter.admits(&account("no did")));
        filter.kinds = vec![Kind::Commit];
        assert!(!filter.admits(&account(did)));
        filter.kinds = Vec::new();
        filter.collections = vec!["app.bsky.feed.post".parse().unwrap()];
        assert!(!filter.admits(&account(did)), "it has no ops");
        let info = Message::Info(Info {
            name: "OutdatedCursor",
            message: None,
        });
        assert!(filter.admits(&info));
    }
}
