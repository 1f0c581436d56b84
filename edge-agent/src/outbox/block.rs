//! How a group of readings lies in a segment.
//!
//! A *block* is a group: the consecutive readings `first..first + count` and the group's cursor,
//!
//! ```text
//! count: u16 | cursor length: u16 | cursor | { length: u32 | bytes } × count        (big-endian)
//! ```
//!
//! compressed (LZ4 block format) where that makes it shorter, because the readings of one device say much the
//! same: it is a fifth of the bytes for the disk to take and to wear. It is stored as one or more values of at
//! most [`PART_BYTES`], keyed by `first` and the part's number; each says how many parts there are, and the
//! first one begins with
//!
//! ```text
//! length before compression: u32 | CRC-32 of what follows, all parts: u32
//! ```
//!
//! Where the device has a key, the compressed bytes are sealed (`crate::seal`), and the highest bit of the length says so.
//!
//! A block counts only when all of its parts are there and the sum is right: that makes a group atomic.

use super::{MAX_CURSOR, MAX_GROUP, MAX_GROUP_BYTES};
use crate::seal::{Seal, SealError};

/// The most bytes of a value. sled keeps up to 17 values in a page and writes pages that are larger than a
/// quarter of its segment (64 KiB) into files of their own, which nobody would sync: 17 × 3 KiB stay below.
pub(super) const PART_BYTES: usize = 3 * 1024;

/// A key: the block's first reading, big-endian so that keys sort as numbers do, and the part.
pub(super) type Key = [u8; 9];

/// Count and length of the cursor.
const HEAD: usize = 4;
/// The block is sealed.
const SEALED: u32 = 1 << 31;
/// It was not made shorter before that.
const WHOLE: u32 = 1 << 30;
/// The longest block before compression.
const MAX_BLOCK: usize = HEAD + MAX_CURSOR + 4 * MAX_GROUP + MAX_GROUP_BYTES;

/// What is sealed, so that it cannot be taken for another block.
fn context(first: u64) -> String {
    format!("outbox block {first}")
}

pub(super) fn key(first: u64, part: u8) -> Key {
    let mut key = [0; 9];
    key[..8].copy_from_slice(&first.to_be_bytes());
    key[8] = part;
    key
}

pub(super) fn parse_key(bytes: &[u8]) -> Option<(u64, u8)> {
    let (part, first) = bytes.split_last()?;
    Some((u64::from_be_bytes(first.try_into().ok()?), *part))
}

/// Packs the group of readings that starts at `from` into the values to store, in the order of their keys.
pub(super) fn pack(
    seal: &Seal,
    from: u64,
    readings: &[Vec<u8>],
    cursor: &[u8],
) -> Result<Vec<(Key, Vec<u8>)>, SealError> {
    let size: usize = readings.iter().map(|reading| 4 + reading.len()).sum();
    let mut plain = Vec::with_capacity(HEAD + cursor.len() + size);
    plain.extend_from_slice(&(readings.len() as u16).to_be_bytes());
    plain.extend_from_slice(&(cursor.len() as u16).to_be_bytes());
    plain.extend_from_slice(cursor);
    for reading in readings {
        plain.extend_from_slice(&(reading.len() as u32).to_be_bytes());
        plain.extend_from_slice(reading);
    }
    let mut length = plain.len() as u32;
    let pressed = lz4_flex::block::compress(&plain);
    let body = if pressed.len() < plain.len() {
        pressed
    } else {
        plain
    };
    let body = if seal.is_on() {
        // What is sealed says how long it was: its own length does not.
        length |= SEALED
            | if body.len() as u32 == length {
                WHOLE
            } else {
                0
            };
        seal.wrap(&context(from), body)?
    } else {
        body
    };
    let mut bytes = Vec::with_capacity(8 + body.len());
    bytes.extend_from_slice(&length.to_be_bytes());
    bytes.extend_from_slice(&crc32fast::hash(&body).to_be_bytes());
    bytes.extend_from_slice(&body);
    let parts = bytes.chunks(PART_BYTES - 1);
    let count = parts.len() as u8;
    let value = |bytes: &[u8]| [&[count], bytes].concat();
    let values = (0..)
        .zip(parts)
        .map(|(part, bytes)| (key(from, part), value(bytes)));
    Ok(values.collect())
}

