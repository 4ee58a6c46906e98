//! What the log is told of hosts: that one was connected, lost or refused, and what of its events was dropped, by rule.
//! Promises few lines, whatever hosts do: each has its turn once a minute, and all of them together a number of lines a
//! minute, with a word on how many were left out.

use std::fmt::Display;
use std::sync::{Mutex, MutexGuard};
use std::time::{Duration, Instant};

use crate::telemetry::metrics;

/// How often a host may have a line of each kind.
const MINUTE: Duration = Duration::from_secs(60);

/// Lines of each kind about all hosts together in a minute: what somebody reads, and nothing for a disk.
const LINES_A_MINUTE: u32 = 60;

/// Changes of a host's connection that are told at once; after them one a minute.
const CHANGES_AT_ONCE: u32 = 4;

/// Longest text that is kept for a line, in bytes: a DID has 2 KB at most, and the rest is ours.
const MAX_TEXT_BYTES: usize = 300;

/// How a host's connection stands, for the log.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Contact {
    Connected,
    Lost,
    Unreached,
    Offline,
    Refused,
}

/// A line about a host's connection.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct News {
    pub(super) contact: Contact,
    pub(super) reason: String,
    /// Connections that ended since the last such line.
    pub(super) losses: u64,
}

/// What is to be told of one host's connection.
#[derive(Debug, Default)]
pub(super) struct Story {
    now: Option<Contact>,
    told: Option<Contact>,
    reason: String,
    losses: u64,
    told_losses: u64,
    turns: Turns,
}

/// A few turns at once, then one a minute.
#[derive(Debug, Default)]
struct Turns {
    taken: u32,
    since: Option<Instant>,
}

impl Turns {
    fn take(&mut self, now: Instant) -> bool {
        let since = *self.since.get_or_insert(now);
        let regained = (now.saturating_duration_since(since).as_secs() / MINUTE.as_secs()) as u32;
        if regained > 0 {
            self.taken = self.taken.saturating_sub(regained);
            self.since = Some(now);
        }
        let has_one = self.taken < CHANGES_AT_ONCE;
        self.taken += u32::from(has_one);
        has_one
    }
}

impl Story {
    /// Notes a change; `reason` is what is known of it.
    pub(super) fn turn(&mut self, contact: Contact, reason: &dyn Display) {
        if contact == Contact::Lost {
            self.losses += 1;
        }
        if contact != Contact::Connected && self.now != Some(contact) {
            self.reason = short(&reason.to_string());
        }
        self.now = Some(contact);
    }

    /// What is to be told now.
    pub(super) fn news(&mut self, now: Instant) -> Option<News> {
        let losses = self.losses - self.told_losses;
        let is_back = losses > 0 && self.now == Some(Contact::Connected);
        let contact = match self.now {
            // Lost, and back before that was told.
            _ if is_back && self.told == Some(Contact::Connected) => Contact::Lost,
            Some(contact) if self.told != Some(contact) => contact,
            _ => return None,
        };
        if !self.turns.take(now) {
            return None;
        }
        self.told = Some(contact);
        self.told_losses = self.losses;
        Some(News {
            contact,
            reason: self.reason.clone(),
            losses,
        })
    }
}

/// Events of one host that were dropped under one rule since the relay started.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Drops {
    /// The rule's name.
    pub rule: &'static str,
    /// How many.
    pub count: u64,
    /// One of them, of the last minutes.
    pub example: Example,
}

/// An event that was dropped.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Example {
    /// Whose it claimed to be, as it stood there.
    pub did: String,
    /// The host's number for it.
    pub seq: Option<i64>,
    /// What was wrong with it.
    pub reason: String,
}

/// What of one host was dropped. There are as many entries as there are rules, which are words of the program.
#[derive(Debug, Default)]
pub(super) struct Dropped {
    drops: Vec<Drops>,
    /// What was told, in the order of `drops`.
    told: Vec<u64>,
    told_at: Option<Instant>,
}

/// A line about what was dropped.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Summary {
    /// `rule count (so many new)`, the newest first.
    pub(super) drops: String,
    pub(super) rule: &'static str,
    pub(super) example: Example,
}

