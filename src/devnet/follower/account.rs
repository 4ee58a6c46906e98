//! An account as a PDS or a consumer has it, and the differences between the two.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// An account with all its records.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct AccountSnapshot {
    pub did: String,
    pub active: bool,
    /// Revision of the last commit.
    pub rev: String,
    /// CID of the tree's root.
    pub data: String,
    /// CID of each record, by its path.
    pub records: BTreeMap<String, String>,
}

impl AccountSnapshot {
    /// An active account without a commit.
    pub(super) fn new(did: &str) -> AccountSnapshot {
        AccountSnapshot {
            did: did.to_owned(),
            active: true,
            rev: String::new(),
            data: String::new(),
            records: BTreeMap::new(),
        }
    }
}

/// Descriptions of the differences between PDSes and a consumer; empty where they agree. An account can be on several PDSes
/// after it moved: the one where it is active counts.
pub fn differences(at_pdses: Vec<AccountSnapshot>, at_consumer: &[AccountSnapshot]) -> Vec<String> {
    let active = at_pdses.into_iter().filter(|account| account.active);
    let homes: BTreeMap<String, AccountSnapshot> = active
        .map(|account| (account.did.clone(), account))
        .collect();
    let seen = at_consumer.iter().filter(|account| account.active);
    let seen: BTreeMap<&str, &AccountSnapshot> =
        seen.map(|account| (&*account.did, account)).collect();
    let mut words = Vec::new();
    for (did, home) in &homes {
        match seen.get(did.as_str()) {
            None => words.push(format!("{did}: active at its PDS, not at the consumer")),
            Some(account) if *account != home => words.push(difference(home, account)),
            Some(_) => {}
        }
    }
    let strangers = seen.keys().filter(|did| !homes.contains_key(**did));
    words.extend(strangers.map(|did| format!("{did}: active at the consumer, at no PDS")));
    words
}

fn difference(home: &AccountSnapshot, account: &AccountSnapshot) -> String {
    let did = &home.did;
    if home.rev != account.rev {
        return format!(
            "{did}: rev {} at its PDS, {} at the consumer",
            home.rev, account.rev
        );
    }
    let known = home
        .records
        .iter()
        .filter(|(path, cid)| account.records.get(*path) == Some(cid));
    format!(
        "{did}: {} records at its PDS, {} at the consumer, {} of them the same; trees {} and {}",
        home.records.len(),
        account.records.len(),
        known.count(),
        home.data,
        account.data
    )
}
