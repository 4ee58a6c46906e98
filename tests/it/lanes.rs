//! The lanes against libsecp256k1: they must never prove what it refuses, and must prove whatever
//! honest keys sign. Random cases are few here; `LANES_CASES=2000000 cargo test --release --locked --test it lanes` runs more.
#![cfg(target_arch = "x86_64")]

use std::path::PathBuf;
use std::sync::LazyLock;

use atproto_relay::atproto::key::{self, VerifyingKey};
use atproto_relay::atproto::lanes::{Job, Lanes};
use atproto_relay::verify::signature::{self, SignedMessage};
use fastrand::Rng;
use num_bigint::BigUint;
use secp256k1::{Message, PublicKey, Scalar, SecretKey, ecdsa};

static N: LazyLock<BigUint> =
    LazyLock::new(|| number("fffffffffffffffffffffffffffffffebaaedce6af48a03bbfd25e8cd0364141"));
static P: LazyLock<BigUint> =
    LazyLock::new(|| number("fffffffffffffffffffffffffffffffffffffffffffffffffffffffefffffc2f"));
static LAMBDA: LazyLock<BigUint> =
    LazyLock::new(|| number("5363ad4cc05c30e0a5261c028812645a122e22ea20816678df02967c1b23bd72"));

#[derive(Clone)]
struct Signed {
    key: PublicKey,
    digest: [u8; 32],
    signature: [u8; 64],
}

impl Signed {
    fn job(&self) -> Job<'_> {
        Job {
            key: &self.key,
            digest: &self.digest,
            signature: &self.signature,
        }
    }
}

fn number(hex: &str) -> BigUint {
    BigUint::parse_bytes(hex.as_bytes(), 16).unwrap()
}

fn bytes(number: &BigUint) -> [u8; 32] {
    let short = number.to_bytes_be();
    let mut bytes = [0; 32];
    bytes[32 - short.len()..].copy_from_slice(&short);
    bytes
}

fn random_bytes<const L: usize>(rng: &mut Rng) -> [u8; L] {
    std::array::from_fn(|_| rng.u8(..))
}

fn inverse(a: &BigUint) -> BigUint {
    a.modpow(&(&*N - 2_u8), &N)
}

/// k P, nothing at infinity.
fn multiple(point: Option<PublicKey>, k: &BigUint) -> Option<PublicKey> {
    let k = k % &*N;
    (k != BigUint::ZERO).then_some(())?;
    Some(
        point?
            .mul_tweak(&Scalar::from_be_bytes(bytes(&k)).unwrap())
            .unwrap(),
    )
}

fn sum(a: Option<PublicKey>, b: Option<PublicKey>) -> Option<PublicKey> {
    match (a, b) {
        (Some(a), Some(b)) => a.combine(&b).ok(),
        (a, b) => a.or(b),
    }
}

fn generator() -> PublicKey {
    PublicKey::from_secret_key(&SecretKey::from_secret_bytes(bytes(&1_u8.into())).unwrap())
}

fn x(point: &PublicKey) -> BigUint {
    BigUint::from_bytes_be(&point.serialize()[1..])
}

fn point_with_x(x: &BigUint, odd: bool) -> Option<PublicKey> {
    let mut compressed = [2 + u8::from(odd); 33];
    compressed[1..].copy_from_slice(&bytes(x));
    PublicKey::from_slice(&compressed).ok()
}

/// A low-S signature that asks for u1 and u2, or for their opposites; `r` where the sum has no x.
fn asking(key: PublicKey, u1: &BigUint, u2: &BigUint, r: &BigUint) -> Signed {
    let n = N.clone();
    let point = sum(multiple(Some(generator()), u1), multiple(Some(key), u2));
    let r = point.map_or(r.clone(), |point| x(&point) % &n);
    let s = &r * inverse(u2) % &n;
    let digest = bytes(&(&s * u1 % &n));
    let s = if &s + &s > n { n - s } else { s };
    let mut signature = [0; 64];
    signature[..32].copy_from_slice(&bytes(&r));
    signature[32..].copy_from_slice(&bytes(&s));
    Signed {
        key,
        digest,
        signature,
    }
}

/// What libsecp256k1 says.
fn verify_one(job: &Job<'_>) -> bool {
    ecdsa::Signature::from_compact(job.signature)
        .and_then(|signature| ecdsa::verify(&signature, Message::from_digest(*job.digest), job.key))
        .is_ok()
}

