//! How a device comes to the settings that it should have, and back by itself if they do it harm.
//!
//! ```text
//!  settled ──> fetching ──────> begun ══ the agent starts anew ══> watching ──> settled with the new ones
//!     ▲        (and checked)                                          │
//!     │           │ refused: marked as bad                            │ no broker, a blind source, three starts
//!     └───────────┴────────── back on the last good ones ═════════════┘ (marked as bad, the agent starts anew)
//! ```
//!
//! Settings hold for one life of the agent: what is to be loaded is written down, then the agent starts anew. So a
//! process that is killed at any moment comes back with exactly what is on the disk, and that is either good or counted.
//!
//! The machine is pure. Its driver carries out the [`Action`]s in their order, each only when the one before is done.
//! [`Action::Save`] is done when it would survive a power cut; if it cannot be done, nothing behind it is.

use alloc::{boxed::Box, format, string::String, vec::Vec};

use crate::{Backoff, Digest, Failure, Name, Phase, Reason, SettingsReport};

mod action;
mod document;
mod saved;
#[cfg(test)]
mod tests;

pub use action::{Action, Input, Seen};
use document::same;
pub use document::{Document, MAX_SETTINGS_BYTES, Settings, Whom, refused};
pub use saved::{Begun, Saved};

/// With settings on trial the agent may start so often; once more, and it was a crash too many.
const MAX_STARTS: u32 = 3;
/// What works within so much time of a start is what has to work with new settings, too; and new settings hold at least
/// so long before they are kept.
const LOOK_MS: u64 = 10_000;
/// A document is small: this is for when an answer gets lost.
const FETCH_MS: u64 = 10 * 60_000;
/// The first wait after a failure by circumstance …
const WAIT_MS: u64 = 5_000;
/// … and the longest.
const MAX_WAIT_MS: u64 = 10 * 60_000;

/// One life of the agent. Times are milliseconds of a clock that only goes forward.
#[derive(Clone, Debug)]
pub struct Adoption {
    saved: Saved,
    phase: Phase,
    ticket: u64,
    running_ms: u64,
    since_ms: u64,
    now_ms: u64,
    wait_ms: u64,
    loaded: Option<Settings>,
    failure: Option<Failure>,
    seen: Seen,
    backoff: Backoff,
    random: u64,
    actions: Vec<Action>,
}

impl Adoption {
    /// Goes on from what was saved; `random` is any number, best another one on each device.
    #[must_use]
    pub fn resume(saved: Saved, now_ms: u64, random: u64) -> (Self, Vec<Action>) {
        let mut adoption = Self {
            saved,
            phase: Phase::Loading,
            ticket: 0,
            running_ms: now_ms,
            since_ms: now_ms,
            now_ms,
            wait_ms: 0,
            loaded: None,
            failure: None,
            seen: Seen::default(),
            backoff: Backoff::new(WAIT_MS, MAX_WAIT_MS),
            random,
            actions: Vec::new(),
        };
        adoption.count_start();
        adoption.load();
        let actions = core::mem::take(&mut adoption.actions);
        (adoption, actions)
    }

    /// Takes an input in and says what to do.
    pub fn step(&mut self, input: Input, now_ms: u64) -> Vec<Action> {
        self.now_ms = self.now_ms.max(now_ms);
        let before = self.report();
        match input {
            Input::Wish { revision, settings } => self.wish(revision, settings),
            Input::Done { ticket, result } if ticket == self.ticket => self.done(result),
            Input::Running if self.phase == Phase::Loading => {
                self.running_ms = self.now_ms;
                if self.saved.begun.is_some() {
                    self.enter(Phase::Watching);
                } else {
                    self.converge();
                }
                self.actions.push(Action::Report);
            }
            Input::Seen(seen) => self.seen = seen,
            Input::Stopping if self.saved.begun.is_some() && self.saved.starts > 0 => {
                self.saved.starts -= 1;
                self.save();
            }
            Input::Done { .. } | Input::Running | Input::Stopping | Input::Tick => {}
        }
        self.look();
        self.watch_the_clock();
        if self.report() != before {
            self.actions.push(Action::Report);
        }
        core::mem::take(&mut self.actions)
    }

