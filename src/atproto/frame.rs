//! Event-stream frames: what `com.atproto.sync.subscribeRepos` sends, read in place, edited without re-encoding, and
//! written. Promises canonical bytes and the fields' types; whether an event is true is for others to verify.
//!
//! A frame is a header and a body, two canonical CBOR maps and nothing after them. Fields that the lexicon requires
//! must be there with their type; unknown fields are ignored, and kept by every edit. Policy where real hosts differ
//! from the lexicon: `since`, `prevData`, a `cid` or `prev` of an op, `handle`, `status` and `message` may be null,
//! which reads as absent and stays null in the bytes; `time` is any text (hosts send it without a zone); `since` may
//! be the empty text, which reads as `Some("")`: no rev, and equal to none.

use std::ops::Range;

use super::cbor::{CborError, MapWriter, Reader, Writer, compare_keys};
use super::cid::Cid;
use super::fixed;

/// Longest frame, in bytes (<https://atproto.com/specs/event-stream>: 5 MB).
pub const MAX_FRAME_BYTES: usize = 5_000_000;
/// Longest frame that a log of an earlier version may hold: a host's longest, with a `seq` of nine bytes in place of one.
pub const MAX_STORED_FRAME_BYTES: usize = MAX_FRAME_BYTES + MAX_SEQ_BYTES - 1;
/// Longest encoded `seq` (RFC 8949 section 3: a head and eight bytes).
const MAX_SEQ_BYTES: usize = 9;
/// Longest `time` that an ended account's own word is kept of: a datetime with nanoseconds and a zone has 35.
const MAX_PLAIN_TIME_BYTES: usize = 40;

/// What the lexicon knows as `status` of an `#account` event.
const STATUS_WORDS: [&str; 6] = [
    "takendown",
    "suspended",
    "deleted",
    "deactivated",
    "desynchronized",
    "throttled",
];

/// `op` of a header before a message.
const OP_MESSAGE: i64 = 1;
/// `op` of a header before an error.
const OP_ERROR: i64 = -1;
/// Room made for ops before reading them; most commits have one.
const USUAL_OPS: usize = 4;

/// Why a frame was not read.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum FrameError {
    #[error("the frame has {length} bytes, at most {most} are allowed")]
    TooLong { length: usize, most: usize },
    #[error("the frame is not two canonical CBOR objects: {0}")]
    NotCanonical(#[from] CborError),
    #[error("the frame lacks the field {field:?}")]
    Missing { field: &'static str },
    #[error("the field {field:?} of the frame has the wrong type")]
    WrongType { field: &'static str },
    #[error("the action of an op is not create, update or delete")]
    Action,
}

impl FrameError {
    /// Whether the bytes themselves break the event-stream format, so that nothing more from this connection can be
    /// trusted. Otherwise the frame is well formed and only this message is unusable.
    #[must_use]
    pub const fn is_malformed(&self) -> bool {
        matches!(self, Self::TooLong { .. } | Self::NotCanonical(_))
    }
}

/// The kinds of events that carry a sequence number. The numbers are stored in the log's index.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[repr(u8)]
pub enum Kind {
    Commit = 1,
    Sync = 2,
    Identity = 3,
    Account = 4,
}

impl Kind {
    pub const ALL: [Self; 4] = [Self::Commit, Self::Sync, Self::Identity, Self::Account];

    /// The inverse of `kind as u8`.
    #[must_use]
    pub const fn from_u8(number: u8) -> Option<Self> {
        match number {
            1 => Some(Self::Commit),
            2 => Some(Self::Sync),
            3 => Some(Self::Identity),
            4 => Some(Self::Account),
            _ => None,
        }
    }

    /// `t` of the header: `#commit` and so on.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Commit => "#commit",
            Self::Sync => "#sync",
            Self::Identity => "#identity",
            Self::Account => "#account",
        }
    }

    /// `commit` and so on.
    #[must_use]
    pub fn name(self) -> &'static str {
        &self.as_str()[1..]
    }

    /// Its place in [`Kind::ALL`].
    #[must_use]
    pub const fn index(self) -> usize {
        self as usize - 1
    }

    /// The body's field that names the account.
    const fn did_field(self) -> &'static str {
        match self {
            Self::Commit => "repo",
            Self::Sync | Self::Identity | Self::Account => "did",
        }
    }
}

/// A frame read in place.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Frame<'a> {
    /// Where the encoded `seq` lies, for [`splice_seq`]; of events only.
    pub seq_span: Option<Range<usize>>,
    pub message: Message<'a>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Message<'a> {
    Commit(Commit<'a>),
    Sync(Sync<'a>),
    Identity(Identity<'a>),
    Account(Account<'a>),
    Info(Info<'a>),
    Error(ErrorFrame<'a>),
    /// Canonical, with an `op` or `t` that this version does not know: to be ignored.
    Unknown,
}

/// `#commit`: a change to a repository.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Commit<'a> {
    pub seq: i64,
    pub repo: &'a str,
    pub rev: &'a str,
    /// The rev before this one. Some hosts send an empty text, which stays `Some("")`.
    pub since: Option<&'a str>,
    pub commit: Cid,
    /// A CAR.
    pub blocks: &'a [u8],
    pub ops: Vec<Op<'a>>,
    /// Root of the tree before this commit.
    pub prev_data: Option<Cid>,
    pub time: &'a str,
    pub too_big: bool,
    pub rebase: bool,
}

/// What was done to one record.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Op<'a> {
    pub action: Action,
    /// Collection, slash, record key.
    pub path: &'a str,
    pub cid: Option<Cid>,
    pub prev: Option<Cid>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Action {
    Create,
    Update,
    Delete,
}

impl Action {
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Create => "create",
            Self::Update => "update",
            Self::Delete => "delete",
        }
    }

    fn parse(text: &str) -> Result<Self, FrameError> {
        match text {
            "create" => Ok(Self::Create),
            "update" => Ok(Self::Update),
            "delete" => Ok(Self::Delete),
            _ => Err(FrameError::Action),
        }
    }
}

/// `#sync`: the state of a repository, without the way to it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Sync<'a> {
    pub seq: i64,
    pub did: &'a str,
    pub rev: &'a str,
    /// A CAR with the commit.
    pub blocks: &'a [u8],
    pub time: &'a str,
}

/// `#identity`: the DID document or handle may have changed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Identity<'a> {
    pub seq: i64,
    pub did: &'a str,
    pub time: &'a str,
    pub handle: Option<&'a str>,
}

/// `#account`: what the sending host says about the account.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Account<'a> {
    pub seq: i64,
    pub did: &'a str,
    pub time: &'a str,
    pub active: bool,
    pub status: Option<&'a str>,
}

