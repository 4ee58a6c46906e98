//! The PLC directory of the devnet against the interop logs of did-method-plc, against logs and
//! documents of a real directory, and over its HTTP routes.

#![cfg(feature = "devnet")]

use crate::support;
use std::fs;
use std::path::Path;

use atproto_relay::devnet::keys::{Curve, SigningKey};
use atproto_relay::devnet::plc::{
    LogError, LookupError, Operation, Plc, Service, Tombstone, Update,
};
use atproto_relay::devnet::timestamp::Timestamp;
use rand::SeedableRng;
use rand::rngs::StdRng;
use serde_json::{Value, json};

fn logs(folder: &Path) -> Vec<(String, Vec<u8>)> {
    let mut logs: Vec<_> = fs::read_dir(folder)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .map(|path| {
            (
                path.file_name().unwrap().to_string_lossy().into_owned(),
                fs::read(path).unwrap(),
            )
        })
        .collect();
    logs.sort();
    logs
}

#[test]
fn takes_valid_interop_logs_and_refuses_invalid_ones() {
    let Some(root) = support::fixtures("plc-interop") else {
        return;
    };
    let (valid, invalid) = (
        logs(&root.join("audit_log/valid")),
        logs(&root.join("audit_log/invalid")),
    );
    assert_eq!((valid.len(), invalid.len()), (10, 10));
    for (name, log) in valid {
        let plc = Plc::default();
        let did = plc
            .load_audit_log(&log)
            .unwrap_or_else(|error| panic!("{name}: {error}"));
        let written: Value = serde_json::from_slice(&log).unwrap();
        assert_eq!(json!(plc.audit_log(&did).unwrap()), written, "{name}");
    }
    for (name, log) in invalid {
        let plc = Plc::default();
        let refused = plc.load_audit_log(&log);
        println!("{name}: {}", refused.as_ref().expect_err(&name));
    }
}

#[test]
fn documents_equal_those_of_a_real_directory_at_their_time() {
    let Some(root) = support::fixtures("real-pds") else {
        return;
    };
    let plc = Plc::default();
    let mut seen = 0;
    for (file, log) in logs(&root.join("plc")) {
        let did = plc
            .load_audit_log(&log)
            .unwrap_or_else(|error| panic!("{file}: {error}"));
        let name = file.trim_end_matches(".audit.json");
        let real: Value =
            serde_json::from_slice(&fs::read(root.join(format!("diddocs/{name}.json"))).unwrap())
                .unwrap();
        assert_eq!(plc.document(&did).unwrap(), real, "{name}");
        seen += 1;
    }
    assert_eq!(seen, 8);

    let mig = plc
        .load_audit_log(&fs::read(root.join("plc/mig.audit.json")).unwrap())
        .unwrap();
    let endpoint = |at: &str| {
        let document = plc.document_at(&mig, at.parse().unwrap());
        document.map(|document| {
            document["service"][0]["serviceEndpoint"]
                .as_str()
                .unwrap()
                .to_owned()
        })
    };
    assert_eq!(
        endpoint("2026-11-21T02:17:30.022Z"),
        Err(LookupError::NotRegistered(mig.clone()))
    );
    assert_eq!(
        endpoint("2026-11-21T02:17:30.023Z").unwrap(),
        "http://localhost:2583"
    );
    assert_eq!(
        endpoint("2026-11-21T02:17:38.399Z").unwrap(),
        "http://localhost:2583"
    );
    assert_eq!(
        endpoint("2026-11-21T02:17:38.400Z").unwrap(),
        "http://localhost:2584"
    );
}

#[test]
fn nullified_operations_stand_until_they_are_taken_back() {
    let Some(root) = support::fixtures("plc-interop") else {
        return;
    };
    let log = fs::read(root.join("audit_log/valid/log_nullified_tombstone.json")).unwrap();
    let plc = Plc::default();
    let did = plc.load_audit_log(&log).unwrap();
    let audit = plc.audit_log(&did).unwrap();
    let tombstone = audit.iter().find(|entry| entry.nullified).unwrap();
    let at: Timestamp = tombstone.created_at.parse().unwrap();
    plc.set_as_of(Some(at));
    assert_eq!(
        plc.document(&did),
        Err(LookupError::Tombstoned(did.clone()))
    );
    assert!(
        plc.audit_log(&did)
            .unwrap()
            .iter()
            .all(|entry| !entry.nullified)
    );
    plc.set_as_of(None);
    assert!(plc.document(&did).is_ok());
}

fn update(rotation: &[&SigningKey], prev: Option<String>) -> Operation {
    let pds = Service {
        kind: "AtprotoPersonalDataServer".to_owned(),
        endpoint: "http://127.0.0.1:1".to_owned(),
    };
    Operation::Update(Update {
        rotation_keys: rotation.iter().map(|key| key.did_key()).collect(),
        verification_methods: [("atproto".to_owned(), rotation[0].did_key())].into(),
        also_known_as: vec!["at://alice.test".to_owned()],
        services: [("atproto_pds".to_owned(), pds)].into(),
        prev,
        sig: String::new(),
    })
}

