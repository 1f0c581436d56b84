//! Plans for a leader: who is there, what each takes, and what each runs.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use mesh_core::{
    roster::Peer,
    split::{Board, MAX_BOARDS, Plan, Stage, Step, longest, plan},
};
use models::Preparer;
use tokio::{
    sync::{mpsc, watch},
    time::{Instant, MissedTickBehavior, interval, timeout},
};
use tokio_util::sync::CancellationToken;

use super::{
    super::{courier::Roads, offer_of, work::Front},
    Source, kind,
    lead::{BYTES, Leader, Live, Remote, is_momentary},
    open, part,
    wire::{self, PART, Question, Reply},
};
use crate::mesh::Present;

/// How often it is looked who is there.
const LOOK: Duration = Duration::from_secs(1);
/// Lenders are asked again after this …
const AGAIN: Duration = Duration::from_secs(60);
/// … those that do not lend, or not now, after this: they may just have started, or have something else to do …
const NOT_YET: Duration = Duration::from_secs(3);
/// … and those that failed after this.
const FAILED: Duration = Duration::from_secs(10);
/// For a neighbour to load its part.
const LOADING: Duration = Duration::from_secs(60);
/// Bytes per microsecond between two devices before that is known: 100 Mbit/s.
const ROAD: f64 = 12.5;
/// A plan is left for another one that is better by this share.
const WORTH: f64 = 0.15;
/// A stage that takes so many times as long as planned, and a moment, has failed.
const TOO_LONG: f64 = 6.0;
const MOMENT_MS: f64 = 300.0;

/// The leader's planning side.
pub(crate) struct Planner<R> {
    pub(super) leader: Arc<Leader<R>>,
    pub(super) failures: mpsc::Receiver<Peer>,
}

/// A neighbour that lends, or does not.
struct Card {
    board: Option<Board>,
    again: Instant,
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
                    leave(&mut cards, peer, FAILED);
                }
            }
            while let Ok(peer) = self.failures.try_recv() {
                leave(&mut cards, peer, FAILED);
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
            room: self.leader.terms.room,
            share: self.leader.terms.share,
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
            Err(Some((peer, pause))) => leave(cards, peer, pause),
            Err(None) => {}
        }
    }

    /// Has everybody load his part; the neighbour because of whom it came to nothing, if it did, and for how long it is left.
    async fn prepare(
        &self,
        source: &Source,
        found: &Plan,
        peers: &[Option<Peer>],
    ) -> Result<Live, Option<(Peer, Duration)>> {
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
                Ok(Ok((Reply::Refused(why), _))) if is_momentary(why) => {
                    tracing::debug!(%peer, "a neighbour does not load its part now: {}", why.as_str());
                    return Err(Some((peer, NOT_YET)));
                }
                other => {
                    tracing::info!(%peer, "a neighbour does not load its part: {other:?}");
                    return Err(Some((peer, FAILED)));
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

fn step(step: &models::Step) -> Step {
    let travels = step.cut.as_ref().and_then(models::Cut::elements);
    Step {
        operations: step.operations,
        weights: step.weights,
        travels: travels.map_or(0, |elements| (BYTES * elements) as u64),
    }
}

/// It is left alone for a while.
fn leave(cards: &mut BTreeMap<Peer, Card>, peer: Peer, pause: Duration) {
    let again = Instant::now() + pause;
    cards.insert(peer, Card { board: None, again });
}
