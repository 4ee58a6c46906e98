//! DRISL-CBOR, the one way atproto writes data: a borrowed reader that accepts nothing but the canonical form,
//! and a writer that produces nothing else. No floats, no tags but CIDs, no guess at what the data means.
//!
//! Canonical: map keys are texts in the byte order of their encodings without repeats, integers and lengths take
//! the fewest bytes, nothing has indefinite length, texts are UTF-8, tag 42 holds 0x00 and a CID, and maps and
//! arrays nest at most [`MAX_NESTING`] deep. Integers run from -2^64 to 2^64-1, as CBOR heads can say; those
//! outside `i64` are read ([`Value::Unsigned`], [`Value::Negative`]) but fit no atproto field. The one IEEE number
//! that other profiles allow, the 64-bit float, atproto bans, so here it is an error.

use std::cmp::Ordering;

use super::cid::{Cid, CidError};

/// How deep maps and arrays may nest. Records in the wild stay below 20; the bound keeps recursion bounded.
pub const MAX_NESTING: usize = 64;

/// The tag of a CID (<https://dasl.ing/drisl.html>).
const CID_TAG: u64 = 42;
/// The byte before a CID's binary form: the multibase "identity" prefix.
const CID_PREFIX: u8 = 0;

const FALSE: u8 = 0xf4;
const TRUE: u8 = 0xf5;
const NULL: u8 = 0xf6;

/// Why bytes are not canonical, or not what was asked for. `at` counts bytes from the start of the input.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum CborError {
    #[error("CBOR ends in the middle of the item at byte {at}")]
    Truncated { at: usize },
    #[error("CBOR item at byte {at} claims more than the data holds")]
    Length { at: usize },
    #[error("CBOR integer or length at byte {at} is not in its shortest form")]
    NotShortest { at: usize },
    #[error("CBOR item at byte {at} has an indefinite length")]
    Indefinite { at: usize },
    #[error("CBOR at byte {at} uses a reserved encoding")]
    Reserved { at: usize },
    #[error("CBOR float at byte {at}: the AT Protocol has none")]
    Float { at: usize },
    #[error("CBOR simple value at byte {at} is not true, false or null")]
    Simple { at: usize },
    #[error("CBOR tag {tag} at byte {at}: only 42, a CID, is allowed")]
    Tag { at: usize, tag: u64 },
    #[error("CBOR link at byte {at} does not hold a byte string that starts with 0x00")]
    Link { at: usize },
    #[error("CBOR link at byte {at}: {source}")]
    Cid {
        at: usize,
        #[source]
        source: CidError,
    },
    #[error("CBOR text at byte {at} is not UTF-8")]
    Utf8 { at: usize },
    #[error("CBOR map key at byte {at} is not a text")]
    KeyType { at: usize },
    #[error("CBOR map key at byte {at} is out of order")]
    KeyOrder { at: usize },
    #[error("CBOR map key at byte {at} occurs twice")]
    DuplicateKey { at: usize },
    #[error("CBOR nests deeper than {MAX_NESTING} at byte {at}")]
    Nesting { at: usize },
    #[error("CBOR is followed by other data at byte {at}")]
    Trailing { at: usize },
    #[error("CBOR at byte {at} is not {expected}")]
    Type { at: usize, expected: Expected },
}

impl CborError {
    /// Whether the data may be canonical and merely is not what the caller asked for.
    #[must_use]
    pub const fn is_type_mismatch(&self) -> bool {
        matches!(self, Self::Type { .. })
    }
}

/// What a caller asked for and did not find.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Expected {
    Integer,
    Bytes,
    Text,
    Array,
    Map,
    Link,
    Bool,
}

impl std::fmt::Display for Expected {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Integer => "a 64-bit signed integer",
            Self::Bytes => "a byte string",
            Self::Text => "a text",
            Self::Array => "an array",
            Self::Map => "a map",
            Self::Link => "a link",
            Self::Bool => "true or false",
        })
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
enum Major {
    Unsigned = 0,
    Negative = 1,
    Bytes = 2,
    Text = 3,
    Array = 4,
    Map = 5,
    Tag = 6,
    Simple = 7,
}

impl Major {
    const fn of(first: u8) -> Self {
        match first >> 5 {
            0 => Self::Unsigned,
            1 => Self::Negative,
            2 => Self::Bytes,
            3 => Self::Text,
            4 => Self::Array,
            5 => Self::Map,
            6 => Self::Tag,
            _ => Self::Simple,
        }
    }
}

