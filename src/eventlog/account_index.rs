//! The account index of an ended segment: where in it an account's events are, so that a redaction reads those and no
//! others. Promises that damage is seen; what is missing or damaged is made anew from the segment's index, which alone
//! is the truth.
//!
//! `<first>.acc` is a header of 32 bytes (magic, first sequence number, number of events, number of buckets, CRC-32 of
//! the header before it and of the table), a table with 8 bytes for every bucket (the number of records up to its end,
//! the CRC-32 of its records), and 8 bytes for every event: its place in the segment and, above it, the upper half of
//! its DID's hash, sorted. A bucket holds the records whose hashes begin with the same bits, 256 of them on average:
//! an account is found with two reads of 2 KB, whatever the segment's size. All numbers are little-endian.

use std::fs::{self, File};
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

const MAGIC: [u8; 8] = *b"ATRELAC\x01";
const HEADER_BYTES: u64 = 32;
const CRC_AT: usize = 28;
const TABLE_ENTRY_BYTES: u64 = 8;
const RECORD_BYTES: u64 = 8;
/// Records that a bucket has on average, if accounts are not chosen for their hashes.
const RECORDS_PER_BUCKET: u64 = 256;
/// Most events of a segment that has an account index: what it takes to make one, or to keep one of the segment that is
/// written to, stays within some 50 MB. A segment of 128 MiB holds a fifth of that at most. Redactions read the whole
/// index of larger ones.
pub(super) const MAX_EVENTS: u64 = 4 << 20;

/// Path of the account index of the segment that begins at `first`.
pub(super) fn path(dir: &Path, first: u64) -> PathBuf {
    dir.join(format!("{first:020}.acc"))
}

/// What is kept of a `Did::hash64`: another account has the same once in four billion times, and costs a look at its
/// event's entry.
pub(super) fn short_hash(did_hash: u64) -> u32 {
    (did_hash >> 32) as u32
}

/// Writes the account index of a segment whose events are, in order, of accounts with these hashes. It is not synced:
/// what a crash leaves of it is seen to be damaged.
pub(super) fn write(dir: &Path, first: u64, hashes: &[u32]) -> io::Result<()> {
    let target = path(dir, first);
    let fresh = target.with_extension("acc.new");
    fs::write(&fresh, encode(first, hashes))?;
    fs::rename(&fresh, &target)
}

/// False where a segment has an account index, and it is not that of events with these hashes.
pub(super) fn fits(dir: &Path, first: u64, hashes: impl Iterator<Item = u32>) -> io::Result<bool> {
    match fs::read(path(dir, first)) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(true),
        found => Ok(found? == encode(first, &hashes.collect::<Vec<_>>())),
    }
}

fn encode(first: u64, hashes: &[u32]) -> Vec<u8> {
    let mut records: Vec<u64> = hashes.iter().zip(0..).map(record).collect();
    records.sort_unstable();
    let buckets = (records.len() as u64 / RECORDS_PER_BUCKET)
        .next_power_of_two()
        .max(1);
    let mut table = Vec::with_capacity((buckets * TABLE_ENTRY_BYTES) as usize);
    let mut bytes = Vec::with_capacity(records.len() * RECORD_BYTES as usize);
    let mut begin = 0;
    for bucket in 0..buckets {
        let begun = bytes.len();
        let rest = &records[begin..];
        let count = rest.partition_point(|it| bucket_of((it >> 32) as u32, buckets) <= bucket);
        let held = rest[..count].iter();
        held.for_each(|record| bytes.extend_from_slice(&record.to_le_bytes()));
        begin += count;
        table.extend_from_slice(&(begin as u32).to_le_bytes());
        table.extend_from_slice(&crc32fast::hash(&bytes[begun..]).to_le_bytes());
    }
    let header = header(first, records.len() as u64, buckets, &table);
    [&header[..], &table, &bytes].concat()
}

