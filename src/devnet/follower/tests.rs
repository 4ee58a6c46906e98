use super::*;
use crate::devnet::network::{Network, NetworkOptions};
use crate::devnet::pds::Pds;
use serde_json::json;

const POST: &str = "app.bsky.feed.post";

async fn network() -> Network {
    let options = NetworkOptions {
        pds: 2,
        ..NetworkOptions::default()
    };
    Network::start(options).await.unwrap()
}

fn follow(snapshot: &mut Snapshot, pds: &Pds, from: usize) -> usize {
    let events = pds.events();
    for event in &events[from..] {
        snapshot.take(&event.frame, false);
    }
    events.len()
}

fn both(network: &Network) -> Vec<AccountSnapshot> {
    let all = network.all_pds().iter().flat_map(|pds| pds.repositories());
    all.map(AccountSnapshot::from).collect()
}

#[tokio::test]
async fn a_view_equals_the_repositories_it_was_made_from() {
    let network = network().await;
    let pds = network.pds(0);
    let did = pds.create_account("a.pds1.test").unwrap().did;
    let gone = pds.create_account("b.pds1.test").unwrap().did;
    pds.put_record(&did, POST, "one", json!({ "text": "1" }))
        .unwrap();
    pds.put_record(&did, POST, "two", json!({ "text": "2" }))
        .unwrap();
    pds.put_record(&did, POST, "one", json!({ "text": "3" }))
        .unwrap();
    pds.delete_record(&did, POST, "two").unwrap();
    let mut snapshot = Snapshot::default();
    let read = follow(&mut snapshot, pds, 0);
    assert_eq!(
        differences(both(&network), &snapshot.accounts()),
        [""; 0].map(str::to_owned)
    );
    assert_eq!((snapshot.report().bad, snapshot.report().gaps), (0, 0));
    pds.deactivate(&gone).unwrap();
    pds.put_record(&did, POST, "three", json!({ "text": "4" }))
        .unwrap();
    let differ = differences(both(&network), &snapshot.accounts());
    assert_eq!(differ.len(), 2, "{differ:?}");
    follow(&mut snapshot, pds, read);
    assert!(differences(both(&network), &snapshot.accounts()).is_empty());
}

#[tokio::test]
async fn gaps_doubles_and_revs_that_go_back_are_counted() {
    let network = network().await;
    let pds = network.pds(0);
    let did = pds.create_account("a.pds1.test").unwrap().did;
    for text in ["1", "2", "3"] {
        pds.put_record(&did, POST, "one", json!({ "text": text }))
            .unwrap();
    }
    let events = pds.events();
    let mut snapshot = Snapshot::default();
    let last = &events[events.len() - 1].frame;
    snapshot.take(&events[0].frame, false);
    snapshot.take(last, false);
    snapshot.take(last, true);
    assert_eq!((snapshot.report().gaps, snapshot.report().doubles), (1, 0));
    snapshot.take(&events[events.len() - 2].frame, false);
    let report = snapshot.report();
    assert_eq!((report.doubles, report.bad, report.events), (1, 1, 3));
    snapshot.take(b"nonsense", false);
    assert_eq!(snapshot.report().bad, 2);
}
