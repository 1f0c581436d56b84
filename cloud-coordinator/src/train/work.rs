//! One training from beginning to end.

use std::{
    collections::{BTreeMap, HashSet},
    sync::Arc,
    time::Duration,
};

use bytes::Bytes;
use learn::{
    evaluate::{self, Evaluation},
    features::Features,
    gate::{self, Answers, Cost, Holdout, Policy, Verdict},
    head, surgery, tune,
};
use models::{Activation, Bundle, Draft, Engine, Lineage, Manifest, Outcome, Reference, Task};
use serde_json::json;
use tokio::task::spawn_blocking;

use super::{
    catalog::{Catalog, CatalogError, Model, ModelState, NewModel},
    external,
    jobs::Reporter,
    look::{headed, look},
    request::{Request, Trainer},
};
use crate::{
    datasets::{Dataset, DatasetError, Datasets, Item},
    objects::{ObjectError, Objects},
};

/// Golden pictures of a bundle: one for each of the first classes.
const GOLDEN: usize = 8;
/// The largest golden picture: it travels to every device.
const GOLDEN_BYTES: usize = 512 * 1024;
/// What the prepared images of a fine-tune may take: half of a small machine.
const MAX_PICTURES_BYTES: usize = 1 << 30;
/// Generations that are searched for pictures of the holdout.
const ANCESTORS: usize = 50;
/// The graph's output with one score per class, where the base has none.
const SCORES: &str = "logits";

/// How trainings are bounded and judged.
#[derive(Clone, Debug)]
pub(crate) struct Settings {
    /// A job that takes longer is ended.
    pub(crate) time_limit: Duration,
    /// The external trainer and its arguments.
    pub(crate) external: Vec<String>,
    /// What a candidate must fulfil.
    pub(crate) policy: Policy,
}

