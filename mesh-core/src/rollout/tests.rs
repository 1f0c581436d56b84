//! Random histories of a group of devices, their coordinator and its operator.

use alloc::{collections::BTreeMap, format, string::String, vec, vec::Vec};

use super::*;
use crate::{
    Bad, Digest, Evidence, Failure, Phase, Reason, Reported, VERSION,
    testing::{Dice, histories},
};

fn release(n: u8) -> Release {
    Release {
        name: "m".into(),
        version: format!("{n}"),
        digest: Digest([n; 32]),
    }
}

fn name(n: usize) -> Name {
    format!("d{n}").parse().unwrap()
}

fn joined(n: usize, reachable: bool) -> Input {
    Input::Joined {
        device: name(n),
        reachable,
        previous: Some(release(1 + (n % 2) as u8)),
    }
}

const TARGET: u8 = 9;

/// The coordinator around a rollout: it saves, acts, is killed, and comes back.
struct World {
    rollout: Rollout,
    /// What is saved of it.
    disk: Rollout,
    /// What each device was told last.
    told: BTreeMap<Name, Option<Release>>,
    /// The most devices that were ever allowed to have the target.
    ceiling: usize,
    now_ms: u64,
}

impl World {
    fn new(rollout: Rollout) -> Self {
        Self {
            disk: rollout.clone(),
            rollout,
            told: BTreeMap::new(),
            ceiling: 0,
            now_ms: 0,
        }
    }

    fn give(&mut self, input: Input) -> Vec<Output> {
        let before = self.rollout.clone();
        let outputs = self.rollout.step(input, self.now_ms);
        let (was, is) = (&before.status, &self.rollout.status);
        if matches!(was, Status::Aborted(_)) {
            assert_eq!(was, is, "nothing leads out of aborted");
        }
        let allowed = match is {
            Status::Running if !self.rollout.plan.is_everybody(self.rollout.stage) => {
                let percent = self.rollout.plan.stages[self.rollout.stage].percent;
                let devices = self
                    .rollout
                    .members
                    .values()
                    .filter(|m| m.present || m.exposed)
                    .count();
                ((devices as f32 * percent / 100.0) as usize).max(1)
            }
            Status::Running | Status::Done => usize::MAX,
            Status::Paused(_) | Status::Aborted(_) => 0,
        };
        self.ceiling = self.ceiling.max(allowed);
        let told: Vec<_> = outputs
            .iter()
            .filter(|output| matches!(output, Output::Set { release, .. } if *release == Some(release_target())))
            .collect();
        let back = before
            .members
            .iter()
            .filter(|(_, m)| m.exposed && !m.present)
            .count();
        if allowed == 0 {
            assert!(
                told.len() <= back.min(1),
                "exposes nobody while it stands still"
            );
        }
        assert!(self.rollout.count.exposed <= self.ceiling.max(before.count.exposed));
        for (device, member) in &before.members {
            let still = self.rollout.members.get(device).is_some_and(|m| m.exposed);
            assert!(still || !member.exposed, "nobody moves out");
        }
        outputs
    }

    fn act(&mut self, outputs: &[Output]) {
        // What changes nothing outside need not be saved at once.
        if outputs.is_empty() {
            return;
        }
        self.disk = self.rollout.clone();
        for output in outputs {
            if let Output::Set { device, release } = output {
                self.told.insert(device.clone(), release.clone());
            }
        }
    }

    /// Comes back with what was saved and puts right what was lost.
    fn restart(&mut self) {
        self.rollout = serde_json::from_str(&serde_json::to_string(&self.disk).unwrap()).unwrap();
        assert_eq!(self.rollout, self.disk);
        let settings = self.rollout.settings();
        self.told
            .extend(settings.map(|(device, release)| (device.clone(), release.cloned())));
    }
}

fn release_target() -> Release {
    release(TARGET)
}

