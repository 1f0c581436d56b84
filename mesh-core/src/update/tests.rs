//! A device in small: a disk, models that behave as their digest says, a driver that can be killed anywhere.

use alloc::{collections::BTreeSet, string::String, vec, vec::Vec};

use super::*;
use crate::{
    Digest, Reported, VERSION,
    testing::{Dice, histories},
};

/// What a model does, by the first byte of its digest modulo 6.
const GOOD: u8 = 0;
const FAILS_TEST: u8 = 1;
const NAN: u8 = 2;
/// Results are no numbers once it is active.
const NAN_ACTIVE: u8 = 3;
/// Kills the agent at its fifth frame.
const CRASHES: u8 = 4;
const NEVER_COMES: u8 = 5;

fn release(n: u8) -> Release {
    Release {
        name: "m".into(),
        version: alloc::format!("{n}"),
        digest: Digest([n; 32]),
    }
}

fn kind(release: &Release) -> u8 {
    release.digest.0[0] % 6
}

fn desired(revision: u64, n: u8, force: bool) -> Desired {
    Desired {
        v: VERSION,
        revision,
        release: (n > 0).then(|| release(n)),
        limits: Limits::default(),
        trial: Trial {
            share: 1.0,
            shadow_frames: 3,
            shadow_s_max: 60,
            watch_frames: 8,
            watch_s_min: 2,
            watch_s_max: 90,
        },
        force,
        settings: None,
        erase: Vec::new(),
    }
}

fn said(finite: bool) -> Said {
    Said {
        label: "ok".into(),
        score: 0.9,
        finite,
        sure: true,
        shared: true,
        ms: 10.0,
    }
}

struct World {
    dice: Dice,
    /// The power goes before an action so often.
    fatal: f32,
    machine: Update,
    now_ms: u64,
    disk: Saved,
    files: BTreeSet<Digest>,
    proven: BTreeSet<Digest>,
    /// Marked as bad on disk, not forced since.
    outlaws: BTreeSet<Digest>,
    begins_with_model: bool,
    memory: (Option<Release>, Option<Release>, u64),
    frames: u32,
    asked: Option<(Action, u64)>,
    crashes: u32,
}

impl World {
    fn new(seed: u64, current: Option<Release>) -> Self {
        let disk = Saved::new(current.clone());
        let (machine, actions) = Update::resume(disk.clone(), Since::NewBoot, 0, seed);
        let digests: BTreeSet<Digest> = current.iter().map(|r| r.digest).collect();
        let mut world = Self {
            dice: Dice(seed),
            fatal: 0.0,
            machine,
            now_ms: 0,
            disk,
            files: digests.clone(),
            proven: digests,
            outlaws: BTreeSet::new(),
            begins_with_model: current.is_some(),
            memory: (None, None, 0),
            frames: 0,
            asked: None,
            crashes: 0,
        };
        world.execute(actions);
        world
    }

    fn give(&mut self, input: Input) {
        let actions = self.machine.step(input, self.now_ms);
        self.execute(actions);
    }

    fn wish(&mut self, desired: Desired) {
        if desired.force && desired.revision > self.machine.saved().revision() {
            self.outlaws
                .retain(|d| desired.release.as_ref().is_none_or(|r| r.digest != *d));
        }
        self.give(Input::Desired(Box::new(desired)));
    }

    /// The driver.
    fn execute(&mut self, actions: Vec<Action>) {
        for action in actions {
            if self.dice.chance(self.fatal) {
                return self.power_cut();
            }
            match action {
                Action::Save(saved) => {
                    assert!(
                        saved.revision() >= self.disk.revision(),
                        "the newest wish wins"
                    );
                    self.disk = *saved;
                    let bad = self.disk.bad.iter().map(|bad| bad.digest);
                    self.outlaws = bad.collect();
                }
                Action::Retain(needed) => {
                    self.files
                        .retain(|digest| needed.iter().any(|r| r.digest == *digest));
                }
                Action::Run {
                    active,
                    beside,
                    ticket,
                    ..
                } => {
                    for model in [&active, &beside].into_iter().flatten() {
                        assert!(self.files.contains(&model.digest), "{model} is on disk");
                        assert!(
                            self.proven.contains(&model.digest),
                            "{model} is verified and tested"
                        );
                        assert!(!self.outlaws.contains(&model.digest), "{model} is not bad");
                    }
                    if self.memory.0 != active || self.memory.1 != beside {
                        self.frames = 0;
                    }
                    self.memory = (active.clone(), beside.clone(), ticket);
                    self.asked = Some((
                        Action::Run {
                            active,
                            beside,
                            share: 1.0,
                            ticket,
                        },
                        ticket,
                    ));
                }
                Action::Fetch { ticket, .. }
                | Action::Verify { ticket, .. }
                | Action::Test { ticket, .. } => {
                    if let Action::Test { release, .. } = &action {
                        assert!(
                            !self.outlaws.contains(&release.digest),
                            "a bad one is not tested"
                        );
                    }
                    self.asked = Some((action, ticket));
                }
                Action::Report => {
                    let reported = self.machine.report(0);
                    let bytes = reported.encode().unwrap();
                    assert_eq!(Reported::decode(&bytes).unwrap(), reported);
                }
            }
            self.check();
        }
    }