/// A cursor over canonical CBOR. What it hands out is checked; what it has not reached is not: call
/// [`Reader::finish`] at the end. After an error its position means nothing.
#[derive(Debug, Clone)]
pub struct Reader<'a> {
    bytes: &'a [u8],
    at: usize,
    nesting: usize,
}

/// Entries of a map being read: ask [`MapEntries::next_key`], then read (or skip) exactly one value.
#[derive(Debug)]
pub struct MapEntries<'a> {
    left: usize,
    inside: bool,
    previous: Option<&'a str>,
}

/// Items of an array being read: ask [`ArrayItems::next_item`], then read (or skip) exactly one value.
#[derive(Debug)]
pub struct ArrayItems {
    left: usize,
    inside: bool,
}

impl<'a> Reader<'a> {
    #[must_use]
    pub const fn new(bytes: &'a [u8]) -> Self {
        Self {
            bytes,
            at: 0,
            nesting: 0,
        }
    }

    /// Bytes read so far.
    #[inline]
    #[must_use]
    pub const fn position(&self) -> usize {
        self.at
    }

    #[inline]
    #[must_use]
    pub const fn remaining(&self) -> usize {
        self.bytes.len() - self.at
    }

    /// Asserts that nothing is left.
    ///
    /// # Errors
    /// [`CborError::Trailing`].
    pub fn finish(self) -> Result<(), CborError> {
        if self.remaining() == 0 {
            Ok(())
        } else {
            Err(CborError::Trailing { at: self.at })
        }
    }

    /// Any integer within `i64`.
    ///
    /// # Errors
    /// Not canonical, not an integer, or outside `i64`.
    #[inline]
    pub fn int(&mut self) -> Result<i64, CborError> {
        let at = self.at;
        let expected = CborError::Type {
            at,
            expected: Expected::Integer,
        };
        let (major, argument) = self.head()?;
        let magnitude = i64::try_from(argument).map_err(|_| expected)?;
        match major {
            Major::Unsigned => Ok(magnitude),
            Major::Negative => Ok(-1 - magnitude),
            _ => Err(expected),
        }
    }

