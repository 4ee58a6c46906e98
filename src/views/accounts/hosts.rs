//! The hosts in the log's tail: which of their events above a cursor are durable, and which host a number in the log means. Hosts that the database does not know come back; an operator's limits and bans of them do not.

use std::collections::{BTreeMap, HashMap, HashSet};

use tracing::warn;

use super::ReplayError;
use crate::eventlog::{Entry, EventLog, Origin};
use crate::hosts::roster::{Name, Roster};
use crate::hosts::{Durable, InFlightLimits, RecoveredHost};
use crate::store::{HostId, HostRow, NewHost, Store, StoreError};
use crate::views::Event;

/// Most events of one host between the oldest unsettled one and the newest that the log may have.
const SPAN: usize = InFlightLimits::DEFAULT.span;

/// The hosts, as the log's tail shows them.
pub(super) struct LoggedHosts {
    hosts: HashMap<HostId, LoggedHost>,
    /// Hosts that the database did not know.
    restored: Vec<(HostId, NewHost)>,
    /// The last host of accounts whose events were redacted, by the hash of their DIDs: nothing else has the host of
    /// these accounts. Kept where hosts were restored.
    hosts_of_redacted: HashMap<u64, HostId>,
}

impl LoggedHosts {
    /// Compares the hosts of the database with those of the log, and restores those that are missing. `row` is what a
    /// host of that name is added as.
    pub async fn begin(
        log: &EventLog,
        store: &Store,
        roster: &mut Roster,
        replay_from: u64,
        row: impl Fn(&Name) -> NewHost,
    ) -> Result<LoggedHosts, ReplayError> {
        let known = store.hosts().await?;
        let missing = missing(&known, roster).into_iter();
        let restored: Vec<_> = missing.map(|(id, name)| (id, row(&name))).collect();
        for (id, host) in &restored {
            // Its accounts were admitted once: none is throttled on the way back.
            let host = NewHost {
                account_limit: i64::MAX,
                ..host.clone()
            };
            store.restore_host(*id, &host).await?;
        }
        let foreign: HashSet<HostId> = known
            .iter()
            .filter(|row| {
                roster
                    .hosts()
                    .get(&row.id)
                    .is_some_and(|name| *name != Name::of(row))
            })
            .map(|row| row.id)
            .collect();
        let rows = store.hosts().await?;
        roster
            .record(rows.iter().map(|row| (row.id, Name::of(row))))
            .map_err(|source| ReplayError::Roster {
                folder: log.options().dir.display().to_string(),
                source,
            })?;
        if !restored.is_empty() {
            warn!(
                hosts = restored.len(),
                "the database did not know hosts that the event log knows: it is new, or was restored from a copy. \
                 They, their cursors and their accounts come back from the log; limits and bans that were set do not"
            );
        }
        if !foreign.is_empty() {
            warn!(
                hosts = foreign.len(),
                "the database has numbers of hosts that mean others in the event log: what is in the log so far is \
                 not attributed to them"
            );
        }
        // A host that this database gives the number of another one has no event in the log.
        let hosts = rows.iter().filter(|row| !foreign.contains(&row.id));
        Ok(LoggedHosts {
            hosts: hosts
                .map(|row| (row.id, LoggedHost::new(row, replay_from)))
                .collect(),
            restored,
            hosts_of_redacted: HashMap::new(),
        })
    }

    /// Takes an event in; its host, where that is known. There is none for an event of the relay's own, and for one
    /// whose index entry was rebuilt from its frame.
    pub fn note(&mut self, event: &Event<'_>) -> Option<HostId> {
        let Origin::Host { id, seq } = event.entry.origin else {
            return None;
        };
        let host = HostId(id);
        self.hosts.get_mut(&host)?.note(seq, event);
        if event.message.is_none() && !self.restored.is_empty() {
            self.hosts_of_redacted.insert(event.entry.did_hash, host);
        }
        Some(host)
    }

    /// The host of an account whose events were redacted.
    pub fn of_redacted(&self, entry: &Entry) -> Option<HostId> {
        self.hosts_of_redacted.get(&entry.did_hash).copied()
    }

    /// Ends the replay: restored hosts get their limits. Returns, for every host, its cursor and the events above it
    /// that are durable.
    pub async fn end(self, store: &Store) -> Result<HashMap<HostId, RecoveredHost>, StoreError> {
        for (id, host) in &self.restored {
            let accounts = store.count_accounts(*id).await?;
            let limit = host.account_limit.max(accounts);
            store.set_account_limit(*id, limit).await?;
        }
        let recovered = self.hosts.into_iter();
        Ok(recovered.map(|(id, host)| (id, host.recovered())).collect())
    }
}

/// The hosts of the roster that the database knows neither by number nor by name.
fn missing(known: &[HostRow], roster: &Roster) -> Vec<(HostId, Name)> {
    let mut missing: Vec<_> = roster
        .hosts()
        .iter()
        .filter(|(id, name)| {
            known
                .iter()
                .all(|row| row.id != **id && row.hostname != name.hostname)
        })
        .map(|(id, name)| (*id, name.clone()))
        .collect();
    missing.sort_by_key(|(id, _)| *id);
    missing
}

/// A host's events of the log's tail, by the host's own numbers. A host that began anew while the relay was down, and
/// is beyond the cursor already, is known by its events: they are others under the same numbers.
struct LoggedHost {
    cursor: Option<i64>,
    durable: BTreeMap<i64, Durable>,
    /// First log seq from which on the host's numbers are those that its cursor is of.
    since: u64,
}

impl LoggedHost {
    /// `replay_from` is what was written together with the row's cursor, or later.
    fn new(row: &HostRow, replay_from: u64) -> Self {
        // A cursor that was on its way when the host began anew may have been written after its new one.
        let renumbered = row
            .renumbered
            .filter(|renumbered| renumbered.log_seq >= replay_from);
        Self {
            cursor: renumbered.map_or(row.cursor, |renumbered| Some(renumbered.cursor)),
            durable: BTreeMap::new(),
            since: renumbered.map_or(0, |renumbered| renumbered.log_seq),
        }
    }

    fn note(&mut self, upstream_seq: i64, event: &Event<'_>) {
        let entry = &event.entry;
        let above = self.cursor.is_none_or(|cursor| upstream_seq > cursor);
        // What the disk has lost may come once more, under a number of its own.
        if above && entry.seq >= self.since && !entry.is_lost() {
            let durable = Durable {
                log_seq: entry.seq,
                did_hash: entry.did_hash,
                mark: event.message.as_ref().and_then(Durable::mark_of),
            };
            self.durable.insert(upstream_seq, durable);
        }
        // Of so many, whatever lies before was settled.
        if self.durable.len() > SPAN
            && let Some((seq, _)) = self.durable.pop_first()
        {
            self.cursor = Some(seq);
        }
    }

    /// A host whose first cursor was not yet written resumes before its first event, not live.
    fn recovered(self) -> RecoveredHost {
        let first = self.durable.keys().next();
        let before_first = first.map(|first| first.saturating_sub(1).max(0));
        RecoveredHost {
            cursor: self.cursor.or(before_first),
            already_durable: self.durable,
        }
    }
}
