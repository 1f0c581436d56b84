//! Who brings which piece of a release: from neighbours what they have, over the uplink what nobody has, once for a site.
//!
//! ```text
//!                     has somebody it?  ──yes──> ask the one who is asked least; rarest pieces first
//!  a piece that is       │ no
//!  missing               ▼
//!                     whose is it, of those that fetch the same and reach the coordinator?
//!                        │ mine             │ another's
//!                        ▼                  ▼
//!                     ask the coordinator   wait, as long as that one gets on
//! ```
//!
//! Whose a piece is, everybody computes alike, from the names of the piece and of the devices: nothing is negotiated, and two
//! that see the site differently for a moment fetch a piece twice at worst. Nobody is believed: what a neighbour says it has is
//! asked of it, who does not get on is waited for no longer, and who sends other bytes is left.
//!
//! The machine is pure: time is a clock that only goes forward, in milliseconds. That the bytes are right is seen by whoever
//! drives it, before it calls [`Plan::got`].

use alloc::{
    collections::{BTreeMap, BTreeSet},
    vec,
    vec::Vec,
};

use crate::{Digest, roster::Peer};

mod standing;
#[cfg(test)]
mod tests;

pub use standing::Standing;

/// Pieces that are asked of neighbours at the same time: each is in memory until it is on the disk.
pub const AT_ONCE: usize = 8;
/// … and of one of them.
pub const PER_NEIGHBOUR: usize = 2;
/// Devices of a site that fetch from the coordinator at the same time: enough to fill an uplink whatever its latency, few
/// enough that a slow one brings each piece within the patience of the others.
const CARRIERS: usize = 4;
/// Before the coordinator is asked those that were told to fetch the same are to have heard of each other: a device may say
/// something new of itself two seconds after the last time, and it takes a moment to be heard and looked at.
pub const SETTLE_MS: u64 = 3_000;
/// A device that is to bring a piece and has brought none for so long is waited for no longer: one of 256 KiB takes this at
/// 100 kbit/s.
pub const PATIENCE_MS: u64 = 20_000;
/// A neighbour that was busy, or has lost its connection, is asked again after this, then after twice as long …
const BUSY_MS: u64 = 250;
/// … and so on up to this.
const MAX_BUSY_MS: u64 = 8_000;
/// Busy so often in a row is as good as not there.
const MAX_BUSY: u32 = 6;
/// One that did not answer at all, or with other bytes, is left for this, then for twice as long …
const SILENT_MS: u64 = 15_000;
/// … and so on up to this.
const MAX_SILENT_MS: u64 = 120_000;
/// The coordinator is asked again after it could not be reached, then after twice as long …
const LINE_MS: u64 = 5_000;
/// … and so on up to this.
const MAX_LINE_MS: u64 = 60_000;
/// Nothing has come from anybody for so long: it is given up, to be begun again later.
const STALL_MS: u64 = 180_000;

/// What is known of a neighbour.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Offer {
    /// Which pieces it has, in the order of the plan. Shorter is none of the rest.
    pub has: Vec<bool>,
    /// Is it fetching the same?
    pub fetches: bool,
    /// Does it reach the coordinator?
    pub uplink: bool,
}

/// Where a piece comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Source {
    /// Another device of the site.
    Neighbour(Peer),
    /// Over the uplink.
    Coordinator,
}

/// "Fetch this piece there."
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ask {
    /// Its number in the plan.
    pub piece: usize,
    /// From whom.
    pub of: Source,
}

/// Why a piece did not come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// It has too much to do, or the connection has ended: it may be as well in a moment.
    Busy,
    /// It does not have it.
    Missing,
    /// No answer in time.
    Silent,
    /// Other bytes than it was asked for.
    Bad,
}

/// A neighbour, as it has shown itself.
#[derive(Clone, Debug)]
struct Known {
    offer: Offer,
    /// What it said it has, and had not.
    denied: BTreeSet<usize>,
    /// It had something new, or was new itself.
    progress_ms: u64,
    /// It is not asked before this.
    rest_ms: u64,
    /// … and nothing is expected of it either.
    is_left: bool,
    /// Faults in a row.
    faults: u32,
    asked: usize,
}

