//! Waiting longer after each failure.

/// Exponential backoff with full jitter: the n-th wait is drawn evenly from `0..=min(max, base·2ⁿ)`.
///
/// Full jitter spreads a fleet that lost the same broker at the same moment; see Brooker, "Exponential
/// Backoff And Jitter" (2015).
#[derive(Clone, Debug)]
pub struct Backoff {
    base_ms: u64,
    max_ms: u64,
    failures: u32,
}

impl Backoff {
    /// Starts at `base_ms` and never waits longer than `max_ms`.
    #[must_use]
    pub const fn new(base_ms: u64, max_ms: u64) -> Self {
        Self {
            base_ms,
            max_ms,
            failures: 0,
        }
    }

    /// The next wait in milliseconds; `random` is any evenly drawn number.
    pub fn next(&mut self, random: u64) -> u64 {
        let ceiling = self.ceiling();
        self.failures = self.failures.saturating_add(1);
        random % (ceiling.saturating_add(1))
    }

    /// The longest that the next wait can be, in milliseconds.
    #[must_use]
    pub fn ceiling(&self) -> u64 {
        let doubled = 1u64
            .checked_shl(self.failures)
            .and_then(|f| self.base_ms.checked_mul(f));
        doubled.unwrap_or(u64::MAX).min(self.max_ms)
    }

    /// It worked: start over.
    pub const fn reset(&mut self) {
        self.failures = 0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn grows_to_its_bound_and_starts_over() {
        let mut backoff = Backoff::new(100, 5_000);
        let mut seen = 0;
        for random in (0..200).map(|n| n * 7_919) {
            assert!(backoff.ceiling() >= seen);
            seen = backoff.ceiling();
            assert!(backoff.next(random) <= seen);
        }
        assert_eq!(seen, 5_000);
        backoff.reset();
        assert_eq!(backoff.ceiling(), 100);
    }
}
