//! How a model comes to a group of devices: a few first, more when those have kept it, back if it disappoints.
//!
//! ```text
//!            ┌─ resume ──┐
//!            ▼           │
//!   begun ─> running ─> paused          stage 1 ── enough kept it, for long enough ──> stage 2 ──> … ──> done
//!               │          │            too slow: paused (or aborted, as the plan says)
//!               └────┬─────┘            too many failed: aborted
//!                    ▼
//!                 aborted               everybody is set to what they had before
//! ```
//!
//! A device that is exposed stays so: reports only ever add to what is known of it (trying < kept < failed), so that lost,
//! doubled or reordered ones cannot harm. Time is counted only as it is seen to pass, at most [`MAX_STEP_MS`] at once: neither
//! a jump of the clock nor a coordinator that was away makes anybody hurry.
//!
//! The driver saves the state before it acts on outputs; after a restart [`Rollout::settings`] says all that should be in force,
//! so that outputs lost on the way are made up for. Reports may be saved late or never: devices repeat them.

use alloc::{
    collections::{BTreeMap, BTreeSet},
    vec::Vec,
};

use serde::{Deserialize, Serialize};

use crate::{Name, Release};

mod action;
mod plan;
#[cfg(test)]
mod tests;

pub use action::{Command, Input, Outcome, Output, Status, Why};
pub use plan::{OnTimeout, Plan, PlanError, Stage};

/// The most time that one input lets pass: tick at least that often.
pub const MAX_STEP_MS: u64 = 60_000;

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Member {
    present: bool,
    reachable: bool,
    exposed: bool,
    outcome: Outcome,
    previous: Option<Release>,
}

/// One rollout in one group.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Rollout {
    id: u64,
    target: Release,
    plan: Plan,
    status: Status,
    stage: usize,
    /// In this stage, so long.
    stage_ms: u64,
    /// Enough have kept it for so long.
    ripe_ms: u64,
    now_ms: Option<u64>,
    members: BTreeMap<Name, Member>,
    /// Present, reachable and not exposed, in the order of exposure.
    waiting: BTreeSet<(u64, Name)>,
    count: Count,
}

/// Numbers of a rollout.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Count {
    /// Devices of the group, with those that were exposed before they left.
    pub devices: usize,
    /// Devices that were ever set to the target.
    pub exposed: usize,
    /// Of these, devices that count for the stage: they can be reached, or have kept it.
    pub heard: usize,
    /// Of these, devices that have kept it.
    pub kept: usize,
    /// Exposed devices on which it failed.
    pub failed: usize,
    /// Exposed devices that can be reached, and of which neither is known yet.
    #[serde(default)]
    pub trying: usize,
}

impl Rollout {
    /// Begins in the first stage with nobody; devices come as [`Input::Joined`]. `id` is another one for each rollout.
    #[must_use]
    pub fn new(id: u64, target: Release, plan: Plan) -> Self {
        Self {
            id,
            target,
            plan,
            status: Status::Running,
            stage: 0,
            stage_ms: 0,
            ripe_ms: 0,
            now_ms: None,
            members: BTreeMap::new(),
            waiting: BTreeSet::new(),
            count: Count::default(),
        }
    }

    /// Begins another one in place of this: the newest wins. A device that has kept this one's target goes back to that
    /// should the new one fail, every other one to what it had before. Set all devices to [`Rollout::settings`] then.
    #[must_use]
    pub fn supersede(self, id: u64, target: Release, plan: Plan) -> Self {
        let mut next = Self::new(id, target, plan);
        next.now_ms = self.now_ms;
        let aborted = matches!(self.status, Status::Aborted(_));
        for (device, member) in self.members {
            let stays = member.exposed && !aborted && member.outcome == Outcome::Kept;
            let previous = if stays {
                Some(self.target.clone())
            } else {
                member.previous
            };
            let known = Member {
                present: false,
                reachable: false,
                exposed: false,
                outcome: Outcome::Trying,
                previous,
            };
            next.members.insert(device.clone(), known);
            if member.present {
                next.joined(&device, member.reachable, None);
            }
        }
        next
    }

    /// Takes an input in and says what to do. Times are milliseconds of any clock.
    pub fn step(&mut self, input: Input, now_ms: u64) -> Vec<Output> {
        let mut outputs = Vec::new();
        self.pass_time(now_ms);
        match input {
            Input::Joined {
                device,
                reachable,
                previous,
            } => {
                let comes_back = self.joined(&device, reachable, previous);
                if comes_back {
                    outputs.extend(self.set(&device));
                }
            }
            Input::Left(device) => self.left(&device),
            Input::Report(device, outcome) => self.report(&device, outcome, &mut outputs),
            Input::Command(command) => self.command(command, &mut outputs),
            Input::Tick => {}
        }
        self.advance(&mut outputs);
        outputs
    }

