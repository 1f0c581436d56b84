//! Somebody's word on what a camera has just reported.

use axum::{extract::State as Shared, http::StatusCode};
use mesh_core::{Kind, Mark, Name, SampleReason, Topic, VERSION};
use serde::Deserialize;

use super::{At, Params, Said, State, gate::Caller, problem::Problem};

/// What is wrong with what was reported.
#[derive(Clone, Copy, Debug, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "lowercase")]
enum What {
    /// The result was wrong.
    Wrong,
    /// There was something to see.
    Missed,
}

/// A mark.
#[derive(Debug, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct MarkBody {
    /// `wrong` or `missed`.
    mark: What,
}

/// Which device, where several sites have one of this name.
#[derive(Debug, Default, Deserialize, utoipa::IntoParams)]
#[serde(deny_unknown_fields, default)]
#[into_params(parameter_in = Query)]
pub(super) struct MarkQuery {
    /// The site of the device.
    site: Option<String>,
}

/// Tells a device that what a camera has just reported is wrong, or that it missed something. The device
/// keeps the frame as a sample.
#[utoipa::path(
    post,
    path = "/api/v1/devices/{device}/sources/{source}/mark",
    params(
        ("device" = String, Path, description = "The device"),
        ("source" = String, Path, description = "The camera on it"),
        MarkQuery,
    ),
    request_body = MarkBody,
    responses(
        (status = 202, description = "It was published; a device that is not connected does not hear it"),
        (status = 404, description = "There is no such device", content_type = "application/problem+json", body = Problem),
        (status = 409, description = "Several sites have a device of this name: say which", content_type = "application/problem+json", body = Problem),
        (status = 503, description = "The broker is not there", content_type = "application/problem+json", body = Problem),
    )
)]
pub(super) async fn mark(
    Shared(state): Shared<State>,
    caller: Caller,
    At((device, source)): At<(String, String)>,
    Params(query): Params<MarkQuery>,
    Said(body): Said<MarkBody>,
) -> Result<StatusCode, Problem> {
    let source: Name = source
        .parse()
        .map_err(|error| Problem::invalid(format!("source: {error}")))?;
    let site = caller.narrowed(query.site)?;
    let (device, site) =
        state
            .registry
            .only(&device, site.as_deref())
            .map_err(|found| match found {
                0 => Problem::not_found("there is no such device"),
                _ => Problem::new(
                    409,
                    "Several devices",
                    format!("{found} sites have a device of this name: say which with ?site="),
                ),
            })?;
    let mark = match body.mark {
        What::Wrong => SampleReason::Wrong,
        What::Missed => SampleReason::Missed,
    };
    let topic = Topic {
        site,
        device,
        source,
        kind: Kind::Mark,
    };
    let bytes = serde_json::to_vec(&Mark { v: VERSION, mark })
        .map_err(|error| Problem::new(500, "Internal error", error.to_string()))?;
    if state.link.tell(&topic, bytes).await {
        Ok(StatusCode::ACCEPTED)
    } else {
        if state.link.stands() {
            let detail = "the broker is connected and takes nothing, try again";
            return Err(Problem::of_part(crate::parts::Name::Broker, detail));
        }
        let detail = "there is no connection to the broker, try again";
        Err(Problem::new(503, "Broker unavailable", detail))
    }
}
