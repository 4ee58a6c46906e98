//! The door behind which signatures are checked: a batch of queued commits at once.
//!
//! Today each one is a libsecp256k1 or AWS-LC verification. The door takes batches because a multi-lane
//! verifier fits behind it without the pipeline knowing.

use crate::atproto::key::VerifyingKey;

/// What an account's key must have signed: SHA-256 of the unsigned commit, and the compact signature.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SignedDigest {
    /// SHA-256 of the commit without `sig`.
    pub digest: [u8; 32],
    /// r and s, 32 bytes each, big-endian; low-S is required.
    pub signature: [u8; 64],
}

/// One signature to check.
pub struct Job<'a> {
    /// The account's key.
    pub key: &'a VerifyingKey,
    /// Digest and signature.
    pub signed: &'a SignedDigest,
}

/// Checks every job; the verdicts stand in the order of the jobs.
pub fn verify(jobs: &[Job<'_>]) -> Vec<bool> {
    jobs.iter()
        .map(|job| {
            job.key
                .verify_digest(&job.signed.digest, &job.signed.signature)
                .is_ok()
        })
        .collect()
}