impl Dropped {
    pub(super) fn count(
        &mut self,
        rule: &'static str,
        did: &str,
        seq: Option<i64>,
        reason: &dyn Display,
    ) {
        metrics().dropped(rule).inc();
        let example = || Example {
            did: short(did),
            seq,
            reason: short(&reason.to_string()),
        };
        match self.drops.iter().position(|drops| drops.rule == rule) {
            Some(index) => {
                let drops = &mut self.drops[index];
                if drops.count == self.told[index] {
                    drops.example = example();
                }
                drops.count += 1;
            }
            None => {
                self.drops.push(Drops {
                    rule,
                    count: 1,
                    example: example(),
                });
                self.told.push(0);
            }
        }
    }

    pub(super) fn all(&self) -> Vec<Drops> {
        self.drops.clone()
    }

    pub(super) fn counts(&self) -> Vec<(&'static str, u64)> {
        let drops = self.drops.iter();
        drops.map(|drops| (drops.rule, drops.count)).collect()
    }

    /// What is to be told now.
    pub(super) fn summary(&mut self, now: Instant) -> Option<Summary> {
        if self
            .told_at
            .is_some_and(|at| now.saturating_duration_since(at) < MINUTE)
        {
            return None;
        }
        let new = self.drops.iter().zip(&self.told);
        let mut new: Vec<_> = new
            .map(|(drops, told)| (drops.count - told, drops))
            .filter(|(new, _)| *new > 0)
            .collect();
        new.sort_by_key(|(new, _)| std::cmp::Reverse(*new));
        let (_, first) = new.first()?;
        let summary = Summary {
            drops: new
                .iter()
                .map(|(new, drops)| format!("{} {} ({new} new)", drops.rule, drops.count))
                .collect::<Vec<_>>()
                .join(", "),
            rule: first.rule,
            example: first.example.clone(),
        };
        self.told_at = Some(now);
        self.told = self.drops.iter().map(|drops| drops.count).collect();
        Some(summary)
    }
}

/// The beginning of a text.
fn short(text: &str) -> String {
    text[..text.floor_char_boundary(MAX_TEXT_BYTES)].to_owned()
}

/// How many lines about hosts there were in this minute, by kind.
#[derive(Debug, Default)]
pub(super) struct Lines {
    contacts: Line,
    drops: Line,
    warnings: Line,
}

#[derive(Debug, Default)]
struct Line(Mutex<Count>);

#[derive(Debug, Default)]
struct Count {
    since: Option<Instant>,
    told: u32,
    left_out: u64,
}

impl Lines {
    /// Writes a line on a host's connection, if there may be one.
    pub(super) fn tell(&self, host: &str, news: &News) {
        if !self.contacts.admits(Instant::now()) {
            return;
        }
        let News { reason, losses, .. } = news;
        match news.contact {
            Contact::Connected => tracing::info!(host, "host connected"),
            Contact::Lost => tracing::info!(host, losses, reason, "host lost"),
            Contact::Unreached => tracing::info!(host, reason, "host not reached"),
            Contact::Offline => {
                tracing::info!(host, reason, "host is offline; it is tried now and then");
            }
            Contact::Refused => tracing::info!(host, reason, "host refused"),
        }
    }

    /// Writes a line on what of a host was dropped, if there may be one.
    pub(super) fn summarize(&self, host: &str, summary: &Summary) {
        if !self.drops.admits(Instant::now()) {
            return;
        }
        let Summary {
            drops,
            rule,
            example: Example { did, seq, reason },
        } = summary;
        tracing::info!(
            host,
            drops,
            rule,
            did,
            seq,
            reason,
            "events of a host dropped"
        );
    }

    /// Whether there may be another line that hosts can bring about whenever they like.
    pub(super) fn may_warn(&self) -> bool {
        self.warnings.admits(Instant::now())
    }

    /// Says how many lines were left out, a minute after the first of them.
    pub(super) fn tell_rest(&self) {
        let now = Instant::now();
        let lines = [
            ("connections", &self.contacts),
            ("dropped events", &self.drops),
            ("streams", &self.warnings),
        ];
        for (of, line) in lines {
            let left_out = line.left_out(now);
            if left_out > 0 {
                tracing::info!(of, "{left_out} more lines about hosts in the last minute");
            }
        }
    }
}

