//! Arithmetic modulo p = 2^256 - 2^32 - 977 on eight independent numbers at once, one in each 64-bit
//! lane of a 512-bit register. Variable time is fine: everything here is public.
//! It knows nothing of curves; whether the processor has the instructions is the caller's promise.
//!
//! A number is five limbs of 52 bits, the unit of the multiply-add instructions of AVX-512 IFMA, which
//! read the low 52 bits of their factors and nothing above. Three types say how far a number is from
//! that form, so that a factor with a carry still in it cannot be written down:
//!
//! | type      | limbs                                   | made by                   | may be          |
//! |-----------|-----------------------------------------|---------------------------|-----------------|
//! | [`Field`] | four < 2^52, the last <= 2^48 + 2^8     | `reduce`, `carry`         | multiplied      |
//! | [`Sum`]   | five < 2^58                             | `plus`, `minus`, `twice`  | carried, added  |
//! | [`Wide`]  | ten  < 2^60: a sum of products          | `product`, `square`       | reduced         |
//!
//! Sums cost one addition a limb, so they are cheap; a carry costs a fifth of a product and the
//! reduction of a product almost half of it. Hence the habit of the callers: products are added up
//! before they are reduced, and whatever is only added never gets a carry of its own.

use std::arch::x86_64::*;

/// Eight 64-bit lanes.
pub type Vector = __m512i;

const LIMB: u64 = (1 << 52) - 1;
const TOP: u64 = (1 << 48) - 1;
/// 2^256 mod p: what a bit that leaves the fifth limb at the top is worth at the bottom.
const FOLD_256: u64 = (1 << 32) + 977;
/// 2^260 mod p: what the sixth limb is worth at the bottom.
const FOLD_260: u64 = FOLD_256 << 4;
/// The limbs of p.
const P: [u64; 5] = [LIMB + 1 - FOLD_256, LIMB, LIMB, LIMB, TOP];

/// The same number in every lane.
#[inline]
#[target_feature(enable = "avx512f")]
pub fn splat(number: u64) -> Vector {
    _mm512_set1_epi64(number.cast_signed())
}

/// Eight numbers, the first of them in the lowest lane.
#[inline]
#[target_feature(enable = "avx512f")]
pub fn load(numbers: &[u64; 8]) -> Vector {
    // SAFETY: the reference is valid for 64 bytes, and the load asks for no alignment.
    unsafe { _mm512_loadu_epi64(numbers.as_ptr().cast()) }
}

#[inline]
#[target_feature(enable = "avx512f")]
fn shift_right<const BITS: u32>(limb: Vector) -> Vector {
    _mm512_srli_epi64::<BITS>(limb)
}

#[inline]
#[target_feature(enable = "avx512f")]
fn shift_left<const BITS: u32>(limb: Vector) -> Vector {
    _mm512_slli_epi64::<BITS>(limb)
}

#[inline]
#[target_feature(enable = "avx512f")]
fn add(a: Vector, b: Vector) -> Vector {
    _mm512_add_epi64(a, b)
}

#[inline]
#[target_feature(enable = "avx512f")]
fn and(a: Vector, mask: u64) -> Vector {
    _mm512_and_epi64(a, splat(mask))
}

/// Carries from limb to limb; what the last limb then holds stays there.
#[inline]
#[target_feature(enable = "avx512f")]
fn ripple(mut limbs: [Vector; 5]) -> [Vector; 5] {
    for i in 0..4 {
        limbs[i + 1] = add(limbs[i + 1], shift_right::<52>(limbs[i]));
        limbs[i] = and(limbs[i], LIMB);
    }
    limbs
}

/// Eight numbers below 2^256 + 2^216, hence below 2p, ready to be multiplied.
#[derive(Clone, Copy)]
pub struct Field([Vector; 5]);

impl Field {
    /// The same number in every lane; 64-bit words, least significant first.
    #[inline]
    #[target_feature(enable = "avx512f")]
    pub fn splat(words: [u64; 4]) -> Self {
        Self::from_words([
            splat(words[0]),
            splat(words[1]),
            splat(words[2]),
            splat(words[3]),
        ])
    }

