//! Samples: a device sends them, people look at them.

use axum::{
    Json,
    body::Bytes,
    extract::State as Shared,
    http::{HeaderMap, StatusCode, header},
    response::IntoResponse,
};
use mesh_core::{Name, Sample};
use serde::{Deserialize, Serialize};

use super::{
    At, Params, Said, State,
    gate::Caller,
    problem::Problem,
    routes::{SamplePage, limit},
};
use crate::{
    clock,
    objects::kind_of,
    samples::{SampleError, SampleFilter, SampleRow},
    trust::Principal,
};

/// How much of an image is here.
#[derive(Debug, Serialize, utoipa::ToSchema)]
pub(super) struct Here {
    /// Bytes; all of them when the image is complete.
    offset: u64,
}

/// The site of a device that sends something, as far as who asks proves it. A device sends only what is its own.
fn proven(principal: Option<&Principal>, device: &Name) -> Result<Option<Name>, Problem> {
    match principal {
        Some(Principal::Device { site, device: is }) if is == device => Ok(Some(site.clone())),
        Some(Principal::Device { .. }) => {
            let why = "a device sends only what is its own";
            Err(Problem::new(403, "Forbidden", why))
        }
        _ => Ok(None),
    }
}

fn site_of(state: &State, caller: &Caller, device: &Name) -> Result<Option<Name>, Problem> {
    // Where somebody brings it, its site is known if there is one device of this name.
    let only = || Some(state.registry.only(device.as_str(), None).ok()?.1);
    Ok(proven(caller.principal(), device)?.or_else(only))
}

/// Goes on only if this one may see the sample: what it may not see is not there.
pub(super) async fn seen_by(caller: &Caller, state: &State, id: i64) -> Result<(), Problem> {
    if caller.principal().and_then(Principal::site).is_none() {
        return Ok(());
    }
    let found = state.samples.records.sample(id).await?;
    let seen = found.is_some_and(|sample| caller.sees(sample.site.as_deref()));
    if seen {
        Ok(())
    } else {
        Err(SampleError::Missing.into())
    }
}

/// Takes in a sample, which is sent again until this is answered. Its image follows.
///
/// The body is the JSON of a sample: `v`, `device`, `source`, `epoch`, `seq`, `ts`, `reason`, `label`,
/// `score`, `margin`, `entropy`, `model`, and if there are, `novelty`, `embedding`, `file` and `image`
/// (`sha256`, `bytes`).
#[utoipa::path(
    post,
    path = "/api/v1/samples",
    request_body(content = String, content_type = "application/json", description = "At most 64 KiB"),
    responses(
        (status = 201, description = "It is new; how much of its image is here", body = Here),
        (status = 200, description = "It was here; how much of its image is here", body = Here),
        (status = 422, description = "It is no sample", content_type = "application/problem+json", body = Problem),
        (status = 507, description = "There are as many as there may be", content_type = "application/problem+json", body = Problem),
    )
)]
pub(super) async fn announce(
    Shared(state): Shared<State>,
    caller: Caller,
    body: Bytes,
) -> Result<(StatusCode, Json<Here>), Problem> {
    let sample = Sample::decode(&body).map_err(|e| Problem::invalid(e.to_string()))?;
    let site = site_of(&state, &caller, &sample.device)?;
    let (new, offset) = state.samples.announce(&sample, site.as_ref()).await?;
    let status = if new {
        StatusCode::CREATED
    } else {
        StatusCode::OK
    };
    Ok((status, Json(Here { offset })))
}

