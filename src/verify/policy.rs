//! Account policy: what an accepted event, an answer or an operator's decision makes of an account. Pure functions, each
//! tested by a table. The shard carries the results out; nothing here sends, asks or measures time.

use std::mem;

use crate::identity::Identity;
use crate::store::{HostId, LocalStatus, UpstreamStatus};

use super::account::{Account, DesyncLimits};
use super::rules::Chain;

/// The status of an account whose PDS spoke for it. `room` is whether the host's quota has room for the account.
pub(super) fn admitted(local: LocalStatus, room: bool) -> LocalStatus {
    match (local, room) {
        (LocalStatus::Active, false) => LocalStatus::Throttled,
        (LocalStatus::Throttled, true) => LocalStatus::Active,
        (other, _) => other,
    }
}

/// Counts what an accepted `#commit` or `#sync` did to the chain of commits. Returns the local status if it changed:
/// too many breaks desynchronize an active account, an intact `#sync` makes it active again.
pub(super) fn follow_chain(
    account: &mut Account,
    chain: Chain,
    is_sync: bool,
    now: i64,
    limits: DesyncLimits,
) -> Option<LocalStatus> {
    let before = account.local;
    match chain {
        Chain::Broken => {
            if account.count_break(now, limits) && account.local.is_active() {
                account.local = LocalStatus::Desynchronized;
            }
        }
        Chain::Intact if is_sync => {
            account.breaks = 0;
            if account.local == LocalStatus::Desynchronized {
                account.local = LocalStatus::Active;
            }
        }
        Chain::Intact => {}
    }
    (account.local != before).then_some(account.local)
}

/// Whether an operator's decision changes an account with the status `local`.
///
/// A conditional decision (`only_from`) is also announced for an account that already has the status `to`: the database
/// can be ahead of the shard.
pub(super) fn changes(local: LocalStatus, to: LocalStatus, only_from: Option<LocalStatus>) -> bool {
    match only_from {
        None => local != to,
        Some(from) => local == from || local == to,
    }
}

/// What a resolved identity did to an account.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Move {
    /// Whether the account left the host that it was at.
    pub leaves: bool,
    /// The host whose quota the account no longer counts against.
    pub uncounted: Option<HostId>,
}

/// Applies the key and the PDS of a resolved identity. `now_at` is the PDS, if the relay knows it as a host.
///
/// An account that leaves a host stops counting there at once. It counts at the next host only after that host has spoken
/// for it: whoever writes a DID document can name any host in it. Returns `None` if a newer identity is already known.
pub(super) fn apply_identity(
    account: &mut Account,
    identity: &Identity,
    now_at: Option<HostId>,
) -> Option<Move> {
    // An answer that a newer one overtook must not give the account back.
    if account
        .resolved_at
        .is_some_and(|known| identity.resolved_at < known)
    {
        return None;
    }
    account.set_key(identity.signing_key);
    account.resolved_at = Some(identity.resolved_at);
    let leaves = match (now_at, account.host) {
        (Some(_), before) => before != now_at,
        (None, before) => before.is_some() && !account.away,
    };
    account.away = now_at.is_none();
    let counted_at = account.host;
    let uncounted = if leaves && mem::take(&mut account.counted) {
        counted_at
    } else {
        None
    };
    account.host = now_at.or(account.host);
    Some(Move { leaves, uncounted })
}

/// Applies the status that the host `host` reports when it is asked. Returns the status if it is news.
///
/// The account can have left the host since the question was asked; the answer then counts for nothing.
pub(super) fn apply_status(
    account: &mut Account,
    host: HostId,
    status: Option<UpstreamStatus>,
    now: i64,
) -> Option<UpstreamStatus> {
    if !account.is_at(host) {
        return None;
    }
    account.asked_status_at = now;
    let status = status.filter(|status| *status != account.upstream)?;
    account.upstream = status.clone();
    Some(status)
}

/// Whether the operator or the PDS has ended the account. Events about it then keep only the fields of the lexicon.
pub(super) fn has_ended(local: LocalStatus, upstream: &UpstreamStatus) -> bool {
    let banned = matches!(local, LocalStatus::TakenDown | LocalStatus::Suspended);
    banned || *upstream == UpstreamStatus::Deleted
}

/// How an `#account` event is forwarded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum AccountForm {
    /// As it was received.
    AsReceived,
    /// With the status that results from both sides.
    CombinedStatus,
    /// Rebuilt from the fields of the lexicon alone.
    Plain,
}

