//! Tasks, what to label next, and labels.

use axum::{Json, extract::State as Shared, http::StatusCode};
use mesh_core::Name;
use serde::{Deserialize, Deserializer, Serialize};

use super::{At, Params, Said as Body, State, gate::Caller, problem::Problem, samples::seen_by};
use crate::{
    clock,
    labels::{
        Candidate, Known, KnownRow, LabelError, Said, TaskRow, at_random, check_classes, common,
        order,
    },
    samples::SampleRow,
    train::embeddings_by,
};

/// Samples of one answer of the queue: each costs a look at every candidate.
const MAX_QUEUE: usize = 50;
/// What a person sees next, and the images that are loaded ahead.
const QUEUE: usize = 10;

/// Every task.
#[derive(Debug, Serialize, utoipa::ToSchema)]
pub(super) struct Tasks {
    /// In order of name.
    items: Vec<TaskRow>,
}

/// The tasks, and how far their labels are.
#[utoipa::path(
    get,
    path = "/api/v1/tasks",
    responses((status = 200, description = "The tasks", body = Tasks))
)]
pub(super) async fn tasks(Shared(state): Shared<State>) -> Result<Json<Tasks>, Problem> {
    let items = state.samples.records.tasks(None).await?;
    Ok(Json(Tasks { items }))
}

/// What a task is to have.
#[derive(Debug, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct TaskBody {
    /// All classes: first those that it has, in their order, then new ones. At most 256.
    classes: Vec<String>,
}

/// Makes a task, or adds classes to it.
#[utoipa::path(
    put,
    path = "/api/v1/tasks/{task}",
    params(("task" = String, Path, description = "The name of its models, a-z, 0-9, - and _")),
    request_body = TaskBody,
    responses(
        (status = 200, description = "The task as it is now", body = TaskRow),
        (status = 409, description = "It has other classes", content_type = "application/problem+json", body = Problem),
        (status = 422, description = "A name cannot be used", content_type = "application/problem+json", body = Problem),
    )
)]
pub(super) async fn put_task(
    Shared(state): Shared<State>,
    At(task): At<String>,
    Body(body): Body<TaskBody>,
) -> Result<Json<TaskRow>, Problem> {
    let task: Name = task
        .parse()
        .map_err(|error| Problem::invalid(format!("task: {error}")))?;
    check_classes(&body.classes)?;
    let records = &state.samples.records;
    let task = task.as_str();
    records
        .put_task(task, &body.classes, clock::now_ms())
        .await?;
    found(records.tasks(Some(task)).await?, task).map(Json)
}

fn found(tasks: Vec<TaskRow>, task: &str) -> Result<TaskRow, Problem> {
    let first = tasks.into_iter().next();
    first.ok_or_else(|| LabelError::NoTask(task.chars().take(100).collect()).into())
}

/// How to choose.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "lowercase")]
enum Strategy {
    /// What people marked, what the model is unsure of, what is unlike the rest.
    #[default]
    Queue,
    /// By lot.
    Random,
}

/// What to label next.
#[derive(Debug, Default, Deserialize, utoipa::IntoParams)]
#[serde(deny_unknown_fields, default)]
#[into_params(parameter_in = Query)]
pub(super) struct QueueQuery {
    /// `queue` (what helps most first, the default) or `random` (by lot).
    strategy: Strategy,
    /// Samples, 1 to 50; 10 unless given.
    limit: Option<usize>,
    /// The same seed gives the same order; 0 unless given.
    seed: u64,
}

/// What to label next.
#[derive(Debug, Serialize, utoipa::ToSchema)]
pub(super) struct Queue {
    /// How far the task is.
    task: TaskRow,
    /// The best first.
    items: Vec<SampleRow>,
}

/// The samples that nobody has said anything about, those that help most first.
#[utoipa::path(
    get,
    path = "/api/v1/tasks/{task}/queue",
    params(("task" = String, Path, description = "The task"), QueueQuery),
    responses(
        (status = 200, description = "What to label next", body = Queue),
        (status = 404, description = "There is no such task", content_type = "application/problem+json", body = Problem),
    )
)]
pub(super) async fn queue(
    Shared(state): Shared<State>,
    caller: Caller,
    At(name): At<String>,
    Params(query): Params<QueueQuery>,
) -> Result<Json<Queue>, Problem> {
    let take = query.limit.unwrap_or(QUEUE);
    if !(1..=MAX_QUEUE).contains(&take) {
        return Err(Problem::bad(format!("limit: is from 1 to {MAX_QUEUE}")));
    }
    let records = &state.samples.records;
    let task = found(records.tasks(Some(&name)).await?, &name)?;
    let seed = query.seed;
    let site = caller.narrowed(None)?;
    let site = site.as_deref();
    let ids = match query.strategy {
        Strategy::Random => at_random(records.open_ids(&name, site).await?, take, seed),
        Strategy::Queue => {
            let candidates = records.candidates(&name, site).await?;
            let known = known(&state, &name, &candidates).await?;
            // Up to a second of work.
            tokio::task::spawn_blocking(move || order(&candidates, &known, take, seed))
                .await
                .map_err(|_| Problem::new(500, "Internal error", "the queue cannot be ordered"))?
        }
    };
    let items = records.in_order(&ids).await?;
    Ok(Json(Queue { task, items }))
}

