//! Chance that can be repeated: everything random in a run follows from one printed seed.

use std::{
    hash::{BuildHasher, RandomState},
    ops::Range,
    time::Duration,
};

/// `SplitMix64` (Steele, Lea and Flood, 2014): small, fast, and even enough to decide what to break next.
#[derive(Clone, Debug)]
pub struct Dice(u64);

impl Dice {
    /// The same seed gives the same throws.
    #[must_use]
    pub const fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// A seed from the operating system's randomness, through the standard library's hasher.
    #[must_use]
    pub fn seed() -> u64 {
        RandomState::new().hash_one(0) >> 32
    }

    /// Any number, evenly.
    pub const fn any(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    /// A number below `n`; 0 if `n` is 0.
    pub fn below(&mut self, n: usize) -> usize {
        let n = n.max(1) as u64;
        usize::try_from(self.any() % n).unwrap_or(0)
    }

    /// A time within `range`, in milliseconds.
    pub const fn wait(&mut self, range: &Range<u64>) -> Duration {
        let width = range.end.saturating_sub(range.start);
        let width = if width == 0 { 1 } else { width };
        Duration::from_millis(range.start + self.any() % width)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn repeats_itself_and_stays_within() {
        let (mut a, mut b) = (Dice::new(7), Dice::new(7));
        for _ in 0..1_000 {
            assert_eq!(a.any(), b.any());
            let n = a.below(6);
            assert!(n < 6 && n == b.below(6));
            let wait = a.wait(&(10..20)).as_millis();
            assert!((10..20).contains(&wait));
            b.wait(&(10..20));
        }
        assert_eq!(a.below(0), 0);
    }
}
