//! Training, its jobs, the models that came out, and those models as a service.

use std::sync::Arc;

use axum::{
    Json,
    body::Bytes,
    extract::State as Shared,
    http::{HeaderMap, StatusCode, header},
    response::{IntoResponse, Response},
};
use learn::{features::Features, head};
use models::{Engine, Outcome};
use serde::{Deserialize, Serialize};
use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore},
    task::spawn_blocking,
};

use super::{At, Params, Said, State, gate::Caller, offload::Looks, problem::Problem};
use crate::{
    parts::Name,
    train::{Catalog, CatalogError, Job, JobError, Jobs, Model, Request, Trainer},
    trust::Principal,
};

/// The largest body of a prediction: an image, or tensors as JSON.
pub(super) const MAX_PREDICT_BODY: usize = 16 << 20;
/// The largest body of raw features.
pub(super) const MAX_TRAIN_BODY: usize = 64 << 20;
/// Predictions that are computed at a time; others wait, as long as a request may.
const PREDICTIONS: usize = 2;
/// Tensors in one request.
const MAX_INSTANCES: usize = 256;
/// Rows of a page.
const MAX_PAGE: i64 = 1_000;

/// What the addresses below need.
#[derive(Clone)]
pub(crate) struct Learning {
    pub(crate) catalog: Arc<Catalog>,
    pub(crate) jobs: Arc<Jobs>,
    /// For devices.
    pub(super) looks: Arc<Looks>,
    predictions: Arc<Semaphore>,
    raw: Arc<Semaphore>,
}

impl Learning {
    pub(crate) fn new(catalog: Arc<Catalog>, jobs: Arc<Jobs>) -> Self {
        Self {
            looks: Arc::new(Looks::new(catalog.clone())),
            catalog,
            jobs,
            predictions: Arc::new(Semaphore::new(PREDICTIONS)),
            raw: Arc::new(Semaphore::new(1)),
        }
    }
}

impl From<JobError> for Problem {
    fn from(error: JobError) -> Self {
        let detail = error.to_string();
        match error {
            JobError::Unknown(_) => Self::not_found(detail),
            JobError::Full => Self::new(429, "Too many jobs", detail),
            JobError::Ended(_) => Self::new(409, "Ended", detail),
            JobError::Request(_) => Self::new(422, "Not possible", detail),
            JobError::Records(_) => {
                tracing::warn!(%error, "the queue of trainings failed");
                Self::new(
                    503,
                    "Database unavailable",
                    "the database could not answer, try again",
                )
            }
        }
    }
}

impl From<CatalogError> for Problem {
    fn from(error: CatalogError) -> Self {
        match error {
            CatalogError::Unknown(_) => Self::not_found(error.to_string()),
            CatalogError::Taken(_) => Self::new(409, "Taken", error.to_string()),
            CatalogError::Unusable(_) | CatalogError::Bundle(_) | CatalogError::Version(_) => {
                Self::new(422, "Not usable", error.to_string())
            }
            error => {
                tracing::warn!(%error, "the catalog of models failed");
                Self::new(
                    503,
                    "Model unavailable",
                    "the model cannot be used now, see the log",
                )
            }
        }
    }
}

pub(super) fn gave_up(error: &tokio::task::JoinError) -> Problem {
    tracing::warn!(%error, "a computation gave up");
    Problem::new(500, "Gave up", "the computation failed, see the log")
}

pub(super) async fn place(of: &Arc<Semaphore>) -> Result<OwnedSemaphorePermit, Problem> {
    let place = of.clone().acquire_owned().await;
    place.map_err(|_| Problem::new(503, "Stopping", "the coordinator stops"))
}

/// JSON in a body, refused with a problem that names what is wrong.
fn json<T: serde::de::DeserializeOwned>(body: &[u8]) -> Result<T, Problem> {
    serde_json::from_slice(body).map_err(|error| Problem::bad(format!("the body: {error}")))
}

