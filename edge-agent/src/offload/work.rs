//! The thread that works for neighbours, within the share of the device's time that they may have.

use std::{
    collections::BTreeMap,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        mpsc::{Receiver, SyncSender, sync_channel},
    },
    time::Duration,
};

use mesh_core::{
    Digest,
    offload::{
        Answer,
        serve::{Admission, Condition, MAX_WAITING, Refusal},
    },
};
use models::{Engine, Outcome, Part, Preparer};
use tokio::{sync::oneshot, time::Instant};

use super::{OffloadConfig, Pressure, Thermometer};
use crate::{
    agent,
    clock::Monotonic,
    counters::Counters,
    update::{self, thread_time},
};

/// How often it is looked whether the device's own frame is done.
const TURN: Duration = Duration::from_millis(2);
/// Kinds of work whose costs are known: more than the models and parts that a device has at a time.
const MAX_COSTS: usize = 16;

/// What is done for somebody else.
pub(super) enum Work {
    /// A picture, by a whole model.
    Picture {
        engine: Arc<Engine>,
        picture: Vec<u8>,
    },
    /// A picture, by the first part of a model.
    First {
        front: Arc<Front>,
        picture: Arc<[u8]>,
    },
    /// Values, by another part.
    Part { part: Arc<Part>, values: Vec<f32> },
}

/// What runs on the device that has the picture.
pub(super) struct Front {
    pub(super) preparer: Preparer,
    pub(super) part: Part,
}

/// What came of it.
pub(super) enum Output {
    Answer(Answer),
    Values(Vec<Vec<f32>>),
}

/// Work that waits for its turn.
struct Job {
    work: Work,
    kind: Digest,
    until: Instant,
    seat: Seat,
    back: oneshot::Sender<Result<Output, Refusal>>,
}

/// What is known of the costs: milliseconds of the processor for one piece of work of a kind.
#[derive(Debug, Default)]
struct Costs(BTreeMap<Digest, u32>);

impl Costs {
    fn measured(&mut self, kind: Digest, ms: u32) {
        // A frame of an hour is as good as one for ever.
        let ms = ms.min(3_600_000);
        if !self.0.contains_key(&kind) && self.0.len() >= MAX_COSTS {
            // Models that were replaced in the meantime.
            self.0.clear();
        }
        let cost = self.0.entry(kind).or_insert(ms);
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
    pressure: Pressure,
    hot_c: i8,
    clock: Monotonic,
}

/// Something that was admitted, until it is done or given up.
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

