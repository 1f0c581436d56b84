//! Which device's samples do not fit what all others say? A pure function of embeddings that were computed here, of the
//! labels, and of which device each came from.
//!
//! # Labels
//!
//! A head is fitted to four fifths of all rows and asked about the last fifth, five times. Each device has a say of the
//! same weight, however much it sent. Where the labels of one device disagree with that head far more often than those
//! of the others do, and more often than chance explains (exact binomial test), they are not to be learnt from.
//!
//! Other light, another lens or another background moves all of a device's rows the same way. The head sees four fifths
//! of them, so it learns that.
//!
//! A device whose pictures can be told from the others' by themselves may call everything by the wrong name without
//! contradicting anybody in that: the head learns this, too. So heads are also fitted to the other devices alone. Other
//! light may make them wrong about a device, but not so that what it calls one class they mostly call another, and the
//! other way round: that is an exchange of names, and no light does it (exact binomial test against a half).
//!
//! # Features
//!
//! Whatever its label, a row that lies many times farther from the others of its class than those lie from each other
//! shows something else. The bound is wide, and asks for several devices to know how much devices differ.
//!
//! # What it promises
//!
//! The n-th look at a task may spend α · 6 / (π² n²), shared by its devices ([`crate::gate::spent_alpha`]): over all looks
//! ever, a device whose labels are odd no more often than is tolerated is accused with probability α at most. Only a
//! minority can be accused, the worst first: who is in the majority decides what is right, and nobody can tell
//! otherwise.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};

use crate::{
    Error, Report, evaluate,
    features::Features,
    gate::spent_alpha,
    head::{self, Settings, Strength},
    mcnemar::binomial_at_least,
};

/// Parts in which all rows are asked about once.
const FOLDS: usize = 5;
/// λ of the heads: strong enough not to learn single wrong labels by heart.
const STRENGTH: f64 = 0.1;
/// What is asked about each device: labels that contradict, names that are exchanged, features.
const TESTS: usize = 3;
/// Rows of a class that say what the others call it.
const CALLED: usize = 5;
/// A better fit does not change who disagrees.
const ITERATIONS: usize = 60;
/// Devices beside the one in question that show how much devices differ.
const COMPANY: usize = 3;
/// The part of a variance that is there in any case, so that a value that never changes does not decide.
const FLOOR: f64 = 0.01;

/// When a device is accused.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Policy {
    /// Chance, over all looks ever, that a device is accused that is as good as is tolerated, 0..=0.5.
    pub alpha: f64,
    /// How much more often than the others' a device's labels may be odd, 0..=1: some places are harder to see.
    pub margin: f64,
    /// Deviations of the others, on average over all values, beyond which a row shows something else.
    pub far: f64,
    /// Rows of a device that say anything.
    pub min_rows: usize,
}

impl Default for Policy {
    /// Ten points: an honest device in a hard place has some more doubtful frames, one with labels of which three in ten
    /// are wrong has thirty. Six deviations: light and lenses of honest devices make two or three.
    fn default() -> Self {
        Self {
            alpha: 0.01,
            margin: 0.1,
            far: 6.0,
            min_rows: 20,
        }
    }
}

impl Policy {
    /// What is out of its range, in words.
    ///
    /// # Errors
    /// The first such field.
    pub fn check(&self) -> Result<(), String> {
        if !(self.alpha > 0.0 && self.alpha <= 0.5) {
            return Err("alpha: is above 0 and at most 0.5".into());
        }
        if !(0.0..=1.0).contains(&self.margin) {
            return Err("margin: is from 0 to 1".into());
        }
        if !(self.far > 1.0 && self.far.is_finite()) {
            return Err("far: is above 1".into());
        }
        Ok(())
    }
}

/// What does not fit.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum What {
    /// What its samples are called.
    Labels,
    /// What they show.
    Features,
}

/// A device that does not fit.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Finding {
    /// Which, as in the list that was given.
    #[serde(skip)]
    pub device: usize,
    /// What does not fit.
    pub what: What,
    /// Its rows that were looked at.
    pub rows: u64,
    /// Those that are odd.
    pub odd: u64,
    /// The share that may be odd.
    pub tolerated: f64,
    /// The chance that so many are odd if no larger share is.
    pub p: f64,
    /// What that chance had to be below.
    pub bound: f64,
}