/// `#info`: word from the host about the stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Info<'a> {
    pub name: &'a str,
    pub message: Option<&'a str>,
}

/// The last frame before a host closes the stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ErrorFrame<'a> {
    pub error: &'a str,
    pub message: Option<&'a str>,
}

/// What the socket reader needs to route a frame. Ranges count bytes of the frame.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Peek {
    Event(PeekedEvent),
    /// `#info`: read it with [`decode`].
    Info,
    /// An error frame: read it with [`decode`].
    Error,
    /// To be ignored.
    Unknown,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PeekedEvent {
    pub kind: Kind,
    pub seq: i64,
    /// Where the encoded `seq` lies, for [`splice_seq`].
    pub seq_span: Range<usize>,
    /// Where the text of the DID lies, unchecked but for UTF-8.
    pub did_span: Range<usize>,
}

/// Reads a frame whole.
///
/// # Errors
/// Too long, not canonical, or a required field missing or of the wrong type. The canonical form comes first: a
/// frame that breaks it is never reported as merely lacking a field.
pub fn decode(frame: &[u8]) -> Result<Frame<'_>, FrameError> {
    canonical_first(frame, decode_in_order(frame, MAX_FRAME_BYTES))
}

/// [`decode`] for a frame of the log, which an earlier version may have let grow to [`MAX_STORED_FRAME_BYTES`].
///
/// # Errors
/// As [`decode`].
pub fn decode_stored(frame: &[u8]) -> Result<Frame<'_>, FrameError> {
    canonical_first(frame, decode_in_order(frame, MAX_STORED_FRAME_BYTES))
}

/// Checks the canonical form of a whole frame and gives what routing needs, without allocating.
///
/// # Errors
/// As [`decode`], but of the body's fields only the sequence number and the DID are looked at.
pub fn peek(frame: &[u8]) -> Result<Peek, FrameError> {
    canonical_first(frame, peek_in_order(frame, MAX_FRAME_BYTES))
}

/// [`peek`] for a frame of the log, as [`decode_stored`].
///
/// # Errors
/// As [`peek`].
pub fn peek_stored(frame: &[u8]) -> Result<Peek, FrameError> {
    canonical_first(frame, peek_in_order(frame, MAX_STORED_FRAME_BYTES))
}

/// Whether a frame of `length` bytes, whose `seq` lies at `seq_span`, stays within [`MAX_FRAME_BYTES`] with any other
/// `seq` in its place.
#[must_use]
pub fn fits_any_seq(length: usize, seq_span: &Range<usize>) -> bool {
    length - seq_span.len() + MAX_SEQ_BYTES <= MAX_FRAME_BYTES
}

/// An error about a field stops reading before the end, so what follows is still unchecked.
#[inline]
fn canonical_first<T>(frame: &[u8], outcome: Result<T, FrameError>) -> Result<T, FrameError> {
    match outcome {
        Err(error) if !error.is_malformed() => {
            let mut reader = Reader::new(frame);
            reader.skip()?;
            reader.skip()?;
            reader.finish()?;
            Err(error)
        }
        other => other,
    }
}

fn decode_in_order(frame: &[u8], most: usize) -> Result<Frame<'_>, FrameError> {
    let mut reader = start(frame, most)?;
    let decoded = match read_header(&mut reader)? {
        Header::Event(kind) => read_event(kind, &mut reader)?,
        other => {
            let message = match other {
                Header::Info => {
                    let (name, message) = read_notice(&mut reader, "name")?;
                    Message::Info(Info { name, message })
                }
                Header::Error => {
                    let (error, message) = read_notice(&mut reader, "error")?;
                    Message::Error(ErrorFrame { error, message })
                }
                Header::Event(_) | Header::Unknown => {
                    reader.skip()?;
                    Message::Unknown
                }
            };
            Frame {
                seq_span: None,
                message,
            }
        }
    };
    reader.finish()?;
    Ok(decoded)
}

fn peek_in_order(frame: &[u8], most: usize) -> Result<Peek, FrameError> {
    let mut reader = start(frame, most)?;
    let peeked = match read_header(&mut reader)? {
        Header::Event(kind) => Peek::Event(peek_event(kind, &mut reader)?),
        other => {
            reader.skip()?;
            match other {
                Header::Info => Peek::Info,
                Header::Error => Peek::Error,
                Header::Event(_) | Header::Unknown => Peek::Unknown,
            }
        }
    };
    reader.finish()?;
    Ok(peeked)
}

fn peek_event(kind: Kind, reader: &mut Reader<'_>) -> Result<PeekedEvent, FrameError> {
    let did_field = kind.did_field();
    let (mut seq, mut did_span) = (None, None);
    let mut body = field("body", reader.map())?;
    while let Some(key) = body.next_key(reader)? {
        if key == "seq" {
            seq = Some(read_seq(reader)?);
        } else if key == did_field {
            let length = field(did_field, reader.text())?.len();
            did_span = Some(reader.position() - length..reader.position());
        } else {
            reader.skip()?;
        }
    }
    let (seq, seq_span) = required("seq", seq)?;
    Ok(PeekedEvent {
        kind,
        seq,
        seq_span,
        did_span: required(did_field, did_span)?,
    })
}

fn start(frame: &[u8], most: usize) -> Result<Reader<'_>, FrameError> {
    if frame.len() > most {
        return Err(FrameError::TooLong {
            length: frame.len(),
            most,
        });
    }
    Ok(Reader::new(frame))
}

enum Header {
    Event(Kind),
    Info,
    Error,
    Unknown,
}

