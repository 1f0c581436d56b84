//! What a model is to others who would have it look at a frame.

use mesh_core::{Digest, offload::Offer};

use crate::{Manifest, Task, digest_of};

/// What is offered of a model; nothing where it does not name anything. Devices and the coordinator make the same of the same
/// manifest, so that they find each other.
#[must_use]
pub fn offer_of(manifest: &Manifest) -> Option<Offer> {
    let mut labels: Vec<&str> = manifest.output.labels.iter().map(String::as_str).collect();
    if manifest.task != Task::Classify || labels.is_empty() {
        return None;
    }
    // In whatever order: an answer names its label.
    labels.sort_unstable();
    let kind = serde_json::to_vec(&(manifest.task.as_str(), labels)).ok()?;
    let digest: Digest = manifest.model.sha256.parse().ok()?;
    Some(Offer {
        model: manifest.id(),
        digest,
        kind: digest_of(&kind),
        bytes: manifest.model.bytes,
    })
}