    /// Eight numbers below 2^256; 64-bit words, least significant first.
    #[inline]
    #[target_feature(enable = "avx512f")]
    pub fn from_words(words: [Vector; 4]) -> Self {
        let [a, b, c, d] = words;
        let join = |low, high| and(_mm512_or_epi64(low, high), LIMB);
        Self([
            and(a, LIMB),
            join(shift_right::<52>(a), shift_left::<12>(b)),
            join(shift_right::<40>(b), shift_left::<24>(c)),
            join(shift_right::<28>(c), shift_left::<36>(d)),
            shift_right::<16>(d),
        ])
    }

    /// The eight numbers, one from each lane of every limb of `limbs`.
    #[inline]
    #[target_feature(enable = "avx512f")]
    pub fn from_limbs(limbs: [Vector; 5]) -> Self {
        Self(limbs)
    }

    /// a + b.
    #[inline]
    #[target_feature(enable = "avx512f")]
    pub fn plus(self, other: Field) -> Sum {
        Sum(self.0).plus(other)
    }

    /// a - b.
    #[inline]
    #[target_feature(enable = "avx512f")]
    pub fn minus(self, other: Field) -> Sum {
        Sum(self.0).minus(other)
    }

    /// 2a.
    #[inline]
    #[target_feature(enable = "avx512f")]
    pub fn twice(self) -> Sum {
        self.plus(self)
    }

    /// -a.
    #[inline]
    #[target_feature(enable = "avx512f")]
    pub fn negated(self) -> Sum {
        Sum([splat(0); 5]).minus(self)
    }

    /// a b.
    #[inline]
    #[target_feature(enable = "avx512f,avx512ifma")]
    pub fn times(self, other: Field) -> Field {
        Wide::product(self, other).reduce()
    }

    /// a^2.
    #[inline]
    #[target_feature(enable = "avx512f,avx512ifma")]
    pub fn squared(self) -> Field {
        Wide::square(self).reduce()
    }

    /// In which lanes the number is a multiple of p: being below 2p, it is 0 or p itself.
    #[inline]
    #[target_feature(enable = "avx512f")]
    pub fn is_zero(self) -> __mmask8 {
        let differs_from = |number: [u64; 5]| {
            (0..5).fold(0, |lanes, i| {
                lanes | _mm512_cmpneq_epu64_mask(self.0[i], splat(number[i]))
            })
        };
        !(differs_from([0; 5]) & differs_from(P))
    }
}

/// Sums and differences, the carries still in their limbs: every number added counts for up to 2^52 in
/// a limb, every number subtracted for up to 2^53, and 2^58 is the most.
#[derive(Clone, Copy)]
pub struct Sum([Vector; 5]);

impl Sum {
    /// a + b.
    #[inline]
    #[target_feature(enable = "avx512f")]
    pub fn plus(self, other: Field) -> Sum {
        Sum(std::array::from_fn(|i| add(self.0[i], other.0[i])))
    }

    /// a - b, with 2p added: each limb of 2p exceeds that limb of any `Field`, so none falls below 0.
    #[inline]
    #[target_feature(enable = "avx512f")]
    pub fn minus(self, other: Field) -> Sum {
        let opposite = |i: usize| _mm512_sub_epi64(splat(2 * P[i]), other.0[i]);
        Sum(std::array::from_fn(|i| add(self.0[i], opposite(i))))
    }

    /// 2a.
    #[inline]
    #[target_feature(enable = "avx512f")]
    pub fn twice(mut self) -> Sum {
        for limb in &mut self.0 {
            *limb = add(*limb, *limb);
        }
        self
    }

    /// 2a, or -2a in the lanes of `minus`.
    #[inline]
    #[target_feature(enable = "avx512f")]
    pub fn twice_signed(number: Field, minus: __mmask8) -> Sum {
        let mut limbs = number.twice().0;
        for (limb, p) in limbs.iter_mut().zip(P) {
            *limb = _mm512_mask_sub_epi64(*limb, minus, splat(4 * p), *limb);
        }
        Sum(limbs)
    }

