//! Model bundles: manifest, image to tensor, inference, results and self-test.
//!
//! This is the only copy of these steps: the device and the coordinator both use it, so that what was
//! measured in training is what happens in the field.
//!
//! ```no_run
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let bundle = models::Bundle::open("models/bundles/steel".as_ref())?;
//! let engine = models::Engine::load(&bundle)?;
//! let picture = models::Picture::read("plate.jpg".as_ref())?;
//! let outcome = engine.infer(&picture)?;
//! println!("{} {:.2}", outcome.label, outcome.score);
//! # Ok(())
//! # }
//! ```
#![forbid(unsafe_code)]

mod analyse;
mod bare;
mod bundle;
pub mod chunks;
pub mod delta;
mod engine;
mod fields;
mod image;
mod jpeg;
mod manifest;
mod memory;
mod net;
mod offer;
mod onnx;
mod outcome;
mod parts;
mod read;
mod reference;
mod release;
pub mod sandbox;
mod selftest;
mod sketch;
mod tensor;
mod trial;
mod wire;
mod write;

pub use bare::bare;
pub use bundle::{Bundle, BundleError};
pub use engine::{Engine, EngineError};
pub use fields::FieldError;
pub use image::{ImageError, MAX_ENCODED_BYTES, MAX_PIXELS, MAX_SIDE, Picture};
pub use manifest::{
    Activation, Budget, Color, Filter, GOLDEN_EMBEDDING_VALUES, Golden, InputSpec, Layout, Lineage,
    Manifest, ManifestErrors, ModelFile, OutputSpec, Resize, SCHEMA, Task, Thresholds,
};
pub use mesh_core::Digest;
pub use offer::offer_of;
pub use onnx::OnnxError;
pub use outcome::{EMBEDDING, Outcome, OutcomeError, UNKNOWN, outcome_of};
pub use parts::{Cut, MAX_CUT_ELEMENTS, Part, Span, Step, Steps};
pub use reference::{Reference, SCORE_BINS, score_bin};
pub use release::{MAX_RELEASE_BYTES, Parent, ReleaseDocument, ReleaseError, ReleaseFile};
pub use selftest::{GoldenResult, SelfTest, self_test};
pub use sketch::{Port, Sketch};
pub use tensor::{Input, Preparer};
pub use trial::{
    Fault, TRY_MODEL, Trial, ask_process, bound_memory, bound_time, this_program, try_bundle,
    try_here,
};
pub use write::{Draft, WriteError};

/// The largest model file in bytes, 256 MiB: more than half of a small board's memory.
pub const MAX_MODEL_BYTES: u64 = 256 << 20;

/// The SHA-256 of some bytes.
#[must_use]
pub fn digest_of(bytes: &[u8]) -> Digest {
    use sha2::Digest as _;
    Digest(sha2::Sha256::digest(bytes).into())
}
