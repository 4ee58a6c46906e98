//! What is written to the database so that recovery finds every host where it is. Writes nothing itself.

use std::sync::atomic::{AtomicU64, Ordering};

use super::index::HostIndex;
use crate::store::HostId;

/// Cursors, and the position in the log that belongs to them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Checkpoint {
    /// Cursors that moved since the last checkpoint.
    pub cursors: Vec<(HostId, i64)>,
    /// The log seq from which recovery must read the log.
    pub replay_from: u64,
}

/// Takes checkpoints.
#[derive(Default)]
pub(super) struct Checkpoints {
    /// The highest head of the log that a checkpoint was taken with.
    highest_head: AtomicU64,
}

impl Checkpoints {
    /// Floor and cursors in the safe order: a cursor that moves in between only makes recovery read more than it needs.
    pub(super) fn take(&self, hosts: &HostIndex, head: u64) -> Checkpoint {
        self.highest_head.fetch_max(head, Ordering::AcqRel);
        let replay_from = replay_floor(hosts, head);
        Checkpoint {
            cursors: take_moved_cursors(hosts),
            replay_from,
        }
    }

    pub(super) fn highest_head(&self) -> u64 {
        self.highest_head.load(Ordering::Acquire)
    }
}

pub(super) fn replay_floor(hosts: &HostIndex, head: u64) -> u64 {
    let open = hosts.filter_map(|host| host.progress().lowest_open_log_seq());
    open.into_iter().min().unwrap_or(u64::MAX).min(head + 1)
}

pub(super) fn take_moved_cursors(hosts: &HostIndex) -> Vec<(HostId, i64)> {
    hosts.filter_map(|host| Some((host.id(), host.progress().take_moved_cursor()?)))
}
