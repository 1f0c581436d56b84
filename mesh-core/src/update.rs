//! How a device comes to the model that it should run, and back by itself if that disappoints.
//!
//! ```text
//!            ┌────────────── a newer wish overtakes any of these ──────────────┐
//!            ▼                                                                 │
//!  settled ──> fetching ──> verifying ──> testing ──> shadowing ──> activating ──> watching ──> settled
//!     ▲            │            │            │            │              │            │         on the new one
//!     │            └────────────┴────────────┴─────┬──────┴──────────────┴────────────┘
//!     │   the model is to blame: marked as bad     ▼      the circumstances are: waiting, then once more
//!     └───────────────────────────────── back on the last good one
//! ```
//!
//! The machine is pure. Its driver carries out the [`Action`]s in their order, each only when the one before is done.
//! [`Action::Save`] is done when it would survive a power cut; if it cannot be done, nothing behind it is, and the driver
//! resumes from what was saved last. So the disk always names a verified model that runs, whenever the power goes.

use alloc::{boxed::Box, format, vec::Vec};

use crate::{Backoff, Desired, Evidence, Failure, Limits, Phase, Reason, Release, Trial};

mod action;
mod judge;
mod report;
mod saved;
#[cfg(test)]
mod tests;

pub use action::{Action, Input, Since};
pub use judge::{Health, Judge, Said, Verdict};
pub use saved::Saved;
use saved::same;

/// What speaks against a model when a life of the agent with it had no orderly end: most by far are the agent's own death …
const CRASH: u32 = 2;
/// … and where the board has started anew, mostly somebody has pulled a plug.
const POWER: u32 = 1;
/// So much is too much: two crashes, or four losses of power.
const TOO_MUCH: u32 = 4;
/// After so long in one life nothing speaks against a kept model any more. At a frame in three seconds it has looked at a
/// thousand by then.
const HEALTHY_MS: u64 = 60 * 60_000;
/// A fetch is resumable: what an hour on a slow line does not bring, the next attempt goes on with.
const FETCH_MS: u64 = 60 * 60_000;
/// Reading and hashing 100 MB takes a bad SD card half a minute.
const VERIFY_MS: u64 = 5 * 60_000;
/// The self-test has bounds of its own; this is for when its answer gets lost.
const TEST_MS: u64 = 10 * 60_000;
/// Optimising a large model on a small board takes up to a minute.
const LOAD_MS: u64 = 2 * 60_000;
/// The first wait after a failure by circumstance …
const WAIT_MS: u64 = 5_000;
/// … and the longest: the device keeps trying for as long as it is wished.
const MAX_WAIT_MS: u64 = 10 * 60_000;

/// The state of a device's update. Times are milliseconds of a clock that only goes forward while the agent runs.
#[derive(Clone, Debug)]
pub struct Update {
    saved: Saved,
    phase: Phase,
    /// The action that is waited for.
    ticket: u64,
    started_ms: u64,
    /// When the phase began.
    since_ms: u64,
    now_ms: u64,
    wait_ms: u64,
    /// The active model, as far as is known.
    loaded: Option<Release>,
    /// Loading it has just failed: perhaps the wished one can be had.
    load_failed: bool,
    failure: Option<Failure>,
    judge: Judge,
    evidence: Evidence,
    health: Health,
    fetched: f32,
    backoff: Backoff,
    random: u64,
    actions: Vec<Action>,
}

impl Update {
    /// Goes on from what was saved; `random` is any number, best another one on each device. `since` says what has ended
    /// the life before, should it have had no orderly end.
    #[must_use]
    pub fn resume(saved: Saved, since: Since, now_ms: u64, random: u64) -> (Self, Vec<Action>) {
        let mut update = Self {
            judge: Judge::new(Limits::default(), Health::default()),
            saved,
            phase: Phase::Settled,
            ticket: 0,
            started_ms: now_ms,
            since_ms: now_ms,
            now_ms,
            wait_ms: 0,
            loaded: None,
            load_failed: false,
            failure: None,
            evidence: Evidence::default(),
            health: Health::default(),
            fetched: 0.0,
            backoff: Backoff::new(WAIT_MS, MAX_WAIT_MS),
            random,
            actions: Vec::new(),
        };
        update.begin_life(since);
        if update.saved.is_watching() {
            update.activate();
        } else {
            update.load();
        }
        update.actions.push(Action::Report);
        let actions = core::mem::take(&mut update.actions);
        (update, actions)
    }

