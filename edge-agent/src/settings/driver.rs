//! Carries out what [`mesh_core::settings`] decides while the agent runs, and tells it what happens.

use std::{collections::BTreeSet, sync::PoisonError, time::Duration};

use mesh_core::{
    Desired, Failure, Name, Reason, Settings, SettingsReport,
    settings::{Action, Input, Seen},
};
use tokio::{
    sync::{mpsc, watch},
    time::{Instant, sleep_until},
};
use tokio_util::sync::CancellationToken;

use super::{Life, compose};
use crate::{counters::Counters, identity::Tls, update};

/// A disk that cannot be written is tried again after this.
const AFTER_FAILURE: Duration = Duration::from_secs(30);
/// Answers of fetches that nobody waits for any more are dropped.
const ANSWERS: usize = 4;

/// What connects the driver with the rest of the agent.
pub(crate) struct Ends {
    /// What the coordinator wishes.
    pub(crate) desired: watch::Receiver<Option<Desired>>,
    /// Is the broker there?
    pub(crate) connected: watch::Receiver<bool>,
    /// Which sources work.
    pub(crate) works: watch::Receiver<BTreeSet<Name>>,
    /// What the device says in answer, and since when.
    pub(crate) reported: watch::Sender<Option<(i64, SettingsReport)>>,
    /// Cancelled when the agent is to start anew.
    pub(crate) again: CancellationToken,
    /// What the coordinator is spoken to with.
    pub(crate) tls: Tls,
    /// What is counted.
    pub(crate) counters: Counters,
}

type Answer = (u64, Result<(), Failure>);

/// The task's state.
pub(crate) struct Driver {
    life: Life,
    ends: Ends,
    answer: mpsc::Sender<Answer>,
    answers: mpsc::Receiver<Answer>,
    /// When the disk is tried again.
    retry: Option<Instant>,
}

impl Driver {
    pub(crate) fn new(life: Life, ends: Ends) -> Self {
        let (answer, answers) = mpsc::channel(ANSWERS);
        let retry = life.stuck.then(|| Instant::now() + AFTER_FAILURE);
        Self {
            life,
            ends,
            answer,
            answers,
            retry,
        }
    }

    /// Drives until `stop`. The agent runs.
    pub(crate) async fn run(mut self, stop: CancellationToken) {
        self.give(Input::Running);
        loop {
            let due = match self.retry {
                Some(at) => Some(at),
                None => {
                    let due = self.life.adoption.due_ms();
                    due.map(|at| self.life.clock.at(at))
                }
            };
            tokio::select! {
                biased;
                () = stop.cancelled() => break,
                Ok(()) = self.ends.desired.changed() => {
                    let wish = self.ends.desired.borrow_and_update().clone();
                    if let Some(Desired { revision, settings, .. }) = wish {
                        self.give(Input::Wish { revision, settings });
                    }
                }
                Ok(()) = self.ends.connected.changed() => self.see(),
                Ok(()) = self.ends.works.changed() => self.see(),
                Some((ticket, result)) = self.answers.recv() => self.give(Input::Done { ticket, result }),
                () = at(due) => self.due(),
            }
        }
        self.give(Input::Stopping);
    }

    fn see(&mut self) {
        let seen = Seen {
            connected: *self.ends.connected.borrow_and_update(),
            sources: self.ends.works.borrow_and_update().clone(),
        };
        self.give(Input::Seen(seen));
    }

    fn due(&mut self) {
        if self.retry.take().is_none() {
            return self.give(Input::Tick);
        }
        // Writing down once more what is there already changes nothing; if it works, the agent begins again from it.
        match self.life.disk.save(&self.life.saved) {
            Ok(()) => self.ends.again.cancel(),
            Err(_) => self.retry = Some(Instant::now() + AFTER_FAILURE),
        }
    }

    fn give(&mut self, input: Input) {
        if self.life.stuck {
            return;
        }
        let actions = self.life.adoption.step(input, self.life.clock.now_ms());
        for action in actions {
            match action {
                Action::Save(saved) => {
                    // A few hundred bytes, some times in a year.
                    if !self.life.save(*saved) {
                        self.retry = Some(Instant::now() + AFTER_FAILURE);
                        return;
                    }
                }
                Action::Fetch { settings, ticket } => self.fetch(settings, ticket),
                Action::Restart => self.ends.again.cancel(),
                Action::Retain(needed) => self.life.disk.retain(&needed),
                Action::Report => {
                    let report = self.life.adoption.report();
                    if let Some(failure) = &report.failure {
                        let reason = failure.reason.as_str();
                        tracing::warn!(reason, "settings: {}", failure.detail);
                    }
                    let now = self.life.home.wall.now_ms();
                    self.ends.reported.send_replace(Some((now, report)));
                }
                // Only before the agent starts.
                Action::Load { .. } => {}
            }
        }
    }

    /// On a thread of its own, that nobody waits for when the agent stops.
    fn fetch(&self, settings: Settings, ticket: u64) {
        let (home, disk, own) = (
            self.life.home.clone(),
            self.life.disk.clone(),
            self.life.own.clone(),
        );
        let counters = self.ends.counters.clone();
        let tls = self.ends.tls.clone();
        let answer = self.answer.clone();
        let work = move || {
            let _one = home.fetching.lock().unwrap_or_else(PoisonError::into_inner);
            let now_ms = home.wall.now_ms();
            let result = update::settings(&own, &settings, disk.registry(), counters, tls, now_ms)
                .and_then(|bytes| {
                    compose(&home.layers, &own, &settings, &bytes)?;
                    disk.keep(settings.digest, &bytes)
                });
            // Closed: the agent has stopped.
            let _ = answer.blocking_send((ticket, result));
        };
        let started = std::thread::Builder::new()
            .name("settings".into())
            .spawn(work);
        if let Err(error) = started {
            let failure = Failure::new(Reason::Fetch, &format!("no thread: {error}"));
            let _ = self.answer.try_send((ticket, Err(failure)));
        }
    }
}

async fn at(instant: Option<Instant>) {
    match instant {
        Some(instant) => sleep_until(instant).await,
        None => std::future::pending().await,
    }
}