/// A block that was put together again.
#[derive(Debug, PartialEq)]
pub(super) struct Block {
    /// The number of its first reading.
    pub(super) first: u64,
    /// The group's cursor.
    pub(super) cursor: Vec<u8>,
    /// The readings.
    pub(super) readings: Vec<Vec<u8>>,
}

impl Block {
    /// The number of its last reading.
    pub(super) fn last(&self) -> u64 {
        self.first + self.readings.len() as u64 - 1
    }
}

/// Puts blocks together from values in the order of their keys. What does not fit together is left out.
#[derive(Debug)]
pub(super) struct Assembler<'a> {
    seal: &'a Seal,
    first: u64,
    parts: u8,
    seen: u8,
    bytes: Vec<u8>,
}

impl<'a> Assembler<'a> {
    pub(super) const fn new(seal: &'a Seal) -> Self {
        Self {
            seal,
            first: 0,
            parts: 0,
            seen: 0,
            bytes: Vec::new(),
        }
    }

    /// Takes the next value; gives the block that it completes.
    pub(super) fn push(&mut self, key: &[u8], value: &[u8]) -> Option<Block> {
        let (first, part) = parse_key(key)?;
        let (&parts, bytes) = value.split_first()?;
        if part == 0 {
            *self = Self {
                first,
                parts,
                ..Self::new(self.seal)
            };
        }
        if first != self.first || part != self.seen || parts != self.parts {
            // A part is missing: what follows of this block is worth nothing.
            self.parts = 0;
            return None;
        }
        self.seen += 1;
        self.bytes.extend_from_slice(bytes);
        (self.seen == self.parts).then(|| unpack(self.seal, first, &self.bytes))?
    }
}

fn unpack(seal: &Seal, first: u64, bytes: &[u8]) -> Option<Block> {
    let (length, bytes) = bytes.split_first_chunk()?;
    let (sum, body) = bytes.split_first_chunk()?;
    let marked = u32::from_be_bytes(*length);
    let length = (marked & !(SEALED | WHOLE)) as usize;
    if length > MAX_BLOCK || crc32fast::hash(body) != u32::from_be_bytes(*sum) {
        return None;
    }
    let opened;
    let (body, is_whole) = if marked & SEALED == 0 {
        (body, body.len() == length)
    } else {
        opened = seal.unwrap(&context(first), body.to_vec())?;
        (opened.as_slice(), marked & WHOLE != 0)
    };
    if is_whole {
        return parse(first, body);
    }
    let plain = lz4_flex::block::decompress(body, length).ok()?;
    (plain.len() == length).then(|| parse(first, &plain))?
}

