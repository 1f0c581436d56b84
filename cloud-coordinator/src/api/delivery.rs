//! Published models, how they come to the devices, and what devices fetch.

use axum::{
    Json,
    body::Bytes,
    extract::State as Shared,
    http::{StatusCode, header},
    response::{IntoResponse, Response},
};
use mesh_core::{
    Digest, Limits, Name, Trial,
    rollout::{Command, Plan},
};
use serde::{Deserialize, Serialize};

use super::{At, Params, Said, State, gate::Caller, problem::Problem};
use crate::delivery::{Group, ReleaseError, ReleaseRow, RolloutError, RolloutView, Settings};

/// Rows of a page.
const MAX_PAGE: i64 = 1_000;
/// What is named by its digest never changes.
const FOR_EVER: &str = "public, max-age=31536000, immutable";

impl From<ReleaseError> for Problem {
    fn from(error: ReleaseError) -> Self {
        let detail = error.to_string();
        match error {
            ReleaseError::Catalog(error) => error.into(),
            ReleaseError::Refused(_) => Self::new(409, "Not proven", detail),
            ReleaseError::Unpublished(_) => Self::not_found(detail),
            ReleaseError::Document(_) => Self::new(422, "Not possible", detail),
            error => {
                tracing::warn!(%error, "publishing failed");
                Self::new(
                    503,
                    "Not published",
                    "the model cannot be published now, see the log",
                )
            }
        }
    }
}

impl From<RolloutError> for Problem {
    fn from(error: RolloutError) -> Self {
        let detail = error.to_string();
        match error {
            RolloutError::Unknown(_) | RolloutError::Device(_) => Self::not_found(detail),
            RolloutError::Plan(_) => Self::invalid(detail),
            RolloutError::Ended(_) => Self::new(409, "Ended", detail),
            RolloutError::Full | RolloutError::Groups => {
                Self::new(429, "Too many rollouts", detail)
            }
            RolloutError::Release(error) => error.into(),
            RolloutError::Records(error) => {
                tracing::warn!(%error, "a rollout cannot be recorded");
                Self::new(
                    503,
                    "Database unavailable",
                    "the database could not answer, try again",
                )
            }
        }
    }
}

/// Which model.
#[derive(Debug, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct Publication {
    /// `name@version`, or `name` for the newest one in use.
    model: String,
    /// For whom it is done, if not for who asks: both are recorded. 1 to 100 characters.
    author: Option<String>,
}

/// A published model.
#[derive(Debug, Serialize, utoipa::ToSchema)]
pub(super) struct Published {
    /// `name@version`.
    model: String,
    /// SHA-256 of its release document, which pins every file.
    digest: String,
}

/// Publishes a model: signs what pins its files, and lays them ready for the devices.
#[utoipa::path(
    post,
    path = "/api/v1/releases",
    request_body = Publication,
    responses(
        (status = 200, description = "It is published", body = Published),
        (status = 404, description = "There is no such model", content_type = "application/problem+json", body = Problem),
        (status = 409, description = "The gate stopped it", content_type = "application/problem+json", body = Problem),
    )
)]
pub(super) async fn publish(
    Shared(state): Shared<State>,
    caller: Caller,
    Said(said): Said<Publication>,
) -> Result<Json<Published>, Problem> {
    let author = caller.author_for(said.author.as_deref())?;
    let release = state.releases.publish(&said.model, &author).await?;
    Ok(Json(Published {
        model: release.to_string(),
        digest: release.digest.to_string(),
    }))
}

/// What was brought.
#[derive(Debug, Serialize, utoipa::ToSchema)]
pub(super) struct Brought {
    /// `name@version`.
    model: String,
}

