//! Labelled images in and out.

use axum::{
    Json,
    body::Body,
    extract::{Request, State as Shared},
    http::header,
    response::{IntoResponse, Response},
};
use futures_util::TryStreamExt;
use mesh_core::Name;
use serde::Deserialize;
use tokio_util::io::{StreamReader, SyncIoBridge};

use super::{At, Params, State, problem::Problem};
use crate::{
    exchange::{Exported, Format, ImportReport, Wanted, export as exported, import as read},
    labels::checked_author,
};

/// How an import is to be read.
#[derive(Debug, Deserialize, utoipa::IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(super) struct ImportQuery {
    /// `folder`, `csv`, `coco` or `yolo`.
    format: Format,
    /// Puts the images into the holdout: only ever measured with, never trained with.
    #[serde(default)]
    holdout: bool,
    /// Who brings them, 1 to 100 characters.
    author: String,
}

/// Takes in a folder of labelled images as a tar.
///
/// What is wrong with a file is reported and does not stop the others. Doing it again changes nothing.
#[utoipa::path(
    post,
    path = "/api/v1/tasks/{task}/import",
    params(("task" = String, Path, description = "The task, which is made if it is new"), ImportQuery),
    request_body(content = Vec<u8>, content_type = "application/x-tar", description = "At most 16 GiB and 100,000 files, images of at most 8 MiB"),
    responses(
        (status = 200, description = "What was taken in, and what was not", body = ImportReport),
        (status = 415, description = "Not declared as a tar", content_type = "application/problem+json", body = Problem),
        (status = 422, description = "The tar is broken; what came before is here", content_type = "application/problem+json", body = Problem),
        (status = 503, description = "Another import is being read", content_type = "application/problem+json", body = Problem),
        (status = 507, description = "There is no more room", content_type = "application/problem+json", body = Problem),
    )
)]
pub(super) async fn import(
    Shared(state): Shared<State>,
    At(task): At<String>,
    Params(query): Params<ImportQuery>,
    request: Request,
) -> Result<Json<ImportReport>, Problem> {
    let task: Name = task
        .parse()
        .map_err(|error| Problem::invalid(format!("task: {error}")))?;
    let author = checked_author(&query.author)?.to_owned();
    // A page of somebody else's cannot declare this without being asked first.
    let kind = request.headers().get(header::CONTENT_TYPE);
    if kind.is_none_or(|kind| kind != "application/x-tar") {
        let detail = "the body is a tar: say so with content-type: application/x-tar";
        return Err(Problem::new(415, "Unsupported Media Type", detail));
    }
    let place = state.importing.clone().try_acquire_owned();
    let place = place.map_err(|_| Problem::new(503, "Busy", "another import is being read"))?;
    let wanted = Wanted {
        task: task.as_str().to_owned(),
        format: query.format,
        holdout: query.holdout,
        author,
    };
    let body = request.into_body().into_data_stream();
    let body = StreamReader::new(body.map_err(std::io::Error::other));
    let runtime = tokio::runtime::Handle::current();
    let work = tokio::task::spawn_blocking(move || {
        let _place = place;
        let tar = SyncIoBridge::new(Box::pin(body));
        read(&state.samples, &wanted, tar, &runtime)
    });
    let done = work
        .await
        .map_err(|_| Problem::new(500, "Internal error", "the import failed"))?;
    Ok(Json(done?))
}

/// How an export is to be written.
#[derive(Debug, Deserialize, utoipa::IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(super) struct ExportQuery {
    /// `folder` or `yolo` (a tar with the images), `csv` or `coco` (a text that names them).
    format: Format,
}

/// The labelled images of a task. `csv` and `coco` name them as the tar of `folder` has them.
#[utoipa::path(
    get,
    path = "/api/v1/tasks/{task}/export",
    params(("task" = String, Path, description = "The task"), ExportQuery),
    responses((status = 200, description = "A tar or a text", content_type = "application/x-tar", body = Vec<u8>))
)]
pub(super) async fn export(
    Shared(state): Shared<State>,
    At(task): At<String>,
    Params(query): Params<ExportQuery>,
) -> Result<Response, Problem> {
    let task: Name = task
        .parse()
        .map_err(|error| Problem::invalid(format!("task: {error}")))?;
    Ok(
        match exported(&state.samples, task.as_str(), query.format).await? {
            Exported::Text(kind, text) => ([(header::CONTENT_TYPE, kind)], text).into_response(),
            Exported::Tar(stream) => {
                let headers = [
                    (header::CONTENT_TYPE, "application/x-tar".to_owned()),
                    (
                        header::CONTENT_DISPOSITION,
                        format!("attachment; filename=\"{task}.tar\""),
                    ),
                ];
                (headers, Body::from_stream(stream)).into_response()
            }
        },
    )
}