    /// What the device should be set to; nothing if it is none of this rollout's.
    #[must_use]
    pub fn setting(&self, device: &Name) -> Option<Option<&Release>> {
        let member = self.members.get(device).filter(|member| member.present)?;
        Some(self.release_for(member))
    }

    /// The same for all devices: what must be in force after a restart.
    pub fn settings(&self) -> impl Iterator<Item = (&Name, Option<&Release>)> {
        let present = self.members.iter().filter(|(_, member)| member.present);
        present.map(|(device, member)| (device, self.release_for(member)))
    }

    /// What it is doing.
    #[must_use]
    pub const fn status(&self) -> &Status {
        &self.status
    }

    /// The stage, counted from 0.
    #[must_use]
    pub const fn stage(&self) -> usize {
        self.stage
    }

    /// The model that it brings.
    #[must_use]
    pub const fn target(&self) -> &Release {
        &self.target
    }

    /// Its numbers.
    #[must_use]
    pub const fn count(&self) -> Count {
        self.count
    }

    // What can happen.

    /// True if an exposed device comes back to the group: it may have missed something.
    fn joined(&mut self, device: &Name, reachable: bool, previous: Option<Release>) -> bool {
        let fresh = Member {
            present: false,
            reachable: false,
            exposed: false,
            outcome: Outcome::Trying,
            previous: previous.clone(),
        };
        let rank = self.rank(device);
        let member = self.members.entry(device.clone()).or_insert(fresh);
        if !member.exposed && member.previous.is_none() {
            member.previous = previous;
        }
        let comes_back = !member.present && member.exposed;
        self.count.devices += usize::from(!member.present && !member.exposed);
        self.count.recount(member, |member| {
            member.present = true;
            member.reachable = reachable;
        });
        if !member.exposed {
            let key = (rank, device.clone());
            if reachable {
                self.waiting.insert(key)
            } else {
                self.waiting.remove(&key)
            };
        }
        comes_back
    }

    fn left(&mut self, device: &Name) {
        let rank = self.rank(device);
        let Some(member) = self.members.get_mut(device).filter(|member| member.present) else {
            return;
        };
        self.count.devices -= usize::from(!member.exposed);
        self.count.recount(member, |member| {
            member.present = false;
            member.reachable = false;
        });
        self.waiting.remove(&(rank, device.clone()));
    }

    fn report(&mut self, device: &Name, outcome: Outcome, outputs: &mut Vec<Output>) {
        let Some(member) = self.members.get_mut(device).filter(|member| member.exposed) else {
            return;
        };
        if outcome <= member.outcome || matches!(member.outcome, Outcome::Failed(_)) {
            return;
        }
        self.count
            .recount(member, |member| member.outcome = outcome);
        let live = matches!(self.status, Status::Running | Status::Paused(_));
        if let Outcome::Failed(reason) = outcome
            && live
            && self.count.failed > self.plan.may_fail(self.count.exposed)
        {
            let device = device.clone();
            self.abort(Why::Failed { device, reason }, outputs);
        }
    }

    fn command(&mut self, command: Command, outputs: &mut Vec<Output>) {
        match (command, &self.status) {
            (Command::Abort, Status::Running | Status::Paused(_) | Status::Done) => {
                self.abort(Why::Operator, outputs);
            }
            (Command::Pause, Status::Running) => {
                self.become_(Status::Paused(Why::Operator), outputs)
            }
            (Command::Resume, Status::Paused(_)) => {
                self.enter(self.stage);
                self.become_(Status::Running, outputs);
            }
            (Command::NextStage, Status::Running | Status::Paused(_))
                if self.stage < self.plan.last() =>
            {
                self.enter(self.stage + 1);
                self.become_(Status::Running, outputs);
            }
            (Command::LastStage, Status::Running | Status::Paused(_))
                if self.stage < self.plan.last() =>
            {
                self.enter(self.plan.last());
                self.become_(Status::Running, outputs);
            }
            _ => {}
        }
    }

    fn pass_time(&mut self, now_ms: u64) {
        let passed = now_ms
            .saturating_sub(self.now_ms.unwrap_or(now_ms))
            .min(MAX_STEP_MS);
        self.now_ms = Some(now_ms);
        if self.status == Status::Running {
            self.stage_ms = self.stage_ms.saturating_add(passed);
            self.ripe_ms = if self.is_ripe() {
                self.ripe_ms.saturating_add(passed)
            } else {
                0
            };
        }
    }