    /// What must hold whenever the power goes.
    fn check(&self) {
        match &self.disk.current {
            Some(current) => {
                assert!(
                    self.files.contains(&current.digest) && self.proven.contains(&current.digest)
                );
                assert!(
                    !self.disk.is_bad(current.digest),
                    "the current one is not bad"
                );
            }
            None => assert!(!self.begins_with_model, "there is always one model"),
        }
        if let Some(good) = &self.disk.last_good {
            assert!(self.files.contains(&good.digest) && self.proven.contains(&good.digest));
        }
    }

    fn power_cut(&mut self) {
        self.end(Since::NewBoot);
    }

    fn crash(&mut self) {
        self.end(Since::SameBoot);
    }

    fn end(&mut self, since: Since) {
        self.crashes += 1;
        let bytes = serde_json::to_vec(&self.disk).unwrap();
        self.disk = serde_json::from_slice(&bytes).unwrap();
        self.asked = None;
        self.memory = (None, None, 0);
        // A new process has a new clock.
        self.now_ms = self.dice.below(1_000);
        let random = self.dice.next();
        let (machine, actions) = Update::resume(self.disk.clone(), since, self.now_ms, random);
        self.machine = machine;
        self.execute(actions);
    }

    /// The driver is done with what it was asked; `luck` says whether circumstances allow it.
    fn answer(&mut self, luck: bool) {
        let Some((action, ticket)) = self.asked.take() else {
            return;
        };
        let fail = |reason| Err(Failure::new(reason, "so it is"));
        let result = match &action {
            Action::Fetch { release, .. } => match (luck, kind(release)) {
                (false, _) => fail(Reason::DiskFull),
                (true, NEVER_COMES) => fail(Reason::Fetch),
                (true, _) => {
                    self.files.insert(release.digest);
                    Ok(())
                }
            },
            Action::Verify { .. } if !luck => fail(Reason::Bytes),
            Action::Test { release, .. } => match kind(release) {
                FAILS_TEST => fail(Reason::SelfTest),
                _ => {
                    self.proven.insert(release.digest);
                    Ok(())
                }
            },
            Action::Run { .. } if !luck => fail(Reason::Timeout),
            _ => Ok(()),
        };
        self.give(Input::Done { ticket, result });
    }

    fn frame(&mut self) {
        let (active, beside, ticket) = self.memory.clone();
        let Some(active) = active else { return };
        self.frames += 1;
        let deadly = |model: &Release| kind(model) == CRASHES;
        if self.frames >= 5 && (deadly(&active) || beside.as_ref().is_some_and(deadly)) {
            return self.crash();
        }
        let beside = beside.map(|model| said(kind(&model) != NAN));
        let active = said(!matches!(kind(&active), NAN | NAN_ACTIVE));
        self.give(Input::Frame {
            ticket,
            active,
            beside,
        });
    }

    fn wait(&mut self, ms: u64) {
        self.now_ms += ms;
        self.give(Input::Tick);
    }

    /// Everything works from now on. Stops when nothing more happens.
    fn calm_down(&mut self) {
        self.fatal = 0.0;
        for _ in 0..300 {
            self.answer(true);
            self.frame();
            match (self.machine.phase(), self.machine.due_ms()) {
                (Phase::Waiting, Some(due)) => self.now_ms = due,
                (Phase::Settled, None) if self.asked.is_none() && self.frames > 6 => return,
                _ => {}
            }
            self.wait(4_000);
        }
    }

    fn loaded(&self) -> Option<Release> {
        self.machine.report(0).loaded
    }
}

