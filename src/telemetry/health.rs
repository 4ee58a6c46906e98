//! What can be wrong with a relay: the problems by name, when each starts and ends, what the operator does about it, and
//! what `/_health` answers. Promises that a problem that comes and goes does not flap. Looks at no part of the relay itself.

use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use axum::Json;
use axum::response::{IntoResponse, Response};
use http::StatusCode;
use serde_json::{Value, json};

use crate::atproto::datetime;

/// A problem of the relay as a whole. What is wrong with one host, account or consumer is none.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ProblemName {
    /// The log cannot be written.
    Log,
    /// The database does not answer, or takes no changes.
    Database,
    /// The log's file system has less room than it is to keep free.
    Disk,
    /// Memory is short.
    Memory,
    /// No host is known.
    NoHosts,
    /// Hosts are known, and next to none of them is connected.
    NoHostConnected,
    /// The system's clock is behind.
    Clock,
    /// The PLC directory does not answer.
    Directory,
    /// Most hosts lose most of their events to one rule.
    Drops,
    /// Consumers on many networks fall out of the replay window.
    ConsumersCut,
}

/// What is to be known of a problem.
struct Traits {
    name: &'static str,
    /// Whether `/_health` answers 503: the relay does not work with it, so a load balancer does right to pass it by. With
    /// all others it serves what it has, and another relay would fare no better.
    outage: bool,
    /// Seconds that it must be seen without a break before it starts.
    starts_after: u64,
    /// Seconds that it must not be seen without a break before it ends: long where strangers have a part in it, so that
    /// they cannot fill the journal with its lines.
    ends_after: u64,
    what_to_do: &'static str,
}

/// In the order of [`ProblemName::ALL`].
const TRAITS: [Traits; ProblemName::ALL.len()] = [
    Traits {
        name: "log",
        outage: true,
        starts_after: 0,
        ends_after: 5,
        what_to_do: "make room on the log's disk, or replace it; hosts are read again when the log can be written",
    },
    Traits {
        name: "database",
        outage: true,
        starts_after: 0,
        ends_after: 5,
        what_to_do: "start the database, or repair the way to it; the relay catches up by itself",
    },
    Traits {
        name: "disk",
        outage: false,
        starts_after: 10,
        ends_after: 10,
        what_to_do: "find what else fills the log's disk, or give the log one of its own: its oldest events are removed to \
                     make room",
    },
    Traits {
        name: "memory",
        outage: false,
        starts_after: 5,
        ends_after: 30,
        what_to_do: "give the machine more memory, or lower account_cache; where hosts wait for memory, raise memory.shared, or \
                     ban those that never finish what they send (the log names them)",
    },
    Traits {
        name: "no_hosts",
        outage: false,
        starts_after: 5,
        ends_after: 1,
        what_to_do: "name hosts with --host, take over another relay's with `atproto-relay hosts pull`, or let them ask \
                     with com.atproto.sync.requestCrawl",
    },
    Traits {
        name: "no_host_connected",
        outage: false,
        starts_after: 10,
        ends_after: 5,
        what_to_do: "see whether name service, routes and firewall let this machine reach the hosts",
    },
    Traits {
        name: "clock",
        outage: false,
        starts_after: 5,
        ends_after: 10,
        what_to_do: "set the system's clock right, and let NTP keep it so",
    },
    Traits {
        name: "directory",
        outage: false,
        starts_after: 5,
        ends_after: 10,
        what_to_do: "see whether this machine reaches the directory (plc_host), and whether the directory is well",
    },
    Traits {
        name: "drops",
        outage: false,
        starts_after: 10,
        ends_after: 10,
        what_to_do: "see the rule's meaning, and the hosts' lines in the log: what so many hosts share is seldom their fault",
    },
    Traits {
        name: "consumers_cut",
        outage: false,
        starts_after: 0,
        ends_after: 60,
        what_to_do: "see whether this machine's line is full, or make replay_window longer",
    },
];

impl ProblemName {
    /// Every problem, the gravest first: the order in which they are told.
    pub const ALL: [Self; 10] = [
        Self::Log,
        Self::Database,
        Self::Disk,
        Self::Memory,
        Self::NoHosts,
        Self::NoHostConnected,
        Self::Clock,
        Self::Directory,
        Self::Drops,
        Self::ConsumersCut,
    ];