/// Trains a model of a task. The answer is a job, whose progress can be asked for.
#[utoipa::path(
    post,
    path = "/api/v1/tasks/{task}/train",
    params(("task" = String, Path, description = "The task")),
    request_body = Request,
    responses(
        (status = 202, description = "Queued", body = Job),
        (status = 422, description = "A setting is wrong", content_type = "application/problem+json", body = Problem),
        (status = 429, description = "Too many jobs wait", content_type = "application/problem+json", body = Problem),
        (status = 503, description = "The external trainer has failed several times and is left alone", content_type = "application/problem+json", body = Problem),
    )
)]
pub(super) async fn train(
    Shared(state): Shared<State>,
    caller: Caller,
    At(task): At<String>,
    Said(mut request): Said<Request>,
) -> Result<(StatusCode, Json<Job>), Problem> {
    if request.trainer == Trainer::External {
        state.parts.look(Name::Trainer)?;
    }
    request.author = Some(caller.author_for(request.author.as_deref())?);
    let job = state.learning.jobs.submit(&task, &request).await?;
    Ok((StatusCode::ACCEPTED, Json(job)))
}

/// Which jobs.
#[derive(Debug, Default, Deserialize, utoipa::IntoParams)]
#[serde(deny_unknown_fields, default)]
#[into_params(parameter_in = Query)]
pub(super) struct JobsQuery {
    /// Only jobs before this one.
    before: Option<i64>,
    /// How many, 1 to 1000; 100 unless given.
    limit: Option<i64>,
}

fn limit(asked: Option<i64>) -> Result<i64, Problem> {
    let limit = asked.unwrap_or(100);
    (1..=MAX_PAGE)
        .contains(&limit)
        .then_some(limit)
        .ok_or_else(|| Problem::bad(format!("limit: is from 1 to {MAX_PAGE}")))
}

/// What this one may see of a job: why it failed may name devices of other sites.
fn seen_by(caller: &Caller, mut job: Job) -> Job {
    if caller.principal().and_then(Principal::site).is_some() {
        let hidden = |_| "only who may see all sites is told why".to_owned();
        job.error = job.error.map(hidden);
    }
    job
}

/// The jobs, newest first.
#[utoipa::path(
    get,
    path = "/api/v1/jobs",
    params(JobsQuery),
    responses((status = 200, description = "Jobs", body = Vec<Job>))
)]
pub(super) async fn jobs(
    Shared(state): Shared<State>,
    caller: Caller,
    Params(query): Params<JobsQuery>,
) -> Result<Json<Vec<Job>>, Problem> {
    let limit = limit(query.limit)?;
    let jobs = state.learning.jobs.list(limit, query.before).await?;
    let seen = jobs.into_iter().map(|job| seen_by(&caller, job));
    Ok(Json(seen.collect()))
}

/// One job, with its progress while it runs.
#[utoipa::path(
    get,
    path = "/api/v1/jobs/{id}",
    params(("id" = i64, Path, description = "Its number")),
    responses(
        (status = 200, description = "The job", body = Job),
        (status = 404, description = "There is no such job", content_type = "application/problem+json", body = Problem),
    )
)]
pub(super) async fn job(
    Shared(state): Shared<State>,
    caller: Caller,
    At(id): At<i64>,
) -> Result<Json<Job>, Problem> {
    let job = state.learning.jobs.get(id).await?;
    Ok(Json(seen_by(&caller, job)))
}

/// Ends a job: at once where it waits, at its next step where it runs.
#[utoipa::path(
    delete,
    path = "/api/v1/jobs/{id}",
    params(("id" = i64, Path, description = "Its number")),
    responses(
        (status = 200, description = "The job", body = Job),
        (status = 404, description = "There is no such job", content_type = "application/problem+json", body = Problem),
        (status = 409, description = "It has ended already", content_type = "application/problem+json", body = Problem),
    )
)]
pub(super) async fn cancel(
    Shared(state): Shared<State>,
    At(id): At<i64>,
) -> Result<Json<Job>, Problem> {
    Ok(Json(state.learning.jobs.cancel(id).await?))
}

/// Which models.
#[derive(Debug, Default, Deserialize, utoipa::IntoParams)]
#[serde(deny_unknown_fields, default)]
#[into_params(parameter_in = Query)]
pub(super) struct CatalogQuery {
    /// Only versions of this model.
    name: Option<String>,
    /// How many to skip.
    skip: Option<i64>,
    /// How many, 1 to 1000; 100 unless given.
    limit: Option<i64>,
}

