//! What can be read: devices, readings, gaps, models.

use axum::{
    Json,
    extract::{Path, State as Shared},
};
use mesh_core::Name;
use serde::{Deserialize, Serialize};

use super::{Params, State, gate::Caller, problem::Problem};
use crate::{
    registry::{ModelView, View},
    samples::SampleRow,
    store::{GapFilter, GapRow, Order, ReadingFilter, ReadingRow, SightingFilter, SightingRow},
};

/// Rows of a page unless the request says otherwise.
const PAGE: i64 = 100;
/// The most rows of a page: some hundred kilobytes.
const MAX_PAGE: i64 = 1_000;

/// A page, and where the next one begins. (Not one generic type: a crate below `tough` has an implementation that makes
/// what `utoipa` writes for those ambiguous.)
macro_rules! page {
    ($name:ident, $row:ty, $cursor:ty) => {
        /// A page, and where the next one begins.
        #[derive(Debug, Serialize, utoipa::ToSchema)]
        pub(super) struct $name {
            /// The rows.
            items: Vec<$row>,
            /// Give this as `after` to get the next page; null after the last one.
            next: Option<$cursor>,
        }

        impl $name {
            pub(super) fn new(
                items: Vec<$row>,
                limit: i64,
                cursor: impl FnOnce(&$row) -> $cursor,
            ) -> Self {
                let full = i64::try_from(items.len()).is_ok_and(|n| n >= limit);
                let next = items.last().filter(|_| full).map(cursor);
                Self { items, next }
            }
        }
    };
}
page!(DevicePage, View, String);
page!(ReadingPage, ReadingRow, i64);
page!(GapPage, GapRow, i64);
page!(SamplePage, SampleRow, i64);
page!(SightingPage, SightingRow, String);

pub(super) fn limit(asked: Option<i64>) -> Result<i64, Problem> {
    let limit = asked.unwrap_or(PAGE);
    if (1..=MAX_PAGE).contains(&limit) {
        Ok(limit)
    } else {
        Err(Problem::bad(format!("limit: is from 1 to {MAX_PAGE}")))
    }
}

/// Which devices.
#[derive(Debug, Default, Deserialize, utoipa::IntoParams)]
#[serde(deny_unknown_fields, default)]
#[into_params(parameter_in = Query)]
pub(super) struct DevicesQuery {
    /// Only of this site.
    site: Option<String>,
    /// The `next` of the page before.
    after: Option<String>,
    /// Rows of the page, 1 to 1000; 100 unless given.
    limit: Option<i64>,
}

/// The devices in order of site and name, as they last reported.
#[utoipa::path(
    get,
    path = "/api/v1/devices",
    params(DevicesQuery),
    responses(
        (status = 200, description = "A page of devices", body = DevicePage),
        (status = 400, description = "A parameter is wrong", content_type = "application/problem+json", body = Problem),
    )
)]
pub(super) async fn devices(
    Shared(state): Shared<State>,
    caller: Caller,
    Params(query): Params<DevicesQuery>,
) -> Result<Json<DevicePage>, Problem> {
    let limit = limit(query.limit)?;
    let after = match &query.after {
        None => None,
        Some(cursor) => Some(
            cursor
                .split_once('/')
                .and_then(|(site, device)| Some((site.parse().ok()?, device.parse().ok()?)))
                .ok_or_else(|| Problem::bad("after: is not the `next` of a page of devices"))?,
        ),
    };
    let site = caller.narrowed(query.site)?;
    let items = state.registry.views(
        after.as_ref(),
        usize::try_from(limit).unwrap_or(0),
        state.second(),
        |d| site.as_ref().is_none_or(|s| s == d.site.as_str()),
    );
    Ok(Json(DevicePage::new(items, limit, View::cursor)))
}

/// One device as it last reported.
#[utoipa::path(
    get,
    path = "/api/v1/devices/{site}/{device}",
    params(("site" = String, Path, description = "The site"), ("device" = String, Path, description = "The device")),
    responses(
        (status = 200, description = "The device", body = View),
        (status = 404, description = "There is no such device", content_type = "application/problem+json", body = Problem),
    )
)]
pub(super) async fn device(
    Shared(state): Shared<State>,
    caller: Caller,
    path: Result<Path<(String, String)>, axum::extract::rejection::PathRejection>,
) -> Result<Json<View>, Problem> {
    let Path((site, device)) = path.map_err(|e| Problem::bad(e.body_text()))?;
    let found = match (site.parse::<Name>(), device.parse::<Name>()) {
        (Ok(site), Ok(device)) if caller.sees(Some(site.as_str())) => {
            state.registry.view(&site, &device, state.second())
        }
        _ => None,
    };
    found
        .map(Json)
        .ok_or_else(|| Problem::not_found("there is no such device"))
}

/// Which readings.
#[derive(Debug, Default, Deserialize, utoipa::IntoParams)]
#[serde(deny_unknown_fields, default)]
#[into_params(parameter_in = Query)]
pub(super) struct ReadingsQuery {
    /// Only of this site.
    site: Option<String>,
    /// Only of devices of this name.
    device: Option<String>,
    /// Only of this camera or sensor.
    source: Option<String>,
    /// Only with this label.
    label: Option<String>,
    /// Captured at or after this, milliseconds since 1970 by the device's clock.
    since: Option<i64>,
    /// Captured before this.
    until: Option<i64>,
    /// The `next` of the page before.
    after: Option<i64>,
    /// Rows of the page, 1 to 1000; 100 unless given.
    limit: Option<i64>,
    /// In order of arrival: `desc` (the newest first, the default) or `asc`.
    order: Order,
}

