//! Eight secp256k1 signatures at once, on processors with AVX-512 IFMA.
//!
//! The lanes prove signatures good; they never prove one bad. What they do not prove (bad signatures,
//! the few good ones that meet an exceptional case, and remainders too small to fill lanes) is left to
//! libsecp256k1, so a mistake here could only be a wrong yes. Keys and signatures are public: nothing
//! here runs in constant time, and none of it may be used to sign.

#![allow(unsafe_code, reason = "vector instructions")]

mod field;
mod generator;
mod point;
mod scalar;

use std::arch::x86_64::*;

use secp256k1::PublicKey;

use field::{Field, Vector, Wide, load, splat};
use generator::MULTIPLES;
use point::{Affine, Jacobian, Multiples};
use scalar::{HALF_BITS, Multipliers, Words};

/// How many signatures there are lanes for.
const LANES: usize = 8;
/// A remainder smaller than this is checked faster one by one.
const WORTHWHILE: usize = 2;

/// One signature to check.
#[derive(Clone, Copy)]
pub struct Job<'a> {
    /// The key it must have been made with.
    pub key: &'a PublicKey,
    /// What it signs.
    pub digest: &'a [u8; 32],
    /// r and s, big-endian.
    pub signature: &'a [u8; 64],
}

/// The right to use the lanes: it exists where the processor has them.
#[derive(Clone, Copy, Debug)]
pub struct Lanes(());

impl Lanes {
    /// The lanes of this processor, if it has them.
    pub fn detect() -> Option<Self> {
        let present = is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512dq")
            && is_x86_feature_detected!("avx512ifma");
        present.then_some(Self(()))
    }