    fn condition(&self, inner: &mut Inner) -> Condition {
        let warmth = inner.thermometer.read(self.clock.now_ms());
        Condition {
            behind: self.pressure.is_behind(),
            hot: warmth.is_some_and(|warmth| warmth >= self.hot_c),
        }
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

/// Whole milliseconds until a moment.
pub(super) fn left_ms(until: Instant) -> u32 {
    let left = until.saturating_duration_since(Instant::now());
    u32::try_from(left.as_millis()).unwrap_or(u32::MAX)
}

/// Does what neighbours ask for, one after the other. Its thread ends with it.
pub(crate) struct Worker {
    shared: Arc<Shared>,
    jobs: SyncSender<Job>,
    /// Of the device's time, what others may have.
    pub(super) share: f32,
    pub(super) counters: Counters,
}

impl Worker {
    /// Starts its thread.
    ///
    /// # Errors
    /// In words, if there is no thread to be had.
    pub(crate) fn start(
        config: &OffloadConfig,
        pressure: Pressure,
        counters: Counters,
    ) -> Result<Arc<Self>, String> {
        let clock = Monotonic::start();
        let (jobs, waiting) = sync_channel(MAX_WAITING);
        let shared = Arc::new(Shared {
            inner: Mutex::new(Inner {
                admission: Admission::new(config.time_share, clock.now_ms()),
                costs: Costs::default(),
                thermometer: Thermometer::default(),
            }),
            pressure,
            hot_c: config.hot_c,
            clock,
        });
        let thread = Arc::clone(&shared);
        // It ends with the worker, and nobody waits for it.
        agent::thread("offload", move || work_on_all(&thread, &waiting))
            .map_err(|error| error.to_string())?;
        Ok(Arc::new(Self {
            shared,
            jobs,
            share: config.time_share,
            counters,
        }))
    }

    /// What is known of the cost of such work in milliseconds, or else what is expected.
    pub(super) fn cost(&self, kind: &Digest, expected_ms: f64) -> u32 {
        let known = self.shared.lock().costs.0.get(kind).copied();
        // Saturates; what is expected is a positive number.
        known.unwrap_or(expected_ms.ceil() as u32).max(1)
    }

    /// The cost of such work was measured.
    pub(super) fn measured(&self, kind: Digest, ms: u32) {
        self.shared.lock().costs.measured(kind, ms);
    }

    /// Would it be taken? Asked before the work itself is read.
    ///
    /// # Errors
    /// Why not.
    pub(super) fn may(&self, cost_ms: u32, deadline_ms: u32) -> Result<(), Refusal> {
        let mut inner = self.shared.lock();
        let condition = self.shared.condition(&mut inner);
        let now_ms = self.shared.clock.now_ms();
        inner.admission.may(cost_ms, deadline_ms, condition, now_ms)
    }

    /// Works, if it is admitted, and waits for what comes of it.
    ///
    /// # Errors
    /// Why nothing comes of it.
    pub(super) async fn run(
        &self,
        kind: Digest,
        cost_ms: u32,
        until: Instant,
        work: Work,
    ) -> Result<Output, Refusal> {
        let seat = self.shared.admit(cost_ms, left_ms(until))?;
        let (back, done) = oneshot::channel();
        let job = Job {
            work,
            kind,
            until,
            seat,
            back,
        };
        self.jobs.try_send(job).map_err(|_| Refusal::Full)?;
        match tokio::time::timeout_at(until, done).await {
            Ok(Ok(done)) => done,
            Ok(Err(_)) => Err(Refusal::Failed),
            Err(_) => Err(Refusal::TooLate),
        }
    }

    /// Prepares something for others, on a thread of its own. How long that takes nobody knows before: it begins where
    /// anything is left of the share, and what it took has to be earned before others get more.
    ///
    /// # Errors
    /// Why nothing comes of it.
    pub(super) async fn prepare<T: Send + 'static>(
        &self,
        act: impl FnOnce() -> T + Send + 'static,
    ) -> Result<T, Refusal> {
        let mut seat = self.shared.admit(1, u32::MAX)?;
        let done = tokio::task::spawn_blocking(move || {
            let before = thread_time();
            let done = act();
            let used = thread_time().saturating_sub(before);
            seat.used_ms = u32::try_from(used.as_millis() + 1).unwrap_or(u32::MAX);
            drop(seat);
            done
        });
        done.await.map_err(|_| Refusal::Failed)
    }
}

/// Works on what comes until nothing can come any more. Blocks: it has a thread of its own.
fn work_on_all(shared: &Arc<Shared>, waiting: &Receiver<Job>) {
    while let Ok(job) = waiting.recv() {
        let Job {
            work,
            kind,
            until,
            mut seat,
            back,
        } = job;
        // The device's own frames come first.
        while shared.pressure.is_looking() && Instant::now() < until {
            std::thread::park_timeout(TURN);
        }
        let cost = Duration::from_millis(seat.cost_ms.into());
        let done = if back.is_closed() || Instant::now() + cost > until {
            Err(Refusal::TooLate)
        } else {
            let before = thread_time();
            let done = work_on(work);
            let used = thread_time().saturating_sub(before);
            seat.used_ms = u32::try_from(used.as_millis() + 1).unwrap_or(u32::MAX);
            if done.is_ok() {
                shared.lock().costs.measured(kind, seat.used_ms);
            }
            done
        };
        drop(seat);
        let _ = back.send(done);
    }
}

/// Decodes what somebody else has sent, without being taken along by it.
fn decoded<T, E>(decode: impl FnOnce() -> Result<T, E>) -> Result<T, Refusal> {
    match catch_unwind(AssertUnwindSafe(decode)) {
        Ok(Ok(input)) => Ok(input),
        Ok(Err(_)) | Err(_) => Err(Refusal::BadPicture),
    }
}

fn work_on(work: Work) -> Result<Output, Refusal> {
    let failed = |error: String| {
        tracing::warn!("work for a neighbour: {error}");
        Refusal::Failed
    };
    match work {
        Work::Picture { engine, picture } => {
            let input = decoded(|| engine.tensor_from_bytes(&picture))?;
            let ran = update::run(&engine, &input);
            let (outcome, _) = ran.map_err(|error| failed(error.to_string()))?;
            Ok(Output::Answer(answer(engine.id(), outcome)))
        }
        Work::First { front, picture } => {
            let input = decoded(|| front.preparer.tensor_from_bytes(&picture))?;
            let ran = front.part.run(input.values().to_vec());
            ran.map(Output::Values)
                .map_err(|error| failed(error.to_string()))
        }
        Work::Part { part, values } => part
            .run(values)
            .map(Output::Values)
            .map_err(|error| failed(error.to_string())),
    }
}

/// What a model has said, for others.
pub(super) fn answer(model: &str, outcome: Outcome) -> Answer {
    Answer {
        model: model.to_owned(),
        label: outcome.label,
        score: outcome.score.clamp(0.0, 1.0),
        margin: outcome.margin.clamp(0.0, 1.0),
    }
}
