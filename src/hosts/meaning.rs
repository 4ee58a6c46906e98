//! What each rule means to people: what was wrong with the event, and what the owner of the PDS should do about it. The
//! reference of drop rules is made from these texts. Decides nothing.

use super::rule::Rule;

/// What a rule means.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Meaning {
    /// What was wrong with the event.
    pub wrong: &'static str,
    /// What the owner of the PDS should do.
    pub remedy: &'static str,
}

/// In the order of [`Rule::ALL`].
const MEANINGS: [(Rule, Meaning); Rule::ALL.len()] = [
    (
        Rule::FrameTooLarge,
        Meaning {
            wrong: "The frame is longer than 5,000,000 bytes, or would be with this relay's `seq`, which can be up to 8 bytes longer \
                    than the host's. A message longer than 5,000,000 bytes also closes the connection.",
            remedy: "Split the commit into several commits with fewer or smaller records.",
        },
    ),
    (
        Rule::Frame,
        Meaning {
            wrong: "The frame is not one of the four kinds of event, or its bytes are not two canonical CBOR objects. Malformed \
                    bytes also close the connection.",
            remedy: "Upgrade the PDS. If it encodes frames itself, check for unsorted or duplicate map keys, floats, and \
                     indefinite lengths.",
        },
    ),
    (
        Rule::FrameFields,
        Meaning {
            wrong: "The frame lacks a field that the lexicon requires, or a field has the wrong type.",
            remedy: "Compare the event with the lexicon `com.atproto.sync.subscribeRepos`, and upgrade the PDS.",
        },
    ),
    (
        Rule::UpstreamSeq,
        Meaning {
            wrong: "`seq` is not above the last one on this connection. After 1,000 such events in a row the connection is \
                    closed.",
            remedy: "Number events in increasing order. After a restore from a backup, continue above the last number that was \
                     sent.",
        },
    ),
    (
        Rule::HostBanned,
        Meaning {
            wrong: "The operator of the relay banned the host while the event was in flight.",
            remedy: "Contact the operator of the relay.",
        },
    ),
    (
        Rule::DidSyntax,
        Meaning {
            wrong: "The DID does not follow the DID syntax, or is not in its canonical form: did:plc and did:web in lower case, the \
                    two digits of a percent-encoded byte in upper case.",
            remedy: "Send the DID exactly as it is in the DID document.",
        },
    ),
    (
        Rule::EventTooLarge,
        Meaning {
            wrong: "An `#identity` or `#account` event is larger than `limits.account_event_bytes` (8 KiB), unknown fields \
                    included.",
            remedy: "Remove additional fields from these events.",
        },
    ),
    (
        Rule::CommitTooLarge,
        Meaning {
            wrong: "`blocks` of a `#commit` is larger than 2,000,000 bytes.",
            remedy: "Split the commit. For an import, send one `#sync` instead of a large commit.",
        },
    ),
    (
        Rule::TooManyOps,
        Meaning {
            wrong: "A `#commit` has more than 200 ops.",
            remedy: "Split the commit into commits of at most 200 ops.",
        },
    ),
    (
        Rule::RecordTooLarge,
        Meaning {
            wrong: "A record block is larger than 1,000,000 bytes.",
            remedy: "Refuse such records when they are written. Large data belongs in a blob.",
        },
    ),
    (
        Rule::SyncTooLarge,
        Meaning {
            wrong: "`blocks` of a `#sync` is larger than 10,000 bytes.",
            remedy: "Send only the commit block in a `#sync`.",
        },
    ),
    (
        Rule::IdentityUnresolved,
        Meaning {
            wrong: "The DID could not be resolved: three attempts got no answer.",
            remedy: "For did:web, check that `/.well-known/did.json` can be fetched from the internet. For did:plc, nothing: the \
                     directory or the relay's connection to it has a problem.",
        },
    ),
    (
        Rule::IdentityNotFound,
        Meaning {
            wrong: "The DID does not exist, or its document cannot be used.",
            remedy: "Publish the account's DID document before the account's first event.",
        },
    ),
    (
        Rule::Tombstoned,
        Meaning {
            wrong: "The DID was tombstoned in the PLC directory.",
            remedy: "Delete the account. A tombstoned DID cannot be used again.",
        },
    ),
    (
        Rule::NoSigningKey,
        Meaning {
            wrong: "The DID document has no usable `#atproto` signing key.",
            remedy: "Add a verification method `#atproto` with a secp256k1 or P-256 key to the DID document.",
        },
    ),
    (
        Rule::NoPds,
        Meaning {
            wrong: "The DID document names no PDS.",
            remedy: "Add a service `#atproto_pds` with the URL of the PDS to the DID document.",
        },
    ),
    (
        Rule::WrongHost,
        Meaning {
            wrong: "The host that sent the event is not the account's PDS according to its DID document, also after the document was \
                    fetched again.",
            remedy: "After a move, stop sending events of the account from the old PDS. On the new PDS, update the DID document \
                     before the first event, and use the same host name in both.",
        },
    ),
    (
        Rule::AccountInactive,
        Meaning {
            wrong: "The account is not active: taken down, suspended or throttled at this relay, or deactivated, suspended, taken down \
                    or deleted at its PDS.",
            remedy: "Ask `com.atproto.sync.getRepoStatus` of the relay for the status. `throttled` means that the host has more \
                     accounts than its quota: ask the operator of the relay to raise it. If the account is active at the PDS, \
                     check that the PDS answers `getRepoStatus` with `active: true`.",
        },
    ),
    (
        Rule::RevSyntax,
        Meaning {
            wrong: "`rev` is not a TID.",
            remedy: "Use TIDs of 13 characters as revisions.",
        },
    ),
    (
        Rule::RevFuture,
        Meaning {
            wrong: "`rev` is more than five minutes in the future.",
            remedy: "Set the clock of the PDS, and keep it with NTP.",
        },
    ),
    (
        Rule::RevOrder,
        Meaning {
            wrong: "`rev` is not above the account's last one: the event was sent before, or the repository went back, for example to \
                    a backup.",
            remedy: "Repeated events need no action. After a restore from a backup, make a commit with a new rev and send a `#sync`.",
        },
    ),
    (
        Rule::Car,
        Meaning {
            wrong: "`blocks` is not a CAR of version 1: header, framing or a CID cannot be read.",
            remedy: "Upgrade the PDS, or check its CAR encoder.",
        },
    ),
    (
        Rule::TooManyBlocks,
        Meaning {
            wrong: "A `#commit` has more than 500 blocks plus 44 for each op.",
            remedy: "Send only the changed records and the tree nodes on the way to them, not the whole repository.",
        },
    ),
    (
        Rule::BlockHash,
        Meaning {
            wrong: "A block does not hash to its CID.",
            remedy: "Check the PDS's storage for damaged blocks.",
        },
    ),
    (
        Rule::CommitBlock,
        Meaning {
            wrong: "The first root of the CAR, the envelope's `commit` and the commit block do not belong together, or the commit \
                    block is missing.",
            remedy: "Put the commit block into the CAR, with its CID as the first root and as `commit`.",
        },
    ),
    (
        Rule::CidCodec,
        Meaning {
            wrong: "The CID of a commit or a record has another codec than dag-cbor.",
            remedy: "Use CIDs of version 1 with dag-cbor and SHA-256.",
        },
    ),
    (
        Rule::CommitObject,
        Meaning {
            wrong: "The signed commit is malformed: its version is not 3, a field is missing or has the wrong type, or the signature \
                    does not have 64 bytes.",
            remedy: "Upgrade the PDS to repository version 3.",
        },
    ),
    (
        Rule::CommitEnvelope,
        Meaning {
            wrong: "DID or rev of the signed commit differ from those of the event.",
            remedy: "Send the event with the DID and rev of the commit. After an import, make a new commit with the new rev.",
        },
    ),
    (
        Rule::Signature,
        Meaning {
            wrong: "The signature does not verify with the account's key, also after the DID document was fetched again. Signatures \
                    with a high S are not valid.",
            remedy: "Sign with the key in the DID document. After a key rotation, send `#identity` and a newly signed `#sync`.",
        },
    ),
    (
        Rule::OpPath,
        Meaning {
            wrong: "The path of an op is not `collection/record-key`.",
            remedy: "Refuse such paths when records are written.",
        },
    ),
    (
        Rule::OpDuplicate,
        Meaning {
            wrong: "Two ops of one commit have the same path.",
            remedy: "Merge the changes of one record into one op.",
        },
    ),
    (
        Rule::OpRecord,
        Meaning {
            wrong: "A create or update op has no CID, or its record block is missing; or a delete op has a CID.",
            remedy: "Include the record of every create and update in `blocks`, and set `cid` to null for deletes.",
        },
    ),
    (
        Rule::OpPrev,
        Meaning {
            wrong: "An update or delete op has no `prev`, which sync 1.1 requires.",
            remedy: "Upgrade the PDS to a version with sync 1.1.",
        },
    ),
    (
        Rule::PrevData,
        Meaning {
            wrong: "`prevData` is missing, and the relay holds the host to sync 1.1.",
            remedy: "Upgrade the PDS to a version with sync 1.1.",
        },
    ),
    (
        Rule::Inversion,
        Meaning {
            wrong: "Undoing the ops on the tree in `blocks` does not give `prevData`: an op is missing, wrong or not in `blocks`.",
            remedy: "Check that the ops list every change of the commit, and that `blocks` has the tree nodes beside deleted \
                     records.",
        },
    ),
    (
        Rule::SyncConflict,
        Meaning {
            wrong: "A `#sync` has the account's last rev, but another commit.",
            remedy: "Make a commit with a new rev, and send it as `#sync`. Two copies of the PDS may be running.",
        },
    ),
    (
        Rule::Desynchronized,
        Meaning {
            wrong: "The account broke its chain of commits too often (`desync.limit` within `desync.period`), and is held until a valid \
                    `#sync`.",
            remedy: "Find out why `since` and `prevData` of the account's commits do not match the commit before, then send a \
                     `#sync`.",
        },
    ),
    (
        Rule::Edit,
        Meaning {
            wrong: "The relay had to change the event (remove a handle that the DID document does not have, or set the status of the \
                    account) and could not. It does not forward the event as it came.",
            remedy: "Upgrade the PDS: its `#identity` or `#account` events have an unusual form.",
        },
    ),
];

impl Rule {
    /// What the rule means to people.
    pub const fn meaning(self) -> Meaning {
        MEANINGS[self as usize].1
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_rule_has_its_own_meaning() {
        for (index, rule) in Rule::ALL.into_iter().enumerate() {
            assert_eq!(rule as usize, index, "{rule}");
            assert_eq!(MEANINGS[index].0, rule);
        }
    }
}
