//! The door behind which signatures are checked: a batch of queued commits at once.
//!
//! Where the processor has the instructions, eight secp256k1 signatures are checked side by side. What that does not
//! prove good, a lone event and P-256 are up to libsecp256k1 and ring, one by one.

use crate::atproto::key::VerifyingKey;

/// What an account's key must have signed, and the compact signature.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SignedMessage {
    /// The commit without `sig`.
    pub message: Box<[u8]>,
    /// Its SHA-256.
    pub digest: [u8; 32],
    /// r and s, 32 bytes each, big-endian; low-S is required.
    pub signature: [u8; 64],
}

/// One signature to check.
pub struct Job<'a> {
    /// The account's key.
    pub key: &'a VerifyingKey,
    /// Digest and signature.
    pub signed: &'a SignedMessage,
}

/// Checks every job; the verdicts stand in the order of the jobs.
pub fn verify(jobs: &[Job<'_>]) -> Vec<bool> {
    let mut verdicts = proven_in_lanes(jobs);
    for (job, good) in jobs.iter().zip(&mut verdicts) {
        *good = *good || {
            let SignedMessage {
                message,
                digest,
                signature,
            } = job.signed;
            job.key.verify_hashed(message, digest, signature).is_ok()
        };
    }
    verdicts
}

/// Which signatures are good, as far as the lanes can tell.
#[cfg(target_arch = "x86_64")]
fn proven_in_lanes(jobs: &[Job<'_>]) -> Vec<bool> {
    use crate::atproto::lanes::{self, Lanes};

    let mut proven = vec![false; jobs.len()];
    let Some(lanes) = Lanes::detect() else {
        return proven;
    };
    let (places, jobs): (Vec<usize>, Vec<lanes::Job<'_>>) = jobs
        .iter()
        .enumerate()
        .filter_map(|(place, Job { key, signed })| {
            let job = lanes::Job {
                key: key.k256()?,
                digest: &signed.digest,
                signature: &signed.signature,
            };
            Some((place, job))
        })
        .unzip();
    for (place, good) in places.into_iter().zip(lanes.prove(&jobs)) {
        proven[place] = good;
    }
    proven
}

/// Which signatures are good, as far as the lanes can tell: this processor has none.
#[cfg(not(target_arch = "x86_64"))]
fn proven_in_lanes(jobs: &[Job<'_>]) -> Vec<bool> {
    vec![false; jobs.len()]
}
