//! gate → preprocess → infer → decide: the thread between the cameras and the outbox.

use std::{
    collections::BTreeMap,
    sync::{
        Arc,
        mpsc::{Receiver, RecvTimeoutError},
    },
    time::Duration,
};

use mesh_core::{
    Name, SampleReason,
    decide::{Decider, Publish, Rule},
    drift::Drift,
};
use models::{Engine, Input, Outcome, Picture};
use tokio::sync::{mpsc::Sender, watch};

use crate::{
    board::BoardHandle,
    capture::Frame,
    clock::Monotonic,
    counters::Counters,
    drift::{DriftConfig, Watcher},
    gate::{Gate, GateConfig},
    samples::{
        Material,
        desk::{Desk, Marked, Seen},
    },
    store::{Command, Draft},
    update::{self, Engines, Errand, Look, Trial, Trouble},
};

/// One source, as the pipeline sees it.
struct Lane {
    name: Name,
    gate: Gate,
    decider: Decider,
    /// Is what it sees still what it should see? Nothing where nobody wants to know.
    watcher: Option<Watcher>,
}

/// What was last found about each source, for the uplink.
pub(crate) type Drifts = BTreeMap<Name, Drift>;

/// How soon a mark is heard while the cameras show nothing.
const LISTEN: Duration = Duration::from_millis(200);

