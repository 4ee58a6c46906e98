//! What is known of an account of a devnet PDS: to its owner, and to a checker.

use std::collections::BTreeMap;
use std::ops::Deref;

use crate::atproto::cid::Cid;
use crate::atproto::did::Did;
use crate::atproto::tid::Tid;
use crate::devnet::follower::AccountSnapshot;

/// A new account, with everything needed to use it.
#[derive(Clone, Debug)]
pub struct Account {
    pub did: Did,
    pub handle: String,
    pub password: String,
    /// A bearer token that never expires.
    pub access_token: String,
}

/// Hosting status of an account (com.atproto.sync.getRepoStatus).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum AccountStatus {
    Active,
    Deactivated,
    Takendown,
    Deleted,
}

impl AccountStatus {
    /// The `status` of the lexicons; active accounts have none.
    pub fn as_str(self) -> Option<&'static str> {
        match self {
            AccountStatus::Active => None,
            AccountStatus::Deactivated => Some("deactivated"),
            AccountStatus::Takendown => Some("takendown"),
            AccountStatus::Deleted => Some("deleted"),
        }
    }
}

/// Where a repository stands on its PDS.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RepoHead {
    pub did: Did,
    pub handle: String,
    pub status: AccountStatus,
    /// Revision of the last commit.
    pub rev: Tid,
    /// Root of the tree.
    pub data: Cid,
    /// CID of the last signed commit.
    pub commit: Cid,
}

/// All of a repository on its PDS, for comparison with what others know of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RepoState {
    pub head: RepoHead,
    /// `did:key` that signs commits.
    pub signing_key: String,
    /// Every record by its path `collection/rkey`.
    pub records: BTreeMap<String, Cid>,
}

impl Deref for RepoState {
    type Target = RepoHead;

    fn deref(&self) -> &RepoHead {
        &self.head
    }
}

impl From<RepoState> for AccountSnapshot {
    fn from(state: RepoState) -> AccountSnapshot {
        let records = state.records.iter();
        AccountSnapshot {
            did: state.did.to_string(),
            active: state.status == AccountStatus::Active,
            rev: state.rev.to_string(),
            data: state.data.to_string(),
            records: records
                .map(|(path, cid)| (path.clone(), cid.to_string()))
                .collect(),
        }
    }
}
