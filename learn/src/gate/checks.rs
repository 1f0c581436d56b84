//! The checks of the gate, each with its figures and its sentence.

use super::{Answers, Check, Cost, Holdout, Policy, Reason, spent_alpha};
use crate::{evaluate, mcnemar};

/// Right or wrong per frame, and the candidate's confidence.
pub(super) struct Paired {
    pub(super) label: usize,
    pub(super) current: bool,
    pub(super) candidate: bool,
    pub(super) confidence: f32,
}

/// Frames, and how many of them the current model and the candidate answer right.
#[derive(Clone, Copy, Default)]
pub(super) struct Tally {
    pub(super) rows: u64,
    pub(super) current: u64,
    pub(super) candidate: u64,
}

impl Tally {
    pub(super) fn of<'a>(frames: impl Iterator<Item = &'a Paired>) -> Self {
        frames.fold(Self::default(), |tally, frame| Self {
            rows: tally.rows + 1,
            current: tally.current + u64::from(frame.current),
            candidate: tally.candidate + u64::from(frame.candidate),
        })
    }

    pub(super) fn part(&self, right: u64) -> f64 {
        right as f64 / self.rows.max(1) as f64
    }

    pub(super) fn gain(&self) -> f64 {
        (self.candidate as f64 - self.current as f64) / self.rows.max(1) as f64
    }
}

/// Room for rounding in comparisons of ratios of whole numbers.
const ROUNDING: f64 = 1e-12;

pub(super) fn leak(holdout: &Holdout<'_>) -> Reason {
    let leaked = holdout.leaked;
    Reason {
        check: Check::Leak,
        pass: leaked == 0,
        found: leaked as f64,
        bound: 0.0,
        text: if leaked == 0 {
            "No held-back frame was trained on.".to_owned()
        } else {
            format!("{leaked} held-back frames were trained on: the figures would flatter.")
        },
    }
}

pub(super) fn classes(
    holdout: &Holdout<'_>,
    current: &Answers<'_>,
    candidate: &Answers<'_>,
) -> Reason {
    let lost: Vec<&str> = current
        .labels
        .iter()
        .chain(holdout.labels)
        .filter(|label| !candidate.labels.contains(label))
        .map(String::as_str)
        .collect();
    Reason {
        check: Check::Classes,
        pass: lost.is_empty(),
        found: lost.len() as f64,
        bound: 0.0,
        text: if lost.is_empty() {
            "The candidate knows every class.".to_owned()
        } else {
            format!("The candidate does not know {}.", lost.join(", "))
        },
    }
}

pub(super) fn total(frames: usize, policy: &Policy) -> Reason {
    let least = policy.min_total.max(1);
    Reason {
        check: Check::Total,
        pass: frames >= least,
        found: frames as f64,
        bound: least as f64,
        text: if frames >= least {
            format!("{frames} frames were held back.")
        } else {
            format!(
                "{frames} frames were held back, {} more are needed.",
                least - frames
            )
        },
    }
}

pub(super) fn per_class<'a>(
    classes: impl Iterator<Item = &'a (String, Tally)>,
    policy: &Policy,
) -> Reason {
    let least = policy.min_per_class.max(1) as u64;
    let mut few = Vec::new();
    let mut smallest = u64::MAX;
    for (name, tally) in classes {
        smallest = smallest.min(tally.rows);
        if tally.rows < least {
            few.push(format!("{} of {name}", least - tally.rows));
        }
    }
    Reason {
        check: Check::PerClass,
        pass: few.is_empty(),
        found: smallest as f64,
        bound: least as f64,
        text: if few.is_empty() {
            format!("Each class has at least {smallest} held-back frames.")
        } else {
            format!("More held-back frames are needed: {}.", few.join(", "))
        },
    }
}

pub(super) fn improvement(
    frames: &[Paired],
    judged: u64,
    policy: &Policy,
) -> (Reason, Option<u64>) {
    let all = Tally::of(frames.iter());
    let wins = frames.iter().filter(|f| f.candidate && !f.current).count() as u64;
    let losses = frames.iter().filter(|f| f.current && !f.candidate).count() as u64;
    let alpha = spent_alpha(policy.alpha, judged);
    let p = mcnemar::one_sided(wins, losses, policy.mid_p);
    let (old, new) = (
        100.0 * all.part(all.current),
        100.0 * all.part(all.candidate),
    );
    let story = format!(
        "Accuracy {old:.1} % before, {new:.1} % after; {wins} frames only the candidate got right, {losses} \
         only the current model"
    );
    let enough = all.gain() >= policy.min_improvement - ROUNDING;
    let mut frames_needed = None;
    let text = if wins <= losses {
        format!("{story}: not better.")
    } else if !enough {
        let least = 100.0 * policy.min_improvement;
        format!("{story}: the gain is below the {least:.1} points asked for.")
    } else if p <= alpha {
        format!("{story}: chance does that with p = {p:.1e}, at most {alpha:.1e} is allowed.")
    } else {
        frames_needed = mcnemar::frames_needed(all.rows, wins, losses, alpha, policy.mid_p);
        let needs = match frames_needed {
            Some(more) => format!("needs about {more} more labelled frames"),
            None => "more frames than anybody labels would be needed".to_owned(),
        };
        format!(
            "{story}: chance does that with p = {p:.1e}, at most {alpha:.1e} is allowed (candidate {} on these \
             frames); {needs}.",
            judged.saturating_add(1)
        )
    };
    let reason = Reason {
        check: Check::Improvement,
        pass: wins > losses && enough && p <= alpha,
        found: p,
        bound: alpha,
        text,
    };
    (reason, frames_needed)
}

