//! Who may bring devices in, and which of them are let in or shut out.

use axum::{
    Extension, Json,
    extract::State as Shared,
    http::{StatusCode, Uri},
};
use mesh_core::Name;
use serde::{Deserialize, Serialize};

use super::{At, Params, Said, State, enrol::bracketed, problem::Problem};
use crate::{
    clock,
    trust::{
        Principal,
        devices::{IdentityRow, MAX_ROWS},
        token_rows::{NewToken, TokenRow},
    },
};

/// Devices that one token may bring.
const MAX_USES: u32 = 100_000;
/// A token for a year is a master key.
const MAX_HOURS: u32 = 8_760;
const HOUR_MS: i64 = 3_600_000;
/// The longest `https://host:port`.
const MAX_URL: usize = 300;

/// Who says it, for the audit log.
pub(super) fn by(principal: Option<Extension<Principal>>) -> String {
    principal.map_or_else(|| "operator".to_owned(), |Extension(p)| p.to_string())
}

/// What a new token is for.
#[derive(Debug, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct MakeToken {
    /// The site of the devices.
    #[schema(value_type = String)]
    site: Name,
    /// Only this device; any name unless given.
    #[schema(value_type = Option<String>)]
    device: Option<Name>,
    /// How many devices: 1 unless given.
    uses: Option<u32>,
    /// For how many hours: 24 unless given.
    hours: Option<u32>,
    /// Has a person to approve each?
    #[serde(default)]
    approve: bool,
    /// Under which address devices find this coordinator, `https://HOST:PORT`.
    url: Option<String>,
}

/// A token, which is shown this once.
#[derive(Debug, Serialize, utoipa::ToSchema)]
pub(super) struct TokenMade {
    /// What the device is given.
    token: String,
    /// Its number.
    jti: String,
    /// Until when it holds, in milliseconds since 1970.
    expires_ms: i64,
    /// Where the device goes with it.
    url: String,
    /// SHA-256 of the authority's certificate, in hexadecimal.
    ca: String,
}

fn checked_url(url: &str) -> Result<(), Problem> {
    let wrong = || Problem::invalid("url: is an address like \"https://lacewing.example:8443\"");
    let uri: Uri = url.parse().map_err(|_| wrong())?;
    let plain = uri.scheme_str() == Some("https")
        && uri.authority().is_some_and(|a| !a.as_str().contains('@'))
        && matches!(uri.path(), "" | "/")
        && uri.query().is_none();
    (plain && url.len() <= MAX_URL)
        .then_some(())
        .ok_or_else(wrong)
}

/// Makes an enrolment token. Whoever has it can bring devices to the site until it is used up.
#[utoipa::path(
    post,
    path = "/api/v1/enrolment-tokens",
    request_body = MakeToken,
    responses(
        (status = 201, description = "The token", body = TokenMade),
        (status = 422, description = "What is wrong", content_type = "application/problem+json", body = Problem),
    )
)]
pub(super) async fn make_token(
    Shared(state): Shared<State>,
    principal: Option<Extension<Principal>>,
    Said(asked): Said<MakeToken>,
) -> Result<(StatusCode, Json<TokenMade>), Problem> {
    let (uses, hours) = (asked.uses.unwrap_or(1), asked.hours.unwrap_or(24));
    if !(1..=MAX_USES).contains(&uses) {
        return Err(Problem::invalid(format!("uses: is 1 to {MAX_USES}")));
    }
    if !(1..=MAX_HOURS).contains(&hours) {
        return Err(Problem::invalid(format!("hours: is 1 to {MAX_HOURS}")));
    }
    if asked.site == Name::itself() || asked.device == Some(Name::itself()) {
        return Err(Problem::invalid("site and device: \"_\" is no name"));
    }
    let url = match asked.url {
        Some(url) => url,
        None => {
            let name = state.identity.public_name(state.http.ip());
            format!("https://{}:{}", bracketed(&name), state.http.port())
        }
    };
    checked_url(&url)?;
    let now_ms = clock::now_ms();
    let expires_ms = now_ms + i64::from(hours) * HOUR_MS;
    let by = by(principal);
    let new = NewToken {
        site: &asked.site,
        device: asked.device.as_ref(),
        quota: i64::from(uses),
        needs_approval: asked.approve,
        expires_ms,
        by: &by,
    };
    let made = state.identity.new_token(new, url.clone(), now_ms).await?;
    let made = TokenMade {
        token: made.token,
        jti: made.jti,
        expires_ms,
        url,
        ca: state.identity.authority.digest(),
    };
    Ok((StatusCode::CREATED, Json(made)))
}

