//! A device in small: a disk, settings that behave as their digest says, an agent that can be killed anywhere.

use alloc::{collections::BTreeSet, vec::Vec};

use super::*;
use crate::testing::{Dice, histories};

/// What settings do, by the first byte of their digest modulo 6.
const GOOD: u8 = 0;
const REFUSED: u8 = 1;
const BLIND: u8 = 2;
const DEAF: u8 = 3;
/// Kills the agent soon after its start.
const CRASHES: u8 = 4;
const NEVER_COMES: u8 = 5;

fn settings(n: u8) -> Settings {
    Settings {
        version: u64::from(n),
        digest: Digest([n; 32]),
        trial_s: 60,
    }
}

fn kind(settings: Option<&Settings>) -> u8 {
    settings.map_or(GOOD, |settings| settings.digest.0[0] % 6)
}

struct World {
    dice: Dice,
    /// The power goes before an action so often.
    fatal: f32,
    machine: Adoption,
    now_ms: u64,
    disk: Saved,
    documents: BTreeSet<Digest>,
    kept: BTreeSet<Digest>,
    /// Kept though they blind a source, which had not been seen to work before: nobody could know.
    excused: BTreeSet<Digest>,
    /// What this life of the agent runs with.
    runs: Option<Settings>,
    running: bool,
    asked: Option<(Settings, u64)>,
    to_restart: bool,
    deaths: u32,
    restarts: u32,
}

impl World {
    fn new(seed: u64) -> Self {
        let (machine, actions) = Adoption::resume(Saved::new(), 0, seed);
        let mut world = Self {
            dice: Dice(seed),
            fatal: 0.0,
            machine,
            now_ms: 0,
            disk: Saved::new(),
            documents: BTreeSet::new(),
            kept: BTreeSet::new(),
            excused: BTreeSet::new(),
            runs: None,
            running: false,
            asked: None,
            to_restart: false,
            deaths: 0,
            restarts: 0,
        };
        world.execute(actions);
        world
    }

    fn give(&mut self, input: Input) {
        let actions = self.machine.step(input, self.now_ms);
        self.execute(actions);
    }

    fn wish(&mut self, revision: u64, n: u8) {
        let settings = (n > 0).then(|| settings(n));
        self.give(Input::Wish { revision, settings });
    }

    fn execute(&mut self, actions: Vec<Action>) {
        for action in actions {
            if self.dice.chance(self.fatal) {
                return self.die();
            }
            match action {
                Action::Save(saved) => {
                    assert!(saved.revision >= self.disk.revision, "the newest wish wins");
                    if saved.good != self.disk.good
                        && let Some(good) = &saved.good
                    {
                        let begun = self.disk.begun.as_ref();
                        assert_eq!(begun.map(|b| &b.settings), Some(good), "kept after a trial");
                        assert_eq!(self.runs.as_ref(), Some(good), "that it stood");
                        self.kept.insert(good.digest);
                        let names = begun.into_iter().flat_map(|b| &b.sources);
                        if !names.into_iter().any(|name| name.as_str() == "b") {
                            self.excused.insert(good.digest);
                        }
                    }
                    self.disk = *saved;
                }
                Action::Load { settings, ticket } => {
                    assert_eq!(
                        settings.as_ref(),
                        self.disk.loads(),
                        "what is loaded is on disk"
                    );
                    let there = settings.is_none_or(|s| self.documents.contains(&s.digest));
                    assert!(there, "needed documents stay");
                    self.runs = settings;
                    // Rarely a card has lost it.
                    let result = if settings.is_some() && self.dice.chance(self.fatal) {
                        Err(Failure::new(Reason::Bytes, "gone"))
                    } else {
                        Ok(())
                    };
                    return self.give(Input::Done { ticket, result });
                }
                Action::Fetch { settings, ticket } => {
                    let bad = self.disk.bad.iter().any(|b| b.digest == settings.digest);
                    assert!(!bad, "a bad one is not tried again");
                    self.asked = Some((settings, ticket));
                }
                Action::Restart => self.to_restart = true,
                Action::Retain(needed) => self.documents.retain(|d| needed.contains(d)),
                Action::Report => {}
            }
            self.check();
        }
    }

