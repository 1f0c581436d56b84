//! Who is linked with whom: all live devices stand in a ring, in the order of their keys.
//!
//! Each is watched by the next one, and linked with those that follow a half, a quarter, an eighth … of the ring after it
//! (Stoica et al., "Chord", 2001, finger tables). So a device has about 2·log₂(n) links, what one says reaches all within
//! log₂(n) steps, and one that comes or goes changes few links of others.

use alloc::collections::BTreeSet;

use crate::roster::Peer;

/// The next after `peer` in the ring; nobody if it is alone.
pub(super) fn next(live: &BTreeSet<Peer>, peer: &Peer) -> Option<Peer> {
    let after = (core::ops::Bound::Excluded(peer), core::ops::Bound::Unbounded);
    let found = live.range(after).next().or_else(|| live.first());
    found.copied().filter(|found| found != peer)
}

/// The one before it.
pub(super) fn before(live: &BTreeSet<Peer>, peer: &Peer) -> Option<Peer> {
    let found = live.range(..peer).next_back().or_else(|| live.last());
    found.copied().filter(|found| found != peer)
}

/// The place of a key in the ring: keys are hashes, so their first bytes are evenly spread.
fn place(peer: &Peer) -> u64 {
    let [a, b, c, d, e, f, g, h, ..] = peer.0;
    u64::from_be_bytes([a, b, c, d, e, f, g, h])
}

/// Those that `peer` wants a link with.
pub(super) fn wanted(live: &BTreeSet<Peer>, peer: &Peer) -> BTreeSet<Peer> {
    let mut wanted: BTreeSet<Peer> = before(live, peer).into_iter().collect();
    let Some(nearest) = next(live, peer) else {
        return wanted;
    };
    wanted.insert(nearest);
    for bit in (0..u64::BITS).rev() {
        let from = place(peer).wrapping_add(1 << bit);
        let mut first = [0; 32];
        first[..8].copy_from_slice(&from.to_be_bytes());
        let at = live.range(crate::Digest(first)..).next();
        let Some(finger) = at.or_else(|| live.first()).copied() else {
            break;
        };
        // Nobody stands nearer than the nearest: the smaller steps all lead to it.
        if finger == nearest {
            break;
        }
        if finger != *peer {
            wanted.insert(finger);
        }
    }
    wanted
}

#[cfg(test)]
mod tests {
    use alloc::vec::Vec;

    use super::*;
    use crate::{Digest, testing::Dice};

    pub(crate) fn ring(n: u64, seed: u64) -> BTreeSet<Peer> {
        let mut dice = Dice(seed);
        (0..n)
            .map(|_| {
                let mut bytes = [0; 32];
                for chunk in bytes.chunks_mut(8) {
                    chunk.copy_from_slice(&dice.next().to_be_bytes());
                }
                Digest(bytes)
            })
            .collect()
    }

    #[test]
    fn the_ring_closes() {
        let live = ring(9, 1);
        for peer in &live {
            let after = next(&live, peer).unwrap();
            assert_eq!(before(&live, &after), Some(*peer));
        }
        let alone = ring(1, 2);
        let peer = *alone.first().unwrap();
        assert_eq!(next(&alone, &peer), None);
        assert_eq!(before(&alone, &peer), None);
        assert!(wanted(&alone, &peer).is_empty());
        assert!(wanted(&BTreeSet::new(), &peer).is_empty());
    }

    #[test]
    fn links_and_distances_grow_as_the_logarithm() {
        for n in [2, 3, 10, 50, 200, 1_000] {
            let live = ring(n, n);
            let log = u64::BITS - (n - 1).leading_zeros();
            let start = live.first().unwrap();
            let mut links = 0;
            for peer in &live {
                links += wanted(&live, peer).len();
            }
            let mean = links as f64 / n as f64;
            assert!(mean <= 2.0 + f64::from(log), "{n}: {mean} wanted on average");
            // Everybody is reached within that many steps, along links that either end wants.
            let mut reached = BTreeSet::from([*start]);
            for _ in 0..log {
                let more: Vec<_> = live
                    .iter()
                    .filter(|p| {
                        let own = wanted(&live, p);
                        reached.iter().any(|r| own.contains(r))
                    })
                    .copied()
                    .chain(reached.iter().flat_map(|r| wanted(&live, r)))
                    .collect();
                reached.extend(more);
            }
            assert_eq!(reached.len(), live.len(), "{n}");
        }
    }

    #[test]
    fn one_that_comes_changes_few_links() {
        let live = ring(100, 7);
        let more: BTreeSet<_> = live.iter().copied().chain(ring(1, 8)).collect();
        let changed: usize = live
            .iter()
            .map(|p| wanted(&live, p).symmetric_difference(&wanted(&more, p)).count())
            .sum();
        assert!(changed < 60, "{changed} of some 900");
    }
}