/// What the relay's door says.
fn verify(signed: &[Signed]) -> Vec<bool> {
    let parts: Vec<(VerifyingKey, SignedMessage)> = signed
        .iter()
        .map(|signed| {
            let mut stored = [1; 34];
            stored[1..].copy_from_slice(&signed.key.serialize());
            let key = key::PublicKey::from_bytes(&stored).expect("a stored key");
            let digest = SignedMessage {
                message: Box::default(),
                digest: signed.digest,
                signature: signed.signature,
            };
            (VerifyingKey::new(&key).expect("a point"), digest)
        })
        .collect();
    let jobs: Vec<_> = parts
        .iter()
        .map(|(key, signed)| signature::Job { key, signed })
        .collect();
    signature::verify(&jobs)
}

/// What libsecp256k1 says of each, after comparing: no wrong yes, and the door agrees everywhere.
fn compare(signed: &[Signed]) -> (Vec<bool>, Vec<bool>) {
    let jobs: Vec<_> = signed.iter().map(Signed::job).collect();
    let truth: Vec<_> = jobs.iter().map(verify_one).collect();
    let proven = Lanes::detect()
        .expect("a processor with AVX-512 IFMA")
        .prove(&jobs);
    for ((signed, &truth), &proven) in signed.iter().zip(&truth).zip(&proven) {
        assert!(
            truth || !proven,
            "wrong yes: {:02x?} {:02x?} {}",
            signed.digest,
            signed.signature,
            signed.key
        );
    }
    assert_eq!(verify(signed), truth);
    (truth, proven)
}

fn sign(rng: &mut Rng) -> (SecretKey, Signed) {
    let secret = SecretKey::from_secret_bytes(random_bytes(rng)).unwrap();
    let digest = match rng.u8(..) {
        0 => [0; 32],
        1 => [0xff; 32],
        2 => bytes(&N),
        3 => bytes(&(&*N + rng.u8(..))),
        4 => bytes(&BigUint::from(rng.u64(..))),
        _ => random_bytes(rng),
    };
    let signature = ecdsa::sign(Message::from_digest(digest), &secret).serialize_compact();
    (
        secret,
        Signed {
            key: PublicKey::from_secret_key(&secret),
            digest,
            signature,
        },
    )
}

/// One of the ways in which a signature can be wrong, or only look different.
fn mutate(signed: &mut Signed, other: &Signed, rng: &mut Rng) {
    let bit = 1 << rng.u8(..8);
    match rng.u8(..14) {
        0 => signed.digest[rng.usize(..32)] ^= bit,
        1 => signed.signature[rng.usize(..32)] ^= bit,
        2 => signed.signature[rng.usize(32..64)] ^= bit,
        3 => signed.key = other.key,
        4 => signed.key = signed.key.negate(),
        5 => signed.digest = other.digest,
        6 => signed.signature = other.signature,
        7 => signed.signature[..32].copy_from_slice(&other.signature[..32]),
        8 => {
            let s = BigUint::from_bytes_be(&signed.signature[32..]);
            signed.signature[32..].copy_from_slice(&bytes(&(&*N - s)));
        }
        9 => signed.signature.rotate_left(32),
        10 => signed.key = multiple(Some(signed.key), &LAMBDA).unwrap(),
        11 => {
            let half = 32 * rng.usize(..2);
            let edges = [
                BigUint::ZERO,
                1_u8.into(),
                &*N - 1_u8,
                N.clone(),
                &*N + 1_u8,
                &*N >> 1,
                (&*N >> 1) + 1_u8,
                P.clone(),
                &*P - &*N,
                BigUint::from_bytes_be(&[0xff; 32]),
            ];
            let edge = &edges[rng.usize(..edges.len())];
            signed.signature[half..half + 32].copy_from_slice(&bytes(edge));
        }
        12 => signed.signature = random_bytes(rng),
        _ => {
            let digest = BigUint::from_bytes_be(&signed.digest);
            let shifted = if digest < *N {
                digest + &*N
            } else {
                digest - &*N
            };
            if shifted.bits() <= 256 {
                signed.digest = bytes(&shifted);
            }
        }
    }
}

/// How many signatures a test compares.
fn how_many() -> usize {
    std::env::var("LANES_CASES").map_or(4_000, |cases| cases.parse().expect("a number"))
}

