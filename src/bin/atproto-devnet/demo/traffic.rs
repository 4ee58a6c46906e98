//! What happens in the demo's network: people who post, like, delete, rename, move and pause, and
//! now and then a host that does wrong.

use std::sync::Mutex;
use std::time::{Duration, Instant};

use anyhow::Context;
use atproto_relay::atproto::did::Did;
use atproto_relay::devnet::faults::{self, Fault};
use atproto_relay::devnet::keys::{Curve, SigningKey};
use atproto_relay::devnet::network::Network;
use atproto_relay::devnet::pds::frames;
use atproto_relay::devnet::pds::{Commit, Pds, Write};
use rand::rngs::StdRng;
use rand::seq::IndexedRandom;
use rand::{Rng, SeedableRng};
use serde_json::{Value, json};
use tokio::sync::mpsc;

const POST: &str = "app.bsky.feed.post";
const LIKE: &str = "app.bsky.feed.like";
/// A relay looks an identity up anew at most every 30 s for a DID; what changes identities here
/// keeps that distance, so that only what is wrong is refused.
const BETWEEN_IDENTITY_CHANGES: Duration = Duration::from_secs(40);
/// The faults of the demo: those whose refusal is seen at once.
const FAULTS: [Fault; 7] = [
    Fault::BadSignature,
    Fault::WrongBlockHash,
    Fault::MissingOp,
    Fault::ForeignAccount,
    Fault::Replay,
    Fault::Gap,
    Fault::Disconnect,
];
/// What a key press forges, one after the other.
const FORGERIES: [Fault; 4] = [
    Fault::BadSignature,
    Fault::WrongBlockHash,
    Fault::MissingOp,
    Fault::ForeignAccount,
];
const NAMES: [&str; 24] = [
    "ada", "bela", "chidi", "dana", "emre", "freya", "goran", "hana", "ines", "jonas", "kamala",
    "luca", "mei", "nils", "olga", "pablo", "quinn", "rosa", "sami", "tove", "uma", "vera", "wen",
    "yusuf",
];
const TEXTS: [&str; 6] = [
    "the tide is out and the boats lie on their sides",
    "does anybody have a spare bicycle pump?",
    "third attempt at sourdough: edible",
    "the 14 is late again, and so am I",
    "found my grandfather's slide rule, works without charging",
    "a heron stood on our roof this morning",
];

struct Person {
    did: Did,
    handle: String,
    home: usize,
    paused: bool,
    /// When its identity last changed, or was last put in doubt.
    touched: Instant,
    last: Option<Commit>,
    rkeys: Vec<String>,
}

struct State {
    people: Vec<Person>,
    rng: StdRng,
    created: usize,
    commits: u32,
    forgeries: usize,
}

/// The people of the network and what they do.
pub struct Traffic {
    state: Mutex<State>,
    stranger: SigningKey,
    notes: mpsc::UnboundedSender<String>,
    heard: Mutex<mpsc::UnboundedReceiver<String>>,
}

impl Traffic {
    /// Creates `accounts` on each PDS.
    pub fn start(network: &Network, accounts: usize) -> anyhow::Result<Traffic> {
        let mut rng = StdRng::seed_from_u64(fastrand::u64(..));
        let stranger = SigningKey::generate(Curve::K256, &mut rng);
        let (notes, heard) = mpsc::unbounded_channel();
        let state = State {
            people: Vec::new(),
            rng,
            created: 0,
            commits: 0,
            forgeries: 0,
        };
        let traffic = Traffic {
            state: Mutex::new(state),
            stranger,
            notes,
            heard: Mutex::new(heard),
        };
        for home in 0..network.all_pds().len() {
            for _ in 0..accounts {
                traffic.state().join(network, home)?;
            }
        }
        Ok(traffic)
    }

    /// Sends a forged commit of somebody, and notes it.
    pub fn forge(&self, network: &Network) -> anyhow::Result<()> {
        let note = self.state().forge(network, &self.stranger)?;
        let note = note.unwrap_or_else(|| "nothing forged: every account is paused".to_owned());
        // The receiver lives as long as this value.
        let _ = self.notes.send(format!("on your key press, {note}"));
        Ok(())
    }

    /// What went wrong on purpose since the last call, in words.
    pub fn notes(&self) -> Vec<String> {
        let mut heard = self.heard.lock().expect("no holder of this lock panics");
        std::iter::from_fn(|| heard.try_recv().ok()).collect()
    }

