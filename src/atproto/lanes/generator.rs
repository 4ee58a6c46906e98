//! Multiples of the generator, computed once for the life of the process, by libsecp256k1.

use std::arch::x86_64::*;
use std::sync::LazyLock;

use secp256k1::{PublicKey, SecretKey};

use super::field::{Field, Vector, splat};
use super::point::Affine;
use super::scalar::{HALF_BITS, Words, words};

/// Bits of a window of a multiple of the generator; it divides [`HALF_BITS`].
pub const WINDOW: u32 = 10;
/// Odd multiples in a table: the positive digits of a window.
const ENTRIES: usize = 1 << (WINDOW - 1);

/// The coordinates of a point, in one line of the cache.
#[repr(align(64))]
struct Entry {
    #[expect(dead_code, reason = "read by gathers alone")]
    coordinates: [Words; 2],
}

/// Odd multiples of a point.
pub struct Table(Box<[Entry; ENTRIES]>);

/// The odd multiples of G, and those of 2^130 G, up to the width of a window.
pub static MULTIPLES: LazyLock<[Table; 2]> = LazyLock::new(|| [0, HALF_BITS].map(odd_multiples));

/// The affine coordinates of a point.
pub fn coordinates(point: &PublicKey) -> [Words; 2] {
    let bytes = point.serialize_uncompressed();
    let (halves, _) = bytes[1..].as_chunks::<32>();
    [words(&halves[0]), words(&halves[1])]
}

/// The odd multiples of 2^exponent G.
fn odd_multiples(exponent: u32) -> Table {
    let mut secret = [0; 32];
    secret[31 - exponent as usize / 8] = 1 << (exponent % 8);
    let secret = SecretKey::from_secret_bytes(secret).expect("a power of two below n");
    let base = PublicKey::from_secret_key(&secret);
    let sum = |a: &PublicKey, b| a.combine(b).expect("small multiples of a point add up");
    let twice = sum(&base, &base);
    let multiples = std::iter::successors(Some(base), |last| Some(sum(last, &twice)));
    let entries: Box<[Entry]> = multiples
        .take(ENTRIES)
        .map(|point| Entry {
            coordinates: coordinates(&point),
        })
        .collect();
    Table(entries.try_into().ok().expect("as many as were taken"))
}

impl Table {
    /// In each lane that lane's multiple number `index`.
    #[inline]
    #[target_feature(enable = "avx512f")]
    pub fn pick(&self, index: Vector) -> Affine {
        let index = _mm512_and_epi64(index, splat(ENTRIES as u64 - 1));
        let offset = _mm512_slli_epi64::<3>(index);
        let words = self.0.as_ptr().cast::<i64>();
        let word = |word| {
            // SAFETY: an entry is eight words; with an index below ENTRIES and a word below 8 the
            // word lies in the table.
            unsafe { _mm512_i64gather_epi64::<8>(offset, words.add(word)) }
        };
        Affine {
            x: Field::from_words([word(0), word(1), word(2), word(3)]),
            y: Field::from_words([word(4), word(5), word(6), word(7)]),
        }
    }
}