/// The way to the coordinator.
#[derive(Clone, Copy, Debug)]
struct Line {
    rest_ms: u64,
    faults: u32,
    is_asked: bool,
}

#[derive(Clone, Copy, Debug)]
struct Piece {
    name: Digest,
    is_here: bool,
    is_asked: bool,
}

/// What is missing, and who may have it.
#[derive(Clone, Debug)]
pub struct Plan {
    me: Peer,
    key: Digest,
    pieces: Vec<Piece>,
    neighbours: BTreeMap<Peer, Known>,
    line: Line,
    /// The coordinator is not asked before.
    settled_ms: u64,
    patience_ms: u64,
    /// Something came, or it began.
    got_ms: u64,
}

/// Spreads names evenly: all devices come to the same.
fn mix(a: &Digest, b: &Digest) -> u64 {
    let mut hash = 0_u64;
    for bytes in [a, b] {
        for eight in bytes.0.as_chunks::<8>().0 {
            // SplitMix64's steps (Steele, Lea, Flood 2014).
            hash = (hash ^ u64::from_be_bytes(*eight)).wrapping_add(0x9e37_79b9_7f4a_7c15);
            hash = (hash ^ (hash >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            hash = (hash ^ (hash >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
            hash ^= hash >> 31;
        }
    }
    hash
}

/// The first `most` of these devices, in an order that everybody has for the same `key` and that is another for each key.
#[must_use]
pub fn first(key: &Digest, peers: impl Iterator<Item = Peer>, most: usize) -> Vec<Peer> {
    let mut all: Vec<Peer> = peers.collect();
    all.sort_by_key(|peer| (mix(key, peer), *peer));
    all.dedup();
    all.truncate(most);
    all
}

/// Doubles with each fault.
fn rest(first_ms: u64, faults: u32, most_ms: u64) -> u64 {
    let doubled = first_ms.saturating_mul(1 << faults.saturating_sub(1).min(16));
    doubled.min(most_ms)
}

impl Plan {
    /// For the device `me`: `key` names what is fetched, `pieces` are its parts. The coordinator is not asked before
    /// `settled_ms`; who brings nothing for `patience_ms` is not waited for.
    #[must_use]
    pub fn new(
        me: Peer,
        key: Digest,
        pieces: impl Iterator<Item = Digest>,
        (settled_ms, patience_ms): (u64, u64),
        now_ms: u64,
    ) -> Self {
        let piece = |name| Piece {
            name,
            is_here: false,
            is_asked: false,
        };
        Self {
            me,
            key,
            pieces: pieces.map(piece).collect(),
            neighbours: BTreeMap::new(),
            line: Line {
                rest_ms: 0,
                faults: 0,
                is_asked: false,
            },
            settled_ms,
            patience_ms,
            got_ms: now_ms,
        }
    }

    /// The coordinator did not answer a moment ago.
    pub fn line_is_down(&mut self, now_ms: u64) {
        self.line.faults += 1;
        self.line.rest_ms = now_ms + rest(LINE_MS, self.line.faults, MAX_LINE_MS);
    }

    /// What a neighbour says of itself.
    pub fn offer(&mut self, peer: Peer, mut offer: Offer, now_ms: u64) {
        let Some(known) = self.neighbours.get_mut(&peer) else {
            let known = Known {
                offer,
                denied: BTreeSet::new(),
                progress_ms: now_ms,
                rest_ms: 0,
                is_left: false,
                faults: 0,
                asked: 0,
            };
            self.neighbours.insert(peer, known);
            return;
        };
        for piece in &known.denied {
            if let Some(has) = offer.has.get_mut(*piece) {
                *has = false;
            }
        }
        // Only what can be asked of it counts: words do not keep anybody waiting.
        let is_new =
            |(n, piece): (usize, &Piece)| !piece.is_here && has(&offer, n) && !has(&known.offer, n);
        let is_back = offer.fetches && !known.offer.fetches;
        if is_back || self.pieces.iter().enumerate().any(is_new) {
            known.progress_ms = now_ms;
        }
        known.offer = offer;
    }

    /// A neighbour is not there any more, or not to be spoken with.
    pub fn gone(&mut self, peer: &Peer) {
        self.neighbours.remove(peer);
    }

    /// A piece has come and is what it should be.
    pub fn got(&mut self, piece: usize, of: Source, now_ms: u64) {
        self.done(piece, of);
        if let Some(piece) = self.pieces.get_mut(piece) {
            piece.is_here = true;
        }
        self.got_ms = now_ms;
        match of {
            Source::Coordinator => self.line.faults = 0,
            Source::Neighbour(peer) => {
                if let Some(known) = self.neighbours.get_mut(&peer) {
                    known.faults = 0;
                    known.is_left = false;
                }
            }
        }
    }

    /// A piece did not come.
    pub fn failed(&mut self, piece: usize, of: Source, fault: Fault, now_ms: u64) {
        self.done(piece, of);
        let Source::Neighbour(peer) = of else {
            return self.line_is_down(now_ms);
        };
        let Some(known) = self.neighbours.get_mut(&peer) else {
            return;
        };
        if fault == Fault::Missing {
            known.denied.insert(piece);
            if let Some(has) = known.offer.has.get_mut(piece) {
                *has = false;
            }
        }
        known.faults += 1;
        let (first, most) = match fault {
            Fault::Silent | Fault::Bad => (SILENT_MS, MAX_SILENT_MS),
            Fault::Busy | Fault::Missing => (BUSY_MS, MAX_BUSY_MS),
        };
        known.is_left = first == SILENT_MS || known.faults >= MAX_BUSY;
        known.rest_ms = now_ms + rest(first, known.faults, most);
    }

    fn done(&mut self, piece: usize, of: Source) {
        if let Some(piece) = self.pieces.get_mut(piece) {
            piece.is_asked = false;
        }
        match of {
            Source::Coordinator => self.line.is_asked = false,
            Source::Neighbour(peer) => {
                if let Some(known) = self.neighbours.get_mut(&peer) {
                    known.asked = known.asked.saturating_sub(1);
                }
            }
        }
    }

    /// Is everything here?
    #[must_use]
    pub fn is_done(&self) -> bool {
        self.pieces.iter().all(|piece| piece.is_here)
    }

    /// Does this device reach the coordinator, as far as it knows? Its neighbours are told.
    #[must_use]
    pub const fn has_line(&self, now_ms: u64) -> bool {
        self.line.faults == 0 || now_ms >= self.line.rest_ms
    }

    /// Is there nothing more to hope for? The coordinator has failed and nobody else can help, or nothing has come for three
    /// minutes.
    #[must_use]
    pub fn is_hopeless(&self, now_ms: u64) -> bool {
        let asked = self.pieces.iter().any(|piece| piece.is_asked);
        let can_help = |known: &Known| {
            let mut missing = self.pieces.iter().enumerate().filter(|(_, p)| !p.is_here);
            (known.offer.fetches && known.offer.uplink)
                || missing.any(|(n, _)| has(&known.offer, n))
        };
        let alone = !self.neighbours.values().any(can_help);
        (self.line.faults > 0 && !asked && alone && now_ms >= self.settled_ms)
            || now_ms >= self.got_ms + STALL_MS
    }

    /// What to fetch now. Each is to be answered by [`Self::got`] or [`Self::failed`].
    pub fn asks(&mut self, now_ms: u64) -> Vec<Ask> {
        let mut asks = self.of_neighbours(now_ms);
        asks.extend(self.of_the_coordinator(now_ms));
        asks
    }

    fn of_neighbours(&mut self, now_ms: u64) -> Vec<Ask> {
        let mut free =
            AT_ONCE.saturating_sub(self.neighbours.values().map(|known| known.asked).sum());
        if free == 0 || self.neighbours.is_empty() {
            return Vec::new();
        }
        let mut count = vec![0_usize; self.pieces.len()];
        for known in self
            .neighbours
            .values()
            .filter(|known| now_ms >= known.rest_ms)
        {
            for (n, has) in count.iter_mut().zip(&known.offer.has) {
                *n += usize::from(*has);
            }
        }
        let mut wanted: Vec<_> = (0..).zip(&self.pieces).zip(&count).collect();
        wanted.retain(|((_, piece), count)| **count > 0 && !piece.is_here && !piece.is_asked);
        // Two that want the same do not begin with the same: then they have something for each other.
        wanted.sort_by_cached_key(|((n, piece), count)| (**count, mix(&self.me, &piece.name), *n));
        let wanted: Vec<usize> = wanted.into_iter().map(|((n, _), _)| n).collect();
        let mut asks = Vec::new();
        for n in wanted {
            let Some(piece) = self.pieces.get_mut(n) else {
                continue;
            };
            let holders = self.neighbours.iter_mut().filter(|(_, known)| {
                now_ms >= known.rest_ms && known.asked < PER_NEIGHBOUR && has(&known.offer, n)
            });
            let least = holders.min_by_key(|(peer, known)| {
                // Each asks another one first.
                (known.asked, mix(&self.me, peer) ^ mix(&piece.name, peer))
            });
            let Some((peer, known)) = least else {
                continue;
            };
            known.asked += 1;
            piece.is_asked = true;
            asks.push(Ask {
                piece: n,
                of: Source::Neighbour(*peer),
            });
            free -= 1;
            if free == 0 {
                break;
            }
        }
        asks
    }

    fn of_the_coordinator(&mut self, now_ms: u64) -> Option<Ask> {
        if self.line.is_asked || now_ms < self.settled_ms || now_ms < self.line.rest_ms {
            return None;
        }
        let is_held = |n| {
            let mut all = self.neighbours.values();
            all.any(|known| !(known.is_left && now_ms < known.rest_ms) && has(&known.offer, n))
        };
        let carriers = self.carriers(now_ms);
        let alone = self.neighbours.is_empty();
        let mine = (0..).zip(&self.pieces).filter(|(n, piece)| {
            !piece.is_here && !piece.is_asked && !is_held(*n) && self.is_mine(piece, &carriers)
        });
        let (piece, _) = mine.min_by_key(|(n, piece)| match alone {
            // In the order of the file: what is cut off goes on where it was.
            true => (0, *n),
            false => (mix(&self.me, &piece.name), *n),
        })?;
        self.pieces.get_mut(piece)?.is_asked = true;
        self.line.is_asked = true;
        Some(Ask {
            piece,
            of: Source::Coordinator,
        })
    }

    /// All that fetch the same over an uplink, in the order in which they are to: the first few carry, the next takes the
    /// place of one that does not get on. With each, whether it does.
    fn carriers(&self, now_ms: u64) -> Vec<(Peer, bool)> {
        let others = self.neighbours.iter().filter_map(|(peer, known)| {
            let left = known.is_left && now_ms < known.rest_ms;
            let can = known.offer.fetches && known.offer.uplink && !left;
            can.then_some((*peer, now_ms < known.progress_ms + self.patience_ms))
        });
        let mut all: Vec<_> = others.chain([(self.me, true)]).collect();
        all.sort_by_key(|(peer, _)| (mix(&self.key, peer), *peer));
        all
    }

    fn is_mine(&self, piece: &Piece, carriers: &[(Peer, bool)]) -> bool {
        let (first, more) = carriers.split_at(carriers.len().min(CARRIERS));
        let by_piece = first.iter().filter(|(_, gets_on)| *gets_on);
        let best = by_piece.max_by_key(|(peer, _)| mix(&piece.name, peer));
        let best = best.or_else(|| more.iter().find(|(_, gets_on)| *gets_on));
        best.is_none_or(|(peer, _)| *peer == self.me)
    }
}

fn has(offer: &Offer, piece: usize) -> bool {
    offer.has.get(piece).copied().unwrap_or(false)
}
