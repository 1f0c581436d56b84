//! Coming in, and who may.

use axum::{
    Json,
    extract::State as Shared,
    http::{HeaderValue, StatusCode, header},
    response::{IntoResponse, Response},
};
use serde::{Deserialize, Serialize};

use super::{
    At, Params, Said, State, gate::Caller, problem::Problem, routes::limit, shown::cookie_name,
};
use crate::trust::{
    Change, Door, GrantRow, NewToken, NewUser, Principal, Role, SESSION_MS, UserRow, Who,
    audit::{self, AuditRow},
};

/// Who somebody is.
#[derive(Debug, Serialize, utoipa::ToSchema)]
pub(super) struct Me {
    /// The name.
    name: String,
    /// What it may do.
    role: Role,
    /// The only site that it may see; all unless given.
    #[serde(skip_serializing_if = "Option::is_none")]
    site: Option<String>,
    /// What the token is for that was shown; nothing for a session.
    #[serde(skip_serializing_if = "Option::is_none")]
    token: Option<String>,
}

fn me_of(caller: &Caller) -> Result<(Me, &Who), Problem> {
    let Some(who) = &caller.who else {
        return Err(Problem::new(401, "Who are you", "log in"));
    };
    let Principal::User { name, role, site } = &who.principal else {
        return Err(Problem::new(403, "Forbidden", "this is for people"));
    };
    let me = Me {
        name: name.clone(),
        role: *role,
        site: site.as_ref().map(|site| site.as_str().to_owned()),
        token: who.label.clone(),
    };
    Ok((me, who))
}

pub(super) fn cookie(door: Door, value: &str, seconds: i64) -> Result<HeaderValue, Problem> {
    let secure = if door.tls { "; Secure" } else { "" };
    let name = cookie_name(door);
    let text =
        format!("{name}={value}; Path=/; HttpOnly; SameSite=Strict; Max-Age={seconds}{secure}");
    HeaderValue::from_str(&text)
        .map_err(|_| Problem::new(500, "Internal error", "the session cannot be told"))
}

/// A name and a password.
#[derive(Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct Login {
    /// The name.
    name: String,
    /// The password.
    password: String,
}

/// Logs in: sets a cookie that counts for 7 days, and for 12 hours of silence.
#[utoipa::path(
    post,
    path = "/api/v1/login",
    request_body = Login,
    responses(
        (status = 204, description = "The cookie is set"),
        (status = 401, description = "The name or the password is wrong", content_type = "application/problem+json", body = Problem),
        (status = 429, description = "Too often", content_type = "application/problem+json", body = Problem),
    )
)]
pub(super) async fn login(
    Shared(state): Shared<State>,
    caller: Caller,
    Said(said): Said<Login>,
) -> Result<Response, Problem> {
    state.gate.login(&said.name)?;
    let from = format!("address {}", caller.address);
    let session = state
        .trust
        .log_in(&said.name, &said.password, &from)
        .await?;
    let cookie = cookie(state.door, &session, SESSION_MS / 1_000)?;
    Ok((StatusCode::NO_CONTENT, [(header::SET_COOKIE, cookie)]).into_response())
}

/// Ends the session.
#[utoipa::path(
    post,
    path = "/api/v1/logout",
    responses((status = 204, description = "The session is over"))
)]
pub(super) async fn logout(
    Shared(state): Shared<State>,
    caller: Caller,
) -> Result<Response, Problem> {
    let (_, who) = me_of(&caller)?;
    state.trust.log_out(&caller.called(), &who.grant).await?;
    let cookie = cookie(state.door, "", 0)?;
    Ok((StatusCode::NO_CONTENT, [(header::SET_COOKIE, cookie)]).into_response())
}

/// Who asks.
#[utoipa::path(
    get,
    path = "/api/v1/me",
    responses((status = 200, description = "It is you", body = Me))
)]
pub(super) async fn me(caller: Caller) -> Result<Json<Me>, Problem> {
    Ok(Json(me_of(&caller)?.0))
}

/// Another password.
#[derive(Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct NewPassword {
    /// The present one.
    old: String,
    /// At least 10 characters, at most 256 bytes.
    new: String,
}

