//! The API, the page, and what watches over the coordinator.

mod access;
mod activity;
mod around;
mod behind;
mod datasets;
mod delivery;
mod directory;
mod enrol;
mod erasures;
mod exchange;
mod gate;
mod held;
mod identities;
mod labels;
pub(crate) mod learning;
pub(crate) mod limits;
pub(crate) mod live;
mod mark;
mod offload;
mod page;
mod people;
mod problem;
mod quarantine;
mod routes;
mod samples;
mod serve;
mod settings;
mod shown;
mod subscribers;

use std::{net::SocketAddr, sync::Arc, time::Duration};

use axum::{
    Json, Router,
    extract::{
        DefaultBodyLimit, FromRequest, FromRequestParts, Path, Query, Request, State as Shared,
        rejection::{JsonRejection, PathRejection, QueryRejection},
    },
    http::{StatusCode, header, request::Parts as Head},
    middleware,
    response::IntoResponse,
};
use tokio::{
    sync::{Semaphore, watch},
    time::Instant,
};
use tokio_util::sync::CancellationToken;
use tower_http::limit::RequestBodyLimitLayer;
use utoipa::OpenApi;
use utoipa_axum::{router::OpenApiRouter, routes};

pub(crate) use serve::{PROTOCOLS, serve};

use self::{around::Around, gate::Gate, live::Live, problem::Problem};
use crate::{
    config::BrokerUrl,
    datasets::Datasets,
    delivery::{Releases, Rollouts},
    directory::Directory,
    erasure::Erasures,
    exchange::MAX_IMPORT_BYTES,
    ingest::Link,
    metrics::Metrics,
    parts::{Name, Parts},
    quarantine::Quarantine,
    registry::Registry,
    samples::Samples,
    store::Store,
    trust::{Door, Identity, Trust},
};

/// Most of what is here takes no body; a few bytes are tolerated.
const MAX_BODY: usize = 16 * 1024;
/// What a person says: a label, a list of classes.
const MAX_SAID: usize = 64 * 1024;
/// A piece of an image: some seconds of a slow uplink.
const MAX_PIECE: usize = 256 * 1024;
/// A bundle: the largest model and its pictures.
const MAX_BUNDLE: usize = 320 << 20;
/// How long the database may take to say that it can be written.
const READY: Duration = Duration::from_secs(2);

/// What every request can use.
#[derive(Clone)]
pub(crate) struct State {
    pub(crate) samples: Samples,
    pub(crate) datasets: Datasets,
    pub(crate) learning: learning::Learning,
    pub(crate) releases: Arc<Releases>,
    pub(crate) rollouts: Arc<Rollouts>,
    /// Imports are read one after the other.
    pub(crate) importing: Arc<Semaphore>,
    pub(crate) store: Arc<Store>,
    pub(crate) registry: Arc<Registry>,
    pub(crate) metrics: Arc<Metrics>,
    pub(crate) live: Live,
    pub(crate) link: Link,
    pub(crate) identity: Arc<Identity>,
    /// Where this is served.
    pub(crate) http: SocketAddr,
    /// Where the embedded broker listens.
    pub(crate) mqtt: Option<SocketAddr>,
    /// The external broker.
    pub(crate) broker_url: Option<BrokerUrl>,
    pub(crate) store_error: watch::Receiver<Option<String>>,
    pub(crate) quarantine: Quarantine,
    pub(crate) erasures: Arc<Erasures>,
    pub(crate) trust: Trust,
    pub(crate) directory: Option<Arc<Directory>>,
    pub(crate) door: Door,
    pub(crate) gate: Arc<Gate>,
    pub(crate) parts: Arc<Parts>,
    pub(crate) started: Instant,
    pub(crate) stop: CancellationToken,
}

/// What decides who may do what.
pub(crate) fn gate(
    trust: &Trust,
    door: Door,
    metrics: &Arc<Metrics>,
    parts: &Arc<Parts>,
) -> Arc<Gate> {
    let (metrics, parts) = (metrics.clone(), parts.clone());
    Arc::new(Gate::new(trust.clone(), door, metrics, parts))
}

impl State {
    /// Seconds since the start.
    fn second(&self) -> u64 {
        self.started.elapsed().as_secs()
    }
}

/// Query parameters, refused with a problem that names what is wrong.
struct Params<T>(T);

impl<S: Send + Sync, T: serde::de::DeserializeOwned> FromRequestParts<S> for Params<T> {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Head, state: &S) -> Result<Self, Problem> {
        let query: Result<Query<T>, QueryRejection> = Query::from_request_parts(parts, state).await;
        query
            .map(|Query(params)| Self(params))
            .map_err(|e| Problem::bad(e.body_text()))
    }
}

/// The parts of the path, refused with a problem that names what is wrong.
struct At<T>(T);

