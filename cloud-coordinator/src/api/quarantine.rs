//! Devices whose samples are not learnt from: who they are, why, and what a person says to it.

use axum::{Json, extract::State as Shared, http::StatusCode};
use mesh_core::Name;
use serde::Deserialize;

use super::{At, Said, State, gate::Caller, problem::Problem};
use crate::quarantine::{QuarantineError, QuarantineRow};

impl From<QuarantineError> for Problem {
    fn from(error: QuarantineError) -> Self {
        match error {
            QuarantineError::Records(error) => error.into(),
            error @ QuarantineError::Free(_) => Self::not_found(error.to_string()),
            error @ QuarantineError::Why => Self::invalid(error.to_string()),
        }
    }
}

/// Devices whose samples are not learnt from, and those that were: which last first, then the newest.
#[utoipa::path(
    get,
    path = "/api/v1/quarantine",
    responses((status = 200, description = "At most 1000", body = [QuarantineRow]))
)]
pub(super) async fn quarantines(
    Shared(state): Shared<State>,
    caller: Caller,
) -> Result<Json<Vec<QuarantineRow>>, Problem> {
    let site = caller.narrowed(None)?;
    Ok(Json(state.quarantine.list(site.as_deref()).await?))
}

/// Why a device is set apart.
#[derive(Debug, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct Why {
    /// For people, 1 to 500 characters.
    why: String,
}

fn checked(caller: &Caller, (site, device): &(Name, Name)) -> Result<(), Problem> {
    if caller.sees(Some(site.as_str())) && *device != Name::itself() {
        Ok(())
    } else {
        Err(Problem::not_found("there is no such device"))
    }
}

/// Sets a device apart: its samples go into no training set, and nobody is asked about them, until this is lifted.
#[utoipa::path(
    put,
    path = "/api/v1/devices/{site}/{device}/quarantine",
    params(
        ("site" = String, Path, description = "Its site; `_` where none was proved"),
        ("device" = String, Path, description = "Its name"),
    ),
    request_body = Why,
    responses(
        (status = 204, description = "It is set apart"),
        (status = 404, description = "There is none", content_type = "application/problem+json", body = Problem),
        (status = 422, description = "It is not said why", content_type = "application/problem+json", body = Problem),
    )
)]
pub(super) async fn set(
    Shared(state): Shared<State>,
    caller: Caller,
    At(whom): At<(Name, Name)>,
    Said(said): Said<Why>,
) -> Result<StatusCode, Problem> {
    checked(&caller, &whom)?;
    let by = caller.called();
    let (site, device) = (whom.0.as_str(), whom.1.as_str());
    state.quarantine.set(site, device, &said.why, &by).await?;
    Ok(StatusCode::NO_CONTENT)
}

/// Lets a device's samples count again. Who says so vouches for those that are here.
#[utoipa::path(
    delete,
    path = "/api/v1/devices/{site}/{device}/quarantine",
    params(
        ("site" = String, Path, description = "Its site; `_` where none was proved"),
        ("device" = String, Path, description = "Its name"),
    ),
    responses(
        (status = 204, description = "Its samples count again"),
        (status = 404, description = "It is not in quarantine", content_type = "application/problem+json", body = Problem),
    )
)]
pub(super) async fn lift(
    Shared(state): Shared<State>,
    caller: Caller,
    At(whom): At<(Name, Name)>,
) -> Result<StatusCode, Problem> {
    checked(&caller, &whom)?;
    let by = caller.called();
    let (site, device) = (whom.0.as_str(), whom.1.as_str());
    state.quarantine.lift(site, device, &by).await?;
    Ok(StatusCode::NO_CONTENT)
}
