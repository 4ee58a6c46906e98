//! Points of secp256k1, eight at once: doubling, addition, and the small multiples of a key.
//!
//! An operation whose exceptional case is met (a point added to itself or to its opposite) leaves
//! Z = 0 in that lane, and every later operation keeps it: Z only ever becomes a product with Z.
//! So nothing is tested on the way: at the end, a lane with Z = 0 says that it does not know, and in
//! every other lane all formulas held. The point at infinity has no other form here.

use std::arch::x86_64::*;

use super::field::{Field, Sum, Vector, Wide, splat};
use super::scalar::Words;

/// A primitive cube root of one: lambda (x, y) = (beta x, y).
const BETA: Words = [
    0xc139_6c28_7195_01ee,
    0x9cf0_4975_12f5_8995,
    0x6e64_479e_ac34_34e9,
    0x7ae9_6a2b_657c_0710,
];

/// Affine points.
#[derive(Clone, Copy)]
pub struct Affine {
    pub x: Field,
    pub y: Field,
}

/// Points in Jacobian coordinates: x = X/Z^2, y = Y/Z^3, with 2Y in place of Y, which spares
/// doubling its factors of four and eight.
///
/// Every operation computes the opposite of what it is named for. Elsewhere the formulas for Y subtract
/// one product from another; for -Y they add them, so that both are reduced together.
#[derive(Clone, Copy)]
pub struct Jacobian {
    pub x: Field,
    y2: Field,
    pub z: Field,
    /// Whether the coordinates are those of the opposite.
    opposite: bool,
}

impl Jacobian {
    /// Q, or -Q in the lanes of `minus`.
    #[inline]
    #[target_feature(enable = "avx512f,avx512ifma")]
    pub fn new(q: Affine, minus: __mmask8) -> Self {
        Self {
            x: q.x,
            y2: Sum::twice_signed(q.y, minus).carry(),
            z: Field::splat([1, 0, 0, 0]),
            opposite: false,
        }
    }

    /// 2P.
    #[inline]
    #[target_feature(enable = "avx512f,avx512ifma")]
    pub fn doubled(self) -> Self {
        let b = self.y2.squared();
        let m = Wide::square(self.x).thrice().reduce();
        let c = self.x.times(b);
        let x = Wide::square(m).add_sum(c.negated().minus(c)).reduce();
        let f = x.minus(c).twice().carry();
        Self {
            x,
            y2: Wide::square(b).add_product(m, f).reduce(),
            z: self.y2.times(self.z),
            opposite: !self.opposite,
        }
    }

    /// P + Q, or P - Q in the lanes of `minus`; `z` is the Z of P on the curve on which Q is affine.
    #[inline]
    #[target_feature(enable = "avx512f,avx512ifma")]
    pub fn plus(self, q: Affine, minus: __mmask8, z: Field) -> Self {
        let minus = if self.opposite { !minus } else { minus };
        let y2 = Sum::twice_signed(q.y, minus).carry();
        let zz = z.squared();
        let zzz = z.times(zz);
        let h = Wide::from_sum(self.x.negated())
            .add_product(q.x, zz)
            .reduce();
        let r = Wide::from_sum(self.y2.negated())
            .add_product(y2, zzz)
            .reduce();
        let h2 = h.twice().carry();
        let i = h2.squared();
        let j = h.times(i);
        let v = self.x.times(i);
        let x = Wide::square(r)
            .add_sum(j.negated().minus(v).minus(v))
            .reduce();
        let f = x.minus(v).carry();
        Self {
            x,
            y2: Wide::product(r, f).add_product(self.y2, j).twice().reduce(),
            z: h2.times(self.z),
            opposite: !self.opposite,
        }
    }
}

/// Bits of a window of a multiple of the key.
pub const WINDOW: u32 = 5;
/// Odd multiples in the table: the positive digits of a window.
const ENTRIES: usize = 1 << (WINDOW - 1);

