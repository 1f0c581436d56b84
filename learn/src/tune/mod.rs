//! Fine-tuning: ONNX in, data in, ONNX out with the same graph and better numbers.
//!
//! The operators are few and our own, each with its gradient: convolution (grouped, depthwise), dense layers,
//! frozen batch norm, activations, pooling, broadcasting arithmetic. Batch norm keeps its statistics, so that
//! pictures of a batch do not depend on each other and a batch can be split between threads.

mod augment;
mod back;
mod file;
mod graph;
mod kernel;
mod layers;
mod nodes;
mod ops;
mod optimise;
mod random;
mod run;
mod settings;
mod train;
mod whole;

pub use augment::Augment;
pub use graph::Graph;
pub use optimise::Optimiser;
pub use settings::{Batch, Data, Progress, Settings, Train, Tuned};
pub use train::{estimate, train};
pub use whole::Gradients;

/// Why a network cannot be trained.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TuneError {
    /// No ONNX.
    #[error("not a usable ONNX file: {0}")]
    Unreadable(String),
    /// Not in the graph.
    #[error("the model has no {0:?}")]
    Missing(String),
    /// An operator without a gradient here.
    #[error("{0}: this operator cannot be trained")]
    Operator(String),
    /// A supported operator in a form that is not supported.
    #[error("{node}: {problem}")]
    Refused {
        /// Operator and name, or input or initialiser.
        node: String,
        /// What about it.
        problem: String,
    },
    /// Settings outside of their range.
    #[error("settings: {0}")]
    Settings(String),
    /// Pictures or labels that do not fit.
    #[error("data: {0}")]
    Data(String),
    /// The loss is no number any more: the learning rate is too high, or the data holds something odd.
    #[error("training left the range of numbers in step {0}")]
    Diverged(usize),
    /// The progress callback said so.
    #[error("stopped")]
    Stopped,
}
