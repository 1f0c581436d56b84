use std::ops::ControlFlow;

use super::*;
use crate::random::Random;

const DIM: usize = 24;
const CLASSES: usize = 3;

/// A fleet that looks at the same three kinds of things, each device in light of its own.
struct Fleet {
    random: Random,
    rows: Vec<f32>,
    truth: Vec<u32>,
    device: Vec<Option<usize>>,
}

impl Fleet {
    fn new(seed: u64) -> Self {
        Self {
            random: Random::new(seed),
            rows: Vec::new(),
            truth: Vec::new(),
            device: Vec::new(),
        }
    }

    /// About normal: the sum of twelve.
    fn normal(&mut self) -> f64 {
        (0..12).map(|_| self.random.unit()).sum::<f64>() - 6.0
    }

    /// Rows of one device whose light moves each value by about `light` deviations, and stretches all of them.
    fn add(&mut self, device: Option<usize>, rows: usize, light: f64) {
        let moved: Vec<f64> = (0..DIM).map(|_| light * self.normal()).collect();
        let gain = 1.0 + 0.2 * light.min(3.0) * (self.random.unit() - 0.5);
        for at in 0..rows {
            let class = at % CLASSES;
            for (value, moved) in moved.iter().enumerate() {
                let centre = if value % CLASSES == class { 3.0 } else { 0.0 };
                let seen = (centre + self.normal()) * gain + moved;
                self.rows.push(seen as f32);
            }
            self.truth.push(class as u32);
            self.device.push(device);
        }
    }

    /// Calls this share of what a device has something else: anything, or always the next class.
    fn flip(&mut self, device: usize, share: f64, always_the_next: bool) {
        for at in 0..self.truth.len() {
            if self.device[at] == Some(device) && self.random.unit() < share {
                let step = if always_the_next {
                    1
                } else {
                    1 + self.random.below(CLASSES - 1) as u32
                };
                self.truth[at] = (self.truth[at] + step) % CLASSES as u32;
            }
        }
    }

    fn look(&self, devices: usize, looked: u64) -> Vec<Finding> {
        let features =
            Features::new(DIM, CLASSES, self.rows.clone(), self.truth.clone(), None).unwrap();
        let mut go_on = |_: crate::Progress| ControlFlow::Continue(());
        let policy = Policy::default();
        look(
            &features,
            &self.device,
            devices,
            looked,
            &policy,
            &mut go_on,
        )
        .unwrap()
    }
}

fn devices(found: &[Finding]) -> Vec<usize> {
    let mut devices: Vec<usize> = found.iter().map(|f| f.device).collect();
    devices.sort_unstable();
    devices
}

#[test]
fn honest_devices_in_other_light_are_left_alone() {
    for seed in 0..60 {
        let mut fleet = Fleet::new(seed);
        let count = 3 + (seed % 6) as usize;
        for device in 0..count {
            let (rows, light) = (30 + fleet.random.below(120), 3.0 * fleet.random.unit());
            fleet.add(Some(device), rows, light);
        }
        assert_eq!(fleet.look(count, 0), [], "seed {seed}");
    }
    // One alone in the dark, among devices that see the same.
    let mut fleet = Fleet::new(7);
    for device in 0..6 {
        fleet.add(Some(device), 100, if device == 2 { 2.5 } else { 0.0 });
    }
    assert_eq!(fleet.look(6, 0), []);
}

#[test]
fn wrong_labels_are_found_from_three_in_ten() {
    for (seed, share, always) in [
        (1, 0.3, false),
        (2, 0.3, true),
        (3, 0.4, false),
        (4, 0.6, true),
        (5, 1.0, false),
        (6, 1.0, true),
        (7, 0.35, true),
        (8, 0.3, false),
    ] {
        let mut fleet = Fleet::new(seed);
        let count = 3 + (seed % 5) as usize;
        for device in 0..count {
            let light = 2.0 * fleet.random.unit();
            fleet.add(Some(device), 150, light);
        }
        let bad = (seed as usize) % count;
        fleet.flip(bad, share, always);
        let found = fleet.look(count, 0);
        assert_eq!(devices(&found), [bad], "seed {seed}: {found:?}");
        assert_eq!(found[0].what, What::Labels);
        assert!(found[0].text().contains("labels contradict"), "{found:?}");
    }
}

