//! Erasing samples everywhere, and the receipts.

use axum::{Json, extract::State as Shared, http::StatusCode};
use serde::Deserialize;

use super::{At, Said, State, gate::Caller, problem::Problem};
use crate::erasure::{ErasureError, ErasureView, Which};

impl From<ErasureError> for Problem {
    fn from(error: ErasureError) -> Self {
        match error {
            ErasureError::Records(error) => error.into(),
            ErasureError::Samples(error) => error.into(),
            error @ ErasureError::Unknown(_) => Self::not_found(error.to_string()),
            error @ ErasureError::Invalid(_) => Self::invalid(error.to_string()),
            error => {
                tracing::error!(%error, "an erasure does not get on; it is tried again");
                let why = "it is written down, and tried again until it is done: see the log, and ask for the erasures";
                Self::new(503, "Not yet erased", why)
            }
        }
    }
}

/// What is to be gone.
#[derive(Debug, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct EraseBody {
    /// Which samples.
    which: Which,
    /// Why, 1 to 500 characters; it stays in the receipt.
    why: String,
}

/// Erases samples with everything that is known of them, here and on the devices that may still have them. What has the
/// same image goes too, and the image is not taken again. Nothing brings it back.
///
/// What is on this coordinator is gone when this is answered. Devices that are away are told when they come back: until
/// then they stand in `awaited`.
#[utoipa::path(
    post,
    path = "/api/v1/erasures",
    request_body = EraseBody,
    responses(
        (status = 201, description = "It is gone here; the receipt", body = ErasureView),
        (status = 422, description = "It is not said what, or why", content_type = "application/problem+json", body = Problem),
    )
)]
pub(super) async fn erase(
    Shared(state): Shared<State>,
    caller: Caller,
    Said(body): Said<EraseBody>,
) -> Result<(StatusCode, Json<ErasureView>), Problem> {
    let by = caller.called();
    let erased = state.erasures.erase(body.which, &body.why, &by).await?;
    Ok((StatusCode::CREATED, Json(erased)))
}

/// The newest thousand erasures with their receipts.
#[utoipa::path(
    get,
    path = "/api/v1/erasures",
    responses((status = 200, description = "The erasures", body = [ErasureView]))
)]
pub(super) async fn erasures(
    Shared(state): Shared<State>,
) -> Result<Json<Vec<ErasureView>>, Problem> {
    Ok(Json(state.erasures.list().await?))
}

/// How far an erasure is: its receipt.
#[utoipa::path(
    get,
    path = "/api/v1/erasures/{id}",
    params(("id" = i64, Path, description = "Its number")),
    responses(
        (status = 200, description = "The receipt", body = ErasureView),
        (status = 404, description = "There is none", content_type = "application/problem+json", body = Problem),
    )
)]
pub(super) async fn erasure(
    Shared(state): Shared<State>,
    At(id): At<i64>,
) -> Result<Json<ErasureView>, Problem> {
    Ok(Json(state.erasures.view(id).await?))
}
