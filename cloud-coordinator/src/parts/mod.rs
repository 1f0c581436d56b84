//! What stands behind the API, part by part: how many requests may be with each at a time, and whether it is well.
//!
//! A part that hangs keeps only its own places; one that fails is not asked for a while ([`breaker`]). Both are told to
//! who asks (503, which part, when to come back), in the metrics, and by `/readyz`.

mod breaker;

use std::{
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore},
    time::{Instant, timeout},
};

use self::breaker::{Breaker, Ticket};
use crate::metrics::Metrics;

/// How long somebody waits for a place: a burst passes by then, and what hangs does not gather requests.
const WAIT: Duration = Duration::from_secs(2);

/// A part, with the places that it has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Name {
    /// `coordinator.db`.
    Readings,
    /// `learning.db`.
    Learning,
    /// `trust.db`.
    Trust,
    /// The object store.
    Images,
    /// Models that are run for somebody.
    Prediction,
    /// Models that are run for devices: theirs are not people's.
    Offload,
    /// What is trained while somebody waits.
    Training,
    /// The external trainer.
    Trainer,
    /// What devices fetch: files of models, and differences between them.
    Releases,
    /// The way to the broker.
    Broker,
    /// The directory of people.
    Directory,
    /// Images and models that people bring, for as long as that takes.
    Imports,
    /// Bodies on their way: who sends slowly keeps a place here, and none where work is done.
    Bodies,
}

/// All of them, as they are declared.
const ALL: [Name; 13] = [
    Name::Readings,
    Name::Learning,
    Name::Trust,
    Name::Images,
    Name::Prediction,
    Name::Offload,
    Name::Training,
    Name::Trainer,
    Name::Releases,
    Name::Broker,
    Name::Directory,
    Name::Imports,
    Name::Bodies,
];

impl Name {
    /// As it is called in metrics.
    pub(crate) const fn as_str(self) -> &'static str {
        match self {
            Self::Readings => "readings",
            Self::Learning => "learning",
            Self::Trust => "trust",
            Self::Images => "images",
            Self::Prediction => "prediction",
            Self::Offload => "offload",
            Self::Training => "training",
            Self::Trainer => "trainer",
            Self::Releases => "releases",
            Self::Broker => "broker",
            Self::Directory => "directory",
            Self::Imports => "imports",
            Self::Bodies => "bodies",
        }
    }

    /// For people.
    pub(crate) const fn words(self) -> &'static str {
        match self {
            Self::Readings => "the database of readings",
            Self::Learning => "the database of samples and models",
            Self::Trust => "the database of who may do what",
            Self::Images => "the store of images",
            Self::Prediction => "the running of models",
            Self::Offload => "the running of models for devices",
            Self::Training => "training",
            Self::Trainer => "the external trainer",
            Self::Releases => "the files of models",
            Self::Broker => "the broker",
            Self::Directory => "the directory of people",
            Self::Imports => "bringing in",
            Self::Bodies => "the way in",
        }
    }

    /// Requests that may be with it at a time. Databases are quick, and a few connections do the work; images and
    /// models take memory: an image 8 MiB, a prediction's body 16 MiB, a frame of a device 2 MiB, a table 64 MiB.
    const fn places(self) -> usize {
        match self {
            Self::Readings | Self::Learning | Self::Trust => 32,
            Self::Images => 24,
            Self::Releases | Self::Bodies => 48,
            Self::Broker | Self::Directory => 16,
            Self::Prediction => 12,
            Self::Offload => 8,
            Self::Imports => 4,
            Self::Training | Self::Trainer => 2,
        }
    }

    /// Requests that may wait for a place. With almost every request somebody asks who that is, which is quick: a burst of
    /// them waits.
    const fn waiting(self) -> usize {
        match self {
            Self::Trust => 128,
            _ => self.places().div_ceil(4),
        }
    }
}