/// Takes in a bundle that was made elsewhere, as a tar of its folder. It is tried in a process of its own before
/// anything else is done with it.
#[utoipa::path(
    post,
    path = "/api/v1/catalog",
    request_body(content = Vec<u8>, content_type = "application/x-tar"),
    responses(
        (status = 200, description = "It is known", body = Brought),
        (status = 409, description = "There is another one of this name and version", content_type = "application/problem+json", body = Problem),
        (status = 422, description = "It is no bundle, or does not stand its test", content_type = "application/problem+json", body = Problem),
    )
)]
pub(super) async fn bring(
    Shared(state): Shared<State>,
    body: Bytes,
) -> Result<Json<Brought>, Problem> {
    let Ok(_one_at_a_time) = state.importing.acquire().await else {
        return Err(Problem::new(503, "Stopping", "the coordinator stops"));
    };
    let model = state.learning.catalog.bring(body).await?;
    Ok(Json(Brought { model }))
}

/// Which part of a list.
#[derive(Debug, Default, Deserialize, utoipa::IntoParams)]
#[serde(deny_unknown_fields, default)]
#[into_params(parameter_in = Query)]
pub(super) struct ListQuery {
    /// How many to skip.
    skip: Option<i64>,
    /// How many, 1 to 1000; 100 unless given.
    limit: Option<i64>,
}

/// The published models, newest first.
#[utoipa::path(
    get,
    path = "/api/v1/releases",
    params(ListQuery),
    responses((status = 200, description = "Releases", body = Vec<ReleaseRow>))
)]
pub(super) async fn releases(
    Shared(state): Shared<State>,
    Params(query): Params<ListQuery>,
) -> Result<Json<Vec<ReleaseRow>>, Problem> {
    let limit = query.limit.unwrap_or(100);
    if !(1..=MAX_PAGE).contains(&limit) {
        return Err(Problem::bad(format!("limit: is from 1 to {MAX_PAGE}")));
    }
    let skip = query.skip.unwrap_or(0).max(0);
    Ok(Json(state.samples.records.releases(limit, skip).await?))
}

fn bytes(
    kind: &'static str,
    keep: &'static str,
    bytes: Option<Bytes>,
) -> Result<Response, Problem> {
    let bytes = bytes.ok_or_else(|| Problem::not_found("there is no such file"))?;
    let headers = [(header::CONTENT_TYPE, kind), (header::CACHE_CONTROL, keep)];
    Ok((headers, bytes).into_response())
}

fn digest(text: &str) -> Result<Digest, Problem> {
    text.parse()
        .map_err(|error| Problem::bad(format!("{error}")))
}

/// A piece of a published file, by its SHA-256.
#[utoipa::path(
    get,
    path = "/api/v1/chunks/{sha256}",
    params(("sha256" = String, Path, description = "Its digest, as the release document names it")),
    responses(
        (status = 200, description = "The bytes", content_type = "application/octet-stream"),
        (status = 404, description = "There is no such piece", content_type = "application/problem+json", body = Problem),
    )
)]
pub(super) async fn chunk(
    Shared(state): Shared<State>,
    At(sha256): At<String>,
) -> Result<Response, Problem> {
    let found = state.releases.chunk(digest(&sha256)?).await;
    bytes("application/octet-stream", FOR_EVER, found)
}

/// What makes one published model file out of another, by their SHA-256.
#[utoipa::path(
    get,
    path = "/api/v1/deltas/{from}/{to}",
    params(
        ("from" = String, Path, description = "Digest of the model file that is there"),
        ("to" = String, Path, description = "Digest of the model file that is wanted"),
    ),
    responses(
        (status = 200, description = "The delta", content_type = "application/octet-stream"),
        (status = 404, description = "There is none, or it saves nothing: fetch the pieces", content_type = "application/problem+json", body = Problem),
    )
)]
pub(super) async fn delta(
    Shared(state): Shared<State>,
    At((from, to)): At<(String, String)>,
) -> Result<Response, Problem> {
    let found = state.releases.delta(digest(&from)?, digest(&to)?).await?;
    bytes("application/octet-stream", "public, max-age=3600", found)
}