impl Finding {
    /// For people.
    #[must_use]
    pub fn text(&self) -> String {
        let Self { rows, odd, .. } = self;
        let (share, tolerated) = (percent(*odd, *rows), 100.0 * self.tolerated);
        match self.what {
            What::Labels => format!(
                "its labels contradict those of the other devices: {odd} of {rows} ({share:.0} %) are others than a model \
                 of all devices gives, {tolerated:.0} % would be tolerated; chance does that with p = {:.0e}",
                self.p
            ),
            What::Features => format!(
                "its pictures are unlike those of the other devices: {odd} of {rows} ({share:.0} %) lie far outside of \
                 what the others show of the same class, {tolerated:.0} % would be tolerated; chance does that with p = {:.0e}",
                self.p
            ),
        }
    }
}

fn percent(part: u64, whole: u64) -> f64 {
    100.0 * part as f64 / whole.max(1) as f64
}

/// The devices that do not fit, the worst first. `device` says for each row which of `devices` it is from; what a person
/// brought in, or vouches for, is from none. `looked` counts the earlier looks at the same task.
///
/// # Errors
/// As [`head::train`].
pub fn look(
    features: &Features,
    device: &[Option<usize>],
    devices: usize,
    looked: u64,
    policy: &Policy,
    report: Report<'_>,
) -> Result<Vec<Finding>, Error> {
    let mut found: Vec<Finding> = Vec::new();
    let trusted = device.iter().filter(|d| d.is_none()).count() >= policy.min_rows.max(1);
    // Enough of what people vouch for weighs as much as two devices: one device alone can be held against it.
    let parties = devices + if trusted { 2 } else { 0 };
    let bound = spent_alpha(policy.alpha, looked) / (TESTS * devices.max(1)) as f64;
    while 2 * (found.len() + 1) < parties {
        let gone = |d: usize| found.iter().any(|f| f.device == d);
        let rows: Vec<usize> = (0..device.len())
            .filter(|&row| device.get(row).copied().flatten().is_none_or(|d| !gone(d)))
            .collect();
        let of = |row: usize| device.get(row).copied().flatten();
        let odd = disputed(features, &rows, &of, devices, report)?;
        let labels = accused(&odd, devices, bound, policy, What::Labels);
        let far = strangers(features, &rows, &of, devices, policy);
        let shown = accused(&far, devices, bound, policy, What::Features);
        let exchanged = exchanged(features, &rows, &of, devices, (bound, policy), report)?;
        match labels
            .into_iter()
            .chain(shown)
            .chain(exchanged)
            .min_by(|a, b| a.p.total_cmp(&b.p))
        {
            Some(worst) => found.push(worst),
            None => break,
        }
    }
    Ok(found)
}

/// Rows that were looked at, each with its device and whether it is odd.
type Looked = Vec<(Option<usize>, bool)>;

/// The worst device, if it is beyond the bound.
fn accused(
    looked: &[(Option<usize>, bool)],
    devices: usize,
    bound: f64,
    policy: &Policy,
    what: What,
) -> Option<Finding> {
    let count = |keep: &dyn Fn(Option<usize>) -> bool| {
        looked
            .iter()
            .filter(|(d, _)| keep(*d))
            .fold((0_u64, 0_u64), |(rows, odd), (_, is)| {
                (rows + 1, odd + u64::from(*is))
            })
    };
    let judge = |device: usize| {
        let (rows, odd) = count(&|d| d == Some(device));
        let (other_rows, other_odd) = count(&|d| d != Some(device));
        let others = other_odd as f64 / other_rows.max(1) as f64;
        let tolerated = match what {
            What::Labels => others + policy.margin,
            // More than half of what it shows.
            What::Features => f64::max(0.5, others + policy.margin),
        };
        let p = binomial_at_least(odd, rows, tolerated.min(1.0));
        let enough = rows >= policy.min_rows as u64 && other_rows > 0;
        (enough && p <= bound).then_some(Finding {
            device,
            what,
            rows,
            odd,
            tolerated,
            p,
            bound,
        })
    };
    (0..devices)
        .filter_map(judge)
        .min_by(|a, b| a.p.total_cmp(&b.p))
}

/// Asks a head that has not seen a row about it, for each row.
fn disputed(
    features: &Features,
    rows: &[usize],
    of: &dyn Fn(usize) -> Option<usize>,
    devices: usize,
    report: Report<'_>,
) -> Result<Looked, Error> {
    let weights = weights(rows, of, devices);
    // Of each class and device the same part is in each fold.
    let mut order: Vec<usize> = (0..rows.len()).collect();
    order.sort_by_key(|&at| (class_of(features, rows[at]), of(rows[at]), at));
    let mut looked = Vec::with_capacity(rows.len());
    for fold in 0..FOLDS {
        let held = |place: usize| place % FOLDS == fold;
        let taught = places(&order, |place| !held(place));
        let asked = places(&order, held);
        for (at, said) in answers(features, rows, &weights, &taught, &asked, report)? {
            looked.push((of(rows[at]), said != class_of(features, rows[at])));
        }
    }
    Ok(looked)
}