/// Removes the account index of a segment, where there is one.
pub(super) fn remove(dir: &Path, first: u64) -> io::Result<()> {
    match fs::remove_file(path(dir, first)) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

/// Removes what was half written of the account index of a segment, and all of it where that segment is not there.
pub(super) fn remove_leftovers(dir: &Path, first: u64, is_there: bool) -> io::Result<()> {
    match fs::remove_file(path(dir, first).with_extension("acc.new")) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ if is_there => Ok(()),
        _ => remove(dir, first),
    }
}

/// Places, ascending, of the events in a segment of `events` events that may be of accounts with these hashes, which are
/// sorted. `None` where the account index is missing or damaged.
pub(super) fn find(
    dir: &Path,
    first: u64,
    events: u64,
    hashes: &[u32],
) -> io::Result<Option<Vec<u64>>> {
    let file = match File::open(path(dir, first)) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        other => other?,
    };
    let Some(index) = Index::open(file, first, events)? else {
        return Ok(None);
    };
    let mut places = Vec::new();
    for wanted in hashes.chunk_by(|left, right| index.bucket(*left) == index.bucket(*right)) {
        let Some(records) = index.records(index.bucket(wanted[0]))? else {
            return Ok(None);
        };
        for hash in wanted {
            let from = records.partition_point(|record| *record < u64::from(*hash) << 32);
            let of_account = records[from..]
                .iter()
                .take_while(|it| *it >> 32 == u64::from(*hash));
            places.extend(of_account.map(|record| record & u64::from(u32::MAX)));
        }
    }
    places.sort_unstable();
    Ok(Some(places))
}

fn record((hash, place): (&u32, u64)) -> u64 {
    u64::from(*hash) << 32 | place
}

/// The number of the bucket that holds a hash, of a power of two of them.
fn bucket_of(hash: u32, buckets: u64) -> u64 {
    (u64::from(hash) * buckets) >> 32
}

fn header(first: u64, events: u64, buckets: u64, table: &[u8]) -> [u8; HEADER_BYTES as usize] {
    let mut out = [0; HEADER_BYTES as usize];
    out[..8].copy_from_slice(&MAGIC);
    out[8..16].copy_from_slice(&first.to_le_bytes());
    out[16..24].copy_from_slice(&events.to_le_bytes());
    out[24..CRC_AT].copy_from_slice(&(buckets as u32).to_le_bytes());
    let mut crc = crc32fast::Hasher::new();
    crc.update(&out[..CRC_AT]);
    crc.update(table);
    out[CRC_AT..].copy_from_slice(&crc.finalize().to_le_bytes());
    out
}

/// An account index whose header and table are sound.
struct Index {
    file: File,
    /// Of each bucket, where it ends and its checksum.
    table: Vec<(u64, u32)>,
}

impl Index {
    fn open(file: File, first: u64, events: u64) -> io::Result<Option<Index>> {
        let mut found = [0; HEADER_BYTES as usize];
        let length = file.metadata()?.len();
        if length < HEADER_BYTES {
            return Ok(None);
        }
        file.read_exact_at(&mut found, 0)?;
        let buckets = u64::from(u32_at(&found, 24));
        // Before any allocation: the file must be as long as its header claims.
        if length != HEADER_BYTES + buckets * TABLE_ENTRY_BYTES + events * RECORD_BYTES {
            return Ok(None);
        }
        let mut table = vec![0; (buckets * TABLE_ENTRY_BYTES) as usize];
        file.read_exact_at(&mut table, HEADER_BYTES)?;
        if found != header(first, events, buckets, &table) {
            return Ok(None);
        }
        let (pairs, _) = table.as_chunks::<{ TABLE_ENTRY_BYTES as usize }>();
        let table: Vec<_> = pairs
            .iter()
            .map(|pair| (u64::from(u32_at(pair, 0)), u32_at(pair, 4)))
            .collect();
        let is_sound = buckets.is_power_of_two()
            && table.is_sorted_by_key(|(end, _)| *end)
            && table.last().is_some_and(|(end, _)| *end == events);
        Ok(is_sound.then_some(Index { file, table }))
    }