impl Line {
    fn admits(&self, now: Instant) -> bool {
        let mut count = self.lock();
        let is_over = |since: Instant| now.saturating_duration_since(since) >= MINUTE;
        if count.since.is_none_or(is_over) && count.left_out == 0 {
            *count = Count {
                since: Some(now),
                ..Count::default()
            };
        }
        let admitted = count.told < LINES_A_MINUTE;
        count.told += u32::from(admitted);
        count.left_out += u64::from(!admitted);
        admitted
    }

    /// Takes the number of lines left out, once their minute is over.
    fn left_out(&self, now: Instant) -> u64 {
        let mut count = self.lock();
        match count.since {
            Some(since) if now.saturating_duration_since(since) >= MINUTE => {
                std::mem::take(&mut *count).left_out
            }
            _ => 0,
        }
    }

    fn lock(&self) -> MutexGuard<'_, Count> {
        self.0
            .lock()
            .unwrap_or_else(|poisoned| poisoned.into_inner())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn changes_are_told_once_and_flapping_now_and_then() {
        let start = Instant::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        let mut story = Story::default();
        let contact = |news: Option<News>| news.map(|news| (news.contact, news.losses));
        assert_eq!(story.news(at(0)), None);
        story.turn(Contact::Unreached, &"no address");
        story.turn(Contact::Unreached, &"another");
        assert_eq!(story.news(at(0)).unwrap().reason, "no address");
        assert_eq!(story.news(at(1)), None);
        story.turn(Contact::Connected, &"");
        assert_eq!(contact(story.news(at(2))), Some((Contact::Connected, 0)));
        // Gone and back within a moment.
        story.turn(Contact::Lost, &"the host closed it");
        story.turn(Contact::Connected, &"");
        assert_eq!(contact(story.news(at(3))), Some((Contact::Lost, 1)));
        assert_eq!(contact(story.news(at(3))), Some((Contact::Connected, 0)));
        for _ in 0..500 {
            story.turn(Contact::Lost, &"the host closed it");
            story.turn(Contact::Connected, &"");
            assert_eq!(story.news(at(4)), None, "it had its turns");
        }
        assert_eq!(contact(story.news(at(64))), Some((Contact::Lost, 500)));
    }

    #[test]
    fn drops_are_summed_up_once_a_minute_with_an_example() {
        let start = Instant::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        let mut dropped = Dropped::default();
        assert_eq!(dropped.summary(at(0)), None);
        dropped.count("signature", "did:plc:a", Some(7), &"it is another key's");
        dropped.count("signature", "did:plc:b", Some(8), &"it is another key's");
        dropped.count("frame", &"x".repeat(5_000), None, &"no map");
        let summary = dropped.summary(at(0)).unwrap();
        assert_eq!(summary.drops, "signature 2 (2 new), frame 1 (1 new)");
        assert_eq!(
            (
                summary.rule,
                summary.example.did.as_str(),
                summary.example.seq
            ),
            ("signature", "did:plc:a", Some(7))
        );
        dropped.count("frame", "did:plc:c", Some(9), &"no map");
        assert_eq!(dropped.summary(at(59)), None);
        let summary = dropped.summary(at(60)).unwrap();
        assert_eq!(summary.drops, "frame 2 (1 new)");
        assert_eq!(summary.example.did, "did:plc:c");
        assert_eq!(dropped.summary(at(600)), None, "nothing changed");
        assert_eq!(dropped.all()[1].count, 2);
    }

    #[test]
    fn all_hosts_together_have_so_many_lines_and_the_rest_is_counted() {
        let start = Instant::now();
        let line = Line::default();
        let admitted = (0..1_000).filter(|_| line.admits(start)).count();
        assert_eq!(admitted, LINES_A_MINUTE as usize);
        assert_eq!(line.left_out(start), 0, "not yet");
        let later = start + MINUTE;
        assert_eq!(line.left_out(later), 1_000 - u64::from(LINES_A_MINUTE));
        assert!(line.admits(later) && line.left_out(later) == 0);
    }
}
