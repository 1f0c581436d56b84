//! Letting an engine look at many images.

use std::{num::NonZero, sync::Arc};

use bytes::Bytes;
use learn::head::Head;
use models::{Engine, Manifest, Outcome};
use tokio::task::spawn_blocking;

use super::{jobs::Reporter, work::WorkError};
use crate::objects::Objects;

/// Images in memory at a time: some hundred kilobytes each.
const CHUNK: usize = 32;

/// What `engine` says about each image, in their order, on as many threads as there are processors.
pub(super) async fn look(
    objects: &Objects,
    engine: &Arc<Engine>,
    images: &[String],
    reporter: &Reporter,
    phase: &str,
) -> Result<Vec<Outcome>, WorkError> {
    let threads = std::thread::available_parallelism().map_or(1, NonZero::get);
    let mut outcomes = Vec::with_capacity(images.len());
    for chunk in images.chunks(CHUNK) {
        if reporter
            .tell(phase, outcomes.len(), images.len(), None)
            .is_break()
        {
            return Err(WorkError::Cancelled);
        }
        let mut bytes: Vec<(String, Bytes)> = Vec::with_capacity(chunk.len());
        for sha in chunk {
            bytes.push((sha.clone(), objects.read(sha).await?));
        }
        let share = bytes.len().div_ceil(threads);
        let parts: Vec<Vec<(String, Bytes)>> = bytes.chunks(share).map(<[_]>::to_vec).collect();
        let work = parts.into_iter().map(|part| {
            let engine = engine.clone();
            spawn_blocking(move || {
                let run = |(sha, bytes): (String, Bytes)| {
                    let named = |error| WorkError::Request(format!("image {sha}: {error}"));
                    let input = engine.tensor_from_bytes(&bytes).map_err(named)?;
                    Ok::<_, WorkError>(engine.run(&input)?)
                };
                part.into_iter().map(run).collect::<Result<Vec<_>, _>>()
            })
        });
        for part in work.collect::<Vec<_>>() {
            outcomes.extend(part.await??);
        }
    }
    Ok(outcomes)
}

/// What a model says that is a head on an embedding.
pub(super) fn headed(head: &Head, manifest: &Manifest, embedding: Vec<f32>) -> Outcome {
    let scores = head.probabilities(&embedding);
    let class = learn::evaluate::answer(&scores);
    let score = scores.get(class).copied().unwrap_or_default();
    let others = scores.iter().enumerate().filter(|(at, _)| *at != class);
    let second = others.map(|(_, score)| *score).fold(0.0, f32::max);
    let least = manifest.thresholds.min_score.unwrap_or(0.0);
    let label = manifest.output.labels.get(class).filter(|_| score >= least);
    Outcome {
        label: label.cloned().unwrap_or_else(|| models::UNKNOWN.to_owned()),
        class: Some(class),
        score,
        margin: score - second,
        scores,
        embedding,
    }
}