    fn bucket(&self, hash: u32) -> usize {
        bucket_of(hash, self.table.len() as u64) as usize
    }

    fn range(&self, bucket: usize) -> Range<u64> {
        let begin = bucket
            .checked_sub(1)
            .map_or(0, |before| self.table[before].0);
        begin..self.table[bucket].0
    }

    /// The records of a bucket; `None` where they are damaged.
    fn records(&self, bucket: usize) -> io::Result<Option<Vec<u64>>> {
        let Range { start, end } = self.range(bucket);
        let mut bytes = vec![0; ((end - start) * RECORD_BYTES) as usize];
        let at = HEADER_BYTES + self.table.len() as u64 * TABLE_ENTRY_BYTES + start * RECORD_BYTES;
        self.file.read_exact_at(&mut bytes, at)?;
        if crc32fast::hash(&bytes) != self.table[bucket].1 {
            return Ok(None);
        }
        let (records, _) = bytes.as_chunks();
        Ok(Some(
            records.iter().copied().map(u64::from_le_bytes).collect(),
        ))
    }
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    let mut word = [0; 4];
    word.copy_from_slice(&bytes[at..at + 4]);
    u32::from_le_bytes(word)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_account_is_found_where_it_is() {
        let folder = tempfile::tempdir().unwrap();
        let mut dice = fastrand::Rng::with_seed(9);
        for (events, accounts) in [(0, 1), (1, 1), (255, 9), (5_000, 700), (5_000, 1)] {
            let names: Vec<u32> = (0..accounts).map(|_| dice.u32(..)).collect();
            let hashes: Vec<u32> = (0..events).map(|_| names[dice.usize(..accounts)]).collect();
            write(folder.path(), 7, &hashes).unwrap();
            let find = |wanted: &[u32]| find(folder.path(), 7, events, wanted).unwrap();
            let mut wanted = vec![names[0], names[accounts / 2], !names[0], 0, u32::MAX];
            wanted.sort_unstable();
            wanted.dedup();
            let there = hashes
                .iter()
                .zip(0..)
                .filter(|(hash, _)| wanted.contains(hash));
            assert_eq!(find(&wanted), Some(there.map(|(_, place)| place).collect()));
            assert_eq!(
                super::find(folder.path(), 7, events + 1, &wanted).unwrap(),
                None
            );
            assert_eq!(
                super::find(folder.path(), 8, events, &wanted).unwrap(),
                None
            );
        }
        remove(folder.path(), 7).unwrap();
        assert_eq!(find(folder.path(), 7, 5_000, &[1]).unwrap(), None);
        remove(folder.path(), 7).unwrap();
    }

    #[test]
    fn no_damage_hides_an_event() {
        let folder = tempfile::tempdir().unwrap();
        let hashes: Vec<u32> = (0..600_u32).map(|n| n.wrapping_mul(0x9e37_79b9)).collect();
        write(folder.path(), 1, &hashes).unwrap();
        let sound = fs::read(path(folder.path(), 1)).unwrap();
        let find = || find(folder.path(), 1, 600, &[hashes[123]]).unwrap();
        assert_eq!(find(), Some(vec![123]));
        for at in (0..sound.len()).step_by(3) {
            let mut bytes = sound.clone();
            bytes[at] ^= 1 << (at % 8);
            fs::write(path(folder.path(), 1), &bytes).unwrap();
            assert!(matches!(find().as_deref(), None | Some([123])), "byte {at}");
            if at % 5 == 0 {
                fs::write(path(folder.path(), 1), &sound[..at]).unwrap();
                assert_eq!(find(), None, "cut at {at}");
            }
        }
    }
}