    fn traits(self) -> &'static Traits {
        &TRAITS[self as usize]
    }

    /// Its name in `/_health`, in metrics and in the log.
    pub fn as_str(self) -> &'static str {
        self.traits().name
    }

    /// Whether it makes `/_health` answer 503.
    pub fn is_outage(self) -> bool {
        self.traits().outage
    }

    /// What the operator does about it.
    pub fn what_to_do(self) -> &'static str {
        self.traits().what_to_do
    }
}

/// What was seen of a problem when it was looked for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finding {
    /// What is wrong, in words that anybody may read.
    pub message: String,
    /// Why, in the words of whoever reported it: for the operator alone, because it may name what is behind the relay.
    pub cause: Option<String>,
}

impl Finding {
    /// A finding whose cause is in the message, or unknown.
    pub fn new(message: impl Into<String>) -> Self {
        Self {
            message: message.into(),
            cause: None,
        }
    }

    /// The same with its cause.
    pub fn because(message: impl Into<String>, cause: impl Into<String>) -> Self {
        Self {
            message: message.into(),
            cause: Some(cause.into()),
        }
    }

    /// Message and cause, for the operator.
    pub fn full(&self) -> String {
        match &self.cause {
            Some(cause) => format!("{}: {cause}", self.message),
            None => self.message.clone(),
        }
    }
}

/// A problem that the relay has.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    pub name: ProblemName,
    /// When it was first seen.
    pub since: SystemTime,
    /// How it was last seen.
    pub finding: Finding,
}

/// Who reads `/_health`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reader {
    /// Anybody: causes are left out.
    Public,
    /// The operator.
    Operator,
}

/// The state of the relay: its problems, the gravest first.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Health {
    pub problems: Vec<Problem>,
}

impl Health {
    /// `ok`, `degraded` (there are problems, and the relay serves), or `error` (a part without which it does not work).
    pub fn status(&self) -> &'static str {
        match self.problems.as_slice() {
            [] => "ok",
            problems if problems.iter().any(|problem| problem.name.is_outage()) => "error",
            _ => "degraded",
        }
    }

    /// The body of `/_health`. `msg` is the reference relay's: the gravest problem.
    pub fn body(&self, reader: Reader) -> Value {
        let message = |problem: &Problem| match reader {
            Reader::Public => problem.finding.message.clone(),
            Reader::Operator => problem.finding.full(),
        };
        let problems: Vec<Value> = self
            .problems
            .iter()
            .map(|problem| {
                json!({
                    "name": problem.name.as_str(),
                    "since": utc(problem.since),
                    "message": message(problem),
                    "what_to_do": problem.name.what_to_do(),
                })
            })
            .collect();
        let mut body = json!({
            "status": self.status(),
            "version": env!("CARGO_PKG_VERSION"),
            "problems": problems,
        });
        if let Some(gravest) = self.problems.first() {
            body["msg"] = message(gravest).into();
        }
        body
    }

    /// The answer of `/_health`: 503 in an outage, else 200.
    pub fn respond(&self, reader: Reader) -> Response {
        let outage = self.problems.iter().any(|it| it.name.is_outage());
        let code = if outage {
            StatusCode::SERVICE_UNAVAILABLE
        } else {
            StatusCode::OK
        };
        (code, Json(self.body(reader))).into_response()
    }
}

fn utc(time: SystemTime) -> String {
    let since = time.duration_since(UNIX_EPOCH).unwrap_or_default();
    datetime::format_utc(u64::try_from(since.as_micros()).unwrap_or(u64::MAX))
}

/// What an observation changed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Change {
    Started(Problem),
    Ended(ProblemName, Duration),
}

/// Makes problems of observations: one starts when it was seen for long enough without a break, and ends likewise.
#[derive(Debug, Default)]
pub struct Watch {
    states: [State; ProblemName::ALL.len()],
}

#[derive(Debug, Default)]
struct State {
    /// The first of the sightings without a break; kept while the problem lasts.
    seen: Option<(Instant, SystemTime)>,
    /// Since when it is no longer seen, while it lasts.
    unseen: Option<Instant>,
    /// How it was last seen, while it lasts.
    problem: Option<Finding>,
}

