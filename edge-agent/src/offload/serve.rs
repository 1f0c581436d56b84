//! Looks at frames of neighbours: with the device's own model, one that is kept for them, or one that runs in parts.

use std::{
    path::{Path, PathBuf},
    sync::{Arc, OnceLock},
    time::Duration,
};

use libp2p::futures::{AsyncRead, AsyncReadExt, AsyncWrite};
use mesh_core::{
    Digest,
    offload::{MAX_OFFERS, Offer, serve::Refusal},
};
use models::{Bundle, Engine, self_test};
use tokio::{sync::watch, time::timeout};

use super::{
    courier::Roads,
    offer_of,
    picture::fits,
    split::Leader,
    wire::{self, Question, Reply, WireError},
    work::{Output, Work, Worker, left_ms},
};
use crate::{agent, update::Engines};

/// Who opens a stream and does not ask, or does not take the answer.
const PATIENCE: Duration = Duration::from_secs(2);
/// Deadlines beyond it are cut: whoever waits so long holds a place and memory.
const MAX_DEADLINE_MS: u32 = 10_000;

/// The models that neighbours may use.
pub(crate) struct Models<R> {
    /// The device's own, where they may.
    pub(crate) own: Option<watch::Receiver<Engines>>,
    /// The bundle that is kept for them.
    pub(crate) kept: Option<PathBuf>,
    /// One that runs in parts.
    pub(crate) split: Option<Arc<Leader<R>>>,
}

/// Answers neighbours.
pub(crate) struct Server<R> {
    worker: Arc<Worker>,
    own: Option<watch::Receiver<Engines>>,
    /// The kept one, once it is loaded.
    kept: Arc<OnceLock<Arc<Engine>>>,
    split: Option<Arc<Leader<R>>>,
}

/// What looks at a picture.
enum Eye<'a, R> {
    Whole(Arc<Engine>),
    Split(&'a Leader<R>),
}

impl<R: Roads> Server<R> {
    /// Begins to load the kept model.
    ///
    /// # Errors
    /// In words, if there is no thread to be had.
    pub(crate) fn start(worker: Arc<Worker>, models: Models<R>) -> Result<Self, String> {
        let Models { own, kept, split } = models;
        let loaded = Arc::new(OnceLock::new());
        if let Some(folder) = kept {
            let (worker, loaded) = (Arc::clone(&worker), Arc::clone(&loaded));
            let run = move || match load(&folder) {
                Ok((engine, ms)) => {
                    if let Some(offer) = offer_of(engine.manifest()) {
                        worker.measured(offer.digest, ms);
                    }
                    tracing::info!(
                        model = engine.id(),
                        ms,
                        "neighbours are answered with a model"
                    );
                    let _ = loaded.set(engine);
                }
                Err(why) => tracing::error!(
                    "neighbours are not answered with {}: {why}",
                    folder.display()
                ),
            };
            // It ends by itself, and nobody waits for it.
            agent::thread("offload-load", run).map_err(|error| error.to_string())?;
        }
        Ok(Self {
            worker,
            own,
            kept: loaded,
            split,
        })
    }

    /// Serves one stream to its end.
    pub(crate) async fn serve(&self, stream: impl AsyncRead + AsyncWrite + Unpin) {
        let (mut from, mut to) = stream.split();
        let answered = async {
            let question = timeout(PATIENCE, wire::question(&mut from)).await;
            let reply = match question.map_err(|_| slow())?? {
                Question::Offers => Reply::Offers(self.offers()),
                Question::Run {
                    model,
                    deadline_ms,
                    bytes,
                } => self
                    .look(&mut from, model, deadline_ms, bytes)
                    .await
                    .unwrap_or_else(Reply::Refused),
            };
            let numbers = &self.worker.counters.offload;
            match &reply {
                Reply::Answer(_) => numbers.served.add(1),
                Reply::Refused(_) => numbers.turned_away.add(1),
                Reply::Offers(_) => {}
            }
            let said = timeout(PATIENCE, wire::reply(&mut to, &reply)).await;
            said.map_err(|_| slow())?
        };
        if let Err(error) = answered.await {
            tracing::debug!("a neighbour's question came to nothing: {error}");
        }
    }

