//! CAR: what we accept writes back to the same bytes, blocks are found by their CIDs, and iroh-car
//! reads the same.

use atproto_relay::atproto::car::{self, Car};
use futures_util::{FutureExt, StreamExt};
use iroh_car::CarReader;

/// Checks any bytes.
pub fn check(bytes: &[u8]) {
    let Ok(car) = Car::parse(bytes) else {
        return;
    };
    let written = car::write(car.roots(), car.blocks().iter());
    if written != bytes {
        // A header may have fields that we do not know; the blocks stay.
        assert_eq!(Car::parse(&written).as_ref(), Ok(&car));
    }
    for (cid, _) in car.blocks().iter() {
        let (_, first) = car
            .blocks()
            .iter()
            .find(|(other, _)| *other == cid)
            .expect("it was just there");
        let found = car.blocks().get(&cid);
        assert!(found.is_some_and(|found| std::ptr::eq(found, first)));
    }
    let hashed = car.blocks().iter().all(|(cid, data)| cid.matches(data));
    assert_eq!(car.verify_hashes().is_ok(), hashed);
    second_opinion(&car, &written);
}

fn second_opinion(car: &Car<'_>, bytes: &[u8]) {
    let read = async {
        let reader = CarReader::new(bytes).await.expect("a header that is read");
        let roots: Vec<_> = reader
            .header()
            .roots()
            .iter()
            .map(|cid| cid.to_bytes())
            .collect();
        let blocks: Vec<_> = reader.stream().collect().await;
        (roots, blocks)
    };
    let (roots, blocks) = read.now_or_never().expect("a slice is always ready");
    let ours: Vec<_> = car
        .roots()
        .iter()
        .map(|cid| cid.to_bytes().to_vec())
        .collect();
    assert_eq!(ours, roots);
    assert_eq!(car.blocks().len(), blocks.len());
    for ((cid, data), theirs) in car.blocks().iter().zip(blocks) {
        let (their_cid, their_data) = theirs.expect("a block that is read");
        assert_eq!(their_cid.to_bytes(), cid.to_bytes());
        assert_eq!(their_data, data);
    }
}
