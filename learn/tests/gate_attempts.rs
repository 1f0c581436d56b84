//! A thousand attempts to get a worse model through the gate, with models that were really trained.

use std::ops::ControlFlow;

use learn::{
    features::Features,
    gate::{Answers, Cost, Holdout, Policy, judge},
    head::{Head, Settings, Strength, train},
};

const CLASSES: usize = 4;
const DIM: usize = 12;
/// Large enough that what is measured on it is the truth.
const WORLD: usize = 4_000;

/// xorshift64*, seeded and printed.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    fn below(&mut self, n: usize) -> usize {
        (self.next() >> 33) as usize % n
    }

    /// About normal: mean 0, deviation 1.
    fn normal(&mut self) -> f32 {
        let sum: f64 = (0..12)
            .map(|_| (self.next() >> 11) as f64 / (1u64 << 53) as f64)
            .sum();
        (sum - 6.0) as f32
    }
}

/// Rows around four centres that overlap, and their classes.
fn draw(random: &mut Random, count: usize) -> (Vec<f32>, Vec<u32>) {
    let mut rows = Vec::with_capacity(count * DIM);
    let mut truth = Vec::with_capacity(count);
    for at in 0..count {
        let class = at % CLASSES;
        for d in 0..DIM {
            let centre = if d % CLASSES == class { 1.1 } else { 0.0 };
            rows.push(centre + random.normal());
        }
        truth.push(class as u32);
    }
    (rows, truth)
}

fn learn(rows: Vec<f32>, truth: Vec<u32>, iterations: usize) -> Option<Head> {
    let features = Features::new(DIM, CLASSES, rows, truth, None).ok()?;
    let settings = Settings {
        strength: Strength::Given(0.01),
        calibrate: false,
        iterations,
        ..Settings::default()
    };
    train(&features, &settings, &mut |_| ControlFlow::Continue(())).ok()
}

fn answers(head: &Head, rows: &[f32]) -> Vec<f32> {
    rows.chunks(DIM)
        .flat_map(|row| head.probabilities(row))
        .collect()
}

fn accuracy(probabilities: &[f32], truth: &[u32]) -> f64 {
    let right = probabilities
        .chunks(CLASSES)
        .zip(truth)
        .filter(|(row, truth)| learn::evaluate::answer(row) == **truth as usize)
        .count();
    right as f64 / truth.len() as f64
}

#[test]
fn no_worse_model_passes_in_a_thousand_attempts() {
    const SEED: u64 = 20_261_122;
    println!("seed {SEED}");
    let mut random = Random(SEED);
    let (world, world_truth) = draw(&mut random, WORLD);
    let (rows, truth) = draw(&mut random, 400);
    let current = learn(rows, truth, 200).unwrap();
    let current_world = accuracy(&answers(&current, &world), &world_truth);
    let labels: Vec<String> = (0..CLASSES).map(|class| format!("c{class}")).collect();
    let cost = Cost {
        latency_ms: 1.0,
        allowed_latency_ms: 10.0,
        memory_mib: 1.0,
        allowed_memory_mib: 10.0,
    };
    let (mut tried, mut worse, mut passed) = (0, 0, 0);
    let mut judged = 0;
    let mut held = draw(&mut random, 400);
    while worse < 1_000 && tried < 5_000 {
        // Fresh frames now and then, as people label them.
        if tried % 100 == 0 {
            (held, judged) = (draw(&mut random, 400), 0);
        }
        let way = tried % 6;
        let (mut rows, mut truth) = draw(&mut random, 200);
        let (mut leaked, mut iterations) = (0, 200);
        let mut holdout = held.clone();
        match way {
            // Every third label is wrong.
            0 => {
                for class in &mut truth {
                    if random.below(3) == 0 {
                        *class = random.below(CLASSES) as u32;
                    }
                }
            }
            // A class is (almost) missing.
            1 => {
                let kept: Vec<usize> = (0..truth.len())
                    .filter(|at| truth[*at] != 3 || *at == 3)
                    .collect();
                rows = kept
                    .iter()
                    .flat_map(|at| rows[at * DIM..(at + 1) * DIM].to_vec())
                    .collect();
                truth = kept.iter().map(|at| truth[*at]).collect();
            }
            // The holdout is learned by heart.
            2 => {
                rows.clone_from(&held.0);
                truth.clone_from(&held.1);
                leaked = truth.len();
            }
            // A holdout of a few frames that the candidate happens to get right.
            3 => {
                let few = draw(&mut random, 12);
                holdout = few;
            }
            // Stopped after a step or two.
            4 => iterations = 1 + random.below(2),
            // Labels as the wind blows.
            _ => {
                for at in (1..truth.len()).rev() {
                    truth.swap(at, random.below(at + 1));
                }
            }
        }
        tried += 1;
        let Some(candidate) = learn(rows, truth, iterations) else {
            continue;
        };
        let verdict = judge(
            &Holdout {
                labels: &labels,
                truth: &holdout.1,
                leaked,
                judged,
            },
            &Answers {
                labels: &labels,
                probabilities: &answers(&current, &holdout.0),
            },
            &Answers {
                labels: &labels,
                probabilities: &answers(&candidate, &holdout.0),
            },
            &cost,
            &Policy::default(),
        )
        .unwrap();
        judged += 1;
        if accuracy(&answers(&candidate, &world), &world_truth) < current_world {
            worse += 1;
            if verdict.pass {
                passed += 1;
                println!("attempt {tried}, way {way}: {verdict:?}");
            }
        }
    }
    println!("{tried} attempts, {worse} of them worse, {passed} of those passed");
    assert_eq!((worse, passed), (1_000, 0));
}

/// And the door is not simply shut: much better data opens it.
#[test]
fn a_clearly_better_model_passes() {
    let mut random = Random(7);
    let (rows, truth) = draw(&mut random, 24);
    let current = learn(rows, truth, 200).unwrap();
    let (rows, truth) = draw(&mut random, 2_000);
    let candidate = learn(rows, truth, 200).unwrap();
    let held = draw(&mut random, 800);
    let labels: Vec<String> = (0..CLASSES).map(|class| format!("c{class}")).collect();
    let verdict = judge(
        &Holdout {
            labels: &labels,
            truth: &held.1,
            leaked: 0,
            judged: 0,
        },
        &Answers {
            labels: &labels,
            probabilities: &answers(&current, &held.0),
        },
        &Answers {
            labels: &labels,
            probabilities: &answers(&candidate, &held.0),
        },
        &Cost {
            latency_ms: 1.0,
            allowed_latency_ms: 10.0,
            memory_mib: 1.0,
            allowed_memory_mib: 10.0,
        },
        &Policy::default(),
    )
    .unwrap();
    assert!(verdict.pass, "{verdict:#?}");
}
