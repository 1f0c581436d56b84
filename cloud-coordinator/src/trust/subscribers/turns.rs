//! Who is next where only one is served at a time: each network has a line of its own, and the first of each line take
//! turns. Who sends a crowd waits behind it; everybody else waits for one of the crowd at most.

use std::{
    collections::HashMap,
    net::IpAddr,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore},
    time::timeout,
};

use crate::crowd::share_of_one_address;

#[derive(Debug, Default)]
struct Lines {
    waiting: usize,
    /// How many of them in each, and who is first.
    by_network: HashMap<IpAddr, (usize, Arc<Semaphore>)>,
}

/// All lines.
#[derive(Debug)]
pub(super) struct Turns {
    lines: Mutex<Lines>,
    served: Arc<Semaphore>,
    most: usize,
}

/// A place in a line, given back when dropped.
struct Place<'a> {
    turns: &'a Turns,
    network: IpAddr,
}

impl Drop for Place<'_> {
    fn drop(&mut self) {
        let mut lines = self.turns.lines();
        lines.waiting -= 1;
        if let Some((count, _)) = lines.by_network.get_mut(&self.network) {
            *count -= 1;
            if *count == 0 {
                lines.by_network.remove(&self.network);
            }
        }
    }
}

impl Turns {
    /// So many are served at a time, and so many wait for that.
    pub(super) fn new(at_once: usize, most: usize) -> Self {
        Self {
            lines: Mutex::default(),
            served: Arc::new(Semaphore::new(at_once)),
            most,
        }
    }

    fn lines(&self) -> MutexGuard<'_, Lines> {
        self.lines.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn queue(&self, network: IpAddr) -> Option<(Place<'_>, Arc<Semaphore>)> {
        let mut lines = self.lines();
        let share = share_of_one_address(self.most);
        let of_it = lines
            .by_network
            .get(&network)
            .map_or(0, |(count, _)| *count);
        if lines.waiting >= self.most || of_it >= share {
            return None;
        }
        lines.waiting += 1;
        let new = || (0, Arc::new(Semaphore::new(1)));
        let (count, first) = lines.by_network.entry(network).or_insert_with(new);
        *count += 1;
        let first = first.clone();
        let turns = self;
        Some((Place { turns, network }, first))
    }

    /// Waits for a turn, which lasts until it is dropped; none if too many wait, or for too long.
    pub(super) async fn next(
        &self,
        network: IpAddr,
        patience: Duration,
    ) -> Option<OwnedSemaphorePermit> {
        let (_place, first) = self.queue(network)?;
        let turn = async {
            let _first = first.acquire().await.ok()?;
            self.served.clone().acquire_owned().await.ok()
        };
        timeout(patience, turn).await.ok().flatten()
    }

    /// Nobody is served any more.
    #[cfg(test)]
    pub(super) fn close(&self) {
        self.served.close();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PATIENCE: Duration = Duration::from_secs(60);

    fn from(n: u8) -> IpAddr {
        IpAddr::from([127, 0, 0, n])
    }

    #[tokio::test(start_paused = true)]
    async fn a_crowd_waits_behind_itself() {
        const EACH: Duration = Duration::from_millis(50);
        let turns = Arc::new(Turns::new(1, 256));
        let visit = |n: u8| {
            let turns = turns.clone();
            tokio::spawn(async move {
                let turn = turns.next(from(n), PATIENCE).await;
                tokio::time::sleep(EACH).await;
                turn.is_some()
            })
        };
        let crowd: Vec<_> = (0..300).map(|_| visit(66)).collect();
        tokio::task::yield_now().await;
        let since = tokio::time::Instant::now();
        assert!(visit(2).await.unwrap());
        let waited = since.elapsed();
        assert!(waited <= 4 * EACH, "two turns and its own: {waited:?}");
        let mut served = 0;
        for one in crowd {
            served += usize::from(one.await.unwrap());
        }
        // The first found nobody there and did not wait.
        assert_eq!(served, 1 + share_of_one_address(256));
        assert!(turns.lines().by_network.is_empty());
        assert_eq!(turns.lines().waiting, 0);
    }

    #[tokio::test(start_paused = true)]
    async fn nobody_waits_for_ever() {
        let turns = Turns::new(1, 4);
        let held = turns.next(from(1), PATIENCE).await;
        assert!(held.is_some());
        assert!(turns.next(from(2), PATIENCE).await.is_none());
        drop(held);
        assert!(turns.next(from(2), PATIENCE).await.is_some());
    }
}
