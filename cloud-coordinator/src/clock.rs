//! The only place of the coordinator where the wall clock is read.

/// Milliseconds since the Unix epoch.
///
/// A wall clock may jump: nothing but what people see and how long readings are kept depends on it.
#[must_use]
pub(crate) fn now_ms() -> i64 {
    #[expect(clippy::disallowed_methods, reason = "this is the clock module")]
    let now = std::time::SystemTime::now();
    now.duration_since(std::time::UNIX_EPOCH)
        .map_or(0, |d| i64::try_from(d.as_millis()).unwrap_or(i64::MAX))
}

/// A number that nobody can foresee, for jitter and for names that must not clash.
#[must_use]
pub(crate) fn random() -> u64 {
    use std::hash::{BuildHasher, Hasher};
    // Each RandomState carries keys from the operating system.
    std::hash::RandomState::new().build_hasher().finish()
}
