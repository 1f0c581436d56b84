//! Datasets: snapshots of what is labelled.

use axum::{Json, extract::State as Shared, http::StatusCode};
use serde::{Deserialize, Serialize};

use super::{At, Said, State, gate::Caller, problem::Problem};
use crate::datasets::Summary;

/// The datasets of a task.
#[derive(Debug, Serialize, utoipa::ToSchema)]
pub(super) struct DatasetList {
    /// The newest first.
    items: Vec<Summary>,
}

/// The datasets of a task.
#[utoipa::path(
    get,
    path = "/api/v1/tasks/{task}/datasets",
    params(("task" = String, Path, description = "The task")),
    responses((status = 200, description = "The datasets", body = DatasetList))
)]
pub(super) async fn datasets(
    Shared(state): Shared<State>,
    At(task): At<String>,
) -> Result<Json<DatasetList>, Problem> {
    let items = state.datasets.of_task(&task).await?;
    Ok(Json(DatasetList { items }))
}

/// What a dataset is to be.
#[derive(Debug, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct DatasetBody {
    /// For whom it is done, if not for who asks: both are recorded. 1 to 100 characters.
    author: Option<String>,
    /// The largest share of the train images that one device may give, above 0 and at most 1; `training.device_share` of
    /// the coordinator's configuration unless given.
    device_share: Option<f64>,
}

/// Takes a snapshot of what is labelled now. The same content is the same dataset.
#[utoipa::path(
    post,
    path = "/api/v1/tasks/{task}/datasets",
    params(("task" = String, Path, description = "The task")),
    request_body = DatasetBody,
    responses(
        (status = 201, description = "The new dataset", body = Summary),
        (status = 200, description = "The dataset, which was here", body = Summary),
        (status = 404, description = "There is no such task", content_type = "application/problem+json", body = Problem),
        (status = 422, description = "Nothing can be learnt from it", content_type = "application/problem+json", body = Problem),
    )
)]
pub(super) async fn snapshot(
    Shared(state): Shared<State>,
    caller: Caller,
    At(task): At<String>,
    Said(body): Said<DatasetBody>,
) -> Result<(StatusCode, Json<Summary>), Problem> {
    let author = caller.author_for(body.author.as_deref())?;
    let made = state.datasets.create(&task, &author, body.device_share);
    let (new, summary) = made.await?;
    let status = if new {
        StatusCode::CREATED
    } else {
        StatusCode::OK
    };
    Ok((status, Json(summary)))
}

/// One dataset.
#[utoipa::path(
    get,
    path = "/api/v1/datasets/{digest}",
    params(("digest" = String, Path, description = "The dataset")),
    responses(
        (status = 200, description = "The dataset", body = Summary),
        (status = 404, description = "There is no such dataset", content_type = "application/problem+json", body = Problem),
    )
)]
pub(super) async fn dataset(
    Shared(state): Shared<State>,
    At(digest): At<String>,
) -> Result<Json<Summary>, Problem> {
    Ok(Json(state.datasets.summary(&digest).await?))
}
