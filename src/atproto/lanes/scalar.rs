//! Arithmetic modulo n, the order of secp256k1, one number after the other: what a signature asks to
//! be multiplied, cut into windows that suit the lanes. Public numbers only; variable time.
//!
//! Numbers are 64-bit words, least significant first.

/// 256 bits.
pub type Words = [u64; 4];

/// The order of the group (SEC 2, section 2.4.1).
const N: Words = [
    0xbfd2_5e8c_d036_4141,
    0xbaae_dce6_af48_a03b,
    0xffff_ffff_ffff_fffe,
    0xffff_ffff_ffff_ffff,
];
/// Half the order, rounded down.
const HALF_N: Words = [
    0xdfe9_2f46_681b_20a0,
    0x5d57_6e73_57a4_501d,
    0xffff_ffff_ffff_ffff,
    0x7fff_ffff_ffff_ffff,
];
/// -1/n mod 2^64, for Montgomery's reduction.
const MINUS_INVERSE: u64 = 0x4b0d_ff66_5588_b13f;
/// 2^512 mod n: brings a number into Montgomery's form.
const RADIX_SQUARED: Words = [
    0x896c_f214_67d7_d140,
    0x7414_96c2_0e7c_f878,
    0xe697_f5e4_5bcd_07c6,
    0x9d67_1cd5_81c6_9bc5,
];

/// The short vectors (a1, -b1) and (a2, b2 = a1) with a + b lambda = 0 mod n that the endomorphism
/// of secp256k1 offers (Gallant, Lambert, Vanstone 2001), in three words each.
const A1: [u64; 3] = [0xe86c_90e4_9284_eb15, 0x3086_d221_a7d4_6bcd, 0];
const MINUS_B1: [u64; 3] = [0x6f54_7fa9_0abf_e4c3, 0xe443_7ed6_010e_8828, 0];
const A2: [u64; 3] = [0x57c1_108d_9d44_cfd8, 0x14ca_50f7_a8e2_f3f6, 1];
/// 2^384 b2 / n and 2^384 (-b1) / n, rounded down.
const B2_OVER_N: Words = [
    0xe893_209a_45db_b030,
    0x3daa_8a14_71e8_ca7f,
    0xe86c_90e4_9284_eb15,
    0x3086_d221_a7d4_6bcd,
];
const MINUS_B1_OVER_N: Words = [
    0x1571_b4ae_8ac4_7f71,
    0x2212_08ac_9df5_06c6,
    0x6f54_7fa9_0abf_e4c4,
    0xe443_7ed6_010e_8828,
];

/// Bits that the windows of each half of a multiple of the key must cover.
pub const HALF_BITS: u32 = 130;
/// Bits that the windows of a multiple of the generator must cover.
pub const FULL_BITS: u32 = 2 * HALF_BITS;

/// Reads 32 bytes, big-endian.
pub fn words(bytes: &[u8; 32]) -> Words {
    let (chunks, _) = bytes.as_chunks::<8>();
    std::array::from_fn(|i| u64::from_be_bytes(chunks[3 - i]))
}

/// Reads r and s of a compact signature, where both are in range: 0 < r < n, 0 < s <= n/2.
pub fn read_signature(signature: &[u8; 64]) -> Option<(Words, Words)> {
    let (halves, _) = signature.as_chunks::<32>();
    let (r, s) = (words(&halves[0]), words(&halves[1]));
    let in_range = r != [0; 4] && s != [0; 4] && less(&r, &N) && !less(&HALF_N, &s);
    in_range.then_some((r, s))
}

fn less(a: &Words, b: &Words) -> bool {
    a.iter().rev().lt(b.iter().rev())
}

/// a - b, wrapping.
fn subtract<const W: usize>(a: [u64; W], b: [u64; W]) -> [u64; W] {
    let mut borrow = false;
    std::array::from_fn(|i| {
        let difference;
        (difference, borrow) = a[i].borrowing_sub(b[i], borrow);
        difference
    })
}

/// a b, cut to as many words as the result has.
fn product<const A: usize, const B: usize, const W: usize>(a: [u64; A], b: [u64; B]) -> [u64; W] {
    let mut total = [0; W];
    for (i, a) in a.into_iter().enumerate() {
        let mut carry = 0;
        for (j, total) in total[i..].iter_mut().enumerate() {
            let factor = b.get(j).copied().unwrap_or(0);
            (*total, carry) = a.carrying_mul_add(factor, *total, carry);
        }
    }
    total
}

/// a b / 2^256 mod n, below n (Montgomery 1985), where a < 2^256 and b < n.
fn montgomery(a: Words, b: Words) -> Words {
    // Below 2n after each round: five words.
    let mut total = [0_u64; 5];
    for word in a {
        let (mut carry, mut carry_n) = (0, 0);
        let quotient = total[0]
            .wrapping_add(word.wrapping_mul(b[0]))
            .wrapping_mul(MINUS_INVERSE);
        for i in 0..4 {
            let low;
            (low, carry) = word.carrying_mul_add(b[i], total[i], carry);
            let shifted;
            (shifted, carry_n) = quotient.carrying_mul_add(N[i], low, carry_n);
            if i > 0 {
                total[i - 1] = shifted;
            }
        }
        let (low, overflow) = total[4].overflowing_add(carry);
        let (low, overflow_n) = low.overflowing_add(carry_n);
        total[3] = low;
        total[4] = u64::from(overflow) + u64::from(overflow_n);
    }
    let [low @ .., top] = total;
    if top == 0 && less(&low, &N) {
        low
    } else {
        subtract(low, N)
    }
}