/// The newest thousand enrolment tokens, without what makes them work.
#[utoipa::path(
    get,
    path = "/api/v1/enrolment-tokens",
    responses((status = 200, description = "The tokens", body = [TokenRow]))
)]
pub(super) async fn tokens(Shared(state): Shared<State>) -> Result<Json<Vec<TokenRow>>, Problem> {
    Ok(Json(state.identity.devices.tokens().await?))
}

/// Takes an enrolment token back: nobody new comes in with it.
#[utoipa::path(
    delete,
    path = "/api/v1/enrolment-tokens/{jti}",
    params(("jti" = String, Path, description = "Its number")),
    responses(
        (status = 204, description = "It is taken back"),
        (status = 404, description = "There is none", content_type = "application/problem+json", body = Problem),
    )
)]
pub(super) async fn revoke_token(
    Shared(state): Shared<State>,
    principal: Option<Extension<Principal>>,
    At(jti): At<String>,
) -> Result<StatusCode, Problem> {
    state.identity.revoke_token(&jti, &by(principal)).await?;
    Ok(StatusCode::NO_CONTENT)
}

/// Which devices to list.
#[derive(Debug, Deserialize, utoipa::IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(super) struct List {
    /// Only of this site.
    site: Option<String>,
    /// From after this one, `SITE/DEVICE`.
    after: Option<String>,
    /// At most so many, 1 to 1000; 100 unless given.
    limit: Option<u32>,
}

/// Devices by their keys, in the order of their names.
#[utoipa::path(
    get,
    path = "/api/v1/identities",
    params(List),
    responses((status = 200, description = "The devices", body = [IdentityRow]))
)]
pub(super) async fn identities(
    Shared(state): Shared<State>,
    Params(list): Params<List>,
) -> Result<Json<Vec<IdentityRow>>, Problem> {
    let limit = list.limit.unwrap_or(100);
    if !(1..=MAX_ROWS).contains(&limit) {
        return Err(Problem::bad(format!("limit: is 1 to {MAX_ROWS}")));
    }
    let after = list.after.as_deref().unwrap_or_default();
    let after = after.split_once('/').unwrap_or((after, ""));
    let devices = &state.identity.devices;
    let rows = devices
        .identities(list.site.as_deref(), after, limit)
        .await?;
    Ok(Json(rows))
}

/// Lets a device in that asked for it.
#[utoipa::path(
    post,
    path = "/api/v1/identities/{site}/{device}/approve",
    params(
        ("site" = String, Path, description = "Its site"),
        ("device" = String, Path, description = "Its name"),
    ),
    responses(
        (status = 200, description = "It may come in", body = IdentityRow),
        (status = 404, description = "There is none", content_type = "application/problem+json", body = Problem),
        (status = 409, description = "It was revoked", content_type = "application/problem+json", body = Problem),
    )
)]
pub(super) async fn approve(
    Shared(state): Shared<State>,
    principal: Option<Extension<Principal>>,
    At((site, device)): At<(Name, Name)>,
) -> Result<Json<IdentityRow>, Problem> {
    judge(&state, (site, device), true, by(principal)).await
}

/// Shuts a device out: its key never comes in again, and its connections end now.
#[utoipa::path(
    post,
    path = "/api/v1/identities/{site}/{device}/revoke",
    params(
        ("site" = String, Path, description = "Its site"),
        ("device" = String, Path, description = "Its name"),
    ),
    responses(
        (status = 200, description = "It is shut out", body = IdentityRow),
        (status = 404, description = "There is none", content_type = "application/problem+json", body = Problem),
    )
)]
pub(super) async fn revoke(
    Shared(state): Shared<State>,
    principal: Option<Extension<Principal>>,
    At((site, device)): At<(Name, Name)>,
) -> Result<Json<IdentityRow>, Problem> {
    judge(&state, (site, device), false, by(principal)).await
}

async fn judge(
    state: &State,
    (site, device): (Name, Name),
    let_in: bool,
    by: String,
) -> Result<Json<IdentityRow>, Problem> {
    let whom = (&site, &device);
    state.identity.judge(whom, let_in, &by).await?;
    let devices = &state.identity.devices;
    Ok(Json(devices.identity(&site, &device).await?))
}
