//! Leads a model through its parts: sends frames through as [`super::planner`] has planned, and tells it who fails.

use std::{
    collections::BTreeMap,
    path::PathBuf,
    sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError},
    time::Duration,
};

use mesh_core::{
    Digest,
    offload::{Answer, Offer, serve::Refusal},
    roster::Peer,
    split::{Board, Stage},
};
use models::{Manifest, Span, outcome_of};
use tokio::{
    sync::{mpsc, watch},
    time::{Instant, sleep, timeout, timeout_at},
};

use super::{
    super::{
        courier::Roads,
        work::{Front, Output, Work, Worker, answer, left_ms},
    },
    Source,
    lend::WEIGHED,
    planner::Planner,
    wire::{self, PART, Question, Reply},
};

/// For a neighbour to say what it lends.
const PATIENCE: Duration = Duration::from_secs(2);
/// Bytes of a value.
pub(super) const BYTES: usize = size_of::<f32>();
/// Who has something else to do just now is asked again after this, for as long as the frame has time …
const PAUSE: Duration = Duration::from_millis(50);
/// … and is left for others if it has done nothing else for this long: half of what a share of time can save up.
const REFUSING: Duration = Duration::from_secs(5);
/// What counts of the newest measurement.
const NEWEST: f64 = 0.1;
/// Failures that wait to be heard of.
const FAILURES: usize = 16;

/// A part on another device.
pub(super) struct Remote {
    pub(super) peer: Peer,
    pub(super) span: Span,
    pub(super) operations: u64,
    pub(super) patience: Duration,
}

/// A plan that everybody has loaded.
pub(super) struct Live {
    pub(super) front: Arc<Front>,
    pub(super) kind: Digest,
    pub(super) expected_ms: f64,
    pub(super) others: Vec<Remote>,
    pub(super) stages: Vec<Stage>,
    pub(super) peers: Vec<Option<Peer>>,
}

/// What was measured under way.
#[derive(Default)]
pub(super) struct Measured {
    pub(super) road: Option<f64>,
    pub(super) speeds: BTreeMap<Peer, f64>,
    /// Who does nothing but refuse: since when, and when last.
    refusing: BTreeMap<Peer, (Instant, Instant)>,
}

impl Measured {
    /// So many bytes were so many microseconds under way.
    fn way(&mut self, bytes: usize, us: f64) {
        let newest = bytes as f64 / us.max(1.0);
        self.road = Some(
            self.road
                .map_or(newest, |known| known + NEWEST * (newest - known)),
        );
    }

    /// Somebody has something else to do; has it had that for too long?
    fn refused(&mut self, peer: Peer, now: Instant) -> bool {
        let (since, last) = self.refusing.entry(peer).or_insert((now, now));
        if now.duration_since(*last) > REFUSING {
            *since = now;
        }
        *last = now;
        let is_long = now.duration_since(*since) > REFUSING;
        if is_long {
            self.refusing.remove(&peer);
        }
        is_long
    }
}

/// Is it over in a moment? Then it says nothing about whether somebody is of use.
pub(super) const fn is_momentary(why: Refusal) -> bool {
    matches!(why, Refusal::ShareUsed | Refusal::Full | Refusal::Busy)
}

/// What this device gives to its own part.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Terms {
    /// Bytes of weights, at most.
    pub(crate) room: u64,
    /// Of its time, at most.
    pub(crate) share: f64,
}

/// Leads one model.
pub(crate) struct Leader<R> {
    pub(super) folder: PathBuf,
    pub(super) terms: Terms,
    pub(super) roads: R,
    pub(super) offer: OnceLock<Offer>,
    pub(super) source: OnceLock<Source>,
    pub(super) live: watch::Sender<Option<Arc<Live>>>,
    failed: mpsc::Sender<Peer>,
    measured: Mutex<Measured>,
}

/// Why a frame did not get through.
enum Stuck {
    /// Because of this neighbour.
    With(Peer),
    /// Because of this device.
    Here(Refusal),
}