/// 1/a in Montgomery's form, of a number in that form: a^(n - 2) by Fermat, four bits at a time.
fn invert(a: Words) -> Words {
    let mut powers = [a; 16];
    for i in 2..16 {
        powers[i] = montgomery(powers[i - 1], a);
    }
    let exponent = subtract(N, [2, 0, 0, 0]);
    // The first digit of n - 2 is 15.
    let mut power = powers[15];
    for i in (0..63).rev() {
        for _ in 0..4 {
            power = montgomery(power, power);
        }
        let digit = exponent[i / 16] >> (i % 16 * 4) & 15;
        if digit > 0 {
            power = montgomery(power, powers[digit as usize]);
        }
    }
    power
}

/// 2^256/a mod n for each number, none of which may be 0: one inversion for all of them
/// (Montgomery 1987).
pub fn invert_all(numbers: &mut [Words]) {
    if numbers.is_empty() {
        return;
    }
    let mut product = montgomery(RADIX_SQUARED, [1, 0, 0, 0]);
    let mut before = Vec::with_capacity(numbers.len());
    for number in &mut *numbers {
        *number = montgomery(RADIX_SQUARED, *number);
        before.push(product);
        product = montgomery(product, *number);
    }
    let mut inverse = invert(product);
    for (number, before) in numbers.iter_mut().zip(before).rev() {
        let this = montgomery(inverse, before);
        inverse = montgomery(inverse, *number);
        *number = this;
    }
}

/// What ECDSA asks to be multiplied: u1 G + u2 Q, in odd numbers ready to be cut into windows.
///
/// Any odd k, also a negative one, with |k| < 2^L is a sum of L terms +-2^i, with the plus signs where
/// (k + 2^L - 1) / 2 = floor(k / 2) + 2^(L - 1) has its ones. So a window of w of its bits stands for an
/// odd digit between -2^w and 2^w: no digit is ever zero, and no lane ever has nothing to add.
#[derive(Clone, Copy, Debug)]
pub struct Multipliers {
    /// u1, in [`FULL_BITS`] bits.
    pub generator: [u64; 5],
    /// k1 and k2, in [`HALF_BITS`] bits each, where k1 + k2 lambda = u2 mod n.
    pub key: [[u64; 3]; 2],
}

impl Multipliers {
    /// u1 = z/s and u2 = r/s, from `inverse` = 2^256/s.
    pub fn new(z: Words, r: Words, inverse: Words) -> Self {
        Self {
            generator: odd_full(montgomery(z, inverse)),
            key: split(montgomery(r, inverse)).map(|half| plus_signs(half, HALF_BITS)),
        }
    }
}

/// k or k + n, whichever is odd.
fn odd_full(k: Words) -> [u64; 5] {
    let mut odd = [k[0], k[1], k[2], k[3], 0];
    if k[0].is_multiple_of(2) {
        let mut carry = false;
        for (word, n) in odd.iter_mut().zip(N) {
            (*word, carry) = word.carrying_add(n, carry);
        }
        odd[4] = carry.into();
    }
    plus_signs(odd, FULL_BITS)
}

/// floor(k / 2) + 2^(bits - 1).
fn plus_signs<const W: usize>(k: [u64; W], bits: u32) -> [u64; W] {
    let mut signs = std::array::from_fn(|i| match k.get(i + 1) {
        Some(next) => k[i] >> 1 | next << 63,
        None => (k[i].cast_signed() >> 1).cast_unsigned(),
    });
    let (word, bit) = ((bits - 1) / 64, (bits - 1) % 64);
    signs[word as usize] = signs[word as usize].wrapping_add(1 << bit);
    signs
}

/// k1 and k2, both odd, with k1 + k2 lambda = k mod n and |k1|, |k2| < 2^130, in two's complement.
///
/// (k1, k2) = (k, 0) - c1 (a1, b1) - c2 (a2, b2), with c1 and c2 near b2 k / n and -b1 k / n.
/// Rounded to the nearest they would give halves below 2^128. But a1, b1, b2 are odd and a2 is even,
/// so k1 = k + c1 and k2 = c1 + c2 mod 2: setting the last bits of c1 and c2 makes both halves odd.
/// That puts c1 and c2 off by hardly more than 2: |k1| < 2.01 (a1 + a2), |k2| < 2.01 (|b1| + b2).
fn split(k: Words) -> [[u64; 3]; 2] {
    let quotient = |ratio: Words, odd: bool| {
        let [.., low, high] = product::<4, 4, 8>(k, ratio);
        [low & !1 | u64::from(odd), high]
    };
    let is_odd = k[0] % 2 == 1;
    let (c1, c2) = (
        quotient(B2_OVER_N, !is_odd),
        quotient(MINUS_B1_OVER_N, is_odd),
    );
    let k = [k[0], k[1], k[2]];
    let k1 = subtract(subtract(k, product(c1, A1)), product(c2, A2));
    let k2 = subtract(product(c1, MINUS_B1), product(c2, A1));
    [k1, k2]
}

