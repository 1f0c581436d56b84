//! The thread that brings samples to the coordinator, one after another, each in pieces that can be taken up again.

use std::{
    collections::BTreeSet,
    sync::{
        Arc, Mutex, PoisonError,
        mpsc::{Receiver, RecvTimeoutError},
    },
    time::Duration,
};

use mesh_core::{Backoff, Name};
use tokio::time::Instant;

use super::{
    client::{Answer, Client, MAX_PIECE},
    shelf::{Item, Shelf},
};
use crate::{counters::Counters, dice};

/// The first wait after a failure is at most this.
const FIRST_WAIT_MS: u64 = 1_000;
/// No wait is longer: a coordinator that is back is noticed within minutes.
const MAX_WAIT_MS: u64 = 5 * 60 * 1_000;
/// Looks at the shelf even if nobody says that there is something new.
const LOOK_UP: Duration = Duration::from_secs(60);
/// Requests that one sample may take beyond its pieces, for a coordinator that changes its mind.
const SPARE_REQUESTS: u64 = 16;
/// Pieces that make sense at all.
const MIN_PIECE: u64 = 8 * 1024;

/// What became of one sample.
#[derive(Debug)]
enum Fate {
    Arrived,
    Refused(String),
    /// Something to try again; true if the coordinator was there.
    Later(String, bool),
    /// Somebody removed it in the meantime.
    Gone,
    Stopped,
}

/// What the thread works with.
pub(super) struct Sender {
    pub(super) device: Name,
    pub(super) client: Client,
    pub(super) shelf: Arc<Mutex<Shelf>>,
    /// Bytes a second; 0 is as fast as it goes.
    pub(super) rate: u64,
    /// At most this between two tries.
    pub(super) backoff: Backoff,
    pub(super) counters: Counters,
    /// A token for each new sample; closed when the agent stops.
    pub(super) news: Receiver<()>,
}

pub(super) const fn backoff() -> Backoff {
    Backoff::new(FIRST_WAIT_MS, MAX_WAIT_MS)
}

impl Sender {
    /// Sends until the agent stops. Blocks: it has a thread of its own.
    pub(super) fn run(mut self) {
        let mut tried = BTreeSet::new();
        let (mut refused_before, mut failing) = (false, false);
        loop {
            let next = self.shelf().next(&tried);
            let Some(item) = next else {
                if tried.is_empty() {
                    if !self.rest(LOOK_UP, true) {
                        return;
                    }
                } else {
                    // Each of them was tried once: start over.
                    tried.clear();
                }
                continue;
            };
            let fate = self.deliver(&item);
            match fate {
                Fate::Stopped => return,
                Fate::Gone => {
                    // Its files were taken away by hand, or it made room for another.
                    self.shelf().done(&item);
                }
                Fate::Arrived => {
                    self.backoff.reset();
                    failing = false;
                    self.shelf().done(&item);
                    self.counters.samples.sent.add(1);
                }
                Fate::Refused(why) => {
                    self.backoff.reset();
                    self.shelf().done(&item);
                    self.counters.samples.refused.add(1);
                    let (epoch, seq) = (item.key.epoch, item.key.seq);
                    if refused_before {
                        tracing::debug!(epoch, seq, "the coordinator refused a sample: {why}");
                    } else {
                        tracing::warn!(
                            epoch,
                            seq,
                            "the coordinator refused a sample: {why}; more of this is only counted"
                        );
                    }
                    refused_before = true;
                }
                Fate::Later(why, answered) => {
                    if answered {
                        // The next one may fare better.
                        tried.insert(item.key);
                    }
                    if !std::mem::replace(&mut failing, true) {
                        tracing::warn!("samples wait on the device: {why}");
                    }
                    let wait = self.backoff.next(dice::throw());
                    if !self.rest(Duration::from_millis(wait), false) {
                        return;
                    }
                }
            }
            self.count();
        }
    }

    fn shelf(&self) -> std::sync::MutexGuard<'_, Shelf> {
        self.shelf.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn count(&self) {
        let shelf = self.shelf();
        self.counters.samples.waiting.set(shelf.len() as u64);
        self.counters.samples.bytes.set(shelf.bytes());
    }

    /// One sample, from its words to the last byte of its image.
    fn deliver(&self, item: &Item) -> Fate {
        let Ok(json) = self.shelf().json(item.key) else {
            return Fate::Gone;
        };
        let begin = Instant::now();
        let answer = self.client.announce(&json);
        if !self.pace(begin, json.len()) {
            return Fate::Stopped;
        }
        let length = item.image.as_ref().map_or(0, |image| image.bytes);
        let mut offset = match answer {
            Answer::Has(offset) | Answer::HasInstead(offset) if offset <= length => offset,
            other => return fate(other, "its words"),
        };
        if offset == length {
            return Fate::Arrived;
        }
        let Ok(image) = self.shelf().image(item.key) else {
            return Fate::Gone;
        };
        let piece = self.piece();
        for _ in 0..length.div_ceil(piece) + SPARE_REQUESTS {
            let size = usize::try_from((length - offset).min(piece)).unwrap_or(MAX_PIECE);
            let rest = usize::try_from(offset).ok().and_then(|at| image.get(at..));
            let Some(bytes) = rest.and_then(|rest| rest.get(..size)) else {
                return Fate::Gone;
            };
            let begin = Instant::now();
            let answer = self.client.piece(&self.device, item.key, offset, bytes);
            if !self.pace(begin, size) {
                return Fate::Stopped;
            }
            offset = match answer {
                Answer::Has(now) if now > offset && now <= length => now,
                Answer::HasInstead(now) if now <= length => now,
                other => return fate(other, "its image"),
            };
            if offset == length {
                return Fate::Arrived;
            }
        }
        Fate::Later("the coordinator does not get on with an image".into(), true)
    }

    /// A second's worth, within what the coordinator takes.
    fn piece(&self) -> u64 {
        let most = MAX_PIECE as u64;
        if self.rate == 0 {
            most
        } else {
            self.rate.clamp(MIN_PIECE, most)
        }
    }

    /// Waits until `bytes` were due at the rate, counted from `begin`; false if the agent stops.
    fn pace(&self, begin: Instant, bytes: usize) -> bool {
        let due = match self.rate {
            0 => Duration::ZERO,
            rate => Duration::from_secs_f64(bytes as f64 / rate as f64),
        };
        self.rest(due.saturating_sub(begin.elapsed()), false)
    }

    /// Waits so long, or until there is news if it is to be woken; false if the agent stops.
    fn rest(&self, wait: Duration, wake: bool) -> bool {
        let end = Instant::now() + wait;
        loop {
            let left = end.saturating_duration_since(Instant::now());
            match self.news.recv_timeout(left) {
                Ok(()) if wake => return true,
                Ok(()) => {}
                Err(RecvTimeoutError::Timeout) => return true,
                Err(RecvTimeoutError::Disconnected) => return false,
            }
        }
    }
}

fn fate(answer: Answer, what: &str) -> Fate {
    match answer {
        Answer::Never(why) => Fate::Refused(format!("{what}: {why}")),
        Answer::Later(why) => Fate::Later(format!("{what}: {why}"), true),
        Answer::Nobody(why) => Fate::Later(why, false),
        Answer::Has(offset) | Answer::HasInstead(offset) => Fate::Later(
            format!("{what}: the coordinator says that it has {offset} bytes, which cannot be"),
            true,
        ),
    }
}

#[cfg(test)]
#[path = "sender_tests.rs"]
mod tests;
