//! Leads a model through its parts: plans, has them loaded, sends frames through, and plans anew when somebody is gone.

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
    split::{Board, MAX_BOARDS, Plan, Stage, Step, longest, plan},
};
use models::{Manifest, Preparer, Span, outcome_of};
use tokio::{
    sync::{mpsc, watch},
    time::{Instant, MissedTickBehavior, interval, timeout, timeout_at},
};
use tokio_util::sync::CancellationToken;

use super::{
    super::{
        courier::Roads,
        offer_of,
        work::{Front, Output, Work, Worker, answer, left_ms},
    },
    Source, kind,
    lend::WEIGHED,
    open, part,
    wire::{self, PART, Question, Reply},
};
use crate::mesh::Present;

/// How often it is looked who is there.
const LOOK: Duration = Duration::from_secs(1);
/// For a neighbour to say what it lends.
const PATIENCE: Duration = Duration::from_secs(2);
/// Lenders are asked again after this …
const AGAIN: Duration = Duration::from_secs(60);
/// … those that do not lend after this: they may just have started …
const NOT_YET: Duration = Duration::from_secs(3);
/// … and those that failed after this.
const FAILED: Duration = Duration::from_secs(10);
/// For a neighbour to load its part.
const LOADING: Duration = Duration::from_secs(60);
/// Bytes per microsecond between two devices before that is known: 100 Mbit/s.
const ROAD: f64 = 12.5;
/// Bytes of a value.
const BYTES: usize = size_of::<f32>();
/// A plan is left for another one that is better by this share.
const WORTH: f64 = 0.15;
/// A stage that takes so many times as long as planned, and a moment, has failed.
const TOO_LONG: f64 = 6.0;
const MOMENT_MS: f64 = 300.0;
/// What counts of the newest measurement.
const NEWEST: f64 = 0.1;
/// Failures that wait to be heard of.
const FAILURES: usize = 16;

/// A part on another device.
struct Remote {
    peer: Peer,
    span: Span,
    operations: u64,
    patience: Duration,
}

/// A plan that everybody has loaded.
struct Live {
    front: Arc<Front>,
    kind: Digest,
    expected_ms: f64,
    others: Vec<Remote>,
    stages: Vec<Stage>,
    peers: Vec<Option<Peer>>,
}

/// What was measured under way.
struct Measured {
    road: Option<f64>,
    speeds: BTreeMap<Peer, f64>,
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
}