#[test]
fn random_and_mutated_signatures() {
    let cases = how_many();
    let seed = std::env::var("LANES_SEED").map_or(8, |seed| seed.parse().expect("a number"));
    let mut rng = Rng::with_seed(seed);
    let (mut done, mut good, mut refused, mut unproven) = (0, 0, 0, 0);
    while done < cases {
        let size = rng.usize(1..=64);
        let mut batch: Vec<_> = (0..size).map(|_| sign(&mut rng).1).collect();
        for i in 0..size {
            if rng.bool() {
                let other = batch[rng.usize(..size)].clone();
                mutate(&mut batch[i], &other, &mut rng);
            }
        }
        let (truth, proven) = compare(&batch);
        // A remainder of one is not for the lanes; otherwise honest keys meet no exception.
        let missed = truth
            .iter()
            .zip(&proven)
            .filter(|(truth, proven)| truth != proven)
            .count();
        assert!(
            missed <= usize::from(size % 8 == 1),
            "{missed} of {size} not proven"
        );
        done += size;
        good += truth.iter().filter(|&&good| good).count();
        refused += truth.iter().filter(|&&good| !good).count();
        unproven += missed;
    }
    println!(
        "{done} signatures: {good} good ({unproven} left over by the lanes), {refused} refused"
    );
}

#[test]
fn batches_of_every_size() {
    let mut rng = Rng::with_seed(64);
    let honest: Vec<_> = (0..130).map(|_| sign(&mut rng).1).collect();
    for size in 0..=honest.len() {
        let (truth, proven) = compare(&honest[..size]);
        assert!(truth.iter().all(|&good| good));
        let left = proven.iter().filter(|&&good| !good).count();
        assert_eq!(left, usize::from(size % 8 == 1));
    }
    // One bad signature in each place refuses that place and no other.
    for place in 0..64 {
        let mut batch = honest[..64].to_vec();
        batch[place].digest[31] ^= 1;
        let (truth, proven) = compare(&batch);
        assert_eq!(truth, proven);
        assert_eq!(truth.iter().position(|&good| !good), Some(place));
    }
}

/// Multipliers and keys in which windows meet each other: sums of equal and opposite points, u1 and u2
/// of zero, one and minus one, powers of two, lambda, and the infinite result.
#[test]
fn constructed_multipliers() {
    let mut rng = Rng::with_seed(7);
    let (n, lambda) = (N.clone(), LAMBDA.clone());
    let one = BigUint::from(1_u8);
    let mut scalars: Vec<BigUint> = (1_u8..40).map(BigUint::from).collect();
    scalars.extend((5..256).step_by(9).map(|bit| &one << bit));
    scalars.extend([13, 26, 117, 125, 129, 130, 131, 143, 247].map(|bit| &one << bit));
    scalars.extend([
        &one << 130,
        (&one << 130) + 1_u8,
        &lambda * &lambda % &n,
        &n >> 1,
    ]);
    scalars.extend([lambda.clone(), (&lambda + 1_u8) % &n, &lambda * 2_u8 % &n]);
    scalars.extend((0..20).map(|_| BigUint::from_bytes_be(&random_bytes::<32>(&mut rng)) % &n));
    let opposites: Vec<_> = scalars.iter().map(|k| &n - k).collect();
    scalars.extend(opposites);
    let mut cases = vec![];
    let (mut good, mut unproven, mut infinite) = (0, 0, 0);
    for _ in 0..how_many() {
        let pick = |rng: &mut Rng| scalars[rng.usize(..scalars.len())].clone();
        let secret = pick(&mut rng);
        let key = multiple(Some(generator()), &secret).unwrap();
        let u2 = pick(&mut rng);
        let u1 = match rng.u8(..8) {
            // u1 G + u2 Q = infinity, Q, -Q, G; or u1 G = u2 Q.
            0 => &n * &n - &u2 * &secret,
            1 => &n * &n + &secret - &u2 * &secret,
            2 => &n * &n - &secret - &u2 * &secret,
            3 => &n * &n + 1_u8 - &u2 * &secret,
            4 => &u2 * &secret,
            5 => BigUint::ZERO,
            _ => pick(&mut rng),
        } % &n;
        cases.push(asking(key, &u1, &u2, &pick(&mut rng)));
        if cases.len() == 64 {
            let (truth, proven) = compare(&cases);
            good += truth.iter().filter(|&&good| good).count();
            infinite += truth.iter().filter(|&&good| !good).count();
            unproven += truth
                .iter()
                .zip(&proven)
                .filter(|(truth, proven)| truth != proven)
                .count();
            cases.clear();
        }
    }
    println!("{good} good, {unproven} of them left to libsecp256k1; {infinite} infinite");
    assert!(infinite * 20 > good && unproven * 100 < good);
}

