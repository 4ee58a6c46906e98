//! An event as a line for people or a JSON object for programs. Shows what the frame says, believes nothing.

use bytes::Bytes;
use serde_json::{Map, Value, json};

use atproto_relay::atproto::frame::{self, Commit, Message, Op};

use super::connection::End;
use super::filter::Filter;
use super::record::Records;
use super::verdict::Verdict;
use crate::output::printable;

/// Ops that are shown on a line for people.
const OPS_SHOWN: usize = 3;
/// What the lexicon calls an event: this and its kind.
const LEXICON: &str = "com.atproto.sync.subscribeRepos";
/// The kinds of frames that are no events.
const INFO: &str = "#info";
const UNKNOWN: &str = "unknown";
const UNREADABLE: &str = "unreadable";

/// A frame, to be printed.
#[derive(Debug)]
pub struct Line {
    /// `#commit` and so on.
    pub kind: &'static str,
    /// Whether it is an event, rather than an `#info` or something unknown.
    pub is_event: bool,
    /// What checking it gave, if it was checked.
    pub verdict: Option<Verdict>,
    /// What is printed is made late: a record takes more room as JSON than in its frame.
    frame: Bytes,
}

/// A frame as it was read.
#[derive(Debug)]
pub struct Seen {
    /// Its sequence number, where it has one.
    pub seq: Option<i64>,
    /// Nothing of an event that the filter holds back.
    pub line: Option<Line>,
}

impl Line {
    /// Reads a frame. A server's error frame is an end, not a line; what cannot be read is a line that says so.
    pub fn of_frame(bytes: &Bytes, filter: &Filter) -> Result<Seen, End> {
        let line = |kind, is_event, verdict| Line {
            kind,
            is_event,
            verdict,
            frame: bytes.clone(),
        };
        let message = match frame::decode(bytes) {
            Ok(frame) => frame.message,
            Err(error) => {
                let verdict = Verdict::Bad(unreadable(&error));
                let line = Some(line(UNREADABLE, true, Some(verdict)));
                return Ok(Seen { seq: None, line });
            }
        };
        let (seq, kind) = match &message {
            Message::Commit(commit) => (Some(commit.seq), "#commit"),
            Message::Sync(sync) => (Some(sync.seq), "#sync"),
            Message::Identity(identity) => (Some(identity.seq), "#identity"),
            Message::Account(account) => (Some(account.seq), "#account"),
            Message::Info(_) => (None, INFO),
            Message::Unknown => (None, UNKNOWN),
            Message::Error(error) => {
                return Err(End::ErrorFrame {
                    error: error.error.to_owned(),
                    message: error.message.map(str::to_owned),
                });
            }
        };
        let line = filter
            .admits(&message)
            .then(|| line(kind, seq.is_some(), None));
        Ok(Seen { seq, line })
    }

    /// The line with what checking it gave; what could not even be read stays bad.
    pub fn with_verdict(self, verdict: Verdict) -> Line {
        Line {
            verdict: self.verdict.or(Some(verdict)),
            ..self
        }
    }

    /// For people.
    pub fn text(&self, filter: &Filter) -> String {
        let text = match frame::decode(&self.frame) {
            Ok(frame) => text(&frame.message, filter),
            Err(error) => unreadable(&error),
        };
        let text = printable(text.trim_end());
        match &self.verdict {
            None | Some(Verdict::NothingToCheck) => text,
            Some(Verdict::Good) => format!("{text} [valid]"),
            Some(Verdict::Bad(problem)) => format!("{text} [NOT VALID: {}]", printable(problem)),
            Some(Verdict::Unknown(problem)) => {
                format!("{text} [not checked: {}]", printable(problem))
            }
        }
    }

    /// For programs.
    pub fn json(&self, filter: &Filter) -> String {
        let mut json = match frame::decode(&self.frame) {
            Ok(frame) => fields(&frame.message, filter),
            Err(_) => Map::new(),
        };
        json.insert("kind".to_owned(), self.kind.into());
        if self.kind != INFO {
            json.insert("bytes".to_owned(), self.frame.len().into());
        }
        if self.kind.starts_with('#') {
            let kind = format!("{LEXICON}{}", self.kind);
            json.insert("$type".to_owned(), kind.into());
        }
        let (valid, problem) = match &self.verdict {
            None | Some(Verdict::NothingToCheck) => (None, None),
            Some(Verdict::Good) => (Some(Value::Bool(true)), None),
            Some(Verdict::Bad(problem)) => (Some(Value::Bool(false)), Some(problem)),
            Some(Verdict::Unknown(problem)) => (Some(Value::Null), Some(problem)),
        };
        json.extend(valid.map(|valid| ("valid".to_owned(), valid)));
        json.extend(problem.map(|problem| ("problem".to_owned(), problem.as_str().into())));
        escaped(&Value::Object(json).to_string())
    }
}

fn unreadable(error: &frame::FrameError) -> String {
    format!("unreadable frame: {error}")
}

