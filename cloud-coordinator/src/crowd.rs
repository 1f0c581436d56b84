//! How many connections come from one address, or of one subscriber.

use std::{
    collections::HashMap,
    hash::Hash,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

/// A single address gets all connections but one in so many: generous, since a large site behind one router shares an
/// address, and yet it can shut nobody else out.
const KEPT_FROM_ONE_ADDRESS: usize = 4;

/// How many of so many connections may come from one address.
pub(crate) const fn share_of_one_address(connections: usize) -> usize {
    connections - connections / KEPT_FROM_ONE_ADDRESS
}

/// Counts what is there, by key, up to a bound for each.
#[derive(Debug)]
pub(crate) struct Crowd<K> {
    counts: Mutex<HashMap<K, usize>>,
    most: usize,
}

/// One place; given back when dropped.
#[derive(Debug)]
pub(crate) struct Place<K: Hash + Eq>(Arc<Crowd<K>>, K);

impl<K: Hash + Eq + Clone> Crowd<K> {
    pub(crate) fn new(most: usize) -> Arc<Self> {
        Arc::new(Self {
            counts: Mutex::default(),
            most,
        })
    }

    /// A place, if there is one left for this key.
    pub(crate) fn enter(self: &Arc<Self>, key: K) -> Option<Place<K>> {
        let mut counts = self.counts();
        let count = counts.entry(key.clone()).or_default();
        if *count >= self.most {
            return None;
        }
        *count += 1;
        Some(Place(self.clone(), key))
    }
}

impl<K> Crowd<K> {
    fn counts(&self) -> MutexGuard<'_, HashMap<K, usize>> {
        self.counts.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<K: Hash + Eq> Drop for Place<K> {
    fn drop(&mut self) {
        let mut counts = self.0.counts();
        if let Some(count) = counts.get_mut(&self.1) {
            *count -= 1;
            if *count == 0 {
                counts.remove(&self.1);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_key_has_its_own_bound_and_nothing_stays_behind() {
        let crowd = Crowd::new(2);
        let held = [crowd.enter("a"), crowd.enter("a")];
        assert!(held.iter().all(Option::is_some));
        assert!(crowd.enter("a").is_none());
        assert!(crowd.enter("b").is_some());
        drop(held);
        assert!(crowd.enter("a").is_some());
        assert!(crowd.counts().is_empty());
    }
}