/// Requests that are with a part or wait for one, at most. The door takes more than that: whatever hangs, there is room
/// for what needs none of them.
pub(crate) const PLACES: usize = {
    let (mut sum, mut at) = (0, 0);
    while at < ALL.len() {
        sum += ALL[at].places() + ALL[at].waiting();
        at += 1;
    }
    sum
};

/// Why a part is not asked now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Refused {
    /// All of its places are taken.
    Busy(Name),
    /// It fails; it is asked again after so many seconds.
    Unwell(Name, u64),
}

#[derive(Debug)]
struct Part {
    name: Name,
    places: Arc<Semaphore>,
    waiting: Semaphore,
    breaker: Mutex<Breaker>,
}

/// All parts.
#[derive(Debug)]
pub(crate) struct Parts {
    parts: [Part; ALL.len()],
    metrics: Arc<Metrics>,
    started: Instant,
}

/// A place at a part. Whoever has one says what came of it; who goes without a word is not counted.
#[derive(Debug)]
pub(crate) struct Pass {
    parts: Arc<Parts>,
    name: Name,
    ticket: Option<Ticket>,
    _place: OwnedSemaphorePermit,
}

impl Parts {
    pub(crate) fn new(metrics: Arc<Metrics>) -> Arc<Self> {
        let parts = ALL.map(|name| Part {
            name,
            places: Arc::new(Semaphore::new(name.places())),
            waiting: Semaphore::new(name.waiting()),
            breaker: Mutex::new(Breaker::new()),
        });
        for name in ALL {
            metrics.part_open(name.as_str(), false);
        }
        Arc::new(Self {
            parts,
            metrics,
            started: Instant::now(),
        })
    }

    fn part(&self, name: Name) -> &Part {
        // They are in the order of their declaration.
        &self.parts[name as usize]
    }

    fn now_ms(&self) -> u64 {
        u64::try_from(self.started.elapsed().as_millis()).unwrap_or(u64::MAX)
    }

    /// Does something with a breaker, and tells if it opens or closes.
    fn with<T>(&self, name: Name, act: impl FnOnce(&mut Breaker, u64) -> T) -> T {
        let part = self.part(name);
        let mut breaker: MutexGuard<'_, Breaker> =
            part.breaker.lock().unwrap_or_else(PoisonError::into_inner);
        let before = breaker.is_closed();
        let done = act(&mut breaker, self.now_ms());
        let after = breaker.is_closed();
        drop(breaker);
        if before != after {
            self.metrics.part_open(name.as_str(), !after);
            if after {
                tracing::info!(part = name.as_str(), "{} is well again", name.words());
            } else {
                tracing::warn!(
                    part = name.as_str(),
                    "{} fails: nobody asks it for a while",
                    name.words()
                );
            }
        }
        done
    }

    /// A place, at once or soon; or why there is none.
    pub(crate) async fn enter(self: &Arc<Self>, name: Name) -> Result<Pass, Refused> {
        self.look(name)
            .inspect_err(|refused| self.refuse(*refused))?;
        let Some(place) = self.place(name).await else {
            let busy = Refused::Busy(name);
            self.refuse(busy);
            return Err(busy);
        };
        let asked = self.with(name, Breaker::ask);
        let ticket = asked.map_err(|wait_ms| {
            let refused = unwell(name, wait_ms);
            self.refuse(refused);
            refused
        })?;
        Ok(Pass {
            parts: self.clone(),
            name,
            ticket: Some(ticket),
            _place: place,
        })
    }

    async fn place(&self, name: Name) -> Option<OwnedSemaphorePermit> {
        let part = self.part(name);
        if let Ok(place) = part.places.clone().try_acquire_owned() {
            return Some(place);
        }
        let _waiting = part.waiting.try_acquire().ok()?;
        timeout(WAIT, part.places.clone().acquire_owned())
            .await
            .ok()?
            .ok()
    }

    /// Whether it would be asked, without asking it.
    pub(crate) fn look(&self, name: Name) -> Result<(), Refused> {
        let wait = self.with(name, |breaker, now| breaker.wait(now));
        wait.map_or(Ok(()), |wait_ms| Err(unwell(name, wait_ms)))
    }