impl<S: Send + Sync, T: serde::de::DeserializeOwned + Send> FromRequestParts<S> for At<T> {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Head, state: &S) -> Result<Self, Problem> {
        let path: Result<Path<T>, PathRejection> = Path::from_request_parts(parts, state).await;
        path.map(|Path(parts)| Self(parts))
            .map_err(|e| Problem::bad(e.body_text()))
    }
}

/// What a person says, in JSON and declared as such: a page of somebody else's cannot send that here.
struct Said<T>(T);

impl<S: Send + Sync, T: serde::de::DeserializeOwned> FromRequest<S> for Said<T> {
    type Rejection = Problem;

    async fn from_request(request: Request, state: &S) -> Result<Self, Problem> {
        let said: Result<Json<T>, JsonRejection> = Json::from_request(request, state).await;
        said.map(|Json(said)| Self(said)).map_err(|e| {
            let title = e.status().canonical_reason().unwrap_or("Bad request");
            Problem::new(e.status().as_u16(), title, e.body_text())
        })
    }
}

#[derive(OpenApi)]
#[openapi(info(
    title = "Lacewing coordinator",
    description = "What devices reported: read it, page through it, watch it. Every error is a problem \
                   (RFC 9457)."
))]
struct Description;

fn group() -> OpenApiRouter<State> {
    OpenApiRouter::new()
}

/// What reads. Everything else takes a body, and says how much of one.
fn reading() -> OpenApiRouter<State> {
    let readings = group()
        .routes(routes!(routes::devices))
        .routes(routes!(routes::device))
        .routes(routes!(routes::readings))
        .routes(routes!(routes::gaps))
        .routes(routes!(routes::sightings))
        .routes(routes!(routes::models))
        .routes(routes!(live::live))
        .layer(middleware::from_fn(behind::readings));
    let images = group()
        .routes(routes!(samples::delete))
        .routes(routes!(samples::image))
        .routes(routes!(exchange::export))
        .layer(middleware::from_fn(behind::images));
    let learning = group()
        .routes(routes!(samples::samples))
        .routes(routes!(samples::sample))
        .routes(routes!(quarantine::quarantines))
        .routes(routes!(erasures::erasure))
        .routes(routes!(labels::tasks))
        .routes(routes!(labels::queue))
        .routes(routes!(labels::undo))
        .routes(routes!(datasets::dataset))
        .routes(routes!(learning::jobs))
        .routes(routes!(learning::job, learning::cancel))
        .routes(routes!(learning::catalog))
        .routes(routes!(learning::model))
        .routes(routes!(learning::confusion))
        .routes(routes!(delivery::rollouts))
        .routes(routes!(delivery::rollout))
        .routes(routes!(delivery::releases))
        .routes(routes!(settings::settings, settings::unset))
        .layer(middleware::from_fn(behind::learning));
    let releases = group()
        .routes(routes!(delivery::chunk))
        .routes(routes!(delivery::delta))
        .routes(routes!(delivery::metadata))
        .routes(routes!(delivery::target))
        .layer(middleware::from_fn(behind::releases));
    let offload = group()
        .routes(routes!(offload::offers))
        .layer(middleware::from_fn(behind::offload));
    let trust = group()
        .routes(routes!(identities::revoke_token))
        .routes(routes!(identities::identities))
        .routes(routes!(identities::approve))
        .routes(routes!(identities::revoke))
        .routes(routes!(subscribers::unsubscribe))
        .layer(middleware::from_fn(behind::trust));
    let directory = group()
        .routes(routes!(directory::login))
        .routes(routes!(directory::callback))
        .layer(middleware::from_fn(behind::directory));
    OpenApiRouter::with_openapi(Description::openapi())
        .routes(routes!(directory::ways))
        .merge(directory)
        .routes(routes!(metrics))
        .routes(routes!(healthz))
        .routes(routes!(readyz))
        .merge(readings)
        .merge(images)
        .merge(learning)
        .merge(releases)
        .merge(offload)
        .merge(trust)
}

fn saying() -> OpenApiRouter<State> {
    let learning = group()
        .routes(routes!(samples::holdout))
        .routes(routes!(labels::put_task))
        .routes(routes!(labels::label))
        .routes(routes!(datasets::datasets, datasets::snapshot))
        .routes(routes!(learning::train))
        .routes(routes!(delivery::publish))
        .routes(routes!(delivery::start))
        .routes(routes!(delivery::command))
        .routes(routes!(delivery::pin))
        .routes(routes!(quarantine::set, quarantine::lift))
        .routes(routes!(erasures::erasures, erasures::erase))
        .routes(routes!(settings::set))
        .layer(middleware::from_fn(behind::learning));
    let images = group()
        .routes(routes!(samples::announce))
        .layer(middleware::from_fn(behind::images));
    let broker = group()
        .routes(routes!(mark::mark))
        .layer(middleware::from_fn(behind::broker));
    let all = learning.merge(images).merge(broker);
    all.layer(RequestBodyLimitLayer::new(MAX_SAID))
}