/// Every model that this coordinator has, newest first: where it comes from, what it measured, what the gate said.
#[utoipa::path(
    get,
    path = "/api/v1/catalog",
    params(CatalogQuery),
    responses((status = 200, description = "Models", body = Vec<Model>))
)]
pub(super) async fn catalog(
    Shared(state): Shared<State>,
    Params(query): Params<CatalogQuery>,
) -> Result<Json<Vec<Model>>, Problem> {
    let limit = limit(query.limit)?;
    let skip = query.skip.unwrap_or(0).max(0);
    let catalog = &state.learning.catalog;
    Ok(Json(
        catalog.list(query.name.as_deref(), limit, skip).await?,
    ))
}

/// One model: `name@version`, or `name` for the newest one in use.
#[utoipa::path(
    get,
    path = "/api/v1/catalog/{model}",
    params(("model" = String, Path, description = "The model")),
    responses(
        (status = 200, description = "The model", body = Model),
        (status = 404, description = "There is no such model", content_type = "application/problem+json", body = Problem),
    )
)]
pub(super) async fn model(
    Shared(state): Shared<State>,
    At(model): At<String>,
) -> Result<Json<Model>, Problem> {
    Ok(Json(state.learning.catalog.find(&model).await?))
}

/// The confusion matrix of a model on the holdout, as a picture.
#[utoipa::path(
    get,
    path = "/api/v1/catalog/{model}/confusion.svg",
    params(("model" = String, Path, description = "The model")),
    responses(
        (status = 200, description = "The picture", content_type = "image/svg+xml"),
        (status = 404, description = "There is no such model, or it was not measured", content_type = "application/problem+json", body = Problem),
    )
)]
pub(super) async fn confusion(
    Shared(state): Shared<State>,
    At(model): At<String>,
) -> Result<Response, Problem> {
    let model = state.learning.catalog.find(&model).await?;
    let none = || Problem::not_found(format!("{} was not measured on a holdout", model.id()));
    let report = model.report.as_ref().ok_or_else(none)?;
    let confusion: Vec<Vec<u64>> =
        serde_json::from_value(report["confusion"].clone()).map_err(|_| none())?;
    let names: Vec<String> = report["classes"]
        .as_array()
        .into_iter()
        .flatten()
        .filter_map(|class| Some(class["name"].as_str()?.to_owned()))
        .collect();
    let svg = learn::evaluate::confusion_svg(&confusion, &names).ok_or_else(none)?;
    let headers = [
        (header::CONTENT_TYPE, "image/svg+xml"),
        (
            header::CONTENT_SECURITY_POLICY,
            "default-src 'none'; style-src 'unsafe-inline'",
        ),
    ];
    Ok((headers, svg).into_response())
}

/// Tensors to run a model on.
#[derive(Debug, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct Instances {
    /// One flat list of numbers per tensor, in the model's layout; 1 to 256 of them.
    instances: Vec<Vec<f32>>,
}

/// What a model says about one image or tensor.
#[derive(Debug, Serialize, utoipa::ToSchema)]
pub(super) struct Prediction {
    /// The class, or `unknown`.
    label: String,
    /// How sure it is, 0..=1.
    score: f32,
    /// How far the second class lies behind.
    margin: f32,
    /// Per class, in the order of `labels`.
    scores: Vec<f32>,
}

/// What a model says.
#[derive(Debug, Serialize, utoipa::ToSchema)]
pub(super) struct Predictions {
    /// The model, `name@version`.
    model: String,
    /// Its classes.
    labels: Vec<String>,
    /// One for the image, or one per tensor.
    predictions: Vec<Prediction>,
}

impl State {
    async fn engine(&self, id: &str) -> Result<Arc<Engine>, Problem> {
        let model = self.learning.catalog.find(id).await?;
        let catalog = self.learning.catalog.clone();
        // The place is free when the work has ended, not when somebody no longer waits for it.
        let place = place(&self.learning.predictions).await?;
        let load = move || {
            let _place = place;
            catalog.engine(&model)
        };
        let loaded = spawn_blocking(load).await;
        Ok(loaded.map_err(|error| gave_up(&error))??)
    }