    /// The sum with its carries done: what lies above 2^256 is folded to the bottom first.
    #[inline]
    #[target_feature(enable = "avx512f,avx512ifma")]
    pub fn carry(self) -> Field {
        let mut limbs = self.0;
        // Below 2^58 / 2^48 = 2^10, so that the product has no high half.
        let above = shift_right::<48>(limbs[4]);
        limbs[4] = and(limbs[4], TOP);
        limbs[0] = _mm512_madd52lo_epu64(limbs[0], above, splat(FOLD_256));
        Field(ripple(limbs))
    }
}

/// A sum of products, not yet reduced: at most three times one product, or twice the sum of two,
/// and a [`Sum`].
///
/// A column of one product adds up at most ten halves of partial products, each below 2^52.
/// So 2 * 2 * 10 * 2^52 + 2^58 bounds every column: below 2^59.
#[derive(Clone, Copy)]
pub struct Wide([Vector; 10]);

impl Wide {
    /// a, to which products will be added.
    #[inline]
    #[target_feature(enable = "avx512f")]
    pub fn from_sum(sum: Sum) -> Self {
        let mut columns = [splat(0); 10];
        columns[..5].copy_from_slice(&sum.0);
        Self(columns)
    }

    /// a b.
    #[inline]
    #[target_feature(enable = "avx512f,avx512ifma")]
    pub fn product(a: Field, b: Field) -> Self {
        Self([splat(0); 10]).add_product(a, b)
    }

    /// a^2: the products of different limbs once, doubled, and the squares of the limbs.
    #[inline]
    #[target_feature(enable = "avx512f,avx512ifma")]
    pub fn square(a: Field) -> Self {
        let mut wide = Self([splat(0); 10]);
        for i in 0..5 {
            for j in i + 1..5 {
                wide.add_partial(i + j, a.0[i], a.0[j]);
            }
        }
        wide = wide.twice();
        for i in 0..5 {
            wide.add_partial(2 * i, a.0[i], a.0[i]);
        }
        wide
    }

    /// This plus a b.
    #[inline]
    #[target_feature(enable = "avx512f,avx512ifma")]
    pub fn add_product(mut self, a: Field, b: Field) -> Self {
        for i in 0..5 {
            for j in 0..5 {
                self.add_partial(i + j, a.0[i], b.0[j]);
            }
        }
        self
    }

    /// This plus a.
    #[inline]
    #[target_feature(enable = "avx512f")]
    pub fn add_sum(mut self, sum: Sum) -> Self {
        for i in 0..5 {
            self.0[i] = add(self.0[i], sum.0[i]);
        }
        self
    }

    /// Twice this.
    #[inline]
    #[target_feature(enable = "avx512f")]
    pub fn twice(mut self) -> Self {
        for column in &mut self.0 {
            *column = add(*column, *column);
        }
        self
    }

    /// Three times this.
    #[inline]
    #[target_feature(enable = "avx512f")]
    pub fn thrice(mut self) -> Self {
        for column in &mut self.0 {
            *column = add(add(*column, *column), *column);
        }
        self
    }

    /// The 104 bits of a product of two limbs, over two columns.
    #[inline]
    #[target_feature(enable = "avx512f,avx512ifma")]
    fn add_partial(&mut self, column: usize, a: Vector, b: Vector) {
        self.0[column] = _mm512_madd52lo_epu64(self.0[column], a, b);
        self.0[column + 1] = _mm512_madd52hi_epu64(self.0[column + 1], a, b);
    }

    /// The number modulo p, below 2^256 + 2^216.
    ///
    /// First the upper five columns are folded to the bottom, then what lies above bit 256:
    /// - The upper columns carry into each other. Their high bits need not be cleared, because the
    ///   instruction does not read them, but the last column must be below 2^52 itself: it holds high
    ///   halves of products of two last limbs, at most four, each little above 2^44, and a carry.
    /// - `above` collects what the fold puts beyond the fifth limb (below 2^33, in units of 2^260)
    ///   and the fifth limb's own excess: below 2^38 together.
    /// - The last ripple carries less than 2^8 into the fifth limb, which holds 48 bits by then.
    #[inline]
    #[target_feature(enable = "avx512f,avx512ifma")]
    pub fn reduce(self) -> Field {
        let mut columns = self.0;
        for i in 5..9 {
            columns[i + 1] = add(columns[i + 1], shift_right::<52>(columns[i]));
        }
        let [mut a, mut b, mut c, mut d, mut e, upper @ ..] = columns;
        let mut beyond = splat(0);
        let below = [&mut a, &mut b, &mut c, &mut d, &mut e, &mut beyond];
        let fold = splat(FOLD_260);
        for i in 0..5 {
            *below[i] = _mm512_madd52lo_epu64(*below[i], upper[i], fold);
            *below[i + 1] = _mm512_madd52hi_epu64(*below[i + 1], upper[i], fold);
        }
        let above = add(shift_left::<4>(beyond), shift_right::<48>(e));
        let fold = splat(FOLD_256);
        a = _mm512_madd52lo_epu64(a, above, fold);
        b = _mm512_madd52hi_epu64(b, above, fold);
        Field(ripple([a, b, c, d, and(e, TOP)]))
    }
}