fn read_header(reader: &mut Reader<'_>) -> Result<Header, FrameError> {
    let (mut op, mut t) = (None, None);
    let mut entries = field("header", reader.map())?;
    while let Some(key) = entries.next_key(reader)? {
        match key {
            "op" => op = Some(field("op", reader.int())?),
            "t" => t = Some(field("t", reader.text())?),
            _ => reader.skip()?,
        }
    }
    match required("op", op)? {
        OP_MESSAGE => Ok(match required("t", t)? {
            "#commit" => Header::Event(Kind::Commit),
            "#sync" => Header::Event(Kind::Sync),
            "#identity" => Header::Event(Kind::Identity),
            "#account" => Header::Event(Kind::Account),
            "#info" => Header::Info,
            _ => Header::Unknown,
        }),
        OP_ERROR => Ok(Header::Error),
        _ => Ok(Header::Unknown),
    }
}

fn read_event<'a>(kind: Kind, reader: &mut Reader<'a>) -> Result<Frame<'a>, FrameError> {
    let (message, seq_span) = match kind {
        Kind::Commit => {
            let (commit, span) = read_commit(reader)?;
            (Message::Commit(commit), span)
        }
        Kind::Sync => {
            let (sync, span) = read_sync(reader)?;
            (Message::Sync(sync), span)
        }
        Kind::Identity => {
            let (identity, span) = read_identity(reader)?;
            (Message::Identity(identity), span)
        }
        Kind::Account => {
            let (account, span) = read_account(reader)?;
            (Message::Account(account), span)
        }
    };
    Ok(Frame {
        seq_span: Some(seq_span),
        message,
    })
}

fn read_commit<'a>(reader: &mut Reader<'a>) -> Result<(Commit<'a>, Range<usize>), FrameError> {
    let (mut seq, mut repo, mut rev, mut since, mut commit) = (None, None, None, None, None);
    let (mut blocks, mut ops, mut blobs, mut prev_data, mut time) = (None, None, None, None, None);
    let (mut too_big, mut rebase) = (None, None);
    let mut body = field("body", reader.map())?;
    while let Some(key) = body.next_key(reader)? {
        match key {
            "seq" => seq = Some(read_seq(reader)?),
            "repo" => repo = Some(field("repo", reader.text())?),
            "rev" => rev = Some(field("rev", reader.text())?),
            "since" => since = Some(field("since", reader.nullable(Reader::text))?),
            "commit" => commit = Some(field("commit", reader.link())?),
            "blocks" => blocks = Some(field("blocks", reader.bytes())?),
            "ops" => ops = Some(read_ops(reader)?),
            "blobs" => blobs = Some(skip_blobs(reader)?),
            "prevData" => prev_data = field("prevData", reader.nullable(Reader::link))?,
            "time" => time = Some(field("time", reader.text())?),
            "tooBig" => too_big = Some(field("tooBig", reader.bool())?),
            "rebase" => rebase = Some(field("rebase", reader.bool())?),
            _ => reader.skip()?,
        }
    }
    required("blobs", blobs)?;
    let (seq, span) = required("seq", seq)?;
    let commit = Commit {
        seq,
        repo: required("repo", repo)?,
        rev: required("rev", rev)?,
        since: required("since", since)?,
        commit: required("commit", commit)?,
        blocks: required("blocks", blocks)?,
        ops: required("ops", ops)?,
        prev_data,
        time: required("time", time)?,
        too_big: required("tooBig", too_big)?,
        rebase: required("rebase", rebase)?,
    };
    Ok((commit, span))
}

fn read_ops<'a>(reader: &mut Reader<'a>) -> Result<Vec<Op<'a>>, FrameError> {
    let mut items = field("ops", reader.array())?;
    let mut ops = Vec::with_capacity(items.left().min(USUAL_OPS));
    while items.next_item(reader) {
        ops.push(read_op(reader)?);
    }
    Ok(ops)
}

fn read_op<'a>(reader: &mut Reader<'a>) -> Result<Op<'a>, FrameError> {
    let (mut action, mut path, mut cid, mut prev) = (None, None, None, None);
    let mut op = field("ops", reader.map())?;
    while let Some(key) = op.next_key(reader)? {
        match key {
            "action" => action = Some(field("action", reader.text())?),
            "path" => path = Some(field("path", reader.text())?),
            "cid" => cid = Some(field("cid", reader.nullable(Reader::link))?),
            "prev" => prev = field("prev", reader.nullable(Reader::link))?,
            _ => reader.skip()?,
        }
    }
    Ok(Op {
        action: Action::parse(required("action", action)?)?,
        path: required("path", path)?,
        cid: required("cid", cid)?,
        prev,
    })
}

/// `blobs` is deprecated and carries nothing, but consumers insist on an array.
fn skip_blobs(reader: &mut Reader<'_>) -> Result<(), FrameError> {
    let mut items = field("blobs", reader.array())?;
    while items.next_item(reader) {
        reader.skip()?;
    }
    Ok(())
}

fn read_sync<'a>(reader: &mut Reader<'a>) -> Result<(Sync<'a>, Range<usize>), FrameError> {
    let (mut seq, mut did, mut rev, mut blocks, mut time) = (None, None, None, None, None);
    let mut body = field("body", reader.map())?;
    while let Some(key) = body.next_key(reader)? {
        match key {
            "seq" => seq = Some(read_seq(reader)?),
            "did" => did = Some(field("did", reader.text())?),
            "rev" => rev = Some(field("rev", reader.text())?),
            "blocks" => blocks = Some(field("blocks", reader.bytes())?),
            "time" => time = Some(field("time", reader.text())?),
            _ => reader.skip()?,
        }
    }
    let (seq, span) = required("seq", seq)?;
    let sync = Sync {
        seq,
        did: required("did", did)?,
        rev: required("rev", rev)?,
        blocks: required("blocks", blocks)?,
        time: required("time", time)?,
    };
    Ok((sync, span))
}