    /// The handle of an account.
    pub fn handle(&self, did: &str) -> Option<String> {
        self.state()
            .people
            .iter()
            .find(|person| person.did.as_str() == did)
            .map(|person| person.handle.clone())
    }

    /// Lets people do things, `rate` a second, until an error.
    pub async fn run(&self, network: &Network, rate: f64, fault_every: u32) -> anyhow::Result<()> {
        let mut clock = tokio::time::interval(Duration::from_secs_f64(1.0 / rate));
        loop {
            clock.tick().await;
            if let Some(note) = self.state().act(network, &self.stranger, fault_every)? {
                // The receiver lives as long as this value.
                let _ = self.notes.send(note);
            }
        }
    }

    fn state(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().expect("no holder of this lock panics")
    }
}

impl State {
    fn join(&mut self, network: &Network, home: usize) -> anyhow::Result<()> {
        let pds = network.pds(home);
        let (name, round) = (
            NAMES[self.created % NAMES.len()],
            self.created / NAMES.len(),
        );
        let name = if round == 0 {
            name.to_owned()
        } else {
            format!("{name}{}", round + 1)
        };
        let account = pds
            .create_account(&format!("{name}.{}", pds.domain()))
            .context("a new account")?;
        self.created += 1;
        self.people.push(Person {
            did: account.did,
            handle: account.handle,
            home,
            paused: false,
            touched: Instant::now(),
            last: None,
            rkeys: Vec::new(),
        });
        Ok(())
    }

    /// One person does one thing; a note when something goes wrong on purpose.
    fn act(
        &mut self,
        network: &Network,
        stranger: &SigningKey,
        fault_every: u32,
    ) -> anyhow::Result<Option<String>> {
        let who = self.rng.random_range(0..self.people.len());
        let settled = self.people[who].touched.elapsed() > BETWEEN_IDENTITY_CHANGES;
        if self.people[who].paused {
            return if settled {
                self.pause(network, who, false)
            } else {
                Ok(None)
            };
        }
        match self.rng.random_range(0..100) {
            0..2 if self.people.len() < 60 * network.all_pds().len() => {
                let home = self.rng.random_range(0..network.all_pds().len());
                self.join(network, home).map(|()| None)
            }
            2..4 if settled => self.rename(network, who),
            4..6 if settled && network.all_pds().len() > 1 => self.migrate(network, who),
            6..8 if settled => self.pause(network, who, true),
            8..10 if settled => self.rotate(network, who),
            _ => {
                self.commits += 1;
                let fault = (fault_every > 0 && self.commits.is_multiple_of(fault_every))
                    .then(|| FAULTS.choose(&mut self.rng).copied())
                    .flatten();
                self.write(network, stranger, who, fault)
            }
        }
    }

    /// One person's commit is forged; in words what was done.
    fn forge(
        &mut self,
        network: &Network,
        stranger: &SigningKey,
    ) -> anyhow::Result<Option<String>> {
        for _ in FORGERIES {
            let active: Vec<usize> = (0..self.people.len())
                .filter(|who| !self.people[*who].paused)
                .collect();
            let Some(who) = active.choose(&mut self.rng).copied() else {
                return Ok(None);
            };
            let fault = FORGERIES[self.forgeries % FORGERIES.len()];
            self.forgeries += 1;
            // With a single PDS there is no other one to send for it.
            if let Some(note) = self.write(network, stranger, who, Some(fault))? {
                return Ok(Some(note));
            }
        }
        Ok(None)
    }

    fn rename(&mut self, network: &Network, who: usize) -> anyhow::Result<Option<String>> {
        let number = self.rng.random_range(2..1_000);
        let person = &mut self.people[who];
        let pds = network.pds(person.home);
        let name = person.handle.split(['.', '-']).next().unwrap_or("someone");
        let handle = format!("{name}-{number}.{}", pds.domain());
        pds.update_handle(&person.did, &handle)
            .context("a new handle")?;
        (person.handle, person.touched) = (handle, Instant::now());
        Ok(None)
    }

    fn migrate(&mut self, network: &Network, who: usize) -> anyhow::Result<Option<String>> {
        let person = &mut self.people[who];
        let to = (person.home + 1) % network.all_pds().len();
        let account = network.migrate(&person.did, to).context("a migration")?;
        (person.home, person.handle, person.touched) = (to, account.handle, Instant::now());
        Ok(None)
    }