/// The odd multiples Q, 3Q, ... 31Q of a key, and lambda times each, in every lane.
///
/// They are affine on a curve of their own, y^2 = x^3 + 7 Z^6, on which (x Z^2, y Z^3) stands for
/// (x, y); the formulas do not know the 7. So no inversion is needed to make them affine.
pub struct Multiples {
    x: [[Field; ENTRIES]; 2],
    y: [Field; ENTRIES],
    /// The Z of their curve.
    pub z: Field,
}

impl Multiples {
    /// Computes the table by additions of points that share their Z (Meloni 2007): adding 2Q changes
    /// the Z by a factor H and gives 2Q with the new Z as well. At the end every multiple is brought
    /// to the last Z by the factors that came after it.
    #[target_feature(enable = "avx512f,avx512ifma")]
    pub fn new(q: Affine) -> Self {
        // 2Q has the Z 2y; (c, e) is Q with that Z.
        let s = Wide::square(q.y).twice().reduce();
        let c = Wide::product(q.x, s).twice().reduce();
        let e = Wide::square(s).twice().reduce();
        let m = Wide::square(q.x).thrice().reduce();
        let x = Wide::square(m).add_sum(c.negated().minus(c)).reduce();
        let y = Wide::from_sum(e.negated())
            .add_product(m, c.minus(x).carry())
            .reduce();
        let mut twice = Affine { x, y };
        let mut table = Self {
            x: [[c; ENTRIES]; 2],
            y: [e; ENTRIES],
            z: q.y.twice().carry(),
        };
        let ([x, beta_x], y) = (&mut table.x, &mut table.y);
        let mut factors = [table.z; ENTRIES];
        for i in 1..ENTRIES {
            let h = twice.x.minus(x[i - 1]).carry();
            let r = twice.y.minus(y[i - 1]).carry();
            let hh = h.squared();
            let w = x[i - 1].times(hh);
            twice.x = twice.x.times(hh);
            twice.y = twice.y.times(twice.x.minus(w).carry());
            x[i] = Wide::square(r).add_sum(twice.x.negated().minus(w)).reduce();
            let f = twice.x.minus(x[i]).carry();
            y[i] = Wide::from_sum(twice.y.negated()).add_product(r, f).reduce();
            factors[i] = h;
        }
        let mut factor = factors[ENTRIES - 1];
        for i in (0..ENTRIES - 1).rev() {
            let square = factor.squared();
            x[i] = x[i].times(square);
            y[i] = y[i].times(square.times(factor));
            factor = factor.times(factors[i]);
        }
        table.z = factor;
        let beta = Field::splat(BETA);
        for i in 0..ENTRIES {
            beta_x[i] = x[i].times(beta);
        }
        table
    }

    /// In each lane that lane's multiple number `index` of Q (`half` 0) or lambda Q (1).
    #[inline]
    #[target_feature(enable = "avx512f,avx512ifma")]
    pub fn pick(&self, half: usize, index: Vector) -> Affine {
        Affine {
            x: pick(&self.x[half], index),
            y: pick(&self.y, index),
        }
    }
}

#[inline]
#[target_feature(enable = "avx512f,avx512ifma")]
fn pick(table: &[Field; ENTRIES], index: Vector) -> Field {
    const { assert!(size_of::<Field>() == 40 * size_of::<u64>()) }
    let index = _mm512_and_epi64(index, splat(ENTRIES as u64 - 1));
    let lane = _mm512_set_epi64(7, 6, 5, 4, 3, 2, 1, 0);
    let offset = _mm512_madd52lo_epu64(lane, index, splat(40));
    let words = table.as_ptr().cast::<i64>();
    Field::from_limbs(std::array::from_fn(|limb| {
        // SAFETY: a field is 40 words, limb by limb and in it lane by lane; with an index below
        // ENTRIES, a limb below 5 and a lane below 8 the word lies in the table.
        unsafe { _mm512_i64gather_epi64::<8>(offset, words.add(8 * limb)) }
    }))
}