#[cfg(test)]
mod tests {
    use num_bigint::BigUint;

    use super::*;

    const CASES: usize = 20_000;

    fn number(limbs: [u64; 5]) -> BigUint {
        limbs
            .iter()
            .rev()
            .fold(BigUint::ZERO, |number, limb| (number << 52) + limb)
    }

    fn p() -> BigUint {
        number(P)
    }

    /// The limbs of every lane, having checked that they are what a `Field` promises.
    fn numbers(field: Field) -> [BigUint; 8] {
        // SAFETY: both are 320 bytes without padding, and any bits are numbers.
        let limbs: [[u64; 8]; 5] = unsafe { std::mem::transmute(field) };
        std::array::from_fn(|lane| {
            let limbs = limbs.map(|limb| limb[lane]);
            assert!(limbs[..4].iter().all(|&limb| limb <= LIMB), "{limbs:x?}");
            assert!(limbs[4] <= TOP + 1 + (1 << 8), "{limbs:x?}");
            number(limbs)
        })
    }

    /// Any limbs that a `Field` may have, the extreme ones often.
    fn any(rng: &mut fastrand::Rng) -> [u64; 5] {
        let extremes = [
            [0; 5],
            [1, 0, 0, 0, 0],
            P,
            [P[0] - 1, LIMB, LIMB, LIMB, TOP],
        ];
        match rng.usize(..8) {
            0 => extremes[rng.usize(..extremes.len())],
            1 => [LIMB, LIMB, LIMB, LIMB, TOP + 1 + (1 << 8)],
            2 => [rng.u64(..1 << 34), 0, 0, 0, TOP + 1],
            3 => [P[0] + rng.u64(..1 << 32), LIMB, LIMB, LIMB, TOP],
            _ => std::array::from_fn(|i| {
                let most = if i < 4 { LIMB } else { TOP + 1 + (1 << 8) };
                match rng.usize(..6) {
                    0 => 0,
                    1 => most,
                    2 => most - rng.u64(..4),
                    3 => rng.u64(..4),
                    _ => rng.u64(..=most),
                }
            }),
        }
    }

    #[target_feature(enable = "avx512f")]
    fn field(limbs: [[u64; 5]; 8]) -> Field {
        Field(std::array::from_fn(|i| load(&limbs.map(|limbs| limbs[i]))))
    }

    /// Runs `compute` on random numbers a, b, c, d and compares with `expect` modulo p in every lane.
    fn check(
        compute: impl Fn([Field; 4]) -> Field,
        expect: impl Fn([BigUint; 4], BigUint) -> BigUint,
    ) {
        let mut rng = fastrand::Rng::with_seed(52);
        for _ in 0..CASES {
            let limbs: [[[u64; 5]; 8]; 4] =
                std::array::from_fn(|_| std::array::from_fn(|_| any(&mut rng)));
            // SAFETY: the tests run where the lanes are.
            let fields = limbs.map(|limbs| unsafe { field(limbs) });
            let results = numbers(compute(fields));
            for (lane, result) in results.into_iter().enumerate() {
                let inputs = limbs.map(|limbs| number(limbs[lane]));
                // A multiple of p above whatever is subtracted.
                let expected = expect(inputs, p() << 10);
                assert_eq!(
                    result % p(),
                    expected % p(),
                    "{:x?}",
                    limbs.map(|limbs| limbs[lane])
                );
            }
        }
    }

