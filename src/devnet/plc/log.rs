//! The log of one DID and the rules by which an operation may follow: prev, rotation keys, the
//! 72 hours in which a more powerful key takes operations back, tombstones. Pure: time is given.

use serde::{Deserialize, Serialize};

use super::operation::{Operation, OperationError};
use crate::devnet::timestamp::{Timestamp, TimestampError};

/// How long a more powerful rotation key may nullify an operation (did:plc specification: 72 hours).
const RECOVERY_WINDOW_MILLIS: i64 = 72 * 3_600_000;

/// An entry of `GET /:did/log/audit` and of `GET /export`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct AuditEntry {
    pub did: String,
    pub operation: Operation,
    pub cid: String,
    pub nullified: bool,
    pub created_at: String,
}

/// An operation in a log.
#[derive(Clone, Debug)]
pub(super) struct Entry {
    pub operation: Operation,
    pub cid: String,
    pub created_at: Timestamp,
    /// When a later operation took it back.
    pub nullified_at: Option<Timestamp>,
}

/// All operations of one DID, nullified ones included, in order of arrival.
#[derive(Clone, Debug, Default)]
pub(super) struct Log {
    entries: Vec<Entry>,
}

/// Why an operation may not follow.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum LogError {
    #[error(transparent)]
    Operation(#[from] OperationError),
    #[error("the genesis operation makes {made}, not {asked}")]
    GenesisHash { made: String, asked: String },
    #[error("a genesis operation has no prev and is no tombstone")]
    Genesis,
    #[error("operations not correctly ordered: prev is not a standing operation of this DID")]
    Misordered,
    #[error("the DID is tombstoned")]
    Tombstoned,
    #[error("recovery operation {late_by_millis} ms after the end of the 72 h recovery window")]
    LateRecovery { late_by_millis: i64 },
}

/// Why an audit log is refused.
#[derive(Debug, thiserror::Error)]
pub enum AuditError {
    #[error("the audit log is not the JSON of GET /:did/log/audit: {0}")]
    Json(#[from] serde_json::Error),
    #[error("the audit log is empty")]
    Empty,
    #[error("entry {index}: {cause}")]
    Entry { index: usize, cause: LogError },
    #[error("entry {index}: {cause}")]
    Time { index: usize, cause: TimestampError },
    #[error("entry {index}: createdAt is before that of the entry before")]
    TimeOrder { index: usize },
    #[error("entry {index}: cid is {written}, its operation hashes to {computed}")]
    Cid {
        index: usize,
        written: String,
        computed: String,
    },
    #[error("entry {index}: belongs to {found}, the log is of {expected}")]
    Did {
        index: usize,
        found: String,
        expected: String,
    },
    #[error("entry {index}: nullified is written as {written}, by the rules it is {computed}")]
    Nullified {
        index: usize,
        written: bool,
        computed: bool,
    },
}

impl Log {
    /// Checks and rebuilds an audit log by the same rules as operations that arrive.
    pub(super) fn from_audit(audit: &[AuditEntry]) -> Result<(String, Self), AuditError> {
        let did = audit.first().ok_or(AuditError::Empty)?.did.clone();
        let mut log = Log::default();
        for (index, entry) in audit.iter().enumerate() {
            log.replay(index, &did, entry)?;
        }
        for (index, (entry, own)) in audit.iter().zip(&log.entries).enumerate() {
            let computed = own.nullified_at.is_some();
            if entry.nullified != computed {
                return Err(AuditError::Nullified {
                    index,
                    written: entry.nullified,
                    computed,
                });
            }
        }
        Ok((did, log))
    }

    fn replay(&mut self, index: usize, did: &str, entry: &AuditEntry) -> Result<(), AuditError> {
        let at: Timestamp = entry
            .created_at
            .parse()
            .map_err(|cause| AuditError::Time { index, cause })?;
        if entry.did != did {
            return Err(AuditError::Did {
                index,
                found: entry.did.clone(),
                expected: did.to_owned(),
            });
        }
        if self.entries.last().is_some_and(|last| last.created_at > at) {
            return Err(AuditError::TimeOrder { index });
        }
        let computed = self
            .append(did, entry.operation.clone(), at)
            .map_err(|cause| AuditError::Entry { index, cause })?;
        if computed != entry.cid {
            return Err(AuditError::Cid {
                index,
                written: entry.cid.clone(),
                computed,
            });
        }
        Ok(())
    }