/// Why no model came out.
#[derive(Debug, thiserror::Error)]
pub(crate) enum WorkError {
    #[error("cancelled")]
    Cancelled,
    #[error("{0}")]
    Request(String),
    #[error(transparent)]
    Catalog(#[from] CatalogError),
    #[error(transparent)]
    Dataset(#[from] DatasetError),
    #[error(transparent)]
    Object(#[from] ObjectError),
    #[error("cannot learn from these features: {0}")]
    Features(#[from] learn::features::FeaturesError),
    #[error("training the head: {0}")]
    Head(learn::Error),
    #[error("fine-tuning: {0}")]
    Tune(String),
    #[error("the new model file: {0}")]
    Surgery(#[from] learn::surgery::SurgeryError),
    #[error("the external trainer: {0}")]
    External(#[from] external::ExternalError),
    #[error("the new bundle: {0}")]
    Write(#[from] models::WriteError),
    #[error(transparent)]
    Engine(#[from] models::EngineError),
    #[error("judging the model: {0}")]
    Judge(String),
    #[error("the training gave up: {0}")]
    Gone(#[from] tokio::task::JoinError),
}

/// What a trainer hands over.
pub(super) struct Made {
    pub(super) model: Vec<u8>,
    /// The new model's classes, in the order of its scores.
    pub(super) labels: Vec<String>,
    /// The graph's output with the scores.
    pub(super) scores: String,
    /// The head on the base's own embedding, if that is all that is new.
    pub(super) head: Option<head::Head>,
    /// Settings and findings, for the record.
    pub(super) record: serde_json::Value,
}

/// What a trainer starts from.
pub(super) struct Material {
    pub(super) base: Model,
    pub(super) bundle: Arc<Bundle>,
    pub(super) engine: Arc<Engine>,
    /// The classes that there are pictures of to train with.
    pub(super) labels: Vec<String>,
    /// Pictures to train with, and the class of each: a place in `labels`.
    pub(super) train: Vec<(Item, u32)>,
    pub(super) holdout: Vec<Item>,
}

/// What every training uses.
pub(crate) struct Work {
    pub(crate) catalog: Arc<Catalog>,
    pub(crate) datasets: Datasets,
    pub(crate) objects: Objects,
    pub(crate) settings: Settings,
}

impl Work {
    pub(super) fn time_limit(&self) -> Duration {
        self.settings.time_limit
    }

    /// Trains, judges and records a model. The model that came out, accepted or refused.
    pub(super) async fn run(
        &self,
        job: i64,
        task: &str,
        request: &Request,
        reporter: &Reporter,
    ) -> Result<String, WorkError> {
        let dataset = self.dataset(task, request).await?;
        let material = Arc::new(self.material(task, request, &dataset).await?);
        let made = match request.trainer {
            Trainer::Head => self.head(&material, request, reporter).await?,
            Trainer::FineTune => self.fine_tune(&material, request, reporter).await?,
            Trainer::External => {
                external::run(
                    &self.settings.external,
                    &self.objects,
                    &material,
                    request,
                    reporter,
                )
                .await?
            }
        };
        let _ = reporter.tell("write", 0, 1, None);
        let (bundle, engine) = self
            .bundle(task, request, &dataset, &material, &made, reporter)
            .await?;
        let judged = self
            .judge(&dataset, &material, &bundle, &engine, reporter)
            .await
            // What was cancelled meanwhile, or took too long, must not come into use after all.
            .and_then(|judged| match reporter.stop.is_cancelled() {
                true => Err(WorkError::Cancelled),
                false => Ok(judged),
            });
        let (report, verdict, holdout) = match judged {
            Ok(judged) => judged,
            Err(error) => {
                // Without a judgement there is no model.
                let _ = std::fs::remove_dir_all(bundle.dir());
                return Err(error);
            }
        };
        let state = if verdict.pass {
            ModelState::Accepted
        } else {
            ModelState::Refused
        };
        let model = NewModel {
            state,
            dataset: Some(dataset.digest.clone()),
            job: Some(job),
            trainer: Some(made.record),
            report: report.map(|report| json!(report)),
            verdict: Some(json!(verdict)),
            holdout,
            author: request.author.clone(),
        };
        self.catalog.record(&bundle, model).await?;
        Ok(bundle.id())
    }

    async fn dataset(&self, task: &str, request: &Request) -> Result<Dataset, WorkError> {
        let digest = match &request.dataset {
            Some(digest) => digest.clone(),
            None => {
                let all = 1.0;
                self.datasets
                    .create(task, &request.author, all)
                    .await?
                    .1
                    .digest
            }
        };
        let dataset = self.datasets.get(&digest).await?;
        if dataset.task != task {
            let other = format!(
                "dataset {digest} is of the task {}, not of {task}",
                dataset.task
            );
            return Err(WorkError::Request(other));
        }
        Ok(dataset)
    }

    async fn material(
        &self,
        task: &str,
        request: &Request,
        dataset: &Dataset,
    ) -> Result<Material, WorkError> {
        let base = match &request.base {
            Some(id) => self.catalog.find(id).await?,
            None => match self.catalog.find(task).await {
                Err(CatalogError::Unknown(_)) => self.catalog.find("backbone").await?,
                found => found?,
            },
        };
        let (catalog, model) = (self.catalog.clone(), base.clone());
        let (bundle, engine) = spawn_blocking(move || {
            Ok::<_, CatalogError>((catalog.bundle(&model)?, catalog.engine(&model)?))
        })
        .await??;
        if engine.manifest().output.embedding.is_none() {
            let none = format!("{} has no embedding to learn on", base.id());
            return Err(WorkError::Request(none));
        }
        // Classes without a picture stay away, so that their absence costs nothing but themselves.
        let used: HashSet<u32> = dataset
            .items
            .iter()
            .filter(|i| !i.holdout)
            .map(|i| i.class)
            .collect();
        let mut labels = Vec::new();
        let mut places = BTreeMap::new();
        for (class, name) in (0..).zip(&dataset.classes) {
            if used.contains(&class) {
                places.insert(class, labels.len() as u32);
                labels.push(name.clone());
            }
        }
        let mut train = Vec::new();
        let mut holdout = Vec::new();
        for item in &dataset.items {
            match places.get(&item.class) {
                _ if item.holdout => holdout.push(item.clone()),
                Some(place) => train.push((item.clone(), *place)),
                None => {}
            }
        }
        Ok(Material {
            base,
            bundle: Arc::new(bundle),
            engine,
            labels,
            train,
            holdout,
        })
    }

    /// The embedding of every picture to train with, from the cache where it is there.
    async fn embeddings(
        &self,
        material: &Material,
        reporter: &Reporter,
    ) -> Result<Vec<Vec<f32>>, WorkError> {
        let images: Vec<String> = material
            .train
            .iter()
            .map(|(i, _)| i.sha256.clone())
            .collect();
        let engine = engine_digest(material.engine.manifest());
        let mut known = self.datasets.features(&engine, &images).await?;
        let missing: Vec<String> = images
            .iter()
            .filter(|sha| !known.contains_key(*sha))
            .cloned()
            .collect();
        let seen = look(
            &self.objects,
            &material.engine,
            &missing,
            reporter,
            "features",
        )
        .await?;
        let new: Vec<(String, Vec<f32>)> = missing
            .into_iter()
            .zip(seen)
            .map(|(sha, outcome)| (sha, outcome.embedding))
            .collect();
        self.datasets.put_features(&engine, &new).await?;
        known.extend(new);
        Ok(images
            .iter()
            .map(|sha| known.get(sha).cloned().unwrap_or_default())
            .collect())
    }

    /// A new classifier on the base's embedding.
    async fn head(
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
    async fn fine_tune(
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

    /// Writes the bundle of what was made.
    async fn bundle(
        &self,
        task: &str,
        request: &Request,
        dataset: &Dataset,
        material: &Arc<Material>,
        made: &Made,
        reporter: &Reporter,
    ) -> Result<(Bundle, Arc<Engine>), WorkError> {
        let version = self.version(task).await?;
        let path = self.catalog.path(task, &version);
        // What an interrupted job left there was never recorded.
        let _ = std::fs::remove_dir_all(&path);
        let mut golden = Vec::new();
        let mut shown = HashSet::new();
        for (item, class) in &material.train {
            if golden.len() < GOLDEN && !shown.contains(class) {
                let bytes = self.objects.read(&item.sha256).await?;
                if bytes.len() <= GOLDEN_BYTES {
                    shown.insert(*class);
                    golden.push(bytes.to_vec());
                }
            }
        }
        let mut new = manifest(material, made, &version, Some((dataset, request)));
        new.name = task.to_owned();
        new.thresholds.min_score = Some(request.min_score);
        let model = made.model.clone();
        let truth: Vec<usize> = material
            .train
            .iter()
            .map(|(_, class)| *class as usize)
            .collect();
        let card = card(&new, dataset, material, made);
        let outcomes = match &made.head {
            // The embeddings are the base's, and in the cache.
            Some(head) => {
                let embeddings = self.embeddings(material, reporter).await?;
                embeddings
                    .into_iter()
                    .map(|e| headed(head, &new, e))
                    .collect()
            }
            None => {
                let (manifest, model) = (new.clone(), model.clone());
                let engine = spawn_blocking(move || Engine::new(manifest, model)).await??;
                let images: Vec<String> = material
                    .train
                    .iter()
                    .map(|(i, _)| i.sha256.clone())
                    .collect();
                look(
                    &self.objects,
                    &Arc::new(engine),
                    &images,
                    reporter,
                    "reference",
                )
                .await?
            }
        };
        spawn_blocking(move || {
            new.reference = Reference::measure(&new, &outcomes, &truth);
            let draft = Draft {
                manifest: new,
                model,
                golden,
                card,
                holdout: Vec::new(),
            };
            if let Some(parent) = path.parent() {
                std::fs::create_dir_all(parent).map_err(|source| models::WriteError::Write {
                    path: parent.to_owned(),
                    source,
                })?;
            }
            let bundle = draft.write(&path)?;
            let engine = Arc::new(Engine::load(&bundle)?);
            Ok((bundle, engine))
        })
        .await?
    }

    async fn version(&self, task: &str) -> Result<String, WorkError> {
        let mut number = self.catalog.versions(task).await?;
        loop {
            let version = format!("1.{number}.0");
            match self.catalog.find(&format!("{task}@{version}")).await {
                Err(CatalogError::Unknown(_)) => return Ok(version),
                found => found?,
            };
            number += 1;
        }
    }

    /// Measures candidate and current model on the holdout, and asks the gate.
    async fn judge(
        &self,
        dataset: &Dataset,
        material: &Material,
        bundle: &Bundle,
        engine: &Arc<Engine>,
        reporter: &Reporter,
    ) -> Result<(Option<Evaluation>, Verdict, Option<String>), WorkError> {
        let images: Vec<String> = material.holdout.iter().map(|i| i.sha256.clone()).collect();
        let truth: Vec<u32> = material.holdout.iter().map(|i| i.class).collect();
        let candidate = look(&self.objects, engine, &images, reporter, "holdout").await?;
        let candidate = probabilities(&candidate);
        let labels = &bundle.manifest.output.labels;
        let task = &bundle.manifest.name;
        let (current_labels, current) = match self.catalog.find(task).await {
            Ok(model) if model.kind == Task::Classify.as_str() => {
                let catalog = self.catalog.clone();
                let current = spawn_blocking(move || catalog.engine(&model)).await??;
                let seen = look(&self.objects, &current, &images, reporter, "holdout").await?;
                (
                    current.manifest().output.labels.clone(),
                    probabilities(&seen),
                )
            }
            Ok(_) | Err(CatalogError::Unknown(_)) => guess(dataset, material, labels),
            Err(error) => return Err(error.into()),
        };
        let holdout = (!truth.is_empty()).then(|| holdout_digest(&material.holdout));
        let judged = match &holdout {
            Some(digest) => self.catalog.judged(digest).await?,
            None => 0,
        };
        let tested = {
            let (path, engine) = (bundle.dir().to_owned(), engine.clone());
            spawn_blocking(move || {
                Ok::<_, CatalogError>(models::self_test(&Bundle::open(&path)?, &engine))
            })
            .await??
        };
        if let Some(broken) = tested
            .golden
            .iter()
            .find(|golden| !golden.problems.is_empty())
        {
            return Err(WorkError::Judge(format!(
                "self-test: {}",
                broken.problems.join(", ")
            )));
        }
        let cost = Cost {
            latency_ms: tested.latency_ms.map_or(f64::INFINITY, f64::from),
            allowed_latency_ms: f64::from(tested.latency_budget_ms),
            memory_mib: tested.memory_mib.map_or(0.0, f64::from),
            #[expect(clippy::cast_precision_loss, reason = "MiB")]
            allowed_memory_mib: tested.memory_budget_mib as f64,
        };
        let holdout_view = Holdout {
            labels: &dataset.classes,
            truth: &truth,
            leaked: self.leaked(dataset, material).await?,
            judged,
        };
        let verdict = gate::judge(
            &holdout_view,
            &Answers {
                labels: &current_labels,
                probabilities: &current,
            },
            &Answers {
                labels,
                probabilities: &candidate,
            },
            &cost,
            &self.settings.policy,
        )
        .map_err(|error| WorkError::Judge(error.to_string()))?;
        let report = if truth.is_empty() {
            None
        } else {
            Some(evaluation(dataset, &truth, labels, &candidate)?)
        };
        Ok((report, verdict, holdout))
    }

    /// Pictures of the holdout that the candidate, or a model that it grew out of, was trained on.
    async fn leaked(&self, dataset: &Dataset, material: &Material) -> Result<usize, WorkError> {
        let held: HashSet<&str> = material.holdout.iter().map(|i| i.sha256.as_str()).collect();
        let trained = |items: &[Item]| -> HashSet<String> {
            let trained = items
                .iter()
                .filter(|i| !i.holdout && held.contains(i.sha256.as_str()));
            trained.map(|i| i.sha256.clone()).collect()
        };
        let mut leaked = trained(&dataset.items);
        let mut parent = Some(material.base.clone());
        for _ in 0..ANCESTORS {
            let Some(model) = parent else { break };
            if let Some(digest) = &model.dataset {
                leaked.extend(trained(&self.datasets.get(digest).await?.items));
            }
            parent = match &model.parent {
                Some(id) => self.catalog.find(id).await.ok(),
                None => None,
            };
        }
        Ok(leaked.len())
    }

    /// Reads images in their order.
    pub(super) async fn images(&self, items: &[(Item, u32)]) -> Result<Vec<Bytes>, WorkError> {
        let mut images = Vec::with_capacity(items.len());
        for (item, _) in items {
            images.push(self.objects.read(&item.sha256).await?);
        }
        Ok(images)
    }
}

/// What names an engine in the cache of features: the file and how its input is made.
pub(super) fn engine_digest(manifest: &Manifest) -> String {
    let input = json!(manifest.input).to_string();
    let embedding = manifest.output.embedding.as_deref().unwrap_or_default();
    crate::objects::digest(format!("{} {embedding} {input}", manifest.model.sha256).as_bytes())
}

/// The manifest of what was made from this material.
fn manifest(
    material: &Material,
    made: &Made,
    version: &str,
    origin: Option<(&Dataset, &Request)>,
) -> Manifest {
    let mut new = material.engine.manifest().clone();
    new.version = version.to_owned();
    new.task = Task::Classify;
    new.output.scores = Some(made.scores.clone());
    new.output.activation = Activation::Softmax;
    new.output.labels.clone_from(&made.labels);
    new.reference = None;
    new.lineage = Lineage {
        parent: Some(material.base.id()),
        ..Lineage::default()
    };
    if let Some((dataset, request)) = origin {
        new.description = format!("{}: {}", dataset.task, made.labels.join(", "));
        new.description
            .truncate(new.description.floor_char_boundary(1_000));
        new.lineage.dataset = Some(format!("labelled images of the task {}", dataset.task));
        new.lineage.dataset_sha256 = Some(dataset.digest.clone());
        new.lineage.recipe = Some(request.trainer.as_str().to_owned());
        new.lineage.seed = Some(request.seed);
    }
    new
}

fn probabilities(outcomes: &[Outcome]) -> Vec<f32> {
    outcomes
        .iter()
        .flat_map(|outcome| outcome.scores.iter().copied())
        .collect()
}

/// Where there is no model yet: the answer of one that always names the most frequent class.
fn guess(dataset: &Dataset, material: &Material, labels: &[String]) -> (Vec<String>, Vec<f32>) {
    let mut counts = vec![0usize; labels.len()];
    for (_, class) in &material.train {
        if let Some(count) = counts.get_mut(*class as usize) {
            *count += 1;
        }
    }
    let most = (0..counts.len())
        .max_by_key(|class| counts[*class])
        .unwrap_or_default();
    let names = if labels.is_empty() {
        dataset.classes.clone()
    } else {
        labels.to_vec()
    };
    let row = (0..names.len()).map(|class| f32::from(u8::from(class == most)));
    let row: Vec<f32> = row.collect();
    (names, row.repeat(material.holdout.len()))
}

/// The figures of the candidate. Classes of the holdout that it does not know count as never answered.
fn evaluation(
    dataset: &Dataset,
    truth: &[u32],
    labels: &[String],
    probabilities: &[f32],
) -> Result<Evaluation, WorkError> {
    let mut names = labels.to_vec();
    let mut place = Vec::new();
    for class in &dataset.classes {
        let at = names
            .iter()
            .position(|name| name == class)
            .unwrap_or_else(|| {
                names.push(class.clone());
                names.len() - 1
            });
        place.push(at as u32);
    }
    let truth: Vec<u32> = truth
        .iter()
        .filter_map(|class| place.get(*class as usize).copied())
        .collect();
    let mut rows = Vec::with_capacity(truth.len() * names.len());
    for row in probabilities.chunks_exact(labels.len().max(1)) {
        rows.extend_from_slice(row);
        rows.resize(rows.len() + names.len() - labels.len(), 0.0);
    }
    evaluate::evaluate(&truth, &rows, &names).map_err(|error| WorkError::Judge(error.to_string()))
}

fn holdout_digest(items: &[Item]) -> String {
    let mut lines: Vec<String> = items
        .iter()
        .map(|item| format!("{} {}\n", item.sha256, item.class))
        .collect();
    lines.sort_unstable();
    crate::objects::digest(lines.concat().as_bytes())
}

fn card(new: &Manifest, dataset: &Dataset, material: &Material, made: &Made) -> String {
    format!(
        "# {}\n\nTells {} apart.\n\n## Data\n\n{} images of the task {}, dataset `{}`; {} more were held out and \
         only measured with. The golden pictures are of the training set.\n\n## Training\n\nFrom `{}` by:\n\n\
         ```json\n{:#}\n```\n\nWhat it measured on the holdout is in the coordinator's record of this model.\n",
        new.id(),
        made.labels.join(", "),
        material.train.len(),
        dataset.task,
        dataset.digest,
        material.holdout.len(),
        material.base.id(),
        made.record,
    )
}
