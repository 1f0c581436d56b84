//! Looks at frames of neighbours, within the share of its time that they may have.

use std::{
    collections::BTreeMap,
    panic::{AssertUnwindSafe, catch_unwind},
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, MutexGuard, OnceLock, PoisonError,
        mpsc::{Receiver, SyncSender, sync_channel},
    },
    time::Duration,
};

use libp2p::futures::{AsyncRead, AsyncReadExt, AsyncWrite};
use mesh_core::{
    Digest,
    offload::{
        Answer, MAX_OFFERS, Offer,
        serve::{Admission, Condition, MAX_WAITING, Refusal},
    },
};
use models::{Bundle, Engine, self_test};
use tokio::{
    sync::{oneshot, watch},
    time::timeout,
};

use super::{
    OffloadConfig, Pressure, Thermometer, offer_of,
    picture::fits,
    wire::{self, Question, Reply, WireError},
};
use crate::{
    agent,
    clock::Monotonic,
    counters::Counters,
    update::{self, Engines, thread_time},
};

/// Who opens a stream and does not ask, or does not take the answer.
const PATIENCE: Duration = Duration::from_secs(2);
/// Deadlines beyond it are cut: whoever waits so long holds a place and memory.
const MAX_DEADLINE_MS: u32 = 10_000;
/// How often it is looked whether the device's own frame is done.
const TURN: Duration = Duration::from_millis(2);

/// The models that neighbours may use.
#[derive(Clone, Debug)]
pub(crate) struct Models {
    /// The device's own, where they may.
    pub(crate) own: Option<watch::Receiver<Engines>>,
    /// The bundle that is kept for them.
    pub(crate) kept: Option<PathBuf>,
}

/// A frame of a neighbour that waits for its turn.
struct Job {
    engine: Arc<Engine>,
    model: Digest,
    picture: Vec<u8>,
    until: tokio::time::Instant,
    seat: Seat,
    back: oneshot::Sender<Reply>,
}

/// What is known of the models' costs: milliseconds of the processor for one frame.
#[derive(Debug, Default)]
struct Costs(BTreeMap<Digest, u32>);

impl Costs {
    fn measured(&mut self, model: Digest, ms: u32) {
        // A frame of an hour is as good as one for ever.
        let ms = ms.min(3_600_000);
        if !self.0.contains_key(&model) && self.0.len() >= MAX_OFFERS {
            // Models that were replaced in the meantime.
            self.0.clear();
        }
        let cost = self.0.entry(model).or_insert(ms);
        *cost = (*cost * 7 + ms).div_ceil(8);
    }
}

struct Inner {
    admission: Admission,
    costs: Costs,
    thermometer: Thermometer,
}

struct Shared {
    inner: Mutex<Inner>,
    own: Option<watch::Receiver<Engines>>,
    /// The kept one, once it is loaded.
    kept: OnceLock<Arc<Engine>>,
    pressure: Pressure,
    hot_c: i8,
    clock: Monotonic,
    counters: Counters,
}

/// Answers neighbours. Its thread ends with it.
pub(crate) struct Server {
    shared: Arc<Shared>,
    jobs: SyncSender<Job>,
}

/// A frame that was admitted, until it is done or given up.
struct Seat {
    shared: Arc<Shared>,
    cost_ms: u32,
    used_ms: u32,
}

impl Drop for Seat {
    fn drop(&mut self) {
        let mut inner = self.shared.lock();
        inner.admission.done(self.cost_ms, self.used_ms);
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn engines(&self) -> impl Iterator<Item = Arc<Engine>> {
        let own = self.own.as_ref();
        let own = own.and_then(|own| own.borrow().active.clone());
        own.into_iter().chain(self.kept.get().cloned())
    }

    /// The model, and what one frame costs: measured, or what its bundle allows.
    fn find(&self, model: &Digest) -> Result<(Arc<Engine>, u32), Refusal> {
        let is =
            |engine: &Arc<Engine>| offer_of(engine).is_some_and(|offer| offer.digest == *model);
        let engine = self.engines().find(is).ok_or(Refusal::NoSuchModel)?;
        let cost = self.lock().costs.0.get(model).copied();
        // Saturates; a budget is a positive number.
        let allowed = engine.manifest().budget.latency_ms.ceil() as u32;
        Ok((engine, cost.unwrap_or(allowed).max(1)))
    }

    fn condition(&self, inner: &mut Inner) -> Condition {
        let warmth = inner.thermometer.read(self.clock.now_ms());
        Condition {
            behind: self.pressure.is_behind(),
            hot: warmth.is_some_and(|warmth| warmth >= self.hot_c),
        }
    }

    /// Would a frame be taken? Asked before its picture is read.
    fn may(&self, cost_ms: u32, deadline_ms: u32) -> Result<(), Refusal> {
        let mut inner = self.lock();
        let condition = self.condition(&mut inner);
        let now_ms = self.clock.now_ms();
        inner.admission.may(cost_ms, deadline_ms, condition, now_ms)
    }

    fn admit(self: &Arc<Self>, cost_ms: u32, deadline_ms: u32) -> Result<Seat, Refusal> {
        let mut inner = self.lock();
        let condition = self.condition(&mut inner);
        let now_ms = self.clock.now_ms();
        inner
            .admission
            .admit(cost_ms, deadline_ms, condition, now_ms)?;
        Ok(Seat {
            shared: Arc::clone(self),
            cost_ms,
            used_ms: 0,
        })
    }
}

impl Server {
    /// Starts its thread, which loads the kept model first.
    ///
    /// # Errors
    /// In words, if there is no thread to be had.
    pub(crate) fn start(
        config: &OffloadConfig,
        models: Models,
        pressure: Pressure,
        counters: Counters,
    ) -> Result<Self, String> {
        let clock = Monotonic::start();
        let (jobs, waiting) = sync_channel(MAX_WAITING);
        let Models { own, kept } = models;
        let shared = Arc::new(Shared {
            inner: Mutex::new(Inner {
                admission: Admission::new(config.time_share, clock.now_ms()),
                costs: Costs::default(),
                thermometer: Thermometer::default(),
            }),
            own,
            kept: OnceLock::new(),
            pressure,
            hot_c: config.hot_c,
            clock,
            counters,
        });
        let work = Arc::clone(&shared);
        let run = move || {
            if let Some(folder) = kept {
                match load(&folder) {
                    Ok((engine, ms)) => {
                        if let Some(offer) = offer_of(&engine) {
                            work.lock().costs.measured(offer.digest, ms);
                        }
                        tracing::info!(
                            model = engine.id(),
                            ms,
                            "neighbours are answered with a model"
                        );
                        let _ = work.kept.set(engine);
                    }
                    Err(why) => tracing::error!(
                        "neighbours are not answered with {}: {why}",
                        folder.display()
                    ),
                }
            }
            look_at_all(&work, &waiting);
        };
        // It ends with the server, and nobody waits for it.
        agent::thread("offload", run).map_err(|error| error.to_string())?;
        Ok(Self { shared, jobs })
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
            match &reply {
                Reply::Answer(_) => self.shared.counters.offload.served.add(1),
                Reply::Refused(_) => self.shared.counters.offload.turned_away.add(1),
                Reply::Offers(_) => {}
            }
            let said = timeout(PATIENCE, wire::reply(&mut to, &reply)).await;
            said.map_err(|_| slow())?
        };
        if let Err(error) = answered.await {
            tracing::debug!("a neighbour's question came to nothing: {error}");
        }
    }

