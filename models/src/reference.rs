//! What a training set looks like through its model: the yardstick of novelty and drift.

use serde::Serialize;

use crate::{manifest::Manifest, outcome::Outcome, outcome::UNKNOWN};

/// How many steps of a tenth the histogram of top scores has.
pub const SCORE_BINS: usize = 10;

/// What the training set looks like through the model: the yardstick of novelty and drift.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Reference {
    /// How many pictures it was taken from.
    pub samples: u64,
    /// Mean of each value of the embedding.
    pub mean: Vec<f32>,
    /// Standard deviation of each value of the embedding, above 0.
    pub deviation: Vec<f32>,
    /// The median, 95th and 99th percentile of [`Reference::distance`] over the pictures, rising.
    pub distance: [f32; 3],
    /// The share of the pictures whose top score lies in each tenth; empty for embed.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub scores: Vec<f32>,
    /// The share of the pictures that each label has, in the order of the labels; empty for embed.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub labels: Vec<f32>,
    /// The share of the pictures below the threshold, 0..=1.
    pub unknown: f32,
}

impl Reference {
    /// How far an embedding lies from the training set: root mean square of its values, each measured in
    /// deviations from its mean (a diagonal Mahalanobis distance over the square root of the dimension).
    #[must_use]
    pub fn distance(&self, embedding: &[f32]) -> f32 {
        let scaled = embedding.iter().zip(&self.mean).zip(&self.deviation);
        let sum: f32 = scaled
            .map(|((value, mean), deviation)| ((value - mean) / deviation).powi(2))
            .sum();
        #[expect(clippy::cast_precision_loss, reason = "some hundred values")]
        let count = embedding.len().max(1) as f32;
        (sum / count).sqrt()
    }

    /// [`Reference::distance`] in units of the 99th percentile: above 1 one training picture in a hundred lies.
    #[must_use]
    pub fn novelty(&self, embedding: &[f32]) -> f32 {
        self.distance(embedding) / self.distance[2].max(f32::MIN_POSITIVE)
    }

    /// Takes the measure of what `manifest`'s model said about each picture of its training set. `truth` is each
    /// picture's class; nothing for the task embed. Nothing if there are no pictures or no embeddings.
    #[must_use]
    pub fn measure(manifest: &Manifest, outcomes: &[Outcome], truth: &[usize]) -> Option<Self> {
        /// Below it a value of the embedding is constant, and any change of it would look enormous.
        const LEAST_DEVIATION: f32 = 1e-3;
        let dim = manifest.output.embedding_dim;
        if outcomes.is_empty() || dim == 0 || outcomes.iter().any(|o| o.embedding.len() != dim) {
            return None;
        }
        #[expect(clippy::cast_precision_loss, reason = "at most some million pictures")]
        let count = outcomes.len() as f64;
        let (mut mean, mut square) = (vec![0.0f64; dim], vec![0.0f64; dim]);
        for outcome in outcomes {
            for ((mean, square), &value) in mean.iter_mut().zip(&mut square).zip(&outcome.embedding)
            {
                let value = f64::from(value);
                *mean += value / count;
                *square += value * value / count;
            }
        }
        let narrow = |value: f64| {
            #[expect(
                clippy::cast_possible_truncation,
                reason = "back to the model's precision"
            )]
            let narrow = value as f32;
            narrow
        };
        let deviation = mean.iter().zip(&square).map(|(mean, square)| {
            narrow((square - mean * mean).max(0.0).sqrt()).max(LEAST_DEVIATION)
        });
        let mut reference = Self {
            samples: outcomes.len() as u64,
            deviation: deviation.collect(),
            mean: mean.iter().map(|mean| narrow(*mean)).collect(),
            distance: [0.0; 3],
            scores: Vec::new(),
            labels: Vec::new(),
            unknown: 0.0,
        };
        let mut distances: Vec<f32> = outcomes
            .iter()
            .map(|o| reference.distance(&o.embedding))
            .collect();
        distances.sort_unstable_by(f32::total_cmp);
        reference.distance = [50, 95, 99].map(|percent| {
            let at = (distances.len() * percent).div_ceil(100).max(1) - 1;
            distances.get(at).copied().unwrap_or_default()
        });
        let classes = manifest.output.labels.len();
        if classes > 0 {
            let share = narrow(1.0 / count);
            reference.scores = vec![0.0; SCORE_BINS];
            reference.labels = vec![0.0; classes];
            for outcome in outcomes {
                if let Some(bin) = reference.scores.get_mut(score_bin(outcome.score)) {
                    *bin += share;
                }
                if outcome.label == UNKNOWN {
                    reference.unknown += share;
                }
            }
            for class in truth {
                if let Some(label) = reference.labels.get_mut(*class) {
                    *label += share;
                }
            }
            let shares = reference.scores.iter_mut().chain(&mut reference.labels);
            shares.for_each(|share| *share = share.min(1.0));
            reference.unknown = reference.unknown.min(1.0);
        }
        Some(reference)
    }
}

/// The tenth that a score of 0..=1 lies in.
#[must_use]
pub fn score_bin(score: f32) -> usize {
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        clippy::cast_precision_loss,
        reason = "saturates, and is bounded"
    )]
    let bin = (score * SCORE_BINS as f32) as usize;
    bin.min(SCORE_BINS - 1)
}
