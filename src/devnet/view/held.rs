//! An account as one side has it, PDS or consumer, and what two sides do not agree on.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// An account with all its records.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Held {
    pub did: String,
    pub active: bool,
    /// Revision of the last commit.
    pub rev: String,
    /// CID of the tree's root.
    pub data: String,
    /// CID of each record, by its path.
    pub records: BTreeMap<String, String>,
}

impl Held {
    /// An active account without a commit.
    pub(super) fn new(did: &str) -> Held {
        Held {
            did: did.to_owned(),
            active: true,
            rev: String::new(),
            data: String::new(),
            records: BTreeMap::new(),
        }
    }
}

/// What a consumer has otherwise than the PDSes, in words; empty where they agree. An account may lie
/// on several PDSes after it moved: the one where it is active counts.
pub fn differences(at_pdses: Vec<Held>, at_consumer: &[Held]) -> Vec<String> {
    let active = at_pdses.into_iter().filter(|held| held.active);
    let homes: BTreeMap<String, Held> = active.map(|held| (held.did.clone(), held)).collect();
    let seen = at_consumer.iter().filter(|held| held.active);
    let seen: BTreeMap<&str, &Held> = seen.map(|held| (&*held.did, held)).collect();
    let mut words = Vec::new();
    for (did, home) in &homes {
        match seen.get(did.as_str()) {
            None => words.push(format!("{did}: active at its PDS, not at the consumer")),
            Some(held) if *held != home => words.push(difference(home, held)),
            Some(_) => {}
        }
    }
    let strangers = seen.keys().filter(|did| !homes.contains_key(**did));
    words.extend(strangers.map(|did| format!("{did}: active at the consumer, at no PDS")));
    words
}

fn difference(home: &Held, held: &Held) -> String {
    let did = &home.did;
    if home.rev != held.rev {
        return format!(
            "{did}: rev {} at its PDS, {} at the consumer",
            home.rev, held.rev
        );
    }
    let known = home
        .records
        .iter()
        .filter(|(path, cid)| held.records.get(*path) == Some(cid));
    format!(
        "{did}: {} records at its PDS, {} at the consumer, {} of them the same; trees {} and {}",
        home.records.len(),
        held.records.len(),
        known.count(),
        home.data,
        held.data
    )
}