/// The worst device whose names are exchanged, as heads see it that know nothing of it.
fn exchanged(
    features: &Features,
    rows: &[usize],
    of: &dyn Fn(usize) -> Option<usize>,
    devices: usize,
    (bound, policy): (f64, &Policy),
    report: Report<'_>,
) -> Result<Option<Finding>, Error> {
    let weights = weights(rows, of, devices);
    let order: Vec<usize> = (0..rows.len()).collect();
    let parts = FOLDS.min(devices);
    let mut called: Vec<BTreeMap<u32, Vec<u32>>> = vec![BTreeMap::new(); devices];
    for part in 0..parts {
        let held = |at: usize| of(rows[at]).is_some_and(|d| d % parts == part);
        let taught = places(&order, |at| !held(at));
        let asked = places(&order, held);
        for (at, said) in answers(features, rows, &weights, &taught, &asked, report)? {
            let called = of(rows[at]).and_then(|d| called.get_mut(d));
            if let Some(called) = called {
                let truth = class_of(features, rows[at]);
                called.entry(truth).or_default().push(said);
            }
        }
    }
    let judge = |(device, called): (usize, &BTreeMap<u32, Vec<u32>>)| {
        let names: Vec<(u32, u32, &Vec<u32>)> = called
            .iter()
            .filter(|(_, said)| said.len() >= CALLED)
            .map(|(own, said)| (*own, mostly(said), said))
            .collect();
        // Where two classes look like one, something else is wrong.
        let others: BTreeSet<u32> = names.iter().map(|(_, theirs, _)| *theirs).collect();
        let (mut all, mut odd) = (0, 0);
        for (_, theirs, said) in names.iter().filter(|(own, theirs, _)| own != theirs) {
            all += said.len() as u64;
            odd += said.iter().filter(|s| *s == theirs).count() as u64;
        }
        let p = binomial_at_least(odd, all, 0.5);
        let fits = names.len() >= 2 && others.len() == names.len();
        (fits && all >= policy.min_rows as u64 && p <= bound).then_some(Finding {
            device,
            what: What::Labels,
            rows: all,
            odd,
            tolerated: 0.5,
            p,
            bound,
        })
    };
    let found = called.iter().enumerate().filter_map(judge);
    Ok(found.min_by(|a, b| a.p.total_cmp(&b.p)))
}

/// What was said most often.
fn mostly(said: &[u32]) -> u32 {
    let count = |class: u32| said.iter().filter(|s| **s == class).count();
    let mut classes = said.to_vec();
    classes.sort_unstable();
    classes.dedup();
    let most = classes.into_iter().max_by_key(|&class| count(class));
    most.unwrap_or_default()
}

fn class_of(features: &Features, row: usize) -> u32 {
    features.truth().get(row).copied().unwrap_or_default()
}

/// Fits a head to some of `rows` (by their places) and asks it about others: the class that it gives each. Those whose class
/// it was not taught are left out.
fn answers(
    features: &Features,
    rows: &[usize],
    weights: &[f32],
    taught: &[usize],
    asked: &[usize],
    report: Report<'_>,
) -> Result<Vec<(usize, u32)>, Error> {
    let class = |at: usize| class_of(features, rows[at]);
    let mut known: Vec<u32> = taught.iter().map(|&at| class(at)).collect();
    known.sort_unstable();
    known.dedup();
    if known.len() < 2 {
        return Ok(Vec::new());
    }
    let place = |class: u32| known.binary_search(&class);
    let values: Vec<f32> = taught
        .iter()
        .flat_map(|&at| row_of(features, rows[at]).iter().copied())
        .collect();
    let truth = taught
        .iter()
        .map(|&at| place(class(at)).unwrap_or_default() as u32)
        .collect();
    let weight = taught.iter().map(|&at| weights[at]).collect();
    let Ok(table) = Features::new(features.dim(), known.len(), values, truth, Some(weight)) else {
        return Ok(Vec::new());
    };
    let settings = Settings {
        strength: Strength::Given(STRENGTH),
        calibrate: false,
        iterations: ITERATIONS,
        balanced: true,
        ..Settings::default()
    };
    let head = head::train(&table, &settings, report)?;
    let asked = asked.iter().filter(|&&at| place(class(at)).is_ok());
    Ok(asked
        .filter_map(|&at| {
            let said = evaluate::answer(&head.probabilities(row_of(features, rows[at])));
            Some((at, *known.get(said)?))
        })
        .collect())
}

fn places(order: &[usize], keep: impl Fn(usize) -> bool) -> Vec<usize> {
    let kept = order.iter().enumerate().filter(|(place, _)| keep(*place));
    kept.map(|(_, at)| *at).collect()
}

