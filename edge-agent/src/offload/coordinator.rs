//! The coordinator, as one more who looks at frames: over HTTP, where no neighbour can.

use std::{sync::Arc, time::Duration};

use mesh_core::{
    Backoff, Digest,
    offload::{MAX_OFFERS, Offer, serve::Refusal},
    roster::Peer,
};
use models::offer_of;
use tokio::{
    sync::watch,
    task::spawn_blocking,
    time::{Instant, sleep},
};

use super::{courier::OFFERS, wire::Reply};
use crate::{
    dice,
    http::{self, Patience},
    identity::Tls,
    samples::coordinator_url,
    update::Engines,
};

/// Stands for the coordinator where neighbours have the digest of their key: no key has this one.
pub(super) const COORDINATOR: Peer = Digest([0; 32]);
/// For it to say what it offers; a frame has its own deadline.
const PATIENCE: Duration = Duration::from_secs(5);
/// Where it does not say, it is asked again after this, and longer each time …
const FIRST_WAIT_MS: u64 = 3_000;
/// … but no longer than this.
const MAX_WAIT_MS: u64 = 300_000;
/// A few models, or a label.
const MAX_ANSWER: u64 = 4 * 1024;

/// The way to the coordinator's models.
pub(crate) struct Coordinator {
    agent: ureq::Agent,
    /// `https://HOST:PORT/api/v1/offload`
    url: String,
    /// Does the device reach it by itself? Where a neighbour carries it, readings go first: it does without this.
    uplink: watch::Receiver<bool>,
    /// The device's own models: only those with the same labels are of use.
    engines: watch::Receiver<Engines>,
}

impl Coordinator {
    /// For the coordinator at `https://HOST:PORT`.
    ///
    /// # Errors
    /// Says what an address should look like.
    pub(crate) fn new(
        coordinator: &str,
        tls: &Tls,
        uplink: watch::Receiver<bool>,
        engines: watch::Receiver<Engines>,
    ) -> Result<Arc<Self>, String> {
        let patience = Patience {
            connect: PATIENCE,
            answer: PATIENCE,
            body: PATIENCE,
            whole: Some(PATIENCE),
        };
        Ok(Arc::new(Self {
            agent: http::agent(patience, tls),
            url: format!("{}/api/v1/offload", coordinator_url(coordinator)?),
            uplink,
            engines,
        }))
    }

    /// Knows what it answers with, until the agent stops. Nothing while there is no way to it.
    pub(super) async fn know(self: &Arc<Self>, tell: &watch::Sender<Vec<Offer>>) {
        let (mut uplink, mut engines) = (self.uplink.clone(), self.engines.clone());
        let mut backoff = Backoff::new(FIRST_WAIT_MS, MAX_WAIT_MS);
        loop {
            let own = engines.borrow_and_update().active.clone();
            let own = own.and_then(|engine| offer_of(engine.manifest()));
            let is_up = *uplink.borrow_and_update();
            let mut after = OFFERS;
            let mut offers = Vec::new();
            if let Some(own) = own.filter(|_| is_up) {
                let asks = Arc::clone(self);
                let asked = spawn_blocking(move || asks.offers(own.kind)).await;
                match asked.unwrap_or_else(|error| Err(error.to_string())) {
                    Ok(found) => {
                        backoff.reset();
                        offers = found;
                    }
                    Err(why) => {
                        tracing::debug!("the coordinator does not say what it offers: {why}");
                        after = Duration::from_millis(backoff.next(dice::throw()));
                    }
                }
            }
            tell.send_if_modified(|known| std::mem::replace(known, offers) != *known);
            let changed = tokio::select! {
                () = sleep(after) => Ok(()),
                changed = uplink.changed() => changed,
                changed = engines.changed() => changed,
            };
            if changed.is_err() {
                return;
            }
        }
    }

    fn offers(&self, kind: Digest) -> Result<Vec<Offer>, String> {
        let sent = self.agent.get(format!("{}?kind={kind}", self.url)).call();
        let mut response = sent.map_err(|error| error.to_string())?;
        match response.status().as_u16() {
            200 => {}
            status => return Err(format!("status {status}")),
        }
        let offers: Vec<Offer> = json(&mut response)?;
        let sound = offers.len() <= MAX_OFFERS && offers.iter().all(Offer::is_bounded);
        sound
            .then_some(offers)
            .ok_or_else(|| "more than there can be".to_owned())
    }

    /// What one of its models says about a picture, if it says it in time. Blocks.
    pub(super) fn look(
        &self,
        model: Digest,
        image: &[u8],
        until: Instant,
    ) -> Result<Reply, String> {
        let left = until.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err("there is no time left".into());
        }
        let request = self.agent.post(format!("{}/{model}", self.url)).config();
        let request = request.timeout_global(Some(left)).build();
        let sent = request.content_type("application/octet-stream").send(image);
        let mut response = sent.map_err(|error| error.to_string())?;
        match response.status().as_u16() {
            200 => Ok(Reply::Answer(json(&mut response)?)),
            404 => Ok(Reply::Refused(Refusal::NoSuchModel)),
            413 | 422 => Ok(Reply::Refused(Refusal::BadPicture)),
            429 | 503 => Ok(Reply::Refused(Refusal::Full)),
            status => Err(format!("status {status}")),
        }
    }
}

fn json<T: serde::de::DeserializeOwned>(
    response: &mut ureq::http::Response<ureq::Body>,
) -> Result<T, String> {
    let body = response.body_mut().with_config().limit(MAX_ANSWER);
    let body = body.read_to_vec().map_err(|error| error.to_string())?;
    serde_json::from_slice(&body).map_err(|error| error.to_string())
}