/// What devices say before they are known.
fn entering() -> OpenApiRouter<State> {
    group()
        .routes(routes!(enrol::enrol))
        .routes(routes!(enrol::renew))
        .routes(routes!(identities::make_token, identities::tokens))
        .routes(routes!(subscribers::subscribe, subscribers::subscribers))
        .layer(middleware::from_fn(behind::trust))
        .layer(RequestBodyLimitLayer::new(enrol::MAX_ENROL))
}

/// Coming in, and who may.
fn knocking() -> OpenApiRouter<State> {
    group()
        .routes(routes!(people::login))
        .routes(routes!(people::logout))
        .routes(routes!(people::setup))
        .routes(routes!(people::me))
        .routes(routes!(people::password))
        .routes(routes!(people::users, people::add_user))
        .routes(routes!(people::change_user, people::remove_user))
        .routes(routes!(people::tokens, people::add_token))
        .routes(routes!(people::revoke_token))
        .routes(routes!(people::audit_log))
        .layer(middleware::from_fn(behind::trust))
        .layer(RequestBodyLimitLayer::new(MAX_BODY))
}

fn sending() -> OpenApiRouter<State> {
    group()
        .routes(routes!(samples::append))
        .layer(middleware::from_fn(behind::images))
        .layer(RequestBodyLimitLayer::new(MAX_PIECE))
}

/// What computes on what is sent.
fn computing() -> OpenApiRouter<State> {
    let images = group()
        .routes(routes!(learning::predict))
        .routes(routes!(learning::features))
        .layer(middleware::from_fn(behind::prediction))
        .layer(RequestBodyLimitLayer::new(learning::MAX_PREDICT_BODY));
    let tables = group()
        .routes(routes!(learning::train_raw))
        .layer(middleware::from_fn(behind::training))
        .layer(RequestBodyLimitLayer::new(learning::MAX_TRAIN_BODY));
    let frames = group()
        .routes(routes!(offload::look))
        .layer(middleware::from_fn(behind::offload))
        .layer(RequestBodyLimitLayer::new(offload::MAX_PICTURE));
    // The layers above are the limits.
    let all = images.merge(tables).merge(frames);
    all.layer(DefaultBodyLimit::disable())
}

fn bringing() -> OpenApiRouter<State> {
    let most = usize::try_from(MAX_IMPORT_BYTES).unwrap_or(usize::MAX);
    let bundles = group()
        .routes(routes!(delivery::bring))
        .layer(RequestBodyLimitLayer::new(MAX_BUNDLE));
    group()
        .routes(routes!(exchange::import))
        .layer(RequestBodyLimitLayer::new(most))
        .merge(bundles)
        .layer(middleware::from_fn(behind::imports))
        .layer(DefaultBodyLimit::disable())
}

/// Everything that takes a body.
fn taking() -> OpenApiRouter<State> {
    saying()
        .merge(entering())
        .merge(knocking())
        .merge(sending())
        .merge(bringing())
        .merge(computing())
}

/// The description of the API in JSON.
pub(crate) fn openapi() -> Result<String, serde_json::Error> {
    let (_, mut description) = reading().merge(taking()).split_for_parts();
    access::describe(&mut description);
    serde_json::to_string_pretty(&description)
}

/// Everything that is served.
fn router(state: State) -> Router {
    let (reading, description) = reading().split_for_parts();
    let described = OpenApiRouter::<State>::with_openapi(description);
    let (taking, mut description) = described.merge(taking()).split_for_parts();
    access::describe(&mut description);
    let description = axum::routing::get(move || std::future::ready(Json(description)));
    reading
        .route("/api/v1/openapi.json", description)
        .merge(page::router())
        .fallback(|| std::future::ready(Problem::not_found("there is nothing at this address")))
        .layer(RequestBodyLimitLayer::new(MAX_BODY))
        .merge(taking)
        .layer(middleware::from_fn_with_state(
            state.gate.clone(),
            gate::gate,
        ))
        .layer(middleware::from_fn_with_state(
            Around::new(&state),
            around::around,
        ))
        .with_state(state)
}

/// What is counted, for Prometheus.
#[utoipa::path(
    get,
    path = "/metrics",
    responses((status = 200, description = "OpenMetrics text", content_type = "text/plain", body = String))
)]
async fn metrics(Shared(state): Shared<State>) -> impl IntoResponse {
    let kind = "application/openmetrics-text; version=1.0.0; charset=utf-8";
    ([(header::CONTENT_TYPE, kind)], state.metrics.text())
}