pub(super) fn class_loss(known: &[(String, Tally)], policy: &Policy) -> Reason {
    let worst = known
        .iter()
        .min_by(|a, b| a.1.gain().total_cmp(&b.1.gain()));
    let (name, tally) = worst.map_or(("none", Tally::default()), |(name, t)| (name.as_str(), *t));
    let loss = (-tally.gain()).max(0.0);
    let pass = loss <= policy.max_class_loss + ROUNDING;
    Reason {
        check: Check::ClassLoss,
        pass,
        found: loss,
        bound: policy.max_class_loss,
        text: if loss == 0.0 {
            "No class is recognised worse than before.".to_owned()
        } else {
            format!(
                "{name} loses most: {:.1} % of its frames recognised before, {:.1} % after; a loss of {:.1} \
                 points is allowed.",
                100.0 * tally.part(tally.current),
                100.0 * tally.part(tally.candidate),
                100.0 * policy.max_class_loss
            )
        },
    }
}

pub(super) fn known_classes(known: &[(String, Tally)], policy: &Policy) -> Reason {
    let sum = known
        .iter()
        .fold(Tally::default(), |sum, (_, tally)| Tally {
            rows: sum.rows + tally.rows,
            current: sum.current + tally.current,
            candidate: sum.candidate + tally.candidate,
        });
    let loss = (-sum.gain()).max(0.0);
    Reason {
        check: Check::KnownClasses,
        pass: loss <= policy.max_known_loss + ROUNDING,
        found: loss,
        bound: policy.max_known_loss,
        text: format!(
            "On the classes known before: {:.1} % before, {:.1} % after; a loss of {:.1} points is allowed.",
            100.0 * sum.part(sum.current),
            100.0 * sum.part(sum.candidate),
            100.0 * policy.max_known_loss
        ),
    }
}

pub(super) fn new_classes(new: &[(String, Tally)], policy: &Policy) -> Reason {
    let recall = |tally: &Tally| tally.part(tally.candidate);
    let worst = new
        .iter()
        .min_by(|a, b| recall(&a.1).total_cmp(&recall(&b.1)));
    let (name, found) = worst.map_or(("none", 1.0), |(name, tally)| {
        (name.as_str(), recall(tally))
    });
    Reason {
        check: Check::NewClasses,
        pass: found >= policy.min_new_recall - ROUNDING,
        found,
        bound: policy.min_new_recall,
        text: format!(
            "Of the new classes {name} is recognised least, {:.1} % of its frames; {:.1} % are asked for.",
            100.0 * found,
            100.0 * policy.min_new_recall
        ),
    }
}

pub(super) fn calibration(frames: &[Paired], policy: &Policy) -> Reason {
    let found = evaluate::ece(
        frames
            .iter()
            .map(|frame| (frame.confidence, frame.candidate)),
    );
    Reason {
        check: Check::Calibration,
        pass: found <= policy.max_ece,
        found,
        bound: policy.max_ece,
        text: format!(
            "Confidence is off by {:.1} points on average, {:.1} are allowed.",
            100.0 * found,
            100.0 * policy.max_ece
        ),
    }
}

pub(super) fn costs(cost: &Cost) -> [Reason; 2] {
    let within = |check, what: &str, unit, found: f64, bound: f64| Reason {
        check,
        // Not a number is not within the budget.
        pass: found >= 0.0 && found <= bound,
        found,
        bound,
        text: format!("{what} {found:.1} {unit}, {bound:.1} {unit} are allowed."),
    };
    [
        within(
            Check::Latency,
            "A run takes",
            "ms",
            cost.latency_ms,
            cost.allowed_latency_ms,
        ),
        within(
            Check::Memory,
            "The loaded model takes",
            "MiB",
            cost.memory_mib,
            cost.allowed_memory_mib,
        ),
    ]
}
