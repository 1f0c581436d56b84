//! A set of sequence numbers as disjoint ranges.

use alloc::{collections::BTreeMap, vec::Vec};

use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// A set of `u64`, kept as inclusive, disjoint, non-adjacent ranges in order.
///
/// What a device has in its outbox and what the coordinator has stored are both nearly contiguous, so
/// the set stays a handful of ranges whatever its size. As JSON: `[[from, to], …]`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RangeSet {
    /// from → to, both inclusive
    ranges: BTreeMap<u64, u64>,
}

impl RangeSet {
    /// The empty set.
    #[must_use]
    pub const fn new() -> Self {
        Self {
            ranges: BTreeMap::new(),
        }
    }

    /// Adds `from..=to`. Does nothing if `from > to`.
    pub fn insert(&mut self, from: u64, to: u64) {
        if from > to {
            return;
        }
        let (mut from, mut to) = (from, to);
        // Every range that starts at or before the end (or directly after it) may touch the new one.
        while let Some((&start, &end)) = self.ranges.range(..=to.saturating_add(1)).next_back() {
            if end.saturating_add(1) < from {
                break;
            }
            self.ranges.remove(&start);
            from = from.min(start);
            to = to.max(end);
        }
        self.ranges.insert(from, to);
    }

    /// Takes `from..=to` out. Does nothing if `from > to`.
    pub fn remove(&mut self, from: u64, to: u64) {
        if from > to {
            return;
        }
        while let Some((&start, &end)) = self.ranges.range(..=to).next_back() {
            if end < from {
                break;
            }
            self.ranges.remove(&start);
            if end > to {
                self.ranges.insert(to + 1, end);
            }
            if start < from {
                self.ranges.insert(start, from - 1);
            }
        }
    }

    /// Is `value` in the set?
    #[must_use]
    pub fn contains(&self, value: u64) -> bool {
        self.ranges
            .range(..=value)
            .next_back()
            .is_some_and(|(_, &end)| end >= value)
    }

    /// Is all of `from..=to` in the set?
    #[must_use]
    pub fn covers(&self, from: u64, to: u64) -> bool {
        self.ranges
            .range(..=from)
            .next_back()
            .is_some_and(|(_, &end)| end >= to)
    }

    /// The parts of `from..=to` that are in the set, in order.
    pub fn overlap(&self, from: u64, to: u64) -> impl Iterator<Item = (u64, u64)> + '_ {
        let start = self
            .ranges
            .range(..=from)
            .next_back()
            .map_or(from, |(&a, _)| a);
        let pieces = if start <= to {
            Some(self.ranges.range(start..=to))
        } else {
            None
        };
        pieces
            .into_iter()
            .flatten()
            .map(move |(&a, &b)| (a.max(from), b.min(to)))
            .filter(|(a, b)| a <= b)
    }

    /// The lowest range, inclusive.
    #[must_use]
    pub fn first(&self) -> Option<(u64, u64)> {
        self.ranges.first_key_value().map(|(&a, &b)| (a, b))
    }

    /// The highest value.
    #[must_use]
    pub fn last(&self) -> Option<u64> {
        self.ranges.last_key_value().map(|(_, &b)| b)
    }

    /// How many values the set holds.
    #[must_use]
    pub fn len(&self) -> u64 {
        self.ranges.iter().map(|(a, b)| b - a + 1).sum()
    }

    /// Holds it nothing?
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.ranges.is_empty()
    }

    /// The ranges, inclusive, in order.
    pub fn iter(&self) -> impl DoubleEndedIterator<Item = (u64, u64)> + '_ {
        self.ranges.iter().map(|(&a, &b)| (a, b))
    }

    /// How many disjoint ranges there are.
    #[must_use]
    pub fn pieces(&self) -> usize {
        self.ranges.len()
    }
}

impl Serialize for RangeSet {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        to.collect_seq(self.iter())
    }
}

impl<'de> Deserialize<'de> for RangeSet {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        let mut set = Self::new();
        for (a, b) in Vec::<(u64, u64)>::deserialize(from)? {
            if a > b {
                return Err(serde::de::Error::custom("a range ends before it starts"));
            }
            set.insert(a, b);
        }
        Ok(set)
    }
}

#[cfg(test)]
mod tests {
    use alloc::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn behaves_like_a_set_of_numbers(steps in prop::collection::vec((any::<bool>(), 0u64..60, 0u64..12), 0..60)) {
            let (mut ranges, mut model) = (RangeSet::new(), BTreeSet::new());
            for (add, from, length) in steps {
                let to = from + length;
                if add {
                    ranges.insert(from, to);
                    model.extend(from..=to);
                } else {
                    ranges.remove(from, to);
                    model.retain(|v| *v < from || *v > to);
                }
                prop_assert_eq!(ranges.len(), model.len() as u64);
                prop_assert!((0..80).all(|v| ranges.contains(v) == model.contains(&v)));
                prop_assert_eq!(ranges.last(), model.last().copied());
                let overlap: Vec<u64> = ranges.overlap(from, to).flat_map(|(a, b)| a..=b).collect();
                prop_assert_eq!(overlap, model.range(from..=to).copied().collect::<Vec<_>>());
                let apart = ranges.iter().zip(ranges.iter().skip(1)).all(|((_, a), (b, _))| a + 1 < b);
                prop_assert!(apart, "adjacent ranges are merged: {:?}", ranges);
            }
        }
    }

    #[test]
    fn holds_the_ends_of_the_number_line() {
        let mut set = RangeSet::new();
        set.insert(u64::MAX, u64::MAX);
        set.insert(0, 0);
        assert!(set.contains(u64::MAX) && set.contains(0) && !set.contains(1));
        set.remove(0, u64::MAX);
        assert!(set.is_empty());
    }
}