    /// Runs a model on the body of a request: JSON with tensors, or an image.
    async fn look(
        &self,
        engine: Arc<Engine>,
        headers: &HeaderMap,
        body: Bytes,
    ) -> Result<Vec<Outcome>, Problem> {
        let kind = headers
            .get(header::CONTENT_TYPE)
            .and_then(|kind| kind.to_str().ok());
        let tensors = kind.is_some_and(|kind| kind.starts_with("application/json"));
        let place = place(&self.learning.predictions).await?;
        let done = spawn_blocking(move || {
            let _place = place;
            let refuse = |error: String| Problem::new(422, "Not possible", error);
            if !tensors {
                let input = engine
                    .tensor_from_bytes(&body)
                    .map_err(|error| refuse(format!("the image: {error}")))?;
                let outcome = engine
                    .run(&input)
                    .map_err(|error| refuse(error.to_string()))?;
                return Ok(vec![outcome]);
            }
            let Instances { instances } = json(&body)?;
            if !(1..=MAX_INSTANCES).contains(&instances.len()) {
                return Err(refuse(format!("instances: are 1 to {MAX_INSTANCES}")));
            }
            let run = |(at, values): (usize, Vec<f32>)| {
                let named = |error: String| refuse(format!("instances[{at}]: {error}"));
                let input = engine
                    .input(values)
                    .map_err(|error| named(error.to_string()))?;
                engine.run(&input).map_err(|error| named(error.to_string()))
            };
            instances.into_iter().enumerate().map(run).collect()
        });
        done.await.map_err(|error| gave_up(&error))?
    }
}

/// Runs a model: `POST /api/v1/models/{name}:predict` or `/api/v1/models/{name@version}:predict`. The body is an
/// image (any content type but JSON) or tensors.
#[utoipa::path(
    post,
    path = "/api/v1/models/{call}",
    params(("call" = String, Path, description = "`name:predict` or `name@version:predict`")),
    request_body = Instances,
    responses(
        (status = 200, description = "What it says", body = Predictions),
        (status = 404, description = "There is no such model", content_type = "application/problem+json", body = Problem),
        (status = 422, description = "The body is no image and no tensor of the model's shape", content_type = "application/problem+json", body = Problem),
    )
)]
pub(super) async fn predict(
    Shared(state): Shared<State>,
    At(call): At<String>,
    headers: HeaderMap,
    body: Bytes,
) -> Result<Json<Predictions>, Problem> {
    let unknown = || Problem::not_found("a model is called by its name and `:predict`");
    let id = call.strip_suffix(":predict").ok_or_else(unknown)?;
    let engine = state.engine(id).await?;
    let outcomes = state.look(engine.clone(), &headers, body).await?;
    let prediction = |outcome: Outcome| Prediction {
        label: outcome.label,
        score: outcome.score,
        margin: outcome.margin,
        scores: outcome.scores,
    };
    Ok(Json(Predictions {
        model: engine.id().to_owned(),
        labels: engine.manifest().output.labels.clone(),
        predictions: outcomes.into_iter().map(prediction).collect(),
    }))
}

/// Whose features.
#[derive(Debug, Default, Deserialize, utoipa::IntoParams)]
#[serde(deny_unknown_fields, default)]
#[into_params(parameter_in = Query)]
pub(super) struct FeaturesQuery {
    /// The model, `name` or `name@version`; the backbone unless given.
    model: Option<String>,
}

/// Embeddings.
#[derive(Debug, Serialize, utoipa::ToSchema)]
pub(super) struct Embeddings {
    /// The model, `name@version`.
    model: String,
    /// One for the image, or one per tensor.
    embeddings: Vec<Vec<f32>>,
}

