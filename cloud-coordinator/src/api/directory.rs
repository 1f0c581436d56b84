//! Coming in by a directory of people.

use axum::{
    Json,
    extract::State as Shared,
    http::{HeaderMap, HeaderValue, StatusCode, header},
    response::{IntoResponse, Response},
};
use serde::{Deserialize, Serialize};

use super::{
    Params, State,
    gate::Caller,
    people::cookie,
    problem::Problem,
    shown::{cookie_name, cookie_named},
};
use crate::{
    directory::{Directory, DirectoryError, PENDING_S},
    parts::Name,
    trust::{Door, SESSION_MS},
};

/// Whether there is a directory.
#[derive(Debug, Serialize, utoipa::ToSchema)]
pub(super) struct Ways {
    /// People may come in by `GET /api/v1/oidc/login`.
    enabled: bool,
}

/// Says whether people may come in by a directory.
#[utoipa::path(
    get,
    path = "/api/v1/oidc",
    responses((status = 200, description = "Whether they may", body = Ways))
)]
pub(super) async fn ways(Shared(state): Shared<State>) -> Json<Ways> {
    let enabled = state.directory.is_some();
    Json(Ways { enabled })
}

fn directory(state: &State) -> Result<&Directory, Problem> {
    let none = || Problem::not_found("there is no directory: see [oidc] in the configuration");
    state.directory.as_deref().ok_or_else(none)
}

/// What ties a login to the browser that began it. It comes back from the directory's page, so it is not `Strict`.
fn begun(door: Door, state: &str, seconds: u64) -> Result<HeaderValue, Problem> {
    let secure = if door.tls { "; Secure" } else { "" };
    let name = begun_name(door);
    let text = format!("{name}={state}; Path=/; HttpOnly; SameSite=Lax; Max-Age={seconds}{secure}");
    HeaderValue::from_str(&text)
        .map_err(|_| Problem::new(500, "Internal error", "the login cannot be told"))
}

fn begun_name(door: Door) -> String {
    format!("{}-oidc", cookie_name(door))
}

impl From<DirectoryError> for Problem {
    fn from(error: DirectoryError) -> Self {
        match error {
            DirectoryError::Away(why) => {
                tracing::warn!(why, "nobody comes in by the directory");
                let detail = "the directory does not answer as it should, try again";
                Self::of_part(Name::Directory, detail)
            }
            DirectoryError::Refused(_) => {
                let detail = "the directory's word is not taken: the coordinator's log and audit log say why";
                Self::new(403, "Not let in", detail)
            }
        }
    }
}

fn to(place: &str) -> Result<HeaderValue, Problem> {
    HeaderValue::from_str(place)
        .map_err(|_| Problem::new(500, "Internal error", "the way there cannot be told"))
}

/// Begins to log in by the directory: sends the browser there.
#[utoipa::path(
    get,
    path = "/api/v1/oidc/login",
    responses(
        (status = 303, description = "To the directory"),
        (status = 404, description = "There is none", content_type = "application/problem+json", body = Problem),
        (status = 503, description = "The directory does not answer", content_type = "application/problem+json", body = Problem),
    )
)]
pub(super) async fn login(Shared(state): Shared<State>) -> Result<Response, Problem> {
    let (place, secret) = directory(&state)?.begin().await?;
    let headers = [
        (header::LOCATION, to(&place)?),
        (header::SET_COOKIE, begun(state.door, &secret, PENDING_S)?),
    ];
    Ok((StatusCode::SEE_OTHER, headers).into_response())
}

/// What the directory sends back.
#[derive(Debug, Default, Deserialize, utoipa::IntoParams)]
#[serde(default)]
#[into_params(parameter_in = Query)]
pub(super) struct Back {
    /// What is given for the tokens, once.
    code: String,
    /// Which login it is of.
    state: String,
    /// Why there is none.
    error: String,
}

/// Ends a login by the directory: sets the same cookie as a login by password.
#[utoipa::path(
    get,
    path = "/api/v1/oidc/callback",
    params(Back),
    responses(
        (status = 303, description = "To the console; the cookie is set"),
        (status = 401, description = "The user is disabled here", content_type = "application/problem+json", body = Problem),
        (status = 403, description = "The directory's word is not taken", content_type = "application/problem+json", body = Problem),
        (status = 404, description = "There is no directory", content_type = "application/problem+json", body = Problem),
        (status = 503, description = "The directory does not answer", content_type = "application/problem+json", body = Problem),
    )
)]
pub(super) async fn callback(
    Shared(state): Shared<State>,
    caller: Caller,
    headers: HeaderMap,
    Params(back): Params<Back>,
) -> Result<Response, Problem> {
    let directory = directory(&state)?;
    let from = format!("address {}", caller.address);
    let own = cookie_named(&headers, &begun_name(state.door));
    let person = if own.is_none_or(|own| own.is_empty() || own != back.state) {
        let why = "the login was begun in another browser, or too long ago";
        Err(DirectoryError::Refused(why.to_owned()))
    } else if back.code.is_empty() {
        let said: String = back.error.chars().take(100).collect();
        Err(DirectoryError::Refused(format!(
            "the directory says {said:?}"
        )))
    } else {
        directory.finish(&back.state, &back.code).await
    };
    let person = match person {
        Ok(person) => person,
        Err(error) => {
            let why = error.to_string();
            tracing::warn!(why, "somebody does not come in by the directory");
            state
                .trust
                .not_let_in("by the directory", &from, &why)
                .await;
            return Err(error.into());
        }
    };
    let session = state.trust.come_in(&person, &from).await?;
    let mut response = (StatusCode::SEE_OTHER, [(header::LOCATION, to("/")?)]).into_response();
    let cookies = response.headers_mut();
    cookies.append(
        header::SET_COOKIE,
        cookie(state.door, &session, SESSION_MS / 1_000)?,
    );
    cookies.append(header::SET_COOKIE, begun(state.door, "", 0)?);
    Ok(response)
}
