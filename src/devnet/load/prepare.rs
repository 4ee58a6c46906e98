//! Signs everything a run will send before it starts, so that signing costs no time while relay and
//! consumers are measured: draws who emits what and when, signs on all cores, then gives each host
//! its script and the ledger its entries.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use bytes::Bytes;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use super::account::{Emitter, Made, Planned, Profile};
use super::record::Records;
use super::{FLOOD_ACCOUNTS, FLOOD_QUOTA, LoadOptions};
use crate::atproto::frame;
use crate::devnet::check::{Fingerprint, GroupId, Ledger, Origin, Verdict, did_of};
use crate::devnet::faults::{Effect, Fault, Injected};
use crate::devnet::feed::Step;
use crate::devnet::timestamp::Timestamp;

/// Of 1,000 events: commits with one op; identity, account and sync events. The rest are commits
/// with several ops.
const SINGLE_OP_COMMITS: u32 = 920;
const IDENTITIES: u32 = 2;
const ACCOUNTS: u32 = 2;
const SYNCS: u32 = 1;
/// Most ops of a commit with several.
const MOST_OPS: u8 = 10;
/// Microseconds between the revs of two events: more than a commit has ops, because each takes a
/// TID for its record.
const MICROS_APART: u64 = 16;
/// How long a stalled host is silent.
const STALL: Duration = Duration::from_secs(2);
/// Larger than any frame may be (5,000,000 bytes).
const OVERSIZED: usize = 5_000_001;

/// What a host does, in order.
#[derive(Clone, Debug)]
pub(super) enum Act {
    Step(Step),
    /// Once so many of the host's events came out of the relay, the sequence starts again at 1.
    Restart {
        complete: usize,
    },
}

/// An act with the place among the run's events at which it is due.
#[derive(Clone, Debug)]
pub(super) struct Due {
    pub place: usize,
    pub act: Act,
}

/// A run, ready to be sent.
pub struct Prepared {
    pub(super) options: LoadOptions,
    pub(super) profiles: Vec<Profile>,
    /// For each host the first event of each of its accounts.
    pub(super) introductions: Vec<Vec<Step>>,
    pub(super) scripts: Vec<Vec<Due>>,
    pub(super) ledger: Arc<Ledger>,
    pub(super) injected: Vec<Injected>,
    /// Sizes of the events' frames, sorted.
    sizes: Vec<u32>,
}

/// One event of the plan.
struct Slot {
    account: u32,
    planned: Planned,
    fault: Option<Fault>,
    micros: u64,
}

impl Prepared {
    /// Draws and signs a run. `progress` is called with how many of how many events are signed.
    pub fn new(options: LoadOptions, progress: &(dyn Fn(usize, usize) + Sync)) -> Prepared {
        let mut rng = StdRng::seed_from_u64(options.seed);
        let started = u64::try_from(Timestamp::now().millis()).unwrap_or(0) * 1_000;
        let profiles = profiles(&options, &mut rng);
        let slots = plan(&options, &profiles, started, &mut rng);
        let records = Records::new(&mut rng, options.existing_records, started);
        let made = sign_all(&options, &profiles, &records, &slots, started, progress);
        let mut assembly = Assembly::new(&options, profiles.len());
        let interruptions = options.faults.interruptions(options.events, &mut rng);
        assembly.run(&profiles, &slots, made, interruptions, &mut rng);
        let Assembly {
            ledger,
            introductions,
            scripts,
            injected,
            mut sizes,
            ..
        } = assembly;
        sizes.sort_unstable();
        Prepared {
            options,
            profiles,
            introductions,
            scripts,
            ledger,
            injected,
            sizes,
        }
    }

    /// The frames of the run by host, as they are sent, faulty ones included; the introductions come
    /// first.
    pub fn frames(&self) -> impl Iterator<Item = &Bytes> {
        let hosts = self.introductions.iter().zip(&self.scripts);
        hosts.flat_map(|(introductions, script)| {
            let run = script.iter().filter_map(|due| match &due.act {
                Act::Step(step) => step.frame(),
                Act::Restart { .. } => None,
            });
            introductions.iter().filter_map(Step::frame).chain(run)
        })
    }

