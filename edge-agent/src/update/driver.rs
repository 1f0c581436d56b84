//! Carries out what [`mesh_core::update`] decides, and tells it what happens.

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    path::Path,
    sync::Arc,
    time::Duration,
};

use mesh_core::{
    Desired, Digest, Phase, Release, Reported,
    update::{Action, Health, Input, Saved, Since, Update},
};
use models::Engine;
use tokio::{
    sync::{mpsc::Receiver, watch},
    task::JoinHandle,
    time::{Instant, sleep_until},
};
use tokio_util::sync::CancellationToken;

use super::{
    News,
    disk::Disk,
    engines::{Check, Engines, LoadError, Wanted, load},
    worker::{Job, Slot},
};
use crate::{
    clock::{Monotonic, WallClock},
    counters::resident_bytes,
    dice,
};

/// How often the device looks after its own health: a leak or heat shows over minutes.
const HEALTH: Duration = Duration::from_secs(5);
/// A disk that cannot be written is tried again after this.
const AFTER_FAILURE: Duration = Duration::from_secs(30);
/// Where the kernel shows what the board's sensors say.
const THERMAL: &str = "/sys/class/thermal";

/// What the driver starts from.
pub(super) struct Start {
    pub(super) disk: Disk,
    pub(super) saved: Saved,
    /// What has happened since that was written.
    pub(super) since: Since,
    /// Why the factory model cannot be used.
    pub(super) trouble: Option<String>,
    pub(super) slot: Arc<Slot>,
    pub(super) news: Receiver<News>,
    pub(super) desired: watch::Receiver<Option<Desired>>,
    pub(super) engines: watch::Sender<Engines>,
    pub(super) reported: watch::Sender<Option<Reported>>,
    pub(super) wanted: Wanted,
    pub(super) wall: WallClock,
}

/// Models to have in memory.
#[derive(Clone, Debug)]
struct Run {
    active: Option<Release>,
    beside: Option<Release>,
    share: f32,
    ticket: u64,
}

type Loaded = Vec<(Digest, Result<Arc<Engine>, LoadError>)>;

/// Everything that can happen to the driver.
enum Event {
    News(News),
    Loaded(Loaded),
    Desired,
    Health,
    Due,
    Stop,
}

/// The task's state.
pub(super) struct Driver {
    start: Start,
    update: Update,
    /// What the disk has for certain; `start.saved` is what it had at first.
    saved: Saved,
    /// The models in memory.
    memory: BTreeMap<Digest, Arc<Engine>>,
    /// Those that passed their self-test since the agent started.
    tested: BTreeSet<Digest>,
    /// The test that runs.
    testing: Option<(u64, Digest)>,
    /// Models on their way into memory, and what they are for.
    loading: Option<(Run, JoinHandle<Loaded>)>,
    /// The disk cannot be written; the machine begins again then.
    stuck: Option<Instant>,
    clock: Monotonic,
}

impl Driver {
    /// Goes on from what was saved, and waits until a model is in memory or none can be had.
    pub(super) async fn begin(start: Start) -> Self {
        let clock = Monotonic::start();
        let saved = start.saved.clone();
        let (update, actions) =
            Update::resume(saved.clone(), start.since, clock.now_ms(), dice::throw());
        let mut driver = Self {
            start,
            update,
            saved,
            memory: BTreeMap::new(),
            tested: BTreeSet::new(),
            testing: None,
            loading: None,
            stuck: None,
            clock,
        };
        driver.feel().await;
        driver.execute(actions).await;
        while driver.loading.is_some() {
            let loaded = loaded(&mut driver.loading).await;
            driver.arrived(loaded).await;
        }
        driver
    }