/// Leads one model.
pub(crate) struct Leader<R> {
    folder: PathBuf,
    room: u64,
    roads: R,
    offer: OnceLock<Offer>,
    source: OnceLock<Source>,
    live: watch::Sender<Option<Arc<Live>>>,
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

/// The leader's planning side.
pub(crate) struct Planner<R> {
    leader: Arc<Leader<R>>,
    failures: mpsc::Receiver<Peer>,
}

/// A neighbour that lends, or does not.
struct Card {
    board: Option<Board>,
    again: Instant,
}

impl<R: Roads> Leader<R> {
    /// Of the model in `folder`, of which this device takes `room` bytes of weights at most.
    pub(crate) fn new(folder: PathBuf, room: u64, roads: R) -> (Arc<Self>, Planner<R>) {
        let (failed, failures) = mpsc::channel(FAILURES);
        let leader = Arc::new(Self {
            folder,
            room,
            roads,
            offer: OnceLock::new(),
            source: OnceLock::new(),
            live: watch::Sender::new(None),
            failed,
            measured: Mutex::new(Measured {
                road: None,
                speeds: BTreeMap::new(),
            }),
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

    /// One part on another device.
    async fn next(
        &self,
        remote: &Remote,
        value: &[f32],
        until: Instant,
    ) -> Result<Vec<Vec<f32>>, Stuck> {
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
        Ok(outputs)
    }

    fn measured(&self) -> MutexGuard<'_, Measured> {
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
    async fn lends(&self, peer: Peer, model: Digest) -> Option<Board> {
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
            Ok((Reply::Lent { speed, room }, _)) if speed.is_finite() && speed > 0.0 => {
                Board { speed, room }
            }
            other => {
                tracing::debug!(%peer, "a neighbour does not lend: {other:?}");
                return None;
            }
        };
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

impl<R: Roads> Planner<R> {
    /// Reads the bundle, then plans for as long as the device runs.
    pub(crate) async fn run(self, present: watch::Receiver<Present>, stop: CancellationToken) {
        tokio::select! {
            () = stop.cancelled() => {}
            () = self.plan(present) => {}
        }
    }

    async fn plan(mut self, mut present: watch::Receiver<Present>) {
        let folder = self.leader.folder.clone();
        let source = match tokio::task::spawn_blocking(move || open(&folder)).await {
            Ok(Ok(source)) => source,
            Ok(Err(why)) => {
                tracing::error!(
                    "{} is not run in parts: {why}",
                    self.leader.folder.display()
                );
                return;
            }
            Err(_) => return,
        };
        let Some(offer) = offer_of(&source.manifest) else {
            tracing::error!(
                "{} is not run in parts: it is no model with labels",
                self.leader.folder.display()
            );
            return;
        };
        let digest = source.digest;
        let _ = self.leader.offer.set(offer);
        let source = self.leader.source.get_or_init(|| source);
        let mut cards: BTreeMap<Peer, Card> = BTreeMap::new();
        let mut told = None;
        let mut tick = interval(LOOK);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                _ = tick.tick() => {}
                failed = self.failures.recv() => {
                    let Some(peer) = failed else { return };
                    fail(&mut cards, peer);
                }
            }
            while let Ok(peer) = self.failures.try_recv() {
                fail(&mut cards, peer);
            }
            let here: Vec<Peer> = present
                .borrow_and_update()
                .iter()
                .filter(|neighbour| neighbour.presence.answers)
                .map(|neighbour| neighbour.peer)
                .collect();
            cards.retain(|peer, _| here.contains(peer));
            for peer in here {
                let known = cards.get(&peer);
                if known.is_some_and(|card| Instant::now() < card.again)
                    || (known.is_none() && cards.len() >= 2 * MAX_BOARDS)
                {
                    continue;
                }
                let board = self.leader.lends(peer, digest).await;
                let after = if board.is_some() { AGAIN } else { NOT_YET };
                cards.insert(
                    peer,
                    Card {
                        board,
                        again: Instant::now() + after,
                    },
                );
            }
            self.settle(source, &mut cards, &mut told).await;
        }
    }

    /// Goes over to a better plan, if there is one.
    async fn settle(
        &self,
        source: &Source,
        cards: &mut BTreeMap<Peer, Card>,
        told: &mut Option<&'static str>,
    ) {
        let (road, speeds) = {
            let measured = self.leader.measured();
            (measured.road.unwrap_or(ROAD), measured.speeds.clone())
        };
        let own = Board {
            speed: source.speed,
            room: self.leader.room,
        };
        let mut peers = vec![None];
        let mut boards = vec![own];
        for (peer, board) in cards
            .iter()
            .filter_map(|(peer, card)| Some((peer, card.board?)))
        {
            peers.push(Some(*peer));
            boards.push(Board {
                speed: speeds.get(peer).copied().unwrap_or(board.speed),
                ..board
            });
        }
        let steps: Vec<Step> = source.steps.0.iter().map(step).collect();
        let live = self.leader.live.borrow().clone();
        // What the plan in use would take by what is known now; nothing if somebody of it is gone.
        let now = live.as_ref().and_then(|live| {
            let place = |stage: &Stage| {
                let peer = live.peers.get(stage.board)?;
                let board = peers.iter().position(|known| known == peer)?;
                Some(Stage { board, ..*stage })
            };
            let stages: Option<Vec<Stage>> = live.stages.iter().map(place).collect();
            longest(&steps, &boards, road, &stages?)
        });
        let Some(found) = plan(&steps, &boards, road) else {
            self.leader.live.send_replace(None);
            if told.replace("no room") != Some("no room") {
                tracing::warn!(
                    model = source.manifest.id(),
                    "those who lend have no room for it together"
                );
            }
            return;
        };
        if now.is_some_and(|now| found.longest_us > now * (1.0 - WORTH)) {
            return;
        }
        if now.is_none() {
            // Frames wait for the next plan.
            self.leader.live.send_replace(None);
        }
        match self.prepare(source, &found, &peers).await {
            Ok(live) => {
                tracing::info!(
                    model = source.manifest.id(),
                    parts = found.stages.len(),
                    longest_ms = found.longest_us / 1e3,
                    "a model runs in parts"
                );
                told.take();
                self.leader.live.send_replace(Some(Arc::new(live)));
            }
            Err(Some(peer)) => fail(cards, peer),
            Err(None) => {}
        }
    }

    /// Has everybody load his part; the neighbour because of whom it came to nothing, if it did.
    async fn prepare(
        &self,
        source: &Source,
        found: &Plan,
        peers: &[Option<Peer>],
    ) -> Result<Live, Option<Peer>> {
        let mut others = Vec::new();
        let mut front = None;
        for stage in &found.stages {
            let span = source.steps.span(stage.from, stage.to).ok_or(None)?;
            let steps = source.steps.0.get(stage.from..stage.to).unwrap_or_default();
            let operations: u64 = steps.iter().map(|step| step.operations).sum();
            let Some(peer) = peers.get(stage.board).copied().flatten() else {
                let (folder, digest, manifest) = (
                    self.leader.folder.clone(),
                    source.digest,
                    source.manifest.clone(),
                );
                let wanted = span.clone();
                let read = tokio::task::spawn_blocking(move || {
                    let part = part(&folder, &digest, &wanted)?;
                    Ok::<_, String>(Front {
                        preparer: Preparer::new(&manifest.input),
                        part,
                    })
                });
                match read.await {
                    Ok(Ok(loaded)) => {
                        let expected_ms = operations as f64 / source.speed / 1e3;
                        front = Some((Arc::new(loaded), kind(&source.digest, &span), expected_ms));
                    }
                    Ok(Err(why)) => {
                        tracing::error!("the first part of a model: {why}");
                        return Err(None);
                    }
                    Err(_) => return Err(None),
                }
                continue;
            };
            let question = Question::Load {
                model: source.digest,
                span: span.clone(),
            };
            let asked = async {
                let stream = self.leader.roads.open(peer, PART).await?;
                wire::ask(stream, &question, &[])
                    .await
                    .map_err(|error| error.to_string())
            };
            match timeout(LOADING, asked).await {
                Ok(Ok((Reply::Loaded, _))) => {}
                other => {
                    tracing::info!(%peer, "a neighbour does not load its part: {other:?}");
                    return Err(Some(peer));
                }
            }
            let ms = found.longest_us / 1e3 * TOO_LONG + MOMENT_MS;
            others.push(Remote {
                peer,
                span,
                operations,
                patience: Duration::from_secs_f64(ms / 1e3),
            });
        }
        let (front, kind, expected_ms) = front.ok_or(None)?;
        Ok(Live {
            front,
            kind,
            expected_ms,
            others,
            stages: found.stages.clone(),
            peers: peers.to_vec(),
        })
    }
}

/// How many values a model's outputs have, in their order.
fn outputs_of(manifest: &Manifest) -> impl Iterator<Item = usize> {
    let output = &manifest.output;
    let scores = output.scores.iter().map(|_| output.labels.len());
    scores.chain(output.embedding.iter().map(|_| output.embedding_dim))
}

fn step(step: &models::Step) -> Step {
    let travels = step.cut.as_ref().and_then(models::Cut::elements);
    Step {
        operations: step.operations,
        weights: step.weights,
        travels: travels.map_or(0, |elements| (BYTES * elements) as u64),
    }
}

/// It is left alone for a while.
fn fail(cards: &mut BTreeMap<Peer, Card>, peer: Peer) {
    let again = Instant::now() + FAILED;
    cards.insert(peer, Card { board: None, again });
}
