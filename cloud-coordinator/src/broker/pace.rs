//! How fast one client may speak, and be brought up to date. Beyond it the client is read more slowly and not cut: a device that brings its backlog
//! after a week must not lose its connection over it.

use std::num::NonZeroU32;

use governor::{
    DefaultDirectRateLimiter, Quota, RateLimiter,
    clock::{Clock, DefaultClock},
};

/// One client's pace.
#[derive(Debug)]
pub(super) struct Pace {
    limiter: DefaultDirectRateLimiter,
    clock: DefaultClock,
}

impl Pace {
    pub(super) fn new(a_second: u32, at_once: u32) -> Self {
        let [rate, burst] =
            [a_second, at_once].map(|n| NonZeroU32::new(n).unwrap_or(NonZeroU32::MIN));
        Self {
            limiter: RateLimiter::direct(Quota::per_second(rate).allow_burst(burst)),
            clock: DefaultClock::default(),
        }
    }

    /// Waits for the next turn; says whether it had to.
    pub(super) async fn turn(&self) -> bool {
        let mut waited = false;
        while let Err(not_yet) = self.limiter.check() {
            waited = true;
            tokio::time::sleep(not_yet.wait_time_from(self.clock.now())).await;
        }
        waited
    }
}
