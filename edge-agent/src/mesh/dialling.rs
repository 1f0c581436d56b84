//! Where neighbours may be found before anybody tells of them: addresses that are written down in `mesh.peers`, and those that
//! the coordinator names.
//!
//! Each is tried again, ever more rarely, until somebody has answered there and is known to be there: one that was down when
//! this device met others may be the only way to another network.

use std::net::SocketAddr;

use libp2p::swarm::ConnectionId;
use mesh_core::{Backoff, roster::Peer};

/// Addresses that are written down are tried at once when there is a roster, then after at most this …
const WRITTEN_MS: u64 = 500;
/// … and at last this: some bytes a minute …
const MAX_WRITTEN_MS: u64 = 60_000;
/// … or this, while nobody is linked.
const MAX_ALONE_MS: u64 = 10_000;
/// Those that the coordinator names wait a little for what mDNS and neighbours find, each device for another time …
const NAMED_MS: u64 = 3_000;
/// … and are tried at last so rarely that all of them, out of reach, are no traffic.
const MAX_NAMED_MS: u64 = 600_000;
/// Of those so many at the same time: the first who answers knows the others.
const NAMED_AT_ONCE: usize = 3;
/// Whether somebody at an address is still there is looked at so often.
const LOOK_MS: u64 = 5_000;

/// An address, and how it is with it.
#[derive(Debug)]
struct Place {
    address: SocketAddr,
    /// Who is to be there, by the coordinator's word. Whoever it is, where it is written down.
    named: Option<Peer>,
    /// Who has answered there last.
    reached: Option<Peer>,
    backoff: Backoff,
    next_ms: u64,
    dialled: Option<ConnectionId>,
    /// Why nobody was reached.
    why: Option<String>,
}

impl Place {
    fn new(address: SocketAddr, named: Option<Peer>) -> Self {
        let (base_ms, max_ms) = match named {
            Some(_) => (NAMED_MS, MAX_NAMED_MS),
            None => (WRITTEN_MS, MAX_WRITTEN_MS),
        };
        Self {
            address,
            named,
            reached: None,
            backoff: Backoff::new(base_ms, max_ms),
            next_ms: 0,
            dialled: None,
            why: None,
        }
    }

    fn wait(&mut self, is_alone: bool, now_ms: u64, random: u64) {
        let mut wait_ms = self.backoff.next(random);
        if is_alone && self.named.is_none() {
            wait_ms = wait_ms.min(MAX_ALONE_MS);
        }
        // Never at once: an address may be refused before the next line of this.
        self.next_ms = now_ms + wait_ms.max(WRITTEN_MS);
    }
}

/// One of them, for people.
#[derive(Debug)]
pub(super) struct Shown<'a> {
    pub(super) address: SocketAddr,
    pub(super) is_written: bool,
    /// Who is to be there, or has answered.
    pub(super) peer: Option<Peer>,
    pub(super) why: Option<&'a str>,
}

/// All of them.
#[derive(Debug, Default)]
pub(super) struct Places(Vec<Place>);

impl Places {
    pub(super) fn written(addresses: &[SocketAddr]) -> Self {
        Self(addresses.iter().map(|at| Place::new(*at, None)).collect())
    }

    /// The coordinator names these. What is known of those that it named before stays.
    pub(super) fn name(&mut self, named: &[(Peer, SocketAddr)], now_ms: u64, random: u64) {
        let is = |place: &Place| place.named.map(|peer| (peer, place.address));
        self.0
            .retain(|place| is(place).is_none_or(|place| named.contains(&place)));
        for (peer, address) in named {
            if self
                .0
                .iter()
                .any(|place| is(place) == Some((*peer, *address)))
            {
                continue;
            }
            let mut place = Place::new(*address, Some(*peer));
            place.next_ms = now_ms + WRITTEN_MS + random % NAMED_MS;
            self.0.push(place);
        }
    }

    /// Nobody was let in before, and some may be now: those that are written down are tried at once.
    pub(super) fn begin(&mut self) {
        for place in &mut self.0 {
            place.backoff.reset();
            if place.named.is_none() {
                place.next_ms = 0;
            }
        }
    }

    /// Those that are to be dialled now. `is_met` says whether somebody who is there is known by an address; it is told who was
    /// to be there, or was.
    pub(super) fn due(
        &mut self,
        now_ms: u64,
        is_met: impl Fn(Option<Peer>, SocketAddr) -> bool,
    ) -> Vec<(usize, SocketAddr, Option<Peer>)> {
        let is_under_way = |place: &&Place| place.named.is_some() && place.dialled.is_some();
        let under_way = self.0.iter().filter(is_under_way).count();
        let mut free = NAMED_AT_ONCE.saturating_sub(under_way);
        let mut due = Vec::new();
        for (n, place) in self.0.iter_mut().enumerate() {
            if place.dialled.is_some() || now_ms < place.next_ms {
                continue;
            }
            if is_met(place.named.or(place.reached), place.address) {
                place.backoff.reset();
                place.why = None;
                place.next_ms = now_ms + LOOK_MS;
                continue;
            }
            if place.named.is_some() {
                if free == 0 {
                    continue;
                }
                free -= 1;
            }
            due.push((n, place.address, place.named));
        }
        due
    }

