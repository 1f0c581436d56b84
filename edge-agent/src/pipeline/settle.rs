//! From what was seen to a reading, a sample or nothing: at once, or when a neighbour has said its word.

use std::{sync::Arc, time::Duration};

use mesh_core::offload::Answered;
use models::{Engine, Outcome};
use tokio::time::Instant;

use super::Pipeline;
use crate::{
    capture::Frame,
    samples::{Material, desk::Seen},
    store::{Command, Draft},
};

/// A frame that was looked at, before anybody outside hears of it.
pub(super) struct Looked {
    pub(super) frame: Frame,
    pub(super) engine: Arc<Engine>,
    pub(super) model: Arc<str>,
    pub(super) outcome: Outcome,
    /// By lot, to be kept.
    pub(super) drawn: bool,
    pub(super) begin: Instant,
    pub(super) latency: Duration,
}

/// A frame on its way through the pipeline.
pub(super) enum Pending {
    Looked(Box<Looked>),
    /// A neighbour looks at it instead of this device.
    Unseen(Box<(Frame, Instant)>),
}

impl Pending {
    /// Bytes in memory.
    pub(super) fn bytes(&self) -> usize {
        let frame = match self {
            Self::Looked(looked) => &looked.frame,
            Self::Unseen(unseen) => &unseen.0,
        };
        let original = frame.original.as_ref().map_or(0, Vec::len);
        frame.picture.rgb().len() + original
    }
}

impl Pipeline {
    /// Settles what has waited for a neighbour long enough, or has its answer.
    pub(super) fn settle_held(&mut self) -> Vec<Command> {
        let now_ms = self.clock.now_ms();
        let Some(handoff) = &mut self.handoff else {
            return Vec::new();
        };
        let lanes = &mut self.lanes;
        handoff.hear(now_ms, |number, answer| {
            lanes
                .iter_mut()
                .any(|lane| lane.held.back(number, answer.clone()))
        });
        self.settle_until(now_ms)
    }

    pub(super) fn settle_until(&mut self, now_ms: u64) -> Vec<Command> {
        let mut commands = Vec::new();
        for place in 0..self.lanes.len() {
            while let Some((pending, answer)) = self
                .lanes
                .get_mut(place)
                .and_then(|lane| lane.held.next(now_ms))
            {
                match (pending, answer) {
                    (Pending::Looked(looked), answer) => {
                        commands.extend(self.settle(*looked, answer))
                    }
                    (Pending::Unseen(unseen), Some(answer)) => {
                        commands.extend(self.settle_unseen(*unseen, answer))
                    }
                    // Nobody has looked at it: the device does, after all.
                    (Pending::Unseen(unseen), None) => {
                        let (frame, begin) = *unseen;
                        let engines = self.engines.borrow().clone();
                        let (looked, _) = self.look_here(frame, false, &engines, begin);
                        commands.extend(looked.and_then(|looked| self.settle(*looked, None)));
                    }
                }
            }
        }
        commands
    }

    /// What becomes of a frame that was looked at, here and perhaps elsewhere, too.
    pub(super) fn settle(&mut self, looked: Looked, answer: Option<Answered>) -> Option<Command> {
        let Looked {
            frame,
            engine,
            model,
            outcome,
            drawn,
            begin,
            latency,
        } = looked;
        let now_ms = self.clock.now_ms();
        let lane = self.lanes.get_mut(frame.source)?;
        let label = answer
            .as_ref()
            .map_or(&outcome.label, |answered| &answered.answer.label);
        let published = lane.decider.decide(label, now_ms);
        let latency = if answer.is_some() {
            begin.elapsed()
        } else {
            latency
        };
        let draft = Draft {
            source: lane.name.clone(),
            frame: frame.number,
            ts: frame.ts,
            label: outcome.label.clone(),
            score: outcome.score,
            margin: outcome.margin,
            model,
            latency_ms: latency.as_secs_f32() * 1_000.0,
            file: frame.file,
            truth: frame.truth,
            answered: answer.map(Box::new),
        };
        let kept = self.samples.as_mut().and_then(|(desk, _)| {
            let verdict = desk.judge(frame.source, drawn, &outcome, &engine, now_ms);
            let seen = Seen {
                draft: &draft,
                material: match frame.original {
                    Some(bytes) => Material::File(bytes),
                    None => Material::Pixels(frame.picture),
                },
                outcome,
                // What is kept has a reading's number, so it becomes a reading.
                published: published || verdict.reason.is_some(),
            };
            desk.take(frame.source, &verdict, &engine, seen)
        });
        match kept {
            Some(kept) => Some(Command::Keep {
                draft,
                kept,
                again: false,
            }),
            None => published.then_some(Command::Append(draft)),
        }
    }

    /// What becomes of a frame at which only a neighbour has looked.
    fn settle_unseen(
        &mut self,
        (frame, begin): (Frame, Instant),
        answered: Answered,
    ) -> Option<Command> {
        let now_ms = self.clock.now_ms();
        let lane = self.lanes.get_mut(frame.source)?;
        let said = &answered.answer;
        if !lane.decider.decide(&said.label, now_ms) {
            return None;
        }
        Some(Command::Append(Draft {
            source: lane.name.clone(),
            frame: frame.number,
            ts: frame.ts,
            label: said.label.clone(),
            score: said.score,
            margin: said.margin,
            model: said.model.as_str().into(),
            latency_ms: begin.elapsed().as_secs_f32() * 1_000.0,
            file: frame.file,
            truth: frame.truth,
            answered: Some(Box::new(answered)),
        }))
    }
}