/// The form in which an `#account` event of these statuses is forwarded.
pub(super) fn account_form(local: LocalStatus, upstream: &UpstreamStatus) -> AccountForm {
    if has_ended(local, upstream) {
        AccountForm::Plain
    } else if local.is_active() {
        AccountForm::AsReceived
    } else {
        AccountForm::CombinedStatus
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::atproto::did::Did;
    use std::time::Duration;

    const ALL: [LocalStatus; 5] = [
        LocalStatus::Active,
        LocalStatus::TakenDown,
        LocalStatus::Throttled,
        LocalStatus::Suspended,
        LocalStatus::Desynchronized,
    ];
    const OLD: HostId = HostId(1);
    const NEW: HostId = HostId(2);

    fn identity(resolved_at: i64) -> Identity {
        Identity {
            did: Did::parse("did:plc:ewvi7nxzyoun6zhxrhs64oiz").unwrap(),
            pds: None,
            signing_key: None,
            handles: Vec::new(),
            resolved_at,
        }
    }

    #[test]
    fn the_quota_throttles_the_active_and_releases_the_throttled() {
        for local in ALL {
            let full = match local {
                LocalStatus::Active => LocalStatus::Throttled,
                other => other,
            };
            let free = match local {
                LocalStatus::Throttled => LocalStatus::Active,
                other => other,
            };
            assert_eq!(admitted(local, false), full);
            assert_eq!(admitted(local, true), free);
        }
    }

    #[test]
    fn breaks_over_the_limit_desynchronize_and_an_intact_sync_repairs() {
        use LocalStatus::{Active, Desynchronized, TakenDown};
        let limits = DesyncLimits {
            limit: 1,
            period: Duration::from_secs(60),
        };
        // Status, breaks before, chain, whether it is a #sync; the new status, breaks after.
        let cases = [
            (Active, 0, Chain::Broken, false, None, 1),
            (Active, 1, Chain::Broken, false, Some(Desynchronized), 2),
            (Active, 1, Chain::Broken, true, Some(Desynchronized), 2),
            (Active, 1, Chain::Intact, false, None, 1),
            (Active, 1, Chain::Intact, true, None, 0),
            (Desynchronized, 2, Chain::Intact, false, None, 2),
            (Desynchronized, 2, Chain::Intact, true, Some(Active), 0),
            (Desynchronized, 2, Chain::Broken, true, None, 3),
            (TakenDown, 2, Chain::Broken, false, None, 3),
            (TakenDown, 2, Chain::Intact, true, None, 0),
        ];
        for (local, breaks, chain, is_sync, changed, after) in cases {
            let mut account = Account {
                local,
                breaks,
                counting_since: 100,
                ..Account::default()
            };
            let found = follow_chain(&mut account, chain, is_sync, 110, limits);
            let case = format!("{local:?} {breaks} {chain:?} {is_sync}");
            assert_eq!(found, changed, "{case}");
            assert_eq!(account.local, changed.unwrap_or(local), "{case}");
            assert_eq!(account.breaks, after, "{case}");
        }
    }

    #[test]
    fn a_conditional_decision_applies_to_one_status() {
        for local in ALL {
            for to in ALL {
                assert_eq!(changes(local, to, None), local != to);
                for from in ALL {
                    let changes = changes(local, to, Some(from));
                    assert_eq!(changes, [from, to].contains(&local));
                }
            }
        }
    }

    #[test]
    fn an_identity_moves_an_account_and_an_old_one_does_not() {
        // Host before, whether away and counted before; PDS now; leaves, uncounted; host and away after.
        let cases = [
            (None, false, false, Some(NEW), true, None, Some(NEW), false),
            (None, false, false, None, false, None, None, true),
            (
                Some(OLD),
                false,
                true,
                Some(OLD),
                false,
                None,
                Some(OLD),
                false,
            ),
            (
                Some(OLD),
                false,
                true,
                Some(NEW),
                true,
                Some(OLD),
                Some(NEW),
                false,
            ),
            (
                Some(OLD),
                false,
                false,
                Some(NEW),
                true,
                None,
                Some(NEW),
                false,
            ),
            (
                Some(OLD),
                false,
                true,
                None,
                true,
                Some(OLD),
                Some(OLD),
                true,
            ),
            (Some(OLD), true, false, None, false, None, Some(OLD), true),
            (
                Some(OLD),
                true,
                false,
                Some(OLD),
                false,
                None,
                Some(OLD),
                false,
            ),
        ];
        for (host, away, counted, now_at, leaves, uncounted, host_after, away_after) in cases {
            let before = Account {
                host,
                away,
                counted,
                resolved_at: Some(50),
                ..Account::default()
            };
            let case = format!("{before:?} {now_at:?}");
            let mut account = before.clone();
            assert_eq!(apply_identity(&mut account, &identity(49), now_at), None);
            assert_eq!(format!("{account:?}"), format!("{before:?}"), "overtaken");
            let moved = apply_identity(&mut account, &identity(50), now_at);
            assert_eq!(moved, Some(Move { leaves, uncounted }), "{case}");
            assert_eq!(
                (account.host, account.away),
                (host_after, away_after),
                "{case}"
            );
            assert_eq!(account.counted, counted && !leaves, "{case}");
        }
    }

    #[test]
    fn only_the_own_host_reports_a_status() {
        use UpstreamStatus::{Active, Deactivated};
        // Account's host, away; reporting host, report; news.
        let cases = [
            (OLD, false, OLD, Some(Deactivated), Some(Deactivated)),
            (OLD, false, OLD, Some(Active), None),
            (OLD, false, OLD, None, None),
            (OLD, false, NEW, Some(Deactivated), None),
            (OLD, true, OLD, Some(Deactivated), None),
        ];
        for (host, away, asked, report, news) in cases {
            let mut account = Account {
                host: Some(host),
                away,
                ..Account::default()
            };
            let counts = host == asked && !away;
            assert_eq!(apply_status(&mut account, asked, report, 7), news);
            assert_eq!(account.upstream, news.unwrap_or_default());
            assert_eq!(account.asked_status_at, if counts { 7 } else { 0 });
        }
    }

    #[test]
    fn account_events_are_rewritten_where_the_relay_or_the_end_demands_it() {
        use AccountForm::{AsReceived, CombinedStatus, Plain};
        for (local, form) in [
            (LocalStatus::Active, AsReceived),
            (LocalStatus::Throttled, CombinedStatus),
            (LocalStatus::Desynchronized, CombinedStatus),
            (LocalStatus::TakenDown, Plain),
            (LocalStatus::Suspended, Plain),
        ] {
            assert_eq!(account_form(local, &UpstreamStatus::Active), form);
            assert_eq!(account_form(local, &UpstreamStatus::Deactivated), form);
            assert_eq!(account_form(local, &UpstreamStatus::Deleted), Plain);
        }
    }
}