/// Keys that nobody knows the secret of: any R makes a good signature of Q = (s R - z G) / r.
fn signed_with_point(point: PublicKey, digest: [u8; 32], s: &BigUint) -> Option<Signed> {
    let n = N.clone();
    let r = x(&point) % &n;
    let z = BigUint::from_bytes_be(&digest) % &n;
    let key = sum(
        multiple(Some(point), &(s * inverse(&r))),
        multiple(Some(generator()), &(&n - z * inverse(&r) % &n)),
    )?;
    let mut signature = [0; 64];
    signature[..32].copy_from_slice(&bytes(&r));
    signature[32..].copy_from_slice(&bytes(s));
    Some(Signed {
        key,
        digest,
        signature,
    })
}

#[test]
fn points_with_small_and_large_x() {
    let mut rng = Rng::with_seed(0x511);
    let (n, p) = (N.clone(), P.clone());
    let mut wrapped = 0;
    let bases = [
        BigUint::from(1_u8),
        &n - 40_u8,
        &n + 1_u8,
        &p - 200_u8,
        (&p - &n) - 40_u8,
    ];
    for base in bases {
        let points = (0_u8..120)
            .flat_map(|i| [false, true].map(|odd| (&base + i, odd)))
            .filter(|(x, _)| *x < p)
            .filter_map(|(x, odd)| point_with_x(&x, odd));
        let cases: Vec<_> = points
            .flat_map(|point| {
                wrapped += usize::from(x(&point) >= n);
                let s = BigUint::from_bytes_be(&random_bytes::<32>(&mut rng)) % (&n >> 1) + 1_u8;
                let as_sum = signed_with_point(point, random_bytes(&mut rng), &s);
                let u1 = BigUint::from_bytes_be(&random_bytes::<32>(&mut rng)) % &n;
                let u2 = BigUint::from_bytes_be(&random_bytes::<32>(&mut rng)) % &n;
                as_sum.into_iter().chain([asking(point, &u1, &u2, &n)])
            })
            .collect();
        let (truth, _) = compare(&cases);
        assert!(truth.iter().all(|&good| good));
        // The same with another r: r + n, r - n, r + 1 where they are in range.
        let others = cases.iter().flat_map(|signed| {
            let r = BigUint::from_bytes_be(&signed.signature[..32]);
            let others = [&r + &n, &r + &n + &n - &p, &r + 1_u8, &r + &p - &n];
            others.into_iter().filter(|r| r.bits() <= 256).map(|r| {
                let mut other = signed.clone();
                other.signature[..32].copy_from_slice(&bytes(&r));
                other
            })
        });
        let (truth, _) = compare(&others.collect::<Vec<_>>());
        assert!(truth.iter().all(|&good| !good));
    }
    assert!(wrapped > 100, "{wrapped} points beyond n");
}

#[test]
fn wycheproof() {
    let fixtures = std::env::var("ATPROTO_FIXTURES").unwrap_or("../shared/fixtures".into());
    let path = PathBuf::from(fixtures).join("wycheproof/ecdsa_secp256k1_sha256_p1363_test.json");
    let Ok(text) = std::fs::read_to_string(path) else {
        println!("skipped: no fixtures");
        return;
    };
    let json: serde_json::Value = serde_json::from_str(&text).unwrap();
    let unhex = |hex: &serde_json::Value| -> Vec<u8> {
        let hex = hex.as_str().unwrap();
        (0..hex.len() / 2)
            .map(|i| u8::from_str_radix(&hex[2 * i..2 * i + 2], 16).unwrap())
            .collect()
    };
    let mut cases = vec![];
    for group in json["testGroups"].as_array().unwrap() {
        let key = PublicKey::from_slice(&unhex(&group["publicKey"]["uncompressed"])).unwrap();
        for test in group["tests"].as_array().unwrap() {
            let Ok(signature) = unhex(&test["sig"]).try_into() else {
                continue;
            };
            let digest = <sha2::Sha256 as sha2::Digest>::digest(unhex(&test["msg"])).into();
            cases.push((
                Signed {
                    key,
                    digest,
                    signature,
                },
                test["result"] == "valid",
            ));
        }
    }
    let (signed, valid): (Vec<_>, Vec<_>) = cases.into_iter().unzip();
    let (truth, proven) = compare(&signed);
    let count = |flags: &[bool]| flags.iter().filter(|&&flag| flag).count();
    println!(
        "{} cases, {} valid, {} low-S and good, {} proven",
        signed.len(),
        count(&valid),
        count(&truth),
        count(&proven)
    );
    assert_eq!((count(&truth), count(&proven)), (95, 95));
    for ((signed, valid), truth) in signed.iter().zip(valid).zip(truth) {
        let high = BigUint::from_bytes_be(&signed.signature[32..]) > (&*N >> 1);
        assert_eq!(truth, valid && !high);
    }
}
