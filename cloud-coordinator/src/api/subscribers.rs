//! Who may listen on the broker without being a device.

use std::collections::BTreeSet;

use axum::{Extension, Json, extract::State as Shared, http::StatusCode};
use mesh_core::Name;
use serde::{Deserialize, Serialize};

use super::{At, Said, State, identities::by, problem::Problem};
use crate::{
    clock,
    trust::{
        Principal,
        subscribers::{Sites, SubscriberError, SubscriberRow},
    },
};

impl From<SubscriberError> for Problem {
    fn from(error: SubscriberError) -> Self {
        let detail = error.to_string();
        match error {
            SubscriberError::Invalid(_) => Self::invalid(detail),
            SubscriberError::Taken => Self::new(409, "Taken", detail),
            SubscriberError::Missing => Self::not_found(detail),
            SubscriberError::Full => Self::new(429, "Too many subscribers", detail),
            SubscriberError::Hash(_) => Self::new(500, "No password", detail),
            SubscriberError::Records(error) => error.into(),
        }
    }
}

/// Who is to listen on the broker.
#[derive(Debug, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct Subscribe {
    /// Its name, which is its user name on the broker.
    #[schema(value_type = String)]
    name: Name,
    /// 12 to 256 characters; made here unless given.
    password: Option<String>,
    /// The sites that it may read; all unless given.
    #[schema(value_type = Option<Vec<String>>)]
    sites: Option<BTreeSet<Name>>,
}

/// A subscriber whose password is shown this once.
#[derive(Debug, Serialize, utoipa::ToSchema)]
pub(super) struct Subscribed {
    /// Its user name.
    name: String,
    /// Its password.
    password: String,
}

/// Lets somebody listen on the broker by name and password, without being a device.
#[utoipa::path(
    post,
    path = "/api/v1/subscribers",
    request_body = Subscribe,
    responses(
        (status = 201, description = "It may listen", body = Subscribed),
        (status = 409, description = "There is one", content_type = "application/problem+json", body = Problem),
        (status = 422, description = "What is wrong", content_type = "application/problem+json", body = Problem),
    )
)]
pub(super) async fn subscribe(
    Shared(state): Shared<State>,
    principal: Option<Extension<Principal>>,
    Said(asked): Said<Subscribe>,
) -> Result<(StatusCode, Json<Subscribed>), Problem> {
    let sites = asked.sites.map_or(Sites::All, Sites::Some);
    let (by, now_ms) = (by(principal), clock::now_ms());
    let identity = &state.identity;
    let password = identity
        .add_subscriber(&asked.name, asked.password, sites, &by, now_ms)
        .await?;
    let name = asked.name.to_string();
    Ok((StatusCode::CREATED, Json(Subscribed { name, password })))
}

/// Who may listen on the broker without being a device.
#[utoipa::path(
    get,
    path = "/api/v1/subscribers",
    responses((status = 200, description = "All of them", body = [SubscriberRow]))
)]
pub(super) async fn subscribers(
    Shared(state): Shared<State>,
) -> Result<Json<Vec<SubscriberRow>>, Problem> {
    Ok(Json(state.identity.subscribers.list().await?))
}

/// Shuts a subscriber out; its connections end now.
#[utoipa::path(
    delete,
    path = "/api/v1/subscribers/{name}",
    params(("name" = String, Path, description = "Its name")),
    responses(
        (status = 204, description = "It is shut out"),
        (status = 404, description = "There is none", content_type = "application/problem+json", body = Problem),
    )
)]
pub(super) async fn unsubscribe(
    Shared(state): Shared<State>,
    principal: Option<Extension<Principal>>,
    At(name): At<Name>,
) -> Result<StatusCode, Problem> {
    let identity = &state.identity;
    identity.remove_subscriber(&name, &by(principal)).await?;
    Ok(StatusCode::NO_CONTENT)
}