    /// Drives until `stop`.
    pub(super) async fn run(mut self, stop: CancellationToken) {
        let mut health = tokio::time::interval(HEALTH);
        health.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            let due = match self.stuck {
                Some(at) => Some(at),
                None => self.update.due_ms().map(|at| self.clock.at(at)),
            };
            let event = tokio::select! {
                biased;
                () = stop.cancelled() => Event::Stop,
                Ok(()) = self.start.desired.changed() => Event::Desired,
                loaded = loaded(&mut self.loading) => Event::Loaded(loaded),
                () = at(due) => Event::Due,
                _ = health.tick() => Event::Health,
                Some(news) = self.start.news.recv() => Event::News(news),
            };
            match event {
                Event::Stop => break,
                Event::Desired => {
                    let desired = self.start.desired.borrow_and_update().clone();
                    if let Some(desired) = desired {
                        self.give(Input::Desired(Box::new(desired))).await;
                    }
                }
                Event::Loaded(loaded) => self.arrived(loaded).await,
                Event::Due => self.due().await,
                Event::Health => self.feel().await,
                Event::News(news) => self.hear(news).await,
            }
        }
        self.give(Input::Stopping).await;
        self.start.slot.close();
    }

    async fn give(&mut self, input: Input) {
        if self.stuck.is_some() {
            return;
        }
        let actions = self.update.step(input, self.clock.now_ms());
        self.execute(actions).await;
    }

    async fn due(&mut self) {
        if self.stuck.take().is_none() {
            return self.give(Input::Tick).await;
        }
        let now_ms = self.clock.now_ms();
        let saved = self.saved.clone();
        let (update, actions) = Update::resume(saved, Since::SameLife, now_ms, dice::throw());
        self.update = update;
        // What was wished in the meantime is heard now.
        self.start.desired.mark_changed();
        self.execute(actions).await;
    }

    async fn feel(&mut self) {
        let mib = u32::try_from(resident_bytes() >> 20).unwrap_or(u32::MAX);
        let health = Health {
            memory_mib: (mib > 0).then_some(mib),
            temperature_c: hottest(Path::new(THERMAL)),
        };
        self.give(Input::Health(health)).await;
    }

    async fn hear(&mut self, news: News) {
        match news {
            News::Progress { ticket, share } => self.give(Input::Progress { ticket, share }).await,
            News::Done { ticket, result } => {
                if let Some((_, digest)) = self.testing.take_if(|(testing, _)| *testing == ticket)
                    && result.is_ok()
                {
                    self.tested.insert(digest);
                }
                self.give(Input::Done { ticket, result }).await;
            }
            News::Frame {
                ticket,
                active,
                beside,
            } => {
                let shadowing = self.update.phase() == Phase::Shadowing;
                let input = match (active, beside) {
                    // The one on trial failed: active while it is watched, else the one beside.
                    (Err(failure), _) if !shadowing => Input::Done {
                        ticket,
                        result: Err(failure),
                    },
                    (Ok(_), Some(Err(failure))) if shadowing => Input::Done {
                        ticket,
                        result: Err(failure),
                    },
                    (Err(_), _) => return,
                    (Ok(active), beside) => Input::Frame {
                        ticket,
                        active,
                        beside: beside.and_then(Result::ok),
                    },
                };
                self.give(input).await;
            }
        }
    }

    /// Carries out actions, and those that follow from them, in their order.
    async fn execute(&mut self, actions: Vec<Action>) {
        let mut left = VecDeque::from(actions);
        while let Some(action) = left.pop_front() {
            match action {
                Action::Save(saved) => {
                    if !self.save(*saved).await {
                        return;
                    }
                }
                Action::Fetch { release, ticket } => {
                    self.order(Job::Fetch(release), ticket);
                }
                Action::Verify {
                    release,
                    force,
                    ticket,
                } => {
                    let current = self.saved.current.clone();
                    let job = Job::Verify {
                        release,
                        force,
                        current,
                    };
                    self.order(job, ticket);
                }
                Action::Test { release, ticket } => {
                    self.testing = Some((ticket, release.digest));
                    self.order(Job::Test(release), ticket);
                }
                Action::Run {
                    active,
                    beside,
                    share,
                    ticket,
                } => {
                    let run = Run {
                        active,
                        beside,
                        share,
                        ticket,
                    };
                    left.extend(self.bring_to_memory(run));
                }
                Action::Retain(needed) => {
                    let under_way = self.update.saved().wanted().cloned();
                    self.start.slot.retain(needed, under_way);
                }
                Action::Report => {
                    let report = self.update.report(self.start.wall.now_ms());
                    self.start.reported.send_replace(Some(report));
                }
            }
        }
    }

    fn order(&self, job: Job, ticket: u64) {
        let current = self.saved.current.as_ref().map(|release| release.digest);
        self.start.slot.put(job, ticket, current);
    }

    /// Saves durably. If that cannot be done nothing that follows is, and the machine begins again later from what was
    /// saved last.
    async fn save(&mut self, saved: Saved) -> bool {
        let (disk, copy) = (self.start.disk.clone(), saved.clone());
        let done = tokio::task::spawn_blocking(move || disk.save(&copy)).await;
        let why = match done {
            Ok(Ok(())) => {
                self.saved = saved;
                return true;
            }
            Ok(Err(error)) => error.to_string(),
            Err(error) => error.to_string(),
        };
        tracing::error!("{why}; no model is exchanged until that works");
        self.stuck = Some(Instant::now() + AFTER_FAILURE);
        // Whatever is in memory goes on; a device that has just started needs one first.
        if self.memory.is_empty() && self.loading.is_none() {
            let run = Run {
                active: self.saved.current.clone(),
                beside: None,
                share: 0.0,
                ticket: 0,
            };
            let _ = self.bring_to_memory(run);
        }
        false
    }

    /// Swaps at once if the models are in memory, else loads them first. Gives what follows from that.
    fn bring_to_memory(&mut self, run: Run) -> Vec<Action> {
        // Whatever was on its way is of no interest any more.
        self.loading = None;
        let models = [&run.active, &run.beside].into_iter().flatten();
        let missing: Vec<_> = models
            .filter(|release| !self.memory.contains_key(&release.digest))
            .map(|release| (release.clone(), self.check(release)))
            .collect();
        if missing.is_empty() {
            return self.swap(run, Vec::new());
        }
        let disk = self.start.disk.clone();
        let task = tokio::task::spawn_blocking(move || {
            let one =
                |(release, check): (Release, _)| (release.digest, load(&disk, &release, check));
            missing.into_iter().map(one).collect()
        });
        self.loading = Some((run, task));
        Vec::new()
    }

    fn check(&self, release: &Release) -> Check {
        if self.tested.contains(&release.digest) {
            Check::Nothing
        } else if self.start.disk.is_factory(release) {
            Check::Everything
        } else {
            Check::Answers
        }
    }

    /// Models have been loaded, or not.
    async fn arrived(&mut self, loaded: Loaded) {
        let Some((run, _)) = self.loading.take() else {
            return;
        };
        let actions = self.swap(run, loaded);
        self.execute(actions).await;
        // A trial may be over before the next regular look at what the models take.
        self.feel().await;
    }

    fn swap(&mut self, run: Run, loaded: Loaded) -> Vec<Action> {
        let mut failed = BTreeMap::new();
        for (digest, result) in loaded {
            match result {
                Ok(engine) => drop(self.memory.insert(digest, engine)),
                Err(error) => {
                    tracing::error!("{error}");
                    failed.insert(digest, error);
                }
            }
        }
        let get = |release: &Option<Release>| {
            let engine = self.memory.get(&release.as_ref()?.digest);
            engine.cloned()
        };
        let error = |release: &Option<Release>| {
            let release = release
                .as_ref()
                .filter(|r| !self.memory.contains_key(&r.digest))?;
            Some(failed.get(&release.digest).unwrap_or(&LoadError::Thread))
        };
        let phase = self.update.phase();
        let (active, beside) = (get(&run.active), get(&run.beside));
        let mut result = Ok(());
        let mut why = None;
        if let Some(error) = error(&run.active) {
            result = Err(error.failure());
            why = Some(match &self.start.trouble {
                Some(trouble) => trouble.as_str().into(),
                None => error.to_string().into(),
            });
        } else if run.active.is_none() {
            why = self.start.trouble.as_deref().map(Into::into);
        }
        if let Some(error) = error(&run.beside)
            && phase == Phase::Shadowing
        {
            result = Err(error.failure());
        }
        for engine in [&active, &beside].into_iter().flatten() {
            self.start.wanted.fit(engine);
        }
        let beside = beside.filter(|_| active.is_some());
        let kept = [&run.active, &run.beside];
        self.memory.retain(|digest, _| {
            kept.iter()
                .any(|r| r.as_ref().is_some_and(|r| r.digest == *digest))
        });
        self.start.engines.send_replace(Engines {
            active,
            beside,
            share: run.share,
            ticket: run.ticket,
            watched: matches!(
                phase,
                Phase::Shadowing | Phase::Activating | Phase::Watching
            ),
            why,
        });
        if self.stuck.is_some() {
            return Vec::new();
        }
        let ticket = run.ticket;
        self.update
            .step(Input::Done { ticket, result }, self.clock.now_ms())
    }
}

