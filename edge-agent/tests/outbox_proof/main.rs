//! What the outbox promises, tried against a model, kills, power cuts, damage and full disks.
//!
//! Every test prints its seed; `LACEWING_SEED` repeats it. `LACEWING_CUTS` sets the number of power cuts.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "helpers of tests, outside of test functions"
)]

mod damage;
mod full;
mod kill;
mod model;
mod platter;
mod power;

use std::path::Path;

use edge_agent::outbox::{Appended, Options, Outbox, OutboxError};
use tempfile::TempDir;

/// A small, seeded generator: tests must be repeatable by their seed.
pub(crate) struct Dice(u64);

impl Dice {
    /// A generator with the seed of the environment or a fresh one, which is printed.
    pub(crate) fn new(test: &str) -> Self {
        let seed = std::env::var("LACEWING_SEED")
            .ok()
            .and_then(|seed| seed.parse().ok());
        let seed = seed.unwrap_or_else(|| {
            use std::hash::{BuildHasher, RandomState};
            RandomState::new().hash_one(test) >> 1
        });
        println!("{test}: LACEWING_SEED={seed}");
        Self(seed | 1)
    }

    pub(crate) fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    /// 0..n
    pub(crate) fn below(&mut self, n: u64) -> u64 {
        (self.next() >> 11) % n
    }

    pub(crate) fn one_in(&mut self, n: u64) -> bool {
        self.below(n) == 0
    }
}

/// The bytes of a reading: its own number, and a length that follows from it.
pub(crate) fn reading(seq: u64, largest: u64) -> Vec<u8> {
    let size = 20 + seq.wrapping_mul(0x9e37_79b9_7f4a_7c15) % largest;
    let mut bytes = format!("{seq:020}").into_bytes();
    // As chance has it, so that the outbox cannot make it smaller than it looks.
    let mut state = seq << 1 | 1;
    bytes.resize_with(size as usize, || {
        state = state.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(1);
        (state >> 56) as u8
    });
    bytes
}

/// Appends `count` readings of [`reading`]; the cursor is the number of the last.
pub(crate) fn append(
    outbox: &mut Outbox,
    count: usize,
    largest: u64,
) -> Result<Appended, OutboxError> {
    let mut last = 0;
    let cursor = (outbox.next_seq() + count as u64 - 1).to_string();
    let appended = outbox.append(
        count,
        |seq| {
            last = seq;
            Ok::<_, std::io::Error>(reading(seq, largest))
        },
        cursor.as_bytes(),
    )?;
    assert_eq!(appended.to, last);
    Ok(appended)
}

/// A directory in memory where there is one: these tests do not need a disk to be slow.
pub(crate) fn scratch() -> TempDir {
    let shm = Path::new("/dev/shm");
    if shm.is_dir() {
        tempfile::tempdir_in(shm).unwrap()
    } else {
        tempfile::tempdir().unwrap()
    }
}

/// The smallest outbox, in `dir`.
pub(crate) fn small(dir: &Path) -> Options {
    Options::new(dir, edge_agent::outbox::MIN_BYTES)
}