/// Signed metadata by The Update Framework.
#[utoipa::path(
    get,
    path = "/api/v1/tuf/metadata/{file}",
    params(("file" = String, Path, description = "`timestamp.json`, `1.root.json` …")),
    responses(
        (status = 200, description = "The file", content_type = "application/json"),
        (status = 404, description = "There is no such file", content_type = "application/problem+json", body = Problem),
    )
)]
pub(super) async fn metadata(
    Shared(state): Shared<State>,
    At(file): At<String>,
) -> Result<Response, Problem> {
    let found = state.releases.signed(&format!("metadata/{file}")).await;
    bytes("application/json", "no-cache", found)
}

/// A signed target: the release document of one version of a model, or settings.
#[utoipa::path(
    get,
    path = "/api/v1/tuf/targets/{top}/{name}/{file}",
    params(
        ("top" = String, Path, description = "The digest and `.models` or `.settings`"),
        ("name" = String, Path, description = "The model, or `v1`"),
        ("file" = String, Path, description = "The version and `.json`"),
    ),
    responses(
        (status = 200, description = "The document", content_type = "application/json"),
        (status = 404, description = "There is no such document", content_type = "application/problem+json", body = Problem),
    )
)]
pub(super) async fn target(
    Shared(state): Shared<State>,
    At((top, name, file)): At<(String, String, String)>,
) -> Result<Response, Problem> {
    let found = state
        .releases
        .signed(&format!("targets/{top}/{name}/{file}"))
        .await;
    bytes("application/json", FOR_EVER, found)
}

/// What a rollout is to be.
#[derive(Debug, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct Start {
    /// `name@version`, or `name` for the newest one in use. It is published if it is not yet.
    model: String,
    /// Which devices; all that run a model of this name unless given.
    #[serde(default)]
    group: Group,
    /// The stages: percent of the devices, seconds of soaking, share that must have kept it, timeout. 1, 10, 50 and
    /// 100 percent unless given.
    #[serde(default)]
    #[schema(value_type = Option<Object>)]
    plan: Plan,
    /// What ends the trial on a device.
    #[serde(default)]
    #[schema(value_type = Option<Object>)]
    limits: Limits,
    /// How long the trial on a device is.
    #[serde(default)]
    #[schema(value_type = Option<Object>)]
    trial: Trial,
    /// Also where it is marked as bad, or older than what runs.
    #[serde(default)]
    force: bool,
    /// For whom it is done, if not for who asks: both are recorded. 1 to 100 characters.
    author: Option<String>,
}

/// Begins to bring a model to the devices, a few first. It takes the place of a rollout of the same model to the same
/// group.
#[utoipa::path(
    post,
    path = "/api/v1/rollouts",
    request_body = Start,
    responses(
        (status = 201, description = "It has begun", body = RolloutView),
        (status = 404, description = "There is no such model", content_type = "application/problem+json", body = Problem),
        (status = 409, description = "The gate stopped the model", content_type = "application/problem+json", body = Problem),
        (status = 422, description = "The plan is none", content_type = "application/problem+json", body = Problem),
    )
)]
pub(super) async fn start(
    Shared(state): Shared<State>,
    caller: Caller,
    Said(said): Said<Start>,
) -> Result<(StatusCode, Json<RolloutView>), Problem> {
    let settings = Settings {
        group: said.group,
        plan: said.plan,
        limits: said.limits,
        trial: said.trial,
        force: said.force,
        author: caller.author_for(said.author.as_deref())?,
    };
    let begun = state.rollouts.start(&said.model, settings).await?;
    Ok((StatusCode::CREATED, Json(begun)))
}

/// The rollouts that count, newest first.
#[utoipa::path(
    get,
    path = "/api/v1/rollouts",
    responses((status = 200, description = "Rollouts", body = Vec<RolloutView>))
)]
pub(super) async fn rollouts(Shared(state): Shared<State>) -> Json<Vec<RolloutView>> {
    Json(state.rollouts.list().await)
}