    /// What must come out.
    pub fn ledger(&self) -> &Arc<Ledger> {
        &self.ledger
    }

    /// The faults of the run.
    pub fn injected(&self) -> &[Injected] {
        &self.injected
    }

    /// The frame size that `percent` of the run's events stay within, in bytes.
    pub fn frame_size(&self, percent: f64) -> u32 {
        let rank = (percent / 100.0 * self.sizes.len() as f64).ceil() as usize;
        self.sizes.get(rank.saturating_sub(1)).copied().unwrap_or(0)
    }

    /// Whether the last host floods the relay with new accounts.
    pub fn floods(&self) -> bool {
        self.options.faults.floods()
    }

    /// How many accounts are introduced before the run.
    pub fn introduced(&self) -> usize {
        self.introductions.iter().map(Vec::len).sum()
    }
}

fn profiles(options: &LoadOptions, rng: &mut StdRng) -> Vec<Profile> {
    let flood = if options.faults.floods() {
        FLOOD_ACCOUNTS
    } else {
        0
    };
    let hosts = u32::try_from(options.hosts).unwrap_or(u32::MAX);
    let accounts = u32::try_from(options.accounts).unwrap_or(u32::MAX);
    (0..accounts + flood)
        .map(|index| {
            let host = if index < accounts {
                index % hosts
            } else {
                hosts
            };
            Profile::new(
                options.seed,
                index,
                host,
                rng.random_bool(options.p256_share.clamp(0.0, 1.0)),
            )
        })
        .collect()
}

/// The slots of the run: first the introductions, then the events, last the flood.
fn plan(options: &LoadOptions, profiles: &[Profile], started: u64, rng: &mut StdRng) -> Vec<Slot> {
    let accounts = options.accounts as u32;
    let mut slots: Vec<Slot> = (0..accounts)
        .map(|account| slot(account, Planned::Introduction))
        .collect();
    for _ in 0..options.events {
        // Some accounts write much, most little: a square of the uniform distribution.
        let account = (f64::from(accounts) * rng.random::<f64>().powi(2)) as u32;
        let planned = draw(rng);
        let fault = matches!(planned, Planned::Commit(_))
            .then(|| options.faults.strike(rng))
            .flatten();
        slots.push(Slot {
            fault,
            ..slot(account.min(accounts - 1), planned)
        });
    }
    for account in accounts..profiles.len() as u32 {
        slots.push(slot(account, Planned::Introduction));
        slots.push(slot(account, Planned::Commit(1)));
    }
    for (place, slot) in slots.iter_mut().enumerate() {
        slot.micros = started + (place as u64 + 1) * MICROS_APART;
    }
    slots
}

fn slot(account: u32, planned: Planned) -> Slot {
    Slot {
        account,
        planned,
        fault: None,
        micros: 0,
    }
}

fn draw(rng: &mut StdRng) -> Planned {
    let n = rng.random_range(0..1_000);
    let [identities, accounts, syncs] = [
        IDENTITIES,
        IDENTITIES + ACCOUNTS,
        IDENTITIES + ACCOUNTS + SYNCS,
    ]
    .map(|n| SINGLE_OP_COMMITS + n);
    match n {
        n if n < SINGLE_OP_COMMITS => Planned::Commit(1),
        n if n < identities => Planned::Identity,
        n if n < accounts => Planned::Account,
        n if n < syncs => Planned::Sync,
        _ => Planned::Commit(rng.random_range(2..=MOST_OPS)),
    }
}