    /// Counts a refusal.
    pub(crate) fn refuse(&self, refused: Refused) {
        let (name, reason) = match refused {
            Refused::Busy(name) => (name, "busy"),
            Refused::Unwell(name, _) => (name, "unwell"),
        };
        self.metrics.part_refused(name.as_str(), reason);
    }

    /// Somebody who was with another part found that this one fails.
    pub(crate) fn noticed(&self, name: Name) {
        self.metrics.part_failed(name.as_str());
        self.with(name, Breaker::noticed);
    }

    /// Those that are not asked now.
    pub(crate) fn unwell(&self) -> Vec<Name> {
        let open = |part: &&Part| !self.with(part.name, |breaker, _| breaker.is_closed());
        self.parts
            .iter()
            .filter(open)
            .map(|part| part.name)
            .collect()
    }
}

fn unwell(name: Name, wait_ms: u64) -> Refused {
    Refused::Unwell(name, wait_ms.div_ceil(1_000).max(1))
}

impl Pass {
    /// What came of it.
    pub(crate) fn settle(mut self, well: bool) {
        let Some(ticket) = self.ticket.take() else {
            return;
        };
        let (parts, name) = (&self.parts, self.name);
        if well {
            parts.with(name, |breaker, _| breaker.well(ticket));
        } else {
            parts.metrics.part_failed(name.as_str());
            parts.with(name, |breaker, now| breaker.failed(ticket, now));
        }
    }
}

impl Drop for Pass {
    fn drop(&mut self) {
        if let Some(ticket) = self.ticket.take() {
            let lost = |breaker: &mut Breaker, now| breaker.lost(ticket, now);
            self.parts.with(self.name, lost);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_is_found_under_its_name() {
        let parts = Parts::new(Metrics::shared());
        for name in ALL {
            assert_eq!(parts.part(name).name, name);
        }
    }

    #[tokio::test(start_paused = true)]
    async fn one_that_hangs_keeps_its_own_places_only() {
        let parts = Parts::new(Metrics::shared());
        let mut held = Vec::new();
        for _ in 0..Name::Images.places() {
            held.push(parts.enter(Name::Images).await.unwrap());
        }
        let refused = parts.enter(Name::Images).await.map(drop);
        assert_eq!(refused, Err(Refused::Busy(Name::Images)));
        for name in ALL.into_iter().filter(|name| *name != Name::Images) {
            parts.enter(name).await.unwrap().settle(true);
        }
        held.pop();
        parts.enter(Name::Images).await.unwrap().settle(true);
        assert_eq!(parts.unwell(), []);
        let text = parts.metrics.text();
        let line = "lacewing_part_refused_total{part=\"images\",reason=\"busy\"} 1";
        assert!(text.contains(line), "{text}");
    }

    #[tokio::test(start_paused = true)]
    async fn one_that_fails_is_left_alone_and_tried_again() {
        let parts = Parts::new(Metrics::shared());
        for _ in 0..breaker::FAILURES {
            parts.enter(Name::Broker).await.unwrap().settle(false);
        }
        let refused = parts.enter(Name::Broker).await.map(drop);
        assert_eq!(refused, Err(Refused::Unwell(Name::Broker, 1)));
        assert_eq!(parts.unwell(), [Name::Broker]);
        assert!(
            parts
                .metrics
                .text()
                .contains("lacewing_part_open{part=\"broker\"} 1")
        );
        tokio::time::advance(Duration::from_millis(breaker::FIRST_MS)).await;
        let first = parts.enter(Name::Broker).await.unwrap();
        assert!(parts.enter(Name::Broker).await.is_err(), "one at a time");
        // Who tried has gone: the next may.
        drop(first);
        parts.enter(Name::Broker).await.unwrap().settle(true);
        assert_eq!(parts.unwell(), []);
        assert!(
            parts
                .metrics
                .text()
                .contains("lacewing_part_open{part=\"broker\"} 0")
        );
    }
}