#[tokio::test]
async fn serves_and_takes_operations_over_http() {
    let mut rng = StdRng::seed_from_u64(7);
    let strong = SigningKey::generate(Curve::K256, &mut rng);
    let weak = SigningKey::generate(Curve::P256, &mut rng);
    let plc = Plc::start().await.unwrap();
    let http = atproto_relay::dial::plain_client();
    let url = |path: &str| format!("{}/{path}", plc.url());
    let get = |path: String| {
        let request = http.get(url(&path));
        async move {
            let answer = request.send().await.unwrap();
            (
                answer.status().as_u16(),
                answer.json::<Value>().await.unwrap_or_default(),
            )
        }
    };
    let post = |did: String, operation: Value| {
        let request = http.post(url(&did)).json(&operation);
        async move {
            let answer = request.send().await.unwrap();
            (answer.status().as_u16(), answer.text().await.unwrap())
        }
    };

    assert_eq!(get("_health".into()).await.0, 200);
    let genesis = update(&[&strong, &weak], None).sign(&strong);
    let did = genesis.genesis_did();
    assert_eq!(
        get(did.clone()).await,
        (
            404,
            json!({ "message": format!("DID not registered: {did}") })
        )
    );
    assert_eq!(
        post("did:plc:aaaaaaaaaaaaaaaaaaaaaaaa".into(), json!(genesis))
            .await
            .0,
        400
    );
    assert_eq!(
        post(did.clone(), json!({ "type": "plc_operation" }))
            .await
            .0,
        400
    );
    assert_eq!(
        post(did.clone(), json!(genesis)).await,
        (200, "OK".to_owned())
    );
    let (status, document) = get(did.clone()).await;
    assert_eq!(
        (status, &document["alsoKnownAs"]),
        (200, &json!(["at://alice.test"]))
    );

    let unsigned = update(&[&weak], Some(genesis.cid()));
    assert_eq!(post(did.clone(), json!(unsigned)).await.0, 400);
    let taken = unsigned.sign(&weak);
    assert_eq!(post(did.clone(), json!(taken)).await.0, 200);
    assert_eq!(
        get(format!("{did}/data")).await.1["rotationKeys"],
        json!([weak.did_key()])
    );
    let recovery = update(&[&strong], Some(genesis.cid())).sign(&strong);
    assert_eq!(post(did.clone(), json!(recovery)).await.0, 200);
    assert_eq!(
        get(format!("{did}/log")).await.1,
        json!([genesis, recovery])
    );
    assert_eq!(get(format!("{did}/log/last")).await.1, json!(recovery));
    assert_eq!(
        get(format!("{did}/log/audit")).await.1[1]["nullified"],
        json!(true)
    );

    let tombstone = Operation::Tombstone(Tombstone {
        prev: recovery.cid(),
        sig: String::new(),
    })
    .sign(&strong);
    assert_eq!(post(did.clone(), json!(tombstone)).await.0, 200);
    assert_eq!(get(did.clone()).await.0, 410);
    let after = update(&[&strong], Some(tombstone.cid())).sign(&strong);
    assert_eq!(plc.submit(&did, after), Err(LogError::Tombstoned));

    let export = http
        .get(url("export?count=3"))
        .send()
        .await
        .unwrap()
        .text()
        .await
        .unwrap();
    assert_eq!(export.lines().count(), 3);
    plc.set_outage(true);
    assert_eq!(get(did).await.0, 503);
    assert!(plc.lookups() >= 3);
}

#[tokio::test]
async fn replays_see_documents_of_their_time_at_their_own_hosts() {
    let Some(root) = support::fixtures("real-pds") else {
        return;
    };
    let plc = Plc::start().await.unwrap();
    let log = fs::read(root.join("plc/mig.audit.json")).unwrap();
    let mig = plc.load_audit_log(&log).unwrap();
    plc.rewrite_endpoint("http://localhost:2583", "http://127.0.0.1:1");
    let http = atproto_relay::dial::plain_client();
    for (at, endpoint) in [
        (Some("2026-11-21T02:17:31.000Z"), "http://127.0.0.1:1"),
        (Some("2026-11-21T02:17:39.000Z"), "http://localhost:2584"),
        (None, "http://localhost:2584"),
    ] {
        plc.set_as_of(at.map(|at| at.parse().unwrap()));
        let answer = http.get(format!("{}/{mig}", plc.url())).send().await;
        let document: Value = answer.unwrap().json().await.unwrap();
        assert_eq!(document["service"][0]["serviceEndpoint"], json!(endpoint));
    }
}