/// Signs all slots, each account on one thread in the order of its slots.
fn sign_all(
    options: &LoadOptions,
    profiles: &[Profile],
    records: &Records,
    slots: &[Slot],
    started: u64,
    progress: &(dyn Fn(usize, usize) + Sync),
) -> Vec<Made> {
    let mut by_account: Vec<Vec<usize>> = vec![Vec::new(); profiles.len()];
    for (place, slot) in slots.iter().enumerate() {
        by_account[slot.account as usize].push(place);
    }
    let (next, signed) = (AtomicUsize::new(0), AtomicUsize::new(0));
    let worker = || {
        let mut out = Vec::new();
        loop {
            let account = next.fetch_add(1, Ordering::Relaxed);
            let Some(places) = by_account.get(account) else {
                return out;
            };
            let mut emitter = Emitter::new(&profiles[account], records, options.seed, started);
            for place in places {
                let Slot {
                    planned,
                    fault,
                    micros,
                    ..
                } = slots[*place];
                out.push((*place, emitter.emit(planned, micros, fault)));
            }
            progress(
                signed.fetch_add(places.len(), Ordering::Relaxed) + places.len(),
                slots.len(),
            );
        }
    };
    let threads = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    let parts: Vec<Vec<(usize, Made)>> = std::thread::scope(|scope| {
        let handles: Vec<_> = (0..threads).map(|_| scope.spawn(worker)).collect();
        handles
            .into_iter()
            .map(|handle| handle.join().expect("signing does not panic"))
            .collect()
    });
    let mut made: Vec<(usize, Made)> = parts.into_iter().flatten().collect();
    made.sort_unstable_by_key(|(place, _)| *place);
    made.into_iter().map(|(_, made)| made).collect()
}

/// Turns signed frames into scripts and ledger entries.
struct Assembly<'a> {
    options: &'a LoadOptions,
    ledger: Arc<Ledger>,
    introductions: Vec<Vec<Step>>,
    scripts: Vec<Vec<Due>>,
    injected: Vec<Injected>,
    sizes: Vec<u32>,
    /// Last sequence number of each host.
    seqs: Vec<i64>,
    /// The last commit sent of each account, for replays.
    commits: HashMap<u32, Bytes>,
    /// Accounts with a broken chain: once is enough.
    gaps: HashSet<u32>,
    flood: Option<GroupId>,
}