/// What is labelled, with embeddings that can be held against those of the candidates.
async fn known(state: &State, task: &str, candidates: &[Candidate]) -> Result<Vec<Known>, Problem> {
    let rows = state.samples.records.known(task).await?;
    let Some((model, _)) = common(candidates.iter()) else {
        return Ok(Vec::new());
    };
    let lacking = rows.iter().filter(|row| row.lacks(model));
    let lacking: Vec<String> = lacking.filter_map(|row| row.sha256.clone()).collect();
    let (catalog, objects) = (&state.learning.catalog, &state.samples.objects);
    let computed = embeddings_by(catalog, &state.datasets, objects, model, &lacking).await;
    let computed = computed.unwrap_or_else(|error| {
        // The order is worse without them, and somebody waits.
        tracing::warn!(task, model, %error, "labelled images cannot be looked at");
        Default::default()
    });
    let known = |row: KnownRow| row.known(model, &computed);
    Ok(rows.into_iter().filter_map(known).collect())
}

/// Tells `null` from nothing at all.
fn given<'de, D: Deserializer<'de>>(from: D) -> Result<Option<Option<String>>, D::Error> {
    Option::deserialize(from).map(Some)
}

/// What somebody says about a sample.
#[derive(Debug, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct LabelBody {
    /// A class of the task, or null for none of these.
    #[serde(default, deserialize_with = "given")]
    #[schema(value_type = Option<String>)]
    class: Option<Option<String>>,
    /// Cannot or need not be said; without `class`.
    #[serde(default)]
    skip: bool,
}

/// Adds a label to the history of a sample: it is the current one now. Its author is who asks.
#[utoipa::path(
    post,
    path = "/api/v1/samples/{id}/labels",
    params(("id" = i64, Path, description = "The sample")),
    request_body = LabelBody,
    responses(
        (status = 201, description = "The sample as it is now", body = SampleRow),
        (status = 404, description = "There is no such sample", content_type = "application/problem+json", body = Problem),
        (status = 410, description = "The sample was deleted", content_type = "application/problem+json", body = Problem),
        (status = 422, description = "The task has no such class", content_type = "application/problem+json", body = Problem),
    )
)]
pub(super) async fn label(
    Shared(state): Shared<State>,
    caller: Caller,
    At(id): At<i64>,
    Body(body): Body<LabelBody>,
) -> Result<(StatusCode, Json<SampleRow>), Problem> {
    let author = caller.author()?;
    let said = match (body.class, body.skip) {
        (None | Some(None), true) => Said::Skip,
        (Some(None), false) => Said::NoneOfThese,
        (Some(Some(class)), false) => Said::Class(class),
        (Some(Some(_)), true) => return Err(Problem::invalid("either class or skip, not both")),
        (None, false) => {
            return Err(Problem::invalid(
                "class: is missing; null means none of these",
            ));
        }
    };
    seen_by(&caller, &state, id).await?;
    let records = &state.samples.records;
    records.label(id, &said, &author, clock::now_ms()).await?;
    let sample = records.sample(id).await?.ok_or(LabelError::Deleted)?;
    Ok((StatusCode::CREATED, Json(sample)))
}

/// Takes the current label of a sample back; the one before is the current one again.
#[utoipa::path(
    delete,
    path = "/api/v1/samples/{id}/labels/last",
    params(("id" = i64, Path, description = "The sample")),
    responses(
        (status = 200, description = "The sample as it is now", body = SampleRow),
        (status = 404, description = "There is no such sample, or it has no label", content_type = "application/problem+json", body = Problem),
        (status = 410, description = "The sample was deleted", content_type = "application/problem+json", body = Problem),
    )
)]
pub(super) async fn undo(
    Shared(state): Shared<State>,
    caller: Caller,
    At(id): At<i64>,
) -> Result<Json<SampleRow>, Problem> {
    let author = caller.author()?;
    seen_by(&caller, &state, id).await?;
    let records = &state.samples.records;
    records.undo_label(id, &author, clock::now_ms()).await?;
    let sample = records.sample(id).await?.ok_or(LabelError::Deleted)?;
    Ok(Json(sample))
}