    /// The `n`-th is being dialled.
    pub(super) fn dialled(&mut self, n: usize, by: ConnectionId) {
        if let Some(place) = self.0.get_mut(n) {
            place.dialled = Some(by);
        }
    }

    /// Somebody has answered: where, if it was one of these.
    pub(super) fn reached(
        &mut self,
        by: ConnectionId,
        peer: Peer,
        now_ms: u64,
    ) -> Option<SocketAddr> {
        let place = self.0.iter_mut().find(|p| p.dialled == Some(by))?;
        place.dialled = None;
        place.reached = Some(peer);
        place.why = None;
        place.backoff.reset();
        place.next_ms = now_ms + LOOK_MS;
        Some(place.address)
    }

    /// Nobody has, or not the right one.
    pub(super) fn failed(
        &mut self,
        by: ConnectionId,
        why: &str,
        is_alone: bool,
        now_ms: u64,
        random: u64,
    ) {
        if let Some(place) = self.0.iter_mut().find(|p| p.dialled == Some(by)) {
            place.dialled = None;
            place.why = Some(why.to_owned());
            place.wait(is_alone, now_ms, random);
        }
    }

    /// This device itself is there.
    pub(super) fn is_own(&mut self, by: ConnectionId) {
        self.0.retain(|place| place.dialled != Some(by));
    }

    /// For people.
    pub(super) fn shown(&self) -> impl Iterator<Item = Shown<'_>> {
        self.0.iter().map(|place| Shown {
            address: place.address,
            is_written: place.named.is_none(),
            peer: place.named.or(place.reached),
            why: place.why.as_deref(),
        })
    }
}

#[cfg(test)]
mod tests {
    use mesh_core::Digest;

    use super::*;

    fn at(port: u16) -> SocketAddr {
        SocketAddr::from(([10, 0, 0, 1], port))
    }

    fn nobody(_: Option<Peer>, _: SocketAddr) -> bool {
        false
    }

    #[test]
    fn what_is_written_down_is_tried_until_somebody_there_is_met() {
        let mut places = Places::written(&[at(1), at(2)]);
        let mut now_ms = 0;
        // Somebody at the second one is there all the time.
        let is_met = |_: Option<Peer>, address: SocketAddr| address == at(2);
        let mut tries = 0;
        for n in 0..100_000 {
            for (which, address, named) in places.due(now_ms, is_met) {
                assert_eq!((address, named), (at(1), None));
                let id = ConnectionId::new_unchecked(n);
                places.dialled(which, id);
                assert!(places.due(now_ms, is_met).is_empty(), "twice at once");
                places.failed(id, "nothing listens there", false, now_ms, MAX_WRITTEN_MS);
                tries += 1;
            }
            now_ms += 100;
        }
        // Hours of it: again and again, and ever more rarely.
        let least = now_ms / MAX_WRITTEN_MS / 2;
        assert!((least..1_000).contains(&tries), "{tries} tries");
        let shown: Vec<_> = places.shown().collect();
        assert_eq!(shown[0].why, Some("nothing listens there"));
        assert_eq!(shown[1].why, None);
        // Alone, it is tried more often.
        let (which, ..) = places.due(now_ms + MAX_WRITTEN_MS, nobody)[0];
        let id = ConnectionId::new_unchecked(7);
        places.dialled(which, id);
        places.failed(id, "", true, now_ms, MAX_WRITTEN_MS - 1);
        assert!(places.0[0].next_ms <= now_ms + MAX_ALONE_MS);
    }

    #[test]
    fn who_has_answered_is_asked_for_by_name_and_dialled_again_when_it_is_gone() {
        let mut places = Places::written(&[at(1)]);
        let (id, peer) = (ConnectionId::new_unchecked(1), Digest([1; 32]));
        let (which, ..) = places.due(0, nobody)[0];
        places.dialled(which, id);
        assert_eq!(places.reached(id, peer, 0), Some(at(1)));
        assert!(places.due(LOOK_MS - 1, nobody).is_empty());
        let is_met = |who: Option<Peer>, _: SocketAddr| who == Some(peer);
        assert!(places.due(LOOK_MS, is_met).is_empty());
        assert_eq!(places.due(2 * LOOK_MS, nobody).len(), 1);
        // An address that is this device's own is none.
        places.dialled(0, id);
        places.is_own(id);
        assert_eq!(places.shown().count(), 0);
    }

    #[test]
    fn those_that_the_coordinator_names_are_dialled_a_few_at_a_time_and_not_at_once() {
        let mut places = Places::written(&[at(1)]);
        let named: Vec<_> = (0..9)
            .map(|n| (Digest([n; 32]), at(u16::from(n) + 10)))
            .collect();
        places.name(&named, 0, 0);
        let due = places.due(WRITTEN_MS + NAMED_MS, nobody);
        assert_eq!(due.len(), 1 + NAMED_AT_ONCE);
        for (n, (which, ..)) in due.into_iter().enumerate() {
            places.dialled(which, ConnectionId::new_unchecked(n));
        }
        assert!(places.due(WRITTEN_MS + NAMED_MS, nobody).is_empty());
        // Those that are named again are what they were; the others are forgotten.
        places.name(&named[..2], 0, 0);
        assert_eq!(places.shown().count(), 3);
        assert!(places.due(0, nobody).is_empty());
        places.name(&[], 0, 0);
        assert_eq!(places.shown().count(), 1);
    }
}
