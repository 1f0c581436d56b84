//! Chance.

/// Evenly drawn, different on every device and at every start; nothing secret depends on it.
pub(crate) fn throw() -> u64 {
    use std::hash::{BuildHasher, Hasher, RandomState};
    RandomState::new().build_hasher().finish()
}
