//! Which frames a device hands to which neighbour.

use alloc::{collections::BTreeMap, vec::Vec};

use super::{MAX_KNOWN, MAX_OFFERS, Offer};
use crate::{Digest, roster::Peer};

/// Frames that are away at the same time: each is held in memory until it is back, and readings of its source wait.
pub const MAX_AWAY: usize = 4;
/// Of these, with one neighbour: the second one travels while the first is looked at.
const MAX_AWAY_EACH: usize = 2;
/// Frames whose margins say what is unusually uncertain: some ten seconds to some minutes of a camera.
const WINDOW: usize = 256;
/// Frames that may be asked about in a row, when few were lately.
const BURST: f64 = 16.0;
/// A result with this margin is not in doubt, however sure the others are.
const SURE: f32 = 0.98;
/// Deadlines missed in a row after which a neighbour is left for a while …
const MISSES: u32 = 3;
/// … this long at first, in milliseconds, and twice as long each time that it misses the next one, too …
const LEFT_MS: u64 = 5_000;
/// … but no longer than this.
const MAX_LEFT_MS: u64 = 300_000;
/// A neighbour that refuses has something else to do; it is asked again after this.
const REFUSED_MS: u64 = 1_000;
/// A neighbour that is less busy than this, in percent, is idle enough for frames that are none of its own.
const IDLE_LOAD: u8 = 50;

/// How a device asks.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Asking {
    /// About frames that its model is unsure of.
    pub escalate: bool,
    /// To be relieved of frames that it has no time for.
    pub spill: bool,
    /// The largest share of its frames that are asked about because it is unsure, 0..=1.
    pub share: f32,
    /// The margin below which it is unsure, 0..=1. Without one, it is what the share allows: those that are least sure
    /// among the last 256.
    pub below: Option<f32>,
    /// From this temperature on it would rather not look itself, in °C.
    pub hot: i8,
}

/// A neighbour that answers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Known {
    /// Its key.
    pub peer: Peer,
    /// How busy it says it is, in percent.
    pub load: u8,
    /// What it answers with.
    pub offers: Vec<Offer>,
    /// It is no neighbour but the coordinator, behind an uplink that others need, too: asked only where no neighbour can be.
    pub far: bool,
}

/// Who is to look at a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Chosen {
    /// The neighbour.
    pub peer: Peer,
    /// The model that it is to use.
    pub model: Digest,
}

/// What came of asking. Each [`Chosen`] comes to exactly one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Heard {
    /// An answer, after so many milliseconds.
    Answered(u64),
    /// It would not.
    Refused,
    /// Nothing, until it was too late; or the way there is broken.
    Missed,
    /// Something that no model says.
    Nonsense,
}

/// What is known of a neighbour from asking it.
#[derive(Clone, Debug, Default)]
struct Standing {
    /// Moving average of what it takes, in milliseconds; nothing before its first answer.
    ms: Option<u64>,
    /// Deadlines missed in a row.
    missed: u32,
    /// It is not asked before this.
    until_ms: u64,
    /// Frames that it has.
    away: usize,
}

impl Standing {
    /// After missed deadlines one frame has to come back before others are sent.
    const fn takes(&self, now_ms: u64) -> bool {
        let most = if self.missed >= MISSES {
            1
        } else {
            MAX_AWAY_EACH
        };
        now_ms >= self.until_ms && self.away < most
    }

    fn miss(&mut self, now_ms: u64) {
        self.missed = self.missed.saturating_add(1);
        if let Some(times) = self.missed.checked_sub(MISSES) {
            let longer = 1_u64.checked_shl(times).unwrap_or(u64::MAX);
            let left = LEFT_MS.saturating_mul(longer).min(MAX_LEFT_MS);
            self.until_ms = now_ms.saturating_add(left);
        }
    }
}

/// The device that asks.
#[derive(Clone, Debug)]
pub struct Asker {
    asking: Asking,
    known: Vec<Known>,
    standings: BTreeMap<Peer, Standing>,
    /// The last margins; the oldest is at `next` once there are [`WINDOW`].
    margins: Vec<f32>,
    next: usize,
    /// Frames that may be asked about now, at most [`BURST`]. It begins with none, so that the share holds from the
    /// first frame on.
    credit: f64,
    away: usize,
}

impl Asker {
    /// Knows nobody yet.
    #[must_use]
    pub const fn new(asking: Asking) -> Self {
        Self {
            asking,
            known: Vec::new(),
            standings: BTreeMap::new(),
            margins: Vec::new(),
            next: 0,
            credit: 0.0,
            away: 0,
        }
    }

    /// These answer now, and nobody else. What goes beyond the bounds is left out.
    pub fn know(&mut self, mut known: Vec<Known>) {
        known.truncate(MAX_KNOWN);
        for neighbour in &mut known {
            neighbour.offers.truncate(MAX_OFFERS);
        }
        // Who is gone and has frames still owes an account of them.
        self.standings.retain(|peer, standing| {
            standing.away > 0 || known.iter().any(|neighbour| neighbour.peer == *peer)
        });
        self.known = known;
    }