fn parse(first: u64, bytes: &[u8]) -> Option<Block> {
    let (count, bytes) = bytes.split_first_chunk()?;
    let (length, bytes) = bytes.split_first_chunk()?;
    let count = u16::from_be_bytes(*count);
    let (cursor, mut bytes) = bytes.split_at_checked(usize::from(u16::from_be_bytes(*length)))?;
    let mut readings = Vec::with_capacity(usize::from(count));
    for _ in 0..count {
        let (length, rest) = bytes.split_first_chunk()?;
        let (reading, rest) = rest.split_at_checked(u32::from_be_bytes(*length) as usize)?;
        readings.push(reading.to_vec());
        bytes = rest;
    }
    (count > 0 && bytes.is_empty() && first > 0).then_some(Block {
        first,
        cursor: cursor.to_vec(),
        readings,
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Bytes that cannot be compressed.
    fn noise(seed: u64, length: usize) -> Vec<u8> {
        let mut state = seed | 1;
        let next = || {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state as u8
        };
        std::iter::repeat_with(next).take(length).collect()
    }

    fn seal(is_sealed: bool) -> Seal {
        if is_sealed {
            Seal::with(&[7; 32]).unwrap()
        } else {
            Seal::none()
        }
    }

    proptest! {
        #[test]
        fn what_is_packed_comes_back(
            sizes in prop::collection::vec((prop_oneof![0usize..600, 2_900usize..3_200, 9_000usize..16_385], any::<bool>()), 1..16),
            from in 1u64..1_000_000,
            cursor in prop::collection::vec(any::<u8>(), 0..4_096),
            is_sealed: bool,
        ) {
            let seal = seal(is_sealed);
            let readings: Vec<Vec<u8>> = sizes
                .iter()
                .zip(1..)
                .map(|(&(size, plain), seed)| if plain { vec![seed as u8; size] } else { noise(seed, size) })
                .collect();
            let values = pack(&seal, from, &readings, &cursor).unwrap();
            prop_assert!(values.is_sorted_by_key(|(key, _)| *key));
            prop_assert!(values.iter().all(|(_, value)| value.len() <= PART_BYTES));
            let mut assembler = Assembler::new(&seal);
            let blocks: Vec<Block> = values.iter().filter_map(|(k, v)| assembler.push(k, v)).collect();
            prop_assert_eq!(blocks, [Block { first: from, cursor, readings }]);
        }

        #[test]
        fn nonsense_is_left_out(is_sealed: bool, values in prop::collection::vec((0u64..3, 0u8..3, prop::collection::vec(any::<u8>(), 0..20)), 0..20)) {
            let seal = seal(is_sealed);
            let mut assembler = Assembler::new(&seal);
            for (first, part, value) in values {
                assembler.push(&key(first, part), &value);
            }
        }

        #[test]
        fn parts_of_two_groups_are_no_group(kept in 1usize..5) {
            let seal = Seal::none();
            let group = |seed| pack(&seal, 7, &[noise(seed, 15_000)], b"c").unwrap();
            let (old, new) = (group(1), group(2));
            prop_assert_eq!((old.len(), new.len()), (5, 5));
            let mixed = new[..kept].iter().chain(&old[kept..]);
            let mut assembler = Assembler::new(&seal);
            let blocks = mixed.filter_map(|(k, v)| assembler.push(k, v)).count();
            prop_assert_eq!(blocks, usize::from(kept == 5));
        }
    }

    #[test]
    fn a_sealed_block_needs_its_key_and_its_place() {
        let seal = seal(true);
        let readings = vec![b"a reading that nobody is to read".to_vec(); 3];
        let values = pack(&seal, 5, &readings, b"/a/file").unwrap();
        let whole: Vec<u8> = values.iter().flat_map(|(_, value)| value.clone()).collect();
        for plain in [&b"reading"[..], b"/a/file"] {
            assert!(!whole.windows(plain.len()).any(|w| w == plain));
        }
        let read = |seal: &Seal, first: u64| {
            let mut assembler = Assembler::new(seal);
            let all = values.iter().enumerate();
            all.filter_map(|(part, (_, v))| assembler.push(&key(first, part as u8), v))
                .count()
        };
        assert_eq!(read(&seal, 5), 1);
        assert_eq!(read(&seal, 6), 0);
        assert_eq!(read(&Seal::none(), 5), 0);
        assert_eq!(read(&Seal::with(&[8; 32]).unwrap(), 5), 0);
    }

    #[test]
    fn a_missing_part_costs_its_group_only() {
        let seal = Seal::none();
        let mut values = pack(&seal, 5, &[noise(1, 10_000), vec![3; 10]], b"c").unwrap();
        values.remove(1);
        values.extend(pack(&seal, 7, &[vec![2; 10]], b"d").unwrap());
        let mut assembler = Assembler::new(&seal);
        let blocks: Vec<Block> = values
            .iter()
            .filter_map(|(k, v)| assembler.push(k, v))
            .collect();
        assert_eq!(blocks.len(), 1);
        assert_eq!((blocks[0].first, &blocks[0].readings[0]), (7, &vec![2; 10]));
    }
}
