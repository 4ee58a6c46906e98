//! Traffic of the accounts of a PDS: they create, change and delete records at a steady rate. Always correct; faults are
//! injected from outside.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, Weak};
use std::time::Duration;

use rand::rngs::StdRng;
use rand::seq::IndexedRandom;
use rand::{Rng, SeedableRng};
use serde_json::{Value, json};
use tokio::task::JoinHandle;
use tokio::time::MissedTickBehavior;

use super::{Inner, Pds, PdsError};
use crate::atproto::did::Did;
use crate::devnet::timestamp::Timestamp;

const POST: &str = "app.bsky.feed.post";
/// Of ten writes so many change a record, and so many delete one.
const UPDATES: u32 = 2;
const DELETES: u32 = 2;

/// The writer of a PDS.
#[derive(Debug, Default)]
pub struct Traffic {
    task: Mutex<Option<JoinHandle<()>>>,
    written: Arc<AtomicU64>,
}

impl Drop for Traffic {
    fn drop(&mut self) {
        self.end();
    }
}

impl Traffic {
    /// Writes so many records a second from now on.
    pub(super) fn set(&self, pds: Weak<Inner>, rate: f64) {
        self.end();
        if rate > 0.0 {
            let task = tokio::spawn(write(pds, rate, self.written.clone()));
            *self.task.lock().expect("no holder panics") = Some(task);
        }
    }

    /// Records written so far.
    pub(super) fn written(&self) -> u64 {
        self.written.load(Ordering::SeqCst)
    }

    fn end(&self) {
        if let Some(task) = self.task.lock().expect("no holder panics").take() {
            task.abort();
        }
    }
}

/// Ends with the PDS.
async fn write(pds: Weak<Inner>, rate: f64, written: Arc<AtomicU64>) {
    let mut rng = StdRng::from_rng(&mut rand::rng());
    let mut clock = tokio::time::interval(Duration::from_secs_f64(1.0 / rate));
    clock.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        clock.tick().await;
        let Some(inner) = pds.upgrade() else { return };
        match write_one(&Pds { inner }, &mut rng) {
            Ok(()) => written.fetch_add(1, Ordering::SeqCst),
            Err(error) => {
                tracing::warn!(%error, "traffic");
                continue;
            }
        };
    }
}

fn write_one(pds: &Pds, rng: &mut StdRng) -> Result<(), PdsError> {
    let accounts = pds.active_accounts();
    let Some(did) = accounts.choose(rng) else {
        return Ok(());
    };
    let drawn = rng.random_range(0..10);
    match some_record(pds, did, rng) {
        Some(rkey) if drawn < UPDATES => pds.put_record(did, POST, &rkey, post(rng))?,
        Some(rkey) if drawn < UPDATES + DELETES => pds.delete_record(did, POST, &rkey)?,
        _ => pds.create_record(did, POST, post(rng))?,
    };
    Ok(())
}

fn some_record(pds: &Pds, did: &Did, rng: &mut StdRng) -> Option<String> {
    let records = pds.repository(did)?.records;
    let posts = records.keys().filter_map(|path| path.split_once('/'));
    let posts: Vec<&str> = posts
        .filter(|(collection, _)| *collection == POST)
        .map(|(_, rkey)| rkey)
        .collect();
    posts.choose(rng).map(|rkey| (*rkey).to_owned())
}

fn post(rng: &mut StdRng) -> Value {
    json!({
        "$type": POST,
        "text": format!("number {}", rng.random::<u32>()),
        "createdAt": Timestamp::now().to_string(),
    })
}