fn history(seed: u64) {
    let mut dice = Dice(seed);
    let first = dice.chance(0.8).then(|| release(6));
    let mut world = World::new(seed ^ 0xabcd, first);
    world.fatal = [0.0, 0.01, 0.1][dice.below(3) as usize];
    let mut newest = 0;
    for _ in 0..60 {
        match dice.below(20) {
            0..3 => {
                // Sometimes an old or a doubled one.
                let revision = (newest + dice.below(3)).saturating_sub(1).max(1);
                let n = dice.below(14) as u8;
                let wish = desired(revision, n, dice.chance(0.2));
                newest = newest.max(revision);
                world.wish(wish);
            }
            3..9 => {
                let luck = dice.chance(0.9);
                world.answer(luck);
            }
            9..15 => (0..dice.below(12)).for_each(|_| world.frame()),
            15 if dice.chance(0.5) => world.power_cut(),
            15 => world.crash(),
            16 => {
                let ms = dice.below(30_000);
                world.wait(ms);
            }
            17 => {
                let due = world.machine.due_ms().unwrap_or(world.now_ms);
                world.now_ms = due.max(world.now_ms);
                let before = (
                    world.machine.phase(),
                    world.machine.ticket,
                    world.machine.since_ms,
                    world.machine.saved.starts,
                    world.crashes,
                );
                world.give(Input::Tick);
                let after = (
                    world.machine.phase(),
                    world.machine.ticket,
                    world.machine.since_ms,
                    world.machine.saved.starts,
                    world.crashes,
                );
                let settled = world.machine.due_ms().is_none();
                assert!(
                    settled || before != after,
                    "a wait that is due ends: {before:?}"
                );
            }
            18 => world.give(Input::Done {
                ticket: dice.below(40),
                result: Err(Failure::new(Reason::Fetch, "late")),
            }),
            _ => {
                world.give(Input::Stopping);
                world.power_cut();
            }
        }
        world.check();
    }
    world.calm_down();
    let (phase, loaded) = (world.machine.phase(), world.loaded());
    match world.machine.saved().wanted().cloned() {
        Some(wanted) if kind(&wanted) == NEVER_COMES => {
            assert!(matches!(
                phase,
                Phase::Waiting | Phase::Fetching | Phase::Settled
            ));
        }
        Some(wanted) => {
            assert_eq!((phase, &loaded), (Phase::Settled, &Some(wanted.clone())));
            assert_eq!(kind(&wanted), GOOD);
        }
        None => assert_eq!(phase, Phase::Settled),
    }
    assert!(loaded.is_some() || !world.begins_with_model);
    assert!(
        loaded.is_none_or(|model| kind(&model) == GOOD),
        "what is left is good"
    );
}

#[test]
fn a_device_always_has_a_model_and_settles_whatever_happens() {
    for seed in 0..histories(5_000) {
        let result = std::panic::catch_unwind(|| history(seed));
        assert!(result.is_ok(), "seed {seed}");
    }
}

/// A device on model 6 that is asked for `n` and lives on in peace.
fn after(n: u8) -> World {
    let mut world = World::new(1, Some(release(6)));
    world.answer(true);
    world.wish(desired(1, n, false));
    world.calm_down();
    world
}

#[test]
fn a_good_model_is_kept_and_a_bad_one_is_not() {
    let kept = after(12);
    let saved = kept.machine.saved();
    assert_eq!(
        (kept.loaded(), &saved.last_good),
        (Some(release(12)), &Some(release(6)))
    );
    assert_eq!((saved.bad.len(), &saved.begun), (0, &None));
    for (n, reason) in [
        (7, Reason::SelfTest),
        (8, Reason::NotFinite),
        (9, Reason::NotFinite),
        (10, Reason::Crash),
    ] {
        let world = after(n);
        let report = world.machine.report(0);
        assert_eq!(
            (report.phase, report.loaded),
            (Phase::Settled, Some(release(6)))
        );
        assert_eq!(
            (report.bad.len(), report.bad[0].failure.reason),
            (1, reason)
        );
        assert!(world.crashes <= 2, "{} crashes", world.crashes);
    }
    let never = after(11);
    let report = never.machine.report(0);
    assert_eq!(report.failure.map(|f| f.reason), Some(Reason::Fetch));
    assert!(report.bad.is_empty() && report.loaded == Some(release(6)));
}

#[test]
fn a_bad_model_is_tried_again_only_if_forced() {
    let mut world = after(9);
    world.wish(desired(2, 9, false));
    assert_eq!(
        (world.machine.phase(), world.machine.saved().bad.len()),
        (Phase::Settled, 1)
    );
    world.wish(desired(3, 9, true));
    assert_eq!(
        (world.machine.phase(), world.machine.saved().bad.len()),
        (Phase::Fetching, 0)
    );
    world.calm_down();
    assert_eq!(
        (world.loaded(), world.machine.saved().bad.len()),
        (Some(release(6)), 1)
    );
    // The force is spent: neither a start nor the same wish again tries it once more.
    world.power_cut();
    world.wish(desired(3, 9, true));
    world.calm_down();
    assert_eq!(world.machine.saved().bad.len(), 1);
}

