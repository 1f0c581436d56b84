//! gate → preprocess → infer → decide: the thread between the cameras and the outbox.

use std::sync::{Arc, mpsc::Receiver};

use mesh_core::{
    Name,
    decide::{Decider, Publish, Rule},
};
use models::Engine;
use tokio::sync::{mpsc::Sender, watch};

use crate::{
    board::BoardHandle,
    capture::Frame,
    clock::Monotonic,
    counters::Counters,
    gate::{Gate, GateConfig},
    store::{Command, Draft},
};

/// The model in use. A swap is one `send`: the thread takes it between two frames.
pub(crate) type Loaded = Option<Arc<Engine>>;

/// One source, as the pipeline sees it.
struct Lane {
    name: Name,
    gate: Gate,
    decider: Decider,
}

/// The thread's state.
pub(crate) struct Pipeline {
    lanes: Vec<Lane>,
    engine: watch::Receiver<Loaded>,
    model: Arc<str>,
    reject: Option<Rule>,
    board: BoardHandle,
    store: Sender<Command>,
    clock: Monotonic,
    counters: Counters,
}

impl Pipeline {
    /// One lane per source, in the order of the configuration.
    #[must_use]
    pub(crate) fn new(
        sources: impl IntoIterator<Item = (Name, GateConfig)>,
        publish: Publish,
        reject: Option<Rule>,
        engine: watch::Receiver<Loaded>,
        board: BoardHandle,
        store: Sender<Command>,
        counters: Counters,
    ) -> Self {
        let lane = |(name, gate)| Lane {
            name,
            gate: Gate::new(gate),
            decider: Decider::new(publish),
        };
        Self {
            lanes: sources.into_iter().map(lane).collect(),
            engine,
            model: "".into(),
            reject,
            board,
            store,
            clock: Monotonic::start(),
            counters,
        }
    }

    /// Looks at frames until the cameras or the store are gone. Blocks: it has a thread of its own.
    pub(crate) fn run(mut self, frames: &Receiver<Frame>) {
        while let Ok(frame) = frames.recv() {
            let Some(draft) = self.look(frame) else {
                continue;
            };
            self.counters.results.add(1);
            if self.store.blocking_send(Command::Append(draft)).is_err() {
                return;
            }
        }
    }

    fn look(&mut self, frame: Frame) -> Option<Draft> {
        let lane = self.lanes.get_mut(frame.source)?;
        if !lane.gate.pass(frame.number, &frame.picture) {
            self.counters.frames_gated.add(1);
            return None;
        }
        let engine = self.engine.borrow_and_update().clone()?;
        if *self.model != *engine.id() {
            self.model = engine.id().into();
        }
        let begin = tokio::time::Instant::now();
        let outcome = match engine.infer(&frame.picture) {
            Ok(outcome) => outcome,
            Err(error) => {
                self.counters.frames_bad.add(1);
                tracing::warn!(source = %lane.name, frame = frame.number, %error, "frame skipped");
                return None;
            }
        };
        let latency = begin.elapsed();
        self.counters
            .latency(u64::try_from(latency.as_micros()).unwrap_or(u64::MAX));
        if self
            .reject
            .as_ref()
            .is_some_and(|rule| rule.matches(&outcome.label, outcome.score))
        {
            self.board.reject();
        }
        if !lane.decider.decide(&outcome.label, self.clock.now_ms()) {
            return None;
        }
        Some(Draft {
            source: lane.name.clone(),
            frame: frame.number,
            ts: frame.ts,
            label: outcome.label,
            score: outcome.score,
            margin: outcome.margin,
            model: self.model.clone(),
            latency_ms: latency.as_secs_f32() * 1_000.0,
            file: frame.file,
            truth: frame.truth,
        })
    }
}
