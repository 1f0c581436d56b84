//! Learning: ONNX in, better ONNX out, and the proof that it is better.
//!
//! Everything here is a pure function of its input, its settings and its seed: no clock, no files, no network.
//! Long work tells its progress to a callback that may stop it.

pub mod tune;
