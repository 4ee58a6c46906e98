//! Captured traffic on disk: for each host a file of `[u32 big-endian length][frame]`, and the PLC
//! audit logs of its accounts. Reads and orders it; serves nothing.

use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};

use bytes::Bytes;

use super::audit::{Audit, AuditError};
use crate::atproto::did::Did;
use crate::atproto::frame::{self, Kind, Message};
use crate::devnet::timestamp::Timestamp;

/// File name ending of a host's captured frames.
const FRAMES: &str = "frames";
/// Folder of the audit logs inside a capture.
const PLC_FOLDER: &str = "plc";
/// File name ending of an audit log.
const AUDIT_SUFFIX: &str = ".audit.json";

/// Why a capture cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum CaptureError {
    #[error("cannot read {path}: {source}")]
    Read {
        path: PathBuf,
        source: std::io::Error,
    },
    #[error(
        "{path} is cut off at byte {offset}: a frame of {len} bytes is announced, {left} are left"
    )]
    CutOff {
        path: PathBuf,
        offset: usize,
        len: usize,
        left: usize,
    },
    #[error("{path} is not a PLC audit log: {source}")]
    Audit { path: PathBuf, source: AuditError },
    #[error("{0} holds no captured frames (files that end in .frames)")]
    Empty(PathBuf),
}

/// What a captured frame says, where it can be decoded.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct About {
    pub seq: i64,
    pub did: Did,
    pub kind: Kind,
    /// The time the host wrote into the frame.
    pub time: Option<Timestamp>,
    pub state: State,
}

/// What a frame changes in the state of its account at the host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum State {
    /// Commit or sync: the repository is at this rev.
    Rev(String),
    /// Account status.
    Account {
        active: bool,
        status: Option<String>,
    },
    /// Nothing a host answers for.
    Unchanged,
}

/// One captured frame.
#[derive(Clone, Debug)]
pub struct CapturedFrame {
    pub bytes: Bytes,
    /// `None` for frames that are no event: `#info`, error frames, malformed ones.
    pub about: Option<About>,
}

/// The stream of one host, in the order it arrived.
#[derive(Clone, Debug)]
pub struct CapturedHost {
    /// File name without its ending.
    pub name: String,
    pub frames: Vec<CapturedFrame>,
}

/// One frame's place in the order of all hosts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Moment {
    /// Index into [`Capture::hosts`].
    pub host: usize,
    /// Index into that host's frames.
    pub frame: usize,
    /// Latest time any frame up to this one carries; the documents are as of this time.
    pub time: Timestamp,
}

/// A whole capture.
#[derive(Clone, Debug)]
pub struct Capture {
    pub hosts: Vec<CapturedHost>,
    pub audits: Vec<Audit>,
}

impl Capture {
    /// Reads a folder: `*.frames`, hosts in the order of their names, and `plc/*.audit.json`.
    pub fn load(folder: &Path) -> Result<Capture, CaptureError> {
        let mut hosts = Vec::new();
        for path in files(folder)?
            .into_iter()
            .filter(|path| path.extension() == Some(OsStr::new(FRAMES)))
        {
            hosts.push(load_host(&path)?);
        }
        if hosts.is_empty() {
            return Err(CaptureError::Empty(folder.to_owned()));
        }
        let plc = folder.join(PLC_FOLDER);
        let logs = if plc.is_dir() {
            files(&plc)?
        } else {
            Vec::new()
        };
        let logs = logs
            .into_iter()
            .filter(|path| path.to_string_lossy().ends_with(AUDIT_SUFFIX));
        let audits = logs
            .map(|path| load_audit(&path))
            .collect::<Result<_, _>>()?;
        Ok(Capture { hosts, audits })
    }

    /// All frames of all hosts by time, each host's frames in their own order.
    pub fn timeline(&self) -> Vec<Moment> {
        let mut moments = Vec::new();
        for (host, captured) in self.hosts.iter().enumerate() {
            let mut time = Timestamp::from_millis(i64::MIN);
            for (frame, captured) in captured.frames.iter().enumerate() {
                time = captured
                    .about
                    .as_ref()
                    .and_then(|about| about.time)
                    .map_or(time, |at| at.max(time));
                moments.push(Moment { host, frame, time });
            }
        }
        // Stable: a host's frames keep their order where the times are equal.
        moments.sort_by_key(|moment| moment.time);
        moments
    }