    /// The closures below run only after this.
    fn lanes_are_here() -> bool {
        crate::atproto::lanes::Lanes::detect().is_some()
    }

    macro_rules! checks {
        ($($name:ident: |[$($input:ident),*]| $compute:expr, |$above:ident| $expect:expr;)*) => {$(
            #[test]
            fn $name() {
                if !lanes_are_here() {
                    return;
                }
                #[target_feature(enable = "avx512f,avx512ifma")]
                fn compute([$($input),*]: [Field; 4]) -> Field {
                    $compute
                }
                // SAFETY: the lanes are here.
                check(|fields| unsafe { compute(fields) }, |[$($input),*], $above| $expect);
            }
        )*};
    }

    checks! {
        products: |[a, b, _c, _d]| a.times(b), |_z| a * b;
        squares: |[a, _b, _c, _d]| a.squared(), |_z| &a * &a;
        sums: |[a, b, c, d]| a.plus(b).minus(c).minus(d).carry(), |z| z + a + b - c - d;
        opposites: |[a, b, _c, _d]| a.negated().minus(b).minus(b).carry(), |z| z - a - &b - &b;
        // Every difference adds 3 * 2^52: fifteen and their double come near the 2^58 of a sum.
        longest_sum: |[a, b, c, d]| {
            let sum = a.minus(b).minus(c).minus(d).minus(b).minus(c).minus(d).minus(b).minus(c);
            sum.plus(d).plus(a).twice().carry()
        }, |z| z + (a << 2) - b * 6_u8 - c * 6_u8 - (d << 1);
        triple_squares: |[a, b, _c, _d]| {
            Wide::square(a).thrice().add_sum(b.negated().minus(b).minus(b)).reduce()
        }, |z| z + &a * &a * 3_u8 - b * 3_u8;
        double_squares: |[a, _b, _c, _d]| Wide::square(a).twice().reduce(), |_z| (&a * &a) << 1;
        sums_of_products: |[a, b, c, d]| Wide::product(a, b).add_product(c, d).twice().reduce(),
            |_z| (a * b + c * d) << 1;
        square_and_product: |[a, b, c, _d]| Wide::square(a).add_product(b, c).reduce(),
            |_z| &a * &a + b * c;
        sum_and_product: |[a, b, c, _d]| Wide::from_sum(a.negated()).add_product(b, c).reduce(),
            |z| z + b * c - a;
        signed_doubles: |[a, b, c, _d]| {
            Sum::twice_signed(a, 0xff).plus(b).carry().times(Sum::twice_signed(c, 0).carry())
        }, |z| (z + b - (a << 1)) * (c << 1);
    }

    #[test]
    fn zero_is_found_in_both_forms() {
        if !lanes_are_here() {
            return;
        }
        let one = [1, 0, 0, 0, 0];
        let before = [P[0] - 1, LIMB, LIMB, LIMB, TOP];
        let after = [P[0] + 1, LIMB, LIMB, LIMB, TOP];
        let limbs = [
            [0; 5],
            one,
            P,
            before,
            after,
            [0, 0, 0, 0, 1],
            P,
            [0, LIMB, LIMB, LIMB, TOP],
        ];
        // SAFETY: the lanes are here.
        assert_eq!(unsafe { field(limbs).is_zero() }, 0b0100_0101);
        check(
            // SAFETY: the lanes are here.
            |[a, ..]| unsafe {
                assert_eq!(a.minus(a).carry().is_zero(), 0xff);
                a
            },
            |[a, ..], _| a,
        );
    }

    #[test]
    fn words_become_limbs() {
        if !lanes_are_here() {
            return;
        }
        let mut rng = fastrand::Rng::with_seed(256);
        for _ in 0..CASES {
            let words: [[u64; 8]; 4] = std::array::from_fn(|_| {
                std::array::from_fn(|_| if rng.bool() { u64::MAX } else { rng.u64(..) })
            });
            // SAFETY: the lanes are here.
            let results = numbers(unsafe { Field::from_words(words.map(|word| load(&word))) });
            for (lane, result) in results.into_iter().enumerate() {
                let expected = words
                    .iter()
                    .rev()
                    .fold(BigUint::ZERO, |n, word| (n << 64) + word[lane]);
                assert_eq!(result, expected);
            }
        }
    }
}
