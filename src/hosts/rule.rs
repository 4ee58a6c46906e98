//! The drop rules: every reason for which an event is refused, as one word for metrics and logs.
//!
//! The rules are applied in [`crate::upstream`] (frames and sequence) and in [`crate::verify`] (events).

use std::fmt;

/// A reason to refuse an event. The name is the value of the `rule` label of `relay_events_dropped_total`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Rule {
    /// The message is longer than 5,000,000 bytes, or would be with a `seq` of this relay.
    FrameTooLarge,
    /// The frame is not two canonical CBOR objects, or none of the four kinds of event.
    Frame,
    /// The frame is canonical but lacks a field that routing needs, or has it with another type.
    FrameFields,
    /// The host's sequence number is not above the connection's last.
    UpstreamSeq,
    /// The host was banned while the event was on its way.
    HostBanned,
    /// The DID does not follow the DID syntax, or is not written in its one canonical form.
    DidSyntax,
    /// An `#identity` or `#account` is larger than `limits.account_event_bytes`.
    EventTooLarge,
    /// `blocks` of a `#commit` is larger than 2,000,000 bytes.
    CommitTooLarge,
    /// A `#commit` has more than 200 ops.
    TooManyOps,
    /// A record block is larger than 1,000,000 bytes.
    RecordTooLarge,
    /// `blocks` of a `#sync` is larger than 10,000 bytes.
    SyncTooLarge,
    /// The DID could not be resolved within the bounded wait.
    IdentityUnresolved,
    /// The DID does not exist, or its document is unusable.
    IdentityNotFound,
    /// The DID was tombstoned.
    Tombstoned,
    /// The DID document has no usable `#atproto` signing key.
    NoSigningKey,
    /// The DID document names no PDS.
    NoPds,
    /// The sending host is not the account's PDS.
    WrongHost,
    /// The account is not active, here or at its PDS.
    AccountInactive,
    /// `rev` is not a TID.
    RevSyntax,
    /// `rev` is more than five minutes in the future.
    RevFuture,
    /// `rev` is not above the account's last one.
    RevOrder,
    /// The CAR cannot be read: version, header, framing or CID.
    Car,
    /// A `#commit` has more blocks than its ops can need.
    TooManyBlocks,
    /// A block does not hash to its CID.
    BlockHash,
    /// The CAR's first root, the envelope's `commit` and the commit block do not belong together.
    CommitBlock,
    /// The CID of a commit or a record has another codec than dag-cbor.
    CidCodec,
    /// The signed commit is malformed: version, fields, lengths.
    CommitObject,
    /// DID or rev of the signed commit differ from the envelope's.
    CommitEnvelope,
    /// The signature does not verify with the account's key.
    Signature,
    /// An op's path is not `collection/record-key`.
    OpPath,
    /// Two ops of one commit have the same path.
    OpDuplicate,
    /// A create or update op has no CID, or its record block is missing.
    OpRecord,
    /// An update or delete op has no `prev` (sync 1.1).
    OpPrev,
    /// `prevData` is missing and the host is held to sync 1.1.
    PrevData,
    /// Undoing the ops does not give `prevData`.
    Inversion,
    /// A `#sync` repeats the stored rev with another commit.
    SyncConflict,
    /// The account broke its chain too often.
    Desynchronized,
    /// What had to be changed of an event, the handle or the status, could not be: it is not forwarded as it came.
    Edit,
}

impl Rule {
    /// Every rule, in the order of the event's path; metrics are registered from it.
    pub const ALL: [Rule; 38] = [
        Rule::FrameTooLarge,
        Rule::Frame,
        Rule::FrameFields,
        Rule::UpstreamSeq,
        Rule::HostBanned,
        Rule::DidSyntax,
        Rule::EventTooLarge,
        Rule::CommitTooLarge,
        Rule::TooManyOps,
        Rule::RecordTooLarge,
        Rule::SyncTooLarge,
        Rule::IdentityUnresolved,
        Rule::IdentityNotFound,
        Rule::Tombstoned,
        Rule::NoSigningKey,
        Rule::NoPds,
        Rule::WrongHost,
        Rule::AccountInactive,
        Rule::RevSyntax,
        Rule::RevFuture,
        Rule::RevOrder,
        Rule::Car,
        Rule::TooManyBlocks,
        Rule::BlockHash,
        Rule::CommitBlock,
        Rule::CidCodec,
        Rule::CommitObject,
        Rule::CommitEnvelope,
        Rule::Signature,
        Rule::OpPath,
        Rule::OpDuplicate,
        Rule::OpRecord,
        Rule::OpPrev,
        Rule::PrevData,
        Rule::Inversion,
        Rule::SyncConflict,
        Rule::Desynchronized,
        Rule::Edit,
    ];

    /// The rule's name in metrics and logs.
    pub const fn name(self) -> &'static str {
        match self {
            Rule::FrameTooLarge => "frame_too_large",
            Rule::Frame => "frame",
            Rule::FrameFields => "frame_fields",
            Rule::UpstreamSeq => "upstream_seq",
            Rule::HostBanned => "host_banned",
            Rule::DidSyntax => "did_syntax",
            Rule::EventTooLarge => "event_too_large",
            Rule::CommitTooLarge => "commit_too_large",
            Rule::TooManyOps => "too_many_ops",
            Rule::RecordTooLarge => "record_too_large",
            Rule::SyncTooLarge => "sync_too_large",
            Rule::IdentityUnresolved => "identity_unresolved",
            Rule::IdentityNotFound => "identity_not_found",
            Rule::Tombstoned => "tombstoned",
            Rule::NoSigningKey => "no_signing_key",
            Rule::NoPds => "no_pds",
            Rule::WrongHost => "wrong_host",
            Rule::AccountInactive => "account_inactive",
            Rule::RevSyntax => "rev_syntax",
            Rule::RevFuture => "rev_future",
            Rule::RevOrder => "rev_order",
            Rule::Car => "car",
            Rule::TooManyBlocks => "too_many_blocks",
            Rule::BlockHash => "block_hash",
            Rule::CommitBlock => "commit_block",
            Rule::CidCodec => "cid_codec",
            Rule::CommitObject => "commit_object",
            Rule::CommitEnvelope => "commit_envelope",
            Rule::Signature => "signature",
            Rule::OpPath => "op_path",
            Rule::OpDuplicate => "op_duplicate",
            Rule::OpRecord => "op_record",
            Rule::OpPrev => "op_prev",
            Rule::PrevData => "prev_data",
            Rule::Inversion => "inversion",
            Rule::SyncConflict => "sync_conflict",
            Rule::Desynchronized => "desynchronized",
            Rule::Edit => "edit",
        }
    }
}

impl fmt::Display for Rule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_distinct() {
        let names: std::collections::HashSet<_> =
            Rule::ALL.iter().map(|rule| rule.name()).collect();
        assert_eq!(names.len(), Rule::ALL.len());
        // They index the counters.
        let places = Rule::ALL.iter().map(|rule| *rule as usize);
        assert!(places.eq(0..Rule::ALL.len()));
    }
}
