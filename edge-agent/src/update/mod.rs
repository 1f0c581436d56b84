//! Comes to the model that the coordinator wishes for, and back by itself.
//!
//! ```text
//!  uplink ──desired──> driver ──jobs──> worker (fetch, verify, test)
//!         <─reported──   │ ▲  <──done───
//!                engines │ │ what both models said
//!                        ▼ │
//!                     pipeline ──frames──> beside
//! ```
//!
//! All decisions are those of [`mesh_core::update`]; the `driver` carries them out.

mod beside;
mod client;
mod config;
pub mod disk;
mod driver;
mod engines;
mod error;
mod fetch;
mod files;
pub mod registry;
mod status;
pub(crate) mod swarm;
mod worker;

use std::{
    ffi::OsString,
    sync::{
        Arc,
        mpsc::{self, sync_channel},
    },
    thread::JoinHandle,
    time::Duration,
};

use mesh_core::{Desired, Failure, Reported, update::Said};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

pub(crate) use beside::{Errand, Look, Trial, Trouble, input, run, said};
pub use config::UpdateConfig;
use disk::{Disk, DiskError, Opened};
use driver::Driver;
pub(crate) use engines::thread_time;
pub use engines::{Engines, Wanted};
pub(crate) use fetch::settings;
pub(crate) use status::{doctor, status};
pub(crate) use swarm::{Holding, Swarm};
use worker::{Slot, Worker};

use crate::{clock::WallClock, config::Config, counters::Counters, identity::Tls};

/// News for the driver: some seconds of frames, which it takes within a moment.
const NEWS: usize = 128;
/// Frames that wait for the second model: a second one would only be older.
const ERRANDS: usize = 1;
/// Frames on which the models disagree, until the pipeline hears of them: it keeps the pictures of the last few only.
const DISAGREED: usize = 8;
/// How long a thread is waited for that may be talking to somebody far away, or trying a model. It is of no
/// consequence if it is cut off.
const END: Duration = Duration::from_secs(1);

/// Something that happened, for the driver.
#[derive(Debug)]
pub(crate) enum News {
    /// How far a fetch is.
    Progress { ticket: u64, share: f32 },
    /// A job is done.
    Done {
        ticket: u64,
        result: Result<(), Failure>,
    },
    /// A frame went through one model or two.
    Frame {
        ticket: u64,
        active: Result<Said, Failure>,
        beside: Option<Result<Said, Failure>>,
    },
}

/// Why updates cannot start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The folder of models.
    #[error(transparent)]
    Disk(#[from] DiskError),
    /// A thread, or this program's name for the self-test.
    #[error("cannot start {0}: {1}")]
    Thread(&'static str, std::io::Error),
}

/// The ends that the rest of the agent holds.
pub(crate) struct Ends {
    /// The models that look at frames.
    pub(crate) engines: watch::Receiver<Engines>,
    /// The size of pictures that they need.
    pub(crate) wanted: Wanted,
    /// For the pipeline.
    pub(crate) trial: Trial,
    /// Frames on which two models disagree: the source's number and the frame's.
    pub(crate) disagreed: mpsc::Receiver<(usize, u64)>,
    /// What the coordinator wishes.
    pub(crate) desired: watch::Sender<Option<Desired>>,
    /// What the device is.
    pub(crate) reported: watch::Receiver<Option<Reported>>,
}

/// Updates that run.
pub(crate) struct Updates {
    driver: tokio::task::JoinHandle<()>,
    worker: JoinHandle<()>,
    beside: JoinHandle<()>,
    stop: CancellationToken,
}

impl Updates {
    /// Loads the model that is to run, and takes care of it from then on. `program` is a file and its first arguments
    /// that lead to [`models::try_here`]; `swarm` is what neighbours have, where there are any.
    pub(crate) async fn start(
        config: &Config,
        clock: WallClock,
        counters: Counters,
        (tls, swarm): (Tls, Option<Swarm>),
        program: Vec<OsString>,
    ) -> Result<(Self, Ends), StartError> {
        let Opened {
            disk,
            mut saved,
            since,
            trouble,
        } = Disk::open(&config.data, config.model.bundle.as_deref())?;
        if let Some(why) = &trouble {
            tracing::error!("{why}");
        }
        if config.model.bundle.is_none() && saved.current.is_none() {
            tracing::warn!("no model is configured (model.bundle): the device looks at nothing");
        }
        if !config.update.enabled {
            saved.desired = None;
        }
        let (tell, news) = tokio::sync::mpsc::channel(NEWS);
        let (to_beside, errands) = tokio::sync::mpsc::channel(ERRANDS);
        let (disagree, disagreed) = sync_channel(DISAGREED);
        let (wish, desired) = watch::channel(None);
        let (report, reported) = watch::channel(None);
        let (swap, engines) = watch::channel(Engines::default());
        let wanted = Wanted::default();
        let slot = Arc::new(Slot::default());
        let worker = Worker {
            disk: disk.clone(),
            coordinator: config.coordinator().map(str::to_owned),
            tls,
            root: config.update.root.clone(),
            program,
            tell: tell.clone(),
            clock: clock.clone(),
            counters,
            swarm,
            failing: None,
        };
        let work = Arc::clone(&slot);
        let worker = thread("update", move || worker.run(work))?;
        let cost = beside::Cost::default();
        let beside = beside::Beside {
            errands,
            tell: tell.clone(),
            disagreed: disagree,
            cost: cost.clone(),
        };
        let beside = thread("beside", move || beside.run())?;
        let driver = Driver::begin(driver::Start {
            disk,
            saved,
            since,
            trouble,
            slot,
            news,
            desired,
            engines: swap,
            reported: report,
            wanted: wanted.clone(),
            wall: clock,
        })
        .await;
        let stop = CancellationToken::new();
        let driver = tokio::spawn(driver.run(stop.clone()));
        let updates = Self {
            driver,
            worker,
            beside,
            stop,
        };
        let ends = Ends {
            engines,
            wanted,
            trial: Trial::new(to_beside, tell, cost),
            disagreed,
            desired: wish,
            reported,
        };
        Ok((updates, ends))
    }

    /// Takes down that this is no crash, and ends. The pipeline must have ended.
    pub(crate) async fn stop(self) {
        self.stop.cancel();
        let _ = self.driver.await;
        let end = tokio::time::Instant::now() + END;
        let both = [self.worker, self.beside];
        while !both.iter().all(JoinHandle::is_finished) && tokio::time::Instant::now() < end {
            tokio::time::sleep(END / 50).await;
        }
    }
}

fn thread(
    name: &'static str,
    run: impl FnOnce() + Send + 'static,
) -> Result<JoinHandle<()>, StartError> {
    std::thread::Builder::new()
        .name(name.into())
        .spawn(run)
        .map_err(|error| StartError::Thread(name, error))
}