fn read_identity<'a>(reader: &mut Reader<'a>) -> Result<(Identity<'a>, Range<usize>), FrameError> {
    let (mut seq, mut did, mut time, mut handle) = (None, None, None, None);
    let mut body = field("body", reader.map())?;
    while let Some(key) = body.next_key(reader)? {
        match key {
            "seq" => seq = Some(read_seq(reader)?),
            "did" => did = Some(field("did", reader.text())?),
            "time" => time = Some(field("time", reader.text())?),
            "handle" => handle = field("handle", reader.nullable(Reader::text))?,
            _ => reader.skip()?,
        }
    }
    let (seq, span) = required("seq", seq)?;
    let identity = Identity {
        seq,
        did: required("did", did)?,
        time: required("time", time)?,
        handle,
    };
    Ok((identity, span))
}

fn read_account<'a>(reader: &mut Reader<'a>) -> Result<(Account<'a>, Range<usize>), FrameError> {
    let (mut seq, mut did, mut time, mut active, mut status) = (None, None, None, None, None);
    let mut body = field("body", reader.map())?;
    while let Some(key) = body.next_key(reader)? {
        match key {
            "seq" => seq = Some(read_seq(reader)?),
            "did" => did = Some(field("did", reader.text())?),
            "time" => time = Some(field("time", reader.text())?),
            "active" => active = Some(field("active", reader.bool())?),
            "status" => status = field("status", reader.nullable(Reader::text))?,
            _ => reader.skip()?,
        }
    }
    let (seq, span) = required("seq", seq)?;
    let account = Account {
        seq,
        did: required("did", did)?,
        time: required("time", time)?,
        active: required("active", active)?,
        status,
    };
    Ok((account, span))
}

/// The body of `#info` and of error frames: a name under `name_field`, perhaps a message.
fn read_notice<'a>(
    reader: &mut Reader<'a>,
    name_field: &'static str,
) -> Result<(&'a str, Option<&'a str>), FrameError> {
    let (mut name, mut message) = (None, None);
    let mut body = field("body", reader.map())?;
    while let Some(key) = body.next_key(reader)? {
        if key == name_field {
            name = Some(field(name_field, reader.text())?);
        } else if key == "message" {
            message = field("message", reader.nullable(Reader::text))?;
        } else {
            reader.skip()?;
        }
    }
    Ok((required(name_field, name)?, message))
}

#[inline]
fn read_seq(reader: &mut Reader<'_>) -> Result<(i64, Range<usize>), FrameError> {
    let from = reader.position();
    let seq = field("seq", reader.int())?;
    Ok((seq, from..reader.position()))
}

/// Says which field had the wrong type; other errors concern the frame.
#[inline]
fn field<T>(name: &'static str, read: Result<T, CborError>) -> Result<T, FrameError> {
    read.map_err(|error| {
        if error.is_type_mismatch() {
            FrameError::WrongType { field: name }
        } else {
            FrameError::NotCanonical(error)
        }
    })
}

#[inline]
fn required<T>(field: &'static str, value: Option<T>) -> Result<T, FrameError> {
    value.ok_or(FrameError::Missing { field })
}

/// Appends to `out` the frame with another `seq` in place of the bytes at `span`, which must be the span that
/// [`decode`] or [`peek`] gave for this very frame. Every other byte stays.
///
/// # Panics
/// If `span` does not lie in `frame`.
pub fn splice_seq(frame: &[u8], span: Range<usize>, seq: u64, out: &mut Vec<u8>) {
    let rest = &frame[span.end..];
    out.reserve(frame.len() + 9);
    splice_head(frame, span, seq, out);
    out.extend_from_slice(rest);
}

/// The first part of [`splice_seq`]: the frame up to and with the new `seq`. What follows are the bytes of the frame
/// behind `span`.
pub fn splice_head(frame: &[u8], span: Range<usize>, seq: u64, out: &mut Vec<u8>) {
    out.extend_from_slice(&frame[..span.start]);
    fixed::put_unsigned(out, seq);
}

/// Bytes of an unsigned integer, such as `seq`, in canonical CBOR (RFC 8949 section 4.2.1).
pub fn uint_len(value: u64) -> usize {
    match value {
        0..=23 => 1,
        24..=0xff => 2,
        0x100..=0xffff => 3,
        0x1_0000..=0xffff_ffff => 5,
        _ => 9,
    }
}

/// The frame without the `handle` of its body; everything else stays. Spans must be taken anew.
///
/// # Errors
/// Not a canonical frame with a map as its body.
pub fn without_handle(frame: &[u8]) -> Result<Vec<u8>, FrameError> {
    edit_body(frame, &[("handle", None)])
}

/// The frame with this `active` and `status` (`None` takes the field away); everything else stays. Spans must be
/// taken anew.
///
/// # Errors
/// Not a canonical frame with a map as its body.
pub fn with_account_status(
    frame: &[u8],
    active: bool,
    status: Option<&str>,
) -> Result<Vec<u8>, FrameError> {
    let mut active_value = Writer::new();
    active_value.bool(active);
    let status_value = status.map(|status| {
        let mut value = Writer::new();
        value.text(status);
        value.into_vec()
    });
    edit_body(
        frame,
        &[
            ("active", Some(active_value.as_slice())),
            ("status", status_value.as_deref()),
        ],
    )
}

/// Whether an `#account` frame carries nothing of its sender's choice: the lexicon's fields and no other, a status of the
/// lexicon's words, a time that looks like one.
#[must_use]
pub fn is_plain_account(frame: &[u8]) -> bool {
    let Ok(Message::Account(account)) = decode_stored(frame).map(|frame| frame.message) else {
        return false;
    };
    let worded = |status| STATUS_WORDS.contains(&status);
    account.status.is_none_or(worded)
        && is_plain_time(account.time)
        && encode_account(&account) == frame
}

/// The `#account` frame with this `active` and `status`, and of the others only the lexicon's fields; `now` in place of
/// a `time` that does not look like one. Spans must be taken anew.
///
/// # Errors
/// Not an `#account` frame.
pub fn plain_account(
    frame: &[u8],
    active: bool,
    status: Option<&str>,
    now: &str,
) -> Result<Vec<u8>, FrameError> {
    let Message::Account(account) = decode(frame)?.message else {
        return Err(FrameError::WrongType { field: "t" });
    };
    Ok(encode_account(&Account {
        time: plain_time(account.time, now),
        active,
        status,
        ..account
    }))
}