/// Gives oneself another password. All sessions end.
#[utoipa::path(
    post,
    path = "/api/v1/me/password",
    request_body = NewPassword,
    responses(
        (status = 204, description = "It is the password now"),
        (status = 401, description = "The present password is wrong", content_type = "application/problem+json", body = Problem),
        (status = 422, description = "It is too short or too long", content_type = "application/problem+json", body = Problem),
    )
)]
pub(super) async fn password(
    Shared(state): Shared<State>,
    caller: Caller,
    Said(said): Said<NewPassword>,
) -> Result<StatusCode, Problem> {
    let (me, who) = me_of(&caller)?;
    if who.label.is_some() {
        let why = "a token changes no password: log in";
        return Err(Problem::new(403, "Forbidden", why));
    }
    state.gate.login(&me.name)?;
    let changed = state
        .trust
        .change_own_password(&me.name, &said.old, &said.new);
    changed.await?;
    Ok(StatusCode::NO_CONTENT)
}

/// The first admin.
#[derive(Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct Setup {
    /// What stands behind the # of the setup link.
    token: String,
    /// The name: 1 to 63 of a-z, 0-9, - and _.
    name: String,
    /// At least 10 characters, at most 256 bytes.
    password: String,
}

/// Makes the first admin, with the link that the coordinator has logged. It can be used once.
#[utoipa::path(
    post,
    path = "/api/v1/setup",
    request_body = Setup,
    responses(
        (status = 201, description = "There is an admin now, who can log in"),
        (status = 403, description = "The link does not count, or not any more", content_type = "application/problem+json", body = Problem),
        (status = 422, description = "The name or the password cannot be used", content_type = "application/problem+json", body = Problem),
    )
)]
pub(super) async fn setup(
    Shared(state): Shared<State>,
    caller: Caller,
    Said(said): Said<Setup>,
) -> Result<StatusCode, Problem> {
    let from = format!("address {}", caller.address);
    let made = state
        .trust
        .set_up(&said.token, &said.name, &said.password, &from);
    made.await?;
    Ok(StatusCode::CREATED)
}

/// Everybody.
#[utoipa::path(
    get,
    path = "/api/v1/users",
    responses((status = 200, description = "The users, in order of name", body = Vec<UserRow>))
)]
pub(super) async fn users(Shared(state): Shared<State>) -> Result<Json<Vec<UserRow>>, Problem> {
    Ok(Json(state.trust.users().await?))
}

/// Adds a user.
#[utoipa::path(
    post,
    path = "/api/v1/users",
    request_body = NewUser,
    responses(
        (status = 201, description = "The user", body = UserRow),
        (status = 409, description = "There is one of this name", content_type = "application/problem+json", body = Problem),
        (status = 422, description = "The name, the site or the password cannot be used", content_type = "application/problem+json", body = Problem),
    )
)]
pub(super) async fn add_user(
    Shared(state): Shared<State>,
    caller: Caller,
    Said(said): Said<NewUser>,
) -> Result<(StatusCode, Json<UserRow>), Problem> {
    let user = state.trust.add_user(&caller.called(), &said).await?;
    Ok((StatusCode::CREATED, Json(user)))
}

/// Changes a user. Another password, and being disabled, end its sessions.
#[utoipa::path(
    patch,
    path = "/api/v1/users/{name}",
    params(("name" = String, Path, description = "The user")),
    request_body = Change,
    responses(
        (status = 200, description = "The user as it is now", body = UserRow),
        (status = 404, description = "There is no such user", content_type = "application/problem+json", body = Problem),
        (status = 409, description = "It is the last admin", content_type = "application/problem+json", body = Problem),
    )
)]
pub(super) async fn change_user(
    Shared(state): Shared<State>,
    caller: Caller,
    At(name): At<String>,
    Said(change): Said<Change>,
) -> Result<Json<UserRow>, Problem> {
    let by = caller.called();
    let changed = state.trust.change_user(&by, &name, &change).await?;
    Ok(Json(changed))
}

