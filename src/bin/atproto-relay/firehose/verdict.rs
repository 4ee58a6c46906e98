//! `--verify`: the rules of sync 1.1 for single events, with the key the DID names now. What only a
//! relay can know (the account's last state, who may speak for it) is not judged.

use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use atproto_relay::atproto::did::Did;
use atproto_relay::atproto::frame::{self, Message};
use atproto_relay::atproto::key::{PublicKey, VerifyingKey};
use atproto_relay::hosts::Rule;
use atproto_relay::identity::{Identity, Requester, ResolveError, Resolver};
use atproto_relay::verify::rules::{self, Facts, Strictness};
use atproto_relay::verify::signature::{Job, SignedMessage, verify};
use tokio::time::Instant;

/// What checking an event gave.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Verdict {
    /// It holds.
    Good,
    /// It does not, for this reason.
    Bad(String),
    /// It could not be checked, for this reason.
    Unknown(String),
    /// There is no signature or proof in such an event.
    NothingToCheck,
}

/// Checks one frame.
pub async fn of_frame(resolver: &Resolver, bytes: &[u8]) -> Verdict {
    let (did, signed) = match check(bytes, now_us()) {
        Ok(Some((did, facts))) => (did, facts.signed),
        Ok(None) => return Verdict::NothingToCheck,
        Err(problem) => return Verdict::Bad(problem),
    };
    match signature(resolver.resolve(&did).await, &signed) {
        Verdict::Good => Verdict::Good,
        // The key may have changed since it was looked up.
        Verdict::Bad(_) => {
            let refreshed = resolver.refresh(&did, Requester::NO_HOST, Instant::now());
            signature(refreshed.await, &signed)
        }
        other => other,
    }
}

/// Everything but the signature. `None` for events without anything to check.
fn check(bytes: &[u8], now_us: u64) -> Result<Option<(Did, Facts)>, String> {
    let frame = frame::decode(bytes).map_err(|error| error.to_string())?;
    let broken = |rule: Rule| format!("breaks the rule {}", rule.name());
    let account = |did: &str| Did::normalized(did).map_err(|error| error.to_string());
    match frame.message {
        Message::Commit(commit) => {
            let did = account(commit.repo)?;
            rules::commit_size(&commit).map_err(broken)?;
            let rev = rules::rev(commit.rev, now_us).map_err(broken)?;
            let facts = rules::commit(&commit, rev, Strictness::Strict).map_err(broken)?;
            Ok(Some((did, facts)))
        }
        Message::Sync(sync) => {
            let did = account(sync.did)?;
            rules::sync_size(&sync).map_err(broken)?;
            let rev = rules::rev(sync.rev, now_us).map_err(broken)?;
            let facts = rules::sync(&sync, rev).map_err(broken)?;
            Ok(Some((did, facts)))
        }
        _ => Ok(None),
    }
}

fn signature(identity: Result<Arc<Identity>, ResolveError>, signed: &SignedMessage) -> Verdict {
    let identity = match identity {
        Ok(identity) => identity,
        Err(error) if error.is_temporary() => return Verdict::Unknown(error.to_string()),
        Err(error) => return Verdict::Bad(error.to_string()),
    };
    let Some(key) = identity.signing_key else {
        return Verdict::Bad("the DID names no signing key".to_owned());
    };
    if holds(&key, signed) {
        Verdict::Good
    } else {
        Verdict::Bad("the signature is not the account's".to_owned())
    }
}

fn holds(key: &PublicKey, signed: &SignedMessage) -> bool {
    match VerifyingKey::new(key) {
        Ok(key) => verify(&[Job { key: &key, signed }]) == [true],
        Err(_) => false,
    }
}

fn now_us() -> u64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |since| since.as_micros() as u64)
}
