//! A linear head on an embedding: multinomial logistic regression, standardised, its strength of regularisation
//! chosen and its confidence corrected on rows that it was not trained on.

use serde::{Deserialize, Serialize};
use tract_onnx::prelude::tract_ndarray::ArrayView2;

use crate::{
    calibrate,
    features::Features,
    progress::{Error, Progress, Report},
    random::Random,
    softmax::{Fit, Problem, Stop},
};

/// Least deviation that a feature is divided by, in units of the feature. A nearly constant feature would
/// otherwise be blown up, and its huge weight would amplify the rounding of the engine it runs on.
pub const LEAST_DEVIATION: f32 = 0.1;
/// The longest list of strengths to choose from.
const MAX_STRENGTHS: usize = 32;
/// Folds only compare and calibrate; they need less precision than the head itself.
const FOLD_GRADIENT: f64 = 1e-3;
/// Stop weakening after as many strengths in a row that were worse: loss over strength has one valley.
const WORSE_IN_A_ROW: usize = 2;

/// How strongly large weights are held back: λ in mean log-loss + λ/2 · |W|², on standardised features.
/// scikit-learn's C is 1 / (λ · rows).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum Strength {
    /// This one, 1e-8..=1e4.
    Given(f64),
    /// The one with the smallest log-loss on folds held back, from 1 to 32 of them.
    Best(Vec<f64>),
}

/// How to train.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Settings {
    /// λ.
    pub strength: Strength,
    /// Folds, 2..=20, for choosing the strength and for calibration. Each holds about as much of each class.
    pub folds: usize,
    /// Each class counts the same, however many rows it has.
    pub balanced: bool,
    /// Divide the logits by the temperature that makes the confidence on held-back folds right.
    pub calibrate: bool,
    /// Iterations at most, 1..=10,000.
    pub iterations: usize,
    /// Stop when no part of the gradient of the mean loss is larger, 1e-7..=1.
    pub gradient: f64,
    /// Seed of the folds.
    pub seed: u64,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            strength: Strength::Best(vec![1.0, 0.3, 0.1, 0.03, 0.01, 0.003, 0.001]),
            folds: 5,
            balanced: false,
            calibrate: true,
            iterations: 1000,
            gradient: 1e-4,
            seed: 1,
        }
    }
}

/// A linear layer with C classes on D features. Standardisation and temperature are folded in.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Head {
    /// Features, D.
    pub dim: usize,
    /// C×D, class by class.
    pub weight: Vec<f32>,
    /// C.
    pub bias: Vec<f32>,
    /// λ that it was trained with.
    pub strength: f64,
    /// What the logits were divided by, already in the weights; 1 without calibration.
    pub temperature: f64,
    /// Mean log-loss on the held-back folds, after the temperature; none if nothing was held back.
    pub fold_loss: Option<f64>,
    /// Iterations of the last fit.
    pub iterations: usize,
}

impl Head {
    /// Classes, C.
    #[must_use]
    pub fn classes(&self) -> usize {
        self.bias.len()
    }

    /// C logits for D `features`; a missing feature counts as 0.
    #[must_use]
    pub fn logits(&self, features: &[f32]) -> Vec<f32> {
        let rows = self.weight.chunks_exact(self.dim.max(1));
        rows.zip(&self.bias)
            .map(|(row, &bias)| {
                let sum: f64 = row
                    .iter()
                    .zip(features)
                    .map(|(w, x)| f64::from(*w) * f64::from(*x))
                    .sum();
                (sum + f64::from(bias)) as f32
            })
            .collect()
    }

    /// C probabilities for D `features`.
    #[must_use]
    pub fn probabilities(&self, features: &[f32]) -> Vec<f32> {
        calibrate::probabilities(&self.logits(features), 1.0)
    }
}