    /// Appends `operation` if the rules let it follow; returns its CID.
    pub(super) fn append(
        &mut self,
        did: &str,
        operation: Operation,
        at: Timestamp,
    ) -> Result<String, LogError> {
        let nullifies = self.check(did, &operation, at)?;
        for index in nullifies {
            self.entries[index].nullified_at = Some(at);
        }
        let cid = operation.cid();
        self.entries.push(Entry {
            operation,
            cid: cid.clone(),
            created_at: at,
            nullified_at: None,
        });
        Ok(cid)
    }

    /// Indexes of the entries that `operation` would nullify.
    fn check(
        &self,
        did: &str,
        operation: &Operation,
        at: Timestamp,
    ) -> Result<Vec<usize>, LogError> {
        if self.entries.is_empty() {
            return check_genesis(did, operation).map(|()| Vec::new());
        }
        let standing: Vec<usize> = (0..self.entries.len())
            .filter(|&i| self.entries[i].nullified_at.is_none())
            .collect();
        let prev = operation.prev().ok_or(LogError::Misordered)?;
        let position = standing
            .iter()
            .position(|&i| self.entries[i].cid == prev)
            .ok_or(LogError::Misordered)?;
        let base = &self.entries[standing[position]];
        if matches!(base.operation, Operation::Tombstone(_)) {
            return Err(LogError::Tombstoned);
        }
        let nullifies = standing[position + 1..].to_vec();
        let keys = base.operation.rotation_keys();
        match nullifies.first() {
            None => operation.signer(&keys)?,
            Some(&first) => check_recovery(&self.entries[first], &keys, operation, at)?,
        };
        Ok(nullifies)
    }

    /// The operation that stands at `at` (`None`: now): the last one not nullified.
    pub(super) fn current(&self, at: Option<Timestamp>) -> Option<&Entry> {
        self.standing(at).last()
    }

    /// The operations that stand at `at` (`None`: now), in order.
    pub(super) fn standing(
        &self,
        at: Option<Timestamp>,
    ) -> impl DoubleEndedIterator<Item = &Entry> {
        self.visible(at).filter(move |entry| !entry.nullified(at))
    }

    /// All operations that had arrived by `at` (`None`: now).
    pub(super) fn visible(&self, at: Option<Timestamp>) -> impl DoubleEndedIterator<Item = &Entry> {
        self.entries
            .iter()
            .filter(move |entry| at.is_none_or(|at| entry.created_at <= at))
    }

    /// How many operations have arrived.
    pub(super) fn len(&self) -> usize {
        self.entries.len()
    }

    /// The operation that arrived as number `index`.
    pub(super) fn entry(&self, index: usize) -> Option<&Entry> {
        self.entries.get(index)
    }

    /// The last entry to arrive.
    pub(super) fn last_arrival(&self) -> Option<&Entry> {
        self.entries.last()
    }
}

impl Entry {
    /// Whether the entry had been taken back by `at` (`None`: now).
    fn nullified(&self, at: Option<Timestamp>) -> bool {
        self.nullified_at
            .is_some_and(|taken_back| at.is_none_or(|at| taken_back <= at))
    }

    /// The entry as the audit log shows it at `at`.
    pub(super) fn audit(&self, did: &str, at: Option<Timestamp>) -> AuditEntry {
        AuditEntry {
            did: did.to_owned(),
            operation: self.operation.clone(),
            cid: self.cid.clone(),
            nullified: self.nullified(at),
            created_at: self.created_at.to_string(),
        }
    }
}

fn check_genesis(did: &str, operation: &Operation) -> Result<(), LogError> {
    if operation.prev().is_some() {
        return Err(LogError::Genesis);
    }
    let made = operation.genesis_did();
    if made != did {
        return Err(LogError::GenesisHash {
            made,
            asked: did.to_owned(),
        });
    }
    operation.signer(&operation.rotation_keys())?;
    Ok(())
}

/// An operation that forks the log must be signed by a key above the one that signed the first
/// operation it takes back, and within the recovery window of that operation.
fn check_recovery(
    first: &Entry,
    keys: &[&str],
    operation: &Operation,
    at: Timestamp,
) -> Result<usize, LogError> {
    let disputed = first.operation.signer(keys)?;
    let signer = operation.signer(&keys[..disputed])?;
    let late_by_millis = at.millis() - first.created_at.millis() - RECOVERY_WINDOW_MILLIS;
    if late_by_millis > 0 {
        return Err(LogError::LateRecovery { late_by_millis });
    }
    Ok(signer)
}
