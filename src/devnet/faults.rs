//! What can go wrong between a host and a relay, by name, with what a relay must make of it. Which
//! faults a run has and where they strike is drawn from a seeded generator. It spoils commits; the
//! sender applies the faults of connections.

use std::fmt;
use std::str::FromStr;

use rand::Rng;
use rand::seq::IndexedRandom;

use super::keys::SigningKey;
use super::pds::Commit;
use crate::atproto::car::{self, Car};
use crate::atproto::cid::{Cid, Codec};
use crate::atproto::commit;
use crate::atproto::did::Did;

/// A fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Fault {
    /// A commit whose signature is well formed and of another message.
    BadSignature,
    /// A commit that is never sent: the chain of its account breaks.
    Gap,
    /// An account's commit, sent by a host that is not its PDS, before its PDS sends it.
    ForeignAccount,
    /// A commit sent before, sent again under a new sequence number.
    Replay,
    /// The host sends nothing, and reads nothing, for a while.
    Stall,
    /// The connection ends without a word.
    Disconnect,
    /// The host loses its sequence and starts again at 1.
    SeqRestart,
    /// A message that is not canonical CBOR.
    MalformedCbor,
    /// A message larger than any frame may be.
    OversizedFrame,
    /// A commit with a block that does not hash to its CID.
    WrongBlockHash,
    /// A commit that conceals one of its ops.
    MissingOp,
    /// Many new accounts at once, more than the host's quota.
    Flood,
}

/// What a relay must make of a fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Effect {
    /// The event is refused under this rule; the account's next good commit passes.
    Refused(&'static str),
    /// The connection is closed; nothing is lost after the reconnect.
    Closed,
    /// Events come later, none is lost.
    Delayed,
    /// The account's next commit passes and is marked as desynchronised.
    ChainBroken,
    /// The accounts over the host's quota do not come out.
    Throttled,
}

impl Fault {
    /// Every fault.
    pub const ALL: [Fault; 12] = [
        Fault::BadSignature,
        Fault::Gap,
        Fault::ForeignAccount,
        Fault::Replay,
        Fault::Stall,
        Fault::Disconnect,
        Fault::SeqRestart,
        Fault::MalformedCbor,
        Fault::OversizedFrame,
        Fault::WrongBlockHash,
        Fault::MissingOp,
        Fault::Flood,
    ];

    /// Its name on the command line.
    pub const fn name(self) -> &'static str {
        match self {
            Fault::BadSignature => "bad-signature",
            Fault::Gap => "gap",
            Fault::ForeignAccount => "foreign-account",
            Fault::Replay => "replay",
            Fault::Stall => "stall",
            Fault::Disconnect => "disconnect",
            Fault::SeqRestart => "seq-restart",
            Fault::MalformedCbor => "malformed-cbor",
            Fault::OversizedFrame => "oversized-frame",
            Fault::WrongBlockHash => "wrong-block-hash",
            Fault::MissingOp => "missing-op",
            Fault::Flood => "flood",
        }
    }

    /// What a relay must make of it.
    pub const fn effect(self) -> Effect {
        match self {
            Fault::BadSignature => Effect::Refused("signature"),
            Fault::Gap => Effect::ChainBroken,
            Fault::ForeignAccount => Effect::Refused("wrong_host"),
            Fault::Replay => Effect::Refused("rev_order"),
            Fault::Stall | Fault::Disconnect | Fault::SeqRestart => Effect::Delayed,
            Fault::MalformedCbor | Fault::OversizedFrame => Effect::Closed,
            Fault::WrongBlockHash => Effect::Refused("block_hash"),
            Fault::MissingOp => Effect::Refused("inversion"),
            Fault::Flood => Effect::Throttled,
        }
    }

    /// Whether it costs the relay a connection, or time: these strike seldom.
    pub const fn interrupts(self) -> bool {
        matches!(self.effect(), Effect::Closed | Effect::Delayed)
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// No fault has this name.
#[derive(Debug, thiserror::Error)]
#[error("no fault is called `{0}`; there are {all}", all = Fault::ALL.map(Fault::name).join(", "))]
pub struct UnknownFault(String);

impl FromStr for Fault {
    type Err = UnknownFault;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        Fault::ALL
            .into_iter()
            .find(|fault| fault.name() == text)
            .ok_or_else(|| UnknownFault(text.to_owned()))
    }
}

/// Which faults a run has, and how many.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct FaultPlan {
    /// The faults that may strike.
    pub faults: Vec<Fault>,
    /// Share of the commits that a fault strikes, 0 to 1.
    pub share: f64,
    /// Faults that interrupt a connection, in the whole run; spread evenly.
    pub interruptions: usize,
}

impl FaultPlan {
    /// No faults.
    pub fn none() -> FaultPlan {
        FaultPlan::default()
    }