#[test]
fn a_newer_wish_overtakes_in_every_phase() {
    for steps in 0..40 {
        let mut world = World::new(1, Some(release(6)));
        world.answer(true);
        world.wish(desired(1, 12, false));
        for _ in 0..steps {
            world.answer(true);
            world.frame();
            world.wait(100);
        }
        let phase = world.machine.phase();
        world.wish(desired(3, 0, false));
        world.wish(desired(2, 12, false));
        world.calm_down();
        let expected = if phase == Phase::Settled && steps > 0 {
            release(12)
        } else {
            release(6)
        };
        assert_eq!(
            world.loaded(),
            Some(expected),
            "after {steps} steps, in {phase:?}"
        );
        assert_eq!(world.machine.report(0).revision, 3);
    }
}

/// A device on `n`, which took the place of 6, and that model's worst: what ends it so often is the end of it.
fn ends(n: u8, times: u32, end: impl Fn(&mut World)) {
    let mut world = after(n);
    for _ in 1..times {
        end(&mut world);
        world.wait(1_000);
        assert_eq!(world.disk.current, Some(release(n)));
    }
    end(&mut world);
    assert_eq!(
        (&world.disk.current, world.disk.bad.len()),
        (&Some(release(6)), 1)
    );
}

#[test]
fn a_kept_model_that_crashes_again_and_again_goes_too() {
    ends(12, 2, World::crash);
    // A plug that is pulled says less.
    ends(12, 4, World::power_cut);
    // Orderly stops, starts that hold, and what is no start of the agent speak against nobody.
    let mut world = after(12);
    for n in 0..20 {
        if n % 2 == 0 {
            world.give(Input::Stopping);
        } else {
            world.wait(HEALTHY_MS);
        }
        world.crash();
    }
    for _ in 0..20 {
        world.wait(HEALTHY_MS);
        world.end(Since::SameLife);
    }
    assert_eq!(world.disk.current, Some(release(12)));
}

#[test]
fn after_a_crash_on_trial_the_old_one_looks_while_the_trial_begins_again() {
    let mut world = World::new(1, Some(release(6)));
    world.answer(true);
    world.wish(desired(1, 10, false));
    while world.crashes == 0 {
        world.answer(true);
        world.frame();
        world.wait(100);
    }
    world.answer(true);
    assert_eq!(
        (world.loaded(), world.disk.bad.len()),
        (Some(release(6)), 0)
    );
    let why = world
        .machine
        .report(0)
        .failure
        .map(|failure| failure.reason);
    assert_eq!(why, Some(Reason::Unproven));
    world.calm_down();
    let report = world.machine.report(0);
    assert_eq!((report.loaded, world.crashes), (Some(release(6)), 2));
    assert_eq!(report.bad[0].failure.reason, Reason::Crash);
}

#[test]
fn the_way_back_has_no_trial() {
    // What runs would condemn it: it says something else, and faster.
    let mut world = after(12);
    world.wish(Desired {
        trial: Trial::NONE,
        force: true,
        ..desired(2, 6, true)
    });
    for _ in 0..8 {
        world.answer(true);
        assert!(!matches!(world.machine.phase(), Phase::Shadowing));
    }
    let report = world.machine.report(0);
    assert_eq!(
        (report.phase, report.loaded),
        (Phase::Settled, Some(release(6)))
    );
    assert_eq!(report.last_good, Some(release(12)));
}

#[test]
fn the_model_in_memory_is_damaged_on_disk_and_comes_again() {
    let mut world = after(12);
    world.disk.last_good = None;
    world.power_cut();
    world.answer(false);
    assert_eq!(
        (world.machine.phase(), world.loaded()),
        (Phase::Waiting, None)
    );
    world.calm_down();
    assert_eq!(
        (world.machine.phase(), world.loaded()),
        (Phase::Settled, Some(release(12)))
    );
}

#[test]
fn too_few_frames_put_the_trial_off_and_blame_nobody() {
    let mut world = World::new(1, Some(release(6)));
    world.answer(true);
    world.wish(desired(1, 12, false));
    (0..3).for_each(|_| world.answer(true));
    assert_eq!(world.machine.phase(), Phase::Shadowing);
    world.wait(60_000);
    let report = world.machine.report(0);
    assert_eq!(report.failure.map(|f| f.reason), Some(Reason::Unproven));
    assert_eq!((report.phase, report.bad), (Phase::Waiting, vec![]));
    let word: String = serde_json::to_string(&Phase::Waiting).unwrap();
    assert_eq!(word, "\"waiting\"");
}