/// The `#identity` frame with the lexicon's fields only, as [`plain_account`].
///
/// # Errors
/// Not an `#identity` frame.
pub fn plain_identity(frame: &[u8], now: &str) -> Result<Vec<u8>, FrameError> {
    let Message::Identity(identity) = decode(frame)?.message else {
        return Err(FrameError::WrongType { field: "t" });
    };
    Ok(encode_identity(&Identity {
        time: plain_time(identity.time, now),
        ..identity
    }))
}

fn plain_time<'a>(time: &'a str, now: &'a str) -> &'a str {
    if is_plain_time(time) { time } else { now }
}

fn is_plain_time(time: &str) -> bool {
    let mut bytes = time.bytes();
    time.len() <= MAX_PLAIN_TIME_BYTES
        && bytes.all(|byte| byte.is_ascii_digit() || b"-:.+TZ".contains(&byte))
}

/// Sets (`Some`, encoded) or removes (`None`) entries of the body map, in canonical order.
fn edit_body(frame: &[u8], edits: &[(&str, Option<&[u8]>)]) -> Result<Vec<u8>, FrameError> {
    let mut reader = start(frame, MAX_FRAME_BYTES)?;
    reader.skip()?;
    let body_at = reader.position();
    let mut keys = field("body", reader.map())?;
    let mut entries: Vec<(&str, &[u8])> = Vec::new();
    while let Some(key) = keys.next_key(&mut reader)? {
        let from = reader.position();
        reader.skip()?;
        if edits.iter().all(|(edited, _)| *edited != key) {
            entries.push((key, &frame[from..reader.position()]));
        }
    }
    reader.finish()?;
    entries.extend(
        edits
            .iter()
            .filter_map(|(key, value)| value.map(|value| (*key, value))),
    );
    entries.sort_by(|(left, _), (right, _)| compare_keys(left, right));
    let mut out = Writer::with_capacity(frame.len() + 32);
    out.raw(&frame[..body_at]);
    out.map_head(entries.len());
    for (key, value) in entries {
        out.text(key);
        out.raw(value);
    }
    Ok(out.into_vec())
}

/// Writes a `#commit` frame. `blobs` is empty, `prevData` and a `prev` are left out when absent.
#[must_use]
pub fn encode_commit(commit: &Commit<'_>) -> Vec<u8> {
    encode_event(Kind::Commit, commit.blocks.len(), |body| {
        body.entry("seq", |out| out.int(commit.seq));
        body.entry("repo", |out| out.text(commit.repo));
        body.entry("rev", |out| out.text(commit.rev));
        body.entry("since", |out| match commit.since {
            Some(since) => out.text(since),
            None => out.null(),
        });
        body.entry("commit", |out| out.link(&commit.commit));
        body.entry("blocks", |out| out.bytes(commit.blocks));
        body.entry("blobs", |out| out.array_head(0));
        body.entry("ops", |out| {
            out.array_head(commit.ops.len());
            commit.ops.iter().for_each(|op| write_op(op, out));
        });
        if let Some(prev_data) = &commit.prev_data {
            body.entry("prevData", |out| out.link(prev_data));
        }
        body.entry("time", |out| out.text(commit.time));
        body.entry("tooBig", |out| out.bool(commit.too_big));
        body.entry("rebase", |out| out.bool(commit.rebase));
    })
}

fn write_op(op: &Op<'_>, out: &mut Writer) {
    out.map(|map| {
        map.entry("action", |out| out.text(op.action.as_str()));
        map.entry("path", |out| out.text(op.path));
        map.entry("cid", |out| out.nullable_link(op.cid.as_ref()));
        if let Some(prev) = &op.prev {
            map.entry("prev", |out| out.link(prev));
        }
    });
}

/// Writes a `#sync` frame.
#[must_use]
pub fn encode_sync(sync: &Sync<'_>) -> Vec<u8> {
    encode_event(Kind::Sync, sync.blocks.len(), |body| {
        body.entry("seq", |out| out.int(sync.seq));
        body.entry("did", |out| out.text(sync.did));
        body.entry("rev", |out| out.text(sync.rev));
        body.entry("blocks", |out| out.bytes(sync.blocks));
        body.entry("time", |out| out.text(sync.time));
    })
}

/// Writes an `#identity` frame; `handle` is left out when absent.
#[must_use]
pub fn encode_identity(identity: &Identity<'_>) -> Vec<u8> {
    encode_event(Kind::Identity, 0, |body| {
        body.entry("seq", |out| out.int(identity.seq));
        body.entry("did", |out| out.text(identity.did));
        body.entry("time", |out| out.text(identity.time));
        if let Some(handle) = identity.handle {
            body.entry("handle", |out| out.text(handle));
        }
    })
}

/// Writes an `#account` frame; `status` is left out when absent.
#[must_use]
pub fn encode_account(account: &Account<'_>) -> Vec<u8> {
    encode_event(Kind::Account, 0, |body| {
        body.entry("seq", |out| out.int(account.seq));
        body.entry("did", |out| out.text(account.did));
        body.entry("time", |out| out.text(account.time));
        body.entry("active", |out| out.bool(account.active));
        if let Some(status) = account.status {
            body.entry("status", |out| out.text(status));
        }
    })
}

/// Writes an `#info` frame.
#[must_use]
pub fn encode_info(name: &str, message: Option<&str>) -> Vec<u8> {
    encode_frame(OP_MESSAGE, Some("#info"), 0, |body| {
        body.entry("name", |out| out.text(name));
        if let Some(message) = message {
            body.entry("message", |out| out.text(message));
        }
    })
}

/// Writes an error frame.
#[must_use]
pub fn encode_error(error: &str, message: Option<&str>) -> Vec<u8> {
    encode_frame(OP_ERROR, None, 0, |body| {
        body.entry("error", |out| out.text(error));
        if let Some(message) = message {
            body.entry("message", |out| out.text(message));
        }
    })
}

fn encode_event<'k>(kind: Kind, blocks: usize, fill: impl FnOnce(&mut MapWriter<'k>)) -> Vec<u8> {
    encode_frame(OP_MESSAGE, Some(kind.as_str()), blocks, fill)
}