fn plan(dice: &mut Dice) -> Plan {
    let mut plan = Plan::default();
    plan.stages.truncate(1 + dice.below(4) as usize);
    if dice.chance(0.3) {
        plan.stages[0].percent = 0.5 + dice.below(9) as f32;
    }
    for stage in &mut plan.stages {
        stage.soak_s = dice.below(100) as u32;
        stage.timeout_s = 100 + dice.below(300) as u32;
        stage.on_timeout = if dice.chance(0.2) {
            OnTimeout::Abort
        } else {
            OnTimeout::Pause
        };
    }
    plan.max_failed = [0.01, 0.2, 0.5][dice.below(3) as usize];
    plan.check().unwrap();
    plan
}

fn history(seed: u64) -> Status {
    let mut dice = Dice(seed);
    let plan = plan(&mut dice);
    let devices = 1 + dice.below(12) as usize;
    let trouble = [0.0, 0.05, 0.3][dice.below(3) as usize];
    let restless = dice.chance(0.5);
    let mut world = World::new(Rollout::new(seed, release_target(), plan));
    for step in 0..60 {
        let device = dice.below(devices as u64) as usize;
        let outcome = match dice.unit() {
            x if x < trouble => Outcome::Failed(Reason::Disagreement),
            x if x < 0.7 => Outcome::Kept,
            _ => Outcome::Trying,
        };
        let commands = [
            Command::Pause,
            Command::Resume,
            Command::NextStage,
            Command::LastStage,
            Command::Abort,
        ];
        let input = match dice.below(30) {
            _ if step < devices => joined(step, dice.chance(0.9)),
            0..12 => Input::Report(name(device), outcome),
            12..16 => joined(device, dice.chance(0.8)),
            16 => Input::Left(name(device)),
            17 if restless => Input::Command(commands[dice.below(5) as usize]),
            _ => Input::Tick,
        };
        match dice.below(40) {
            0 => world.now_ms = dice.next() >> dice.below(60),
            n => world.now_ms = world.now_ms.saturating_add(n * 1_000),
        }
        match dice.below(30) {
            // Killed before it could save: the input is lost.
            0 => {
                world.give(input);
                world.restart();
            }
            // Killed after that: some of the outputs are lost.
            1 => {
                let mut outputs = world.give(input);
                world.disk = world.rollout.clone();
                let done = dice.below(outputs.len() as u64 + 1) as usize;
                outputs.truncate(done);
                world.act(&outputs);
                world.restart();
            }
            // Another process with the same state does the same.
            2 => {
                let text = serde_json::to_string(&world.rollout).unwrap();
                let mut twin: Rollout = serde_json::from_str(&text).unwrap();
                let theirs = twin.step(input.clone(), world.now_ms);
                let ours = world.give(input);
                assert_eq!((&ours, &world.rollout), (&theirs, &twin));
                world.act(&ours);
            }
            _ => {
                let outputs = world.give(input);
                world.act(&outputs);
            }
        }
    }
    // Silence: every wait ends.
    for _ in 0..60 {
        world.now_ms = world.now_ms.saturating_add(MAX_STEP_MS);
        if world.now_ms == u64::MAX {
            world.now_ms = 0;
        }
        let outputs = world.give(Input::Tick);
        world.act(&outputs);
    }
    let status = world.rollout.status().clone();
    assert_ne!(status, Status::Running, "every wait ends");
    let numbers = world.rollout.count;
    let members = || world.rollout.members.values();
    assert_eq!(numbers.exposed, members().filter(|m| m.exposed).count());
    assert_eq!(
        numbers.devices,
        members().filter(|m| m.exposed || m.present).count()
    );
    for (device, member) in world.rollout.members.iter().filter(|(_, m)| m.present) {
        let told = world.told.get(device).cloned().flatten();
        let on_target = told == Some(release_target());
        match status {
            Status::Aborted(_) => assert!(!on_target, "nobody is left on the target"),
            Status::Done => assert!(on_target || !member.reachable || !member.exposed),
            _ => assert_eq!(on_target, member.exposed),
        }
    }
    status
}

