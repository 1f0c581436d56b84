//! How readings lie in a segment: several small ones together in one value, a large one over several.
//!
//! A *block* holds the consecutive readings `first..first + count`, and in the last block of a group the
//! group's cursor:
//!
//! ```text
//! count: u16 | cursor length or ffff: u16 | cursor | { length: u32 | bytes } × count        (big-endian)
//! ```
//!
//! It is stored as one or more values of at most [`PART_BYTES`], keyed by `first` and the part's number;
//! the first part says how many there are.

/// The most bytes of a value. sled keeps up to 17 values in a page and writes pages that are larger than a
/// quarter of its segment (64 KiB) into files of their own, which nobody would sync: 17 × 3 KiB stay below.
pub(super) const PART_BYTES: usize = 3 * 1024;

/// A key: the block's first reading, big-endian so that keys sort as numbers do, and the part.
pub(super) type Key = [u8; 9];

const NO_CURSOR: u16 = u16::MAX;
const HEAD: usize = 4;

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

/// Packs a group of readings that starts at `from` into the values to store.
pub(super) fn pack(from: u64, readings: &[Vec<u8>], cursor: &[u8]) -> Vec<(Key, Vec<u8>)> {
    let mut values = Vec::new();
    let mut first = from;
    let mut rest = readings;
    while !rest.is_empty() {
        let mut size = HEAD;
        let fit = rest.iter().take_while(|reading| {
            size += 4 + reading.len();
            size < PART_BYTES
        });
        let count = fit.count().max(1);
        let (now, later) = rest.split_at(count);
        block(&mut values, first, now, later.is_empty().then_some(cursor));
        first += count as u64;
        rest = later;
    }
    values
}

fn block(
    values: &mut Vec<(Key, Vec<u8>)>,
    first: u64,
    readings: &[Vec<u8>],
    cursor: Option<&[u8]>,
) {
    let mut bytes = Vec::with_capacity(PART_BYTES);
    bytes.extend_from_slice(&(readings.len() as u16).to_be_bytes());
    let length = cursor.map_or(NO_CURSOR, |cursor| cursor.len() as u16);
    bytes.extend_from_slice(&length.to_be_bytes());
    bytes.extend_from_slice(cursor.unwrap_or_default());
    for reading in readings {
        bytes.extend_from_slice(&(reading.len() as u32).to_be_bytes());
        bytes.extend_from_slice(reading);
    }
    let parts = bytes.chunks(PART_BYTES - 1);
    let count = parts.len() as u8;
    for (part, bytes) in parts.enumerate() {
        let mut value = Vec::with_capacity(bytes.len() + 1);
        value.push(count);
        value.extend_from_slice(bytes);
        values.push((key(first, part as u8), value));
    }
}

/// A block that was put together again.
#[derive(Debug, PartialEq)]
pub(super) struct Block {
    /// The number of its first reading.
    pub(super) first: u64,
    /// The group's cursor, in the group's last block.
    pub(super) cursor: Option<Vec<u8>>,
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
#[derive(Debug, Default)]
pub(super) struct Assembler {
    first: u64,
    parts: u8,
    seen: u8,
    bytes: Vec<u8>,
}

impl Assembler {
    /// Takes the next value; gives the block that it completes.
    pub(super) fn push(&mut self, key: &[u8], value: &[u8]) -> Option<Block> {
        let (first, part) = parse_key(key)?;
        let (&parts, bytes) = value.split_first()?;
        if part == 0 {
            *self = Self {
                first,
                parts,
                ..Self::default()
            };
        }
        if first != self.first || part != self.seen || parts != self.parts {
            // A part is missing: what follows of this block is worth nothing.
            self.parts = 0;
            return None;
        }
        self.seen += 1;
        self.bytes.extend_from_slice(bytes);
        (self.seen == self.parts).then(|| unpack(first, &self.bytes))?
    }
}

fn unpack(first: u64, bytes: &[u8]) -> Option<Block> {
    let (count, bytes) = bytes.split_first_chunk()?;
    let (length, bytes) = bytes.split_first_chunk()?;
    let count = u16::from_be_bytes(*count);
    let (cursor, mut bytes) = match u16::from_be_bytes(*length) {
        NO_CURSOR => (None, bytes),
        length => {
            let (cursor, rest) = bytes.split_at_checked(usize::from(length))?;
            (Some(cursor.to_vec()), rest)
        }
    };
    let mut readings = Vec::with_capacity(usize::from(count));
    for _ in 0..count {
        let (length, rest) = bytes.split_first_chunk()?;
        let (reading, rest) = rest.split_at_checked(u32::from_be_bytes(*length) as usize)?;
        readings.push(reading.to_vec());
        bytes = rest;
    }
    (count > 0 && bytes.is_empty() && first > 0).then_some(Block {
        first,
        cursor,
        readings,
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn what_is_packed_comes_back(
            sizes in prop::collection::vec(prop_oneof![0usize..600, 2_900usize..3_200, 9_000usize..16_385], 1..40),
            from in 1u64..1_000_000,
            cursor in prop::collection::vec(any::<u8>(), 0..4_096),
        ) {
            let readings: Vec<Vec<u8>> = sizes.iter().enumerate().map(|(i, n)| vec![i as u8; *n]).collect();
            let values = pack(from, &readings, &cursor);
            prop_assert!(values.is_sorted_by_key(|(key, _)| *key));
            prop_assert!(values.iter().all(|(_, value)| value.len() <= PART_BYTES));
            let mut assembler = Assembler::default();
            let blocks: Vec<Block> = values.iter().filter_map(|(k, v)| assembler.push(k, v)).collect();
            prop_assert_eq!(blocks.last().and_then(|b| b.cursor.clone()), Some(cursor));
            let mut next = from;
            for block in &blocks {
                prop_assert_eq!(block.first, next);
                next = block.last() + 1;
            }
            prop_assert_eq!(blocks.into_iter().flat_map(|b| b.readings).collect::<Vec<_>>(), readings);
        }

        #[test]
        fn nonsense_is_left_out(values in prop::collection::vec((0u64..3, 0u8..3, prop::collection::vec(any::<u8>(), 0..20)), 0..20)) {
            let mut assembler = Assembler::default();
            for (first, part, value) in values {
                assembler.push(&key(first, part), &value);
            }
        }
    }

    #[test]
    fn a_missing_part_costs_its_block_only() {
        let readings = [vec![1; 10_000], vec![2; 10]];
        let mut values = pack(5, &readings, b"c");
        values.remove(1);
        let mut assembler = Assembler::default();
        let blocks: Vec<Block> = values
            .iter()
            .filter_map(|(k, v)| assembler.push(k, v))
            .collect();
        assert_eq!(blocks.len(), 1);
        assert_eq!((blocks[0].first, &blocks[0].readings[0]), (6, &vec![2; 10]));
    }
}