    /// The device's own model said something about a frame, with this margin: is somebody with a bigger one asked, too?
    /// To be called for each frame that it looked at.
    pub fn escalate(&mut self, own: &Offer, margin: f32, now_ms: u64) -> Option<Chosen> {
        if !self.asking.escalate {
            return None;
        }
        let share = f64::from(self.asking.share).clamp(0.0, 1.0);
        self.credit = (self.credit + share).min(BURST);
        let limit = match self.asking.below {
            Some(fixed) => fixed,
            // A little more where little was asked lately, a little less where much was: it is spent evenly.
            None => self.quantile(share * (0.5 + self.credit / BURST)).min(SURE),
        };
        self.remember(margin);
        // What is no number is no doubt, either: it is another trouble.
        let doubtful = margin <= limit;
        if !doubtful || self.credit < 1.0 {
            return None;
        }
        let better = |offer: &&Offer| {
            offer.kind == own.kind && offer.digest != own.digest && offer.bytes > own.bytes
        };
        let chosen = self.pick(
            |known| known.offers.iter().filter(better).max_by_key(|o| o.bytes),
            now_ms,
        )?;
        self.credit -= 1.0;
        Some(self.send(chosen))
    }

    /// Is a neighbour with the same model to look at a frame instead of this device? `behind`: frames wait for it.
    pub fn spill(
        &mut self,
        own: &Offer,
        behind: bool,
        warmth: Option<i8>,
        now_ms: u64,
    ) -> Option<Chosen> {
        let hot = warmth.is_some_and(|warmth| warmth >= self.asking.hot);
        if !self.asking.spill || !(behind || hot) {
            return None;
        }
        let same = |offer: &&Offer| offer.digest == own.digest;
        let idle = |known: &&Known| !known.far && known.load < IDLE_LOAD;
        let chosen = self.pick(
            |known| Some(known).filter(idle)?.offers.iter().find(same),
            now_ms,
        )?;
        Some(self.send(chosen))
    }

    /// What came of a frame that was sent to `peer`.
    pub fn heard(&mut self, peer: &Peer, heard: Heard, now_ms: u64) {
        self.away = self.away.saturating_sub(1);
        let Some(standing) = self.standings.get_mut(peer) else {
            return;
        };
        standing.away = standing.away.saturating_sub(1);
        match heard {
            Heard::Answered(ms) => {
                // An eighth of the new value, as everywhere.
                standing.ms = Some(
                    standing
                        .ms
                        .map_or(ms, |old| (old.saturating_mul(7).saturating_add(ms)) / 8),
                );
                standing.missed = 0;
            }
            Heard::Refused => {
                standing.until_ms = standing.until_ms.max(now_ms.saturating_add(REFUSED_MS))
            }
            Heard::Missed => standing.miss(now_ms),
            Heard::Nonsense => {
                standing.missed = standing.missed.max(MISSES - 1);
                standing.miss(now_ms);
            }
        }
    }

    /// Frames that are away.
    #[must_use]
    pub const fn away(&self) -> usize {
        self.away
    }

    /// Of those that may be asked: a neighbour, then the biggest model, then whoever answers soonest. Who was never asked is
    /// tried.
    fn pick<'a>(
        &'a self,
        offer: impl Fn(&'a Known) -> Option<&'a Offer>,
        now_ms: u64,
    ) -> Option<Chosen> {
        if self.away >= MAX_AWAY {
            return None;
        }
        let may = self.known.iter().filter_map(|neighbour| {
            let standing = self.standings.get(&neighbour.peer);
            let free = standing.is_none_or(|standing| standing.takes(now_ms));
            let offer = offer(neighbour).filter(|_| free)?;
            let ms = standing.and_then(|standing| standing.ms).unwrap_or(0);
            let away = standing.map_or(0, |standing| standing.away);
            let order = (
                neighbour.far,
                core::cmp::Reverse(offer.bytes),
                away,
                ms,
                neighbour.load,
                neighbour.peer,
            );
            Some((order, offer.digest))
        });
        let ((.., peer), model) = may.min_by(|(a, _), (b, _)| a.cmp(b))?;
        Some(Chosen { peer, model })
    }

    fn send(&mut self, chosen: Chosen) -> Chosen {
        self.away += 1;
        self.standings.entry(chosen.peer).or_default().away += 1;
        chosen
    }

    fn remember(&mut self, margin: f32) {
        if let Some(oldest) = self.margins.get_mut(self.next) {
            *oldest = margin;
        } else {
            self.margins.push(margin);
        }
        self.next = (self.next + 1) % WINDOW;
    }

    /// The margin below which this share of the last frames lies.
    fn quantile(&self, share: f64) -> f32 {
        let mut margins = self.margins.clone();
        if margins.is_empty() {
            return 0.0;
        }
        // Rounds down: at most 256.
        let at = ((margins.len() as f64 * share) as usize).min(margins.len() - 1);
        let (_, limit, _) = margins.select_nth_unstable_by(at, f32::total_cmp);
        *limit
    }
}
