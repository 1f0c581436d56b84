//! From the model's raw output to a label, a score and an embedding.

use crate::manifest::{Activation, Manifest, Task};

/// The label of a picture that no class is sure enough about.
pub const UNKNOWN: &str = "unknown";
/// The label of a result that is an embedding only.
pub const EMBEDDING: &str = "embedding";

/// What the model says about one picture.
#[derive(Clone, Debug, PartialEq)]
pub struct Outcome {
    /// The class; [`UNKNOWN`] below the manifest's `min_score`; [`EMBEDDING`] for the task embed.
    pub label: String,
    /// Index of the class with the top score, also when the label is unknown; none for embed.
    pub class: Option<usize>,
    /// The top probability, 0..=1; 1 for embed, where there is nothing to doubt.
    pub score: f32,
    /// How far the second class lies behind, 0..=1; the score itself with one class only.
    pub margin: f32,
    /// A probability per label, in the manifest's order; empty for embed.
    pub scores: Vec<f32>,
    /// The embedding; empty if the model has none.
    pub embedding: Vec<f32>,
}

/// Output that is no result.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("value {at} of the model's {output} is not a finite number")]
pub struct OutcomeError {
    /// `scores` or `embedding`.
    pub output: &'static str,
    /// Index of the first such value.
    pub at: usize,
}

fn finite(values: &[f32], output: &'static str) -> Result<(), OutcomeError> {
    match values.iter().position(|value| !value.is_finite()) {
        Some(at) => Err(OutcomeError { output, at }),
        None => Ok(()),
    }
}

/// Raw scores into probabilities.
fn activate(scores: &mut [f32], activation: Activation) {
    match activation {
        Activation::None => {}
        Activation::Sigmoid => {
            for score in scores {
                // Either form alone overflows at one end.
                *score = if *score >= 0.0 {
                    1.0 / (1.0 + (-*score).exp())
                } else {
                    let power = score.exp();
                    power / (1.0 + power)
                };
            }
        }
        Activation::Softmax => {
            // Relative to the largest, so that no power overflows.
            let top = scores.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            let mut sum = 0.0;
            for score in scores.iter_mut() {
                *score = (*score - top).exp();
                sum += *score;
            }
            for score in scores {
                *score /= sum;
            }
        }
    }
}

/// The outcome of a model's raw outputs in the manifest's order: scores, embedding, or the one that there is.
///
/// # Errors
/// When one of them is not a finite number.
pub fn outcome_of(manifest: &Manifest, outputs: Vec<Vec<f32>>) -> Result<Outcome, OutcomeError> {
    let mut outputs = outputs.into_iter();
    let mut next = |wanted: bool| if wanted { outputs.next() } else { None }.unwrap_or_default();
    let scores = next(manifest.output.scores.is_some());
    let embedding = next(manifest.output.embedding.is_some());
    outcome(manifest, scores, embedding)
}

/// The outcome of raw `scores` (one per label; empty for embed) and an `embedding` (may be empty).
fn outcome(
    manifest: &Manifest,
    mut scores: Vec<f32>,
    embedding: Vec<f32>,
) -> Result<Outcome, OutcomeError> {
    finite(&scores, "scores")?;
    finite(&embedding, "embedding")?;
    if manifest.task == Task::Embed {
        return Ok(Outcome {
            label: EMBEDDING.to_owned(),
            class: None,
            score: 1.0,
            margin: 1.0,
            scores: Vec::new(),
            embedding,
        });
    }
    activate(&mut scores, manifest.output.activation);
    // The first of equals, so that the answer does not depend on how it is searched.
    let (mut best, mut score, mut second) = (0, f32::NEG_INFINITY, f32::NEG_INFINITY);
    for (at, &value) in scores.iter().enumerate() {
        if value > score {
            (best, second, score) = (at, score, value);
        } else if value > second {
            second = value;
        }
    }
    let margin = if scores.len() > 1 {
        score - second
    } else {
        score
    };
    let sure = manifest
        .thresholds
        .min_score
        .is_none_or(|least| score >= least);
    let label = if sure {
        manifest.output.labels.get(best).map_or(UNKNOWN, |l| l)
    } else {
        UNKNOWN
    };
    Ok(Outcome {
        label: label.to_owned(),
        class: Some(best),
        score,
        margin,
        scores,
        embedding,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn softmax_bears_large_scores() {
        let mut scores = [1e30, -1e30, 1e30];
        activate(&mut scores, Activation::Softmax);
        assert_eq!(scores, [0.5, 0.0, 0.5]);
        let mut scores = [1e30, -1e30, 0.0];
        activate(&mut scores, Activation::Sigmoid);
        assert_eq!(scores, [1.0, 0.0, 0.5]);
    }

    #[test]
    fn not_a_number_is_not_a_reading() {
        assert_eq!(
            finite(&[0.0, f32::NAN], "scores"),
            Err(OutcomeError {
                output: "scores",
                at: 1
            })
        );
        assert!(finite(&[f32::INFINITY], "embedding").is_err());
    }

    proptest! {
        #[test]
        fn probabilities_sum_to_one(mut scores in prop::collection::vec(-1e4f32..1e4, 1..50)) {
            let top = scores.iter().enumerate().max_by(|a, b| a.1.total_cmp(b.1)).map(|(at, _)| at);
            activate(&mut scores, Activation::Softmax);
            prop_assert!((scores.iter().sum::<f32>() - 1.0).abs() < 1e-5);
            prop_assert!(scores.iter().all(|s| (0.0..=1.0).contains(s)));
            let top = top.map(|at| scores[at]);
            prop_assert_eq!(top, scores.iter().copied().reduce(f32::max));
        }
    }
}
