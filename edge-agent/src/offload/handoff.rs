//! The pipeline's end: which frames leave, and what came of them.

use std::{
    sync::{
        Arc,
        mpsc::{Receiver, SyncSender, sync_channel},
    },
    time::Duration,
};

use mesh_core::offload::{
    Answered, Offer,
    ask::{Asker, Heard, Known, MAX_AWAY},
};
use models::{Engine, Outcome};
use tokio::{
    sync::{mpsc, watch},
    time::Instant,
};

use super::{
    Away, OffloadConfig, Thermometer,
    courier::{Errand, Returned},
    offer_of,
    picture::Shown,
};
use crate::{capture::Frame, counters::Counters};

/// Hands frames to the courier and hears of them.
pub(crate) struct Handoff {
    asker: Asker,
    deadline_ms: u32,
    /// The model in use, and what it would be to others.
    own: Option<(Arc<Engine>, Option<Offer>)>,
    known: watch::Receiver<Vec<Known>>,
    errands: mpsc::Sender<Errand>,
    returned: Receiver<Returned>,
    thermometer: Thermometer,
    number: u64,
    counters: Counters,
}

/// The courier's ends.
pub(crate) struct Ends {
    pub(crate) errands: mpsc::Receiver<Errand>,
    pub(crate) returned: SyncSender<Returned>,
    pub(crate) known: watch::Sender<Vec<Known>>,
}

impl Handoff {
    /// Nobody answers yet.
    pub(crate) fn new(config: &OffloadConfig, counters: Counters) -> (Self, Ends) {
        let (to_courier, errands) = mpsc::channel(MAX_AWAY);
        let (back, returned) = sync_channel(MAX_AWAY);
        let (tell, known) = watch::channel(Vec::new());
        let handoff = Self {
            asker: Asker::new(config.asking()),
            deadline_ms: config.deadline_ms,
            own: None,
            known,
            errands: to_courier,
            returned,
            thermometer: Thermometer::default(),
            number: 0,
            counters,
        };
        let ends = Ends {
            errands,
            returned: back,
            known: tell,
        };
        (handoff, ends)
    }

    /// The frame was looked at here; is somebody asked, too?
    pub(crate) fn escalate(
        &mut self,
        engine: &Arc<Engine>,
        outcome: &Outcome,
        frame: &Frame,
        now_ms: u64,
    ) -> Option<Away> {
        let own = self.own(engine)?;
        let chosen = self.asker.escalate(&own, outcome.margin, now_ms)?;
        self.send(chosen, engine, frame, now_ms)
    }

    /// Is the frame left to somebody else? `behind`: others wait.
    pub(crate) fn spill(
        &mut self,
        engine: &Arc<Engine>,
        behind: bool,
        frame: &Frame,
        now_ms: u64,
    ) -> Option<Away> {
        let own = self.own(engine)?;
        let warmth = self.thermometer.read(now_ms);
        let chosen = self.asker.spill(&own, behind, warmth, now_ms)?;
        self.send(chosen, engine, frame, now_ms)
    }

    /// What came back since the last time: numbers, and answers where there are any. `waits` says whether anybody still
    /// waits for a number, and takes the answer.
    pub(crate) fn hear(
        &mut self,
        now_ms: u64,
        mut waits: impl FnMut(u64, Option<Answered>) -> bool,
    ) {
        if self.known.has_changed().unwrap_or(false) {
            let known = self.known.borrow_and_update().clone();
            self.asker.know(known);
        }
        for returned in self.returned.try_iter() {
            let Returned {
                number,
                peer,
                heard,
                answer,
            } = returned;
            self.asker.heard(&peer, heard, now_ms);
            let in_time = waits(number, answer);
            let numbers = &self.counters.offload;
            match heard {
                Heard::Answered(_) if in_time => numbers.answered.add(1),
                Heard::Refused => numbers.refused.add(1),
                _ => numbers.late.add(1),
            }
        }
    }

    /// What the device's own model is; found out once for each.
    fn own(&mut self, engine: &Arc<Engine>) -> Option<Offer> {
        let is_same = self
            .own
            .as_ref()
            .is_some_and(|(known, _)| Arc::ptr_eq(known, engine));
        if !is_same {
            self.own = Some((Arc::clone(engine), offer_of(engine.manifest())));
        }
        self.own.as_ref().and_then(|(_, offer)| offer.clone())
    }

    fn send(
        &mut self,
        chosen: mesh_core::offload::ask::Chosen,
        engine: &Arc<Engine>,
        frame: &Frame,
        now_ms: u64,
    ) -> Option<Away> {
        self.number += 1;
        let deadline = Duration::from_millis(self.deadline_ms.into());
        let errand = Errand {
            number: self.number,
            chosen,
            shown: match &frame.original {
                Some(file) => Shown::File(file.clone()),
                None => Shown::Pixels(frame.picture.clone()),
            },
            until: Instant::now() + deadline,
            engine: Arc::clone(engine),
        };
        self.counters.offload.asked.add(1);
        if self.errands.try_send(errand).is_err() {
            // The agent stops.
            self.asker.heard(&chosen.peer, Heard::Missed, now_ms);
            self.counters.offload.late.add(1);
            return None;
        }
        Some(Away {
            number: self.number,
            until_ms: now_ms + u64::from(self.deadline_ms),
        })
    }
}
