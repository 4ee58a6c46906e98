//! CAR version 1 over a slice: the roots and the blocks, in order and by CID, without copying. A block's bytes are
//! only claimed to hash to its CID until [`Car::verify_hashes`] has said so. Whole repositories as streams are not
//! this file's business.

use super::cbor::{CborError, Reader, Writer};
use super::cid::{CID_BYTES, Cid, CidError};

/// The version this file reads and writes (<https://ipld.io/specs/transport/car/carv1/>).
const VERSION: i64 = 1;
/// Bytes of the longest varint that a length fits in.
const MAX_VARINT_BYTES: usize = 10;
/// Up to this many blocks a walk over them is quicker than a sorted index.
const WALKED_BLOCKS: usize = 8;

/// Why bytes are not a CAR of the accepted kind. `at` counts bytes from its start.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum CarError {
    #[error("the CAR ends in the middle of the section at byte {at}")]
    Truncated { at: usize },
    #[error("the length at byte {at} of the CAR is not a shortest-form varint")]
    Varint { at: usize },
    #[error("the header of the CAR: {0}")]
    Header(#[from] CborError),
    #[error("the header of the CAR lacks {field:?}")]
    HeaderField { field: &'static str },
    #[error("only CAR version {VERSION} is accepted, not {version}")]
    Version { version: i64 },
    #[error("the CID of the CAR's block at byte {at}: {source}")]
    Cid {
        at: usize,
        #[source]
        source: CidError,
    },
    #[error("the bytes of block {cid} do not hash to its CID")]
    Hash { cid: Cid },
    #[error("the CAR has more than {most} blocks")]
    TooManyBlocks { most: usize },
}

/// A CAR read in place.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Car<'a> {
    roots: Vec<Cid>,
    blocks: BlockMap<'a>,
}

impl<'a> Car<'a> {
    /// Reads all of `bytes`. An empty section, which some readers take for the end, is an error.
    ///
    /// # Errors
    /// Any departure from CAR version 1, a header that is not canonical CBOR, or a CID of another kind.
    pub fn parse(bytes: &'a [u8]) -> Result<Self, CarError> {
        Self::parse_within(bytes, usize::MAX)
    }

    /// As [`Car::parse`], and stops where there are more blocks than `most`: they are not even sorted.
    ///
    /// # Errors
    /// As [`Car::parse`], and [`CarError::TooManyBlocks`].
    pub fn parse_within(bytes: &'a [u8], most: usize) -> Result<Self, CarError> {
        let mut sections = Sections { bytes, at: 0 };
        let (_, header) = sections.next()?.ok_or(CarError::Truncated { at: 0 })?;
        let roots = read_header(header)?;
        let mut blocks = Vec::new();
        while let Some((at, section)) = sections.next()? {
            if blocks.len() == most {
                return Err(CarError::TooManyBlocks { most });
            }
            blocks.push(Cid::split_from(section).map_err(|source| CarError::Cid { at, source })?);
        }
        Ok(Self {
            roots,
            blocks: BlockMap::new(blocks),
        })
    }

    /// The roots, in the header's order; there may be none.
    #[must_use]
    pub fn roots(&self) -> &[Cid] {
        &self.roots
    }

    #[must_use]
    pub const fn blocks(&self) -> &BlockMap<'a> {
        &self.blocks
    }

    /// Hashes every block.
    ///
    /// # Errors
    /// The first block that is not what its CID says.
    pub fn verify_hashes(&self) -> Result<(), CarError> {
        match self.blocks.iter().find(|(cid, data)| !cid.matches(data)) {
            Some((cid, _)) => Err(CarError::Hash { cid }),
            None => Ok(()),
        }
    }
}

/// Blocks in the order they came, found by CID. A CID that occurs twice gives its first block.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct BlockMap<'a> {
    blocks: Vec<(Cid, &'a [u8])>,
    /// Positions in `blocks` sorted by CID; empty where there are few. Sorted rather than hashed: unverified CIDs
    /// are the sender's choice, and no choice of them makes this slow.
    sorted: Vec<u32>,
}

impl<'a> BlockMap<'a> {
    /// Takes blocks in their order.
    #[must_use]
    pub fn new(blocks: Vec<(Cid, &'a [u8])>) -> Self {
        let mut sorted = Vec::new();
        // More than u32::MAX blocks would be over 150 GB of CIDs: such a map is walked.
        if let (true, Ok(count)) = (blocks.len() > WALKED_BLOCKS, u32::try_from(blocks.len())) {
            sorted = (0..count).collect();
            sorted.sort_unstable_by_key(|&position| (blocks[position as usize].0, position));
        }
        Self { blocks, sorted }
    }

    #[must_use]
    pub fn get(&self, cid: &Cid) -> Option<&'a [u8]> {
        if self.sorted.is_empty() {
            let (_, data) = self.blocks.iter().find(|(other, _)| other == cid)?;
            return Some(data);
        }
        let cid_at = |position: u32| &self.blocks[position as usize].0;
        let first = self
            .sorted
            .partition_point(|&position| cid_at(position) < cid);
        let &position = self.sorted.get(first)?;
        (cid_at(position) == cid).then(|| self.blocks[position as usize].1)
    }