    /// A byte string.
    ///
    /// # Errors
    /// Not canonical, or something else.
    #[inline]
    pub fn bytes(&mut self) -> Result<&'a [u8], CborError> {
        let length = self.head_of(Major::Bytes, Expected::Bytes)?;
        self.take(length)
    }

    /// A text.
    ///
    /// # Errors
    /// Not canonical, or something else.
    #[inline]
    pub fn text(&mut self) -> Result<&'a str, CborError> {
        let at = self.at;
        let length = self.head_of(Major::Text, Expected::Text)?;
        utf8(self.take(length)?, at)
    }

    /// `true` or `false`.
    ///
    /// # Errors
    /// Not canonical, or something else.
    #[inline]
    pub fn bool(&mut self) -> Result<bool, CborError> {
        let at = self.at;
        match (self.head()?.0, self.bytes[at]) {
            (Major::Simple, FALSE) => Ok(false),
            (Major::Simple, TRUE) => Ok(true),
            _ => Err(CborError::Type {
                at,
                expected: Expected::Bool,
            }),
        }
    }

    /// A CID link.
    ///
    /// # Errors
    /// Not canonical, or something else.
    #[inline]
    pub fn link(&mut self) -> Result<Cid, CborError> {
        let at = self.at;
        match self.head()? {
            (Major::Tag, tag) => self.link_after_tag(at, tag),
            _ => Err(CborError::Type {
                at,
                expected: Expected::Link,
            }),
        }
    }

    /// Steps over a null if one is next, and says whether it was.
    #[inline]
    pub fn null(&mut self) -> bool {
        let found = self.bytes.get(self.at) == Some(&NULL);
        self.at += usize::from(found);
        found
    }

    /// `None` for null, else what `read` reads.
    ///
    /// # Errors
    /// Those of `read`.
    #[inline]
    pub fn nullable<T>(
        &mut self,
        read: impl FnOnce(&mut Self) -> Result<T, CborError>,
    ) -> Result<Option<T>, CborError> {
        if self.null() {
            return Ok(None);
        }
        read(self).map(Some)
    }

    /// Enters a map.
    ///
    /// # Errors
    /// Not canonical, too deep, or something else.
    #[inline]
    pub fn map(&mut self) -> Result<MapEntries<'a>, CborError> {
        let at = self.at;
        match self.head()? {
            (Major::Map, length) => self.enter_map(at, length),
            _ => Err(CborError::Type {
                at,
                expected: Expected::Map,
            }),
        }
    }

    /// Enters an array.
    ///
    /// # Errors
    /// Not canonical, too deep, or something else.
    #[inline]
    pub fn array(&mut self) -> Result<ArrayItems, CborError> {
        let at = self.at;
        match self.head()? {
            (Major::Array, length) => self.enter_array(at, length),
            _ => Err(CborError::Type {
                at,
                expected: Expected::Array,
            }),
        }
    }

    /// Steps over one value of any kind, checking all of it.
    ///
    /// # Errors
    /// Not canonical.
    #[inline]
    pub fn skip(&mut self) -> Result<(), CborError> {
        let at = self.at;
        let (major, argument) = self.head()?;
        match major {
            Major::Unsigned | Major::Negative | Major::Simple => Ok(()),
            Major::Bytes => self.take(self.length(at, argument)?).map(drop),
            Major::Text => utf8(self.take(self.length(at, argument)?)?, at).map(drop),
            Major::Tag => self.link_after_tag(at, argument).map(drop),
            // Recursion here and in `value` is bounded by MAX_NESTING.
            Major::Array => {
                let mut items = self.enter_array(at, argument)?;
                while items.next_item(self) {
                    self.skip()?;
                }
                Ok(())
            }
            Major::Map => {
                let mut entries = self.enter_map(at, argument)?;
                while entries.next_key(self)?.is_some() {
                    self.skip()?;
                }
                Ok(())
            }
        }
    }

    /// Reads one value as a tree that borrows its texts and bytes.
    ///
    /// # Errors
    /// Not canonical.
    pub fn value(&mut self) -> Result<Value<'a>, CborError> {
        let at = self.at;
        let (major, argument) = self.head()?;
        Ok(match major {
            Major::Unsigned => Value::Unsigned(argument),
            Major::Negative => Value::Negative(argument),
            Major::Bytes => Value::Bytes(self.take(self.length(at, argument)?)?),
            Major::Text => Value::Text(utf8(self.take(self.length(at, argument)?)?, at)?),
            Major::Tag => Value::Link(self.link_after_tag(at, argument)?),
            Major::Simple => match self.bytes[at] {
                FALSE => Value::Bool(false),
                TRUE => Value::Bool(true),
                _ => Value::Null,
            },
            Major::Array => {
                let mut items = self.enter_array(at, argument)?;
                let mut values = Vec::new();
                while items.next_item(self) {
                    values.push(self.value()?);
                }
                Value::Array(values)
            }
            Major::Map => {
                let mut keys = self.enter_map(at, argument)?;
                let mut entries = Vec::new();
                while let Some(key) = keys.next_key(self)? {
                    entries.push((key, self.value()?));
                }
                Value::Map(entries)
            }
        })
    }

    /// The type of the next item and its argument, in shortest form.
    #[inline]
    fn head(&mut self) -> Result<(Major, u64), CborError> {
        let at = self.at;
        let first = *self.bytes.get(at).ok_or(CborError::Truncated { at })?;
        let major = Major::of(first);
        let info = first & 0x1f;
        if major == Major::Simple {
            self.at += 1;
            return match first {
                FALSE | TRUE | NULL => Ok((major, 0)),
                0xf9..=0xfb => Err(CborError::Float { at }),
                0xff => Err(CborError::Indefinite { at }),
                0xfc..=0xfe => Err(CborError::Reserved { at }),
                _ => Err(CborError::Simple { at }),
            };
        }
        if info < 24 {
            self.at += 1;
            return Ok((major, u64::from(info)));
        }
        self.long_argument(at, info)
            .map(|argument| (major, argument))
    }

    #[inline]
    fn long_argument(&mut self, at: usize, info: u8) -> Result<u64, CborError> {
        let rest = &self.bytes[at + 1..];
        let truncated = CborError::Truncated { at };
        let (argument, least, width) = match info {
            24 => {
                let byte = *rest.first().ok_or(truncated)?;
                (u64::from(byte), 24, 1)
            }
            25 => {
                let bytes = *rest.first_chunk::<2>().ok_or(truncated)?;
                (u64::from(u16::from_be_bytes(bytes)), 1 << 8, 2)
            }
            26 => {
                let bytes = *rest.first_chunk::<4>().ok_or(truncated)?;
                (u64::from(u32::from_be_bytes(bytes)), 1 << 16, 4)
            }
            27 => {
                let bytes = *rest.first_chunk::<8>().ok_or(truncated)?;
                (u64::from_be_bytes(bytes), 1 << 32, 8)
            }
            31 => return Err(CborError::Indefinite { at }),
            _ => return Err(CborError::Reserved { at }),
        };
        if argument < least {
            return Err(CborError::NotShortest { at });
        }
        self.at = at + 1 + width;
        Ok(argument)
    }

    /// A head of this type, its argument as a length that the data can hold.
    #[inline]
    fn head_of(&mut self, wanted: Major, expected: Expected) -> Result<usize, CborError> {
        let at = self.at;
        let (major, argument) = self.head()?;
        if major != wanted {
            return Err(CborError::Type { at, expected });
        }
        self.length(at, argument)
    }

    /// Every byte of a string and every item of a container takes at least one byte of what remains.
    #[inline]
    fn length(&self, at: usize, argument: u64) -> Result<usize, CborError> {
        match usize::try_from(argument) {
            Ok(length) if length <= self.remaining() => Ok(length),
            _ => Err(CborError::Length { at }),
        }
    }

    #[inline]
    fn take(&mut self, length: usize) -> Result<&'a [u8], CborError> {
        let at = self.at;
        let end = at.checked_add(length).ok_or(CborError::Length { at })?;
        let bytes = self.bytes.get(at..end).ok_or(CborError::Length { at })?;
        self.at = end;
        Ok(bytes)
    }

    #[inline]
    fn enter(&mut self, at: usize) -> Result<(), CborError> {
        if self.nesting == MAX_NESTING {
            return Err(CborError::Nesting { at });
        }
        self.nesting += 1;
        Ok(())
    }

    #[inline]
    fn enter_map(&mut self, at: usize, argument: u64) -> Result<MapEntries<'a>, CborError> {
        let left = self.length(at, argument)?;
        self.enter(at)?;
        Ok(MapEntries {
            left,
            inside: true,
            previous: None,
        })
    }

    #[inline]
    fn enter_array(&mut self, at: usize, argument: u64) -> Result<ArrayItems, CborError> {
        let left = self.length(at, argument)?;
        self.enter(at)?;
        Ok(ArrayItems { left, inside: true })
    }

    /// One level up, once for each container.
    #[inline]
    fn leave(&mut self, inside: &mut bool) {
        self.nesting -= usize::from(std::mem::take(inside));
    }

    #[inline]
    fn link_after_tag(&mut self, at: usize, tag: u64) -> Result<Cid, CborError> {
        if tag != CID_TAG {
            return Err(CborError::Tag { at, tag });
        }
        let (major, length) = self.head()?;
        if major != Major::Bytes {
            return Err(CborError::Link { at });
        }
        match self.take(self.length(at, length)?)? {
            [CID_PREFIX, cid @ ..] => {
                Cid::from_bytes(cid).map_err(|source| CborError::Cid { at, source })
            }
            _ => Err(CborError::Link { at }),
        }
    }
}