    fn pause(
        &mut self,
        network: &Network,
        who: usize,
        pause: bool,
    ) -> anyhow::Result<Option<String>> {
        let person = &mut self.people[who];
        let pds = network.pds(person.home);
        if pause {
            pds.deactivate(&person.did)
        } else {
            pds.activate(&person.did)
        }
        .context("a pause")?;
        (person.paused, person.touched) = (pause, Instant::now());
        Ok(None)
    }

    fn rotate(&mut self, network: &Network, who: usize) -> anyhow::Result<Option<String>> {
        let person = &mut self.people[who];
        network
            .pds(person.home)
            .rotate_key(&person.did)
            .context("a new key")?;
        person.touched = Instant::now();
        Ok(None)
    }

    fn write(
        &mut self,
        network: &Network,
        stranger: &SigningKey,
        who: usize,
        fault: Option<Fault>,
    ) -> anyhow::Result<Option<String>> {
        let writes = self.writes(who);
        let person = &mut self.people[who];
        let pds = network.pds(person.home);
        let commit = pds
            .commit_silently(&person.did, &writes)
            .context("a commit")?;
        for op in &commit.ops {
            let rkey = op
                .path
                .strip_prefix("app.bsky.feed.post/")
                .map(str::to_owned);
            person
                .rkeys
                .extend(rkey.filter(|rkey| op.cid.is_some() && !person.rkeys.contains(rkey)));
        }
        let note = fault.and_then(|fault| person.misbehave(network, stranger, fault, &commit));
        if fault != Some(Fault::Gap) {
            send(pds, &person.did, &commit);
        }
        person.last = Some(commit);
        Ok(note)
    }

    fn writes(&mut self, who: usize) -> Vec<Write> {
        let other = self
            .people
            .choose(&mut self.rng)
            .map(|person| person.did.clone());
        let text = TEXTS.choose(&mut self.rng).copied().unwrap_or_default();
        let post = |text: &str| create(POST, json!({ "text": text, "createdAt": now() }));
        let person = &mut self.people[who];
        match self.rng.random_range(0..10) {
            0 if !person.rkeys.is_empty() => {
                let rkey = person
                    .rkeys
                    .swap_remove(self.rng.random_range(0..person.rkeys.len()));
                vec![Write::Delete {
                    collection: POST.to_owned(),
                    rkey,
                }]
            }
            1..3 => {
                let subject =
                    other.map_or_else(String::new, |did| format!("at://{did}/{POST}/self"));
                vec![create(
                    LIKE,
                    json!({ "subject": { "uri": subject }, "createdAt": now() }),
                )]
            }
            3 => vec![post(text), post("(2/2) that was all")],
            _ => vec![post(text)],
        }
    }
}

impl Person {
    /// Puts the fault in before the good commit is sent; in words what was done.
    fn misbehave(
        &mut self,
        network: &Network,
        stranger: &SigningKey,
        fault: Fault,
        commit: &Commit,
    ) -> Option<String> {
        let pds = network.pds(self.home);
        let (who, host) = (&self.handle, pds.domain());
        let note = match fault {
            Fault::ForeignAccount => {
                let other = network.pds((self.home + 1) % network.all_pds().len());
                if other.host() == pds.host() {
                    return None;
                }
                send(other, &self.did, commit);
                format!(
                    "{} sends a commit of {who}, an account of {host}",
                    other.domain()
                )
            }
            Fault::Replay => {
                send(pds, &self.did, self.last.as_ref()?);
                format!("{host} sends an old commit of {who} again")
            }
            Fault::Gap => {
                format!("{host} leaves out a commit of {who}: the next one does not fit the chain")
            }
            Fault::Disconnect => {
                pds.disconnect();
                format!("{host} closes its connections")
            }
            _ => {
                send(
                    pds,
                    &self.did,
                    &faults::spoil(fault, &self.did, commit, stranger)?,
                );
                format!(
                    "{host} sends a commit of {who} with a {}",
                    fault.name().replace('-', " ")
                )
            }
        };
        // The relay may look the identity up because of this; leave it time to settle.
        self.touched = Instant::now();
        Some(note)
    }
}

fn send(pds: &Pds, did: &Did, commit: &Commit) {
    pds.emit_with(|stamp| frames::commit(stamp, did, commit));
}

fn create(collection: &str, record: Value) -> Write {
    Write::Create {
        collection: collection.to_owned(),
        rkey: None,
        record,
    }
}

fn now() -> String {
    atproto_relay::devnet::timestamp::Timestamp::now().to_string()
}
