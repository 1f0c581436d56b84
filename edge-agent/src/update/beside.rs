//! Looks at some frames with a second model, to compare the two. No frame ever waits for it.

use std::{
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
        mpsc::SyncSender,
    },
};

use mesh_core::{Failure, Reason, update::Said};
use models::{Engine, EngineError, Input, Outcome, Picture, UNKNOWN};
use tokio::sync::mpsc::{Receiver, Sender};

use super::{
    News,
    engines::{Engines, thread_time},
};

/// A model that gives a class this score …
const SURE_SCORE: f32 = 0.8;
/// … and so much less to the next one is sure: another good model agrees. Below, even retraining the same one on the
/// same pictures changes answers.
const SURE_MARGIN: f32 = 0.5;

/// What went wrong with a frame.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Trouble {
    /// The picture cannot be made a model's input: any model would say so.
    #[error(transparent)]
    Input(EngineError),
    /// The model cannot say anything.
    #[error(transparent)]
    Engine(EngineError),
    /// The engine ended in a panic.
    #[error("the model ended in a panic")]
    Panic,
}

impl Trouble {
    /// What it says about the model: a result that is no number, a failure, or nothing.
    pub(crate) fn verdict(&self) -> Option<Result<Said, Failure>> {
        match self {
            Self::Input(_) => None,
            Self::Engine(EngineError::Outcome { .. }) => Some(Ok(Said {
                label: UNKNOWN.into(),
                score: 0.0,
                finite: false,
                sure: false,
                shared: true,
                ms: 0.0,
            })),
            _ => Some(Err(Failure::new(Reason::Crash, &self.to_string()))),
        }
    }
}

/// Runs a model, and says how many milliseconds of the processor's time it took.
pub(crate) fn run(engine: &Engine, input: &Input) -> Result<(Outcome, f32), Trouble> {
    let before = thread_time();
    let outcome = catch_unwind(AssertUnwindSafe(|| engine.run(input)))
        .map_err(|_| Trouble::Panic)?
        .map_err(Trouble::Engine)?;
    let ms = thread_time().saturating_sub(before).as_secs_f32() * 1_000.0;
    Ok((outcome, ms))
}

/// The input of a model.
pub(crate) fn input(engine: &Engine, picture: &Picture) -> Result<Input, Trouble> {
    catch_unwind(AssertUnwindSafe(|| engine.tensor(picture)))
        .map_err(|_| Trouble::Panic)?
        .map_err(Trouble::Input)
}

/// What a model said, for the judge. `other` is the model that it is compared with.
pub(crate) fn said(outcome: &Outcome, ms: f32, other: Option<&Engine>) -> Said {
    let known = |other: &Engine| {
        let labels = &other.manifest().output.labels;
        // A model without labels gives embeddings, and so does the other one.
        labels.is_empty() || labels.contains(&outcome.label)
    };
    Said {
        label: outcome.label.clone(),
        score: outcome.score,
        finite: true,
        sure: outcome.label != UNKNOWN
            && outcome.score >= SURE_SCORE
            && outcome.margin >= SURE_MARGIN,
        shared: outcome.label == UNKNOWN || other.is_none_or(known),
        ms,
    }
}

/// A frame to look at once more.
pub(crate) struct Errand {
    pub(crate) look: Look,
    /// The source's number and the frame's.
    pub(crate) frame: (usize, u64),
    /// What the active model said.
    pub(crate) active: Said,
    pub(crate) engines: Engines,
}

/// What of a frame the second model needs.
pub(crate) enum Look {
    /// Both models take the same input.
    Input(Input),
    /// They do not.
    Picture(Picture),
}

/// How many times the processor's time of the active model the second one takes for a frame, 1 where it takes less.
#[derive(Clone, Debug)]
pub(super) struct Cost(Arc<AtomicU32>);

impl Default for Cost {
    fn default() -> Self {
        Self(Arc::new(AtomicU32::new(1.0_f32.to_bits())))
    }
}

impl Cost {
    fn get(&self) -> f32 {
        f32::from_bits(self.0.load(Ordering::Relaxed))
    }

    /// One frame more says what it took. A frame alone may have been interrupted: it counts for a quarter.
    fn learn(&self, active_ms: f32, beside_ms: f32) {
        let times = beside_ms / active_ms.max(0.01);
        let cost = (0.75 * self.get() + 0.25 * times).max(1.0);
        self.0.store(cost.to_bits(), Ordering::Relaxed);
    }

    fn forget(&self) {
        self.0.store(1.0_f32.to_bits(), Ordering::Relaxed);
    }
}

/// The pipeline's end.
pub(crate) struct Trial {
    errands: Sender<Errand>,
    tell: Sender<News>,
    /// Frames that the second model may look at, 0..=1.
    credit: f32,
    cost: Cost,
}

impl Trial {
    pub(super) const fn new(errands: Sender<Errand>, tell: Sender<News>, cost: Cost) -> Self {
        Self {
            errands,
            tell,
            credit: 0.0,
            cost,
        }
    }

    /// Does the second model look at this frame? Not if it is still busy, or if it has had its share of time: that of the
    /// active one, times the share. What it missed while it was busy is not made up for.
    pub(crate) fn takes(&mut self, engines: &Engines) -> bool {
        if engines.beside.is_none() {
            self.cost.forget();
            return false;
        }
        self.credit = (self.credit + engines.share / self.cost.get()).min(1.0);
        // Nobody else sends: what is free now is free when the frame is sent.
        let takes = self.credit >= 1.0 && self.errands.capacity() > 0;
        if takes {
            self.credit = 0.0;
        }
        takes
    }