/// The embedding of an image, or of tensors, by the device's own code.
#[utoipa::path(
    post,
    path = "/api/v1/features",
    params(FeaturesQuery),
    request_body = Instances,
    responses(
        (status = 200, description = "The embeddings", body = Embeddings),
        (status = 404, description = "There is no such model", content_type = "application/problem+json", body = Problem),
        (status = 422, description = "The body is no image and no tensor of the model's shape", content_type = "application/problem+json", body = Problem),
    )
)]
pub(super) async fn features(
    Shared(state): Shared<State>,
    Params(query): Params<FeaturesQuery>,
    headers: HeaderMap,
    body: Bytes,
) -> Result<Json<Embeddings>, Problem> {
    let engine = state
        .engine(query.model.as_deref().unwrap_or("backbone"))
        .await?;
    if engine.manifest().output.embedding.is_none() {
        let none = format!("{} has no embedding", engine.id());
        return Err(Problem::new(422, "Not possible", none));
    }
    let outcomes = state.look(engine.clone(), &headers, body).await?;
    Ok(Json(Embeddings {
        model: engine.id().to_owned(),
        embeddings: outcomes
            .into_iter()
            .map(|outcome| outcome.embedding)
            .collect(),
    }))
}

/// A table to learn from.
#[derive(Debug, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct Table {
    /// One list of numbers per row, all of the same length.
    features: Vec<Vec<f32>>,
    /// The class of each row.
    labels: Vec<String>,
    /// Each class counts the same, however many rows it has.
    #[serde(default)]
    balanced: bool,
    /// Everything random follows from it.
    #[serde(default)]
    seed: u64,
}

/// A linear classifier: class = the largest of `weight · x + bias`.
#[derive(Debug, Serialize, utoipa::ToSchema)]
pub(super) struct Classifier {
    /// The classes, sorted.
    labels: Vec<String>,
    /// One row per class, one value per feature.
    weight: Vec<Vec<f32>>,
    /// One value per class.
    bias: Vec<f32>,
    /// Mean log-loss on rows that were held back, if any could be.
    held_back_loss: Option<f64>,
    /// λ of the regularisation that was chosen.
    strength: f64,
}

/// Learns a classifier from raw features, of images or of anything else.
#[utoipa::path(
    post,
    path = "/api/v1/train",
    request_body = Table,
    responses(
        (status = 200, description = "The classifier", body = Classifier),
        (status = 422, description = "The table cannot be learned from", content_type = "application/problem+json", body = Problem),
    )
)]
pub(super) async fn train_raw(
    Shared(state): Shared<State>,
    Said(table): Said<Table>,
) -> Result<Json<Classifier>, Problem> {
    let place = place(&state.learning.raw).await?;
    let stop = state.stop.clone();
    let done = spawn_blocking(move || {
        let _place = place;
        let refuse = |detail: String| Problem::new(422, "Not possible", detail);
        if table.features.len() != table.labels.len() {
            let (rows, labels) = (table.features.len(), table.labels.len());
            return Err(refuse(format!(
                "{rows} rows of features and {labels} labels"
            )));
        }
        let dim = table.features.first().map_or(0, Vec::len);
        if let Some(row) = table.features.iter().position(|row| row.len() != dim) {
            let found = table.features[row].len();
            return Err(refuse(format!(
                "features[{row}] has {found} values, features[0] has {dim}"
            )));
        }
        let mut labels = table.labels.clone();
        labels.sort_unstable();
        labels.dedup();
        let place = |label: &String| labels.binary_search(label).unwrap_or_default() as u32;
        let truth = table.labels.iter().map(place).collect();
        let features = Features::new(dim, labels.len(), table.features.concat(), truth, None)
            .map_err(|error| refuse(error.to_string()))?;
        let settings = head::Settings {
            balanced: table.balanced,
            seed: table.seed,
            ..head::Settings::default()
        };
        let mut report = |_: learn::Progress| {
            if stop.is_cancelled() {
                std::ops::ControlFlow::Break(())
            } else {
                std::ops::ControlFlow::Continue(())
            }
        };
        let head = head::train(&features, &settings, &mut report)
            .map_err(|error| refuse(error.to_string()))?;
        Ok(Classifier {
            labels,
            weight: head.weight.chunks(dim).map(<[f32]>::to_vec).collect(),
            bias: head.bias,
            held_back_loss: head.fold_loss,
            strength: head.strength,
        })
    });
    done.await.map_err(|error| gave_up(&error))?.map(Json)
}

#[cfg(test)]
#[path = "learning_tests.rs"]
mod tests;