/// What the hottest of the board's sensors says, in °C: boards have one for the processor, one for the graphics, …, in any
/// order. Nothing where there is none.
fn hottest(thermal: &Path) -> Option<f32> {
    let zones = std::fs::read_dir(thermal).ok()?.filter_map(Result::ok);
    let zones = zones.filter(|zone| {
        zone.file_name()
            .to_string_lossy()
            .starts_with("thermal_zone")
    });
    let celsius = zones.filter_map(|zone| {
        let text = std::fs::read_to_string(zone.path().join("temp")).ok()?;
        let thousandths: f32 = text.trim().parse().ok()?;
        Some(thousandths / 1_000.0)
    });
    celsius.reduce(f32::max)
}

/// Waits for models on their way.
async fn loaded(loading: &mut Option<(Run, JoinHandle<Loaded>)>) -> Loaded {
    match loading {
        Some((_, task)) => task.await.unwrap_or_else(|error| {
            tracing::error!(%error, "a model was not loaded");
            Vec::new()
        }),
        None => std::future::pending().await,
    }
}

async fn at(instant: Option<Instant>) {
    match instant {
        Some(instant) => sleep_until(instant).await,
        None => std::future::pending().await,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_hottest_sensor_counts() {
        let root = tempfile::tempdir().unwrap();
        assert_eq!(hottest(&root.path().join("none")), None);
        assert_eq!(hottest(root.path()), None);
        for (zone, says) in [
            ("thermal_zone0", "41000\n"),
            ("thermal_zone1", "78250\n"),
            ("thermal_zone2", "broken"),
            ("cooling_device0", "99000\n"),
        ] {
            let folder = root.path().join(zone);
            std::fs::create_dir(&folder).unwrap();
            std::fs::write(folder.join("temp"), says).unwrap();
        }
        assert_eq!(hottest(root.path()), Some(78.25));
    }
}
