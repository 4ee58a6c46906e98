//! An event as a line for people or a JSON object for programs. Shows what the frame says, believes nothing.

use serde_json::{Map, Value, json};

use atproto_relay::atproto::frame::{self, Commit, Message, Op};

use super::connection::End;
use super::verdict::Verdict;
use crate::output::printable;

/// Ops that are shown on a line for people.
const OPS_SHOWN: usize = 3;

/// A frame, ready to be printed.
#[derive(Debug)]
pub struct Line {
    /// Its sequence number, where it has one.
    pub seq: Option<i64>,
    /// Whether it is an event, rather than an `#info` or something unknown.
    pub is_event: bool,
    /// What checking it gave, if it was checked.
    pub verdict: Option<Verdict>,
    text: String,
    json: Map<String, Value>,
}

impl Line {
    /// Reads a frame. A server's error frame is an end, not a line; what cannot be read is a line that says so.
    pub fn of_frame(bytes: &[u8]) -> Result<Line, End> {
        let message = match frame::decode(bytes) {
            Ok(frame) => frame.message,
            Err(error) => {
                let problem = format!("unreadable frame: {error}");
                let json = json!({ "kind": "unreadable", "bytes": bytes.len() });
                let line = Line::new(None, problem.clone(), json);
                return Ok(Line {
                    is_event: true,
                    verdict: Some(Verdict::Bad(problem)),
                    ..line
                });
            }
        };
        let size = bytes.len();
        Ok(match message {
            Message::Commit(commit) => Line::of_commit(&commit, size),
            Message::Sync(sync) => Line::event(
                (sync.seq, sync.time, "#sync", sync.did),
                format!("rev {}", sync.rev),
                json!({ "rev": sync.rev }),
                size,
            ),
            Message::Identity(identity) => Line::event(
                (identity.seq, identity.time, "#identity", identity.did),
                identity.handle.unwrap_or("").to_owned(),
                json!({ "handle": identity.handle }),
                size,
            ),
            Message::Account(account) => {
                let active = if account.active { "active" } else { "inactive" };
                let status = account
                    .status
                    .map_or(String::new(), |status| format!(" ({status})"));
                Line::event(
                    (account.seq, account.time, "#account", account.did),
                    format!("{active}{status}"),
                    json!({ "active": account.active, "status": account.status }),
                    size,
                )
            }
            Message::Info(info) => {
                let text = format!(
                    "#info {}: {}",
                    info.name,
                    info.message.unwrap_or("no message")
                );
                Line::new(
                    None,
                    text,
                    json!({ "kind": "#info", "name": info.name, "message": info.message }),
                )
            }
            Message::Error(error) => {
                return Err(End::ErrorFrame {
                    error: error.error.to_owned(),
                    message: error.message.map(str::to_owned),
                });
            }
            Message::Unknown => Line::new(
                None,
                "frame of an unknown type".to_owned(),
                json!({ "kind": "unknown", "bytes": size }),
            ),
        })
    }

    fn of_commit(commit: &Commit<'_>, size: usize) -> Line {
        let mut details = format!("rev {}", commit.rev);
        for op in commit.ops.iter().take(OPS_SHOWN) {
            details.push_str(&format!(" {} {}", op.action.as_str(), op.path));
        }
        if commit.ops.len() > OPS_SHOWN {
            details.push_str(&format!(" and {} more ops", commit.ops.len() - OPS_SHOWN));
        }
        let fields = json!({
            "rev": commit.rev,
            "since": commit.since,
            "commit": commit.commit.to_string(),
            "prevData": commit.prev_data.map(|cid| cid.to_string()),
            "ops": commit.ops.iter().map(op_json).collect::<Vec<_>>(),
        });
        Line::event(
            (commit.seq, commit.time, "#commit", commit.repo),
            details,
            fields,
            size,
        )
    }

    fn event(head: (i64, &str, &str, &str), details: String, fields: Value, size: usize) -> Line {
        let (seq, time, kind, did) = head;
        let text = format!("{seq} {time} {kind:<9} {did} {details}");
        let mut line = Line::new(
            Some(seq),
            text,
            json!({ "seq": seq, "kind": kind, "did": did, "time": time }),
        );
        if let Value::Object(fields) = fields {
            line.json.extend(fields);
        }
        line.json.insert("bytes".to_owned(), size.into());
        line.is_event = true;
        line
    }

    fn new(seq: Option<i64>, text: String, json: Value) -> Line {
        let json = match json {
            Value::Object(fields) => fields,
            other => Map::from_iter([("value".to_owned(), other)]),
        };
        Line {
            seq,
            is_event: false,
            verdict: None,
            text: printable(text.trim_end()),
            json,
        }
    }

    /// The line with what checking it gave; what could not even be read stays bad.
    pub fn with_verdict(self, verdict: Verdict) -> Line {
        Line {
            verdict: self.verdict.or(Some(verdict)),
            ..self
        }
    }

    /// For people.
    pub fn text(&self) -> String {
        match &self.verdict {
            None | Some(Verdict::NothingToCheck) => self.text.clone(),
            Some(Verdict::Good) => format!("{} [valid]", self.text),
            Some(Verdict::Bad(problem)) => {
                format!("{} [NOT VALID: {}]", self.text, printable(problem))
            }
            Some(Verdict::Unknown(problem)) => {
                format!("{} [not checked: {}]", self.text, printable(problem))
            }
        }
    }

    /// For programs.
    pub fn json(&self) -> String {
        let mut json = self.json.clone();
        let (valid, problem) = match &self.verdict {
            None | Some(Verdict::NothingToCheck) => (None, None),
            Some(Verdict::Good) => (Some(Value::Bool(true)), None),
            Some(Verdict::Bad(problem)) => (Some(Value::Bool(false)), Some(problem)),
            Some(Verdict::Unknown(problem)) => (Some(Value::Null), Some(problem)),
        };
        json.extend(valid.map(|valid| ("valid".to_owned(), valid)));
        json.extend(problem.map(|problem| ("problem".to_owned(), problem.as_str().into())));
        Value::Object(json).to_string()
    }
}

fn op_json(op: &Op<'_>) -> Value {
    json!({
        "action": op.action.as_str(),
        "path": op.path,
        "cid": op.cid.map(|cid| cid.to_string()),
        "prev": op.prev.map(|cid| cid.to_string()),
    })
}
