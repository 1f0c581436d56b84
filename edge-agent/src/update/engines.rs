//! The models in memory.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use mesh_core::{Failure, Reason, Release};
use models::{Bundle, BundleError, Engine, EngineError, SelfTest, self_test};

use super::disk::Disk;

/// The models that look at frames. A swap is one `send`: the pipeline takes it between two frames.
#[derive(Clone, Debug, Default)]
pub struct Engines {
    /// The one whose results count.
    pub active: Option<Arc<Engine>>,
    /// The one that looks at some of the same frames for comparison.
    pub beside: Option<Arc<Engine>>,
    /// How many of them, 0..=1.
    pub share: f32,
    /// What the answers about these two carry.
    pub ticket: u64,
    /// Somebody wants to know what they say.
    pub watched: bool,
    /// Why there is no active one.
    pub why: Option<Arc<str>>,
}

/// What is tried before a model is used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Check {
    /// It was tried a moment ago, in a process of its own.
    Nothing,
    /// Its golden answers. Its time and memory were good once, and the device may be busy just now.
    Answers,
    /// These, and its time and memory.
    Everything,
}

/// Why a model cannot be used.
#[derive(Debug, thiserror::Error)]
pub(super) enum LoadError {
    /// Its bundle.
    #[error("model not loaded: {0}")]
    Bundle(#[from] BundleError),
    /// Its graph.
    #[error("model not loaded: {0}")]
    Engine(#[from] EngineError),
    /// Its answers.
    #[error("model not used, its self-test failed:\n{0}")]
    Test(SelfTest),
    /// The thread that loads.
    #[error("model not loaded: the thread that loads it has ended")]
    Thread,
}

impl LoadError {
    pub(super) fn failure(&self) -> Failure {
        let reason = match self {
            Self::Engine(EngineError::Output { .. }) => Reason::Shape,
            Self::Test(test) if !has_answers(test) => Reason::SelfTest,
            Self::Test(test) if test.latency_ms.is_none_or(|ms| ms > test.latency_budget_ms) => {
                Reason::Latency
            }
            Self::Test(_) => Reason::Memory,
            // It may be there the next time.
            Self::Thread => Reason::Timeout,
            _ => Reason::Load,
        };
        Failure::new(reason, &self.to_string())
    }
}

fn has_answers(test: &SelfTest) -> bool {
    test.golden.iter().all(|golden| golden.problems.is_empty())
}

/// Loads a model. Blocks: it takes seconds on a small board.
pub(super) fn load(disk: &Disk, release: &Release, check: Check) -> Result<Arc<Engine>, LoadError> {
    let bundle = Bundle::open(&disk.folder(release))?;
    let engine = Engine::load(&bundle)?;
    if check != Check::Nothing {
        let test = self_test(&bundle, &engine);
        let fine = match check {
            Check::Everything => test.passed(),
            _ => has_answers(&test),
        };
        if !fine {
            return Err(LoadError::Test(test));
        }
    }
    tracing::info!(model = engine.id(), "model loaded, self-test passed");
    Ok(Arc::new(engine))
}

/// Width and height in pixels that some model in memory asks for, shared with the cameras. It only grows: a picture that
/// is larger than needed costs time, one that is smaller costs answers.
#[derive(Clone, Debug, Default)]
pub struct Wanted(Arc<AtomicU64>);

impl Wanted {
    /// No picture needs to be larger than this, for now.
    #[must_use]
    pub fn of(width: u32, height: u32) -> Self {
        let wanted = Self::default();
        wanted.grow(width, height);
        wanted
    }

    /// Nothing where no model was ever in memory.
    #[must_use]
    pub fn size(&self) -> Option<(u32, u32)> {
        let both = self.0.load(Ordering::Relaxed);
        let (width, height) = ((both >> 32) as u32, both as u32);
        (both != 0).then_some((width, height))
    }

    /// From now on pictures are at least so large.
    pub fn grow(&self, width: u32, height: u32) {
        let larger = |both: u64| {
            let (w, h) = ((both >> 32) as u32, both as u32);
            Some(u64::from(w.max(width)) << 32 | u64::from(h.max(height)))
        };
        let grown = self
            .0
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, larger);
        debug_assert!(grown.is_ok(), "it always grows");
    }

    pub(crate) fn fit(&self, engine: &Engine) {
        let (_, height, width) = engine.manifest().input.channels_height_width();
        let pixels = |side: usize| u32::try_from(side).unwrap_or(u32::MAX);
        self.grow(pixels(width), pixels(height));
    }
}

/// The processor time of this thread so far: what a model costs, however busy the device is with other things.
#[must_use]
pub(crate) fn thread_time() -> Duration {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::ThreadCPUTime);
    let seconds = u64::try_from(time.tv_sec).unwrap_or(0);
    Duration::new(seconds, u32::try_from(time.tv_nsec).unwrap_or(0))
}