/// A million: `MESH_CORE_HISTORIES=1_000_000 cargo test -p mesh-core --release rollout`. A few thousand by default, which take
/// seconds.
#[test]
fn no_history_exposes_too_many_or_leaves_anybody_behind() {
    let mut ends: BTreeMap<String, u32> = BTreeMap::new();
    for seed in 0..histories(3_000) {
        let end = std::panic::catch_unwind(|| history(seed));
        assert!(end.is_ok(), "seed {seed}");
        let word = end.map(|status| format!("{status:?}")).unwrap();
        let word = word.split(" {").next().unwrap_or_default().into();
        *ends.entry(word).or_default() += 1;
    }
    std::println!("{ends:?}");
    assert!(ends.len() >= 6, "all kinds of ends were seen: {ends:?}");
}

fn fast() -> Plan {
    let mut plan = Plan::default();
    for stage in &mut plan.stages {
        (stage.soak_s, stage.timeout_s) = (10, 60);
    }
    plan
}

/// Lets devices answer until the rollout stands still; `fails` says on which of them the target fails.
fn live(devices: usize, fails: impl Fn(usize) -> bool) -> (Rollout, usize) {
    let mut rollout = Rollout::new(7, release_target(), fast());
    let mut outbox = Vec::new();
    let mut most = 0;
    for n in 0..devices {
        outbox.extend(rollout.step(joined(n, true), 0));
    }
    for second in 0..1_000 {
        for output in core::mem::take(&mut outbox) {
            if let Output::Set { device, release } = output
                && release == Some(release_target())
            {
                let n: usize = device.as_str()[1..].parse().unwrap();
                let outcome = if fails(n) {
                    Outcome::Failed(Reason::Crash)
                } else {
                    Outcome::Kept
                };
                outbox.extend(rollout.step(Input::Report(device, outcome), second * 1_000));
            }
        }
        outbox.extend(rollout.step(Input::Tick, second * 1_000));
        most = most.max(rollout.count().exposed);
    }
    (rollout, most)
}

#[test]
fn a_model_that_fails_on_one_device_in_twenty_reaches_one_in_a_hundred() {
    let mut missed = 0;
    for seed in 0..20 {
        let bad: Vec<bool> = {
            let mut dice = Dice(seed);
            (0..10_000).map(|_| dice.chance(0.05)).collect()
        };
        let (rollout, most) = live(10_000, |n| bad[n]);
        assert!(matches!(
            rollout.status(),
            Status::Aborted(Why::Failed { .. })
        ));
        missed += usize::from(most > 100);
    }
    assert_eq!(missed, 0, "seeds in which more than 1 % were exposed");
}

#[test]
fn a_good_model_reaches_everybody_stage_by_stage() {
    let (rollout, most) = live(10_000, |_| false);
    assert_eq!((rollout.status(), most), (&Status::Done, 10_000));
    // A single device that fails late does not stop ten thousand.
    let (rollout, _) = live(10_000, |n| n == 4_711);
    let in_first = |rollout: &Rollout| matches!(rollout.status(), Status::Aborted(_));
    assert!(*rollout.status() == Status::Done || in_first(&rollout));
    for (devices, first) in [(1, 1), (3, 1), (150, 1), (250, 2)] {
        let mut rollout = Rollout::new(1, release_target(), fast());
        (0..devices).for_each(|n| drop(rollout.step(joined(n, true), 0)));
        assert_eq!(rollout.count().exposed, first, "of {devices}");
    }
}

