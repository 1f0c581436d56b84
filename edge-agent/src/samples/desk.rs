//! Where the pipeline decides about samples: what to keep of the frame at hand, and which of the last frames a mark
//! is about.

use std::{collections::VecDeque, sync::Arc};

use mesh_core::{
    Name, SampleReason, entropy,
    sampling::{Look, Sampler},
};
use models::{Engine, Outcome};

use super::{Keep, Kept, Material, SamplesConfig};
use crate::{
    counters::Counters,
    dice,
    store::{Command, Draft},
};

/// Frames of each source that a mark can still be about: somebody presses a button a moment after he saw it, and
/// the newest frame is the one he means.
const RECENT: usize = 3;
/// What those may take together.
const RECENT_BYTES: usize = 16 * 1024 * 1024;

/// Somebody's word on the last frame of a source, or of every source.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Marked {
    /// The source; nothing is all of them.
    pub(crate) source: Option<Name>,
    /// [`SampleReason::Wrong`] or [`SampleReason::Missed`].
    pub(crate) reason: SampleReason,
}

/// A frame that a mark could be about.
struct Recent {
    draft: Draft,
    kept: Kept,
    /// Why it is a sample already.
    already: Option<SampleReason>,
    /// It became a reading.
    published: bool,
}

/// The pipeline's part of samples.
pub(crate) struct Desk {
    sampler: Sampler,
    keep: Keep,
    recent: Vec<VecDeque<Recent>>,
    recent_bytes: usize,
    counters: Counters,
}

/// A frame that was looked at.
pub(crate) struct Seen<'a> {
    pub(crate) draft: &'a Draft,
    pub(crate) outcome: Outcome,
    pub(crate) material: Material,
    /// It becomes a reading.
    pub(crate) published: bool,
}

/// What was decided about a frame.
pub(crate) struct Verdict {
    pub(crate) reason: Option<SampleReason>,
    entropy: f32,
    novelty: Option<f32>,
}

impl Desk {
    /// For so many sources.
    pub(crate) fn new(config: &SamplesConfig, sources: usize, counters: Counters) -> Self {
        Self {
            sampler: Sampler::new(config.policy(), sources),
            keep: config.keep,
            recent: (0..sources).map(|_| VecDeque::new()).collect(),
            recent_bytes: 0,
            counters,
        }
    }

    /// Draws the lot of a frame, before anybody has looked at it.
    pub(crate) fn draw(&self) -> bool {
        self.sampler.draw(dice::throw())
    }

    /// Is the frame worth keeping?
    pub(crate) fn judge(
        &mut self,
        source: usize,
        drawn: bool,
        outcome: &Outcome,
        engine: &Engine,
        now_ms: u64,
    ) -> Verdict {
        let reference = engine.manifest().reference.as_ref();
        let novelty = reference
            .filter(|_| !outcome.embedding.is_empty())
            .map(|r| r.novelty(&outcome.embedding));
        let look = Look {
            score: outcome.score,
            margin: outcome.margin,
            entropy: entropy(&outcome.scores),
            novelty,
        };
        let used = self.counters.samples.used();
        Verdict {
            reason: self.sampler.decide(source, drawn, &look, &used, now_ms),
            entropy: look.entropy,
            novelty,
        }
    }

    /// Takes note of a frame that was looked at; gives what is kept of it, where it is kept.
    pub(crate) fn take(
        &mut self,
        source: usize,
        verdict: &Verdict,
        engine: &Engine,
        seen: Seen<'_>,
    ) -> Option<Box<Kept>> {
        let Seen {
            draft,
            outcome,
            material,
            published,
        } = seen;
        let labels = &engine.manifest().output.labels;
        let best = outcome.class.and_then(|class| labels.get(class)).cloned();
        let small = material.bytes() <= RECENT_BYTES;
        let material = (self.keep == Keep::Image).then(|| Arc::new(material));
        let kept = Kept {
            reason: verdict.reason.unwrap_or(SampleReason::Missed),
            label: best.unwrap_or(outcome.label),
            entropy: verdict.entropy,
            novelty: verdict.novelty,
            embedding: outcome.embedding,
            material,
        };
        let answer = verdict.reason.map(|_| Box::new(kept.clone()));
        // One that is too large to wait for a mark is not looked back at.
        if small {
            self.remember(
                source,
                Recent {
                    draft: draft.clone(),
                    kept,
                    already: verdict.reason,
                    published,
                },
            );
        }
        answer
    }

