//! Letting an engine look at many images.

use std::{
    collections::{BTreeSet, HashMap},
    num::NonZero,
    sync::Arc,
};

use bytes::Bytes;
use learn::head::Head;
use models::{Engine, Manifest, Outcome};
use tokio::task::spawn_blocking;

use tokio_util::sync::CancellationToken;

use super::{
    catalog::{Catalog, CatalogError},
    jobs::Reporter,
    work::{WorkError, engine_digest},
};
use crate::{datasets::Datasets, objects::Objects};

/// Images in memory at a time: some hundred kilobytes each.
const CHUNK: usize = 32;
/// Embeddings that are computed while somebody waits for the queue: about a second.
const AT_ONCE: usize = 100;

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

/// The embedding of each image: what is known from before, and what is missing of it, at most `most` computed now.
pub(super) async fn embeddings(
    datasets: &Datasets,
    objects: &Objects,
    engine: &Arc<Engine>,
    images: &[String],
    most: usize,
    reporter: &Reporter,
) -> Result<HashMap<String, Vec<f32>>, WorkError> {
    let digest = engine_digest(engine.manifest());
    let mut known = datasets.features(&digest, images).await?;
    let missing = images.iter().filter(|sha| !known.contains_key(*sha));
    let missing: BTreeSet<&String> = missing.take(most).collect();
    let missing: Vec<String> = missing.into_iter().cloned().collect();
    let seen = look(objects, engine, &missing, reporter, "features").await?;
    let seen = seen.into_iter().map(|outcome| outcome.embedding);
    let new: Vec<(String, Vec<f32>)> = missing.into_iter().zip(seen).collect();
    datasets.put_features(&digest, &new).await?;
    known.extend(new);
    Ok(known)
}

/// What a model that is in the catalog makes of images, for the queue of labels; nothing of those that it has no
/// time for now, or if it is not there.
pub(crate) async fn embeddings_by(
    catalog: &Arc<Catalog>,
    datasets: &Datasets,
    objects: &Objects,
    model: &str,
    images: &[String],
) -> Result<HashMap<String, Vec<f32>>, WorkError> {
    let model = match catalog.find(model).await {
        Err(CatalogError::Unknown(_)) => return Ok(HashMap::new()),
        found => found?,
    };
    let catalog = catalog.clone();
    let engine = spawn_blocking(move || catalog.engine(&model)).await??;
    let reporter = Reporter::new(CancellationToken::new());
    embeddings(datasets, objects, &engine, images, AT_ONCE, &reporter).await
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