impl<'a> MapEntries<'a> {
    /// The next key, or `None` after the last entry.
    ///
    /// # Errors
    /// A key that is not a text, out of order or repeated, or not canonical.
    #[inline]
    pub fn next_key(&mut self, reader: &mut Reader<'a>) -> Result<Option<&'a str>, CborError> {
        if self.left == 0 {
            reader.leave(&mut self.inside);
            return Ok(None);
        }
        let at = reader.at;
        let key = reader.text().map_err(|error| match error {
            CborError::Type { at, .. } => CborError::KeyType { at },
            other => other,
        })?;
        if let Some(previous) = self.previous {
            match compare_keys(previous, key) {
                Ordering::Less => {}
                Ordering::Equal => return Err(CborError::DuplicateKey { at }),
                Ordering::Greater => return Err(CborError::KeyOrder { at }),
            }
        }
        self.previous = Some(key);
        self.left -= 1;
        Ok(Some(key))
    }

    /// Entries not yet asked for.
    #[must_use]
    pub const fn left(&self) -> usize {
        self.left
    }
}

impl ArrayItems {
    /// Whether another item follows.
    #[inline]
    pub fn next_item(&mut self, reader: &mut Reader<'_>) -> bool {
        if self.left == 0 {
            reader.leave(&mut self.inside);
            return false;
        }
        self.left -= 1;
        true
    }