impl Watch {
    /// Takes what was seen of a problem at a moment, which is `time` by the clock on the wall.
    pub fn observe(
        &mut self,
        name: ProblemName,
        finding: Option<Finding>,
        now: Instant,
        time: SystemTime,
    ) -> Option<Change> {
        let traits = name.traits();
        let state = &mut self.states[name as usize];
        match finding {
            Some(finding) => {
                state.unseen = None;
                let (since, wall) = *state.seen.get_or_insert((now, time));
                let lasted = now.saturating_duration_since(since);
                if lasted < Duration::from_secs(traits.starts_after) {
                    return None;
                }
                let is_new = state.problem.replace(finding.clone()).is_none();
                is_new.then_some(Change::Started(Problem {
                    name,
                    since: wall,
                    finding,
                }))
            }
            None if state.problem.is_none() => {
                state.seen = None;
                None
            }
            None => {
                let unseen = *state.unseen.get_or_insert(now);
                if now.saturating_duration_since(unseen) < Duration::from_secs(traits.ends_after) {
                    return None;
                }
                let (since, _) = std::mem::take(state).seen?;
                Some(Change::Ended(name, unseen.saturating_duration_since(since)))
            }
        }
    }

    /// The problems there are now.
    pub fn health(&self) -> Health {
        let problem = |name: ProblemName| {
            let state = &self.states[name as usize];
            Some(Problem {
                name,
                since: state.seen?.1,
                finding: state.problem.clone()?,
            })
        };
        Health {
            problems: ProblemName::ALL.into_iter().filter_map(problem).collect(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_distinct_and_in_the_order_of_the_states() {
        for (index, name) in ProblemName::ALL.into_iter().enumerate() {
            assert_eq!(name as usize, index);
            let same = |other: &&ProblemName| other.as_str() == name.as_str();
            assert_eq!(ProblemName::ALL.iter().filter(same).count(), 1);
        }
    }

    #[test]
    fn a_problem_starts_and_ends_once_however_it_flickers() {
        let (start, wall) = (Instant::now(), SystemTime::now());
        let mut watch = Watch::default();
        let mut changes = Vec::new();
        let name = ProblemName::NoHostConnected;
        // Seen from 0 to 4 s, from 6 to 30 s but for every third second, and not after.
        for second in 0..60_u64 {
            let seen = second < 5 || (6..=30).contains(&second) && second % 3 != 2;
            let lasting = second < 5 || (6..=30).contains(&second);
            let seen = if second < 20 { lasting } else { seen };
            let at = Duration::from_secs(second);
            let finding = seen.then(|| Finding::new("none"));
            if let Some(change) = watch.observe(name, finding, start + at, wall + at) {
                changes.push((second, change));
            }
            let expected = if (16..36).contains(&second) { 1 } else { 0 };
            assert_eq!(watch.health().problems.len(), expected, "at {second} s");
        }
        let [
            (16, Change::Started(problem)),
            (36, Change::Ended(_, lasted)),
        ] = changes.as_slice()
        else {
            panic!("{changes:?}");
        };
        assert_eq!(problem.since, wall + Duration::from_secs(6));
        assert_eq!(*lasted, Duration::from_secs(25));
    }

    #[test]
    fn the_public_reads_no_causes() {
        let problem = |name, message| Problem {
            name,
            since: UNIX_EPOCH,
            finding: Finding::because(message, "a secret"),
        };
        let mut health = Health {
            problems: vec![problem(ProblemName::Drops, "most are lost")],
        };
        assert_eq!(health.status(), "degraded");
        assert_eq!(health.respond(Reader::Public).status(), StatusCode::OK);
        health
            .problems
            .insert(0, problem(ProblemName::Log, "no room"));
        let answer = health.respond(Reader::Public);
        assert_eq!(answer.status(), StatusCode::SERVICE_UNAVAILABLE);
        let body = health.body(Reader::Public);
        assert_eq!(body["status"], "error");
        assert_eq!(body["msg"], "no room");
        assert_eq!(body["problems"][1]["name"], "drops");
        assert_eq!(body["problems"][0]["since"], "1970-01-01T00:00:00.000Z");
        assert!(!body.to_string().contains("a secret"));
        assert_eq!(health.body(Reader::Operator)["msg"], "no room: a secret");
        assert_eq!(Health::default().body(Reader::Public)["status"], "ok");
    }
}