impl Settings {
    fn check(&self) -> Result<(), Error> {
        let setting = |name, found: String, expected| {
            Err(Error::Setting {
                name,
                found,
                expected,
            })
        };
        let strengths = match &self.strength {
            Strength::Given(one) => std::slice::from_ref(one),
            Strength::Best(list) => list.as_slice(),
        };
        if !(1..=MAX_STRENGTHS).contains(&strengths.len()) {
            return setting(
                "strength",
                format!("{} numbers", strengths.len()),
                "1 to 32 numbers",
            );
        }
        if let Some(wrong) = strengths.iter().find(|s| !(1e-8..=1e4).contains(*s)) {
            return setting("strength", wrong.to_string(), "1e-8 to 1e4");
        }
        if !(2..=20).contains(&self.folds) {
            return setting("folds", self.folds.to_string(), "2 to 20");
        }
        if !(1..=10_000).contains(&self.iterations) {
            return setting("iterations", self.iterations.to_string(), "1 to 10000");
        }
        if !(1e-7..=1.0).contains(&self.gradient) {
            return setting("gradient", self.gradient.to_string(), "1e-7 to 1");
        }
        Ok(())
    }
}

/// The table with mean 0 and deviation 1 per feature, and what undoes it.
struct Standard {
    rows: Vec<f32>,
    mean: Vec<f64>,
    deviation: Vec<f64>,
}

fn standardise(features: &Features) -> Standard {
    let dim = features.dim();
    let weight = |row: usize| {
        features
            .weights()
            .map_or(1.0, |weights| f64::from(weights[row]))
    };
    let total: f64 = (0..features.len()).map(weight).sum();
    let mut mean = vec![0.0f64; dim];
    for (at, row) in features.rows().chunks_exact(dim).enumerate() {
        let part = weight(at) / total;
        for (mean, &value) in mean.iter_mut().zip(row) {
            *mean += part * f64::from(value);
        }
    }
    let mut deviation = vec![0.0f64; dim];
    for (at, row) in features.rows().chunks_exact(dim).enumerate() {
        let part = weight(at) / total;
        for ((sum, &mean), &value) in deviation.iter_mut().zip(&mean).zip(row) {
            let distance = f64::from(value) - mean;
            *sum += part * distance * distance;
        }
    }
    for value in &mut deviation {
        *value = value.sqrt().max(f64::from(LEAST_DEVIATION));
    }
    let scale: Vec<(f32, f32)> = mean
        .iter()
        .zip(&deviation)
        .map(|(&mean, &deviation)| (mean as f32, (1.0 / deviation) as f32))
        .collect();
    let mut rows = Vec::with_capacity(features.rows().len());
    for row in features.rows().chunks_exact(dim) {
        rows.extend(
            row.iter()
                .zip(&scale)
                .map(|(x, (mean, scale))| (x - mean) * scale),
        );
    }
    Standard {
        rows,
        mean,
        deviation,
    }
}

/// Weights that add up to 1.
fn normalised(weights: impl Iterator<Item = f64>) -> Vec<f32> {
    let weights: Vec<f64> = weights.collect();
    let sum: f64 = weights.iter().sum();
    weights
        .into_iter()
        .map(|weight| (weight / sum) as f32)
        .collect()
}

/// How much each row counts.
fn row_weights(features: &Features, balanced: bool) -> Vec<f32> {
    let of = |row: usize| {
        features
            .weights()
            .map_or(1.0, |weights| f64::from(weights[row]))
    };
    let mut per_class = vec![0.0f64; features.classes()];
    for (row, &class) in features.truth().iter().enumerate() {
        per_class[class as usize] += of(row);
    }
    normalised(features.truth().iter().enumerate().map(|(row, &class)| {
        let share = if balanced {
            per_class[class as usize]
        } else {
            1.0
        };
        of(row) / share
    }))
}