    /// What must hold whenever the power goes.
    fn check(&self) {
        if let Some(good) = &self.disk.good {
            assert!(self.kept.contains(&good.digest), "good is what was kept");
            assert!(self.is_fine(Some(good)), "{good:?}");
        }
        let loads = self.disk.loads();
        let bad = |s: &Settings| self.disk.bad.iter().any(|b| b.digest == s.digest);
        assert!(!loads.is_some_and(bad), "nothing bad is loaded again");
        assert!(self.disk.starts <= MAX_STARTS);
    }

    fn is_fine(&self, settings: Option<&Settings>) -> bool {
        let excused = |s: &Settings| self.excused.contains(&s.digest);
        match kind(settings) {
            GOOD => true,
            BLIND => settings.is_some_and(excused),
            _ => false,
        }
    }

    fn die(&mut self) {
        self.deaths += 1;
        self.begin();
    }

    /// A new life of the agent, from what is on the disk.
    fn begin(&mut self) {
        let bytes = serde_json::to_vec(&self.disk).unwrap();
        self.disk = serde_json::from_slice(&bytes).unwrap();
        (self.asked, self.to_restart, self.running) = (None, false, false);
        self.runs = None;
        self.now_ms = self.dice.below(1_000);
        let (machine, actions) = Adoption::resume(self.disk.clone(), self.now_ms, self.dice.next());
        self.machine = machine;
        self.execute(actions);
    }

    /// The agent goes on: it starts what is loaded, and starts anew if that is asked for.
    fn live(&mut self, connected: bool) {
        if self.to_restart {
            self.restarts += 1;
            self.give(Input::Stopping);
            return self.begin();
        }
        if !self.running {
            self.running = true;
            return self.give(Input::Running);
        }
        let does = kind(self.runs.as_ref());
        if does == CRASHES {
            return self.die();
        }
        let sources: &[&str] = match does {
            BLIND => &["a"],
            _ => &["a", "b"],
        };
        self.give(Input::Seen(Seen {
            connected: connected && does != DEAF,
            sources: sources.iter().map(|s| s.parse().unwrap()).collect(),
        }));
    }

    fn answer(&mut self, luck: bool) {
        let Some((settings, ticket)) = self.asked.take() else {
            return;
        };
        let result = match kind(Some(&settings)) {
            REFUSED => Err(Failure::with_reasons(Reason::Refused, "report.every_s")),
            NEVER_COMES => Err(Failure::new(Reason::Fetch, "no")),
            _ if !luck => Err(Failure::new(Reason::DiskFull, "full")),
            _ => {
                self.documents.insert(settings.digest);
                Ok(())
            }
        };
        self.give(Input::Done { ticket, result });
    }

    fn wait(&mut self, ms: u64) {
        self.now_ms += ms;
        self.give(Input::Tick);
    }

    /// Everything works from now on.
    fn calm_down(&mut self) {
        self.fatal = 0.0;
        self.restarts = 0;
        for _ in 0..400 {
            self.live(true);
            self.answer(true);
            self.wait(1_000);
            if self.machine.phase() == Phase::Waiting {
                let due = self.machine.due_ms().unwrap();
                self.now_ms = self.now_ms.max(due);
            }
        }
    }
}