#[test]
fn who_sends_most_is_not_right_because_of_it() {
    let mut fleet = Fleet::new(11);
    for (device, rows) in [(0, 900), (1, 150), (2, 150), (3, 150)] {
        fleet.add(Some(device), rows, 0.5);
    }
    fleet.flip(0, 1.0, true);
    assert_eq!(devices(&fleet.look(4, 0)), [0]);
}

#[test]
fn only_a_minority_is_accused() {
    // Two against each other: nobody can tell. With something that a person vouches for, somebody can.
    let mut fleet = Fleet::new(5);
    fleet.add(Some(0), 150, 0.5);
    fleet.add(Some(1), 150, 0.5);
    fleet.flip(1, 1.0, true);
    assert_eq!(fleet.look(2, 0), []);
    fleet.add(None, 150, 0.5);
    assert_eq!(devices(&fleet.look(2, 0)), [1]);
    // Two bad ones of five, who do not mean the same.
    let mut fleet = Fleet::new(6);
    for device in 0..5 {
        fleet.add(Some(device), 150, 1.0);
    }
    fleet.flip(1, 0.9, false);
    fleet.flip(4, 0.5, false);
    assert_eq!(devices(&fleet.look(5, 0)), [1, 4]);
}

#[test]
fn pictures_of_something_else_are_found() {
    let mut fleet = Fleet::new(9);
    for device in 0..5 {
        fleet.add(Some(device), 100, if device == 3 { 20.0 } else { 1.0 });
    }
    let found = fleet.look(5, 0);
    assert_eq!(devices(&found), [3], "{found:?}");
    assert_eq!(found[0].what, What::Features);
}

#[test]
fn few_rows_and_many_looks_prove_nothing() {
    let mut fleet = Fleet::new(10);
    for device in 0..4 {
        fleet.add(Some(device), if device == 0 { 15 } else { 100 }, 1.0);
    }
    fleet.flip(0, 1.0, true);
    assert_eq!(fleet.look(4, 0), [], "fewer rows than say anything");
    let mut fleet = Fleet::new(12);
    for device in 0..4 {
        fleet.add(Some(device), 60, 1.0);
    }
    fleet.flip(0, 0.4, true);
    assert_eq!(devices(&fleet.look(4, 0)), [0]);
    assert_eq!(
        fleet.look(4, 1_000_000),
        [],
        "the budget of errors is spent"
    );
}

#[test]
fn binomial_by_hand() {
    for (hits, tries, chance, wanted) in [
        (0, 5, 0.5, 1.0),
        (5, 5, 0.5, 1.0 / 32.0),
        (1, 2, 0.25, 1.0 - 0.75 * 0.75),
        (2, 3, 0.1, 0.028),
        (6, 5, 0.5, 0.0),
    ] {
        let found = binomial_at_least(hits, tries, chance);
        assert!((found - wanted).abs() < 1e-12, "{hits} of {tries}: {found}");
    }
    // R: pbinom(29, 100, 0.15, lower.tail = FALSE)
    let found = binomial_at_least(30, 100, 0.15);
    assert!((1e-5..1e-3).contains(&found), "{found}");
}

/// A device that calls everything by the next name, and whose pictures can be told from the others' at a glance: a model of
/// all devices learns both languages.
#[test]
fn names_that_are_exchanged_are_found_where_a_model_can_learn_the_lie() {
    let mut by_the_others_alone = 0;
    for seed in 0..10 {
        let mut fleet = Fleet::new(seed);
        for device in 0..4 {
            fleet.add(Some(device), 90, 1.0);
        }
        let bad = (seed % 4) as usize;
        for at in 0..fleet.truth.len() {
            // The second half of the values shows nothing, but for the one device.
            for value in DIM / 2..DIM {
                let own = fleet.device[at] == Some(bad);
                let shown = own && value % CLASSES == fleet.truth[at] as usize;
                let seen = fleet.normal() + if shown { 5.0 } else { 0.0 };
                fleet.rows[at * DIM + value] = seen as f32;
            }
        }
        assert_eq!(fleet.look(4, 0), [], "seed {seed}: it is only different");
        fleet.flip(bad, 1.0, true);
        let found = fleet.look(4, 0);
        assert_eq!(devices(&found), [bad], "seed {seed}: {found:?}");
        by_the_others_alone += usize::from(found[0].tolerated == 0.5);
    }
    assert!(by_the_others_alone >= 5, "{by_the_others_alone}");
}