    /// Items not yet asked for.
    #[must_use]
    pub const fn left(&self) -> usize {
        self.left
    }
}

#[inline]
fn utf8(bytes: &[u8], at: usize) -> Result<&str, CborError> {
    std::str::from_utf8(bytes).map_err(|_| CborError::Utf8 { at })
}

/// The order of keys in a map: that of their encodings, which for shortest-form texts is shorter first, then bytes.
#[inline]
#[must_use]
pub fn compare_keys(left: &str, right: &str) -> Ordering {
    left.len()
        .cmp(&right.len())
        .then_with(|| left.as_bytes().cmp(right.as_bytes()))
}

/// Checks that `bytes` are exactly one canonical value, without building it.
///
/// # Errors
/// The first departure from the canonical form.
pub fn validate(bytes: &[u8]) -> Result<(), CborError> {
    let mut reader = Reader::new(bytes);
    reader.skip()?;
    reader.finish()
}

/// A value that borrows its texts and byte strings. Read by [`Value::parse`], its maps are in canonical order; built
/// by hand they may be in any, and [`Value::to_vec`] sorts.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Value<'a> {
    Null,
    Bool(bool),
    /// 0 to 2^64-1.
    Unsigned(u64),
    /// The value is -1 minus this, as CBOR writes it: -1 to -2^64.
    Negative(u64),
    Bytes(&'a [u8]),
    Text(&'a str),
    Array(Vec<Value<'a>>),
    Map(Vec<(&'a str, Value<'a>)>),
    Link(Cid),
}

impl<'a> Value<'a> {
    /// Reads exactly one canonical value.
    ///
    /// # Errors
    /// The first departure from the canonical form.
    pub fn parse(bytes: &'a [u8]) -> Result<Self, CborError> {
        let mut reader = Reader::new(bytes);
        let value = reader.value()?;
        reader.finish()?;
        Ok(value)
    }

    /// The entry of a map; `None` also when this is no map.
    #[must_use]
    pub fn get(&self, key: &str) -> Option<&Value<'a>> {
        let Self::Map(entries) = self else {
            return None;
        };
        entries
            .iter()
            .find(|(name, _)| *name == key)
            .map(|(_, value)| value)
    }

    /// An integer that fits in `i64`.
    #[must_use]
    pub fn as_int(&self) -> Option<i64> {
        match *self {
            Self::Unsigned(number) => i64::try_from(number).ok(),
            Self::Negative(number) => i64::try_from(number).ok().map(|number| -1 - number),
            _ => None,
        }
    }

    #[must_use]
    pub fn as_text(&self) -> Option<&'a str> {
        match *self {
            Self::Text(text) => Some(text),
            _ => None,
        }
    }

    #[must_use]
    pub fn as_bytes(&self) -> Option<&'a [u8]> {
        match *self {
            Self::Bytes(bytes) => Some(bytes),
            _ => None,
        }
    }

    #[must_use]
    pub fn as_link(&self) -> Option<Cid> {
        match *self {
            Self::Link(cid) => Some(cid),
            _ => None,
        }
    }

    /// The canonical bytes. Keys are sorted; of entries with the same key the last one is kept.
    #[must_use]
    pub fn to_vec(&self) -> Vec<u8> {
        let mut writer = Writer::new();
        self.write(&mut writer);
        writer.into_vec()
    }

    fn write(&self, writer: &mut Writer) {
        match self {
            Self::Null => writer.null(),
            Self::Bool(value) => writer.bool(*value),
            Self::Unsigned(number) => writer.unsigned(*number),
            Self::Negative(number) => writer.head(Major::Negative, *number),
            Self::Bytes(bytes) => writer.bytes(bytes),
            Self::Text(text) => writer.text(text),
            Self::Link(cid) => writer.link(cid),
            Self::Array(values) => {
                writer.array_head(values.len());
                values.iter().for_each(|value| value.write(writer));
            }
            Self::Map(entries) => writer.map(|map| {
                for (key, value) in entries {
                    map.entry(key, |writer| value.write(writer));
                }
            }),
        }
    }
}

impl From<i64> for Value<'_> {
    fn from(number: i64) -> Self {
        match u64::try_from(number) {
            Ok(number) => Self::Unsigned(number),
            Err(_) => Self::Negative((-1 - number).unsigned_abs()),
        }
    }
}

/// Appends canonical CBOR. [`Writer::map`] sorts its keys; with [`Writer::map_head`] the caller promises the order
/// and the count, which is the cheap way where both are fixed.
#[derive(Debug, Default)]
pub struct Writer {
    out: Vec<u8>,
}

impl Writer {
    #[must_use]
    pub const fn new() -> Self {
        Self { out: Vec::new() }
    }

    /// With room for this many bytes.
    #[must_use]
    pub fn with_capacity(bytes: usize) -> Self {
        Self {
            out: Vec::with_capacity(bytes),
        }
    }

    #[must_use]
    pub fn into_vec(self) -> Vec<u8> {
        self.out
    }

