//! The gate: may a candidate take the place of the current model? A pure function of what both answered on the
//! same held-back frames, of what the candidate costs, and of a policy.
//!
//! # Why chance does not open it
//!
//! The test is McNemar's, exact and one-sided: of the frames that only one of the two answers right, how likely
//! were so many for the candidate, if each were a fair coin? A candidate whose true accuracy is not higher
//! passes it with probability α at most. One test at α = 0.01 is still not enough: of 1,000 attempts with
//! candidates that are just as good as the current model, some ten would pass. So the n-th candidate that is
//! judged on the same holdout gets α · 6 / (π² n²). These add up to α over all n: however many candidates are
//! tried, the chance that *any* that is no better ever passes is α at most (union bound).
//!
//! Tries may depend on earlier verdicts. As long as only "refused" came back, the next try knew nothing about
//! the holdout beyond that, so up to the first pass the sequence of tries is as good as fixed in advance and
//! the bound holds. It does not hold for someone who picks the next candidate by the figures of the verdict:
//! figures are for people, and whoever tunes by them needs a fresh holdout. `judged` counts on over passes, and
//! over every holdout that shares a frame with this one: it starts again only where all frames are new.
//!
//! What each way of failing runs into:
//! - noisy, shuffled or wrong labels, early stop: a worse model; the chance that it wins the coin tosses falls
//!   exponentially with the frames, and α bounds it even when it is as good as the current one;
//! - a class missing in training: its recall falls, the bound per class refuses it whatever the others gain;
//! - a class removed: refused before any figure;
//! - a leaked holdout: refused if a single digest is in both;
//! - a tiny holdout: least sizes, in total and per class, and the exact test needs at least log₂(1 / α)
//!   frames that only the candidate gets right;
//! - a new class: its frames are all wrong for the current model, which would win any test. So frames of the
//!   known classes are also compared on their own, and the new class must be recognised.

use serde::{Deserialize, Serialize};

use crate::evaluate::{self, EvaluateError, answer};
use checks::{Paired, Tally};

mod checks;

/// What a candidate must fulfil.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Policy {
    /// Least gain in accuracy, 0..=1, on top of being significant.
    pub min_improvement: f64,
    /// Most that the recall of a known class may fall, 0..=1.
    pub max_class_loss: f64,
    /// With new classes: most that the accuracy on frames of the known ones may fall, 0..=1.
    pub max_known_loss: f64,
    /// Least recall of a class that the current model does not know, 0..=1.
    pub min_new_recall: f64,
    /// Largest expected calibration error of the candidate, 0..=1.
    pub max_ece: f64,
    /// Chance, over all candidates ever judged on one holdout, that one passes without being better, 0..=0.5.
    pub alpha: f64,
    /// Count a tie at the observed value half (mid-p): less strict by a little, bound no longer exact.
    pub mid_p: bool,
    /// Least frames of each class.
    pub min_per_class: usize,
    /// Least frames in total.
    pub min_total: usize,
}

impl Default for Policy {
    fn default() -> Self {
        Self {
            min_improvement: 0.0,
            max_class_loss: 0.05,
            max_known_loss: 0.01,
            min_new_recall: 0.5,
            max_ece: 0.1,
            alpha: 0.01,
            mid_p: false,
            min_per_class: 10,
            min_total: 100,
        }
    }
}

/// The frames that neither model was trained on.
#[derive(Clone, Copy, Debug)]
pub struct Holdout<'a> {
    /// The labels that people gave.
    pub labels: &'a [String],
    /// Index into `labels` per frame, N.
    pub truth: &'a [u32],
    /// Frames of the holdout (by digest) that were found in the candidate's training set.
    pub leaked: usize,
    /// Candidates that were judged on any of these frames before this one, passed or not.
    pub judged: u64,
}

/// What a model answered on the holdout.
#[derive(Clone, Copy, Debug)]
pub struct Answers<'a> {
    /// The model's labels.
    pub labels: &'a [String],
    /// N×(number of `labels`), 0..=1, in the holdout's order.
    pub probabilities: &'a [f32],
}

/// What the candidate takes, and what it may take, on the slowest board that it is meant for.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Cost {
    /// Median of a run, milliseconds.
    pub latency_ms: f64,
    /// Budget for it.
    pub allowed_latency_ms: f64,
    /// Memory that the loaded model adds, MiB.
    pub memory_mib: f64,
    /// Budget for it.
    pub allowed_memory_mib: f64,
}

/// What was looked at.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Check {
    /// No frame of the holdout was trained on.
    Leak,
    /// No class got lost, and each label of the holdout is known.
    Classes,
    /// Enough frames.
    Total,
    /// Enough frames of each class.
    PerClass,
    /// Better, and not by chance.
    Improvement,
    /// No known class got much worse.
    ClassLoss,
    /// With new classes: the known ones together got no worse.
    KnownClasses,
    /// New classes are recognised.
    NewClasses,
    /// Confidence means what it says.
    Calibration,
    /// Fast enough.
    Latency,
    /// Small enough.
    Memory,
}

/// The result of one check.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Reason {
    /// Which.
    pub check: Check,
    /// Its result.
    pub pass: bool,
    /// What was found, in the unit of the bound.
    pub found: f64,
    /// What it had to stay within.
    pub bound: f64,
    /// For people.
    pub text: String,
}

/// The gate's answer.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Verdict {
    /// Every check passed.
    pub pass: bool,
    /// All checks, in the order of [`Check`]; those that make no sense after a leak or a lost class are left
    /// out.
    pub reasons: Vec<Reason>,
    /// About how many more labelled frames would show the difference seen; none if it is shown already or
    /// there is none.
    pub frames_needed: Option<u64>,
}

