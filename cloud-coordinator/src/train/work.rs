//! One training from beginning to end.

use std::{
    collections::{BTreeMap, HashSet},
    sync::Arc,
    time::Duration,
};

use bytes::Bytes;
use learn::{gate::Policy, head};
use models::{Activation, Bundle, Draft, Engine, Lineage, Manifest, Reference, Task};
use serde_json::json;
use tokio::task::spawn_blocking;

use super::{
    catalog::{Catalog, CatalogError, Model, ModelState, NewModel},
    external,
    jobs::Reporter,
    judge::Judged,
    look::{headed, look},
    request::{Request, Trainer},
};
use crate::{
    datasets::{Dataset, DatasetError, Datasets, Item},
    objects::{ObjectError, Objects},
    parts::{self, Parts},
    quarantine::{Quarantine, QuarantineError},
};

/// Golden pictures of a bundle: each travels to every device, and is tried there.
const GOLDEN: usize = 8;

/// How trainings are bounded and judged.
#[derive(Clone, Debug)]
pub(crate) struct Settings {
    /// A job that takes longer is ended.
    pub(crate) time_limit: Duration,
    /// The external trainer and its arguments.
    pub(crate) external: Vec<String>,
    /// What a candidate must fulfil.
    pub(crate) policy: Policy,
    /// When a device is set apart.
    pub(crate) suspect: learn::suspect::Policy,
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
    #[error(transparent)]
    Quarantine(#[from] QuarantineError),
    #[error("cannot learn from these features: {0}")]
    Features(#[from] learn::features::FeaturesError),
    #[error("training the head: {0}")]
    Head(learn::Error),
    #[error("fine-tuning: {0}")]
    Tune(String),
    #[error("the new model file: {0}")]
    Surgery(#[from] learn::surgery::SurgeryError),
    #[error("the external trainer has failed several times and is left alone for a while")]
    LeftAlone,
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

impl WorkError {
    /// Whether a trainer did something wrong, or left something that cannot be used.
    fn is_the_trainers(&self) -> bool {
        match self {
            Self::External(external::ExternalError::None) => false,
            Self::External(_)
            | Self::Catalog(_)
            | Self::Write(_)
            | Self::Engine(_)
            | Self::Judge(_) => true,
            _ => false,
        }
    }
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
    pub(crate) quarantine: Quarantine,
    pub(crate) settings: Settings,
    pub(crate) parts: Arc<Parts>,
}

impl Work {
    pub(super) fn time_limit(&self) -> Duration {
        self.settings.time_limit
    }

    /// Trains, judges and records a model. The model that came out, accepted or refused.
    ///
    /// An external trainer that has failed several times is left alone for a while.
    pub(super) async fn run(
        &self,
        job: i64,
        task: &str,
        request: &Request,
        reporter: &Reporter,
    ) -> Result<String, WorkError> {
        if request.trainer != Trainer::External {
            return self.attempt(job, task, request, reporter).await;
        }
        let place = self.parts.enter(parts::Name::Trainer).await;
        let place = place.map_err(|_| WorkError::LeftAlone)?;
        let made = self.attempt(job, task, request, reporter).await;
        match &made {
            Ok(_) => place.settle(true),
            Err(error) if error.is_the_trainers() || reporter.is_late() => place.settle(false),
            Err(_) => drop(place),
        }
        made
    }

    async fn attempt(
        &self,
        job: i64,
        task: &str,
        request: &Request,
        reporter: &Reporter,
    ) -> Result<String, WorkError> {
        let mut dataset = self.dataset(task, request).await?;
        let mut material = Arc::new(self.material(task, request, &dataset).await?);
        if request.dataset.is_some() {
            self.unfit(&dataset).await?;
        } else if self.set_apart(&dataset, &material, reporter).await? {
            dataset = self.dataset(task, request).await?;
            material = Arc::new(self.material(task, request, &dataset).await?);
        }
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
        let Judged { report, verdict } = match judged {
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
            author: request.author().to_owned(),
        };
        self.catalog.record(&bundle, model).await?;
        Ok(bundle.id())
    }

    async fn dataset(&self, task: &str, request: &Request) -> Result<Dataset, WorkError> {
        let digest = match &request.dataset {
            Some(digest) => digest.clone(),
            None => {
                self.datasets
                    .create(task, request.author(), None)
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
        // Those of the model that it grew out of, never samples: what has travelled to every device under a signature
        // cannot be erased any more.
        let mut golden = Vec::new();
        for case in material.bundle.manifest.golden.iter().take(GOLDEN) {
            let bytes = material.bundle.image_bytes(&case.image);
            let bytes = bytes.map_err(CatalogError::from)?;
            if !self
                .datasets
                .was_erased(&crate::objects::digest(&bytes))
                .await?
            {
                golden.push(bytes);
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
pub(super) fn manifest(
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

fn card(new: &Manifest, dataset: &Dataset, material: &Material, made: &Made) -> String {
    format!(
        "# {}\n\nTells {} apart.\n\n## Data\n\n{} images of the task {}, dataset `{}`; {} more were held out and \
         only measured with. The golden pictures are those of the model that it grew out of.\n\n## Training\n\nFrom `{}` by:\n\n\
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
