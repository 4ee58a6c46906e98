//! One firehose against the ledger, message by message.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use super::ledger::{Expected, Ledger, Verdict};
use super::report::Report;
use super::{EventId, Fingerprint, did_of};
use crate::atproto::frame::{self, Message};

/// The state of one consumer of the firehose.
#[derive(Debug)]
pub struct Checker {
    ledger: Arc<Ledger>,
    report: Report,
    /// Sequence number and fingerprint of each event received, in order.
    received: Vec<(i64, Fingerprint)>,
    seen: HashSet<u32>,
    seen_forward: usize,
    seen_by_host: HashMap<u32, usize>,
    /// Ordinal of the last event of each account.
    last: HashMap<u32, u32>,
    /// Accounts that came out of each group.
    groups: HashMap<u32, HashSet<u32>>,
    /// The next event may repeat the last one: the consumer reconnected with its number as cursor.
    resumed: bool,
}

impl Checker {
    /// A consumer that has received nothing yet.
    pub fn new(ledger: Arc<Ledger>) -> Checker {
        Checker {
            ledger,
            report: Report::default(),
            received: Vec::new(),
            seen: HashSet::new(),
            seen_forward: 0,
            seen_by_host: HashMap::new(),
            last: HashMap::new(),
            groups: HashMap::new(),
            resumed: false,
        }
    }

    /// The number to resume from: that of the last event.
    pub fn last_seq(&self) -> Option<i64> {
        self.received.last().map(|(seq, _)| *seq)
    }

    /// The consumer has connected again, with [`Checker::last_seq`] as its cursor.
    pub fn resumed(&mut self) {
        self.report.reconnects += 1;
        self.resumed = true;
    }

    /// How many events that had to come out did.
    pub fn complete(&self) -> usize {
        self.seen_forward
    }

    /// The same, of one host.
    pub fn complete_of(&self, host: u32) -> usize {
        self.seen_by_host.get(&host).copied().unwrap_or(0)
    }

    /// Every event received, as sequence number and fingerprint.
    pub fn received(&self) -> &[(i64, Fingerprint)] {
        &self.received
    }

    /// Takes one message of the firehose; the tag of its event when it had to come out.
    pub fn observe(&mut self, frame: &[u8]) -> Option<usize> {
        let Ok((fingerprint, peek)) = Fingerprint::of(frame) else {
            return self.not_an_event(frame);
        };
        let seq = peek.seq;
        if std::mem::take(&mut self.resumed) && self.received.last() == Some(&(seq, fingerprint)) {
            return None;
        }
        self.sequence(seq);
        self.received.push((seq, fingerprint));
        self.report.received += 1;
        let Some((id, event)) = self.ledger.find(fingerprint) else {
            self.report.forged += 1;
            let did = did_of(frame, &peek);
            self.report.note(|| {
                format!(
                    "forged: seq {seq}, {} of {did}: nobody sent this",
                    peek.kind.as_str()
                )
            });
            return None;
        };
        self.judge(seq, id, &event)
    }

    fn not_an_event(&mut self, frame: &[u8]) -> Option<usize> {
        match frame::decode(frame).map(|frame| frame.message) {
            Ok(Message::Info(_)) => self.report.infos += 1,
            Ok(Message::Error(error)) => {
                self.report.malformed += 1;
                self.report.note(|| format!("error frame: {}", error.error));
            }
            Ok(_) => self.report.infos += 1,
            Err(error) => {
                self.report.malformed += 1;
                self.report
                    .note(|| format!("not a frame ({} bytes): {error}", frame.len()));
            }
        }
        None
    }

    fn sequence(&mut self, seq: i64) {
        let Some(last) = self.last_seq() else { return };
        if seq != last + 1 {
            self.report.sequence += 1;
            self.report.note(|| format!("seq {seq} follows {last}"));
        }
    }

    fn judge(&mut self, seq: i64, id: u32, event: &Expected) -> Option<usize> {
        if let Verdict::Refuse(rule) = event.verdict {
            self.report.refused += 1;
            self.report.note(|| {
                format!(
                    "let through: seq {seq}, {}: rule {rule} had to refuse it",
                    describe(event)
                )
            });
            return None;
        }
        if !self.seen.insert(id) {
            self.report.doubled += 1;
            self.report
                .note(|| format!("doubled: seq {seq}, {}", describe(event)));
            return None;
        }
        let last = self.last.entry(event.account).or_default();
        if event.ordinal <= *last {
            self.report.out_of_order += 1;
            let last = *last;
            self.report.note(|| {
                format!(
                    "out of order: seq {seq}, {}, its event no. {} after no. {last}",
                    describe(event),
                    event.ordinal
                )
            });
        }
        *last = (*last).max(event.ordinal);
        match event.verdict {
            Verdict::Quota(group) => self.quota(seq, group, event),
            _ => {
                self.seen_forward += 1;
                *self.seen_by_host.entry(event.origin.host).or_default() += 1;
            }
        }
        event.tag
    }

    fn quota(&mut self, seq: i64, group: super::GroupId, event: &Expected) {
        let accounts = self.groups.entry(group.number()).or_default();
        let quota = self.ledger.quota(group);
        if accounts.insert(event.account) && accounts.len() > quota {
            self.report.quota += 1;
            self.report.note(|| {
                format!(
                    "over quota: seq {seq}, {}: {quota} accounts may come out",
                    describe(event)
                )
            });
        }
    }

    /// Whether the event came out.
    pub fn saw(&self, event: EventId) -> bool {
        self.seen.contains(&event.0)
    }

    /// Whether as many accounts came out of each group as its quota allows.
    pub fn quotas_filled(&self) -> bool {
        self.ledger
            .quotas()
            .into_iter()
            .all(|(group, quota)| self.groups.get(&group).map_or(0, HashSet::len) >= quota)
    }

    /// The state of things now; events that may still come count as missing.
    pub fn report(&self) -> Report {
        let mut report = self.report.clone();
        report.expected = self.ledger.forward();
        self.ledger.each_forward(|id, event| {
            if !self.seen.contains(&id) {
                report.missing += 1;
                report.note(|| format!("missing: {}", describe(event)));
            }
        });
        for (group, quota) in self.ledger.quotas() {
            let came = self.groups.get(&group).map_or(0, HashSet::len);
            if came < quota {
                report.quota += 1;
                report.note(|| format!("quota not filled: {came} of {quota} accounts came out"));
            }
        }
        report
    }
}

fn describe(event: &Expected) -> String {
    let Expected {
        did, kind, origin, ..
    } = event;
    format!(
        "{} of {did}, seq {} of host {}",
        kind.as_str(),
        origin.seq,
        origin.host
    )
}