/// The process lives.
#[utoipa::path(
    get,
    path = "/healthz",
    responses((status = 200, description = "It lives", content_type = "text/plain", body = String))
)]
async fn healthz() -> &'static str {
    "ok\n"
}

/// Readings can be taken in: the database can be written and the broker is there. Names the parts that are unwell.
#[utoipa::path(
    get,
    path = "/readyz",
    responses(
        (status = 200, description = "It is ready; each further line names a part that is unwell", content_type = "text/plain", body = String),
        (status = 503, description = "It is not, and why", content_type = "application/problem+json", body = Problem),
    )
)]
async fn readyz(Shared(state): Shared<State>) -> Result<(StatusCode, String), Problem> {
    let mut reasons = Vec::new();
    if let Some(error) = state.store_error.borrow().clone() {
        reasons.push(format!("readings cannot be stored: {error}"));
    } else {
        match tokio::time::timeout(READY, state.store.writable()).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => reasons.push(error.to_string()),
            Err(_) => reasons.push("the database does not answer".to_owned()),
        }
    }
    if !state.link.stands() {
        reasons.push("no connection to the broker".to_owned());
    }
    if reasons.is_empty() {
        let line = |name: Name| format!("unwell: {}, {}\n", name.as_str(), name.words());
        let unwell = state.parts.unwell().into_iter().map(line);
        Ok((
            StatusCode::OK,
            "ready\n".to_owned() + &unwell.collect::<String>(),
        ))
    } else {
        Err(Problem::new(503, "Not ready", reasons.join("; ")))
    }
}

#[cfg(test)]
mod tests {
    /// A change of this list is a change of the contract.
    #[test]
    fn the_description_names_every_route() {
        let description: serde_json::Value =
            serde_json::from_str(&super::openapi().unwrap()).unwrap();
        let paths: Vec<_> = description["paths"].as_object().unwrap().keys().collect();
        assert_eq!(
            paths,
            [
                "/api/v1/audit",
                "/api/v1/catalog",
                "/api/v1/catalog/{model}",
                "/api/v1/catalog/{model}/confusion.svg",
                "/api/v1/chunks/{sha256}",
                "/api/v1/datasets/{digest}",
                "/api/v1/deltas/{from}/{to}",
                "/api/v1/devices",
                "/api/v1/devices/{device}/sources/{source}/mark",
                "/api/v1/devices/{site}/{device}",
                "/api/v1/devices/{site}/{device}/pin",
                "/api/v1/devices/{site}/{device}/quarantine",
                "/api/v1/enrol",
                "/api/v1/enrolment-tokens",
                "/api/v1/enrolment-tokens/{jti}",
                "/api/v1/erasures",
                "/api/v1/erasures/{id}",
                "/api/v1/features",
                "/api/v1/gaps",
                "/api/v1/identities",
                "/api/v1/identities/{site}/{device}/approve",
                "/api/v1/identities/{site}/{device}/revoke",
                "/api/v1/jobs",
                "/api/v1/jobs/{id}",
                "/api/v1/live",
                "/api/v1/login",
                "/api/v1/logout",
                "/api/v1/me",
                "/api/v1/me/password",
                "/api/v1/models",
                "/api/v1/models/{call}",
                "/api/v1/offload",
                "/api/v1/offload/{sha256}",
                "/api/v1/oidc",
                "/api/v1/oidc/callback",
                "/api/v1/oidc/login",
                "/api/v1/quarantine",
                "/api/v1/readings",
                "/api/v1/releases",
                "/api/v1/renew",
                "/api/v1/rollouts",
                "/api/v1/rollouts/{id}",
                "/api/v1/samples",
                "/api/v1/samples/{device}/{epoch}/{seq}/image",
                "/api/v1/samples/{id}",
                "/api/v1/samples/{id}/holdout",
                "/api/v1/samples/{id}/image",
                "/api/v1/samples/{id}/labels",
                "/api/v1/samples/{id}/labels/last",
                "/api/v1/settings",
                "/api/v1/setup",
                "/api/v1/sightings",
                "/api/v1/subscribers",
                "/api/v1/subscribers/{name}",
                "/api/v1/tasks",
                "/api/v1/tasks/{task}",
                "/api/v1/tasks/{task}/datasets",
                "/api/v1/tasks/{task}/export",
                "/api/v1/tasks/{task}/import",
                "/api/v1/tasks/{task}/queue",
                "/api/v1/tasks/{task}/train",
                "/api/v1/tokens",
                "/api/v1/tokens/{id}",
                "/api/v1/train",
                "/api/v1/tuf/metadata/{file}",
                "/api/v1/tuf/targets/{top}/{name}/{file}",
                "/api/v1/users",
                "/api/v1/users/{name}",
                "/healthz",
                "/metrics",
                "/readyz",
            ]
        );
    }
}