fn row_of(features: &Features, row: usize) -> &[f32] {
    let dim = features.dim();
    features
        .rows()
        .get(row * dim..(row + 1) * dim)
        .unwrap_or_default()
}

/// No device weighs more than the one in the middle.
fn weights(rows: &[usize], of: &dyn Fn(usize) -> Option<usize>, devices: usize) -> Vec<f32> {
    let mut counts = vec![0_usize; devices];
    for device in rows.iter().filter_map(|&row| of(row)) {
        if let Some(count) = counts.get_mut(device) {
            *count += 1;
        }
    }
    let mut sorted: Vec<usize> = counts.iter().copied().filter(|&n| n > 0).collect();
    sorted.sort_unstable();
    let middle = sorted.get(sorted.len() / 2).copied().unwrap_or(1) as f32;
    let weigh = |&row: &usize| {
        let count = of(row).and_then(|d| counts.get(d).copied());
        count.map_or(1.0, |n| f32::min(1.0, middle / n.max(1) as f32))
    };
    rows.iter().map(weigh).collect()
}

/// Sums over some rows of a class.
#[derive(Clone)]
struct Sums {
    rows: f64,
    sum: Vec<f64>,
    square: Vec<f64>,
}

/// Rows that lie far from what the other devices show of their class.
fn strangers(
    features: &Features,
    rows: &[usize],
    of: &dyn Fn(usize) -> Option<usize>,
    devices: usize,
    policy: &Policy,
) -> Looked {
    let (dim, classes) = (features.dim(), features.classes());
    let empty = Sums {
        rows: 0.0,
        sum: vec![0.0; dim],
        square: vec![0.0; dim],
    };
    let class = |row: usize| features.truth().get(row).copied().unwrap_or_default() as usize;
    let mut present: Vec<usize> = rows.iter().filter_map(|&row| of(row)).collect();
    present.sort_unstable();
    present.dedup();
    let mut looked = Vec::new();
    if present.len() <= COMPANY {
        return looked;
    }
    let gather = |keep: &dyn Fn(Option<usize>) -> bool| {
        let mut sums = vec![empty.clone(); classes];
        for &row in rows.iter().filter(|&&row| keep(of(row))) {
            let Some(sums) = sums.get_mut(class(row)) else {
                continue;
            };
            sums.rows += 1.0;
            for ((sum, square), value) in sums
                .sum
                .iter_mut()
                .zip(&mut sums.square)
                .zip(row_of(features, row))
            {
                *sum += f64::from(*value);
                *square += f64::from(*value) * f64::from(*value);
            }
        }
        sums
    };
    let all = gather(&|_| true);
    for &device in present.iter().filter(|&&d| d < devices) {
        let own = gather(&|d| d == Some(device));
        let others: Vec<Sums> = all
            .iter()
            .zip(&own)
            .map(|(all, own)| less(all, own))
            .collect();
        let variance = variance(&others, dim);
        for &row in rows.iter().filter(|&&row| of(row) == Some(device)) {
            let Some(others) = others.get(class(row)).filter(|o| o.rows >= 2.0) else {
                continue;
            };
            let square: f64 = row_of(features, row)
                .iter()
                .zip(&others.sum)
                .zip(&variance)
                .map(|((value, sum), variance)| {
                    (f64::from(*value) - sum / others.rows).powi(2) / variance
                })
                .sum();
            let distance = (square / dim as f64).sqrt();
            looked.push((Some(device), distance > policy.far));
        }
    }
    looked
}

fn less(all: &Sums, own: &Sums) -> Sums {
    let minus = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a - b).collect();
    Sums {
        rows: all.rows - own.rows,
        sum: minus(&all.sum, &own.sum),
        square: minus(&all.square, &own.square),
    }
}

/// Of each value, within the classes; never nothing.
fn variance(classes: &[Sums], dim: usize) -> Vec<f64> {
    let rows: f64 = classes.iter().map(|c| c.rows).sum();
    let within = |at: usize| {
        let spread = |c: &Sums| {
            let (sum, square) = (c.sum.get(at)?, c.square.get(at)?);
            (c.rows > 0.0).then(|| (square - sum * sum / c.rows).max(0.0))
        };
        classes.iter().filter_map(spread).sum::<f64>() / rows.max(1.0)
    };
    let each: Vec<f64> = (0..dim).map(within).collect();
    let floor = FLOOR * each.iter().sum::<f64>() / dim.max(1) as f64 + f64::MIN_POSITIVE;
    each.into_iter().map(|variance| variance + floor).collect()
}

#[cfg(test)]
#[path = "suspect_tests.rs"]
mod tests;