    /// Hands a frame over.
    pub(crate) fn look(&self, errand: Errand) {
        // A frame that finds no room is one less to compare.
        let _ = self.errands.try_send(errand);
    }

    /// Says what the active model said on a frame that the other one does not look at.
    pub(crate) fn say(&self, ticket: u64, active: Result<Said, Failure>) {
        let beside = None;
        // A driver that is busy with a hundred others learns nothing from this one.
        let _ = self.tell.try_send(News::Frame {
            ticket,
            active,
            beside,
        });
    }
}

/// The thread's state.
pub(super) struct Beside {
    pub(super) errands: Receiver<Errand>,
    pub(super) tell: Sender<News>,
    /// Frames on which the two disagree.
    pub(super) disagreed: SyncSender<(usize, u64)>,
    pub(super) cost: Cost,
}

impl Beside {
    /// Looks until the pipeline is gone. Blocks: it has a thread of its own.
    pub(super) fn run(mut self) {
        // The frames come first. Where the system does not allow it they share.
        let _ = rustix::process::nice(NICE);
        while let Some(errand) = self.errands.blocking_recv() {
            let Some(beside) = &errand.engines.beside else {
                continue;
            };
            let active = errand.engines.active.as_deref();
            let before = thread_time();
            let looked = match errand.look {
                Look::Input(input) => run(beside, &input),
                Look::Picture(picture) => {
                    input(beside, &picture).and_then(|input| run(beside, &input))
                }
            };
            let took = thread_time().saturating_sub(before);
            self.cost
                .learn(errand.active.ms, took.as_secs_f32() * 1_000.0);
            let beside = match looked {
                Ok((outcome, ms)) => Some(Ok(said(&outcome, ms, active))),
                Err(trouble) => trouble.verdict(),
            };
            if let Some(Ok(said)) = &beside
                && said.finite
                && said.label != errand.active.label
            {
                // Nobody listens where no samples are kept.
                let _ = self.disagreed.try_send(errand.frame);
            }
            let news = News::Frame {
                ticket: errand.engines.ticket,
                active: Ok(errand.active),
                beside,
            };
            if self.tell.blocking_send(news).is_err() {
                return;
            }
        }
    }
}

/// How much this thread stands back: it gets about a tenth of what the others do where there is not enough for all.
const NICE: i32 = 10;

#[cfg(test)]
mod tests {
    use std::sync::{Arc, mpsc::sync_channel};

    use models::Bundle;

    use super::*;

    #[test]
    fn nobody_waits_for_the_second_model() {
        let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/../models/bundles/conveyor");
        let bundle = Bundle::open(folder.as_ref()).unwrap();
        let engine = Arc::new(Engine::load(&bundle).unwrap());
        let engines = |share| Engines {
            active: Some(Arc::clone(&engine)),
            beside: Some(Arc::clone(&engine)),
            share,
            watched: true,
            ..Engines::default()
        };
        let (to_beside, errands) = tokio::sync::mpsc::channel(1);
        let (tell, mut news) = tokio::sync::mpsc::channel(4);
        let (disagreed, _) = sync_channel(1);
        let cost = Cost::default();
        let mut trial = Trial::new(to_beside, tell.clone(), cost.clone());
        let picture = Picture::from_rgb(96, 96, vec![7; 96 * 96 * 3]).unwrap();
        let input = input(&engine, &picture).unwrap();
        let (outcome, ms) = run(&engine, &input).unwrap();
        let active = said(&outcome, ms, Some(&*engine));
        assert!(active.finite && active.shared && active.ms > 0.0);
        // A share is a share, and nothing without a second model.
        let taken =
            |trial: &mut Trial, share| (0..100).filter(|_| trial.takes(&engines(share))).count();
        assert_eq!((taken(&mut trial, 0.25), taken(&mut trial, 0.0)), (25, 0));
        assert_eq!(taken(&mut trial, 1.0), 100);
        // A share of time: what takes five times as long looks at a fifth of the frames.
        (0..30).for_each(|_| cost.learn(2.0, 10.0));
        let slower = taken(&mut trial, 0.5);
        assert!((9..=11).contains(&slower), "{slower}");
        assert!(!trial.takes(&Engines::default()));
        assert_eq!(taken(&mut trial, 1.0), 100, "the next one is another");
        // Nobody takes anything off the channels: still nothing waits.
        let mut handed = 0;
        for frame in 0..100 {
            if trial.takes(&engines(1.0)) {
                handed += 1;
                trial.look(Errand {
                    look: Look::Input(input.clone()),
                    frame: (0, frame),
                    active: active.clone(),
                    engines: engines(1.0),
                });
            }
            trial.say(1, Ok(active.clone()));
        }
        assert_eq!((handed, news.len()), (1, 4));
        // The thread looks at what is there, and ends with the pipeline.
        while news.try_recv().is_ok() {}
        drop(trial);
        Beside {
            errands,
            tell,
            disagreed,
            cost,
        }
        .run();
        let Ok(News::Frame {
            beside: Some(Ok(beside)),
            ..
        }) = news.try_recv()
        else {
            panic!("one frame was compared");
        };
        assert_eq!(beside.label, active.label);
    }
}
