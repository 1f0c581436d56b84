//! What long work tells while it runs, and how it ends early.

use std::ops::ControlFlow;

use crate::features::FeaturesError;

/// How far a piece of work is. Counts only: who shows it has the clock.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Progress {
    /// Steps done, 0..=`steps`. May jump where work ends before its bound.
    pub step: usize,
    /// Steps at most.
    pub steps: usize,
    /// The objective after this step; smaller is better, and comparable within one part of the work only.
    pub loss: f64,
}

/// Called after each step. `Break` stops the work with [`Error::Cancelled`].
pub type Report<'a> = &'a mut dyn FnMut(Progress) -> ControlFlow<()>;

/// Why nothing was learned.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The callback said so.
    #[error("cancelled")]
    Cancelled,
    /// The data cannot be learned from.
    #[error(transparent)]
    Features(#[from] FeaturesError),
    /// A setting out of its range.
    #[error("setting {name} is {found}, expected {expected}")]
    Setting {
        /// Which.
        name: &'static str,
        /// What it is.
        found: String,
        /// What it may be.
        expected: &'static str,
    },
    /// The numbers left the range of f32; features of wildly different scale do that.
    #[error("{0} did not stay finite: scale the features down")]
    Diverged(&'static str),
}
