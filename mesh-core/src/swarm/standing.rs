//! Who has served other bytes than it was asked for.

use alloc::collections::BTreeMap;

use crate::roster::{MAX_MEMBERS, Peer};

/// A disk or a cable may be bad once; three times is a device that nobody should hear.
const STRIKES: u8 = 3;
/// After the first time nothing is asked of it for this, after the second for ten times as long.
const LEFT_MS: u64 = 60_000;

/// What neighbours have done, over one fetch and the next. Forgotten when the agent ends.
#[derive(Clone, Debug, Default)]
pub struct Standing {
    strikes: BTreeMap<Peer, (u8, u64)>,
}

impl Standing {
    /// It has served other bytes. True if it is banned with that.
    pub fn bad(&mut self, peer: Peer, now_ms: u64) -> bool {
        // Members of a roster only; those of older rosters make room.
        if self.strikes.len() >= MAX_MEMBERS && !self.strikes.contains_key(&peer) {
            self.strikes.pop_first();
        }
        let (strikes, until_ms) = self.strikes.entry(peer).or_default();
        *strikes = strikes.saturating_add(1);
        *until_ms = match *strikes {
            0 | 1 => now_ms + LEFT_MS,
            _ => now_ms + 10 * LEFT_MS,
        };
        *strikes == STRIKES
    }

    /// May it be asked?
    #[must_use]
    pub fn is_good(&self, peer: &Peer, now_ms: u64) -> bool {
        let known = self.strikes.get(peer);
        known.is_none_or(|(strikes, until_ms)| *strikes < STRIKES && now_ms >= *until_ms)
    }

    /// Neighbours that are not asked any more.
    #[must_use]
    pub fn banned(&self) -> usize {
        let all = self.strikes.values();
        all.filter(|(strikes, _)| *strikes >= STRIKES).count()
    }
}