/// Takes in a piece of an image: it is on the disk when this is answered.
#[utoipa::path(
    patch,
    path = "/api/v1/samples/{device}/{epoch}/{seq}/image",
    params(
        ("device" = String, Path, description = "The device"),
        ("epoch" = u64, Path, description = "The life of its outbox"),
        ("seq" = u64, Path, description = "The number of the reading"),
        ("Upload-Offset" = u64, Header, description = "Where the piece begins: the last `offset` that was answered"),
    ),
    request_body(content = Vec<u8>, content_type = "application/offset+octet-stream", description = "At most 256 KiB"),
    responses(
        (status = 200, description = "How much is here", body = Here),
        (status = 404, description = "No such sample", content_type = "application/problem+json", body = Problem),
        (status = 409, description = "It begins elsewhere; `offset` says where", content_type = "application/problem+json", body = Problem),
        (status = 410, description = "The sample was deleted", content_type = "application/problem+json", body = Problem),
        (status = 415, description = "It is neither JPEG nor PNG", content_type = "application/problem+json", body = Problem),
        (status = 422, description = "The image is refused, or longer than announced", content_type = "application/problem+json", body = Problem),
        (status = 507, description = "Too many images are on their way", content_type = "application/problem+json", body = Problem),
    )
)]
pub(super) async fn append(
    Shared(state): Shared<State>,
    caller: Caller,
    At((device, epoch, seq)): At<(String, u64, u64)>,
    headers: HeaderMap,
    body: Bytes,
) -> Result<Json<Here>, Problem> {
    let offset = headers
        .get("upload-offset")
        .and_then(|value| value.to_str().ok())
        .and_then(|text| text.parse::<u64>().ok())
        .ok_or_else(|| Problem::bad("Upload-Offset: is missing, or no number of bytes"))?;
    let device: Name = device.parse().map_err(|_| SampleError::Missing)?;
    let (epoch, seq) = (i64::try_from(epoch), i64::try_from(seq));
    let (Ok(epoch), Ok(seq)) = (epoch, seq) else {
        return Err(SampleError::Missing.into());
    };
    let site = site_of(&state, &caller, &device)?;
    let appended = state
        .samples
        .append((site.as_ref(), &device), epoch, seq, offset, body);
    let offset = appended.await?;
    Ok(Json(Here { offset }))
}

/// Which samples.
#[derive(Debug, Default, Deserialize, utoipa::IntoParams)]
#[serde(deny_unknown_fields, default)]
#[into_params(parameter_in = Query)]
pub(super) struct SamplesQuery {
    /// Only of this task.
    task: Option<String>,
    /// Only kept for this: `wrong`, `missed`, `uncertain`, `novel` or `random`.
    reason: Option<String>,
    /// Only of this site.
    site: Option<String>,
    /// Only of this device.
    device: Option<String>,
    /// Only those that have a label (a class, or none of them), or only those that have not.
    labelled: Option<bool>,
    /// The `next` of the page before.
    after: Option<i64>,
    /// Rows of the page, 1 to 1000; 100 unless given.
    limit: Option<i64>,
}

/// The samples, the newest first.
#[utoipa::path(
    get,
    path = "/api/v1/samples",
    params(SamplesQuery),
    responses(
        (status = 200, description = "A page of samples", body = SamplePage),
        (status = 400, description = "A parameter is wrong", content_type = "application/problem+json", body = Problem),
    )
)]
pub(super) async fn samples(
    Shared(state): Shared<State>,
    caller: Caller,
    Params(query): Params<SamplesQuery>,
) -> Result<Json<SamplePage>, Problem> {
    let limit = limit(query.limit)?;
    let filter = SampleFilter {
        site: caller.narrowed(query.site)?,
        task: query.task,
        reason: query.reason,
        device: query.device,
        labelled: query.labelled,
        after: query.after,
        limit,
    };
    let items = state.samples.records.samples(filter).await?;
    Ok(Json(SamplePage::new(items, limit, |row| row.id)))
}

/// One sample.
#[utoipa::path(
    get,
    path = "/api/v1/samples/{id}",
    params(("id" = i64, Path, description = "The sample")),
    responses(
        (status = 200, description = "The sample", body = SampleRow),
        (status = 404, description = "There is no such sample", content_type = "application/problem+json", body = Problem),
    )
)]
pub(super) async fn sample(
    Shared(state): Shared<State>,
    caller: Caller,
    At(id): At<i64>,
) -> Result<Json<SampleRow>, Problem> {
    let found = state.samples.records.sample(id).await?;
    let found = found.filter(|sample| caller.sees(sample.site.as_deref()));
    Ok(Json(found.ok_or(SampleError::Missing)?))
}

