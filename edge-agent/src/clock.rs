//! The device's wall clock: the only place that reads it.
//!
//! It stamps readings for people to read. Nothing waits on it, orders by it or expires by it, so it may
//! jump by years in either direction; whatever waits uses the monotonic clock.

use std::{
    sync::{
        Arc,
        atomic::{AtomicI64, Ordering},
    },
    time::{SystemTime, UNIX_EPOCH},
};

/// The wall clock, possibly shifted.
#[derive(Clone, Debug, Default)]
pub struct WallClock {
    offset_ms: Arc<AtomicI64>,
}

impl WallClock {
    /// The system's clock.
    #[must_use]
    pub fn system() -> Self {
        Self::default()
    }

    /// The system's clock plus `offset_ms`, which may change at any time: a clock that jumps.
    #[must_use]
    pub const fn shifted(offset_ms: Arc<AtomicI64>) -> Self {
        Self { offset_ms }
    }

    /// Milliseconds since the Unix epoch.
    #[must_use]
    pub fn now_ms(&self) -> i64 {
        #[expect(
            clippy::disallowed_methods,
            reason = "this is the one place that reads the wall clock"
        )]
        let now = SystemTime::now();
        let ms = match now.duration_since(UNIX_EPOCH) {
            Ok(since) => i64::try_from(since.as_millis()).unwrap_or(i64::MAX),
            Err(before) => -i64::try_from(before.duration().as_millis()).unwrap_or(i64::MAX),
        };
        ms.saturating_add(self.offset_ms.load(Ordering::Relaxed))
    }
}

/// Milliseconds of a clock that only goes forward, from some start. Logic takes it as an argument.
#[derive(Clone, Copy, Debug)]
pub struct Monotonic(tokio::time::Instant);

impl Monotonic {
    /// Starts at zero now.
    #[must_use]
    pub fn start() -> Self {
        Self(tokio::time::Instant::now())
    }

    /// Milliseconds since the start.
    #[must_use]
    pub fn now_ms(&self) -> u64 {
        u64::try_from(self.0.elapsed().as_millis()).unwrap_or(u64::MAX)
    }

    /// The instant at which [`Monotonic::now_ms`] will be `at_ms`.
    #[must_use]
    pub fn at(&self, at_ms: u64) -> tokio::time::Instant {
        self.0 + std::time::Duration::from_millis(at_ms)
    }
}