#[test]
fn the_operator_has_the_last_word() {
    let mut rollout = Rollout::new(1, release_target(), fast());
    (0..10).for_each(|n| drop(rollout.step(joined(n, true), 0)));
    let mut ask = |command| {
        let outputs = rollout.step(Input::Command(command), 0);
        (
            rollout.status().clone(),
            rollout.count().exposed,
            outputs.len(),
        )
    };
    let paused = Status::Paused(Why::Operator);
    assert_eq!(ask(Command::Pause), (paused.clone(), 1, 1));
    assert_eq!(ask(Command::Pause), (paused, 1, 0), "once is enough");
    assert_eq!(ask(Command::Resume), (Status::Running, 1, 1));
    assert_eq!(
        ask(Command::NextStage),
        (Status::Running, 1, 1),
        "10 % of 10 are 1"
    );
    assert_eq!(ask(Command::NextStage).1, 5);
    assert_eq!(ask(Command::LastStage), (Status::Running, 10, 6));
    assert_eq!(ask(Command::LastStage).2, 0);
    for n in 0..10 {
        rollout.step(Input::Report(name(n), Outcome::Kept), 0);
    }
    rollout.step(Input::Tick, 20_000);
    assert_eq!(rollout.status(), &Status::Done);
    // Done is no verdict for ever: a crash a month later takes back one device, not all.
    rollout.step(
        Input::Report(name(0), Outcome::Failed(Reason::Crash)),
        30_000,
    );
    assert_eq!(rollout.status(), &Status::Done);
    let outputs = rollout.step(Input::Command(Command::Abort), 30_000);
    assert_eq!(outputs.len(), 11);
    for (n, output) in outputs.iter().skip(1).enumerate() {
        let release = Some(release(1 + (n % 2) as u8));
        assert_eq!(
            output,
            &Output::Set {
                device: name(n),
                release
            },
            "each has its own"
        );
    }
}

#[test]
fn too_slow_a_stage_pauses_and_the_clock_cannot_hurry_it() {
    let mut rollout = Rollout::new(1, release_target(), fast());
    rollout.step(joined(0, true), 5_000_000);
    rollout.step(Input::Tick, 0);
    rollout.step(Input::Tick, 50_000);
    assert_eq!(
        rollout.status(),
        &Status::Running,
        "a clock that goes back passes no time"
    );
    rollout.step(Input::Tick, u64::MAX);
    assert_eq!(rollout.status(), &Status::Paused(Why::Timeout));
    // A soak is not over because the coordinator was away for a day.
    let mut rollout = Rollout::new(1, release_target(), Plan::default());
    rollout.step(joined(0, true), 0);
    rollout.step(Input::Report(name(0), Outcome::Kept), 0);
    rollout.step(Input::Tick, 86_400_000);
    assert_eq!((rollout.stage(), rollout.ripe_ms), (0, MAX_STEP_MS));
}

#[test]
fn who_takes_longer_to_fail_is_waited_for() {
    let plan = || Plan {
        stages: [50.0, 100.0]
            .map(|percent| Stage {
                percent,
                soak_s: 0,
                ..Stage::default()
            })
            .to_vec(),
        ..Plan::default()
    };
    let begun = || {
        let mut rollout = Rollout::new(1, release_target(), plan());
        (0..20).for_each(|n| drop(rollout.step(joined(n, true), 0)));
        let exposed = (0..20)
            .map(name)
            .filter(|device| rollout.setting(device) == Some(Some(&release_target())));
        let exposed: Vec<Name> = exposed.collect();
        assert_eq!(exposed.len(), 10);
        // Nine of ten keep it within five seconds.
        for device in &exposed[1..] {
            rollout.step(Input::Report(device.clone(), Outcome::Kept), 5_000);
        }
        rollout.step(Input::Tick, 9_000);
        assert_eq!((rollout.stage(), rollout.count().trying), (0, 1));
        (rollout, exposed[0].clone())
    };
    let (mut rollout, last) = begun();
    rollout.step(Input::Report(last, Outcome::Failed(Reason::Latency)), 9_500);
    assert!(matches!(rollout.status(), Status::Aborted(_)));
    assert_eq!(rollout.count().exposed, 10);
    // Nobody is waited for without end, nor for a device that cannot be reached.
    let (mut rollout, _) = begun();
    rollout.step(Input::Tick, 10_000);
    assert_eq!(rollout.stage(), 1);
    let (mut rollout, last) = begun();
    rollout.step(Input::Left(last), 9_000);
    assert_eq!(rollout.stage(), 1);
}

#[test]
fn what_to_go_back_to_may_be_said_later() {
    let mut rollout = Rollout::new(1, release_target(), fast());
    let says = |previous| Input::Joined {
        device: name(0),
        reachable: false,
        previous,
    };
    rollout.step(says(None), 0);
    rollout.step(says(Some(release(1))), 0);
    // What it says once it has the target is not what it had before.
    rollout.step(joined(0, true), 0);
    rollout.step(says(Some(release_target())), 0);
    rollout.step(Input::Command(Command::Abort), 0);
    assert_eq!(rollout.setting(&name(0)), Some(Some(&release(1))));
}