/// Removes a user with its sessions and tokens.
#[utoipa::path(
    delete,
    path = "/api/v1/users/{name}",
    params(("name" = String, Path, description = "The user")),
    responses(
        (status = 204, description = "It is gone"),
        (status = 404, description = "There is no such user", content_type = "application/problem+json", body = Problem),
        (status = 409, description = "It is the last admin", content_type = "application/problem+json", body = Problem),
    )
)]
pub(super) async fn remove_user(
    Shared(state): Shared<State>,
    caller: Caller,
    At(name): At<String>,
) -> Result<StatusCode, Problem> {
    state.trust.remove_user(&caller.called(), &name).await?;
    Ok(StatusCode::NO_CONTENT)
}

/// One's own tokens; an admin sees everybody's.
#[utoipa::path(
    get,
    path = "/api/v1/tokens",
    responses((status = 200, description = "The tokens that count, the newest first", body = Vec<GrantRow>))
)]
pub(super) async fn tokens(
    Shared(state): Shared<State>,
    caller: Caller,
) -> Result<Json<Vec<GrantRow>>, Problem> {
    let (me, _) = me_of(&caller)?;
    let owner = (me.role < Role::Admin).then_some(me.name.as_str());
    Ok(Json(state.trust.tokens(owner).await?))
}

/// A new token.
#[derive(Debug, Serialize, utoipa::ToSchema)]
pub(super) struct FreshToken {
    /// What is known of it later.
    #[serde(flatten)]
    row: GrantRow,
    /// What is to be shown, as `Authorization: Bearer …`. It is not kept, and never said again.
    token: String,
}

/// Makes a token for a program.
#[utoipa::path(
    post,
    path = "/api/v1/tokens",
    request_body = NewToken,
    responses(
        (status = 201, description = "The token", body = FreshToken),
        (status = 403, description = "It may not be more than its owner; a token makes no tokens", content_type = "application/problem+json", body = Problem),
        (status = 422, description = "Its label, site or days cannot be used", content_type = "application/problem+json", body = Problem),
    )
)]
pub(super) async fn add_token(
    Shared(state): Shared<State>,
    caller: Caller,
    Said(new): Said<NewToken>,
) -> Result<(StatusCode, Json<FreshToken>), Problem> {
    let (_, who) = me_of(&caller)?;
    let (row, token) = state.trust.add_token(&caller.called(), who, &new).await?;
    Ok((StatusCode::CREATED, Json(FreshToken { row, token })))
}

/// Takes a token back: one's own; an admin anybody's.
#[utoipa::path(
    delete,
    path = "/api/v1/tokens/{id}",
    params(("id" = String, Path, description = "Its number")),
    responses(
        (status = 204, description = "It does not count any more"),
        (status = 404, description = "There is no such token", content_type = "application/problem+json", body = Problem),
    )
)]
pub(super) async fn revoke_token(
    Shared(state): Shared<State>,
    caller: Caller,
    At(id): At<String>,
) -> Result<StatusCode, Problem> {
    let (me, _) = me_of(&caller)?;
    let owner = (me.role < Role::Admin).then_some(me.name.as_str());
    let by = caller.called();
    state.trust.revoke_token(&by, &id, owner).await?;
    Ok(StatusCode::NO_CONTENT)
}

/// Which lines.
#[derive(Debug, Default, Deserialize, utoipa::IntoParams)]
#[serde(deny_unknown_fields, default)]
#[into_params(parameter_in = Query)]
pub(super) struct AuditQuery {
    /// Only lines before this one: the `seq` of the last line of the page before.
    before: Option<i64>,
    /// Lines, 1 to 1000; 100 unless given.
    limit: Option<i64>,
}

/// Who did what, the newest first. `cloud-coordinator audit verify` says whether all of it is as it was written.
#[utoipa::path(
    get,
    path = "/api/v1/audit",
    params(AuditQuery),
    responses((status = 200, description = "Lines of the log", body = Vec<AuditRow>))
)]
pub(super) async fn audit_log(
    Shared(state): Shared<State>,
    Params(query): Params<AuditQuery>,
) -> Result<Json<Vec<AuditRow>>, Problem> {
    let limit = limit(query.limit)?;
    let lines = audit::page(&state.trust.records, query.before, limit).await?;
    Ok(Json(lines))
}