impl<R: Roads> Leader<R> {
    /// Of the model in `folder`.
    pub(crate) fn new(folder: PathBuf, terms: Terms, roads: R) -> (Arc<Self>, Planner<R>) {
        let (failed, failures) = mpsc::channel(FAILURES);
        let leader = Arc::new(Self {
            folder,
            terms,
            roads,
            offer: OnceLock::new(),
            source: OnceLock::new(),
            live: watch::Sender::new(None),
            failed,
            measured: Mutex::default(),
        });
        let planner = Planner {
            leader: Arc::clone(&leader),
            failures,
        };
        (leader, planner)
    }

    /// What it answers with, once it can.
    pub(crate) fn offer(&self) -> Option<Offer> {
        self.live.borrow().as_ref()?;
        self.offer.get().cloned()
    }

    /// What a frame costs this device.
    pub(crate) fn cost_ms(&self, worker: &Worker) -> u32 {
        let live = self.live.borrow();
        let (kind, expected_ms) = live
            .as_ref()
            .map_or((Digest([0; 32]), 1.0), |live| (live.kind, live.expected_ms));
        worker.cost(&kind, expected_ms)
    }

    /// Sends a picture through all parts; through those of another plan if somebody fails and there is one in time.
    ///
    /// # Errors
    /// Why there is no answer.
    pub(crate) async fn look(
        &self,
        worker: &Worker,
        picture: Arc<[u8]>,
        until: Instant,
    ) -> Result<Answer, Refusal> {
        let source = self.source.get().ok_or(Refusal::NoSuchModel)?;
        let mut plans = self.live.subscribe();
        loop {
            let live = plans.borrow_and_update().clone();
            if let Some(live) = live {
                match self
                    .through(worker, &live, Arc::clone(&picture), until)
                    .await
                {
                    Ok(outputs) => {
                        let outcome = outcome_of(&source.manifest, outputs);
                        let outcome = outcome.map_err(|_| Refusal::Failed)?;
                        return Ok(answer(&source.manifest.id(), outcome));
                    }
                    Err(Stuck::Here(why)) => return Err(why),
                    Err(Stuck::With(peer)) => {
                        worker.counters.offload.replaced.add(1);
                        // Somebody has said so already where there is no room.
                        let _ = self.failed.try_send(peer);
                    }
                }
            }
            match timeout_at(until, plans.changed()).await {
                Ok(Ok(())) => {}
                Ok(Err(_)) | Err(_) => return Err(Refusal::TooLate),
            }
        }
    }

    async fn through(
        &self,
        worker: &Worker,
        live: &Live,
        picture: Arc<[u8]>,
        until: Instant,
    ) -> Result<Vec<Vec<f32>>, Stuck> {
        let cost_ms = worker.cost(&live.kind, live.expected_ms);
        let work = Work::First {
            front: Arc::clone(&live.front),
            picture,
        };
        let first = worker.run(live.kind, cost_ms, until, work).await;
        let Output::Values(mut values) = first.map_err(Stuck::Here)? else {
            return Err(Stuck::Here(Refusal::Failed));
        };
        for remote in &live.others {
            let [value] = values.as_slice() else {
                return Err(Stuck::Here(Refusal::Failed));
            };
            values = self.next(remote, value, until).await?;
        }
        Ok(values)
    }

    /// One part on another device, which may have something else to do for a moment.
    async fn next(
        &self,
        remote: &Remote,
        value: &[f32],
        until: Instant,
    ) -> Result<Vec<Vec<f32>>, Stuck> {
        loop {
            let why = match self.ask(remote, value, until).await? {
                Ok(outputs) => {
                    self.measured().refusing.remove(&remote.peer);
                    return Ok(outputs);
                }
                Err(why) => why,
            };
            let now = Instant::now();
            if self.measured().refused(remote.peer, now) {
                tracing::info!(peer = %remote.peer, "a neighbour has something else to do: {}", why.as_str());
                return Err(Stuck::With(remote.peer));
            }
            if now + PAUSE >= until {
                return Err(Stuck::Here(why));
            }
            sleep(PAUSE).await;
        }
    }