fn history(seed: u64) {
    let mut dice = Dice(seed);
    let mut world = World::new(seed ^ 0xabcd);
    world.fatal = [0.0, 0.01, 0.1][dice.below(3) as usize];
    let mut newest = 0;
    for _ in 0..80 {
        match dice.below(20) {
            0..2 => {
                // Sometimes an old or a doubled one.
                let revision = (newest + dice.below(3)).saturating_sub(1).max(1);
                newest = newest.max(revision);
                world.wish(revision, dice.below(14) as u8);
            }
            2..5 => {
                let luck = dice.chance(0.9);
                world.answer(luck);
            }
            5..12 => {
                let connected = dice.chance(0.9);
                world.live(connected);
            }
            12..16 => {
                let ms = dice.below(20_000);
                world.wait(ms);
            }
            16 => {
                world.now_ms = world.machine.due_ms().unwrap_or(0).max(world.now_ms);
                world.give(Input::Tick);
            }
            17 => world.give(Input::Done {
                ticket: dice.below(20),
                result: Err(Failure::new(Reason::Fetch, "late")),
            }),
            18 => {
                world.give(Input::Stopping);
                world.begin();
            }
            _ => world.die(),
        }
        world.check();
    }
    world.calm_down();
    let (report, saved) = (world.machine.report(), world.machine.saved());
    assert!(world.restarts <= 6, "{} restarts", world.restarts);
    assert_eq!(world.runs, report.loaded);
    assert!(
        world.is_fine(report.loaded.as_ref()),
        "what is left is good"
    );
    match saved.wished {
        Some(wished) if kind(Some(&wished)) == NEVER_COMES => {
            assert_ne!(report.phase, Phase::Settled);
        }
        Some(wished) if saved.why_bad(&wished).is_some() => {
            assert_eq!(report.phase, Phase::Settled);
            assert!(report.failure.is_some(), "and it says why");
        }
        Some(wished) => assert_eq!(
            (report.phase, report.loaded),
            (Phase::Settled, Some(wished))
        ),
        None if saved.revision > 0 => {
            assert_eq!((report.phase, report.loaded), (Phase::Settled, None))
        }
        None => assert_eq!(report.phase, Phase::Settled),
    }
}

#[test]
fn a_device_runs_only_what_is_good_or_counted_and_settles_whatever_happens() {
    for seed in 0..histories(5_000) {
        let result = std::panic::catch_unwind(|| history(seed));
        assert!(result.is_ok(), "seed {seed}");
    }
}

/// A device on its own files that is asked for `n` and lives on in peace.
fn after(n: u8) -> World {
    let mut world = World::new(1);
    world.live(true);
    world.wish(1, n);
    world.calm_down();
    world
}

#[test]
fn good_settings_are_kept_and_others_leave_the_last_good_ones() {
    let mut world = after(6);
    let loaded = |world: &World| world.machine.report().loaded;
    assert_eq!(loaded(&world), Some(settings(6)));
    for (revision, n, reason) in [
        (2, 7, Reason::Refused),
        (3, 8, Reason::Blind),
        (4, 9, Reason::Unreachable),
        (5, 10, Reason::Crash),
    ] {
        world.deaths = 0;
        world.wish(revision, n);
        world.calm_down();
        let report = world.machine.report();
        assert_eq!(
            (report.phase, loaded(&world)),
            (Phase::Settled, Some(settings(6)))
        );
        let failure = report.failure.unwrap();
        assert_eq!((failure.reason, report.target), (reason, Some(settings(n))));
        assert!(report.bad.contains(&settings(n).digest));
        assert!(world.deaths <= MAX_STARTS + 1, "{} deaths", world.deaths);
        if reason == Reason::Blind {
            assert!(failure.detail.contains("no picture from b"), "{failure:?}");
        }
    }
    // What was bad before stays bad, whatever was wished in between.
    world.wish(6, 8);
    world.calm_down();
    assert_eq!((world.restarts, loaded(&world)), (0, Some(settings(6))));
    // Without any the device is on its own files again, at once.
    world.wish(7, 0);
    world.calm_down();
    assert_eq!((world.restarts, loaded(&world)), (1, None));
    assert_eq!(world.machine.report().failure, None);
}

#[test]
fn a_newer_wish_ends_a_trial() {
    let mut world = World::new(1);
    world.live(true);
    world.wish(1, 12);
    for _ in 0..14 {
        world.live(true);
        world.answer(true);
        world.wait(1_000);
    }
    assert_eq!(world.machine.phase(), Phase::Watching);
    world.wish(2, 0);
    world.calm_down();
    let report = world.machine.report();
    assert_eq!((report.loaded, report.bad.len()), (None, 0));
}

#[test]
fn what_does_not_come_is_not_to_blame() {
    let report = after(11).machine.report();
    assert_eq!(report.failure.map(|f| f.reason), Some(Reason::Fetch));
    assert!(report.bad.is_empty() && report.loaded.is_none());
}