/// Why nothing can be judged.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum GateError {
    /// A policy that is none.
    #[error("policy: {name} is {found}, expected {expected}")]
    Policy {
        /// Which.
        name: &'static str,
        /// What it is.
        found: f64,
        /// What it may be.
        expected: &'static str,
    },
    /// The answers do not fit the holdout.
    #[error("{whose} answers: {source}")]
    Answers {
        /// `current` or `candidate`.
        whose: &'static str,
        /// Why.
        source: EvaluateError,
    },
    /// A label of the holdout that does not exist, or one name twice.
    #[error("holdout: {0}")]
    Holdout(String),
}

impl Policy {
    fn check(&self) -> Result<(), GateError> {
        let parts = [
            ("min_improvement", self.min_improvement),
            ("max_class_loss", self.max_class_loss),
            ("max_known_loss", self.max_known_loss),
            ("min_new_recall", self.min_new_recall),
            ("max_ece", self.max_ece),
        ];
        for (name, found) in parts {
            if !(0.0..=1.0).contains(&found) {
                let expected = "0 to 1";
                return Err(GateError::Policy {
                    name,
                    found,
                    expected,
                });
            }
        }
        if !(self.alpha > 0.0 && self.alpha <= 0.5) {
            return Err(GateError::Policy {
                name: "alpha",
                found: self.alpha,
                expected: "above 0, at most 0.5",
            });
        }
        Ok(())
    }
}

/// What may be spent on the n-th candidate, n = `judged` + 1: `alpha` · 6 / (π² n²), `alpha` in total.
#[must_use]
pub fn spent_alpha(alpha: f64, judged: u64) -> f64 {
    let n = judged as f64 + 1.0;
    alpha * 6.0 / (std::f64::consts::PI * n).powi(2)
}

fn sound(
    holdout: &Holdout<'_>,
    whose: &'static str,
    answers: &Answers<'_>,
) -> Result<(), GateError> {
    // The truth counts by the holdout's labels; here only the sizes and the probabilities are looked at.
    evaluate::check(
        &vec![0; holdout.truth.len()],
        answers.probabilities,
        answers.labels.len(),
    )
    .map_err(|source| GateError::Answers { whose, source })?;
    distinct(answers.labels)
}

fn distinct(labels: &[String]) -> Result<(), GateError> {
    let mut sorted: Vec<&String> = labels.iter().collect();
    sorted.sort();
    match sorted.windows(2).find(|pair| pair[0] == pair[1]) {
        Some(pair) => Err(GateError::Holdout(format!(
            "the label {:?} is there twice",
            pair[0]
        ))),
        None => Ok(()),
    }
}

fn pair(holdout: &Holdout<'_>, current: &Answers<'_>, candidate: &Answers<'_>) -> Vec<Paired> {
    let rows = current.probabilities.chunks_exact(current.labels.len());
    let rows = rows.zip(candidate.probabilities.chunks_exact(candidate.labels.len()));
    rows.zip(holdout.truth)
        .map(|((old, new), &truth)| {
            let label = truth as usize;
            let best = answer(new);
            Paired {
                label,
                // A class that the current model does not know is never answered right.
                current: current.labels[answer(old)] == holdout.labels[label],
                candidate: candidate.labels[best] == holdout.labels[label],
                confidence: new[best],
            }
        })
        .collect()
}

/// Judges a candidate. See the module for what makes the verdict trustworthy.
///
/// # Errors
/// When the policy is out of range or the tables do not belong together. A bad candidate is no error.
pub fn judge(
    holdout: &Holdout<'_>,
    current: &Answers<'_>,
    candidate: &Answers<'_>,
    cost: &Cost,
    policy: &Policy,
) -> Result<Verdict, GateError> {
    policy.check()?;
    distinct(holdout.labels)?;
    if holdout
        .truth
        .iter()
        .any(|&t| t as usize >= holdout.labels.len())
    {
        return Err(GateError::Holdout(
            "a frame has a label that is not in the list".to_owned(),
        ));
    }
    let mut reasons = vec![
        checks::leak(holdout),
        checks::classes(holdout, current, candidate),
    ];
    if holdout.truth.is_empty() {
        reasons.push(checks::total(0, policy));
    }
    if reasons.iter().any(|reason| !reason.pass) {
        // Figures of such a comparison mean nothing.
        return Ok(Verdict {
            pass: false,
            reasons,
            frames_needed: None,
        });
    }
    sound(holdout, "current", current)?;
    sound(holdout, "candidate", candidate)?;
    let frames = pair(holdout, current, candidate);
    let count = |label: &String| {
        let frames = frames
            .iter()
            .filter(|frame| &holdout.labels[frame.label] == label);
        (label.clone(), Tally::of(frames))
    };
    let (known, new): (Vec<&String>, Vec<&String>) = candidate
        .labels
        .iter()
        .partition(|label| current.labels.contains(label));
    let known: Vec<(String, Tally)> = known.into_iter().map(count).collect();
    let new: Vec<(String, Tally)> = new.into_iter().map(count).collect();
    reasons.push(checks::total(frames.len(), policy));
    reasons.push(checks::per_class(known.iter().chain(&new), policy));
    let (improvement, frames_needed) = checks::improvement(&frames, holdout.judged, policy);
    reasons.push(improvement);
    reasons.push(checks::class_loss(&known, policy));
    if !new.is_empty() {
        reasons.push(checks::known_classes(&known, policy));
        reasons.push(checks::new_classes(&new, policy));
    }
    reasons.push(checks::calibration(&frames, policy));
    reasons.extend(checks::costs(cost));
    Ok(Verdict {
        pass: reasons.iter().all(|reason| reason.pass),
        reasons,
        frames_needed,
    })
}

#[cfg(test)]
mod tests;
