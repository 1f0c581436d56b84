//! The trainers that are part of the coordinator: a head on the embedding, and fine-tuning.

use std::sync::Arc;

use learn::{features::Features, head, surgery, tune};
use models::Engine;
use serde_json::json;
use tokio::task::spawn_blocking;

use super::{
    catalog::CatalogError,
    jobs::Reporter,
    look,
    request::Request,
    work::{Made, Material, Work, WorkError, manifest},
};

/// What the prepared images of a fine-tune may take: half of a small machine.
const MAX_PICTURES_BYTES: usize = 1 << 30;
/// The graph's output with one score per class, where the base has none.
const SCORES: &str = "logits";

impl Work {
    /// The embedding of every picture to train with, from the cache where it is there.
    pub(super) async fn embeddings(
        &self,
        material: &Material,
        reporter: &Reporter,
    ) -> Result<Vec<Vec<f32>>, WorkError> {
        let images: Vec<String> = material
            .train
            .iter()
            .map(|(i, _)| i.sha256.clone())
            .collect();
        let known = look::embeddings(
            &self.datasets,
            &self.objects,
            &material.engine,
            &images,
            usize::MAX,
            reporter,
        )
        .await?;
        Ok(images
            .iter()
            .map(|sha| known.get(sha).cloned().unwrap_or_default())
            .collect())
    }

    /// A new classifier on the base's embedding.
    pub(super) async fn head(
        &self,
        material: &Arc<Material>,
        request: &Request,
        reporter: &Reporter,
    ) -> Result<Made, WorkError> {
        let embeddings = self.embeddings(material, reporter).await?;
        let (material, reporter) = (material.clone(), reporter.clone());
        let settings = head::Settings {
            balanced: request.balanced,
            seed: request.seed,
            ..head::Settings::default()
        };
        spawn_blocking(move || {
            let truth: Vec<u32> = material.train.iter().map(|(_, class)| *class).collect();
            let dim = material.engine.manifest().output.embedding_dim;
            let rows = embeddings.concat();
            let features = Features::new(dim, material.labels.len(), rows, truth, None)?;
            let head = head::train(&features, &settings, &mut |p: learn::Progress| {
                reporter.tell("train", p.step, p.steps, Some(p.loss))
            })
            .map_err(|error| match error {
                learn::Error::Cancelled => WorkError::Cancelled,
                other => WorkError::Head(other),
            })?;
            let output = &material.engine.manifest().output;
            let scores = output.scores.clone().unwrap_or_else(|| SCORES.to_owned());
            let embedding = output.embedding.clone().unwrap_or_default();
            let bytes = material.bundle.model_bytes().map_err(CatalogError::from)?;
            let model = surgery::with_head(&bytes, &embedding, &scores, &head)?;
            let record = json!({
                "trainer": "head", "settings": settings, "strength": head.strength,
                "temperature": head.temperature, "fold_loss": head.fold_loss,
                "iterations": head.iterations, "images": features.len(),
            });
            // The file must say what the head says: tried on the golden pictures of the base.
            let labels = material.labels.clone();
            let made = Made {
                model,
                labels,
                scores,
                head: None,
                record,
            };
            let after = Engine::new(manifest(&material, &made, "0", None), made.model.clone())?;
            let inputs = material.bundle.manifest.golden.iter().filter_map(|golden| {
                let bytes = material.bundle.image_bytes(&golden.image).ok()?;
                after.tensor_from_bytes(&bytes).ok()
            });
            surgery::verify(&material.engine, &after, &head, &inputs.collect::<Vec<_>>())?;
            Ok(Made {
                head: Some(head),
                ..made
            })
        })
        .await?
    }

    /// A new classifier, and then the layers below it, by gradient descent.
    pub(super) async fn fine_tune(
        &self,
        material: &Arc<Material>,
        request: &Request,
        reporter: &Reporter,
    ) -> Result<Made, WorkError> {
        let start = self.head(material, request, reporter).await?;
        let input = &material.engine.manifest().input;
        let values: usize = input.shape.iter().product();
        let bytes = material.train.len() * values * size_of::<f32>();
        if bytes > MAX_PICTURES_BYTES {
            let most = MAX_PICTURES_BYTES / (values * size_of::<f32>());
            let found = material.train.len();
            return Err(WorkError::Tune(format!(
                "{found} images do not fit into the memory that it may take, {most} would"
            )));
        }
        let images = self.images(&material.train).await?;
        let (material, request) = (material.clone(), request.clone());
        let reporter = reporter.clone();
        spawn_blocking(move || {
            let failed = |error: tune::TuneError| match error {
                tune::TuneError::Stopped => WorkError::Cancelled,
                other => WorkError::Tune(other.to_string()),
            };
            let mut pictures = Vec::with_capacity(images.len() * values);
            for (at, bytes) in images.iter().enumerate() {
                if reporter.tell("features", at, images.len(), None).is_break() {
                    return Err(WorkError::Cancelled);
                }
                pictures.extend_from_slice(material.engine.tensor_from_bytes(bytes)?.values());
            }
            let batch = tune::Batch {
                pictures,
                labels: material.train.iter().map(|(_, class)| *class).collect(),
            };
            let name = &material.engine.manifest().input.name;
            let graph = tune::Graph::read(&start.model, name, &start.scores).map_err(failed)?;
            let settings = tune::Settings {
                epochs: request.epochs,
                batch: 32,
                rate: request.rate,
                seed: request.seed,
                train: match request.last_layers {
                    Some(layers) => tune::Train::LastBlocks(layers),
                    None => tune::Train::All,
                },
                warm_up: batch.labels.len().div_ceil(32),
                smoothing: 0.05,
                threads: std::thread::available_parallelism().map_or(1, std::num::NonZero::get),
                ..tune::Settings::default()
            };
            let tuned = tune::train(&graph, tune::Data::Memory(&batch), &settings, &mut |p| {
                let (step, steps) = (p.epoch * p.steps + p.step, p.epochs * p.steps);
                reporter.tell("train", step, steps, Some(f64::from(p.loss)))
            })
            .map_err(failed)?;
            let record = json!({
                "trainer": "fine-tune", "head": start.record, "epochs": settings.epochs,
                "batch": settings.batch, "rate": settings.rate, "decay": settings.decay,
                "smoothing": settings.smoothing, "last_layers": request.last_layers,
                "seed": settings.seed, "images": batch.labels.len(),
                "last_loss": tuned.losses.last(),
            });
            Ok(Made {
                model: tuned.onnx,
                head: None,
                record,
                ..start
            })
        })
        .await?
    }
}