    fn engines(&self) -> impl Iterator<Item = Arc<Engine>> {
        let own = self.own.as_ref();
        let own = own.and_then(|own| own.borrow().active.clone());
        own.into_iter().chain(self.kept.get().cloned())
    }

    fn offers(&self) -> Vec<Offer> {
        let whole = self
            .engines()
            .filter_map(|engine| offer_of(engine.manifest()));
        let split = self.split.iter().filter_map(|leader| leader.offer());
        whole.chain(split).take(MAX_OFFERS).collect()
    }

    /// Who has the model, and what one frame costs this device: measured, or what is expected.
    fn find(&self, model: &Digest) -> Result<(Eye<'_, R>, u32), Refusal> {
        let is = |engine: &Arc<Engine>| {
            offer_of(engine.manifest()).is_some_and(|offer| offer.digest == *model)
        };
        if let Some(engine) = self.engines().find(is) {
            let allowed = engine.manifest().budget.latency_ms;
            let cost = self.worker.cost(model, allowed.into());
            return Ok((Eye::Whole(engine), cost));
        }
        let leads =
            |leader: &&Arc<Leader<R>>| leader.offer().is_some_and(|offer| offer.digest == *model);
        let leader = self.split.as_ref().filter(leads);
        let leader = leader.ok_or(Refusal::NoSuchModel)?;
        Ok((Eye::Split(leader), leader.cost_ms(&self.worker)))
    }

    async fn look(
        &self,
        from: &mut (impl AsyncRead + Unpin),
        model: Digest,
        deadline_ms: u32,
        bytes: u32,
    ) -> Result<Reply, Refusal> {
        let deadline_ms = deadline_ms.min(MAX_DEADLINE_MS);
        let until = tokio::time::Instant::now() + Duration::from_millis(deadline_ms.into());
        let (eye, cost_ms) = self.find(&model)?;
        self.worker.may(cost_ms, deadline_ms)?;
        let picture = tokio::time::timeout_at(until, wire::picture(from, bytes)).await;
        let picture = picture
            .map_err(|_| Refusal::TooLate)?
            .map_err(|_| Refusal::BadPicture)?;
        if !fits(&picture) {
            return Err(Refusal::BadPicture);
        }
        if left_ms(until) == 0 {
            return Err(Refusal::TooLate);
        }
        match eye {
            Eye::Whole(engine) => {
                let work = Work::Picture { engine, picture };
                match self.worker.run(model, cost_ms, until, work).await? {
                    Output::Answer(answer) => Ok(Reply::Answer(answer)),
                    Output::Values(_) => Err(Refusal::Failed),
                }
            }
            Eye::Split(leader) => {
                let answer = leader.look(&self.worker, picture.into(), until).await?;
                Ok(Reply::Answer(answer))
            }
        }
    }
}

pub(super) fn slow() -> WireError {
    std::io::Error::from(std::io::ErrorKind::TimedOut).into()
}

/// The model of a bundle, tried, and how many milliseconds of the processor one frame takes.
fn load(folder: &Path) -> Result<(Arc<Engine>, u32), String> {
    let bundle = Bundle::open(folder).map_err(|error| error.to_string())?;
    let engine = Engine::load(&bundle).map_err(|error| error.to_string())?;
    let test = self_test(&bundle, &engine);
    // What it takes is measured anew with each frame; a device that starts is busy.
    if test.golden.iter().any(|golden| !golden.problems.is_empty()) {
        return Err(format!("its self-test failed:\n{test}"));
    }
    if offer_of(engine.manifest()).is_none() {
        return Err("it is no model with labels".into());
    }
    let ms = test.latency_ms.unwrap_or(bundle.manifest.budget.latency_ms);
    // Saturates.
    Ok((Arc::new(engine), ms.ceil() as u32))
}