    fn remember(&mut self, source: usize, frame: Recent) {
        let Some(frames) = self.recent.get_mut(source) else {
            return;
        };
        self.recent_bytes += frame.bytes();
        frames.push_back(frame);
        while frames.len() > RECENT {
            self.recent_bytes -= frames.pop_front().map_or(0, |old| old.bytes());
        }
        // The sources share the memory: whoever has most frames gives one.
        while self.recent_bytes > RECENT_BYTES {
            let longest = self.recent.iter_mut().max_by_key(|frames| frames.len());
            let Some(old) = longest.and_then(VecDeque::pop_front) else {
                return;
            };
            self.recent_bytes -= old.bytes();
        }
    }

    /// What to ask of the store because of a mark. `sources` are the names, in the order of their numbers.
    pub(crate) fn mark(&mut self, marked: &Marked, sources: &[Name], now_ms: u64) -> Vec<Command> {
        let meant = |name: &Name| marked.source.as_ref().is_none_or(|source| source == name);
        let places: Vec<usize> = sources
            .iter()
            .enumerate()
            .filter(|(_, name)| meant(name))
            .map(|(at, _)| at)
            .collect();
        let mut commands = Vec::new();
        for at in places {
            let used = self.counters.samples.used();
            let Some(frame) = self
                .recent
                .get_mut(at)
                .and_then(|f| meant_by(f, marked.reason))
            else {
                tracing::info!(
                    mark = marked.reason.as_str(),
                    "nothing was seen lately to be marked"
                );
                continue;
            };
            // A sample by lot stays one, or the lot would not be fair; it reaches people anyway.
            if let Some(SampleReason::Random | SampleReason::Wrong | SampleReason::Missed) =
                frame.already
            {
                continue;
            }
            if !self.sampler.marked(marked.reason, &used, now_ms) {
                self.counters.samples.dropped.add(1);
                continue;
            }
            frame.already = Some(marked.reason);
            frame.kept.reason = marked.reason;
            commands.push(Command::Keep {
                draft: frame.draft.clone(),
                kept: Box::new(frame.kept.clone()),
                again: frame.published,
            });
            frame.published = true;
        }
        commands
    }

    /// Keeps a frame on which two models disagree, if it is still at hand and it is time for one.
    pub(crate) fn disputed(&mut self, source: usize, number: u64, now_ms: u64) -> Option<Command> {
        let frames = self.recent.get_mut(source)?;
        let frame = frames.iter_mut().find(|f| f.draft.frame == number)?;
        if frame.already.is_some() {
            return None;
        }
        let used = self.counters.samples.used();
        if !self.sampler.disputed(source, &used, now_ms) {
            return None;
        }
        let reason = SampleReason::Disputed;
        frame.already = Some(reason);
        frame.kept.reason = reason;
        let command = Command::Keep {
            draft: frame.draft.clone(),
            kept: Box::new(frame.kept.clone()),
            again: frame.published,
        };
        frame.published = true;
        Some(command)
    }
}

/// Only what was reported can be wrong; what was missed was never reported, or as nothing.
fn meant_by(frames: &mut VecDeque<Recent>, reason: SampleReason) -> Option<&mut Recent> {
    let reported = frames.iter().rposition(|frame| frame.published);
    let at = match reason {
        SampleReason::Wrong => reported.or(frames.len().checked_sub(1)),
        _ => frames.len().checked_sub(1),
    };
    at.and_then(|at| frames.get_mut(at))
}

impl Recent {
    fn bytes(&self) -> usize {
        let material = self.kept.material.as_ref().map_or(0, |m| m.bytes());
        material + self.kept.embedding.len() * size_of::<f32>()
    }
}