/// The thread's state.
pub(crate) struct Pipeline {
    lanes: Vec<Lane>,
    /// The models in use; taken between two frames.
    engines: watch::Receiver<Engines>,
    model: Arc<str>,
    reject: Option<Rule>,
    board: BoardHandle,
    store: Sender<Command>,
    /// Where it is decided what is kept, and what people say about it; nothing where no frame may be kept.
    samples: Option<(Desk, Receiver<Marked>)>,
    /// The device's name, and where findings about its sources go.
    drifts: Option<(Name, watch::Sender<Drifts>)>,
    /// What the button says, and how often it was pressed when it was last looked at.
    button: Option<(SampleReason, u64)>,
    /// Who wants to know what the models say, and frames on which two of them disagree.
    trial: Option<(Trial, Receiver<(usize, u64)>)>,
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
        engines: watch::Receiver<Engines>,
        board: BoardHandle,
        store: Sender<Command>,
        counters: Counters,
    ) -> Self {
        let lane = |(name, gate)| Lane {
            name,
            gate: Gate::new(gate),
            decider: Decider::new(publish),
            watcher: None,
        };
        Self {
            lanes: sources.into_iter().map(lane).collect(),
            engines,
            model: "".into(),
            reject,
            board,
            store,
            samples: None,
            drifts: None,
            button: None,
            trial: None,
            clock: Monotonic::start(),
            counters,
        }
    }

    /// With a desk where frames are chosen to be kept, and the marks for it.
    #[must_use]
    pub(crate) fn with_samples(self, samples: Option<(Desk, Receiver<Marked>)>) -> Self {
        Self { samples, ..self }
    }

    /// With a button on the board that says this about the last frames.
    #[must_use]
    pub(crate) fn with_button(self, says: Option<SampleReason>) -> Self {
        let presses = self.board.counts().presses;
        Self {
            button: says.map(|reason| (reason, presses)),
            ..self
        }
    }

    /// With somebody who compares models.
    #[must_use]
    pub(crate) fn with_trial(self, trial: Trial, disagreed: Receiver<(usize, u64)>) -> Self {
        Self {
            trial: Some((trial, disagreed)),
            ..self
        }
    }

    /// With an eye on what the sources see, and a place for what is found.
    #[must_use]
    pub(crate) fn with_drift(
        mut self,
        config: &DriftConfig,
        device: Name,
        drifts: watch::Sender<Drifts>,
    ) -> Self {
        if config.enabled {
            for lane in &mut self.lanes {
                lane.watcher = Some(Watcher::new(config));
            }
            self.drifts = Some((device, drifts));
        }
        self
    }

    /// Looks at frames until the cameras or the store are gone. Blocks: it has a thread of its own.
    pub(crate) fn run(mut self, frames: &Receiver<Frame>) {
        loop {
            let frame = if self.samples.is_some() {
                frames.recv_timeout(LISTEN)
            } else {
                frames.recv().map_err(|_| RecvTimeoutError::Disconnected)
            };
            let mut commands = self.hear();
            let mut errand = None;
            match frame {
                Ok(frame) => {
                    let (command, again) = self.look(frame);
                    commands.extend(command);
                    errand = again;
                }
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => return,
            }
            for command in commands {
                // A frame that is a reading already becomes none.
                if !matches!(command, Command::Keep { again: true, .. }) {
                    self.counters.results.add(1);
                }
                if self.store.blocking_send(command).is_err() {
                    return;
                }
            }
            // The result is on its way: now there is time.
            if let (Some(errand), Some((trial, _))) = (errand, &self.trial) {
                trial.look(errand);
            }
        }
    }

    /// What people said in the meantime about the frames before.
    fn hear(&mut self) -> Vec<Command> {
        let Some((desk, marks)) = &mut self.samples else {
            return Vec::new();
        };
        let mut heard: Vec<Marked> = marks.try_iter().collect();
        if let Some((reason, before)) = &mut self.button {
            let presses = self.board.counts().presses;
            // Pressed twice in a moment is pressed.
            if std::mem::replace(before, presses) != presses {
                let reason = *reason;
                heard.push(Marked {
                    source: None,
                    reason,
                });
            }
        }
        let mut commands = Vec::new();
        for marked in heard {
            let names: Vec<Name> = self.lanes.iter().map(|lane| lane.name.clone()).collect();
            commands.extend(desk.mark(&marked, &names, self.clock.now_ms()));
        }
        if let Some((_, disagreed)) = &self.trial {
            for (source, frame) in disagreed.try_iter() {
                commands.extend(desk.disputed(source, frame, self.clock.now_ms()));
            }
        }
        commands
    }

    /// What becomes of a frame, and what a second model is to look at.
    fn look(&mut self, frame: Frame) -> (Option<Command>, Option<Errand>) {
        const NOTHING: (Option<Command>, Option<Errand>) = (None, None);
        let Some(lane) = self.lanes.get_mut(frame.source) else {
            return NOTHING;
        };
        if !lane.gate.pass(frame.number, &frame.picture) {
            self.counters.frames_gated.add(1);
            return NOTHING;
        }
        let engines = self.engines.borrow_and_update().clone();
        let Some(engine) = &engines.active else {
            return NOTHING;
        };
        if *self.model != *engine.id() {
            self.model = engine.id().into();
        }
        // Before anybody has looked at it.
        let drawn = self.samples.as_ref().is_some_and(|(desk, _)| desk.draw());
        let begin = tokio::time::Instant::now();
        let looked = infer(engine, &frame.picture);
        let (outcome, input, ms) = match looked {
            Ok(looked) => looked,
            Err(trouble) => {
                self.counters.frames_bad.add(1);
                tracing::warn!(source = %lane.name, frame = frame.number, error = %trouble, "frame skipped");
                if let (Some(verdict), Some((trial, _))) =
                    (trouble.verdict().filter(|_| engines.watched), &self.trial)
                {
                    trial.say(engines.ticket, verdict);
                }
                return NOTHING;
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
        let now_ms = self.clock.now_ms();
        let finding = lane
            .watcher
            .as_mut()
            .and_then(|watcher| watcher.see(engine, &input, &outcome, now_ms));
        let errand = match &mut self.trial {
            Some((trial, _)) if engines.watched => {
                compare(trial, &engines, &frame, (&outcome, input, ms))
            }
            // Its memory is not needed for what follows.
            _ => {
                drop(input);
                None
            }
        };
        if let (Some(finding), Some((device, drifts))) = (finding, &self.drifts) {
            let (source, model) = (lane.name.clone(), self.model.to_string());
            if finding.changed {
                let names = finding.names();
                tracing::info!(%source, names, "what the source sees has changed");
            }
            let drift = Drift::of(device.clone(), source.clone(), frame.ts, model, &finding);
            drifts.send_modify(|drifts| {
                drifts.insert(source, drift);
                let drifting = drifts.values().filter(|d| !d.names.is_empty()).count();
                self.counters.drifting.set(drifting as u64);
            });
        }
        let published = lane.decider.decide(&outcome.label, now_ms);
        let draft = Draft {
            source: lane.name.clone(),
            frame: frame.number,
            ts: frame.ts,
            label: outcome.label.clone(),
            score: outcome.score,
            margin: outcome.margin,
            model: self.model.clone(),
            latency_ms: latency.as_secs_f32() * 1_000.0,
            file: frame.file,
            truth: frame.truth,
        };
        let kept = self.samples.as_mut().and_then(|(desk, _)| {
            let verdict = desk.judge(frame.source, drawn, &outcome, engine, now_ms);
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
            desk.take(frame.source, &verdict, engine, seen)
        });
        let command = match kept {
            Some(kept) => Some(Command::Keep {
                draft,
                kept,
                again: false,
            }),
            None => published.then_some(Command::Append(draft)),
        };
        (command, errand)
    }
}

/// What a model says about a picture, and how many milliseconds of the processor it took for that.
fn infer(engine: &Engine, picture: &Picture) -> Result<(Outcome, Input, f32), Trouble> {
    let input = update::input(engine, picture)?;
    let (outcome, ms) = update::run(engine, &input)?;
    Ok((outcome, input, ms))
}

/// What the second model is to look at, if it is its turn; else the driver hears of the first one only.
fn compare(
    trial: &mut Trial,
    engines: &Engines,
    frame: &Frame,
    (outcome, input, ms): (&Outcome, Input, f32),
) -> Option<Errand> {
    let other = engines.beside.as_deref();
    let active = update::said(outcome, ms, other);
    let same = |a: &Engine, b: &Engine| {
        let (a, b) = (&a.manifest().input, &b.manifest().input);
        // The name belongs to the graph; the rest makes the values.
        models::InputSpec {
            name: b.name.clone(),
            ..a.clone()
        } == *b
    };
    if !trial.takes(engines) {
        trial.say(engines.ticket, Ok(active));
        return None;
    }
    let same = engines
        .active
        .as_deref()
        .zip(other)
        .is_some_and(|(a, b)| same(a, b));
    let look = if same {
        Look::Input(input)
    } else {
        Look::Picture(frame.picture.clone())
    };
    Some(Errand {
        look,
        frame: (frame.source, frame.number),
        active,
        engines: engines.clone(),
    })
}