    /// Takes an input in and says what to do.
    pub fn step(&mut self, input: Input, now_ms: u64) -> Vec<Action> {
        self.now_ms = self.now_ms.max(now_ms);
        let before = self.news();
        match input {
            Input::Desired(desired) => self.wish(*desired),
            Input::Done { ticket, result } if ticket == self.ticket => match result {
                Ok(()) => self.succeeded(),
                Err(failure) => self.failed(failure),
            },
            Input::Progress { ticket, share } if ticket == self.ticket => {
                self.fetched = if share.is_finite() {
                    share.clamp(0.0, 1.0)
                } else {
                    0.0
                };
            }
            Input::Frame {
                ticket,
                active,
                beside,
            } if ticket == self.ticket => match (self.phase, beside) {
                (Phase::Shadowing, Some(beside)) => self.judge.see(&beside, Some(&active)),
                (Phase::Watching, beside) => self.judge.see(&active, beside.as_ref()),
                _ => {}
            },
            Input::Health(health) => {
                self.health = health;
                if matches!(self.phase, Phase::Shadowing | Phase::Watching) {
                    self.judge.feel(health);
                }
            }
            Input::Stopping => {
                if core::mem::take(&mut self.saved.alive) {
                    self.save();
                }
            }
            Input::Done { .. } | Input::Progress { .. } | Input::Frame { .. } | Input::Tick => {}
        }
        self.look();
        self.watch_the_clock();
        if self.news() != before {
            self.actions.push(Action::Report);
        }
        core::mem::take(&mut self.actions)
    }

    // What can happen.

    fn wish(&mut self, desired: Desired) {
        if desired.revision <= self.saved.revision() {
            return;
        }
        let busy = !matches!(self.phase, Phase::Settled | Phase::Waiting | Phase::Loading);
        let goes_on = busy && same(desired.release.as_ref(), self.saved.target());
        if desired.force
            && let Some(release) = &desired.release
        {
            self.saved.bad.retain(|bad| bad.digest != release.digest);
        }
        self.judge.set_limits(desired.limits);
        self.saved.desired = Some(desired);
        if goes_on {
            self.save();
            return;
        }
        self.failure = None;
        self.backoff.reset();
        self.end_trial();
    }

    fn succeeded(&mut self) {
        let Some(target) = self.saved.target().cloned() else {
            return self.loaded_current();
        };
        match self.phase {
            Phase::Fetching => {
                let (ticket, force) = (
                    self.enter(Phase::Verifying),
                    self.saved.desired.as_ref().is_some_and(|d| d.force),
                );
                self.actions.push(Action::Verify {
                    release: target,
                    force,
                    ticket,
                });
            }
            Phase::Verifying => {
                let begun = [self.saved.begun.as_ref(), self.saved.current.as_ref()];
                if !begun.into_iter().any(|model| same(model, Some(&target))) {
                    self.saved.begun = Some(target.clone());
                    self.saved.clear();
                    self.save();
                }
                let ticket = self.enter(Phase::Testing);
                self.actions.push(Action::Test {
                    release: target,
                    ticket,
                });
            }
            // It is the one that could not be loaded, and its files are whole again.
            Phase::Testing if same(self.saved.current.as_ref(), Some(&target)) => self.load(),
            Phase::Testing if self.loaded.is_some() && self.trial().shadow_frames > 0 => {
                self.judge = Judge::new(self.limits(), self.health);
                self.enter(Phase::Shadowing);
                self.run(self.loaded.clone(), Some(target));
            }
            Phase::Testing => self.activate(),
            _ => self.loaded_current(),
        }
    }