    /// What it is doing.
    #[must_use]
    pub const fn phase(&self) -> Phase {
        self.phase
    }

    /// What is, or is being, saved.
    #[must_use]
    pub const fn saved(&self) -> &Saved {
        &self.saved
    }

    /// When [`Input::Tick`] is due, if nothing happens before.
    #[must_use]
    pub fn due_ms(&self) -> Option<u64> {
        let after = match self.phase {
            Phase::Waiting => self.wait_ms,
            Phase::Fetching => FETCH_MS,
            Phase::Watching if self.is_well() => LOOK_MS,
            Phase::Watching => self.trial_ms(),
            _ => return None,
        };
        Some(self.since_ms.saturating_add(after))
    }

    /// What to tell the coordinator.
    #[must_use]
    pub fn report(&self) -> SettingsReport {
        SettingsReport {
            phase: self.phase,
            target: self.saved.wished,
            loaded: self.loaded,
            failure: self.failure.clone(),
            bad: self.saved.bad.iter().map(|bad| bad.digest).collect(),
        }
    }

    // What can happen.

    fn wish(&mut self, revision: u64, settings: Option<Settings>) {
        if revision <= self.saved.revision {
            return;
        }
        let goes_on = same(settings.as_ref(), self.saved.wished.as_ref());
        self.saved.revision = revision;
        self.saved.wished = settings;
        let begun = self.saved.begun.as_ref().map(|begun| begun.settings);
        match self.phase {
            Phase::Watching if !same(settings.as_ref(), begun.as_ref()) => {
                self.saved.end_trial();
                self.restart();
            }
            Phase::Settled | Phase::Waiting | Phase::Fetching if !goes_on => {
                self.save();
                self.failure = None;
                self.backoff.reset();
                self.converge();
            }
            // Otherwise it is what is being done; or the agent starts, and looks at its wish afterwards.
            _ => self.save(),
        }
    }

    fn done(&mut self, result: Result<(), Failure>) {
        match (self.phase, result) {
            (Phase::Loading, Ok(())) => self.loaded = self.saved.loads().copied(),
            (Phase::Loading, Err(failure)) => {
                let Some(settings) = self.saved.loads().copied() else {
                    return;
                };
                self.note(settings.digest, failure);
                if self.saved.begun.is_none() {
                    self.saved.good = None;
                }
                self.saved.end_trial();
                self.save();
                self.load();
            }
            (Phase::Fetching, Ok(())) => {
                if let Some(settings) = self.saved.wished {
                    self.saved.begun = Some(Begun {
                        settings,
                        sources: self.seen.sources.clone(),
                    });
                    self.saved.starts = 0;
                    self.restart();
                }
            }
            (Phase::Fetching, Err(failure)) => {
                let Some(settings) = self.saved.wished else {
                    return;
                };
                if self.note(settings.digest, failure) {
                    self.save();
                    self.converge();
                } else {
                    self.wait();
                }
            }
            _ => {}
        }
    }

    /// Is the trial decided?
    fn look(&mut self) {
        if self.phase != Phase::Watching || !self.is_over() {
            return;
        }
        let Some(begun) = self.saved.begun.clone() else {
            return;
        };
        if self.is_well() {
            self.saved.good = Some(begun.settings);
            self.saved.end_trial();
            self.save();
            return self.converge();
        }
        let failure = if self.seen.connected {
            let blind = begun.sources.difference(&self.seen.sources);
            let blind: Vec<&str> = blind.map(Name::as_str).collect();
            let seconds = begun.settings.trial_s;
            let detail = format!("no picture from {} in {seconds} s", blind.join(", "));
            Failure::new(Reason::Blind, &detail)
        } else {
            let detail = format!("no broker in {} s", begun.settings.trial_s);
            Failure::new(Reason::Unreachable, &detail)
        };
        self.note(begun.settings.digest, failure);
        self.saved.end_trial();
        self.restart();
    }

