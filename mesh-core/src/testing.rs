//! Random histories that can be told again: each follows from its seed.

/// SplitMix64 (Steele, Lea, Flood 2014).
#[derive(Clone, Debug)]
pub(crate) struct Dice(pub(crate) u64);

impl Dice {
    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// One of `0..n`.
    pub(crate) fn below(&mut self, n: u64) -> u64 {
        self.next() % n
    }

    /// 0..1.
    pub(crate) fn unit(&mut self) -> f32 {
        (self.next() >> 40) as f32 / (1u64 << 24) as f32
    }

    pub(crate) fn chance(&mut self, share: f32) -> bool {
        self.unit() < share
    }
}

/// How many histories to run: `MESH_CORE_HISTORIES`, or `default`.
pub(crate) fn histories(default: u64) -> u64 {
    let asked = std::env::var("MESH_CORE_HISTORIES").ok();
    asked
        .and_then(|n| n.replace('_', "").parse().ok())
        .unwrap_or(default)
}