    fn offers(&self) -> Vec<Offer> {
        let all = self.shared.engines().filter_map(|engine| offer_of(&engine));
        all.take(MAX_OFFERS).collect()
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
        let (engine, cost_ms) = self.shared.find(&model)?;
        self.shared.may(cost_ms, deadline_ms)?;
        let picture = tokio::time::timeout_at(until, wire::picture(from, bytes)).await;
        let picture = picture
            .map_err(|_| Refusal::TooLate)?
            .map_err(|_| Refusal::BadPicture)?;
        if !fits(&picture) {
            return Err(Refusal::BadPicture);
        }
        let left = until.saturating_duration_since(tokio::time::Instant::now());
        let left_ms = u32::try_from(left.as_millis()).unwrap_or(deadline_ms);
        let seat = self.shared.admit(cost_ms, left_ms)?;
        let (back, reply) = oneshot::channel();
        let job = Job {
            engine,
            model,
            picture,
            until,
            seat,
            back,
        };
        self.jobs.try_send(job).map_err(|_| Refusal::Full)?;
        match tokio::time::timeout_at(until, reply).await {
            Ok(Ok(reply)) => Ok(reply),
            Ok(Err(_)) => Err(Refusal::Failed),
            Err(_) => Err(Refusal::TooLate),
        }
    }
}

fn slow() -> WireError {
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
    if offer_of(&engine).is_none() {
        return Err("it is no model with labels".into());
    }
    let ms = test.latency_ms.unwrap_or(bundle.manifest.budget.latency_ms);
    // Saturates.
    Ok((Arc::new(engine), ms.ceil() as u32))
}

/// Looks at what comes until nobody can come any more. Blocks: it has a thread of its own.
fn look_at_all(shared: &Arc<Shared>, waiting: &Receiver<Job>) {
    while let Ok(job) = waiting.recv() {
        let Job {
            engine,
            model,
            picture,
            until,
            mut seat,
            back,
        } = job;
        // The device's own frames come first.
        while shared.pressure.is_looking() && tokio::time::Instant::now() < until {
            std::thread::park_timeout(TURN);
        }
        let cost = Duration::from_millis(seat.cost_ms.into());
        let reply = if back.is_closed() || tokio::time::Instant::now() + cost > until {
            Reply::Refused(Refusal::TooLate)
        } else {
            let before = thread_time();
            let reply = look_at(&engine, &picture);
            let used = thread_time().saturating_sub(before);
            seat.used_ms = u32::try_from(used.as_millis() + 1).unwrap_or(u32::MAX);
            if matches!(reply, Reply::Answer(_)) {
                shared.lock().costs.measured(model, seat.used_ms);
            }
            reply
        };
        drop(seat);
        let _ = back.send(reply);
    }
}

fn look_at(engine: &Engine, picture: &[u8]) -> Reply {
    let decoded = catch_unwind(AssertUnwindSafe(|| engine.tensor_from_bytes(picture)));
    let Ok(Ok(input)) = decoded else {
        return Reply::Refused(Refusal::BadPicture);
    };
    match update::run(engine, &input) {
        Ok((outcome, _)) => Reply::Answer(Answer {
            model: engine.id().to_owned(),
            label: outcome.label,
            score: outcome.score.clamp(0.0, 1.0),
            margin: outcome.margin.clamp(0.0, 1.0),
        }),
        Err(error) => {
            tracing::warn!("a neighbour's frame: {error}");
            Reply::Refused(Refusal::Failed)
        }
    }
}