/// Stored readings in order of arrival.
#[utoipa::path(
    get,
    path = "/api/v1/readings",
    params(ReadingsQuery),
    responses(
        (status = 200, description = "A page of readings", body = ReadingPage),
        (status = 400, description = "A parameter is wrong", content_type = "application/problem+json", body = Problem),
        (status = 503, description = "The database cannot answer", content_type = "application/problem+json", body = Problem),
    )
)]
pub(super) async fn readings(
    Shared(state): Shared<State>,
    caller: Caller,
    Params(query): Params<ReadingsQuery>,
) -> Result<Json<ReadingPage>, Problem> {
    let limit = limit(query.limit)?;
    let filter = ReadingFilter {
        site: caller.narrowed(query.site)?,
        device: query.device,
        source: query.source,
        label: query.label,
        since: query.since,
        until: query.until,
        after: query.after,
        order: query.order,
        limit,
    };
    let items = state.store.readings(filter).await?;
    Ok(Json(ReadingPage::new(items, limit, |row| row.id)))
}

/// Which gaps.
#[derive(Debug, Default, Deserialize, utoipa::IntoParams)]
#[serde(deny_unknown_fields, default)]
#[into_params(parameter_in = Query)]
pub(super) struct GapsQuery {
    /// Only of this site.
    site: Option<String>,
    /// Only of devices of this name.
    device: Option<String>,
    /// The `next` of the page before.
    after: Option<i64>,
    /// Rows of the page, 1 to 1000; 100 unless given.
    limit: Option<i64>,
}

/// Readings that devices had to drop, in order of arrival.
#[utoipa::path(
    get,
    path = "/api/v1/gaps",
    params(GapsQuery),
    responses(
        (status = 200, description = "A page of gaps", body = GapPage),
        (status = 400, description = "A parameter is wrong", content_type = "application/problem+json", body = Problem),
        (status = 503, description = "The database cannot answer", content_type = "application/problem+json", body = Problem),
    )
)]
pub(super) async fn gaps(
    Shared(state): Shared<State>,
    caller: Caller,
    Params(query): Params<GapsQuery>,
) -> Result<Json<GapPage>, Problem> {
    let limit = limit(query.limit)?;
    let filter = GapFilter {
        site: caller.narrowed(query.site)?,
        device: query.device,
        after: query.after,
        limit,
    };
    let items = state.store.gaps(filter).await?;
    Ok(Json(GapPage::new(items, limit, |row| row.id)))
}

/// Which sightings.
#[derive(Debug, Default, Deserialize, utoipa::IntoParams)]
#[serde(deny_unknown_fields, default)]
#[into_params(parameter_in = Query)]
pub(super) struct SightingsQuery {
    /// Only of this site.
    site: Option<String>,
    /// Only with this label.
    label: Option<String>,
    /// First seen at or after this, milliseconds since 1970 by the devices' clocks.
    since: Option<i64>,
    /// The `next` of the page before.
    after: Option<String>,
    /// Rows of the page, 1 to 1000; 100 unless given.
    limit: Option<i64>,
    /// In the order in which they were first heard of: `desc` (the newest first, the default) or `asc`.
    order: Order,
}

/// What cameras have seen, each thing once with all who saw it. Which labels: `[sightings]` in the coordinator's configuration.
#[utoipa::path(
    get,
    path = "/api/v1/sightings",
    params(SightingsQuery),
    responses(
        (status = 200, description = "A page of sightings", body = SightingPage),
        (status = 400, description = "A parameter is wrong", content_type = "application/problem+json", body = Problem),
        (status = 503, description = "The database cannot answer", content_type = "application/problem+json", body = Problem),
    )
)]
pub(super) async fn sightings(
    Shared(state): Shared<State>,
    caller: Caller,
    Params(query): Params<SightingsQuery>,
) -> Result<Json<SightingPage>, Problem> {
    let limit = limit(query.limit)?;
    let after = query.after.map(|cursor| {
        let (ms, id) = cursor.split_once('/')?;
        Some((ms.parse().ok()?, id.to_owned()))
    });
    let after = match after {
        Some(None) => {
            return Err(Problem::bad(
                "after: is not the `next` of a page of sightings",
            ));
        }
        after => after.flatten(),
    };
    let filter = SightingFilter {
        site: caller.narrowed(query.site)?,
        label: query.label,
        since: query.since,
        after,
        order: query.order,
        limit,
    };
    let items = state.store.sightings(filter).await?;
    Ok(Json(SightingPage::new(items, limit, |row| {
        format!("{}/{}", row.opened_ms, row.id)
    })))
}

/// A model, and where it runs.
#[derive(Debug, Serialize, utoipa::ToSchema)]
pub(super) struct Model {
    /// The model.
    #[serde(flatten)]
    model: ModelView,
    /// On how many devices it is loaded.
    devices: usize,
}

/// All models that are in use.
#[derive(Debug, Serialize, utoipa::ToSchema)]
pub(super) struct Models {
    /// In order of name and version.
    items: Vec<Model>,
}

/// The models that devices have loaded.
#[utoipa::path(
    get,
    path = "/api/v1/models",
    responses((status = 200, description = "The models", body = Models))
)]
pub(super) async fn models(Shared(state): Shared<State>) -> Json<Models> {
    let items = state.registry.models().into_iter();
    let items = items.map(|(model, devices)| Model { model, devices });
    Json(Models {
        items: items.collect(),
    })
}
