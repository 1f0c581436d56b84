//! Settings of devices: set, shown, taken back.

use axum::{Json, extract::State as Shared, http::StatusCode};
use mesh_core::{Name, settings::Whom};
use serde::Deserialize;
use serde_json::{Map, Value};

use super::{Params, Said, State, gate::Caller, problem::Problem};
use crate::delivery::{Push, SettingsError, SettingsView};

/// The seconds that a trial may take.
const TRIAL_S: std::ops::RangeInclusive<u32> = 15..=3_600;
/// The longest name of a board.
const MAX_BOARD: usize = 64;

impl From<SettingsError> for Problem {
    fn from(error: SettingsError) -> Self {
        let detail = error.to_string();
        match error {
            SettingsError::Refused(_) => Self::invalid(detail),
            SettingsError::Unknown => Self::not_found(detail),
            SettingsError::Full => Self::new(429, "Too many settings", detail),
            SettingsError::Release(error) => error.into(),
            SettingsError::Records(error) => error.into(),
        }
    }
}

fn whom(site: Option<&str>, board: Option<String>, device: Option<&str>) -> Result<Whom, Problem> {
    let named = |what: &str, name: &str| {
        name.parse::<Name>()
            .map_err(|error| Problem::invalid(format!("{what}: {error}")))
    };
    if device.is_some() && (site.is_none() || board.is_some()) {
        return Err(Problem::invalid(
            "device: is named with its site, and without a board",
        ));
    }
    let plain = |board: &String| {
        (1..=MAX_BOARD).contains(&board.len()) && !board.chars().any(char::is_control)
    };
    if !board.as_ref().is_none_or(plain) {
        return Err(Problem::invalid("board: has 1 to 64 characters"));
    }
    Ok(Whom {
        site: site.map(|name| named("site", name)).transpose()?,
        board,
        device: device.map(|name| named("device", name)).transpose()?,
    })
}

/// What is to be set, and for whom.
#[derive(Debug, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct Set {
    /// Only for this site; for all unless given.
    site: Option<String>,
    /// Only for devices on this board.
    board: Option<String>,
    /// Only for this device of the site.
    device: Option<String>,
    /// A part of the agent's configuration: `broker` (without `url`), `drift`, `outbox`, `publish`, `reject`, `report`,
    /// `samples` (without `coordinator`), and `source`, a list of tables, each with the `name` of the source it changes.
    #[schema(value_type = Object)]
    settings: Map<String, Value>,
    /// After so many seconds without the broker, or without a source that worked before, a device goes back to the
    /// settings that it had: 15 to 3600; 120 unless given.
    trial_s: Option<u32>,
    /// For whom it is done, if not for who asks: both are recorded. 1 to 100 characters.
    author: Option<String>,
}

/// Sets a part of the configuration of devices, in place of what was set before for the same site, board or device. What
/// is set nearest to a device counts, and nothing else: its own, then its site's. Each device checks and tries it, and goes
/// back by itself.
#[utoipa::path(
    put,
    path = "/api/v1/settings",
    request_body = Set,
    responses(
        (status = 200, description = "It counts", body = SettingsView),
        (status = 422, description = "It cannot be set from afar, or the site, board or device is none", content_type = "application/problem+json", body = Problem),
        (status = 503, description = "It cannot be signed or recorded now", content_type = "application/problem+json", body = Problem),
    )
)]
pub(super) async fn set(
    Shared(state): Shared<State>,
    caller: Caller,
    Said(said): Said<Set>,
) -> Result<Json<SettingsView>, Problem> {
    let author = caller.author_for(said.author.as_deref())?;
    let trial_s = said.trial_s.unwrap_or(120);
    if !TRIAL_S.contains(&trial_s) {
        return Err(Problem::invalid("trial_s: is from 15 to 3600"));
    }
    let push = Push {
        whom: whom(said.site.as_deref(), said.board, said.device.as_deref())?,
        settings: said.settings,
        trial_s,
        author,
    };
    Ok(Json(state.rollouts.push_settings(push).await?))
}

/// The settings that count, newest first, with how many devices have kept them, and where they failed and why.
#[utoipa::path(
    get,
    path = "/api/v1/settings",
    responses((status = 200, description = "Settings", body = Vec<SettingsView>))
)]
pub(super) async fn settings(Shared(state): Shared<State>) -> Json<Vec<SettingsView>> {
    Json(state.rollouts.settings().await)
}

/// Which settings.
#[derive(Debug, Default, Deserialize, utoipa::IntoParams)]
#[serde(deny_unknown_fields, default)]
#[into_params(parameter_in = Query)]
pub(super) struct Unset {
    /// Those of this site.
    site: Option<String>,
    /// Those of this board.
    board: Option<String>,
    /// Those of this device of the site.
    device: Option<String>,
    /// For whom it is done, if not for who asks: both are recorded. 1 to 100 characters.
    author: Option<String>,
}

/// Takes settings back: their devices have what is set less near, or their own files.
#[utoipa::path(
    delete,
    path = "/api/v1/settings",
    params(Unset),
    responses(
        (status = 204, description = "They do not count any more"),
        (status = 404, description = "There are none for that", content_type = "application/problem+json", body = Problem),
    )
)]
pub(super) async fn unset(
    Shared(state): Shared<State>,
    caller: Caller,
    Params(query): Params<Unset>,
) -> Result<StatusCode, Problem> {
    let author = caller.author_for(query.author.as_deref())?;
    let whom = whom(query.site.as_deref(), query.board, query.device.as_deref())?;
    state.rollouts.unset_settings(&whom, &author).await?;
    Ok(StatusCode::NO_CONTENT)
}
