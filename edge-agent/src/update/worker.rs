//! The thread that fetches, verifies and tests. Only the latest job counts: a newer one ends those before it.

use std::{
    ffi::OsString,
    panic::{AssertUnwindSafe, catch_unwind},
    path::PathBuf,
    sync::{
        Arc, Condvar, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use mesh_core::{Digest, Failure, Reason, Release};
use models::{Bundle, Fault, digest_of, try_bundle};
use tokio::sync::mpsc::Sender;

use super::{
    News,
    client::Client,
    disk::{DOCUMENT, Disk, is_file},
    error::UpdateError,
    fetch::{self, Fetch},
    swarm::Swarm,
};
use crate::{clock::WallClock, counters::Counters, identity::Tls};

/// The self-test of a large model on a small board takes half a minute.
const TEST: Duration = Duration::from_secs(120);
/// After so many failed fetches of a release its model comes in chunks, which can be resumed.
const MAX_DELTA_FAILURES: u32 = 2;

/// Something for the thread to do.
#[derive(Clone, Debug)]
pub(super) enum Job {
    /// Bring a release.
    Fetch(Release),
    /// Check every byte of it, and that it does not lead back, unless that is meant.
    Verify {
        release: Release,
        force: bool,
        current: Option<Release>,
    },
    /// Try it in a process of its own.
    Test(Release),
}

/// What waits for the thread.
#[derive(Debug, Default)]
struct Waiting {
    /// Models that stay, and the one that is under way: everything else goes, before the job.
    retain: Option<(Vec<Release>, Option<Release>)>,
    /// The job, its ticket and the model that runs.
    job: Option<(Job, u64, Option<Digest>)>,
    closed: bool,
}

/// Where jobs are left for the thread.
#[derive(Debug, Default)]
pub(super) struct Slot {
    waiting: Mutex<Waiting>,
    wake: Condvar,
    /// Grows with everything that is left here.
    newest: AtomicU64,
}

impl Slot {
    /// Leaves a job, in place of any that waits or runs.
    pub(super) fn put(&self, job: Job, ticket: u64, current: Option<Digest>) {
        self.change(|waiting| waiting.job = Some((job, ticket, current)));
    }

    /// Only these stay. Ends what waits or runs.
    pub(super) fn retain(&self, needed: Vec<Release>, under_way: Option<Release>) {
        self.change(|waiting| {
            waiting.retain = Some((needed, under_way));
            waiting.job = None;
        });
    }

    /// The thread ends as soon as it can.
    pub(super) fn close(&self) {
        self.change(|waiting| waiting.closed = true);
    }

    fn change(&self, with: impl FnOnce(&mut Waiting)) {
        let mut waiting = self.lock();
        with(&mut waiting);
        self.newest.fetch_add(1, Ordering::Relaxed);
        self.wake.notify_all();
    }

    fn lock(&self) -> MutexGuard<'_, Waiting> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits for something to do; nothing at the end. With it comes how new it is.
    fn next(&self) -> Option<(Waiting, u64)> {
        let mut waiting = self.lock();
        loop {
            if waiting.closed {
                return None;
            }
            if waiting.retain.is_some() || waiting.job.is_some() {
                let newest = self.newest.load(Ordering::Relaxed);
                return Some((std::mem::take(&mut *waiting), newest));
            }
            waiting = self
                .wake
                .wait(waiting)
                .unwrap_or_else(PoisonError::into_inner);
        }
    }
}

/// Looks out for something newer while a job runs, and says how far it is.
#[derive(Clone, Debug)]
pub(super) struct Watchful {
    slot: Arc<Slot>,
    newest: u64,
    ticket: u64,
    tell: Sender<News>,
}

impl Watchful {
    #[cfg(test)]
    pub(super) fn of_test(tell: Sender<News>) -> Self {
        Self {
            slot: Arc::default(),
            newest: 0,
            ticket: 0,
            tell,
        }
    }

    #[cfg(test)]
    pub(super) fn overtake(&self) {
        self.slot.close();
    }

    pub(super) fn is_overtaken(&self) -> bool {
        self.slot.newest.load(Ordering::Relaxed) != self.newest
    }

    /// So many bytes of so many are there.
    pub(super) fn progress(&self, done: u64, total: u64) {
        let share = done as f32 / total.max(1) as f32;
        // The next one says more.
        let _ = self.tell.try_send(News::Progress {
            ticket: self.ticket,
            share,
        });
    }
}

/// The thread's state.
pub(super) struct Worker {
    pub(super) disk: Disk,
    pub(super) coordinator: Option<String>,
    /// What the coordinator is spoken to with.
    pub(super) tls: Tls,
    pub(super) root: Option<PathBuf>,
    /// A file and its first arguments that lead to [`models::try_here`].
    pub(super) program: Vec<OsString>,
    pub(super) tell: Sender<News>,
    pub(super) clock: WallClock,
    pub(super) counters: Counters,
    /// What neighbours have, where there are any.
    pub(super) swarm: Option<Swarm>,
    /// The release whose fetch failed last, and how often.
    pub(super) failing: Option<(Digest, u32)>,
}

impl Worker {
    /// Works until the slot is closed. Blocks: it has a thread of its own.
    pub(super) fn run(mut self, slot: Arc<Slot>) {
        self.look_over();
        while let Some((waiting, newest)) = slot.next() {
            if let Some((needed, under_way)) = waiting.retain
                && let Err(error) = self.disk.retain(&needed, under_way.as_ref())
            {
                tracing::warn!(%error, "models that are not needed stay");
            }
            self.look_over();
            let Some((job, ticket, current)) = waiting.job else {
                continue;
            };
            let watchful = Watchful {
                slot: Arc::clone(&slot),
                newest,
                ticket,
                tell: self.tell.clone(),
            };
            let done = catch_unwind(AssertUnwindSafe(|| self.work(&job, current, &watchful)));
            let result = done.unwrap_or_else(|_| {
                let words = "the agent gave up on it (this is a mistake in the agent)";
                Err(Failure::new(Reason::Unproven, words))
            });
            if watchful.is_overtaken() {
                continue;
            }
            if let Err(failure) = &result {
                let reason = failure.reason.as_str();
                tracing::warn!(reason, "a model does not come into use: {}", failure.detail);
            }
            if self
                .tell
                .blocking_send(News::Done { ticket, result })
                .is_err()
            {
                return;
            }
        }
    }

    /// Neighbours are told what is here.
    fn look_over(&self) {
        if let Some(swarm) = &self.swarm {
            swarm.refresh(&self.disk);
        }
    }

    fn work(
        &mut self,
        job: &Job,
        current: Option<Digest>,
        watchful: &Watchful,
    ) -> Result<(), Failure> {
        match job {
            Job::Fetch(release) => {
                let result = self.fetch(release, current, watchful);
                let failures = self.failing.filter(|(digest, _)| *digest == release.digest);
                self.failing = match &result {
                    Ok(()) => None,
                    // Nothing was wrong with the line.
                    Err(UpdateError::Overtaken) => self.failing,
                    Err(_) => Some((release.digest, failures.map_or(0, |(_, n)| n) + 1)),
                };
                Ok(result?)
            }
            Job::Verify {
                release,
                force,
                current,
            } => Ok(self.verify(release, *force, current.as_ref(), watchful)?),
            Job::Test(release) => self.test(release),
        }
    }

    fn fetch(
        &self,
        release: &Release,
        current: Option<Digest>,
        watchful: &Watchful,
    ) -> Result<(), UpdateError> {
        if self.disk.has(release) {
            // Its signatures held when it came. The way back must not need anybody.
            return Ok(());
        }
        let coordinator = self
            .coordinator
            .as_ref()
            .ok_or(UpdateError::NoCoordinator)?;
        let pinned = fetch::pinned(self.root.as_deref())?;
        let client = Client::with(coordinator, self.counters.clone(), self.tls.clone())?;
        let now_ms = self.clock.now_ms();
        let swarm = self.swarm.as_ref();
        let _fetching = swarm.map(|swarm| swarm.begin(release.digest, &self.disk));
        let proof = fetch::Proof {
            release,
            pinned: &pinned,
            disk: &self.disk,
            swarm,
            now_ms,
        };
        let (document, uplink) = proof.document(client.registry())?;
        let failures = self.failing.filter(|(digest, _)| *digest == release.digest);
        let fetch = Fetch {
            disk: &self.disk,
            client: &client,
            watchful,
            swarm,
            uplink,
            current,
            without_delta: failures.is_some_and(|(_, n)| n >= MAX_DELTA_FAILURES),
        };
        fetch.run(release, &document)
    }

    fn verify(
        &self,
        release: &Release,
        force: bool,
        current: Option<&Release>,
        watchful: &Watchful,
    ) -> Result<(), UpdateError> {
        if let Some(current) = current.filter(|current| !force && is_older(release, current)) {
            return Err(UpdateError::Downgrade {
                release: release.to_string(),
                current: current.to_string(),
            });
        }
        let folder = self.disk.folder(release);
        if !self.disk.is_factory(release) {
            let bytes = std::fs::read(folder.join(DOCUMENT))
                .map_err(|error| UpdateError::Bytes(format!("{release}: {DOCUMENT}: {error}")))?;
            if digest_of(&bytes) != release.digest {
                let what = format!("{release}: {DOCUMENT} is another one on the disk");
                return Err(UpdateError::Bytes(what));
            }
            for file in fetch::parse(release, &bytes)?.files {
                if watchful.is_overtaken() {
                    return Err(UpdateError::Overtaken);
                }
                let path = folder.join(&file.path);
                match is_file(&path, file.length, file.sha256) {
                    Ok(true) => {}
                    Ok(false) => {
                        let what = format!("{release}: {} is another one on the disk", file.path);
                        return Err(UpdateError::Bytes(what));
                    }
                    Err(error) => {
                        let what = format!("{release}: {}: {error}", file.path);
                        return Err(UpdateError::Bytes(what));
                    }
                }
            }
        }
        let bundle = Bundle::open(&folder)?;
        let (name, version) = (&bundle.manifest.name, &bundle.manifest.version);
        if (name, version) == (&release.name, &release.version) {
            return Ok(());
        }
        Err(UpdateError::Document {
            release: release.clone(),
            why: format!("the manifest in it is of {name}@{version}"),
        })
    }

    fn test(&self, release: &Release) -> Result<(), Failure> {
        let tried = try_bundle(&self.program, &self.disk.folder(release), TEST);
        let trial = tried.map_err(|error| UpdateError::Start {
            what: "the self-test",
            error,
        })?;
        tracing::info!(%release, sandbox = trial.sandbox, "tried a model");
        match trial.fault {
            None => Ok(()),
            Some(fault) => Err(Failure::new(reason(fault), &trial.detail)),
        }
    }
}

const fn reason(fault: Fault) -> Reason {
    match fault {
        Fault::Load => Reason::Load,
        Fault::Latency => Reason::Latency,
        Fault::Memory => Reason::Memory,
        Fault::Crash => Reason::Crash,
        // Whatever else a self-test may find one day.
        _ => Reason::SelfTest,
    }
}

/// Is it an earlier version of the same model? Versions are compared number by number, as far as they have any; what
/// is no number counts as nothing.
fn is_older(release: &Release, current: &Release) -> bool {
    let numbers = |version: &str| -> Vec<u64> {
        let core = version.split(['-', '+']).next().unwrap_or_default();
        core.split('.').map(|n| n.parse().unwrap_or(0)).collect()
    };
    let (mut new, mut old) = (numbers(&release.version), numbers(&current.version));
    let length = new.len().max(old.len());
    // 1.2 is 1.2.0.
    new.resize(length, 0);
    old.resize(length, 0);
    release.name == current.name && new < old
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn older_is_older_by_its_numbers() {
        let release = |name: &str, version: &str| Release {
            name: name.into(),
            version: version.into(),
            digest: Digest([0; 32]),
        };
        let older = |a, b| is_older(&release("steel", a), &release("steel", b));
        for (a, b) in [
            ("1.9", "1.10"),
            ("1", "1.0.1"),
            ("0.9.9-rc", "1"),
            ("2", "3"),
        ] {
            assert!(older(a, b) && !older(b, a), "{a} {b}");
        }
        assert!(!older("1", "1.0") && !older("1.0", "1") && !older("1.0+a", "1.0"));
        assert!(!is_older(&release("steel", "1"), &release("conveyor", "2")));
    }

    #[test]
    fn the_way_back_needs_nobody() {
        let data = tempfile::tempdir().unwrap();
        let conveyor = concat!(env!("CARGO_MANIFEST_DIR"), "/../models/bundles/conveyor");
        let opened = Disk::open(data.path(), Some(conveyor.as_ref())).unwrap();
        let here = opened.saved.current.unwrap();
        let (tell, _news) = tokio::sync::mpsc::channel(1);
        let mut worker = Worker {
            disk: opened.disk,
            coordinator: None,
            tls: Tls::none(),
            root: None,
            program: Vec::new(),
            tell: tell.clone(),
            clock: WallClock::default(),
            counters: Counters::default(),
            swarm: None,
            failing: None,
        };
        let watchful = Watchful::of_test(tell);
        let mut fetch =
            |release: &Release| worker.work(&Job::Fetch(release.clone()), None, &watchful);
        assert_eq!(fetch(&here), Ok(()));
        let elsewhere = Release {
            digest: Digest([7; 32]),
            ..here
        };
        assert!(fetch(&elsewhere).is_err(), "only what is here");
    }

    #[test]
    fn a_newer_job_takes_the_place_of_an_older_one() {
        let slot = Arc::new(Slot::default());
        let release = Release {
            name: "a".into(),
            version: "1".into(),
            digest: Digest([1; 32]),
        };
        slot.put(Job::Fetch(release.clone()), 1, None);
        let (first, newest) = slot.next().unwrap();
        assert!(first.job.is_some());
        let (tell, _) = tokio::sync::mpsc::channel(1);
        let watchful = Watchful {
            slot: Arc::clone(&slot),
            newest,
            ticket: 1,
            tell,
        };
        assert!(!watchful.is_overtaken());
        slot.put(Job::Test(release.clone()), 2, None);
        slot.retain(vec![release.clone()], None);
        slot.put(Job::Fetch(release), 3, None);
        assert!(watchful.is_overtaken());
        let (next, _) = slot.next().unwrap();
        assert_eq!(next.job.unwrap().1, 3);
        assert_eq!(next.retain.unwrap().0.len(), 1);
        slot.close();
        assert!(slot.next().is_none());
    }
}