#[cfg(test)]
mod tests {
    use num_bigint::{BigInt, BigUint, Sign};

    use super::*;

    const LAMBDA: Words = [
        0xdf02_967c_1b23_bd72,
        0x122e_22ea_2081_6678,
        0xa526_1c02_8812_645a,
        0x5363_ad4c_c05c_30e0,
    ];

    fn number(words: &[u64]) -> BigUint {
        words
            .iter()
            .rev()
            .fold(BigUint::ZERO, |number, word| (number << 64) + word)
    }

    /// The odd number that a window form stands for.
    fn odd(signs: &[u64], bits: u32) -> BigInt {
        (BigInt::from(number(signs)) << 1) + 1 - (BigInt::from(1) << bits)
    }

    fn any(rng: &mut fastrand::Rng) -> Words {
        let extremes = [[0; 4], [1, 0, 0, 0], N, HALF_N, LAMBDA, [u64::MAX; 4]];
        match rng.usize(..4) {
            0 => extremes[rng.usize(..extremes.len())],
            1 => subtract(N, [rng.u64(..50), 0, 0, 0]),
            2 => std::array::from_fn(|_| [0, 1, u64::MAX, 1 << 63][rng.usize(..4)]),
            _ => std::array::from_fn(|_| rng.u64(..)),
        }
    }

    fn below_n(rng: &mut fastrand::Rng) -> Words {
        std::iter::repeat_with(|| any(rng))
            .find(|number| less(number, &N))
            .unwrap()
    }

    #[test]
    fn products() {
        let mut rng = fastrand::Rng::with_seed(1);
        let n = number(&N);
        for _ in 0..100_000 {
            let (a, b) = (any(&mut rng), below_n(&mut rng));
            let result = number(&montgomery(a, b));
            assert!(result < n);
            assert_eq!((result << 256) % &n, number(&a) * number(&b) % &n);
            let full: [u64; 8] = product(a, b);
            assert_eq!(number(&full), number(&a) * number(&b));
        }
    }

    #[test]
    fn inverses() {
        let mut rng = fastrand::Rng::with_seed(2);
        let n = number(&N);
        for size in 0..70 {
            let numbers: Vec<_> = std::iter::repeat_with(|| below_n(&mut rng))
                .filter(|number| *number != [0; 4])
                .take(size)
                .collect();
            let mut inverses = numbers.clone();
            invert_all(&mut inverses);
            for (number_, inverse) in numbers.iter().zip(&inverses) {
                let product = number(number_) * number(inverse) % &n;
                assert_eq!(product, (BigUint::from(1_u8) << 256) % &n);
            }
        }
    }

    #[test]
    fn multipliers_are_odd_and_congruent() {
        let mut rng = fastrand::Rng::with_seed(3);
        let n = BigInt::from(number(&N));
        for _ in 0..200_000 {
            let k = below_n(&mut rng);
            let exact = BigInt::from_biguint(Sign::Plus, number(&k));
            let full = odd_full(k);
            assert_eq!(full[4] >> 4, 0);
            assert_eq!((odd(&full, FULL_BITS) - &exact) % &n, BigInt::ZERO);
            let halves = split(k).map(|half| {
                assert_eq!(half[0] & 1, 1);
                let signs = plus_signs(half, HALF_BITS);
                assert_eq!(signs[2] >> 2, 0, "more than {HALF_BITS} bits");
                odd(&signs, HALF_BITS)
            });
            let lambda = BigInt::from(number(&LAMBDA));
            assert_eq!(
                (&halves[0] + &halves[1] * lambda - exact) % &n,
                BigInt::ZERO
            );
        }
    }

    #[test]
    fn signatures_out_of_range() {
        let bytes = |number: Words| -> [u8; 32] {
            let mut bytes = [0; 32];
            for (chunk, word) in bytes.chunks_mut(8).zip(number.iter().rev()) {
                chunk.copy_from_slice(&word.to_be_bytes());
            }
            bytes
        };
        let read = |r, s| {
            let mut signature = [0; 64];
            signature[..32].copy_from_slice(&bytes(r));
            signature[32..].copy_from_slice(&bytes(s));
            read_signature(&signature)
        };
        let one = [1, 0, 0, 0];
        let last = subtract(N, one);
        let high = [HALF_N[0] + 1, HALF_N[1], HALF_N[2], HALF_N[3]];
        assert_eq!(read(one, one), Some((one, one)));
        assert_eq!(read(last, HALF_N), Some((last, HALF_N)));
        for (r, s) in [
            ([0; 4], one),
            (one, [0; 4]),
            (N, one),
            ([u64::MAX; 4], one),
            (one, high),
            (one, last),
        ] {
            assert_eq!(read(r, s), None);
        }
    }
}