#[test]
fn the_newest_rollout_wins_and_remembers_what_was_proven() {
    let mut old = Rollout::new(1, release_target(), fast());
    (0..4).for_each(|n| drop(old.step(joined(n, true), 0)));
    old.step(Input::Command(Command::LastStage), 0);
    old.step(Input::Report(name(0), Outcome::Kept), 0);
    old.step(Input::Report(name(1), Outcome::Trying), 0);
    old.step(Input::Left(name(3)), 0);
    let mut new = old.supersede(2, release(20), fast());
    let before: Vec<_> = (0..4)
        .map(|n| new.setting(&name(n)).flatten().cloned())
        .collect();
    assert_eq!(
        before,
        [
            Some(release(TARGET)),
            Some(release(2)),
            Some(release(1)),
            None
        ]
    );
    new.step(Input::Tick, 0);
    assert_eq!(new.count().exposed, 1);
    new.step(Input::Command(Command::Abort), 0);
    let after: Vec<_> = (0..4)
        .map(|n| new.setting(&name(n)).flatten().cloned())
        .collect();
    assert_eq!(after, before);
}

#[test]
fn a_report_counts_for_the_wish_that_it_answers() {
    let reported = |revision, phase, loaded: u8, bad: &[u8]| Reported {
        v: VERSION,
        ts: 0,
        revision,
        phase,
        target: Some(release_target()),
        loaded: Some(release(loaded)),
        last_good: None,
        failure: None,
        bad: bad
            .iter()
            .map(|n| Bad {
                digest: Digest([*n; 32]),
                failure: Failure::new(Reason::Heat, ""),
            })
            .collect(),
        progress: 0.0,
        evidence: Evidence::default(),
        settings: None,
        erased: None,
    };
    for (report, outcome) in [
        (reported(5, Phase::Settled, TARGET, &[]), Outcome::Kept),
        (reported(6, Phase::Settled, TARGET, &[1]), Outcome::Kept),
        (reported(5, Phase::Watching, TARGET, &[]), Outcome::Trying),
        (reported(5, Phase::Settled, 1, &[]), Outcome::Trying),
        (
            reported(5, Phase::Settled, 1, &[2, TARGET]),
            Outcome::Failed(Reason::Heat),
        ),
        (reported(4, Phase::Settled, 1, &[TARGET]), Outcome::Trying),
    ] {
        assert_eq!(Outcome::of(&report, &release_target(), 5), outcome);
    }
}

#[test]
fn plans_are_checked() {
    let plan = |percents: &[f32], keep, max_failed| Plan {
        stages: percents
            .iter()
            .map(|percent| Stage {
                percent: *percent,
                keep,
                ..Stage::default()
            })
            .collect(),
        max_failed,
    };
    assert_eq!(Plan::default().check(), Ok(()));
    assert_eq!(plan(&[], 0.9, 0.0).check(), Err(PlanError::Stages));
    assert_eq!(
        plan(&[10.0, 10.0], 0.9, 0.0).check(),
        Err(PlanError::Percent(2))
    );
    assert_eq!(plan(&[101.0], 0.9, 0.0).check(), Err(PlanError::Percent(1)));
    assert_eq!(
        plan(&[f32::NAN], 0.9, 0.0).check(),
        Err(PlanError::Percent(1))
    );
    assert_eq!(plan(&[1.0], 0.0, 0.0).check(), Err(PlanError::Keep(1)));
    assert_eq!(plan(&[1.0], 1.0, 1.1).check(), Err(PlanError::MaxFailed));
    let allowed: Vec<_> = [1, 100, 101, 200, 201, 10_000]
        .map(|n| Plan::default().may_fail(n))
        .into();
    assert_eq!(allowed, vec![0, 0, 1, 1, 2, 99]);
}
