//! What a training is asked to do.

use serde::{Deserialize, Serialize};

use super::StartPolicy;

/// Which trainer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Trainer {
    /// A new classifier on the embedding: seconds.
    #[default]
    Head,
    /// The last blocks of the graph too: minutes.
    FineTune,
    /// The command that the configuration names.
    External,
}

impl Trainer {
    /// As it stands in requests.
    pub(crate) const fn as_str(self) -> &'static str {
        match self {
            Self::Head => "head",
            Self::FineTune => "fine-tune",
            Self::External => "external",
        }
    }
}

/// One training. Everything that its result depends on, besides the data.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct Request {
    /// Which trainer.
    #[serde(default)]
    pub(crate) trainer: Trainer,
    /// The model to start from, `name@version`; the task's newest accepted one if not given, else the
    /// backbone.
    #[serde(default)]
    pub(crate) base: Option<String>,
    /// The digest of the snapshot to train on; one of what is labelled now if not given.
    #[serde(default)]
    pub(crate) dataset: Option<String>,
    /// Everything random follows from it.
    #[serde(default = "one")]
    pub(crate) seed: u64,
    /// Passes over the data, 1..=1,000. Fine-tune only.
    #[serde(default = "passes")]
    pub(crate) epochs: usize,
    /// The peak learning rate, above 0, at most 1. Fine-tune only.
    #[serde(default = "rate")]
    pub(crate) rate: f32,
    /// How many of the last parameter layers are trained; all if not given. Fine-tune only.
    #[serde(default)]
    pub(crate) last_layers: Option<usize>,
    /// Each class counts the same, however many images it has.
    #[serde(default)]
    pub(crate) balanced: bool,
    /// Below this score a device says `unknown`, 0..=1.
    #[serde(default = "min_score")]
    pub(crate) min_score: f32,
    /// For whom it is done, if not for who asks: both are recorded. 1 to 100 characters.
    #[serde(default)]
    pub(crate) author: Option<String>,
}

const fn one() -> u64 {
    1
}

const fn passes() -> usize {
    5
}

const fn rate() -> f32 {
    0.01
}

const fn min_score() -> f32 {
    0.5
}

impl Request {
    /// A training that nobody asked for, with every setting at its default. `why` stands for who asks.
    pub(super) fn by_itself(policy: &StartPolicy, why: &str) -> Self {
        Self {
            trainer: policy.trainer,
            base: None,
            dataset: None,
            seed: one(),
            epochs: passes(),
            rate: rate(),
            last_layers: None,
            balanced: policy.balanced,
            min_score: min_score(),
            author: Some(format!("by itself: {why}")),
        }
    }

    /// Who asked, as it is recorded.
    pub(crate) fn author(&self) -> &str {
        self.author.as_deref().unwrap_or("nobody")
    }

    /// What is out of its range, in words.
    pub(crate) fn check(&self) -> Result<(), String> {
        let wrong = |field: &str, what: &str| Err(format!("{field}: {what}"));
        if !(1..=1_000).contains(&self.epochs) {
            return wrong("epochs", "is from 1 to 1000");
        }
        if !(self.rate > 0.0 && self.rate <= 1.0) {
            return wrong("rate", "is above 0 and at most 1");
        }
        if !(0.0..=1.0).contains(&self.min_score) {
            return wrong("min_score", "is from 0 to 1");
        }
        if self.last_layers == Some(0) {
            return wrong("last_layers", "is at least 1");
        }
        Ok(())
    }
}
