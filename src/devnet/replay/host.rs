//! One replayed host: its stream so far, and the state of its accounts as the frames sent so far
//! tell it.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};

use super::capture::{CapturedFrame, State};
use crate::devnet::feed::{Feed, Step};

/// What the host says of an account.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Repo {
    pub active: bool,
    pub status: Option<String>,
    pub rev: Option<String>,
}

pub(super) struct Host {
    feed: Arc<Feed>,
    repos: Mutex<HashMap<String, Repo>>,
}

impl Host {
    pub fn new() -> Arc<Host> {
        Arc::new(Host {
            feed: Feed::new(None),
            repos: Mutex::new(HashMap::new()),
        })
    }

    pub fn feed(&self) -> &Arc<Feed> {
        &self.feed
    }

    /// The account's state, first; the frame that announces it, second.
    pub fn send(&self, frame: &CapturedFrame) {
        let Some(about) = &frame.about else {
            return self.feed.push(Step::Once(frame.bytes.clone()));
        };
        self.apply(about.did.as_str(), &about.state);
        self.feed.push(Step::Event {
            seq: about.seq,
            frame: frame.bytes.clone(),
            tag: None,
        });
    }

    fn apply(&self, did: &str, state: &State) {
        let mut repos = self.repos.lock().expect("no holder of this lock panics");
        // A capture may start in the middle: an account that commits is there and active.
        let new = || Repo {
            active: true,
            status: None,
            rev: None,
        };
        match state {
            State::Rev(rev) => {
                repos.entry(did.to_owned()).or_insert_with(new).rev = Some(rev.clone())
            }
            State::Account {
                active: false,
                status: Some(status),
            } if status == "deleted" => {
                repos.remove(did);
            }
            State::Account { active, status } => {
                let repo = repos.entry(did.to_owned()).or_insert_with(new);
                (repo.active, repo.status) = (*active, status.clone());
            }
            State::Unchanged => {}
        }
    }

    /// `None` for an account the host does not have (any more).
    pub fn repo(&self, did: &str) -> Option<Repo> {
        self.repos
            .lock()
            .expect("no holder of this lock panics")
            .get(did)
            .cloned()
    }

    /// Every account the host has, by DID.
    pub fn repos(&self) -> Vec<(String, Repo)> {
        let repos = self.repos.lock().expect("no holder of this lock panics");
        let mut all: Vec<_> = repos
            .iter()
            .map(|(did, repo)| (did.clone(), repo.clone()))
            .collect();
        all.sort_by(|a, b| a.0.cmp(&b.0));
        all
    }
}
