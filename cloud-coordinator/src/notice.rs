//! One log line per problem, however often it happens.

use std::{collections::HashMap, sync::Mutex, time::Duration};

use tokio::time::Instant;

/// A problem that goes on is told again after this long.
const AGAIN: Duration = Duration::from_secs(10);
/// Kinds of problem are few; this only bounds a mistake.
const MAX_KINDS: usize = 256;

/// Holds back repetitions of a message, per kind.
#[derive(Debug, Default)]
pub(crate) struct Notices {
    kinds: Mutex<HashMap<&'static str, (Instant, u64)>>,
}

impl Notices {
    /// Is this the time to say it? If so, how many were held back since the last time.
    pub(crate) fn due(&self, kind: &'static str) -> Option<u64> {
        self.due_at(kind, Instant::now())
    }

    fn due_at(&self, kind: &'static str, now: Instant) -> Option<u64> {
        let mut kinds = self.kinds.lock().unwrap_or_else(|e| e.into_inner());
        if let Some((last, held_back)) = kinds.get_mut(kind) {
            if now.duration_since(*last) < AGAIN {
                *held_back += 1;
                return None;
            }
            *last = now;
            return Some(std::mem::take(held_back));
        }
        if kinds.len() >= MAX_KINDS {
            return None;
        }
        kinds.insert(kind, (now, 0));
        Some(0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn says_it_once_and_counts_the_rest() {
        let (notices, now) = (Notices::default(), Instant::now());
        assert_eq!(notices.due_at("a", now), Some(0));
        assert_eq!(notices.due_at("a", now), None);
        assert_eq!(notices.due_at("b", now), Some(0));
        assert_eq!(notices.due_at("a", now + AGAIN), Some(1));
    }
}