    /// Bytes written so far.
    #[must_use]
    pub fn as_slice(&self) -> &[u8] {
        &self.out
    }

    pub fn null(&mut self) {
        self.out.push(NULL);
    }

    pub fn bool(&mut self, value: bool) {
        self.out.push(if value { TRUE } else { FALSE });
    }

    pub fn unsigned(&mut self, number: u64) {
        self.head(Major::Unsigned, number);
    }

    pub fn int(&mut self, number: i64) {
        match u64::try_from(number) {
            Ok(number) => self.head(Major::Unsigned, number),
            Err(_) => self.head(Major::Negative, (-1 - number).unsigned_abs()),
        }
    }

    pub fn bytes(&mut self, bytes: &[u8]) {
        self.head(Major::Bytes, bytes.len() as u64);
        self.out.extend_from_slice(bytes);
    }

    pub fn text(&mut self, text: &str) {
        self.head(Major::Text, text.len() as u64);
        self.out.extend_from_slice(text.as_bytes());
    }

    pub fn link(&mut self, cid: &Cid) {
        self.head(Major::Tag, CID_TAG);
        self.head(Major::Bytes, 1 + cid.as_bytes().len() as u64);
        self.out.push(CID_PREFIX);
        self.out.extend_from_slice(cid.as_bytes());
    }

    /// A link, or null.
    pub fn nullable_link(&mut self, cid: Option<&Cid>) {
        match cid {
            Some(cid) => self.link(cid),
            None => self.null(),
        }
    }

    /// Starts an array of this many items; the caller writes them.
    pub fn array_head(&mut self, items: usize) {
        self.head(Major::Array, items as u64);
    }

    /// Starts a map of this many entries; the caller writes key, value, key, value in [`compare_keys`] order.
    pub fn map_head(&mut self, entries: usize) {
        self.head(Major::Map, entries as u64);
    }

    /// A map whose entries `fill` may give in any order. Of entries with the same key the last one is kept.
    pub fn map<'k>(&mut self, fill: impl FnOnce(&mut MapWriter<'k>)) {
        let mut map = MapWriter {
            entries: Vec::new(),
        };
        fill(&mut map);
        let mut entries = map.entries;
        entries.reverse();
        entries.sort_by(|(left, _), (right, _)| compare_keys(left, right));
        entries.dedup_by(|(later, _), (kept, _)| later == kept);
        self.map_head(entries.len());
        for (key, value) in entries {
            self.text(key);
            self.out.extend_from_slice(&value);
        }
    }

    /// Appends bytes that are canonical CBOR already.
    pub fn raw(&mut self, encoded: &[u8]) {
        self.out.extend_from_slice(encoded);
    }

    #[inline]
    fn head(&mut self, major: Major, argument: u64) {
        let major = (major as u8) << 5;
        match argument {
            0..24 => self.out.push(major | argument as u8),
            24..0x100 => self.out.extend_from_slice(&[major | 24, argument as u8]),
            0x100..0x1_0000 => {
                self.out.push(major | 25);
                self.out.extend_from_slice(&(argument as u16).to_be_bytes());
            }
            0x1_0000..0x1_0000_0000 => {
                self.out.push(major | 26);
                self.out.extend_from_slice(&(argument as u32).to_be_bytes());
            }
            _ => {
                self.out.push(major | 27);
                self.out.extend_from_slice(&argument.to_be_bytes());
            }
        }
    }
}

/// The entries of one map being written by [`Writer::map`].
#[derive(Debug)]
pub struct MapWriter<'k> {
    entries: Vec<(&'k str, Vec<u8>)>,
}

