//! Who looks at a frame besides the device that took it.
//!
//! Two policies for the device that asks ([`ask::Asker`]): *escalate*, where its own model is unsure and a neighbour has
//! a bigger one of the same kind, and *spill*, where it cannot keep up or is too hot and an idle neighbour has the same
//! model. One for the device that answers ([`serve::Admission`]): no more of its time than a set share. Whatever comes of
//! it, the device that asks has an answer by its deadline: its own.

pub mod ask;
pub mod serve;
#[cfg(test)]
mod tests;

use alloc::string::String;

use serde::{Deserialize, Serialize};

use crate::{Digest, Name};

/// Models that one device answers with: the one that it runs, and one that it keeps for others. Room for twice that.
pub const MAX_OFFERS: usize = 4;
/// Neighbours whose offers are known: more than a device would ever ask.
pub const MAX_KNOWN: usize = 16;
/// The longest name of a model, with a version.
const MAX_MODEL: usize = 128;
/// The longest label: as in a reading.
const MAX_LABEL: usize = 256;

/// A model that a device can look at frames with.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Offer {
    /// `name@version`.
    pub model: String,
    /// Of its file.
    pub digest: Digest,
    /// Of its task and its labels: answers of models of different kinds do not replace each other.
    pub kind: Digest,
    /// Length of its file: of two of the same kind the larger one is taken to know better.
    pub bytes: u64,
}

impl Offer {
    /// Is it one that a device would make?
    #[must_use]
    pub fn is_bounded(&self) -> bool {
        (1..=MAX_MODEL).contains(&self.model.len())
    }
}

/// What a neighbour's model says about a frame.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Answer {
    /// `name@version` of the model.
    pub model: String,
    /// The class, or `unknown`.
    pub label: String,
    /// How sure the model is, 0..=1.
    pub score: f32,
    /// How far the best class lies before the second, 0..=1.
    pub margin: f32,
}

impl Answer {
    /// Could a model have said it? `knows` tells which labels there are.
    #[must_use]
    pub fn is_sound(&self, knows: impl Fn(&str) -> bool) -> bool {
        (1..=MAX_MODEL).contains(&self.model.len())
            && self.label.len() <= MAX_LABEL
            && (0.0..=1.0).contains(&self.score)
            && (0.0..=1.0).contains(&self.margin)
            && knows(&self.label)
    }
}

/// An answer, and whose it is.
#[derive(Clone, Debug, PartialEq)]
pub struct Answered {
    /// The device that computed it.
    pub by: Name,
    /// What it said.
    pub answer: Answer,
}
