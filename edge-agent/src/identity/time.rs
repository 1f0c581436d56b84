//! What time it is, for certificates.

use std::sync::{
    Mutex, PoisonError,
    atomic::{AtomicI64, Ordering},
};

use mesh_core::enrolment::Now;
use rustls::{pki_types::UnixTime, time_provider::TimeProvider};

use crate::clock::{Monotonic, WallClock};

/// The time that certificates are looked at with.
///
/// The coordinator's own, carried on by the monotonic clock, once it has answered in this life; before that the wall
/// clock, but never earlier than what is known for certain.
#[derive(Debug)]
pub struct TrustedTime {
    wall: WallClock,
    mono: Monotonic,
    floor_ms: AtomicI64,
    anchor: Mutex<Option<(i64, u64)>>,
}

impl TrustedTime {
    pub(crate) fn new(wall: WallClock, floor_ms: i64) -> Self {
        Self {
            wall,
            mono: Monotonic::start(),
            floor_ms: AtomicI64::new(floor_ms),
            anchor: Mutex::new(None),
        }
    }

    /// The coordinator has said what time it is.
    pub(super) fn set(&self, anchor: Option<(i64, u64)>, floor_ms: i64) {
        *self.anchor.lock().unwrap_or_else(PoisonError::into_inner) = anchor;
        self.floor_ms.store(floor_ms, Ordering::Relaxed);
    }

    /// Both clocks.
    pub(super) fn now(&self) -> Now {
        Now {
            mono_ms: self.mono.now_ms(),
            wall_ms: self.wall.now_ms(),
        }
    }

    /// The clock that only goes forward.
    pub(super) const fn mono(&self) -> Monotonic {
        self.mono
    }

    /// Milliseconds since the Unix epoch.
    #[must_use]
    pub fn now_ms(&self) -> i64 {
        let anchor = *self.anchor.lock().unwrap_or_else(PoisonError::into_inner);
        match anchor {
            Some((said_ms, at)) => {
                let since = self.mono.now_ms().saturating_sub(at);
                said_ms.saturating_add(i64::try_from(since).unwrap_or(i64::MAX))
            }
            None => self
                .wall
                .now_ms()
                .max(self.floor_ms.load(Ordering::Relaxed)),
        }
    }
}

impl TimeProvider for TrustedTime {
    fn current_time(&self) -> Option<UnixTime> {
        Some(unix(self.now_ms()))
    }
}

/// The same for the library; nothing is before 1970 there.
pub(super) fn unix(ms: i64) -> UnixTime {
    let ms = u64::try_from(ms).unwrap_or(0);
    UnixTime::since_unix_epoch(std::time::Duration::from_millis(ms))
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn the_coordinators_word_is_above_the_wall_clock_and_that_above_the_floor() {
        let offset = Arc::new(AtomicI64::new(0));
        let wall = WallClock::shifted(offset.clone());
        let floor = wall.now_ms() + 1_000_000;
        let time = TrustedTime::new(wall, floor);
        assert_eq!(time.now_ms(), floor);
        offset.store(9_000_000, Ordering::Relaxed);
        assert!(time.now_ms() > floor + 7_000_000);
        time.set(Some((50_000, 0)), 50_000);
        tokio::time::advance(std::time::Duration::from_millis(70)).await;
        assert_eq!(time.now_ms(), 50_070);
        assert_eq!(unix(-5).as_secs(), 0);
    }
}