impl<'k> MapWriter<'k> {
    /// Adds an entry; `write` must write exactly one value.
    pub fn entry(&mut self, key: &'k str, write: impl FnOnce(&mut Writer)) {
        let mut value = Writer::new();
        write(&mut value);
        self.entries.push((key, value.out));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::atproto::cid::Codec;
    use proptest::prelude::*;

    fn nested(depth: usize, open: &[u8], innermost: &[u8]) -> Vec<u8> {
        let mut bytes = open.repeat(depth);
        bytes.extend_from_slice(innermost);
        bytes
    }

    #[test]
    fn refuses_with_the_reason() {
        let deep = nested(MAX_NESTING + 1, b"\x81", b"\x00");
        for (bytes, error) in [
            (&b""[..], CborError::Truncated { at: 0 }),
            (b"\x18", CborError::Truncated { at: 0 }),
            (b"\x1b\x00\x00", CborError::Truncated { at: 0 }),
            (b"\x62a", CborError::Length { at: 0 }),
            (b"\x82\x00", CborError::Length { at: 0 }),
            (
                b"\x9b\xff\xff\xff\xff\xff\xff\xff\xff",
                CborError::Length { at: 0 },
            ),
            (
                b"\xbb\x7f\xff\xff\xff\xff\xff\xff\xff",
                CborError::Length { at: 0 },
            ),
            (
                b"\x5b\xff\xff\xff\xff\xff\xff\xff\xff",
                CborError::Length { at: 0 },
            ),
            (b"\x81\x18\x17", CborError::NotShortest { at: 1 }),
            (b"\x19\x00\xff", CborError::NotShortest { at: 0 }),
            (b"\x1a\x00\x00\xff\xff", CborError::NotShortest { at: 0 }),
            (
                b"\x1b\x00\x00\x00\x00\xff\xff\xff\xff",
                CborError::NotShortest { at: 0 },
            ),
            (b"\x9f\xff", CborError::Indefinite { at: 0 }),
            (b"\xff", CborError::Indefinite { at: 0 }),
            (b"\x1c", CborError::Reserved { at: 0 }),
            (b"\xfc", CborError::Reserved { at: 0 }),
            (b"\xf9\x00\x00", CborError::Float { at: 0 }),
            (
                b"\xfb\x3f\xf8\x00\x00\x00\x00\x00\x00",
                CborError::Float { at: 0 },
            ),
            (b"\xf7", CborError::Simple { at: 0 }),
            (b"\xf8\x20", CborError::Simple { at: 0 }),
            (b"\xc1\x00", CborError::Tag { at: 0, tag: 1 }),
            (b"\xd8\x2a\x60", CborError::Link { at: 0 }),
            (b"\xd8\x2a\x40", CborError::Link { at: 0 }),
            (b"\xd8\x2a\x41\x01", CborError::Link { at: 0 }),
            (
                b"\xd8\x2a\x41\x00",
                CborError::Cid {
                    at: 0,
                    source: CidError::Length { length: 0 },
                },
            ),
            (b"\x62\xc3\x28", CborError::Utf8 { at: 0 }),
            (b"\xa1\x00\x00", CborError::KeyType { at: 1 }),
            (b"\xa2\x61b\x00\x61a\x00", CborError::KeyOrder { at: 4 }),
            (b"\xa2\x62aa\x00\x61b\x00", CborError::KeyOrder { at: 5 }),
            (b"\xa2\x61a\x00\x61a\x00", CborError::DuplicateKey { at: 4 }),
            (&deep, CborError::Nesting { at: MAX_NESTING }),
            (b"\x00\x00", CborError::Trailing { at: 1 }),
        ] {
            assert_eq!(validate(bytes), Err(error), "{bytes:02x?}");
            assert_eq!(Value::parse(bytes), Err(error), "{bytes:02x?}");
        }
    }

    #[test]
    fn nesting_is_bounded_and_siblings_do_not_add_up() {
        for (open, innermost) in [(&b"\x81"[..], &b"\x80"[..]), (b"\xa1\x61a", b"\xa0")] {
            assert_eq!(validate(&nested(MAX_NESTING - 1, open, innermost)), Ok(()));
            assert!(validate(&nested(MAX_NESTING, open, innermost)).is_err());
            assert!(validate(&nested(1_000_000, open, innermost)).is_err());
        }
        let siblings = [
            &b"\x98\xc8"[..],
            &b"\x81\xa0".repeat(100),
            &b"\x80".repeat(100),
        ]
        .concat();
        assert_eq!(validate(&siblings), Ok(()));
    }

    #[test]
    fn integers_reach_as_far_as_cbor_heads() {
        for (bytes, value, int) in [
            (&b"\x17"[..], Value::Unsigned(23), Some(23)),
            (b"\x18\x18", Value::Unsigned(24), Some(24)),
            (b"\x20", Value::Negative(0), Some(-1)),
            (
                b"\x1b\x7f\xff\xff\xff\xff\xff\xff\xff",
                Value::Unsigned(i64::MAX as u64),
                Some(i64::MAX),
            ),
            (
                b"\x3b\x7f\xff\xff\xff\xff\xff\xff\xff",
                Value::Negative(i64::MAX as u64),
                Some(i64::MIN),
            ),
            (
                b"\x1b\x80\x00\x00\x00\x00\x00\x00\x00",
                Value::Unsigned(1 << 63),
                None,
            ),
            (
                b"\x3b\xff\xff\xff\xff\xff\xff\xff\xff",
                Value::Negative(u64::MAX),
                None,
            ),
        ] {
            assert_eq!(Value::parse(bytes), Ok(value.clone()));
            assert_eq!(value.to_vec(), bytes);
            assert_eq!(value.as_int(), int);
            assert_eq!(Reader::new(bytes).int().ok(), int);
        }
    }

    #[test]
    fn typed_reads_say_what_they_wanted() {
        let at = 0;
        let wanted = |expected| CborError::Type { at, expected };
        let reader = || Reader::new(b"\xf6");
        assert_eq!(reader().int(), Err(wanted(Expected::Integer)));
        assert_eq!(reader().bytes(), Err(wanted(Expected::Bytes)));
        assert_eq!(reader().text(), Err(wanted(Expected::Text)));
        assert_eq!(reader().bool(), Err(wanted(Expected::Bool)));
        assert_eq!(reader().link(), Err(wanted(Expected::Link)));
        assert_eq!(reader().map().err(), Some(wanted(Expected::Map)));
        assert_eq!(reader().array().err(), Some(wanted(Expected::Array)));
        assert_eq!(reader().nullable(Reader::text), Ok(None));
    }

    #[test]
    fn the_writer_sorts_and_keeps_the_last_of_equal_keys() {
        let mut writer = Writer::new();
        writer.map(|map| {
            map.entry("bb", |out| out.int(1));
            map.entry("c", |out| out.int(2));
            map.entry("bb", |out| out.int(3));
            map.entry("a", |out| out.int(-4));
        });
        assert_eq!(writer.into_vec(), b"\xa3\x61a\x23\x61c\x02\x62bb\x03");
    }

    /// Owned values for proptest; [`Value`] borrows.
    #[derive(Debug, Clone)]
    enum Owned {
        Int(i64),
        Wide(u64),
        Bool(bool),
        Null,
        Text(String),
        Bytes(Vec<u8>),
        Link([u8; 32]),
        Array(Vec<Owned>),
        Map(std::collections::BTreeMap<String, Owned>),
    }

    impl Owned {
        fn borrow(&self) -> Value<'_> {
            match self {
                Self::Int(number) => Value::from(*number),
                Self::Wide(number) => Value::Negative(*number),
                Self::Bool(value) => Value::Bool(*value),
                Self::Null => Value::Null,
                Self::Text(text) => Value::Text(text),
                Self::Bytes(bytes) => Value::Bytes(bytes),
                Self::Link(digest) => Value::Link(Cid::from_digest(Codec::DagCbor, *digest)),
                Self::Array(values) => Value::Array(values.iter().map(Self::borrow).collect()),
                Self::Map(entries) => {
                    let mut entries: Vec<_> = entries
                        .iter()
                        .map(|(key, value)| (key.as_str(), value.borrow()))
                        .collect();
                    entries.sort_by(|(left, _), (right, _)| compare_keys(left, right));
                    Value::Map(entries)
                }
            }
        }
    }