    /// Which signatures are proven good, in the order of the jobs. The others may be good or bad.
    pub fn prove(self, jobs: &[Job<'_>]) -> Vec<bool> {
        let mut proven = vec![false; jobs.len()];
        let remainder = jobs.len() % LANES;
        let left = if remainder < WORTHWHILE { remainder } else { 0 };
        let claims = claims(&jobs[..jobs.len() - left]);
        for group in claims.chunks(LANES) {
            // SAFETY: a `Lanes` exists only where the processor has these instructions.
            let good = unsafe { check(group) };
            for (lane, claim) in group.iter().enumerate() {
                proven[claim.job] = good >> lane & 1 == 1;
            }
        }
        proven
    }
}

/// That the x of u1 G + u2 Q is r.
struct Claim {
    job: usize,
    key: [Words; 2],
    r: Words,
    multipliers: Multipliers,
}

/// The claims of those jobs whose r and s are in range.
fn claims(jobs: &[Job<'_>]) -> Vec<Claim> {
    let mut in_range = Vec::with_capacity(jobs.len());
    let mut inverses = Vec::with_capacity(jobs.len());
    for (index, job) in jobs.iter().enumerate() {
        if let Some((r, s)) = scalar::read_signature(job.signature) {
            in_range.push((index, r));
            inverses.push(s);
        }
    }
    scalar::invert_all(&mut inverses);
    in_range
        .into_iter()
        .zip(inverses)
        .map(|((index, r), inverse)| Claim {
            job: index,
            key: generator::coordinates(jobs[index].key),
            r,
            multipliers: Multipliers::new(scalar::words(jobs[index].digest), r, inverse),
        })
        .collect()
}

/// In which lanes the claim is true beyond doubt.
#[target_feature(enable = "avx512f,avx512dq,avx512ifma")]
fn check(group: &[Claim]) -> u8 {
    let q = Affine {
        x: Field::from_words(transpose(group, |claim| claim.key[0])),
        y: Field::from_words(transpose(group, |claim| claim.key[1])),
    };
    let generator = transpose(group, |claim| claim.multipliers.generator);
    let key = [0, 1].map(|half| transpose(group, |claim| claim.multipliers.key[half]));
    let r = Field::from_words(transpose(group, |claim| claim.r));
    let (x, z) = combine(generator, key, q);
    // x = X/Z^2 is r where r Z^2 - X is 0. That x may also be r + n is left to libsecp256k1.
    let difference = Wide::from_sum(x.negated())
        .add_product(z.squared(), r)
        .reduce();
    difference.is_zero() & !z.is_zero()
}

/// u1 G + k1 Q + k2 lambda Q: the windows of all multipliers share the doublings.
///
/// X and Z are given, and Z is 0 where a lane met an exceptional case.
#[target_feature(enable = "avx512f,avx512dq,avx512ifma")]
fn combine(generator: [Vector; 5], key: [[Vector; 3]; 2], q: Affine) -> (Field, Field) {
    let multiples = Multiples::new(q);
    let first = HALF_BITS - point::WINDOW;
    let (index, minus) = digit(&key[0], first, point::WINDOW);
    let mut sum = Jacobian::new(multiples.pick(0, index), minus);
    let (index, minus) = digit(&key[1], first, point::WINDOW);
    sum = sum.plus(multiples.pick(1, index), minus, sum.z);
    for position in (0..first).rev() {
        sum = sum.doubled();
        if position.is_multiple_of(point::WINDOW) {
            for half in [0, 1] {
                let (index, minus) = digit(&key[half], position, point::WINDOW);
                sum = sum.plus(multiples.pick(half, index), minus, sum.z);
            }
        }
        if position.is_multiple_of(generator::WINDOW) {
            for (half, table) in MULTIPLES.iter().enumerate() {
                let position = position + half as u32 * HALF_BITS;
                let (index, minus) = digit(&generator, position, generator::WINDOW);
                let z = sum.z.times(multiples.z);
                sum = sum.plus(table.pick(index), minus, z);
            }
        }
    }
    (sum.x, sum.z.times(multiples.z))
}

/// Index in the table of odd multiples, and sign, of the odd digit whose window is `width` bits at
/// `position`: 2 index + 1 where the window's first bit is set, else -(2 index + 1).
#[inline]
#[target_feature(enable = "avx512f,avx512dq")]
fn digit(words: &[Vector], position: u32, width: u32) -> (Vector, __mmask8) {
    let (word, bit) = (position as usize / 64, position % 64);
    let mut window = _mm512_srlv_epi64(words[word], splat(bit.into()));
    if bit + width > 64 {
        let next = _mm512_sllv_epi64(words[word + 1], splat((64 - bit).into()));
        window = _mm512_or_epi64(window, next);
    }
    let sign = splat(1 << (width - 1));
    let minus = _mm512_testn_epi64_mask(window, sign);
    let index = _mm512_mask_xor_epi64(window, minus, window, splat(u64::MAX));
    (
        _mm512_and_epi64(index, splat((1 << (width - 1)) - 1)),
        minus,
    )
}

/// One number of W words of each claim, word by word; spare lanes repeat the first claim.
#[inline]
#[target_feature(enable = "avx512f")]
fn transpose<const W: usize>(group: &[Claim], number: impl Fn(&Claim) -> [u64; W]) -> [Vector; W] {
    let numbers: [_; 8] = std::array::from_fn(|lane| number(group.get(lane).unwrap_or(&group[0])));
    std::array::from_fn(|word| load(&numbers.map(|number| number[word])))
}

#[cfg(test)]
mod tests {
    use num_bigint::BigUint;
    use secp256k1::ecdsa::{self, Signature};
    use secp256k1::{Message, SecretKey};

    use super::*;

    fn number(words: &[u64]) -> BigUint {
        words
            .iter()
            .rev()
            .fold(BigUint::ZERO, |number, word| (number << 64) + word)
    }

    fn n() -> BigUint {
        number(&[
            0xbfd2_5e8c_d036_4141,
            0xbaae_dce6_af48_a03b,
            u64::MAX - 1,
            u64::MAX,
        ])
    }

    fn bytes(number: &BigUint) -> [u8; 32] {
        let short = number.to_bytes_be();
        let mut bytes = [0; 32];
        bytes[32 - short.len()..].copy_from_slice(&short);
        bytes
    }

    fn words_of(number: &BigUint) -> Words {
        scalar::words(&bytes(number))
    }

    fn inverse(a: &BigUint) -> BigUint {
        a.modpow(&(n() - 2_u8), &n())
    }

    fn point(secret: &BigUint) -> PublicKey {
        PublicKey::from_secret_key(&SecretKey::from_secret_bytes(bytes(secret)).unwrap())
    }

    fn x(point: &PublicKey) -> [u8; 32] {
        point.serialize()[1..].try_into().unwrap()
    }

    /// The odd digit at `position`, modulo n.
    fn digit_of(words: &[u64], position: u32, width: u32) -> BigUint {
        let window = (number(words) >> position) & BigUint::from((1_u32 << width) - 1);
        (n() + (window << 1) - ((1_u64 << width) - 1)) % n()
    }

    /// What `combine` adds, in order, as (a, b): a G + b Q. None stands for a doubling.
    fn schedule(multipliers: &Multipliers) -> Vec<Option<(BigUint, BigUint)>> {
        let lambda = number(&[
            0xdf02_967c_1b23_bd72,
            0x122e_22ea_2081_6678,
            0xa526_1c02_8812_645a,
            0x5363_ad4c_c05c_30e0,
        ]);
        let mut steps = vec![];
        for position in (0..HALF_BITS).rev() {
            steps.push(None);
            if position % point::WINDOW == 0 {
                let [k1, k2] = multipliers
                    .key
                    .map(|half| digit_of(&half, position, point::WINDOW));
                steps.push(Some((BigUint::ZERO, k1)));
                steps.push(Some((BigUint::ZERO, k2 * &lambda % n())));
            }
            if position % generator::WINDOW == 0 {
                for half in [0, HALF_BITS] {
                    let digit =
                        digit_of(&multipliers.generator, position + half, generator::WINDOW);
                    steps.push(Some(((digit << half) % n(), BigUint::ZERO)));
                }
            }
        }
        steps
    }

    /// For each addition in turn and both signs: a key for which that addition, and hardly any other,
    /// adds a point to itself or to its opposite. The lane must say that it does not know.
    #[test]
    fn every_addition_can_be_exceptional() {
        let Some(lanes) = Lanes::detect() else { return };
        let mut rng = fastrand::Rng::with_seed(8);
        let mut random =
            || BigUint::from_bytes_be(&std::array::from_fn::<_, 32, _>(|_| rng.u8(..))) % n();
        let additions = schedule(&multipliers(&random(), &random()))
            .iter()
            .flatten()
            .count();
        assert_eq!(additions, 2 * 26 + 2 * 13);
        let mut met = 0;
        // The first four add multiples of Q alone, which no key makes equal: Q counts for nothing there.
        for target in 4..additions {
            for opposite in [false, true] {
                // A pair of multipliers whose s is low, so that they are what the lanes see.
                let signed = std::iter::repeat_with(|| {
                    let (u1, u2) = (random(), random());
                    let key = exceptional_key(&multipliers(&u1, &u2), target, opposite)?;
                    // After the last addition of opposites there is no x: any r will do.
                    let sum = (&u1 + &u2 * &key) % n();
                    let x = if sum == BigUint::ZERO {
                        [1; 32]
                    } else {
                        x(&point(&sum))
                    };
                    let r = BigUint::from_bytes_be(&x) % n();
                    let s = &r * inverse(&u2) % n();
                    let z = &s * u1 % n();
                    (&s + &s < n())
                        .then(|| (point(&key), bytes(&z), [bytes(&r), bytes(&s)].concat()))
                })
                .flatten()
                .next()
                .unwrap();
                let (key, digest, signature) = signed;
                let signature: [u8; 64] = signature.try_into().unwrap();
                let parsed = Signature::from_compact(&signature).unwrap();
                let good = ecdsa::verify(&parsed, Message::from_digest(digest), &key).is_ok();
                assert_eq!(good, !(opposite && target == additions - 1));
                let job = Job {
                    key: &key,
                    digest: &digest,
                    signature: &signature,
                };
                let honest = (point(&7_u8.into()), [9; 32]);
                let secret = SecretKey::from_secret_bytes(bytes(&7_u8.into())).unwrap();
                let by_honest =
                    ecdsa::sign(Message::from_digest(honest.1), &secret).serialize_compact();
                let other = Job {
                    key: &honest.0,
                    digest: &honest.1,
                    signature: &by_honest,
                };
                let proven = lanes.prove(&[other, job, other, other, other, other, other, other]);
                assert_eq!(
                    proven,
                    [true, false, true, true, true, true, true, true],
                    "addition {target}"
                );
                met += 1;
            }
        }
        assert_eq!(met, 2 * (additions - 4));
    }

    fn multipliers(u1: &BigUint, u2: &BigUint) -> Multipliers {
        // z/s and r/s with s = 1, hence 2^256/s = 2^256.
        let one = words_of(&((BigUint::from(1_u8) << 256) % n()));
        Multipliers::new(words_of(u1), words_of(u2), one)
    }

    /// The secret key d for which the sum so far is +- what addition number `target` adds:
    /// a + b d = +-(a' + b' d).
    fn exceptional_key(
        multipliers: &Multipliers,
        target: usize,
        opposite: bool,
    ) -> Option<BigUint> {
        let (mut a, mut b) = (BigUint::ZERO, BigUint::ZERO);
        let mut additions = 0;
        for step in schedule(multipliers) {
            let Some((a1, b1)) = step else {
                (a, b) = ((a << 1) % n(), (b << 1) % n());
                continue;
            };
            if additions == target {
                let sign = if opposite { n() - 1_u8 } else { 1_u8.into() };
                let (a, b) = (a + n() * n() - &sign * a1, b + n() * n() - sign * b1);
                let key = (n() * n() - a % n() * inverse(&(b % n()))) % n();
                return (key != BigUint::ZERO).then_some(key);
            }
            (a, b) = ((a + a1) % n(), (b + b1) % n());
            additions += 1;
        }
        None
    }

    #[test]
    fn windows_add_up() {
        let mut rng = fastrand::Rng::with_seed(9);
        for _ in 0..1000 {
            let mut random =
                || BigUint::from_bytes_be(&std::array::from_fn::<_, 32, _>(|_| rng.u8(..))) % n();
            let (u1, u2) = (random(), random());
            let (a, b) = schedule(&multipliers(&u1, &u2)).into_iter().fold(
                (BigUint::ZERO, BigUint::ZERO),
                |(a, b), step| match step {
                    Some((a1, b1)) => ((a + a1) % n(), (b + b1) % n()),
                    None => ((a << 1) % n(), (b << 1) % n()),
                },
            );
            assert_eq!((a, b), (u1, u2));
        }
    }
}