/// Deletes a sample with its image, also where a dataset names it. A device does not bring it back.
#[utoipa::path(
    delete,
    path = "/api/v1/samples/{id}",
    params(("id" = i64, Path, description = "The sample")),
    responses(
        (status = 204, description = "It is gone"),
        (status = 404, description = "There is no such sample", content_type = "application/problem+json", body = Problem),
    )
)]
pub(super) async fn delete(
    Shared(state): Shared<State>,
    caller: Caller,
    At(id): At<i64>,
) -> Result<StatusCode, Problem> {
    seen_by(&caller, &state, id).await?;
    state.samples.delete(id).await?;
    Ok(StatusCode::NO_CONTENT)
}

/// The image of a sample, JPEG or PNG.
#[utoipa::path(
    get,
    path = "/api/v1/samples/{id}/image",
    params(("id" = i64, Path, description = "The sample")),
    responses(
        (status = 200, description = "The image", content_type = "image/jpeg", body = Vec<u8>),
        (status = 404, description = "There is no such image", content_type = "application/problem+json", body = Problem),
    )
)]
pub(super) async fn image(
    Shared(state): Shared<State>,
    caller: Caller,
    At(id): At<i64>,
) -> Result<impl IntoResponse, Problem> {
    seen_by(&caller, &state, id).await?;
    let bytes = state.samples.image(id).await?;
    let (kind, _) = kind_of(&bytes).ok_or(SampleError::Missing)?;
    let headers = [
        (header::CONTENT_TYPE, kind),
        (
            header::CACHE_CONTROL,
            "private, max-age=31536000, immutable",
        ),
        (
            header::CONTENT_SECURITY_POLICY,
            "default-src 'none'; sandbox; frame-ancestors 'none'",
        ),
    ];
    Ok((headers, bytes))
}

/// Whether a sample is in the holdout.
#[derive(Debug, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct Holdout {
    /// Only ever measured with, never trained with.
    holdout: bool,
}

/// Puts a sample into the holdout or takes it out. Only a person decides that, and who asks is written down as the one.
#[utoipa::path(
    put,
    path = "/api/v1/samples/{id}/holdout",
    params(("id" = i64, Path, description = "The sample")),
    request_body = Holdout,
    responses(
        (status = 200, description = "The sample as it is now", body = SampleRow),
        (status = 404, description = "There is no such sample", content_type = "application/problem+json", body = Problem),
        (status = 409, description = "Its image is not here", content_type = "application/problem+json", body = Problem),
    )
)]
pub(super) async fn holdout(
    Shared(state): Shared<State>,
    caller: Caller,
    At(id): At<i64>,
    Said(said): Said<Holdout>,
) -> Result<Json<SampleRow>, Problem> {
    let author = caller.author()?;
    seen_by(&caller, &state, id).await?;
    let records = &state.samples.records;
    let now = clock::now_ms();
    if !records.set_holdout(id, said.holdout, &author, now).await? {
        records.sample(id).await?.ok_or(SampleError::Missing)?;
        let why =
            "its image is not here: only what a device can no longer change goes into the holdout";
        return Err(Problem::new(409, "Not possible", why));
    }
    let found = records.sample(id).await?;
    Ok(Json(found.ok_or(SampleError::Missing)?))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::trust::Role;

    #[test]
    fn a_device_speaks_for_itself_only() {
        let name = |text: &str| text.parse::<Name>().unwrap();
        let device = Principal::Device {
            site: name("plant-3"),
            device: name("cam7"),
        };
        let user = Principal::User {
            name: "ana".into(),
            role: Role::Admin,
            site: None,
        };
        let proven = |who: Option<&Principal>, device: &str| proven(who, &name(device)).ok();
        assert_eq!(proven(Some(&device), "cam7"), Some(Some(name("plant-3"))));
        assert_eq!(proven(Some(&device), "cam8"), None);
        assert_eq!(proven(Some(&user), "cam7"), Some(None));
        assert_eq!(proven(None, "cam7"), Some(None));
    }
}