/// Something that happened to a rollout.
#[derive(Debug, Serialize, utoipa::ToSchema)]
pub(super) struct Happened {
    /// When, in milliseconds since the Unix epoch.
    at_ms: i64,
    /// What.
    what: String,
}

/// A rollout with its history.
#[derive(Debug, Serialize, utoipa::ToSchema)]
pub(super) struct RolloutStory {
    /// As it stands.
    #[serde(flatten)]
    rollout: RolloutView,
    /// What happened to it, in order.
    events: Vec<Happened>,
}

/// One rollout, with what happened to it.
#[utoipa::path(
    get,
    path = "/api/v1/rollouts/{id}",
    params(("id" = u64, Path, description = "Its number")),
    responses(
        (status = 200, description = "The rollout", body = RolloutStory),
        (status = 404, description = "There is no such rollout", content_type = "application/problem+json", body = Problem),
    )
)]
pub(super) async fn rollout(
    Shared(state): Shared<State>,
    At(id): At<u64>,
) -> Result<Json<RolloutStory>, Problem> {
    let (rollout, events) = state.rollouts.get(id).await?;
    let happened = |(at_ms, what)| Happened { at_ms, what };
    Ok(Json(RolloutStory {
        rollout,
        events: events.into_iter().map(happened).collect(),
    }))
}

/// What to do with a rollout.
#[derive(Debug, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct Order {
    /// `pause`, `resume`, `abort` (everybody goes back, also when it was done), `next_stage` or `last_stage` (without
    /// waiting for evidence).
    #[schema(value_type = String)]
    command: Command,
    /// For whom it is done, if not for who asks: both are recorded. 1 to 100 characters.
    author: Option<String>,
}

/// Pauses, resumes, aborts or hurries a rollout.
#[utoipa::path(
    post,
    path = "/api/v1/rollouts/{id}",
    params(("id" = u64, Path, description = "Its number")),
    request_body = Order,
    responses(
        (status = 200, description = "The rollout", body = RolloutView),
        (status = 404, description = "There is no such rollout", content_type = "application/problem+json", body = Problem),
        (status = 409, description = "A newer one has taken its place", content_type = "application/problem+json", body = Problem),
    )
)]
pub(super) async fn command(
    Shared(state): Shared<State>,
    caller: Caller,
    At(id): At<u64>,
    Said(said): Said<Order>,
) -> Result<Json<RolloutView>, Problem> {
    let author = caller.author_for(said.author.as_deref())?;
    Ok(Json(
        state.rollouts.command(id, said.command, &author).await?,
    ))
}

/// What one device is to run.
#[derive(Debug, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct Pin {
    /// `name@version`; null gives the device back to the rollouts.
    model: Option<String>,
    /// For whom it is done, if not for who asks: both are recorded. 1 to 100 characters.
    author: Option<String>,
}

/// Makes one device run a model, whatever rollouts say.
#[utoipa::path(
    put,
    path = "/api/v1/devices/{site}/{device}/pin",
    params(
        ("site" = String, Path, description = "The site"),
        ("device" = String, Path, description = "The device"),
    ),
    request_body = Pin,
    responses(
        (status = 204, description = "It is told"),
        (status = 404, description = "There is no such device or model", content_type = "application/problem+json", body = Problem),
    )
)]
pub(super) async fn pin(
    Shared(state): Shared<State>,
    caller: Caller,
    At((site, device)): At<(String, String)>,
    Said(said): Said<Pin>,
) -> Result<StatusCode, Problem> {
    let author = caller.author_for(said.author.as_deref())?;
    let named = |name: &str| {
        name.parse::<Name>()
            .map_err(|e| Problem::bad(e.to_string()))
    };
    let (site, device) = (named(&site)?, named(&device)?);
    if !caller.sees(Some(site.as_str())) {
        return Err(Problem::not_found("there is no such device"));
    }
    state
        .rollouts
        .pin(&site, &device, said.model.as_deref(), &author)
        .await?;
    Ok(StatusCode::NO_CONTENT)
}