/// JSON leaves the control characters above ASCII as they are, and some terminals obey them.
fn escaped(json: &str) -> String {
    let is_plain = |c: char| !c.is_control();
    if json.chars().all(is_plain) {
        return json.to_owned();
    }
    let mut text = String::with_capacity(json.len() + 16);
    for c in json.chars() {
        match is_plain(c) {
            true => text.push(c),
            false => text.push_str(&format!("\\u{:04x}", u32::from(c))),
        }
    }
    text
}

fn text(message: &Message<'_>, filter: &Filter) -> String {
    let event = |(seq, time, did): (i64, &str, &str), kind: &str, details: String| {
        format!("{seq} {time} {kind:<9} {did} {details}")
    };
    match message {
        Message::Commit(commit) => {
            let head = (commit.seq, commit.time, commit.repo);
            event(head, "#commit", ops_text(commit, filter))
        }
        Message::Sync(sync) => {
            let head = (sync.seq, sync.time, sync.did);
            event(head, "#sync", format!("rev {}", sync.rev))
        }
        Message::Identity(identity) => {
            let head = (identity.seq, identity.time, identity.did);
            event(head, "#identity", identity.handle.unwrap_or("").to_owned())
        }
        Message::Account(account) => {
            let active = if account.active { "active" } else { "inactive" };
            let status = account
                .status
                .map_or(String::new(), |status| format!(" ({status})"));
            let head = (account.seq, account.time, account.did);
            event(head, "#account", format!("{active}{status}"))
        }
        Message::Info(info) => {
            let message = info.message.unwrap_or("no message");
            format!("#info {}: {message}", info.name)
        }
        Message::Error(_) | Message::Unknown => "frame of an unknown type".to_owned(),
    }
}

fn ops_text(commit: &Commit<'_>, filter: &Filter) -> String {
    let mut text = format!("rev {}", commit.rev);
    let ops: Vec<&Op<'_>> = shown(commit, filter).collect();
    for op in ops.iter().take(OPS_SHOWN) {
        text.push_str(&format!(" {} {}", op.action.as_str(), op.path));
    }
    match ops.len().saturating_sub(OPS_SHOWN) {
        0 => {}
        1 => text.push_str(" and 1 more op"),
        more => text.push_str(&format!(" and {more} more ops")),
    }
    text
}

fn shown<'a>(commit: &'a Commit<'a>, filter: &'a Filter) -> impl Iterator<Item = &'a Op<'a>> {
    commit.ops.iter().filter(|op| filter.admits_path(op.path))
}

fn fields(message: &Message<'_>, filter: &Filter) -> Map<String, Value> {
    let (head, fields) = match message {
        Message::Commit(commit) => {
            let mut records = Records::of(commit.blocks);
            let ops: Vec<Value> = shown(commit, filter)
                .map(|op| op_json(op, &mut records))
                .collect();
            let fields = json!({
                "repo": commit.repo,
                "rev": commit.rev,
                "since": commit.since,
                "commit": commit.commit.to_string(),
                "prevData": commit.prev_data.map(|cid| cid.to_string()),
                "ops": ops,
            });
            ((commit.seq, commit.time, commit.repo), fields)
        }
        Message::Sync(sync) => ((sync.seq, sync.time, sync.did), json!({ "rev": sync.rev })),
        Message::Identity(identity) => (
            (identity.seq, identity.time, identity.did),
            json!({ "handle": identity.handle }),
        ),
        Message::Account(account) => (
            (account.seq, account.time, account.did),
            json!({ "active": account.active, "status": account.status }),
        ),
        Message::Info(info) => {
            return object(json!({ "name": info.name, "message": info.message }));
        }
        Message::Error(_) | Message::Unknown => return Map::new(),
    };
    let (seq, time, did) = head;
    let mut all = object(json!({ "seq": seq, "time": time, "did": did }));
    all.extend(object(fields));
    all
}

fn object(value: Value) -> Map<String, Value> {
    match value {
        Value::Object(fields) => fields,
        other => Map::from_iter([("value".to_owned(), other)]),
    }
}

fn op_json(op: &Op<'_>, records: &mut Records<'_>) -> Value {
    let mut json = json!({
        "action": op.action.as_str(),
        "path": op.path,
        "cid": op.cid.map(|cid| cid.to_string()),
        "prev": op.prev.map(|cid| cid.to_string()),
    });
    match op.cid.map(|cid| records.get(&cid)) {
        Some(Ok(record)) => json["record"] = record,
        Some(Err(problem)) => {
            json["record"] = Value::Null;
            json["recordProblem"] = problem.into();
        }
        None => {}
    }
    json
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn json_of_strangers_cannot_drive_the_terminal() {
        let json = escaped(&json!({ "handle": "a\u{1b}[2J\u{9b}2J\u{7f}b" }).to_string());
        assert!(!json.chars().any(char::is_control), "{json}");
        let read: Value = serde_json::from_str(&json).unwrap();
        assert_eq!(read["handle"], "a\u{1b}[2J\u{9b}2J\u{7f}b");
    }
}