/// The fold that holds each row back. None for a class with a single row: without it the class were unknown.
fn folds(features: &Features, count: usize, seed: u64) -> Vec<Option<usize>> {
    let mut of_class = vec![Vec::new(); features.classes()];
    for (row, &class) in features.truth().iter().enumerate() {
        // What does not count neither teaches nor tests.
        if features.weights().is_none_or(|weights| weights[row] > 0.0) {
            of_class[class as usize].push(row);
        }
    }
    let mut random = Random::new(seed);
    let mut fold = vec![None; features.len()];
    // Classes go on where the last one stopped, so that small classes do not all burden the first fold.
    let mut next = 0;
    for rows in &mut of_class {
        random.shuffle(rows);
        if rows.len() < 2 {
            continue;
        }
        for &row in rows.iter() {
            fold[row] = Some(next % count);
            next += 1;
        }
    }
    fold
}

/// Trains a head. The same features, settings and machine give the same bytes.
///
/// Mean and deviation of the features are those of all rows, also for the folds: they know nothing of classes.
///
/// # Errors
/// For settings out of range, features beyond what f32 can bear, or when `report` breaks.
pub fn train(features: &Features, settings: &Settings, report: Report<'_>) -> Result<Head, Error> {
    settings.check()?;
    let standard = standardise(features);
    let trainer = Trainer {
        features,
        settings,
        weights: row_weights(features, settings.balanced),
        fold: folds(features, settings.folds, settings.seed),
        rows: ArrayView2::from_shape((features.len(), features.dim()), &standard.rows)
            .map_err(|_| Error::Diverged("the table"))?,
    };
    let mut strengths = match &settings.strength {
        Strength::Given(one) => vec![*one],
        Strength::Best(list) => list.clone(),
    };
    // From strong to weak: each fit starts from the last one, which is near.
    strengths.sort_by(|a, b| b.total_cmp(a));
    strengths.dedup();
    let choose = strengths.len() > 1 || settings.calibrate;
    let held_back = trainer.fold.iter().any(Option::is_some);
    let fits = if choose && held_back {
        strengths.len() * settings.folds
    } else {
        0
    };
    let mut counted = Counted {
        done: 0,
        steps: (fits + 1) * settings.iterations,
        each: settings.iterations,
        report,
    };
    let choice = if fits > 0 {
        trainer.choose(&strengths, &mut counted)?
    } else {
        Choice {
            strength: strengths.last().copied().unwrap_or(1.0),
            temperature: 1.0,
            loss: None,
        }
    };
    counted.done = fits * settings.iterations;
    let start = vec![0.0; features.classes() * (features.dim() + 1)];
    let stop = Stop {
        gradient: settings.gradient,
        iterations: settings.iterations,
    };
    let fit = trainer.fit(&trainer.weights, choice.strength, start, stop, &mut counted)?;
    fold_in(fit, &standard, &choice)
}

/// Standardisation and temperature become part of weights and bias.
fn fold_in(fit: Fit, standard: &Standard, choice: &Choice) -> Result<Head, Error> {
    let dim = standard.mean.len();
    let classes = fit.parameters.len() / (dim + 1);
    let (weight, bias) = fit.parameters.split_at(classes * dim);
    let mut head = Head {
        dim,
        weight: Vec::with_capacity(weight.len()),
        bias: Vec::with_capacity(classes),
        strength: choice.strength,
        temperature: choice.temperature,
        fold_loss: choice.loss,
        iterations: fit.iterations,
    };
    for (row, &bias) in weight.chunks_exact(dim).zip(bias) {
        let mut shift = 0.0;
        for ((&weight, mean), deviation) in row.iter().zip(&standard.mean).zip(&standard.deviation)
        {
            // The weight as it will be stored: the bias then corrects its rounding at the mean.
            let stored = (f64::from(weight) / deviation / choice.temperature) as f32;
            shift += f64::from(stored) * mean;
            head.weight.push(stored);
        }
        head.bias
            .push((f64::from(bias) / choice.temperature - shift) as f32);
    }
    if head
        .weight
        .iter()
        .chain(&head.bias)
        .all(|value| value.is_finite())
    {
        Ok(head)
    } else {
        Err(Error::Diverged("the head"))
    }
}