    fn values() -> impl Strategy<Value = Owned> {
        let leaf = prop_oneof![
            any::<i64>().prop_map(Owned::Int),
            any::<u64>().prop_map(Owned::Wide),
            any::<bool>().prop_map(Owned::Bool),
            Just(Owned::Null),
            any::<String>().prop_map(Owned::Text),
            any::<Vec<u8>>().prop_map(Owned::Bytes),
            any::<[u8; 32]>().prop_map(Owned::Link),
        ];
        leaf.prop_recursive(6, 48, 6, |inner| {
            prop_oneof![
                prop::collection::vec(inner.clone(), 0..6).prop_map(Owned::Array),
                prop::collection::btree_map(any::<String>(), inner, 0..6).prop_map(Owned::Map),
            ]
        })
    }

    proptest! {
        #[test]
        fn values_survive_writing(value in values()) {
            let value = value.borrow();
            let bytes = value.to_vec();
            prop_assert_eq!(Value::parse(&bytes), Ok(value));
            prop_assert_eq!(validate(&bytes), Ok(()));
        }

        #[test]
        fn what_is_read_was_canonical(mut bytes in any::<Vec<u8>>(), value in values(), at: prop::sample::Index, byte: u8) {
            let mut damaged = value.borrow().to_vec();
            let at = at.index(damaged.len());
            damaged[at] = byte;
            for bytes in [&mut bytes, &mut damaged] {
                let parsed = Value::parse(bytes);
                prop_assert_eq!(parsed.clone().map(drop), validate(bytes));
                if let Ok(value) = parsed {
                    prop_assert_eq!(&value.to_vec(), bytes);
                }
            }
        }
    }
}