    fn loaded_current(&mut self) {
        match self.phase {
            Phase::Activating => {
                self.loaded = self.saved.current.clone();
                self.judge = Judge::new(self.limits(), self.health);
                self.since_ms = self.now_ms;
                self.phase = Phase::Watching;
            }
            Phase::Loading => {
                self.loaded = self.saved.current.clone();
                match &self.failure {
                    Some(failure) if !failure.reason.blames_model() => self.wait(),
                    _ => self.converge(),
                }
            }
            _ => {}
        }
    }

    fn failed(&mut self, failure: Failure) {
        match self.phase {
            Phase::Settled | Phase::Waiting => {}
            Phase::Loading => {
                self.loaded = None;
                self.failure = Some(failure);
                if self.saved.last_good.is_some() {
                    self.saved.current = self.saved.last_good.take();
                    self.save();
                    self.load();
                } else {
                    self.load_failed = true;
                    self.wait();
                }
            }
            _ => {
                if matches!(self.phase, Phase::Shadowing | Phase::Watching) {
                    self.evidence = self.judge.evidence();
                }
                if failure.reason.blames_model()
                    && let Some(target) = self.saved.target()
                {
                    let digest = target.digest;
                    self.saved.mark(digest, failure.clone());
                }
                self.failure = Some(failure);
                self.end_trial();
            }
        }
    }

    /// Asks the judge.
    fn look(&mut self) {
        let trial = self.trial();
        let enough = match self.phase {
            Phase::Shadowing => self.judge.compared() >= trial.shadow_frames,
            Phase::Watching => {
                self.judge.frames() >= trial.watch_frames && self.for_s(trial.watch_s_min)
            }
            _ => return,
        };
        match (self.judge.verdict(enough), self.phase) {
            (Verdict::Wait, _) => {}
            (Verdict::Stop(reason), _) => {
                self.failed(Failure::new(reason, &self.judge.explain(reason)))
            }
            (Verdict::Go, Phase::Shadowing) => self.activate(),
            (Verdict::Go, _) => self.keep(),
        }
    }

    fn watch_the_clock(&mut self) {
        let healthy = self.now_ms.saturating_sub(self.started_ms) >= HEALTHY_MS;
        if healthy && self.saved.starts > 0 && self.saved.begun.is_none() {
            self.saved.starts = 0;
            self.save();
        }
        if self.phase == Phase::Settled || self.due_ms().is_none_or(|due| self.now_ms < due) {
            return;
        }
        let trial = self.trial();
        match self.phase {
            Phase::Waiting => self.converge(),
            Phase::Watching if !self.for_s(trial.watch_s_max) => {}
            // There is nothing to go back to: it is watched until there are frames enough.
            Phase::Watching if self.saved.last_good.is_none() => self.since_ms = self.now_ms,
            Phase::Watching if self.judge.frames() > 0 => self.keep(),
            Phase::Shadowing | Phase::Watching => {
                let (frames, s) = (self.judge.compared(), (self.now_ms - self.since_ms) / 1_000);
                let detail = format!("{frames} frames compared in {s} s");
                self.failed(Failure::new(Reason::Unproven, &detail));
            }
            Phase::Loading => {
                // Whether it is in memory is not known; asking again cannot harm.
                self.loaded = None;
                self.failure = Some(Failure::new(Reason::Timeout, "loading took too long"));
                self.load_failed = true;
                self.wait();
            }
            _ => self.failed(Failure::new(Reason::Timeout, "no answer in time")),
        }
    }

    // What follows.

    /// What the end of the last life says of the model that has not proved itself, or else of the one that took
    /// another's place last.
    fn begin_life(&mut self, since: Since) {
        let suspect = match (&self.saved.begun, &self.saved.last_good) {
            (Some(begun), _) => begun.digest,
            (None, Some(_)) => match &self.saved.current {
                Some(current) => current.digest,
                None => return,
            },
            (None, None) => return,
        };
        let (weight, ended) = match since {
            Since::SameLife => return,
            Since::SameBoot => (CRASH, "the agent died"),
            Since::NewBoot => (POWER, "the power went"),
        };
        if core::mem::replace(&mut self.saved.alive, true) {
            self.saved.starts = self.saved.starts.saturating_add(weight);
            if self.saved.starts >= TOO_MUCH {
                let failure = Failure::new(Reason::Crash, &format!("{ended} with it, again"));
                self.saved.mark(suspect, failure.clone());
                self.failure = Some(failure);
                if self.saved.begun.is_none() {
                    self.saved.begun = self.saved.current.clone();
                }
                self.saved.go_back();
            } else if weight == CRASH && self.saved.is_watching() {
                // The old one looks at the frames while the trial begins again.
                self.saved.current = self.saved.last_good.take();
                let detail = format!("{ended} in the middle of its trial, which begins again");
                self.failure = Some(Failure::new(Reason::Unproven, &detail));
            }
        }
        self.save();
    }