struct Choice {
    strength: f64,
    temperature: f64,
    loss: Option<f64>,
}

/// Steps over several fits.
struct Counted<'a> {
    done: usize,
    steps: usize,
    each: usize,
    report: Report<'a>,
}

struct Trainer<'a> {
    features: &'a Features,
    settings: &'a Settings,
    rows: ArrayView2<'a, f32>,
    weights: Vec<f32>,
    fold: Vec<Option<usize>>,
}

impl Trainer<'_> {
    fn fit(
        &self,
        weights: &[f32],
        strength: f64,
        start: Vec<f32>,
        stop: Stop,
        counted: &mut Counted<'_>,
    ) -> Result<Fit, Error> {
        let problem = Problem {
            rows: self.rows,
            truth: self.features.truth(),
            weights,
            classes: self.features.classes(),
            strength,
        };
        let fit = problem.solve(start, stop, &mut |iteration, loss| {
            let progress = Progress {
                step: counted.done + iteration,
                steps: counted.steps,
                loss,
            };
            match (counted.report)(progress) {
                std::ops::ControlFlow::Continue(()) => Ok(()),
                std::ops::ControlFlow::Break(()) => Err(Error::Cancelled),
            }
        })?;
        counted.done += counted.each;
        Ok(fit)
    }

    /// The strength with the smallest loss on the rows held back, and the temperature there.
    fn choose(&self, strengths: &[f64], counted: &mut Counted<'_>) -> Result<Choice, Error> {
        let classes = self.features.classes();
        let folds = self.settings.folds;
        let size = classes * (self.features.dim() + 1);
        let mut starts = vec![vec![0.0; size]; folds];
        let held_weights =
            normalised(self.weights.iter().zip(&self.fold).map(|(&weight, fold)| {
                if fold.is_some() {
                    f64::from(weight)
                } else {
                    0.0
                }
            }));
        let mut held_logits = vec![0.0; self.features.len() * classes];
        let mut best = Choice {
            strength: strengths.first().copied().unwrap_or(1.0),
            temperature: 1.0,
            loss: None,
        };
        let (mut least, mut worse) = (f64::INFINITY, 0);
        let stop = Stop {
            gradient: self.settings.gradient.max(FOLD_GRADIENT),
            iterations: self.settings.iterations,
        };
        for &strength in strengths {
            for (at, start) in starts.iter_mut().enumerate() {
                if !self.fold.contains(&Some(at)) {
                    counted.done += counted.each;
                    continue;
                }
                let weights =
                    normalised(self.weights.iter().zip(&self.fold).map(|(&weight, &fold)| {
                        if fold == Some(at) {
                            0.0
                        } else {
                            f64::from(weight)
                        }
                    }));
                let fit = self.fit(&weights, strength, std::mem::take(start), stop, counted)?;
                let rows = held_logits
                    .chunks_exact_mut(classes)
                    .zip(fit.logits.chunks_exact(classes))
                    .zip(&self.fold);
                for ((held, logits), &fold) in rows {
                    if fold == Some(at) {
                        held.copy_from_slice(logits);
                    }
                }
                *start = fit.parameters;
            }
            let held = calibrate::Held {
                logits: &held_logits,
                truth: self.features.truth(),
                weights: &held_weights,
                classes,
            };
            let temperature = if self.settings.calibrate {
                held.temperature()
            } else {
                1.0
            };
            let loss = held.doubted_loss(temperature);
            if loss < least {
                least = loss;
                best = Choice {
                    strength,
                    temperature,
                    loss: Some(held.log_loss(temperature)),
                };
                worse = 0;
            } else {
                worse += 1;
            }
            if worse == WORSE_IN_A_ROW {
                break;
            }
        }
        Ok(best)
    }
}

#[cfg(test)]
#[path = "head_tests.rs"]
mod tests;