    #[must_use]
    pub fn contains(&self, cid: &Cid) -> bool {
        self.get(cid).is_some()
    }

    /// Blocks in the order they came.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = (Cid, &'a [u8])> + '_ {
        self.blocks.iter().copied()
    }

    #[must_use]
    pub fn len(&self) -> usize {
        self.blocks.len()
    }

    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.blocks.is_empty()
    }
}

/// Writes a CAR with these roots and blocks, in the order given. The blocks' hashes are the caller's word.
#[must_use]
pub fn write<'a>(roots: &[Cid], blocks: impl IntoIterator<Item = (Cid, &'a [u8])>) -> Vec<u8> {
    let mut header = Writer::with_capacity(32 + roots.len() * (CID_BYTES + 5));
    header.map_head(2);
    header.text("roots");
    header.array_head(roots.len());
    roots.iter().for_each(|root| header.link(root));
    header.text("version");
    header.int(VERSION);
    let mut out = Vec::new();
    write_varint(header.as_slice().len(), &mut out);
    out.extend_from_slice(header.as_slice());
    for (cid, data) in blocks {
        write_block(&cid, data, &mut out);
    }
    out
}

/// Appends one block's section.
pub fn write_block(cid: &Cid, data: &[u8], out: &mut Vec<u8>) {
    write_varint(CID_BYTES + data.len(), out);
    out.extend_from_slice(cid.as_bytes());
    out.extend_from_slice(data);
}

fn read_header(header: &[u8]) -> Result<Vec<Cid>, CarError> {
    let mut reader = Reader::new(header);
    let (mut version, mut roots) = (None, None);
    let mut entries = reader.map()?;
    while let Some(key) = entries.next_key(&mut reader)? {
        match key {
            "version" => version = Some(reader.int()?),
            "roots" => {
                let mut links = Vec::new();
                let mut items = reader.array()?;
                while items.next_item(&mut reader) {
                    links.push(reader.link()?);
                }
                roots = Some(links);
            }
            _ => reader.skip()?,
        }
    }
    reader.finish()?;
    match version.ok_or(CarError::HeaderField { field: "version" })? {
        VERSION => roots.ok_or(CarError::HeaderField { field: "roots" }),
        version => Err(CarError::Version { version }),
    }
}

/// Length-prefixed sections, one after the other.
struct Sections<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Sections<'a> {
    /// The next section and where it starts; `None` at the end.
    #[inline]
    fn next(&mut self) -> Result<Option<(usize, &'a [u8])>, CarError> {
        let at = self.at;
        if at == self.bytes.len() {
            return Ok(None);
        }
        let (length, width) = read_varint(&self.bytes[at..], at)?;
        let from = at + width;
        let end = from.checked_add(length).ok_or(CarError::Truncated { at })?;
        let section = self
            .bytes
            .get(from..end)
            .ok_or(CarError::Truncated { at })?;
        self.at = end;
        Ok(Some((at, section)))
    }
}

/// A shortest-form unsigned varint and how many bytes it takes.
#[inline]
fn read_varint(bytes: &[u8], at: usize) -> Result<(usize, usize), CarError> {
    let mut number = 0_u64;
    for (index, &byte) in bytes.iter().take(MAX_VARINT_BYTES).enumerate() {
        let group = u64::from(byte & 0x7f);
        let shift = 7 * index as u32;
        if group << shift >> shift != group {
            return Err(CarError::Varint { at });
        }
        number |= group << shift;
        if byte & 0x80 == 0 {
            if byte == 0 && index > 0 {
                return Err(CarError::Varint { at });
            }
            let length = usize::try_from(number).map_err(|_| CarError::Truncated { at })?;
            return Ok((length, index + 1));
        }
    }
    if bytes.len() < MAX_VARINT_BYTES {
        return Err(CarError::Truncated { at });
    }
    Err(CarError::Varint { at })
}