impl<'a> Assembly<'a> {
    fn new(options: &'a LoadOptions, accounts: usize) -> Assembly<'a> {
        let hosts = options.hosts + usize::from(options.faults.floods());
        let ledger = Ledger::new();
        Assembly {
            options,
            flood: options.faults.floods().then(|| ledger.group(FLOOD_QUOTA)),
            ledger,
            introductions: vec![Vec::new(); hosts],
            scripts: vec![Vec::new(); hosts],
            injected: Vec::new(),
            sizes: Vec::with_capacity(options.events),
            seqs: vec![0; hosts],
            commits: HashMap::with_capacity(accounts),
            gaps: HashSet::new(),
        }
    }

    fn run(
        &mut self,
        profiles: &[Profile],
        slots: &[Slot],
        made: Vec<Made>,
        interruptions: Vec<(usize, Fault)>,
        rng: &mut StdRng,
    ) {
        let (accounts, events) = (self.options.accounts, self.options.events);
        let mut interruptions = interruptions.into_iter().peekable();
        for (at, (slot, made)) in slots.iter().zip(made).enumerate() {
            let host = profiles[slot.account as usize].host;
            if at < accounts {
                let step = self.event(host, &made.frame, Verdict::Forward, None);
                self.introductions[host as usize].push(step);
                continue;
            }
            let place = at - accounts;
            if place >= events {
                self.flood(host, slot, &made.frame, events / 2);
                continue;
            }
            while let Some((_, fault)) = interruptions.next_if(|(due, _)| *due <= place) {
                let struck = rng.random_range(0..self.options.hosts as u32);
                self.interrupt(struck, fault, place);
            }
            self.emit(host, place, slot, made);
        }
        // The flood was appended behind the last event, but is due in the middle.
        self.scripts
            .iter_mut()
            .for_each(|script| script.sort_by_key(|due| due.place));
    }

    fn emit(&mut self, host: u32, place: usize, slot: &Slot, made: Made) {
        let account = slot.account;
        if slot.fault == Some(Fault::Gap) && self.gaps.insert(account) {
            self.note(Fault::Gap, host, &made.frame, None);
            return;
        }
        if let Some((fault, frame)) = &made.faulty {
            self.refuse(host, place, *fault, frame);
        }
        if slot.fault == Some(Fault::ForeignAccount) && self.options.hosts > 1 {
            let other = (host + 1) % self.options.hosts as u32;
            self.refuse(other, place, Fault::ForeignAccount, &made.frame);
        }
        self.sizes
            .push(u32::try_from(made.frame.len()).unwrap_or(u32::MAX));
        let step = self.event(host, &made.frame, Verdict::Forward, Some(place));
        self.due(host, place, Act::Step(step));
        if !matches!(slot.planned, Planned::Commit(_)) {
            return;
        }
        let earlier = self.commits.insert(account, made.frame);
        if let Some(earlier) = earlier.filter(|_| slot.fault == Some(Fault::Replay)) {
            self.refuse(host, place, Fault::Replay, &earlier);
        }
    }

    /// Gives the frame the host's next sequence number and enters it.
    fn event(&mut self, host: u32, frame: &Bytes, verdict: Verdict, tag: Option<usize>) -> Step {
        let seq = self.next_seq(host);
        let frame = renumber(frame, seq);
        self.ledger
            .enter(&frame, Origin { host, seq }, verdict, tag)
            .expect("our frames are well formed");
        Step::Event { seq, frame, tag }
    }

    fn next_seq(&mut self, host: u32) -> i64 {
        let seq = &mut self.seqs[host as usize];
        *seq += 1;
        *seq
    }

    fn refuse(&mut self, host: u32, place: usize, fault: Fault, frame: &Bytes) {
        let Effect::Refused(rule) = fault.effect() else {
            return;
        };
        let step = self.event(host, frame, Verdict::Refuse(rule), None);
        self.note(fault, host, frame, Some(self.seqs[host as usize]));
        self.due(host, place, Act::Step(step));
    }

    fn flood(&mut self, host: u32, slot: &Slot, frame: &Bytes, place: usize) {
        let Some(group) = self.flood else { return };
        let step = self.event(host, frame, Verdict::Quota(group), None);
        if slot.planned == Planned::Introduction {
            self.note(Fault::Flood, host, frame, Some(self.seqs[host as usize]));
        }
        self.due(host, place, Act::Step(step));
    }

    fn interrupt(&mut self, host: u32, fault: Fault, place: usize) {
        let act = match fault {
            Fault::Stall => Act::Step(Step::Stall(STALL)),
            Fault::Disconnect => Act::Step(Step::HangUp),
            Fault::MalformedCbor => Act::Step(Step::Once(malformed())),
            Fault::OversizedFrame => Act::Step(Step::Once(oversized())),
            Fault::SeqRestart => {
                self.seqs[host as usize] = 0;
                Act::Restart {
                    complete: self.ledger.forward_of(host),
                }
            }
            _ => return,
        };
        self.injected.push(Injected {
            fault,
            host,
            did: None,
            seq: None,
        });
        self.due(host, place, act);
    }

    fn due(&mut self, host: u32, place: usize, act: Act) {
        self.scripts[host as usize].push(Due { place, act });
    }

    fn note(&mut self, fault: Fault, host: u32, frame: &[u8], seq: Option<i64>) {
        let did = Fingerprint::of(frame)
            .ok()
            .map(|(_, event)| did_of(frame, &event).to_owned());
        self.injected.push(Injected {
            fault,
            host,
            did,
            seq,
        });
    }
}

fn renumber(frame: &Bytes, seq: i64) -> Bytes {
    let (_, event) = Fingerprint::of(frame).expect("our frames are events");
    let mut out = Vec::with_capacity(frame.len() + 8);
    frame::splice_seq(frame, event.seq_span, seq.unsigned_abs(), &mut out);
    out.into()
}

/// A frame whose header has its keys in the wrong order.
fn malformed() -> Bytes {
    Bytes::from_static(b"\xa2\x62op\x01\x61t\x67#commit\xa0")
}

fn oversized() -> Bytes {
    vec![0; OVERSIZED].into()
}