    /// Every fault there is.
    pub fn all(share: f64, interruptions: usize) -> FaultPlan {
        FaultPlan {
            faults: Fault::ALL.to_vec(),
            share,
            interruptions,
        }
    }

    /// The fault that strikes the next commit, if one does.
    pub fn strike(&self, rng: &mut impl Rng) -> Option<Fault> {
        let striking: Vec<Fault> = self
            .faults
            .iter()
            .copied()
            .filter(|fault| !fault.interrupts() && *fault != Fault::Flood)
            .collect();
        if striking.is_empty() || !rng.random_bool(self.share.clamp(0.0, 1.0)) {
            return None;
        }
        striking.choose(rng).copied()
    }

    /// The interruptions of a run, each with its place among `events`.
    pub fn interruptions(&self, events: usize, rng: &mut impl Rng) -> Vec<(usize, Fault)> {
        let kinds: Vec<Fault> = self
            .faults
            .iter()
            .copied()
            .filter(|fault| fault.interrupts())
            .collect();
        let Some(apart) = events
            .checked_div(self.interruptions)
            .filter(|_| !kinds.is_empty())
        else {
            return Vec::new();
        };
        let place = |n: usize| n * apart + apart / 2;
        let start = rng.random_range(0..kinds.len());
        (0..self.interruptions)
            .map(|n| (place(n), kinds[(start + n) % kinds.len()]))
            .collect()
    }

    /// Whether a flood of new accounts is part of the run.
    pub fn floods(&self) -> bool {
        self.faults.contains(&Fault::Flood)
    }
}

/// The commit with a fault that is in its bytes; `None` for every other fault, and where there is
/// nothing to spoil. `stranger` is a key that is not the account's.
pub fn spoil(fault: Fault, did: &Did, commit: &Commit, stranger: &SigningKey) -> Option<Commit> {
    let mut spoilt = commit.clone();
    match fault {
        Fault::BadSignature => {
            let unsigned =
                commit::encode_unsigned(did.as_str(), &commit.rev.to_string(), &commit.data);
            let block = commit::encode_signed(
                did.as_str(),
                &commit.rev.to_string(),
                &commit.data,
                &stranger.sign(&unsigned),
            );
            spoilt.cid = Cid::of(Codec::DagCbor, &block);
            let car = Car::parse(&commit.car).ok()?;
            let others = car.blocks().iter().filter(|(cid, _)| *cid != commit.cid);
            spoilt.car = car::write(
                &[spoilt.cid],
                [(spoilt.cid, &block[..])].into_iter().chain(others),
            )
            .into();
        }
        // The last byte of a CAR is the last byte of its last block.
        Fault::WrongBlockHash => {
            let mut car = commit.car.to_vec();
            *car.last_mut()? ^= 1;
            spoilt.car = car.into();
        }
        Fault::MissingOp => {
            spoilt.ops.pop()?;
        }
        _ => return None,
    }
    Some(spoilt)
}

/// A fault that struck.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Injected {
    pub fault: Fault,
    /// The sender's number of the host.
    pub host: u32,
    /// The account it struck, if one.
    pub did: Option<String>,
    /// The sequence number of the faulty event, if it has one.
    pub seq: Option<i64>,
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand::SeedableRng;

    #[test]
    fn names_are_unique_and_read_back() {
        for fault in Fault::ALL {
            assert_eq!(fault.name().parse::<Fault>().unwrap(), fault);
        }
        assert!(
            "".parse::<Fault>()
                .unwrap_err()
                .to_string()
                .contains("wrong-block-hash")
        );
    }

    #[test]
    fn a_seed_gives_the_same_faults_again_and_all_of_them() {
        let plan = FaultPlan::all(0.5, 10);
        let draw = |seed| {
            let mut rng = rand::rngs::StdRng::seed_from_u64(seed);
            let strikes: Vec<_> = (0..200).map(|_| plan.strike(&mut rng)).collect();
            (strikes, plan.interruptions(1_000, &mut rng))
        };
        assert_eq!(draw(7), draw(7));
        let (strikes, interruptions) = draw(7);
        let struck = |fault: &Fault| {
            strikes.contains(&Some(*fault)) || interruptions.iter().any(|(_, f)| f == fault)
        };
        assert!(
            Fault::ALL
                .iter()
                .filter(|fault| **fault != Fault::Flood)
                .all(struck)
        );
        assert!(interruptions.iter().all(|(place, _)| *place < 1_000));
    }

    #[test]
    fn no_faults_strike_where_none_are_planned() {
        let mut rng = rand::rngs::StdRng::seed_from_u64(1);
        assert_eq!(FaultPlan::none().strike(&mut rng), None);
        assert!(FaultPlan::none().interruptions(100, &mut rng).is_empty());
    }
}