    /// What comes out of it, or why it does not do it just now.
    async fn ask(
        &self,
        remote: &Remote,
        value: &[f32],
        until: Instant,
    ) -> Result<Result<Vec<Vec<f32>>, Refusal>, Stuck> {
        let stuck = || Stuck::With(remote.peer);
        let source = self.source.get().ok_or(Stuck::Here(Refusal::NoSuchModel))?;
        if left_ms(until) == 0 {
            return Err(Stuck::Here(Refusal::TooLate));
        }
        let question = Question::Run {
            model: source.digest,
            span: remote.span.clone(),
            deadline_ms: left_ms(until),
            values: u32::try_from(value.len()).unwrap_or(u32::MAX),
        };
        let begin = Instant::now();
        let patience = until.min(begin + remote.patience);
        let asked = async {
            let stream = self.roads.open(remote.peer, PART).await?;
            let replied = wire::ask(stream, &question, value).await;
            replied.map_err(|error| error.to_string())
        };
        let (us, outputs) = match timeout_at(patience, asked).await {
            Ok(Ok((Reply::Values { us, .. }, outputs))) => (us, outputs),
            Ok(Ok((Reply::Refused(why), _))) if is_momentary(why) => return Ok(Err(why)),
            Ok(Ok((reply, _))) => {
                tracing::info!(peer = %remote.peer, "a neighbour does not run its part: {reply:?}");
                return Err(stuck());
            }
            Ok(Err(why)) => {
                tracing::info!(peer = %remote.peer, "a neighbour's part: {why}");
                return Err(stuck());
            }
            // The frame's own deadline says nothing about the neighbour.
            Err(_) if patience == until => return Err(Stuck::Here(Refusal::TooLate)),
            Err(_) => {
                tracing::info!(peer = %remote.peer, "a neighbour's part takes too long");
                return Err(stuck());
            }
        };
        let finite = outputs.iter().flatten().all(|value| value.is_finite());
        let sizes = outputs.iter().map(Vec::len);
        let fits = match &remote.span.to {
            Some(cut) => sizes.eq(cut.elements()),
            None => sizes.eq(outputs_of(&source.manifest)),
        };
        if !finite || !fits {
            tracing::warn!(peer = %remote.peer, "a neighbour's part gives what no model gives");
            return Err(stuck());
        }
        let bytes = BYTES * (value.len() + outputs.iter().map(Vec::len).sum::<usize>());
        self.measure(remote, us, begin.elapsed(), bytes);
        Ok(Ok(outputs))
    }

    pub(super) fn measured(&self) -> MutexGuard<'_, Measured> {
        self.measured.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn measure(&self, remote: &Remote, us: u64, whole: Duration, bytes: usize) {
        let mut measured = self.measured();
        measured.way(bytes, whole.as_secs_f64() * 1e6 - us as f64);
        let speed = remote.operations as f64 / (us as f64).max(1.0);
        let known = measured.speeds.entry(remote.peer).or_insert(speed);
        *known += NEWEST * (speed - *known);
    }

    /// What a neighbour would run parts of this model with, after a look at the way to it.
    pub(super) async fn lends(&self, peer: Peer, model: Digest) -> Option<Board> {
        let ask = async |question: Question, values: &[f32]| {
            let asked = async {
                let stream = self.roads.open(peer, PART).await?;
                let replied = wire::ask(stream, &question, values).await;
                replied.map_err(|error| error.to_string())
            };
            let replied = timeout(PATIENCE, asked).await;
            replied.unwrap_or_else(|_| Err("it takes too long".to_owned()))
        };
        let board = match ask(Question::Lend { model }, &[]).await {
            Ok((Reply::Lent { speed, room, share }, _)) => Board { speed, room, share },
            other => {
                tracing::debug!(%peer, "a neighbour does not lend: {other:?}");
                return None;
            }
        };
        if !board.is_sound() {
            tracing::debug!(%peer, "a neighbour lends what there cannot be: {board:?}");
            return None;
        }
        let values = vec![0.0; WEIGHED as usize];
        let begin = Instant::now();
        match ask(Question::Weigh { values: WEIGHED }, &values).await {
            Ok((Reply::Values { .. }, _)) => {
                let us = begin.elapsed().as_secs_f64() * 1e6;
                self.measured().way(BYTES * values.len(), us);
                Some(board)
            }
            other => {
                tracing::debug!(%peer, "the way to a neighbour: {other:?}");
                None
            }
        }
    }
}

/// How many values a model's outputs have, in their order.
fn outputs_of(manifest: &Manifest) -> impl Iterator<Item = usize> {
    let output = &manifest.output;
    let scores = output.scores.iter().map(|_| output.labels.len());
    scores.chain(output.embedding.iter().map(|_| output.embedding_dim))
}
