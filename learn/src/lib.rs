//! Learning: ONNX in, better ONNX out, and the proof that it is better.
//!
//! Everything here is a pure function of its input, its settings and its seed: no clock, no files, no network.
//! Long work tells its progress to a callback that may stop it.
#![forbid(unsafe_code)]

mod calibrate;
pub mod evaluate;
pub mod features;
pub mod gate;
pub mod head;
mod mcnemar;
mod progress;
mod random;
mod softmax;
pub mod surgery;
pub mod suspect;
pub mod tune;

pub use progress::{Error, Progress, Report};
