//! gate → preprocess → infer → decide: the thread between the cameras and the outbox.
//!
//! A frame is looked at, and then settled: what was seen becomes a reading, a sample or nothing. Between the two, a
//! neighbour may look at it, too; then results of the same source wait for it in their order, no longer than its deadline.

mod settle;

use std::{
    collections::BTreeMap,
    sync::{
        Arc,
        mpsc::{Receiver, RecvTimeoutError, TryRecvError},
    },
    time::Duration,
};

use mesh_core::{
    Name, SampleReason,
    decide::{Decider, Publish, Rule},
    drift::Drift,
};
use models::{Engine, Input, Outcome, Picture};
use tokio::{
    sync::{mpsc::Sender, watch},
    time::Instant,
};

use self::settle::{Looked, Pending};
use crate::{
    board::BoardHandle,
    capture::Frame,
    clock::Monotonic,
    counters::Counters,
    drift::{DriftConfig, Watcher},
    gate::{Gate, GateConfig},
    offload::{Handoff, Held, Pressure},
    samples::desk::{Desk, Marked},
    store::Command,
    update::{self, Engines, Errand, Look, Trial, Trouble},
};

/// One source, as the pipeline sees it.
struct Lane {
    name: Name,
    gate: Gate,
    decider: Decider,
    /// Is what it sees still what it should see? Nothing where nobody wants to know.
    watcher: Option<Watcher>,
    /// Frames that wait for a neighbour's word on them, or on one before them.
    held: Held<Pending>,
}

/// What was last found about each source, for the uplink.
pub(crate) type Drifts = BTreeMap<Name, Drift>;

/// How soon a mark is heard while the cameras show nothing.
const LISTEN: Duration = Duration::from_millis(200);
/// How soon a neighbour's answer is heard.
const LISTEN_AWAY: Duration = Duration::from_millis(5);
/// A device whose next frame was there already so many times in a row cannot keep up.
const BEHIND: u32 = 8;

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
    /// The way to neighbours that look at frames; nothing where none is asked.
    handoff: Option<Handoff>,
    /// How busy this thread is, for those who would use the processor for somebody else.
    pressure: Pressure,
    /// Frames in a row that were there before they were asked for.
    waited: u32,
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
            held: Held::default(),
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
            handoff: None,
            pressure: Pressure::default(),
            waited: 0,
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

    /// With neighbours that look at frames, if any are asked, and others that want to know how busy the device is.
    #[must_use]
    pub(crate) fn with_offload(self, handoff: Option<Handoff>, pressure: Pressure) -> Self {
        Self {
            handoff,
            pressure,
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
            let frame = self.next(frames);
            let mut commands = self.hear();
            commands.extend(self.settle_held());
            let mut errand = None;
            let mut ends = false;
            match frame {
                Ok(frame) => {
                    let (more, again) = self.look(frame);
                    commands.extend(more);
                    errand = again;
                }
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => {
                    // Nobody waits for a neighbour any more.
                    commands.extend(self.settle_until(u64::MAX));
                    ends = true;
                }
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
            if ends {
                return;
            }
            // The result is on its way: now there is time.
            if let (Some(errand), Some((trial, _))) = (errand, &self.trial) {
                trial.look(errand);
            }
        }
    }

    /// The next frame, for as long as nothing else is to be heard.
    fn next(&mut self, frames: &Receiver<Frame>) -> Result<Frame, RecvTimeoutError> {
        match frames.try_recv() {
            Ok(frame) => {
                self.waited = self.waited.saturating_add(1);
                self.pressure.set_looking(true);
                self.pressure.set_behind(self.waited >= BEHIND);
                return Ok(frame);
            }
            Err(TryRecvError::Disconnected) => return Err(RecvTimeoutError::Disconnected),
            Err(TryRecvError::Empty) => {}
        }
        self.waited = 0;
        self.pressure.set_behind(false);
        self.pressure.set_looking(false);
        let frame = if self.lanes.iter().any(|lane| !lane.held.is_empty()) {
            frames.recv_timeout(LISTEN_AWAY)
        } else if self.samples.is_some() {
            frames.recv_timeout(LISTEN)
        } else {
            frames.recv().map_err(|_| RecvTimeoutError::Disconnected)
        };
        self.pressure.set_looking(frame.is_ok());
        frame
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

    /// What becomes of a frame now, and what a second model is to look at.
    fn look(&mut self, frame: Frame) -> (Vec<Command>, Option<Errand>) {
        const NOTHING: (Vec<Command>, Option<Errand>) = (Vec::new(), None);
        let place = frame.source;
        let Some(lane) = self.lanes.get_mut(place) else {
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
        // Before anybody has looked at it.
        let drawn = self.samples.as_ref().is_some_and(|(desk, _)| desk.draw());
        // What others learn from, or judge a model by, the device looks at itself.
        if let Some(handoff) = self.handoff.as_mut().filter(|_| !drawn && !engines.watched) {
            let behind = self.pressure.is_behind();
            if let Some(away) = handoff.spill(engine, behind, &frame, self.clock.now_ms()) {
                let unseen = Pending::Unseen(Box::new((frame, Instant::now())));
                let bytes = unseen.bytes();
                lane.held.push(unseen, bytes, Some(away));
                return (self.settle_until(self.clock.now_ms()), None);
            }
        }
        let (looked, errand) = self.look_here(frame, drawn, &engines, Instant::now());
        let Some(looked) = looked else {
            return NOTHING;
        };
        let now_ms = self.clock.now_ms();
        let away = self.handoff.as_mut().and_then(|handoff| {
            handoff.escalate(&looked.engine, &looked.outcome, &looked.frame, now_ms)
        });
        let Some(lane) = self.lanes.get_mut(place) else {
            return NOTHING;
        };
        if away.is_none() && lane.held.is_empty() {
            return (self.settle(*looked, None).into_iter().collect(), errand);
        }
        let looked = Pending::Looked(looked);
        let bytes = looked.bytes();
        lane.held.push(looked, bytes, away);
        (self.settle_until(now_ms), errand)
    }

    /// The device's own model looks at a frame. What has to happen at once happens: the reject output waits for nobody,
    /// and obeys nobody but the device.
    fn look_here(
        &mut self,
        frame: Frame,
        drawn: bool,
        engines: &Engines,
        begin: Instant,
    ) -> (Option<Box<Looked>>, Option<Errand>) {
        let (Some(engine), Some(lane)) = (&engines.active, self.lanes.get_mut(frame.source)) else {
            return (None, None);
        };
        if *self.model != *engine.id() {
            self.model = engine.id().into();
        }
        let started = Instant::now();
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
                return (None, None);
            }
        };
        let latency = begin.elapsed();
        let micros = u64::try_from(started.elapsed().as_micros());
        self.counters.latency(micros.unwrap_or(u64::MAX));
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
                compare(trial, engines, &frame, (&outcome, input, ms))
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
        let looked = Looked {
            frame,
            engine: Arc::clone(engine),
            model: self.model.clone(),
            outcome,
            drawn,
            begin,
            latency,
        };
        (Some(Box::new(looked)), errand)
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