fn encode_frame<'k>(
    op: i64,
    t: Option<&str>,
    blocks: usize,
    fill: impl FnOnce(&mut MapWriter<'k>),
) -> Vec<u8> {
    let mut out = Writer::with_capacity(blocks + 512);
    out.map(|header| {
        header.entry("op", |out| out.int(op));
        if let Some(t) = t {
            header.entry("t", |out| out.text(t));
        }
    });
    out.map(fill);
    out.into_vec()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::atproto::cbor::Value;
    use crate::atproto::cid::Codec;
    use proptest::prelude::*;

    type Entries = Vec<(&'static str, Value<'static>)>;

    const DID: &str = "did:plc:asdf123";
    const TIME: &str = "2026-01-01T00:00:00Z";

    fn cid() -> Cid {
        Cid::of(Codec::DagCbor, b"x")
    }

    fn frame_of(header: Entries, body: Entries) -> Vec<u8> {
        [Value::Map(header).to_vec(), Value::Map(body).to_vec()].concat()
    }

    fn header(t: &'static str) -> Entries {
        vec![("op", Value::Unsigned(1)), ("t", Value::Text(t))]
    }

    fn op() -> Entries {
        vec![
            ("action", Value::Text("create")),
            ("path", Value::Text("a.b.c/d")),
            ("cid", Value::Link(cid())),
        ]
    }

    /// The required fields of each kind.
    fn body(kind: Kind) -> Entries {
        let mut body = vec![
            ("seq", Value::Unsigned(7)),
            (kind.did_field(), Value::Text(DID)),
            ("time", Value::Text(TIME)),
        ];
        body.extend(match kind {
            Kind::Commit => vec![
                ("rev", Value::Text("3jzfcijpj2z2a")),
                ("since", Value::Null),
                ("commit", Value::Link(cid())),
                ("blocks", Value::Bytes(b"car")),
                ("ops", Value::Array(vec![Value::Map(op())])),
                ("blobs", Value::Array(vec![])),
                ("tooBig", Value::Bool(false)),
                ("rebase", Value::Bool(false)),
            ],
            Kind::Sync => vec![
                ("rev", Value::Text("3jzfcijpj2z2a")),
                ("blocks", Value::Bytes(b"car")),
            ],
            Kind::Identity => vec![],
            Kind::Account => vec![("active", Value::Bool(true))],
        });
        body
    }

    fn with(mut entries: Entries, key: &'static str, value: Value<'static>) -> Entries {
        entries.retain(|(name, _)| *name != key);
        entries.push((key, value));
        entries
    }

    fn sample(kind: Kind) -> Vec<u8> {
        frame_of(header(kind.as_str()), body(kind))
    }

    #[test]
    fn every_required_field_is_missed_and_its_type_checked() {
        for kind in Kind::ALL {
            assert!(decode(&sample(kind)).is_ok());
            for (field, value) in body(kind) {
                let mut lacking = body(kind);
                lacking.retain(|(name, _)| *name != field);
                let lacking = frame_of(header(kind.as_str()), lacking);
                assert_eq!(decode(&lacking), Err(FrameError::Missing { field }));
                let other = match value {
                    Value::Unsigned(_) => Value::Text("x"),
                    _ => Value::Unsigned(1),
                };
                let wrong = frame_of(header(kind.as_str()), with(body(kind), field, other));
                assert_eq!(decode(&wrong), Err(FrameError::WrongType { field }));
            }
        }
    }

    #[test]
    fn every_required_field_of_an_op_is_missed_and_its_type_checked() {
        let frame = |op: Entries| {
            let ops = Value::Array(vec![Value::Map(op)]);
            frame_of(header("#commit"), with(body(Kind::Commit), "ops", ops))
        };
        for (field, _) in op() {
            let mut lacking = op();
            lacking.retain(|(name, _)| *name != field);
            let error = FrameError::Missing { field };
            assert_eq!(decode(&frame(lacking)), Err(error));
            let wrong = frame(with(op(), field, Value::Bool(true)));
            assert_eq!(decode(&wrong), Err(FrameError::WrongType { field }));
        }
        let wrong = frame(with(op(), "action", Value::Text("replace")));
        assert_eq!(decode(&wrong), Err(FrameError::Action));
    }

    #[test]
    fn null_reads_as_absent_where_hosts_send_it() {
        let nulled = |kind: Kind, field| {
            frame_of(header(kind.as_str()), with(body(kind), field, Value::Null))
        };
        let message = |frame: &[u8]| format!("{:?}", decode(frame).map(|frame| frame.message));
        for (kind, field) in [
            (Kind::Commit, "prevData"),
            (Kind::Identity, "handle"),
            (Kind::Account, "status"),
        ] {
            assert_eq!(message(&nulled(kind, field)), message(&sample(kind)));
        }
        let empty = with(body(Kind::Commit), "since", Value::Text(""));
        let frame = frame_of(header("#commit"), empty);
        let Ok(Message::Commit(commit)) = decode(&frame).map(|frame| frame.message) else {
            panic!("not a commit");
        };
        assert_eq!(commit.since, Some(""));
    }

    #[test]
    fn what_this_version_does_not_know_is_ignored() {
        let unknown = Frame {
            seq_span: None,
            message: Message::Unknown,
        };
        for header in [
            header("#later"),
            vec![("op", Value::Unsigned(2))],
            vec![("op", Value::from(-2)), ("t", Value::Text("#commit"))],
        ] {
            let frame = frame_of(header, vec![]);
            assert_eq!(decode(&frame), Ok(unknown.clone()));
            assert_eq!(peek(&frame), Ok(Peek::Unknown));
        }
    }

    #[test]
    fn headers_are_checked() {
        for (header, error) in [
            (vec![], FrameError::Missing { field: "op" }),
            (
                vec![("op", Value::Unsigned(1))],
                FrameError::Missing { field: "t" },
            ),
            (
                vec![("op", Value::Text("1"))],
                FrameError::WrongType { field: "op" },
            ),
            (
                vec![("op", Value::Unsigned(1)), ("t", Value::Null)],
                FrameError::WrongType { field: "t" },
            ),
        ] {
            let frame = frame_of(header, vec![]);
            assert_eq!(decode(&frame), Err(error));
            assert_eq!(peek(&frame).map(drop), Err(error));
        }
        let no_map = [&Value::Map(header("#sync")).to_vec()[..], b"\x80"].concat();
        assert_eq!(
            decode(&no_map),
            Err(FrameError::WrongType { field: "body" })
        );
        assert_eq!(
            decode(b"\x01\xa0"),
            Err(FrameError::WrongType { field: "header" })
        );
    }

    #[test]
    fn the_canonical_form_comes_before_the_fields() {
        let lacking = frame_of(header("#sync"), vec![]);
        let trailing = [&lacking[..], b"\xf6"].concat();
        let at = lacking.len();
        let error = FrameError::NotCanonical(CborError::Trailing { at });
        assert_eq!(decode(&trailing), Err(error));
        assert_eq!(peek(&trailing).map(drop), Err(error));
        assert!(error.is_malformed());
        let wrong = frame_of(header("#sync"), with(body(Kind::Sync), "seq", Value::Null));
        let cut = &wrong[..wrong.len() - 1];
        assert!(decode(cut).unwrap_err().is_malformed());
        assert!(!decode(&wrong).unwrap_err().is_malformed());
    }

    #[test]
    fn length_is_bounded() {
        let length = MAX_FRAME_BYTES + 1;
        let most = MAX_FRAME_BYTES;
        let error = FrameError::TooLong { length, most };
        assert_eq!(decode(&vec![0; length]), Err(error));
        assert_eq!(peek(&vec![0; length]).map(drop), Err(error));
    }

    #[test]
    fn the_log_may_hold_frames_that_grew_by_a_longer_seq() {
        for (length, fits) in [
            (MAX_STORED_FRAME_BYTES, true),
            (MAX_STORED_FRAME_BYTES + 1, false),
        ] {
            let body = |padding| {
                let body = with(body(Kind::Account), "padding", Value::Bytes(padding));
                frame_of(
                    header("#account"),
                    with(body, "seq", Value::Unsigned(1 << 40)),
                )
            };
            let least = body(&[0; 100_000]).len() - 100_000;
            let padding = vec![0; length - least];
            let frame = body(Vec::leak(padding));
            assert_eq!(frame.len(), length);
            assert_eq!(decode_stored(&frame).is_ok(), fits);
            assert_eq!(peek_stored(&frame).is_ok(), fits);
            assert!(decode(&frame).is_err() && peek(&frame).is_err());
        }
        assert!(fits_any_seq(MAX_FRAME_BYTES - 8, &(7..8)));
        assert!(!fits_any_seq(MAX_FRAME_BYTES - 7, &(7..8)));
        assert!(fits_any_seq(MAX_FRAME_BYTES, &(7..16)));
    }

    #[test]
    fn a_plain_event_carries_nothing_of_its_senders_choice() {
        let now = "2026-11-21T02:16:43.469Z";
        let deleted = |body: Entries| {
            let body = with(body, "active", Value::Bool(false));
            with(body, "status", Value::Text("deleted"))
        };
        let account = |body| frame_of(header("#account"), body);
        let plain = account(deleted(body(Kind::Account)));
        assert!(is_plain_account(&plain));
        assert!(is_plain_account(&sample(Kind::Account)));
        let strange = with(header("#account"), "x", Value::Null);
        for carrier in [
            account(with(deleted(body(Kind::Account)), "secret", Value::Null)),
            account(with(body(Kind::Account), "status", Value::Text("secret"))),
            account(with(body(Kind::Account), "status", Value::Null)),
            account(with(body(Kind::Account), "time", Value::Text("secret"))),
            account(with(
                body(Kind::Account),
                "time",
                Value::Text("2026-01-01T00:00:00.0000000000000000000000"),
            )),
            frame_of(strange, body(Kind::Account)),
        ] {
            assert!(!is_plain_account(&carrier));
            let made = plain_account(&carrier, false, Some("deleted"), now).unwrap();
            assert!(is_plain_account(&made));
            let (before, after) = (decode(&carrier).unwrap(), decode(&made).unwrap());
            let (Message::Account(before), Message::Account(after)) =
                (before.message, after.message)
            else {
                panic!("not an account");
            };
            assert_eq!((before.seq, before.did), (after.seq, after.did));
            assert!(after.time == TIME || after.time == now);
            assert_eq!((after.active, after.status), (false, Some("deleted")));
        }
        assert!(!is_plain_account(&sample(Kind::Identity)));
        let identity = with(body(Kind::Identity), "handle", Value::Text("a.example"));
        let carrier = frame_of(
            header("#identity"),
            with(identity.clone(), "x", Value::Null),
        );
        let made = plain_identity(&carrier, now).unwrap();
        assert_eq!(made, frame_of(header("#identity"), identity));
        assert!(plain_identity(&plain, now).is_err());
        assert!(plain_account(&carrier, true, None, now).is_err());
    }

    #[test]
    fn a_seq_beyond_64_bits_signed_is_refused() {
        let seq = Value::Unsigned(u64::MAX);
        let frame = frame_of(header("#sync"), with(body(Kind::Sync), "seq", seq));
        assert_eq!(decode(&frame), Err(FrameError::WrongType { field: "seq" }));
    }

    #[test]
    fn notices_survive_writing() {
        for message in [None, Some("text")] {
            let frame = encode_info("OutdatedCursor", message);
            let name = "OutdatedCursor";
            assert_eq!(
                decode(&frame).unwrap().message,
                Message::Info(Info { name, message })
            );
            assert_eq!(peek(&frame), Ok(Peek::Info));
            let frame = encode_error("FutureCursor", message);
            let error = "FutureCursor";
            let expected = Message::Error(ErrorFrame { error, message });
            assert_eq!(decode(&frame).unwrap().message, expected);
            assert_eq!(peek(&frame), Ok(Peek::Error));
        }
    }

    #[test]
    fn edits_keep_unknown_fields_and_touch_nothing_else() {
        let strange = |kind: Kind| {
            let body = with(body(kind), "unknownField", Value::Array(vec![Value::Null]));
            with(body, "zz", Value::Map(vec![("k", Value::Link(cid()))]))
        };
        let identity = strange(Kind::Identity);
        let named = with(identity.clone(), "handle", Value::Text("a.test"));
        let nulled = with(identity.clone(), "handle", Value::Null);
        let plain = frame_of(header("#identity"), identity);
        for body in [named, nulled] {
            let frame = frame_of(header("#identity"), body);
            assert_eq!(without_handle(&frame), Ok(plain.clone()));
        }
        assert_eq!(without_handle(&plain), Ok(plain.clone()));

        let account = strange(Kind::Account);
        let frame = frame_of(header("#account"), account.clone());
        let down = with(account.clone(), "active", Value::Bool(false));
        let down = with(down, "status", Value::Text("takendown"));
        let down = frame_of(header("#account"), down);
        assert_eq!(
            with_account_status(&frame, false, Some("takendown")),
            Ok(down.clone())
        );
        assert_eq!(with_account_status(&down, true, None), Ok(frame.clone()));
        assert_eq!(with_account_status(&frame, true, None), Ok(frame));
    }

    #[test]
    fn edits_refuse_what_is_no_frame() {
        for bytes in [
            &b""[..],
            b"\xa0",
            b"\xa0\x80",
            b"\xa0\xa0\x00",
            b"\xa0\xa1\x61a",
        ] {
            assert!(without_handle(bytes).is_err());
            assert!(with_account_status(bytes, true, None).is_err());
        }
    }

    #[test]
    fn kinds_keep_their_stored_numbers() {
        for (number, kind) in (1_u8..).zip(Kind::ALL) {
            assert_eq!(kind as u8, number);
            assert_eq!(Kind::from_u8(number), Some(kind));
        }
        assert_eq!((Kind::from_u8(0), Kind::from_u8(5)), (None, None));
    }

    fn cids() -> impl Strategy<Value = Cid> {
        any::<[u8; 32]>().prop_map(|digest| Cid::from_digest(Codec::DagCbor, digest))
    }

    prop_compose! {
        fn ops()(action in 0..3_usize, cid in prop::option::of(cids()), prev in prop::option::of(cids())) -> Op<'static> {
            let action = [Action::Create, Action::Update, Action::Delete][action];
            Op { action, path: "app.bsky.feed.post/3jzfcijpj2z2a", cid, prev }
        }
    }

    fn check_event(frame: &[u8], kind: Kind, message: &Message<'_>, seq: i64) {
        let decoded = decode(frame).unwrap();
        assert_eq!(&decoded.message, message);
        let Ok(Peek::Event(peeked)) = peek(frame) else {
            panic!("not an event");
        };
        assert_eq!((peeked.kind, peeked.seq), (kind, seq));
        assert_eq!(Some(&peeked.seq_span), decoded.seq_span.as_ref());
        assert_eq!(&frame[peeked.did_span], DID.as_bytes());
    }

    proptest! {
        #[test]
        fn commits_survive_writing(
            seq in 0..i64::MAX, blocks: Vec<u8>, commit in cids(), prev_data in prop::option::of(cids()),
            ops in prop::collection::vec(ops(), 0..5), since in prop::option::of("[a-z]{0,13}"), too_big: bool, rebase: bool,
        ) {
            let commit = Commit {
                seq, repo: DID, rev: "3jzfcijpj2z2a", since: since.as_deref(), commit, blocks: &blocks, ops, prev_data,
                time: TIME, too_big, rebase,
            };
            let frame = encode_commit(&commit);
            check_event(&frame, Kind::Commit, &Message::Commit(commit), seq);
        }

        #[test]
        fn other_events_survive_writing(seq: i64, blocks: Vec<u8>, text in prop::option::of(".*"), active: bool) {
            let (did, time) = (DID, TIME);
            let sync = Sync { seq, did, rev: "3jzfcijpj2z2a", blocks: &blocks, time };
            check_event(&encode_sync(&sync), Kind::Sync, &Message::Sync(sync), seq);
            let identity = Identity { seq, did, time, handle: text.as_deref() };
            check_event(&encode_identity(&identity), Kind::Identity, &Message::Identity(identity), seq);
            let account = Account { seq, did, time, active, status: text.as_deref() };
            check_event(&encode_account(&account), Kind::Account, &Message::Account(account), seq);
        }

        #[test]
        fn splicing_changes_the_seq_and_nothing_else(kind in 0..4_usize, before in 0..i64::MAX, after in 0..i64::MAX) {
            let kind = Kind::ALL[kind];
            let of = |seq: i64| frame_of(header(kind.as_str()), with(body(kind), "seq", Value::from(seq)));
            let frame = of(before);
            let span = decode(&frame).unwrap().seq_span.unwrap();
            let mut spliced = b"kept".to_vec();
            splice_seq(&frame, span, after.unsigned_abs(), &mut spliced);
            prop_assert_eq!(spliced, [&b"kept"[..], &of(after)].concat());
        }

        #[test]
        fn damaged_frames_are_refused_or_still_canonical(
            kind in 0..4_usize, at: prop::sample::Index, byte: u8, cut: prop::sample::Index, noise: Vec<u8>,
        ) {
            let mut frame = sample(Kind::ALL[kind]);
            let at = at.index(frame.len());
            frame[at] = byte;
            let cut = frame[..cut.index(frame.len())].to_vec();
            for bytes in [frame, cut, noise] {
                let mut reader = Reader::new(&bytes);
                let canonical = reader.skip().and_then(|()| reader.skip()).and_then(|()| reader.finish());
                match (decode(&bytes), peek(&bytes)) {
                    (Ok(_), peeked) => prop_assert!(canonical.is_ok() && peeked.is_ok()),
                    (Err(error), peeked) => {
                        prop_assert_eq!(error.is_malformed(), canonical.is_err());
                        prop_assert_eq!(peeked.is_err_and(|error| error.is_malformed()), canonical.is_err());
                    }
                }
                prop_assert_eq!(without_handle(&bytes).is_ok_and(|edited| decode(&edited).is_ok()), decode(&bytes).is_ok());
            }
        }
    }
}