    /// The endpoint that the audit logs name most often for the accounts of a host: the address
    /// it had when it was captured.
    pub fn endpoint(&self, host: usize) -> Option<String> {
        let mut votes: Vec<(String, usize)> = Vec::new();
        for about in self
            .hosts
            .get(host)?
            .frames
            .iter()
            .filter_map(|frame| frame.about.as_ref())
        {
            let audit = self
                .audits
                .iter()
                .find(|audit| audit.did() == about.did.as_str());
            let endpoint = audit
                .zip(about.time)
                .and_then(|(audit, time)| audit.endpoint_at(time));
            let Some(endpoint) = endpoint else { continue };
            match votes.iter_mut().find(|(known, _)| *known == endpoint) {
                Some((_, count)) => *count += 1,
                None => votes.push((endpoint, 1)),
            }
        }
        votes
            .into_iter()
            .max_by_key(|(_, count)| *count)
            .map(|(endpoint, _)| endpoint)
    }
}

fn files(folder: &Path) -> Result<Vec<PathBuf>, CaptureError> {
    let failed = |source| CaptureError::Read {
        path: folder.to_owned(),
        source,
    };
    let mut paths = Vec::new();
    for entry in fs::read_dir(folder).map_err(failed)? {
        paths.push(entry.map_err(failed)?.path());
    }
    paths.sort();
    Ok(paths)
}

fn read(path: &Path) -> Result<Bytes, CaptureError> {
    let bytes = fs::read(path).map_err(|source| CaptureError::Read {
        path: path.to_owned(),
        source,
    })?;
    Ok(bytes.into())
}

fn load_host(path: &Path) -> Result<CapturedHost, CaptureError> {
    let name = path
        .file_stem()
        .unwrap_or_default()
        .to_string_lossy()
        .into_owned();
    let frames = split_frames(path, &read(path)?)?;
    let frames = frames.into_iter().map(|bytes| CapturedFrame {
        about: about(&bytes),
        bytes,
    });
    Ok(CapturedHost {
        name,
        frames: frames.collect(),
    })
}

fn load_audit(path: &Path) -> Result<Audit, CaptureError> {
    Audit::parse(&read(path)?).map_err(|source| CaptureError::Audit {
        path: path.to_owned(),
        source,
    })
}

/// The frames of a file in memory; the lengths in it are believed only as far as there are bytes.
fn split_frames(path: &Path, file: &Bytes) -> Result<Vec<Bytes>, CaptureError> {
    let mut frames = Vec::new();
    let mut offset = 0;
    while offset < file.len() {
        let cut_off = |len, left| CaptureError::CutOff {
            path: path.to_owned(),
            offset,
            len,
            left,
        };
        let (word, rest) = file[offset..]
            .split_first_chunk::<4>()
            .ok_or_else(|| cut_off(4, file.len() - offset))?;
        let len = u32::from_be_bytes(*word) as usize;
        if len > rest.len() {
            return Err(cut_off(len, rest.len()));
        }
        frames.push(file.slice(offset + 4..offset + 4 + len));
        offset += 4 + len;
    }
    Ok(frames)
}

fn about(frame: &[u8]) -> Option<About> {
    let (seq, did, kind, time, state) = match frame::decode(frame).ok()?.message {
        Message::Commit(commit) => (
            commit.seq,
            commit.repo,
            Kind::Commit,
            commit.time,
            State::Rev(commit.rev.to_owned()),
        ),
        Message::Sync(sync) => (
            sync.seq,
            sync.did,
            Kind::Sync,
            sync.time,
            State::Rev(sync.rev.to_owned()),
        ),
        Message::Identity(identity) => (
            identity.seq,
            identity.did,
            Kind::Identity,
            identity.time,
            State::Unchanged,
        ),
        Message::Account(account) => {
            let state = State::Account {
                active: account.active,
                status: account.status.map(str::to_owned),
            };
            (account.seq, account.did, Kind::Account, account.time, state)
        }
        Message::Info(_) | Message::Error(_) | Message::Unknown => return None,
    };
    Some(About {
        seq,
        did: Did::parse(did).ok()?,
        kind,
        time: time.parse().ok(),
        state,
    })
}
