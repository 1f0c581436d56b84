//! One model across several devices.
//!
//! ```text
//!  asks ══ picture ══> leader: first part ══ values ══> lender: next part ══ values ══> leader … ══> answer
//!                         │ plans, loads, replaces
//!                         └── /lacewing/part/1
//! ```
//!
//! The leader has the picture and gives only values away; every value comes back to it before it goes on, so it knows at once
//! who is slow or gone, takes others instead and sends the same frame through again. How the model is cut is
//! [`mesh_core::split`]'s business. Each device takes its part out of a bundle that it has itself.

mod lead;
mod lend;
mod planner;
#[cfg(test)]
mod tests;
pub(crate) mod wire;

use std::path::Path;

use mesh_core::Digest;
use models::{Bundle, Manifest, Part, Span, Steps};
use tokio::time::Instant;

pub(crate) use lead::{Leader, Terms};
pub(crate) use lend::Lender;
pub(crate) use wire::PART;

/// How often a piece is run to see how fast the device is; the fastest counts.
const RUNS: usize = 3;
/// The piece is at least this share of the whole.
const PIECE: u64 = 8;

/// A model that can be taken apart, and how fast this device computes it.
pub(super) struct Source {
    pub(super) manifest: Manifest,
    pub(super) digest: Digest,
    pub(super) steps: Steps,
    /// Multiply-adds per microsecond.
    pub(super) speed: f64,
}

/// Reads a bundle and runs a piece of its model. Takes a while.
pub(super) fn open(folder: &Path) -> Result<Source, String> {
    let bundle = Bundle::open(folder).map_err(|error| error.to_string())?;
    let model = bundle.model_bytes().map_err(|error| error.to_string())?;
    let steps = Steps::of(&bundle.manifest, &model).map_err(|error| error.to_string())?;
    let digest = bundle.manifest.model.sha256.parse();
    let digest: Digest = digest.map_err(|_| "its digest is none".to_owned())?;
    let total: u64 = steps.0.iter().map(|step| step.operations).sum();
    let mut operations = 0;
    let mut count = 0;
    for step in &steps.0 {
        operations += step.operations;
        count += 1;
        if operations * PIECE >= total {
            break;
        }
    }
    let span = steps.span(0, count).unwrap_or_default();
    let part = Part::load(&bundle.manifest, &model, &span).map_err(|error| error.to_string())?;
    let mut fastest = f64::INFINITY;
    for _ in 0..RUNS {
        let begin = Instant::now();
        let ran = part.run(vec![0.0; part.takes()]);
        ran.map_err(|error| error.to_string())?;
        fastest = fastest.min(begin.elapsed().as_secs_f64() * 1e6);
    }
    Ok(Source {
        manifest: bundle.manifest,
        digest,
        steps,
        speed: operations as f64 / fastest.max(1.0),
    })
}

/// Loads a part from the disk. Takes a while.
pub(super) fn part(folder: &Path, digest: &Digest, span: &Span) -> Result<Part, String> {
    let bundle = Bundle::open(folder).map_err(|error| error.to_string())?;
    // It may have been replaced since.
    if bundle.manifest.model.sha256.parse().ok() != Some(*digest) {
        return Err("the bundle holds another model now".into());
    }
    let model = bundle.model_bytes().map_err(|error| error.to_string())?;
    Part::load(&bundle.manifest, &model, span).map_err(|error| error.to_string())
}

/// A part of a model as a kind of work.
pub(super) fn kind(model: &Digest, span: &Span) -> Digest {
    // Plain data: it always becomes JSON.
    models::digest_of(&serde_json::to_vec(&(model, span)).unwrap_or_default())
}
