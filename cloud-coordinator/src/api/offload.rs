//! Frames that devices are unsure of: what is here for them, and what it says.
//!
//! Of each model only the newest in use, with names for what it sees. One frame is looked at at a time, and models are loaded in
//! its place, so that people's predictions have theirs.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, PoisonError},
};

use axum::{Json, body::Bytes, extract::State as Shared};
use mesh_core::{
    Digest,
    offload::{MAX_OFFERS, Offer},
};
use models::{Task, offer_of};
use serde::{Deserialize, Serialize};
use tokio::{sync::Semaphore, task::spawn_blocking};

use super::{
    At, Params, State,
    learning::{gave_up, place},
    problem::Problem,
};
use crate::train::{Catalog, Model};

/// The largest body: a picture as devices send them to each other.
pub(super) const MAX_PICTURE: usize = 2 << 20;

/// What looks at frames for devices.
pub(super) struct Looks {
    catalog: Arc<Catalog>,
    /// One at a time.
    place: Arc<Semaphore>,
    /// What each model in use is to others; nothing of one that does not name anything. A version never changes.
    offers: Mutex<BTreeMap<String, Option<Offer>>>,
}

/// A model that can look at frames.
#[derive(Debug, Serialize, utoipa::ToSchema)]
pub(super) struct Offered {
    /// `name@version`.
    model: String,
    /// SHA-256 of its file.
    digest: String,
    /// Digest of its task and its labels.
    kind: String,
    /// Length of its file.
    bytes: u64,
}

/// What a model says about a frame.
#[derive(Debug, Serialize, utoipa::ToSchema)]
pub(super) struct Answered {
    /// `name@version` of the model.
    model: String,
    /// The class, or `unknown`.
    label: String,
    /// How sure it is, 0..=1.
    score: f32,
    /// How far the second class lies behind.
    margin: f32,
}

/// Of which kind.
#[derive(Debug, Deserialize, utoipa::IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(super) struct OffersQuery {
    /// Digest of the task and the labels that are of use.
    kind: String,
}

impl Looks {
    pub(super) fn new(catalog: Arc<Catalog>) -> Self {
        Self {
            catalog,
            place: Arc::new(Semaphore::new(1)),
            offers: Mutex::default(),
        }
    }

    fn known(&self) -> std::sync::MutexGuard<'_, BTreeMap<String, Option<Offer>>> {
        self.offers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What the models in use are to others.
    async fn offers(self: &Arc<Self>) -> Result<Vec<Offer>, Problem> {
        let models = self.catalog.in_use().await?;
        let ids: Vec<String> = models.iter().map(Model::id).collect();
        let new: Vec<Model> = {
            let mut known = self.known();
            known.retain(|id, _| ids.contains(id));
            let is_new = |model: &Model| !known.contains_key(&model.id());
            models.into_iter().filter(is_new).collect()
        };
        if !new.is_empty() {
            let place = place(&self.place).await?;
            let this = Arc::clone(self);
            let read = spawn_blocking(move || {
                let _place = place;
                for model in new {
                    match this.catalog.bundle(&model) {
                        Ok(bundle) => {
                            let offer = offer_of(&bundle.manifest);
                            this.known().insert(model.id(), offer);
                        }
                        // The next one who asks tries again.
                        Err(error) => tracing::warn!(model = model.id(), %error, "not offered"),
                    }
                }
            });
            read.await.map_err(|error| gave_up(&error))?;
        }
        Ok(self.known().values().flatten().cloned().collect())
    }
}

/// The models that look at frames for devices whose own ones have the same labels, the largest first.
#[utoipa::path(
    get,
    path = "/api/v1/offload",
    params(OffersQuery),
    responses(
        (status = 200, description = "The models", body = Vec<Offered>),
        (status = 400, description = "The kind is no digest", content_type = "application/problem+json", body = Problem),
    )
)]
pub(super) async fn offers(
    Shared(state): Shared<State>,
    Params(query): Params<OffersQuery>,
) -> Result<Json<Vec<Offered>>, Problem> {
    let kind = digest(&query.kind, "kind")?;
    let mut offers = state.learning.looks.offers().await?;
    offers.retain(|offer| offer.kind == kind);
    offers.sort_by_key(|offer| std::cmp::Reverse(offer.bytes));
    let offered = |offer: Offer| Offered {
        model: offer.model,
        digest: offer.digest.to_string(),
        kind: offer.kind.to_string(),
        bytes: offer.bytes,
    };
    Ok(Json(
        offers.into_iter().take(MAX_OFFERS).map(offered).collect(),
    ))
}

/// Looks at a frame that a device is unsure of. The body is the picture.
#[utoipa::path(
    post,
    path = "/api/v1/offload/{sha256}",
    params(("sha256" = String, Path, description = "SHA-256 of the model's file, as it was offered")),
    request_body(content = Vec<u8>, content_type = "application/octet-stream"),
    responses(
        (status = 200, description = "What the model says", body = Answered),
        (status = 404, description = "That model is not in use", content_type = "application/problem+json", body = Problem),
        (status = 422, description = "The body is no picture", content_type = "application/problem+json", body = Problem),
    )
)]
pub(super) async fn look(
    Shared(state): Shared<State>,
    At(sha256): At<String>,
    body: Bytes,
) -> Result<Json<Answered>, Problem> {
    let wanted = digest(&sha256, "sha256")?;
    let looks = &state.learning.looks;
    let mut all = looks.catalog.in_use().await?.into_iter();
    let found = all.find(|model| {
        model.kind == Task::Classify.as_str() && model.sha256.parse().ok() == Some(wanted)
    });
    let model = found.ok_or_else(|| Problem::not_found("that model is not in use"))?;
    // Who does not wait any longer has hung up, and is not here any more when it is its turn.
    let place = place(&looks.place).await?;
    let catalog = looks.catalog.clone();
    let looked = spawn_blocking(move || {
        let _place = place;
        let refuse = |error: String| Problem::new(422, "Not possible", error);
        let engine = catalog.engine(&model)?;
        let input = engine.tensor_from_bytes(&body);
        let input = input.map_err(|error| refuse(format!("the picture: {error}")))?;
        let outcome = engine
            .run(&input)
            .map_err(|error| refuse(error.to_string()))?;
        Ok::<_, Problem>(Answered {
            model: engine.id().to_owned(),
            label: outcome.label,
            score: outcome.score.clamp(0.0, 1.0),
            margin: outcome.margin.clamp(0.0, 1.0),
        })
    });
    looked.await.map_err(|error| gave_up(&error))?.map(Json)
}

fn digest(text: &str, field: &str) -> Result<Digest, Problem> {
    text.parse()
        .map_err(|_| Problem::bad(format!("{field}: is no SHA-256 in hexadecimal digits")))
}