    fn watch_the_clock(&mut self) {
        if self.due_ms().is_none_or(|due| self.now_ms < due) {
            return;
        }
        match self.phase {
            Phase::Waiting => self.converge(),
            Phase::Fetching => {
                self.done(Err(Failure::new(Reason::Timeout, "no answer in time")));
            }
            _ => {}
        }
    }

    // What follows.

    fn count_start(&mut self) {
        let Some(begun) = &self.saved.begun else {
            return;
        };
        let digest = begun.settings.digest;
        self.saved.starts += 1;
        if self.saved.starts > MAX_STARTS {
            let failure =
                Failure::new(Reason::Crash, &format!("{MAX_STARTS} starts without proof"));
            self.note(digest, failure);
            self.saved.end_trial();
        }
        self.save();
    }

    fn load(&mut self) {
        let ticket = self.enter(Phase::Loading);
        self.loaded = None;
        let settings = self.saved.loads().copied();
        self.actions.push(Action::Load { settings, ticket });
    }

    /// Goes where the wish leads from here.
    fn converge(&mut self) {
        let target = match self.saved.wished {
            // Nobody has wished for anything yet.
            None if self.saved.revision == 0 => return self.settle(),
            // The device's own files need no trial: it came with them.
            None if self.saved.good.is_none() => {
                self.failure = None;
                return self.settle();
            }
            None => {
                self.saved.good = None;
                return self.restart();
            }
            Some(target) => target,
        };
        if let Some(failure) = self.saved.why_bad(&target) {
            self.failure = Some(failure.clone());
            return self.settle();
        }
        if same(Some(&target), self.saved.good.as_ref()) {
            self.failure = None;
            return self.settle();
        }
        let looked = self.now_ms.saturating_sub(self.running_ms);
        if looked < LOOK_MS {
            self.wait_ms = LOOK_MS - looked;
            self.enter(Phase::Waiting);
            return;
        }
        let ticket = self.enter(Phase::Fetching);
        self.actions.push(Action::Fetch {
            settings: target,
            ticket,
        });
    }

    fn settle(&mut self) {
        self.enter(Phase::Settled);
        let needed = self.saved.good.iter().map(|good| good.digest).collect();
        self.actions.push(Action::Retain(needed));
    }

    /// Written down first: from now on the device is what it is about to become.
    fn restart(&mut self) {
        self.save();
        self.enter(Phase::Activating);
        self.actions.push(Action::Restart);
    }

    fn wait(&mut self) {
        // A step of a linear congruential generator (Knuth's MMIX); its upper half is even enough to spread a fleet.
        self.random = self
            .random
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        self.wait_ms = self.backoff.next(self.random >> 32);
        self.enter(Phase::Waiting);
    }

    // Small things.

    /// Takes a failure down; true if the settings are to blame for it.
    fn note(&mut self, digest: Digest, failure: Failure) -> bool {
        let blamed = failure.reason.blames_settings();
        if blamed {
            self.saved.mark(digest, failure.clone());
        }
        self.failure = Some(failure);
        blamed
    }

    fn is_well(&self) -> bool {
        let works = |begun: &Begun| begun.sources.is_subset(&self.seen.sources);
        self.seen.connected && self.saved.begun.as_ref().is_some_and(works)
    }

    fn is_over(&self) -> bool {
        let watched = self.now_ms.saturating_sub(self.since_ms);
        watched >= self.trial_ms() || (self.is_well() && watched >= LOOK_MS)
    }

    fn trial_ms(&self) -> u64 {
        let begun = self.saved.begun.as_ref();
        begun.map_or(0, |begun| u64::from(begun.settings.trial_s) * 1_000)
    }

    /// A new phase: whatever the one before still waited for is of no interest any more.
    fn enter(&mut self, phase: Phase) -> u64 {
        self.phase = phase;
        self.since_ms = self.now_ms;
        self.ticket += 1;
        self.ticket
    }

    fn save(&mut self) {
        self.actions
            .push(Action::Save(Box::new(self.saved.clone())));
    }
}

/// The mistakes in settings as one text, as much of it as a report holds.
#[must_use]
pub fn refusal(mistakes: &[String]) -> Failure {
    Failure::with_reasons(Reason::Refused, &mistakes.join("; "))
}
