//! When somebody is gone: each device watches the one before it in the ring, and, once that one is silent, those before that.

use alloc::vec::Vec;

use super::{Action, Frame, Neighbours, Sign, ring};
use crate::roster::Peer;

/// A watcher that has missed one asks, for this may be how it is: the other thinks that somebody else watches it …
pub(super) const PROBE_MS: u64 = 3_000;
/// … and asks once more.
const PROBE_AGAIN_MS: u64 = 750;
/// A beat and two questions without an answer: the device is gone, and that is to be known within 5 s.
pub(super) const GONE_MS: u64 = PROBE_MS + 2 * PROBE_AGAIN_MS;
/// While the one that is watched does not answer, those before it in the ring are asked too: their watchers may have gone with it.
/// So many: what stands behind one switch goes at once.
const AHEAD: usize = 7;
/// One of these that has given no sign for so long, once it is its turn, is gone. A link is made in a fraction of that, also if
/// the first packet is lost.
const AHEAD_MS: u64 = 2_000;

/// Whom this device watches.
#[derive(Clone, Copy, Debug)]
pub(super) struct Watch {
    peer: Peer,
    since_ms: u64,
    /// It was last asked whether it is there, since it was last heard.
    asked_ms: Option<u64>,
}

impl Neighbours {
    /// Several that stand side by side may have gone together: then they are gone one after the other, but at once.
    pub(super) fn watch(&mut self, now_ms: u64, sign: Sign<'_>, out: &mut Vec<Action>) {
        while let Some(gone) = self.look_at_the_watched(now_ms, out) {
            self.accuse(gone, now_ms, sign, out);
        }
    }

    /// The one that is watched, if it is gone.
    fn look_at_the_watched(&mut self, now_ms: u64, out: &mut Vec<Action>) -> Option<Peer> {
        let Some(peer) = ring::before(&self.live, &self.me) else {
            self.watch = None;
            self.ahead.clear();
            return None;
        };
        // It has its full time from now, unless it was asked already.
        let since_ms = self.ahead.get(&peer).map_or(now_ms, |asked_ms| {
            (asked_ms + AHEAD_MS).saturating_sub(GONE_MS)
        });
        let mut watch = self
            .watch
            .filter(|watch| watch.peer == peer)
            .unwrap_or(Watch {
                peer,
                since_ms,
                asked_ms: None,
            });
        let heard = self.links.get(&peer).map_or(0, |link| link.heard_ms);
        let silent_ms = now_ms - heard.max(watch.since_ms);
        if silent_ms < PROBE_MS {
            watch.asked_ms = None;
            self.ahead.clear();
        } else if watch
            .asked_ms
            .is_none_or(|asked| now_ms >= asked + PROBE_AGAIN_MS)
        {
            watch.asked_ms = Some(now_ms);
            if self.links.contains_key(&peer) {
                out.push(Action::Send(peer, Frame::Probe));
            }
            self.ask_ahead(peer, now_ms, out);
        }
        let is_gone = silent_ms >= GONE_MS;
        self.watch = (!is_gone).then_some(watch);
        is_gone.then_some(peer)
    }

    /// Asks those before one that does not answer for a sign of life.
    fn ask_ahead(&mut self, watched: Peer, now_ms: u64, out: &mut Vec<Action>) {
        let mut before = watched;
        for _ in 0..AHEAD {
            match ring::before(&self.live, &before) {
                Some(next) if next != self.me && next != watched => before = next,
                _ => break,
            }
            let asked_ms = *self.ahead.entry(before).or_insert(now_ms);
            match self.links.get(&before) {
                Some(link) if link.heard_ms > asked_ms => {}
                Some(_) => out.push(Action::Send(before, Frame::Probe)),
                None => self.dial(before, now_ms, out),
            }
        }
    }
}