    /// Stands still or goes on to the next stage when it is time; exposes whom the stage allows.
    fn advance(&mut self, outputs: &mut Vec<Output>) {
        loop {
            let Some(stage) = self.plan.stage(self.stage).cloned() else {
                return;
            };
            if self.is_running() && !self.is_ripe() && self.stage_ms >= stage.timeout_ms() {
                return match stage.on_timeout {
                    OnTimeout::Pause => self.become_(Status::Paused(Why::Timeout), outputs),
                    OnTimeout::Abort => self.abort(Why::Timeout, outputs),
                };
            }
            self.expose(outputs);
            if !(self.is_running() && self.is_ripe() && self.ripe_ms >= stage.soak_ms())
                || self.waits_for_the_last()
            {
                return;
            }
            if self.stage == self.plan.last() {
                return self.become_(Status::Done, outputs);
            }
            self.enter(self.stage + 1);
            self.become_(Status::Running, outputs);
        }
    }

    fn expose(&mut self, outputs: &mut Vec<Output>) {
        // When all stages are passed, whoever joins gets the target as well.
        let all = self.status == Status::Done
            || (self.is_running() && self.plan.is_everybody(self.stage));
        if !all && !self.is_running() {
            return;
        }
        let allowed = if all {
            self.count.devices
        } else {
            self.plan.allowed(self.stage, self.count.devices)
        };
        while self.count.exposed < allowed {
            let Some((_, device)) = self.waiting.pop_first() else {
                return;
            };
            if let Some(member) = self.members.get_mut(&device) {
                self.count.exposed += 1;
                self.count.recount(member, |member| member.exposed = true);
            }
            outputs.extend(self.set(&device));
        }
    }

    fn abort(&mut self, why: Why, outputs: &mut Vec<Output>) {
        self.become_(Status::Aborted(why), outputs);
        let exposed = self
            .members
            .iter()
            .filter(|(_, member)| member.exposed && member.present);
        outputs.extend(exposed.map(|(device, member)| Output::Set {
            device: device.clone(),
            release: member.previous.clone(),
        }));
    }

    // Small things.

    fn become_(&mut self, status: Status, outputs: &mut Vec<Output>) {
        self.status = status.clone();
        outputs.push(Output::Changed {
            status,
            stage: self.stage,
        });
    }

    fn enter(&mut self, stage: usize) {
        self.stage = stage;
        self.stage_ms = 0;
        self.ripe_ms = 0;
    }

    fn is_running(&self) -> bool {
        self.status == Status::Running
    }

    /// Have enough of the exposed devices kept it?
    fn is_ripe(&self) -> bool {
        let Count { heard, kept, .. } = self.count;
        let keep = self.plan.stage(self.stage).map_or(1.0, |stage| stage.keep);
        kept > 0 && kept as f32 >= keep * heard as f32
    }

    /// Those that are still trying it get as long again as the others took: a model may be good on most devices and take
    /// longer to show that it is bad on some.
    fn waits_for_the_last(&self) -> bool {
        self.count.trying > 0 && self.ripe_ms < self.stage_ms.saturating_sub(self.ripe_ms)
    }

    fn release_for<'a>(&'a self, member: &'a Member) -> Option<&'a Release> {
        let aborted = matches!(self.status, Status::Aborted(_));
        if member.exposed && !aborted {
            Some(&self.target)
        } else {
            member.previous.as_ref()
        }
    }

    fn set(&self, device: &Name) -> Option<Output> {
        let release = self.setting(device)?.cloned();
        Some(Output::Set {
            device: device.clone(),
            release,
        })
    }

    /// The place of a device in the order of exposure: a shuffle that is another one for each rollout.
    fn rank(&self, device: &Name) -> u64 {
        // FNV-1a, then the finish of SplitMix64, since FNV alone leaves similar names close together.
        let start = 0xcbf2_9ce4_8422_2325 ^ self.id.wrapping_mul(0x9e37_79b9_7f4a_7c15);
        let fnv = |hash: u64, byte: u8| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3);
        let hash = device.as_str().bytes().fold(start, fnv);
        let hash = (hash ^ (hash >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let hash = (hash ^ (hash >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        hash ^ (hash >> 31)
    }
}

impl Count {
    /// Changes a member and keeps the numbers true.
    fn recount(&mut self, member: &mut Member, change: impl FnOnce(&mut Member)) {
        /// What one member adds to the numbers.
        struct One {
            heard: bool,
            kept: bool,
            failed: bool,
            trying: bool,
        }
        let one = |member: &Member| {
            let kept = member.exposed && member.outcome == Outcome::Kept;
            let reached = member.exposed && member.reachable;
            One {
                heard: kept || reached,
                kept,
                failed: member.exposed && matches!(member.outcome, Outcome::Failed(_)),
                trying: reached && member.outcome == Outcome::Trying,
            }
        };
        let before = one(member);
        change(member);
        let after = one(member);
        for (count, before, after) in [
            (&mut self.heard, before.heard, after.heard),
            (&mut self.kept, before.kept, after.kept),
            (&mut self.failed, before.failed, after.failed),
            (&mut self.trying, before.trying, after.trying),
        ] {
            *count = *count + usize::from(after) - usize::from(before);
        }
    }
}
