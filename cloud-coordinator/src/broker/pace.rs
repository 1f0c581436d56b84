//! How fast one client may speak. Beyond it the client is read more slowly and not cut: a device that brings its backlog
//! after a week must not lose its connection over it.

use std::num::NonZeroU32;

use governor::{
    DefaultDirectRateLimiter, Quota, RateLimiter,
    clock::{Clock, DefaultClock},
};

/// One client's pace. One second's worth may come at once.
#[derive(Debug)]
pub(super) struct Pace {
    limiter: DefaultDirectRateLimiter,
    clock: DefaultClock,
}

impl Pace {
    pub(super) fn new(a_second: u32) -> Self {
        let rate = NonZeroU32::new(a_second).unwrap_or(NonZeroU32::MIN);
        Self {
            limiter: RateLimiter::direct(Quota::per_second(rate)),
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
