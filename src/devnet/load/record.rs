//! What the load's repositories are filled with, and how large: records of one collection, frames
//! whose sizes follow the network's distribution.

use rand::Rng;
use rand::rngs::StdRng;

use crate::atproto::cbor;
use crate::atproto::cid::{Cid, Codec};
use crate::atproto::mst::Tree;
use crate::atproto::tid::Tid;
use crate::devnet::dag::{self, map, text};
use crate::devnet::keys::{Curve, SigningKey};
use crate::devnet::pds::Action;

/// Median size of a `#commit` frame on the network, in bytes.
const FRAME_P50: f64 = 5_200.0;
/// Size that 99 of 100 `#commit` frames on the network stay within, in bytes.
const FRAME_P99: f64 = 9_600.0;
/// The standard normal distribution's 99th percentile.
const NORMAL_P99: f64 = 2.326_347_874;
/// Smallest text of a record, in bytes.
const SHORTEST_TEXT: usize = 16;
/// Smallest record, in bytes.
pub(super) const SHORTEST_RECORD: usize = RECORD_FRAME + SHORTEST_TEXT;
/// Text that records are cut from.
const TEXT_BYTES: usize = 1 << 16;
/// Of 100 ops: creations, updates; the rest deletes.
const CREATES: u32 = 86;
const UPDATES: u32 = 8;

const COLLECTION: &str = "app.bsky.feed.post";

/// Where records come from.
pub(super) struct Records {
    text: String,
    template: Tree,
    paths: Vec<(String, Cid)>,
    stranger: SigningKey,
}

impl Records {
    /// `existing` records are in every repository from the start, the same in each.
    pub fn new(rng: &mut StdRng, existing: usize, before: u64) -> Records {
        let text: String = (0..TEXT_BYTES)
            .map(|_| char::from(rng.random_range(b' '..=b'~')))
            .collect();
        let stranger = SigningKey::generate(Curve::K256, rng);
        let mut records = Records {
            text,
            template: Tree::empty(),
            paths: Vec::new(),
            stranger,
        };
        for n in 0..existing {
            let rev = Tid::from_micros(before - (existing - n) as u64 * 1_000_000, 0);
            let (cid, _) = records.record(rng, SHORTEST_RECORD);
            let path = Records::path(rev);
            records
                .template
                .insert(path.as_bytes(), cid)
                .expect("paths of different times differ");
            records.paths.push((path, cid));
        }
        records.template.root_cid();
        records
    }

    /// A repository as it is before the run.
    pub fn template(&self) -> (Tree, Vec<(String, Cid)>) {
        (self.template.clone(), self.paths.clone())
    }

    /// A key that is no account's.
    pub fn stranger(&self) -> &SigningKey {
        &self.stranger
    }

    /// The path of a record made at `time`; different times give different paths.
    pub fn path(time: Tid) -> String {
        format!("{COLLECTION}/{time}")
    }

    /// What the next op does.
    pub fn action(&self, rng: &mut StdRng) -> Action {
        match rng.random_range(0..100) {
            n if n < CREATES => Action::Create,
            n if n < CREATES + UPDATES => Action::Update,
            _ => Action::Delete,
        }
    }

    /// A size of the network's distribution for the next `#commit` frame, in bytes.
    pub fn frame_bytes(&self, rng: &mut StdRng) -> usize {
        let sigma = (FRAME_P99 / FRAME_P50).ln() / NORMAL_P99;
        (FRAME_P50 * (sigma * normal(rng)).exp()) as usize
    }

    /// A record of about so many bytes.
    pub fn record(&self, rng: &mut StdRng, bytes: usize) -> (Cid, Vec<u8>) {
        let length = bytes
            .saturating_sub(RECORD_FRAME)
            .clamp(SHORTEST_TEXT, TEXT_BYTES / 2);
        let start = rng.random_range(0..TEXT_BYTES - length);
        let fields = map([
            ("$type", text(COLLECTION)),
            ("text", text(&self.text[start..start + length])),
        ]);
        let block = dag::encode(&libipld::Ipld::Map(fields));
        debug_assert!(cbor::validate(&block).is_ok());
        (Cid::of(Codec::DagCbor, &block), block)
    }
}

/// Bytes of a record around its text.
const RECORD_FRAME: usize = 36;

/// A standard normal deviate, after Box and Muller.
fn normal(rng: &mut StdRng) -> f64 {
    let (u, v): (f64, f64) = (
        rng.random_range(f64::EPSILON..1.0),
        rng.random_range(0.0..1.0),
    );
    (-2.0 * u.ln()).sqrt() * (std::f64::consts::TAU * v).cos()
}