    /// Goes where the wish leads from here.
    fn converge(&mut self) {
        let load_failed = core::mem::take(&mut self.load_failed);
        let silent = self.loaded.is_none() && self.saved.current.is_some();
        match self.saved.wanted().cloned() {
            _ if silent && !load_failed => self.load(),
            Some(target) if !same(Some(&target), self.loaded.as_ref()) => {
                self.actions.push(Action::Retain(self.saved.needed()));
                self.fetched = 0.0;
                let ticket = self.enter(Phase::Fetching);
                self.actions.push(Action::Fetch {
                    release: target,
                    ticket,
                });
            }
            _ if silent => self.load(),
            wanted => {
                if wanted.is_some() {
                    self.failure = None;
                }
                self.enter(Phase::Settled);
                self.actions.push(Action::Retain(self.saved.needed()));
            }
        }
    }

    /// Loads the model that is to run.
    fn load(&mut self) {
        self.enter(Phase::Loading);
        self.run(self.saved.current.clone(), None);
    }

    /// Lets the model on trial take over; written down first.
    fn activate(&mut self) {
        let target = self.saved.begun.clone();
        if !same(target.as_ref(), self.saved.current.as_ref()) {
            self.saved.last_good = self.saved.current.take();
            self.saved.current = target;
            self.save();
        }
        self.enter(Phase::Activating);
        let beside = self.saved.last_good.clone();
        let beside = beside.filter(|_| self.trial().watch_frames > 0);
        self.run(self.saved.current.clone(), beside);
    }

    fn keep(&mut self) {
        self.evidence = self.judge.evidence();
        self.saved.begun = None;
        self.saved.clear();
        self.failure = None;
        self.backoff.reset();
        self.save();
        self.run(self.saved.current.clone(), None);
        self.converge();
    }

    /// Back to the last good model, if the one on trial is active, and on from there.
    fn end_trial(&mut self) {
        let phase = self.phase;
        let blamed = self
            .failure
            .as_ref()
            .is_some_and(|failure| failure.reason.blames_model());
        self.saved.go_back();
        self.save();
        match phase {
            Phase::Activating | Phase::Watching => self.load(),
            Phase::Loading => {}
            _ => {
                if phase == Phase::Shadowing {
                    self.run(self.loaded.clone(), None);
                }
                if self.failure.is_some() && !blamed {
                    self.wait()
                } else {
                    self.converge()
                }
            }
        }
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

    /// A new phase: whatever the one before still waited for is of no interest any more.
    fn enter(&mut self, phase: Phase) -> u64 {
        self.phase = phase;
        self.since_ms = self.now_ms;
        self.ticket += 1;
        self.ticket
    }

    fn run(&mut self, active: Option<Release>, beside: Option<Release>) {
        self.actions.push(Action::Run {
            active,
            beside,
            share: self.trial().share,
            ticket: self.ticket,
        });
    }

    fn save(&mut self) {
        self.actions
            .push(Action::Save(Box::new(self.saved.clone())));
    }

    fn trial(&self) -> Trial {
        self.saved
            .desired
            .as_ref()
            .map(|d| d.trial)
            .unwrap_or_default()
    }

    fn limits(&self) -> Limits {
        self.saved
            .desired
            .as_ref()
            .map(|d| d.limits)
            .unwrap_or_default()
    }

    /// Has the phase lasted so long?
    fn for_s(&self, seconds: u32) -> bool {
        self.now_ms.saturating_sub(self.since_ms) >= u64::from(seconds) * 1_000
    }
}