fn write_varint(length: usize, out: &mut Vec<u8>) {
    let mut rest = length;
    while rest >= 0x80 {
        out.push((rest & 0x7f) as u8 | 0x80);
        rest >>= 7;
    }
    out.push(rest as u8);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::atproto::cid::Codec;
    use proptest::prelude::*;

    fn one_block() -> (Cid, Vec<u8>) {
        let cid = Cid::of(Codec::Raw, b"data");
        (cid, write(&[cid], [(cid, &b"data"[..])]))
    }

    #[test]
    fn gives_roots_and_blocks_in_order_and_by_cid() {
        let data: Vec<Vec<u8>> = (0..40_u8).map(|number| vec![number; 300]).collect();
        let blocks: Vec<(Cid, &[u8])> = data
            .iter()
            .map(|data| (Cid::of(Codec::Raw, data), &data[..]))
            .collect();
        for count in [0, 1, WALKED_BLOCKS, WALKED_BLOCKS + 1, 40] {
            let roots: Vec<Cid> = blocks[..count.min(2)].iter().map(|(cid, _)| *cid).collect();
            let bytes = write(&roots, blocks[..count].iter().copied());
            let car = Car::parse(&bytes).unwrap();
            assert_eq!(car.roots(), roots);
            assert!(car.blocks().iter().eq(blocks[..count].iter().copied()));
            for (position, (cid, data)) in blocks.iter().enumerate() {
                assert_eq!(car.blocks().get(cid), (position < count).then_some(*data));
            }
            assert_eq!(car.verify_hashes(), Ok(()));
        }
    }

    #[test]
    fn a_repeated_cid_gives_its_first_block_and_every_copy_is_hashed() {
        let cid = Cid::of(Codec::Raw, b"data");
        for copies in [2, 20] {
            let mut blocks = vec![(cid, &b"data"[..])];
            blocks.resize(copies, (cid, b"forged"));
            let bytes = write(&[], blocks);
            let car = Car::parse(&bytes).unwrap();
            assert_eq!(car.blocks().get(&cid), Some(&b"data"[..]));
            assert_eq!(car.verify_hashes(), Err(CarError::Hash { cid }));
        }
    }

    #[test]
    fn refuses_with_the_reason() {
        let (_, good) = one_block();
        let with = |suffix: &[u8]| [&good[..], suffix].concat();
        let end = good.len();
        let header = |text: &[u8]| [&[text.len() as u8][..], text].concat();
        let short = CidError::Length { length: 0 };
        for (bytes, error) in [
            (vec![], CarError::Truncated { at: 0 }),
            (vec![0x80], CarError::Truncated { at: 0 }),
            (vec![0x80, 0x00], CarError::Varint { at: 0 }),
            (vec![0xff; 10], CarError::Varint { at: 0 }),
            (vec![0xff; 30], CarError::Varint { at: 0 }),
            (
                [&[0xff; 9][..], &[0x01]].concat(),
                CarError::Truncated { at: 0 },
            ),
            (vec![0x05, 0xa0], CarError::Truncated { at: 0 }),
            (header(b"\xa0"), CarError::HeaderField { field: "version" }),
            (
                header(b"\xa1\x67version\x01"),
                CarError::HeaderField { field: "roots" },
            ),
            (
                header(b"\xa2\x65roots\x80\x67version\x02"),
                CarError::Version { version: 2 },
            ),
            (
                header(b"\xa2\x67version\x01\x65roots\x80"),
                CarError::Header(CborError::KeyOrder { at: 10 }),
            ),
            (
                with(&[0x00]),
                CarError::Cid {
                    at: end,
                    source: short,
                },
            ),
            (with(&[0x02, 0x01]), CarError::Truncated { at: end }),
            (good[..end - 1].to_vec(), CarError::Truncated { at: 59 }),
        ] {
            assert_eq!(Car::parse(&bytes), Err(error), "{bytes:02x?}");
        }
    }

    #[test]
    fn a_flipped_bit_in_a_block_is_found() {
        let (cid, mut bytes) = one_block();
        *bytes.last_mut().unwrap() ^= 1;
        let car = Car::parse(&bytes).unwrap();
        assert_eq!(car.verify_hashes(), Err(CarError::Hash { cid }));
    }

    proptest! {
        #[test]
        fn lengths_survive_writing(length: usize) {
            let mut bytes = Vec::new();
            write_varint(length, &mut bytes);
            prop_assert_eq!(read_varint(&bytes, 0), Ok((length, bytes.len())));
        }

        #[test]
        fn any_bytes_are_read_or_refused(bytes: Vec<u8>) {
            let _ = Car::parse(&bytes);
        }

        #[test]
        fn damaged_cars_are_read_or_refused(at: prop::sample::Index, byte: u8, cut: prop::sample::Index) {
            let (_, mut bytes) = one_block();
            let at = at.index(bytes.len());
            bytes[at] = byte;
            let _ = Car::parse(&bytes);
            bytes.truncate(cut.index(bytes.len()));
            let _ = Car::parse(&bytes);
        }
    }
}
