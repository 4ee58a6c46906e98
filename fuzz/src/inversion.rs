//! Inversion of the commits that frames carry. The nodes are handed over under the CIDs that the CAR
//! claims, hashed or not, so that damage reaches the tree; where the hashes hold, so does the proof.

use atproto_relay::atproto::car::Car;
use atproto_relay::atproto::cid::Cid;
use atproto_relay::atproto::commit::SignedCommit;
use atproto_relay::atproto::frame::{self, Action, Commit, Message};
use atproto_relay::atproto::mst::{self, MstError, Tree};
use atproto_relay::atproto::tid::Tid;
use atproto_relay::verify::rules::{self, Strictness};

/// Checks the bytes of a `#commit` frame.
pub fn check(bytes: &[u8]) {
    let Ok(Message::Commit(commit)) = frame::decode(bytes).map(|frame| frame.message) else {
        return;
    };
    judge(&commit);
    let Ok(car) = Car::parse(commit.blocks) else {
        return;
    };
    let head = car.blocks().get(&commit.commit);
    let Some(Ok(signed)) = head.map(SignedCommit::parse) else {
        return;
    };
    let lookup = |cid: &Cid| car.blocks().get(cid);
    let ops: Option<Vec<_>> = commit.ops.iter().map(rules::invertible).collect();
    let before = ops.map(|ops| mst::invert(&ops, signed.data, lookup));
    // Whole or in part, a tree that loads can be written and walked.
    if let Ok(mut tree) = Tree::load(signed.data, lookup) {
        let _ = tree.root_cid();
        assert!(tree.walk().count() <= bytes.len());
    }
    if matches!(before, Some(Ok(_))) && car.verify_hashes().is_ok() {
        proven(&commit, signed.data, lookup);
    }
}

/// What the strict rules let pass, the lenient ones do.
fn judge(commit: &Commit<'_>) {
    let Ok(rev) = Tid::parse(commit.rev) else {
        return;
    };
    let strict = rules::commit(commit, rev, Strictness::Strict);
    let lenient = rules::commit(commit, rev, Strictness::Lenient);
    if let Ok(facts) = strict {
        assert_eq!(facts.rev, rev);
        assert!(lenient.is_ok_and(|other| other.data == facts.data));
    }
}

/// The tree after the commit holds what the ops say, as far as the blocks show it.
fn proven<'a>(commit: &Commit<'_>, data: Cid, lookup: impl Fn(&Cid) -> Option<&'a [u8]>) {
    for (at, op) in commit.ops.iter().enumerate() {
        if commit.ops[at + 1..]
            .iter()
            .any(|later| later.path == op.path)
        {
            continue;
        }
        match mst::read(op.path.as_bytes(), data, &lookup) {
            Ok(found) => {
                // That a deletion names no record is for the rules to ask.
                let expected = op.cid.filter(|_| op.action != Action::Delete);
                assert_eq!(found, expected, "{}", op.path);
            }
            // What inversion does not pass is not looked at.
            Err(MstError::MissingNode(_) | MstError::BadNode { .. }) => {}
            Err(error) => panic!("{}: {error}", op.path),
        }
    }
}
